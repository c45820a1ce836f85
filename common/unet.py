"""One U-Net for all five papers: ADM's blocks (Dhariwal & Nichol, 2021) with one extension point.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

The extension point is the *plug*, a function  Site -> Module | None.  The U-Net calls it at
construction, twice per residual block:
    where = "norm"   after the second GroupNorm and its FiLM, inside the block
                     (e.g. a text-driven normalisation)
    where = "block"  after the block
                     (e.g. attention)
and calls the module it gets as  module(h, condition).  The U-Net never looks at `condition`: it
belongs to the plug.  Attention is a plug too (`attention_at` puts it where a paper wants it).
Blocks that change the resolution take no plugs.

Letters in shape comments: B batch, C channels, H W height and width, N = H*W positions,
L context tokens, D context width.
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Site:
    """A place in the U-Net where a plug may put a module."""
    where: str        # "norm" or "block"
    stage: str        # "down", "mid" or "up"
    level: int        # 0 = full resolution
    index: int        # which block of its level, 0, 1, ...
    last: bool        # the last block of its level (and stage)
    channels: int     # of the feature map that the module will see
    size: int         # height = width of that map at the nominal image size


def sinusoid(t, width, max_period=10_000):
    """Return the transformer's position code of the diffusion time.

    t: (B,), not scaled; it may be fractional.  Returns (B, width).
    """
    half = width // 2
    place = torch.arange(half, device=t.device, dtype=torch.float32)    # (width/2,)
    frequency = torch.exp(-math.log(max_period) * place / half)         # (width/2,)
    angle = t.float()[:, None] * frequency                              # (B, width/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)                 # (B, width)


def zeroed(module):
    """Set a module's parameters to zero.  Returns the module.

    If the last layer of a residual branch starts at zero, the block starts as the identity.
    """
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv, twice.  The time embedding scales and shifts the second norm (FiLM).

    resample   None, "down" or "up": the block may halve or double the resolution
    """

    def __init__(self, c_in, c_out, emb_dim, groups, resample=None, norm_plug=None):
        super().__init__()
        self.resample = resample
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.film = nn.Linear(emb_dim, 2 * c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.conv2 = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.plug = norm_plug

    def forward(self, x, emb, condition=None):
        h = F.silu(self.norm1(x))                                       # (B, C_in, H, W)
        if self.resample == "down":
            h = F.avg_pool2d(h, 2)                                      # (B, C_in, H/2, W/2)
            x = F.avg_pool2d(x, 2)                                      # (B, C_in, H/2, W/2)
        elif self.resample == "up":
            h = F.interpolate(h, scale_factor=2)                        # (B, C_in, 2H, 2W)
            x = F.interpolate(x, scale_factor=2)                        # (B, C_in, 2H, 2W)
        h = self.conv1(h)                                               # (B, C_out, H', W')
        film = self.film(F.silu(emb))[:, :, None, None]                 # (B, 2 C_out, 1, 1)
        scale, shift = film.chunk(2, dim=1)                             # (B, C_out, 1, 1)
        h = self.norm2(h) * (1 + scale) + shift                         # (B, C_out, H', W')
        if self.plug is not None:
            h = self.plug(h, condition)                                 # (B, C_out, H', W')
        h = self.conv2(F.silu(h))                                       # (B, C_out, H', W')
        return self.skip(x) + h                                         # (B, C_out, H', W')


class Attention(nn.Module):
    """Multi-head attention from x to context, or to x itself if there is no context.

    The layout is that of latent diffusion (Rombach et al., 2022).  There are channels / head_dim
    heads.  bias: queries, keys and values get one, as in ADM.  Raises ValueError if head_dim does
    not divide channels.
    """

    def __init__(self, channels, head_dim, context_dim=None, bias=False):
        super().__init__()
        if channels % head_dim:
            raise ValueError(f"attention: {channels} channels cannot be divided into heads of "
                             f"{head_dim}; choose a head_dim that divides {channels}")
        self.heads = channels // head_dim
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=bias)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=bias)
        self.out = nn.Linear(channels, channels)

    def split(self, h):
        """Split the channels into heads.  h: (B, N, C).  Returns (B, heads, N, C/heads)."""
        return h.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, context=None, mask=None):
        """x: (B, N, C).  context: (B, L, D).  Returns (B, N, C).

        mask: (B, L), True where the context is to be looked at.
        """
        context = x if context is None else context                     # (B, L, D)
        q = self.split(self.to_q(x))                                    # (B, heads, N, C/heads)
        k = self.split(self.to_k(context))                              # (B, heads, L, C/heads)
        v = self.split(self.to_v(context))                              # (B, heads, L, C/heads)
        mask = None if mask is None else mask[:, None, None]            # (B, 1, 1, L)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)     # (B, heads, N, C/heads)
        return self.out(a.transpose(1, 2).flatten(2))                   # (B, N, C)


