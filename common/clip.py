"""A small CLIP trained on the user's own data: tokenizer, two towers, contrastive training (Radford et al., 2021).

It stands in for the pre-trained encoders that papers borrow (BiomedCLIP and the like).  It knows only what its
captions say, so it is no BiomedCLIP, and a script that uses it says so.  It must be trained on training subjects only,
and remembers their names.

    clip = build("demo", texts, image_size)             # texts: the training captions; its word pieces come from them
    train_clip(run, clip, images, captions, subjects, steps, batch)
    clip.freeze()
    clip.encode_image(x).pooled, clip.encode_text(["t1, axial"]).pooled        # not normalised

A network conditioned on prompts looks them up in a table, from this text tower or from a file of the user's own:

    table = clip.remember(prompts)                      # or: table, D = load_embeddings("emb.npz")
    report_closest(run, table, prompts)                 # can it tell them apart?
    embed(table, prompts).pooled                        # (n, D), after LayerNorm

Letters in shape comments: B batch, C contrasts, L text tokens, N image tokens and CLS, W tower width, D shared width.
"""
import hashlib
import itertools
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict, namedtuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common.embeddings import Features, cosines, look_up

Tokens = namedtuple("Tokens", "ids vals mask")            # (B, L) int64, (B, L) float32, (B, L) bool: a real token

SIZES = {
    # parameters: text 0.34 M, image 0.29 M at 64 x 64
    "demo": {"embed": 128, "text": {"vocab": 1024, "context": 96, "width": 96, "depth": 2, "heads": 4},
             "image": {"width": 96, "depth": 2, "heads": 4}},
    # parameters: text 6 M, image 12 M at 224 x 224
    "base": {"embed": 512, "text": {"vocab": 4096, "context": 128, "width": 256, "depth": 6, "heads": 8},
             "image": {"width": 384, "depth": 6, "heads": 6}},
}
MAX_LOG_SCALE = math.log(100)                             # CLIP's limit; beyond it a single pair dominates the gradient


# ---- Tokenizer ------------------------------------------------------------------------------------------------------

SPECIALS = ("[pad]", "[cls]", "[sep]", "[mask]", "[none]", "[num]", "[unk]")
PAD, CLS, SEP, MASK, NONE, NUM, UNK = range(7)
LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
MOST_WORDS = 50_000                                       # so many words, the most frequent ones, shape the merges

# A number may be glued to one of these units; any other mixture of digits and letters (18f, t1w, 3d) is a word.
UNITS = "ms|s|min|h|t|mm|cm|deg|mbq|kbq|bq|mci|kvp|kv|ma|mas|hu|y|yr|kg"
PIECE = re.compile(rf"""
    (?P<mask> \[mask\] )
  | (?P<none> none (?![^\W_]) (?= \s* (?: $ | [;,.)] | x\s | none\b ) ) )    # a field's value; in prose it is a word
  | (?P<number> (?: (?<![^\s(,:=]) - )? [0-9]+ (?:\.[0-9]+)?           # a sign only at start, after blank ( , : =
        (?= (?:{UNITS})? (?![^\W_]) ) )
  | (?P<word> [^\W_]+ )
  | (?P<mark> \S )""", re.VERBOSE)


