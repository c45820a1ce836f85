"""Does a confidence score predict the error?  Ranks, groups and sparsification.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

A model that draws K samples for each of n slices gives every sample a score.  A higher score shall
mean a smaller error.  There are two questions, and they must not be mixed:

    within slices     does the score find the better one of several samples of the same slice?
    across slices     does the score find the slices that are difficult?

Only the first one supports the selection of a sample.
"""
import json

import numpy as np
import scipy  # scipy.stats is imported when it is needed: it takes a second

import data
from common import metrics, pictures, table_pages
from common.files import replace

GROUPS = 5              # equal widths of the normalised score
WEAK = 0.2              # a mean rank correlation below this is called no prediction


def rank_correlation(score, error):
    """Spearman's correlation of the score with minus the error, a float.

    score, error: (n,).  1 means that the score orders the errors perfectly.  NaN if there are fewer
    than three values, or if one of the two is constant.
    """
    score = np.asarray(score, np.float64)
    error = np.asarray(error, np.float64)
    if len(score) < 3 or np.ptp(score) == 0 or np.ptp(error) == 0:
        return float("nan")
    return float(scipy.stats.spearmanr(score, -error).statistic)


def judge(score, error, subjects):
    """Rank correlations of a score with minus the error.

    score, error: (n, K) of K samples of n slices.  subjects: (n,) names.

    Returns a dict:
    within_slice      mean over slices, among the K samples of each; NaN if K < 3
    within_subject    mean over subjects, among the slices of each (means over the samples)
    across            of all slices together (means over the samples)
    """
    score = np.asarray(score, np.float64)
    error = np.asarray(error, np.float64)
    subjects = np.asarray(subjects)
    each = [rank_correlation(a, b) for a, b in zip(score, error)]
    of_subject = []
    for name in dict.fromkeys(subjects):
        own = subjects == name
        of_subject.append(rank_correlation(score[own].mean(1), error[own].mean(1)))
    return {"within_slice": finite_mean(each),
            "within_subject": finite_mean(of_subject),
            "across": rank_correlation(score.mean(1), error.mean(1))}


