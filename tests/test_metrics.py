"""common/metrics.py against stored numbers of scikit-image and pytorch-msssim, closed forms, hand-worked statistics."""
import json

import numpy as np
import pytest

from common import metrics as M
from common import table_pages


def picture(height, width, phase=0.0):
    i, j = np.mgrid[:height, :width].astype(float)
    return 0.5 + 0.25 * np.sin(0.31 * i + 0.07 * j + phase) + 0.2 * np.cos(0.17 * j - 0.05 * i + 2 * phase)


def disturbance(height, width):
    i, j = np.mgrid[:height, :width].astype(float)
    return 0.05 * np.sin(1.3 * i) * np.cos(0.9 * j) + 0.02


A = picture(64, 64)
B = np.clip(A + disturbance(64, 64), 0, 1)
A3 = np.stack([picture(64, 64, 0.1 * k) for k in range(4)])
B3 = np.clip(A3 + disturbance(64, 64), 0, 1) * np.array([1, 0.98, 1, 0.9])[:, None, None]
MASK = np.zeros((64, 64), bool)
MASK[16:48, 12:52] = True


def close(value, rel=1e-6):
    return pytest.approx(value, rel=rel, abs=1e-12)


# ---- images ----------------------------------------------------------------------------------------------------------


def test_errors_equal_stored_numbers():
    assert M.mae(A, B) == close(0.02650820069528451)
    assert M.nmse(A, B) == close(0.003226118118931264)
    assert np.sqrt(M.nmse(A, B)) == close(0.05679892709313499)              # Euclidean NRMSE of scikit-image
    assert M.nmse(A, B) != close(M.nmse(B, A), rel=1e-3)                    # the truth is the first argument


def test_psnr_equals_scikit_image():
    assert M.psnr(A, B, 1) == close(29.894939368963847)
    assert M.psnr(A, A + 0.1, 1) == close(20.0)
    assert M.psnr(2 * A - 1, 2 * B - 1, 2) == close(29.894939368963847)     # no dependence on the scale
    assert M.psnr(A, B, A.max() - A.min()) == close(28.9640, rel=1e-6)      # why the range is a constant


def test_psnr_keeps_leading_axes():
    values = M.psnr(A3, B3, 1)
    assert values == pytest.approx([29.894939, 31.500347, 29.893271, 26.809510], rel=1e-6)
    assert values.mean() == close(29.524516843818926)
    volume = M.psnr(A3.reshape(256, 64), B3.reshape(256, 64), 1)
    assert volume == close(29.170368980199388)                              # not the slices' mean: PSNR is concave
    assert M.psnr(A3.reshape(2, 2, 64, 64), B3.reshape(2, 2, 64, 64), 1).tolist() == values.reshape(2, 2).tolist()


def test_psnr_of_identical_images_is_infinite_and_silent(recwarn):
    assert M.psnr(A, A, 1) == np.inf
    assert not recwarn.list


@pytest.mark.parametrize("window, size, expected", [
    ("gauss", 64, 0.9510076671004315), ("gauss", 256, 0.9506644791171709), ("uniform7", 64, 0.9678978499853629)])
def test_ssim_equals_scikit_image_and_pytorch_msssim(window, size, expected):
    truth = picture(size, size)
    assert M.ssim(truth, np.clip(truth + disturbance(size, size), 0, 1), 1, window) == close(expected)


@pytest.mark.parametrize("window", ["gauss", "uniform7"])
def test_ssim_of_constants_is_the_luminance_term(window):
    assert M.ssim(np.full((20, 30), 0.5), np.full((20, 30), 0.25), 1, window) == close(0.8000639795265516)


def test_ssim_depends_on_range_and_offset():
    assert M.ssim(2 * A - 1, 2 * B - 1, 2) == close(0.8559024, rel=1e-6)
    assert M.ssim(A, B, 2) == close(0.9608170, rel=1e-6)
    assert M.ssim(255 * A, 255 * B, 255) == close(0.9510076671004315)


def test_ssim_by_slice_and_on_oblong_images():
    assert M.ssim(A3, B3, 1).tolist() == [M.ssim(a, b, 1) for a, b in zip(A3, B3)]
    assert M.ssim(A, B, 1) == close(M.ssim(A.T, B.T, 1))
    assert M.ssim(A[:40], B[:40], 1) == close(M.ssim(A[:40].T, B[:40].T, 1))
    assert M.ssim(A, A, 1) == 1


