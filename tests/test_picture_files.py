"""PNG and JPEG files: every mode, damaged files, size and orientation, and pictures beside volumes."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import data
from data import fit_picture, load_scans, load_subject, read_picture, to_synthesize, write_picture
from data.files import DataError
from data.layouts import Subject
from scans import AFFINE, head, save

# 0 at the left to 255 at the right, and a bright corner at the top left.
RAMP = np.tile(np.arange(0, 256, 15, dtype=np.uint8), (12, 1))                  # (12, 18)
RAMP[:3, :3] = 200


def stored(folder, image, name="cxr.png", **options):
    path = folder / name
    image.save(path, **options)
    return path


def notes_of(path):
    return "; ".join(read_picture(path).notes)


# ---- Modes (row 46) --------------------------------------------------------------------------------------------------

def palette():
    """A palette that is not in the order of brightness: index i shows the grey 255 - i."""
    image = Image.fromarray(255 - RAMP)
    image.putpalette([255 - i for i in range(256) for channel in range(3)])
    return image


def with_alpha(mode, alpha):
    image = Image.fromarray(RAMP).convert(mode)
    image.putalpha(Image.new("L", image.size, alpha))
    return image


MODES = {
    "L": (Image.fromarray(RAMP), ""),
    "P": (palette(), ""),
    "LA": (with_alpha("L", 255), ""),
    "RGBA": (with_alpha("RGB", 255), ""),
    "half transparent": (with_alpha("RGB", 128), "transparent"),
    "RGB of equal channels": (Image.fromarray(RAMP).convert("RGB"), ""),
}


@pytest.mark.parametrize("name", MODES)
def test_modes_of_eight_bits(tmp_path, name):
    image, note = MODES[name]
    picture = read_picture(stored(tmp_path, image))
    np.testing.assert_array_equal(picture.array, RAMP.astype(np.float32) / 255)
    assert picture.array.dtype == np.float32 and picture.path == tmp_path / "cxr.png"
    assert bool(picture.notes) == bool(note) and note in notes_of(picture.path)


def test_one_bit(tmp_path):
    array = read_picture(stored(tmp_path, Image.fromarray(RAMP > 100))).array
    np.testing.assert_array_equal(array, (RAMP > 100).astype(np.float32))


@pytest.mark.parametrize(("highest", "full"), [(4095, 4095), (4000, 4095), (4096, 65535), (60000, 65535)])
def test_sixteen_bits_of_which_twelve_may_be_used(tmp_path, highest, full):
    values = np.linspace(7, highest, 60).astype(np.uint16).reshape(6, 10)
    path = stored(tmp_path, Image.fromarray(values))
    np.testing.assert_allclose(read_picture(path).array, values / full, rtol=1e-6)
    assert ("12 are used" in notes_of(path)) == (full == 4095)


def test_sixteen_bits_in_mode_i(tmp_path):
    """Older versions of Pillow give 32 bits for a file of 16."""
    values = np.array([[0, 4096], [30000, 65535]], np.int32)
    image = Image.fromarray(values)
    assert image.mode == "I"
    np.testing.assert_allclose(data.picture_files._grey(image, []), values / 65535, rtol=1e-6)


def test_colour_becomes_luminance(tmp_path):  # row 47
    colours = np.zeros((2, 3, 3), np.uint8)
    colours[0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    colours[1] = 255
    path = stored(tmp_path, Image.fromarray(colours))
    array = read_picture(path).array
    np.testing.assert_allclose(array[0], (0.299, 0.587, 0.114), atol=2 / 255)       # ITU-R BT.601
    assert (array[1] == 1).all() and "luminance" in notes_of(path)


def test_colours_of_a_palette(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([255, 0, 0, 255, 255, 255])
    path = stored(tmp_path, image)
    np.testing.assert_allclose(read_picture(path).array, [[0.299, 1]], atol=2 / 255)
    assert "luminance" in notes_of(path)


def test_cmyk_jpeg(tmp_path):
    path = stored(tmp_path, Image.fromarray(RAMP).convert("RGB").convert("CMYK"), "cxr.JPG", format="JPEG", quality=98)
    with Image.open(path) as image:
        assert image.mode == "CMYK"
    assert np.abs(read_picture(path).array - RAMP / 255).max() < 0.06


def test_grey_jpeg(tmp_path):
    path = stored(tmp_path, Image.fromarray(RAMP), "cxr.jpeg", quality=98)
    assert np.abs(read_picture(path).array - RAMP / 255).max() < 0.05 and notes_of(path) == ""


def test_exif_rotation(tmp_path):  # row 49
    exif = Image.Exif()
    exif[0x0112] = 6                    # the file must be turned by 90 degrees clockwise to be upright
    path = stored(tmp_path, Image.fromarray(RAMP), exif=exif)
    np.testing.assert_allclose(read_picture(path).array, np.rot90(RAMP, -1) / 255, atol=1e-6)
    assert "EXIF" in notes_of(path)
    exif[0x0112] = 1
    assert read_picture(stored(tmp_path, Image.fromarray(RAMP), exif=exif)).array.shape == (12, 18)
    assert notes_of(path) == ""


# ---- Files that cannot be used ---------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).integers(0, 255, (60, 50), dtype=np.uint8)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", ["cxr.png", "cxr.jpg"])
def test_a_file_that_ends_early(tmp_path, name, share):  # row 48
    path = stored(tmp_path, Image.fromarray(NOISE), name)
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))])
    with pytest.raises(DataError, match=rf"{name}: .*(end early|truncated|cannot be read)"):
        read_picture(path)


def large_png(width, height):
    """The beginning of a PNG of this size; its pixels are missing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize("width", [9000, 60000])
