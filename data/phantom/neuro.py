"""The set neuro: brains in up to seven modalities, with protocols that differ from scan to scan.

The files follow BIDS, and a sidecar tells the protocol of every scan. A *record* is what there is
to know of one scan, in the units of a scanner's console: TR, TE and TI (ms), FA (degrees), field
(T), dose (MBq), start and duration (s). For any record, `neuro_true` computes the image that this
subject would show. A record can also be one that nobody has scanned.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.files import DataError, read_json
from data.phantom.files import write_json, write_nifti, write_sheet
from data.phantom.geometry import rng_for, smooth_field
from data.phantom.head import head_anatomy, head_grid
from data.phantom.physics import (
    TISSUES,
    Protocol,
    acquire,
    acquire_ct,
    acquire_pet,
    at_field,
    null_time,
    render,
    render_ct,
    render_pet,
)

# The contrast -> the folder and the end of the name of its files.
FILES = {"t1": ("anat", "T1w"), "t2": ("anat", "T2w"), "flair": ("anat", "FLAIR"),
         "pd": ("anat", "PDw"), "ct": ("ct", "ct"), "fdg": ("pet", "trc-FDG_pet"),
         "av45": ("pet", "trc-AV45_pet")}
TRACERS = {"fdg": "FDG", "av45": "AV45"}
MISSING = 0.2           # T1 is never missing. T2, FLAIR, PD and CT each are in so many subjects
ONE_TRACER = 0.35       # the share of subjects with FDG alone, and of those with AV45 alone
BOTH_TRACERS = 0.25     # the rest, 5 %, has no PET

# What is drawn for a scan: {field: (lowest, highest, step)}, in the units of a record.
# The TI that nulls CSF at a TR of 8000, 9000 and 10000 ms is 2368, 2491 and 2591 ms, because the
# CSF of TISSUES has a T1 of 4330 ms. A usual range is 2200 to 2700 ms, for a shorter T1. Ours lies
# 50 ms higher, so that the null at a TR of 9000 ms is in its middle.
DRAWN = {"t1": {"TR": (400, 800, 10), "TE": (8, 20, 1)},
         "t2": {"TR": (3000, 6000, 10), "TE": (60, 140, 1)},
         "flair": {"TR": (8000, 10000, 10), "TE": (90, 140, 1), "TI": (2250, 2750, 10)},
         "pd": {"TR": (2500, 4000, 10), "TE": (10, 25, 1)},
         "ct": {"ma": (150, 300, 10)},
         "fdg": {"dose": (150, 400, 1), "start": (1800, 2700, 300), "duration": (600, 1800, 300)},
         "av45": {"dose": (200, 400, 1), "start": (3000, 3600, 300),
                  "duration": (600, 1200, 300)}}

MR_NOISE = 0.015        # see acquire
SHADING = 0.02          # strength of the coil shading
CT_NOISE = 2.0          # HU
PET_FWHM = 8.0          # mm
PET_NOISE = 0.03        # see acquire_pet; at PET_DOSE, and in proportion to 1 / sqrt(dose)
PET_DOSE = 250.0        # MBq
PET_UNIT = 0.1          # kBq/ml per MBq, where the uptake is 1
# The uptake of each tracer, relative to that of FDG in grey matter. AV45 binds to amyloid, but also
# to white matter, and a healthy brain shows little more than that. The numbers are ours.
UPTAKE = {"fdg": {"csf": 0.05, "gm": 1.0, "wm": 0.35, "deep": 1.05, "pallidum": 0.6, "vein": 0.2,
                  "gliosis": 0.3},
          "av45": {"csf": 0.1, "gm": 0.45, "wm": 0.9, "deep": 0.55, "pallidum": 0.7, "vein": 0.2,
                   "gliosis": 0.8}}


@dataclass(frozen=True)
class Site:
    """A hospital with three scanners of one vendor."""

    vendor: str
    field: float            # T
    mr: str                 # the model of the scanner of MR, of CT and of PET
    ct: str
    pet: str
    kvp: int                # kV
    kernel: str             # of CT
    recon: str              # of PET
    unit: str               # in which sidecars give the dose
    hides: tuple            # the keys that its sidecars never have


SITES = (Site("Siemens", 3.0, "Prisma", "SOMATOM Force", "Biograph mCT", 120, "H31s", "OSEM+TOF",
              "MBq", ()),
         Site("GE", 1.5, "Signa HDxt", "Revolution CT", "Discovery MI", 120, "SOFT", "VUE Point FX",
              "Bq", ("ReconMethodName",)),
         Site("UIH", 3.0, "uMR 790", "uCT 760", "uMI 780", 100, "B_SOFT_B", "OSEM", "MBq",
              ("FlipAngle", "XRayTubeCurrent")))
PER_MBQ = {"MBq": 1, "Bq": 1_000_000}
# The key of a field in a sidecar. Of these, times of MR are in seconds, and frames are lists.
KEYS = {"vendor": "Manufacturer", "model": "ManufacturersModelName",
        "field": "MagneticFieldStrength", "TR": "RepetitionTime", "TE": "EchoTime",
        "TI": "InversionTime", "FA": "FlipAngle", "start": "FrameTimesStart",
        "duration": "FrameDuration", "recon": "ReconMethodName", "kvp": "KVP",
        "ma": "XRayTubeCurrent", "kernel": "ConvolutionKernel"}
# Sidecars at the root hold for all files whose names end like theirs. A file's own sidecar has only
# what differs from them.
ROOT_SIDECARS = {"ct.json": {"KVP": 120},
                 "trc-FDG_pet.json": {"TracerName": "FDG", "TracerRadionuclide": "F18"},
                 "trc-AV45_pet.json": {"TracerName": "AV45", "TracerRadionuclide": "F18"}}
DESCRIPTION = {"Name": "neuro, a digital phantom (synthetic)", "BIDSVersion": "1.9.0",
               "DatasetType": "raw", "License": "CC0"}
README = """These images are synthetic. They are a digital phantom; there are no patients.

