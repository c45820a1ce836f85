"""All slices of one subject, on one grid: load_subject, and load_scans for any files."""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.files import DataError, is_nifti, is_picture
from data.intensities import (
    BRAIN_WINDOW,
    PET_DARK,
    PET_IMPOSSIBLE,
    UNITS,
    WINDOWS,
    brightest_of,
    denormalise,
    find_background,
    foreground,
    normalise,
)
from data.layouts import CONTRASTS, Subject
from data.layouts.words import BODY_CONTRASTS, TEXT, canonical_contrasts, preferred_grid
from data.picture_files import fit_picture, read_picture, write_picture
from data.placing import (
    compare,
    finest_first,
    grid_of_missing_pet,
    placed_on,
    read_labels,
    with_square_pixels,
)
from data.prompts import describe_lesion
from data.volumes import (
    Volume,
    fit,
    fit_slices,
    read_stacks,
    read_volume,
    resample_to,
    unfit,
    upright,
    write_volume,
)

# A slice is kept if its foreground is this share of the largest foreground; see kept_slices.
KEEP = 1 / 3
# In sets that show bodies, it is kept if its foreground is this share of the field of view.
KEEP_BODY = 0.02
CLIPPED = 0.01          # a larger share of the body above the window of CT or PET is said


@dataclass
class SubjectSlices:
    """All axial slices of one subject, on the grid of one contrast, which we call the reference.

    Z is the number of slices, C the number of contrasts, S the size of a slice in pixels. The
    reference is the one that the layout prefers (Subject.grid), or see placing.finest_first.
    A picture, such as an X-ray, has no grid in space. It is the same in all slices. A subject of
    pictures only has one slice for each view. The channel of a report ("text") is 0 everywhere.
    """

    images: np.ndarray              # (Z, C, S, S) in [0, 1]; float32, or float16 of .npy slices.
                                    # They are 0 where a contrast is missing.
    present: np.ndarray             # (C,) bool
    scales: dict                    # contrast -> Scale; pictures and reports have none
    kept: np.ndarray                # (Z,) bool; see kept_slices
    constant: int                   # number of slices that hold a single value in some contrast
    position: np.ndarray            # (Z,) from 0 at the lowest to 1 at the highest kept slice
    brain: np.ndarray               # (Z,) foreground of the reference as a share of the picture
    lesion: list | None             # (Z,) of str; None without a segmentation
    labels: np.ndarray | None       # (Z, S, S) uint8, the segmentation; None without one
    reference: Volume | None        # outputs are on its grid; None without a NIfTI file
    grid: Volume | None             # that of the slices: the reference's, with square pixels
    notes: list                     # (file, sentence) pairs
    pixel: float = 0.0              # edge of a pixel of a slice in mm; 0 if it is not known

    def write(self, path, slices, description, overwrite=False, contrast=None, window=None):
        """Write slices (Z, S, S) in [0, 1] of one contrast as NIfTI, on the grid of the source.

        A path that ends in .png gives grey pictures of S x S pixels in normalised units instead,
        see to_synthesize. The first slice gets this path, and the others get _2, _3 and so on.

        contrast: If it is given, the unit follows the description in the header. CT and CTA are
        written in HU and PET in SUV. A scan after an agent is written in the units of the scan
        before it, so that the two can be subtracted. Other MR stays normalised. Its own intensities
        are arbitrary, and where there was no scan nobody knows them.
        window: The Scale that slices of CT or PET have, if it is not the usual one; see
            Dataset.windows.
        DataError if there is no such contrast, if the slices are not those of one contrast, if the
        file exists and `overwrite` is False, or if it cannot be written.
        """
        path = Path(path)
        slices = np.asarray(slices)
        if contrast:
            contrast, = canonical_contrasts([contrast], CONTRASTS, CONTRASTS, "write")
        if slices.ndim != 3:
            raise DataError(f"write: slices are {slices.shape}; give one contrast, filled[:, 0]")
        if is_picture(path):
            for number, plane in enumerate(slices, 1):
                name = path.name if number == 1 else f"{path.stem}_{number}{path.suffix}"
                write_picture(path.with_name(name), plane, f"{description}, normalised", overwrite)
            return
        array = unfit(slices, self.grid.array.shape)
        unit = "normalised"
        if contrast in WINDOWS:
            outside = array == 0
            array = denormalise(array, window or WINDOWS[contrast])
            if window == BRAIN_WINDOW:
                array[outside] = 0                      # as the tools that strip leave it
            unit = UNITS[contrast]
        elif contrast in ("pre", "post") and "pre" in self.scales:
            array = denormalise(array, self.scales["pre"])
            unit = "units of the pre scan"
        array = resample_to(replace(self.grid, array=array), self.reference)
        if contrast:
            description = f"{description[:50]}, {unit}"         # the field in the header is short
        write_volume(path, array, self.reference, description, overwrite)


