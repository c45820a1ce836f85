"""The anatomy of the chest, from above the aortic arch down to the liver, with the vessels."""

import numpy as np

from data.phantom.anatomy import OVERSAMPLE, Anatomy, add_bone, mixture, tissue_fields
from data.phantom.geometry import Grid, ellipsoid, rng_for, smooth_field, tube
from data.phantom.physics import CHEST, CODE

CHEST_FIELD = 330       # mm along a side
CHEST_REACH = 220.0     # mm; see smooth_field
BOTTOM = -128.0         # mm below the carina, the lower end of the lowest slice
HEIGHT = 180.0          # mm, of all slices together
SKIN = 2.2              # mm
SHELL = 2.0             # mm of compact bone around marrow

# Vessels and airways in the middle of the chest: rows (x, y, z, radius) in mm, as in `tube`. World
# 0 is the carina. The patient's right is positive x, so the heart lies at negative x.
AORTA = (
    ((-6, 10, -50, 14), (10, 22, -24, 16), (16, 25, 6, 16), (12, 16, 30, 14), (-8, -10, 38, 13),
     (-24, -34, 30, 13), (-28, -50, 4, 12.5), (-26, -54, -60, 12), (-20, -54, -140, 11)),
    ((10, 16, 36, 6.5), (16, 18, 62, 6)),                           # brachiocephalic
    ((-8, -2, 44, 5), (-16, 0, 62, 4.5)),                           # left common carotid
    ((-18, -18, 42, 5.5), (-28, -22, 62, 5)),                       # left subclavian
)
ARTERIES = (
    ((-16, 42, -40, 13), (-22, 28, -12, 14), (-32, -4, 6, 11), (-52, -16, -6, 8)),
    ((-18, 16, -8, 12), (14, -2, -8, 11), (46, -8, -16, 8.5)),
)
VEINS = (
    ((14, -18, -48, 8), (46, -20, -36, 6)), ((14, -18, -62, 8), (48, -26, -72, 6)),
    ((-16, -18, -48, 8), (-50, -18, -36, 6)), ((-16, -18, -62, 8), (-52, -28, -72, 6)),
)
SUPERIOR_CAVA = (((28, 20, 62, 8), (30, 12, 10, 9), (30, 14, -52, 10)),
                 ((-34, 24, 62, 6), (0, 34, 50, 7), (28, 20, 42, 8)))
INFERIOR_CAVA = (((26, -4, -96, 12), (24, -8, -150, 12)), ((8, -48, -140, 4), (8, -46, 20, 4)))
TRACHEA = (((0, -14, 66, 9), (0, -22, 2, 9)),
           ((0, -22, 4, 8), (28, -24, -16, 7), (52, -28, -42, 4)),
           ((0, -22, 4, 8), (-30, -26, -20, 6.5), (-54, -30, -46, 4)))
# On the surface of the heart. True ones have a radius of 1 to 2 mm, which 5 mm pixels hardly show.
CORONARIES = (
    ((-16, 24, -38, 2.4), (-30, 44, -46, 2.4), (-46, 58, -66, 2.4), (-60, 62, -96, 2.2),
     (-66, 52, -124, 1.8)),
    ((-22, 16, -40, 2.2), (-56, 6, -50, 2.2), (-82, -2, -72, 2.0), (-80, -4, -100, 1.6)),
    ((14, 26, -40, 2.4), (30, 50, -54, 2.4), (34, 54, -84, 2.2), (14, 34, -118, 1.8)),
)
# Where the vessels of the lungs begin, as (x, y, z) in mm.
HILA = {"artery": ((42, -8, 2), (46, -8, -16), (46, -14, -36), (-44, -12, 10), (-50, -14, -6),
                   (-50, -20, -26)),
        "lung vein": ((42, -6, -10), (46, -20, -36), (48, -26, -70), (-44, -6, -6),
                      (-50, -18, -36), (-52, -28, -70))}
