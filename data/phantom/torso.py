"""The set cxr: torsos in X-ray, CT and T2-weighted MR, with reports.

A torso is a list of parts, such as a lung or a rib. Each part is known by its *span*: for a place x
across the body and a height z, it says where along y, from back to front, the part begins and ends.
Every view follows from the spans in closed form. An axial slice asks which part holds a point. A
frontal X-ray adds up how much of every tissue a ray meets on its way along y. Where parts overlap,
the later one in the list counts.

World coordinates are mm, and 0 is the carina: x points to the patient's right, y to the front, z to
the top.
"""

import json
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.files import DataError
from data.phantom.anatomy import Anatomy, mixture
from data.phantom.files import write_nifti, write_sheet
from data.phantom.geometry import Grid, rng_for, smooth_field
from data.phantom.physics import (
    CODE,
    TISSUES,
    Protocol,
    acquire,
    acquire_ct,
    render,
    render_ct,
)
from data.phantom.reports import compose

# Who has what: the views of each set, and whether it has reports. Its place in this list is part of
# a subject's number.
VIEWS_OF = {"xray": ("xray", "mask"), "ct": ("ct",), "mr": ("ct", "t2"),
            "all": ("xray", "mask", "ct", "t2")}
WITHOUT_REPORT = ("mr",)

FIELD = 360.0           # mm along a side of every picture
MIDDLE = -40.0          # mm, the height in the middle of the X-ray
USUAL_LEVEL = -66.0     # mm, the height of the slice where there is no lesion
THICKNESS = 5.0         # mm, of the slice
REACH = 260.0           # mm; see smooth_field
POINTS = 2              # along a side of a pixel of the slice; 2 give 5 levels of partial volume
AXIS = -8.0             # mm, y of the middle of the body

# Outlines by height: z, then half the width and half the depth, in mm. The first is all that lies
# under the fat of the skin. The second is the inside of the rib cage.
WALL = ((-260, -120, -40, 20, 60, 92, 116, 130, 150),
        (136, 136, 137, 141, 150, 152, 104, 70, 54),
        (100, 100, 99, 98, 94, 86, 72, 62, 56))
CAVITY = ((-260, -120, -60, 0, 45, 80, 100, 108, 109),
          (126, 128, 126, 114, 94, 66, 40, 14, 0.1),
          (86, 88, 88, 80, 68, 52, 36, 14, 0.1))
CAGE = 9.0              # mm, how thick the cage is; a rib fills it
RIB = 6.5               # mm, half the height of a rib
RIB_STEP = 27.0         # mm from rib to rib
VERTEBRA = 25.0         # mm from disc to disc
DISC = 6.0              # mm

NORMAL_HEART = (0.42, 0.48)     # the width of the heart relative to that of the chest
LARGE_HEART = (0.58, 0.66)
RADII = {"small": (11.0, 14.0), "large": (20.0, 25.0)}      # mm, of a lesion
DEEPER = 1.5            # a lesion is longer from back to front, so that the X-ray shows it better
HEIGHTS = {"upper": (12.0, 46.0), "lower": (-84.0, -52.0)}  # mm, z of its centre

TORSO = ("muscle", "fat", "bone", "marrow", "cartilage", "gas", "lung", "vein", "artery",
         "myocardium", "left heart", "right heart", "liver", "csf", "wm", "tumour")
PROTOCOL = Protocol("se", tr=4200, te=85, field=1.5)
MR_NOISE = 0.04         # see acquire
SHADING = 0.10          # strength of the coil shading
CT_NOISE = 14.0         # HU
# X-rays of about 70 keV lose 1.9 % in each mm of water (NIST, XCOM).
WATER = 0.0193          # 1/mm
PHOTONS = 40_000        # that reach a pixel where there is nothing in their way
BLACK = 0.7             # the sum of attenuation x length that is 0 in the file,
WHITE = 5.0             # and the one that is TOP
TOP = 4095              # 12 bits


# ---- The subject ---------------------------------------------------------------------------------

