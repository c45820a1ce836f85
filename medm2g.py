"""MedM2G: reports, X-rays, CT and MR from one another, and all of them together.

"MedM2G: Unifying Medical Multi-Modal Generation via Cross-Guided Diffusion with Visual Invariant",
Zhan et al., CVPR 2024.  https://arxiv.org/abs/2403.04290
Part of a collection of reference implementations; MIT licence, see LICENSE.

THE IDEA.  Four modalities: text, X-ray, CT, MR.  No data set holds all of them for one patient, but
some hold two.  So three things are trained on pairs.
Align: prompt encoders of all modalities learn one shared space, pair by pair.  What was aligned
stays frozen, so that MR comes to lie near text although no MR with text was ever seen.
Extract: each image encoder also learns to see what stays when an image is slightly changed (the
visual invariant).  Alignment alone would keep only what both partners of a pair show.
Generate: each modality has a latent diffusion model of its own, which listens to the shared space.
Then the models learn to listen to each other.  At every step of the diffusion, model A looks at the
half-finished latent of B.  So text, X-ray, CT and MR of one invented patient are made together.

PIPELINE (B samples, D width of the shared space, L = 8 prompt tokens, W their width, N places of a
latent, K = 8 guide tokens)
  image (B,1,H,W) --autoencoder, frozen--> z (B,4,H/f,W/f)     report --text VAE, frozen--> z (B,Z)
  any y  --prompt encoder C, frozen--> (B,D) --LayerNorm, linear map--> C(y) (B,L,W)
  z_t of B, f_B (K,W) --context encoder V_B--> (B,N+K,W)
  z_t of A, t, C(y), V_B(...) --U-Net of A--> noise, like z_t
Training: stages "autoencoder", "text", "alignment", "diffusers", "flow" (cross-guidance in rounds).

EQUATIONS (as used here)
  Eq. (1)    z_t = sqrt(alpha_bar_t) z + sqrt(1 - alpha_bar_t) eps                           [D1]
  Eq. (2)    L = || eps - eps_theta(z_t, t, C(y)) ||^2
  Eq. (3)    L_AB = -log( exp(u_i v_i / tau) / sum_j exp(u_i v_j / tau) ),  used as L_AB + L_BA
  Eq. (4)    L_VI = 1/d ( sum_i (1 - C_ii)^2 + .0051 sum_i sum_{j != i} C_ij^2 )             [D2]
  Eq. (5)    f_B = F_emb(phi_s(e_B)).  phi_s picks a few prompts e_B = C_B(x_B); f_B starts there
  Eq. (6)    L_cross = || eps - eps_theta_c(z_t^A, t, C(y), V_B([z_t^B, f_B])) ||^2          [D3]

SYMBOLS
  paper            code                   meaning
  x^M, z^M         image or report, z     a sample of modality M and its latent
  C_M              PromptEncoders         into the shared space
  tau              1 / scale              temperature, learned
  Z_1, Z_2, C_ij   view1, view2, C        two augmented views; the cross-correlation of features
  V_B, f_B, F_emb  Context, Guide, embed  context encoder; guided adaptation; its linear map
  theta_c          CrossGuide             the cross-attention sub-layer
  -                u                      slice as stored, in [0,1]
  -                stream                 a channel of the data: text, xray, ct, t1, t2, ...

COMMANDS
  python medm2g.py --data data/cxr --train --evaluate      makes phantoms on first use; minutes
  python medm2g.py --data FOLDER --train --evaluate        your own data; see data/README.md
  python medm2g.py --data data/ixi --train --evaluate --rounds mri-mri     MR contrasts only

DEPARTURES FROM THE PAPER (the reason stands here, or where the code departs)
  [D1]  The noise process is DDPM's; the paper's "linear" schedule is latent diffusion's, scaled.
  [D2]  Eq. (4): double sum as in Barlow Twins, over the d outputs of a projector.  L_VI + L_AB is
        minimised in the alignment, and nowhere else.
  [D3]  Eq. (6): C(y) is kept; the partner is clean in two thirds of the steps, and then one loss
        counts.  V itself is not aligned (--ctx-contrast: as in CoDi).
  [D4]  Nothing is pre-trained: no Stable Diffusion, BERT or GPT-2.  ADM's U-Net; the paper's depth
        4 (image) is read as levels, its depth 2 (text) as blocks.  Losses are means.  AdamW with
        warm-up and cosine, clipping; the autoencoder has Adam and EMA.  Latents have variance 1.
  [D5]  Alignment is the chain of Sec. 3.5, text-X-ray, text-CT, CT-MR (or --rounds); Secs. 3.2 and
        4 have others.  Cosines, one temperature per round; equal reports share the target.
  [D6]  Prompts: mean-centred, several tokens from one vector, moved a little in training; several
        given streams: their mean.
  [D7]  V, f and the sub-layer in our form: one f_B for all readers, trained by Eq. (6) alone; near
        places attract each other (or --no-place-bias).
  [D8]  Sampler: times from 999 to 0, clamping; a stream listens only to partners that it was
        trained with; several are averaged.
  [D9]  Views for Eqs. (3) and (4) suit each modality: no flips, small changes of brightness.
  [D10] A contrast token tells the MR diffuser which contrast to make.

NEEDS  data/ and these files of common/:
  augment.py autoencoder.py benchmark.py cli.py clip.py codebook.py codecs.py cohort.py
  contrastive.py device.py downstream.py embeddings.py evaluation.py files.py kspace.py loop.py
  metrics.py multimodal.py outline.py pictures.py places.py realism.py report_scores.py rounds.py
  run.py schedules.py score_volumes.py script.py table_pages.py tables.py tasks.py textvae.py
  tokenizer.py towers.py trained.py unet.py vqae.py
"""
import math
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common import multimodal, rounds, schedules, script
from common.augment import augment, shuffled
from common.cli import load_presets
from common.clip import SIZES, Block
from common.codecs import TEXT_FIELDS, CodecConfig, Codecs, at_work, load_codecs, train_codecs
from common.contrastive import contrastive_loss, cosines, groups_of
from common.device import seed_of
from common.kspace import as_scanned, disturb
from common.outline import Outline
from common.places import sine_positions, squared_distances
from common.rounds import Phases, Samples, modality_of, there
from common.textvae import VectorUNet
from common.towers import build_encoders, make_projector
from common.unet import ResBlock, SpatialTransformer, UNet, sinusoid, zeroed
from data import TEXT, canonical_contrast, clean_report

