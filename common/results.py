"""After the model: scores, pictures and volumes of test subjects, and the tables of a paper, row by row.

report      scores what was synthesised beside the standing baselines
synthesize  writes missing contrasts as volumes
reproduce   runs every row of a table of the paper and sets it beside the printed numbers

A row of a table is nothing but a command with other flags in a run folder of its own, so that it can be repeated by hand;
what it left behind (results.json) is used again instead of running it twice.
"""
import argparse
import csv
import dataclasses
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import metrics, pictures
from common.cli import flags
from common.run import read_checkpoint, replace

SHOWN = 0.3                                     # error at which an error map is white


# ---- one model -------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """n synthesised slices of one kind.  All images (n, H, W) in [0,1].

    sources: {contrast: images} that were known;  target: contrast;  results: {method: images}, the start images and the
    model's;  subjects: (n,) names
    """
    sources: dict
    target: str
    truth: np.ndarray
    results: dict
    subjects: np.ndarray

    @property
    def name(self):
        return "+".join(self.sources) + "->" + self.target


def report(run, tasks, train, protocol, **facts):
    """Score every task beside the standing baselines: results.json, results.npz, samples.png, and a table on the screen.

    train: {contrast: (m, H, W)}, slices of training subjects for the baselines.  protocol: what a value is, in words.
    """
    rows, kept, sheet = [], {}, []
    width = max(len(task.sources) for task in tasks)
    for task in tasks:
        methods = {**task.results, **metrics.baselines(train, task.sources, task.target)}
        rows += metrics.score_table(task.name, methods, task.truth, task.subjects, slices=len(task.truth))
        for i in (0, len(task.truth) // 2):
            *start, model = (images[i] for images in task.results.values())
            error = pictures.error_map(task.truth[i], model, SHOWN)
            sources = [images[i] for images in task.sources.values()]
            blank = [np.ones_like(task.truth[i])] * (width - len(sources))
            sheet.append((f"{task.target}, {task.subjects[i]}", [*sources, *blank, *start, model, task.truth[i], error]))
        middle = len(task.truth) // 2                       # one slice per task stays with the numbers, for reproduce
        kept.update({f"{task.name}|{method}": images[middle].astype(np.float16) for method, images in task.results.items()})
        kept[f"{task.name}|truth"] = task.truth[middle].astype(np.float16)
    run.say("\n" + metrics.markdown_table(rows) + "\n")
    run.results(rows, kept, protocol, **facts)
    columns = [*(f"source {i + 1}" for i in range(width)), *tasks[0].results, "truth", "error"]
    pictures.grid(run.out / "samples.png", [images for _, images in sheet[:12]], columns, [label for label, _ in sheet[:12]],
                  note=f"error: |truth - {list(tasks[0].results)[-1]}|, white from {SHOWN} on")
    run.say(f"written: {run.out / 'results.json'}, {run.out / 'samples.png'}")


def synthesize(run, work, contrasts, batch, fill, label):
    """Write missing contrasts as NIfTI volumes: all slices, on the source's own grid, in normalised units.

    work: from data.to_synthesize.  fill(u, known, keys): u (B, C, H, W) in [0,1], known (B, C) bool, keys (subject, slice)
    of each -> (B, C, H, W).  label: of the method, for the file's header.
    """
    for subject, sources, absent, volume, paths in work:
        known = torch.tensor([c in sources for c in contrasts], device=run.device)      # (C,)
        out = volume.images.copy()                                                      # (Z, C, H, W)
        filled = np.flatnonzero(volume.images.any((1, 2, 3)))                           # elsewhere all is background
        for part in run.batches(f"synthesis of {subject.name}", filled, batch):
            keys = [(subject.name, int(z)) for z in part]
            out[part] = fill(run.fetch(volume.images, part), known.expand(len(part), -1), keys).cpu().numpy()
        for c in (c for c in absent if not paths[c].exists()):
            volume.write(paths[c], out[:, list(contrasts).index(c)], f"synthetic {c}, {label}, normalised")
        shown, folder = sources + absent, paths[absent[0]].parent
        some = filled[np.linspace(0, len(filled) - 1, 5).astype(int)][1:-1]
        pictures.grid(folder / "panel.png", [[out[z, list(contrasts).index(c)] for c in shown] for z in some],
                      [c if c in sources else f"{c} (synthetic)" for c in shown], [f"slice {z}" for z in some])
        run.say(f"{subject.name}: wrote {', '.join(absent)} from {', '.join(sources)} to {folder}")


# ---- a table of the paper --------------------------------------------------------------------------------------------


def list_tables(tables):
    """What --reproduce can do, as text."""
    return "\n".join(f"{name:10} {table['title']}\n" + "".join(f"{'':12}{row:28} {flags(changes) or '(no flags)'}\n"
                                                              for row, changes in table.get("rows", {}).items())
                     for name, table in tables.items())


def reproduce(script, name, table, cfg, args, free, stages, method, work):
    """Train and score every row of a table for every seed; writes OUT/tables/NAME.md, .csv and .png.

    table   {"title": ..., "against": the row that all are compared with, "rows": {row: {field: value}}}
    free    fields that need no training;  stages {stage: fields that matter to it and later ones only}: a row that trains
            otherwise takes over from the first model what does not differ
    method  the model's name in results.json;  work(cfg, args): trains and evaluates in one run folder
    """
    seed = args.seed
    jobs = [(row, changes, seed + k) for k in range(args.seeds) for row, changes in table["rows"].items()]
    found = {}
    for number, (row, changes, job_seed) in enumerate(jobs, 1):
        wanted = dataclasses.replace(cfg, **changes)
        trained = {k: v for k, v in changes.items() if k not in free and getattr(cfg, k) != v}
        folder = row_folder(args.out, trained, job_seed - seed)
        results = find_results(folder, wanted, job_seed, args.data)
        if results is None:
            say(f"\n{name}, run {number} of {len(jobs)}: {row}, seed {job_seed}, in {folder}")
            take_over(row_folder(args.out, {}, job_seed - seed), folder, unaffected(stages, trained))
            work(wanted, argparse.Namespace(**{**vars(args), "out": folder, "seed": job_seed}))
            results = find_results(folder, wanted, job_seed, args.data)
        found.setdefault(row, []).append(results)
    if int(os.environ.get("RANK", 0)) == 0:
        printed = Path(__file__).parent.parent / "data" / "paper_tables" / f"{script}.json"
        paper = json.loads(printed.read_text(encoding="utf-8"))["tables"].get(name, {}).get("rows", {})
        lines = compare(table, {row: [content for content, _ in seeds] for row, seeds in found.items()}, paper, method)
        home = args.out / "tables"
        home.mkdir(exist_ok=True)
        text = markdown(name, table, lines, found, seed)
        replace(home / f"{name}.md", lambda tmp: tmp.write_text(text, encoding="utf-8"))
        replace(home / f"{name}.csv", lambda tmp: tmp.write_text(as_csv(lines), encoding="utf-8", newline=""))
        picture(home / f"{name}.png", {row: seeds[0][1] for row, seeds in found.items()}, method)
        say(f"\n{text}\nwritten: {home / name}.md, .csv, .png")


def say(text):
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def row_folder(out, trained, seed):
    """OUT for the model as configured; OUT/rows/... for one trained otherwise, or with the seed-th further seed."""
    parts = [f"{k}={v}" for k, v in sorted(trained.items())] + ([f"seed+{seed}"] if seed else [])
    return out / "rows" / ",".join(parts) if parts else out


def unaffected(stages, trained):
    """The leading stages to which the fields in `trained` do not matter."""
    first = [next((i for i, fields in enumerate(stages.values()) if field in fields), 0) for field in trained]
    return list(stages)[:min(first, default=0)]


def take_over(source, folder, stages):
    """Start a run folder with finished stages of another one's checkpoint, if that has them and this one has nothing."""
    if not stages or (folder / "last.pt").exists() or not (source / "last.pt").exists() or int(os.environ.get("RANK", 0)) > 0:
        return
    content = read_checkpoint(source / "last.pt")
    if all(content["stages"].get(stage, {}).get("finished") for stage in stages):
        content["stages"] = {stage: content["stages"][stage] for stage in stages}
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / "last.pt", lambda tmp: torch.save(content, tmp))


