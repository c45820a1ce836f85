"""reports.csv: a table of pictures and reports, for sets of X-rays of any other form.

    file,patient,report,view,split
    p0005_000.jpg,p0005,Severe ARDS. The patient is intubated.,PA,train

Each row is one picture, which lies in images/ or beside the table, and is one subject. The column
`file` may be called image. The report may be called findings, notes or text; the first of these
that is there is used. The others are optional: patient (or person, subject, patient_id), view and
split (train, val or test). Other columns are ignored.
"""

from data.files import DataError, is_picture
from data.layouts.people import part_of_word, tell_persons
from data.layouts.sheets import PERSON_COLUMNS
from data.layouts.words import TEXT, UNKNOWN, Subject, read_sheet

FILE_NAME = "reports.csv"
# A fact -> the names of columns that hold it, best first.
COLUMNS = {"file": ("FILE", "IMAGE"), "report": ("REPORT", "FINDINGS", "NOTES", "TEXT"),
           "patient": PERSON_COLUMNS, "view": ("VIEW",), "split": ("SPLIT",)}


def is_reports_table(folder, files):
    """True if reports.csv lies in the folder itself."""
    return folder / FILE_NAME in files


def collect_reports_table(folder, files, notes):
    """Read reports.csv -> (subjects sorted by name, split or None).

    A subject is called like its file. A split keeps the pictures of a patient together. Without the
    column, the names of the files tell the patients.

    split: {"train": [names], "val": [names], "test": [names]}, if the table names a part.
    DataError if the file or the report has no column, if a row names no picture, or a part that
    does not exist, or if two rows have one file.
    """
    sheet = folder / FILE_NAME
    rows, columns = read_sheet(sheet)
    titles = {}                         # fact -> name of its column
    for fact, names in COLUMNS.items():
        there = [columns[name] for name in names if name in columns]
        if there:
            titles[fact] = there[0]
    for fact in ("file", "report"):
        if fact not in titles:
            raise DataError(f"{sheet}: has no column {fact}; its first line must be file,report "
                            "and any of patient,view,split, correct it")
    split = {"train": [], "val": [], "test": []}
    subjects = {}
    missing = []
    for row in rows:
        cells = {fact: row[title].strip() for fact, title in titles.items()}
        if any(cells.values()):
            line = f"{sheet}, line {rows.line_num}"
            _add_picture(folder, subjects, split, missing, cells, line)
    if not subjects:
        raise DataError(f"{sheet}: names no picture that exists; correct the column file")
    if missing:
        notes.append(f"{len(missing)} files of {FILE_NAME} do not exist and are left out, "
                     f"e.g. {missing[0]}")
    found = [subjects[name] for name in sorted(subjects)]
    if "patient" not in titles:
        tell_persons(found, notes, FILE_NAME)
    return found, split if any(split.values()) else None


def _add_picture(folder, subjects, split, missing, cells, line):
    """Add the subject of one row. cells: {fact: text}. line: Where the row stands."""
    file = cells["file"].replace("\\", "/")
    if not is_picture(file):
        raise DataError(f"{line}: {file or 'an empty cell'} is no .png, .jpg or .jpeg file; "
                        "give the path of a picture")
    path = folder / "images" / file
    if not path.is_file():
        path = folder / file
    if not path.is_file():
        missing.append(file)
        return
    name = file.rpartition(".")[0].replace("/", "_")
    if name in subjects:
        raise DataError(f"{line}: {file} is in an earlier line, too; remove one of them")
    report = cells["report"]
    meta = {"view": cells["view"]} if cells.get("view") else {}
    subject = Subject(name, cells.get("patient") or name, {"xray": path}, meta=meta)
    if report.lower() not in UNKNOWN:
        subject.report = report
        subject.files[TEXT] = folder / FILE_NAME
    subjects[name] = subject
    if not cells.get("split"):
        return                          # a row without a part is not used
    part = part_of_word(cells["split"])
    if part is None:
        raise DataError(f"{line}: the split is {cells['split']!r}; write train, val or test")
    split[part].append(name)
