"""Tissues, protocols and signal equations: what MR, CT and PET show of an anatomy."""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter


@dataclass(frozen=True)
class Tissue:
    """What a tissue is to MR, to CT and to FDG-PET."""

    pd: float                       # proton density relative to water
    t1: tuple[float, float]         # ms at (1.5 T, 3 T)
    t2: tuple[float, float]         # ms at (1.5 T, 3 T)
    hu: float                       # attenuation of X-rays at 120 kV, in HU; water 0, air -1000
    gd: float = 0.0                 # mM of contrast agent after one dose
    suv: float = 0.0                # FDG an hour after the injection, relative to its mean in the
                                    # body: the standardised uptake value by body weight


# Sources:
#   PD of csf, gm, wm, fat    BrainWeb (Kwan et al. 1999, IEEE TMI 18:1085)
#   T1 of gm, wm, deep        Wright et al. 2008, MAGMA 21:121 (MPRAGE); deep is the mean of putamen
#                             and caudate
#   T2 of gm, wm; T1 of blood; T1 and T2 of muscle and cartilage
#                             Stanisz et al. 2005, MRM 54:507
#   T1 of csf                 Rooney et al. 2007, MRM 57:308
#   T1 of fat; T1 and T2 of the prostate
#                             de Bazelaire et al. 2004, Radiology 230:652
#   T1 and T2 of parenchyma   Rakow-Penner et al. 2006, JMRI 23:87 (fibroglandular tissue)
# All others, every hu, gd and suv are our own round numbers. We chose them so that each tissue
# looks as it does in clinical images:
#   - Iron shortens T2 of the pallidum.
#   - Veins carry deoxygenated blood and lose signal by flow. They stand for arteries as well.
#   - Oedema and tumour lie between grey matter and water.
#   - Compact bone is black.
#   - The many refocusing pulses of a clinical T2 make fat bright, so its T2 is longer here.
#   - Marrow is mostly fat to MR, but to CT it is fat with trabeculae of bone in it.
#   - The glands in the outer zone of the prostate are watery.
#   - Muscle stands for skin and for the walls of organs as well.
#   - Grey matter takes up four times as much FDG as white matter.
#   - Muscle, tongue, tonsils, nodes and tumours differ by less than 10 HU, which is about the noise
#     of CT, but the tumours take up eight times as much FDG as muscle.
#   - Before contrast agent, a tumour of the breast is as bright as the parenchyma around it.
#   - The blood of a chest is one tissue to CT. It has several names, because an injection reaches
#     the parts of the circulation one after the other.
# T1 and T2 of gas do not matter.
TISSUES = {
    "csf":       Tissue(1.00, (4330, 4330), (2000, 2000), 8, suv=0.4),
    "gm":        Tissue(0.86, (1197, 1607), (95, 99), 38, gd=0.015, suv=8.0),
    "wm":        Tissue(0.77, (646, 838), (72, 69), 28, gd=0.008, suv=2.0),
    "deep":      Tissue(0.83, (1095, 1360), (88, 82), 36, gd=0.012, suv=8.0),
    "pallidum":  Tissue(0.79, (850, 1050), (72, 58), 40, gd=0.012, suv=4.5),
    "vein":      Tissue(0.75, (1441, 1932), (110, 50), 45, gd=0.60, suv=1.5),
    "gliosis":   Tissue(0.86, (950, 1200), (120, 120), 24, suv=1.8),
    "oedema":    Tissue(0.92, (1300, 1700), (135, 135), 20),
    "enhancing": Tissue(0.90, (1250, 1600), (120, 120), 38, gd=0.35),
    "necrosis":  Tissue(0.96, (2200, 2800), (280, 280), 15, gd=0.02, suv=1.5),
    "bone":      Tissue(0.15, (250, 300), (0.5, 0.5), 1300, suv=0.5),
    "marrow":    Tissue(0.80, (450, 500), (80, 80), 220, suv=1.3),
    "fat":       Tissue(1.00, (343, 382), (100, 100), -100, suv=0.25),
    "muscle":    Tissue(0.80, (1008, 1412), (44, 50), 55, gd=0.02, suv=0.7),
    "cartilage": Tissue(0.70, (1024, 1168), (30, 27), 90, suv=0.5),
    "urine":     Tissue(0.98, (3500, 3800), (1200, 1200), 5),
    "prostate":  Tissue(0.86, (1317, 1597), (88, 74), 42),
    "glands":    Tissue(0.92, (1600, 1900), (170, 150), 34),
    "stool":     Tissue(0.60, (800, 900), (75, 65), 20),
    "gas":       Tissue(0.00, (1000, 1000), (100, 100), -1000),
    # head and neck
    "salivary":  Tissue(0.88, (950, 1150), (75, 70), 42, gd=0.06, suv=2.0),
    "tonsil":    Tissue(0.88, (1200, 1450), (90, 85), 50, gd=0.10, suv=3.2),
    "tongue":    Tissue(0.82, (1000, 1350), (46, 50), 52, gd=0.03, suv=1.5),
    "mucosa":    Tissue(0.88, (1200, 1400), (80, 75), 48, gd=0.12, suv=1.8),
    "thyroid":   Tissue(0.86, (1000, 1250), (75, 70), 98, gd=0.15, suv=1.4),
    "node":      Tissue(0.86, (1100, 1350), (80, 75), 46, gd=0.06, suv=1.0),
    "tumour":    Tissue(0.88, (1250, 1480), (68, 64), 47, gd=0.42, suv=6.0),
    "tooth":     Tissue(0.05, (300, 300), (0.5, 0.5), 2300, suv=0.3),
    # breast
    "parenchyma": Tissue(0.86, (1266, 1445), (58, 54), 40, gd=0.025, suv=1.2),
    # chest
    "lung":      Tissue(0.18, (1000, 1200), (30, 25), -850, suv=0.5),
    "myocardium": Tissue(0.82, (1030, 1470), (50, 45), 46, gd=0.06, suv=2.5),
    "right heart": Tissue(0.75, (1441, 1932), (110, 50), 42, suv=1.5),
    "left heart": Tissue(0.75, (1441, 1932), (250, 150), 42, suv=1.5),
    "aorta":     Tissue(0.75, (1441, 1932), (250, 150), 42, suv=1.5),
    "artery":    Tissue(0.75, (1441, 1932), (110, 50), 42, suv=1.5),
    "lung vein": Tissue(0.75, (1441, 1932), (250, 150), 42, suv=1.5),
    "coronary":  Tissue(0.75, (1441, 1932), (250, 150), 42, suv=1.5),
    "liver":     Tissue(0.80, (586, 809), (46, 34), 58, gd=0.03, suv=2.2),
}
BRAIN = ("csf", "gm", "wm", "deep", "pallidum", "vein", "gliosis", "oedema", "enhancing",
         "necrosis")
