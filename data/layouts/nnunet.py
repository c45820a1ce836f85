"""nnU-Net and the Medical Segmentation Decathlon: dataset.json says which number is which contrast.

    dataset.json                        {"channel_names": {"0": "T1", "1": "FLAIR"}, ...}
    imagesTr/BRATS_001_0000.nii.gz      nnU-Net: the T1; FLAIR is in BRATS_001_0001.nii.gz
    imagesTr/BRATS_001.nii.gz           Decathlon: a 4-D file, whose volumes are T1 and FLAIR
    labelsTr/BRATS_001.nii.gz           the mask

Older sets write "modality" in place of "channel_names". imagesTs and labelsTs are read, too.
"""

import json
import math
import re

from data.files import DataError
from data.layouts.people import tell_persons
from data.layouts.words import CONTRASTS, Subject, few, role_of
from data.nifti import decode_header, volumes_of

IMAGES = re.compile(r"images(?:Tr|Ts|Val)", re.IGNORECASE)
LABELS = re.compile(r"labels(?:Tr|Ts|Val)", re.IGNORECASE)
NAME = re.compile(r"(.+?)(?:_(\d{4}))?\.nii(?:\.gz)?", re.IGNORECASE)


def is_nnunet(images):
    """True if NIfTI files lie in imagesTr or imagesTs and have a dataset.json, or numbers."""
    for path in images:
        if IMAGES.fullmatch(path.parent.name):
            numbered = NAME.fullmatch(path.name)[2]
            if numbered or (path.parent.parent / "dataset.json").is_file():
                return True
    return False


def collect_nnunet(folder, images, notes):
    """Read the file names of nnU-Net and of the Decathlon -> (subjects sorted by name, ignored).

    DataError if the folder holds several data sets, if dataset.json cannot be read or names a
    channel by no contrast, or if a file has other channels than those.
    """
    roots = {path.parent.parent for path in images if IMAGES.fullmatch(path.parent.name)}
    if len(roots) > 1:
        names = few(sorted(str(root) for root in roots))
        raise DataError(f"{folder}: holds {len(roots)} data sets of nnU-Net, {names}; "
                        "give one of them as the data folder")
    root = roots.pop()
    channels = _read_channels(root / "dataset.json", notes)
    subjects = {}
    labels = {}
    ignored = []
    for path in images:
        case, number = NAME.fullmatch(path.name).groups()
        if path.parent.parent == root and LABELS.fullmatch(path.parent.name):
            labels[case] = path
        elif path.parent.parent == root and IMAGES.fullmatch(path.parent.name):
            if case not in subjects:
                subjects[case] = Subject(case, case, {})
            _add_file(subjects[case], path, number, channels, root)
        else:
            ignored.append(path)
    for case, path in labels.items():
        if case in subjects:
            subjects[case].segmentation = path
        else:
            ignored.append(path)
    tell_persons(subjects.values(), notes)
    return [subjects[case] for case in sorted(subjects)], sorted(ignored)


def _read_channels(sheet, notes):
    """Read dataset.json -> {number of a channel: contrast}.

    A channel whose contrast an earlier one has is left out, with a note.
    DataError if the file is missing or no such JSON, or if a name means no contrast.
    """
    try:
        content = json.loads(sheet.read_text(encoding="utf-8-sig"))
        names = content.get("channel_names") or content["modality"]
        names = {int(number): str(name) for number, name in names.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise DataError(f"{sheet}: is missing or does not say what the channels _0000, _0001 and "
                        'so on are; write {"channel_names": {"0": "T1", "1": "FLAIR"}}') from None
    channels = {}
    for number, name in sorted(names.items()):
        contrast = role_of(name, "")
        if contrast not in CONTRASTS:
            raise DataError(f"{sheet}: calls channel {number} {name!r}, which is no contrast; "
                            f"write one of {', '.join(CONTRASTS)}")
        if contrast in channels.values():
            notes.append(f"dataset.json: channel {number} is {contrast} again and is not used")
        channels[number] = None if contrast in channels.values() else contrast
    return channels


def _add_file(subject, path, number, channels, root):
    """Add the contrast of one file, or those of a 4-D file, to its subject.

    number: The text behind the name of the case, such as 0001, or None.
    """
    if number is None and len(channels) > 1:
        count = volumes_of(decode_header(path, math.inf, series=True)[0].get_data_shape())
        if count != len(channels):
            raise DataError(f"{path}: holds {count} volumes, and dataset.json names "
                            f"{len(channels)} channels; correct dataset.json or split the file")
        found = channels
    else:
        only = min(channels)
        number = only if number is None else int(number)
        if number not in channels:
            raise DataError(f"{path}: is channel {number}, which {root / 'dataset.json'} does not "
                            "name; add it there")
        found = {number: channels[number]}
    for number, contrast in found.items():
        if contrast is None:
            continue
        subject.add(contrast, path)
        if len(found) > 1:
            subject.channels[contrast] = number
