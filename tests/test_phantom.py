"""Digital phantoms: signal equations by hand, contrast of tissues, geometry, determinism, difficulty of the set."""

import csv
import json
from dataclasses import replace
from datetime import date

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from data import phantom
from data.layouts import find_layout
from data.phantom import (
    BRAIN,
    CODE,
    PELVIS,
    PELVIS_PROTOCOLS,
    SCALP,
    SCALP_FIELD,
    TISSUES,
    Anatomy,
    Grid,
    Protocol,
    acquire,
    acquire_ct,
    at_field,
    brats_subject,
    draw_pelvis,
    draw_traits,
    ellipsoid,
    head_anatomy,
    head_grid,
    inversion_recovery,
    ixi_anatomy,
    ixi_images,
    ixi_protocols,
    make,
    null_time,
    pelvis_anatomy,
    pelvis_grid,
    pelvis_images,
    pelvis_labels,
    render,
    render_ct,
    rng_for,
    signal,
    smooth_field,
    spin_echo,
    spoiled_gradient_echo,
    tube,
    with_gadolinium,
)
from data.volumes import DataError, normalise

CONTRASTS = ("flair", "t1", "t1ce", "t2")
GRID = head_grid(48, 8)
HEAD = head_grid(64, 12, SCALP_FIELD)  # of the default set ixi
SITES = ("Guys", "HH", "IOP")
T1_SE = Protocol("se", tr=550, te=12)
T1_GRE = Protocol("gre", tr=10, te=4, flip=22)
T2 = Protocol("se", tr=4500, te=95)


@pytest.fixture(scope="module")
def brats(tmp_path_factory):
    """The default set, read back: folder, names, raw images (subject, contrast, X, Y, Z), labels, the truth."""
    folder = tmp_path_factory.mktemp("phantom") / "brats"
    make("brats", folder)
    truth = json.loads((folder / "phantom.json").read_text(encoding="utf-8"))["truth"]
    names = sorted(truth)

    def read(name, what):
        return np.asarray(nib.load(folder / name / f"{name}_{what}.nii.gz").dataobj)

    images = np.stack([np.stack([read(name, contrast) for contrast in CONTRASTS]) for name in names])
    labels = np.stack([read(name, "seg") for name in names])
    return folder, names, images, labels, truth


@pytest.fixture(scope="module")
def subject():
    """A tumour bearer of 70 years."""
    return head_anatomy(3, 0, GRID, age=70, tumour=True)


@pytest.fixture(scope="module")
def ixi(tmp_path_factory):
    """Seven subjects of the default grid: folder, names, the truth."""
    folder = tmp_path_factory.mktemp("phantom") / "ixi"
    make("ixi", folder, subjects=7)
    truth = json.loads((folder / "phantom.json").read_text(encoding="utf-8"))["truth"]
    return folder, list(truth), truth


@pytest.fixture(scope="module")
def head():
    """The second subject of ixi."""
    return ixi_anatomy(0, 1, HEAD)


@pytest.fixture(scope="module")
def pelvis(tmp_path_factory):
    """Eight subjects of the default grid: folder, names, the truth."""
    folder = tmp_path_factory.mktemp("phantom") / "pelvis"
    make("pelvis", folder, subjects=8)
    truth = json.loads((folder / "phantom.json").read_text(encoding="utf-8"))["truth"]
    return folder, list(truth), truth


@pytest.fixture(scope="module")
def man():
    """The second subject of pelvis in pixels of 2 mm, where the compact shell of a bone fills some of them."""
    return pelvis_anatomy(0, 1, pelvis_grid(192, 6))


def one_voxel(maps):
    """An anatomy of a single voxel with the textbook's tissue values."""
    ones = np.ones((1, 1, 1))
    return Anatomy(Grid((1, 1, 1), (1, 1, 1), (0, 0, 0)), ones > 0, {name: f * ones for name, f in maps.items()},
                   {name: (1, 1, 1) for name in maps}, np.ones((3, 1, 1, 1)), ones, np.zeros((1, 1, 1), np.uint8), {})


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def textbook(anatomy):
    """The same geometry without this subject's deviations from the tissue table."""
    return replace(anatomy, factors={name: (1, 1, 1) for name in TISSUES}, variation=np.ones_like(anatomy.variation),
                   texture=np.ones_like(anatomy.texture))


def pure(anatomy, name):
    return anatomy.maps[name] > 0.99


# ---- Physics --------------------------------------------------------------------------------------------------------

def test_signal_equations_by_hand():
    # 0.8 (1 - e^-0.5) e^-0.2 = 0.8 * 0.39346934 * 0.81873075
    assert spin_echo(0.8, 1000.0, 100.0, 500.0, 20.0) == pytest.approx(0.25771636, rel=1e-7)
    # 0.9 (1 - 2 e^-2 + e^-5) e^-1 = 0.9 * (1 - 0.27067057 + 0.00673795) * 0.36787944
    assert inversion_recovery(0.9, 1000.0, 100.0, 5000.0, 100.0, 2000.0) == pytest.approx(0.24370565, rel=1e-7)
    assert inversion_recovery(1.0, 1000.0, 100.0, 5000.0, 0.0, 100.0) == pytest.approx(1 - 1.80967484 + 0.00673795)
    # E1 = e^-0.01 = 0.99004983: 0.5 * 0.00995017 / (1 - 0.85740831) * e^-0.1
    assert spoiled_gradient_echo(1.0, 1000.0, 50.0, 10.0, 5.0, 30.0) == pytest.approx(0.03157016, rel=1e-6)
    # 1/T1' = 0.001 + 4 * 0.5 / 1000 = 0.003
    assert with_gadolinium(1000.0, 0.5, 4.0) == pytest.approx(1000 / 3)


def test_spoiled_gradient_echo_is_brightest_at_the_ernst_angle():
    angles = np.linspace(1, 60, 5901)
    best = angles[np.argmax(spoiled_gradient_echo(1.0, 900.0, 50.0, 10.0, 4.0, angles))]
    assert best == pytest.approx(np.rad2deg(np.arccos(np.exp(-10 / 900))), abs=0.011)


def test_null_time():
    assert null_time(4330.0, 1e9) == pytest.approx(4330 * np.log(2))
    null = null_time(4330.0, 9000.0)
    assert inversion_recovery(1.0, 4330.0, 2000.0, 9000.0, 100.0, null) == pytest.approx(0, abs=1e-12)
    assert inversion_recovery(1.0, 4330.0, 2000.0, 9000.0, 100.0, 2000.0) < 0


def test_field_strength():
    assert at_field((600, 900), 1.5) == pytest.approx(600)
    assert at_field((600, 900), 3.0) == pytest.approx(900)
    assert at_field((600, 900), 6.0) == pytest.approx(1350)


def test_signal_dispatches():
    assert signal(0.8, 1000.0, 100.0, 0.5, Protocol("se", 500, 20)) == pytest.approx(0.25771636)  # no dose, no effect
    assert signal(0.8, 1000.0, 100.0, 0.5, Protocol("se", 500, 20, dose=2)) == pytest.approx(
        0.8 * (1 - np.exp(-500 * (0.001 + 0.003))) * np.exp(-0.2))  # r1 = 3 at 3 T, C = 1 mM
    assert signal(0.9, 1000.0, 100.0, 0.0, Protocol("ir", 5000, 100, ti=2000)) == pytest.approx(0.24370565)
    # 1/T2* = 1/100 + 1.4 * 1.5 / 1000 = 0.0121 per ms; the rest as in the case by hand
    assert signal(1.0, 1000.0, 100.0, 0.0, Protocol("gre", 10, 5, flip=30, field=1.5)) == pytest.approx(
        0.03157016 * np.exp(0.1 - 5 * 0.0121), rel=1e-6)
    with pytest.raises(ValueError, match="epi"):
        signal(1.0, 1000.0, 100.0, 0.0, Protocol("epi", 10, 5))


