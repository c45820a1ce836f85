"""autoPET: FDG-PET and CT of whole bodies, with the lesions drawn by hand.

A patient has one folder for each study. A study has up to five files:

    PETCT_0011f3deaf/03-23-2003-NA-PET-CT Ganzkoerper-10445/CT.nii.gz      in HU
                                                            CTres.nii.gz   CT on the PET's grid
                                                            PET.nii.gz     in Bq/ml
                                                            SUV.nii.gz     PET in SUV
                                                            SEG.nii.gz     lesions, PET's grid

CTres and SUV are used if they are there, otherwise CT and PET. The contrasts have the same words in
other data sets; see words.py.
"""

import re

from data.layouts.folders import collect_subjects

AUTOPET_FILE = re.compile(r"(?:^|/)(PETCT_[^/]+)/[^/]+/(CT|CTres|PET|SUV|SEG)\.nii(\.gz)?$",
                          re.IGNORECASE)


def collect_autopet(folder, images, notes):
    """Take every study as a subject -> (subjects sorted by name, ignored files).

    The studies of one patient belong to one person.

    DataError as collect_subjects.
    """
    subjects, ignored = collect_subjects(folder, images, notes, _study_name)
    for subject in subjects:
        place = next(iter(subject.files.values())).parent
        if _is_study(place):
            subject.person = place.parent.name
        subject.meta["body"] = "body"
    return subjects, ignored


def _is_study(place):
    return place.parent.name.upper().startswith("PETCT_")


def _study_name(place):
    """The name of a study: its patient, its date and the number at the end of its folder.

    The words between date and number are long, and have spaces. A folder without date or number
    keeps its whole name.
    """
    if not _is_study(place):
        return place.name
    parts = re.fullmatch(r"(\d\d-\d\d-\d{4})-.*-(\d+)", place.name)
    study = f"{parts[1]}_{parts[2]}" if parts else place.name
    return f"{place.parent.name}_{study}"
