"""Small hand-made scans and folders of them, for the tests of data."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np

from data import open_dataset
from data.phantom.anatomy import Anatomy
from data.phantom.geometry import Grid
from data.phantom.head import head_grid
from data.phantom.physics import TISSUES

SHAPE = (14, 18, 9)
AFFINE = np.array([[2.875, 0, 0, -13], [0, 3, 0, -25], [0, 0, 4, 7], [0, 0, 0, 1]], float)


def head(shape=SHAPE, seed=0):
    """A textured ellipsoid in a background of exactly 0; every voxel inside is between 100 and 200."""
    x, y, z = np.meshgrid(*[np.linspace(-1.2, 1.2, n) for n in shape], indexing="ij")
    noise = np.random.default_rng(seed).uniform(100, 200, shape)
    return np.where(x**2 + y**2 + 0.5 * z**2 < 1, noise, 0).astype(np.float32)


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def make_set(folder, subjects=4, contrasts=("flair", "t1")):
    for s in range(subjects):
        name = f"BraTS2021_{s:05d}"
        for c, contrast in enumerate(contrasts):
            save(folder / name / f"{name}_{contrast}.nii.gz", head(seed=10 * s + c))
    return folder


def opened(folder, **options):
    """open_dataset on a small set with its own cache -> (dataset, lines said)."""
    lines = []
    options = {"size": 20, "cache": folder.parent / "cache", "say": lines.append, **options}
    return open_dataset(folder, **options), "\n".join(lines)


def oriented(codes, shape, oblique=0.0):
    """An affine whose axes point to `codes` (such as LPS), 2 x 3 x 4 mm, turned by `oblique` radians about two axes."""
    c, s = np.cos(oblique), np.sin(oblique)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine = np.eye(4)
    for axis, (code, edge) in enumerate(zip(codes, (2, 3, 4))):
        column = np.zeros(3)
        column["RAS".index(code) if code in "RAS" else "LPI".index(code)] = edge if code in "RAS" else -edge
        affine[:3, axis] = turn @ column
    affine[:3, 3] = [5, -6, 7]
    return affine


def shifted(affine, voxels):
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ np.asarray(voxels, float)
    return moved


def scan(shape=SHAPE, seed=0):
    """A CT in HU: a body of -100 to 1400 that lies on a table with a gap, air of -1000, padding of -3024 outside."""
    body = head(shape, seed) > 0
    hu = np.where(body, np.random.default_rng(seed).uniform(-100, 1400, shape), -1000).astype(np.float32)
    hu[:, -1] = -3024
    hu[:, 0] = 200  # the table reaches along the whole scan
    return hu, body


def make_patients(folder, names, sheet, text):
    for s, name in enumerate(names):
        save(folder / name / "T1.nii.gz", head(seed=s))
    (folder / sheet).write_text(text, encoding="utf-8")
    return folder


def make_slices(folder, counts=(("train", 5), ("val", 2), ("test", 4)), contrasts=("T1", "PD"), shape=(10, 14)):
    """The value of a pixel tells contrast, part and slice; slice 10 sorts behind slice 9, not 1."""
    for c, contrast in enumerate(contrasts):
        for p, (part, count) in enumerate(counts):
            for i in range(count):
                (folder / contrast / part).mkdir(parents=True, exist_ok=True)
                slice_ = np.zeros(shape)
                slice_[2:4, 5] = 0.3 + c / 4 + p / 8 + i / 128
                np.save(folder / contrast / part / f"slice_{8 + i}.npy", slice_)
    return folder


FINE = AFFINE @ np.diag([1, 1, 0.5, 1])  # 2 mm between slices: every second one is one of AFFINE's


def sagittal(array, affine):
    """Canonical (X, Y, Z) as a sagittal scan stores it: axes to the back, to the head, to the right."""
    turn = np.array([[0, 0, 1, 0], [-1, 0, 0, array.shape[1] - 1], [0, 1, 0, 0], [0, 0, 0, 1]])
    return np.ascontiguousarray(array[:, ::-1].transpose(1, 2, 0)), affine @ turn


def fine_head(seed):
    return head((14, 18, 17), seed)


def echoes(seed):
    """PD and T2 of one head, brighter towards the crown, as coil and anatomy have it; they overlap in value."""
    ramp = np.linspace(0.8, 1.2, SHAPE[2])
    return (1.5 * head(seed=seed) * ramp).astype(np.float32), (head(seed=seed + 1) * ramp).astype(np.float32)


def in_one_file(first, second, form):
    if form == "4-D":
        return np.stack([first, second], -1)
    stack = np.concatenate([first, second], 2)
    if form == "alternating":
        stack[..., ::2], stack[..., 1::2] = first, second
    return stack


def make_ixi(folder, names, in_one_folder=False):
    for seed, name in enumerate(names):
        pd, t2 = echoes(10 * seed)
        for contrast, (array, affine) in {"T1": sagittal(fine_head(10 * seed + 2), FINE), "T2": (t2, AFFINE),
                                          "PD": (pd, AFFINE)}.items():
            save(folder / ("" if in_one_folder else f"IXI-{contrast}") / f"{name}-{contrast}.nii.gz", array, affine)
    return folder


IXI_NAMES = ("IXI002-Guys-0828", "IXI012-HH-1211", "IXI035-IOP-0873")
HEADER = "IXI_ID{0}\"SEX_ID (1=m, 2=f)\"{0}HEIGHT{0}AGE"


def adni(folder, person, series, day, files, time="09_47_59.0"):
    """files: {end of the name: (array, affine)} of one series."""
    for end, (array, affine) in files.items():
        name = f"ADNI_{person}_MR_{series}__br_raw_20061115094759_1_S22556_I29704{end}"
        save(folder / person / series / f"{day}_{time}" / "I29704" / name, array, affine)


def make_adni(folder):
    """Five visits of three persons, each with its PD/T2 in another form; the last lacks PD/T2."""
    forms = (("002_S_0413", "2006-11-15", "Axial_PD_T2_FSE", "4-D"),
             ("002_S_0413", "2007-05-20", "Axial_PD_T2_TSE", "alternating"),
             ("005_S_0221", "2006-01-02", "Double_TSE", "halves"), ("011_S_0002", "2005-08-26", "AX_PD-T2", None))
    for seed, (person, day, series, form) in enumerate(forms):
        pd, t2 = echoes(10 * seed)
        files = {".nii": (in_one_file(t2, pd, form), AFFINE)} if form else {"_e1.nii": (pd, AFFINE),
                                                                             "_e2.nii": (t2, AFFINE)}
        adni(folder, person, series, day, files)
        adni(folder, person, "MPRAGE", day, {".nii": sagittal(fine_head(10 * seed + 2), FINE)}, "09_12_00.0")
        adni(folder, person, "MP-RAGE_Repeat", day, {".nii": sagittal(fine_head(99), FINE)}, "09_20_00.0")
    adni(folder, "005_S_0221", "MP-RAGE_REPEAT", "2006-07-08", {".nii": sagittal(fine_head(50), FINE)})
    adni(folder, "005_S_0221", "3-plane_localizer", "2006-07-08", {".nii": (head(), AFFINE)})
    return folder


ADNI_NAMES = ["002_S_0413_2006-11-15", "002_S_0413_2007-05-20", "005_S_0221_2006-01-02", "005_S_0221_2006-07-08",
              "011_S_0002_2005-08-26"]


# ---- Phantoms --------------------------------------------------------------------------------------------------------

GRID = head_grid(48, 8)


def one_voxel(maps):
    """An anatomy of a single voxel with the textbook's tissue values."""
    ones = np.ones((1, 1, 1))
    return Anatomy(Grid((1, 1, 1), (1, 1, 1), (0, 0, 0)), ones > 0, {name: f * ones for name, f in maps.items()},
                   {name: (1, 1, 1) for name in maps}, np.ones((3, 1, 1, 1)), ones, np.zeros((1, 1, 1), np.uint8), {})


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def textbook(anatomy):
    """The same geometry without this subject's deviations from the tissue table."""
    return replace(anatomy, factors={name: (1, 1, 1) for name in TISSUES}, variation=np.ones_like(anatomy.variation),
                   texture=np.ones_like(anatomy.texture))


