"""What sheets beside the scans say of the subjects: who they are, their class, the unit of a PET.

    meta.csv        patient,person,age,sex,scanner,body     read_patients
    labels.csv      subject,label                   read_labels; a label is 0 or 1
    suv.csv         subject,factor                  read_suv_factors; PET times factor is SUV
"""

import math
import re
import unicodedata

from data.files import DataError
from data.layouts.records import age_of, sex_of
from data.layouts.words import UNKNOWN, few, read_sheet

PATIENT_SHEETS = ("meta.csv", "patient_info.csv")
# Columns -> the fact that they tell.
FACTS = {"AGE": "age", "SEX": "sex", "GENDER": "sex"}
# The columns that may name the subjects. If several are there, one of the first names the persons.
PERSON_COLUMNS = ("PERSON", "PATIENT", "PATIENT_ID", "PARTICIPANT_ID", "SUBJECT_ID", "SUBJECT",
                  "PID")
SCAN_COLUMNS = ("SCAN", "SCAN_ID", "SESSION_ID", "CASE", "CASE_ID", "FOLDER")


# ---- Labels and units ----------------------------------------------------------------------------

def read_labels(folder, files, subjects, notes):
    """Write the class of each subject, 0 or 1, from labels.csv into Subject.meta["label"].

    A subject without a row, or with an unknown label, gets none.

    files: All files of the data set; the sheet lies in `folder`.
    notes: A list that gets sentences for the user.
    DataError if a column is missing, if a label is neither 0 nor 1, or if two rows contradict each
    other.
    """
    found = _read_column("labels.csv", "label", folder, files, subjects, notes, _label)
    for subject in subjects:
        if subject.name in found:
            subject.meta["label"] = found[subject.name]


def read_suv_factors(folder, files, subjects, notes):
    """Write the factor from raw PET to SUV from suv.csv into Subject.suv_factor.

    NIfTI has no field for the dose and the weight, so a raw PET in Bq/ml cannot be turned into SUV
    without such a factor. For the usual SUV it is the weight in g divided by the dose in Bq at the
    time of the scan. The PET of a subject without a row is taken as SUV.

    files: All files of the data set; the sheet lies in `folder`.
    notes: A list that gets sentences for the user.
    DataError if a column is missing, if a factor is no positive number, or if two rows contradict
    each other.
    """
    found = _read_column("suv.csv", "factor", folder, files, subjects, notes, _factor)
    for subject in subjects:
        subject.suv_factor = found.get(subject.name)
    if found:
        notes.append(f"suv.csv: the PET of {len(found)} subjects is multiplied by its factor, "
                     "which gives SUV")


