"""Digital phantoms: synthetic subjects with known anatomy and known physics, written in the layout of a real data set.

    python -m data.phantom brats data/brats [--subjects 24] [--size 64] [--slices 12] [--seed 0]
    python -m data.phantom ixi data/ixi                 T1, T2 and PD of three hospitals, with scalp, air and IXI.csv
    python -m data.phantom ixi-hidden data/ixi-hidden   T2 depends on the hospital, and T1 and PD do not tell which
    python -m data.phantom pelvis data/pelvis           T1, T2 and CT (HU) of male pelves at three sites, and meta.csv

Two halves that never mix. *Anatomy* (`head_anatomy`, `pelvis_anatomy`) says how much of which tissue lies in every
voxel of a subject, and how this subject's tissues differ from the textbook. *Physics* turns an anatomy into an image:
`render` under any MR `Protocol`, `render_ct` in Hounsfield units. The same subject can therefore be imaged in any
number of ways in memory, and every image has a truth to compare with. `acquire` and `acquire_ct` add what a real
scanner adds: coil shading, Rician noise and an arbitrary scale; or the noise of X-rays.

World coordinates are mm in the NIfTI sense: x to the patient's right, y to the front, z to the top. In a head, 0 is
near the anterior commissure; in a pelvis, it is midway between the hips. All randomness derives from
(seed, subject, purpose): a subject does not depend on how many others are made, nor on the image size. The same
arguments give identical bytes on one installation; another numpy or zlib may differ in a last bit.
"""

import argparse
import csv
import gzip
import io
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy.ndimage import map_coordinates

from data.volumes import DataError

VERSION = 1  # raise it when the same arguments would give other images


# ---- 1. Tissues and signal equations --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Tissue:
    """pd: proton density relative to water. t1, t2: ms at (1.5 T, 3 T). hu: attenuation of X-rays at 120 kV in
    Hounsfield units, water 0 and air -1000. gd: mM of contrast agent after one dose."""
    pd: float
    t1: tuple[float, float]
    t2: tuple[float, float]
    hu: float
    gd: float = 0.0


# Sources. PD of csf, gm, wm: BrainWeb (Kwan et al. 1999, IEEE TMI 18:1085). T1 of gm, wm and deep (mean of putamen
# and caudate): Wright et al. 2008, MAGMA 21:121 (MPRAGE). T2 of gm, wm and T1 of blood: Stanisz et al. 2005, MRM
# 54:507. T1 of csf: Rooney et al. 2007, MRM 57:308. PD of fat: BrainWeb; its T1: de Bazelaire et al. 2004, Radiology
# 230:652, as T1 and T2 of the prostate. T1 and T2 of muscle, which stands for skin and the walls of organs as well, and
# of cartilage: Stanisz et al. 2005. All others, every hu and every gd, are our round numbers, chosen so that each
# tissue looks as it does in clinical images: iron shortens T2 of the pallidum; veins carry deoxygenated blood and lose
# signal by flow, and stand for arteries as well; oedema and tumour lie between grey matter and water; compact bone is
# black; the many refocusing pulses of a clinical T2 make fat bright, so its T2 is longer here; marrow is mostly fat to
# MR, but fat with trabeculae of bone in it to CT; the glands in the outer zone of the prostate are watery. T1 and T2 of
# gas do not matter.
TISSUES = {
    "csf":       Tissue(1.00, (4330, 4330), (2000, 2000), 8),
    "gm":        Tissue(0.86, (1197, 1607), (95, 99), 38, gd=0.015),
    "wm":        Tissue(0.77, (646, 838), (72, 69), 28, gd=0.008),
    "deep":      Tissue(0.83, (1095, 1360), (88, 82), 36, gd=0.012),
    "pallidum":  Tissue(0.79, (850, 1050), (72, 58), 40, gd=0.012),
    "vein":      Tissue(0.75, (1441, 1932), (110, 50), 45, gd=0.60),
    "gliosis":   Tissue(0.86, (950, 1200), (120, 120), 24),
    "oedema":    Tissue(0.92, (1300, 1700), (135, 135), 20),
    "enhancing": Tissue(0.90, (1250, 1600), (120, 120), 38, gd=0.35),
    "necrosis":  Tissue(0.96, (2200, 2800), (280, 280), 15, gd=0.02),
    "bone":      Tissue(0.15, (250, 300), (0.5, 0.5), 1300),
    "marrow":    Tissue(0.80, (450, 500), (80, 80), 220),
    "fat":       Tissue(1.00, (343, 382), (100, 100), -100),
    "muscle":    Tissue(0.80, (1008, 1412), (44, 50), 55, gd=0.02),
    "cartilage": Tissue(0.70, (1024, 1168), (30, 27), 90),
    "urine":     Tissue(0.98, (3500, 3800), (1200, 1200), 5),
    "prostate":  Tissue(0.86, (1317, 1597), (88, 74), 42),
    "glands":    Tissue(0.92, (1600, 1900), (170, 150), 34),
    "stool":     Tissue(0.60, (800, 900), (75, 65), 20),
    "gas":       Tissue(0.00, (1000, 1000), (100, 100), -1000),
}
BRAIN = ("csf", "gm", "wm", "deep", "pallidum", "vein", "gliosis", "oedema", "enhancing", "necrosis")
SCALP = ("bone", "marrow", "fat", "muscle")  # all that a skull-stripped head lacks
PELVIS = (*SCALP, "vein", "cartilage", "urine", "prostate", "glands", "stool", "gas")
CODE = {name: number for number, name in enumerate(TISSUES, 1)}  # in label arrays; 0 is outside the body
LESION_LABELS = {"necrosis": 1, "oedema": 2, "enhancing": 4}     # the numbers of BraTS; gliosis of age is no tumour

# Relaxivity r1 of gadoterate in plasma, 1/(mM s) at (1.5 T, 3 T): Szomolanyi et al. 2019, Invest Radiol 54:559.
RELAXIVITY = (3.32, 3.00)

