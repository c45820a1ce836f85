"""What all readers share: a subject, the words of file names, and the sheets about patients."""

import csv
import re
from dataclasses import dataclass, field
from pathlib import Path

from data.files import DataError, is_picture

# The name of a contrast in this project -> the words of file names that mean it. The order is that
# of BraTS, and contrasts are listed in it. In pairs for a translation the source comes first.
# pre and post are MR before and after a contrast agent was given, on one scale of intensities.
CONTRASTS = {
    "flair": {"flair", "t2f", "t2flair"},
    "t1": {"t1", "t1n", "t1w", "mprage"},
    "t1ce": {"t1ce", "t1c", "t1gd", "t1post"},
    "t2": {"t2", "t2w"},
    "pd": {"pd", "pdw"},
    "t2star": {"t2star", "t2starw"},
    "swi": {"swi"},
    "cine": {"cine"},
    "ct": {"ct", "ctres"},
    "cta": {"cta"},
    "pet": {"pet", "suv", "pt"},
    "fdg": {"fdg", "18fdg", "18ffdg", "fluorodeoxyglucose"},
    "av45": {"av45", "18fav45", "florbetapir"},
    "tau": {"tau", "av1451", "18fav1451", "flortaucipir", "t807"},
    "pib": {"pib", "11cpib"},
    "fbb": {"fbb", "18ffbb", "florbetaben"},
    "pre": {"pre", "precontrast"},
    "post": {"post", "postcontrast"},
    "xray": {"xray", "cxr", "radiograph"},
}
# The report of a subject counts as a contrast where a method asks for it (texts=True). It has no
# image, and no word of a file name means it. It is therefore not one of CONTRASTS.
TEXT = "text"
# PET of the brain has one contrast for each tracer, because they show different things. Here stands
# the usual name of the tracer. These images keep their own units, and are scaled like MR. "pet" is
# PET in SUV: of a body, or of an unknown tracer.
TRACERS = {"fdg": "FDG", "av45": "AV45", "tau": "AV1451", "pib": "PIB", "fbb": "FBB"}
# These words often mean something else, such as a visit before a treatment, or a patient. They name
# a contrast only if no other word of the file does: T1_pre is t1, T1_post is t1ce, PT_07_CT is ct.
WEAK_WORDS = {"pre", "precontrast", "post", "postcontrast", "pt"}
# Where two files show one contrast, a file with one of these words is taken. In autoPET, CTres is
# the CT on the grid of the PET, and SUV is the PET in SUV.
PREFERRED_WORDS = {"ctres", "suv"}
# These contrasts show bodies, or the effect of an agent. Their slices are chosen by another rule
# than those of brains (subject.kept_slices), and they are averaged before they are made coarser.
BODY_CONTRASTS = {"cta", "pet", "pre", "post"}
# With one of these words, t1 means t1ce, as in T1_gd or ce-gadolinium_T1w.
AGENT_WORDS = {"ce", "gd", "gad", "gadolinium", "post", "postcontrast"}
SEGMENTATION_WORDS = {"seg", "segm", "segmentation"}
LABEL_WORDS = {"mask", "brainmask", "label", "labels", "lesion", "lesions", "tumour", "tumor", "gt",
               "roi", "otmulticlass", "parcellation", "consensus"}
# In IXI and ADNI, T1 is a sagittal 3-D scan, and T2 and PD are axial slices. Their grid is used,
# because resampling them to the grid of T1 would invent slices.
AXIAL_GRID = ("t2", "pd")


@dataclass
class Subject:
    """The files of one subject, that is, of one BraTS case or one visit.

    A split keeps all subjects of one `person` together.
    """

    name: str
    person: str
    files: dict                     # contrast -> Path, or a tuple of Paths: of .npy slices, or of
                                    # several pictures; TEXT -> the file that the report is from
    segmentation: Path | None = None
    meta: dict = field(default_factory=dict)        # what a reader knows of the person and the scan
    echoes: dict = field(default_factory=dict)      # contrast -> echo; see volumes.read_volume
    grid: tuple = ()                # contrasts whose grid to use, best first; () is the first one's
    suv_factor: float | None = None     # of suv.csv: voxels of the PET times this number are SUV
    like: Path | None = None        # a PET of another subject, if this one should have one but has
                                    # none; see subject.load_subject
    records: dict = field(default_factory=dict)     # contrast -> what is known of that scan; see
                                                    # layouts/records.py
    frames: dict = field(default_factory=dict)      # contrast -> durations in s of the frames of a
                                                    # 4-D PET; () if they are not known
    report: str | None = None       # the findings in words, as they were written; None without one

    @property
    def in_slices(self):
        """True if the files are .npy slices, not volumes or pictures."""
        return any(isinstance(paths, tuple) and paths[0].suffix == ".npy"
                   for paths in self.files.values())

    @property
    def paths(self):
        """Every file with an image of the subject, as a list. The file of the report is not in it.

        One file may hold the reports of all subjects, and would be read for each of them.
        """
        found = []
        for contrast, paths in self.files.items():
            if contrast != TEXT:
                found += paths if isinstance(paths, tuple) else [paths]
        if self.segmentation:
            found.append(self.segmentation)
        return found

    def pictures(self, contrast):
        """The paths of the pictures of a contrast, as a tuple; () if it is stored otherwise."""
        if contrast == TEXT:
            return ()
        paths = self.files.get(contrast, ())
        paths = paths if isinstance(paths, tuple) else (paths,)
        return tuple(path for path in paths if is_picture(path))


