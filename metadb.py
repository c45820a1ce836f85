"""MetaDB: one MR contrast from another (or CT from MR), told in words what both images are.

"MetaDB: a metadata-guided diffusion bridge for medical image translation", ICMR 2026.
https://doi.org/10.1145/3805622.3810728
Part of a collection of reference implementations; MIT licence, see LICENSE.

THE IDEA.  A diffusion bridge does not start from noise.  Its states walk from the source image y
(step N) to the target x0 (step 0).  A generator sees the state, y and its own last estimate, and
predicts x0, R times in a step.  The next state is drawn from the Gaussian posterior.  What the two
images are (patient, scanner, contrast, echo times) is written as two prompts.  They enter twice:
  1. TA-Norm: in the blocks of the U-Net, the source's look is taken away from the feature maps and
     the target's look is given to them.  Gains and shifts come from the embeddings of the prompts.
  2. SR-Net: a small network gets the prediction, pooled to 170 numbers, and the target's prompt
     with its contrast masked.  It must find the embedding of the whole prompt.  This rewards a
     prediction that shows what the prompt says.
A discriminator, which sees no text, judges pairs of neighbouring states.  It makes them sharp.

PROMPT, and the same with its contrast masked (data/prompts.py):
  Age: 35; Gender: F; Scanner: GE; Description: T2-weighted MRI of the brain, TR 4000 ms, TE 99 ms
  Age: 35; Gender: F; Scanner: GE; Description: [MASK] of the brain, TR [MASK] ms, TE [MASK] ms

PIPELINE (B slices, H x W pixels, D width of an embedding, L words of width K for xattn)
  prompts --text encoder, frozen--> E_src, E_tgt, E_mask (B,D)
  x_t, y, x_r (B,1,H,W each), t, E_src, E_tgt --generator, R times--> x0_hat (B,1,H,W)
  in training: x0_hat, E_mask --SR-Net--> E_rec (B,D);  x_{t-1}, x_t --discriminator--> logits
  x0_hat, x_t, y --posterior--> x_{t-1}    N steps from x_N down to x_0; N R passes for a sample
Training has the stages "encoder" and "bridge".

EQUATIONS
  Eq. (1)  q(x_t | x0, y) = N(a_t x0 + m_t y, delta_t^2),  a_t = 1 - m_t (bridges hard, soft)
  Eq. (2)  x0_hat = G(x_t, t, y, E_text)                       ours: and x_r [D6]
  Eq. (3)  F <- (F - beta_src) / alpha_src * alpha_tgt + beta_tgt
  Eq. (4)  F_p = concat(AvgPool(x0_hat), MaxPool(x0_hat))      ours: of grids of cells [D4]
  Eq. (5)  E_rec = R_M(E_mask, F_p)
  Eq. (6)  L_rec = | x0_hat - x0 |
  Eq. (7)  L_sem = 1 - cos(E_tgt, E_rec)                       printed: the cosine [D4]
  Eq. (8)  L_adv = -log D(x_t, x_{t-1})
  Eq. (9)  L = L_rec + lambda_1 L_adv + lambda_2 L_sem

SYMBOLS
  paper               code                    meaning
  x_0, y, x_t         x0, y, x_t              target and source in [-1,1], state; (B,1,H,W)
  x_0 (estimate)      x0_hat, x_r             prediction, and that of the pass before
  m_t, delta_t        bridge.m, bridge.delta  tables over the steps 0..N
  E_s, E_t, E_mask    e_src, e_tgt, e_mask    embeddings of the two prompts and of the masked one
  alpha, beta         alpha, beta             gain and shift of a prompt
  R_M, F_p            sr, f_p                 network of SR-Net, what it sees of the prediction
  lambda_1, lambda_2  lambda_adv, lambda_sem  weights of Eq. (9)
  -                   u                       slice as stored, in [0,1]
  -                   src, tgt                source and target; _t always means time

COMMANDS
  python metadb.py --data data/ixi --train --evaluate      makes phantoms on first use; CPU, minutes
  python metadb.py --data FOLDER --source t1 --target ct --train --evaluate    see data/README.md
  python metadb.py --data NEW --synthesize --out runs/metadb-FOLDER     new patients, as NIfTI

DEPARTURES FROM THE PAPER (the reason stands here, or where the code departs)
  [D1]  A small CLIP of ours, then LayerNorm, replaces BiomedCLIP, which needs more packages.
  [D2]  Betas and m_t are SelfRDB's (Arslan et al., 2024).  The printed betas give noise of std 2.
  [D3]  TA-Norm stands behind norm2, which would undo a part of it; gains are 0.1 at least.
  [D4]  L_sem is 1 - cosine; Eq. (4) pools to grids of cells; --sem-real is ours (see train_bridge).
  [D5]  Losses are means over images in [-1,1].  As in SelfRDB: pairs of D share x_t; R1 penalty.
  [D6]  The R passes of inference are made in training, too.  Ours: falling rates, best weights.
  [D7]  Small slices are padded, not resized; CT windows are fixed; all slices with much tissue.
  [D8]  Some rivals of Tables 2 and 4 are switches of this same model: see --reproduce list.

NEEDS  data/ and these files of common/:
  benchmark.py cli.py clip.py cohort.py contrastive.py device.py discriminator.py downstream.py
  embeddings.py encoder.py evaluation.py files.py loop.py metrics.py outline.py pictures.py run.py
  schedules.py score_volumes.py script.py table_pages.py tables.py tasks.py tokenizer.py trained.py
  unet.py
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from common import clip, downstream, script
from common.cli import load_presets
from common.device import full_precision, seed_of
from common.discriminator import PairDiscriminator, r1_penalty
from common.encoder import Prompts, Text, encoder_at_work, load_encoder, train_encoder
from common.loop import Best, cosine_rate
from common.outline import Outline
from common.schedules import ddbm_bridge, syndiff_schedule
from common.tasks import all_directions, chosen_direction
from common.unet import (
    Attention,
    Chain,
    SelfAttention,
    UNet,
    attention_at,
    check_sizes,
    zeroed,
)
from data import PROMPT_FIELDS, canonical_contrast, prompt

# ---- 1. Config -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The paper (Sec. 4.1) states size, mult, epochs, batch, lr, lr_d, N, R, lambda_adv, lambda_sem
    and IXI's numbers of subjects.  Other defaults are ours.  Phantoms take PRESETS["demo"]."""
    # data
    source: tuple[str, ...] = ("t1",)           # contrasts to start from
    target: tuple[str, ...] = ("t2",)           # contrasts to make; several: all pairs
    size: int = 256                             # height and width of a slice in pixels [D7]
    train_fraction: float = 0.625               # share of the subjects that train (IXI: 25 of 40)
    test_subjects: int = 10                     # subjects that are scored; the others validate
    test_slices: int = 100                      # slices scored per test subject, evenly spread
    # networks
    encoder: Literal["base", "demo"] = "base"   # size of the encoders (common/clip.py)
    base: int = 64                              # U-Net channels at full resolution
    mult: tuple[int, ...] = (1, 1, 2, 2, 4, 4)  # channel multipliers, one per resolution
    blocks: int = 2                             # residual blocks per resolution
    attention: tuple[int, ...] = (16,)          # map sizes with self-attention (middle: always)
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
    bridge: Literal["hard", "soft", "ddbm", "ddpm"] = "hard"    # noise along the bridge [D2] [D8]
    N: int = 10                                 # steps of the bridge
    R: int = 2                                  # passes per step, each sees the one before [D6]
    conditioning: Literal["ta", "xattn", "none"] = "ta"         # how prompts enter (Table 4)
    prompts: Literal["both", "source", "target"] = "both"       # which TA-Norm reads (Table 6)
    share: bool = False                         # one affine map for both prompts [D3]
    fields: tuple[str, ...] = PROMPT_FIELDS     # what a prompt says (Table 5)
    text_file: str = ""                         # .npz with your own embeddings of the prompts [D1]
    lambda_adv: float = 0.1                     # lambda_1 of Eq. (9); 0: no discriminator
    lambda_sem: float = 0.01                    # lambda_2 of Eq. (9); 0: no SR-Net (Table 3)
    pool: tuple[int, ...] = (1, 2, 4, 8)        # Eq. (4) pools to grids of 1x1, 2x2, ... [D4]
    sem_real: bool = False                      # SR-Net learns from real images, too [D4]
    # method, in sampling
    only: tuple[str, ...] = ()                  # the one direction to make: source,target
    eta: float = 1.0                            # fresh noise in a step: 1 as in training, 0 least
    noise: float = 0.0                          # sigma of noise on test slices, 0..255 (Fig. 5)
    segment: bool = False                       # a segmenter judges the results: Dice (Fig. 6)
    segment_steps: int = 10_000                 # of the segmenter
    sample_batch: int = 24                      # slices sampled at once; changes rounding only

    def __post_init__(self):
        check_sizes(self.size, self.base, self.mult, self.groups, self.head_dim)
        if self.size % 8:
            raise ValueError(f"--size {self.size}: must be a multiple of 8, for the discriminator")
        if set(self.fields) - set(PROMPT_FIELDS):
            raise ValueError(f"--fields {','.join(self.fields)}: there are "
                             f"{', '.join(PROMPT_FIELDS)}")
        if self.conditioning != "ta" and (self.share or self.prompts != "both"):
            raise ValueError("--share and --prompts belong to TA-Norm: they need --conditioning ta")
        if self.share and self.prompts != "both":
            raise ValueError("--share is one map for both prompts: it needs --prompts both")
        if self.size < 2 * max(self.pool):
            raise ValueError(f"--pool {','.join(map(str, self.pool))}: --size {self.size} "
                             "has fewer than 2 x 2 pixels for each of so many cells")
        if not all_directions(self.source, self.target, wanted_contrasts(self)):
            raise ValueError(f"--source {','.join(self.source)} --target {','.join(self.target)}: "
                             "name two different contrasts")


