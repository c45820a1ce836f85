"""The bytes of a NIfTI file -> its header and its voxels as they are stored, both checked.

What other programs tolerate in a header is tolerated here, too, and a note says what was assumed.
"""

import gzip
import logging
import math
from contextlib import ExitStack, contextmanager

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling

from data.files import PACKED, DataError
from data.opening import in_plain_words

BLOCK = 1 << 20                     # bytes that are read at a time
LARGEST_OFFSET = 1 << 28            # bytes; no header with extensions is longer
UNITS = {1: ("metre", 1000.0), 3: ("micron", 0.001)}      # NIfTI's code -> name, mm
PLAUSIBLE = (0.02, 50.0)            # mm; the voxels of scans of patients have such edges
NEVER = 100                         # nibabel's faults have levels up to 50; from here on it raises
SILENT = logging.Logger("silent")
SILENT.addHandler(logging.NullHandler())


def decode(path, max_voxels, echoes=1, frames=None, channel=None):
    """Read a file -> (header, voxels as float32 (X, Y, Z) as stored, notes).

    The first bytes decide whether the file is compressed, not its name.

    max_voxels: The largest number of voxels. Larger files are refused before they are unpacked.
    echoes: With 2, a file of two volumes is allowed, and the voxels are (X, Y, Z, 2).
    frames: For a PET of several frames, their durations in s. The voxels are the mean of the
        frames, weighted by duration. If there are not as many durations as frames, all frames weigh
        the same. By default, a file of several frames is refused.
    channel: The number of the only volume to read of a 4-D file, from 0.
    notes: One sentence for every oddity.
    DataError if the file is missing, damaged, too large or no NIfTI-1 or NIfTI-2 file with real
    numbers in it.
    """
    notes = []
    with in_plain_words(path), opened(path, notes) as file:
        header, start, said = _read_header(file, path, notes)
        series = frames is not None or channel is not None
        shape = _checked_shape(header, path, max_voxels, echoes, series)
        dtype = _checked_dtype(header, path)
        slope, inter = _scaling(header, notes)
        count = int(np.prod(shape))
        content = _voxel_bytes(file, path, start, said, count * dtype.itemsize, notes)
        stored = np.frombuffer(content, dtype, count).reshape(shape, order="F")
        if frames is not None and len(shape) == 4:
            array = _mean_of_frames(stored, slope, inter, frames)
        elif channel is not None and len(shape) == 4:
            array = apply_read_scaling(stored[..., channel], slope, inter)
        else:
            array = apply_read_scaling(stored, slope, inter)
        with np.errstate(over="ignore"):        # too large a number becomes infinite; see volumes
            return header, array.astype(np.float32), notes


def decode_header(path, max_voxels, series=False):
    """Read the header of a file -> (header, shape (X, Y, Z)); no voxel is read.

    series: True if the file may hold several volumes, as a PET of several frames.
    DataError as decode, as far as the header shows it.
    """
    with in_plain_words(path), opened(path, []) as file:
        header, _, _ = _read_header(file, path, [])
        return header, _checked_shape(header, path, max_voxels, 1, series)[:3]


def grid_of(path):
    """Read the grid of a file of any number of volumes -> (shape, affine), or None.

    shape: The lengths of all axes. affine: (4, 4), stored voxel index -> world mm.
    None stands for a file that cannot be read. This is reported when its voxels are needed.
    """
    try:
        header, _ = decode_header(path, math.inf, series=True)
        return header.get_data_shape(), checked_affine(header, path)
    except DataError:
        return None


def volumes_of(shape):
    """The number of volumes along the fourth axis of a file."""
    return int(max(shape[3:], default=1))


@contextmanager
def opened(path, notes):
    """Open a file, and unpack it while it is read. Some files are compressed twice."""
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        packed = 0
        while packed < 2 and file.peek(2)[:2] == PACKED:
            file = stack.enter_context(gzip.open(file))
            packed += 1
        named_gz = path.name.lower().endswith(".gz")
        if packed and not named_gz:
            notes.append("is compressed although its name ends in .nii")
        elif packed == 2:
            notes.append("is compressed twice")
        elif named_gz and not packed:
            notes.append("is not compressed despite .gz")
        yield file