def test_partial_volume_adds_before_the_magnitude():
    # At TI = 1000, TR = 9000, TE = 0: csf is still inverted, white matter (T1 838 at 3 T) has recovered.
    protocol = Protocol("ir", tr=9000, te=0, ti=1000)
    csf = 1 - 2 * np.exp(-1000 / 4330) + np.exp(-9000 / 4330)
    wm = 0.77 * (1 - 2 * np.exp(-1000 / 838) + np.exp(-9000 / 838))
    assert csf < 0 < wm
    assert render(one_voxel({"csf": 1.0}), protocol).item() == pytest.approx(-csf)
    assert render(one_voxel({"csf": 0.25, "wm": 0.75}), protocol).item() == pytest.approx(0.25 * csf + 0.75 * wm)


@pytest.mark.parametrize("field", [1.5, 3.0])
def test_contrast_of_tissues(subject, field):
    def level(protocol, name):
        return render(subject, replace(protocol, field=field))[pure(subject, name)].mean()

    flair = Protocol("ir", tr=9000, te=110, ti=null_time(4330, 9000))
    for t1 in (T1_SE, T1_GRE):
        assert level(t1, "wm") > 1.1 * level(t1, "gm") > 1.3 * level(t1, "csf")
        assert level(t1, "enhancing") < level(t1, "wm")
        assert level(replace(t1, dose=1), "enhancing") > 1.25 * level(replace(t1, dose=1), "wm")
    assert level(T2, "csf") > 1.3 * level(T2, "gm") > 1.5 * level(T2, "wm")
    assert level(flair, "gm") > level(flair, "wm") > 5 * level(flair, "csf")
    assert level(flair, "oedema") > 1.25 * level(flair, "gm")


def test_flair_nulls_csf_at_its_null_time_only(subject):
    plain = textbook(subject)
    csf, wm = pure(plain, "csf"), pure(plain, "wm")
    null = null_time(4330, 9000)
    image = render(plain, Protocol("ir", tr=9000, te=110, ti=null))
    assert image[csf].max() < 1e-6 < 0.05 < image[wm].min()
    for ti in (0.8 * null, 1.2 * null):
        image = render(plain, Protocol("ir", tr=9000, te=110, ti=ti))
        assert image[csf].min() > 0.5 * image[wm].max()


def test_protocols_of_the_set_give_their_contrast():
    for subject in range(6):
        anatomy, protocols, images = brats_subject(0, subject, GRID)
        clean = {contrast: render(anatomy, protocol) for contrast, protocol in protocols.items()}
        csf, gm, wm = (pure(anatomy, name) for name in ("csf", "gm", "wm"))
        for which in (clean, images):
            assert which["flair"][csf].mean() < 0.25 * which["flair"][wm].mean()
            assert which["t1"][wm].mean() > which["t1"][gm].mean() > 1.1 * which["t1"][csf].mean()
            assert which["t2"][csf].mean() > 1.3 * which["t2"][gm].mean() > 1.3 * which["t2"][wm].mean()
        assert protocols["t1"].dose == 0 < protocols["t1ce"].dose
        assert len({protocol.field for protocol in protocols.values()}) == 1  # one scanner, one magnet


def test_longer_te_follows_the_closed_form(subject):
    """ln(S1/S2) = (TE2 - TE1) / T2 in every pure voxel, with the T2 that this subject has there."""
    early, late = render(subject, T2), render(subject, replace(T2, te=135))
    for name, t2 in (("wm", 69), ("gm", 99), ("csf", 2000)):
        here = pure(subject, name)
        own = t2 * subject.factors[name][2] * (1 if name == "csf" else subject.variation[2][here])
        np.testing.assert_allclose(np.log(early[here] / late[here]), 40 / own, rtol=1e-3)


def test_longer_tr_follows_the_closed_form(subject):
    short, long = render(subject, T1_SE), render(subject, replace(T1_SE, tr=1100))
    here = pure(subject, "wm")
    own = 838 * subject.factors["wm"][1] * subject.variation[1][here]
    np.testing.assert_allclose(long[here] / short[here], 1 + np.exp(-550 / own), rtol=1e-5)  # (1 - e^-2x) / (1 - e^-x)


def test_lesion_texture_scales_relaxation_and_uptake():
    plain = one_voxel({"enhancing": 1.0})
    rough = replace(plain, texture=np.full((1, 1, 1), 1.2))
    rate = 1 / (1600 * 1.2) + 3.0 * 0.35 * 1.2 / 1000
    expected = 0.9 * (1 - np.exp(-550 * rate)) * np.exp(-12 / (120 * 1.2))
    assert render(rough, replace(T1_SE, dose=1)).item() == pytest.approx(expected, rel=1e-6)


def test_contrast_agent_changes_only_what_takes_it_up(subject):
    gain = render(subject, replace(T1_SE, dose=1)) - render(subject, T1_SE)
    inside = subject.mask
    bright = sum(subject.maps[name] for name in ("enhancing", "vein"))
    assert np.all(gain[pure(subject, "csf")] == 0) and np.all(gain[pure(subject, "oedema")] == 0)
    assert gain[pure(subject, "enhancing")].min() > 0.1
    assert gain[inside & (bright == 0)].max() < 0.04


def test_render_is_the_subject_not_the_scan(subject):
    np.testing.assert_array_equal(render(subject, T2), render(subject, T2))
    assert np.all(render(subject, T2)[~subject.mask] == 0)


def test_acquire_shading_noise_and_scale():
    rng = np.random.default_rng(0)
    image = np.zeros((60, 60, 60), np.float32)
    image[30:] = 2.0  # mean 1, so sigma is `noise`
    mask = np.ones(image.shape, bool)
    mask[:, :, 0] = False
    shading = np.where(np.arange(60) < 30, 1.5, 1.0)[None, :, None]
    seen = acquire(rng, image, mask, shading, 0.2, 700.0)
    assert seen[mask].mean() == pytest.approx(700, rel=1e-4)
    noise, bright, plain = seen[:30, :, 1:], seen[30:, :30, 1:], seen[30:, 30:, 1:]
    assert noise.std() / noise.mean() == pytest.approx(np.sqrt(4 / np.pi - 1), rel=0.02)  # Rayleigh where no signal
    assert plain.mean() / noise.mean() == pytest.approx((2 + 0.04 / 4) / (0.2 * np.sqrt(np.pi / 2)), rel=0.01)  # Rice
    assert plain.std() / plain.mean() == pytest.approx(0.1, rel=0.02)
    assert bright.mean() / plain.mean() == pytest.approx(1.5, rel=0.005)
    assert seen[:30, :, 0].mean() == pytest.approx(noise.mean(), rel=0.03)  # the mask sets the scale, it hides nothing


# ---- Fields, shapes, grids ------------------------------------------------------------------------------------------

