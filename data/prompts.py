"""Sentences that describe a slice (caption), a scan (prompt) or what is drawn in a segmentation (describe_lesion)."""

import numpy as np

from data.files import DataError
from data.layouts.words import CONTRASTS

# Caption fields in the order of the prompt template; only those that are known are written.
META_FIELDS = (("age", "Age: {} y"), ("sex", "Sex: {}"), ("TR", "TR: {} ms"), ("TE", "TE: {} ms"),
               ("TI", "TI: {} ms"), ("FA", "FA: {} deg"))
# The same for prompts, whose fields are those of MetaDB's Table 5.
DESCRIPTIONS = {"flair": "FLAIR MRI", "t1": "T1-weighted MRI", "t1ce": "contrast-enhanced T1-weighted MRI",
                "t2": "T2-weighted MRI", "pd": "PD-weighted MRI", "t2star": "T2*-weighted MRI", "ct": "CT", "pet": "PET"}
PROMPT_FIELDS = ("age", "gender", "scanner", "description")


def caption(contrast, position, brain, lesion=None, meta=None):
    """One line of text for one slice, e.g. "Modality: FLAIR; Plane: axial; Slice: 0.42; Brain: 0.31; Lesion: none".

    position: 0 (lowest) to 1 (highest kept slice); brain: area fraction; lesion: from `describe_lesion`, None if no
    segmentation exists; meta: known fields only (age in years, sex, TR, TE, TI in ms, FA in degrees).
    """
    parts = [f"Modality: {CONTRASTS[contrast][0]}"]
    parts += [form.format(_number(meta[key])) for key, form in META_FIELDS if meta and meta.get(key) is not None]
    parts += ["Plane: axial", f"Slice: {position:.2f}", f"Brain: {brain:.2f}"]
    return "; ".join(parts + ([f"Lesion: {lesion}"] if lesion is not None else []))


def prompt(contrast, meta, fields=PROMPT_FIELDS, masked=()):
    """One line of text for a scan (MetaDB, Sec. 4.3.3), the same for all of its slices; "" without fields. For example

    "Age: 35; Gender: F; Scanner: Philips 1.5T; Description: T2-weighted MRI of the brain, TR 8178 ms, TE 100 ms"

    meta: Subject.meta. fields: of PROMPT_FIELDS; the others are left out, whereas a value that is not known is None.
    masked: fields whose value becomes [MASK], or "modality": in the description the words for it and the numbers that
    give it away, and a scanner that belongs to this contrast alone. DataError for other names.
    """
    unknown = (set(fields) - set(PROMPT_FIELDS)) | (set(masked) - {*PROMPT_FIELDS, "modality"})
    if unknown:
        raise DataError(f"prompt: there is no {', '.join(sorted(unknown))}; there are {', '.join(PROMPT_FIELDS)}", status=2)
    hidden = "modality" in masked
    masked = {*masked, *(("scanner",) if hidden and f"scanner_{contrast}" in meta else ())}
    scanner = meta.get(f"scanner_{contrast}", meta.get("scanner"))
    parts = [("[MASK]" if hidden else DESCRIPTIONS[contrast]) + (f" of the {meta['body']}" if "body" in meta else "")]
    for name, time in zip(("TR", "TE"), meta.get("times", {}).get(contrast, ())):
        parts.append(f"{name} {'[MASK]' if hidden else _number(time, digits=4)} ms")
    values = {"age": int(meta["age"]) if "age" in meta else None, "gender": meta.get("sex"),
              "scanner": f"{scanner} {_number(meta['field'])}T" if scanner and "field" in meta else scanner,
              "description": ", ".join(parts)}
    return "; ".join(f"{name.capitalize()}: {'[MASK]' if name in masked else value}" for name, value in values.items()
                     if name in fields)


def _number(value, digits=6):
    """So many significant digits, without trailing zeros or exponent; words pass."""
    if isinstance(value, str):
        return value
    return np.format_float_positional(value, precision=digits, unique=False, fractional=False, trim="-")


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
