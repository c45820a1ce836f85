"""Which file is which: the naming of data sets on disk, and sentences that describe a slice or a scan. No voxel is read.

BraTS 2020, 2021 and 2023+ are read as downloaded, and so is any tree with one folder per subject and one NIfTI file
per contrast. They share one reader, because after the subject's own name is taken off a file name, the contrast is a
whole word of what remains; editions differ in the words only (table below). A table beside the folders may say who
the patients are. IXI, with a folder per contrast, and ADNI-1, with a folder per series and two contrasts in one file,
have readers of their own, and so have slices that were cut and split by somebody else: T1/train/slice_0.npy.
"""

import csv
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.volumes import DataError, is_nifti

# Order of BraTS; canonical name -> word in captions, whole words of file names that mean it.
CONTRASTS = {
    "flair": ("FLAIR", {"flair", "t2f", "t2flair"}),
    "t1": ("T1w", {"t1", "t1n", "t1w", "mprage"}),
    "t1ce": ("T1CE", {"t1ce", "t1c", "t1gd", "t1post"}),
    "t2": ("T2w", {"t2", "t2w"}),
    "pd": ("PDw", {"pd", "pdw"}),
    "t2star": ("T2star", {"t2star", "t2starw"}),
    "ct": ("CT", {"ct"}),
    "pet": ("PET", {"pet"}),
}
AGENT_WORDS = {"ce", "gd", "gad", "gadolinium", "post", "postcontrast"}            # T1_gd, ce-gadolinium_T1w
SEGMENTATION_WORDS = {"seg", "segm", "segmentation"}
LABEL_WORDS = {"mask", "brainmask", "label", "labels", "lesion", "lesions", "tumour", "tumor", "gt", "roi",
               "otmulticlass", "parcellation", "consensus"}
# Caption fields in the order of the prompt template; only those that are known are written.
META_FIELDS = (("age", "Age: {} y"), ("sex", "Sex: {}"), ("TR", "TR: {} ms"), ("TE", "TE: {} ms"),
               ("TI", "TI: {} ms"), ("FA", "FA: {} deg"))
# The same for prompts, whose fields are those of MetaDB's Table 5.
DESCRIPTIONS = {"flair": "FLAIR MRI", "t1": "T1-weighted MRI", "t1ce": "contrast-enhanced T1-weighted MRI",
                "t2": "T2-weighted MRI", "pd": "PD-weighted MRI", "t2star": "T2*-weighted MRI", "ct": "CT", "pet": "PET"}
PROMPT_FIELDS = ("age", "gender", "scanner", "description")
EDITIONS = (("BraTS 2020", r"BraTS20_(Training|Validation)_\d+"), ("BraTS 2021", r"BraTS2021_\d+"),
            ("BraTS 2023", r"BraTS-[A-Za-z]+-\d+-\d+"))                     # all of the brain
PATIENT_SHEETS = ("meta.csv", "patient_info.csv")
PATIENT_COLUMNS = ("PATIENT", "PATIENT_ID")
UNKNOWN = {"", "-", "none", "nan", "n/a", "na", "unknown"}
# brain-development.org/ixi-dataset: IXI002-Guys-0828-T1.nii.gz; the hospital tells the scanner (field in tesla) and
# the times (TR, TE in ms), which IOP has not published.
IXI_FILE = re.compile(r"((IXI\d+)-(Guys|HH|IOP)-\d+)-(T1|T2|PD)\.(?i:nii(\.gz)?)")
IXI_SCANNERS = {"Guys": {"scanner": "Philips", "field": 1.5}, "HH": {"scanner": "Philips", "field": 3.0},
                "IOP": {"scanner": "GE", "field": 1.5}}
IXI_TIMES = {"Guys": {"t1": (9.813, 4.603), "t2": (8178.34, 100), "pd": (8178.34, 8)},
             "HH": {"t1": (9.6, 4.6), "t2": (5725.79, 100), "pd": (5725.79, 8)}}
