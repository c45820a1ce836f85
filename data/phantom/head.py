"""The anatomy of the head: a brain with or without a tumour, and on demand its skull and scalp."""

import numpy as np
from scipy.ndimage import map_coordinates

from data.phantom.anatomy import OVERSAMPLE, Anatomy, mixture, tissue_fields
from data.phantom.geometry import Grid, ellipsoid, rng_for, smooth_field, tube
from data.phantom.physics import BRAIN, CODE, LESION_LABELS, SCALP

CENTRE = (0.0, -16.0, 10.0)     # mm, of the hull of the cerebrum
RADII = (65.0, 82.0, 66.0)      # mm
CORTEX = 3.6                    # mm; true cortex has 2.5 to 3, which 3 mm pixels hardly show
TABLE = 2.6                     # mm of compact bone on either side of the marrow; true: 1.5 to 2
SCALP_FIELD = 224               # mm; see head_grid

# Deep structures of the right hemisphere: rows (x, y, z, radius) in mm, as in `tube`. Those of the
# left are mirror images, before the random warp.
VENTRICLE = ((10, 31, 3, 3.0), (9, 20, 10, 5.0), (11, 2, 20, 4.8), (16, -22, 23, 5.2),
             (25, -40, 14, 6.5), (24, -60, 8, 2.5))
TEMPORAL_HORN = ((25, -40, 14, 6.0), (35, -30, -5, 3.0), (33, -12, -14, 2.5))
CAUDATE = ((13, 17, 2, 5.5), (15, 8, 14, 5.0), (19, -12, 23, 3.2), (23, -28, 20, 2.0))
CHOROID = ((13, -14, 22, 1.2), (23, -38, 16, 1.8))
GREAT_VEIN = ((0, -32, 8, 1.6), (0, -48, 10, 1.8), (0, -70, 24, 2.0))


def head_grid(size, slices, field=192):
    """A Grid of `field` x `field` x 75 mm around the cerebrum.

    size: Pixels along a side of a slice.
    slices: The number of slices. The index order is left, posterior, superior, as in BraTS.
    field: mm. 192 mm hold every brain, and SCALP_FIELD holds every head.
    """
    pixel = field / size
    gap = 75 / slices
    half = field / 2
    first = (half - pixel / 2, half - 16 - pixel / 2, -10 + gap / 2)
    return Grid((size, size, slices), (-pixel, -pixel, gap), first)


def draw_traits(rng, age=None, tumour=None):
    """Draw the traits of a person, as plain values for JSON.

    They are age (years), sex, size of the head and of the ventricles (relative), and the tumour
    (mm) or None.

    age, tumour (True or False): They replace what is drawn, and change nothing else of the person.
    """
    drawn_age = rng.uniform(20, 85)
    sex = "M" if rng.random() < 0.5 else "F"
    size = (1.03 if sex == "M" else 0.97) * rng.normal(1, 0.015)
    ventricles = np.exp(rng.normal(0, 0.12))
    drawn_tumour = rng.random() < 0.8
    # All is drawn even if there is no tumour, so that `tumour` changes nothing else.
    side = 1 if rng.random() < 0.5 else -1
    y = rng.uniform(-60, 30)
    z = rng.uniform(2, 44)
    half_width = RADII[0] * np.sqrt(1 - ((y - CENTRE[1]) / RADII[1]) ** 2
                                    - ((z - CENTRE[2]) / RADII[2]) ** 2)
    core = rng.uniform(9, 19)
    drawn = {"x": side * half_width * rng.uniform(0.45, 0.7),
             "y": y,
             "z": z,
             "core": core,
             "rim": rng.uniform(3, 6),
             "oedema": 5 + core * rng.uniform(0.6, 1.2),
             "push": rng.uniform(0.15, 0.4)}
    traits = {"age": float(drawn_age if age is None else age), "sex": sex, "size": float(size),
              "ventricles": float(ventricles), "tumour": None}
    has_tumour = drawn_tumour if tumour is None else tumour
    if has_tumour:
        traits["tumour"] = {key: float(value) for key, value in drawn.items()}
    return traits


