"""Which subject is for training, validation or test: at random by person, or as the user says."""

import hashlib
import json
from pathlib import Path

from data.files import DataError

PARTS = ("train", "val", "test")
ENOUGH = 8              # so many persons are enough to have a validation part


def make_split(subjects, seed, train_fraction, test_subjects):
    """Split subjects at random by person -> {"train": [names], "val": [names], "test": [names]}.

    The split depends on the names and the seed only, not on the order of the files.

    train_fraction: Of n persons, round(train_fraction * n) are for training, but at least 1 and at
        most n - 1.
    test_subjects: Of the others, up to this number are for the test, and the rest for validation.
        Below 1 it is a share of all persons. Train and validation are then rounded, so that 93
        persons with 0.7 and 0.2 give 65, 9 and 19.
    In a small set no one is left for validation then. If there are 8 persons or more, about a tenth
    of all persons, at least 1, move from training to validation. The test part stays as it is,
    unless too few persons are for training; they move from the test part then. For example, 20
    persons with the settings 0.8 and 50 give 14 for training, 2 for validation and 4 for the test.
    DataError if a number makes no sense, or if there are fewer than 2 persons.
    """
    if not 0 < train_fraction < 1 or test_subjects <= 0:
        raise DataError(f"split: train_fraction {train_fraction} must lie between 0 and 1, "
                        f"test_subjects {test_subjects} must be above 0")

    people = _drawn({subject.person for subject in subjects}, seed)
    n = len(people)
    if n < 2:
        raise DataError(f"split: all subjects are visits of {people[0]}; "
                        "at least 2 persons are needed")
    n_train = min(max(1, round(train_fraction * n)), n - 1)
    if test_subjects < 1:
        n_val = round(max(0, 1 - train_fraction - test_subjects) * n)
        n_test = max(1, n - n_train - n_val)
    else:
        n_test = min(int(test_subjects), n - n_train)
    train = people[:n_train]
    test = people[n_train:n_train + n_test]
    val = people[n_train + n_test:]
    if not val and n >= ENOUGH:
        n_val = max(1, round(n / 10))
        largest = train if n_train > n_val else test
        val = largest[-n_val:]
        del largest[-n_val:]
    groups = {"train": train, "val": val, "test": test}
    split = {}
    for part, group in groups.items():
        split[part] = sorted(subject.name for subject in subjects if subject.person in group)
    return split


def use_split(given, subjects, seed, say):
    """The split that a data set comes with, for its complete subjects -> a split as make_split's.

    If it has no validation part, a tenth of the persons for training validates, if there are ENOUGH
    of them. This depends on the names and the seed only.

    given: {"train": [names], "val": [names], "test": [names]}; other names are left out.
    DataError if train or test is empty then.
    """
    person = {subject.name: subject.person for subject in subjects}
    split = {}
    for part in PARTS:
        split[part] = [name for name in given[part] if name in person]
    for part in ("train", "test"):
        if not split[part]:
            raise DataError(f"split: no subject of the data set's own {part} part is complete; "
                            "give a split of your own with --split")
    people = _drawn({person[name] for name in split["train"]}, seed)
    if not split["val"] and len(people) >= ENOUGH:
        moved = set(people[:round(len(people) / 10)])
        split["val"] = [name for name in split["train"] if person[name] in moved]
        split["train"] = [name for name in split["train"] if person[name] not in moved]
        say(f"  the data set's own split has no validation part: {len(moved)} persons of the "
            "training part validate")
    part_of = {}                        # person -> part
    for part, names in split.items():
        for name in names:
            if part_of.setdefault(person[name], part) != part:
                say(f"  warning: images of {person[name]} are in {part_of[person[name]]} and "
                    f"{part} of the data set's own split")
    return split


def _drawn(people, seed):
    """Persons in a random order, which depends on their names and the seed only."""
    def draw(person):
        return hashlib.sha256(f"{seed}:{person}".encode()).hexdigest()

    return sorted(people, key=draw)


def read_split(split_file, subjects, say):
    """Read and check a user's own split -> {"train": [names], "val": [names], "test": [names]}.

    split_file: A JSON file of that form.
    subjects: All complete subjects; some may be left out.
    DataError if the file is no split, if train or test is empty, or if a name is unknown or listed
    twice. It is also raised if visits of one person are in two parts.
    """
    split = _read_lists(split_file)
    person = {subject.name: subject.person for subject in subjects}
    listed = []
    for names in split.values():
        listed += names
    unknown = [name for name in listed if name not in person]
    if unknown:
        raise DataError(f"{split_file}: {len(unknown)} names are no complete subjects, "
                        f"e.g. {', '.join(unknown[:3])}; "
                        f"subjects are called like {subjects[0].name}")
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise DataError(f"{split_file}: {', '.join(twice[:3])} is listed twice; "
                        "every subject belongs to one part")
    for part in ("train", "test"):
        if not split[part]:
            raise DataError(f"{split_file}: {part} is empty; name at least one subject")
    part_of = {}                        # person -> part
    for part, names in split.items():
        for name in names:
            first = part_of.setdefault(person[name], part)
            if first != part:
                raise DataError(f"{split_file}: visits of {person[name]} are in {first} and "
                                f"{part}; keep a person's visits together")
    if len(listed) < len(person):
        say(f"  {len(person) - len(listed)} subjects are not in {split_file} and not used")
    return split


def _read_lists(split_file):
    split = {}
    try:
        given = json.loads(Path(split_file).read_text(encoding="utf-8"))
        for part in PARTS:
            split[part] = [str(name) for name in given.get(part, [])]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{split_file}: is not a split ({error}); "
                        "write JSON with lists train, val, test") from None
    return split


def check_duplicates(digests, split, say):
    """Refuse equal images in two parts of the split, and warn of equal images in one part.

    digests: {subject: {contrast: digest of its slices}}.
    DataError if a training subject is also a test subject under another name, and so on.
    """
    part_of = {}                        # subject -> part
    for part, names in split.items():
        part_of.update(dict.fromkeys(names, part))
    first = {}                          # (contrast, digest) -> subject
    for name, of_contrast in digests.items():
        for contrast, digest in of_contrast.items():
            other = first.setdefault((contrast, digest), name)
            if other == name:
                continue
            part = part_of.get(name)
            other_part = part_of.get(other)
            if part and other_part and part != other_part:
                raise DataError(f"{other} ({other_part}) and {name} ({part}) have identical "
                                f"{contrast} images, a leak; remove one of them")
            say(f"  warning: {other} and {name} have identical {contrast} images")
