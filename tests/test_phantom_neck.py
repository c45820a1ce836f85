"""Head and neck in PET/CT: uptake, contrast, files, labels, difficulty."""

import csv
import json
from functools import cache

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation, gaussian_filter, map_coordinates

from data.layouts import find_layout
from data.phantom import make
from data.phantom.geometry import Grid, rng_for
from data.phantom.metabolic import (
    PETCT_ELSEWHERE,
    PETCT_SITES,
    coarser_mask,
    finer,
    petct_images,
    petct_traits,
    petct_uptake,
)
from data.phantom.neck import SITES, draw_organs, neck_anatomy, neck_grid, place_in_world
from data.phantom.physics import NECK, TISSUES, acquire_pet, render_ct, render_pet
from scans import contents, look_up, one_voxel, psnr, pure

SUBJECTS = 24
TEST = range(18, 24)


@cache
def anatomy_of(subject):
    """A patient of the default set on the grid of CT."""
    return neck_anatomy(0, subject, finer(neck_grid(64, 12), 2), petct_traits(0, subject))


@pytest.fixture(scope="module")
def petct(tmp_path_factory):
    """The default set: folder, names, the truth."""
    folder = tmp_path_factory.mktemp("phantom") / "petct"
    make("petct", folder, subjects=SUBJECTS)
    truth = json.loads((folder / "phantom.json").read_text(encoding="utf-8"))["truth"]
    return folder, list(truth), truth


@pytest.fixture(scope="module")
def patient():
    return anatomy_of(0)


@pytest.fixture(scope="module")
def scans(petct):
    """CT on the grid of PET, PET, and seg of all patients: (subjects, Z, X, Y) each, HU and SUV."""
    folder, names, _ = petct
    read = {"CT": [], "PET": [], "seg": []}
    for name in names:
        ct, pet, seg = (nib.load(folder / name / f"{what}.nii.gz") for what in read)
        to_ct = np.linalg.inv(ct.affine) @ pet.affine
        places = to_ct[:3, :3] @ np.indices(pet.shape).reshape(3, -1) + to_ct[:3, 3:]
        resampled = map_coordinates(np.asarray(ct.dataobj, np.float32), places, order=1, mode="nearest")
        read["CT"].append(resampled.reshape(pet.shape))
        read["PET"].append(np.asarray(pet.dataobj))
        read["seg"].append(np.asarray(seg.dataobj))
    return tuple(np.stack(images).transpose(0, 3, 1, 2) for images in read.values())


# ---- Physics -----------------------------------------------------------------------------------------------------------

def test_uptake_by_hand():
    mixed = one_voxel({"gm": 0.5, "muscle": 0.25, "fat": 0.25})
    assert render_pet(mixed, {}).item() == pytest.approx(0.5 * 8 + 0.25 * 0.7 + 0.25 * 0.25)
    assert render_pet(mixed, {"muscle": 2.0}).item() == pytest.approx(4 + 0.25 * 1.4 + 0.25 * 0.25)
    assert render_pet(one_voxel({"gas": 1.0}), {}).item() == 0
    assert TISSUES["gm"].suv / TISSUES["wm"].suv == 4


def test_added_hounsfield_units_by_hand():
    mixed = one_voxel({"vein": 0.5, "fat": 0.5})
    assert render_ct(mixed, 1.0).item() == pytest.approx((45 - 100) / 2, abs=1e-3)
    assert render_ct(mixed, 1.0, {"vein": 300}).item() == pytest.approx((345 - 100) / 2, abs=1e-3)


def test_blur_of_pet_has_the_stated_width():
    """The image of a point, without noise: its variance is that of a Gaussian and of the pixel."""
    grid = Grid((96, 96, 1), (1.0, 1.0, 10.0), (0, 0, 0))
    point = np.zeros(grid.shape, np.float32)
    point[48, 48] = 1000
    image = acquire_pet(np.random.default_rng(0), point, grid, 6.0, 0.0, 2)
    assert image.shape == (48, 48, 1) and 4 * image.sum() == pytest.approx(1000, rel=1e-4)
    profile = image.sum(axis=(1, 2))
    place = 2.0 * np.arange(48)
    variance = (profile * place ** 2).sum() / profile.sum() - ((profile * place).sum() / profile.sum()) ** 2
    assert np.sqrt(8 * np.log(2) * (variance - 4 / 12)) == pytest.approx(6.0, rel=0.02)


