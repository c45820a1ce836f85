"""UniSyn: any brain image of a person from any other, told by two sentences about the scans.

"UniSyn: A Generative Foundation Model for Universal Medical Image Synthesis across MRI, CT and
PET", MICCAI 2025.  https://papers.miccai.org/miccai-2025/
Part of a collection of reference implementations; MIT licence, see LICENSE.

THE IDEA.  One network makes any modality (MR contrasts, CT, PET) from any other.  Two sentences
tell it what the source is and what the target shall be: modality, scanner, TR, TE, dose, age, sex.
An encoder turns the source into feature maps.  They hold anatomy and contrast.  Each sentence
becomes one gain alpha and one shift beta for every map.  Two lines of arithmetic take the source's
contrast away and give the target's.  A decoder then reads the image off the maps, pixel by pixel.
That is all: no attention, no diffusion, one pass.

SENTENCE (data/prompts.py).  What is not known is the word None.
  Modality: T2w; Age: 63 y; Sex: F; Scanner: 3 T Siemens; Voxel: 1 x 1 x 1 mm; TR: 4000 ms;
  TE: 90 ms; TI: None; FA: None

PIPELINE (B slabs of 8 slices, H x W pixels, F features, D width of an embedding)
  sentences --NeuroCLIP's text tower, frozen--> e_s, e_t (B,D) --mapper--> alpha, beta (B,F,1,1)
  x (B,8,H,W) --encoder--> f_s (B,F,H,W) --strip--> f_0 --inject--> f_t --decoder--> (B,8,H,W)
The slices of a slab are channels of the network, so its convolutions are two-dimensional [D1].
A volume is cut into overlapping tiles, and what is made of them is blended.
Training has the stages "encoder" (NeuroCLIP) and "synthesis".

EQUATIONS
  Sec. 2.2   f_0 = (f_s - beta_s) / alpha_s
  Sec. 2.2   f_t = alpha_t f_0 + beta_t
  Eq. (1)    L_f = | F_x - F_y |           x and y: two scans of one person
  Eq. (2)    L_s = | x_hat - x |           x_hat from y, and y_hat from x
  Eq. (3)    L = lambda_f L_f + lambda_s L_s

SYMBOLS
  paper             code             meaning
  I_s, I_t          x, y             two scans of one person in [0,1]; each is made from the other
  T_s, T_t          sentences        what is said of a scan
  f_s, f_0, f_t     f, c, f          features: of the source, without contrast, of the target
  alpha, beta       alpha, beta      gain and shift of a sentence
  F_x, F_y          c_x, c_y         what Eq. (1) compares [D3]
  -                 u                slice as stored, in [0,1]

COMMANDS
  python unisyn.py --data data/neuro --train --evaluate    makes phantoms on first use; minutes
  python unisyn.py --data FOLDER --train --evaluate         your own scans, best as BIDS
  python unisyn.py --data FOLDER --synthesize --out runs/unisyn-FOLDER --target "modality=T2w TE=90"

DEPARTURES FROM THE PAPER (the reason stands where the code departs)
  [D1]  8 x 64 x 64 is read as 8 channels; blocks are conv, ReLU, conv with a small step.
  [D2]  alpha is exp of a bounded number (--alpha literal: 1 + a number, kept away from 0).
  [D3]  Eq. (1) compares f_0, not f_s (--feat-loss encoded: f_s); losses are means, not sums.
  [D4]  NeuroCLIP: a small 2-D CLIP, only training subjects, several samples of a class in a batch.
  [D5]  Weights start by Kaiming's rule; gradients are clipped; the best validation weights stay.
  [D6]  Sentences are ours, because the paper shows them in a picture only; some values are hidden.
  [D7]  Volumes are cut into tiles with Hann weights; only slices that show enough brain are used.
  [D8]  CT without a skull is scaled from -20 to 100 HU; other intensities as in data/README.md.

NEEDS  data/ and these files of common/:
  benchmark.py cli.py clip.py cohort.py contrastive.py device.py downstream.py embeddings.py
  encoder.py evaluation.py files.py loop.py metrics.py pictures.py run.py score_volumes.py
  script.py sentences.py studies.py table_pages.py tables.py tiles.py tokenizer.py unet.py
"""
import math
import time
from dataclasses import dataclass
from itertools import combinations, groupby, permutations
from typing import Literal