IXI_COLUMNS = ("IXI_ID", "SEX_ID", "AGE")                                   # the sheet says "SEX_ID (1=m, 2=f)"
# ADNI/002_S_0413/MP-RAGE/2006-11-15_09_47_59.0/I29704/any.nii: person, series, day; time and image id are not needed.
ADNI_FILE = re.compile(r"(?:^|/)(\d{3}_S_\d{4})/([^/]+)/(\d{4}-\d\d-\d\d)_[^/]+/[^/]+/[^/]+$")
ADNI_T1 = re.compile(r"MP.?RAGE|(?:^|_)MPR(?:$|[_-])", re.IGNORECASE)
ADNI_DUAL_ECHO = re.compile(r"PD[^A-Z0-9]*T2|DOUBLE.?TSE", re.IGNORECASE)
# T1 of these sets is a sagittal 3-D scan, T2 and PD are axial slices: resampling those up to T1 would invent slices.
AXIAL_GRID = ("t2", "pd")
SLICE_FILE = re.compile(r"([^/]+)/(train|val|test)/slice_(\d+)\.npy")
OTHER_FORMATS = (".mha", ".mhd", ".nrrd", ".nhdr", ".mat", ".h5", ".hdf5", ".mgz", ".mnc", ".npy", ".npz", ".img",
                 ".png", ".jpg", ".jpeg", ".tif", ".tiff")


@dataclass
class Subject:
    """The files of one subject (a BraTS case, one visit). Splits keep all subjects of one `person` together."""

    name: str
    person: str
    files: dict                                     # contrast -> Path, or a tuple of Paths: .npy slices
    segmentation: Path | None = None
    meta: dict = field(default_factory=dict)        # acquisition and demographics, where a reader knows them
    echoes: dict = field(default_factory=dict)      # contrast -> its echo, where a file holds two; see read_volume
    grid: tuple = ()                                # whose grid to use, best first; by default the first contrast's

    @property
    def in_slices(self):
        """True if the files are .npy slices, not volumes."""
        return any(isinstance(paths, tuple) for paths in self.files.values())

    @property
    def paths(self):
        """Every file of the subject."""
        stacks = [paths if isinstance(paths, tuple) else (paths,) for paths in self.files.values()]
        return [path for stack in stacks for path in stack] + ([self.segmentation] if self.segmentation else [])


@dataclass
class Layout:
    """What find_layout saw in a folder."""

    name: str
    contrasts: tuple
    subjects: list                                  # sorted by name; some may lack contrasts
    ignored: list                                   # files that are no contrast: masks, labels, unknown names
    notes: list                                     # sentences for the user
    skipped: list                                   # (subject, why) that have none of the contrasts
    split: dict | None = None                       # {"train": [names], ...} where the folders say it


def find_layout(folder, contrasts=None):
    """Recognise the data set in `folder` by its names -> Layout.

    contrasts: names to use, in this order (aliases are understood); by default those of at least half of the subjects.
    A wanted contrast that no subject has is noted (it may be the one to synthesise). DataError if the folder is
    missing, a file, empty, holds other formats only, has two subjects of one name or all subjects in one folder, or
    if a wanted name is no contrast or none of the wanted is there.
    """
    folder = Path(folder)
    _require_folder(folder)
    notes = []
    files = _list_files(folder, notes)
    images = [path for path in files if is_nifti(path)]
    subjects, split = _collect_slices(folder, files, notes) if not images else ([], None)
    if split:
        layout = _with_contrasts("slices in .npy files", subjects, _choose_contrasts(folder, subjects, contrasts, notes),
                                 [], notes)
        layout.split = split
        return layout
    if not images:
        raise DataError(_why_no_images(folder, files))
    named = [path for path in images if role_of(path.name, path.parent.name) in CONTRASTS]
    if named and all(IXI_FILE.fullmatch(path.name) for path in named):
        name, (subjects, ignored) = "IXI", _collect_ixi(files, images, notes)
    elif any(ADNI_FILE.search(path.as_posix()) for path in images):
        name, (subjects, ignored) = "ADNI", _collect_adni(images, notes)
    else:
        subjects, ignored = _collect_subjects(folder, images, notes)
        name = _edition(subjects)
        _read_patients(folder, files, subjects, notes)
    if not subjects:
        examples = ", ".join(path.name for path in images[:5])
        raise DataError(f"{folder}: no contrast recognised in {len(images)} NIfTI names such as {examples}; "
                        f"name them with one of the words {', '.join(CONTRASTS)}")
    chosen = _choose_contrasts(folder, subjects, contrasts, notes)
    return _with_contrasts(name, subjects, chosen, ignored, notes)


def _require_folder(folder):
    if folder.is_dir():
        return
    if folder.exists():
        raise DataError(f"{folder}: is a file; give the folder that holds one folder per subject")
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    raise DataError(f"{folder}: does not exist; the nearest existing folder is {parent}, "
                    f"which holds {_entries(parent)}")


def _entries(folder):
    return _few(sorted(entry.name for entry in folder.iterdir())) or "nothing"


