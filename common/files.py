"""The files of a run are written whole or not at all, locked, and read with suspicion.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

The lock keeps a second process away.  RunError is the error of everything in `common` that a user
can mend.
"""
import errno
import os
import shutil
import socket
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from data.files import DataError, write_atomically

FORMAT = 1                  # of a checkpoint; a reader refuses a format that it does not know
# What a checkpoint and each of its stages must hold.
CHECKPOINT = {"script": str, "config": dict, "seed": int, "about": dict, "stages": dict}
STAGE = {"step": int, "total": int, "finished": bool, "parts": dict}


class RunError(Exception):
    """Something that the user can mend.

    message   one line, which says what is wrong, where, why, and what to do
    status    the exit status of the process; it is 2 for wrong usage
    """

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def sentence_of(error):
    """Return an error as one line for the user, or None if it is a fault of this program."""
    if isinstance(error, (RunError, DataError)):
        return str(error)
    if (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or "can't allocate memory" in str(error)):
        return ("out of memory; in this order: --micro-batch or a smaller --sample-batch, "
                "--precision bf16, a smaller --size or network")
    if isinstance(error, OSError):
        # Such errors are a log line on a full disk, or a picture in a read-only folder.
        return (f"{error}; mend it and run the same command again "
                "(--debug shows where it happened)")
    return None


def tell(error):
    """Print an error as one line.  Returns the exit status of the program."""
    text = sentence_of(error)
    if text is None:
        first = (str(error).splitlines() or [""])[0]
        place = getattr(error, "written", None)
        seen = f"{place} holds the traceback" if place else "--debug shows the traceback"
        text = (f"this is a fault of the program ({type(error).__name__}: {first}); {seen}, "
                "please report it with the command")
    print(f"error: {text}", file=sys.stderr)
    return getattr(error, "status", 1)


def replace(path, write, keep=None):
    """Write a file so that it is never half there.

    The file is written under a temporary name, forced to the disk, and then renamed.

    write: a function that writes to the path that it gets.  keep: a name under which the previous
    file stays.

    Raises RunError if there is no room or no permission.  The old file is then untouched.
    """
    try:
        with write_atomically(path, keep) as file:
            write(Path(file.name))
    except (OSError, RuntimeError) as error:        # torch.save reports a full disk as RuntimeError
        why = getattr(error, "strerror", None) or "the disk may be full"
        free = shutil.disk_usage(path.parent).free / 2 ** 20
        raise RunError(f"cannot write {path}: {why} ({free:.0f} MB free); the previous file is "
                       "untouched; make room and run the same command again") from error


def append(path, text):
    """Write text at the end of a file.  Raises RunError if there is no room or no permission."""
    try:
        with open(path, "a", encoding="utf-8", errors="replace") as f:
            f.write(text)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; make room and run the same "
                       "command again") from error


def lock(folder, name="lock"):
    """Make the folder and hold an operating-system lock on the file `name` in it.

    The lock vanishes with the process, however that ends.  Some file systems of clusters have no
    locks.  There it is silently absent.

    Returns the open file.  Raises RunError if another process holds the lock, or if the folder
    cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / name, "a+", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write into the run folder {folder}: {error.strerror}; "
                       "choose another --out") from error
    try:
        if os.name == "nt":
            import msvcrt
            # Windows forbids others to read what is locked.  The lock therefore lies behind the
            # holder's name.
            os.lseek(handle.fileno(), 2 ** 30, os.SEEK_SET)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            handle.close()
            raise RunError(f"{folder} is in use by {holder}; wait for it to end, "
                           "or choose another --out") from None
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}")
    handle.flush()
    return handle


def crc_of(path):
    """Return the CRC-32 of a file as text.  Raises RunError if it cannot be read."""
    try:
        return f"{zlib.crc32(Path(path).read_bytes()):08x}"
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); name another file") from error


def checkpoints(folder):
    """Return the checkpoints that a run folder holds, as paths, the newest first."""
    return [folder / name for name in ("last.pt", "last_prev.pt") if (folder / name).exists()]


def verify(path):
    """Raises an error of any kind if a zip file does not hold what its checksums say.

    torch.save and numpy.savez write zip files.  Their own readers do not compare the checksums.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"the checksum of {damaged} differs")


def read_arrays(path):
    """Return {name: array} of an .npz file.  Raises RunError if it is damaged or missing."""
    try:
        verify(path)
        with np.load(path) as arrays:
            return dict(arrays)
    except Exception as error:
        # zipfile and numpy raise many kinds of errors.  Each means that the file is damaged.
        raise RunError(f"{path} is damaged or no .npz file ({type(error).__name__}: {error}); "
                       "delete it and make it again") from error


def read_checkpoint(path):
    """Return the content of a checkpoint, on the CPU.

    Loading cannot run code (weights_only).  Raises RunError if the file is damaged, is not a
    checkpoint of this project, has another format, or holds values that are not finite.
    """
    try:
        verify(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises many kinds of errors.  Each means that the file is not ours, or damaged.
        raise RunError(f"{path} is damaged or not a checkpoint of this project "
                       f"({type(error).__name__}); restore or delete it") from error
    if not isinstance(content, dict) or "stages" not in content:
        raise RunError(f"{path} is not a checkpoint of this project "
                       f"(it holds {type(content).__name__}); choose another --out")
    if content.get("format") != FORMAT:
        raise RunError(f"{path} has checkpoint format {content.get('format')}, "
                       f"this version reads {FORMAT}; train again or use the version that wrote it")
    if not fits(content, CHECKPOINT) or not all(fits(stage, STAGE)
                                                for stage in content["stages"].values()):
        raise RunError(f"{path} is not a checkpoint of this project (entries are missing or of "
                       "another type); restore or delete it")
    for stage, saved in content["stages"].items():
        for name, state in saved["parts"].items():
            if not all_finite(state):
                raise RunError(f"{stage}/{name} in {path} holds values that are not finite; "
                               "use last_prev.pt or train again")
    return content


def read_newest(folder):
    """Read last.pt of a run folder, or last_prev.pt if that is damaged or missing.

    Returns (content, None or the RunError of last.pt).  Raises RunError if none can be read.
    """
    fault = None
    for path in checkpoints(folder):
        try:
            return read_checkpoint(path), fault
        except RunError as error:
            fault = fault or error
    raise fault


def fits(content, kinds):
    """Return True if content is a dict with entries of these kinds, {key: type}."""
    return isinstance(content, dict) and all(isinstance(content.get(key), kind)
                                             for key, kind in kinds.items())


def all_finite(state):
    """Return True if all tensors in nested dicts and lists are finite."""
    if torch.is_tensor(state):
        return bool(torch.isfinite(state).all())
    if isinstance(state, dict):
        state = list(state.values())
    return not isinstance(state, (list, tuple)) or all(all_finite(part) for part in state)


def restore(part, state, where):
    """Call part.load_state_dict(state), strictly.

    where: what is loaded from which file, for the message.

    Raises RunError if the state does not fit.  The message is one line, where torch would print a
    page.
    """
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = " ".join(str(error).split())[:160]
        raise RunError(f"{where} does not fit this configuration ({first}); "
                       "use the flags it was trained with") from error
