"""Decoded slices on disk, float16, recognised by a fingerprint of the files and the settings."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import numpy as np

from data.files import DataError, write_atomically
from data.intensities import CT_WINDOW
from data.subject import load_subject

CACHE_VERSION = 3            # raise it when the pixels that load_subject returns change, or the index


def fingerprint_of(folder, subjects, contrasts, size):
    """Hash of the settings and of every file's name, size, time stamp, first and last bytes (not of all voxels)."""
    digest = hashlib.sha256(json.dumps([CACHE_VERSION, contrasts, size]).encode())
    if "ct" in contrasts:
        digest.update(json.dumps(CT_WINDOW).encode())
    for subject in subjects:
        if subject.echoes or subject.grid:
            digest.update(json.dumps([subject.name, subject.grid, subject.echoes]).encode())
        for path in subject.paths:
            try:
                stat = path.stat()
                with open(path, "rb") as file:
                    start = file.read(4096)
                    file.seek(max(0, stat.st_size - 4096))
                    end = file.read(4096)
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror or error}); repair or remove it") from None
            digest.update(json.dumps([path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns]).encode())
            digest.update(start + end)
    return digest.hexdigest()[:20]


def cached_slices(cache, fingerprint, folder, subjects, contrasts, size, workers, say):
    """(index, images, labels or None) from the cache, built first where it is missing, stale or damaged."""
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
    try:
        home.mkdir(parents=True, exist_ok=True)
        _build_cache(home, key, subjects, contrasts, size, workers or min(4, os.cpu_count() or 1))
    except OSError as error:
        raise DataError(f"{home}: the cache cannot be written ({error.strerror or error}); free space or choose "
                        "another folder for it") from None
    return _open_cache(home, contrasts, size)


def _cache_key(index_file):
    try:
        return json.loads(index_file.read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _open_cache(home, contrasts, size):
    index = json.loads((home / "index.json").read_text(encoding="utf-8"))
    images = np.load(home / "slices.npy", mmap_mode="r")
    wanted = (len(index["subject"]), len(contrasts), size, size)
    if images.shape != wanted or images.dtype != np.float16:
        raise ValueError(f"slices are {images.dtype} {images.shape}, the index says float16 {wanted}")
    if any(len(index[column]) != wanted[0] for column in ("slice_number", "position", "brain", "lesion")):
        raise ValueError("the columns of the index differ in length")
    if not all(part in index for part in ("scales", "digests", "notes", "slices", "constant")):
        raise ValueError("the index is incomplete")
    labels = None
    if index["labels"]:
        labels = np.load(home / "labels.npy", mmap_mode="r")
        if labels.shape != (wanted[0], size, size) or labels.dtype != np.uint8:
            raise ValueError(f"labels are {labels.dtype} {labels.shape}, the index says uint8 {(wanted[0], size, size)}")
    return index, images, labels


def _build_cache(home, key, subjects, contrasts, size, workers):
    """Decode all subjects with a few threads; rows are written in order of subject, whoever finishes first."""
    index = {"key": key, "slices": 0, "constant": 0, "scales": {}, "digests": {}, "notes": [], "subject": [],
             "slice_number": [], "position": [], "brain": [], "lesion": [],
             "labels": all(subject.segmentation for subject in subjects)}
    with (_growing_npy(home / "slices.npy", "<f2", (len(contrasts), size, size)) as images,
          _growing_npy(home / "labels.npy", "|u1", (size, size)) if index["labels"] else nullcontext() as labels,
          ThreadPoolExecutor(workers) as pool):
        for i in range(0, len(subjects), workers):                         # in groups: at most `workers` in memory
            group = subjects[i:i + workers]
            loaded = pool.map(load_subject, group, [contrasts] * len(group), [size] * len(group))
            for subject, slices in zip(group, loaded):
                images(_index_subject(index, subject, contrasts, slices))
                if index["labels"]:
                    labels(slices.labels[slices.kept])
    with write_atomically(home / "index.json") as file:
        file.write(json.dumps(index).encode())


@contextmanager
def _growing_npy(path, kind, shape):
    """A .npy file of rows of this shape, yielded as a function that appends some; it appears when it is complete.

    numpy pads the header so that the first axis can grow in place; n is known only after the last row.
    """
    n = 0

    def header():
        np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": (n, *shape)})

    def append(rows):
        nonlocal n
        n += len(rows)
        file.write(rows.tobytes())
    with write_atomically(path) as file:
        header()
        start = file.tell()
        yield append
        file.seek(0)
        header()
        if file.tell() != start:
            raise RuntimeError("the .npy header changed its length")


def _index_subject(index, subject, contrasts, slices):
    """Add one subject's rows to the index; returns its kept slices (k, C, size, size) as float16."""
    z = np.flatnonzero(slices.kept)
    if z.size == 0:
        raise DataError(f"subject {subject.name}: no slice has foreground in all of {', '.join(contrasts)}; look "
                        "whether its volumes overlap")
    kept = slices.images[z].astype("<f2", copy=False)
    index["slices"] += len(slices.kept)
    index["constant"] += slices.constant
    index["notes"] += slices.notes
    index["scales"][subject.name] = {contrast: [float(x) for x in scale] for contrast, scale in slices.scales.items()}
    index["digests"][subject.name] = {contrast: hashlib.blake2b(np.ascontiguousarray(kept[:, c]), digest_size=16)
                                      .hexdigest() for c, contrast in enumerate(contrasts)}
    index["subject"] += [subject.name] * len(z)
    index["slice_number"] += z.tolist()
    index["position"] += slices.position[z].tolist()
    index["brain"] += slices.brain[z].tolist()
    index["lesion"] += [slices.lesion[k] for k in z] if slices.lesion else [None] * len(z)
    return kept
