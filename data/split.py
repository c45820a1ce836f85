"""Which subject is for training, validation or test: at random by person, or as the user says."""

import hashlib
import json
import re
import unicodedata
from pathlib import Path

from data.files import DataError
from data.layouts.people import part_of_word
from data.layouts.words import decoded, few, role_of

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
    part_of = {}                        # person -> part
    torn = {}                           # two parts -> persons
    for part, names in split.items():
        for name in names:
            first = part_of.setdefault(person[name], part)
            if first != part:
                torn.setdefault(f"{first} and {part}", {})[person[name]] = None
    for parts, persons in torn.items():
        say(f"  warning: images of {few(list(persons))} are in {parts} of the data set's own split")
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
                        f"e.g. {', '.join(unknown[:3])}; "
                        f"subjects are called like {subjects[0].name}")
    listed = sum(split.values(), [])
    twice = sorted({name for name in listed if listed.count(name) > 1})
    if twice:
        raise DataError(f"{split_file}: {', '.join(twice[:3])} is listed twice; "
                        "every subject belongs to one part")
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
    part_of = {}                        # person -> part
    for part, names in split.items():
        for name in names:
            first = part_of.setdefault(person[name], part)
            if first != part:
                raise DataError(f"{split_file}: visits of {person[name]} are in {first} and "
                                f"{part}; keep a person's visits together")
    used = sum(map(len, split.values()))
    if used < len(person):
        say(f"  {len(person) - used} subjects are not in {split_file} and not used")
    return split


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

    The text is in UTF-8 or UTF-16, and other words for a part, such as validation, are understood.

        JSON {"train": [...], "val": [...], "test": [...]}; a name may be {"image": name, ...}
        JSON {name: part, ...}
        JSON of folds, as of nnU-Net: the first is used, and its val is the test, if it has none
        a table of names and parts, with commas, semicolons, tabs or spaces
        names, one in a line, below lines such as "train:" or "[train]"
        names, one in a line, in files train.txt, val.txt and test.txt of one folder; any one, or
        the folder, may be given
        names, one in a line, or a JSON list: they are the test

    is_known: A function from a text to True if it means a subject.
    DataError if the file cannot be read, or has none of these forms.
    """
    if path.is_dir():
        return _read_folder(path, sorted(path.iterdir()), is_known, say)
    text = _read_text(path)
    if text.lstrip()[:1] == "{" or re.match(r"\s*\[\s*[\[{\"\]\d-]", text):
        try:
            return _from_json(json.loads(text), path, say)
        except (ValueError, AttributeError, TypeError, IndexError, RecursionError) as error:
            raise _no_split(path, error) from None
    if part_of_word(path.stem):
        beside = [other for other in sorted(path.parent.iterdir()) if other.suffix == path.suffix]
        return _read_folder(path.parent, beside, is_known, say)
    return _from_rows(text, path, is_known)


def _read_folder(folder, paths, is_known, say):
    """The lists of files such as train.txt, of which each has the names of one part."""
    lists = {}
    for path in paths:
        part = part_of_word(path.stem)
        if part and path.is_file():
            lists.update(_from_rows(_read_text(path), path, is_known, part))
    if not lists:
        raise _no_split(folder, "it is a folder without files such as train.txt and test.txt")
    say(f"  the split is that of the files {', '.join(lists)} in {folder}")
    return lists


def _from_rows(text, path, is_known, part=None):
    """The lists in a text with one name, or one name and its part, in a line, see read_lists.

    part: That of the names without a part. By default it is the test, if they stand alone.
    """
    rows = []
    for line in text.splitlines():
        cells = [cell.strip(" \"'") for cell in re.split(r"[,;\t|]", line)]
        words = line.rsplit(maxsplit=1)
        if len(cells) == 1 and len(words) == 2 and part_of_word(words[1]):
            cells = words
        if any(cells) and not line.lstrip().startswith("#"):
            rows.append(cells)
    width = min(map(len, rows), default=0)
    if not width:
        raise _no_split(path, "it is empty")
    known = [sum(is_known(row[column]) for row in rows) for column in range(width)]
    told = [sum(part_of_word(row[column]) is not None for row in rows) for column in range(width)]
    name = known.index(max(known))
    place = told.index(max(told))
    tells = width > 1 and told[place] >= max(1, len(rows) - 1)
    if width > 1 and not tells and part is None:
        raise _no_split(path, "it is a table, and no column of it says train, val or test")
    lists = {}
    part = part or "test"
    for row in rows:
        if tells:
            part = part_of_word(row[place])
        elif width == 1 and part_of_word(row[0].strip("[]: ")) and row[0].strip(" ")[-1] in "]:":
            part = part_of_word(row[0].strip("[]: "))
            continue
        if part and not HEADING.fullmatch(row[name]):
            lists.setdefault(part, []).append(re.sub(r"^-\s+", "", row[name]))
    return lists


def _from_json(content, path, say):
    """The lists in the content of a JSON file, see read_lists."""
    if isinstance(content, dict) and content and all(type(of) is dict for of in content.values()):
        content = list(content.values())
    if isinstance(content, list) and content and isinstance(content[0], dict):
        say(f"  {path}: the first of {len(content)} folds is used")
        lists = _from_json(content[0], path, say)
        if "test" not in lists and "val" in lists:
            lists["test"] = lists.pop("val")
            say(f"  {path}: a fold has no test, so its val is the test")
        return lists
    if isinstance(content, list) and content and isinstance(content[0], str):
        return {"test": content}
    if isinstance(content, list):
        raise _no_split(path, "it is a list, but not of names")
    lists = {}
    other = []
    for key, value in content.items():
        part = part_of_word(key)
        if part and isinstance(value, list):
            lists[part] = [_name_in(entry) for entry in value]
        elif isinstance(value, str) and part_of_word(value):
            lists.setdefault(part_of_word(value), []).append(key)
        elif isinstance(value, list):
            other.append(key)
    if not lists:
        raise _no_split(path, f"it has {few(list(content)) or 'nothing'}")
    if other:
        say(f"  {path}: {few(other)} is no part of a split and not used")
    return lists


def _name_in(entry):
    """The name in one entry of a list: a text or a number, or {"image": name, "label": ...}."""
    if isinstance(entry, dict):
        entry = [entry[key] for key in ("image", "subject", "id", *entry) if key in entry][0]
    return str(entry[0] if isinstance(entry, list) else entry)


def _read_text(path):
    try:
        return decoded(path.read_bytes())
    except OSError as error:
        raise _no_split(path, error) from None


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
