"""What sheets beside the scans say of the subjects: who they are, their class, the unit of a PET.

    meta.csv        patient,person,age,sex,scanner,body     read_patients
    labels.csv      subject,label                   read_labels; a label is 0 or 1
    suv.csv         subject,factor                  read_suv_factors; PET times factor is SUV
"""

import re
import unicodedata

from data.files import DataError
from data.layouts.records import age_of, number_of, sex_of
from data.layouts.words import UNKNOWN, few, read_sheet

PATIENT_SHEETS = ("meta.csv", "patient_info.csv", "participants.tsv")
# Columns -> the fact that they tell.
FACTS = {"AGE": "age", "SEX": "sex", "GENDER": "sex", "SEX_ID": "sex"}
# The columns that may name the subjects. If several are there, one of the first names the persons.
PERSON_COLUMNS = ("PERSON", "PERSON_ID", "PERSONID", "PATIENT", "PATIENT_ID", "PATIENTID",
                  "PARTICIPANT_ID", "PARTICIPANTID", "SUBJECT_ID", "SUBJECTID", "SUBJECT", "PID")
SCAN_COLUMNS = ("SCAN", "SCAN_ID", "SCANID", "SESSION_ID", "CASE", "CASE_ID", "CASEID", "FOLDER")


# ---- Labels and units ----------------------------------------------------------------------------

def read_labels(folder, files, subjects, notes):
    """Write the class of each subject, 0 or 1, from labels.csv into Subject.meta["label"].

    A subject without a row, or with an unknown label, gets none.

    DataError if a column is missing, if a label is neither 0 nor 1, or if two rows contradict each
    other.
    """
    found = _read_column("labels.csv", "label", "0 or 1", _label, folder, files, subjects, notes)
    for subject in subjects:
        if subject.name in found:
            subject.meta["label"] = found[subject.name]


def read_suv_factors(folder, files, subjects, notes):
    """Write the factor from raw PET to SUV from suv.csv into Subject.suv_factor.

    NIfTI has no field for the dose and the weight, so a raw PET in Bq/ml cannot be turned into SUV
    without such a factor. For the usual SUV it is the weight in g divided by the dose in Bq at the
    time of the scan. The PET of a subject without a row is taken as SUV.

    DataError if a column is missing, if a factor is no positive number, or if two rows contradict
    each other.
    """
    found = _read_column("suv.csv", "factor", "a positive number", _factor, folder, files, subjects,
                         notes)
    for subject in subjects:
        subject.suv_factor = found.get(subject.name)
    if found:
        notes.append(f"suv.csv: the PET of {len(found)} subjects is multiplied by its factor, "
                     "which gives SUV")


def _label(cell):
    """0 or 1, or None for any other text."""
    number = number_of(cell)
    return int(number) if number in (0, 1) else None


def _factor(cell):
    """A positive number with a decimal point or comma, or None for any other text."""
    number = number_of(cell)
    return number if number and number > 0 else None


def _read_column(name, column, wanted, understand, folder, files, subjects, notes):
    """Read a sheet with the columns subject and `column` -> {name of a subject: value}.

    wanted: What a cell must hold, in words. understand: A function from the text of a cell to its
        value; None means that it makes no sense.
    """
    sheet = _sheet_of(folder, files, (name,))
    if sheet is None:
        return {}
    rows, columns = read_sheet(sheet)
    for title in ("subject", column):
        if title.upper() not in columns:
            raise DataError(f"{sheet}: has no column {title}; its first line must be "
                            f"subject,{column}, correct or rename the sheet")
    values = {}                         # plain name -> value
    for row in rows:
        who = row[columns["SUBJECT"]].strip()
        cell = row[columns[column.upper()]].strip()
        if not who or cell.lower() in UNKNOWN:
            continue
        value = understand(cell)
        if value is None:
            raise DataError(f"{sheet}, line {rows.line_num}: the {column} of {who} is {cell!r}; "
                            f"write {wanted}, or leave the cell empty if it is unknown")
        if values.setdefault(_plain(who), value) != value:
            raise DataError(f"{sheet}, line {rows.line_num}: {who} has another {column} in an "
                            "earlier line; remove one of them")
    keys = _matched(values, subjects)
    absent = [subject.name for subject in subjects if subject.name not in keys]
    if absent:
        notes.append(f"{sheet.name}: {len(absent)} subjects have no {column}: {few(absent)}")
    unknown = sorted(set(values) - set(keys.values()))
    if unknown:
        notes.append(f"{sheet.name}: {len(unknown)} rows are of no subject here: {few(unknown)}")
    return {subject: values[key] for subject, key in keys.items()}


def _sheet_of(folder, files, names):
    """The first of the files that lies in the folder itself and has one of the names, or None."""
    for path in files:
        if path.parent == folder and path.name.lower() in names:
            return path
    return None


