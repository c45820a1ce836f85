"""Accelerated MR: an image from the centre of k-space only.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.
"""
import torch

from common.rounds import modality_of


def central_kspace(x, factor):
    """What a scan gives that measures 1 / factor of the lines of k-space, along both axes.

    x: images (..., H, W) in [0,1], H and W divisible by factor.  Only the central H / factor by
    W / factor samples of k-space stay; the others are zero.  The magnitude is returned, clipped to
    [0,1].  The image keeps its size and loses its details.
    """
    if factor == 1:
        return x
    height, width = x.shape[-2:]
    k = torch.fft.fftshift(torch.fft.fft2(x.float()), dim=(-2, -1))         # (..., H, W)
    keep = torch.zeros(height, width, device=x.device)                      # (H, W)
    top = (height - height // factor) // 2
    left = (width - width // factor) // 2
    keep[top:top + height // factor, left:left + width // factor] = 1
    return torch.fft.ifft2(torch.fft.ifftshift(k * keep, dim=(-2, -1))).abs().clamp(0, 1)


def as_scanned(cfg, stream, x):
    """Images x of a stream.  With --accelerate, MR is as an accelerated scan gives it.

    An image that is as blurred already hardly changes.
    """
    return central_kspace(x, cfg.accelerate) if modality_of(stream) == "mri" else x


def disturb(cfg, run, u, keys):
    """as_scanned of all streams of u (B, C, H, W), for the standing baselines."""
    streams = run.about["contrasts"]
    return torch.stack([as_scanned(cfg, s, u[:, c]) for c, s in enumerate(streams)], dim=1)