SCALP = ("bone", "marrow", "fat", "muscle")     # all that a skull-stripped head lacks
PELVIS = (*SCALP, "vein", "cartilage", "urine", "prostate", "glands", "stool", "gas")
NECK = ("csf", "gm", "wm", "deep", "pallidum", "gliosis", *SCALP, "vein", "cartilage", "gas",
        "salivary", "tonsil", "tongue", "mucosa", "thyroid", "node", "tumour", "necrosis", "tooth")
BREAST = (*SCALP, "vein", "parenchyma", "tumour", "necrosis", "lung", "myocardium")
CHEST = (*SCALP, "vein", "cartilage", "gas", "lung", "myocardium", "right heart", "left heart",
         "aorta", "artery", "lung vein", "coronary", "liver")
# The numbers of tissues in arrays of labels. 0 is outside of the body.
CODE = {name: number for number, name in enumerate(TISSUES, 1)}
# The numbers that BraTS gives to tumours. Gliosis of age is no tumour.
LESION_LABELS = {"necrosis": 1, "oedema": 2, "enhancing": 4}
TEXTURED = (*LESION_LABELS, "tumour")       # Anatomy.texture holds for these

# The relaxivity r1 of gadoterate in plasma, 1/(mM s) at (1.5 T, 3 T): Szomolanyi et al. 2019,
# Invest Radiol 54:559.
RELAXIVITY = (3.32, 3.00)

# The field varies inside of a voxel, so that 1/T2* = 1/T2 + R2' B0, with R2' in 1/(s T). The number
# is close to Peters et al. 2007, MRI 25:748. They found T2* of grey and white matter to be 84 and
# 66 ms at 1.5 T, and 66 and 53 ms at 3 T.
R2_PRIME = 1.4


