"""Background, foreground, normalisation, CT windows."""

import numpy as np
import pytest

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
    path = save(tmp_path / "ct12.nii", scan()[0].clip(-1000) + 1000)
    assert read_volume(path, contrast="ct").notes == ["holds no air, its lowest value is 0; is it in HU?"]
    lines = []
    find = Subject("p", "p", {"ct": path})
    assert load_subject(find, ("ct",), 20).notes == [("ct12.nii", "holds no air, its lowest value is 0; is it in HU?")]
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
    path = save(tmp_path / "c.nii", scan()[0].clip(-1000) + 1000)
    assert read_volume(path, contrast="cta").notes == ["holds no air, its lowest value is 0; is it in HU?"]


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
