"""The anatomy of a woman's chest with both breasts, as she lies face down in an MR coil."""

import numpy as np

from data.phantom.anatomy import OVERSAMPLE, Anatomy, add_bone, mixture, tissue_fields
from data.phantom.geometry import Grid, ellipsoid, rng_for, smooth_field, tube
from data.phantom.physics import BREAST, CODE

BREAST_FIELD = 330      # mm along a side; the back is cut off
BREAST_REACH = 220.0    # mm; see smooth_field
HEIGHT = 108.0          # mm, of all slices together
SKIN = 2.2              # mm
NIPPLE = (84.0, 74.0)   # mm, x and y of the right nipple in the template

# Vessels of the right breast: rows (x, y, z, radius) in mm, as in `tube`. The left half is a mirror
# image, before the random warp.
VESSELS = (
    ((12, 2, 30, 2.2), (36, 24, 22, 2.0), (58, 42, 12, 1.8), (74, 54, 4, 1.4)),         # medial
    ((140, -22, 40, 2.4), (124, 14, 24, 2.2), (106, 40, 14, 1.9), (94, 58, 6, 1.4)),    # lateral
    ((128, -6, -50, 1.9), (112, 30, -26, 1.7), (98, 50, -10, 1.4)),
    ((9, -16, -70, 2.4), (9, -14, 70, 2.4)),                                    # beside the sternum
)


def breast_grid(size, slices, field=BREAST_FIELD):
    """A Grid of `field` x `field` x HEIGHT mm.

    size: Pixels along a side of a slice.
    slices: The number of slices. The index order is left, posterior, superior. World 0 lies on the
        sternum, at the height of the nipples.
    """
    pixel = field / size
    gap = HEIGHT / slices
    half = field / 2
    first = (half - pixel / 2, half - 42 - pixel / 2, -HEIGHT / 2 + gap / 2)
    return Grid((size, size, slices), (-pixel, -pixel, gap), first)


def draw_breast(rng, mean_core=12.0):
    """Draw the traits of a woman, as plain values for JSON.

    age       years
    size      of the breasts, relative
    density   of parenchyma, in standard deviations of a random field; it falls with age
    tumour    its centre (x, y, z in mm), radius `core` (mm), number and length of spikes, `rim`
              (True if only its rim takes up much contrast agent), and dose `uptake` relative to
              TISSUES
    satellite mm, the radius of a second focus near the tumour; 0 for none
    kinetics  how much contrast agent the parenchyma takes up, relative to TISSUES

    mean_core: mm, of the tumours of this set.
    """
    age = rng.uniform(30, 78)
    size = np.clip(rng.normal(1, 0.09), 0.8, 1.18)
    density = -0.025 * (age - 50) + rng.normal(0, 0.45)
    side = 1 if rng.random() < 0.5 else -1
    turn = rng.uniform(0, 2 * np.pi)
    out = rng.uniform(6, 28)
    depth = rng.uniform(8, 44)
    core = np.clip(mean_core * np.exp(rng.normal(0, 0.3)), 7, 24)
    tumour = {"x": side * (NIPPLE[0] + out * np.cos(turn)) * (0.5 + 0.5 * size),
              "y": depth * size,
              "z": out * np.sin(turn) * 1.3,
              "core": core,
              "spikes": float(rng.integers(5, 10)),
              "length": rng.uniform(0, 0.55),
              "rim": float(rng.random() < 0.4),
              "uptake": rng.uniform(0.8, 1.5)}
    satellite = rng.uniform(4, 7) if rng.random() < 0.3 else 0.0
    return {"age": float(age), "sex": "F", "size": float(size), "density": float(density),
            "tumour": {name: float(value) for name, value in tumour.items()},
            "satellite": float(satellite),
            "kinetics": float(np.exp(rng.normal(0, 0.3)))}


def breast_points(rng, axes):
    """For every point of the grid, the point (x, y, z) of the template that is found there."""
    points = []
    for p in np.meshgrid(*axes, indexing="ij"):
        shift = (3.5 * smooth_field(rng, 55, axes, BREAST_REACH)
                 + 1.2 * smooth_field(rng, 22, axes, BREAST_REACH))             # mm
        points.append(p.astype(np.float32) + shift)
    return points


