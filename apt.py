"""APT: missing MR contrasts from the known ones, with the same anatomy.

Shin et al., "Anatomical Consistency and Adaptive Prior-informed Transformation for Multi-contrast
MR Image Synthesis via Diffusion Model", CVPR 2025; link and full reference in CITATION.cff.
Part of a collection of reference implementations; MIT licence, see LICENSE.

THE IDEA.  One diffusion model learns all C contrasts of a slice together.  No channel is special.
Missing contrasts are then filled in like holes in a picture, but the holes are whole channels.
Three things make that work well:
  1. An anatomy vector z is trained to stay the same when one contrast is left out.  It enters the
     U-Net through cross-attention.
  2. Stage 1 of sampling starts from a noisy guess.  The guess (the prior) is another contrast,
     changed by a curve.  A codebook, made once in training, says which contrast and curve fit best.
  3. Stage 2 refines the result of stage 1.  It adds a little noise and denoises, many times.  Each
     new result is averaged with the one before.  The last two are not averaged [D9].

PIPELINE (B slices, C contrasts, H x W pixels, D feature width, K curves, L context tokens)
  u (B,C,H,W) --image encoder, frozen--> (B,C,D) --fusion module--> z (B,D), as context (B,L,D)
  training slices --encoder--> likeness of contrast c and curve(contrast c') --> codebook (C,C,K)
  x_t (B,C,H,W), t, z --U-Net--> noise estimate (B,C,H,W)
  u, known --codebook--> prior --noise of step M--> S + 1 evaluations (stage 1) --> N (stage 2)
Training has the stages "encoder", "mif" (the fusion module), "codebook" and "diffusion".

EQUATIONS
  Eq. (1)  L_anatomy   = -log( e(z_sub) / sum_i e(z_sub_i) ),  e(z) = exp(<z_all, z> / tau)
  Eq. (2)  L_diffusion = E || eps - eps_theta(x_t, t, z_all) ||^2
  Eq. (3)  B(r)        = sum_i binom(3,i) P_i (1-r)^(3-i) r^i,  r in [0,1]
  Eq. (4)  x0_hat     <- x0_hat - alpha * grad_{x_t} || A(x0_hat) - y ||^2    [D3]
  Eq. (5)  x0_hat     <- (1 - w) * previous x0_hat + w * x0_hat

SYMBOLS
  paper            code                 meaning
  x_0, x_t, eps    x0, x_t, eps         slice in [-1,1], noisy slice, noise; (B,C,H,W)
  alpha-bar_t      alpha_bar[t]         how much of the slice is left at step t
  y, A             y, A                 known contrasts; A (B,C,1,1) is 1 where a contrast is known
  z_all, z_sub     z_all, z_sub         anatomy vector of all contrasts, and of all but one
  P_i, B(r)        P, bezier            control points and curve
  sigma (Sec 3.3)  gain                 intensity gain of the codebook
  M, S, N          M, S, N              start step, intervals of stage 1, evaluations of stage 2
  -                grid[j]              step t_j = j M / S of stage 1, j = 0..S
  alpha, w         alpha, w             step of Eq. (4), weight of Eq. (5)
  -                u, known             slice as stored, in [0,1]; known (B,C) bool
  -                src, tgt             source and target contrast; _t always means time

COMMANDS
  python apt.py --data data/brats --train --evaluate       makes phantoms on first use; CPU, minutes
  python apt.py --data FOLDER --train --evaluate           your own scans, the paper's sizes
  python apt.py --data FOLDER --synthesize --missing flair --out runs/apt-FOLDER     NIfTI volumes

DEPARTURES FROM THE PAPER, with the reason here or in the code ("the release": the authors' code)
  [D1]  A small CLIP of ours, pooled, replaces BiomedCLIP, which needs more packages.
  [D2]  Eq. (1) is used in both directions, as in CLIP; z has length 1; tau starts at 0.07.
  [D3]  Eq. (4): one norm per sample, not squared; alpha scaled; no guidance if alpha_bar < 0.01.
  [D4]  Known contrasts are pasted in stage 1 (--paste both: in both); stage 2 is guided too.
  [D5]  The next x_t is x0_hat with fresh noise, not a draw from the posterior of DDPM.
  [D6]  The paper prints one number per control point.  We take it as x.  Background stays dark.
  [D7]  Cosines within a slice, as in the release, not attention maps; votes, gains of all slices.
  [D8]  Table 3 explains no start images: "zero" is mid-grey, "noise" all noise, "random" any pair.
  [D9]  Paper unclear: stage 1 has S + 1 evaluations; of N, all but the last two are at t_2.
  [D10] Small slices are padded (resizing would blur them); those of little tissue are left out.
  [D11] Paper silent: clamped x0, clipped gradients, losses are means, EMA, best weights.

NEEDS  data/ and these files of common/:
  benchmark.py cli.py clip.py cohort.py contrastive.py device.py downstream.py embeddings.py
  encoder.py evaluation.py files.py loop.py metrics.py outline.py pictures.py run.py schedules.py
  score_volumes.py script.py table_pages.py tables.py tasks.py tokenizer.py trained.py unet.py
"""
import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import data
from common import clip, metrics, pictures, script
from common.cli import load_presets
from common.device import seed_of
from common.encoder import encode, encode_slices, encoder_at_work, load_encoder, train_encoder
from common.loop import EMA, Best
from common.outline import Outline
from common.schedules import cosine_alpha_bar, linear_alpha_bar, q_sample, x0_from_eps
from common.tasks import missing_patterns
from common.unet import SpatialTransformer, UNet, attention_at, check_sizes

