"""What every room of this package needs of files: the error for one that cannot be used, and how to write one whole."""

import os
import re
from contextlib import contextmanager
from pathlib import Path


class DataError(Exception):
    """The user's data or request cannot be used; the message is one line: what, where, why, what to do.

    status: exit status that a script should end with, 2 where the command line is wrong, not the data.
    """

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def is_nifti(path):
    """True for .nii and .nii.gz in any case."""
    return re.search(r"\.nii(\.gz)?$", Path(path).name, re.IGNORECASE) is not None


@contextmanager
def write_atomically(path):
    """Open a new binary file for writing. It appears under its name when the block ends, complete or not at all.

    The bytes go to a temporary name in the same folder, then os.replace: readers see the old file or the whole new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
