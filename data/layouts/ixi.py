"""IXI (brain-development.org/ixi-dataset): a folder per contrast, and a sheet of its own."""

import re

from data.files import DataError
from data.layouts.words import AXIAL_GRID, Subject, few, positive, read_sheet

# brain-development.org/ixi-dataset: IXI002-Guys-0828-T1.nii.gz; the hospital tells the scanner (field in tesla) and
# the times (TR, TE in ms), which IOP has not published.
IXI_FILE = re.compile(r"((IXI\d+)-(Guys|HH|IOP)-\d+)-(T1|T2|PD)\.(?i:nii(\.gz)?)")
IXI_SCANNERS = {"Guys": {"scanner": "Philips", "field": 1.5}, "HH": {"scanner": "Philips", "field": 3.0},
                "IOP": {"scanner": "GE", "field": 1.5}}
IXI_TIMES = {"Guys": {"t1": (9.813, 4.603), "t2": (8178.34, 100), "pd": (8178.34, 8)},
             "HH": {"t1": (9.6, 4.6), "t2": (5725.79, 100), "pd": (5725.79, 8)}}
IXI_COLUMNS = ("IXI_ID", "SEX_ID", "AGE")                                   # the sheet says "SEX_ID (1=m, 2=f)"


def collect_ixi(files, images, notes):
    """IXI's own names, in whatever folders -> (subjects sorted by name, ignored files: MRA, DTI and others).

    Our phantoms bear names like these, but not all of them the hospitals' times, so those stay unknown there.
    """
    subjects, ignored = {}, []
    times = {} if any(path.name == "phantom.json" for path in files) else IXI_TIMES
    demographics = _read_ixi_sheet(files, notes)
    for path in images:
        parts = IXI_FILE.fullmatch(path.name)
        if not parts:
            ignored.append(path)
            continue
        name, person, site = parts[1], parts[2], parts[3]
        meta = {"body": "brain", "site": site, **IXI_SCANNERS[site], **demographics.get(person, {})}
        meta.update({"times": times[site]} if site in times else {})
        subject = subjects.setdefault(name, Subject(name, person, {}, meta=meta, grid=AXIAL_GRID))
        contrast = parts[4].lower()
        if contrast in subject.files:
            raise DataError(f"{path}: {name} has another {contrast}, {subject.files[contrast]}; remove one of them")
        subject.files[contrast] = path
    absent = [name for name, subject in sorted(subjects.items()) if subject.person not in demographics]
    if demographics and absent:
        notes.append(f"{len(absent)} subjects have no row in the sheet of IXI: {few(absent)}")
    return [subjects[name] for name in sorted(subjects)], ignored


def _read_ixi_sheet(files, notes):
    """IXI.csv, exported from IXI.xls -> {"IXI002": {"age": years, "sex": "M" or "F"}}, what is unknown left out.

    The sheet repeats persons, with the same values or with gaps (which another row fills); where two rows contradict
    each other it cannot be said which is the person's, and both are dropped.
    """
    sheets = [path for path in files if re.fullmatch(r"IXI.*\.csv", path.name, re.IGNORECASE)]
    excel = [path for path in files if re.fullmatch(r"IXI.*\.xlsx?", path.name, re.IGNORECASE)]
    if not sheets:
        notes += [f"{path.name}: Excel is not read; save it as IXI.csv to have age and sex" for path in excel[:1]]
        return {}
    sheet = sheets[0]
    notes += [f"{sheet.name} is used, not {other.name}" for other in sheets[1:]]
    rows, columns = read_sheet(sheet)
    if not set(IXI_COLUMNS) <= set(columns):
        notes.append(f"{sheet.name}: has no columns {', '.join(IXI_COLUMNS)}; age and sex stay unknown")
        return {}
    people, contradictory = {}, set()
    for row in rows:
        number, sex, age = (positive(row[columns[key]]) for key in IXI_COLUMNS)
        if number is None:
            continue
        person = f"IXI{int(number):03d}"
        known = people.setdefault(person, {})
        for key, value in (("age", age), ("sex", {1: "M", 2: "F"}.get(sex))):
            if value is not None and known.setdefault(key, value) != value:
                contradictory.add(person)
    for person in sorted(contradictory):
        people[person] = {}
        notes.append(f"{sheet.name}: the rows of {person} contradict each other; its age and sex stay unknown")
    return people
