"""Background, foreground, normalisation, CT windows."""

import numpy as np
import pytest
from scipy import ndimage

from data import check, denormalise, load_subject, read_volume
from data.files import DataError
from data.intensities import (
    BRAIN_WINDOW,
    CT_WINDOW,
    PET_DARK,
    PET_IMPOSSIBLE,
    PET_WINDOW,
    Scale,
    background_value,
    brightest_of,
    find_background,
    foreground,
    is_stripped,
    normalise,
    to_hounsfield,
)
from data.layouts import Subject
from scans import SHAPE, body_pet, breast, cylinder, head, save, scan


def test_volume_darker_than_its_background():  # row 45
    with pytest.raises(DataError, match="no foreground brighter than its background"):
        normalise(np.where(head() > 0, np.float32(-5), np.float32(0)) * (head() > 150))


def test_normalisation_by_hand():
    array = np.full((10, 10, 4), -3.2, np.float32)
    array[3:7, 3:7] = np.linspace(-2, 4, 64).reshape(4, 4, 4)
    u, scale = normalise(array)
    high = -2 + 6 * 0.995  # p99.5 of an even ramp
    assert scale == pytest.approx((-3.2, high), abs=1e-5)
    assert (u[array == np.float32(-3.2)] == 0).all() and background_value(array) == np.float32(-3.2)
    assert u[3, 3, 0] == pytest.approx((-2 + 3.2) / (high + 3.2), abs=1e-5) and u[6, 6, 3] == 1
    assert foreground(array).sum() == 64
    np.testing.assert_allclose(denormalise(u, scale), np.minimum(array, high), atol=1e-5)
    assert denormalise(np.float32(0.25), Scale(-4.0, 8.0)) == -1  # -4 + 12 / 4


@pytest.mark.parametrize("kind", ["stripped", "noisy"])
def test_affine_changes_of_intensity_change_nothing(kind):
    array = head((30, 30, 10))
    if kind == "noisy":
        rng = np.random.default_rng(1)
        array = np.hypot(array + rng.normal(0, 4, array.shape), rng.normal(0, 4, array.shape)).astype(np.float32)
    u, _ = normalise(array)
    mean, std = array[array > 50].mean(), array[array > 50].std()
    z, scale = normalise(((array - mean) / std).astype(np.float32))
    assert scale.background < 0
    np.testing.assert_allclose(z, u, atol=1e-5)
    large, _ = normalise(array * 1000 + 500)
    np.testing.assert_allclose(large, u, atol=1e-5)


@pytest.mark.parametrize("level", [0, 5])
def test_zscored_tissue_around_one_value_keeps_its_dark_half(level):
    truth = head((30, 30, 10))
    inside = truth > 0
    array = np.where(inside, (truth - 150) / 30 + level, level).astype(np.float32)
    u, scale = normalise(array)
    assert (u[~inside] == 0).all()
    assert scale.background == pytest.approx(np.percentile(array[inside], 0.5), abs=1e-3)
    assert np.corrcoef(u[inside], truth[inside])[0, 1] > 0.999


def test_heavy_tails_do_not_set_the_scale():
    array = head((40, 40, 20))
    array[20, 20, 10] = 1e6
    array[21, 20, 10] = -60  # interpolation overshoot
    u, scale = normalise(array)
    assert 195 < scale.high < 201 and scale.background == 0
    assert u[20, 20, 10] == 1 and u[21, 20, 10] == 0
    assert abs(int(foreground(array).sum()) - int((head((40, 40, 20)) > 0).sum())) <= 1


def test_foreground_in_noisy_air():
    rng = np.random.default_rng(0)
    truth = head((48, 48, 20)) > 0
    clean = np.where(truth, 150, 0)
    array = np.hypot(clean + rng.normal(0, 5, clean.shape), rng.normal(0, 5, clean.shape)).astype(np.float32)
    assert not find_background(array).constant
    assert background_value(array) == pytest.approx(5, abs=1.5)  # mode of Rayleigh noise is sigma
    mask = foreground(array)
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.995
    touching = array.copy()
    touching[0], touching[-1] = array[24], array[24]  # tissue on two of four faces
    assert background_value(touching) == pytest.approx(5, abs=1.5)
    touching[0], touching[-1, :20] = 150, 150  # tissue more even than the air
    assert background_value(touching) == pytest.approx(5, abs=1.5)
    raised = (array + 50).astype(np.float32)
    raised[:3, :3] = 0  # a corner that was never imaged is darker than the air, and no tissue
    assert not foreground(raised)[:3, :3].any()
    whole_numbers = np.round(array / 2).astype(np.float32)  # a fifth of the air has the same value
    assert not find_background(whole_numbers).constant
    mask = foreground(whole_numbers)
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.99