Skull-stripped brains in T1w, T2w, FLAIR, PDw, CT (HU) and PET with FDG and AV45 (kBq/ml).
All images of a subject share one grid. Voxels outside of the brain are 0, in CT as well.
The times, fields, doses and scanners are in the sidecars. They differ from scan to scan.
"""


# ---- Subjects and their true images --------------------------------------------------------------

def draw_scans(rng):
    """Draw which scans a subject has -> list of contrasts, in the order of FILES."""
    scans = ["t1"]
    for contrast in ("t2", "flair", "pd", "ct"):
        if rng.random() >= MISSING:
            scans.append(contrast)
    chance = rng.random()
    if chance < ONE_TRACER + BOTH_TRACERS:
        scans.append("fdg")
    if ONE_TRACER <= chance < 2 * ONE_TRACER + BOTH_TRACERS:
        scans.append("av45")
    return scans


def draw_record(rng, contrast, site, traits):
    """Draw the record of one scan of a person with these traits at a Site -> dict; see the top."""
    record = {"age": round(traits["age"]), "sex": traits["sex"], "vendor": site.vendor}
    if contrast == "ct":
        record.update(model=site.ct, kvp=site.kvp, kernel=site.kernel)
    elif contrast in TRACERS:
        record.update(model=site.pet, tracer=TRACERS[contrast], recon=site.recon)
    else:
        record.update(model=site.mr, field=site.field, FA=90)
    for field, (lowest, highest, step) in DRAWN[contrast].items():
        steps = rng.integers((highest - lowest) // step + 1)
        record[field] = lowest + step * int(steps)
    return record


def neuro_subject(seed, subject, grid):
    """One subject of the set on `grid` -> (Anatomy, {contrast: record}).

    A record has the fields that belong to the contrast: TR, TE, TI (ms), FA (degrees), field (T),
    dose (MBq), start and duration of the frame (s after the injection), tracer, recon, kvp (kV),
    ma (mA), kernel, and for all contrasts age (years), sex, vendor and model. It is complete, also
    where the sidecar of the scan hides something.

    The traits of the anatomy also hold the subject's total uptake, as {contrast: factor}.
    """
    anatomy = head_anatomy(seed, subject, grid, tumour=False)
    rng = rng_for(seed, subject, "uptake")
    factors = {contrast: float(np.exp(rng.normal(0, 0.15))) for contrast in TRACERS}
    anatomy = replace(anatomy, traits={**anatomy.traits, "uptake": factors})
    site = SITES[subject % len(SITES)]
    records = {}
    for contrast in draw_scans(rng_for(seed, subject, "which scans")):
        rng = rng_for(seed, subject, f"{contrast} record")
        records[contrast] = draw_record(rng, contrast, site, anatomy.traits)
    return anatomy, records


def protocol_of(contrast, record):
    """The Protocol of an MR record. See neuro_true for fields that it lacks."""
    known = {field: value for field, value in record.items() if value is not None}
    times = {}
    for field, (lowest, highest, _) in DRAWN[contrast].items():
        times[field] = known.get(field, (lowest + highest) / 2)
    tesla = known.get("field", 3.0)
    if contrast != "flair":
        return Protocol("se", tr=times["TR"], te=times["TE"], field=tesla)
    null = null_time(at_field(TISSUES["csf"].t1, tesla), times["TR"])
    return Protocol("ir", tr=times["TR"], te=times["TE"], ti=known.get("TI", null), field=tesla)


def scan_pet(rng, anatomy, contrast, dose, noise):
    """The PET of a subject (X, Y, Z) float32 in kBq/ml, 0 outside of the brain.

    contrast: "fdg" or "av45".
    dose: MBq.
    noise: See acquire_pet. 0 gives the true image, which is blurred as well.
    """
    relative = {}
    for name, value in UPTAKE[contrast].items():
        relative[name] = value / TISSUES[name].suv
    factor = anatomy.traits.get("uptake", {}).get(contrast, 1.0)
    uptake = factor * render_pet(anatomy, relative)
    seen = acquire_pet(rng, uptake, anatomy.grid, PET_FWHM, noise, 1)
    return (PET_UNIT * dose * seen * anatomy.mask).astype(np.float32)


def neuro_true(anatomy, contrast, record):
    """The image of a subject for any record, without noise and shading.

    The result is (X, Y, Z) float32 and 0 outside of the mask. CT is in HU and PET in kBq/ml. MR is
    relative to the proton density of water. T1, T2 and PD are spin echoes, and FLAIR is an
    inversion recovery with a spin echo.

    record: A dict; see neuro_subject. MR depends on TR, TE, TI and field. PET is in proportion to
        the dose. No other field has an effect. For a field that is absent or None, the middle of
        its range in DRAWN holds, but the field is 3 T, the dose 250 MBq, and TI nulls CSF.
    ValueError if there is no such contrast.
    """
    if contrast not in FILES:
        raise ValueError(f"neuro_true: unknown contrast {contrast!r}; "
                         f"use one of: {', '.join(FILES)}")
    if contrast in TRACERS:
        dose = record.get("dose")
        dose = PET_DOSE if dose is None else dose
        return scan_pet(np.random.default_rng(0), anatomy, contrast, dose, noise=0.0)
    if contrast != "ct":
        return render(anatomy, protocol_of(contrast, record))
    # render_ct lets the density of tissue vary by 1.5 %. That is 15 HU, which is more than grey and
    # white matter differ. The CT of a brain is more uniform, so we leave this variation out.
    uniform = replace(anatomy, variation=np.ones_like(anatomy.variation))
    return np.where(anatomy.mask, render_ct(uniform, 1.0), np.float32(0))


def neuro_tissues(anatomy):
    """Where one tissue fills more than 90 % of a voxel -> {"csf", "gm", "wm": bool (X, Y, Z)}.

    gm is the cortex. The deep nuclei have other relaxation times and belong to none of the three.
    """
    return {name: anatomy.maps[name] > 0.9 for name in ("csf", "gm", "wm")}


# ---- Scans and files -----------------------------------------------------------------------------

def neuro_images(seed, subject, anatomy, records):
    """What the scanners store for {contrast: record} -> {contrast: image (X, Y, Z)}.

    MR (arbitrary units) and CT (HU) are int16, PET (kBq/ml) is float32. Outside of the brain all is
    0. Inside, MR is at least 1.
    """
    coil = smooth_field(rng_for(seed, subject, "coil"), 90, anatomy.grid.axes())
    shading = np.exp(SHADING * coil)
    images = {}
    for contrast, record in records.items():
        rng = rng_for(seed, subject, contrast)
        if contrast in TRACERS:
            noise = PET_NOISE * np.sqrt(PET_DOSE / record["dose"])
            images[contrast] = scan_pet(rng, anatomy, contrast, record["dose"], noise)
            continue
        true = neuro_true(anatomy, contrast, record)
        if contrast == "ct":
            images[contrast] = acquire_ct(rng, true, CT_NOISE) * anatomy.mask
            continue
        level = np.exp(rng.uniform(np.log(200), np.log(1500)))
        image = acquire(rng, true, anatomy.mask, shading, MR_NOISE, level)
        stripped = np.rint(image * anatomy.mask)
        images[contrast] = np.clip(stripped, anatomy.mask, 32767).astype(np.int16)
    return images


def sidecar(record, site, inherited):
    """The sidecar of a scan at a Site, in the units of BIDS.

    inherited: The sidecar at the root that holds for this scan as well. It has the tracer.
    """
    content = {}
    for field, key in KEYS.items():
        if field not in record or key in site.hides or inherited.get(key) == record[field]:
            continue
        value = record[field]
        if field in ("TR", "TE", "TI"):
            value = round(value / 1000, 6)
        elif field in ("start", "duration"):
            value = [value]
        content[key] = value
    if "dose" in record:
        content["InjectedRadioactivity"] = record["dose"] * PER_MBQ[site.unit]
        content["InjectedRadioactivityUnits"] = site.unit
    return content


def write_neuro(folder, subjects, size, slices, seed):
    """Write a BIDS tree: a folder per subject with anat, ct and pet, and participants.tsv.

    The sheet does not know the age of every eighth subject, from the 6th on.
    Returns {subject: what is true of it}, for phantom.json.
    """
    grid = head_grid(size, slices)
    truth = {}
    rows = [["participant_id", "age", "sex"]]
    for subject in range(subjects):
        name = f"sub-{subject + 1:02d}"
        site = SITES[subject % len(SITES)]
        anatomy, records = neuro_subject(seed, subject, grid)
        for contrast, image in neuro_images(seed, subject, anatomy, records).items():
            kind, end = FILES[contrast]
            place = folder / name / kind
            place.mkdir(parents=True, exist_ok=True)
            inherited = ROOT_SIDECARS.get(f"{end}.json", {})
            write_nifti(place / f"{name}_{end}.nii.gz", image, grid)
            write_json(place / f"{name}_{end}.json", sidecar(records[contrast], site, inherited))
        age = "n/a" if subject % 8 == 5 else records["t1"]["age"]
        rows.append([name, age, anatomy.traits["sex"]])
        truth[name] = {**anatomy.traits, "records": records}
    write_sheet(folder / "participants.tsv", rows, delimiter="\t")
    for file, content in {**ROOT_SIDECARS, "dataset_description.json": DESCRIPTION}.items():
        write_json(folder / file, content)
    (folder / "README").write_text(README, encoding="utf-8", newline="\n")
    return truth


def neuro_truth(folder, name):
    """The subject `name`, such as "sub-07", of a folder that `make` wrote -> as neuro_subject.

    DataError if the folder is no neuro phantom, has no such subject, or if this version of the
    phantom would make another one.
    """
    path = Path(folder) / "phantom.json"
    try:
        note = read_json(path, {"truth": dict, "size": int, "slices": int, "seed": int})
    except DataError as error:
        raise DataError(f"{folder}: is no phantom ({error})") from error
    if note.get("name") != "neuro":
        raise DataError(f"{path}: is not of the phantom neuro")
    stored = note["truth"].get(name)
    if stored is None:
        raise DataError(f"{folder}: has no subject {name!r}")
    grid = head_grid(note["size"], note["slices"])
    anatomy, records = neuro_subject(note["seed"], list(note["truth"]).index(name), grid)
    if stored != {**anatomy.traits, "records": records}:
        raise DataError(f"{folder}: another version of the phantom made {name}; make it again")
    return anatomy, records
