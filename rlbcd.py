"""RLBCD: a PET from a CT, a CT angiogram from a CT, or a post- from a pre-contrast MR image.

Lv et al., "RLBCD: Residual-guided Latent Brownian-bridge Co-Diffusion for Anatomical-to-Metabolic
Image Synthesis", IJCAI 2025; link and full reference in CITATION.cff.
Part of a collection of reference implementations; MIT licence, see LICENSE.

THE IDEA.  A Brownian bridge is a diffusion that starts from an image and ends at another image.
Between the two ends noise comes and goes.  RLBCD runs two bridges side by side, in the small latent
space of an autoencoder.  Both start from the source A (say CT).
  1. The residual branch ends at the residual image, which is the difference B - A.  It learns what
     changes between the two kinds of images.
  2. The enhanced branch ends at the target B (say PET).  At each step the residual branch runs
     first, and its feature maps guide the enhanced branch (hybrid-granularity fusion, HGF).
     On the way down, a gate mixes the maps of both branches (semantic alignment, SAM).
     On the way up, the enhanced branch attends to the other's maps (complementary attention, CMA).
  3. A small network H_E gets the latents of B and of the residual and must find the latent of A.
     In training, its error is a third loss.  In sampling, A is known, so this error says how well
     the two results go together: the latent consistency score (LCS).

PIPELINE (B slices, H x W pixels, f = 8, z channels, h = H / f, w = W / f)
  A, B, residual (B,1,H,W) --autoencoder, frozen--> x, y, r (B,z,h,w) each
  state, t --residual U-Net--> x_t - x_0 (B,z,h,w), feature maps of 3 levels, down and up
  state, t, feature maps --enhanced U-Net with SAM and CMA--> x_t - x_0 (B,z,h,w)
  both states, both x_0 --bridge step--> both states of the next time; S evaluations in all
  y_hat --decoder--> B (B,1,H,W);  y_hat, r_hat --H_E--> x_hat;  LCS = -mean (x - x_hat)^2
Training has the stages "autoencoder", "evaluator" (H_E) and "bridges" (both U-Nets together).

EQUATIONS (the target latent x_0 is r or y, and x is the source; see [D1])
  Eqs. (1), (4)   q(x_t | x_0, x) = N((1 - m_t) x_0 + m_t x, delta_t),  delta_t = 2 (m_t - m_t^2)
  Eqs. (2), (5)   x_n given x_t and an estimate of x_0, n < t: see bridge_step
  Eqs. (3), (6)   L_res, L_enh = | m_t (x - x_0) + sqrt(delta_t) eps - eps_theta(x_t, t) |
  Eqs. (7), (8)   SAM: F_eo = F_e c + F_re (1 - c),  c = sigmoid(P(C3([C1(F_re), C2(F_e)])))
  Eqs. (9), (10)  CMA: Q from F_d, K and V from F_rd,  F_do = softmax(Q K^T / sqrt(d)) V
  Eq. (11)        L_lcs = || x - H_E(y_hat, r_hat) ||^2;  we minimise L_res + L_enh + lambda L_lcs

SYMBOLS
  paper              code                   meaning
  x, y, r            x, y, r                latents of A, of B and of the residual; (B,z,h,w)
  x_t                states[branch]         state of the "residual" and of the "enhanced" branch
  m_t, delta_t       M[t], 2 m (1 - m)      place on the bridge (0: target, 1: source), variance
  eps_theta          grads[branch]          what the U-Nets predict: x_t - x_0 (BBDM: gradient)
  F_e, F_d           h in SAM and CMA       maps of the enhanced branch on the way down and up
  F_re, F_rd         taps[stage, level]     maps of the residual branch
  lambda             lcs                    weight of Eq. (11)
  -                  u                      slice as stored, in [0,1]
  -                  src, tgt               channels of A and B; _t always means time

COMMANDS
  python rlbcd.py --data data/petct --train --evaluate    makes phantoms on first use; CPU, minutes
  python rlbcd.py --data FOLDER --source ct --target pet --train --evaluate     your own scans
  python rlbcd.py --data FOLDER --synthesize --out runs/rlbcd-FOLDER            NIfTI volumes

DEPARTURES FROM THE PAPER (the reason stands here, or where the code departs)
  [D1]  The source is at the largest t, as in the prose; the paper's formulas have it at t = 0.
  [D2]  m_t runs from .001 to .999, as in BBDM's code; sampling starts at x itself, without noise.
  [D3]  The loss is L1, unweighted, as in BBDM's code (--loss l2: squared, see bridge_loss).
  [D4]  CMA adds its result to F_d (--cma-out literal: replaces it); it has norms and heads.
  [D5]  Both branches are trained together; their noise is independent.
  [D6]  The residual image is (B - A) / 2, so that it lies in [-1,1] like A and B.
  [D7]  One autoencoder for A, B and residual, of this folder alone; see common/autoencoder.py.
  [D8]  Latents are those before quantisation; channels get mean 0, variance 1 over A, B, residual.
  [D9]  SAM and CMA stand behind the last block of a level; "direct combination" is the mean.
  [D10] Eq. (11) takes x_t - eps_theta at every t, and H_E is frozen; LCS = - squared error.
  [D11] Weights are averaged (EMA); layers, batch, learning rates and lambda are BBDM's or ours.
  [D12] Tables 5, 6: cross-validation on the scored subjects; Fig. 4: five equal ranges of LCS.

NEEDS  data/ and these files of common/:
  autoencoder.py benchmark.py classify.py cli.py codebook.py cohort.py confidence.py device.py
  downstream.py evaluation.py features.py files.py loop.py metrics.py outline.py pictures.py run.py
  schedules.py score_volumes.py script.py table_pages.py tables.py tasks.py trained.py unet.py
  value.py vqae.py
"""
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import data
from common import confidence, features, script
from common.autoencoder import Latents, load_autoencoder, train_autoencoder
from common.cli import load_presets
from common.device import full_precision, seed_of
from common.evaluation import notes_of
from common.files import RunError
from common.loop import EMA, Best
from common.outline import Outline
from common.schedules import falling_times
from common.tasks import one_task, pair_in, typed_pair
from common.unet import SelfAttention, UNet, attention_at, check_sizes, zeroed
from common.value import value_rows
from common.vqae import VQAE

