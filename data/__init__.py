"""A folder of scans becomes one memory-mapped array of slices, split by person: open_dataset, load_subject, check.

Names of files are the business of data.layouts, voxels that of data.volumes. Slices are decoded once and kept as
float16 under runs/cache/, never in the data folder. Nothing is dropped in silence: what is left out is counted.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.layouts import caption, describe_lesion, find_layout, prompt
from data.volumes import (
    CT_WINDOW,
    DataError,
    Scale,
    Volume,
    denormalise,
    find_background,
    fit,
    fit_slices,
    foreground,
    normalise,
    read_slices,
    read_volume,
    resample_to,
    same_grid,
    unfit,
    upright,
    write_atomically,
    write_volume,
)

__all__ = ["DataError", "Dataset", "SubjectSlices", "caption", "check", "denormalise", "evenly", "find_layout", "is_phantom",
           "load_subject", "open_dataset", "prompt", "read_volume", "write_volume"]

KEEP = 1 / 3                 # of the volume's largest in-slice foreground; see kept_slices
CACHE_VERSION = 2            # raise it when the pixels that load_subject returns change
SHOWN_NOTES = 8              # --check shows all of them


# ---- One subject -----------------------------------------------------------------------------------------------------

@dataclass
class SubjectSlices:
    """All axial slices of one subject, on the grid of one contrast, the reference. Z slices, C contrasts, S = size.

    The reference is the first contrast that was read, or the one that the layout prefers (Subject.grid).
    """

    images: np.ndarray                              # (Z, C, S, S) in [0, 1], float32, float16 of .npy slices;
                                                    # zeros where a contrast is missing
    present: np.ndarray                             # (C,) bool
    scales: dict                                    # contrast -> Scale
    kept: np.ndarray                                # (Z,) bool, see kept_slices
    constant: int                                   # slices that hold a single value in some contrast
    position: np.ndarray                            # (Z,) 0 at the lowest, 1 at the highest kept slice
    brain: np.ndarray                               # (Z,) foreground of the reference / area of the picture
    lesion: list | None                             # (Z,) of str, None without a segmentation
    labels: np.ndarray | None                       # (Z, S, S) uint8, the segmentation; None without
    reference: Volume | None                        # as read: the grid that outputs are written on
    notes: list                                     # (file, sentence) pairs

    def write(self, path, slices, description, overwrite=False, contrast=None):
        """Put slices (Z, S, S) in [0, 1] of one contrast back on the source's own grid and write them as NIfTI.

        contrast: if given, the description in the header is followed by the unit, and CT is written in HU. MR is
        normalised: its own intensities are arbitrary, and unknown where there was no scan.
        """
        array = unfit(slices, self.reference.array.shape)
        if contrast == "ct":
            array = denormalise(array, CT_WINDOW)
        if contrast:
            description = f"{description[:50]}, {'HU' if contrast == 'ct' else 'normalised'}"  # the header field is short
        write_volume(path, array, self.reference, description, overwrite)


def load_subject(subject, contrasts, size, use=None):
    """Read one subject (layouts.Subject) -> SubjectSlices. Whatever its grid, a contrast lands on the reference's.

    use: contrasts whose files are opened, by default all; the others count as missing and cannot influence anything.
    Every contrast is normalised on its own grid first, so the scale does not depend on where it is resampled to.
    Outside of its box it is 0, in CT that is air. DataError names subject and contrast.
    """
    if subject.in_slices:
        return _load_slices(subject, contrasts, size, use)
    read = _reference_first(subject, [contrast for contrast in contrasts if use is None or contrast in use])
    reference, images, areas, scales, notes = None, None, [], {}, []
    for contrast in read:
        volume = read_volume(subject.files[contrast], echo=subject.echoes.get(contrast), contrast=contrast)
        notes += [(volume.path.name, note) for note in volume.notes]
        background = find_background(volume.array)
        try:
            u, scales[contrast] = normalise(volume.array, background, contrast)
        except DataError as error:
            where = f"subject {subject.name}, {contrast} ({volume.path})"
            raise DataError(f"{where} {error}; remove or replace it") from None
        mask = foreground(volume.array, background, contrast)
        if reference is None:
            reference = volume
            images = np.zeros((volume.array.shape[2], len(contrasts), size, size), np.float32)
        elif not same_grid(volume, reference):
            anchor = _anchor(read, contrasts)
            notes.append((volume.path.name, f"is on another grid than {anchor}; resampled by the affines"))
            u = resample_to(replace(volume, array=u), reference, fill=0)
            mask = resample_to(replace(volume, array=mask.astype(np.float32)), reference, order=0, fill=0) > 0
        images[:, contrasts.index(contrast)] = fit(u, size)
        areas.append(mask.sum((0, 1)))
        if len(areas) == 1:
            first_mask = mask
    if reference is None:
        raise DataError(f"subject {subject.name}: has none of {', '.join(use or contrasts)}; add a file")
    present = np.array([contrast in read for contrast in contrasts])
    flat = (images[:, present].min((2, 3)) == images[:, present].max((2, 3))).any(1)
    kept = kept_slices(np.stack(areas)) & ~flat
    lesion = labels = None
    if subject.segmentation:
        labels = upright(resample_to(read_volume(subject.segmentation), reference, order=0, fill=0))    # (Z, H, W)
        lesion, labels = _lesions(labels, reference, first_mask), fit_slices(labels, size, labels=True).astype(np.uint8)
    frame = max(size, *reference.array.shape[:2]) ** 2                      # source pixels that the picture covers
    return SubjectSlices(images, present, scales, kept, int(flat.sum()), _positions(kept), areas[0] / frame, lesion, labels,
                         reference, notes)


def _load_slices(subject, contrasts, size, use):
    """A subject of .npy slices; all are kept that are not constant. Where they lie in the body is not known."""
    if use is not None:
        raise DataError(f"{subject.name}: .npy slices have no place in space, so no volumes can be written from them; "
                        "synthesise from NIfTI files")
    images = np.zeros((len(subject.paths) // len(subject.files), len(contrasts), size, size), np.float16)
    for contrast, paths in subject.files.items():
        images[:, contrasts.index(contrast)] = fit_slices(read_slices(paths), size)
    present = np.array([contrast in subject.files for contrast in contrasts])
    flat = (images[:, present].min((2, 3)) == images[:, present].max((2, 3))).any(1)
    brain = (images[:, np.argmax(present)] > 0).mean((1, 2))
    return SubjectSlices(images, present, {}, ~flat, int(flat.sum()), np.full(len(images), 0.5), brain, None, None, None, [])


def _reference_first(subject, contrasts):
    """Those of the contrasts that the subject has, the one first whose grid all others are resampled onto."""
    there = [contrast for contrast in contrasts if contrast in subject.files]
    return sorted(there, key=lambda contrast: [*subject.grid, contrast].index(contrast))


def _anchor(read, contrasts):
    """What a note calls the reference, the first of `read`."""
    return "the first contrast" if read[0] == contrasts[0] else read[0]


def to_synthesize(subjects, contrasts, asked, size, folder, say):
    """What there is to synthesise: yields (subject, sources, absent, SubjectSlices of the sources, {absent: output path}).

    A contrast is absent if the subject has no file of it, or if `asked` names it. Subjects that lack nothing, or have no
    source, are passed over; so are those whose outputs exist in folder/<subject>, which is said.
    """
    made = 0
    for subject in subjects:
        absent = [c for c in contrasts if c not in subject.files or c in asked]
        sources = [c for c in contrasts if c not in absent]
        if not absent or not sources:
            continue
        made += 1
        home = Path(folder) / subject.name
        paths = {c: home / f"{subject.name}_{c}_synthetic.nii.gz" for c in absent}
        if all(path.exists() for path in paths.values()):
            say(f"{subject.name}: {', '.join(absent)} is already in {home}; delete it to make it again")
            continue
        yield subject, sources, absent, load_subject(subject, contrasts, size, use=sources), paths
    if not made:
        say("nothing to synthesise: every subject has every contrast; name one to be made although it exists")


def kept_slices(areas):
    """Which slices to use: areas (C, Z), foreground pixels per contrast and slice -> bool (Z,).

    A slice is kept if in every contrast its foreground is at least a third of the largest in that volume. On BraTS
    (240x240, 155 slices) this keeps about 100 slices, as does "10 % of a 256x256 picture is brain", but it does not
    depend on how much empty border a scan has, so phantoms, cropped and padded scans are treated alike.
    """
    largest = areas.max(1, keepdims=True)
    return ((areas >= KEEP * largest) & (largest > 0)).all(0)


def _positions(kept):
    """Relative height of every slice in the kept range; 0.5 if one slice or none is kept."""
    z = np.flatnonzero(kept)
    if z.size < 2:
        return np.full(len(kept), 0.5)
    return np.clip((np.arange(len(kept)) - z[0]) / (z[-1] - z[0]), 0, 1)


def _lesions(labels, reference, mask):
    """One description per upright slice of labels (Z, H, W); the midline is the brain's median."""
    midline = np.median(np.nonzero(upright(mask).any(1))[1])                # over the brain's shadow, seen from above
    pixel = np.linalg.norm(np.cross(reference.affine[:3, 0], reference.affine[:3, 1]))
    return [describe_lesion(plane, midline, pixel) for plane in labels]


