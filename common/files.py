"""The files of a run are written whole or not at all, locked, and read with suspicion.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

The lock keeps a second process away.  RunError is the error of everything in `common` that a user
can mend.
"""
import errno
import os
import shutil
import socket

import torch

FORMAT = 1                  # of a checkpoint; a reader refuses a format that it does not know


class RunError(Exception):
    """Something that the user can mend.

    message   one line, which says what is wrong, where, why, and what to do
    status    the exit status of the process; it is 2 for wrong usage
    """

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def replace(path, write, keep=None):
    """Write a file so that it is never half there.

    The file is written under a temporary name, forced to the disk, and then renamed.

    write: a function that writes to the path that it gets.  keep: a name under which the previous
    file stays.

    Raises RunError if there is no room or no permission.  The old file is then untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:        # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2 ** 20
        raise RunError(f"cannot write {path}: {str(error).splitlines()[0]} ({free:.0f} MB free); "
                       "the previous file is untouched; make room and run the same command "
                       "again") from error


def lock(folder):
    """Make the folder and hold an operating-system lock on folder/lock.

    The lock vanishes with the process, however that ends.  Some file systems of clusters have no
    locks.  There it is silently absent.

    Returns the open file.  Raises RunError if another process holds the lock, or if the folder
    cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / "lock", "a+", encoding="utf-8")
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


def read_checkpoint(path):
    """Return the content of a checkpoint, on the CPU.

    Loading cannot run code (weights_only).  Raises RunError if the file is damaged, is not a
    checkpoint of this project, or has another format.
    """
    try:
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
    return content


def restore(part, state, where):
    """Call part.load_state_dict(state), strictly.

    where: what is loaded from which file, for the message.

    Raises RunError if the state does not fit or holds values that are not finite.  The message is
    one line, where torch would print a page.
    """
    for value in state.values():
        if torch.is_tensor(value) and value.is_floating_point() and not torch.isfinite(value).all():
            raise RunError(f"{where} holds values that are not finite; "
                           "use last_prev.pt or train again")
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        first = " ".join(str(error).split())[:160]
        raise RunError(f"{where} does not fit this configuration ({first}); "
                       "use the flags it was trained with") from error
