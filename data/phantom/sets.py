"""The sets: which scanners image the subjects, and in which files a data set keeps the images."""

from dataclasses import asdict, replace
from datetime import date, timedelta
from functools import partial

import numpy as np

from data.phantom.files import write_nifti, write_sheet
from data.phantom.geometry import rng_for, smooth_field
from data.phantom.head import SCALP_FIELD, head_anatomy, head_grid
from data.phantom.metabolic import write_breast, write_cta, write_petct
from data.phantom.neuro import write_neuro
from data.phantom.pelvis import PELVIS_REACH, pelvis_anatomy, pelvis_grid
from data.phantom.physics import (
    TISSUES,
    Protocol,
    acquire,
    acquire_ct,
    at_field,
    null_time,
    render,
    render_ct,
)
from data.phantom.torso import write_cxr


def _as_dicts(protocols):
    """{contrast: Protocol} as plain values for JSON."""
    return {contrast: asdict(protocol) for contrast, protocol in protocols.items()}


# ---- BraTS ---------------------------------------------------------------------------------------

CONTRASTS = ("flair", "t1", "t1ce", "t2")


def brats_protocols(rng):
    """Draw the protocols of one BraTS subject -> {contrast: Protocol}.

    Hospitals differ. The field is 1.5 T or 3 T, T1 is a spin echo or a gradient echo, and all times
    are their own. FLAIR nulls CSF within 3 % of the right time.
    """
    field = float(rng.choice((1.5, 3.0)))

    def t1_weighted(dose):
        if rng.random() < 0.5:
            return Protocol("se", tr=rng.uniform(450, 650), te=rng.uniform(8, 15), field=field,
                            dose=dose)
        return Protocol("gre", tr=rng.uniform(8, 12), te=rng.uniform(3, 5),
                        flip=rng.uniform(18, 26), field=field, dose=dose)

    # The order of these lines is the order of the draws.
    tr = rng.uniform(8000, 10000)
    null = null_time(at_field(TISSUES["csf"].t1, field), tr)
    ti = null * rng.uniform(0.97, 1.03)
    return {"flair": Protocol("ir", tr=tr, te=rng.uniform(90, 130), ti=ti, field=field),
            "t1": t1_weighted(0.0),
            "t1ce": t1_weighted(rng.uniform(0.8, 1.2)),
            "t2": Protocol("se", tr=rng.uniform(3500, 6000), te=rng.uniform(80, 115), field=field)}


def brats_subject(seed, subject, grid):
    """One subject of the set -> (Anatomy, {contrast: Protocol}, {contrast: image}).

    An image is (X, Y, Z) int16, at least 1 inside of the brain and 0 outside.
    """
    anatomy = head_anatomy(seed, subject, grid)
    protocols = brats_protocols(rng_for(seed, subject, "protocol"))
    coil = smooth_field(rng_for(seed, subject, "coil"), 90, grid.axes())
    images = {}
    for contrast, protocol in protocols.items():
        rng = rng_for(seed, subject, contrast)
        shading = np.exp(rng.uniform(0.04, 0.10) * coil)
        level = np.exp(rng.uniform(np.log(150), np.log(1500)))
        noise = rng.uniform(0.015, 0.04)
        image = acquire(rng, render(anatomy, protocol), anatomy.mask, shading, noise, level)
        stripped = np.rint(image * anatomy.mask)
        images[contrast] = np.clip(stripped, anatomy.mask, 32767).astype(np.int16)
    return anatomy, protocols, images


def write_brats(folder, subjects, size, slices, seed):
    """Write BraTS 2021: one folder per subject with four contrasts and the tumour.

    Returns {subject: what is true of it}, for phantom.json.
    """
    grid = head_grid(size, slices)
    truth = {}
    for subject in range(subjects):
        name = f"BraTS2021_{subject:05d}"
        anatomy, protocols, images = brats_subject(seed, subject, grid)
        (folder / name).mkdir()
        for contrast in CONTRASTS:
            write_nifti(folder / name / f"{name}_{contrast}.nii.gz", images[contrast], grid)
        write_nifti(folder / name / f"{name}_seg.nii.gz", anatomy.labels, grid)
        truth[name] = {**anatomy.traits, "protocols": _as_dicts(protocols)}
    return truth


# ---- IXI -----------------------------------------------------------------------------------------

