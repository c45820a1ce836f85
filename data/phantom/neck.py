"""The anatomy of head and neck, from the ventricles down to the thyroid, with or without cancer."""

import numpy as np

from data.phantom.anatomy import Anatomy, add_bone, mixture, tissue_fields
from data.phantom.geometry import Grid, ellipsoid, rng_for, smooth_field, tube, tubes
from data.phantom.head import CENTRE, draw_traits, head_labels, template_points
from data.phantom.physics import BRAIN, CODE, NECK

NECK_FIELD = 256        # mm along a side; this holds every head, and shoulders are cut off
NECK_POINTS = 2         # points along a side of a pixel; see `mixture`
NECK_REACH = 200.0      # mm; see smooth_field
BOTTOM = -176.0         # mm, the lower end of the lowest slice
HEIGHT = 204.0          # mm, of all slices together
SHELL = 2.4             # mm of compact bone around marrow
SKIN = 2.0              # mm
BRAIN_FLOOR = -52.0     # mm; nothing of the cerebrum lies lower

# The outline of the face and neck without fat and skin: rows (z, front, back, half of the width) in
# mm. It is interpolated between the rows.
OUTLINE = np.array((
    (-195, 18, -84, 128),
    (-180, 20, -82, 108),
    (-165, 24, -80, 80),
    (-150, 30, -77, 64),
    (-135, 34, -74, 57),
    (-122, 42, -72, 55),
    (-112, 60, -71, 56),
    (-102, 74, -72, 58),
    (-88, 79, -76, 60),
    (-70, 80, -86, 63),
    (-55, 78, -98, 67),
    (-38, 77, -104, 70),
    (-20, 76, -108, 73),
    (0, 70, -108, 72)), np.float32)