class SpatialTransformer(nn.Module):
    """Latent diffusion's block: self-attention, cross-attention to `context`, gated feed-forward.

    As a plug it is called with condition = context, (B, L, D).  With one context token (L = 1) the
    softmax over a single key is 1, so cross-attention adds the same vector at every position and
    to_q, to_k receive no gradient.  Raises ValueError if head_dim does not divide channels.
    """

    def __init__(self, channels, head_dim, context_dim, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, head_dim)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, head_dim, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.gate = nn.Linear(channels, 8 * channels)
        self.ff = nn.Linear(4 * channels, channels)
        self.proj_out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x, context):
        _, _, height, width = x.shape
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)       # (B, N, C)
        h = h + self.self_attention(self.norm1(h))                      # (B, N, C)
        h = h + self.cross_attention(self.norm2(h), context)            # (B, N, C)
        value, gate = self.gate(self.norm3(h)).chunk(2, dim=2)          # (B, N, 4C) each
        h = h + self.ff(value * F.gelu(gate))                           # (B, N, C)
        h = h.transpose(1, 2).unflatten(2, (height, width))             # (B, C, H, W)
        return x + self.proj_out(h)                                     # (B, C, H, W)


class SelfAttention(nn.Module):
    """The usual plug of a diffusion U-Net, in which each position looks at all others.

    It does not read the condition.
    """

    def __init__(self, channels, head_dim, groups, bias=False):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.attention = Attention(channels, head_dim, bias=bias)
        zeroed(self.attention.out)

    def forward(self, h, condition):
        height, width = h.shape[2:]
        x = self.norm(h).flatten(2).transpose(1, 2)                     # (B, N, C)
        a = self.attention(x)                                           # (B, N, C)
        return h + a.transpose(1, 2).unflatten(2, (height, width))      # (B, C, H, W)


class Chain(nn.ModuleList):
    """Several plugs at one place, one behind the other."""

    def forward(self, h, condition):
        for module in self:
            h = module(h, condition)                                    # (B, C, H, W)
        return h


def attention_at(sizes, make):
    """The usual plug: make(site) after every block whose map is one of `sizes` pixels wide.

    make(site) also goes between the two mid blocks, whatever their size.  With sizes = () it goes
    there alone.  A size that no map has is ignored, because a small image has few sizes.

    The plug raises ValueError, while the U-Net is built, if no map has any of the sizes.
    """
    # These are the widths of the maps on the way down, which the U-Net builds first.
    widths = []

    def plug(site):
        if site.stage == "down":
            widths.append(site.size)
        if site.stage == "mid" and sizes and not set(sizes) & set(widths):
            raise ValueError(f"attention: no map is {' or '.join(map(str, sizes))} pixels wide; "
                             f"choose among {', '.join(map(str, dict.fromkeys(widths)))}")
        wanted = site.index == 0 if site.stage == "mid" else site.size in sizes
        return make(site) if site.where == "block" and wanted else None
    return plug


