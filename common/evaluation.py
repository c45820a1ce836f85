"""What a trained model is asked for by commands: to fill the test subjects, and whole volumes.

evaluate     every test subject once, scored beside the standing baselines; pictures
synthesize   missing contrasts as NIfTI volumes or pictures, and missing reports

    python -m common.evaluation --truth FOLDER --predicted FOLDER

scores volumes that anybody made; see common/score_volumes.py.

Everything here calls `fill` of common/trained.py and nothing else. What is scored is therefore
what is used.
"""
from dataclasses import dataclass

import numpy as np
import torch

import data
from common import downstream, metrics, pictures, score_volumes, table_pages
from common.cli import as_command
from common.cohort import TrainingSlices, stored_baselines
from common.files import replace
from common.table_pages import SCORES, SHOWN, scores_csv
from common.trained import fill, in_parts, selects
from data import TEXT

# The labels are those of Fig. 6 of MetaDB, in colours that colour-blind readers can tell apart
# (Okabe and Ito). 1 is necrosis (vermilion), 2 is oedema (yellow). Enhancing tumour (blue) is 4,
# and 3 in BraTS from 2023 on.
CLASS_COLOURS = {1: (213, 94, 0), 2: (240, 228, 66), 3: (0, 114, 178), 4: (0, 114, 178)}


# ---- test subjects -------------------------------------------------------------------------------


@dataclass
class Task:
    """n synthesised slices of one kind. All images are (n, H, W) in [0,1].

    sources     {contrast: images} that were known
    target      the contrast that was made
    truth       its true images
    results     {method: images}, the model's first
    subjects    (n,) names
    segmenter   of the target contrast (common/downstream.py), or None
    labels      the true label maps (n, H, W), or None
    wanted      names of the regions that are also scored by themselves
    """

    sources: dict
    target: str
    truth: np.ndarray
    results: dict
    subjects: np.ndarray
    segmenter: torch.nn.Module | None = None
    labels: np.ndarray | None = None
    wanted: tuple = ()

    @property
    def name(self):
        return "+".join(self.sources) + "->" + self.target

    @property
    def regions(self):
        """Parts of the slices that are scored by themselves: {name: mask (n, H, W)}.

        The body is where the first source is above a tenth of its range. Tissue is where the first
        source or the truth is not exactly 0, which is the brain if the skull is stripped.
        "volume" in `wanted` is no region; see metrics.volume_table.
        """
        source = next(iter(self.sources.values()))
        found = {"body": source > 0.1, "tissue": (source > 0) | (self.truth > 0)}
        if self.labels is not None:
            found["lesion"] = self.labels > 0
        return {name: found[name] for name in self.wanted if name in found}


