"""Which file is which: the naming of data sets on disk. No voxel is read here.

One file per family of data sets: folders, ixi, adni, slices. What they share is in words.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from data.files import DataError, is_nifti
from data.layouts.adni import ADNI_FILE, collect_adni
from data.layouts.folders import collect_subjects, edition_of, person_of, read_patients
from data.layouts.ixi import IXI_FILE, collect_ixi
from data.layouts.slices import collect_slices
from data.layouts.words import CONTRASTS, Subject, canonical_contrast, few, role_of

__all__ = ["CONTRASTS", "Layout", "Subject", "canonical_contrast", "find_layout", "person_of", "role_of"]

OTHER_FORMATS = (".mha", ".mhd", ".nrrd", ".nhdr", ".mat", ".h5", ".hdf5", ".mgz", ".mnc", ".npy", ".npz", ".img",
                 ".png", ".jpg", ".jpeg", ".tif", ".tiff")


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
    subjects, split = collect_slices(folder, files, notes) if not images else ([], None)
    if split:
        layout = _with_contrasts("slices in .npy files", subjects, _choose_contrasts(folder, subjects, contrasts, notes),
                                 [], notes)
        layout.split = split
        return layout
    if not images:
        raise DataError(_why_no_images(folder, files))
    named = [path for path in images if role_of(path.name, path.parent.name) in CONTRASTS]
    if named and all(IXI_FILE.fullmatch(path.name) for path in named):
        name, (subjects, ignored) = "IXI", collect_ixi(files, images, notes)
    elif any(ADNI_FILE.search(path.as_posix()) for path in images):
        name, (subjects, ignored) = "ADNI", collect_adni(images, notes)
    else:
        subjects, ignored = collect_subjects(folder, images, notes)
        name = edition_of(subjects)
        read_patients(folder, files, subjects, notes)
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
    return few(sorted(entry.name for entry in folder.iterdir())) or "nothing"


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
    notes += [f"{len(names)} subjects lack {missing}: {few(names)}" for missing, names in lacking.items()]
    return Layout(name, contrasts, kept, ignored, notes, skipped)
