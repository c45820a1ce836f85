"""Where the volumes of one subject lie: on which grid they meet, and whether they fit each other.

Headers are often wrong, although the voxels are right. What is said of two volumes here is
therefore said of the bodies in them, which are compared on one grid.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from nibabel.affines import apply_affine
from nibabel.orientations import apply_orientation, inv_ornt_aff, ornt_transform
from scipy import ndimage

from data.files import DataError
from data.volumes import (
    CANONICAL,
    COARSER,
    MAX_VOXELS,
    grid_around,
    read_geometry,
    read_volume,
    resample_to,
    same_grid,
)

# Two bodies of which less than this share is common do not fit each other. Two heads of one size
# reach it if they are moved apart by a third of their width.
COMMON = 0.5
REGISTERED = 0.8        # registered scans have more in common
# A mirrored volume fits better if its information about the other one is larger by this factor and
# by so many nats. The halves of a head resemble each other, so they give some information, too.
MIRRORED = (1.3, 0.1)
# What lies at the two ends of the axes x, y and z.
ENDS = ("left and right", "front and back", "top and bottom")
LEVELS = 8              # of the intensities in a joint histogram
UNEQUAL = 1.2           # pixels of two subjects are unequal from this ratio of their edges on
SQUARE = 1.05           # a pixel is square up to this ratio of its two edges


class Placed(NamedTuple):
    """One contrast on the grid of the reference."""

    u: np.ndarray                   # (X, Y, Z) float32 in [0, 1]
    mask: np.ndarray                # (X, Y, Z) bool, the foreground
    centre: np.ndarray              # (3,) mm, the middle of the foreground in the world
    notes: list                     # sentences


# ---- The grid ------------------------------------------------------------------------------------

def finest_first(subject, read):
    """Put the contrast whose grid is used first -> (contrasts in order of reading, note or None).

    It is the first contrast, unless the pixels of its axial slices are clearly larger than those of
    another one, as in a sagittal scan of thick slices. A file that does not say where it lies comes
    last. If the subject names the contrast (Subject.grid), nothing is changed.

    read: The contrasts that are read. post never comes before pre, whose scale it has.
    """
    if read[0] in subject.grid:
        return read, None
    pixels = {}
    for contrast in read:
        try:
            volume = read_geometry(subject.files[contrast], series=True)
        except DataError:
            continue                    # it is raised when the file itself is read
        if has_place(volume) and not (contrast == "post" and "pre" in read):
            pixels[contrast] = float(volume.spacing[:2].max())
    fine = [contrast for contrast in pixels if pixels[contrast] < COARSER * min(pixels.values())]
    if not fine or fine[0] == read[0]:
        return read, None
    best = fine[0]
    note = f"gives the grid of all, because {read[0]} does not say where it lies"
    if read[0] in pixels:
        note = (f"gives the grid of all, because its axial pixels of {pixels[best]:.2f} mm are the "
                f"finest; those of {read[0]} have {pixels[read[0]]:.2f} mm")
    return [best] + [contrast for contrast in read if contrast != best], note


def with_square_pixels(volume, notes):
    """The grid on which the slices of a volume are read -> Volume; the volume itself if it fits.

    Sagittal and coronal scans have axial pixels that are not square. As an image, a head would be
    too narrow, and another head, scanned otherwise, would not. Both edges become the finer one.

    notes: A list that gets (file, sentence) pairs.
    """
    across, down, _ = volume.spacing
    edge = min(across, down)
    if max(across, down) < SQUARE * edge:
        return volume
    notes.append((volume.path.name, f"has axial pixels of {across:.2f} x {down:.2f} mm; they are "
                  f"resampled to squares of {edge:.2f} mm"))
    smaller = np.array([edge / across, edge / down, 1.0])
    shape = tuple(np.ceil(volume.array.shape / smaller - 1e-6).astype(int))
    if np.prod(shape, dtype=float) > MAX_VOXELS:
        raise DataError(f"{volume.path}: has axial pixels of {across:.2f} x {down:.2f} mm; as "
                        f"squares they would be {shape}; repair its header")
    affine = volume.affine @ np.diag([*smaller, 1.0])
    affine[:3, 3] = apply_affine(volume.affine, (smaller - 1) / 2)      # the corner stays in place
    return replace(volume, array=np.broadcast_to(np.float32(0), shape), affine=affine)


def has_place(volume):
    """False if a header does not tell where its volume lies.

    It has no orientation then, or only what programs write that do not know it: voxels along the
    axes from an origin of 0 on.
    """
    if volume.header["sform_code"] == 0 and volume.header["qform_code"] == 0:
        return False
    stored = volume.affine @ np.linalg.inv(inv_ornt_aff(volume.orientation, _stored_shape(volume)))
    turned = stored[:3, :3] - np.diag(np.diag(stored[:3, :3]))
    return bool(np.abs(turned).max() > 1e-4 or np.abs(stored[:3, 3]).max() > 1e-4)


def _stored_shape(volume):
    return tuple(volume.array.shape[int(axis)] for axis in volume.orientation[:, 0])


def on_its_voxels(volume, reference):
    """Trust the voxels where a header does not tell where they lie -> (Volume, note or None).

    If one of two volumes has no place (has_place) and both have as many voxels along each stored
    axis, the voxels correspond, and `volume` gets the place of the reference.
    """
    if same_grid(volume, reference) or _stored_shape(volume) != _stored_shape(reference):
        return volume, None
    if has_place(volume) and has_place(reference):
        return volume, None
    stored = apply_orientation(volume.array, ornt_transform(CANONICAL, volume.orientation))
    moved = replace(volume, array=apply_orientation(stored, reference.orientation),
                    affine=reference.affine, orientation=reference.orientation)
    return moved, (f"does not lie where {reference.path.name} does, but one of the two headers "
                   "tells no place; the shapes are equal, so the voxels correspond")


def read_labels(path, reference, grid, notes):
    """Read a segmentation -> its labels as float32 (X, Y, Z), on the grid of the slices.

    reference, grid: As in placed_on.
    notes: A list that gets (file, sentence) pairs.
    DataError if a label does not fit into 8 bits, as which labels are stored.
    """
    volume = read_volume(path)
    whole = np.rint(volume.array)
    # A scaled file may give 2.0001 for 2.
    if np.abs(whole - volume.array).max() > 1e-3 or whole.min() < 0 or whole.max() > 255:
        raise DataError(f"{path}: holds labels from {volume.array.min():g} to "
                        f"{volume.array.max():g}; labels are whole numbers from 0 to 255, renumber "
                        "them or move the file away")
    volume, note = on_its_voxels(replace(volume, array=whole), reference)
    notes += [(volume.path.name, note)] if note else []
    return resample_to(volume, grid, order=0, fill=0)


# ---- Two volumes ---------------------------------------------------------------------------------

def placed_on(reference, grid, volume, u, mask, anchor, average=False):
    """Bring one contrast onto the grid of the slices -> Placed.

    reference, grid: Volumes; the grid is that of the reference, with square pixels.
    volume: Its Volume. u, mask: (X, Y, Z), its intensities in [0, 1] and its foreground, on the
        grid of its file. anchor: What the notes call the reference.
    average: As in resample_to.
    DataError if the boxes of the two do not overlap.
    """
    shown, note = on_its_voxels(replace(volume, array=u), reference)
    found, _ = on_its_voxels(replace(volume, array=mask), reference)
    centre = apply_affine(found.affine, ndimage.center_of_mass(found.array))
    if same_grid(shown, grid):
        return Placed(shown.array, found.array, centre, [note] if note else [])
    u = resample_to(shown, grid, fill=0, average=average)
    found = replace(found, array=mask.astype(np.float32))
    mask = resample_to(found, grid, order=0, fill=0) > 0
    if same_grid(shown, reference):
        return Placed(u, mask, centre, [note] if note else [])
    return Placed(u, mask, centre, [f"is on another grid than {anchor}; resampled by the affines"])


def compare(first, second, subject, contrasts):
    """Compare the bodies in two contrasts of a subject -> sentences for the user.

    first, second: Placed, on one grid. contrasts: Their names.
    DataError if they have little in common, so that no slice would show the same place twice.
    """
    # What lies outside of the grid is not in the masks, so a part of a body fits the whole.
    smaller = min(np.count_nonzero(first.mask), np.count_nonzero(second.mask))
    common = np.count_nonzero(first.mask & second.mask) / max(1, smaller)
    if common < COMMON:
        apart = np.linalg.norm(first.centre - second.centre)
        raise DataError(f"subject {subject.name}, {contrasts[1]} ({subject.files[contrasts[1]]}): "
                        f"its body and that of {contrasts[0]} overlap by {100 * common:.0f} %, and "
                        f"their centres are {apart:.0f} mm apart; register the two, or copy the "
                        "affine of one to the other if their voxels correspond")
    notes = []
    if common < REGISTERED:
        notes.append(f"overlaps {contrasts[0]} less than registered scans do; is it registered?")
    straight = _information(first, second.u, second.mask)
    for axis, ends in enumerate(ENDS):
        if _fits_mirrored(first, second, axis, straight):
            notes.append(f"fits {contrasts[0]} better when mirrored; are {ends} swapped?")
            break
    return notes


def _fits_mirrored(first, second, axis, straight):
    """True if the second volume tells clearly more of the first when it is mirrored along an axis.

    The body is mirrored about its own middle, because the middle of the box may be elsewhere.
    straight: What it tells as it is, see _information.
    """
    u = np.flip(second.u, axis)
    mask = np.flip(second.mask, axis)
    others = tuple(other for other in range(3) if other != axis)
    places = np.arange(mask.shape[axis])
    middles = [np.average(places, weights=found.sum(others)) for found in (first.mask, mask)]
    shift = round(middles[0] - middles[1])
    swapped = _information(first, np.roll(u, shift, axis), np.roll(mask, shift, axis))
    return swapped > MIRRORED[0] * straight and swapped > straight + MIRRORED[1]


def _information(first, u, mask):
    """The mutual information of two volumes in nats, inside of both bodies; 0 for few voxels."""
    both = first.mask & mask
    if np.count_nonzero(both) < 4 * LEVELS**2:              # too few to tell
        return 0.0
    counts, _, _ = np.histogram2d(first.u[both], u[both], LEVELS, [[0, 1], [0, 1]])
    joint = counts / counts.sum()
    alone = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    some = joint > 0
    return float((joint[some] * np.log(joint[some] / alone[some])).sum())


# ---- Many subjects -------------------------------------------------------------------------------

def unequal_pixels(edges):
    """Say if the pixels of the subjects are of unequal size -> a list of one sentence, or of none.

    edges: {name: edge of a pixel in mm, or 0 if it is not known}.
    """
    known = {name: edge for name, edge in edges.items() if edge > 0}
    if not known or max(known.values()) < UNEQUAL * min(known.values()):
        return []
    small = min(known, key=known.get)
    large = max(known, key=known.get)
    return [f"the subjects have pixels of unequal size, from {known[small]:.2f} mm ({small}) to "
            f"{known[large]:.2f} mm ({large}); the same organ is larger in some than in others, so "
            "resample all to one pixel size"]


# ---- The grid of a PET that is not there ---------------------------------------------------------

class Picture(NamedTuple):
    """The pixels of a PET: how many there are along x and y, and their edges in mm.

    A script stores the Picture of its training data, so that a CT of another folder is shown to the
    network at the same size; see picture_of.
    """

    pixels: tuple                   # (X, Y)
    spacing: tuple                  # (3,) mm along x, y and z


def picture_of(path):
    """The Picture of a PET file; its header is read, and no voxel. DataError if that is damaged."""
    volume = read_geometry(path, series=True)
    return Picture(volume.array.shape[:2], tuple(float(edge) for edge in volume.spacing))


def grid_of_missing_pet(subject, contrasts, size, read, picture, notes):
    """The grid to use if a PET should be the reference but is not read -> Volume, or None.

    A network that makes PET from CT was trained on grids of PETs, with pixels of about 5 mm in a
    wide field of view. The CT must be shown to it at the same size.
    If the subject has a PET, which shall be made again, the grid of that PET is used: its shape and
    affine, and none of its voxels. Otherwise a grid with the pixels of another PET (`picture`, or
    that of Subject.like) is laid around the CT. It is as wide as the picture that `fit` makes of
    that PET. If there is no other PET either, the CT keeps its own grid, and a note says so.

    read: The contrasts that are read. notes: A list that gets (file, sentence) pairs.
    """
    if subject.grid != ("pet",) or "pet" not in contrasts or "pet" in read:
        return None
    if "pet" in subject.files:
        return read_geometry(subject.files["pet"], series=True)
    source = read_geometry(subject.files[read[0]])
    if picture is None and subject.like is not None:
        picture = picture_of(subject.like)
    if picture is None:
        edge = source.spacing[0]
        notes.append((source.path.name, f"has no PET beside it and keeps its own pixels of "
                      f"{edge:.2f} mm; a model that was trained on the grids of PETs saw others"))
        return None
    edges = " x ".join(f"{edge:.2f}" for edge in picture.spacing)
    notes.append((source.path.name, "has no PET beside it; it is resampled to voxels of "
                  f"{edges} mm, which are those of another PET"))
    side = max(size, *picture.pixels)
    return grid_around(source, (side, side), picture.spacing)
