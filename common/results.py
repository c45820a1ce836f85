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

from common import downstream, metrics, pictures
from common.cli import flags
from common.run import RunError, read_checkpoint, replace

SHOWN = 0.3                                     # error at which an error map is white
CLASS_COLOURS = {1: (220, 40, 40), 2: (40, 180, 60), 3: (60, 90, 255), 4: (60, 90, 255)}
# of label maps, as in Fig. 6 of MetaDB: necrosis red, oedema green, enhancing tumour (4 of BraTS, 3 from 2023 on) blue


# ---- one model -------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """n synthesised slices of one kind.  All images (n, H, W) in [0,1].

    sources: {contrast: images} that were known;  target: contrast;  results: {method: images}, the model's first;
    subjects: (n,) names
    segmenter, labels: of the target contrast (common/downstream.py), and the true label maps (n, H, W); or None
    """
    sources: dict
    target: str
    truth: np.ndarray
    results: dict
    subjects: np.ndarray
    segmenter: torch.nn.Module | None = None
    labels: np.ndarray | None = None

    @property
    def name(self):
        return "+".join(self.sources) + "->" + self.target


def report(run, tasks, train, protocol):
    """Score every task beside the standing baselines: results.json, results.npz, samples.png, and a table on the screen.

    train: {contrast: (m, H, W)}, slices of training subjects for the baselines.  protocol: what a value is, in words.
    """
    rows, kept, sheet, drawn = [], {}, [], []
    width = max(len(task.sources) for task in tasks)
    for task in tasks:
        methods = {**task.results, **metrics.baselines(train, task.sources, task.target)}
        rows += metrics.score_table(task.name, methods, task.truth, task.subjects, slices=len(task.truth))
        if task.segmenter:
            maps = {method: downstream.segment(task.segmenter, images)
                    for method, images in {**methods, "real slices": task.truth}.items() if method != "mean-of-train"}
            for method, found in maps.items():
                rows += downstream.dice_rows(task.name, method, task.labels, found, task.subjects, task.segmenter.classes)
            name, *_ = task.results
            both = {"truth": (task.truth, task.labels), "on the real slice": (task.truth, maps["real slices"]),
                    f"on {name}": (task.results[name], maps[name])}
            i = int((task.labels > 0).sum((1, 2)).argmax())                     # the slice that shows most
            shown = {title: pictures.overlay(images[i], labels[i], CLASS_COLOURS) for title, (images, labels) in both.items()}
            drawn.append((f"{task.name}, {task.subjects[i]}", shown))
            kept[f"{task.name}|{name}|drawn"], kept[f"{task.name}|truth|drawn"] = shown[f"on {name}"], shown["truth"]
        for i in (0, len(task.truth) // 2):
            model, *start = (images[i] for images in task.results.values())
            error = pictures.error_map(task.truth[i], model, SHOWN)
            sources = [images[i] for images in task.sources.values()]
            blank = [np.ones_like(task.truth[i])] * (width - len(sources))
            what = task.name if width == 1 else task.target
            sheet.append((f"{what}, {task.subjects[i]}", [*sources, *blank, *start, model, task.truth[i], error]))
        middle = len(task.truth) // 2                       # one slice per task stays with the numbers, for reproduce
        kept.update({f"{task.name}|{method}": images[middle].astype(np.float16) for method, images in task.results.items()})
        kept[f"{task.name}|truth"] = task.truth[middle].astype(np.float16)
    run.say("\n" + metrics.markdown_table(rows) + "\n")
    run.results(rows, kept, protocol)
    name, *others = tasks[0].results
    columns = [*(f"source {i + 1}" for i in range(width)), *others, name, "truth", "error"]
    pictures.grid(run.out / "samples.png", [images for _, images in sheet[:12]], columns, [label for label, _ in sheet[:12]],
                  note=f"error: |truth - {name}|, white from {SHOWN} on")
    if drawn:
        pictures.grid(run.out / "segmentation.png", [list(shown.values()) for _, shown in drawn], list(drawn[0][1]),
                      [label for label, _ in drawn])
    run.say(f"written: {run.out / 'results.json'}, {run.out / 'samples.png'}")


def synthesize(run, work, contrasts, batch, fill, label):
    """Write missing contrasts as NIfTI volumes: all slices, on the source's own grid; CT in HU, others in normalised units.

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
        absent = [c for c in absent if not paths[c].exists()]
        for c in absent:
            volume.write(paths[c], out[:, list(contrasts).index(c)], f"synthetic {c}, {label}", contrast=c)
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

    table   {"title": ..., "against": the row that all are compared with, "rows": {row: {field: value}}}, and "metric", which
            rows are compared by, if that is not PSNR
    free    fields that need no training;  stages {stage: fields that matter to it and later ones only}: a row that trains
            otherwise takes over from the first model what does not differ
    method  the model's name in results.json
    work    work(cfg, args) -> path: trains and evaluates in one run folder, or finds that this was done; the results.json
            (None in all processes but the first)
    """
    printed = Path(__file__).parent.parent / "data" / "paper_tables" / f"{script}.json"
    paper = json.loads(printed.read_text(encoding="utf-8"))["tables"].get(name, {}).get("rows", {})
    seed, jobs, found = args.seed, [], {}
    for further in range(args.seeds):
        for row, changes in table["rows"].items():
            try:
                wanted = dataclasses.replace(cfg, **changes)
            except ValueError as error:                     # before hours of work, not after
                raise RunError(f"{name}, row {row} ({flags(changes)}): {error}", status=2) from error
            trained = {k: v for k, v in changes.items() if k not in free and getattr(cfg, k) != v}
            jobs.append((row, wanted, trained, further))
    jobs.sort(key=lambda job: (job[3], bool(job[2])))       # the model as configured first: others take over its stages
    for number, (row, wanted, trained, further) in enumerate(jobs, 1):
        folder, first = row_folder(args.out, trained, further), row_folder(args.out, {}, further)
        here = argparse.Namespace(**{**vars(args), "out": folder, "seed": seed + further})
        say(f"\n{name}, run {number} of {len(jobs)}: {row}, seed {here.seed}, in {folder}")
        if not any(folder.glob("results*.json")):           # the model first, so that config.json holds its own flags
            take_over(first, folder, unaffected(stages, trained))
            work(dataclasses.replace(cfg, **trained), argparse.Namespace(**{**vars(here), "evaluate": False}))
        path = work(wanted, here)
        if path:                                            # read now: the next row may give the file another name
            with np.load(path.with_suffix(".npz")) as images:
                found.setdefault(row, []).append((json.loads(path.read_text(encoding="utf-8")), dict(images)))
    if found:
        found = {row: found[row] for row in table["rows"]}
        contents = {row: [content for content, _ in seeds] for row, seeds in found.items()}
        lines = compare(table, contents, paper, method)
        text = markdown(name, table, lines, contents[table["against"]], seed, free)
        home = args.out / "tables"
        say(f"\n{text}")
        home.mkdir(exist_ok=True)
        replace(home / f"{name}.md", lambda tmp: tmp.write_text(text, encoding="utf-8"))
        replace(home / f"{name}.csv", lambda tmp: tmp.write_text(as_csv(lines), encoding="utf-8", newline=""))
        picture(home / f"{name}.png", {row: seeds[0][1] for row, seeds in found.items()}, method)
        say(f"written: {home / name}.md, .csv, .png")


def say(text):
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def row_folder(out, trained, further):
    """OUT for the model as configured; OUT/rows/... for one trained otherwise, or with a further seed."""
    parts = [f"{k}={v}" for k, v in sorted(trained.items())] + ([f"seed{further}"] if further else [])
    return out / "rows" / "+".join(parts) if parts else out


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


def compare(table, found, paper, method):
    """One dict per row, task and metric, with the mean over all tasks as a task of its own ("mean").

    found: {row: [content of results.json, one per seed]}.  A subject's value is its mean over the seeds.  difference, p and
    p_holm, over `pairs` subjects: against the row table["against"]; Holm over the comparisons within one task and metric.
    """
    reference = table["against"]
    scores = {(row, "ours"): subject_values(contents, method) for row, contents in found.items()}
    others = dict.fromkeys(r["method"] for r in found[reference][0]["rows"] if r["method"] != method)
    scores.update({(other, "baseline"): subject_values(found[reference], other) for other in others})
    lines = []
    known = {key for values in scores.values() for key in values}
    for row in (row for row in paper if row not in table["rows"]):
        lines += [{"row": row, "kind": "paper only", "task": task, "metric": metric, "paper": value}
                  for task, cells in paper[row].items() for metric, value in cells.items() if (task, metric) in known]
    for (row, kind), values in scores.items():
        for (task, metric), by_seed in values.items():
            merged = over_seeds(by_seed)
            line = {"row": row, "kind": kind, "task": task, "metric": metric, **metrics.summary(merged),
                    "seeds": [float(np.mean(list(v.values()))) for v in by_seed if v],
                    "flags": flags(table["rows"].get(row, {})), "paper": paper.get(row, {}).get(task, {}).get(metric)}
            if (row, kind) != (reference, "ours") and (task, metric) in scores[reference, "ours"]:
                test = metrics.wilcoxon(merged, over_seeds(scores[reference, "ours"][task, metric]))
                line.update(p=test["p"], difference=test["difference"], pairs=test["n"])
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


def markdown(name, table, lines, contents, seed, free):
    """The table for people: PSNR ± std over subjects / SSIM, and the paper's numbers in brackets.

    contents: of the results.json of the row table["against"], one per seed.
    """
    ours, metric = [line for line in lines if line["kind"] != "paper only"], table.get("metric", "psnr")
    content, n, seeds = contents[0], max(line["n"] for line in ours), len(contents)
    tested = sum("p" in line for line in ours if (line["task"], line["metric"]) == ("mean", metric))
    least = 2 * tested / 2 ** n                             # Wilcoxon's smallest p without ties, corrected
    floor = f" (with {n} subjects it cannot fall below {min(1, least):.2g})" if n >= metrics.FEWEST and least > 1e-3 else ""
    dice = " / Dice, mean of the classes" if any(line["metric"] == "dice" for line in ours) else ""
    tasks = [t for t in dict.fromkeys(line["task"] for line in ours) if t != "mean"]
    cells = {(line["row"], line["task"], line["metric"]): line for line in lines}
    text = [f"## {name}: {table['title']}", "",
            f"Data: {Path(content['data']).resolve().name}{', digital phantoms' if content['phantom'] else ''}; {n} test "
            f"subjects; {seeds} training seed{'s' if seeds > 1 else ''} (from {seed}), a subject's value is its mean over "
            f"them.  {content['protocol']}.  Beside a row's flags: {flags({k: content['config'][k] for k in free})}.", "",
            f"PSNR in dB ± std over subjects / SSIM{dice}; in brackets what the paper prints, for its own data.  Mean: over "
            f"the tasks, with a 95 % bootstrap interval over subjects{', and the mean of each seed' if seeds > 1 else ''}.  "
            f"Difference of that mean to \"{table['against']}\", with Wilcoxon's paired p over subjects, Holm-corrected for "
            f"the {tested} comparisons of this column{floor}."]
    rows = {line["row"]: line for line in lines}            # the last line of each; its kind and flags are the row's
    body = [["row", "flags", *tasks, f"mean {dict(psnr='PSNR', dice='Dice')[metric]}", "difference"]]
    for row, line in rows.items():
        mean = cells.get((row, "mean", metric), {})
        body.append([row, f"`{line['flags']}`" if line.get("flags") else "", *(cell(cells, row, task) for task in tasks),
                     average(mean), difference(mean)])
    if len(tasks) > 6:                                      # too wide to read: one line per task
        body = [list(line) for line in zip(*body)]
    body.insert(1, ["---"] * len(body[0]))
    return "\n".join([*text, "", *("| " + " | ".join(row) + " |" for row in body), ""])


def cell(cells, row, task):
    """One task of one row."""
    psnr, ssim, dice = (cells.get((row, task, metric), {}) for metric in ("psnr", "ssim", "dice"))
    parts = []
    if psnr.get("n"):
        spread = f" ± {psnr['std']:.2f}" if psnr["n"] > 1 else ""
        parts.append(f"{psnr['mean']:.2f}{spread} / {ssim['mean']:.3f}")
    if dice.get("n"):
        parts.append(f"/ {dice['mean']:.3f}")
    if psnr.get("paper"):
        parts.append(f"({psnr['paper']:.2f} / {ssim['paper']:.3f})")
    return " ".join(parts)


def average(line):
    if not line.get("n"):
        return ""
    digits = 2 if line["metric"] == "psnr" else 3
    low_high = " [{:.{d}f}, {:.{d}f}]".format(*line["ci95"], d=digits) if line["ci95"] else ""
    seeds = "; " + ", ".join(f"{s:.{digits}f}" for s in line["seeds"]) if len(line["seeds"]) > 1 else ""
    return f"{line['mean']:.{digits}f}{low_high}{seeds}"


def difference(line):
    if line.get("difference") is None:
        return ""
    p = f"n = {line['pairs']}, too few to test" if line["p"] is None else f"p = {line['p_holm']:.2g}"
    return (f"{line['difference']:+.2f} dB, " if line["metric"] == "psnr" else f"{line['difference']:+.3f}, ") + p


def as_csv(lines):
    """Every row, task and metric, for programs."""
    columns = ["row", "kind", "flags", "task", "metric", "mean", "std", "ci95_low", "ci95_high", "n", "seeds", "paper",
               "difference", "pairs", "p", "p_holm"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", restval="")
    writer.writeheader()
    for line in lines:
        low, high = line.get("ci95") or ("", "")
        seeds = " ".join(f"{s:.4f}" for s in line.get("seeds", []))
        writer.writerow({**line, "ci95_low": low, "ci95_high": high, "seeds": seeds})
    return text.getvalue()


def picture(path, found, method):
    """The same slice in every row of the table: result above its error map, and what a segmenter drew on one of the slices.

    found: {row: {"task|method": image, "task|method|drawn": image in colour}}
    """
    sheet, labels = [], []
    for key, truth in [(k, image) for k, image in next(iter(found.values())).items() if k.endswith("|truth")][:6]:
        task = key.removesuffix("|truth")
        results = [images.get(f"{task}|{method}", np.full_like(truth, np.nan)) for images in found.values()]
        sheet += [[truth, *results], [np.ones_like(truth), *(pictures.error_map(truth, image, SHOWN) for image in results)]]
        labels += [task, "error"]
        if f"{key}|drawn" in next(iter(found.values())):
            nothing = np.full((*truth.shape, 3), np.nan)
            sheet.append([next(iter(found.values()))[f"{key}|drawn"],
                          *(images.get(f"{task}|{method}|drawn", nothing) for images in found.values())])
            labels.append("segmented, another slice")
    pictures.grid(path, sheet, ["truth", *found], labels, note=f"error: |truth - result|, white from {SHOWN} on")
