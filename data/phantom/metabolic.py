"""The sets that pair an image of anatomy with one of metabolism or of blood.

They are petct, breast and cta. Each has a twin for tests of a model on data from elsewhere. Its
name ends in -external. The twin has the same files, but other scanners, another size of pixels and
other patients.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np

from data.phantom.breast import BREAST_REACH, breast_anatomy, breast_grid, draw_breast
from data.phantom.chest import chest_anatomy, chest_grid, draw_chest
from data.phantom.files import write_nifti, write_sheet
from data.phantom.geometry import Grid, rng_for, smooth_field
from data.phantom.neck import draw_neck, draw_organs, neck_anatomy, neck_grid
from data.phantom.physics import (
    Protocol,
    acquire,
    acquire_ct,
    acquire_pet,
    render,
    render_ct,
    render_pet,
)

# The twin of a set has people of its own: its first is number ELSEWHERE.
ELSEWHERE = 1000

# ---- PET and CT of head and neck -----------------------------------------------------------------

FINER = 2               # a pixel of PET is so many pixels of CT wide


@dataclass(frozen=True)
class PetCtScanner:
    """What makes one PET/CT differ from another."""

    fwhm: float             # mm, the blur of PET
    pet_noise: float        # see acquire_pet
    calibration: float      # what an SUV of 1 reads as
    ct_noise: float         # HU
    ct_shift: float         # HU, by which soft tissue reads too high
    mineral: float          # what bone reads as, relative to 120 kV


# The four sites of Head-Neck-PET-CT (Vallieres et al. 2017, Sci Rep 7:10117). The numbers are ours.
PETCT_SITES = {"CHUM": PetCtScanner(5.5, 0.13, 1.00, 12, 0, 1.00),
               "CHUS": PetCtScanner(6.0, 0.10, 1.03, 15, 2, 1.00),
               "HGJ": PetCtScanner(5.0, 0.15, 0.98, 10, -2, 1.02),
               "HMR": PetCtScanner(5.5, 0.12, 1.00, 18, 0, 0.98)}
# The twin stands for another hospital, with an older PET and a CT at 100 kV.
PETCT_ELSEWHERE = {"HS": PetCtScanner(7.0, 0.20, 1.12, 22, 6, 1.15)}
PETCT_ELSEWHERE_FIELD = 320             # mm

# Tissues whose uptake goes up and down together in one patient.
BRAIN_TISSUES = ("gm", "wm", "deep", "pallidum", "gliosis")
DISEASED_ORGANS = ("salivary", "tongue", "thyroid")


def petct_traits(seed, subject, external=False):
    """One patient of petct -> traits, as plain values for JSON. See draw_neck and draw_organs.

    external: True for a patient of the twin. Fewer of them have cancer, and fewer have the disease.
    """
    traits = draw_neck(rng_for(seed, subject, "traits"), healthy=0.3 if external else 0.0)
    # With few patients, chance alone can link the disease to the size of the tongue. With this word
    # and seed 0, the 24 patients of either set show no such link.
    organs = rng_for(seed, subject, "amyloidosis")
    traits["organs"] = draw_organs(organs, prevalence=0.3 if external else 0.4)
    return traits


def petct_uptake(rng, traits):
    """Draw the uptake of every tissue of a patient relative to TISSUES -> {tissue: factor}."""
    uptake = {}
    brain = rng.uniform(0.8, 1.2)
    for name in BRAIN_TISSUES:
        uptake[name] = brain
    for name in ("muscle", "tonsil", "mucosa", "marrow", "node", "vein"):
        uptake[name] = np.exp(rng.normal(0, 0.15))
    for name in DISEASED_ORGANS:
        uptake[name] = traits["organs"]["uptake"]
    uptake["tumour"] = traits["suv"] / 6.0
    return uptake


def petct_images(seed, subject, anatomy, scanner):
    """The images of a patient -> (ct int16 (X, Y, Z) in HU, pet float32 (X / 2, Y / 2, Z) in SUV).

    anatomy: On the grid of CT.
    """
    traits = anatomy.traits
    uptake = petct_uptake(rng_for(seed, subject, "uptake"), traits)
    true_uptake = scanner.calibration * render_pet(anatomy, uptake)
    pet = acquire_pet(rng_for(seed, subject, "pet"), true_uptake, anatomy.grid, scanner.fwhm,
                      scanner.pet_noise, FINER)
    added = dict.fromkeys(DISEASED_ORGANS, traits["organs"]["hu"])
    ct = render_ct(anatomy, traits["density"] * scanner.mineral, added)
    ct = ct + scanner.ct_shift * anatomy.mask
    return acquire_ct(rng_for(seed, subject, "ct"), ct, scanner.ct_noise), pet


def finer(grid, times):
    """A Grid that covers the same box with `times` as many pixels along x and along y."""
    x, y, gap = grid.step
    step = (x / times, y / times, gap)
    first = [start - old / 2 + new / 2 for start, old, new in zip(grid.first, grid.step, step)]
    nx, ny, nz = grid.shape
    return Grid((nx * times, ny * times, nz), step, tuple(first))


def coarser_mask(fraction, times):
    """Where at least half of a block of times x times pixels belongs to something -> uint8.

    fraction: (X, Y, Z), how much of each pixel belongs to it.
    """
    nx, ny, nz = fraction.shape
    blocks = fraction.reshape(nx // times, times, ny // times, times, nz)
    return (blocks.mean(axis=(1, 3)) >= 0.5).astype(np.uint8)


def write_petct(folder, subjects, size, slices, seed, external=False):
    """Write Head-Neck-PET-CT: one folder per patient with CT, PET and the tumours, and labels.csv.

    PET (SUV, float32) and seg have size x size pixels. CT (HU) has twice as many along a side.
    Returns {subject: what is true of it}, for phantom.json.
    """
    field = {"field": PETCT_ELSEWHERE_FIELD} if external else {}
    grid = neck_grid(size, slices, **field)
    sites = PETCT_ELSEWHERE if external else PETCT_SITES
    fine = finer(grid, FINER)
    truth = {}
    rows = [["subject", "label"]]
    for subject in range(subjects):
        site = tuple(sites)[subject % len(sites)]
        number = subject // len(sites) + 1
        name = f"HS-{number:03d}" if external else f"HN-{site}-{number:03d}"
        person = subject + (ELSEWHERE if external else 0)
        traits = petct_traits(seed, person, external)
        anatomy = neck_anatomy(seed, person, fine, traits)
        ct, pet = petct_images(seed, person, anatomy, sites[site])
        tumour = coarser_mask(anatomy.maps["tumour"] + anatomy.maps["necrosis"], FINER)
        (folder / name).mkdir()
        write_nifti(folder / name / "CT.nii.gz", ct, fine)
        write_nifti(folder / name / "PET.nii.gz", pet, grid)
        write_nifti(folder / name / "seg.nii.gz", tumour, grid)
        rows.append([name, traits["organs"]["label"]])
        truth[name] = {**traits, "site": site, "scanner": asdict(sites[site])}
    write_sheet(folder / "labels.csv", rows)
    return truth


# ---- Breasts before and after contrast agent -----------------------------------------------------

@dataclass(frozen=True)
class BreastScanner:
    """What makes one MR scanner of breasts differ from another."""

    protocol: Protocol      # before the injection
    dose: float             # of the injection; 1 is the standard
    fat: float              # the part of the signal of fat that its suppression leaves
    noise: float            # see acquire
    shading: float          # strength of the random part of the coil's shading


# Duke-Breast-Cancer-MRI (Saha et al. 2018, Br J Cancer 119:508) has fat-suppressed gradient echoes
# of GE and Siemens at 1.5 T and 3 T. The times are ours, in the range of theirs.
BREAST_SITES = {
    "GE 1.5T": BreastScanner(Protocol("gre", tr=5.3, te=2.4, flip=10, field=1.5), 1.0, 0.16,
                             0.05, 0.06),
    "GE 3T": BreastScanner(Protocol("gre", tr=6.4, te=2.1, flip=10), 1.0, 0.12, 0.035, 0.10),
    "Siemens 3T": BreastScanner(Protocol("gre", tr=4.1, te=1.5, flip=10), 1.0, 0.20, 0.04, 0.12)}
# Breast-MRI-NACT-Pilot (Newitt and Hylton 2016) has one scanner of 1.5 T with longer times. The
# tumours are larger, because they are to be shrunk before the operation.
BREAST_ELSEWHERE = {
    "GE Signa 1.5T": BreastScanner(Protocol("gre", tr=8.0, te=4.2, flip=20, field=1.5), 0.8, 0.10,
                                   0.07, 0.08)}
BREAST_ELSEWHERE_FIELD = 370            # mm


def coil_sensitivity(seed, subject, grid, strength):
    """How well the coil sees every voxel: (X, Y, Z). Its loops lie around the breasts.

    The chest behind them is therefore darker.

    strength: Of the random part.
    """
    axes = grid.axes()
    depth = axes[1][None, :, None]
    near = 0.35 + 0.65 / (1 + np.exp(-(depth + 62) / 24))
    coil = smooth_field(rng_for(seed, subject, "coil"), 90, axes, BREAST_REACH)
    return near * np.exp(strength * coil)


def breast_images(seed, subject, anatomy, scanner):
    """The images of a woman -> (pre, post), both (X, Y, Z) int16, on one scale.

    The scanner is not adjusted between the two, so post - pre is what the contrast agent adds.
    """
    traits = anatomy.traits
    pd, t1, t2 = anatomy.factors["fat"]
    suppressed = replace(anatomy, factors={**anatomy.factors, "fat": (pd * scanner.fat, t1, t2)})
    uptake = {"parenchyma": traits["kinetics"], "tumour": traits["tumour"]["uptake"]}
    before = render(suppressed, scanner.protocol)
    after = render(suppressed, replace(scanner.protocol, dose=scanner.dose), uptake)
    both = np.stack([before, after])
    masks = np.stack([anatomy.mask, anatomy.mask])
    sensitivity = coil_sensitivity(seed, subject, anatomy.grid, scanner.shading)
    rng = rng_for(seed, subject, "mr")
    level = np.exp(rng.uniform(np.log(150), np.log(800)))
    # One acquisition of both: one scale, and noise of one strength.
    images = acquire(rng, both, masks, sensitivity, scanner.noise, level)
    pre, post = np.clip(np.rint(images), 0, 32767).astype(np.int16)
    return pre, post


def write_breast(folder, subjects, size, slices, seed, external=False):
    """Write breast MR as NIfTI: one folder per woman with pre, post and the mask of the tumour.

    Returns {subject: what is true of her}, for phantom.json.
    """
    field = {"field": BREAST_ELSEWHERE_FIELD} if external else {}
    grid = breast_grid(size, slices, **field)
    sites = BREAST_ELSEWHERE if external else BREAST_SITES
    truth = {}
    for subject in range(subjects):
        site = tuple(sites)[subject % len(sites)]
        number = subject + 1
        name = f"UCSF-BR-{number:02d}" if external else f"Breast_MRI_{number:03d}"
        person = subject + (ELSEWHERE if external else 0)
        traits = draw_breast(rng_for(seed, person, "traits"), 15.0 if external else 12.0)
        anatomy = breast_anatomy(seed, person, grid, traits)
        pre, post = breast_images(seed, person, anatomy, sites[site])
        (folder / name).mkdir()
        write_nifti(folder / name / "pre.nii.gz", pre, grid)
        write_nifti(folder / name / "post.nii.gz", post, grid)
        write_nifti(folder / name / "seg.nii.gz", anatomy.labels, grid)
        truth[name] = {**traits, "site": site, "scanner": asdict(sites[site])}
    return truth


# ---- CT of the chest before and after iodine -----------------------------------------------------

@dataclass(frozen=True)
class CtaScanner:
    """What makes one CT scanner of chests differ from another."""

    iodine: float           # the HU that iodine adds, relative to IODINE
    noise: float            # HU, without contrast agent
    angio_noise: float      # HU, of the CTA
    shift: float            # HU, by which soft tissue reads too high
    mineral: float          # what bone reads as, relative to 120 kV


# HU that an injection adds at the time of a CTA; the numbers are ours. Blood in the aorta and the
# heart then reads 250 to 400 HU. The agent comes from the arm, so the right side has the most. The
# veins of the lower body have not got any yet.
IODINE = {"right heart": 325, "artery": 315, "lung vein": 310, "left heart": 305, "aorta": 300,
          "coronary": 285, "myocardium": 60, "vein": 35, "liver": 15, "muscle": 6, "lung": 12,
          "marrow": 6}
CTA_SITES = {"A": CtaScanner(1.00, 14, 16, 0, 1.00), "B": CtaScanner(0.93, 18, 20, 3, 0.98)}
# The twin is at 100 kV, where iodine and bone read higher and the noise is larger. Its patients are
# older.
CTA_ELSEWHERE = {"C": CtaScanner(1.12, 26, 30, 8, 1.13)}
CTA_ELSEWHERE_FIELD = 380               # mm


def cta_images(seed, subject, anatomy, scanner):
    """The images of a patient -> (ct, cta), both (X, Y, Z) int16 in HU."""
    traits = anatomy.traits
    rng = rng_for(seed, subject, "iodine")
    dose = scanner.iodine * rng.uniform(0.9, 1.12)
    added = {}
    for name, hu in IODINE.items():
        # The heart beats faster or slower, so each part is a little early or late.
        added[name] = hu * dose * np.exp(rng.normal(0, 0.05))
    density = traits["density"] * scanner.mineral
    plain = render_ct(anatomy, density) + scanner.shift * anatomy.mask
    angio = render_ct(anatomy, density, added) + scanner.shift * anatomy.mask
    ct = acquire_ct(rng_for(seed, subject, "ct"), plain, scanner.noise)
    cta = acquire_ct(rng_for(seed, subject, "cta"), angio, scanner.angio_noise)
    return ct, cta


def write_cta(folder, subjects, size, slices, seed, external=False):
    """Write chest CT as NIfTI: one folder per patient with CT and CTA, in HU.

    Returns {subject: what is true of it}, for phantom.json.
    """
    field = {"field": CTA_ELSEWHERE_FIELD} if external else {}
    grid = chest_grid(size, slices, **field)
    sites = CTA_ELSEWHERE if external else CTA_SITES
    truth = {}
    for subject in range(subjects):
        site = tuple(sites)[subject % len(sites)]
        name = f"EXT{subject + 1:03d}" if external else f"CTA{subject + 1:03d}"
        person = subject + (ELSEWHERE if external else 0)
        traits = draw_chest(rng_for(seed, person, "traits"), 68.0 if external else 58.0)
        anatomy = chest_anatomy(seed, person, grid, traits)
        ct, cta = cta_images(seed, person, anatomy, sites[site])
        (folder / name).mkdir()
        write_nifti(folder / name / "CT.nii.gz", ct, grid)
        write_nifti(folder / name / "CTA.nii.gz", cta, grid)
        truth[name] = {**traits, "site": site, "scanner": asdict(sites[site])}
    return truth