# The right half of the body: rows (x, y, z, radius) in mm, as in `tube`. The left half is its
# mirror image, before the random warp.
MUSCLES = (
    ((58, -34, -58, 8), (55, -16, -95, 11), (42, 8, -132, 10), (22, 20, -178, 8)),  # sternomastoid
    ((13, -60, -56, 13), (17, -58, -100, 16), (22, -60, -140, 16), (30, -62, -190, 17)),
    ((35, -50, -62, 11), (40, -52, -100, 13), (46, -56, -140, 13), (58, -58, -190, 16)),
    ((42, -32, -80, 8), (46, -40, -125, 10), (54, -44, -190, 12)),          # levator scapulae
    ((30, -70, -112, 4), (58, -60, -145, 7), (96, -48, -190, 16)),          # trapezius
    ((30, -14, -100, 7), (36, -14, -140, 10), (48, -8, -190, 12)),          # scalenes
    ((9, 3, -66, 5), (9, 0, -120, 5), (12, -8, -190, 6)),                   # longus colli
    ((10, 32, -124, 5), (14, 28, -150, 6), (14, 22, -190, 6)),              # straps
    ((61, 20, -52, 6), (62, 16, -75, 10), (58, 14, -94, 7)),                # masseter
    ((60, 18, -46, 6), (64, 8, -20, 7), (66, -4, 0, 5)),                    # temporalis
    ((30, 16, -52, 7), (38, 14, -74, 9), (44, 10, -92, 6)),                 # pterygoids
    ((7, 40, -100, 9), (7, 52, -104, 8), (7, 60, -104, 7)),                 # floor of the mouth
    ((20, 34, -102, 5), (28, 44, -98, 5)),
    ((14, 30, -113, 6), (20, 46, -108, 5), (12, 60, -108, 4)),              # digastric
    ((38, 62, -72, 3), (50, 44, -74, 4)),                                   # cheek
)
NOSE = ((0, 80, -20, 4), (0, 90, -40, 7), (0, 88, -52, 10))
OPTIC_NERVE = (((33, 48, -30, 2), (22, 30, -30, 2), (10, 12, -29, 2.5)),)
OCULAR = (                                                                  # muscles of the eye
    ((34, 56, -24, 2.5), (26, 36, -26, 3.0), (16, 20, -28, 2.0)),
    ((34, 56, -36, 2.5), (26, 36, -34, 3.0), (16, 20, -30, 2.0)),
    ((22, 58, -30, 2.5), (17, 38, -30, 3.0), (13, 22, -29, 2.0)),
    ((45, 58, -30, 2.0), (36, 38, -30, 3.0), (20, 20, -29, 2.0)),
)
MANDIBLE = (
    ((0, 70, -102, 7), (14, 67, -101, 7), (28, 53, -98, 7), (44, 24, -90, 7), (51, 8, -80, 7),
     (53, 2, -62, 6), (55, -2, -44, 6)),
)
CHEEK_BONE = (
    ((34, 66, -44, 6), (50, 52, -44, 7), (62, 30, -42, 3.5), (68, 6, -42, 3.0)),
    ((46, 58, -20, 5), (50, 52, -40, 6)),
)
UPPER_JAW = (((0, 68, -64, 6), (14, 65, -64, 6), (25, 52, -63, 7), (31, 32, -60, 7)),)
TEETH = (
    ((0, 74, -73, 4), (14, 70, -73, 4), (25, 55, -72, 5), (31, 35, -71, 5)),
    ((0, 71, -88, 3.5), (13, 67, -88, 4), (25, 53, -88, 5), (33, 36, -86, 5)),
)
SKULL_BASE = (
    ((20, -14, -40, 8), (44, -24, -40, 12), (64, -34, -40, 13)),            # petrous bone
    ((62, -36, -48, 12), (58, -32, -66, 7)),                                # mastoid process
    ((0, 6, -36, 8), (0, -2, -48, 7), (0, -6, -56, 5)),                     # clivus
    ((20, -30, -58, 6), (14, -44, -62, 5), (0, -62, -62, 5)),               # around the foramen
    ((16, 12, -44, 5), (22, 10, -62, 4)),                                   # pterygoid process
)
PAROTID = (((58, -6, -52, 9), (60, -8, -68, 13), (57, -4, -84, 11), (54, -2, -96, 6)),)
VESSELS = (
    ((24, -8, -50, 3.0), (26, -4, -80, 3.5), (27, 0, -112, 4.5), (22, 2, -150, 4.0),
     (20, -2, -190, 4.5)),
    ((32, -12, -50, 5.0), (34, -6, -90, 5.5), (34, 2, -125, 6.5), (30, 4, -160, 7.0),
     (26, 2, -190, 7.0)),
)
AIRWAY = (
    ((0, 14, -46, 9), (0, 11, -60, 9), (0, 12, -74, 7), (0, 9, -90, 8), (0, 8, -104, 10),
     (0, 12, -118, 9), (0, 17, -130, 6), (0, 16, -137, 3.5), (0, 13, -146, 8), (0, 8, -160, 9),
     (0, 2, -195, 9)),
)
HYOID = (((0, 35, -116, 4), (14, 30, -116, 3.5), (24, 12, -113, 3), (26, 2, -110, 2.5)),)
CORD = ((0, -24, -50, 8), (0, -30, -66, 6), (0, -35, -100, 6), (0, -38, -140, 6), (0, -46, -195, 6))

# Where cancer of the head and neck begins: (x, y, z) in mm on the right side.
SITES = {"tonsil": (19, 10, -84), "base of tongue": (10, 21, -96), "supraglottis": (10, 16, -120),
         "nasopharynx": (11, 4, -58), "oral tongue": (15, 38, -84)}
# And where lymph nodes lie, from level II to level IV.
NODES = ((39, -6, -96), (41, 4, -112), (38, 6, -128), (36, 4, -144), (34, 0, -160))


