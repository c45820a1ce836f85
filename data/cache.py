"""Decoded slices on disk, as float16, in one file for each subject.

The file is named by a hash of the subject's files and of the settings (data.identity.subject_key).
It is written as a whole. If decoding is interrupted, the next start continues with the subjects
that have no file yet. The folder is called subjects and lies in the folder of the cache. A file has
four parts:

    a line of 64 bytes      says what the file is, and the CRC-32 of all that follows
    a line of JSON          what we know of the subject and its kept slices, see _describe
    images                  (k, C, S, S) float16
    labels                  (k, S, S) uint8, only if the subject has a segmentation

k is the number of kept slices, C the number of contrasts and S the size of a slice in pixels. Both
lines are filled up with spaces to a multiple of 64 bytes.
"""

import hashlib
import json
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np

from data.files import DataError, Progress, remove_unfinished, write_atomically
from data.identity import BLOCK, size_text, stamps_of
from data.layouts.words import TEXT
from data.stack import Stack
from data.subject import load_subject

FIRST_LINE = 64         # bytes
TITLE = "decoded slices of one subject, CRC-32 "
COLUMNS = ("slice_number", "position", "brain", "lesion")       # one entry for each kept slice


def cached_slices(cache, memory, keys, subjects, contrasts, size, workers, say):
    """Open the decoded slices of all subjects -> (index, images, labels).

    Subjects whose file is missing or damaged are decoded first.
    cache: The folder for decoded slices. memory: A data.identity.Memory.
    keys: For every subject its key, see data.identity.subject_key.
    workers: The number of threads.
    index: A dict. subject, slice_number, position, brain and lesion are lists with one entry for
    each row of images. scales and digests are {subject: {contrast: ...}}, and pixels is
    {subject: mm}. notes is a list, and slices and constant are numbers; see SubjectSlices.
    images: A Stack (n, C, S, S) float16. labels: A Stack (n, S, S) uint8, or None unless every
    subject has a segmentation.
    DataError if a subject cannot be read, or if the cache cannot be written.
    """
    home = cache / "subjects"
    paths = [home / f"{key}.slices" for key in keys]

    def fault(path):
        return _fault(path, memory, contrasts, size)

    with ThreadPoolExecutor(workers) as pool:
        faults = list(pool.map(fault, paths))
    missing = []
    for subject, path, why in zip(subjects, paths, faults):
        if why is None:
            continue
        if path.exists():
            say(f"  {path} is damaged ({why}); subject {subject.name} is decoded again")
        missing.append((subject, path))
    try:
        if missing:
            _say_others(home, paths, say)
            _decode_all(home, memory, missing, len(subjects), contrasts, size, workers, say)
    except OSError as error:
        raise DataError(f"{home}: the cache cannot be written ({error.strerror or error}); "
                        "free space or choose another folder with --cache") from None
    finally:
        memory.save()
    return _join(paths, subjects, contrasts, size)


def _say_others(home, paths, say):
    """Tell the user if the folder holds decoded slices that this data set does not need."""
    others = [path.stat().st_size for path in set(home.glob("*.slices")) - set(paths)]
    if others:
        say(f"  {home} also holds {len(others)} subjects ({size_text(sum(others))}) of other data, "
            "other settings or files that have changed since; "
            "delete the folder when no run uses it, to free the space")


def _join(paths, subjects, contrasts, size):
    """Join the files of all subjects -> (index, images, labels), see cached_slices."""
    index = {"subject": [], "slices": 0, "constant": 0, "scales": {}, "digests": {}, "pixels": {},
             "notes": []}
    for column in COLUMNS:
        index[column] = []
    image_parts = []
    label_parts = []
    for subject, path in zip(subjects, paths):
        about, start = _read_lines(path)
        count = len(about["slice_number"])
        index["subject"] += [subject.name] * count
        for column in COLUMNS:
            index[column] += about[column]
        index["slices"] += about["slices"]
        index["constant"] += about["constant"]
        index["notes"] += about["notes"]
        index["scales"][subject.name] = about["scales"]
        index["digests"][subject.name] = about["digests"]
        index["pixels"][subject.name] = about["pixel"]
        image_parts.append((path, start, count))
        if about["labels"]:
            label_parts.append((path, start + 2 * count * len(contrasts) * size**2, count))
    images = Stack(image_parts, (len(contrasts), size, size), "<f2")
    labels = None
    if len(label_parts) == len(subjects):
        labels = Stack(label_parts, (size, size), "|u1")
    return index, images, labels


# ---- Decoding ------------------------------------------------------------------------------------