def _read_header(file, path, notes):
    """Read the header -> (header, the first bytes of the file, where it says that voxels begin).

    The header is NIfTI-1 or NIfTI-2. nibabel repairs what it would repair when it loads the file.
    """
    start = file.read(nib.Nifti2Header.sizeof_hdr)
    text = start[:200].lstrip().lower()
    if not start:
        raise DataError(f"{path}: the file is empty (0 bytes); download it again")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(f"{path}: looks like HTML, a web page saved by a failed download; "
                        "download the file again")
    if text.startswith((b"version https://git-lfs", b"/annex/", b"../.git/annex", b".git/annex")):
        raise DataError(f"{path}: is only a pointer of Git LFS or git-annex; get the file itself "
                        "with git lfs pull or git annex get")
    if start[344:348] == b"n+1\0":
        header = nib.Nifti1Header(start[:348], check=False)
    elif start[4:8] == b"n+2\0" and len(start) == 540:
        header = nib.Nifti2Header(start, check=False)
    elif start[344:348] == b"ni1\0":
        raise DataError(f"{path}: is the header of a pair, whose voxels lie in a file .img; "
                        "rename it to .hdr and convert the pair to .nii")
    else:
        raise DataError(f"{path}: is not a NIfTI file (no NIfTI header in its first {len(start)} "
                        "bytes); convert it again")
    said = float(header["vox_offset"])
    _repair(header, notes)
    return header, start, said


def _repair(header, notes):
    """Repair faults of a header in place, and say in which fields they were.

    nibabel takes the absolute value of a negative pixdim, 1 for a pixdim of 0, and 0 for a code
    that does not exist. We also take the code of an sform of zeros as 0, which means that there is
    no sform.
    """
    before = header.copy()
    header.check_fix(logger=SILENT, error_level=NEVER)
    rows = np.array([header["srow_x"], header["srow_y"], header["srow_z"]])
    if not rows[:, :3].any():
        header["sform_code"] = 0
    changed = [name for name in ("pixdim", "qform_code", "sform_code")
               if header[name].tobytes() != before[name].tobytes()]
    if changed:
        notes.append(f"has an odd header, {' and '.join(changed)} break the rules of NIfTI; "
                     "repaired as other programs do it")


def _scaling(header, notes):
    """The numbers to multiply and to add -> (slope, inter), or (None, None) for none."""
    slope = float(header["scl_slope"])
    if slope and np.isfinite(slope) and not np.isfinite(header["scl_inter"]):
        notes.append("has a slope without intercept (scl_inter is no number); 0 is assumed")
        header["scl_inter"] = 0
    return header.get_slope_inter()


def _voxel_bytes(file, path, start, said, wanted, notes):
    """Read the voxels -> `wanted` bytes. The whole file is read, because that compares its CRC.

    start: The first bytes of the file, which were read before. said: Where the header says that the
        voxels begin. NIfTI says that they never begin before byte 352 (544 in NIfTI-2), so that a
        smaller number means this one. Programs write 0 or 348.
    A number that cannot be true counts as 352 if the file is as long as if it were 352.
    DataError if the file ends early, or if it cannot be told where the voxels begin.
    """
    usual = 544 if start[4:8] == b"n+2\0" else 352
    sane = np.isfinite(said) and said == int(said) and said < LARGEST_OFFSET
    offset = max(usual, int(said)) if sane else usual
    content = start + file.read(max(0, offset + wanted - len(start)))
    behind = _bytes_left(file, notes)
    size = len(content) + behind
    if sane and said == usual - 4 and size == said + wanted:
        offset = usual - 4                          # the four bytes behind the header are missing
    elif (not sane or said > size) and size == usual + wanted:
        sane = True
        offset = usual
    if not sane or offset != said:
        notes.append(f"says that its voxels begin at byte {said:g}; byte {offset} is assumed")
        # If that byte is not 0, extensions follow there, and the voxels come behind them.
        sane = sane and content[usual - 4:usual - 3] in (b"", b"\0")
    elif said % 16 and behind:
        sane = False                                # programs write multiples of 16
    if size - offset < wanted:
        raise DataError(f"{path}: ends early ({max(0, size - offset)} of {wanted} voxel bytes); "
                        "download the file again")
    if not sane:
        raise DataError(f"{path}: says that its voxels begin at byte {said:g}, which cannot be "
                        "true, and nothing else tells it; export it again")
    if behind:
        notes.append(f"has {behind} bytes behind its voxels; they are not read")
    return memoryview(content)[offset:offset + wanted]


def _bytes_left(file, notes):
    """Read a file to its end -> the number of bytes. What follows the compressed part is noted."""
    count = 0
    try:
        while block := file.read(BLOCK):
            count += len(block)
    except gzip.BadGzipFile as error:
        if "Not a gzipped file" not in str(error):
            raise
        notes.append("has other bytes behind its compressed part; they are not read")
    return count


