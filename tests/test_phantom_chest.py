"""Chests in CT and CTA: iodine, files, difficulty."""

import json

import nibabel as nib
import numpy as np
import pytest

from data.phantom import make
from data.phantom.chest import chest_anatomy, chest_grid, draw_chest, draw_tree
from data.phantom.geometry import rng_for
from data.phantom.metabolic import CTA_ELSEWHERE, CTA_SITES, IODINE, cta_images
from data.phantom.physics import CHEST, render_ct
from scans import contents, look_up, psnr, pure

SUBJECTS = 24
BLOOD = ("right heart", "left heart", "aorta", "artery", "lung vein")


@pytest.fixture(scope="module")
def cta(tmp_path_factory):
    """The default set: folder, names, the truth."""
    folder = tmp_path_factory.mktemp("phantom") / "cta"
    make("cta", folder, subjects=SUBJECTS)
    truth = json.loads((folder / "phantom.json").read_text(encoding="utf-8"))["truth"]
    return folder, list(truth), truth


@pytest.fixture(scope="module")
def patient():
    """The second patient of the set in pixels of 2.6 mm."""
    return chest_anatomy(0, 1, chest_grid(128, 12), draw_chest(rng_for(0, 1, "traits")))


def read_all(folder, names, what):
    """(subjects, Z, X, Y)."""
    images = [np.asarray(nib.load(folder / name / f"{what}.nii.gz").dataobj) for name in names]
    return np.stack(images).transpose(0, 3, 1, 2)


# ---- Physics -----------------------------------------------------------------------------------------------------------

def test_ct_of_the_chest(patient):
    image = render_ct(patient, patient.traits["density"])
    hu = {name: image[pure(patient, name)].mean() for name in CHEST if pure(patient, name).any()}
    assert hu["gas"] == pytest.approx(-1000, abs=5) and hu["lung"] == pytest.approx(-850, abs=20)
    assert hu["gas"] < hu["lung"] - 100 < hu["fat"] - 500 < hu["muscle"] - 600 < hu["marrow"] - 700
    assert hu["marrow"] < hu["bone"] - 500
    soft = [hu[name] for name in (*BLOOD, "muscle", "myocardium", "liver")]
    assert max(soft) - min(soft) < 25  # without iodine, blood looks like muscle


def test_iodine_is_in_the_blood_only(patient):
    for scanner in CTA_SITES.values():
        ct, cta = (image.astype(float) for image in cta_images(0, 1, patient, scanner))
        gain = cta - ct
        for name in BLOOD:
            assert 250 < cta[pure(patient, name)].mean() < 420, name
        for name in CHEST:
            if name not in IODINE and pure(patient, name).sum() > 50:
                assert abs(gain[pure(patient, name)].mean()) < 6, name
        assert abs(gain[~patient.mask].mean()) < 3
        assert 30 < gain[pure(patient, "myocardium")].mean() < 90
        assert gain[pure(patient, "muscle")].mean() < 15


def test_noise_of_the_ct_scanners(patient):
    fat = pure(patient, "fat")
    for scanner in (*CTA_SITES.values(), *CTA_ELSEWHERE.values()):
        clean = render_ct(patient, patient.traits["density"] * scanner.mineral) + scanner.shift
        ct, cta = cta_images(0, 1, patient, scanner)
        assert (ct - clean)[fat].std() == pytest.approx(scanner.noise, rel=0.03)
        assert (cta - clean)[fat].std() == pytest.approx(scanner.angio_noise, rel=0.03)


def test_vessels_branch_outwards():
    for start in ((46, -8, -14), (-50, -14, -4)):
        branches = draw_tree(np.random.default_rng(0), start)
        assert len(branches) > 30
        assert branches[0][0] == (*start, 5.2)
        radii = [branch[0][3] for branch in branches]
        assert max(radii) == 5.2 and 0.8 < min(radii) < 1.4
        ends = np.array([branch[1][:3] for branch in branches])
        assert np.sign(start[0]) * ends[:, 0].mean() > abs(start[0]) + 20
        starts = {tuple(np.round(branch[0][:3], 6)) for branch in branches[1:]}
        assert starts <= {tuple(np.round(branch[1][:3], 6)) for branch in branches}     # nothing hangs in the air


