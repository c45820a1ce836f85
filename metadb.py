"""MetaDB: one MR contrast from another (or CT from MR) by a diffusion bridge that is told, in words, what both images are.

"MetaDB: a metadata-guided diffusion bridge for medical image translation", ICMR 2026, doi 10.1145/3805622.3810728.

THE IDEA.  A diffusion bridge does not start from noise: its states walk from the source image y (step N) to the target x0
(step 0).  A generator looks at the state and at y and predicts x0; the next state is drawn from the exact Gaussian posterior.
What the two images are - patient, scanner, contrast, echo times - is written as two prompts, one for each, and enters twice:
  1. TA-Norm: in the blocks of the U-Net, feature maps are stripped of the source's look and given the target's, by gains
     and shifts that are computed from the embeddings of the two prompts;
  2. SR-Net: from the prediction, pooled to a few numbers, and the target's prompt with its contrast masked, a small network
     must recover the embedding of the unmasked prompt; so the prediction must show what the prompt says.
A discriminator, which sees no text, judges pairs of neighbouring states, so that predictions become sharp.

PIPELINE (B slices, H x W pixels, D width of an embedding)
  prompts --text encoder, frozen--> E_s, E_t, E_mask (B,D)                                       stage "encoder"
  x_t, y, x_r (B,1,H,W each), t, E_s, E_t --generator, R times--> x0_hat (B,1,H,W)               stage "bridge"
  x0_hat, x_t, y --posterior--> x_{t-1}          N steps from x_N down to x_0 = the last x0_hat; N R passes for a sample

EQUATIONS (departures from them and from the text: [D1] to [D8])
  Eq. (1)  q(x_t | x0, y) = N(a_t x0 + m_t y, delta_t^2),  a_t = 1 - m_t;  the tables of a, m and delta: bridge_tables
  Eq. (2)  x0_hat = G(x_t, t, y, E_text)
  Eq. (3)  F <- (F - beta_s) / alpha_s * alpha_t + beta_t
  Eq. (4)  F_p = concat(AvgPool(x0_hat), MaxPool(x0_hat)),   Eq. (5)  E_rec = R_M(E_mask, F_p)
  Eq. (6)  L_rec = | x0_hat - x0 |,   Eq. (7)  L_sem = 1 - cos(E_t, E_rec),   Eq. (8)  L_adv = -log D(x_t, x_{t-1})
  Eq. (9)  L = L_rec + lambda_1 L_adv + lambda_2 L_sem

SYMBOLS   x0 target, y source, x_t state, x0_hat prediction, x_r the prediction of the pass before (all in [-1,1]);
  a, m, delta: tables over the steps 0..N;  E_s, E_t: embeddings of the two prompts, E_mask that of the target's with its
  contrast masked;  R_M: the small network of SR-Net, F_p what it sees of the prediction;  u: an image in [0,1] as stored,
  x = 2u - 1.

COMMANDS
  python metadb.py --data data/ixi --train --evaluate                      a phantom is made on first use; CPU, minutes
  python metadb.py --data FOLDER --source t1 --target ct --train --evaluate            your own scans, the paper's sizes
  python metadb.py --data FOLDER --synthesize --out runs/metadb-FOLDER                 NIfTI volumes
  python metadb.py --data OTHER --evaluate --out runs/metadb-FOLDER                    on data of another kind (Fig. 5, top)
  python metadb.py --data data/ixi --reproduce table3                      a table of the paper (--reproduce list: all)

DEPARTURES FROM THE PAPER
  [D1]  The frozen BiomedCLIP text tower is replaced by that of a small CLIP trained on the training subjects; it has seen no
        prompts but theirs, with all four fields (Table 5 leaves some out).  clip.embed puts a LayerNorm behind it.
        --text-file takes embeddings of your own.
  [D2]  "x_T = y" is taken literally (bridge hard): no noise at the end.  The paper's constants (N = 10, R = 2, betas .1 and
        3.0) are known from SelfRDB, where x_N is y with noise of 1.08 (bridge soft).  Both use SelfRDB's betas: linear in
        sqrt(beta) from .1 to 3/N, the first half mirrored.
  [D3]  TA-Norm sits behind the second GroupNorm, and its time embedding, of the blocks on the way down and up that keep the
        resolution.  alpha = .1 + .9 sigmoid: without the floor one divides by almost 0.  The two prompts have maps of their
        own; with one map (--share) rows of Table 5 whose two prompts are equal would do nothing at all.
  [D4]  L_sem is 1 - cosine (the paper adds a cosine to a loss that is minimised).  Eq. (4) as printed is two numbers, and the
        maximum of a normalised image is 1: we pool to 1, 2, 4 and 8 squares a side; --pool 1 is the literal one.
        With one direction the masked words never change, and R_M can answer without the image.  The log shows whether it
        does: sem_gain is the rise of L_sem when R_M is shown the source in place of the prediction.  --sem-real teaches R_M
        on real images of both contrasts.  In a prompt without a description nothing is masked.
  [D5]  Real pairs of the discriminator are drawn jointly (x_{t-1} from the posterior of x_t and the true x0).  The
        discriminator's loss, which the paper leaves out, is the usual one with an R1 penalty on x_{t-1} (weight 1, every
        tenth step).  All losses are means over pixels or patches; by that the weights of Eq. (9) are to be read.
  [D6]  R passes in training, too, with gradients through all; the first sees zeros for x_r, the loss is on the last.
        Learning rates fall along a cosine to 1e-5.  Five times in a training 16 validation slices are sampled; the weights
        with the lowest error are kept.
  [D7]  Slices are centre-padded to the image size (the paper resizes), intensities normalised per volume, all slices with
        enough foreground used for training (the paper: 100 per subject).
  [D8]  Rivals in Table 2 are this script with other switches and without text, which the paper gives to all: Pix2Pix is a
        bridge of one step, SynDiff its diffusion half (pairs, no cycles); DDBM and DBIM are one model.  Cross-attention
        (Table 4) reads words, behind the blocks at maps up to 32 pixels.  "none" in Table 6 lacks SR-Net, too: the paper's
        number is that of Table 3's first row.  The segmenter of Fig. 6 is small and trained on real slices of the target.

NEEDS  common/{unet,clip,run,results,downstream,cli,metrics,pictures}.py  data/
"""
import math
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import data
from common import clip, downstream
from common.cli import parse
from common.results import Task, list_tables, report, reproduce, synthesize
from common.run import Best, Run, RunError, guarded, restore, seed_of, stored_config
from common.unet import Attention, UNet, attention_at, sinusoid, zeroed
from data.files import DataError
from data.layouts import canonical_contrast
from data.prompts import PROMPT_FIELDS, prompt