# ---- 1. Config -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(CodecConfig):
    """The paper (Sec. 4) states the latent sizes, the schedule, batches, learning rates, depths,
    DDIM steps, eta and w.  Other defaults are ours.  Phantoms take PRESETS["demo"]."""
    # data
    contrasts: tuple[str, ...] = ()             # streams, such as text,xray,ct,t2; empty: all
    train_fraction: float = 0.8                 # share of the subjects that train
    test_subjects: float = 0.1                  # share that is scored (or number, from 1 on)
    test_slices: int = 20                       # slices scored per test subject
    # alignment
    encoder: Literal["neuro", "base", "demo"] = "neuro"     # size of the towers (common/clip.py)
    align_steps: int = 20_000                   # of each round
    align_batch: int = 256                      # pairs per step
    align_lr: float = 5e-4                      # peak learning rate
    projector: int = 1344                       # width of the head of Eq. (4)
    # diffusers
    base: int = 320                             # channels of the image U-Nets
    mult: tuple[int, ...] = (1, 2, 4, 4)        # channels of their levels, times base
    blocks: int = 2                             # residual blocks per level
    attention: tuple[int, ...] = (64, 32, 16)   # sizes of the maps with attention to prompts
    heads: int = 8                              # of all attention in diffusers and V
    groups: int = 32                            # of every GroupNorm
    text_base: int = 320                        # channels of the text diffuser
    text_mult: tuple[int, ...] = (1, 2, 4, 4)   # channels of its levels, times text_base
    width: int = 768                            # of prompt, context and guide tokens
    guides: int = 8                             # guide tokens of a modality
    steps_image: int = 200_000                  # of each image diffuser
    steps_text: int = 200_000                   # of the text diffuser
    batch: int = 256                            # samples per step, over all processes
    batch_text: int = 1024                      # the same for the text diffuser
    lr: float = 2e-5                            # of image diffusers
    lr_text: float = 5e-5                       # of the text diffuser
    flow_steps: int = 100_000                   # of each round of cross-guidance
    flow_lr: float = 1e-5                       # of cross-guidance
    # method, in training
    ca: bool = True                             # central alignment, Eq. (3) (Table 7)
    vi: bool = True                             # visual invariant, Eq. (4) (Table 7)
    lcag: bool = True                           # cross-guidance, Eqs. (5) and (6) (Table 7)
    rounds: tuple[str, ...] = ("text-xray", "text-ct", "ct-mri")    # pairs, in order [D5]
    guide: Literal["learned", "resampled", "off"] = "learned"   # f_B, Eq. (5)
    prompt_tokens: int = 8                      # 1: as CoDi (Tang et al., 2023) [D6]
    place_bias: bool = True                     # near places attract each other [D7]
    couple_t: bool = False                      # the partner is always at the same t [D3]
    ctx_contrast: float = 0.0                   # weight of a contrastive loss on V, as CoDi [D3]
    schedule: Literal["scaled", "linear"] = "scaled"            # noise schedule [D1]
    accelerate: int = 1                         # 4: MR is a source, of a 16th of k-space (Table 6)
    # method, in sampling
    only: tuple[str, ...] = ()                  # directions to score, such as text:ct, t1+t2:pd
    steps: int = 50                             # DDIM steps
    eta: float = 1.0                            # 1: new noise at each step, 0: none
    w: float = 2.0                              # classifier-free guidance; 1: none
    beam: int = 1                               # beginnings kept when a report is decoded
    given: str = ""                             # a report, for subjects without one
    sample_batch: int = 32                      # samples at once; changes rounding only

    def __post_init__(self):
        factor = 2 ** (len(self.ae_mult) + len(self.mult) - 2)
        if self.size % factor:
            raise ValueError(f"--size {self.size}: must be a multiple of {factor}, for "
                             f"{len(self.ae_mult)} --ae-mult and {len(self.mult)} --mult")
        super().__post_init__()
        rounds.check_names(self.rounds)


# These fields may change after the training.  All others need training in another --out.
SAMPLING = ("only", "steps", "eta", "w", "beam", "given", "sample_batch", "test_slices")
PRESETS = load_presets("medm2g")                            # sizes for phantoms: data/presets.json
LIMITS = dict(eta=(0, 1), w=(0, 100), ctx_contrast=(0, 100), guides=(1, 64), steps=(1, 1000),
              test_subjects=(0.01, 10 ** 6), text_batch=(1, 65536), batch_text=(1, 65536),
              align_batch=(2, 65536), rounds=(0, 0))      # listed here: must not be empty
# --reproduce: a row of a table takes over all stages before the first one whose fields it changes.
STAGES = {
    "autoencoder": (),      # fields listed nowhere, such as ae_steps, act on all stages
    "text": TEXT_FIELDS,
    "alignment": ("accelerate", "encoder", "align_steps", "align_batch", "align_lr", "projector",
                  "ca", "vi", "rounds"),
    "diffusers": ("base", "mult", "blocks", "attention", "heads", "groups", "text_base",
                  "text_mult", "width", "steps_image", "steps_text", "batch", "batch_text", "lr",
                  "lr_text", "prompt_tokens", "schedule"),
    "flow": ("flow_steps", "flow_lr", "lcag", "guide", "guides", "place_bias", "couple_t",
             "ctx_contrast"),
}
T = 1000                                        # steps of the noise process

