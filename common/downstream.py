"""Is the synthetic image useful?  Two questions, one segmenter.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

1. A segmenter that was trained on real slices is tested on synthetic slices (MetaDB Fig. 6).  If it
draws the same on a synthetic slice as on the real slice, the synthesis kept what the task needs.
The score on the real slices is the highest that can be expected.  All slices show one contrast, the
target of the synthesis.

    model = train_segmenter(run, images, labels, (0, 1, 2, 4), steps, batch)    # training subjects
    dice(truth, segment(model, synthetic), subjects, (1, 2, 4))                 # test subjects

2. Segmenters are trained on the source A alone, on A with the synthetic image B, and on A with the
real B, in cross-validation (RLBCD Sec. 4.9).  If the synthetic B helps, the second score lies above
the first.  The third is the most that can be expected.

    cross_validate_segmenter(run, two_channels(a), masks, subjects)
    cross_validate_segmenter(run, two_channels(a, b), masks, subjects)

`classes` are the numbers that occur in the label maps, in any order, the background included.
The network gives one channel to each class, in the order of `classes`; a "place" is such a channel.

Letters in shape comments: B batch, C image channels, K classes, H W height and width.
"""
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common.device import seed_of
from common.files import RunError
from common.metrics import ROUNDING, row
from common.unet import UNet

# In place of the defaults of cross_validate_segmenter, for phantoms on a CPU.
DEMO_SEGMENTER = {"base": 4, "mult": (1, 2, 4), "epochs": 2, "batch": 4, "lr": 1e-2}


# ---- a segmenter ---------------------------------------------------------------------------------


