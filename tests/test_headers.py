"""Headers that other programs read: what is assumed, what is refused, and that no voxel is ever shifted."""

import gzip
import os
import struct

import nibabel as nib
import numpy as np
import pytest

from data import read_volume, write_volume
from data.files import DataError
from data.identity import stamps_of
from data.picture_files import read_picture
from data.volumes import read_slices
from scans import AFFINE, head, save, shifted

NUMBERS = np.round(head())


def scan(path, *edits, affine=AFFINE, dtype=np.int16, kind=nib.Nifti1Image, ends="<"):
    """A file with both forms; the edits are (offset in the header, struct format, values)."""
    image = kind(NUMBERS.astype(dtype), affine, kind.header_class(endianness=ends))
    image.set_data_dtype(np.dtype(dtype).newbyteorder(ends))
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    content = bytearray(image.to_bytes())
    for offset, form, values in edits:
        struct.pack_into(ends + form, content, offset, *values)
    path.write_bytes(bytes(content))
    return path


def same(volume, notes):
    """True if the voxels and the place are right, and the notes say one thing each."""
    np.testing.assert_array_equal(volume.array, NUMBERS)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)
    assert len(volume.notes) == len(notes), volume.notes
    return all(note in said for note, said in zip(notes, volume.notes, strict=True))


NO_SFORM = (254, "h", [0])
REPAIRED = "pixdim break the rules of NIfTI"


@pytest.mark.parametrize(("edits", "notes"), [
    ([NO_SFORM, (76, "f", [0])], [REPAIRED]),
    ([NO_SFORM, (84, "f", [-3])], [REPAIRED]),
    ([(252, "h", [77])], ["qform_code break the rules"]),
    ([(280, "12f", [0] * 12)], ["sform_code break the rules"]),
    ([(280, "f", [np.nan])], ["has a bad sform (its affine is singular"]),
    ([(256, "3f", [3, 3, 3])], ["has a bad qform (its orientation cannot be understood"]),
    ([(112, "2f", [np.nan, np.nan])], []),
    ([(112, "2f", [0, 5])], []),
    ([(112, "2f", [np.inf, 5])], []),
    ([(112, "2f", [1, np.nan])], ["has a slope without intercept"]),
    ([(123, "B", [0])], []),
    ([(123, "B", [3])], ["says that its unit is the micron, which gives impossible voxels"]),
    ([(123, "B", [5])], []),
    ([(140, "2i", [9, -9])], []),
], ids=["qfac 0", "negative pixdim", "odd code", "sform of zeros", "sform of nan", "qform of no turn", "nan nan", "slope 0",
        "slope inf", "inter nan", "no unit", "false unit", "unknown unit", "glmin"])
@pytest.mark.parametrize("ends", "<>")
def test_odd_headers_are_read(tmp_path, edits, notes, ends):
    assert same(read_volume(scan(tmp_path / "a.nii", *edits, ends=ends)), notes)


@pytest.mark.parametrize(("unit", "factor"), [(1, 1000), (3, 0.001)], ids=["metre", "micron"])
def test_units_become_mm(tmp_path, unit, factor):
    small = np.diag([1 / factor] * 3 + [1]) @ AFFINE
    volume = read_volume(scan(tmp_path / "a.nii", (123, "B", [unit]), affine=small))
    assert same(volume, ["which become mm"])
    write_volume(tmp_path / "b.nii", volume.array, volume, "test")
    written = nib.load(tmp_path / "b.nii")
    np.testing.assert_allclose(written.affine, small, rtol=1e-6)  # as the source, in its unit
    assert int(written.header["xyzt_units"]) == unit


@pytest.mark.parametrize(("said", "kind"), [
    (0, 1), (348, 1), (351, 1), (-5, 1), (np.nan, 1), (np.inf, 1), (1e12, 1), (352.5, 1), (0, 2), (540, 2), (10**12, 2)])
def test_where_voxels_begin_is_assumed(tmp_path, said, kind):
    place = ((108, "f", [said]) if kind == 1 else (168, "q", [said]))
    path = scan(tmp_path / "a.nii", place, kind=nib.Nifti1Image if kind == 1 else nib.Nifti2Image)
    assert same(read_volume(path), [f"byte {352 if kind == 1 else 544} is assumed"])


def test_where_voxels_begin_is_not_guessed(tmp_path):
    plain = scan(tmp_path / "a.nii").read_bytes()
    size = NUMBERS.size * 2

    def voxels(offset, content):
        header = bytearray(content)
        struct.pack_into("<f", header, 108, offset)
        (tmp_path / "b.nii").write_bytes(bytes(header))
        return read_volume(tmp_path / "b.nii")

    assert same(voxels(348, plain[:348] + plain[352:]), [])  # the four bytes behind the header are missing
    assert same(voxels(368, plain[:352] + bytes(16) + plain[352:]), [])
    assert same(voxels(352, plain + bytes(70)), ["has 70 bytes behind its voxels"])
    for offset, content in ((353, plain), (400, plain), (0, plain[:-4]), (352, plain[:-4]), (368, plain[:-16])):
        with pytest.raises(DataError, match=rf"ends early \(\d+ of {size} voxel bytes\)"):
            voxels(offset, content)
    extended = plain[:348] + b"\1\0\0\0" + struct.pack("<2i", 32, 6) + b"x" * 24 + plain[352:]
    assert same(voxels(384, extended), [])
    for offset in (np.nan, 1e12):  # the length does not confirm that it is 352
        with pytest.raises(DataError, match="which cannot be true, and nothing else tells it"):
            voxels(offset, plain + bytes(16))
    assert same(voxels(355, plain[:352] + bytes(3) + plain[352:]), [])
    with pytest.raises(DataError, match="begin at byte 364, which cannot be true"):
        voxels(364, extended)
    for offset in (0, 351, np.nan, 1e12):  # 352 would be the first byte of the extension
        with pytest.raises(DataError, match="which cannot be true, and nothing else tells it"):
            voxels(offset, extended)