# ---- The data set ----------------------------------------------------------------------------------------------------

@dataclass
class Rows:
    """Some rows of a memory-mapped array, in order; rows[i] reads only what i asks for."""

    images: np.ndarray
    chosen: np.ndarray

    def __len__(self):
        return len(self.chosen)

    @property
    def shape(self):
        return len(self.chosen), *self.images.shape[1:]

    def __getitem__(self, index):
        return self.images[self.chosen[index]]


@dataclass
class Dataset:
    """The kept slices of all complete subjects; row r of every per-row field belongs to images[r]."""

    folder: Path
    layout: str
    contrasts: tuple
    size: int
    phantom: bool                                   # the folder says it is synthetic (phantom.json)
    fingerprint: str                                # of the files and the settings
    subjects: list                                  # layouts.Subject, all; split and rows hold the complete ones
    incomplete: list                                # those of them that lack contrasts, for later synthesis
    split: dict                                     # {"train": [names], "val": [names], "test": [names]}
    images: np.ndarray                              # (n, C, size, size) float16 in [0, 1], memory-mapped
    subject: np.ndarray                             # (n,) names
    z: np.ndarray                                   # (n,) canonical slice index
    position: np.ndarray                            # (n,) 0..1 in the kept range
    brain: np.ndarray                               # (n,) area fraction
    lesion: list                                    # (n,) str, or None where a subject has no segmentation
    labels: np.ndarray | None                       # (n, size, size) uint8, memory-mapped; None unless all have one
    scales: dict                                    # {subject: {contrast: Scale}}

    def part(self, part):
        """The slices of one part as a lazy array: len() and indexing, nothing is read before."""
        return Rows(self.images, self.rows(part))

    def rows(self, part, most=None):
        """Indices of all rows of "train", "val" or "test", or of `most` of them, evenly spaced; in their order."""
        rows = np.flatnonzero(np.isin(self.subject, self.split[part]))
        return rows if most is None else evenly(rows, most)

    def captions(self, rows):
        """For each of the rows, one sentence per contrast about the slice (see caption)."""
        texts = []
        for r in rows:
            texts.append([caption(c, self.position[r], self.brain[r], self.lesion[r]) for c in self.contrasts])
        return texts

    @property
    def complete(self):
        """The subjects whose slices are in the data set."""
        there = set(self.subject)
        return [s for s in self.subjects if s.name in there]

    def keys(self, rows):
        """(subject, slice number) of rows, which fix the noise of sampling."""
        return [(str(self.subject[r]), int(self.z[r])) for r in rows]

    def spread(self, part, per_subject):
        """Rows at the quantiles (k + 0.5) / per_subject of each subject's kept slices; fewer if it has fewer."""
        chosen = []
        for name in self.split[part]:
            rows = np.flatnonzero(self.subject == name)
            quantiles = (np.arange(per_subject) + 0.5) / per_subject
            chosen.append(np.unique(rows[(quantiles * len(rows)).astype(int)]))
        return np.concatenate(chosen) if chosen else np.zeros(0, int)