def skin_distance(points, size):
    """mm above the skin, negative inside -> (of the whole body, of the breasts alone).

    size: Of the breasts, relative.
    """
    x, y, z = points
    lateral = np.abs(x)
    chest = (ellipsoid((x, y), (0, -112), (152, 112)) - 1) * 112
    # A breast hangs down from the chest. It is blunt at the nipple and steep at the sides.
    wide = np.where(lateral > 82, 66, 62) * size
    ahead = np.maximum(y + 32, 0) / (108 * size)
    across = np.abs(lateral - 82) / wide
    along = np.abs(z) / (84 * size)
    power = np.float32(2.4)
    rho = (across ** power + ahead ** power + along ** power) ** (1 / power)
    breast = (rho - 1) * 62 * size
    nipple = ellipsoid((lateral, y, z), (82, 108 * size - 32, 0), (5, 7, 6))
    breast = np.minimum(breast, (nipple - 1) * 6)
    # The two surfaces run into each other smoothly, without a crease.
    blend = np.float32(10)
    share = np.clip(0.5 + 0.5 * (chest - breast) / blend, 0, 1)
    body = chest + (breast - chest) * share - blend * share * (1 - share)
    return body, breast


def add_chest(labels, points, rough):
    """Paint muscle, ribs, sternum, lungs and heart into `labels`, in place."""
    x, y, z = points
    lateral = np.abs(x)
    wall = (ellipsoid((x, y), (0, -118), (136, 104)) - 1) * 104 + 0.6 * rough
    labels[wall < 0] = CODE["muscle"]
    pectoral = np.maximum(wall - 9 * np.clip((lateral - 14) / 30, 0, 1), y * 0 - lateral + 10)
    labels[(pectoral < 0) & (y > -80)] = CODE["muscle"]
    labels[(np.abs(wall + 1) < 1.2) & (lateral > 12)] = CODE["fat"]
    # Ribs run obliquely, so a slice cuts each of them once on either side.
    turn = np.arctan2(lateral, y + 118) * 90                # mm along the wall
    phase = np.mod(turn + 1.4 * z, 34) - 17
    rib = np.hypot(phase / 1.8, wall + 10) - 4.5
    rib = np.where(lateral > 16, rib, 99)
    sternum = np.hypot(np.maximum(lateral - 12, 0), wall + 9) - 5
    bony = np.minimum(rib, sternum)
    add_bone(labels, bony, 2.0)
    inner = wall + 17
    labels[inner < 0] = CODE["fat"]
    lung = np.maximum(inner + 2, 24 - lateral + 0.12 * (y + 60))
    labels[lung < 0] = CODE["lung"]
    heart = ellipsoid(points, (-26, -74, -14), (54, 46, 62)) + 0.03 * rough
    labels[heart < 1.06] = CODE["fat"]
    labels[heart < 1] = CODE["myocardium"]
    left = ellipsoid(points, (-42, -84, -18), (25, 27, 44))
    right = ellipsoid(points, (-4, -62, -12), (24, 22, 44))
    labels[(np.minimum(left, right) + 0.05 * rough < 1) & (heart < 0.95)] = CODE["vein"]
    aorta = np.hypot(x + 26, y + 168) - 13
    labels[aorta < 0] = CODE["vein"]
    spine = ellipsoid((x, y), (0, -176), (22, 17))
    add_bone(labels, 17 * (spine - 1), 2.4)


