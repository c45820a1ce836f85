"""Views of images and reports for contrastive losses: changed a little, but not in what matters.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.
"""
import math

import torch
from torch.nn import functional as F


def augment(x, modality, g):
    """A view for Eqs. (3) and (4): x (B, 1, H, W) in [0,1] -> the same, slightly changed.

    The usual recipe (flips, colours) would change what a radiologist reads: the side, the
    brightness.  Here geometry changes a little, then intensities as such scanners vary [D9].
    """
    B = len(x)

    def uniform(low, high):
        return low + (high - low) * torch.rand(B, generator=g, device=x.device)     # (B,)

    def each(a):
        return a[:, None, None, None]                                       # (B, 1, 1, 1)
    zoom = uniform(0.8, 1.0).sqrt()                                         # (B,)  side of the crop
    angle = uniform(-10, 10) * math.pi / 180                                # (B,)
    room = 1 - zoom                                                         # (B,)
    shift_x = room * uniform(-1, 1) + uniform(-0.1, 0.1)                    # (B,)  2 is the width
    shift_y = room * uniform(-1, 1) + uniform(-0.1, 0.1)                    # (B,)
    row1 = torch.stack([zoom * angle.cos(), -zoom * angle.sin(), shift_x], dim=1)   # (B, 3)
    row2 = torch.stack([zoom * angle.sin(), zoom * angle.cos(), shift_y], dim=1)    # (B, 3)
    grid = F.affine_grid(torch.stack([row1, row2], dim=1), x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)  # (B, 1, H, W)
    if modality == "xray":
        x = x ** each(uniform(0.8, 1.25))
        x = each(uniform(0.9, 1.1)) * (x - 0.5) + 0.5 + each(uniform(-0.1, 0.1))
    elif modality == "ct":                                  # 20 HU are .008 of the window of 2500
        x = each(uniform(0.9, 1.1)) * (x - 0.4) + 0.4 + each(uniform(-0.008, 0.008))
    else:
        place = torch.linspace(-1, 1, x.shape[2], device=x.device)
        field = (each(uniform(-0.1, 0.1)) * place[:, None] + each(uniform(-0.1, 0.1)) * place
                 + each(uniform(-0.1, 0.1)) * place[:, None] * place)       # (B, 1, H, W)  the coil
        x = x.clamp(0, 1) ** each(uniform(0.7, 1.4)) * (1 + field)
    noise = torch.randn(x.shape, generator=g, device=x.device)
    return (x + each(uniform(0, 0.03)) * noise).clamp(0, 1)                 # (B, 1, H, W)


def shuffled(report, g):
    """A report with its sentences in another order.  They end in " ."; g: a generator."""
    sentences = [part for part in report.removesuffix(" .").split(" . ") if part]
    order = torch.randperm(len(sentences), generator=g, device=g.device).tolist()
    return " . ".join(sentences[i] for i in order) + " ."
