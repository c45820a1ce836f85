"""Does the synthetic image help to diagnose?  A classifier in cross-validation, RLBCD Sec. 4.8.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

A ResNet learns a patient's label (sick or not) from slices of image A, and of image B if there is
one.  It is trained three times: with A alone, with A and the synthetic B, with A and the real B.
If the synthetic B is useful, the second score lies above the first.  The third is the most that can
be expected.  The folds, first weights and order of the slices are the same in all three.

    found = cross_validate_classifier(run, two_channels(a), subjects, labels)
    found = cross_validate_classifier(run, two_channels(a, b), subjects, labels)

The paper says "ResNet", "five-fold" and "mean scores", and no more.  Everything else is our choice:
2-D slices, their size, the loss, the optimiser, and the way from slices to a patient.

The number of patients is small, and so is what the scores can tell.  Read them beside the standard
error of the AUC, and beside the accuracy of a rule that always names the larger class.

Letters in shape comments: B batch, C channels, H W height and width.
"""
import math

import numpy as np
import scipy  # scipy.stats is imported when it is needed: it takes a second
import torch
from torch import nn
from torch.nn import functional as F

from common.device import seed_of
from common.downstream import check_stack, divide, half_mirrored, steps_of
from common.metrics import row

# In place of the defaults of cross_validate_classifier, for phantoms on a CPU.
DEMO_CLASSIFIER = {"width": 8, "epochs": 6, "batch": 8, "lr": 2e-3}


