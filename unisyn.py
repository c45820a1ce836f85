"""UniSyn: any brain image of a person from any other, told in words what both images are.

"UniSyn: A Generative Foundation Model for Universal Medical Image Synthesis across MRI, CT and
PET", MICCAI 2025.  https://papers.miccai.org/miccai-2025/
Part of a collection of reference implementations; MIT licence, see LICENSE.

THE IDEA.  One network makes any modality (MR contrasts, CT, PET) from any other.  Two sentences say
what the source is and what the target will be: modality, scanner, TR, TE, dose, age, sex.  A text
encoder, NeuroCLIP, reads them.  It was trained before to match sentences and pictures.
An image encoder turns the source into feature maps.  They hold anatomy and contrast.  Each sentence
becomes one gain alpha and one shift beta for every map.  Two lines of arithmetic take the source's
contrast away and give the target's.  A decoder then makes the image from the maps, pixel by pixel.
That is all: one pass, no diffusion, and attention only in the text encoder.

SENTENCE (data/prompts.py, in one line).  What is not known is the word None.
  Modality: T2w; Age: 63 y; Sex: F; Scanner: 3 T Siemens Prisma; Voxel: 1 x 1 x 1 mm; TR: 4000 ms;
  TE: 90 ms; TI: None; FA: 90 deg

PIPELINE (B slabs of 8 slices, H x W pixels, F features, D width of an embedding)
  sentences --NeuroCLIP's text tower, frozen--> e_s, e_t (B,D) --mapper--> alpha, beta (B,F,1,1)
  x (B,8,H,W) --encoder--> f_s (B,F,H,W) --strip--> f_0 --inject--> f_t --decoder--> (B,8,H,W)
The slices of a slab are the channels of the network, so its convolutions are two-dimensional.  A
volume is cut into overlapping tiles, whose results are blended.
Training has the stages "encoder" (NeuroCLIP) and "synthesis" (all the rest).

EQUATIONS
  Sec. 2.2   f_0 = (f_s - beta_s) / alpha_s
  Sec. 2.2   f_t = alpha_t f_0 + beta_t
  Eq. (1)    L_f = | F_x - F_y |           x and y: two scans of one person
  Eq. (2)    L_s = | x_hat - x |           x_hat is made from y, and y_hat from x
  Eq. (3)    L = lambda_f L_f + lambda_s L_s

SYMBOLS
  paper             code             meaning
  I_s, I_t          x, y             two scans of one person in [0,1]; each is made from the other
  T_s, T_t          text_x, text_y   what NeuroCLIP makes of their sentences
  f_s, f_0, f_t     f, c, f_t        features: of the source, without contrast, of the target
  alpha, beta       alpha, beta      gain and shift of a sentence
  F_x, F_y          c_x, c_y         what Eq. (1) compares [D3]
  -                 u                slice as stored, in [0,1]

COMMANDS
  python unisyn.py --data data/neuro --train --evaluate    makes phantoms on first use; minutes
  python unisyn.py --data FOLDER --train --evaluate        your own scans, best as BIDS
  python unisyn.py --data FOLDER --synthesize --out runs/unisyn-FOLDER --target "modality=T2w TE=90"
  python unisyn.py --data FOLDER --reproduce sweep --sweep TE=60:140:9     one image for each TE

DEPARTURES FROM THE PAPER (the reason stands here, or where the code departs)
  [D1]  Image encoder: order of a block, its small step, a long skip, a last convolution.
  [D2]  Mapper: its layers; alpha is bounded, its geometric mean is 1 (or --alpha literal).
  [D3]  Eq. (1) compares f_0 (or --feat-loss encoded: f_s); losses are means, not sums.
  [D4]  NeuroCLIP is 2-D, learns from training subjects alone; counted in steps; classes are ours.
  [D5]  First weights, clipping, what an epoch is: the paper is silent.  The best weights stay.
  [D6]  Sentences are ours, because the paper shows them in a picture; some values are hidden.
  [D7]  Draw of pairs, places, mirroring; tiles and mask in sampling: the paper is silent.
  [D8]  The user registers the scans and removes the skull.  Intensities: data/README.md.
  [D9]  Table 2's baseline is one block of attention to words; its form is ours.

NEEDS  data/ and these files of common/:
  benchmark.py cli.py clip.py cohort.py contrastive.py device.py downstream.py embeddings.py
  encoder.py evaluation.py files.py loop.py metrics.py outline.py pictures.py run.py
  score_volumes.py script.py sentences.py slabs.py studies.py table_pages.py tables.py tasks.py
  tiles.py tokenizer.py trained.py unet.py
"""
import math
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from common import clip, script, sentences, studies
from common.cli import load_presets
from common.device import full_precision, seed_of
from common.embeddings import Features
from common.encoder import encoder_at_work, load_encoder, train_encoder
from common.files import RunError
from common.loop import Best
from common.outline import Outline
from common.slabs import Pairs
from common.tasks import named_pairs
from common.tiles import tile_volume
from common.unet import Attention, zeroed
from data import canonical_contrast, record_of, scan_prompt

