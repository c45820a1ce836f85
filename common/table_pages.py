"""How numbers are shown: as Markdown for people, as CSV for programs, and as a picture.

A line is what common.tables.compare makes: a dict of one row, task and metric. Its entries are the
columns of the CSV file of a table.
"""
import csv
import io
import math

import numpy as np

from common import metrics, pictures
from common.cli import flags
from data.layouts import name_of

WIDEST = 6                  # with more tasks than this, a table has one line per task
SHOWN = 0.3                 # error at which an error map is white
# Metric -> what a table calls it, and its digits.
MEASURES = {"psnr": ("PSNR", 2), "ssim": ("SSIM", 3), "auc": ("AUC", 3), "acc": ("accuracy", 3),
            "dice": ("Dice", 3), "jaccard": ("JI", 3), "rouge": ("ROUGE-L", 3),
            "bleu1": ("BLEU-1", 3), "bleu2": ("BLEU-2", 3), "bleu3": ("BLEU-3", 3),
            "bleu4": ("BLEU-4", 3), "fd": ("FD", 2), "niqe": ("NIQE", 2),
            "msssim": ("MS-SSIM", 3), "map": ("mAP", 3)}
JUDGED = ("auc", "acc", "dice", "jaccard")      # by another network; cells show these without std
FURTHER = ("rouge", "bleu1", "bleu2", "bleu3", "bleu4", "fd", "niqe", "msssim", "map")
LOWER = ("fd", "niqe")                          # of these, a smaller value is better
# Columns of scores.csv.
SCORES = ("psnr", "ssim", "mae", "nmse", "dice", "jaccard", "acc", *FURTHER)


# ---- for people ----------------------------------------------------------------------------------


def markdown(name, table, lines, contents, seed, free):
    """The table as Markdown: PSNR ± std over subjects / SSIM ± std, the paper's in brackets.

    Other metrics of MEASURES stand behind these two with their names. Metrics, tasks and rows that
    none of them belongs to are left out; they are in the CSV file.

    table     an entry of load_tables; lines: what `compare` made of it
    contents  the results.json of the row table["against"], one per seed
    seed      the first seed, or None if the rows are runs with seeds of their own
    free      names of the config's fields that are stated for all rows
    """
    metric = table.get("metric", "psnr")
    lines = [line for line in lines if line["metric"] in (*MEASURES, "seconds")]
    ours = [line for line in lines if line["kind"] != "paper only"]
    tasks = dict.fromkeys(line["task"] for line in ours)
    tasks = [task for task in tasks if task != "mean"]
    cells = {(line["row"], line["task"], line["metric"]): line for line in lines}
    rows = {line["row"]: line for line in lines}    # the last line of each has the row's flags
    with_flags = any(line.get("flags") for line in rows.values())
    head = ["row", "flags"] if with_flags else ["row"]
    body = [[*head, *tasks, f"mean {MEASURES[metric][0]}", "difference"]]
    for row, line in rows.items():
        entry = [row]
        if with_flags:
            entry.append(f"`{line['flags']}`" if line.get("flags") else "")
        entry += [cell(cells, row, task) for task in tasks]
        mean = cells.get((row, "mean", metric), {})
        body.append([*entry, average(mean), difference(mean)])
    if len(tasks) > WIDEST:
        body = [list(line) for line in zip(*body)]
    body.insert(1, ["---"] * len(body[0]))
    text = [f"## {name}: {table['title']}", "", _facts(ours, contents, seed, free), "",
            _legend(table, lines, ours, contents, metric), ""]
    text += ["| " + " | ".join(row) + " |" for row in body]
    return "\n".join([*text, ""])


def _facts(ours, contents, seed, free):
    """The first paragraph of a table: on which data, how many subjects and seeds, which flags."""
    content = contents[0]
    n = max(line["n"] for line in ours)
    phantoms = ", digital phantoms" if content["phantom"] else ""
    text = f"Data: {name_of(content['data'])}{phantoms}; {n} test subjects"
    if seed is not None and len(contents) > 1:
        text += (f"; {len(contents)} training seeds (from {seed}), a subject's value is its mean "
                 "over them")
    elif seed is not None:
        text += f"; 1 training seed ({seed})"
    text += f".  {content['protocol']}."
    if free:
        stated = flags({field: content["config"][field] for field in free})
        text += f"  Beside a row's flags: {stated}."
    return text