def _label(cell):
    """0 or 1, or None for any other text."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return int(value) if value in (0, 1) else None


def _factor(cell):
    """A positive number with a decimal point or comma, or None for any other text."""
    try:
        value = float(cell.replace(",", "."))
    except ValueError:
        return None
    return value if 0 < value < math.inf else None


MEANINGS = {"label": "0 or 1", "factor": "a positive number"}


def _read_column(name, column, folder, files, subjects, notes, understand):
    """Read a sheet with the columns subject and `column` -> {name of a subject: value}.

    understand: A function from the text of a cell to its value; None means that it makes no sense.
    """
    sheet = next((path for path in files
                  if path.parent == folder and path.name.lower() == name), None)
    if sheet is None:
        return {}
    rows, columns = read_sheet(sheet)
    for wanted in ("subject", column):
        if wanted.upper() not in columns:
            raise DataError(f"{sheet}: has no column {wanted}; its first line must be "
                            f"subject,{column}, correct or rename the sheet")
    values = {}                         # plain name -> value
    for row in rows:
        who = (row[columns["SUBJECT"]] or "").strip()
        cell = (row[columns[column.upper()]] or "").strip()
        if not who or cell.lower() in UNKNOWN:
            continue
        value = understand(cell)
        if value is None:
            raise DataError(f"{sheet}, line {rows.line_num}: the {column} of {who} is {cell!r}; "
                            f"write {MEANINGS[column]}, or leave the cell empty if it is unknown")
        if values.setdefault(_plain(who), value) != value:
            raise DataError(f"{sheet}, line {rows.line_num}: {who} has another {column} in an "
                            "earlier line; remove one of them")
    found = {}
    absent = []
    used = set()
    for subject in subjects:
        key = _plain(subject.name)
        if key not in values:
            key = _plain(subject.person)
        if key in values:
            found[subject.name] = values[key]
            used.add(key)
        else:
            absent.append(subject.name)
    if absent:
        notes.append(f"{sheet.name}: {len(absent)} subjects have no {column}: {few(absent)}")
    unknown = sorted(set(values) - used)
    if unknown:
        notes.append(f"{sheet.name}: {len(unknown)} rows are of no subject here: {few(unknown)}")
    return found


def _plain(name):
    """A name without the differences that sheets and folders often have: CHUM_001 -> chum-001."""
    return unicodedata.normalize("NFC", name).lower().replace("_", "-").replace("/", "-")


# ---- Patients ------------------------------------------------------------------------------------

def read_patients(folder, files, subjects, notes):
    """Write what a sheet says of the patients into Subject.meta; unknown facts are left out.

    The sheet is meta.csv or patient_info.csv in `folder`. It has a column patient (or another one
    of PERSON_COLUMNS and SCAN_COLUMNS) and any of these: person, age, sex, scanner, body. The body
    is the part of the body. If the contrasts have different scanners, the columns are called
    scanner_t2, scanner_ct and so on. A person is written into Subject.person, see _read_persons.

    notes: A list that gets sentences for the user.
    """
    sheets = [path for path in files
              if path.parent == folder and path.name.lower() in PATIENT_SHEETS]
    if not sheets:
        return
    sheet = sheets[0]
    try:
        rows, columns = read_sheet(sheet)
    except DataError as error:
        notes.append(f"{error}; until then persons, age, sex and scanner stay unknown")
        return
    rows = list(rows)
    own = {_plain(subject.name) for subject in subjects}
    named = {}                          # column that may name the subjects -> number that it names
    for column in PERSON_COLUMNS[1:] + SCAN_COLUMNS:
        if column in columns:
            cells = {_plain(row[columns[column]] or "") for row in rows}
            named[column] = len(own & cells)
    if not named:
        notes.append(f"{sheet.name}: has no column patient; age, sex and scanner stay unknown")
        return
    key = max(named, key=named.get)     # the first one of equals
    patient = columns[key]
    for column in PERSON_COLUMNS:
        if column in columns and column != key:
            _read_persons(sheet, rows, patient, columns[column], subjects, notes)
            break
    known = {}
    contradictory = set()
    odd = {}                            # title of a column -> cells that make no sense
    torn = []
    for row in rows:
        who = (row[patient] or "").strip()
        facts = {}
        for column, title in columns.items():
            cell = (row[title] or "").strip()
            fact = _fact(column, title, cell)
            if fact is not None:
                facts[FACTS.get(column, column.lower())] = fact
            elif column in FACTS and cell.lower() not in UNKNOWN:
                odd.setdefault(title, []).append(repr(cell))
        if any(row.get(None, ())) or "\n" in " ".join([who, *map(str, facts.values())]):
            torn.append(repr(who[:20]))
            continue
        if who and known.setdefault(who, facts) != facts:
            contradictory.add(who)
    for title, cells in odd.items():
        notes.append(f"{sheet.name}: {len(cells)} cells of {title} are not understood and count as "
                     f"unknown: {few(cells)}")
    if torn:
        notes.append(f"{sheet.name}: {len(torn)} rows have a comma or a quote too many and are not "
                     f"read: {few(torn)}")
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


def _read_persons(sheet, rows, key, title, subjects, notes):
    """Write the persons of a sheet into Subject.person, where it knows them.

    A column where no two subjects share a person is only another number of theirs, and tells
    nothing, unless it is called person.

    key: The title of the column that names the subjects. title: Of the column of persons.
    """
    person_of = {}
    for row in rows:
        person = (row[title] or "").strip()
        if person.lower() not in UNKNOWN:
            person_of[_plain((row[key] or "").strip())] = person
    told = [subject for subject in subjects if _plain(subject.name) in person_of]
    people = {person_of[_plain(subject.name)] for subject in told}
    if not told or (len(people) == len(told) and title.strip().lower() != "person"):
        return
    for subject in told:
        subject.person = person_of[_plain(subject.name)]
    notes.append(f"{sheet.name}: the column {title} tells the persons of {len(told)} of "
                 f"{len(subjects)} scans: {len(people)} persons")


def _matched(known, subjects):
    """Match the rows of a sheet with the subjects -> (known, {subject's name: its key in known}).

    A row names a patient by the name of the folder, or of the person. If the sheet has only
    numbers, a row names the patient by the last number in the folder's name.
    """
    last = {}
    for subject in subjects:
        last[subject.person] = re.search(r"(\d+)\D*$", subject.person)
    numbers = {person: int(found[1]) for person, found in last.items() if found}
    unique = len(set(numbers.values())) == len(last)            # there are no two patients 1
    if unique and all(who.isdecimal() for who in known):
        by_number = {int(who): facts for who, facts in known.items()}
        return by_number, {subject.name: numbers[subject.person] for subject in subjects}
    plain = {_plain(who): who for who in known}
    keys = {}
    for subject in subjects:
        of_person = plain.get(_plain(subject.person), subject.name)
        keys[subject.name] = plain.get(_plain(subject.name), of_person)
    return known, keys


def _fact(column, title, cell):
    """What a cell says: the age in years, the sex, or words. None if it is unknown.

    Numbers for the sex mean something only if the title says what, as in "SEX (1=m, 2=f)".
    """
    if FACTS.get(column) == "age":
        return age_of(cell) or None     # 0 stands for an age that is not known
    if FACTS.get(column) == "sex":
        codes = dict(re.findall(r"(\d)\s*[=:]\s*([A-Za-z]+)", title))
        return sex_of(codes.get(cell, cell))
    if column.startswith(("SCANNER", "BODY")) and cell.lower() not in UNKNOWN:
        return cell
    return None
