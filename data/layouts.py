"""Which file is which: the naming of data sets on disk, and the sentence that describes a slice. No voxel is read here.

BraTS 2020, 2021 and 2023+ are read as downloaded, and so is any tree with one folder per subject and one NIfTI file
per contrast. They share one reader, because after the subject's own name is taken off a file name, the contrast is a
whole word of what remains; editions differ in the words only (table below). IXI, with a folder per contrast, and
ADNI-1, with a folder per series and two contrasts in one file, have readers of their own.
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
EDITIONS = (("BraTS 2020", r"BraTS20_(Training|Validation)_\d+"), ("BraTS 2021", r"BraTS2021_\d+"),
            ("BraTS 2023", r"BraTS-[A-Za-z]+-\d+-\d+"))
# brain-development.org/ixi-dataset: IXI002-Guys-0828-T1.nii.gz; the hospital tells the scanner (field in tesla).
IXI_FILE = re.compile(r"((IXI\d+)-(Guys|HH|IOP)-\d+)-(T1|T2|PD)\.(?i:nii(\.gz)?)")
IXI_SCANNERS = {"Guys": {"scanner": "Philips", "field": 1.5}, "HH": {"scanner": "Philips", "field": 3.0},
                "IOP": {"scanner": "GE", "field": 1.5}}
IXI_COLUMNS = ("IXI_ID", "SEX_ID", "AGE")                                   # the sheet says "SEX_ID (1=m, 2=f)"
# ADNI/002_S_0413/MP-RAGE/2006-11-15_09_47_59.0/I29704/any.nii: person, series, day; time and image id are not needed.
ADNI_FILE = re.compile(r"(?:^|/)(\d{3}_S_\d{4})/([^/]+)/(\d{4}-\d\d-\d\d)_[^/]+/[^/]+/[^/]+$")
ADNI_T1 = re.compile(r"MP.?RAGE|(?:^|_)MPR(?:$|[_-])", re.IGNORECASE)
ADNI_DUAL_ECHO = re.compile(r"PD[^A-Z0-9]*T2|DOUBLE.?TSE", re.IGNORECASE)
# T1 of these sets is a sagittal 3-D scan, T2 and PD are axial slices: resampling those up to T1 would invent slices.
AXIAL_GRID = ("t2", "pd")
OTHER_FORMATS = (".mha", ".mhd", ".nrrd", ".nhdr", ".mat", ".h5", ".hdf5", ".mgz", ".mnc", ".npy", ".npz", ".img",
                 ".png", ".jpg", ".jpeg", ".tif", ".tiff")


@dataclass
class Subject:
    """The files of one subject (a BraTS case, one visit). Splits keep all subjects of one `person` together."""

    name: str
    person: str
    files: dict                                     # contrast -> Path
    segmentation: Path | None = None
    meta: dict = field(default_factory=dict)        # acquisition and demographics, where a reader knows them
    echoes: dict = field(default_factory=dict)      # contrast -> its echo, where a file holds two; see read_volume
    grid: tuple = ()                                # whose grid to use, best first; by default the first contrast's


@dataclass
class Layout:
    """What find_layout saw in a folder."""

    name: str
    contrasts: tuple
    subjects: list                                  # sorted by name; some may lack contrasts
    ignored: list                                   # files that are no contrast: masks, labels, unknown names
    notes: list                                     # sentences for the user
    skipped: list                                   # (subject, why) that have none of the contrasts


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
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"


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
    return (f"{folder}: no subjects found; looked for BraTS 2020, 2021, 2023, IXI, ADNI and one folder per "
            f"subject with one .nii or .nii.gz per contrast; the folder holds {_entries(folder)}")


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
            return name
    return "one folder per subject"


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
    for missing, names in lacking.items():
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        notes.append(f"{len(names)} subjects lack {missing}: {', '.join(names[:5])}{more}")
    return Layout(name, contrasts, kept, ignored, notes, skipped)


# ---- IXI -------------------------------------------------------------------------------------------------------------

def _collect_ixi(files, images, notes):
    """IXI's own names, in whatever folders -> (subjects sorted by name, ignored files: MRA, DTI and others)."""
    subjects, ignored = {}, []
    demographics = _read_ixi_sheet(files, notes)
    for path in images:
        parts = IXI_FILE.fullmatch(path.name)
        if not parts:
            ignored.append(path)
            continue
        name, person, site = parts[1], parts[2], parts[3]
        meta = {"site": site, **IXI_SCANNERS[site], **demographics.get(person, {})}
        subject = subjects.setdefault(name, Subject(name, person, {}, meta=meta, grid=AXIAL_GRID))
        contrast = parts[4].lower()
        if contrast in subject.files:
            raise DataError(f"{path}: {name} has another {contrast}, {subject.files[contrast]}; remove one of them")
        subject.files[contrast] = path
    absent = [name for name, subject in sorted(subjects.items()) if subject.person not in demographics]
    if demographics and absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        notes.append(f"{len(absent)} subjects have no row in the sheet of IXI: {', '.join(absent[:5])}{more}")
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
    try:
        lines = sheet.read_text(encoding="utf-8-sig", errors="replace").replace("\0", "").splitlines()
    except OSError as error:
        raise DataError(f"{sheet}: cannot be read ({error.strerror or error}); repair or remove it") from None
    rows = csv.DictReader(lines, delimiter=max(",;\t", key=lines[0].count) if lines else ",")
    columns = {name.strip().split(" ")[0].upper(): name for name in rows.fieldnames or ()}
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
        subject = Subject(f"{person}_{day}", person, {}, grid=AXIAL_GRID)
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


# ---- Captions --------------------------------------------------------------------------------------------------------

def caption(contrast, position, brain, lesion=None, meta=None):
    """One line of text for one slice, e.g. "Modality: FLAIR; Plane: axial; Slice: 0.42; Brain: 0.31; Lesion: none".

    position: 0 (lowest) to 1 (highest kept slice); brain: area fraction; lesion: from `describe_lesion`, None if no
    segmentation exists; meta: known fields only (age in years, sex, TR, TE, TI in ms, FA in degrees).
    """
    parts = [f"Modality: {CONTRASTS[contrast][0]}"]
    parts += [form.format(_number(meta[key])) for key, form in META_FIELDS if meta and meta.get(key) is not None]
    parts += ["Plane: axial", f"Slice: {position:.2f}", f"Brain: {brain:.2f}"]
    return "; ".join(parts + ([f"Lesion: {lesion}"] if lesion is not None else []))


def _number(value):
    """Six significant digits without trailing zeros or exponent; words pass."""
    if isinstance(value, str):
        return value
    return np.format_float_positional(value, precision=6, unique=False, fractional=False, trim="-")


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