# Field inhomogeneity inside a voxel, 1/(s T), so that 1/T2* = 1/T2 + R2' B0: close to Peters et al. 2007, MRI 25:748
# (T2* of grey and white matter 84 and 66 ms at 1.5 T, 66 and 53 ms at 3 T).
R2_PRIME = 1.4


@dataclass(frozen=True)
class Protocol:
    """One MR sequence. sequence: "se" spin echo, "ir" inversion recovery, "gre" spoiled gradient echo. Times in ms,
    flip in degrees, field in tesla; dose 1 = a standard injection of contrast agent, 0 = none. `ti` only matters to
    "ir", `flip` only to "gre"."""
    sequence: str
    tr: float
    te: float
    ti: float = 0.0
    flip: float = 90.0
    field: float = 3.0
    dose: float = 0.0


def spin_echo(pd, t1, t2, tr, te):
    """S = PD (1 - exp(-TR/T1)) exp(-TE/T2). Times in ms."""
    return pd * (1 - np.exp(-tr / t1)) * np.exp(-te / t2)


def inversion_recovery(pd, t1, t2, tr, te, ti):
    """S = PD (1 - 2 exp(-TI/T1) + exp(-TR/T1)) exp(-TE/T2), negative before the null. Times in ms. Images show |S|,
    see `render`."""
    return pd * (1 - 2 * np.exp(-ti / t1) + np.exp(-tr / t1)) * np.exp(-te / t2)


def spoiled_gradient_echo(pd, t1, t2_star, tr, te, flip):
    """S = PD sin a (1 - E1) / (1 - E1 cos a) exp(-TE/T2*), E1 = exp(-TR/T1). Times in ms, flip angle a in degrees."""
    angle = np.deg2rad(flip)
    e1 = np.exp(-tr / t1)
    return pd * np.sin(angle) * (1 - e1) / (1 - e1 * np.cos(angle)) * np.exp(-te / t2_star)


def with_gadolinium(t1, concentration, relaxivity):
    """1/T1' = 1/T1 + r1 C. T1 in ms, C in mM, r1 in 1/(mM s)."""
    return 1 / (1 / t1 + relaxivity * concentration / 1000)


def null_time(t1, tr):
    """The inversion time (ms) at which a tissue of this T1 gives no signal in `inversion_recovery`."""
    return t1 * np.log(2 / (1 + np.exp(-tr / t1)))


def at_field(pair, field):
    """A power law through the values at 1.5 T and 3 T (Rooney et al. 2007 find T1 to follow one)."""
    low, high = pair
    return low * (high / low) ** np.log2(field / 1.5)


def signal(pd, t1, t2, concentration, protocol):
    """Signal of one tissue under a protocol. pd, t1 (ms), t2 (ms) may be arrays; concentration in mM at dose 1.

    Raises ValueError for a sequence name that is not one of Protocol's three."""
    t1 = with_gadolinium(t1, protocol.dose * concentration, at_field(RELAXIVITY, protocol.field))
    if protocol.sequence == "se":
        return spin_echo(pd, t1, t2, protocol.tr, protocol.te)
    if protocol.sequence == "ir":
        return inversion_recovery(pd, t1, t2, protocol.tr, protocol.te, protocol.ti)
    if protocol.sequence == "gre":
        t2_star = 1 / (1 / t2 + R2_PRIME * protocol.field / 1000)
        return spoiled_gradient_echo(pd, t1, t2_star, protocol.tr, protocol.te, protocol.flip)
    raise ValueError(f"Protocol: unknown sequence {protocol.sequence!r}; use 'se', 'ir' or 'gre'")


# ---- 2. Grids, random fields, shapes --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Grid:
    """A voxel grid along the world axes. shape: (X, Y, Z). step: mm from voxel to voxel, negative where the index
    runs against the world axis. first: world coordinates (mm) of the centre of voxel (0, 0, 0)."""
    shape: tuple[int, int, int]
    step: tuple[float, float, float]
    first: tuple[float, float, float]

    def affine(self):
        """(4, 4): voxel index to world mm."""
        affine = np.diag([*self.step, 1.0])
        affine[:3, 3] = self.first
        return affine

    def axes(self, oversample=1):
        """World coordinates along x, y, z as three 1-D arrays; `oversample` points per voxel in x and y, at equal
        distances."""
        axes = []
        for n, step, first, points in zip(self.shape, self.step, self.first, (oversample, oversample, 1)):
            inside = (np.arange(points) + 0.5) / points - 0.5
            axes.append(first + step * (np.arange(n)[:, None] + inside).ravel())
        return tuple(axes)


def head_grid(size, slices, field=192):
    """`field` x `field` x 75 mm around the cerebrum: `size` pixels a side, `slices` slices; index order left,
    posterior, superior as in BraTS. 192 mm hold every brain, SCALP_FIELD every head."""
    pixel, gap, half = field / size, 75 / slices, field / 2
    return Grid((size, size, slices), (-pixel, -pixel, gap), (half - pixel / 2, half - 16 - pixel / 2, -10 + gap / 2))


def rng_for(seed, subject, purpose):
    """A random generator that depends on these three and nothing else."""
    return np.random.default_rng([seed, subject, *purpose.encode()])


def smooth_field(rng, lattice, axes, reach=160.0):
    """A Gaussian random field of mean 0 and variance 1 on the grid spanned by `axes` (mm), smooth on the scale
    `lattice` (mm). The lattice ends `reach` mm on either side of 0; a head needs 128.

    White noise on a cubic lattice, seen through cubic B-splines. The lattice is fixed in the world, so the field does
    not depend on the resolution at which it is looked at. Its zero surfaces lie 2.66 lattice steps apart on average
    (Rice's formula). The sum over taps is written out because a BLAS product may round differently with another
    number of threads."""
    n = int(2 * reach / lattice) + 5
    field = rng.standard_normal((n, n, n), dtype=np.float32)
    for axis in (2, 1, 0):  # slices are few: taking them first is five times as fast
        place = np.clip((axes[axis] + reach) / lattice, 0, n - 4.001)
        left = place.astype(int)
        t = (place - left).astype(np.float32)
        weights = ((1 - t) ** 3, 3 * t ** 3 - 6 * t ** 2 + 4, -3 * t ** 3 + 3 * t ** 2 + 3 * t + 1, t ** 3)
        shape = [-1 if k == axis else 1 for k in range(3)]
        field = sum((w / 6).reshape(shape) * field.take(left + tap, axis) for tap, w in enumerate(weights))
    return field / np.float32((151 / 315) ** 1.5)  # 151/315: mean of the sum of squared weights, per axis