# ---- 1. Config -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The paper (Sec. 2.2, 3) states width, blocks, features, decoder, epochs, batch, lr, slices,
    patch, both lambdas and the split.  Other defaults are ours.  Phantoms take PRESETS["demo"]."""
    # data
    contrasts: tuple[str, ...] = ()             # modalities; empty: all that two subjects have
    size: int = 256                             # height and width of a slice in pixels
    train_fraction: float = 0.7                 # share of the subjects that train
    test_subjects: float = 0.2                  # share that is scored (or number, from 1 on)
    test_slices: int = 1000                     # at most so many slices of a subject are scored
    # networks
    encoder: Literal["neuro", "demo"] = "neuro"     # size of NeuroCLIP (common/clip.py) [D4]
    width: int = 1024                           # channels of the image encoder
    blocks: int = 24                            # its residual blocks
    features: int = 768                         # maps that the arithmetic works on
    decoder: tuple[int, ...] = (2048, 1024, 1024)   # widths of the decoder's layers but the last
    # training
    encoder_steps: int = 20_000                 # of NeuroCLIP
    encoder_batch: int = 64                     # slices per step of NeuroCLIP
    encoder_lr: float = 5e-4                    # peak learning rate of NeuroCLIP
    epochs: int = 300                           # of the synthesis; one is 4 pairs per subject [D5]
    batch: int = 8                              # pairs of slabs per step, over all processes
    lr: float = 1e-4                            # learning rate at the start (Adam)
    decay: Literal["halved", "cosine"] = "halved"   # halved after each third; or a cosine [D5]
    slices: int = 8                             # slices of a slab
    patch: int = 64                             # height and width of a slab in training
    # method, in training
    tasks: tuple[str, ...] = ()                 # such as t1:ct, trained both ways; empty: all pairs
    fusion: Literal["arithmetic", "attention"] = "arithmetic"   # how text enters (Table 2) [D9]
    prompts: Literal["both", "target", "source", "none"] = "both"   # which sentences are read
    alpha: Literal["exp", "literal"] = "exp"    # from the mapper's numbers to alpha [D2]
    feat_loss: Literal["normalised", "encoded"] = "normalised"  # what Eq. (1) compares [D3]
    lambda_f: float = 0.1                       # weight of Eq. (1); 0 switches it off
    lambda_s: float = 1.0                       # weight of Eq. (2)
    # method, in sampling
    only: tuple[str, ...] = ()                  # directions to score, such as t1:ct; empty: tasks
    target: str = ""                            # what to make, such as "modality=T2w TE=90"
    sweep: str = "TE=60:140:9"                  # --reproduce sweep: field=first:last:number
    overlap: float = 0.5                        # share of a tile that the next one covers as well
    full_slice: bool = False                    # tiles are as wide as a slice
    sample_batch: int = 16                      # tiles at once; changes rounding only

    def __post_init__(self):
        if self.patch > self.size:
            raise ValueError(f"--patch {self.patch} is larger than --size {self.size}")
        if self.fusion == "attention" and (self.features % 8 or self.prompts != "target"):
            raise ValueError("--fusion attention has 8 heads and reads the target's sentence only; "
                             "it needs --prompts target and --features that 8 divides")
        sentences.parse_target(self.target)
        sentences.parse_sweep(self.sweep)


# Fields that may change without training again.  All others need training in another --out.
SAMPLING = ("only", "target", "sweep", "overlap", "full_slice", "sample_batch", "test_slices")
PRESETS = load_presets("unisyn")                             # sizes for phantoms: data/presets.json
LIMITS = dict(lambda_f=(0, 1e3), overlap=(0, 0.95), slices=(1, 64), test_subjects=(0.01, 10 ** 6))
# --reproduce: a row of a table takes over all stages before the first one whose fields it changes.
STAGES = {
    "encoder": (),          # fields listed nowhere, such as encoder_steps, act on all stages
    "synthesis": ("width", "blocks", "features", "decoder", "epochs", "batch", "lr", "decay",
                  "slices", "patch", "tasks", "fusion", "prompts", "alpha", "feat_loss",
                  "lambda_f", "lambda_s"),
}

# ---- 2. Data -------------------------------------------------------------------------------------


def patterns(cfg, contrasts):
    """The tasks to score, as pairs (known contrasts, contrasts to make); those from T1w first."""
    pairs = sorted(named_pairs(cfg.only or cfg.tasks, contrasts), key=lambda pair: pair[0] != "t1")
    return [((source,), (target,)) for source, target in pairs]


# ---- 3. Model ------------------------------------------------------------------------------------


def strip(f, alpha, beta):
    """Sec. 2.2: take the source's contrast away.  f: (B, F, H, W).  Returns f_0."""
    return (f - beta) / alpha


