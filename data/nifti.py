"""The bytes of a NIfTI file -> its header and its voxels as they are stored, both checked."""

import gzip
import os
import zlib
from contextlib import contextmanager
from io import BytesIO

import nibabel as nib
import numpy as np

from data.files import DataError


def decode(path, max_voxels, echoes=1, frames=None):
    """Read a file -> (header, voxels as float32 (X, Y, Z) as stored, True if it is compressed).

    The first bytes decide whether the file is compressed, not its name.

    max_voxels: The largest number of voxels. Larger files are refused before they are unpacked.
    echoes: With 2, a file of two volumes is allowed, and the voxels are (X, Y, Z, 2).
    frames: For a PET of several frames, their durations in s. The voxels are the mean of the
        frames, weighted by duration. If there are not as many durations as frames, all frames weigh
        the same. By default, a file of several frames is refused.
    DataError if the file is missing, damaged, too large or no NIfTI-1 or NIfTI-2 file with real
    numbers in it.
    """
    with _in_plain_words(path):
        header, packed = _open_header(path)
        return _decode(path, header, packed, max_voxels, echoes, frames)


def decode_header(path, max_voxels, series=False):
    """Read the header of a file -> (header, shape (X, Y, Z)); no voxel is read.

    series: True if the file may hold several volumes, as a PET of several frames.
    DataError as decode, as far as the header shows it.
    """
    with _in_plain_words(path):
        header, _ = _open_header(path)
        return header, _checked_shape(header, path, max_voxels, 1, series)[:3]


def volumes_of(header):
    """The number of volumes along the fourth axis of a file."""
    return int(max(header.get_data_shape()[3:], default=1))


