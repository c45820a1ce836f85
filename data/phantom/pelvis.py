"""The anatomy of the male pelvis."""

import numpy as np

from data.phantom.anatomy import OVERSAMPLE, Anatomy, add_bone, mixture, tissue_fields
from data.phantom.geometry import Grid, ellipsoid, rng_for, smooth_field, tube, tubes
from data.phantom.physics import CODE, PELVIS

PELVIS_FIELD = 384                  # mm along a side; this holds the widest hips
PELVIS_REACH = 200.0                # mm; see smooth_field
PELVIS_CENTRE = (0.0, -14.0, 0.0)   # mm; a larger man is larger as seen from here
SHELL = 2.6                         # mm of compact bone; true shells have 1 to 6
HIP = (88, 0, 0)                    # mm, the centre of the right femoral head

# The right half of the body: rows (x, y, z, radius) in mm, as in `tube`. The left half is its
# mirror image, before the random warp.
FEMUR = (
    ((88, 0, 0, 15), (108, -4, -8, 15), (128, -12, -20, 17)),                   # neck
    ((138, -20, -2, 8), (136, -18, -20, 16), (130, -10, -45, 16),               # trochanter, shaft
     (128, -4, -80, 14)),
)
HIP_BONE = (
    ((98, 34, 34, 9), (82, 28, 10, 10), (60, 34, 3, 9), (32, 46, -3, 8),        # to the pubis
     (12, 50, -10, 9)),
    ((11, 50, -10, 9), (11, 46, -30, 9), (36, 16, -55, 7), (58, -24, -66, 8)),  # and below it
    ((64, -34, 30, 10), (70, -29, 2, 12), (68, -34, -28, 13), (62, -38, -60, 17)),      # ischium
)
MUSCLES = (
    ((34, -94, 30, 20), (58, -90, 0, 27), (96, -74, -16, 26),                   # gluteus maximus
     (130, -42, -44, 18)),
    ((44, -102, 66, 13), (92, -72, 56, 19), (118, -54, 24, 18),                 # and its upper half
     (128, -44, -8, 12)),
    ((112, 10, 66, 23), (130, -4, 24, 19), (144, -14, 2, 8)),                   # gluteus medius
    ((102, 22, 56, 12), (122, 8, 16, 11)),                                      # gluteus minimus
    ((126, 46, 44, 9), (142, 38, -8, 11), (146, 26, -48, 10)),                  # tensor fasciae
    ((106, 44, 14, 7), (112, 58, -14, 13), (114, 60, -48, 16)),                 # rectus femoris
    ((122, 56, 44, 8), (98, 72, -8, 8), (82, 74, -48, 9)),                      # sartorius
    ((68, 18, 70, 21), (74, 36, 30, 19), (84, 42, 4, 16), (106, 26, -22, 13),   # iliopsoas
     (112, -2, -50, 10)),
    ((40, 46, -6, 8), (62, 40, -28, 15), (90, 20, -60, 20)),                    # pectineus
    ((20, 60, -28, 9), (45, 66, -60, 18)),                                      # adductors
    ((46, 20, -40, 12), (84, -12, -32, 9), (118, -22, -20, 5)),                 # obturator externus
    ((47, 14, 12, 8), (47, -14, -8, 9), (46, -4, -34, 9)),                      # obturator internus
    ((34, -84, 44, 12), (76, -62, 32, 13), (122, -30, 14, 6)),                  # piriformis
    ((80, -44, -34, 9), (116, -38, -30, 9)),                                    # quadratus femoris
    ((144, 4, -30, 10), (142, 0, -60, 20)),                                     # vastus lateralis
    ((20, 70, 60, 9), (16, 66, 5, 6)),                                          # rectus abdominis
)
VESSELS = (
    ((40, 10, 70, 5.5), (62, 56, 18, 5.5), (78, 66, -10, 5.5), (82, 66, -50, 5)),
    ((36, -4, 70, 6.5), (52, 47, 18, 6.5), (65, 62, -10, 6.5), (68, 62, -50, 6)),
)
SEMINAL_VESICLE = ((5, -13, 8, 4.5), (20, -18, 12, 6), (36, -24, 18, 4))
# The rectum lies in the midline. Its radius here is relative to that of the man.
RECTUM = ((0, -50, -55, -6), (0, -44, -32, -3), (0, -40, -14, 0), (2, -54, 18, 1), (8, -68, 46, 0),
          (0, -56, 66, -2), (-24, -26, 72, -3))