def torso_subject(seed, number):
    """Draw the traits of a subject, as plain values for JSON.

    lesion     its side ("left" or "right" of the patient), zone ("upper" or "lower") and size
               ("small" or "large"), its centre x, y, z and its radius in mm before the body gets
               its size and shift; None for half of all
    effusion   the side of a pleural effusion, or None for two thirds
    heart      "normal" or "enlarged"
    ratio      the width of the heart relative to that of the chest
    amount     of the effusion, relative
    width, depth, height     the body, relative
    shift      mm (x, y, z) from the middle of the scanner
    fat        mm under the skin
    breath     mm, how far the diaphragm is above its usual place
    turn       degrees, by which the vessels of the lung are turned
    density    of the mineral in bone, relative
    """
    rng = rng_for(seed, number, "traits")
    has_lesion = rng.random() < 0.5
    has_effusion = rng.random() < 1 / 3
    is_large = rng.random() < 1 / 3
    effusion = str(rng.choice(("left", "right")))
    traits = {"effusion": effusion if has_effusion else None,
              "heart": "enlarged" if is_large else "normal"}
    drawn = {"ratio": rng.uniform(*(LARGE_HEART if is_large else NORMAL_HEART)),
             "amount": rng.uniform(0.85, 1.25),
             "width": np.clip(rng.normal(1, 0.035), 0.92, 1.05),
             "depth": np.clip(rng.normal(1, 0.06), 0.88, 1.12),
             "height": np.clip(rng.normal(1, 0.04), 0.92, 1.08),
             "fat": np.clip(9 * np.exp(rng.normal(0, 0.4)), 4, 18),
             "breath": rng.uniform(-12, 10),
             "turn": rng.uniform(-14, 14),
             "density": np.exp(rng.normal(0, 0.12))}
    for name, value in drawn.items():
        traits[name] = round(float(value), 4)
    traits["shift"] = np.round(rng.uniform(-8, 8, 3), 2).tolist()
    lesion = draw_lesion(rng)
    traits["lesion"] = lesion if has_lesion else None
    return traits


def draw_lesion(rng):
    """Draw a lesion in a lung, beside the great vessels -> dict; see torso_subject."""
    side = str(rng.choice(("left", "right")))
    zone = str(rng.choice(("upper", "lower")))
    size = str(rng.choice(("small", "large")))
    radius = rng.uniform(*RADII[size])
    z = rng.uniform(*HEIGHTS[zone])
    y = rng.uniform(-24, 8) if zone == "upper" else rng.uniform(-26, 2)
    outside = np.interp(z, CAVITY[0], CAVITY[1]) - 4 - radius
    inside = (36 if zone == "upper" else 50) + 0.6 * radius
    x = rng.uniform(inside, outside)
    x = x if side == "right" else -x
    place = {"x": x, "y": y, "z": z, "radius": radius}
    return {"side": side, "zone": zone, "size": size,
            **{name: round(float(value), 2) for name, value in place.items()}}


# ---- Spans ---------------------------------------------------------------------------------------

@dataclass
class Part:
    """One part of a body, for many rays along y at once."""

    tissue: str             # of TISSUES
    start: np.ndarray       # mm, y where each ray enters the part
    end: np.ndarray         # mm, y where it leaves. A ray with end <= start misses the part
    share: np.ndarray | float = 1.0     # how much of the part is this tissue, for each ray
    rest: str = "muscle"    # the tissue of what is left


def ball(x, z, centre, radii, tilt=0.0, power=2.0):
    """The span of |u|^power + |v|^power + |w|^power < 1, an ellipsoid if the power is 2.

    x, z: Arrays in mm.
    centre: (x, y, z) in mm.
    radii: mm along u, v and w.
    tilt: Degrees from x towards z, by which u and w are turned. v is always along y.
    """
    cosine = math.cos(math.radians(tilt))
    sine = math.sin(math.radians(tilt))
    across = x - float(centre[0])
    up = z - float(centre[2])
    u = (cosine * across + sine * up) / radii[0]
    w = (cosine * up - sine * across) / radii[2]
    rest = np.maximum(1 - np.abs(u) ** power - np.abs(w) ** power, 0)
    half = radii[1] * rest ** (1 / power)
    return centre[1] - half, centre[1] + half


def column(x, z, centre, wide, deep, power=2.0):
    """The span of an upright column, whose cross section is |u|^power + |v|^power < 1.

    centre: (x, y) in mm.
    wide, deep: mm, half the width and half the depth. They may be arrays that depend on z.
    """
    rest = np.maximum(1 - (np.abs(x - centre[0]) / wide) ** power, 0)
    half = (deep * rest ** (1 / power)) + np.zeros_like(z)
    return centre[1] - half, centre[1] + half


