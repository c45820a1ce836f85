"""manifest.csv: a table that says which file is which scan, for folders of any other form.

    subject,session,modality,path,mask,age,sex,vendor,field,TR,TE
    anna,1,T1w,scans/0001.nii.gz,lesions/0001.nii.gz,61,F,Siemens,3,2300,2.98
    anna,1,FDG,scans/0002.nii.gz,,61,F,GE,,,

Each row is one scan. Paths are seen from the folder of the table. The columns session, person, mask
and report may be missing. Without a person, the sessions of a subject are of one person. A mask is
a label map of a lesion or a tumour. A report is the text of a radiologist; it is enough to write it
in one row of a subject and session. All other columns are fields of a record in its units; see
records.py. An empty cell means that the value is not known. An X-ray (modality xray) may be a PNG
or JPEG picture. Several of them are its views.
"""

from data.files import DataError, is_nifti, is_picture
from data.layouts.people import tell_persons
from data.layouts.records import (
    NUMBERS,
    TEXTS,
    age_of,
    header_of,
    number_of,
    sex_of,
    text_of,
    tracer_of,
    vendor_of,
    voxel_of,
    write_meta,
)
from data.layouts.sheets import PERSON_COLUMNS
from data.layouts.words import (
    CONTRASTS,
    TEXT,
    TRACERS,
    Subject,
    canonical_contrast,
    kind_of,
    read_sheet,
)

NEEDED = ("subject", "modality", "path")
# Any of these columns names the person.
PERSONS = tuple(column for column in PERSON_COLUMNS if column != "SUBJECT")
# Field of a record -> a function from the text of a cell to its value, and what to write in a cell.
# The function gives None if the text makes no sense.
FIELDS = {"age": (age_of, "a number of years"), "sex": (sex_of, "M, F or O"),
          "voxel": (voxel_of, "three numbers such as 1 x 1 x 4"),
          "vendor": (vendor_of, "a word"), "tracer": (text_of, "a word")}
FIELDS.update({field: (number_of, "a number") for field in NUMBERS})
FIELDS.update({field: (text_of, "a word") for field in TEXTS})


def collect_manifest(folder, notes):
    """Read folder/manifest.csv -> subjects sorted by name.

    A subject is called subject_session, or like the subject if no session is given.

    DataError if a column is missing, or if a row has no subject, an unknown modality, a file that
    does not exist, a scan that an earlier row has, or a value that makes no sense.
    """
    sheet = folder / "manifest.csv"
    rows, columns = read_sheet(sheet)
    for column in NEEDED:
        if column.upper() not in columns:
            raise DataError(f"{sheet}: has no column {column}; its first line must be "
                            "subject,session,modality,path and any fields, correct or rename it")
    fields = {}                         # field -> name of its column
    unknown = []
    names = {field.upper(): field for field in FIELDS}
    for column, title in columns.items():
        if column in names:
            fields[names[column]] = title
        elif column not in ("SUBJECT", "SESSION", "MODALITY", "PATH", "MASK", "REPORT", *PERSONS):
            unknown.append(title)
    if unknown:
        notes.append(f"manifest.csv: the columns {', '.join(unknown)} are not known and not read")
    subjects = {}
    told = False                        # if a row says more of the person than the subject's name
    for row in rows:
        cells = {}
        for column, title in columns.items():
            cells[column] = row[title].strip()
        record = {}
        line = f"{sheet}, line {rows.line_num}"
        for field, title in fields.items():
            value = _value_of(field, row[title], line)
            if value is not None:
                record[field] = value
        told = told or any(cells.get(column) for column in ("SESSION", *PERSONS))
        if any(cells.values()):
            _add_scan(folder, subjects, cells, record, line)
    if not subjects:
        raise DataError(f"{sheet}: has no rows; write one for each scan, or remove the file")
    for subject in subjects.values():
        write_meta(subject)
    if not told:
        tell_persons(subjects.values(), notes, "manifest.csv")
    return [subjects[name] for name in sorted(subjects)]


