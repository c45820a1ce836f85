"""Readers, orientation, normalisation, slices, split, cache: against hand-made files. pytest tests/test_data.py"""

import gzip
import itertools
import json
import os
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import data
from data import check, denormalise, load_subject, open_dataset, phantom, read_volume, write_volume
from data.layouts import Subject, canonical_contrast, caption, describe_lesion, find_layout, person_of, prompt, role_of
from data.volumes import (
    CT_WINDOW,
    DataError,
    Scale,
    background_value,
    canonical,
    find_background,
    fit,
    foreground,
    normalise,
    resample_to,
    same_grid,
    unfit,
    upright,
)

SHAPE = (14, 18, 9)
AFFINE = np.array([[2, 0, 0, -13], [0, 3, 0, -25], [0, 0, 4, 7], [0, 0, 0, 1]], float)


def head(shape=SHAPE, seed=0):
    """A textured ellipsoid in a background of exactly 0; every voxel inside is between 100 and 200."""
    x, y, z = np.meshgrid(*[np.linspace(-1.2, 1.2, n) for n in shape], indexing="ij")
    noise = np.random.default_rng(seed).uniform(100, 200, shape)
    return np.where(x**2 + y**2 + 0.5 * z**2 < 1, noise, 0).astype(np.float32)


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def make_set(folder, subjects=4, contrasts=("flair", "t1")):
    for s in range(subjects):
        name = f"BraTS2021_{s:05d}"
        for c, contrast in enumerate(contrasts):
            save(folder / name / f"{name}_{contrast}.nii.gz", head(seed=10 * s + c))
    return folder


def opened(folder, **options):
    """open_dataset on a small set with its own cache -> (dataset, lines said)."""
    lines = []
    options = {"size": 20, "cache": folder.parent / "cache", "say": lines.append, **options}
    return open_dataset(folder, **options), "\n".join(lines)


# ---- Bad and odd files -----------------------------------------------------------------------------------------------

def test_empty_folder_names_what_was_looked_for(tmp_path):  # row 1
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no subjects found.*BraTS 2020.*notes\.txt"):
        find_layout(tmp_path)


def test_missing_path_names_nearest_parent(tmp_path):  # row 2
    (tmp_path / "here").mkdir()
    with pytest.raises(DataError) as error:
        find_layout(tmp_path / "no" / "such")
    assert f"nearest existing folder is {tmp_path}, which holds here" in str(error.value)


def test_file_instead_of_folder(tmp_path):  # row 3
    path = save(tmp_path / "t1.nii.gz", head())
    with pytest.raises(DataError, match="is a file; give the folder"):
        find_layout(path)


def test_truncated_files(tmp_path):  # row 4
    path = save(tmp_path / "t1.nii.gz", head())
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError, match=r"t1\.nii\.gz: the compressed data end early; download"):
        read_volume(path)
    plain = save(tmp_path / "t2.nii", head())
    plain.write_bytes(plain.read_bytes()[:-1])
    size = 4 * np.prod(SHAPE)
    with pytest.raises(DataError, match=rf"ends early \({size - 1} of {size} voxel bytes\)"):
        read_volume(plain)


def test_misnamed_compression_is_read_and_noted(tmp_path):  # rows 5 and 6
    plain = save(tmp_path / "a.nii", head())
    for name, content, note in (("b.nii.gz", plain.read_bytes(), "is not compressed"),
                                ("c.nii", gzip.compress(plain.read_bytes()), "is compressed")):
        (tmp_path / name).write_bytes(content)
        volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.array, head())
        assert len(volume.notes) == 1 and note in volume.notes[0]
    assert read_volume(plain).notes == []


@pytest.mark.parametrize(("content", "sentence"), [
    (b"", "is empty"),  # row 7
    (b"\n <!DOCTYPE html><html>404</html>", "looks like HTML"),  # row 8
    (gzip.compress(b"<html>login</html>"), "looks like HTML"),
    (b"hello" * 200, "is not a NIfTI file"),
])
def test_no_nifti_inside(tmp_path, content, sentence):
    (tmp_path / "t1.nii.gz").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_volume(tmp_path / "t1.nii.gz")


def test_damaged_compression(tmp_path):  # row 9
    path = save(tmp_path / "t1.nii.gz", head())
    good = path.read_bytes()
    path.write_bytes(good[:-8] + bytes([good[-8] ^ 1]) + good[-7:])  # one bit of the CRC
    with pytest.raises(DataError, match="fail their check.*CRC"):
        read_volume(path)
    packed = zlib.compressobj(wbits=31)
    stream = packed.compress(bytes(4000)) + packed.flush()
    path.write_bytes(stream[:10] + b"\xff" * 40)  # no valid deflate block
    with pytest.raises(DataError, match="are damaged"):
        read_volume(path)