def split(text):
    """[(kind, string), ...] of a text, lower-cased; kind is mask, none, number, word or mark."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").lower()
    return [(found.lastgroup, found.group()) for found in PIECE.finditer(text)]


def plain(value):
    """A float32 as the shortest decimal that reads back as the same value, never with an exponent."""
    return np.format_float_positional(np.float32(value), unique=True, trim="-")


def spell(word):
    """A word as symbols, one per character; the last carries a blank, so that "in" is not the start of "index"."""
    return [*word[:-1], word[-1] + " "]


def merge(symbols, pair):
    """The symbols with each occurrence of the pair, from left to right, joined into one symbol."""
    joined = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def learn_merges(counts, room):
    """Byte-pair encoding (Sennrich et al., 2016): join the most frequent neighbours, again and again, `room` times.

    counts: Counter of words.  Words that hold a pair are indexed, so that a merge visits these and not the whole table.
    """
    words = {word: spell(word) for word, _ in counts.most_common(MOST_WORDS)}
    pairs, where = Counter(), defaultdict(set)
    for word, symbols in words.items():
        for pair in itertools.pairwise(symbols):
            pairs[pair] += counts[word]
            where[pair].add(word)
    merges = []
    while len(merges) < room and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))        # ties by spelling: the same on every machine
        if pairs[best] == 0:                                           # every word is one symbol by now
            break
        merges.append(best)
        for word in where.pop(best):
            old, new = words[word], merge(words[word], best)
            for pair in itertools.pairwise(old):
                pairs[pair] -= counts[word]
            for pair in itertools.pairwise(new):
                pairs[pair] += counts[word]
                where[pair].add(word)
            words[word] = new
    return merges


class Tokenizer:
    """Texts to token ids.  Words become pieces learned on the captions; a number is one [num] token with a value.

    With digits as tokens 2500.0 has six of them, and nothing says that it is close to 2499.9; a value says so.
    """

    def __init__(self, merges, context):
        self.context = context                                         # most tokens per text, [cls] and [sep] included
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: r for r, pair in enumerate(self.merges)}
        alphabet = [*LETTERS, *(c + " " for c in LETTERS + MARKS)]
        self.symbols = list(dict.fromkeys([*SPECIALS, *alphabet, *(a + b for a, b in self.merges)]))
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.known = {}                                                # word -> ids, filled on the way

    @classmethod
    def train(cls, texts, vocab=4096, context=128):
        """Learn the merges on texts (str) until there are `vocab` symbols or every word is one symbol."""
        counts = Counter()
        for text, times in Counter(texts).items():
            for kind, piece in split(text):
                if kind == "word" and piece.isascii():
                    counts[piece] += times
        return cls(learn_merges(counts, vocab - len(cls([], context))), context)

    def __len__(self):
        return len(self.symbols)

    def word_ids(self, word):
        if word not in self.known:
            symbols = spell(word)
            while pairs := [pair for pair in itertools.pairwise(symbols) if pair in self.rank]:
                symbols = merge(symbols, min(pairs, key=self.rank.get))
            self.known[word] = [self.ids.get(symbol, UNK) for symbol in symbols]
        return self.known[word]

    def encode(self, text):
        """(ids, vals) of one text as lists, between [cls] and [sep].  ValueError if it is longer than the context."""
        ids, vals = [CLS], [0.0]
        for kind, piece in split(text):
            new = {"mask": [MASK], "none": [NONE], "number": [NUM]}.get(kind) or self.word_ids(piece)
            ids += new
            vals += [float(piece) if kind == "number" else 0.0] * len(new)
        if len(ids) + 1 > self.context:
            raise ValueError(f"text of {len(ids) + 1} tokens, the encoder takes {self.context}: {text[:60]!r}...; "
                             f"shorten it, or build the encoder with a larger context")
        return [*ids, SEP], [*vals, 0.0]

    def __call__(self, texts):
        """list of str -> Tokens on the CPU, padded to the longest text of this list."""
        encoded = [self.encode(text) for text in texts]
        longest = max(len(ids) for ids, _ in encoded)
        ids = torch.tensor([i + [PAD] * (longest - len(i)) for i, _ in encoded])                   # (B, L)
        vals = torch.tensor([v + [0.0] * (longest - len(v)) for _, v in encoded])                  # (B, L)
        mask = torch.tensor([[True] * len(i) + [False] * (longest - len(i)) for i, _ in encoded])  # (B, L)
        return Tokens(ids, vals, mask)

    def decode(self, ids, vals):
        """The text of one row of ids and vals (lists), lower-case, with one blank between pieces."""
        symbols = {PAD: "", CLS: "", SEP: "", MASK: "[mask] ", NONE: "none "}
        parts = [plain(value) + " " if i == NUM else symbols.get(i, self.symbols[i]) for i, value in zip(ids, vals)]
        return "".join(parts).strip()

    def checksum(self):
        return hashlib.sha256(json.dumps([self.context, self.merges]).encode()).hexdigest()

    def state(self):
        return {"context": self.context, "merges": [list(pair) for pair in self.merges], "checksum": self.checksum()}

    @classmethod
    def from_state(cls, state):
        """Inverse of state().  ValueError if the vocabulary is not the one that the checksum was made for."""
        tokenizer = cls(state["merges"], state["context"])
        if tokenizer.checksum() != state["checksum"]:
            raise ValueError("text encoder's vocabulary does not match its checksum: it was edited, the word vectors "
                             "belong to other words; restore the file or train the encoder again")
        return tokenizer


# ---- Towers ---------------------------------------------------------------------------------------------------------

class Block(nn.Module):
    """Pre-norm transformer block.  Without dropout and BatchNorm, so that train() and eval() are the same."""

    def __init__(self, width, heads, depth):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        # CLIP's initialisation; the ends of the branches shrink with depth, so that their sum does not grow with it
        stds = {self.qkv: width ** -0.5, self.grow: (2 * width) ** -0.5,
                self.out: (2 * depth * width) ** -0.5, self.shrink: (2 * depth * width) ** -0.5}
        for layer, std in stds.items():
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x, mask=None):
        """x: (B, N, W).  mask: (B, 1, 1, N) bool, True = may be attended to."""
        B, N, W = x.shape
        h = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, W // self.heads)      # (B, N, 3, heads, W/heads)
        q, k, v = h.permute(2, 0, 3, 1, 4)                                          # 3 x (B, heads, N, W/heads)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)                 # (B, heads, N, W/heads)
        x = x + self.out(h.transpose(1, 2).reshape(B, N, W))                        # (B, N, W)
        return x + self.shrink(F.gelu(self.grow(self.norm2(x))))                    # (B, N, W)


def number_features(v):
    """A number as waves of its logarithm: 90 and 100 differ as much as 4500 and 5000.  (B, L) -> (B, L, 13)."""
    size = torch.log10(v.abs() + 1e-3)                                              # (B, L)
    periods = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5], device=v.device)              # (5,)     in decades
    angle = 2 * math.pi * size[..., None] / periods                                 # (B, L, 5)
    rest = torch.stack([size / 4, v.sign(), (v == 0).to(v.dtype)], dim=-1)          # (B, L, 3)
    return torch.cat([angle.sin(), angle.cos(), rest], dim=-1)                      # (B, L, 13)


class TextEncoder(nn.Module):
    """Bidirectional transformer over tokens.  CLIP's is causal, which would hide what follows a [mask] from it."""

    def __init__(self, vocab, context, width, depth, heads, embed):
        super().__init__()
        self.config = {"vocab": vocab, "context": context, "width": width, "depth": depth, "heads": heads,
                       "embed": embed}
        self.embedding = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(0.01 * torch.randn(context, width))
        self.number = nn.Linear(13, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, heads, depth) for _ in range(depth))
        self.norm, self.project = nn.LayerNorm(width), nn.Linear(width, embed, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.number.weight, std=0.02)
        nn.init.normal_(self.project.weight, std=width ** -0.5)

    def forward(self, tokens):
        """tokens: Tokens.  The token features are those before the projection."""
        ids, vals, mask = tokens
        x = self.embedding(ids) + self.positions[:ids.shape[1]]                     # (B, L, W)
        x = x + self.number(number_features(vals)) * (ids == NUM)[..., None]        # (B, L, W)
        for block in self.blocks:
            x = block(x, mask[:, None, None])                                       # (B, L, W)
        x = self.norm(x)                                                            # (B, L, W)
        return Features(x, mask, self.project(x[:, 0]))                             # pooled (B, D), from CLS