# ---- 1. Config -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Defaults are the paper's (Sec. 4.1) wherever it states them; phantoms take PRESETS["demo"] instead."""
    # data
    source: tuple[str, ...] = ("t1",)           # contrasts to start from
    target: tuple[str, ...] = ("t2",)           # contrasts to make; with several, one model learns every pair of two
    size: int = 256                             # height and width of a slice in pixels
    train_fraction: float = 0.625               # share of the subjects that train (IXI: 25 of 40)
    test_subjects: int = 10                     # subjects that are scored; the remaining ones validate
    test_slices: int = 100                      # slices scored per test subject, spread over the body
    # networks
    encoder: Literal["base", "demo"] = "base"   # size of the text and image encoders (common/clip.py)
    base: int = 64                              # U-Net channels at full resolution
    mult: tuple[int, ...] = (1, 1, 2, 2, 4, 4)  # channel multipliers, one per resolution
    blocks: int = 2                             # residual blocks per resolution
    attention: tuple[int, ...] = (16,)          # map sizes that get self-attention
    head_dim: int = 64                          # width of an attention head
    groups: int = 16                            # groups of every GroupNorm
    disc_base: int = 64                         # discriminator channels at full resolution
    # training
    encoder_steps: int = 5_000                  # of the encoder
    encoder_batch: int = 64                     # slices per step of the encoder
    encoder_lr: float = 5e-4                    # peak learning rate of the encoder
    epochs: int = 50                            # passes over the training slices
    batch: int = 16                             # slices per step, over all processes
    lr: float = 1.6e-4                          # peak learning rate of generator and SR-Net (Adam)
    lr_d: float = 1e-4                          # peak learning rate of the discriminator (Adam)
    # method, in training
    bridge: Literal["hard", "soft", "ddbm", "ddpm"] = "hard"      # noise along the bridge [D2]; ddpm: no bridge at all
    N: int = 10                                 # steps of the bridge
    R: int = 2                                  # passes of the generator per step, each sees the result of the one before
    conditioning: Literal["ta", "xattn", "none"] = "ta"           # how prompts enter the U-Net (Table 4)
    prompts: Literal["both", "source", "target"] = "both"         # which of them TA-Norm reads (Table 6)
    share: bool = False                         # one map for both prompts [D3]
    fields: tuple[str, ...] = PROMPT_FIELDS     # what a prompt says: age, gender, scanner, description (Table 5)
    text_file: str = ""                         # .npz with your own embeddings of the prompts, e.g. BiomedCLIP's [D1]
    lambda_adv: float = 0.1                     # lambda_1 of Eq. (9); 0: no discriminator
    lambda_sem: float = 0.01                    # lambda_2 of Eq. (9); 0: no SR-Net (Table 3)
    pool: tuple[int, ...] = (1, 2, 4, 8)        # Eq. (4) pools to 1x1, 2x2, ... squares [D4]
    sem_real: bool = False                      # SR-Net learns from real images of both contrasts, too [D4]
    # method, in sampling
    only: tuple[str, ...] = ()                  # one direction, as source,target, of a model that knows several
    eta: float = 1.0                            # noise of the posterior: 1 Markov, 0 none but in the first step (DBIM)
    noise: float = 0.0                          # of sigma NOISE/255, added to the source of test slices (Fig. 5: 10)
    segment: bool = False                       # a segmenter, trained on real slices, draws on the results: Dice (Fig. 6)
    segment_steps: int = 10_000                 # of the segmenter
    sample_batch: int = 24                      # slices sampled at once; changes the result by rounding only
    dump_prompts: str = ""                      # write every prompt that this run would read to this text file, and stop

    def __post_init__(self):
        if self.size % 2 ** max(3, len(self.mult) - 1):    # the discriminator halves three times
            raise ValueError(f"--size {self.size}: must be a multiple of {2 ** max(3, len(self.mult) - 1)}")
        for m in self.mult:
            if self.base % self.groups or self.base * m % self.head_dim:
                raise ValueError(f"--base {self.base} must be divisible by --groups {self.groups}, and times --mult {m} by "
                                 f"--head-dim {self.head_dim}")
        unknown = set(self.fields) - set(PROMPT_FIELDS)
        if unknown:
            raise ValueError(f"--fields {','.join(self.fields)}: there are {', '.join(PROMPT_FIELDS)}")
        if self.conditioning != "ta" and (self.share or self.prompts != "both"):
            raise ValueError("--share and --prompts belong to TA-Norm: they need --conditioning ta")
        if self.share and self.prompts != "both":
            raise ValueError("--share is one map for both prompts: it needs --prompts both")
        if not any(canonical_contrast(s) != canonical_contrast(t) for s in self.source for t in self.target):
            raise ValueError(f"--source {','.join(self.source)} --target {','.join(self.target)}: name two different contrasts")
        if self.size < 2 * max(self.pool):
            raise ValueError(f"--pool {','.join(map(str, self.pool))}: more squares than --size {self.size} can fill")


# Fields that may change without training again; all others make another run.
SAMPLING = ("only", "eta", "noise", "segment", "segment_steps", "sample_batch", "test_slices", "dump_prompts")
PRESETS = {
    "paper": {},
    "demo": dict(size=64, train_fraction=2 / 3, test_subjects=6, test_slices=3, encoder="demo", base=16, mult=(1, 2, 2, 4),
                 blocks=1, attention=(8,), head_dim=16, groups=8, disc_base=16, encoder_steps=150, encoder_batch=24,
                 encoder_lr=1e-3, epochs=25, batch=8, lr=5e-4, lr_d=3e-4, segment_steps=600),
}
LIMITS = dict(size=(16, 1024), train_fraction=(0.01, 0.99), mult=(1, 16), groups=(1, 64), encoder_steps=(0, 10 ** 9),
              encoder_batch=(2, 65536), N=(1, 1000), R=(1, 10), lambda_adv=(0, 1e3), lambda_sem=(0, 1e3), pool=(1, 64),
              eta=(0, 1), noise=(0, 255))
# The stages of training, in order.  A change of a listed field trains again from its stage on, that of any other field (but
# those of SAMPLING) everything.
STAGES = {"encoder": (), "bridge": (
    "base", "mult", "blocks", "attention", "head_dim", "groups", "disc_base", "epochs", "batch", "lr", "lr_d", "bridge", "N",
    "R", "conditioning", "prompts", "share", "fields", "lambda_adv", "lambda_sem", "pool", "sem_real")}

# ---- 2. Data ---------------------------------------------------------------------------------------------------------


def open_data(cfg, args, run):
    """The data set as slices: .images (n, C, size, size) float16 in [0,1], memory-mapped; the split is by person."""
    contrasts = tuple(run.about.get("contrasts", dict.fromkeys(map(canonical_contrast, cfg.source + cfg.target))))
    return run.first(lambda: data.open_dataset(
        args.data, contrasts, cfg.size, args.split, train_fraction=cfg.train_fraction, test_subjects=cfg.test_subjects,
        cache=args.cache, workers=args.workers, say=run.say))


def all_directions(cfg, contrasts):
    """All (source, target) pairs of different contrasts, as channel numbers."""
    sources, targets = ([contrasts.index(canonical_contrast(c)) for c in names] for names in (cfg.source, cfg.target))
    return [(s, t) for s in sources for t in targets if s != t]


