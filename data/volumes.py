"""NIfTI volumes: read, orient, resample, cut into slices, and write back on the source's own grid.

Slices that somebody else has cut and scaled are read from .npy files.

Inside the project every volume is *canonical*: axes (x, y, z) point to the patient's right, front and head (RAS+).
Networks and pictures get *upright radiological* slices: row 0 is the patient's front, column 0 the patient's right.
A Volume remembers how its file was stored, so a synthetic image opens on top of its source in any viewer.
"""

import gzip
import os
import zlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.processing import resample_from_to
from PIL import Image

from data.files import DataError, is_nifti, write_atomically
from data.intensities import CT_BODY, background_value

MAX_VOXELS = 2**28           # 1 GiB as float32; the largest clinical head scans have about 2**27 voxels
GRID_TOLERANCE = 1e-3        # mm; two grids closer than this everywhere are the same grid
BAD_VOXELS = 1e-3            # share of NaN or infinite voxels above which a file is refused
ECHO_CONTRAST = 0.1          # of the mean; PD exceeds T2 by more, every second slice of one echo hardly differs
CANONICAL = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass
class Volume:
    """One file. array: float32 (X, Y, Z), canonical; affine: (4, 4), canonical voxel -> world mm (RAS+)."""

    array: np.ndarray
    affine: np.ndarray
    path: Path
    header: nib.Nifti1Header                        # as stored: shape, codes, units, byte order of the original
    orientation: np.ndarray                         # (3, 2) nibabel orientation of the stored axes
    notes: list = field(default_factory=list)       # one sentence for every repair and oddity

    @property
    def spacing(self):
        """Voxel edges along x, y, z in mm."""
        return nib.affines.voxel_sizes(self.affine)

    @property
    def axes(self):
        """Where the stored axes point, such as LPS."""
        return "".join(nib.orientations.ornt2axcodes(self.orientation))