# ---- network -------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """conv-norm-ReLU-conv-norm plus a short cut, then ReLU (He et al. 2016, Fig. 2)."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.stride = stride
        self.skip = nn.Identity()
        if stride > 1 or c_in != c_out:
            self.skip = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False),
                                      nn.BatchNorm2d(c_out))

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))                           # (B, C_out, H', W')
        h = self.norm2(self.conv2(h))                                   # (B, C_out, H', W')
        # A 1x1 convolution with a stride looks at these positions only.  We take them ourselves:
        # with fewer than 8 channels in the layout channels-last, the convolution of torch 2.13
        # writes outside of its memory on a CPU, and the program dies.
        x = x[:, :, ::self.stride, ::self.stride]                       # (B, C_in, H', W')
        return F.relu(self.skip(x) + h)                                 # (B, C_out, H', W')


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016) with one output.  It has 11.2 M parameters at width 64.

    channels   of the image
    width      channels of the first level; each of the three further levels doubles them

    The first convolution is 3x3, and no pooling follows.  The original (7x7, then pooling) expects
    photographs of 224 pixels and would leave 2x2 positions of an image of 64 pixels.
    """

    def __init__(self, channels, width):
        super().__init__()
        layers = [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
                  nn.BatchNorm2d(width), nn.ReLU()]
        c_in = width
        for level in range(4):
            c_out = width * 2 ** level
            layers.append(ResidualBlock(c_in, c_out, stride=1 if level == 0 else 2))
            layers.append(ResidualBlock(c_out, c_out, stride=1))
            c_in = c_out
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(c_in, 1)

    def forward(self, x):
        """x: (B, C, H, W) in [0,1].  Returns logits (B,)."""
        h = self.layers(x)                                              # (B, 8 width, H/16, W/16)
        return self.head(h.mean((2, 3)))[:, 0]                          # (B,)


# ---- scores --------------------------------------------------------------------------------------


def auc(labels, scores):
    """The area under the ROC curve: how often a positive scores higher than a negative.

    labels: (n,) 0 or 1.  scores: (n,), higher for a positive.  A tie counts as half.  The sum of
    the ranks of the positives gives it without looking at pairs (Mann and Whitney).

    Returns a float.  NaN if one class is absent.
    """
    positive = np.asarray(labels).astype(bool)
    ranks = scipy.stats.rankdata(scores)                          # ties share their mean rank
    m = int(positive.sum())
    n = len(positive) - m
    if m == 0 or n == 0:
        return float("nan")
    return float((ranks[positive].sum() - m * (m + 1) / 2) / (m * n))


def average_precision(labels, scores):
    """The area under the steps of the precision-recall curve.

    labels: (n,) 0 or 1.  scores: (n,), higher for a positive.  Returns a float.  NaN if there is no
    positive.

    Each positive raises the recall by the same step.  The area is therefore the mean, over the
    positives, of the precision among all cases that score at least as high.
    """
    positive = np.asarray(labels).astype(bool)
    if not positive.any():
        return float("nan")
    falling = -np.asarray(scores, np.float64)
    # the highest rank of a tie is the number of cases that score at least as high
    chosen = scipy.stats.rankdata(falling, "max")[positive]
    true = scipy.stats.rankdata(falling[positive], "max")
    return float((true / chosen).mean())


def standard_error(area, positives, negatives):
    """The standard error of an AUC, by Hanley and McNeil (1982), Radiology 143:29-36.

    area: the AUC.  positives, negatives: how many of each were ranked.  Returns a float.

    q1 is the chance that two positives both score higher than one negative.  q2 is the chance that
    one positive scores higher than two negatives.  Both assume exponential scores.
    """
    q1 = area / (2 - area)
    q2 = 2 * area ** 2 / (1 + area)
    total = area * (1 - area)
    total += (positives - 1) * (q1 - area ** 2)
    total += (negatives - 1) * (q2 - area ** 2)
    return math.sqrt(total / (positives * negatives))


# ---- cross-validation ----------------------------------------------------------------------------


def cross_validate_classifier(run, images, subjects, labels, epochs=30, batch=16, lr=1e-4, width=64,
                              count=5):
    """Predict the label of every subject by a network that has not seen the subject.

    run        common.run.Run, for device, randomness and progress.  Nothing is saved, and other
               processes are not needed
    images     (n, C, H, W) in [0,1]: two_channels(a), or two_channels(a, b)
    subjects   (n,) names.  All slices of a subject are in one fold
    labels     {subject: 0 or 1}
    count      of folds.  Each takes about its share of both classes

    A slice inherits the label of its subject.  The probability of a subject is the mean over its
    slices.  Losses of positive slices count more, so that both classes have the same weight.  Half
    of the slices are mirrored left-right, as for the segmenter.

    Returns a dict:
    auc, acc       mean over the folds, as in the paper; a subject counts as positive from .5 on
    auc_pooled     of all subjects in one ranking, though each fold had a network of its own
    auc_error      standard error of an AUC of this size, by the numbers of both classes
    majority       accuracy of naming the larger class always
    positives, negatives    how many subjects
    folds          [{"subjects": [...], "auc", "acc"}]
    probability    {subject: float}
    right          {subject: 1.0 if the label was found, else 0.0}

    Raises ValueError if the shapes do not fit, if a subject has no label, or if a class has fewer
    subjects than there are folds.
    """
    subjects = check_stack("cross_validate_classifier", images, subjects)
    truth = checked_labels(subjects, labels, count)                     # {subject: 0 or 1}
    targets = np.array([truth[name] for name in subjects], np.float32)  # (n,)
    probability = {}
    folds = []
    for number, fold in enumerate(divide(run, subjects, count, truth), 1):
        stage = f"classifier, fold {number} of {count}"
        test = np.isin(subjects, fold)                                  # (n,)
        model = train_classifier(run, images, targets, np.flatnonzero(~test), stage, epochs, batch,
                                 lr, width)
        found = classify(run, model, images, np.flatnonzero(test))      # (slices of the fold,)
        for name in fold:
            probability[name] = float(found[subjects[test] == name].mean())
        own = [truth[name] for name in fold]
        scores = np.array([probability[name] for name in fold])
        folds.append({"subjects": fold, "auc": auc(own, scores),
                      "acc": float(np.mean((scores >= 0.5) == own))})
    names = list(truth)
    positives = sum(truth.values())
    negatives = len(names) - positives
    area = float(np.mean([fold["auc"] for fold in folds]))
    right = {name: float((probability[name] >= 0.5) == truth[name]) for name in names}
    return {"auc": area,
            "acc": float(np.mean([fold["acc"] for fold in folds])),
            "auc_pooled": auc([truth[name] for name in names], [probability[n] for n in names]),
            "auc_error": standard_error(area, positives, negatives),
            "majority": max(positives, negatives) / len(names),
            "positives": positives,
            "negatives": negatives,
            "folds": folds,
            "probability": {name: probability[name] for name in names},
            "right": right}


def checked_labels(subjects, labels, count):
    """The labels of these subjects -> {subject: 0 or 1}, plain int, sorted by name."""
    given = {str(name): value for name, value in labels.items()}
    names = sorted(set(subjects.tolist()))
    for name in names:
        if given.get(name) not in (0, 1):
            raise ValueError(f"cross_validate_classifier: the label of {name} is "
                             f"{given.get(name)}; every subject needs 0 or 1")
    truth = {name: int(given[name]) for name in names}
    positives = sum(truth.values())
    fewest = min(positives, len(names) - positives)
    if fewest < count:
        raise ValueError(f"cross_validate_classifier: {positives} of {len(names)} subjects have "
                         f"label 1; {count} folds need {count} subjects of each label")
    return truth


def train_classifier(run, images, targets, rows, stage, epochs, batch, lr, width):
    """Train a ResNet18 on these rows of images (n, C, H, W) and targets (n,).  Returns it.

    stage: a name, from which the first weights, the order and the mirroring follow.
    """
    torch.manual_seed(seed_of(run.seed, stage))
    model = ResNet18(images.shape[1], width).to(run.device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    positives = float(targets[rows].sum())
    weight = torch.tensor((len(rows) - positives) / positives, device=run.device)      # ()
    for (step,) in run.batches(stage, range(steps_of(epochs, len(rows), batch)), 1):
        chosen = rows[run.order(stage, len(rows), batch, step)]         # (B,)
        x = run.fetch(images, chosen)                                   # (B, C, H, W)
        y = torch.from_numpy(targets[chosen]).to(run.device)            # (B,)
        mirrored = half_mirrored(run, stage, step, batch)               # (B, 1, 1)
        x = torch.where(mirrored[:, None], x.flip(-1), x)               # (B, C, H, W)
        with run.autocast():
            logits = model(x)                                           # (B,)
        loss = F.binary_cross_entropy_with_logits(logits.float(), y, pos_weight=weight)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return model.eval()


@torch.no_grad()
def classify(run, model, images, rows, batch=64):
    """The probability of label 1 for these rows of images (n, C, H, W).  Returns (len(rows),)."""
    found = []
    for start in range(0, len(rows), batch):
        logits = model(run.fetch(images, rows[start:start + batch]))    # (B,)
        found.append(torch.sigmoid(logits).cpu().numpy())
    return np.concatenate(found)


def classification_rows(task, method, found):
    """Return rows of results.json: "auc" by fold, and "acc" by subject and by fold.

    found: what cross_validate_classifier returned.  A subject's "acc" is 1 or 0, so that methods
    can be compared subject by subject.  The paper's number, the mean of folds, is a variant.
    """
    numbered = {f"fold {number}": fold for number, fold in enumerate(found["folds"], 1)}
    areas = {name: fold["auc"] for name, fold in numbered.items()}
    shares = {name: fold["acc"] for name, fold in numbered.items()}
    return [row(task, method, "auc", areas, unit="fold", standard_error=found["auc_error"],
                pooled=found["auc_pooled"]),
            row(task, method, "acc", found["right"], majority=found["majority"]),
            row(task, method, "acc", shares, unit="fold", variant="mean of folds")]
