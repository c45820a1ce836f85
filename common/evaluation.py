"""What a trained model is asked for: to fill missing contrasts of arrays, of test subjects, and of whole volumes.

Trained      the model as Python sees it: numpy or torch in, the same out
evaluate     every test subject once, scored beside the standing baselines; pictures
synthesize   missing contrasts as NIfTI volumes

Each of them calls the model's `fill` and nothing else, so that what is scored is what is used.
fill(u, known, keys): u (B, C, H, W) in [0,1], zero where missing; known (B, C) bool; keys (subject, slice) of each,
which fix the noise.  It returns (B, C, H, W) in [0,1] and a dict of extras, {name: images (B, C, H, W)}, that are
scored and drawn beside the result (for example the prior that a sampler started from).
"""
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

import data
from common import downstream, metrics, pictures
from common.files import RunError
from data import canonical_contrast

SHOWN = 0.3                                     # error at which an error map is white
TOLERANCE = 1e-3                                # so far outside [0,1] may rounding lead
# Colours of label maps, as in Fig. 6 of MetaDB, but such that colour-blind readers can tell them apart
# (Okabe and Ito): 1 necrosis vermilion, 2 oedema yellow, 4 (3 in BraTS from 2023 on) enhancing tumour blue.
CLASS_COLOURS = {1: (213, 94, 0), 2: (240, 228, 66), 3: (0, 114, 178), 4: (0, 114, 178)}


# ---- from Python -----------------------------------------------------------------------------------------------------


class Trained:
    """A trained model.  contrasts: their names in the order of the channels; size: height and width of a slice."""

    def __init__(self, model, cfg):
        self.model = model
        self.config = cfg
        self.contrasts = tuple(model.contrasts)
        self.size = cfg.size

    def fill(self, images, known, keys=None, extras=False):
        """Fill in the contrasts that are missing.

        images   (B, C, H, W) in [0,1], numpy or torch, channels in the order of .contrasts, H = W = .size; what stands
                 in missing contrasts does not matter (NaN is fine)
        known    (B, C) or (C,) bool, or the names of the known contrasts, such as ("t1", "t2")
        keys     one (subject, slice number) per slice; they fix the noise, so that a slice always comes out the same.
                 By default the slices are numbered
        extras   True: returns also a dict of what the method made on the way, such as its prior

        Returns images of the same kind, float32; known contrasts come back as they are.
        Raises ValueError for other shapes, names, values outside [0,1], or if nothing is known or missing.
        """
        u = self._checked_images(images)
        known = self._checked_known(known, len(u))
        self._check_values(u, known)
        if keys is None:
            keys = [("array", number) for number in range(len(u))]
        if len(keys) != len(u):
            raise ValueError(f"fill: {len(keys)} keys for {len(u)} slices; give one (subject, slice) for each")
        made = []
        notes = []
        for start in range(0, len(u), self.config.sample_batch):
            part = slice(start, start + self.config.sample_batch)
            result, found = fill(self.model, u[part], known[part], keys[part])
            made.append(result)
            notes.append(found)
        filled = self._like(images, torch.cat(made))
        if not extras:
            return filled
        return filled, {name: self._like(images, torch.cat([found[name] for found in notes])) for name in notes[0]}

    def _checked_images(self, images):
        """(B, C, H, W) float32 on the model's device."""
        u = torch.as_tensor(images).detach().float()
        C = len(self.contrasts)
        S = self.size
        if u.dim() != 4 or tuple(u.shape[1:]) != (C, S, S) or len(u) == 0:
            raise ValueError(f"fill: images are {tuple(u.shape)}; this model needs (B, {C}, {S}, {S}), B slices of "
                             f"the contrasts {', '.join(self.contrasts)} (data.load_scans brings files to this size)")
        return u.to(self.model.run.device)

    def _checked_known(self, known, B):
        """(B, C) bool on the model's device."""
        C = len(self.contrasts)
        if not torch.is_tensor(known) and np.asarray(known).dtype.kind in "US":
            names = [str(name) for name in np.atleast_1d(np.asarray(known))]
            unknown = [name for name in names if name not in self.contrasts]
            if unknown:
                raise ValueError(f"fill: known names {', '.join(unknown)}; "
                                 f"this model knows {', '.join(self.contrasts)}")
            known = [contrast in names for contrast in self.contrasts]
        known = torch.as_tensor(known)
        if known.dtype != torch.bool or tuple(known.shape) not in ((C,), (B, C)):
            raise ValueError(f"fill: known is {tuple(known.shape)} of {known.dtype}; give bool of shape (B, C) = "
                             f"{(B, C)} or (C,), or names of {', '.join(self.contrasts)}")
        known = known.expand(B, C).to(self.model.run.device)
        for b, row in enumerate(known.tolist()):
            if all(row) or not any(row):
                raise ValueError(f"fill: slice {b} has {'all' if all(row) else 'no'} contrasts known; "
                                 "at least one must be known and one missing")
        return known

    def _check_values(self, u, known):
        """Known contrasts must be finite and in [0,1]."""
        for c, contrast in enumerate(self.contrasts):
            values = u[:, c][known[:, c]]
            if values.numel() == 0:
                continue
            if not torch.isfinite(values).all():
                raise ValueError(f"fill: the known contrast {contrast} has values that are not finite; "
                                 "replace them (background is 0)")
            low = float(values.min())
            high = float(values.max())
            if low < -TOLERANCE or high > 1 + TOLERANCE:
                raise ValueError(f"fill: the known contrast {contrast} has values from {low:.4g} to {high:.4g}, "
                                 "outside [0,1]; divide a 0 to 255 image by 255, or use data.normalise on a scan")

    @staticmethod
    def _like(images, tensor):
        """As numpy or on the device of a tensor, whatever the images were."""
        if torch.is_tensor(images):
            return tensor.to(images.device)
        return tensor.cpu().numpy()