def ellipsoid(points, centre, radii):
    """Distance from the centre in units of the surface: below 1 inside. points: (x, y, z) arrays in mm."""
    return np.sqrt(sum(((p - c) / r) ** 2 for p, c, r in zip(points, centre, radii)))


def tube(points, nodes):
    """Signed distance (mm, negative inside) to a bent tube. nodes: rows (x, y, z, radius); the radius changes
    linearly in between."""
    nearest = np.full(points[0].shape, np.inf, np.float32)
    for a, b in pairwise(nodes):
        along = [end - start for start, end in zip(a[:3], b[:3])]
        t = sum((p - start) * d for p, start, d in zip(points, a, along)) / sum(d * d for d in along)
        t = np.clip(t, 0, 1)
        square = sum((p - start - t * d) ** 2 for p, start, d in zip(points, a, along))
        nearest = np.minimum(nearest, np.sqrt(square) - (a[3] + t * (b[3] - a[3])))
    return nearest


# ---- 3. Anatomy of the head -----------------------------------------------------------------------------------------

@dataclass
class Anatomy:
    """A subject. maps: tissue name -> (X, Y, Z) fraction of the voxel, 0..1; they sum to 1 inside `mask` and are 0
    outside. factors: tissue name -> this subject's (PD, T1, T2) relative to TISSUES. variation: (3, X, Y, Z), the
    same three varying slowly in space, for all tissues but csf. texture: (X, Y, Z), relative T1, T2 and uptake inside
    lesions and in marrow. labels: (X, Y, Z) uint8, the LESION_LABELS of the tissue that prevails. traits: see
    `draw_traits` and `draw_pelvis`."""
    grid: Grid
    mask: np.ndarray
    maps: dict
    factors: dict
    variation: np.ndarray
    texture: np.ndarray
    labels: np.ndarray
    traits: dict


OVERSAMPLE = 3                    # label points along a pixel's side, so 10 levels of partial volume
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


def mixture(labels, grid, tissues):
    """Labels at the points of grid.axes(OVERSAMPLE) -> mask (X, Y, Z) and maps, see Anatomy. tissues: names that the
    labels may hold."""
    nx, ny, nz = grid.shape
    blocks = labels.reshape(nx, OVERSAMPLE, ny, OVERSAMPLE, nz)
    inside = (blocks > 0).mean(axis=(1, 3), dtype=np.float32)
    mask = inside >= 0.5
    maps = {}
    for name in tissues:  # a voxel on the edge shows what of it lies inside the body
        fraction = (blocks == CODE[name]).mean(axis=(1, 3), dtype=np.float32)
        maps[name] = np.where(mask, fraction / np.maximum(inside, np.float32(0.5)), np.float32(0))
    return mask, maps


def tissue_fields(rng, axes, reach=160.0):
    """How one subject's tissues vary in space: variation and texture of Anatomy."""
    spread = (0.015, 0.05, 0.05)  # of PD, T1, T2 from place to place
    variation = np.stack([np.exp(sd * smooth_field(rng, 30, axes, reach)) for sd in spread]).astype(np.float32)
    return variation, np.exp(0.15 * smooth_field(rng, 7, axes, reach)).astype(np.float32)


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


# ---- 4. Anatomy of the male pelvis ----------------------------------------------------------------------------------

PELVIS_FIELD = 384                 # mm a side; holds the widest hips
PELVIS_REACH = 200.0               # mm, see `smooth_field`
PELVIS_CENTRE = (0.0, -14.0, 0.0)  # mm, from where a larger man is larger
SHELL = 2.6                        # mm of compact bone; true shells have 1 to 6
HIP = (88, 0, 0)                   # mm, centre of the right femoral head

# The right half of the body: rows (x, y, z, radius) in mm, see `tube`; the left half is its mirror image before the
# random warp.
FEMUR = (((88, 0, 0, 15), (108, -4, -8, 15), (128, -12, -20, 17)),                           # neck
         ((138, -20, -2, 8), (136, -18, -20, 16), (130, -10, -45, 16), (128, -4, -80, 14)))  # trochanter, shaft
HIP_BONE = (((98, 34, 34, 9), (82, 28, 10, 10), (60, 34, 3, 9), (32, 46, -3, 8), (12, 50, -10, 9)),  # to the pubis
            ((11, 50, -10, 9), (11, 46, -30, 9), (36, 16, -55, 7), (58, -24, -66, 8)),               # and below it
            ((64, -34, 30, 10), (70, -29, 2, 12), (68, -34, -28, 13), (62, -38, -60, 17)))           # ischium
MUSCLES = (((34, -94, 30, 20), (58, -90, 0, 27), (96, -74, -16, 26), (130, -42, -44, 18)),    # gluteus maximus
           ((44, -102, 66, 13), (92, -72, 56, 19), (118, -54, 24, 18), (128, -44, -8, 12)),   # and its upper half
           ((112, 10, 66, 23), (130, -4, 24, 19), (144, -14, 2, 8)),                           # medius
           ((102, 22, 56, 12), (122, 8, 16, 11)),                                               # minimus
           ((126, 46, 44, 9), (142, 38, -8, 11), (146, 26, -48, 10)),                         # tensor fasciae latae
           ((106, 44, 14, 7), (112, 58, -14, 13), (114, 60, -48, 16)),                        # rectus femoris
           ((122, 56, 44, 8), (98, 72, -8, 8), (82, 74, -48, 9)),                             # sartorius
           ((68, 18, 70, 21), (74, 36, 30, 19), (84, 42, 4, 16), (106, 26, -22, 13), (112, -2, -50, 10)),  # iliopsoas
           ((40, 46, -6, 8), (62, 40, -28, 15), (90, 20, -60, 20)),                           # pectineus
           ((20, 60, -28, 9), (45, 66, -60, 18)),                                             # adductors
           ((46, 20, -40, 12), (84, -12, -32, 9), (118, -22, -20, 5)),                        # obturator externus
           ((47, 14, 12, 8), (47, -14, -8, 9), (46, -4, -34, 9)),                             # obturator internus
           ((34, -84, 44, 12), (76, -62, 32, 13), (122, -30, 14, 6)),                         # piriformis
           ((80, -44, -34, 9), (116, -38, -30, 9)),                                           # quadratus femoris
           ((144, 4, -30, 10), (142, 0, -60, 20)),                                            # vastus lateralis
           ((20, 70, 60, 9), (16, 66, 5, 6)))                                                 # rectus abdominis
