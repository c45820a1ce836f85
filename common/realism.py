"""How realistic and how varied images are, when no image is the one right answer.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

Many images fit one report.  A made image is then not compared with one truth, but a set of made
images with a set of real ones:

    frechet_distance(features(real), features(made))    # 0 if mean and covariance are the same
    kernel_distance(features(real), features(made))     # the same question, better for few images
    diversity(made_for_one_prompt)                      # lower means more varied
    niqe(made, niqe_statistics(real))                   # lower means closer to the real texture

FID is the Frechet distance of the features of Inception-v3.  With other features the number has
another scale, and another name.  Print beside it which features were used, and the distance
between two sets of real images, which is the lowest that can be expected.

Images lie in [0,1], and the arithmetic is float64.
"""
import itertools
from collections import namedtuple

import numpy as np
from scipy import ndimage, special

from common.metrics import ROUNDING, checked_images, in_unit_range, ssim_maps

SCALE_WEIGHTS = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])     # Wang et al. 2003, Sec. 4
POOLED = 8                                      # pooled_pixels makes images of 8x8 pixels
SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))      # NIQE: the neighbours in four directions
FLAT = 1e-12                                    # NIQE: a patch of lower variance has no texture

NiqeStatistics = namedtuple("NiqeStatistics", "mean covariance patch")
# mean: (36,).  covariance: (36, 36).  patch: the side of a patch in pixels.


# ---- MS-SSIM -------------------------------------------------------------------------------------


def ms_ssim(truth, image, data_range=1):
    """Multi-scale structural similarity, a fraction (Wang et al. 2003).  (..., H, W) -> (...)

    data_range: the constant width of the intensity scale, 1 for [0,1]; never an image's maximum.

    Contrast and structure count at every scale, and luminance at the coarsest one only.  Each scale
    halves the image.  A negative similarity counts as 0.  Five scales need 176 pixels.  A smaller
    image has fewer scales, see scales_of, and the first weights are then divided by their sum.

    Raises ValueError if a side has fewer than 11 pixels, if the shapes differ, if a pixel is not
    finite, or if the intensities span more than data_range.
    """
    truth, image, _ = checked_images(truth, image, None)
    low = min(truth.min(), image.min())
    high = max(truth.max(), image.max())
    if high - low > data_range * (1 + 2 * ROUNDING):
        raise ValueError(f"ms_ssim: the images reach from {low:g} to {high:g}, which is wider than "
                         f"the data range {data_range:g}; bring both to [0,1]")
    count = scales_of(*truth.shape[-2:])
    weights = SCALE_WEIGHTS[:count]
    if count < len(SCALE_WEIGHTS):
        # the five weights are used as they are printed; their sum is 1.0001
        weights = weights / weights.sum()
    values = np.empty(truth.shape[:-2])
    for at in np.ndindex(values.shape):
        values[at] = np.prod(_similarities(truth[at], image[at], data_range, count) ** weights)
    return values[()]


def scales_of(height, width):
    """How many scales MS-SSIM has for images of this size, 1 to 5.

    The coarsest image must still hold a window of 11x11 pixels.  Values with different numbers of
    scales cannot be compared.  Raises ValueError if a side has fewer than 11 pixels.
    """
    side = min(height, width)
    if side < 11:
        raise ValueError(f"ms_ssim: the images are {(height, width)}, smaller than the 11x11 "
                         f"window; use larger images")
    count = 1
    while count < len(SCALE_WEIGHTS) and side >= 11 * 2 ** count:
        count += 1
    return count


def _similarities(truth, image, data_range, count):
    """The similarity at each scale, from fine to coarse.  (H, W) -> (count,), none below 0"""
    found = []
    for scale in range(count):
        luminance, similarity = ssim_maps(truth, image, data_range, "gauss")
        if scale == count - 1:
            similarity = luminance * similarity
        found.append(similarity[5:-5, 5:-5].mean())
        truth = _halved(truth)
        image = _halved(image)
    return np.maximum(found, 0)


