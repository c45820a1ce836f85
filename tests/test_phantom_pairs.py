"""The texture pairs: their stated baselines, and what they hold."""

import numpy as np
import pytest

from data.phantom.pairs import texture_pairs
from scans import look_up, psnr


@pytest.fixture(scope="module")
def pairs():
    """400 pairs to learn from and 100 to score."""
    return texture_pairs(400, 0), texture_pairs(100, 1)


def test_baselines_of_the_pairs(pairs):
    """No learning, the mean, and the best function of single pixels: only texture can do better."""
    (train_a, train_b, _, _), (a, b, _, _) = pairs
    a, b, train_a, train_b = (images[:, None] for images in (a, b, train_a, train_b))
    mean = np.broadcast_to(train_b.mean(axis=0), b.shape)
    assert psnr(a, b) == pytest.approx(15.5, abs=0.3)
    assert psnr(mean, b) == pytest.approx(18.5, abs=0.3)
    assert psnr(look_up(train_a, train_b, a), b) == pytest.approx(20.8, abs=0.3)


def test_what_pairs_hold(pairs):
    for a, b, lesions, has_lesion in pairs:
        for image in (a, b):
            assert image.dtype == np.float32 and image.shape[1:] == (64, 64)
            assert image.min() >= 0 and image.max() <= 1
        assert lesions.dtype == has_lesion.dtype == bool
        np.testing.assert_array_equal(lesions.any(axis=(1, 2)), has_lesion)
        assert has_lesion.mean() == pytest.approx(2 / 3, abs=0.12)  # 0, 1 or 2 discs
        assert a[lesions].mean() == pytest.approx(0.85, abs=0.01)
        assert b[lesions].mean() > 0.6


def test_pairs_depend_on_the_seed_only():
    few, more, other = texture_pairs(3, 7), texture_pairs(5, 7), texture_pairs(3, 8)
    for x, y, z in zip(few, more, other):
        np.testing.assert_array_equal(x, y[:3])
        assert x.ndim == 1 or np.any(x != z)