def _legend(table, lines, ours, contents, metric):
    """The second paragraph of a table: what stands in its cells, and how rows were tested."""
    n = max(line["n"] for line in ours)
    tested = 0
    for line in ours:
        if (line["task"], line["metric"]) == ("mean", metric) and "p" in line:
            tested += 1
    least = 2 * tested / 2 ** n                 # Wilcoxon's smallest p without ties, corrected
    floor = ""
    if n >= metrics.FEWEST and least > 1e-3:
        floor = f" (with {n} subjects it cannot fall below {min(1, least):.2g})"
    there = {line["metric"] for line in ours}
    of_sets = {line["metric"] for line in ours if line.get("unit") == "set"}
    parts = ["PSNR in dB ± std over subjects / SSIM ± std"] if "psnr" in there else []
    if metric == "auc":
        parts.append("AUC, mean of the folds / accuracy")
    elif "dice" in there:
        parts.append("Dice, mean of the classes")
    for name in FURTHER:
        if name in there:
            spread = "" if name in of_sets else " ± std"
            better = ", smaller is better" if name in LOWER else ""
            parts.append(f"{MEASURES[name][0]}{spread}{better}")
    printed = any(line.get("paper") for line in lines)
    brackets = "; in brackets what the paper prints, for its own data" if printed else ""
    each_seed = ", and the mean of each seed" if len(contents) > 1 else ""
    text = f"{' / '.join(parts)}{brackets}.  "
    if of_sets:
        names = ", ".join(MEASURES[name][0] for name in MEASURES if name in of_sets)
        text += f"One number for all test subjects together, without std and test: {names}.  "
    if metric in of_sets:
        return (f"{text}Mean: over the tasks{each_seed}.  Difference of that mean to "
                f"\"{table['against']}\".")
    return (f"{text}Mean: over the tasks, with a 95 % bootstrap interval over subjects{each_seed}."
            f"  Difference of that mean to \"{table['against']}\", with Wilcoxon's paired p over "
            f"subjects, Holm-corrected for the {tested} comparisons of this column{floor}.")


def cell(cells, row, task):
    """The text of one task of one row. cells: {(row, task, metric): line}."""
    psnr = cells.get((row, task, "psnr"), {})
    ssim = cells.get((row, task, "ssim"), {})
    dice = cells.get((row, task, "dice"), {})
    parts = []
    if psnr.get("n"):
        parts.append(f"{_ours(psnr, 2)} / {_ours(ssim, 3)}")
    if dice.get("n"):
        parts.append(f"/ {dice['mean']:.3f}")
    if psnr.get("paper"):
        theirs = _spread(psnr["paper"], psnr["paper_std"], 2)
        parts.append(f"({theirs} / {_spread(ssim.get('paper'), ssim.get('paper_std'), 3)})")
    for metric in JUDGED:
        line = cells.get((row, task, metric), {})
        name = MEASURES[metric][0]
        if line.get("n") and metric != "dice":
            parts.append(f"/ {name} {line['mean']:.3f}")
        if line.get("paper"):
            parts.append(f"({name} {line['paper']:.3f})")
    for metric in FURTHER:
        line = cells.get((row, task, metric), {})
        name, digits = MEASURES[metric]
        if line.get("n"):
            slash = "/ " if parts else ""
            parts.append(f"{slash}{name} {_ours(line, digits)}")
        if line.get("paper"):
            parts.append(f"({name} {_spread(line['paper'], line['paper_std'], digits)})")
    pace = cells.get((row, task, "seconds"), {})
    if pace.get("n"):
        theirs = f" ({pace['paper']:.1f} s)" if pace.get("paper") else ""
        parts.append(f"/ {pace['mean']:.2f} s{theirs}")
    return " ".join(parts)


