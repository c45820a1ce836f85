"""Intensities of a volume: which voxels are background, and the scale that turns the others into [0, 1] and back.

MR has arbitrary units and is scaled volume by volume; CT is in HU and has one fixed window.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from data.files import DataError

HIGH_PERCENTILE = 99.5       # of the foreground; it becomes 1, a few bright vessels must not set the scale


class Scale(NamedTuple):
    """Intensities that became 0 and 1: v = background + u * (high - background)."""

    background: float
    high: float


CT_WINDOW = Scale(-1000.0, 1500.0)  # HU, from air to dense bone; what lies outside the scan (-1024, -3024) is below
CT_BODY = -500               # HU; above is the body, far below are air, lung and the foam of the table


class Background(NamedTuple):
    """Level of the background; voxels within `reach` of it belong to it. constant: one exact value, else noisy air."""

    level: float
    reach: float
    constant: bool


def find_background(array):
    """Background of a volume (X, Y, Z), from its four lateral faces (an axial stack often cuts the head in z)."""
    border = np.concatenate([array[0].ravel(), array[-1].ravel(), array[:, 0].ravel(), array[:, -1].ravel()])
    low, high = np.percentile(array[::2, ::2, ::2], [0.5, HIGH_PERCENTILE])     # heavy tails must not set the tolerance
    tolerance = 1e-4 * float(high - low)
    level = np.median(border)
    # A value that fills more than half of the border is its median, whatever the value is: 0, -3.2, -1000.
    if np.mean(np.abs(border - level) <= tolerance) > 0.5:
        return Background(float(level), tolerance, True)
    # Noisy air: the densest third of the dark border voxels. Tissue that touches the border is bright or spread out.
    dark = np.sort(border[border <= (low + high) / 2])
    if dark.size < 3:
        dark = np.sort(border)
    third = dark.size // 3
    widths = dark[third:] - dark[:-third]
    start = int(np.argmin(widths))
    # Rayleigh noise has a third of its mass within 0.56 sigma of its mode's neighbourhood: 8 widths leave about 1e-5.
    return Background(float(np.median(dark[start:start + third + 1])), max(8 * float(widths[start]), tolerance), False)


def background_value(array):
    """Level of the background of a volume (X, Y, Z) in its own units."""
    return find_background(array).level


def foreground(array, background=None, contrast=None):
    """Boolean (X, Y, Z): what is not background. No assumption that the background is 0 or tissue is positive.

    contrast: "ct" is in HU, where the body is the largest connected piece above CT_BODY; a table is another piece.
    """
    if contrast == "ct":
        pieces, count = ndimage.label(array > CT_BODY)
        return pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:]) if count else pieces > 0
    background = background or find_background(array)
    # Around an exact value tissue may be darker (z-scores with background 0); in noisy air darker is only noise.
    distance = np.abs(array - background.level) if background.constant else array - background.level
    return distance > background.reach


def normalise(array, background=None, contrast=None):
    """Intensities -> (u float32 in [0, 1], Scale), one scale for the whole volume; in CT (HU) for all volumes: CT_WINDOW.

    All else is MR, in arbitrary units:

    u = clip((v - background) / (p99.5 of the foreground - background), 0, 1); exactly 0 outside the foreground if the
    background is one constant value. A positive affine change of v leaves u unchanged. Where more than 2 % of the
    foreground is darker than the background (z-scored tissue around zeros) the scale starts at its 0.5th percentile.
    DataError for constant or empty volumes.
    """
    if array.min() == array.max():
        raise DataError(f"is constant (every voxel is {array.min():g})")
    if contrast == "ct":
        if array.max() <= CT_BODY:
            raise DataError(f"has an empty foreground (nothing is above {CT_BODY} HU)")
        return np.clip((array - CT_WINDOW.background) / (CT_WINDOW.high - CT_WINDOW.background), 0, 1), CT_WINDOW
    background = background or find_background(array)
    mask = foreground(array, background)
    if not mask.any():
        raise DataError(f"has an empty foreground (no voxel stands out from the background {background.level:g})")
    inside = array[mask]
    low = background.level
    if np.mean(inside < low) > 0.02:
        low = float(np.percentile(inside, 100 - HIGH_PERCENTILE))
    high = float(np.percentile(inside, HIGH_PERCENTILE))
    if not high > low:
        raise DataError(f"has no foreground brighter than its background {low:g}")
    u = np.clip((array - np.float32(low)) / np.float32(high - low), 0, 1).astype(np.float32)
    if background.constant:
        u[~mask] = 0
    return u, Scale(low, high)


def denormalise(u, scale):
    """Back to the source's intensities; what normalise clipped stays at the limits."""
    return (scale.background + u * (scale.high - scale.background)).astype(np.float32)
