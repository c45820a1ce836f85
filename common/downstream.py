"""Is the synthetic image useful?  A small segmenter, trained on real slices of a contrast, is shown synthetic ones.

If it draws on them what it draws on the real slices of the same subjects, the synthesis kept what the task needs.  The
score on the real slices is the ceiling.  All slices come from one contrast, the target of the synthesis.

    model = train_segmenter(run, images, labels, (0, 1, 2, 4), steps, batch)    # real slices, training subjects only
    dice(truth, segment(model, synthetic), subjects, (1, 2, 4))                 # test subjects

`classes` are the numbers that occur in the label maps, background included, in any order; inside, a class is its place
in `classes`.  Letters in shape comments: B batch, K classes, H W height and width.
"""
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common.device import seed_of
from common.files import RunError
from common.metrics import row
from common.unet import UNet


class Segmenter(nn.Module):
    """The U-Net of common.unet without a plug, at time 0 throughout: its time embedding is one more learned constant."""

    def __init__(self, classes):
        super().__init__()
        self.classes = tuple(classes)
        # 0.7 M parameters; a pixel sees those up to 80 away; only plugs would ask for the size
        self.unet = UNet(1, len(self.classes), base=16, mult=(1, 2, 4), blocks=1, size=0, groups=8)

    def forward(self, x):
        """x: (B, 1, H, W) in [0,1], H and W divisible by 4.  Returns logits (B, K, H, W)."""
        return self.unet(x, torch.zeros(len(x), device=x.device))              # (B, K, H, W)


def class_places(labels, classes):
    """The place in `classes` of every label, uint8 of the same shape.  ValueError for a label that is none of them."""
    labels = np.asarray(labels)
    known = np.isin(labels, classes)
    if not known.all():
        raise ValueError(f"train_segmenter: the label maps hold {labels[~known][0]}, which is none of the classes {classes}; "
                         "name every label that occurs (the enhancing tumour of BraTS is 4 until 2021, 3 from 2023 on)")
    places = np.zeros(labels.shape, np.uint8)
    for place, name in enumerate(classes):
        places[labels == name] = place
    return places


def segmentation_loss(logits, target):
    """Cross-entropy + 1 - soft Dice, as nnU-Net does (Isensee et al. 2021).  Returns the loss and facts: both terms.

    Soft Dice of class k: 2 sum p_k g_k / (sum p_k + sum g_k) over all pixels of the batch, p = softmax, g = one-hot
    truth; then the mean over the classes that the truth holds.  An absent class would score 0 whatever the network says.
    logits: (B, K, H, W).  target: (B, H, W) int64 places.
    """
    p = logits.float().softmax(1)                                              # (B, K, H, W)
    g = F.one_hot(target, p.shape[1]).movedim(-1, 1)                           # (B, K, H, W)
    count = g.sum((0, 2, 3))                                                   # (K,)
    overlap, total = (p * g).sum((0, 2, 3)), p.sum((0, 2, 3)) + count          # (K,), (K,)
    each = 2 * overlap / total.clamp(min=1)                                    # (K,)   the clamp: no 0/0 in absent classes
    soft_dice = each.sum() / (count > 0).sum()                                 # ()     absent classes add 0
    cross_entropy = F.cross_entropy(logits.float(), target)                    # ()
    return cross_entropy + 1 - soft_dice, {"cross_entropy": cross_entropy.detach(), "soft_dice": soft_dice.detach()}


