"""A variational autoencoder of reports, and a U-Net for vectors.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

A report becomes one vector, and the vector becomes a report again.  The form is that of OPTIMUS (Li
et al., 2020): a bidirectional encoder, a Gaussian latent, and a causal decoder that is told the
latent in two ways.  OPTIMUS starts from BERT and GPT-2.  This one is trained from scratch, and it
knows only the words of its own training reports.

    words = Words.learn(texts, least=3, length=100)     # cleaned: "the heart is normal ."
    vae = train_textvae(run, texts, val_texts, make, steps, batch, lr)
    z = vae.to_latent(texts)                            # (B, Z), mean 0 and deviation 1
    vae.from_latent(z)                                  # B texts

VectorUNet predicts noise on such vectors.  It has the form of Versatile Diffusion's network for
text (Xu et al., 2023): a vector is cut into four positions, and attention runs over these.

Letters in shape comments: B batch, L tokens, W width of a token, Z numbers of a latent, V words of
the vocabulary, C channels, P = 4 positions.
"""
import math
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F

from common.clip import Block, warmup_cosine
from common.device import seed_of
from common.loop import Best
from common.unet import Site, sinusoid, zeroed

STAGE = "text"
PAD, BOS, EOS, UNK = range(4)
POSITIONS = 4               # into which VectorUNet cuts a vector
FREE_BITS = 0.05            # of each number of a latent: so much KL divergence costs nothing
KL_WEIGHT = 1e-3            # at the end of its ramp
VALIDATION = 256            # most validation reports that are looked at


# ---- Words ---------------------------------------------------------------------------------------


class Words:
    """The vocabulary of reports: every word that is frequent enough, and four special tokens.

    Reports are lower case, with blanks between words and marks, because BLEU is counted on these.
    R2Gen has one number for padding, start and end.  Here they differ.
    """

    def __init__(self, words, length):
        """words: list of str.  length: the most words of a report; longer ones are cut."""
        self.words = list(words)
        self.length = length
        self.ids = {word: len(("pad", "bos", "eos", "unk")) + i for i, word in enumerate(words)}

    @classmethod
    def learn(cls, texts, least, length):
        """The vocabulary of texts (list of str): words that come at least `least` times."""
        counts = Counter(word for text in texts for word in text.split())
        return cls(sorted(word for word, times in counts.items() if times >= least), length)

    def __len__(self):
        return len(self.words) + 4

    def encode(self, texts):
        """Texts (list of str) as ids with BOS and EOS, padded to the longest: (B, L), int64."""
        rows = []
        for text in texts:
            own = [self.ids.get(word, UNK) for word in text.split()[:self.length]]
            rows.append(torch.tensor([BOS, *own, EOS]))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)     # (B, L)

    def decode(self, ids):
        """The text (str) of ids (list of int), up to EOS or the most words of a report.

        An unknown word is written <unk>.
        """
        found = []
        for i in ids:
            if i == EOS:
                break
            if i not in (PAD, BOS):
                found.append("<unk>" if i == UNK else self.words[i - 4])
        return " ".join(found[:self.length])


# ---- The autoencoder -----------------------------------------------------------------------------


