"""Sentences about scans.

`caption` describes a slice, `prompt` (MetaDB) and `scan_prompt` (UniSyn) describe a scan, and
`describe_lesion` describes what is drawn in a segmentation.
"""

import re

import numpy as np

from data.files import DataError
from data.layouts.words import TRACERS, kind_of

# The words for a contrast in a caption.
MODALITIES = {"flair": "FLAIR", "t1": "T1w", "t1ce": "T1CE", "t2": "T2w", "pd": "PDw",
              "t2star": "T2star", "swi": "SWI", "dwi": "DWI", "adc": "ADC", "cine": "cine",
              "mr": "MR", "cbct": "CBCT", "ct": "CT", "cta": "CTA",
              "pet": "PET", "fdg": "FDG PET", "av45": "AV45 PET", "tau": "AV1451 PET",
              "pib": "PIB PET", "fbb": "FBB PET",
              "pre": "T1w before contrast", "post": "T1w after contrast", "xray": "X-ray"}
# The words for a contrast in a prompt.
DESCRIPTIONS = {"flair": "FLAIR MRI", "t1": "T1-weighted MRI",
                "t1ce": "contrast-enhanced T1-weighted MRI", "t2": "T2-weighted MRI",
                "pd": "PD-weighted MRI", "t2star": "T2*-weighted MRI",
                "swi": "susceptibility-weighted MRI", "dwi": "diffusion-weighted MRI",
                "adc": "map of the apparent diffusion coefficient", "cine": "cine MRI",
                "mr": "MRI", "cbct": "cone-beam CT", "ct": "CT",
                "cta": "CT angiography",
                "pet": "PET", "fdg": "FDG PET", "av45": "florbetapir PET",
                "tau": "flortaucipir PET", "pib": "PIB PET", "fbb": "florbetaben PET",
                "pre": "T1-weighted MRI before contrast agent",
                "post": "T1-weighted MRI after contrast agent", "xray": "X-ray"}
# Facts in the order of a caption. Only those that are known are written.
META_FIELDS = (("age", "Age: {} y"), ("sex", "Sex: {}"), ("TR", "TR: {} ms"), ("TE", "TE: {} ms"),
               ("TI", "TI: {} ms"), ("FA", "FA: {} deg"))
# The fields of a prompt, which are those of MetaDB's Table 5.
PROMPT_FIELDS = ("age", "gender", "scanner", "description")
# The parts of UniSyn's sentence about a scan, for each kind of scan. In braces stand the field of a
# record and its unit. See scan_prompt.
SCAN_FORMS = {
    "MRI": ("Modality: {modality}", "Age: {age y}", "Sex: {sex}",
            "Scanner: {field T} {vendor} {model}", "Voxel: {voxel mm}", "TR: {TR ms}",
            "TE: {TE ms}", "TI: {TI ms}", "FA: {FA deg}"),
    "CT": ("Modality: {modality}", "Age: {age y}", "Sex: {sex}", "Scanner: {vendor} {model}",
           "Voxel: {voxel mm}", "Tube: {kvp kVp}", "Current: {ma mA}", "Kernel: {kernel}",
           "Contrast: {agent}"),
    "PET": ("Modality: {modality}", "Tracer: {tracer}", "Age: {age y}", "Sex: {sex}",
            "Scanner: {vendor} {model}", "Voxel: {voxel mm}", "Dose: {dose MBq}",
            "Start: {start s}", "Duration: {duration s}", "Recon: {recon}"),
    "X-ray": ("Modality: {modality}", "Age: {age y}", "Sex: {sex}", "Scanner: {vendor} {model}")}


def caption(contrast, position, brain, lesion=None, meta=None):
    """One line of text for one slice, for example

    "Modality: FLAIR; Plane: axial; Slice: 0.42; Brain: 0.31; Lesion: none"

    position: The height of the slice, from 0 (the lowest kept slice) to 1 (the highest).
    brain: The share of the picture that is brain, from 0 to 1.
    lesion: What describe_lesion returns, or None if there is no segmentation.
    meta: The facts that are known: age in years, sex, TR, TE and TI in ms, FA in degrees.
    """
    parts = [f"Modality: {MODALITIES[contrast]}"]
    for key, form in META_FIELDS:
        if meta and meta.get(key) is not None:
            parts.append(form.format(_number(meta[key])))
    parts += ["Plane: axial", f"Slice: {position:.2f}", f"Brain: {brain:.2f}"]
    if lesion is not None:
        parts.append(f"Lesion: {lesion}")
    return "; ".join(parts)