@torch.no_grad()
def fill(model, u, known, keys, watch=None):
    """model.fill, after everything in u (B, C, H, W) that is not known (B, C) was set to zero.

    watch: a list that gets (title, state, estimate of x0) at each evaluation of the network, images (B, C, H, W) in [-1,1].
    """
    mask = known[:, :, None, None]                                                      # (B, C, 1, 1)
    return model.fill(torch.where(mask, u, 0), known, keys, watch)


def missing_patterns(missing, contrasts):
    """The tasks that --missing asks for, as pairs (known contrasts, missing contrasts).

    missing: ("each",) leaves out one contrast at a time, ("all",) every subset; otherwise names of contrasts.
    RunError if there is no such contrast, or if none would be known or missing.
    """
    if len(contrasts) < 2:
        raise RunError(f"the data give one contrast, {contrasts[0]}; two or more are needed, see --contrasts", status=2)
    subsets = []
    if missing == ("each",):
        subsets = [(c,) for c in contrasts]
    elif missing == ("all",):
        for count in range(1, len(contrasts)):
            subsets += combinations(contrasts, count)
    else:
        unknown = [c for c in missing if c not in contrasts]
        if unknown or not missing or len(set(missing)) >= len(contrasts):
            raise RunError(f"--missing {','.join(missing)}: name some, but not all, of {', '.join(contrasts)}; "
                           "or each; or all", status=2)
        subsets = [tuple(c for c in contrasts if c in missing)]
    return [(tuple(c for c in contrasts if c not in subset), subset) for subset in subsets]


def all_directions(source, target, contrasts):
    """Every pair of different contrasts (a source, a target), as channel numbers.  source, target: names."""
    pairs = []
    for one in source:
        for other in target:
            src = contrasts.index(canonical_contrast(one))
            tgt = contrasts.index(canonical_contrast(other))
            if src != tgt:
                pairs.append((src, tgt))
    return pairs


def chosen_direction(pairs, only, contrasts):
    """Of such pairs the one that `only` names, (source, target); all if it is empty.  RunError if there is no such."""
    if not only:
        return pairs
    wanted = tuple(canonical_contrast(c) for c in only)
    for src, tgt in pairs:
        if (contrasts[src], contrasts[tgt]) == wanted:
            return [(src, tgt)]
    there = ", ".join(f"{contrasts[src]},{contrasts[tgt]}" for src, tgt in pairs)
    raise RunError(f"--only {','.join(only)}: this model knows {there}", status=2)


# ---- test subjects ---------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """n synthesised slices of one kind.  All images are (n, H, W) in [0,1].

    sources: {contrast: images} that were known.  target: the contrast.  results: {method: images}, the model's first.
    subjects: (n,) names.
    segmenter, labels: of the target contrast (common/downstream.py), and the true label maps (n, H, W); or None.
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


