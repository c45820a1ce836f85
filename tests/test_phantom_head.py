"""The head and the set of IXI: anatomy, contrast, files, difficulty."""

import csv
import json
from datetime import date

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from data.intensities import normalise
from data.phantom import make
from data.phantom.geometry import rng_for, smooth_field
from data.phantom.head import SCALP_FIELD, TABLE, add_scalp, add_tumour, draw_traits, head_anatomy, head_grid, template_points
from data.phantom.physics import BRAIN, CODE, SCALP, TISSUES, render
from data.phantom.sets import ixi_anatomy, ixi_images, ixi_protocols
from scans import GRID, contents, psnr, pure

HEAD = head_grid(64, 12, SCALP_FIELD)  # of the default set ixi
SITES = ("Guys", "HH", "IOP")


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
def subject():
    """A tumour bearer of 70 years."""
    return head_anatomy(3, 0, GRID, age=70, tumour=True)


# ---- Anatomy ---------------------------------------------------------------------------------------------------------

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
    with_tumour = template_points(rng_for(0, 0, "warp"), axes, traits)[0].ravel()
    without = template_points(rng_for(0, 0, "warp"), axes, {"size": 1.0, "tumour": None})[0].ravel()
    # 10 mm from the centre lies what was 10 (1 - 0.3 exp(-100 / (2 * 15^2))) mm from it
    np.testing.assert_allclose(with_tumour - without, [10 * 0.3 * np.exp(-100 / 450), 0, -0.29933, 0], atol=2e-3)


def test_a_larger_head_is_the_same_head_magnified():
    axes = (np.array([-60.0, 20.0]), np.array([-50.0, 40.0]), np.array([25.0]))
    usual, large = (template_points(rng_for(0, 0, "warp"), axes, {"size": size, "tumour": None})
                    for size in (1.0, 1.1))
    for axis, centre in enumerate((0, -16, 10)):
        np.testing.assert_allclose((usual[axis] - centre) / (large[axis] - centre), 1.1, rtol=1e-4)


def test_oedema_spares_cortex_and_the_other_side():
    axis = np.arange(-39.5, 40)
    labels = np.full((80, 80, 80), CODE["wm"], np.uint8)
    labels[:, 40:] = CODE["gm"]
    tumour = {"x": 20.0, "y": 0.0, "z": 0.0, "core": 10.0, "rim": 4.0, "oedema": 14.0}
    add_tumour(np.random.default_rng(0), labels, (axis, axis, axis), tumour)
    assert (labels == CODE["enhancing"]).any() and (labels == CODE["necrosis"]).any()
    assert np.isin(labels[axis < 0], (CODE["wm"], CODE["gm"])).all()
    oedema = labels == CODE["oedema"]
    assert oedema[:, :40].sum() > 5 * oedema[:, 40:].sum() > 0  # 2 mm of cortex next to the core may swell


# ---- IXI -------------------------------------------------------------------------------------------------------------

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
    add_scalp(np.random.default_rng(0), labels, axes, points, height[:, None, None])
    names = [list(TISSUES)[code - 1] for code in labels.ravel()]
    assert set(names[:100]) == {"gm"} and names[-1] == "gm"  # neither the brain nor the air is painted
    skull = 2 * TABLE + 0.05 * names.count("marrow")
    runs = [name for k, name in enumerate(names) if name != "gm" and name != names[k - 1]]
    assert runs == [name for k, name in enumerate(expected) if k == 0 or name != expected[k - 1]]
    assert names.count("bone") * 0.05 == pytest.approx(2 * TABLE, abs=0.11) and 5 < skull < 12
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
