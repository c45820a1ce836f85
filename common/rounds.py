"""Samples of several modalities in pairs: reports, X-rays, CT and MR of people who have some of them.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

A *stream* is a channel of the data (text, xray, ct, t1, t2, ...).  A *modality* is one of
MODALITIES; all MR contrasts are one modality.  A *round* is a pair of modalities such as text-ct,
which is trained on the subjects that have both.

    rounds = checked_rounds(("text-ct", "ct-mri"), streams, present)
    samples = Samples(run, ds, "train", ae, textvae)        # latents and prompt vectors, once each
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
from common.contrastive import groups_of, nearest
from common.device import seed_of
from common.files import RunError
from data import TEXT
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
            possible = [f"{a}-{b}" for a in MODALITIES for b in MODALITIES
                        if a + b != "texttext" and pairs_of(f"{a}-{b}", streams, present)]
            raise RunError(f"--rounds {name}: no training subject has such a pair; these data give "
                           f"{', '.join(possible) or 'no pair at all'}", status=2)
    return rounds


class Samples:
    """Latents and prompt vectors of one part of the data.

    Both are computed once, because codecs and prompt encoders are frozen.  A sample is one stream
    of one row; rows are counted within the part.
    """

    def __init__(self, run, ds, part, ae, textvae):
        self.run = run
        self.streams = ds.contrasts
        self.images = ds.part(part)
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
                self.latents[c] = textvae.to_latent([self.reports[r] for r in own])     # (k, Z)
                continue
            name = f"{seed_of(ds.fingerprint, part, *ds.split[part], stream):x}"
            self.latents[c] = cached_latents(
                run, ae, lambda numbers, own=own, c=c: 2 * self.pictures(own[numbers], c) - 1,
                len(own), name, run.args.cache if run.seconds is None else run.out)

    def pictures(self, rows, c):
        """Images (B, 1, H, W) in [0,1] of stream c."""
        return self.run.fetch(self.images, rows)[:, c, None]

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
    def prompt(self, encoders, rows, c):
        """Prompt vectors (B, D), from a frozen encoder."""
        if c not in self.vectors:
            own = np.flatnonzero(self.present[:, c])
            parts = np.array_split(own, math.ceil(len(own) / 64))
            found = [encoders.prompt(modality_of(self.streams[c]), self.raw(part, c))
                     for part in parts]
            self.vectors[c] = torch.cat(found)                              # (k, D)
        return self.vectors[c][self.place[rows, c]]                         # (B, D)


def all_images(run, ds, part):
    """(function numbers -> images (B, 1, H, W) in [-1,1], how many): all images of a part."""
    images = ds.part(part)
    is_image = ds.present[ds.rows(part)].copy()                             # (n, C)
    is_image[:, [c for c, stream in enumerate(ds.contrasts) if stream == TEXT]] = False
    rows, channels = np.nonzero(is_image)

    def picture(numbers):
        u = run.fetch(images, rows[numbers])                                # (B, C, H, W)
        own = u[torch.arange(len(u)), torch.from_numpy(channels[numbers])]  # (B, H, W)
        return 2 * own[:, None] - 1                                         # (B, 1, H, W)
    return picture, len(rows)


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
