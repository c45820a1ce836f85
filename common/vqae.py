"""The image autoencoder in front of a latent diffusion model: VQGAN and its relatives.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

    Esser, Rombach, Ommer: Taming Transformers for High-Resolution Image Synthesis (CVPR 2021).
        https://arxiv.org/abs/2012.09841
    Rombach et al.: High-Resolution Image Synthesis with Latent Diffusion Models (CVPR 2022).
        https://arxiv.org/abs/2112.10752

An encoder turns an image into a small map of z channels, which is f times smaller in height and
width.  A bottleneck limits what the map can say.  A decoder turns the map back into an image:

    image x --encoder--> h --bottleneck--> zq --decoder--> image x_hat
    (B, 1, H, W)         (B, z, H/f, W/f)                  (B, 1, H, W)

There are three bottlenecks:

    "vq"     each site of the map is replaced by its nearest code (VQGAN, common/codebook.py)
    "kl"     the encoder gives the mean and the variance of a Gaussian (latent diffusion)
    "none"   the autoencoder is the identity, so diffusion works on the image itself

After training, the autoencoder is frozen.  A diffusion model works on latents L = (h - mu) / sigma.
This is h before quantisation, shifted and scaled so that each channel has mean 0 and standard
deviation 1 over the training set.  `from_latent` goes back; it quantises before it decodes.

How it is trained stands in common/autoencoder.py.

Letters in shape comments: B batch, c image channels, C channels of a map, H W height and width of
an image or map, z h w channels, height and width of a latent, N = H*W positions of a map.
"""
import torch
from torch import nn
from torch.nn import functional as F

from common.codebook import Codebook

BOTTLENECKS = ("vq", "kl", "none")


# ---- Networks ------------------------------------------------------------------------------------


def group_norm(channels):
    """Return a GroupNorm with 32 groups, or with 4 channels per group in small networks."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class PlainResBlock(nn.Module):
    """GroupNorm-SiLU-conv, twice, beside a skip connection.  There is no time here."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                           # (B, C_out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))                           # (B, C_out, H, W)
        return self.skip(x) + h                                         # (B, C_out, H, W)