def test_links(tmp_path):  # rows 11 and 12
    folder = make_set(tmp_path / "set", subjects=1)
    try:
        (tmp_path / "elsewhere").symlink_to(folder, target_is_directory=True)
    except OSError:
        pytest.skip("links need a privilege here")
    (folder / "BraTS2021_00000" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "BraTS2021_00000" / "BraTS2021_00000_t2.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    layout = find_layout(tmp_path / "elsewhere")
    assert [s.name for s in layout.subjects] == ["BraTS2021_00000"]
    assert any("read already" in note for note in layout.notes)
    np.testing.assert_array_equal(read_volume(layout.subjects[0].files["t1"]).array, head(seed=1))
    with pytest.raises(DataError, match=r"is a link to .*gone\.nii\.gz, which does not exist"):
        read_volume(layout.subjects[0].files["t2"])


def test_strange_names_junk_and_upper_case(tmp_path):  # rows 13, 14, 15
    folder = tmp_path / "dätä #1 (копия)" / ("x" * 60)
    save(folder / "Ünïcode 7" / "T1.nii.gz", head())
    os.rename(folder / "Ünïcode 7" / "T1.nii.gz", folder / "Ünïcode 7" / "T1.NII.GZ")
    for junk in ("._T1.nii.gz", ".DS_Store", "Thumbs.db"):
        (folder / "Ünïcode 7" / junk).write_bytes(b"junk")
    layout = find_layout(folder)
    assert [s.name for s in layout.subjects] == ["Ünïcode 7"] and layout.ignored == []
    assert "3 system files" in layout.notes[0]
    np.testing.assert_array_equal(read_volume(layout.subjects[0].files["t1"]).array, head())


def test_contrast_words_in_parent_folders_do_not_matter(tmp_path):  # row 16
    folder = tmp_path / "t2_study" / "flair"
    for s in ("t2a", "ct"):
        save(folder / s / f"{s}_t1.nii.gz", head())
    layout = find_layout(folder)
    assert layout.contrasts == ("t1",) and [s.name for s in layout.subjects] == ["ct", "t2a"]
    assert layout.subjects[1].files["t1"] == folder / "t2a" / "t2a_t1.nii.gz"


def test_same_name_twice(tmp_path):  # row 17
    make_set(tmp_path / "train", subjects=2)
    make_set(tmp_path / "test", subjects=1)
    with pytest.raises(DataError, match="subject BraTS2021_00000 is there twice, in .*test.*and .*train"):
        find_layout(tmp_path)


def test_same_voxels_under_two_names(tmp_path):  # row 17
    folder = make_set(tmp_path / "set")
    save(folder / "copy" / "copy_flair.nii.gz", 3 * head(seed=0) + 0)  # subject 0's, rescaled
    save(folder / "copy" / "copy_t1.nii.gz", head(seed=99))
    names = [f"BraTS2021_{s:05d}" for s in range(4)]
    together, apart = tmp_path / "together.json", tmp_path / "apart.json"
    together.write_text(json.dumps({"train": ["copy", *names[:2]], "test": names[2:]}))
    apart.write_text(json.dumps({"train": ["copy", *names[1:]], "test": names[:1]}))
    assert "warning: BraTS2021_00000 and copy have identical flair images" in opened(folder, split_file=together)[1]
    with pytest.raises(DataError, match=r"BraTS2021_00000 \(test\) and copy \(train\) have identical flair"):
        opened(folder, split_file=apart)


def test_missing_contrasts_are_kept_aside(tmp_path):  # row 18
    folder = make_set(tmp_path / "set")
    os.remove(folder / "BraTS2021_00002" / "BraTS2021_00002_t1.nii.gz")
    dataset, said = opened(folder)
    assert [s.name for s in dataset.incomplete] == ["BraTS2021_00002"] and len(dataset.subjects) == 4
    assert "BraTS2021_00002" not in set(dataset.subject) | set(sum(dataset.split.values(), []))
    assert "1 subjects lack t1: BraTS2021_00002" in said and "3 subjects with flair, t1, 1 incomplete" in said
    for s in (0, 1):
        os.remove(folder / f"BraTS2021_0000{s}" / f"BraTS2021_0000{s}_t1.nii.gz")
    with pytest.raises(DataError, match=r"1 of 4 subjects are complete \(files: flair 4, t1 1\)"):
        opened(folder, contrasts=("flair", "t1"))


def test_two_files_for_one_contrast(tmp_path):  # row 19
    for name in ("run-2_t1.nii.gz", "run-1_t1.nii.gz", "t2.nii.gz"):
        save(tmp_path / "p1" / name, head())
    layout = find_layout(tmp_path)
    assert layout.subjects[0].files["t1"].name == "run-1_t1.nii.gz"
    assert "2 files for t1, run-1_t1.nii.gz is used, not run-2_t1.nii.gz" in layout.notes[0]


def test_all_subjects_in_one_folder(tmp_path):
    for s, contrast in itertools.product(range(3), ("t1", "t2")):
        save(tmp_path / f"p{s}_{contrast}.nii.gz", head())
    with pytest.raises(DataError, match="3 files of each contrast; put every subject into a folder"):
        find_layout(tmp_path)


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("IM0001", bytes(128) + b"DICM", "convert with dcm2niix"),  # row 20
    ("slice.dcm", b"", "convert with dcm2niix"),
    ("scan.MHA", b"", r"holds \.mha files; only \.nii"),  # row 21
    ("scan.nrrd", b"", r"holds \.nrrd files"), ("scan.mat", b"", r"holds \.mat files"),
    ("scan.h5", b"", r"holds \.h5 files"),
])
def test_other_formats(tmp_path, name, content, sentence):
    (tmp_path / "p1").mkdir()
    (tmp_path / "p1" / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        find_layout(tmp_path)
    with pytest.raises(DataError, match=r"only \.nii and \.nii\.gz are read"):
        read_volume(tmp_path / "p1" / name)


# ---- Odd volumes -----------------------------------------------------------------------------------------------------

def test_number_of_axes(tmp_path):  # rows 24, 25, 31, 32
    array = head()
    np.testing.assert_array_equal(read_volume(save(tmp_path / "a.nii", array[..., None])).array, array)
    with pytest.raises(DataError, match=r"is 4-D with shape \(14, 18, 9, 2\)"):
        read_volume(save(tmp_path / "b.nii", np.stack([array, array], -1)))
    np.testing.assert_array_equal(read_volume(save(tmp_path / "c.nii", array[..., 4])).array, array[..., 4:5])
    np.testing.assert_array_equal(read_volume(save(tmp_path / "d.nii", array[..., 4:5])).array, array[..., 4:5])
    with pytest.raises(DataError, match="an axis of length 0"):
        read_volume(save(tmp_path / "e.nii", array[:, :0]))


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_flat_shapes_are_written_as_they_came(tmp_path, axes):
    stored = head()[..., 4] if axes == 2 else head().reshape(SHAPE + (1,) * (axes - 3))
    source = read_volume(save(tmp_path / "t1.nii", stored))
    write_volume(tmp_path / "out.nii", source.array + 1, source, "test")
    np.testing.assert_array_equal(nib.load(tmp_path / "out.nii").get_fdata(), stored + 1)


def test_one_slice_subject(tmp_path):  # row 31
    path = save(tmp_path / "p" / "t1.nii", head()[..., 4])
    slices = load_subject(Subject("p", "p", {"t1": path}), ("t1",), 20)
    assert slices.kept.tolist() == [True] and slices.position.tolist() == [0.5]


def test_colours_and_complex_numbers(tmp_path):  # rows 26 and 27
    rgb = np.zeros((4, 4, 4), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    with pytest.raises(DataError, match="holds colours"):
        read_volume(save(tmp_path / "a.nii", rgb))
    with pytest.raises(DataError, match="take the magnitude"):
        read_volume(save(tmp_path / "b.nii", np.ones((4, 4, 4), np.complex64)))


def test_not_a_number(tmp_path):  # row 28
    array = head() - 3
    array[7, 9, 4] = np.nan
    array[6, 9, 4] = -np.inf
    volume = read_volume(save(tmp_path / "a.nii", array))
    assert volume.array[7, 9, 4] == volume.array[6, 9, 4] == -3  # the background, not 0
    assert volume.array[8, 9, 4] == array[8, 9, 4]
    assert volume.notes[0].startswith("has 2 NaN or infinite voxels")
    array[2:, 3, 1] = np.nan
    with pytest.raises(DataError, match=rf"14 of {array.size} voxels are NaN or infinite \(first at \(2, 3, 1\)\)"):
        read_volume(save(tmp_path / "b.nii", array))


@pytest.mark.parametrize(("value", "sentence"), [(0, "is constant"), (7, "is constant")])
def test_constant_volume_names_subject_and_contrast(tmp_path, value, sentence):  # rows 29 and 45
    folder = make_set(tmp_path / "set")
    save(folder / "BraTS2021_00001" / "BraTS2021_00001_t1.nii.gz", np.full(SHAPE, value, np.float32))
    with pytest.raises(DataError, match=rf"subject BraTS2021_00001, t1 \(.*\) {sentence}"):
        opened(folder)


def test_volume_darker_than_its_background():  # row 45
    with pytest.raises(DataError, match="no foreground brighter than its background"):
        normalise(np.where(head() > 0, np.float32(-5), np.float32(0)) * (head() > 150))


def test_constant_slices_are_skipped_and_counted(tmp_path):  # row 30
    folder = make_set(tmp_path / "set", contrasts=("t1",))
    for s in range(4):
        save(folder / f"BraTS2021_0000{s}" / f"BraTS2021_0000{s}_t1.nii.gz", head((16, 16, 9), s))
    array = head((16, 16, 9))
    array[:, :, 5] = 150  # the largest foreground of all, but nothing to see
    save(folder / "BraTS2021_00000" / "BraTS2021_00000_t1.nii.gz", array)
    dataset, said = opened(folder, size=16)
    assert load_subject(dataset.subjects[0], ("t1",), 16).images[5].min() > 0
    assert dataset.z[dataset.subject == "BraTS2021_00001"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert 5 not in dataset.z[dataset.subject == "BraTS2021_00000"]
    assert f"{len(dataset.images)} of 36 slices kept, 1 are empty or constant" in said


def test_huge_volume(tmp_path):  # row 33
    header = nib.Nifti1Header()
    header.set_data_shape((2000, 2000, 2000))
    header["magic"], header["vox_offset"] = b"n+1", 352
    (tmp_path / "t1.nii").write_bytes(header.binaryblock + bytes(4))
    with pytest.raises(DataError, match=r"has 8000000000 voxels \(shape \(2000, 2000, 2000\)\), more than"):
        read_volume(tmp_path / "t1.nii")
    with pytest.raises(DataError, match="more than 2267"):
        read_volume(save(tmp_path / "t2.nii", head()), max_voxels=2267)
    assert read_volume(tmp_path / "t2.nii", max_voxels=2268).array.size == 2268


def test_negative_values_are_noted(tmp_path):  # row 34
    volume = read_volume(save(tmp_path / "t1.nii", head() - 1))
    assert "negative" in volume.notes[0] and volume.array.min() == -1


def test_voxel_types_give_the_same_volume(tmp_path):  # row 38
    truth = np.round(head()) * 0.5 - 20
    for name, dtype, slope, inter in (("int16", ">i2", 0.5, -20), ("uint8", "u1", 0.5, -20), ("float64", "f8", 1, 0)):
        image = nib.Nifti1Image(((truth - inter) / slope).astype(dtype), AFFINE)
        image.set_data_dtype(dtype)
        image.header.set_slope_inter(slope, inter)
        # nibabel would scale on saving: write the header and the raw numbers ourselves
        header = image.header.copy()
        header["vox_offset"], header["magic"] = 352, b"n+1"
        raw = np.asanyarray(image.dataobj).astype(np.dtype(dtype).newbyteorder(header.endianness))
        (tmp_path / f"{name}.nii").write_bytes(header.binaryblock + bytes(4) + raw.tobytes(order="F"))
        np.testing.assert_array_equal(read_volume(tmp_path / f"{name}.nii").array, truth.astype(np.float32))
        np.testing.assert_array_equal(nib.load(tmp_path / f"{name}.nii").get_fdata(), truth)


@pytest.mark.parametrize("kind", [nib.Nifti1Header, nib.Nifti2Header])
def test_big_endian_in_and_out(tmp_path, kind):
    header = kind(endianness=">")
    header.set_data_shape(SHAPE)
    header.set_data_dtype(np.int16)
    header.set_sform(AFFINE, 1)
    header["vox_offset"] = header.sizeof_hdr + 4
    header["magic"] = b"n+1" if kind is nib.Nifti1Header else b"n+2"
    numbers = np.round(head())
    (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(4) + numbers.astype(">i2").tobytes(order="F"))
    volume = read_volume(tmp_path / "a.nii")
    np.testing.assert_array_equal(volume.array, numbers)
    write_volume(tmp_path / "b.nii.gz", volume.array / 200, volume, "unit")
    again = nib.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(np.asarray(again.dataobj), (numbers / 200).astype(np.float32))
    np.testing.assert_array_equal(again.affine, AFFINE)


# ---- Orientation -----------------------------------------------------------------------------------------------------

def oriented(codes, shape, oblique=0.0):
    """An affine whose axes point to `codes` (such as LPS), 2 x 3 x 4 mm, turned by `oblique` radians about two axes."""
    c, s = np.cos(oblique), np.sin(oblique)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine = np.eye(4)
    for axis, (code, edge) in enumerate(zip(codes, (2, 3, 4))):
        column = np.zeros(3)
        column["RAS".index(code) if code in "RAS" else "LPI".index(code)] = edge if code in "RAS" else -edge
        affine[:3, axis] = turn @ column
    affine[:3, 3] = [5, -6, 7]
    return affine


ALL_48 = ["".join(pick) for order in itertools.permutations(("RL", "AP", "SI")) for pick in itertools.product(*order)]


@pytest.mark.parametrize("oblique", [0.0, 0.35])
def test_round_trip_in_all_orientations(tmp_path, oblique):  # row 41
    assert len(set(ALL_48)) == 48
    stored = np.zeros((5, 6, 7), np.float32)
    stored[1, 4, 2] = 1
    for codes in ALL_48:
        affine = oriented(codes, stored.shape, oblique)
        source = read_volume(save(tmp_path / f"{codes}.nii", stored, affine))
        marked = np.argwhere(source.array == 1)[0]
        np.testing.assert_allclose(nib.affines.apply_affine(source.affine, marked),
                                   nib.affines.apply_affine(affine, [1, 4, 2]), atol=1e-5)
        assert nib.aff2axcodes(source.affine) == ("R", "A", "S")
        slices = fit(source.array, 12)
        out = tmp_path / f"{codes}_out.nii"
        write_volume(out, unfit(slices, source.array.shape), source, "test")
        written = nib.load(out)
        np.testing.assert_array_equal(np.asarray(written.dataobj), stored)
        np.testing.assert_allclose(written.affine, affine, atol=1e-5)


def test_slices_are_upright_and_radiological(tmp_path):
    """The voxel nearest to the right ear, forehead and crown must be top left in the last slice."""
    for codes in ("RAS", "LAS", "LPS", "ASR", "PIR", "SLA"):
        affine = oriented(codes, None)
        shape = (6, 8, 10)
        corners = np.array(list(itertools.product(*[(0, n - 1) for n in shape])))
        world = nib.affines.apply_affine(affine, corners)
        stored = np.zeros(shape, np.float32)
        stored[tuple(corners[world.sum(1).argmax()])] = 1  # most R, A and S
        array = read_volume(save(tmp_path / f"{codes}.nii", stored, affine)).array
        x, y, z = array.shape
        assert np.argwhere(upright(array) == 1).tolist() == [[z - 1, 0, 0]]
        assert np.argwhere(fit(array, 12) == 1).tolist() == [[z - 1, (12 - y) // 2, (12 - x) // 2]]


def test_headers_without_orientation(tmp_path):  # row 41
    image = nib.Nifti1Image(head(), AFFINE)
    image.header.set_sform(None, 0)
    image.header.set_qform(None, 0)
    header = image.header.copy()
    header["vox_offset"], header["magic"], header["sform_code"], header["qform_code"] = 352, b"n+1", 0, 0
    (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(4) + head().tobytes(order="F"))
    volume = read_volume(tmp_path / "a.nii")
    assert "no orientation" in volume.notes[0]
    write_volume(tmp_path / "b.nii", volume.array, volume, "test")
    again = nib.load(tmp_path / "b.nii")
    assert again.header["sform_code"] == again.header["qform_code"] == 0
    np.testing.assert_array_equal(again.affine, nib.load(tmp_path / "a.nii").affine)
    np.testing.assert_array_equal(np.asarray(again.dataobj), head())


def test_qform_only(tmp_path):
    affine = oriented("LPS", SHAPE, 0.2)
    image = nib.Nifti1Image(head(), affine)
    image.set_sform(None, 0)
    image.set_qform(affine, 1)
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    write_volume(tmp_path / "b.nii.gz", volume.array, volume, "test")
    again = nib.load(tmp_path / "b.nii.gz")
    assert (int(again.header["sform_code"]), int(again.header["qform_code"])) == (0, 1)
    np.testing.assert_allclose(again.affine, affine, atol=1e-5)


def test_singular_affine(tmp_path):  # row 41
    flat = AFFINE.copy()
    flat[:3, 2] = flat[:3, 1] * 2
    image = nib.Nifti1Image(head(), AFFINE)
    image.set_sform(flat, 1)
    nib.save(image, tmp_path / "t1.nii")
    with pytest.raises(DataError, match="its affine is singular"):
        read_volume(tmp_path / "t1.nii")
    small = np.diag([1e-3, 1e-3, 1e-3, 1])  # microscopy, not singular
    assert read_volume(save(tmp_path / "t2.nii", head(), small)).spacing == pytest.approx([1e-3] * 3)


# ---- Resampling ------------------------------------------------------------------------------------------------------

def shifted(affine, voxels):
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ np.asarray(voxels, float)
    return moved


def test_resampling_undoes_a_known_shift(tmp_path):  # row 39
    array = head()
    fixed = read_volume(save(tmp_path / "fixed.nii", array))
    # The same head, stored from voxel (2, 3, 1) on: another shape, another origin, the same place in the world.
    cut = read_volume(save(tmp_path / "cut.nii", array[2:, 3:, 1:-1], shifted(AFFINE, (2, 3, 1))))
    result = resample_to(cut, fixed)
    np.testing.assert_allclose(result[2:, 3:, 1:-1], array[2:, 3:, 1:-1], atol=1e-3)
    assert result[0].max() == 0 and result[:, :, -1].max() == 0
    half = read_volume(save(tmp_path / "half.nii", array, shifted(AFFINE, (0.5, 0, 0))))
    between = resample_to(half, fixed)
    np.testing.assert_allclose(between[1:], (array[1:] + array[:-1]) / 2, rtol=1e-5, atol=1e-3)  # half a voxel
    labels = resample_to(half, fixed, order=0)
    assert set(np.unique(labels)) <= set(np.unique(array))


def test_resampling_fills_with_the_background_and_keeps_rim_slices(tmp_path):
    array = head() - 3
    fixed = read_volume(save(tmp_path / "fixed.nii", array))
    moving = read_volume(save(tmp_path / "moving.nii", array, shifted(AFFINE, (5, 0, 0))))
    assert (resample_to(moving, fixed)[:5] == -3).all()
    assert (resample_to(moving, fixed, fill=9)[:4] == 9).all()
    # Only the size of the box differs, and rounding puts slice 0 just outside: it must survive.
    longer = read_volume(save(tmp_path / "longer.nii", np.concatenate([array, array[..., :1]], 2)))
    longer.affine = shifted(longer.affine, (0, 0, 1e-9))
    np.testing.assert_allclose(resample_to(longer, fixed)[..., 0], array[..., 0], atol=1e-3)


def test_grids_equal_within_a_micrometre_are_untouched(tmp_path):  # row 40
    fixed = read_volume(save(tmp_path / "a.nii", head()))
    noise = read_volume(save(tmp_path / "b.nii", head(seed=1)))
    noise.affine = noise.affine + 1e-8
    assert same_grid(noise, fixed) and resample_to(noise, fixed) is noise.array
    noise.affine = shifted(fixed.affine, (0.001, 0, 0))  # 0.002 mm
    assert not same_grid(noise, fixed)
    noise.affine = shifted(fixed.affine, (0.0004, 0, 0))  # 0.0008 mm
    assert same_grid(noise, fixed)
    noise.affine = fixed.affine @ np.diag([1.0001, 1, 1, 1])  # 0.0026 mm at the far end
    assert not same_grid(noise, fixed)


def test_boxes_that_do_not_overlap(tmp_path):
    fixed = read_volume(save(tmp_path / "a.nii", head()))
    for voxels in ((15, 0, 0), (0, -19, 0), (0, 0, 10)):
        far = read_volume(save(tmp_path / "b.nii", head(), shifted(AFFINE, voxels)))
        with pytest.raises(DataError, match=r"b\.nii: lies outside the box of .*a\.nii; register"):
            resample_to(far, fixed)


def test_mixed_grids_of_a_subject_meet_in_the_first(tmp_path):  # row 39
    array = head()
    t1 = save(tmp_path / "p" / "t1.nii", array)
    t2 = save(tmp_path / "p" / "t2.nii", array[1:, 2:], shifted(AFFINE, (1, 2, 0)))
    slices = load_subject(Subject("p", "p", {"t1": t1, "t2": t2}), ("t1", "t2"), 20)
    np.testing.assert_allclose(slices.images[:, 1], slices.images[:, 0], atol=1e-3)
    assert slices.notes == [("t2.nii", "is on another grid than the first contrast; resampled by the affines")]


# ---- Intensities -----------------------------------------------------------------------------------------------------

def test_normalisation_by_hand():
    array = np.full((10, 10, 4), -3.2, np.float32)
    array[3:7, 3:7] = np.linspace(-2, 4, 64).reshape(4, 4, 4)
    u, scale = normalise(array)
    high = -2 + 6 * 0.995  # p99.5 of an even ramp
    assert scale == pytest.approx((-3.2, high), abs=1e-5)
    assert (u[array == np.float32(-3.2)] == 0).all() and background_value(array) == np.float32(-3.2)
    assert u[3, 3, 0] == pytest.approx((-2 + 3.2) / (high + 3.2), abs=1e-5) and u[6, 6, 3] == 1
    assert foreground(array).sum() == 64
    np.testing.assert_allclose(denormalise(u, scale), np.minimum(array, high), atol=1e-5)
    assert denormalise(np.float32(0.25), Scale(-4.0, 8.0)) == -1  # -4 + 12 / 4


@pytest.mark.parametrize("kind", ["stripped", "noisy"])
def test_affine_changes_of_intensity_change_nothing(kind):
    array = head((30, 30, 10))
    if kind == "noisy":
        rng = np.random.default_rng(1)
        array = np.hypot(array + rng.normal(0, 4, array.shape), rng.normal(0, 4, array.shape)).astype(np.float32)
    u, _ = normalise(array)
    mean, std = array[array > 50].mean(), array[array > 50].std()
    z, scale = normalise(((array - mean) / std).astype(np.float32))
    assert scale.background < 0
    np.testing.assert_allclose(z, u, atol=1e-5)
    large, _ = normalise(array * 1000 + 500)
    np.testing.assert_allclose(large, u, atol=1e-5)


@pytest.mark.parametrize("level", [0, 5])
def test_zscored_tissue_around_one_value_keeps_its_dark_half(level):
    truth = head((30, 30, 10))
    inside = truth > 0
    array = np.where(inside, (truth - 150) / 30 + level, level).astype(np.float32)
    u, scale = normalise(array)
    assert (u[~inside] == 0).all()
    assert scale.background == pytest.approx(np.percentile(array[inside], 0.5), abs=1e-3)
    assert np.corrcoef(u[inside], truth[inside])[0, 1] > 0.999


def test_heavy_tails_do_not_set_the_scale():
    array = head((40, 40, 20))
    array[20, 20, 10] = 1e6
    array[21, 20, 10] = -60  # interpolation overshoot
    u, scale = normalise(array)
    assert 195 < scale.high < 201 and scale.background == 0
    assert u[20, 20, 10] == 1 and u[21, 20, 10] == 0
    assert abs(int(foreground(array).sum()) - int((head((40, 40, 20)) > 0).sum())) <= 1


def test_foreground_in_noisy_air():
    rng = np.random.default_rng(0)
    truth = head((48, 48, 20)) > 0
    clean = np.where(truth, 150, 0)
    array = np.hypot(clean + rng.normal(0, 5, clean.shape), rng.normal(0, 5, clean.shape)).astype(np.float32)
    assert not find_background(array).constant
    assert background_value(array) == pytest.approx(5, abs=1.5)  # mode of Rayleigh noise is sigma
    mask = foreground(array)
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.995
    touching = array.copy()
    touching[0], touching[-1] = array[24], array[24]  # tissue on two of four faces
    assert background_value(touching) == pytest.approx(5, abs=1.5)
    touching[0], touching[-1, :20] = 150, 150  # tissue more even than the air
    assert background_value(touching) == pytest.approx(5, abs=1.5)
    raised = (array + 50).astype(np.float32)
    raised[:3, :3] = 0  # a corner that was never imaged is darker than the air, and no tissue
    assert not foreground(raised)[:3, :3].any()
    whole_numbers = np.round(array / 2).astype(np.float32)  # a fifth of the air has the same value
    assert not find_background(whole_numbers).constant
    mask = foreground(whole_numbers)
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.99


def test_background_needs_more_than_half_of_the_border():
    array = np.random.default_rng(0).uniform(100, 200, (20, 20, 5)).astype(np.float32)
    array[0] = -7
    assert not find_background(array).constant
    array[-1], array[:, 0] = -7, -7
    assert find_background(array).constant
    assert background_value(array) == -7 and (array[foreground(array)] >= 100).all()


def scan(shape=SHAPE, seed=0):
    """A CT in HU: a body of -100 to 1400 that lies on a table with a gap, air of -1000, padding of -3024 outside."""
    body = head(shape, seed) > 0
    hu = np.where(body, np.random.default_rng(seed).uniform(-100, 1400, shape), -1000).astype(np.float32)
    hu[:, -1] = -3024
    hu[:, 0] = 200  # the table reaches along the whole scan
    return hu, body


def test_ct_has_one_window_for_all_volumes():
    values = np.array([-3024, -1024, -1000, -500, 0, 250, 1500, 3071], np.float32)
    u, scale = normalise(values.reshape(2, 2, 2), contrast="ct")
    np.testing.assert_allclose(u.ravel(), [0, 0, 0, 0.2, 0.4, 0.5, 1, 1], atol=1e-7)
    assert scale == (-1000, 1500) and u.dtype == np.float32
    np.testing.assert_allclose(denormalise(u, scale).ravel(), values.clip(-1000, 1500), atol=1e-4)
    for array, sentence in ((np.full((2, 2, 2), 7.0), "is constant"), (values[:4].reshape(2, 2, 1), "above -500 HU")):
        with pytest.raises(DataError, match=sentence):
            normalise(array, contrast="ct")


def test_body_in_ct(tmp_path):
    hu, body = scan()
    np.testing.assert_array_equal(foreground(hu, contrast="ct"), body)
    assert not foreground(np.full(SHAPE, -1000, np.float32), contrast="ct").any()
    hu[..., :3] = np.where(np.arange(18)[:, None] > 0, -1000, hu[..., :3])  # only the table below the body
    slices = load_subject(Subject("p", "p", {"ct": save(tmp_path / "ct.nii", hu)}), ("ct",), 20)
    assert slices.kept.tolist() == [False] * 3 + [True] * 5 + [False] and slices.scales == {"ct": CT_WINDOW}
    np.testing.assert_allclose(slices.brain, body.sum((0, 1)) * (np.arange(9) > 2) / 400)


def test_odd_values_of_ct_are_noted(tmp_path):
    path = save(tmp_path / "ct.nii", scan()[0])
    assert read_volume(path, contrast="ct").notes == [] and "negative" in read_volume(path, contrast="t1").notes[0]
    path = save(tmp_path / "ct12.nii", scan()[0].clip(-1000) + 1000)
    assert read_volume(path, contrast="ct").notes == ["holds no air, its lowest value is 0; is it in HU?"]
    lines = []
    find = Subject("p", "p", {"ct": path})
    assert load_subject(find, ("ct",), 20).notes == [("ct12.nii", "holds no air, its lowest value is 0; is it in HU?")]
    save(tmp_path / "set" / "a" / "CT.nii.gz", scan()[0])
    save(tmp_path / "set" / "b" / "CT.nii.gz", scan(seed=1)[0] * 0 - 900)
    assert not check(tmp_path / "set", say=lines.append) and "subject b, ct" in lines[-2] and "is constant" in lines[-2]
    row = next(line for line in lines if line.startswith("a "))
    assert float(row.split()[-1]) == pytest.approx(scan()[1].mean(), abs=1e-3)


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


def test_window_of_ct_is_part_of_the_fingerprint(tmp_path, monkeypatch):
    for s in range(3):
        save(tmp_path / "set" / f"p{s}" / "T1.nii.gz", head(seed=s))
        save(tmp_path / "set" / f"p{s}" / "CT.nii.gz", scan(seed=s)[0])
    of = {contrasts: opened(tmp_path / "set", contrasts=contrasts)[0] for contrasts in (("t1",), ("t1", "ct"))}
    u = (scan(seed=0)[0].clip(-1000, 1500) + 1000) / 2500
    rows = of["t1", "ct"].subject == "p0"
    np.testing.assert_allclose(of["t1", "ct"].images[rows][:, 1], fit(u, 20)[of["t1", "ct"].z[rows]], atol=5e-4)
    monkeypatch.setattr(data, "CT_WINDOW", Scale(-1000.0, 2000.0))
    for contrasts, before in of.items():
        same = opened(tmp_path / "set", contrasts=contrasts)[0].fingerprint == before.fingerprint
        assert same == ("ct" not in contrasts)


# ---- Slices ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("shape", "size"), [((5, 7, 3), 8), ((7, 5, 2), 9), ((8, 8, 1), 8), ((6, 9, 4), 16)])
def test_padding_is_exact_and_exactly_undone(shape, size):
    array = np.random.default_rng(0).uniform(0.1, 1, shape).astype(np.float32)
    slices = fit(array, size)
    top, left = (size - shape[1]) // 2, (size - shape[0]) // 2
    for z in range(shape[2]):
        np.testing.assert_array_equal(slices[z, top:top + shape[1], left:left + shape[0]], array[::-1, ::-1, z].T)
    assert np.count_nonzero(slices) == array.size
    np.testing.assert_array_equal(unfit(slices, shape), array)
    np.testing.assert_array_equal(canonical(upright(array)), array)


def test_large_slices_are_resampled_in_place():
    shape = (48, 61, 2)
    x, y = np.meshgrid(np.arange(48), np.arange(61), indexing="ij")
    blob = np.exp(-((x - 14) ** 2 + (y - 40) ** 2) / 60).astype(np.float32)
    slices = fit(np.stack([blob, blob], -1), 32)
    scale = 32 / 61
    rows, columns = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    # A voxel centre at c goes to (c + 0.5) * scale - 0.5; rows count from the front, columns from the right.
    assert (slices[0] * rows).sum() / slices[0].sum() == pytest.approx((60 - 40 + 0.5) * scale - 0.5, abs=0.05)
    assert (slices[0] * columns).sum() / slices[0].sum() == pytest.approx((6 + 47 - 14 + 0.5) * scale - 0.5, abs=0.05)
    assert slices[0].sum() == pytest.approx(blob.sum() * scale**2, rel=0.01)
    back = unfit(slices, shape)[..., 0]
    assert (back * x).sum() / back.sum() == pytest.approx(14, abs=0.1)
    assert (back * y).sum() / back.sum() == pytest.approx(40, abs=0.1)
    assert np.abs(back - blob).max() < 0.1


def test_reduction_does_not_alias():
    stripes = np.zeros((60, 60, 1), np.float32)
    stripes[::2] = 1  # finest possible pattern
    inner = fit(stripes, 20)[0, 2:-2, 2:-2]
    assert np.abs(inner - 0.5).max() < 0.12  # without prefilter: 0 or 1


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


# ---- Writing ---------------------------------------------------------------------------------------------------------

def test_written_header(tmp_path):
    image = nib.Nifti1Image(np.round(head()).astype(np.int16), oriented("LPS", SHAPE))
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(image.affine, 4)
    image.set_qform(image.affine, 1)
    image.header["descrip"], image.header["cal_max"] = b"name of a patient", 99
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"born 1970"))
    image.header.set_slope_inter(0.5, 3)
    nib.save(image, tmp_path / "a.nii.gz")
    source = read_volume(tmp_path / "a.nii.gz")
    for name in ("b.nii.gz", "c.nii.gz"):
        write_volume(tmp_path / "new" / name, source.array / 200, source, "FLAIR, normalised " + "é" * 90)
    header = nib.load(tmp_path / "new" / "b.nii.gz").header
    text = header["descrip"].item().decode()
    assert text.startswith("synthetic; FLAIR, normalised ????") and len(text) == 79
    assert header.get_data_dtype() == np.float32
    with gzip.open(tmp_path / "new" / "b.nii.gz") as file:  # nibabel hides the slope of a file it has opened
        assert nib.Nifti1Header.from_fileobj(file).get_slope_inter() == (1, 0)
    assert (int(header["sform_code"]), int(header["qform_code"])) == (4, 1) and header.get_xyzt_units() == ("mm", "sec")
    assert header["cal_max"] == 0 and len(header.extensions) == 0
    assert b"born" not in gzip.decompress((tmp_path / "new" / "b.nii.gz").read_bytes())
    packed = (tmp_path / "new" / "b.nii.gz").read_bytes()
    assert packed == (tmp_path / "new" / "c.nii.gz").read_bytes() and packed[3:8] == bytes(5)  # no name, no clock
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["b.nii.gz", "c.nii.gz"]


def test_nothing_is_overwritten_or_left_half_written(tmp_path, monkeypatch):
    source = read_volume(save(tmp_path / "a.nii", head()))
    out = tmp_path / "b.nii"
    write_volume(out, source.array, source, "first")
    before = out.read_bytes()
    with pytest.raises(DataError, match="exists already"):
        write_volume(out, source.array * 0, source, "second")
    with pytest.raises(ValueError, match="is not on the grid"):
        write_volume(tmp_path / "c.nii", source.array[1:], source, "shape")

    def full_disk(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        with pytest.raises(DataError, match="cannot be written .No space left"):
            write_volume(out, source.array * 0, source, "third", overwrite=True)
    assert out.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["a.nii", "b.nii"]
    write_volume(out, source.array * 2, source, "synthetic t1", overwrite=True)
    assert nib.load(out).header["descrip"].item() == b"synthetic t1"
    np.testing.assert_array_equal(nib.load(out).get_fdata(), head() * 2)


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


# ---- Layouts and captions --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "subject", "role"), [
    ("BraTS2021_00000_t1ce.nii.gz", "BraTS2021_00000", "t1ce"),
    ("BraTS20_Training_001_flair.nii", "BraTS20_Training_001", "flair"),
    ("BraTS20_Training_001_seg.nii", "BraTS20_Training_001", "seg"),
    ("W39_1998.09.19_Segm.nii", "BraTS20_Training_355", "seg"),
    ("BraTS-GLI-00000-000-t1n.nii.gz", "BraTS-GLI-00000-000", "t1"),
    ("BraTS-GLI-00000-000-t1c.nii.gz", "BraTS-GLI-00000-000", "t1ce"),
    ("BraTS-GLI-00000-000-t2w.nii.gz", "BraTS-GLI-00000-000", "t2"),
    ("BraTS-GLI-00000-000-t2f.nii.gz", "BraTS-GLI-00000-000", "flair"),
    ("T1c_subtrMeanDivStd.nii.gz", "patient01", "t1ce"), ("T1.nii.gz", "p1", "t1"),
    ("OpenMS_07_pd.nii", "OpenMS_07", "pd"),
    ("sub-01_ce-gadolinium_T1w.nii.gz", "sub-01", "t1ce"), ("T2_FLAIR.nii", "p1", "flair"), ("t1.nii", "t1", "t1"),
    ("t2_ct.nii", "t2", "ct"), ("t1x_t2.nii", "t1", "t2"), ("CT.nii.gz", "p", "ct"), ("PET.nii.gz", "p", "pet"),
    ("brainmask.nii.gz", "p", None), ("OTMultiClass.nii.gz", "p", None), ("CT_tumour.nii.gz", "p", None),
    ("T2W_to_FLAIR.nii.gz", "p", None), ("contrast1.nii", "p", None), ("spectrum.nii", "p", None),
])
def test_file_names(name, subject, role):
    assert role_of(name, subject) == role


def test_brats_2023_visits_belong_to_one_person(tmp_path):
    for case in ("00000-000", "00000-001", "00001-000", "00002-000"):
        save(tmp_path / "d" / f"BraTS-GLI-{case}" / f"BraTS-GLI-{case}-t1n.nii.gz", head(seed=int(case[4] + case[-1])))
        save(tmp_path / "d" / f"BraTS-GLI-{case}" / f"BraTS-GLI-{case}-seg.nii.gz", (head() > 0).astype(np.uint8))
    layout = find_layout(tmp_path / "d")
    assert layout.name == "BraTS 2023" and layout.contrasts == ("t1",)
    assert [s.person for s in layout.subjects] == ["BraTS-GLI-00000"] * 2 + ["BraTS-GLI-00001", "BraTS-GLI-00002"]
    assert layout.subjects[1].segmentation.name == "BraTS-GLI-00000-001-seg.nii.gz"
    assert person_of("BraTS2021_00000") == "BraTS2021_00000"
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["BraTS-GLI-00000-000"], "test": ["BraTS-GLI-00000-001"]}))
    with pytest.raises(DataError, match="visits of BraTS-GLI-00000 are in train and test"):
        opened(tmp_path / "d", split_file=split)