def read_volume(path, max_voxels=MAX_VOXELS, echo=None, contrast=None):
    """Read a NIfTI-1 or NIfTI-2 file, decide by its bytes (not its name) whether it is compressed, turn it to RAS+.

    A 2-D image becomes one slice; trailing axes of length 1 are dropped. echo: of a file that holds the two echoes of
    a PD/T2 series, 0 gives PD and 1 gives T2 (see split_echoes). contrast: of a "ct" other values are odd than of MR.
    DataError if the file is missing, damaged, not NIfTI, too large, 4-D (but for two echoes), complex or coloured, has a
    singular affine, or too many NaN.
    """
    path = Path(path)
    if not is_nifti(path):
        raise DataError(f"{path}: only .nii and .nii.gz are read; convert the file to NIfTI")
    try:
        header, array, packed = _decode(path, max_voxels, echoes=1 if echo is None else 2)
    except FileNotFoundError:
        if path.is_symlink():
            raise DataError(f"{path}: is a link to {os.readlink(path)}, which does not exist; repair it") from None
        raise DataError(f"{path}: no such file") from None
    except PermissionError:
        raise DataError(f"{path}: no permission to read (mode {path.stat().st_mode & 0o777:o}); use chmod") from None
    except EOFError:
        raise DataError(f"{path}: the compressed data end early; download the file again") from None
    except gzip.BadGzipFile as error:
        raise DataError(f"{path}: the compressed data fail their check ({error}); download the file again") from None
    except zlib.error as error:
        raise DataError(f"{path}: the compressed data are damaged ({error}); download the file again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None

    notes = []
    named_gz = path.name.lower().endswith(".gz")
    if packed != named_gz:
        notes.append("is compressed although its name ends in .nii" if packed else "is not compressed despite .gz")
    array = _without_bad_voxels(array, path, notes)
    if echo is not None:
        array = split_echoes(array, path)[echo]
        header.set_data_shape(array.shape)                                  # of one echo, before the affine is made
    affine = _checked_affine(header, path)
    if echo is not None:
        extent = array.shape[2] * np.linalg.norm(affine[:3, 2])
        notes.append(f"holds both echoes; with its header's slice distance each covers {extent:.0f} mm")
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        notes.append("has no orientation in its header; the NIfTI default is assumed, left and right may be swapped")
    if contrast == "ct" and array.min() > CT_BODY:
        notes.append(f"holds no air, its lowest value is {array.min():g}; is it in HU?")
    if contrast != "ct" and array.min() < 0:
        notes.append("has negative voxels; they are kept, the scale starts at the background")
    orientation = io_orientation(affine)
    turned = np.ascontiguousarray(apply_orientation(array, orientation))
    return Volume(turned, affine @ inv_ornt_aff(orientation, array.shape), path, header, orientation, notes)


def split_echoes(array, path):
    """The stored voxels of a dual-echo series -> (PD, T2), each (X, Y, Z).

    array: (X, Y, Z, 2), or (X, Y, 2 Z) with echoes that alternate from slice to slice or follow each other as halves;
    of these two the one is taken whose groups differ more in their mean. PD is the brighter, its echo time is shorter.
    Both echoes lie where the header puts its first Z slices: the scanner takes them at the same places, and the slice
    distance in the header is believed to be that of the acquired slices, not half of it. DataError (naming path) if the
    number of slices is odd, or if neither echo is brighter.
    """
    if array.ndim == 4:
        pairs = [(array[..., 0], array[..., 1])]
    else:
        count = array.shape[2]
        if count % 2:
            raise DataError(f"{path}: has {count} slices, an odd number, so not PD and T2 of each; convert it again")
        pairs = [(array[..., ::2], array[..., 1::2]), (array[..., :count // 2], array[..., count // 2:])]
    means = [[echo.mean(dtype=np.float64) for echo in pair] for pair in pairs]
    gaps = [abs(first - second) for first, second in means]
    best = int(np.argmax(gaps))
    if gaps[best] <= ECHO_CONTRAST * np.abs(array).mean(dtype=np.float64):
        raise DataError(f"{path}: no half of it is brighter, so it does not hold PD and T2; convert the series again")
    first, second = pairs[best]
    return (first, second) if means[best][0] > means[best][1] else (second, first)


def _decode(path, max_voxels, echoes):
    """The header, the voxels as float32 (X, Y, Z) in stored orientation, and whether the file was gzipped.

    echoes: 2 lets a file of two volumes pass, as (X, Y, Z, 2).
    """
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else open(path, "rb") as file:
        start = file.read(nib.Nifti2Header.sizeof_hdr)
        header = _read_header(start, path)
        shape = _checked_shape(header, path, max_voxels, echoes)            # before gigabytes are unpacked
        dtype = _checked_dtype(header, path)
    content = path.read_bytes()
    if packed:
        content = gzip.decompress(content)                                  # compares the CRC, too
    header["vox_offset"] = max(header["vox_offset"], header.sizeof_hdr)
    wanted = int(np.prod(shape)) * dtype.itemsize
    held = max(0, len(content) - header.get_data_offset())
    if held < wanted:
        raise DataError(f"{path}: ends early ({held} of {wanted} voxel bytes); download the file again")
    array = np.asanyarray(nib.arrayproxy.ArrayProxy(BytesIO(content), header))      # scaled by slope and intercept
    with np.errstate(over="ignore"):                                        # overflow becomes inf, which is counted
        return header, array.reshape(shape).astype(np.float32), packed


def _read_header(start, path):
    """The NIfTI-1 or NIfTI-2 header in the first bytes of a file."""
    text = start[:200].lstrip().lower()
    if not start:
        raise DataError(f"{path}: the file is empty (0 bytes); download it again")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(f"{path}: looks like HTML, a web page saved by a failed download; download the file again")
    for kind, place, magic in ((nib.Nifti1Header, 344, b"n+1\0"), (nib.Nifti2Header, 4, b"n+2\0")):
        if start[place:place + 4] == magic and len(start) >= kind.sizeof_hdr:
            return kind(start[:kind.sizeof_hdr], check=False)
    raise DataError(f"{path}: is not a NIfTI file (no NIfTI header in its first {len(start)} bytes); convert it again")


def _checked_shape(header, path, max_voxels, echoes):
    shape = tuple(int(n) for n in header.get_data_shape())
    if len(shape) < 2 or min(shape) < 0:
        raise DataError(f"{path}: has shape {shape}, not that of an image or a volume")
    if 0 in shape:
        raise DataError(f"{path}: has an axis of length 0 (shape {shape}); export it again")
    if any(n > 1 for n in shape[3:]) and shape[3:] != (echoes,):
        raise DataError(f"{path}: is {len(shape)}-D with shape {shape}; split it into one 3-D file per contrast")
    if np.prod(shape, dtype=np.float64) > max_voxels:
        raise DataError(f"{path}: has {np.prod(shape, dtype=np.float64):.0f} voxels (shape {shape}), more than "
                        f"{max_voxels}; crop or resample it")
    return shape if shape[3:] == (2,) else (shape + (1,))[:3]


def _checked_dtype(header, path):
    try:
        dtype = header.get_data_dtype()
    except nib.spatialimages.HeaderDataError as error:
        raise DataError(f"{path}: unknown voxel type ({error}); export it again") from None
    if dtype.fields:
        raise DataError(f"{path}: holds colours (voxel type {dtype}); export grey values")
    if dtype.kind == "c":
        raise DataError(f"{path}: holds complex numbers ({dtype}); take the magnitude first")
    if dtype.kind not in "iuf":
        raise DataError(f"{path}: holds no numbers (voxel type {dtype}); export it again")
    return dtype


def _checked_affine(header, path):
    try:
        affine = header.get_best_affine()
    except (ValueError, nib.spatialimages.HeaderDataError) as error:
        raise DataError(f"{path}: its orientation cannot be understood ({error}); export it again") from None
    edges = nib.affines.voxel_sizes(affine)
    # The determinant is compared with the product of the edges, so tiny voxels are not mistaken for flat ones.
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) <= 1e-6 * np.prod(edges):
        raise DataError(f"{path}: its affine is singular (voxel edges {np.round(edges, 3).tolist()} mm); "
                        "export it again")
    return affine


def _without_bad_voxels(array, path, notes):
    """NaN and infinities become background if they are few; otherwise DataError with the first position."""
    bad = ~np.isfinite(array)
    count = int(bad.sum())
    if count == 0:
        return array
    if count > BAD_VOXELS * array.size:
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise DataError(f"{path}: {count} of {array.size} voxels are NaN or infinite (first at {first}); "
                        "repair the file")
    notes.append(f"has {count} NaN or infinite voxels; they are replaced by the background")
    return np.where(bad, background_value(np.where(bad, np.median(array[~bad]), array)), array).astype(np.float32)


def read_slices(paths):
    """.npy files of one slice each, (H, W) in [0, 1] -> float32 (Z, H, W), as they are: how they lie is not recorded.

    DataError if a file is no such array or has another shape than the first.
    """
    slices = None
    for i, path in enumerate(paths):
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: cannot be read as an array ({error}); write it again with numpy.save") from None
        if array.ndim != 2 or array.dtype.kind not in "iuf" or 0 in array.shape:
            raise DataError(f"{path}: holds {array.dtype} of shape {array.shape}; a slice is (H, W) numbers")
        if slices is None:
            slices = np.empty((len(paths), *array.shape), np.float32)
        if array.shape != slices.shape[1:]:
            raise DataError(f"{path}: has shape {array.shape}, {paths[0]} has {slices.shape[1:]}; pad or crop them alike")
        if not (array.min() >= -1e-3 and array.max() <= 1 + 1e-3):          # NaN fails, too
            raise DataError(f"{path}: holds values from {array.min():g} to {array.max():g}; scale them to [0, 1]")
        slices[i] = array.clip(0, 1)
    return slices


def _corners(shape):
    """(8, 3) indices of the corner voxels."""
    return np.stack(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij"), -1).reshape(-1, 3)


def same_grid(first, second):
    """True if two volumes have the same shape and no corner lies further apart than GRID_TOLERANCE."""
    if first.array.shape != second.array.shape:
        return False
    corners = _corners(first.array.shape)
    gap = nib.affines.apply_affine(first.affine, corners) - nib.affines.apply_affine(second.affine, corners)
    return bool(np.linalg.norm(gap, axis=1).max() <= GRID_TOLERANCE)


def resample_to(moving, fixed, order=1, fill=None):
    """`moving` on the grid of `fixed`, by the two affines: float32 (X, Y, Z) of `fixed`. This is not registration.

    order: 1 linear, 0 nearest (labels). fill: value outside moving's box, by default its background.
    Equal grids return moving.array itself. DataError if the two boxes do not overlap.
    """
    if same_grid(moving, fixed):
        return moving.array
    to_moving = np.linalg.inv(moving.affine) @ fixed.affine                 # fixed voxel -> moving voxel
    corners = nib.affines.apply_affine(to_moving, _corners(fixed.array.shape))
    last = np.array(moving.array.shape) - 1
    if (corners.max(0) < -0.5).any() or (corners.min(0) > last + 0.5).any():
        raise DataError(f"{moving.path}: lies outside the box of {fixed.path}; register the two first")
    fill = background_value(moving.array) if fill is None else fill
    # "grid-constant" blends with the fill at the rim; "constant" would blank a border slice that lies at -1e-9.
    image = nib.Nifti1Image(moving.array, moving.affine)
    target = (fixed.array.shape, fixed.affine)
    moved = resample_from_to(image, target, order=order, mode="grid-constant", cval=fill)
    return np.asarray(moved.dataobj, np.float32)


def upright(array):
    """Canonical (X, Y, Z) -> axial slices (Z, Y, X): row 0 the patient's front, column 0 the patient's right."""
    return array[::-1, ::-1].transpose(2, 1, 0)


def canonical(slices):
    """Undo `upright`: (Z, Y, X) -> (X, Y, Z)."""
    return slices.transpose(2, 1, 0)[::-1, ::-1]


def fit(array, size):
    """Canonical volume (X, Y, Z) -> upright slices (Z, size, size), float32; see fit_slices."""
    return fit_slices(upright(array), size)


def fit_slices(slices, size, labels=False):
    """(Z, H, W) -> (Z, size, size), float32.

    Slices that fit are padded with 0 around their centre, voxel for voxel. Larger ones are padded to a square, then
    resampled with a triangle filter as wide as the reduction, which keeps thin structures from aliasing; labels are not
    mixed: they take their nearest neighbour's number.
    """
    height, width = slices.shape[1:]
    side = max(size, height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.zeros((len(slices), side, side), np.float32)
    square[:, top:top + height, left:left + width] = slices
    return square if side == size else _resized(square, size, Image.Resampling.NEAREST if labels else Image.Resampling.BILINEAR)


def unfit(slices, shape):
    """Undo `fit`: (Z, size, size) -> canonical (X, Y, Z) = shape; exact where fit only padded."""
    width, height, depth = shape
    if len(slices) != depth or slices.shape[1] != slices.shape[2]:
        raise ValueError(f"unfit: slices of shape {slices.shape} do not belong to a volume of shape {tuple(shape)}")
    size = slices.shape[1]
    side = max(size, height, width)
    square = slices if side == size else _resized(slices, side)
    top, left = (side - height) // 2, (side - width) // 2
    return canonical(square[:, top:top + height, left:left + width])


def _resized(squares, size, how=Image.Resampling.BILINEAR):
    """(Z, side, side) -> (Z, size, size). Pillow widens the triangle filter when it reduces (the prefilter)."""
    pictures = (Image.fromarray(np.ascontiguousarray(s, np.float32)) for s in squares)
    return np.stack([np.asarray(p.resize((size, size), how)) for p in pictures])


def write_volume(path, array, like, description, overwrite=False):
    """Write canonical `array` (X, Y, Z) as float32 NIfTI on the grid that `like` had in its file.

    Orientation, affine, sform and qform codes, units and shape are the source's; scl_slope is 1. `description` (units,
    method) goes to the header field `descrip`, which always says synthetic and ends after 79 characters. Extensions of
    the source are not copied (they may hold patient data). The file appears complete or not at all.
    DataError if it exists and overwrite is False, or if it cannot be written.
    """
    path = Path(path)
    if not is_nifti(path):
        raise DataError(f"{path}: volumes are written as .nii or .nii.gz; change the name")
    if array.shape != like.array.shape:
        raise ValueError(f"write_volume: array {array.shape} is not on the grid of {like.path} {like.array.shape}")
    if path.exists() and not overwrite:
        raise DataError(f"{path}: exists already; move it away or choose another folder")
    header = like.header.copy()
    header.set_data_dtype(np.float32)
    header.set_slope_inter(1, 0)
    header["vox_offset"] = header.sizeof_hdr + 4                            # four zero bytes: no extensions follow
    header["cal_min"], header["cal_max"] = 0, 0                             # the source's display window is not ours
    text = description if "synthetic" in description else f"synthetic; {description}"
    header["descrip"] = text.encode("ascii", "replace")[:79]
    stored = apply_orientation(array, ornt_transform(CANONICAL, like.orientation))
    # Not nibabel's to_bytes: it refuses, or repairs, odd headers that were good enough to read.
    voxels = stored.astype(header.endianness + "f4").tobytes(order="F")
    content = header.binaryblock + bytes(4) + voxels
    if path.name.lower().endswith(".gz"):
        content = gzip.compress(content, compresslevel=6, mtime=0)          # no clock inside: same input, same bytes
    try:
        with write_atomically(path) as file:
            file.write(content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None
