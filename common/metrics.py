"""How good an image is, what trivial answers score, and what may be concluded from the numbers.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

Every table of the project takes its numbers from here:

    values = score(truth, image)["psnr"]                # (n,), one value per slice
    by_subject = per_subject(values, subjects)          # {subject: mean of its slices}
    summary(by_subject)                                 # mean, std, confidence interval
    wilcoxon(by_subject, by_subject_of_another_method)  # is the difference more than chance?

The truth is always the first argument.  The last two axes are the image, and axes before them are
kept: images (n, H, W) give n values.  Images lie in [0,1] with background 0, and the arithmetic is
float64.  The slices of one subject are not independent.  The unit of all statistics is therefore
the subject.
"""
from dataclasses import dataclass

import numpy as np
import scipy  # scipy.stats is imported when it is needed: it takes a second
from scipy import ndimage

from data import TEXT

K1 = 0.01               # the two constants of SSIM (Wang et al. 2004, Sec. III-C)
K2 = 0.03
FEWEST = 6              # subjects of a test; with five, the smallest two-sided p is 2/2^5 = .0625
ROUNDING = 1e-3         # an image may lie this far outside of [0,1]


# ---- images --------------------------------------------------------------------------------------


def psnr(truth, image, data_range, mask=None):
    """Peak signal-to-noise ratio in dB, 10 log10(range^2 / MSE).  (..., H, W) -> (...)

    data_range: the constant width of the intensity scale, 1 for [0,1]; never an image's maximum.
    mask: bool, (H, W) or like truth.  The MSE is then the mean over the pixels of the mask.

    Identical images give inf, and an empty mask gives NaN.  Raises ValueError if the shapes differ,
    or if a pixel is not finite.
    """
    truth, image, mask = checked_images(truth, image, mask)
    error = _mean((truth - image) ** 2, mask)
    with np.errstate(divide="ignore"):                      # identical images: 1 / 0 is inf
        return 10 * np.log10(data_range ** 2 / error)


def mae(truth, image, mask=None):
    """Mean absolute error, in the unit of the images.  (..., H, W) -> (...)

    mask and errors: as of psnr.
    """
    truth, image, mask = checked_images(truth, image, mask)
    return _mean(np.abs(truth - image), mask)


def nmse(truth, image, mask=None):
    """Normalised squared error, sum (truth - image)^2 / sum truth^2.  (..., H, W) -> (...)

    A blank truth gives NaN.  mask and errors: as of psnr.
    """
    truth, image, mask = checked_images(truth, image, mask)
    error = _mean((truth - image) ** 2, mask)
    energy = _mean(truth ** 2, mask)
    with np.errstate(divide="ignore", invalid="ignore"):    # blank truth: NaN in the next line
        ratio = error / energy
    return np.where(energy > 0, ratio, np.nan)[()]


def ssim(truth, image, data_range, window="gauss", mask=None):
    """Structural similarity, a fraction (Wang et al. 2004).  (..., H, W) -> (...)

    window: "gauss" is the paper's own, 11x11 with sigma 1.5, and population covariances.
        "uniform7" is the default of scikit-image, the 7x7 mean with sample covariances.
    mask: bool, (H, W) or like truth.  The similarity is then averaged over the pixels of the mask.
    data_range: as of psnr.

    Only windows inside of the image count.  Pixels that are closer to the border than half a window
    have no value.  SSIM compares means, so [0,1] and [-1,1] give different numbers.

    Raises ValueError if a side has fewer than 11 pixels, if there is no such window, if the shapes
    differ, or if a pixel is not finite.
    """
    truth, image, mask = checked_images(truth, image, mask)
    if min(truth.shape[-2:]) < 11:
        raise ValueError(f"ssim: the images are {truth.shape[-2:]}, smaller than the 11x11 window; "
                         f"use larger images")
    if window not in ("gauss", "uniform7"):
        raise ValueError(f"ssim: there is no window {window!r}; it is 'gauss' or 'uniform7'")
    edge = 5 if window == "gauss" else 3
    values = np.empty(truth.shape[:-2])
    # slice by slice, because the five maps of a whole data set may not fit into memory
    for at in np.ndindex(values.shape):
        luminance, contrast = ssim_maps(truth[at], image[at], data_range, window)
        similarity = luminance * contrast
        inner = None if mask is None else mask[at][edge:-edge, edge:-edge]
        values[at] = _mean(similarity[edge:-edge, edge:-edge], inner)
    return values[()]