def role_of(file_name, subject):
    """What a NIfTI file of `subject` is: a contrast, "seg" for a segmentation, or None.

    Whole words of the file name decide. The name of the subject is removed first, because it may
    contain t1 or ct. The names of the folders above do not matter.
    """
    words = words_of(file_name, subject)
    if SEGMENTATION_WORDS & set(words):
        return "seg"
    if LABEL_WORDS & set(words):
        return None
    found = named_contrasts(words)
    if found == ["t1"] and AGENT_WORDS & set(words):
        return "t1ce"
    if len(found) == 1:
        return found[0]
    return None                     # T2_to_FLAIR names two contrasts, so we do not guess


def words_of(file_name, subject):
    """The words of a NIfTI file's name, in lower case and without the name of the subject."""
    stem = re.sub(r"\.nii(\.gz)?$", "", file_name, flags=re.IGNORECASE).lower()
    own = re.match(re.escape(subject.lower()) + r"(?![a-z0-9])(.+)", stem)
    return re.findall(r"[a-z0-9]+", own.group(1) if own else stem)


def named_contrasts(words):
    """The contrasts that the words of a file name mean, as a list. FDG_PET is fdg, not pet."""
    text = " ".join(words).replace("t2 flair", "flair").replace("t2 star", "t2star")
    text = text.replace("av 1451", "av1451").replace("av 45", "av45")
    found = {"strong": [], "weak": []}
    for name, aliases in CONTRASTS.items():
        named = aliases & set(text.split())
        if named - WEAK_WORDS:
            found["strong"].append(name)
        elif named:
            found["weak"].append(name)
    if "pet" in found["strong"] and not TRACERS.keys().isdisjoint(found["strong"]):
        found["strong"].remove("pet")
    return found["strong"] or found["weak"]


def preferred_first(paths):
    """Sort the files of one contrast, the one to take first."""
    return sorted(paths, key=lambda path: (not is_preferred(path), path))


def is_preferred(path):
    """True if the name of the file has one of PREFERRED_WORDS."""
    words = re.findall(r"[a-z0-9]+", path.name.lower())
    return not PREFERRED_WORDS.isdisjoint(words)


def preferred_grid(contrasts):
    """The contrasts whose grid to use, for Subject.grid: () is that of the first contrast.

    A PET is coarse. If a CT is made from it or turned into it, the PET's grid is used, because
    resampling the PET to the CT's grid would invent detail. Of the pairs before and after an agent,
    the grid of the source is used.
    """
    if "ct" in contrasts and "pet" in contrasts:
        return ("pet",)
    if "ct" in contrasts and "cta" in contrasts:
        return ("ct",)
    if "pre" in contrasts and "post" in contrasts:
        return ("pre",)
    return ()


def kind_of(contrast):
    """What a contrast is made with: "MRI", "CT", "PET" or "X-ray"."""
    if contrast in ("ct", "cta"):
        return "CT"
    if contrast == "xray":
        return "X-ray"
    return "PET" if contrast == "pet" or contrast in TRACERS else "MRI"


def canonical_contrast(name):
    """The project's name of a contrast: t1gd -> t1ce. An unknown name is returned in lower case."""
    lower = name.lower()
    for contrast, aliases in CONTRASTS.items():
        if lower in aliases:
            return contrast
    return lower


def read_sheet(sheet):
    """Read a .csv file with any usual separator -> (rows, columns).

    rows: An iterable of dicts, as csv.DictReader gives.
    columns: The first word of a column's name in upper case -> the column's name in the rows.
    DataError if the file cannot be read.
    """
    try:
        text = sheet.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise DataError(f"{sheet}: cannot be read ({error.strerror or error}); "
                        "repair or remove it") from None
    # The line ends are kept, because a cell in quotes may hold several lines.
    lines = text.replace("\0", "").splitlines(keepends=True)
    separator = max(",;\t", key=lines[0].count) if lines else ","
    rows = csv.DictReader(lines, delimiter=separator)
    columns = {name.strip().split(" ")[0].upper(): name for name in rows.fieldnames or ()}
    return rows, columns


def positive(cell):
    """The number in a cell of a sheet, with a decimal point or comma, or None.

    None also stands for 0, because IXI writes 0 where it means unknown.
    """
    try:
        value = float(cell.strip().replace(",", "."))
    except (AttributeError, ValueError):            # in a short row, the missing cells are None
        return None
    return value if 0 < value < 1000 else None


def few(names):
    """The first five names as text, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
