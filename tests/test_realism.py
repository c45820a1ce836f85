"""common/realism.py against stored numbers of pytorch-msssim, pytorch-fid and BasicSR, closed forms, and numbers by hand."""
import itertools

import numpy as np
import pytest
from scipy import ndimage

from common import realism as R


def picture(height, width, phase=0.0):
    i, j = np.mgrid[:height, :width].astype(float)
    return 0.5 + 0.25 * np.sin(0.31 * i + 0.07 * j + phase) + 0.2 * np.cos(0.17 * j - 0.05 * i + 2 * phase)


def disturbed(height, width):
    i, j = np.mgrid[:height, :width].astype(float)
    return np.clip(picture(height, width) + 0.05 * np.sin(1.3 * i) * np.cos(0.9 * j) + 0.02, 0, 1)


def features(n, d, phase):
    n, k = np.mgrid[:n, :d].astype(float)
    return np.sin(0.7 * n * (k + 1) + phase) + 0.3 * np.cos(1.9 * n + k * phase) + 0.05 * phase * k


X, Y = features(200, 8, 0.2), features(180, 8, 0.9)


def close(value, rel=1e-6):
    return pytest.approx(value, rel=rel, abs=1e-12)


# ---- MS-SSIM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, expected", [(256, 0.9956094143681508), (64, 0.9928138188846418)])
def test_ms_ssim_equals_pytorch_msssim(size, expected):
    assert R.ms_ssim(picture(size, size), disturbed(size, size)) == close(expected)


def test_ms_ssim_of_176_pixels_has_five_scales_with_the_printed_weights():
    value = R.ms_ssim(picture(176, 176), picture(176, 176, 0.4))
    assert value == close(0.8267773635841774)                               # pytorch-msssim
    # a factor that is the same at all scales would get the power 1.0001; here the difference is 2e-5
    assert value != close(0.8267773635841774 ** (1 / 1.0001))


def test_the_number_of_scales():
    sizes = {11: 1, 21: 1, 22: 2, 43: 2, 44: 3, 64: 3, 87: 3, 88: 4, 175: 4, 176: 5, 352: 5, 2000: 5}
    assert {side: R.scales_of(side, 4000) for side in sizes} == sizes == {side: R.scales_of(4000, side) for side in sizes}
    with pytest.raises(ValueError, match=r"\(10, 40\), smaller than the 11x11"):
        R.ms_ssim(picture(10, 40), picture(10, 40))


def test_ms_ssim_of_constants_is_the_luminance_of_the_coarsest_scale():
    # contrast is 1 at all scales; luminance .8000639795 counts at the last one, with a third of 44 pixels' weights
    weight = 0.3001 / (0.0448 + 0.2856 + 0.3001)
    assert R.ms_ssim(np.full((44, 50), 0.5), np.full((44, 50), 0.25)) == close(0.8000639795265516 ** weight)
    assert R.ms_ssim(np.full((176, 180), 0.5), np.full((176, 180), 0.25)) == close(0.8000639795265516 ** 0.1333)


def test_ms_ssim_keeps_leading_axes_and_the_scale_does_not_matter():
    pair = np.stack([picture(50, 64), disturbed(50, 64)])
    values = R.ms_ssim(np.stack([pair[0], pair[1]]), np.stack([pair[1], pair[1]]))
    assert values.tolist() == [R.ms_ssim(*pair), 1] and R.ms_ssim(pair[:, None], pair[:, None]).shape == (2, 1)
    assert R.ms_ssim(*(255 * pair), 255) == close(R.ms_ssim(*pair))
    assert R.ms_ssim(*pair) == close(R.ms_ssim(pair[0].T, pair[1].T))
    assert R.ms_ssim(picture(64, 64), -picture(64, 64) + 1) == 0             # a negative similarity counts as 0


def test_an_odd_row_or_column_is_left_out():
    a, b = picture(47, 45), disturbed(47, 45)
    assert R._halved(np.arange(15.0).reshape(3, 5)).tolist() == [[3.0, 5.0]]
    changed = b.copy()
    changed[46] = 0                                                         # row 46 has no partner at the second scale
    fine = [R._similarities(a, image, 1, 3)[0] for image in (b, changed)]
    assert R._similarities(a, changed, 1, 3)[1:] == close(R._similarities(a, b, 1, 3)[1:]) and fine[0] != fine[1]