def test_smooth_field_has_unit_variance_and_the_stated_scale():
    lattice = 8.0
    axis = np.arange(-120, 120, 1.0)
    sparse = axis[::7]  # 7 and 8 have no common factor, so every phase of the lattice is seen
    field = smooth_field(np.random.default_rng(1), lattice, (axis, sparse, sparse))
    assert abs(field.mean()) < 0.03
    assert field.std() == pytest.approx(1, abs=0.03)
    crossings = (np.diff(np.sign(field), axis=0) != 0).mean()  # per mm
    assert 1 / crossings == pytest.approx(2.66 * lattice, rel=0.03)  # Rice: pi sqrt(151 / 315 / (2 / 3)) lattices


def test_smooth_field_lies_still_in_the_world():
    fine = np.arange(-30, 30.1, 1.0)
    values = smooth_field(np.random.default_rng(2), 10, (fine, fine, fine))
    coarse = smooth_field(np.random.default_rng(2), 10, (fine[::-3], fine[::2], fine[5:6]))
    np.testing.assert_allclose(coarse, values[::-3, ::2, 5:6], atol=1e-5)
    assert np.abs(np.diff(values, n=2, axis=0)).max() < 0.1  # smooth across lattice planes too


def test_shapes_by_hand():
    at = [np.array([[[value]]], np.float32) for value in (5.0, 7.0, 0.0)]
    nodes = ((0, 0, 0, 2), (10, 0, 0, 4))
    assert tube(at, nodes).item() == pytest.approx(7 - 3)
    at = [np.array([[[value]]], np.float32) for value in (13.0, 0.0, 4.0)]
    assert tube(at, nodes).item() == pytest.approx(5 - 4)
    assert tube(at, ((0, 0, 0, 2), (10, 0, 0, 4), (10, 0, 10, 1))).item() == pytest.approx(3 - 2.8)
    assert ellipsoid(at, (1, 0, 4), (6, 1, 1)).item() == pytest.approx(2)


def test_grid_axes_agree_with_the_affine():
    grid = Grid((4, 5, 6), (-3, -2, 7), (40, 30, -10))
    x, y, z = grid.axes()
    np.testing.assert_allclose(grid.affine() @ (3, 4, 5, 1), (x[3], y[4], z[5], 1))
    fine = grid.axes(3)
    assert [len(axis) for axis in fine] == [12, 15, 6]
    np.testing.assert_allclose(fine[0][:4], (41, 40, 39, 38))
    np.testing.assert_allclose(fine[0].reshape(4, 3).mean(axis=1), x)
    assert nib.aff2axcodes(head_grid(64, 12).affine()) == ("L", "P", "S")
    x, y, z = head_grid(64, 12).axes()
    np.testing.assert_allclose([x.mean(), y.mean(), z.mean()], [0, -16, 27.5], atol=1e-9)


# ---- Anatomy --------------------------------------------------------------------------------------------------------

def test_tissue_fractions_sum_to_one_inside(subject):
    total = sum(subject.maps.values())
    np.testing.assert_allclose(total[subject.mask], 1, atol=1e-5)
    assert np.all(total[~subject.mask] == 0)
    assert min(fraction.min() for fraction in subject.maps.values()) >= 0
    assert 0.3 < (subject.maps["gm"][subject.mask] > 0).mean() < 0.9  # folded: grey matter is nearly everywhere near


def test_same_person_at_another_resolution():
    coarse, fine = (head_anatomy(1, 2, head_grid(size, 6), age=50, tumour=True) for size in (32, 96))
    for name in ("gm", "wm", "csf", "oedema", "enhancing"):
        blocks = fine.maps[name].reshape(32, 3, 32, 3, 6).mean(axis=(1, 3))
        assert blocks.sum() == pytest.approx(coarse.maps[name].sum(), rel=0.05)
        assert np.corrcoef(blocks.ravel(), coarse.maps[name].ravel())[0, 1] > 0.9


def test_age_widens_ventricles_and_shrinks_the_brain():
    x, y, z = GRID.axes()
    box = np.ix_(np.abs(x) < 25, (y > -30) & (y < 20), (z > 6) & (z < 25))  # below the fissure, inside of the insula
    ventricles, losses = [], []
    for subject in range(3):
        heads = [head_anatomy(0, subject, GRID, age=age, tumour=False) for age in (30, 40, 80)]
        csf = [head.maps["csf"][box].sum() for head in heads]
        ventricles.append((csf[2] / csf[1], csf[1] - csf[0]))
        brain = [sum(head.maps[name].sum() for name in ("gm", "wm", "deep", "pallidum", "gliosis")) for head in heads]
        losses.append((1 - brain[2] / brain[1]) / 40)
        np.testing.assert_array_equal(heads[0].mask, heads[2].mask)  # the skull does not shrink
        assert heads[2].traits["size"] == heads[0].traits["size"]
    assert all(1.5 < ratio < 4 and younger == 0 for ratio, younger in ventricles), ventricles
    assert 0.002 < np.mean(losses) < 0.004, losses  # 0.3 % a year


def test_traits_follow_their_stated_chances():
    drawn = [draw_traits(rng_for(0, subject, "traits")) for subject in range(1000)]
    tumours = [traits["tumour"] for traits in drawn if traits["tumour"]]
    assert len(tumours) / 1000 == pytest.approx(0.8, abs=0.04)
    assert np.mean([tumour["x"] > 0 for tumour in tumours]) == pytest.approx(0.5, abs=0.06)
    sizes = {sex: np.mean([t["size"] for t in drawn if t["sex"] == sex]) for sex in "MF"}
    assert sizes["M"] / sizes["F"] == pytest.approx(1.03 / 0.97, abs=0.005)
    ages = [traits["age"] for traits in drawn]
    assert 20 <= min(ages) < 22 and 83 < max(ages) <= 85
    forced = draw_traits(rng_for(0, 5, "traits"), age=33, tumour=False)
    assert forced == {**drawn[5], "age": 33.0, "tumour": None}


def test_tumour_pushes_its_surroundings_away():
    axes = (np.array([20.0, 30.0, 31.0, 140.0]), np.array([0.0]), np.array([20.0]))
    traits = {"size": 1.0, "tumour": {"x": 30.0, "y": 0.0, "z": 20.0, "core": 10.0, "push": 0.3}}
    with_tumour = phantom.template_points(rng_for(0, 0, "warp"), axes, traits)[0].ravel()
    without = phantom.template_points(rng_for(0, 0, "warp"), axes, {"size": 1.0, "tumour": None})[0].ravel()
    # 10 mm from the centre lies what was 10 (1 - 0.3 exp(-100 / (2 * 15^2))) mm from it
    np.testing.assert_allclose(with_tumour - without, [10 * 0.3 * np.exp(-100 / 450), 0, -0.29933, 0], atol=2e-3)


def test_a_larger_head_is_the_same_head_magnified():
    axes = (np.array([-60.0, 20.0]), np.array([-50.0, 40.0]), np.array([25.0]))
    usual, large = (phantom.template_points(rng_for(0, 0, "warp"), axes, {"size": size, "tumour": None})
                    for size in (1.0, 1.1))
    for axis, centre in enumerate((0, -16, 10)):
        np.testing.assert_allclose((usual[axis] - centre) / (large[axis] - centre), 1.1, rtol=1e-4)


