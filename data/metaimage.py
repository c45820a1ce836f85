"""MetaImage files (.mhd with .raw or .zraw, and .mha) -> voxels and affine.

A header is text, one `key = value` in a line:

    NDims = 3
    TransformMatrix = 1 0 0 0 1 0 0 0 1
    Offset = -171.7 -179.7 -368
    ElementSpacing = 0.7 0.7 5
    DimSize = 512 512 183
    ElementType = MET_SHORT
    ElementDataFile = liver-orig001.raw

ElementDataFile is the last key. It names the file of the voxels, which stand there with x running
fastest. LOCAL (or Local) means that they follow in the same file. World coordinates are LPS: x
points to the patient's left, y to the back and z to the head. Ours are RAS.
"""

import math
import re
import zlib
from pathlib import Path

import numpy as np

from data.files import DataError
from data.opening import in_plain_words, require_file

TYPES = {"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2",
         "MET_INT": "i4", "MET_UINT": "u4", "MET_FLOAT": "f4", "MET_DOUBLE": "f8"}
# Several keys mean the same.
ORIGINS = ("Offset", "Position", "Origin")
TURNS = ("TransformMatrix", "Orientation", "Rotation")
BYTE_ORDERS = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
LONGEST_HEADER = 1 << 16                        # bytes
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
ANY_HEADER = 47                                 # zlib's word for "zlib or gzip, whichever it is"


def is_metaimage(path):
    """True if the name ends in .mhd or .mha, in lower or upper case."""
    return re.search(r"\.mh[ad]$", Path(path).name, re.IGNORECASE) is not None


def read_metaimage(path, max_voxels=math.inf):
    """Read a MetaImage file -> (array, affine, notes).

    array: (X, Y, Z) float32, as stored. affine: (4, 4), voxel index -> world mm (RAS+).
    notes: One sentence for every oddity.
    DataError if a file is missing or damaged, or if it holds no single 3-D volume of numbers, or
    more than max_voxels.
    """
    header, start = _read_header(path)
    shape, affine, notes = _grid_of(path, header, max_voxels)
    kind = TYPES.get(header.get("ElementType"))
    if kind is None or header.get("ElementNumberOfChannels", "1") != "1":
        raise DataError(f"{path}: ElementType is {header.get('ElementType', 'not there')} with "
                        f"{header.get('ElementNumberOfChannels', '1')} channels; only one channel "
                        f"of {', '.join(TYPES)} is read, convert it to NIfTI")
    if not _is_true(header, ("BinaryData",), default=True):
        raise DataError(f"{path}: its voxels are written as text; convert it to NIfTI")
    order = ">" if _is_true(header, BYTE_ORDERS, default=False) else "<"
    place = _place_of(path, header)
    rest = _read_bytes(place)
    if place == path:
        rest = rest[start:]
    if _is_true(header, ("CompressedData",), default=False):
        with in_plain_words(place):
            unpacker = zlib.decompressobj(ANY_HEADER)
            rest = unpacker.decompress(rest) + unpacker.flush()
    dtype = np.dtype(order + kind)
    size = math.prod(shape) * dtype.itemsize
    # HeaderSize -1 means that the voxels are the end of the file.
    skip = int(_numbers(path, header, "HeaderSize", 1, default="0")[0])
    skip = len(rest) - size if skip == -1 else skip
    if skip < 0 or len(rest) < skip + size:
        raise DataError(f"{place}: holds {len(rest)} bytes, {skip + size} are needed for "
                        f"{header['DimSize']} voxels of {header['ElementType']}; download it again")
    if len(rest) > skip + size:
        notes.append(f"has {len(rest) - skip - size} bytes behind its voxels; they are not read")
    voxels = np.frombuffer(rest, dtype, math.prod(shape), skip)
    return voxels.reshape(shape, order="F").astype(np.float32), affine, notes


def read_metaimage_grid(path, max_voxels=math.inf):
    """Read where a MetaImage file lies in space, and no voxel of it -> (shape, affine).

    shape: (X, Y, Z). affine, and the DataError: as read_metaimage, as far as the header shows it.
    """
    header, _ = _read_header(path)
    shape, affine, _ = _grid_of(path, header, max_voxels)
    return shape, affine


