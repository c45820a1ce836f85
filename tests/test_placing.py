"""Where the volumes of a subject lie: the grid, headers without a place, and bodies that do not fit each other."""

import numpy as np
import pytest
from scipy import ndimage

from data import check, load_subject
from data.files import DataError
from data.layouts import Subject
from data.placing import unequal_pixels
from scans import AFFINE, head, make_set, opened, save, shifted

PLACE = np.array([[-2.875, 0, 0, 21], [0, -3, 0, 30], [0, 0, 4, -11], [0, 0, 0, 1]])


def textured(shape, seed=0):
    """An ellipsoid of smooth texture, which differs between left and right; 0 outside."""
    noise = np.random.default_rng(seed).normal(size=shape)
    smooth = ndimage.gaussian_filter(noise, 1.5)
    return np.where(head(shape) > 0, 150 + 40 * smooth / smooth.std(), 0).clip(0).astype(np.float32)


def subject(folder, files, **options):
    """files: {contrast: (array, affine)}; None for a header without orientation."""
    paths = {}
    for contrast, (array, affine) in files.items():
        paths[contrast] = save(folder / f"{contrast}.nii", array, AFFINE if affine is None else affine)
        if affine is None:
            content = bytearray(paths[contrast].read_bytes())
            content[252:256] = bytes(4)
            paths[contrast].write_bytes(bytes(content))
    return Subject("p", "p", paths, **options)


TRUSTED = "the shapes are equal, so the voxels correspond"


@pytest.mark.parametrize("bare", [np.eye(4), np.diag([2.0, 3, 4, 1]), np.diag([-2.0, -3, 4, 1]), None],
                         ids=["identity", "spacing only", "LPS", "no codes"])
@pytest.mark.parametrize("contrasts", [("t1", "t2"), ("t2", "t1")], ids="-".join)
def test_voxels_are_trusted_without_a_place(tmp_path, bare, contrasts):
    scan = subject(tmp_path, {"t1": (head(), PLACE), "t2": (head(), bare)})
    slices = load_subject(scan, contrasts, 20)
    np.testing.assert_array_equal(slices.images[:, 0], slices.images[:, 1])
    np.testing.assert_array_equal(slices.reference.affine[:3, 3], [-16.375, -21, -11])  # that of the t1 in RAS
    assert [file for file, note in slices.notes if note.endswith(TRUSTED)] == ["t2.nii"]


def test_a_reference_without_a_place_is_trusted(tmp_path):
    scan = subject(tmp_path, {"t1": (head(), PLACE), "t2": (head(), np.eye(4))}, grid=("t2",))
    slices = load_subject(scan, ("t1", "t2"), 20)
    np.testing.assert_array_equal(slices.images[:, 0], slices.images[:, 1])
    assert [file for file, note in slices.notes if note.endswith(TRUSTED)] == ["t1.nii"]


def test_a_mask_without_a_place_is_trusted(tmp_path):
    scan = subject(tmp_path, {"t1": (head(), PLACE)})
    scan.segmentation = save(tmp_path / "seg.nii", (head() > 150).astype(np.uint8), np.eye(4))
    slices = load_subject(scan, ("t1",), 20)
    np.testing.assert_array_equal(slices.labels > 0, slices.images[:, 0] * slices.scales["t1"].high > 150)
    assert ("seg.nii", slices.notes[-1][1]) == slices.notes[-1] and TRUSTED in slices.notes[-1][1]


def test_other_shapes_are_not_trusted(tmp_path):
    scan = subject(tmp_path, {"t1": (head(), PLACE), "t2": (head()[:, :-1], np.diag([2.0, 3, 4, 1]))})
    with pytest.raises(DataError, match=r"subject p, t2 \(.*t2\.nii\): its body and that of t1 overlap by"):
        load_subject(scan, ("t1", "t2"), 20)


def test_places_that_contradict_each_other(tmp_path):
    """A head of 32 mm along x: 3 mm apart is fine, 9 mm is noted, and 20 mm is refused with the distance."""
    wide = np.pad(head(), ((9, 9), (0, 0), (0, 0)))
    for voxels, words in ((1, []), (3, ["overlaps t1 less"]), (7, None)):
        scan = subject(tmp_path, {"t1": (wide, PLACE), "t2": (wide, shifted(PLACE, (voxels, 0, 0)))})
        if words is None:
            with pytest.raises(DataError, match=r"overlap by \d+ %, and their centres are 20 mm apart; register"):
                load_subject(scan, ("t1", "t2"), 40)
            continue
        notes = [note for _, note in load_subject(scan, ("t1", "t2"), 40).notes]
        assert len(notes) == 1 + len(words) and all(word in notes[-1] for word in words)


def test_check_and_start_refuse_the_same(tmp_path):
    folder = make_set(tmp_path / "set", 3)
    path = folder / "BraTS2021_00001" / "BraTS2021_00001_t1.nii.gz"
    save(path, head(), shifted(AFFINE, (8, 0, 0)))
    lines = []
    assert not check(folder, say=lines.append)
    errors = [line for line in lines if line.startswith("error")]
    with pytest.raises(DataError, match="their centres are 23 mm apart") as caught:
        opened(folder)
    assert errors == [f"error: {caught.value}"]


@pytest.mark.parametrize(("first", "second"), [((0, 20), (0, 10)), ((0, 20), (10, 20)), ((2, 20), (0, 8))],
                         ids=["lower", "upper", "few slices of both"])
