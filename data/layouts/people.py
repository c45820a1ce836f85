"""Who is who: the names of subjects, the persons behind them, and the parts that folders name.

A subject is called after its path below the data folder, without what says nothing: siteA/001,
patient01/tp2, sub-01. Several subjects may be visits of one person. Their names tell this in many
conventions, and a split keeps a person together.
"""

import hashlib
import re
import unicodedata
from collections import Counter

from data.files import DataError
from data.layouts.words import few, role_of
from data.layouts.xrays import official_split

# A day, also with the time of the day: 2006-11-15, 20061115_094759. Or a day such as 15-11-2006.
DATE = (r"(?:(?:19|20)\d\d[-_.]?(?:0\d|1[0-2])[-_.]?[0-3]\d(?:[-_T ]?[\d_.-]+)?"
        r"|[0-3]?\d[-_.][0-3]?\d[-_.](?:19|20)\d\d)")
# Words for a visit that come with a number. Those of SESSION mean a visit in names of files, too,
# where t1 is a contrast and run-2 is a repetition.
SESSION = r"ses|session|visit|time[-_ ]?point|time|tp|fu|follow[-_ ]?up|week|month|day"
NUMBERED = (SESSION + r"|vis|v|t|scan|exam|study|mr|wk|w|mo|m|d|year|yr|y|round|wave|run|rep|"
            r"fraction|fx")
# Words for a visit that need no number. 7T is the field of a scanner.
PLAIN = (r"baseline[a-z0-9]*|bl|screening|fu|follow[-_ ]?up[a-z0-9]*|initial|final|"
         r"(?:pre|post|intra)[-_ ]?(?:op|operation|operative|surgery|treatment|therapy|rt|nac|"
         r"chemo)?\d*|retest|rescan|recurrence|progression|left|right|\d(?:\.\d)?t")
# A visit: ses-b, week-012-2 or fu3d, a word of PLAIN, a day, or as in UK Biobank, where field,
# visit and array are three numbers.
VISIT = (rf"(?:ses(?:sion)?[-_][a-z0-9]+|(?:{NUMBERED})[-_ ]?\d+(?:[-_.]\d+)?[a-z]?|{PLAIN}|{DATE}"
         r"|\d{5}_[0-3]_0)")
# A name that ends in a visit, or in a word that says nothing of the person. No separator is needed
# between a digit and a word such as v2.
ENDING = re.compile(rf"(.+?)(?:[-_. /](?:{VISIT}|mri?|nii|nifti|dicom)"
                    r"|(?<=\d)(?:v|t|tp|ses|visit|time|scan|fu)\d+)", re.IGNORECASE)
# A visit in the name of a file, between separators. Pre and post alone are before an agent.
VISIT_IN_FILE = re.compile(rf"(?:^|[-_. ])((?:{SESSION})[-_ ]?\d+|ses-[a-z0-9]+|baseline|"
                           r"follow[-_ ]?up|(?:pre|post)[-_]?op)(?=[-_. ])", re.IGNORECASE)
# A day or a version in the name of a file.
DATE_IN_FILE = re.compile(r"(?:^|[-_. ])((?:19|20)\d\d[-_.]?[01]\d[-_.]?[0-3]\d|v\d+(?=[-_. ]))",
                          re.IGNORECASE)
# The endings with one of these words, or with a year, are surely those of visits.
SURE = re.compile(r"ses|visit|time|tp\d|baseline|bl$|fu|follow|week|month|(?:19|20)\d\d", re.I)
# The forms of BraTS, and of autoPET for nnU-Net, where the date and the words of a study follow.
BRATS = re.compile(r"(.*BraTS-[A-Za-z]+-\d+)-\d+")
AUTOPET = re.compile(r"((?:fdg|psma|petct)_[0-9a-f]{6,})_.*\d.*", re.IGNORECASE)
# Folders that hold the same persons again, in another state.
STATES = (r"(?:raw|original|orig|native|nifti|(?:pre)?[-_]?process|preproc|registered|resampled|"
          r"normali[sz]ed|skull|stripped|bet|n4|mni)\w*")
# The number behind one of these words is not that of a person.
GROUPS = re.compile(r"(?:site|cent(?:er|re)|hospital|institut\w*|clinic|group|cohort|fold|batch|"
                    r"part|set|class|scanner|vendor)[-_ ]?\d+$", re.IGNORECASE)
YEAR = re.compile(r"(?<!\d)(?:19|20)\d\d$")
MOST_VISITS = 12        # of a person whose name has no number
# The words for a part, and their short forms in imagesTr and imagesTs.
PARTS = {"train": (r"train(?:ing)?", "tr"), "val": (r"val(?:id(?:ate|ation)?)?|dev", "val"),
         "test": (r"test(?:ing)?", "ts|te")}
