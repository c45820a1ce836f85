"""What all bodies share: an Anatomy, and how labels become fractions of tissue."""

from dataclasses import dataclass

import numpy as np

from data.phantom.geometry import Grid, smooth_field
from data.phantom.physics import CODE

OVERSAMPLE = 3      # points along a side of a pixel; 3 give 10 levels of partial volume


@dataclass
class Anatomy:
    """A subject: how much of which tissue lies in every voxel, and what its tissues are like."""

    grid: Grid
    mask: np.ndarray            # (X, Y, Z) bool, the body
    maps: dict                  # tissue -> (X, Y, Z), its fraction of the voxel. The fractions sum
                                # to 1 inside of the mask, and are 0 outside
    factors: dict               # tissue -> this subject's (PD, T1, T2) relative to TISSUES
    variation: np.ndarray       # (3, X, Y, Z), PD, T1, T2 relative to the subject's mean. They vary
                                # slowly in space, for all tissues but csf
    texture: np.ndarray         # (X, Y, Z), relative T1, T2 and uptake inside of lesions and marrow
    labels: np.ndarray          # (X, Y, Z) uint8, the LESION_LABELS of the tissue that prevails;
                                # outside of the brain, 1 in a tumour
    traits: dict                # age, sex, ...; see draw_traits, draw_pelvis, draw_neck, ...


def mixture(labels, grid, tissues, points=OVERSAMPLE):
    """Labels at the points of grid.axes(points) -> (mask (X, Y, Z), maps as in Anatomy).

    tissues: The names that the labels may hold.
    """
    nx, ny, nz = grid.shape
    blocks = labels.reshape(nx, points, ny, points, nz)
    inside = (blocks > 0).mean(axis=(1, 3), dtype=np.float32)
    mask = inside >= 0.5
    maps = {}
    for name in tissues:
        fraction = (blocks == CODE[name]).mean(axis=(1, 3), dtype=np.float32)
        # A voxel on the edge of the body shows only what of it lies inside of the body.
        share = fraction / np.maximum(inside, np.float32(0.5))
        maps[name] = np.where(mask, share, np.float32(0))
    return mask, maps


def add_bone(labels, distance, shell):
    """Paint a bone into `labels`, in place: a compact shell around marrow.

    distance: mm from the surface of the bone, negative inside.
    shell: mm.
    """
    labels[distance < 0] = CODE["bone"]
    labels[distance < -shell] = CODE["marrow"]


def tissue_fields(rng, axes, reach=160.0, spreads=(0.015, 0.05, 0.05)):
    """Draw how one subject's tissues vary in space -> (variation, texture) as in Anatomy.

    spreads: The standard deviations of PD, T1 and T2 in space, relative.
    """
    variation = []
    for spread in spreads:
        variation.append(np.exp(spread * smooth_field(rng, 30, axes, reach)))
    texture = np.exp(0.15 * smooth_field(rng, 7, axes, reach))
    return np.stack(variation).astype(np.float32), texture.astype(np.float32)