def finite_mean(values):
    """The mean of the finite values; NaN if there are none."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else float("nan")


def normalised(score, scope):
    """The score scaled to [0,1]: (n, K) -> (n, K).

    scope: "dataset" uses the smallest and largest of all scores, "slice" those of the K samples of
    each slice.  If all are equal, the result is 0.5.
    """
    score = np.asarray(score, np.float64)
    axis = None if scope == "dataset" else 1
    low = score.min(axis, keepdims=True)
    width = score.max(axis, keepdims=True) - low
    safe = np.where(width > 0, width, 1)
    return np.where(width > 0, (score - low) / safe, 0.5)


def groups(score, quality, scope):
    """The mean quality in five groups of equal width of the normalised score (RLBCD, Fig. 4).

    score, quality: (n, K).  scope: see `normalised`.  Returns (means (5,), counts (5,)); the mean
    of an empty group is NaN.
    """
    place = np.minimum((normalised(score, scope) * GROUPS).astype(int), GROUPS - 1)
    quality = np.asarray(quality, np.float64)
    means = [finite_mean(quality[place == group]) for group in range(GROUPS)]
    counts = [int((place == group).sum()) for group in range(GROUPS)]
    return np.array(means), np.array(counts)


def sparsification(score, error):
    """The mean error of what remains when the least trusted share is taken away.

    score, error: (n,).  Returns (shares (n,), by_score (n,), by_error (n,)).  shares[i] = i / n is
    taken away.  by_score takes away the lowest scores, and by_error the largest errors, which is
    the best that a score could do.  A score that knows nothing keeps the mean error.
    """
    score = np.asarray(score, np.float64)
    error = np.asarray(error, np.float64)
    n = len(score)

    def remaining(order):
        """order: best first.  The mean of the first n, n - 1, ..., 1 of them."""
        means = error[order].cumsum() / np.arange(1, n + 1)             # (n,)
        return means[::-1]
    return np.arange(n) / n, remaining(np.argsort(-score)), remaining(np.argsort(error))


def rules(samples, score, title, truth):
    """Ways to make one image of several samples, {name: (n, H, W)}.

    samples: (n, K, H, W).  score: (n, K), larger is better, or None.  title: what it is called.
    truth: (n, H, W), for the sample that is nearest to it, which nobody could choose in practice.

    The mean of many samples has about the least squared error possible, but it is blurred.
    Samples do not depend on each other, so the last one is as good as a random one.
    """
    each = np.arange(len(samples))
    nearest = ((samples - truth[:, None]) ** 2).mean((2, 3)).argmin(1)  # (n,)
    found = {"first sample": samples[:, 0], "random sample": samples[:, -1]}
    if score is not None:
        found[f"sample of best {title}"] = samples[each, score.argmax(1)]
    found["mean of samples"] = samples.mean(1)
    found["nearest sample"] = samples[each, nearest]
    return found


def verdict(found):
    """One sentence about what a score is good for.  found: what `judge` returns."""
    parts = []
    for key, what in (("within_slice", "the better one of several samples of a slice"),
                      ("across", "the slices with the smaller error")):
        value = found[key]
        if not np.isfinite(value):
            continue
        if value >= WEAK:
            parts.append(f"it tends to find {what} (rank correlation {value:.2f})")
        elif value > -WEAK:
            parts.append(f"it does not find {what} (rank correlation {value:.2f})")
        else:
            parts.append(f"it is misleading about {what} (rank correlation {value:.2f})")
    return "The score: " + "; ".join(parts) + "." if parts else "The score cannot be judged here."


def report(run, name, title, score, samples, truth, subjects, task, rules, sources, places):
    """Judge a score on samples of test slices.  Says what was found.

    Writes NAME.json, NAME.png, NAME-sparsification.png and NAME-places.png.

    title: what the score is called.  score: (n, K).  samples: (n, K, H, W) in [0,1].
    truth, sources: (n, H, W).  subjects: (n,) names.  task: its name, for the table of rules.
    rules: {name: (n, H, W)}, ways to come from the samples to one image.
    places: (n, H, W), 0 or more, where the first sample is thought to be wrong.

    The error of a sample is its mean absolute error, and its quality is its SSIM.
    """
    n, K = score.shape
    error = np.stack([metrics.mae(truth, samples[:, k]) for k in range(K)], axis=1)     # (n, K)
    quality = np.stack([metrics.ssim(truth, samples[:, k], 1) for k in range(K)], axis=1)
    found = judge(score, error, subjects)
    series = {}
    content = {"slices": n, "samples": K, "subjects": len(set(subjects)), **found}
    for scope in ("dataset", "slice"):
        means, counts = groups(score, quality, scope)
        series[f"{title} scaled per {scope}"] = ((np.arange(GROUPS) + 0.5) / GROUPS, means)
        content[f"ssim_per_{scope}"] = [float(mean) for mean in means]
        content[f"count_per_{scope}"] = counts.tolist()
    shares, by_score, by_error = sparsification(score.mean(1), error.mean(1))
    content["sparsification"] = {"share": shares.tolist(), "by_score": by_score.tolist(),
                                 "by_error": by_error.tolist()}
    # JSON has no NaN.
    text = json.dumps(content, indent=1).replace("NaN", "null")
    replace(run.out / f"{name}.json", lambda tmp: tmp.write_text(text, encoding="utf-8"))
    pictures.curves(run.out / f"{name}.png", series, f"normalised {title}", "SSIM",
                    f"quality of {n} x {K} samples in five groups of {title}")
    pictures.curves(run.out / f"{name}-sparsification.png",
                    {title: (shares, by_score), "best possible": (shares, by_error),
                     "no knowledge": (shares, np.full(n, error.mean()))},
                    "share of slices taken away", "mean absolute error of the others",
                    f"slices of low {title} are taken away first")
    run.say(f"{n} slices of {content['subjects']} subjects, {K} samples each.  Rank correlation of "
            f"{title} with minus the error: within slices {found['within_slice']:.2f}, within "
            f"subjects {found['within_subject']:.2f}, over all slices {found['across']:.2f}.")
    run.say(verdict(found))
    run.say(table_pages.markdown_table(metrics.score_table(task, rules, truth, subjects)))
    drawn = []
    labels = []
    most = np.percentile(places, 99)
    for i in data.evenly(np.arange(n), 4):
        wrong = pictures.error_map(truth[i], samples[i, 0])
        drawn.append([sources[i], samples[i, 0], truth[i], wrong, places[i] / most])
        labels.append(str(subjects[i]))
    pictures.grid(run.out / f"{name}-places.png", drawn,
                  ["source", "first sample", "truth", "error", title], labels,
                  note=f"error: |truth - sample|, white from 0.3 on; {title}: bright where the "
                       "score says that the sample is wrong")
    run.say(f"written: {run.out / name}.json, .png, -sparsification.png, -places.png")
