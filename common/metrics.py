"""How good an image is, what trivial answers score, and what may be concluded: one definition for every table.

Truth comes first everywhere.  The last two axes are the image, axes before them are kept: (n, H, W) gives n values.
Images lie in [0,1], background 0; the arithmetic is float64.  Slices of one subject are not independent, so that the
unit of all statistics is the subject:  score -> per_subject -> summary, wilcoxon, holm.
"""
import numpy as np
from scipy import ndimage, stats

K1, K2 = 0.01, 0.03         # SSIM's two constants (Wang et al. 2004, Sec. III-C)
FEWEST = 6                  # subjects: with five, the smallest two-sided Wilcoxon p is 2/2^5 = .0625


# ---- images ----------------------------------------------------------------------------------------------------------


def psnr(truth, image, data_range, mask=None):
    """Peak signal-to-noise ratio in dB, 10 log10(range^2 / MSE).  (..., H, W) -> (...)

    data_range: the constant width of the intensity scale (1 for [0,1]), never an image's own maximum.
    mask: (H, W) or like truth; the MSE is then taken over its pixels alone (none: NaN).  Identical images: inf.
    """
    truth, image, mask = _checked(truth, image, mask)
    with np.errstate(divide="ignore"):                          # log of zero is the honest answer for identical images
        return 10 * np.log10(data_range ** 2 / _mean((truth - image) ** 2, mask))


def mae(truth, image, mask=None):
    """Mean absolute error, in the unit of the images.  (..., H, W) -> (...)"""
    truth, image, mask = _checked(truth, image, mask)
    return _mean(np.abs(truth - image), mask)


def nmse(truth, image, mask=None):
    """Normalised squared error: sum (truth - image)^2 / sum truth^2 (blank: NaN).  (..., H, W) -> (...)"""
    truth, image, mask = _checked(truth, image, mask)
    error, energy = _mean((truth - image) ** 2, mask), _mean(truth ** 2, mask)
    return np.where(energy > 0, error / np.where(energy > 0, energy, 1), np.nan)[()]


def ssim(truth, image, data_range, window="gauss", mask=None):
    """Structural similarity, a fraction.  (..., H, W) -> (...)

    "gauss": Wang et al. 2004, 11x11 Gaussian of sigma 1.5, population covariance.  "uniform7": the 7x7 mean and sample
    covariance that scikit-image takes by default.  The map has no borders: windows lie inside the image.
    mask: the map is averaged over its pixels (those closer to the border than half a window have no value).
    SSIM compares means, so that [0,1] and [-1,1] give different numbers.  ValueError below 11 pixels.
    """
    truth, image, mask = _checked(truth, image, mask)
    if min(truth.shape[-2:]) < 11:
        raise ValueError(f"ssim: the images are {truth.shape[-2:]}, smaller than the 11x11 window; use larger images")
    if window not in ("gauss", "uniform7"):
        raise ValueError(f"ssim: there is no window {window!r}; it is 'gauss' or 'uniform7'")
    edge = 5 if window == "gauss" else 3
    values = np.empty(truth.shape[:-2])
    for at in np.ndindex(values.shape):                         # by slice: the five maps of a whole set may not fit
        similarity = _ssim_map(truth[at], image[at], data_range, window)
        inner = None if mask is None else mask[at][edge:-edge, edge:-edge]
        values[at] = _mean(similarity[edge:-edge, edge:-edge], inner)
    return values[()]


def _ssim_map(truth, image, data_range, window):
    """(H, W) -> (H, W); the outermost half window is not valid."""
    maps = np.stack([truth, image, truth * truth, image * image, truth * image])
    if window == "gauss":
        taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
        taps, bessel = taps / taps.sum(), 1
    else:
        taps, bessel = np.full(7, 1 / 7), 49 / 48
    for axis in (1, 2):
        maps = ndimage.correlate1d(maps, taps, axis)
    mean_t, mean_i, square_t, square_i, product = maps
    var_t, var_i = bessel * (square_t - mean_t ** 2), bessel * (square_i - mean_i ** 2)
    covariance = bessel * (product - mean_t * mean_i)
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    luminance = (2 * mean_t * mean_i + c1) / (mean_t ** 2 + mean_i ** 2 + c1)
    return luminance * (2 * covariance + c2) / (var_t + var_i + c2)


def score(truth, image, mask=None):
    """The numbers of every slice, clipped to [0,1], range 1.  (n, H, W) -> {"psnr", "ssim", "mae", "nmse"}, each (n,)

    The whole slice counts; mask = truth > 0 gives the foreground (a large background lifts PSNR and SSIM).
    """
    truth, image, mask = _checked(truth, image, mask)          # first: clipping would hide an infinity
    truth, image = np.clip(truth, 0, 1), np.clip(image, 0, 1)
    return {"psnr": psnr(truth, image, 1, mask), "ssim": ssim(truth, image, 1, mask=mask),
            "mae": mae(truth, image, mask), "nmse": nmse(truth, image, mask)}