def pelvis_grid(size, slices):
    """A Grid of PELVIS_FIELD x PELVIS_FIELD x 96 mm, from the ischium to the sacrum.

    size: Pixels along a side of a slice.
    slices: The number of slices. The index order is left, posterior, superior.
    """
    pixel = PELVIS_FIELD / size
    gap = 96 / slices
    half = PELVIS_FIELD / 2
    first = (half - pixel / 2, half + PELVIS_CENTRE[1] - pixel / 2, -40 + gap / 2)
    return Grid((size, size, slices), (-pixel, -pixel, gap), first)


def draw_pelvis(rng):
    """Draw the traits of a man, as plain values for JSON.

    age       years
    size      of the body, relative; depth is its extent from front to back, relative to the size
    fat       mm under the skin
    bladder   ml, and prostate in ml as well
    rectum    mm, the radius
    gas       how much of it is in the rectum, in standard deviations of a random field
    density   of the mineral in bone, relative

    With age the prostate grows and the bones lose mineral. The loss shows in CT only, so MR cannot
    tell it.
    """
    age = rng.uniform(52, 84)
    drawn = {"age": age,
             "size": np.clip(rng.normal(1, 0.025), 0.94, 1.06),
             "depth": rng.normal(1, 0.03),
             "fat": np.clip(16 * np.exp(rng.normal(0, 0.3)), 9, 26),
             "bladder": rng.uniform(70, 380),
             "prostate": np.clip((25 + 0.9 * (age - 50)) * np.exp(rng.normal(0, 0.25)), 20, 90),
             "rectum": rng.uniform(12, 18),
             "gas": rng.uniform(-1.2, 1.2),
             "density": (1 - 0.008 * (age - 68)) * np.exp(rng.normal(0, 0.06))}
    return {"sex": "M", **{key: float(value) for key, value in drawn.items()}}


def pelvis_points(rng, axes, traits):
    """For every point of the grid, the point (x, y, z) of the template pelvis that is found there.

    A random warp and the size of the body move the points.
    """
    scales = (traits["size"], traits["size"] * traits["depth"], traits["size"])
    points = []
    for p, centre, scale in zip(np.meshgrid(*axes, indexing="ij"), PELVIS_CENTRE, scales):
        shift = (3.0 * smooth_field(rng, 60, axes, PELVIS_REACH)
                 + 1.0 * smooth_field(rng, 24, axes, PELVIS_REACH))             # mm
        moved = p.astype(np.float32) + shift
        points.append((moved - centre) / np.float32(scale) + np.float32(centre))
    return points


def body_height(points):
    """The outline of the body without its fat -> (height, thickness of the fat on it).

    The height is in mm above the fascia that wraps all muscle, negative inside. The outline is an
    oval with dips: the cleft between the buttocks, and the two groins. The thickness is relative.
    Fat is thin at the sides, and thick in front and behind.
    """
    x, y, z = points
    ahead = y + 16
    rho = ((np.abs(x) / 154) ** 2.6 + (np.abs(ahead) / 92) ** 2.6) ** (1 / 2.6)
    height = (1 - 1 / np.maximum(rho, np.float32(0.05))) * np.hypot(x, ahead)
    cleft = 46 * np.exp(-(x / 9) ** 2)
    cleft = cleft * np.clip((30 - z) / 40, 0, 1) * np.clip((-y - 55) / 25, 0, 1)
    groin = 14 * np.exp(-((np.abs(x) - 62) / 20) ** 2)
    groin = groin * np.clip((-z - 5) / 35, 0, 1) * np.clip((y - 30) / 30, 0, 1)
    thickness = 0.55 + 0.85 * np.abs(ahead) / (np.hypot(0.6 * x, ahead) + 1)
    return height + cleft + groin, thickness