VESSELS = (((40, 10, 70, 5.5), (62, 56, 18, 5.5), (78, 66, -10, 5.5), (82, 66, -50, 5)),
           ((36, -4, 70, 6.5), (52, 47, 18, 6.5), (65, 62, -10, 6.5), (68, 62, -50, 6)))
# In the midline.
RECTUM = ((0, -50, -55, -6), (0, -44, -32, -3), (0, -40, -14, 0), (2, -54, 18, 1), (8, -68, 46, 0), (0, -56, 66, -2),
          (-24, -26, 72, -3))
SEMINAL_VESICLE = ((5, -13, 8, 4.5), (20, -18, 12, 6), (36, -24, 18, 4))


def pelvis_grid(size, slices):
    """PELVIS_FIELD x PELVIS_FIELD x 96 mm from the ischium to the sacrum: `size` pixels a side, `slices` slices; index
    order left, posterior, superior."""
    pixel, gap, half = PELVIS_FIELD / size, 96 / slices, PELVIS_FIELD / 2
    y = half + PELVIS_CENTRE[1] - pixel / 2
    return Grid((size, size, slices), (-pixel, -pixel, gap), (half - pixel / 2, y, -40 + gap / 2))


def draw_pelvis(rng):
    """Traits of a man as plain values for JSON: age (years), size and depth (front to back; relative), fat (mm under
    the skin), bladder and prostate (ml), rectum (mm, radius), gas (how much of the rectum, in standard deviations of a
    random field), density of bone mineral (relative).

    With age the prostate grows and bone mineral is lost; the latter shows in CT only, so an MR cannot tell it."""
    age = rng.uniform(52, 84)
    drawn = {"age": age, "size": np.clip(rng.normal(1, 0.025), 0.94, 1.06), "depth": rng.normal(1, 0.03),
             "fat": np.clip(16 * np.exp(rng.normal(0, 0.3)), 9, 26), "bladder": rng.uniform(70, 380),
             "prostate": np.clip((25 + 0.9 * (age - 50)) * np.exp(rng.normal(0, 0.25)), 20, 90),
             "rectum": rng.uniform(12, 18), "gas": rng.uniform(-1.2, 1.2),
             "density": (1 - 0.008 * (age - 68)) * np.exp(rng.normal(0, 0.06))}
    return {"sex": "M", **{key: float(value) for key, value in drawn.items()}}


def pelvis_points(rng, axes, traits):
    """For every point of the grid, the point (x, y, z) of the template pelvis found there: random warp and body
    size."""
    scales = (traits["size"], traits["size"] * traits["depth"], traits["size"])
    points = []
    for p, centre, scale in zip(np.meshgrid(*axes, indexing="ij"), PELVIS_CENTRE, scales):
        shift = 3.0 * smooth_field(rng, 60, axes, PELVIS_REACH) + 1.0 * smooth_field(rng, 24, axes, PELVIS_REACH)  # mm
        points.append((p.astype(np.float32) + shift - centre) / np.float32(scale) + np.float32(centre))
    return points


def tubes(points, shapes):
    """Signed distance (mm) to the nearest of some tubes."""
    return np.minimum.reduce([tube(points, shape) for shape in shapes])


def body_height(points):
    """Height (mm) above the fascia that wraps all muscle, negative inside, and thickness (relative) of the fat on it.

    Fat is thin at the sides and thick in front and behind. The cleft between the buttocks and the two groins dip below
    an oval."""
    x, y, z = points
    ahead = y + 16
    rho = ((np.abs(x) / 154) ** 2.6 + (np.abs(ahead) / 92) ** 2.6) ** (1 / 2.6)
    height = (1 - 1 / np.maximum(rho, np.float32(0.05))) * np.hypot(x, ahead)
    cleft = 46 * np.exp(-(x / 9) ** 2) * np.clip((30 - z) / 40, 0, 1) * np.clip((-y - 55) / 25, 0, 1)
    groin = 14 * np.exp(-((np.abs(x) - 62) / 20) ** 2) * np.clip((-z - 5) / 35, 0, 1) * np.clip((y - 30) / 30, 0, 1)
    return height + cleft + groin, 0.55 + 0.85 * np.abs(ahead) / (np.hypot(0.6 * x, ahead) + 1)


def add_bone(labels, distance):
    """Paint a bone into `labels`, in place: a compact shell around marrow. distance: mm, negative inside."""
    labels[distance < 0] = CODE["bone"]
    labels[distance < -SHELL] = CODE["marrow"]


def add_muscles(rng, labels, axes, mirrored, age):
    """Paint muscles into `labels`, in place. Each takes what is nearest to it, and fat remains where two meet, and in
    streaks that come with age."""
    first = np.full(labels.shape, np.inf, np.float32)
    second = first
    for shape in MUSCLES:
        distance = tube(mirrored, shape)
        second = np.minimum(second, np.maximum(first, distance))
        first = np.minimum(first, distance)
    streaks = smooth_field(rng, 4, axes, PELVIS_REACH) > 2.6 - 0.02 * (age - 50)
    labels[(first < 7) & (second - first > 1.8) & ~streaks] = CODE["muscle"]


