"""The tables of a paper: every row is trained and scored, and set beside the printed numbers.

    python -m common.tables RUN RUN ... [--out FOLDER]      compares runs that are finished

A row of a table is a command with other flags, in a run folder of its own. It can therefore be
repeated by hand. If a row has left its results.json behind, that is used instead of a new run.

Rows are data and stand in data/paper_tables/<script>.json. In the entry of a table, "flags" holds
{row: {field: value}}. "against" is the row that the others are compared with, and "rows" are the
numbers that the paper prints.
"""
import argparse
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import torch

from common import metrics
from common.cli import as_command, flags, show
from common.files import RunError, checkpoints, fits, read_arrays, read_newest, replace
from common.table_pages import as_csv, markdown, picture
from data.files import DataError, read_json

PAPER_TABLES = Path(__file__).parent.parent / "data" / "paper_tables"
# What a results.json and each of its rows must say, so that a table can be made of it.
NEEDED = {"rows": list, "data": str, "phantom": bool, "protocol": str, "config": dict, "seed": int}
ROW = {"task": str, "method": str, "metric": str, "values": dict}


def load_tables(script):
    """The tables of a script -> {name: table}.

    A table is {"title", "against", "metric", "rows", "paper"}, with "rows"
    {row: {field: value}} and "paper" {row: {task: {metric: number}}}.
    """
    content = json.loads((PAPER_TABLES / f"{script}.json").read_text(encoding="utf-8"))
    tables = {}
    for name, table in content["tables"].items():
        rows = {}
        for row, changes in table["flags"].items():
            rows[row] = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
        tables[name] = {"title": table["title"], "against": table["against"],
                        "metric": table.get("metric", "psnr"), "rows": rows,
                        "paper": table.get("rows", {})}
    return tables


# ---- the commands --------------------------------------------------------------------------------


def list_tables(tables, figures):
    """What --reproduce can do, as text. figures: {name: (title, function)}."""
    lines = []
    for name, table in tables.items():
        lines.append(f"{name:10} {table['title']}")
        for row, changes in table["rows"].items():
            lines.append(f"{'':12}{row:28} {flags(changes) or '(no flags)'}")
    for name, (title, _) in figures.items():
        lines.append(f"{name:10} {title}")
    return "\n".join(lines)


def reproduce(method, name, table, cfg, args, work):
    """Train and score every row of a table, for every seed. Writes OUT/tables/NAME.md, .csv, .png.

    method  a script.Method. Its `sampling` fields need no training. A row that trains otherwise
            takes over from the first model those of the `stages` that do not differ
    table   an entry of load_tables
    work    work(cfg, args) -> path. It trains and evaluates in one run folder, or finds that this
            was done. It returns the results.json, and None in all processes but the first

    RunError if a row does not go with the flags that were typed, or if results cannot be read.
    """
    seed = args.seed
    found = {}
    jobs = plan(method, name, table, cfg, args.seeds)
    for number, (row, wanted, trained, further) in enumerate(jobs, 1):
        folder = row_folder(args.out, trained, further)
        here = argparse.Namespace(**{**vars(args), "out": folder, "seed": seed + further})
        say(f"\n{name}, run {number} of {len(jobs)}: {row}, seed {here.seed}, in {folder}")
        if not any(folder.glob("results*.json")):
            # The model is trained first, so that config.json holds its own flags.
            first_model = row_folder(args.out, {}, further)
            take_over(first_model, folder, unaffected(method.stages, trained))
            only_train = argparse.Namespace(**{**vars(here), "evaluate": False})
            work(dataclasses.replace(cfg, **trained), only_train)
        path = work(wanted, here)
        if path:
            # The file is read now, because the next row may give it another name.
            found.setdefault(row, []).append(read_results(path))
    if not found:
        return
    contents = {}
    images = {}
    for row in table["rows"]:
        contents[row] = [content for content, _ in found[row]]
        images[row] = found[row][0][1]
    lines = compare(table, contents, table["paper"], method.name)
    text = markdown(name, table, lines, contents[table["against"]], seed, method.sampling)
    say(f"\n{text}")
    write(args.out / "tables", name, text, lines, images, method.name)