class ImageEncoder(nn.Module):
    """Three strided convolutions, then a transformer on a grid of size/8; slices (dims=2) or volumes (dims=3)."""

    def __init__(self, dims, in_ch, size, width, depth, heads, embed):
        super().__init__()
        self.config = {"dims": dims, "in_ch": in_ch, "size": size, "width": width, "depth": depth, "heads": heads,
                       "embed": embed}
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        stem = []
        for c_in, c_out in itertools.pairwise((in_ch, width // 4, width // 2, width)):
            stem += [conv(c_in, c_out, kernel_size=3, stride=2, padding=1), nn.GroupNorm(8, c_out), nn.GELU()]
        self.stem = nn.Sequential(*stem)
        self.resize = {2: "bilinear", 3: "trilinear"}[dims]
        self.positions = nn.Parameter(0.01 * torch.randn(1, width, *[math.ceil(size / 8)] * dims))
        self.cls = nn.Parameter(0.02 * torch.randn(width))
        self.blocks = nn.ModuleList(Block(width, heads, depth) for _ in range(depth))
        self.norm, self.project = nn.LayerNorm(width), nn.Linear(width, embed, bias=False)
        nn.init.normal_(self.project.weight, std=width ** -0.5)

    def forward(self, x):
        """x: (B, in_ch, H, W) or (B, in_ch, D, H, W) in [0, 1], of any size; `size` is the native one."""
        x = self.stem((x - 0.5) / 0.5)                                              # (B, W, *grid)
        positions = self.positions                                                  # (1, W, *grid)
        if x.shape[2:] != positions.shape[2:]:
            positions = F.interpolate(positions, size=x.shape[2:], mode=self.resize)  # (1, W, *grid)
        x = (x + positions).flatten(2).transpose(1, 2)                              # (B, N-1, W)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)                   # (B, N, W)
        for block in self.blocks:
            x = block(x)                                                            # (B, N, W)
        x = self.norm(x)                                                            # (B, N, W)
        return Features(x, None, self.project(x[:, 0]))                             # pooled (B, D), from CLS


# ---- Objective ------------------------------------------------------------------------------------------------------

def contrastive_loss(logits, groups):
    """Symmetric InfoNCE in which all members of a group are positives of each other, with equal shares.

    logits: (B, B).  groups: (B,) integers; samples with the same caption belong together, else they would be
    punished as negatives of each other.  With all groups different this is CLIP's loss.  The minimum is
    loss_floor(groups).
    """
    same = (groups[:, None] == groups[None]).to(logits.dtype)                       # (B, B)
    target = same / same.sum(1, keepdim=True)                                       # (B, B)   symmetric
    rows = (target * logits.log_softmax(1)).sum(1).mean()                           # ()
    columns = (target * logits.log_softmax(0)).sum(0).mean()                        # ()
    return -(rows + columns) / 2


def loss_floor(groups):
    """Entropy of contrastive_loss's targets, which no logits can beat; 0 if all groups differ."""
    return (groups[:, None] == groups[None]).sum(1).float().log().mean()


def groups_of(texts):
    """Numbers (B,) that are equal where the texts are."""
    names = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return torch.tensor([names[text] for text in texts])                            # (B,)


def instance_loss(a, b, scale, slices):
    """Two contrasts of one slice must find each other among the slices of the batch.

    Captions tell contrasts apart, hardly anatomy; without this term the image tower may throw anatomy away.
    a, b: (B, D) pooled features of the same slices in two contrasts.  scale: inverse temperature.  slices: (B,) rows.
    """
    return contrastive_loss(scale * cosines(a, b), slices)


class CLIP(nn.Module):
    """A text tower and an image tower with one shared space of width D.

    subjects   names of the subjects it was trained on
    """

    def __init__(self, tokenizer, text, image):
        super().__init__()
        self.tokenizer, self.text, self.image = tokenizer, text, image
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.subjects, self.frozen, self.memo = [], False, {}
        self.register_load_state_dict_post_hook(lambda module, keys: module.memo.clear())      # it held other weights'

    def scale(self):
        """exp(logit_scale), within [1, 100]."""
        return self.logit_scale.clamp(0, MAX_LOG_SCALE).exp()

    def clamp_scale(self):
        """After each step: outside of the range scale() has no gradient, so the parameter could never come back."""
        with torch.no_grad():
            self.logit_scale.clamp_(0, MAX_LOG_SCALE)

    def encode_image(self, x):
        """x: (B, in_ch, H, W) in [0, 1], or a volume.  Returns Features."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.image(x)

    def encode_text(self, texts):
        """texts: list of str (each distinct one is encoded once; remembered if frozen) or Tokens.  Returns Features."""
        device = self.logit_scale.device
        if isinstance(texts, Tokens):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                return self.text(Tokens(*(part.to(device) for part in texts)))
        distinct, rows = list(dict.fromkeys(texts)), groups_of(texts)               # rows (B,)
        if self.frozen:
            features = look_up(self.remember(distinct), distinct)
        else:
            features = self.encode_text(self.tokenizer(distinct))
        return Features(*(part[rows.to(part.device)].to(device) for part in features))

    @torch.no_grad()
    def remember(self, texts):
        """A frozen model's table {text: [tokens (L, W), mask (L,), pooled (D,)]} on the CPU, each text computed once.

        One text at a time and in float32: the features of a text do not depend, even by rounding, on the batch that
        held it, so that a resumed run sees the same bits.  ValueError if the model is not frozen.
        """
        if not self.frozen:
            raise ValueError("the encoder is still in training and its text features will change; call freeze() first")
        for text in texts:
            if text not in self.memo:
                with torch.autocast(self.logit_scale.device.type, enabled=False):
                    self.memo[text] = [part[0].cpu() for part in self.encode_text(self.tokenizer([text]))]
        return {text: self.memo[text] for text in texts}

    def loss(self, pooled, texts, groups=None):
        """Contrastive loss between images and their texts.

        pooled: (B, D) from encode_image.  texts: B strings.  groups: (B,) integers, samples that are positives of each
        other; by default those with the same text.  Returns the loss and facts: excess (loss above its floor), top-1
        both ways, scale.
        """
        groups = groups_of(texts) if groups is None else groups                     # (B,)
        groups = groups.to(pooled.device)                                           # (B,)
        logits = self.scale() * cosines(pooled, self.encode_text(texts).pooled)     # (B, B)   row: image, column: text
        loss = contrastive_loss(logits, groups)                                     # ()
        facts = {"excess": loss.detach() - loss_floor(groups), "scale": self.scale().detach(),
                 "r1_i2t": (groups[logits.argmax(1)] == groups).float().mean(),
                 "r1_t2i": (groups[logits.argmax(0)] == groups).float().mean()}
        return loss, facts

    def train(self, mode=True):
        return super().train(mode and not self.frozen)                              # a parent's .train() comes here

    def freeze(self):
        """No gradients and eval mode from now on, whatever the parent does; texts are remembered.  Returns self."""
        self.frozen = True
        self.memo.clear()
        return self.requires_grad_(False).eval()

    def check_unseen(self, subjects):
        """ValueError if one of these subjects was trained on: scores on it would flatter."""
        seen = sorted(set(subjects) & set(self.subjects))
        if seen:
            raise ValueError(f"{len(seen)} subjects to evaluate on were used to train the encoder (first: {seen[0]}); "
                             f"evaluate on others, or train the encoder on this split")

    def state(self):
        """All that from_state needs, in plain types: torch.load(weights_only=True) reads it."""
        return {"text": self.text.config, "image": self.image.config, "tokenizer": self.tokenizer.state(),
                "weights": {name: value.detach().cpu().clone() for name, value in self.state_dict().items()},
                "subjects": list(self.subjects)}

    @classmethod
    def from_state(cls, state):
        text, image = TextEncoder(**state["text"]), ImageEncoder(**state["image"])
        clip = cls(Tokenizer.from_state(state["tokenizer"]), text, image)
        clip.load_state_dict(state["weights"])
        clip.subjects = list(state["subjects"])
        return clip


def build(size_name, texts, image_size, dims=2, in_ch=1, seed=0):
    """A fresh CLIP of a size in SIZES; word pieces learned on texts (str), weights drawn from the seed alone."""
    size = SIZES[size_name]
    tokenizer = Tokenizer.train(texts, size["text"]["vocab"], size["text"]["context"])
    with torch.random.fork_rng(devices=[]):                                         # the caller's stay as they are
        torch.manual_seed(seed)
        text = TextEncoder(**{**size["text"], "vocab": len(tokenizer)}, embed=size["embed"])
        image = ImageEncoder(dims, in_ch, image_size, **size["image"], embed=size["embed"])
    return CLIP(tokenizer, text, image)


# ---- Training -------------------------------------------------------------------------------------------------------

def warmup_cosine(step, steps, peak):
    """Learning rate of a step: linear over the first tenth, then half a cosine down to 0."""
    warm = max(1, steps // 10)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


def parameter_groups(clip):
    """Weight decay 0.1 on matrices and kernels; none on biases, norms, embeddings, positions and the logit scale."""
    decayed, free = [], []
    for name, value in clip.named_parameters():
        table = "embedding" in name or "positions" in name
        (decayed if value.ndim >= 2 and not table else free).append(value)
    return [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]


def two_contrasts(n, batch, generator):
    """For each sample two different ones of n contrasts, uniformly (n = 1: twice the only one): (batch,), (batch,)."""
    first = torch.randint(n, (batch,), generator=generator, device=generator.device)            # (B,)
    ahead = torch.randint(1, max(n, 2), (batch,), generator=generator, device=generator.device)  # (B,)
    return first, (first + ahead) % n                                               # (B,), (B,)


def hide_values(texts, share, generator):
    """Of captions "Field: value; Field: value" a share loses one known value, any of them, to [MASK] or (half) to None.

    For callers whose prompts hold these words: the tower would read them with the vectors it was born with.
    """
    draws = torch.rand(len(texts), 3, generator=generator, device=generator.device).tolist()
    hidden = []
    for text, (lot, which, word) in zip(texts, draws):
        parts = [part.partition(": ") for part in text.split("; ")]
        known = [i for i, (_, colon, value) in enumerate(parts) if colon and value not in ("None", "[MASK]")]
        if known and lot < share:
            i = known[int(which * len(known))]
            parts[i] = (parts[i][0], ": ", "[MASK]" if word < 0.5 else "None")
        hidden.append("; ".join("".join(part) for part in parts))
    return hidden


def train_clip(run, clip, images, captions, subjects, steps, batch, lr=1e-3, instance=0.5, stage="encoder",
               field_dropout=0.0):
    """Train in place on slices with captions; resumes exactly, since each step's randomness is a function of the step.

    run        common.run.Run, for order, randomness, checkpoints and progress
    images     array (n, C, H, W) in [0, 1], also memory-mapped;  captions: n lists of C str;  subjects: n names
    instance   weight of instance_loss; above 0 it needs C >= 2
    field_dropout   share of captions that hide_values changes
    Several processes work on the same batch: every sample needs all others as negatives, and the towers are small.
    """
    n, contrasts = images.shape[:2]
    if not n == len(captions) == len(subjects) or any(len(row) != contrasts for row in captions):
        raise ValueError(f"images {tuple(images.shape)} need {n} lists of {contrasts} captions and {n} subject names, "
                         f"got {len(captions)} and {len(subjects)}")
    if contrasts < 2 and instance:
        raise ValueError("the instance term compares two contrasts and the images have one; use instance=0")
    clip.to(run.device)
    clip.subjects = sorted({str(name) for name in subjects})                        # plain types, for state()
    optimiser = torch.optim.AdamW(parameter_groups(clip), lr=lr, betas=(0.9, 0.98), eps=1e-6)
    for step in run.steps(stage, steps, {"clip": clip, "optimiser": optimiser}, batch):
        rows = run.order(stage, n, batch, step)                                     # (B,)
        x = run.fetch(images, rows)                                                 # (B, C, H, W)
        a, b = two_contrasts(contrasts, batch, run.generator(stage, step))          # (B,), (B,)
        own = [captions[row][contrast] for row, contrast in zip(rows, a.tolist())]
        texts = hide_values(own, field_dropout, run.generator(f"{stage} fields", step)) if field_dropout else own
        each = torch.arange(batch)                                                  # (B,)
        with run.autocast():
            z_a = clip.encode_image(x[each, a, None]).pooled                        # (B, D)
            loss, facts = clip.loss(z_a, texts, groups_of(own))                     # ()   hidden or not, one caption
            if instance:
                z_b = clip.encode_image(x[each, b, None]).pooled                    # (B, D)
                facts["instance"] = instance_loss(z_a, z_b, clip.scale(), torch.from_numpy(rows).to(run.device))  # ()
                loss = loss + instance * facts["instance"]                          # ()
        for group in optimiser.param_groups:
            group["lr"] = warmup_cosine(step, steps, lr)
        run.update(loss, optimiser)
        clip.clamp_scale()
        run.log(loss=loss, **facts)
        if step == max(steps // 5, 50):                                             # before, every tower looks stuck
            warn_if_stuck(run, facts["excess"].item(), own)
    return clip


def train_encoder(run, ds, captions, size_name, image_size, steps, batch, lr, **terms):
    """Stage "encoder" of a script: a fresh CLIP, trained on the training subjects of a data.Dataset, then frozen.

    captions(rows) -> for each row of ds one sentence per contrast.  terms: further arguments of train_clip.
    What it can do on validation slices is said; load_encoder finds it again in a checkpoint.
    """
    rows = ds.rows("train")
    texts = captions(rows)
    vocabulary = [text for row in texts for text in row]
    clip = build(size_name, vocabulary, image_size, seed=run.seed).to(run.device)
    clip.subjects = sorted(ds.split["train"])
    run.about["encoder"] = {k: v for k, v in clip.state().items() if k != "weights"}
    train_clip(run, clip, ds.part("train"), texts, ds.subject[rows], steps, min(batch, len(rows)), lr, **terms)
    clip.freeze()
    unseen = ds.rows("val", 64)
    if len(unseen):
        scores = report(clip, ds.images[unseen], captions(unseen))
        words = [f"{name.replace('_', ' ')} {value:.2f}" for name, value in scores.items()]
        run.say(f"encoder on validation slices: {', '.join(words)}")
    return clip


def load_encoder(run):
    """The frozen CLIP of a run's checkpoint, on its device."""
    weights = run.stages["encoder"]["parts"]["clip"]
    return CLIP.from_state({**run.about["encoder"], "weights": weights}).freeze().to(run.device)


def warn_if_stuck(run, excess, texts):
    """A tower that cannot tell its samples apart has a loss of ln(batch), here less the floor of equal captions."""
    repeats = Counter(texts)
    floor = sum(math.log(repeats[text]) for text in texts) / len(texts)
    if excess > math.log(len(texts)) - floor - 0.05:
        run.say("warning: a fifth into its training the encoder matches images and captions no better than chance; "
                "usual causes: all captions of a batch are equal, all images look alike, the learning rate is too high")


# ---- Use ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def encode_all(clip, images, batch=32):
    """Pooled features of images (n, C, H, W) in [0, 1], any array: (n, C, D) on the CPU."""
    n, contrasts = images.shape[:2]
    pooled = []
    for start in range(0, n, batch):
        x = torch.from_numpy(np.asarray(images[start:start + batch], dtype=np.float32))            # (B, C, H, W)
        x = x.flatten(0, 1)[:, None].to(clip.logit_scale.device)                    # (B*C, 1, H, W)
        pooled.append(clip.encode_image(x).pooled.float().cpu())                    # (B*C, D)
    return torch.cat(pooled).unflatten(0, (n, contrasts))                           # (n, C, D)


def nearest(a, b):
    """For each row of a (n, D) the row of b (m, D) with the highest cosine: (n,).  In chunks, n x m may be large."""
    return torch.cat([cosines(rows, b).argmax(1) for rows in a.split(1024)])


def retrieval(a, b):
    """Share of rows i of a (n, D) whose nearest row of b (n, D) is row i; chance is 1/n."""
    return (nearest(a, b) == torch.arange(len(a), device=a.device)).float().mean().item()


@torch.no_grad()
def report(clip, images, captions):
    """What the encoder can do on these slices, which should be those of validation subjects.

    image_to_text     share of images (n*C of them) whose nearest distinct caption is their own
    slice_to_slice    share of slices found again, among the n, in another contrast (mean of ordered pairs; if C > 1)
    ..._chance        what guessing scores
    """
    z = encode_all(clip, images)                                                    # (n, C, D)
    own = [text for row in captions for text in row]
    distinct = {text: i for i, text in enumerate(dict.fromkeys(own))}
    texts = list(distinct)
    # as Tokens, since validation texts need no remembering
    chunks = [clip.tokenizer(texts[i:i + 256]) for i in range(0, len(texts), 256)]
    e = torch.cat([clip.encode_text(chunk).pooled.float().cpu() for chunk in chunks])              # (texts, D)
    hits = nearest(z.flatten(0, 1), e) == torch.tensor([distinct[text] for text in own])           # (n*C,)
    result = {"image_to_text": hits.float().mean().item(), "image_to_text_chance": 1 / len(texts)}
    pairs = list(itertools.permutations(range(z.shape[1]), 2))
    if pairs:
        result["slice_to_slice"] = sum(retrieval(z[:, i], z[:, j]) for i, j in pairs) / len(pairs)
        result["slice_to_slice_chance"] = 1 / len(z)
    return result
