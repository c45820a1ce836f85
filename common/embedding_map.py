"""Do embeddings of different kinds form groups?  A map of them, and two numbers beside the map.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

    xy = tsne(embeddings)                               # (n, d) -> (n, 2)
    note = f"silhouette {silhouette(embeddings, labels):.2f}, " \\
           f"purity {neighbour_purity(embeddings, labels):.2f}"
    draw_map("tsne.png", xy, labels, "Embeddings by modality", note)

t-SNE keeps neighbours and nothing else.  Sizes of groups, and distances between groups, mean
nothing in its map.  It may also show groups where there are none.  Both numbers are therefore taken
from the embeddings and not from the map.
"""
import numpy as np
from scipy.spatial.distance import cdist

from common import pictures

EARLY = 250             # steps of t-SNE in which neighbours attract each other more strongly
EXAGGERATION = 12       # ... by this factor


# ---- maps ----------------------------------------------------------------------------------------


def pca(x, dims):
    """Project on the directions of the largest variance.  (n, d) -> (n, dims)

    The sign of a direction is free.  We choose it so that its largest entry is positive.

    Raises ValueError if x is not (n, d) of finite numbers, or if dims is larger than n or d.
    """
    x = _checked("pca", x)
    if not 1 <= dims <= min(x.shape):
        raise ValueError(f"pca: {x.shape[0]} rows of {x.shape[1]} numbers have no {dims} "
                         f"directions; choose 1 to {min(x.shape)}")
    centred = x - x.mean(0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:dims]  # (dims, d)
    largest = np.abs(directions).argmax(1)
    signs = np.sign(directions[np.arange(dims), largest])               # (dims,)
    return centred @ (signs[:, None] * directions).T


def tsne(x, perplexity=30, steps=1000):
    """t-SNE (van der Maaten and Hinton 2008), exact.  (n, d) -> (n, 2)

    perplexity: about how many neighbours each point has.

    The start is the PCA, so there are no random numbers.  Memory and time grow with n^2: 2,000
    points take about a minute.  Take a sample of more points.

    Raises ValueError if x is not (n, d) of finite numbers, d at least 2, if all rows are the same,
    or if perplexity is not between 1 and n - 1.
    """
    p = joint_probabilities(x, perplexity)                  # (n, n)
    y = pca(x, 2)
    y = 1e-4 * y / y[:, 0].std()
    rate = max(len(y) / EXAGGERATION / 4, 50)
    velocity = np.zeros_like(y)
    gains = np.ones_like(y)
    for step in range(steps):
        if step < EARLY:
            gradient = _gradient(EXAGGERATION * p, y)
            momentum = 0.5
        else:
            gradient = _gradient(p, y)
            momentum = 0.8
        # A coordinate that keeps its direction gets faster; one that swings gets slower.
        steady = velocity * gradient < 0
        gains = np.maximum(np.where(steady, gains + 0.2, gains * 0.8), 0.01)
        velocity = momentum * velocity - rate * gains * gradient
        y = y + velocity
    return y


def joint_probabilities(x, perplexity):
    """The probability that t-SNE gives to each pair of points, Eq. (1) and Sec. 3.1.

    Returns (n, n), symmetric, with the sum 1.  Row i is a Gaussian around point i; its width is
    found by bisection, so that its entropy is log(perplexity).  Errors: as of tsne.
    """
    x = _checked("tsne", x)
    n = len(x)
    if not 1 <= perplexity <= n - 1:
        raise ValueError(f"tsne: the perplexity {perplexity} is not between 1 and {n - 1} for {n} "
                         f"points; choose a smaller perplexity")
    distances = cdist(x, x, "sqeuclidean")                  # (n, n)
    if not distances.any():
        raise ValueError("tsne: all points are the same; there is nothing to map")
    # Subtracting the smallest distance of a row changes no probability, and the largest weight is
    # then 1.  A point is not its own neighbour: its weight is set to 0 below.
    others = np.where(np.eye(n, dtype=bool), np.inf, distances)
    distances = np.maximum(distances - others.min(1, keepdims=True), 0)
    low = np.zeros(n)
    high = np.full(n, np.inf)
    precision = 1 / np.maximum(distances.mean(1), distances.mean() * 1e-6)      # (n,) 1 / 2 sigma^2
    for _ in range(100):
        weights = np.exp(-precision[:, None] * distances)
        np.fill_diagonal(weights, 0)
        total = weights.sum(1)                              # (n,)
        p = weights / total[:, None]
        entropy = np.log(total) + precision * (p * distances).sum(1)
        excess = entropy - np.log(perplexity)
        if np.abs(excess).max() < 1e-5:
            break
        # too much entropy: the Gaussian must become narrower, the precision larger
        low = np.where(excess > 0, precision, low)
        high = np.where(excess > 0, high, precision)
        precision = np.where(np.isinf(high), 2 * precision, (low + high) / 2)
    return (p + p.T) / (2 * n)


