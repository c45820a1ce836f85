"""APT: missing MR contrasts from the ones at hand, anatomically consistent.

Shin et al., "Anatomical Consistency and Adaptive Prior-informed Transformation for Multi-contrast MR Image Synthesis via
Diffusion Model", CVPR 2025.

THE IDEA.  One diffusion model learns all C contrasts of a slice *jointly*; no channel is special.  Missing contrasts are
then filled in like holes in a picture, except that the holes are whole channels.  Three things make that work well:
  1. an anatomy vector z, trained to be the same with one contrast left out, steers the attention layers of the U-Net;
  2. sampling does not start from noise but from a guess: another contrast, passed through an intensity curve.  A *codebook*,
     computed once from the training data, says which contrast and which curve resemble the missing one most (stage 1);
  3. the result is refined by many small noise-and-denoise rounds, each averaged with what came before (stage 2).

PIPELINE (B slices, C contrasts, H x W pixels, D feature width, K = 4 curves, L = 1 context token; -> "stage" of training)
  x (B,C,H,W) --image encoder, frozen--> (B,C,D) --MIF--> z (B,L,D)           "encoder", "mif"
  training slices --encoder--> cosine of contrast c and curve k of contrast c' --> codebook (C,C,K)   "codebook"
  x_t (B,C,H,W), t, z --U-Net--> noise estimate (B,C,H,W)                     "diffusion"
  y (known) --codebook--> prior --noise to M--> S+1 guided evaluations (stage 1) --> N more (stage 2) --> missing contrasts

EQUATIONS (1) to (5); where they are read or changed: [D2], [D3], [D6]
  Eq. (1)  L_anatomy   = -log exp(z_all.z_sub/tau) / (exp(z_all.z_sub/tau) + sum_i exp(z_all.z_sub_i/tau)),  i: others
  Eq. (2)  L_diffusion = E || eps - eps_theta(x_t, t, z_all) ||^2
  Eq. (3)  B(r)        = sum_i binom(3,i) P_i (1-r)^(3-i) r^i,  r in [0,1]
  Eq. (4)  x0_hat     <- x0_hat - alpha * grad_{x_t} || A(x0_hat) - y ||
  Eq. (5)  x0_hat     <- (1 - w) * previous x0_hat + w * x0_hat

SYMBOLS   x0, x_t, eps, alpha_bar: diffusion.  y: known contrasts; known: (B,C,1,1) 1 where known (the operator A).
  M start step, S intervals of stage 1, N evaluations of stage 2, alpha step of Eq. (4), w weight of Eq. (5).
  u: an image in [0,1] as stored; x = 2u - 1.  sigma, the intensity gain of the codebook, is called gain.

COMMANDS
  python apt.py --data data/brats --train --evaluate            a phantom is made on first use; CPU, minutes
  python apt.py --data FOLDER --check                           what is in there, and what is wrong with it
  python apt.py --data FOLDER --train --evaluate                your own scans, the paper's sizes
  python apt.py --data FOLDER --synthesize --missing flair --out runs/apt-FOLDER        NIfTI volumes
  python apt.py --data data/brats --evaluate --no-stage2 --prior noise      a row of Table 3, without training again
  python apt.py --data data/brats --reproduce table3                        all its rows, beside the paper's; or list

DEPARTURES FROM THE PAPER
  [D1]  The frozen BiomedCLIP encoder is replaced by a small CLIP trained on the training subjects (common/clip.py), with an
        extra term that makes two contrasts of a slice find each other: captions alone would let it forget anatomy.  It gives
        one pooled vector per contrast (as released); the "feature maps" of the text are these.
  [D2]  Eq. (1) is used in both directions, z_all -> z_sub and back, as in CLIP; slices of one subject are no negatives;
        z is a unit vector behind a linear layer, and 1/tau is capped at 100.  As in the paper, the U-Net is trained with z
        of all contrasts, and samples with z of those at hand.
  [D3]  Eq. (4) prints a squared norm; with the printed alpha that diverges.  As in the authors' release the norm is not
        squared.  Ours is one norm per sample; alpha is scaled with the image size, because a step of fixed length moves
        each of fewer pixels further; steps with alpha_bar < 0.01 (never reached from M = 400) go unguided; x0_hat is
        clamped to [-1, 1] before the step.  Stage 2 is guided as well (as released).
  [D4]  Known contrasts are pasted into x0_hat in stage 1 (as released; the paper has Eq. (4) alone).  --paste both does so
        in stage 2 as well.
  [D5]  The next, less noisy x is sqrt(alpha_bar) x0_hat + sqrt(1 - alpha_bar) * fresh noise (as released), not a draw from
        DDPM's posterior.
  [D6]  The four settings of Eq. (3) print one number per point.  They are the x-coordinates of control points that the
        Bezier augmentation of Zhou et al. (Dual-Normalization, 2022) uses, our default; --curves scalar reads them as y.
  [D7]  The codebook is one table for the data set, from at most 2,000 training slices, not a retrieval per test image.  It
        compares contrasts of one slice, by the cosine of their features (the "attention map"); the gain is the ratio of
        mean intensities over these slices.  Decreasing curves act on the foreground only.
  [D8]  The "zero" prior is mid-grey (0 in the model's range), noised to M like any other; "noise" is pure noise at step M.
  [D9]  S counts intervals: stage 1 takes S + 1 evaluations, the last at step 0.  N counts all evaluations of stage 2: N - 2
        averaged ones at the second step of the grid (2 M / S: Table 4's 40 for M = 400, and 20 for ADNI's M = 200), then two
        descending ones.
  [D10] Slices are centre-padded to the image size (the paper resizes); only larger ones are resampled.
  [D11] Where the paper is silent: intensities are normalised per volume, background to 0 and 99.5th percentile to 1;
        averaged weights (EMA) sample, those with the lowest validation loss; gradients are clipped at norm 1; the fusion
        module is trained by AdamW with weight decay 0.2.

NEEDS  common/{unet,schedules,clip,run,results,cli,metrics,pictures}.py  data/
"""
import functools
import math
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import data
from common import clip, metrics, pictures
from common.cli import parse
from common.results import Task, list_tables, report, reproduce, synthesize
from common.run import EMA, Best, Run, RunError, guarded, restore, seed_of, stored_config
from common.schedules import cosine_alpha_bar, linear_alpha_bar, q_sample, x0_from_eps
from common.unet import SpatialTransformer, UNet, attention_at
from data.files import DataError
from data.prompts import caption

# ---- 1. Config -------------------------------------------------------------------------------------------------------

T = 1000                                        # diffusion steps in training (Sec. 4.1)