def evenly(rows, most):
    """At most `most` of the rows, evenly spaced."""
    if len(rows) == 0:
        return rows
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(int)]


def open_dataset(folder, contrasts=None, size=256, split_file=None, seed=0, train_fraction=0.8, test_subjects=50,
                 cache=Path("runs/cache"), workers=0, say=print):
    """Recognise, check, decode (once) and split a folder of scans -> Dataset.

    contrasts: names in the wanted order, default all common ones. size: pixels of a square slice. split_file: JSON
    {"train": [...], "val": [...], "test": [...]} instead of the random split. workers: threads for decoding, 0 means
    up to 4. say: called with every line for the user. DataError for everything that is wrong with the data.
    """
    folder, cache = Path(folder), Path(cache)
    make_phantom(folder, say)
    layout = find_layout(folder, contrasts)
    complete = [subject for subject in layout.subjects if len(subject.files) == len(layout.contrasts)]
    incomplete = [subject for subject in layout.subjects if len(subject.files) < len(layout.contrasts)]
    say(f"data: {folder} ({layout.name}), {len(complete)} subjects with {', '.join(layout.contrasts)}"
        + (f", {len(incomplete)} incomplete" if incomplete else ""))
    _say_notes(layout.notes + [f"{name}: {why}" for name, why in layout.skipped], say)
    if layout.ignored:
        say(f"  {len(layout.ignored)} NIfTI files are no contrast and not used, e.g. {layout.ignored[0].name}")
    if len(complete) < 2:
        counts = [f"{contrast} {sum(contrast in s.files for s in layout.subjects)}" for contrast in layout.contrasts]
        everyone = len(layout.subjects) + len(layout.skipped)
        raise DataError(f"{folder}: {len(complete)} of {everyone} subjects are complete "
                        f"(files: {', '.join(counts)}); at least 2 are needed, add subjects or choose fewer contrasts")
    if split_file:
        split = _read_split(split_file, complete, say)
    else:
        split = layout.split or make_split(complete, seed, train_fraction, test_subjects)
    if not split["val"]:
        say("  no validation subjects: the last checkpoint will be used instead of the best one")
    fingerprint = _fingerprint(folder, complete, layout.contrasts, size)
    index, images, labels = _cached(cache, fingerprint, folder, complete, layout.contrasts, size, workers, say)
    _say_notes(_grouped(index["notes"]), say)
    _check_duplicates(index["digests"], split, say)
    say(f"  split: {', '.join(f'{len(names)} {part}' for part, names in split.items())}; "
        f"{len(images)} of {index['slices']} slices kept, {index['constant']} are empty or constant")
    scales = {name: {contrast: Scale(*pair) for contrast, pair in of.items()} for name, of in index["scales"].items()}
    columns = {key: np.array(index[key]) for key in ("subject", "z", "position", "brain")}
    return Dataset(folder, layout.name, layout.contrasts, size, (folder / "phantom.json").exists(), fingerprint,
                   layout.subjects, incomplete, split, images, lesion=index["lesion"], labels=labels, scales=scales, **columns)