def test_noise_of_pet_grows_with_the_signal():
    grid = Grid((256, 256, 4), (2.0, 2.0, 10.0), (0, 0, 0))
    spread = {}
    for suv in (1.0, 4.0, 9.0):
        image = acquire_pet(np.random.default_rng(0), np.full(grid.shape, suv), grid, 5.0, 0.1, 2)
        assert image.mean() == pytest.approx(suv, rel=0.01)
        spread[suv] = image.std()
    assert spread[1.0] == pytest.approx(0.1, rel=0.03)
    assert spread[4.0] == pytest.approx(0.2, rel=0.03) and spread[9.0] == pytest.approx(0.3, rel=0.03)
    neighbours = np.corrcoef(image[:-1].ravel(), image[1:].ravel())[0, 1]
    assert 0.2 < neighbours < 0.7 and image.min() > 0
    empty = acquire_pet(np.random.default_rng(0), np.zeros(grid.shape), grid, 5.0, 0.1, 2)
    assert np.all(empty == 0)


# ---- What the images show ----------------------------------------------------------------------------------------------

def test_uptake_of_tissues(patient):
    """Before blur and noise: grey to white 4:1, and a tumour of the stated SUV."""
    uptake = petct_uptake(rng_for(0, 0, "uptake"), patient.traits)
    image = render_pet(patient, uptake)
    suv = {name: image[pure(patient, name)].mean() for name in NECK if pure(patient, name).any()}
    assert suv["gm"] / suv["wm"] == pytest.approx(4, rel=0.06) and 6 < suv["gm"] < 10
    assert suv["tumour"] == pytest.approx(patient.traits["suv"], rel=0.15)
    assert suv["gas"] < 0.01 < suv["fat"] < suv["muscle"] < suv["wm"] < suv["tonsil"] < suv["gm"]
    assert np.all(image[~patient.mask] == 0)


def test_ct_of_head_and_neck(patient):
    """Muscle, tongue, tonsils and tumour look alike to CT and not to PET."""
    image = render_ct(patient, patient.traits["density"])
    hu = {name: image[pure(patient, name)].mean() for name in NECK if pure(patient, name).any()}
    assert hu["gas"] + 500 < hu["fat"] < hu["csf"] - 50 < hu["muscle"] - 70 < hu["bone"] - 900
    assert hu["bone"] < hu["tooth"] if "tooth" in hu else True
    alike = [hu[name] for name in ("muscle", "tongue", "tonsil", "mucosa", "tumour")]
    assert max(alike) - min(alike) < 15
    assert hu["gm"] - hu["wm"] == pytest.approx(10, abs=5)


@pytest.mark.slow
def test_suv_of_the_patients(scans, petct):
    ct, pet, seg = scans
    brain = pet[:, -3:]
    for k, truth in enumerate(petct[2].values()):
        assert 5 < np.percentile(brain[k], 99) < 12
        assert seg[k].sum() >= 10 and 2.5 < pet[k][seg[k] > 0].mean() < 12
        assert 3.5 <= truth["suv"] <= 12
    rest = pet[:, :6][(seg[:, :6] == 0) & (ct[:, :6] > 20) & (ct[:, :6] < 80)]
    assert 0.5 < np.median(rest) < 1.2  # soft tissue of the neck takes up little
    assert np.all(pet[ct < -900].mean() < 0.1)


@pytest.mark.slow
def test_tumours_are_where_the_truth_says(petct):
    """In world coordinates, through the file's affine: a swapped side or axis cannot pass."""
    folder, names, truth = petct
    for name in names[:8]:
        of = truth[name]
        image = nib.load(folder / name / "seg.nii.gz")
        place = np.argwhere(np.asarray(image.dataobj) > 0)
        world = place @ image.affine[:3, :3].T + image.affine[:3, 3] + [0, 0, of["offset"]]
        balls = [(of["primary"][a] for a in "xyz")]
        reach = [of["primary"]["core"]]
        for x, y, z, radius, metastatic in of["nodes"]:
            if metastatic:
                balls.append((x, y, z))
                reach.append(radius)
        away = np.stack([np.linalg.norm(world - list(ball), axis=1) for ball in balls])
        assert np.all((away / np.array(reach)[:, None]).min(axis=0) < 1.9), name
        assert np.any(away[0] < reach[0])


def test_tumour_pushes_the_airway_aside():
    """A cancer of the right tonsil moves the air of the throat to the left."""
    grid = finer(neck_grid(48, 12), 2)
    for subject in range(2):
        traits = petct_traits(0, subject)
        x, y, z = place_in_world(SITES["tonsil"], 1, traits)
        assert x > 10                                           # the patient's right
        sick = {**traits, "primary": {"site": "tonsil", "x": x, "y": y, "z": z, "core": 15.0, "push": 0.3}}
        throat = np.abs(grid.axes()[2] + traits["offset"] - z) < 16
        middle = []
        for of in (sick, {**traits, "primary": None}):
            air = neck_anatomy(0, subject, grid, of).maps["gas"][:, :, throat]
            middle.append((air * grid.axes()[0][:, None, None]).sum() / air.sum())
        assert middle[0] < middle[1] - 2