def _decode_all(home, memory, missing, total, contrasts, size, workers, say):
    """Decode subjects with a few threads. missing: A list of (Subject, path of its file).

    total: The number of subjects of the data set.
    The first subject is decoded before the user is told, because it shows how large all will be. A
    thread holds one subject in memory at a time. OSError if a file cannot be written.
    """
    home.mkdir(parents=True, exist_ok=True)
    remove_unfinished(home)

    def decode(subject, path):
        # Another process may have decoded the subject since we looked.
        if _fault(path, memory, contrasts, size) is not None:
            slices = load_subject(subject, contrasts, size)
            _write(path, memory, subject, contrasts, slices)
        return path.stat().st_size

    needed = decode(*missing[0]) * len(missing)             # bytes
    free = shutil.disk_usage(home).free
    there = total - len(missing)
    already = f"; {there} are there already" if there else ""
    say(f"  decoding {len(missing)} subjects into {home} (once; it will take about "
        f"{size_text(needed)}, and {size_text(free)} are free; after an interruption it "
        f"continues){already}")
    if needed > free:
        say("  warning: this is more than is free; choose another folder with --cache")
    progress = Progress(len(missing), "subjects decoded", say)
    progress.step()
    pool = ThreadPoolExecutor(workers)
    try:
        jobs = [pool.submit(decode, subject, path) for subject, path in missing[1:]]
        for job in as_completed(jobs):
            job.result()
            progress.step()
    finally:
        # After an error or Ctrl-C, the subjects in work are finished, and no others are begun.
        pool.shutdown(cancel_futures=True)


def _write(path, memory, subject, contrasts, slices):
    """Write the file of one subject. slices: Its SubjectSlices.

    DataError if no slice was kept. OSError if the file cannot be written.
    """
    numbers = kept_numbers(slices, subject, contrasts)
    images = slices.images[numbers].astype("<f2", copy=False)
    parts = [_padded(json.dumps(_describe(slices, numbers, images, contrasts))), images]
    if slices.labels is not None:
        parts.append(np.ascontiguousarray(slices.labels[numbers]))
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    with write_atomically(path) as file:
        file.write(_padded(f"{TITLE}{crc:08x}"))
        for part in parts:
            file.write(part)
    memory.remember(path, stamps_of(path), "sound")


def kept_numbers(slices, subject, contrasts):
    """The numbers of the kept slices of one subject. DataError if there are none.

    slices: Its SubjectSlices.
    """
    numbers = np.flatnonzero(slices.kept)
    if numbers.size == 0:
        raise DataError(f"subject {subject.name}: no slice has foreground in all of "
                        f"{', '.join(contrasts)}; look whether its volumes overlap")
    return numbers


def digests_of_images(slices, images, contrasts):
    """{contrast: digest of its images}. Equal images in two subjects are found by these.

    slices: SubjectSlices of one subject. images: (k, C, S, S) float16, its kept slices.
    """
    digests = {}
    for channel, contrast in enumerate(contrasts):
        if not slices.present[channel] or contrast == TEXT:
            continue                    # all reports have the same blank channel
        channel_bytes = np.ascontiguousarray(images[:, channel])
        digests[contrast] = hashlib.blake2b(channel_bytes, digest_size=16).hexdigest()
    return digests


def _describe(slices, numbers, images, contrasts):
    """What we know of one subject, for JSON.

    numbers: (k,) of the kept slices. images: (k, C, S, S), those slices.
    """
    scales = {}
    for contrast, scale in slices.scales.items():
        scales[contrast] = [float(scale.background), float(scale.high)]
    digests = digests_of_images(slices, images, contrasts)
    lesion = [slices.lesion[number] if slices.lesion else None for number in numbers]
    return {"shape": list(images.shape), "labels": slices.labels is not None,
            "slices": len(slices.kept), "constant": slices.constant, "notes": slices.notes,
            "pixel": slices.pixel, "scales": scales, "digests": digests,
            "slice_number": numbers.tolist(),
            "position": slices.position[numbers].tolist(), "brain": slices.brain[numbers].tolist(),
            "lesion": lesion}


def _padded(line):
    """A line of text as bytes, filled up with spaces so that its length is a multiple of 64."""
    content = line.encode()
    return content + b" " * (-(len(content) + 1) % FIRST_LINE) + b"\n"


# ---- Reading -------------------------------------------------------------------------------------

def _read_lines(path):
    """Read both lines of a file -> (the JSON as a dict, the place in bytes where images begin)."""
    with open(path, "rb") as file:
        file.seek(FIRST_LINE)
        line = file.readline()
    return json.loads(line), FIRST_LINE + len(line)


def _fault(path, memory, contrasts, size):
    """What is wrong with the file of one subject, in a few words; None if it is sound.

    The whole file is read for that, unless the memory says that it was sound and has not changed.
    """
    try:
        stamps = stamps_of(path)
        if memory.recall(path) == "sound":
            return None
        with open(path, "rb") as file:
            first = file.read(FIRST_LINE)
            crc = 0
            while block := file.read(BLOCK):
                crc = zlib.crc32(block, crc)
        if first != _padded(f"{TITLE}{crc:08x}"):
            return "its CRC is wrong"
        about, start = _read_lines(path)
        count = len(about["slice_number"])
        if about["shape"] != [count, len(contrasts), size, size]:
            return f"its images are {about['shape']}"
        pixels = count * size**2
        if stamps[0] != start + pixels * (2 * len(contrasts) + about["labels"]):
            return "it is too short or too long"
    except FileNotFoundError:
        return "it is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    memory.remember(path, stamps, "sound")
    return None