# ---- 2. Data -------------------------------------------------------------------------------------
# A data.Dataset gives slices and reports; Samples (common/rounds.py) makes pairs of them.  With
# --accelerate, all MR is as a fast scan gives it (common/kspace.py), and never a target.

# ---- 3. Model ------------------------------------------------------------------------------------

# What a U-Net listens to.  prompt: (B, L, W).  partners: list of Partner.  keep: (B,) bool, False
# where a sample must not see its partners; None: all see them.  cross: CrossGuides of the U-Net.
Condition = namedtuple("Condition", "prompt partners keep cross")
# What a partner shows.  tokens: (B, N + K, W).  side: the N places are a grid of side x side that
# lies where the reader's map lies; None if there is no such grid.
Partner = namedtuple("Partner", "tokens side")


class CrossGuide(nn.Module):
    """The cross-attention sub-layer of Eq. (6): the map of A looks at the tokens of its partners.

    Its last layer starts at zero, so an untrained sub-layer changes nothing.  Partner tokens at
    distant places are penalised: -g |p_i - p_j|^2 is added to the logits, with one g > 0 per head,
    from wide to narrow.  The paper has no such term.  Without it, attention must discover from
    nothing that a CT and an MR of one slice lie on one grid [D7].
    """

    def __init__(self, channels, heads, width, place_bias):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(width, channels, bias=False)
        self.to_v = nn.Linear(width, channels, bias=False)
        self.out = zeroed(nn.Linear(channels, channels))
        reach = torch.linspace(0, 1, heads) ** 2                            # (heads,)
        self.falloff = nn.Parameter(1 + 400 * reach) if place_bias else None

    def attend(self, x, partner, height, width):
        """x: (B, n, C), n = height*width.  Returns (B, n, C)."""
        tokens = partner.tokens                                             # (B, N+K, W)
        three = (self.to_q(x), self.to_k(tokens), self.to_v(tokens))        # (B, n or N+K, C) each
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in three)
        bias = None
        if self.falloff is not None and partner.side is not None:
            d = squared_distances(height, width, partner.side, x.device)    # (n, N)
            d = F.pad(d, (0, k.shape[2] - d.shape[1]))                      # (n, N+K)  guides: 0
            bias = (-F.softplus(self.falloff)[:, None, None] * d).to(q.dtype)   # (heads, n, N+K)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)         # (B, heads, n, C/heads)
        return self.out(a.transpose(1, 2).flatten(2))                       # (B, n, C)

    def forward(self, h, condition):
        """h: (B, C, H, W).  Several partners are averaged; training shows one at a time [D8].

        The first b samples have partners.  In guidance, the others are the unconditional half.
        """
        height, width = h.shape[2:]
        b = len(condition.partners[0].tokens)
        x = self.norm(h[:b].flatten(2).transpose(1, 2))                     # (b, n, C)
        x = x + sine_positions(h.shape[1], height, width, h.device).to(x.dtype)
        heard = [self.attend(x, partner, height, width) for partner in condition.partners]
        heard = torch.stack(heard).mean(0)                                  # (b, n, C)
        if condition.keep is not None:
            heard = heard * condition.keep[:, None, None].to(heard.dtype)   # (b, n, C)
        heard = F.pad(heard, (0, 0, 0, 0, 0, len(h) - b))                   # (B, n, C)
        return h + heard.transpose(1, 2).unflatten(2, (height, width))      # (B, C, H, W)


class Listener(nn.Module):
    """In a diffuser's U-Net: attention to the prompt, then to the partners.

    cross: which of the CrossGuides in the condition stands here, or None.  They are no part of the
    U-Net, because they are trained later and alone.
    """

    def __init__(self, channels, cfg, attend, cross):
        super().__init__()
        self.prompt = None
        if attend:
            self.prompt = SpatialTransformer(channels, channels // cfg.heads, cfg.width, cfg.groups)
        self.cross = cross

    def forward(self, h, condition):
        if self.prompt is not None:
            h = self.prompt(h, condition.prompt)                            # (B, C, H, W)
        if self.cross is not None and condition.partners:
            h = condition.cross[self.cross](h, condition)                   # (B, C, H, W)
        return h


def make_networks(cfg, modality, shape):
    """The U-Net of a modality, and its CrossGuides.  shape: of its latent, (z, h, w) or (Z,).

    A CrossGuide ends each level, down and up, and one is in the middle [D7].
    """
    text = modality == "text"
    crosses = nn.ModuleList()

    def plug(site):             # the U-Net asks it for each place (common/unet.py)
        middle = site.stage == "mid"
        if site.where != "block" or (middle and site.index == 1):
            return None
        cross = None
        if cfg.lcag and (site.last or middle):
            cross = len(crosses)
            crosses.append(CrossGuide(site.channels, cfg.heads, cfg.width, cfg.place_bias))
        return Listener(site.channels, cfg, text or middle or site.size in cfg.attention, cross)
    if text:
        # The paper's "depth 2" is read as two blocks per level.
        network = VectorUNet(shape[0], cfg.text_base, cfg.text_mult, 2, plug)
    else:
        network = UNet(shape[0], shape[0], cfg.base, cfg.mult, cfg.blocks, shape[1], cfg.groups,
                       plug)
    return network, crosses


class Diffuser(nn.Module):
    """eps_theta of one modality, with its prompt tokens and the scale of its latents."""

    def __init__(self, cfg, modality, streams, dim, shape, network):
        super().__init__()
        self.streams = [s for s in streams if modality_of(s) == modality]
        self.network = network
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, cfg.prompt_tokens * cfg.width)
        self.null = nn.Parameter(0.02 * torch.randn(cfg.prompt_tokens, cfg.width))
        self.contrast = None
        if modality == "mri":
            self.contrast = nn.Parameter(0.02 * torch.randn(len(self.streams), cfg.width))
        self.register_buffer("mean", torch.zeros(1, shape[0], *[1] * (len(shape) - 1)))
        self.register_buffer("std", torch.ones(1, shape[0], *[1] * (len(shape) - 1)))

    @torch.no_grad()
    def set_scale(self, mean, std):
        """mean, std: (z,), of the latents of this modality."""
        self.mean.copy_(mean.view_as(self.mean))
        self.std.copy_(std.view_as(self.std))

    def whiten(self, z):
        """Latents with mean 0 and variance 1 in this modality.

        alpha_bar_T is .0047 and not 0.  In training, noise at T still holds a trace of the mean.  A
        sampler starts from noise without this trace.  If the mean is not 0, it makes a dark MR too
        bright.  And the sampler clamps at 4, in units of the deviation.
        """
        return (z - self.mean) / self.std

    def prompt_tokens(self, prompt, keep, stream):
        """C(y) as tokens (B, L, W), with the token of the MR contrast behind them [D10].

        prompt: (B, D).  keep: (B,) bool; elsewhere there is no prompt, and null tokens are used.
        One vector becomes several tokens.  With one token, the softmax over one key is 1, and the
        layers for queries and keys never learn (--prompt-tokens 1; MR then still has two) [D6].
        """
        tokens = self.expand(self.norm(prompt)).unflatten(1, self.null.shape)   # (B, L, W)
        tokens = torch.where(keep[:, None, None], tokens, self.null)        # (B, L, W)
        if self.contrast is None:
            return tokens
        own = self.contrast[self.streams.index(stream)]                     # (W,)
        return torch.cat([tokens, own.expand(len(tokens), 1, -1)], dim=1)   # (B, L+1, W)