def check_sizes(size, base, mult, groups, head_dim):
    """Return the sizes of a U-Net's maps, one per level.

    Raises ValueError, in words of the flags, if the arguments do not go together.
    """
    deepest = 2 ** (len(mult) - 1)
    if size % deepest:
        raise ValueError(f"--size {size}: must be a multiple of {deepest}, for {len(mult)} --mult")
    for m in (1, *mult):
        if base * m % groups:
            raise ValueError(f"--base {base} times --mult {m} must be divisible by "
                             f"--groups {groups}")
    for m in mult:
        if base * m % head_dim:
            raise ValueError(f"--base {base} times --mult {m} must be divisible by "
                             f"--head-dim {head_dim}")
    return [size // 2 ** level for level in range(len(mult))]


class UNet(nn.Module):
    """Predicts an image from a noisy image and a time.

    c_in, c_out   image channels in and out
    base, mult    channels of level l are base * mult[l]; level l works at size / 2**l
    blocks        residual blocks per level on the way down (one more on the way up)
    size          nominal image size, only used to tell plugs how large a map is
    groups        of every GroupNorm
    plug          Site -> Module | None, see the top of this file
    """

    def __init__(self, c_in, c_out, base, mult, blocks, size, groups=32, plug=lambda site: None):
        super().__init__()
        emb = 4 * base
        self.base = base
        self.time = nn.Sequential(nn.Linear(base, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.stem = nn.Conv2d(c_in, base, 3, padding=1)

        def block(stage, level, index, last, c_in, c_out):
            site = dict(stage=stage, level=level, index=index, last=last, channels=c_out,
                        size=size // 2 ** level)
            res = ResBlock(c_in, c_out, emb, groups, norm_plug=plug(Site("norm", **site)))
            return Block(res, plug(Site("block", **site)))

        channels = base
        skips = [base]                  # the channels of what the way up will concatenate
        self.down = nn.ModuleList()
        self.shrinks = nn.ModuleList()
        for level, m in enumerate(mult):
            row = nn.ModuleList()
            for index in range(blocks):
                row.append(block("down", level, index, index == blocks - 1, channels, m * base))
                channels = m * base
                skips.append(channels)
            self.down.append(row)
            if level < len(mult) - 1:
                self.shrinks.append(ResBlock(channels, channels, emb, groups, resample="down"))
                skips.append(channels)

        deepest = len(mult) - 1
        self.mid = nn.ModuleList([block("mid", deepest, 0, False, channels, channels),
                                  block("mid", deepest, 1, True, channels, channels)])

        # Both lists go from the deepest level to level 0.
        self.up = nn.ModuleList()
        self.grows = nn.ModuleList()
        for level in reversed(range(len(mult))):
            row = nn.ModuleList()
            for index in range(blocks + 1):
                wide = channels + skips.pop()
                channels = mult[level] * base
                row.append(block("up", level, index, index == blocks, wide, channels))
            self.up.append(row)
            if level > 0:
                self.grows.append(ResBlock(channels, channels, emb, groups, resample="up"))

        last = zeroed(nn.Conv2d(channels, c_out, 3, padding=1))
        self.head = nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU(), last)

    def forward(self, x, t, condition=None, taps=None):
        """x: (B, c_in, H, W), H and W divisible by 2**(levels - 1).  t: (B,).

        Returns (B, c_out, H, W).  condition goes untouched to every plug.  If `taps` is a dict,
        taps["down" | "up", level] is set to the map behind the last block (and plug) of that level,
        before the resolution changes.
        """
        emb = self.time(sinusoid(t, self.base))                         # (B, 4*base)
        h = self.stem(x)                                                # (B, base, H, W)
        skips = [h]
        for level, row in enumerate(self.down):
            for block in row:
                h = block(h, emb, condition)                            # (B, C_l, H_l, W_l)
                skips.append(h)
            if taps is not None:
                taps["down", level] = h
            if level < len(self.shrinks):
                h = self.shrinks[level](h, emb)                         # (B, C_l, H_l/2, W_l/2)
                skips.append(h)
        for block in self.mid:
            h = block(h, emb, condition)                                # (B, C_l, H_l, W_l)
        for row, level in zip(self.up, reversed(range(len(self.up)))):
            for block in row:
                h = block(torch.cat([h, skips.pop()], dim=1), emb, condition)   # (B, C_l, H_l, W_l)
            if taps is not None:
                taps["up", level] = h
            if level > 0:
                h = self.grows[len(self.grows) - level](h, emb)         # (B, C_l, 2H_l, 2W_l)
        return self.head(h)                                             # (B, c_out, H, W)


class Block(nn.Module):
    """A residual block and the plug behind it, if any."""

    def __init__(self, res, plug):
        super().__init__()
        self.res = res
        self.plug = plug

    def forward(self, h, emb, condition):
        h = self.res(h, emb, condition)                                 # (B, C, H, W)
        return h if self.plug is None else self.plug(h, condition)      # (B, C, H, W)
