"""Decoded slices on disk, as float16, found again by a fingerprint of the files and the settings.

A cache is a folder that is named by the fingerprint. It holds these files:

    slices.npy    (n, C, S, S) float16
    labels.npy    (n, S, S) uint8, only if every subject has a segmentation
    index.json    for every row of slices.npy its subject, slice number, position, area of brain and
                  lesion; and what open_dataset says of the folder
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import numpy as np

from data.files import DataError, write_atomically
from data.intensities import CT_WINDOW
from data.subject import load_subject

CACHE_VERSION = 3       # raise it when load_subject returns other pixels, or when the index changes
COLUMNS = ("subject", "slice_number", "position", "brain", "lesion")        # one entry for each row


def fingerprint_of(folder, subjects, contrasts, size):
    """A hash of the settings and the files, 20 hexadecimal digits.

    Of every file we take the name, the size, the time stamp, and the first and the last bytes. We
    do not read all voxels, because that would take as long as decoding them.
    DataError if a file cannot be read.
    """
    digest = hashlib.sha256(json.dumps([CACHE_VERSION, contrasts, size]).encode())
    if "ct" in contrasts:
        digest.update(json.dumps(CT_WINDOW).encode())
    for subject in subjects:
        if subject.echoes or subject.grid:
            how = [subject.name, subject.grid, subject.echoes]
            digest.update(json.dumps(how).encode())
        for path in subject.paths:
            try:
                stat = path.stat()
                with open(path, "rb") as file:
                    start = file.read(4096)
                    file.seek(max(0, stat.st_size - 4096))
                    end = file.read(4096)
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror or error}); "
                                "repair or remove it") from None
            name = path.relative_to(folder).as_posix()
            digest.update(json.dumps([name, stat.st_size, stat.st_mtime_ns]).encode())
            digest.update(start + end)
    return digest.hexdigest()[:20]


def cached_slices(cache, fingerprint, folder, subjects, contrasts, size, workers, say):
    """Open a cache, which is made first if it is missing or damaged -> (index, images, labels).

    images: (n, C, S, S) float16, memory-mapped.
    labels: (n, S, S) uint8, or None.
    DataError if a subject cannot be read, or if the cache cannot be written.
    """
    home = cache / fingerprint
    if home.exists():
        try:
            return _open_cache(home, contrasts, size)
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"  cache {home} is damaged ({error}); it is made again")
    key = [str(folder.resolve()), list(contrasts), size]
    for other in cache.glob("*/index.json"):
        if other.parent != home and _cache_key(other) == key:
            say(f"  the data have changed since {other.parent} was made; that cache can be deleted")
    say(f"  decoding {len(subjects)} subjects into {home} (once)")
    workers = workers or min(4, os.cpu_count() or 1)
    try:
        home.mkdir(parents=True, exist_ok=True)
        _build_cache(home, key, subjects, contrasts, size, workers)
    except OSError as error:
        raise DataError(f"{home}: the cache cannot be written ({error.strerror or error}); "
                        "free space or choose another folder for it") from None
    return _open_cache(home, contrasts, size)


def _cache_key(index_file):
    """The folder and the settings that a cache was made of; None if it does not say so."""
    try:
        return json.loads(index_file.read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _open_cache(home, contrasts, size):
    """Open a cache and check it. OSError, ValueError, KeyError or TypeError if it does not fit."""
    index = json.loads((home / "index.json").read_text(encoding="utf-8"))
    images = np.load(home / "slices.npy", mmap_mode="r")
    n = len(index["subject"])
    wanted = (n, len(contrasts), size, size)
    if images.shape != wanted or images.dtype != np.float16:
        raise ValueError(f"slices are {images.dtype} {images.shape}, "
                         f"the index says float16 {wanted}")
    if any(len(index[column]) != n for column in COLUMNS):
        raise ValueError("the columns of the index differ in length")
    if not all(part in index for part in ("scales", "digests", "notes", "slices", "constant")):
        raise ValueError("the index is incomplete")
    labels = None
    if index["labels"]:
        labels = np.load(home / "labels.npy", mmap_mode="r")
        wanted = (n, size, size)
        if labels.shape != wanted or labels.dtype != np.uint8:
            raise ValueError(f"labels are {labels.dtype} {labels.shape}, "
                             f"the index says uint8 {wanted}")
    return index, images, labels


def _build_cache(home, key, subjects, contrasts, size, workers):
    """Decode all subjects with a few threads and write them in order, whoever finishes first."""
    index = {"key": key, "slices": 0, "constant": 0, "scales": {}, "digests": {}, "notes": [],
             "labels": all(subject.segmentation for subject in subjects)}
    for column in COLUMNS:
        index[column] = []
    images_file = _growing_npy(home / "slices.npy", "<f2", (len(contrasts), size, size))
    labels_file = nullcontext()
    if index["labels"]:
        labels_file = _growing_npy(home / "labels.npy", "|u1", (size, size))

    def load(subject):
        return load_subject(subject, contrasts, size)

    with (images_file as append_images, labels_file as append_labels,
          ThreadPoolExecutor(workers) as pool):
        # In groups, so that at most `workers` subjects are in memory.
        for first in range(0, len(subjects), workers):
            group = subjects[first:first + workers]
            for subject, slices in zip(group, pool.map(load, group)):
                append_images(_index_subject(index, subject, contrasts, slices))
                if index["labels"]:
                    append_labels(slices.labels[slices.kept])
    # The index comes last: a cache with an index is complete.
    with write_atomically(home / "index.json") as file:
        file.write(json.dumps(index).encode())


@contextmanager
def _growing_npy(path, kind, shape):
    """A .npy file of rows of this shape. It is yielded as a function that appends some rows.

    The header holds the number of rows, which we know only at the end. For that, numpy leaves room
    in the header. We therefore write the header twice, in the same place.
    """
    rows_written = 0

    def write_header(file):
        full = {"descr": kind, "fortran_order": False, "shape": (rows_written, *shape)}
        np.lib.format.write_array_header_1_0(file, full)

    with write_atomically(path) as file:
        write_header(file)
        start = file.tell()

        def append(rows):
            nonlocal rows_written
            rows_written += len(rows)
            file.write(rows.tobytes())

        yield append
        file.seek(0)
        write_header(file)
        if file.tell() != start:
            raise RuntimeError("the .npy header changed its length")


def _index_subject(index, subject, contrasts, slices):
    """Add one subject to the index -> its kept slices (k, C, S, S) as float16."""
    numbers = np.flatnonzero(slices.kept)
    if numbers.size == 0:
        raise DataError(f"subject {subject.name}: no slice has foreground in all of "
                        f"{', '.join(contrasts)}; look whether its volumes overlap")
    kept = slices.images[numbers].astype("<f2", copy=False)
    index["slices"] += len(slices.kept)
    index["constant"] += slices.constant
    index["notes"] += slices.notes
    index["scales"][subject.name] = {
        contrast: [float(scale.background), float(scale.high)]
        for contrast, scale in slices.scales.items()}
    index["digests"][subject.name] = {
        contrast: _digest(kept[:, channel]) for channel, contrast in enumerate(contrasts)}
    index["subject"] += [subject.name] * len(numbers)
    index["slice_number"] += numbers.tolist()
    index["position"] += slices.position[numbers].tolist()
    index["brain"] += slices.brain[numbers].tolist()
    if slices.lesion:
        index["lesion"] += [slices.lesion[number] for number in numbers]
    else:
        index["lesion"] += [None] * len(numbers)
    return kept


def _digest(slices):
    return hashlib.blake2b(np.ascontiguousarray(slices), digest_size=16).hexdigest()