def is_phantom(folder):
    """True for a folder of digital phantoms, and for one that open_dataset would make on first use."""
    return (Path(folder) / "phantom.json").exists() or _can_be_made(Path(folder))


def _can_be_made(folder):
    """Nothing is ever made outside the repository's own data folder, nor into a folder that exists."""
    if folder.exists() or folder.resolve().parent != Path(__file__).resolve().parent:
        return False
    from data import phantom  # here, so that reading real data never needs the phantoms

    return folder.name in phantom.SETS


def make_phantom(folder, say):
    """Make the phantoms that a folder of this name stands for, if it does not exist yet.  say: called with a line."""
    folder = Path(folder)
    if _can_be_made(folder):
        from data import phantom

        say(f"*** {folder} does not exist: making DIGITAL PHANTOMS there (synthetic images, no patients) ***")
        phantom.make(folder.name, folder)


def _grouped(notes):
    """(file, sentence) pairs -> one line per sentence, so a thousand equal oddities take one line."""
    files = {}
    for file, sentence in notes:
        files.setdefault(sentence, []).append(file)
    return [f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {sentence}"
            for sentence, names in files.items()]


def _say_notes(notes, say):
    for note in notes[:SHOWN_NOTES]:
        say(f"  note: {note}")
    if len(notes) > SHOWN_NOTES:
        say(f"  and {len(notes) - SHOWN_NOTES} more notes; --check shows all")


# ---- Split -----------------------------------------------------------------------------------------------------------

