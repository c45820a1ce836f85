"""The intensities of a volume: what is background, and how all else is scaled to [0, 1] and back.

MR has arbitrary units, so every volume gets its own scale. CT is in Hounsfield units (HU), and PET
is in standardized uptake values (SUV), so all of their volumes share one fixed window. Two MR
volumes before and after a contrast agent share the scale of the first one.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from data.files import DataError

# The percentile of the foreground that becomes 1. A few bright vessels must not set the scale.
HIGH_PERCENTILE = 99.5


class Scale(NamedTuple):
    """The intensities that became 0 and 1: v = background + u * (high - background)."""

    background: float
    high: float


# HU, from air to dense bone. Voxels outside of a scan often hold -1024 or -3024, which is below.
CT_WINDOW = Scale(-1000.0, 1500.0)
# HU, from fluid to blood. For CT whose skull was stripped, where bone and air are gone.
BRAIN_WINDOW = Scale(-20.0, 100.0)
# HU. Half of the voxels of any brain are darker.
BRAIN = 80
# HU. If hardly a voxel is brighter, there is no bone in a CT.
NO_BONE = 200
# HU. The body is above. Air, lung and the foam of the table are far below.
CT_BODY = -500
# SUV. Above are the bladder and some tumours and parts of the brain; all of it becomes 1.
PET_WINDOW = Scale(0.0, 10.0)
# HU. Lower numbers stand where nothing was scanned. Scanners write NOT_SCANNED there.
PADDING = -1500
NOT_SCANNED = -3024.0
# What is added to HU so that no stored number is negative. A body has more than NO_HU then.
OFFSETS = (1000, 1024, 8192, 32768)
NO_HU = 600
# Of a body, a smaller share is air.
FULL_OF_AIR = 1 / 3
# SUV. The body is above; air is below. See _pet_body.
PET_BODY = 0.2
# SUV. In no patient is one voxel in a thousand brighter. Raw PET, in Bq/ml, is far brighter.
PET_IMPOSSIBLE = 200.0
# SUV. In nearly all patients one voxel in a thousand is brighter. PET in [0, 1] is darker.
PET_DARK = 1.0
# Contrasts in physical units: one window for all volumes, and the unit.
IN_HU = ("ct", "cta", "cbct")
WINDOWS = {"ct": CT_WINDOW, "cta": CT_WINDOW, "cbct": CT_WINDOW, "pet": PET_WINDOW}
UNITS = {"ct": "HU", "cta": "HU", "cbct": "HU", "pet": "SUV"}
# Shares that tell tissue from noisy air, see _is_tissue: of the range, of the sides, and of the
# middle compared with the sides.
TOO_WIDE = 0.6
AROUND = 0.75
IN_CORE = 0.4
# Before a contrast agent, tissue is scaled to 1 / ENHANCEMENT. This leaves room for what the agent
# adds.
ENHANCEMENT = 1.5


class Background(NamedTuple):
    """The background of a volume. Voxels within `reach` of `level` belong to it.

    `constant` is True if the background is one exact value, and False if it is noisy air. A volume
    without background has the level of its darkest voxels, and a reach of -inf.
    """

    level: float
    reach: float
    constant: bool


def find_background(array):
    """Find the background of a volume (X, Y, Z) -> Background, in the units of the volume.

    We look at the four faces on the sides only. At the top and the bottom, an axial stack often
    cuts through the head. Voxels that are NaN do not count.
    """
    border = _sides_of(array)
    border = border[np.isfinite(border)]
    # We take percentiles, because a few extreme voxels must not set the tolerance.
    low, high = np.nanpercentile(array[::2, ::2, ::2], [0.5, HIGH_PERCENTILE])
    tolerance = 1e-4 * float(high - low)
    level = np.median(border)
    # A value that fills more than half of the border is its median, whether it is 0, -3.2 or -1000.
    if np.mean(np.abs(border - level) <= tolerance) > 0.5:
        return Background(float(level), tolerance, True)
    # Otherwise the background is noisy air. We take the densest third of the dark border voxels.
    # Tissue that touches the border does not disturb this, because it is bright or spread out.
    dark = np.sort(border[border <= (low + high) / 2])
    if dark.size < 3:
        dark = np.sort(border)
    third = dark.size // 3
    widths = dark[third:] - dark[:-third]
    start = int(np.argmin(widths))
    densest = dark[start:start + third + 1]
    # A third of Rayleigh noise lies in a range 0.56 sigma wide around its mode. Less than 1e-5 of
    # the noise lies more than 8 such widths above it.
    reach = max(8 * float(widths[start]), tolerance)
    level = float(np.median(densest))
    if _is_tissue(array, level, reach, high - low):
        return Background(float(low), -np.inf, False)
    return Background(level, reach, False)


def _sides_of(array):
    """The voxels of a volume (X, Y, Z) on its four sides -> (n,)."""
    sides = [array[0], array[-1], array[:, 0], array[:, -1]]
    return np.concatenate([side.ravel() for side in sides])


def _is_tissue(array, level, reach, width):
    """True if what looks like noisy air is tissue, because the picture was cut inside of the body.

    Air is even, and it lies around the body. Something that spreads over most of the range of the
    volume is therefore no air. Neither is something that comes in from the sides, does not cover
    them, and is about as frequent in the middle. Lungs are dark, too, but they do not come in from
    the sides.
    width: The range of the volume, without its extreme voxels.
    """
    if reach > TOO_WIDE * width:
        return True
    outside = reaching_border(array[::2, ::2, ::2] <= level + reach, axes=(0, 1))
    core = outside[tuple(slice(n // 4, n - n // 4) for n in outside.shape)]
    at_sides = np.mean(_sides_of(outside))
    return bool(at_sides < AROUND and np.mean(core) > IN_CORE * at_sides)


def reaching_border(mask, axes):
    """The pieces of a mask (X, Y, Z) that touch its sides along some axes -> bool, of its shape."""
    pieces, _ = ndimage.label(mask)
    touching = [np.zeros(0, int)]
    for axis in axes:
        touching.append(pieces.take([0, -1], axis).ravel())
    found = np.unique(np.concatenate(touching))
    return np.isin(pieces, found[found > 0])


def background_value(array, contrast=None):
    """The level of the background of a volume (X, Y, Z), in the units of the volume.

    If most of the border is NaN, there is no value outside of the body. It is then NOT_SCANNED in
    CT, and 0 in all else.
    """
    if np.mean(np.isnan(_sides_of(array))) > 0.5:
        return NOT_SCANNED if contrast in IN_HU else 0.0
    return find_background(array).level


def to_hounsfield(array):
    """Undo what was done to the HU of a CT (X, Y, Z) -> (array in HU, a sentence or None).

    Air around the body has -1000 HU. Stored numbers without the intercept of the scanner have air
    near 0 and the body near 1000, and so have files for programs without negative numbers.
    DataError if the numbers are those of a picture, because that cannot be undone.
    """
    if array.min() == array.max():
        return array, None
    if array.min() >= 0 and array.max() > 57343 and not np.any((array > 8192) & (array < 57344)):
        array = np.where(array > 8192, array - 65536, array).astype(np.float32)
        return array, "holds negative HU as numbers below 65536; 65536 is subtracted from them"
    scanned = array[array > PADDING]
    low, high = np.percentile(scanned, [0.1, 99.9]) if scanned.size else (PADDING, 0)
    grey = array.min() == 0 and array.max() <= 255 and np.median(array[array > 0]) > BRAIN
    if high - low < 10 or grey:
        raise DataError(f"holds numbers from {array.min():g} to {array.max():g}, like a picture, "
                        "which are no HU; export the CT again")
    if is_stripped(array):
        return array, ("holds neither bone nor air; the skull was removed, it seems, and "
                       f"{BRAIN_WINDOW.background:g} to {BRAIN_WINDOW.high:g} HU become 0 to 1")
    if _is_zero_outside(array, low):
        outside = reaching_border(array == 0, axes=(0, 1))
        array = np.where(outside, np.float32(NOT_SCANNED), array)
        return array, "is 0 around the body, which would be water; it counts as not scanned there"
    if low <= CT_BODY:
        return array, None
    darkest = scanned[scanned < low + 100]
    rest = scanned[scanned >= low + 100]
    if rest.size == 0 or np.median(rest) < NO_HU:
        return array, f"holds no air, its lowest value is {array.min():g}; is it in HU?"
    # Where nothing was scanned, the number is often smaller than that of air.
    above = darkest[darkest > low]
    air = float(np.median(above if above.size > darkest.size / 4 else darkest))
    # Between NO_HU and the usual offsets lies tissue, so there is no air in view.
    offset = float(np.median(scanned)) if NO_HU < air < 2 * NO_HU else air + 1000
    nearest = min(OFFSETS, key=lambda usual: abs(usual - offset))
    if abs(nearest - offset) <= 12 or air > NO_HU:
        offset = nearest
    return array - np.float32(offset), (f"seems to hold HU + {offset:.0f}, its darkest part is at "
                                        f"{air:.0f}; {offset:.0f} is subtracted")


def _is_zero_outside(array, low):
    """True if the outside of a CT (X, Y, Z) in HU was set to 0, as a multiplication by a mask does.

    In stored numbers, in which 0 is air, nothing is below 0, and the skull is not full of air.
    low: The lowest intensity, without the extreme ones.
    """
    background = find_background(array)
    if not background.constant or background.level != 0:
        return False
    if low <= CT_BODY:
        return True
    head = array >= low + 100
    for z in range(head.shape[2]):
        head[:, :, z] = ndimage.binary_fill_holes(head[:, :, z])
    return bool(head.any() and np.mean(array[head] < low + 100) > FULL_OF_AIR)


def foreground(array, background=None, contrast=None):
    """The voxels of a volume (X, Y, Z) that are not background -> bool (X, Y, Z).

    The background need not be 0, and tissue need not be positive.

    background: What find_background returns; it is found here if it is not given.
    contrast: For those of IN_HU the array is in HU. The foreground is then the body, which is the
        largest connected piece above CT_BODY. The table is another, smaller piece. If the skull was
        stripped, the foreground is all that is not background, as in MR. For "pet" the
        array is in SUV, and the foreground is the body in the same way; see _pet_body.
    """
    if contrast in IN_HU and not is_stripped(array):
        return _largest_piece(array > CT_BODY)
    if contrast == "pet":
        return _pet_body(array)
    background = background or find_background(array)
    distance = array - background.level
    if background.constant:
        # Tissue may be darker than an exact value, for example z-scores around a background of 0.
        # In noisy air, darker voxels are only noise.
        distance = np.abs(distance)
    return distance > background.reach


def is_stripped(array):
    """True for a CT (X, Y, Z) in HU whose skull was stripped, so that it holds neither bone nor air.

    The tools that strip leave exactly 0 HU around the brain. A brain has no fat, and it has matter
    of more than 20 HU. An image in [0, 1] and soft tissue of a body are therefore not taken for it.
    """
    background = find_background(array)
    low, high = np.percentile(array, [0.1, 99.9])
    zero_outside = background.constant and abs(background.level) < 0.5
    return bool(zero_outside and low > -50 and 20 < high < NO_BONE)


def _largest_piece(mask):
    """The largest connected piece of a mask (X, Y, Z) -> bool (X, Y, Z)."""
    pieces, count = ndimage.label(mask)
    if count == 0:
        return pieces > 0
    sizes = np.bincount(pieces.ravel())[1:]
    return pieces == 1 + np.argmax(sizes)


def _pet_body(array):
    """The body in a PET (X, Y, Z) in SUV -> bool (X, Y, Z).

    We take the largest connected piece above PET_BODY. The noise in air is made of small pieces.
    Cold parts of the body (lung, fat, bone) have holes, which are filled in every axial slice.
    """
    body = _largest_piece(array > PET_BODY)
    for z in range(body.shape[2]):
        body[:, :, z] = ndimage.binary_fill_holes(body[:, :, z])
    return body


def brightest_of(array):
    """The 99.9th percentile of a PET (X, Y, Z), by which its unit is judged.

    Single hot voxels, as in the bladder, do not count.
    """
    return float(np.percentile(array, 99.9))


def normalise(array, background=None, contrast=None, pre=None):
    """Scale the intensities of a volume (X, Y, Z) -> (u float32 (X, Y, Z) in [0, 1], Scale).

    CT and CTA (contrasts "ct" and "cta", in HU) are scaled by CT_WINDOW. If the skull was stripped
    (is_stripped), it is BRAIN_WINDOW, and the background is 0. PET ("pet", in SUV) is scaled by
    PET_WINDOW. All else is MR and has arbitrary units:

    u = clip((v - background) / (p99.5 of the foreground - background), 0, 1)

    One scale serves the whole volume. If v is multiplied by a positive number, or a number is added
    to it, u does not change. If the background is one constant value, u is exactly 0 outside of the
    foreground. If more than 2 % of the foreground is darker than the background, as in z-scores
    around 0, the scale starts at the 0.5th percentile of the foreground.

    For "pre", MR before an agent, p99.5 - background is multiplied by ENHANCEMENT. "post" is scaled
    by the Scale of "pre". The difference of both is then the enhancement. A scale that used voxels
    of "post" would tell a network something of the target, because it changes the source image.

    pre: For the contrast "post", the Scale of the volume "pre" of the same subject.
    DataError if the volume is constant, or if nothing stands out from its background.
    ValueError for "post" without `pre`.
    """
    if array.min() == array.max():
        raise DataError(f"is constant (every voxel is {array.min():g})")
    if contrast in IN_HU and array.max() <= CT_BODY:
        raise DataError(f"has an empty foreground (nothing is above {CT_BODY} HU)")
    if contrast == "pet" and array.max() <= PET_BODY:
        raise DataError(f"has an empty foreground (nothing is above SUV {PET_BODY})")
    if contrast in IN_HU and is_stripped(array):
        u = _clipped(array, BRAIN_WINDOW)
        u[~foreground(array, background)] = 0
        return u, BRAIN_WINDOW
    if contrast in WINDOWS:
        return _clipped(array, WINDOWS[contrast]), WINDOWS[contrast]
    if contrast == "post":
        if pre is None:
            raise ValueError("normalise: post is scaled by the scale of pre, which is not given")
        return _clipped(array, pre), pre
    background = background or find_background(array)
    mask = foreground(array, background)
    if not mask.any():
        raise DataError("has an empty foreground (no voxel stands out from the background "
                        f"{background.level:g})")
    inside = array[mask]
    low = background.level
    if np.mean(inside < low) > 0.02:
        low = float(np.percentile(inside, 100 - HIGH_PERCENTILE))
    high = float(np.percentile(inside, HIGH_PERCENTILE))
    if not high > low:
        raise DataError(f"has no foreground brighter than its background {low:g}")
    if contrast == "pre":
        high = low + ENHANCEMENT * (high - low)
    u = _clipped(array, Scale(low, high))
    if background.constant:
        u[~mask] = 0
    return u, Scale(low, high)


def _clipped(array, scale):
    """(v - background) / (high - background), clipped to [0, 1], as float32."""
    low = np.float32(scale.background)
    width = np.float32(scale.high - scale.background)
    return np.clip((array - low) / width, 0, 1).astype(np.float32)


def denormalise(u, scale):
    """Turn u in [0, 1], of any shape, back to the intensities of the source, as float32.

    scale: The Scale that normalise returned. What normalise clipped stays at the limits.
    """
    return (scale.background + u * (scale.high - scale.background)).astype(np.float32)
