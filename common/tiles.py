"""A volume is cut into overlapping tiles, a network works on each, and the results are blended.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.
"""
import numpy as np


def starts(length, tile, overlap):
    """Where tiles begin on an axis, so that they cover it.  Returns a list of places.

    length, tile: in voxels, length >= tile.  overlap: the share of a tile that the next one covers
    as well, from 0 to below 1.  The last tile ends where the axis ends.
    """
    step = max(1, round(tile * (1 - overlap)))
    return [*range(0, length - tile, step), length - tile]


def hann(tile):
    """The weight of the voxels of a tile: large in the middle, never 0.  Returns float32 (z, h, w).

    The voxels at the border of a tile were computed from padding, so they count little.
    """
    weight = np.ones(())
    for n in tile:
        profile = np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 + 1e-3      # (n,)
        weight = weight[..., None] * profile
    return weight.astype(np.float32)


def tile_volume(volume, tile, overlap, work, count=1, batch=16, window=hann):
    """Cut a volume into tiles, let `work` make `count` new tiles of each, and blend these.

    volume   (Z, H, W) float32.  An axis that is shorter than a tile is padded with 0
    tile     (z, h, w), the size of a tile
    overlap  see starts
    work     tiles (B, z, h, w) -> (count, B, z, h, w), with B up to `batch`
    window   (z, h, w) -> the weights of a tile's voxels

    Returns (count, Z, H, W) float32.  A tile without any value but 0 is left out and counts as 0.
    """
    padding = [(0, max(0, small - n)) for n, small in zip(volume.shape, tile)]
    padded = np.pad(volume, padding)
    total = np.zeros((count, *padded.shape), np.float32)
    weight = np.zeros(padded.shape, np.float32)
    weights = window(tile)
    filled = []
    for z in starts(padded.shape[0], tile[0], overlap):
        for row in starts(padded.shape[1], tile[1], overlap):
            for column in starts(padded.shape[2], tile[2], overlap):
                here = (slice(z, z + tile[0]), slice(row, row + tile[1]),
                        slice(column, column + tile[2]))
                weight[here] += weights
                if padded[here].any():
                    filled.append(here)
    for first in range(0, len(filled), batch):
        some = filled[first:first + batch]
        made = work(np.stack([padded[here] for here in some]))              # (count, B, z, h, w)
        for b, here in enumerate(some):
            total[(slice(None), *here)] += weights * made[:, b]
    depth, height, width = volume.shape
    return (total / weight)[:, :depth, :height, :width]