LONGEST = 120           # bytes of a folder's name; file systems take 255, and endings are added


# ---- The split that folders name -----------------------------------------------------------------

def part_of_word(word):
    """"train", "val" or "test" for a word such as Training, VALID, testing, dev, or None."""
    for part, (words, _) in PARTS.items():
        if re.fullmatch(words, word.strip(), re.IGNORECASE):
            return part
    return None


def part_of_folder(name):
    """The part that the name of a folder means, or None: train, trainA, imagesTr, TrainingData."""
    for part, (words, short) in PARTS.items():
        if re.fullmatch(rf"(?:{words})[-_ ]?(?:set|data|images|cases)?[-_ ]?[AB]?"
                        rf"|.*[^a-z](?:{words})[-_ ]?(?:data|set)(?:[-_ ].*)?"
                        rf"|(?:images|imgs)[-_]?(?:{short})", name, re.IGNORECASE):
            return part
    return None


def split_of_folders(folder, subjects, complete, notes):
    """The split that the folders of a tree name -> {"train": [names], "val": ...}, or None.

    Without a folder for the test, that for validation is the test, because nobody shall train on
    it. There is no split without a folder for training, or if only that one has complete subjects.

    complete: Those of the subjects that can be used.
    """
    part_of = {}                        # name of a subject -> part
    for subject in complete:
        for name in subject.paths[0].relative_to(folder).parts[:-1]:
            if part_of_folder(name):
                part_of.setdefault(subject.name, part_of_folder(name))
    counts = Counter(part_of.values())
    if not counts["train"] or len(counts) == 1:
        if 0 < counts["train"] < len(subjects):
            notes.append("of the folders that name a part of a split, only that for training has "
                         "complete subjects, so that the split is at random")
        return None
    named = ", ".join(f"{part} {counts[part]}" for part in PARTS if counts[part])
    notes.append(f"the split is that of the folder names ({named}); --split replaces it")
    if not counts["test"]:
        notes.append("no folder is for the test, so that for validation is the test")
        for name, part in part_of.items():
            part_of[name] = "test" if part == "val" else part
    return official_split(complete, part_of, notes)


# ---- Places and names ----------------------------------------------------------------------------

def places_of(folder, images):
    """Find the subject's folder of each image -> {place: {path: name that tells its role}}.

    A place is the folder that an image lies in, with three exceptions. A folder that names a
    contrast and holds one image belongs to the folder above. So do folders such as anat and pet,
    if no two of them hold the same contrast. trainA and trainB are one folder.
    """
    by_folder = {}
    for path in images:
        by_folder.setdefault(path.parent, []).append(path)
    places = {}
    alone = set()                       # folders that name the contrast of the image in them
    for parent, paths in by_folder.items():
        names = {path: path.name for path in paths}
        stem = re.sub(r"\.nii(\.gz)?$", "", parent.name, flags=re.IGNORECASE)
        together = f"{stem}_{paths[0].name}"
        parts = []
        for part in parent.relative_to(folder).parts:
            parts.append(part[:-1] if part_of_folder(part) and part[-1] in "AB" else part)
        place = folder.joinpath(*parts)
        above = parent.parent.name
        if len(paths) == 1 and parts and role_of(stem, above) and role_of(together, above):
            names = {paths[0]: together}
            alone.add(place)
        places.setdefault(place, {}).update(names)
    places = _without_kinds(folder, places)
    for place in alone & places.keys():
        places.setdefault(place.parent, {}).update(places.pop(place))
    return places


def _without_kinds(folder, places):
    """Join places such as p1/anat and p1/pet, if their last folders name kinds of scans."""
    roles = {}                          # last folder -> roles of its images
    above = {}                          # last folder -> the folders above
    for place, names in places.items():
        roles.setdefault(place.name, set()).update(
            role_of(name, place.parent.name) for name in names.values())
        above.setdefault(place.name, set()).add(place.parent)
    repeated = [name for name, parents in above.items() if len(parents) > 1]
    roles = {name: roles[name] - {None, "seg"} for name in repeated}
    different = sum(map(len, roles.values())) == len(set().union(*roles.values()))
    visits = any(re.fullmatch(VISIT, name, re.IGNORECASE) for name in roles)
    if sum(map(bool, roles.values())) < 2 or not different or visits or folder in places:
        return places
    joined = {}
    for place, names in places.items():
        joined.setdefault(place.parent if place.name in roles else place, {}).update(names)
    return joined