import numpy as np
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from common import clip, metrics, script, studies
from common.cli import load_presets
from common.device import full_precision, seed_of
from common.encoder import load_encoder, train_encoder
from common.files import RunError
from common.loop import Best
from common.sentences import Records, hidden_field, parse_sweep, parse_target, typical_records
from common.tiles import tile_volume
from common.unet import Attention, zeroed
from data import canonical_contrast, record_of, scan_prompt

# ---- 1. Config -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The paper (Sec. 2.2, 3.1, 3.2) states the sizes of the GFM, slices, patch, batch, lr, epochs,
    lambdas and split.  Other defaults are ours.  Phantoms take PRESETS["demo"]."""
    # data
    contrasts: tuple[str, ...] = ()             # modalities to use; empty: all of two subjects
    size: int = 256                             # height and width of a slice in pixels
    train_fraction: float = 0.7                 # share of the subjects that train
    test_subjects: float = 0.2                  # share of the subjects that are scored
    test_slices: int = 1000                     # slices scored per test subject: all there are
    # networks
    encoder: Literal["neuro", "demo"] = "neuro"     # size of NeuroCLIP (common/clip.py)
    width: int = 1024                           # channels of the image encoder
    blocks: int = 24                            # its residual blocks
    features: int = 768                         # maps that the arithmetic works on
    decoder: tuple[int, ...] = (2048, 1024, 1024)   # widths of the decoder's layers but the last
    # training
    encoder_steps: int = 20_000                 # of NeuroCLIP
    encoder_batch: int = 64                     # slices per step of NeuroCLIP
    encoder_lr: float = 5e-4                    # peak learning rate of NeuroCLIP
    epochs: int = 300                           # of the synthesis; one is 4 samples per subject
    batch: int = 8                              # pairs of slabs per step, over all processes
    lr: float = 1e-4                            # learning rate at the start (Adam)
    slices: int = 8                             # slices of a slab
    patch: int = 64                             # height and width of a slab in training
    # method, in training
    tasks: tuple[str, ...] = ()                 # directions such as t1:ct; empty: all pairs
    fusion: Literal["arithmetic", "attention"] = "arithmetic"   # how sentences enter (Table 2)
    prompts: Literal["both", "target", "source", "none"] = "both"   # which of them are read
    alpha: Literal["exp", "literal"] = "exp"    # what makes the gain positive [D2]
    feat_loss: Literal["normalised", "encoded"] = "normalised"  # what Eq. (1) compares [D3]
    lambda_f: float = 0.1                       # weight of Eq. (1); 0 switches it off
    lambda_s: float = 1.0                       # weight of Eq. (2)
    # method, in sampling
    only: tuple[str, ...] = ()                  # directions to score, such as t1:ct; empty: all
    target: str = ""                            # what to make, such as "modality=T2w TE=90"
    sweep: str = "TE=60:140:9"                  # figure "sweep": field=first:last:number
    overlap: float = 0.5                        # share of a tile that its neighbour covers, too
    full_slice: bool = False                    # tiles are as wide as a slice
    sample_batch: int = 16                      # tiles at once; changes rounding only

    def __post_init__(self):
        if self.patch > self.size:
            raise ValueError(f"--patch {self.patch} is larger than --size {self.size}")
        if self.fusion == "attention" and self.features % 8:
            raise ValueError(f"--features {self.features}: attention has 8 heads; give a multiple "
                             "of 8")
        for task in (*self.tasks, *self.only):
            if task.count(":") != 1:
                raise ValueError(f"--tasks, --only {task}: write source:target, such as t1:ct")
        parse_target(self.target)
        parse_sweep(self.sweep)


# Fields that may change without training again.  All others need training in another --out.
SAMPLING = ("only", "target", "sweep", "overlap", "full_slice", "sample_batch", "test_slices")
PRESETS = load_presets("unisyn")                             # sizes for phantoms: data/presets.json
LIMITS = dict(lambda_f=(0, 1e3), overlap=(0, 0.95), slices=(1, 64), test_subjects=(0.01, 10 ** 6))
# A field matters to the stage where it is listed and to later ones; if not listed, to all stages.
STAGES = {
    "encoder": (),
    "synthesis": ("width", "blocks", "features", "decoder", "epochs", "batch", "lr", "slices",
                  "patch", "tasks", "fusion", "prompts", "alpha", "feat_loss", "lambda_f",
                  "lambda_s"),
}

# ---- 2. Data -------------------------------------------------------------------------------------


def wanted_contrasts(cfg):
    """The contrasts that the data shall have; None for all that there are."""
    return tuple(canonical_contrast(c) for c in cfg.contrasts) or None


def directions(tasks, contrasts):
    """The pairs (source, target) that words such as t1:ct name, or all; names of contrasts."""
    if not tasks:
        return list(permutations(contrasts, 2))
    pairs = []
    for task in tasks:
        source, target = (canonical_contrast(name) for name in task.split(":"))
        if source == target or not {source, target} <= set(contrasts):
            raise RunError(f"--tasks, --only {task}: name two different ones of "
                           f"{', '.join(contrasts)}", status=2)
        pairs.append((source, target))
    return pairs


def patterns(cfg, contrasts):
    """The tasks to score, as pairs (known contrasts, contrasts to make)."""
    pairs = directions(cfg.only or cfg.tasks, contrasts)
    return [((source,), (target,)) for source, target in pairs]


# ---- 3. Model ------------------------------------------------------------------------------------


def strip(f, alpha, beta):
    """Sec. 2.2: take the source's contrast away.  f: (B, F, H, W).  Returns f_0."""
    return (f - beta) / alpha