def neck_grid(size, slices, field=NECK_FIELD):
    """A Grid of `field` x `field` x HEIGHT mm, from the thyroid to the ventricles.

    size: Pixels along a side of a slice.
    slices: The number of slices. The index order is left, posterior, superior.
    """
    pixel = field / size
    gap = HEIGHT / slices
    half = field / 2
    first = (half - pixel / 2, half - 6 - pixel / 2, BOTTOM + gap / 2)
    return Grid((size, size, slices), (-pixel, -pixel, gap), first)


def draw_neck(rng, healthy=0.0):
    """Draw the traits of a patient, as plain values for JSON.

    Those of draw_traits, without a tumour of the brain, and:

    offset    mm by which the bed lies too low
    fat       mm under the skin
    density   of the mineral in bone, relative
    primary   the site of the cancer, its centre (mm), radius `core` (mm), and the fraction `push`
              by which it moves its surroundings; None for a healthy person
    nodes     list of (x, y, z, radius in mm, True for a metastasis)
    necrosis  how much of the tumours is dead, in standard deviations of a random field
    suv       of the living part of the tumours

    Large tumours take up more, and have more necrosis.

    organs    see draw_organs

    healthy: The part of patients who have no cancer.
    """
    traits = draw_traits(rng, tumour=False)
    traits["offset"] = float(rng.uniform(-7, 7))
    traits["fat"] = float(np.clip(4.5 * np.exp(rng.normal(0, 0.35)), 2, 9))
    traits["density"] = float((1 - 0.004 * (traits["age"] - 55)) * np.exp(rng.normal(0, 0.06)))
    site = str(rng.choice(list(SITES)))
    side = 1 if rng.random() < 0.5 else -1
    core = rng.uniform(9, 17)
    push = rng.uniform(0.15, 0.35)
    traits["suv"] = float(np.clip(4 + 0.6 * (core - 7) + rng.normal(0, 1.5), 3.5, 12))
    traits["necrosis"] = float(0.14 * (core - 13) + rng.normal(0, 0.4))
    well = bool(rng.random() < healthy)
    traits["primary"] = None
    if not well:
        x, y, z = place_in_world(SITES[site], side, traits)
        traits["primary"] = {"site": site, "x": x, "y": y, "z": z, "core": float(core),
                             "push": float(push)}
    traits["nodes"] = []
    for place in NODES:
        for which in (side, -side):
            metastatic = rng.random() < (0.35 if which == side else 0.08) and not well
            radius = rng.uniform(7, 13) if metastatic else rng.uniform(2.5, 4.5)
            x, y, z = place_in_world(place, which, traits)
            node = (x, y, z, float(radius), bool(metastatic))
            traits["nodes"].append(node)
    return traits


def draw_organs(rng, prevalence):
    """Draw whether a disease like amyloidosis sits in tongue, salivary glands and thyroid.

    The result holds plain values for JSON:

    label     1 for a patient with the disease, else 0
    uptake    of these organs relative to TISSUES; about 2.3 times as high with the disease
    hu        what these organs have more than TISSUES says, in HU
    size      of these organs, relative

    The disease changes hu and size by less than half of what healthy people differ by. CT therefore
    hardly shows it.

    prevalence: The part of patients who have it.
    """
    sick = bool(rng.random() < prevalence)
    uptake = np.exp(rng.normal(0, 0.12)) * (2.3 if sick else 1.0)
    hu = rng.normal(0, 8) + (3 if sick else 0)
    size = np.clip(rng.normal(1, 0.06), 0.88, 1.12) + (0.02 if sick else 0)
    return {"label": int(sick), "uptake": float(uptake), "hu": float(hu), "size": float(size)}


def place_in_world(place, side, traits):
    """A point (x, y, z) of the right half of the template -> where a patient has it, in mm.

    side: 1 for the right, -1 for the left.
    """
    mirrored = (side * place[0], place[1], place[2])
    return [float((p - c) * traits["size"] + c) for p, c in zip(mirrored, CENTRE)]


