"""ChestX-ray14 (nihcc.app.box.com/v/ChestXray-NIHCC): frontal X-rays, and a table of findings.

    images_001/images/00000001_000.png      or all pictures in one folder images/
    Data_Entry_2017.csv                     or Data_Entry_2017_v2020.csv, which corrects ages
    train_val_list.txt  test_list.txt       the names of the pictures of each part

The first 8 characters of a name are the patient. There are no reports. We write one sentence for
each picture from its row in the table.
"""

import re

from data.layouts.records import OLDEST, age_of, sex_of
from data.layouts.words import TEXT, Subject, few, read_text
from data.layouts.xrays import official_split, pictures_by_name, read_table

ENTRY_FILE = re.compile(r"Data_Entry_2017(_v2020)?\.csv", re.IGNORECASE)
COLUMNS = ("Image Index", "Finding Labels", "Patient Age", "View Position")
LISTS = {"train_val_list.txt": "train", "test_list.txt": "test"}
NO_FINDING = "No Finding"
PEOPLE = {"M": "man", "F": "woman"}


def is_chestxray14(folder, files):
    """True if a file has the name of the table."""
    return any(ENTRY_FILE.fullmatch(path.name) for path in files)


def collect_chestxray14(folder, files, notes):
    """Read ChestX-ray14 -> (subjects sorted by name, split).

    A subject is one picture. Its meta holds the list "labels", which is empty if nothing was found,
    and age and sex if they are known.

    split: {"train": [names], "val": [], "test": [names]}; see official_split. It is None if the
        lists are not there. The official train_val_list.txt is "train".
    DataError if the table has other columns, or if there is no picture.
    """
    tables = [path for path in files if ENTRY_FILE.fullmatch(path.name)]
    table = max(tables, key=lambda path: len(path.name))            # v2020 has the longer name
    pictures = pictures_by_name(folder, files, notes)
    subjects = []
    rows_without_picture = 0
    odd_ages = []
    for row in read_table(table, COLUMNS):
        name = row["Image Index"].rsplit(".", 1)[0]
        if name not in pictures:
            rows_without_picture += 1
            continue
        meta = {"body": "chest", "labels": _labels_of(row["Finding Labels"])}
        age = age_of(row["Patient Age"])
        sex = sex_of(row.get("Patient Gender") or row.get("Patient Sex"))
        if age is None and row["Patient Age"].strip():
            odd_ages.append(name)
        if age is not None:
            meta["age"] = age
        if sex is not None:
            meta["sex"] = sex
        report = report_of(meta["labels"], row["View Position"], age, sex)
        subjects.append(Subject(name, name[:8], {"xray": pictures.pop(name), TEXT: table},
                                meta=meta, report=report))
    if rows_without_picture:
        notes.append(f"{table.name}: {rows_without_picture} rows have no picture here")
    if pictures:
        notes.append(f"{len(pictures)} pictures have no row in {table.name} and are not used: "
                     f"{few(sorted(pictures))}")
    if odd_ages:                        # the first edition of the table has ages such as 414
        notes.append(f"{len(odd_ages)} ages are above {OLDEST} years and count as unknown: "
                     f"{few(odd_ages)}")
    subjects.sort(key=lambda subject: subject.name)
    return subjects, _read_lists(files, subjects, notes)


def report_of(labels, view, age, sex):
    """The sentence about one picture, for example

    "a frontal chest x-ray , pa view , 58 year old man . findings : cardiomegaly , emphysema ."

    labels: As in the table; an empty list gives "no finding". view: "PA", "AP" or "".
    age: In years. sex: "M" or "F". Both may be None, and are left out then.
    """
    parts = ["a frontal chest x-ray"]
    if view:
        parts.append(f"{view.lower()} view")
    person = PEOPLE.get(sex)
    if age is not None:
        parts.append(f"{int(age)} year old {person or 'patient'}")
    elif person:
        parts.append(person)
    findings = "no finding"
    if labels:
        words = [label.replace("_", " ").lower() for label in labels]
        findings = f"findings : {' , '.join(words)}"
    return f"{' , '.join(parts)} . {findings} ."


def _labels_of(cell):
    """The findings in a cell such as "Edema|Mass", as a list."""
    labels = [label.strip() for label in cell.split("|")]
    return [label for label in labels if label and label != NO_FINDING]


def _read_lists(files, subjects, notes):
    """The official split from its two lists, or None if one of them is not there."""
    lists = {path.name: path for path in files if path.name in LISTS}
    if set(lists) != set(LISTS):
        notes.append(f"{' and '.join(LISTS)} are not both there, so the official split is not used")
        return None
    part_of = {}
    for file_name, part in LISTS.items():
        for line in read_text(lists[file_name]).split():
            part_of[line.rsplit(".", 1)[0]] = part
    return official_split(subjects, part_of, notes)