def ssim_maps(truth, image, data_range, window):
    """The two factors of SSIM, luminance and contrast with structure.  (H, W) -> 2 maps (H, W)

    The outermost half window of the maps is not valid.
    """
    maps = np.stack([truth, image, truth * truth, image * image, truth * image])    # (5, H, W)
    if window == "gauss":
        maps = ndimage.gaussian_filter(maps, sigma=(0, 1.5, 1.5), radius=(0, 5, 5))
        bessel = 1
    else:
        maps = ndimage.uniform_filter(maps, size=(1, 7, 7))
        bessel = 49 / 48
    mean_t, mean_i, square_t, square_i, product = maps
    var_t = bessel * (square_t - mean_t ** 2)
    var_i = bessel * (square_i - mean_i ** 2)
    covariance = bessel * (product - mean_t * mean_i)
    c1 = (K1 * data_range) ** 2
    c2 = (K2 * data_range) ** 2
    luminance = (2 * mean_t * mean_i + c1) / (mean_t ** 2 + mean_i ** 2 + c1)
    contrast = (2 * covariance + c2) / (var_t + var_i + c2)
    return luminance, contrast


def score(truth, image, mask=None):
    """The numbers of every slice.  (n, H, W) in [0,1] -> {"psnr", "ssim", "mae", "nmse"}, each (n,)

    The whole slice counts.  With mask = truth > 0 only the foreground counts; a large background
    lifts PSNR and SSIM.

    Raises ValueError if an image lies outside of [0,1] by more than 0.001, if the shapes differ, or
    if a pixel is not finite.  A smaller excess is rounding and is clipped.
    """
    truth, image, mask = checked_images(truth, image, mask)
    truth = in_unit_range("truth", truth)
    image = in_unit_range("image", image)
    return {"psnr": psnr(truth, image, 1, mask), "ssim": ssim(truth, image, 1, mask=mask),
            "mae": mae(truth, image, mask), "nmse": nmse(truth, image, mask)}


def checked_images(truth, image, mask):
    """The arguments as float64 and bool arrays of one shape."""
    truth = np.asarray(truth, np.float64)
    image = np.asarray(image, np.float64)
    if truth.shape != image.shape or truth.ndim < 2:
        raise ValueError(f"metrics: truth is {truth.shape}, image {image.shape}; both must be "
                         f"(..., H, W) of one shape")
    for name, x in (("truth", truth), ("image", image)):
        if not np.isfinite(x).all():
            where = _place(~np.isfinite(x))
            raise ValueError(f"metrics: the {name} is not finite at {where}: see if the model "
                             f"diverged")
    if mask is not None:
        mask = np.broadcast_to(np.asarray(mask, bool), truth.shape)
    return truth, image, mask


def in_unit_range(name, image):
    """The image clipped to [0,1].  ValueError if this changes a pixel by more than rounding."""
    image = np.asarray(image)
    outside = (image < -ROUNDING) | (image > 1 + ROUNDING)
    if outside.any():
        where = _place(outside)
        low = float(image.min())
        high = float(image.max())
        if low >= 0 and 2 < high <= 255:
            remedy = "divide an image of 0 to 255 by 255"
        elif low >= -1 - ROUNDING and high <= 1 + ROUNDING:
            remedy = "an image x in [-1,1] becomes (x + 1) / 2"
        else:
            remedy = "bring truth and image to [0,1] by one and the same scale"
        raise ValueError(f"metrics: the {name} is {image[where]:g} at {where}, from {low:g} to "
                         f"{high:g} in all; scores are defined for [0,1]: {remedy}")
    return np.clip(image, 0, 1)


def _place(found):
    """The index of the first True, a tuple of plain int."""
    return tuple(int(i) for i in np.argwhere(found)[0])


def _mean(x, mask):
    """Mean over the last two axes, over the mask if there is one; NaN if the mask is empty."""
    if mask is None:
        return x.mean((-2, -1))
    with np.errstate(invalid="ignore"):                     # empty mask: 0 / 0 is NaN
        return x.sum((-2, -1), where=mask) / mask.sum((-2, -1))


# ---- subjects ------------------------------------------------------------------------------------


def per_subject(values, subjects):
    """One value per slice (n,) and its subject's name (n,) -> {subject: mean over its slices}.

    A value that is not finite is left out.  It is inf for identical images, and NaN for an empty
    mask or a blank truth.  A subject that has no finite value keeps inf or NaN.

    Raises ValueError if there is not one name per value.
    """
    values = np.asarray(values, np.float64)
    subjects = np.asarray(subjects)
    if values.shape != subjects.shape:
        raise ValueError(f"per_subject: {values.shape} values, {subjects.shape} subjects; "
                         f"give one name per slice")
    return {str(s): _finite_mean(values[subjects == s]) for s in dict.fromkeys(subjects)}


