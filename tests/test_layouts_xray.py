"""Public sets of chest X-rays as downloaded: ChestX-ray14, IU X-ray, MIMIC-CXR, CheXpert, SIIM, RSNA."""

import gzip

import numpy as np
import pytest

from data.files import DataError
from data.layouts.chestxray14 import collect_chestxray14, is_chestxray14, report_of
from data.layouts.chexpert import (
    collect_chexpert,
    collect_rsna,
    collect_siim,
    is_chexpert,
    is_rsna,
    is_siim,
    rle_mask,
)
from data.layouts.mimic import collect_mimic, findings_of, is_mimic
from data.layouts.openi import collect_openi, is_openi
from data.layouts.xrays import official_split, pictures_by_name, read_table

READERS = {is_chestxray14: collect_chestxray14, is_openi: collect_openi, is_mimic: collect_mimic,
           is_chexpert: collect_chexpert, is_siim: collect_siim, is_rsna: collect_rsna}


def write(folder, name, content=b""):
    """Write one file of a fake data set; a name that ends in .gz is packed."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    return path


def collected(folder, collect):
    """Call a reader -> (subjects, split, notes). The rules for folders must choose it, and no other one."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert [READERS[rule] for rule in READERS if rule(folder, files)] == [collect]
    notes = []
    subjects, split = collect(folder, files, notes)
    assert [subject.name for subject in subjects] == sorted(subject.name for subject in subjects)
    assert all(path.is_file() for subject in subjects for path in subject.paths)
    assert all(("text" in subject.files) == (subject.report is not None) for subject in subjects)
    return subjects, split, notes


def refused(folder, collect, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        collected(folder, collect)
    assert "\n" not in str(caught.value)


# ---- ChestX-ray14 ----------------------------------------------------------------------------------------------------

TITLES_2017 = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],\n"


def make_chestxray14(folder):
    for number, name in ((1, "00000001_000"), (1, "00000001_001"), (1, "00000002_000"), (2, "00001336_000"),
                         (12, "00030805_000"), (12, "00030999_000")):
        write(folder, f"images_{number:03d}/images/{name}.png")
    rows = ("00000001_000.png,Cardiomegaly,0,1,058Y,M,PA,2682,2749,\n"
            "00000001_001.png,Cardiomegaly|Pleural_Thickening,1,1,058Y,M,AP,2894,2729,\n"
            "00000002_000.png,No Finding,0,2,414Y,F,PA,2500,2048,\n"
            "00000003_000.png,Hernia,0,3,081Y,F,PA,2582,2991,\n"
            "00001336_000.png,Mass,0,1336,018M,F,AP,2582,2991,\n"
            "00030805_000.png,No Finding,0,30805,,,,2048,2500,\n")
    write(folder, "Data_Entry_2017.csv", "\ufeff" + TITLES_2017 + rows)
    write(folder, "train_val_list.txt", "00000001_000.png\n00000001_001.png\n00000002_000.png\n00000003_000.png")
    write(folder, "test_list.txt", "00001336_000.png\r\n00030805_000.png\r\n")
    return folder


def test_chestxray14(tmp_path):
    folder = make_chestxray14(tmp_path)
    subjects, split, notes = collected(folder, collect_chestxray14)
    by_name = {subject.name: subject for subject in subjects}
    assert list(by_name) == ["00000001_000", "00000001_001", "00000002_000", "00001336_000", "00030805_000"]
    assert [subject.person for subject in subjects] == ["00000001", "00000001", "00000002", "00001336", "00030805"]
    assert by_name["00001336_000"].files == {"xray": folder / "images_002/images/00001336_000.png",
                                             "text": folder / "Data_Entry_2017.csv"}
    assert [subject.meta["labels"] for subject in subjects] == [
        ["Cardiomegaly"], ["Cardiomegaly", "Pleural_Thickening"], [], ["Mass"], []]
    assert [subject.meta.get("age") for subject in subjects] == [58, 58, None, 1.5, None]
    assert [subject.meta.get("sex") for subject in subjects] == ["M", "M", "F", "F", None]
    assert [subject.report for subject in subjects] == [
        "a frontal chest x-ray , pa view , 58 year old man . findings : cardiomegaly .",
        "a frontal chest x-ray , ap view , 58 year old man . findings : cardiomegaly , pleural thickening .",
        "a frontal chest x-ray , pa view , woman . no finding .",
        "a frontal chest x-ray , ap view , 1 year old woman . findings : mass .",
        "a frontal chest x-ray . no finding ."]
    assert split == {"train": ["00000001_000", "00000001_001", "00000002_000"], "val": [],
                     "test": ["00001336_000", "00030805_000"]}
    assert notes == ["Data_Entry_2017.csv: 1 rows have no picture here",
                     "1 pictures have no row in Data_Entry_2017.csv and are not used: 00030999_000",
                     "1 ages are above 120 years and count as unknown: 00000002_000"]