# Fields that may change without training again.  All others need training in another --out.
SAMPLING = ("only", "eta", "noise", "segment", "segment_steps", "sample_batch", "test_slices")
PRESETS = load_presets("metadb")                             # sizes for phantoms: data/presets.json
LIMITS = dict(N=(1, 1000), R=(1, 10), lambda_adv=(0, 1e3), lambda_sem=(0, 1e3), pool=(1, 64),
              eta=(0, 1), noise=(0, 255))
# --reproduce: a row of a table takes over all stages before the first one whose fields it changes.
STAGES = {
    "encoder": (),          # fields listed nowhere, such as encoder_steps, act on all stages
    "bridge": ("base", "mult", "blocks", "attention", "head_dim", "groups", "disc_base", "epochs",
               "batch", "lr", "lr_d", "bridge", "N", "R", "conditioning", "prompts", "share",
               "fields", "lambda_adv", "lambda_sem", "pool", "sem_real"),
}

# ---- 2. Data -------------------------------------------------------------------------------------


def wanted_contrasts(cfg):
    """The contrasts that the data must have, without repeats."""
    return tuple(dict.fromkeys(canonical_contrast(c) for c in cfg.source + cfg.target))


def directions(cfg, contrasts):
    """The pairs (source, target) to make, as channel numbers: all that were learned, or --only."""
    return chosen_direction(all_directions(cfg.source, cfg.target, contrasts), cfg.only, contrasts)