def plan(method, name, table, cfg, seeds):
    """The runs that a table needs: a list of (row, config, trained, seed).

    trained: {field: value}, what is trained otherwise. seed: 0 for the first, 1 for the next, ...

    The model as configured comes first for each seed, because others take over its stages.
    RunError if a row does not go with the config. It is raised before hours of work, not after.
    """
    jobs = []
    for further in range(seeds):
        for row, changes in table["rows"].items():
            try:
                wanted = dataclasses.replace(cfg, **changes)
            except ValueError as error:
                raise RunError(f"{name}, row {row} ({flags(changes)}): {error}",
                               status=2) from error
            trained = {}
            for field, value in changes.items():
                if field not in method.sampling and getattr(cfg, field) != value:
                    trained[field] = value
            jobs.append((row, wanted, trained, further))
    jobs.sort(key=lambda job: (job[3], bool(job[2])))
    return jobs


def main(argv=None):
    """Compare finished runs. argv: the words of the command line, by default those of sys.argv.

    RunError as compare_runs, SystemExit for wrong usage.
    """
    parser = argparse.ArgumentParser(
        prog="python -m common.tables", allow_abbrev=False,
        description="Compare finished runs of any scripts on the test subjects that they share. "
                    "The first run is the reference.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder with a results.json")
    parser.add_argument("--out", type=Path, help="folder that gets runs.md, runs.csv and runs.png")
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        parser.error("two or more run folders are needed; the first is the reference")
    compare_runs(args.runs, args.out)


def compare_runs(folders, out=None):
    """Set finished runs of any scripts side by side, on the tasks and subjects that they share.

    The first run is the reference. Prints a table like those of --reproduce.
    folders: paths of run folders. out: a folder that gets runs.md, .csv and .png, or None.
    RunError if a folder has no results, if one is named twice, or if the runs share no task and no
    subject.
    """
    contents = {}
    images = {}
    places = set()
    for folder in map(Path, folders):
        if folder.resolve() in places:
            raise RunError(f"{folder} is named twice; name every run once", status=2)
        places.add(folder.resolve())
        label, content, shown = _as_model(folder)
        if label in contents:
            label = f"{folder}, {label}"
        contents[label] = content
        images[label] = shown
    common = _common_values(contents.values())
    if not common:
        raise RunError("these runs share no task and test subject; "
                       "evaluate them on the same data and --split")
    for content in contents.values():
        content["rows"] = _restricted(content["rows"], common)
    reference = next(iter(contents))
    table = {"title": "finished runs on the test subjects that they share", "against": reference,
             "metric": "psnr", "rows": {row: {} for row in contents}}
    single = {row: [content] for row, content in contents.items()}
    lines = compare(table, single, {}, "model")
    text = markdown("runs", table, lines, single[reference], None, ())
    for notice in _differences(contents):
        text += f"\n{notice}\n"
    say(text)
    if out:
        tasks = {task for task, _ in common}
        write(Path(out), "runs", text, lines, _same_slices(images, tasks), "model")


def _as_model(folder):
    """(label, results.json, images) of a run, with its own method renamed to "model"."""
    path = folder / "results.json"
    if not path.exists():
        raise RunError(f"{path} does not exist; "
                       f"run the script with --evaluate --out {folder} first")
    content, shown = read_results(path)
    ours = content["rows"][0]["method"]                     # the model's own rows come first
    for line in content["rows"]:
        if line["method"] == ours:
            line["method"] = "model"
    images = {}
    for key, image in shown.items():
        task, method, *drawn = key.split("|")
        images["|".join([task, "model" if method == ours else method, *drawn])] = image
    return f"{folder.resolve().name} ({ours})", content, images


def _common_values(contents):
    """The pairs (task, subject) that the models of all runs have a value for, as a set."""
    common = None
    for content in contents:
        here = set()
        for line in content["rows"]:
            if line["method"] == "model":
                here |= {(line["task"], subject) for subject in line["values"]}
        common = here if common is None else common & here
    return common


