"""IU X-ray, also called OpenI (openi.nlm.nih.gov): X-rays of the chest with reports in XML.

    NLMCXR_png/CXR1_1_IM-0001-3001.png
    ecgen-radiology/1.xml               a report, which names its pictures

A report names usually a frontal and a lateral picture. Which is which is not reliable, so a subject
has all of them. Names were removed from the reports. XXXX stands in their place, and stays there.
"""

import xml.etree.ElementTree as ET

from data.files import DataError
from data.layouts.words import TEXT, Subject
from data.layouts.xrays import pictures_by_name

REPORT_FOLDER = "ecgen-radiology"


def is_openi(folder, files):
    """True if a .xml file lies in the folder of the reports."""
    return any(_is_report(path) for path in files)


def collect_openi(folder, files, notes):
    """Read IU X-ray -> (subjects sorted by name, None). There is no official split.

    A subject is one report with its pictures. It is dropped if there are no findings in it, or if
    none of its pictures is there. The patients are not known, so each report counts as a person.

    DataError if a report is no XML, if two reports have one name, or if there is no picture.
    """
    pictures = pictures_by_name(folder, files, notes)
    subjects = {}
    without_findings = 0
    without_pictures = 0
    missing = 0
    for path in files:
        if not _is_report(path):
            continue
        name, findings, stems = _read_report(path)
        if not findings:
            without_findings += 1
            continue
        views = tuple(pictures[stem] for stem in stems if stem in pictures)
        if not views:
            without_pictures += 1
            continue
        missing += len(stems) - len(views)
        if name in subjects:
            raise DataError(f"{path}: is the report {name}, as is {subjects[name].files[TEXT]}; "
                            "remove one of them")
        files_of_subject = {"xray": views if len(views) > 1 else views[0], TEXT: path}
        subjects[name] = Subject(name, name, files_of_subject, meta={"body": "chest"},
                                 report=findings)
    if without_findings:
        notes.append(f"{without_findings} reports have no findings and are not used")
    if without_pictures:
        notes.append(f"{without_pictures} reports have no picture here and are not used")
    if missing:
        notes.append(f"{missing} pictures of the other reports are not here")
    return [subjects[name] for name in sorted(subjects)], None


def _is_report(path):
    return path.suffix.lower() == ".xml" and path.parent.name == REPORT_FOLDER


def _read_report(path):
    """Read one report -> (its name, the findings or "", names of its pictures without ending)."""
    try:
        root = ET.parse(path).getroot()
    except (OSError, ET.ParseError) as error:
        raise DataError(f"{path}: cannot be read as XML ({error}); download it again") from None
    identity = root.find(".//uId")
    name = path.stem if identity is None else identity.get("id", path.stem)
    findings = []
    for section in root.iter("AbstractText"):
        if section.get("Label", "").upper() == "FINDINGS":
            findings += "".join(section.itertext()).split()
    stems = [image.get("id") for image in root.iter("parentImage")]
    return name, " ".join(findings), list(dict.fromkeys(stems))
