"""A discriminator that judges pairs of neighbouring states of a diffusion process.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

It follows the denoising-diffusion GANs of Xiao et al. (2022).

Letters in shape comments: B batch, C channels, H and W height and width.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

from common.unet import sinusoid


class DiscBlock(nn.Module):
    """A residual block that halves the map.  The time is added between its convolutions."""

    def __init__(self, c_in, c_out, emb):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time = nn.Linear(emb, c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, h, emb):
        f = self.conv1(F.leaky_relu(h, 0.2))                            # (B, C_out, H, W)
        f = f + self.time(emb)[:, :, None, None]                        # (B, C_out, H, W)
        f = self.conv2(F.avg_pool2d(F.leaky_relu(f, 0.2), 2))           # (B, C_out, H/2, W/2)
        return (f + self.skip(F.avg_pool2d(h, 2))) / math.sqrt(2)       # (B, C_out, H/2, W/2)


class PairDiscriminator(nn.Module):
    """Is (x_{t-1}, x_t) a pair of neighbouring states of the true process?

    The network gives one logit to each patch of about 70 pixels.

    base   channels of the first map
    N      steps of the process; t is in 1..N
    """

    def __init__(self, base, N):
        super().__init__()
        self.base = base
        self.N = N
        emb = 4 * base
        self.time = nn.Sequential(nn.Linear(base, emb), nn.LeakyReLU(0.2),
                                  nn.Linear(emb, emb), nn.LeakyReLU(0.2))
        self.stem = nn.Conv2d(2, base, 3, padding=1)
        widths = [(base, base), (base, 2 * base), (2 * base, 4 * base)]
        self.blocks = nn.ModuleList(DiscBlock(c_in, c_out, emb) for c_in, c_out in widths)
        self.head = nn.Conv2d(4 * base, 1, 3, padding=1)

    def forward(self, x_prev, x_t, t):
        """x_prev, x_t: (B, 1, H, W).  t: (B,).  Returns logits (B, 1, H/8, W/8)."""
        emb = self.time(sinusoid(1000 * t / self.N, self.base))         # (B, 4*base)
        h = self.stem(torch.cat([x_prev, x_t], dim=1))                  # (B, base, H, W)
        for block in self.blocks:
            h = block(h, emb)                                           # (B, C, H/2, W/2)
        return self.head(F.leaky_relu(h, 0.2))                          # (B, 1, H/8, W/8)


def r1_penalty(disc, x_prev, x_t, t):
    """Return half the squared gradient of the logits with respect to x_{t-1}, on real pairs.

    x_prev, x_t: (B, 1, H, W).  t: (B,).  x_t is the condition, so there is no penalty on it.

    Returns ().  The penalty is per patch, as the other losses are.
    """
    x_prev = x_prev.detach().requires_grad_()
    logits = disc(x_prev, x_t, t)                                       # (B, 1, H/8, W/8)
    gradient, = torch.autograd.grad(logits.sum(), x_prev, create_graph=True)    # (B, 1, H, W)
    return gradient.square().sum((1, 2, 3)).mean() / (2 * logits[0].numel())