def test_background_needs_more_than_half_of_the_border():
    array = np.random.default_rng(0).uniform(100, 200, (20, 20, 5)).astype(np.float32)
    array[0] = -7
    assert not find_background(array).constant
    array[-1], array[:, 0] = -7, -7
    assert find_background(array).constant
    assert background_value(array) == -7 and (array[foreground(array)] >= 100).all()


def test_ct_has_one_window_for_all_volumes():
    values = np.array([-3024, -1024, -1000, -500, 0, 250, 1500, 3071], np.float32)
    u, scale = normalise(values.reshape(2, 2, 2), contrast="ct")
    np.testing.assert_allclose(u.ravel(), [0, 0, 0, 0.2, 0.4, 0.5, 1, 1], atol=1e-7)
    assert scale == (-1000, 1500) and u.dtype == np.float32
    np.testing.assert_allclose(denormalise(u, scale).ravel(), values.clip(-1000, 1500), atol=1e-4)
    for array, sentence in ((np.full((2, 2, 2), 7.0), "is constant"), (values[:4].reshape(2, 2, 1), "above -500 HU")):
        with pytest.raises(DataError, match=sentence):
            normalise(array, contrast="ct")


def test_body_in_ct(tmp_path):
    hu, body = scan()
    np.testing.assert_array_equal(foreground(hu, contrast="ct"), body)
    assert not foreground(np.full(SHAPE, -1000, np.float32), contrast="ct").any()
    hu[..., :3] = np.where(np.arange(18)[:, None] > 0, -1000, hu[..., :3])  # only the table below the body
    slices = load_subject(Subject("p", "p", {"ct": save(tmp_path / "ct.nii", hu)}), ("ct",), 20)
    assert slices.kept.tolist() == [False] * 3 + [True] * 5 + [False] and slices.scales == {"ct": CT_WINDOW}
    np.testing.assert_allclose(slices.brain, body.sum((0, 1)) * (np.arange(9) > 2) / 400)


def test_odd_values_of_ct_are_noted(tmp_path):
    path = save(tmp_path / "ct.nii", scan()[0])
    assert read_volume(path, contrast="ct").notes == [] and "negative" in read_volume(path, contrast="t1").notes[0]
    path = save(tmp_path / "cut.nii", scan()[0].clip(-150, 1400))
    odd = "holds no air, its lowest value is -150; is it in HU?"
    assert read_volume(path, contrast="ct").notes == [odd]
    lines = []
    find = Subject("p", "p", {"ct": path})
    assert load_subject(find, ("ct",), 20).notes == [("cut.nii", odd)]
    save(tmp_path / "set" / "a" / "CT.nii.gz", scan()[0])
    save(tmp_path / "set" / "b" / "CT.nii.gz", scan(seed=1)[0] * 0 - 900)
    assert not check(tmp_path / "set", say=lines.append) and "subject b, ct" in lines[-2] and "is constant" in lines[-2]
    row = next(line for line in lines if line.startswith("a "))
    assert float(row.split()[-1]) == pytest.approx(scan()[1].mean(), abs=1e-3)


# ---- Fixed windows and shared scales ---------------------------------------------------------------------------------

def test_pet_has_one_window_for_all_volumes():
    values = np.array([-0.1, 0, 0.5, 2.5, 5, 9.9, 10, 31], np.float32)
    u, scale = normalise(values.reshape(2, 2, 2), contrast="pet")
    np.testing.assert_allclose(u.ravel(), [0, 0, 0.05, 0.25, 0.5, 0.99, 1, 1], atol=1e-6)
    assert scale == PET_WINDOW == (0, 10) and u.dtype == np.float32
    np.testing.assert_allclose(denormalise(u, scale).ravel(), values.clip(0, 10), atol=1e-5)
    with pytest.raises(DataError, match=r"nothing is above SUV 0\.2"):
        normalise(np.linspace(0, 0.15, 8).reshape(2, 2, 2), contrast="pet")


def test_cta_has_the_window_of_ct():
    hu = np.linspace(-1200, 2000, 64, dtype=np.float32).reshape(4, 4, 4)
    ct, cta = normalise(hu, contrast="ct"), normalise(hu, contrast="cta")
    np.testing.assert_array_equal(ct[0], cta[0])
    assert ct[1] == cta[1] == CT_WINDOW
    np.testing.assert_array_equal(foreground(scan()[0], contrast="cta"), scan()[1])