def pure(anatomy, name):
    return anatomy.maps[name] > 0.99


def psnr(a, b):
    """Mean over subjects of the mean over slices, range 1. (subjects, Z, X, Y) each."""
    return (-10 * np.log10(((a - b) ** 2).mean(axis=(2, 3)))).mean()


def look_up(source, target, image):
    """The mean target at each of 64 source intensities, applied to `image`: what needs no anatomy."""
    def bins(x):
        return np.minimum((x * 64).astype(int), 63)

    total = np.bincount(bins(source).ravel(), target.ravel(), 64)
    count = np.bincount(bins(source).ravel(), minlength=64)
    return (total / np.maximum(count, 1))[bins(image)]


# ---- Pairs: CT and PET, CT and CTA, before and after an agent --------------------------------------------------------

PET_SHAPE = (12, 12, 6)
PET_AFFINE = np.array([[6, 0, 0, -33], [0, 6, 0, -33], [0, 0, 5, 0], [0, 0, 0, 1]], float)
CT_SHAPE = (48, 48, 10)
# 1.5 mm pixels and 3 mm slices; the box of the CT is that of the PET.
CT_AFFINE = np.array([[1.5, 0, 0, -35.25], [0, 1.5, 0, -35.25], [0, 0, 3, -1], [0, 0, 0, 1]], float)