def _list_files(folder, notes):
    """All files below folder, sorted. Links to folders are followed, but every folder is entered once (no loops)."""
    found, junk, entered = [], 0, {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, followlinks=True):
        descend = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(root, name))
            if name.startswith(".") or name == "__MACOSX":
                continue
            if real in entered:
                notes.append(f"{os.path.join(root, name)}: leads to a folder that was read already; skipped")
                continue
            entered.add(real)
            descend.append(name)
        folders[:] = descend
        for name in sorted(names):
            if name.startswith("._") or name in (".DS_Store", "Thumbs.db", "desktop.ini"):
                junk += 1
            else:
                found.append(Path(root) / name)
    if junk:
        notes.append(f"{junk} system files (._*, .DS_Store, Thumbs.db) ignored")
    return sorted(found)


def _why_no_images(folder, files):
    """The sentence for a folder without NIfTI."""
    if any(_is_dicom(path) for path in files[:50]):
        return f"{folder}: holds DICOM files; convert with dcm2niix to one folder of NIfTI files per subject"
    others = sorted({path.suffix.lower() for path in files} & set(OTHER_FORMATS))
    if others:
        return f"{folder}: holds {', '.join(others)} files; only .nii and .nii.gz are read, convert them to NIfTI"
    return (f"{folder}: no subjects found; looked for BraTS 2020, 2021, 2023, IXI, ADNI, slices named like "
            "T1/train/slice_0.npy and one folder per subject with one .nii or .nii.gz per contrast; the folder holds "
            f"{_entries(folder)}")


def _is_dicom(path):
    if path.suffix.lower() in (".dcm", ".ima") or path.name.upper() == "DICOMDIR":
        return True
    if path.suffix and not path.suffix[1:].isdigit():
        return False                                                        # scanners write IM0001 or 1.2.840.113
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _collect_subjects(folder, images, notes):
    """Every folder with at least one recognised contrast is a subject -> (subjects sorted by name, ignored files)."""
    by_folder = {}
    for path in images:
        by_folder.setdefault(path.parent, []).append(path)
    subjects, places, ignored = [], {}, []
    for place, paths in sorted(by_folder.items()):
        name = place.name or place.resolve().name
        roles = {}
        for path in paths:
            roles.setdefault(role_of(path.name, name), []).append(path)
        ignored += roles.pop(None, [])
        segmentations = roles.pop("seg", [])
        if not roles:
            ignored += segmentations
            continue
        if min(len(same) for same in roles.values()) > 2:
            raise DataError(f"{place}: holds {len(next(iter(roles.values())))} files of each contrast; "
                            "put every subject into a folder of its own")
        if name in places:
            raise DataError(f"{folder}: subject {name} is there twice, in {places[name]} and {place}; "
                            "rename or remove one")
        places[name] = place
        for role, same in [*roles.items(), ("seg", segmentations)]:
            if len(same) > 1:
                notes.append(f"{name}: {len(same)} files for {role}, {same[0].name} is used, not "
                             + ", ".join(path.name for path in same[1:]))
        subjects.append(Subject(name, person_of(name), {role: same[0] for role, same in roles.items()},
                                segmentations[0] if segmentations else None))
    return sorted(subjects, key=lambda subject: subject.name), sorted(ignored)


def role_of(file_name, subject):
    """What a NIfTI file of `subject` is, by whole words of its name: a contrast, "seg", or None for anything else.

    The subject's own name is removed first (it may contain t1 or ct); names of folders above are never looked at.
    """
    stem = re.sub(r"\.nii(\.gz)?$", "", file_name, flags=re.IGNORECASE).lower()
    own = re.match(re.escape(subject.lower()) + r"(?![a-z0-9])(.+)", stem)
    words = re.findall(r"[a-z0-9]+", own.group(1) if own else stem)
    if SEGMENTATION_WORDS & set(words):
        return "seg"
    if LABEL_WORDS & set(words):
        return None
    text = " ".join(words).replace("t2 flair", "flair").replace("t2 star", "t2star")
    found = [name for name, (_, aliases) in CONTRASTS.items() if aliases & set(text.split())]
    if found == ["t1"] and AGENT_WORDS & set(words):
        return "t1ce"
    return found[0] if len(found) == 1 else None                            # T2_to_FLAIR names two: better none


def person_of(subject):
    """BraTS-GLI-00000-001 is a later visit of the person BraTS-GLI-00000; elsewhere a subject is a person."""
    visit = re.fullmatch(r"(BraTS-[A-Za-z]+-\d+)-\d+", subject)
    return visit.group(1) if visit else subject


