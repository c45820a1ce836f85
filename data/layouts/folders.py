"""One folder per subject with one NIfTI file per contrast.

BraTS 2020, 2021 and 2023+ have this layout as downloaded, and so have many other data sets. One
reader serves them all. It takes the subject's own name off a file name, and the contrast is a whole
word of what remains. A sheet beside the folders may say who the patients are.
"""

import re

from data.files import DataError
from data.layouts.words import Subject, few, positive, read_sheet, role_of

# Name of the edition, and the pattern of its subjects' names. All show the brain.
EDITIONS = (("BraTS 2020", r"BraTS20_(Training|Validation)_\d+"),
            ("BraTS 2021", r"BraTS2021_\d+"),
            ("BraTS 2023", r"BraTS-[A-Za-z]+-\d+-\d+"))
PATIENT_SHEETS = ("meta.csv", "patient_info.csv")
PATIENT_COLUMNS = ("PATIENT", "PATIENT_ID")
UNKNOWN = {"", "-", "none", "nan", "n/a", "na", "unknown"}


def collect_subjects(folder, images, notes):
    """Take every folder with at least one contrast as a subject -> (subjects, ignored files).

    Subjects are sorted by name.

    images: The paths of all NIfTI files.
    notes: A list that gets sentences for the user.
    DataError if two folders have one name, or if all subjects seem to lie in one folder.
    """
    by_folder = {}
    for path in images:
        by_folder.setdefault(path.parent, []).append(path)
    subjects = []
    places = {}
    ignored = []
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
            count = len(next(iter(roles.values())))
            raise DataError(f"{place}: holds {count} files of each contrast; "
                            "put every subject into a folder of its own")
        if name in places:
            raise DataError(f"{folder}: subject {name} is there twice, in {places[name]} and "
                            f"{place}; rename or remove one")
        places[name] = place
        for role, same in [*roles.items(), ("seg", segmentations)]:
            if len(same) > 1:
                others = ", ".join(path.name for path in same[1:])
                notes.append(f"{name}: {len(same)} files for {role}, {same[0].name} is used, "
                             f"not {others}")
        files = {role: same[0] for role, same in roles.items()}
        segmentation = segmentations[0] if segmentations else None
        subjects.append(Subject(name, person_of(name), files, segmentation))
    return sorted(subjects, key=lambda subject: subject.name), sorted(ignored)


def person_of(subject):
    """The person behind a subject's name.

    BraTS-GLI-00000-001 is a later visit of the person BraTS-GLI-00000. In all other sets, every
    subject is another person.
    """
    visit = re.fullmatch(r"(BraTS-[A-Za-z]+-\d+)-\d+", subject)
    return visit.group(1) if visit else subject


def edition_of(subjects):
    """The name of the data set. For BraTS, the part of the body is written into Subject.meta."""
    for name, pattern in EDITIONS:
        if all(re.fullmatch(pattern, subject.name) for subject in subjects):
            for subject in subjects:
                subject.meta["body"] = "brain"
            return name
    return "one folder per subject"


def read_patients(folder, files, subjects, notes):
    """Write what a sheet says of the patients into Subject.meta; unknown facts are left out.

    The sheet is meta.csv or patient_info.csv in `folder`. It has a column patient (or patient_id)
    and any of these: age, sex, scanner, body. The body is the part of the body. If the contrasts
    have different scanners, the columns are called scanner_t2, scanner_ct and so on.

    notes: A list that gets sentences for the user.
    """
    sheets = [path for path in files
              if path.parent == folder and path.name.lower() in PATIENT_SHEETS]
    if not sheets:
        return
    sheet = sheets[0]
    rows, columns = read_sheet(sheet)
    patient = next((columns[name] for name in PATIENT_COLUMNS if name in columns), None)
    if patient is None:
        notes.append(f"{sheet.name}: has no column patient; age, sex and scanner stay unknown")
        return
    known = {}
    contradictory = set()
    for row in rows:
        facts = {}
        for column, name in columns.items():
            fact = _fact(column, row[name])
            if fact is not None:
                facts[column.lower()] = fact
        who = (row[patient] or "").strip()
        if who and known.setdefault(who, facts) != facts:
            contradictory.add(who)
    for who in sorted(contradictory):
        known[who] = {}
        notes.append(f"{sheet.name}: the rows of {who} contradict each other; "
                     "its facts stay unknown")
    known, keys = _matched(known, subjects)
    absent = [subject.name for subject in subjects if keys[subject.name] not in known]
    if absent:
        notes.append(f"{len(absent)} subjects have no row in {sheet.name}: {few(absent)}")
    for subject in subjects:
        subject.meta.update(known.get(keys[subject.name], {}))


def _matched(known, subjects):
    """Match the rows of a sheet with the subjects -> (known, {subject's name: its key in known}).

    A row names a patient by the name of the folder. If the sheet has only numbers, a row names the
    patient by the last number in the folder's name.
    """
    last = {}
    for subject in subjects:
        last[subject.person] = re.search(r"(\d+)\D*$", subject.person)
    numbers = {person: int(found[1]) for person, found in last.items() if found}
    unique = len(set(numbers.values())) == len(last)            # there are no two patients 1
    if unique and all(who.isdecimal() for who in known):
        by_number = {int(who): facts for who, facts in known.items()}
        return by_number, {subject.name: numbers[subject.person] for subject in subjects}
    return known, {subject.name: subject.name for subject in subjects}


def _fact(column, cell):
    """What a cell says: the age in years, "M" or "F", or words. None if it is unknown."""
    cell = (cell or "").strip()
    if column == "AGE":
        return positive(cell)
    if column == "SEX":
        return {"m": "M", "male": "M", "f": "F", "female": "F"}.get(cell.lower())
    if column.startswith(("SCANNER", "BODY")) and cell.lower() not in UNKNOWN:
        return cell
    return None