def test_what_ms_ssim_refuses():
    a = picture(64, 64)
    with pytest.raises(ValueError, match="from -0.897096 to 0.899636, which is wider than the data range 1"):
        R.ms_ssim(2 * a - 1, 2 * a - 1)
    assert R.ms_ssim(2 * a - 1, 2 * a - 1, 2) == 1
    with pytest.raises(ValueError, match="one shape"):
        R.ms_ssim(a, a[:60])
    with pytest.raises(ValueError, match="image is not finite"):
        R.ms_ssim(a, np.where(a > 0.5, np.nan, a))


def test_diversity_is_the_mean_over_all_pairs():
    images = np.stack([picture(64, 64, phase) for phase in (0, 0.4, 0.9, 1.7)])
    pairs = [R.ms_ssim(a, b) for a, b in itertools.combinations(images, 2)]
    by_pair = {(0, 1): 0.849939, (0, 2): 0.380264, (0, 3): 0, (1, 2): 0.772815, (1, 3): 0, (2, 3): 0.494874}
    assert pairs == pytest.approx(list(by_pair.values()), abs=1e-6)
    assert R.diversity(images) == close(0.4163153216512811)                 # the zeros count too
    assert R.diversity(images[[0, 0, 0]]) == 1
    for bad, reason in ((images[:1], "one image"), (2 * images - 1, r"\(x \+ 1\) / 2"), (images[0], r"give \(n, H, W\)")):
        with pytest.raises(ValueError, match=reason):
            R.diversity(bad)


# ---- distances between sets ------------------------------------------------------------------------------------------


def test_frechet_distance_equals_pytorch_fid():
    assert R.frechet_distance(X, Y) == close(0.3553849111585343)
    assert R.frechet_distance(Y, X) == close(0.3553849111585343)
    assert abs(R.frechet_distance(X, X)) < 1e-9
    # fewer images than features
    assert R.frechet_distance(features(20, 32, 0.2), features(20, 32, 0.9)) == close(24.46672309972623)


def test_frechet_distance_in_closed_form():
    g = np.random.default_rng(0)
    x = g.normal(size=(50, 5))
    x = 7 * np.linalg.qr(x - x.mean(0))[0]                                  # mean 0, covariance I with the divisor 49
    assert np.cov(x.T) == pytest.approx(np.eye(5), abs=1e-12)
    assert R.frechet_distance(x, 1 + 2 * x) == close(10)                    # 5 of the means, 5 (1 + 4 - 2 * 2) of the spread
    assert R.frechet_distance(x, x + [3, 0, 0, 4, 0]) == close(25)
    assert R.frechet_distance(x, x * [1, 1, 1, 1, 0]) == close(1)           # a singular covariance
    turned = np.array([[0.6, 0.8], [-0.8, 0.6]])
    flat = x[:, :2] * [2, 1]
    # S_x = diag(4, 1), S_y the same turned: tr (S_x S_y)^(1/2) = sqrt(tr S_x S_y + 2 det S_x), by Cayley and Hamilton
    trace = np.trace(np.diag([4, 1]) @ turned.T @ np.diag([4, 1]) @ turned)
    assert R.frechet_distance(flat, flat @ turned) == close(10 - 2 * np.sqrt(trace + 2 * 4))


def test_noise_is_further_from_real_than_real_is():
    g = np.random.default_rng(1)
    real = R.pooled_pixels(np.stack([picture(64, 64, p) for p in g.uniform(0, 6, 60)]))
    other = R.pooled_pixels(np.stack([picture(64, 64, p) for p in g.uniform(0, 6, 60)]))
    noise = R.pooled_pixels(g.random((60, 64, 64)))
    assert R.frechet_distance(real, noise) > 5 * R.frechet_distance(real, other)


def test_a_note_says_when_there_are_too_few_images():
    assert R.sample_note(X[:16], Y[:16]) is None
    assert R.sample_note(X[:15], Y).startswith("15 images for 8 features")
    assert R.sample_note(X, Y[:15]).startswith("15 images for 8 features")


def test_kernel_distance_equals_stored_numbers():
    assert R.kernel_distance(X, Y) == close(0.0643408858455583)
    assert R.kernel_distance(X[:180], Y) == close(0.07239694033108135)