def _add_scan(folder, subjects, cells, record, line):
    """Add the scan of one row to its subject, which is made if it is new.

    subjects: {name: Subject}. cells: {column in upper case: text}.
    line: Where the row stands, for a message.
    """
    owner = cells["SUBJECT"]
    session = cells.get("SESSION")
    if not owner:
        raise DataError(f"{line}: names no subject; fill the column subject")
    contrast = _contrast_of(cells["MODALITY"], record, line)
    path = _file_of(folder, cells["PATH"], line, contrast)
    name = f"{owner}_{session}" if session else owner
    person = next((cells[column] for column in PERSONS if cells.get(column)), owner)
    if name not in subjects:
        subjects[name] = Subject(name, person, {}, grid=("t1",))
    subject = subjects[name]
    if subject.person != person:
        raise DataError(f"{line}: {name} is {person} here, and {subject.person} in an earlier "
                        "line; give one person for each subject and session")
    views = subject.pictures(contrast)
    if contrast in subject.files and not (views and is_picture(path)):
        other = views[0] if views else subject.files[contrast]
        raise DataError(f"{line}: {name} has another {contrast} in an earlier line, "
                        f"{other.name}; remove one of them, or give a session")
    _set_report(folder, subject, cells.get("REPORT"), line)
    if is_nifti(path):
        voxel, volumes = header_of(path)
        if voxel:
            record.setdefault("voxel", voxel)
        if volumes > 1 and kind_of(contrast) == "PET":
            subject.frames[contrast] = ()       # a manifest has no durations of single frames
    subject.files[contrast] = (*views, path) if views else path
    subject.records.setdefault(contrast, record)        # of several views, that of the first
    if cells.get("MASK"):
        mask = _file_of(folder, cells["MASK"], line)
        if subject.segmentation not in (None, mask):
            raise DataError(f"{line}: {name} has another mask in an earlier line, "
                            f"{subject.segmentation.name}; give one for each subject and session")
        subject.segmentation = mask


def _set_report(folder, subject, report, line):
    """Give a subject the report of one row. DataError if an earlier row has another one."""
    if text_of(report) is None:
        return
    if subject.report not in (None, report):
        raise DataError(f"{line}: {subject.name} has another report in an earlier line; give one "
                        "for each subject and session")
    subject.report = report
    subject.files[TEXT] = folder / "manifest.csv"


def _contrast_of(modality, record, line):
    """The contrast of a scan. For PET, the tracer is written into the record."""
    contrast = canonical_contrast(modality)
    if contrast not in CONTRASTS:
        raise DataError(f"{line}: {modality or 'nothing'} is no modality; write one of "
                        f"{', '.join(CONTRASTS)}")
    if contrast == "pet" and "tracer" in record:
        record["tracer"], contrast = tracer_of(record["tracer"])
    elif contrast in TRACERS:
        record["tracer"] = TRACERS[contrast]
    return contrast


def _file_of(folder, cell, line, contrast=None):
    """The path of a file that a cell names. Both kinds of slashes are understood.

    contrast: An X-ray may be a picture. All else must be NIfTI.
    """
    path = folder / cell
    if not path.exists() and "\\" in cell:
        path = folder / cell.replace("\\", "/")
    usable = is_nifti(path) or (contrast == "xray" and is_picture(path))
    if not cell or not usable:
        raise DataError(f"{line}: {cell or 'an empty path'} is no .nii or .nii.gz file; "
                        "give the path of a NIfTI file")
    if not path.exists():
        raise DataError(f"{line}: {cell} does not exist in {folder}; correct the path, "
                        "or remove the line")
    return path


def _value_of(field, cell, line):
    """The value in a cell, or None if it is not known. DataError if the cell makes no sense."""
    if text_of(cell) is None:
        return None
    understand, wanted = FIELDS[field]
    value = understand(cell)
    if value is None:
        raise DataError(f"{line}: the {field} is {cell.strip()!r}; write {wanted}, "
                        "or leave the cell empty if it is not known")
    return value
