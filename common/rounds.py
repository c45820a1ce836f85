"""Samples of several modalities in pairs: reports, X-rays, CT and MR of people who have some.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

A *stream* is a channel of the data (text, xray, ct, t1, t2, ...).  A *modality* is one of
MODALITIES; all MR contrasts are one modality.  A *round* is a pair of modalities such as text-ct,
which is trained on the subjects that have both.

    rounds = checked_rounds(("text-ct", "ct-mri"), streams, present)
    samples = Samples(run, ds, "train", codecs)             # latents and prompt vectors, once each
    (a, b), rows = batch_of(run, "flow", rounds[0], batch, step)
    samples.latent(rows, a)                                 # (B, z, h, w), or (B, Z) of text

Letters in shape comments: B samples, n rows, C streams, z h w channels, height and width of a
latent, Z numbers of a text latent, D width of a prompt vector.
"""
import math
from itertools import combinations, permutations

import numpy as np
import torch

from common.autoencoder import cached_latents
from common.clip import warmup_cosine
from common.contrastive import groups_of, nearest
from common.device import seed_of
from common.files import RunError
from common.tasks import named_directions
from data import TEXT, evenly
from data.layouts.words import kind_of

MODALITIES = ("text", "xray", "ct", "mri")


def modality_of(stream):
    """One of MODALITIES.  RunError if the stream is of none, such as PET."""
    if stream == TEXT:
        return "text"
    found = {"X-ray": "xray", "CT": "ct", "MRI": "mri"}.get(kind_of(stream))
    if found is None:
        raise RunError(f"{stream}: this method knows text, X-ray, CT and MR; "
                       "leave it out with --contrasts", status=2)
    return found


def there(streams):
    """The modalities of these streams, in the order of MODALITIES."""
    return [m for m in MODALITIES if m in map(modality_of, streams)]


def check_names(names):
    """ValueError if one of the names of rounds is not like text-ct."""
    for name in names:
        pair = name.split("-")
        if len(pair) != 2 or not set(pair) <= set(MODALITIES) or name == "text-text":
            raise ValueError(f"--rounds {name}: a round is two of {', '.join(MODALITIES)} with a "
                             "dash, such as text-ct or mri-mri")


def pairs_of(name, streams, present):
    """The training pairs of a round, {(channel of A, channel of B): rows that have both}.

    name: such as text-ct.  present: (n, C) bool.  Of mri-mri, each two contrasts are a pair in both
    orders.
    """
    wanted = tuple(name.split("-"))
    found = {}
    for a, b in permutations(range(len(streams)), 2):
        if (modality_of(streams[a]), modality_of(streams[b])) == wanted:
            rows = np.flatnonzero(present[:, a] & present[:, b])
            if len(rows):
                found[a, b] = rows
    return found


def checked_rounds(names, streams, present):
    """[pairs_of each round].  RunError if no subject has a pair that a round needs."""
    rounds = [pairs_of(name, streams, present) for name in names]
    for name, pairs in zip(names, rounds):
        if not pairs:
            possible = [f"{a}-{b}" for i, a in enumerate(MODALITIES) for b in MODALITIES[i:]
                        if pairs_of(f"{a}-{b}", streams, present)]
            raise RunError(f"--rounds {name}: no training subject has such a pair; these data give "
                           f"{', '.join(possible) or 'no pair at all'}", status=2)
    for stream in streams:
        if not any(modality_of(stream) in name.split("-") for name in names):
            raise RunError(f"{stream} is in none of the rounds {', '.join(names)} and would not be "
                           "trained; add a round, or leave it out with --contrasts", status=2)
    return rounds


def fresh_of(names):
    """For each round the modalities that it trains: those that no earlier round has trained.

    If there is none, it is the second one.  names: such as text-ct.
    """
    seen = set()
    found = []
    for name in names:
        pair = name.split("-")
        found.append([m for m in dict.fromkeys(pair) if m not in seen] or [pair[1]])
        seen.update(pair)
    return found