def test_parts_of_a_body_fit_each_other(tmp_path, first, second):
    tall = textured((14, 18, 20))
    files = {}
    for contrast, (start, stop) in {"t1": first, "t2": second}.items():
        files[contrast] = (tall[..., start:stop], shifted(PLACE, (0, 0, start)))
    scan = subject(tmp_path, files)
    assert len(load_subject(scan, ("t1", "t2"), 20).notes) == 1


@pytest.mark.parametrize("how", ["voxels", "affine", "neither"])
def test_left_and_right_swapped(tmp_path, how):
    array = np.pad(textured((24, 24, 16)), ((0, 8), (0, 0), (0, 0)))  # the head is not in the middle of the box
    place = shifted(np.diag([2.0, 2, 2, 1]), (-14, -9, 3))
    other = np.where(array > 0, 300 - 2 * array, 0).clip(0)
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = 2 * (place @ [11.5, 0, 0, 1])[0]  # about the middle of the head
    if how == "voxels":
        other[:24] = other[:24][::-1].copy()
    scan = subject(tmp_path, {"t1": (array, place), "t2": (other, flip @ place if how == "affine" else place)})
    notes = [note for _, note in load_subject(scan, ("t1", "t2"), 32).notes]
    swapped = "fits t1 better when mirrored; are left and right swapped?"
    assert (swapped in notes) == (how != "neither")


@pytest.mark.parametrize(("axis", "ends"), [(0, "left and right"), (1, "front and back"), (2, "top and bottom"), (None, "")])
def test_a_volume_that_is_turned_around_is_told(tmp_path, axis, ends):
    array = textured((24, 18, 16))
    other = array if axis is None else np.flip(array, axis)
    scan = subject(tmp_path, {"t1": (array, PLACE), "t2": (200 - other * (other > 0), PLACE)})
    notes = [note for _, note in load_subject(scan, ("t1", "t2"), 24).notes if "mirrored" in note]
    assert notes == ([f"fits t1 better when mirrored; are {ends} swapped?"] if ends else [])


@pytest.mark.parametrize(("step", "grid", "first"), [(1, (), "flair"), (1.5, (), "flair"), (4, (), "t1"), (4, ("flair",), "flair")])
def test_the_finest_pixels_give_the_grid(tmp_path, step, grid, first):
    """The FLAIR has pixels of 2.875 mm times step along x, and 3 mm along y."""
    step_count = int(24 / step)
    thick = head((step_count, 18, 9))
    place = shifted(PLACE, ((step - 1) / 2, 0, 0)) @ np.diag([step, 1, 1, 1])
    scan = subject(tmp_path, {"flair": (thick, place), "t1": (head((24, 18, 9)), PLACE), "t2": (head((24, 18, 9)), PLACE)},
                   grid=grid)
    slices = load_subject(scan, ("flair", "t1", "t2"), 32)
    assert slices.reference.path.name == f"{first}.nii"
    said = ("t1.nii", "gives the grid of all, because its axial pixels of 3.00 mm are the finest; those of flair have 11.50 mm")
    assert (said in slices.notes) == (first == "t1")


def test_pixels_of_unequal_size_are_said(tmp_path):
    folder = make_set(tmp_path / "set", 4)
    for seed, name in enumerate(("BraTS2021_00001", "BraTS2021_00003")):
        for contrast in ("flair", "t1"):
            save(folder / name / f"{name}_{contrast}.nii.gz", head(seed=70 + seed + len(contrast)), AFFINE @ np.diag([0.5, 0.5, 1, 1]))
    said = "pixels of unequal size, from 1.47 mm (BraTS2021_00001) to 2.94 mm (BraTS2021_00000)"
    lines = []
    assert check(folder, say=lines.append, size=20) and any(said in line for line in lines)
    assert said in opened(folder)[1]
    assert unequal_pixels({"a": 1.0, "b": 1.19, "c": 0}) == [] == unequal_pixels({"a": 0})
    # A picture of twice as many pixels that is reduced to the same size has equal pixels there.
    slices = load_subject(Subject("p", "p", {"t1": save(tmp_path / "a.nii", head((40, 40, 9)), np.diag([0.5, 0.5, 1, 1]))}),
                          ("t1",), 20)
    assert slices.pixel == pytest.approx(1)


@pytest.mark.parametrize("value", [300, 256, -1, 0.5])
def test_labels_that_do_not_fit(tmp_path, value):
    scan = subject(tmp_path, {"t1": (head(), PLACE)})
    scan.segmentation = save(tmp_path / "seg.nii", np.where(head() > 150, value, 0).astype(np.float32), PLACE)
    with pytest.raises(DataError, match=r"seg\.nii: holds labels from .* whole numbers from 0 to 255"):
        load_subject(scan, ("t1",), 20)


def test_labels_that_fit(tmp_path):
    scan = subject(tmp_path, {"t1": (head(), PLACE)})
    labels = np.where(head() > 150, 255, 0) + np.where(head() == 0, 0, 0.0002)
    scan.segmentation = save(tmp_path / "seg.nii", labels.astype(np.float32), PLACE)
    assert set(np.unique(load_subject(scan, ("t1",), 20).labels)) == {0, 255}


def test_slices_of_two_sizes(tmp_path):
    for contrast, shape in (("a", (10, 14)), ("b", (10, 12))):
        np.save(tmp_path / f"{contrast}.npy", np.eye(*shape))
    scan = Subject("p", "p", {name: (tmp_path / f"{path}.npy",) for name, path in (("t1", "a"), ("t2", "b"))})
    with pytest.raises(DataError, match=r"b\.npy: has shape \(10, 12\), .*a\.npy has \(10, 14\)"):
        load_subject(scan, ("t1", "t2"), 16)
