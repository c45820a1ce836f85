"""Which subject is for training, validation or test: at random by person, or as the user says."""

import csv
import hashlib
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

from data.files import DataError
from data.layouts.people import part_of_word
from data.layouts.words import few, lines_of, read_text, role_of

PARTS = ("train", "val", "test")
# The first line of a table or a list, if it is no name.
HEADING = re.compile(r"(subject|patient|participant|case|scan|name|file|id)s?([-_ ]?(id|name)s?)?",
                     re.IGNORECASE)
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
    for parts, persons in _torn(split, person).items():
        say(f"  warning: images of {few(persons)} are in {parts} of the data set's own split")
    return split


def _drawn(people, seed):
    """Persons in a random order, which depends on their names and the seed only."""
    def draw(person):
        return hashlib.sha256(f"{seed}:{person}".encode()).hexdigest()

    return sorted(people, key=draw)


def read_split(split_file, subjects, say):
    """Read and check a user's own split -> {"train": [names], "val": [names], "test": [names]}.

    split_file: A file or a folder in one of the forms of read_lists. Names may be those of
        subjects, of persons, or of files.
    subjects: All complete subjects; some may be left out.
    If only the test is named, all other persons are for training. If train is an empty list, the
    split can only serve to score.
    DataError if the file is no split, if train and val or the test are empty, or if a name is
    unknown or listed twice. It is also raised if visits of one person are in two parts.
    """
    person = {subject.name: subject.person for subject in subjects}
    meaning = _meaning_of_names(subjects)
    given = read_lists(Path(split_file), lambda text: bool(_find(text, meaning)), say)
    split = _subjects_of(given, meaning, split_file, subjects[0].name)
    if given.keys() == {"test"}:
        tested = {person[name] for name in split["test"]}
        split["train"] = [name for name in person if person[name] not in tested]
        say(f"  {split_file} names the test only; the other {len(split['train'])} subjects are for "
            "training, without visits of the same persons")
    elif not split["train"] and split["val"] or not split["test"]:
        part = "test" if split["train"] else "train"
        raise DataError(f"{split_file}: {part} is empty; name at least one subject")
    elif not split["train"]:
        say(f"  {split_file} has nobody for training, so it only serves to score")
    for parts, persons in _torn(split, person).items():
        raise DataError(f"{split_file}: visits of {few(persons)} are in {parts}; "
                        "keep a person's visits together")
    used = sum(map(len, split.values()))
    if used < len(person):
        say(f"  {len(person) - used} subjects are not in {split_file} and not used")
    return split


def _subjects_of(given, meaning, split_file, example):
    """The names of the subjects that the texts of a split mean -> a split.

    given: See read_lists. meaning: See _meaning_of_names. example: The name of a subject.
    DataError if a text means no subject, or if a subject is in two parts.
    """
    split = {part: [] for part in PARTS}
    unknown = []
    for part, texts in given.items():
        for text in texts:
            found = _find(text, meaning)
            split[part] += [name for name in found if name not in split[part]]
            if not found:
                unknown.append(text)
    if unknown:
        raise DataError(f"{split_file}: {len(unknown)} names are no complete subjects, "
                        f"e.g. {', '.join(unknown[:3])}; subjects are called like {example}")
    counts = Counter(split["train"] + split["val"] + split["test"])
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise DataError(f"{split_file}: {', '.join(twice[:3])} is listed twice; "
                        "every subject belongs to one part")
    return split


def _torn(split, person):
    """Who has visits in two parts of a split -> {"train and test": [persons]}, and so on."""
    part_of = {}                        # person -> part
    torn = {}
    for part, names in split.items():
        for name in names:
            first = part_of.setdefault(person[name], part)
            persons = torn.setdefault(f"{first} and {part}", [])
            if first != part and person[name] not in persons:
                persons.append(person[name])
    return {parts: persons for parts, persons in torn.items() if persons}


def _meaning_of_names(subjects):
    """{plain text: names of the subjects that it means}. They are visits of one person.

    A text may be the name of a subject or of a person, its last part, or the name of a file.
    """
    found = {}
    whole = {}
    for subject in subjects:
        name = _plain(subject.name)
        person = _plain(subject.person)
        whole[name] = [subject.name]
        texts = {person, name.split("/")[-1], person.split("/")[-1], name.replace("/", "_")}
        texts.update(_plain(path.name) for path in subject.paths)
        for text in texts:
            found.setdefault(text, []).append(subject)
    meaning = {}
    for text, meant in found.items():
        if len({subject.person for subject in meant}) == 1:
            meaning[text] = [subject.name for subject in meant]
    return {**meaning, **whole}


def _find(text, meaning):
    """The names of the subjects that a text means, [] if unknown. Of a path, a part may do.

    A contrast, or a number of four digits as of nnU-Net, may follow the name of a subject.
    """
    parts = _plain(text).split("/")
    for last in range(len(parts), 0, -1):
        for first in range(last):
            part = "/".join(parts[first:last])
            stem, _, ending = part.rpartition("_")
            if part in meaning:
                return meaning[part]
            if stem in meaning and (role_of(ending, "") or re.fullmatch(r"\d{4}", ending)):
                return meaning[stem]
    return []


def _plain(text):
    """A name as it is compared: in one Unicode form, lower case, without an ending of a file."""
    text = unicodedata.normalize("NFC", text).strip().replace("\\", "/").strip("/").casefold()
    return re.sub(r"\.(nii|nii\.gz|npy|mha|mhd|png|jpe?g)$", "", text)