def directions(cfg, contrasts):
    """The same; with --only, just that one."""
    pairs = all_directions(cfg, contrasts)
    only = tuple(map(canonical_contrast, cfg.only))
    if not only:
        return pairs
    chosen = [(s, t) for s, t in pairs if (contrasts[s], contrasts[t]) == only]
    if not chosen:
        there = ", ".join(f"{contrasts[s]},{contrasts[t]}" for s, t in pairs)
        raise RunError(f"--only {','.join(cfg.only)}: this model knows {there}", status=2)
    return chosen


def prompts_of(subjects, contrasts, fields, masked=()):
    """{(subject, contrast number): prompt}.  subjects: layouts.Subject, with what is known of them in .meta."""
    return {(s.name, c): prompt(name, s.meta, fields, masked) for s in subjects for c, name in enumerate(contrasts)}


# Embeddings E_s, E_t, E_mask (B, D), and for cross-attention the words of both prompts (B, L, K), of which some are padding
Text = namedtuple("Text", "e_s e_t e_mask words is_word")


class Prompts:
    """The embeddings of every subject's prompts, computed once: the text encoder is frozen.

    table: {prompt: features}, from the encoder or from the user's file (common/clip.py).
    """

    def __init__(self, table, cfg, subjects, contrasts, device):
        whole, hidden = prompts_of(subjects, contrasts, cfg.fields), prompts_of(subjects, contrasts, cfg.fields, ("modality",))
        try:
            found, masked = clip.embed(table, whole.values()), clip.embed(table, hidden.values())
        except ValueError as error:                                             # a prompt that the user's file lacks
            raise RunError(f"--text-file {cfg.text_file}: {error}") from error
        if cfg.conditioning == "xattn" and found.tokens is None:
            raise RunError(f"--text-file {cfg.text_file}: holds no tokens, which --conditioning xattn needs; add them")
        self.row, self.device = {key: i for i, key in enumerate(whole)}, device
        self.whole, self.masked = found.pooled.to(device), masked.pooled.to(device)                 # (P, D) each
        self.words, self.is_word = (found.tokens, found.mask) if cfg.conditioning == "xattn" else (None, None)

    def __call__(self, subjects, source, target):
        """Text for slices of these subjects; source, target: one channel number per slice."""
        s, t = (torch.tensor([self.row[name, int(c)] for name, c in zip(subjects, channels)]) for channels in (source, target))
        at_s, at_t = s.to(self.device), t.to(self.device)                       # (B,) each
        e_s, e_t, e_mask = self.whole[at_s], self.whole[at_t], self.masked[at_t]        # (B, D) each
        if self.words is None:
            return Text(e_s, e_t, e_mask, None, None)
        words, is_word = (torch.cat([part[s], part[t]], dim=1).to(self.device) for part in (self.words, self.is_word))
        return Text(e_s, e_t, e_mask, words, is_word)                           # words (B, 2L, K), is_word (B, 2L)


def text_table(cfg, encoder, subjects, contrasts):
    """{prompt: features} of all prompts of these subjects, whole and masked; or what the --text-file holds."""
    if cfg.text_file:
        try:
            return clip.load_embeddings(cfg.text_file)[0]
        except ValueError as error:
            raise RunError(str(error)) from error
    return encoder.remember(all_prompts(cfg, subjects, contrasts))


def all_prompts(cfg, subjects, contrasts):
    """Every distinct prompt that a run on these subjects reads."""
    return list(dict.fromkeys(text for masked in ((), ("modality",))
                              for text in prompts_of(subjects, contrasts, cfg.fields, masked).values()))


# ---- 3. Model --------------------------------------------------------------------------------------------------------


def strip(f, alpha, beta):
    """First half of Eq. (3): take the source's look away."""
    return (f - beta) / alpha


def inject(f, alpha, beta):
    """Second half of Eq. (3): give the target's look."""
    return f * alpha + beta


class AffineMap(nn.Module):
    """An embedding (B, D) to alpha in (0.1, 1) and beta in (0, 1), (B, C, 1, 1) each; at the start .89 and .12 for all."""

    def __init__(self, dim, channels):
        super().__init__()
        self.linear = zeroed(nn.Linear(dim, 2 * channels))
        with torch.no_grad():
            self.linear.bias[:channels], self.linear.bias[channels:] = 2.0, -2.0

    def forward(self, e):
        a, b = torch.sigmoid(self.linear(e))[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
        return 0.1 + 0.9 * a, b                                                 # (B, C, 1, 1) each  the floor: [D3]


class TANorm(nn.Module):
    """Eq. (3), Fig. 3.  Both maps start equal, so it starts as the identity (with one prompt alone: close to it)."""

    def __init__(self, channels, dim, prompts, share):
        super().__init__()
        self.source = AffineMap(dim, channels) if prompts != "target" else None
        self.target = AffineMap(dim, channels) if prompts != "source" else None
        if share:
            self.target = self.source

    def forward(self, h, text):
        with torch.autocast(h.device.type, enabled=False):                      # a division: not in bf16
            f = h.float()                                                       # (B, C, H, W)
            if self.source is not None:
                f = strip(f, *self.source(text.e_s))                            # (B, C, H, W)
            if self.target is not None:
                f = inject(f, *self.target(text.e_t))                           # (B, C, H, W)
        return f.to(h.dtype)                                                    # (B, C, H, W)


class CrossAttention(nn.Module):
    """Table 4's rival: every position looks at the words of both prompts.  word_dim: K."""

    def __init__(self, channels, head_dim, word_dim, groups):
        super().__init__()
        self.norm, self.attention = nn.GroupNorm(groups, channels), Attention(channels, head_dim, word_dim)
        self.whose = nn.Parameter(torch.zeros(2, 1, word_dim))                  # tells words of the source from the target's
        zeroed(self.attention.out)

    def forward(self, h, text):
        height, width = h.shape[2:]
        x = self.norm(h).flatten(2).transpose(1, 2)                             # (B, HW, C)
        words = torch.cat([half + mark for half, mark in zip(text.words.chunk(2, dim=1), self.whose)], dim=1)       # (B, 2L, K)
        a = self.attention(x, words, text.is_word)                              # (B, HW, C)
        return h + a.transpose(1, 2).unflatten(2, (height, width))              # (B, C, H, W)


class SelfAttention(nn.Module):
    """The U-Net's own attention; it does not read the prompts."""

    def __init__(self, channels, head_dim, groups):
        super().__init__()
        self.norm, self.attention = nn.GroupNorm(groups, channels), Attention(channels, head_dim)
        zeroed(self.attention.out)

    def forward(self, h, text):
        height, width = h.shape[2:]
        x = self.norm(h).flatten(2).transpose(1, 2)                             # (B, HW, C)
        return h + self.attention(x).transpose(1, 2).unflatten(2, (height, width))      # (B, C, H, W)


class Generator(nn.Module):
    """Eq. (2): x0_hat from the state, the source and its own previous estimate.  dim: D; word_dim: K."""

    def __init__(self, cfg, dim, word_dim):
        super().__init__()
        self.N, self.R = cfg.N, cfg.R
        self_attention = attention_at(cfg.attention, lambda site: SelfAttention(site.channels, cfg.head_dim, cfg.groups))

        def plug(site):                             # what the U-Net gets at a place: site.where is "norm" or "block"
            if site.where == "norm":
                ours = cfg.conditioning == "ta" and site.stage != "mid"
                return TANorm(site.channels, dim, cfg.prompts, cfg.share) if ours else None
            modules = [self_attention(site)]
            if cfg.conditioning == "xattn" and site.stage != "mid" and site.size <= 32:
                modules.append(CrossAttention(site.channels, cfg.head_dim, word_dim, cfg.groups))
            modules = [module for module in modules if module is not None]
            return Chain(modules) if modules else None
        self.unet = UNet(3, 1, cfg.base, cfg.mult, cfg.blocks, cfg.size, cfg.groups, plug)      # 3: x_t, y, x_r

    def forward(self, x_t, t, y, text):
        """x_t, y: (B, 1, H, W); t: (B,) in 1..N.  R passes, each sees the estimate of the one before.  Returns (B, 1, H, W)."""
        time, x_r = 1000 * t / self.N, torch.zeros_like(y)                      # (B,), (B, 1, H, W)
        for _ in range(self.R):
            x_r = torch.tanh(self.unet(torch.cat([x_t, y, x_r], dim=1), time, text).float())    # (B, 1, H, W)
        return x_r                                                              # (B, 1, H, W)  x0_hat


class Chain(nn.ModuleList):
    """Plugs at one place, one behind the other."""

    def forward(self, h, text):
        for module in self:
            h = module(h, text)                                                 # (B, C, H, W)
        return h


class SRNet(nn.Module):
    """Sec. 3.2.2: the whole prompt's embedding from the masked one and the picture, Eqs. (4) and (5).

    No skip connection leads from E_mask to the output: the cosine would begin at almost 1.
    """

    def __init__(self, dim, pool):
        super().__init__()
        self.pool = pool
        self.text, self.image = nn.Linear(dim, dim), nn.Linear(2 * sum(k * k for k in pool), dim)
        self.mix = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def pooled(self, x0_hat):
        """Eq. (4).  x0_hat: (B, 1, H, W) in [-1,1].  Returns F_p (B, 2 sum k^2)."""
        u = (x0_hat + 1) / 2                                                    # (B, 1, H, W)
        parts = [f(u, k).flatten(1) for k in self.pool for f in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)]
        return torch.cat(parts, dim=1)                                          # (B, 2 sum k^2)

    def forward(self, e_mask, f_p):
        """Eq. (5).  e_mask: (B, D); f_p: from pooled().  Returns E_rec (B, D)."""
        return self.mix(torch.cat([self.text(e_mask), self.image(f_p)], dim=1))         # (B, D)