def face_height(points):
    """mm above the fascia under the fat of face and neck, negative inside."""
    x, y, z = points
    front = np.interp(z, OUTLINE[:, 0], OUTLINE[:, 1]).astype(np.float32)
    back = np.interp(z, OUTLINE[:, 0], OUTLINE[:, 2]).astype(np.float32)
    wide = np.interp(z, OUTLINE[:, 0], OUTLINE[:, 3]).astype(np.float32)
    middle = back + 0.55 * (front - back)
    ahead = y - middle
    reach = np.where(ahead > 0, front - middle, middle - back)
    # A face is pointed in front and blunt at the back.
    power = np.float32(2.3)
    rho = (np.abs(x / wide) ** power + np.abs(ahead / reach) ** power) ** (1 / power)
    from_middle = np.hypot(x, ahead)
    height = (1 - 1 / np.maximum(rho, np.float32(0.05))) * from_middle
    return np.minimum(height, tube(points, NOSE))


def skull_floor(x, y):
    """The height z (mm) of the floor of the skull under the cerebrum.

    It falls in three steps: domes above the eyes, bowls under the temporal lobes, and the tent of
    the cerebellum.
    """
    lateral = np.abs(x)
    domes = -7 - 0.012 * ((lateral - 30) ** 2 + (y - 48) ** 2)
    bowls = -42 + 0.012 * ((lateral - 38) ** 2 + (y + 4) ** 2)
    tent = -20 - 0.25 * lateral
    saddle = -12 - 0.1 * np.abs(y)
    side = np.clip((lateral - 12) / 8, 0, 1)
    front = np.clip((y - 14) / 10, 0, 1)
    back = np.clip((-26 - y) / 12, 0, 1)
    middle = (1 - side) * saddle + side * bowls
    return front * domes + (1 - front) * ((1 - back) * middle + back * tent)


def near(shapes, z, margin=4.0):
    """Those of several tubes that reach the heights z of a slice.

    margin: mm by which they may be wider than their nodes say.
    """
    low = z.min() - margin
    high = z.max() + margin
    found = []
    for shape in shapes:
        top = max(node[2] + node[3] for node in shape)
        bottom = min(node[2] - node[3] for node in shape)
        if bottom < high and top > low:
            found.append(shape)
    return found


def paint_tubes(labels, points, shapes, name):
    """Paint all that lies in one of several tubes into `labels`, in place."""
    shapes = near(shapes, points[2])
    if shapes:
        labels[tubes(points, shapes) < 0] = CODE[name]


def add_muscles(labels, mirrored, streaks):
    """Paint muscles into `labels`, in place. Fat remains where two of them meet."""
    shapes = near(MUSCLES, mirrored[2])
    first = np.full(labels.shape, np.inf, np.float32)       # distance to the nearest muscle
    second = first                                          # and to the one after it
    for shape in shapes:
        distance = tube(mirrored, shape)
        second = np.minimum(second, np.maximum(first, distance))
        first = np.minimum(first, distance)
    labels[(first < 1.5) & (second - first > 1.5) & (streaks < 2.2)] = CODE["muscle"]


def add_spine(labels, points, rough):
    """Paint the vertebrae, the discs and the spinal cord into `labels`, in place."""
    x, y, z = points
    axis = np.interp(z, (-195, -140, -100, -60), (-28, -20, -16, -12)).astype(np.float32)
    behind = axis - 19                                      # the middle of the canal
    phase = np.mod(z + 70, 17)                              # mm above the lower end of a vertebra
    body = (ellipsoid((x, y), (0, axis), (13, 9)) - 1) * 10 + 0.4 * rough
    canal = (ellipsoid((x, y), (0, behind), (12, 8.5)) - 1) * 9
    arch = np.maximum(canal - 5, -y + behind - 8)
    facet = np.hypot(np.abs(x) - 18, y - axis + 10) - 8
    spike = np.maximum(np.abs(x) - 3.5, np.abs(y - behind + 20) - 13) + (phase > 9) * 4.0
    bony = np.minimum(np.minimum(body, facet), np.minimum(arch, spike))
    is_neck = z < -62
    bony = np.where(is_neck, bony, 99)
    add_bone(labels, bony, SHELL)
    labels[(body < 0) & (phase < 4) & is_neck] = CODE["cartilage"]
    inside = (canal < 0) & (z < -56)
    labels[inside] = CODE["csf"]
    labels[inside & (tube(points, CORD) < 0)] = CODE["wm"]


