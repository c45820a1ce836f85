"""What all readers share: a subject, the words of file names, sheets of patients, and lists in sentences."""

import csv
import re
from dataclasses import dataclass, field
from pathlib import Path

from data.files import DataError

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
# T1 of these sets is a sagittal 3-D scan, T2 and PD are axial slices: resampling those up to T1 would invent slices.
AXIAL_GRID = ("t2", "pd")


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


def canonical_contrast(name):
    """t1gd -> t1ce; a name that is no alias is returned in lower case."""
    lower = name.lower()
    return next((contrast for contrast, (_, aliases) in CONTRASTS.items() if lower in aliases), lower)


def read_sheet(sheet):
    """A .csv file, whatever its separator -> (rows, {column, its first word in upper case: its name in the rows})."""
    try:
        lines = sheet.read_text(encoding="utf-8-sig", errors="replace").replace("\0", "").splitlines()
    except OSError as error:
        raise DataError(f"{sheet}: cannot be read ({error.strerror or error}); repair or remove it") from None
    rows = csv.DictReader(lines, delimiter=max(",;\t", key=lines[0].count) if lines else ",")
    return rows, {name.strip().split(" ")[0].upper(): name for name in rows.fieldnames or ()}


def positive(cell):
    """The number in a cell, with decimal point or comma; None if there is none or 0, by which IXI means unknown."""
    try:
        value = float(cell.strip().replace(",", "."))
    except (AttributeError, ValueError):                                    # a short row has None there
        return None
    return value if 0 < value < 1000 else None


def few(names):
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