class DiscBlock(nn.Module):
    """A residual block that halves the map; the time is added between its convolutions."""

    def __init__(self, c_in, c_out, emb):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time, self.skip = nn.Linear(emb, c_out), nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, h, emb):
        f = self.conv1(F.leaky_relu(h, 0.2)) + self.time(emb)[:, :, None, None] # (B, C_out, H, W)
        f = self.conv2(F.avg_pool2d(F.leaky_relu(f, 0.2), 2))                   # (B, C_out, H/2, W/2)
        return (f + self.skip(F.avg_pool2d(h, 2))) / math.sqrt(2)               # (B, C_out, H/2, W/2)


class Discriminator(nn.Module):
    """Sec. 3.3: is (x_{t-1}, x_t) a pair of the true bridge?  One logit per patch of about 70 pixels."""

    def __init__(self, base, N):
        super().__init__()
        self.base, self.N, emb = base, N, 4 * base
        self.time = nn.Sequential(nn.Linear(base, emb), nn.LeakyReLU(0.2), nn.Linear(emb, emb), nn.LeakyReLU(0.2))
        self.stem = nn.Conv2d(2, base, 3, padding=1)
        self.blocks = nn.ModuleList(DiscBlock(c_in * base, c_out * base, emb) for c_in, c_out in ((1, 1), (1, 2), (2, 4)))
        self.head = nn.Conv2d(4 * base, 1, 3, padding=1)

    def forward(self, x_prev, x_t, t):
        """x_prev, x_t: (B, 1, H, W); t: (B,).  Returns logits (B, 1, H/8, W/8)."""
        emb = self.time(sinusoid(1000 * t / self.N, self.base))                 # (B, 4*base)
        h = self.stem(torch.cat([x_prev, x_t], dim=1))                          # (B, base, H, W)
        for block in self.blocks:
            h = block(h, emb)                                                   # (B, C, H/2, W/2)
        return self.head(F.leaky_relu(h, 0.2))                                  # (B, 1, H/8, W/8)


# ---- 4. Maths and losses ---------------------------------------------------------------------------------------------


class Bridge:
    """Eq. (1) and its posterior, as tables over the steps 0..N in float64; `at` picks entries for a batch.

    x_t = a_t x0 + m_t y + delta_t eps.  Whatever the tables are, with r_t = x_t - a_t x0 - m_t y the residual noise,
        x_{t-1} = a_{t-1} x0 + m_{t-1} y + c_t r_t + sqrt(v_t) eps,     c_t^2 delta_t^2 + v_t = delta_{t-1}^2,
    which keeps Eq. (1) true at t - 1.  eta = 1: v_t is that of the Markov chain, c_t = kappa_t = (a_t / a_{t-1})
    (delta_{t-1} / delta_t)^2;  eta = 0: no new noise (where delta_N = 0 the first step cannot do without).
    """

    def __init__(self, name, N, eta=1.0):
        self.a, self.m, self.delta = bridge_tables(name, N)                     # (N+1,) each
        a, delta = self.a, self.delta
        self.c, self.v = torch.zeros_like(a), torch.zeros_like(a)               # of the step from t to t - 1
        for t in range(1, N + 1):
            if delta[t] == 0:                                                   # nothing to keep: all noise is new
                self.v[t] = delta[t - 1] ** 2
                continue
            kappa = a[t] / a[t - 1] * delta[t - 1] ** 2 / delta[t] ** 2
            self.v[t] = eta ** 2 * (delta[t - 1] ** 2 - kappa ** 2 * delta[t] ** 2).clamp(min=0)
            self.c[t] = (delta[t - 1] ** 2 - self.v[t]).sqrt() / delta[t]

    def at(self, name, t, like):
        """Entries t (B,) of a table, to broadcast over `like` (B, 1, H, W); t is on the same device."""
        return getattr(self, name).float().to(like.device)[t][:, None, None, None]

    def q_sample(self, t, x0, y, eps):
        """Eq. (1): a draw of x_t."""
        return self.at("a", t, x0) * x0 + self.at("m", t, x0) * y + self.at("delta", t, x0) * eps

    def posterior(self, t, x_t, x0, y, eps):
        """A draw of x_{t-1} given x_t and x0 (the true one or an estimate)."""
        r = x_t - self.at("a", t, x0) * x0 - self.at("m", t, x0) * y            # (B, 1, H, W)
        mean = self.at("a", t - 1, x0) * x0 + self.at("m", t - 1, x0) * y + self.at("c", t, x0) * r     # (B, 1, H, W)
        return mean + self.at("v", t, x0).sqrt() * eps                          # (B, 1, H, W)