def test_layout_of_a_nested_tree(tmp_path):
    make_set(tmp_path / "brats" / "train", subjects=2)
    save(tmp_path / "brats" / "train" / "BraTS2021_00000" / "brainmask.nii.gz", head())
    save(tmp_path / "brats" / "test" / "BraTS2021_00007" / "BraTS2021_00007_t2.nii.gz", head())
    layout = find_layout(tmp_path)
    assert layout.name == "BraTS 2021" and layout.contrasts == ("flair", "t1")
    assert [s.name for s in layout.subjects] == ["BraTS2021_00000", "BraTS2021_00001"]
    assert [p.name for p in layout.ignored] == ["brainmask.nii.gz"]
    assert layout.skipped == [("BraTS2021_00007", "has none of flair, t1")]
    assert "t2: in 1 of 3 subjects only" in layout.notes[0]


def test_chosen_contrasts(tmp_path):
    folder = make_set(tmp_path / "set", contrasts=("flair", "t1", "t1ce"))
    assert find_layout(folder).contrasts == ("flair", "t1", "t1ce")
    assert find_layout(folder, ("T1Gd", "flair")).contrasts == ("t1ce", "flair")
    assert canonical_contrast("T2F") == "flair" and canonical_contrast("Other") == "other"
    with pytest.raises(DataError, match="no contrast t9; there are flair, t1, t1ce"):
        find_layout(folder, ("t1", "t9"))
    with pytest.raises(DataError, match="no contrast pd, t2; there are flair, t1, t1ce"):
        find_layout(folder, ("pd", "t2"))
    with pytest.raises(DataError, match="named twice"):
        find_layout(folder, ("t1", "t1n"))
    target = find_layout(folder, ("t1", "t2"))  # t2 is to be synthesised
    assert target.contrasts == ("t1", "t2") and list(target.subjects[0].files) == ["t1"]
    assert "t2: no subject has it; there are flair, t1, t1ce" in target.notes
    images = opened(folder, contrasts=("t1ce", "flair"))[0].images
    np.testing.assert_array_equal(images[:, ::-1], opened(folder, contrasts=("flair", "t1ce"))[0].images)


