"""One folder per subject with one NIfTI file per contrast.

BraTS 2020, 2021 and 2023+ have this layout as downloaded, and so have many other data sets. One
reader serves them all. It takes the subject's own name off a file name, and the contrast is a whole
word of what remains. Sheets beside the folders may say more; see sheets.py.
"""

import re

from data.files import DataError
from data.layouts.choice import choose_files, is_series
from data.layouts.people import names_of, places_of, tell_persons, visits_in_folder
from data.layouts.words import Subject, few, further_words, named_contrasts, role_of, words_of

# Name of the edition, and the pattern of its subjects' names. All show the brain.
EDITIONS = (("BraTS 2020", r"BraTS20_(Training|Validation)_\d+"),
            ("BraTS 2021", r"BraTS2021_\d+"),
            ("BraTS 2023", r"BraTS-[A-Za-z]+-\d+-\d+"))
# The words for a mask of a tumour; see take_tumour_masks.
TUMOUR_WORDS = {"tumour", "tumor"}


def collect_subjects(folder, images, notes, name_of=None):
    """Take every folder with at least one contrast as a subject -> (subjects, ignored files).

    Subjects are sorted by name. The images of two visits in one folder become two subjects.

    name_of: A function from the path of a folder to the name of its subject. By default a subject
        is called after its path, see names_of, and its person is told by its name.
    DataError if all subjects seem to lie in one folder.
    """
    ignored = []
    found = _roles_of(folder, images)
    places = [place for (place, _), roles in found.items() if roles.keys() - {None, "seg"}]
    if name_of:
        name_of_place = {place: name_of(place) for place in places}
    else:
        name_of_place = names_of(folder, places)
    named = []                          # (name of a subject, {role: {path: variant}})
    for (place, visit), roles in found.items():
        ignored += roles.pop(None, [])
        if not roles.keys() - {"seg"}:
            ignored += roles.get("seg", [])
            continue
        count = min(_equally_plain(roles[role].values()) for role in roles if role != "seg")
        if count > 2:
            raise DataError(f"{place}: holds {count} files of each contrast; "
                            "put every subject into a folder of its own, or list them in a "
                            "manifest.csv")
        name = f"{name_of_place[place]}/{visit}" if visit else name_of_place[place]
        named.append((name, roles))
    subjects = []
    for (name, _), files in zip(named, choose_files(named, notes)):
        segmentation = files.pop("seg", None)
        subjects.append(Subject(name, name, files, segmentation))
    if not name_of:
        tell_persons(subjects, notes)
    return sorted(subjects, key=lambda subject: subject.name), sorted(ignored)


def _roles_of(folder, images):
    """What each image is, by its folder and visit -> {(place, visit): {role: {path: variant}}}."""
    found = {}
    for place, words in sorted(places_of(folder, images).items()):
        role_of_path = {}
        variants = {}
        for path, name in words.items():
            own = f"{place.parent.name}_{place.name}"       # P1/T1/P1_T1_FLAIR.nii is a FLAIR
            own = own if name.lower().startswith(own.lower()) else place.name
            role = role_of(name, own)
            if role == "dwi" and is_series(path):
                role = None             # a volume for each direction, from which maps are made
            role_of_path[path] = role
            variants[path] = further_words(name, own, role)
        for visit, of_visit in visits_in_folder(role_of_path).items():
            roles = found.setdefault((place, visit), {})
            for path, role in of_visit.items():
                roles.setdefault(role, {})[path] = variants[path]
    return found


def _equally_plain(variants):
    """The number of variants that have as few words as possible."""
    counts = [len(variant) for variant in variants]
    return counts.count(min(counts))


def edition_of(subjects):
    """The name of the data set. For BraTS, the part of the body is written into Subject.meta."""
    for name, pattern in EDITIONS:
        if all(re.fullmatch(pattern, subject.name.split("/")[-1]) for subject in subjects):
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
            words = words_of(path.name, subject.name.split("/")[-1])
            of_tumour = not TUMOUR_WORDS.isdisjoint(words)
            if of_tumour and named_contrasts(words) in ([], [anchor]):
                subject.segmentation = path
                left.discard(path)
                taken.setdefault(path.name, []).append(subject.name)
                break
    for name, names in taken.items():
        notes.append(f"{name} is used as segmentation, in {len(names)} subjects: {few(names)}")
    return sorted(left)
