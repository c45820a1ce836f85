"""What the readers of X-rays share: their tables, their pictures, and their official splits."""

import csv
import gzip
import zlib

from data.files import DataError, is_picture
from data.layouts.words import few

DICOM_ENDINGS = (".dcm", ".dicom")


def pictures_by_name(folder, files, notes):
    """Find the pictures among the files -> {name of the file without ending: path}.

    notes: A list that gets sentences for the user. Of two pictures with one name, which may be two
        sizes of one X-ray, the first is used.
    DataError if there is no picture.
    """
    pictures = {}
    again = []
    for path in files:
        if is_picture(path) and pictures.setdefault(path.stem, path) != path:
            again.append(path.name)
    if not pictures:
        if any(path.suffix.lower() in DICOM_ENDINGS for path in files):
            raise DataError(f"{folder}: holds DICOM files and no pictures; convert them to PNG, "
                            "and keep their names")
        raise DataError(f"{folder}: holds no .png or .jpg files beside its tables; "
                        "put the pictures there")
    if again:
        notes.append(f"{len(again)} pictures have the name of another one and are not used: "
                     f"{few(again)}")
    return pictures


def read_table(path, needed):
    """Read a table with commas, .csv or .csv.gz -> an iterator of rows, {title: text}.

    Spaces around titles and cells are removed.

    needed: Titles of columns.
    DataError if the file cannot be read, or if a column is missing.
    """
    open_text = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = csv.reader(file)
            titles = [title.strip() for title in next(rows, [])]
            for title in needed:
                if title not in titles:
                    raise DataError(f"{path}: has no column {title}, only {few(titles)}; "
                                    "download the table again")
            for cells in rows:
                if cells:               # an empty line has none
                    cells += [""] * (len(titles) - len(cells))
                    yield dict(zip(titles, [cell.strip() for cell in cells]))
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table ({error}); download it again") from None


def official_split(subjects, part_of, notes):
    """The split that a data set comes with -> {"train": [names], "val": ..., "test": ...}, or None.

    It is None, and a note says so, if nothing is left for training or for the test. That happens if
    only a part of the data set was downloaded.

    part_of: {name of a subject: part}. A subject without a part is in no list.
    """
    split = {"train": [], "val": [], "test": []}
    without = []
    for subject in subjects:
        if subject.name in part_of:
            split[part_of[subject.name]].append(subject.name)
        else:
            without.append(subject.name)
    if not split["train"] or not split["test"]:
        notes.append(f"the official split has {len(split['train'])} of the subjects here for "
                     f"training and {len(split['test'])} for the test; it is not used")
        return None
    if without:
        notes.append(f"{len(without)} subjects are not in the official split and not used: "
                     f"{few(without)}")
    return split
