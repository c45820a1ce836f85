"""The sets: whose scanners image which subjects, and in which files a data set of that name keeps them."""

import csv
import gzip
import io
from dataclasses import asdict, replace
from datetime import date, timedelta
from functools import partial

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from data.phantom.geometry import rng_for, smooth_field
from data.phantom.head import SCALP_FIELD, head_anatomy, head_grid
from data.phantom.pelvis import PELVIS_REACH, pelvis_anatomy, pelvis_grid
from data.phantom.physics import TISSUES, Protocol, acquire, acquire_ct, at_field, null_time, render, render_ct

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