def evaluate(method, cfg, run, ds, model, home=None):
    """Score every test subject once, for every pattern of known contrasts.

    Writes results.json, results.npz, scores.csv and pictures into the run folder.
    method: a script.Method. cfg: its config. ds: a data.Dataset. model: see the top of this file.
    home: the folder of the model's run, if ds is another cohort; see common/cohort.py.
    Each process works on whole subjects. The first process scores all of them.
    """
    contrasts = list(ds.contrasts)
    chosen = ds.spread("test", cfg.test_slices)
    patterns = []
    rows_of = []                            # for each pattern the rows that have all its contrasts
    for sources, absent in method.patterns(cfg, contrasts):
        rows = ds.having(chosen, [*sources, *absent])
        if len(rows):
            patterns.append((sources, absent))
            rows_of.append(rows)
        else:
            run.say(f"no test subject has {', '.join([*sources, *absent])}; not scored")
    if not patterns:
        raise data.DataError(f"{ds.folder}: no test subject has what is to be scored; "
                             "choose other contrasts or another --split")
    missing = set()
    for _, absent in patterns:
        missing |= set(absent)
    segmenters = method.segmenters(cfg, run, ds, missing) if method.segmenters else {}
    # Tasks with the same sources are made together.  In a selective model, contrasts that are made
    # together influence each other, so each task is made by itself.
    groups = [(sources, absent if selects(model) else ()) for sources, absent in patterns]
    wanted = {}
    targets = {}
    for group, (_, absent), rows in zip(groups, patterns, rows_of):
        wanted[group] = np.union1d(wanted.get(group, rows), rows)
        targets.setdefault(group, set()).update(absent)
    done = fill_test(method, cfg, run, ds, model, wanted, targets)
    if run.rank > 0:
        return

    truth = np.asarray(ds.images[chosen], dtype=np.float32)                 # (n, C, H, W)
    given = truth
    if method.disturb:
        whole = torch.from_numpy(truth).to(run.device)
        given = method.disturb(cfg, run, whole, ds.keys(chosen)).cpu().numpy()
    tasks = []
    for p, (sources, absent) in enumerate(patterns):
        rows = rows_of[p]
        here = slice(None) if len(rows) == len(chosen) else np.isin(chosen, rows)
        known = {name: given[here, contrasts.index(name)] for name in sources}
        for target in absent:
            c = contrasts.index(target)
            results = {}
            for name in done[groups[p], int(rows[0])][0]:
                results[name] = np.stack([done[groups[p], int(r)][0][name][c] for r in rows])
            notes = {}
            for name in done[groups[p], int(rows[0])][1]:
                found = [done[groups[p], int(r)][1][name] for r in rows]
                notes[name] = np.stack(found)                               # (n, ...)
            if method.beside:
                results.update(method.beside(cfg, run, model, truth[here, c], notes))
            labels = ds.labels[rows] if ds.labels is not None else None
            tasks.append(Task(known, target, truth[here, c], results, ds.subject[rows],
                              segmenters.get(target), labels, method.regions))
    further = []
    if method.judge:
        for task in tasks:
            further += method.judge(cfg, run, ds, task)
    if method.overall:
        further += method.overall(cfg, run, ds, model, tasks)
    if home is None:
        train = TrainingSlices(ds)
        simple = []
        for task in tasks:
            both = train.of([*task.sources, task.target])
            some = len(both[task.target]) > 0
            simple.append(metrics.baselines(both, task.sources, task.target) if some else {})
    else:
        simple = [stored_baselines(home, task.name, task.sources) for task in tasks]
    draw_steps(run, ds, model, patterns[:2], [rows[len(rows) // 2] for rows in rows_of])
    report(run, tasks, simple, f"slices per subject: {cfg.test_slices}; whole slice, range [0,1]; "
                               "unit: subject, the mean of its slices", further)


def fill_test(method, cfg, run, ds, model, wanted, targets):
    """Fill rows of the data set from some of their contrasts -> {(group, row): (images, notes)}.

    A group begins with the names of the known contrasts. wanted: {group: rows}. targets: {group:
    what is made}.

    images: {name: (C, H, W)}, with the names of the method and of its extras. notes: {name: array}.
    The processes share the work, and each of them gets the results of all.
    """
    contrasts = list(ds.contrasts)
    mine = set(ds.split["test"][run.rank::run.world])
    present = ds.present                                                    # (n, C)
    todo = []
    for group, rows in wanted.items():
        todo += [(group, int(r)) for r in rows if ds.subject[r] in mine]
    parts = in_parts(model, todo, cfg.sample_batch, lambda item: (item[0], ds.subject[item[1]]))
    done = []
    for (asked,) in run.batches("sampling", parts, 1):
        part = asked
        if getattr(model, "volumes", False):                # the neighbours of a slice are needed
            group, r = asked[0]
            part = [(group, int(other)) for other in np.flatnonzero(ds.subject == ds.subject[r])]
        known = []
        needed = []
        for group, _ in part:
            known.append([c in group[0] for c in contrasts])
            needed.append([c in targets[group] for c in contrasts])
        known = torch.tensor(known, device=run.device)                      # (B, C)
        chosen = np.array([r for _, r in part])
        needed = torch.tensor(needed & present[chosen], device=run.device)  # (B, C)
        keys = ds.keys(chosen)
        u = run.fetch(ds.images, chosen)                                    # (B, C, H, W)
        if method.disturb:
            u = method.disturb(cfg, run, u, keys)
        images, notes = as_arrays(method.name, *fill(model, u, known, keys, wanted=needed))
        for b, key in enumerate(part):
            if key not in asked:
                continue
            here = ({name: x[b] for name, x in images.items()},
                    {name: x[b] for name, x in notes.items()})
            done.append((key, here))
    return dict(run.gather(done))


def as_arrays(name, made, extras):
    """What fill returned as arrays: ({name: (B, C, H, W)}, {name of a note: (B, ...)})."""
    images = {name: made, **extras}
    notes = images.pop("notes", {})
    images = {title: x.cpu().numpy() for title, x in images.items()}
    return images, {title: x.cpu().numpy() for title, x in notes.items()}


def notes_of(run, ds, model, rows, sources, batch):
    """The notes of filling rows from these sources, {name: (n, ...)}.  batch: slices at once."""
    known = torch.tensor([c in sources for c in ds.contrasts], device=run.device)   # (C,)
    found = {}
    parts = in_parts(model, rows, batch, lambda r: ds.subject[r])
    for (part,) in run.batches("sampling", parts, 1):
        u = run.fetch(ds.images, part)                                      # (B, C, H, W)
        made, extras = fill(model, u, known.expand(len(u), -1), ds.keys(part))
        for name, x in as_arrays("", made, extras)[1].items():
            found.setdefault(name, []).append(x)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def report(run, tasks, simple, protocol, further=()):
    """Score every task beside the standing baselines, and print a table.

    Writes results.json, results.npz, scores.csv and samples.png. If a task has a segmenter,
    segmentation.png is written too.

    tasks: a list of Task. simple: for each of them the baselines, {name: images (n, H, W)}.
    protocol: in words, what a value is. further: more rows of results.json.
    """
    rows = []
    kept = {}
    drawn = []
    for task, baselines in zip(tasks, simple):
        methods = {**task.results, **baselines}
        rows += metrics.score_table(task.name, methods, task.truth, task.subjects,
                                    slices=len(task.truth))
        if "volume" in task.wanted:
            rows += metrics.volume_table(task.name, methods, task.truth, task.subjects)
        for region, mask in task.regions.items():
            rows += metrics.score_table(task.name, methods, task.truth, task.subjects, mask,
                                        variant=region)
        if task.segmenter:
            more, images, picture = segmented(task, methods)
            rows += more
            kept.update(images)
            drawn.append(picture)
        middle = len(task.truth) // 2       # one slice per task stays with the numbers, for tables
        for method, images in task.results.items():
            kept[f"{task.name}|{method}"] = images[middle].astype(np.float16)
        kept[f"{task.name}|truth"] = task.truth[middle].astype(np.float16)
    rows += further
    made = {task.name for task in tasks}
    whole = [row for row in rows if not row.get("variant") and row["task"] in made
             and row["metric"] in SCORES and row.get("unit") != "set"]
    # Many tasks from one source each fit into a square; scores.csv holds all numbers.
    many = len(tasks) > 12 and all(len(task.sources) == 1 for task in tasks)
    table = table_pages.matrix_table if many else table_pages.markdown_table
    if tasks:
        run.say("\n" + table(whole) + "\n")
    for region in tasks[0].regions if tasks else ():
        own = [row for row in rows if row.get("variant") == region]
        run.say(table(own, f"{region} only") + "\n")
    sheet = scores_csv(rows)
    replace(run.out / "scores.csv",
            lambda tmp: tmp.write_text(sheet, encoding="utf-8", newline=""))
    if tasks:
        draw_samples(run.out / "samples.png", tasks)
    if drawn:
        pictures.grid(run.out / "segmentation.png", [list(shown.values()) for _, shown in drawn],
                      list(drawn[0][1]), [label for label, _ in drawn])
    # The results come last.  Where they are, everything else is there.
    run.results(rows, kept, protocol)
    run.say(f"written: {run.out / 'results.json'}, {run.out / 'scores.csv'}, "
            f"{run.out / 'samples.png'}")


def segmented(task, methods):
    """What a segmenter finds on the results of a task.

    methods: {method: images (n, H, W)}.
    Returns (rows of Dice, images to keep, (label, {title: picture})).
    """
    maps = {}
    for method, images in {**methods, "real slices": task.truth}.items():
        if method != "mean-of-train":
            maps[method] = downstream.segment(task.segmenter, images)
    rows = []
    for method, found in maps.items():
        rows += downstream.dice_rows(task.name, method, task.labels, found, task.subjects,
                                     task.segmenter.classes)
    name = next(iter(task.results))
    both = {"truth": (task.truth, task.labels),
            "on the real slice": (task.truth, maps["real slices"]),
            f"on {name}": (task.results[name], maps[name])}
    i = int((task.labels > 0).sum((1, 2)).argmax())         # the slice that shows most
    shown = {}
    for title, (images, labels) in both.items():
        shown[title] = pictures.overlay(images[i], labels[i], CLASS_COLOURS)
    kept = {f"{task.name}|{name}|drawn": shown[f"on {name}"],
            f"{task.name}|truth|drawn": shown["truth"]}
    return rows, kept, (f"{task.name}, {task.subjects[i]}", shown)


def draw_samples(path, tasks):
    """Two slices of each of the first six tasks: sources, results, truth and error.

    A report among the sources is no image and is not drawn.
    """
    tasks = tasks[:6]
    drawn = [[images for source, images in task.sources.items() if source != data.TEXT]
             for task in tasks]
    width = max(len(sources) for sources in drawn)
    name, *others = tasks[0].results
    rows = []
    labels = []
    for task, given in zip(tasks, drawn):
        for i in (0, len(task.truth) // 2):
            model, *start = (images[i] for images in task.results.values())
            sources = [images[i] for images in given]
            blank = [np.ones_like(task.truth[i])] * (width - len(sources))
            error = pictures.error_map(task.truth[i], model, SHOWN)
            rows.append([*sources, *blank, *start, model, task.truth[i], error])
            psnr = metrics.psnr(task.truth[i], model, 1)
            labels.append(f"{task.target} of {task.subjects[i]}: {psnr:.1f} dB"
                          + (", from the report" if data.TEXT in task.sources else ""))
    same = all(list(task.sources) == list(tasks[0].sources) for task in tasks)
    titles = list(tasks[0].sources) if same else [f"source {i + 1}" for i in range(width)]
    titles = titles[:width]
    note = f"error: |truth - {name}|, white from {SHOWN} on"
    if not same:
        first = tasks[0]
        note += (f"; sources of {first.target}: {', '.join(first.sources)}, "
                 "and likewise for the others")
    pictures.grid(path, rows, [*titles, *others, name, "truth", "error"], labels, note=note)


def draw_steps(run, ds, model, patterns, chosen):
    """Draw steps.png: on the way to a slice, what the network is given and what it makes of it.

    patterns: pairs (known contrasts, missing contrasts); each gets two rows of pictures. chosen:
    for each pattern the row of ds to show. A method without steps has no such picture.
    """
    contrasts = list(ds.contrasts)
    rows = []
    labels = []
    for (sources, absent), r in zip(patterns, chosen):
        u = run.fetch(ds.images, [r])                                       # (1, C, H, W)
        c = contrasts.index(absent[0])
        known = [[name in sources for name in contrasts]]
        known = torch.tensor(known, device=run.device)                      # (1, C)
        watched = []                                        # (title, state, estimate of x0)
        wanted = [[name == absent[0] for name in contrasts]]
        made, _ = fill(model, u, known, ds.keys([r]), watched,
                       torch.tensor(wanted, device=run.device))
        if not watched:
            return
        shown = [watched[i] for i in data.evenly(np.arange(len(watched)), 7)]
        # The states hold all contrasts, or only the one that is made.
        channel = c if shown[0][1].shape[1] == len(contrasts) else 0
        ends = [made[0, c].cpu(), u[0, c].cpu()]
        rows.append([(state[0, channel].cpu() + 1) / 2 for _, state, _ in shown] + ends)
        estimates = [(estimate[0, channel].cpu() + 1) / 2 for _, _, estimate in shown]
        rows.append(estimates + ends)
        labels += [f"{absent[0]}: x_t", "estimate of x0"]
    titles = [title for title, _, _ in shown]
    pictures.grid(run.out / "steps.png", rows, [*titles, "result", "truth"], labels,
                  note=f"{len(shown)} of the {len(watched)} evaluations of the network, with their "
                       "times; x_t is what it is given, below is what it makes of it")


# ---- volumes -------------------------------------------------------------------------------------


def synthesize(method, cfg, run, model, subjects, asked, files=None):
    """Write missing contrasts as NIfTI volumes: all slices, on the source's own grid.

    CT and CTA are written in HU, PET in SUV, post in the units of pre, others in normalised units.
    Without such a grid they are pictures. A missing report is a text file. A report, or an X-ray
    for a volume, is made from the middle one of the slices that show something.

    subjects: a list of data.Subject. asked: contrasts to make although a subject has them.
    files: {subject: digests of its files}, see data.Dataset.files.
    data.DataError if a source cannot be read, or a volume cannot be written.
    """
    contrasts = list(model.contrasts)
    mine = subjects[run.rank::run.world]
    home = run.out / "synthetic"
    windows = run.about.get("windows", {})
    pixels = run.about.get("picture")
    pixels = pixels and data.Picture(*map(tuple, pixels))
    tags = getattr(model, "tags", {})

    def makes(sources):
        """What can be made of these. A method with directions makes only their ends."""
        if not method.choice:
            return contrasts
        ends = []
        for known, made in method.patterns(cfg, contrasts):
            if set(known) <= set(sources):
                ends += made
        return ends
    todo = data.to_synthesize(mine, contrasts, asked, cfg.size, home, run.say, pixels, tags, files,
                              makes)
    for subject, sources, absent, volume, paths in todo:
        known = torch.tensor([c in sources for c in contrasts], device=run.device)      # (C,)
        out = volume.images.copy()                                          # (Z, C, H, W)
        filled = np.flatnonzero(volume.images.any((1, 2, 3)))               # other slices are empty
        if sources == [TEXT]:
            filled = np.arange(len(out))            # a report has no pixels
        makes_images = absent != [TEXT]
        parts = in_parts(model, filled, cfg.sample_batch, lambda z: "") if makes_images else []
        for (part,) in run.batches(f"synthesis of {subject.name}", parts, 1):
            keys = [(subject.name, int(z)) for z in part]
            u = run.fetch(volume.images, part)                              # (B, C, H, W)
            made, _ = fill(model, u, known.expand(len(part), -1), keys)
            out[part] = made.cpu().numpy()
        absent = [c for c in absent if not paths[c].exists()]
        middle = int(filled[(len(filled) - 1) // 2])        # of two views of an X-ray, the first
        for c in absent:
            if c == TEXT:
                write_report(paths[c], run, model, subject, sources, volume.images, middle)
                continue
            slices = out[:, contrasts.index(c)]                             # (Z, H, W)
            if c == "xray" and volume.reference is not None:
                slices = slices[[middle]]       # a body has many slices, but one X-ray is enough
            window = windows.get(c)
            volume.write(paths[c], slices, f"synthetic {c}, {method.name}", contrast=c,
                         window=window and data.Scale(*window))
        shown = [c for c in sources + absent if c != TEXT]
        folder = paths[absent[0]].parent
        some = np.unique(filled[np.linspace(0, len(filled) - 1, 5).astype(int)][1:-1])
        rows = []
        for z in some:
            rows.append([out[z, contrasts.index(c)] for c in shown])
        titles = [c if c in sources else f"{c} (synthetic)" for c in shown]
        pictures.grid(folder / "panel.png", rows, titles, [f"slice {z}" for z in some])
        run.say(f"{subject.name}: wrote {', '.join(absent)} from {', '.join(sources)} "
                f"to {folder}")


def write_report(path, run, model, subject, sources, images, z):
    """Write the report that the model makes of slice z, as text.

    sources: the known contrasts. images: (Z, C, H, W) in [0,1].
    RunError if the file cannot be written.
    """
    u = run.fetch(images, [z])                                              # (1, C, H, W)
    given = {c: u[:, model.contrasts.index(c), None] for c in sources}      # (1, 1, H, W) each
    report = model.generate(given, [TEXT], [(subject.name, z)])[TEXT][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda tmp: tmp.write_text(f"{report}\n", encoding="utf-8"))


# ---- volumes that somebody else made -------------------------------------------------------------


def main(argv=None):
    """Score NIfTI volumes of two folders. Flags and errors: see common/score_volumes.py."""
    score_volumes.main(argv)


if __name__ == "__main__":
    as_command(main)