def add_muscles(rng, labels, axes, mirrored, age):
    """Paint muscles into `labels`, in place. Each takes what is nearest to it.

    Fat remains where two muscles meet, and in streaks that come with age (years).
    """
    first = np.full(labels.shape, np.inf, np.float32)       # distance to the nearest muscle
    second = first                                          # and to the one after it
    for shape in MUSCLES:
        distance = tube(mirrored, shape)
        second = np.minimum(second, np.maximum(first, distance))
        first = np.minimum(first, distance)
    streaks = smooth_field(rng, 4, axes, PELVIS_REACH) > 2.6 - 0.02 * (age - 50)
    labels[(first < 7) & (second - first > 1.8) & ~streaks] = CODE["muscle"]


def add_skeleton(labels, points, rough):
    """Paint the bones and the cartilage between them into `labels`, in place.

    The bones are the hip bones, the femurs, the sacrum and the coccyx.
    """
    x, y, z = points
    mirrored = (np.abs(x), y, z)
    offsets = [p - np.float32(c) for p, c in zip(mirrored, HIP)]
    radius = np.sqrt(sum(d ** 2 for d in offsets))
    # The cup of the acetabulum is open to the side, downwards and a little to the front.
    opening = 0.75 * offsets[0] + 0.2 * offsets[1] - 0.6 * offsets[2] - 0.1 * radius
    cup = np.maximum(radius - 34 - 0.3 * np.maximum(offsets[2], 0), opening)
    # The wing of the ilium is a plate. It runs from behind and near the midline to the front and
    # the side.
    outward = offsets[0] + 2 - 0.12 * (z - 30)
    along = 0.5 * outward + 0.87 * (y - 2)
    across = 0.87 * outward - 0.5 * (y - 2)
    thick = np.abs(across + 0.004 * along ** 2 - 3) - 7 - 0.06 * np.abs(along)
    wing = np.maximum(np.maximum(thick, np.abs(along) - 34 - 0.4 * (z - 30)), 20 - z)
    hip = np.minimum(tubes(mirrored, HIP_BONE), np.minimum(cup, wing))
    symphysis = (np.abs(x) < 2.5) & (hip < 0)
    outside_joint = np.maximum(hip + 0.6 * rough, 27.5 - radius)
    add_bone(labels, np.maximum(outside_joint, 2.5 - np.abs(x)), SHELL)
    labels[((radius < 27.5) & (opening < 0)) | symphysis] = CODE["cartilage"]
    add_bone(labels, np.minimum(radius - 24.5, tubes(mirrored, FEMUR)) + 0.4 * rough, SHELL)
    # The sacrum is a bent plate that is wider and thicker above. Its lower end is the coccyx.
    rise = np.clip((z - 4) / 56, 0, 1)
    middle = -76 - 0.45 * z
    half_width = 8 + 36 * rise
    half_depth = 7 + 7 * rise
    bent = y - middle - 0.008 * x ** 2
    sacrum = (np.hypot(x / half_width, bent / half_depth) - 1) * half_depth
    add_bone(labels, np.maximum(sacrum, -14 - z) + 0.6 * rough, SHELL)


