"""What all body parts share: an Anatomy, and the way from labels to fractions of tissue."""

from dataclasses import dataclass

import numpy as np

from data.phantom.geometry import Grid, smooth_field
from data.phantom.physics import CODE


@dataclass
class Anatomy:
    """A subject. maps: tissue name -> (X, Y, Z) fraction of the voxel, 0..1; they sum to 1 inside `mask` and are 0
    outside. factors: tissue name -> this subject's (PD, T1, T2) relative to TISSUES. variation: (3, X, Y, Z), the
    same three varying slowly in space, for all tissues but csf. texture: (X, Y, Z), relative T1, T2 and uptake inside
    lesions and in marrow. labels: (X, Y, Z) uint8, the LESION_LABELS of the tissue that prevails. traits: see
    `draw_traits` and `draw_pelvis`."""
    grid: Grid
    mask: np.ndarray
    maps: dict
    factors: dict
    variation: np.ndarray
    texture: np.ndarray
    labels: np.ndarray
    traits: dict


OVERSAMPLE = 3                    # label points along a pixel's side, so 10 levels of partial volume


def mixture(labels, grid, tissues):
    """Labels at the points of grid.axes(OVERSAMPLE) -> mask (X, Y, Z) and maps, see Anatomy. tissues: names that the
    labels may hold."""
    nx, ny, nz = grid.shape
    blocks = labels.reshape(nx, OVERSAMPLE, ny, OVERSAMPLE, nz)
    inside = (blocks > 0).mean(axis=(1, 3), dtype=np.float32)
    mask = inside >= 0.5
    maps = {}
    for name in tissues:  # a voxel on the edge shows what of it lies inside the body
        fraction = (blocks == CODE[name]).mean(axis=(1, 3), dtype=np.float32)
        maps[name] = np.where(mask, fraction / np.maximum(inside, np.float32(0.5)), np.float32(0))
    return mask, maps


def tissue_fields(rng, axes, reach=160.0):
    """How one subject's tissues vary in space: variation and texture of Anatomy."""
    spread = (0.015, 0.05, 0.05)  # of PD, T1, T2 from place to place
    variation = np.stack([np.exp(sd * smooth_field(rng, 30, axes, reach)) for sd in spread]).astype(np.float32)
    return variation, np.exp(0.15 * smooth_field(rng, 7, axes, reach)).astype(np.float32)
