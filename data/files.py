"""What every room of this package needs of files.

DataError is raised for data that cannot be used, and write_atomically writes a file as a whole.
"""

import os
import re
from contextlib import contextmanager
from pathlib import Path


class DataError(Exception):
    """The user's data or request cannot be used.

    The message is one line. It says what is wrong, where, why, and what the user can do.
    `status` is the exit status that a script should end with. It is 1 if the data are wrong, and 2
    if the command line is wrong.
    """

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def is_nifti(path):
    """True if the name ends in .nii or .nii.gz, in lower or upper case."""
    return re.search(r"\.nii(\.gz)?$", Path(path).name, re.IGNORECASE) is not None


@contextmanager
def write_atomically(path):
    """Open a new binary file for writing; missing folders above it are made.

    The bytes go to a temporary name in the same folder. When the `with` block ends, the file gets
    its own name by os.replace. A reader therefore sees the old file or the whole new file, never a
    part. If the block raises an error, the temporary file is removed and the old file stays.
    OSError if the file cannot be written.
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
