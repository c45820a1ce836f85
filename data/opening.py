"""Files of other programs are read inside of in_plain_words, because they can hold anything."""

import gzip
import os
import zlib
from contextlib import contextmanager
from pathlib import Path

from data.files import DataError


@contextmanager
def in_plain_words(path):
    """Turn all that is raised while the file `path` is read into a DataError that names it.

    No list of errors is long enough for damaged files, so every error is caught. Only a NameError
    is left, which must be a fault of this program. --debug shows what was raised first.
    """
    try:
        require_file(path)
        yield
    except (DataError, NameError):
        raise
    except FileNotFoundError as error:
        path = Path(error.filename or path)             # that of the voxels, for a MetaImage
        if path.is_symlink():
            raise DataError(f"{path}: is a link to {os.readlink(path)}, which does not exist; "
                            "repair it") from error
        raise DataError(f"{path}: no such file") from error
    except PermissionError as error:
        mode = path.stat().st_mode & 0o777
        raise DataError(f"{path}: no permission to read (mode {mode:o}); use chmod") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the compressed data end early or are damaged ({error}); "
                        "download the file again") from error
    except MemoryError as error:
        raise DataError(f"{path}: does not fit into the memory; crop or resample it") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); repair or remove it"
                        ) from error
    except Exception as error:
        text = " ".join(str(error).split())[:200]               # one line
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {text}); "
                        "write or convert it again") from error


def require_file(path):
    """DataError if `path` is a folder, a pipe or a device. To open a pipe could wait for ever."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is no ordinary file, but a folder, a pipe or a device; remove it")
