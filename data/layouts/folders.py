"""One folder per subject with one NIfTI file per contrast.

BraTS 2020, 2021 and 2023+ have this layout as downloaded, and so have many other data sets. One
reader serves them all. It takes the subject's own name off a file name, and the contrast is a whole
word of what remains. Sheets beside the folders may say more; see sheets.py.
"""

import re

from data.files import DataError
from data.layouts.words import (
    Subject,
    few,
    is_preferred,
    named_contrasts,
    preferred_first,
    role_of,
    words_of,
)

# Name of the edition, and the pattern of its subjects' names. All show the brain.
EDITIONS = (("BraTS 2020", r"BraTS20_(Training|Validation)_\d+"),
            ("BraTS 2021", r"BraTS2021_\d+"),
            ("BraTS 2023", r"BraTS-[A-Za-z]+-\d+-\d+"))
# The words for a mask of a tumour; see take_tumour_masks.
TUMOUR_WORDS = {"tumour", "tumor"}


def collect_subjects(folder, images, notes, name_of=None):
    """Take every folder with at least one contrast as a subject -> (subjects, ignored files).

    Subjects are sorted by name.

    images: The paths of all NIfTI files.
    notes: A list that gets sentences for the user.
    name_of: A function from the path of a folder to the name of its subject. By default a subject
        is called like its folder.
    DataError if two folders have one name, or if all subjects seem to lie in one folder.
    """
    by_folder = {}
    for path in images:
        by_folder.setdefault(path.parent, []).append(path)
    subjects = []
    places = {}
    ignored = []
    preferred = {}                      # sentence -> names of the subjects
    for place, paths in sorted(by_folder.items()):
        name = name_of(place) if name_of else place.name or place.resolve().name
        roles = {}
        for path in paths:
            roles.setdefault(role_of(path.name, name), []).append(path)
        ignored += roles.pop(None, [])
        segmentations = roles.pop("seg", [])
        if not roles:
            ignored += segmentations
            continue
        if min(len(same) for same in roles.values()) > 2:
            count = len(next(iter(roles.values())))
            raise DataError(f"{place}: holds {count} files of each contrast; "
                            "put every subject into a folder of its own")
        if name in places:
            raise DataError(f"{folder}: subject {name} is there twice, in {places[name]} and "
                            f"{place}; rename or remove one")
        places[name] = place
        files = {}
        for role, same in [*roles.items(), ("seg", segmentations)]:
            same = preferred_first(same)
            if same and role != "seg":
                files[role] = same[0]
            if len(same) < 2:
                continue
            others = ", ".join(path.name for path in same[1:])
            if is_preferred(same[0]) and not is_preferred(same[1]):
                sentence = f"{same[0].name} is used as {role}, not {others}"
                preferred.setdefault(sentence, []).append(name)
            else:
                notes.append(f"{name}: {len(same)} files for {role}, {same[0].name} is used, "
                             f"not {others}")
        segmentation = segmentations[0] if segmentations else None
        subjects.append(Subject(name, person_of(name), files, segmentation))
    for sentence, names in preferred.items():
        notes.append(f"{sentence}, in {len(names)} subjects: {few(names)}")
    return sorted(subjects, key=lambda subject: subject.name), sorted(ignored)


def person_of(subject):
    """The person behind a subject's name.

    BraTS-GLI-00000-001 is a later visit of the person BraTS-GLI-00000. In all other sets, every
    subject is another person.
    """
    visit = re.fullmatch(r"(BraTS-[A-Za-z]+-\d+)-\d+", subject)
    return visit.group(1) if visit else subject


def edition_of(subjects):
    """The name of the data set. For BraTS, the part of the body is written into Subject.meta."""
    for name, pattern in EDITIONS:
        if all(re.fullmatch(pattern, subject.name) for subject in subjects):
            for subject in subjects:
                subject.meta["body"] = "brain"
            return name
    return "one folder per subject"


def take_tumour_masks(subjects, contrasts, ignored, notes):
    """Take masks of tumours as segmentations, for subjects that have none -> files still ignored.

    A mask is a file such as PET_tumour.nii.gz beside the contrast whose grid is used, and it names
    this contrast, or none. It is drawn on that grid then. Masks of other words stay ignored,
    because nobody knows what they show.

    contrasts: The chosen ones; the first is used if Subject.grid names none.
    ignored: Files that are no contrast. notes: A list that gets sentences for the user.
    """
    taken = {}                          # name of the file -> names of the subjects
    left = set(ignored)
    by_folder = {}
    for path in ignored:
        by_folder.setdefault(path.parent, []).append(path)
    for subject in subjects:
        anchor = (subject.grid or contrasts)[0]
        if subject.segmentation or anchor not in subject.files:
            continue
        for path in by_folder.get(subject.files[anchor].parent, []):
            words = words_of(path.name, subject.name)
            of_tumour = not TUMOUR_WORDS.isdisjoint(words)
            if of_tumour and named_contrasts(words) in ([], [anchor]):
                subject.segmentation = path
                left.discard(path)
                taken.setdefault(path.name, []).append(subject.name)
                break
    for name, names in taken.items():
        notes.append(f"{name} is used as segmentation, in {len(names)} subjects: {few(names)}")
    return sorted(left)
