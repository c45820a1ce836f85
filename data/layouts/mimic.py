"""MIMIC-CXR-JPG (physionet.org/content/mimic-cxr-jpg), with the reports of MIMIC-CXR.

    files/p10/p10000032/s50414267/02aa804e-bde0afdd-112c0b34-7bc16630-4e384014.jpg
    files/p10/p10000032/s50414267.txt           a report; they are a download of their own
    mimic-cxr-2.0.0-split.csv.gz                train, validate or test
    mimic-cxr-2.0.0-metadata.csv.gz             the view of each picture

p10000032 is a patient and s50414267 a study. A study has one report and one or more pictures.
"""

import re

from data.files import DataError, is_picture
from data.layouts.people import part_of_word
from data.layouts.words import TEXT, Subject, read_text
from data.layouts.xrays import official_split, read_table

STUDY_FOLDER = re.compile(r"s\d{8}")
PATIENT_FOLDER = re.compile(r"p\d{8}")
TABLE_FILE = re.compile(r"mimic-cxr-[\d.]+-(split|metadata)\.csv(\.gz)?", re.IGNORECASE)
FRONTAL = ("PA", "AP")
# A line that begins with words in capitals and a colon begins a section.
HEADING = re.compile(r"^[ \t]*([A-Z][A-Z /(),-]*):", re.MULTILINE)
# The heading of the findings, and the ways in which it was mistyped.
FINDINGS = {"FINDINGS", "FINDING", "FINDINS", "FIDINGS", "FINDNGS", "FINIDNGS", "FINDIGNS",
            "FINDGINGS", "FINDNINGS", "FINDINDGS"}


def is_mimic(folder, files):
    """True if a picture lies in the folder of a study, which lies in that of a patient."""
    return any(is_picture(path) and _is_study(path.parent) for path in files)


def collect_mimic(folder, files, notes):
    """Read MIMIC-CXR -> (subjects sorted by name, split).

    A subject is a study. It has all frontal pictures of the study, and the findings of the report.
    A study without findings or without frontal pictures is dropped.

    split: {"train": [names], "val": [names], "test": [names]}; see official_split. It is None if
        its table is not there.
    DataError if a table has other columns, if the split has an unknown part, or if there is no
    report.
    """
    tables = {}
    reports = {}                        # name of a study -> path
    studies = {}                        # name of a study -> paths of its pictures
    for path in files:
        table = TABLE_FILE.fullmatch(path.name)
        if table:
            tables.setdefault(table[1].lower(), path)
        elif is_picture(path) and _is_study(path.parent):
            studies.setdefault(path.parent.name, []).append(path)
        elif path.suffix == ".txt" and _is_study(path.with_suffix("")):
            reports.setdefault(path.stem, path)
    if not reports:
        raise DataError(f"{folder}: has no reports such as files/p10/p10000032/s50414267.txt; "
                        "they are in mimic-cxr-reports.zip of MIMIC-CXR, unpack it there")
    views = _views_of(tables.get("metadata"), notes)
    subjects = []
    dropped = {"no frontal picture": 0, "no report": 0, "no findings in the report": 0}
    for name in sorted(studies):
        frontal = studies[name]
        if views is not None:
            frontal = [path for path in frontal if views.get(path.stem) in FRONTAL]
        if not frontal:
            dropped["no frontal picture"] += 1
            continue
        if name not in reports:
            dropped["no report"] += 1
            continue
        findings = findings_of(read_text(reports[name]))
        if not findings:
            dropped["no findings in the report"] += 1
            continue
        pictures = tuple(frontal) if len(frontal) > 1 else frontal[0]
        person = frontal[0].parent.parent.name
        subjects.append(Subject(name, person, {"xray": pictures, TEXT: reports[name]},
                                meta={"body": "chest"}, report=findings))
    for why, count in dropped.items():
        if count:
            notes.append(f"{count} studies have {why} and are not used")
    return subjects, _read_split(tables.get("split"), subjects, notes)


def findings_of(text):
    """The findings in a report in one line, or "" if it has none.

    If there are several sections of findings, the last one that is not empty counts. A section
    "FINDINGS AND IMPRESSION" does not count, because it also holds conclusions.
    """
    findings = ""
    headings = list(HEADING.finditer(text))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    for heading, end in zip(headings, ends):
        if heading[1].strip() in FINDINGS:
            section = " ".join(text[heading.end():end].split())
            findings = section or findings
    return findings


def _is_study(place):
    """True for .../p10000032/s50414267."""
    named = STUDY_FOLDER.fullmatch(place.name) and PATIENT_FOLDER.fullmatch(place.parent.name)
    return named is not None


def _views_of(table, notes):
    """The view of each picture -> {name of the file without ending: "PA", ...}, or None."""
    if table is None:
        notes.append("mimic-cxr-2.0.0-metadata.csv.gz is not there, so the views are not known "
                     "and all pictures are used")
        return None
    views = {}
    for row in read_table(table, ("dicom_id", "ViewPosition")):
        views[row["dicom_id"]] = row["ViewPosition"]
    return views


def _read_split(table, subjects, notes):
    """The official split, or None if its table is not there."""
    if table is None:
        notes.append("mimic-cxr-2.0.0-split.csv.gz is not there, so the official split is not used")
        return None
    part_of = {}
    for row in read_table(table, ("study_id", "split")):
        part = part_of_word(row["split"])
        if part is None:
            raise DataError(f"{table}: the split of study {row['study_id']} is {row['split']!r}, "
                            "none of train, validate, test; download the table again")
        part_of[f"s{row['study_id']}"] = part
    return official_split(subjects, part_of, notes)