def files_of(path):
    """The files of a volume, as a list: `path`, and the file of the voxels if it has its own.

    path: A file of any kind. Only of a MetaImage the header is read; DataError as read_metaimage.
    It is also raised for a pipe or a device, see require_file.
    """
    require_file(path)
    if not is_metaimage(path):
        return [path]
    header, _ = _read_header(path)
    return list(dict.fromkeys([path, _place_of(path, header)]))


def _place_of(path, header):
    """The file that holds the voxels."""
    source = header["ElementDataFile"]
    return path if source.upper() == "LOCAL" else path.parent / source


def _grid_of(path, header, max_voxels):
    """The grid of the voxels -> (shape, affine, notes)."""
    shape = tuple(int(n) for n in _numbers(path, header, "DimSize", 3))
    if min(shape) < 1 or math.prod(shape) > max_voxels:
        raise DataError(f"{path}: DimSize is {header['DimSize']}; one to {max_voxels} voxels can "
                        "be read, crop or resample it")
    notes = []
    return shape, _affine_of(path, header, notes), notes


def _read_header(path):
    """Read the header -> ({key: value}, its length in bytes)."""
    content = _read_bytes(path, LONGEST_HEADER)
    header = {}
    position = 0
    while "ElementDataFile" not in header:
        end = content.find(b"\n", position)
        end = len(content) if end < 0 else end
        key, equals, value = content[position:end].partition(b"=")
        if not equals or position >= len(content):
            raise DataError(f"{path}: is no MetaImage header, it has lines without '=' or no "
                            "ElementDataFile; download it again")
        header[_text(key)] = _text(value)
        position = end + 1
    if header.get("NDims") != "3":
        raise DataError(f"{path}: NDims is {header.get('NDims', 'not there')}; only volumes of "
                        "3 dimensions are read, convert it to NIfTI")
    source = header["ElementDataFile"]
    if source.split(" ")[0] == "LIST" or "%" in source:
        raise DataError(f"{path}: has one file for each slice; convert it to NIfTI")
    if not source or "\0" in source:
        raise DataError(f"{path}: ElementDataFile names no file; download it again")
    return header, position


def _text(part):
    return part.decode("utf-8", "replace").strip()


def _read_bytes(place, most=-1):
    """The content of a file. most: The first bytes only."""
    with in_plain_words(place), open(place, "rb") as file:
        return file.read(most)


def _affine_of(path, header, notes):
    """The affine (4, 4) from voxel index to world mm (RAS+)."""
    spacing = np.array(_numbers(path, header, "ElementSpacing", 3, default="1 1 1"))
    if "ElementSpacing" not in header:
        notes.append("has no ElementSpacing; voxels of 1 mm are assumed")
    origin = _numbers(path, header, _first_of(header, ORIGINS), 3, default="0 0 0")
    turn = _numbers(path, header, _first_of(header, TURNS), 9, default="1 0 0 0 1 0 0 0 1")
    # The first three numbers are the direction of the first axis, so they are a column.
    directions = np.reshape(turn, (3, 3)).T
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = origin
    if (spacing <= 0).any() or abs(np.linalg.det(directions)) < 0.1:
        raise DataError(f"{path}: ElementSpacing or TransformMatrix is no grid in space; "
                        "repair the header")
    return LPS_TO_RAS @ affine


def _first_of(header, keys):
    """The first of the keys that is in the header, or the first key."""
    return next((key for key in keys if key in header), keys[0])


def _numbers(path, header, key, count, default=None):
    """The numbers of a key, as a list of `count` float."""
    text = header.get(key, default)
    try:
        numbers = [float(word) for word in (text or "").split()]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
        raise DataError(f"{path}: {key} is {text or 'not there'}; {count} numbers are needed, "
                        "repair the header")
    return numbers


def _is_true(header, keys, default):
    """The value of the first of the keys that is in the header: True, False or the default."""
    text = header.get(_first_of(header, keys))
    return default if text is None else text.lower().startswith(("true", "1"))