def interpolate(z, heights, values):
    """np.interp in float32, in which the powers and roots of this page are twice as fast."""
    return np.interp(z, heights, values).astype(np.float32)


def outline(x, z, table, thicker=0.0, power=2.4):
    """The span of WALL or CAVITY, made thicker by so many mm on all sides."""
    heights, wide, deep = table
    return column(x, z, (0, AXIS), interpolate(z, heights, wide) + thicker,
                  interpolate(z, heights, deep) + thicker, power)


def within(span, outer):
    """What of a span lies in another one."""
    start = np.maximum(span[0], outer[0])
    return start, np.maximum(start, np.minimum(span[1], outer[1]))


def rib_shares(x, z, wide):
    """How much of the cage is rib, for the back half and for the front half of each ray.

    A rib falls from the spine to the side by 45 mm, and from there to the front by 60 mm more.

    wide: mm, half the width of the cage.
    """
    lateral = np.abs(x)
    out = np.arcsin(np.minimum(lateral / wide, 1)) / (np.pi / 2)    # 0 in the middle, 1 at the side
    shares = []
    for fallen in (45 * out, 45 + 60 * (1 - out)):
        beside = np.mod(z + fallen + RIB_STEP / 2, RIB_STEP) - RIB_STEP / 2
        # The edge is soft, so that pixels of 6 mm show ribs of 13 mm without false patterns. Nearly
        # half of a rib is as soft as muscle.
        shares.append(np.clip((RIB - np.abs(beside)) / 3 + 0.5, 0, 0.55))
    back, front = shares
    # In front, near the sternum, the cage is cartilage. It looks like muscle.
    return back, front * np.clip((lateral - 40) / 8, 0, 1)


def torso_parts(traits, x, z):
    """The parts of a body without warp and in its usual size -> list of Part, in painting order.

    x, z: Arrays (R,) in mm, the places of the rays.
    """
    body = outline(x, z, WALL, traits["fat"])
    wall = outline(x, z, WALL)
    cage = outline(x, z, CAVITY, CAGE)
    cavity = outline(x, z, CAVITY)
    middle = np.full_like(x, AXIS)
    wide = interpolate(z, CAVITY[0], CAVITY[1]) + CAGE
    back, front = rib_shares(x, z, wide)
    parts = [Part("fat", *body), Part("muscle", *wall),
             Part("bone", *within((cage[0], middle), wall), back),
             Part("bone", *within((middle, cage[1]), wall), front),
             Part("fat", *cavity)]
    sternum = np.where((np.abs(x) < 16) & (z > -100) & (z < 45), cage[1] - CAGE, cage[1])
    parts.append(Part("bone", sternum, cage[1]))
    parts += chest_parts(traits, x, z, cavity)
    parts += spine_parts(x, z)
    for side in (1, -1):
        parts.append(Part("bone", *within(ball(x, z, (side * 80, 52, 90), (74, 6, 6), side * 10),
                                          wall)))
    lesion = traits["lesion"]
    if lesion:
        centre = [lesion[axis] for axis in "xyz"]
        radius = lesion["radius"]
        parts.append(Part("tumour", *ball(x, z, centre, (radius, DEEPER * radius, radius))))
    return parts