def visits_in_folder(roles):
    """Group the images of one folder by the visit that their names tell -> {visit or "": roles}.

    roles: {path: role}. Images without a word for a visit form a visit of their own, "", if they
    show something that another visit has. Dates, and words such as v2, count only if they tell two
    images of one contrast apart. The images of one visit may be of different days.
    """
    for pattern in (VISIT_IN_FILE, DATE_IN_FILE):
        visits = {}
        for path, role in roles.items():
            found = pattern.search(path.name)
            visits.setdefault(found[1].lower() if found else "", {})[path] = role
        shown = {visit: set(of.values()) - {None} for visit, of in visits.items()}
        repeats = sum(map(len, shown.values())) > len(set().union(*shown.values()))
        named = [visit for visit in visits if visit]
        if pattern is VISIT_IN_FILE and (len(named) > 1 or named and repeats):
            return visits
        if len(named) > 1 and repeats:
            return visits
    return {"": roles}


def names_of(folder, places):
    """The name of the subject in each place -> {place: name}.

    It is the path below the data folder, without the first folders that all places share, without
    the last folders that all share, and without folders such as train if the names stay different.
    """
    paths = {place: place.relative_to(folder).parts for place in places}
    paths = {place: parts for place, parts in paths.items() if parts}
    if len(paths) == 1:
        (place, parts), = paths.items()
        numbered = [part for part in parts
                    if re.search(r"\d", part) and not re.fullmatch(VISIT, part, re.IGNORECASE)]
        paths = {place: (numbered or parts)[-1:]}
    while paths and all(len(parts) > 1 for parts in paths.values()):
        last = {parts[-1] for parts in paths.values()}
        if len(last) > 1 and any(parts[-1] != parts[-2] for parts in paths.values()):
            break
        paths = {place: parts[:-1] for place, parts in paths.items()}
    while paths and len({parts[0] for parts in paths.values()}) == 1:
        if min(map(len, paths.values())) == 1:
            break
        paths = {place: parts[1:] for place, parts in paths.items()}
    shorter = {}
    for place, parts in paths.items():
        rest = tuple(part for part in parts[:-1] if not part_of_folder(part))
        shorter[place] = (*rest, parts[-1])
    trained = any(part_of_folder(part) == "train" for parts in paths.values() for part in parts)
    if trained and len(set(shorter.values())) == len(shorter):
        paths = shorter
    names = {place: "/".join(parts) for place, parts in paths.items()}
    return {place: names.get(place) or place.name or place.resolve().name for place in places}


def settle_names(folder, subjects, split, notes):
    """Make the names of subjects safe as paths, see safe_name, and the persons' and split's alike.

    DataError if a name cannot be made safe, or if two names would meet in one file.
    """
    taken = {}
    changed = {}
    for subject in subjects:
        name = safe_name(folder, subject.name)
        other = taken.setdefault(name.casefold(), subject)
        if other is not subject:
            both = [few([str(path) for path in of.paths[:1]]) for of in (other, subject)]
            raise DataError(f"{folder}: subjects {other.name} and {name} have one name, or "
                            "names that are one on some disks, and their results would meet in one "
                            f"file; rename or remove one ({both[0]}, {both[1]})")
        subject.person = _as_text(subject.person)
        if name != subject.name:
            changed[subject.name] = name
            subject.name = name
    for part in split or {}:
        split[part] = [changed.get(name, name) for name in split[part]]
    odd = [new for old, new in changed.items() if unicodedata.normalize("NFC", old) != new]
    if odd:
        notes.append(f"{len(odd)} names of subjects are no safe names of files and are changed: "
                     f"{few(odd)}")
    subjects.sort(key=lambda subject: subject.name)


def safe_name(folder, name):
    """A name that can be a path for results on every system, in Unicode form NFC.

    Control characters, those that Windows reserves and bytes that are no text become _, and a name
    that is too long is cut. DataError for names such as ../x that lead out of a folder.
    """
    parts = []
    for part in _as_text(name).split("/"):
        if part.strip() in ("", ".", ".."):
            raise DataError(f"{folder}: the subject {name!r} cannot name a folder for results; "
                            "give it a name without .. and without / at its ends")
        part = re.sub(r'[\x00-\x1f\x7f<>:"\\|?*]|[ .]$', "_", part)
        if re.match(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|$)", part, re.IGNORECASE):
            part = f"_{part}"
        if len(part.encode()) > LONGEST:
            digest = hashlib.sha256(part.encode()).hexdigest()[:8]
            part = f"{part.encode()[:LONGEST - 9].decode(errors='ignore')}-{digest}"
        parts.append(part)
    return "/".join(parts)


def _as_text(name):
    """A name in Unicode form NFC. Bytes of a name that are no text become _."""
    return re.sub(r"[\ud800-\udfff]", "_", unicodedata.normalize("NFC", name))


# ---- Persons -------------------------------------------------------------------------------------

