"""Breasts before and after contrast agent: physics, files, difficulty."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from data.phantom import make
from data.phantom.breast import breast_anatomy, breast_grid, draw_breast
from data.phantom.geometry import rng_for
from data.phantom.metabolic import BREAST_ELSEWHERE, BREAST_SITES, breast_images, coil_sensitivity
from data.phantom.physics import BREAST, TISSUES, render, signal, with_gadolinium
from scans import contents, look_up, one_voxel, psnr, pure

SUBJECTS = 24


@pytest.fixture(scope="module")
def breast(tmp_path_factory):
    """The default set: folder, names, the truth."""
    folder = tmp_path_factory.mktemp("phantom") / "breast"
    make("breast", folder, subjects=SUBJECTS)
    truth = json.loads((folder / "phantom.json").read_text(encoding="utf-8"))["truth"]
    return folder, list(truth), truth


@pytest.fixture(scope="module")
def woman():
    """The second woman of the set in pixels of 2.6 mm."""
    return breast_anatomy(0, 1, breast_grid(128, 12), draw_breast(rng_for(0, 1, "traits")))


def read_all(folder, names, what):
    """(subjects, Z, X, Y)."""
    images = [np.asarray(nib.load(folder / name / f"{what}.nii.gz").dataobj) for name in names]
    return np.stack(images).transpose(0, 3, 1, 2)


# ---- Physics -----------------------------------------------------------------------------------------------------------

def test_uptake_of_contrast_agent_by_hand():
    protocol = replace(BREAST_SITES["GE 3T"].protocol, dose=1.0)
    tumour = TISSUES["tumour"]
    shorter = with_gadolinium(tumour.t1[1], 2 * tumour.gd, 3.00)
    plain = replace(protocol, dose=0.0)
    by_hand = signal(tumour.pd, shorter, tumour.t2[1], 0.0, plain)
    assert render(one_voxel({"tumour": 1.0}), protocol, {"tumour": 2.0}).item() == pytest.approx(by_hand, rel=1e-6)
    assert render(one_voxel({"fat": 1.0}), protocol).item() == render(one_voxel({"fat": 1.0}), plain).item()


@pytest.mark.parametrize("scanner", [*BREAST_SITES.values(), *BREAST_ELSEWHERE.values()])
def test_what_takes_up_contrast_agent(scanner):
    """The tumour most of the breast, parenchyma a little, fat and bone not at all."""
    before, after = {}, {}
    for name in BREAST:
        voxel = one_voxel({name: 1.0})
        before[name] = render(voxel, scanner.protocol).item()
        after[name] = render(voxel, replace(scanner.protocol, dose=scanner.dose)).item()
    gain = {name: after[name] / before[name] - 1 for name in BREAST}
    assert gain["tumour"] > 0.6 and gain["vein"] > gain["tumour"]
    assert 0.02 < gain["parenchyma"] < 0.2 * gain["tumour"]
    assert gain["fat"] == gain["bone"] == gain["marrow"] == 0
    # Before the injection nobody can tell them apart by intensity.
    assert before["tumour"] / before["parenchyma"] == pytest.approx(1, abs=0.08)


def test_fat_is_suppressed_and_both_phases_share_one_scale(woman):
    for scanner in BREAST_SITES.values():
        pre, post = breast_images(0, 1, woman, scanner)
        sensitivity = coil_sensitivity(0, 1, woman.grid, scanner.shading)
        pre, post = pre / sensitivity, post / sensitivity
        fat = pure(woman, "fat")
        parenchyma = pure(woman, "parenchyma")
        assert pre[fat].mean() < 0.7 * pre[parenchyma].mean()
        # What takes up nothing has the same value in both, although the mean of the image rose.
        assert post[fat].mean() / pre[fat].mean() == pytest.approx(1, abs=0.01)
        assert post[woman.mask].mean() > 1.02 * pre[woman.mask].mean()


def test_enhancement_is_only_where_contrast_agent_goes(woman):
    scanner = BREAST_SITES["GE 3T"]
    pre, post = (image.astype(float) for image in breast_images(0, 1, woman, scanner))
    gain = (post - pre) / pre[woman.mask].mean()
    agents = ("tumour", "necrosis", "vein", "parenchyma", "myocardium", "muscle")
    none = woman.mask & (sum(woman.maps[name] for name in agents) == 0)
    noise = gain[~woman.mask].std() / np.sqrt(2 - np.pi / 2)    # in tissue; noise in air is Rayleigh's
    assert abs(gain[none].mean()) < 0.05 * noise and gain[none].std() == pytest.approx(noise, rel=0.05)
    tumour = pure(woman, "tumour")
    assert tumour.sum() > 10 and gain[tumour].mean() > 4 * noise
    assert gain[pure(woman, "vein")].mean() > 4 * noise
    assert 0 < gain[pure(woman, "parenchyma")].mean() < 0.3 * gain[tumour].mean()
    assert abs(gain[~woman.mask].mean()) < 0.05 * noise


# ---- Files -------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_layout_of_breast(breast):
    folder, names, truth = breast
    assert names == [f"Breast_MRI_{k:03d}" for k in range(1, SUBJECTS + 1)]
    files = {f"{name}/{what}.nii.gz" for what in ("pre", "post", "seg") for name in names}
    assert set(contents(folder)) == files | {"phantom.json"}
    images = [nib.load(folder / names[0] / f"{what}.nii.gz") for what in ("pre", "post", "seg")]
    for image in images:
        assert image.shape == (64, 64, 12) and nib.aff2axcodes(image.affine) == ("L", "P", "S")
        np.testing.assert_array_equal(image.affine, images[0].affine)
    assert [image.get_data_dtype() for image in images] == [np.int16, np.int16, np.uint8]
    assert {of["site"] for of in truth.values()} == set(BREAST_SITES)


@pytest.mark.slow
def test_tumours_of_the_breast_are_where_the_truth_says(breast):
    """In world coordinates, through the file's affine: a swapped side or axis cannot pass."""
    folder, names, truth = breast
    for name in names:
        tumour = truth[name]["tumour"]
        image = nib.load(folder / name / "seg.nii.gz")
        place = np.argwhere(np.asarray(image.dataobj) > 0)
        assert len(place) >= 5, name
        world = place @ image.affine[:3, :3].T + image.affine[:3, 3]
        away = np.linalg.norm(world - [tumour[axis] for axis in "xyz"], axis=1)
        assert np.median(away) < 1.2 * tumour["core"] + 5, name
        assert away.max() < 2.6 * tumour["core"] + 8, name