def test_units_of_pet_are_judged_by_many_voxels():
    suv = body_pet(shape=(30, 30, 10))
    suv[0, 0, 0] = 5000  # one voxel in 9000
    assert PET_DARK < brightest_of(suv) < 5 and brightest_of(suv * 5000) > 50 * PET_IMPOSSIBLE


def test_body_in_pet():
    suv = body_pet(shape=(40, 40, 8))
    truth = cylinder((40, 40, 8))
    np.testing.assert_array_equal(foreground(suv, contrast="pet"), truth)
    suv[18:23, 18:23] = 0.05  # a cold lung
    suv[0:2, 0:2] = 3  # a hot spot in air is another, smaller piece
    np.testing.assert_array_equal(foreground(suv, contrast="pet"), truth)


@pytest.mark.parametrize("offset", [0, 40])
def test_pre_leaves_room_for_the_agent_and_post_has_its_scale(offset):
    pre, post = breast()
    u_pre, scale = normalise(pre + offset, contrast="pre")
    high = np.percentile(pre[pre > 0], 99.5)
    assert scale == pytest.approx((offset, offset + 1.5 * high), rel=1e-5)
    np.testing.assert_allclose(u_pre, pre.clip(max=1.5 * high) / (1.5 * high), atol=1e-5)
    u_post, shared = normalise(post + offset, contrast="post", pre=scale)
    assert shared == scale
    wanted = (post / (1.5 * high)).clip(max=1) - pre / (1.5 * high)
    np.testing.assert_allclose(u_post - u_pre, wanted, atol=1e-5)
    assert (u_post > 1 - 1e-6).any() and (u_post - u_pre).max() > 0.3
    with pytest.raises(ValueError, match="scale of pre"):
        normalise(post, contrast="post")


def test_odd_values_of_pet_and_cta_are_noted(tmp_path):
    path = save(tmp_path / "a.nii", body_pet() - 0.1)
    assert read_volume(path, contrast="pet").notes == ["has negative voxels; they become 0"]
    assert read_volume(save(tmp_path / "b.nii", body_pet()), contrast="pet").notes == []
    path = save(tmp_path / "c.nii", scan()[0].clip(-90, 1400))
    assert read_volume(path, contrast="cta").notes == ["holds no air, its lowest value is -90; is it in HU?"]


def stripped_ct():
    """A brain of 10, 30 and 40 HU with blood of 70 HU, and 0 HU around it."""
    array = np.zeros((20, 20, 6), np.float32)
    array[4:16, 4:16] = 30
    array[4:16, 4:10] = 40
    array[6:8, 6:8] = 70
    array[10:12, 10:12] = 10
    return array


def test_ct_without_skull_has_a_window_of_its_own():
    array = stripped_ct()
    assert is_stripped(array)
    u, scale = normalise(array, None, "ct")
    assert scale == BRAIN_WINDOW == (-20, 100)
    assert np.allclose(u[5, 11, 0], 50 / 120) and np.allclose(u[6, 6, 0], 90 / 120) and np.allclose(u[10, 10, 0], 30 / 120)
    assert not u[0].any() and foreground(array, contrast="ct").sum() == 12 * 12 * 6
    assert np.allclose(denormalise(u, scale)[4:16, 4:16], array[4:16, 4:16], atol=1e-4)


def test_bone_or_air_means_a_whole_ct():
    bone = stripped_ct()
    bone[4:16, 4] = 900
    air = stripped_ct()
    air[0] = -1000
    fat = stripped_ct()
    fat[4:16, 4] = -100
    wide = stripped_ct()
    wide[0] = wide[-1] = 40
    wide[:, 0] = wide[:, -1] = 40
    for array in (bone, air, fat, wide, stripped_ct() / 70):
        assert not is_stripped(array) and normalise(array, None, "ct")[1] == CT_WINDOW


# ---- Numbers that are no HU, and volumes without background ----------------------------------------------------------

def round_ct(seed=0):
    """A round body of about 40 HU with bone, and air of about -1000 HU; the circle of the scanner is larger."""
    shape = (40, 40, 6)
    noise = np.random.default_rng(seed).normal(0, 8, shape)
    hu = np.where(cylinder(shape, 0.7), 40, -1000) + noise
    hu[18:22, 10:14] = 900
    return hu.astype(np.float32), cylinder(shape, 0.98)