def test_oedema_spares_cortex_and_the_other_side():
    axis = np.arange(-39.5, 40)
    labels = np.full((80, 80, 80), CODE["wm"], np.uint8)
    labels[:, 40:] = CODE["gm"]
    tumour = {"x": 20.0, "y": 0.0, "z": 0.0, "core": 10.0, "rim": 4.0, "oedema": 14.0}
    phantom.add_tumour(np.random.default_rng(0), labels, (axis, axis, axis), tumour)
    assert (labels == CODE["enhancing"]).any() and (labels == CODE["necrosis"]).any()
    assert np.isin(labels[axis < 0], (CODE["wm"], CODE["gm"])).all()
    oedema = labels == CODE["oedema"]
    assert oedema[:, :40].sum() > 5 * oedema[:, 40:].sum() > 0  # 2 mm of cortex next to the core may swell


# ---- The set on disk ------------------------------------------------------------------------------------------------

def test_layout_is_that_of_brats_2021(brats):
    folder, names, images, labels, truth = brats
    assert names == [f"BraTS2021_{k:05d}" for k in range(24)]
    assert sorted(p.name for p in folder.iterdir()) == [*names, "phantom.json"]
    files = sorted(p.name for p in (folder / names[7]).iterdir())
    assert files == [f"{names[7]}_{what}.nii.gz" for what in ("flair", "seg", "t1", "t1ce", "t2")]
    image = nib.load(folder / names[7] / f"{names[7]}_t1.nii.gz")
    assert image.shape == (64, 64, 12) and image.get_data_dtype() == np.int16
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    np.testing.assert_allclose(image.header.get_zooms(), (3, 3, 6.25))
    assert image.header.get_xyzt_units()[0] == "mm"
    assert set(np.unique(labels)) == {0, 1, 2, 4}
    note = json.loads((folder / "phantom.json").read_text(encoding="utf-8"))
    assert "synthetic" in note["note"] and (note["subjects"], note["seed"]) == (24, 0)
    assert set(truth[names[0]]["protocols"]) == set(CONTRASTS)


def test_tumours_are_where_the_truth_says(brats):
    """In world coordinates, through the file's affine: a swapped side or axis cannot pass."""
    folder, names, _, labels, truth = brats
    for k, name in enumerate(names):
        tumour = truth[name]["tumour"]
        assert (tumour is not None) == bool(labels[k].any())
        if tumour:
            affine = nib.load(folder / name / f"{name}_seg.nii.gz").affine
            core = np.argwhere(np.isin(labels[k], (1, 4)))
            centre = (affine @ np.append(core.mean(axis=0), 1))[:3]
            # sideways and lengthwise to 6 mm; slices are 6.25 mm apart, and the core may be cut by the hull
            assert np.all(np.abs(centre - [tumour[a] for a in "xyz"]) < (6, 6, 8)), name


def test_enhancing_rim_encloses_necrosis(brats):
    labels = brats[3]
    cross = np.zeros((3, 3, 3), bool)
    cross[:, 1, 1] = cross[1, :, 1] = True
    around = escaped = 0
    for volume in labels:
        necrosis = volume == 1
        shell = binary_dilation(necrosis, cross) & ~necrosis
        around += shell.sum()
        escaped += (shell & (volume != 4)).sum()
    assert around > 200
    assert escaped / around < 0.1  # the rest borders on the falx


def test_contrasts_share_one_geometry(brats):
    images = brats[2]
    masks = images > 0
    assert np.all(masks == masks[:, :1])  # the same voxels in every contrast, background exactly 0
    assert 0.35 < masks.mean() < 0.5
    other = [(masks[k, 0] ^ masks[k + 1, 0]).sum() / masks[k, 0].sum() for k in range(23)]
    assert min(other) > 0.02


def edges(image):
    inside = image > 0
    scaled = np.clip(image / np.percentile(image[inside], 99.5), 0, 1)
    slopes = np.gradient(scaled, axis=(0, 1))
    core = binary_dilation(~inside, iterations=3)
    return np.where(core, 0, np.hypot(*slopes))


def test_edges_of_contrasts_coincide_and_those_of_subjects_do_not(brats):
    images = brats[2].astype(np.float32)
    shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    for k in range(4):
        t1, t2, stranger = edges(images[k, 1]), edges(images[k, 3]), edges(images[k + 5, 3])
        match = [np.corrcoef(t1.ravel(), np.roll(t2, shift, (0, 1)).ravel())[0, 1] for shift in shifts]
        assert shifts[int(np.argmax(match))] == (0, 0) and max(match) > 0.7
        assert np.corrcoef(t1.ravel(), stranger.ravel())[0, 1] < max(match) - 0.25


def test_scanners_have_arbitrary_scales(brats):
    means = np.array([[image[image > 0].mean() for image in images] for images in brats[2]])
    assert means.max() / means.min() > 5
    assert means.max() < 1600 and means.min() > 140


def normalised(images):
    """Per volume by the 99.5th percentile of the foreground, then slices: (subjects, contrasts, Z, X, Y)."""
    high = np.array([[np.percentile(v[v > 0], 99.5) for v in subject] for subject in images])
    return np.clip(images / high[:, :, None, None, None], 0, 1).transpose(0, 1, 4, 2, 3)


def psnr(a, b):
    """Mean over subjects of the mean over slices, range 1. (subjects, Z, X, Y) each."""
    return (-10 * np.log10(((a - b) ** 2).mean(axis=(2, 3)))).mean()


def look_up(source, target, image):
    """The mean target at each of 64 source intensities, applied to `image`: what needs no anatomy."""
    def bins(x):
        return np.minimum((x * 64).astype(int), 63)

    total = np.bincount(bins(source).ravel(), target.ravel(), 64)
    count = np.bincount(bins(source).ravel(), minlength=64)
    return (total / np.maximum(count, 1))[bins(image)]


def test_there_is_room_to_learn(brats):
    u = normalised(brats[2])
    train, test = u[:16], u[18:]
    for target in range(4):
        sources = [s for s in range(4) if s != target]
        copy = max(psnr(test[:, s], test[:, target]) for s in sources)
        one_image = np.broadcast_to(train[:, target].mean(axis=(0, 1)), test[:, target].shape)
        by_slice = np.broadcast_to(train[:, target].mean(axis=0), test[:, target].shape)
        table = max(psnr(look_up(train[:, s], train[:, target], test[:, s]), test[:, target]) for s in sources)
        assert 13 < copy < 24, (CONTRASTS[target], copy)
        assert 14 < psnr(one_image, test[:, target]) < psnr(by_slice, test[:, target]) < 19.5, CONTRASTS[target]
        assert copy < table < 26, (CONTRASTS[target], table)


# ---- IXI ------------------------------------------------------------------------------------------------------------

def test_layout_is_that_of_ixi(ixi):
    folder, names, truth = ixi
    assert names == ["IXI002-Guys-0828", "IXI003-HH-0835", "IXI004-IOP-0842", "IXI005-Guys-0849", "IXI006-HH-0856",
                     "IXI007-IOP-0863", "IXI008-Guys-0870"]
    files = {f"IXI-{c}/{name}-{c}.nii.gz" for c in ("T1", "T2", "PD") for name in names}
    assert set(contents(folder)) == files | {"IXI.csv", "phantom.json"}
    axial = ("LPS", (64, 64, 12))
    for contrast, axes, shape in (("T1", "PSR", (64, 12, 64)), ("T2", *axial), ("PD", *axial)):
        image = nib.load(folder / f"IXI-{contrast}" / f"{names[0]}-{contrast}.nii.gz")
        assert "".join(nib.aff2axcodes(image.affine)) == axes and image.shape == shape
        assert image.get_data_dtype() == np.int16 and image.header.get_xyzt_units()[0] == "mm"
    assert all(of["tumour"] is None and of["site"] in name for name, of in truth.items())
    assert truth[names[1]]["protocols"]["t2"]["te"] == 100 and truth[names[1]]["protocols"]["pd"]["te"] == 8