class Samples:
    """Latents and prompt vectors of one part of the data.

    Both are computed once, because codecs and prompt encoders are frozen.  A sample is one stream
    of one row; rows are counted within the part.

    change   a function (stream, images (B, 1, H, W)) -> images that is applied to all images
    tag      stands for the change, in the name of the file that keeps latents
    """

    def __init__(self, run, ds, part, codecs, change=lambda stream, x: x, tag=""):
        self.run = run
        self.streams = ds.contrasts
        self.images = ds.part(part)
        self.change = change
        rows = ds.rows(part)
        self.reports = ds.reports(rows)
        self.present = ds.present[rows]                                     # (n, C)
        self.place = self.present.cumsum(0) - 1                             # (n, C)
        self.latents = {}
        self.vectors = {}
        for c, stream in enumerate(self.streams):
            own = np.flatnonzero(self.present[:, c])
            if len(own) == 0:
                continue
            if stream == TEXT:
                self.latents[c] = codecs.encode(TEXT, [self.reports[r] for r in own])   # (k, Z)
                continue
            name = f"{seed_of(ds.fingerprint, part, *ds.split[part], stream, tag):x}"
            self.latents[c] = cached_latents(
                run, codecs.ae,
                lambda numbers, own=own, c=c: 2 * self.pictures(own[numbers], c) - 1,
                len(own), name, run.args.cache if run.seconds is None else run.out)

    def pictures(self, rows, c):
        """Images (B, 1, H, W) in [0,1] of stream c."""
        return self.change(self.streams[c], self.run.fetch(self.images, rows)[:, c, None])

    def raw(self, rows, c):
        """What a prompt encoder reads: images, or a list of str."""
        if self.streams[c] == TEXT:
            return [self.reports[r] for r in rows]
        return self.pictures(rows, c)

    def latent(self, rows, c):
        """Latents of rows that have stream c: (B, z, h, w), or (B, Z) of text."""
        places = self.place[rows, c]
        if self.streams[c] == TEXT:
            return self.latents[c][places]
        return self.run.fetch(self.latents[c], places)

    @torch.no_grad()
    def encoded(self, encode, c):
        """encode(modality, what raw gives) of all rows that have stream c: (k, D)."""
        own = np.flatnonzero(self.present[:, c])
        modality = modality_of(self.streams[c])
        parts = np.array_split(own, math.ceil(len(own) / 64))
        return torch.cat([encode(modality, self.raw(part, c)) for part in parts])

    def prompt(self, encoders, rows, c):
        """Prompt vectors (B, D), from a frozen encoder."""
        if c not in self.vectors:
            self.vectors[c] = self.encoded(encoders.prompt, c)              # (k, D)
        return self.vectors[c][self.place[rows, c]]                         # (B, D)

    def of_modality(self, modality):
        """Numbers of the channels of a modality that there are samples of."""
        return [c for c in self.latents if modality_of(self.streams[c]) == modality]

    def moments(self, modality):
        """Mean and deviation of latents, (z,) each, over at most 1,024 samples of each stream.

        The samples are spread evenly, because neighbours are slices of one subject.  Text has 0 and
        1, because the text codec sees to it.
        """
        if modality == "text":
            z = self.latents[self.streams.index(TEXT)]                      # (n, Z)
            return torch.zeros_like(z[0]), torch.ones_like(z[0])
        found = []
        for c in self.of_modality(modality):
            rows = evenly(np.flatnonzero(self.present[:, c]), 1024)
            z = self.latent(rows, c)                                        # (n, z, h, w)
            found.append(z.flatten(2).transpose(1, 2).flatten(0, 1))        # (n*h*w, z)
        sites = torch.cat(found)                                            # (N, z)
        return sites.mean(0), sites.std(0, correction=0).clamp(min=1e-6)


def usual_tasks(names, streams):
    """The tasks of some rounds that make images, as pairs (known streams, streams to make).

    They are both directions of each round.  Text to MR is one more, if rounds link both, even over
    other modalities.  Of mri-mri, each contrast is made from all others.
    """
    found = []
    for name in names:
        for a, b in (name.split("-"), name.split("-")[::-1]):
            for target in streams:
                known = tuple(s for s in streams if modality_of(s) == a and s != target)
                if modality_of(target) == b != "text" and known:
                    found.append((known, (target,)))
    mr = tuple(s for s in streams if modality_of(s) == "mri")
    linked = {"text"}
    for _ in names:                                         # one more link in each turn
        for name in names:
            if linked & set(name.split("-")):
                linked |= set(name.split("-"))
    if TEXT in streams and mr and "mri" in linked:
        found.append(((TEXT,), mr))
    return list(dict.fromkeys(found))


def patterns(cfg, streams):
    """The tasks to score, as pairs (known streams, streams to make).

    Tasks that make a report are scored elsewhere; see multimodal.overall.
    """
    if cfg.only:
        named = named_directions(cfg.only, streams)
        return [(known, make) for known, make in named if TEXT not in make]
    tasks = usual_tasks(cfg.rounds, streams)
    if cfg.accelerate > 1:              # MR is then degraded, and no target
        tasks = [task for task in tasks if "mri" not in map(modality_of, task[1])]
    return tasks