def load_subject(subject, contrasts, size, use=None, picture=None):
    """Read one subject -> SubjectSlices, with all volumes on the grid of the reference.

    Every contrast is normalised on its own grid first. Its scale therefore does not depend on the
    grid of the reference. Outside of its own box a contrast is 0, which is air in CT.
    A scan after an agent ("post") is normalised by the scale of the scan before it ("pre").
    Pictures are read by _add_pictures.
    subject: A layouts.Subject.
    contrasts: The names of the channels, in order.
    size: The height and width of a slice in pixels.
    use: The contrasts whose files are opened, by default all. The others count as missing, and
    cannot influence anything. There is one exception: of a PET that is not used, the header is
    read, because the grid of the PET is the reference; see placing.grid_of_missing_pet.
    picture: A Picture for a subject that has no PET, instead of that of Subject.like.
    DataError, naming subject and contrast, if a file cannot be used or none is there.
    """
    if subject.in_slices:
        return _load_slices(subject, contrasts, size, use)
    wanted = []
    for contrast in contrasts:
        if contrast in subject.files and (use is None or contrast in use):
            wanted.append(contrast)
    if not wanted:
        raise DataError(f"subject {subject.name}: has none of {', '.join(use or contrasts)}; "
                        "add a file")
    if reference_first(subject, wanted):
        slices = _load_volumes(subject, contrasts, size, wanted, picture)
    else:
        slices = _blank_slices(subject, contrasts, size, wanted)
    _add_pictures(slices, subject, contrasts, wanted)
    return slices


def _load_volumes(subject, contrasts, size, wanted, picture):
    """Read the volumes of one subject; the channels of pictures stay 0. See load_subject.

    wanted: The contrasts that are read, as in load_subject.
    """
    read = reference_first(subject, wanted)
    body = shows_body(contrasts)
    notes = []
    reference = grid_of_missing_pet(subject, contrasts, size, read, picture, notes)
    if reference is None:
        read, why = finest_first(subject, read)
        notes += [(subject.files[read[0]].name, why)] if why else []
    anchor = anchor_name(read, contrasts) if reference is None else "pet"
    grid = None if reference is None else with_square_pixels(reference, notes)
    images = None
    first = None                                        # of the contrasts that are read: Placed
    areas = []                                          # per contrast: (Z,) pixels of foreground
    scales = {}
    for contrast in read:
        volume, u, mask, scales[contrast] = _read_normalised(subject, contrast, scales)
        if reference is None:
            reference = volume
            grid = with_square_pixels(volume, notes)
        placed = placed_on(reference, grid, volume, u, mask, anchor, body)
        said = volume.notes + placed.notes
        if first is None:
            first = placed
            images = np.zeros((grid.array.shape[2], len(contrasts), size, size), np.float32)
        else:
            said += compare(first, placed, subject, (read[0], contrast))
        notes += [(volume.path.name, note) for note in said]
        images[:, contrasts.index(contrast)] = fit(placed.u, size)
        areas.append(placed.mask.sum((0, 1)))
    present = np.array([contrast in wanted for contrast in contrasts])
    flat = _flat_slices(images[:, [contrasts.index(contrast) for contrast in read]])
    width, height = grid.array.shape[:2]
    kept = kept_slices(np.stack(areas), width * height if body else None) & ~flat
    lesion = None
    labels = None
    if subject.segmentation:
        planes = upright(read_labels(subject.segmentation, reference, grid, notes))      # (Z, H, W)
        lesion = _lesions(planes, grid, first.mask)
        labels = fit_slices(planes, size, labels=True).astype(np.uint8)
    side = max(size, width, height)                     # source pixels that the picture covers
    pixel = float(grid.spacing[:2].mean()) * side / size
    return SubjectSlices(images, present, scales, kept, int(flat.sum()), _positions(kept),
                         areas[0] / side**2, lesion, labels, reference, grid, notes, pixel)


# ---- Pictures and reports ------------------------------------------------------------------------

def _blank_slices(subject, contrasts, size, wanted):
    """Slices that are all 0, for a subject without volumes: one for each view, but at least one.

    It is not known where in the body they lie, so their position is 0.5. All are kept.
    """
    views = max(1, *(len(subject.pictures(contrast)) for contrast in wanted))
    images = np.zeros((views, len(contrasts), size, size), np.float32)
    present = np.array([contrast in wanted for contrast in contrasts])
    return SubjectSlices(images, present, {}, np.ones(views, bool), 0, np.full(views, 0.5),
                         np.zeros(views), None, None, None, None, [])