def test_kernel_distance_by_hand_and_unbiased():
    # kernel (a b / 1 + 1)^3: within 1 and 8; between 1, 8 (for 0) and 1, 27 (for 1)
    assert R.kernel_distance([[0], [1]], [[1], [2]]) == close(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)
    g = np.random.default_rng(2)
    values = [R.kernel_distance(g.normal(size=(8, 3)), g.normal(size=(12, 3))) for _ in range(2000)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(2000) and min(values) < 0
    assert R.kernel_distance(g.normal(size=(80, 3)), g.normal(size=(80, 3)) + 1) > 5 * np.std(values)


@pytest.mark.parametrize("distance", [R.frechet_distance, R.kernel_distance], ids=["frechet", "kernel"])
def test_features_that_do_not_fit_are_refused(distance):
    for x, y in ((X, Y[:, :7]), (X[0], Y), (X[:1], Y), (X, Y[:1])):
        with pytest.raises(ValueError, match="at least two rows"):
            distance(x, y)
    damaged = Y.copy()
    damaged[3, 2] = np.nan
    with pytest.raises(ValueError, match="second features are not finite"):
        distance(X, damaged)
    with pytest.raises(ValueError, match="first features are not finite"):
        distance(damaged, X)


def test_pooled_pixels():
    image = np.zeros((1, 16, 24))
    image[0, 2:4, 15:18] = 0.6                                              # cell (1, 5) is rows 2, 3 and columns 15 to 17
    pooled = R.pooled_pixels(image).reshape(8, 8)
    assert pooled[1, 5] == close(0.6) and pooled.sum() == close(0.6)
    image[0, 0, 0] = 1
    assert R.pooled_pixels(image)[0, 0] == close(1 / 6)                     # a cell has six pixels
    assert R.pooled_pixels(np.zeros((5, 8, 8))).shape == (5, 64)
    for bad, reason in ((image[:, :15], "divisible by 8"), (image * 255, "divide an image"), (image[0], r"\(n, H, W\)"),
                        (image[:, :, :20], "divisible by 8"), (image * np.nan, "not finite")):
        with pytest.raises(ValueError, match=reason):
            R.pooled_pixels(bad)


# ---- NIQE ------------------------------------------------------------------------------------------------------------


def test_features_of_a_block_equal_basicsr(monkeypatch):
    i, j = np.mgrid[:96, :96].astype(float)
    block = np.sin(0.9 * i + 0.3 * j) * np.cos(1.7 * j) + 0.3 * np.sin(3.1 * i * j / 96)
    assert np.concatenate(R._fit(block[None])) == pytest.approx([2.647, 0.857186, 0.867039], abs=1e-6)
    monkeypatch.setattr(R, "_contrast_normalised", lambda image: (image, image))
    found, mean = R._scale_features(block, 96)
    expected = [2.647, .862113, 1.017, -.038539, .214049, .174587, .937, .172001, .088862, .244848,
                1.397, -.057398, .273889, .191374, 1.095, -.003651, .205293, .201177]
    assert found[0] == pytest.approx(expected, abs=1e-6) and mean == pytest.approx(block.mean())


def test_gaussian_values_have_the_shape_2():
    noise = np.random.RandomState(0).randn(200, 200)
    alpha, left, right = R._fit(np.stack([noise, 3 * noise]))
    assert alpha.tolist() == [1.945, 1.945]                                 # BasicSR
    assert left == pytest.approx(np.sqrt(2) * np.array([1, 3]), rel=0.02) and right == pytest.approx(left, rel=0.02)


def test_contrast_normalisation_equals_basicsr():
    image = 255 * picture(192, 192)
    normalised, deviation = R._contrast_normalised(image)
    assert (normalised.mean(), normalised.std()) == pytest.approx((0.00023740, 0.24387530), abs=1e-8)
    step = np.zeros((20, 20))
    step[:, 10:] = 100
    weights = np.exp(-np.arange(-3, 4) ** 2 / (2 * (7 / 6) ** 2))
    share = weights[4:].sum() / weights.sum()                               # of the window that is right of column 9
    _, deviation = R._contrast_normalised(step)
    assert deviation[10, 9] == close(100 * np.sqrt(share * (1 - share))) and deviation[10, 6] == pytest.approx(0, abs=1e-5)


def soft_noise(count):
    """Pictures of 192x192 pixels in [0,1], and noise of the same kind of numbers that was drawn after them."""
    random = np.random.RandomState(1)
    images = [ndimage.gaussian_filter(random.rand(192, 192) * 255, 1) / 255 for _ in range(count)]
    return np.stack(images), random.randn(192, 192) * 20 / 255


def test_niqe_equals_stored_numbers():
    images, noise = soft_noise(7)
    statistics = R.niqe_statistics(images[:6], 32, sharpest=0)
    tested = np.stack([images[6], ndimage.gaussian_filter(images[6], 2), images[6] + noise])
    assert R.niqe(tested, statistics) == pytest.approx([1.35084, 35.0199, 32.7360], abs=1e-3)
    assert statistics.mean.shape == (36,) and statistics.covariance.shape == (36, 36) and statistics.patch == 32


def test_features_stand_patch_by_patch():
    image = picture(100, 140) * np.linspace(0.2, 1, 140)
    found, sharpness = R.niqe_features(image, 32)
    assert found.shape == (12, 36) and sharpness.shape == (12,)             # 3 rows of 4; the rest is not used
    # a patch on its own differs at its border only: 7 x 7 windows
    rows, columns = slice(32, 64), slice(96, 128)
    _, deviation = R._contrast_normalised(255 * image[:96, :128])
    assert sharpness[7] == close(deviation[rows, columns].mean())
    changed = image.copy()
    changed[70:90, 5:25] = 0.5
    there = np.abs(R.niqe_features(changed, 32)[0] - found).max(1) > 1e-9
    assert there.tolist() == [False] * 8 + [True] + [False] * 3
    assert R.niqe_features(changed[:96, :128], 32)[0].tolist() == R.niqe_features(changed, 32)[0].tolist()


def test_the_second_scale_is_the_half_image():
    image = picture(128, 128)
    half = image.reshape(64, 2, 64, 2).mean((1, 3))
    assert R.niqe_features(image, 64)[0][:, 18:] == close(R.niqe_features(half, 32)[0][:, :18])


def test_statistics_are_those_of_sharp_patches():
    images, _ = soft_noise(6)
    soft = ndimage.gaussian_filter(images, (0, 0, 2))
    mixed = np.where(np.arange(192) < 96, images, soft)                     # sharp patches left, soft ones right
    chosen = R.niqe_statistics(mixed, 32)
    sharp = R.niqe_statistics(mixed[:, :, :96], 32, sharpest=0)
    everything = R.niqe_statistics(mixed, 32, sharpest=0)
    assert np.abs(chosen.mean - sharp.mean).max() < 0.1 * np.abs(everything.mean - sharp.mean).max()
    found, sharpness = R.niqe_features(images[0], 32)
    limit = np.sort(sharpness)[-10] / sharpness.max()
    stack = images[[0, 0, 0, 0]]
    chosen = R.niqe_statistics(stack, 32, sharpest=limit - 1e-9)            # ten patches of each image
    wanted = np.concatenate([found[sharpness >= np.sort(sharpness)[-10]]] * 4)
    assert chosen.mean == close(wanted.mean(0)) and chosen.covariance == close(np.cov(wanted.T))


def test_the_patch_follows_the_size_of_the_image():
    images, _ = soft_noise(12)
    assert R.niqe_statistics(images, sharpest=0).patch == 96                # 4 patches of each
    assert R.niqe_statistics(images[:6, :, :191], sharpest=0).patch == 32


@pytest.mark.filterwarnings("error")
def test_patches_without_texture_are_left_out():
    images, noise = soft_noise(7)
    statistics = R.niqe_statistics(images[:6], 32, sharpest=0)
    half = images[6].copy()
    half[:, 90:] = 0.37                                                     # columns 96 to 191 are constant
    found, sharpness = R.niqe_features(half, 32)
    assert len(found) == len(sharpness) == 18
    blank = np.full((192, 192), 0.37)
    values = R.niqe(np.stack([half, 0 * blank, blank]), statistics)
    assert np.isfinite(values[0]) and np.isnan(values[1:]).all()
    assert len(R.niqe_features(blank + 1e-6 * noise, 32)[0]) == 0           # the rounding of float32 is no texture
    blank[40:56, 40:56] = images[6][40:56, 40:56]                           # one patch with texture has no covariance
    assert len(R.niqe_features(blank, 32)[0]) == 1 and np.isnan(R.niqe(blank[None], statistics)[0])


def test_what_niqe_refuses():
    images, _ = soft_noise(2)
    statistics = R.niqe_statistics(images, 32, sharpest=0)
    with pytest.raises(ValueError, match="8 patches with texture cannot give a covariance of 36"):
        R.niqe_statistics(images, 96, sharpest=0)
    with pytest.raises(ValueError, match="no patch of 32 pixels fits"):
        R.niqe(images[:, :30], statistics)
    with pytest.raises(ValueError, match="no patch of 33 pixels"):
        R.niqe_features(images[0], 33)
    with pytest.raises(ValueError, match="divide an image of 0 to 255"):
        R.niqe(255 * images, statistics)
    with pytest.raises(ValueError, match=r"niqe: the images are \(192, 192\); give"):
        R.niqe(images[0], statistics)
    with pytest.raises(ValueError, match="not finite"):
        R.niqe_statistics(images * np.nan)