def _edition(subjects):
    for name, pattern in EDITIONS:
        if all(re.fullmatch(pattern, subject.name) for subject in subjects):
            for subject in subjects:
                subject.meta["body"] = "brain"
            return name
    return "one folder per subject"


def _read_patients(folder, files, subjects, notes):
    """meta.csv or patient_info.csv beside the subjects' folders -> Subject.meta; what is unknown is left out.

    Columns: patient (or patient_id), and any of age, sex, scanner (or one per contrast: scanner_t2, scanner_ct) and body,
    the part of the body. A patient is a folder's name, or its last number where the sheet has numbers only.
    """
    sheets = [path for path in files if path.parent == folder and path.name.lower() in PATIENT_SHEETS]
    if not sheets:
        return
    rows, columns = _read_sheet(sheets[0])
    patient = next((columns[name] for name in PATIENT_COLUMNS if name in columns), None)
    if patient is None:
        notes.append(f"{sheets[0].name}: has no column patient; age, sex and scanner stay unknown")
        return
    known, contradictory = {}, set()
    for row in rows:
        facts = {column.lower(): fact for column, name in columns.items() if (fact := _fact(column, row[name])) is not None}
        who = (row[patient] or "").strip()
        if who and known.setdefault(who, facts) != facts:
            contradictory.add(who)
    for who in sorted(contradictory):
        known[who] = {}
        notes.append(f"{sheets[0].name}: the rows of {who} contradict each other; its facts stay unknown")
    keys = {subject.name: subject.name for subject in subjects}
    last = {subject.person: re.search(r"(\d+)\D*$", subject.person) for subject in subjects}
    numbers = {person: int(found[1]) for person, found in last.items() if found}
    if all(who.isdecimal() for who in known) and len(set(numbers.values())) == len(last):       # not two patients 1
        known = {int(who): facts for who, facts in known.items()}
        keys = {subject.name: numbers[subject.person] for subject in subjects}
    absent = [subject.name for subject in subjects if keys[subject.name] not in known]
    if absent:
        notes.append(f"{len(absent)} subjects have no row in {sheets[0].name}: {_few(absent)}")
    for subject in subjects:
        subject.meta.update(known.get(keys[subject.name], {}))


def _fact(column, cell):
    """What a cell of a patients' sheet says: age in years, "M" or "F", or words; None if it is unknown."""
    cell = (cell or "").strip()
    if column == "AGE":
        return _positive(cell)
    if column == "SEX":
        return {"m": "M", "male": "M", "f": "F", "female": "F"}.get(cell.lower())
    return cell if column.startswith(("SCANNER", "BODY")) and cell.lower() not in UNKNOWN else None


def _read_sheet(sheet):
    """A .csv file, whatever its separator -> (rows, {column, its first word in upper case: its name in the rows})."""
    try:
        lines = sheet.read_text(encoding="utf-8-sig", errors="replace").replace("\0", "").splitlines()
    except OSError as error:
        raise DataError(f"{sheet}: cannot be read ({error.strerror or error}); repair or remove it") from None
    rows = csv.DictReader(lines, delimiter=max(",;\t", key=lines[0].count) if lines else ",")
    return rows, {name.strip().split(" ")[0].upper(): name for name in rows.fieldnames or ()}


def _few(names):
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def canonical_contrast(name):
    """t1gd -> t1ce; a name that is no alias is returned in lower case."""
    lower = name.lower()
    return next((contrast for contrast, (_, aliases) in CONTRASTS.items() if lower in aliases), lower)


def _choose_contrasts(folder, subjects, wanted, notes):
    counts = {name: sum(name in subject.files for subject in subjects) for name in CONTRASTS}
    there = {name: count for name, count in counts.items() if count}
    if wanted is not None:
        chosen = tuple(canonical_contrast(name) for name in wanted)
        unknown = [name for name, contrast in zip(wanted, chosen) if contrast not in CONTRASTS]
        if unknown or not set(chosen) & set(there):
            raise DataError(f"{folder}: no contrast {', '.join(unknown or wanted) or 'chosen'}; "
                            f"there are {', '.join(there)}", status=2)
        if len(set(chosen)) < len(chosen):
            raise DataError(f"{folder}: a contrast is named twice in {', '.join(wanted)}; name each once", status=2)
        notes += [f"{name}: no subject has it; there are {', '.join(there)}" for name in chosen if name not in there]
        return chosen
    common = tuple(name for name, count in there.items() if 2 * count >= len(subjects)) or tuple(there)
    for name, count in there.items():
        if name not in common:
            notes.append(f"{name}: in {count} of {len(subjects)} subjects only, not used unless asked for")
    return common