class Segmenter(nn.Module):
    """The U-Net of common/unet.py without a plug, at time 0.  It has 0.7 M parameters by default.

    classes     see the top of this file
    channels    of the image, C
    base, mult  level l has base * mult[l] channels; base is 4, or divisible by 8

    Its time embedding is one more learned constant.  By default, a pixel of the result depends on
    those up to 80 pixels away.
    """

    def __init__(self, classes, channels=1, base=16, mult=(1, 2, 4)):
        super().__init__()
        self.classes = tuple(classes)
        # size = 0, because only a plug would ask for the size
        self.unet = UNet(channels, len(self.classes), base, mult, blocks=1, size=0,
                         groups=min(8, base // 2))

    def forward(self, x):
        """x: (B, C, H, W) in [0,1], H and W divisible by 2**(levels - 1).

        Returns logits (B, K, H, W).
        """
        return self.unet(x, torch.zeros(len(x), device=x.device))       # (B, K, H, W)


def class_places(labels, classes):
    """Return the place in `classes` of every label, as uint8 of the same shape.

    Raises ValueError if a label is none of the classes.
    """
    labels = np.asarray(labels)
    known = np.isin(labels, classes)
    if not known.all():
        raise ValueError(f"train_segmenter: the label maps hold {labels[~known][0]}, which is none "
                         f"of the classes {classes}; name every label that occurs (the enhancing "
                         f"tumour of BraTS is 4 until 2021, 3 from 2023 on)")
    places = np.zeros(labels.shape, np.uint8)
    for place, name in enumerate(classes):
        places[labels == name] = place
    return places


def segmentation_loss(logits, target):
    """The loss is cross-entropy + 1 - soft Dice, as in nnU-Net (Isensee et al. 2021).

    logits: (B, K, H, W).  target: (B, H, W) int64 places.  Returns the loss () and both terms as
    facts {name: ()}.

    Soft Dice of class k is 2 sum p_k g_k / (sum p_k + sum g_k).  Here p is the softmax, g is the
    one-hot truth, and the sums run over all pixels of the batch.  We take the mean over the classes
    that the truth holds.  An absent class would score 0 whatever the network says.
    """
    p = logits.float().softmax(1)                                       # (B, K, H, W)
    g = F.one_hot(target, p.shape[1]).movedim(-1, 1)                    # (B, K, H, W)
    count = g.sum((0, 2, 3))                                            # (K,)
    overlap = (p * g).sum((0, 2, 3))                                    # (K,)
    total = p.sum((0, 2, 3)) + count                                    # (K,)
    each = 2 * overlap / total.clamp(min=1)                             # (K,)  never 0 / 0
    soft_dice = each.sum() / (count > 0).sum()                          # ()  absent classes add 0
    cross_entropy = F.cross_entropy(logits.float(), target)             # ()
    facts = {"cross_entropy": cross_entropy.detach(), "soft_dice": soft_dice.detach()}
    return cross_entropy + 1 - soft_dice, facts


def half_mirrored(run, stage, step, batch):
    """Choose the slices of a training step that are mirrored left-right, one half on average.

    A head is nearly symmetric and lesions come on both sides, so no class may name a side.  We
    never mirror top-bottom, because all slices are upright.  Returns (B, 1, 1) bool.
    """
    generator = run.generator(stage, step)
    draws = torch.rand(batch, generator=generator, device=run.device)   # (B,)
    return (draws < 0.5)[:, None, None]                                 # (B, 1, 1)


def step_loss(run, model, images, places, rows, stage, step):
    """Return the loss of one training step and its facts, see segmentation_loss.

    images: (n, C, H, W).  places: (n, H, W) uint8.  rows: (B,), those of this step.
    """
    x = run.fetch(images, rows)                                         # (B, C, H, W)
    y = torch.from_numpy(places[rows]).to(run.device).long()            # (B, H, W)
    mirrored = half_mirrored(run, stage, step, len(rows))               # (B, 1, 1)
    x = torch.where(mirrored[:, None], x.flip(-1), x)                   # (B, C, H, W)
    y = torch.where(mirrored, y.flip(-1), y)                            # (B, H, W)
    with run.autocast():
        logits = model(x)                                               # (B, K, H, W)
    return segmentation_loss(logits, y)


def train_segmenter(run, images, labels, classes, steps, batch, lr=1e-3, stage="segmenter"):
    """Train a Segmenter on slices with label maps, as a stage of the run.  Returns it.

    run      common.run.Run, for order, randomness, checkpoints and progress
    images   array (n, H, W) in [0,1], H and W divisible by 4, also memory-mapped
    labels   (n, H, W) integers, each one of `classes`
    stage    its name in the checkpoint; each contrast with its own segmenter needs another name

    Half of the slices are mirrored, see half_mirrored.  Intensities stay as they are.  A segmenter
    that learned to accept wrong intensities would forgive them to the synthesis that it judges.

    The random numbers of a step depend on the step alone, so training resumes exactly.  Several
    processes all work on the same batch: Dice belongs to a whole batch, and the network is small.

    Raises ValueError if the shapes do not fit, or if a label is none of the classes.
    """
    fits = images.shape == labels.shape and images.ndim == 3
    if not fits or images.shape[1] % 4 or images.shape[2] % 4:
        raise ValueError(f"train_segmenter: images are {tuple(images.shape)}, labels "
                         f"{tuple(labels.shape)}; both must be (n, H, W) of one shape, H and W "
                         f"divisible by 4")
    places = class_places(labels, classes)                              # (n, H, W)
    torch.manual_seed(seed_of(run.seed, stage))
    model = Segmenter(classes).to(run.device, memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    for step in run.steps(stage, steps, {"model": model, "optimiser": optimiser}, batch):
        rows = run.order(stage, len(images), batch, step)               # (B,)
        loss, facts = step_loss(run, model, images[:, None], places, rows, stage, step)
        run.update(loss, optimiser)         # sets gradients to zero, goes backward, clips and steps
        run.log(loss=loss, **facts)
    return model.eval().requires_grad_(False)


def train_segmenters(run, ds, targets, steps, batch):
    """Train one Segmenter for each contrast in `targets`.  Returns {contrast: Segmenter}.

    ds: data.Dataset.  Each is trained on at most 5,000 real slices of the training subjects.

    Raises RunError if not every subject has label maps.
    """
    if ds.labels is None:
        raise RunError(f"--segment: not every subject in {ds.folder} has label maps "
                       "(as BraTS's ..._seg.nii.gz)")
    rows = ds.rows("train", 5000)
    labels = np.asarray(ds.labels[rows])                                # (n, H, W)
    classes = tuple(np.unique(labels).tolist())
    made = {}
    for target in sorted(targets, key=ds.contrasts.index):
        stage = f"segmenter {target} {steps} {ds.fingerprint[:8]}"
        images = ds.images[rows, ds.contrasts.index(target)]            # (n, H, W)
        made[target] = train_segmenter(run, images, labels, classes, steps, batch, stage=stage)
    return made


@torch.no_grad()
def segment(model, images, batch=32):
    """Segment images (n, H, W) or (n, C, H, W) in [0,1].

    Returns label maps (n, H, W) of model.classes.
    """
    device = next(model.parameters()).device
    maps = []
    for start in range(0, len(images), batch):
        part = np.asarray(images[start:start + batch], dtype=np.float32)
        if part.ndim == 3:
            part = part[:, None]
        x = torch.from_numpy(part).to(device)                           # (B, C, H, W)
        maps.append(model(x).argmax(1).cpu().numpy())                   # (B, H, W)
    return np.asarray(model.classes)[np.concatenate(maps)]              # (n, H, W)


def dice(truth, predicted, subjects, classes):
    """Score label maps by Dice over all slices of a subject: 2 |T and P| / (|T| + |P|).

    Returns {class: {subject: value}}.

    truth, predicted: (n, H, W) label maps.  subjects: (n,) names.
    classes: the numbers to score; leave the background out.

    If a class is in neither map of a subject, Dice is 0/0 and the subject is left out.  Methods may
    therefore differ in n.  If it is in one map only, Dice is 0.

    Raises ValueError if the shapes do not fit.
    """
    truth = np.asarray(truth)
    predicted = np.asarray(predicted)
    subjects = np.asarray(subjects)
    if truth.shape != predicted.shape or len(subjects) != len(truth):
        raise ValueError(f"dice: truth is {truth.shape}, predicted {predicted.shape}, with "
                         f"{len(subjects)} subjects; give label maps of one shape and one name per "
                         f"slice")
    scores = {name: {} for name in classes}
    for subject in dict.fromkeys(subjects):
        own = subjects == subject
        for name in classes:
            t = truth[own] == name
            p = predicted[own] == name
            total = t.sum() + p.sum()
            if total > 0:
                scores[name][str(subject)] = float(2 * (t & p).sum() / total)
    return scores


def dice_rows(task, method, truth, predicted, subjects, classes):
    """Return rows of results.json: "dice" for the mean, then "dice 1", "dice 2", ... per class.

    The other arguments are those of dice.  `classes` may hold the background 0, which is not
    scored.  The "dice" of a subject is the mean over the classes that it has.

    Raises ValueError if the shapes do not fit.
    """
    each = dice(truth, predicted, subjects, [name for name in classes if name != 0])
    mean = {}
    for subject in map(str, dict.fromkeys(subjects)):
        values = [scores[subject] for scores in each.values() if subject in scores]
        if values:
            mean[subject] = float(np.mean(values))
    rows = [row(task, method, "dice", mean)]
    for name, scores in each.items():
        if scores:
            rows.append(row(task, method, f"dice {name}", scores))
    return rows


# ---- cross-validation ----------------------------------------------------------------------------


def two_channels(a, b=None):
    """Put images a and b (n, H, W) side by side as channels.  Returns (n, 2, H, W).

    Without b, a stands in both channels.  The network is then as large as with b, and only what it
    can know differs.
    """
    return np.stack([a, a if b is None else b], axis=1)                 # (n, 2, H, W)


def divide(run, subjects, count, labels=None):
    """Divide subjects into folds, at random.

    subjects: names, which may come repeatedly.  labels: {subject: label} or None.  With labels,
    every fold gets its share of each: numbers differ by one at most between folds.

    Returns a list of `count` lists of names.  Every subject is in one of them.
    Raises ValueError if there are fewer subjects than folds.
    """
    names = sorted(set(map(str, subjects)))
    if len(names) < count:
        raise ValueError(f"divide: {len(names)} subjects cannot fill {count} folds; give more "
                         f"subjects or a smaller count")
    order = np.random.default_rng(seed_of(run.seed, "folds")).permutation(len(names))
    shuffled = [names[i] for i in order]
    if labels is not None:
        # Subjects of one label now stand together.  Within a label the random order stays.
        shuffled.sort(key=lambda name: labels[name])
    # They are dealt out like cards, one to each fold in turn.
    return [shuffled[fold::count] for fold in range(count)]


def steps_of(epochs, n, batch):
    """How many batches it takes to see n slices `epochs` times, at least one."""
    return max(1, math.ceil(epochs * n / batch))


def check_stack(caller, images, subjects):
    """The names as an array of str (n,), after the images (n, C, H, W) were checked.

    Raises ValueError if there is not one name per slice, or if a value lies outside of [0,1].
    """
    if images.ndim != 4 or len(images) != len(subjects) or len(images) == 0:
        raise ValueError(f"{caller}: images are {tuple(images.shape)}, with {len(subjects)} "
                         f"subjects; give (n, C, H, W) and one name per slice")
    low = float(images.min())
    high = float(images.max())
    # NaN fails this test too
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise ValueError(f"{caller}: images reach from {low:g} to {high:g}; they must lie in [0,1]")
    return np.asarray(subjects).astype(str)


def cross_validate_segmenter(run, images, masks, subjects, epochs=50, batch=16, lr=3e-4, base=32,
                             mult=(1, 2, 4, 8), count=5):
    """Segment every subject by a network that has not seen the subject (RLBCD Sec. 4.9).

    run         common.run.Run, for device, randomness and progress.  Nothing is saved, and other
                processes are not needed
    images      (n, C, H, W) in [0,1]: two_channels(a), or two_channels(a, b)
    masks       (n, H, W) bool, or 0 and 1: what shall be found
    subjects    (n,) names.  All slices of a subject are in one fold
    base, mult  size of the Segmenter; H and W are divisible by 2**(len(mult) - 1)
    count       of folds

    The paper says "U-Net" and "five-fold", and no more.  The loss is segmentation_loss.  With two
    classes its cross-entropy is the binary one, of the difference of both logits.

    The folds, first weights and order of the slices do not depend on the images.  Scores of several
    images can therefore be compared subject by subject.

    Returns a dict:
    dice, jaccard  mean over the folds, as in the paper; a fold counts all its voxels together
    folds          [{"subjects": [...], "dice", "jaccard"}]
    by_subject     {"dice": {subject: value}, "jaccard": {subject: value}}
    masks          (n, H, W) bool, what was found

    A fold or subject without a mask, in which nothing was found, has no score and is left out.

    Raises ValueError if the shapes do not fit, if a mask holds another number, if all masks are
    empty, or if there are fewer subjects than folds.
    """
    subjects = check_stack("cross_validate_segmenter", images, subjects)
    masks = np.asarray(masks)
    n, channels, height, width = images.shape
    deepest = 2 ** (len(mult) - 1)
    if masks.shape != (n, height, width) or height % deepest or width % deepest:
        raise ValueError(f"cross_validate_segmenter: images are {tuple(images.shape)}, masks "
                         f"{masks.shape}; both must be n slices of H x W, divisible by {deepest}")
    if not np.isin(masks, (0, 1)).all() or not masks.any():
        raise ValueError("cross_validate_segmenter: masks must hold 0 and 1, and not 0 alone")
    places = masks.astype(np.uint8)                                     # (n, H, W)
    found = np.zeros_like(places)
    folds = divide(run, subjects, count)
    for number, fold in enumerate(folds, 1):
        stage = f"segmenter, fold {number} of {count}"
        test = np.isin(subjects, fold)                                  # (n,)
        train = np.flatnonzero(~test)
        torch.manual_seed(seed_of(run.seed, stage))
        model = Segmenter((0, 1), channels, base, mult)
        model = model.to(run.device, memory_format=torch.channels_last)
        optimiser = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
        for (step,) in run.batches(stage, range(steps_of(epochs, len(train), batch)), 1):
            rows = train[run.order(stage, len(train), batch, step)]     # (B,)
            loss, _ = step_loss(run, model, images, places, rows, stage, step)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        found[test] = segment(model, images[test])
    return overlaps(places, found, subjects, folds)


def overlaps(masks, found, subjects, folds):
    """The scores of cross_validate_segmenter.  masks, found: (n, H, W) of 0 and 1."""
    by_subject = dice(masks, found, subjects, (1,))[1]
    scored = []
    for fold in folds:
        own = np.isin(subjects, fold)                                   # (n,)
        # One name for all slices: the voxels of a fold count together.
        pooled = dice(masks[own], found[own], ["fold"] * own.sum(), (1,))[1]
        value = pooled.get("fold", math.nan)
        scored.append({"subjects": fold, "dice": value, "jaccard": jaccard(value)})
    return {"dice": float(np.nanmean([fold["dice"] for fold in scored])),
            "jaccard": float(np.nanmean([fold["jaccard"] for fold in scored])),
            "folds": scored,
            "by_subject": {"dice": by_subject,
                           "jaccard": {name: jaccard(d) for name, d in by_subject.items()}},
            "masks": found.astype(bool)}


def jaccard(value):
    """The Jaccard index |T and P| / |T or P| of the same two masks whose Dice is `value`."""
    return value / (2 - value)


def segmentation_rows(task, method, result):
    """Return rows of results.json: "dice" and "jaccard", by subject and by fold.

    result: what cross_validate_segmenter returned.  The paper's number, the mean of folds in which
    all voxels count together, is a variant.
    """
    rows = []
    for metric in ("dice", "jaccard"):
        rows.append(row(task, method, metric, result["by_subject"][metric]))
        folds = {}
        for number, fold in enumerate(result["folds"], 1):
            folds[f"fold {number}"] = fold[metric]
        rows.append(row(task, method, metric, folds, unit="fold", variant="mean of folds"))
    return rows
