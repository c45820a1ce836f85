"""The slices of one subject."""

import nibabel as nib
import numpy as np
import pytest

import data
from data import load_subject
from data.files import DataError
from data.intensities import normalise
from data.layouts import Subject, find_layout
from scans import AFFINE, IXI_NAMES, SHAPE, echoes, fine_head, head, make_ixi, make_set, opened, oriented, save, scan, shifted


def test_one_slice_subject(tmp_path):  # row 31
    path = save(tmp_path / "p" / "t1.nii", head()[..., 4])
    slices = load_subject(Subject("p", "p", {"t1": path}), ("t1",), 20)
    assert slices.kept.tolist() == [True] and slices.position.tolist() == [0.5]


@pytest.mark.parametrize(("value", "sentence"), [(0, "is constant"), (7, "is constant")])
def test_constant_volume_names_subject_and_contrast(tmp_path, value, sentence):  # rows 29 and 45
    folder = make_set(tmp_path / "set")
    save(folder / "BraTS2021_00001" / "BraTS2021_00001_t1.nii.gz", np.full(SHAPE, value, np.float32))
    with pytest.raises(DataError, match=rf"subject BraTS2021_00001, t1 \(.*\) {sentence}"):
        opened(folder)


def test_mixed_grids_of_a_subject_meet_in_the_first(tmp_path):  # row 39
    array = head()
    t1 = save(tmp_path / "p" / "t1.nii", array)
    t2 = save(tmp_path / "p" / "t2.nii", array[1:, 2:], shifted(AFFINE, (1, 2, 0)))
    slices = load_subject(Subject("p", "p", {"t1": t1, "t2": t2}), ("t1", "t2"), 20)
    np.testing.assert_allclose(slices.images[:, 1], slices.images[:, 0], atol=1e-3)
    assert slices.notes == [("t2.nii", "is on another grid than the first contrast; resampled by the affines")]


def test_ct_is_air_outside_its_box_and_written_in_hu(tmp_path):
    hu, _ = scan()
    files = {"t2": save(tmp_path / "p" / "T2.nii.gz", head()),
             "ct": save(tmp_path / "p" / "CT.nii.gz", hu[2:-2], shifted(AFFINE, (2, 0, 0)))}
    slices = load_subject(Subject("p", "p", files), ("t2", "ct"), 24)
    assert slices.reference.path == files["t2"]
    wanted = hu.clip(-1000, 1500)
    wanted[:2] = wanted[-2:] = -1000
    ct, t2 = slices.images[:, 1], slices.images[:, 0]
    slices.write(tmp_path / "ct.nii", ct, "synthetic ct, " + "x" * 80, contrast="ct")
    slices.write(tmp_path / "t2.nii", t2, "synthetic t2, me", contrast="t2")
    slices.write(tmp_path / "old.nii", ct, "synthetic ct, me")
    ct, t2, old = (nib.load(tmp_path / f"{name}.nii") for name in ("ct", "t2", "old"))
    np.testing.assert_allclose(ct.get_fdata(), wanted, atol=0.01)
    np.testing.assert_allclose(old.get_fdata(), (wanted + 1000) / 2500, atol=1e-5)
    np.testing.assert_allclose(t2.get_fdata(), normalise(head())[0], atol=1e-6)
    assert [image.header["descrip"].item().decode()[-16:] for image in (ct, t2, old)] == [
        "x" * 12 + ", HU", ", me, normalised", "synthetic ct, me"]


def test_kept_slices_rule():
    areas = np.array([[0, 29, 30, 90, 60, 31], [0, 90, 90, 90, 29, 31]])
    assert data.kept_slices(areas).tolist() == [False, False, True, True, False, True]
    assert data.kept_slices(areas[:, :1]).tolist() == [False]  # nothing is no largest


def test_kept_slices_do_not_depend_on_padding(tmp_path):
    array = head()
    padded = np.pad(array, ((9, 4), (3, 8), (0, 0)))
    kept = []
    for name, volume in (("a", array), ("b", padded)):
        path = save(tmp_path / name / "t1.nii", volume)
        slices = load_subject(Subject(name, name, {"t1": path}), ("t1",), 32)
        kept.append(slices.kept.tolist())
        expected = (volume > 0).sum((0, 1))
        np.testing.assert_allclose(slices.brain, expected / 32**2)
        assert kept[-1] == (expected * 3 >= expected.max()).tolist()
        first, last = np.flatnonzero(slices.kept)[[0, -1]]
        assert slices.position[first] == 0 and slices.position[last] == 1
        assert slices.position[first + 1] == pytest.approx(1 / (last - first))
    assert kept[0] == kept[1] and 0 < sum(kept[0]) < len(kept[0])
    shrunk = load_subject(Subject("b", "b", {"t1": path}), ("t1",), 16)  # 27 x 29 -> 16 x 16
    np.testing.assert_allclose(shrunk.brain, (padded > 0).sum((0, 1)) / 29**2)