def test_caption_text():
    assert caption("flair", 0.42, 0.314, "left, 412 mm2") == \
        "Modality: FLAIR; Plane: axial; Slice: 0.42; Brain: 0.31; Lesion: left, 412 mm2"
    assert caption("t1ce", 1, 0.2) == "Modality: T1CE; Plane: axial; Slice: 1.00; Brain: 0.20"
    assert caption("t2", 0, 0.2, "none", {"age": 54, "sex": None, "TE": 2000000.0, "TR": 4.25}) == \
        "Modality: T2w; Age: 54 y; TR: 4.25 ms; TE: 2000000 ms; Plane: axial; Slice: 0.00; Brain: 0.20; Lesion: none"


@pytest.mark.parametrize(("sign", "side"), [(-1, "left"), (1, "right")])
@pytest.mark.parametrize("codes", ["RAS", "LPS"])
def test_lesion_side_is_the_patients(tmp_path, sign, side, codes):
    """A lesion at world x < 0 is on the patient's left; 6 voxels of 2 x 3 mm are 36 mm2. The head is off the middle."""
    array = np.pad(head(), ((6, 0), (0, 0), (0, 0)))
    labels = np.zeros(array.shape, np.uint8)
    middle = 6 + SHAPE[0] // 2
    labels[middle + 3 * sign:middle + 3 * sign + 2, 7:10, 4] = 4
    affine = AFFINE.copy()
    if codes == "LPS":
        array, labels = array[::-1, ::-1], labels[::-1, ::-1]
        affine = AFFINE @ np.array([[-1, 0, 0, 19], [0, -1, 0, 17], [0, 0, 1, 0], [0, 0, 0, 1]])
    image, seg = save(tmp_path / "p" / "t1.nii", array, affine), save(tmp_path / "p" / "seg.nii", labels, affine)
    slices = load_subject(Subject("p", "p", {"t1": image}, seg), ("t1",), 32)
    assert slices.lesion[4] == f"{side}, 36 mm2" and slices.lesion[3] == "none"