def chest_parts(traits, x, z, cavity):
    """The parts inside of the rib cage, see torso_parts. cavity: The span of its inside."""
    lungs = {}
    for name, side in (("right", 1), ("left", -1)):
        lung = ball(x, z, (side * 72, -6, -30), (58, 88, 136), power=2.6)
        lungs[name] = within(lung, (cavity[0] + 1.5, cavity[1] - 1.5))
    parts = [Part("lung", *lung) for lung in lungs.values()]
    if traits["effusion"]:
        # The fluid is deep at the bottom and thin at the top, and it climbs along the side.
        lung = lungs[traits["effusion"]]
        deep = interpolate(z, (-150, -112, -66, 0, 60), (260, 92, 24, 17, 12))
        deep = traits["amount"] * (deep + 0.2 * np.maximum(np.abs(x) - 70, 0))
        parts.append(Part("csf", *within((lung[0], lung[0] + deep), lung)))
    for side in (1, -1):
        for angle, length in ((62, 44), (8, 34), (-34, 46), (-68, 52)):
            tilt = angle + traits["turn"]
            run = math.radians(tilt)
            centre = (side * (24 + length * math.cos(run)), -14, -12 + length * math.sin(run))
            parts.append(Part("artery", *ball(x, z, centre, (length, 6, 5), side * tilt)))

    size = traits["ratio"] * 2 * 126        # mm, the width of the heart
    spread = (size / 113) ** 0.7            # of the great vessels; a large heart has wide ones
    vessels = (((13 * spread, 20, 4), (16 * spread, 16, 46)),       # ascending aorta
               ((-22 * spread, 26, -8), (16 * spread, 15, 36)),     # trunk of the lung arteries
               ((27 * spread, 10, 24), (9 * spread, 9, 72)),        # superior vena cava
               ((-18, -16, 32), (16 * spread, 40, 14)))             # arch of the aorta
    for centre, radii in vessels:
        parts.append(Part("vein", *within(ball(x, z, centre, radii), cavity)))
    parts.append(Part("vein", *column(x, np.minimum(z, 30), (-27, -48), 12.5,
                                      np.where(z < 30, np.float32(12.5), 0))))    # descending aorta
    # The heart points to the left, to the front and down. A third of it lies on the right.
    centre = (-0.16 * size, 20, -72)
    sac = ball(x, z, centre, (0.54 * size, 0.40 * size, 0.42 * size), 24)
    parts.append(Part("myocardium", *within(sac, cavity)))
    right = ball(x, z, (centre[0] + 0.17 * size, 20 + 0.13 * size, -72),
                 (0.26 * size, 0.16 * size, 0.26 * size), 24)
    left = ball(x, z, (centre[0] - 0.16 * size, 20 - 0.06 * size, -74),
                (0.22 * size, 0.19 * size, 0.24 * size), 24)
    parts += [Part("right heart", *within(right, cavity)), Part("left heart", *left)]
    parts.append(Part("gas", *ball(x, z, (0, -24, 75), (8.5, 8.5, 80))))            # trachea
    for side in (1, -1):
        parts.append(Part("gas", *ball(x, z, (side * 22, -28, -16), (28, 6, 6), side * -38)))

    up = traits["breath"]
    domes = (("liver", (60, 0, -172 + up), (78, 92, 74)),
             ("liver", (-70, -4, -176 + up), (66, 88, 66)),         # spleen and stomach
             ("gas", (-66, 14, -138 + up), (30, 30, 15)))
    for tissue, centre, radii in domes:
        parts.append(Part(tissue, *within(ball(x, z, centre, radii), cavity)))
    return parts


def spine_parts(x, z):
    """The spine with its canal, see torso_parts."""
    height = np.abs(np.mod(z, VERTEBRA) - VERTEBRA / 2)     # mm from the middle of a vertebra
    vertebra = np.clip((VERTEBRA - DISC) / 2 - height + 0.5, 0, 1)
    process = np.clip(5.5 - height, 0, 1)
    return [Part("bone", *column(x, z, (0, -62), 19, 15, 2.4), vertebra, "cartilage"),
            Part("marrow", *column(x, z, (0, -62), 16, 12, 2.4), vertebra, "cartilage"),
            Part("bone", *column(x, z, (0, -90), 36, 5, 3), process),
            Part("bone", *column(x, z, (0, -84), 17, 13)),
            Part("bone", *column(x, z, (0, -98), 5, 9, 4), vertebra),
            Part("csf", *column(x, z, (0, -83), 11, 8.5)),
            Part("wm", *column(x, z, (0, -83), 6, 4.5))]


def world_parts(seed, number, traits, x, z):
    """The parts of a subject in the world -> list of Part. The subject has its size and its warp.

    x, z: 1-D arrays in mm, the axes of a plane of rays. Ray k * len(z) + m is at x[k], z[m].
    """
    axes = (x, np.zeros(1), z)
    rng = rng_for(seed, number, "warp")
    warps = []
    for strength in (3.5, 3.0, 3.5):        # mm along x, y and z
        warps.append(strength * smooth_field(rng, 55, axes, REACH)[:, 0])
    scales = (traits["width"], traits["depth"], traits["height"])
    shift = traits["shift"]
    across = (x[:, None].astype(np.float32) - shift[0]) / scales[0] + warps[0]
    up = (z[None, :].astype(np.float32) - shift[2]) / scales[2] + warps[2]
    offset = warps[1].ravel()
    parts = torso_parts(traits, across.ravel(), up.ravel())
    for part in parts:
        part.start = shift[1] + scales[1] * (part.start + offset)
        part.end = shift[1] + scales[1] * (part.end + offset)
    return parts