def _add_pictures(slices, subject, contrasts, wanted):
    """Read the pictures of a subject into the images of its SubjectSlices.

    Without volumes, each view has a slice. Otherwise all slices show the first picture of a
    contrast. A picture is never resampled to the grid of a volume, because it is a projection, or
    its place in the body is not known.
    DataError if a picture cannot be read.
    """
    depth = len(slices.images)
    for contrast in wanted:
        paths = subject.pictures(contrast)
        if not paths:
            continue
        views = paths if slices.reference is None and len(paths) == depth else paths[:1]
        if len(views) < len(paths):
            slices.notes.append((paths[0].name, f"is used, the first of {len(paths)} pictures, "
                                 "because the subject has other images, too"))
        planes = []
        for path in views:
            picture = read_picture(path)
            slices.notes += [(path.name, note) for note in picture.notes]
            planes.append(fit_picture(picture.array, slices.images.shape[2]))
        channel = contrasts.index(contrast)
        slices.images[:, channel] = np.stack(planes)        # a single one goes into all slices
        if slices.reference is None:
            slices.brain = np.mean(slices.images[:, channel] > 0, (1, 2))


# ---- Any files -----------------------------------------------------------------------------------

def load_scans(files, contrasts, size, picture=None):
    """Read any files of one subject -> SubjectSlices, as load_subject gives.

    files: {contrast: path of a NIfTI file; an X-ray may be a PNG or JPEG picture}. A contrast of
    `contrasts` that is not in files is missing: its slices are 0, and `present` is False for it.
    contrasts: The names of the channels, in order. In both arguments other words for a contrast are
    understood, such as t1gd for t1ce. The channel "text" is blank.
    size: The height and width of a slice in pixels.
    picture: A Picture for a CT without PET, see load_subject.
    DataError if a name is no contrast or is named twice, if a file is of a contrast that is not in
    `contrasts`, if there is no file, or if a file cannot be used.
    """
    channels = canonical_contrasts(contrasts, (TEXT, *CONTRASTS), CONTRASTS, "load_scans")
    if not isinstance(files, dict):
        raise DataError("load_scans: files must be a dict, such as {'t1': 't1.nii.gz'}")
    paths = {}
    named = canonical_contrasts(files, CONTRASTS, CONTRASTS, "load_scans")
    for contrast, path in zip(named, files.values()):
        path = Path(path)
        if contrast not in channels:
            raise DataError(f"load_scans: {path} is {contrast}, which is not one of the contrasts "
                            f"{', '.join(channels)}; leave it out")
        if not path.is_file():
            raise DataError(f"load_scans: {contrast} {path} does not exist or is no file; "
                            "correct the path")
        if not is_nifti(path) and not (contrast == "xray" and is_picture(path)):
            raise DataError(f"load_scans: {contrast} {path} is neither .nii nor .nii.gz; "
                            "convert it to NIfTI, or an X-ray to .png")
        paths[contrast] = path
    if not paths:
        raise DataError(f"load_scans: no file is given; give one of {', '.join(channels)}")
    name = next(iter(paths.values())).parent.name
    subject = Subject(name, name, paths, grid=preferred_grid(channels))
    return load_subject(subject, channels, size, picture=picture)


# ---- One file ------------------------------------------------------------------------------------

def read_scan(subject, contrast):
    """Read the file of one contrast -> Volume, in HU, in SUV or in the units of its file.

    DataError if the file cannot be read, or if it is a PET whose voxels cannot be SUV.
    """
    volume = read_volume(subject.files[contrast], echo=subject.echoes.get(contrast),
                         contrast=contrast, frames=subject.frames.get(contrast),
                         channel=subject.channels.get(contrast))
    if contrast != "pet":
        return volume
    sheet = "give the factor from its unit to SUV in suv.csv"
    if subject.suv_factor is not None:
        volume.array = volume.array * np.float32(subject.suv_factor)
        volume.notes.append("is multiplied by its factor in suv.csv, which gives SUV")
        sheet = "correct its factor in suv.csv"
    high = brightest_of(volume.array)
    if high > PET_IMPOSSIBLE:
        raise DataError(f"subject {subject.name}, pet ({volume.path}) cannot be in SUV (one voxel "
                        f"in a thousand is above {high:.4g}); {sheet}")
    if high < PET_DARK:
        volume.notes.append(f"is dark for a PET, hardly a voxel is above {PET_DARK:g}; "
                            "is it in SUV?")
    return volume


def _read_normalised(subject, contrast, scales):
    """Read one contrast -> (Volume, u, mask, Scale), on its own grid; u and mask are (X, Y, Z).

    scales: {contrast: Scale} of what was read before.
    """
    require_pre(subject, contrast, scales)
    volume = read_scan(subject, contrast)
    background = find_background(volume.array)
    if not np.isfinite(background.reach) and contrast not in WINDOWS:
        volume.notes.append("has no air in view, it seems; all of it counts as foreground")
    try:
        u, scale = normalise(volume.array, background, contrast, scales.get("pre"))
    except DataError as error:
        raise DataError(f"subject {subject.name}, {contrast} ({volume.path}) {error}; "
                        "remove or replace it") from None
    mask = foreground(volume.array, background, contrast)
    beyond = np.mean(volume.array[mask] > scale.high) if contrast in WINDOWS and mask.any() else 0
    if beyond > CLIPPED:
        volume.notes.append(f"{100 * beyond:.1f} % of its body is above {scale.high:g} "
                            f"{UNITS[contrast]}, where the window ends")
    return volume, u, mask, scale