def add_organs(rng, labels, axes, points, rough, traits):
    """Paint levator ani, rectum, seminal vesicles, bladder and prostate into `labels`, in place."""
    x, y, z = points
    mirrored = (np.abs(x), y, z)
    sling = ellipsoid(points, (0, -14, -6), (31, 46, 44))
    labels[(np.abs(sling - 1) < 0.06) & (z < -2)] = CODE["muscle"]

    wide = [(*node[:3], node[3] + traits["rectum"]) for node in RECTUM]
    rectum = tube(points, wide) + rough
    labels[rectum < 0] = CODE["muscle"]
    labels[rectum < -4] = CODE["stool"]
    # The patient lies on his back, so gas collects in front of the middle of the tube. The anus
    # holds none.
    front = (y + 46 + 0.4 * z) / 8 * (z > -10)
    gas = smooth_field(rng, 14, axes, PELVIS_REACH) + front + traits["gas"] > 0
    labels[(rectum < -4) & gas] = CODE["gas"]

    labels[tube(mirrored, SEMINAL_VESICLE) + 0.8 * rough < 0] = CODE["glands"]
    # The floor of the bladder lies on the prostate, which lifts it as it grows.
    scale = (traits["prostate"] / 40) ** (1 / 3)            # relative to a prostate of 40 ml
    radius = (traits["bladder"] * 750 / np.pi) ** (1 / 3)   # mm, of a ball of this many ml
    radii = (1.15 * radius, 0.92 * radius, 0.945 * radius)
    centre = (0, 36 - radii[1], 22 * scale - 18 + radii[2])
    bladder = (ellipsoid(points, centre, radii) - 1) * radius + rough
    labels[bladder < 3 + 60 / radius] = CODE["muscle"]      # a full bladder has a thin wall
    labels[bladder < 0] = CODE["urine"]
    outer = ellipsoid(points, (0, 7, -18), (24 * scale, 18 * scale, 22 * scale))
    labels[outer + 0.04 * rough < 1] = CODE["glands"]
    inner = ellipsoid(points, (0, 11, -16), (18 * scale, 13 * scale, 18 * scale))
    labels[inner + 0.05 * rough < 1] = CODE["prostate"]


def pelvis_labels(seed, subject, axes, traits):
    """The tissue of every point: (len(x), len(y), len(z)) uint8, a CODE or 0 outside the body."""
    points = pelvis_points(rng_for(seed, subject, "warp"), axes, traits)
    rough = smooth_field(rng_for(seed, subject, "rough"), 9, axes, PELVIS_REACH)
    mirrored = (np.abs(points[0]), *points[1:])
    height, thickness = body_height(points)
    uneven = 1.2 * smooth_field(rng_for(seed, subject, "fat"), 30, axes, PELVIS_REACH)
    fat = traits["fat"] * thickness + uneven

    labels = np.full(height.shape, CODE["fat"], np.uint8)
    add_muscles(rng_for(seed, subject, "muscles"), labels, axes, mirrored, traits["age"])
    vessels = tubes(mirrored, VESSELS)
    labels[vessels < 5] = CODE["fat"]
    labels[vessels < 0] = CODE["vein"]
    labels[height > 0] = CODE["fat"]
    add_organs(rng_for(seed, subject, "organs"), labels, axes, points, rough, traits)
    add_skeleton(labels, points, rough)
    labels[height > fat] = CODE["muscle"]                   # skin
    labels[height > fat + 2] = 0
    return labels


def pelvis_anatomy(seed, subject, grid):
    """A male pelvis on `grid` -> Anatomy. The same (seed, subject) is the same person.

    The person does not depend on the resolution of the grid.
    """
    traits = draw_pelvis(rng_for(seed, subject, "traits"))
    labels = pelvis_labels(seed, subject, grid.axes(OVERSAMPLE), traits)
    mask, maps = mixture(labels, grid, PELVIS)
    rng = rng_for(seed, subject, "tissue")
    factors = {}
    for name in PELVIS:
        factors[name] = np.exp(rng.normal(0, (0.01, 0.03, 0.03))).tolist()
    variation, texture = tissue_fields(rng, grid.axes(), PELVIS_REACH)
    no_lesion = np.zeros(grid.shape, np.uint8)
    return Anatomy(grid, mask, maps, factors, variation, texture, no_lesion, traits)
