"""A small CLIP that is trained on the user's own data (Radford et al., 2021).

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

Papers borrow large pre-trained encoders such as BiomedCLIP.  This CLIP stands in for them.  It
knows only what its captions say, so it is no BiomedCLIP, and a script that uses it must say so.  It
must be trained on training subjects only, and it remembers their names.

    clip = build("demo", captions, image_size)          # captions: those of the training subjects
    train_clip(run, clip, images, captions, subjects, steps, batch)
    clip.freeze()
    clip.encode_image(x).pooled                         # (B, D), not normalised
    clip.encode_text(["t1, axial"]).pooled              # (1, D), not normalised
    table = clip.remember(prompts)                      # the table that common/embeddings.py reads

Texts become tokens in common/tokenizer.py.  The loss is in common/contrastive.py.

Letters in shape comments: B batch, C contrasts, L text tokens, N image tokens and CLS,
W width of a tower, D width of the space that both towers share.
"""
import itertools
import math
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F

from common.contrastive import contrastive_loss, cosines, groups_of, instance_loss, loss_floor
from common.embeddings import Features, look_up
from common.tokenizer import NUM, Tokenizer, Tokens

SIZES = {
    # parameters: text 0.34 M, image 0.29 M at 64 x 64
    "demo": {"embed": 128,
             "text": {"vocab": 1024, "context": 96, "width": 96, "depth": 2, "heads": 4},
             "image": {"width": 96, "depth": 2, "heads": 4}},
    # parameters: text 6 M, image 12 M at 224 x 224
    "base": {"embed": 512,
             "text": {"vocab": 4096, "context": 128, "width": 256, "depth": 6, "heads": 8},
             "image": {"width": 384, "depth": 6, "heads": 6}},
    # parameters: text 40 M, image 28 M at 256 x 256; UniSyn's context is 224, its embedding 768
    "neuro": {"embed": 768,
              "text": {"vocab": 4096, "context": 224, "width": 512, "depth": 12, "heads": 8},
              "image": {"width": 512, "depth": 8, "heads": 8}},
}
MAX_LOG_SCALE = math.log(100)       # CLIP's limit; beyond it a single pair dominates the gradient


# ---- Towers --------------------------------------------------------------------------------------

class Block(nn.Module):
    """A pre-norm transformer block.  It has no dropout, so that train() and eval() are the same.

    torch's own nn.TransformerEncoderLayer(norm_first=True) computes the same function.  We do not
    use it, because in eval mode it takes a faster path, whose results differ by rounding.
    """

    def __init__(self, width, heads, depth):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.grow = nn.Linear(width, 4 * width)
        self.shrink = nn.Linear(4 * width, width)
        # This is CLIP's initialisation.  The last layer of each branch is smaller in a deeper
        # network, so that the sum over all blocks does not grow with their number.
        last = (2 * depth * width) ** -0.5
        stds = {self.qkv: width ** -0.5, self.grow: (2 * width) ** -0.5,
                self.out: last, self.shrink: last}
        for layer, std in stds.items():
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x, mask=None):
        """x: (B, N, W).  mask: (B, 1, 1, N) bool, True where a token may be attended to.

        Returns (B, N, W).
        """
        B, N, W = x.shape
        h = self.qkv(self.norm1(x))                                     # (B, N, 3W)
        h = h.view(B, N, 3, self.heads, W // self.heads)                # (B, N, 3, heads, W/heads)
        q, k, v = h.permute(2, 0, 3, 1, 4)                              # (B, heads, N, W/heads)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)     # (B, heads, N, W/heads)
        x = x + self.out(h.transpose(1, 2).reshape(B, N, W))            # (B, N, W)
        return x + self.shrink(F.gelu(self.grow(self.norm2(x))))        # (B, N, W)


def number_features(v):
    """Turn numbers into waves of their logarithm.  v: (B, L).  Returns (B, L, 13).

    In these features 90 and 100 differ about as much as 4500 and 5000.
    """
    size = torch.log10(v.abs() + 1e-3)                                  # (B, L)
    periods = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5], device=v.device)  # (5,)  in decades
    angle = 2 * math.pi * size[..., None] / periods                     # (B, L, 5)
    zero = (v == 0).to(v.dtype)                                         # (B, L)
    rest = torch.stack([size / 4, v.sign(), zero], dim=-1)              # (B, L, 3)
    return torch.cat([angle.sin(), angle.cos(), rest], dim=-1)          # (B, L, 13)