def inject(c, alpha, beta):
    """Sec. 2.2: give the target's contrast.  c: f_0, (B, F, H, W).  Returns f_t."""
    return alpha * c + beta


class ResBlock(nn.Module):
    """x + 0.1 conv(relu(conv(x))).

    The paper writes conv, conv, ReLU.  Two convolutions without a ReLU between them are no more
    than one, so the ReLU stands between.  There is no normalisation.  With full steps, each of the
    24 blocks would multiply the variance of the maps by about 3, with Kaiming's weights [D1].
    """

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + 0.1 * self.conv2(F.relu(self.conv1(x)))                  # (B, N, H, W)


class Encoder(nn.Module):
    """The image encoder: a slab (B, slices, H, W) becomes feature maps (B, F, H, W).

    The maps keep the resolution of the image.  The paper's blocks have N = 1024 channels, but its
    features have 768.  A last convolution must lie between.  The skip over all blocks, and the
    convolution before its end, are usual in such encoders (Lim et al., 2017) [D1].
    """

    def __init__(self, slices, width, blocks, features):
        super().__init__()
        self.head = nn.Conv2d(slices, width, 3, padding=1)
        self.body = nn.Sequential(*(ResBlock(width) for _ in range(blocks)),
                                  nn.Conv2d(width, width, 3, padding=1))
        self.tail = nn.Conv2d(width, features, 3, padding=1)

    def forward(self, x):
        h = self.head(x)                                                    # (B, N, H, W)
        h = h + self.body(h)                                                # (B, N, H, W)
        return self.tail(h)                                                 # (B, F, H, W)