def add_face(labels, points, mirrored, rough, fine):
    """Paint eyes, jaws, teeth and the cavities of the nose into `labels`, in place.

    fine: A random field with a scale of a few mm, for cells of air and for gaps between teeth.
    """
    y, z = points[1:]
    lateral = mirrored[0]
    orbit = ellipsoid(mirrored, (31, 44, -30), (19, 30, 18))
    labels[(orbit < 1.12) & (y < 62)] = CODE["bone"]
    labels[orbit < 1] = CODE["fat"]
    paint_tubes(labels, mirrored, OCULAR, "muscle")
    paint_tubes(labels, mirrored, OPTIC_NERVE, "wm")
    globe = ellipsoid(mirrored, (33, 60, -30), (12.5, 12.5, 12.5))
    labels[globe < 1.1] = CODE["muscle"]
    labels[globe < 1] = CODE["csf"]
    labels[ellipsoid(mirrored, (33, 68, -30), (5, 2.8, 5)) < 1] = CODE["cartilage"]

    shapes = near(CHEEK_BONE + UPPER_JAW, z)
    if shapes:
        add_bone(labels, tubes(mirrored, shapes) + 0.5 * rough, SHELL)
    maxilla = ellipsoid(mirrored, (28, 46, -48), (16, 20, 16))
    labels[maxilla < 1.13] = CODE["bone"]
    labels[maxilla < 1] = CODE["gas"]
    nose = ellipsoid(points, (0, 46, -44), (14, 36, 20))
    labels[nose < 1] = CODE["gas"]
    level = z + 40 + 12 * np.round((-z - 40) / 12)          # mm above the nearest of the turbinates
    turbinate = np.hypot(lateral - 8 + 0.8 * fine, level) < 4.5
    labels[(nose < 1) & (turbinate | (lateral < 1.4))] = CODE["mucosa"]
    ethmoid = (ellipsoid(points, (0, 40, -22), (14, 24, 12)) < 1) & (z < -13)
    labels[ethmoid] = CODE["gas"]
    labels[ethmoid & (np.abs(fine) < 0.25)] = CODE["bone"]
    sphenoid = ellipsoid(points, (0, 14, -28), (15, 12, 10))
    labels[sphenoid < 1.2] = CODE["bone"]
    labels[(sphenoid < 1) & (lateral > 1)] = CODE["gas"]
    labels[ellipsoid(points, (0, 46, -63), (23, 25, 2)) < 1] = CODE["bone"]     # hard palate

    shapes = near(MANDIBLE, z)
    if shapes:
        add_bone(labels, tubes(mirrored, shapes) + 0.4 * rough, SHELL)
    shapes = near(TEETH, z)
    if shapes:
        gaps = np.abs(np.mod(np.arctan2(mirrored[0], y - 30) * 52, 8) - 4) > 3.5
        labels[(tubes(mirrored, shapes) < 0) & ~gaps] = CODE["tooth"]


