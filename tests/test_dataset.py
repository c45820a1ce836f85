"""A folder becomes a data set; phantoms are made on first use."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import data
from data import dataset as dataset_module
from data import identity, load_subject, phantom
from data.files import DataError
from data.intensities import CT_WINDOW, PET_WINDOW
from data.layouts import CONTRASTS
from data.prompts import DESCRIPTIONS
from data.stack import Stack
from data.volumes import fit
from scans import SHAPE, body_pet, head, make_breasts, make_pet_ct, make_set, opened, save


def test_one_person_is_enough_to_be_scored(tmp_path):
    folder = make_set(tmp_path / "set", subjects=1)
    dataset, said = opened(folder, alone=True)
    assert dataset.split == {"train": [], "val": [], "test": ["BraTS2021_00000"]} and "no validation subjects" not in said
    with pytest.raises(DataError, match="at least 2 are needed"):
        opened(folder)
    with pytest.raises(DataError, match="at least 2 are needed"):
        opened(make_set(tmp_path / "none", subjects=2, contrasts=("t1",)), contrasts=("t1", "flair"), alone=True)
    dataset, _ = opened(make_set(tmp_path / "two", subjects=2), alone=True)
    assert len(dataset.split["train"]) == 1


def test_slices_tell_who_is_who_where_files_were_written_again(tmp_path):
    """The same scans, not compressed, and one with a larger number for every voxel, have other files but equal slices."""
    first, _ = opened(make_set(tmp_path / "set"))
    for path in sorted((tmp_path / "set").rglob("*.nii.gz")):
        image = nib.load(path)
        save(tmp_path / "again" / f"new{path.parent.name[-1]}" / path.name.split("_")[-1].removesuffix(".gz"), 3 * image.get_fdata(), image.affine)
    second, _ = opened(tmp_path / "again")
    assert len(first.files) == len(second.files) == 4
    for old, new in zip(first.files.values(), second.files.values()):
        assert len(old) == len(new) == 4 and set(old[2:]) == set(new[2:]) and not set(old[:2]) & set(new[:2])


def test_constant_slices_are_skipped_and_counted(tmp_path):  # row 30
    folder = make_set(tmp_path / "set", contrasts=("t1",))
    for s in range(4):
        save(folder / f"BraTS2021_0000{s}" / f"BraTS2021_0000{s}_t1.nii.gz", head((16, 16, 9), s))
    array = head((16, 16, 9))
    array[:, :, 5] = 150  # the largest foreground of all, but nothing to see
    save(folder / "BraTS2021_00000" / "BraTS2021_00000_t1.nii.gz", array)
    dataset, said = opened(folder, size=16)
    assert load_subject(dataset.subjects[0], ("t1",), 16).images[5].min() > 0
    assert dataset.slice_number[dataset.subject == "BraTS2021_00001"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert 5 not in dataset.slice_number[dataset.subject == "BraTS2021_00000"]
    assert f"{len(dataset.images)} of 36 slices kept, 1 are empty or constant" in said


def test_too_few_subjects(tmp_path):
    with pytest.raises(DataError, match="1 of 1 subjects are complete"):
        opened(make_set(tmp_path / "set", subjects=1))
    dataset, said = opened(make_set(tmp_path / "two", subjects=2))
    assert "no validation subjects" in said and [len(n) for n in dataset.split.values()] == [1, 0, 1]


def test_rows_are_the_slices_of_their_subject(tmp_path):
    folder = make_set(tmp_path / "set")
    dataset, said = opened(folder)
    assert dataset.images.dtype == np.float16 and isinstance(dataset.images, Stack) and not dataset.phantom
    for row in range(0, len(dataset.images), 5):
        subject = next(s for s in dataset.subjects if s.name == dataset.subject[row])
        raw = nib.load(subject.files["t1"]).get_fdata()[:, :, dataset.slice_number[row]]
        u = np.clip(raw / dataset.scales[subject.name]["t1"].high, 0, 1)[::-1, ::-1].T
        np.testing.assert_allclose(dataset.images[row, 1, 1:19, 3:17], u, atol=1e-3)
        inside = nib.load(subject.files["flair"]).get_fdata()[:, :, dataset.slice_number[row]] > 0
        assert dataset.brain[row] == pytest.approx(inside.sum() / 400)
    assert dataset.lesion == [None] * len(dataset.images)
    first = dataset.subject == dataset.subjects[0].name
    assert dataset.slice_number[first].tolist() == [1, 2, 3, 4, 5, 6, 7]
    np.testing.assert_allclose(dataset.position[first], np.arange(7) / 6)


def test_lesions_stay_with_their_slice(tmp_path):
    folder = make_set(tmp_path / "set", subjects=2)
    labels = np.zeros(SHAPE, np.uint8)
    labels[7, 9, 3] = 1
    save(folder / "BraTS2021_00001" / "BraTS2021_00001_seg.nii.gz", labels)
    dataset, _ = opened(folder)
    expected = [None] * 7 + ["none", "none", "right, 9 mm2", "none", "none", "none", "none"]
    assert dataset.lesion == expected and dataset.slice_number[dataset.lesion.index("right, 9 mm2")] == 3


def test_label_maps_lie_on_the_images_and_are_kept_only_if_all_have_one(tmp_path):
    """A mark brighter than all else is labelled 4 in its file; where the pixels are bright there is a 4, at every size."""
    folder, first = make_set(tmp_path / "set", subjects=2), None
    for subject in sorted(folder.iterdir()):
        labels, path = np.zeros(SHAPE, np.uint8), subject / f"{subject.name}_t1.nii.gz"
        labels[3:6, 5:10, 4], labels[3:6, 10:12, 4] = 4, 2
        array = nib.load(path).get_fdata()
        array[labels == 4] = 2 * array.max()
        save(path, array)
        assert opened(folder, contrasts=("t1", "flair"))[0].labels is None          # the second still lacks one
        first = save(subject / f"{subject.name}_seg.nii.gz", labels)
    dataset, _ = opened(folder, contrasts=("t1", "flair"))
    assert dataset.labels.shape == (len(dataset.images), 20, 20) and dataset.labels.dtype == np.uint8 and first.exists()
    for row, z in enumerate(dataset.slice_number):
        labels, bright = dataset.labels[row], dataset.images[row, 0] == 1
        assert (labels.max() == 4) == (z == 4) and (z != 4 or np.array_equal(bright, labels == 4))
        assert z != 4 or ((labels == 4).sum() == 15 and (labels == 2).sum() == 6)
    small = load_subject(dataset.subjects[0], ("t1", "flair"), 16).labels
    assert set(np.unique(small)) == {0, 2, 4} and small.shape[1:] == (16, 16)       # never 3, the mean of 2 and 4


def test_phantoms_are_made_only_at_home(tmp_path, monkeypatch):
    made = []

    def make(name, folder):
        made.append(name)
        make_set(folder, subjects=3)
        (folder / "phantom.json").write_text("{}")
    monkeypatch.setattr(phantom, "make", make)
    monkeypatch.setattr(dataset_module, "__file__", str(tmp_path / "data" / "dataset.py"))
    home = tmp_path / "data"
    for folder in (tmp_path / "elsewhere" / "brats", home / "unknown"):
        assert not data.is_phantom(folder)
        with pytest.raises(DataError, match="does not exist"):
            opened(folder, cache=tmp_path / "cache")
    assert data.is_phantom(home / "brats") and made == []
    dataset, said = opened(home / "brats", cache=tmp_path / "cache")
    assert made == ["brats"] and dataset.phantom and "DIGITAL PHANTOMS" in said
    opened(home / "brats", cache=tmp_path / "cache")
    assert made == ["brats"] and data.is_phantom(home / "brats")
    assert not data.is_phantom(make_set(tmp_path / "real", subjects=2)) and Path(dataset_module.__file__).parent == home


@pytest.mark.parametrize("name", ["layouts", "phantom"])
def test_folders_of_code_are_no_data_sets(tmp_path, name):
    folder = Path(data.__file__).parent / name
    assert folder.is_dir() and not data.is_phantom(folder)
    with pytest.raises(DataError, match="no subjects found") as caught:
        opened(folder, cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)


# ---- Pairs -----------------------------------------------------------------------------------------------------------

def test_a_data_set_of_pet_and_ct(tmp_path):
    """In SUV / 10 on the PET's grid, for both orders of the channels; the first row of p0 is its lowest slice."""
    folder = make_pet_ct(tmp_path / "set", subjects=4)
    for contrasts in (("ct", "pet"), ("pet", "ct")):
        dataset, said = opened(folder, contrasts=contrasts, size=16)
        assert "pet is read in SUV" in said and "CT.nii.gz and 3 more: is on another grid than " in said
        rows = dataset.subject == "p0"
        assert dataset.slice_number[rows].tolist() == [0, 1, 2, 3, 4, 5]
        wanted = fit(body_pet().clip(0, 10) / 10, 16)
        np.testing.assert_allclose(dataset.images[rows][:, contrasts.index("pet")], wanted, atol=1e-3)
        assert dataset.scales["p0"]["pet"] == PET_WINDOW and dataset.scales["p0"]["ct"] == CT_WINDOW
        assert dataset.fingerprint == opened(folder, contrasts=contrasts, size=16)[0].fingerprint
        assert dataset.picture == ((12, 12), (6, 6, 5))
    assert opened(folder, contrasts=("ct",), size=16)[0].picture is None


