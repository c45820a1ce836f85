"""What sheets beside the scans say of the subjects: who they are, their class, the unit of a PET.

    meta.csv        patient,age,sex,scanner,body    read_patients
    labels.csv      subject,label                   read_labels; a label is 0 or 1
    suv.csv         subject,factor                  read_suv_factors; PET times factor is SUV
"""

import math
import re

from data.files import DataError
from data.layouts.words import few, positive, read_sheet

PATIENT_SHEETS = ("meta.csv", "patient_info.csv")
PATIENT_COLUMNS = ("PATIENT", "PATIENT_ID")
UNKNOWN = {"", "-", "none", "nan", "n/a", "na", "unknown"}


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
    return name.lower().replace("_", "-")


# ---- Patients ------------------------------------------------------------------------------------

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