def _with_contrasts(name, subjects, contrasts, ignored, notes):
    """Keep the chosen contrasts of every subject, note what is missing."""
    kept, skipped, lacking = [], [], {}
    for subject in subjects:
        subject.files = {contrast: subject.files[contrast] for contrast in contrasts if contrast in subject.files}
        missing = [contrast for contrast in contrasts if contrast not in subject.files]
        if not subject.files:
            skipped.append((subject.name, f"has none of {', '.join(contrasts)}"))
            continue
        if missing:
            lacking.setdefault(", ".join(missing), []).append(subject.name)
        kept.append(subject)
    notes += [f"{len(names)} subjects lack {missing}: {_few(names)}" for missing, names in lacking.items()]
    return Layout(name, contrasts, kept, ignored, notes, skipped)


# ---- IXI -------------------------------------------------------------------------------------------------------------

def _collect_ixi(files, images, notes):
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
        notes.append(f"{len(absent)} subjects have no row in the sheet of IXI: {_few(absent)}")
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
    rows, columns = _read_sheet(sheet)
    if not set(IXI_COLUMNS) <= set(columns):
        notes.append(f"{sheet.name}: has no columns {', '.join(IXI_COLUMNS)}; age and sex stay unknown")
        return {}
    people, contradictory = {}, set()
    for row in rows:
        number, sex, age = (_positive(row[columns[key]]) for key in IXI_COLUMNS)
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


def _positive(cell):
    """The number in a cell, with decimal point or comma; None if there is none or 0, by which IXI means unknown."""
    try:
        value = float(cell.strip().replace(",", "."))
    except (AttributeError, ValueError):                                    # a short row has None there
        return None
    return value if 0 < value < 1000 else None


# ---- ADNI ------------------------------------------------------------------------------------------------------------

def _collect_adni(images, notes):
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


# ---- Slices that are cut and split already ---------------------------------------------------------------------------

def _collect_slices(folder, files, notes):
    """T1/train/slice_0.npy, T2/train/slice_0.npy, ... -> (subjects, split), no split without such files.

    This is the layout of SelfRDB (github.com/icon-lab/SelfRDB). Slice i is the same place in every contrast. Whose slice
    it is, may stand in subject_ids.yaml, for the test part; other parts, and a test part without, are one subject each.
    """
    stacks, others = {}, []
    for path in files:
        place = SLICE_FILE.fullmatch(path.relative_to(folder).as_posix())
        contrast = place and role_of(place[1], "")
        if contrast in CONTRASTS:
            stack = stacks.setdefault(place[2], {}).setdefault(contrast, {})
            if stack.setdefault(int(place[3]), path) != path:
                raise DataError(f"{path}: is {contrast} of the same slice as {stack[int(place[3])]}; remove one of them")
        elif path.suffix == ".npy":
            others.append(path)
    if not stacks:
        return [], None
    if not {"train", "test"} <= set(stacks):
        raise DataError(f"{folder}: has slices for {', '.join(stacks)} only; train and test are needed")
    if others:
        notes.append(f"{len(others)} other .npy files are not used, e.g. {others[0]}")
    contrasts = sorted({contrast for stack in stacks.values() for contrast in stack})
    subjects, split = [], {"train": [], "val": [], "test": []}
    for part, stack in sorted(stacks.items()):
        numbers = sorted({number for of in stack.values() for number in of})
        for contrast in contrasts:
            lacks = [number for number in numbers if number not in stack.get(contrast, {})]
            if lacks:
                raise DataError(f"{folder}: {contrast} has no {part}/slice_{lacks[0]}.npy, as {next(iter(stack))} has; "
                                "each contrast needs the same slices")
        owners = _slice_owners(folder, len(numbers)) if part == "test" else None
        if owners is None:
            notes.append(f"{part}: it is not known whose slices these are, they count as one subject"
                         + ("; statistics over subjects are impossible" if part == "test" else ""))
        names = [part] * len(numbers) if owners is None else [f"{part}_{owner}" for owner in owners]
        split[part] = sorted(set(names))
        for name in split[part]:
            own = [number for number, of in zip(numbers, names) if of == name]
            subjects.append(Subject(name, name, {c: tuple(stack[c][number] for number in own) for c in contrasts}))
    return subjects, split


