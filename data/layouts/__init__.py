"""Which file is which: the names of files and folders in data sets. No voxel is read here.

Each family of data sets has a reader of its own in this folder, and what they share is in words.py.
A user can also say which file is which, see manifest.py and reports_table.py. Sheets beside the
scans are read in sheets.py. records.py and sidecars.py tell what is known of a scan. find_layout
looks at a folder and calls the reader that fits.

In all these files, `folder` is that of the data set, `files` are the paths of all files in it,
`images` are the paths of its NIfTI files, and `notes` is a list that gets sentences for the user.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from data.files import DataError, is_nifti, is_picture
from data.layouts.acdc import collect_acdc, is_acdc
from data.layouts.adni import ADNI_FILE, collect_adni
from data.layouts.autopet import AUTOPET_FILE, collect_autopet
from data.layouts.bids import collect_bids, is_bids
from data.layouts.by_name import collect_by_name, is_by_name
from data.layouts.chestxray14 import collect_chestxray14, is_chestxray14
from data.layouts.chexpert import (
    collect_chexpert,
    collect_rsna,
    collect_siim,
    is_chexpert,
    is_rsna,
    is_siim,
)
from data.layouts.choice import real_scans, take_tracer_as_pet
from data.layouts.folders import (
    collect_subjects,
    edition_of,
    take_tumour_masks,
)
from data.layouts.hecktor import HECKTOR_FILE, collect_hecktor
from data.layouts.ixi import collect_ixi, is_ixi
from data.layouts.mamamia import MAMAMIA_FILE, collect_mamamia
from data.layouts.manifest import collect_manifest
from data.layouts.medicat import collect_medicat, is_medicat
from data.layouts.mimic import collect_mimic, is_mimic
from data.layouts.nnunet import collect_nnunet, is_nnunet
from data.layouts.openi import collect_openi, is_openi
from data.layouts.people import person_of, settle_names, split_of_folders
from data.layouts.r2gen import collect_r2gen, is_r2gen
from data.layouts.reports_table import collect_reports_table, is_reports_table
from data.layouts.sheets import read_labels, read_patients, read_suv_factors
from data.layouts.slices import collect_slices
from data.layouts.sliver07 import collect_sliver07, is_sliver07
from data.layouts.words import (
    BODY_CONTRASTS,
    CONTRASTS,
    TEXT,
    Subject,
    canonical_contrast,
    canonical_contrasts,
    few,
    preferred_grid,
    role_of,
)
from data.metaimage import is_metaimage
from data.reports import prepare_reports

__all__ = ["CONTRASTS", "TEXT", "Layout", "Subject", "canonical_contrast", "find_layout",
           "folders_of", "name_of", "person_of", "role_of"]

# The names of layouts that have sheets of their own about the patients, or none.
OWN_FACTS = ("IXI", "ADNI", "manifest.csv", "BIDS", "BIDS derivative")
# Sets with X-rays, reports or a split of their own, in the order in which they are looked for: the
# name, a function from (folder, files) to True if it is this set, and its reader. A reader gets
# (folder, files, notes) and returns (subjects, split or None).
WITH_REPORTS = (("R2Gen packaging", is_r2gen, collect_r2gen),
                ("reports.csv", is_reports_table, collect_reports_table),
                ("ChestX-ray14", is_chestxray14, collect_chestxray14),
                ("IU X-ray", is_openi, collect_openi),
                ("MIMIC-CXR", is_mimic, collect_mimic),
                ("CheXpert", is_chexpert, collect_chexpert),
                ("SIIM", is_siim, collect_siim),
                ("RSNA", is_rsna, collect_rsna),
                ("MedICaT", is_medicat, collect_medicat),
                ("ACDC", is_acdc, collect_acdc),
                ("SLIVER07", is_sliver07, collect_sliver07))
# The names of layouts in which folders called train or test are no split.
OWN_SPLIT = ("manifest.csv", *(name for name, _, _ in WITH_REPORTS))
# We cannot read these, so a folder that holds only these gets its own sentence.
OTHER_FORMATS = (".nrrd", ".nhdr", ".mat", ".h5", ".hdf5", ".mgz", ".mnc", ".npy", ".npz", ".img",
                 ".tif", ".tiff")


@dataclass
class Layout:
    """What find_layout saw in a folder."""

    name: str                       # of the data set, for the user
    contrasts: tuple
    subjects: list                  # of Subject, sorted by name; some may lack contrasts
    ignored: list                   # files that are no contrast: masks, labels, unknown names
    notes: list                     # sentences for the user
    skipped: list                   # (name of a subject that has none of the contrasts, why)
    split: dict | None = None       # {"train": [names], ...} if the data set says it


def find_layout(folder, contrasts=None, every=False, texts=False):
    """Recognise the data set in `folder` by its names -> Layout.

    contrasts: The names of contrasts to use, in this order. Other words for a contrast are
        understood. By default we use the contrasts that at least half of the subjects have. If no
        subject has a wanted contrast, this is noted only; it may be the one to synthesise.
    every: True if by default all contrasts are used that at least two subjects have.
    folder: It may be several, separated by commas; see _find_several.
    texts: True if reports count as a contrast, which is called "text". By default it is then the
        first of the contrasts, if at least two subjects have a report. Otherwise no subject has it.
    DataError if the folder is missing, is a file, is empty, or holds other formats only. It is also
    raised if two subjects have one name or a name that cannot be a path, if all subjects lie in one
    folder and file names do not tell them apart, if a wanted name is no contrast, or if none of the
    wanted contrasts is there.
    """
    folders = folders_of(folder)
    if len(folders) > 1:
        return _find_several(folders, contrasts, every, texts)
    folder = Path(folder)
    _require_folder(folder)
    notes = []
    files = _list_files(folder, notes)
    images = [path for path in files if is_nifti(path)]
    # Beside NIfTI files, MetaImages may be the originals from which these were converted.
    images = images or [path for path in files if is_metaimage(path)]
    name, subjects, ignored, split = _read_subjects(folder, files, images, notes)
    if name is None:
        return _find_slices(folder, files, contrasts, every, notes, texts)
    if not subjects:
        examples = ", ".join(path.name for path in images[:5])
        raise DataError(f"{folder}: no contrast recognised in {len(images)} volumes such as "
                        f"{examples}; name them with one of the words {', '.join(CONTRASTS)}")
    settle_names(folder, subjects, split, notes)
    if name not in OWN_FACTS:
        read_patients(folder, files, subjects, notes)
    read_labels(folder, files, subjects, notes)
    if texts:
        prepare_reports(subjects, notes)
    take_tracer_as_pet(subjects, contrasts, notes)
    chosen = _choose_contrasts(folder, subjects, contrasts, every, notes, texts)
    if "pet" in chosen:
        notes.append("pet is read in SUV; 0 to 10 SUV become 0 to 1")
        read_suv_factors(folder, files, subjects, notes)
    layout = _with_contrasts(name, subjects, chosen, ignored, every, notes)
    needed = 2 if every else len(chosen)
    complete = [subject for subject in layout.subjects if len(subject.files) >= needed]
    layout.split = split
    if name not in OWN_SPLIT:
        layout.split = split_of_folders(folder, layout.subjects, complete, notes)
    if not BODY_CONTRASTS.isdisjoint(chosen):
        images_of = [contrast for contrast in chosen if contrast != TEXT]
        layout.ignored = take_tumour_masks(layout.subjects, images_of, ignored, notes)
    return layout


def folders_of(folder):
    """The folders that a name stands for: one, or several that are separated by commas."""
    if Path(folder).exists():
        return [Path(folder)]
    return [Path(part.strip()) for part in str(folder).split(",") if part.strip()] or [Path(folder)]


def name_of(folder):
    """What results from a folder, or from several, are named by."""
    return "+".join(one.resolve().name for one in folders_of(folder))


def _find_several(folders, contrasts, every, texts):
    """The Layout of several folders together; arguments and errors as of find_layout.

    A subject has the name of its folder before its own, so that the same number in two folders is
    not one person. DataError if two folders have one name.
    """
    names = [one.resolve().name for one in folders]
    if len(set(names)) < len(names):
        raise DataError(f"{', '.join(map(str, folders))}: two folders have one name; rename one")
    notes = []
    layouts = []
    subjects = []
    for name, one in zip(names, folders):
        try:
            layout = find_layout(one, contrasts, True, texts)
        except DataError as error:
            if error.status != 2:                   # 2: it has none of the wanted contrasts
                raise
            layout = find_layout(one, None, True, texts)
        notes += [f"{name}: {note}" for note in layout.notes]
        layout.skipped = [(f"{name}/{left_out}", why) for left_out, why in layout.skipped]
        for subject in layout.subjects:
            subject.name = f"{name}/{subject.name}"
            subject.person = f"{name}/{subject.person}"
        if layout.split:
            layout.split = {part: [f"{name}/{own}" for own in layout.split[part]]
                            for part in layout.split}
        subjects += layout.subjects
        layouts.append(layout)
    subjects.sort(key=lambda subject: subject.name)
    all_names = ", ".join(map(str, folders))
    chosen = _choose_contrasts(all_names, subjects, contrasts, every, notes, texts)
    ignored = [path for layout in layouts for path in layout.ignored]
    kind = " + ".join(layout.name for layout in layouts)
    joined = _with_contrasts(kind, subjects, chosen, ignored, every, notes)
    joined.skipped += [pair for layout in layouts for pair in layout.skipped]
    splits = [layout.split for layout in layouts if layout.split]
    if splits and len(splits) < len(layouts):
        notes.append("some of the folders have a split of their own and others have none, so all "
                     "subjects are split anew; --split gives another split")
    elif splits:
        joined.split = {part: [own for split in splits for own in split[part]]
                        for part in splits[0]}
    return joined


def _read_subjects(folder, files, images, notes):
    """Call the reader that fits the files -> (name, subjects, ignored files, split).

    The name is that of the data set. It is None if there are no images. The split is None if the
    data set does not say it.
    """
    if folder / "manifest.csv" in files:
        subjects = collect_manifest(folder, notes)
        used = {path for subject in subjects for path in subject.paths}
        return "manifest.csv", subjects, [path for path in images if path not in used], None
    for name, is_it, collect in WITH_REPORTS:
        if is_it(folder, files):
            subjects, split = collect(folder, files, notes)
            return name, subjects, [], split
    images = real_scans(folder, images, notes)
    if not images:
        return None, [], [], None
    return *_read_volumes(folder, files, images, notes), None


def _read_volumes(folder, files, images, notes):
    """Call the reader that fits NIfTI files -> (name of the data set, subjects, ignored files)."""
    if is_bids(folder, images):
        return collect_bids(folder, images, notes)
    if is_ixi([path for path in images if role_of(path.name, path.parent.name) in CONTRASTS]):
        return "IXI", *collect_ixi(files, images, notes)
    if any(ADNI_FILE.search(path.as_posix()) for path in images):
        return "ADNI", *collect_adni(images, notes)
    if any(HECKTOR_FILE.fullmatch(path.name) for path in images):
        return "HECKTOR", *collect_hecktor(images, notes)
    if any(MAMAMIA_FILE.fullmatch(path.name) for path in images):
        return "MAMA-MIA", *collect_mamamia(images, notes)
    if is_nnunet(images):
        return "nnU-Net", *collect_nnunet(folder, images, notes)
    if any(AUTOPET_FILE.search(path.as_posix()) for path in images):
        return "autoPET", *collect_autopet(folder, images, notes)
    if is_by_name(images):
        subjects, ignored = collect_by_name(images, notes)
        edition_of(subjects)
        return "files named by subject", subjects, ignored
    subjects, ignored = collect_subjects(folder, images, notes)
    return edition_of(subjects), subjects, ignored


def _find_slices(folder, files, contrasts, every, notes, texts):
    """The layout of a folder of .npy slices. DataError if the folder holds none."""
    subjects, split = collect_slices(folder, files, notes)
    if split is None:
        raise DataError(_why_no_images(folder, files))
    chosen = _choose_contrasts(folder, subjects, contrasts, every, notes, texts)
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
    def unreadable(error):
        notes.append(f"{error.filename}: cannot be read ({error.strerror}); skipped")

    for root, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
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
            path = os.path.join(root, name)
            hidden = name.startswith("._") or name.startswith(".") and is_nifti(name)
            if hidden or name in (".DS_Store", "Thumbs.db", "desktop.ini"):
                junk += 1
            elif os.path.exists(path) and not os.path.isfile(path):
                notes.append(f"{path}: is a pipe or a device, no file; skipped")
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
    if any(is_picture(path) for path in files):
        return (f"{folder}: holds pictures, and nothing says what they show; add a table "
                "reports.csv with the columns file,report, or a manifest.csv")
    others = sorted(suffixes & set(OTHER_FORMATS))
    if others:
        return (f"{folder}: holds {', '.join(others)} files; only .nii and .nii.gz are read, "
                "and .mhd and .mha; convert them to NIfTI")
    return (f"{folder}: no subjects found; looked for BIDS, BraTS 2020, 2021, 2023, IXI, ADNI, "
            "HECKTOR, MAMA-MIA, nnU-Net, autoPET, SLIVER07, R2Gen, reports.csv, "
            "slices named like T1/train/slice_0.npy and one folder per subject with one .nii or "
            f".nii.gz per contrast; the folder holds {_entries(folder)}")


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

def _choose_contrasts(folder, subjects, wanted, every, notes, texts):
    """The wanted contrasts under the project's names, or those that enough subjects have.

    Enough are half of the subjects. If `every` is True, two are enough. Two reports are enough
    always, if `texts` is True.
    """
    there = {}
    for name in (TEXT, *CONTRASTS) if texts else CONTRASTS:
        count = sum(name in subject.files for subject in subjects)
        if count:
            there[name] = count
    if wanted is not None:
        return _wanted_contrasts(folder, there, wanted, notes, texts)
    common = []
    for name, count in there.items():
        enough = 2 if every or name == TEXT else len(subjects) / 2
        if count >= enough:
            common.append(name)
    common = tuple(common)
    common = common or tuple(there)
    for name, count in there.items():
        if name not in common:
            notes.append(f"{name}: in {count} of {len(subjects)} subjects only, "
                         "not used unless asked for")
    return common


def _wanted_contrasts(folder, there, wanted, notes, texts):
    known = (TEXT, *CONTRASTS) if texts else CONTRASTS
    chosen = canonical_contrasts(wanted, known, there, folder)
    if not set(chosen) & set(there):
        raise DataError(f"{folder}: no contrast {', '.join(wanted) or 'chosen'}; "
                        f"there are {', '.join(there)}", status=2)
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