@dataclass(frozen=True)
class Protocol:
    """One MR sequence."""

    sequence: str           # "se" spin echo, "ir" inversion recovery, "gre" spoiled gradient echo
    tr: float               # ms
    te: float               # ms
    ti: float = 0.0         # ms, for "ir" only
    flip: float = 90.0      # degrees, for "gre" only
    field: float = 3.0      # tesla
    dose: float = 0.0       # of contrast agent; 1 is a standard injection, 0 is none


def spin_echo(pd, t1, t2, tr, te):
    """S = PD (1 - exp(-TR/T1)) exp(-TE/T2). Times are in ms."""
    return pd * (1 - np.exp(-tr / t1)) * np.exp(-te / t2)


def inversion_recovery(pd, t1, t2, tr, te, ti):
    """S = PD (1 - 2 exp(-TI/T1) + exp(-TR/T1)) exp(-TE/T2). Times are in ms.

    S is negative before the null time. Images show |S|; see `render`.
    """
    return pd * (1 - 2 * np.exp(-ti / t1) + np.exp(-tr / t1)) * np.exp(-te / t2)


def spoiled_gradient_echo(pd, t1, t2_star, tr, te, flip):
    """S = PD sin a (1 - E1) / (1 - E1 cos a) exp(-TE/T2*), with E1 = exp(-TR/T1).

    Times are in ms, and the flip angle a is in degrees.
    """
    angle = np.deg2rad(flip)
    e1 = np.exp(-tr / t1)
    return pd * np.sin(angle) * (1 - e1) / (1 - e1 * np.cos(angle)) * np.exp(-te / t2_star)


def with_gadolinium(t1, concentration, relaxivity):
    """1/T1' = 1/T1 + r1 C. T1 is in ms, C in mM, r1 in 1/(mM s)."""
    return 1 / (1 / t1 + relaxivity * concentration / 1000)


def null_time(t1, tr):
    """The inversion time (ms) at which `inversion_recovery` gives no signal for this T1 (ms)."""
    return t1 * np.log(2 / (1 + np.exp(-tr / t1)))


def at_field(pair, field):
    """A power law through the values at 1.5 T and 3 T. Rooney et al. 2007 find that T1 follows one.

    pair: The values at (1.5 T, 3 T).
    field: Tesla.
    """
    low, high = pair
    return low * (high / low) ** np.log2(field / 1.5)


def signal(pd, t1, t2, concentration, protocol):
    """The signal of one tissue under a protocol.

    pd, t1 (ms) and t2 (ms) may be arrays. concentration: Contrast agent in mM at dose 1.
    ValueError if the name of the sequence is not one of Protocol's three.
    """
    t1 = with_gadolinium(t1, protocol.dose * concentration, at_field(RELAXIVITY, protocol.field))
    if protocol.sequence == "se":
        return spin_echo(pd, t1, t2, protocol.tr, protocol.te)
    if protocol.sequence == "ir":
        return inversion_recovery(pd, t1, t2, protocol.tr, protocol.te, protocol.ti)
    if protocol.sequence == "gre":
        t2_star = 1 / (1 / t2 + R2_PRIME * protocol.field / 1000)
        return spoiled_gradient_echo(pd, t1, t2_star, protocol.tr, protocol.te, protocol.flip)
    raise ValueError(f"Protocol: unknown sequence {protocol.sequence!r}; use 'se', 'ir' or 'gre'")


def render(anatomy, protocol, uptake=None):
    """The image of a subject under a protocol, without noise and shading.

    The result is (X, Y, Z) float32, and 0 outside of the mask. The tissues of one voxel add before
    the magnitude is taken, because their magnetisations add in the receiver coil.

    uptake: {tissue: how much contrast agent it takes up in this subject, relative to TISSUES}, 1
        for a tissue not named.
    """
    uptake = uptake or {}
    image = np.zeros(anatomy.grid.shape)
    for name, fraction in anatomy.maps.items():
        tissue = TISSUES[name]
        pd, t1, t2 = anatomy.factors[name]
        # Water is the same everywhere.
        varied = (1.0, 1.0, 1.0) if name == "csf" else anatomy.variation
        texture = anatomy.texture if name in TEXTURED else 1.0
        image += fraction * signal(
            pd * tissue.pd * varied[0],
            t1 * at_field(tissue.t1, protocol.field) * varied[1] * texture,
            t2 * at_field(tissue.t2, protocol.field) * varied[2] * texture,
            tissue.gd * uptake.get(name, 1.0) * texture, protocol)
    return np.abs(image).astype(np.float32)


