"""The slices of one subject."""

import nibabel as nib
import numpy as np
import pytest

import data
from data import load_subject
from data.files import DataError
from data.intensities import normalise
from data.layouts import Subject, find_layout
from data.placing import picture_of
from data.volumes import fit, read_volume
from scans import (
    AFFINE,
    CT_AFFINE,
    IXI_NAMES,
    PET_AFFINE,
    SHAPE,
    body_pet,
    breast,
    cylinder,
    echoes,
    fine_head,
    head,
    make_breasts,
    make_ixi,
    make_pet_ct,
    make_set,
    opened,
    oriented,
    save,
    scan,
    shifted,
)


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


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    """A ball in a sagittal scan of 2.4 x 1.2 mm is round in the slice, and the volume goes back to the grid of the scan.

    A second scan, without a place, has as many voxels, which correspond.  A third one lies on a grid with square pixels.
    """
    size = (26, 52, 6)
    affine = np.diag([2.4, 1.2, 3.0, 1.0])
    affine[:3, 3] = (-30, -30, 0)
    x, y, z = np.meshgrid(*(np.arange(n) for n in size), indexing="ij")
    ball = (affine[0, 0] * (x - 12)) ** 2 + (affine[1, 1] * (y - 26)) ** 2 < 20 ** 2
    array = np.where(ball, 500 + 3 * y + 2 * x, 0).astype(np.float32)
    halves = np.diag([1.2, 1.2, 3.0, 1.0])
    halves[:3, 3] = (-30.6, -30, 0)                     # the left half of a wide voxel
    files = {"t1": save(tmp_path / "p" / "t1.nii", array, affine), "t2": save(tmp_path / "p" / "t2.nii", array, np.eye(4)),
             "pd": save(tmp_path / "p" / "pd.nii", np.repeat(array, 2, 0), halves)}
    labels = save(tmp_path / "p" / "seg.nii", ball.astype(np.uint8), affine)
    slices = load_subject(Subject("p", "p", files, segmentation=labels, grid=("t1",)), ("t1", "t2", "pd"), 64)
    for contrast in range(3):
        shape = slices.images[3, contrast] > 0.2
        height, width = (np.ptp(np.nonzero(shape.any(1 - axis))[0]) + 1 for axis in (0, 1))
        assert abs(height - width) <= 3 and 32 <= min(height, width) <= 34        # it was 33 x 17
    assert np.abs(slices.images[:, 0] - slices.images[:, 1]).max() < 1e-6
    assert np.abs(slices.images[:, 0] - slices.images[:, 2]).mean() < 0.02 and slices.pixel == pytest.approx(1.2)
    assert abs(int(slices.labels[3].sum()) - int((slices.images[3, 0] > 0.2).sum())) < 100
    said = [sentence for _, sentence in slices.notes]
    assert said.count("has axial pixels of 2.40 x 1.20 mm; they are resampled to squares of 1.20 mm") == 1
    ends = [nib.affines.apply_affine(volume.affine, [[-0.5] * 3, np.array(volume.array.shape) - 0.5])
            for volume in (slices.reference, slices.grid)]
    np.testing.assert_allclose(*ends, atol=1e-5)            # both boxes are the same in space
    slices.write(tmp_path / "made.nii", slices.images[:, 0], "synthetic t1", contrast="t1")
    made = nib.load(tmp_path / "made.nii")
    assert made.shape == size and np.allclose(made.affine, affine)
    inside = ball & (np.hypot(2.4 * (x - 12), 1.2 * (y - 26)) < 15)
    assert np.corrcoef(made.get_fdata()[inside], array[inside])[0, 1] > 0.99


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
    affine = oriented("PSR", SHAPE, 0.2) @ np.diag([1.5, 1, 0.75, 1])       # 3 mm along P, R and S
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
    slices.write(tmp_path / "ct.nii", made, "synthetic", contrast="CT")      # another word for ct, which is written in HU
    assert nib.load(tmp_path / "ct.nii").get_fdata().min() < -900
    for wrong, contrast, sentence in ((made, "flairr", "no contrast flairr"), (slices.images, "flair", r"slices are \(9, 3, 24, 24\); give one contrast")):
        with pytest.raises(DataError, match=sentence):
            slices.write(tmp_path / "wrong.nii", wrong, "synthetic", contrast=contrast)
    with pytest.raises(DataError, match="files must be a dict, such as"):
        data.load_scans("t1.nii", ("t1", "t2"), 24)
    assert not (tmp_path / "wrong.nii").exists()