@pytest.mark.slow
def test_breast_same_arguments_same_bytes(breast, tmp_path):
    make("breast", tmp_path / "few", subjects=2)
    make("breast", tmp_path / "other", subjects=2, seed=1)
    few, other, all_of_them = contents(tmp_path / "few"), contents(tmp_path / "other"), contents(breast[0])
    assert len(few) == 7
    for name in few:
        assert other[name] != few[name]
        assert name == "phantom.json" or few[name] == all_of_them[name]
    assert few["Breast_MRI_001/pre.nii.gz"] != few["Breast_MRI_002/pre.nii.gz"]


def test_same_breasts_at_another_resolution():
    traits = draw_breast(rng_for(0, 2, "traits"))
    coarse, fine = (breast_anatomy(0, 2, breast_grid(size, 4), traits) for size in (48, 144))
    for name in ("muscle", "fat", "parenchyma", "lung"):
        blocks = fine.maps[name].reshape(48, 3, 48, 3, 4).mean(axis=(1, 3))
        assert blocks.sum() == pytest.approx(coarse.maps[name].sum(), rel=0.08)
        assert np.corrcoef(blocks.ravel(), coarse.maps[name].ravel())[0, 1] > 0.85


def test_breasts_elsewhere(tmp_path):
    make("breast-external", tmp_path / "x", subjects=3)
    truth = json.loads((tmp_path / "x" / "phantom.json").read_text(encoding="utf-8"))["truth"]
    assert list(truth) == ["UCSF-BR-01", "UCSF-BR-02", "UCSF-BR-03"]
    image = nib.load(tmp_path / "x" / "UCSF-BR-01" / "seg.nii.gz")
    assert image.header.get_zooms()[0] > 5.5 and np.asarray(image.dataobj).any()
    assert truth["UCSF-BR-01"]["age"] != draw_breast(rng_for(0, 0, "traits"))["age"]
    cores = [[draw_breast(rng_for(0, k, "traits"), mean)["tumour"]["core"] for k in range(200)] for mean in (12, 15)]
    assert np.mean(cores[1]) > np.mean(cores[0]) + 2


# ---- Difficulty --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_there_is_room_to_learn_on_the_breast(breast):
    """A model that knows the tissue is better than every function of the intensity before."""
    folder, names, truth = breast
    pre, post = (read_all(folder, names, what).astype(np.float32) for what in ("pre", "post"))
    high = np.array([1.5 * np.percentile(image, 99.5) for image in pre])[:, None, None, None]
    source, target = np.clip(pre / high, 0, 1), np.clip(post / high, 0, 1)
    train, test = slice(0, 16), range(18, 24)
    aim = target[test]
    one_image = np.broadcast_to(target[train].mean(axis=(0, 1)), aim.shape)
    table = psnr(look_up(source[train], target[train], source[test]), aim)
    assert 21 < psnr(source[test], aim) < 26
    assert 16 < psnr(one_image, aim) < 20
    assert 21 < table < 26

    # The truth without noise, from the anatomy, on the scale of the scan before the injection.
    known = []
    for subject in test:
        traits = draw_breast(rng_for(0, subject, "traits"))
        anatomy = breast_anatomy(0, subject, breast_grid(64, 12), traits)
        scanner = BREAST_SITES[truth[names[subject]]["site"]]
        before = render(anatomy, scanner.protocol)
        after = render(anatomy, replace(scanner.protocol, dose=scanner.dose))
        ratio = np.where(anatomy.mask, after / np.maximum(before, 1e-9), 1).transpose(2, 0, 1)
        known.append(np.clip(source[subject] * ratio, 0, 1))
    assert psnr(np.stack(known), aim) > table + 3

    # Before the injection, the intensity in the tumour is that of much else.
    seg = read_all(folder, names, "seg") > 0
    for k in range(0, SUBJECTS, 4):
        inside = np.median(source[k][seg[k]])
        similar = np.abs(source[k][~seg[k]] - inside) < 0.05
        assert similar.sum() > 3 * seg[k].sum()
