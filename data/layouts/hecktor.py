"""HECKTOR: FDG-PET and CT of the head and neck, with the tumours drawn by hand.

In HECKTOR 2022 all images lie in one folder, and the masks in another one:

    hecktor2022_training/imagesTr/CHUM-001__CT.nii.gz  CHUM-001__PT.nii.gz
    hecktor2022_training/labelsTr/CHUM-001.nii.gz       1 is the primary tumour, 2 are lymph nodes

CHUM is the hospital. Some lists of files write CHUM_001. Both mean the same patient.
"""

import re

from data.layouts.words import Subject, few

HECKTOR_FILE = re.compile(r"([A-Za-z]+[-_]?\d+)__(CT|PT)\.nii(\.gz)?", re.IGNORECASE)
HECKTOR_CONTRASTS = {"ct": "ct", "pt": "pet"}


def collect_hecktor(images, notes):
    """Read the file names of HECKTOR, in any folders -> (subjects sorted by name, ignored files).

    A file that has the name of a patient and no contrast is the patient's mask.

    DataError if a patient has two files of one contrast.
    """
    subjects = {}
    others = []
    for path in images:
        parts = HECKTOR_FILE.fullmatch(path.name)
        if not parts:
            others.append(path)
            continue
        name = _patient(parts[1])
        if name not in subjects:
            subjects[name] = Subject(name, name, {}, meta={"body": "head and neck"})
        subjects[name].add(HECKTOR_CONTRASTS[parts[2].lower()], path)
    ignored = []
    for path in others:
        name = _patient(re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE))
        if name in subjects and subjects[name].segmentation is None:
            subjects[name].segmentation = path
        else:
            ignored.append(path)
    found = [subjects[name] for name in sorted(subjects)]
    without = [subject.name for subject in found if subject.segmentation is None]
    if without and len(without) < len(found):
        notes.append(f"{len(without)} subjects have no mask of the tumour: {few(without)}")
    return found, ignored


def _patient(name):
    """CHUM_001 -> CHUM-001."""
    return name.upper().replace("_", "-")