# ---- 1. Config -----------------------------------------------------------------------------------

T = 1000                                                    # diffusion steps in training (Sec. 4.1)


@dataclass(frozen=True)
class Config:
    """Defaults are the paper's for BraTS (Sec. 4.1), where it states them.  The paper's ADNI:
    --M 200 --alpha 50 --steps 350000 --test-subjects 30 --test-slices 5.  Phantoms: PRESETS."""
    # data
    contrasts: tuple[str, ...] = ()             # contrasts to use, in this order; empty: all
    size: int = 256                             # height and width of a slice in pixels [D10]
    train_fraction: float = 0.8                 # share of the subjects that train
    test_subjects: int = 50                     # subjects that are scored; the rest validates
    test_slices: int = 4                        # slices scored per test subject, evenly spread
    # networks
    encoder: Literal["base", "demo"] = "base"   # size of the image encoder (common/clip.py)
    base: int = 128                             # U-Net channels at full resolution
    mult: tuple[int, ...] = (1, 1, 2, 2, 4, 4)  # channel multipliers, one per resolution
    blocks: int = 2                             # residual blocks per resolution
    attention: tuple[int, ...] = (32, 16, 8)    # map sizes with transformers (the middle has one)
    head_dim: int = 64                          # width of an attention head
    groups: int = 32                            # of every GroupNorm
    # training
    encoder_steps: int = 20_000                 # of the encoder
    encoder_batch: int = 64                     # slices per step of the encoder
    encoder_lr: float = 5e-4                    # peak learning rate of the encoder
    mif_epochs: int = 500                       # passes over the slices for the fusion module
    mif_batch: int = 512                        # slices per step of the fusion module
    mif_lr: float = 5e-5                        # learning rate of the fusion module
    steps: int = 250_000                        # of the diffusion model
    batch: int = 16                             # slices per step, over all processes
    lr: float = 1e-4                            # learning rate of the diffusion model (Adam)
    ema: float = 0.9999                         # decay of the averaged weights (EMA)
    # method, in training
    schedule: Literal["cosine", "linear"] = "cosine"    # noise (linear: the release)
    context: Literal["pooled", "scaled", "tokens"] = "pooled"   # z; z times sqrt(D); z per contrast
    mif: Literal["trained", "mean", "zero"] = "trained"         # z is fused; mean of features; 0
    # method, in sampling
    missing: tuple[str, ...] = ("each",)        # contrasts to make; each: one by one; all: all sets
    prior: Literal["adaptive", "random", "noise", "zero"] = "adaptive"      # start image (Table 3)
    curves: Literal["points", "scalar"] = "points"              # reading of Eq. (3) [D6]
    M: int = 400                                # start step of stage 1, out of 1000 (Table 5)
    S: int = 20                                 # intervals of stage 1: S + 1 evaluations
    N: int = 50                                 # network evaluations of stage 2 (Table 4) [D9]
    alpha: float = 20.0                         # step of Eq. (4) at 256 x 256 [D3]
    w: float = 0.5                              # weight of Eq. (5)
    stage2: bool = True                         # iterative unrolling
    paste: Literal["stage1", "both"] = "stage1" # stages that impose the known contrasts [D4]
    sample_batch: int = 24                      # slices sampled at once; changes rounding only

    def __post_init__(self):
        maps = check_sizes(self.size, self.base, self.mult, self.groups, self.head_dim)
        if not set(maps) & set(self.attention):
            raise ValueError(f"--attention {self.attention}: no map has that size, only {maps}")
        if self.context != "pooled" and self.mif != "trained":
            raise ValueError(f"--context {self.context} needs --mif trained")
        if self.M < self.S:
            raise ValueError(f"--S {self.S} must not exceed --M {self.M}: there is no half step")


# Fields that may change without training again.  --steps may be raised, to train further.
SAMPLING = ("missing", "prior", "curves", "M", "S", "N", "alpha", "w", "stage2", "paste",
            "sample_batch", "test_slices")
PRESETS = load_presets("apt")                                # sizes for phantoms: data/presets.json
LIMITS = dict(mif_epochs=(0, 10 ** 9), mif_batch=(2, 65536), ema=(0, 0.99999), M=(1, T), S=(2, T),
              N=(3, 10_000), alpha=(0, 1e4), w=(0, 1))
# --reproduce: a row of a table takes over all stages before the first one whose fields it changes.
STAGES = {
    "encoder": (),          # fields listed nowhere, such as encoder_steps, act on all stages
    "mif": ("mif_epochs", "mif_batch", "mif_lr"),
    "codebook": (),
    "diffusion": ("base", "mult", "blocks", "attention", "head_dim", "groups", "steps", "batch",
                  "lr", "ema", "schedule", "context", "mif"),
}

# ---- 2. Data -------------------------------------------------------------------------------------
# A data.Dataset gives slices (B, C, H, W) in [0,1], normalised per volume and padded [D10].

# ---- 3. Model ------------------------------------------------------------------------------------


