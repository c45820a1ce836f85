"""What every room of this package needs of files.

DataError is raised for data that cannot be used, write_atomically writes a file as a whole, and
Progress tells the user how far a long work is. json_text and read_json are for the files of facts
that we write ourselves.
"""

import datetime
import json
import os
import re
import secrets
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:             # Windows removes no file that a process still writes
    fcntl = None

PACKED = b"\x1f\x8b"    # the first bytes of what gzip has compressed
FORGOTTEN = 3600        # seconds; an unfinished file of this age belongs to no running process


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
def write_atomically(path, keep=None):
    """Open a new binary file for writing; missing folders above it are made.

    The bytes go to a temporary name in the same folder. It contains a random number, so that two
    processes, which may run on two machines, never write to the same temporary file. When the
    `with` block ends, the file gets its own name by os.replace. A reader therefore sees the old
    file or the whole new file, never a part. If the block raises an error, the temporary file is
    removed and the old file stays.
    keep: A name under which the old file stays beside the new one, or None.
    OSError if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name itself may be as long as names can be.
    temporary = path.with_name(f"{path.name[:40]}.tmp-{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            _try_lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()            # Windows gives no new name to an open file
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder, locked=False):
    """Remove what killed processes have left of write_atomically in a folder.

    A running process holds a lock on the file that it writes, and the lock ends with the process.
    Some file systems have no locks, and an empty file may not be locked yet. There the age decides.
    locked: True if no other process can be at work in this folder.
    """
    for path in folder.glob("*.tmp-*"):
        if not re.search(r"\.tmp-[0-9a-f]{8}$", path.name):
            continue                    # this file is not ours
        try:
            facts = path.stat()
            dead = locked or time.time() - facts.st_mtime > FORGOTTEN
            if not dead and facts.st_size > 0:
                with open(path, "rb") as file:
                    dead = _try_lock(file)
            if dead:
                path.unlink()
        except OSError:
            pass                        # another process has removed or renamed it


def _try_lock(file):
    """Lock an open file until it is closed. False if another process has locked it, or no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, AttributeError):
        return False
    return True


def json_text(content):
    """A dict as JSON with a checksum, which read_json compares."""
    content = json.loads(json.dumps(content))               # keys are now text, tuples are lists
    return json.dumps({**content, "crc32": _crc_of(content)}, indent=1)


def read_json(path, kinds):
    """Read a JSON file that holds a json_text -> the dict.

    A file without checksum is accepted, because it may come from elsewhere.
    kinds: {key: type} of what must be there.
    DataError if the file is missing, damaged or not like that.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        fault = _fault_of(content, kinds)
    except OSError as error:
        fault = f"cannot be read ({error.strerror or error})"
    except (ValueError, RecursionError) as error:
        fault = f"is no JSON, so it is damaged ({str(error).splitlines()[0]})"
    if fault:
        raise DataError(f"{path}: {fault}; restore or delete it")
    return content


def _fault_of(content, kinds):
    """What is wrong with the content of a JSON file, in a few words; None if nothing is."""
    if not isinstance(content, dict):
        return f"holds a {type(content).__name__} where facts with names are needed"
    crc = content.pop("crc32", None)
    if crc is not None and crc != _crc_of(content):
        return ("was damaged or edited, its checksum differs (if it was edited, remove the entry "
                "crc32)")
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            return f"lacks {key}, or it is not of the type {kind.__name__}"
    return None


def _crc_of(content):
    """The checksum of facts, as text. It does not depend on their order or on white space."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


class Progress:
    """Says how far a long work is, at most every 10 seconds, and at the end if `last` is True."""

    def __init__(self, total, doing, say, last=True):
        """total: The number of pieces. doing: Words such as "subjects decoded". say: as print."""
        self.total = total
        self.last = last
        self.doing = doing
        self.say = say
        self.done = 0
        self.start = time.monotonic()
        self.last_said = self.start

    def step(self):
        """One more piece is done. The rest is expected to take as long for each piece."""
        self.done += 1
        now = time.monotonic()
        ends = self.last and self.done == self.total
        if now - self.last_said < 10 and not ends:
            return
        self.last_said = now
        left = (now - self.start) / self.done * (self.total - self.done)
        clock = datetime.timedelta(seconds=round(left))
        self.say(f"  {self.doing} {self.done}/{self.total}  ETA {clock}")