def test_ixi_shares_one_geometry_once_reoriented(ixi, head):
    """Turned to RAS+, all three lie on one grid, and every voxel is the one that was rendered there."""
    folder, names, _ = ixi
    expected = ixi_images(0, 1, head, "HH")
    for contrast, image in expected.items():
        word = contrast.upper()
        turned = nib.as_closest_canonical(nib.load(folder / f"IXI-{word}" / f"{names[1]}-{word}.nii.gz"))
        np.testing.assert_array_equal(turned.affine, [[3.5, 0, 0, -110.25], [0, 3.5, 0, -126.25], [0, 0, 6.25, -6.875],
                                                      [0, 0, 0, 1]])
        np.testing.assert_array_equal(np.asarray(turned.dataobj), image[::-1, ::-1])


@pytest.mark.parametrize("site", SITES)
def test_contrast_of_ixi(head, site):
    """In the clean image and in the scan."""
    clean = {contrast: render(head, protocol) for contrast, protocol in ixi_protocols(site).items()}
    for images in (clean, ixi_images(0, 1, head, site)):
        t1, t2, pd = ({name: images[contrast][pure(head, name)].mean() for name in head.maps if pure(head, name).any()}
                      for contrast in ("t1", "t2", "pd"))
        assert t1["fat"] > 1.3 * t1["wm"] > 1.4 * t1["gm"] > 1.8 * t1["csf"]
        assert t2["csf"] > 1.5 * t2["gm"] > 1.8 * t2["wm"] > 1.8 * t2["muscle"]
        assert 1.5 * pd["wm"] > pd["gm"] > 1.05 * pd["wm"] < pd["csf"]
        assert t1["bone"] < 0.1 * t1["wm"] and pd["bone"] < 0.1 * pd["wm"]  # as dark as air


def test_ixi_protocols_follow_the_closed_form(head):
    """T2 and PD are two echoes of one TR: ln(PD / T2) = (TE2 - TE1) / T2 of white matter at the magnet's field."""
    here = pure(head, "wm")
    own = head.factors["wm"][2] * head.variation[2][here]
    for site, apart, t2 in (("Guys", 92, 72), ("HH", 92, 69), ("IOP", 71, 72)):
        protocols = ixi_protocols(site)
        late, early = (render(head, protocols[contrast])[here] for contrast in ("t2", "pd"))
        np.testing.assert_allclose(np.log(early / late), apart / (t2 * own), rtol=1e-3)
    guys, hh = ixi_protocols("Guys"), ixi_protocols("HH")
    assert (guys["t1"].tr, guys["t1"].te, guys["t1"].flip, guys["t1"].field) == (9.813, 4.603, 8, 1.5)
    assert (hh["t1"].tr, hh["t1"].te, hh["t1"].flip, hh["t1"].field) == (9.6, 4.6, 8, 3.0)
    assert (guys["t2"].tr, guys["pd"].te, hh["t2"].tr, hh["pd"].te) == (8178.34, 8, 5725.79, 8)


@pytest.mark.parametrize("y, z, expected", [(-16, 60, ["bone", "marrow", "bone", "fat", "muscle"]),
                                            (8, -12, ["bone", "bone", "muscle", "fat", "muscle"])])
def test_layers_of_the_scalp_from_inside_out(y, z, expected):
    height = np.arange(-5, 40, 0.05)
    points = [np.full((height.size, 1, 1), place, float) for place in (60, y, z)]
    labels = np.full((height.size, 1, 1), CODE["gm"], np.uint8)
    axes = (np.array([60.0]), np.array([y]), np.array([z]))
    phantom.add_scalp(np.random.default_rng(0), labels, axes, points, height[:, None, None])
    names = [list(TISSUES)[code - 1] for code in labels.ravel()]
    assert set(names[:100]) == {"gm"} and names[-1] == "gm"  # neither the brain nor the air is painted
    skull = 2 * phantom.TABLE + 0.05 * names.count("marrow")
    runs = [name for k, name in enumerate(names) if name != "gm" and name != names[k - 1]]
    assert runs == [name for k, name in enumerate(expected) if k == 0 or name != expected[k - 1]]
    assert names.count("bone") * 0.05 == pytest.approx(2 * phantom.TABLE, abs=0.11) and 5 < skull < 12
    assert 1.5 < 0.05 * names.count("fat") < 9.5


def test_the_scalp_leaves_the_brain_alone(head):
    bare = head_anatomy(0, 1, HEAD, tumour=False)
    rng = rng_for(0, 1, "tissue")  # drawn for the ten tissues of a stripped head, then for places, and nothing between
    drawn = [np.exp(rng.normal(0, (0.01, 0.03, 0.03))) for _ in BRAIN]
    assert head.factors["necrosis"] == drawn[9].tolist()
    np.testing.assert_allclose(head.variation[0], np.exp(0.015 * smooth_field(rng, 30, HEAD.axes())), rtol=1e-6)
    inside = sum(head.maps[name] for name in SCALP) == 0
    for name in BRAIN:
        np.testing.assert_array_equal(bare.maps[name][inside], head.maps[name][inside])
    assert not any(bare.maps[name].any() for name in SCALP)
    assert 1.3 < head.mask.sum() / bare.mask.sum() < 1.9


def test_heads_fit_into_the_field(ixi):
    for subject in range(7):
        mask = ixi_anatomy(0, subject, HEAD).mask
        assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
        assert 0.3 < mask.mean() < 0.55


def test_air_of_ixi_is_noise_of_the_site(head):
    air = ~binary_dilation(head.mask, iterations=3)
    for site, noise in (("Guys", 0.030), ("HH", 0.020), ("IOP", 0.045)):
        image = ixi_images(0, 1, head, site)["pd"]
        assert image[air].std() / image[air].mean() == pytest.approx(np.sqrt(4 / np.pi - 1), rel=0.05)  # Rayleigh
        assert image[air].mean() / image[head.mask].mean() == pytest.approx(noise * np.sqrt(np.pi / 2), rel=0.05)


def test_sheet_of_ixi_and_its_traps(ixi):
    folder, names, truth = ixi
    text = (folder / "IXI.csv").read_bytes().decode("utf-8")
    assert text.startswith('IXI_ID,"SEX_ID (1=m, 2=f)",HEIGHT,WEIGHT,ETHNIC_ID,MARITAL_ID,OCCUPATION_ID,'
                           'QUALIFICATION_ID,DOB,DATE_AVAILABLE,STUDY_DATE,AGE\n')
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["IXI_ID"] for row in rows] == ["2", "3", "4", "5", "7", "7", "8"]  # 6 is missing, 7 is there twice
    assert rows[4] == rows[5]
    assert [row["IXI_ID"] for row in rows if row["AGE"] == ""] == ["5"]
    for row in rows:
        name = next(name for name in names if name.startswith(f"IXI{int(row['IXI_ID']):03d}-"))
        assert row["SEX_ID (1=m, 2=f)"] == {"M": "1", "F": "2"}[truth[name]["sex"]]
        days = (date.fromisoformat(row["STUDY_DATE"]) - date.fromisoformat(row["DOB"])).days
        assert days / 365.25 == pytest.approx(truth[name]["age"], abs=0.002)
        if row["AGE"]:
            assert float(row["AGE"]) == pytest.approx(truth[name]["age"], abs=0.006)
    anatomy = ixi_anatomy(0, 2, HEAD)
    assert anatomy.traits["age"] == truth[names[2]]["age"]  # the head in the scan is as old as the sheet says