def _ours(line, digits):
    """Mean ± std of a line; one subject has no std."""
    std = line.get("std") if line.get("n", 0) > 1 else None
    return _spread(line.get("mean"), std, digits)


def _spread(mean, std, digits):
    """A number with its std, if there is one."""
    if mean is None:
        return "–"
    if std is None:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


def average(line):
    """The text of a row's mean over the tasks, with its interval and the means of the seeds."""
    if not line.get("n"):
        return ""
    _, digits = MEASURES[line["metric"]]
    text = f"{line['mean']:.{digits}f}"
    if line["ci95"]:
        low, high = line["ci95"]
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    if len(line["seeds"]) > 1:
        text += "; " + ", ".join(f"{seed:.{digits}f}" for seed in line["seeds"])
    return text


def difference(line):
    """The text of a row's difference to the reference, with its p."""
    if line.get("difference") is None:
        return ""
    _, digits = MEASURES[line["metric"]]
    if line.get("unit") == "set":
        p = "one number for all, no test"
    elif line["p"] is None:
        p = f"n = {line['pairs']}, too few to test"
    else:
        p = f"p = {line['p_holm']:.2g}"
    unit = " dB" if line["metric"] == "psnr" else ""
    return f"{line['difference']:+.{digits}f}{unit}, {p}"


# ---- for programs, and the picture ---------------------------------------------------------------


def as_csv(lines):
    """Every row, task and metric as CSV text, for programs."""
    columns = ["row", "kind", "flags", "task", "metric", "mean", "std", "ci95_low", "ci95_high",
               "n", "seeds", "paper", "paper_std", "difference", "pairs", "p", "p_holm"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", restval="")
    writer.writeheader()
    for line in lines:
        low, high = line.get("ci95") or ("", "")
        seeds = " ".join(f"{seed:.4f}" for seed in line.get("seeds", []))
        writer.writerow({**line, "ci95_low": low, "ci95_high": high, "seeds": seeds})
    return text.getvalue()


def scores_csv(rows):
    """The numbers of every subject as CSV text, for spreadsheets.

    rows: those of results.json. A line is one subject, task and method. A value that is infinite or
    undefined leaves its cell empty; so does a Dice where nothing was segmented.
    """
    lines = {}
    for row in rows:
        if row["metric"] in SCORES:
            for subject, value in row["values"].items():
                method = row["method"]
                if row.get("variant"):
                    method += f" ({row['variant']})"
                line = lines.setdefault((row["task"], method, subject), {})
                line[row["metric"]] = value
    used = set()
    for line in lines.values():
        used |= set(line)
    columns = [name for name in SCORES if name in used]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["subject", "task", "method", *columns], restval="")
    writer.writeheader()
    for (task, method, subject), line in lines.items():
        writer.writerow({"subject": subject, "task": task, "method": method, **line})
    return text.getvalue()


def picture(path, found, method):
    """Draw the same slice in every row of the table, each result above its error map -> True.

    If a segmenter judged the results, what it drew on another slice stands below. If no task makes
    images, nothing is drawn -> False.
    found: {row: {"task|method": image (H, W), "task|method|drawn": image in colour (H, W, 3)}}
    """
    reference = next(iter(found.values()))
    truths = [key for key in reference if key.endswith("|truth")]
    if not truths:
        return False
    sheet = []
    labels = []
    for key in truths[:6]:
        task = key.removesuffix("|truth")
        truth = reference[key]
        blank = np.full_like(truth, np.nan)
        results = [images.get(f"{task}|{method}", blank) for images in found.values()]
        errors = [pictures.error_map(truth, image, SHOWN) for image in results]
        sheet.append([truth, *results])
        sheet.append([np.ones_like(truth), *errors])
        labels += [task, "error"]
        if f"{key}|drawn" in reference:
            nothing = np.full((*truth.shape, 3), np.nan)
            drawn = [images.get(f"{task}|{method}|drawn", nothing) for images in found.values()]
            sheet.append([reference[f"{key}|drawn"], *drawn])
            labels.append("segmented, another slice")
    pictures.grid(path, sheet, ["truth", *found], labels,
                  note=f"error: |truth - result|, white from {SHOWN} on")
    return True


