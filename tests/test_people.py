"""Who is who: names of subjects below a folder, visits of one person, parts that folders name, safe names."""

import unicodedata

import numpy as np
import pytest

import data
from data.files import DataError
from data.layouts import Subject, find_layout, person_of
from data.layouts.people import part_of_folder, safe_name, settle_names
from scans import body_ct, head, opened, save


def tree(folder, names, words=("t1", "t2"), ending=".nii.gz"):
    """Empty files, one for each word, in a folder for each name; find_layout reads names only."""
    for name in names:
        for word in words:
            path = folder / name / f"{word}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    return folder


def named(folder, **options):
    return [(subject.name, subject.person) for subject in find_layout(folder, **options).subjects]


def names(folder):
    return [name for name, _ in named(folder)]


# ---- Names -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("paths", "expected"), [
    (["rome/07", "oslo/07", "oslo/08"], ["oslo/07", "oslo/08", "rome/07"]),
    (["rome/07", "oslo/07"], ["oslo", "rome"]),
    (["study/rome/07", "study/oslo/08"], ["oslo/08", "rome/07"]),
    (["s1/scans/nifti", "s2/scans/nifti"], ["s1", "s2"]),
    (["s1/s1", "s2/s2"], ["s1", "s2"]),
    (["all/s1", "all/s2"], ["s1", "s2"]),
    (["s1/x/anat", "s2/anat"], ["s1/x", "s2"]),
    (["s1.nii", "s2.nii"], ["s1.nii", "s2.nii"]),
    (["study/s1/mri"], ["s1"]),
    (["study/Zoë"], ["Zoë"]),
    (["a", "b/c", ""], ["a", "b/c", "set"]),
], ids=["sites", "shared-number", "shared", "trailing", "doubled", "one-folder", "depths", "like-files", "single",
        "no-number", "stray"])
def test_a_name_is_the_path_without_what_all_share(tmp_path, paths, expected):
    assert names(tree(tmp_path / "set", paths)) == expected


def test_folders_of_a_contrast_belong_to_the_folder_above(tmp_path):
    """Each scan in a folder of its own, also one that is called like a file."""
    for name in ("k1", "k2"):
        tree(tmp_path / "a", [f"{name}/T1", f"{name}/CT.nii.gz"], ["scan_0001"])
        tree(tmp_path / "b", [f"{name}/{name}_t1.nii"], ["5_t1"])
        tree(tmp_path / "b", [f"{name}/{name}_seg.nii"], ["final_seg"])
    layout = find_layout(tmp_path / "a")
    assert layout.contrasts == ("t1", "ct") and [list(s.files) for s in layout.subjects] == [["t1", "ct"]] * 2
    layout = find_layout(tmp_path / "b")
    assert [(s.name, s.files["t1"].name, s.segmentation.name) for s in layout.subjects] == [
        ("k1", "5_t1.nii.gz", "final_seg.nii.gz"), ("k2", "5_t1.nii.gz", "final_seg.nii.gz")]


def test_kinds_of_scans_are_joined_and_visits_are_not(tmp_path):
    for name in ("k1", "k2"):
        tree(tmp_path / "a", [f"{name}/brain"], ["t1", "t2"])
        tree(tmp_path / "a", [f"{name}/nuclear"], ["fdg"])
        tree(tmp_path / "b", [f"{name}/visit1"], ["t1"])
        tree(tmp_path / "b", [f"{name}/visit2"], ["t2"])
        tree(tmp_path / "c", [f"{name}/x", f"{name}/y"], ["t1"])
    tree(tmp_path / "d", ["k1/brain", "k1/trunk"], ["t1"])
    assert names(tmp_path / "a") == ["k1", "k2"] and find_layout(tmp_path / "a").contrasts == ("t1", "t2", "fdg")
    assert names(tmp_path / "b") == ["k1/visit1", "k1/visit2", "k2/visit1", "k2/visit2"]
    assert names(tmp_path / "c") == ["k1/x", "k1/y", "k2/x", "k2/y"]
    assert names(tmp_path / "d") == ["brain", "trunk"]