def test_ssim_has_no_borders():
    """A changed corner pixel is in one window only, at the weight of the window's own corner."""
    changed = A.copy()
    changed[0, 0] += 0.1
    assert 1 > M.ssim(A, changed, 1) > 1 - 1e-7
    assert M.ssim(A[:11, :11], B[:11, :11], 1) < 1                          # one window fits
    with pytest.raises(ValueError, match="smaller"):
        M.ssim(A[:10], B[:10], 1)


def test_ssim_knows_two_windows():
    with pytest.raises(ValueError, match="no window 'box'"):
        M.ssim(A, B, 1, "box")


def test_masks(recwarn):
    zero_filled = M.psnr(A * MASK, B * MASK, 1)
    assert zero_filled == close(34.9844124101952)
    assert M.psnr(A, B, 1, MASK) == close(29.93291262699614)
    assert zero_filled - M.psnr(A, B, 1, MASK) == close(-10 * np.log10(0.3125))
    assert M.ssim(A * MASK, B * MASK, 1) == close(0.9836992701239636)
    assert M.ssim(A, B, 1, mask=MASK) == close(0.9508060751670111)
    assert M.mae(A, B, MASK) == close(np.abs(A - B)[16:48, 12:52].mean())
    assert M.nmse(A, B, MASK) == close(((A - B)[MASK] ** 2).sum() / (A[MASK] ** 2).sum())
    assert M.psnr(A3, B3, 1, MASK)[2] == close(M.psnr(A3[2], B3[2], 1, MASK))           # one mask for all slices
    each = np.stack([MASK, ~MASK, MASK, np.zeros_like(MASK)])
    values = M.ssim(A3, B3, 1, mask=each)
    assert values[1] == close(M.ssim(A3[1], B3[1], 1, mask=~MASK)) and values[1] != close(values[0])
    assert np.isnan(values[3]) and np.isnan(M.psnr(A3, B3, 1, each)[3])                 # a slice without foreground
    assert np.isnan(M.mae(A, B, 0 * MASK)) and not recwarn.list


def test_a_blank_truth_has_no_nmse():
    assert np.isnan(M.nmse(0 * A, B))
    assert np.isfinite(M.nmse(A, 0 * B)) and M.nmse(A, 0 * B) == close(1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused(bad):
    damaged = A3.copy()
    damaged[2, 5, 7] = bad
    with pytest.raises(ValueError, match=r"image is not finite at \(2, 5, 7\)"):
        M.score(A3, damaged)
    with pytest.raises(ValueError, match="truth is not finite"):
        M.mae(damaged, A3)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        M.psnr(A3, B, 1)                                                    # would broadcast silently


def test_score_scores_whole_slices():
    scores = M.score(A3, B3)
    assert list(scores) == ["psnr", "ssim", "mae", "nmse"]
    assert scores["psnr"].mean() == close(29.524516843818926)
    assert scores["ssim"][0] == close(0.9510076671004315)
    assert scores["mae"][0] == close(0.02650820069528451)
    assert scores["nmse"][0] == close(0.003226118118931264)
    assert M.score(A3, B3, MASK)["psnr"][0] == close(29.93291262699614)
    assert M.score(A3, B3, MASK)["ssim"][0] == close(0.9508060751670111)


def test_rounding_outside_of_the_unit_range_is_clipped():
    truth, image = A3.copy(), B3.copy()
    truth[0, 0, 0], image[0, 0, 0], image[1, 5, 7] = 1.0005, -0.0005, 1.001
    inside = M.score(truth.clip(0, 1), image.clip(0, 1))
    assert all(np.array_equal(values, inside[name]) for name, values in M.score(truth, image).items())


@pytest.mark.parametrize("change, remedy", [(lambda u: 255 * u, "by 255"), (lambda u: 2 * u - 1, r"\(x \+ 1\) / 2"),
                                            (lambda u: u + 0.4, "the same scale"), (lambda u: 4095 * u, "the same scale")])
def test_images_outside_of_the_unit_range_are_refused(change, remedy):
    good, bad = A3.copy(), A3 / 2 + 0.25
    bad[2, 5, 7] = 1
    bad[:2] = 0.5                                                           # 0 after 2u - 1
    bad = change(bad)
    for name, pair in (("truth", (bad, good)), ("image", (good, bad))):
        with pytest.raises(ValueError, match=f"metrics: the {name} is .* at .*{remedy}") as caught:
            M.score(*pair)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=remedy):
        M.score_table("t1->t2", {"model": bad}, good, list("abcd"))