def add_skeleton(labels, points, rough):
    """Paint hip bones, femurs, sacrum and coccyx, and the cartilage between them, into `labels`, in place."""
    x, y, z = points
    mirrored = (np.abs(x), y, z)
    offsets = [p - np.float32(c) for p, c in zip(mirrored, HIP)]
    radius = np.sqrt(sum(d ** 2 for d in offsets))
    # The cup of the acetabulum is open to the side, downwards and a little to the front.
    opening = 0.75 * offsets[0] + 0.2 * offsets[1] - 0.6 * offsets[2] - 0.1 * radius
    cup = np.maximum(radius - 34 - 0.3 * np.maximum(offsets[2], 0), opening)
    # The wing of the ilium: a plate that runs from behind and near the midline to the front and side.
    outward = offsets[0] + 2 - 0.12 * (z - 30)
    along, across = 0.5 * outward + 0.87 * (y - 2), 0.87 * outward - 0.5 * (y - 2)
    thick = np.abs(across + 0.004 * along ** 2 - 3) - 7 - 0.06 * np.abs(along)
    wing = np.maximum(np.maximum(thick, np.abs(along) - 34 - 0.4 * (z - 30)), 20 - z)
    hip = np.minimum(tubes(mirrored, HIP_BONE), np.minimum(cup, wing))
    symphysis = (np.abs(x) < 2.5) & (hip < 0)
    add_bone(labels, np.maximum(np.maximum(hip + 0.6 * rough, 27.5 - radius), 2.5 - np.abs(x)))
    labels[((radius < 27.5) & (opening < 0)) | symphysis] = CODE["cartilage"]
    add_bone(labels, np.minimum(radius - 24.5, tubes(mirrored, FEMUR)) + 0.4 * rough)
    rise = np.clip((z - 4) / 56, 0, 1)
    middle, half_width, half_depth = -76 - 0.45 * z, 8 + 36 * rise, 7 + 7 * rise
    bent = y - middle - 0.008 * x ** 2
    sacrum = (np.hypot(x / half_width, bent / half_depth) - 1) * half_depth
    add_bone(labels, np.maximum(sacrum, -14 - z) + 0.6 * rough)


def add_organs(rng, labels, axes, points, rough, traits):
    """Paint levator ani, rectum, seminal vesicles, bladder and prostate into `labels`, in place."""
    x, y, z = points
    mirrored = (np.abs(x), y, z)
    sling = ellipsoid(points, (0, -14, -6), (31, 46, 44))
    labels[(np.abs(sling - 1) < 0.06) & (z < -2)] = CODE["muscle"]

    rectum = tube(points, [(*node[:3], node[3] + traits["rectum"]) for node in RECTUM]) + rough
    labels[rectum < 0] = CODE["muscle"]
    labels[rectum < -4] = CODE["stool"]
    # The patient lies on his back: gas collects in front, that is, before the middle of the tube. The anus holds none.
    front = (y + 46 + 0.4 * z) / 8 * (z > -10)
    gas = smooth_field(rng, 14, axes, PELVIS_REACH) + front + traits["gas"] > 0
    labels[(rectum < -4) & gas] = CODE["gas"]

    labels[tube(mirrored, SEMINAL_VESICLE) + 0.8 * rough < 0] = CODE["glands"]
    # The floor of the bladder lies on the prostate, which lifts it as it grows.
    scale = (traits["prostate"] / 40) ** (1 / 3)           # of the template's, which has 40 ml
    radius = (traits["bladder"] * 750 / np.pi) ** (1 / 3)  # mm, of a ball of this many ml
    radii = (1.15 * radius, 0.92 * radius, 0.945 * radius)
    bladder = (ellipsoid(points, (0, 36 - radii[1], 22 * scale - 18 + radii[2]), radii) - 1) * radius + rough
    labels[bladder < 3 + 60 / radius] = CODE["muscle"]     # a full bladder has a thin wall
    labels[bladder < 0] = CODE["urine"]
    outer = ellipsoid(points, (0, 7, -18), (24 * scale, 18 * scale, 22 * scale))
    labels[outer + 0.04 * rough < 1] = CODE["glands"]
    inner = ellipsoid(points, (0, 11, -16), (18 * scale, 13 * scale, 18 * scale))
    labels[inner + 0.05 * rough < 1] = CODE["prostate"]


def pelvis_labels(seed, subject, axes, traits):
    """Tissue of every point of the grid: (len(x), len(y), len(z)) uint8, a CODE or 0 outside the body."""
    points = pelvis_points(rng_for(seed, subject, "warp"), axes, traits)
    rough = smooth_field(rng_for(seed, subject, "rough"), 9, axes, PELVIS_REACH)
    mirrored = (np.abs(points[0]), *points[1:])
    height, thickness = body_height(points)
    fat = traits["fat"] * thickness + 1.2 * smooth_field(rng_for(seed, subject, "fat"), 30, axes, PELVIS_REACH)

    labels = np.full(height.shape, CODE["fat"], np.uint8)
    add_muscles(rng_for(seed, subject, "muscles"), labels, axes, mirrored, traits["age"])
    vessels = tubes(mirrored, VESSELS)
    labels[vessels < 5] = CODE["fat"]
    labels[vessels < 0] = CODE["vein"]
    labels[height > 0] = CODE["fat"]
    add_organs(rng_for(seed, subject, "organs"), labels, axes, points, rough, traits)
    add_skeleton(labels, points, rough)
    labels[height > fat] = CODE["muscle"]  # skin
    labels[height > fat + 2] = 0
    return labels


def pelvis_anatomy(seed, subject, grid):
    """A male pelvis on `grid` -> Anatomy. Same (seed, subject) = same person, at any resolution."""
    traits = draw_pelvis(rng_for(seed, subject, "traits"))
    labels = pelvis_labels(seed, subject, grid.axes(OVERSAMPLE), traits)
    mask, maps = mixture(labels, grid, PELVIS)
    rng = rng_for(seed, subject, "tissue")
    factors = {name: np.exp(rng.normal(0, (0.01, 0.03, 0.03))).tolist() for name in PELVIS}
    variation, texture = tissue_fields(rng, grid.axes(), PELVIS_REACH)
    return Anatomy(grid, mask, maps, factors, variation, texture, np.zeros(grid.shape, np.uint8), traits)


# ---- 5. Images ------------------------------------------------------------------------------------------------------

