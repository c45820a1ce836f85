"""Tissues, protocols and signal equations: what MR and CT show of an anatomy."""

from dataclasses import dataclass

import numpy as np


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