class MutualInformationFusion(nn.Module):
    """Sec. 3.1, Fig. 1a: a transformer block over the contrasts, mean, linear layer, unit vector z.

    It takes any subset of contrasts, in any order, because there is no position code.
    """

    def __init__(self, dim):
        super().__init__()
        self.heads = max(4, dim // 64)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.out = nn.Linear(dim, dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))     # log(1/tau) of Eq. (1)

    def split_heads(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)             # (B, heads, C, D/heads)

    def tokens(self, f, known):
        """f: (B, C, D), one feature per contrast; known: (B, C) bool.  Returns (B, C, D)."""
        q = self.split_heads(self.q(f))                                     # (B, heads, C, D/heads)
        k = self.split_heads(self.k(f))                                     # (B, heads, C, D/heads)
        v = self.split_heads(self.v(f))                                     # (B, heads, C, D/heads)
        mask = known[:, None, None, :]                                      # (B, 1, 1, C)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)         # (B, heads, C, D/heads)
        a = a.transpose(1, 2).flatten(2)                                    # (B, C, D)
        h = self.norm1(f + self.o(a))                                       # (B, C, D)
        return self.norm2(h + self.ff(h))                                   # (B, C, D)

    def forward(self, f, known):
        """Returns z: (B, D), of length 1.  Contrasts that are not known have no influence."""
        mask = known.unsqueeze(2)                                           # (B, C, 1)
        mean = (self.tokens(f, known) * mask).sum(1) / mask.sum(1)          # (B, D)
        return F.normalize(self.out(mean), dim=1)                           # (B, D)  [D2]


def make_unet(cfg, C, dim):
    """Sec. 3.2: C noisy contrasts in, C noise estimates out; attention to the context (B, L, dim).

    A transformer stands in the middle, and after each block whose map size is in cfg.attention.
    With L = 1 the softmax over z is 1: it adds the same vector everywhere, as a bias would.
    """
    def transformer(site):
        return SpatialTransformer(site.channels, cfg.head_dim, dim, cfg.groups)
    plug = attention_at(cfg.attention, transformer)         # site -> module for this place, or None
    return UNet(C, C, cfg.base, cfg.mult, cfg.blocks, cfg.size, cfg.groups, plug)


@torch.no_grad()
def condition(cfg, mif, f, known):
    """The context that the U-Net attends to.  f: (B, C, D); known: (B, C) bool.  Returns (B, L, D).

    f: one pooled feature per contrast; the paper has feature maps [D1].  L is 1 (tokens: C).
    Training uses z of all contrasts; sampling has the known ones only.  So does the release.
    """
    mask = known.unsqueeze(2)                                               # (B, C, 1)
    if cfg.mif == "zero":
        return torch.zeros_like(f[:, :1])                                   # (B, 1, D)
    if cfg.mif == "mean":
        return F.normalize((f * mask).sum(1, keepdim=True), dim=2)          # (B, 1, D)
    z = mif(f, known).unsqueeze(1)                                          # (B, 1, D)
    if cfg.context == "pooled":
        return z
    if cfg.context == "scaled":
        return f.shape[2] ** 0.5 * z                # (B, 1, D)  ours: entries of about 1 in size
    tokens = F.normalize(mif.out(mif.tokens(f, known)), dim=2)              # (B, C, D)
    return torch.where(mask, tokens, z)                                     # (B, C, D)  missing: z


# ---- 4. Maths and losses -------------------------------------------------------------------------


def anatomy_loss(z_all, z_sub, log_scale, subject):
    """Eq. (1): z_all must find the z_sub of its own slice among those of other subjects.

    z_all, z_sub: (B, D) unit vectors; log_scale: log(1/tau); subject: (B,) ids.
    As in CLIP, z_sub must find its z_all as well, and the loss is the mean of both directions [D2].
    Negatives are slices of other subjects, because two slices of one subject look alike.
    """
    scale = log_scale.clamp(max=math.log(100)).exp()
    logits = scale * z_all @ z_sub.T                                        # (B, B)
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)    # (B, B)
    same = (subject[:, None] == subject[None, :]) & ~own                    # (B, B)
    logits = logits.masked_fill(same, -torch.inf)                           # (B, B)
    target = torch.arange(len(logits), device=logits.device)                # (B,)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


SCHEDULES = {"cosine": cosine_alpha_bar, "linear": linear_alpha_bar}       # alpha_bar of every step


def diffusion_loss(unet, x0, t, eps, context, alpha_bar):
    """Eq. (2), as a mean over pixels [D11].

    x0, eps: (B, C, H, W), x0 in [-1,1]; t: (B,), one time for all contrasts; context: (B, L, D).
    """
    x_t = q_sample(x0, alpha_bar[t][:, None, None, None], eps)              # (B, C, H, W)
    return F.mse_loss(unet(x_t, t, context).float(), eps)


def bezier(P, r):
    """Eq. (3): cubic Bezier polynomial with the four numbers P at r (any shape, in [0,1])."""
    return sum(math.comb(3, i) * P[i] * (1 - r) ** (3 - i) * r ** i for i in range(4))