def test_a_visit_called_t1_is_no_contrast(tmp_path):
    for place in ("K1/T1", "K1/T2", "K2/T1"):
        tree(tmp_path, [place], [f"{place.replace('/', '_')}_{word}" for word in ("FLAIR", "T1", "T2")])
    layout = find_layout(tmp_path)
    assert [(s.name, s.person) for s in layout.subjects] == [("K1/T1", "K1"), ("K1/T2", "K1"), ("K2/T1", "K2/T1")]
    assert [path.name for path in layout.subjects[1].files.values()] == [
        "K1_T2_FLAIR.nii.gz", "K1_T2_T1.nii.gz", "K1_T2_T2.nii.gz"]


@pytest.mark.parametrize(("files", "expected"), [
    (["q_week1_t1", "q_week1_t2", "q_week9_t1", "q_week9_t2"], ["q/week1", "q/week9"]),
    (["q_ses-a_t1", "q_ses-b_t2"], ["q/ses-a", "q/ses-b"]),
    (["q_t1", "q_t2", "q_followup_t1"], ["q", "q/followup"]),
    (["q_t1_20200131", "q_t1_20210131", "q_t2_20200131"], ["q/20200131", "q/20210131"]),
    (["q_t1_20200131", "q_t2_20210131"], ["q"]),
    (["q_v1_t1", "q_v2_t1"], ["q/v1", "q/v2"]),
    (["q_v1_t1", "q_v2_t2"], ["q"]),
    (["q_baseline_t1", "q_t2"], ["q"]),
    (["t1_run-1", "t1_run-2", "T1_post"], ["q"]),
    (["q_t1", "q_t2", "q_1998.09.19_seg"], ["q"]),
], ids=["weeks", "sessions", "one-word", "days", "days-of-one-visit", "versions", "versions-of-one", "baseline-only",
        "runs", "mask-with-a-day"])
def test_visits_in_one_folder(tmp_path, files, expected):
    """Contrasts of two visits are never mixed."""
    tree(tmp_path, ["q"], files)
    tree(tmp_path, ["r"])
    assert [name for name in names(tmp_path) if name.startswith("q")] == expected
    for subject in find_layout(tmp_path).subjects:
        assert subject.name[0] == "r" or subject.person in (subject.name, "q")


# ---- Safe names ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "safe"), [
    ("siteA/001", "siteA/001"), ("Ünï 7", "Ünï 7"), (unicodedata.normalize("NFD", "é"), unicodedata.normalize("NFC", "é")),
    ("a:b/c\\d?", "a_b/c_d_"), ("tab\there", "tab_here"), ("x\udcff", "x_"), ("end.", "end_"), ("nul", "_nul"),
    ("Com1.x", "_Com1.x"), ("console", "console"),
], ids=["nested", "spaces", "form", "reserved", "control", "bytes", "dot", "nul", "com1", "console"])
def test_safe_names(name, safe):
    assert safe_name("set", name) == safe


def test_long_names_are_cut_and_stay_different():
    first, second = (safe_name("set", "ä" * 100 + end) for end in ("1", "2"))
    assert first != second and max(len(first.encode()), len(second.encode())) <= 120
    assert safe_name("set", "ä" * 60) == "ä" * 60


@pytest.mark.parametrize("name", ["..", "a/../b", "/etc", "a//b", "a/", ".", ""],
                         ids=["up", "inside", "absolute", "empty-part", "end", "here", "empty"])
def test_names_that_lead_out_of_a_folder(name):
    with pytest.raises(DataError, match="cannot name a folder for results; give it a name without"):
        safe_name("set", name)


