"""What a data set is: names, contrasts, size and the content of the files, never paths or times.

A folder that was copied to another machine is the same data set. A folder in which one voxel was
changed is another one.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

from data.files import (
    DataError,
    Progress,
    json_text,
    read_json,
    remove_unfinished,
    write_atomically,
)
from data.intensities import BRAIN_WINDOW, CT_WINDOW, ENHANCEMENT, NOT_SCANNED, PET_WINDOW
from data.layouts.words import BODY_CONTRASTS, TEXT
from data.metaimage import files_of
from data.opening import in_plain_words

VERSION = 7             # raise it when load_subject returns other pixels, or when the files change
BLOCK = 1 << 20         # bytes that are read at a time
ANNOUNCED = 1 << 28     # bytes; the user is told before so much or more is read


class Memory:
    """What we found out about files at an earlier start, as {path: [stamps, text]} in a JSON file.

    Large files are then not read again at every start. The stamps are the size in bytes and the
    times of the last change of content and of file (mtime and ctime, in nanoseconds). If one of
    them differs, the file counts as unknown.
    We accept one risk. A file whose content was changed while size and both times stayed equal is
    not noticed. On Linux no ordinary program can do that, because every change sets ctime.
    A memory that is missing or damaged is empty. Nothing but time is lost.
    """

    def __init__(self, path):
        self.path = path
        self.known = {}
        self.changed = False
        try:
            known = read_json(path, {})
            self.known = {name: (list(stamps), str(text))
                          for name, (stamps, text) in known.items()}
        except (DataError, ValueError, TypeError):
            pass

    def recall(self, path):
        """The text that was remembered of a file, or None if it is unknown. OSError as stat."""
        stamps, text = self.known.get(str(path.resolve()), (None, None))
        return text if stamps == stamps_of(path) else None

    def remember(self, path, stamps, text):
        """Remember a text of a file. stamps: stamps_of(path), taken before the file was read."""
        self.known[str(path.resolve())] = (stamps, text)
        self.changed = True

    def save(self):
        """Write the memory, if it has changed.

        If two processes do this at once, the last one wins. The other one's files count as unknown.
        """
        if not self.changed:
            return
        remove_unfinished(self.path.parent)
        try:
            with write_atomically(self.path) as file:
                file.write(json_text(self.known).encode())
            self.changed = False
        except OSError:
            pass                        # the files are read again at the next start


def stamps_of(path):
    """Size in bytes, mtime and ctime in nanoseconds, as a list. OSError if there is no file.

    A MetaImage header is followed by the file of its voxels, which has three more numbers.
    """
    stamps = []
    for part in files_of(path):
        stat = part.stat()
        stamps += [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return stamps


def digests_of(paths, memory, workers, say):
    """Hash the whole content of files -> {path: 40 hexadecimal digits}.

    The hash of a MetaImage header covers the file of its voxels, too.
    memory: A Memory. A file that it knows is not read.
    workers: The number of threads that read.
    say: A function that gets lines for the user, if there is much to read.
    DataError if a file cannot be read.
    """
    digests = {}
    unknown = []
    to_read = 0                         # bytes
    for path in dict.fromkeys(paths):                   # each path once, in order
        with in_plain_words(path):
            digests[path] = memory.recall(path)
            if digests[path] is None:
                unknown.append(path)
                to_read += sum(part.stat().st_size for part in files_of(path))
    if to_read >= ANNOUNCED:
        say(f"  reading {len(unknown)} files ({size_text(to_read)}) to recognise them; "
            "files that stay unchanged are not read again")
    progress = Progress(len(unknown), "files read", say, last=False)

    def digest(path):
        with in_plain_words(path):
            stamps = stamps_of(path)
            return stamps, _digest_of(path)

    try:
        with ThreadPoolExecutor(workers) as pool:
            for path, (stamps, found) in zip(unknown, pool.map(digest, unknown)):
                digests[path] = found
                memory.remember(path, stamps, found)
                progress.step()
    finally:
        memory.save()
    return digests


def _digest_of(path):
    digest = hashlib.blake2b(digest_size=20)
    for part in files_of(path):
        with open(part, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def subject_key(subject, digests, contrasts, size):
    """A hash of all that the decoded slices of one subject depend on, 20 hexadecimal digits.

    digests: {path: digest of the file}, see digests_of.
    """
    files = {}
    for contrast in contrasts:
        if contrast == TEXT:
            continue
        paths = subject.files.get(contrast, ())
        paths = paths if isinstance(paths, tuple) else (paths,)
        files[contrast] = [digests[path] for path in paths]
    about = {"version": VERSION, "name": subject.name, "contrasts": list(contrasts), "size": size,
             "files": files, "segmentation": digests.get(subject.segmentation),
             "echoes": subject.echoes, "grid": subject.grid}
    if TEXT in contrasts:
        # The words count, not their file, which may hold the reports of all subjects.
        about["report"] = subject.report
    if "ct" in contrasts:
        about["window"] = [CT_WINDOW, BRAIN_WINDOW, NOT_SCANNED]
    if not BODY_CONTRASTS.isdisjoint(contrasts):
        about["body"] = [CT_WINDOW, PET_WINDOW, ENHANCEMENT]
    if "pet" in contrasts:
        about["suv_factor"] = subject.suv_factor
    frames = {contrast: subject.frames[contrast] for contrast in contrasts
              if contrast in subject.frames}
    if frames:
        about["frames"] = frames
    if subject.channels:
        about["channels"] = subject.channels
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]


def files_of_subjects(subjects, digests):
    """{name of a subject: digests of the files with its images, as a list}.

    They tell whether two data sets share a subject, whatever it is called. Masks do not count,
    because empty masks are equal. digests: {path: digest of the file}, see digests_of.
    """
    found = {}
    for subject in subjects:
        images = [path for path in subject.paths if path != subject.segmentation]
        found[subject.name] = [digests[path] for path in images if path in digests]
    return found


def fingerprint_of(keys):
    """A hash of the data set, 20 hexadecimal digits. keys: Of its subjects, see subject_key."""
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:20]


def size_text(count):
    """A number of bytes for the user, such as 47 MB or 58.8 GB."""
    if count < 1e6:
        return f"{max(1, round(count / 1e3))} kB"
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