@dataclass(frozen=True)
class Config:
    """Defaults are the paper's (Sec. 4.1, BraTS) wherever it states them; phantoms take PRESETS["demo"] instead."""
    # data
    contrasts: tuple[str, ...] = ()             # contrasts to use, in this order; empty: all there are
    size: int = 256                             # height and width of a slice in pixels
    train_fraction: float = 0.8                 # share of the subjects that train
    test_subjects: int = 50                     # subjects that are scored; the remaining ones validate
    test_slices: int = 4                        # slices scored per test subject, spread over the brain
    # networks
    encoder: Literal["base", "demo", "pixels"] = "base"   # image encoder: size of the CLIP, or none: the pixels (ours)
    base: int = 128                             # U-Net channels at full resolution
    mult: tuple[int, ...] = (1, 1, 2, 2, 4, 4)  # channel multipliers, one per resolution
    blocks: int = 2                             # residual blocks per resolution
    attention: tuple[int, ...] = (32, 16, 8)    # map sizes that get a transformer
    head_dim: int = 64                          # width of an attention head
    groups: int = 32                            # of every GroupNorm
    # training
    encoder_steps: int = 20_000                 # of the encoder
    encoder_batch: int = 64                     # slices per step of the encoder
    encoder_lr: float = 5e-4                    # peak learning rate of the encoder
    mif_epochs: int = 500                       # passes over the training slices for the fusion module
    mif_batch: int = 512                        # slices per step of the fusion module
    mif_lr: float = 5e-5                        # learning rate of the fusion module
    steps: int = 250_000                        # of the diffusion model
    batch: int = 16                             # slices per step of the diffusion model, over all processes
    lr: float = 1e-4                            # learning rate of the diffusion model (Adam)
    ema: float = 0.9999                         # decay of the averaged weights that sample
    # method, in training
    schedule: Literal["cosine", "linear"] = "cosine"              # noise (text: cosine; released scripts: linear)
    context: Literal["pooled", "scaled", "tokens"] = "pooled"     # U-Net sees z, z of variance 1, a token per contrast (ours)
    mif: Literal["trained", "mean", "zero"] = "trained"           # z: fusion module, mean feature, or nothing
    # method, in sampling
    missing: tuple[str, ...] = ("each",)        # contrasts to synthesise; each: one at a time; all: every pattern
    prior: Literal["adaptive", "random", "noise", "zero"] = "adaptive"    # start image (Table 3, with --no-stage2)
    curves: Literal["points", "scalar", "identity"] = "points"    # reading of Eq. (3) [D6]; identity: it and its inversion
    M: int = 400                                # start step of stage 1, out of 1000 (Table 5, with --no-stage2)
    S: int = 20                                 # intervals of stage 1, which takes S + 1 network evaluations
    N: int = 50                                 # network evaluations of stage 2 (Table 4) [D9]
    alpha: float = 20.0                         # step of Eq. (4) at 256 x 256; scaled with the image size
    w: float = 0.5                              # weight of Eq. (5)
    stage2: bool = True                         # iterative unrolling
    paste: Literal["stage1", "both"] = "stage1" # stages that impose the known contrasts [D4]
    sample_batch: int = 24                      # slices sampled at once; changes the result by rounding only

    def __post_init__(self):
        maps = [self.size // 2 ** level for level in range(len(self.mult))]
        if self.size % 2 ** (len(maps) - 1):
            raise ValueError(f"--size {self.size}: must be a multiple of {2 ** (len(maps) - 1)}, for {len(maps)} --mult")
        if not set(maps) & set(self.attention):
            raise ValueError(f"--attention {self.attention}: no map has that size, they have {maps}; z would hardly be seen")
        for m in self.mult:
            if self.base * m % self.groups or self.base * m % self.head_dim:
                raise ValueError(f"--base {self.base} times --mult {m} must be divisible by --groups {self.groups} "
                                 f"and by --head-dim {self.head_dim}")
        if self.context == "tokens" and self.mif != "trained":
            raise ValueError("--context tokens needs --mif trained: the tokens are the fusion module's")
        if self.M < self.S:
            raise ValueError(f"--S {self.S} must not exceed --M {self.M}: there is no half step")


# Fields that may change without training again; all others make another run.
SAMPLING = ("missing", "prior", "curves", "M", "S", "N", "alpha", "w", "stage2", "paste", "sample_batch", "test_slices")
PRESETS = {
    "paper": {},
    "demo": dict(size=64, train_fraction=2 / 3, test_subjects=6, encoder="demo", base=24, mult=(1, 1, 2, 4), blocks=1,
                 attention=(16, 8), head_dim=24, groups=8, encoder_steps=150, encoder_batch=24, encoder_lr=1e-3,
                 mif_epochs=100, mif_batch=64, mif_lr=5e-4, steps=500, batch=8, lr=5e-4, ema=0.99, N=10,
                 test_slices=3),
}
LIMITS = dict(size=(16, 1024), train_fraction=(0.01, 0.99), mult=(1, 16), groups=(1, 64), encoder_steps=(0, 10 ** 9),
              encoder_batch=(2, 65536), mif_epochs=(0, 10 ** 9), mif_batch=(2, 65536), ema=(0, 0.99999), M=(1, T), S=(2, T),
              N=(3, 10_000), alpha=(0, 1e4), w=(0, 1))
# The stages of training, each with the fields that matter to it and to later stages only; any other field changes them all.
STAGES = {"encoder": (), "mif": ("mif_epochs", "mif_batch", "mif_lr"), "codebook": (),
          "diffusion": ("base", "mult", "blocks", "attention", "head_dim", "groups", "steps", "batch", "lr", "ema", "schedule",
                        "context", "mif")}

# ---- 2. Data ---------------------------------------------------------------------------------------------------------


def open_data(cfg, args, run):
    """The data set as slices: .images (n, C, size, size) float16 in [0,1], memory-mapped; the split is by person."""
    contrasts = tuple(run.about.get("contrasts", cfg.contrasts)) or None                # a trained model's own, in its order
    ds = run.first(lambda: data.open_dataset(
        args.data, contrasts, cfg.size, args.split, train_fraction=cfg.train_fraction, test_subjects=cfg.test_subjects,
        cache=args.cache, workers=args.workers, say=run.say))
    if len(ds.contrasts) < 2:
        raise RunError(f"{args.data} gives one contrast, {ds.contrasts[0]}; APT needs two or more, see --contrasts", status=2)
    return ds


def captions(ds, rows):
    """What the encoder's text tower reads: for each slice, one sentence per contrast."""
    return [[caption(c, ds.position[r], ds.brain[r], ds.lesion[r]) for c in ds.contrasts] for r in rows]


def patterns(contrasts, missing):
    """The tasks, as tuples of the contrasts (names) that are missing.  "each": one at a time; "all": every one."""
    if missing == ("each",):
        return [(c,) for c in contrasts]
    if missing == ("all",):
        return [m for n in range(1, len(contrasts)) for m in combinations(contrasts, n)]
    unknown = [c for c in missing if c not in contrasts]
    if unknown or not missing or len(set(missing)) >= len(contrasts):
        raise RunError(f"--missing {','.join(missing)}: name some, but not all, of {', '.join(contrasts)}; or each; or all",
                       status=2)
    return [tuple(c for c in contrasts if c in missing)]


# ---- 3. Model --------------------------------------------------------------------------------------------------------


class MutualInformationFusion(nn.Module):
    """Sec. 3.1, Fig. 1a: one transformer block over the contrasts of a slice, then one unit vector.

    Any subset of contrasts works, in any order: there is no position code.
    """

    def __init__(self, dim):
        super().__init__()
        self.heads = max(4, dim // 64)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.out = nn.Linear(dim, dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))         # log(1/tau) of Eq. (1)

    def tokens(self, f, present):
        """f: (B, C, D) one feature per contrast; present: (B, C) True where the contrast is there.  Returns (B, C, D)."""
        q, k, v = (m(f).unflatten(2, (self.heads, -1)).transpose(1, 2)          # (B, heads, C, D/heads) each
                   for m in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=present[:, None, None, :])    # (B, heads, C, D/heads)
        h = self.norm1(f + self.o(a.transpose(1, 2).flatten(2)))                # (B, C, D)
        return self.norm2(h + self.ff(h))                                       # (B, C, D)

    def forward(self, f, present):
        """Returns z: (B, D), length 1; what is absent has no influence."""
        here = present.unsqueeze(2)                                             # (B, C, 1)
        mean = (self.tokens(f, present) * here).sum(1) / here.sum(1)            # (B, D)
        return F.normalize(self.out(mean), dim=1)                               # (B, D)


class Pixels(nn.Module):
    """--encoder pixels: in place of a network, the picture itself in coarse squares, less its mean."""

    def encode_image(self, image):
        """(B, 1, H, W) -> .pooled: (B, 256)"""
        coarse = F.adaptive_avg_pool2d(image, 16).flatten(1)                    # (B, 256)
        return clip.Features(None, None, coarse - coarse.mean(1, keepdim=True)) # (B, 256)


def feature_width(cfg):
    """D, the width of the encoder's features."""
    return 256 if cfg.encoder == "pixels" else clip.SIZES[cfg.encoder]["embed"]


def make_unet(cfg, channels, dim):
    """Sec. 3.2: C noisy contrasts in, C noise estimates out; transformers attend to the context, (B, L, dim).

    With L = 1, softmax over a single token is 1: z then adds the same vector at every position of a map, as a bias would.
    """
    def transformer(site):
        return SpatialTransformer(site.channels, cfg.head_dim, dim, cfg.groups)
    return UNet(channels, channels, cfg.base, cfg.mult, cfg.blocks, cfg.size, cfg.groups,
                attention_at(cfg.attention, transformer))


@torch.no_grad()
def encode(encoder, u):
    """One feature per contrast from the frozen image encoder.  u: (B, C, H, W) in [0,1].  Returns (B, C, D)."""
    B, C = u.shape[:2]
    return encoder.encode_image(u.flatten(0, 1).unsqueeze(1)).pooled.float().unflatten(0, (B, C))    # (B, C, D)


@torch.no_grad()
def condition(cfg, mif, f, present):
    """What the U-Net attends to.  f: (B, C, D), present: (B, C).  Returns (B, 1, D), or (B, C, D) with --context tokens."""
    here = present.unsqueeze(2)                                                 # (B, C, 1)
    if cfg.mif == "zero":
        return torch.zeros_like(f[:, :1])                                       # (B, 1, D)
    if cfg.mif == "mean":
        return F.normalize((f * here).sum(1, keepdim=True), dim=2)              # (B, 1, D)
    z = mif(f, present).unsqueeze(1)                                            # (B, 1, D)
    if cfg.context == "pooled":
        return z
    if cfg.context == "scaled":
        return f.shape[2] ** 0.5 * z                                            # (B, 1, D)
    return torch.where(here, F.normalize(mif.out(mif.tokens(f, present)), dim=2), z)    # (B, C, D)  absent (sampling only): z


# ---- 4. Maths and losses ---------------------------------------------------------------------------------------------


def anatomy_loss(z_all, z_sub, log_scale, subject):
    """Eq. (1), in both directions [D2]: z_all must find the z_sub of its own slice among those of other subjects, and back.

    z_all, z_sub: (B, D) unit vectors.  log_scale: log(1/tau).  subject: (B,) ids; slices of one subject are no negatives.
    """
    logits = log_scale.clamp(max=math.log(100)).exp() * z_all @ z_sub.T         # (B, B)
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)        # (B, B)
    same = (subject[:, None] == subject[None, :]) & ~own                        # (B, B)
    logits = logits.masked_fill(same, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def schedule(cfg):
    """alpha_bar of every step, (T,)."""
    return cosine_alpha_bar(T) if cfg.schedule == "cosine" else linear_alpha_bar(T)


def diffusion_loss(unet, x0, t, eps, context, alpha_bar):
    """Eq. (2), as a mean over pixels.  x0, eps: (B, C, H, W); t: (B,), one for all contrasts; context: (B, L, D)."""
    x_t = q_sample(x0, alpha_bar[t][:, None, None, None], eps)                  # (B, C, H, W)
    return F.mse_loss(unet(x_t, t, context).float(), eps)


def bezier(P, r):
    """Eq. (3): cubic Bezier polynomial with the four numbers P at r (any shape, in [0,1])."""
    return sum(math.comb(3, i) * P[i] * (1 - r) ** (3 - i) * r ** i for i in range(4))


# Two increasing and two decreasing curves (Sec. 4.1), each as the x and the y of its control points.  The paper prints one
# number per point: P1 = (-1, -1, 1, 1) and P2 = (-1, -.5, .5, 1), and both reversed [D6].  Equal x and y give the identity,
# y reversed its inversion; the second of "points" is flatter in the middle.
STRAIGHT, P1, P2 = (-1, -1 / 3, 1 / 3, 1), (-1, -1, 1, 1), (-1, -0.5, 0.5, 1)
CURVES = {
    "points": [(P1, P1), (P2, (-1, 0.5, -0.5, 1)), (P1, P1[::-1]), (P2, (1, -0.5, 0.5, -1))],
    "scalar": [(STRAIGHT, P1), (STRAIGHT, P2), (STRAIGHT, P1[::-1]), (STRAIGHT, P2[::-1])],
    "identity": [(STRAIGHT, STRAIGHT), (STRAIGHT, STRAIGHT[::-1])],
}
FOREGROUND = 0.04                               # of the intensity range, as released


@functools.cache
def curve_table(points, n=4097):
    """The curve through `points` = (x controls, y controls) as y at n equidistant x in [-1,1]."""
    r = np.linspace(0, 1, 20_001)
    return torch.from_numpy(np.interp(np.linspace(-1, 1, n), bezier(points[0], r), bezier(points[1], r))).float()


def warp(u, points):
    """Phi(B, x): an image through an intensity curve.  u in [0,1], any shape; returns the same.

    Decreasing curves, which would turn the background bright, act on the foreground only.
    """
    table = (curve_table(points).to(u.device) + 1) / 2
    position = u.clamp(0, 1) * (len(table) - 1)
    low = position.floor().long().clamp(max=len(table) - 2)
    out = torch.lerp(table[low], table[low + 1], position - low)
    return out if points[1][0] < points[1][3] else out * (u > FOREGROUND)


class Codebook:
    """Sec. 3.3: for every target contrast, which curve of which other contrast looks most like it, and with which gain.

    votes, similarity   (C, C, K): [target, source, curve]; slices in which this pair won, and summed cosine similarity
    level, warped       (C,) and (C, K): summed mean intensity of each contrast, and of each contrast behind each curve
    """

    def __init__(self, C, curves):
        self.curves, K = CURVES[curves], len(CURVES[curves])
        self.votes, self.similarity = torch.zeros(C, C, K), torch.zeros(C, C, K)
        self.level, self.warped = torch.zeros(C), torch.zeros(C, K)

    def state_dict(self):
        return {k: v for k, v in vars(self).items() if torch.is_tensor(v)}

    def load_state_dict(self, state):
        if set(state) != set(self.state_dict()):
            raise KeyError("not a codebook")
        vars(self).update(state)

    def add(self, encoder, u):
        """Count a batch of training slices.  u: (B, C, H, W) in [0,1], all contrasts present."""
        C = u.shape[1]
        bent = torch.stack([warp(u, points) for points in self.curves], dim=2)          # (B, C, K, H, W)
        plain = F.normalize(encode(encoder, u), dim=2)                                  # (B, C, D)
        other = F.normalize(encode(encoder, bent.flatten(1, 2)), dim=2)                 # (B, C*K, D)
        s = torch.einsum("btd,bskd->btsk", plain, other.unflatten(1, (C, -1)))          # (B, C, C, K)  cosine
        itself = torch.eye(C, dtype=torch.bool, device=s.device)[None, :, :, None]
        s = s.masked_fill(itself, -1)                                                   # (B, C, C, K)
        best = F.one_hot(s.flatten(2).argmax(2), C * len(self.curves)).sum(0)           # (C, C*K)
        self.votes += best.view(self.votes.shape).cpu()
        self.similarity += s.sum(0).cpu()
        self.level += u.mean((2, 3)).sum(0).cpu()                                       # means over all pixels
        self.warped += bent.mean((3, 4)).sum(0).cpu()

    def look_up(self, target, available):
        """(source, curve, gain) for a missing contrast, from the available ones (all are contrast numbers).

        Most votes win (each slice voted with all contrasts at hand); where votes tie, as when nobody voted for anything
        available, the larger similarity does.
        """
        source, curve = max(((s, k) for s in available for k in range(len(self.curves))),
                            key=lambda at: (float(self.votes[target][at]), float(self.similarity[target][at])))
        return source, curve, self.gain(target, source, curve)

    def gain(self, target, source, curve):
        """sigma of Sec. 3.3: mean intensity of the target contrast over that of the bent source, on the training set."""
        return float(self.level[target] / self.warped[source, curve].clamp(min=1e-6))

    def readable(self, contrasts):
        """The whole table for people: {target: [{source, curve, votes, gain}, ...]}, in the order of look_up."""
        C, K = self.warped.shape
        table = {}
        for t in range(C):
            order = sorted(((s, k) for s in range(C) if s != t for k in range(K)),
                           key=lambda at: (float(self.votes[t][at]), float(self.similarity[t][at])), reverse=True)
            table[contrasts[t]] = [{"source": contrasts[s], "curve": k, "votes": int(self.votes[t, s, k]),
                                    "gain": round(self.gain(t, s, k), 4)} for s, k in order]
        return table


# ---- 5. Sampler ------------------------------------------------------------------------------------------------------


def time_grid(M, S):
    """t_j = j M / S for j = 0..S.  Stage 1 walks it down from t_S = M; stage 2 sits at t_2 ("a step close to zero")."""
    return [min(round(j * M / S), T - 1) for j in range(S + 1)]


def guided_x0(eps_model, x_t, t, alpha_bar, y, known, alpha):
    """Eq. (4): predict x0 from x_t, then take one gradient step towards agreement with the known contrasts [D3].

    x_t, y: (B, C, H, W); known: (B, C, 1, 1), the operator A; t: int.  The gradient is taken at x_t, through the U-Net and
    the clamp, and subtracted from x0, as printed.  Missing contrasts move too: they influence the estimate of known ones.
    """
    a = alpha_bar[t]
    guide = alpha > 0 and bool(a >= 0.01)           # below, 1/sqrt(alpha_bar) blows the gradient up [D3]
    with torch.set_grad_enabled(guide):
        x_t = x_t.detach().requires_grad_(guide)
        eps = eps_model(x_t, torch.full((len(x_t),), t, device=x_t.device))             # (B, C, H, W)
        x0 = x0_from_eps(x_t, a, eps).clamp(-1, 1)                                      # (B, C, H, W)
        if not guide:
            return x0
        distance = torch.linalg.vector_norm((known * (x0 - y)).flatten(1), dim=1)       # (B,)
        gradient, = torch.autograd.grad(distance.sum(), x_t)                            # (B, C, H, W)
    return x0.detach() - alpha * gradient


def make_eps_model(run, model, context, watch=None):
    """eps_theta of the sampler: the U-Net with its context, (B, L, D), fixed.  watch: a list that gets each (t, x_t, x0)."""
    def eps_model(x_t, t):
        with run.autocast():
            eps = model.unet(x_t, t, context).float()                                   # (B, C, H, W)
        if watch is not None:
            x0 = x0_from_eps(x_t, model.alpha_bar[int(t[0])], eps).clamp(-1, 1)         # (B, C, H, W)  before Eq. (4)
            watch.append((int(t[0]), x_t.detach().cpu(), x0.detach().cpu()))
        return eps
    return eps_model


def stage1(eps_model, y, known, prior, noise, alpha_bar, grid, alpha):
    """Sec. 3.4, stage 1: from the prior at step M down to 0.

    y: (B, C, H, W) known contrasts in [-1,1]; prior: (B, C, H, W) start images, or None to start the missing contrasts
    from pure noise; noise(): fresh N(0,1) of that shape.  len(grid) network evaluations.  Returns x0: (B, C, H, W).
    """
    eps = noise()
    start = y if prior is None else known * y + (1 - known) * prior                     # (B, C, H, W)
    x_t = q_sample(start, alpha_bar[grid[-1]], eps)                                     # (B, C, H, W)  at step M
    if prior is None:       # pure noise, even where M < 1000 and the network expects an image in it: Table 3 does the same
        x_t = known * x_t + (1 - known) * eps                                           # (B, C, H, W)
    for j in range(len(grid) - 1, -1, -1):                          # j = S, ..., 0; step 0 is the least noisy, not clean
        x0 = guided_x0(eps_model, x_t, grid[j], alpha_bar, y, known, alpha)
        x0 = known * y + (1 - known) * x0                                               # paste what is known [D4]
        if j > 0:
            x_t = q_sample(x0, alpha_bar[grid[j - 1]], noise())                         # fresh noise [D5]
    return x0


def stage2(eps_model, x0, y, known, noise, alpha_bar, grid, alpha, N, w, paste):
    """Sec. 3.4, stage 2: N - 2 rounds of noising to t_2 and denoising, each averaged by Eq. (5); then down [D9]:
    with M = 400, S = 20, N = 50, 48 evaluations at step 40, one at 20, one at 0.

    x0: result of stage 1, (B, C, H, W).  paste: impose the known contrasts here too.  N network evaluations.
    """
    times = [grid[2]] * (N - 2) + [grid[1], grid[0]]
    previous, x_t = x0, q_sample(x0, alpha_bar[times[0]], noise())
    for n in range(N):
        x0 = guided_x0(eps_model, x_t, times[n], alpha_bar, y, known, alpha)
        if n < N - 2:
            x0 = (1 - w) * previous + w * x0                                            # Eq. (5)
        if paste:
            x0 = known * y + (1 - known) * x0
        previous = x0
        if n < N - 1:
            x_t = q_sample(x0, alpha_bar[times[n + 1]], noise())
    return x0


def prior_images(cfg, codebook, u, known, generators):
    """Stage 1's start images.  u: (B, C, H, W) in [0,1]; known: (B, C) bool; generators: one per slice, for "random".
    Returns (B, C, H, W) in [0,1]."""
    prior = torch.full_like(u, 0.5)                                                     # mid-grey [D8]
    if cfg.prior == "zero":
        return prior
    for b, row in enumerate(known.tolist()):
        available = [c for c, here in enumerate(row) if here]
        for target in (c for c, here in enumerate(row) if not here):
            if cfg.prior == "adaptive":
                source, curve, gain = codebook.look_up(target, available)
            else:
                K = len(codebook.curves)
                pick = int(torch.randint(len(available) * K, (), generator=generators[b], device=u.device))
                source, curve = available[pick // K], pick % K
                gain = codebook.gain(target, source, curve)
            prior[b, target] = (gain * warp(u[b, source], codebook.curves[curve])).clamp(0, 1)
    return prior


def impute(cfg, run, model, u, known, keys, watch=None):
    """Fill in the missing contrasts of a batch of slices.

    u: (B, C, H, W) in [0,1], anything where missing.  known: (B, C) bool.  keys: (subject, slice) of each; they fix the
    noise, so that a slice comes out the same, up to rounding, in any batch, order or number of processes.  watch: see
    make_eps_model.
    Returns (B, C, H, W) in [0,1], and the prior or None.
    """
    mask = known[:, :, None, None]                                                      # (B, C, 1, 1)
    u = torch.where(mask, u, 0)                     # nothing of a missing contrast gets past this line
    generators = [run.generator("sample", *key) for key in keys]    # prior "random" draws from them too, before the noise

    def noise():
        return torch.stack([torch.randn(u.shape[1:], generator=g, device=u.device) for g in generators])

    context = condition(cfg, model.mif, encode(model.encoder, u), known)                # (B, L, D)  once, not at every step
    eps_model = make_eps_model(run, model, context, watch)
    prior = None if cfg.prior == "noise" else prior_images(cfg, model.codebooks[cfg.curves], u, known, generators)
    y, A, grid = 2 * u - 1, mask.float(), time_grid(cfg.M, cfg.S)
    start = None if prior is None else 2 * prior - 1
    alpha = cfg.alpha * u.shape[-1] / 256                                               # [D3]
    x0 = stage1(eps_model, y, A, start, noise, model.alpha_bar, grid, alpha)
    if cfg.stage2:
        x0 = stage2(eps_model, x0, y, A, noise, model.alpha_bar, grid, alpha, cfg.N, cfg.w, cfg.paste == "both")
    return torch.where(mask, u, (x0.clamp(-1, 1) + 1) / 2), prior


# ---- 6. Training -----------------------------------------------------------------------------------------------------


def train(cfg, run, ds):
    """All stages; what is finished is loaded from the checkpoint.  Leaves in run.stages what load_model needs."""
    run.shard(cfg.batch)                            # an impossible batch is refused before the first stage, not after the third
    slices = ds.part("train")                                                           # (n, C, H, W), memory-mapped
    encoder = train_encoder(cfg, run, ds, slices)
    parts = np.array_split(np.arange(len(slices)), math.ceil(len(slices) / 32))
    features = torch.cat([encode(encoder, run.fetch(slices, part)) for part in parts])  # (n, C, D)  frozen: computed once
    mif = train_mif(cfg, run, ds, features)
    make_codebooks(cfg, run, ds, slices, encoder)
    train_diffusion(cfg, run, ds, slices, encoder, mif, features)


def train_encoder(cfg, run, ds, slices):
    """Stage "encoder" [D1]: a CLIP on (slice, caption), with a term that makes two contrasts of one slice find each other
    (losses and optimiser in common/clip.py)."""
    if cfg.encoder == "pixels":
        list(run.steps("encoder", 0, {}))           # nothing to train, which finishes the stage
        return Pixels()
    texts = captions(ds, ds.rows("train"))
    encoder = clip.build(cfg.encoder, [t for row in texts for t in row], cfg.size, seed=run.seed).to(run.device)
    encoder.subjects = sorted(ds.split["train"])
    run.about["encoder"] = {k: v for k, v in encoder.state().items() if k != "weights"}  # sizes, vocabulary, subjects
    clip.train_clip(run, encoder, slices, texts, ds.subject[ds.rows("train")], cfg.encoder_steps,
                    min(cfg.encoder_batch, len(slices)), cfg.encoder_lr)
    encoder.freeze()
    unseen = ds.rows("val")
    if len(unseen):
        unseen = data.evenly(unseen, 64)
        scores = clip.report(encoder, ds.images[unseen], captions(ds, unseen))
        run.say("encoder on validation slices: " + ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in scores.items()))
    return encoder


def train_mif(cfg, run, ds, features):
    """Stage "mif": the fusion module, with the encoder frozen, on cached features.  Every process works on the whole batch."""
    n, C, dim = features.shape
    torch.manual_seed(seed_of(run.seed, "mif"))
    mif = MutualInformationFusion(dim).to(run.device)
    # decay only on matrices: on norms, biases and the temperature it would act against the loss
    matrices, others = [p for p in mif.parameters() if p.dim() > 1], [p for p in mif.parameters() if p.dim() < 2]
    optimiser = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}],
                                  lr=cfg.mif_lr, betas=(0.9, 0.98), eps=1e-6)
    subject = torch.from_numpy(np.unique(ds.subject[ds.rows("train")], return_inverse=True)[1]).to(run.device)
    batch = min(cfg.mif_batch, n)
    everything = torch.ones(batch, C, dtype=torch.bool, device=run.device)
    for step in run.steps("mif", math.ceil(n * cfg.mif_epochs / batch), {"mif": mif, "optimiser": optimiser}, batch):
        pick = torch.from_numpy(run.order("mif", n, batch, step)).to(run.device)
        drop = np.random.default_rng(seed_of(run.seed, "mif drop", step)).integers(C)   # one contrast, for all
        subset = everything.clone()
        subset[:, drop] = False
        z_all, z_sub = mif(features[pick], everything), mif(features[pick], subset)     # (B, D) each
        loss = anatomy_loss(z_all, z_sub, mif.log_scale, subject[pick])
        run.update(loss, optimiser)
        with torch.no_grad():
            mif.log_scale.clamp_(max=math.log(100))                                     # beyond, it would have no gradient
        found = (z_sub @ z_all.T).argmax(1) == torch.arange(batch, device=run.device)   # z_all of the same slice is nearest
        run.log(loss=loss, retrieval=found.float().mean())
    return mif.eval().requires_grad_(False)