def test_a_picture_that_is_too_large(tmp_path, width):
    """Pillow itself refuses the second one."""
    (tmp_path / "cxr.png").write_bytes(large_png(width, 8000))
    with pytest.raises(DataError, match="more than 67 million pixels"):
        read_picture(tmp_path / "cxr.png")


def test_damaged_pixels(tmp_path):
    path = stored(tmp_path, Image.fromarray(NOISE))
    content = bytearray(path.read_bytes())
    content[200] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cxr\.png: cannot be read .*; "):
        read_picture(path)


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("page.png", b"<html>404</html>", "is no PNG or JPEG picture"), ("empty.jpg", b"", "is empty"),
    ("scan.dcm", b"x", "convert the file to PNG"),
], ids=["html", "empty", "dicom"])
def test_what_is_no_picture(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: .*{sentence}"):
        read_picture(tmp_path / name)


def test_other_formats_under_a_wrong_name(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(RAMP).save(buffer, "BMP")
    (tmp_path / "cxr.png").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="is no PNG or JPEG picture"):
        read_picture(tmp_path / "cxr.png")
    stored(tmp_path, Image.fromarray(RAMP), "cxr.jpg", format="PNG")        # a PNG is a PNG under any name
    assert read_picture(tmp_path / "cxr.jpg").array.shape == (12, 18)


def test_missing_and_constant(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(DataError, match=r"is constant \(every pixel is 0.2\)"):
        read_picture(stored(tmp_path, Image.new("L", (5, 5), 51)))


# ---- Size ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("shape", "inside"), [((40, 60), np.s_[:, 10:50]), ((60, 40), np.s_[10:50])],
                         ids=["wide", "tall"])
def test_the_middle_square_is_used(shape, inside):
    array = np.random.default_rng(1).random(shape, np.float32)
    np.testing.assert_array_equal(fit_picture(array, 40), array[inside])
    rows, columns = np.indices(shape, np.float32)
    for ramp in (rows, columns):        # a straight ramp stays straight: half as many pixels, twice as steep
        got = fit_picture(ramp, 20)
        assert got.shape == (20, 20) and got.dtype == np.float32
        blocks = ramp[inside].reshape(20, 2, 20, 2).mean((1, 3))
        np.testing.assert_allclose(got[1:-1, 1:-1], blocks[1:-1, 1:-1], atol=1e-4)


def test_nothing_is_mirrored_stretched_or_rescaled():
    array = np.full((30, 50), 0.25, np.float32)
    array[2:8, 12:24] = 0.5             # upper left, twice as wide as high
    square = fit_picture(array, 90)     # three times as large
    rows, columns = np.nonzero(square > 0.375)
    assert np.isclose(rows.mean(), 3 * 5 - 0.5, atol=0.6) and np.isclose(columns.mean(), 3 * (18 - 10) - 0.5, atol=0.6)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (18, 36)
    assert np.isclose(square.max(), 0.5) and np.isclose(square.min(), 0.25)         # no percentiles


# ---- Writing ---------------------------------------------------------------------------------------------------------

def test_write_picture(tmp_path):
    array = np.array([[0, 0.5, 1], [-1, 2, 0.2]], np.float32)
    write_picture(tmp_path / "new" / "made.png", array, "made by a test")
    with Image.open(tmp_path / "new" / "made.png") as image:
        assert image.mode == "L" and image.text["Description"] == "synthetic; made by a test"
        assert np.asarray(image).tolist() == [[0, 128, 255], [0, 255, 51]]
    with pytest.raises(DataError, match="exists already"):
        write_picture(tmp_path / "new" / "made.png", array, "x")
    write_picture(tmp_path / "new" / "made.png", array, "x", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_picture(tmp_path / "file" / "made.png", array, "x")


# ---- Subjects --------------------------------------------------------------------------------------------------------

def xray(folder, name="cxr.png", seed=0, shape=(30, 20)):
    values = np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)
    return stored(folder, Image.fromarray(values), name), values / np.float32(255)


def test_views_of_one_study(tmp_path):
    first, a = xray(tmp_path, "0.png", 1)
    second, b = xray(tmp_path, "1.png", 2)
    subject = Subject("p", "p", {"text": tmp_path / "r.json", "xray": (first, second)}, report="clear")
    slices = load_subject(subject, ("text", "ct", "xray"), 20)
    assert slices.images.shape == (2, 3, 20, 20) and slices.present.tolist() == [True, False, True]
    np.testing.assert_array_equal(slices.images[:, 2], [a[5:25], b[5:25]])
    assert not slices.images[:, :2].any() and slices.scales == {} and slices.reference is None
    assert slices.kept.tolist() == [True, True] and slices.position.tolist() == [0.5, 0.5] and slices.constant == 0
    assert np.allclose(slices.brain, [(a[5:25] > 0).mean(), (b[5:25] > 0).mean()])


def test_a_picture_beside_a_volume(tmp_path):
    """It is the same in all slices; the volumes are as without it, and so are the slices that are kept."""
    path, values = xray(tmp_path, shape=(40, 40))
    files = {"t1": save(tmp_path / "t1.nii.gz", head()), "ct": save(tmp_path / "ct.nii.gz", 10 * head() - 1000)}
    channels = ["text", "xray", "t1", "ct"]
    alone = load_subject(Subject("p", "p", dict(files)), channels, 20)
    both = load_subject(Subject("p", "p", {**files, "xray": path, "text": path}), channels, 20)
    assert len(both.images) == 9 and both.present.tolist() == [True] * 4
    np.testing.assert_array_equal(both.images[:, 2:], alone.images[:, 2:])
    np.testing.assert_array_equal(both.images[:, 1], [fit_picture(values, 20)] * 9)
    np.testing.assert_array_equal(both.kept, alone.kept)
    assert 0 < both.kept.sum() < 9 and not both.images[:, 0].any() and set(both.scales) == {"t1", "ct"}
    assert both.reference.path == files["t1"] and both.constant == alone.constant
    np.testing.assert_array_equal(both.brain, alone.brain)
    only = load_subject(Subject("p", "p", {**files, "xray": path}), channels, 20, use=["xray"])
    assert only.images.shape[0] == 1 and only.present.tolist() == [False, True, False, False]


def test_views_beside_a_volume(tmp_path):
    """There is no way to tell which slice belongs to which view, so the first view is used."""
    first, a = xray(tmp_path, "0.png", 1, (20, 20))
    second, _ = xray(tmp_path, "1.png", 2, (20, 20))
    files = {"t1": save(tmp_path / "t1.nii.gz", head()), "xray": (first, second)}
    slices = load_subject(Subject("p", "p", files), ("t1", "xray"), 20)
    np.testing.assert_array_equal(slices.images[:, 1], [a] * 9)
    assert any(name == "0.png" and "the first of 2 pictures" in note for name, note in slices.notes)
    files["xray"] = (first, *[second] * 8)          # as many as slices, by chance
    slices = load_subject(Subject("p", "p", files), ("t1", "xray"), 20)
    np.testing.assert_array_equal(slices.images[:, 1], [a] * 9)
    assert any("the first of 9 pictures" in note for name, note in slices.notes)


def test_a_report_alone(tmp_path):
    subject = Subject("p", "p", {"text": tmp_path / "r.json"}, report="clear")
    slices = load_subject(subject, ("text", "xray"), 16)
    assert slices.images.shape == (1, 2, 16, 16) and not slices.images.any()
    assert slices.present.tolist() == [True, False] and slices.kept.tolist() == [True]
    with pytest.raises(DataError, match="subject p: has none of xray"):
        load_subject(subject, ("xray",), 16)


def test_notes_of_pictures_are_kept(tmp_path):
    path = stored(tmp_path, Image.fromarray(np.arange(100, dtype=np.uint16).reshape(10, 10)))
    slices = load_subject(Subject("p", "p", {"xray": path}), ("xray",), 10)
    assert [name for name, note in slices.notes] == ["cxr.png"]


def test_xrays_from_any_files(tmp_path):
    path, values = xray(tmp_path, shape=(16, 16))
    slices = load_scans({"cxr": path}, ("text", "ct", "xray"), 16)
    np.testing.assert_array_equal(slices.images[0, 2], values)
    assert slices.present.tolist() == [False, False, True]
    with pytest.raises(DataError, match=r"t1 .*cxr\.png is neither"):
        load_scans({"t1": path}, ("t1",), 16)
    with pytest.raises(DataError, match="no contrast text"):
        load_scans({"text": path}, ("text", "xray"), 16)


def test_what_is_synthesised_from_pictures(tmp_path):
    picture, _ = xray(tmp_path, shape=(16, 16))
    volume = save(tmp_path / "ct.nii.gz", 10 * head() - 1000)
    subjects = [Subject("a", "a", {"text": tmp_path / "r", "xray": picture}), Subject("b", "b", {"text": tmp_path / "r"}),
                Subject("c", "c", {"ct": volume}), Subject("d", "d", {"ct": volume, "xray": picture})]
    lines = []
    others = []
    todo = list(to_synthesize(subjects, ("text", "xray", "ct"), (), 16, tmp_path / "out", lines.append))
    names = {subject.name: {c: path.name for c, path in paths.items()} for subject, _, _, _, paths in todo}
    assert names == {"a": {"ct": "a_ct_synthetic.png"},
                     "b": {"xray": "b_xray_synthetic.png", "ct": "b_ct_synthetic.png"},
                     "c": {"text": "c_text_synthetic.txt", "xray": "c_xray_synthetic.png"},
                     "d": {"text": "d_text_synthetic.txt"}}
    assert sum("normalised units" in line for line in lines) == 1
    list(to_synthesize(subjects[1:3], ("text", "xray"), (), 16, tmp_path / "other", others.append))
    assert others == []                 # an X-ray is always a picture
    _, _, _, slices, paths = todo[0]
    slices.write(paths["ct"], np.full((1, 16, 16), 0.4), "synthetic ct", contrast="ct")
    with Image.open(paths["ct"]) as image:
        assert np.asarray(image).tolist() == [[102] * 16] * 16
        assert image.text["Description"] == "synthetic ct, normalised"
    todo = to_synthesize(subjects[:1], ("text", "xray", "ct"), (), 16, tmp_path / "out", lines.append)
    assert not list(todo) and "already in" in lines[-1]


def test_volumes_stay_volumes(tmp_path):
    """A T2 that is made from a CT beside an X-ray lies on the grid of the CT."""
    picture, _ = xray(tmp_path)
    subject = Subject("p", "p", {"ct": save(tmp_path / "ct.nii.gz", 10 * head() - 1000), "xray": picture})
    ((_, sources, _, slices, paths),) = to_synthesize([subject], ("t2", "ct", "xray"), (), 20, tmp_path / "out", print)
    assert sources == ["ct", "xray"] and paths["t2"].name == "p_t2_synthetic.nii.gz"
    slices.write(paths["t2"], slices.images[:, 0], "synthetic t2", contrast="t2")
    np.testing.assert_allclose(data.read_volume(paths["t2"]).affine, AFFINE)


def test_several_views_are_written_side_by_side(tmp_path):
    first, _ = xray(tmp_path, "0.png", 1)
    second, _ = xray(tmp_path, "1.png", 2)
    slices = load_subject(Subject("p", "p", {"xray": (first, second)}), ("xray", "ct"), 20)
    planes = np.stack([np.zeros((20, 20)), np.ones((20, 20))])
    slices.write(tmp_path / "out" / "p_ct.png", planes, "synthetic ct")
    for name, value in (("p_ct.png", 0), ("p_ct_2.png", 255)):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.getextrema() == (value, value)


def test_inverted_pictures_are_noted(tmp_path):
    dark = np.zeros((40, 40), np.uint8)
    dark[8:32, 8:32] = 160
    assert read_picture(stored(tmp_path, Image.fromarray(dark))).notes == []
    picture = read_picture(stored(tmp_path, Image.fromarray(255 - np.where(dark > 0, 200, 0).astype(np.uint8))))
    assert picture.array[20, 20] < 0.3
    assert picture.notes == []  # most of the picture is bright
    bright = np.full((40, 40), 255, np.uint8)
    bright[4:36, 4:36] = 60
    picture = read_picture(stored(tmp_path, Image.fromarray(bright)))
    assert picture.notes == ["is bright around the body, so it may be inverted (MONOCHROME1); it is used as it is"]
    assert picture.array[0, 0] == 1 and picture.array[20, 20] < 0.3