def test_noise_of_0_to_255_is_not_clipped_into_good_scores():
    """Clipped to [0,1], nearly all pixels of both images were 1, and independent noise scored 24 to 29 dB."""
    g = np.random.default_rng(0)
    truth, image = g.integers(0, 256, (2, 4, 64, 64)).astype(float)
    with pytest.raises(ValueError, match=r"the truth is \d+ at \(0, 0, 0\), from 0 to 255 in all.*divide .* by 255"):
        M.score(truth, image)
    assert (M.score(truth / 255, image / 255)["psnr"] < 10).all()


def test_half_precision_input_is_computed_in_double():
    truth, image = A.astype(np.float16), B.astype(np.float16)
    assert M.psnr(truth, image, 1) == close(-10 * np.log10(np.mean((truth.astype(float) - image.astype(float)) ** 2)))
    assert M.ssim(truth, image, 1) == close(M.ssim(truth.astype(float), image.astype(float), 1))


# ---- subjects --------------------------------------------------------------------------------------------------------


def test_per_subject_averages_the_slices_of_each():
    assert M.per_subject([1, 2, 3, 10, 20], ["b", "a", "b", "a", "a"]) == {"b": 2.0, "a": close(32 / 3)}
    left_out = M.per_subject([np.inf, 30, 20, np.nan, np.inf, np.nan], ["a", "a", "b", "b", "c", "d"])
    assert left_out["a"] == 30 and left_out["b"] == 20 and left_out["c"] == np.inf and np.isnan(left_out["d"])
    with pytest.raises(ValueError, match="one name per slice"):
        M.per_subject([1, 2, 3], ["a", "b"])


def test_summary():
    s = M.summary({"b": 4.0, "a": 1.0, "c": np.float32(1.0), "d": np.inf, "e": np.nan})
    assert s["mean"] == 2 and s["std"] == close(np.sqrt(2))                 # ddof 0: not sqrt(3)
    assert s["n"] == 3 and s["excluded"] == 2
    assert s["values"] == {"a": 1.0, "b": 4.0, "c": 1.0}
    assert json.loads(json.dumps(s, allow_nan=False)) == s
    alone = M.summary({"a": 3.0})
    assert (alone["mean"], alone["std"], alone["ci95"], alone["n"]) == (3, 0, None, 1)
    nobody = M.summary({"a": np.inf})
    assert nobody == {"mean": None, "std": None, "ci95": None, "n": 0, "excluded": 1, "values": {}}


def normal_scores(n):
    """n values that are spread like a unit normal, without random numbers."""
    from scipy.stats import norm
    return {f"{k:04d}": 5 + float(norm.ppf((k + 0.5) / n)) for k in range(n)}


@pytest.mark.parametrize("n", [20, 500])
def test_bootstrap_interval_has_the_width_of_theory(n):
    """For many subjects the 95 % percentile interval is mean +- 1.96 std / sqrt(n)."""
    s = M.summary(normal_scores(n))
    low, high = s["ci95"]
    half = 1.96 * s["std"] / np.sqrt(n)
    assert low < s["mean"] < high
    assert s["mean"] - low == pytest.approx(half, rel=0.15) and high - s["mean"] == pytest.approx(half, rel=0.15)


def test_bootstrap_is_deterministic_whatever_the_order():
    values = normal_scores(12)
    backwards = dict(reversed(values.items()))
    assert M.summary(values) == M.summary(backwards)
    assert M.summary(values)["ci95"] != M.summary({**values, "0000": 6.0})["ci95"]


def test_bootstrap_of_two_subjects_reaches_both():
    assert M.summary({"a": 1.0, "b": 2.0})["ci95"] == [1.0, 2.0]            # a quarter of the draws hold one alone