@pytest.mark.parametrize(("store", "note"), [
    (lambda hu, circle: hu, None),
    (lambda hu, circle: np.where(circle, hu, -2000), None),
    (lambda hu, circle: np.where(circle, hu, -32768), None),
    (lambda hu, circle: hu + 1024, "HU + 1024, its darkest part is at 2"),
    (lambda hu, circle: np.where(circle, hu + 1024, 0), "HU + 1024, its darkest part is at 2"),
    (lambda hu, circle: np.where(circle, hu + 1024, -2000), "HU + 1024, its darkest part is at 2"),
    (lambda hu, circle: hu + 1000, "HU + 1000, its darkest part is at"),
    (lambda hu, circle: hu + 32768, "HU + 32768, its darkest part is at 31768"),
    (lambda hu, circle: hu + 1500, "HU + 1500, its darkest part is at 500"),
    (lambda hu, circle: (hu + 1024)[10:30, 10:30], "HU + 1024, its darkest part is at"),
    (lambda hu, circle: np.where(hu < 0, hu + 65536, hu), "65536 is subtracted"),
    (lambda hu, circle: np.where(circle, hu + 1024, np.nan), "HU + 1024, its darkest part is at 2"),
], ids=["HU", "-2000", "-32768", "1024", "1024 in 0", "1024 in -2000", "1000", "32768", "1500", "1024 without air", "16 bits", "nan"])
def test_numbers_become_hu(tmp_path, store, note):
    hu, circle = round_ct()
    volume = read_volume(save(tmp_path / "ct.nii", store(np.round(hu), circle).astype(np.float32)), contrast="ct")
    assert (note is None and volume.notes == []) or note in volume.notes[-1]
    bone = np.median(volume.array[volume.array > 500])
    assert bone == pytest.approx(900, abs=45 if note and volume.array.shape[0] == 20 else 3)
    assert np.median(volume.array[np.abs(volume.array - 40) < 300]) == pytest.approx(40, abs=45)


@pytest.mark.parametrize("scaled", [lambda u: u, lambda u: 2 * u - 1, lambda u: np.round(255 * u), lambda u: 2.5 * u - 1],
                         ids=["0 to 1", "-1 to 1", "0 to 255", "thousands"])
def test_pictures_are_no_hu(tmp_path, scaled):
    u = normalise(round_ct()[0], contrast="ct")[0]
    with pytest.raises(DataError, match=r"ct\.nii: holds numbers from .* which are no HU"):
        read_volume(save(tmp_path / "ct.nii", scaled(u).astype(np.float32)), contrast="ct")
    assert read_volume(save(tmp_path / "b.nii", stripped_ct()), contrast="ct").notes[0].startswith("holds neither bone nor air")


