"""NIfTI in and out: bad and odd files, orientation, resampling, slices, writing."""

import gzip
import itertools
import os
import zlib

import nibabel as nib
import numpy as np
import pytest

from data import read_volume, write_volume
from data.files import DataError
from data.volumes import canonical, fit, grid_around, read_geometry, resample_to, same_grid, unfit, upright
from scans import AFFINE, SHAPE, echoes, head, in_one_file, oriented, save, shifted

# ---- Bad files -------------------------------------------------------------------------------------------------------

def test_truncated_files(tmp_path):  # row 4
    path = save(tmp_path / "t1.nii.gz", head())
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError, match=r"t1\.nii\.gz: the compressed data end early or are damaged"):
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
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:3e", "is only a pointer of Git LFS or git-annex"),
    (b"/annex/objects/MD5E-s12--3e.nii.gz\n", "is only a pointer of Git LFS or git-annex"),
    (b"hello" * 200, "is not a NIfTI file"),
], ids=["empty", "page", "packed page", "git-lfs", "git-annex", "text"])
def test_no_nifti_inside(tmp_path, content, sentence):
    (tmp_path / "t1.nii.gz").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_volume(tmp_path / "t1.nii.gz")


def test_damaged_compression(tmp_path):  # row 9
    path = save(tmp_path / "t1.nii.gz", head())
    good = path.read_bytes()
    path.write_bytes(good[:-8] + bytes([good[-8] ^ 1]) + good[-7:])  # one bit of the CRC
    with pytest.raises(DataError, match="end early or are damaged .*CRC"):
        read_volume(path)
    packed = zlib.compressobj(wbits=31)
    stream = packed.compress(bytes(4000)) + packed.flush()
    path.write_bytes(stream[:10] + b"\xff" * 40)  # no valid deflate block
    with pytest.raises(DataError, match="are damaged"):
        read_volume(path)


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