def prompt(contrast, meta, fields=PROMPT_FIELDS, masked=()):
    """One line of text for a scan (MetaDB, Sec. 4.3.3), the same for all of its slices. An example:

    "Age: 35; Gender: F; Scanner: Philips 1.5T; Description: T2-weighted MRI of the brain,
    TR 8178 ms, TE 100 ms" (in one line)

    With masked=("modality",) the same scan gives:

    "Age: 35; Gender: F; Scanner: Philips 1.5T; Description: [MASK] of the brain, TR [MASK] ms,
    TE [MASK] ms"

    meta: Subject.meta.
    fields: Which of PROMPT_FIELDS to write. A value that is not known is written as None. Without
        fields the text is "".
    masked: The fields whose value becomes [MASK]. The name "modality" masks all that tells the
    contrast: its words and times in the description, and scanners that serve one contrast alone.
    All scans of a person then give the same text.
    DataError if there is no field of a name.
    """
    unknown = set(fields) - set(PROMPT_FIELDS)
    unknown |= set(masked) - {*PROMPT_FIELDS, "modality"}
    if unknown:
        raise DataError(f"prompt: there is no {', '.join(sorted(unknown))}; "
                        f"there are {', '.join(PROMPT_FIELDS)}", status=2)
    hidden = "modality" in masked
    scanner = meta.get(f"scanner_{contrast}", meta.get("scanner"))
    if scanner and "field" in meta and (hidden or kind_of(contrast) == "MRI"):
        scanner = f"{scanner} {_number(meta['field'])}T"
    values = {"age": int(meta["age"]) if "age" in meta else None,
              "gender": meta.get("sex"),
              "scanner": scanner,
              "description": _describe_scan(contrast, meta, hidden)}
    scanner_tells = any(key.startswith("scanner_") for key in meta)     # the contrast, by its name
    parts = []
    for name, value in values.items():
        if name not in fields:
            continue
        if name in masked or (hidden and name == "scanner" and scanner_tells):
            value = "[MASK]"
        parts.append(f"{name.capitalize()}: {value}")
    return "; ".join(parts)


def _describe_scan(contrast, meta, hidden):
    """The description in a prompt. hidden: True if it must not tell the contrast."""
    modality = "[MASK]" if hidden else DESCRIPTIONS[contrast]
    body = f" of the {meta['body']}" if "body" in meta else ""
    parts = [modality + body]
    times = meta.get("times", {})
    own = max(times.values(), key=len, default=()) if hidden else times.get(contrast, ())
    for name, time in zip(("TR", "TE"), own):
        value = "[MASK]" if hidden else _number(time, digits=4)
        parts.append(f"{name} {value} ms")
    return ", ".join(parts)


def scan_fields(contrast):
    """The fields of a record that scan_prompt writes for a contrast, in order."""
    return tuple(re.findall(r"\{(?!modality)(\w+)", "; ".join(SCAN_FORMS[kind_of(contrast)])))


def scan_prompt(contrast, record, without=()):
    """One line of text for a scan or for a wish (UniSyn), the same for all of its slices. Examples:

    "Modality: T2w; Age: 61 y; Sex: F; Scanner: 3 T Siemens Prisma; Voxel: 1 x 1 x 1 mm;
    TR: 3200 ms; TE: 563 ms; TI: None; FA: 120 deg" (in one line)

    "Modality: PET; Tracer: FDG; Age: 61 y; Sex: F; Scanner: Siemens Biograph; Voxel: 2 x 2 x 2 mm;
    Dose: 185 MBq; Start: 1800 s; Duration: 1200 s; Recon: None"

    record: The facts that are known; see record_of. All others become the word None, without unit.
    without: Fields that become None although they are known. The modality is always told.
    DataError if there is no field of a name in `without`.
    """
    kind = kind_of(contrast)
    there_are = dict.fromkeys([*scan_fields("t1"), *scan_fields("ct"), *scan_fields("fdg")])
    unknown = set(without) - there_are.keys()
    if unknown:
        raise DataError(f"scan_prompt: there is no field {', '.join(sorted(unknown))}; "
                        f"there are {', '.join(there_are)}", status=2)
    known = {"tracer": TRACERS.get(contrast), **record}
    for field in without:
        known[field] = None
    known["modality"] = "PET" if kind == "PET" else MODALITIES[contrast]

    def fill(slot):
        field, unit = slot.groups()
        value = known.get(field)
        if value is None:
            return "None"
        edges = value if isinstance(value, tuple | list) else [value]
        return " x ".join(_number(edge) for edge in edges) + unit

    return re.sub(r"\{(\w+)((?: \w+)?)\}", fill, "; ".join(SCAN_FORMS[kind]))


def record_of(subject, contrast):
    """What is known of one scan of a subject, for scan_prompt -> dict of data/layouts/records.py.

    Readers of BIDS and of manifests know each scan. If such a subject does not have the scan, only
    the age and the sex are known. Other readers know what is in Subject.meta.
    """
    if contrast in subject.records:
        return dict(subject.records[contrast])
    meta = subject.meta
    record = {name: meta[name] for name in ("age", "sex") if name in meta}
    if subject.records:
        return record
    scanner = meta.get(f"scanner_{contrast}", meta.get("scanner"))
    if scanner:
        record["vendor"] = scanner
    if "field" in meta and kind_of(contrast) == "MRI":
        record["field"] = meta["field"]
    record.update(zip(("TR", "TE"), meta.get("times", {}).get(contrast, ())))
    return record


def _number(value, digits=6):
    """A number with so many significant digits, without zeros at the end and without exponent.

    A word is returned as it is.
    """
    if isinstance(value, str):
        return value
    return np.format_float_positional(value, precision=digits, unique=False, fractional=False,
                                      trim="-")


def describe_lesion(labels, midline, pixel_area):
    """The side and the area of the lesion in one slice, such as "left, 412 mm2", or "none".

    Left is the patient's left. A lesion is on one side if three quarters of its area are there;
    otherwise it is on both sides.

    labels: (H, W) of an upright radiological slice; the lesion is where it is above 0.
    midline: The column of the middle of the brain.
    pixel_area: The area of a pixel in mm2.
    """
    columns = np.nonzero(labels > 0)[1]
    if columns.size == 0:
        return "none"
    left = np.mean(columns > midline)               # column 0 is the patient's right
    side = "both sides"
    if left >= 0.75:
        side = "left"
    if left <= 0.25:
        side = "right"
    return f"{side}, {columns.size * pixel_area:.0f} mm2"