@pytest.mark.parametrize(("files", "contrasts", "sentence"), [
    ({"t1": "t1.nii", "bold": "t1.nii"}, ("t1",), "no contrast bold; there are "),
    ({"t1": "t1.nii"}, ("t1", "bold"), "no contrast bold"),
    ({"t1": "t1.nii", "T1w": "t1.nii"}, ("t1",), "a contrast is named twice in t1, T1w"),
    ({"t1": "t1.nii"}, ("t1", "t1n"), "a contrast is named twice"),
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


# ---- Pairs -----------------------------------------------------------------------------------------------------------

def of_layout(folder, contrasts, number=0):
    return find_layout(folder, contrasts).subjects[number]


def test_nothing_of_post_is_in_pre(tmp_path):
    """The leak that a scale of both volumes would be: other voxels in post must not move a bit of pre."""
    folder = make_breasts(tmp_path / "set", subjects=1)
    before = load_subject(of_layout(folder, ("post", "pre")), ("post", "pre"), 20)
    pre, post = breast()
    save(folder / "p0" / "post.nii.gz", 50 * post[::-1] + 3)
    after = load_subject(of_layout(folder, ("post", "pre")), ("post", "pre"), 20)
    np.testing.assert_array_equal(after.images[:, 1], before.images[:, 1])
    assert after.scales["pre"] == before.scales["pre"] == before.scales["post"] == after.scales["post"]
    assert not np.array_equal(after.images[:, 0], before.images[:, 0])
    (folder / "p0" / "post.nii.gz").write_bytes(b"not even an image")
    alone = load_subject(of_layout(folder, ("post", "pre")), ("post", "pre"), 20, use=("pre",))
    np.testing.assert_array_equal(alone.images[:, 1], before.images[:, 1])
    assert alone.scales == {"pre": before.scales["pre"]} and not alone.images[:, 0].any()


def test_pre_is_the_reference_and_is_read_first(tmp_path):
    folder = make_breasts(tmp_path / "set", subjects=1)
    save(folder / "p0" / "post.nii.gz", breast()[1][2:-2], shifted(AFFINE, (2, 0, 0)))
    for subject in (of_layout(folder, ("post", "pre")),
                    Subject("p", "p", {name: folder / "p0" / f"{name}.nii.gz" for name in ("post", "pre")})):
        slices = load_subject(subject, ("post", "pre"), 20)
        assert slices.reference.path.name == "pre.nii.gz" and slices.images.shape == (9, 2, 20, 20)


@pytest.mark.parametrize("use", [None, ("post",)])
def test_post_alone_has_no_scale(tmp_path, use):
    folder = make_breasts(tmp_path / "set", subjects=1)
    subject = of_layout(folder, ("pre", "post"))
    if use is None:
        del subject.files["pre"]
    with pytest.raises(DataError, match=r"subject p0, post \(.*post\.nii\.gz\) cannot be scaled alone.*add pre"):
        load_subject(subject, ("pre", "post"), 20, use=use)


def test_post_is_written_in_the_units_of_pre(tmp_path):
    pre, post = breast()
    slices = load_subject(of_layout(make_breasts(tmp_path / "set", subjects=1), None), ("pre", "post"), 24)
    slices.write(tmp_path / "post.nii", slices.images[:, 1], "synthetic post, " + "x" * 90, contrast="post")
    written = nib.load(tmp_path / "post.nii")
    high = slices.scales["pre"].high
    np.testing.assert_allclose(written.get_fdata(), post.clip(0, high), rtol=1e-5, atol=1e-3)
    assert (post > high).any()
    assert written.header["descrip"].item().decode().endswith("x, units of the pre scan")


def test_pet_and_cta_are_written_in_their_units(tmp_path):
    slices = load_subject(of_layout(make_pet_ct(tmp_path / "set", 1), None), ("ct", "pet"), 16)
    slices.write(tmp_path / "pet.nii", slices.images[:, 1], "synthetic pet, me", contrast="pet")
    written = nib.load(tmp_path / "pet.nii")
    np.testing.assert_allclose(written.get_fdata(), body_pet().clip(0, 10), atol=1e-4)
    np.testing.assert_array_equal(written.affine, PET_AFFINE)
    assert written.header["descrip"].item().decode() == "synthetic pet, me, SUV"
    files = {"CT": save(tmp_path / "p" / "a.nii", scan(seed=1)[0]), "CTA": save(tmp_path / "p" / "b.nii", scan()[0])}
    slices = data.load_scans(files, ("ct", "cta"), 24)
    slices.write(tmp_path / "cta.nii", slices.images[:, 1], "synthetic cta, me", contrast="cta")
    written = nib.load(tmp_path / "cta.nii")
    np.testing.assert_allclose(written.get_fdata(), scan()[0].clip(-1000, 1500), atol=0.01)
    assert written.header["descrip"].item().decode() == "synthetic cta, me, HU"


def test_raw_pet_needs_its_factor(tmp_path):
    folder = make_pet_ct(tmp_path / "set", 2)
    save(folder / "p0" / "PET.nii.gz", body_pet() / 2e-4, PET_AFFINE)
    with pytest.raises(DataError, match=r"p0, pet \(.*PET\.nii\.gz\) cannot be in SUV .* suv\.csv"):
        load_subject(of_layout(folder, ("ct", "pet")), ("ct", "pet"), 16)
    (folder / "suv.csv").write_text("subject,factor\np0,0.0002\n")
    slices = load_subject(of_layout(folder, ("ct", "pet")), ("ct", "pet"), 16)
    assert ("PET.nii.gz", "is multiplied by its factor in suv.csv, which gives SUV") in slices.notes
    np.testing.assert_allclose(slices.images[:, 1], fit(body_pet().clip(0, 10) / 10, 16), atol=1e-5)
    (folder / "suv.csv").write_text("subject,factor\np0,1000\n")
    with pytest.raises(DataError, match=r"correct its factor in suv\.csv"):
        load_subject(of_layout(folder, ("ct", "pet")), ("ct", "pet"), 16)


def test_dark_pet_is_noted(tmp_path):
    folder = make_pet_ct(tmp_path / "set", 1)
    save(folder / "p0" / "PET.nii.gz", body_pet() / 30, PET_AFFINE)  # somebody has scaled it to [0, 1]
    notes = load_subject(of_layout(folder, ("pet",)), ("pet",), 16).notes
    assert len(notes) == 1 and notes[0][1].startswith("is dark for a PET, ") and notes[0][1].endswith("; is it in SUV?")


@pytest.mark.parametrize("contrasts", [("ct", "pet"), ("pet", "ct")])
def test_ct_is_averaged_onto_the_grid_of_the_pet(tmp_path, contrasts):
    """Noise of single CT voxels: a PET voxel gets the mean of its 4 x 4, not the values at its centre."""
    folder = make_pet_ct(tmp_path / "set", 1)
    hu = np.random.default_rng(0).uniform(-1000, 1500, (48, 48, 1)).astype(np.float32).repeat(10, 2)
    save(folder / "p0" / "CT.nii.gz", hu, CT_AFFINE)
    means = (hu[..., 0].reshape(12, 4, 12, 4).mean((1, 3)) + 1000) / 2500
    wanted = fit(means[..., None], 12)[0, 1:-1, 1:-1]

    def error(slices, channel):
        return np.sqrt(np.mean((slices.images[2, channel, 1:-1, 1:-1] - wanted) ** 2))

    slices = load_subject(of_layout(folder, contrasts), contrasts, 12)
    assert slices.reference.path.name == "PET.nii.gz" and slices.images.shape == (6, 2, 12, 12)
    other = load_subject(Subject("p", "p", {"t2": folder / "p0" / "PET.nii.gz", "ct": folder / "p0" / "CT.nii.gz"},
                                 grid=("t2",)), ("t2", "ct"), 12)  # MR and CT are resampled as before, without averaging
    assert error(slices, contrasts.index("ct")) < 0.03 < 0.1 < error(other, 1)


def test_only_the_place_of_a_pet_that_is_not_used_counts(tmp_path):
    """What is made from CT lies on the grid that training had; no voxel of the PET is read for it."""
    folder = make_pet_ct(tmp_path / "set", 1)
    subject = of_layout(folder, ("ct", "pet"))
    trained = load_subject(subject, ("ct", "pet"), 16)
    whole = nib.Nifti1Image(body_pet(), PET_AFFINE)
    header = whole.header.copy()
    header["vox_offset"], header["magic"] = 352, b"n+1"
    subject.files["pet"] = tmp_path / "set" / "p0" / "PET.nii"
    subject.files["pet"].write_bytes(header.binaryblock + bytes(4))  # a header without voxels
    slices = load_subject(subject, ("ct", "pet"), 16, use=("ct",))
    np.testing.assert_array_equal(slices.images[:, 0], trained.images[:, 0])
    assert slices.present.tolist() == [True, False] and not slices.images[:, 1].any()
    assert slices.notes[-1] == ("CT.nii.gz", "is on another grid than pet; resampled by the affines")
    slices.write(tmp_path / "out.nii", trained.images[:, 1], "pet, me", contrast="pet")
    np.testing.assert_allclose(nib.load(tmp_path / "out.nii").get_fdata(), body_pet().clip(0, 10), atol=1e-4)
    np.testing.assert_array_equal(nib.load(tmp_path / "out.nii").affine, PET_AFFINE)


def test_ct_without_pet_is_shown_at_the_size_of_the_others(tmp_path):
    """The CT of p0 is laid on PET pixels although p0 has no PET: it looks as it would beside its own PET."""
    folder = make_pet_ct(tmp_path / "set", 3)
    trained = load_subject(of_layout(folder, ("ct", "pet")), ("ct", "pet"), 16)
    (folder / "p0" / "PET.nii.gz").unlink()
    subject = of_layout(folder, ("ct", "pet"))
    assert subject.like == folder / "p1" / "PET.nii.gz" and of_layout(folder, ("ct", "pet"), 1).like is None
    slices = load_subject(subject, ("ct", "pet"), 16)
    np.testing.assert_allclose(slices.images[:, 0], trained.images[:, 0], atol=1e-5)
    assert "resampled to voxels of 6.00 x 6.00 x 5.00 mm, which are those of another PET" in slices.notes[0][1]
    slices.write(tmp_path / "out.nii.gz", slices.images[:, 0], "ct, me", contrast="ct")
    back = read_volume(tmp_path / "out.nii.gz")
    assert back.array.shape == (16, 16, 6) and back.spacing.tolist() == [6, 6, 5]
    middle = back.array[..., 3] > -500  # the body lies where it lay
    place = nib.affines.apply_affine(back.affine, [*np.argwhere(middle).mean(0), 3])
    np.testing.assert_allclose(place[:2], [0, 0], atol=0.5)
    picture = picture_of(folder / "p1" / "PET.nii.gz")
    assert picture == ((12, 12), (6, 6, 5))
    subject.like = None
    given = load_subject(subject, ("ct", "pet"), 16, picture=picture)
    np.testing.assert_array_equal(given.images, slices.images)
    scans = data.load_scans({"ct": folder / "p0" / "CT.nii.gz"}, ("ct", "pet"), 16, picture)
    np.testing.assert_array_equal(scans.images, slices.images)
    own = load_subject(subject, ("ct", "pet"), 16)
    assert own.reference.path.name == "CT.nii.gz" and len(own.images) == 10
    assert own.notes[0][1] == ("has no PET beside it and keeps its own pixels of 1.50 mm; a model that was trained on "
                               "the grids of PETs saw others")
    assert load_subject(subject, ("ct",), 16).notes == []  # no PET is wanted, so none is missed


def test_what_is_synthesised_lies_on_the_grid_of_training(tmp_path):
    folder = make_pet_ct(tmp_path / "set", 3)
    (folder / "p2" / "PET.nii.gz").unlink()
    subjects = find_layout(folder, ("ct", "pet")).subjects
    made = list(data.to_synthesize(subjects, ("ct", "pet"), ("pet",), 16, tmp_path / "out", print))
    assert [(item[0].name, item[1], item[2]) for item in made] == [(f"p{s}", ["ct"], ["pet"]) for s in range(3)]
    for s, item in enumerate(made[:2]):
        np.testing.assert_array_equal(item[3].images[:, 0], load_subject(subjects[s], ("ct", "pet"), 16).images[:, 0])
    assert made[2][3].reference.spacing.tolist() == [6, 6, 5]
    given = data.to_synthesize(subjects, ("ct", "pet"), (), 16, tmp_path / "out", print, data.Picture((12, 12), (7, 7, 8)))
    assert [item[3].reference.spacing.tolist() for item in given] == [[7, 7, 8]]  # of training data that lie elsewhere


def test_scans_of_a_pair_from_any_files(tmp_path):
    folder = make_pet_ct(tmp_path / "set", 1)
    files = {"CTres": folder / "p0" / "CT.nii.gz", "SUV": folder / "p0" / "PET.nii.gz"}
    slices = data.load_scans(files, ("ct", "pet"), 16)
    wanted = load_subject(of_layout(folder, ("ct", "pet")), ("ct", "pet"), 16)
    np.testing.assert_array_equal(slices.images, wanted.images)
    assert slices.reference.path.name == "PET.nii.gz"


def test_a_neck_is_kept_in_bodies_but_not_by_the_rule_for_brains(tmp_path):
    """A neck of 2.3 % of the view under shoulders of 40 %; a last slice has less than 2 %."""
    areas = np.array([[1, 19, 20, 400, 1000], [1000, 1000, 1000, 1000, 19]])
    assert data.kept_slices(areas, 1000).tolist() == [False, False, True, True, False]
    shape = (60, 60, 6)
    shares = (0, 0.015, 0.023, 0.023, 0.4, 0.4)
    radii = [2 * np.sqrt(share / np.pi) for share in shares]
    body = np.stack([cylinder((*shape[:2], 1), radius)[..., 0] for radius in radii], -1)
    found = body.sum((0, 1)) / 3600
    assert found[1] < 0.02 <= found[2] and found[2] < found[4] / 3
    texture = np.random.default_rng(0).uniform(0, 1, shape)
    hu = np.where(body, 1000 * texture, -1000).astype(np.float32)
    suv = np.where(body, 1 + texture, 0.01 * texture).astype(np.float32)
    files = {"ct": save(tmp_path / "p" / "CT.nii", hu), "pet": save(tmp_path / "p" / "PET.nii", suv),
             "cta": save(tmp_path / "p" / "CTA.nii", hu), "t2": save(tmp_path / "p" / "T2.nii", suv)}
    for contrasts in (("ct", "pet"), ("ct", "cta"), ("pet",)):
        for size in (32, 60, 128):  # neither the border nor the resampling counts
            slices = load_subject(Subject("p", "p", dict(files)), contrasts, size)
            assert slices.kept.tolist() == [False, False, True, True, True, True], (contrasts, size)
    for contrasts in (("ct",), ("t2", "ct")):
        slices = load_subject(Subject("p", "p", dict(files)), contrasts, 60)
        assert slices.kept.tolist() == [False, False, False, False, True, True], contrasts


def test_what_a_window_clips_is_said(tmp_path):
    """A metal plate of 3000 HU, and a tumour of SUV 20; small ones are not worth a word."""
    for contrast, base, bright, words in (("ct", 40, 3000, "of its body is above 1500 HU, where the window ends"),
                                          ("pet", 2, 20, "of its body is above 10 SUV, where the window ends")):
        for width, said in ((1, False), (4, True)):
            array = np.full((20, 20, 6), -1000 if contrast == "ct" else 0.0, np.float32)
            array[2:18, 2:18] = base
            array[5:5 + width, 5:5 + width] = bright
            path = save(tmp_path / contrast / f"{contrast}{width}.nii", array, np.diag([2.0, 2, 3, 1]))
            notes = [note for _, note in load_subject(Subject("p", "p", {contrast: path}), (contrast,), 20).notes]
            assert any(note.endswith(words) for note in notes) == said
    assert "6.2 % of its body is above 10 SUV, where the window ends" in notes