def _halved(image):
    """The means of 2x2 pixels.  An odd last row or column is left out.  (H, W) -> (H/2, W/2)"""
    height, width = (side // 2 for side in image.shape)
    blocks = image[:2 * height, :2 * width].reshape(height, 2, width, 2)
    return blocks.mean((1, 3))


def diversity(images):
    """How alike the images of one prompt are: the mean MS-SSIM over all pairs, a float.

    images: (n, H, W) in [0,1], several samples of one and the same prompt.

    Lower means more varied.  Neither end is good by itself: noise is varied too.  Print the same
    number for random pairs of real images beside it.

    Raises ValueError if there are fewer than two images, if they lie outside of [0,1], or as
    ms_ssim.
    """
    images = _checked_stack("diversity", images)
    if len(images) < 2:
        raise ValueError("diversity: there is one image, which has no pair; make at least two of "
                         "each prompt")
    return float(np.mean([ms_ssim(a, b) for a, b in itertools.combinations(images, 2)]))


# ---- distances between sets ----------------------------------------------------------------------


def frechet_distance(x, y):
    """The squared Frechet distance between two Gaussians that are fitted to features, a float.

    |mu_x - mu_y|^2 + tr(S_x) + tr(S_y) - 2 tr((S_x S_y)^(1/2))

    x: (n, d) and y: (m, d), features of two sets of images, one image per row.  S is the covariance
    with divisor n - 1.

    The distance is too large if n is small, see sample_note.  Compare only numbers of the same n,
    m and features.

    Raises ValueError if the shapes do not fit, if a number is not finite, or if a set has fewer
    than two rows.
    """
    x, y = _checked_features("frechet_distance", x, y)
    shift = x.mean(0) - y.mean(0)                           # (d,)
    root_x = _root(x)                                       # (<= d, d), root_x^T root_x = S_x
    root_y = _root(y)
    # The eigenvalues of S_x S_y are the squared singular values of root_x root_y^T.  So we need no
    # square root of a matrix, and the result is real also if a covariance is singular.
    common = np.linalg.svd(root_x @ root_y.T, compute_uv=False).sum()
    return float((shift ** 2).sum() + (root_x ** 2).sum() + (root_y ** 2).sum() - 2 * common)


def _root(x):
    """A matrix R with R^T R = the covariance of the features x.  (n, d) -> (min(n, d), d)"""
    return np.linalg.qr(x - x.mean(0), mode="r") / np.sqrt(len(x) - 1)


def sample_note(x, y):
    """A sentence if there are too few images for frechet_distance, else None.

    x: (n, d).  y: (m, d).  We warn below 2 d images on either side.
    """
    fewest = min(len(x), len(y))
    d = np.shape(x)[1]
    if fewest >= 2 * d:
        return None
    return (f"{fewest} images for {d} features, fewer than twice as many: the Frechet distance is "
            f"too large; see the kernel distance too")


def kernel_distance(x, y):
    """The kernel distance (KID, Binkowski et al. 2018) of features (n, d) and (m, d), a float.

    It is the squared maximum mean discrepancy with the kernel (a . b / d + 1)^3.  It is unbiased:
    its mean over many draws is right also for few images.  It may therefore be slightly negative.
    Usually 1,000 times the value is printed.

    All pairs are used, which takes n m numbers of memory.  Errors: as of frechet_distance.
    """
    x, y = _checked_features("kernel_distance", x, y)
    within = _mean_of_pairs(_kernel(x, x)) + _mean_of_pairs(_kernel(y, y))
    return float(within - 2 * _kernel(x, y).mean())


def _kernel(x, y):
    """(n, d) and (m, d) -> (n, m)"""
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_pairs(kernel):
    """The mean of a matrix (n, n) without its diagonal, where an image meets itself."""
    n = len(kernel)
    return (kernel.sum() - np.trace(kernel)) / (n * (n - 1))


def pooled_pixels(images):
    """The simplest features: the image, averaged to 8x8 pixels.  (n, H, W) in [0,1] -> (n, 64)

    The Frechet distance of these features sees only the coarse layout, but needs no network.

    Raises ValueError if H or W is not divisible by 8, if a pixel is not finite, or if an image lies
    outside of [0,1].
    """
    images = _checked_stack("pooled_pixels", images)
    n, height, width = images.shape
    if height % POOLED or width % POOLED:
        raise ValueError(f"pooled_pixels: the images are {(height, width)}; crop or resample them "
                         f"until both sides are divisible by {POOLED}")
    blocks = images.reshape(n, POOLED, height // POOLED, POOLED, width // POOLED)
    return blocks.mean((2, 4)).reshape(n, POOLED ** 2)


# ---- NIQE ----------------------------------------------------------------------------------------


def niqe_features(image, patch):
    """The 36 features of each patch that has texture (Mittal et al. 2013, Sec. II).

    image: (H, W) in [0,1].  patch: the side of a square patch in pixels, an even number.  What is
    left over right and below is not used.

    Returns features (n, 36) and the sharpness of each patch (n,), the mean of its local standard
    deviation.  A patch of constant intensity has no texture and is left out, so n may be 0.

    Raises ValueError if no patch fits, if a pixel is not finite, or if the image lies outside of
    [0,1].
    """
    image = _checked_stack("niqe", np.asarray(image)[None])[0]
    rows, columns = (side // patch for side in image.shape)
    if rows == 0 or columns == 0 or patch % 2:
        raise ValueError(f"niqe: no patch of {patch} pixels fits into an image of {image.shape}; "
                         f"choose a smaller even number")
    image = 255 * image[:rows * patch, :columns * patch]
    fine, sharpness = _scale_features(image, patch)
    coarse, _ = _scale_features(_halved(image), patch // 2)
    features = np.concatenate([fine, coarse], axis=1)       # (rows * columns, 36)
    textured = np.isfinite(features).all(1)
    return features[textured], sharpness[textured]


def _scale_features(image, patch):
    """The 18 features of one scale and the sharpness.  (H, W) in [0,255] -> (n, 18) and (n,)

    The features of a patch without texture are NaN.
    """
    normalised, deviation = _contrast_normalised(image)
    blocks = _patches(normalised, patch)                    # (n, patch, patch)
    alpha, left, right = _fit(blocks)                       # 3 times (n,)
    features = [alpha, (left + right) / 2]
    for shift in SHIFTS:
        neighbours = np.roll(blocks, shift, axis=(1, 2))    # circular within the patch
        alpha, left, right = _fit(blocks * neighbours)
        mean = (right - left) * special.gamma(2 / alpha) / special.gamma(1 / alpha)
        features += [alpha, mean, left, right]
    return np.stack(features, axis=1), _patches(deviation, patch).mean((1, 2))


def _contrast_normalised(image):
    """(I - mu) / (sigma + 1) and sigma, with the local mean and deviation.  (H, W) -> 2 x (H, W)

    The 1 keeps flat parts flat.  It assumes intensities of 0 to 255.
    """
    maps = np.stack([image, image ** 2])
    mean, square = ndimage.gaussian_filter(maps, (0, 7 / 6, 7 / 6), mode="nearest",
                                           radius=(0, 3, 3))
    deviation = np.sqrt(np.abs(square - mean ** 2))         # rounding may make it negative
    return (image - mean) / (deviation + 1), deviation


def _patches(image, patch):
    """The squares of an image whose sides are multiples of patch.  (H, W) -> (n, patch, patch)"""
    height, width = image.shape
    squares = image.reshape(height // patch, patch, width // patch, patch)
    return squares.swapaxes(1, 2).reshape(-1, patch, patch)


def _fit(blocks):
    """Fit an asymmetric generalised Gaussian to the values of each block, by its moments.

    (n, h, w) -> alpha (the shape; 2 is a Gaussian), beta_l and beta_r (the scales of the negative
    and of the positive values), each (n,).  All are NaN if a block is flat or has one sign only.
    """
    squares = blocks ** 2
    negative = blocks < 0
    positive = blocks > 0
    with np.errstate(invalid="ignore"):                     # one sign only: 0 / 0 is NaN
        left = np.sqrt(squares.sum((1, 2), where=negative) / negative.sum((1, 2)))
        right = np.sqrt(squares.sum((1, 2), where=positive) / positive.sum((1, 2)))
        balance = left / right
        ratio = np.abs(blocks).mean((1, 2)) ** 2 / squares.mean((1, 2))
    ratio = ratio * (balance ** 3 + 1) * (balance + 1) / (balance ** 2 + 1) ** 2
    flat = squares.mean((1, 2)) < FLAT
    shapes = np.arange(200, 10001) / 1000
    ratios = special.gamma(2 / shapes) ** 2 / (special.gamma(1 / shapes)
                                               * special.gamma(3 / shapes))
    alpha = shapes[np.abs(ratios - ratio[:, None]).argmin(1)]
    alpha = np.where(flat | ~np.isfinite(ratio), np.nan, alpha)
    unit = np.sqrt(special.gamma(1 / alpha) / special.gamma(3 / alpha))
    return alpha, left * unit, right * unit


def niqe_statistics(images, patch=None, sharpest=0.75):
    """What real texture looks like: mean and covariance of the features of real patches.

    images    (n, H, W) in [0,1], real images of one modality, of training subjects only
    patch     its side in pixels; None means 96, or 32 if an image has fewer than 192 pixels
    sharpest  a patch counts if its sharpness is at least this share of the image's best

    Returns NiqeStatistics.  The paper takes its statistics from photographs, which tell nothing
    about medical images.  For a comparison, a user may put them into a NiqeStatistics.

    Raises ValueError as niqe_features, and if there are too few patches with texture.
    """
    images = _checked_stack("niqe_statistics", images)
    if patch is None:
        patch = 96 if min(images.shape[1:]) >= 192 else 32
    chosen = []
    for image in images:
        features, sharpness = niqe_features(image, patch)
        best = sharpness.max(initial=0)
        chosen.append(features[sharpness >= sharpest * best])
    features = np.concatenate(chosen)                       # (patches, 36)
    if len(features) <= features.shape[1]:
        raise ValueError(f"niqe_statistics: {len(features)} patches with texture cannot give a "
                         f"covariance of {features.shape[1]} features; give more images or a "
                         f"smaller patch than {patch} pixels")
    return NiqeStatistics(features.mean(0), np.cov(features, rowvar=False), patch)


def niqe(images, statistics):
    """How far the texture of images is from real texture.  (n, H, W) in [0,1] -> (n,)

    statistics: of niqe_statistics.  Lower is better.  Values of different statistics or sizes of
    images cannot be compared.  An image with fewer than two patches with texture gives NaN.

    Raises ValueError as niqe_features.
    """
    images = _checked_stack("niqe", images)
    values = np.full(len(images), np.nan)
    for i, image in enumerate(images):
        features, _ = niqe_features(image, statistics.patch)
        if len(features) < 2:
            continue
        shift = features.mean(0) - statistics.mean
        covariance = (statistics.covariance + np.cov(features, rowvar=False)) / 2
        # an image of few patches may leave the covariance singular: hence the pseudo-inverse
        values[i] = np.sqrt(shift @ np.linalg.pinv(covariance) @ shift)
    return values


# ---- checks --------------------------------------------------------------------------------------


def _checked_stack(caller, images):
    """The images (n, H, W) as float64, checked to be finite and in [0,1]."""
    images = np.asarray(images, np.float64)
    if images.ndim != 3 or 0 in images.shape:
        raise ValueError(f"{caller}: the images are {images.shape}; give (n, H, W)")
    checked_images(images, images, None)
    return in_unit_range("image", images)


def _checked_features(caller, x, y):
    """The features (n, d) and (m, d) as float64, checked to be finite and at least two each."""
    x = np.asarray(x, np.float64)
    y = np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1:] != y.shape[1:] or min(len(x), len(y)) < 2:
        raise ValueError(f"{caller}: the features are {x.shape} and {y.shape}; give (n, d) and "
                         f"(m, d), at least two rows each")
    for name, features in (("first", x), ("second", y)):
        if not np.isfinite(features).all():
            raise ValueError(f"{caller}: the {name} features are not finite: see if the network "
                             f"or its input diverged")
    return x, y