def template_points(rng, axes, traits):
    """For every point of the grid, the point (x, y, z) of the template head that is found there.

    Three things move the points: the push of a tumour, a random warp, and the size of the head. A
    tumour moves its surroundings outwards, by up to the fraction `push` of their distance from it.
    The midline shifts and sulci close.
    """
    points = [p.astype(np.float32) for p in np.meshgrid(*axes, indexing="ij")]
    tumour = traits["tumour"]
    if tumour:
        offsets = [p - tumour[name] for p, name in zip(points, "xyz")]
        square = sum(d ** 2 for d in offsets)
        reach = 1.5 * tumour["core"]
        pull = tumour["push"] * np.exp(-square / np.float32(2 * reach ** 2))
        points = [p - d * pull for p, d in zip(points, offsets)]
    warped = []
    for p, centre in zip(points, CENTRE):
        shift = 2.2 * smooth_field(rng, 45, axes) + 0.9 * smooth_field(rng, 18, axes)       # mm
        warped.append((p + shift - centre) / np.float32(traits["size"]) + np.float32(centre))
    return warped


def distance_to_sulci(rng, offsets, rho):
    """The distance (mm) to the nearest sulcus, as if all sulci reached down to the centre.

    Sulci are the zero surfaces of a random field. To first order, the distance to such a surface is
    |field| / |gradient|. We look the field up further out than the point is (rho^-0.75). Its
    surfaces then run inwards from the hull, as sulci do.

    offsets: mm from CENTRE.
    rho: The radius relative to the hull; see `hull`.
    """
    step = 2.0
    reach = 98.0
    axis = np.arange(-reach, reach + step, step)
    field = smooth_field(rng, 6, (axis, axis, axis))
    steepness = np.sqrt(sum(slope ** 2 for slope in np.gradient(field, step)))
    signed = field / np.maximum(steepness, np.float32(0.02))
    shrink = np.maximum(rho, np.float32(0.1)) ** np.float32(0.75)
    places = [(d / shrink + reach) / step for d in offsets]
    return np.abs(map_coordinates(signed, places, order=1, mode="nearest")) * shrink


def hull(points):
    """Points (x, y, z) of the template -> (radius relative to the hull, depth below it in mm).

    The radius is 1 on the hull. The depth is taken along the ray from CENTRE. The hull is a blunt
    ellipsoid, which is narrower in front.
    """
    offsets = [p - np.float32(c) for p, c in zip(points, CENTRE)]
    width = RADII[0] * (1 - 0.12 * offsets[1] / RADII[1])
    radii = (width, RADII[1], RADII[2])
    power = np.float32(2.2)
    rho = sum(np.abs(d / r) ** power for d, r in zip(offsets, radii)) ** (1 / power)
    from_centre = np.sqrt(sum(d ** 2 for d in offsets))
    depth = (1 / np.maximum(rho, np.float32(0.05)) - 1) * from_centre
    return rho, depth


def pial_distance(seed, subject, axes, points, rho, depth, rough, gap):
    """The distance (mm) from the surface of the brain, negative in the CSF around it.

    Clefts let CSF in. They are the sulci, the fissure between the hemispheres down to the callosum,
    the Sylvian fissure, which comes in from the side, and the insular cistern at its end. Each is a
    distance to a surface that has an edge.

    rho, depth: See `hull`.
    rough: A random field that makes edges less straight.
    gap: mm by which every cleft is wider on either side.
    """
    x, y, z = points
    lateral = np.abs(x)
    bend = 2.5 * smooth_field(rng_for(seed, subject, "bend"), 11, axes)
    offsets = (x + bend - CENTRE[0], y - bend - CENTRE[1], z - CENTRE[2])
    sulci = distance_to_sulci(rng_for(seed, subject, "sulci"), offsets, rho)
    floor = 19 + 7 * smooth_field(rng_for(seed, subject, "sulcus depth"), 20, axes)
    floor = np.maximum(floor, 8)
    sulci = np.hypot(sulci, np.maximum(depth - floor, 0))

    above_callosum = np.maximum(1 - ellipsoid((y, z), (-8, 6), (42, 23)), 0)
    midline = np.hypot(x, 25 * above_callosum)

    beyond = 25 * np.maximum(ellipsoid((lateral, y), (70, -9), (33, 32)) - 1, 0)
    sylvian = np.hypot(0.9 * (z + 4 + 0.45 * y) + 1.2 * rough, beyond)
    beyond = 16 * np.maximum(ellipsoid((y, z), (0, 3), (19, 12)) - 1, 0)
    insula = np.hypot(lateral - 40 + 0.012 * y ** 2 + rough, beyond)

    medial = np.minimum(sulci - 0.55, midline - 0.8)
    clefts = np.minimum(medial, np.minimum(sylvian, insula) - 1.1)
    return np.minimum(clefts - gap, depth - 0.9 - 2 * gap)


