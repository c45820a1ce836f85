"""BIDS (bids-specification.readthedocs.io): names made of pairs, and JSON files beside the scans.

    dataset_description.json   participants.tsv   T2w.json
    sub-01/sub-01_sessions.tsv
    sub-01/ses-02/anat/sub-01_ses-02_T1w.nii.gz  sub-01_ses-02_T1w.json
    sub-01/ses-02/pet/sub-01_ses-02_trc-FDG_pet.nii.gz
    derivatives/registered/sub-01/ses-02/anat/sub-01_ses-02_space-T1w_T2w.nii.gz

There need not be sessions. CT and SWI are not in BIDS yet. Many sets have them in ct/ and swi/, or
in anat/.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data.files import DataError
from data.layouts.people import person_of
from data.layouts.records import (
    BODIES,
    age_of,
    header_of,
    number_of,
    sex_of,
    text_of,
    write_meta,
)
from data.layouts.sidecars import Sidecars, durations, parse, record_from, tracer_from
from data.layouts.words import Subject, few, read_sheet

# Where a scan lies, as seen from the data folder.
PLACE = re.compile(r"(?:(?P<root>.+)/)?(?P<person>sub-[^/_]+)/(?:(?P<session>ses-[^/_]+)/)?"
                   r"(?:anat|pet|ct|swi)/sub-[^/]+")
SUFFIXES = {"t1w": "t1", "t2w": "t2", "flair": "flair", "pdw": "pd", "pd": "pd",
            "t2starw": "t2star", "t2star": "t2star", "swi": "swi", "ct": "ct", "pet": "pet"}
# Files with these entities are one of a collection from which a map is computed.
COLLECTIONS = ("inv", "flip")
# Folders of a raw data set whose images are not raw scans.
OTHER_FOLDERS = ("derivatives", "sourcedata", "code", "stimuli")
# Of several derivatives of one scan, the first of these (entity desc) is taken.
DESCRIPTIONS = ("brain", "preproc")


@dataclass
class Scan:
    """One image, and what its name, its sidecars and its header say."""

    path: Path
    contrast: str
    entities: dict          # {"sub": "01", "run": "2", ...}
    record: dict            # see records.py
    frames: tuple | None    # durations in s of a PET of several frames; None for a single volume
    body: str | None        # the part of the body
    flat: bool              # True if it is a stack of 2-D slices


def is_bids(folder, images):
    """True if an image lies where BIDS has it and has a suffix that we know."""
    return any(_place_of(path, folder) and parse(path)[1].lower() in SUFFIXES for path in images)


def collect_bids(folder, images, notes):
    """Read a BIDS data set -> (its name for the user, subjects sorted by name, ignored files).

    A subject is a session of a person, or a person without sessions. Of several scans of one
    contrast the best one is used, see _rank. If the folder lies in RAW/derivatives/, facts come
    from the raw data set RAW. The folder's own sidecars override single facts.

    If the folder holds several BIDS data sets, such as one for each site, names begin with theirs.
    DataError if it holds several derivatives.
    """
    sites = _roots_of(folder, images)
    if len(sites) > 1:
        return _collect_sites(folder, sites, images, notes)
    root = folder / sites[0]
    raw = _raw_root(root)
    roots = [raw, root] if raw else [root]
    sidecars = [Sidecars(place) for place in roots]
    scans = {}                          # (person, session or "") -> list of Scan
    ignored = []
    odd = {}                            # sentence -> names of files
    for path in images:
        if not path.is_relative_to(root) or path.relative_to(root).parts[0] in OTHER_FOLDERS:
            continue
        place = _place_of(path, root)
        scan = _read_scan(path, sidecars, odd) if place and not place["root"] else None
        if scan is None:
            ignored.append(path)
            continue
        scans.setdefault((place["person"], place["session"] or ""), []).append(scan)
    _keep_one_space(scans, notes)
    subjects = _to_subjects(scans, roots, notes)
    for sentence, names in odd.items():
        notes.append(f"{sentence}, in {len(names)} scans: {few(names)}")
    for sidecar in sidecars:
        notes += sidecar.notes()
    _say_derivatives(root, images, notes)
    return ("BIDS derivative" if raw else "BIDS"), subjects, ignored


# ---- Places --------------------------------------------------------------------------------------

def _place_of(path, folder):
    """The match of PLACE, or None."""
    return PLACE.fullmatch(path.relative_to(folder).as_posix())


def _roots_of(folder, images):
    """Where the BIDS data sets in a folder lie, as a sorted list; [""] is the folder itself."""
    found = set()
    for path in images:
        place = _place_of(path, folder)
        if place and parse(path)[1].lower() in SUFFIXES:
            found.add(place["root"] or "")
    outer = []
    for root in sorted(found):          # a data set comes before what lies in it
        if not any(other == "" or root.startswith(f"{other}/") for other in outer):
            outer.append(root)
    return outer


def _collect_sites(folder, sites, images, notes):
    """Read several BIDS data sets -> as collect_bids."""
    if "derivatives" in folder.joinpath(sites[0]).absolute().parts:
        raise DataError(f"{folder}: holds {len(sites)} BIDS derivatives, {few(sites)}; "
                        "give one of them as the data folder")
    subjects = []
    ignored = []
    for site in sites:
        own = [path for path in images if path.is_relative_to(folder / site)]
        _, found, others = collect_bids(folder / site, own, notes)
        ignored += others
        for subject in found:
            subject.name = f"{site}/{subject.name}"
            subject.person = person_of(f"{site}/{subject.person}")
            subjects.append(subject)
    return "BIDS", subjects, ignored


def _raw_root(root):
    """The raw data set RAW of a folder RAW/derivatives/NAME, or None for any other folder."""
    for parent in [*root.absolute().parents, *root.resolve().parents]:
        if parent.name == "derivatives":
            return parent.parent
    return None


def _say_derivatives(root, images, notes):
    """Note which derivatives lie in a raw data set, and how to use them."""
    names = set()
    for path in images:
        if path.is_relative_to(root / "derivatives"):
            names.add(path.relative_to(root).parts[1])
    if names:
        notes.append(f"derivatives are not read together with raw scans ({few(sorted(names))}); "
                     f"to use one, give {root / 'derivatives'}/NAME as the data folder")


# ---- One scan ------------------------------------------------------------------------------------

def _read_scan(path, sidecars, odd):
    """What is known of an image -> Scan, or None if it is none of our contrasts.

    sidecars: The Sidecars of the raw data set and of the derivative, or of the only data set.
    odd: {sentence: names of files} for the user.
    """
    entities, suffix = parse(path)
    contrast = SUFFIXES.get(suffix.lower())
    if contrast is None or not entities.keys().isdisjoint(COLLECTIONS):
        return None
    if entities.get("part", "mag") != "mag" or number_of(entities.get("echo", "1")) != 1:
        return None                     # a phase image, or a later echo

    def say(sentence):
        odd.setdefault(sentence, []).append(path.name)

    known = {}
    for of_one_set in sidecars:
        known.update(of_one_set.of(path, path.parent.relative_to(sidecars[-1].root)))
    record = record_from(known, entities, say)
    voxel, volumes = header_of(path)
    if voxel:
        record["voxel"] = voxel
    frames = None
    if contrast == "t1" and "ce" in entities:
        contrast = "t1ce"
    if contrast == "pet":
        tracer, contrast = tracer_from(known, entities)
        if tracer:
            record["tracer"] = tracer
        if contrast == "pet":
            say(f"the tracer is {tracer or 'not told'}, so the PET is read in SUV")
        if volumes > 1:
            frames = durations(known)
    part = text_of(known.get("BodyPartExamined")) or text_of(known.get("BodyPart")) or ""
    flat = known.get("MRAcquisitionType") == "2D"
    return Scan(path, contrast, entities, record, frames, BODIES.get(part.lower()), flat)


# ---- The scans of a session ----------------------------------------------------------------------

def _keep_one_space(scans, notes):
    """Leave only the scans of one space, because the scans of a person must fit on each other.

    It is the space of most scans. A scan without the entity space is taken to be in that of T1w.

    scans: {(person, session): list of Scan}, which is changed.
    """
    counts = Counter()                  # space -> number of scans; a repetition does not count
    for found in scans.values():
        counts.update(space for space, _ in {(_space(scan), scan.contrast) for scan in found})
    if len(counts) < 2:
        return
    best = min(counts, key=lambda space: (-counts[space], space != "T1w", space))
    for session, found in list(scans.items()):
        scans[session] = [scan for scan in found if _space(scan) == best]
        if not scans[session]:
            del scans[session]
    others = ", ".join(sorted(set(counts) - {best}))
    notes.append(f"scans in the space of {best} are used, and those of {others} are not")


def _space(scan):
    return scan.entities.get("space", "T1w")


def _rank(scan):
    """Sorts the scans of a session, the best of each contrast first.

    Of derivatives, DESCRIPTIONS decide. Then a scan without the entity run comes before run 1 and
    run 2, 3-D comes before 2-D, and smaller voxels come before larger ones.
    """
    described = scan.entities.get("desc")
    place = DESCRIPTIONS.index(described) if described in DESCRIPTIONS else len(DESCRIPTIONS)
    run = number_of(scan.entities.get("run")) or 0
    volume = math.prod(scan.record.get("voxel", (math.inf,)))
    return place, run, scan.flat, volume, scan.path.name


def _to_subjects(scans, roots, notes):
    """One Subject for each session, with the best scan of each contrast, sorted by name.

    scans: {(person, session or ""): list of Scan}.
    roots: The raw data set and the derivative, or the only data set.
    """
    participants = {}
    for root in roots:
        participants.update(_read_table(root / "participants.tsv", "participant_id", "sub-"))
    if not participants:
        notes.append("there is no participants.tsv with rows, so age and sex stay unknown where no "
                     "JSON file says them")
    subjects = []
    repeated = []
    for (person, session), found in sorted(scans.items()):
        name = f"{person}_{session}" if session else person
        subject = Subject(name, person, {}, grid=("t1",))
        facts = _facts_of(person, session, roots, participants)
        for scan in sorted(found, key=_rank):
            if scan.contrast in subject.files:
                used = subject.files[scan.contrast]
                repeated.append(f"{used.name} is used, not {scan.path.name}")
                continue
            subject.files[scan.contrast] = scan.path
            subject.records[scan.contrast] = {**scan.record, **facts}
            if scan.frames is not None:
                subject.frames[scan.contrast] = scan.frames
            if scan.body:
                subject.meta.setdefault("body", scan.body)
        write_meta(subject)
        subjects.append(subject)
    if repeated:
        notes.append(f"{len(repeated)} scans repeat a contrast of their session and are not used: "
                     f"e.g. {repeated[0]}")
    return subjects


# ---- Tables of persons ---------------------------------------------------------------------------

def _facts_of(person, session, roots, participants):
    """The age in years and the sex of a person in a session, as far as they are known -> dict.

    The age in sessions.tsv is that at the session. It is better than the one of participants.tsv,
    which is the same for all sessions.

    participants: {person: row} of participants.tsv.
    """
    rows = [participants.get(person, {})]
    for root in roots:
        table = _read_table(root / person / f"{person}_sessions.tsv", "session_id", "ses-")
        rows.insert(0, table.get(session, {}))
    facts = {}
    for row in rows:
        age = age_of(row.get("AGE"))
        sex = sex_of(row.get("SEX")) or sex_of(row.get("GENDER"))
        for name, fact in (("age", age), ("sex", sex)):
            if fact is not None:
                facts.setdefault(name, fact)
    return facts


def _read_table(sheet, key, prefix):
    """Read a .tsv file -> {name: {column in upper case: cell}}. A missing file has no rows.

    key: The column of the names. prefix: What names begin with; some tables leave it out.
    """
    if not sheet.is_file():
        return {}
    rows, columns = read_sheet(sheet)
    key = key.upper()
    if key not in columns:
        return {}
    found = {}
    for row in rows:
        name = row[columns[key]].strip().removeprefix(prefix)
        if name:
            found[prefix + name] = {column: row[title] for column, title in columns.items()}
    return found