def test_factors_of_pet_are_part_of_the_fingerprint(tmp_path):
    folder = make_pet_ct(tmp_path / "set", subjects=4)
    before = {contrasts: opened(folder, contrasts=contrasts)[0] for contrasts in (("ct",), ("ct", "pet"))}
    (folder / "suv.csv").write_text("subject,factor\np0,0.5\n")
    for contrasts, dataset in before.items():
        after = opened(folder, contrasts=contrasts)[0]
        assert (after.fingerprint == dataset.fingerprint) == (contrasts == ("ct",))
    rows = after.subject == "p0"
    darker = before["ct", "pet"].images[rows][:, 1]
    inside = (darker > 0) & (darker < 1)
    np.testing.assert_allclose(after.images[rows][:, 1][inside], darker[inside] / 2, atol=1e-3)


@pytest.mark.parametrize(("name", "value"), [("PET_WINDOW", (0, 20)), ("CT_WINDOW", (-1000, 2000)), ("ENHANCEMENT", 2)])
def test_windows_of_pairs_are_part_of_the_fingerprint(tmp_path, monkeypatch, name, value):
    folder = make_pet_ct(tmp_path / "set", subjects=2)
    before = opened(folder)[0].fingerprint
    monkeypatch.setattr(identity, name, value)
    assert opened(folder)[0].fingerprint != before