def test_chestxray14_of_2020_in_one_folder(tmp_path):
    folder = make_chestxray14(tmp_path)
    write(folder, "Data_Entry_2017_v2020.csv", TITLES_2017.replace("Gender", "Sex")
          + "00000001_000.png,Edema|Mass,0,1,57,F,AP,2682,2749,\n00001336_000.png,No Finding,0,2,80,M,PA,2682,2749,\n")
    subjects, split, notes = collected(folder, collect_chestxray14)
    assert [(subject.meta["age"], subject.meta["sex"]) for subject in subjects] == [(57, "F"), (80, "M")]
    assert subjects[0].report == "a frontal chest x-ray , ap view , 57 year old woman . findings : edema , mass ."
    assert subjects[0].files["text"].name == "Data_Entry_2017_v2020.csv"
    assert split == {"train": ["00000001_000"], "val": [], "test": ["00001336_000"]}


def test_chestxray14_without_its_lists_or_with_one_part(tmp_path):
    folder = make_chestxray14(tmp_path)
    write(folder, "test_list.txt", "00030999_000.png")
    assert collected(folder, collect_chestxray14)[1] is None
    assert collected(folder, collect_chestxray14)[2][-1] == (
        "the official split has 3 of the subjects here for training and 0 for the test; it is not used")
    (folder / "test_list.txt").unlink()
    split, notes = collected(folder, collect_chestxray14)[1:]
    assert split is None and notes[-1].startswith("train_val_list.txt and test_list.txt are not both there")


@pytest.mark.parametrize(("age", "sex", "person"), [
    (30.9, None, "30 year old patient"), (None, "F", "woman"), (0.5, "M", "0 year old man"), (120, "O", "120 year old patient"),
])
def test_what_is_not_known_is_left_out(age, sex, person):
    assert report_of([], "PA", age, sex) == f"a frontal chest x-ray , pa view , {person} . no finding ."


def test_the_oldest_age_and_odd_tables(tmp_path):
    folder = make_chestxray14(tmp_path)
    table = folder / "Data_Entry_2017.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("414Y", "120Y"), encoding="utf-8")
    subjects, _, notes = collected(folder, collect_chestxray14)
    assert subjects[2].meta["age"] == 120 and not any("ages" in note for note in notes)
    table.write_text("Image Index,Patient Age,View Position\n")
    refused(folder, collect_chestxray14, r"Data_Entry_2017\.csv: has no column Finding Labels, only Image Index")


# ---- IU X-ray --------------------------------------------------------------------------------------------------------

def openi_report(name, findings, stems, label="FINDINGS"):
    images = "".join(f'<parentImage id="{stem}"><caption>Xray Chest PA</caption></parentImage>' for stem in stems)
    return (f'<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="{name}"/><MedlineCitation><Article><Abstract>'
            f'<AbstractText Label="COMPARISON">None.</AbstractText><AbstractText Label="{label}">{findings}</AbstractText>'
            f'<AbstractText Label="IMPRESSION">Normal.</AbstractText></Abstract></Article></MedlineCitation>{images}</eCitation>')


