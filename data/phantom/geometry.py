"""Grids, random fields and shapes of the phantoms. All lengths are in mm."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Grid:
    """A voxel grid along the world axes. shape: (X, Y, Z). step: mm from voxel to voxel, negative where the index
    runs against the world axis. first: world coordinates (mm) of the centre of voxel (0, 0, 0)."""
    shape: tuple[int, int, int]
    step: tuple[float, float, float]
    first: tuple[float, float, float]

    def affine(self):
        """(4, 4): voxel index to world mm."""
        affine = np.diag([*self.step, 1.0])
        affine[:3, 3] = self.first
        return affine

    def axes(self, oversample=1):
        """World coordinates along x, y, z as three 1-D arrays; `oversample` points per voxel in x and y, at equal
        distances."""
        axes = []
        for n, step, first, points in zip(self.shape, self.step, self.first, (oversample, oversample, 1)):
            inside = (np.arange(points) + 0.5) / points - 0.5
            axes.append(first + step * (np.arange(n)[:, None] + inside).ravel())
        return tuple(axes)


def rng_for(seed, subject, purpose):
    """A random generator that depends on these three and nothing else."""
    return np.random.default_rng([seed, subject, *purpose.encode()])


def smooth_field(rng, lattice, axes, reach=160.0):
    """A Gaussian random field of mean 0 and variance 1 on the grid spanned by `axes` (mm), smooth on the scale
    `lattice` (mm). The lattice ends `reach` mm on either side of 0; a head needs 128.

    White noise on a cubic lattice, seen through cubic B-splines. The lattice is fixed in the world, so the field does
    not depend on the resolution at which it is looked at. Its zero surfaces lie 2.66 lattice steps apart on average
    (Rice's formula). The sum over taps is written out because a BLAS product may round differently with another
    number of threads."""
    n = int(2 * reach / lattice) + 5
    field = rng.standard_normal((n, n, n), dtype=np.float32)
    for axis in (2, 1, 0):  # slices are few: taking them first is five times as fast
        place = np.clip((axes[axis] + reach) / lattice, 0, n - 4.001)
        left = place.astype(int)
        t = (place - left).astype(np.float32)
        weights = ((1 - t) ** 3, 3 * t ** 3 - 6 * t ** 2 + 4, -3 * t ** 3 + 3 * t ** 2 + 3 * t + 1, t ** 3)
        shape = [-1 if k == axis else 1 for k in range(3)]
        field = sum((w / 6).reshape(shape) * field.take(left + tap, axis) for tap, w in enumerate(weights))
    return field / np.float32((151 / 315) ** 1.5)  # 151/315: mean of the sum of squared weights, per axis


def ellipsoid(points, centre, radii):
    """Distance from the centre in units of the surface: below 1 inside. points: (x, y, z) arrays in mm."""
    return np.sqrt(sum(((p - c) / r) ** 2 for p, c, r in zip(points, centre, radii)))


def tube(points, nodes):
    """Signed distance (mm, negative inside) to a bent tube. nodes: rows (x, y, z, radius); the radius changes
    linearly in between."""
    nearest = np.full(points[0].shape, np.inf, np.float32)
    for a, b in pairwise(nodes):
        along = [end - start for start, end in zip(a[:3], b[:3])]
        t = sum((p - start) * d for p, start, d in zip(points, a, along)) / sum(d * d for d in along)
        t = np.clip(t, 0, 1)
        square = sum((p - start - t * d) ** 2 for p, start, d in zip(points, a, along))
        nearest = np.minimum(nearest, np.sqrt(square) - (a[3] + t * (b[3] - a[3])))
    return nearest


def tubes(points, shapes):
    """Signed distance (mm) to the nearest of some tubes."""
    return np.minimum.reduce([tube(points, shape) for shape in shapes])
