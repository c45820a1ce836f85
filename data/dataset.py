"""A folder of scans becomes one memory-mapped array of slices, split by person: open_dataset."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import phantom
from data.cache import cached_slices, fingerprint_of
from data.files import DataError
from data.intensities import Scale
from data.layouts import find_layout
from data.split import check_duplicates, make_split, read_split

SHOWN_NOTES = 8              # --check shows all of them


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
    slice_number: np.ndarray                        # (n,) canonical slice index
    position: np.ndarray                            # (n,) 0..1 in the kept range
    brain: np.ndarray                               # (n,) area fraction
    lesion: list                                    # (n,) str, or None where a subject has no segmentation
    labels: np.ndarray | None                       # (n, size, size) uint8, memory-mapped; None unless all have one
    scales: dict                                    # {subject: {contrast: Scale}}

    def part(self, part):
        """The slices of one part as a lazy array: len() and indexing, nothing is read before."""
        return Rows(self.images, self.rows(part))

    def rows(self, part):
        """Indices of all rows of "train", "val" or "test", in order of subject and slice."""
        return np.flatnonzero(np.isin(self.subject, self.split[part]))

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
        split = read_split(split_file, complete, say)
    else:
        split = layout.split or make_split(complete, seed, train_fraction, test_subjects)
    if not split["val"]:
        say("  no validation subjects: the last checkpoint will be used instead of the best one")
    fingerprint = fingerprint_of(folder, complete, layout.contrasts, size)
    index, images, labels = cached_slices(cache, fingerprint, folder, complete, layout.contrasts, size, workers, say)
    _say_notes(grouped(index["notes"]), say)
    check_duplicates(index["digests"], split, say)
    say(f"  split: {', '.join(f'{len(names)} {part}' for part, names in split.items())}; "
        f"{len(images)} of {index['slices']} slices kept, {index['constant']} are empty or constant")
    scales = {name: {contrast: Scale(*pair) for contrast, pair in of.items()} for name, of in index["scales"].items()}
    columns = {key: np.array(index[key]) for key in ("subject", "slice_number", "position", "brain")}
    return Dataset(folder, layout.name, layout.contrasts, size, (folder / "phantom.json").exists(), fingerprint,
                   layout.subjects, incomplete, split, images, lesion=index["lesion"], labels=labels, scales=scales, **columns)


def is_phantom(folder):
    """True for a folder of digital phantoms, and for one that open_dataset would make on first use."""
    return (Path(folder) / "phantom.json").exists() or _can_be_made(Path(folder))


def _can_be_made(folder):
    """Nothing is ever made outside the repository's own data folder, nor into a folder that exists."""
    if folder.exists() or folder.resolve().parent != Path(__file__).resolve().parent:
        return False
    return folder.name in phantom.SETS


def make_phantom(folder, say):
    if _can_be_made(folder):
        say(f"*** {folder} does not exist: making DIGITAL PHANTOMS there (synthetic images, no patients) ***")
        phantom.make(folder.name, folder)


def grouped(notes):
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
