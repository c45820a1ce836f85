"""Slices that were cut and split by somebody else: T1/train/slice_0.npy."""

import re

from data.files import DataError
from data.layouts.words import CONTRASTS, Subject, role_of

SLICE_FILE = re.compile(r"([^/]+)/(train|val|test)/slice_(\d+)\.npy")


def collect_slices(folder, files, notes):
    """T1/train/slice_0.npy, T2/train/slice_0.npy, ... -> (subjects, split), no split without such files.

    This is the layout of SelfRDB (github.com/icon-lab/SelfRDB). Slice i is the same place in every contrast. Whose slice
    it is, may stand in subject_ids.yaml, for the test part; other parts, and a test part without, are one subject each.
    """
    stacks, others = {}, []
    for path in files:
        place = SLICE_FILE.fullmatch(path.relative_to(folder).as_posix())
        contrast = place and role_of(place[1], "")
        if contrast in CONTRASTS:
            stack = stacks.setdefault(place[2], {}).setdefault(contrast, {})
            if stack.setdefault(int(place[3]), path) != path:
                raise DataError(f"{path}: is {contrast} of the same slice as {stack[int(place[3])]}; remove one of them")
        elif path.suffix == ".npy":
            others.append(path)
    if not stacks:
        return [], None
    if not {"train", "test"} <= set(stacks):
        raise DataError(f"{folder}: has slices for {', '.join(stacks)} only; train and test are needed")
    if others:
        notes.append(f"{len(others)} other .npy files are not used, e.g. {others[0]}")
    contrasts = sorted({contrast for stack in stacks.values() for contrast in stack})
    subjects, split = [], {"train": [], "val": [], "test": []}
    for part, stack in sorted(stacks.items()):
        numbers = sorted({number for of in stack.values() for number in of})
        for contrast in contrasts:
            lacks = [number for number in numbers if number not in stack.get(contrast, {})]
            if lacks:
                raise DataError(f"{folder}: {contrast} has no {part}/slice_{lacks[0]}.npy, as {next(iter(stack))} has; "
                                "each contrast needs the same slices")
        owners = _slice_owners(folder, len(numbers)) if part == "test" else None
        if owners is None:
            notes.append(f"{part}: it is not known whose slices these are, they count as one subject"
                         + ("; statistics over subjects are impossible" if part == "test" else ""))
        names = [part] * len(numbers) if owners is None else [f"{part}_{owner}" for owner in owners]
        split[part] = sorted(set(names))
        for name in split[part]:
            own = [number for number, of in zip(numbers, names) if of == name]
            subjects.append(Subject(name, name, {c: tuple(stack[c][number] for number in own) for c in contrasts}))
    return subjects, split


def _slice_owners(folder, count):
    """The subject of each of `count` test slices, in order of their numbers; None if no file says it.

    A list in YAML (lines "- 3", or [3, 3, 4]), in JSON, or one name per line; nothing else of YAML is understood.
    """
    paths = [folder / f"subject_ids{ending}" for ending in (".yaml", ".yml", ".json", ".txt")]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    lines = [line.split("#")[0] for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
    items = [re.sub(r"^\s*-\s", "", item).strip(" '\"") for item in re.split(r"[\n,\[\]]", "\n".join(lines))]
    owners = [item for item in items if item not in ("", "---")]
    if len(owners) != count:
        raise DataError(f"{path}: names {len(owners)} subjects for {count} test slices; write a plain list, one per slice")
    return owners