def inject(c, alpha, beta):
    """Sec. 2.2: give the target's contrast.  c: f_0, (B, F, H, W).  Returns f_t."""
    return alpha * c + beta


class ResBlock(nn.Module):
    """x + 0.1 conv(relu(conv(x))).  Without the small step, 24 such blocks would explode [D1]."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + 0.1 * self.conv2(F.relu(self.conv1(x)))                  # (B, W, H, W)


class Encoder(nn.Module):
    """The image encoder: a slab (B, slices, H, W) becomes feature maps (B, F, H, W).

    The paper's blocks have 1024 channels, but its features have 768.  A last convolution must lie
    between.  The maps keep the resolution of the image.
    """

    def __init__(self, slices, width, blocks, features):
        super().__init__()
        self.head = nn.Conv2d(slices, width, 3, padding=1)
        self.body = nn.Sequential(*(ResBlock(width) for _ in range(blocks)),
                                  nn.Conv2d(width, width, 3, padding=1))
        self.tail = nn.Conv2d(width, features, 3, padding=1)

    def forward(self, x):
        h = self.head(x)                                                    # (B, W, H, W)
        h = h + self.body(h)                                                # (B, W, H, W)
        return self.tail(h)                                                 # (B, F, H, W)


class Mapper(nn.Module):
    """The embedding of a sentence (B, D) becomes alpha and beta, (B, F, 1, 1) each.

    At the start alpha is 1 and beta is 0, for every sentence.

    kind "exp": alpha = exp(t - mean of t), t = ln(4) tanh(a / ln 4).  It is positive and lies
    between 1/16 and 16.  The mean is taken away because a common factor of all alphas would change
    nothing but L_f: the network could make L_f small by making alpha large [D2].
    kind "literal": alpha = 1 + a, at least 0.01 away from 0, with its sign.
    """

    def __init__(self, dim, features, kind):
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(dim)
        self.hidden = nn.Linear(dim, dim)
        self.out = zeroed(nn.Linear(dim, 2 * features))

    def forward(self, e):
        h = self.out(F.gelu(self.hidden(self.norm(e))))                     # (B, 2F)
        a, beta = h[:, :, None, None].chunk(2, dim=1)                       # (B, F, 1, 1) each
        if self.kind == "exp":
            bound = math.log(4)
            t = bound * torch.tanh(a / bound)                               # (B, F, 1, 1)
            return torch.exp(t - t.mean(1, keepdim=True)), beta             # (B, F, 1, 1) each
        sign = torch.where(1 + a < 0, -1.0, 1.0)                            # (B, F, 1, 1)
        return sign * (1 + a).abs().clamp(min=0.01), beta                   # (B, F, 1, 1) each


class WordAttention(nn.Module):
    """Table 2's baseline: every pixel looks at the words of the target's sentence.

    It needs the words.  With one pooled vector there would be one key, its weight would always be
    1, and every pixel of every image would get the same vector.
    """

    def __init__(self, features, word_dim):
        super().__init__()
        self.norm_f = nn.LayerNorm(features)
        self.norm_words = nn.LayerNorm(word_dim)
        self.attention = Attention(features, features // 8, word_dim)
        self.norm_mlp = nn.LayerNorm(features)
        self.grow = nn.Linear(features, 2 * features)
        self.shrink = nn.Linear(2 * features, features)

    def forward(self, f, words, is_word):
        """f: (B, F, H, W); words: (B, L, K); is_word: (B, L), False at padding."""
        height, width = f.shape[2:]
        x = f.flatten(2).transpose(1, 2)                                    # (B, HW, F)
        x = x + self.attention(self.norm_f(x), self.norm_words(words), is_word)     # (B, HW, F)
        x = x + self.shrink(F.gelu(self.grow(self.norm_mlp(x))))            # (B, HW, F)
        return x.transpose(1, 2).unflatten(2, (height, width))              # (B, F, H, W)


def make_decoder(features, widths, slices):
    """The image decoder: four fully connected layers, the same for every pixel."""
    layers = []
    for narrow, wide in zip((features, *widths), widths):
        layers += [nn.Conv2d(narrow, wide, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], slices, 1))


class GFM(nn.Module):
    """The generative foundation model: encoder, what the sentences do, decoder.

    dim, word_dim: widths of the embedding and of the words of NeuroCLIP.
    """

    def __init__(self, cfg, dim, word_dim):
        super().__init__()
        self.prompts = cfg.prompts
        self.encoder = Encoder(cfg.slices, cfg.width, cfg.blocks, cfg.features)
        self.decoder = make_decoder(cfg.features, cfg.decoder, cfg.slices)
        for module in (*self.encoder.modules(), *self.decoder.modules()):
            if isinstance(module, nn.Conv2d):                               # [D5]
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        self.mapper = None
        self.attention = None
        if cfg.fusion == "attention":
            self.attention = WordAttention(cfg.features, word_dim)
        elif cfg.prompts != "none":
            self.mapper = Mapper(dim, cfg.features, cfg.alpha)

    def encode(self, x):
        """x: (B, slices, H, W).  Returns f, (B, F, H, W), in float32."""
        return self.encoder(x).float()

    def without_contrast(self, f, text):
        """f_0 of features f, by the sentence of the source (Features)."""
        if self.mapper is None or self.prompts == "target":
            return f
        return strip(f, *self.mapper(text.pooled))                          # (B, F, H, W)

    def with_contrast(self, c, text):
        """f_t, by the sentence of the target (Features)."""
        if self.attention is not None:
            if self.prompts == "none":
                return c
            return self.attention(c, text.tokens, text.mask)                # (B, F, H, W)
        if self.mapper is None or self.prompts == "source":
            return c
        return inject(c, *self.mapper(text.pooled))                         # (B, F, H, W)

    def forward(self, x, source, target):
        """From one slab to another.  x: (B, slices, H, W); source, target: Features."""
        c = self.without_contrast(self.encode(x), source)                   # (B, F, H, W)
        return self.decoder(self.with_contrast(c, target)).float()          # (B, slices, H, W)


# ---- 4. Maths and losses -------------------------------------------------------------------------


def losses(cfg, run, network, x, y, text_x, text_y):
    """Eqs. (1) to (3) for pairs of slabs x, y (B, slices, H, W) in [0,1] of the same people.

    x and y are made from each other.  text_x, text_y: Features of their sentences.
    Returns the loss () and facts {name: ()}.  All losses are means over elements.  With sums, L_f
    would count a hundred times more, because it has more elements [D3].
    """
    with run.autocast():
        f = network.encode(torch.cat([x, y]))                               # (2B, F, H, W)
    # The division by alpha and the losses stay in float32.
    with full_precision(x.device):
        f_x, f_y = f.float().chunk(2)                                       # (B, F, H, W) each
        c_x = network.without_contrast(f_x, text_x)                         # (B, F, H, W)
        c_y = network.without_contrast(f_y, text_y)                         # (B, F, H, W)
        f_t = torch.cat([network.with_contrast(c_x, text_y),
                         network.with_contrast(c_y, text_x)])               # (2B, F, H, W)
    with run.autocast():
        made = network.decoder(f_t).float()                                 # (2B, slices, H, W)
    y_hat, x_hat = made.chunk(2)                                            # (B, slices, H, W) each
    synthesis = (F.l1_loss(y_hat, y) + F.l1_loss(x_hat, x)) / 2             # Eq. (2)
    # If f_x and f_y were equal, the arithmetic would have nothing to take away.  So Eq. (1)
    # compares what is left without contrast [D3].
    both = (c_x, c_y) if cfg.feat_loss == "normalised" else (f_x, f_y)
    features = F.l1_loss(*both)                                             # Eq. (1)
    loss = cfg.lambda_s * synthesis                                         # Eq. (3)
    if cfg.lambda_f:
        loss = loss + cfg.lambda_f * features
    # If the encoder's last layer shrinks and the decoder's first grows, nothing changes but L_f.
    # L_f alone therefore says little.  L_f / rms does not change.
    rms = c_x.detach().square().mean().sqrt()
    facts = {"L_s": synthesis.detach(), "L_f": features.detach(), "rms": rms,
             "L_f/rms": features.detach() / rms}
    return loss, facts


# ---- 5. Sampler ----------------------------------------------------------------------------------


@torch.no_grad()
def translate(model, volume, source, targets):
    """One volume becomes several, one for each target sentence.  The encoder runs once for all.

    volume: (Z, H, W) in [0,1], consecutive slices.  source: a sentence.  targets: list of K
    sentences.  Returns (K, Z, H, W) in [0,1].  Outside of the source's tissue it is 0.
    """
    cfg = model.cfg
    run = model.run
    network = model.network
    text_s = model.encoder.encode_text([source])
    texts_t = [model.encoder.encode_text([target]) for target in targets]

    def repeated(text, B):
        return type(text)(*(part.expand(B, *part.shape[1:]) for part in text))

    def work(tiles):
        x = torch.from_numpy(tiles).to(run.device)                          # (B, z, h, w)
        B = len(x)
        with run.autocast():
            f = network.encode(x)                                           # (B, F, h, w)
        made = []
        for text_t in texts_t:
            with full_precision(x.device):
                c = network.without_contrast(f.float(), repeated(text_s, B))    # (B, F, h, w)
                f_t = network.with_contrast(c, repeated(text_t, B))         # (B, F, h, w)
            with run.autocast():
                made.append(network.decoder(f_t).float())                   # (B, z, h, w)
        return torch.stack(made).cpu().numpy()                              # (K, B, z, h, w)

    side = (cfg.size, cfg.size) if cfg.full_slice else (cfg.patch, cfg.patch)
    tile = (cfg.slices, *side)
    made = tile_volume(volume, tile, cfg.overlap, work, len(targets), cfg.sample_batch)
    tissue = np.stack([ndimage.binary_fill_holes(plane > 0) for plane in volume])   # (Z, H, W)
    return made.clip(0, 1) * tissue                                         # (K, Z, H, W)


@dataclass
class Model:
    """Everything that synthesis needs, trained and frozen."""
    cfg: Config
    run: object                                     # common.run.Run: device, precision, randomness
    contrasts: list
    encoder: clip.CLIP
    network: nn.Module
    records: Records
    volumes = True          # fill gets all slices of a subject at once (common/evaluation.py)

    def source_of(self, known):
        """The contrast to start from: T1w, to which the others are registered, or the first."""
        names = [name for name, there in zip(self.contrasts, known) if there]
        return "t1" if "t1" in names else names[0]

    @property
    def tags(self):
        """What --target says, for the names of files: {contrast: "_TE-90"}."""
        contrast, changes = parse_target(self.cfg.target)
        words = [f"_{field}-{value}" for field, value in changes.items()]
        return {contrast: "".join(words)}

    def make(self, name, source, volume, wanted):
        """Volumes (K, Z, H, W) of a subject, from its scan of the contrast `source`.

        name: of the subject.  volume: (Z, H, W) in [0,1].  wanted: K pairs (contrast, record), what
        shall be made.
        """
        known = scan_prompt(source, self.records.of(name, source))
        return translate(self, volume, known, [scan_prompt(*scan) for scan in wanted])

    def fill(self, u, known, keys, watch=None):
        """Make every contrast that is missing, from one that is known.

        u: (B, C, H, W) in [0,1], slices of subjects; known: (B, C) bool; keys: (subject, slice
        number) of each.  The neighbours of a slice are needed, so all slices of a subject must be
        given, in order (common/evaluation.py does so).  A target is described by the record of the
        scan, if there is one, else by a typical record; what --target says comes on top.
        Returns u with the made contrasts in place, and the seconds that each volume took as a note.
        """
        changed, changes = parse_target(self.cfg.target)
        filled = u.clone()                                                  # (B, C, H, W)
        seconds = torch.zeros(len(u))                                       # (B,)
        together = groupby(range(len(u)), lambda b: (keys[b][0], tuple(known[b].tolist())))
        for (name, here), group in together:
            rows = list(group)                                              # of one subject
            source = self.source_of(here)
            wanted = []
            for contrast, there in zip(self.contrasts, here):
                if not there:
                    record = self.records.of(name, contrast)
                    more = changes if contrast == changed else {}
                    wanted.append((contrast, {**record, **more}))
            volume = u[rows, self.contrasts.index(source)].cpu().numpy()    # (Z, H, W)
            begin = time.perf_counter()
            made = self.make(name, source, volume, wanted)                  # (K, Z, H, W)
            seconds[rows] = time.perf_counter() - begin
            for (contrast, _), slices in zip(wanted, made):
                filled[rows, self.contrasts.index(contrast)] = torch.from_numpy(slices).to(u.device)
        return filled, {"notes": {"seconds": seconds}}


# ---- 6. Training ---------------------------------------------------------------------------------


def train(cfg, run, ds):
    """Both stages.  A stage that is finished is not trained again."""
    run.shard(cfg.batch)                        # refuses an impossible batch before the first stage
    train_subjects = [s for s in ds.complete if s.name in set(ds.split["train"])]
    run.about["typical"] = typical_records(train_subjects, ds.contrasts)
    encoder = train_neuroclip(cfg, run, ds)
    train_synthesis(cfg, run, ds, encoder)


def train_neuroclip(cfg, run, ds):
    """Stage "encoder": a CLIP on slices and their sentences (Sec. 2.1); its loss: common/clip.py.

    A batch takes equal shares of all classes.  A class is one contrast from one vendor.  The paper
    takes one sample of each class.  Then no two samples of a batch would differ in age or TE alone,
    and the text tower would have no reason to read them.  Here a class has several [D4].
    """
    of_subject = {subject.name: subject for subject in ds.subjects}

    def texts(rows):
        captions = []
        for r in rows:
            subject = of_subject[ds.subject[r]]
            captions.append([scan_prompt(c, record_of(subject, c)) if c in subject.files else None
                             for c in ds.contrasts])
        return captions

    classes = {}                                # (contrast, vendor) -> [(row of training, channel)]
    for number, r in enumerate(ds.rows("train")):
        subject = of_subject[ds.subject[r]]
        for c, contrast in enumerate(ds.contrasts):
            if contrast in subject.files:
                vendor = record_of(subject, contrast).get("vendor")
                classes.setdefault((contrast, vendor), []).append((number, c))
    members = list(classes.values())

    def draw(step):
        """The samples of a step: rows and channels, (B,) each."""
        g = np.random.default_rng(seed_of(run.seed, "classes", step))
        chosen = []
        for b in range(cfg.encoder_batch):
            own = members[(step * cfg.encoder_batch + b) % len(members)]
            chosen.append(own[g.integers(len(own))])
        rows, channels = np.array(chosen).T
        return rows, torch.from_numpy(channels)
    return train_encoder(run, ds, texts, cfg.encoder, cfg.size, cfg.encoder_steps,
                         cfg.encoder_batch, cfg.encoder_lr, instance=0, field_dropout=0.1,
                         draw=draw)


class Pairs:
    """Pairs of slabs of one person: what the synthesis is trained on.

    Every pair of contrasts that some person has is equally likely, whether many or few have it.
    """

    def __init__(self, cfg, ds, part):
        self.cfg = cfg
        self.ds = ds
        self.rows = {}                                      # subject -> its rows, from low to high
        for r in ds.rows(part):
            self.rows.setdefault(str(ds.subject[r]), []).append(r)
        wanted = {frozenset(pair) for pair in directions(cfg.tasks, ds.contrasts)}
        self.subjects = {}                                  # (contrast, contrast) -> subjects
        for subject in ds.complete:
            if subject.name not in self.rows:
                continue
            for pair in combinations(ds.contrasts, 2):
                if set(pair) <= set(subject.files) and frozenset(pair) in wanted:
                    self.subjects.setdefault(pair, []).append(subject.name)
        self.pairs = sorted(self.subjects)

    def draw(self, g):
        """One pair at random -> (subject, contrasts, slabs (2, slices, patch, patch)).

        The place is the same in both.  At least a tenth of the slab is tissue, if ten tries find
        such a place.  Half of the slabs are mirrored.  g: numpy generator.
        """
        size = self.cfg.patch
        pair = self.pairs[g.integers(len(self.pairs))]
        name = self.subjects[pair][g.integers(len(self.subjects[pair]))]
        rows = self.rows[name]
        first = g.integers(max(1, len(rows) - self.cfg.slices + 1))
        rows = rows[first:first + self.cfg.slices]
        channels = [self.ds.contrasts.index(contrast) for contrast in pair]
        slabs = np.asarray(self.ds.images[rows], np.float32)[:, channels]   # (Z, 2, H, W)
        slabs = slabs.transpose(1, 0, 2, 3)                                 # (2, Z, H, W)
        lacking = self.cfg.slices - slabs.shape[1]
        slabs = np.pad(slabs, ((0, 0), (0, lacking), (0, 0), (0, 0)))       # (2, slices, H, W)
        for _ in range(10):
            row, column = g.integers(self.cfg.size - size + 1, size=2)
            crop = slabs[:, :, row:row + size, column:column + size]
            if (crop[0] > 0).mean() >= 0.1:
                break
        if g.random() < 0.5:
            crop = crop[..., ::-1]
        return name, pair, crop

    def batch(self, run, encoder, records, count, purpose, step, share=slice(None), hide=0.1):
        """Pairs of step `step` as tensors x, y (B, slices, h, w), and Features of their sentences.

        count: pairs of all processes.  share: those of this process.  hide: in this share of the
        sentences, one field is None.
        """
        slabs = []
        texts = ([], [])
        for number in range(count)[share]:
            g = np.random.default_rng(seed_of(run.seed, purpose, step, number))
            name, pair, crop = self.draw(g)
            slabs.append(crop)
            for side, contrast in enumerate(pair):
                record = records.of(name, contrast)
                # A model that has seen the word None does not fail where a value is not known [D6].
                without = hidden_field(contrast, record, hide, g)
                texts[side].append(scan_prompt(contrast, record, without))
        x, y = torch.from_numpy(np.stack(slabs)).to(run.device).unbind(1)   # (B, slices, h, w) each
        return x, y, encoder.encode_text(texts[0]), encoder.encode_text(texts[1])


def train_synthesis(cfg, run, ds, encoder):
    """Stage "synthesis": the GFM, by Eq. (3).  The weights with the lowest validation loss stay."""
    torch.manual_seed(seed_of(run.seed, "synthesis"))
    records = Records(ds.complete, run.about["typical"])
    pairs = Pairs(cfg, ds, "train")
    if not pairs.pairs:
        raise RunError("no training subject has both contrasts of a task; see --check")
    run.say(f"{len(pairs.pairs)} pairs of contrasts are trained on, each in both directions")
    one = encoder.encode_text([scan_prompt(ds.contrasts[0], {})])
    run.about["text"] = {"dim": one.pooled.shape[1], "word_dim": one.tokens.shape[2]}
    network = GFM(cfg, **run.about["text"])
    network.to(run.device, memory_format=torch.channels_last)
    best = Best(network)
    optimiser = torch.optim.Adam(network.parameters(), lr=cfg.lr, fused=run.device.type == "cuda")
    parts = {"network": network, "best": best, "optimiser": optimiser}
    steps = math.ceil(cfg.epochs * 4 * len(pairs.rows) / cfg.batch)
    mine = run.shard(cfg.batch)                                    # this process's share of a batch
    validate = validation(cfg, run, ds, encoder, records)
    if run.args.compile:
        network.encoder.compile()
        network.decoder.compile()
    # run.steps continues where a checkpoint ended, shows progress, and saves.
    for step in run.steps("synthesis", steps, parts, cfg.batch):
        # "Weight decay by 0.5 every 100 epochs" of 300: the learning rate is halved each third.
        for group in optimiser.param_groups:
            group["lr"] = cfg.lr * 0.5 ** (3 * step // steps)
        batch = pairs.batch(run, encoder, records, cfg.batch, "pairs", step, mine)
        loss, facts = losses(cfg, run, network, *batch)
        run.update(loss, optimiser)         # sets gradients to zero, goes backward, clips and steps
        run.log(loss=loss, **facts)
        if validate and ((step + 1) % max(1, steps // 10) == 0 or step + 1 == steps):
            value = validate(network)
            run.log(validation=value)
            best.offer(network, value)


def validation(cfg, run, ds, encoder, records):
    """A function network -> mean L_s of 32 pairs of validation slabs; None if there are none."""
    pairs = Pairs(cfg, ds, "val") if ds.split["val"] else None
    if pairs is None or not pairs.pairs:
        run.say("no validation pairs: the last weights are kept")
        return None
    batches = [pairs.batch(run, encoder, records, 8, "validation", part, hide=0)
               for part in range(4)]

    @torch.no_grad()
    def validate(network):
        found = [losses(cfg, run, network, *batch)[1]["L_s"] for batch in batches]
        return float(sum(found) / len(found))
    return validate


def load_model(cfg, run, subjects):
    """The trained networks of a run folder, and the sentences about these subjects."""
    contrasts = run.about["contrasts"]
    # The best weights, or without validation subjects the last ones.
    network = run.trained(GFM(cfg, **run.about["text"]), "synthesis", "best", "network")
    records = Records(subjects, run.about["typical"])
    return Model(cfg, run, contrasts, load_encoder(run), network, records)


# ---- 7. Figures and tables -----------------------------------------------------------------------
# The rows of the paper's tables are data: data/paper_tables/unisyn.json.


def judge(cfg, run, ds, task):
    """Table 2: how long a volume took, as rows of results.json."""
    spent = metrics.per_subject(task.notes["seconds"], task.subjects)
    return [metrics.row(task.name, "UniSyn", "seconds", spent)]


def sweep_figure(cfg, run, ds, model):
    """One field of the target's sentence takes many values; see common/studies.py."""
    target, changes = parse_target(cfg.target)
    studies.sweep(run, ds, model, target or "t2", changes, *parse_sweep(cfg.sweep))


