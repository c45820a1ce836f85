"""ADNI-1: one folder per series, and PD and T2 often in one file.

A file is called ADNI/002_S_0413/MP-RAGE/2006-11-15_09_47_59.0/I29704/any.nii. We need the person,
the series and the day. We do not need the time of the day and the number of the image.
"""

import re

from data.layouts.words import AXIAL_GRID, Subject

ADNI_FILE = re.compile(r"(?:^|/)(\d{3}_S_\d{4})/([^/]+)/(\d{4}-\d\d-\d\d)_[^/]+/[^/]+/[^/]+$")
# Names of series.
ADNI_T1 = re.compile(r"MP.?RAGE|(?:^|_)MPR(?:$|[_-])", re.IGNORECASE)
ADNI_DUAL_ECHO = re.compile(r"PD[^A-Z0-9]*T2|DOUBLE.?TSE", re.IGNORECASE)


def collect_adni(images, notes):
    """Take what one person had on one day as a subject -> (subjects, ignored files).

    Subjects are sorted by name. Files of other series are ignored.

    images: The paths of all NIfTI files.
    notes: A list that gets sentences for the user.
    """
    visits = {}                 # (person, day) -> kind of series -> folder -> its files
    ignored = []
    for path in images:
        place = ADNI_FILE.search(path.as_posix())
        kind = _kind_of_series(place[2]) if place else None
        if kind is None:
            ignored.append(path)
            continue
        visit = visits.setdefault((place[1], place[3]), {"t1": {}, "dual": {}})
        visit[kind].setdefault(path.parent, []).append(path)
    subjects = []
    unused = []
    for (person, day), series in sorted(visits.items()):
        subject = Subject(f"{person}_{day}", person, {}, meta={"body": "brain"}, grid=AXIAL_GRID)
        if series["t1"]:
            subject.files["t1"] = _best_scan(series["t1"])[0]
        if series["dual"]:
            files, subject.echoes = _dual_echo(_best_scan(series["dual"]))
            subject.files.update(files)
        for scans in series.values():
            for paths in scans.values():
                unused += [path for path in paths if path not in subject.files.values()]
        subjects.append(subject)
    if unused:
        notes.append(f"{len(unused)} files repeat a scan of the same day and are not used, "
                     f"e.g. {unused[0]}")
    return subjects, ignored


def _kind_of_series(name):
    """"t1", "dual" (PD and T2), or None for all other series."""
    if ADNI_T1.search(name):
        return "t1"
    if ADNI_DUAL_ECHO.search(name):
        return "dual"
    return None


def _best_scan(scans):
    """The files of the first scan of a day that is not called a repetition.

    scans: The folder .../series/time/number of image -> its files.
    """
    def rank(place):
        return "REPEAT" in place.parents[1].name.upper(), place

    return scans[min(scans, key=rank)]


def _dual_echo(paths):
    """The files of a PD/T2 series -> ({contrast: file}, {contrast: echo in that file}).

    There are either two files, or one file that holds both echoes. Of two files from dcm2niix, the
    second ends in _e2. The first may end in _e1.
    """
    numbered = {}
    for path in paths:
        echo = re.search(r"(?:^|[_-])e([12])\.nii(\.gz)?$", path.name, re.IGNORECASE)
        numbered.setdefault(echo[1] if echo else "", path)
    if set(numbered) == {""}:
        return {"pd": paths[0], "t2": paths[0]}, {"pd": 0, "t2": 1}
    files = {"pd": numbered.get("1") or numbered.get(""), "t2": numbered.get("2")}
    return {contrast: path for contrast, path in files.items() if path}, {}