def test_hidden_contrast_is_in_the_target_only(head):
    """At three sites: the same T1 and PD, noise included; a T2 whose average over sites is a poor prediction."""
    seen = {site: ixi_images(0, 1, head, site, hidden=True) for site in SITES}
    for contrast in ("t1", "pd"):
        for site in SITES:
            np.testing.assert_array_equal(seen[site][contrast], seen["Guys"][contrast])
    t2 = np.stack([normalise(seen[site]["t2"].astype(np.float32))[0] for site in SITES])
    white = t2[:, pure(head, "wm")].mean(axis=1)
    assert white[0] > white[1] + 0.15 and white[1] > white[2] + 0.1
    best = -10 * np.log10(((t2 - t2.mean(axis=0)) ** 2).mean())  # of any prediction that ignores the site
    assert 18 < best < 21
    plain = {site: ixi_images(0, 1, head, site) for site in SITES}
    assert all(np.any(plain["HH"][contrast] != plain["Guys"][contrast]) for contrast in plain["HH"])


def test_hidden_set_on_disk(tmp_path, head):
    make("ixi-hidden", tmp_path / "set", subjects=3)
    truth = json.loads((tmp_path / "set" / "phantom.json").read_text(encoding="utf-8"))["truth"]
    assert [of["protocols"]["t2"]["te"] for of in truth.values()] == [40, 90, 160]
    assert len({json.dumps([of["protocols"]["t1"], of["protocols"]["pd"]]) for of in truth.values()}) == 1
    expected = ixi_images(0, 1, head, "HH", hidden=True)
    for contrast in ("t2", "pd"):
        path = tmp_path / "set" / f"IXI-{contrast.upper()}" / f"IXI003-HH-0835-{contrast.upper()}.nii.gz"
        np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), expected[contrast])


def test_ixi_same_arguments_same_bytes(ixi, tmp_path):
    make("ixi", tmp_path / "few", subjects=2)
    make("ixi", tmp_path / "other", subjects=2, seed=1)
    few, other, seven = contents(tmp_path / "few"), contents(tmp_path / "other"), contents(ixi[0])
    assert len(few) == 8
    for name in few:
        assert other[name] != few[name]
        assert name in ("IXI.csv", "phantom.json") or few[name] == seven[name]
    assert seven["IXI.csv"].startswith(few["IXI.csv"])


def test_there_is_room_to_learn_on_ixi(ixi):
    folder, names, _ = ixi
    u = np.stack([np.stack([normalise(nib.as_closest_canonical(nib.load(
        folder / f"IXI-{c}" / f"{name}-{c}.nii.gz")).get_fdata(dtype=np.float32))[0] for c in ("T1", "T2", "PD")])
        for name in names]).transpose(1, 0, 4, 2, 3)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert 12.5 < psnr(u[a], u[b]) < 17
    for target in u:
        assert 13 < psnr(np.broadcast_to(target[:5].mean(axis=0), target[5:].shape), target[5:]) < 19


# ---- Pelvis ---------------------------------------------------------------------------------------------------------

def read_pelvis(folder, name, contrast):
    """Turned to RAS+."""
    return nib.as_closest_canonical(nib.load(folder / name / f"{contrast}.nii.gz"))


def test_layout_is_that_of_the_pelvis(pelvis):
    folder, names, truth = pelvis
    assert names == ["1_01_P", "2_01_P", "3_01_P", "1_02_P", "2_02_P", "3_02_P", "1_03_P", "2_03_P"]
    files = {f"{name}/{contrast}.nii.gz" for contrast in ("T1", "T2", "CT") for name in names}
    assert set(contents(folder)) == files | {"meta.csv", "phantom.json"}
    for contrast in ("T1", "T2", "CT"):
        image = nib.load(folder / names[0] / f"{contrast}.nii.gz")
        assert image.shape == (64, 64, 12) and image.get_data_dtype() == np.int16
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S") and image.header.get_zooms() == (6, 6, 8)
    layout = find_layout(folder)
    assert layout.contrasts == ("t1", "t2", "ct") and not layout.ignored
    assert [subject.name for subject in layout.subjects] == sorted(names)
    assert [of["scanner"] for of in truth.values()][:4] == [*PELVIS_PROTOCOLS, "GE 3T"]
    assert truth[names[1]]["protocols"]["t2"]["te"] == 86


def test_sheet_of_the_pelvis(pelvis):
    folder, names, truth = pelvis
    text = (folder / "meta.csv").read_bytes().decode("utf-8")
    assert text.startswith("patient,age,sex,scanner,body\n1_01_P,")
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["patient"] for row in rows] == names
    assert [row["patient"] for row in rows if row["age"] == ""] == [names[3]]  # of 24, every fifth from here
    for row in rows:
        of = truth[row["patient"]]
        assert row["sex"] == of["sex"] == "M" and row["scanner"] == of["scanner"]
        assert row["age"] == "" or abs(float(row["age"]) - of["age"]) <= 0.5


def test_pelvis_on_disk_is_what_was_rendered(pelvis):
    """One grid, the same voxels; with the truth's own density, and the scanner that the sheet names."""
    folder, names, truth = pelvis
    anatomy = pelvis_anatomy(0, 1, pelvis_grid(64, 12))
    assert {**anatomy.traits, "scanner": "Siemens 1.5T"}.items() <= truth[names[1]].items()
    for contrast, image in pelvis_images(0, 1, anatomy, "Siemens 1.5T").items():
        turned = read_pelvis(folder, names[1], contrast.upper())
        np.testing.assert_array_equal(turned.affine, [[6, 0, 0, -189], [0, 6, 0, -203], [0, 0, 8, -36], [0, 0, 0, 1]])
        np.testing.assert_array_equal(np.asarray(turned.dataobj), image[::-1, ::-1])


def test_ct_by_hand():
    # fat 1 - 0.1 = 0.9, bone 1 + 1.3 * 0.8 = 2.04: a quarter of bone makes 0.675 + 0.51 = 1.185
    mixed = one_voxel({"fat": 0.75, "bone": 0.25})
    assert render_ct(mixed, 0.8).item() == pytest.approx(185, abs=0.01)
    marrow = replace(one_voxel({"marrow": 1.0}), texture=np.full((1, 1, 1), 1.5))
    assert render_ct(marrow, 0.8).item() == pytest.approx(220 * 0.8 * 1.5, abs=0.01)
    dense = replace(one_voxel({"muscle": 1.0}), variation=np.array([1.02, 5, 7]).reshape(3, 1, 1, 1))
    assert render_ct(dense, 0.8).item() == pytest.approx(1.055 * 1.02 * 1000 - 1000, abs=0.01)
    empty = one_voxel({"muscle": 0.0})
    assert render_ct(empty, 1.0).item() == -1000


def test_ct_noise_and_limits():
    levels = np.repeat(np.array([-1000.0, 0.0, 3070.0]), 20000)
    air, water, metal = acquire_ct(np.random.default_rng(0), levels, 20.0).reshape(3, -1)
    assert water.dtype == np.int16 and water.mean() == pytest.approx(0, abs=0.5)
    assert water.std() == pytest.approx(20, rel=0.02)
    assert air.min() == -1024 and metal.max() == 3071
    assert (air == -1024).mean() == pytest.approx(0.12, abs=0.01)  # the normal tail below -23.5 / 20


