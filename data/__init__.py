"""A folder of scans becomes one memory-mapped array of slices, split by person: open_dataset, load_subject, check.

Names of files are the business of data.layouts, voxels that of data.volumes. Slices are decoded once and kept as
float16 under runs/cache/, never in the data folder. Nothing is dropped in silence: what is left out is counted.
"""

from data.check import check
from data.dataset import Dataset, Rows, evenly, is_phantom, open_dataset
from data.files import DataError
from data.intensities import Scale, denormalise
from data.layouts import Layout, Subject, canonical_contrast, find_layout
from data.prompts import PROMPT_FIELDS, caption, describe_lesion, prompt
from data.split import make_split
from data.subject import SubjectSlices, kept_slices, load_subject, to_synthesize
from data.volumes import Volume, read_volume, write_volume

__all__ = ["PROMPT_FIELDS", "DataError", "Dataset", "Layout", "Rows", "Scale", "Subject", "SubjectSlices", "Volume",
           "canonical_contrast", "caption", "check", "denormalise", "describe_lesion", "evenly", "find_layout",
           "is_phantom", "kept_slices", "load_subject", "make_split", "open_dataset", "prompt", "read_volume",
           "to_synthesize", "write_volume"]