def evaluate(method, cfg, run, ds, model):
    """Every test subject once, every pattern of known contrasts.  Writes results.json, results.npz and pictures.

    method: a script.Method.  Each process works on whole subjects; the first one scores all.
    """
    contrasts = list(ds.contrasts)
    rows = ds.spread("test", cfg.test_slices)
    patterns = method.patterns(cfg, contrasts)
    missing = {contrast for _, absent in patterns for contrast in absent}
    segmenters = method.segmenters(cfg, run, ds, missing) if method.segmenters else {}
    mine = set(ds.split["test"][run.rank::run.world])
    todo = []
    for p in range(len(patterns)):
        todo += [(p, int(r)) for r in rows if ds.subject[r] in mine]
    done = []                                                                   # ((pattern, row), {name: (C, H, W)})
    for part in run.batches("sampling", todo, cfg.sample_batch):
        known = [[c in patterns[p][0] for c in contrasts] for p, _ in part]
        known = torch.tensor(known, device=run.device)                          # (B, C)
        chosen = np.array([r for _, r in part])
        keys = ds.keys(chosen)
        u = run.fetch(ds.images, chosen)                                        # (B, C, H, W)
        if method.disturb:
            u = method.disturb(cfg, run, u, keys)
        made, extras = fill(model, u, known, keys)
        images = {name: x.cpu().numpy() for name, x in {method.name: made, **extras}.items()}
        for b, key in enumerate(part):
            done.append((key, {name: x[b] for name, x in images.items()}))
    done = dict(run.gather(done))
    if run.rank > 0:
        return

    truth = np.asarray(ds.images[rows], dtype=np.float32)                       # (n, C, H, W)
    given = truth
    if method.disturb:
        given = method.disturb(cfg, run, torch.from_numpy(truth).to(run.device), ds.keys(rows)).cpu().numpy()
    tasks = []
    for p, (sources, absent) in enumerate(patterns):
        for target in absent:
            c = contrasts.index(target)
            names = done[p, int(rows[0])]
            results = {name: np.stack([done[p, int(r)][name][c] for r in rows]) for name in names}
            known = {name: given[:, contrasts.index(name)] for name in sources}
            labels = ds.labels[rows] if target in segmenters else None
            tasks.append(Task(known, target, truth[:, c], results, ds.subject[rows], segmenters.get(target), labels))
    some = ds.images[ds.rows("train", 2000)].astype(np.float32)    # (m, C, H, W)
    learned = {name: some[:, c] for c, name in enumerate(contrasts)}
    report(run, tasks, learned, f"slices per subject: {cfg.test_slices}; whole slice, range [0,1]; "
                                "unit: subject, the mean of its slices")
    draw_steps(run, ds, model, patterns[:2], rows[len(rows) // 2])


def report(run, tasks, train, protocol):
    """Score every task beside the standing baselines: results.json, results.npz, samples.png, and a table on the screen.

    train: {contrast: (m, H, W)}, slices of training subjects for the baselines.  protocol: what a value is, in words.
    """
    rows = []
    kept = {}
    drawn = []
    for task in tasks:
        methods = {**task.results, **metrics.baselines(train, task.sources, task.target)}
        rows += metrics.score_table(task.name, methods, task.truth, task.subjects, slices=len(task.truth))
        if task.segmenter:
            more, images, picture = segmented(task, methods)
            rows += more
            kept.update(images)
            drawn.append(picture)
        middle = len(task.truth) // 2                       # one slice per task stays with the numbers, for the tables
        for method, images in task.results.items():
            kept[f"{task.name}|{method}"] = images[middle].astype(np.float16)
        kept[f"{task.name}|truth"] = task.truth[middle].astype(np.float16)
    run.say("\n" + metrics.markdown_table(rows) + "\n")
    run.results(rows, kept, protocol)
    draw_samples(run.out / "samples.png", tasks)
    if drawn:
        pictures.grid(run.out / "segmentation.png", [list(shown.values()) for _, shown in drawn],
                      list(drawn[0][1]), [label for label, _ in drawn])
    run.say(f"written: {run.out / 'results.json'}, {run.out / 'samples.png'}")


def segmented(task, methods):
    """What a segmenter finds on the results: (rows of Dice, images to keep, (label, {title: picture}))."""
    maps = {}
    for method, images in {**methods, "real slices": task.truth}.items():
        if method != "mean-of-train":
            maps[method] = downstream.segment(task.segmenter, images)
    rows = []
    for method, found in maps.items():
        rows += downstream.dice_rows(task.name, method, task.labels, found, task.subjects, task.segmenter.classes)
    name = next(iter(task.results))
    both = {"truth": (task.truth, task.labels), "on the real slice": (task.truth, maps["real slices"]),
            f"on {name}": (task.results[name], maps[name])}
    i = int((task.labels > 0).sum((1, 2)).argmax())         # the slice that shows most
    shown = {title: pictures.overlay(images[i], labels[i], CLASS_COLOURS)
             for title, (images, labels) in both.items()}
    kept = {f"{task.name}|{name}|drawn": shown[f"on {name}"], f"{task.name}|truth|drawn": shown["truth"]}
    return rows, kept, (f"{task.name}, {task.subjects[i]}", shown)


def draw_samples(path, tasks):
    """Two slices of each of the first six tasks: sources, results, truth and error."""
    width = max(len(task.sources) for task in tasks)
    name, *others = tasks[0].results
    rows = []
    labels = []
    for task in tasks[:6]:
        for i in (0, len(task.truth) // 2):
            model, *start = (images[i] for images in task.results.values())
            sources = [images[i] for images in task.sources.values()]
            blank = [np.ones_like(task.truth[i])] * (width - len(sources))
            error = pictures.error_map(task.truth[i], model, SHOWN)
            rows.append([*sources, *blank, *start, model, task.truth[i], error])
            psnr = metrics.psnr(task.truth[i], model, 1)
            labels.append(f"{task.target} of {task.subjects[i]}: {psnr:.1f} dB")
    same = all(list(task.sources) == list(tasks[0].sources) for task in tasks)
    titles = list(tasks[0].sources) if same else [f"source {i + 1}" for i in range(width)]
    note = f"error: |truth - {name}|, white from {SHOWN} on"
    if not same:
        first = tasks[0]
        note += f"; sources of {first.target}: {', '.join(first.sources)}, and likewise for the others"
    pictures.grid(path, rows, [*titles, *others, name, "truth", "error"], labels, note=note)


def draw_steps(run, ds, model, patterns, r):
    """steps.png: what the network is given and what it makes of it, on the way to slice r, for each pattern."""
    contrasts = list(ds.contrasts)
    u = run.fetch(ds.images, [r])                                               # (1, C, H, W)
    rows = []
    labels = []
    for sources, absent in patterns:
        c = contrasts.index(absent[0])
        known = torch.tensor([[name in sources for name in contrasts]], device=run.device)      # (1, C)
        watched = []                                                            # (title, state, estimate of x0)
        made, _ = fill(model, u, known, ds.keys([r]), watched)
        shown = [watched[i] for i in data.evenly(np.arange(len(watched)), 7)]
        channel = c if shown[0][1].shape[1] == len(contrasts) else 0            # of the states: all contrasts, or one
        ends = [made[0, c].cpu(), u[0, c].cpu()]
        rows.append([(state[0, channel].cpu() + 1) / 2 for _, state, _ in shown] + ends)
        rows.append([(estimate[0, channel].cpu() + 1) / 2 for _, _, estimate in shown] + ends)
        labels += [f"{absent[0]}: x_t", "estimate of x0"]
    titles = [title for title, _, _ in shown]
    pictures.grid(run.out / "steps.png", rows, [*titles, "result", "truth"], labels,
                  note=f"{len(shown)} of the {len(watched)} evaluations of the network, with their times; x_t is what it "
                       "is given, below is what it makes of it")


# ---- volumes ---------------------------------------------------------------------------------------------------------


def synthesize(method, cfg, run, model, subjects, asked):
    """Write missing contrasts as NIfTI volumes: all slices, on the source's own grid.

    CT is written in HU, other contrasts in normalised units.  subjects: layouts.Subject.  asked: contrasts to make
    although a subject has them.
    """
    contrasts = list(model.contrasts)
    mine = subjects[run.rank::run.world]
    todo = data.to_synthesize(mine, contrasts, asked, cfg.size, run.out / "synthetic", run.say)
    for subject, sources, absent, volume, paths in todo:
        known = torch.tensor([c in sources for c in contrasts], device=run.device)      # (C,)
        out = volume.images.copy()                                                      # (Z, C, H, W)
        filled = np.flatnonzero(volume.images.any((1, 2, 3)))                           # elsewhere all is background
        for part in run.batches(f"synthesis of {subject.name}", filled, cfg.sample_batch):
            keys = [(subject.name, int(z)) for z in part]
            made, _ = fill(model, run.fetch(volume.images, part), known.expand(len(part), -1), keys)
            out[part] = made.cpu().numpy()
        absent = [c for c in absent if not paths[c].exists()]
        for c in absent:
            slices = out[:, contrasts.index(c)]
            volume.write(paths[c], slices, f"synthetic {c}, {method.name}", contrast=c)
        shown = sources + absent
        folder = paths[absent[0]].parent
        some = filled[np.linspace(0, len(filled) - 1, 5).astype(int)][1:-1]
        rows = []
        for z in some:
            rows.append([out[z, contrasts.index(c)] for c in shown])
        titles = [c if c in sources else f"{c} (synthetic)" for c in shown]
        pictures.grid(folder / "panel.png", rows, titles, [f"slice {z}" for z in some])
        run.say(f"{subject.name}: wrote {', '.join(absent)} from {', '.join(sources)} to {folder}")