MUSCLES = (
    ((14, -94, 80, 13), (17, -96, 0, 16), (20, -96, -150, 19)),     # beside the spine
    ((40, -96, 80, 10), (46, -98, 0, 11), (44, -98, -150, 12)),
    ((78, -90, 80, 14), (88, -86, 30, 13), (104, -74, -10, 7)),     # around the shoulder blade
    ((110, -60, 80, 16), (116, -56, 30, 13), (122, -52, -20, 7)),
    ((126, -28, 40, 9), (132, -26, -20, 7), (132, -30, -90, 5)),    # latissimus
)
SCAPULA = (((64, -84, 80, 3.5), (72, -84, 30, 3.2), (82, -80, -20, 2.4)),
           ((90, -76, 80, 3.5), (94, -76, 30, 3.2), (88, -79, -20, 2.4)),
           ((110, -58, 80, 6), (106, -66, 40, 3.0)))


def chest_grid(size, slices, field=CHEST_FIELD):
    """A Grid of `field` x `field` x HEIGHT mm.

    size: Pixels along a side of a slice.
    slices: The number of slices. The index order is left, posterior, superior.
    """
    pixel = field / size
    gap = HEIGHT / slices
    half = field / 2
    first = (half - pixel / 2, half - pixel / 2, BOTTOM + gap / 2)
    return Grid((size, size, slices), (-pixel, -pixel, gap), first)


def draw_chest(rng, mean_age=58.0):
    """Draw the traits of a patient, as plain values for JSON.

    age       years
    size      of the body, relative; depth is its extent from front to back, relative to the size
    heart     its size, relative
    aorta     its width, relative; it grows with age
    fat       mm under the skin
    offset    mm by which the bed lies too low
    density   of the mineral in bone, relative
    nodule    its place (x, y, z) and radius in mm; None for most patients

    mean_age: Years.
    """
    age = np.clip(rng.normal(mean_age, 12), 25, 88)
    drawn = {"age": age,
             "size": np.clip(rng.normal(1, 0.03), 0.93, 1.05),
             "depth": np.clip(rng.normal(1, 0.04), 0.9, 1.08),
             "heart": np.clip(rng.normal(1, 0.06), 0.86, 1.16),
             "aorta": (1 + 0.004 * (age - 58)) * np.exp(rng.normal(0, 0.06)),
             "fat": np.clip(10 * np.exp(rng.normal(0, 0.35)), 5, 17),
             "offset": rng.uniform(-10, 10),
             "density": (1 - 0.006 * (age - 58)) * np.exp(rng.normal(0, 0.06))}
    traits = {"sex": "M" if rng.random() < 0.5 else "F"}
    for name, value in drawn.items():
        traits[name] = float(value)
    nodule = {"x": float(rng.choice((-1, 1)) * rng.uniform(60, 95)),
              "y": float(rng.uniform(-50, 40)),
              "z": float(rng.uniform(-80, 40)),
              "radius": float(rng.uniform(4, 9))}
    traits["nodule"] = nodule if rng.random() < 0.25 else None
    return traits


def draw_tree(rng, start, length=30.0, radius=5.2):
    """Draw the branches of a vessel of the lung -> list of tubes with two nodes each.

    The vessel begins at a hilum, runs outwards, and divides into two again and again. Each branch
    is three quarters as long and as wide as the one before. High vessels run upwards, and low ones
    run downwards.

    start: (x, y, z) in mm.
    """
    side = np.sign(start[0])
    heading = np.array([side, rng.normal(0, 0.5), rng.normal(0, 0.5) + (start[2] + 30) / 50])
    branches = []
    growing = [(np.array(start, float), heading, length, radius)]
    while growing:
        begin, heading, length, radius = growing.pop()
        heading = heading / np.linalg.norm(heading)
        end = begin + length * heading
        branches.append(((*begin, radius), (*end, 0.8 * radius)))
        if radius > 1.3:
            across = np.cross(heading, rng.normal(size=3))
            across = across / np.linalg.norm(across)
            for turn in (0.65, -0.65):
                bent = heading + turn * across + rng.normal(0, 0.15, 3) + (0.12 * side, 0, 0)
                growing.append((end, bent, 0.75 * length, 0.75 * radius))
    return branches


def chest_points(rng, axes, traits):
    """For every point of the grid, the point (x, y, z) of the template that is found there."""
    scales = (traits["size"], traits["size"] * traits["depth"], traits["size"])
    points = []
    for p, scale in zip(np.meshgrid(*axes, indexing="ij"), scales):
        shift = (3.5 * smooth_field(rng, 60, axes, CHEST_REACH)
                 + 1.2 * smooth_field(rng, 24, axes, CHEST_REACH))              # mm
        points.append((p.astype(np.float32) + shift) / np.float32(scale))
    return points


