"""Tiles: places that cover an axis, weights, and that blending gives back what went in."""
import itertools

import numpy as np
import pytest

from common.tiles import hann, starts, tile_volume


def same(tiles):
    return tiles[None]


@pytest.mark.parametrize("shape", [(8, 64, 64), (13, 70, 65), (5, 40, 33)])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("window", [hann, lambda tile: np.ones(tile, np.float32)])
def test_a_network_that_changes_nothing_gives_the_volume_back(shape, overlap, window):
    volume = np.random.default_rng(0).random(shape).astype(np.float32) + 0.1
    made = tile_volume(volume, (8, 32, 32), overlap, same, window=window)
    assert made.shape == (1, *shape) and np.abs(made[0] - volume).max() < 1e-5


def test_slices_keep_their_order_and_several_results_stay_apart():
    volume = np.arange(1, 14, dtype=np.float32)[:, None, None] * np.ones((13, 40, 40), np.float32)
    made = tile_volume(volume, (8, 32, 32), 0.5, lambda tiles: np.stack([tiles, -2 * tiles]), count=2, batch=3)
    assert np.allclose(made[0], volume, atol=1e-5) and np.allclose(made[1], -2 * volume, atol=1e-5)


def test_starts_by_hand():
    assert starts(64, 32, 0.5) == [0, 16, 32]
    assert starts(70, 32, 0) == [0, 32, 38]
    assert starts(32, 32, 0.5) == [0]
    assert starts(33, 32, 0.75) == [0, 1]
    assert starts(13, 8, 0.5) == [0, 4, 5]


def test_number_of_tiles_and_size_of_a_batch():
    seen = []

    def work(tiles):
        seen.append(len(tiles))
        return tiles[None]
    tile_volume(np.ones((12, 64, 64), np.float32), (8, 32, 32), 0.5, work, batch=7)
    assert sum(seen) == 2 * 3 * 3 and max(seen) == 7


def test_empty_tiles_are_not_computed_and_stay_zero():
    volume = np.zeros((8, 64, 64), np.float32)
    volume[:, :10, :10] = 1
    seen = []

    def work(tiles):
        seen.append(len(tiles))
        return np.ones_like(tiles)[None]
    made = tile_volume(volume, (8, 32, 32), 0, work)
    assert seen == [1] and made[0, :, :32, :32].min() == 1 and not made[0, :, 32:].any()


def test_hann_weights():
    """The weight is sin^2(pi (i + 1/2) / n) + 0.001 along each axis, multiplied."""
    weight = hann((4, 2, 2))
    profile = [0.1464466 + 1e-3, 0.8535534 + 1e-3]
    assert np.allclose(weight[:, 0, 0], np.array([*profile, *profile[::-1]]) * 0.501 ** 2, rtol=1e-5)
    assert weight.min() > 0


def test_borders_of_tiles_count_little():
    """A network whose border is wrong by 1: with Hann weights the error is far smaller than without."""
    def wrong_border(tiles):
        made = tiles.copy()
        made[:, :, 0] += 1
        made[:, :, -1] += 1
        return made[None]
    volume = np.ones((8, 96, 32), np.float32)
    errors = []
    for window in (hann, lambda tile: np.ones(tile, np.float32)):
        made = tile_volume(volume, (8, 32, 32), 0.5, wrong_border, window=window)
        errors.append(np.abs(made[0, :, 16:80] - 1).mean())
    assert errors[0] < 0.1 * errors[1]


def test_every_voxel_is_covered():
    for length, overlap in itertools.product((32, 33, 50, 100), (0, 0.3, 0.9)):
        covered = np.zeros(length)
        for start in starts(length, 32, overlap):
            covered[start:start + 32] += 1
        assert covered.min() >= 1