# ---- Files -------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_layout_of_petct(petct):
    folder, names, truth = petct
    assert names[:5] == ["HN-CHUM-001", "HN-CHUS-001", "HN-HGJ-001", "HN-HMR-001", "HN-CHUM-002"]
    files = {f"{name}/{what}.nii.gz" for what in ("CT", "PET", "seg") for name in names}
    assert set(contents(folder)) == files | {"labels.csv", "phantom.json"}
    ct, pet, seg = (nib.load(folder / names[0] / f"{what}.nii.gz") for what in ("CT", "PET", "seg"))
    assert ct.shape == (128, 128, 12) and ct.get_data_dtype() == np.int16
    assert pet.shape == seg.shape == (64, 64, 12) and pet.get_data_dtype() == np.float32
    np.testing.assert_array_equal(pet.affine, seg.affine)
    for image in (ct, pet, seg):
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    for corner in ((-0.5, -0.5, -0.5), (1, 1, 1)):  # both cover the same box
        ends = [image.affine @ [*(np.maximum(corner, 0) * (np.array(image.shape) - 0.5)
                                  + np.minimum(corner, 0)), 1] for image in (ct, pet)]
        np.testing.assert_allclose(*ends)
    assert set(np.unique(np.asarray(seg.dataobj))) == {0, 1}
    layout = find_layout(folder)
    assert layout.contrasts == ("ct", "pet") and not layout.ignored
    assert all(subject.segmentation for subject in layout.subjects)
    assert sum(len(data) for data in contents(folder).values()) < 9e6


@pytest.mark.slow
def test_sheet_of_labels(petct):
    folder, names, truth = petct
    text = (folder / "labels.csv").read_bytes().decode("utf-8")
    assert text.startswith("subject,label\nHN-CHUM-001,")
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["subject"] for row in rows] == names
    assert [int(row["label"]) for row in rows] == [of["organs"]["label"] for of in truth.values()]
    assert 8 <= sum(int(row["label"]) for row in rows) <= 12  # about 40 % of 24


@pytest.mark.slow
def test_petct_same_arguments_same_bytes(petct, tmp_path):
    make("petct", tmp_path / "few", subjects=2)
    make("petct", tmp_path / "other", subjects=2, seed=1)
    few, other, all_of_them = contents(tmp_path / "few"), contents(tmp_path / "other"), contents(petct[0])
    assert len(few) == 8
    for name in few:
        assert other[name] != few[name] or name == "labels.csv"
        assert name in ("labels.csv", "phantom.json") or few[name] == all_of_them[name]
    assert few["HN-CHUM-001/PET.nii.gz"] != few["HN-CHUS-001/PET.nii.gz"]


def test_same_neck_at_another_resolution():
    traits = petct_traits(0, 2)
    coarse, fine = (neck_anatomy(0, 2, neck_grid(size, 4), traits) for size in (48, 144))
    for name in ("muscle", "fat", "gm", "bone"):
        blocks = fine.maps[name].reshape(48, 3, 48, 3, 4).mean(axis=(1, 3))
        assert blocks.sum() == pytest.approx(coarse.maps[name].sum(), rel=0.08)
        assert np.corrcoef(blocks.ravel(), coarse.maps[name].ravel())[0, 1] > 0.85


@pytest.mark.slow
def test_the_other_hospital(tmp_path):
    """Larger pixels, other people, more noise in PET, bones that read higher."""
    make("petct-external", tmp_path / "x", subjects=3)
    truth = json.loads((tmp_path / "x" / "phantom.json").read_text(encoding="utf-8"))["truth"]
    assert list(truth) == ["HS-001", "HS-002", "HS-003"]
    image = nib.load(tmp_path / "x" / "HS-001" / "PET.nii.gz")
    assert image.shape == (64, 64, 12) and image.header.get_zooms()[:2] == (5, 5)
    assert (tmp_path / "x" / "labels.csv").read_text(encoding="utf-8").startswith("subject,label\nHS-001,")
    assert truth["HS-001"]["age"] != petct_traits(0, 0)["age"]
    here, there = PETCT_SITES["CHUM"], PETCT_ELSEWHERE["HS"]
    assert there.fwhm > here.fwhm and there.pet_noise > here.pet_noise
    images = [petct_images(0, 0, anatomy_of(0), scanner) for scanner in (here, there)]
    bone = pure(anatomy_of(0), "bone")
    assert images[1][0][bone].mean() > images[0][0][bone].mean() + 100
    assert images[1][1].mean() > 1.05 * images[0][1].mean()


# ---- The label ---------------------------------------------------------------------------------------------------------