def require_pre(subject, contrast, scales):
    """DataError if `contrast` is post, and pre was not read before it. See normalise."""
    if contrast == "post" and "pre" not in scales:
        raise DataError(f"subject {subject.name}, post ({subject.files['post']}) cannot be scaled "
                        "alone, because its scale is that of the scan before the agent; "
                        "add pre to the files and to the contrasts")


def _load_slices(subject, contrasts, size, use):
    """Read a subject of .npy slices; all are kept that are not constant.

    It is not known where in the body they lie, so their position is 0.5.
    """
    if use is not None:
        raise DataError(f"{subject.name}: .npy slices have no place in space, so no volumes can be "
                        "written from them; synthesise from NIfTI files")
    count = len(subject.paths) // len(subject.files)
    images = np.zeros((count, len(contrasts), size, size), np.float16)
    for contrast, slices in read_stacks(subject):
        images[:, contrasts.index(contrast)] = fit_slices(slices, size)
    present = np.array([contrast in subject.files for contrast in contrasts])
    flat = _flat_slices(images[:, present])
    brain = (images[:, np.argmax(present)] > 0).mean((1, 2))
    position = np.full(count, 0.5)
    return SubjectSlices(images, present, {}, ~flat, int(flat.sum()), position, brain, None, None,
                         None, None, [])


def _flat_slices(images):
    """Which slices hold a single value in some contrast: (Z, C, S, S) -> bool (Z,)."""
    flat = images.min((2, 3)) == images.max((2, 3))             # (Z, C)
    return flat.any(1)


def reference_first(subject, contrasts):
    """Those of the contrasts that the subject has as volumes, in the order in which to read them.

    The first is the reference, onto whose grid all others are resampled. pre comes before post,
    which is scaled like it.
    """
    def rank(contrast):
        place = subject.grid.index(contrast) if contrast in subject.grid else len(subject.grid)
        return place, contrast == "post"

    volumes = []
    for contrast in contrasts:
        if contrast in subject.files and contrast != TEXT and not subject.pictures(contrast):
            volumes.append(contrast)
    return sorted(volumes, key=rank)


def anchor_name(read, contrasts):
    """What a note calls the reference, which is the first of `read`."""
    return "the first contrast" if read[0] == contrasts[0] else read[0]


def shows_body(contrasts):
    """True if slices are chosen by the rule for bodies, see kept_slices."""
    return not BODY_CONTRASTS.isdisjoint(contrasts)


def kept_slices(areas, field_of_view=None):
    """Which slices to use -> bool (Z,).

    areas: (C, Z), the number of foreground pixels of each contrast and slice.
    field_of_view: The number of pixels of a slice, if the rule for bodies is to be used.

    For brains, a slice is kept if in every contrast its foreground is at least a third of the
    largest foreground in that volume. On BraTS (240x240, 155 slices) this keeps about 100 slices.
    So does the rule "10 % of a 256x256 picture is brain". Our rule does not depend on the empty
    border of a scan, so phantoms, cropped scans and padded scans are treated alike.

    In a body that rule would leave out the neck, because the shoulders are much larger. There, a
    slice is kept if in every contrast its foreground is at least 2 % of the field of view.
    """
    if field_of_view is not None:
        return (areas >= KEEP_BODY * field_of_view).all(0)
    largest = areas.max(1, keepdims=True)
    enough = (areas >= KEEP * largest) & (largest > 0)
    return enough.all(0)


def _positions(kept):
    """The relative height of every slice in the kept range; 0.5 if one slice or none is kept."""
    numbers = np.flatnonzero(kept)
    if numbers.size < 2:
        return np.full(len(kept), 0.5)
    first = numbers[0]
    last = numbers[-1]
    return np.clip((np.arange(len(kept)) - first) / (last - first), 0, 1)


def _lesions(planes, reference, mask):
    """One description for each upright slice of labels (Z, H, W).

    The midline is the median column of the brain, seen from above. mask: (X, Y, Z), the brain.
    """
    shadow = upright(mask).any(1)                               # (Z, W)
    midline = np.median(np.nonzero(shadow)[1])
    pixel_area = np.linalg.norm(np.cross(reference.affine[:3, 0], reference.affine[:3, 1]))
    return [describe_lesion(plane, midline, pixel_area) for plane in planes]