def wall_height(points):
    """mm above the outer surface of the rib cage, negative inside. The cage narrows to the top."""
    x, y, z = points
    wide = np.interp(z, (-140, -60, 0, 70), (136, 134, 124, 92)).astype(np.float32)
    deep = np.interp(z, (-140, -60, 0, 70), (96, 95, 88, 72)).astype(np.float32)
    power = np.float32(2.3)
    ahead = y + 8
    rho = (np.abs(x / wide) ** power + np.abs(ahead / deep) ** power) ** (1 / power)
    # The spine dents the cage from behind.
    dent = 12 * np.exp(-(x / 22) ** 2) * (y < 0)
    return (1 - 1 / np.maximum(rho, np.float32(0.05))) * np.hypot(x, ahead) + dent


def skin_height(points, fat):
    """mm above the skin, negative inside. fat: mm under the skin."""
    x, y, z = points
    wide = np.interp(z, (-140, -40, 20, 70), (140, 140, 142, 146)).astype(np.float32) + fat
    deep = np.interp(z, (-140, -40, 70), (104, 106, 96)).astype(np.float32) + 0.8 * fat
    power = np.float32(2.5)
    ahead = y + 8
    rho = (np.abs(x / wide) ** power + np.abs(ahead / deep) ** power) ** (1 / power)
    return (1 - 1 / np.maximum(rho, np.float32(0.05))) * np.hypot(x, ahead)


def paint(labels, points, shapes, name, wider=0.0, times=1.0):
    """Paint tubes into `labels`, in place.

    wider, times: The radii of the tubes are multiplied by `times`, and `wider` (mm) is added.
    """
    for shape in shapes:
        wide = [(*node[:3], node[3] * times + wider) for node in shape]
        low = min(node[2] - node[3] for node in wide) - 2
        high = max(node[2] + node[3] for node in wide) + 2
        if low < points[2].max() and high > points[2].min():
            labels[tube(points, wide) < 0] = CODE[name]


def add_wall(labels, points, mirrored, wall, rough):
    """Paint muscles, ribs, sternum, shoulder blades and spine into `labels`, in place.

    wall: mm above the outer surface of the rib cage.
    """
    y, z = points[1:]
    lateral = mirrored[0]
    labels[wall < 0] = CODE["muscle"]
    pectoral = np.clip((z + 70) / 60, 0, 1) * 13 * np.exp(-((lateral - 62) / 34) ** 2)
    labels[(wall < pectoral) & (y > 0)] = CODE["muscle"]
    paint(labels, mirrored, MUSCLES, "muscle")
    paint(labels, mirrored, SCAPULA, "bone")
    # Ribs run downwards from the spine to the front, so a slice cuts several of them.
    turn = np.arctan2(lateral, y + 8) * 100                 # mm along the wall
    phase = np.mod(turn - 1.5 * z, 40) - 20
    rib = np.hypot(phase / 2.0, wall + 6) - 5
    rib = np.where((lateral > 24) | (y < 0), rib, 99)
    sternum = np.hypot(np.maximum(lateral - 14, 0), wall + 5) - 5.5
    sternum = np.where(y > 0, sternum, 99)
    bony = np.minimum(rib, sternum) + 0.3 * rough
    add_bone(labels, bony, SHELL)


def add_lungs(labels, points, wall, rough, trees):
    """Paint both lungs with their vessels, the mediastinum and the liver into `labels`, in place.

    trees: {tissue: its branches in this slice}, see near_branches.
    """
    x, y, z = points
    lateral = np.abs(x)
    inner = wall + 12
    labels[inner < 0] = CODE["fat"]
    middle = np.interp(z, (-140, -90, -20, 60), (30, 24, 24, 26)).astype(np.float32)
    middle = middle + 0.10 * np.maximum(-y - 40, 0) + 0.8 * rough
    lung = np.maximum(inner + 1.5, middle - lateral)
    labels[lung < 0] = CODE["lung"]
    inside = lung < 0
    for name, branches in trees.items():
        for box, distance in branches:
            part = labels[box]
            part[(distance < 0) & inside[box]] = CODE[name]
    fissure = np.abs(y - 6 + 0.55 * (z + 40) + 2 * rough) < 0.5
    labels[fissure & (labels == CODE["lung"]) & (lateral > 40)] = CODE["muscle"]
    liver = ellipsoid(points, (62, 4, -150), (86, 82, 62)) + 0.02 * rough
    labels[(liver < 1) & (inner < -2)] = CODE["liver"]
    stomach = ellipsoid(points, (-72, -4, -152), (62, 62, 46))
    labels[(stomach < 1) & (inner < -2)] = CODE["muscle"]
    labels[(stomach < 0.9) & (y > 6) & (inner < -2)] = CODE["gas"]
    labels[ellipsoid(points, (-96, -46, -152), (30, 34, 40)) < 0.98] = CODE["liver"]    # spleen