def patterns(cfg, contrasts):
    """The tasks, as pairs (known contrasts, contrasts to make): one known contrast each."""
    targets = {}
    for src, tgt in directions(cfg, contrasts):
        targets.setdefault(contrasts[src], []).append(contrasts[tgt])
    return [((source,), tuple(made)) for source, made in targets.items()]


def make_prompts(cfg, encoder, subjects, contrasts, device):
    """The embeddings of prompts: prompts(names, src, tgt) is a Text, see common/encoder.py."""
    words = cfg.conditioning == "xattn"
    return Prompts(encoder, subjects, contrasts, cfg.fields, cfg.text_file, device, words)


# ---- 3. Model ------------------------------------------------------------------------------------


def strip(f, alpha, beta):
    """First half of Eq. (3): take the source's look away."""
    return (f - beta) / alpha


def inject(f, alpha, beta):
    """Second half of Eq. (3): give the target's look."""
    return f * alpha + beta


class AffineMap(nn.Module):
    """An embedding (B, D) becomes alpha in (0.1, 1) and beta in (0, 1), (B, C, 1, 1) each.

    Without the floor of 0.1, Eq. (3) could divide by almost 0 [D3].  At the start alpha is .89 and
    beta is .12, for every prompt.
    """

    def __init__(self, dim, channels):
        super().__init__()
        self.linear = zeroed(nn.Linear(dim, 2 * channels))
        with torch.no_grad():
            self.linear.bias[:channels] = 2.0
            self.linear.bias[channels:] = -2.0

    def forward(self, e):
        raw = torch.sigmoid(self.linear(e))[:, :, None, None]               # (B, 2C, 1, 1)
        gain, beta = raw.chunk(2, dim=1)                                    # (B, C, 1, 1) each
        return 0.1 + 0.9 * gain, beta                                       # (B, C, 1, 1) each


class TANorm(nn.Module):
    """Eq. (3), Fig. 3: the look of the source is replaced by that of the target.

    It sits in the blocks of the U-Net on the way down and up that keep the resolution [D3]:
        h = conv1(silu(norm1(x)))
        h = norm2(h) * (1 + scale(time)) + shift(time)
        h = TANorm(h)
        output = skip(x) + conv2(silu(h))
    Each prompt has its own affine map.  Without Description (rows of Table 5) both prompts may be
    equal, and one shared map would undo itself.  With --prompts both it starts as the identity.
    """

    def __init__(self, channels, dim, prompts, share):
        super().__init__()
        self.source = AffineMap(dim, channels) if prompts != "target" else None
        self.target = AffineMap(dim, channels) if prompts != "source" else None
        if share:
            self.target = self.source

    def forward(self, h, text):
        with full_precision(h.device):                                     # a division: not in bf16
            f = h.float()                                                   # (B, C, H, W)
            if self.source is not None:
                f = strip(f, *self.source(text.e_src))                      # (B, C, H, W)
            if self.target is not None:
                f = inject(f, *self.target(text.e_tgt))                     # (B, C, H, W)
        return f.to(h.dtype)                                                # (B, C, H, W)