class DecoderBlock(Block):
    """A block of the decoder: a token sees those before it, and one more key, the memory.

    The memory vector stands for the latent.  It serves as key and as value, as in OPTIMUS.
    """

    def forward(self, x, memory):
        """x: (B, N, W).  memory: (B, W).  Returns (B, N, W)."""
        B, N, W = x.shape
        h = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, W // self.heads)
        q, k, v = h.permute(2, 0, 3, 1, 4)                              # (B, heads, N, W/heads)
        m = memory.view(B, 1, self.heads, W // self.heads).transpose(1, 2)  # (B, heads, 1, W/heads)
        k = torch.cat([m, k], dim=2)                                    # (B, heads, 1+N, W/heads)
        v = torch.cat([m, v], dim=2)                                    # (B, heads, 1+N, W/heads)
        # Row n may see the memory, which is column 0, and the tokens 0 to n.
        mask = torch.ones(N, N + 1, dtype=torch.bool, device=x.device).tril(1)      # (N, 1+N)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)     # (B, heads, N, W/heads)
        x = x + self.out(h.transpose(1, 2).reshape(B, N, W))            # (B, N, W)
        return x + self.shrink(F.gelu(self.grow(self.norm2(x))))        # (B, N, W)


class TextVAE(nn.Module):
    """Reports to vectors (B, Z) and back.

    words                 Words
    width, depth, heads   of encoder and decoder, each
    z                     Z

    mu, sigma   mean and deviation of each number of the latent over the training reports
    """

    def __init__(self, words, width, depth, heads, z):
        super().__init__()
        self.words = words
        self.z = z
        context = words.length + 2
        self.embedding = nn.Embedding(len(words), width)
        self.encoder_positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.decoder_positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.encoder = nn.ModuleList(Block(width, heads, depth) for _ in range(depth))
        self.encoder_norm = nn.LayerNorm(width)
        self.to_gaussian = nn.Linear(width, 2 * z, bias=False)
        self.to_embedding = nn.Linear(z, width, bias=False)
        self.to_memory = nn.Linear(z, depth * width)
        self.decoder = nn.ModuleList(DecoderBlock(width, heads, depth) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width)
        # Words are read and predicted with the same vectors.  Logits then start with variance 1.
        # With the usual .02, it takes several times as many steps until learning begins.
        nn.init.normal_(self.embedding.weight, std=width ** -0.5)
        self.register_buffer("mu", torch.zeros(z))
        self.register_buffer("sigma", torch.ones(z))

    def encode(self, ids):
        """ids: (B, L).  Returns mean and log-variance of the latent, (B, Z) each."""
        x = self.embedding(ids) + self.encoder_positions[:ids.shape[1]]     # (B, L, W)
        mask = (ids != PAD)[:, None, None]                              # (B, 1, 1, L)
        for block in self.encoder:
            x = block(x, mask)                                          # (B, L, W)
        first = self.encoder_norm(x[:, 0])                              # (B, W)  the state of BOS
        return self.to_gaussian(first).chunk(2, dim=1)                  # (B, Z) each

    def decode(self, z, ids):
        """The logits of the next words, (B, L, V).  z: (B, Z).  ids: (B, L), the words so far."""
        x = self.embedding(ids) + self.decoder_positions[:ids.shape[1]]     # (B, L, W)
        x = x + self.to_embedding(z)[:, None]                           # (B, L, W)
        memories = self.to_memory(z).chunk(len(self.decoder), dim=1)    # (B, W) each
        for block, memory in zip(self.decoder, memories):
            x = block(x, memory)                                        # (B, L, W)
        return self.decoder_norm(x) @ self.embedding.weight.T           # (B, L, V)

    def loss(self, ids, eps, weight):
        """Cross-entropy of the words plus weight * KL divergence.  Returns () and facts {name: ()}.

        ids: (B, L).  eps: (B, Z) from N(0,1).  weight: of the divergence.

        Every number of the latent may diverge by FREE_BITS for nothing.  Without this, a decoder
        that is good at guessing the next word learns to ignore the latent.
        """
        mean, logvar = self.encode(ids)                                 # (B, Z) each
        z = mean + (logvar / 2).exp() * eps                             # (B, Z)
        logits = self.decode(z, ids[:, :-1])                            # (B, L-1, V)
        nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)  # ()
        kl = (mean.square() + logvar.exp() - 1 - logvar) / 2            # (B, Z)
        charged = kl.mean(0).clamp(min=FREE_BITS).sum()                 # ()
        return nll + weight * charged, {"nll": nll.detach(), "kl": kl.detach().sum(1).mean()}

    @property
    def device(self):
        return self.mu.device

    @torch.no_grad()
    def to_latent(self, texts, batch=64):
        """The means of texts (list of str), with mean 0 and deviation 1 over the training: (B, Z).

        The mean is taken, not a sample, as Versatile Diffusion does.
        """
        found = []
        for start in range(0, len(texts), batch):
            ids = self.words.encode(texts[start:start + batch]).to(self.device)     # (b, L)
            found.append((self.encode(ids)[0].float() - self.mu) / self.sigma)      # (b, Z)
        return torch.cat(found)                                         # (B, Z)

    @torch.no_grad()
    def from_latent(self, z, beam=1):
        """Texts of latents (B, Z).  beam: how many beginnings are kept; 1 takes the best word.

        Versatile Diffusion draws words at random and stops after 30.  Both would make BLEU a
        matter of luck.
        """
        z = z * self.sigma + self.mu                                    # (B, Z)
        return [self.words.decode(self._search(row, beam)) for row in z] if beam > 1 else \
            self._greedy(z)

    def _greedy(self, z):
        """The best word after each beginning, for all of z (B, Z) at once.  Returns texts."""
        ids = torch.full((len(z), 1), BOS, device=z.device)             # (B, 1)
        done = torch.zeros(len(z), dtype=torch.bool, device=z.device)   # (B,)
        for _ in range(self.words.length + 1):
            best = self.decode(z, ids)[:, -1].argmax(1)                 # (B,)
            ids = torch.cat([ids, best[:, None]], dim=1)                # (B, n)
            done = done | (best == EOS)                                 # (B,)
            if done.all():
                break
        return [self.words.decode(row) for row in ids.tolist()]

    def _search(self, z, beam):
        """The ids of the best report of one latent (Z,), by beam search.

        A report is judged by the mean log-probability of its words, so that short ones do not win.
        """
        open_ = [([BOS], 0.0)]                                          # (ids, log-probability)
        closed = []
        for _ in range(self.words.length + 1):
            ids = torch.tensor([own for own, _ in open_], device=z.device)      # (k, n)
            logits = self.decode(z.expand(len(open_), -1), ids)[:, -1]  # (k, V)
            best = logits.log_softmax(1).topk(beam, dim=1)              # (k, beam)
            grown = []
            for (own, score), values, words in zip(open_, best.values.tolist(),
                                                   best.indices.tolist()):
                grown += [([*own, word], score + value) for value, word in zip(values, words)]
            grown.sort(key=lambda item: item[1], reverse=True)
            open_ = [item for item in grown[:beam] if item[0][-1] != EOS]
            closed += [item for item in grown[:beam] if item[0][-1] == EOS]
            if not open_ or len(closed) >= beam:
                break
        # BOS is no word of a report.
        return max(closed or open_, key=lambda item: item[1] / (len(item[0]) - 1))[0]


