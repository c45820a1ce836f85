"""Grids, random fields and simple shapes. All lengths are in mm."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Grid:
    """A voxel grid along the world axes."""

    shape: tuple[int, int, int]             # (X, Y, Z)
    step: tuple[float, float, float]        # mm from voxel to voxel; negative if the index runs
                                            # against the world axis
    first: tuple[float, float, float]       # world mm of the centre of voxel (0, 0, 0)

    def affine(self):
        """The matrix (4, 4) from a voxel index to world mm."""
        affine = np.diag([*self.step, 1.0])
        affine[:3, 3] = self.first
        return affine

    def axes(self, oversample=1):
        """The world coordinates (mm) along x, y and z, as three 1-D arrays.

        oversample: The number of points in a voxel along x and along y, at equal distances.
        """
        axes = []
        for n, step, first, points in zip(self.shape, self.step, self.first,
                                          (oversample, oversample, 1)):
            inside = (np.arange(points) + 0.5) / points - 0.5
            axes.append(first + step * (np.arange(n)[:, None] + inside).ravel())
        return tuple(axes)


def rng_for(seed, subject, purpose):
    """A random generator that depends on these three and nothing else. purpose: A word."""
    return np.random.default_rng([seed, subject, *purpose.encode()])


def smooth_field(rng, lattice, axes, reach=160.0):
    """A Gaussian random field (X, Y, Z) of mean 0 and variance 1, float32.

    The field is white noise on a cubic lattice, seen through cubic B-splines. The lattice is fixed
    in the world, so the field does not depend on the resolution at which we look at it. Its zero
    surfaces lie 2.66 lattice steps apart on average (Rice's formula).

    lattice: The step of the lattice in mm; the field is smooth on this scale.
    axes: The world coordinates (mm) along x, y and z.
    reach: The lattice ends so many mm on either side of 0. A head needs 128.
    """
    n = int(2 * reach / lattice) + 5
    field = rng.standard_normal((n, n, n), dtype=np.float32)
    for axis in (2, 1, 0):          # there are few slices; to take them first is five times as fast
        place = np.clip((axes[axis] + reach) / lattice, 0, n - 4.001)
        left = place.astype(int)
        t = (place - left).astype(np.float32)
        weights = ((1 - t) ** 3,
                   3 * t ** 3 - 6 * t ** 2 + 4,
                   -3 * t ** 3 + 3 * t ** 2 + 3 * t + 1,
                   t ** 3)
        shape = [-1 if k == axis else 1 for k in range(3)]
        # We do not use a matrix product, because BLAS may round differently with other threads.
        field = sum((w / 6).reshape(shape) * field.take(left + tap, axis)
                    for tap, w in enumerate(weights))
    # 151/315 is the mean of the sum of the squared weights, for each axis.
    return field / np.float32((151 / 315) ** 1.5)


def ellipsoid(points, centre, radii):
    """The distance from the centre relative to the surface: below 1 inside, above 1 outside.

    points: Arrays (x, y, z) in mm. With two axes only, the result is that of an ellipse.
    """
    return np.sqrt(sum(((p - c) / r) ** 2 for p, c, r in zip(points, centre, radii)))


def tube(points, nodes):
    """The signed distance (mm, negative inside) to a bent tube.

    points: Arrays (x, y, z) in mm.
    nodes: Rows (x, y, z, radius) in mm. Between two nodes the radius changes linearly.
    """
    nearest = np.full(points[0].shape, np.inf, np.float32)
    for a, b in pairwise(nodes):
        along = [end - start for start, end in zip(a[:3], b[:3])]
        length2 = sum(d * d for d in along)
        # t is the place along the piece from a to b that is nearest to the point.
        t = sum((p - start) * d for p, start, d in zip(points, a, along)) / length2
        t = np.clip(t, 0, 1)
        distance2 = sum((p - start - t * d) ** 2 for p, start, d in zip(points, a, along))
        radius = a[3] + t * (b[3] - a[3])
        nearest = np.minimum(nearest, np.sqrt(distance2) - radius)
    return nearest


def tubes(points, shapes):
    """The signed distance (mm) to the nearest of several tubes."""
    return np.minimum.reduce([tube(points, shape) for shape in shapes])