# IXI (brain-development.org) has images of healthy people from three hospitals of London. The times
# of Guys and HH are published. Those of IOP are not, so ours are only plausible. T2 and PD are the
# two echoes of one sequence. The T1 of IXI is prepared by an inversion that its protocol does not
# state. A plain gradient echo with the stated times shows the same order of tissues, with less
# contrast.
IXI_PROTOCOLS = {
    "Guys": {"t1": Protocol("gre", tr=9.813, te=4.603, flip=8, field=1.5),      # Philips 1.5 T
             "t2": Protocol("se", tr=8178.34, te=100, field=1.5),
             "pd": Protocol("se", tr=8178.34, te=8, field=1.5)},
    "HH": {"t1": Protocol("gre", tr=9.6, te=4.6, flip=8),                       # Philips 3 T
           "t2": Protocol("se", tr=5725.79, te=100),
           "pd": Protocol("se", tr=5725.79, te=8)},
    "IOP": {"t1": Protocol("gre", tr=14, te=5, flip=18, field=1.5),             # GE 1.5 T
            "t2": Protocol("se", tr=5200, te=88, field=1.5),
            "pd": Protocol("se", tr=5200, te=17, field=1.5)},
}
# (noise as in `acquire`, strength of the coil shading)
IXI_SCANNERS = {"Guys": (0.030, 0.06), "HH": (0.020, 0.13), "IOP": (0.045, 0.09)}
IXI_HIDDEN_TE = {"Guys": 40, "HH": 90, "IOP": 160}      # ms
IXI_COLUMNS = ["IXI_ID", "SEX_ID (1=m, 2=f)", "HEIGHT", "WEIGHT", "ETHNIC_ID", "MARITAL_ID",
               "OCCUPATION_ID", "QUALIFICATION_ID", "DOB", "DATE_AVAILABLE", "STUDY_DATE", "AGE"]
IXI_AXES = {"t1": "PSR", "t2": "LPS", "pd": "LPS"}      # T1 is stored in sagittal planes


def ixi_protocols(site, hidden=False):
    """The protocols {contrast: Protocol} of an IXI hospital, "Guys", "HH" or "IOP".

    hidden: True for the set ixi-hidden. T1 and PD are then those of Guys everywhere, and only the
        echo time of T2 differs. Nobody can tell the hospital from T1 and PD. A model that is not
        told the hospital can do no better for T2 than the average over the hospitals.
    """
    if not hidden:
        return IXI_PROTOCOLS[site]
    common = IXI_PROTOCOLS["Guys"]
    return {**common, "t2": replace(common["t2"], te=IXI_HIDDEN_TE[site])}


def ixi_anatomy(seed, subject, grid):
    """One healthy head with scalp -> Anatomy."""
    return head_anatomy(seed, subject, grid, tumour=False, scalp=True)


def ixi_images(seed, subject, anatomy, site, hidden=False):
    """The images of a subject at a hospital: {contrast: (X, Y, Z) int16}, with noise in the air.

    hidden: See ixi_protocols. Noise and shading are then those of Guys as well. T1 and PD are the
        same at every hospital, bit for bit.
    """
    noise, strength = IXI_SCANNERS["Guys" if hidden else site]
    coil = smooth_field(rng_for(seed, subject, "coil"), 90, anatomy.grid.axes())
    shading = np.exp(strength * coil)
    images = {}
    for contrast, protocol in ixi_protocols(site, hidden).items():
        rng = rng_for(seed, subject, contrast)
        level = np.exp(rng.uniform(np.log(150), np.log(800)))
        image = acquire(rng, render(anatomy, protocol), anatomy.mask, shading, noise, level)
        images[contrast] = np.clip(np.rint(image), 0, 32767).astype(np.int16)
    return images


def write_ixi_scans(folder, name, images, grid):
    """Write the images {contrast: (X, Y, Z)} of one subject as FOLDER/IXI-T1/NAME-T1.nii.gz, ..."""
    for contrast, image in images.items():
        place = folder / f"IXI-{contrast.upper()}"
        place.mkdir(exist_ok=True)
        file = place / f"{name}-{contrast.upper()}.nii.gz"
        write_nifti(file, image, grid, IXI_AXES[contrast])


def ixi_row(rng, number, traits):
    """One line of IXI.csv, as a list. Height (cm) and weight (kg) are 0 if they are not known."""
    height = round(rng.normal(176 if traits["sex"] == "M" else 163, 6))
    weight = round(rng.normal(25, 3) * (height / 100) ** 2)
    if rng.random() < 0.1:
        height = 0
        weight = 0
    codes = []
    for highest in (4, 5, 8, 5):        # ethnic, marital, occupation, qualification
        codes.append(int(rng.integers(1, highest + 1)))
    studied = date(2005, 6, 1) + timedelta(days=int(rng.integers(600)))
    born = studied - timedelta(days=round(365.25 * traits["age"]))
    sex = 1 if traits["sex"] == "M" else 2
    return [number, sex, height, weight, *codes, born, 1, studied, f"{traits['age']:.2f}"]


def write_ixi(folder, subjects, size, slices, seed, hidden=False):
    """Write IXI: one folder per contrast, and IXI.csv.

    The sheet has the gaps of the real one. The 4th subject has no age, the 5th has no line, and the
    6th has two equal lines.

    hidden: See ixi_protocols.
    Returns {subject: what is true of it}, for phantom.json.
    """
    grid = head_grid(size, slices, SCALP_FIELD)
    truth = {}
    rows = [IXI_COLUMNS]
    for subject in range(subjects):
        number = subject + 2
        site = tuple(IXI_PROTOCOLS)[subject % 3]
        name = f"IXI{number:03d}-{site}-{828 + 7 * subject:04d}"
        anatomy = ixi_anatomy(seed, subject, grid)
        images = ixi_images(seed, subject, anatomy, site, hidden)
        write_ixi_scans(folder, name, images, grid)
        row = ixi_row(rng_for(seed, subject, "sheet"), number, anatomy.traits)
        if subject == 3:
            rows.append([*row[:-1], ""])
        elif subject == 5:
            rows += [row, row]
        elif subject != 4:
            rows.append(row)
        truth[name] = {**anatomy.traits, "site": site,
                       "protocols": _as_dicts(ixi_protocols(site, hidden))}
    write_sheet(folder / "IXI.csv", rows)
    return truth