def person_of(name):
    """The person behind a subject's name, if the name has a known form of a visit.

    sub-01_ses-02, patient01/tp2/mri, P7_V1, 0429_FU003d, 002_S_0413_2006-11-15, baseline/007,
    study_retest/007, fdg_0b57b247b6_05-02-2002-NA-PET-CT-42966 and BraTS-GLI-00000-001. For any
    other name, it is the name.
    """
    known = BRATS.fullmatch(name) or AUTOPET.fullmatch(name)
    if known:
        return known[1]
    parts = name.split("/")
    if part_of_folder(parts[0]) and len(parts) > 1:
        parts = parts[1:]
    first = parts[0]
    again = re.fullmatch(f"{VISIT}|{STATES}", first, re.IGNORECASE)
    if len(parts) > 1 and again and not re.fullmatch(DATE, first):
        parts = parts[1:]
    for i in range(1, len(parts)):
        if re.fullmatch(rf"{VISIT}|{DATE}[-_ ].*", parts[i], re.IGNORECASE):
            parts = parts[:i]
            break
    if len(parts) > 1:                  # HCP/7 and HCP_Retest/7, study_baseline/7
        parts = [_without_visits(parts[0]), *parts[1:]]
    return _without_visits("/".join(parts))


def _without_visits(name):
    """A name without the visits at its end: P7_V1 -> P7."""
    while (found := ENDING.fullmatch(name)):
        name = found[1]
    return name


def tell_persons(subjects, notes, sheet="meta.csv"):
    """Write the persons that the names of subjects tell into Subject.person, and say how.

    First count the forms that person_of knows. Then counts a short ending behind the number of a
    person: 007a, 00001_11, 007/scan. This is a guess, so it needs at least as many persons as the
    largest of them has scans. If all scans seem to be of one person, nobody is told apart then, and
    each scan counts as a person.

    sheet: The table that may have a column person.
    """
    persons = {subject.name: person_of(subject.name) for subject in subjects}
    sizes = Counter(persons.values())
    for name, person in persons.items():
        rest = _rest(name, person)
        numbered = re.search(r"\d", person) is not None
        most = len(sizes) * (1 + numbered)
        in_folder = numbered and rest.startswith("/") and not GROUPS.search(person)
        if in_folder or SURE.search(rest):
            most = max(most, len(persons) if numbered else MOST_VISITS)
        if (sizes[person] == 1 or sizes[person] > most) and not BRATS.fullmatch(name):
            persons[name] = name
    persons.update(_guessed([name for name, person in persons.items() if name == person]))
    groups = len(set(persons.values()))
    visits = all(re.fullmatch(VISIT, name, re.I) and SURE.search(name) for name in persons)
    if len(persons) > 1 and (groups == 1 or visits):
        notes.append("all names look like visits of one person, but each scan counts as a person, "
                     f"unless a column person in {sheet} says more")
        return
    endings = set()
    sizes = Counter(persons.values())
    for subject in subjects:
        subject.person = persons[subject.name]
        if sizes[subject.person] > 1:
            endings.add(_rest(subject.name, subject.person))
    if groups == len(persons):
        return
    endings.discard("")
    notes.append(f"{len(subjects)} scans of {groups} persons, told by {few(sorted(endings))} in "
                 f"their names; a column person in {sheet} overrules this")


def _guessed(names):
    """{name: person} of those names that end in a short ending behind the number of a person."""
    forms = (r"(.*\d)[-_. ]?[a-z]",                             # 007a
             r"(.*\d)[-_. /](\d{1,3})",                         # 00001_11
             r"(.*\d)/[^/]*[^/\d][^/]*")                        # 007/scan
    for form in forms:
        persons = {}
        longest = 0
        for name in names:
            found = re.fullmatch(form, name, re.IGNORECASE)
            if found and not GROUPS.search(found[1]):
                persons[name] = found[1]
                longest = max(longest, len(found[2]) if found.lastindex > 1 else 0)
        sizes = Counter(persons.values())
        if not sizes or max(sizes.values()) == 1 or len(sizes) < max(sizes.values()):
            continue
        digits = max(len(re.search(r"\d+$", person)[0]) for person in sizes)
        few_persons = len(sizes) < 2 * max(sizes.values())
        if longest > digits or longest == digits and few_persons or all(map(YEAR.search, sizes)):
            continue
        return {name: person for name, person in persons.items() if sizes[person] > 1}
    return {}


def _rest(name, person):
    """What a name says beyond the person: "_V1", or "test/" for "test/007"."""
    if name.startswith(person):
        return name[len(person):]
    if person not in name:              # HCP_Retest/7 of the person HCP/7
        return name.split("/")[0] + "/"
    before, _, after = name.rpartition(person)
    return before + after
