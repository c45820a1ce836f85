"""IXI (brain-development.org/ixi-dataset): one folder per contrast, and a sheet of persons.

A file is called IXI002-Guys-0828-T1.nii.gz. Guys is the hospital, from which we know the scanner.
"""

import re

from data.files import DataError
from data.layouts.records import number_of
from data.layouts.sheets import facts_of
from data.layouts.words import AXIAL_GRID, Subject, few, read_sheet

IXI_FILE = re.compile(r"((IXI\d+)-(Guys|HH|IOP)-\d+)-(T1|T2|PD)\.(?i:nii(\.gz)?)")
# The field is in tesla.
IXI_SCANNERS = {"Guys": {"scanner": "Philips", "field": 1.5},
                "HH": {"scanner": "Philips", "field": 3.0},
                "IOP": {"scanner": "GE", "field": 1.5}}
# TR and TE in ms. IOP has not published its times.
IXI_TIMES = {"Guys": {"t1": (9.813, 4.603), "t2": (8178.34, 100), "pd": (8178.34, 8)},
             "HH": {"t1": (9.6, 4.6), "t2": (5725.79, 100), "pd": (5725.79, 8)}}
# The first words of the columns that we read. The second is called "SEX_ID (1=m, 2=f)".
IXI_COLUMNS = ("IXI_ID", "SEX_ID", "AGE")


def is_ixi(named):
    """True if all files that name a contrast have names of IXI, and some have only that name.

    Programs add words to these names, such as T1_brain, and the files that they write are ignored.
    """
    begin = re.compile(r"IXI\d+-(Guys|HH|IOP)-\d+-")
    own = any(IXI_FILE.fullmatch(path.name) for path in named)
    return own and all(begin.match(path.name) for path in named)


def collect_ixi(files, images, notes):
    """Read the file names of IXI, in any folders -> (subjects sorted by name, ignored files).

    MRA, DTI and all other names are ignored.

    DataError if a subject has two files of one contrast.
    """
    # Our phantoms have names like these. Not all were made with the times of the hospitals, so we
    # do not state any times for phantoms.
    phantom = any(path.name == "phantom.json" for path in files)
    times = {} if phantom else IXI_TIMES
    people = _read_ixi_sheet(files, notes)
    subjects = {}
    ignored = []
    for path in images:
        parts = IXI_FILE.fullmatch(path.name)
        if not parts:
            ignored.append(path)
            continue
        name = parts[1]
        person = parts[2]
        site = parts[3]
        contrast = parts[4].lower()
        if name not in subjects:
            meta = {"body": "brain", "site": site, **IXI_SCANNERS[site], **people.get(person, {})}
            if site in times:
                meta["times"] = times[site]
            subjects[name] = Subject(name, person, {}, meta=meta, grid=AXIAL_GRID)
        subjects[name].add(contrast, path)
    found = [subjects[name] for name in sorted(subjects)]
    absent = [subject.name for subject in found if subject.person not in people]
    if people and absent:
        notes.append(f"{len(absent)} subjects have no row in the sheet of IXI: {few(absent)}")
    return found, ignored


def _read_ixi_sheet(files, notes):
    """Read IXI.csv -> {"IXI002": {"age": years, "sex": "M" or "F"}}; unknown facts are left out.

    IXI.csv is exported from IXI.xls. The sheet has several rows of some persons, see facts_of.
    """
    sheets = [path for path in files if re.fullmatch(r"IXI.*\.csv", path.name, re.IGNORECASE)]
    excel = [path for path in files if re.fullmatch(r"IXI.*\.xlsx?", path.name, re.IGNORECASE)]
    if not sheets:
        if excel:
            notes.append(f"{excel[0].name}: Excel is not read; save it as IXI.csv to have age and "
                         "sex")
        return {}
    sheet = sheets[0]
    notes += [f"{sheet.name} is used, not {other.name}" for other in sheets[1:]]
    try:
        rows, columns = read_sheet(sheet)
    except DataError as error:
        notes.append(f"{error}; until then age and sex stay unknown")
        return {}
    if not set(IXI_COLUMNS) <= set(columns):
        notes.append(f"{sheet.name}: has no columns {', '.join(IXI_COLUMNS)}; "
                     "age and sex stay unknown")
        return {}
    people = {}
    for number, facts in facts_of(sheet, rows, columns, columns["IXI_ID"], notes).items():
        if number_of(number) is not None:
            people[f"IXI{int(number_of(number)):03d}"] = facts
    return people