# Sec. 4.1 names two increasing and two decreasing curves: (-1, -1, 1, 1), (-1, -.5, .5, 1) and both
# reversed.  A control point needs an x and a y, but the paper prints one number [D6].  By default
# it is x, with the y of Zhou et al. (Dual-Normalization, 2022).  If x falls, both are reversed.
# With --curves scalar it is y, with equally spaced x.  Each curve is (its four x, its four y).
SPACED = (-1, -1 / 3, 1 / 3, 1)
STEEP = (-1, -1, 1, 1)
SOFT = (-1, -0.5, 0.5, 1)
CURVES = {
    "points": [(STEEP, STEEP), (SOFT, (-1, 0.5, -0.5, 1)),      # straight; flatter in the middle
               (STEEP, STEEP[::-1]),                            # the line, falling
               (SOFT, (1, -0.5, 0.5, -1))],                     # the other one, falling
    "scalar": [(SPACED, STEEP), (SPACED, SOFT), (SPACED, STEEP[::-1]), (SPACED, SOFT[::-1])],
}
FOREGROUND = 0.04                               # of the intensity range, as in the release


@functools.cache
def curve_table(points, n=4097):
    """A curve (x controls, y controls) as y at n equidistant x in [-1,1]."""
    r = np.linspace(0, 1, 20_001)
    x = np.linspace(-1, 1, n)
    return torch.from_numpy(np.interp(x, bezier(points[0], r), bezier(points[1], r))).float()


def warp(u, points):
    """Phi(B, x) of Sec. 3.3: an image u in [0,1] (any shape) through an intensity curve.

    A decreasing curve would turn the background bright, so it acts on the foreground only [D6].
    """
    table = (curve_table(points).to(u.device) + 1) / 2                      # (n,)
    position = u.clamp(0, 1) * (len(table) - 1)
    low = position.floor().long().clamp(max=len(table) - 2)
    bent = torch.lerp(table[low], table[low + 1], position - low)
    rises = points[1][0] < points[1][3]                 # the first and the last y
    return bent if rises else bent * (u > FOREGROUND)


class Codebook(nn.Module):
    """Sec. 3.3: which curve of which other contrast looks most like a target, and its gain.

    The paper compares attention maps of any two images.  As in the release, two contrasts of each
    of at most 2,000 training slices are compared, by cosines.  Their votes count for all [D7].
    votes        (C, C, K) [target, source, curve]: in how many slices this pair was the most alike
    similarity   (C, C, K): the sum of the cosines over the slices
    level        (C,): the sum of the mean intensities of each contrast over the slices
    warped       (C, K): like level, of each contrast after each curve
    """

    def __init__(self, C, curves):
        super().__init__()
        self.curves = CURVES[curves]
        K = len(self.curves)
        self.register_buffer("votes", torch.zeros(C, C, K))
        self.register_buffer("similarity", torch.zeros(C, C, K))
        self.register_buffer("level", torch.zeros(C))
        self.register_buffer("warped", torch.zeros(C, K))

    def add(self, encoder, u):
        """Count a batch of training slices.  u: (B, C, H, W) in [0,1], all contrasts known."""
        C = u.shape[1]
        K = len(self.curves)
        bent = torch.stack([warp(u, points) for points in self.curves], dim=2)  # (B, C, K, H, W)
        plain = F.normalize(encode(encoder, u), dim=2)                      # (B, C, D)
        other = F.normalize(encode(encoder, bent.flatten(1, 2)), dim=2)     # (B, C*K, D)
        other = other.unflatten(1, (C, K))                                  # (B, C, K, D)
        cosine = torch.einsum("bcd,bskd->bcsk", plain, other)               # (B, C, C, K)
        itself = torch.eye(C, dtype=torch.bool, device=u.device)[None, :, :, None]  # (1, C, C, 1)
        cosine = cosine.masked_fill(itself, -1)                             # (B, C, C, K)
        best = cosine.flatten(2).argmax(2)                                # (B, C)  one of C*K pairs
        votes = F.one_hot(best, C * K).sum(0)                               # (C, C*K)
        self.votes += votes.view(C, C, K).cpu()
        self.similarity += cosine.sum(0).cpu()
        self.level += u.mean((2, 3)).sum(0).cpu()                           # means over all pixels
        self.warped += bent.mean((3, 4)).sum(0).cpu()

    def ranked(self, tgt, sources):
        """All pairs (index of the source, index of the curve) for a target contrast, best first.

        The pair with most votes is best.  Votes were counted with all contrasts present, so the
        pairs of known sources may have no vote.  With equal votes, the larger similarity decides.
        """
        pairs = [(src, curve) for src in sources for curve in range(len(self.curves))]

        def likeness(pair):
            return float(self.votes[tgt][pair]), float(self.similarity[tgt][pair])
        return sorted(pairs, key=likeness, reverse=True)

    def gain(self, tgt, src, curve):
        """sigma of Sec. 3.3: mean intensity of the target over that of the bent source."""
        return float(self.level[tgt] / self.warped[src, curve].clamp(min=1e-6))


# ---- 5. Sampler ----------------------------------------------------------------------------------


def time_grid(M, S):
    """t_j = j M / S for j = 0..S, at most T - 1.  Stage 1 goes from t_S down to t_0 [D9]."""
    return [min(round(j * M / S), T - 1) for j in range(S + 1)]


