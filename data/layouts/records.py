"""What is known of a scan, for the readers of BIDS and of manifests.

A record is a dict {field: value} of one scan. A field that is not known is absent.

    tracer              of a PET, such as FDG
    age                 years
    sex                 M, F or O (other)
    vendor, model       of the scanner
    field               T
    TR, TE, TI          ms
    FA                  degrees
    voxel               the three edges of a voxel in mm, in the order of the axes of the file
    kvp, ma, mas        of a CT: kV, mA and mAs
    kernel              of a CT
    agent               a contrast agent
    dose                of a PET, MBq
    start, duration     of a PET, s: the start of the first frame, and the length of all frames
    recon               of a PET: how it was reconstructed
"""

import math
import re

from nibabel.affines import voxel_sizes

from data.layouts.words import CONTRASTS, TRACERS, UNKNOWN, kind_of
from data.nifti import grid_of, volumes_of

NUMBERS = ("field", "TR", "TE", "TI", "FA", "kvp", "ma", "mas", "dose", "start", "duration")
TEXTS = ("model", "kernel", "agent", "recon")
# Vendors whose first word is not their name. Of all others the first word is taken.
VENDORS = {"general": "GE", "united": "UIH", "shanghai": "UIH"}
# The letter behind an age, as DICOM writes it, and how many of these are a year. Words count by
# their first letter.
AGE_UNITS = {"": 1, "Y": 1, "M": 12, "W": 52.18, "D": 365.25}
AGE = re.compile(r"[<>~]?\s*(\d+(?:[.,]\d+)?)[\s-]*"
                 r"(Y|Y/?O|YRS?|YEARS?|M|MOS?|MONTHS?|W|WEEKS?|D|DAYS?|)\.?(?:[\s-]*OLD)?\+?")
OLDEST = 120            # years
SEXES = {"m": "M", "male": "M", "man": "M", "boy": "M", "masculine": "M",
         "f": "F", "female": "F", "w": "F", "woman": "F", "girl": "F", "feminine": "F",
         "o": "O", "other": "O"}
# Words for parts of the body -> the word in a prompt. Other words are not used.
BODIES = {"brain": "brain", "head": "brain", "skull": "brain", "spine": "spine", "cspine": "spine",
          "tspine": "spine", "lspine": "spine", "abdomen": "abdomen", "pelvis": "pelvis",
          "chest": "chest"}


# ---- Values --------------------------------------------------------------------------------------

def text_of(value):
    """The words in a cell or a value of JSON, or None if it is unknown. A list gives its first."""
    if isinstance(value, list):
        value = value[0] if value else None
    text = "" if value is None else str(value).strip()
    return None if text.lower() in UNKNOWN else text


def number_of(value):
    """The number in a cell or a value of JSON, or None if there is none. A list gives its first."""
    text = text_of(value)
    if text is None:
        return None
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def age_of(value):
    """An age in years, or None. 89+ is 89, 45 years is 45, and 018M, as in DICOM, is 1.5.

    Nobody is older than OLDEST. Sheets write 999 where they do not know.
    """
    found = AGE.fullmatch((text_of(value) or "").upper())
    if not found:
        return None
    age = round(float(found[1].replace(",", ".")) / AGE_UNITS[found[2][:1]], 2)
    return age if age <= OLDEST else None


def sex_of(value):
    """"M", "F", "O" (other), or None, also for a number, because sheets differ in what it means."""
    return SEXES.get((text_of(value) or "").lower().rstrip("."))


def vendor_of(value):
    """A short name of a vendor, or None: "GE MEDICAL SYSTEMS" is GE, "SIEMENS" is Siemens."""
    text = text_of(value)
    if text is None:
        return None
    word = text.split()[0]
    if word.lower() in VENDORS:
        return VENDORS[word.lower()]
    if len(word) <= 3:
        return word.upper()
    return word.capitalize() if word.isupper() else word


def voxel_of(value):
    """The edges of a voxel in mm, or None: "1 x 1 x 4" is (1, 1, 4)."""
    edges = [number_of(word) for word in re.split(r"[x\s]+", text_of(value) or "")]
    return None if len(edges) != 3 or None in edges else tuple(edges)


def tracer_of(value):
    """A tracer under its usual name, and its contrast: [18F]AV-45 is (AV45, av45).

    Of a tracer that is not in TRACERS the contrast is pet. If none is named, the name is None.
    """
    text = text_of(value)
    if text is None:
        return None, "pet"
    whole = re.sub(r"[\[\]()_\s-]", "", text.lower())
    for word in (whole, *re.findall(r"[a-z0-9]+", text.lower())):
        for contrast, name in TRACERS.items():
            if word in CONTRASTS[contrast]:
                return name, contrast
    return text, "pet"


def header_of(path):
    """The size of a voxel in mm and the number of volumes in a file -> (three numbers, number).

    Of a file that cannot be read the size is None. This is reported when its voxels are needed.
    """
    grid = grid_of(path)
    if grid is None:
        return None, 1
    shape, affine = grid
    return tuple(round(float(edge), 2) for edge in voxel_sizes(affine)), volumes_of(shape)


# ---- Subjects ------------------------------------------------------------------------------------

def write_meta(subject):
    """Write the facts for data.prompts.prompt from the records of a subject into its meta.

    A scanner or a field is one fact only if all scans agree. Otherwise each contrast has its own
    scanner. The field is that of MR.
    """
    facts = subject.meta
    vendors = {}
    fields = set()
    for contrast, record in subject.records.items():
        for name in ("age", "sex"):
            if name in record:
                facts.setdefault(name, record[name])
        vendors[contrast] = record.get("vendor")
        if kind_of(contrast) == "MRI":
            fields.add(record.get("field"))
        if "TR" in record and "TE" in record:
            facts.setdefault("times", {})[contrast] = (record["TR"], record["TE"])
    if len(set(vendors.values())) == 1:
        vendors = {"": vendors.popitem()[1]}
    for contrast, vendor in vendors.items():
        if vendor:
            facts[f"scanner_{contrast}" if contrast else "scanner"] = vendor
    if len(fields) == 1 and None not in fields:
        facts["field"] = fields.pop()
