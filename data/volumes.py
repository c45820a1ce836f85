"""Volumes in NIfTI and MetaImage files: read, turned, resampled, cut into slices, and written.

Inside the project every volume is *canonical*: the axes (x, y, z) point to the patient's right,
front and head (RAS+). Networks and pictures get *upright radiological* slices: row 0 is the
patient's front, and column 0 is the patient's right. A Volume remembers how its file was stored. A
synthetic image can therefore be written so that it opens on top of its source in any viewer.

Slices that somebody else has cut and scaled are read from .npy files.
"""

import gzip
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.processing import resample_from_to
from PIL import Image
from scipy import ndimage

from data.files import DataError, is_nifti, write_atomically
from data.intensities import IN_HU, background_value, reaching_border, to_hounsfield
from data.metaimage import is_metaimage, read_metaimage, read_metaimage_grid
from data.nifti import (
    checked_affine,
    corner_gap,
    corners_of,
    decode,
    decode_header,
    volumes_of,
)
from data.opening import in_plain_words

MAX_VOXELS = 2**28          # 1 GiB as float32; the largest clinical head scans have half of it
GRID_TOLERANCE = 1e-3       # mm; two grids that are closer than this everywhere are the same grid
BAD_VOXELS = 1e-3           # a file with a larger share of NaN or infinite voxels is refused
ECHO_CONTRAST = 0.1         # of the mean; see split_echoes
COARSER = 1.5               # a grid is coarser than another one from this ratio of the voxels on
# The header fields that say where a volume lies. No other field is copied to a volume we write.
GEOMETRY = ("dim", "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c",
            "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z")
CANONICAL = np.array([[0, 1], [1, 1], [2, 1]])      # nibabel's way to write RAS+


@dataclass
class Volume:
    """One file. The array is canonical, the header is that of the file."""

    array: np.ndarray               # (X, Y, Z) float32
    affine: np.ndarray              # (4, 4), canonical voxel index -> world mm (RAS+)
    path: Path
    header: nib.Nifti1Header        # as stored: shape, codes, units and byte order of the file
    orientation: np.ndarray         # (3, 2), nibabel's orientation of the stored axes
    notes: list = field(default_factory=list)       # one sentence for every repair and oddity

    @property
    def spacing(self):
        """The edges of a voxel along x, y and z in mm."""
        return nib.affines.voxel_sizes(self.affine)

    @property
    def axes(self):
        """Where the stored axes point, as three letters such as LPS."""
        return "".join(nib.orientations.ornt2axcodes(self.orientation))


# ---- Reading -------------------------------------------------------------------------------------

def read_volume(path, max_voxels=MAX_VOXELS, echo=None, contrast=None, frames=None, channel=None):
    """Read a NIfTI-1, NIfTI-2 or MetaImage file, compressed or not, and turn it to RAS+ -> Volume.

    A MetaImage gets a NIfTI header of the same grid. A 2-D image becomes a volume of one slice.
    Axes of length 1 behind the third are dropped.

    echo: For a file that holds both echoes of a PD/T2 series, 0 gives PD and 1 gives T2.
    contrast: The notes depend on it, because CT and PET have other normal values than MR.
    frames, channel: See nifti.decode. frames is () if the durations are not known.
    DataError if the file is missing, damaged, of another format, too large, complex or coloured. It
    is also raised if the file has a singular affine, many NaN, or more than one volume (two with
    `echo`, any number with `frames` or `channel`).
    """
    path = Path(path)
    with in_plain_words(path):
        return _read(path, max_voxels, echo, contrast, frames, channel)


