"""ADNI: one folder per series, and PD and T2 often in one file.

A file is called ADNI/002_S_0413/MP-RAGE/2006-11-15_09_47_59.0/I29704/any.nii. We need the person,
the series and the day. We do not need the time of the day and the number of the image. A PET is
often taken on another day than the MR.
"""

import re
from datetime import date

from data.layouts.words import AXIAL_GRID, TRACERS, Subject, few, role_of

ADNI_FILE = re.compile(r"(?:^|/)(\d{3}_S_\d{4,5})/([^/]+)/(\d{4}-\d\d-\d\d)_[^/]+/[^/]+/[^/]+$")
# Names of series.
ADNI_T1 = re.compile(r"MP.?RAGE|(?:^|_)MPR(?:$|[_-])|IR-?F?SPGR", re.IGNORECASE)
ADNI_DUAL_ECHO = re.compile(r"PD[^A-Z0-9]*T2|DOUBLE.?TSE", re.IGNORECASE)
# A PET that was processed by ADNI. Those of FDG do not name their tracer, and all others do.
ADNI_PET = re.compile(r"(?:^|_)Co-?reg(?:istered)?(?:$|[_,])", re.IGNORECASE)
CLOSE = 92              # days; a PET that was taken so near to an MR belongs to its visit


def collect_adni(images, notes):
    """Take what one person had on one day as a subject -> (subjects, ignored files).

    A PET of a day without MR joins the nearest visit with MR, if that is at most CLOSE days away.
    Subjects are sorted by name. Files of other series are ignored.
    """
    visits = {}                 # (person, day) -> kind of series -> folder -> its files
    ignored = []
    for path in images:
        place = ADNI_FILE.search(path.as_posix())
        kind = _kind_of_series(place[2]) if place else None
        if kind is None:
            ignored.append(path)
            continue
        visit = visits.setdefault((place[1], place[3]), {})
        visit.setdefault(kind, {}).setdefault(path.parent, []).append(path)
    _join_pet(visits, notes)
    subjects = []
    unused = []
    for (person, day), series in sorted(visits.items()):
        subject = Subject(f"{person}_{day}", person, {}, meta={"body": "brain"}, grid=AXIAL_GRID)
        for kind, scans in series.items():
            if kind != "dual":
                subject.files[kind] = _best_scan(scans)[0]
        if "dual" in series:
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
    """A contrast, "dual" (PD and T2), or None for all other series."""
    if ADNI_T1.search(name):
        return "t1"
    if ADNI_DUAL_ECHO.search(name):
        return "dual"
    kind = role_of(name, "")
    if kind in ("flair", "t2", "t2star", "pet", *TRACERS):
        return kind
    return "fdg" if kind is None and ADNI_PET.search(name) else None


def _join_pet(visits, notes):
    """Move the PET of a day without MR to the nearest visit with MR; see collect_adni.

    visits: {(person, day): {kind of series: ...}}, which is changed.
    """
    with_mr = {key for key, series in visits.items() if not _is_pet(series)}
    joined = {}                 # (person, day) of a PET -> days to its MR
    for key in [key for key in sorted(visits) if key not in with_mr]:
        apart = {}
        for other in with_mr:
            if other[0] == key[0]:
                days = date.fromisoformat(other[1]) - date.fromisoformat(key[1])
                apart[other] = abs(days.days)
        nearest = min(apart, key=lambda other: (apart[other], other), default=None)
        if nearest and apart[nearest] <= CLOSE and not visits[key].keys() & visits[nearest].keys():
            visits[nearest].update(visits.pop(key))
            joined[f"{key[0]}_{key[1]}"] = apart[nearest]
    if joined:
        notes.append(f"{len(joined)} PET were taken up to {max(joined.values())} days before or "
                     f"after the MR and belong to its visit: {few(list(joined))}")


def _is_pet(series):
    """True if all series of a day are PET. series: {kind of series: ...}."""
    return all(kind == "pet" or kind in TRACERS for kind in series)


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
