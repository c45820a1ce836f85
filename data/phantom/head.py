"""Anatomy of the head."""

import numpy as np
from scipy.ndimage import map_coordinates

from data.phantom.anatomy import OVERSAMPLE, Anatomy, mixture, tissue_fields
from data.phantom.geometry import Grid, ellipsoid, rng_for, smooth_field, tube
from data.phantom.physics import BRAIN, CODE, LESION_LABELS, SCALP

CENTRE = (0.0, -16.0, 10.0)       # mm, of the cerebral hull
RADII = (65.0, 82.0, 66.0)        # mm
CORTEX = 3.6                      # mm; true cortex has 2.5 to 3, which a 3 mm pixel would hardly show
TABLE = 2.6                       # mm, of compact bone on either side of the marrow; true tables have 1.5 to 2
SCALP_FIELD = 224                 # mm, see `head_grid`
# Deep structures of the right hemisphere, mm; the left ones are mirror images before the random warp.
VENTRICLE = ((10, 31, 3, 3.0), (9, 20, 10, 5.0), (11, 2, 20, 4.8), (16, -22, 23, 5.2), (25, -40, 14, 6.5),
             (24, -60, 8, 2.5))
TEMPORAL_HORN = ((25, -40, 14, 6.0), (35, -30, -5, 3.0), (33, -12, -14, 2.5))
CAUDATE = ((13, 17, 2, 5.5), (15, 8, 14, 5.0), (19, -12, 23, 3.2), (23, -28, 20, 2.0))
CHOROID = ((13, -14, 22, 1.2), (23, -38, 16, 1.8))
GREAT_VEIN = ((0, -32, 8, 1.6), (0, -48, 10, 1.8), (0, -70, 24, 2.0))


def head_grid(size, slices, field=192):
    """`field` x `field` x 75 mm around the cerebrum: `size` pixels a side, `slices` slices; index order left,
    posterior, superior as in BraTS. 192 mm hold every brain, SCALP_FIELD every head."""
    pixel, gap, half = field / size, 75 / slices, field / 2
    return Grid((size, size, slices), (-pixel, -pixel, gap), (half - pixel / 2, half - 16 - pixel / 2, -10 + gap / 2))


def draw_traits(rng, age=None, tumour=None):
    """Age (years), sex, head and ventricle size (relative) and tumour (mm, or None) of a subject, as plain values for
    JSON.

    `age` and `tumour` (True or False) replace what would have been drawn and change nothing else about the subject."""
    drawn_age = rng.uniform(20, 85)
    sex = "M" if rng.random() < 0.5 else "F"
    size = (1.03 if sex == "M" else 0.97) * rng.normal(1, 0.015)
    ventricles = np.exp(rng.normal(0, 0.12))
    drawn_tumour = rng.random() < 0.8
    side = 1 if rng.random() < 0.5 else -1
    y, z = rng.uniform(-60, 30), rng.uniform(2, 44)
    half_width = RADII[0] * np.sqrt(1 - ((y - CENTRE[1]) / RADII[1]) ** 2 - ((z - CENTRE[2]) / RADII[2]) ** 2)
    core = rng.uniform(9, 19)
    spec = {"x": side * half_width * rng.uniform(0.45, 0.7), "y": y, "z": z, "core": core, "rim": rng.uniform(3, 6),
            "oedema": 5 + core * rng.uniform(0.6, 1.2), "push": rng.uniform(0.15, 0.4)}
    has_tumour = drawn_tumour if tumour is None else tumour
    return {"age": float(drawn_age if age is None else age), "sex": sex, "size": float(size),
            "ventricles": float(ventricles),
            "tumour": {key: float(value) for key, value in spec.items()} if has_tumour else None}


def template_points(rng, axes, traits):
    """For every point of the grid, the point (x, y, z) of the template head found there: push of a tumour, random
    warp, head size.

    A tumour moves its surroundings outwards by up to the fraction `push` of their distance: the midline shifts and
    sulci close."""
    points = [p.astype(np.float32) for p in np.meshgrid(*axes, indexing="ij")]
    tumour = traits["tumour"]
    if tumour:
        offsets = [p - tumour[name] for p, name in zip(points, "xyz")]
        square = sum(d ** 2 for d in offsets)
        pull = tumour["push"] * np.exp(-square / np.float32(2 * (1.5 * tumour["core"]) ** 2))
        points = [p - d * pull for p, d in zip(points, offsets)]
    warped = []
    for p, centre in zip(points, CENTRE):
        shift = 2.2 * smooth_field(rng, 45, axes) + 0.9 * smooth_field(rng, 18, axes)  # mm
        warped.append((p + shift - centre) / np.float32(traits["size"]) + np.float32(centre))
    return warped