def test_subject_slices_go_back_onto_the_source(tmp_path):
    affine = oriented("PSR", SHAPE, 0.2)
    stored = np.ascontiguousarray(head().transpose(1, 2, 0))
    path = save(tmp_path / "p" / "t1.nii.gz", stored, affine)
    slices = load_subject(Subject("p", "p", {"t1": path}), ("t1", "t2"), 24)
    assert slices.present.tolist() == [True, False] and not slices.images[:, 1].any()
    slices.write(tmp_path / "out.nii.gz", slices.images[:, 0], "t2, normalised")
    written = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(written.get_fdata(), np.clip(stored / slices.scales["t1"].high, 0, 1), atol=1e-6)
    np.testing.assert_allclose(written.affine, affine, atol=1e-5)


def test_reference_grid_of_ixi(tmp_path):
    """T2's, else PD's, else the first contrast's; what is synthesised is written there."""
    subject = find_layout(make_ixi(tmp_path / "set", IXI_NAMES[:1])).subjects[0]
    contrasts = ("t1", "t2", "pd")
    for use, name in ((contrasts, "t2"), (("t1", "pd"), "pd"), (("t1",), "t1"), (("pd", "t2"), "t2")):
        slices = load_subject(subject, contrasts, 20, use=use)
        assert slices.reference.path == subject.files[name] and len(slices.images) == (17 if name == "t1" else 9)
        assert slices.present.tolist() == [contrast in use for contrast in contrasts]
    slices = load_subject(subject, contrasts, 20)
    np.testing.assert_allclose(slices.brain, (echoes(0)[1] > 0).sum((0, 1)) / 400)
    slices.write(tmp_path / "out.nii", slices.images[:, 0], "t1")
    written = nib.load(tmp_path / "out.nii")
    np.testing.assert_array_equal(written.affine, AFFINE)
    np.testing.assert_allclose(written.get_fdata(), normalise(fine_head(2))[0][..., ::2], atol=1e-5)


def test_unread_contrasts_have_no_influence(tmp_path):
    folder = make_set(tmp_path / "set", subjects=2)
    subject = find_layout(folder).subjects[0]
    subject.files["flair"].write_bytes(b"not even an image")
    slices = load_subject(subject, ("flair", "t1"), 20, use=("t1",))
    assert slices.present.tolist() == [False, True] and not slices.images[:, 0].any() and slices.images[:, 1].any()
    assert slices.reference.path == subject.files["t1"]


# ---- Any files -------------------------------------------------------------------------------------------------------

def test_scans_from_any_files(tmp_path):
    """Aliases are understood, the order is that of the contrasts, and a made contrast goes back onto the source."""
    files = {"t2w": save(tmp_path / "a" / "first.nii", head(seed=1)), "T1Gd": str(save(tmp_path / "b" / "x.nii.gz", head(seed=2)))}
    slices = data.load_scans(files, ("flair", "t1ce", "t2"), 24)
    subject = Subject("p", "p", {"t1ce": tmp_path / "b" / "x.nii.gz", "t2": tmp_path / "a" / "first.nii"})
    wanted = load_subject(subject, ("flair", "t1ce", "t2"), 24)
    np.testing.assert_array_equal(slices.images, wanted.images)
    assert slices.present.tolist() == [False, True, True] and slices.images.shape == (9, 3, 24, 24)
    assert slices.kept.tolist() == wanted.kept.tolist() and list(slices.scales) == ["t1ce", "t2"]
    assert slices.reference.path == tmp_path / "b" / "x.nii.gz"
    made = slices.images[:, 1:].mean(1)
    slices.write(tmp_path / "out" / "flair.nii.gz", made, "synthetic flair, me", contrast="flair")
    written = nib.load(tmp_path / "out" / "flair.nii.gz")
    expected = (normalise(head(seed=1))[0] + normalise(head(seed=2))[0]) / 2
    np.testing.assert_allclose(written.get_fdata(), expected, atol=1e-6)
    np.testing.assert_array_equal(written.affine, AFFINE)
    assert written.header["descrip"].item().decode() == "synthetic flair, me, normalised"


@pytest.mark.parametrize(("files", "contrasts", "sentence"), [
    ({"t1": "t1.nii", "adc": "t1.nii"}, ("t1",), "adc is no contrast; the contrasts are flair"),
    ({"t1": "t1.nii"}, ("t1", "dwi"), "dwi is no contrast"),
    ({"t1": "t1.nii", "T1w": "t1.nii"}, ("t1",), "t1 is named twice in t1, T1w"),
    ({"t1": "t1.nii"}, ("t1", "t1n"), "t1 is named twice"),
    ({"t1": "t1.nii"}, ("t2",), "is t1, which is not one of the contrasts t2"),
    ({"t1": "nothing.nii"}, ("t1",), "nothing.nii does not exist"),
    ({"t1": "."}, ("t1",), "does not exist or is no file"),
    ({"t1": "t1.png"}, ("t1",), "is neither .nii nor .nii.gz"),
    ({}, ("t1", "t2"), "no file is given; give one of t1, t2")])
def test_bad_scans(tmp_path, files, contrasts, sentence):
    save(tmp_path / "t1.nii", head())
    (tmp_path / "t1.png").write_bytes(b"")
    with pytest.raises(DataError, match=sentence) as caught:
        data.load_scans({contrast: tmp_path / name for contrast, name in files.items()}, contrasts, 24)
    assert "\n" not in str(caught.value)