def render_ct(anatomy, density, added=None):
    """The CT of a subject without noise: (X, Y, Z) float32 in HU, air outside of the mask.

    The attenuations in one voxel add; the attenuation is 1 + HU / 1000, which is 1 for water. They
    vary in space as the proton density does. Marrow also has the texture of its trabeculae.

    density: The mineral in this subject's bone, relative to TISSUES.
    added: {tissue: HU that this subject has more than TISSUES}. Iodine in the blood is the usual
        reason.
    """
    added = added or {}
    attenuation = np.zeros(anatomy.grid.shape)
    for name, fraction in anatomy.maps.items():
        mineral = {"bone": density, "marrow": density * anatomy.texture}.get(name, 1.0)
        of_tissue = 1 + (TISSUES[name].hu * mineral + added.get(name, 0.0)) / 1000
        attenuation += fraction * of_tissue * anatomy.variation[0]
    return (1000 * (attenuation - 1)).astype(np.float32)


def render_pet(anatomy, uptake):
    """The uptake of FDG of a subject, without blur and noise: (X, Y, Z) float32 in SUV.

    The tissues of one voxel add. The uptake varies slowly in space, independently of CT. Tumours
    have a texture as well. Air takes up nothing.

    uptake: {tissue: the uptake of this subject relative to TISSUES}, 1 for a tissue not named.
    """
    image = np.zeros(anatomy.grid.shape)
    for name, fraction in anatomy.maps.items():
        texture = anatomy.texture if name in TEXTURED else 1.0
        of_tissue = TISSUES[name].suv * uptake.get(name, 1.0)
        image += fraction * of_tissue * anatomy.variation[1] * texture
    return image.astype(np.float32)


def acquire_ct(rng, image, noise):
    """What a CT scanner stores of an image: (X, Y, Z) int16 in HU, whole numbers of 12 bits.

    image: (X, Y, Z) in HU.
    noise: The standard deviation of the noise in HU.
    """
    seen = image + noise * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(np.rint(seen), -1024, 3071).astype(np.int16)


def acquire_pet(rng, image, grid, fwhm, noise, shrink):
    """What a PET scanner makes of the true uptake: (X / shrink, Y / shrink, Z) float32 in SUV.

    The scanner blurs the uptake. Its voxels are `shrink` times as wide as those of the image, and
    each shows the mean. The variance of the noise is in proportion to the signal, as in counting.
    The reconstruction smooths the noise, so neighbours share some of it.

    image: (X, Y, Z) in SUV, on `grid`.
    fwhm: The width of the blur at half of its maximum, in mm.
    noise: The standard deviation of the noise where the SUV is 1.
    """
    sigma = fwhm / np.sqrt(8 * np.log(2))                   # mm
    blurred = gaussian_filter(image, [sigma / abs(step) for step in grid.step], truncate=4)
    nx, ny, nz = grid.shape
    blocks = blurred.reshape(nx // shrink, shrink, ny // shrink, shrink, nz)
    signal = blocks.mean(axis=(1, 3))
    smooth = 0.6                                            # pixels, of the reconstruction
    grain = rng.standard_normal(signal.shape, dtype=np.float32)
    grain = gaussian_filter(grain, (smooth, smooth, 0))
    # A Gaussian of this width leaves the standard deviation below of white noise.
    offsets = np.arange(-4, 5)
    weights = np.exp(-0.5 * (offsets / smooth) ** 2)
    left = (weights ** 2).sum() / weights.sum() ** 2
    seen = signal + noise * np.sqrt(signal) * grain / left
    return np.maximum(seen, 0).astype(np.float32)


def acquire(rng, image, mask, shading, noise, level):
    """What an MR scanner makes of an image: (X, Y, Z) float32 with shading, noise and a scale.

    The noise is Rician, and it is in the air as well.

    image: (X, Y, Z) without noise.
    mask: (X, Y, Z) bool, the body.
    shading: (X, Y, Z), the relative sensitivity of the coil.
    noise: The standard deviation of the noise in either channel, relative to the mean in the mask.
    level: The mean of the result in the mask. It is arbitrary, as the units of a scanner are.
    """
    sigma = noise * image[mask].mean()
    real, imaginary = sigma * rng.standard_normal((2, *image.shape), dtype=np.float32)
    seen = np.hypot(image * shading + real, imaginary)
    return (seen * (level / seen[mask].mean())).astype(np.float32)