def test_lesion_on_both_sides():
    labels = np.zeros((4, 10))
    labels[0, 2:8] = 1
    assert describe_lesion(labels, 4.5, 2.0) == "both sides, 12 mm2"
    assert describe_lesion(labels, 3.5, 1.0) == "both sides, 6 mm2"  # two thirds are not enough
    assert describe_lesion(labels, 2.5, 1.0) == "left, 6 mm2"
    assert describe_lesion(labels, 6.5, 1.0) == "right, 6 mm2"


def make_patients(folder, names, sheet, text):
    for s, name in enumerate(names):
        save(folder / name / "T1.nii.gz", head(seed=s))
    (folder / sheet).write_text(text, encoding="utf-8")
    return folder


def test_patients_sheet(tmp_path):
    text = ("patient,age,sex,scanner,scanner_ct,body\n1_01_P,61.5,M,GE Discovery 3T,Siemens Somatom,pelvis\n"
            "1_02_P,,m,,n/a,\n1_03_P,60,,A,\n1_03_P,61,,A,\n,,,\n2_01_P,-,x,None\n9,50,F,B\n")
    names = ("1_01_P", "1_02_P", "1_03_P", "2_01_P", "2_02_P")
    layout = find_layout(make_patients(tmp_path, names, "meta.csv", text))
    assert [s.meta for s in layout.subjects] == [
        {"age": 61.5, "sex": "M", "scanner": "GE Discovery 3T", "scanner_ct": "Siemens Somatom", "body": "pelvis"},
        {"sex": "M"}, {}, {}, {}]
    assert layout.notes == ["meta.csv: the rows of 1_03_P contradict each other; its facts stay unknown",
                            "1 subjects have no row in meta.csv: 2_02_P"]
    (tmp_path / "meta.csv").write_text("name,age\n1_01_P,5\n")
    assert find_layout(tmp_path).notes == ["meta.csv: has no column patient; age, sex and scanner stay unknown"]


def test_patients_by_number(tmp_path):
    text = "patient_id,age,sex,ms_type,edss\n7,53,F,RR,0.5\n19,N/A,M,RR,4\n,,,,\n8,41,M,RR,5\n"
    layout = find_layout(make_patients(tmp_path / "a", ("OpenMS_07", "OpenMS_19"), "patient_info.csv", text))
    assert [s.meta for s in layout.subjects] == [{"age": 53, "sex": "F"}, {"sex": "M"}] and layout.notes == []
    names = ("siteA_07", "siteB_07")  # which of them is patient 7?
    layout = find_layout(make_patients(tmp_path / "b", names, "patient_info.csv", text))
    assert [s.meta for s in layout.subjects] == [{}, {}]
    assert layout.notes == ["2 subjects have no row in patient_info.csv: siteA_07, siteB_07"]


def test_prompt():
    meta = {"body": "brain", "site": "Guys", "scanner": "Philips", "field": 1.5, "age": 35.8, "sex": "F",
            "times": {"t2": (8178.34, 100)}}
    assert prompt("t2", meta) == ("Age: 35; Gender: F; Scanner: Philips 1.5T; "
                                  "Description: T2-weighted MRI of the brain, TR 8178 ms, TE 100 ms")
    assert prompt("pd", meta, ("description", "age")) == "Age: 35; Description: PD-weighted MRI of the brain"
    assert prompt("flair", {"body": "brain"}) == \
        "Age: None; Gender: None; Scanner: None; Description: FLAIR MRI of the brain"
    assert prompt("t1", {"field": 3.0}, ("scanner",)) == "Scanner: None" and prompt("t1", {}, ()) == ""
    pelvis = {"scanner": "GE 3T", "scanner_ct": "Siemens", "sex": "M", "body": "pelvis"}
    assert [prompt(c, pelvis, ("scanner", "description")) for c in ("ct", "t1")] == [
        "Scanner: Siemens; Description: CT of the pelvis", "Scanner: GE 3T; Description: T1-weighted MRI of the pelvis"]
    assert prompt("t2", meta, masked=("modality",)) == (
        "Age: 35; Gender: F; Scanner: Philips 1.5T; Description: [MASK] of the brain, TR [MASK] ms, TE [MASK] ms")
    assert prompt("ct", pelvis, ("scanner", "description"), ("modality",)) == "Scanner: [MASK]; Description: [MASK] of the pelvis"
    assert prompt("t1", pelvis, ("scanner",), ("modality",)) == "Scanner: GE 3T"        # shared by all contrasts that name no other
    assert prompt("t2", meta, masked=("age", "scanner", "description")) == \
        "Age: [MASK]; Gender: F; Scanner: [MASK]; Description: [MASK]"
    for options, word in (({"fields": ("sex",)}, "no sex"), ({"fields": ("modality",)}, "no modality"),
                          ({"masked": ("TE",)}, "no TE")):
        with pytest.raises(DataError, match=f"{word}; there are age, gender, scanner, description"):
            prompt("t2", meta, **options)


def test_prompts_of_the_data_sets(tmp_path):
    folder = make_ixi(tmp_path / "ixi", IXI_NAMES)
    (folder / "IXI.csv").write_text(HEADER.format(",") + "\n2,2,164,35.8\n")

    def said(contrast):
        return [prompt(contrast, s.meta) for s in find_layout(folder).subjects]
    assert said("t1") == [
        "Age: 35; Gender: F; Scanner: Philips 1.5T; Description: T1-weighted MRI of the brain, TR 9.813 ms, TE 4.603 ms",
        "Age: None; Gender: None; Scanner: Philips 3T; Description: T1-weighted MRI of the brain, TR 9.6 ms, TE 4.6 ms",
        "Age: None; Gender: None; Scanner: GE 1.5T; Description: T1-weighted MRI of the brain"]
    assert said("pd")[1].endswith("PD-weighted MRI of the brain, TR 5726 ms, TE 8 ms")
    (folder / "phantom.json").write_text("{}")  # the protocols of phantoms are others
    assert [text.split("; ", 2)[2] for text in said("t2")] == [
        f"Scanner: {scanner}; Description: T2-weighted MRI of the brain" for scanner in ("Philips 1.5T", "Philips 3T", "GE 1.5T")]
    brats = find_layout(make_set(tmp_path / "brats", subjects=1)).subjects[0]
    assert prompt("t1", brats.meta).endswith("Scanner: None; Description: T1-weighted MRI of the brain")
    assert find_layout(make_adni(tmp_path / "adni")).subjects[0].meta == {"body": "brain"}


def test_prompts_as_the_tokenizer_reads_them():
    """None and [MASK] are tokens, and the numbers are values."""
    split = pytest.importorskip("common.tokenizer").split
    meta = {"scanner": "Philips", "field": 1.5, "body": "brain", "age": 35, "times": {"t2": (8178.34, 100)}}
    text = prompt("t2", meta, masked=("modality",))
    kinds = [piece for piece in split(text) if piece[0] not in ("word", "mark")]
    assert kinds == [("number", "35"), ("none", "none"), ("number", "1.5"), *[("mask", "[mask]")] * 3]
    assert [piece for kind, piece in split(prompt("t2", meta)) if kind == "number"] == ["35", "1.5", "8178", "100"]


# ---- Slices that are cut and split already ---------------------------------------------------------------------------

def make_slices(folder, counts=(("train", 5), ("val", 2), ("test", 4)), contrasts=("T1", "PD"), shape=(10, 14)):
    """The value of a pixel tells contrast, part and slice; slice 10 sorts behind slice 9, not 1."""
    for c, contrast in enumerate(contrasts):
        for p, (part, count) in enumerate(counts):
            for i in range(count):
                (folder / contrast / part).mkdir(parents=True, exist_ok=True)
                slice_ = np.zeros(shape)
                slice_[2:4, 5] = 0.3 + c / 4 + p / 8 + i / 128
                np.save(folder / contrast / part / f"slice_{8 + i}.npy", slice_)
    return folder


@pytest.mark.parametrize(("name", "text"), [
    ("subject_ids.yaml", "# of the test slices\n- 3\n- 3\n- 11\n- 3  # again\n"), ("subject_ids.yml", "[3, '3', 11,\n 3]"),
    ("subject_ids.json", '["3", 3, "11", 3]'), ("subject_ids.txt", "3\n3\n11\n3"),
])
def test_slices_with_subjects(tmp_path, name, text):
    folder = make_slices(tmp_path / "set")
    (folder / "mask" / "test").mkdir(parents=True)
    np.save(folder / "mask" / "test" / "slice_7.npy", np.zeros((10, 14)))
    (folder / name).write_text(text)
    dataset, said = opened(folder, size=16)
    assert dataset.contrasts == ("t1", "pd") and dataset.layout == "slices in .npy files"
    assert dataset.split == {"train": ["train"], "val": ["val"], "test": ["test_11", "test_3"]}
    assert [len(dataset.part(part)) for part in ("train", "val", "test")] == [5, 2, 4]
    assert "train: it is not known whose slices these are" in said and "impossible" not in said
    assert "1 other .npy files are not used" in said and dataset.scales["test_3"] == {}
    pixels = np.array(dataset.images[dataset.subject == "test_3"])[:, :, 5, 6]  # padded by 3 rows and 1 column
    np.testing.assert_allclose(pixels, [[0.55 + i / 128, 0.8 + i / 128] for i in (0, 1, 3)], atol=1e-3)
    assert dataset.images[:, :, :5].max() == dataset.images[:, :, 7:].max() == 0