def make_split(subjects, seed, train_fraction, test_subjects):
    """Random split by person, the same for the same names and seed in any order of files.

    n persons: round(train_fraction * n) train (at least 1, at most n - 1), up to test_subjects test, the rest val.
    """
    if not 0 < train_fraction < 1 or test_subjects < 1:
        raise DataError(f"split: train_fraction {train_fraction} must lie between 0 and 1, "
                        f"test_subjects {test_subjects} must be at least 1")
    people = sorted({subject.person for subject in subjects},
                    key=lambda person: hashlib.sha256(f"{seed}:{person}".encode()).hexdigest())
    n = len(people)
    if n < 2:
        raise DataError(f"split: all subjects are visits of {people[0]}; at least 2 persons are needed")
    n_train = min(max(1, round(train_fraction * n)), n - 1)
    n_test = min(test_subjects, n - n_train)
    groups = {"train": people[:n_train], "val": people[n_train + n_test:], "test": people[n_train:n_train + n_test]}
    return {part: sorted(subject.name for subject in subjects if subject.person in group)
            for part, group in groups.items()}


def _read_split(split_file, subjects, say):
    """A user's own split, checked."""
    try:
        given = json.loads(Path(split_file).read_text(encoding="utf-8"))
        split = {part: [str(name) for name in given.get(part, [])] for part in ("train", "val", "test")}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{split_file}: is not a split ({error}); write JSON with lists train, val, test") from None
    person = {subject.name: subject.person for subject in subjects}
    listed = [name for names in split.values() for name in names]
    unknown = [name for name in listed if name not in person]
    if unknown:
        raise DataError(f"{split_file}: {len(unknown)} names are no complete subjects, e.g. {', '.join(unknown[:3])}; "
                        f"subjects are called like {subjects[0].name}")
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise DataError(f"{split_file}: {', '.join(twice[:3])} is listed twice; every subject belongs to one part")
    for part in ("train", "test"):
        if not split[part]:
            raise DataError(f"{split_file}: {part} is empty; name at least one subject")
    part_of = {}
    for part, names in split.items():
        for name in names:
            if part_of.setdefault(person[name], part) != part:
                raise DataError(f"{split_file}: visits of {person[name]} are in {part_of[person[name]]} and {part}; "
                                "keep a person's visits together")
    if len(listed) < len(person):
        say(f"  {len(person) - len(listed)} subjects are not in {split_file} and not used")
    return split


def _check_duplicates(digests, split, say):
    """digests: {subject: {contrast: digest of its slices}}. Equal slices across parts of the split are a leak."""
    part_of = {name: part for part, names in split.items() for name in names}
    first = {}
    for name, of in digests.items():
        for contrast, digest in of.items():
            other = first.setdefault((contrast, digest), name)
            if other == name:
                continue
            parts = part_of.get(other), part_of.get(name)
            if None not in parts and parts[0] != parts[1]:
                raise DataError(f"{other} ({parts[0]}) and {name} ({parts[1]}) have identical {contrast} images, "
                                "a leak; remove one of them")
            say(f"  warning: {other} and {name} have identical {contrast} images")


# ---- Cache -----------------------------------------------------------------------------------------------------------

def _fingerprint(folder, subjects, contrasts, size):
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


def _cached(cache, fingerprint, folder, subjects, contrasts, size, workers, say):
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
    if any(len(index[column]) != wanted[0] for column in ("z", "position", "brain", "lesion")):
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
    index = {"key": key, "slices": 0, "constant": 0, "scales": {}, "digests": {}, "notes": [], "subject": [], "z": [],
             "position": [], "brain": [], "lesion": [], "labels": all(subject.segmentation for subject in subjects)}
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
    write_atomically(home / "index.json", json.dumps(index).encode())


@contextmanager
def _growing_npy(path, kind, shape):
    """A .npy file of rows of this shape, yielded as a function that appends some; it appears when it is complete.

    numpy pads the header so that the first axis can grow in place; n is known only after the last row.
    """
    temporary, n = path.with_name(f"{path.name}.tmp-{os.getpid()}"), 0

    def header():
        np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": (n, *shape)})

    def append(rows):
        nonlocal n
        n += len(rows)
        file.write(rows.tobytes())
    try:
        with open(temporary, "wb") as file:
            header()
            start = file.tell()
            yield append
            file.seek(0)
            header()
            if file.tell() != start:
                raise RuntimeError("the .npy header changed its length")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    index["z"] += z.tolist()
    index["position"] += slices.position[z].tolist()
    index["brain"] += slices.brain[z].tolist()
    index["lesion"] += [slices.lesion[k] for k in z] if slices.lesion else [None] * len(z)
    return kept


# ---- Check -----------------------------------------------------------------------------------------------------------