def _gradient(p, y):
    """The gradient of the divergence KL(p || q) with respect to the map y (n, 2), Eq. (5)."""
    weights = 1 / (1 + cdist(y, y, "sqeuclidean"))          # (n, n) Student's t, one degree
    np.fill_diagonal(weights, 0)
    force = (p - weights / weights.sum()) * weights
    # sum over j of force_ij (y_i - y_j)
    return 4 * (force.sum(1, keepdims=True) * y - force @ y)


# ---- numbers -------------------------------------------------------------------------------------


def silhouette(x, labels):
    """How well the labels separate the points, in [-1,1]: the mean of (b - a) / max(a, b).

    x: (n, d).  labels: (n,) text or integers.

    a is a point's mean Euclidean distance to the others of its label.  b is its mean distance to
    the points of another label, the closest one.  A point that is alone with its label counts 0.

    Raises ValueError if x is not (n, d) of finite numbers, if there is not one label per point, or
    if there is only one label.
    """
    x, labels = _checked_labels("silhouette", x, labels)
    kinds, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(kinds) < 2:
        raise ValueError(f"silhouette: all points have the label {kinds[0]}; give at least two "
                         f"labels")
    member = np.eye(len(kinds))[places]                     # (n, K) 1 at the own label
    sums = cdist(x, x) @ member                             # (n, K)
    rows = np.arange(len(x))
    own = counts[places]                                    # (n,)
    a = sums[rows, places] / np.maximum(own - 1, 1)         # a point is no neighbour of itself
    means = sums / counts
    means[rows, places] = np.inf
    b = means.min(1)
    larger = np.maximum(a, b)
    values = np.divide(b - a, larger, out=np.zeros(len(x)), where=(own > 1) & (larger > 0))
    return float(values.mean())


def neighbour_purity(x, labels, k=10):
    """The share of the k nearest neighbours that have a point's own label, in [0,1].

    x: (n, d).  labels: (n,) text or integers.  The mean is over all points.  Without any grouping
    it is about the sum of the squared shares of the labels.

    Raises ValueError as silhouette, or if there are no k neighbours.
    """
    x, labels = _checked_labels("neighbour_purity", x, labels)
    if not 1 <= k < len(x):
        raise ValueError(f"neighbour_purity: {len(x)} points have no {k} neighbours each; choose k "
                         f"from 1 to {len(x) - 1}")
    distances = cdist(x, x)
    np.fill_diagonal(distances, np.inf)                     # a point is no neighbour of itself
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :k]       # (n, k)
    return float((labels[nearest] == labels[:, None]).mean())


# ---- picture -------------------------------------------------------------------------------------


def draw_map(path, xy, labels, title="", note=None):
    """Write a map (n, 2) as a PNG file, with one colour per label.  title, note: text, or nothing.

    Raises ValueError if xy is not (n, 2) of finite numbers, or if there is not one label per point.
    """
    xy, labels = _checked_labels("draw_map", xy, labels)
    # in a random order, so that no label covers the others
    order = np.random.default_rng(0).permutation(len(xy))
    pictures.scatter(path, xy[order], labels[order], title, note)


def _checked(caller, x):
    """The points as float64 (n, d), checked to be finite."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or 0 in x.shape or not np.isfinite(x).all():
        raise ValueError(f"{caller}: the points are {x.shape}; give (n, d) of finite numbers")
    return x


def _checked_labels(caller, x, labels):
    """The points as float64 (n, d) and the labels as an array of str (n,), checked."""
    x = _checked(caller, x)
    labels = np.asarray(labels).astype(str)
    if labels.shape != x.shape[:1]:
        raise ValueError(f"{caller}: {len(x)} points have labels of shape {labels.shape}; give one "
                         f"label per point")
    return x, labels