# ---- Views ---------------------------------------------------------------------------------------

def attenuation_sum(parts, mu):
    """The integral along y of the attenuation that each of R rays meets -> (R,), without unit.

    A ray is cut where a part begins or ends. In each piece, the last part that holds it counts.

    parts: A list of Part.
    mu: {tissue: attenuation in 1/mm}. Outside of all parts it is 0.
    """
    starts = np.stack([part.start for part in parts], axis=1)               # (R, parts)
    ends = np.stack([part.end for part in parts], axis=1)
    values = np.zeros((len(starts), len(parts) + 1), np.float32)
    for k, part in enumerate(parts):
        values[:, k + 1] = part.share * mu[part.tissue] + (1 - part.share) * mu[part.rest]
    hits = ends > starts
    many = hits.sum(axis=1)
    total = np.zeros(len(starts))
    # Most rays hit few parts. Rays that hit about as many are done together, which is three times
    # as fast as all rays at once.
    order = np.argsort(many, kind="stable")
    for rays in np.array_split(order[many[order] > 0], 4):
        if len(rays) == 0:
            continue
        hit = hits[rays]
        start = starts[rays]
        end = ends[rays]
        both = np.concatenate([np.where(hit, start, np.inf), np.where(hit, end, np.inf)], axis=1)
        cuts = np.sort(both, axis=1)[:, :2 * many[rays[-1]]]
        # A ray with fewer cuts than the others has empty pieces at its end.
        cuts = np.minimum(cuts, end.max(axis=1, where=hit, initial=-np.inf)[:, None])
        middles = (cuts[:, 1:] + cuts[:, :-1]) / 2
        found = np.zeros(middles.shape, np.uint8)           # (rays, pieces), 0 outside of all parts
        for k in np.flatnonzero(hit.any(axis=0)):
            here = np.flatnonzero(hit[:, k])
            middle = middles[here]
            inside = (middle > start[here, k, None]) & (middle < end[here, k, None])
            found[here] = np.where(inside, np.uint8(k + 1), found[here])
        seen = np.take_along_axis(values[rays], found.astype(int), axis=1)
        total[rays] = (seen * np.diff(cuts, axis=1)).sum(axis=1, dtype=float)
    return total


def pixel_centres(size):
    """mm from the middle of a picture to the centres of its pixels, in falling order."""
    return FIELD * (0.5 - (np.arange(size) + 0.5) / size)


def xray_parts(seed, number, traits, size):
    """The parts of a subject as the rays of an X-ray of size x size pixels meet them; see Part."""
    centres = pixel_centres(size)
    return world_parts(seed, number, traits, centres, MIDDLE + centres)


def as_picture(rays, size):
    """Values of the rays of xray_parts (size * size,) -> (rows, columns).

    Row 0 is the top, and column 0 is the patient's right.
    """
    return rays.reshape(size, size).T


def attenuations(traits):
    """How much of an X-ray each tissue of a subject takes away -> {tissue: 1/mm}."""
    mu = {}
    for name in TORSO:
        mineral = traits["density"] if name in ("bone", "marrow") else 1.0
        mu[name] = WATER * (1 + TISSUES[name].hu * mineral / 1000)
    return mu


def render_xray(seed, number, traits, size, parts):
    """The X-ray: (rows, columns) uint16 of 12 bits. More attenuation is brighter.

    parts: Those of xray_parts.
    """
    total = as_picture(attenuation_sum(parts, attenuations(traits)), size)
    rng = rng_for(seed, number, "xray")
    # Tissues are not quite uniform, and the exposure differs from picture to picture.
    axes = (pixel_centres(size), np.zeros(1), pixel_centres(size))
    grain = smooth_field(rng, 18, axes, FIELD / 2)[:, 0].T
    exposure = PHOTONS * np.exp(rng.normal(0, 0.15))
    counted = rng.poisson(exposure * np.exp(-total * (1 + 0.02 * grain)))
    seen = np.log(PHOTONS / np.maximum(counted, 1))
    shown = (seen - BLACK) / (WHITE - BLACK)
    return np.clip(np.rint(TOP * shown), 0, TOP).astype(np.uint16)