def _restricted(rows, common):
    """The rows of a results.json with the values of these (task, subject) only."""
    kept = []
    for line in rows:
        values = {s: value for s, value in line["values"].items() if (line["task"], s) in common}
        if values:
            kept.append({**line, "values": values})
    return kept


def _differences(contents):
    """Sentences about what makes runs less comparable: other data, or another way to score."""
    labels = list(contents)
    first = contents[labels[0]]
    found = []
    for label in labels[1:]:
        content = contents[label]
        if content.get("fingerprint") != first.get("fingerprint"):
            found.append(f"Notice: {label} was evaluated on other data than {labels[0]} "
                         f"({content['data']} and {first['data']}); "
                         "equal names may then be different subjects.")
        if content["protocol"] != first["protocol"]:
            found.append(f"Notice: {label} was scored in another way: {content['protocol']}.")
    return found


def _same_slices(images, tasks):
    """The images of these tasks that show the slice of the first run; see `picture`."""
    reference = next(iter(images.values()))
    kept = {}
    for label, shown in images.items():
        kept[label] = {}
        for key, image in shown.items():
            task = key.split("|")[0]
            truth = f"{task}|truth"
            if task in tasks and np.array_equal(shown.get(truth), reference.get(truth)):
                kept[label][key] = image
    return kept


def read_results(path):
    """Read results that Run.results wrote -> (content of results.json, {key: image} of the .npz).

    RunError if one of the two files is missing, damaged, or not of this project.
    """
    try:
        content = read_json(path, NEEDED)
        if not content["rows"] or not all(fits(row, ROW) for row in content["rows"]):
            raise DataError(f"{path}: lacks rows or parts of rows")
        return content, read_arrays(path.with_suffix(".npz"))
    except (RunError, DataError) as error:
        fault = str(error).split(";")[0]
        raise RunError(f"{fault}; delete {path} and its .npz, and evaluate again") from error


def write(home, name, text, lines, images, method):
    """Write NAME.md, NAME.csv and, if there are images, NAME.png into the folder `home`.

    text: the Markdown. lines: see as_csv. images, method: see picture.
    """
    home.mkdir(parents=True, exist_ok=True)
    table = as_csv(lines)
    replace(home / f"{name}.md", lambda tmp: tmp.write_text(text, encoding="utf-8"))
    replace(home / f"{name}.csv", lambda tmp: tmp.write_text(table, encoding="utf-8", newline=""))
    drawn = ", .png" if picture(home / f"{name}.png", images, method) else ""
    say(f"written: {home / name}.md, .csv{drawn}")