class CrossAttention(nn.Module):
    """Table 4's rival, on maps up to 32 pixels, not in the middle: words of both prompts [D8]."""

    def __init__(self, channels, head_dim, word_dim, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.attention = Attention(channels, head_dim, word_dim)
        self.whose = nn.Parameter(torch.zeros(2, 1, word_dim))    # marks words of source and target
        zeroed(self.attention.out)

    def forward(self, h, text):
        height, width = h.shape[2:]
        x = self.norm(h).flatten(2).transpose(1, 2)                         # (B, HW, C)
        words_src, words_tgt = text.words.chunk(2, dim=1)                   # (B, L, K) each
        marked = [words_src + self.whose[0], words_tgt + self.whose[1]]
        words = torch.cat(marked, dim=1)                                    # (B, 2L, K)
        a = self.attention(x, words, text.is_word)                          # (B, HW, C)
        return h + a.transpose(1, 2).unflatten(2, (height, width))          # (B, C, H, W)


class Generator(nn.Module):
    """Eq. (2): x0_hat from the state, the source and its own previous estimate.  word_dim: K."""

    def __init__(self, cfg, dim, word_dim):
        super().__init__()
        self.N = cfg.N
        self.R = cfg.R
        self_attention = attention_at(     # a plug (common/unet.py): site (place) -> module
            cfg.attention, lambda site: SelfAttention(site.channels, cfg.head_dim, cfg.groups))

        def plug(site):     # for a block, behind norm2 and at its end; called as module(h, text)
            if site.where == "norm":
                ours = cfg.conditioning == "ta" and site.stage != "mid"
                return TANorm(site.channels, dim, cfg.prompts, cfg.share) if ours else None
            modules = [self_attention(site)]
            if cfg.conditioning == "xattn" and site.stage != "mid" and site.size <= 32:
                modules.append(CrossAttention(site.channels, cfg.head_dim, word_dim, cfg.groups))
            modules = [module for module in modules if module is not None]
            return Chain(modules) if modules else None
        # Three channels go in: x_t, y and x_r.
        self.unet = UNet(3, 1, cfg.base, cfg.mult, cfg.blocks, cfg.size, cfg.groups, plug)

    def forward(self, x_t, t, y, text):
        """x_t, y: (B, 1, H, W); t: (B,) in 1..N.  Returns x0_hat, (B, 1, H, W).

        Each of the R passes sees the estimate x_r of the pass before.  At every t, x_r starts at 0.
        """
        time = 1000 * t / self.N                                            # (B,)
        x_r = torch.zeros_like(y)                                           # (B, 1, H, W)
        for _ in range(self.R):                                             # [D6]
            seen = torch.cat([x_t, y, x_r], dim=1)                          # (B, 3, H, W)
            x_r = torch.tanh(self.unet(seen, time, text).float())           # (B, 1, H, W)
        return x_r


class SRNet(nn.Module):
    """Sec. 3.2.2: the embedding of the whole prompt from the masked one and the picture.

    No skip connection leads from E_mask to the output.  E_mask and E_tgt share most words, so
    with such a connection the cosine could begin near 1.
    """

    def __init__(self, dim, pool):
        super().__init__()
        self.pool = pool
        self.text = nn.Linear(dim, dim)
        self.image = nn.Linear(2 * sum(k * k for k in pool), dim)
        self.mix = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def pooled(self, x0_hat):
        """Eq. (4).  x0_hat: (B, 1, H, W) in [-1,1].  Returns F_p (B, 2 sum k^2).

        As printed, F_p is two numbers, and the maximum of a normalised MR image is about 1.  We
        pool to grids of k x k cells, for several k; --pool 1 is the printed equation [D4].
        """
        u = (x0_hat + 1) / 2                                                # (B, 1, H, W)
        parts = []
        for k in self.pool:
            parts.append(F.adaptive_avg_pool2d(u, k).flatten(1))            # (B, k*k)
            parts.append(F.adaptive_max_pool2d(u, k).flatten(1))            # (B, k*k)
        return torch.cat(parts, dim=1)                                      # (B, 2 sum k^2)

    def forward(self, e_mask, f_p):
        """Eq. (5).  e_mask: (B, D); f_p: from pooled().  Returns E_rec (B, D)."""
        both = torch.cat([self.text(e_mask), self.image(f_p)], dim=1)       # (B, 2D)
        return self.mix(both)                                               # (B, D)


# ---- 4. Maths and losses -------------------------------------------------------------------------


class Bridge:
    """Eq. (1) and its posterior, as tables over the steps 0..N in float64.

    Eq. (1) is x_t = a_t x0 + m_t y + delta_t eps.  The noise in x_t is r_t = x_t - a_t x0 - m_t y;
    its variance is delta_t^2.  A step back keeps the share c_t of it and adds new noise eps':
        x_{t-1} = a_{t-1} x0 + m_{t-1} y + c_t r_t + sqrt(v_t) eps'
    Eq. (1) holds at t - 1, too, if the variances agree: c_t^2 delta_t^2 + v_t = delta_{t-1}^2.
    With eta = 1, c_t is that of a Markov chain.  Its step from t - 1 to t is
        x_t = (a_t / a_{t-1}) x_{t-1} + a multiple of y + noise,
    and Bayes' rule gives c_t = (a_t / a_{t-1}) (delta_{t-1} / delta_t)^2.
    With eta < 1, v_t is eta^2 times as large.  But if delta_N = 0, all noise of step N is new.
    """

    def __init__(self, name, N, eta=1.0):
        self.a, self.m, self.delta = bridge_tables(name, N)                 # (N+1,) each
        a = self.a
        delta = self.delta
        self.c = torch.zeros_like(a)                                        # of the step t to t - 1
        self.v = torch.zeros_like(a)
        for t in range(1, N + 1):
            if delta[t] == 0:                                               # all noise is new
                self.v[t] = delta[t - 1] ** 2
                continue
            markov = a[t] / a[t - 1] * delta[t - 1] ** 2 / delta[t] ** 2
            new = (delta[t - 1] ** 2 - markov ** 2 * delta[t] ** 2).clamp(min=0)  # for rounding
            self.v[t] = eta ** 2 * new
            self.c[t] = (delta[t - 1] ** 2 - self.v[t]).sqrt() / delta[t]

    def at(self, table, t, like):
        """Entries t (B,) of a table (N+1,), to broadcast over `like` (B, 1, H, W)."""
        return table.float().to(like.device)[t][:, None, None, None]

    def q_sample(self, t, x0, y, eps):
        """Eq. (1): a draw of x_t, (B, 1, H, W)."""
        mean = self.at(self.a, t, x0) * x0 + self.at(self.m, t, x0) * y
        return mean + self.at(self.delta, t, x0) * eps

    def posterior(self, t, x_t, x0, y, eps):
        """A draw of x_{t-1}, (B, 1, H, W), given x_t and x0 (the true one or an estimate)."""
        r = x_t - self.at(self.a, t, x0) * x0 - self.at(self.m, t, x0) * y
        mean = self.at(self.a, t - 1, x0) * x0 + self.at(self.m, t - 1, x0) * y
        mean = mean + self.at(self.c, t, x0) * r
        return mean + self.at(self.v, t, x0).sqrt() * eps


RIVALS = {"ddbm": ddbm_bridge, "ddpm": syndiff_schedule}                    # of Table 2 [D8]


def bridge_tables(name, N):
    """(a, m, delta) of a bridge, each (N+1,) in float64.

    hard and soft use SelfRDB's betas (mirrored_betas).  s2_t is the sum of the betas up to t, and
    sbar2_t the sum from t on; both contain beta_t, so s2_t + sbar2_t = total + beta_t.
    hard, our default, has no noise at either end, because the paper says "x_T = y" (T is our N).
    soft is SelfRDB's q(x_t).  Its delta is near sqrt(s2): for N = 10, beta_t is .167 at most.
    The betas are scaled so that their total is that of N = 10.
    """
    if name in RIVALS:
        return RIVALS[name](N)
    total = mirrored_betas(10).sum()
    if N == 1:                          # no state lies between the ends, so all betas are 0
        m = torch.tensor([0.0, 1.0], dtype=torch.float64)
        s2 = total * m
        sbar2 = total * (1 - m)
    else:
        beta = mirrored_betas(N) * total / mirrored_betas(N).sum()
        s2 = beta.cumsum(0)
        sbar2 = beta.flip(0).cumsum(0).flip(0)
        m = s2 / (s2 + sbar2)
    delta = {"hard": (s2 * sbar2 / (s2 + sbar2)).sqrt(), "soft": total * s2.sqrt() / (s2 + sbar2)}
    return 1 - m, m, delta[name]


def mirrored_betas(N):
    """The betas of SelfRDB for t = 0..N, (N+1,).  For N < 30 they rise to the middle, then fall.

    b1, b2, ... are N + 1 values from 0.1 to 3 / N, whose roots are equally spaced.  Half of them
    are used.  N = 4 gives 0, b1, b2, b1, 0, and N = 5 gives 0, b1, b2, b2, b1, 0.  For N = 10 the
    largest beta is 0.167.
    """
    roots = torch.linspace(math.sqrt(0.1), math.sqrt(3 / N), N + 1, dtype=torch.float64)
    first = torch.cat([torch.zeros(1, dtype=torch.float64), roots ** 2])[:N // 2 + 1]
    return torch.cat([first, first.flip(0)[1 - N % 2:]])


def semantic_loss(e_tgt, e_rec):
    """Eq. (7).  (B, D) each.  The paper prints the cosine, but wants it large [D4]."""
    return (1 - F.cosine_similarity(e_tgt, e_rec, dim=1)).mean()


def adversarial_loss(logits):
    """Eq. (8): -log sigmoid(logits), mean over patches."""
    return F.softplus(-logits).mean()


def discriminator_loss(real, fake):
    """The discriminator's side of Eq. (8) [D5]: small if real logits are high, fake ones low."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


# ---- 5. Sampler ----------------------------------------------------------------------------------


@torch.no_grad()
def sample(generate, bridge, y, text, noise, watch=None):
    """From the source y (B, 1, H, W) to the target, in N steps.

    generate(x_t, t, y, text) -> x0_hat.  noise(): fresh N(0,1) like y.
    watch: a list that gets (title, x_t, x0_hat) of each step.
    """
    N = len(bridge.a) - 1
    t = torch.full((len(y),), N, device=y.device)                           # (B,)
    x_t = bridge.q_sample(t, torch.zeros_like(y), y, noise())               # a_N is 0 (ddpm: .007)
    for step in range(N, 0, -1):
        t = torch.full((len(y),), step, device=y.device)                    # (B,)
        x0_hat = generate(x_t, t, y, text)                                  # (B, 1, H, W)
        if watch is not None:
            watch.append((f"t = {step}", x_t, x0_hat))
        x_t = bridge.posterior(t, x_t, x0_hat, y, noise())                  # (B, 1, H, W)
    return x_t                                                              # x_0 is the last x0_hat


def translate(run, generator, bridge, y, text, keys, watch=None):
    """Target slices from source slices, (B, 1, H, W) in [0,1] each.

    keys: (subject, slice number) of each.  They fix the noise, so that a slice comes out the same
    in any batch or order.
    """
    _, noise = run.noise(keys, y)

    def generate(x_t, t, y, text):
        with run.autocast():
            return generator(x_t, t, y, text)                               # (B, 1, H, W)
    return (sample(generate, bridge, 2 * y - 1, text, noise, watch) + 1) / 2


@dataclass
class Model:
    """Everything that sampling needs, trained and frozen."""
    cfg: Config
    run: object                                     # common.run.Run: device, precision, randomness
    contrasts: list
    generator: nn.Module
    bridge: Bridge
    prompts: Prompts

    def fill(self, u, known, keys, watch=None):
        """Make every contrast that is missing and can be made from a known one.

        common/trained.py calls this.  u: (B, C, H, W) in [0,1]; known: (B, C) bool; keys: see
        translate; watch: see sample.  Returns u with what was made, and a dict of extras: none.
        ValueError if a contrast could be made from two of the known ones.
        """
        names = [name for name, _ in keys]
        filled = u.clone()                                                  # (B, C, H, W)
        made = known.clone()                                                # (B, C)
        for src, tgt in directions(self.cfg, self.contrasts):
            here = (known[:, src] & ~known[:, tgt]).nonzero()[:, 0].tolist()  # B' of the slices
            if not here:
                continue
            if made[here, tgt].any():
                raise ValueError(f"fill: {self.contrasts[tgt]} can be made from several of the "
                                 "known contrasts; give one of them only")
            made[here, tgt] = True
            n = len(here)
            text = self.prompts([names[b] for b in here], [src] * n, [tgt] * n)
            y = u[here, src, None]                                          # (B', 1, H, W)
            keys_here = [keys[b] for b in here]
            x0 = translate(self.run, self.generator, self.bridge, y, text, keys_here, watch)
            filled[here, tgt] = x0[:, 0]
            watch = None                                        # only the first contrast is watched
        return filled, {}


# ---- 6. Training ---------------------------------------------------------------------------------


def train(cfg, run, ds):
    """Both stages.  A stage that is finished is not trained again.

    Stage "encoder" is a CLIP on pairs (slice, prompt); its losses are in common/clip.py [D1].  It
    is trained on the prompts of the training subjects.  Now and then a whole field becomes [MASK]
    or None, so that it learns both words.  It never sees prompts without a field, as in rows of
    Table 5, nor a field masked in part, as in E_mask: there it must generalise.
    """
    meta = {subject.name: subject.meta for subject in ds.subjects}

    def texts(rows):
        return [[prompt(c, meta[ds.subject[r]]) for c in ds.contrasts] for r in rows]
    encoder = None
    if cfg.text_file:
        run.skip("encoder")
    else:               # instance=0: no loss that pulls the contrasts of one slice together
        encoder = train_encoder(run, ds, texts, cfg.encoder, cfg.size, cfg.encoder_steps,
                                cfg.encoder_batch, cfg.encoder_lr, instance=0, field_dropout=0.15)
    train_bridge(cfg, run, ds, encoder)


def train_bridge(cfg, run, ds, encoder):
    """Stage "bridge": generator, SR-Net and discriminator, by Eq. (9).

    The generator with the lowest validation error is kept [D6].  In every step the discriminator is
    updated first, then generator and SR-Net together, against the new discriminator.
    """
    torch.manual_seed(seed_of(run.seed, "bridge"))
    contrasts = list(ds.contrasts)
    slices = ds.part("train")
    device = run.device
    prompts = make_prompts(cfg, encoder, ds.complete, contrasts, device)
    first = ds.complete[0].name                    # are the prompts of one person told apart?
    prompts.report(run, first)
    one = prompts([first], [0], [0])
    dim = one.e_src.shape[1]
    word_dim = None if one.words is None else one.words.shape[2]
    run.about["text"] = {"dim": dim, "word_dim": word_dim}
    bridge = Bridge(cfg.bridge, cfg.N)          # eta = 1: training always uses the Markov posterior
    pairs = torch.tensor(all_directions(cfg.source, cfg.target, contrasts))
    G = Generator(cfg, dim, word_dim).to(device, memory_format=torch.channels_last)
    best = Best(G)
    learned = list(G.parameters())
    parts = {"generator": G, "best": best}
    sr = None
    if cfg.lambda_sem:
        sr = SRNet(dim, cfg.pool).to(device)
        learned += list(sr.parameters())
        parts["sr"] = sr
    D = None
    if cfg.lambda_adv:
        D = PairDiscriminator(cfg.disc_base, cfg.N).to(device, memory_format=torch.channels_last)
        optimiser_d = torch.optim.Adam(D.parameters(), lr=cfg.lr_d, betas=(0.5, 0.9), fused=True)
        parts.update(discriminator=D, optimiser_d=optimiser_d)
    optimiser = torch.optim.Adam(learned, lr=cfg.lr, betas=(0.5, 0.9), fused=True)
    parts["optimiser"] = optimiser
    network = torch.compile(G) if run.args.compile else G                   # the same weights
    validate = validation(cfg, run, ds, prompts, bridge)
    mine = run.shard(cfg.batch)                                    # this process's share of a batch
    subject = ds.subject[ds.rows("train")]
    steps = math.ceil(cfg.epochs * len(slices) / cfg.batch)
    for step in run.steps("bridge", steps, parts, cfg.batch):        # continues a run, and saves
        pick = run.order("bridge", len(slices), cfg.batch, step)[mine]      # (B,)
        # g gives the random numbers of this step.  They are drawn for the whole batch, and each
        # process takes its share.
        g = run.generator("bridge", step)
        which = torch.randint(len(pairs), (cfg.batch,), generator=g, device=device).cpu()[mine]
        t = torch.randint(1, cfg.N + 1, (cfg.batch,), generator=g, device=device)[mine]  # (B,)
        eps = torch.randn(cfg.batch, 3, cfg.size, cfg.size, generator=g, device=device)[mine]
        eps_t, eps_fake, eps_real = eps.split(1, dim=1)                     # (B, 1, H, W) each
        src, tgt = pairs[which].unbind(1)                                   # (B,) each
        each = torch.arange(len(t))
        x = 2 * run.fetch(slices, pick) - 1                                 # (B, C, H, W)
        y = x[each, src, None]                                              # (B, 1, H, W)
        x0 = x[each, tgt, None]                                             # (B, 1, H, W)
        text = prompts(subject[pick], src, tgt)
        cosine_rate(optimiser, step, steps, cfg.lr)                         # falls to 1e-5 [D6]

        x_t = bridge.q_sample(t, x0, y, eps_t)                              # (B, 1, H, W)
        with run.autocast():
            x0_hat = network(x_t, t, y, text)                               # (B, 1, H, W)
        rec = F.l1_loss(x0_hat, x0)                                         # Eq. (6) [D5]
        loss = rec
        if D:
            # Real pairs are drawn jointly: x_{t-1} comes from the same x_t and the true x0 [D5].
            fake_prev = bridge.posterior(t, x_t, x0_hat, y, eps_fake)       # (B, 1, H, W)
            real_prev = bridge.posterior(t, x_t, x0, y, eps_real)           # (B, 1, H, W)
            cosine_rate(optimiser_d, step, steps, cfg.lr_d)                 # [D6]
            D.requires_grad_(True)                                         # first the discriminator
            with run.autocast():
                real = D(real_prev, x_t, t).float()                         # (B, 1, H/8, W/8)
                fake = D(fake_prev.detach(), x_t, t).float()                # (B, 1, H/8, W/8)
            loss_d = discriminator_loss(real, fake)
            if step % 10 == 0:                                              # not always: slow [D5]
                loss_d = loss_d + r1_penalty(D, real_prev, x_t, t)          # in fp32
            # run.update is zero_grad, backward, clipping (here none), and optimiser.step.
            run.update(loss_d, optimiser_d, max_norm=math.inf)
            D.requires_grad_(False)                                      # then generator and SR-Net
            with run.autocast():
                adv = adversarial_loss(D(fake_prev, x_t, t).float())        # Eq. (8)
            loss = loss + cfg.lambda_adv * adv
            run.log(adv=adv, disc=loss_d)
        if sr:
            sem = semantic_loss(text.e_tgt, sr(text.e_mask, sr.pooled(x0_hat)))  # Eqs. (5), (7)
            # Every loss is a mean, not a sum; lambda_1 and lambda_2 assume this [D5].
            loss = loss + cfg.lambda_sem * sem                              # Eq. (9)
            if cfg.sem_real:
                # SR-Net learns from real images of both contrasts, to make it read pictures [D4].
                back = prompts(subject[pick], tgt, src)         # as if y were the target
                of_x0 = semantic_loss(text.e_tgt, sr(text.e_mask, sr.pooled(x0)))
                of_y = semantic_loss(back.e_tgt, sr(back.e_mask, sr.pooled(y)))
                loss = loss + cfg.lambda_sem * (of_x0 + of_y) / 2
            # If the target contrast is always the same, SR-Net can ignore the image [D4].  sem_gain
            # is L_sem with y in the place of x0_hat, minus L_sem.  Near 0 it ignores the image.
            with torch.no_grad():
                other = semantic_loss(text.e_tgt, sr(text.e_mask, sr.pooled(y)))
            run.log(sem=sem, sem_gain=other - sem)
        run.update(loss, optimiser, max_norm=math.inf)
        run.log(loss=loss, rec=rec)
        if validate and ((step + 1) % max(1, steps // 5) == 0 or step + 1 == steps):
            value = validate(G)
            run.log(validation=value)
            best.offer(G, value)


def validation(cfg, run, ds, prompts, bridge):
    """A function G -> mean squared error of up to 16 validation slices, with fixed noise."""
    rows = ds.rows("val", 16)
    if len(rows) == 0:
        run.say("no validation subjects: the last weights are kept")
        return None
    pairs = torch.tensor(all_directions(cfg.source, cfg.target, ds.contrasts))
    each = torch.arange(len(rows))                                          # (V,)
    src, tgt = pairs[each % len(pairs)].unbind(1)                           # (V,) each
    u = run.fetch(ds.images, rows)                                          # (V, C, H, W)
    text = prompts(ds.subject[rows], src, tgt)
    keys = ds.keys(rows)

    def validate(G):
        made = translate(run, G, bridge, u[each, src, None], text, keys)    # (V, 1, H, W)
        return float(F.mse_loss(made, u[each, tgt, None]))
    return validate


def load_model(cfg, run, subjects):
    """The trained networks of a run folder, and the prompts of these subjects."""
    contrasts = run.about["contrasts"]
    encoder = None if cfg.text_file else load_encoder(run)
    prompts = make_prompts(cfg, encoder, subjects, contrasts, run.device)
    # The best weights, or without validation subjects the last ones.
    generator = run.trained(Generator(cfg, **run.about["text"]), "bridge", "best", "generator")
    generator = torch.compile(generator) if run.args.compile else generator
    return Model(cfg, run, contrasts, generator, Bridge(cfg.bridge, cfg.N, cfg.eta), prompts)


# ---- 7. Figures and tables -----------------------------------------------------------------------
# The rows of tables are data: data/paper_tables/metadb.json.  A table has several directions: run
# it once for each, with --source, --target and an --out of its own.


def spoil(cfg, run, u, keys):
    """Fig. 5: Gaussian noise of cfg.noise/255 on u (B, C, H, W) in [0,1], fixed for each slice."""
    if not cfg.noise:
        return u
    noise = []
    for key in keys:
        g = run.generator("spoil", *key)
        noise.append(torch.randn(1, *u.shape[2:], generator=g, device=u.device))  # (1, H, W)
    return (u + cfg.noise / 255 * torch.stack(noise)).clamp(0, 1)           # (B, C, H, W)


def segmenters(cfg, run, ds, targets):
    """Fig. 6: {contrast: a segmenter}, trained on real slices of training subjects."""
    if not cfg.segment:
        return {}
    return downstream.train_segmenters(run, ds, targets, cfg.segment_steps, cfg.batch)


def outline(cfg, ds):
    """For a dry run: the networks, a slice through the generator, the prompts of a subject."""
    if cfg.text_file:                           # a file that does not fit is refused now
        make_prompts(cfg, None, ds.complete, list(ds.contrasts), "cpu")
    dim = clip.SIZES[cfg.encoder]["embed"]
    K = clip.SIZES[cfg.encoder]["text"]["width"]
    G = Generator(cfg, dim, K)
    networks = {"generator": G, "discriminator": PairDiscriminator(cfg.disc_base, cfg.N),
                "SR-Net": SRNet(dim, cfg.pool)}
    image = torch.zeros(1, 1, cfg.size, cfg.size)
    e = torch.zeros(1, dim)
    text = Text(e, e, e, torch.zeros(1, 8, K), torch.ones(1, 8, dtype=torch.bool))
    lines = [f"x_t, y, x0_hat {tuple(image.shape)}, t (1,), E_src, E_tgt (1, {dim})"]
    lines += [f"prompt: {prompt(c, ds.subjects[0].meta, cfg.fields)}" for c in ds.contrasts]
    return Outline(networks, lambda: G(image, torch.ones(1), image, text), lines=lines,
                   slices=cfg.epochs * len(ds.part("train")),
                   before={} if cfg.text_file else encoder_at_work(cfg))  # memory of its stage


# ---- 8. Main -------------------------------------------------------------------------------------

METHOD = script.Method(
    "MetaDB", Config, PRESETS, LIMITS, SAMPLING, STAGES, contrasts=wanted_contrasts,
    patterns=patterns, train=train, load=load_model, outline=outline, disturb=spoil,
    segmenters=segmenters, choice="--only source,target")

# From Python: metadb.load("runs/metadb-ixi") is a common.trained.Trained: .fill(images, known).
load, main = script.entrances(METHOD, __doc__)

if __name__ == "__main__":
    script.guarded(main)
