"""All slices of one subject, on one grid: load_subject. And what there is to synthesise: to_synthesize."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.files import DataError
from data.intensities import CT_WINDOW, denormalise, find_background, foreground, normalise
from data.prompts import describe_lesion
from data.volumes import (
    Volume,
    fit,
    fit_slices,
    read_slices,
    read_volume,
    resample_to,
    same_grid,
    unfit,
    upright,
    write_volume,
)

KEEP = 1 / 3                 # of the volume's largest in-slice foreground; see kept_slices


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
    read = reference_first(subject, [contrast for contrast in contrasts if use is None or contrast in use])
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
            anchor = anchor_name(read, contrasts)
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


def reference_first(subject, contrasts):
    """Those of the contrasts that the subject has, the one first whose grid all others are resampled onto."""
    there = [contrast for contrast in contrasts if contrast in subject.files]
    return sorted(there, key=lambda contrast: [*subject.grid, contrast].index(contrast))


def anchor_name(read, contrasts):
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