def check(folder, contrasts=None, say=print):
    """Open every file of a folder, say what was found and what is wrong; True if open_dataset can use it."""
    folder = Path(folder)
    try:
        make_phantom(folder, say)
        layout = find_layout(folder, contrasts)
    except DataError as error:
        say(f"error: {error}")
        return False
    say(f"{folder}: {layout.name}, {len(layout.subjects)} subjects, contrasts {', '.join(layout.contrasts)}")
    for note in layout.notes + [f"{name}: skipped, {why}" for name, why in layout.skipped]:
        say(f"note: {note}")
    for path in layout.ignored:
        say(f"not a contrast: {path}")
    say(f"{'subject':24} {'contrast':8} {'shape':>13} {'spacing mm':>16} axes {'range':>19} {'background':>10} "
        "foreground")
    complete, all_errors, all_notes, people = 0, [], [], set()
    for subject in layout.subjects:
        errors, notes = _check_subject(subject, layout.contrasts, say)
        all_errors += errors
        all_notes += notes
        if not errors and len(subject.files) == len(layout.contrasts):
            complete += 1
            people.add(subject.person)
    for note in _grouped(all_notes):
        say(f"note: {note}")
    for error in all_errors:
        say(f"error: {error}")
    usable = not all_errors and len(people) >= 2
    say(f"{complete} complete subjects of {len(people)} persons (2 needed), {len(all_errors)} errors: "
        + ("usable" if usable else "not usable"))
    return usable


def _check_subject(subject, contrasts, say):
    """One table row per file -> (errors as sentences, notes as (file, sentence))."""
    errors, notes, reference, first_mask = [], [], None, None
    read = _reference_first(subject, contrasts)
    if subject.in_slices:
        return _check_slices(subject, read, say), []
    for contrast in read:
        try:
            volume = read_volume(subject.files[contrast], echo=subject.echoes.get(contrast), contrast=contrast)
            background = find_background(volume.array)
            mask = foreground(volume.array, background, contrast)
            say(_table_row(subject, contrast, volume, background, mask))
            name = f"{subject.name} {contrast}"
            notes += [(name, note) for note in volume.notes]
            normalise(volume.array, background, contrast)
            if reference is None:
                reference, first_mask = volume, mask
            elif not same_grid(volume, reference):
                anchor = _anchor(read, contrasts)
                notes.append((name, f"is on another grid than {anchor}; will be resampled by the affines"))
                resample_to(volume, reference, fill=background.level)
            elif _overlap(mask[::-1], first_mask) > _overlap(mask, first_mask) + 0.02:
                notes.append((name, f"fits {_anchor(read, contrasts)} better when mirrored; are left and right "
                              "swapped?"))
        except DataError as error:
            errors.append(str(error) if str(subject.files[contrast]) in str(error)
                          else f"subject {subject.name}, {contrast} ({subject.files[contrast]}) {error}")
    if subject.segmentation and reference is not None:
        try:
            resample_to(read_volume(subject.segmentation), reference, order=0, fill=0)
        except DataError as error:
            errors.append(str(error))
    return errors, notes


def _check_slices(subject, contrasts, say):
    """One table row per stack of .npy slices -> errors as sentences."""
    errors = []
    for contrast in contrasts:
        try:
            slices = read_slices(subject.files[contrast])
        except DataError as error:
            errors.append(str(error))
            continue
        shape = "x".join(str(n) for n in (*slices.shape[:0:-1], len(slices)))
        say(f"{subject.name:24} {contrast:8} {shape:>13} {'-':>16} {'-':4} "
            f"{f'{slices.min():.4g}..{slices.max():.4g}':>19} {0:>10} {(slices > 0).mean():10.3f}")
    return errors


def _table_row(subject, contrast, volume, background, mask):
    shape = "x".join(str(n) for n in volume.array.shape)
    spacing = "x".join(f"{edge:.2f}" for edge in volume.spacing)
    values = f"{volume.array.min():.4g}..{volume.array.max():.4g}"
    return (f"{subject.name:24} {contrast:8} {shape:>13} {spacing:>16} {volume.axes:4} {values:>19} "
            f"{background.level:>10.4g} {mask.mean():10.3f}")


def _overlap(first, second):
    """Dice coefficient of two masks of one shape."""
    return 2 * np.count_nonzero(first & second) / max(1, np.count_nonzero(first) + np.count_nonzero(second))