def text_figure(cfg, run, ds, model):
    """The sentences of others, or sentences without numbers: is the text read at all?"""
    pairs = [pair for pair in directions(cfg.only or cfg.tasks, ds.contrasts) if pair[0] == "t1"]
    studies.other_sentences(run, ds, model, pairs)


def asked(cfg, contrasts):
    """What --synthesize makes although a subject has it: what --target names."""
    target, _ = parse_target(cfg.target)
    if target and target not in contrasts:
        raise RunError(f"--target {cfg.target}: this model makes {', '.join(contrasts)}", status=2)
    return (target,) if target else ()


def outline(cfg, ds):
    """For a dry run: the networks, a slab through them, and the sentences about a subject."""
    size = clip.SIZES[cfg.encoder]
    network = GFM(cfg, size["embed"], size["text"]["width"])
    x = torch.zeros(1, cfg.slices, cfg.patch, cfg.patch)
    text = clip.Features(torch.zeros(1, 8, size["text"]["width"]),
                         torch.ones(1, 8, dtype=torch.bool), torch.zeros(1, size["embed"]))
    subject = ds.complete[0]
    lines = [f"slab {tuple(x.shape)} -> features (1, {cfg.features}, {cfg.patch}, {cfg.patch}) -> "
             f"slab {tuple(x.shape)}"]
    lines += [f"sentence: {scan_prompt(c, record_of(subject, c))}" for c in subject.files]
    named = {"encoder": network.encoder, "decoder": network.decoder}
    if network.mapper or network.attention:
        named["fusion"] = network.mapper or network.attention
    slabs = 2 * 4 * cfg.epochs * len(ds.split["train"])
    return script.Outline(named, lambda: network(x, text, text), slabs, lines)


# ---- 8. Main -------------------------------------------------------------------------------------

METHOD = script.Method(
    "UniSyn", Config, PRESETS, LIMITS, SAMPLING, STAGES, contrasts=wanted_contrasts,
    patterns=patterns, train=train, load=load_model, outline=outline, judge=judge, asked=asked,
    gaps=True, regions=("tissue", "volume"),
    figures={"sweep": ("one field of the target's sentence takes many values", sweep_figure),
             "text": ("is the text read? other people's sentences, and less of them", text_figure)})

# From Python: unisyn.load("runs/unisyn-neuro") is a common.evaluation.Trained, with .fill.
load, main = script.entrances(METHOD, __doc__)

if __name__ == "__main__":
    script.guarded(main)
