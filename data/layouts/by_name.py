"""Many subjects in one folder, or a folder for each contrast: the names of files tell who is who.

    scans/p01_T1.nii.gz  p01_T2.nii.gz  p02_T1.nii.gz ...
    T1/p01.nii.gz  T1/p02.nii.gz ...  T2/p01.nii.gz ...

A subject is what remains of a file's name without the words of its contrast.
"""

import re

from data.layouts.choice import is_series
from data.layouts.people import tell_persons
from data.layouts.words import (
    CONTRASTS,
    ENDING,
    Subject,
    canonical_contrast,
    few,
    further_words,
    role_of,
)

FEWEST = 3              # subjects in one folder; two might be two versions of one subject's files


def is_by_name(images):
    """True if the folders do not tell the subjects, and the names of the files do.

    Then every file has a contrast and a subject, no subject has two files of one contrast, and most
    subjects have several contrasts.
    """
    places = {path.parent for path in images}
    of_contrasts = all(canonical_contrast(place.name) in CONTRASTS for place in places)
    apart = len(places) > 1 and of_contrasts and len({place.parent for place in places}) == 1
    if len(places) > 1 and not apart:
        return False
    found = _subjects_of(images)
    if len(found) < (2 if apart else FEWEST) or () in found:
        return False
    # p01_bet beside p01 is no second subject, but another version of its file.
    if any(words[:end] in found for words in found for end in range(1, len(words))):
        return False
    doubled = any(len(files) > 1 for roles in found.values() for files in roles.values())
    several = sum(len(roles.keys() - {"seg"}) > 1 for roles in found.values())
    return not doubled and several >= len(found) / 2


def collect_by_name(images, notes):
    """Read such folders -> (subjects sorted by name, ignored files)."""
    subjects = []
    found = _subjects_of(images)
    names = {words: _name_of([paths[0] for paths in roles.values()])
             for words, roles in found.items()}
    if len({name.casefold() for name in names.values()}) < len(names):      # brats_t1_001
        names = {words: "_".join(words) for words in found}
    for words, roles in found.items():
        files = {role: paths[0] for role, paths in roles.items()}
        name = names[words]
        segmentation = files.pop("seg", None)
        if files:
            subjects.append(Subject(name, name, files, segmentation))
    used = {path for subject in subjects for path in subject.paths}
    notes.append("the names of the files tell the subjects, not their folders: "
                 f"{few(sorted(subject.name for subject in subjects))}")
    tell_persons(subjects, notes)
    ignored = [path for path in images if path not in used]
    return sorted(subjects, key=lambda subject: subject.name), ignored


def _subjects_of(images):
    """{words of a subject: {contrast or "seg": [paths]}}; files without a contrast are left out."""
    found = {}
    for path in images:
        role = role_of(path.name, "")
        if role is None and canonical_contrast(path.parent.name) in CONTRASTS:
            role = role_of(f"{path.parent.name}_{path.name}", "")
        if role is None or role == "dwi" and is_series(path):
            continue
        found.setdefault(_own_words(path, role), {}).setdefault(role, []).append(path)
    return found


def _own_words(path, role):
    """The words of a file's name that do not say its role; sub-01 and ses-02 are words here."""
    return further_words(re.sub(r"(?<![^\W_])(sub|ses)-(?=\w)", r"\1", path.name), "", role)


def _name_of(paths):
    """The beginning that all file names of a subject have, in whole words."""
    pieces = [re.findall(r"[^\W_]+|[\W_]+", ENDING.sub("", path.name)) for path in paths]
    common = []
    for same in zip(*pieces):
        if len(set(same)) > 1:
            break
        common.append(same[0])
    if len(paths) == 1:                                     # nothing tells where the name ends
        common = []
    name = re.sub(r"[\W_]+$", "", "".join(common))
    return name or "_".join(_own_words(paths[0], role_of(paths[0].name, "")))
