"""Digital phantoms: how a set is made, and the set of BraTS on disk."""

import json

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from data import phantom
from data.files import DataError
from data.phantom import make, sets
from data.phantom.__main__ import main
from scans import contents, look_up, psnr

CONTRASTS = ("flair", "t1", "t1ce", "t2")


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


# ---- The set on disk -------------------------------------------------------------------------------------------------

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


# ---- Making a set ----------------------------------------------------------------------------------------------------

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
    assert main() == 1
    assert capsys.readouterr().err.count("\n") == 1
    folder.rmdir()
    assert main() == 0
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

    monkeypatch.setattr(sets, "write_nifti", interrupted)
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
