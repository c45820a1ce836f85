"""A confidence score against hand-made errors."""
import numpy as np
import pytest

from common import confidence as C


def test_rank_correlation_has_the_sign_of_a_useful_score():
    assert C.rank_correlation([1, 2, 3], [9, 5, 1]) == pytest.approx(1)
    assert C.rank_correlation([1, 2, 3], [1, 5, 9]) == pytest.approx(-1)
    assert C.rank_correlation([1, 2, 3, 4], [4, 3, 1, 2]) == pytest.approx(0.8)         # 1 - 6 * 2 / (4 * 15)
    assert np.isnan(C.rank_correlation([1, 1, 1], [1, 2, 3])) and np.isnan(C.rank_correlation([1, 2], [1, 2]))


def test_within_and_across_are_different_questions():
    """The score knows which slice is difficult, and nothing about the samples of a slice."""
    difficulty = np.array([1.0, 2, 3, 4])[:, None]
    error = difficulty + 0.01 * np.array([[1, 2, 3], [2, 3, 1], [3, 1, 2], [1, 3, 2]])
    score = -difficulty + 0.001 * np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    found = C.judge(score, error, ["a", "a", "b", "b"])
    assert found["across"] == pytest.approx(1)
    assert found["within_slice"] == pytest.approx((-1 + 0.5 + 0.5 - 0.5) / 4)
    assert np.isnan(found["within_subject"])                    # two slices of a subject cannot be ranked
    again = C.judge(score, error, ["a", "a", "a", "b"])
    assert again["within_subject"] == pytest.approx(1)
    assert "tends to find the slices" in C.verdict(found) and "does not find the better one" in C.verdict(found)


def test_groups_of_equal_width():
    score = np.array([[0.0, 0.19, 1.0], [0.5, 0.79, 0.81]])
    quality = np.array([[1.0, 3, 5], [7, 8, 10]])
    means, counts = C.groups(score, quality, "dataset")
    assert counts.tolist() == [2, 0, 1, 1, 2] and np.isnan(means[1])
    assert means[[0, 2, 3, 4]].tolist() == [2, 7, 8, 7.5]
    _, counts = C.groups(score, quality, "slice")               # each slice has its own 0 and 1
    assert counts.tolist() == [3, 0, 0, 0, 3]
    assert (C.normalised(np.ones((2, 3)), "slice") == 0.5).all()


def test_sparsification_by_hand():
    shares, by_score, by_error = C.sparsification([3, 1, 2], [6.0, 2, 1])
    assert shares.tolist() == [0, 1 / 3, 2 / 3]
    assert by_score.tolist() == [3, 3.5, 6]                     # the score keeps the worst one
    assert by_error.tolist() == [3, 1.5, 1]