class MapAttention(nn.Module):
    """Each position of a map looks at all others, with one head as wide as the map."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        height, width = x.shape[2:]
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)      # (B, N, 3C)
        # Only with an axis of heads does torch choose a kernel that saves memory.
        q, k, v = qkv[:, None].chunk(3, dim=3)                          # (B, 1, N, C) each
        a = F.scaled_dot_product_attention(q, k, v)                     # (B, 1, N, C)
        a = a[:, 0].transpose(1, 2).unflatten(2, (height, width))       # (B, C, H, W)
        return x + self.out(a)                                          # (B, C, H, W)


def row_of_blocks(c_in, c_out, count, attend):
    """Return `count` residual blocks, each followed by attention if `attend`."""
    layers = []
    for _ in range(count):
        layers.append(PlainResBlock(c_in, c_out))
        if attend:
            layers.append(MapAttention(c_out))
        c_in = c_out
    return nn.Sequential(*layers)


def middle_blocks(channels, attend):
    """Return two residual blocks, with attention between them if `attend`."""
    first = PlainResBlock(channels, channels)
    second = PlainResBlock(channels, channels)
    if attend:
        return nn.Sequential(first, MapAttention(channels), second)
    return nn.Sequential(first, second)


def head_of(channels, c_out):
    """Return the last layers of an encoder or decoder, GroupNorm-SiLU-conv."""
    return nn.Sequential(group_norm(channels), nn.SiLU(),
                         nn.Conv2d(channels, c_out, 3, padding=1))


class Encoder(nn.Module):
    """Turns an image into a map that is 2**(levels - 1) times smaller.

    widths   channels of each level, from full resolution to the deepest
    blocks   residual blocks per level
    attend   for each level, whether attention follows its blocks
    middle   whether there is attention between the two last blocks
    """

    def __init__(self, c_in, c_out, widths, blocks, attend, middle, base):
        super().__init__()
        self.stem = nn.Conv2d(c_in, base, 3, padding=1)
        self.levels = nn.ModuleList()
        self.shrinks = nn.ModuleList()
        channels = base
        for level, width in enumerate(widths):
            self.levels.append(row_of_blocks(channels, width, blocks, attend[level]))
            channels = width
            if level < len(widths) - 1:
                self.shrinks.append(nn.Conv2d(channels, channels, 3, stride=2))
        self.middle = middle_blocks(channels, middle)
        self.head = head_of(channels, c_out)

    def forward(self, x):
        h = self.stem(x)                                                # (B, base, H, W)
        for level, row in enumerate(self.levels):
            h = row(h)                                                  # (B, C_l, H_l, W_l)
            if level < len(self.shrinks):
                h = F.pad(h, (0, 1, 0, 1))                              # (B, C_l, H_l+1, W_l+1)
                h = self.shrinks[level](h)                              # (B, C_l, H_l/2, W_l/2)
        return self.head(self.middle(h))                                # (B, c_out, H/f, W/f)


class Decoder(nn.Module):
    """Turns a map back into an image.  The arguments are those of Encoder.

    Each level has one block more than in the encoder.  The output is linear.
    """

    def __init__(self, c_in, c_out, widths, blocks, attend, middle):
        super().__init__()
        channels = widths[-1]
        self.stem = nn.Conv2d(c_in, channels, 3, padding=1)
        self.middle = middle_blocks(channels, middle)
        # Both lists go from the deepest level to level 0.
        self.levels = nn.ModuleList()
        self.grows = nn.ModuleList()
        for level in reversed(range(len(widths))):
            self.levels.append(row_of_blocks(channels, widths[level], blocks + 1, attend[level]))
            channels = widths[level]
            if level > 0:
                self.grows.append(nn.Conv2d(channels, channels, 3, padding=1))
        self.head = head_of(channels, c_out)

    def forward(self, h):
        h = self.middle(self.stem(h))                                   # (B, C, H/f, W/f)
        for place, row in enumerate(self.levels):
            h = row(h)                                                  # (B, C_l, H_l, W_l)
            if place < len(self.grows):
                h = F.interpolate(h, scale_factor=2)                    # (B, C_l, 2H_l, 2W_l)
                h = self.grows[place](h)                                # (B, C_l, 2H_l, 2W_l)
        return self.head(h)                                             # (B, c_out, H, W)


class VQAE(nn.Module):
    """The autoencoder.

    base, mult   channels of level l are base * mult[l]; level l works at size / 2**l
    blocks       residual blocks per level of the encoder (one more in the decoder)
    codes        number of codes of bottleneck "vq"
    size         nominal image size; it only says where `attention` goes
    attention    sizes of the maps, in pixels, whose blocks are followed by attention
    middle       whether there is attention at the deepest level, between the middle blocks
    channels     of an image
    z            channels of a latent; those of an image if the bottleneck is "none"
    bottleneck   "vq", "kl" or "none", see the top of this file

    .f is the factor between the size of an image and of its latent, .z the channels of a latent.

    Raises ValueError if the arguments do not go together.
    """

    def __init__(self, base, mult, blocks, codes, size, attention=(), middle=True, channels=1, z=4,
                 bottleneck="vq"):
        super().__init__()
        if bottleneck not in BOTTLENECKS:
            raise ValueError(f"autoencoder: bottleneck {bottleneck!r} is unknown; "
                             f"choose among {', '.join(BOTTLENECKS)}")
        self.bottleneck = bottleneck
        self.f = 1
        self.z = channels
        self.codebook = None
        if bottleneck == "none":
            self.encoder = nn.Identity()
            self.quant_conv = nn.Identity()
            self.post_quant_conv = nn.Identity()
            self.decoder = nn.Identity()
        else:
            self.f = 2 ** (len(mult) - 1)
            self.z = z
            attend = check_arguments(base, mult, size, self.f, attention)
            widths = [base * m for m in mult]
            told = 2 * z if bottleneck == "kl" else z               # "kl": mean and log-variance
            self.encoder = Encoder(channels, told, widths, blocks, attend, middle, base)
            self.quant_conv = nn.Conv2d(told, told, 1)
            self.post_quant_conv = nn.Conv2d(z, z, 1)
            self.decoder = Decoder(z, channels, widths, blocks, attend, middle)
        if bottleneck == "vq":
            self.codebook = Codebook(codes, z)
        self.register_buffer("mu", torch.zeros(1, self.z, 1, 1))
        self.register_buffer("sigma", torch.ones(1, self.z, 1, 1))

    def features(self, x):
        """Return what the encoder says, (B, z, h, w).  With "kl" it is (B, 2z, h, w).

        x: (B, c, H, W) in [-1,1].  Raises ValueError if f does not divide H and W.
        """
        height, width = x.shape[2:]
        if height % self.f or width % self.f:
            raise ValueError(f"autoencoder: an image is {height} x {width}; height and width must "
                             f"be multiples of {self.f}, so pad or resample it")
        return self.quant_conv(self.encoder(x))                         # (B, z or 2z, h, w)

    def encode(self, x):
        """Return h (B, z, h, w), before quantisation and scaling.  "kl" gives the mean.

        x: (B, c, H, W) in [-1,1].  Raises ValueError if f does not divide H and W.
        """
        h = self.features(x)                                            # (B, z or 2z, h, w)
        return h[:, :self.z]                                            # (B, z, h, w)

    def quantise(self, h):
        """Return (zq, loss, idx), see codebook.Codebook.  h: (B, z, h, w).

        Without a codebook this is (h, 0, None).
        """
        if self.codebook is None:
            return h, h.new_zeros(()), None
        return self.codebook(h)

    def decode(self, h, quantised=False):
        """Return images (B, c, H, W), not clamped.

        h: (B, z, h, w).  It is quantised first, unless `quantised` says that it already is.
        """
        if not quantised:
            h, _, _ = self.quantise(h)                                  # (B, z, h, w)
        return self.decoder(self.post_quant_conv(h))                    # (B, c, H, W)

    def forward(self, x, eps=None):
        """Return (x_hat, loss, idx): images (B, c, H, W), loss () of the bottleneck, codes or None.

        x: (B, c, H, W) in [-1,1].  eps: (B, z, h, w) from N(0,1), or None.  With eps, "kl" draws
        its latent; without, it takes the mean.
        """
        h = self.features(x)                                            # (B, z or 2z, h, w)
        if self.bottleneck == "kl":
            mean, logvar = h.float().chunk(2, dim=1)                    # (B, z, h, w) each
            zq, loss = gaussian(mean, logvar, eps)                      # (B, z, h, w), ()
            idx = None
        else:
            zq, loss, idx = self.quantise(h)                            # (B, z, h, w)
        return self.decode(zq, quantised=True), loss, idx               # (B, c, H, W)

    def to_latent(self, x):
        """Return L (B, z, h, w), with mean 0 and deviation 1 per channel over the training set.

        x: (B, c, H, W) in [-1,1].  Raises ValueError if f does not divide H and W.
        """
        return (self.encode(x).float() - self.mu) / self.sigma          # (B, z, h, w)

    def from_latent(self, L):
        """Return images (B, c, H, W) in [-1,1].  L: (B, z, h, w), see to_latent."""
        h = L.float() * self.sigma + self.mu                            # (B, z, h, w)
        return self.decode(h).float().clamp(-1, 1)                      # (B, c, H, W)


def check_arguments(base, mult, size, f, attention):
    """Return for each level whether its maps have one of the sizes in `attention`.

    Raises ValueError if the arguments of VQAE do not go together.
    """
    if size % f:
        raise ValueError(f"autoencoder: size {size} must be a multiple of {f}, "
                         f"because there are {len(mult)} levels")
    for m in (1, *mult):
        channels = base * m
        if channels % 4 or channels % min(32, channels // 4):
            raise ValueError(f"autoencoder: base {base} times mult {m} is {channels}; from 128 on "
                             "it must be a multiple of 32, below a multiple of 4")
    sizes = [size // 2 ** level for level in range(len(mult))]
    for wanted in attention:
        if wanted not in sizes:
            raise ValueError(f"autoencoder: no map is {wanted} pixels wide; choose attention among "
                             f"{', '.join(map(str, sizes))}")
    return [each in attention for each in sizes]


def gaussian(mean, logvar, eps=None):
    """Return a sample of N(mean, exp(logvar)), and its KL divergence from N(0, 1).

    mean, logvar: (B, z, h, w).  eps: (B, z, h, w) from N(0,1); without it the sample is the mean.

    Returns (B, z, h, w) and ().  The divergence is summed over a latent, and is the mean over the
    batch.
    """
    logvar = logvar.clamp(-30, 20)                                      # (B, z, h, w)
    kl = (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)) / 2     # (B,)
    if eps is None:
        return mean, kl.mean()
    return mean + (logvar / 2).exp() * eps, kl.mean()                   # (B, z, h, w), ()