def add_parenchyma(labels, points, breast, fields, traits):
    """Paint the glandular tissue of both breasts into `labels`, in place.

    It is a cone that opens from the nipple towards the chest. Lobules of fat lie in it, and thin
    ligaments run from it to the skin.

    breast: mm above the skin of the breast, negative inside.
    """
    x, y, z = points
    lateral = np.abs(x)
    size = np.float32(traits["size"])
    lobes = fields["lobes"]
    strands = fields["strands"]
    back = np.clip((76 * size - y) / (90 * size), 0, 1)     # 0 at the nipple, 1 at the chest
    cone = np.hypot((lateral - 84) / (14 + 44 * back), z / (14 + 56 * back))
    inside = 1.0 - cone ** 2 - 0.5 * np.maximum(-y - 4, 0) / 10
    dense = inside + 0.55 * lobes + 0.35 * strands + 0.45 * traits["density"]
    labels[(dense > 0.35) & (breast < -7)] = CODE["parenchyma"]
    ducts = np.hypot((lateral - 84), z) - 5 - 9 * back
    labels[(ducts < 0) & (back < 0.35) & (breast < -SKIN)] = CODE["parenchyma"]
    ligament = (np.abs(strands) < 0.10) & (np.abs(lobes) < 1.2) & (breast < 0)
    labels[ligament & (y > -8) & (labels == CODE["fat"])] = CODE["parenchyma"]


def add_tumour(labels, world, rough, traits):
    """Paint the cancer into `labels`, in place: a mass with spikes.

    If the tumour has a rim, the core inside is dead.

    world: The place (x, y, z) of every point in the world, before the warp.
    """
    tumour = traits["tumour"]
    core = tumour["core"]
    away = [p - np.float32(tumour[axis]) for p, axis in zip(world, "xyz")]
    distance = np.sqrt(sum(d ** 2 for d in away))
    turn = np.arctan2(away[1], away[0]) * tumour["spikes"]
    spike = np.maximum(np.cos(turn + 0.3 * away[2] + rough), 0) ** 6 * tumour["length"] * core
    depth = core + 0.10 * core * rough + spike - distance   # mm below the surface
    if traits["satellite"]:
        beside = (away[0] - 1.6 * core, away[1] + 0.6 * core, away[2])
        focus = traits["satellite"] - np.sqrt(sum(d ** 2 for d in beside))
        depth = np.maximum(depth, focus)
    soft = np.isin(labels, [CODE[name] for name in ("fat", "parenchyma", "vein")])
    labels[(depth > 0) & soft] = CODE["tumour"]
    if tumour["rim"]:
        dead = (distance < 0.55 * core + 0.12 * core * rough) & (core > 7)
        labels[dead & (labels == CODE["tumour"])] = CODE["necrosis"]


def breast_labels(seed, subject, axes, traits):
    """The tissue of every point: (len(x), len(y), len(z)) uint8, a CODE or 0 outside the body."""
    points = breast_points(rng_for(seed, subject, "warp"), axes)
    fields = {}
    for name, lattice in (("rough", 8), ("lobes", 9), ("strands", 5)):
        fields[name] = smooth_field(rng_for(seed, subject, name), lattice, axes, BREAST_REACH)
    mirrored = (np.abs(points[0]), points[1], points[2])
    body, breast = skin_distance(points, np.float32(traits["size"]))
    labels = np.full(body.shape, CODE["fat"], np.uint8)
    add_parenchyma(labels, points, breast, fields, traits)
    for shape in VESSELS:
        labels[tube(mirrored, shape) < 0] = CODE["vein"]
    world = np.meshgrid(*[a.astype(np.float32) for a in axes], indexing="ij")
    add_tumour(labels, world, fields["rough"], traits)
    add_chest(labels, points, fields["rough"])
    labels[body > -SKIN] = CODE["muscle"]                   # skin
    labels[body > 0] = 0
    return labels


def breast_anatomy(seed, subject, grid, traits):
    """A chest with two breasts on `grid` -> Anatomy. The same (seed, subject) is the same woman.

    She does not depend on the resolution of the grid. Anatomy.labels is 1 in the tumour.

    traits: See draw_breast.
    """
    labels = breast_labels(seed, subject, grid.axes(OVERSAMPLE), traits)
    mask, maps = mixture(labels, grid, BREAST)
    rng = rng_for(seed, subject, "tissue")
    factors = {}
    for name in BREAST:
        factors[name] = np.exp(rng.normal(0, (0.01, 0.03, 0.03))).tolist()
    variation, texture = tissue_fields(rng, grid.axes(), BREAST_REACH)
    lesion = maps["tumour"] + maps["necrosis"] > 0.5
    return Anatomy(grid, mask, maps, factors, variation, texture, lesion.astype(np.uint8), traits)