def add_throat(labels, points, mirrored, rough, fine, traits):
    """Paint tongue, glands, airway, larynx and vessels into `labels`, in place."""
    x, y, z = points
    lateral = mirrored[0]
    swell = traits["organs"]["size"]
    tongue = ellipsoid(points, (0, 40, -84), (24 * swell, 30 * swell, 17 * swell)) + 0.04 * rough
    labels[tongue < 1.1] = CODE["mucosa"]
    labels[tongue < 1] = CODE["tongue"]
    labels[(tongue < 0.85) & (lateral < 1.2)] = CODE["fat"]             # the septum
    labels[(tongue < 1) & (fine > 2.0)] = CODE["fat"]
    shapes = near(PAROTID, z)
    if shapes:
        parotid = tubes(mirrored, shapes) + rough - 10 * (swell - 1)
        labels[(parotid < 0) & (labels != CODE["bone"]) & (labels != CODE["marrow"])] = (
            CODE["salivary"])
        labels[(parotid < 0) & (fine > 1.6)] = CODE["fat"]
    below = ellipsoid(mirrored, (31, 24, -104), (10 * swell, 15 * swell, 12 * swell))
    labels[below + 0.08 * rough < 1] = CODE["salivary"]
    paint_tubes(labels, mirrored, VESSELS, "vein")

    airway = tube(points, AIRWAY[0]) + 0.5 * rough
    labels[airway < 4] = CODE["mucosa"]
    tonsil = ellipsoid(mirrored, (16, 10, -84), (6.5, 10, 13)) + 0.05 * rough
    labels[tonsil < 1] = CODE["tonsil"]
    adenoid = ellipsoid(points, (0, 0, -54), (14, 6, 10))
    labels[adenoid < 1] = CODE["tonsil"]
    labels[ellipsoid(points, (0, 24, -98), (17, 7, 9)) < 1] = CODE["tonsil"]
    labels[airway < 0] = CODE["gas"]
    labels[ellipsoid(points, (0, 17, -110), (9, 2.2, 7)) < 1] = CODE["mucosa"]  # epiglottis

    wedge = 0.9 * lateral + (y - 34)                    # the two plates of the thyroid cartilage
    plates = (np.abs(wedge) < 2.6) & (y > -2) & (z < -122) & (z > -146)
    labels[plates & (lateral < 26)] = CODE["cartilage"]
    ring = np.abs(np.hypot(x, y - 13) - 13.5) < 2.5
    labels[ring & (z < -146) & (z > -156)] = CODE["cartilage"]
    paint_tubes(labels, mirrored, HYOID, "bone")
    lobe = ellipsoid(mirrored, (19 * swell, 9, -160), (9 * swell, 11 * swell, 24 * swell))
    isthmus = ellipsoid(points, (0, 20, -162), (16, 4, 9))
    labels[(np.minimum(lobe, isthmus) + 0.06 * rough < 1) & (airway > 2)] = CODE["thyroid"]
    gullet = ellipsoid((x, y), (-3, -8 + 0.1 * (z + 160)), (8, 5))
    labels[(gullet < 1) & (z < -148)] = CODE["muscle"]


def add_lesions(labels, world, traits, rough, fine):
    """Paint lymph nodes and cancer into `labels`, in place. Air and bone resist the nodes.

    world: The place (x, y, z) of every point in the world, before the warp.
    """
    hard = np.isin(labels, [CODE["bone"], CODE["gas"], CODE["tooth"], CODE["cartilage"]])
    hard |= labels == CODE["marrow"]
    depth = np.full(labels.shape, -np.inf, np.float32)      # mm below the surface of a tumour
    for x, y, z, radius, metastatic in traits["nodes"]:
        ball = ellipsoid(world, (x, y, z), (radius, radius, 1.3 * radius))
        distance = (ball - 1) * np.float32(radius)
        if metastatic:
            depth = np.where(hard, depth, np.maximum(depth, -distance - 0.8 * rough))
        else:
            labels[(distance < 0) & ~hard] = CODE["node"]
    primary = traits["primary"]
    if primary:
        core = primary["core"]
        ball = ellipsoid(world, [primary[axis] for axis in "xyz"], (core, core, 1.2 * core))
        distance = (ball - 1) * np.float32(core)
        # It grows over the wall of the airway, so that the airway bulges inwards.
        bone = hard & (labels != CODE["gas"])
        inward = np.where(labels == CODE["gas"], 2.5, 0)
        grown = np.maximum(depth, -distance - 1.5 * rough - inward)
        depth = np.where(bone, depth, grown)
    labels[depth > 0] = CODE["tumour"]
    labels[(depth > 3) & (fine + 0.12 * depth < traits["necrosis"] - 0.6)] = CODE["necrosis"]


