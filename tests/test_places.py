"""Position codes and distances between grids, by hand."""
import math

import pytest
import torch

from common.places import sine_positions, squared_distances


def test_every_place_has_its_own_code():
    codes = sine_positions(16, 5, 7, "cpu")
    assert codes.shape == (35, 16)
    gaps = torch.cdist(codes, codes) + torch.eye(35)
    assert gaps.min() > 0.05


def test_the_first_half_tells_the_row_and_the_second_the_column():
    codes = sine_positions(16, 5, 7, "cpu").view(5, 7, 16)
    assert torch.equal(codes[:, :, :8], codes[:, :1, :8].expand(5, 7, 8)) and codes[:, 0, :8].unique(dim=0).shape[0] == 5
    assert torch.equal(codes[:, :, 8:], codes[:1, :, 8:].expand(5, 7, 8)) and codes[0, :, 8:].unique(dim=0).shape[0] == 7


def test_codes_by_hand():
    """Place (2, 3) is the tenth place of a map four places wide.  With 8 channels each axis has the frequencies 1 and .01."""
    code = sine_positions(8, 3, 4, "cpu")[2 * 4 + 3].tolist()
    assert code == pytest.approx([math.cos(2), math.cos(0.02), math.sin(2), math.sin(0.02),
                                  math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)])


def test_squared_distances_by_hand():
    """A map of 1 x 2 places has its centres at (1/2, 1/4) and (1/2, 3/4); a grid of 2 x 2 at quarters."""
    d = squared_distances(1, 2, 2, "cpu")
    near = 1 / 16
    far = 1 / 16 + 1 / 4
    assert torch.allclose(d, torch.tensor([[near, far, near, far], [far, near, far, near]]), atol=1e-6)


def test_distances_of_a_map_that_is_higher_than_wide():
    d = squared_distances(2, 1, 1, "cpu")
    assert d.shape == (2, 1) and d.flatten().tolist() == pytest.approx([1 / 16, 1 / 16])
    d = squared_distances(3, 1, 1, "cpu")
    assert d.flatten().tolist() == pytest.approx([1 / 9, 0, 1 / 9], abs=1e-6)


@pytest.mark.parametrize("height, width, side", [(4, 4, 4), (8, 4, 16), (3, 5, 2)])
def test_distances_are_those_of_the_formula_and_mirrors_change_nothing(height, width, side):
    d = squared_distances(height, width, side, "cpu").view(height, width, side, side)
    for i, j, k, m in ((0, 0, 0, 0), (height - 1, 1, 0, side - 1), (1, width - 1, side - 1, 0), (1, 2, 1, 0)):
        rows = ((i + 0.5) / height - (k + 0.5) / side) ** 2
        columns = ((j + 0.5) / width - (m + 0.5) / side) ** 2
        assert d[i, j, k, m].item() == pytest.approx(rows + columns, abs=1e-5)
    assert torch.allclose(d, d.flip(0, 2), atol=1e-5) and torch.allclose(d, d.flip(1, 3), atol=1e-5)


def test_the_nearest_place_of_a_finer_grid_lies_inside():
    """Each place of 4 x 4 covers 2 x 2 places of 8 x 8; these four are the nearest ones, and equally near."""
    d = squared_distances(4, 4, 8, "cpu").view(4, 4, 8, 8)
    for i, j in ((0, 0), (1, 3), (3, 2)):
        inside = d[i, j, 2 * i:2 * i + 2, 2 * j:2 * j + 2]
        assert torch.allclose(inside, torch.tensor(2 / 16 ** 2), atol=1e-5)
        assert (d[i, j] < 2 / 16 ** 2 + 1e-4).sum() == 4
    same = squared_distances(4, 4, 4, "cpu")
    assert torch.equal(same.argmin(1), torch.arange(16)) and same.diagonal().max() < 1e-6