def test_ct_of_tissues(man):
    image = render_ct(man, man.traits["density"])
    assert np.all(image[~man.mask] == -1000)
    hu = {name: image[pure(man, name)].mean() for name in PELVIS if pure(man, name).any()}
    assert hu["gas"] == pytest.approx(-1000, abs=5) and hu["fat"] == pytest.approx(-100, abs=15)
    assert hu["urine"] == pytest.approx(5, abs=25) and hu["muscle"] == pytest.approx(55, abs=15)
    assert hu["gas"] + 500 < hu["fat"] < hu["urine"] - 50 < hu["muscle"] - 70
    assert hu["muscle"] + 100 < hu["marrow"] < hu["bone"] - 700
    assert hu["bone"] == pytest.approx(1300 * man.traits["density"], abs=50)


@pytest.mark.parametrize("scanner", PELVIS_PROTOCOLS)
def test_contrast_of_the_pelvis(man, scanner):
    """In the clean image and in the scan. Compact bone and gas are equally black in MR, and 2000 HU apart in CT."""
    clean = {contrast: render(man, protocol) for contrast, protocol in PELVIS_PROTOCOLS[scanner].items()}
    scan = pelvis_images(0, 1, man, scanner)
    for images in (clean, scan):
        t1, t2 = ({name: images[contrast][pure(man, name)].mean() for name in man.maps if pure(man, name).any()}
                  for contrast in ("t1", "t2"))
        assert t1["fat"] > 1.15 * t1["marrow"] > 1.15 * t1["muscle"] > 1.2 * t1["urine"]
        assert t2["urine"] > 1.2 * t2["glands"] > 1.4 * t2["prostate"] > 1.5 * t2["muscle"]
        assert t2["fat"] > 1.15 * t2["marrow"] > 1.5 * t2["muscle"]
        for mr in (t1, t2):
            assert max(mr["bone"], mr["gas"]) < 0.2 * mr["fat"] and abs(mr["bone"] - mr["gas"]) < 0.08 * mr["fat"]
    assert scan["ct"][pure(man, "bone")].mean() > scan["ct"][pure(man, "gas")].mean() + 2000


def test_noise_of_the_sites(man):
    air = ~binary_dilation(man.mask, iterations=3)
    for scanner, noise, ct_noise in (("GE 3T", 0.030, 12), ("Siemens 1.5T", 0.045, 18), ("Siemens 3T", 0.025, 26)):
        images = pelvis_images(0, 1, man, scanner)
        t1, ct = images["t1"], images["ct"]
        assert t1[air].std() / t1[air].mean() == pytest.approx(np.sqrt(4 / np.pi - 1), rel=0.05)  # Rayleigh
        assert t1[air].mean() / t1[man.mask].mean() == pytest.approx(noise * np.sqrt(np.pi / 2), rel=0.09)
        assert (ct - render_ct(man, man.traits["density"]))[man.mask].std() == pytest.approx(ct_noise, rel=0.02)


def test_where_things_are_in_a_pelvis(pelvis):
    """In world coordinates, through the file's affine: a swapped side or axis cannot pass."""
    folder, names, _ = pelvis
    for k, name in list(enumerate(names))[::3]:
        anatomy = pelvis_anatomy(0, k, pelvis_grid(64, 12))
        affine = nib.load(folder / name / "CT.nii.gz").affine

        def centre(tissue, anatomy=anatomy, affine=affine):
            weights = anatomy.maps[tissue]
            middle = np.array([(index * weights).sum() for index in np.indices(weights.shape)]) / weights.sum()
            return (affine @ np.append(middle, 1))[:3]

        urine, prostate, gas, glands = (centre(tissue) for tissue in ("urine", "prostate", "gas", "glands"))
        assert urine[2] > prostate[2] + 15               # the bladder stands on the prostate,
        assert min(urine[1], prostate[1]) > gas[1] + 25  # the rectum lies behind both
        assert prostate[1] > glands[1] + 5               # and the outer zone behind the inner
        assert np.abs([urine[0], prostate[0], gas[0]]).max() < 15
        here = np.linalg.inv(affine) @ np.array([[88, 0, 0, 1], [-88, 0, 0, 1]]).T
        bony = anatomy.maps["bone"] + anatomy.maps["marrow"]
        for x, y, z in np.rint(here[:3].T).astype(int):  # both femoral heads
            assert bony[x - 2:x + 3, y - 2:y + 3, z].mean() > 0.8


def test_pelvis_contrasts_share_edges_and_subjects_do_not(pelvis):
    folder, names, _ = pelvis

    def slopes(name, contrast):
        image = np.asarray(read_pelvis(folder, name, contrast).dataobj, np.float32)
        return np.hypot(*np.gradient(image / np.percentile(image, 99.5), axis=(0, 1))).ravel()

    shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    for k in range(3):
        t1, stranger = slopes(names[k], "T1"), slopes(names[k + 3], "CT")
        for contrast in ("T2", "CT"):
            other = slopes(names[k], contrast).reshape(64, 64, 12)
            match = [np.corrcoef(t1, np.roll(other, shift, (0, 1)).ravel())[0, 1] for shift in shifts]
            assert shifts[int(np.argmax(match))] == (0, 0) and max(match) > 0.5
        assert np.corrcoef(t1, stranger)[0, 1] < max(match) - 0.15


def test_bladder_and_prostate_hold_their_volume():
    grid = Grid((32, 32, 32), (-5, -5, 5), (77.5, 77.5, -65))  # higher and lower than the set, and narrower
    traits = draw_pelvis(rng_for(0, 0, "traits"))

    def volumes(**given):  # ml; 3 x 3 points in a voxel of 5 x 5 x 5 mm
        labels = pelvis_labels(0, 0, grid.axes(3), {**traits, "size": 1.0, "depth": 1.0, **given})
        return {name: 0.125 / 9 * (labels == CODE[name]).sum() for name in ("urine", "prostate", "glands")}

    small, large = volumes(bladder=80, prostate=20), volumes(bladder=240, prostate=80)
    assert small["urine"] == pytest.approx(80, rel=0.1) and large["urine"] == pytest.approx(240, rel=0.1)
    gain = sum(large[name] - small[name] for name in ("prostate", "glands"))  # the vesicles are in both
    assert gain == pytest.approx(60, rel=0.15)


def test_rectal_gas_lies_in_front_of_stool(man):
    y = np.broadcast_to(man.grid.axes()[1][None, :, None], man.grid.shape)
    gas, stool = man.maps["gas"], man.maps["stool"]
    assert (y * gas).sum() / gas.sum() > (y * stool).sum() / stool.sum() + 4


def test_traits_of_pelves():
    drawn = [draw_pelvis(rng_for(0, subject, "traits")) for subject in range(1500)]
    age = np.array([of["age"] for of in drawn])
    assert 52 <= age.min() < 53 and 83 < age.max() <= 84
    slope, level = np.polyfit(age - 68, [of["density"] for of in drawn], 1)
    assert slope == pytest.approx(-0.008, abs=0.001) and level == pytest.approx(1, abs=0.01)
    assert np.corrcoef(age, [of["prostate"] for of in drawn])[0, 1] > 0.4
    assert 9 <= min(of["fat"] for of in drawn) and max(of["fat"] for of in drawn) <= 26


