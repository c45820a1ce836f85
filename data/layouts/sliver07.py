"""SLIVER07 (sliver07.grand-challenge.org): CT of the abdomen with the liver drawn by hand.

    training-part1/liver-orig001.mhd  liver-orig001.raw       CT in HU
                   liver-seg001.mhd   liver-seg001.raw        the liver

Scans for the test have no mask, and they have the numbers of other patients again. We use scans
with masks only. There are no reports; all scans get the same sentence.
"""

import re

from data.files import DataError
from data.layouts.words import TEXT, Subject

SCAN_FILE = re.compile(r"liver-(orig|seg)(\d{3})\.mh[ad]", re.IGNORECASE)
REPORT = "an axial contrast enhanced abdominal ct ."


def is_sliver07(folder, files):
    """True if a file has the name of a scan."""
    return any(SCAN_FILE.fullmatch(path.name) for path in files)


def collect_sliver07(folder, files, notes):
    """Read SLIVER07 -> (subjects sorted by name, None). There is no official split.

    A scan and its mask may lie in different folders. Folders with names such as test-part1 are not
    read.

    DataError if two scans or two masks have one number.
    """
    found = {"orig": {}, "seg": {}}
    unused = 0
    for path in files:
        parts = SCAN_FILE.fullmatch(path.name)
        if parts is None:
            continue
        folders = path.relative_to(folder).parts[:-1]
        if any(place.lower().startswith("test") for place in folders):
            unused += 1
            continue
        numbered = found[parts[1].lower()]
        if parts[2] in numbered:
            raise DataError(f"{path}: number {parts[2]} is there twice, also as "
                            f"{numbered[parts[2]]}; remove one of them")
        numbered[parts[2]] = path
    subjects = []
    for number, path in sorted(found["orig"].items()):
        if number not in found["seg"]:
            unused += 1
            continue
        name = f"liver{number}"
        subjects.append(Subject(name, name, {"ct": path, TEXT: path}, found["seg"][number],
                                meta={"body": "abdomen"}, report=REPORT))
    if unused:
        notes.append(f"{unused} scans have no mask of the liver or are for the test, "
                     "and are not used")
    return subjects, None