def _finite_mean(values):
    """The mean of the finite values, or the first value if none is finite."""
    finite = values[np.isfinite(values)]
    return float(finite.mean() if finite.size else values[0])


def summary(values_by_subject):
    """{subject: value} -> {"mean", "std", "ci95", "n", "excluded", "values"}, plain types for JSON.

    std         over subjects, divided by n (ddof 0)
    ci95        95 % interval of the mean, by the percentile bootstrap over subjects: 1,000 draws of
                a fixed seed; None for one subject, which says nothing about a population
    excluded    how many subjects have no finite value; they do not count
    """
    values = {s: float(v) for s, v in sorted(values_by_subject.items()) if np.isfinite(v)}
    x = np.array(list(values.values()))                     # (n,)
    n = len(x)
    mean = float(x.mean()) if n else None
    std = float(x.std()) if n else None
    ci95 = None
    if n > 1:
        # scipy.stats.bootstrap gives the same up to rounding, but the name of its argument for the
        # random numbers depends on the version
        draws = np.random.default_rng(0).integers(n, size=(1000, n))
        low, high = np.percentile(x[draws].mean(1), [2.5, 97.5])
        ci95 = [float(low), float(high)]
    return {"mean": mean, "std": std, "ci95": ci95, "n": n,
            "excluded": len(values_by_subject) - n, "values": values}


def row(task, method, metric, values_by_subject, **extra):
    """A flat row of results.json.  extra: variant, protocol, unit, table, row, ..."""
    return {"task": task, "method": method, "metric": metric, **summary(values_by_subject), **extra}


def score_table(task, images_by_method, truth, subjects, mask=None, **extra):
    """A list of rows, one for every method and metric.

    images_by_method: {method: (n, H, W)}.  truth: (n, H, W).  subjects: (n,) names.  mask, and the
    errors that are raised: as of score.

    "excluded_slices" in a row says how many slices were infinite or undefined.  They are in no
    subject's mean.
    """
    rows = []
    for method, images in images_by_method.items():
        for metric, values in score(truth, images, mask).items():
            excluded = int((~np.isfinite(values)).sum())
            found = row(task, method, metric, per_subject(values, subjects),
                        excluded_slices=excluded, **extra)
            rows.append(found)
    return rows


def volume_table(task, images_by_method, truth, subjects):
    """PSNR with one mean squared error over all slices of a subject, as rows of "variant" volume.

    The arguments are those of score_table.  score_table takes the mean of the slices' PSNR instead.
    """
    rows = []
    for method, images in images_by_method.items():
        errors = per_subject(((np.asarray(images, np.float64) - truth) ** 2).mean((1, 2)), subjects)
        values = {name: -10 * np.log10(error) if error > 0 else np.inf
                  for name, error in errors.items()}
        rows.append(row(task, method, "psnr", values, variant="volume"))
    return rows


