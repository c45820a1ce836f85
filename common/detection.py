"""How well boxes are found: average precision, as for the detection of pneumonia (RSNA) and COCO.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

    truth = [boxes of image 1, boxes of image 2, ...]               # (t, 4) each, t may be 0
    predictions = [(boxes, scores) of image 1, ...]                 # (p, 4) and (p,) each
    mean_average_precision(truth, predictions, RSNA)

A box is (x1, y1, x2, y2) in pixels, with x1 <= x2 and y1 <= y2.  There is one class of boxes.  All
images count.  An image without a true box cannot raise the score, but a box found there lowers it.
"""
import numpy as np

RSNA = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75)                 # the least IoU of a hit
COCO = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
RECALLS = np.linspace(0, 1, 101)                # where COCO reads the precision-recall curve


def iou(a, b):
    """The intersection over union of every pair of boxes.  (m, 4) and (n, 4) -> (m, n) in [0,1]

    Two boxes of area 0 give 0.  Raises ValueError if a box is not finite, or not (x1, y1, x2, y2).
    """
    a = _checked_boxes(a)
    b = _checked_boxes(b)
    low = np.maximum(a[:, None, :2], b[:, :2])              # (m, n, 2)
    high = np.minimum(a[:, None, 2:], b[:, 2:])             # (m, n, 2)
    common = np.maximum(high - low, 0).prod(-1)             # (m, n)
    area_a = (a[:, 2:] - a[:, :2]).prod(-1)                 # (m,)
    area_b = (b[:, 2:] - b[:, :2]).prod(-1)                 # (n,)
    union = area_a[:, None] + area_b - common               # (m, n)
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def match(truth, boxes, scores, threshold):
    """Which predicted boxes of one image are hits, (p,) bool.

    truth: (t, 4).  boxes: (p, 4).  scores: (p,).  threshold: the least IoU of a hit.

    The box of the highest score chooses first.  It takes the true box of the largest IoU among
    those that are not taken yet.  A second box on the same true box is therefore a false alarm.
    """
    overlap = iou(boxes, truth)                             # (p, t)
    hits = np.zeros(len(overlap), bool)
    if overlap.shape[1] == 0:
        return hits
    for i in np.argsort(-np.asarray(scores), kind="stable"):
        best = overlap[i].argmax()
        if overlap[i, best] >= threshold:
            hits[i] = True
            overlap[:, best] = -1                           # taken
    return hits


def mean_average_precision(truth, predictions, thresholds):
    """The mean over the thresholds of the average precision, a float in [0,1].

    truth        list of (t, 4), the true boxes of every image
    predictions  list of (boxes (p, 4), scores (p,)), what was found in every image
    thresholds   the least IoU of a hit: RSNA, COCO, or (0.5,)

    Returns NaN if there is no true box at all.  Raises ValueError if the lists are of different
    lengths, if a box has no score, or if a number is not finite.
    """
    if len(truth) != len(predictions):
        raise ValueError(f"mean_average_precision: {len(truth)} images have true boxes, "
                         f"{len(predictions)} have predictions; give one entry for every image, "
                         f"also for one without boxes")
    for i, (boxes, scores) in enumerate(predictions):
        if np.shape(scores) != (len(boxes),) or not np.isfinite(scores).all():
            raise ValueError(f"mean_average_precision: image {i} has {len(boxes)} boxes and scores "
                             f"of shape {np.shape(scores)}; give one finite score per box")
    count = sum(len(boxes) for boxes in truth)
    if count == 0:
        return float("nan")
    scores = np.concatenate([own for _, own in predictions])
    values = []
    for threshold in thresholds:
        hits = [match(true, *found, threshold) for true, found in zip(truth, predictions)]
        values.append(_average_precision(np.concatenate(hits), scores, count))
    return float(np.mean(values))


def _average_precision(hits, scores, count):
    """The mean precision at the 101 recalls of COCO.

    hits: (p,) bool and scores: (p,), of all images.  count: how many true boxes there are.
    """
    hits = hits[np.argsort(-scores, kind="stable")]
    true = hits.cumsum()
    recall = true / count
    precision = true / np.arange(1, len(hits) + 1)
    # the precision at a recall is the best that is reached at this recall or a larger one
    best = np.maximum.accumulate(precision[::-1])[::-1]
    # a recall that is never reached has precision 0
    return np.append(best, 0)[np.searchsorted(recall, RECALLS)].mean()


def _checked_boxes(boxes):
    """The boxes as float64 (n, 4), checked."""
    boxes = np.asarray(boxes, np.float64)
    if boxes.size == 0:
        return boxes.reshape(0, 4)
    fits = boxes.ndim == 2 and boxes.shape[1] == 4
    # NaN fails this test too
    if not fits or not np.isfinite(boxes).all() or not (boxes[:, :2] <= boxes[:, 2:]).all():
        raise ValueError(f"boxes: {boxes.shape} numbers are not boxes; give finite (n, 4) of x1, "
                         f"y1, x2, y2 with x1 <= x2 and y1 <= y2")
    return boxes
