"""Random fields, shapes and grids."""

import nibabel as nib
import numpy as np
import pytest

from data.phantom.geometry import Grid, ellipsoid, smooth_field, tube
from data.phantom.head import head_grid


def test_smooth_field_has_unit_variance_and_the_stated_scale():
    lattice = 8.0
    axis = np.arange(-120, 120, 1.0)
    sparse = axis[::7]  # 7 and 8 have no common factor, so every phase of the lattice is seen
    field = smooth_field(np.random.default_rng(1), lattice, (axis, sparse, sparse))
    assert abs(field.mean()) < 0.03
    assert field.std() == pytest.approx(1, abs=0.03)
    crossings = (np.diff(np.sign(field), axis=0) != 0).mean()  # per mm
    assert 1 / crossings == pytest.approx(2.66 * lattice, rel=0.03)  # Rice: pi sqrt(151 / 315 / (2 / 3)) lattices


def test_smooth_field_lies_still_in_the_world():
    fine = np.arange(-30, 30.1, 1.0)
    values = smooth_field(np.random.default_rng(2), 10, (fine, fine, fine))
    coarse = smooth_field(np.random.default_rng(2), 10, (fine[::-3], fine[::2], fine[5:6]))
    np.testing.assert_allclose(coarse, values[::-3, ::2, 5:6], atol=1e-5)
    assert np.abs(np.diff(values, n=2, axis=0)).max() < 0.1  # smooth across lattice planes too


def test_shapes_by_hand():
    at = [np.array([[[value]]], np.float32) for value in (5.0, 7.0, 0.0)]
    nodes = ((0, 0, 0, 2), (10, 0, 0, 4))
    assert tube(at, nodes).item() == pytest.approx(7 - 3)
    at = [np.array([[[value]]], np.float32) for value in (13.0, 0.0, 4.0)]
    assert tube(at, nodes).item() == pytest.approx(5 - 4)
    assert tube(at, ((0, 0, 0, 2), (10, 0, 0, 4), (10, 0, 10, 1))).item() == pytest.approx(3 - 2.8)
    assert ellipsoid(at, (1, 0, 4), (6, 1, 1)).item() == pytest.approx(2)


def test_grid_axes_agree_with_the_affine():
    grid = Grid((4, 5, 6), (-3, -2, 7), (40, 30, -10))
    x, y, z = grid.axes()
    np.testing.assert_allclose(grid.affine() @ (3, 4, 5, 1), (x[3], y[4], z[5], 1))
    fine = grid.axes(3)
    assert [len(axis) for axis in fine] == [12, 15, 6]
    np.testing.assert_allclose(fine[0][:4], (41, 40, 39, 38))
    np.testing.assert_allclose(fine[0].reshape(4, 3).mean(axis=1), x)
    assert nib.aff2axcodes(head_grid(64, 12).affine()) == ("L", "P", "S")
    x, y, z = head_grid(64, 12).axes()
    np.testing.assert_allclose([x.mean(), y.mean(), z.mean()], [0, -16, 27.5], atol=1e-9)
