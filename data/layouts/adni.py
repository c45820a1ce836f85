"""ADNI-1: a folder per series, and two contrasts in one file."""

import re

from data.layouts.words import AXIAL_GRID, Subject

# ADNI/002_S_0413/MP-RAGE/2006-11-15_09_47_59.0/I29704/any.nii: person, series, day; time and image id are not needed.
ADNI_FILE = re.compile(r"(?:^|/)(\d{3}_S_\d{4})/([^/]+)/(\d{4}-\d\d-\d\d)_[^/]+/[^/]+/[^/]+$")
ADNI_T1 = re.compile(r"MP.?RAGE|(?:^|_)MPR(?:$|[_-])", re.IGNORECASE)
ADNI_DUAL_ECHO = re.compile(r"PD[^A-Z0-9]*T2|DOUBLE.?TSE", re.IGNORECASE)


def collect_adni(images, notes):
    """A subject is what one person (PTID) had on one day -> (subjects sorted by name, ignored files: other series)."""
    visits, ignored = {}, []
    for path in images:
        place = ADNI_FILE.search(path.as_posix())
        kind = place and ("t1" if ADNI_T1.search(place[2]) else "dual" if ADNI_DUAL_ECHO.search(place[2]) else None)
        if kind:
            series = visits.setdefault((place[1], place[3]), {"t1": {}, "dual": {}})[kind]
            series.setdefault(path.parent, []).append(path)
        else:
            ignored.append(path)
    subjects, unused = [], []
    for (person, day), series in sorted(visits.items()):
        subject = Subject(f"{person}_{day}", person, {}, meta={"body": "brain"}, grid=AXIAL_GRID)
        if series["t1"]:
            subject.files["t1"] = _best_scan(series["t1"])[0]
        if series["dual"]:
            files, subject.echoes = _dual_echo(_best_scan(series["dual"]))
            subject.files.update(files)
        there = [path for kind in series.values() for paths in kind.values() for path in paths]
        unused += [path for path in there if path not in subject.files.values()]
        subjects.append(subject)
    if unused:
        notes.append(f"{len(unused)} files repeat a scan of the same day and are not used, e.g. {unused[0]}")
    return subjects, ignored


def _best_scan(scans):
    """scans: {.../series/time/image id: its files}, of one day. The first that is no repeat."""
    return scans[min(scans, key=lambda place: ("REPEAT" in place.parents[1].name.upper(), place))]


def _dual_echo(paths):
    """The files of a PD/T2 series -> ({contrast: file}, {contrast: echo}).

    Either two files, the second named ..._e2 (and the first perhaps ..._e1) as by dcm2niix, or one that holds both.
    """
    numbered = {}
    for path in paths:
        echo = re.search(r"(?:^|[_-])e([12])\.nii(\.gz)?$", path.name, re.IGNORECASE)
        numbered.setdefault(echo[1] if echo else "", path)
    if set(numbered) == {""}:
        return {"pd": paths[0], "t2": paths[0]}, {"pd": 0, "t2": 1}
    first = numbered.get("1") or numbered.get("")
    return {contrast: path for contrast, path in (("pd", first), ("t2", numbered.get("2"))) if path}, {}
