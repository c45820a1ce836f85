"""One folder per subject with one NIfTI file per contrast: BraTS 2020, 2021 and 2023+ as downloaded, and any such tree.

They share one reader, because after the subject's own name is taken off a file name, the contrast is a whole word of
what remains; editions differ in the words only. A table beside the folders may say who the patients are.
"""

import re

from data.files import DataError
from data.layouts.words import Subject, few, positive, read_sheet, role_of

EDITIONS = (("BraTS 2020", r"BraTS20_(Training|Validation)_\d+"), ("BraTS 2021", r"BraTS2021_\d+"),
            ("BraTS 2023", r"BraTS-[A-Za-z]+-\d+-\d+"))                     # all of the brain
PATIENT_SHEETS = ("meta.csv", "patient_info.csv")
PATIENT_COLUMNS = ("PATIENT", "PATIENT_ID")
UNKNOWN = {"", "-", "none", "nan", "n/a", "na", "unknown"}


def collect_subjects(folder, images, notes):
    """Every folder with at least one recognised contrast is a subject -> (subjects sorted by name, ignored files)."""
    by_folder = {}
    for path in images:
        by_folder.setdefault(path.parent, []).append(path)
    subjects, places, ignored = [], {}, []
    for place, paths in sorted(by_folder.items()):
        name = place.name or place.resolve().name
        roles = {}
        for path in paths:
            roles.setdefault(role_of(path.name, name), []).append(path)
        ignored += roles.pop(None, [])
        segmentations = roles.pop("seg", [])
        if not roles:
            ignored += segmentations
            continue
        if min(len(same) for same in roles.values()) > 2:
            raise DataError(f"{place}: holds {len(next(iter(roles.values())))} files of each contrast; "
                            "put every subject into a folder of its own")
        if name in places:
            raise DataError(f"{folder}: subject {name} is there twice, in {places[name]} and {place}; "
                            "rename or remove one")
        places[name] = place
        for role, same in [*roles.items(), ("seg", segmentations)]:
            if len(same) > 1:
                notes.append(f"{name}: {len(same)} files for {role}, {same[0].name} is used, not "
                             + ", ".join(path.name for path in same[1:]))
        subjects.append(Subject(name, person_of(name), {role: same[0] for role, same in roles.items()},
                                segmentations[0] if segmentations else None))
    return sorted(subjects, key=lambda subject: subject.name), sorted(ignored)


def person_of(subject):
    """BraTS-GLI-00000-001 is a later visit of the person BraTS-GLI-00000; elsewhere a subject is a person."""
    visit = re.fullmatch(r"(BraTS-[A-Za-z]+-\d+)-\d+", subject)
    return visit.group(1) if visit else subject


def edition_of(subjects):
    for name, pattern in EDITIONS:
        if all(re.fullmatch(pattern, subject.name) for subject in subjects):
            for subject in subjects:
                subject.meta["body"] = "brain"
            return name
    return "one folder per subject"


def read_patients(folder, files, subjects, notes):
    """meta.csv or patient_info.csv beside the subjects' folders -> Subject.meta; what is unknown is left out.

    Columns: patient (or patient_id), and any of age, sex, scanner (or one per contrast: scanner_t2, scanner_ct) and body,
    the part of the body. A patient is a folder's name, or its last number where the sheet has numbers only.
    """
    sheets = [path for path in files if path.parent == folder and path.name.lower() in PATIENT_SHEETS]
    if not sheets:
        return
    rows, columns = read_sheet(sheets[0])
    patient = next((columns[name] for name in PATIENT_COLUMNS if name in columns), None)
    if patient is None:
        notes.append(f"{sheets[0].name}: has no column patient; age, sex and scanner stay unknown")
        return
    known, contradictory = {}, set()
    for row in rows:
        facts = {column.lower(): fact for column, name in columns.items() if (fact := _fact(column, row[name])) is not None}
        who = (row[patient] or "").strip()
        if who and known.setdefault(who, facts) != facts:
            contradictory.add(who)
    for who in sorted(contradictory):
        known[who] = {}
        notes.append(f"{sheets[0].name}: the rows of {who} contradict each other; its facts stay unknown")
    keys = {subject.name: subject.name for subject in subjects}
    last = {subject.person: re.search(r"(\d+)\D*$", subject.person) for subject in subjects}
    numbers = {person: int(found[1]) for person, found in last.items() if found}
    if all(who.isdecimal() for who in known) and len(set(numbers.values())) == len(last):       # not two patients 1
        known = {int(who): facts for who, facts in known.items()}
        keys = {subject.name: numbers[subject.person] for subject in subjects}
    absent = [subject.name for subject in subjects if keys[subject.name] not in known]
    if absent:
        notes.append(f"{len(absent)} subjects have no row in {sheets[0].name}: {few(absent)}")
    for subject in subjects:
        subject.meta.update(known.get(keys[subject.name], {}))


def _fact(column, cell):
    """What a cell of a patients' sheet says: age in years, "M" or "F", or words; None if it is unknown."""
    cell = (cell or "").strip()
    if column == "AGE":
        return positive(cell)
    if column == "SEX":
        return {"m": "M", "male": "M", "f": "F", "female": "F"}.get(cell.lower())
    return cell if column.startswith(("SCANNER", "BODY")) and cell.lower() not in UNKNOWN else None
