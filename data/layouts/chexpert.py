"""Three sets of X-rays of the chest with labels and no reports, on which features are judged.

CheXpert (stanfordmlgroup.github.io/competitions/chexpert):

    CheXpert-v1.0-small/train.csv  valid.csv
                        train/patient00001/study1/view1_frontal.jpg

SIIM (kaggle.com/c/siim-acr-pneumothorax-segmentation), pictures with the names of the DICOM files:

    train-rle.csv                       ImageId, EncodedPixels: masks of a pneumothorax

RSNA (kaggle.com/c/rsna-pneumonia-detection-challenge), named in the same way:

    stage_2_train_labels.csv            patientId,x,y,width,height,Target: boxes of a pneumonia

SIIM and RSNA come as DICOM files. They must be converted to PNG, with all their pixels.
"""

import re

import numpy as np

from data.files import DataError, is_picture
from data.layouts.records import age_of, number_of, sex_of
from data.layouts.words import Subject
from data.layouts.xrays import official_split, pictures_by_name, read_table

CHEXPERT_FILE = re.compile(r"(?:^|/)((train|valid)/(patient\d+)/study\d+/view\d+_[a-z]+)\.\w+$")
CHEXPERT_PARTS = {"train": "train", "valid": "test"}
# The labels that are judged, and what "uncertain" counts as, as MGCA has it (Wang et al. 2022).
UNCERTAIN = {"Atelectasis": 1, "Cardiomegaly": 0, "Consolidation": 0, "Edema": 1,
             "Pleural Effusion": 1}
SIIM_TABLES = ("train-rle.csv", "stage_2_train.csv")
RSNA_TABLE = "stage_2_train_labels.csv"
BOX = ("x", "y", "width", "height")


# ---- CheXpert ------------------------------------------------------------------------------------

def is_chexpert(folder, files):
    """True if there is a picture such as train/patient00001/study1/view1_frontal.jpg."""
    named = [path for path in files if path.parent.name.startswith("study")]
    return any(is_picture(path) and CHEXPERT_FILE.search(path.as_posix()) for path in named)


def collect_chexpert(folder, files, notes):
    """Read CheXpert -> (subjects sorted by name, split).

    A subject is one picture. Its meta["labels"] is the list of those of the five labels in
    UNCERTAIN that it has. All views are used.

    split: {"train": [names], "val": [], "test": [names]}; see official_split. The pictures of
        valid.csv are the test, because the labels of the real test are not public.
    DataError if a table has other columns, or if a label is none of 1, 0, -1 and empty.
    """
    pictures = {}
    for path in files:
        place = CHEXPERT_FILE.search(path.as_posix())
        if place and is_picture(path):
            pictures[place[1]] = path
    subjects = []
    part_of = {}
    missing = 0
    for table in files:
        if table.name not in ("train.csv", "valid.csv"):
            continue
        for row in read_table(table, ("Path", *UNCERTAIN)):
            place = CHEXPERT_FILE.search(row["Path"])
            if place is None or place[1] not in pictures:
                missing += 1
                continue
            meta = {"body": "chest", "labels": _chexpert_labels(table, row)}
            age = age_of(row.get("Age"))
            sex = sex_of(row.get("Sex"))
            if age:                     # 0 stands for an unknown age
                meta["age"] = age
            if sex in ("M", "F"):       # one cell says Unknown
                meta["sex"] = sex
            name = place[1].split("/", 1)[1].replace("/", "_")
            part_of[name] = CHEXPERT_PARTS[place[2]]
            subjects.append(Subject(name, place[3], {"xray": pictures[place[1]]}, meta=meta))
    if missing:
        notes.append(f"{missing} rows of train.csv and valid.csv have no picture here")
    subjects.sort(key=lambda subject: subject.name)
    return subjects, official_split(subjects, part_of, notes)


def _chexpert_labels(table, row):
    """The labels of UNCERTAIN that a row has. An empty cell means that none was mentioned."""
    labels = []
    for label, uncertain in UNCERTAIN.items():
        values = {"1": 1, "0": 0, "-1": uncertain, "": 0}
        cell = row[label].removesuffix(".0")
        if cell not in values:
            raise DataError(f"{table}: {label} of {row['Path']} is {row[label]!r}; 1, 0, -1 or "
                            "nothing is needed, download the table again")
        if values[cell]:
            labels.append(label)
    return labels