class Mapper(nn.Module):
    """The embedding of a sentence (B, D) becomes alpha and beta, (B, F, 1, 1) each.

    The same mapper serves source and target.  Its layers are ours; the paper gives only the 2 x 768
    numbers at its end.  At the start alpha is 1 and beta is 0, for every sentence.

    kind "exp": alpha = exp(t - mean of t over the maps), t = ln(4) tanh(a / ln 4), where a is what
    the layers make.  It is positive, so strip never divides by 0; it lies between 1/16 and 16.  Why
    is the mean taken away?  If all alphas were k times larger, the outputs would stay the same, but
    L_f would be k times smaller.  Training could lower L_f in this way and learn nothing.  The
    encoder's last layer can still do it, so the size of the maps is logged; see `losses` [D2].
    kind "literal": alpha = 1 + a.  If it is nearer to 0 than 0.01, it becomes 0.01 or -0.01.
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

    It needs the words.  With one pooled vector, the softmax would run over one key.  Its weight
    would always be 1, and every pixel of every image would get the same vector.  The paper does not
    describe this baseline; a transformer block with 8 heads is our choice [D9].
    """

    def __init__(self, features, word_dim):
        super().__init__()
        self.norm_f = nn.LayerNorm(features)
        self.norm_words = nn.LayerNorm(word_dim)
        self.attention = Attention(features, head_dim=features // 8, context_dim=word_dim)
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
    """The image decoder: four fully connected layers, the same for every pixel (1 x 1 kernels)."""
    layers = []
    for c_in, c_out in zip((features, *widths), widths):
        layers += [nn.Conv2d(c_in, c_out, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], slices, 1))