def find_results(folder, cfg, seed, data):
    """(content, path of the images) of the results in a folder that were made with this configuration, or None."""
    for path in sorted(folder.glob("results*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        same = content["config"] == json.loads(json.dumps(vars(cfg))) and content["seed"] == seed
        if same and Path(content["data"]).resolve() == data.resolve():
            return content, path.with_suffix(".npz")
    return None


def compare(table, found, paper, method):
    """One dict per row, task and metric, with the mean over all tasks as a task of its own ("mean").

    found: {row: [content of results.json, one per seed]}.  A subject's value is its mean over the seeds.  difference, p and
    p_holm: against the same subjects in the row table["against"]; Holm over the comparisons within one task and metric.
    """
    reference = table["against"]
    scores = {(row, "ours"): subject_values(contents, method) for row, contents in found.items()}
    others = dict.fromkeys(r["method"] for r in found[reference][0]["rows"] if r["method"] != method)
    scores.update({(other, "baseline"): subject_values(found[reference], other) for other in others})
    lines = []
    for row in (row for row in paper if row not in table["rows"]):
        lines += [{"row": row, "kind": "paper only", "task": task, "metric": metric, "paper": value}
                  for task, cells in paper[row].items() for metric, value in cells.items()]
    for (row, kind), values in scores.items():
        for (task, metric), by_seed in values.items():
            merged = over_seeds(by_seed)
            line = {"row": row, "kind": kind, "task": task, "metric": metric, **metrics.summary(merged),
                    "seeds": [float(np.mean(list(v.values()))) for v in by_seed],
                    "flags": flags(table["rows"].get(row, {})), "paper": paper.get(row, {}).get(task, {}).get(metric)}
            if (row, kind) != (reference, "ours"):
                line.update(metrics.wilcoxon(merged, over_seeds(scores[reference, "ours"][task, metric])))
            lines.append(line)
    for task, metric in dict.fromkeys((line["task"], line["metric"]) for line in lines):
        tested = [line for line in lines if (line["task"], line["metric"]) == (task, metric) and "p" in line]
        for line, corrected in zip(tested, metrics.holm([line["p"] for line in tested])):
            line["p_holm"] = corrected
    return lines


def subject_values(contents, method):
    """{(task, metric): [{subject: value}, one per seed]}, with task "mean": each subject's mean over its tasks."""
    values = {}
    for content in contents:
        rows = [r for r in content["rows"] if r["method"] == method and not r.get("variant")]
        for metric in dict.fromkeys(r["metric"] for r in rows):
            tasks = {r["task"]: r["values"] for r in rows if r["metric"] == metric}
            tasks["mean"] = over_seeds(list(tasks.values()))
            for task, by_subject in tasks.items():
                values.setdefault((task, metric), []).append(by_subject)
    return values


def over_seeds(values):
    """[{subject: value}] -> {subject: mean}, of the subjects that are in all."""
    return {s: float(np.mean([v[s] for v in values])) for s in values[0] if all(s in v for v in values)}


def markdown(name, table, lines, found, seed):
    """The table for people: PSNR ± std over subjects / SSIM, and the paper's numbers in brackets."""
    ours = [line for line in lines if line["kind"] != "paper only"]
    content, n = found[table["against"]][0][0], max(line["n"] for line in ours)
    seeds, tested = len(found[table["against"]]), len({line["row"] for line in ours}) - 1
    tasks = [t for t in dict.fromkeys(line["task"] for line in ours) if t != "mean"]
    cells = {(line["row"], line["task"], line["metric"]): line for line in lines}
    text = [f"## {name}: {table['title']}", "",
            f"Data: {Path(content['data']).name}{', digital phantoms' if content['phantom'] else ''}; {n} test subjects; "
            f"{seeds} training seed{'s' if seeds > 1 else ''} (from {seed}), a subject's value is its mean over them.  "
            f"{content['protocol']}.", "",
            f"PSNR in dB ± std over subjects / SSIM; in brackets what the paper prints, for its own data.  Mean: over the "
            f"tasks, with a 95 % bootstrap interval over subjects{', and the mean of each seed' if seeds > 1 else ''}.  "
            f"Difference of that mean to \"{table['against']}\", with Wilcoxon's paired p over subjects, Holm-corrected for "
            f"{tested} comparisons"
            + (f" (with {n} subjects it cannot fall below {min(1, 2 * tested / 2 ** n):.2g})." if n >= metrics.FEWEST else ".")]
    rows = {line["row"]: line for line in lines}            # the last line of each; its kind and flags are the row's
    if len(tasks) > 6:                                      # one line per task
        shown = [row for row, line in rows.items() if line["kind"] != "paper only"]
        body = [["task", *shown]] + [[t, *(cell(cells, row, t) for row in shown)] for t in [*tasks, "mean"]]
    else:
        body = [["row", "flags", *tasks, "mean PSNR", "difference"]]
        body += [[row, f"`{line['flags']}`" if line.get("flags") else "", *(cell(cells, row, t) for t in tasks),
                  average(cells.get((row, "mean", "psnr"))), difference(cells.get((row, "mean", "psnr")))]
                 for row, line in rows.items()]
    body.insert(1, ["---"] * len(body[0]))
    return "\n".join([*text, "", *("| " + " | ".join(row) + " |" for row in body), ""])


def cell(cells, row, task):
    """One task of one row."""
    psnr, ssim = (cells.get((row, task, metric), {}) for metric in ("psnr", "ssim"))
    parts = []
    if psnr.get("n"):
        parts.append(f"{psnr['mean']:.2f} ± {psnr['std']:.2f} / {ssim['mean']:.3f}")
    if psnr.get("paper"):
        parts.append(f"({psnr['paper']:.2f} / {ssim['paper']:.3f})")
    return " ".join(parts)


def average(line):
    if not line:
        return ""
    low_high = f" [{line['ci95'][0]:.2f}, {line['ci95'][1]:.2f}]" if line["ci95"] else ""
    seeds = "; " + ", ".join(f"{s:.2f}" for s in line["seeds"]) if len(line["seeds"]) > 1 else ""
    return f"{line['mean']:.2f}{low_high}{seeds}"


def difference(line):
    if not line or "p" not in line:
        return ""
    return f"{line['difference']:+.2f} dB, " + (f"n = {line['n']}, too few to test" if line["p"] is None
                                                else f"p = {line['p_holm']:.2g}")


def as_csv(lines):
    """Every row, task and metric, for programs."""
    columns = ["row", "kind", "flags", "task", "metric", "mean", "std", "ci95_low", "ci95_high", "n", "seeds", "paper",
               "difference", "p", "p_holm"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", restval="")
    writer.writeheader()
    for line in lines:
        low, high = line.get("ci95") or ("", "")
        seeds = " ".join(f"{s:.4f}" for s in line.get("seeds", []))
        writer.writerow({**line, "ci95_low": low, "ci95_high": high, "seeds": seeds})
    return text.getvalue()


def picture(path, files, method):
    """The same slice in every row of the table: result above its error map.  files: {row: npz of one seed}"""
    tasks, sheet, labels = {}, [], []
    for row, file in files.items():
        with np.load(file) as images:
            tasks.update({(key.rsplit("|", 1)[0], row): images[key] for key in images if key.endswith("|" + method)})
            truth = {key.rsplit("|", 1)[0]: images[key] for key in images if key.endswith("|truth")}
    for task in list(truth)[:6]:
        results = [tasks[task, row] for row in files]
        sheet += [[truth[task], *results],
                  [np.ones_like(truth[task]), *(pictures.error_map(truth[task], image, SHOWN) for image in results)]]
        labels += [task, "error"]
    pictures.grid(path, sheet, ["truth", *files], labels, note=f"error: |truth - result|, white from {SHOWN} on")
