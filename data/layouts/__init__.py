"""Which file is which: the names of files and folders in data sets. No voxel is read here.

Each family of data sets has a reader of its own, in folders.py, bids.py, ixi.py, adni.py,
hecktor.py, mamamia.py, autopet.py and slices.py. A user can also say which file is which, see
manifest.py. What they share is in words.py. Sheets beside the scans are read in sheets.py.
records.py and sidecars.py tell what is known of a scan. find_layout looks at a folder and calls the
reader that fits.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from data.files import DataError, is_nifti
from data.layouts.adni import ADNI_FILE, collect_adni
from data.layouts.autopet import AUTOPET_FILE, collect_autopet
from data.layouts.bids import collect_bids, is_bids
from data.layouts.folders import (
    collect_subjects,
    edition_of,
    person_of,
    take_tumour_masks,
)
from data.layouts.hecktor import HECKTOR_FILE, collect_hecktor
from data.layouts.ixi import IXI_FILE, collect_ixi
from data.layouts.mamamia import MAMAMIA_FILE, collect_mamamia
from data.layouts.manifest import collect_manifest
from data.layouts.sheets import read_labels, read_patients, read_suv_factors
from data.layouts.slices import collect_slices
from data.layouts.words import (
    BODY_CONTRASTS,
    CONTRASTS,
    Subject,
    canonical_contrast,
    few,
    preferred_grid,
    role_of,
)

__all__ = ["CONTRASTS", "Layout", "Subject", "canonical_contrast", "find_layout", "person_of",
           "role_of"]

# The names of layouts that have sheets of their own about the patients, or none.
OWN_FACTS = ("IXI", "ADNI", "manifest.csv", "BIDS", "BIDS derivative")
# We cannot read these, so a folder that holds only these gets its own sentence.
OTHER_FORMATS = (".mha", ".mhd", ".nrrd", ".nhdr", ".mat", ".h5", ".hdf5", ".mgz", ".mnc", ".npy",
                 ".npz", ".img", ".png", ".jpg", ".jpeg", ".tif", ".tiff")


@dataclass
class Layout:
    """What find_layout saw in a folder."""

    name: str                       # of the data set, for the user
    contrasts: tuple
    subjects: list                  # of Subject, sorted by name; some may lack contrasts
    ignored: list                   # files that are no contrast: masks, labels, unknown names
    notes: list                     # sentences for the user
    skipped: list                   # (name of a subject that has none of the contrasts, why)
    split: dict | None = None       # {"train": [names], ...} if the folders say it


def find_layout(folder, contrasts=None, every=False):
    """Recognise the data set in `folder` by its names -> Layout.

    contrasts: The names of contrasts to use, in this order. Other words for a contrast are
        understood. By default we use the contrasts that at least half of the subjects have. If no
        subject has a wanted contrast, this is noted only; it may be the one to synthesise.
    every: True if by default all contrasts are used that at least two subjects have.
    DataError if the folder is missing, is a file, is empty, or holds other formats only. It is also
    raised if two subjects have one name, if all subjects lie in one folder, if a wanted name is no
    contrast, or if none of the wanted contrasts is there.
    """
    folder = Path(folder)
    _require_folder(folder)
    notes = []
    files = _list_files(folder, notes)
    images = [path for path in files if is_nifti(path)]
    manifest = folder / "manifest.csv" in files
    if not images and not manifest:
        return _find_slices(folder, files, contrasts, every, notes)
    named = [path for path in images if role_of(path.name, path.parent.name) in CONTRASTS]
    if manifest:
        name = "manifest.csv"
        subjects = collect_manifest(folder, notes)
        used = {path for subject in subjects for path in subject.paths}
        ignored = [path for path in images if path not in used]
    elif is_bids(folder, images):
        name, subjects, ignored = collect_bids(folder, images, notes)
    elif named and all(IXI_FILE.fullmatch(path.name) for path in named):
        name = "IXI"
        subjects, ignored = collect_ixi(files, images, notes)
    elif any(ADNI_FILE.search(path.as_posix()) for path in images):
        name = "ADNI"
        subjects, ignored = collect_adni(images, notes)
    elif any(HECKTOR_FILE.fullmatch(path.name) for path in images):
        name = "HECKTOR"
        subjects, ignored = collect_hecktor(images, notes)
    elif any(MAMAMIA_FILE.fullmatch(path.name) for path in images):
        name = "MAMA-MIA"
        subjects, ignored = collect_mamamia(images, notes)
    elif any(AUTOPET_FILE.search(path.as_posix()) for path in images):
        name = "autoPET"
        subjects, ignored = collect_autopet(folder, images, notes)
    else:
        subjects, ignored = collect_subjects(folder, images, notes)
        name = edition_of(subjects)
    if not subjects:
        examples = ", ".join(path.name for path in images[:5])
        raise DataError(f"{folder}: no contrast recognised in {len(images)} NIfTI names such as "
                        f"{examples}; name them with one of the words {', '.join(CONTRASTS)}")
    if name not in OWN_FACTS:
        read_patients(folder, files, subjects, notes)
    read_labels(folder, files, subjects, notes)
    chosen = _choose_contrasts(folder, subjects, contrasts, every, notes)
    if "pet" in chosen:
        notes.append("pet is read in SUV; 0 to 10 SUV become 0 to 1")
        read_suv_factors(folder, files, subjects, notes)
    layout = _with_contrasts(name, subjects, chosen, ignored, every, notes)
    if not BODY_CONTRASTS.isdisjoint(chosen):
        layout.ignored = take_tumour_masks(layout.subjects, chosen, ignored, notes)
    return layout


def _find_slices(folder, files, contrasts, every, notes):
    """The layout of a folder of .npy slices. DataError if the folder holds none."""
    subjects, split = collect_slices(folder, files, notes)
    if split is None:
        raise DataError(_why_no_images(folder, files))
    chosen = _choose_contrasts(folder, subjects, contrasts, every, notes)
    layout = _with_contrasts("slices in .npy files", subjects, chosen, [], every, notes)
    layout.split = split
    return layout


# ---- Files ---------------------------------------------------------------------------------------

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
    return few(sorted(entry.name for entry in folder.iterdir())) or "nothing"


def _list_files(folder, notes):
    """All files below a folder, sorted.

    Links to folders are followed. Every folder is entered once, so links cannot make a loop.
    """
    found = []
    junk = 0
    entered = {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, followlinks=True):
        descend = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(root, name))
            if name.startswith(".") or name == "__MACOSX":
                continue
            if real in entered:
                notes.append(f"{os.path.join(root, name)}: leads to a folder that was read "
                             "already; skipped")
                continue
            entered.add(real)
            descend.append(name)
        folders[:] = descend            # os.walk goes into the folders that are in this list
        for name in sorted(names):
            if name.startswith("._") or name in (".DS_Store", "Thumbs.db", "desktop.ini"):
                junk += 1
            else:
                found.append(Path(root) / name)
    if junk:
        notes.append(f"{junk} system files (._*, .DS_Store, Thumbs.db) ignored")
    return sorted(found)


def _why_no_images(folder, files):
    """The sentence for a folder without NIfTI files."""
    if any(_is_dicom(path) for path in files[:50]):
        return (f"{folder}: holds DICOM files; convert with dcm2niix to one folder of NIfTI files "
                "per subject")
    suffixes = {path.suffix.lower() for path in files}
    others = sorted(suffixes & set(OTHER_FORMATS))
    if others:
        return (f"{folder}: holds {', '.join(others)} files; only .nii and .nii.gz are read, "
                "convert them to NIfTI")
    return (f"{folder}: no subjects found; looked for BIDS, BraTS 2020, 2021, 2023, IXI, ADNI, "
            "HECKTOR, MAMA-MIA, autoPET, slices named like T1/train/slice_0.npy and one folder per "
            "subject with one .nii or .nii.gz per contrast; the folder holds "
            f"{_entries(folder)}")


def _is_dicom(path):
    if path.suffix.lower() in (".dcm", ".ima") or path.name.upper() == "DICOMDIR":
        return True
    if path.suffix and not path.suffix[1:].isdigit():
        return False                    # scanners write names such as IM0001 or 1.2.840.113
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


# ---- Contrasts -----------------------------------------------------------------------------------

def _choose_contrasts(folder, subjects, wanted, every, notes):
    """The wanted contrasts under the project's names, or those that enough subjects have.

    Enough are half of the subjects. If `every` is True, two are enough.
    """
    there = {}
    for name in CONTRASTS:
        count = sum(name in subject.files for subject in subjects)
        if count:
            there[name] = count
    if wanted is not None:
        return _wanted_contrasts(folder, there, wanted, notes)
    enough = 2 if every else len(subjects) / 2
    common = tuple(name for name, count in there.items() if count >= enough)
    common = common or tuple(there)
    for name, count in there.items():
        if name not in common:
            notes.append(f"{name}: in {count} of {len(subjects)} subjects only, "
                         "not used unless asked for")
    return common


def _wanted_contrasts(folder, there, wanted, notes):
    chosen = tuple(canonical_contrast(name) for name in wanted)
    unknown = [name for name, contrast in zip(wanted, chosen) if contrast not in CONTRASTS]
    if unknown or not set(chosen) & set(there):
        raise DataError(f"{folder}: no contrast {', '.join(unknown or wanted) or 'chosen'}; "
                        f"there are {', '.join(there)}", status=2)
    if len(set(chosen)) < len(chosen):
        raise DataError(f"{folder}: a contrast is named twice in {', '.join(wanted)}; "
                        "name each once", status=2)
    for name in chosen:
        if name not in there:
            notes.append(f"{name}: no subject has it; there are {', '.join(there)}")
    return chosen


def _with_contrasts(name, subjects, contrasts, ignored, every, notes):
    """Keep the chosen contrasts of every subject, and note what is missing -> Layout."""
    kept = []
    skipped = []
    grid = preferred_grid(contrasts)
    pets = [subject.files["pet"] for subject in subjects if "pet" in subject.files]
    lacking = {}                        # missing contrasts -> names of the subjects
    for subject in subjects:
        chosen = [contrast for contrast in contrasts if contrast in subject.files]
        missing = [contrast for contrast in contrasts if contrast not in subject.files]
        subject.files = {contrast: subject.files[contrast] for contrast in chosen}
        if set(subject.grid).isdisjoint(contrasts):
            subject.grid = grid or subject.grid
        if pets and grid == ("pet",) and "pet" not in chosen:
            subject.like = pets[0]
        if not chosen:
            skipped.append((subject.name, f"has none of {', '.join(contrasts)}"))
            continue
        if missing:
            lacking.setdefault(", ".join(missing), []).append(subject.name)
        kept.append(subject)
    if every:                           # gaps are usual then, and numbers tell more than names
        counts = []
        for contrast in contrasts:
            count = sum(contrast in subject.files for subject in kept)
            counts.append(f"{contrast} {count}")
        notes.append(f"scans: {', '.join(counts)}")
        lacking = {}
    for missing, names in lacking.items():
        notes.append(f"{len(names)} subjects lack {missing}: {few(names)}")
    return Layout(name, contrasts, kept, ignored, notes, skipped)