def ventricle_distance(points, widening):
    """The signed distance (mm, negative inside) to the ventricles.

    widening: The factor by which their radii are multiplied.
    """
    x, y, z = points
    mirrored = (np.abs(x), y, z)
    distance = 3 * (ellipsoid(points, (0, -14, 0), (2.4 * widening, 15, 12)) - 1)   # the third one
    for shape in (VENTRICLE, TEMPORAL_HORN):
        wide = [(*node[:3], node[3] * widening) for node in shape]
        distance = np.minimum(distance, tube(mirrored, wide))
    return distance


def add_deep_grey(labels, points, rough):
    """Paint caudate, putamen, thalamus and pallidum of both sides into `labels`, in place."""
    mirrored = (np.abs(points[0]), *points[1:])
    putamen = 7 * (ellipsoid(mirrored, (25.5, 3, 3), (6.5, 17, 12)) - 1)
    thalamus = 9 * (ellipsoid(mirrored, (11, -18, 8), (9, 15, 10)) - 1)
    distance = np.minimum(tube(mirrored, CAUDATE), np.minimum(putamen, thalamus))
    labels[distance < 0.4 * rough] = CODE["deep"]
    labels[ellipsoid(mirrored, (19.5, -2, 1), (4.5, 10, 7)) < 1] = CODE["pallidum"]


def add_midbrain(labels, points, rough):
    """Paint the midbrain and the CSF around it into `labels`, in place.

    The lowest slices show it.
    """
    front = ellipsoid(points, (0, -3, -15), (13, 11, 10))
    around = ellipsoid(points, (0, -29, -16), (20, 17, 13))
    labels[np.minimum(front, around) + 0.06 * rough < 1] = CODE["csf"]
    labels[ellipsoid(points, (0, -25, -18), (17, 14, 16)) < 1] = CODE["wm"]


def add_vessels(rng, labels, axes, points, depth, pial):
    """Paint what takes up contrast agent in a healthy head into `labels`, in place.

    This is some of the CSF on the surface (for veins and meninges), the sagittal sinus, the great
    vein, and the choroid plexus in the ventricles.
    """
    x, y, z = points
    labels[(smooth_field(rng, 5, axes) > 1.5) & (pial < 0)] = CODE["vein"]
    sinus = (np.abs(x) < 3) & (depth < 4.5) & ((z > 30) | (y < -60))
    plexus = tube((np.abs(x), y, z), CHOROID) < 0
    great_vein = tube(points, GREAT_VEIN) < 0
    labels[sinus | plexus | great_vein] = CODE["vein"]


def add_tumour(rng, labels, axes, tumour):
    """Paint necrosis, enhancing rim and oedema into `labels`, in place.

    Oedema spreads in white matter and spares most of the cortex.
    """
    away = [a.astype(np.float32) - np.float32(tumour[name]) for a, name in zip(axes, "xyz")]
    away = np.meshgrid(*away, indexing="ij")
    distance = np.sqrt(sum(d ** 2 for d in away)) * (1 + 0.15 * smooth_field(rng, 13, axes))
    same_side = np.sign(tumour["x"]) * (away[0] + tumour["x"]) > 1      # it does not cross the falx
    reach = tumour["core"] + tumour["oedema"] * (1 + 0.35 * smooth_field(rng, 16, axes))
    white = np.isin(labels, [CODE["wm"], CODE["gliosis"]])
    grey = np.isin(labels, [CODE["gm"], CODE["deep"], CODE["pallidum"]])
    swollen = (white & (distance < reach)) | (grey & (distance < tumour["core"] + 2))
    labels[swollen & same_side] = CODE["oedema"]
    labels[(distance < tumour["core"]) & same_side] = CODE["enhancing"]
    rim = tumour["rim"] * (1 + 0.25 * smooth_field(rng, 10, axes))
    labels[(distance < tumour["core"] - rim) & same_side] = CODE["necrosis"]