def test_row_is_flat():
    r = M.row("t1->t2", "model", "psnr", {"a": 20.0, "b": 22.0}, table="table1", variant="max")
    assert (r["task"], r["method"], r["metric"]) == ("t1->t2", "model", "psnr")
    assert (r["table"], r["variant"]) == ("table1", "max")
    assert r["mean"] == 21 and r["n"] == 2 and r["values"] == {"a": 20.0, "b": 22.0}


def test_score_table_scores_each_method_by_subject():
    rows = M.score_table("t1->t2", {"model": B3, "copy": A3}, A3, ["x", "x", "y", "y"], protocol="test")
    found = {(r["method"], r["metric"]): r for r in rows}
    assert len(rows) == 8 and all(r["protocol"] == "test" and r["task"] == "t1->t2" for r in rows)
    assert found["model", "psnr"]["values"] == {"x": pytest.approx((29.894939 + 31.500347) / 2, rel=1e-6),
                                                "y": pytest.approx((29.893271 + 26.809510) / 2, rel=1e-6)}
    assert found["model", "psnr"]["excluded_slices"] == 0
    assert found["model", "nmse"]["values"]["x"] == close(np.mean(M.nmse(A3[:2], B3[:2])))
    assert found["copy", "ssim"]["mean"] == 1 and found["copy", "mae"]["mean"] == 0
    assert found["copy", "psnr"]["mean"] is None
    assert (found["copy", "psnr"]["excluded"], found["copy", "psnr"]["excluded_slices"]) == (2, 4)
    in_mask = M.score_table("t", {"model": B3}, A3, list("abcd"), MASK)
    assert in_mask[0]["values"]["a"] == close(29.93291262699614)


OURS = dict(zip("abcdefgh", [30.1, 29.5, 31.2, 28.8, 30.7, 29.9, 30.3, 31.0]))
THEIRS = dict(zip("hgfedcba", reversed([29.8, 29.1, 30.5, 28.9, 30.0, 29.2, 30.1, 30.2])))


def test_wilcoxon_by_hand():
    """Differences .3 .4 .7 -.1 .7 .7 .2 .8, W = 1: two of 2^8 sign patterns reach W <= 1, on two sides: 4/256."""
    result = M.wilcoxon(OURS, dict(reversed(THEIRS.items())))
    assert result["p"] == close(0.015625) and result["n"] == 8
    assert result["difference"] == close(3.7 / 8)
    assert M.wilcoxon(THEIRS, OURS)["difference"] == close(-3.7 / 8)        # paired by name, not by order
    assert M.wilcoxon(THEIRS, OURS)["p"] == close(0.015625)


def test_wilcoxon_of_six_subjects_reaches_its_floor():
    a = {s: float(k + 1) for k, s in enumerate("abcdef")}
    assert M.wilcoxon(a, dict.fromkeys("abcdef", 0.0))["p"] == close(2 / 2 ** 6)


def test_wilcoxon_takes_common_finite_subjects_only():
    result = M.wilcoxon({**OURS, "z": 99.0, "y": np.inf}, {**THEIRS, "w": 0.0, "y": np.inf})
    assert result["n"] == 8 and result["p"] == close(0.015625)


def test_wilcoxon_of_too_few_subjects_gives_a_reason():
    five = {s: OURS[s] for s in "abcde"}
    result = M.wilcoxon(five, THEIRS)
    assert result["p"] is None and result["reason"] == "n = 5 < 6: no two-sided p below .05 exists"
    assert result["difference"] == close(2.0 / 5)
    nobody = M.wilcoxon({}, THEIRS)
    assert (nobody["p"], nobody["difference"], nobody["n"]) == (None, None, 0)
    assert nobody["reason"].startswith("n = 0 < 6")


def test_wilcoxon_without_and_with_ties(recwarn):
    assert M.wilcoxon(OURS, OURS) == {"p": 1.0, "difference": 0.0, "n": 8}
    a = {s: float(k) for k, s in enumerate("abcdefg")}
    one_zero = M.wilcoxon(a, dict.fromkeys("abcdefg", 0.0))
    assert one_zero["p"] == close(2 / 2 ** 6) and one_zero["n"] == 7        # the zero has no sign: six remain
    assert not recwarn.list


def test_holm_by_hand():
    assert M.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert M.holm([0.04, None, 0.01]) == [pytest.approx(0.04), None, pytest.approx(0.02)]
    assert M.holm([0.6, 0.7]) == [1.0, 1.0]
    assert M.holm([None]) == [None] and M.holm([]) == []