# ---- SIIM ----------------------------------------------------------------------------------------

def is_siim(folder, files):
    """True if there is a table of the masks."""
    return any(path.name in SIIM_TABLES for path in files)


def collect_siim(folder, files, notes):
    """Read SIIM -> (subjects sorted by name, None). There is no official split.

    A subject is one picture. If it has a pneumothorax, meta["labels"] is ["Pneumothorax"] and
    meta["rle"] is the list of its masks; see rle_mask. Otherwise both lists are empty.

    DataError if the table has other columns, or if there is no picture.
    """
    table = next(path for path in files if path.name in SIIM_TABLES)
    masks = {}                          # name -> texts of its masks
    for row in read_table(table, ("ImageId", "EncodedPixels")):
        of_image = masks.setdefault(row["ImageId"], [])
        text = row["EncodedPixels"]
        if text not in ("-1", "") and text not in of_image:
            of_image.append(text)
    metas = {}
    for name, texts in masks.items():
        metas[name] = {"labels": ["Pneumothorax"] if texts else [], "rle": texts}
    return _labelled(folder, files, table, metas, notes), None


def rle_mask(text, height, width):
    """The mask that a text of SIIM describes, (height, width) bool.

    The text is pairs of numbers: so many pixels outside, then so many inside. The pixels are
    counted down the first column, then down the second column, and so on. "-1" is an empty mask.
    DataError if the text has other words, or more pixels than the picture.
    """
    flat = np.zeros(height * width, bool)
    words = text.split()
    if words in ([], ["-1"]):
        return flat.reshape(height, width)
    if len(words) % 2 or not all(word.isdecimal() for word in words):
        raise DataError(f"the mask {text[:40]!r} is no pairs of whole numbers; "
                        "download the table again")
    position = 0
    for outside, inside in zip(words[::2], words[1::2]):
        start = position + int(outside)
        position = start + int(inside)
        flat[start:position] = True
    if position > flat.size:
        raise DataError(f"the mask {text[:40]!r} needs {position} pixels, the picture has "
                        f"{height} x {width}; give the size of the original picture")
    return flat.reshape(width, height).T


# ---- RSNA ----------------------------------------------------------------------------------------

def is_rsna(folder, files):
    """True if the table of the boxes is there."""
    return any(path.name == RSNA_TABLE for path in files)


def collect_rsna(folder, files, notes):
    """Read RSNA -> (subjects sorted by name, None). There is no official split.

    A subject is one picture. If it has a pneumonia, meta["labels"] is ["Pneumonia"] and
    meta["boxes"] is the list of its boxes (x, y, width, height) in pixels of the original picture.
    (x, y) is the upper left corner. Otherwise both lists are empty.

    DataError if the table has other columns, if a box is not four numbers, or if there is no
    picture.
    """
    table = next(path for path in files if path.name == RSNA_TABLE)
    metas = {}
    for row in read_table(table, ("patientId", *BOX, "Target")):
        meta = metas.setdefault(row["patientId"], {"labels": [], "boxes": []})
        if row["Target"] != "1":
            continue
        box = tuple(number_of(row[side]) for side in BOX)
        if None in box:
            raise DataError(f"{table}: a box of {row['patientId']} lacks one of {', '.join(BOX)}; "
                            "download the table again")
        meta["labels"] = ["Pneumonia"]
        meta["boxes"].append(box)
    return _labelled(folder, files, table, metas, notes), None


def _labelled(folder, files, table, metas, notes):
    """Join pictures with their rows -> subjects sorted by name. metas: {name: Subject.meta}."""
    pictures = pictures_by_name(folder, files, notes)
    subjects = []
    for name in sorted(metas.keys() & pictures.keys()):
        meta = {"body": "chest", **metas[name]}
        subjects.append(Subject(name, name, {"xray": pictures[name]}, meta=meta))
    missing = len(metas) - len(subjects)
    if missing:
        notes.append(f"{missing} rows of {table.name} have no picture here")
    return subjects