def render(anatomy, protocol):
    """The image of a subject under a protocol, free of noise and shading: (X, Y, Z) float32, 0 outside the mask.

    Tissues of one voxel add before the magnitude is taken, as their magnetisation does in the receiver coil."""
    image = np.zeros(anatomy.grid.shape)
    for name, fraction in anatomy.maps.items():
        tissue, (pd, t1, t2) = TISSUES[name], anatomy.factors[name]
        varied = (1.0, 1.0, 1.0) if name == "csf" else anatomy.variation  # water is water everywhere
        texture = anatomy.texture if name in LESION_LABELS else 1.0
        image += fraction * signal(
            pd * tissue.pd * varied[0],
            t1 * at_field(tissue.t1, protocol.field) * varied[1] * texture,
            t2 * at_field(tissue.t2, protocol.field) * varied[2] * texture,
            tissue.gd * texture, protocol)
    return np.abs(image).astype(np.float32)


def render_ct(anatomy, density):
    """CT of a subject, free of noise: (X, Y, Z) float32 in HU, air outside the mask. density: of the mineral in this
    subject's bone, relative to TISSUES.

    Attenuations (1 + HU / 1000, water = 1) of one voxel add. They vary in space as the proton density does; marrow has
    the texture of its trabeculae besides."""
    attenuation = np.zeros(anatomy.grid.shape)
    for name, fraction in anatomy.maps.items():
        mineral = {"bone": density, "marrow": density * anatomy.texture}.get(name, 1.0)
        attenuation += fraction * (1 + TISSUES[name].hu * mineral / 1000) * anatomy.variation[0]
    return (1000 * (attenuation - 1)).astype(np.float32)


def acquire_ct(rng, image, noise):
    """What a CT scanner stores of `image` (HU): with noise of standard deviation `noise` (HU), in whole numbers of 12
    bits. (X, Y, Z) int16."""
    seen = image + noise * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(np.rint(seen), -1024, 3071).astype(np.int16)


def acquire(rng, image, mask, shading, noise, level):
    """What the scanner makes of `image`: coil shading, Rician noise (in the air as well), its own scale. (X, Y, Z)
    float32.

    shading: (X, Y, Z) relative coil sensitivity. noise: standard deviation of the noise in either channel, relative
    to the mean of the image in the mask. level: mean of the result in the mask, any number, for a scanner's units
    mean nothing."""
    sigma = noise * image[mask].mean()
    real, imaginary = sigma * rng.standard_normal((2, *image.shape), dtype=np.float32)
    seen = np.hypot(image * shading + real, imaginary)
    return (seen * (level / seen[mask].mean())).astype(np.float32)


# ---- 6. The sets ----------------------------------------------------------------------------------------------------

CONTRASTS = ("flair", "t1", "t1ce", "t2")


def brats_protocols(rng):
    """The four protocols of one BraTS subject. Hospitals differ: 1.5 T or 3 T, T1 as spin echo or as gradient echo,
    times of their own. FLAIR is tuned to null CSF, within 3 %."""
    field = float(rng.choice((1.5, 3.0)))

    def t1_weighted(dose):
        if rng.random() < 0.5:
            return Protocol("se", tr=rng.uniform(450, 650), te=rng.uniform(8, 15), field=field, dose=dose)
        return Protocol("gre", tr=rng.uniform(8, 12), te=rng.uniform(3, 5), flip=rng.uniform(18, 26), field=field,
                        dose=dose)

    tr = rng.uniform(8000, 10000)
    ti = null_time(at_field(TISSUES["csf"].t1, field), tr) * rng.uniform(0.97, 1.03)
    return {"flair": Protocol("ir", tr=tr, te=rng.uniform(90, 130), ti=ti, field=field),
            "t1": t1_weighted(0.0),
            "t1ce": t1_weighted(rng.uniform(0.8, 1.2)),
            "t2": Protocol("se", tr=rng.uniform(3500, 6000), te=rng.uniform(80, 115), field=field)}


def brats_subject(seed, subject, grid):
    """One subject of the set -> Anatomy, {contrast: Protocol}, {contrast: (X, Y, Z) int16 image, at least 1 inside
    the brain}."""
    anatomy = head_anatomy(seed, subject, grid)
    protocols = brats_protocols(rng_for(seed, subject, "protocol"))
    coil = smooth_field(rng_for(seed, subject, "coil"), 90, grid.axes())
    images = {}
    for contrast, protocol in protocols.items():
        rng = rng_for(seed, subject, contrast)
        shading = np.exp(rng.uniform(0.04, 0.10) * coil)
        level = np.exp(rng.uniform(np.log(150), np.log(1500)))
        image = acquire(rng, render(anatomy, protocol), anatomy.mask, shading, rng.uniform(0.015, 0.04), level)
        images[contrast] = np.clip(np.rint(image * anatomy.mask), anatomy.mask, 32767).astype(np.int16)
    return anatomy, protocols, images


def write_nifti(path, array, grid, axes="LPS"):
    """Write `array` as .nii.gz whose bytes depend on nothing but its content: no time, no file name in the gzip
    header. axes: where the stored axes are to point; the world position of every voxel stays."""
    image = nib.Nifti1Image(array, grid.affine())
    image = image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(axes)))
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"digital phantom (synthetic)"
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))


def write_brats(folder, subjects, size, slices, seed):
    """BraTS 2021: one folder per subject with four contrasts and the tumour. Returns what is true of each subject,
    for phantom.json."""
    grid = head_grid(size, slices)
    truth = {}
    for subject in range(subjects):
        name = f"BraTS2021_{subject:05d}"
        anatomy, protocols, images = brats_subject(seed, subject, grid)
        (folder / name).mkdir()
        for contrast in CONTRASTS:
            write_nifti(folder / name / f"{name}_{contrast}.nii.gz", images[contrast], grid)
        write_nifti(folder / name / f"{name}_seg.nii.gz", anatomy.labels, grid)
        truth[name] = {**anatomy.traits, "protocols": {key: asdict(value) for key, value in protocols.items()}}
    return truth


