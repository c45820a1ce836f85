"""Average precision of boxes (common/detection.py) and of cases (common/classify.py) against stored numbers and by hand."""
import numpy as np
import pytest

from common import detection as D
from common.classify import average_precision

TRUTH = [[[12, 8, 52, 48]], [[22, 25, 45, 60], [70, 70, 95, 95]], [], [[1, 1, 20, 20]]]
PREDICTIONS = [([[10, 10, 50, 50], [60, 60, 90, 90], [12, 12, 48, 55]], [0.9, 0.6, 0.55]),
               ([[20, 20, 40, 60]], [0.7]), ([[5, 5, 30, 30]], [0.8]), ([], [])]


# ---- boxes -----------------------------------------------------------------------------------------------------------


def test_iou_of_the_stored_boxes():
    assert D.iou(PREDICTIONS[0][0], TRUTH[0])[:, 0] == pytest.approx([0.822323, 0, 0.699784], abs=1e-6)
    assert D.iou(PREDICTIONS[1][0], TRUTH[1])[0] == pytest.approx([0.646154, 0], abs=1e-6)


@pytest.mark.filterwarnings("error")
def test_iou_by_hand():
    box = [0, 0, 4, 2]
    others = [box, [2, 1, 6, 3], [4, 0, 8, 2], [5, 3, 6, 4], [1, 0, 2, 1], [1, 1, 1, 1]]
    assert D.iou([box], others).tolist() == [[1, 2 / 14, 0, 0, 1 / 8, 0]]   # apart in x and in y gives no positive product
    assert D.iou(others, [box]).T.tolist() == D.iou([box], others).tolist()
    assert D.iou([[1, 1, 1, 1]], [[1, 1, 1, 1]]).tolist() == [[0]]
    assert D.iou([], [box]).shape == (0, 1) and D.iou([box], np.zeros((0, 4))).shape == (1, 0)
    for bad in ([[4, 0, 0, 2]], [[0, 2, 4, 0]], [[0, 0, np.nan, 2]], [[0, 0, np.inf, 2]], box, [[0, 0, 4]]):
        with pytest.raises(ValueError, match="not boxes"):
            D.iou([box], bad)


def test_the_highest_score_chooses_first():
    truth = [[0, 0, 10, 10]]
    near, exact = [0, 0, 10, 8], [0, 0, 10, 10]
    assert D.match(truth, [near, exact], [0.9, 0.8], 0.5).tolist() == [True, False]
    assert D.match(truth, [near, exact], [0.8, 0.9], 0.5).tolist() == [False, True]
    assert D.match(truth, [near], [0.1], 0.8).tolist() == [True]            # an IoU of exactly the threshold is a hit
    assert D.match(truth, [near], [0.1], 0.81).tolist() == [False]
    assert D.match([], [near], [0.1], 0.5).tolist() == [False] and D.match(truth, [], [], 0.5).tolist() == []


def test_a_box_takes_the_closest_free_truth():
    truth = [[0, 0, 10, 10], [0, 0, 10, 12]]
    boxes = [[0, 0, 10, 12], [0, 0, 10, 12], [0, 0, 10, 12]]
    assert D.match(truth, boxes, [0.7, 0.9, 0.8], 0.5).tolist() == [False, True, True]
    assert D.match(truth, boxes, [0.7, 0.9, 0.8], 0.9).tolist() == [False, True, False]     # 10/12 is left


def test_mean_average_precision_equals_pycocotools():
    assert D.mean_average_precision(TRUTH, PREDICTIONS, D.RSNA) == pytest.approx(0.36056105610561046, rel=1e-12)
    assert D.mean_average_precision(TRUTH, PREDICTIONS, (0.5,)) == pytest.approx(0.42244224, abs=1e-8)
    assert D.mean_average_precision(TRUTH, PREDICTIONS, (0.65,)) == pytest.approx(0.25742574, abs=1e-8)
    assert D.mean_average_precision(TRUTH, PREDICTIONS, D.COCO) == pytest.approx(0.22970297, abs=1e-8)
    order = [2, 0, 3, 1]
    again = D.mean_average_precision([TRUTH[i] for i in order], [PREDICTIONS[i] for i in order], D.RSNA)
    assert again == pytest.approx(0.36056105610561046, rel=1e-12)
    assert list(D.RSNA) == pytest.approx(np.linspace(0.4, 0.75, 8)) and list(D.COCO) == pytest.approx(np.linspace(0.5, 0.95, 10))