def test_where_things_are_in_a_chest(patient):
    """The heart on the left, the liver on the right and below, the descending aorta behind."""
    axes = patient.grid.axes()
    weights = {name: patient.maps[name] for name in CHEST}

    def centre(name):
        total = weights[name].sum()
        return [(weights[name].sum(axis=tuple({0, 1, 2} - {k})) * axes[k]).sum() / total for k in range(3)]

    assert centre("left heart")[0] < -10 < centre("right heart")[0]
    assert centre("liver")[0] > 20 and centre("liver")[2] < centre("left heart")[2] - 20
    assert centre("coronary")[2] < centre("artery")[2]
    assert abs(centre("lung")[0]) < 25
    lowest = patient.maps["aorta"][:, :, 2]
    assert (lowest.sum(axis=0) * axes[1]).sum() / lowest.sum() < -35


# ---- Files -------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_layout_of_cta(cta):
    folder, names, truth = cta
    assert names == [f"CTA{k:03d}" for k in range(1, SUBJECTS + 1)]
    files = {f"{name}/{what}.nii.gz" for what in ("CT", "CTA") for name in names}
    assert set(contents(folder)) == files | {"phantom.json"}
    ct, angio = (nib.load(folder / names[0] / f"{what}.nii.gz") for what in ("CT", "CTA"))
    np.testing.assert_array_equal(ct.affine, angio.affine)
    for image in (ct, angio):
        assert image.shape == (64, 64, 12) and image.get_data_dtype() == np.int16
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    assert {of["site"] for of in truth.values()} == set(CTA_SITES)


@pytest.mark.slow
def test_cta_same_arguments_same_bytes(cta, tmp_path):
    make("cta", tmp_path / "few", subjects=2)
    make("cta", tmp_path / "other", subjects=2, seed=1)
    few, other, all_of_them = contents(tmp_path / "few"), contents(tmp_path / "other"), contents(cta[0])
    assert len(few) == 5
    for name in few:
        assert other[name] != few[name]
        assert name == "phantom.json" or few[name] == all_of_them[name]
    assert few["CTA001/CT.nii.gz"] != few["CTA002/CT.nii.gz"]


def test_same_chest_at_another_resolution():
    traits = draw_chest(rng_for(0, 2, "traits"))
    coarse, fine = (chest_anatomy(0, 2, chest_grid(size, 4), traits) for size in (48, 144))
    for name in ("muscle", "fat", "lung", "bone", "left heart"):
        blocks = fine.maps[name].reshape(48, 3, 48, 3, 4).mean(axis=(1, 3))
        assert blocks.sum() == pytest.approx(coarse.maps[name].sum(), rel=0.08)
        assert np.corrcoef(blocks.ravel(), coarse.maps[name].ravel())[0, 1] > 0.85


def test_chests_elsewhere(tmp_path):
    make("cta-external", tmp_path / "x", subjects=3)
    truth = json.loads((tmp_path / "x" / "phantom.json").read_text(encoding="utf-8"))["truth"]
    assert list(truth) == ["EXT001", "EXT002", "EXT003"]
    image = nib.load(tmp_path / "x" / "EXT001" / "CTA.nii.gz")
    assert image.header.get_zooms()[0] == pytest.approx(380 / 64)
    assert truth["EXT001"]["age"] != draw_chest(rng_for(0, 0, "traits"))["age"]


# ---- Difficulty --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_there_is_room_to_learn_on_cta(cta):
    """Most of a chest does not change, so copying is good. Knowing the tissue is much better."""
    folder, names, truth = cta
    source, target = (np.clip((read_all(folder, names, what) + 1000.0) / 2500, 0, 1) for what in ("CT", "CTA"))
    train, test = slice(0, 16), range(18, 24)
    aim = target[test]
    one_image = np.broadcast_to(target[train].mean(axis=(0, 1)), aim.shape)
    table = psnr(look_up(source[train], target[train], source[test]), aim)
    assert 31 < psnr(source[test], aim) < 36
    assert 16 < psnr(one_image, aim) < 21
    assert 32 < table < 37

    known = []
    for subject in test:
        anatomy = chest_anatomy(0, subject, chest_grid(64, 12), draw_chest(rng_for(0, subject, "traits")))
        added = sum(IODINE.get(name, 0) * anatomy.maps[name] for name in CHEST)
        known.append(source[subject] + added.transpose(2, 0, 1) / 2500)
    assert psnr(np.clip(np.stack(known), 0, 1), aim) > table + 3


def test_chests_fit_into_the_field():
    for subject in range(0, 24, 3):
        anatomy = chest_anatomy(0, subject, chest_grid(32, 12), draw_chest(rng_for(0, subject, "traits")))
        mask = anatomy.mask
        assert not (mask[:, 0].any() or mask[:, -1].any())
        np.testing.assert_allclose(sum(anatomy.maps.values())[mask], 1, atol=1e-5)
        assert 0.3 < mask.mean() < 0.65
