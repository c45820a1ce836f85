"""Open every file of a folder, and say what was found and what is wrong: check."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.cache import digests_of_images, kept_numbers
from data.dataset import evenly, grouped, is_complete, make_phantom, undecoded
from data.files import DataError
from data.intensities import find_background, foreground, normalise
from data.layouts import TEXT, find_layout
from data.layouts.words import kind_of
from data.picture_files import read_picture
from data.placing import unequal_pixels
from data.prompts import record_of, scan_fields, scan_prompt
from data.reports import clean_report
from data.split import check_duplicates
from data.subject import load_subject, read_scan, reference_first, require_pre
from data.volumes import read_stacks

# The columns of the table: subject, contrast, shape, spacing, axes, range, background, foreground.
ROW = "{:24} {:8} {:>13} {:>16} {:4} {:>19} {:>10} {}"


def check(folder, contrasts=None, say=print, gaps=False, texts=False, size=256, split_file=None,
          seed=0, train_fraction=0.8, test_subjects=50, agree=lambda ds: None):
    """Open every file of a folder, and say what was found and what is wrong.

    say: A function that gets every line for the user.
    The other arguments are those of open_dataset.
    The result is True if open_dataset can use the folder. It is found out by the same functions.
    What is wrong with the data is said. DataError is raised for wrong usage only (its status is 2).
    """
    folder = Path(folder)
    try:
        make_phantom(folder, say)
        layout = find_layout(folder, contrasts, gaps, texts)
    except DataError as error:
        if error.status == 2:
            raise
        say(f"error: {error}")
        return False
    say(f"{folder}: {layout.name}, {len(layout.subjects)} subjects, "
        f"contrasts {', '.join(layout.contrasts)}")
    for note in layout.notes + [f"{name}: skipped, {why}" for name, why in layout.skipped]:
        say(f"note: {note}")
    for path in layout.ignored:
        say(f"not a contrast: {path}")
    say(ROW.format("subject", "contrast", "shape", "spacing mm", "axes", "range", "background",
                   "foreground"))
    people = set()
    digests = {}                                        # of the complete subjects
    pixels = {}                                         # mm
    all_errors = []
    all_notes = []
    try:
        ds = undecoded(folder, layout, size, split_file, seed, train_fraction, test_subjects, gaps,
                       say)
        agree(ds)
    except DataError as error:
        all_errors.append(str(error))
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        found = pool.map(lambda subject: _check_subject(subject, layout, size, gaps),
                         layout.subjects)
        for subject, (rows, errors, notes, images, pixel) in zip(layout.subjects, found):
            for row in rows:
                say(row)
            all_errors += errors
            all_notes += notes
            if images is not None:
                digests[subject.name] = images
                pixels[subject.name] = pixel
                people.add(subject.person)
    finally:
        pool.shutdown(cancel_futures=True)              # Ctrl-C does not wait for all
    if not all_errors:
        try:
            check_duplicates(digests, ds.split, say)
        except DataError as error:
            all_errors.append(str(error))
    _say_reports(layout.subjects, say)
    _say_records(layout, say)
    for note in grouped(all_notes) + unequal_pixels(pixels):
        say(f"note: {note}")
    for error in all_errors:
        say(f"error: {error}")
    usable = not all_errors and len(people) >= 2
    say(f"{len(digests)} complete subjects of {len(people)} persons (2 needed), "
        f"{len(all_errors)} errors: {'usable' if usable else 'not usable'}")
    return usable


def _check_subject(subject, layout, size, gaps):
    """Open the files of a subject, and decode a complete one as open_dataset does.

    The result is (rows of the table, errors, notes, digests, pixel). Errors are sentences, and
    notes are (file, sentence) pairs. digests is {contrast: digest of its images}, and pixel is the
    edge of a pixel in mm. Both are None if the subject cannot be used.
    """
    rows = []
    errors, notes = _check_files(subject, layout.contrasts, rows.append)
    if errors or not is_complete(subject, layout, gaps):
        return rows, errors, notes, None, None
    try:
        slices = load_subject(subject, layout.contrasts, size)
        numbers = kept_numbers(slices, subject, layout.contrasts)
    except DataError as error:
        return rows, [str(error)], notes, None, None
    notes = [(f"{subject.name} {file}", note) for file, note in slices.notes]
    images = slices.images[numbers].astype("<f2", copy=False)
    digests = digests_of_images(slices, images, layout.contrasts)
    return rows, errors, notes, digests, slices.pixel


def _check_files(subject, contrasts, say):
    """Say one row of the table for each file of a subject -> (errors, notes).

    Errors are sentences. Notes are (file, sentence) pairs. Whether the files fit each other is
    found out when they are decoded.
    """
    if subject.in_slices:
        return _check_slices(subject, say), []
    errors, notes = _check_volumes(subject, contrasts, say)
    more_errors, more_notes = _check_pictures(subject, contrasts, say)
    return errors + more_errors, notes + more_notes


def _check_volumes(subject, contrasts, say):
    """Say one row of the table for each volume -> (errors, notes), see _check_files."""
    errors = []
    notes = []
    scales = {}
    for contrast in reference_first(subject, contrasts):
        path = subject.files[contrast]
        try:
            volume = read_scan(subject, contrast)
            background = find_background(volume.array)
            mask = foreground(volume.array, background, contrast)
            say(_table_row(subject, contrast, volume, background, mask))
            notes += [(f"{subject.name} {path.name}", note) for note in volume.notes]
            require_pre(subject, contrast, scales)
            _, scales[contrast] = normalise(volume.array, background, contrast, scales.get("pre"))
        except DataError as error:
            if str(path) in str(error):
                errors.append(str(error))
            else:
                errors.append(f"subject {subject.name}, {contrast} ({path}) {error}")
    return errors, notes


def _check_pictures(subject, contrasts, say):
    """Say one row of the table for each picture -> (errors, notes), see _check_files."""
    errors = []
    notes = []
    for contrast in contrasts:
        for path in subject.pictures(contrast):
            try:
                picture = read_picture(path)
            except DataError as error:
                errors.append(str(error))
                continue
            notes += [(f"{subject.name} {contrast}", note) for note in picture.notes]
            height, width = picture.array.shape
            say(ROW.format(subject.name, contrast, f"{width}x{height}", "-", "-",
                           f"{picture.array.min():.4g}..{picture.array.max():.4g}", "-",
                           f"{'-':>10}"))
    return errors, notes


def _say_reports(subjects, say):
    """If there are reports, say how many and how long they are, and show three of them."""
    texts = [clean_report(subject.report, mimic=True) for subject in subjects
             if TEXT in subject.files]
    if not texts:
        return
    vocabulary = set()
    for text in texts:
        vocabulary.update(text.split())
    lengths = [len(text.split()) for text in texts]
    say(f"reports: {len(texts)}; words in the shortest, the median and the longest: "
        f"{min(lengths)}, {np.median(lengths):g}, {max(lengths)}; "
        f"different words: {len(vocabulary)}")
    for text in [texts[i] for i in evenly(np.arange(len(texts)), 3)]:
        say(f"report: {text}")


def _say_records(layout, say):
    """If the layout knows its scans, say in tables what is known, and show up to three prompts."""
    if not any(subject.records for subject in layout.subjects):
        return
    say("scans, and the share of them of which a field is known, in %:")
    first = []                          # prompts of the first contrast of each kind
    others = []
    for kind in ("MRI", "CT", "PET", "X-ray"):
        contrasts = [contrast for contrast in layout.contrasts if kind_of(contrast) == kind]
        texts = _say_kind(kind, contrasts, layout.subjects, say)
        first += texts[:1]
        others += texts[1:]
    for text in (first + others)[:3]:
        say(f"prompt: {text}")


def _say_kind(kind, contrasts, subjects, say):
    """Say the table of one kind of scan -> the prompt of the best-known scan of each contrast."""
    texts = []
    for contrast in contrasts:
        fields = scan_fields(contrast)
        records = []
        for subject in subjects:
            if contrast in subject.files:
                records.append(record_of(subject, contrast))
        if not records:
            continue
        if not texts:
            say(f"{kind:8} scans " + "".join(f"{field:>9}" for field in fields))
        shares = []
        for field in fields:
            known = sum(field in record for record in records)
            shares.append(f"{100 * known / len(records):9.0f}")
        say(f"{contrast:8} {len(records):5} " + "".join(shares))
        texts.append(scan_prompt(contrast, max(records, key=len)))
    return texts


def _check_slices(subject, say):
    """Say one row of the table for each stack of .npy slices -> errors as sentences."""
    try:
        for contrast, slices in read_stacks(subject):
            depth, height, width = slices.shape
            say(ROW.format(subject.name, contrast, f"{width}x{height}x{depth}", "-", "-",
                           f"{slices.min():.4g}..{slices.max():.4g}", "0",
                           f"{(slices > 0).mean():10.3f}"))
    except DataError as error:
        return [str(error)]
    return []


def _table_row(subject, contrast, volume, background, mask):
    shape = "x".join(str(n) for n in volume.array.shape)
    spacing = "x".join(f"{edge:.2f}" for edge in volume.spacing)
    values = f"{volume.array.min():.4g}..{volume.array.max():.4g}"
    return ROW.format(subject.name, contrast, shape, spacing, volume.axes, values,
                      f"{background.level:.4g}", f"{mask.mean():10.3f}")