def test_names_from_a_manifest(tmp_path):
    tree(tmp_path, ["scans"], ["one", "two"])
    sheet = tmp_path / "manifest.csv"

    def written(*rows):
        sheet.write_text("subject,session,modality,path,patient_id\n" + "\n".join(rows), encoding="utf-8")
        return tmp_path
    with pytest.raises(DataError, match=r"the subject '\.\./\.\./x' cannot name"):
        find_layout(written("../../x,,t1,scans/one.nii.gz,"))
    with pytest.raises(DataError, match="line 3: a_1 is a_1 here, and a in an earlier line"):
        find_layout(written("a,1,t1,scans/one.nii.gz,", "a_1,,t2,scans/two.nii.gz,"))
    with pytest.raises(DataError, match="subjects Ana and ana have one name, or names that are one on some disks"):
        find_layout(written("Ana,,t1,scans/one.nii.gz,", "ana,,t1,scans/two.nii.gz,"))
    rows = ["a,,t1,scans/one.nii.gz,7", "b,,t1,scans/two.nii.gz,7"]
    assert named(written(*rows)) == [("a", "7"), ("b", "7")] and find_layout(tmp_path).notes == []
    rows = ["P1_V1,,t1,scans/one.nii.gz,", "P1_V2,,t1,scans/two.nii.gz,", "P2_V1,,t1,scans/two.nii.gz,"]
    assert [person for _, person in named(written(*rows))] == ["P1", "P1", "P2_V1"]
    assert "a column person in manifest.csv overrules this" in find_layout(tmp_path).notes[0]
    rows = ["a:b,,t1,scans/one.nii.gz,", "c,,t1,scans/two.nii.gz,"]
    assert names(written(*rows)) == ["a_b", "c"]
    assert "1 names of subjects are no safe names of files and are changed: a_b" in find_layout(tmp_path).notes


def test_a_changed_name_is_changed_in_the_split():
    subjects = [Subject(name, "p" if name == "b" else name, {}) for name in ("x:y", "b")]
    split = {"train": ["x:y"], "val": [], "test": ["b"]}
    settle_names("set", subjects, split, notes := [])
    assert split == {"train": ["x_y"], "val": [], "test": ["b"]} and len(notes) == 1
    assert [(subject.name, subject.person) for subject in subjects] == [("b", "p"), ("x_y", "x:y")]


def test_nested_names_get_results_of_their_own(tmp_path):
    for site in ("oslo", "rome"):
        for name in ("07", "08"):
            save(tmp_path / "set" / site / name / "T1.nii.gz", head())
    wanted = data.to_synthesize(find_layout(tmp_path / "set", ("t1", "t2")).subjects, ("t1", "t2"), (), 20,
                                tmp_path / "out", print)
    assert [paths["t2"] for *_, paths in wanted] == [
        tmp_path / "out" / site / name / f"{name}_t2_synthetic.nii.gz" for site in ("oslo", "rome") for name in ("07", "08")]


# ---- Persons ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "person"), [
    ("BraTS-GLI-00031-002", "BraTS-GLI-00031"), ("BraTS2021_00031", "BraTS2021_00031"), ("siteB/BraTS-MET-00031-002",
                                                                                         "siteB/BraTS-MET-00031"),
    ("sub-07_ses-02", "sub-07"), ("sub-07/ses-pre/run-1", "sub-07"), ("K7/tp2", "K7"), ("K7/2011-05-30", "K7"),
    ("K7_20110530", "K7"), ("K7/30-05-2011-NA-MRI HEAD-5", "K7"), ("K7/baseline", "K7"), ("K7_V3", "K7"),
    ("K7v3", "K7"), ("K7_visit3", "K7"), ("K7_scan2", "K7"), ("K7_m18", "K7"), ("K7-day0", "K7"), ("K7_postop", "K7"),
    ("K7_FU012d_nifti", "K7"), ("K7/week-012-2", "K7"), ("OAS1_0031_MR2", "OAS1_0031"), ("K7/ses-d0031", "K7"),
    ("002_S_0413_2007-05-20", "002_S_0413"), ("100307_7T", "100307"), ("5550001_20252_3_0", "5550001"),
    ("HCA1_V2_MR", "HCA1"), ("9007_LEFT", "9007"), ("HCP_Retest/100307", "HCP/100307"), ("study_baseline/K7", "study/K7"),
    ("fdg_0b57b247b6_05-02-2002-NA-PET-CT Ganzkoerper-42966", "fdg_0b57b247b6"), ("psma_95b833d65b_2018-04-16", "psma_95b833d65b"),
    ("fdg_0b57b247b6", "fdg_0b57b247b6"), ("psma_early_3", "psma_early_3"), ("followup/K7", "K7"), ("rawdata/K7", "K7"), ("preprocessed/K7_V1", "K7"),
    ("oslo/K7", "oslo/K7"), ("train/K7_V1", "K7"),
    ("CTA001", "CTA001"), ("HN-CHUM-001", "HN-CHUM-001"), ("1_01_P", "1_01_P"), ("TCGA-02-0031", "TCGA-02-0031"),
    ("C3L-00016", "C3L-00016"), ("IXI002-Guys-0828", "IXI002-Guys-0828"), ("scan12", "scan12"), ("tp2", "tp2"),
    ("BraTS20_Training_001", "BraTS20_Training_001"), ("20110530/7", "20110530/7"), ("Breast_MRI_001", "Breast_MRI_001"),
], ids=lambda text: text.replace("/", "|"))
def test_visits_that_are_known(name, person):
    assert person_of(name) == person


