"""Which contrasts are made from which: the tasks of a model, in the words of the flags.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.
"""
from itertools import combinations, permutations

from common.files import RunError
from data import canonical_contrast


def missing_patterns(missing, contrasts):
    """The tasks that --missing asks for, as a list of pairs (known contrasts, missing contrasts).

    missing: ("each",) leaves out one contrast at a time, and ("all",) leaves out every subset.
    Other words are names of contrasts.
    RunError if there is no such contrast, or if none would be known or missing.
    """
    if len(contrasts) < 2:
        raise RunError(f"the data give one contrast, {contrasts[0]}; two or more are needed, "
                       "see --contrasts", status=2)
    subsets = []
    if missing == ("each",):
        subsets = [(c,) for c in contrasts]
    elif missing == ("all",):
        for count in range(1, len(contrasts)):
            subsets += combinations(contrasts, count)
    else:
        unknown = [c for c in missing if c not in contrasts]
        if unknown or not missing or len(set(missing)) >= len(contrasts):
            raise RunError(f"--missing {','.join(missing)}: name some, but not all, of "
                           f"{', '.join(contrasts)}; or each; or all", status=2)
        subsets = [tuple(c for c in contrasts if c in missing)]
    patterns = []
    for subset in subsets:
        rest = tuple(c for c in contrasts if c not in subset)
        patterns.append((rest, subset))
    return patterns


def all_directions(source, target, contrasts):
    """Every pair (a source, a target) of different contrasts, as channel numbers.

    source, target: names of contrasts, which must be in `contrasts`.
    """
    pairs = []
    for one in source:
        for other in target:
            src = contrasts.index(canonical_contrast(one))
            tgt = contrasts.index(canonical_contrast(other))
            if src != tgt:
                pairs.append((src, tgt))
    return pairs


def named_pairs(words, contrasts):
    """The pairs of names (source, target) that words such as t1:ct mean; without words all pairs.

    contrasts: those of the data.  RunError if a word does not name two different ones of them.
    """
    if not words:
        return list(permutations(contrasts, 2))
    pairs = []
    for word in words:
        pair = tuple(canonical_contrast(name) for name in word.split(":"))
        if len(set(pair)) < 2 or len(pair) != 2 or not set(pair) <= set(contrasts):
            raise RunError(f"{word}: name two different ones of {', '.join(contrasts)}, such as "
                           f"{contrasts[0]}:{contrasts[1]}", status=2)
        pairs.append(pair)
    return pairs


def named_directions(words, contrasts):
    """The tasks that words such as t1+t2:pd mean: pairs (known contrasts, contrasts to make).

    contrasts: those of the data.  RunError if a word does not name different ones of them.
    """
    found = []
    for word in words:
        sides = [tuple(map(canonical_contrast, side.split("+"))) for side in word.split(":")]
        names = [name for side in sides for name in side]
        if len(sides) != 2 or len(set(names)) < len(names) or not set(names) <= set(contrasts):
            raise RunError(f"{word}: name different ones of {', '.join(contrasts)}, such as "
                           f"{contrasts[0]}:{contrasts[-1]}", status=2)
        found.append(tuple(sides))
    return found


def chosen_direction(pairs, only, contrasts):
    """Of such pairs the one that `only` names, as a list; all pairs if `only` is empty.

    only: the names (source, target). RunError if there is no such pair.
    """
    if not only:
        return pairs
    wanted = tuple(canonical_contrast(c) for c in only)
    for src, tgt in pairs:
        if (contrasts[src], contrasts[tgt]) == wanted:
            return [(src, tgt)]
    there = ", ".join(f"{contrasts[src]},{contrasts[tgt]}" for src, tgt in pairs)
    raise RunError(f"--only {','.join(only)}: this model knows {there}", status=2)


def typed_pair(source, target):
    """The canonical names of a typed source and target; None if nothing was typed.

    ValueError if only one was typed, or if both are the same contrast.
    """
    if not source and not target:
        return None
    if not source or not target:
        raise ValueError("--source and --target belong together; give both or none")
    pair = (canonical_contrast(source), canonical_contrast(target))
    if pair[0] == pair[1]:
        raise ValueError(f"--source {source} and --target {target} are the same contrast; "
                         "name two different ones")
    return pair


def pair_in(contrasts, typed, pairs):
    """The names (source, target) of a task.

    contrasts: those of the data.  typed: (source, target) as typed, perhaps empty.  pairs: those
    that need not be typed.  RunError if the data do not say which pair is meant.
    """
    wanted = typed_pair(*typed)
    if wanted:
        return wanted
    for pair in pairs:
        if sorted(pair) == sorted(contrasts):
            return pair
    raise RunError(f"the data hold {', '.join(contrasts)}; say which to make from which, "
                   "for example --source ct --target pet", status=2)


def one_task(pair):
    """The tasks of a method with one source and one target: [(known contrasts, to be made)]."""
    source, target = pair
    return [((source,), (target,))]