def make_openi(folder):
    for name in ("CXR1_1_IM-0001-4001", "CXR1_1_IM-0001-3001", "CXR2_IM-0652-1001", "CXR9_IM-2407-1001", "CXR10_IM-0002-1001"):
        write(folder, f"NLMCXR_png/{name}.png")
    reports = folder / "ecgen-radiology"
    # The lateral picture comes first in this report, and the order of the report is kept.
    write(reports, "1.xml", openi_report("CXR1", "No XXXX of a pleural\n effusion &lt;1 cm.",
                                         ["CXR1_1_IM-0001-4001", "CXR1_1_IM-0001-3001"]))
    write(reports, "2.xml", openi_report("CXR2", "Clear lungs.", ["CXR2_IM-0652-1001", "CXR2_IM-0652-2001"]))
    write(reports, "9.xml", openi_report("CXR9", "", ["CXR9_IM-2407-1001"]))
    write(reports, "10.xml", openi_report("CXR10", "Only an impression.", ["CXR10_IM-0002-1001"], label="INDICATION"))
    write(reports, "11.xml", openi_report("CXR11", "Clear lungs.", ["CXR11_IM-0067-1001"]))
    write(reports, "12.xml", openi_report("CXR12", "Clear lungs.", []))
    return folder


def test_openi(tmp_path):
    folder = make_openi(tmp_path)
    subjects, split, notes = collected(folder, collect_openi)
    assert split is None
    assert [(subject.name, subject.person) for subject in subjects] == [("CXR1", "CXR1"), ("CXR2", "CXR2")]
    assert subjects[0].report == "No XXXX of a pleural effusion <1 cm."
    pictures = folder / "NLMCXR_png"
    assert subjects[0].files == {"xray": (pictures / "CXR1_1_IM-0001-4001.png", pictures / "CXR1_1_IM-0001-3001.png"),
                                 "text": folder / "ecgen-radiology" / "1.xml"}
    assert subjects[1].files["xray"] == pictures / "CXR2_IM-0652-1001.png"
    assert notes == ["2 reports have no findings and are not used", "2 reports have no picture here and are not used",
                     "1 pictures of the other reports are not here"]


@pytest.mark.parametrize(("content", "sentence"), [
    ("<eCitation><uId id='CXR3'/>", r"3\.xml: cannot be read as XML"),
    (openi_report("CXR1", "Clear.", ["CXR1_1_IM-0001-3001"]), r"3\.xml: is the report CXR1, as is .*1\.xml; remove one"),
], ids=["damaged", "twice"])
def test_damaged_openi(tmp_path, content, sentence):
    folder = make_openi(tmp_path)
    write(folder / "ecgen-radiology", "3.xml", content)
    refused(folder, collect_openi, sentence)


# ---- MIMIC-CXR -------------------------------------------------------------------------------------------------------

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with new onset ascites  // eval for infection

 {heading}:
 There is no focal consolidation, pleural effusion or pneumothorax.  A
 nodule: stable.

 IMPRESSION:
 No acute process.
