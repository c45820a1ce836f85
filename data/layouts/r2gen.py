"""R2Gen's packaging of X-rays and reports, on which the numbers of report generation are computed.

    annotation.json     {"train": [entry, ...], "val": [...], "test": [...]}
    images/...          PNG or JPEG

An entry is one study: {"id", "report", "image_path": [...]}, and the paths are seen from images/.
IU X-ray has two views of each study, MIMIC-CXR has one. Other keys are ignored.

As an extension, an entry may list other images of the same person, also NIfTI files. Their first
folder, or a word of the file name, says what they are: ct/0001.nii.gz is a CT. A picture whose path
names no contrast is an X-ray. An entry may have an empty report.
"""

import json
import re

from data.files import DataError, is_nifti, is_picture
from data.layouts.words import (
    CONTRASTS,
    TEXT,
    Subject,
    canonical_contrast,
    read_text,
    role_of,
)

FILE_NAME = "annotation.json"
PARTS = ("train", "val", "test")
MIMIC_PATH = re.compile(r"p\d\d/(p\d{8})/s\d+/")


def is_r2gen(folder, files):
    """True if annotation.json lies in the folder itself."""
    return folder / FILE_NAME in files


def collect_r2gen(folder, files, notes):
    """Read annotation.json -> (subjects sorted by name, split).

    split: {"train": [names], "val": [names], "test": [names]}.
    DataError if the file is no such JSON, if an entry has no id or no list of images, if an id is
    there twice, or if an entry has two volumes of one contrast.
    """
    path = folder / FILE_NAME
    lists = _read_lists(path)
    home = folder / "images" if (folder / "images").is_dir() else folder
    subjects = {}
    split = {}
    missing = []                        # paths of images that do not exist
    others = []                         # paths of images that cannot be used
    for part in PARTS:
        split[part] = []
        for number, entry in enumerate(lists.get(part, [])):
            subject = _subject_of(entry, f"{path}, entry {number} of {part}", home, missing, others)
            if subject.name in subjects:
                raise DataError(f"{path}, entry {number} of {part}: the id {subject.name} is there "
                                "twice; give every entry an id of its own")
            if subject.report:
                subject.files[TEXT] = path
            subjects[subject.name] = subject
            split[part].append(subject.name)
    if not subjects:
        raise DataError(f"{path}: has no entries in {', '.join(PARTS)}; download it again")
    if missing:
        notes.append(f"{len(missing)} images of {FILE_NAME} do not exist and are left out, "
                     f"e.g. {missing[0]}")
    if others:
        notes.append(f"{len(others)} images of {FILE_NAME} are neither a picture nor a NIfTI file "
                     f"with the name of a contrast, and are left out, e.g. {others[0]}")
    return [subjects[name] for name in sorted(subjects)], split


def _read_lists(path):
    """The content of the file. DataError unless it is a dict whose parts are lists."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: is no JSON ({error.msg}); "
                        "download it again or correct it") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: is no dict of {', '.join(PARTS)}; download it again")
    for part in PARTS:
        if not isinstance(content.get(part, []), list):
            raise DataError(f"{path}: {part} is no list; download it again")
    return content


def _subject_of(entry, where, home, missing, others):
    """The subject of one entry.

    where: Where the entry stands, for a message. home: The folder of the images.
    missing, others: Lists that get the paths of images that are left out.
    """
    name = entry.get("id") if isinstance(entry, dict) else None
    if name in (None, ""):
        raise DataError(f"{where}: has no id; every entry needs one")
    images = entry.get("image_path")
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list):
        raise DataError(f"{where} ({name}): has no list image_path; write the paths of its images")
    name = str(name).replace("/", "_")              # it becomes the name of a folder of results
    report = entry.get("report")
    subject = Subject(name, name, {}, report=report if isinstance(report, str) else None)
    found = {}                          # contrast -> paths
    for image in images:
        image = str(image).replace("\\", "/")
        path = home / image
        contrast = _contrast_of(image, name)
        if contrast is None:
            others.append(image)
        elif not path.is_file():
            missing.append(image)
        else:
            found.setdefault(contrast, []).append(path)
        patient = MIMIC_PATH.search(image)
        if patient:
            subject.person = patient[1]
    for contrast, paths in found.items():
        if len(paths) > 1 and not all(is_picture(path) for path in paths):
            raise DataError(f"{where} ({name}): has {len(paths)} files of {contrast}, and not all "
                            "are pictures; keep one volume")
        subject.files[contrast] = tuple(paths) if len(paths) > 1 else paths[0]
    return subject


def _contrast_of(image, name):
    """The contrast of an image by its path, or None if it cannot be used."""
    *folders, file = image.split("/")
    first = canonical_contrast(folders[0]) if folders else ""
    contrast = first if first in CONTRASTS else role_of(file, name)
    if is_nifti(file):
        return contrast if contrast in CONTRASTS else None
    if not is_picture(file):
        return None
    return contrast if contrast in CONTRASTS else "xray"
