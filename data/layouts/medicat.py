"""MedICaT (github.com/allenai/medicat): figures of papers with their captions. We take the CTs.

    release/s2_full_figures_oa_nonroco_combined_medical_top4_public.jsonl   one figure in a line
    release/figures/0a1b_2-Figure1-1.png                                    pdf_hash and fig_uri
"""

import json
import re

from data.files import DataError, is_picture
from data.layouts.words import TEXT, Subject

FIGURE_FOLDER = "figures"
# A caption must name a CT and no other kind of image.
OF_CT = re.compile(r"\bCT\b|(?i:computed tomograph)")
OF_OTHERS = re.compile(r"\bMRI\b|(?i:MR imag)|PET|(?i:ultraso)")
# (A) and then (B) in a caption: the figure has several panels, and nobody knows which is a CT.
PANELS = re.compile(r"\(A\b.*\(B\b", re.IGNORECASE | re.DOTALL)


def is_medicat(folder, files):
    """True if there is a .jsonl file, and a picture in a folder called figures."""
    lines = any(path.suffix == ".jsonl" for path in files)
    return lines and any(_is_figure(path) for path in files)


def collect_medicat(folder, files, notes):
    """Read the CT figures of MedICaT -> (subjects sorted by name, None). There is no split.

    A subject is one figure, and its report is the caption. The figures of a paper belong to one
    person. A figure is a picture of a CT; its pixels are no HU.

    DataError if a line is no figure.
    """
    figures = {path.name: path for path in files if _is_figure(path)}
    subjects = {}
    others = 0
    panels = 0
    missing = 0
    for table in files:
        if table.suffix != ".jsonl":
            continue
        for row in _read_lines(table):
            text = row.get("s2_caption") or ""
            if row.get("radiology") is not True or not is_ct(text):
                others += 1
                continue
            if PANELS.search(text):
                panels += 1
                continue
            path = figures.get(f"{row['pdf_hash']}_{row['fig_uri']}")
            if path is None:
                missing += 1
                continue
            subjects[path.stem] = Subject(path.stem, row["pdf_hash"], {"ct": path, TEXT: table},
                                          report=text)
    notes.append(f"{others} figures are no CT, {panels} have several panels; they are not used")
    if missing:
        notes.append(f"{missing} figures of CT are not here")
    return [subjects[name] for name in sorted(subjects)], None


def is_ct(text):
    """True if a caption names CT and no other kind of image."""
    return OF_CT.search(text) is not None and OF_OTHERS.search(text) is None


def _is_figure(path):
    return path.parent.name == FIGURE_FOLDER and is_picture(path)


def _read_lines(path):
    """Read a file with one JSON object in each line -> an iterator of dicts."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if not (row["pdf_hash"] and row["fig_uri"]):
                    raise ValueError("a name is empty")
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number}: is no figure ({error}); "
                                "download the file again") from None
            yield row