def test_images_without_truth_or_prediction_count():
    with_both = [0, 1]
    skipped = D.mean_average_precision([TRUTH[i] for i in with_both], [PREDICTIONS[i] for i in with_both], D.RSNA)
    assert skipped == pytest.approx(0.54084158, abs=1e-8)                   # what a mean without these images would say
    assert skipped > D.mean_average_precision(TRUTH[:3], PREDICTIONS[:3], D.RSNA)           # a false alarm
    assert skipped > D.mean_average_precision([*TRUTH[:2], TRUTH[3]], [*PREDICTIONS[:2], PREDICTIONS[3]], D.RSNA)   # a miss


def test_average_precision_of_boxes_by_hand():
    box = [0, 0, 4, 4]
    far = [8, 8, 9, 9]
    # false, true, true of two: precision 0, 1/2, 2/3; the envelope is 2/3 everywhere
    truth, found = [[box], [box]], [([far, box], [0.9, 0.8]), ([box], [0.7])]
    assert D.mean_average_precision(truth, found, (0.5,)) == pytest.approx(2 / 3)
    # one true box of four is found: recalls 0 to .25 are 26 of 101
    assert D.mean_average_precision([[box]] * 4, [([box], [0.5]), *[([], [])] * 3], (0.5,)) == pytest.approx(26 / 101)
    assert D.mean_average_precision([[box]], [([box, far], [0.5, 0.4])], (0.5,)) == 1       # an alarm after the last hit
    assert D.mean_average_precision([[box]], [([], [])], (0.5,)) == 0
    assert np.isnan(D.mean_average_precision([[], []], [([], []), ([box], [0.5])], (0.5,)))


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="4 images have true boxes, 3 have predictions"):
        D.mean_average_precision(TRUTH, PREDICTIONS[:3], D.RSNA)
    for scores in ([0.5, 0.6], 0.5, [np.nan]):
        with pytest.raises(ValueError, match="image 1 has 1 boxes and scores"):
            D.mean_average_precision(TRUTH[:2], [PREDICTIONS[0], ([[0, 0, 1, 1]], scores)], D.RSNA)


# ---- cases -----------------------------------------------------------------------------------------------------------


def test_average_precision_of_cases_equals_scikit_learn():
    labels = [0, 0, 1, 1, 0, 1, 0, 1, 1, 0]
    assert average_precision(labels, [0.1, 0.4, 0.35, 0.8, 0.4, 0.4, 0.2, 0.9, 0.65, 0.7]) == pytest.approx(0.7892857142857144, rel=1e-12)


def test_average_precision_of_cases_by_hand():
    assert average_precision([1, 0, 1], [0.9, 0.8, 0.7]) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision([1, 0, 1, 0], [0.5] * 4) == 0.5                # all tie: the share of positives
    assert average_precision([0, 1], [0.9, 0.1]) == 0.5 and average_precision([True, False], [2, 1]) == 1
    assert np.isnan(average_precision([0, 0], [0.1, 0.2]))
    g = np.random.default_rng(0)
    labels, scores = g.integers(2, size=50), g.integers(9, size=50)         # many ties
    area, before = 0, 0
    for level in range(9, -1, -1):                                          # the steps, from the highest score down
        recall = (labels[scores >= level].sum()) / labels.sum()
        if (scores >= level).any():
            area += (recall - before) * labels[scores >= level].mean()
        before = recall
    assert average_precision(labels, scores) == pytest.approx(area)
    assert average_precision(labels, np.exp(scores)) == pytest.approx(area)                 # only the order counts
