"""Which subject is for training, validation or test: a random split by person, or the user's own."""

import hashlib
import json
from pathlib import Path

from data.files import DataError


def make_split(subjects, seed, train_fraction, test_subjects):
    """Random split by person, the same for the same names and seed in any order of files.

    n persons: round(train_fraction * n) train (at least 1, at most n - 1), up to test_subjects test, the rest val.
    """
    if not 0 < train_fraction < 1 or test_subjects < 1:
        raise DataError(f"split: train_fraction {train_fraction} must lie between 0 and 1, "
                        f"test_subjects {test_subjects} must be at least 1")
    people = sorted({subject.person for subject in subjects},
                    key=lambda person: hashlib.sha256(f"{seed}:{person}".encode()).hexdigest())
    n = len(people)
    if n < 2:
        raise DataError(f"split: all subjects are visits of {people[0]}; at least 2 persons are needed")
    n_train = min(max(1, round(train_fraction * n)), n - 1)
    n_test = min(test_subjects, n - n_train)
    groups = {"train": people[:n_train], "val": people[n_train + n_test:], "test": people[n_train:n_train + n_test]}
    return {part: sorted(subject.name for subject in subjects if subject.person in group)
            for part, group in groups.items()}


def read_split(split_file, subjects, say):
    """A user's own split, checked."""
    try:
        given = json.loads(Path(split_file).read_text(encoding="utf-8"))
        split = {part: [str(name) for name in given.get(part, [])] for part in ("train", "val", "test")}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{split_file}: is not a split ({error}); write JSON with lists train, val, test") from None
    person = {subject.name: subject.person for subject in subjects}
    listed = [name for names in split.values() for name in names]
    unknown = [name for name in listed if name not in person]
    if unknown:
        raise DataError(f"{split_file}: {len(unknown)} names are no complete subjects, e.g. {', '.join(unknown[:3])}; "
                        f"subjects are called like {subjects[0].name}")
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise DataError(f"{split_file}: {', '.join(twice[:3])} is listed twice; every subject belongs to one part")
    for part in ("train", "test"):
        if not split[part]:
            raise DataError(f"{split_file}: {part} is empty; name at least one subject")
    part_of = {}
    for part, names in split.items():
        for name in names:
            if part_of.setdefault(person[name], part) != part:
                raise DataError(f"{split_file}: visits of {person[name]} are in {part_of[person[name]]} and {part}; "
                                "keep a person's visits together")
    if len(listed) < len(person):
        say(f"  {len(person) - len(listed)} subjects are not in {split_file} and not used")
    return split


def check_duplicates(digests, split, say):
    """digests: {subject: {contrast: digest of its slices}}. Equal slices across parts of the split are a leak."""
    part_of = {name: part for part, names in split.items() for name in names}
    first = {}
    for name, of in digests.items():
        for contrast, digest in of.items():
            other = first.setdefault((contrast, digest), name)
            if other == name:
                continue
            parts = part_of.get(other), part_of.get(name)
            if None not in parts and parts[0] != parts[1]:
                raise DataError(f"{other} ({parts[0]}) and {name} ({parts[1]}) have identical {contrast} images, "
                                "a leak; remove one of them")
            say(f"  warning: {other} and {name} have identical {contrast} images")