# ---- trivial answers -------------------------------------------------------------------------------------------------


def test_mean_of_train():
    ramp = np.arange(6).reshape(2, 3) / 2
    targets = np.stack([np.full((2, 3), 0.25), np.full((2, 3), 0.75), ramp]).astype(np.float16)
    assert M.mean_of_train(targets) == pytest.approx((1 + ramp) / 3)
    many = np.full((5000, 1, 1), 0.1, np.float16)                           # a sum in half precision would stall at 256
    assert M.mean_of_train(many)[0, 0] == pytest.approx(float(np.float16(0.1)))


def test_copy_source_is_the_nearest_on_training_slices():
    sources = {"far": A3 + 0.2, "near": A3 + 0.05, "middle": A3 - 0.1}
    assert M.copy_source(sources, A3) == "near"
    assert M.copy_source({**sources, "same": A3}, A3) == "same"
    mixed = {"bad": np.concatenate([A3[:1], A3[1:] + 0.3]), "good": A3 + 0.1}       # one identical slice does not win
    assert M.copy_source(mixed, A3) == "good"


def test_lookup_learns_an_exact_function_of_one_source():
    """Within a bin of 1/64 the function 1 - s^2 changes by at most 2/64: the mean is within 1/64 of it."""
    source = np.linspace(0, 1, 2 * 80 * 80).reshape(2, 80, 80)
    table = M.IntensityLookup({"t1": source}, 1 - source ** 2)
    test = np.linspace(0, 1, 101).reshape(1, 1, 101)
    assert np.abs(table.predict({"t1": test}) - (1 - test ** 2)).max() < 1 / 64 + 1e-3


def test_lookup_is_the_mean_in_its_bin_and_background_has_its_own():
    source = np.array([[[0, 0, 0.005, 0.01], [0.5, 0.5, 0.4999, 0.501]]])
    target = np.array([[[0.1, 0.3, 0.6, 0.8], [0.2, 0.4, 0.9, 0.7]]])
    table = M.IntensityLookup({"t1": source}, target)
    assert table.predict({"t1": np.array([0, 0.007, 0.5, 0.51])}) == pytest.approx([0.2, 0.7, 0.5, 0.7])
    assert table.predict({"t1": np.array([-0.0005, 1.0005])}) == pytest.approx([0.2, 0.7])      # rounding: clipped
    with pytest.raises(ValueError, match="the source t1 is 1.7 at .1,."):
        table.predict({"t1": np.array([0, 1.7])})
    with pytest.raises(ValueError, match="the source t1 is 255 .* by 255"):
        M.IntensityLookup({"t1": 255 * source.round()}, target)
    assert table.predict({"t1": np.array([0.2, 0.3])}) == pytest.approx([0.7, 0.5])     # empty: the nearest filled bin


@pytest.mark.parametrize("count, bins", [(1, 64), (2, 16), (3, 16), (4, 8)])
def test_lookup_is_joint(count, bins):
    """The target is a function of all sources together that no single one determines: each must be in the table."""
    rng = np.random.default_rng(0)
    levels = [2 / 7, 3 / 7, 6 / 7]
    names = ["t1", "t2", "pd", "flair"][:count]
    sources = {n: rng.choice(levels, (4, 32, 32)) for n in names}
    weights = np.array([0.7, 0.31, 0.17, 0.05])[:count]
    target = sum(w * sources[n] for w, n in zip(weights, names)) / weights.sum()
    table = M.IntensityLookup(sources, target)
    assert table.table.shape == (bins + 1,) * count
    fresh = {n: rng.choice(levels, (2, 16, 16)) for n in reversed(names)}   # by name, whatever the order
    expected = sum(w * fresh[n] for w, n in zip(weights, names)) / weights.sum()
    assert table.predict(fresh) == pytest.approx(expected, abs=1e-6)


def test_lookup_fills_empty_cells_of_a_joint_table_from_the_nearest():
    sources = {"a": np.array([[[0.1, 0.9]]]), "b": np.array([[[0.1, 0.2]]])}
    table = M.IntensityLookup(sources, np.array([[[0.25, 0.75]]]))
    assert table.predict({"a": np.array([0.2, 0.8]), "b": np.array([0.9, 0.9])}) == pytest.approx([0.25, 0.75])