def test_slices_without_subjects(tmp_path):
    folder = make_slices(tmp_path / "set", counts=(("train", 5), ("test", 4)))
    dataset, said = opened(folder, contrasts=("PD", "T1"), size=16)
    assert dataset.split == {"train": ["train"], "val": [], "test": ["test"]} and dataset.contrasts == ("pd", "t1")
    np.testing.assert_allclose(dataset.part("train")[:][:, :, 5, 6], [[0.55 + i / 128, 0.3 + i / 128] for i in range(5)],
                               atol=1e-3)
    assert "count as one subject; statistics over subjects are impossible" in said
    again = opened(folder, contrasts=("PD", "T1"), size=16)[0]
    np.save(folder / "PD" / "train" / "slice_9.npy", np.eye(10, 14))
    changed = opened(folder, contrasts=("PD", "T1"), size=16)[0]
    assert again.fingerprint == dataset.fingerprint != changed.fingerprint
    np.testing.assert_array_equal(changed.part("train")[1][0, 3:13, 1:15], np.eye(10, 14))
    np.save(folder / "PD" / "train" / "slice_9.npy", np.zeros((10, 14)))
    assert len(opened(folder, size=16)[0].part("train")) == 4  # a constant slice is left out
    with pytest.raises(DataError, match="test: .npy slices have no place in space"):
        list(data.to_synthesize(dataset.subjects, dataset.contrasts, ("t1",), 16, tmp_path, print))
    lines = []
    assert check(folder, say=lines.append)
    assert [line.split()[:3] for line in lines if line.startswith("test ")] == [["test", "t1", "14x10x4"],
                                                                                 ["test", "pd", "14x10x4"]]


@pytest.mark.parametrize(("name", "array", "sentence"), [
    ("PD/val/slice_10.npy", np.zeros((10, 14)), r"t1 has no val/slice_10\.npy, as pd has"),
    ("T2/train/slice_8.npy", np.zeros((10, 14)), r"t2 has no "),
    ("T1w/val/slice_8.npy", np.zeros((10, 14)), r"slice_8\.npy: is t1 of the same slice as .*slice_8\.npy"),
    ("T1/val/slice_8.npy", np.zeros((10, 13)), r"slice_9\.npy: has shape \(10, 14\), .*slice_8\.npy has \(10, 13\)"),
    ("T1/val/slice_9.npy", np.zeros((1, 10, 14)), r"slice_9\.npy: holds float64 of shape \(1, 10, 14\)"),
    ("T1/val/slice_9.npy", np.full((10, 14), -1.0), r"slice_9\.npy: holds values from -1 to -1; scale"),
    ("T1/val/slice_9.npy", np.full((10, 14), np.nan), r"slice_9\.npy: holds values from nan"),
    ("T1/val/slice_9.npy", np.full((10, 14), 255), r"slice_9\.npy: holds values from 255"),
    ("T1/val/slice_9.npy", None, r"slice_9\.npy: cannot be read as an array"),
    ("subject_ids.txt", None, r"subject_ids\.txt: names 1 subjects for 4 test slices"),
])
def test_bad_slices(tmp_path, name, array, sentence):
    folder = make_slices(tmp_path / "set")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if array is None:
        (folder / name).write_text("word")
    else:
        np.save(folder / name, array)
    with pytest.raises(DataError, match=sentence):
        opened(folder, size=16)
    lines = []
    assert not check(folder, say=lines.append) and any(line.startswith("error") for line in lines)


def test_slices_need_train_and_test(tmp_path):
    with pytest.raises(DataError, match="has slices for train, val only; train and test are needed"):
        find_layout(make_slices(tmp_path / "set", counts=(("train", 2), ("val", 2))))


# ---- IXI and ADNI ----------------------------------------------------------------------------------------------------

FINE = AFFINE @ np.diag([1, 1, 0.5, 1])  # 2 mm between slices: every second one is one of AFFINE's


def sagittal(array, affine):
    """Canonical (X, Y, Z) as a sagittal scan stores it: axes to the back, to the head, to the right."""
    turn = np.array([[0, 0, 1, 0], [-1, 0, 0, array.shape[1] - 1], [0, 1, 0, 0], [0, 0, 0, 1]])
    return np.ascontiguousarray(array[:, ::-1].transpose(1, 2, 0)), affine @ turn


def fine_head(seed):
    return head((14, 18, 17), seed)


def echoes(seed):
    """PD and T2 of one head, brighter towards the crown, as coil and anatomy have it; they overlap in value."""
    ramp = np.linspace(0.8, 1.2, SHAPE[2])
    return (1.5 * head(seed=seed) * ramp).astype(np.float32), (head(seed=seed + 1) * ramp).astype(np.float32)


def in_one_file(first, second, form):
    if form == "4-D":
        return np.stack([first, second], -1)
    stack = np.concatenate([first, second], 2)
    if form == "alternating":
        stack[..., ::2], stack[..., 1::2] = first, second
    return stack


def make_ixi(folder, names, in_one_folder=False):
    for seed, name in enumerate(names):
        pd, t2 = echoes(10 * seed)
        for contrast, (array, affine) in {"T1": sagittal(fine_head(10 * seed + 2), FINE), "T2": (t2, AFFINE),
                                          "PD": (pd, AFFINE)}.items():
            save(folder / ("" if in_one_folder else f"IXI-{contrast}") / f"{name}-{contrast}.nii.gz", array, affine)
    return folder


IXI_NAMES = ("IXI002-Guys-0828", "IXI012-HH-1211", "IXI035-IOP-0873")


@pytest.mark.parametrize("in_one_folder", [False, True])
def test_ixi_as_downloaded(tmp_path, in_one_folder):
    folder = make_ixi(tmp_path / "set", IXI_NAMES, in_one_folder)
    save(folder / "IXI-MRA" / "IXI002-Guys-0828-MRA.nii.gz", head())
    os.remove(next(folder.rglob("IXI035-IOP-0873-PD.nii.gz")))
    layout = find_layout(folder)
    assert layout.name == "IXI" and layout.contrasts == ("t1", "t2", "pd")
    assert [(s.name, s.person) for s in layout.subjects] == [(name, name[:6]) for name in IXI_NAMES]
    assert {contrast: path.name for contrast, path in layout.subjects[1].files.items()} == {
        contrast: f"IXI012-HH-1211-{contrast.upper()}.nii.gz" for contrast in ("t1", "t2", "pd")}
    times = [s.meta.pop("times", None) for s in layout.subjects]
    assert [s.meta for s in layout.subjects] == [
        {"body": "brain", "site": "Guys", "scanner": "Philips", "field": 1.5},
        {"body": "brain", "site": "HH", "scanner": "Philips", "field": 3.0},
        {"body": "brain", "site": "IOP", "scanner": "GE", "field": 1.5}]
    assert [of and (of["t2"], of["pd"]) for of in times] == [((8178.34, 100), (8178.34, 8)), ((5725.79, 100), (5725.79, 8)),
                                                             None]
    assert [path.name for path in layout.ignored] == ["IXI002-Guys-0828-MRA.nii.gz"]
    assert layout.notes == ["1 subjects lack pd: IXI035-IOP-0873"]
    dataset, said = opened(folder)
    assert "(IXI), 2 subjects with t1, t2, pd, 1 incomplete" in said and len(dataset.incomplete) == 1
    assert "IXI002-Guys-0828-T1.nii.gz and 1 more: is on another grid than t2; resampled by the affines" in said
    rows = dataset.subject == "IXI012-HH-1211"
    truth = np.stack([fit(normalise(array)[0], 20) for array in (fine_head(12)[..., ::2], *echoes(10)[::-1])], 1)
    scale = normalise(fine_head(12))[1].high / normalise(fine_head(12)[..., ::2])[1].high
    truth[:, 0] = np.minimum(truth[:, 0] / scale, 1)  # a scale belongs to the whole scan, before it is resampled
    inside = truth[dataset.z[rows]][:, 0] < 0.98  # above, only one of the two was clipped
    np.testing.assert_allclose(dataset.images[rows][:, 0][inside], truth[dataset.z[rows]][:, 0][inside], atol=2e-3)
    np.testing.assert_allclose(dataset.images[rows][:, 1:], truth[dataset.z[rows]][:, 1:], atol=1e-3)
    lines = []
    assert check(folder, say=lines.append)
    rows = [line.split()[:5] for line in lines if line.startswith("IXI002")]
    assert rows == [["IXI002-Guys-0828", "t2", "14x18x9", "2.00x3.00x4.00", "RAS"],
                    ["IXI002-Guys-0828", "pd", "14x18x9", "2.00x3.00x4.00", "RAS"],
                    ["IXI002-Guys-0828", "t1", "14x18x17", "2.00x3.00x2.00", "PSR"]]


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


def test_ixi_names_must_be_all_there_is(tmp_path):
    folder = make_ixi(tmp_path / "set", IXI_NAMES[:2])
    copy = save(folder / "other" / "IXI002-Guys-0828-T1.nii", head())
    with pytest.raises(DataError, match=r"T1\.nii: IXI002-Guys-0828 has another t1, .*IXI-T1.*; remove one"):
        find_layout(folder)
    os.remove(copy)
    save(folder / "mine" / "t1.nii", head())
    with pytest.raises(DataError, match="IXI-PD: holds 3 files of each contrast"):  # nor a folder per subject
        find_layout(make_ixi(folder, IXI_NAMES))
    own = make_set(tmp_path / "own", subjects=1)
    for contrast in ("T1", "T2"):
        save(own / "IXI002-Guys-0828" / f"IXI002-Guys-0828-{contrast}.nii", head())
    layout = find_layout(own, ("t1",))
    assert layout.name == "one folder per subject" and len(layout.subjects) == 2 and layout.subjects[1].grid == ()


HEADER = "IXI_ID{0}\"SEX_ID (1=m, 2=f)\"{0}HEIGHT{0}AGE"


@pytest.mark.parametrize(("rows", "facts"), [
    (["2,2,164,35.8", "12,1,0,38.78"], [{"sex": "F", "age": 35.8}, {"sex": "M", "age": 38.78}]),
    (["2;2;164;35,8", "12;1;0;38,78"], [{"sex": "F", "age": 35.8}, {"sex": "M", "age": 38.78}]),  # a German Excel
    (["2.0\t2\t1\t35.8", "\t1\t1\t40", "012\t1\t1\t0"], [{"sex": "F", "age": 35.8}, {"sex": "M"}]),
    (["2,0,164,", "12,3,n/a,-4", "35"], [{}, {}]),
    (["2,2,164,35.8", "2,2,164,35.8", "12,1,0,0", "12,0,0,38.78"],
     [{"sex": "F", "age": 35.8}, {"sex": "M", "age": 38.78}]),
    (["2,2,164,35.8", "2,2,164,45.8", "12,1,0,50"], [{}, {"sex": "M", "age": 50}]),
    (["2,2,164,35.8", "2,1,164,35.8", "12,1,0,50"], [{}, {"sex": "M", "age": 50}]),
])
def test_ixi_sheet(tmp_path, rows, facts):
    folder = make_ixi(tmp_path / "set", IXI_NAMES[:2])
    delimiter = next(mark for mark in ";\t," if mark in rows[0])
    text = "\n".join([HEADER.format(delimiter), *rows, ""])
    (folder / "IXI.csv").write_text(text, encoding="utf-8-sig")
    layout = find_layout(folder)
    for subject, known in zip(layout.subjects, facts):
        assert {key: subject.meta[key] for key in ("sex", "age") if key in subject.meta} == known
        assert subject.meta["site"] == ("Guys" if subject.name == "IXI002-Guys-0828" else "HH")
    contradictory = "IXI.csv: the rows of IXI002 contradict each other; its age and sex stay unknown"
    assert layout.notes == ([contradictory] if rows[1].startswith("2,") and rows[0] != rows[1] else [])


