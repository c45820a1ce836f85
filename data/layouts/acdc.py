"""ACDC (acdc.creatis.insa-lyon.fr): cine MRI of the heart, with its chambers drawn by hand.

    training/patient001/Info.cfg                        ED: 1, ES: 12, Group: DCM, ...
                        patient001_frame01.nii.gz       the end of diastole
                        patient001_frame01_gt.nii.gz    its segmentation
                        patient001_frame12.nii.gz       the end of systole
                        patient001_4d.nii.gz            all frames, which are not used
    testing/patient101/...

There are no reports. We write one sentence for each frame from Info.cfg.
"""

import re

from data.files import DataError
from data.layouts.people import part_of_word
from data.layouts.words import TEXT, Subject, few, read_text
from data.layouts.xrays import official_split

FRAME_FILE = re.compile(r"((patient\d{3})_frame(\d+))(_gt)?\.nii(\.gz)?", re.IGNORECASE)
MOMENTS = {"ED": "diastole", "ES": "systole"}
GROUPS = {"NOR": "normal heart", "MINF": "previous myocardial infarction",
          "DCM": "dilated cardiomyopathy", "HCM": "hypertrophic cardiomyopathy",
          "RV": "abnormal right ventricle"}


def is_acdc(folder, files):
    """True if a file has the name of a frame."""
    return any(FRAME_FILE.fullmatch(path.name) for path in files)


def collect_acdc(folder, files, notes):
    """Read ACDC -> (subjects sorted by name, split).

    A subject is one frame, at the end of diastole or of systole. Both frames of a patient belong to
    one person.

    split: {"train": [names], "val": [], "test": [names]}; see official_split.
    DataError if a patient has no Info.cfg, if that file is not as above, or if a frame is there
    twice.
    """
    frames = {}                         # name -> path
    masks = {}                          # name -> path
    for path in files:
        found = FRAME_FILE.fullmatch(path.name)
        if found is None:
            continue
        of_kind = masks if found[4] else frames
        name = found[1].lower()
        if name in of_kind:
            raise DataError(f"{path}: {name} has another file, {of_kind[name]}; "
                            "remove one of them")
        of_kind[name] = path
    subjects = []
    part_of = {}
    unknown = []
    for name, path in sorted(frames.items()):
        info = path.with_name("Info.cfg")
        moment, group = _read_info(info, int(FRAME_FILE.fullmatch(path.name)[3]))
        if moment is None:
            unknown.append(name)
            continue
        report = f"a short axis cardiac cine mri , end {MOMENTS[moment]} ."
        if group:
            report += f" {GROUPS[group]} ."
        subjects.append(Subject(name, name.split("_")[0], {"cine": path, TEXT: info},
                                masks.get(name), meta={"body": "heart"}, report=report))
        for place in path.parents:
            if part_of_word(place.name):
                part_of[name] = part_of_word(place.name)
                break
    if unknown:
        notes.append(f"{len(unknown)} frames are neither ED nor ES in Info.cfg and are not used: "
                     f"{few(unknown)}")
    without = [subject.name for subject in subjects if subject.segmentation is None]
    if without:
        notes.append(f"{len(without)} frames have no segmentation: {few(without)}")
    return subjects, official_split(subjects, part_of, notes)


def _read_info(path, frame):
    """What Info.cfg says of a frame -> ("ED", "ES" or None, group or None)."""
    known = {}
    for line in read_text(path).splitlines():
        key, _, value = line.partition(":")
        known[key.strip()] = value.strip()
    for moment in MOMENTS:
        if not known.get(moment, "").isdecimal():
            raise DataError(f"{path}: does not say the number of the frame {moment}; "
                            "download the patient again")
    group = known.get("Group")
    if group is not None and group not in GROUPS:
        raise DataError(f"{path}: the group is {group!r}, none of {', '.join(GROUPS)}; "
                        "download the patient again")
    for moment in MOMENTS:
        if int(known[moment]) == frame:
            return moment, group
    return None, group
