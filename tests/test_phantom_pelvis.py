"""The pelvis and its set: anatomy, contrast, files, difficulty."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from data.intensities import normalise
from data.layouts import find_layout
from data.phantom import make
from data.phantom.geometry import Grid, rng_for, smooth_field
from data.phantom.pelvis import draw_pelvis, pelvis_anatomy, pelvis_grid, pelvis_labels
from data.phantom.physics import CODE, PELVIS, render, render_ct
from data.phantom.sets import PELVIS_PROTOCOLS, pelvis_images
from scans import contents, look_up, psnr, pure


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