def say(text):
    """Print, in the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


# ---- rows that share stages ----------------------------------------------------------------------


def row_folder(out, trained, further):
    """OUT for the model as configured; OUT/rows/... if trained otherwise, or for a further seed."""
    parts = [f"{k}={show(v)}" for k, v in sorted(trained.items())]
    if further:
        parts.append(f"seed{further}")
    return out / "rows" / "+".join(parts) if parts else out


def unaffected(stages, trained):
    """The leading stages to which the fields in `trained` do not matter, as a list.

    stages: {stage: fields that matter to it and to later stages only}. A field that no stage names
    matters to all of them.
    """
    count = 0 if not trained else len(stages)
    for field in trained:
        first = 0
        for i, fields in enumerate(stages.values()):
            if field in fields:
                first = i
                break
        count = min(count, first)
    return list(stages)[:count]


def take_over(source, folder, stages):
    """Start a run folder with finished stages of the checkpoint of another one.

    Nothing happens if the folder has a checkpoint already, or if the source lacks a stage.
    """
    if not stages or int(os.environ.get("RANK", 0)) > 0:
        return
    if checkpoints(folder) or not checkpoints(source):
        return
    content, _ = read_newest(source)
    if all(content["stages"].get(stage, {}).get("finished") for stage in stages):
        content["stages"] = {stage: content["stages"][stage] for stage in stages}
        content["config"] = {}                  # it trained otherwise than this row will be
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / "last.pt", lambda tmp: torch.save(content, tmp))


# ---- numbers -------------------------------------------------------------------------------------


def compare(table, found, paper, method):
    """One dict per row, task and metric. The mean over all tasks is a task of its own, "mean".

    table   an entry of load_tables
    found   {row: [content of results.json, one per seed]}
    paper   {row: {task: {metric: number}}}, what is printed
    method  the name of the model in the results

    A subject's value is its mean over the seeds. "difference", "p" and "p_holm" compare a row with
    the row table["against"], over "pairs" subjects. Holm's correction covers the comparisons within
    one task and metric.
    A metric with one number for all subjects together has "unit": "set" in the results, and in its
    lines. The number stands there like the value of a single subject, so it is not tested.
    """
    reference = table["against"]
    of_sets = {line["metric"] for line in found[reference][0]["rows"]
               if line.get("unit") == "set" and line["method"] == method}
    scores = {}
    for row, contents in found.items():
        scores[row, "ours"] = subject_values(contents, method)
    for line in found[reference][0]["rows"]:
        other = line["method"]
        if other != method and (other, "baseline") not in scores:
            scores[other, "baseline"] = subject_values(found[reference], other)
    known = set()
    for values in scores.values():
        known |= set(values)
    ours = {row for row, _ in scores}
    lines = _paper_only(ours, paper, known)
    for (row, kind), values in scores.items():
        for (task, metric), by_seed in values.items():
            merged = over_seeds(by_seed)
            printed = paper.get(row, {}).get(task, {})
            line = {"row": row, "kind": kind, "task": task, "metric": metric,
                    **metrics.summary(merged),
                    "seeds": [float(np.mean(list(v.values()))) for v in by_seed if v],
                    "flags": flags(table["rows"].get(row, {})),
                    "paper": printed.get(metric), "paper_std": printed.get(f"{metric}_std")}
            if metric in of_sets:
                line["unit"] = "set"
            theirs = scores[reference, "ours"].get((task, metric))
            if (row, kind) != (reference, "ours") and theirs is not None:
                test = metrics.wilcoxon(merged, over_seeds(theirs))
                line.update(p=test["p"], difference=test["difference"], pairs=test["n"])
            lines.append(line)
    _correct(lines)
    return lines


def _paper_only(ours, paper, known):
    """Lines of the paper's rows that we have not. ours: rows. known: our (task, metric)."""
    lines = []
    for row, tasks in paper.items():
        if row in ours:
            continue
        for task, printed in tasks.items():
            for metric, value in printed.items():
                if (task, metric) in known:
                    lines.append({"row": row, "kind": "paper only", "task": task, "metric": metric,
                                  "paper": value, "paper_std": printed.get(f"{metric}_std")})
    return lines


def _correct(lines):
    """Give every line that has a p its "p_holm", over the lines of the same task and metric."""
    groups = {}
    for line in lines:
        if "p" in line:
            groups.setdefault((line["task"], line["metric"]), []).append(line)
    for tested in groups.values():
        corrected = metrics.holm([line["p"] for line in tested])
        for line, p in zip(tested, corrected):
            line["p_holm"] = p


def subject_values(contents, method):
    """Values of a method -> {(task, metric): [{subject: value}, one per seed]}.

    The task "mean" holds each subject's mean over its tasks. Rows of a variant do not count.
    """
    values = {}
    for content in contents:
        by_metric = {}
        for row in content["rows"]:
            if row["method"] == method and not row.get("variant"):
                by_metric.setdefault(row["metric"], {})[row["task"]] = row["values"]
        for metric, tasks in by_metric.items():
            tasks["mean"] = over_seeds(list(tasks.values()))
            for task, by_subject in tasks.items():
                values.setdefault((task, metric), []).append(by_subject)
    return values


def over_seeds(values):
    """[{subject: value}] -> {subject: mean}, of the subjects that are in all."""
    means = {}
    for subject in values[0]:
        if all(subject in by_subject for by_subject in values):
            means[subject] = float(np.mean([by_subject[subject] for by_subject in values]))
    return means


if __name__ == "__main__":
    as_command(main)
