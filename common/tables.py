"""The tables of a paper: every row is trained and scored, and set beside the printed numbers.

A row of a table is nothing but a command with other flags in a run folder of its own, so that it can be repeated by hand.
What it left behind (results.json) is used again instead of running it twice.

Rows are data: data/paper_tables/<script>.json.  In a table's entry "flags" holds {row: {field: value}}, "against" the row
that the others are compared with, "rows" the numbers that the paper prints.
"""
import argparse
import csv
import dataclasses
import io
import json
import os
from pathlib import Path

import numpy as np
import torch

from common import metrics, pictures
from common.cli import flags
from common.evaluation import SHOWN
from common.files import RunError, read_checkpoint, replace


def load_tables(script):
    """{name: {"title", "against", "metric", "rows": {row: {field: value}}, "paper": {row: numbers}}} of a script."""
    path = Path(__file__).parent.parent / "data" / "paper_tables" / f"{script}.json"
    tables = {}
    for name, table in json.loads(path.read_text(encoding="utf-8"))["tables"].items():
        rows = {}
        for row, changes in table["flags"].items():
            rows[row] = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
        tables[name] = {"title": table["title"], "against": table["against"], "metric": table.get("metric", "psnr"),
                        "rows": rows, "paper": table.get("rows", {})}
    return tables


# ---- the commands ----------------------------------------------------------------------------------------------------


def list_tables(tables, figures):
    """What --reproduce can do, as text.  figures: {name: (title, function)}."""
    lines = []
    for name, table in tables.items():
        lines.append(f"{name:10} {table['title']}")
        for row, changes in table["rows"].items():
            lines.append(f"{'':12}{row:28} {flags(changes) or '(no flags)'}")
    for name, (title, _) in figures.items():
        lines.append(f"{name:10} {title}")
    return "\n".join(lines)


def reproduce(method, name, table, cfg, args, work):
    """Train and score every row of a table for every seed; writes OUT/tables/NAME.md, .csv and .png.

    method  a script.Method.  Its `sampling` fields need no training.  Of its `stages` a row that trains otherwise takes
            over from the first model what does not differ
    table   an entry of load_tables
    work    work(cfg, args) -> path.  It trains and evaluates in one run folder, or finds that this was done, and returns
            the results.json (None in all processes but the first)
    """
    seed = args.seed
    jobs = []
    for further in range(args.seeds):
        for row, changes in table["rows"].items():
            try:
                wanted = dataclasses.replace(cfg, **changes)
            except ValueError as error:                     # before hours of work, not after
                raise RunError(f"{name}, row {row} ({flags(changes)}): {error}", status=2) from error
            trained = {k: v for k, v in changes.items() if k not in method.sampling and getattr(cfg, k) != v}
            jobs.append((row, wanted, trained, further))
    jobs.sort(key=lambda job: (job[3], bool(job[2])))       # the model as configured first: others take over its stages
    found = {}
    for number, (row, wanted, trained, further) in enumerate(jobs, 1):
        folder = row_folder(args.out, trained, further)
        here = argparse.Namespace(**{**vars(args), "out": folder, "seed": seed + further})
        say(f"\n{name}, run {number} of {len(jobs)}: {row}, seed {here.seed}, in {folder}")
        if not any(folder.glob("results*.json")):           # the model first, so that config.json holds its own flags
            take_over(row_folder(args.out, {}, further), folder, unaffected(method.stages, trained))
            only_train = argparse.Namespace(**{**vars(here), "evaluate": False})
            work(dataclasses.replace(cfg, **trained), only_train)
        path = work(wanted, here)
        if path:                                            # read now: the next row may give the file another name
            found.setdefault(row, []).append(read_results(path))
    if not found:
        return
    found = {row: found[row] for row in table["rows"]}
    contents = {row: [content for content, _ in seeds] for row, seeds in found.items()}
    lines = compare(table, contents, table["paper"], method.name)
    text = markdown(name, table, lines, contents[table["against"]], seed, method.sampling)
    say(f"\n{text}")
    images = {row: seeds[0][1] for row, seeds in found.items()}
    write(args.out / "tables", name, text, lines, images, method.name)


def compare_runs(folders, out=None):
    """Finished runs of any scripts side by side, on the test subjects that they share; the first is the reference.

    Prints a table like those of --reproduce; out: a folder that gets runs.md, .csv and .png.
    RunError if a folder has no results or if no task or no subject is common to all.
    """
    rows = {}
    images = {}
    for folder in map(Path, folders):
        path = folder / "results.json"
        if not path.exists():
            raise RunError(f"{path} does not exist; run the script with --evaluate --out {folder} first")
        content, shown = read_results(path)
        ours = content["rows"][0]["method"]                 # the model's own rows come first
        for line in content["rows"]:
            line["method"] = "model" if line["method"] == ours else line["method"]
        label = f"{folder.name} ({ours})" if folder.name not in rows else f"{folder} ({ours})"
        rows[label] = [content]
        images[label] = {key.replace(f"|{ours}", "|model"): image for key, image in shown.items()}
    common = set.intersection(*({(r["task"], s) for r in contents[0]["rows"] if r["method"] == "model"
                                 for s in r["values"]} for contents in rows.values()))
    if not common:
        raise RunError("these runs share no task and test subject; evaluate them on the same data and --split")
    for contents in rows.values():
        kept = []
        for line in contents[0]["rows"]:
            values = {s: v for s, v in line["values"].items() if (line["task"], s) in common}
            if values:
                kept.append({**line, "values": values})
        contents[0]["rows"] = kept
    reference = next(iter(rows))
    table = {"title": "finished runs on the test subjects that they share", "against": reference, "metric": "psnr",
             "rows": {row: {} for row in rows}}
    lines = compare(table, rows, {}, "model")
    text = markdown("runs", table, lines, rows[reference], rows[reference][0]["seed"], ())
    say(text)
    if out:
        write(Path(out), "runs", text, lines, images, "model")


def read_results(path):
    """(results.json, {key: image} of results.npz), results that Run.results wrote.  RunError if they cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        with np.load(path.with_suffix(".npz")) as images:
            return content, dict(images)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise RunError(f"{path} or its .npz cannot be read ({type(error).__name__}); "
                       "delete both and evaluate again") from error


def write(home, name, text, lines, images, method):
    """NAME.md, NAME.csv and NAME.png in the folder `home`."""
    home.mkdir(parents=True, exist_ok=True)
    replace(home / f"{name}.md", lambda tmp: tmp.write_text(text, encoding="utf-8"))
    replace(home / f"{name}.csv", lambda tmp: tmp.write_text(as_csv(lines), encoding="utf-8", newline=""))
    picture(home / f"{name}.png", images, method)
    say(f"written: {home / name}.md, .csv, .png")


def say(text):
    """Print, in the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


# ---- rows that share stages ------------------------------------------------------------------------------------------


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


# ---- numbers ---------------------------------------------------------------------------------------------------------


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