def tissue(seed, levels):
    """Three tissues in smooth pieces that reach every side."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(48, 48, 16)), 3)
    kinds = np.digitize(field, np.quantile(field, [0.3, 0.6]))
    return (np.array(levels)[kinds] * np.random.default_rng(seed).normal(1, 0.02, kinds.shape)).astype(np.float32)


@pytest.mark.parametrize("lungs", [False, True])
def test_ct_that_was_multiplied_by_a_mask_is_no_stored_number(lungs):
    """A skull around a brain, or a body around lungs, and 0 outside, which would be water."""
    x, y, z = np.meshgrid(*[np.linspace(-1.2, 1.2, n) for n in (24, 26, 10)], indexing="ij")
    radius = np.sqrt(x**2 + y**2 + 0 * z)
    middle, inside = (0.5, -850.0) if lungs else (0.75, 35.0)
    hu = np.where(radius < middle, inside, 930) + np.random.default_rng(0).normal(0, 5, radius.shape)
    array = np.where(radius < 1, hu, 0).astype(np.float32)
    found, note = to_hounsfield(array)
    assert note == "is 0 around the body, which would be water; it counts as not scanned there"
    np.testing.assert_array_equal(found, np.where(radius < 1, array, -3024))
    stored = np.where(radius < 1, hu, -1000).astype(np.float32) + 1000        # air is 0 there, and that is right
    found, note = to_hounsfield(stored)
    assert note.startswith("seems to hold HU + 1000")


@pytest.mark.parametrize("levels", [(300, 600, 900), (900, 600, 400), (60, 500, 400)], ids=["t1", "t2", "dark"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("offset", [0, -1000])
def test_a_volume_without_air_is_all_foreground(seed, levels, offset):
    array = tissue(seed, levels) + offset
    background = find_background(array)
    assert background.reach == -np.inf and foreground(array, background).all()
    u, scale = normalise(array)
    assert np.mean(u == 0) < 0.01 and scale.background == pytest.approx(np.percentile(array, 0.5), abs=10)


def test_a_smooth_volume_without_air_is_all_foreground(tmp_path):
    field = ndimage.gaussian_filter(np.random.default_rng(2).normal(size=(48, 48, 16)), 4)
    array = (700 - 500 * (field - field.min()) / np.ptp(field)).astype(np.float32)
    assert foreground(array).all() and np.mean(normalise(array)[0] == 0) < 0.01
    notes = load_subject(Subject("p", "p", {"t1": save(tmp_path / "a.nii", array)}), ("t1",), 48).notes
    assert notes == [("a.nii", "has no air in view, it seems; all of it counts as foreground")]


@pytest.mark.parametrize("sigma", [5, 40, 90])
@pytest.mark.parametrize("air", ["around", "around a small body", "in a corner", "and lungs"])
def test_noisy_air_is_still_found(sigma, air):
    shape = (64, 64, 10)
    x, y = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape[:2]], indexing="ij")
    inside = {"around": x**2 + y**2 < 0.8, "around a small body": x**2 + y**2 < 0.12, "in a corner": x + y < 0.9,
              "and lungs": (x**2 + y**2 < 0.8) & ~(((abs(x) - 0.45) / 0.25) ** 2 + (y / 0.4) ** 2 < 1)}[air]
    if air == "in a corner" and sigma > 50:
        pytest.skip("too little air for such noise")
    rng = np.random.default_rng(0)
    clean = np.where(inside[..., None], 700, 0) * np.ones(shape)
    array = np.hypot(clean + rng.normal(0, sigma, shape), rng.normal(0, sigma, shape)).astype(np.float32)
    found = find_background(array)
    assert np.isfinite(found.reach) and found.level == pytest.approx(sigma, rel=0.4)
    assert np.mean(foreground(array, found) == inside[..., None]) > 0.97


def test_nan_from_the_border_is_background(tmp_path):
    array = head((30, 30, 12))
    body = array > 0
    outside = np.where(body, array, np.nan)
    volume = read_volume(save(tmp_path / "a.nii", outside))
    np.testing.assert_array_equal(volume.array, array)
    assert volume.notes == ["has NaN or infinite voxels from its border inwards; they are background"]
    scores = read_volume(save(tmp_path / "b.nii", (outside - 150) / 30))
    assert (foreground(scores.array) == body).mean() > 0.999
    slab = array - 7
    slab[:9] = -np.inf  # where one corner of the box was never scanned, the rest has its own background
    volume = read_volume(save(tmp_path / "c.nii", slab))
    assert (volume.array[:9] == -7).all()
    hole = outside.copy()
    hole[14:18, 14:18, 4:8] = np.nan
    with pytest.raises(DataError, match=r"64 of 10800 voxels are NaN or infinite \(first at \(14, 14, 4\)\)"):
        read_volume(save(tmp_path / "d.nii", hole))
    few = outside.copy()
    few[15, 15, 5] = np.nan
    volume = read_volume(save(tmp_path / "e.nii", few))
    assert volume.array[15, 15, 5] == 0 and volume.notes[-1].startswith("has 1 NaN or infinite voxels")
    with pytest.raises(DataError, match="all of its voxels are NaN"):
        read_volume(save(tmp_path / "f.nii", outside * np.nan))
    with pytest.raises(DataError, match="32 of 1800 voxels are NaN"):
        read_volume(save(tmp_path / "h.nii", hole[..., 5:7]))  # every slice of a thin stack is at its top or bottom
    thin = read_volume(save(tmp_path / "g.nii", outside[..., 5]))  # a single slice
    np.testing.assert_array_equal(thin.array[..., 0], array[..., 5])


def test_nan_around_a_ct_is_not_water(tmp_path):
    hu, circle = round_ct()
    volume = read_volume(save(tmp_path / "ct.nii", np.where(circle, hu, np.nan).astype(np.float32)), contrast="ct")
    assert (volume.array[~circle] == -3024).all() and not normalise(volume.array, contrast="ct")[0][~circle].any()
    assert (normalise(np.where(circle, hu, -3024), contrast="ct")[0] == normalise(volume.array, contrast="ct")[0]).all()