def series(*forms):
    """"k{:02}_{}" over (range, endings) -> names."""
    return [form.format(number, ending) for form, numbers, endings in forms for number in numbers for ending in endings]


@pytest.mark.parametrize(("subjects", "persons"), [
    (series(("UPX-{:05}_{}", range(5), ("11", "21"))), 5),
    (series(("UPX-{:05}_{}", range(5), ("11",)), ("UPX-{:05}_{}", (3,), ("21",))), 5),
    (series(("{:04}{}", range(3), "xyz")), 3),
    (series(("K{:02}/{}", range(4), ("early", "late"))), 4),
    (series(("K{:02}/{}", range(4), "12")), 4),
    (series(("K{}_{}", range(4), "12")), 4),
    (series(("site{}_{:03}", (1,), range(20)), ("site{}_{:03}", (2,), range(20))), 40),
    (series(("site{:03}_{}", range(9), "12")), 18),
    (series(("C{:02}_{:03}", range(9), range(3))), 27),
    (series(("K{}_{}", range(3), "12")), 6),
    (series(("BraTS2021_{:05}{}", range(12), ("",))), 12),
    (series(("ACME2020_{}{}", range(3), ("",)), ("ACME2021_{}{}", range(3), ("",)), ("ACME2022_{}{}", range(3), ("",))), 9),
    (series(("{}_visit{}", ("ana", "bo"), range(3))), 2),
    (series(("{}_scan{}", ("ill", "well"), range(9))), 18),
    (series(("{}/MR_{:03}", ("HGG", "LGG"), range(9))), 18),
    (series(("{}_visit{}", ("ill", "well"), range(13))), 26),
    (series(("K{}_scan{}", range(4), range(8))), 4),
    (series(("K{}_visit{}", range(2), range(20))), 2),
    (series(("K{}/scan{}", range(2), range(9))), 2),
    (series(("site{}/scan{}", range(2), range(9))), 18),
], ids=["numbers", "few-numbers", "letters", "words", "folders", "equal-width", "sites", "called-site", "longer-number",
        "too-few-persons", "brats", "years", "names", "scans-without-number", "grades", "too-many-visits",
        "many-scans", "many-visits", "many-in-folders", "many-at-sites"])
def test_persons_are_told_by_what_several_scans_share(tmp_path, subjects, persons):
    found = named(tree(tmp_path, subjects))
    assert (len(found), len({person for _, person in found})) == (len(subjects), persons)


def test_studies_of_two_folders_are_one_person(tmp_path):
    found = named(tree(tmp_path, series(("{}/{:03}", ("ACME", "ACME_retest"), range(3)))))
    assert {person for _, person in found} == {"ACME/000", "ACME/001", "ACME/002"} and len(found) == 6