def _matched(known, subjects):
    """Match the rows of a sheet with the subjects -> {name of a subject: its key in known}.

    A row names a subject, or a person. If a sheet has only numbers, a row also names the person by
    the last number in the person's name. A subject without a row is left out.
    """
    plain = {_plain(who): who for who in known}
    numbers = {}                        # person -> its last number
    for subject in subjects:
        found = re.search(r"(\d+)\D*$", subject.person)
        numbers[subject.person] = int(found[1]) if found else None
    by_number = {}
    unique = len(set(numbers.values())) == len(numbers)         # there are no two patients 1
    if unique and all(who.isdecimal() for who in known):
        by_number = {int(who): who for who in known}
    keys = {}
    for subject in subjects:
        key = plain.get(_plain(subject.name)) or plain.get(_plain(subject.person))
        key = key or by_number.get(numbers[subject.person])
        if key is not None:
            keys[subject.name] = key
    return keys


def _plain(name):
    """A name without the differences that sheets and folders often have: CHUM_001 -> chum-001."""
    return unicodedata.normalize("NFC", name).lower().replace("_", "-").replace("/", "-")


# ---- Patients ------------------------------------------------------------------------------------

def read_patients(folder, files, subjects, notes):
    """Write what a sheet says of the patients into Subject.meta; unknown facts are left out.

    The sheet is one of PATIENT_SHEETS in `folder`. It has a column patient (or another one
    of PERSON_COLUMNS and SCAN_COLUMNS) and any of these: person, age, sex, scanner, body. The body
    is the part of the body. If the contrasts have different scanners, the columns are called
    scanner_t2, scanner_ct and so on. A person is written into Subject.person, see _read_persons.
    """
    sheet = _sheet_of(folder, files, PATIENT_SHEETS)
    if sheet is None:
        return
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
            cells = {_plain(row[columns[column]]) for row in rows}
            named[column] = len(own & cells)
    if not named:
        notes.append(f"{sheet.name}: has no column patient; age, sex and scanner stay unknown")
        return
    key = max(named, key=named.get)     # the first one of equals
    for column in PERSON_COLUMNS:
        if column in columns and column != key:
            _read_persons(sheet, rows, columns[key], columns[column], subjects, notes)
            break
    known = facts_of(sheet, rows, columns, columns[key], notes)
    keys = _matched(known, subjects)
    absent = [subject.name for subject in subjects if subject.name not in keys]
    if absent:
        notes.append(f"{len(absent)} subjects have no row in {sheet.name}: {few(absent)}")
    for subject in subjects:
        if subject.name in keys:
            subject.meta.update(known[keys[subject.name]])


def _read_persons(sheet, rows, key, title, subjects, notes):
    """Write the persons of a sheet into Subject.person, where it knows them.

    A column where no two subjects share a person is only another number of theirs, and tells
    nothing, unless it is called person.

    key: The title of the column that names the subjects. title: Of the column of persons.
    """
    person_of = {}                      # plain name -> person
    for row in rows:
        person = row[title].strip()
        if person.lower() not in UNKNOWN:
            person_of[_plain(row[key].strip())] = person
    told = [subject for subject in subjects if _plain(subject.name) in person_of]
    people = {person_of[_plain(subject.name)] for subject in told}
    if not told or (len(people) == len(told) and title.strip().lower() != "person"):
        return
    for subject in told:
        subject.person = person_of[_plain(subject.name)]
    notes.append(f"{sheet.name}: the column {title} tells the persons of {len(told)} of "
                 f"{len(subjects)} scans: {len(people)} persons")


def facts_of(sheet, rows, columns, patient, notes):
    """What the rows of a sheet say of the patients -> {patient: {fact: value}}.

    A row with a comma or a quote too many is not read. A gap in one row is filled from another of
    the same patient. If two rows contradict each other, nobody can say which is right, and we use
    neither.

    patient: The title of the column that names the patients.
    """
    known = {}
    contradictory = set()
    odd = {}                            # title of a column -> cells that make no sense
    torn = []
    for row in rows:
        who = row[patient].strip()
        facts = {}
        for column, title in columns.items():
            cell = row[title].strip()
            fact = _fact(column, title, cell)
            if fact is not None:
                facts[FACTS.get(column, column.lower())] = fact
            elif column in FACTS and cell.lower() not in UNKNOWN:
                odd.setdefault(title, []).append(repr(cell))
        if any(row.get(None, ())) or "\n" in " ".join([who, *map(str, facts.values())]):
            torn.append(repr(who[:20]))
        elif who:
            first = known.setdefault(who, facts)
            if any(first.setdefault(name, fact) != fact for name, fact in facts.items()):
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
    return known


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
