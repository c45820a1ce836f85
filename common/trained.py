"""A trained model, for use from Python: numpy or torch in, the same out.

Every script gives its model one method, fill(u, known, keys, watch). It gets

    u       (B, C, H, W) in [0,1], zero where a contrast is missing
    known   (B, C) bool
    keys    (subject, slice number) of each slice; they fix the noise
    watch   a list for the steps of the sampler, or None
    wanted  (B, C) bool, only for a model whose .selective is True: which of the missing contrasts
            to make. Other models make all

and returns (B, C, H, W) in [0,1] and a dict of extras, {name: images (B, C, H, W)}. Extras are
scored and drawn beside the result, for example the prior that a sampler started from. An extra
called "notes" is a dict of its own, {name: (B, ...)}, for example with a score of confidence.

A model with the contrast "text" also has generate(given, make, keys), from {contrast: images
(B, 1, H, W)} to {contrast: B texts}. It makes reports, which `fill` does not.
"""
from itertools import groupby

import numpy as np
import torch

from data import canonical_contrast

TOLERANCE = 1e-3        # rounding may lead so far outside of [0,1]


class Trained:
    """A trained model, for use from Python.

    contrasts   names in the order of the channels
    size        height and width of a slice in pixels
    """

    def __init__(self, model, cfg):
        self.model = model
        self.config = cfg
        self.contrasts = tuple(model.contrasts)
        self.size = cfg.size

    def fill(self, images, known, keys=None, extras=False):
        """Fill in the contrasts that are missing.

        images   (B, C, H, W) in [0,1], numpy or torch, with H = W = .size. Channels are in the
                 order of .contrasts. Missing contrasts may hold anything, also NaN
        known    (B, C) or (C,) bool, or the names of the known contrasts, such as ("t1", "t2")
        keys     one (subject, slice number) per slice. They fix the noise, so that a slice always
                 comes out the same. By default the slices are numbered
        extras   True: also return a dict of what the method made on the way, such as its prior

        Returns images of the same kind, float32. Known contrasts come back as they are.
        ValueError for other shapes or names, for values outside of [0,1], and if nothing is known
        or missing.
        """
        u = self._checked_images(images)
        known = self._checked_known(known, len(u))
        self._check_values(u, known)
        if keys is None:
            keys = [("array", number) for number in range(len(u))]
        if len(keys) != len(u):
            raise ValueError(f"fill: {len(keys)} keys for {len(u)} slices; "
                             "give one (subject, slice) for each")
        made = []
        notes = []
        numbers = list(range(len(u)))
        for part in in_parts(self.model, numbers, self.config.sample_batch, lambda b: keys[b][0]):
            result, found = fill(self.model, u[part], known[part], [keys[b] for b in part])
            made.append(result)
            notes.append(found)
        filled = self._like(images, torch.cat(made))
        if not extras:
            return filled
        more = {}
        for name in notes[0]:
            parts = [found[name] for found in notes]
            if name != "notes":
                more[name] = self._like(images, torch.cat(parts))
                continue
            for title in parts[0]:
                more[title] = self._like(images, torch.cat([part[title] for part in parts]))
        return filled, more

    def _checked_images(self, images):
        """(B, C, H, W) float32 on the model's device."""
        u = torch.as_tensor(images).detach().float()
        C = len(self.contrasts)
        S = self.size
        if u.dim() != 4 or tuple(u.shape[1:]) != (C, S, S) or len(u) == 0:
            raise ValueError(f"fill: images are {tuple(u.shape)}; this model needs "
                             f"(B, {C}, {S}, {S}), B slices of the contrasts "
                             f"{', '.join(self.contrasts)} "
                             "(data.load_scans brings files to this size)")
        return u.to(self.model.run.device)

    def _checked_known(self, known, B):
        """(B, C) bool on the model's device."""
        C = len(self.contrasts)
        if isinstance(known, (set, frozenset, dict)) or known is None:
            known = list(known or ())
        words = not torch.is_tensor(known) and np.asarray(known).dtype.kind in "USO"
        if words or np.size(known) == 0:
            names = [canonical_contrast(str(name)) for name in np.atleast_1d(np.asarray(known))]
            unknown = [name for name in names if name not in self.contrasts]
            if unknown:
                raise ValueError(f"fill: known holds {', '.join(map(repr, unknown))}; choose among "
                                 f"{', '.join(self.contrasts)}")
            known = [contrast in names for contrast in self.contrasts]
        known = torch.as_tensor(known)
        if known.dtype != torch.bool or tuple(known.shape) not in ((C,), (B, C)):
            raise ValueError(f"fill: known is {tuple(known.shape)} of {known.dtype}; give bool of "
                             f"shape (B, C) = {(B, C)} or (C,), or names of "
                             f"{', '.join(self.contrasts)}")
        known = known.expand(B, C).to(self.model.run.device)
        for b, row in enumerate(known.tolist()):
            if all(row) or not any(row):
                count = "all" if all(row) else "no"
                raise ValueError(f"fill: slice {b} has {count} contrasts known; "
                                 "at least one must be known and one missing")
        return known

    def _check_values(self, u, known):
        """ValueError if a known contrast has values that are not finite, or outside of [0,1]."""
        for c, contrast in enumerate(self.contrasts):
            values = u[:, c][known[:, c]]
            if values.numel() == 0:
                continue
            if not torch.isfinite(values).all():
                raise ValueError(f"fill: the known contrast {contrast} has values that are not "
                                 "finite; replace them (background is 0)")
            low = float(values.min())
            high = float(values.max())
            if low < -TOLERANCE or high > 1 + TOLERANCE:
                raise ValueError(f"fill: the known contrast {contrast} has values from "
                                 f"{low:.4g} to {high:.4g}, outside [0,1]; divide a 0 to 255 image "
                                 "by 255, or read a scan with data.load_scans")

    @staticmethod
    def _like(images, tensor):
        """The result as numpy if the images were numpy, and otherwise on their device."""
        if torch.is_tensor(images):
            return tensor.to(images.device)
        return tensor.cpu().numpy()


@torch.no_grad()
def fill(model, u, known, keys, watch=None, wanted=None):
    """Call model.fill, after everything in u (B, C, H, W) that is not known (B, C) was set to zero.

    watch: a list, or None. It gets (title, state, estimate of x0) at each evaluation of the
    network. State and estimate are images (B, C, H, W) in [-1,1].
    wanted: (B, C) bool, what the caller needs of the missing contrasts; None: all.
    """
    mask = known[:, :, None, None]                                          # (B, C, 1, 1)
    u = torch.where(mask, u, 0)                                             # (B, C, H, W)
    if selects(model):
        return model.fill(u, known, keys, watch, wanted)
    return model.fill(u, known, keys, watch)


def selects(model):
    """True for a model that is told which of the missing contrasts to make."""
    return getattr(model, "selective", False)


def in_parts(model, items, size, subject_of):
    """Divide items into parts that the model is given at once, as lists.

    They have up to `size` items. A model that needs whole volumes (.volumes is True) gets all
    neighbours of one subject together.
    """
    if not getattr(model, "volumes", False):
        return [items[start:start + size] for start in range(0, len(items), size)]
    return [list(part) for _, part in groupby(items, subject_of)]