def test_colours_and_complex_numbers(tmp_path):  # rows 26 and 27
    rgb = np.zeros((4, 4, 4), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    with pytest.raises(DataError, match="holds colours"):
        read_volume(save(tmp_path / "a.nii", rgb))
    with pytest.raises(DataError, match="take the magnitude"):
        read_volume(save(tmp_path / "b.nii", np.ones((4, 4, 4), np.complex64)))


def test_unknown_voxel_type(tmp_path):
    header = nib.Nifti1Image(head(), AFFINE).header.copy()
    header["magic"], header["vox_offset"], header["datatype"] = b"n+1", 352, 1482
    (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(4) + head().tobytes())
    with pytest.raises(DataError, match="unknown voxel type .1482."):
        read_volume(tmp_path / "a.nii")


def test_not_a_number(tmp_path):  # row 28
    array = head() - 3
    array[7, 9, 4] = np.nan
    array[6, 9, 4] = -np.inf
    volume = read_volume(save(tmp_path / "a.nii", array))
    assert volume.array[7, 9, 4] == volume.array[6, 9, 4] == -3  # the background, not 0
    assert volume.array[8, 9, 4] == array[8, 9, 4]
    assert volume.notes[0].startswith("has 2 NaN or infinite voxels")
    array[2:-1, 8:10, 3] = np.nan
    with pytest.raises(DataError, match=rf"24 of {array.size} voxels are NaN or infinite \(first at \(2, 8, 3\)\)"):
        read_volume(save(tmp_path / "b.nii", array))


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
    noise.affine = shifted(fixed.affine, (0.0005, 0, 0))  # 0.0014 mm
    assert not same_grid(noise, fixed)
    noise.affine = shifted(fixed.affine, (0.0003, 0, 0))  # 0.0009 mm
    assert same_grid(noise, fixed)
    noise.affine = fixed.affine @ np.diag([1.0001, 1, 1, 1])  # 0.0037 mm at the far end
    assert not same_grid(noise, fixed)


def test_boxes_that_do_not_overlap(tmp_path):
    fixed = read_volume(save(tmp_path / "a.nii", head()))
    for voxels in ((15, 0, 0), (0, -19, 0), (0, 0, 10)):
        far = read_volume(save(tmp_path / "b.nii", head(), shifted(AFFINE, voxels)))
        with pytest.raises(DataError, match=r"b\.nii: lies outside the box of .*a\.nii; register"):
            resample_to(far, fixed)


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


# ---- Two echoes in one file ------------------------------------------------------------------------------------------

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
        assert written.shape == SHAPE and written.header.get_zooms() == (2.875, 3, 4)
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


# ---- Coarser grids and grids without voxels --------------------------------------------------------------------------

@pytest.mark.parametrize(("ratio", "error"), [(4, 1e-5), (3, 1e-5), (2.5, 0.3)])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_averaging_keeps_mass_and_place(tmp_path, codes, ratio, error):
    """A point is shared by the coarse voxels around it: no mass is lost, and it is not moved by half of their edge."""
    point = np.zeros((40, 40, 40), np.float32)
    point[17, 22, 19] = 1000
    affine = oriented(codes, None)
    moving = read_volume(save(tmp_path / "fine.nii", point, affine))
    shape = tuple(int(n / ratio) for n in point.shape)
    coarse = shifted(affine, [(ratio - 1) / 2] * 3) @ np.diag([ratio, ratio, ratio, 1])
    fixed = read_volume(save(tmp_path / "coarse.nii", np.zeros(shape, np.float32), coarse))
    mean = resample_to(moving, fixed, fill=0, average=True)
    assert mean.sum() * ratio**3 == pytest.approx(1000, rel=error)
    place = sum(w * nib.affines.apply_affine(fixed.affine, i) for i, w in np.ndenumerate(mean / mean.sum()))
    gap = np.abs(place - nib.affines.apply_affine(affine, [17, 22, 19]))
    assert (gap <= ratio * moving.spacing / 2 + 1e-4).all()
    assert abs(resample_to(moving, fixed, fill=0).sum() * ratio**3 - 1000) > 250  # what lies between the centres is lost


def test_averaging_of_finer_and_equal_voxels_changes_nothing(tmp_path):
    moving = read_volume(save(tmp_path / "a.nii", head()))
    for scale in (0.5, 1, 1.4):
        affine = shifted(AFFINE, (0.3, 0.1, 0.2)) @ np.diag([scale, scale, scale, 1])
        fixed = read_volume(save(tmp_path / "b.nii", np.zeros((9, 9, 5), np.float32), affine))
        np.testing.assert_array_equal(resample_to(moving, fixed, average=True), resample_to(moving, fixed))
    one_axis = AFFINE @ np.diag([3, 1, 1, 1])  # only x is coarser, so only x is averaged
    fixed = read_volume(save(tmp_path / "c.nii", np.zeros((4, 18, 9), np.float32), one_axis))
    along_x = (np.arange(14) % 2 * 100).astype(np.float32)[:, None, None] * np.ones((1, 18, 9), np.float32)
    along_y = (np.arange(18) % 2 * 100).astype(np.float32)[None, :, None] * np.ones((14, 1, 9), np.float32)
    moving = read_volume(save(tmp_path / "d.nii", along_x))
    means = resample_to(moving, fixed, average=True)[1:-1]
    assert np.ptp(means) < 40 and np.ptp(resample_to(moving, fixed)[1:-1]) == 100  # a third or two thirds of three voxels
    moving = read_volume(save(tmp_path / "e.nii", along_y))
    np.testing.assert_array_equal(resample_to(moving, fixed, average=True), resample_to(moving, fixed))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize("end", [".nii", ".nii.gz"])
def test_geometry_needs_no_voxel(tmp_path, codes, end):
    path = save(tmp_path / f"a{end}", head(), oriented(codes, SHAPE, 0.2))
    whole = read_volume(path)
    if end == ".nii":
        path.write_bytes(path.read_bytes()[:400])
    place = read_geometry(path)
    assert same_grid(place, whole) and not place.array.any() and place.axes == whole.axes
    np.testing.assert_array_equal(place.affine, whole.affine)
    write_volume(tmp_path / "out.nii", whole.array, place, "test")
    np.testing.assert_array_equal(nib.load(tmp_path / "out.nii").get_fdata(), head())
    np.testing.assert_allclose(nib.load(tmp_path / "out.nii").affine, oriented(codes, SHAPE, 0.2), atol=1e-5)


def test_geometry_of_bad_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_geometry(tmp_path / "a.nii")
    (tmp_path / "b.nii").write_bytes(b"<html>")
    with pytest.raises(DataError, match="looks like HTML"):
        read_geometry(tmp_path / "b.nii")
    with pytest.raises(DataError, match="is 4-D"):
        read_geometry(save(tmp_path / "c.nii", np.stack([head(), head()], -1)))


def test_grid_around_a_volume(tmp_path):
    """40 x 54 x 36 mm, stored in any order: the grid has its centre and its height."""
    volume = read_volume(save(tmp_path / "a.nii", head().transpose(1, 2, 0).copy(), AFFINE[:, [1, 2, 0, 3]]))
    grid = grid_around(volume, (20, 30), (5, 5, 6))
    assert grid.array.shape == (20, 30, 6) and grid.spacing.tolist() == [5, 5, 6] and grid.axes == "RAS"
    for some in (volume, grid):
        ends = nib.affines.apply_affine(some.affine, [[-0.5] * 3, np.array(some.array.shape) - 0.5])
        np.testing.assert_allclose(ends.mean(0), [5.6875, 0.5, 23])
    moved = resample_to(volume, grid, fill=0)
    write_volume(tmp_path / "out.nii.gz", moved, grid, "test")
    back = read_volume(tmp_path / "out.nii.gz")
    assert same_grid(back, grid) and back.notes == []
    np.testing.assert_array_equal(back.array, moved)