@contextmanager
def _in_plain_words(path):
    """Turn what Python raises for a file that cannot be read into a DataError."""
    try:
        yield
    except FileNotFoundError:
        if path.is_symlink():
            raise DataError(f"{path}: is a link to {os.readlink(path)}, which does not exist; "
                            "repair it") from None
        raise DataError(f"{path}: no such file") from None
    except PermissionError:
        mode = path.stat().st_mode & 0o777
        raise DataError(f"{path}: no permission to read (mode {mode:o}); use chmod") from None
    except EOFError:
        raise DataError(f"{path}: the compressed data end early; download the file again") from None
    except gzip.BadGzipFile as error:
        raise DataError(f"{path}: the compressed data fail their check ({error}); "
                        "download the file again") from None
    except zlib.error as error:
        raise DataError(f"{path}: the compressed data are damaged ({error}); "
                        "download the file again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _open_header(path):
    """The header of a file, and True if the file is compressed."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else open(path, "rb") as file:
        return _read_header(file.read(nib.Nifti2Header.sizeof_hdr), path), packed


def _decode(path, header, packed, max_voxels, echoes, frames):
    # We check the header first, so that a file that is too large is refused before it is unpacked.
    shape = _checked_shape(header, path, max_voxels, echoes, frames is not None)
    dtype = _checked_dtype(header, path)
    content = path.read_bytes()
    if packed:
        content = gzip.decompress(content)                      # this compares the CRC as well
    header["vox_offset"] = max(header["vox_offset"], header.sizeof_hdr)
    wanted = int(np.prod(shape)) * dtype.itemsize
    held = max(0, len(content) - header.get_data_offset())
    if held < wanted:
        raise DataError(f"{path}: ends early ({held} of {wanted} voxel bytes); "
                        "download the file again")
    # nibabel multiplies by the header's slope and adds its intercept, in float64.
    stored = nib.arrayproxy.ArrayProxy(BytesIO(content), header)
    if frames is not None and len(shape) == 4:
        array = _mean_of_frames(stored, shape, frames)
    else:
        array = np.asanyarray(stored).reshape(shape)
    with np.errstate(over="ignore"):        # too large a number becomes infinite; see volumes
        return header, array.astype(np.float32), packed


def _mean_of_frames(stored, shape, durations):
    """The mean over the last axis of stored voxels (X, Y, Z, T) -> (X, Y, Z). See decode.

    One frame after the other is read, because all frames together may not fit into the memory.
    """
    count = shape[3]
    weights = durations if len(durations) == count else [1] * count
    total = np.zeros(shape[:3])
    for frame, weight in enumerate(weights):
        total += weight * stored[..., frame]
    return total / sum(weights)


def _read_header(start, path):
    """The NIfTI-1 or NIfTI-2 header in the first bytes of a file.

    nibabel does not check the header, because a check would refuse headers with small faults.
    """
    text = start[:200].lstrip().lower()
    if not start:
        raise DataError(f"{path}: the file is empty (0 bytes); download it again")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(f"{path}: looks like HTML, a web page saved by a failed download; "
                        "download the file again")
    if start[344:348] == b"n+1\0":
        return nib.Nifti1Header(start[:348], check=False)
    if start[4:8] == b"n+2\0" and len(start) == 540:
        return nib.Nifti2Header(start, check=False)
    raise DataError(f"{path}: is not a NIfTI file (no NIfTI header in its first {len(start)} "
                    "bytes); convert it again")


def _checked_shape(header, path, max_voxels, echoes, series=False):
    """The three axes of a volume. A missing axis has length 1.

    There are four axes for a file of two echoes, and for one of several frames if `series` is True.
    """
    shape = tuple(int(n) for n in header.get_data_shape())
    if len(shape) < 2 or min(shape) < 0:
        raise DataError(f"{path}: has shape {shape}, not that of an image or a volume")
    if 0 in shape:
        raise DataError(f"{path}: has an axis of length 0 (shape {shape}); export it again")
    several = volumes_of(header) > 1
    if several and shape[3:] != (echoes,) and not (series and len(shape) == 4):
        raise DataError(f"{path}: is {len(shape)}-D with shape {shape}; split it into one 3-D file "
                        "per contrast")
    held = shape[:3] if series else shape                       # in the memory at one time
    voxels = np.prod(held, dtype=np.float64)                    # integers could overflow
    if voxels > max_voxels:
        raise DataError(f"{path}: has {voxels:.0f} voxels (shape {shape}), more than {max_voxels}; "
                        "crop or resample it")
    if several:
        return shape
    return (shape + (1,))[:3]


def _checked_dtype(header, path):
    """The type of the stored numbers, which must be integers or real numbers."""
    try:
        dtype = header.get_data_dtype()
    except (KeyError, nib.spatialimages.HeaderDataError) as error:
        raise DataError(f"{path}: unknown voxel type ({error}); export it again") from None
    if dtype.fields:
        raise DataError(f"{path}: holds colours (voxel type {dtype}); export grey values")
    if dtype.kind == "c":
        raise DataError(f"{path}: holds complex numbers ({dtype}); take the magnitude first")
    if dtype.kind not in "iuf":
        raise DataError(f"{path}: holds no numbers (voxel type {dtype}); export it again")
    return dtype


def checked_affine(header, path):
    """The (4, 4) matrix from a stored voxel index to world mm. DataError if it is singular."""
    try:
        affine = header.get_best_affine()
    except (ValueError, nib.spatialimages.HeaderDataError) as error:
        raise DataError(f"{path}: its orientation cannot be understood ({error}); "
                        "export it again") from None
    edges = nib.affines.voxel_sizes(affine)
    # We compare the volume of a voxel with the product of its edges. A voxel that is small in all
    # directions is therefore not taken for a flat one.
    volume = abs(np.linalg.det(affine[:3, :3]))
    if not np.isfinite(affine).all() or volume <= 1e-6 * np.prod(edges):
        raise DataError(f"{path}: its affine is singular (voxel edges "
                        f"{np.round(edges, 3).tolist()} mm); export it again")
    return affine
