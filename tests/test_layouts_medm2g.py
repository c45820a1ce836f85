"""Public sets of MRI and CT for MedM2G as downloaded: ACDC, SLIVER07 with MetaImage files, MedICaT."""

import gzip
import json
import shutil
import zlib

import numpy as np
import pytest

from data import find_layout, identity, read_volume
from data.files import DataError
from data.layouts.acdc import collect_acdc, is_acdc
from data.layouts.medicat import collect_medicat, is_ct, is_medicat
from data.layouts.sliver07 import collect_sliver07, is_sliver07
from data.metaimage import read_metaimage
from data.volumes import read_geometry, same_grid, write_volume
from scans import head, opened, save

READERS = {is_acdc: collect_acdc, is_sliver07: collect_sliver07, is_medicat: collect_medicat}


def write(folder, name, content=b""):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def collected(folder, collect):
    """Call a reader -> (subjects, split, notes). The rules for folders must choose it, and no other one."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert [READERS[rule] for rule in READERS if rule(folder, files)] == [collect]
    notes = []
    subjects, split = collect(folder, files, notes)
    assert all(path.is_file() for subject in subjects for path in subject.paths)
    assert all(subject.report and "text" in subject.files for subject in subjects)
    return subjects, split, notes


def refused(folder, collect, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        collected(folder, collect)
    assert "\n" not in str(caught.value)


# ---- ACDC ------------------------------------------------------------------------------------------------------------

def make_acdc(folder):
    for part, patient, ed, es, group in (("training", "001", 1, 12, "DCM"), ("training", "090", 11, 3, "RV"),
                                         ("testing", "101", 1, 14, "NOR")):
        place = folder / "ACDC" / part / f"patient{patient}"
        text = f"ED: {ed}\nES: {es}\nGroup: {group}\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n"
        write(place, "Info.cfg", text.replace("Group: NOR\n", ""))
        write(place, f"patient{patient}_4d.nii.gz")
        for frame in (ed, es):
            write(place, f"patient{patient}_frame{frame:02d}.nii.gz")
            if part == "training":
                write(place, f"patient{patient}_frame{frame:02d}_gt.nii.gz")
    write(folder / "ACDC" / "training" / "patient001", "patient001_frame05.nii.gz")
    return folder


def test_acdc(tmp_path):
    subjects, split, notes = collected(make_acdc(tmp_path), collect_acdc)
    assert [(subject.name, subject.person) for subject in subjects] == [
        ("patient001_frame01", "patient001"), ("patient001_frame12", "patient001"), ("patient090_frame03", "patient090"),
        ("patient090_frame11", "patient090"), ("patient101_frame01", "patient101"), ("patient101_frame14", "patient101")]
    assert [subject.report for subject in subjects] == [
        "a short axis cardiac cine mri , end diastole . dilated cardiomyopathy .",
        "a short axis cardiac cine mri , end systole . dilated cardiomyopathy .",
        "a short axis cardiac cine mri , end systole . abnormal right ventricle .",
        "a short axis cardiac cine mri , end diastole . abnormal right ventricle .",
        "a short axis cardiac cine mri , end diastole .", "a short axis cardiac cine mri , end systole ."]
    place = tmp_path / "ACDC" / "training" / "patient001"
    assert subjects[1].files == {"cine": place / "patient001_frame12.nii.gz", "text": place / "Info.cfg"}
    assert subjects[1].segmentation == place / "patient001_frame12_gt.nii.gz" and subjects[4].segmentation is None
    assert subjects[0].meta == {"body": "heart"}
    assert split == {"train": [subject.name for subject in subjects[:4]], "val": [],
                     "test": ["patient101_frame01", "patient101_frame14"]}
    assert notes == ["1 frames are neither ED nor ES in Info.cfg and are not used: patient001_frame05",
                     "2 frames have no segmentation: patient101_frame01, patient101_frame14"]


def test_one_part_of_acdc_has_no_split(tmp_path):
    make_acdc(tmp_path)
    split, notes = collected(tmp_path / "ACDC" / "training", collect_acdc)[1:]
    assert split is None and notes[-1].startswith("the official split has 4 of the subjects here for training and 0 ")


@pytest.mark.parametrize(("info", "sentence"), [
    ("ED: 1\nGroup: DCM\n", r"Info\.cfg: does not say the number of the frame ES"),
    ("ED: one\nES: 12\nGroup: DCM\n", "the number of the frame ED"),
    ("ED: 1\nES: 12\nGroup: ABC\n", r"Info\.cfg: the group is 'ABC', none of NOR, MINF, DCM, HCM, RV"),
    (None, r"Info\.cfg: cannot be read"),
], ids=["no ES", "a word", "group", "missing"])
def test_damaged_info_of_acdc(tmp_path, info, sentence):
    path = make_acdc(tmp_path) / "ACDC/training/patient001/Info.cfg"
    path.unlink()
    if info is not None:
        path.write_text(info)
    refused(tmp_path, collect_acdc, sentence)


def test_one_frame_twice(tmp_path):
    make_acdc(tmp_path)
    write(tmp_path, "copy/patient001_frame01.nii.gz")
    refused(tmp_path, collect_acdc, "patient001_frame01 has another file, .*; remove one of them")


# ---- SLIVER07 --------------------------------------------------------------------------------------------------------

def make_sliver07(folder):
    for number in (1, 2):
        write(folder, f"training-part1/liver-orig{number:03d}.mhd")
        write(folder, f"training-part1/liver-orig{number:03d}.raw")
        write(folder, f"training-labels/liver-seg{number:03d}.mhd")
    write(folder, "training-part2/liver-orig003.mhd")
    write(folder, "test-part1/liver-orig001.mhd")
    return folder


def test_sliver07(tmp_path):
    subjects, split, notes = collected(make_sliver07(tmp_path), collect_sliver07)
    assert split is None
    assert [(subject.name, subject.person) for subject in subjects] == [("liver001", "liver001"), ("liver002", "liver002")]
    scan = tmp_path / "training-part1" / "liver-orig002.mhd"
    assert subjects[1].files == {"ct": scan, "text": scan}
    assert subjects[1].segmentation == tmp_path / "training-labels" / "liver-seg002.mhd"
    assert subjects[1].report == "an axial contrast enhanced abdominal ct ." and subjects[1].meta == {"body": "abdomen"}
    assert notes == ["2 scans have no mask of the liver or are for the test, and are not used"]
    write(tmp_path, "training-part2/liver-seg001.mhd")
    refused(tmp_path, collect_sliver07, "number 001 is there twice, also as .*liver-seg001")


# ---- MetaImage -------------------------------------------------------------------------------------------------------

# The header and the affine are those that SimpleITK 2.5 wrote and reads, for a grid that is turned about two axes.
HEADER = {"ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
          "CompressedData": "False", "TransformMatrix": "0.8 0.6 0 -0.48 0.64 0.6 -0.36 0.48 -0.8", "Offset": "10 20 30",
          "CenterOfRotation": "0 0 0", "AnatomicalOrientation": "RAS", "ElementSpacing": "0.5 2 3", "DimSize": "2 3 4",
          "ElementType": "MET_SHORT", "ElementDataFile": "a.raw"}
LPS = np.array([[0.4, -0.96, -1.08, 10], [0.3, 1.28, 1.44, 20], [0, 1.2, -2.4, 30], [0, 0, 0, 1]])
STORED = np.arange(-5, 19)              # x runs fastest: voxel (x, y, z) is x + 2 y + 6 z - 5


def metaimage(folder, voxels=None, name="a.mhd", inside=b"", without=(), **changes):
    """Write a MetaImage file; `voxels` go to a.raw, `inside` behind the header."""
    header = {key: value for key, value in {**HEADER, **changes}.items() if key not in without}
    header["ElementDataFile"] = header.pop("ElementDataFile")       # it must be the last
    text = "".join(f"{key} = {value}\n" for key, value in header.items())
    if voxels is not None:
        write(folder, header["ElementDataFile"], voxels)
    return write(folder, name, text.encode() + inside)


def raw(dtype="<i2"):
    return STORED.astype(dtype).tobytes()


def test_metaimage(tmp_path):
    array, affine, notes = read_metaimage(metaimage(tmp_path, raw()))
    assert array.dtype == np.float32 and array.shape == (2, 3, 4) and notes == []
    assert [array[0, 0, 0], array[1, 0, 0], array[0, 1, 0], array[0, 0, 1], array[1, 2, 3]] == [-5, -4, -3, 1, 18]
    np.testing.assert_allclose(affine, LPS * np.array([[-1], [-1], [1], [1]]), atol=1e-12)      # LPS to RAS


@pytest.mark.parametrize(("stored", "changes"), [
    (raw(">i2"), {"BinaryDataByteOrderMSB": "True"}),
    (raw(">i2"), {"without": ("BinaryDataByteOrderMSB",), "ElementByteOrderMSB": "true"}),
    (raw(), {"without": ("BinaryDataByteOrderMSB", "BinaryData", "CompressedData")}),
    (raw("i1"), {"ElementType": "MET_CHAR"}), (raw("<i4"), {"ElementType": "MET_INT"}),
    (raw("<f4"), {"ElementType": "MET_FLOAT"}), (raw(">f8"), {"ElementType": "MET_DOUBLE", "BinaryDataByteOrderMSB": "True"}),
    (zlib.compress(raw()), {"CompressedData": "True"}), (gzip.compress(raw(), mtime=0), {"CompressedData": "True"}),
    (b"header--" + raw(), {"HeaderSize": "8"}), (b"of any length" + raw(), {"HeaderSize": "-1"}),
], ids=["big", "big by the other key", "defaults", "char", "int", "float", "double", "zlib", "gzip", "skip", "end"])
def test_ways_to_store_voxels(tmp_path, stored, changes):
    """Each of them gives the same array, from a file of its own and behind the header."""
    expected = STORED.reshape(4, 3, 2).transpose(2, 1, 0)
    array, _, notes = read_metaimage(metaimage(tmp_path, stored, **changes))
    np.testing.assert_array_equal(array, expected)
    local = metaimage(tmp_path, name="b.mha", inside=stored, **{**changes, "ElementDataFile": "LOCAL"})
    np.testing.assert_array_equal(read_metaimage(local)[0], expected)
    assert notes == [] and array.dtype == np.float32


def test_unsigned_voxels(tmp_path):
    for kind, dtype, value in (("MET_UCHAR", "u1", 200), ("MET_USHORT", "<u2", 60_000), ("MET_UINT", "<u4", 3 << 30)):
        array = read_metaimage(metaimage(tmp_path, np.full(24, value, dtype).tobytes(), ElementType=kind))[0]
        assert (array == value).all(), kind


@pytest.mark.parametrize(("keys", "origin"), [({"Position": "1 2 3"}, (-1, -2, 3)), ({"Origin": "4 5 6"}, (-4, -5, 6)), ({}, (0, 0, 0))],
                         ids=["Position", "Origin", "none"])
def test_other_words_for_the_origin(tmp_path, keys, origin):
    affine = read_metaimage(metaimage(tmp_path, raw(), without=("Offset", "TransformMatrix"), **keys))[1]
    np.testing.assert_array_equal(affine[:3, 3], origin)
    np.testing.assert_array_equal(affine[:3, :3], np.diag([-0.5, -2, 3]))


def test_oddities_are_noted(tmp_path):
    _, affine, notes = read_metaimage(metaimage(tmp_path, raw() + b"xyz", without=("ElementSpacing", "TransformMatrix")))
    np.testing.assert_array_equal(np.diag(affine), [-1, -1, 1, 1])
    assert notes == ["has no ElementSpacing; voxels of 1 mm are assumed", "has 3 bytes behind its voxels; they are not read"]


@pytest.mark.parametrize(("stored", "changes", "sentence"), [
    (raw()[:-1], {}, r"a\.raw: holds 47 bytes, 48 are needed for 2 3 4 voxels of MET_SHORT"),
    (raw(), {"HeaderSize": "1"}, "holds 48 bytes, 49 are needed"),
    (raw()[:-1], {"HeaderSize": "-1"}, "holds 47 bytes"),
    (None, {}, r"a\.raw: no such file"),
    (raw(), {"CompressedData": "True"}, r"a\.raw: the compressed data end early or are damaged"),
    (zlib.compress(raw())[:-20], {"CompressedData": "True"}, r"a\.raw: (the compressed data|holds \d+ bytes)"),
    (raw(), {"NDims": "4"}, r"a\.mhd: NDims is 4; only volumes of 3 dimensions"),
    (raw(), {"DimSize": "2 3"}, "DimSize is 2 3; 3 numbers are needed"),
    (raw(), {"DimSize": "2 0 4"}, "DimSize is 2 0 4; one to 100 voxels can be read"),
    (raw(), {"DimSize": "5 5 5"}, "DimSize is 5 5 5; one to 100 voxels"),
    (raw(), {"ElementType": "MET_LONG"}, "ElementType is MET_LONG with 1 channels"),
    (raw(), {"ElementNumberOfChannels": "3"}, "MET_SHORT with 3 channels; only one channel"),
    (raw(), {"BinaryData": "False"}, "voxels are written as text"),
    (raw(), {"ElementSpacing": "1 -1 1"}, "is no grid in space"),
    (raw(), {"ElementSpacing": "1 nan 1"}, "ElementSpacing is 1 nan 1; 3 numbers"),
    (raw(), {"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "is no grid in space"),
    (raw(), {"Offset": "left"}, "Offset is left; 3 numbers are needed"),
    (None, {"ElementDataFile": "slice%03d.raw 1 4 1"}, "has one file for each slice"),
    (None, {"ElementDataFile": "LIST"}, "has one file for each slice"),
], ids=["short", "skip", "short end", "no file", "not packed", "cut", "4-D", "2 sizes", "no voxel", "too large", "type",
        "colour", "text", "negative", "nan", "singular", "word", "pattern", "list"])
def test_metaimages_that_are_refused(tmp_path, stored, changes, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        read_metaimage(metaimage(tmp_path, stored, **changes), max_voxels=100)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0\1\2" * 99, b"NDims = 3\nDimSize = 1 1 1\n", b"k = v\nno equals\n"],
                         ids=["empty", "binary", "cut", "line"])
def test_files_that_are_no_header(tmp_path, content):
    with pytest.raises(DataError, match="is no MetaImage header"):
        read_metaimage(write(tmp_path, "a.mhd", content))


# ---- MetaImage as a volume -------------------------------------------------------------------------------------------

RAS = LPS * np.array([[-1], [-1], [1], [1]])


def test_a_metaimage_is_the_volume_of_the_nifti_file_with_its_grid(tmp_path):
    expected = read_volume(save(tmp_path / "a.nii", STORED.reshape(4, 3, 2).transpose(2, 1, 0).astype(np.int16), RAS))
    path = metaimage(tmp_path, raw() + b"x")
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, expected.array)
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-5)
    assert volume.axes == expected.axes != "RAS" and volume.header["sform_code"] == volume.header["qform_code"] == 1
    assert volume.notes == ["has 1 bytes behind its voxels; they are not read", *expected.notes]
    (tmp_path / "a.raw").unlink()
    place = read_geometry(path)                                     # it needs no voxel
    assert same_grid(place, expected) and place.axes == expected.axes and not place.array.any()
    write_volume(tmp_path / "out.nii.gz", expected.array, place, "test")
    back = read_volume(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(back.array, expected.array)
    np.testing.assert_allclose(back.affine, expected.affine, atol=1e-5)


def test_a_metaimage_in_one_file_and_in_capitals(tmp_path):
    path = metaimage(tmp_path, name="B.MHA", inside=raw(), ElementDataFile="Local")
    assert read_volume(path).array.sum() == STORED.sum()
    assert read_geometry(path).array.size == 24
    for read in (read_volume, read_geometry):
        with pytest.raises(DataError, match=r"B\.MHA: DimSize is 2048 2048 65; one to 268435456 voxels"):
            read(metaimage(tmp_path, name="B.MHA", inside=raw(), DimSize="2048 2048 65", ElementDataFile="LOCAL"))


def scan_in(folder, name, array, ending="mhd", **changes):
    """Write a volume (X, Y, Z) as MetaImage of int16, 2 x 3 x 4 mm, with its voxels in a file beside it."""
    size = " ".join(str(n) for n in array.shape)
    voxels = array.astype("<i2").tobytes(order="F")
    return metaimage(folder, voxels, f"{name}.{ending}", ElementDataFile=f"{name.rsplit('/')[-1]}.raw", DimSize=size,
                     ElementSpacing="3 3 4", TransformMatrix="1 0 0 0 1 0 0 0 1", **changes)


def make_livers(folder, count=4):
    for number in range(1, count + 1):
        body = head(seed=number)
        scan_in(folder / "training", f"liver-orig{number:03d}", np.where(body > 0, body, -1000))
        scan_in(folder / "training", f"liver-seg{number:03d}", body > 190)
    return folder


def test_sliver07_as_a_data_set(tmp_path):
    folder = make_livers(tmp_path / "sliver")
    dataset, said = opened(folder, texts=True, gaps=True)
    assert dataset.layout == "SLIVER07" and dataset.contrasts == ("text", "ct") and dataset.present.all()
    assert sum(map(len, dataset.split.values())) == 4 and "(SLIVER07), 4 subjects" in said
    assert dataset.reports([0]) == ["an axial contrast enhanced abdominal ct ."]
    row = int(np.flatnonzero(dataset.subject == "liver002")[3])
    z = dataset.slice_number[row]
    # The axes of the file point to L, P and S, as rows and columns of a slice do: only x and y change places.
    plane = head(seed=2)[:, :, z].T
    shown = dataset.images[row, 1][1:19, 3:17]                      # 18 x 14 in the middle of 20 x 20
    np.testing.assert_allclose(shown, np.where(plane > 0, (plane + 1000) / 2500, 0), atol=1e-3)
    np.testing.assert_array_equal(dataset.labels[row][1:19, 3:17], plane > 190)
    assert not dataset.images[:, 0].any()


def test_the_voxels_of_a_metaimage_are_part_of_the_data_set(tmp_path, monkeypatch):
    """Its header stays the same when a voxel changes."""
    folder = make_livers(tmp_path / "sliver")
    options = {"texts": True, "gaps": True}
    monkeypatch.setattr(identity, "ANNOUNCED", 1)
    first, said = opened(folder, **options)
    total = sum(path.stat().st_size for path in folder.rglob("liver*"))
    assert f"reading 8 files ({identity.size_text(total)}) to recognise them" in said
    again, said = opened(folder, **options)
    assert again.fingerprint == first.fingerprint and "reading" not in said
    copy = shutil.copytree(folder, tmp_path / "other" / "sliver")
    assert opened(copy, **options)[0].fingerprint == first.fingerprint
    voxels = folder / "training" / "liver-orig002.raw"
    content = bytearray(voxels.read_bytes())
    content[2 * (7 + 14 * (9 + 18 * 4))] ^= 1                       # the middle voxel
    voxels.write_bytes(content)
    changed, said = opened(folder, **options)
    assert changed.fingerprint != first.fingerprint and "reading 1 files" in said
    voxels.unlink()
    with pytest.raises(DataError, match=r"liver-orig002\.raw: no such file") as caught:
        opened(folder, **options)
    assert ".mhd" not in str(caught.value)


def test_metaimages_in_plain_folders(tmp_path):
    for subject in ("p1", "p2"):
        for contrast in ("T1", "T2"):
            scan_in(tmp_path / subject, contrast, head(), "mha")
    layout = find_layout(tmp_path)
    assert layout.contrasts == ("t1", "t2") and layout.subjects[1].files["t2"] == tmp_path / "p2" / "T2.mha"
    save(tmp_path / "p1" / "T1.nii.gz", head())                     # MetaImages beside NIfTI files are not used
    layout = find_layout(tmp_path)
    assert layout.contrasts == ("t1",) and [subject.name for subject in layout.subjects] == ["p1"] and layout.notes == []
    write(tmp_path / "empty", "p/scan.MHA")
    with pytest.raises(DataError, match=r"no contrast recognised in 1 volumes such as scan\.MHA"):
        find_layout(tmp_path / "empty")


# ---- MedICaT ---------------------------------------------------------------------------------------------------------

def figure(name, caption, radiology=True, paper="0a1b"):
    return json.dumps({"pdf_hash": paper, "fig_uri": name, "s2_caption": caption, "s2orc_caption": None, "radiology": radiology})


def make_medicat(folder):
    for name in ("0a1b_2-Figure1-1.png", "0a1b_3-Figure2-1.png", "ffff_1-Figure1-1.png", "0a1b_9-Figure9-1.png"):
        write(folder, f"release/figures/{name}")
    lines = [figure("3-Figure2-1.png", "Figure 2. Chest CT: a nodule (arrow)."),
             figure("2-Figure1-1.png", "Computed tomography of the abdomen."),
             figure("1-Figure1-1.png", "Axial CT (a) before and (b) after.", paper="ffff"),
             figure("9-Figure9-1.png", "CT of a phantom.", radiology=False),
             figure("8-Figure8-1.png", "CT of the head."), figure("7-Figure7-1.png", None)]
    write(folder, "release/s2_full_figures.jsonl", "\n".join(lines) + "\n")
    return folder


def test_medicat(tmp_path):
    subjects, split, notes = collected(make_medicat(tmp_path), collect_medicat)
    assert split is None
    assert [(subject.name, subject.person, subject.report) for subject in subjects] == [
        ("0a1b_2-Figure1-1", "0a1b", "Computed tomography of the abdomen."),
        ("0a1b_3-Figure2-1", "0a1b", "Figure 2. Chest CT: a nodule (arrow).")]
    release = tmp_path / "release"
    assert subjects[0].files == {"ct": release / "figures" / "0a1b_2-Figure1-1.png", "text": release / "s2_full_figures.jsonl"}
    assert notes == ["2 figures are no CT, 1 have several panels; they are not used", "1 figures of CT are not here"]


@pytest.mark.parametrize(("caption", "expected"), [
    ("CT of the petrous bone", True), ("a computed tomographic image", True), ("FACT sheet", False), ("ct", False),
    ("CT and MRI", False), ("CT, mr imaging", False), ("PET/CT", False), ("CT after Ultrasound", False), ("", False),
])
def test_captions_of_ct(caption, expected):
    assert is_ct(caption) == expected


@pytest.mark.parametrize("line", ["{", "[1]", '{"pdf_hash": "0a1b"}', '{"pdf_hash": "0a1b", "fig_uri": ""}'])
def test_lines_that_are_no_figures(tmp_path, line):
    path = make_medicat(tmp_path) / "release" / "s2_full_figures.jsonl"
    path.write_text(path.read_text() + line)
    refused(tmp_path, collect_medicat, r"s2_full_figures\.jsonl, line 7: is no figure")