def _read(path, max_voxels, echo, contrast, frames, channel):
    """See read_volume."""
    if is_metaimage(path):
        array, affine, notes = read_metaimage(path, max_voxels)
        header = _new_header(array.shape, affine)
    elif is_nifti(path):
        header, array, notes = decode(path, max_voxels, 1 if echo is None else 2, frames, channel)
    else:
        raise DataError(f"{path}: only .nii and .nii.gz are read, and .mhd and .mha; "
                        "convert the file to NIfTI")
    count = volumes_of(header.get_data_shape())
    if frames is not None and count > 1:
        notes.append(_say_mean(count, frames))
    if frames is not None or channel is not None:
        header.set_data_shape(array.shape)
    array = _without_bad_voxels(array, path, contrast, notes)
    if echo is not None:
        array = split_echoes(array, path)[echo]
        # nibabel's default affine depends on the shape, so the shape must be that of one echo.
        header.set_data_shape(array.shape)
    affine = checked_affine(header, path, notes)
    if echo is not None:
        extent = array.shape[2] * np.linalg.norm(affine[:3, 2])
        notes.append("holds both echoes; with its header's slice distance each covers "
                     f"{extent:.0f} mm")
    if contrast in IN_HU:
        try:
            array, note = to_hounsfield(array)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        notes += [note] if note else []
    elif contrast == "pet":
        if array.min() < 0:
            notes.append("has negative voxels; they become 0")
    elif array.min() < 0:
        notes.append("has negative voxels; they are kept, the scale starts at the background")
    orientation = io_orientation(affine)
    turned = np.ascontiguousarray(apply_orientation(array, orientation))
    side = max(turned.shape[:2])
    if side**2 * turned.shape[2] > 4 * MAX_VOXELS:
        raise DataError(f"{path}: has {turned.shape[0]} x {turned.shape[1]} pixels in a slice, too "
                        "long to be made square; crop or resample it")
    turned_affine = affine @ inv_ornt_aff(orientation, array.shape)
    return Volume(turned, turned_affine, path, header, orientation, notes)


def _say_mean(count, durations):
    """The note for a PET of several frames."""
    if len(durations) == count:
        return f"has {count} frames; their mean is used, weighted by duration"
    why = f"there are {len(durations)} durations" if durations else "no durations are known"
    return f"has {count} frames; their plain mean is used, because {why}"


def read_geometry(path, series=False):
    """Read where a file lies in space, and no voxel of it -> Volume whose voxels are all 0.

    series: True if the file may hold several volumes, as a PET of several frames.
    DataError as read_volume, as far as the header shows it.
    """
    path = Path(path)
    with in_plain_words(path):
        if is_metaimage(path):
            shape, affine = read_metaimage_grid(path, MAX_VOXELS)
            header = _new_header(shape, affine)
        else:
            header, shape = decode_header(path, MAX_VOXELS, series)
        if volumes_of(header.get_data_shape()) > 1:
            header.set_data_shape(shape)
        affine = checked_affine(header, path)
        orientation = io_orientation(affine)
    # The zeros are one number in memory, which looks like an array of this shape.
    zeros = apply_orientation(np.broadcast_to(np.float32(0), shape), orientation)
    return Volume(zeros, affine @ inv_ornt_aff(orientation, shape), path, header, orientation)


def grid_around(volume, pixels, spacing):
    """A grid of given pixels around a volume -> Volume whose voxels are all 0.

    In the plane of the slices, its centre is the centre of the box of `volume`. Its slices cover
    the height of that box. Its axes are those of the patient.

    pixels: (X, Y), their numbers. spacing: The edges of a voxel along x, y and z in mm.
    """
    edges = nib.affines.apply_affine(volume.affine, corners_of(volume.array.shape, margin=0.5))
    low = edges.min(0)
    high = edges.max(0)
    spacing = np.asarray(spacing, float)
    depth = max(1, round((high[2] - low[2]) / spacing[2]))
    shape = (*pixels, depth)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (low + high) / 2 - spacing * (np.array(shape) - 1) / 2
    zeros = np.broadcast_to(np.float32(0), shape)
    return Volume(zeros, affine, volume.path, _new_header(shape, affine), CANONICAL)


def _new_header(shape, affine):
    """The NIfTI-1 header of a grid that no NIfTI file has. affine: (4, 4), stored index -> mm."""
    header = nib.Nifti1Header()
    header["magic"] = b"n+1"
    header.set_data_shape(shape)
    header.set_xyzt_units("mm")
    header.set_sform(affine, code=1)            # 1: the coordinates of the scanner
    header.set_qform(affine, code=1)
    return header


