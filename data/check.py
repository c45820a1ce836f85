"""Open every file of a folder, say what was found and what is wrong: check."""

from pathlib import Path

import numpy as np

from data.dataset import grouped, make_phantom
from data.files import DataError
from data.intensities import find_background, foreground, normalise
from data.layouts import find_layout
from data.subject import anchor_name, reference_first
from data.volumes import read_slices, read_volume, resample_to, same_grid


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
    for note in grouped(all_notes):
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
    read = reference_first(subject, contrasts)
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
                anchor = anchor_name(read, contrasts)
                notes.append((name, f"is on another grid than {anchor}; will be resampled by the affines"))
                resample_to(volume, reference, fill=background.level)
            elif _overlap(mask[::-1], first_mask) > _overlap(mask, first_mask) + 0.02:
                notes.append((name, f"fits {anchor_name(read, contrasts)} better when mirrored; are left and right "
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