def test_ixi_sheet_that_is_missing_or_odd(tmp_path):
    folder = make_ixi(tmp_path / "set", IXI_NAMES)
    (folder / "IXI.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    assert find_layout(folder).notes == ["IXI.xls: Excel is not read; save it as IXI.csv to have age and sex"]
    (folder / "IXI-demographics.CSV").write_text(HEADER.format(",") + "\n12,1,180,50\n")
    layout = find_layout(folder)
    assert layout.notes == ["2 subjects have no row in the sheet of IXI: IXI002-Guys-0828, IXI035-IOP-0873"]
    assert [s.meta.get("age") for s in layout.subjects] == [None, 50, None]
    for content in (b"", b"name,age\n1,2\n", HEADER.format(",").encode("utf-16")):
        (folder / "IXI-demographics.CSV").write_bytes(content)
        assert find_layout(folder).notes == ["IXI-demographics.CSV: has no columns IXI_ID, SEX_ID, AGE; "
                                             "age and sex stay unknown"]
    (folder / "IXI.csv").write_text(HEADER.format(",") + "\n2,2,164,35\n12,2,164,36\n35,2,164,37\n")
    layout = find_layout(folder)
    assert "IXI-demographics.CSV is used, not IXI.csv" in layout.notes


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("pd_first", [True, False])
@pytest.mark.parametrize("form", ["4-D", "alternating", "halves"])
def test_two_echoes_in_one_file(tmp_path, form, pd_first, turned):
    pd, t2 = echoes(5)
    affine, stored = AFFINE, (pd, t2) if pd_first else (t2, pd)
    if turned:  # stored from left to right, back to front, crown to neck
        affine = AFFINE @ np.array([[-1, 0, 0, 13], [0, -1, 0, 17], [0, 0, -1, 8], [0, 0, 0, 1]])
        stored = [array[::-1, ::-1, ::-1] for array in stored]
    path = save(tmp_path / "pd_t2.nii.gz", in_one_file(*stored, form), affine)
    for echo, truth in enumerate((pd, t2)):
        volume = read_volume(path, echo=echo)
        np.testing.assert_array_equal(volume.array, truth)
        np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)  # spacing and origin of one echo's slices
        assert volume.notes == ["holds both echoes; with its header's slice distance each covers 36 mm"]
        write_volume(tmp_path / f"{echo}.nii", volume.array, volume, "test")
        written = nib.load(tmp_path / f"{echo}.nii")
        assert written.shape == SHAPE and written.header.get_zooms() == (2, 3, 4)
        np.testing.assert_array_equal(read_volume(tmp_path / f"{echo}.nii").array, truth)


def test_no_two_echoes(tmp_path):
    pd, t2 = echoes(5)
    odd = in_one_file(pd, t2, "halves")[..., :-1]
    with pytest.raises(DataError, match=r"a\.nii: has 17 slices, an odd number"):
        read_volume(save(tmp_path / "a.nii", odd), echo=0)
    half = head()[..., :4]
    alike = np.concatenate([half, half[..., ::-1]], 2)  # two halves and two sets of slices of equal brightness
    with pytest.raises(DataError, match=r"b\.nii: no half of it is brighter"):
        read_volume(save(tmp_path / "b.nii", alike), echo=1)
    with pytest.raises(DataError, match=r"is 4-D with shape \(14, 18, 9, 3\)"):
        read_volume(save(tmp_path / "c.nii", np.stack([pd, t2, t2], -1)), echo=0)
    bad = in_one_file(t2, pd, "4-D")
    bad[7, 9, 4, 1], bad[0, 0, 0, 0] = np.nan, np.inf
    volume = read_volume(save(tmp_path / "d.nii", bad), echo=0)
    assert "has 2 NaN" in volume.notes[0] and volume.array[7, 9, 4] == 0 and volume.array[8, 9, 4] == pd[8, 9, 4]


def test_two_echoes_without_orientation(tmp_path):
    """NIfTI's default puts the middle of the image at 0: the middle of one echo, not of the stack."""
    def bare(name, array):
        header = nib.Nifti1Image(array, AFFINE).header.copy()
        header["vox_offset"], header["magic"], header["sform_code"], header["qform_code"] = 352, b"n+1", 0, 0
        (tmp_path / name).write_bytes(header.binaryblock + bytes(4) + array.tobytes(order="F"))
        return tmp_path / name
    pd, t2 = echoes(5)
    stacked = read_volume(bare("both.nii", in_one_file(pd, t2, "halves")), echo=1)
    single = read_volume(bare("t2.nii", t2))
    np.testing.assert_array_equal(stacked.affine, single.affine)


def adni(folder, person, series, day, files, time="09_47_59.0"):
    """files: {end of the name: (array, affine)} of one series."""
    for end, (array, affine) in files.items():
        name = f"ADNI_{person}_MR_{series}__br_raw_20061115094759_1_S22556_I29704{end}"
        save(folder / person / series / f"{day}_{time}" / "I29704" / name, array, affine)


def make_adni(folder):
    """Five visits of three persons, each with its PD/T2 in another form; the last lacks PD/T2."""
    forms = (("002_S_0413", "2006-11-15", "Axial_PD_T2_FSE", "4-D"),
             ("002_S_0413", "2007-05-20", "Axial_PD_T2_TSE", "alternating"),
             ("005_S_0221", "2006-01-02", "Double_TSE", "halves"), ("011_S_0002", "2005-08-26", "AX_PD-T2", None))
    for seed, (person, day, series, form) in enumerate(forms):
        pd, t2 = echoes(10 * seed)
        files = {".nii": (in_one_file(t2, pd, form), AFFINE)} if form else {"_e1.nii": (pd, AFFINE),
                                                                             "_e2.nii": (t2, AFFINE)}
        adni(folder, person, series, day, files)
        adni(folder, person, "MPRAGE", day, {".nii": sagittal(fine_head(10 * seed + 2), FINE)}, "09_12_00.0")
        adni(folder, person, "MP-RAGE_Repeat", day, {".nii": sagittal(fine_head(99), FINE)}, "09_20_00.0")
    adni(folder, "005_S_0221", "MP-RAGE_REPEAT", "2006-07-08", {".nii": sagittal(fine_head(50), FINE)})
    adni(folder, "005_S_0221", "3-plane_localizer", "2006-07-08", {".nii": (head(), AFFINE)})
    return folder


ADNI_NAMES = ["002_S_0413_2006-11-15", "002_S_0413_2007-05-20", "005_S_0221_2006-01-02", "005_S_0221_2006-07-08",
              "011_S_0002_2005-08-26"]


def test_adni_as_downloaded(tmp_path):
    folder = make_adni(tmp_path / "ADNI")
    layout = find_layout(folder)
    assert layout.name == "ADNI" and layout.contrasts == ("t1", "t2", "pd")
    assert [s.name for s in layout.subjects] == ADNI_NAMES and {s.name[:10] for s in layout.subjects} == {
        s.person for s in layout.subjects}
    assert [s.files["t1"].parents[2].name for s in layout.subjects] == ["MPRAGE"] * 3 + ["MP-RAGE_REPEAT", "MPRAGE"]
    assert [path.parents[2].name for path in layout.ignored] == ["3-plane_localizer"]
    assert layout.notes[0].startswith("4 files repeat a scan of the same day") and "Repeat" in layout.notes[0]
    assert layout.notes[1] == "1 subjects lack t2, pd: 005_S_0221_2006-07-08"
    for seed, subject in enumerate([*layout.subjects[:3], layout.subjects[4]]):
        pd, t2 = echoes(10 * seed)
        for contrast, truth in (("pd", pd), ("t2", t2)):
            volume = read_volume(subject.files[contrast], echo=subject.echoes.get(contrast))
            np.testing.assert_array_equal(volume.array, truth)
        slices = load_subject(subject, ("t1", "t2", "pd"), 20)
        t1 = fit(normalise(fine_head(10 * seed + 2))[0][..., ::2], 20)
        truth = np.stack([t1, fit(normalise(t2)[0], 20), fit(normalise(pd)[0], 20)], 1)
        np.testing.assert_allclose(slices.images, truth, atol=1e-5)
    dataset, said = opened(folder, test_subjects=1, train_fraction=0.5)
    assert "(ADNI), 4 subjects with t1, t2, pd, 1 incomplete" in said
    together = [part for part, names in dataset.split.items() if ADNI_NAMES[0] in names]
    assert [part for part, names in dataset.split.items() if ADNI_NAMES[1] in names] == together
    assert find_layout(folder / "..").subjects[0].person == "002_S_0413"
    lines = []
    assert check(folder, say=lines.append)
    assert "4 complete subjects of 3 persons" in lines[-1]
    rows = {tuple(line.split()[:2]): line.split()[2:5] for line in lines if line.startswith("002_S_0413_2007")}
    assert rows == {(ADNI_NAMES[1], "t2"): ["14x18x9", "2.00x3.00x4.00", "RAS"],
                    (ADNI_NAMES[1], "pd"): ["14x18x9", "2.00x3.00x4.00", "RAS"],
                    (ADNI_NAMES[1], "t1"): ["14x18x17", "2.00x3.00x2.00", "PSR"]}


@pytest.mark.parametrize(("ends", "roles"), [
    (["_e2.nii", ".nii"], {"pd": ".nii", "t2": "_e2.nii"}),
    (["_E1.NII.GZ", "_E2.NII.GZ"], {"pd": "_E1.NII.GZ", "t2": "_E2.NII.GZ"}),
    (["_e1.nii"], {"pd": "_e1.nii"}), (["_e2.nii"], {"t2": "_e2.nii"}),
    ([".nii", ".nii.gz"], {"pd": ".nii", "t2": ".nii"}),
])
def test_echoes_by_name(tmp_path, ends, roles):
    place = tmp_path / "002_S_0413" / "Axial_PD_T2_FSE" / "2006-11-15_09_47_59.0" / "I29704"
    place.mkdir(parents=True)
    for end in ends:
        (place / f"Axial{end}").write_bytes(b"")
    layout = find_layout(tmp_path)
    assert {contrast: path.name[5:] for contrast, path in layout.subjects[0].files.items()} == roles
    shared = roles.get("pd") == roles.get("t2")
    assert layout.subjects[0].echoes == ({"pd": 0, "t2": 1} if shared else {})
    assert len(layout.notes) == len(set(ends)) - len(set(roles.values()))


def test_adni_in_dicom(tmp_path):
    place = tmp_path / "002_S_0413" / "MP-RAGE" / "2006-11-15_09_47_59.0" / "I29704"
    place.mkdir(parents=True)
    (place / "ADNI_002_S_0413.dcm").write_bytes(b"")
    with pytest.raises(DataError, match="holds DICOM files; convert with dcm2niix"):
        find_layout(tmp_path)


# ---- Split -----------------------------------------------------------------------------------------------------------

def people(n):
    return [Subject(f"s{i:02d}", f"s{i:02d}", {}) for i in range(n)]


@pytest.mark.parametrize(("n", "fraction", "test", "sizes"), [
    (24, 2 / 3, 6, (16, 2, 6)), (24, 0.8, 50, (19, 0, 5)), (2, 0.8, 50, (1, 0, 1)), (5, 0.01, 2, (1, 2, 2)),
    (1251, 0.8, 50, (1001, 200, 50))])
def test_split_sizes(n, fraction, test, sizes):
    split = data.make_split(people(n), 0, fraction, test)
    assert tuple(len(split[part]) for part in ("train", "val", "test")) == sizes
    assert len(set().union(*split.values())) == n