class TextEncoder(nn.Module):
    """A transformer over tokens, in which every token sees all others.

    In CLIP's own text tower a token sees only those before it, so [mask] would miss the rest.
    """

    def __init__(self, vocab, context, width, depth, heads, embed):
        super().__init__()
        self.config = {"vocab": vocab, "context": context, "width": width, "depth": depth,
                       "heads": heads, "embed": embed}
        self.embedding = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(0.01 * torch.randn(context, width))
        self.number = nn.Linear(13, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, heads, depth) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, embed, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.number.weight, std=0.02)
        nn.init.normal_(self.project.weight, std=width ** -0.5)

    def forward(self, tokens):
        """tokens: Tokens of torch tensors, each (B, L).

        Returns Features: tokens (B, L, W) before the projection, pooled (B, D) from [cls].
        """
        ids, vals, mask = tokens
        x = self.embedding(ids) + self.positions[:ids.shape[1]]         # (B, L, W)
        is_number = (ids == NUM)[..., None]                             # (B, L, 1)
        x = x + self.number(number_features(vals)) * is_number          # (B, L, W)
        for block in self.blocks:
            x = block(x, mask[:, None, None])                           # (B, L, W)
        x = self.norm(x)                                                # (B, L, W)
        return Features(x, mask, self.project(x[:, 0]))                 # pooled: (B, D)