def _checked(truth, image, mask):
    truth, image = np.asarray(truth, np.float64), np.asarray(image, np.float64)
    if truth.shape != image.shape or truth.ndim < 2:
        raise ValueError(f"metrics: truth is {truth.shape}, image {image.shape}; both must be (..., H, W) of one shape")
    for name, x in (("truth", truth), ("image", image)):
        if not np.isfinite(x).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
            raise ValueError(f"metrics: the {name} is not finite at {where}: see if the model diverged")
    return truth, image, None if mask is None else np.broadcast_to(np.asarray(mask, bool), truth.shape)


def _mean(x, mask):
    """Mean over the last two axes, over the mask where there is one; NaN where it is empty."""
    if mask is None:
        return x.mean((-2, -1))
    count = mask.sum((-2, -1))
    return np.where(count > 0, (x * mask).sum((-2, -1)) / np.maximum(count, 1), np.nan)[()]


# ---- subjects --------------------------------------------------------------------------------------------------------


def per_subject(values, subjects):
    """One value per slice (n,) and its subject's name (n,) -> {subject: mean over its slices}.

    Slices without a finite value (identical: inf; empty mask or blank truth: NaN) are left out; a subject that has no
    other keeps inf or NaN.
    """
    values, subjects = np.asarray(values, np.float64), np.asarray(subjects)
    if values.shape != subjects.shape:
        raise ValueError(f"per_subject: {values.shape} values, {subjects.shape} subjects; give one name per slice")
    return {str(s): _finite_mean(values[subjects == s]) for s in dict.fromkeys(subjects)}


def _finite_mean(values):
    finite = values[np.isfinite(values)]
    return float(finite.mean() if finite.size else values[0])


def summary(values_by_subject):
    """{subject: value} -> {"mean", "std", "ci95", "n", "excluded", "values"}, plain types for JSON.

    std: over subjects, ddof 0.  ci95: percentile bootstrap over subjects, 1,000 draws of a fixed seed; None for one
    subject, which says nothing about a population.  "excluded": how many subjects had no finite value and do not count.
    """
    values = {s: float(v) for s, v in sorted(values_by_subject.items()) if np.isfinite(v)}
    x, n = np.array(list(values.values())), len(values)
    ci95 = None
    if n > 1:
        draws = x[np.random.default_rng(0).integers(n, size=(1000, n))].mean(1)
        ci95 = [float(v) for v in np.percentile(draws, [2.5, 97.5])]
    return {"mean": float(x.mean()) if n else None, "std": float(x.std()) if n else None, "ci95": ci95, "n": n,
            "excluded": len(values_by_subject) - n, "values": values}


def row(task, method, metric, values_by_subject, **extra):
    """A flat row of results.json.  extra: variant, protocol, unit, table, row, ..."""
    return {"task": task, "method": method, "metric": metric, **summary(values_by_subject), **extra}


def score_table(task, images_by_method, truth, subjects, mask=None, **extra):
    """Rows of every method and metric.  images_by_method: {method: (n, H, W)}; truth: (n, H, W); subjects: (n,).

    "excluded_slices": how many slices were infinite or undefined, and are in no subject's mean.
    """
    rows = []
    for method, images in images_by_method.items():
        for metric, values in score(truth, images, mask).items():
            excluded = int((~np.isfinite(values)).sum())
            rows.append(row(task, method, metric, per_subject(values, subjects), excluded_slices=excluded, **extra))
    return rows


def wilcoxon(a_by_subject, b_by_subject):
    """Paired two-sided signed-rank test over the subjects that both have -> {"p", "difference", "n"}.

    difference: mean of a - b.  Below six subjects p is None and "reason" says why; without any difference p is 1.
    """
    common = [s for s in a_by_subject if s in b_by_subject]
    pairs = np.array([(a_by_subject[s], b_by_subject[s]) for s in common]).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(1)]
    differences, n = pairs[:, 0] - pairs[:, 1], len(pairs)
    result = {"p": None, "difference": float(differences.mean()) if n else None, "n": n}
    if n < FEWEST:
        return {**result, "reason": f"n = {n} < {FEWEST}: no two-sided p below .05 exists"}
    ranked = differences[differences != 0]                      # Wilcoxon's own rule: a tie says nothing about the sign
    return {**result, "p": float(stats.wilcoxon(ranked).pvalue) if ranked.size else 1.0}


def holm(p_values):
    """Holm's step-down correction over the comparisons of one table; None (no test possible) stays None, uncounted."""
    order = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i])
    adjusted, largest = [None] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


# ---- trivial answers -------------------------------------------------------------------------------------------------


def mean_of_train(targets):
    """The mean of all training targets, (n, H, W) -> (H, W)."""
    return np.mean(targets, axis=0, dtype=np.float64)