"""
SENTENCE = "There is no focal consolidation, pleural effusion or pneumothorax. A nodule: stable."


def make_mimic(folder):
    views = []
    parts = []
    for patient, study, part, pictures in (
            ("10000032", "50414267", "train", {"02aa": "PA", "174f": "LATERAL"}),
            ("10000032", "53189527", "train", {"2a2d": "AP", "e084": "PA"}),
            ("10000764", "57375967", "validate", {"096a": "AP"}),
            ("10000898", "50771383", "test", {"2a28": "PA"}),
            ("10000935", "50578979", "test", {"d0b7": "LL"}),
            ("10000980", "50985099", "train", {"6ad8": "PA"}),
            ("10000980", "51967283", "train", {"943486": "PA"})):
        place = f"p{patient[:2]}/p{patient}/s{study}"
        for picture, view in pictures.items():
            write(folder, f"mimic-cxr-jpg/files/{place}/{picture}.jpg")
            views.append(f"{picture},{patient},{study},{view}\n")
            parts.append(f"{picture},{study},{patient},{part}\n")
        heading = {"50985099": "FINDINGS AND IMPRESSION", "53189527": "FINDIGNS"}.get(study, "FINDINGS")
        if study != "51967283":
            write(folder, f"mimic-cxr-reports/files/{place}.txt", REPORT.format(heading=heading))
    write(folder, "other/s50000001/02aa.jpg")                               # no patient above it, so it is no study
    write(folder, "mimic-cxr-2.0.0-metadata.csv.gz", "dicom_id,subject_id,study_id,ViewPosition\n" + "".join(views))
    write(folder, "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,study_id,subject_id,split\n" + "".join(parts))
    return folder


def test_mimic(tmp_path):
    folder = make_mimic(tmp_path)
    subjects, split, notes = collected(folder, collect_mimic)
    assert [(subject.name, subject.person) for subject in subjects] == [
        ("s50414267", "p10000032"), ("s50771383", "p10000898"), ("s53189527", "p10000032"), ("s57375967", "p10000764")]
    pictures = folder / "mimic-cxr-jpg/files/p10/p10000032"
    assert subjects[0].files == {"xray": pictures / "s50414267/02aa.jpg",
                                 "text": folder / "mimic-cxr-reports/files/p10/p10000032/s50414267.txt"}
    assert subjects[2].files["xray"] == (pictures / "s53189527/2a2d.jpg", pictures / "s53189527/e084.jpg")
    assert [subject.report for subject in subjects] == [SENTENCE] * 4
    assert split == {"train": ["s50414267", "s53189527"], "val": ["s57375967"], "test": ["s50771383"]}
    assert notes == [f"1 studies have {what} and are not used" for what in
                     ("no frontal picture", "no report", "no findings in the report")]


def test_mimic_without_its_tables(tmp_path):
    folder = make_mimic(tmp_path)
    (folder / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    (folder / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    write(folder, "mimic-cxr-2.0.0-split.csv", "dicom_id,study_id,subject_id,split\nd0b7,50578979,10000935,test\n"
          "02aa,50414267,10000032,train\n")
    subjects, split, notes = collected(folder, collect_mimic)
    assert [path.name for path in subjects[0].files["xray"]] == ["02aa.jpg", "174f.jpg"]
    assert "s50578979" in [subject.name for subject in subjects]
    assert notes[0].startswith("mimic-cxr-2.0.0-metadata.csv.gz is not there, so the views are not known")
    assert split == {"train": ["s50414267"], "val": [], "test": ["s50578979"]}
    assert notes[-1] == "3 subjects are in no part of the split and not used: s50771383, s53189527, s57375967"
    (folder / "mimic-cxr-2.0.0-split.csv").unlink()
    split, notes = collected(folder, collect_mimic)[1:]
    assert split is None and notes[-1].startswith("mimic-cxr-2.0.0-split.csv.gz is not there")


def test_mimic_that_is_refused(tmp_path):
    folder = make_mimic(tmp_path)
    write(folder, "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,study_id,subject_id,split\n02aa,50414267,1,trial\n")
    refused(folder, collect_mimic, "the split of study 50414267 is 'trial', none of train, validate, test")
    (folder / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(b"no gzip")
    refused(folder, collect_mimic, r"split\.csv\.gz: has no column study_id")
    for path in (folder / "mimic-cxr-reports").rglob("*.txt"):
        path.unlink()
    refused(folder, collect_mimic, r"has no reports such as .*mimic-cxr-reports\.zip")


@pytest.mark.parametrize(("text", "findings"), [
    (REPORT.format(heading="FINDINGS"), SENTENCE), (REPORT.format(heading="FINDING"), SENTENCE),
    (REPORT.format(heading="FIDINGS"), SENTENCE), (REPORT.format(heading="FINIDNGS"), SENTENCE),
    (REPORT.format(heading="FINDINGS/IMPRESSION"), ""), (REPORT.format(heading="COMPARISON"), ""), ("", ""),
    ("No headings at all. FINDINGS: are in the line.", ""),
    ("FINDINGS:The lungs are clear.", "The lungs are clear."),
    (" FINDINGS: First.\n\n FINDINGS: Second.\n FINDINGS:\n IMPRESSION: Third.", "Second."),
    (" FINDINGS: Seen on PA: clear.\n As of 10:30 no change.\n FRONTAL AND LATERAL VIEWS (CHEST), ONE: other.",
     "Seen on PA: clear. As of 10:30 no change."),
], ids=["plain", "FINDING", "FIDINGS", "FINIDNGS", "with impression", "none", "empty", "inside", "no blank", "several", "colons"])
def test_findings(text, findings):
    assert findings_of(text) == findings


# ---- CheXpert --------------------------------------------------------------------------------------------------------

FIVE = "Atelectasis,Cardiomegaly,Consolidation,Edema,Pleural Effusion"


def make_chexpert(folder):
    rows = {"train": ("patient00001/study1/view1_frontal.jpg,Female,68,-1.0,-1.0,-1.0,-1.0,-1.0\n",
                      "patient00001/study2/view1_frontal.jpg,Female,69,,0.0,1.0,,\n",
                      "patient00002/study1/view2_lateral.jpg,Unknown,0,1,1,1,1,1\n",
                      "patient00003/study1/view1_frontal.jpg,Male,41,1.0,,,,\n"),
            "valid": ("patient64541/study1/view1_frontal.jpg,Male,73,0.0,1.0,0.0,0.0,0.0\n",)}
    for part, lines in rows.items():
        for line in lines:
            if "patient00003" not in line:
                write(folder, f"CheXpert-v1.0-small/{part}/{line.split(',')[0]}")
        table = "".join(f"CheXpert-v1.0/{part}/{line}" for line in lines)
        write(folder, f"CheXpert-v1.0-small/{part}.csv", f"Path,Sex,Age,{FIVE}\n{table}")
    return folder


def test_chexpert(tmp_path):
    subjects, split, notes = collected(make_chexpert(tmp_path), collect_chexpert)
    names = ["patient00001_study1_view1_frontal", "patient00001_study2_view1_frontal", "patient00002_study1_view2_lateral",
             "patient64541_study1_view1_frontal"]
    assert [subject.name for subject in subjects] == names
    assert [subject.person for subject in subjects] == ["patient00001", "patient00001", "patient00002", "patient64541"]
    assert [subject.meta["labels"] for subject in subjects] == [
        ["Atelectasis", "Edema", "Pleural Effusion"], ["Consolidation"], FIVE.split(","), ["Cardiomegaly"]]
    assert [(subject.meta.get("age"), subject.meta.get("sex")) for subject in subjects] == [
        (68, "F"), (69, "F"), (None, None), (73, "M")]
    assert subjects[0].files["xray"].parent.name == "study1" and subjects[1].files["xray"].parent.name == "study2"
    assert split == {"train": names[:3], "val": [], "test": names[3:]}
    assert notes == ["1 rows of train.csv and valid.csv have no picture here"]


def test_chexpert_with_another_label(tmp_path):
    folder = make_chexpert(tmp_path)
    write(folder, "CheXpert-v1.0-small/valid.csv", f"Path,Sex,Age,{FIVE}\nvalid/patient64541/study1/view1_frontal.jpg,M,7,2,0,0,0,0\n")
    refused(folder, collect_chexpert, r"valid\.csv: Atelectasis of .*view1_frontal\.jpg is '2'; 1, 0, -1 or nothing")


# ---- SIIM and RSNA ---------------------------------------------------------------------------------------------------

def make_siim(folder):
    for name in ("1.2.276.0.5", "1.2.276.0.6", "1.2.276.0.7"):
        write(folder, f"png/{name}.png")
    # The second title has a space in front, as in the file of Kaggle.
    write(folder, "train-rle.csv", "ImageId, EncodedPixels\n1.2.276.0.5, -1\n1.2.276.0.6, 2 3 4 1\n1.2.276.0.6, 1 1\n"
          "1.2.276.0.6, 1 1\n1.2.276.0.8, -1\n")
    return folder


def test_siim(tmp_path):
    subjects, split, notes = collected(make_siim(tmp_path), collect_siim)
    assert split is None and [subject.name for subject in subjects] == ["1.2.276.0.5", "1.2.276.0.6"]
    assert [subject.meta["labels"] for subject in subjects] == [[], ["Pneumothorax"]]
    assert [subject.meta["rle"] for subject in subjects] == [[], ["2 3 4 1", "1 1"]]
    assert subjects[1].files == {"xray": tmp_path / "png" / "1.2.276.0.6.png"}
    assert notes == ["1 rows of train-rle.csv have no picture here"]


def test_masks_of_siim():
    """Worked by hand for a picture of 3 rows and 4 columns: pixels 2, 3, 4 and 9 of the columns one after the other."""
    mask = rle_mask("2 3 4 1", 3, 4)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, [[0, 1, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]])
    assert rle_mask("0 12", 3, 4).all() and not rle_mask(" -1", 3, 4).any() and rle_mask("", 3, 4).shape == (3, 4)


@pytest.mark.parametrize(("text", "sentence"), [
    ("2 3 4", "is no pairs of whole numbers"), ("2 x", "is no pairs"), ("-2 3", "is no pairs"),
    ("0 13", "needs 13 pixels, the picture has 3 x 4"), ("12 1", "needs 13 pixels"),
])
def test_masks_that_are_refused(text, sentence):
    with pytest.raises(DataError, match=sentence):
        rle_mask(text, 3, 4)


RSNA = ("patientId,x,y,width,height,Target\n0004cfab,,,,,0\n00436515,264.0,152.0,213.0,379.0,1\n"
        "00436515,562.0,152.5,256.0,453.0,1\n00704310,,,,,0\n")


def test_rsna(tmp_path):
    for name in ("0004cfab", "00436515", "unknown"):
        write(tmp_path, f"stage_2_train_images/{name}.png")
    write(tmp_path, "stage_2_train_labels.csv", RSNA)
    subjects, split, notes = collected(tmp_path, collect_rsna)
    assert split is None and [subject.name for subject in subjects] == ["0004cfab", "00436515"]
    assert [subject.meta["labels"] for subject in subjects] == [[], ["Pneumonia"]]
    assert [subject.meta["boxes"] for subject in subjects] == [[], [(264, 152, 213, 379), (562, 152.5, 256, 453)]]
    assert notes == ["1 rows of stage_2_train_labels.csv have no picture here"]
    write(tmp_path, "stage_2_train_labels.csv", RSNA.replace("152.5", ""))
    refused(tmp_path, collect_rsna, "a box of 00436515 lacks one of x, y, width, height")


@pytest.mark.parametrize(("collect", "name", "table"), [(collect_rsna, "stage_2_train_labels.csv", RSNA),
                                                        (collect_siim, "train-rle.csv", "ImageId, EncodedPixels\n")],
                         ids=["rsna", "siim"])
def test_dicom_must_be_converted(tmp_path, collect, name, table):
    write(tmp_path, name, table)
    refused(tmp_path, collect, r"holds no \.png or \.jpg files beside its tables")
    write(tmp_path, "images/0004cfab.dcm")
    refused(tmp_path, collect, "holds DICOM files and no pictures; convert them to PNG, and keep their names")


# ---- What they share -------------------------------------------------------------------------------------------------

def test_two_pictures_with_one_name(tmp_path):
    paths = [write(tmp_path, name) for name in ("a/x.png", "b/x.jpg", "b/y.JPEG", "b/z.txt")]
    notes = []
    assert pictures_by_name(tmp_path, paths, notes) == {"x": paths[0], "y": paths[2]}
    assert notes == ["1 pictures have the name of another one and are not used: x.jpg"]


def test_tables(tmp_path):
    table = write(tmp_path, "t.csv", '\ufeff a , b\r\n1, "x, y" \r\n\r\n2\r\n3,4,5\r\n'.replace(', "', ',"'))
    assert list(read_table(table, ("b",))) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": ""}, {"a": "3", "b": "4"}]
    with pytest.raises(DataError, match=r"t\.csv: has no column c, only a, b; download"):
        list(read_table(table, ("a", "c")))
    with pytest.raises(DataError, match=r"gone\.csv: cannot be read"):
        list(read_table(tmp_path / "gone.csv", ()))
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress(b"a,b\n1,2\n" * 100, mtime=0)[:-9])
    with pytest.raises(DataError, match=r"cut\.csv\.gz: cannot be read"):
        list(read_table(cut, ("a",)))


def test_official_split_needs_both_parts():
    class Named:
        def __init__(self, name):
            self.name = name

    subjects = [Named(name) for name in "abcd"]
    notes = []
    assert official_split(subjects, {"a": "test", "b": "train", "c": "val", "x": "train"}, notes) == {
        "train": ["b"], "val": ["c"], "test": ["a"]}
    assert notes == ["1 subjects are in no part of the split and not used: d"]
    assert official_split(subjects, {"a": "test", "c": "val"}, []) is None
