"""Digital phantoms: synthetic subjects of known anatomy and physics, in files like real data.

    python -m data.phantom brats data/brats             four contrasts of heads, most with a tumour
    python -m data.phantom ixi data/ixi                 T1, T2, PD of three hospitals, with IXI.csv
    python -m data.phantom ixi-hidden data/ixi-hidden   T2 depends on the hospital, T1 and PD do not
    python -m data.phantom neuro data/neuro             T1, T2, FLAIR, PD, CT (HU), and PET with FDG
                                                        and AV45, in BIDS. The times of every scan
                                                        are its own
    python -m data.phantom pelvis data/pelvis           T1, T2 and CT (HU) of male pelves at three
                                                        sites, with meta.csv
    python -m data.phantom petct data/petct             CT (HU) and PET (SUV) of head and neck with
                                                        cancer, its mask, and labels.csv
    python -m data.phantom breast data/breast           breasts before and after contrast agent,
                                                        with the mask of a tumour
    python -m data.phantom cta data/cta                 CT and CTA (HU) of chests
    python -m data.phantom cxr data/cxr                 X-ray, one slice of CT (HU) and of T2, and
                                                        reports of torsos, in files as R2Gen has
                                                        them. Most subjects have two of the four
    ... petct-external, breast-external, cta-external   the same from elsewhere: other scanners,
                                                        other pixels and other patients

    options: [--subjects 24] [--size 64] [--slices 12] [--seed 0]
             neuro has 40 subjects and 16 slices if nothing else is asked for. cxr has 1 slice
             and 400 subjects to train on in each of three sets: X-ray with report, CT with
             report, CT with T2

The phantoms have two halves that never mix. *Anatomy* (`head_anatomy`, `pelvis_anatomy`,
`neck_anatomy`, `breast_anatomy`, `chest_anatomy`) says how much of which tissue lies in every voxel
of a subject. It also says how this subject's tissues differ from the textbook. *Physics* turns an
anatomy into an image: `render` under an MR `Protocol`, `render_ct` in Hounsfield units,
`render_pet` in SUV. The same subject can therefore be imaged in many ways in memory. Every image
has a truth to compare with. `acquire`, `acquire_ct` and `acquire_pet` add what a real scanner adds.
In MR this is coil shading, Rician noise and an arbitrary scale. In CT it is the noise of X-rays. In
PET it is blur, and noise that grows with the signal.

The torsos of cxr are simpler bodies, because an X-ray looks through all of a body. `torso_subject`
draws one, `torso_views` makes its pictures, and `torso_report` is what a radiologist would say.
`cxr_findings_in` reads such a report.

`texture_pairs` are much smaller pictures for tests of a model.

World coordinates are mm in the sense of NIfTI: x points to the patient's right, y to the front, z
to the top. In a head, 0 is near the anterior commissure, and in head and neck as well. In a pelvis,
0 is midway between the hips. In a chest and in a torso, 0 is the carina, and between breasts it is
the sternum.

All random numbers derive from (seed, subject, purpose). A subject therefore does not depend on the
number of subjects or on the image size. The same arguments give identical bytes on one computer;
another version of numpy or zlib may differ in a last bit.
"""

import json
import os
import secrets
import shutil
from pathlib import Path

from data.files import DataError
from data.phantom.anatomy import Anatomy
from data.phantom.breast import breast_anatomy, breast_grid
from data.phantom.chest import chest_anatomy, chest_grid
from data.phantom.head import SCALP_FIELD, head_anatomy, head_grid
from data.phantom.metabolic import breast_images, cta_images, petct_images
from data.phantom.neck import neck_anatomy, neck_grid
from data.phantom.neuro import neuro_subject, neuro_tissues, neuro_true, neuro_truth
from data.phantom.pairs import texture_pairs
from data.phantom.pelvis import pelvis_anatomy, pelvis_grid
from data.phantom.physics import (
    Protocol,
    acquire,
    acquire_ct,
    acquire_pet,
    render,
    render_ct,
    render_pet,
)
from data.phantom.reports import findings_in as cxr_findings_in
from data.phantom.sets import (
    SETS,
    brats_subject,
    ixi_anatomy,
    ixi_images,
    pelvis_images,
    usual_numbers,
    write_ixi_scans,
)
from data.phantom.torso import torso_grid, torso_report, torso_subject, torso_views

__all__ = ["SCALP_FIELD", "SETS", "Anatomy", "Protocol", "acquire", "acquire_ct", "acquire_pet",
           "brats_subject", "breast_anatomy", "breast_grid", "breast_images", "chest_anatomy",
           "chest_grid", "cta_images", "cxr_findings_in", "head_anatomy", "head_grid",
           "ixi_anatomy", "ixi_images", "make", "neck_anatomy", "neck_grid", "neuro_subject",
           "neuro_tissues", "neuro_true", "neuro_truth", "pelvis_anatomy", "pelvis_grid",
           "pelvis_images", "petct_images", "render", "render_ct", "render_pet", "texture_pairs",
           "torso_grid", "torso_report", "torso_subject", "torso_views", "usual_numbers",
           "write_ixi_scans"]

VERSION = 1             # raise it when the same arguments give other images


def make(name, folder, subjects=None, size=64, slices=None, seed=0):
    """Write the phantom set `name` into `folder`, which must not exist yet. Its parents are made.

    The set grows under another name beside `folder` and is renamed when it is complete. So the
    folder appears complete or not at all.

    name: One of SETS.
    subjects: How many. None is the usual number of this set; see usual_numbers.
    size: Pixels along a side of a slice.
    slices: Slices of a subject. None is the usual number.
    seed: Another seed makes other subjects.
    DataError if there is no such set, if a number is too small, or if the folder exists.
    """
    folder = Path(folder)
    if name not in SETS:
        raise DataError(f"phantom {name!r}: there is no such set; choose one of: {', '.join(SETS)}")
    usual_subjects, usual_slices = usual_numbers(name)
    subjects = usual_subjects if subjects is None else subjects
    slices = usual_slices if slices is None else slices
    if subjects < 1 or slices < 1 or size < 16 or seed < 0:
        raise DataError(f"phantom {name}: cannot make subjects {subjects}, size {size}, "
                        f"slices {slices}, seed {seed}; "
                        "use at least 1 subject, 16 pixels, 1 slice and a seed of 0 or more")
    if os.path.lexists(folder):
        raise DataError(f"{folder}: exists already, and phantoms never overwrite; "
                        "give another name or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    growing = folder.with_name(f".{folder.name}.unfinished-{secrets.token_hex(4)}")
    growing.mkdir()
    try:
        truth = SETS[name](growing, subjects, size, slices, seed)
        note = {"name": name,
                "note": "These images are synthetic: a digital phantom, no patients.",
                "version": VERSION, "subjects": subjects, "size": size, "slices": slices,
                "seed": seed, "truth": truth}
        text = json.dumps(note, indent=1) + "\n"
        (growing / "phantom.json").write_text(text, encoding="utf-8", newline="\n")
        try:
            growing.rename(folder)
        except OSError as error:
            # Two processes of one run may both have found the folder missing. If the other one has
            # made the same set, all is well.
            other = folder / "phantom.json"
            if not other.is_file() or other.read_text(encoding="utf-8") != text:
                raise DataError(f"{folder}: appeared while the phantom was being made; "
                                "choose another name") from error
    finally:
        shutil.rmtree(growing, ignore_errors=True)