class Guide(nn.Module):
    """f_B of Eq. (5): K tokens (K, W) that start as prompt vectors of B and are then trained."""

    def __init__(self, count, dim, width):
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(count, dim))
        self.register_buffer("pool", torch.zeros(64, dim))
        self.embed = nn.Linear(dim, width)                                  # F_emb

    @torch.no_grad()
    def start(self, prompts, g):
        """phi_s: 64 random rows of prompt vectors (n, D).  The first K start the guide.

        --guide resampled: training draws K of the 64, and `vectors` stay the first K, for sampling.
        """
        rows = torch.randperm(len(prompts), generator=g, device=g.device)[:64]
        self.pool.copy_(prompts[rows.repeat(64)[:64]])      # a small data set has fewer than 64
        self.vectors.copy_(self.pool[:len(self.vectors)])

    def forward(self, g=None):
        """(K, W).  g: a generator, if other rows shall be drawn from the pool."""
        vectors = self.vectors
        if g is not None:
            rows = torch.randperm(64, generator=g, device=g.device)[:len(vectors)]
            vectors = self.pool[rows]                                       # (K, D)
        return self.embed(vectors)                                          # (K, W)


class Context(nn.Module):
    """V_B of Eq. (6): the latent of B at its time, and f_B, become tokens that A can look at."""

    def __init__(self, cfg, modality, streams, shape):
        super().__init__()
        width = cfg.width
        self.streams = [s for s in streams if modality_of(s) == modality]
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.kind = nn.Parameter(torch.zeros(len(self.streams), width))
        self.text = len(shape) == 1
        if self.text:
            self.stem = nn.Linear(shape[0], 4 * width)
        else:
            layers = [nn.Conv2d(shape[0], width // 2, 3, padding=1), nn.SiLU()]
            self.side = shape[1]
            while self.side > 16:           # larger latents are shown at 16 x 16 places
                layers += [nn.Conv2d(width // 2, width // 2, 4, 2, padding=1), nn.SiLU()]
                self.side //= 2
            self.stem = nn.Sequential(*layers)
            self.block = ResBlock(width // 2, width, width, cfg.groups)
        self.norm = nn.LayerNorm(width)
        self.mix = Block(width, cfg.heads, depth=1)                         # a transformer block

    def forward(self, z, t, guides, stream):
        """z: latent of B.  t: (B,).  guides: (K, W), or None.  Returns (B, N + K, W)."""
        emb = self.time(sinusoid(t, self.kind.shape[1]))                    # (B, W)
        if self.text:
            x = self.stem(z).unflatten(1, (4, -1)) + emb[:, None]           # (B, 4, W)
            x = self.norm(x)                                                # (B, 4, W)
        else:
            h = self.block(self.stem(z), emb)                               # (B, W, h, w)
            x = self.norm(h.flatten(2).transpose(1, 2))                     # (B, N, W)
            x = x + sine_positions(x.shape[2], *h.shape[2:], x.device)      # (B, N, W)
        x = x + self.kind[self.streams.index(stream)]                       # (B, N, W)
        if guides is not None:
            x = torch.cat([x, guides.expand(len(x), -1, -1)], dim=1)        # (B, N+K, W)
        return self.mix(x)                                                  # (B, N+K, W)


class Flows(nn.Module):
    """All diffusers, context encoders and guides.  shapes: {modality: shape of its latent}."""

    def __init__(self, cfg, streams, dim, shapes):
        super().__init__()
        self.cfg = cfg
        self.diffusers = nn.ModuleDict()
        self.crosses = nn.ModuleDict()
        self.contexts = nn.ModuleDict()
        self.guides = nn.ModuleDict()
        for modality, shape in shapes.items():
            network, self.crosses[modality] = make_networks(cfg, modality, shape)
            self.diffusers[modality] = Diffuser(cfg, modality, streams, dim, shape, network)
            if cfg.lcag:
                self.contexts[modality] = Context(cfg, modality, streams, shape)
            if cfg.lcag and cfg.guide != "off":
                self.guides[modality] = Guide(cfg.guides, dim, cfg.width)

    def crossing(self, modality):
        """What a round of cross-guidance trains of a modality: its sub-layers, V and f."""
        parts = (self.crosses, self.contexts, self.guides)
        return nn.ModuleList([part[modality] for part in parts if modality in part])

    def every_crossing(self):
        """crossing of every modality, as the checkpoint of the stage "flow" holds it."""
        return nn.ModuleDict({m: self.crossing(m) for m in self.diffusers})

    def show(self, reader, stream, z, t, g=None):
        """V_B([z_t^B, f_B]) of a stream, as the stream `reader` sees it: a Partner.

        Only CT and MR slices lie on one grid.  An X-ray is a projection along another axis.
        """
        modality = modality_of(stream)
        guides = None
        if modality in self.guides:
            guides = self.guides[modality](g if self.cfg.guide == "resampled" else None)
        context = self.contexts[modality]
        tokens = context(z, t, guides, stream)                              # (B, N+K, W)
        one_grid = {modality, modality_of(reader)} <= {"ct", "mri"}
        return Partner(tokens, context.side if one_grid else None)

    def predict(self, stream, z_t, t, prompt, keep_prompt, partners=(), keep=None):
        """The noise of a stream, like z_t.

        prompt: (B, D).  keep_prompt: (B,) bool.  partners: list of Partner.  keep: (B,) bool.
        """
        diffuser = self.diffusers[modality_of(stream)]
        tokens = diffuser.prompt_tokens(prompt, keep_prompt, stream)        # (B, L, W)
        cross = self.crosses[modality_of(stream)]
        return diffuser.network(z_t, t, Condition(tokens, partners, keep, cross))


# ---- 4. Maths and losses -------------------------------------------------------------------------


def alpha_bar_of(schedule):
    """alpha_bar_t of Eq. (1), (T,).  What latent diffusion calls linear is "scaled" here [D1]."""
    make = schedules.linear_alpha_bar if schedule == "linear" else schedules.scaled_linear_alpha_bar
    return make(T, 0.00085, 0.0120)


def info_nce(u, v, scale, groups):
    """Eq. (3) in both directions, L_AB + L_BA, ().  u, v: (B, D).  groups: (B,) integers.

    Reports of healthy patients are often equal.  Equal ones are all right answers [D5].
    """
    return 2 * contrastive_loss(scale * cosines(u, v), groups)  # contrastive_loss: their mean


def roughly(e, noise):
    """Prompts (B, D) of length 1, moved a little, by .2.  noise: N(0,1) like e.

    Prompts of two modalities that belong together are near each other, but not equal [D6].
    """
    return F.normalize(e + 0.2 * noise / e.shape[1] ** 0.5, dim=1)          # (B, D)


def visual_invariant(view1, view2, off_diagonal=0.0051):
    """Eq. (4), ().  view1, view2: (B, d), features of two views of the same images.

    Each view is normalised by itself over the batch, to mean 0 and deviation 1/sqrt(B).  The
    diagonal of C then holds correlations.  As printed, the sums run over one index and are divided
    by the size of the data set; we read them as Barlow Twins has them, divided by d [D2].
    """
    n, d = view1.shape

    def normalised(z):
        z = z - z.mean(0)                                                   # (B, d)
        return z / (z.var(0, correction=0) + 1e-5).sqrt() / n ** 0.5        # (B, d)
    C = normalised(view1).T @ normalised(view2)                             # (d, d)
    on = (1 - C.diagonal()).square().sum()                                  # ()
    off = C.square().sum() - C.diagonal().square().sum()                    # ()
    return (on + off_diagonal * off) / d


# ---- 5. Sampler ----------------------------------------------------------------------------------


def guided(conditional, unconditional, w):
    """Classifier-free guidance: w = 1 is the conditional noise, larger w goes further."""
    return unconditional + w * (conditional - unconditional)


@torch.no_grad()
def sample(predict, start, times, alpha_bar, eta, noise, watch=None):
    """DDIM for several streams together.  Returns their latents, {stream: z}.

    predict(states, t) -> {stream: noise}; it reads all states at once, so that the order of the
    streams does not matter.  start: {stream: N(0,1)}.  times: falling.  alpha_bar: (T,).
    noise: {stream: function () -> fresh N(0,1)}.  watch: a list for (time, states, estimates).
    """
    states = dict(start)
    for i, time in enumerate(times):
        a = float(alpha_bar[time])
        # After the last step, nothing of the noise is left.
        a_next = float(alpha_bar[times[i + 1]]) if i + 1 < len(times) else 1.0
        predicted = predict(states, time)
        ends = {}
        for stream, z_t in states.items():
            # Latents have deviation 1.  What lies outside of 4 is an error that would grow [D8].
            ends[stream] = schedules.x0_from_eps(z_t, a, predicted[stream]).clamp(-4, 4)
        if watch is not None:
            watch.append((time, states, ends))
        states = {stream: schedules.ddim_step(z_t, ends[stream], a, a_next, eta, noise[stream]())
                  for stream, z_t in states.items()}
    return states


@dataclass
class Model:
    """Everything that sampling needs, trained and frozen."""
    cfg: Config
    run: object                                     # common.run.Run: device, precision, randomness
    contrasts: list
    codecs: Codecs
    encoders: nn.Module
    flows: nn.Module
    reports: dict                                   # {subject: report}
    selective = True        # fill is told which contrasts to make (common/trained.py)

    def decode(self, stream, z):
        """Images (B, 1, H, W) in [0,1], or a list of str.  z: whitened latents."""
        diffuser = self.flows.diffusers[modality_of(stream)]
        return self.codecs.decode(stream, z * diffuser.std + diffuser.mean)

    def partners_of(self, stream, others):
        """Those of the others that guide a stream: pairs of modalities that were a round [D8]."""
        trained = {frozenset(name.split("-")) for name in self.cfg.rounds}
        return [other for other in others if other != stream
                and frozenset((modality_of(stream), modality_of(other))) in trained]

    @torch.no_grad()
    def generate(self, given, make, keys, watch=None):
        """Make streams together.

        given: {stream: images (B, 1, H, W) in [0,1], or B texts}; may be empty.  make: names of
        streams.  keys: (subject, slice number) of each sample; they fix the noise.
        Returns {stream: images (B, 1, H, W) in [0,1], or B texts}.
        """
        B = len(keys)
        device = self.run.device
        given = {stream: as_scanned(self.cfg, stream, x) for stream, x in given.items()}
        clean = {}
        for stream, x in given.items():
            diffuser = self.flows.diffusers[modality_of(stream)]
            clean[stream] = diffuser.whiten(self.codecs.encode(stream, x))
        e = torch.zeros(B, self.encoders.dim, device=device)                # (B, D)
        for stream, x in given.items():
            e = e + self.encoders.prompt(modality_of(stream), x)            # (B, D)
        e = F.normalize(e, dim=1)                                           # (B, D)  their mean
        told = torch.full((B,), bool(given), device=device)                 # (B,)
        zero = torch.zeros(B, dtype=torch.long, device=device)              # (B,)

        def guides_of(stream, others):
            return self.partners_of(stream, others) if self.cfg.lcag else []

        # What is given does not change, so its context is computed once.
        fixed = {}
        for reader in make:
            for stream in guides_of(reader, given):
                fixed[reader, stream] = self.flows.show(reader, stream, clean[stream], zero)

        def predict(states, time):
            t = torch.full((B,), time, device=device)                       # (B,)
            found = {}
            for stream, z_t in states.items():
                partners = [context for (reader, _), context in fixed.items() if reader == stream]
                for other in guides_of(stream, states):
                    partners.append(self.flows.show(stream, other, states[other], t))
                found[stream] = self.noise_of(stream, z_t, t, e, told, partners)
            return found
        start = {}
        noise = {}
        for stream in make:
            like = torch.zeros(B, *self.codecs.shape(stream), device=device)
            _, noise[stream] = self.run.noise([(*key, stream) for key in keys], like)   # a function
            start[stream] = noise[stream]()
        times = torch.linspace(T - 1, 0, self.cfg.steps).round().long().tolist()
        alpha_bar = alpha_bar_of(self.cfg.schedule)
        ends = sample(predict, start, times, alpha_bar, self.cfg.eta, noise, watch)
        return {stream: self.decode(stream, z) for stream, z in ends.items()}

    def noise_of(self, stream, z_t, t, e, told, partners):
        """The guided noise of a stream.  In the batch, the second half is told nothing."""
        with self.run.autocast():
            if self.cfg.w == 1:
                return self.flows.predict(stream, z_t, t, e, told, partners).float()
            both = self.flows.predict(stream, torch.cat([z_t, z_t]), t.repeat(2), e.repeat(2, 1),
                                      torch.cat([told, torch.zeros_like(told)]), partners).float()
        return guided(*both.chunk(2), self.cfg.w)

    def fill(self, u, known, keys, watch=None, wanted=None):
        """Make the missing images by `generate`.  common/trained.py tells what u and so on are."""
        return multimodal.fill_images(self, u, known, keys, watch, wanted), {}


# ---- 6. Training ---------------------------------------------------------------------------------


def train(cfg, run, ds):
    """All stages.  A stage that is finished is not trained again."""
    pairs = rounds.checked_rounds(cfg.rounds, ds.contrasts, ds.present[ds.rows("train")])
    codecs = train_codecs(cfg, run, ds)
    change = partial(as_scanned, cfg)
    samples = Samples(run, ds, "train", codecs, change, str(cfg.accelerate))
    encoders = align(cfg, run, samples, pairs)
    unseen = Samples(run, ds, "val", codecs, change, str(cfg.accelerate))
    rounds.say_retrieval(run, unseen, encoders)
    shapes = {m: codecs.shape(TEXT if m == "text" else "") for m in there(ds.contrasts)}
    run.about["shapes"] = {m: list(shape) for m, shape in shapes.items()}
    flows = train_diffusers(cfg, run, samples, encoders, pairs)
    train_flow(cfg, run, samples, encoders, flows, pairs)


def align(cfg, run, samples, pairs):
    """Stage "alignment": Eq. (3) in rounds, each with Eq. (4) on the image encoders it trains.

    Both losses read the same views.  With unchanged images and reports, Eq. (3) would soon be small
    because the few pairs are known by heart [D9].
    All processes work on the same batch, because every sample needs all others as negatives.
    """
    torch.manual_seed(seed_of(run.seed, "alignment"))
    streams = samples.streams
    encoders = build_encoders(cfg, run, streams, [text for text in samples.reports if text])
    heads = nn.ModuleDict({m: make_projector(encoders.dim, cfg.projector) for m in there(streams)
                           if m != "text"})
    networks = {"encoders": encoders.to(run.device), "heads": heads.to(run.device)}
    fresh = rounds.fresh_of(cfg.rounds)                         # what each round trains
    opened = []
    for r, modalities in enumerate(fresh):
        opened.append([*(encoders.towers[m] for m in modalities), encoders.log_scale[r],
                       *(heads[m] for m in modalities if m in heads)])
    each = cfg.align_steps if cfg.ca or cfg.vi else 0
    phases = Phases(run, "alignment", [each] * len(pairs), networks, opened,
                    [cfg.align_lr] * len(pairs), cfg.align_batch)
    for r, local, step, optimiser in phases:
        pair, rows = rounds.batch_of(run, f"align {r}", pairs[r], cfg.align_batch, local)
        g = run.generator("views", step)
        u = {}                                                              # {channel: (B, D)}
        loss = torch.zeros((), device=run.device)
        for c in pair:
            modality = modality_of(streams[c])
            x = samples.raw(rows, c)
            if modality == "text":
                u[c] = encoders(modality, [shuffled(report, g) for report in x])
                continue
            views = torch.cat([augment(x, modality, g) for _ in range(1 + cfg.vi)])
            with run.autocast():
                features = encoders(modality, views)                        # (2B, D), or (B, D)
            u[c] = features[:len(x)]                                        # (B, D)
            if cfg.vi and modality in fresh[r]:
                z1, z2 = (heads[modality](part) for part in features.chunk(2))  # (B, d) each
                vi = visual_invariant(z1, z2)
                loss = loss + vi
                run.log(vi=vi)
        if cfg.ca:
            texts = [samples.raw(rows, c) for c in pair if streams[c] == TEXT]
            groups = groups_of(texts[0] if texts else rows.tolist())        # (B,)
            scale = encoders.log_scale[r].exp()
            nce = info_nce(*u.values(), scale, groups.to(run.device))
            loss = loss + nce
            run.log(nce=nce, scale=scale)
        if loss.requires_grad:              # without --ca, a round may have no image to train on
            run.update(loss, optimiser)     # sets gradients to zero, goes backward, clips and steps
        run.log(loss=loss)
        with torch.no_grad():
            encoders.log_scale[r].clamp_(0, math.log(100))
        if cfg.ca and step + 1 == each * len(pairs):
            encoders.centre(samples)
    return encoders


def train_diffusers(cfg, run, samples, encoders, pairs):
    """Stage "diffusers": each modality alone, Eq. (2).

    The prompt is the other half of a pair, never the sample itself.
    Without central alignment (--no-ca), nothing has told the prompt encoders what to see.  Each is
    then trained by the first diffuser that reads it, as in a plain latent diffusion model.
    """
    torch.manual_seed(seed_of(run.seed, "diffusers"))
    streams = samples.streams
    flows = Flows(cfg, streams, encoders.dim, run.about["shapes"])
    flows.to(run.device, memory_format=torch.channels_last)
    order = [m for m in ("xray", "ct", "mri", "text") if m in flows.diffusers]
    sources = {m: {} for m in order}                        # modality -> {(target, source): rows}
    for of_round in pairs:
        for (a, b), rows in of_round.items():
            sources[modality_of(streams[a])][a, b] = rows
            sources[modality_of(streams[b])][b, a] = rows
    order = [m for m in order if sources[m]]
    opened = []
    taught = set() if not cfg.ca else set(encoders.towers)  # prompt encoders that are trained
    own = {}                                                # those that a diffuser trains
    for m in order:
        flows.diffusers[m].set_scale(*samples.moments(m))
        reads = {modality_of(streams[source]) for _, source in sources[m]}
        own[m] = reads - taught
        taught |= reads
        opened.append([flows.diffusers[m], *(encoders.towers[other] for other in sorted(own[m]))])
    lengths = [cfg.steps_text if m == "text" else cfg.steps_image for m in order]
    peaks = [cfg.lr_text if m == "text" else cfg.lr for m in order]
    alpha_bar = alpha_bar_of(cfg.schedule).to(run.device)                   # (T,)
    networks = {"diffusers": flows.diffusers, "encoders": encoders}
    for now, local, step, optimiser in Phases(run, "diffusers", lengths, networks, opened, peaks,
                                              cfg.batch):
        modality = order[now]
        diffuser = flows.diffusers[modality]
        batch = cfg.batch_text if modality == "text" else cfg.batch
        mine = run.shard(batch)
        (target, source), rows = rounds.batch_of(run, f"ldm {modality}", sources[modality], batch,
                                                 local)
        rows = rows[mine]
        draw = rounds.draws(run.generator("ldm", step), batch, run.device, mine)
        z = diffuser.whiten(samples.latent(rows, target))                   # (B, ...)
        other = modality_of(streams[source])
        if other in own[modality]:
            e = encoders.prompt(other, samples.raw(rows, source))           # (B, D)
        else:
            e = samples.prompt(encoders, rows, source)                      # (B, D)
        e = roughly(e, draw("normal", e))                                   # (B, D)
        t = draw("time")                                                    # (B,)
        eps = draw("normal", z)                                             # (B, ...)
        keep = draw("uniform") >= 0.1                                       # (B,)
        with run.autocast():
            z_t = schedules.q_sample(z, rounds.at(alpha_bar, t, z), eps)    # (B, ...)
            noise = flows.predict(streams[target], z_t, t, e, keep)         # (B, ...)
        loss = F.mse_loss(noise.float(), eps)
        run.update(loss, optimiser)
        run.log(loss=loss, **{f"loss_{modality}": loss})
    return flows


def train_flow(cfg, run, samples, encoders, flows, pairs):
    """Stage "flow": Eqs. (5) and (6), one round after the other (Sec. 3.5, Fig. 3).

    A round trains V, f and the sub-layers of the modalities that are new to it.  The U-Nets stay as
    they are.  So does what earlier rounds trained, but gradients pass through it: in text-CT, the
    loss of text reaches V of CT through the frozen sub-layers of text.
    """
    if not cfg.lcag:
        run.skip("flow")
        return
    torch.manual_seed(seed_of(run.seed, "flow"))
    for m, guide in flows.guides.items():
        found = [samples.prompt(encoders, np.flatnonzero(samples.present[:, c]), c)
                 for c in samples.of_modality(m)]
        guide.start(torch.cat(found), run.generator("guide", m))
    opened = [[flows.crossing(m) for m in fresh] for fresh in rounds.fresh_of(cfg.rounds)]
    alpha_bar = alpha_bar_of(cfg.schedule).to(run.device)                   # (T,)
    phases = Phases(run, "flow", [cfg.flow_steps] * len(pairs),
                    {"crossing": flows.every_crossing()}, opened, [cfg.flow_lr] * len(pairs),
                    cfg.batch, decay=1e-4)
    for r, local, step, optimiser in phases:
        pair, rows = rounds.batch_of(run, f"flow {r}", pairs[r], cfg.batch, local)
        loss, facts = cross_loss(cfg, run, samples, encoders, flows, pair, rows, step, alpha_bar)
        run.update(loss, optimiser)
        run.log(loss=loss, **facts)


def cross_loss(cfg, run, samples, encoders, flows, pair, rows, step, alpha_bar):
    """Eq. (6) for a batch of pairs.  Returns the loss () and facts {name: ()}.

    Eq. (6) shows both latents at one time t, and then both losses count.  But most tasks give one
    of them clean.  So in a third of the steps A is made from a clean B, and in another third B from
    a clean A; then one loss counts (or --couple-t: always both) [D3].
    """
    a, b = (samples.streams[c] for c in pair)
    g = run.generator("flow", step)
    mine = run.shard(len(rows))
    draw = rounds.draws(g, len(rows), run.device, mine)
    lot = int(torch.randint(3, (), generator=g, device=run.device))
    mode = "joint" if cfg.couple_t else ("joint", "a", "b")[lot]            # what is made
    rows = rows[mine]
    t = draw("time")                                                        # (B,)
    zeros = torch.zeros_like(t)                                             # (B,)
    states = {}
    times = {}
    noise = {}
    for stream, c, made in ((a, pair[0], mode != "b"), (b, pair[1], mode != "a")):
        z = flows.diffusers[modality_of(stream)].whiten(samples.latent(rows, c))
        noise[stream] = draw("normal", z)                                   # (B, ...)
        times[stream] = t if made else zeros
        noisy = schedules.q_sample(z, rounds.at(alpha_bar, t, z), noise[stream])    # (B, ...)
        states[stream] = noisy if made else z
    # A tenth of the samples has neither prompt nor partner; the guidance needs such a model.  If
    # both are noisy, half of the samples have no prompt, like streams that are made from nothing.
    keep = draw("uniform") >= 0.1                                           # (B,)
    told = keep & (draw("uniform") >= (0.5 if mode == "joint" else 0))      # (B,)
    total = 0.0
    facts = {}
    for stream, other, about in ((a, b, pair[1]), (b, a, pair[0])):
        if mode == "joint" or stream == {"a": a, "b": b}[mode]:
            e = samples.prompt(encoders, rows, about)                       # (B, D)
            e = roughly(e, draw("normal", e))                               # (B, D)
            with run.autocast():
                partner = flows.show(stream, other, states[other], times[other], g)
                found = flows.predict(stream, states[stream], times[stream], e, told, [partner],
                                      keep)
            facts[f"loss_{stream}"] = F.mse_loss(found.float(), noise[stream])
            total = total + facts[f"loss_{stream}"]
    if cfg.ctx_contrast:
        shown = [flows.show(a, s, states[s], times[s], g).tokens.mean(1) for s in (a, b)]
        groups = torch.arange(len(rows), device=run.device)
        facts["ctx"] = info_nce(*shown, 1 / 0.07, groups)
        total = total + cfg.ctx_contrast * facts["ctx"]
    return total, {name: value.detach() for name, value in facts.items()}


def load_model(cfg, run, subjects):
    """The trained networks of a run folder, and the reports of these subjects."""
    streams = run.about["contrasts"]
    encoders = run.trained(build_encoders(cfg, run, streams, None), "diffusers", "encoders")
    flows = Flows(cfg, streams, encoders.dim, run.about["shapes"])
    run.trained(flows.diffusers, "diffusers", "diffusers")
    if cfg.lcag and run.stages.get("flow", {}).get("step"):     # else they are still as if absent
        run.trained(flows.every_crossing(), "flow", "crossing")
    flows.to(run.device).requires_grad_(False).eval()
    reports = {subject.name: clean_report(subject.report, mimic=True) for subject in subjects
               if subject.report}
    return Model(cfg, run, streams, load_codecs(cfg, run), encoders, flows, reports)


# ---- 7. Figures and tables -----------------------------------------------------------------------
# The rows of the paper's tables are data: data/paper_tables/medm2g.json.


def outline(cfg, ds):
    """For a dry run: the networks, and a latent through the diffuser of the first image stream."""
    streams = ds.contrasts
    autoencoder, shape, before = at_work(cfg)
    shapes = {m: (cfg.text_z,) if m == "text" else shape for m in there(streams)}
    dim = SIZES[cfg.encoder]["embed"]
    flows = Flows(cfg, streams, dim, shapes)
    networks = {"image autoencoder": autoencoder}
    for m, diffuser in flows.diffusers.items():
        networks[f"diffuser of {m}"] = diffuser
        networks[f"cross-guidance of {m}"] = flows.crossing(m)
    stream = next(s for s in streams if s != TEXT)
    z = torch.zeros(1, *shape)
    t = torch.zeros(1, dtype=torch.long)
    told = torch.ones(1, dtype=torch.bool)
    lines = [f"{stream} (1, 1, {cfg.size}, {cfg.size}) -> latent {tuple(z.shape)}",
             f"rounds: {', '.join(cfg.rounds)}"]
    e = torch.zeros(1, dim)

    def step():
        partners = [flows.show(stream, stream, z, t)] if cfg.lcag else []
        return flows.predict(stream, z, t, e, told, partners)
    return Outline(networks, step, slices=2 * cfg.flow_steps * cfg.batch * len(cfg.rounds),
                   lines=lines, before=before)


# ---- 8. Main -------------------------------------------------------------------------------------

METHOD = script.Method(
    "MedM2G", Config, PRESETS, LIMITS, SAMPLING, STAGES, train=train, load=load_model,
    contrasts=lambda cfg: tuple(map(canonical_contrast, cfg.contrasts)) or None,
    patterns=rounds.patterns, outline=outline, beside=multimodal.autoencoder_alone,
    disturb=disturb, overall=multimodal.overall, gaps=True, texts=True,
    figures={"joint": ("all images of a patient from a report", multimodal.draw_joint)})

# From Python: medm2g.load("runs/medm2g-cxr") is a common.trained.Trained, with .fill.
load, main = script.entrances(METHOD, __doc__)

if __name__ == "__main__":
    script.guarded(main)