def cylinder(shape, radius=0.7):
    """True in a cylinder along z; radius is a share of half the width."""
    x, y = np.meshgrid(*[(np.arange(n) + 0.5) * 2 / n - 1 for n in shape[:2]], indexing="ij")
    return np.repeat((x**2 + y**2 < radius**2)[..., None], shape[2], axis=2)


def body_ct(seed=0, shape=CT_SHAPE):
    """A body of -100 to 1400 HU in air."""
    hu = np.random.default_rng(seed).uniform(-100, 1400, shape)
    return np.where(cylinder(shape), hu, -1000).astype(np.float32)


def body_pet(seed=0, shape=PET_SHAPE):
    """A body of SUV 0.5 to 4 in air with SUV up to 0.15, and one voxel of SUV 30."""
    rng = np.random.default_rng(seed)
    suv = np.where(cylinder(shape), rng.uniform(0.5, 4, shape), rng.uniform(0, 0.15, shape))
    suv[shape[0] // 2, shape[1] // 2, shape[2] // 2] = 30
    return suv.astype(np.float32)


def make_pet_ct(folder, subjects=3, names=("CT", "PET")):
    for s in range(subjects):
        save(folder / f"p{s}" / f"{names[0]}.nii.gz", body_ct(s), CT_AFFINE)
        save(folder / f"p{s}" / f"{names[1]}.nii.gz", body_pet(s), PET_AFFINE)
    return folder


def breast(seed=0):
    """MR before and after an agent, on one arbitrary scale; a box enhances to more than twice its value."""
    pre = head(seed=seed)
    post = pre.copy()
    post[6:9, 8:11, 3:6] *= 2.2
    return pre, post


def make_breasts(folder, subjects=3):
    for s in range(subjects):
        pre, post = breast(s)
        save(folder / f"p{s}" / "pre.nii.gz", pre)
        save(folder / f"p{s}" / "post.nii.gz", post)
    return folder


# ---- BIDS ------------------------------------------------------------------------------------------------------------

def make_bids(folder, scans, texts=None):
    """scans: {path without .nii.gz: its sidecar, or None}; texts: {other file: its text, or a dict for JSON}."""
    for seed, (name, sidecar) in enumerate(scans.items()):
        save(folder / f"{name}.nii.gz", head(seed=seed))
        if sidecar is not None:
            (folder / f"{name}.json").write_text(json.dumps(sidecar))
    for name, text in (texts or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return folder