def test_persons_are_counted_in_a_sentence(tmp_path):
    tree(tmp_path / "set", series(("K{:03}_{}", range(4), ("1", "2"))) + ["K009_1"])
    layout = find_layout(tmp_path / "set")
    assert layout.notes == ["9 scans of 5 persons, told by _1, _2 in their names; a column person in meta.csv overrules this"]
    assert layout.subjects[0].person == "K000" and layout.subjects[-1].person == "K009_1"
    tree(tmp_path / "late", ["K1", "K1_followup", "K2"])
    assert find_layout(tmp_path / "late").notes[0].startswith("3 scans of 2 persons, told by _followup in their names")
    assert find_layout(tree(tmp_path / "other", ["a", "b"])).notes == []


@pytest.mark.parametrize("paths", [["K7/ses-1", "K7/ses-2", "K7/ses-3"], ["K7_tp1", "K7_tp2"], ["K7a", "K7b"]],
                         ids=["folders", "names", "letters"])
def test_a_set_of_one_person_is_not_collapsed(tmp_path, paths):
    layout = find_layout(tree(tmp_path, paths))
    assert [s.person for s in layout.subjects] == [s.name for s in layout.subjects]
    told = any("look like visits of one person, but each scan counts as a person" in note for note in layout.notes)
    assert told == (paths != ["K7a", "K7b"])


@pytest.mark.parametrize(("text", "persons"), [
    ("patient,person\nk1,x\nk2,x\nk3,y\n", ["x", "x", "y"]), ("person;patient\nx;K1\nx;k2\n;k3\n", ["x", "x", "k3"]),
    ("scan_id,patient_id,age\nk1,5,60\nk2,5,61\nk3,6,62\n", ["5", "5", "6"]),
    ("subject_id,PID\nk1,5\nk2,5\nk3,6\n", ["5", "5", "6"]), ("patient,PID\nk1,1\nk2,2\nk3,3\n", ["k1", "k2", "k3"]),
    ("scan,PatientID\nk1,5\nk2,5\nk3,6\n", ["5", "5", "6"]),
    ("participant_id,patient\n5,k1\n5,k2\n6,k3\n", ["5", "5", "6"]), ("patient,person\nz1,x\nz2,x\n", ["k1", "k2", "k3"]),
], ids=["person", "gap", "scan-and-patient", "subject-and-pid", "other-numbers", "one-word", "by-fit", "other-patients"])
def test_a_sheet_says_who_is_who(tmp_path, text, persons):
    tree(tmp_path, ["k1", "k2", "k3"])
    (tmp_path / "meta.csv").write_text(text, encoding="utf-8")
    assert [person for _, person in named(tmp_path)] == persons
    told = [note for note in find_layout(tmp_path).notes if "tells the persons of" in note]
    assert len(told) == (len(set(persons)) < 3)


def test_participants_without_bids_tell_persons(tmp_path):
    tree(tmp_path, ["k1", "k2", "k3"])
    (tmp_path / "participants.tsv").write_text("scan\tparticipant_id\nk1\t5\nk2\t5\nk3\t6\n")
    assert [person for _, person in named(tmp_path)] == ["5", "5", "6"]


def test_a_sheet_overrules_the_names(tmp_path):
    tree(tmp_path, series(("{:03}{}", range(3), "ab")))
    (tmp_path / "meta.csv").write_text("patient,person,age\n" + "".join(f"{n:03}{x},{n}{x},{50 + n}\n" for n in range(3)
                                                                        for x in "ab"))
    assert [person for _, person in named(tmp_path)] == ["0a", "0b", "1a", "1b", "2a", "2b"]
    (tmp_path / "meta.csv").write_text("patient,age\n000,50\n001,51\n001b,61\n")         # a row of a person, and one of a scan
    layout = find_layout(tmp_path)
    assert [s.meta.get("age") for s in layout.subjects] == [50, 50, 51, 61, None, None]


# ---- Parts that folders name -----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("folder", "part"), [
    ("TRAIN", "train"), ("training", "train"), ("trainB", "train"), ("imagesTr", "train"), ("train_set", "train"),
    ("X_BraTS2021_TrainingData_16July2021", "train"), ("Valid", "val"), ("validation", "val"), ("dev", "val"),
    ("ACME-ValidationData", "val"), ("Testing", "test"), ("imagesTs", "test"), ("testA", "test"), ("trainees", None),
    ("BraTS20_Training_001", None), ("retest", None), ("tr", None), ("contest", None), ("test1", None), ("valve", None),
], ids=lambda text: str(text))
def test_part_of_folder(folder, part):
    assert part_of_folder(folder) == part


