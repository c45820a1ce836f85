"""Which file is which: folders as downloaded, odd names, sheets."""

import itertools
import json
import os

import numpy as np
import pytest

import data
from data import check, load_subject, read_volume
from data.files import DataError
from data.intensities import normalise
from data.layouts import canonical_contrast, find_layout, person_of, role_of
from data.volumes import fit
from scans import (
    ADNI_NAMES,
    CT_AFFINE,
    HEADER,
    IXI_NAMES,
    PET_AFFINE,
    PET_SHAPE,
    body_ct,
    body_pet,
    echoes,
    fine_head,
    head,
    make_adni,
    make_ixi,
    make_patients,
    make_pet_ct,
    make_set,
    make_slices,
    opened,
    save,
)

# ---- Odd folders -----------------------------------------------------------------------------------------------------

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
    layout = find_layout(tmp_path)
    assert [s.name for s in layout.subjects] == ["test/BraTS2021_00000", "train/BraTS2021_00000", "train/BraTS2021_00001"]
    assert [s.person for s in layout.subjects] == ["BraTS2021_00000"] * 2 + ["train/BraTS2021_00001"]
    assert layout.name == "BraTS 2021" and layout.subjects[0].meta == {"body": "brain"}
    with pytest.raises(DataError, match=r"BraTS2021_00000 \(t\w+\) and .*BraTS2021_00000 \(t\w+\) have identical"):
        opened(tmp_path)


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
    assert "run-1_t1.nii.gz is used as t1, not run-2_t1.nii.gz, in 1 subjects: p1; to use another" in layout.notes[0]