def lesion_mask(traits, size, parts):
    """Where the lesion is in the X-ray: (rows, columns) bool, all False if there is none.

    parts: Those of xray_parts.
    """
    if not traits["lesion"]:
        return np.zeros((size, size), bool)
    return as_picture(parts[-1].end > parts[-1].start, size)


def torso_grid(traits, size):
    """The Grid of the axial slice, size x size x 1 voxels. It cuts a lesion through its centre."""
    level = traits["lesion"]["z"] if traits["lesion"] else USUAL_LEVEL
    level = traits["shift"][2] + traits["height"] * level
    pixel = FIELD / size
    first = (FIELD - pixel) / 2
    return Grid((size, size, 1), (-pixel, -pixel, THICKNESS), (first, first + AXIS, level))


def torso_labels(seed, number, traits, axes):
    """The tissue of every point of a slice: (X, Y, 1) uint8, a CODE or 0 outside of the body.

    axes: (x, y, z) in mm, z with one value.
    """
    x, y, z = axes
    y = y.astype(np.float32)
    labels = np.zeros((len(x), len(y)), np.uint8)
    for part in world_parts(seed, number, traits, x, z):
        hits = np.flatnonzero(part.end > part.start)
        if len(hits) == 0:
            continue
        rows = slice(hits[0], hits[-1] + 1)
        inside = (y > part.start[rows, None]) & (y < part.end[rows, None])
        most = np.where(part.share > 0.5, CODE[part.tissue], CODE[part.rest])
        np.copyto(labels[rows], np.broadcast_to(most, len(x))[rows, None], "unsafe", inside)
    return labels[..., None]


def torso_anatomy(seed, number, traits, grid):
    """The slice of a subject on `grid` -> Anatomy."""
    labels = torso_labels(seed, number, traits, grid.axes(POINTS))
    present = [name for name in TORSO if np.any(labels == CODE[name])]
    mask, maps = mixture(labels, grid, present, POINTS)
    rng = rng_for(seed, number, "tissue")
    factors = {}
    for name in TORSO:
        factors[name] = np.exp(rng.normal(0, (0.01, 0.04, 0.04))).tolist()
    axes = grid.axes()
    slow = smooth_field(rng, 40, axes, REACH)
    # The fine field is taken at z = 0 for every slice, so that a smaller lattice is enough.
    fine = smooth_field(rng, 11, (axes[0], axes[1] - AXIS, np.zeros(1)), FIELD / 2)
    density = np.exp(0.008 * slow + 0.25 * maps["lung"] * fine)
    variation = np.stack([density, np.exp(0.05 * slow), np.exp(-0.05 * slow + 0.04 * fine)])
    no_numbers = np.zeros(grid.shape, np.uint8)
    return Anatomy(grid, mask, maps, factors, variation.astype(np.float32),
                   np.exp(0.12 * fine).astype(np.float32), no_numbers, traits)


def torso_views(seed, number, size, views=("xray", "mask", "ct", "t2"), traits=None):
    """The pictures of a subject -> {view: array}, for the views asked for.

    xray: (rows, columns) uint16 of 12 bits. Row 0 is the top, column 0 is the patient's right.
    mask: (rows, columns) uint8, 255 where the X-ray shows the lesion and 0 elsewhere.
    ct: (X, Y, 1) int16 in HU, on the grid of torso_grid.
    t2: (X, Y, 1) int16 on the same grid, in the arbitrary units of an MR scanner.

    traits: None takes those of torso_subject. Others make another version of the same subject, for
        example one without the lesion.
    """
    traits = traits or torso_subject(seed, number)
    pictures = {}
    if "xray" in views or "mask" in views:
        parts = xray_parts(seed, number, traits, size)
    if "xray" in views:
        pictures["xray"] = render_xray(seed, number, traits, size, parts)
    if "mask" in views:
        pictures["mask"] = 255 * lesion_mask(traits, size, parts).astype(np.uint8)
    if "ct" in views or "t2" in views:
        anatomy = torso_anatomy(seed, number, traits, torso_grid(traits, size))
    if "ct" in views:
        ct = render_ct(anatomy, traits["density"])
        pictures["ct"] = acquire_ct(rng_for(seed, number, "ct"), ct, CT_NOISE)
    if "t2" in views:
        rng = rng_for(seed, number, "t2")
        level = np.exp(rng.uniform(np.log(150), np.log(800)))
        shading = np.exp(SHADING * smooth_field(rng, 100, anatomy.grid.axes(), REACH))
        image = acquire(rng, render(anatomy, PROTOCOL), anatomy.mask, shading, MR_NOISE, level)
        pictures["t2"] = np.clip(np.rint(image), 0, 32767).astype(np.int16)
    return pictures