T = 1000                                        # times of the bridge: 0, ..., 999
M = torch.linspace(0.001, 0.999, T, dtype=torch.float64)    # m_t, never 0: steps divide by it [D2]

# ---- 1. Config -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The paper states the split 7:1:2, the sizes of slices, f = 8, T = 1000 and S = 200 (Sec. 4).
    Other defaults are those of BBDM, or ours [D11].  Phantoms take PRESETS["demo"]."""
    # data
    source: str = ""                            # contrast A; empty: as the folder says
    target: str = ""                            # contrast B; empty: as the folder says
    size: int = 256                             # height and width of a slice in pixels (PET: 128)
    train_fraction: float = 0.7                 # share of the subjects that train
    test_subjects: float = 0.2                  # subjects that are scored; below 1: their share
    test_slices: int = 1000                     # most slices scored per test subject, evenly spread
    # autoencoder
    bottleneck: Literal["vq", "none"] = "vq"    # none: the bridges run on the images (Fig. 2)
    ae_base: int = 128                          # channels at full resolution
    ae_mult: tuple[int, ...] = (1, 2, 2, 4)     # multipliers, one per resolution: f = 8
    ae_blocks: int = 2                          # residual blocks per resolution
    codes: int = 16384                          # entries of the codebook
    ae_steps: int = 50_000                      # training steps
    ae_batch: int = 8                           # images per step
    ae_lr: float = 1e-4                         # peak learning rate
    disc_weight: float = 0.6                    # of the discriminator; 0: none
    # networks of the bridges
    base: int = 128                             # channels of the first level
    mult: tuple[int, ...] = (1, 4, 8)           # channel multipliers, one per level
    blocks: int = 2                             # residual blocks per level
    head_dim: int = 64                          # width of an attention head
    groups: int = 32                            # groups of every GroupNorm
    # training
    evaluator_steps: int = 5_000                # of H_E
    steps: int = 50_000                         # of both bridges
    batch: int = 32                             # slices per step, over all processes
    lr: float = 1e-4                            # learning rate (Adam)
    ema: float = 0.9994                         # decay of the averaged weights
    # method, in training
    sam: bool = True                            # semantic alignment; off: mean of both maps
    cma: bool = True                            # complementary attention; off: mean of both maps
    cma_out: Literal["residual", "literal"] = "residual"    # Eq. (10) added or as printed [D4]
    rdb: bool = True                            # residual branch; off: BBDM
    edb: bool = True                            # enhanced branch; off: A plus twice the residual
    lcs: float = 1.0                            # lambda, weight of Eq. (11); 0: without it
    loss: Literal["l1", "l2"] = "l1"            # of Eqs. (3) and (6) [D3]
    # method, in sampling
    S: int = 200                                # evaluations of the networks
    samples: int = 1                            # samples of each slice
    select: Literal["first", "lcs"] = "first"   # which of the samples is the result
    value: Literal["", "label", "lesion"] = ""  # what a second network predicts (Tables 5 and 6)
    sample_batch: int = 16                      # slices sampled at once; changes rounding only

    def __post_init__(self):
        f = 1 if self.bottleneck == "none" else 2 ** (len(self.ae_mult) - 1)
        if self.size % f:
            raise ValueError(f"--size {self.size}: must be a multiple of {f}, for "
                             f"{len(self.ae_mult)} --ae-mult")
        check_sizes(self.size // f, self.base, self.mult, self.groups, self.head_dim)
        if not (self.rdb or self.edb):
            raise ValueError("--no-rdb and --no-edb leave no branch; drop one of them")
        typed_pair(self.source, self.target)
        if self.select == "lcs" and (self.samples == 1 or not (self.rdb and self.edb)):
            raise ValueError("--select lcs needs both branches and --samples 2 or more")


# Fields that may change without training again.  All others need training in another --out.
SAMPLING = ("S", "samples", "select", "value", "sample_batch", "test_slices")
PRESETS = load_presets("rlbcd")                              # sizes for phantoms: data/presets.json
LIMITS = dict(S=(1, T), samples=(1, 100), lcs=(0, 1e3), disc_weight=(0, 1e3), ema=(0, 0.99999),
              ae_mult=(1, 16), test_subjects=(0.01, 10 ** 9))
# --reproduce: a row of a table takes over all stages before the first one whose fields it changes.
STAGES = {
    "autoencoder": (),      # fields listed nowhere, such as ae_steps, act on all stages
    "evaluator": ("evaluator_steps",),
    "bridges": ("base", "mult", "blocks", "head_dim", "groups", "steps", "batch", "lr", "ema",
                "sam", "cma", "cma_out", "rdb", "edb", "lcs", "loss"),
}

# ---- 2. Data -------------------------------------------------------------------------------------

PAIRS = (("ct", "pet"), ("pre", "post"), ("ct", "cta"))     # (A, B) of the paper
KINDS = 3                       # every slice gives the autoencoder three images: A, B, residual


def pair_of(cfg, contrasts):
    """The names of A and B: as typed, or the pair of PAIRS that the folder holds."""
    return pair_in(contrasts, (cfg.source, cfg.target), PAIRS)


def channels(cfg, contrasts):
    """The channels of A and B."""
    source, target = pair_of(cfg, contrasts)
    return list(contrasts).index(source), list(contrasts).index(target)


def residual_image(A, B):
    """What changes from A to B, in [-1,1] [D6].  A, B: images in [-1,1]."""
    return (B - A) / 2


def add_residual(A, residual):
    """B from A and the residual image, kept in [-1,1]."""
    return (A + 2 * residual).clamp(-1, 1)


def make_picture(cfg, run, slices, contrasts):
    """A function numbers (n,) -> images (n, 1, H, W) in [-1,1].

    Image 3 i is A of slice i, image 3 i + 1 is B, and image 3 i + 2 is the residual.
    slices: (N, C, H, W) in [0,1].
    """
    src, tgt = channels(cfg, contrasts)

    def picture(numbers):
        u = run.fetch(slices, numbers // KINDS)                             # (n, C, H, W)
        A = 2 * u[:, src] - 1                                               # (n, H, W)
        B = 2 * u[:, tgt] - 1                                               # (n, H, W)
        three = torch.stack([A, B, residual_image(A, B)], dim=1)            # (n, 3, H, W)
        return three[torch.arange(len(u)), numbers % KINDS, None]           # (n, 1, H, W)
    return picture


def make_latents(cfg, run, ds, part, ae):
    """x, y, r of all slices of a part, of variance 1, like eps; kept on disk [D8]."""
    name = seed_of(ds.fingerprint, part, *ds.split[part], *pair_of(cfg, ds.contrasts))
    picture = make_picture(cfg, run, ds.part(part), ds.contrasts)
    return Latents(run, ae, picture, KINDS, len(ds.rows(part)), f"{name:x}")


# ---- 3. Model ------------------------------------------------------------------------------------


def make_autoencoder(cfg):
    """The VQ-autoencoder of common/vqae.py, for A, B and residual alike [D7].

    It has attention on maps of 32 pixels and on the smallest map, except with few channels.
    """
    large = cfg.ae_base >= 64
    has_32 = cfg.size in [32 * 2 ** level for level in range(len(cfg.ae_mult))]
    return VQAE(cfg.ae_base, cfg.ae_mult, cfg.ae_blocks, cfg.codes, cfg.size, middle=large,
                attention=(32,) if large and has_32 else (), bottleneck=cfg.bottleneck)


class SAM(nn.Module):
    """Semantic alignment, Eqs. (7) and (8): one gate per channel mixes the maps of both branches.

    C1, C2 and C3 are 1x1 convolutions.  A mean over all positions (P) may be taken before them or
    after them.  We take it first, which costs H W times less.  Eq. (7) does not say whether both
    maps are added or concatenated; both give the same set of functions, as C3 of a concatenation
    is a sum of two free linear maps.  We concatenate.  At the start the gate is 1/2 everywhere.
    """

    def __init__(self, site):
        super().__init__()
        C = site.channels
        self.key = (site.stage, site.level)
        self.c1 = nn.Linear(C, C)
        self.c2 = nn.Linear(C, C)
        self.c3 = zeroed(nn.Linear(2 * C, C))

    def forward(self, h, taps):
        """h: F_e, (B, C, H, W).  taps[key]: F_re, the same shape.  Returns F_eo."""
        F_re = taps[self.key]                                               # (B, C, H, W)
        both = [self.c1(F_re.mean((2, 3))), self.c2(h.mean((2, 3)))]        # (B, C) each
        gate = torch.sigmoid(self.c3(torch.cat(both, dim=1)))               # (B, C)
        gate = gate[:, :, None, None]                                       # (B, C, 1, 1)
        return h * gate + F_re * (1 - gate)                                 # (B, C, H, W)


class CMA(nn.Module):
    """Complementary attention, Eqs. (9) and (10): every position of F_d looks at all of F_rd.

    As printed, the result replaces F_d.  At the last level it would be a mixture of values of the
    residual branch, which has not seen the noise that the enhanced branch must predict.  The text
    says that CMA compensates for missing details.  So we add the result to F_d, through a layer
    that starts at zero (--cma-out literal: we replace F_d).  Norms keep the softmax moderate [D4].
    """

    def __init__(self, site, head_dim, groups, out):
        super().__init__()
        C = site.channels
        self.key = (site.stage, site.level)
        self.heads = C // head_dim
        self.norm_q = nn.GroupNorm(groups, C)
        self.norm_kv = nn.GroupNorm(groups, C)
        self.to_q = nn.Conv2d(C, C, 1)
        self.to_k = nn.Conv2d(C, C, 1)
        self.to_v = nn.Conv2d(C, C, 1)
        self.out = zeroed(nn.Conv2d(C, C, 1)) if out == "residual" else None

    def tokens(self, x):
        """(B, C, H, W) -> (B, heads, H*W, d), with C = heads * d."""
        return x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)

    def forward(self, h, taps):
        """h: F_d, (B, C, H, W).  taps[key]: F_rd, the same shape.  Returns F_do."""
        F_rd = self.norm_kv(taps[self.key])                                 # (B, C, H, W)
        Q = self.tokens(self.to_q(self.norm_q(h)))                          # (B, heads, HW, d)
        K = self.tokens(self.to_k(F_rd))                                    # (B, heads, HW, d)
        V = self.tokens(self.to_v(F_rd))                                    # (B, heads, HW, d)
        AV = F.scaled_dot_product_attention(Q, K, V)                        # (B, heads, HW, d)
        AV = AV.transpose(2, 3).flatten(1, 2).unflatten(2, h.shape[2:])     # (B, C, H, W)
        return AV if self.out is None else h + self.out(AV)                 # (B, C, H, W)


class Mean(nn.Module):
    """The "direct combination" of the ablations without SAM or CMA: the mean of both maps [D9]."""

    def __init__(self, site):
        super().__init__()
        self.key = (site.stage, site.level)

    def forward(self, h, taps):
        return (h + taps[self.key]) / 2                                     # (B, C, H, W)


class CoDiffusion(nn.Module):
    """Both branches; cfg may leave one out.  z, size: channels and width of the latents."""

    def __init__(self, cfg, z, size):
        super().__init__()
        middle = attention_at(          # (): only between the two mid blocks
            (), lambda site: SelfAttention(site.channels, cfg.head_dim, cfg.groups, bias=True))

        def fusion(site):
            """The module for a place of the U-Net: SAM ends a level down, CMA a level up [D9]."""
            if site.where == "block" and site.last and site.stage == "down":
                return SAM(site) if cfg.sam else Mean(site)
            if site.where == "block" and site.last and site.stage == "up":
                return CMA(site, cfg.head_dim, cfg.groups, cfg.cma_out) if cfg.cma else Mean(site)
            return middle(site)
        shape = (z, z, cfg.base, cfg.mult, cfg.blocks, size, cfg.groups)
        self.branches = nn.ModuleDict()
        if cfg.rdb:
            self.branches["residual"] = UNet(*shape, middle)
        if cfg.edb:
            self.branches["enhanced"] = UNet(*shape, fusion if cfg.rdb else middle)

    def forward(self, states, t):
        """states: {branch: (B, z, h, w)} at the times t (B,).  Returns {branch: prediction}.

        The residual branch comes first and writes its maps into taps.  The enhanced branch reads
        them.  No gradient is stopped: L_enh trains the residual branch, too, through its maps.
        """
        taps = {}
        grads = {}
        if "residual" in self.branches:
            grads["residual"] = self.branches["residual"](states["residual"], t, taps=taps)
        if "enhanced" in self.branches:
            grads["enhanced"] = self.branches["enhanced"](states["enhanced"], t, condition=taps)
        return grads


class Evaluator(nn.Module):
    """H_E of Sec. 3.5: the latent of A from those of B and of the residual [D11]."""

    def __init__(self, z, width=64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2 * z, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, z, 3, padding=1))

    def forward(self, y, r):
        """(B, z, h, w) each.  Returns the estimate of x, (B, z, h, w)."""
        return self.layers(torch.cat([y, r], dim=1))


# ---- 4. Maths and losses -------------------------------------------------------------------------


def at(table, t, like):
    """Entries t (B,) of a table (T,), as (B, 1, 1, 1) like a tensor."""
    return table.to(like.device, like.dtype)[t][:, None, None, None]


def q_sample(t, x0, x, eps):
    """Eqs. (1) and (4): the state at the times t (B,), (B, z, h, w) [D1].

    x0: latent of the target, r or y.  x: latent of the source.  eps: N(0,1) noise.
    """
    m = at(M, t, x)                                                         # (B, 1, 1, 1)
    return (1 - m) * x0 + m * x + (2 * m * (1 - m)).sqrt() * eps


def bridge_loss(wanted, grad, t, kind):
    """Eqs. (3) and (6), mean over all elements.  wanted, grad: (B, z, h, w); t: (B,).

    l1 leaves out the factor c_t and the square, as BBDM's code does [D3].  l2 is as printed, with
    c_t = 1 - m_{t-1} / m_t, divided by its mean over t.  This mean is .0075.  Without the division,
    Eq. (11) would outweigh both branches.
    """
    if kind == "l1":
        return F.l1_loss(grad, wanted)
    before = torch.cat([torch.zeros(1, dtype=M.dtype), M[:-1]])             # (T,)
    c = 1 - before / M                                                      # (T,)
    return (at(c / c.mean(), t, grad) * (grad - wanted) ** 2).mean()


def bridge_step(x_t, x0, x, m_t, m_n, noise, eta=1.0):
    """Eqs. (2) and (5): draw x_n, nearer to the target, given x_t and x_0 (or its estimate).

    m_t, m_n: numbers, places of both, m_n < m_t.  noise: N(0,1) like x_t.  eta: 1 is the paper's
    random process, 0 adds no new noise.

    The variance delta_n has two parts.  New noise has d = eta^2 2 m_n (m_t - m_n) / m_t, and the
    old noise of x_t has the rest.  Any list of times may be used.  With eta = 1, x cancels:
        x_n = x_0 + k (x_t - x_0) + sqrt(2 m_n (1 - k)) noise,  k = m_n / m_t.
    """
    delta_t = 2 * m_t * (1 - m_t)
    delta_n = 2 * m_n * (1 - m_n)
    d = eta ** 2 * 2 * m_n * (m_t - m_n) / m_t
    share = ((delta_n - d) / delta_t) ** 0.5
    old_noise = x_t - (1 - m_t) * x0 - m_t * x                              # (B, z, h, w)
    return (1 - m_n) * x0 + m_n * x + share * old_noise + d ** 0.5 * noise


def inconsistency(x, x_hat):
    """The squared error of H_E at each place of the latent: (B, z, h, w) twice -> (B, h, w).

    We take minus its mean as the LCS, so 0 is the best score [D10].  It cannot see every error:
    A is B - 2 residual, so errors 2 e in B and e in the residual cancel (in latents, about so).
    """
    return ((x - x_hat) ** 2).mean(1)


# ---- 5. Sampler ----------------------------------------------------------------------------------


@torch.no_grad()
def sample(gradients, x, times, noise, watch=None):
    """From the source x (B, z, h, w) to the targets of all branches, {branch: (B, z, h, w)}.

    gradients(states, t) -> {branch: prediction}.  times: falling, from common/schedules.py.
    noise: {branch: function () -> fresh N(0,1) like x}, independent of each other [D5].
    watch: a list that gets (title, state, estimate of x0) of each step, last branch.
    """
    states = {branch: x for branch in noise}
    for i, time in enumerate(times):
        t = torch.full((len(x),), time, device=x.device)                    # (B,)
        grads = gradients(states, t)
        ends = {branch: states[branch] - grads[branch] for branch in states}    # estimates of x0
        if watch is not None:
            last = list(states)[-1]
            watch.append((f"t = {time}", states[last], ends[last]))
        if i + 1 == len(times):
            return ends
        m_t = float(M[time])
        m_n = float(M[times[i + 1]])
        for branch, x0 in ends.items():
            states[branch] = bridge_step(states[branch], x0, x, m_t, m_n, noise[branch]())


@dataclass
class Model:
    """Everything that sampling needs, trained and frozen."""
    cfg: Config
    run: object                                     # common.run.Run: device, precision, randomness
    contrasts: list
    ae: nn.Module
    evaluator: nn.Module
    networks: nn.Module                             # CoDiffusion

    def draw(self, A, keys, watch=None):
        """One sample for each source A (B, 1, H, W) in [-1,1].

        keys: (subject, slice number, number of the sample).  They fix the noise, so that a sample
        comes out the same in any batch or order.
        Returns {"enhanced": B, "residual": B from the residual image}, (B, 1, H, W) each, and the
        inconsistency (B, h, w).  If there is one branch only, the inconsistency is None.
        """
        x = self.ae.to_latent(A)                                            # (B, z, h, w)
        noise = {}
        for branch in self.networks.branches:
            _, noise[branch] = self.run.noise([(*key, branch) for key in keys], x)
        seen = None if watch is None else []

        def gradients(states, t):
            with self.run.autocast():
                grads = self.networks(states, t)
            return {branch: grad.float() for branch, grad in grads.items()}
        ends = sample(gradients, x, falling_times(T, self.cfg.S), noise, seen)  # (B, z, h, w) each
        for title, state, estimate in seen or ():
            watch.append((title, self.ae.from_latent(state), self.ae.from_latent(estimate)))
        images = {branch: self.ae.from_latent(end) for branch, end in ends.items()}
        if "residual" in images:
            images["residual"] = add_residual(A, images["residual"])        # (B, 1, H, W)
        if len(ends) < 2:
            return images, None
        return images, inconsistency(x, self.evaluator(ends["enhanced"], ends["residual"]))

    def fill(self, u, known, keys, watch=None):
        """Make B from A in every slice.  common/trained.py calls this.

        u: (B, C, H, W) in [0,1]; known: (B, C) bool; keys: (subject, slice number) of each slice;
        watch: a list for the states of the sampler, or None.
        Returns u with B in place, and a dict: "notes" with "samples" (B, K, H, W).  Two branches
        add "lcs" (B, K) and "inconsistency" (B, K, h, w) to them, and "A + residual" to the dict.
        ValueError if A is unknown in a slice, or if B is known.
        """
        src, tgt = channels(self.cfg, self.contrasts)
        if not known[:, src].all() or known[:, tgt].any():
            raise ValueError("fill: this model makes {0} from {1}; in every slice {1} must be known"
                             " and {0} missing".format(self.contrasts[tgt], self.contrasts[src]))
        K = self.cfg.samples
        A = 2 * u[:, src, None] - 1                                         # (B, 1, H, W)
        each = []                                                           # B*K keys
        for key in keys:
            each += [(*key, k) for k in range(K)]
        images, wrong = self.draw(A.repeat_interleave(K, dim=0), each, watch)
        made = {}
        for branch, image in images.items():
            made[branch] = ((image + 1) / 2)[:, 0].unflatten(0, (-1, K))    # (B, K, H, W)
        samples = made.get("enhanced", made.get("residual"))                # (B, K, H, W)
        notes = {"samples": samples}
        chosen = samples[:, 0]                                              # (B, H, W)
        if wrong is not None:
            wrong = wrong.unflatten(0, (-1, K))                             # (B, K, h, w)
            lcs = -wrong.mean((2, 3))                                       # (B, K)
            notes.update(inconsistency=wrong, lcs=lcs)
            if self.cfg.select == "lcs":
                chosen = samples[torch.arange(len(u)), lcs.argmax(1).cpu()]     # (B, H, W)
        extras = {"notes": notes}
        if len(made) == 2:
            extras["A + residual"] = u.clone()                              # (B, C, H, W)
            extras["A + residual"][:, tgt] = made["residual"][:, 0]
        filled = u.clone()                                                  # (B, C, H, W)
        filled[:, tgt] = chosen
        return filled, extras


# ---- 6. Training ---------------------------------------------------------------------------------


def train(cfg, run, ds):
    """All stages.  A stage that is finished is not trained again."""
    slices = ds.part("train")
    picture = make_picture(cfg, run, slices, ds.contrasts)
    unseen = ds.part("val")
    validation = (make_picture(cfg, run, unseen, ds.contrasts), KINDS * len(unseen))
    ae = train_autoencoder(run, picture, KINDS * len(slices), validation,
                           lambda: make_autoencoder(cfg), cfg.ae_steps, cfg.ae_batch, cfg.ae_lr,
                           cfg.disc_weight)
    latents = make_latents(cfg, run, ds, "train", ae)
    of_validation = make_latents(cfg, run, ds, "val", ae) if len(unseen) else None
    evaluator = train_evaluator(cfg, run, latents)
    run.about["latent"] = list(latents.shape[:2])
    train_bridges(cfg, run, "bridges", latents, of_validation, evaluator)


def train_evaluator(cfg, run, latents):
    """Stage "evaluator": H_E learns x from the true y and r (Sec. 3.5); then it is frozen [D10]."""
    torch.manual_seed(seed_of(run.seed, "evaluator"))
    H_E = Evaluator(latents.shape[0]).to(run.device)
    optimiser = torch.optim.Adam(H_E.parameters(), lr=1e-3, fused=True)
    parts = {"H_E": H_E, "optimiser": optimiser}
    batch = min(64, latents.count)
    for step in run.steps("evaluator", cfg.evaluator_steps, parts, batch):    # continues; saves
        x, y, r = latents(run.order("evaluator", latents.count, batch, step))   # (B, z, h, w) each
        loss = F.mse_loss(H_E(y, r), x)
        # run.update is zero_grad, backward, clipping of the gradient, and optimiser.step.
        run.update(loss, optimiser)
        run.log(loss=loss)
    return H_E.eval().requires_grad_(False)


def train_bridges(cfg, run, stage, latents, of_validation, H_E):
    """Stage "bridges": L_res + L_enh + lambda L_lcs, for both branches together.

    The averaged weights with the lowest validation loss are kept.
    """
    torch.manual_seed(seed_of(run.seed, stage))
    z, height, _ = latents.shape
    networks = CoDiffusion(cfg, z, height).to(run.device, memory_format=torch.channels_last)
    ema = EMA(networks, cfg.ema)
    best = Best(networks)
    optimiser = torch.optim.Adam(networks.parameters(), lr=cfg.lr, fused=True)
    parts = {"networks": networks, "ema": ema, "best": best, "optimiser": optimiser}
    network = torch.compile(networks) if run.args.compile else networks     # the same weights
    mine = run.shard(cfg.batch)                                    # this process's share of a batch
    for step in run.steps(stage, cfg.steps, parts, cfg.batch):
        pick = run.order(stage, latents.count, cfg.batch, step)[mine]       # (B,)
        x, y, r = latents(pick)                                             # (B, z, h, w) each
        # g gives the random numbers of this step.  They are drawn for the whole batch, and each
        # process takes its share.
        g = run.generator(stage, step)
        t = torch.randint(T, (cfg.batch,), generator=g, device=run.device)[mine]    # (B,)
        noise = torch.randn(2, cfg.batch, *x.shape[1:], generator=g, device=run.device)[:, mine]
        losses = bridge_losses(cfg, run, network, H_E, x, y, r, t, noise)
        loss = sum(losses.values())                                         # ()
        run.update(loss, optimiser)
        ema.update(networks, step)
        run.log(loss=loss, **losses)
        if of_validation and ((step + 1) % max(1, cfg.steps // 10) == 0 or step + 1 == cfg.steps):
            value = validate(cfg, run, ema.model, of_validation, H_E)
            run.log(validation=value)
            best.offer(ema.model, value)


def bridge_losses(cfg, run, network, H_E, x, y, r, t, noise):
    """The weighted losses, {name: ()}.  x, y, r: (B, z, h, w); t: (B,); noise: (2, B, z, h, w).

    Both branches share the time t, but their noise is independent [D5].  With equal noise, the
    difference of the two states would be (1 - m_t) (y - r), without any noise.  The enhanced branch
    knows both and would learn to read y off the difference, which is 0 when sampling starts.
    """
    targets = {"residual": r, "enhanced": y}
    eps = {"residual": noise[0], "enhanced": noise[1]}
    states = {}
    for branch, x0 in targets.items():
        states[branch] = q_sample(t, x0, x, eps[branch])                    # (B, z, h, w)
    with run.autocast():
        grads = network(states, t)                                          # (B, z, h, w) each
    losses = {}
    ends = {}
    for branch, grad in grads.items():
        # The printed target m_t (x - x_0) + sqrt(delta_t) eps is x_t - x_0.  So x_t minus the
        # prediction is an estimate of x_0, at every time.
        wanted = states[branch] - targets[branch]                           # (B, z, h, w)
        losses[branch] = bridge_loss(wanted, grad.float(), t, cfg.loss)     # Eq. (3) or (6)
        ends[branch] = states[branch] - grad.float()                        # (B, z, h, w)
    if cfg.lcs and len(ends) == 2:
        # Eq. (11).  H_E is frozen, but gradients pass through it to both branches.
        with full_precision(x.device):
            x_hat = H_E(ends["enhanced"], ends["residual"])                 # (B, z, h, w)
            losses["lcs"] = cfg.lcs * F.mse_loss(x_hat, x)
    return losses


@torch.no_grad()
def validate(cfg, run, networks, latents, H_E):
    """The mean loss of up to 64 validation slices; times and noise are always the same."""
    rows = data.evenly(np.arange(latents.count), 64)                        # (V,)
    x, y, r = latents(rows)                                                 # (V, z, h, w) each
    g = run.generator("validation")
    t = torch.randint(T, (len(x),), generator=g, device=run.device)         # (V,)
    noise = torch.randn(2, *x.shape, generator=g, device=run.device)
    return float(sum(bridge_losses(cfg, run, networks, H_E, x, y, r, t, noise).values()))


def load_model(cfg, run, subjects):
    """The trained networks of a run folder."""
    ae = load_autoencoder(run, lambda: make_autoencoder(cfg))
    z, height = run.about["latent"]
    evaluator = run.trained(Evaluator(z), "evaluator", "H_E")
    # The best averaged weights, or without validation subjects the last ones.
    networks = run.trained(CoDiffusion(cfg, z, height), "bridges", "best", "ema")
    networks = torch.compile(networks) if run.args.compile else networks
    return Model(cfg, run, run.about["contrasts"], ae, evaluator, networks)


# ---- 7. Figures and tables -----------------------------------------------------------------------
# The rows of the paper's tables are data: data/paper_tables/rlbcd.json.


def beside(cfg, run, model, truth, notes):
    """Further images to score, for which the truth is needed, {name: (n, H, W)}.

    "autoencoder alone" is the truth, encoded and decoded.  The bridges hardly get above it.
    confidence.rules: first, mean, best LCS ... of samples.  truth: (n, H, W).  notes: of fill.
    """
    again = []
    for part in np.array_split(truth, -(-len(truth) // cfg.sample_batch)):
        B = 2 * torch.from_numpy(part)[:, None].to(run.device) - 1          # (n', 1, H, W)
        with torch.no_grad():
            decoded = model.ae.from_latent(model.ae.to_latent(B))           # (n', 1, H, W)
        again.append(((decoded + 1) / 2)[:, 0].cpu().numpy())
    found = {"autoencoder alone": np.concatenate(again)}
    if notes["samples"].shape[1] > 1:
        found.update(confidence.rules(notes["samples"], notes.get("lcs"), "LCS", truth))
    return found


def figure2(cfg, run, ds, model):
    """Fig. 2 shows maps of both branches; this measures how alike they are, level by level.

    As in the paper, the bridges run on images.  Each branch is trained alone.
    """
    nets = {}
    for name, left_out in (("residual", "edb"), ("enhanced", "rdb")):
        alone = dict(rdb=True, edb=True, bottleneck="none", ae_mult=(1,), samples=1, select="first")
        alone = replace(cfg, **{**alone, left_out: False})
        latents = make_latents(alone, run, ds, "train", make_autoencoder(alone).to(run.device))
        train_bridges(alone, run, f"figure 2, {name}", latents, None, None)
        trained = run.trained(CoDiffusion(alone, 1, cfg.size), f"figure 2, {name}", "ema")
        nets[name] = trained.branches[name]
    rows = data.evenly(ds.spread("test", cfg.test_slices), 16)
    x, y, r = make_picture(cfg, run, ds.images[rows], ds.contrasts)(
        np.arange(KINDS * len(rows))).unflatten(0, (-1, KINDS)).unbind(1)   # (B, 1, H, W) each
    ends = {"residual": r, "enhanced": y}

    def maps(name, time, eps):
        """The maps of one branch on the way from A to its end, {(stage, level): (B, C, H, W)}."""
        t = torch.full((len(x),), time, device=run.device)                  # (B,)
        taps = {}
        nets[name](q_sample(t, ends[name], x, eps), t, taps=taps)
        return taps
    features.compare(run, "fig2", maps, list(nets), x.shape, (100, 300, 500, 700, 900))


def figure4(cfg, run, ds, model):
    """Fig. 4: is a sample with a high LCS a good one?  Ten samples of up to 200 slices [D12]."""
    model = replace(model, cfg=replace(cfg, samples=max(10, cfg.samples)))
    source, target = pair_of(cfg, ds.contrasts)
    src, tgt = channels(cfg, ds.contrasts)
    rows = data.evenly(ds.spread("test", cfg.test_slices), 200)
    if not (cfg.rdb and cfg.edb):
        raise RunError("fig4: the LCS needs both branches, and this run has one of them only")
    notes = notes_of(run, ds, model, rows, [source], max(1, cfg.sample_batch // 10))
    images = np.asarray(ds.images[rows], np.float32)                        # (n, C, H, W)
    truth = images[:, tgt]                                                  # (n, H, W)
    place = notes["inconsistency"][:, 0].repeat(model.ae.f, 1).repeat(model.ae.f, 2)    # (n, H, W)
    confidence.report(run, "fig4", "LCS", notes["lcs"], notes["samples"], truth, ds.subject[rows],
                      f"{source}->{target}", beside(cfg, run, model, truth, notes), images[:, src],
                      place)


def judge(cfg, run, ds, task):
    """Tables 5, 6: are labels or lesions easier to predict with B?  See common/value.py [D12]."""
    return value_rows(run, ds, task, cfg.value) if cfg.value else []


def outline(cfg, ds):
    """For a dry run: the networks, and one latent through both U-Nets."""
    ae = make_autoencoder(cfg)
    height = cfg.size // ae.f
    networks = CoDiffusion(cfg, ae.z, height)
    x = torch.zeros(1, ae.z, height, height)
    source, target = pair_of(cfg, ds.contrasts)
    lines = [f"{source} -> {target}; image (1, 1, {cfg.size}, {cfg.size}) -> latent "
             f"{tuple(x.shape)}, t (1,) -> gradients {tuple(x.shape)}"]
    named = {"autoencoder": ae, "both U-Nets": networks, "H_E": Evaluator(ae.z)}
    states = {"residual": x, "enhanced": x}
    before = {"ae_batch": (False, lambda: ae(torch.zeros(1, 1, cfg.size, cfg.size)))}
    return Outline(named, lambda: networks(states, torch.zeros(1)), lines=lines, before=before,
                   slices=cfg.batch * cfg.steps)


# ---- 8. Main -------------------------------------------------------------------------------------

METHOD = script.Method(
    "RLBCD", Config, PRESETS, LIMITS, SAMPLING, STAGES, train=train, load=load_model,
    contrasts=lambda cfg: typed_pair(cfg.source, cfg.target), outline=outline,
    patterns=lambda cfg, contrasts: one_task(pair_of(cfg, contrasts)),
    beside=beside, judge=judge, regions=("body", "lesion"),
    figures={"fig2": ("are the maps of both branches alike?", figure2),
             "fig4": ("does the LCS find good samples?", figure4)})

# From Python: rlbcd.load("runs/rlbcd-petct") is a common.trained.Trained: .fill(images, known).
load, main = script.entrances(METHOD, __doc__)

if __name__ == "__main__":
    script.guarded(main)
