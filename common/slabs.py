"""Pairs of slabs: a few neighbouring slices of two scans of one person, at one place.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.
"""
from itertools import combinations

import numpy as np

TISSUE = 0.1            # a slab should show at least this share of tissue
TRIES = 10              # so often a place for that is looked for


class Pairs:
    """Pairs of scans of the subjects of one part of a data set.

    Every pair of contrasts that some subject has is equally likely, even if few subjects have it.

    ds       data.Dataset, with or without gaps
    part     "train", "val" or "test"
    tasks    pairs of contrasts (a, b); their order does not matter
    slices   of a slab
    patch    height and width of a slab in pixels
    """

    def __init__(self, ds, part, tasks, slices, patch):
        self.ds = ds
        self.slices = slices
        self.patch = patch
        self.rows = {}                                      # subject -> its rows, from low to high
        for r in ds.rows(part):
            self.rows.setdefault(str(ds.subject[r]), []).append(r)
        wanted = {frozenset(task) for task in tasks}
        self.subjects = {}                                  # (contrast, contrast) -> subjects
        for subject in ds.complete:
            if subject.name not in self.rows:
                continue
            for pair in combinations(ds.contrasts, 2):
                if set(pair) <= set(subject.files) and frozenset(pair) in wanted:
                    self.subjects.setdefault(pair, []).append(subject.name)
        self.pairs = sorted(self.subjects)

    def draw(self, g):
        """Draw a pair of contrasts, a subject and a place.  g: numpy generator.

        Returns (subject, pair, slabs (2, slices, patch, patch) float32).  The slabs are from
        neighbouring slices of ds; a subject with too few slices gets empty ones at the top.  At
        least a tenth of the first slab is tissue (above 0), if ten tries find such a place.  Half
        of the pairs are mirrored.
        """
        pair = self.pairs[g.integers(len(self.pairs))]
        name = self.subjects[pair][g.integers(len(self.subjects[pair]))]
        rows = self.rows[name]
        first = g.integers(max(1, len(rows) - self.slices + 1))
        rows = rows[first:first + self.slices]
        channels = [self.ds.contrasts.index(contrast) for contrast in pair]
        slabs = np.asarray(self.ds.images[rows], np.float32)[:, channels]   # (Z, 2, H, W)
        slabs = slabs.transpose(1, 0, 2, 3)                                 # (2, Z, H, W)
        lacking = self.slices - slabs.shape[1]
        slabs = np.pad(slabs, ((0, 0), (0, lacking), (0, 0), (0, 0)))       # (2, slices, H, W)
        size = slabs.shape[-1]
        for _ in range(TRIES):
            row, column = g.integers(size - self.patch + 1, size=2)
            crop = slabs[:, :, row:row + self.patch, column:column + self.patch]
            if (crop[0] > 0).mean() >= TISSUE:
                break
        if g.random() < 0.5:
            crop = crop[..., ::-1]
        return name, pair, crop