def test_baselines_learn_from_training_slices_only():
    """Channel 1 is like the target in training, channel 0 in testing: a peek at the test truth would copy channel 0."""
    train = np.stack([A3 * 0.2, A3 + 0.02, A3], axis=1)
    test = np.stack([A3 ** 2, A3 * 0.2, A3 ** 2], axis=1)
    learned, given = ({c: images[:, c] for c in range(3)} for images in (train, test))
    found = M.baselines(learned, {c: given[c] for c in (0, 1)}, 2)
    assert list(found) == ["copy-source", "mean-of-train", "intensity-lookup"]
    assert np.array_equal(found["copy-source"], test[:, 1])
    assert found["mean-of-train"].shape == (4, 64, 64)
    assert found["mean-of-train"][3] == pytest.approx(A3.mean(0))
    expected = M.IntensityLookup({0: train[:, 0], 1: train[:, 1]}, A3).predict({0: test[:, 0], 1: test[:, 1]})
    assert np.array_equal(found["intensity-lookup"], expected)


# ---- table -----------------------------------------------------------------------------------------------------------


def test_markdown_table():
    def rows(task, method, psnr_values, ssim_values, **extra):
        return [M.row(task, method, "psnr", psnr_values, **extra), M.row(task, method, "ssim", ssim_values, **extra)]
    every = (rows("t1->t2", "model", {"a": 20.0, "b": 23.0}, {"a": 0.8, "b": 0.9})
             + rows("t1->t2", "copy", {"a": 11.0, "b": 11.0}, {"a": 0.5, "b": 0.5})
             + rows("t2->t1", "model", {"a": 30.0}, {"a": 0.95})
             + rows("t2->t1", "model", {"a": np.inf}, {"a": 1.0}, variant="max"))
    lines = table_pages.markdown_table(every, region="foreground").splitlines()
    assert lines[0] == ("PSNR in dB, mean ± std over subjects (n) / SSIM, mean.  "
                        "Unit: subject, the mean of its slices; n = 0 to 2; foreground; range [0,1].")
    assert lines[1:] == ["", "| method | t1->t2 | t2->t1 |", "| --- | --- | --- |",
                         "| model | 21.50 ± 1.50 (2) / 0.850 | 30.00 (1) / 0.950 |",
                         "| copy | 11.00 ± 0.00 (2) / 0.500 | – / – |",
                         "| model (max) | – / – | – / 1.000 |"]


def test_markdown_table_says_what_was_left_out():
    images = B3.copy()
    images[1] = A3[1]
    text = table_pages.markdown_table(M.score_table("t1->t2", {"model": images, "copy": B3}, A3, list("aabb")))
    assert "n = 2; whole slice;" in text
    assert text.splitlines()[-1].startswith("Left out of PSNR: 1 slice values")
    assert "Left out" not in table_pages.markdown_table(M.score_table("t1->t2", {"copy": B3}, A3, list("aabb")))


def test_volume_table_has_one_error_for_all_slices():
    """Two slices with mean squared errors .01 and .03: -10 log10(.02) = 16.99 dB, and not the mean of 20 and 15.2 dB."""
    truth = np.zeros((2, 4, 4))
    image = np.stack([np.full((4, 4), 0.1), np.full((4, 4), np.sqrt(0.03))])
    (row,) = M.volume_table("a->b", {"M": image}, truth, np.array(["s", "s"]))
    assert abs(row["mean"] - 16.9897) < 1e-3 and row["variant"] == "volume"


def test_matrix_table_by_hand():
    rows = [M.row(task, method, "psnr", {"s": value})
            for task, method, value in (("t1->ct", "M", 30.0), ("t1->ct", "copy-source", 12.0), ("t1->ct", "intensity-lookup", 31.0),
                                        ("ct->t1", "M", 25.0), ("ct->t1", "copy-source", 12.0))]
    lines = table_pages.matrix_table(rows).splitlines()
    assert lines[2] == "| from \\ to | ct | t1 |" and lines[3] == "| --- | --- | --- |"
    assert lines[4] == "| ct |  | 25.00 (12.00) |" and lines[5] == "| t1 | 30.00 (31.00) |  |"
    assert lines[-1] == "Above the best simple method in 1 of 2 tasks."