def test_density_of_bone_is_seen_in_ct_only(man):
    assert np.all(render_ct(man, 1.1)[pure(man, "bone")] > render_ct(man, 1.0)[pure(man, "bone")] + 100)
    soft = man.maps["bone"] + man.maps["marrow"] == 0
    np.testing.assert_array_equal(render_ct(man, 1.1)[soft], render_ct(man, 1.0)[soft])


def test_same_pelvis_at_another_resolution():
    coarse, fine = (pelvis_anatomy(0, 2, pelvis_grid(size, 4)) for size in (48, 144))
    for name in ("muscle", "fat", "urine", "marrow"):
        blocks = fine.maps[name].reshape(48, 3, 48, 3, 4).mean(axis=(1, 3))
        assert blocks.sum() == pytest.approx(coarse.maps[name].sum(), rel=0.06)
        assert np.corrcoef(blocks.ravel(), coarse.maps[name].ravel())[0, 1] > 0.9


def test_pelves_fit_into_the_field():
    total = []
    for subject in range(24):
        anatomy = pelvis_anatomy(0, subject, pelvis_grid(32, 3))
        mask = anatomy.mask
        assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
        np.testing.assert_allclose(sum(anatomy.maps.values())[mask], 1, atol=1e-5)
        total.append(mask.mean())
    assert 0.3 < min(total) and max(total) < 0.55
    wide = smooth_field(np.random.default_rng(0), 10, (np.array([165.0, 185.0]), np.zeros(1), np.zeros(1)), 200.0)
    assert abs(wide[0] - wide[1]).item() > 0.01  # the field varies as far out as hips reach
    assert np.all(anatomy.variation[:, 0] != anatomy.variation[:, 1])  # and so do the tissues


def test_pelvis_same_arguments_same_bytes(pelvis, tmp_path):
    make("pelvis", tmp_path / "few", subjects=2)
    make("pelvis", tmp_path / "other", subjects=2, seed=1)
    few, other, eight = contents(tmp_path / "few"), contents(tmp_path / "other"), contents(pelvis[0])
    assert len(few) == 8
    for name in few:
        assert other[name] != few[name]
        assert name in ("meta.csv", "phantom.json") or few[name] == eight[name]
    assert eight["meta.csv"].startswith(few["meta.csv"])


def test_there_is_room_to_learn_on_the_pelvis(pelvis):
    folder, names, _ = pelvis

    def read(name, contrast):
        image = read_pelvis(folder, name, contrast).get_fdata(dtype=np.float32)
        return np.clip((image + 1000) / 2500, 0, 1) if contrast == "CT" else normalise(image)[0]

    u = np.stack([[read(name, c) for c in ("T1", "T2", "CT")] for name in names]).transpose(1, 0, 4, 2, 3)
    train, test = u[:, :6], u[:, 6:]
    for source, target, low, high in ((1, 2, 21, 24), (0, 2, 22, 26), (2, 1, 17, 22)):
        assert 11 < psnr(test[source], test[target]) < 17
        by_slice = psnr(np.broadcast_to(train[target].mean(axis=0), test[target].shape), test[target])
        assert low - 2 < by_slice < high
        assert low < psnr(look_up(train[source], train[target], test[source]), test[target]) < high


# ---- Making a set ---------------------------------------------------------------------------------------------------

def test_same_arguments_same_bytes(tmp_path):
    make("brats", tmp_path / "a", subjects=2, size=32, slices=3, seed=4)
    make("brats", tmp_path / "deep" / "b", subjects=2, size=32, slices=3, seed=4)
    make("brats", tmp_path / "more", subjects=3, size=32, slices=3, seed=4)
    make("brats", tmp_path / "other", subjects=2, size=32, slices=3, seed=5)
    a, b, more, other = (contents(tmp_path / name) for name in ("a", "deep/b", "more", "other"))
    assert a == b and len(a) == 11
    assert all(more[name] == data for name, data in a.items() if name != "phantom.json")  # subjects do not depend on n
    assert all(other[name] != data for name, data in a.items() if "seg" not in name)
    name = "BraTS2021_00000/BraTS2021_00000_t1.nii.gz"
    levels = [np.asarray(nib.load(tmp_path / which / name).dataobj) for which in ("a", "other")]
    levels = [image[image > 0].mean() for image in levels]
    assert abs(levels[0] / levels[1] - 1) > 0.05  # another seed is another scanner, too
    assert a["BraTS2021_00000/BraTS2021_00000_t1.nii.gz"] != a["BraTS2021_00001/BraTS2021_00001_t1.nii.gz"]
    for name, data in a.items():
        if name.endswith(".gz"):
            assert data[3] == 0 and data[4:8] == bytes(4), name  # no file name, no time


def test_existing_folder_is_refused(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "brats"
    folder.mkdir()
    with pytest.raises(DataError, match="exists already") as caught:
        make("brats", folder, subjects=1, size=16, slices=1)
    assert "\n" not in str(caught.value) and not list(folder.iterdir())
    arguments = ["brats", str(folder), "--subjects", "1", "--size", "16", "--slices", "1"]
    monkeypatch.setattr("sys.argv", ["phantom", *arguments])
    assert phantom.main() == 1
    assert capsys.readouterr().err.count("\n") == 1
    folder.rmdir()
    assert phantom.main() == 0
    assert nib.load(folder / "BraTS2021_00000" / "BraTS2021_00000_t2.nii.gz").shape == (16, 16, 1)


@pytest.mark.parametrize("wrong", [{"name": "brain"}, {"subjects": 0}, {"slices": 0}, {"size": 8}, {"seed": -1}])
def test_impossible_requests(tmp_path, wrong):
    arguments = {"name": "brats", "subjects": 1, "size": 16, "slices": 1, **wrong}
    with pytest.raises(DataError, match="brats") as caught:
        make(arguments.pop("name"), tmp_path / "x", **arguments)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_interrupted_making_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(path, array, grid):
        if "00001" in path.name:
            assert not (tmp_path / "brats").exists()  # nothing under the final name until all is there
            raise KeyboardInterrupt
        path.write_bytes(b"")

    monkeypatch.setattr(phantom, "write_nifti", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make("brats", tmp_path / "brats", subjects=2, size=16, slices=1)
    assert not list(tmp_path.iterdir())


def test_two_makers_at_once(tmp_path, monkeypatch):
    """The slower of two processes finds the same set finished, which is fine, or something else, which is not."""
    def meanwhile(note):
        def write(folder, subjects, size, slices, seed):
            (tmp_path / "brats").mkdir()
            (tmp_path / "brats" / "phantom.json").write_bytes(note)
            return {}
        return write

    monkeypatch.setattr(phantom, "SETS", {"brats": lambda *_: {}})
    make("brats", tmp_path / "twin")
    for note, refused in (((tmp_path / "twin" / "phantom.json").read_bytes(), False), (b"{}", True)):
        monkeypatch.setattr(phantom, "SETS", {"brats": meanwhile(note)})
        if refused:
            with pytest.raises(DataError, match="appeared"):
                make("brats", tmp_path / "brats")
        else:
            make("brats", tmp_path / "brats")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["brats", "twin"]
        (tmp_path / "brats" / "phantom.json").unlink()
        (tmp_path / "brats").rmdir()


def test_codes_are_the_order_of_the_table():
    assert CODE["csf"] == 1 and list(CODE) == list(TISSUES) and 0 not in CODE.values()