def add_spine(labels, points, rough):
    """Paint the vertebrae and the spinal canal into `labels`, in place."""
    x, y, z = points
    body = (ellipsoid((x, y), (0, -62), (17, 14)) - 1) * 15 + 0.4 * rough
    canal = (ellipsoid((x, y), (0, -84), (10, 8)) - 1) * 9
    lateral = np.abs(x)
    process = np.hypot(np.maximum(lateral - 26, 0), y + 86 + 0.25 * lateral) - 5
    spike = np.maximum(lateral - 3.5, np.abs(y + 98) - 11)
    bony = np.minimum(np.minimum(body, canal - 5), np.minimum(process, spike))
    add_bone(labels, bony, SHELL)
    disc = np.mod(z + 9, 24) < 5
    labels[(body < 0) & disc] = CODE["cartilage"]
    labels[canal < 0] = CODE["muscle"]


def add_heart(labels, points, rough, traits):
    """Paint the heart with its four chambers and its arteries into `labels`, in place."""
    size = traits["heart"]
    centre = (-24, 20, -80)
    # Points in a heart of the usual size.
    usual = [(p - c) / np.float32(size) + np.float32(c) for p, c in zip(points, centre)]
    x, y, z = usual
    # The long axis points to the left, to the front and down.
    sac = ellipsoid((x + 0.25 * y, y, z), (-18, 18, -80), (66, 52, 52)) + 0.02 * rough
    labels[sac < 1.06] = CODE["fat"]
    muscle = ellipsoid(usual, (-46, 20, -86), (38, 36, 44))
    outer = ellipsoid(usual, (-8, 32, -84), (48, 34, 42))
    labels[(np.minimum(muscle, outer) < 1) & (sac < 1)] = CODE["myocardium"]
    atrium = ellipsoid(usual, (0, -10, -54), (36, 20, 24)) + 0.03 * rough
    labels[atrium < 1] = CODE["left heart"]
    right_atrium = ellipsoid(usual, (32, 20, -76), (23, 27, 36)) + 0.03 * rough
    labels[right_atrium < 1] = CODE["right heart"]
    right = ellipsoid(usual, (-6, 44, -80), (36, 20, 36)) + 0.05 * rough
    labels[right < 1] = CODE["right heart"]
    left = ellipsoid(usual, (-46, 16, -84), (25, 23, 34)) + 0.06 * rough
    wall = ellipsoid(usual, (-46, 16, -84), (34, 32, 42))
    labels[wall < 1] = CODE["myocardium"]
    labels[left < 1] = CODE["left heart"]
    paint(labels, usual, VEINS, "lung vein")
    paint(labels, usual, CORONARIES, "coronary")


def add_vessels(labels, points, traits):
    """Paint the great vessels, the airways and the oesophagus into `labels`, in place."""
    paint(labels, points, SUPERIOR_CAVA, "right heart")
    paint(labels, points, INFERIOR_CAVA, "vein")
    paint(labels, points, ARTERIES, "artery")
    paint(labels, points, AORTA, "aorta", times=traits["aorta"])
    gullet = ellipsoid(points[:2], (-4, -42), (9, 6))
    labels[gullet < 1] = CODE["muscle"]
    paint(labels, points, TRACHEA, "muscle", wider=1.8)
    paint(labels, points, TRACHEA, "gas")


def bounds_of(branches):
    """The corners of the boxes around tubes with two nodes -> (first, last), both (n, 3) in mm."""
    nodes = np.array(branches)                              # (n, 2, 4)
    radius = nodes[..., 3:].max(axis=1)
    return nodes[..., :3].min(axis=1) - radius, nodes[..., :3].max(axis=1) + radius


