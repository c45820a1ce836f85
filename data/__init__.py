"""Scans on disk become slices for a network, and results become NIfTI volumes again.

`open_dataset` turns a folder of scans into one array of slices that is split by person.
`load_subject` reads one subject of such a folder, and `load_scans` reads any files of one subject.
`read_picture` reads a PNG or JPEG file, and `clean_report` cleans the words of a report.
`check` says what is wrong with a folder. `write_volume` writes a volume on the grid of its source.
Each name stands in the file that it is imported from here.
Decoded slices are kept under runs/cache/, never in the data folder. What is left out is counted and
said. Everything that is wrong with the data raises DataError with a message of one line.
"""

from data.check import check
from data.dataset import (
    Dataset,
    Rows,
    evenly,
    is_phantom,
    make_phantom,
    open_dataset,
    subject_files,
)
from data.files import DataError
from data.intensities import Scale, denormalise, normalise
from data.layouts import TEXT, Layout, Subject, canonical_contrast, find_layout
from data.outputs import to_synthesize
from data.picture_files import StoredPicture, fit_picture, read_picture, write_picture
from data.placing import Picture, picture_of
from data.prompts import (
    PROMPT_FIELDS,
    caption,
    describe_lesion,
    prompt,
    record_of,
    scan_fields,
    scan_prompt,
)
from data.reports import clean_report
from data.split import make_split
from data.subject import (
    SubjectSlices,
    kept_slices,
    load_scans,
    load_subject,
)
from data.volumes import Volume, read_volume, write_volume

__all__ = ["PROMPT_FIELDS", "TEXT", "DataError", "Dataset", "Layout", "Picture", "Rows", "Scale",
           "StoredPicture", "Subject", "SubjectSlices", "Volume", "canonical_contrast", "caption",
           "check", "clean_report", "denormalise", "describe_lesion", "evenly", "find_layout",
           "fit_picture", "is_phantom", "kept_slices", "load_scans", "load_subject", "make_phantom",
           "make_split", "normalise", "open_dataset", "picture_of", "prompt", "read_picture",
           "read_volume", "record_of", "scan_fields", "scan_prompt", "subject_files",
           "to_synthesize", "write_picture", "write_volume"]