# ---- Pelvis --------------------------------------------------------------------------------------

# Gold Atlas (Nyholm et al. 2018, Med Phys 45:1295) shows men with prostate or rectal cancer from
# three sites. The makes and times below are ours, in the range of clinical protocols. T2 is a fast
# spin echo. What its many echoes do to fat is written at TISSUES.
PELVIS_PROTOCOLS = {
    "GE 3T": {"t1": Protocol("se", tr=620, te=8), "t2": Protocol("se", tr=6500, te=97)},
    "Siemens 1.5T": {"t1": Protocol("gre", tr=7.5, te=4.8, flip=14, field=1.5),
                     "t2": Protocol("se", tr=5000, te=86, field=1.5)},
    "Siemens 3T": {"t1": Protocol("se", tr=500, te=12), "t2": Protocol("se", tr=12000, te=110)},
}
# (noise of MR as in `acquire`, strength of the coil shading, noise of CT in HU)
PELVIS_SCANNERS = {"GE 3T": (0.030, 0.12, 12),
                   "Siemens 1.5T": (0.045, 0.06, 18),
                   "Siemens 3T": (0.025, 0.15, 26)}


def pelvis_images(seed, subject, anatomy, scanner):
    """The images of a subject at the site of a scanner: {"t1", "t2", "ct": (X, Y, Z) int16}.

    There is noise in the air, and CT is in HU.
    """
    noise, strength, ct_noise = PELVIS_SCANNERS[scanner]
    coil = smooth_field(rng_for(seed, subject, "coil"), 110, anatomy.grid.axes(), PELVIS_REACH)
    shading = np.exp(strength * coil)
    images = {}
    for contrast, protocol in PELVIS_PROTOCOLS[scanner].items():
        rng = rng_for(seed, subject, contrast)
        level = np.exp(rng.uniform(np.log(150), np.log(800)))
        image = acquire(rng, render(anatomy, protocol), anatomy.mask, shading, noise, level)
        images[contrast] = np.clip(np.rint(image), 0, 32767).astype(np.int16)
    ct = render_ct(anatomy, anatomy.traits["density"])
    images["ct"] = acquire_ct(rng_for(seed, subject, "ct"), ct, ct_noise)
    return images


def write_pelvis(folder, subjects, size, slices, seed):
    """Write Gold Atlas as NIfTI: one folder per patient with T1, T2 and CT, and meta.csv.

    The sheet does not know the age of every fifth patient, from the 4th on.
    Returns {subject: what is true of it}, for phantom.json.
    """
    grid = pelvis_grid(size, slices)
    truth = {}
    rows = [["patient", "age", "sex", "scanner", "body"]]
    for subject in range(subjects):
        site = subject % 3 + 1
        scanner = tuple(PELVIS_PROTOCOLS)[subject % 3]
        name = f"{site}_{subject // 3 + 1:02d}_P"
        anatomy = pelvis_anatomy(seed, subject, grid)
        (folder / name).mkdir()
        for contrast, image in pelvis_images(seed, subject, anatomy, scanner).items():
            write_nifti(folder / name / f"{contrast.upper()}.nii.gz", image, grid)
        age = "" if subject % 5 == 3 else f"{anatomy.traits['age']:.0f}"
        rows.append([name, age, "M", scanner, "pelvis"])
        truth[name] = {**anatomy.traits, "scanner": scanner,
                       "protocols": _as_dicts(PELVIS_PROTOCOLS[scanner])}
    write_sheet(folder / "meta.csv", rows)
    return truth


# The name of a set -> the function that writes it.
SETS = {"brats": write_brats,
        "ixi": write_ixi,
        "ixi-hidden": partial(write_ixi, hidden=True),
        "neuro": write_neuro,
        "pelvis": write_pelvis,
        "petct": write_petct,
        "petct-external": partial(write_petct, external=True),
        "breast": write_breast,
        "breast-external": partial(write_breast, external=True),
        "cta": write_cta,
        "cta-external": partial(write_cta, external=True),
        "cxr": write_cxr}
# The usual numbers (subjects, slices) of a set, for sets that do not have the usual 24 and 12.
USUAL_NUMBERS = {"neuro": (40, 16), "cxr": (400, 1)}


def usual_numbers(name):
    """How many subjects and slices a set has if nobody asks for others -> (subjects, slices)."""
    return USUAL_NUMBERS.get(name, (24, 12))
