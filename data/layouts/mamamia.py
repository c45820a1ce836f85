"""MAMA-MIA: MR of the breast before and after a contrast agent, with the tumours drawn by experts.

It holds the patients of four older collections (DUKE, ISPY1, ISPY2, NACT):

    images/DUKE_001/DUKE_001_0000.nii.gz        before the agent
    images/DUKE_001/DUKE_001_0001.nii.gz        the first scan after it; _0002 and so on follow
    segmentations/expert/DUKE_001.nii.gz

Names of patients are written in lower case in some places. Both mean the same patient.
"""

import re

from data.layouts.words import Subject, few

PATIENT = r"((?:DUKE|ISPY1|ISPY2|NACT)_[A-Z0-9]+)"
MAMAMIA_FILE = re.compile(PATIENT + r"_(\d{4})\.nii(\.gz)?", re.IGNORECASE)
MASK_FILE = re.compile(PATIENT + r"\.nii(\.gz)?", re.IGNORECASE)
PHASES = {0: "pre", 1: "post"}


def collect_mamamia(images, notes):
    """Read the file names of MAMA-MIA, in any folders -> (subjects sorted by name, ignored files).

    Of the masks, that of the folder `expert` is used, otherwise the first one.

    DataError if a patient has two files of one phase.
    """
    subjects = {}
    masks = {}                          # name -> paths
    later = 0
    ignored = []
    for path in images:
        scan = MAMAMIA_FILE.fullmatch(path.name)
        mask = MASK_FILE.fullmatch(path.name)
        if mask:
            masks.setdefault(mask[1].upper(), []).append(path)
        elif not scan:
            ignored.append(path)
        elif int(scan[2]) not in PHASES:
            later += 1
        else:
            name = scan[1].upper()
            if name not in subjects:
                subjects[name] = Subject(name, name, {}, meta={"body": "breast"})
            subjects[name].add(PHASES[int(scan[2])], path)
    for name, paths in masks.items():
        by_experts = [path for path in paths if path.parent.name.lower() == "expert"]
        chosen = (by_experts or paths)[0] if name in subjects else None
        if chosen:
            subjects[name].segmentation = chosen
        ignored += [path for path in paths if path != chosen]
    found = [subjects[name] for name in sorted(subjects)]
    if later:
        notes.append(f"{later} scans of later phases (_0002 and so on) are not used")
    without = [subject.name for subject in found if subject.segmentation is None]
    if without and len(without) < len(found):
        notes.append(f"{len(without)} subjects have no mask of the tumour: {few(without)}")
    return found, sorted(ignored)