def near_branches(branches, bounds, points, axes):
    """The branches of a vessel that reach a slice -> list of (box, distance).

    box: A part of the slice (rows, columns) that holds the branch.
    distance: mm to the branch in the box, negative inside.

    bounds: See bounds_of.
    axes: The world coordinates along x and y, in falling order. The template differs from them by
        less than `margin`.
    """
    margin = 14.0                                           # mm
    first, last = bounds
    reach = (first[:, 2] < points[2].max()) & (last[:, 2] > points[2].min())
    starts = []
    stops = []
    for k, axis in enumerate(axes):
        starts.append(np.searchsorted(-axis, -last[:, k] - margin))
        stops.append(np.searchsorted(-axis, -first[:, k] + margin))
    found = []
    for k in np.flatnonzero(reach):
        box = (slice(starts[0][k], stops[0][k]), slice(starts[1][k], stops[1][k]))
        part = [p[box] for p in points]
        if part[2].size and part[2].min() < last[k, 2] and part[2].max() > first[k, 2]:
            found.append((box, tube(part, branches[k])))
    return found


def chest_labels(seed, subject, axes, traits):
    """The tissue of every point: (len(x), len(y), len(z)) uint8, a CODE or 0 outside the body.

    Slices are made one by one, because most vessels are in few slices.
    """
    axes = (axes[0], axes[1], axes[2] + traits["offset"])
    warped = chest_points(rng_for(seed, subject, "warp"), axes, traits)
    rough = smooth_field(rng_for(seed, subject, "rough"), 10, axes, CHEST_REACH)
    uneven = smooth_field(rng_for(seed, subject, "fat"), 34, axes, CHEST_REACH)
    trees = {}
    bounds = {}
    for name, hila in HILA.items():
        rng = rng_for(seed, subject, f"{name} tree")
        trees[name] = []
        for hilum in hila:
            trees[name] += draw_tree(rng, hilum)
        bounds[name] = bounds_of(trees[name])

    labels = np.zeros(warped[0].shape, np.uint8)
    for k in range(len(axes[2])):
        points = [np.ascontiguousarray(p[..., k]) for p in warped]
        here = {}
        for name, branches in trees.items():
            here[name] = near_branches(branches, bounds[name], points, axes[:2])
        labels[..., k] = slice_labels(points, rough[..., k], uneven[..., k], here, traits)
    return labels


def slice_labels(points, rough, uneven, trees, traits):
    """The tissue of every point of one slice: (len(x), len(y)) uint8. See chest_labels.

    points: (x, y, z) in the template.
    rough, uneven: Random fields.
    trees: {tissue: its branches in this slice}, see near_branches.
    """
    mirrored = (np.abs(points[0]), points[1], points[2])
    wall = wall_height(points)
    fat = traits["fat"] + 1.5 * uneven
    above = skin_height(points, fat)
    labels = np.full(wall.shape, CODE["fat"], np.uint8)
    add_wall(labels, points, mirrored, wall, rough)
    add_lungs(labels, points, wall, rough, trees)
    nodule = traits["nodule"]
    if nodule:
        radii = (nodule["radius"],) * 3
        ball = ellipsoid(points, [nodule[axis] for axis in "xyz"], radii) + 0.1 * rough
        labels[(ball < 1) & (labels == CODE["lung"])] = CODE["muscle"]
    add_heart(labels, points, rough, traits)
    add_vessels(labels, points, traits)
    add_spine(labels, points, rough)
    labels[above > -SKIN] = CODE["muscle"]                  # skin
    labels[above > 0] = 0
    return labels


def chest_anatomy(seed, subject, grid, traits):
    """A chest on `grid` -> Anatomy. The same (seed, subject) is the same person.

    The person does not depend on the resolution of the grid.

    traits: See draw_chest.
    """
    labels = chest_labels(seed, subject, grid.axes(OVERSAMPLE), traits)
    mask, maps = mixture(labels, grid, CHEST)
    rng = rng_for(seed, subject, "tissue")
    factors = {}
    for name in CHEST:
        factors[name] = np.exp(rng.normal(0, (0.01, 0.03, 0.03))).tolist()
    variation, texture = tissue_fields(rng, grid.axes(), CHEST_REACH, (0.006, 0.05, 0.05))
    no_lesion = np.zeros(grid.shape, np.uint8)
    return Anatomy(grid, mask, maps, factors, variation, texture, no_lesion, traits)