def distance_to_sulci(rng, offsets, rho):
    """Distance (mm) to the nearest sulcus, as if all sulci reached to the centre. offsets: mm from CENTRE; rho: 1 on
    the hull.

    Sulci are the zero surfaces of a random field, to which |field| / |gradient| is the distance to first order. The
    field is looked up further out than the point is (rho^-0.75), so that its surfaces run inwards from the hull as
    sulci do."""
    step, reach = 2.0, 98.0
    axis = np.arange(-reach, reach + step, step)
    field = smooth_field(rng, 6, (axis, axis, axis))
    steepness = np.sqrt(sum(slope ** 2 for slope in np.gradient(field, step)))
    signed = field / np.maximum(steepness, np.float32(0.02))
    shrink = np.maximum(rho, np.float32(0.1)) ** np.float32(0.75)
    places = [(d / shrink + reach) / step for d in offsets]
    return np.abs(map_coordinates(signed, places, order=1, mode="nearest")) * shrink


def hull(points):
    """Points (x, y, z) of the template -> their radius relative to the hull (1 on it) and their depth below it in mm,
    along the ray from CENTRE. The hull is a blunt ellipsoid, narrower in front."""
    offsets = [p - np.float32(c) for p, c in zip(points, CENTRE)]
    width = RADII[0] * (1 - 0.12 * offsets[1] / RADII[1])
    power = np.float32(2.2)
    rho = sum(np.abs(d / r) ** power for d, r in zip(offsets, (width, RADII[1], RADII[2]))) ** (1 / power)
    depth = (1 / np.maximum(rho, np.float32(0.05)) - 1) * np.sqrt(sum(d ** 2 for d in offsets))
    return rho, depth


def pial_distance(seed, subject, axes, points, rho, depth, rough, gap):
    """Distance in mm from the surface of the brain (negative: in the CSF around it), with every cleft `gap` mm wider
    to either side.

    Clefts let CSF in: the sulci, the fissure between the hemispheres down to the callosum, the Sylvian fissure, which
    comes in from the side, and the insular cistern at its end. Each is a distance to a surface that has an edge.
    rho, depth: see `hull`. rough: a random field against edges that would be too straight."""
    x, y, z = points
    lateral = np.abs(x)
    bend = 2.5 * smooth_field(rng_for(seed, subject, "bend"), 11, axes)
    offsets = (x + bend - CENTRE[0], y - bend - CENTRE[1], z - CENTRE[2])
    sulci = distance_to_sulci(rng_for(seed, subject, "sulci"), offsets, rho)
    floor = np.maximum(19 + 7 * smooth_field(rng_for(seed, subject, "sulcus depth"), 20, axes), 8)
    sulci = np.hypot(sulci, np.maximum(depth - floor, 0))
    midline = np.hypot(x, 25 * np.maximum(1 - ellipsoid((y, z), (-8, 6), (42, 23)), 0))
    beyond = 25 * np.maximum(ellipsoid((lateral, y), (70, -9), (33, 32)) - 1, 0)
    sylvian = np.hypot(0.9 * (z + 4 + 0.45 * y) + 1.2 * rough, beyond)
    beyond = 16 * np.maximum(ellipsoid((y, z), (0, 3), (19, 12)) - 1, 0)
    insula = np.hypot(lateral - 40 + 0.012 * y ** 2 + rough, beyond)
    clefts = np.minimum(np.minimum(sulci - 0.55, midline - 0.8), np.minimum(sylvian, insula) - 1.1)
    return np.minimum(clefts - gap, depth - 0.9 - 2 * gap)


def ventricle_distance(points, widening):
    """Signed distance in mm to the ventricles (negative inside), whose radii are multiplied by `widening`."""
    x, y, z = points
    mirrored = (np.abs(x), y, z)
    shapes = [[(*node[:3], node[3] * widening) for node in shape] for shape in (VENTRICLE, TEMPORAL_HORN)]
    third = 3 * (ellipsoid(points, (0, -14, 0), (2.4 * widening, 15, 12)) - 1)
    return np.minimum(third, np.minimum(tube(mirrored, shapes[0]), tube(mirrored, shapes[1])))


def add_deep_grey(labels, points, rough):
    """Paint caudate, putamen, thalamus and pallidum of both sides into `labels`, in place."""
    mirrored = (np.abs(points[0]), *points[1:])
    putamen = 7 * (ellipsoid(mirrored, (25.5, 3, 3), (6.5, 17, 12)) - 1)
    thalamus = 9 * (ellipsoid(mirrored, (11, -18, 8), (9, 15, 10)) - 1)
    distance = np.minimum(tube(mirrored, CAUDATE), np.minimum(putamen, thalamus))
    labels[distance < 0.4 * rough] = CODE["deep"]
    labels[ellipsoid(mirrored, (19.5, -2, 1), (4.5, 10, 7)) < 1] = CODE["pallidum"]


def add_midbrain(labels, points, rough):
    """Paint the midbrain in its cisterns, which the lowest slices show, into `labels`, in place."""
    front = ellipsoid(points, (0, -3, -15), (13, 11, 10))
    around = ellipsoid(points, (0, -29, -16), (20, 17, 13))
    labels[np.minimum(front, around) + 0.06 * rough < 1] = CODE["csf"]
    labels[ellipsoid(points, (0, -25, -18), (17, 14, 16)) < 1] = CODE["wm"]