def add_skull_base(labels, points, mirrored, rough, fine):
    """Paint what lies behind the face and under the cerebrum into `labels`, in place.

    That is the cerebellum, the brain stem, the bone around them, and the cells of air in it.
    """
    y, z = points[1:]
    fossa = ellipsoid(mirrored, (14, -58, -42), (42, 34, 24))
    stem = ellipsoid(points, (0, -22, -36), (17, 18, 24))
    inside = (np.minimum(fossa, stem) < 1) & (z < -18)
    shell = (np.minimum(fossa, stem) < 1.11) & (z < -18)
    labels[shell] = CODE["bone"]
    shapes = near(SKULL_BASE, z)
    if shapes:
        base = tubes(mirrored, shapes) + rough
        add_bone(labels, base, 3.0)
        cells = ellipsoid(mirrored, (60, -38, -48), (10, 13, 18)) < 1
        labels[cells & (base < -1) & (fine > -0.2)] = CODE["gas"]
        canal = ((42, -22, -42, 2.5), (76, -20, -44, 4.0))
        labels[tube(mirrored, canal) < 0] = CODE["gas"]
    labels[inside] = CODE["csf"]
    cerebellum = ellipsoid(mirrored, (18, -58, -42), (33, 29, 20))
    labels[(cerebellum < 1) & inside] = CODE["gm"]
    folia = np.abs(np.mod(z + 0.45 * y + 2 * rough, 9) - 4.5) < 1.1
    core = ellipsoid(mirrored, (17, -50, -42), (15, 13, 9)) + 0.15 * fine < 1
    labels[(cerebellum < 0.88) & inside & (folia | core)] = CODE["wm"]
    pons = ellipsoid(points, (0, -20, -38), (15, 12, 15))
    medulla = tube(points, ((0, -22, -48, 9), (0, -27, -60, 7), (0, -31, -70, 6)))
    labels[((pons < 1) | (medulla < 0)) & (z < -18)] = CODE["wm"]
    labels[ellipsoid(points, (0, -37, -40), (7, 4, 9)) < 1] = CODE["csf"]


def add_cerebrum(labels, points, brain):
    """Paint the head of `head_labels` into `labels`, in place, down to the floor of the skull.

    brain: Its labels in this slice.
    """
    x, y, z = points
    floor = skull_floor(x, y)
    is_brain = np.isin(brain, [CODE[name] for name in BRAIN])
    upper = (brain > 0) & (z > floor - 2.5)
    labels[upper] = brain[upper]
    bottom = is_brain & (z <= floor) & (z > floor - 2.5)
    labels[bottom] = CODE["bone"]
    labels[bottom & (y < -24)] = CODE["csf"]                # the tent is no bone


def neck_labels(seed, subject, axes, traits):
    """The tissue of every point: (len(x), len(y), len(z)) uint8, a CODE or 0 outside the body.

    Slices are made one by one, because most organs are in few slices. Only the smallest box around
    the body is looked at.
    """
    axes = (axes[0], axes[1], axes[2] + traits["offset"])
    warped = template_points(rng_for(seed, subject, "warp"), axes,
                             {**traits, "tumour": traits["primary"]})
    high = axes[2] > BRAIN_FLOOR
    brain = np.zeros(warped[0].shape, np.uint8)
    if high.any():
        upper = (axes[0], axes[1], axes[2][high])
        brain[..., high] = head_labels(seed, subject, upper, {**traits, "tumour": None}, scalp=True)
    fields = {}
    for name, lattice in (("rough", 9), ("fine", 3.5), ("fat", 30)):
        rng = rng_for(seed, subject, f"neck {name}")
        fields[name] = smooth_field(rng, lattice, axes, NECK_REACH)

    labels = np.zeros(brain.shape, np.uint8)
    flat = np.meshgrid(axes[0], axes[1], indexing="ij")
    for k, z in enumerate(axes[2]):
        world = (*flat, np.full(flat[0].shape, z))
        points = [p[..., k] for p in warped]
        fat = fat_thickness(points[2], fields["fat"][..., k], traits)
        above = skin_height(points, fat)
        box = bounding_box((above < 0) | (brain[..., k] > 0))
        arrays = (*points, *world, brain[..., k], fields["rough"][..., k], fields["fine"][..., k],
                  fat, above)
        arrays = [np.ascontiguousarray(array[box], np.float32) for array in arrays]
        labels[(*box, k)] = slice_labels(arrays[:3], arrays[3:6], *arrays[6:], traits)
    return labels


