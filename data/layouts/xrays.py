"""What the readers of X-rays share: their tables, their pictures, and their official splits."""

from data.files import DataError, is_picture
from data.layouts.words import few, read_sheet

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
    """Read a published table, .csv or .csv.gz -> an iterator of rows, {title: text}.

    Spaces around titles and cells are removed.

    needed: Titles of columns.
    DataError if the file cannot be read, or if a column is missing.
    """
    rows, _ = read_sheet(path)
    titles = [title.strip() for title in rows.fieldnames or ()]
    for title in needed:
        if title not in titles:
            raise DataError(f"{path}: has no column {title}, only {few(titles)}; "
                            "download the table again")
    for row in rows:
        yield dict(zip(titles, [row[title].strip() for title in rows.fieldnames]))


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
        notes.append(f"{len(without)} subjects are in no part of the split and not used: "
                     f"{few(without)}")
    return split