def test_a_data_set_before_and_after_an_agent(tmp_path):
    dataset, _ = opened(make_breasts(tmp_path / "set", subjects=4))
    assert dataset.contrasts == ("pre", "post")
    for scales in dataset.scales.values():
        assert scales["pre"] == scales["post"]
    difference = dataset.images[:, 1].astype(float) - dataset.images[:, 0]
    assert difference.min() > -1e-3 and difference.max() > 0.25
    in_place = np.isin(dataset.slice_number, (3, 4, 5))
    assert (difference.max((1, 2)) > 0.1).tolist() == in_place.tolist()
    texts = dataset.captions(np.array([0]))[0]
    assert texts[0].startswith("Modality: T1w before contrast; ") and texts[1].startswith("Modality: T1w after contrast; ")


def test_every_contrast_has_its_words():
    for contrast in CONTRASTS:
        assert data.caption(contrast, 0.5, 0.5) and data.prompt(contrast, {}).endswith(f"Description: {DESCRIPTIONS[contrast]}")


def test_more_slices_than_there_are_means_all(tmp_path):
    ds, _ = opened(make_set(tmp_path / "set"))
    for part in ("train", "test"):
        assert np.array_equal(ds.spread(part, 10**9), ds.rows(part)) and len(ds.rows(part))
    first = ds.split["train"][0]
    rows = np.flatnonzero(ds.subject == first)
    assert np.array_equal(ds.spread("train", 2)[:2], rows[[len(rows) // 4, 3 * len(rows) // 4]])
