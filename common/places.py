"""Where the places of a map lie: position codes, and distances between two grids.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.
"""
import torch

from common.unet import sinusoid


def sine_positions(channels, height, width, device):
    """Position codes of the places of a map, (height*width, channels): half of it for each axis."""
    y = sinusoid(torch.arange(height, device=device), channels // 2)        # (H, C/2)
    x = sinusoid(torch.arange(width, device=device), channels - channels // 2)  # (W, C/2)
    both = torch.cat([y[:, None].expand(-1, width, -1), x.expand(height, -1, -1)], dim=2)
    return both.flatten(0, 1)                                               # (H*W, C)


def squared_distances(height, width, side, device):
    """Squared distances between the places of two grids over one square: (H*W, side*side)."""
    def centres(rows, columns):
        y = (torch.arange(rows, device=device) + 0.5) / rows
        x = (torch.arange(columns, device=device) + 0.5) / columns
        return torch.cartesian_prod(y, x)                                   # (rows*columns, 2)
    return torch.cdist(centres(height, width), centres(side, side)) ** 2