class GFM(nn.Module):
    """The generative foundation model: encoder, what the sentences do, decoder.

    dim: width of the embedding of a sentence.  word_dim: width of its words.

    With torch's own first weights the maps are small, and training takes longer.  All convolutions
    have those of Kaiming, which keep the size of the maps behind a ReLU [D5].
    """

    def __init__(self, cfg, dim, word_dim):
        super().__init__()
        self.prompts = cfg.prompts
        self.encoder = Encoder(cfg.slices, cfg.width, cfg.blocks, cfg.features)
        self.decoder = make_decoder(cfg.features, cfg.decoder, cfg.slices)
        for module in (*self.encoder.modules(), *self.decoder.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
        by_words = cfg.fusion == "attention"
        by_maps = not by_words and cfg.prompts != "none"
        self.attention = WordAttention(cfg.features, word_dim) if by_words else None
        self.mapper = Mapper(dim, cfg.features, cfg.alpha) if by_maps else None

    def encode(self, x):
        """x: (B, slices, H, W).  Returns f, (B, F, H, W), in float32."""
        return self.encoder(x).float()

    def without_contrast(self, f, text):
        """f_0 of features f, by the sentence of the source (Features)."""
        if self.prompts in ("target", "none"):
            return f
        return strip(f, *self.mapper(text.pooled))                          # (B, F, H, W)

    def with_contrast(self, c, text):
        """f_t, by the sentence of the target (Features)."""
        if self.prompts in ("source", "none"):
            return c
        if self.attention is not None:
            return self.attention(c, text.tokens, text.mask)                # (B, F, H, W)
        return inject(c, *self.mapper(text.pooled))                         # (B, F, H, W)

    def forward(self, x, source, target):
        """From one slab to another.  x: (B, slices, H, W); source, target: Features."""
        c = self.without_contrast(self.encode(x), source)                   # (B, F, H, W)
        return self.decoder(self.with_contrast(c, target)).float()          # (B, slices, H, W)


# ---- 4. Maths and losses -------------------------------------------------------------------------


def losses(cfg, run, network, x, y, text_x, text_y):
    """Eqs. (1) to (3) for pairs of slabs x, y (B, slices, H, W) in [0,1] of the same people.

    x and y are made from each other.  text_x, text_y: Features of their sentences.
    Returns the loss and facts {name: value}, all scalars.  All losses are means over elements.
    With sums, L_f would outweigh L_s: a place has 768 features, and only 8 grey values [D3].
    """
    with run.autocast():
        f = network.encode(torch.cat([x, y]))                               # (2B, F, H, W)
    # The division by alpha and the losses stay in float32.
    with full_precision(x.device):
        f_x, f_y = f.chunk(2)                                               # (B, F, H, W) each
        c_x = network.without_contrast(f_x, text_x)                         # (B, F, H, W)
        c_y = network.without_contrast(f_y, text_y)                         # (B, F, H, W)
        f_t = torch.cat([network.with_contrast(c_x, text_y),
                         network.with_contrast(c_y, text_x)])               # (2B, F, H, W)
    with run.autocast():
        made = network.decoder(f_t).float()                                 # (2B, slices, H, W)
    y_hat, x_hat = made.chunk(2)                                            # (B, slices, H, W) each
    synthesis = (F.l1_loss(y_hat, y) + F.l1_loss(x_hat, x)) / 2             # Eq. (2)
    # The paper compares "encoded features".  If f_x and f_y became equal, they would hold no
    # contrast, and strip would have nothing to do.  So Eq. (1) compares what strip leaves [D3].
    # Where strip does nothing (--prompts target, none), c is f.
    both = (c_x, c_y) if cfg.feat_loss == "normalised" else (f_x, f_y)
    features = F.l1_loss(*both)                                             # Eq. (1)
    loss = cfg.lambda_s * synthesis                                         # Eq. (3)
    if cfg.lambda_f:
        loss = loss + cfg.lambda_f * features
    # If the encoder's last layer shrinks and the decoder's first one grows, the outputs stay the
    # same and L_f becomes small.  L_f alone therefore says little.  L_f / rms does not change.
    rms = both[0].detach().square().mean().sqrt()
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
    text_s = model.neuroclip.encode_text([source])                         # of one sentence
    texts_t = [model.neuroclip.encode_text([target]) for target in targets]

    def repeated(text, B):                                          # the same for each of B tiles
        return Features(*(part.expand(B, *part.shape[1:]) for part in text))

    def work(tiles):
        x = torch.from_numpy(tiles).to(run.device)                          # (B, z, h, w)
        B = len(x)
        with run.autocast():
            f = network.encode(x)                                           # (B, F, h, w)
        with full_precision(x.device):
            c = network.without_contrast(f, repeated(text_s, B))            # (B, F, h, w)
        made = []
        for text_t in texts_t:
            with full_precision(x.device):
                f_t = network.with_contrast(c, repeated(text_t, B))         # (B, F, h, w)
            with run.autocast():
                made.append(network.decoder(f_t).float())                   # (B, z, h, w)
        return torch.stack(made).cpu().numpy()                              # (K, B, z, h, w)

    side = (cfg.size, cfg.size) if cfg.full_slice else (cfg.patch, cfg.patch)
    tile = (cfg.slices, *side)
    made = tile_volume(volume, tile, cfg.overlap, work, len(targets), cfg.sample_batch)
    # Scans without skull are 0 outside of the brain.  What is made there is noise [D7].
    tissue = np.stack([ndimage.binary_fill_holes(plane > 0) for plane in volume])   # (Z, H, W)
    return made.clip(0, 1) * tissue                                         # (K, Z, H, W)


@dataclass
class Model:
    """Everything that synthesis needs, trained and frozen."""
    cfg: Config
    run: object                                     # common.run.Run: device, precision, randomness
    contrasts: list
    neuroclip: clip.CLIP
    network: nn.Module
    records: sentences.Records
    volumes = True          # fill gets all slices of a subject at once (common/trained.py)

    def source_of(self, known):
        """The contrast to start from: T1w, to which the others are registered, or the first."""
        names = [name for name, there in zip(self.contrasts, known) if there]
        return "t1" if "t1" in names else names[0]

    @property
    def tags(self):
        """What --target says, for the names of files: {contrast: "_TE-90"}."""
        return sentences.file_tags(self.cfg.target)

    def make(self, name, source, volume, wanted):
        """Volumes (K, Z, H, W) of a subject, from its scan of the contrast `source`.

        name: of the subject.  volume: (Z, H, W) in [0,1].  wanted: K pairs (contrast, record), what
        shall be made.
        """
        known = scan_prompt(source, self.records.of(name, source))
        return translate(self, volume, known, [scan_prompt(*scan) for scan in wanted])

    def fill(self, u, known, keys, watch=None):
        """Make every contrast that is missing, from one that is known.

        u: (B, C, H, W) in [0,1], B slices of subjects; known: (B, C) bool; keys: (subject, slice
        number) of each.  All slices of a subject must be given together, in order, because the
        neighbours of a slice are needed (common/trained.py does so).
        The sentence about a target: the record of that scan if there is one, else a typical record;
        fields that --target names replace others.
        Returns u with the made contrasts in place, and no further images.
        """
        changed, changes = sentences.parse_target(self.cfg.target)
        filled = u.clone()                                                  # (B, C, H, W)
        subjects = groupby(range(len(u)), lambda b: (keys[b][0], tuple(known[b].tolist())))
        for (name, here), group in subjects:
            rows = list(group)                                              # Z slices of a subject
            source = self.source_of(here)
            wanted = []
            for contrast, there in zip(self.contrasts, here):
                if not there:
                    record = self.records.of(name, contrast)
                    more = changes if contrast == changed else {}
                    wanted.append((contrast, {**record, **more}))
            volume = u[rows, self.contrasts.index(source)].cpu().numpy()    # (Z, H, W)
            made = self.make(name, source, volume, wanted)                  # (K, Z, H, W)
            for (contrast, _), slices in zip(wanted, made):
                filled[rows, self.contrasts.index(contrast)] = torch.from_numpy(slices).to(u.device)
        return filled, {}


# ---- 6. Training ---------------------------------------------------------------------------------


def train(cfg, run, ds):
    """Both stages.  A stage that is finished is not trained again.

    ds.complete are the subjects that are used: those with at least two contrasts.
    """
    training = [subject for subject in ds.complete if subject.name in ds.split["train"]]
    run.about["typical"] = sentences.typical_records(training, ds.contrasts)
    neuroclip = train_neuroclip(cfg, run, ds)
    train_synthesis(cfg, run, ds, neuroclip)


def train_neuroclip(cfg, run, ds):
    """Stage "encoder": NeuroCLIP matches slices and their sentences (Sec. 2.1).

    The towers, the loss and the optimiser are those of common/clip.py.  The paper's image tower
    sees whole volumes; a slice shows modality and contrast as well, and there are more of them.
    It is trained on training subjects only; the paper does not say so, and text of test subjects
    would leak.

    A batch takes equal shares of all classes.  The paper has a class for each set of imaging
    parameters, and one sample of each.  Here a class is one contrast from one vendor, with several
    samples, so that also ages and echo times within it are compared [D4].
    """
    of_subject = {subject.name: subject for subject in ds.subjects}

    def captions(rows):
        found = []
        for r in rows:
            subject = of_subject[ds.subject[r]]
            found.append([scan_prompt(c, record_of(subject, c)) if c in subject.files else None
                          for c in ds.contrasts])
        return found

    classes = {}                # (contrast, vendor) -> [(place among the training rows, channel)]
    rows_of_training = ds.rows("train")
    for number, r in enumerate(rows_of_training):
        subject = of_subject[ds.subject[r]]
        for c, contrast in enumerate(ds.contrasts):
            if contrast in subject.files:
                vendor = record_of(subject, contrast).get("vendor")
                classes.setdefault((contrast, vendor), []).append((number, c))
    members = list(classes.values())

    def draw(step, batch):
        """The samples of a step: slices and channels, (B,) each, and B sentences."""
        g = np.random.default_rng(seed_of(run.seed, "classes", step))
        numbers = []
        channels = []
        texts = []
        for b in range(batch):
            own = members[(step * batch + b) % len(members)]
            number, c = own[g.integers(len(own))]
            contrast = ds.contrasts[c]
            record = record_of(of_subject[ds.subject[rows_of_training[number]]], contrast)
            numbers.append(number)
            channels.append(c)
            # Whoever does not know a value writes None, so NeuroCLIP must have seen this [D6].
            without = sentences.hidden_field(contrast, record, 0.1, g)
            texts.append(scan_prompt(contrast, record, without))
        return np.array(numbers), torch.tensor(channels), texts
    # captions give the words, and tell which sentences are equal and so positives in the loss.
    # draw makes the batches.  With instance=0, no loss compares two contrasts of a slice.
    return train_encoder(run, ds, captions, cfg.encoder, cfg.size, cfg.encoder_steps,
                         cfg.encoder_batch, cfg.encoder_lr, instance=0, draw=draw)


def pair_batch(cfg, run, pairs, neuroclip, records, purpose, step, count, hide, share=slice(None)):
    """Pairs of step `step`: tensors x, y (B, slices, h, w), and Features of their sentences.

    pairs: a Pairs, which draws two scans of a person at one place (common/slabs.py) [D7].  count:
    pairs of all processes.  share: those of this process.  hide: in this share of the sentences one
    value is hidden [D6].
    """
    slabs = []
    texts = ([], [])
    for number in range(count)[share]:
        g = np.random.default_rng(seed_of(run.seed, purpose, step, number))
        name, pair, slab = pairs.draw(g)                                    # (2, slices, h, w)
        slabs.append(slab)
        for side, contrast in enumerate(pair):
            record = records.of(name, contrast)
            without = sentences.hidden_field(contrast, record, hide, g)
            texts[side].append(scan_prompt(contrast, record, without))
    x, y = torch.from_numpy(np.stack(slabs)).to(run.device).unbind(1)       # (B, slices, h, w) each
    return x, y, neuroclip.encode_text(texts[0]), neuroclip.encode_text(texts[1])


def train_synthesis(cfg, run, ds, neuroclip):
    """Stage "synthesis": the GFM, by Eq. (3).  The weights with the lowest validation L_s stay.

    The paper does not define an epoch.  Here it is four pairs for each training subject, also if
    there is one task only.  So all rows of Table 2 have the same number of steps [D5].
    """
    torch.manual_seed(seed_of(run.seed, "synthesis"))
    records = sentences.Records(ds.complete, run.about["typical"])
    tasks = named_pairs(cfg.tasks, ds.contrasts)
    pairs = Pairs(ds, "train", tasks, cfg.slices, cfg.patch)
    if not pairs.pairs:
        raise RunError("no training subject has both contrasts of a task; see --check")
    run.say(f"{len(pairs.pairs)} pairs of contrasts are trained on, each in both directions")
    one = neuroclip.encode_text([scan_prompt(ds.contrasts[0], {})])         # how wide is text?
    run.about["text"] = {"dim": one.pooled.shape[1], "word_dim": one.tokens.shape[2]}
    network = GFM(cfg, **run.about["text"])
    network.to(run.device, memory_format=torch.channels_last)
    best = Best(network)
    optimiser = torch.optim.Adam(network.parameters(), lr=cfg.lr, fused=True)
    parts = {"network": network, "best": best, "optimiser": optimiser}
    steps = math.ceil(cfg.epochs * 4 * len(pairs.rows) / cfg.batch)
    mine = run.shard(cfg.batch)                                    # this process's share of a batch
    validate = validation(cfg, run, ds, neuroclip, records)
    if run.args.compile:
        network.encoder.compile()
        network.decoder.compile()
    for step in run.steps("synthesis", steps, parts, cfg.batch):    # continues a run, and saves
        for group in optimiser.param_groups:
            group["lr"] = rate(cfg, step, steps)
        batch = pair_batch(cfg, run, pairs, neuroclip, records, "pairs", step, cfg.batch, 0.1, mine)
        loss, facts = losses(cfg, run, network, *batch)
        run.update(loss, optimiser)         # sets gradients to zero, goes backward, clips and steps
        run.log(loss=loss, **facts)
        if validate and ((step + 1) % max(1, steps // 10) == 0 or step + 1 == steps):
            value = validate(network)
            run.log(validation=value)
            best.offer(network, value)


def rate(cfg, step, steps):
    """The learning rate of a step.

    The paper's "weight decay by 0.5 every 100 epochs", of 300, can only mean that the rate is
    halved after each third.  A short training ends better with a cosine [D5].
    """
    if cfg.decay == "cosine":
        return clip.warmup_cosine(step, steps, cfg.lr)
    return cfg.lr * 0.5 ** (3 * step // steps)


def validation(cfg, run, ds, neuroclip, records):
    """A function network -> mean L_s of 32 pairs of validation slabs; None if there are none."""
    pairs = Pairs(ds, "val", named_pairs(cfg.tasks, ds.contrasts), cfg.slices, cfg.patch)
    if not pairs.pairs:
        run.say("no validation pairs: the last weights are kept")
        return None
    batches = [pair_batch(cfg, run, pairs, neuroclip, records, "validation", part, count=8, hide=0)
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
    records = sentences.Records(subjects, run.about["typical"])
    return Model(cfg, run, contrasts, load_encoder(run), network, records)


# ---- 7. Figures and tables -----------------------------------------------------------------------
# The rows of the paper's tables are data: data/paper_tables/unisyn.json.


def judge(cfg, run, ds, task):
    """Table 2: the seconds for a volume, as a row of results.json, if directions are chosen."""
    if not (cfg.only or cfg.tasks):
        return []
    return [studies.seconds(load_model(cfg, run, ds.complete), task, "UniSyn")]


def sweep_figure(cfg, run, ds, model):
    """One field of the target's sentence takes many values; see common/studies.py."""
    target, changes = sentences.parse_target(cfg.target)
    studies.sweep(run, ds, model, target or "t2", changes, *sentences.parse_sweep(cfg.sweep))


def text_figure(cfg, run, ds, model):
    """Sentences of other scans, or without numbers: is the text read?  See common/studies.py."""
    pairs = [pair for pair in named_pairs(cfg.only or cfg.tasks, ds.contrasts) if pair[0] == "t1"]
    studies.other_sentences(run, ds, model, pairs)


def asked(cfg, contrasts):
    """What --synthesize makes although a subject has it: what --target names."""
    target, _ = sentences.parse_target(cfg.target)
    if target and target not in contrasts:
        raise RunError(f"--target {cfg.target}: this model makes {', '.join(contrasts)}", status=2)
    return (target,) if target else ()


def outline(cfg, ds):
    """For a dry run: the networks, a slab through them, and the sentences about a subject."""
    size = clip.SIZES[cfg.encoder]
    network = GFM(cfg, size["embed"], size["text"]["width"])
    x = torch.zeros(2, cfg.slices, cfg.patch, cfg.patch)                    # both slabs of a pair
    text = Features(torch.zeros(2, 8, size["text"]["width"]),
                    torch.ones(2, 8, dtype=torch.bool), torch.zeros(2, size["embed"]))
    subject = ds.complete[0]
    lines = [f"slab {tuple(x[:1].shape)} -> features (1, {cfg.features}, {cfg.patch}, {cfg.patch})"
             f" -> slab {tuple(x[:1].shape)}"]
    lines += [f"sentence: {scan_prompt(c, record_of(subject, c))}" for c in subject.files]
    named = {"image encoder": network.encoder, "decoder": network.decoder}
    if network.mapper is not None:
        named["mapper"] = network.mapper
    if network.attention is not None:
        named["attention"] = network.attention
    return Outline(named, lambda: network(x, text, text), lines=lines, depth=cfg.slices,
                   slices=4 * cfg.epochs * len(ds.split["train"]), before=encoder_at_work(cfg))


# ---- 8. Main -------------------------------------------------------------------------------------

METHOD = script.Method(
    "UniSyn", Config, PRESETS, LIMITS, SAMPLING, STAGES, train=train, load=load_model,
    contrasts=lambda cfg: tuple(map(canonical_contrast, cfg.contrasts)) or None,
    patterns=patterns, outline=outline, judge=judge, asked=asked,
    gaps=True, regions=("tissue", "volume"), speed=studies.speed,
    figures={"sweep": ("one field of the target's sentence takes many values", sweep_figure),
             "text": ("is the text read? sentences of others, and shorter ones", text_figure)})

# From Python: unisyn.load("runs/unisyn-neuro") is a common.trained.Trained, with .fill.
load, main = script.entrances(METHOD, __doc__)

if __name__ == "__main__":
    script.guarded(main)