def add_scalp(rng, labels, axes, points, height):
    """Paint skull, temporal muscle, fat and skin into `labels`, in place.

    The skull has two tables of compact bone with marrow between them. It is thick in front and
    behind. It is thin at the temples, where it has no marrow and lies under muscle.

    height: mm above the surface of the brain's hull, negative inside.
    """
    _, y, z = points
    fat = rng.uniform(3.5, 7.0) + 0.6 * smooth_field(rng, 30, axes)
    temple = np.maximum(1 - ellipsoid((y, z), (8, -12), (40, 48)) ** 2, 0)
    marrow = 3.2 + 0.9 * smooth_field(rng, 22, axes) + 1.5 * np.abs(y - CENTRE[1]) / RADII[1]
    marrow = marrow - 4 * temple
    # From inside to outside, with the thickness in mm.
    layers = (("bone", TABLE),
              ("marrow", np.maximum(marrow, 0)),
              ("bone", TABLE),
              ("muscle", 7 * temple),
              ("fat", fat),
              ("muscle", 2.0))                              # skin
    floor = np.zeros_like(height)
    for name, thickness in layers:
        labels[(height > floor) & (height <= floor + thickness)] = CODE[name]
        floor = floor + thickness


def head_labels(seed, subject, axes, traits, scalp=False):
    """The tissue of every point: (len(x), len(y), len(z)) uint8, a CODE or 0 outside the head."""
    points = template_points(rng_for(seed, subject, "warp"), axes, traits)
    rough = smooth_field(rng_for(seed, subject, "rough"), 9, axes)
    # Years of atrophy. The rates below take about 0.3 % of the brain's volume in a year.
    years = max(traits["age"] - 40, 0.0)
    rho, depth = hull(points)
    pial = pial_distance(seed, subject, axes, points, rho, depth, rough, gap=0.010 * years)
    ventricle = ventricle_distance(points, traits["ventricles"] * (0.85 + 0.011 * years))

    labels = np.full(pial.shape, CODE["wm"], np.uint8)
    labels[pial < CORTEX * (1 - 0.002 * years) + 0.5 * rough] = CODE["gm"]
    labels[pial < 0] = CODE["csf"]
    add_deep_grey(labels, points, rough)
    add_midbrain(labels, points, rough)
    # Rims and dots of gliosis come with age. They are as bright on FLAIR as oedema, but no tumour.
    spots = smooth_field(rng_for(seed, subject, "gliosis"), 4, axes)
    aged = (ventricle < 0.07 * years + rough - 1) | (spots > 3.4 - 0.025 * years)
    labels[aged & (labels == CODE["wm"])] = CODE["gliosis"]
    labels[ventricle < 0] = CODE["csf"]
    add_vessels(rng_for(seed, subject, "vessels"), labels, axes, points, depth, pial)
    if traits["tumour"]:
        add_tumour(rng_for(seed, subject, "tumour"), labels, axes, traits["tumour"])
    labels[rho > 1] = 0
    if scalp:
        add_scalp(rng_for(seed, subject, "scalp"), labels, axes, points, -depth)
    return labels


def head_anatomy(seed, subject, grid, age=None, tumour=None, scalp=False):
    """A head on `grid` -> Anatomy. The same (seed, subject) is the same person at any resolution.

    age (years), tumour (True or False): They replace what is drawn. The person stays the same.

    scalp: True for a head with skull and scalp, False for a skull-stripped one.
    """
    traits = draw_traits(rng_for(seed, subject, "traits"), age, tumour)
    labels = head_labels(seed, subject, grid.axes(OVERSAMPLE), traits, scalp)
    mask, maps = mixture(labels, grid, BRAIN + SCALP)
    largest = np.argmax(np.stack(list(maps.values())), axis=0)
    lesion_codes = np.array([LESION_LABELS.get(name, 0) for name in maps], np.uint8)
    lesion = lesion_codes[largest] * mask

    # The scalp has a generator of its own, so that a brain is the same with and without it.
    rng = rng_for(seed, subject, "tissue")
    outer = rng_for(seed, subject, "scalp tissue")
    factors = {}
    for name in maps:
        drawn = (outer if name in SCALP else rng).normal(0, (0.01, 0.03, 0.03))
        factors[name] = np.exp(drawn).tolist()
    factors["csf"] = [1.0, 1.0, 1.0]
    variation, texture = tissue_fields(rng, grid.axes())
    return Anatomy(grid, mask, maps, factors, variation, texture, lesion.astype(np.uint8), traits)
