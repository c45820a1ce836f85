"""A folder of scans becomes one array of slices on disk, split by person: open_dataset."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data import phantom
from data.cache import cached_slices
from data.files import DataError
from data.identity import Memory, digests_of, files_of_subjects, fingerprint_of, subject_key
from data.intensities import WINDOWS, Scale
from data.layouts import TEXT, find_layout, folders_of
from data.placing import picture_of, unequal_pixels
from data.prompts import caption
from data.reports import clean_report
from data.split import check_duplicates, make_split, read_split, use_split
from data.stack import Stack

SHOWN_NOTES = 8         # open_dataset says so many; --check says all


@dataclass
class Rows:
    """Some rows of a Stack or an array, in order. rows[i] reads only what i asks for."""

    images: Stack | np.ndarray
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
    """The kept slices of all subjects that are used.

    They are the complete ones, or all that have two contrasts; see open_dataset. n is the number of
    slices and C the number of contrasts. Row r of every field of length n belongs to images[r].
    """

    folder: Path
    layout: str                     # the name of the layout, for the user
    contrasts: tuple
    size: int                       # height and width of a slice in pixels
    phantom: bool                   # True if the folder says that it is synthetic (phantom.json)
    fingerprint: str                # of names, contrasts, size and the content of the files
    subjects: list                  # of layouts.Subject, all; only those used are in split and rows
    incomplete: list                # those of them that lack too many contrasts to be used
    split: dict                     # {"train": [names], "val": [names], "test": [names]}
    images: Stack                   # (n, C, size, size) float16 in [0, 1], read when indexed; 0
                                    # where a contrast is missing, and for reports
    subject: np.ndarray             # (n,) names
    slice_number: np.ndarray        # (n,) index of the slice in the canonical volume
    position: np.ndarray            # (n,) height in the kept range, from 0 to 1
    brain: np.ndarray               # (n,) share of the picture that is brain
    lesion: list                    # (n,) str, or None where a subject has no segmentation
    labels: Stack | None            # (n, size, size) uint8; None unless all have a segmentation
    scales: dict                    # {subject: {contrast: Scale}}
    files: dict = field(default_factory=dict)       # {subject: digests of the files of its images,
                                                    # and of its slices in each contrast}

    def part(self, part):
        """The slices of "train", "val" or "test" as Rows. Nothing is read before it is indexed."""
        return Rows(self.images, self.rows(part))

    def rows(self, part, most=None):
        """The numbers of all rows of "train", "val" or "test", in order of subject and slice.

        most: At most so many of them, evenly spaced.
        """
        rows = np.flatnonzero(np.isin(self.subject, self.split[part]))
        return rows if most is None else evenly(rows, most)

    def keys(self, rows):
        """(subject, slice number) of each of the rows. They fix the noise of sampling."""
        return [(str(self.subject[r]), int(self.slice_number[r])) for r in rows]

    def captions(self, rows):
        """For each of the rows, one sentence per contrast about the slice (see data.prompts)."""
        texts = []
        for r in rows:
            about = (self.position[r], self.brain[r], self.lesion[r])
            texts.append([caption(contrast, *about) for contrast in self.contrasts])
        return texts

    @property
    def present(self):
        """(n, C) bool: which contrasts were scanned, for each row."""
        has = {}
        for subject in self.subjects:
            has[subject.name] = [contrast in subject.files for contrast in self.contrasts]
        return np.array([has[name] for name in self.subject])

    def reports(self, rows):
        """The cleaned report of the subject of each row, or None where there is no report."""
        names = [str(self.subject[r]) for r in rows]
        cleaned = dict.fromkeys(names)
        for subject in self.subjects:
            if subject.name in cleaned and TEXT in subject.files:
                # For MIMIC, lines are joined. Reports without line breaks give the same words.
                cleaned[subject.name] = clean_report(subject.report, mimic=True)
        return [cleaned[name] for name in names]

    def having(self, rows, contrasts):
        """Those of the rows whose subjects have all of these contrasts."""
        channels = [self.contrasts.index(contrast) for contrast in contrasts]
        return rows[self.present[rows][:, channels].all(1)]

    @property
    def complete(self):
        """The subjects whose slices are in the data set, or will be there when it is decoded."""
        left_out = {subject.name for subject in self.incomplete}
        return [subject for subject in self.subjects if subject.name not in left_out]

    @property
    def windows(self):
        """{contrast: Scale} of the contrasts in physical units, CT and PET.

        All scans of a contrast share one window. Only of CT there are two, see data.intensities.
        The one that most subjects have is returned.
        """
        found = {}
        for contrast in set(self.contrasts) & set(WINDOWS):
            scales = [of[contrast] for of in self.scales.values() if contrast in of]
            if scales:
                found[contrast] = max(set(scales), key=scales.count)
        return found

    @property
    def picture(self):
        """The Picture of the first complete subject's PET, if the grids are those of PETs, or None.

        Whoever stores it with a trained model can show CTs of another folder at the same size; see
        data.subject.load_subject.
        """
        for subject in self.complete:
            if subject.grid == ("pet",) and "pet" in subject.files and not subject.in_slices:
                return picture_of(subject.files["pet"])
        return None

    def spread(self, part, per_subject):
        """Some rows of each subject of a part, spread evenly over its kept slices.

        They lie at the quantiles (k + 0.5) / per_subject. A subject with fewer slices gives all.
        """
        chosen = [np.zeros(0, int)]
        for name in self.split[part]:
            rows = np.flatnonzero(self.subject == name)
            count = min(per_subject, len(rows))
            quantiles = (np.arange(count) + 0.5) / max(1, count)
            chosen.append(np.unique(rows[(quantiles * len(rows)).astype(int)]))
        return np.concatenate(chosen)


def evenly(rows, most):
    """At most `most` of the rows, evenly spaced, with the first and the last."""
    if len(rows) == 0:
        return rows
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(int)]


def open_dataset(folder, contrasts=None, size=256, split_file=None, seed=0, train_fraction=0.8,
                 test_subjects=50, cache=Path("runs/cache"), workers=0, say=print, gaps=False,
                 texts=False, agree=lambda ds: None, alone=False):
    """Recognise, check, decode and split a folder of scans -> Dataset. Decoding is done once.

    contrasts: The names of the channels in order, by default all that most subjects have.
    size: The height and width of a slice in pixels.
    split_file: A JSON file {"train": [...], "val": [...], "test": [...]} that replaces the random
    split, which depends on seed, train_fraction and test_subjects (see make_split).
    cache: The folder for decoded slices. If decoding is interrupted, the next call continues it.
    workers: The number of threads that decode; 0 means up to 4.
    say: A function that gets every line for the user.
    gaps: True if subjects may lack contrasts. Two are enough then, and by default the contrasts are
    all that at least two subjects have. The images of a missing contrast are 0.
    texts: True if reports count as a contrast, which is called "text"; see find_layout. Its images
    are 0 everywhere. Dataset.present tells which rows have a report, and Dataset.reports gives it.
    agree: A function that gets the Dataset before the first scan is decoded, see undecoded. It may
    refuse it with an error of its own.
    alone: True if the scans of one person are enough, because a trained model shall be scored. They
    are the test then.
    DataError for everything that is wrong with the data.
    """
    folder = Path(folder)
    make_phantom(folder, say)
    layout = find_layout(folder, contrasts, gaps, texts)
    _say_layout(folder, layout, gaps, say)
    ds = undecoded(folder, layout, size, split_file, seed, train_fraction, test_subjects, gaps, say,
                   alone)
    agree(ds)
    complete = ds.complete
    split = ds.split
    workers = workers or min(4, os.cpu_count() or 1)
    memory = Memory(Path(cache) / "known_files.json")
    paths = []
    for subject in complete:
        paths += subject.paths
    digests = digests_of(paths, memory, workers, say)
    keys = [subject_key(subject, digests, layout.contrasts, size) for subject in complete]
    index, images, labels = cached_slices(Path(cache), memory, keys, complete, layout.contrasts,
                                          size, workers, say)
    _say_notes(unequal_pixels(index["pixels"]) + grouped(index["notes"]), say)
    check_duplicates(index["digests"], split, say)
    # The slices tell who is who where a file was only compressed or written again.
    files = files_of_subjects(complete, digests)
    for name, of_contrast in index["digests"].items():
        files[name] += of_contrast.values()
    counts = ", ".join(f"{len(names)} {part}" for part, names in split.items())
    say(f"  split: {counts}; {len(images)} of {index['slices']} slices kept, "
        f"{index['constant']} are empty or constant")
    return replace(
        ds,
        fingerprint=fingerprint_of(keys),
        images=images,
        subject=np.array(index["subject"]),
        slice_number=np.array(index["slice_number"]),
        position=np.array(index["position"]),
        brain=np.array(index["brain"]),
        lesion=index["lesion"],
        labels=labels,
        scales=_read_scales(index["scales"]),
        files=files)


def undecoded(folder, layout, size, split_file, seed, train_fraction, test_subjects, gaps, say,
              alone=False):
    """Split the subjects of a Layout -> Dataset that has no slices yet.

    The arguments are those of open_dataset. open_dataset and check both begin with this, so that
    both refuse the same. DataError if there are too few subjects, or if the split does not fit.
    """
    complete = []
    incomplete = []
    for subject in layout.subjects:
        (complete if is_complete(subject, layout, gaps) else incomplete).append(subject)
    alone = alone and len({subject.person for subject in complete}) == 1
    if not alone:
        _require_two(folder, layout, complete)
    if split_file:
        split = read_split(split_file, complete, say)
    elif alone:
        split = {"train": [], "val": [], "test": [subject.name for subject in complete]}
    elif layout.split:
        split = use_split(layout.split, complete, seed, say)
    else:
        split = make_split(complete, seed, train_fraction, test_subjects)
    if split["train"] and not split["val"]:
        say("  no validation subjects: the last checkpoint will be used instead of the best one")
    nothing = np.zeros(0)
    return Dataset(
        folder=folder, layout=layout.name, contrasts=layout.contrasts, size=size,
        phantom=is_phantom(folder), fingerprint="", subjects=layout.subjects,
        incomplete=incomplete, split=split,
        images=np.zeros((0, len(layout.contrasts), size, size), np.float16),
        subject=nothing.astype(str), slice_number=nothing.astype(int), position=nothing,
        brain=nothing, lesion=[], labels=None, scales={}, files={})


def subject_files(subjects, cache=Path("runs/cache"), workers=0, say=print):
    """{name of a subject: digests of the files with its images}, as Dataset.files has them.

    A file that cannot be read is left out.
    subjects: A list of layouts.Subject. cache, workers, say: As for open_dataset.
    """
    memory = Memory(Path(cache) / "known_files.json")
    workers = workers or min(4, os.cpu_count() or 1)
    paths = []
    for subject in subjects:
        paths += [path for path in subject.paths if os.access(path, os.R_OK)]
    return files_of_subjects(subjects, digests_of(paths, memory, workers, say))


def _read_scales(stored):
    """{subject: {contrast: [low, high]}} -> {subject: {contrast: Scale}}."""
    scales = {}
    for name, pairs in stored.items():
        scales[name] = {contrast: Scale(*pair) for contrast, pair in pairs.items()}
    return scales


def is_complete(subject, layout, gaps):
    """True if a subject has all contrasts; if there may be gaps, two are enough."""
    return len(subject.files) >= (2 if gaps else len(layout.contrasts))


def _say_layout(folder, layout, gaps, say):
    """Tell the user what was found in the folder."""
    having = "at least two of " if gaps else ""
    complete = sum(is_complete(subject, layout, gaps) for subject in layout.subjects)
    incomplete = len(layout.subjects) - complete
    also = f", {incomplete} incomplete" if incomplete else ""
    say(f"data: {folder} ({layout.name}), {complete} subjects with "
        f"{having}{', '.join(layout.contrasts)}{also}")
    _say_notes(layout.notes + [f"{name}: {why}" for name, why in layout.skipped], say)
    if layout.ignored:
        say(f"  {len(layout.ignored)} NIfTI files are no contrast and not used, "
            f"e.g. {layout.ignored[0].name}")


def _require_two(folder, layout, complete):
    """DataError if there are fewer than two complete subjects."""
    if len(complete) >= 2:
        return
    counts = []
    for contrast in layout.contrasts:
        count = sum(contrast in subject.files for subject in layout.subjects)
        counts.append(f"{contrast} {count}")
    everyone = len(layout.subjects) + len(layout.skipped)
    raise DataError(f"{folder}: {len(complete)} of {everyone} subjects are complete "
                    f"(files: {', '.join(counts)}); at least 2 are needed, "
                    "add subjects or choose fewer contrasts")


# ---- Phantoms ------------------------------------------------------------------------------------

def is_phantom(folder):
    """True for a folder of digital phantoms, and for one that open_dataset would make."""
    return all((one / "phantom.json").exists() or _can_be_made(one) for one in folders_of(folder))


def _can_be_made(folder):
    """True for data/NAME, if NAME is a set of phantoms and the folder does not exist yet.

    Nothing is ever made outside of this project's own folder data.
    """
    if folder.exists() or folder.resolve().parent != Path(__file__).resolve().parent:
        return False
    return folder.name in phantom.SETS


def make_phantom(folder, say):
    """Make the phantoms of folders that do not exist, if they are places of sets."""
    for one in folders_of(folder):
        if _can_be_made(one):
            say(f"*** {one} does not exist: making DIGITAL PHANTOMS there "
                "(synthetic images, no patients) ***")
            phantom.make(one.name, one)


# ---- Notes ---------------------------------------------------------------------------------------

def grouped(notes):
    """Turn (file, sentence) pairs into one line for each sentence.

    A thousand files with the same oddity then take one line.
    """
    files = {}                          # sentence -> files
    for file, sentence in notes:
        files.setdefault(sentence, []).append(file)
    lines = []
    for sentence, names in files.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"{names[0]}{more}: {sentence}")
    return lines


def _say_notes(notes, say):
    for note in notes[:SHOWN_NOTES]:
        say(f"  note: {note}")
    if len(notes) > SHOWN_NOTES:
        say(f"  and {len(notes) - SHOWN_NOTES} more notes; --check shows all")
