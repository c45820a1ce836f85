"""Which file is which: the naming of data sets on disk, and the sentence that describes a slice. No voxel is read here.

BraTS 2020, 2021 and 2023+ are read as downloaded, and so is any tree with one folder per subject and one NIfTI file
per contrast. They share one reader, because after the subject's own name is taken off a file name, the contrast is a
whole word of what remains; editions differ in the words only (table below).
"""

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
    subjects, ignored = _collect_subjects(folder, images, notes)
    if not subjects:
        examples = ", ".join(path.name for path in images[:5])
        raise DataError(f"{folder}: no contrast recognised in {len(images)} NIfTI names such as {examples}; "
                        f"name them with one of the words {', '.join(CONTRASTS)}")
    chosen = _choose_contrasts(folder, subjects, contrasts, notes)
    return _with_contrasts(_edition(subjects), subjects, chosen, ignored, notes)


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
    return (f"{folder}: no subjects found; looked for BraTS 2020, 2021, 2023 and one folder per subject with one "
            f".nii or .nii.gz per contrast; the folder holds {_entries(folder)}")


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