def copy_source(train_sources, train_target):
    """The name of the source that is most like the target, by mean PSNR over the training slices.

    train_sources: {contrast: (n, H, W)}; train_target: (n, H, W).
    """
    def likeness(name):                                         # slice by slice: a training set in float64 may not fit
        images = train_sources[name]
        return _finite_mean(np.array([psnr(target, images[i], 1) for i, target in enumerate(train_target)]))
    return max(train_sources, key=likeness)


class IntensityLookup:
    """Expected target intensity given the source intensities of the same pixel: all one knows without looking around.

    Learned on training slices.  One source: 64 bins; two or three: a joint table of 16 bins each; more: 8 each.  Exact
    background (0) has a bin of its own.  A cell without a training pixel takes the value of the nearest filled one.
    """

    def __init__(self, train_sources, train_target):
        """train_sources: {contrast: (n, H, W)}; train_target: (n, H, W)."""
        self.names = list(train_sources)
        self.bins = {1: 64, 2: 16, 3: 16}.get(len(self.names), 8)
        shape = (self.bins + 1,) * len(self.names)
        total, count = np.zeros(shape).ravel(), np.zeros(shape).ravel()
        for i, target in enumerate(train_target):
            cells = self._cells({name: train_sources[name][i] for name in self.names})
            cells = np.ravel_multi_index(cells, shape).ravel()
            total += np.bincount(cells, np.asarray(target, np.float64).ravel(), total.size)
            count += np.bincount(cells, minlength=count.size)
        table = (total / np.maximum(count, 1)).reshape(shape)
        nearest = ndimage.distance_transform_edt(count.reshape(shape) == 0, return_distances=False, return_indices=True)
        self.table = table[tuple(nearest)].astype(np.float32)

    def _cells(self, sources):
        return tuple(np.ceil(np.clip(sources[name], 0, 1) * self.bins).astype(int) for name in self.names)

    def predict(self, sources):
        """{contrast: (n, H, W)} -> (n, H, W)"""
        return self.table[self._cells(sources)]


def baselines(train, sources, target):
    """What a method must beat: {"copy-source", "mean-of-train", "intensity-lookup"}, each (n, H, W).

    Learned on train, {contrast: (m, H, W)}, applied to sources, {contrast: (n, H, W)}; target: the contrast wanted.
    """
    seen, n = {name: train[name] for name in sources}, len(next(iter(sources.values())))
    mean = mean_of_train(train[target])
    return {"copy-source": sources[copy_source(seen, train[target])],
            "mean-of-train": np.broadcast_to(mean, (n, *mean.shape)),
            "intensity-lookup": IntensityLookup(seen, train[target]).predict(sources)}


# ---- table -----------------------------------------------------------------------------------------------------------


def markdown_table(rows, region="whole slice"):
    """Rows of score_table as a table method x task: PSNR in dB, mean ± std over subjects (n), mean SSIM, and Dice if there."""
    cells = {(_label(r), r["task"], r["metric"]): r for r in rows}
    tasks, methods = list(dict.fromkeys(r["task"] for r in rows)), list(dict.fromkeys(_label(r) for r in rows))
    counts = [r["n"] for r in rows if r["metric"] == "psnr"]
    dice = " / Dice, mean of the classes" if any(r["metric"] == "dice" for r in rows) else ""
    n = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    header = (f"PSNR in dB, mean ± std over subjects (n) / SSIM, mean{dice}.  Unit: subject, the mean of its slices; "
              f"n = {n}; {region}; range [0,1].")
    body = [["method", *tasks]] + [[m, *(_cell(*(cells.get((m, t, name)) for name in ("psnr", "ssim", "dice"))) for t in tasks)]
                                   for m in methods]
    if len(tasks) > 6:                                          # too wide to read: one line per task
        body = [list(line) for line in zip(*body)]
    body.insert(1, ["---"] * len(body[0]))
    lines = [header, "", *("| " + " | ".join(line) + " |" for line in body)]
    excluded = sum(r.get("excluded_slices", 0) for r in rows if r["metric"] == "psnr")
    if excluded:
        lines += ["", f"Left out of PSNR: {excluded} slice values that are infinite (identical images) or undefined."]
    return "\n".join(lines)


def _label(r):
    return r["method"] + (f" ({r['variant']})" if r.get("variant") else "")


def _cell(psnr_row, ssim_row, dice_row):
    left = right = "–"
    if psnr_row and psnr_row["n"]:
        spread = f" ± {psnr_row['std']:.2f}" if psnr_row["n"] > 1 else ""
        left = f"{psnr_row['mean']:.2f}{spread} ({psnr_row['n']})"
    if ssim_row and ssim_row["n"]:
        right = f"{ssim_row['mean']:.3f}"
    return f"{left} / {right}" + (f" / {dice_row['mean']:.3f}" if dice_row and dice_row["n"] else "")