def bridge_tables(name, N):
    """(a, m, delta) of a bridge, each (N+1,) in float64 [D2].

    hard and soft: betas linear in sqrt(beta) from sqrt(.1) to sqrt(3/N), of which the first half is mirrored; s2 and sbar2
    are their sums up to and from t, beta_t in both.  The sum of all is kept at its value for N = 10: the noise of the soft
    bridge at its end does not depend on N.
    ddbm: the variance-preserving bridge of Zhou et al. (2024).  ddpm: no bridge, the schedule of SynDiff.
    """
    t = torch.linspace(0, 1, N + 1, dtype=torch.float64)
    if name == "ddpm":
        alpha_bar = torch.exp(-0.5 * t ** 2 * (20 - 0.1) - 0.1 * t)
        return alpha_bar.sqrt(), torch.zeros_like(t), (1 - alpha_bar).sqrt()
    if name == "ddbm":
        alpha, rho2 = torch.exp(-0.05 * t - 0.5 * t ** 2), torch.exp(0.1 * t + t ** 2) - 1
        rest = rho2[-1] - rho2                                                  # variance still to come
        return alpha * rest / rho2[-1], alpha / alpha[-1] * rho2 / rho2[-1], alpha * (rest * rho2 / rho2[-1]).sqrt()
    def betas(n):
        rising = torch.linspace(math.sqrt(0.1), math.sqrt(3 / n), n + 1, dtype=torch.float64) ** 2
        half = torch.cat([torch.zeros(1, dtype=torch.float64), rising])[:n // 2 + 1]
        return torch.cat([half, half.flip(0)[1 - n % 2:]])                      # (n+1,)  n = 4: 0, b1, b2, b1, 0
    total = betas(10).sum()
    if N == 1:                                                                  # no beta is left: straight to the end
        m, s2, sbar2 = t, total * t, total * (1 - t)
    else:
        beta = betas(N) * total / betas(N).sum()
        s2, sbar2 = beta.cumsum(0), beta.flip(0).cumsum(0).flip(0)
        m = s2 / (s2 + sbar2)
    delta = {"hard": (s2 * sbar2 / (s2 + sbar2)).sqrt(), "soft": total * s2.sqrt() / (s2 + sbar2)}
    return 1 - m, m, delta[name]


def semantic_loss(e_t, e_rec):
    """Eq. (7) as 1 - cosine [D4].  (B, D) each."""
    return (1 - F.cosine_similarity(e_t, e_rec, dim=1)).mean()


def adversarial_loss(logits):
    """Eq. (8): -log sigmoid(logits), mean over patches."""
    return F.softplus(-logits).mean()


def discriminator_loss(real, fake):
    """The discriminator's side of Eq. (8) [D5]: real pairs up, made ones down."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def r1_penalty(disc, x_prev, x_t, t):
    """Half the squared gradient of the logits with respect to the sample x_{t-1} (not to x_t, the condition), on real pairs."""
    x_prev = x_prev.detach().requires_grad_()
    logits = disc(x_prev, x_t, t)                                               # (B, 1, H/8, W/8)
    gradient, = torch.autograd.grad(logits.sum(), x_prev, create_graph=True)    # (B, 1, H, W)
    return gradient.square().sum((1, 2, 3)).mean() / (2 * logits[0].numel())    # per patch, as the loss it stands beside


# ---- 5. Sampler ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(generate, bridge, y, text, noise):
    """From the source to the target.  generate(x_t, t, y, text) -> x0_hat; noise(): fresh N(0,1) like y.  (B, 1, H, W)"""
    N = len(bridge.a) - 1
    t = torch.full((len(y),), N, device=y.device)                               # (B,)
    x_t = bridge.q_sample(t, torch.zeros_like(y), y, noise())                   # (B, 1, H, W)  a_N = 0 (ddpm: .007)
    for step in range(N, 0, -1):
        t = torch.full((len(y),), step, device=y.device)                        # (B,)
        x0_hat = generate(x_t, t, y, text)                                      # (B, 1, H, W)
        x_t = bridge.posterior(t, x_t, x0_hat, y, noise())                      # (B, 1, H, W)  at step 1: x0_hat itself
    return x_t


def translate(run, model, y, text, keys):
    """Target slices of a batch.  y: (B, 1, H, W) in [0,1]; keys: (subject, slice) of each, they fix the noise, so that a slice
    comes out the same, up to rounding, in any batch, order or number of processes.  Returns (B, 1, H, W) in [0,1]."""
    generators = [run.generator("sample", *key) for key in keys]

    def noise():
        return torch.stack([torch.randn(y.shape[1:], generator=g, device=y.device) for g in generators])

    def generate(x_t, t, y, text):
        with run.autocast():
            return model.generator(x_t, t, y, text)                             # (B, 1, H, W)
    return (sample(generate, model.bridge, 2 * y - 1, text, noise) + 1) / 2


# ---- 6. Training -----------------------------------------------------------------------------------------------------


def train(cfg, run, ds):
    """Both stages; what is finished is loaded from the checkpoint.  Leaves in run.stages what load_model needs."""
    run.shard(cfg.batch)                            # an impossible batch is refused before the first stage
    encoder = train_encoder(cfg, run, ds)
    train_bridge(cfg, run, ds, encoder)


def train_encoder(cfg, run, ds):
    """Stage "encoder" [D1]: a CLIP on (slice, prompt), in which a field of the prompt is masked now and then."""
    if cfg.text_file:
        list(run.steps("encoder", 0, {}))           # nothing to train, which finishes the stage
        return None
    subjects = {s.name: s for s in ds.subjects}
    texts = prompts_of([subjects[name] for name in ds.split["train"]], ds.contrasts, PROMPT_FIELDS)    # whole, always
    rows = ds.rows("train")
    captions = [[texts[ds.subject[r], c] for c in range(len(ds.contrasts))] for r in rows]
    encoder = clip.build(cfg.encoder, list(texts.values()), cfg.size, seed=run.seed).to(run.device)
    encoder.subjects = sorted(ds.split["train"])
    run.about["encoder"] = {k: v for k, v in encoder.state().items() if k != "weights"}  # sizes, vocabulary, subjects
    clip.train_clip(run, encoder, ds.part("train"), captions, ds.subject[rows], cfg.encoder_steps,
                    min(cfg.encoder_batch, len(rows)), cfg.encoder_lr, instance=0, field_dropout=0.15)
    return encoder.freeze()


def learning_rate(step, steps, peak, low=1e-5):
    """Half a cosine from peak to low [D6]."""
    low = min(low, peak)
    return low + (peak - low) * (1 + math.cos(math.pi * step / steps)) / 2


def train_bridge(cfg, run, ds, encoder):
    """Stage "bridge": Eq. (9), which adds up Eq. (6), Eq. (7) and Eq. (8).

    In every step first the discriminator is updated, then generator and SR-Net together, against the new discriminator.
    The generator with the lowest validation error is kept.
    """
    torch.manual_seed(seed_of(run.seed, "bridge"))
    contrasts, slices, device = list(ds.contrasts), ds.part("train"), run.device
    table = text_table(cfg, encoder, complete(ds), contrasts)
    prompts = Prompts(table, cfg, complete(ds), contrasts, device)
    one = complete(ds)[0]                           # the prompts of one subject are those that must be told apart
    clip.report_closest(run, table, [prompt(c, one.meta, cfg.fields) for c in contrasts])
    dim, word_dim = prompts.whole.shape[1], None if prompts.words is None else prompts.words.shape[2]
    run.about["text"] = {"dim": dim, "word_dim": word_dim}
    bridge, pairs = Bridge(cfg.bridge, cfg.N), torch.tensor(all_directions(cfg, contrasts))
    G = Generator(cfg, dim, word_dim).to(device, memory_format=torch.channels_last)
    best, learned, parts = Best(G), list(G.parameters()), {"generator": G}
    sr = SRNet(dim, cfg.pool).to(device) if cfg.lambda_sem else None
    D = Discriminator(cfg.disc_base, cfg.N).to(device, memory_format=torch.channels_last) if cfg.lambda_adv else None
    if sr:
        learned, parts["sr"] = learned + list(sr.parameters()), sr
    optimiser = torch.optim.Adam(learned, lr=cfg.lr, betas=(0.5, 0.9), fused=device.type == "cuda")
    parts.update(best=best, optimiser=optimiser)
    if D:
        optimiser_d = torch.optim.Adam(D.parameters(), lr=cfg.lr_d, betas=(0.5, 0.9), fused=device.type == "cuda")
        parts.update(discriminator=D, optimiser_d=optimiser_d)
    network = torch.compile(G) if run.args.compile else G
    validate, mine, subject = validation(cfg, run, ds, prompts, bridge), run.shard(cfg.batch), ds.subject[ds.rows("train")]
    steps = math.ceil(cfg.epochs * len(slices) / cfg.batch)
    for step in run.steps("bridge", steps, parts, cfg.batch):
        pick = run.order("bridge", len(slices), cfg.batch, step)
        g = run.generator("bridge", step)           # draws for the whole batch, of which each process takes its share
        pair = pairs[torch.randint(len(pairs), (cfg.batch,), generator=g, device=device).cpu()][mine]       # (B, 2)
        t = torch.randint(1, cfg.N + 1, (cfg.batch,), generator=g, device=device)[mine]                     # (B,)
        eps = torch.randn(cfg.batch, 3, cfg.size, cfg.size, generator=g, device=device)[mine]               # (B, 3, H, W)
        x, each = 2 * run.fetch(slices, pick[mine]) - 1, torch.arange(len(t))                               # (B, C, H, W)
        y, x0 = x[each, pair[:, 0], None], x[each, pair[:, 1], None]                                        # (B, 1, H, W) each
        text = prompts(subject[pick[mine]], pair[:, 0], pair[:, 1])
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, cfg.lr)

        x_t = bridge.q_sample(t, x0, y, eps[:, :1])                             # (B, 1, H, W)
        with run.autocast():
            x0_hat = network(x_t, t, y, text)                                   # (B, 1, H, W)
        rec = F.l1_loss(x0_hat, x0)                                             # Eq. (6)
        loss = rec
        if D:
            fake_prev = bridge.posterior(t, x_t, x0_hat, y, eps[:, 1:2])        # (B, 1, H, W)
            real_prev = bridge.posterior(t, x_t, x0, y, eps[:, 2:])             # (B, 1, H, W)  jointly with x_t [D5]
            for group in optimiser_d.param_groups:
                group["lr"] = learning_rate(step, steps, cfg.lr_d)
            D.requires_grad_(True)                                              # first the discriminator ...
            with run.autocast():
                real, fake = D(real_prev, x_t, t).float(), D(fake_prev.detach(), x_t, t).float()
            loss_d = discriminator_loss(real, fake)
            if step % 10 == 0:
                loss_d = loss_d + r1_penalty(D, real_prev, x_t, t)              # in fp32
            run.update(loss_d, optimiser_d, max_norm=math.inf)
            D.requires_grad_(False)                                             # ... then the generator against the new one
            with run.autocast():
                adv = adversarial_loss(D(fake_prev, x_t, t).float())            # Eq. (8)
            loss = loss + cfg.lambda_adv * adv
            run.log(adv=adv, disc=loss_d)
        if sr:
            sem = semantic_loss(text.e_t, sr(text.e_mask, sr.pooled(x0_hat)))   # Eq. (7)
            loss = loss + cfg.lambda_sem * sem                                  # Eq. (9)
            if cfg.sem_real:                                                    # so that R_M must read pictures [D4]
                back = prompts(subject[pick[mine]], pair[:, 1], pair[:, 0])     # whose target is y
                real_sem = (semantic_loss(text.e_t, sr(text.e_mask, sr.pooled(x0)))
                            + semantic_loss(back.e_t, sr(back.e_mask, sr.pooled(y)))) / 2
                loss = loss + cfg.lambda_sem * real_sem
            with torch.no_grad():                           # what the source in place of the prediction costs; 0: R_M is blind
                other = semantic_loss(text.e_t, sr(text.e_mask, sr.pooled(y)))
            run.log(sem=sem, sem_gain=other - sem)
        run.update(loss, optimiser, max_norm=math.inf)
        run.log(loss=loss, rec=rec)
        if validate and ((step + 1) % max(1, steps // 5) == 0 or step + 1 == steps):
            value = validate(G)
            run.log(validation=value)
            best.offer(G, value)


def complete(ds):
    """The subjects whose slices are in the data set."""
    there = set(ds.subject)
    return [s for s in ds.subjects if s.name in there]


def validation(cfg, run, ds, prompts, bridge):
    """A function G -> mean squared error of sampled validation slices (at most 16), always with the same noise; or None."""
    rows = ds.rows("val")
    if len(rows) == 0:
        run.say("no validation subjects: the last weights are kept")
        return None
    rows, pairs = data.evenly(rows, 16), all_directions(cfg, list(ds.contrasts))
    u = run.fetch(ds.images, rows)                                              # (V, C, H, W)
    chosen = [pairs[i % len(pairs)] for i in range(len(rows))]
    s, t = (torch.tensor(channels) for channels in zip(*chosen))                # (V,) each
    each, text = torch.arange(len(rows)), prompts(ds.subject[rows], s, t)
    keys = [(ds.subject[r], int(ds.slice_number[r])) for r in rows]

    def validate(G):
        made = translate(run, Model(list(ds.contrasts), None, G, bridge), u[each, s, None], text, keys)      # (V, 1, H, W)
        return float(F.mse_loss(made, u[each, t, None]))
    return validate


@dataclass
class Model:
    """Everything that sampling needs, trained and frozen."""
    contrasts: list
    encoder: nn.Module | None                       # None with --text-file
    generator: nn.Module
    bridge: Bridge


def load_model(cfg, run):
    """The trained networks of a run folder, from its checkpoint alone."""
    if not run.finished(STAGES):
        raise RunError(f"{run.out}: the training is not finished; run the training command again (--train), it continues")
    parts = {stage: saved["parts"] for stage, saved in run.stages.items()}
    encoder = None
    if not cfg.text_file:
        encoder = clip.CLIP.from_state({**run.about["encoder"], "weights": parts["encoder"]["clip"]}).freeze().to(run.device)
    generator, best = Generator(cfg, **run.about["text"]), parts["bridge"]["best"]
    weights = best["model"] if math.isfinite(best["loss"]) else parts["bridge"]["generator"]    # without validation: the last
    restore(generator, weights, f"the generator in {run.out}")
    generator = generator.to(run.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    generator = torch.compile(generator) if run.args.compile else generator
    return Model(run.about["contrasts"], encoder, generator, Bridge(cfg.bridge, cfg.N, cfg.eta))


# ---- 7. Evaluation ---------------------------------------------------------------------------------------------------

# --reproduce: a row is what is typed beyond the command, "against" the row that the others are compared with.  A table of
# the paper has several directions: run it once for each, with --source, --target and an --out of its own.
UNTOLD = dict(conditioning="none", prompts="both", share=False)
PLAIN = dict(UNTOLD, lambda_sem=0.0)                        # a bridge without text
TABLES = {
    **{f"table2{part}": {"title": f"{name}, against methods that switches make, without text", "against": "MetaDB", "rows": {
        "Pix2Pix": dict(PLAIN, bridge="hard", N=1, R=1, lambda_adv=0.01), "SynDiff": dict(PLAIN, bridge="ddpm", N=4, R=1),
        "DDBM": dict(PLAIN, bridge="ddbm", R=1, lambda_adv=0.0),
        "DBIM": dict(PLAIN, bridge="ddbm", R=1, lambda_adv=0.0, eta=0.0), "MetaDB": {}}}
       for part, name in (("a", "IXI"), ("b", "BraTS, --train-fraction .4546 --test-subjects 20"),
                          ("c", "pelvis, --train-fraction .6 --test-subjects 4"))},
    "table3": {"title": "components", "against": "MetaDB", "rows": {
        "no TA-Norm, no SR-Net": PLAIN, "SR-Net alone": UNTOLD, "TA-Norm alone": dict(lambda_sem=0.0),
        "MetaDB": {}}},
    "table4": {"title": "how prompts enter the U-Net", "against": "MetaDB", "rows": {
        "cross-attention": dict(conditioning="xattn", prompts="both", share=False), "MetaDB": {}}},
    "table5": {"title": "what the prompts say", "against": "MetaDB", "rows": {
        "None": dict(fields=()), **{f.capitalize(): dict(fields=(f,)) for f in PROMPT_FIELDS}, "MetaDB": {}}},
    "table6": {"title": "which prompts enter", "against": "MetaDB", "rows": {
        "none": PLAIN, "source": dict(prompts="source", share=False), "target": dict(prompts="target", share=False),
        "MetaDB": {}}},
    "fig5": {"title": "a noisy source, sigma 10 of 255", "against": "MetaDB", "rows": {
        "no text": dict(PLAIN, noise=10.0), "MetaDB": dict(noise=10.0), "MetaDB, clean source": {}}},
    "fig6": {"title": "what a segmenter draws on the results", "against": "MetaDB", "metric": "dice", "rows": {
        "no text": dict(PLAIN, segment=True), "MetaDB": dict(segment=True)}},
    "readings": {"title": "ours: where the paper can be read in more than one way", "against": "MetaDB", "rows": {
        "MetaDB": {}, "soft bridge": dict(bridge="soft"), "one pass": dict(R=1), "deterministic": dict(eta=0.0),
        "one map": dict(share=True), "literal pooling": dict(pool=(1,)), "SR-Net sees real images": dict(sem_real=True),
        "no discriminator": dict(lambda_adv=0.0)}},
}


def evaluate(cfg, run, ds, model):
    """Every test subject once, every direction, beside the standing baselines.  results.json and pictures."""
    contrasts, rows = list(ds.contrasts), ds.spread("test", cfg.test_slices)
    pairs, table = directions(cfg, contrasts), text_table(cfg, model.encoder, complete(ds), contrasts)
    prompts = Prompts(table, cfg, complete(ds), contrasts, run.device)
    segmenters = train_segmenters(cfg, run, ds, {t for _, t in pairs}) if cfg.segment else {}
    mine = set(ds.split["test"][run.rank::run.world])                                   # whole subjects per process
    todo = [(pair, r) for pair in pairs for r in rows if ds.subject[r] in mine]
    done = []                                                                           # ((pair, row), result)
    for part in run.batches("sampling", todo, cfg.sample_batch):
        s, t = (torch.tensor(channels) for channels in zip(*(pair for pair, _ in part)))        # (B,) each
        each, at = torch.arange(len(part)), [r for _, r in part]
        u, keys = run.fetch(ds.images, at), [(ds.subject[r], int(ds.slice_number[r])) for r in at]         # (B, C, H, W)
        y = spoil(cfg, run, u[each, s, None], keys)                                             # (B, 1, H, W)
        made = translate(run, model, y, prompts(ds.subject[at], s, t), keys)                    # (B, 1, H, W)
        done += zip(part, made[:, 0].cpu().numpy())
    done = dict(run.gather(done))
    if run.rank > 0:
        return
    scored, truth = [], np.asarray(ds.images[rows], dtype=np.float32)                   # (n, C, H, W)
    keys = [(ds.subject[r], int(ds.slice_number[r])) for r in rows]
    for s, t in pairs:
        y = spoil(cfg, run, torch.from_numpy(truth[:, s, None]).to(run.device), keys)           # (n, 1, H, W)
        made = np.stack([done.pop(((s, t), r)) for r in rows])                          # (n, H, W)
        scored.append(Task({contrasts[s]: y[:, 0].cpu().numpy()}, contrasts[t], truth[:, t], {"MetaDB": made}, ds.subject[rows],
                           segmenters.get(t), ds.labels[rows] if cfg.segment else None))
    some = ds.images[data.evenly(ds.rows("train"), 2000)].astype(np.float32)            # (m, C, H, W)
    report(run, scored, {name: some[:, c] for c, name in enumerate(contrasts)},
           f"slices per subject: {cfg.test_slices}; whole slice, range [0,1]; unit: subject, the mean of its slices")


def train_segmenters(cfg, run, ds, targets):
    """Fig. 6: {channel number: a segmenter of that contrast}, trained on at most 5,000 real slices of training subjects."""
    if ds.labels is None:
        raise RunError(f"--segment: not every subject in {ds.folder} has label maps (as BraTS's ..._seg.nii.gz)")
    rows = data.evenly(ds.rows("train"), 5000)
    labels = np.asarray(ds.labels[rows])                                                # (m, H, W)
    classes, made = tuple(np.unique(labels).tolist()), {}
    for t in sorted(targets):
        stage = f"segmenter {ds.contrasts[t]} {cfg.segment_steps} {ds.fingerprint[:8]}"
        made[t] = downstream.train_segmenter(run, ds.images[rows, t], labels, classes, cfg.segment_steps, cfg.batch,
                                             stage=stage)
    return made


def spoil(cfg, run, u, keys):
    """Fig. 5: Gaussian noise of cfg.noise/255 on the source, u: (B, 1, H, W) in [0,1]; always the same for a slice."""
    if not cfg.noise:
        return u
    noise = torch.stack([torch.randn(u.shape[1:], generator=run.generator("spoil", *key), device=u.device) for key in keys])
    return (u + cfg.noise / 255 * noise).clamp(0, 1)


def untrained(cfg, device):
    """Generator, discriminator and SR-Net as they start, and a function n -> Text of n empty prompts of 8 words."""
    dim, word_dim = clip.SIZES[cfg.encoder]["embed"], clip.SIZES[cfg.encoder]["text"]["width"]
    nets = [net.to(device, memory_format=torch.channels_last)
            for net in (Generator(cfg, dim, word_dim), Discriminator(cfg.disc_base, cfg.N), SRNet(dim, cfg.pool))]

    def text(n):
        e = torch.zeros(n, dim, device=device)
        return Text(e, e, e, torch.zeros(n, 8, word_dim, device=device), torch.ones(n, 8, dtype=torch.bool, device=device))
    return *nets, text


def benchmark(cfg, run, ds):
    """Times the R passes of the generator, forward and backward, at the sizes of the config, on an untrained network."""
    (G, _, _, text), slices = untrained(cfg, run.device), ds.part("train")
    optimiser, network = torch.optim.Adam(G.parameters(), lr=1e-4), torch.compile(G) if run.args.compile else G

    def inputs(n):
        y = 2 * run.fetch(slices, run.order("benchmark", len(slices), n, 0))[:, :1] - 1         # (n, 1, H, W)
        return y, torch.ones(n, device=run.device), y, text(n)

    def training_step():
        with run.autocast():
            made = network(*inputs(cfg.batch))
        run.update(made.float().square().mean(), optimiser, max_norm=math.inf)

    @torch.no_grad()
    def one():
        with run.autocast():
            network(*inputs(cfg.sample_batch))
    forward = run.flops(lambda: G(*inputs(1)))
    run.time("generator's training step", training_step, cfg.batch, 3 * forward)
    seconds = run.time(f"{cfg.R} passes", one, cfg.sample_batch, forward)
    run.say(f"a sample takes {cfg.N} times {cfg.R} passes: {cfg.sample_batch / seconds / cfg.N:.3g} slices/s")


def dry_run(cfg, run, ds):
    """What would be trained, how large it is, and about how long it takes."""
    G, D, sr, text = untrained(cfg, torch.device("cpu"))
    image, told = torch.zeros(1, 1, cfg.size, cfg.size), text(1)
    made = G(image, torch.ones(1), image, told)
    run.say(f"x_t, y {tuple(image.shape)}, t (1,), E_s, E_t {tuple(told.e_s.shape)} -> x0_hat {tuple(made.shape)}")
    for subject in ds.subjects[:1]:
        for c in ds.contrasts:
            run.say(f"prompt: {prompt(c, subject.meta, cfg.fields)}")
    run.outline({"generator": G, "discriminator": D, "SR-Net": sr}, lambda: G(image, torch.ones(1), image, told),
                cfg.epochs * len(ds.part("train")))


# ---- 8. Main ---------------------------------------------------------------------------------------------------------


def main():
    cfg, args = parse(Config, PRESETS, TABLES, LIMITS, lambda folder: "demo" if data.is_phantom(folder) else "paper", __doc__)
    if args.reproduce == "list":
        print(list_tables(TABLES))
    elif args.check:
        raise SystemExit(0 if data.check(args.data, tuple(dict.fromkeys(cfg.source + cfg.target))) else 1)
    elif args.reproduce:
        cfg, args.seed = stored_config(args.out, cfg, args, SAMPLING)       # of a run that is there already
        args.train, args.evaluate, args.synthesize, args.benchmark = True, True, False, False
        reproduce("metadb", args.reproduce, TABLES[args.reproduce], cfg, args, SAMPLING, STAGES, "MetaDB", work)
    else:
        work(cfg, args)


def work(cfg, args):
    """All that was asked for, in one run folder.  Returns the path of the results that belong to it, if any."""
    run = Run("metadb", cfg, args)
    cfg = run.settle(SAMPLING)
    if run.load():
        run.say(f"found a run in {run.out}")
    elif (args.evaluate or args.synthesize) and not args.train:
        raise RunError(f"{run.out} holds no trained model; add --train, or name the folder of a finished run with --out")
    if args.train or args.evaluate or args.benchmark or cfg.dump_prompts or not args.synthesize:
        ds = open_data(cfg, args, run)
        directions(cfg, list(ds.contrasts))                 # a wrong --only is told now, not after the training
        run.works_on(ds)
    if cfg.dump_prompts:
        lines = all_prompts(cfg, ds.subjects, ds.contrasts)
        if run.rank == 0:
            Path(cfg.dump_prompts).write_text("\n".join(lines) + "\n", encoding="utf-8")
        run.say(f"{cfg.dump_prompts}: {len(lines)} prompts, one a line")
        return run.close()
    if args.train:
        run.claim_for(ds, SAMPLING)
        if run.finished(STAGES):
            run.say("training: finished")
        else:
            train(cfg, run, ds)
    if args.evaluate:
        run.refuse_seen(ds)
        if args.reproduce and run.find_results():
            run.say(f"found: {run.find_results()}")
        else:
            evaluate(cfg, run, ds, load_model(cfg, run))
    if args.synthesize:
        model, subjects = load_model(cfg, run), data.find_layout(args.data, run.about["contrasts"]).subjects
        if len(directions(cfg, model.contrasts)) > 1:
            raise RunError("--synthesize: this model knows several directions; choose one, --only source,target", status=2)
        s, t = directions(cfg, model.contrasts)[0]
        unseen = [subject for subject in subjects if subject.name not in run.about["train"]]    # never those it was trained on
        prompts = Prompts(text_table(cfg, model.encoder, unseen, model.contrasts), cfg, unseen, model.contrasts, run.device)

        def fill(u, known, keys):
            text = prompts([name for name, _ in keys], [s] * len(keys), [t] * len(keys))
            out = u.clone()
            out[:, t] = translate(run, model, u[:, s, None], text, keys)[:, 0]
            return out
        todo = data.to_synthesize(unseen[run.rank::run.world], model.contrasts, (model.contrasts[t],), cfg.size,
                                  run.out / "synthetic", run.say)
        synthesize(run, todo, model.contrasts, cfg.sample_batch, fill, "MetaDB")
    if args.benchmark:
        benchmark(cfg, run, ds)
    elif not (args.train or args.evaluate or args.synthesize):
        dry_run(cfg, run, ds)
    run.close()
    return run.find_results() if run.rank == 0 else None


if __name__ == "__main__":
    guarded(main, DataError)