# ---- Files of splits -----------------------------------------------------------------------------

def read_lists(path, is_known, say):
    """Read the lists of a split as they were written -> {part: [texts]}, of the parts it names.

    Other words for a part, such as validation, are understood.

        JSON {"train": [...], "val": [...], "test": [...]}; a name may be {"image": name, ...}
        JSON {name: part, ...}
        JSON of folds, as of nnU-Net: the first is used, and its val is the test, if it has none
        a table with a column of names and one of parts; it may have no titles
        names, one in a line, in files train.txt, val.txt and test.txt of one folder, or such as
        train_list.txt; any one, or the folder, may be given
        names, one in a line, or a JSON list: they are the test

    is_known: A function from a text to True if it means a subject.
    DataError if the file cannot be read, or has none of these forms.
    """
    if path.is_dir():
        paths = sorted(path.iterdir())
        plain = [other for other in paths if part_of_word(other.stem)]
        return _read_folder(path, plain or paths, is_known, say)
    text = read_text(path)
    if text.lstrip().startswith(("{", "[")):
        try:
            return _from_json(json.loads(text), path, say)
        except (ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
            raise _no_split(path, error) from None
    if re.search(r"[\x01-\x08]", text) or path.suffix.lower() in (".yaml", ".yml"):
        raise _no_split(path, "it is neither JSON nor a list or a table as text")
    part, form = _part_of_file(path)
    if part:
        beside = [other for other in sorted(path.parent.iterdir())
                  if other.suffix == path.suffix and _part_of_file(other)[1] == form]
        return _read_folder(path.parent, beside, is_known, say)
    return _from_table(path, is_known)


def _part_of_file(path):
    """The part that a file's name means, and the rest of it -> (part or None, text).

    train_val_list.txt is for training, and a name such as train_test.csv means no part.
    """
    words = re.split(r"([^a-z]+)", path.stem, flags=re.IGNORECASE)
    parts = {part_of_word(word) for word in words} - {None}
    if parts == {"train", "val"}:
        parts = {"train"}
    rest = "".join("" if part_of_word(word) else word for word in words)
    return (parts.pop() if len(parts) == 1 else None), re.sub(r"[-_. ]+", "_", rest.lower())


def _read_folder(folder, paths, is_known, say):
    """The lists of files such as train.txt, of which each has the names of one part."""
    lists = {}
    for path in paths:
        part, _ = _part_of_file(path)
        if part and path.is_file():
            found = _from_table(path, is_known, part)
            if not lists.keys().isdisjoint(found):
                raise _no_split(folder, f"several files in it name the part {part}, {path.name} "
                                "is one; give one of them")
            lists.update(found)
    if not lists:
        raise _no_split(folder, "it is a folder without files such as train.txt and test.txt")
    say(f"  the split is that of the files {', '.join(lists)} in {folder}")
    return lists


def _from_table(path, is_known, part=None):
    """The lists in a table of names and parts, or of names only, see read_lists.

    The column with most names of subjects names them, and the one with most words for parts tells
    the parts. All its rows must have such a word, except for the titles.

    part: That of the names, if no column tells it. By default it is the test for a plain list.
    """
    lines, separator = lines_of(path)
    rows = []
    for cells in csv.reader(lines, delimiter=separator):
        if any(cells) and not cells[0].lstrip().startswith("#"):
            rows.append([cell.strip(" '") for cell in cells])
    if not rows:
        raise _no_split(path, "it is empty")
    columns = list(zip(*rows))          # as many as the shortest row has cells
    names = max(columns, key=lambda column: sum(map(is_known, column)))
    parts = min(([part_of_word(cell) for cell in column] for column in columns),
                key=lambda of_column: of_column.count(None))
    if parts.count(None) > 1 or parts[-1] is None:
        if len(columns) > 1 and part is None:
            raise _no_split(path, "it is a table, and no column of it says train, val or test")
        parts = [part or "test"] * len(rows)
    lists = {}
    for name, of_name in zip(names, parts):
        if of_name and not HEADING.fullmatch(name):
            lists.setdefault(of_name, []).append(name)
    return lists


def _from_json(content, path, say):
    """The lists in the content of a JSON file, see read_lists."""
    if isinstance(content, list) and content and isinstance(content[0], dict):
        lists = _from_json(content[0], path, say)
        if "test" not in lists:
            lists["test"] = lists.pop("val", [])
        say(f"  {path}: the first of {len(content)} folds is used; without a test, its val is the "
            "test")
        return lists
    if isinstance(content, list):
        if not all(isinstance(name, str) for name in content):
            raise _no_split(path, "it is a list, but not of names")
        return {"test": content}
    lists = {}
    for key, value in content.items():
        part = part_of_word(key)
        if part and isinstance(value, list):
            lists[part] = [_name_in(entry) for entry in value]
        elif isinstance(value, str) and part_of_word(value):
            lists.setdefault(part_of_word(value), []).append(key)
    if not lists:
        raise _no_split(path, f"it has {few(list(content)) or 'nothing'}")
    return lists


def _name_in(entry):
    """The name in one entry of a list: a text or a number, or {"image": name, "label": ...}."""
    if isinstance(entry, dict):
        entry = entry["image"]
    return str(entry[0] if isinstance(entry, list) else entry)


def _no_split(path, why):
    return DataError(f"{path}: is not a split ({why}); write JSON with lists train, val, test")


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