def test_split_depends_on_names_and_seed_only():
    split = data.make_split(people(24), 0, 2 / 3, 6)
    assert data.make_split(people(24)[::-1], 0, 2 / 3, 6) == split
    assert data.make_split(people(24), 1, 2 / 3, 6) != split
    assert split["val"] == ["s00", "s17"]  # stored once, for ever
    visits = [Subject(f"{s.name}-{v}", s.person, {}) for s in people(12) for v in range(2)]
    parts = data.make_split(visits, 0, 0.5, 3)
    owners = [{name[:3] for name in names} for names in parts.values()]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
    assert [len(names) for names in parts.values()] == [12, 6, 6]


@pytest.mark.parametrize(("split", "sentence"), [
    ({"train": ["BraTS2021_00000", "nobody"], "test": ["BraTS2021_00001"]}, "no complete subjects, e.g. nobody"),
    ({"train": ["BraTS2021_00000"], "test": ["BraTS2021_00000"]}, "BraTS2021_00000 is listed twice"),
    ({"train": [], "test": ["BraTS2021_00001"]}, "train is empty"),
    ({"train": ["BraTS2021_00000"], "val": ["BraTS2021_00001"]}, "test is empty"),
    ([1, 2], "is not a split"),
])
def test_bad_split_files(tmp_path, split, sentence):
    folder = make_set(tmp_path / "set", subjects=2)
    (tmp_path / "split.json").write_text(json.dumps(split))
    with pytest.raises(DataError, match=sentence):
        opened(folder, split_file=tmp_path / "split.json")


def test_users_split_and_rows(tmp_path):
    folder = make_set(tmp_path / "set", subjects=5)
    names = [f"BraTS2021_{s:05d}" for s in range(5)]
    (tmp_path / "split.json").write_text(json.dumps({"train": names[3:], "test": [names[1]], "val": [names[0]]}))
    dataset, said = opened(folder, split_file=tmp_path / "split.json")
    assert "1 subjects are not in" in said
    per_subject = [np.flatnonzero(dataset.subject == name) for name in names]
    assert dataset.rows("train").tolist() == [*per_subject[3], *per_subject[4]]
    assert dataset.rows("val").tolist() == per_subject[0].tolist()
    part = dataset.part("train")
    assert len(part) == len(dataset.rows("train"))
    np.testing.assert_array_equal(part[[0, len(part) - 1]], dataset.images[[per_subject[3][0], per_subject[4][-1]]])
    k = len(per_subject[1])
    assert dataset.spread("test", 2).tolist() == [per_subject[1][int(0.25 * k)], per_subject[1][int(0.75 * k)]]
    assert dataset.spread("test", 99).tolist() == per_subject[1].tolist()


def test_too_few_subjects(tmp_path):
    with pytest.raises(DataError, match="1 of 1 subjects are complete"):
        opened(make_set(tmp_path / "set", subjects=1))
    dataset, said = opened(make_set(tmp_path / "two", subjects=2))
    assert "no validation subjects" in said and [len(n) for n in dataset.split.values()] == [1, 0, 1]


# ---- Cache -----------------------------------------------------------------------------------------------------------

def test_rows_are_the_slices_of_their_subject(tmp_path):
    folder = make_set(tmp_path / "set")
    dataset, said = opened(folder)
    assert dataset.images.dtype == np.float16 and isinstance(dataset.images, np.memmap) and not dataset.phantom
    for row in range(0, len(dataset.images), 5):
        subject = next(s for s in dataset.subjects if s.name == dataset.subject[row])
        raw = nib.load(subject.files["t1"]).get_fdata()[:, :, dataset.z[row]]
        u = np.clip(raw / dataset.scales[subject.name]["t1"].high, 0, 1)[::-1, ::-1].T
        np.testing.assert_allclose(dataset.images[row, 1, 1:19, 3:17], u, atol=1e-3)
        inside = nib.load(subject.files["flair"]).get_fdata()[:, :, dataset.z[row]] > 0
        assert dataset.brain[row] == pytest.approx(inside.sum() / 400)
    assert dataset.lesion == [None] * len(dataset.images)
    first = dataset.subject == dataset.subjects[0].name
    assert dataset.z[first].tolist() == [1, 2, 3, 4, 5, 6, 7]
    np.testing.assert_allclose(dataset.position[first], np.arange(7) / 6)


def test_lesions_stay_with_their_slice(tmp_path):
    folder = make_set(tmp_path / "set", subjects=2)
    labels = np.zeros(SHAPE, np.uint8)
    labels[7, 9, 3] = 1
    save(folder / "BraTS2021_00001" / "BraTS2021_00001_seg.nii.gz", labels)
    dataset, _ = opened(folder)
    expected = [None] * 7 + ["none", "none", "right, 6 mm2", "none", "none", "none", "none"]
    assert dataset.lesion == expected and dataset.z[dataset.lesion.index("right, 6 mm2")] == 3


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
    for row, z in enumerate(dataset.z):
        labels, bright = dataset.labels[row], dataset.images[row, 0] == 1
        assert (labels.max() == 4) == (z == 4) and (z != 4 or np.array_equal(bright, labels == 4))
        assert z != 4 or ((labels == 4).sum() == 15 and (labels == 2).sum() == 6)
    small = load_subject(dataset.subjects[0], ("t1", "flair"), 16).labels
    assert set(np.unique(small)) == {0, 2, 4} and small.shape[1:] == (16, 16)       # never 3, the mean of 2 and 4
    held, = tmp_path.rglob("labels.npy")
    before = held.read_bytes()
    held.unlink()                                                                   # not written over: it is mapped into memory
    held.write_bytes(b"damaged")
    opened(folder, contrasts=("t1", "flair"))
    assert held.read_bytes() == before


def test_number_of_threads_does_not_matter(tmp_path):
    folder = make_set(tmp_path / "set", subjects=5)
    first, _ = opened(folder, cache=tmp_path / "c1", workers=1)
    second, _ = opened(folder, cache=tmp_path / "c2", workers=3)
    assert first.fingerprint == second.fingerprint
    for name in ("slices.npy", "index.json"):
        assert (tmp_path / "c1" / first.fingerprint / name).read_bytes() == \
            (tmp_path / "c2" / first.fingerprint / name).read_bytes()
    loaded = load_subject(first.subjects[2], first.contrasts, 20)
    rows = first.subject == first.subjects[2].name
    np.testing.assert_array_equal(first.images[rows], loaded.images[loaded.kept].astype(np.float16))


def test_cache_is_used_and_rebuilt_when_files_change(tmp_path):  # row 22
    folder = make_set(tmp_path / "set")
    first, said = opened(folder)
    assert "decoding 4 subjects" in said
    again, said = opened(folder)
    assert "decoding" not in said and again.fingerprint == first.fingerprint
    _, said = opened(folder, contrasts=("t1",))
    assert "decoding" in said and "have changed" not in said  # other settings, not stale
    _, said = opened(folder, size=24)
    assert "decoding" in said and "damaged" not in said
    path = folder / "BraTS2021_00001" / "BraTS2021_00001_t1.nii"
    os.remove(path.with_suffix(".nii.gz"))
    save(path, head(seed=11))  # not compressed: the size will not change
    first, _ = opened(folder)
    stamp = path.stat().st_mtime_ns
    save(path, head(seed=77))
    os.utime(path, ns=(stamp, stamp))  # the bytes alone must tell
    changed, said = opened(folder)
    assert changed.fingerprint != first.fingerprint and "the data have changed since" in said
    rows = np.flatnonzero(changed.subject == "BraTS2021_00001")
    assert (changed.images[rows, 1] != first.images[rows, 1]).any()
    np.testing.assert_array_equal(changed.images[rows, 0], first.images[rows, 0])
    os.utime(path, ns=(stamp, stamp + 10**9))
    assert "decoding" in opened(folder)[1]


@pytest.mark.parametrize("damage", ["short", "no slices", "no index", "bad index", "other shape"])
def test_damaged_cache_is_rebuilt(tmp_path, damage):  # row 23
    folder = make_set(tmp_path / "set", subjects=2)
    first, _ = opened(folder)
    truth = np.array(first.images)
    home = tmp_path / "cache" / first.fingerprint
    del first
    if damage == "short":
        (home / "slices.npy").write_bytes((home / "slices.npy").read_bytes()[:-100])
    if damage == "no slices":
        (home / "slices.npy").unlink()
    if damage == "no index":
        (home / "index.json").unlink()
    if damage == "bad index":
        (home / "index.json").write_text("{")
    if damage == "other shape":
        np.save(home / "slices.npy", truth[1:])
    second, said = opened(folder)
    assert "is damaged" in said and "decoding" in said
    np.testing.assert_array_equal(second.images, truth)
    assert sorted(p.name for p in home.iterdir()) == ["index.json", "slices.npy"]


def test_interrupted_cache_leaves_nothing_that_looks_finished(tmp_path):
    folder = make_set(tmp_path / "set")
    bad = folder / "BraTS2021_00003" / "BraTS2021_00003_t1.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"BraTS2021_00003_t1\.nii\.gz: the compressed data end early"):
        opened(folder)
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_unread_contrasts_have_no_influence(tmp_path):
    folder = make_set(tmp_path / "set", subjects=2)
    subject = find_layout(folder).subjects[0]
    subject.files["flair"].write_bytes(b"not even an image")
    slices = load_subject(subject, ("flair", "t1"), 20, use=("t1",))
    assert slices.present.tolist() == [False, True] and not slices.images[:, 0].any() and slices.images[:, 1].any()
    assert slices.reference.path == subject.files["t1"]


# ---- Check and phantoms ----------------------------------------------------------------------------------------------

def test_check_reports_every_problem(tmp_path):
    folder = make_set(tmp_path / "set")
    lines = []
    assert check(folder, say=lines.append)
    assert "4 complete subjects of 4 persons (2 needed), 0 errors: usable" in lines[-1]
    row = next(line for line in lines if line.startswith("BraTS2021_00000") and " t1 " in line)
    values = f"0..{head(seed=1).max():.4g}"
    assert row.split()[:6] == ["BraTS2021_00000", "t1", "14x18x9", "2.00x3.00x4.00", "RAS", values]
    assert float(row.split()[-1]) == pytest.approx((head() > 0).mean(), abs=1e-3)
    one, two = (folder / f"BraTS2021_0000{s}" / f"BraTS2021_0000{s}_t1.nii.gz" for s in (1, 2))
    one.write_bytes(one.read_bytes()[:-500])
    save(two, np.zeros(SHAPE, np.float32))
    lopsided = head() * (np.arange(14) < 6)[:, None, None]
    save(folder / "BraTS2021_00003" / "BraTS2021_00003_flair.nii.gz", lopsided)
    save(folder / "BraTS2021_00003" / "BraTS2021_00003_t1.nii.gz", lopsided[::-1])
    lines.clear()
    assert not check(folder, say=lines.append)
    errors = [line for line in lines if line.startswith("error")]
    assert len(errors) == 2 and str(one) in errors[0] and "end early" in errors[0]
    assert "BraTS2021_00002, t1" in errors[1] and "is constant" in errors[1]
    assert any("BraTS2021_00003 t1: fits the first contrast better when mirrored" in line for line in lines)
    lines.clear()
    assert not check(tmp_path / "nothing", say=lines.append) and "does not exist" in lines[0]


def test_phantoms_are_made_only_at_home(tmp_path, monkeypatch):
    made = []

    def make(name, folder):
        made.append(name)
        make_set(folder, subjects=3)
        (folder / "phantom.json").write_text("{}")
    monkeypatch.setattr(phantom, "make", make)
    monkeypatch.setattr(data, "__file__", str(tmp_path / "data" / "__init__.py"))
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
    assert not data.is_phantom(make_set(tmp_path / "real", subjects=2)) and Path(data.__file__).parent == home