class ImageEncoder(nn.Module):
    """Three strided convolutions, then a transformer over the grid, which is 8 times smaller.

    dims     2 for slices, 3 for volumes
    in_ch    channels of an image
    size     native height and width of an image, and depth of a volume
    """

    def __init__(self, dims, in_ch, size, width, depth, heads, embed):
        super().__init__()
        self.config = {"dims": dims, "in_ch": in_ch, "size": size, "width": width, "depth": depth,
                       "heads": heads, "embed": embed}
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        stem = []
        for c_in, c_out in itertools.pairwise((in_ch, width // 4, width // 2, width)):
            convolution = conv(c_in, c_out, kernel_size=3, stride=2, padding=1)
            stem += [convolution, nn.GroupNorm(8, c_out), nn.GELU()]
        self.stem = nn.Sequential(*stem)
        self.resize = {2: "bilinear", 3: "trilinear"}[dims]
        grid = [math.ceil(size / 8)] * dims
        self.positions = nn.Parameter(0.01 * torch.randn(1, width, *grid))
        self.cls = nn.Parameter(0.02 * torch.randn(width))
        self.blocks = nn.ModuleList(Block(width, heads, depth) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, embed, bias=False)
        nn.init.normal_(self.project.weight, std=width ** -0.5)

    def forward(self, x):
        """x: (B, in_ch, H, W) or (B, in_ch, D, H, W) in [0,1], of the native or another size.

        Returns Features: tokens (B, N, W) before the projection, no mask, pooled (B, D) from CLS.
        """
        x = self.stem((x - 0.5) / 0.5)                                  # (B, W, *grid)
        grid = x.shape[2:]
        positions = self.positions                                      # (1, W, *grid)
        if positions.shape[2:] != grid:
            positions = F.interpolate(positions, grid, mode=self.resize)    # (1, W, *grid)
        x = (x + positions).flatten(2).transpose(1, 2)                  # (B, N-1, W)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)       # (B, N, W)
        for block in self.blocks:
            x = block(x)                                                # (B, N, W)
        x = self.norm(x)                                                # (B, N, W)
        return Features(x, None, self.project(x[:, 0]))                 # pooled: (B, D)


# ---- CLIP ----------------------------------------------------------------------------------------

class CLIP(nn.Module):
    """A text tower and an image tower with one shared space of width D.

    subjects   names of the subjects it was trained on
    memo       features of texts, kept while the model is frozen: {text: [tokens, mask, pooled]}
    """

    def __init__(self, tokenizer, text, image):
        super().__init__()
        self.tokenizer = tokenizer
        self.text = text
        self.image = image
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.subjects = []
        self.frozen = False
        self.memo = {}
        # The features in the memo belong to the old weights.
        self.register_load_state_dict_post_hook(lambda module, keys: module.memo.clear())

    def scale(self):
        """Return exp(logit_scale), the inverse temperature, within [1, 100].  It has shape ()."""
        return self.logit_scale.clamp(0, MAX_LOG_SCALE).exp()

    @torch.no_grad()
    def clamp_scale(self):
        """Bring logit_scale back into its range.  The training calls it after each step.

        Outside of the range scale() has no gradient, so the parameter could never come back.
        """
        self.logit_scale.clamp_(0, MAX_LOG_SCALE)

    def encode_image(self, x):
        """Encode images as Features.  x: (B, in_ch, H, W) or (B, in_ch, D, H, W) in [0,1]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.image(x)

    def encode_tokens(self, tokens):
        """Encode Tokens, as the tokenizer returns them, as Features.  Nothing is remembered."""
        device = self.logit_scale.device
        tokens = Tokens(*(torch.as_tensor(part, device=device) for part in tokens))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.text(tokens)

    def encode_text(self, texts):
        """Encode texts (list of str) as Features.  Each distinct text is encoded once.

        A frozen model remembers them.  Raises ValueError if a text has too many tokens.
        """
        distinct = list(dict.fromkeys(texts))
        if self.frozen:
            features = look_up(self.remember(distinct), distinct)
        else:
            features = self.encode_tokens(self.tokenizer(distinct))
        rows = groups_of(texts)                                         # (B,)
        device = self.logit_scale.device
        return Features(*(part[rows.to(part.device)].to(device) for part in features))

    @torch.no_grad()
    def remember(self, texts):
        """Return a table {text: [tokens (L, W), mask (L,), pooled (D,)]} of texts, on the CPU.

        Each text is computed once, alone and in float32.  Its features then do not depend, even by
        rounding, on the other texts of a batch, and a resumed run sees the same bits.

        Raises ValueError if the model is not frozen, or if a text has too many tokens.
        """
        if not self.frozen:
            raise ValueError("the encoder is still in training and its text features will change; "
                             "call freeze() first")
        for text in texts:
            if text not in self.memo:
                with torch.autocast(self.logit_scale.device.type, enabled=False):
                    features = self.encode_tokens(self.tokenizer([text]))
                self.memo[text] = [part[0].cpu() for part in features]
        return {text: self.memo[text] for text in texts}

    def loss(self, pooled, texts, groups=None):
        """Return the contrastive loss between images and their texts.

        pooled: (B, D), from encode_image.  texts: B strings.  groups: (B,) integers, equal for
        samples that are positives of each other; by default those with the same text.

        Returns the loss () and facts {name: ()}: excess (the loss minus its floor), scale, r1_i2t
        and r1_t2i.  r1_i2t is the share of images whose best text is their own.  r1_t2i is the
        same for texts.  Raises ValueError if a text has too many tokens.
        """
        if groups is None:
            groups = groups_of(texts)                                   # (B,)
        groups = groups.to(pooled.device)                               # (B,)
        words = self.encode_text(texts).pooled                          # (B, D)
        logits = self.scale() * cosines(pooled, words)                  # (B, B)  image, text
        loss = contrastive_loss(logits, groups)                         # ()
        facts = {"excess": loss.detach() - loss_floor(groups),
                 "scale": self.scale().detach(),
                 "r1_i2t": (groups[logits.argmax(1)] == groups).float().mean(),
                 "r1_t2i": (groups[logits.argmax(0)] == groups).float().mean()}
        return loss, facts

    def train(self, mode=True):
        """Do as nn.Module.train, but keep a frozen model in eval mode, also inside a parent."""
        return super().train(mode and not self.frozen)

    def freeze(self):
        """Switch gradients off and eval mode on, and remember texts from now on.  Returns self."""
        self.frozen = True
        self.memo.clear()
        return self.requires_grad_(False).eval()

    def state(self):
        """Return all that from_state needs, in types that torch.load(weights_only=True) reads."""
        weights = {name: value.detach().cpu().clone() for name, value in self.state_dict().items()}
        return {"text": self.text.config, "image": self.image.config, "weights": weights,
                "tokenizer": self.tokenizer.state(), "subjects": list(self.subjects)}

    @classmethod
    def from_state(cls, state):
        """Return the CLIP of this state().  Raises ValueError if the vocabulary was edited."""
        text = TextEncoder(**state["text"])
        image = ImageEncoder(**state["image"])
        clip = cls(Tokenizer.from_state(state["tokenizer"]), text, image)
        clip.load_state_dict(state["weights"])
        clip.subjects = list(state["subjects"])
        return clip


def build(size_name, texts, image_size, dims=2, in_ch=1, seed=0):
    """Build a CLIP with fresh weights, which depend on the seed alone.

    size_name: a key of SIZES.  texts: list of str, on which the pieces of words are learned.
    image_size, dims, in_ch: as of ImageEncoder.  The caller's random numbers are not touched.
    """
    size = SIZES[size_name]
    embed = size["embed"]
    tokenizer = Tokenizer.train(texts, size["text"]["vocab"], size["text"]["context"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = TextEncoder(**{**size["text"], "vocab": len(tokenizer)}, embed=embed)
        image = ImageEncoder(dims, in_ch, image_size, **size["image"], embed=embed)
    return CLIP(tokenizer, text, image)


# ---- Training ------------------------------------------------------------------------------------

def warmup_cosine(step, steps, peak):
    """Return the learning rate of a step: it rises linearly, then falls to 0 as half a cosine."""
    warm = max(1, steps // 10)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


def parameter_groups(clip):
    """Return parameter groups for AdamW: weight decay 0.1 on matrices and kernels, else none.

    The others are biases, norms, embeddings, positions and the logit scale.
    """
    decayed = []
    free = []
    for name, value in clip.named_parameters():
        if value.ndim < 2 or "embedding" in name or "positions" in name:
            free.append(value)
        else:
            decayed.append(value)
    return [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]


def two_contrasts(n, batch, generator):
    """Draw two different ones of n contrasts for each sample.  Returns (batch,), (batch,).

    If n is 1, both are the only contrast.
    """
    device = generator.device
    first = torch.randint(n, (batch,), generator=generator, device=device)  # (B,)
    ahead = torch.randint(1, max(n, 2), (batch,), generator=generator, device=device)   # (B,)
    return first, (first + ahead) % n                                   # (B,), (B,)


def hide_values(texts, share, generator):
    """Hide one known value in a share of the captions (list of str).  Returns new captions.

    A caption has the form "Field: value; Field: value".  Each of its known values is equally likely
    to be lost.  It becomes [MASK] or None, with equal chances.
    Callers need this if their prompts hold the words [MASK] or None.  Without it the text tower
    would read these words with the vectors that it was born with.
    """
    draws = torch.rand(len(texts), 3, generator=generator, device=generator.device).tolist()
    hidden = []
    for text, (lot, which, word) in zip(texts, draws):
        parts = [part.partition(": ") for part in text.split("; ")]
        known = [i for i, (_, colon, value) in enumerate(parts)
                 if colon and value not in ("None", "[MASK]")]
        if known and lot < share:
            i = known[int(which * len(known))]
            field, colon, _ = parts[i]
            parts[i] = (field, colon, "[MASK]" if word < 0.5 else "None")
        hidden.append("; ".join("".join(part) for part in parts))
    return hidden


def train_clip(run, clip, images, captions, subjects, steps, batch, lr=1e-3, instance=0.5,
               stage="encoder", field_dropout=0.0, draw=None):
    """Train a CLIP in place on slices with captions.  Returns it.

    run        common.run.Run, for order, randomness, checkpoints and progress
    images     array (n, C, H, W) in [0,1], also memory-mapped
    captions   n lists of C str, with None where a contrast is missing
    subjects   n names
    instance   weight of instance_loss; if it is above 0, C must be at least 2
    field_dropout   share of captions that hide_values changes
    draw       (step, batch) -> (rows, contrasts, texts): the samples of a step, (batch,) each,
               and their captions as the text tower shall see them.  By default all slices come in
               shuffled passes, and their contrasts at random.  With missing contrasts `draw` is
               needed, and instance must be 0

    The random numbers of a step depend on the step alone, so training resumes exactly.  Several
    processes all work on the same batch: every sample needs all others as negatives, and the
    towers are small.

    Raises ValueError if the sizes do not agree, or if C is 1 and instance is above 0.
    """
    n, contrasts = images.shape[:2]
    if not n == len(captions) == len(subjects) or any(len(row) != contrasts for row in captions):
        raise ValueError(f"images {tuple(images.shape)} need {n} lists of {contrasts} captions and "
                         f"{n} subject names, got {len(captions)} and {len(subjects)}")
    if contrasts < 2 and instance:
        raise ValueError("the instance term compares two contrasts and the images have one; "
                         "use instance=0")
    if draw and instance:
        raise ValueError("the instance term draws two contrasts itself; with draw, use instance=0")
    clip.to(run.device)
    clip.subjects = sorted({str(name) for name in subjects})            # state() needs plain types
    optimiser = torch.optim.AdamW(parameter_groups(clip), lr=lr, betas=(0.9, 0.98), eps=1e-6,
                                  fused=True)
    for step in run.steps(stage, steps, {"clip": clip, "optimiser": optimiser}, batch):
        texts = None
        if draw:
            rows, a, texts = draw(step, batch)                          # (B,), (B,), B texts
        else:
            rows = run.order(stage, n, batch, step)                     # (B,)
            a, b = two_contrasts(contrasts, batch, run.generator(stage, step))  # (B,), (B,)
        x = run.fetch(images, rows)                                     # (B, C, H, W)
        own = [captions[row][contrast] for row, contrast in zip(rows, a.tolist())]
        texts = texts or own
        if field_dropout:
            texts = hide_values(texts, field_dropout, run.generator(f"{stage} fields", step))
        each = torch.arange(batch)                                      # (B,)
        # A caption with a hidden value still counts as the same caption.
        groups = groups_of(own)                                         # (B,)
        with run.autocast():
            z_a = clip.encode_image(x[each, a, None]).pooled            # (B, D)
            loss, facts = clip.loss(z_a, texts, groups)                 # ()
            if instance:
                z_b = clip.encode_image(x[each, b, None]).pooled        # (B, D)
                slices = torch.from_numpy(rows).to(run.device)          # (B,)
                facts["instance"] = instance_loss(z_a, z_b, clip.scale(), slices)   # ()
                loss = loss + instance * facts["instance"]              # ()
        for group in optimiser.param_groups:
            group["lr"] = warmup_cosine(step, steps, lr)
        run.update(loss, optimiser)         # sets gradients to zero, goes backward, clips and steps
        clip.clamp_scale()
        run.log(loss=loss, **facts)
        if step == max(steps // 5, 50):     # earlier, every CLIP looks stuck
            warn_if_stuck(run, facts["excess"].item(), own)
    return clip


def warn_if_stuck(run, excess, texts):
    """Warn if a CLIP cannot tell its samples apart.

    excess: from CLIP.loss.  texts: the captions (list of str) of that batch.
    Its loss is then ln(B), and the excess is ln(B) minus the floor that equal captions cause.
    """
    repeats = Counter(texts)
    floor = sum(math.log(repeats[text]) for text in texts) / len(texts)
    if excess > math.log(len(texts)) - floor - 0.05:
        run.say("warning: a fifth into its training the encoder matches images and captions no "
                "better than chance; usual causes: all captions of a batch are equal, all images "
                "look alike, the learning rate is too high")