def _mean_of_frames(stored, slope, inter, durations):
    """The mean over the last axis of stored voxels (X, Y, Z, T) -> (X, Y, Z). See decode.

    One frame after the other is scaled, because all frames as float64 may not fit into the memory.
    """
    count = stored.shape[3]
    weights = durations if len(durations) == count else [1] * count
    total = np.zeros(stored.shape[:3])
    for frame, weight in enumerate(weights):
        total += weight * apply_read_scaling(stored[..., frame], slope, inter)
    return total / sum(weights)


def _checked_shape(header, path, max_voxels, echoes, series=False):
    """The three axes of a volume. A missing axis has length 1.

    There are four axes for a file of two echoes, and for one of several frames if `series` is True.
    """
    shape = tuple(int(n) for n in header.get_data_shape())
    if len(shape) < 2 or min(shape) < 0:
        raise DataError(f"{path}: has shape {shape}, not that of an image or a volume")
    if 0 in shape:
        raise DataError(f"{path}: has an axis of length 0 (shape {shape}); export it again")
    if sorted(shape)[-2] == 1:
        raise DataError(f"{path}: is a line of {max(shape)} numbers and no image, as of a surface; "
                        "give a volume")
    several = volumes_of(shape) > 1
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


def checked_affine(header, path, notes=None):
    """The (4, 4) matrix from a stored voxel index to world mm.

    As in nibabel, the sform counts before the qform, and a file without both lies around 0. If the
    sform cannot be used, the qform is.
    notes: A list that gets one sentence for every oddity, or None.
    DataError if no matrix can be used.
    """
    notes = [] if notes is None else notes
    found = {}
    faults = {}
    forms = {"sform": header.get_sform, "qform": header.get_qform}
    forms = {name: read for name, read in forms.items() if header[f"{name}_code"] > 0}
    if not forms:
        notes.append("has no orientation in its header; the NIfTI default is assumed, "
                     "left and right may be swapped")
        forms = {"default": header.get_base_affine}
    for name, read in forms.items():
        try:
            affine = read()
            fault = _fault_of(affine)
        except (ValueError, HeaderDataError) as error:
            fault = f"its orientation cannot be understood ({error})"
        if fault:
            faults[name] = fault
        else:
            found[name] = affine.astype(float)
    if not found:
        raise DataError(f"{path}: {next(iter(faults.values()))}; export it again")
    used, affine = next(iter(found.items()))
    for name, fault in faults.items():
        notes.append(f"has a bad {name} ({fault}); the {used} is used")
    factor = _factor_to_mm(header, affine, notes)
    if len(found) == 2:
        _compare_forms(header, found, factor, notes)
    scaled = affine.copy()
    scaled[:3] *= factor
    return scaled


def _fault_of(affine):
    """What is wrong with an affine, in a few words; None if nothing is."""
    edges = nib.affines.voxel_sizes(affine)
    # We compare the volume of a voxel with the product of its edges. A voxel that is small in all
    # directions is therefore not taken for a flat one.
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) <= 1e-6 * np.prod(edges):
        return f"its affine is singular, voxel edges {np.round(edges, 3).tolist()} mm"
    return None


def _compare_forms(header, found, factor, notes):
    """Say if sform and qform put a corner of the volume into places more than a voxel apart."""
    shape = (header.get_data_shape() + (1, 1))[:3]
    apart = corner_gap(shape, found["sform"], found["qform"])
    if apart > nib.affines.voxel_sizes(found["sform"]).max():
        notes.append(f"has an sform and a qform that lie up to {factor * apart:.0f} mm apart; the "
                     "sform is used, and other programs may use the qform")


def corners_of(shape, margin=0.0):
    """The indices (8, 3) of the corner voxels, moved outwards by `margin` voxels."""
    ends = [(-margin, n - 1 + margin) for n in shape]
    return np.stack(np.meshgrid(*ends, indexing="ij"), -1).reshape(-1, 3)


def corner_gap(shape, first, second):
    """How far two affines put the corner voxels of one shape apart in the world, at most, in mm."""
    corners = corners_of(shape)
    gaps = nib.affines.apply_affine(first, corners) - nib.affines.apply_affine(second, corners)
    return float(np.linalg.norm(gaps, axis=1).max())


def _factor_to_mm(header, affine, notes):
    """The factor from the unit of the header to mm.

    Many files hold mm and say something else. A unit that gives impossible voxels is therefore not
    believed.
    """
    unit, factor = UNITS.get(int(header["xyzt_units"]) & 7, ("mm", 1.0))
    if factor == 1:
        return factor
    edges = nib.affines.voxel_sizes(affine) * factor
    if edges.min() < PLAUSIBLE[0] or edges.max() > PLAUSIBLE[1]:
        notes.append(f"says that its unit is the {unit}, which gives impossible voxels; "
                     "mm are assumed")
        return 1.0
    notes.append(f"is measured in {unit}s, which become mm")
    return factor