def test_all_subjects_in_one_folder(tmp_path):
    """Their names tell them apart (test_by_name.py), but not if one has two files of a contrast."""
    for s, contrast in itertools.product(range(3), ("t1", "t2")):
        save(tmp_path / f"p{s}_{contrast}.nii.gz", head())
    assert len(find_layout(tmp_path).subjects) == 3
    save(tmp_path / "p0_T1w.nii.gz", head(seed=1))
    with pytest.raises(DataError, match="3 files of each contrast; put every subject into a folder"):
        find_layout(tmp_path)


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("IM0001", bytes(128) + b"DICM", "convert with dcm2niix"),  # row 20
    ("slice.dcm", b"", "convert with dcm2niix"),
    ("scan.NRRD", b"", r"holds \.nrrd files; only \.nii"),  # row 21
    ("scan.nhdr", b"", r"holds \.nhdr files"), ("scan.mat", b"", r"holds \.mat files"),
    ("scan.h5", b"", r"holds \.h5 files"),
])
def test_other_formats(tmp_path, name, content, sentence):
    (tmp_path / "p1").mkdir()
    (tmp_path / "p1" / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        find_layout(tmp_path)
    with pytest.raises(DataError, match=r"only \.nii and \.nii\.gz are read"):
        read_volume(tmp_path / "p1" / name)


# ---- One folder per subject ------------------------------------------------------------------------------------------

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
    ("T2W_to_FLAIR.nii.gz", "p", "t2"), ("contrast1.nii", "p", None), ("spectrum.nii", "p", None),
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


def test_patients_sheet(tmp_path):
    text = ("patient,age,sex,scanner,scanner_ct,body\n1_01_P,61.5,M,GE Discovery 3T,Siemens Somatom,pelvis\n"
            "1_02_P,,m,,n/a,\n1_03_P,60,,A,\n1_03_P,61,,A,\n,,,\n2_01_P,-,x,None\n9,50,F,B\n")
    names = ("1_01_P", "1_02_P", "1_03_P", "2_01_P", "2_02_P")
    layout = find_layout(make_patients(tmp_path, names, "meta.csv", text))
    assert [s.meta for s in layout.subjects] == [
        {"age": 61.5, "sex": "M", "scanner": "GE Discovery 3T", "scanner_ct": "Siemens Somatom", "body": "pelvis"},
        {"sex": "M"}, {}, {}, {}]
    assert layout.notes == ["meta.csv: 1 cells of sex are not understood and count as unknown: 'x'",
                            "meta.csv: the rows of 1_03_P contradict each other; its facts stay unknown",
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


# ---- Slices that are cut and split already ---------------------------------------------------------------------------

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
    lines = []
    with pytest.raises(DataError, match=r"2 of 2 subjects could not be synthesised \(test, train\)"):
        list(data.to_synthesize(dataset.subjects, dataset.contrasts, ("t1",), 16, tmp_path, lines.append))
    assert all(".npy slices have no place in space" in line for line in lines)
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
    ("T1/val/slice_9.npy", None, r"slice_9\.npy: cannot be read \(ValueError"),
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
    inside = truth[dataset.slice_number[rows]][:, 0] < 0.98  # above, only one of the two was clipped
    np.testing.assert_allclose(dataset.images[rows][:, 0][inside], truth[dataset.slice_number[rows]][:, 0][inside], atol=2e-3)
    np.testing.assert_allclose(dataset.images[rows][:, 1:], truth[dataset.slice_number[rows]][:, 1:], atol=1e-3)
    lines = []
    assert check(folder, say=lines.append)
    rows = [line.split()[:5] for line in lines if line.startswith("IXI002")]
    assert rows == [["IXI002-Guys-0828", "t2", "14x18x9", "2.88x3.00x4.00", "RAS"],
                    ["IXI002-Guys-0828", "pd", "14x18x9", "2.88x3.00x4.00", "RAS"],
                    ["IXI002-Guys-0828", "t1", "14x18x17", "2.88x3.00x2.00", "PSR"]]


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
    contradictory = "IXI.csv: the rows of 2 contradict each other; its facts stay unknown"
    told = [note for note in layout.notes if "not understood" not in note]
    assert told == ([contradictory] if rows[1].startswith("2,") and rows[0] != rows[1] else [])


def test_ixi_sheet_that_is_missing_or_odd(tmp_path):
    folder = make_ixi(tmp_path / "set", IXI_NAMES)
    (folder / "IXI.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    assert find_layout(folder).notes == ["IXI.xls: Excel is not read; save it as IXI.csv to have age and sex"]
    (folder / "IXI-demographics.CSV").write_text(HEADER.format(",") + "\n12,1,180,50\n")
    layout = find_layout(folder)
    assert layout.notes == ["2 subjects have no row in the sheet of IXI: IXI002-Guys-0828, IXI035-IOP-0873"]
    assert [s.meta.get("age") for s in layout.subjects] == [None, 50, None]
    for content in (b"", b"name,age\n1,2\n", "name,age\n1,2\n".encode("utf-16")):
        (folder / "IXI-demographics.CSV").write_bytes(content)
        assert find_layout(folder).notes == ["IXI-demographics.CSV: has no columns IXI_ID, SEX_ID, AGE; "
                                             "age and sex stay unknown"]
    (folder / "IXI.csv").write_text(HEADER.format(",") + "\n2,2,164,35\n12,2,164,36\n35,2,164,37\n")
    layout = find_layout(folder)
    assert "IXI-demographics.CSV is used, not IXI.csv" in layout.notes


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
    assert rows == {(ADNI_NAMES[1], "t2"): ["14x18x9", "2.88x3.00x4.00", "RAS"],
                    (ADNI_NAMES[1], "pd"): ["14x18x9", "2.88x3.00x4.00", "RAS"],
                    (ADNI_NAMES[1], "t1"): ["14x18x17", "2.88x3.00x2.00", "PSR"]}


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


# ---- Pairs: CT and PET, CT and CTA, before and after an agent --------------------------------------------------------

@pytest.mark.parametrize(("name", "role"), [
    ("CTA.nii.gz", "cta"), ("pre.nii.gz", "pre"), ("post.nii.gz", "post"), ("dce_pre-contrast.nii", "pre"),
    ("dce_postcontrast.nii", "post"), ("CTres.nii.gz", "ct"), ("SUV.nii.gz", "pet"), ("PT.nii.gz", "pet"),
    ("PET_SUV.nii.gz", "pet"), ("T1_pre.nii", "t1"), ("T1_post.nii", "t1ce"), ("T1post.nii", "t1ce"),
    ("T2_post.nii", "t2"), ("CT_post.nii", "ct"), ("PT_07_CT.nii", "ct"), ("post_T1_gd.nii", "t1ce"),
    ("pre_to_post.nii", "pre"), ("CT_to_PET.nii", "ct"), ("CT_to_CTA.nii", "ct"), ("preprocessed.nii", None),
    ("pre_mask.nii", None), ("post_seg.nii", "seg"),
])
def test_words_of_pairs(name, role):
    assert role_of(name, "p") == role


@pytest.mark.parametrize(("names", "contrasts", "grid"), [
    (("PET", "CT"), ("ct", "pet"), ("pet",)), (("CTA", "CT"), ("ct", "cta"), ("ct",)),
    (("post", "pre", "seg"), ("pre", "post"), ("pre",)), (("T1", "CT"), ("t1", "ct"), ()),
])
def test_canonical_pairs(tmp_path, names, contrasts, grid):
    for subject, name in itertools.product(("p1", "p2"), names):
        save(tmp_path / subject / f"{name}.nii.gz", head())
    layout = find_layout(tmp_path)
    assert layout.contrasts == contrasts and [s.grid for s in layout.subjects] == [grid] * 2
    assert (layout.subjects[0].segmentation is not None) == ("seg" in names) and layout.ignored == []
    turned = find_layout(tmp_path, contrasts[::-1]).subjects[0]
    assert turned.grid == grid and list(turned.files) == list(contrasts[::-1])
    assert find_layout(tmp_path, contrasts[:1]).subjects[0].grid == ()


def test_hecktor_as_downloaded(tmp_path):
    folder = tmp_path / "hecktor2022_training"
    for name, label in (("CHUM-001", "CHUM_001"), ("CHUM-002", "CHUM-002"), ("HGJ-010", None)):
        save(folder / "imagesTr" / f"{name}__CT.nii.gz", head())
        save(folder / "imagesTr" / f"{name}__PT.nii.gz", head())
        if label:
            save(folder / "labelsTr" / f"{label}.nii.gz", (head() > 0).astype(np.uint8))
    save(folder / "imagesTr" / "average.nii.gz", head())
    (folder / "meta.csv").write_text("patient,age,sex\nCHUM-002,61,F\n")
    (folder / "labels.csv").write_text("subject,label\nchum_001,1\nHGJ-010,0\n")
    layout = find_layout(folder)
    assert layout.name == "HECKTOR" and layout.contrasts == ("ct", "pet")
    assert [s.name for s in layout.subjects] == [s.person for s in layout.subjects] == ["CHUM-001", "CHUM-002", "HGJ-010"]
    assert layout.subjects[0].files == {"ct": folder / "imagesTr" / "CHUM-001__CT.nii.gz",
                                        "pet": folder / "imagesTr" / "CHUM-001__PT.nii.gz"}
    assert [s.segmentation and s.segmentation.name for s in layout.subjects] == ["CHUM_001.nii.gz", "CHUM-002.nii.gz", None]
    place = {"body": "head and neck"}
    assert [s.meta for s in layout.subjects] == [{**place, "label": 1}, {**place, "age": 61, "sex": "F"},
                                                 {**place, "label": 0}]
    assert [s.grid for s in layout.subjects] == [("pet",)] * 3 and [p.name for p in layout.ignored] == ["average.nii.gz"]
    assert "1 subjects have no mask of the tumour: HGJ-010" in layout.notes
    save(folder / "imagesTs" / "CHUM_001__CT.nii", head())
    with pytest.raises(DataError, match=r"CHUM-001 has another ct, .*CHUM-001__CT\.nii\.gz|has another ct.*remove one"):
        find_layout(folder)


def test_mamamia_as_downloaded(tmp_path):
    for name in ("DUKE_001", "ispy1_1001", "NACT_01"):
        for phase in range(4):
            save(tmp_path / "images" / name / f"{name.lower()}_{phase:04d}.nii.gz", head(seed=phase))
        for kind in ("automatic", "expert"):
            save(tmp_path / "segmentations" / kind / f"{name}.nii.gz", (head() > 0).astype(np.uint8))
    os.remove(tmp_path / "images" / "NACT_01" / "nact_01_0001.nii.gz")
    layout = find_layout(tmp_path)
    assert layout.name == "MAMA-MIA" and layout.contrasts == ("pre", "post")
    assert [s.name for s in layout.subjects] == ["DUKE_001", "ISPY1_1001", "NACT_01"]
    assert {c: path.name for c, path in layout.subjects[1].files.items()} == {
        "pre": "ispy1_1001_0000.nii.gz", "post": "ispy1_1001_0001.nii.gz"}
    assert list(layout.subjects[2].files) == ["pre"]
    assert [s.segmentation.parent.name for s in layout.subjects] == ["expert"] * 3
    assert [path.parent.name for path in layout.ignored] == ["automatic"] * 3
    assert layout.notes[:2] == ["6 scans of later phases (_0002 and so on) are not used", "1 subjects lack post: NACT_01"]
    assert [s.meta for s in layout.subjects] == [{"body": "breast"}] * 3
    slices = load_subject(layout.subjects[0], ("pre", "post"), 20)
    assert slices.scales["pre"] == slices.scales["post"] == normalise(head(), contrast="pre")[1]
    save(tmp_path / "old" / "DUKE_001_0000.nii", head())
    with pytest.raises(DataError, match="DUKE_001 has another pre, .*remove one"):
        find_layout(tmp_path)


def make_autopet(folder):
    """Two studies of one patient and one of another; the last has no CTres, and one file of PETs is unlike the rest."""
    studies = (("PETCT_0a", "03-23-2003-NA-PET-CT Ganzkoerper mit KM-10445"),
               ("PETCT_0a", "09-01-2004-NA-PET-CT Ganzkoerper mit KM-20001"), ("PETCT_1b", "01-01-2005-NA-Y-30"))
    for seed, (patient, study) in enumerate(studies):
        place = folder / patient / study
        save(place / "CT.nii.gz", body_ct(seed), CT_AFFINE)
        save(place / "PET.nii.gz", body_pet(seed) / 2e-4, PET_AFFINE)
        save(place / "SUV.nii.gz", body_pet(seed), PET_AFFINE)
        save(place / "SEG.nii.gz", (body_pet(seed) > 3).astype(np.uint8), PET_AFFINE)
        if patient == "PETCT_0a":
            save(place / "CTres.nii.gz", body_ct(10 + seed, PET_SHAPE), PET_AFFINE)
    return folder


def test_autopet_as_downloaded(tmp_path):
    layout = find_layout(make_autopet(tmp_path / "FDG-PET-CT-Lesions"))
    assert layout.name == "autoPET" and layout.contrasts == ("ct", "pet") and layout.ignored == []
    assert [(s.name, s.person) for s in layout.subjects] == [
        ("PETCT_0a_03-23-2003_10445", "PETCT_0a"), ("PETCT_0a_09-01-2004_20001", "PETCT_0a"),
        ("PETCT_1b_01-01-2005_30", "PETCT_1b")]
    assert [[path.name[:-7] for path in s.files.values()] for s in layout.subjects] == [
        ["CTres", "SUV"], ["CTres", "SUV"], ["CT", "SUV"]]
    assert [s.segmentation.name for s in layout.subjects] == ["SEG.nii.gz"] * 3
    names = "PETCT_0a_03-23-2003_10445, PETCT_0a_09-01-2004_20001"
    other = "; to use another one, remove this one or write a manifest.csv"
    assert f"CTres.nii.gz is used as ct, not CT.nii.gz, in 2 subjects: {names}{other}" in layout.notes
    assert f"SUV.nii.gz is used as pet, not PET.nii.gz, in 3 subjects: {names}, PETCT_1b_01-01-2005_30{other}" in layout.notes
    slices = load_subject(layout.subjects[0], ("ct", "pet"), 12)
    np.testing.assert_allclose(slices.images[:, 1], fit(body_pet().clip(0, 10) / 10, 12), atol=1e-5)
    assert slices.notes == [] and slices.labels.max() == 1
    lines = []
    assert check(tmp_path / "FDG-PET-CT-Lesions", say=lines.append)
    assert "3 complete subjects of 2 persons" in lines[-1]


def test_the_files_of_autopet_in_plain_folders(tmp_path):
    for name in ("p1", "p2"):
        for file in ("CT", "CTres", "PET", "SUV", "SEG"):
            save(tmp_path / name / f"{file}.nii.gz", head())
    layout = find_layout(tmp_path)
    assert layout.name == "one folder per subject" and [s.name for s in layout.subjects] == ["p1", "p2"]
    assert [path.name for path in layout.subjects[0].files.values()] == ["CTres.nii.gz", "SUV.nii.gz"]
    assert [note.split("; ")[0] for note in layout.notes[:2]] == [
        "CTres.nii.gz is used as ct, not CT.nii.gz, in 2 subjects: p1, p2",
        "SUV.nii.gz is used as pet, not PET.nii.gz, in 2 subjects: p1, p2"]


def test_masks_of_tumours(tmp_path):
    """A mask counts if it is drawn on the grid that is used; other sets keep ignoring such names."""
    for name in ("p1", "p2"):
        for file in ("CT", "PET", "T1", "CT_tumour", "PET_tumour", "T1_tumour", "PET_lesion"):
            save(tmp_path / name / f"{file}.nii.gz", head())
    layout = find_layout(tmp_path, ("ct", "pet"))
    assert [s.segmentation.name for s in layout.subjects] == ["PET_tumour.nii.gz"] * 2
    assert "PET_tumour.nii.gz is used as segmentation, in 2 subjects: p1, p2" in layout.notes
    assert {path.name for path in layout.ignored} == {"CT_tumour.nii.gz", "T1_tumour.nii.gz", "PET_lesion.nii.gz"}
    layout = find_layout(tmp_path, ("t1", "ct"))
    assert [s.segmentation for s in layout.subjects] == [None] * 2 and len(layout.ignored) == 8
    save(tmp_path / "p1" / "seg.nii.gz", head())
    layout = find_layout(tmp_path, ("ct", "pet"))
    assert [s.segmentation.name for s in layout.subjects] == ["seg.nii.gz", "PET_tumour.nii.gz"]


# ---- labels.csv and suv.csv ------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "labels", "note"), [
    ("subject,label\np0,1\np1,0\np2,1\n", [1, 0, 1], None),
    ("\ufeffSubject;Label\np0;1.0\nP1;0\n\n p2 ; 1 \n", [1, 0, 1], None),
    ("subject,label\np0,1\np0,1\np2,0\n", [1, None, 0], "labels.csv: 1 subjects have no label: p1"),
    ("subject,label,site\np0,1,a\np1,n/a,b\np2,\np9,1\n", [1, None, None], "labels.csv: 2 subjects have no label: p1, p2"),
    ("label,subject\n1,p0\n0,p1\n1,p2\n0,p9\n", [1, 0, 1], "labels.csv: 1 rows are of no subject here: p9"),
])
def test_labels(tmp_path, text, labels, note):
    folder = make_pet_ct(tmp_path / "set")
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    layout = find_layout(folder)
    assert [s.meta.get("label") for s in layout.subjects] == labels
    assert all(type(s.meta["label"]) is int for s in layout.subjects if "label" in s.meta)
    assert note in [None, *layout.notes] and (note is not None or len(layout.notes) == 1)


@pytest.mark.parametrize(("sheet", "text", "sentence"), [
    ("labels.csv", "subject,label\np0,1\np1,yes\n", r"labels\.csv, line 3: the label of p1 is 'yes'; write 0 or 1"),
    ("labels.csv", "subject,label\np0,2\n", r"labels\.csv, line 2: the label of p0 is '2'"),
    ("labels.csv", "subject,label\np0,1\np1,0\np0,0\n", r"labels\.csv, line 4: p0 has another label in an earlier line"),
    ("labels.csv", "subject,class\np0,1\n", r"labels\.csv: has no column label; its first line must be subject,label"),
    ("labels.csv", "", r"labels\.csv: has no column subject"),
    ("suv.csv", "subject,factor\np0,0\n", r"suv\.csv, line 2: the factor of p0 is '0'; write a positive number"),
    ("suv.csv", "subject,factor\np0,-1\n", "write a positive number"), ("suv.csv", "subject,factor\np0,inf\n", "positive"),
    ("suv.csv", "subject,factor\np0,1e-4 g/Bq\n", "positive"), ("suv.csv", "name,factor\np0,1\n", "no column subject"),
    ("suv.csv", "subject,factor\np0,1\np0,2\n", r"suv\.csv, line 3: p0 has another factor"),
])
def test_bad_labels_and_factors(tmp_path, sheet, text, sentence):
    folder = make_pet_ct(tmp_path / "set")
    (folder / sheet).write_text(text)
    with pytest.raises(DataError, match=sentence) as caught:
        find_layout(folder)
    assert "\n" not in str(caught.value)
    assert sheet == "labels.csv" or find_layout(folder, ("ct",)).contrasts == ("ct",)  # no PET, so no factor is needed


def test_suv_factors(tmp_path):
    folder = make_pet_ct(tmp_path / "set")
    (folder / "suv.csv").write_text("subject;factor\np0;0,0002\np2;2e-4\n")
    layout = find_layout(folder)
    assert [s.suv_factor for s in layout.subjects] == [0.0002, None, 0.0002]
    assert layout.notes == ["pet is read in SUV; 0 to 10 SUV become 0 to 1", "suv.csv: 1 subjects have no factor: p1",
                            "suv.csv: the PET of 2 subjects is multiplied by its factor, which gives SUV"]
    autopet = make_autopet(tmp_path / "autopet")
    (autopet / "suv.csv").write_text("subject,factor\nPETCT_0a,2\nPETCT_1b_01-01-2005_30,3\n")  # by patient or by study
    assert [s.suv_factor for s in find_layout(autopet).subjects] == [2, 2, 3]