def split_echoes(array, path):
    """Split the stored voxels of a dual-echo series -> (PD, T2), each (X, Y, Z).

    array: (X, Y, Z, 2), or (X, Y, 2 Z). In the second case the echoes alternate from slice to
        slice, or one follows the other. We take the split whose two groups differ more in their
        mean. PD is the brighter group, because its echo time is shorter.

    The scanner takes both echoes at the same places. We place both where the header puts its first
    Z slices, and take the slice distance in the header as that of the acquired slices.
    DataError (naming path) if the number of slices is odd, or if neither group is brighter.
    """
    if array.ndim == 4:
        splits = [(array[..., 0], array[..., 1])]
    else:
        count = array.shape[2]
        if count % 2:
            raise DataError(f"{path}: has {count} slices, an odd number, so not PD and T2 of each; "
                            "convert it again")
        alternating = (array[..., ::2], array[..., 1::2])
        halves = (array[..., :count // 2], array[..., count // 2:])
        splits = [alternating, halves]
    means = []
    for first, second in splits:
        means.append((first.mean(dtype=np.float64), second.mean(dtype=np.float64)))
    gaps = [abs(first - second) for first, second in means]
    best = int(np.argmax(gaps))
    # PD is brighter than T2 by more than this. Every second slice of one echo hardly differs.
    if gaps[best] <= ECHO_CONTRAST * np.abs(array).mean(dtype=np.float64):
        raise DataError(f"{path}: no half of it is brighter, so it does not hold PD and T2; "
                        "convert the series again")
    first, second = splits[best]
    if means[best][0] > means[best][1]:
        return first, second
    return second, first


def _without_bad_voxels(array, path, contrast, notes):
    """Replace NaN and infinite voxels by the background. DataError if there are too many.

    Programs such as SPM write NaN where they have no data. NaN from the border inwards is therefore
    background, however much there is. NaN inside of the body is damage.
    """
    bad = ~np.isfinite(array)
    count = int(bad.sum())
    if count == 0:
        return array
    if count == array.size:
        raise DataError(f"{path}: all of its voxels are NaN or infinite; export it again")
    if count > BAD_VOXELS * array.size:
        # Every slice of a thin stack is at its top or bottom, so those sides do not count there.
        axes = [axis for axis in range(3) if array.shape[axis] > 2]
        holes = bad & ~reaching_border(bad, axes)
        count = int(holes.sum())
        if count > BAD_VOXELS * array.size:
            first = tuple(int(i) for i in np.argwhere(holes)[0])
            raise DataError(f"{path}: {count} of {array.size} voxels are NaN or infinite "
                            f"(first at {first}); repair the file")
        notes.append("has NaN or infinite voxels from its border inwards; they are background")
    if count:
        notes.append(f"has {count} NaN or infinite voxels; they are replaced by the background")
    level = background_value(np.where(bad, np.float32(np.nan), array), contrast)
    return np.where(bad, level, array).astype(np.float32)


def read_slices(paths):
    """Read .npy files of one slice (H, W) each, in [0, 1] -> float32 (Z, H, W).

    The slices stay as they are, because nothing tells how they lie in the body.
    DataError if a file is no such array, or has another shape than the first.
    """
    slices = None
    for i, path in enumerate(paths):
        with in_plain_words(path):
            # A map fails if the file is shorter than its header claims, before memory is taken.
            array = np.lib.format.open_memmap(path, mode="r")
        if array.ndim != 2 or array.dtype.kind not in "iuf" or 0 in array.shape:
            raise DataError(f"{path}: holds {array.dtype} of shape {array.shape}; "
                            "a slice is (H, W) numbers")
        if slices is None:
            slices = np.empty((len(paths), *array.shape), np.float32)
        if array.shape != slices.shape[1:]:
            raise DataError(f"{path}: has shape {array.shape}, {paths[0]} has {slices.shape[1:]}; "
                            "pad or crop them alike")
        in_range = array.min() >= -1e-3 and array.max() <= 1 + 1e-3         # False for NaN
        if not in_range:
            raise DataError(f"{path}: holds values from {array.min():g} to {array.max():g}; "
                            "scale them to [0, 1]")
        slices[i] = array.clip(0, 1)
    return slices


def read_stacks(subject):
    """Yield (contrast, slices (Z, H, W)) of a subject of .npy slices.

    DataError if a file cannot be used, or if its size is not that of the first contrast.
    """
    first = None
    for contrast, paths in subject.files.items():
        slices = read_slices(paths)
        first = first or (paths[0], slices.shape[1:])
        if slices.shape[1:] != first[1]:
            raise DataError(f"{paths[0]}: has shape {slices.shape[1:]}, {first[0]} has {first[1]}; "
                            "pixels of two contrasts must correspond, so crop or pad them alike")
        yield contrast, slices


# ---- Grids ---------------------------------------------------------------------------------------

def same_grid(first, second):
    """True if two volumes have one shape and their corners differ by GRID_TOLERANCE at most."""
    shape = first.array.shape
    if shape != second.array.shape:
        return False
    return corner_gap(shape, first.affine, second.affine) <= GRID_TOLERANCE


def resample_to(moving, fixed, order=1, fill=None, average=False):
    """Resample `moving` onto the grid of `fixed` by their affines -> float32 (X, Y, Z) of `fixed`.

    This is no registration: nothing is moved in the world. If the grids are equal, the result is
    moving.array itself.

    order: 1 is linear; 0 takes the nearest voxel, for labels.
    fill: The value outside of the box of `moving`, by default its background.
    average: True if a voxel of a coarser grid shall be the mean of what lies in it. Otherwise it is
        the value at its centre, and details that are finer than the voxels cause false patterns
        (aliasing).
    DataError if the two boxes do not overlap.
    """
    if same_grid(moving, fixed):
        return moving.array
    to_moving = np.linalg.inv(moving.affine) @ fixed.affine         # fixed index -> moving index
    corners = nib.affines.apply_affine(to_moving, corners_of(fixed.array.shape))
    last = np.array(moving.array.shape) - 1
    if (corners.max(0) < -0.5).any() or (corners.min(0) > last + 0.5).any():
        raise DataError(f"{moving.path}: lies outside the box of {fixed.path}; "
                        "register the two first")
    if fill is None:
        fill = background_value(moving.array)
    array = _averaged(moving.array, to_moving) if average else moving.array
    image = nib.Nifti1Image(array, moving.affine)
    target = (fixed.array.shape, fixed.affine)
    # "grid-constant" blends with the fill at the rim. "constant" would blank a whole border slice
    # that lies outside by a rounding error of 1e-9.
    moved = resample_from_to(image, target, order=order, mode="grid-constant", cval=fill)
    return np.asarray(moved.dataobj, np.float32)


def _averaged(array, to_moving):
    """Replace each voxel of an array by the mean over a box as wide as a voxel of a coarser grid.

    The mean is taken along one axis after the other. An axis along which the coarser voxel is less
    than COARSER voxels of the array wide is left as it is.

    to_moving: (4, 4), index of the coarser grid -> index of the array.
    """
    widths = np.linalg.norm(to_moving[:3, :3], axis=1)          # in voxels of the array
    for axis, width in enumerate(widths):
        if width >= COARSER:
            array = ndimage.correlate1d(array, _box(width), axis, mode="nearest")
    return array


def _box(width):
    """The weights of a mean over `width` voxels, which need not be a whole number.

    The weights are symmetric, so nothing is shifted. The two outer voxels count in part: a width of
    4 gives (1/2, 1, 1, 1, 1/2) / 4.
    """
    whole = int((width - 1) // 2)               # voxels on each side that count in full
    part = (width - 1) / 2 - whole
    return np.array([part] + [1] * (2 * whole + 1) + [part]) / width


# ---- Slices --------------------------------------------------------------------------------------

def upright(array):
    """Canonical (X, Y, Z) -> axial slices (Z, Y, X).

    Row 0 is the patient's front, and column 0 is the patient's right.
    """
    return array[::-1, ::-1].transpose(2, 1, 0)


def canonical(slices):
    """Undo `upright`: (Z, Y, X) -> (X, Y, Z)."""
    return slices.transpose(2, 1, 0)[::-1, ::-1]


def fit(array, size):
    """Canonical volume (X, Y, Z) -> upright slices (Z, size, size), float32. See fit_slices."""
    return fit_slices(upright(array), size)


def fit_slices(slices, size, labels=False):
    """Make slices square and of one size: (Z, H, W) -> (Z, size, size), float32.

    Slices that fit are padded with 0 around their centre, and no voxel changes. Larger slices are
    padded to a square and resampled. The filter is a triangle as wide as the reduction, so that
    thin structures do not cause false patterns (aliasing).

    labels: True if the slices hold numbers of labels. They are not mixed; the nearest one is taken.
    """
    height, width = slices.shape[1:]
    side = max(size, height, width)
    top = (side - height) // 2
    left = (side - width) // 2
    square = np.zeros((len(slices), side, side), np.float32)
    square[:, top:top + height, left:left + width] = slices
    if side == size:
        return square
    return _resized(square, size, Image.Resampling.NEAREST if labels else Image.Resampling.BILINEAR)


def unfit(slices, shape):
    """Undo `fit`: (Z, size, size) -> canonical (X, Y, Z) = shape.

    The result is exact where fit only padded. ValueError if the slices cannot have this shape.
    """
    width, height, depth = shape
    if len(slices) != depth or slices.shape[1] != slices.shape[2]:
        raise ValueError(f"unfit: slices of shape {slices.shape} do not belong to a volume of "
                         f"shape {tuple(shape)}")
    size = slices.shape[1]
    side = max(size, height, width)
    square = slices if side == size else _resized(slices, side)
    top = (side - height) // 2
    left = (side - width) // 2
    return canonical(square[:, top:top + height, left:left + width])


def _resized(squares, size, how=Image.Resampling.BILINEAR):
    """(Z, side, side) -> (Z, size, size). Pillow widens the triangle filter when it reduces."""
    resized = []
    for square in squares:
        picture = Image.fromarray(np.ascontiguousarray(square, np.float32))
        resized.append(np.asarray(picture.resize((size, size), how)))
    return np.stack(resized)


# ---- Writing -------------------------------------------------------------------------------------

def write_volume(path, array, like, description, overwrite=False):
    """Write a canonical array (X, Y, Z) as float32 NIfTI, on the grid that `like` has in its file.

    Orientation, affine, sform and qform codes, units and shape are those of the source, and
    scl_slope is 1. Nothing else of the source is copied, because its other fields and extensions
    may hold patient data. The file appears complete or not at all.

    like: The Volume of the source.
    description: Unit and method, for the header field `descrip`. That field has room for 79
        characters and always says synthetic.
    DataError if the file exists and `overwrite` is False, or if it cannot be written.
    ValueError if the array has another shape than the source.
    """
    path = Path(path)
    if not is_nifti(path):
        raise DataError(f"{path}: volumes are written as .nii or .nii.gz; change the name")
    if array.shape != like.array.shape:
        raise ValueError(f"write_volume: array {array.shape} is not on the grid of {like.path} "
                         f"{like.array.shape}")
    if path.exists() and not overwrite:
        raise DataError(f"{path}: exists already; move it away or choose another folder")
    header = type(like.header)(endianness=like.header.endianness)
    for name in GEOMETRY:
        header[name] = like.header[name]
    header["magic"] = header.single_magic
    header.set_data_dtype(np.float32)
    header.set_slope_inter(1, 0)
    header["vox_offset"] = header.sizeof_hdr + 4
    text = description if "synthetic" in description else f"synthetic; {description}"
    header["descrip"] = text.encode("ascii", "replace")[:79]
    stored = apply_orientation(array, ornt_transform(CANONICAL, like.orientation))
    voxels = stored.astype(header.endianness + "f4").tobytes(order="F")
    # We do not call nibabel's to_bytes. It refuses or repairs odd headers that were good enough to
    # read. The four zero bytes say that no extensions follow.
    content = header.binaryblock + bytes(4) + voxels
    if path.name.lower().endswith(".gz"):
        # mtime=0: without a time inside, the same voxels always give the same bytes.
        content = gzip.compress(content, compresslevel=6, mtime=0)
    try:
        with write_atomically(path) as file:
            file.write(content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None