# ---- an evaluation, for people -------------------------------------------------------------------


def markdown_table(rows, region="whole slice"):
    """The rows of metrics.score_table as a Markdown table (str) of methods and tasks.

    A cell holds PSNR in dB, mean ± std over subjects (n), then the mean SSIM, then the mean Dice
    if there is one. region: which pixels count, in words.
    """
    cells = {(label_of(r), r["task"], r["metric"]): r for r in rows}
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    methods = list(dict.fromkeys(label_of(r) for r in rows))
    counts = [r["n"] for r in rows if r["metric"] == "psnr"]
    fewest = min(counts)
    most = max(counts)
    n = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    dice = " / Dice, mean of the classes" if any(r["metric"] == "dice" for r in rows) else ""
    header = (f"PSNR in dB, mean ± std over subjects (n) / SSIM, mean{dice}.  Unit: subject, the "
              f"mean of its slices; n = {n}; {region}; range [0,1].")
    body = [["method", *tasks]]
    for method in methods:
        line = [method]
        for task in tasks:
            found = [cells.get((method, task, metric)) for metric in ("psnr", "ssim", "dice")]
            line.append(cell_of(*found))
        body.append(line)
    if len(tasks) > 6:                                      # too wide to read: one line per task
        body = [list(line) for line in zip(*body)]
    body.insert(1, ["---"] * len(body[0]))
    lines = [header, ""]
    for line in body:
        lines.append("| " + " | ".join(line) + " |")
    excluded = sum(r.get("excluded_slices", 0) for r in rows if r["metric"] == "psnr")
    if excluded:
        lines.append("")
        lines.append(f"Left out of PSNR: {excluded} slice values that are infinite (identical "
                     f"images) or undefined.")
    return "\n".join(lines)


def matrix_table(rows, region="whole slice"):
    """The PSNR of many tasks with one source each, as a Markdown table of sources and targets.

    rows: as for markdown_table; the method of the first row is the model. A cell holds the model's
    mean PSNR and, in brackets, that of the best baseline.
    """
    model = label_of(rows[0])
    ours = {}
    best = {}
    for r in rows:
        if r["metric"] != "psnr" or not r["n"]:
            continue
        place = tuple(r["task"].split("->"))
        if label_of(r) == model:
            ours[place] = r["mean"]
        else:
            best[place] = max(r["mean"], best.get(place, -math.inf))
    targets = sorted({target for _, target in ours})
    lines = [f"PSNR in dB of {model} (of the best of the simple methods), mean over subjects; "
             f"{region}; range [0,1].", "",
             "| from \\ to | " + " | ".join(targets) + " |", "|" + " --- |" * (len(targets) + 1)]
    for source in sorted({source for source, _ in ours}):
        cells = [source]
        for target in targets:
            place = (source, target)
            text = f"{ours[place]:.2f}" if place in ours else ""
            cells.append(text + (f" ({best[place]:.2f})" if place in best else ""))
        lines.append("| " + " | ".join(cells) + " |")
    above = sum(ours[place] > best[place] for place in ours if place in best)
    lines += ["", f"Above the best simple method in {above} of {len(ours)} tasks."]
    return "\n".join(lines)


def label_of(r):
    """The name of a row's method, with its variant."""
    return r["method"] + (f" ({r['variant']})" if r.get("variant") else "")


def cell_of(psnr_row, ssim_row, dice_row):
    """The text of one cell; each row may be None."""
    text = "–"
    if psnr_row and psnr_row["n"]:
        spread = f" ± {psnr_row['std']:.2f}" if psnr_row["n"] > 1 else ""
        text = f"{psnr_row['mean']:.2f}{spread} ({psnr_row['n']})"
    if ssim_row and ssim_row["n"]:
        text += f" / {ssim_row['mean']:.3f}"
    else:
        text += " / –"
    if dice_row and dice_row["n"]:
        text += f" / {dice_row['mean']:.3f}"
    return text