def wilcoxon(a_by_subject, b_by_subject):
    """Paired two-sided signed-rank test over common subjects -> {"p", "difference", "n"}.

    difference: the mean of a - b.  If all pairs are equal, p is 1.  With fewer than six subjects p
    is None and "reason" says why.
    """
    both = [s for s in a_by_subject if s in b_by_subject]
    a = np.array([a_by_subject[s] for s in both], np.float64)
    b = np.array([b_by_subject[s] for s in both], np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    differences = a[finite] - b[finite]                     # (n,)
    n = len(differences)
    result = {"p": None, "difference": float(differences.mean()) if n else None, "n": n}
    if n < FEWEST:
        return {**result, "reason": f"n = {n} < {FEWEST}: no two-sided p below .05 exists"}
    ranked = differences[differences != 0]                  # Wilcoxon's own rule: a tie has no sign
    result["p"] = float(scipy.stats.wilcoxon(ranked).pvalue) if ranked.size else 1.0
    return result


def holm(p_values):
    """Holm's step-down correction (1979) over the comparisons of one table, a list like p_values.

    None means that no test was possible.  It stays None and does not count as a comparison.
    """
    tested = [i for i, p in enumerate(p_values) if p is not None]
    adjusted = [None] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(tested, key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(tested) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


# ---- trivial answers -----------------------------------------------------------------------------


def mean_of_train(targets):
    """The mean of all training targets.  (n, H, W) -> (H, W)"""
    return np.mean(targets, axis=0, dtype=np.float64)


def copy_source(train_sources, train_target):
    """The name of the source that is most like the target, by mean PSNR over the training slices.

    train_sources: {contrast: (n, H, W)}.  train_target: (n, H, W).
    """
    def likeness(name):
        images = train_sources[name]
        # slice by slice, because a training set in float64 may not fit into memory
        values = [psnr(target, images[i], 1) for i, target in enumerate(train_target)]
        return _finite_mean(np.array(values))
    return max(train_sources, key=likeness)


class IntensityLookup:
    """The expected target intensity, given the source intensities of the same pixel.

    This is all that one can know without looking at the pixels around.  It is learned on training
    slices, as a table with one axis per source.  One source has 64 bins, two or three have 16 bins
    each, and more have 8 each.  Exact background (0) has a bin of its own.  A cell without a
    training pixel takes the value of the nearest cell that has one.

    Raises ValueError, here and in predict, if a source lies outside of [0,1] by more than 0.001.
    """

    def __init__(self, train_sources, train_target):
        """train_sources: {contrast: (n, H, W)} in [0,1].  train_target: (n, H, W)."""
        self.names = list(train_sources)
        self.bins = {1: 64, 2: 16, 3: 16}.get(len(self.names), 8)
        shape = (self.bins + 1,) * len(self.names)
        total = np.zeros(shape).ravel()
        count = np.zeros(shape).ravel()
        for i, target in enumerate(train_target):
            cells = self._cells({name: train_sources[name][i] for name in self.names})
            cells = np.ravel_multi_index(cells, shape).ravel()                      # (H*W,)
            total += np.bincount(cells, np.asarray(target, np.float64).ravel(), total.size)
            count += np.bincount(cells, minlength=count.size)
        table = (total / np.maximum(count, 1)).reshape(shape)
        empty = count.reshape(shape) == 0
        nearest = ndimage.distance_transform_edt(empty, return_distances=False, return_indices=True)
        self.table = table[tuple(nearest)].astype(np.float32)

    @classmethod
    def of_table(cls, names, table):
        """A look-up with a table that was learned before.  names: those of its axes, in order."""
        found = cls.__new__(cls)
        found.names = list(names)
        found.bins = table.shape[0] - 1
        found.table = table
        return found

    def _cells(self, sources):
        """The place in the table of every pixel: one integer array per source."""
        images = [in_unit_range(f"source {name}", sources[name]) for name in self.names]
        return tuple(np.ceil(image * self.bins).astype(int) for image in images)

    def predict(self, sources):
        """{contrast: (n, H, W)} in [0,1] -> (n, H, W)"""
        return self.table[self._cells(sources)]


@dataclass
class Baselines:
    """What to beat, learned on training slices.

    copied    name of the source that is copied; None if no source is an image
    mean      (H, W), the mean of the training targets
    lookup    an IntensityLookup, or None
    """
    copied: str | None
    mean: np.ndarray
    lookup: IntensityLookup | None

    def predict(self, sources, count):
        """{contrast: (n, H, W)} in [0,1] and n -> {name of the baseline: (n, H, W)}"""
        mean = {"mean-of-train": np.broadcast_to(self.mean, (count, *self.mean.shape))}
        if self.copied is None:
            return mean
        return {"copy-source": sources[self.copied], **mean,
                "intensity-lookup": self.lookup.predict(sources)}


def learn_baselines(train, names, target):
    """Learn the Baselines of one task.

    train: {contrast: (m, H, W)} in [0,1].  names: the sources.  target: the wanted contrast.
    A report among the sources is no image and is passed over.
    """
    seen = {name: train[name] for name in names if name != TEXT}
    if not seen:
        return Baselines(None, mean_of_train(train[target]), None)
    return Baselines(copy_source(seen, train[target]), mean_of_train(train[target]),
                     IntensityLookup(seen, train[target]))


def baselines(train, sources, target):
    """What to beat: {"copy-source", "mean-of-train", "intensity-lookup"}, each (n, H, W).

    train: {contrast: (m, H, W)}, from which they are learned.  sources: {contrast: (n, H, W)}, to
    which they are applied.  target: the name of the wanted contrast.  All images lie in [0,1].
    From a report alone, there is only "mean-of-train".
    """
    count = len(next(iter(sources.values())))
    return learn_baselines(train, sources, target).predict(sources, count)