@pytest.mark.parametrize(("change", "note"), [
    (lambda packed: packed + b"rubbish", "has other bytes behind its compressed part"),
    (lambda packed: packed + bytes(512), None),
    (gzip.compress, "is compressed twice"),
    (lambda packed: gzip.compress(gzip.decompress(packed)[:999]) + gzip.compress(gzip.decompress(packed)[999:]), None),
], ids=["rubbish", "zeros", "twice", "two parts"])
def test_odd_compression(tmp_path, change, note):
    packed = gzip.compress(scan(tmp_path / "a.nii").read_bytes())
    (tmp_path / "a.nii.gz").write_bytes(change(packed))
    assert same(read_volume(tmp_path / "a.nii.gz"), [note] if note else [])


def test_forms_that_lie_apart(tmp_path):
    image = nib.load(scan(tmp_path / "a.nii"))
    for name, voxels, said in (("near", (0.3, 0, 0), []), ("far", (3, 4, 0), ["lie up to 15 mm apart; the sform is used"])):
        image.set_qform(shifted(AFFINE, voxels), 1)  # 6 mm and 12 mm
        nib.save(image, tmp_path / f"{name}.nii")
        assert same(read_volume(tmp_path / f"{name}.nii"), said)


def test_what_is_no_volume(tmp_path):
    surface = scan(tmp_path / "a.nii", (40, "8h", [3, -1, 1, 1, 1, 1, 1, 1]), (144, "i", [500]))
    with pytest.raises(DataError, match="is a line of 500 numbers and no image"):
        read_volume(surface)
    with pytest.raises(DataError, match=r"b\.nii: is the header of a pair"):
        read_volume(scan(tmp_path / "b.nii", (344, "4s", [b"ni1\0"])))
    with pytest.raises(DataError, match=r"c\.nii: has 32000 x 1 pixels in a slice, too long"):
        read_volume(save(tmp_path / "c.nii", np.zeros((32000, 1, 2), np.uint8)))


def test_two_hundred_fuzzed_headers(tmp_path):
    """Whatever stands in a header: the right voxels, those that the header asks for, or one line of error."""
    rng = np.random.default_rng(4)
    good = scan(tmp_path / "a.nii").read_bytes()
    read = 0
    for _ in range(200):
        content = bytearray(good)
        for place in rng.integers(0, 352, rng.integers(1, 4)):
            content[place] = rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))])
        (tmp_path / "b.nii").write_bytes(bytes(content))
        try:
            volume = read_volume(tmp_path / "b.nii")
        except DataError as error:
            assert str(tmp_path / "b.nii") in str(error) and "\n" not in str(error)
            continue
        if bytes(content[40:120]) == good[40:120]:  # shape, type, place of the voxels and scale are untouched
            read += 1
            stored = nib.orientations.apply_orientation(volume.array, nib.orientations.ornt_transform(
                np.array([[0, 1], [1, 1], [2, 1]]), volume.orientation))
            np.testing.assert_array_equal(stored, NUMBERS)
    assert read > 60


def test_a_pipe_is_not_opened(tmp_path):
    for name, read in (("a.nii.gz", read_volume), ("a.mha", read_volume), ("a.png", read_picture),
                       ("a.npy", lambda path: read_slices([path])), ("b.nii", stamps_of)):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match="is no ordinary file"):
            read(tmp_path / name)


@pytest.mark.parametrize("kind", ["zip", "claim", "objects", "cut"])
def test_slices_that_are_damaged(tmp_path, kind):
    path = tmp_path / "slice_0.npy"
    if kind == "zip":
        np.savez(tmp_path / "a.npz", np.zeros((3, 3)))
        (tmp_path / "a.npz").rename(path)
    elif kind == "claim":
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (30000,) * 3})
    elif kind == "objects":
        np.save(path, np.array([[{}]], object), allow_pickle=True)
    else:
        np.save(path, np.zeros((4, 4)))
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"slice_0\.npy: cannot be read \(ValueError"):
        read_slices([path])


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_nothing_but_geometry_is_written(tmp_path, kind):
    image = kind(NUMBERS.astype(np.int16), AFFINE)
    for field in ("aux_file", "db_name", "intent_name", "descrip"):
        if field in image.header.keys():
            image.header[field] = b"NAME"
    image.header.set_intent("label", name="NAME")
    image.header.set_dim_info(0, 1, 2)
    image.header["slice_duration"], image.header["toffset"], image.header["cal_max"] = 3, 1964, 5
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "a.nii")
    source = read_volume(tmp_path / "a.nii")
    write_volume(tmp_path / "b.nii", source.array, source, "t2")
    assert b"NAME" not in (tmp_path / "b.nii").read_bytes()
    header = nib.load(tmp_path / "b.nii").header
    blank = kind.header_class()
    for field in header.keys():
        if field.startswith(("srow", "quatern", "qoffset")) or field in (
                "dim", "pixdim", "xyzt_units", "qform_code", "sform_code"):
            assert header[field].tobytes() == source.header[field].tobytes(), field
        elif field not in ("descrip", "datatype", "bitpix", "vox_offset", "magic", "scl_slope", "scl_inter"):
            assert header[field].tobytes() == blank[field].tobytes(), field