def guided_x0(eps_model, x_t, t, alpha_bar, y, A, alpha):
    """Eq. (4): predict x0 from x_t, then take one gradient step towards the known contrasts.

    x_t, y: (B, C, H, W); A: (B, C, 1, 1); t: int.  Returns x0_hat, (B, C, H, W).
    The gradient is taken at x_t, through the U-Net and our clamp [D11], and subtracted from x0_hat,
    as printed.  Missing contrasts move too, because they change the estimate of the known ones.

    The paper prints a squared norm, but with the printed alpha that diverges.  As in the authors'
    release the norm is not squared; ours is one norm per sample [D3].  Steps with alpha_bar < 0.01
    are not guided: there 1 / sqrt(alpha_bar) makes the gradient explode.  M = 400 never gets there.
    """
    a = alpha_bar[t]
    guide = alpha > 0 and bool(a >= 0.01)                                   # [D3]
    with torch.set_grad_enabled(guide):
        x_t = x_t.detach().requires_grad_(guide)
        eps = eps_model(x_t, torch.full((len(x_t),), t, device=x_t.device))  # (B, C, H, W)
        x0 = x0_from_eps(x_t, a, eps).clamp(-1, 1)                          # (B, C, H, W)
        if not guide:
            return x0
        distance = torch.linalg.vector_norm((A * (x0 - y)).flatten(1), dim=1)  # (B,)
        gradient, = torch.autograd.grad(distance.sum(), x_t)                # (B, C, H, W)
    return x0.detach() - alpha * gradient


def stage1(eps_model, y, A, prior, noise, alpha_bar, grid, alpha):
    """Sec. 3.4, stage 1: from the prior at step M down to step 0, in len(grid) network evaluations.

    y: (B, C, H, W) known contrasts in [-1,1]; A: (B, C, 1, 1).  prior: (B, C, H, W) start images in
    [-1,1], or None: the missing contrasts start from pure noise.  noise(): fresh N(0,1) like y.
    Returns x0: (B, C, H, W).
    """
    eps = noise()
    start = y if prior is None else A * y + (1 - A) * prior                 # (B, C, H, W)
    x_t = q_sample(start, alpha_bar[grid[-1]], eps)                         # (B, C, H, W)  step M
    if prior is None:
        # Table 3 says no more than "noise".  We take pure noise at step M, although at M < 1000 the
        # network expects to find something of an image in the missing contrasts [D8].
        x_t = A * x_t + (1 - A) * eps                                       # (B, C, H, W)
    for j in reversed(range(len(grid))):                  # j = S, ..., 0; step 0 has a little noise
        x0 = guided_x0(eps_model, x_t, grid[j], alpha_bar, y, A, alpha)
        # The paper has Eq. (4) alone here.  As in the release, known contrasts are pasted [D4].
        # That undoes what guidance did to them.  What it did to the missing ones remains.
        x0 = A * y + (1 - A) * x0                                           # (B, C, H, W)
        if j > 0:
            x_t = q_sample(x0, alpha_bar[grid[j - 1]], noise())      # as in the release [D5]
    return x0


def stage2(eps_model, x0, y, A, noise, alpha_bar, grid, alpha, N, w, paste):
    """Sec. 3.4, stage 2, Eq. (5): N - 2 times noise of step t_2 and denoising; then t_1 and t_0.

    x0: result of stage 1, (B, C, H, W).  paste: impose the known contrasts here too [D4].
    N counts all network evaluations of this stage [D9].  With M = 400, S = 20, N = 50 there are 48
    at step 40 ("a step close to zero"), one at 20, one at 0.  All are guided, as released [D4].
    """
    for _ in range(N - 2):
        x_t = q_sample(x0, alpha_bar[grid[2]], noise())                     # (B, C, H, W)
        estimate = guided_x0(eps_model, x_t, grid[2], alpha_bar, y, A, alpha)  # (B, C, H, W)
        x0 = (1 - w) * x0 + w * estimate                                    # Eq. (5)
        if paste:
            x0 = A * y + (1 - A) * x0                                       # (B, C, H, W)
    for t in (grid[1], grid[0]):                                            # without Eq. (5) [D9]
        x_t = q_sample(x0, alpha_bar[t], noise())                           # (B, C, H, W)
        x0 = guided_x0(eps_model, x_t, t, alpha_bar, y, A, alpha)           # (B, C, H, W)
        if paste:
            x0 = A * y + (1 - A) * x0                                       # (B, C, H, W)
    return x0


