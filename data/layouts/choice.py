"""Which file is taken, if a subject has several for one contrast, and which files are no scans.

    T1.nii.gz  T1_bet.nii.gz  T1_2.nii.gz           T1.nii.gz, the plainest name
    CT.nii.gz  CTres.nii.gz                         CTres.nii.gz, a preferred word
    T1.nii.gz  T2.nii.gz  T2_to_T1.nii.gz           T2_to_T1.nii.gz, if only it has the grid of T1
    T1.nii.gz  T1 (1).nii.gz  T1_synthetic.nii.gz   T1.nii.gz, no copy, and no program's invention

The words of a name that do not say its contrast are called its variant. The choice between variants
is the same for all subjects of a data set. It is always told.
"""

import re
import zlib

import numpy as np

from data.files import DataError
from data.layouts.words import (
    CONTRASTS,
    PREFERRED_WORDS,
    REGISTERED_WORDS,
    SYNTHETIC_WORDS,
    TRACERS,
    canonical_contrast,
    few,
    words_of,
)
from data.nifti import grid_of, opened, volumes_of

# What file managers and browsers add to the name of a copy.
COPY = re.compile(r"^(?:copy of|kopie von|copie de|copia de)\s+|(?:\s*\(\d+\)|~"
                  r"|[\s_-]+(?:copy|kopie|copie|copia)(?:\s*\(?\d+\)?)?)+(?=\.(?:nii|mh[ad]))",
                  re.IGNORECASE)
HEADER = 540            # bytes of the longest header


def real_scans(folder, images, notes):
    """Leave out copies, and images that a program has invented -> paths of real scans.

    A copy has the name of another file and a mark such as (1). Of an invented image the name says
    so, or the header, in which data.write_volume always writes it. A phantom stands for a scan.

    DataError if no image is left.
    """
    real = []
    made = []
    copies = []
    there = set(images)
    for path in images:
        original = path.with_name(COPY.sub("", path.name))
        if original != path and original in there:
            copies.append(path.name)
        elif not SYNTHETIC_WORDS.isdisjoint(words_of(path.name, path.parent.name)):
            made.append(path.name)
        elif _says_synthetic(path):
            made.append(path.name)
        else:
            real.append(path)
    if made and not real:
        raise DataError(f"{folder}: holds no real scan, only synthetic ones, as their names or "
                        f"headers say: {few(made)}; to use them, list them in a manifest.csv")
    for names, what in ((made, "synthetic, as their names or headers say,"),
                        (copies, "copies of others, as their names say,")):
        if names:
            notes.append(f"{len(names)} files are {what} and are not used: {few(names)}")
    return real


def _says_synthetic(path):
    """True if the header of a NIfTI file says that its image was invented.

    We only look for the word in the first bytes. To parse the headers of all files would take long.
    """
    if not path.is_file():
        return False                    # a pipe would never answer
    try:
        with opened(path, []) as file:
            text = file.read(HEADER).lower()
    except (OSError, EOFError, zlib.error):
        return False                    # this is reported when its voxels are read
    return b"synthetic" in text and b"phantom" not in text


def is_series(path):
    """True if a NIfTI file holds several volumes."""
    grid = grid_of(path)
    return grid is not None and volumes_of(grid[0]) > 1


# ---- One of several ------------------------------------------------------------------------------

def choose_files(found, notes):
    """Take one file of each role for every subject -> list of {role: path}.

    Variants with a word of PREFERRED_WORDS come first. Then come those that lie on the grid of
    another contrast in most subjects, because the images of a subject must fit on each other. Then
    come those that most subjects have, and then those with the fewest words. Between equal ones, a
    word of REGISTERED_WORDS decides, and the alphabet.

    found: (name, {role: {path: variant}}) of every subject, as a list. A role is a contrast or
        "seg", as words.role_of tells it, and words.further_words tells the variant.
    notes: A list that gets a sentence for each role about the choice of most subjects, and one
        that names the others.
    """
    ranks = _ranks_of(found)
    chosen = []
    told = {}                           # role -> {sentence: names of the subjects}
    for name, roles in found:
        files = {}
        for role, paths in roles.items():
            ranked = sorted((ranks[role, variant], len(path.name), path)
                            for path, variant in paths.items())
            files[role] = ranked[0][2]
            if len(ranked) > 1:
                sentence = _sentence(role, ranked, name)
                told.setdefault(role, {}).setdefault(sentence, []).append(name)
        chosen.append(files)
    for role, sentences in told.items():
        usual = max(sentences, key=lambda sentence: len(sentences[sentence]))
        names = sentences.pop(usual)
        notes.append(f"{usual}, in {len(names)} subjects: {few(names)}; to use another one, remove "
                     "this one or write a manifest.csv")
        others = sum(sentences.values(), [])
        if others:
            notes.append(f"{len(others)} more subjects have several files for {role}, and one is "
                         f"used: {few(others)}")
    return chosen


def _ranks_of(found):
    """How good each variant is -> {(role, variant): rank}. The smallest rank is the best one.

    A rank is (no preferred word, on no other grid, minus the number of subjects, number of words,
    not registered, words).
    """
    members = {}                        # (role, variant) -> (path, roles of its subject) pairs
    for _, roles in found:
        for role, paths in roles.items():
            for path, variant in paths.items():
                members.setdefault((role, variant), []).append((path, roles))
    grids = {}                          # path -> grid, so that no header is read twice
    ranks = {}
    for (role, variant), files in members.items():
        rivals = [(path, roles) for path, roles in files if len(roles[role]) > 1]
        fitting = sum(_fits(path, role, roles, grids) for path, roles in rivals)
        ranks[role, variant] = (PREFERRED_WORDS.isdisjoint(variant), 2 * fitting <= len(rivals),
                                -len(files), len(variant), REGISTERED_WORDS.isdisjoint(variant),
                                variant)
    return ranks


def _fits(path, role, roles, grids):
    """True if a file lies on the grid of a file of another contrast of its subject."""
    others = []
    for other, paths in roles.items():
        if other != role and other in CONTRASTS:
            others += paths
    for one in [path, *others]:
        if one not in grids:
            grids[one] = grid_of(one)
    if grids[path] is None:
        return False
    shape, affine = grids[path]
    for other in others:
        if grids[other] and grids[other][0][:3] == shape[:3]:
            if np.allclose(grids[other][1], affine, atol=0.01):         # mm
                return True
    return False


def _sentence(role, ranked, name):
    """What was chosen for the subject `name`. ranked: (rank, length, path) tuples."""
    own = re.escape(name.split("/")[0])
    names = [re.sub(rf"^{own}(?=[-_. ])", "*", path.name) for _, _, path in ranked]
    return f"{names[0]} is used as {role}, not {', '.join(names[1:])}"


def take_tracer_as_pet(subjects, wanted, notes):
    """Let the PET of a tracer be "pet", if that is wanted and all PET is of one tracer.

    wanted: Names of contrasts, or None. notes: A list that gets a sentence.
    """
    wanted = {canonical_contrast(name) for name in wanted or ()}
    there = set()
    for subject in subjects:
        there.update(subject.files)
    tracers = there & TRACERS.keys()
    if "pet" not in wanted or "pet" in there or len(tracers) != 1 or tracers & wanted:
        return
    tracer = tracers.pop()
    for subject in subjects:
        for of_contrast in (subject.files, subject.records, subject.frames):
            if tracer in of_contrast:
                of_contrast["pet"] = of_contrast.pop(tracer)
    notes.append(f"pet: {tracer} is used, the only PET there is; as pet it must be in SUV, and as "
                 f"{tracer} it may have any unit")