def ranked(scores, labels):
    """The area under the ROC curve."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    return (positive[:, None] > negative).mean()


def test_label_shows_in_pet_and_hardly_in_ct():
    drawn = [draw_organs(rng_for(0, subject, "amyloidosis"), 0.4) for subject in range(2000)]
    label, uptake, hu, size = (np.array([of[key] for of in drawn]) for key in ("label", "uptake", "hu", "size"))
    assert label.mean() == pytest.approx(0.4, abs=0.03)
    assert ranked(uptake, label) > 0.99
    assert 0.53 < ranked(hu, label) < 0.67 and 0.53 < ranked(size, label) < 0.67
    for external in (False, True):  # and in the 24 patients that people will use
        few = [petct_traits(0, 1000 * external + subject, external)["organs"] for subject in range(SUBJECTS)]
        few = {key: np.array([of[key] for of in few]) for key in few[0]}
        assert 6 <= few["label"].sum() <= 12 and ranked(few["uptake"], few["label"]) == 1
        assert 0.4 < ranked(few["hu"], few["label"]) < 0.67 and 0.4 < ranked(few["size"], few["label"]) < 0.67
    traits = [petct_traits(0, subject) for subject in range(400)]
    label = np.array([of["organs"]["label"] for of in traits])
    for of in ("age", "suv", "fat", "offset"):
        assert abs(np.corrcoef(label, [t[of] for t in traits])[0, 1]) < 0.12


@pytest.mark.slow
def test_label_in_the_images(petct):
    """The uptake of tongue and glands tells the patients apart; CT of them does not."""
    folder, names, truth = petct
    few = range(12, SUBJECTS)
    labels = np.array([truth[names[subject]]["organs"]["label"] for subject in few])
    assert 4 <= labels.sum() <= 8
    scores = {"pet": [], "ct": []}
    for subject in few:
        anatomy = anatomy_of(subject)
        organ = anatomy.maps["tongue"] + anatomy.maps["salivary"]
        ct, pet = (np.asarray(nib.load(folder / names[subject] / f"{what}.nii.gz").dataobj) for what in ("CT", "PET"))
        scores["ct"].append(ct[organ > 0.99].mean())
        scores["pet"].append(pet[coarser_mask(organ, 2) > 0].mean())
    assert ranked(np.array(scores["pet"]), labels) > 0.95
    assert 0.25 < ranked(np.array(scores["ct"]), labels) < 0.8


# ---- Difficulty --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_there_is_room_to_learn_on_petct(scans):
    """CT's intensity does not tell the uptake. A model that knows the tissue is better by much."""
    ct, pet, _ = scans
    source = np.clip((ct + 1000) / 2500, 0, 1)
    target = np.clip(pet / 10, 0, 1)
    train, test = slice(0, 16), list(TEST)
    truth = target[test]
    one_image = np.broadcast_to(target[train].mean(axis=(0, 1)), truth.shape)
    table = psnr(look_up(source[train], target[train], source[test]), truth)
    assert 12 < psnr(source[test], truth) < 16
    assert 19 < psnr(one_image, truth) < 22
    assert 21 < table < 24

    suv = np.array([TISSUES[name].suv for name in NECK]) / 10
    by_tissue = []
    by_fractions = []
    for subject in TEST:
        maps = np.stack([anatomy_of(subject).maps[name] for name in NECK])
        maps = maps.reshape(-1, 64, 2, 64, 2, 12).mean(axis=(2, 4))
        by_tissue.append(suv[maps.argmax(axis=0)] * (maps.sum(axis=0) > 0.5))
        blurred = gaussian_filter(maps, (0, 0.59, 0.59, 0))     # pixels: 5.5 mm FWHM
        by_fractions.append(np.tensordot(suv, blurred, 1))
    by_tissue, by_fractions = (np.stack(images).transpose(0, 3, 1, 2) for images in (by_tissue, by_fractions))
    assert psnr(by_tissue, truth) > table + 5
    assert psnr(by_fractions, truth) > table + 8


def test_necks_fit_into_the_field():
    for subject in range(0, 24, 3):
        anatomy = neck_anatomy(0, subject, neck_grid(32, 12), petct_traits(0, subject))
        mask = anatomy.mask[:, :, 2:]       # the shoulders of the lowest slices are cut off
        assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
        np.testing.assert_allclose(sum(anatomy.maps.values())[anatomy.mask], 1, atol=1e-5)
        assert 0.1 < anatomy.mask.mean() < 0.4
        lesion = anatomy.maps["tumour"] + anatomy.maps["necrosis"] > 0.5
        np.testing.assert_array_equal(anatomy.labels == 1, lesion)
        assert not np.any(binary_dilation(lesion) & ~binary_dilation(anatomy.mask))