# IXI (brain-development.org): healthy people in three hospitals of London. Times of Guys and HH are those of the
# published protocol; those of IOP are not published, ours are plausible. T2 and PD are the two echoes of one sequence.
# The T1 of IXI is prepared by an inversion that its protocol does not state; a plain gradient echo of the stated times
# shows the same order of tissues with less contrast.
IXI_PROTOCOLS = {
    "Guys": {"t1": Protocol("gre", tr=9.813, te=4.603, flip=8, field=1.5),    # Philips 1.5 T
             "t2": Protocol("se", tr=8178.34, te=100, field=1.5),
             "pd": Protocol("se", tr=8178.34, te=8, field=1.5)},
    "HH": {"t1": Protocol("gre", tr=9.6, te=4.6, flip=8),                     # Philips 3 T
           "t2": Protocol("se", tr=5725.79, te=100),
           "pd": Protocol("se", tr=5725.79, te=8)},
    "IOP": {"t1": Protocol("gre", tr=14, te=5, flip=18, field=1.5),           # GE 1.5 T
            "t2": Protocol("se", tr=5200, te=88, field=1.5),
            "pd": Protocol("se", tr=5200, te=17, field=1.5)},
}
IXI_SCANNERS = {"Guys": (0.030, 0.06), "HH": (0.020, 0.13), "IOP": (0.045, 0.09)}  # noise, shading: see `acquire`
IXI_HIDDEN_TE = {"Guys": 40, "HH": 90, "IOP": 160}                                 # ms
IXI_COLUMNS = ["IXI_ID", "SEX_ID (1=m, 2=f)", "HEIGHT", "WEIGHT", "ETHNIC_ID", "MARITAL_ID", "OCCUPATION_ID",
               "QUALIFICATION_ID", "DOB", "DATE_AVAILABLE", "STUDY_DATE", "AGE"]
IXI_AXES = {"t1": "PSR", "t2": "LPS", "pd": "LPS"}  # T1 is stored in sagittal planes


def ixi_protocols(site, hidden=False):
    """{contrast: Protocol} of an IXI hospital "Guys", "HH" or "IOP".

    hidden: T1 and PD are those of Guys everywhere, and T2 alone differs, by its echo time. From T1 and PD nobody can
    tell the hospital, so a model that is not told can do no better for T2 than the average over hospitals."""
    if not hidden:
        return IXI_PROTOCOLS[site]
    common = IXI_PROTOCOLS["Guys"]
    return {**common, "t2": replace(common["t2"], te=IXI_HIDDEN_TE[site])}


def ixi_anatomy(seed, subject, grid):
    """One healthy head with scalp -> Anatomy."""
    return head_anatomy(seed, subject, grid, tumour=False, scalp=True)


def ixi_images(seed, subject, anatomy, site, hidden=False):
    """What `site` makes of a subject: {contrast: (X, Y, Z) int16 image, noise in the air}.

    hidden: see `ixi_protocols`; noise and shading are those of Guys, too, and T1 and PD the same at every site, bit
    for bit."""
    noise, strength = IXI_SCANNERS["Guys" if hidden else site]
    shading = np.exp(strength * smooth_field(rng_for(seed, subject, "coil"), 90, anatomy.grid.axes()))
    images = {}
    for contrast, protocol in ixi_protocols(site, hidden).items():
        rng = rng_for(seed, subject, contrast)
        level = np.exp(rng.uniform(np.log(150), np.log(800)))
        image = acquire(rng, render(anatomy, protocol), anatomy.mask, shading, noise, level)
        images[contrast] = np.clip(np.rint(image), 0, 32767).astype(np.int16)
    return images


def write_ixi_scans(folder, name, images, grid):
    """Write {contrast: image} of one subject as FOLDER/IXI-T1/NAME-T1.nii.gz and so on; T1 in sagittal planes."""
    for contrast, image in images.items():
        place = folder / f"IXI-{contrast.upper()}"
        place.mkdir(exist_ok=True)
        write_nifti(place / f"{name}-{contrast.upper()}.nii.gz", image, grid, IXI_AXES[contrast])


def ixi_row(rng, number, traits):
    """One line of IXI.csv. As in the sheet of IXI, height (cm) and weight (kg) are 0 where they are not known."""
    height = round(rng.normal(176 if traits["sex"] == "M" else 163, 6))
    weight = round(rng.normal(25, 3) * (height / 100) ** 2)
    if rng.random() < 0.1:
        height = weight = 0
    codes = [int(rng.integers(1, high + 1)) for high in (4, 5, 8, 5)]  # ethnic, marital, occupation, qualification
    studied = date(2005, 6, 1) + timedelta(days=int(rng.integers(600)))
    born = studied - timedelta(days=round(365.25 * traits["age"]))
    return [number, 1 if traits["sex"] == "M" else 2, height, weight, *codes, born, 1, studied, f"{traits['age']:.2f}"]


def write_sheet(path, rows):
    """Write lists of values as CSV, the same bytes on every system."""
    sheet = io.StringIO()
    csv.writer(sheet, lineterminator="\n").writerows(rows)
    path.write_text(sheet.getvalue(), encoding="utf-8", newline="\n")


def write_ixi(folder, subjects, size, slices, seed, hidden=False):
    """IXI: one folder per contrast and IXI.csv. Returns what is true of each subject, for phantom.json.

    hidden: see `ixi_protocols`. The sheet has the gaps of the real one: the 4th subject has no age, the 5th no line,
    the 6th two equal lines."""
    grid = head_grid(size, slices, SCALP_FIELD)
    truth, rows = {}, [IXI_COLUMNS]
    for subject in range(subjects):
        number, site = subject + 2, tuple(IXI_PROTOCOLS)[subject % 3]
        name = f"IXI{number:03d}-{site}-{828 + 7 * subject:04d}"
        anatomy = ixi_anatomy(seed, subject, grid)
        write_ixi_scans(folder, name, ixi_images(seed, subject, anatomy, site, hidden), grid)
        row = ixi_row(rng_for(seed, subject, "sheet"), number, anatomy.traits)
        rows += {3: [[*row[:-1], ""]], 4: [], 5: [row, row]}.get(subject, [row])
        truth[name] = {**anatomy.traits, "site": site,
                       "protocols": {key: asdict(value) for key, value in ixi_protocols(site, hidden).items()}}
    write_sheet(folder / "IXI.csv", rows)
    return truth


