"""The files of a set: NIfTI, CSV and JSON, with the same bytes for the same content."""

import csv
import gzip
import io
import json

import nibabel as nib
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform


def write_nifti(path, array, grid, axes="LPS"):
    """Write an array (X, Y, Z) as .nii.gz. The same content always gives the same bytes.

    The gzip header holds no time and no file name.

    axes: Where the stored axes are to point. The place of every voxel in the world stays.
    """
    image = nib.Nifti1Image(array, grid.affine())
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(axes))
    image = image.as_reoriented(turn)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"digital phantom (synthetic)"
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))


def write_sheet(path, rows, delimiter=","):
    """Write lists of values as CSV, with the same bytes on every system."""
    sheet = io.StringIO()
    csv.writer(sheet, delimiter=delimiter, lineterminator="\n").writerows(rows)
    path.write_text(sheet.getvalue(), encoding="utf-8", newline="\n")


def write_json(path, content):
    """Write plain values as JSON, with the same bytes on every system."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")