@pytest.mark.parametrize(("paths", "split", "note"), [
    (["Train/a", "Train/b", "Val/c", "Test/d"], (["a", "b"], ["c"], ["d"]), "(train 2, val 1, test 1)"),
    (["x/train/a", "x/validation/b"], (["a"], [], ["b"]), "that for validation is the test"),
    (["oslo/train/1", "rome/train/1", "oslo/test/2"], (["oslo/1", "rome/1"], [], ["oslo/2"]), "(train 2, test 1)"),
    (["train/a", "train/b", "test/a"], (["train/a", "train/b"], [], ["test/a"]), "3 scans of 2 persons, told by test/, train/"),
    (["train/a", "test/b", "c"], (["a"], [], ["b"]), "1 subjects are in no part of the split and not used: c"),
    (["train/a", "b"], None, "only that for training has complete subjects, so that the split is at random"),
    (["test/a", "retest/a", "test/b", "retest/b"], None, "4 scans of 2 persons"),
    (["fold1/a", "fold2/b"], None, None),
], ids=["three", "no-test", "sites", "same-name", "outside", "train-only", "retest", "folds"])
def test_folders_are_the_split(tmp_path, paths, split, note):
    layout = find_layout(tree(tmp_path, paths))
    assert layout.split == (split and dict(zip(("train", "val", "test"), split)))
    assert any(note in line for line in layout.notes) if note else not layout.notes
    if split is None and "train/a" not in paths:
        assert [subject.name for subject in layout.subjects] == sorted(paths)


def test_incomplete_subjects_are_no_part_of_the_split(tmp_path):
    """The test folder of a challenge often lacks what is asked for."""
    tree(tmp_path / "set" / "train", "abc")
    tree(tmp_path / "set" / "test", "de", ["t1"])
    assert find_layout(tmp_path / "set").split is None
    tree(tmp_path / "set" / "val", "f")
    assert find_layout(tmp_path / "set").split == {"train": ["a", "b", "c"], "val": [], "test": ["f"]}
    assert find_layout(tmp_path / "set", ("t1",)).split == {"train": ["a", "b", "c"], "val": ["f"], "test": ["d", "e"]}


def test_two_folders_of_a_pair_are_one_part(tmp_path):
    for part, name in (("train", "p"), ("train", "q"), ("test", "r")):
        tree(tmp_path, [f"{part}A/{name}"], ["CT"])
        tree(tmp_path, [f"{part}B/{name}"], ["MR"])
    layout = find_layout(tmp_path)
    assert layout.split == {"train": ["p", "q"], "val": [], "test": ["r"]}
    assert all(len(subject.files) == 2 for subject in layout.subjects)


def test_the_split_of_folders_is_used_and_torn_persons_are_told(tmp_path):
    seeds = iter(range(99))
    for name in ("train/K1_V1", "train/K2_V1", "train/K3_V1", "test/K1_V2", "test/K4_V1"):
        for word in ("t1", "t2"):
            save(tmp_path / "set" / name / f"{word}.nii.gz", head(seed=next(seeds)))
    dataset, said = opened(tmp_path / "set")
    assert dataset.split == {"train": ["K1_V1", "K2_V1", "K3_V1"], "val": [], "test": ["K1_V2", "K4_V1"]}
    assert "warning: images of K1 are in train and test of the data set's own split" in said


def test_hecktor_has_the_split_of_its_folders(tmp_path):
    for place, name in (("imagesTr", "CHUM-001"), ("imagesTr", "CHUM-002"), ("imagesTs", "MDA-003")):
        for word in ("CT", "PT"):
            save(tmp_path / place / f"{name}__{word}.nii.gz", body_ct().astype(np.int16))
    assert find_layout(tmp_path).split == {"train": ["CHUM-001", "CHUM-002"], "val": [], "test": ["MDA-003"]}