def make_codebooks(cfg, run, ds, slices, encoder):
    """Stage "codebook": one for each reading of the curves [D6], from at most 2,000 slices spread over the subjects.  Each
    process computes all of it."""
    codebooks = {name: Codebook(len(ds.contrasts), name) for name in CURVES}
    chosen = data.evenly(np.arange(len(slices)), 2000)
    parts = np.array_split(chosen, math.ceil(len(chosen) / 16))
    for step in run.steps("codebook", len(parts), codebooks, 16):
        for codebook in codebooks.values():
            codebook.add(encoder, run.fetch(slices, parts[step]))
    run.write_json("codebook.json", {name: codebook.readable(ds.contrasts) for name, codebook in codebooks.items()})
    if run.rank == 0:
        draw_codebook(run.out / "codebook.png", codebooks[cfg.curves], ds.contrasts, slices[len(slices) // 2])


def train_diffusion(cfg, run, ds, slices, encoder, mif, features):
    """Stage "diffusion": the joint model of all contrasts; the averaged weights with the lowest validation loss are kept."""
    torch.manual_seed(seed_of(run.seed, "diffusion"))
    unet = make_unet(cfg, len(ds.contrasts), features.shape[2]).to(run.device, memory_format=torch.channels_last)
    ema, best = EMA(unet, cfg.ema), Best(unet)
    optimiser = torch.optim.Adam(unet.parameters(), lr=cfg.lr, fused=run.device.type == "cuda")
    network = torch.compile(unet) if run.args.compile else unet     # same weights; checkpoints hold the plain module
    alpha_bar = schedule(cfg).to(run.device)
    everything = torch.ones(features.shape[:2], dtype=torch.bool, device=run.device)
    context = torch.cat([condition(cfg, mif, f, here) for f, here in                    # (n, L, D)  frozen: computed once
                         zip(features.split(4096), everything.split(4096))])
    validate = validation(cfg, run, ds, encoder, mif, alpha_bar)
    mine = run.shard(cfg.batch)
    if cfg.batch > len(slices):
        run.say(f"warning: --batch {cfg.batch} exceeds the {len(slices)} training slices; some come twice in a step")
    parts = {"unet": unet, "ema": ema, "best": best, "optimiser": optimiser}
    for step in run.steps("diffusion", cfg.steps, parts, cfg.batch):
        pick = run.order("diffusion", len(slices), cfg.batch, step)
        x0 = 2 * run.fetch(slices, pick[mine]) - 1                                      # (B, C, H, W)
        g = run.generator("diffusion", step)        # draws for the whole batch, of which each process takes its share
        t = torch.randint(T, (cfg.batch,), generator=g, device=run.device)[mine]        # (B,)
        eps = torch.randn(cfg.batch, *x0.shape[1:], generator=g, device=run.device)[mine]    # (B, C, H, W)
        z = context[torch.from_numpy(pick[mine]).to(run.device)]                        # (B, L, D)
        with run.autocast():
            loss = diffusion_loss(network, x0, t, eps, z, alpha_bar)
        run.update(loss, optimiser)
        ema.update(unet, step)
        run.log(loss=loss)
        if validate and (step + 1) % max(1, cfg.steps // 20) == 0:
            value = validate(ema.model)
            run.log(validation=value)
            best.offer(ema.model, value)


def validation(cfg, run, ds, encoder, mif, alpha_bar):
    """A function unet -> Eq. (2) on up to 32 validation slices, always with the same times and noise.  None without them."""
    rows = ds.rows("val")
    if len(rows) == 0:
        run.say("no validation subjects: the last averaged weights are kept")
        return None
    u = run.fetch(ds.images, data.evenly(rows, 32))                                                 # (V, C, H, W)
    present = torch.ones(u.shape[:2], dtype=torch.bool, device=run.device)
    context = condition(cfg, mif, encode(encoder, u), present)                          # (V, L, D)
    t = torch.linspace(0, T - 1, len(u), device=run.device).long()                      # (V,)  all noise levels
    eps = torch.randn(u.shape, generator=run.generator("validation"), device=run.device)

    @torch.no_grad()
    def validate(unet):
        with run.autocast():
            return float(diffusion_loss(unet, 2 * u - 1, t, eps, context, alpha_bar))
    return validate


@dataclass
class Model:
    """Everything that sampling needs, trained and frozen."""
    contrasts: list
    encoder: nn.Module
    mif: nn.Module
    codebooks: dict                                 # {reading of the curves: Codebook}
    unet: nn.Module
    alpha_bar: torch.Tensor


def load_model(cfg, run):
    """The trained networks of a run folder, from its checkpoint alone."""
    if not run.finished(STAGES):
        raise RunError(f"{run.out}: the training is not finished; run the training command again (--train), it continues")
    parts, contrasts = {stage: saved["parts"] for stage, saved in run.stages.items()}, run.about["contrasts"]
    encoder = Pixels()
    if cfg.encoder != "pixels":
        encoder = clip.CLIP.from_state({**run.about["encoder"], "weights": parts["encoder"]["clip"]}).freeze()
    dim, codebooks = feature_width(cfg), {name: Codebook(len(contrasts), name) for name in CURVES}
    mif, unet, best = MutualInformationFusion(dim), make_unet(cfg, len(contrasts), dim), parts["diffusion"]["best"]
    weights = best["model"] if math.isfinite(best["loss"]) else parts["diffusion"]["ema"]   # without validation: the last
    restore(mif, parts["mif"]["mif"], f"the fusion module in {run.out}")
    restore(unet, weights, f"the U-Net in {run.out}")
    for name, codebook in codebooks.items():
        restore(codebook, parts["codebook"].get(name, {}), f"the codebook in {run.out}")
    encoder, mif, unet = (m.to(run.device).eval().requires_grad_(False) for m in (encoder, mif, unet))
    unet = unet.to(memory_format=torch.channels_last)
    unet = torch.compile(unet) if run.args.compile else unet
    return Model(contrasts, encoder, mif, codebooks, unet, schedule(cfg).to(run.device))


# ---- 7. Evaluation ---------------------------------------------------------------------------------------------------


# --reproduce: a row is what is typed beyond the command, "against" the row that the others are compared with.  For ADNI the
# paper has other settings: --M 200 --alpha 50 --steps 350000 --test-subjects 30 --test-slices 5.
TABLES = {
    "table1": {"title": "each contrast from all others", "against": "APT", "rows": {"APT": {}}},
    "table2": {"title": "components (U joint model, A adaptive prior, I stage 2)", "against": "U+A+I", "rows": {
        "U, M=1000, S=50": dict(prior="noise", M=1000, S=50, stage2=False),
        "U, M=1000, S=20": dict(prior="noise", M=1000, S=20, stage2=False),
        "U": dict(prior="noise", stage2=False), "U+A": dict(prior="adaptive", stage2=False),
        "U+A+I": dict(prior="adaptive", stage2=True)}},
    "table3": {"title": "what sampling starts from, without stage 2", "against": "adaptive", "rows": {
        prior: dict(prior=prior, stage2=False) for prior in ("zero", "noise", "random", "adaptive")}},
    "table4": {"title": "evaluations of stage 2", "against": "N=50", "rows": {
        f"N={N}": dict(N=N, stage2=True) for N in (10, 25, 50, 100, 200)}},
    "table5": {"title": "start step, without stage 2", "against": "M=400", "rows": {
        f"M={M}": dict(M=M, stage2=False) for M in (1000, 500, 400, 200, 100, 40, 20)}},
    "table6": {"title": "every missing pattern, four contrasts (the mean includes Table 1's)", "against": "APT", "rows": {
        "APT": dict(missing=("all",))}},
    "table7": {"title": "every missing pattern, three contrasts (the mean includes Table 1's)", "against": "APT", "rows": {
        "APT": dict(missing=("all",))}},
    "fig6": {"title": "what z alone knows of the anatomy (a picture)"},
    "anatomy": {"title": "ours: does z matter, and how it is made? (the encoder makes the codebook too)", "against": "APT",
                "rows": {
        "APT": {}, "fusion untrained": dict(mif_epochs=0), "mean feature for z": dict(mif="mean"), "no z": dict(mif="zero"),
        "encoder untrained": dict(encoder_steps=0), "encoder: pixels": dict(encoder="pixels"),
        "z of variance 1": dict(context="scaled")}},
    "readings": {"title": "ours: where the paper can be read in more than one way", "against": "APT", "rows": {
        "APT": {}, "no guidance": dict(alpha=0.0), "paste in both stages": dict(paste="both"),
        "paste in both, no guidance": dict(alpha=0.0, paste="both"), "w = 1": dict(w=1.0),
        "curves as scalars": dict(curves="scalar"), "identity and inversion": dict(curves="identity"),
        "a token per contrast": dict(context="tokens"), "linear schedule": dict(schedule="linear")}},  # M: noisier then
}


def evaluate(cfg, run, ds, model):
    """Every test subject once, every pattern of --missing, beside the standing baselines.  results.json and pictures."""
    tasks, rows = patterns(ds.contrasts, cfg.missing), ds.spread("test", cfg.test_slices)
    mine = set(ds.split["test"][run.rank::run.world])                                   # whole subjects per process
    work = [(task, r) for task in tasks for r in rows if ds.subject[r] in mine]
    done = []                                                                           # ((task, row), result, prior)
    for part in run.batches("sampling", work, cfg.sample_batch):
        u = run.fetch(ds.images, [r for _, r in part])                                  # (B, C, H, W)
        known = torch.tensor([[c not in task for c in ds.contrasts] for task, _ in part], device=run.device)
        result, prior = impute(cfg, run, model, u, known, [(ds.subject[r], ds.slice_number[r]) for _, r in part])
        prior = u * 0 if prior is None else prior
        done += zip(part, result.cpu().numpy(), prior.cpu().numpy())
    done = {key: images for key, *images in run.gather(done)}
    if run.rank > 0:
        return
    scored, truth = [], np.asarray(ds.images[rows], dtype=np.float32)                   # (n, C, H, W)
    for task in tasks:
        ours, start = (np.stack(images) for images in zip(*(done[task, r] for r in rows)))    # (n, C, H, W) each
        sources = {name: truth[:, c] for c, name in enumerate(ds.contrasts) if name not in task}
        for c, name in ((c, name) for c, name in enumerate(ds.contrasts) if name in task):
            results = {"APT": ours[:, c]} if cfg.prior == "noise" else {"APT": ours[:, c], "prior alone": start[:, c]}
            scored.append(Task(sources, name, truth[:, c], results, ds.subject[rows]))
    some = ds.images[data.evenly(ds.rows("train"), 2000)].astype(np.float32)            # (m, C, H, W)
    report(run, scored, {name: some[:, c] for c, name in enumerate(ds.contrasts)},
           f"slices per subject: {cfg.test_slices}; whole slice, range [0,1]; unit: subject, the mean of its slices")
    draw_steps(cfg, run, ds, model, tasks[:4], rows[len(rows) // 2])


def draw_steps(cfg, run, ds, model, tasks, r):
    """steps.png: what the network is given and what it makes of it, on the way to slice r."""
    watched = []
    u = run.fetch(ds.images, [r] * len(tasks))                                          # (B, C, H, W)
    known = torch.tensor([[c not in task for c in ds.contrasts] for task in tasks], device=run.device)
    result, _ = impute(cfg, run, model, u, known, [(ds.subject[r], ds.slice_number[r])] * len(tasks), watched)
    first, second = np.arange(cfg.S + 1), np.arange(cfg.S + 1, len(watched))            # evaluations of stage 1, of stage 2
    shown = [*data.evenly(first, 4), *(data.evenly(second, 3) if cfg.stage2 else ())]
    columns, rows, labels = [f"{i + 1}: t = {watched[i][0]}" for i in shown], [], []
    shown = [watched[i] for i in shown]
    for b, task in enumerate(tasks):
        c = list(ds.contrasts).index(task[0])
        ends = [result[b, c].cpu(), u[b, c].cpu()]
        rows += [[(x_t[b, c] + 1) / 2 for _, x_t, _ in shown] + ends, [(x0[b, c] + 1) / 2 for _, _, x0 in shown] + ends]
        labels += [f"{task[0]}: x_t", "estimate of x0"]
    pictures.grid(run.out / "steps.png", rows, [*columns, "result", "truth"], labels,
                  note=f"number and time of the evaluation; prior: {cfg.prior}; the first {cfg.S + 1} are stage 1's; estimates "
                       "are the network's own, before guidance and averaging")


def draw_codebook(path, codebook, contrasts, u):
    """The two best entries for every contrast, at work on one slice u: (C, H, W) in [0,1]."""
    u, rows, labels = torch.from_numpy(u.astype(np.float32)), [], []
    H, W = u.shape[1:]
    for target, entries in codebook.readable(contrasts).items():
        for entry in entries[:2]:
            source, points = u[contrasts.index(entry["source"])], codebook.curves[entry["curve"]]
            curve = torch.linspace(1, 0, H)[:, None] > warp(torch.linspace(0, 1, W), points)    # (H, W)  grey below it
            prior = (entry["gain"] * warp(source, points)).clamp(0, 1)                          # (H, W)
            rows.append([source, (1 + curve) / 2, prior, u[contrasts.index(target)]])
            votes = f"{entry['votes']} of {sum(e['votes'] for e in entries)} votes"
            labels.append(f"{target} from {entry['source']}: {votes}, gain {entry['gain']:.2f}")
    pictures.grid(path, rows, ["source", "curve", "prior", "truth"], labels,
                  note="prior = gain x curve(source), on a training slice; of each contrast the two entries with most votes")


def figure6(cfg, run, ds, model):
    """Fig. 6: slices from noise with z alone, M = 1000, S = 50: nothing known, no prior, no guidance, no stage 2.  fig6.png

    The noise is the same in every row, so that rows differ by z only.
    """
    rows = ds.spread("test", 1)[:6]
    u = run.fetch(ds.images, rows)                                                      # (B, C, H, W)
    everything = torch.ones(u.shape[:2], dtype=torch.bool, device=run.device)
    context = condition(cfg, model.mif, encode(model.encoder, u), everything)           # (B, L, D)
    g, nothing = run.generator("figure 6"), torch.zeros(len(u), 1, 1, 1, device=run.device)

    def noise():
        return torch.randn(1, *u.shape[1:], generator=g, device=u.device).expand_as(u)

    x0 = stage1(make_eps_model(run, model, context), u * 0, nothing, None, noise, model.alpha_bar, time_grid(T, 50), alpha=0)
    if run.rank > 0:
        return
    truth, made = u.cpu().numpy(), ((x0 + 1) / 2).cpu().numpy()
    table = np.array([[metrics.psnr(a, b, 1).mean() for b in made] for a in truth])     # (truth, made), mean over contrasts
    own, other = np.diag(table).mean(), table[~np.eye(len(table), dtype=bool)].mean() if len(table) > 1 else float("nan")
    pictures.grid(run.out / "fig6.png", [[*a, *b] for a, b in zip(truth, made)],
                  [*ds.contrasts, *(f"{c} from z" for c in ds.contrasts)], list(ds.subject[rows]), note="left: what z saw")
    run.say(f"from z alone: {own:.2f} dB to the slice that z was taken from, {other:.2f} dB to those of other subjects; "
            f"written: {run.out / 'fig6.png'}")


def benchmark(cfg, run, ds):
    """Times a training step and a guided evaluation of the sampler, at the sizes of the config, on an untrained network."""
    slices, dim, alpha_bar = ds.part("train"), feature_width(cfg), schedule(cfg).to(run.device)
    unet = make_unet(cfg, len(ds.contrasts), dim).to(run.device, memory_format=torch.channels_last)
    model = Model(ds.contrasts, None, None, None, torch.compile(unet) if run.args.compile else unet, alpha_bar)
    eps_model = make_eps_model(run, model, torch.zeros(1, 1, dim, device=run.device))   # one z for all
    optimiser = torch.optim.Adam(unet.parameters(), lr=cfg.lr, fused=run.device.type == "cuda")
    y = 2 * run.fetch(slices, np.arange(cfg.sample_batch) % len(slices)) - 1
    forward = run.flops(lambda: eps_model(y[:1], torch.zeros(1, device=run.device)))

    def training_step():
        x0 = 2 * run.fetch(slices, run.order("benchmark", len(slices), cfg.batch, 0)) - 1
        t = torch.randint(T, (cfg.batch,), device=run.device)
        run.update(diffusion_loss(lambda x_t, t, _: eps_model(x_t, t), x0, t, torch.randn_like(x0), None, alpha_bar), optimiser)

    run.time("training step", training_step, cfg.batch, 3 * forward)                    # backward costs twice a forward
    unet.requires_grad_(False)                                                          # as in sampling: gradients of x_t only
    seconds = run.time("guided evaluation", lambda: guided_x0(eps_model, y, 200, alpha_bar, y, torch.ones_like(y), cfg.alpha),
                       len(y), 2 * forward)
    evaluations = cfg.S + 1 + cfg.N * cfg.stage2
    run.say(f"a sample takes {evaluations} evaluations: {len(y) / seconds / evaluations:.3g} slices/s")


def dry_run(cfg, run, ds):
    """What would be trained, how large it is, and about how long it takes."""
    C, dim = len(ds.contrasts), feature_width(cfg)
    unet = make_unet(cfg, C, dim)
    x_t, t, z = torch.zeros(1, C, cfg.size, cfg.size), torch.zeros(1), torch.zeros(1, 1, dim)
    run.say(f"x_t {tuple(x_t.shape)}, t (1,), z {tuple(z.shape)} -> eps {tuple(unet(x_t, t, z).shape)}")
    run.outline({"U-Net": unet, "fusion module": MutualInformationFusion(dim)}, lambda: unet(x_t, t, z), cfg.batch * cfg.steps)


# ---- 8. Main ---------------------------------------------------------------------------------------------------------


def main():
    cfg, args = parse(Config, PRESETS, TABLES, LIMITS, lambda folder: "demo" if data.is_phantom(folder) else "paper", __doc__)
    if args.reproduce == "list":
        print(list_tables(TABLES))
    elif args.check:
        raise SystemExit(0 if data.check(args.data, cfg.contrasts or None) else 1)
    elif args.reproduce:
        cfg, args.seed = stored_config(args.out, cfg, args, SAMPLING)       # of a run that is there already
        args.train, args.evaluate, args.synthesize, args.benchmark = True, True, False, False
        if args.reproduce == "fig6":
            work(cfg, args, figure6)
        else:
            reproduce("apt", args.reproduce, TABLES[args.reproduce], cfg, args, SAMPLING, STAGES, "APT", work)
    else:
        work(cfg, args)


def work(cfg, args, score=evaluate):
    """All that was asked for, in one run folder.  Returns the path of the results that belong to it, if any."""
    run = Run("apt", cfg, args)
    cfg = run.settle(SAMPLING)
    if run.load():
        run.say(f"found a run in {run.out}")
    elif (args.evaluate or args.synthesize) and not args.train:
        raise RunError(f"{run.out} holds no trained model; add --train, or name the folder of a finished run with --out")
    if args.train or args.evaluate or not args.synthesize:
        ds = open_data(cfg, args, run)
        patterns(ds.contrasts, cfg.missing)                 # a wrong --missing is told now, not after the training
        run.works_on(ds)
    if args.train:
        run.claim_for(ds, SAMPLING)
        if run.finished(STAGES):
            run.say("training: finished")
        else:
            train(cfg, run, ds)
    if args.evaluate:
        run.refuse_seen(ds)
        if args.reproduce and score is evaluate and run.find_results():
            run.say(f"found: {run.find_results()}")
        else:
            score(cfg, run, ds, load_model(cfg, run))
    if args.synthesize:
        model, subjects = load_model(cfg, run), data.find_layout(args.data, run.about["contrasts"]).subjects
        unseen = [s for s in subjects if s.name not in run.about["train"]]              # never those it was trained on
        asked = () if cfg.missing in (("each",), ("all",)) else patterns(model.contrasts, cfg.missing)[0]
        todo = data.to_synthesize(unseen[run.rank::run.world], model.contrasts, asked, cfg.size, run.out / "synthetic", run.say)
        synthesize(run, todo, model.contrasts, cfg.sample_batch, lambda *batch: impute(cfg, run, model, *batch)[0], "APT")
    if args.benchmark:
        benchmark(cfg, run, ds)
    elif not (args.train or args.evaluate or args.synthesize):
        dry_run(cfg, run, ds)
    run.close()
    return run.find_results() if run.rank == 0 else None


if __name__ == "__main__":
    guarded(main, DataError)