def torso_report(seed, number):
    """The report of a subject, one line of lower-case words; see data.phantom.reports."""
    return compose(rng_for(seed, number, "report"), torso_subject(seed, number))


# ---- Files ---------------------------------------------------------------------------------------

SHEET = ["id", "split", "set", "lesion_side", "lesion_zone", "lesion_size", "effusion", "heart",
         "x0", "y0", "x1", "y1"]


def cxr_members(subjects):
    """Who is in the data set, as rows (number, split, set).

    The k-th subject of a set always has the same number, whatever the number of subjects. Only its
    split depends on that. The set "all" has a test part only.

    subjects: To train on, in each of the sets with two views.
    """
    tests = max(subjects // 20, 1)
    parts = (("train", subjects), ("val", max(subjects // 10, 1)), ("test", tests))
    names = list(VIEWS_OF)
    members = []
    first = 0
    for split, many in parts:
        for k in range(first, first + many):
            for name in names[:-1]:
                members.append((len(names) * k + names.index(name), split, name))
        first += many
    for k in range(tests):
        members.append((len(names) * k + names.index("all"), "test", "all"))
    return members


def box_of(mask):
    """The box around a mask as [x0, y0, x1, y1] in pixels, four empty words if it is all 0.

    x0 and y0 are the first column and row of the lesion, x1 and y1 the first ones behind it.
    """
    if not mask.any():
        return [""] * 4
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def write_cxr(folder, subjects, size, slices, seed):
    """Write annotation.json as R2Gen has it, images in one folder per view, and findings.csv.

    masks/ID.png is 255 where the X-ray shows the lesion. `subjects` is how many there are to train
    on in each of the three sets xray, ct and mr; see cxr_members for the others.
    Returns {subject: what is true of it}, for phantom.json.
    DataError if slices is not 1.
    """
    if slices != 1:
        raise DataError(f"phantom cxr: cannot make {slices} slices, because an X-ray has one "
                        "picture and so have its partners; use slices 1")
    images = folder / "images"
    for name in ("xray", "masks", "ct", "t2"):
        (images / name).mkdir(parents=True)
    entries = {"train": [], "val": [], "test": []}
    rows = [SHEET]
    truth = {}
    for number, split, group in cxr_members(subjects):
        name = f"cxr{number + 1:04d}"
        traits = torso_subject(seed, number)
        pictures = torso_views(seed, number, size, VIEWS_OF[group], traits)
        box = [""] * 4
        paths = []
        for view, picture in pictures.items():
            if view == "mask":
                box = box_of(picture)
                Image.fromarray(picture).save(images / "masks" / f"{name}.png")
            elif view == "xray":
                paths.append(f"xray/{name}.png")
                Image.fromarray(picture).save(images / paths[-1])
            else:
                paths.append(f"{view}/{name}.nii.gz")
                write_nifti(images / paths[-1], picture, torso_grid(traits, size))
        report = ""
        if group not in WITHOUT_REPORT:
            report = compose(rng_for(seed, number, "report"), traits)
        entries[split].append({"id": name, "report": report, "image_path": paths, "split": split})
        lesion = traits["lesion"] or {"side": "", "zone": "", "size": ""}
        rows.append([name, split, group, lesion["side"], lesion["zone"], lesion["size"],
                     traits["effusion"] or "", traits["heart"], *box])
        truth[name] = traits
    text = json.dumps(entries, indent=1) + "\n"
    (folder / "annotation.json").write_text(text, encoding="utf-8", newline="\n")
    write_sheet(folder / "findings.csv", rows)
    return truth