def train_segmenter(run, images, labels, classes, steps, batch, lr=1e-3, stage="segmenter"):
    """A Segmenter, trained on slices with label maps as a stage of the run; resumes exactly.

    run      common.run.Run, for order, randomness, checkpoints and progress
    images   array (n, H, W) in [0,1], also memory-mapped;  labels: (n, H, W) integers, each one of `classes`
    stage    its name in the checkpoint; another one for each contrast that has a segmenter of its own

    Half of the slices are mirrored left-right: heads nearly are symmetric, and lesions come on both sides (no class may
    name a side).  Never top-bottom: upright slices are all one way up.  Intensities stay as they are: a segmenter made
    robust against wrong ones would forgive them to the synthesis that it judges.
    Several processes work on the same batch: Dice belongs to a whole batch, and the network is small.
    """
    if images.shape != labels.shape or images.ndim != 3 or any(side % 4 for side in images.shape[1:]):
        raise ValueError(f"train_segmenter: images are {tuple(images.shape)}, labels {tuple(labels.shape)}; both must be "
                         "(n, H, W) of one shape, H and W divisible by 4")
    places = class_places(labels, classes)                                     # once, so that a strange label stops here
    torch.manual_seed(seed_of(run.seed, stage))
    model = Segmenter(classes).to(run.device, memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    for step in run.steps(stage, steps, {"model": model, "optimiser": optimiser}, batch):
        rows = run.order(stage, len(images), batch, step)                      # (B,)
        x = run.fetch(images[:, None], rows)                                   # (B, 1, H, W)
        y = torch.from_numpy(places[rows]).to(run.device).long()               # (B, H, W)
        mirrored = torch.rand(batch, generator=run.generator(stage, step), device=run.device) < 0.5     # (B,)
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)          # (B, 1, H, W)
        y = torch.where(mirrored[:, None, None], y.flip(-1), y)                # (B, H, W)
        with run.autocast():
            logits = model(x)                                                  # (B, K, H, W)
        loss, facts = segmentation_loss(logits, y)                             # ()
        run.update(loss, optimiser)
        run.log(loss=loss, **facts)
    return model.eval().requires_grad_(False)


def train_segmenters(run, ds, targets, steps, batch):
    """{contrast: a Segmenter of it}, each trained on at most 5,000 real slices of the training subjects of a data.Dataset.

    RunError if not every subject has label maps.
    """
    if ds.labels is None:
        raise RunError(f"--segment: not every subject in {ds.folder} has label maps (as BraTS's ..._seg.nii.gz)")
    rows = ds.rows("train", 5000)
    labels = np.asarray(ds.labels[rows])                                       # (n, H, W)
    classes = tuple(np.unique(labels).tolist())
    made = {}
    for target in sorted(targets, key=ds.contrasts.index):
        stage = f"segmenter {target} {steps} {ds.fingerprint[:8]}"
        images = ds.images[rows, ds.contrasts.index(target)]                   # (n, H, W)
        made[target] = train_segmenter(run, images, labels, classes, steps, batch, stage=stage)
    return made


@torch.no_grad()
def segment(model, images, batch=32):
    """The label maps (n, H, W), in the numbers of model.classes, of images (n, H, W) in [0,1], any array."""
    device, maps = next(model.parameters()).device, []
    for start in range(0, len(images), batch):
        x = torch.from_numpy(np.asarray(images[start:start + batch], dtype=np.float32))[:, None]        # (B, 1, H, W)
        maps.append(model(x.to(device)).argmax(1).cpu().numpy())               # (B, H, W)
    return np.asarray(model.classes)[np.concatenate(maps)]                     # (n, H, W)


def dice(truth, predicted, subjects, classes):
    """Dice, 2 |T and P| / (|T| + |P|), over all slices of a subject together -> {class: {subject: value}}.

    truth, predicted: (n, H, W) label maps.  subjects: (n,) names.  classes: those to score; leave the background out.
    A subject without the class in both maps has no Dice (0/0) and is left out, so that methods may differ in n; found
    where there is none, or missed altogether, is 0.
    """
    truth, predicted, subjects = np.asarray(truth), np.asarray(predicted), np.asarray(subjects)
    if truth.shape != predicted.shape or len(subjects) != len(truth):
        raise ValueError(f"dice: truth is {truth.shape}, predicted {predicted.shape}, with {len(subjects)} subjects; "
                         "give label maps of one shape and one name per slice")
    scores = {name: {} for name in classes}
    for subject in dict.fromkeys(subjects):
        t, p = truth[subjects == subject], predicted[subjects == subject]
        for name in classes:
            total = (t == name).sum() + (p == name).sum()
            if total > 0:
                scores[name][str(subject)] = float(2 * ((t == name) & (p == name)).sum() / total)
    return scores


def dice_rows(task, method, truth, predicted, subjects, classes):
    """Rows of results.json: "dice", a subject's mean over the classes it has, and "dice 1", ... each; background is none."""
    each = dice(truth, predicted, subjects, [name for name in classes if name != 0])
    mean = {str(s): float(np.mean([scores[s] for scores in each.values() if s in scores]))
            for s in dict.fromkeys(subjects) if any(s in scores for scores in each.values())}
    return [row(task, method, "dice", mean),
            *(row(task, method, f"dice {name}", scores) for name, scores in each.items() if scores)]
