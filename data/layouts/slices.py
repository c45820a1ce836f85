"""Slices that somebody else has cut and split: T1/train/slice_0.npy, T2/train/slice_0.npy, ...

This is the layout of SelfRDB (github.com/icon-lab/SelfRDB). Slice i shows the same place in every
contrast. For the test part, a file subject_ids.yaml may say to which subject each slice belongs.
All slices of another part count as one subject, and so do test slices without that file.
"""

import re

from data.files import DataError
from data.layouts.words import CONTRASTS, Subject, read_text, role_of

SLICE_FILE = re.compile(r"([^/]+)/(train|val|test)/slice_(\d+)\.npy")


def collect_slices(folder, files, notes):
    """Read the names of .npy slices -> (subjects, split). The split is None if there are none.

    split: {"train": [names], "val": [names], "test": [names]}.
    DataError if train or test is missing, or if the contrasts do not have the same slices.
    """
    stacks, others = _sort_slices(folder, files)
    if not stacks:
        return [], None
    if not {"train", "test"} <= set(stacks):
        raise DataError(f"{folder}: has slices for {', '.join(stacks)} only; "
                        "train and test are needed")
    if others:
        notes.append(f"{len(others)} other .npy files are not used, e.g. {others[0]}")
    contrasts = set()
    for stack in stacks.values():
        contrasts.update(stack)
    contrasts = sorted(contrasts)
    subjects = []
    split = {"train": [], "val": [], "test": []}
    for part, stack in sorted(stacks.items()):
        numbers = _common_numbers(folder, part, stack, contrasts)
        owners = _slice_owners(folder, len(numbers)) if part == "test" else None
        if owners is None:
            names = [part] * len(numbers)
            lost = "; statistics over subjects are impossible" if part == "test" else ""
            notes.append(f"{part}: it is not known whose slices these are, "
                         f"they count as one subject{lost}")
        else:
            names = [f"{part}_{owner}" for owner in owners]
        split[part] = sorted(set(names))
        for name in split[part]:
            own = [number for number, owner in zip(numbers, names) if owner == name]
            of_subject = {}
            for contrast in contrasts:
                of_subject[contrast] = tuple(stack[contrast][number] for number in own)
            subjects.append(Subject(name, name, of_subject))
    return subjects, split


def _sort_slices(folder, files):
    """Sort the paths -> ({part: {contrast: {number: path}}}, [other .npy files])."""
    stacks = {}
    others = []
    for path in files:
        place = SLICE_FILE.fullmatch(path.relative_to(folder).as_posix())
        contrast = place and role_of(place[1], "")
        if contrast in CONTRASTS:
            stack = stacks.setdefault(place[2], {}).setdefault(contrast, {})
            first = stack.setdefault(int(place[3]), path)
            if first != path:
                raise DataError(f"{path}: is {contrast} of the same slice as {first}; "
                                "remove one of them")
        elif path.suffix == ".npy":
            others.append(path)
    return stacks, others


def _common_numbers(folder, part, stack, contrasts):
    """The sorted numbers of the slices of one part; every contrast must have all of them."""
    numbers = set()
    for slices in stack.values():
        numbers.update(slices)
    numbers = sorted(numbers)
    for contrast in contrasts:
        lacks = [number for number in numbers if number not in stack.get(contrast, {})]
        if lacks:
            raise DataError(f"{folder}: {contrast} has no {part}/slice_{lacks[0]}.npy, "
                            f"as {next(iter(stack))} has; each contrast needs the same slices")
    return numbers


def _slice_owners(folder, count):
    """The subject of each of the `count` test slices, in the order of their numbers, or None.

    The file is a list in YAML (lines "- 3", or [3, 3, 4]) or in JSON, or has one name in a line.
    Nothing else of YAML is understood. None means that there is no such file.
    """
    paths = [folder / f"subject_ids{ending}" for ending in (".yaml", ".yml", ".json", ".txt")]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    without_comments = "\n".join(line.split("#")[0] for line in read_text(path).splitlines())
    owners = []
    for item in re.split(r"[\n,\[\]]", without_comments):
        owner = re.sub(r"^\s*-\s", "", item).strip(" '\"")
        if owner not in ("", "---"):
            owners.append(owner)
    if len(owners) != count:
        raise DataError(f"{path}: names {len(owners)} subjects for {count} test slices; "
                        "write a plain list, one per slice")
    return owners
