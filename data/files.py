"""What every room of this package needs of files.

DataError is raised for data that cannot be used, write_atomically writes a file as a whole, and
Progress tells the user how far a long work is.
"""

import os
import re
import secrets
import time
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


def is_picture(path):
    """True if the name ends in .png, .jpg or .jpeg, in lower or upper case."""
    return re.search(r"\.(png|jpe?g)$", Path(path).name, re.IGNORECASE) is not None


@contextmanager
def write_atomically(path):
    """Open a new binary file for writing; missing folders above it are made.

    The bytes go to a temporary name in the same folder. It contains a random number, so that two
    processes, which may run on two machines, never write to the same temporary file. When the
    `with` block ends, the file gets its own name by os.replace. A reader therefore sees the old
    file or the whole new file, never a part. If the block raises an error, the temporary file is
    removed and the old file stays.
    OSError if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Progress:
    """Says how far a long work is, at most every 10 seconds."""

    def __init__(self, total, doing, say):
        """total: The number of pieces. doing: Words such as "subjects decoded". say: as print."""
        self.total = total
        self.doing = doing
        self.say = say
        self.done = 0
        self.start = time.monotonic()
        self.last_said = self.start

    def step(self):
        """One more piece is done. The rest is expected to take as long for each piece."""
        self.done += 1
        now = time.monotonic()
        if now - self.last_said < 10 or self.done == self.total:
            return
        self.last_said = now
        left = (now - self.start) / self.done * (self.total - self.done)
        self.say(f"  {self.done} of {self.total} {self.doing}, about {_time_text(left)} left")


def _time_text(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
