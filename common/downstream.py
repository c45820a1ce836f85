"""Is the synthetic image useful?  A segmenter that was trained on real slices is tested on it.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

If the segmenter draws the same on a synthetic slice as on the real slice, the synthesis kept what
the task needs.  The score on the real slices is the highest that can be expected.  All slices show
one contrast, the target of the synthesis.

    model = train_segmenter(run, images, labels, (0, 1, 2, 4), steps, batch)    # training subjects
    dice(truth, segment(model, synthetic), subjects, (1, 2, 4))                 # test subjects

`classes` are the numbers that occur in the label maps, in any order, the background included.
The network gives one channel to each class, in the order of `classes`; a "place" is such a channel.

Letters in shape comments: B batch, K classes, H W height and width.
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
    """The U-Net of common/unet.py without a plug, at time 0.  It has 0.7 M parameters.

    Its time embedding is one more learned constant.  A pixel of the result depends on those up to
    80 pixels away.
    """

    def __init__(self, classes):
        super().__init__()
        self.classes = tuple(classes)
        # size = 0, because only a plug would ask for the size
        self.unet = UNet(1, len(self.classes), base=16, mult=(1, 2, 4), blocks=1, size=0, groups=8)

    def forward(self, x):
        """x: (B, 1, H, W) in [0,1], H and W divisible by 4.  Returns logits (B, K, H, W)."""
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


def train_segmenter(run, images, labels, classes, steps, batch, lr=1e-3, stage="segmenter"):
    """Train a Segmenter on slices with label maps, as a stage of the run.  Returns it.

    run      common.run.Run, for order, randomness, checkpoints and progress
    images   array (n, H, W) in [0,1], H and W divisible by 4, also memory-mapped
    labels   (n, H, W) integers, each one of `classes`
    stage    its name in the checkpoint; each contrast with its own segmenter needs another name

    Half of the slices are mirrored left-right.  A head is nearly symmetric and lesions come on both
    sides, so no class may name a side.  We never mirror top-bottom, because all slices are upright.
    Intensities stay as they are.  A segmenter that learned to accept wrong intensities would
    forgive them to the synthesis that it judges.

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
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    for step in run.steps(stage, steps, {"model": model, "optimiser": optimiser}, batch):
        rows = run.order(stage, len(images), batch, step)               # (B,)
        x = run.fetch(images[:, None], rows)                            # (B, 1, H, W)
        y = torch.from_numpy(places[rows]).to(run.device).long()        # (B, H, W)
        generator = run.generator(stage, step)
        draws = torch.rand(batch, generator=generator, device=run.device)   # (B,)
        mirrored = (draws < 0.5)[:, None, None]                         # (B, 1, 1)
        x = torch.where(mirrored[:, None], x.flip(-1), x)               # (B, 1, H, W)
        y = torch.where(mirrored, y.flip(-1), y)                        # (B, H, W)
        with run.autocast():
            logits = model(x)                                           # (B, K, H, W)
        loss, facts = segmentation_loss(logits, y)                      # ()
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
    """Segment images (n, H, W) in [0,1].  Returns label maps (n, H, W) of model.classes."""
    device = next(model.parameters()).device
    maps = []
    for start in range(0, len(images), batch):
        part = np.asarray(images[start:start + batch], dtype=np.float32)
        x = torch.from_numpy(part)[:, None].to(device)                  # (B, 1, H, W)
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