# ---- Training ------------------------------------------------------------------------------------


def kl_weight(step, steps):
    """The weight of the divergence: 0 in the first quarter of the steps, KL_WEIGHT from half on."""
    return KL_WEIGHT * min(1.0, max(0.0, 4 * step / steps - 1))


def train_textvae(run, texts, val_texts, make, steps, batch, lr):
    """Train a fresh TextVAE and freeze it: stage "text" of a run.

    run         common.run.Run, for order, randomness, checkpoints and progress
    texts       list of str, cleaned reports of training subjects
    val_texts   the same of validation subjects, may be empty
    make        function: () -> a fresh TextVAE

    The weights with the lowest validation loss stay, or the last ones without validation reports.
    All processes work on the same batch, because the loss is a mean over words, not over reports.
    Returns the TextVAE.
    """
    torch.manual_seed(seed_of(run.seed, STAGE))
    vae = make().to(run.device)
    best = Best(vae)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.01, fused=True)
    parts = {"vae": vae, "best": best, "optimiser": optimiser}
    unseen = val_texts[:VALIDATION]
    for step in run.steps(STAGE, steps, parts, batch):
        for group in optimiser.param_groups:
            group["lr"] = warmup_cosine(step, steps, lr)
        rows = run.order(STAGE, len(texts), batch, step)                # (B,)
        ids = vae.words.encode([texts[r] for r in rows]).to(run.device)     # (B, L)
        g = run.generator(STAGE, step)
        eps = torch.randn(batch, vae.z, generator=g, device=run.device)     # (B, Z)
        loss, facts = vae.loss(ids, eps, kl_weight(step, steps))
        run.update(loss, optimiser)
        run.log(loss=loss, **facts)
        last = step + 1 == steps
        if unseen and (last or (step + 1) % max(1, steps // 10) == 0):
            with torch.no_grad():
                ids = vae.words.encode(unseen).to(run.device)           # (n, L)
                nothing = torch.zeros(len(ids), vae.z, device=run.device)   # (n, Z)
                value = float(vae.loss(ids, nothing, 0)[0])
            run.log(validation=value)
            # Weights from before the divergence counts would have the lowest loss, and a latent
            # that has no order.
            if step + 1 > steps // 2:
                best.offer(vae, value)
        if last:
            chosen = best.model if math.isfinite(best.loss) else vae
            raw = chosen.to_latent(texts)                               # (n, Z)
            chosen.mu.copy_(raw.mean(0))
            chosen.sigma.copy_(raw.std(0, correction=0).clamp(min=1e-6))
    return load_textvae(run, make)


def load_textvae(run, make):
    """The frozen TextVAE of a run's checkpoint, on the run's device.

    make: function: () -> a fresh TextVAE.  Raises RunError if the checkpoint does not fit it.
    """
    return run.trained(make(), STAGE, "best", "vae")


# ---- The U-Net for vectors -----------------------------------------------------------------------


class VectorBlock(nn.Module):
    """A residual block in which every number of the map sees every other.

    The map (B, C, P, 1) is flat here.  The time embedding scales and shifts, as in common/unet.py.
    """

    def __init__(self, c_in, c_out, emb_dim):
        super().__init__()
        self.c_out = c_out
        self.norm1 = nn.LayerNorm(c_in * POSITIONS)
        self.grow = nn.Linear(c_in * POSITIONS, c_out * POSITIONS)
        self.film = nn.Linear(emb_dim, 2 * c_out * POSITIONS)
        self.norm2 = nn.LayerNorm(c_out * POSITIONS)
        self.shrink = zeroed(nn.Linear(c_out * POSITIONS, c_out * POSITIONS))
        same = c_in == c_out
        self.skip = nn.Identity() if same else nn.Linear(c_in * POSITIONS, c_out * POSITIONS)

    def forward(self, x, emb):
        """x: (B, C_in, P, 1).  emb: (B, E).  Returns (B, C_out, P, 1)."""
        x = x.flatten(1)                                                # (B, C_in P)
        h = self.grow(F.silu(self.norm1(x)))                            # (B, C_out P)
        scale, shift = self.film(F.silu(emb)).chunk(2, dim=1)           # (B, C_out P) each
        h = self.norm2(h) * (1 + scale) + shift                         # (B, C_out P)
        h = self.skip(x) + self.shrink(F.silu(h))                       # (B, C_out P)
        return h.view(len(x), self.c_out, POSITIONS, 1)                 # (B, C_out, P, 1)


class VectorUNet(nn.Module):
    """Predicts the noise of a vector (B, Z).  It takes the same plugs as common/unet.py's UNet.

    z            Z
    base, mult   channels of level l are base * mult[l].  The number of positions never changes.
    blocks       residual blocks per level on the way down, and one more on the way up
    plug         Site -> Module | None, asked after each block; see common/unet.py
    """

    def __init__(self, z, base, mult, blocks, plug=lambda site: None):
        super().__init__()
        emb = 4 * base
        self.base = base
        self.time = nn.Sequential(nn.Linear(base, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.stem = nn.Linear(z, base * POSITIONS)

        def block(stage, level, index, last, c_in, c_out):
            site = Site("block", stage, level, index, last, c_out, POSITIONS)
            return nn.ModuleList([VectorBlock(c_in, c_out, emb), plug(site) or Pass()])

        channels = base
        skips = [base]
        self.down = nn.ModuleList()
        for level, m in enumerate(mult):
            for index in range(blocks):
                self.down.append(block("down", level, index, index == blocks - 1, channels,
                                       m * base))
                channels = m * base
                skips.append(channels)
        deepest = len(mult) - 1
        self.mid = nn.ModuleList([block("mid", deepest, 0, False, channels, channels),
                                  block("mid", deepest, 1, True, channels, channels)])
        self.up = nn.ModuleList()
        for level in reversed(range(len(mult))):
            # The stem belongs to level 0.
            for index in range(blocks + (level == 0)):
                wide = channels + skips.pop()
                channels = mult[level] * base
                self.up.append(block("up", level, index, index == blocks + (level == 0) - 1, wide,
                                     channels))
        self.head = nn.Sequential(nn.LayerNorm(channels * POSITIONS), nn.SiLU(),
                                  zeroed(nn.Linear(channels * POSITIONS, z)))

    def forward(self, x, t, condition=None):
        """x: (B, Z).  t: (B,).  Returns (B, Z).  condition goes untouched to every plug."""
        emb = self.time(sinusoid(t, self.base))                         # (B, 4 base)
        h = self.stem(x).view(len(x), self.base, POSITIONS, 1)          # (B, base, P, 1)
        skips = [h]
        for block, module in self.down:
            h = module(block(h, emb), condition)                        # (B, C_l, P, 1)
            skips.append(h)
        for block, module in self.mid:
            h = module(block(h, emb), condition)                        # (B, C_l, P, 1)
        for block, module in self.up:
            h = torch.cat([h, skips.pop()], dim=1)                      # (B, C_l + skip, P, 1)
            h = module(block(h, emb), condition)                        # (B, C_l, P, 1)
        return self.head(h.flatten(1))                                  # (B, Z)


class Pass(nn.Module):
    """Stands where no plug is wanted."""

    def forward(self, h, condition):
        return h