def prior_images(cfg, codebook, u, known, generators):
    """The start images of missing contrasts, (B, C, H, W) in [0,1] as u; the known ones stay grey.

    known: (B, C) bool.  generators: one per slice; --prior random draws a contrast and a curve.
    """
    prior = torch.full_like(u, 0.5)             # mid-grey, 0 in [-1,1]; --prior zero keeps it [D8]
    if cfg.prior == "zero":
        return prior
    for b, row in enumerate(known.tolist()):
        sources = [c for c in range(len(row)) if row[c]]
        targets = [c for c in range(len(row)) if not row[c]]
        for tgt in targets:
            if cfg.prior == "adaptive":
                src, number = codebook.ranked(tgt, sources)[0]
            else:
                K = len(codebook.curves)
                g = generators[b]
                pick = int(torch.randint(len(sources) * K, (), generator=g, device=u.device))
                src = sources[pick // K]
                number = pick % K
            gain = codebook.gain(tgt, src, number)
            prior[b, tgt] = (gain * warp(u[b, src], codebook.curves[number])).clamp(0, 1)
    return prior


@dataclass
class Model:
    """Everything that sampling needs, trained and frozen."""
    cfg: Config
    run: object                                     # common.run.Run: device, precision, randomness
    contrasts: list
    encoder: nn.Module
    mif: nn.Module
    codebooks: dict                                 # {reading of the curves: Codebook}
    unet: nn.Module
    alpha_bar: torch.Tensor

    def eps_model(self, context, watch=None):
        """eps_theta(x_t, t) with its context (B, L, D).  watch: a list of (time, x_t, estimate)."""
        def eps_theta(x_t, t):
            with self.run.autocast():
                eps = self.unet(x_t, t, context).float()                    # (B, C, H, W)
            if watch is not None:
                x0 = x0_from_eps(x_t, self.alpha_bar[int(t[0])], eps).clamp(-1, 1)  # (B, C, H, W)
                watch.append((f"t = {int(t[0])}", x_t.detach(), x0.detach()))  # before Eq. (4)
            return eps
        return eps_theta

    def fill(self, u, known, keys, watch=None):
        """Fill in the missing contrasts, by both stages.  common/trained.py calls this.

        u: (B, C, H, W) in [0,1]; known: (B, C) bool.  keys: (subject, slice number) of each.  They
        fix the noise, so that a slice comes out the same in any batch.  watch: see eps_model.
        Returns (B, C, H, W) in [0,1], and {"prior alone": (B, C, H, W)} if there is a prior.
        """
        cfg = self.cfg
        _, noise = self.run.noise(keys, u)               # noise(): fresh N(0,1) like u
        generators = [self.run.generator("prior", *key) for key in keys]    # for --prior random
        A = known[:, :, None, None].float()                                 # (B, C, 1, 1)
        u = torch.where(A > 0, u, 0)                                        # (B, C, H, W)
        context = condition(cfg, self.mif, encode(self.encoder, u), known)  # (B, L, D)  once
        eps_model = self.eps_model(context, watch)
        extras = {}
        prior = None
        if cfg.prior != "noise":
            codebook = self.codebooks[cfg.curves]
            guess = prior_images(cfg, codebook, u, known, generators)       # (B, C, H, W)
            extras["prior alone"] = guess
            prior = 2 * guess - 1                                           # (B, C, H, W)
        y = 2 * u - 1                                                       # (B, C, H, W)
        grid = time_grid(cfg.M, cfg.S)
        # The gradient of a norm is a vector of about the same length for every image size.  If an
        # image has fewer pixels, each of them moves further.  So alpha shrinks with the image [D3].
        alpha = cfg.alpha * u.shape[-1] / 256
        x0 = stage1(eps_model, y, A, prior, noise, self.alpha_bar, grid, alpha)  # (B, C, H, W)
        if cfg.stage2:
            x0 = stage2(eps_model, x0, y, A, noise, self.alpha_bar, grid, alpha, cfg.N, cfg.w,
                        cfg.paste == "both")                                # (B, C, H, W)
        made = (x0.clamp(-1, 1) + 1) / 2                                    # (B, C, H, W)
        return torch.where(A > 0, u, made), extras


# ---- 6. Training ---------------------------------------------------------------------------------


def train(cfg, run, ds):
    """All stages.  A stage that is finished is not trained again.

    Stage "encoder" is a CLIP on pairs (slice, caption); its losses are in common/clip.py [D1].
    One of them, of weight 0.5, makes two contrasts of one slice find each other.  Without it the
    encoder would forget the anatomy, because captions tell little of it.
    """
    slices = ds.part("train")                                               # (n, C, H, W)
    encoder = train_encoder(run, ds, ds.captions, cfg.encoder, cfg.size, cfg.encoder_steps,
                            cfg.encoder_batch, cfg.encoder_lr)
    features = encode_slices(run, encoder, slices)                          # (n, C, D)  only once
    mif = train_mif(cfg, run, ds, features)
    make_codebooks(cfg, run, ds, slices, encoder)
    train_diffusion(cfg, run, ds, slices, encoder, mif, features)


def train_mif(cfg, run, ds, features):
    """Stage "mif": the fusion module, on features (n, C, D) of the frozen encoder, by Eq. (1).

    Every process of torchrun works on the whole batch.  Learning rate, betas, eps and weight decay
    are those of the release.  We use AdamW, and the decay acts on matrices only.
    """
    n, C, dim = features.shape
    torch.manual_seed(seed_of(run.seed, "mif"))
    mif = MutualInformationFusion(dim).to(run.device)
    matrices = [p for p in mif.parameters() if p.dim() > 1]
    others = [p for p in mif.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=cfg.mif_lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    ids = np.unique(ds.subject[ds.rows("train")], return_inverse=True)[1]   # (n,)
    subject = torch.from_numpy(ids).to(run.device)
    batch = min(cfg.mif_batch, n)
    all_known = torch.ones(batch, C, dtype=torch.bool, device=run.device)   # (B, C)
    steps = math.ceil(n * cfg.mif_epochs / batch)
    # run.steps goes on where a checkpoint ended, shows progress, and saves.
    for step in run.steps("mif", steps, {"mif": mif, "optimiser": optimiser}, batch):
        pick = torch.from_numpy(run.order("mif", n, batch, step)).to(run.device)  # (B,)
        g = np.random.default_rng(seed_of(run.seed, "mif drop", step))
        drop = g.integers(C)                                               # the same for all slices
        subset = all_known.clone()                                          # (B, C)
        subset[:, drop] = False
        z_all = mif(features[pick], all_known)                              # (B, D)
        z_sub = mif(features[pick], subset)                                 # (B, D)
        loss = anatomy_loss(z_all, z_sub, mif.log_scale, subject[pick])
        # run.update is zero_grad, backward, clipping of the gradient at norm 1, and optimiser.step.
        run.update(loss, optimiser)
        with torch.no_grad():
            mif.log_scale.clamp_(max=math.log(100))       # beyond it there is no gradient
        nearest = (z_sub @ z_all.T).argmax(1)                               # (B,)
        found = nearest == torch.arange(batch, device=run.device)           # (B,)
        run.log(loss=loss, retrieval=found.float().mean())
    return mif.eval().requires_grad_(False)


def make_codebooks(cfg, run, ds, slices, encoder):
    """Stage "codebook": one codebook for each reading of the curves [D6]; it is counting only."""
    codebooks = {name: Codebook(len(ds.contrasts), name) for name in CURVES}
    chosen = data.evenly(np.arange(len(slices)), 2000)               # spread over the subjects [D7]
    parts = np.array_split(chosen, math.ceil(len(chosen) / 16))
    for step in run.steps("codebook", len(parts), codebooks, 16):
        for codebook in codebooks.values():
            codebook.add(encoder, run.fetch(slices, parts[step]))
    if run.rank == 0:
        u = torch.from_numpy(slices[len(slices) // 2].astype(np.float32))   # (C, H, W)
        draw_codebook(run.out / "codebook.png", codebooks[cfg.curves], ds.contrasts, u)


def train_diffusion(cfg, run, ds, slices, encoder, mif, features):
    """Stage "diffusion", Eq. (2).  The averaged weights of lowest validation loss stay [D11]."""
    torch.manual_seed(seed_of(run.seed, "diffusion"))
    unet = make_unet(cfg, len(ds.contrasts), features.shape[2])
    unet = unet.to(run.device, memory_format=torch.channels_last)
    ema = EMA(unet, cfg.ema)
    best = Best(unet)
    optimiser = torch.optim.Adam(unet.parameters(), lr=cfg.lr, fused=True)
    network = torch.compile(unet) if run.args.compile else unet             # the same weights
    alpha_bar = SCHEDULES[cfg.schedule](T).to(run.device)                   # (T,)
    context = []                                                        # z is frozen: computed once
    for f in features.split(4096):
        all_known = torch.ones(f.shape[:2], dtype=torch.bool, device=run.device)  # (n', C)
        context.append(condition(cfg, mif, f, all_known))
    context = torch.cat(context)                                            # (n, L, D)
    validate = validation(cfg, run, ds, encoder, mif, alpha_bar)
    mine = run.shard(cfg.batch)                                    # this process's share of a batch
    parts = {"unet": unet, "ema": ema, "best": best, "optimiser": optimiser}
    for step in run.steps("diffusion", cfg.steps, parts, cfg.batch):
        pick = run.order("diffusion", len(slices), cfg.batch, step)[mine]   # (B,)
        x0 = 2 * run.fetch(slices, pick) - 1                                # (B, C, H, W)
        # Random numbers are drawn for the whole batch.  Each process takes its share.
        g = run.generator("diffusion", step)
        t = torch.randint(T, (cfg.batch,), generator=g, device=run.device)[mine]  # (B,)
        eps = torch.randn(cfg.batch, *x0.shape[1:], generator=g, device=run.device)[mine]
        z = context[torch.from_numpy(pick).to(run.device)]                  # (B, L, D)
        def loss_of(part):                              # part: a range of the batch (--micro-batch)
            with run.autocast():
                return diffusion_loss(network, x0[part], t[part], eps[part], z[part], alpha_bar)
        loss = run.update(loss_of, optimiser, samples=len(x0))
        ema.update(unet, step)
        run.log(loss=loss)
        if validate and (step + 1) % max(1, cfg.steps // 10) == 0:
            value = validate(ema.model)
            run.log(validation=value)
            best.offer(ema.model, value)


def validation(cfg, run, ds, encoder, mif, alpha_bar):
    """A function unet -> Eq. (2) on up to 32 validation slices, with fixed times and noise."""
    rows = ds.rows("val", 32)
    if len(rows) == 0:
        run.say("no validation subjects: the last averaged weights are kept")
        return None
    u = run.fetch(ds.images, rows)                                          # (V, C, H, W)
    all_known = torch.ones(u.shape[:2], dtype=torch.bool, device=run.device)  # (V, C)
    context = condition(cfg, mif, encode(encoder, u), all_known)            # (V, L, D)
    t = torch.linspace(0, T - 1, len(u), device=run.device).long()          # (V,)  all noise levels
    eps = torch.randn(u.shape, generator=run.generator("validation"), device=run.device)

    @torch.no_grad()
    def validate(unet):
        with run.autocast():
            return float(diffusion_loss(unet, 2 * u - 1, t, eps, context, alpha_bar))
    return validate


def load_model(cfg, run, subjects):
    """The trained networks of a run folder, from its checkpoint alone."""
    contrasts = run.about["contrasts"]
    C = len(contrasts)
    dim = clip.SIZES[cfg.encoder]["embed"]
    mif = run.trained(MutualInformationFusion(dim), "mif", "mif")
    codebooks = {name: run.trained(Codebook(C, name), "codebook", name).cpu() for name in CURVES}
    # The best weights, or without validation subjects the last averaged ones.
    unet = run.trained(make_unet(cfg, C, dim), "diffusion", "best", "ema")
    unet = torch.compile(unet) if run.args.compile else unet
    alpha_bar = SCHEDULES[cfg.schedule](T).to(run.device)
    return Model(cfg, run, contrasts, load_encoder(run), mif, codebooks, unet, alpha_bar)


# ---- 7. Figures and tables -----------------------------------------------------------------------
# The rows of the paper's tables are data: data/paper_tables/apt.json.


def draw_codebook(path, codebook, contrasts, u):
    """codebook.png: the two best entries of every contrast, at work on a slice u (C, H, W)."""
    H, W = u.shape[1:]
    images = []
    labels = []
    for tgt in range(len(contrasts)):
        others = [c for c in range(len(contrasts)) if c != tgt]
        for src, number in codebook.ranked(tgt, others)[:2]:
            points = codebook.curves[number]
            curve = warp(torch.linspace(0, 1, W), points)                   # (W,)
            above = torch.linspace(1, 0, H)[:, None] > curve                # (H, W)
            gain = codebook.gain(tgt, src, number)
            prior = (gain * warp(u[src], points)).clamp(0, 1)               # (H, W)
            images.append([u[src], (1 + above) / 2, prior, u[tgt]])         # grey below the curve
            votes = f"{codebook.votes[tgt, src, number]:.0f} of {codebook.votes[tgt].sum():.0f}"
            labels.append(f"{contrasts[tgt]} from {contrasts[src]}: {votes} votes, gain {gain:.2f}")
    pictures.grid(path, images, ["source", "curve", "prior", "truth"], labels,
                  note="prior = gain x curve(source), on a training slice; each such slice gave "
                       "its vote to the pair most like the truth; curve: output over input, 0 to 1")


def figure6(cfg, run, ds, model):
    """Fig. 6: slices from noise with z alone.  Nothing is known; no prior, guidance or stage 2.

    M = 1000, S = 50 (ours).  The noise is the same in every row: rows differ by z only.
    """
    rows = ds.spread("test", 1)[:6]
    u = run.fetch(ds.images, rows)                                          # (B, C, H, W)
    all_known = torch.ones(u.shape[:2], dtype=torch.bool, device=run.device)  # (B, C)
    context = condition(cfg, model.mif, encode(model.encoder, u), all_known)  # (B, L, D)
    g = run.generator("figure 6")
    nothing = torch.zeros(len(u), 1, 1, 1, device=run.device)               # A

    def noise():
        return torch.randn(1, *u.shape[1:], generator=g, device=u.device).expand_as(u)

    x0 = stage1(model.eps_model(context), u * 0, nothing, None, noise, model.alpha_bar,
                time_grid(T, 50), alpha=0)                                  # (B, C, H, W)
    truth = u.cpu().numpy()
    made = ((x0 + 1) / 2).cpu().numpy()
    table = np.array([[metrics.psnr(a, b, 1).mean() for b in made] for a in truth])  # truth, made
    own = np.diag(table).mean()
    other = table[~np.eye(len(table), dtype=bool)].mean() if len(table) > 1 else float("nan")
    titles = [*ds.contrasts, *(f"{c} from z" for c in ds.contrasts)]
    pictures.grid(run.out / "fig6.png", [[*a, *b] for a, b in zip(truth, made)], titles,
                  list(ds.subject[rows]), note="left: the slices that z was taken from")
    run.say(f"from z alone: {own:.2f} dB to the slice that z was taken from, {other:.2f} dB to "
            f"those of other subjects; written: {run.out / 'fig6.png'}")


def outline(cfg, ds):
    """For a dry run: the networks, and one slice through the U-Net."""
    dim = clip.SIZES[cfg.encoder]["embed"]
    z = torch.zeros(1, len(ds.contrasts) if cfg.context == "tokens" else 1, dim)
    x_t = torch.zeros(1, len(ds.contrasts), cfg.size, cfg.size)
    unet = make_unet(cfg, len(ds.contrasts), dim)
    lines = [f"x_t {tuple(x_t.shape)}, t (1,), z {tuple(z.shape)} -> eps {tuple(x_t.shape)}"]
    networks = {"U-Net": unet, "fusion module": MutualInformationFusion(dim)}
    return Outline(networks, lambda: unet(x_t, torch.zeros(1), z), slices=cfg.batch * cfg.steps,
                   lines=lines, before=encoder_at_work(cfg), guided=True)


# ---- 8. Main -------------------------------------------------------------------------------------

METHOD = script.Method(
    "APT", Config, PRESETS, LIMITS, SAMPLING, STAGES, contrasts=lambda cfg: cfg.contrasts or None,
    patterns=lambda cfg, contrasts: missing_patterns(cfg.missing, contrasts), train=train,
    load=load_model, outline=outline, extensible=("steps",), micro_batches=True,
    figures={"fig6": ("what z alone knows of the anatomy (a picture)", figure6)})

# From Python: apt.load("runs/apt-brats") is a common.trained.Trained, with .fill(images, known).
load, main = script.entrances(METHOD, __doc__)

if __name__ == "__main__":
    script.guarded(main)