def bounding_box(inside):
    """The slices (rows, columns) of the smallest box around all that is True in a 2-D array."""
    box = []
    for axis in (1, 0):
        filled = np.flatnonzero(inside.any(axis=axis))
        box.append(slice(filled[0], filled[-1] + 1) if filled.size else slice(0))
    return tuple(box)


def fat_thickness(z, uneven, traits):
    """mm of fat under the skin of face and neck. There is more of it under the chin.

    uneven: A random field.
    """
    here = np.interp(z, (-112, -60, -20), (1.2, 1.0, 0.6)).astype(np.float32)
    return traits["fat"] * here + 0.6 * uneven


def skin_height(points, fat):
    """mm above the skin of face and neck, negative inside.

    The face ends at the brow. All above is the head of `head_labels`.
    """
    return np.where(points[2] < 2, face_height(points) - fat - SKIN, np.float32(99))


def slice_labels(points, world, brain, rough, fine, fat, above, traits):
    """The tissue of every point of one slice: (len(x), len(y)) uint8. See neck_labels.

    points: (x, y, z) in the template, and world: before the warp.
    brain: What `head_labels` has here.
    rough, fine: Random fields.
    fat: mm of it under the skin.
    above: mm above the skin.
    """
    mirrored = (np.abs(points[0]), points[1], points[2])
    z = points[2]
    labels = np.full(brain.shape, CODE["fat"], np.uint8)
    if z.size and z.min() < 2:
        add_muscles(labels, mirrored, fine)
        labels[above > -fat - SKIN] = CODE["fat"]
        # The cistern between the cerebrum and the brain stem holds water.
        cistern = (brain > 0) & (mirrored[0] < 26) & (points[1] < 14) & (z > -36)
        labels[cistern] = CODE["csf"]
        add_spine(labels, points, rough)
        if z.max() > -112:
            add_face(labels, points, mirrored, rough, fine)
        if z.min() < -40:
            add_throat(labels, points, mirrored, rough, fine, traits)
        if z.max() > -74:
            add_skull_base(labels, points, mirrored, rough, fine)
        add_lesions(labels, world, traits, rough, fine)
    labels[above > -SKIN] = CODE["muscle"]
    labels[above > 0] = 0
    if brain.any():
        add_cerebrum(labels, points, brain)
    return labels


def neck_anatomy(seed, subject, grid, traits):
    """A head and neck on `grid` -> Anatomy. The same (seed, subject) is the same person.

    The person does not depend on the resolution of the grid. Anatomy.labels is 1 in a tumour.

    traits: See draw_neck.
    """
    labels = neck_labels(seed, subject, grid.axes(NECK_POINTS), traits)
    mask, maps = mixture(labels, grid, NECK, NECK_POINTS)
    rng = rng_for(seed, subject, "tissue")
    factors = {}
    for name in NECK:
        factors[name] = np.exp(rng.normal(0, (0.01, 0.03, 0.03))).tolist()
    axes = grid.axes()
    axes = (axes[0], axes[1], axes[2] + traits["offset"])
    variation, texture = tissue_fields(rng, axes, NECK_REACH, (0.006, 0.05, 0.05))
    lesion = maps["tumour"] + maps["necrosis"] > 0.5
    return Anatomy(grid, mask, maps, factors, variation, texture, lesion.astype(np.uint8), traits)
