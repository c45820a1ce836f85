"""What all readers share: a subject, the words of file names, and the sheets about patients."""

import csv
import gzip
import re
import unicodedata
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from data.files import PACKED, DataError, is_picture

# The name of a contrast in this project -> the words of file names that mean it. The order is that
# of BraTS, and contrasts are listed in it. In pairs for a translation the source comes first.
# pre and post are MR before and after a contrast agent was given, on one scale of intensities.
# mr is an MR of unknown weighting.
CONTRASTS = {
    "flair": {"flair", "t2f", "t2flair", "tirm", "darkfluid"},
    "t1": {"t1", "t1n", "t1w", "mprage", "mp2rage", "bravo", "vibe", "tfe", "spgr", "fspgr"},
    "t1ce": {"t1ce", "t1c", "t1gd", "t1post", "t1km", "cet1", "cet1w", "t1cew", "t1contrast"},
    "t2": {"t2", "t2w"},
    "pd": {"pd", "pdw", "protondensity"},
    "t2star": {"t2star", "t2starw"},
    "swi": {"swi"},
    "dwi": {"dwi"},
    "adc": {"adc"},
    "cine": {"cine"},
    "mr": {"mr", "mri"},
    "cbct": {"cbct"},
    "ct": {"ct", "ctres", "ncct"},
    "cta": {"cta", "angioct", "ctangio"},
    "pet": {"pet", "suv", "pt"},
    "fdg": {"fdg", "18fdg", "18ffdg", "fluorodeoxyglucose", "fdgpet"},
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
# These words name a contrast only if there are no others: T2_TFE is t2, and VIBE_pre is pre.
WEAKEST_WORDS = {"vibe", "tfe", "spgr", "fspgr", "mr", "mri"}
# Where two files show one contrast, a file with one of these words is taken. In autoPET, CTres is
# the CT on the grid of the PET, and SUV is the PET in SUV.
PREFERRED_WORDS = {"ctres", "suv"}
# These contrasts show bodies, or the effect of an agent. Their slices are chosen by another rule
# than those of brains (subject.kept_slices), and they are averaged before they are made coarser.
BODY_CONTRASTS = {"cta", "pet", "pre", "post"}
# With one of these words, t1 means t1ce, as in T1_gd or ce-gadolinium_T1w.
AGENT_WORDS = {"ce", "gd", "gad", "gado", "gadolinium", "km", "post", "postcontrast", "postgd",
               "contrast", "enhanced"}
SEGMENTATION_WORDS = {"seg", "segm", "segmentation"}
LABEL_WORDS = {"mask", "masks", "brainmask", "label", "labels", "lesion", "lesions", "tumour",
               "tumor", "gt", "roi", "otmulticlass", "parcellation", "consensus", "contour",
               "annotation", "pve", "pveseg", "prob", "probability", "probseg", "dseg", "aseg",
               "aparc", "wmparc", "labelmap", "wmh"}
# What is computed from a scan, what moves it, and what only serves to plan it.
DERIVED_WORDS = {"biasfield", "warp", "warpfield", "xfm", "transform", "deformation",
                 "displacement", "jacobian", "inverse", "map", "maps", "t1map", "t2map", "qt1",
                 "qt2", "fa", "md", "mip", "minip", "localizer", "localiser", "scout", "survey",
                 "inv1", "inv2", "uncertainty", "error", "residual", "difference", "voided", "bold",
                 "fmri", "rsfmri", "phase", "ph", "imaginary", "thickness", "noise", "snr",
                 "mixeltype"}
# An image that a program has invented.
SYNTHETIC_WORDS = {"synthetic", "synthesized", "synthesised", "synth", "synthseg", "synthsr",
                   "synct", "sct", "fake", "pred", "predicted", "prediction", "generated",
                   "translated", "imputed", "pseudo", "pseudoct", "recon", "reconstructed",
                   "reconstruction"}
# What stands before one of these words was moved onto what stands behind it, as in T2_to_T1.
MOVED_WORDS = {"to", "in", "on", "onto", "into"}
# Of names with equally many words, one with one of these words is taken: T1_reg, not T1_raw.
REGISTERED_WORDS = {"reg", "registered", "coreg", "coregistered", "aligned", "warped", "r"}
# Several words that mean one -> that word. The words are in lower case, with spaces between them.
PHRASES = (
    (r"dark fluid", "darkfluid"),
    (r"t2w? (?:(?:space|spc|tse|3d|ax|axial|tra|sag|cor) )*(?:flair|tirm|darkfluid)", "flair"),
    (r"flair t2w?", "flair"),
    (r"t2w? star", "t2star"),
    (r"proton density", "pd"),
    (r"av (45|1451)", r"av\1"),
    (r"cone beam(?: ct)?", "cbct"),
    (r"ct angio(?:graphy|gram)?|angio ct", "cta"),
    (r"dwi adc|adc dwi", "adc"),
    (r"(?:pre|no|non|without) (?:ce|gd|gad|gado|gadolinium|km|contrast)", "precontrast"),
    (r"post contrast", "postcontrast"),
    (r"bias ?field corr\w*", "corrected"),
    (r"bias field", "biasfield"),
    # A visit before or after a treatment, and a contrast that is none of an agent.
    (r"(?:pre|post) (?:op|operative|surgery|treatment|tx|rt|chemo|radiation|therapy)", "visit"),
    (r"(?:multi|high|low|tissue) contrast", "scan"),
    # SPM puts y_ and iy_ before the name of a scan for its deformation.
    (r"^i?y", "deformation"),
    # A mask in one word, and one of several, such as mask2 of a second rater.
    (r"[a-z]+mask\d*|(?:mask|label|lesion|roi|pve)s?\d+", "mask"),
    (r"(?:seg|segmentation)\d+", "seg"),
)
# Where a word in mixed case is cut: T1Post, AxialT2, 3DT1, and rT2, as SPM writes an image that it
# has resampled. Other single letters stay, because a pCT may be made up.
CAMEL = re.compile(r"(?<=[a-z]{2})(?=[A-Z])|(?<=\d[a-z])(?=[A-Z])|(?<=\b[rwmc])(?=[A-Z])"
                   r"|(?<=\d)(?=[A-Z])(?!D(?![a-z]))|(?<=[23]D)(?=[A-Z])|(?<=\d)(?=to[A-Z])"
                   r"|(?<=[A-Z])(?=to[A-Z])|(?<=\dto)(?=[A-Z])|(?<=[A-Z]to)(?=[A-Z])")
# SPM puts these letters before the name of a scan for the probability of a tissue, as in c1T1.nii.
SPM_TISSUE = re.compile(r"(?<![^\W_])[mrw]*c[1-6](?=[A-Z])")
# T1+C and cT1. A CT1 is the first CT.
ENHANCED_T1 = re.compile(r"(?<![^\W_])(?:cT1w?|[tT]1w? ?\+ ?[cC])(?![^\W_])")
# The ends of a name, also doubled, and with the number that a browser gives to a copy.
ENDING = re.compile(r"(?:\.(?:nii|gz|mha|mhd)(?:\s*\(\d+\))?)+$", re.IGNORECASE)
KNOWN_WORDS = set().union(*CONTRASTS.values(), AGENT_WORDS, SEGMENTATION_WORDS, LABEL_WORDS,
                          DERIVED_WORDS, SYNTHETIC_WORDS)
# Cells of sheets that say nothing.
UNKNOWN = {"", "-", ".", "?", "none", "nan", "n/a", "na", "null", "unk", "unknown", "missing"}
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
    channels: dict = field(default_factory=dict)    # contrast -> number of its volume in a 4-D file
                                                    # that holds several contrasts

    def add(self, contrast, path):
        """Add the file of a contrast. DataError if the subject has another one."""
        if contrast in self.files:
            raise DataError(f"{path}: {self.name} has another {contrast}, {self.files[contrast]}; "
                            "remove one of them")
        self.files[contrast] = path

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
    contain t1 or ct. The names of the folders above do not matter. T2_to_T1 is a T2 that lies on
    the T1. A subject that is called post, such as a session, makes no t1ce of the files in it.
    """
    words = words_of(file_name, subject)
    if SEGMENTATION_WORDS & set(words):
        return "seg"
    if (LABEL_WORDS | DERIVED_WORDS) & set(words):
        return None
    for place, word in enumerate(words):
        if word in MOVED_WORDS and named_contrasts(words[:place]):
            words = words[:place]
            break
    found = named_contrasts(words)
    agents = AGENT_WORDS & set(words)
    if "post" in words_of(subject, ""):
        agents.discard("post")
    if found == ["t1"] and agents:
        return "t1ce"
    if len(found) == 1:
        return found[0]
    return None                     # T1_FLAIR names two contrasts, so we do not guess


@lru_cache(maxsize=1 << 16)             # each name is asked for several times
def words_of(file_name, subject):
    """The words of a NIfTI file's name, in lower case, as a tuple, without the name of the subject.

    A word in mixed case that is not known is cut into its parts. The names of subject and session
    in the form of BIDS (sub-01_ses-post) are removed, too.
    """
    stem = ENDING.sub("", unicodedata.normalize("NFC", file_name))
    subject = unicodedata.normalize("NFC", subject)
    rest = stem[len(subject):]
    if stem[:len(subject)].lower() == subject.lower() and re.match(r"[^A-Za-z0-9]", rest):
        stem = rest
    stem = re.sub(r"(?<![^\W_])(?:sub|ses)-[^_.]+", "", stem, flags=re.IGNORECASE)
    stem = re.sub(r"(?<![^\W_])space-[^_.]+", "registered", stem, flags=re.IGNORECASE)
    stem = ENHANCED_T1.sub("t1ce", SPM_TISSUE.sub("pve ", stem))
    words = []
    for word in re.findall(r"[^\W_]+", stem):
        parts = [word] if word.lower() in KNOWN_WORDS else CAMEL.split(word)
        words += [part.lower() for part in parts]
    text = " ".join(words)
    for pattern, word in PHRASES:
        text = re.sub(rf"\b(?:{pattern})\b", word, text)
    return tuple(text.split())


def named_contrasts(words):
    """The contrasts that the words of a file name mean, as a list. FDG_PET is fdg, not pet."""
    strong = set(words) - WEAK_WORDS - WEAKEST_WORDS
    for counted in (strong, set(words) - WEAKEST_WORDS, set(words)):
        found = [name for name, aliases in CONTRASTS.items() if aliases & counted]
        if found:
            break
    if "pet" in found and not TRACERS.keys().isdisjoint(found):
        found.remove("pet")
    return found


def further_words(file_name, subject, role):
    """The words of a file's name that do not say what its role says, as a tuple."""
    meant = CONTRASTS.get(role, SEGMENTATION_WORDS) - PREFERRED_WORDS
    if role == "t1ce":
        meant |= CONTRASTS["t1"] | AGENT_WORDS
    return tuple(word for word in words_of(file_name, subject) if word not in meant)


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
    if contrast in ("ct", "cta", "cbct"):
        return "CT"
    if contrast == "xray":
        return "X-ray"
    return "PET" if contrast == "pet" or contrast in TRACERS else "MRI"


def canonical_contrast(name):
    """The project's name of a contrast: t1gd -> t1ce. An unknown name is returned in lower case."""
    contrast = role_of(name, "")
    if contrast in CONTRASTS and PREFERRED_WORDS.issuperset(further_words(name, "", contrast)):
        return contrast
    return name.lower()


def canonical_contrasts(names, known, there, where):
    """The project's names of several contrasts, in order, as a tuple.

    known: The names that are allowed. there: Those that a message lists. where: Its beginning.
    DataError if a name is not known, or if a contrast is named twice.
    """
    found = tuple(canonical_contrast(name) for name in names)
    unknown = [name for name, contrast in zip(names, found) if contrast not in known]
    if unknown:
        raise DataError(f"{where}: no contrast {', '.join(unknown)}; there are {', '.join(there)}",
                        status=2)
    if len(set(found)) < len(found):
        raise DataError(f"{where}: a contrast is named twice in {', '.join(names)}; "
                        "name each once", status=2)
    return found


def read_sheet(sheet):
    """Read a .csv file with any usual separator -> (rows, columns).

    rows: A csv.DictReader; a cell that a row lacks is "".
    columns: The first word of a column's name in upper case -> the column's name in the rows.
    DataError as lines_of.
    """
    lines, separator = lines_of(sheet)
    rows = csv.DictReader(lines, delimiter=separator, restval="")
    columns = {name.strip().split(" ")[0].upper(): name for name in rows.fieldnames or ()}
    return rows, columns


def lines_of(sheet):
    """Read the lines of a table, for csv -> (lines with their ends, separator).

    A cell may be of any length. In quotes, it may hold several lines.
    DataError if the file cannot be read, or if a quote in it is never closed.
    """
    text = read_text(sheet).replace("\0", "")
    lines = text.splitlines(keepends=True)
    separator = max(",;\t", key=lines[0].count) if lines else ","
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    # An open quote swallows all lines behind it, also the one that we add here.
    last = "last line"
    reader = csv.reader([*lines, last], delimiter=separator)
    ends = [0]                          # the number of the last line of each row
    for row in reader:
        ends.append(reader.line_num)
        closed = row == [last]
    if not closed:
        raise DataError(f"{sheet}, line {ends[-2] + 1}: a quote is opened and never closed, so "
                        "that the lines behind it cannot be read; close or remove it")
    return lines, separator


def read_text(path):
    """Read a file of words, which may be packed by gzip -> its text.

    Excel writes UTF-16, or one byte for each letter, instead of UTF-8.
    DataError if the file cannot be read.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == PACKED else content
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({why}); repair or remove it") from None
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def few(names):
    """The first five names as text, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
