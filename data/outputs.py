"""What there is to synthesise, and where the results go.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.
"""
import itertools
import json
from pathlib import Path

from data.files import DataError, is_picture, write_atomically
from data.layouts.words import TEXT, few
from data.subject import load_subject, reference_first

SOURCES = "sources.json"        # beside the outputs of a subject: digests of the subject's files


def to_synthesize(subjects, contrasts, asked, size, folder, say, picture=None, tags=None,
                  files=None, makes=None):
    """Yield what there is to synthesise, subject by subject.

    Each item is (subject, sources, absent, SubjectSlices of the sources, {absent: output path}).
    A contrast is absent if the subject has no file of it, or if `asked` names it. A subject is left
    out if it lacks nothing or has no source. It is also left out, and this is said, if all its
    outputs exist already in folder/<subject>. If that folder holds outputs of other files, of
    another subject with this name, the outputs go to folder/<subject>-2, and so on.
    An output is a NIfTI file on the grid of the sources. An X-ray, and every image of a subject
    without a NIfTI source, is a picture (.png). A report is a .txt file.
    say: A function that gets every line for the user.
    picture: A Picture for subjects without PET, see load_subject.
    tags: {contrast: what its file is called beyond the usual}.
    files: {subject: digests of its files}, see Dataset.files; by default no subject is another one.
    makes: A function from sources to the contrasts that can be made of them; by default all can.
    A subject that cannot be read is left out, and the others are done.
    DataError at the end if a subject could not be read.
    """
    made = 0
    failed = []
    said_pictures = False
    for subject in subjects:
        absent = [c for c in contrasts if c not in subject.files or c in asked]
        sources = [c for c in contrasts if c not in absent]
        if not absent or not sources:
            continue
        if makes:
            possible = makes(sources)
            absent = [c for c in absent if c in possible]
        if not absent:
            say(f"{subject.name}: nothing can be made from {', '.join(sources)}")
            continue
        made += 1
        digests = None if files is None else json.dumps(files[subject.name])
        home = _home_of(Path(folder), subject.name, digests, say)
        paths = _paths_of(subject, sources, absent, home, tags or {})
        try:
            done = all(path.exists() for path in paths.values())
            slices = None if done else load_subject(subject, contrasts, size, sources, picture)
        except DataError as error:
            say(f"{subject.name} is left out: {error}")
            failed.append(subject.name)
            continue
        if done:
            say(f"{subject.name}: {', '.join(absent)} is already in {home}; "
                "delete it to make it again")
            continue
        pictures = [c for c in absent if is_picture(paths[c]) and c != "xray"]
        if pictures and not said_pictures:
            said_pictures = True
            say("subjects without a NIfTI source have no grid in space: their images are written "
                "as PNG in normalised units, 0 to 1 as 0 to 255")
        if digests:
            with write_atomically(home / SOURCES) as file:
                file.write(digests.encode())
        yield subject, sources, absent, slices, paths
    if failed:
        raise DataError(f"{len(failed)} of {made} subjects could not be synthesised "
                        f"({few(failed)}), the others are done; mend them, and the same command "
                        "makes what is missing")
    if subjects and not made:
        say("nothing to synthesise: every subject has every contrast; "
            "name one to be made although it exists")


def _home_of(folder, name, digests, say):
    """The folder for the outputs of a subject, in which there are none of other files."""
    for number in itertools.count(1):
        home = folder / (name if number == 1 else f"{name}-{number}")
        note = home / SOURCES
        if digests is None or not note.exists() or note.read_text(encoding="utf-8") == digests:
            return home
        say(f"{name}: {home} holds what was made from other files of this name, and stays")


def _paths_of(subject, sources, absent, home, tags):
    """The files of the synthetic contrasts -> {contrast: path}, see to_synthesize."""
    name = Path(subject.name).name                      # a name may be a path, such as siteA/001
    volumes = subject.in_slices or reference_first(subject, sources)
    paths = {}
    for contrast in absent:
        ending = ".nii.gz" if volumes and contrast != "xray" else ".png"
        ending = ".txt" if contrast == TEXT else ending
        paths[contrast] = home / f"{name}_{contrast}{tags.get(contrast, '')}_synthetic{ending}"
    return paths