def add_vessels(rng, labels, axes, points, depth, pial):
    """Paint what takes up contrast in a healthy head into `labels`, in place: some of the CSF on the surface (veins,
    meninges), the sagittal sinus, the great vein, and the choroid plexus in the ventricles."""
    x, y, z = points
    labels[(smooth_field(rng, 5, axes) > 1.5) & (pial < 0)] = CODE["vein"]
    sinus = (np.abs(x) < 3) & (depth < 4.5) & ((z > 30) | (y < -60))
    plexus = tube((np.abs(x), y, z), CHOROID) < 0
    labels[sinus | plexus | (tube(points, GREAT_VEIN) < 0)] = CODE["vein"]


def add_tumour(rng, labels, axes, tumour):
    """Paint necrosis, enhancing rim and oedema into `labels`, in place. Oedema creeps along white matter and spares
    most cortex."""
    away = [a.astype(np.float32) - np.float32(tumour[name]) for a, name in zip(axes, "xyz")]
    away = np.meshgrid(*away, indexing="ij")
    distance = np.sqrt(sum(d ** 2 for d in away)) * (1 + 0.15 * smooth_field(rng, 13, axes))
    same_side = np.sign(tumour["x"]) * (away[0] + tumour["x"]) > 1  # the falx is in the way
    reach = tumour["core"] + tumour["oedema"] * (1 + 0.35 * smooth_field(rng, 16, axes))
    white = np.isin(labels, [CODE["wm"], CODE["gliosis"]])
    grey = np.isin(labels, [CODE["gm"], CODE["deep"], CODE["pallidum"]])
    labels[((white & (distance < reach)) | (grey & (distance < tumour["core"] + 2))) & same_side] = CODE["oedema"]
    labels[(distance < tumour["core"]) & same_side] = CODE["enhancing"]
    rim = tumour["rim"] * (1 + 0.25 * smooth_field(rng, 10, axes))
    labels[(distance < tumour["core"] - rim) & same_side] = CODE["necrosis"]


def add_scalp(rng, labels, axes, points, height):
    """Paint skull (two tables with marrow between them), temporal muscle, fat and skin into `labels`, in place.

    height: mm above the surface of the brain's hull, negative inside. The skull is thick in front and behind and
    thin at the temples, where it has no marrow and lies under muscle."""
    _, y, z = points
    fat = rng.uniform(3.5, 7.0) + 0.6 * smooth_field(rng, 30, axes)
    temple = np.maximum(1 - ellipsoid((y, z), (8, -12), (40, 48)) ** 2, 0)
    marrow = 3.2 + 0.9 * smooth_field(rng, 22, axes) + 1.5 * np.abs(y - CENTRE[1]) / RADII[1] - 4 * temple
    floor = np.zeros_like(height)
    for name, thickness in (("bone", TABLE), ("marrow", np.maximum(marrow, 0)), ("bone", TABLE),
                            ("muscle", 7 * temple), ("fat", fat), ("muscle", 2.0)):
        labels[(height > floor) & (height <= floor + thickness)] = CODE[name]
        floor = floor + thickness


def head_labels(seed, subject, axes, traits, scalp=False):
    """Tissue of every point of the grid: (len(x), len(y), len(z)) uint8, a CODE or 0 outside the head."""
    points = template_points(rng_for(seed, subject, "warp"), axes, traits)
    rough = smooth_field(rng_for(seed, subject, "rough"), 9, axes)
    years = max(traits["age"] - 40, 0.0)  # of atrophy; the rates below make it about 0.3 % of the brain's volume a year
    rho, depth = hull(points)
    pial = pial_distance(seed, subject, axes, points, rho, depth, rough, gap=0.010 * years)
    ventricle = ventricle_distance(points, traits["ventricles"] * (0.85 + 0.011 * years))

    labels = np.full(pial.shape, CODE["wm"], np.uint8)
    labels[pial < CORTEX * (1 - 0.002 * years) + 0.5 * rough] = CODE["gm"]
    labels[pial < 0] = CODE["csf"]
    add_deep_grey(labels, points, rough)
    add_midbrain(labels, points, rough)
    # Rims and dots of gliosis come with age; bright on FLAIR, like oedema, but no tumour.
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
    """A head on `grid` -> Anatomy, skull-stripped or with skull and `scalp`. Same (seed, subject) = same person, at any
    resolution and at any given `age`."""
    traits = draw_traits(rng_for(seed, subject, "traits"), age, tumour)
    labels = head_labels(seed, subject, grid.axes(OVERSAMPLE), traits, scalp)
    mask, maps = mixture(labels, grid, BRAIN + SCALP)
    largest = np.argmax(np.stack(list(maps.values())), axis=0)
    lesion = np.array([LESION_LABELS.get(name, 0) for name in maps], np.uint8)[largest] * mask

    rng, outer = rng_for(seed, subject, "tissue"), rng_for(seed, subject, "scalp tissue")
    factors = {name: np.exp((outer if name in SCALP else rng).normal(0, (0.01, 0.03, 0.03))).tolist() for name in maps}
    factors["csf"] = [1.0, 1.0, 1.0]
    variation, texture = tissue_fields(rng, grid.axes())
    return Anatomy(grid, mask, maps, factors, variation, texture, lesion.astype(np.uint8), traits)