# Gold Atlas (Nyholm et al. 2018, Med Phys 45:1295): men with prostate or rectal cancer at three sites. The makes and
# times below are ours, in the range of clinical protocols. T2 is a fast spin echo; what its many echoes do to fat is
# in TISSUES.
PELVIS_PROTOCOLS = {
    "GE 3T": {"t1": Protocol("se", tr=620, te=8), "t2": Protocol("se", tr=6500, te=97)},
    "Siemens 1.5T": {"t1": Protocol("gre", tr=7.5, te=4.8, flip=14, field=1.5),
                     "t2": Protocol("se", tr=5000, te=86, field=1.5)},
    "Siemens 3T": {"t1": Protocol("se", tr=500, te=12), "t2": Protocol("se", tr=12000, te=110)},
}
# Noise and shading of MR, see `acquire`; noise of CT in HU.
PELVIS_SCANNERS = {"GE 3T": (0.030, 0.12, 12), "Siemens 1.5T": (0.045, 0.06, 18), "Siemens 3T": (0.025, 0.15, 26)}


def pelvis_images(seed, subject, anatomy, scanner):
    """What the site of a scanner makes of a subject: {"t1", "t2", "ct": (X, Y, Z) int16}; noise in the air, CT in
    HU."""
    noise, strength, ct_noise = PELVIS_SCANNERS[scanner]
    coil = smooth_field(rng_for(seed, subject, "coil"), 110, anatomy.grid.axes(), PELVIS_REACH)
    images = {}
    for contrast, protocol in PELVIS_PROTOCOLS[scanner].items():
        rng = rng_for(seed, subject, contrast)
        level = np.exp(rng.uniform(np.log(150), np.log(800)))
        image = acquire(rng, render(anatomy, protocol), anatomy.mask, np.exp(strength * coil), noise, level)
        images[contrast] = np.clip(np.rint(image), 0, 32767).astype(np.int16)
    ct = render_ct(anatomy, anatomy.traits["density"])
    return {**images, "ct": acquire_ct(rng_for(seed, subject, "ct"), ct, ct_noise)}


def write_pelvis(folder, subjects, size, slices, seed):
    """Gold Atlas as NIfTI: one folder per patient with T1, T2 and CT, and meta.csv. Returns what is true of each
    subject, for phantom.json. The sheet does not know the age of every fifth patient, from the 4th on."""
    grid = pelvis_grid(size, slices)
    truth, rows = {}, [["patient", "age", "sex", "scanner", "body"]]
    for subject in range(subjects):
        site, scanner = subject % 3 + 1, tuple(PELVIS_PROTOCOLS)[subject % 3]
        name = f"{site}_{subject // 3 + 1:02d}_P"
        anatomy = pelvis_anatomy(seed, subject, grid)
        (folder / name).mkdir()
        for contrast, image in pelvis_images(seed, subject, anatomy, scanner).items():
            write_nifti(folder / name / f"{contrast.upper()}.nii.gz", image, grid)
        rows.append([name, "" if subject % 5 == 3 else f"{anatomy.traits['age']:.0f}", "M", scanner, "pelvis"])
        truth[name] = {**anatomy.traits, "scanner": scanner,
                       "protocols": {key: asdict(value) for key, value in PELVIS_PROTOCOLS[scanner].items()}}
    write_sheet(folder / "meta.csv", rows)
    return truth


SETS = {"brats": write_brats, "ixi": write_ixi, "ixi-hidden": partial(write_ixi, hidden=True), "pelvis": write_pelvis}


def make(name, folder, subjects=24, size=64, slices=12, seed=0):
    """Write the phantom set `name` into `folder`, which must not exist yet; its parents are made. All or nothing: the
    set grows under another name beside `folder` and is renamed when complete.

    Raises DataError for an unknown name, a number too small, or a folder that exists."""
    folder = Path(folder)
    if name not in SETS:
        raise DataError(f"phantom {name!r}: there is no such set; choose one of: {', '.join(SETS)}")
    if subjects < 1 or slices < 1 or size < 16 or seed < 0:
        raise DataError(f"phantom {name}: cannot make subjects {subjects}, size {size}, slices {slices}, seed {seed}; "
                        "use at least 1 subject, 16 pixels, 1 slice and a seed of 0 or more")
    if os.path.lexists(folder):
        raise DataError(f"{folder}: exists already, and phantoms never overwrite; give another name or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    growing = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    growing.mkdir()
    try:
        truth = SETS[name](growing, subjects, size, slices, seed)
        note = {"name": name, "note": "These images are synthetic: a digital phantom, no patients.", "version": VERSION,
                "subjects": subjects, "size": size, "slices": slices, "seed": seed, "truth": truth}
        text = json.dumps(note, indent=1) + "\n"
        (growing / "phantom.json").write_text(text, encoding="utf-8", newline="\n")
        try:
            growing.rename(folder)
        except OSError as error:  # two processes of one run may both have found it missing
            other = folder / "phantom.json"
            if not other.is_file() or other.read_text(encoding="utf-8") != text:
                raise DataError(f"{folder}: appeared while the phantom was being made; choose another name") from error
    finally:
        shutil.rmtree(growing, ignore_errors=True)


def main():
    """Command line -> exit status."""
    parser = argparse.ArgumentParser(prog="python -m data.phantom", description="Make a synthetic data set.")
    parser.add_argument("name", choices=SETS, help="which set")
    parser.add_argument("folder", type=Path, help="where to; must not exist")
    parser.add_argument("--subjects", type=int, default=24, help="how many (default 24)")
    parser.add_argument("--size", type=int, default=64, help="pixels a side of a slice (default 64)")
    parser.add_argument("--slices", type=int, default=12, help="slices per subject (default 12)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other subjects (default 0)")
    options = parser.parse_args()
    try:
        make(**vars(options))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.folder}: {options.subjects} synthetic subjects ({options.name})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