class Phases:
    """A stage whose phases train different parts of a network, one after the other.

    run, stage, batch   as of run.steps
    lengths             steps of each phase
    networks            {name: module}; with the optimisers, these are the parts of the checkpoint
    opened              for each phase a list of modules or parameters; all others are frozen
    peaks               for each phase the highest learning rate
    decay               weight decay of AdamW

    Iterating gives (phase, step within it, step of the stage, optimiser).  Frozen means three
    things: no gradient, eval mode, and not in the optimiser.
    """

    def __init__(self, run, stage, lengths, networks, opened, peaks, batch, decay=0.01):
        self.run = run
        self.stage = stage
        self.lengths = lengths
        self.networks = networks
        self.opened = opened
        self.peaks = peaks
        self.batch = batch
        self.optimisers = []
        for parts, peak in zip(opened, peaks):
            weights = [p for part in parts for p in weights_of(part)]
            self.optimisers.append(torch.optim.AdamW(weights, lr=peak, weight_decay=decay,
                                                     fused=True))

    def __iter__(self):
        named = {f"optimiser {i}": each for i, each in enumerate(self.optimisers)}
        ends = np.cumsum(self.lengths)
        phase = None
        for step in self.run.steps(self.stage, int(ends[-1]), {**self.networks, **named},
                                   self.batch):
            now = int(np.searchsorted(ends, step, side="right"))
            local = step - int(ends[now]) + self.lengths[now]
            if phase != now:
                phase = now
                self.freeze()
                for part in self.opened[now]:
                    part.requires_grad_(True)
                    if isinstance(part, torch.nn.Module):
                        part.train()
            optimiser = self.optimisers[now]
            for group in optimiser.param_groups:
                group["lr"] = warmup_cosine(local, self.lengths[now], self.peaks[now])
            yield now, local, step, optimiser
        self.freeze()

    def freeze(self):
        for network in self.networks.values():
            network.requires_grad_(False).eval()


def weights_of(part):
    """The parameters of a module, or the parameter itself, as a list."""
    return list(part.parameters()) if isinstance(part, torch.nn.Module) else [part]


def batch_of(run, purpose, pairs, batch, step):
    """The pair of streams and the rows (batch,) of a step; the pairs take turns."""
    kinds = list(pairs)
    pair = kinds[step % len(kinds)]
    turn = step // len(kinds)
    order = run.order(f"{purpose} {pair}", len(pairs[pair]), batch, turn)
    return pair, pairs[pair][order]


def draws(g, batch, device, mine):
    """A function (what, like) -> random numbers of this process's share of a batch.

    "time": (B,) in 0 .. 999; "uniform": (B,) in [0,1); "normal": N(0,1) like a tensor.  They are
    drawn for the whole batch, so that the number of processes changes nothing.
    """
    def draw(what, like=None):
        if what == "time":
            return torch.randint(1000, (batch,), generator=g, device=device)[mine]
        if what == "uniform":
            return torch.rand(batch, generator=g, device=device)[mine]
        return torch.randn(batch, *like.shape[1:], generator=g, device=device)[mine]
    return draw


def at(table, t, like):
    """Entries t (B,) of a table (T,), with as many axes as a tensor."""
    return table[t].view(-1, *[1] * (like.dim() - 1))


def found_again(a, b, groups, block=32):
    """The share of the rows of a (n, D) whose nearest row of b (n, D) is of their group.

    groups: (n,) integers, equal for samples with equal reports.  It is the mean over blocks of
    `block` rows, because the more rows there are, the harder it is.  NaN if there is no whole
    block.
    """
    hits = []
    for start in range(0, len(a) - block + 1, block):
        here = slice(start, start + block)
        best = nearest(a[here], b[here]).to(groups.device)                  # (block,)
        hits.append((groups[here][best] == groups[here]).float().mean().item())
    return sum(hits) / len(hits) if hits else float("nan")


def retrieval(samples, encoders):
    """How well the shared space matches two streams: {(stream, stream): found_again}, both ways.

    samples: Samples of subjects that the encoders have not seen.
    """
    found = {}
    for a, b in combinations(range(len(samples.streams)), 2):
        rows = np.flatnonzero(samples.present[:, a] & samples.present[:, b])
        if len(rows) >= 32:
            texts = [samples.reports[r] if TEXT in (samples.streams[a], samples.streams[b])
                     else str(r) for r in rows]
            e_a = samples.prompt(encoders, rows, a)                         # (n, D)
            e_b = samples.prompt(encoders, rows, b)                         # (n, D)
            groups = groups_of(texts)                                       # (n,)
            both = found_again(e_a, e_b, groups), found_again(e_b, e_a, groups)
            found[samples.streams[a], samples.streams[b]] = sum(both) / 2
    return found


def say_retrieval(run, samples, encoders):
    """Tell the user what retrieval finds."""
    for pair, share in retrieval(samples, encoders).items():
        run.say(f"shared space: of 32 validation samples, {share:.2f} find their own, "
                f"{' - '.join(pair)} (chance .03)")