def _slice_owners(folder, count):
    """The subject of each of `count` test slices, in order of their numbers; None if no file says it.

    A list in YAML (lines "- 3", or [3, 3, 4]), in JSON, or one name per line; nothing else of YAML is understood.
    """
    paths = [folder / f"subject_ids{ending}" for ending in (".yaml", ".yml", ".json", ".txt")]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    lines = [line.split("#")[0] for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
    items = [re.sub(r"^\s*-\s", "", item).strip(" '\"") for item in re.split(r"[\n,\[\]]", "\n".join(lines))]
    owners = [item for item in items if item not in ("", "---")]
    if len(owners) != count:
        raise DataError(f"{path}: names {len(owners)} subjects for {count} test slices; write a plain list, one per slice")
    return owners


# ---- Captions and prompts --------------------------------------------------------------------------------------------

def caption(contrast, position, brain, lesion=None, meta=None):
    """One line of text for one slice, e.g. "Modality: FLAIR; Plane: axial; Slice: 0.42; Brain: 0.31; Lesion: none".

    position: 0 (lowest) to 1 (highest kept slice); brain: area fraction; lesion: from `describe_lesion`, None if no
    segmentation exists; meta: known fields only (age in years, sex, TR, TE, TI in ms, FA in degrees).
    """
    parts = [f"Modality: {CONTRASTS[contrast][0]}"]
    parts += [form.format(_number(meta[key])) for key, form in META_FIELDS if meta and meta.get(key) is not None]
    parts += ["Plane: axial", f"Slice: {position:.2f}", f"Brain: {brain:.2f}"]
    return "; ".join(parts + ([f"Lesion: {lesion}"] if lesion is not None else []))


def prompt(contrast, meta, fields=PROMPT_FIELDS, masked=()):
    """One line of text for a scan (MetaDB, Sec. 4.3.3), the same for all of its slices; "" without fields. For example

    "Age: 35; Gender: F; Scanner: Philips 1.5T; Description: T2-weighted MRI of the brain, TR 8178 ms, TE 100 ms"

    meta: Subject.meta. fields: of PROMPT_FIELDS; the others are left out, whereas a value that is not known is None.
    masked: fields whose value becomes [MASK], or "modality": in the description the words for it and the numbers that
    give it away, and a scanner that belongs to this contrast alone. DataError for other names.
    """
    unknown = (set(fields) - set(PROMPT_FIELDS)) | (set(masked) - {*PROMPT_FIELDS, "modality"})
    if unknown:
        raise DataError(f"prompt: there is no {', '.join(sorted(unknown))}; there are {', '.join(PROMPT_FIELDS)}", status=2)
    hidden = "modality" in masked
    masked = {*masked, *(("scanner",) if hidden and f"scanner_{contrast}" in meta else ())}
    scanner = meta.get(f"scanner_{contrast}", meta.get("scanner"))
    parts = [("[MASK]" if hidden else DESCRIPTIONS[contrast]) + (f" of the {meta['body']}" if "body" in meta else "")]
    for name, time in zip(("TR", "TE"), meta.get("times", {}).get(contrast, ())):
        parts.append(f"{name} {'[MASK]' if hidden else _number(time, digits=4)} ms")
    values = {"age": int(meta["age"]) if "age" in meta else None, "gender": meta.get("sex"),
              "scanner": f"{scanner} {_number(meta['field'])}T" if scanner and "field" in meta else scanner,
              "description": ", ".join(parts)}
    return "; ".join(f"{name.capitalize()}: {'[MASK]' if name in masked else value}" for name, value in values.items()
                     if name in fields)


def _number(value, digits=6):
    """So many significant digits, without trailing zeros or exponent; words pass."""
    if isinstance(value, str):
        return value
    return np.format_float_positional(value, precision=digits, unique=False, fractional=False, trim="-")


def describe_lesion(labels, midline, pixel_area):
    """"none", or side and area such as "left, 412 mm2"; left is the patient's left.

    labels: (H, W) of an upright radiological slice, > 0 is lesion; midline: column of the brain's middle;
    pixel_area: mm2. A side needs three quarters of the area, otherwise the lesion is on both sides.
    """
    columns = np.nonzero(labels > 0)[1]
    if columns.size == 0:
        return "none"
    left = np.mean(columns > midline)                                       # column 0 is the patient's right
    side = "left" if left >= 0.75 else "right" if left <= 0.25 else "both sides"
    return f"{side}, {columns.size * pixel_area:.0f} mm2"
