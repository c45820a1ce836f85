"""The identity of a data set, and decoded slices on disk."""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data import cache, identity, load_subject
from data import files as files_module
from data.files import DataError, Progress
from data.identity import Memory, digests_of
from data.intensities import Scale
from data.stack import Stack
from data.volumes import fit
from scans import head, make_set, opened, save, scan

NAMES = [f"BraTS2021_{s:05d}" for s in range(4)]


def slice_files(tmp_path):
    return sorted((tmp_path / "cache" / "subjects").glob("*"))


@pytest.fixture
def decoded(monkeypatch):
    """The names of all subjects that are decoded from now on."""
    names = []

    def load(subject, contrasts, size):
        names.append(subject.name)
        return load_subject(subject, contrasts, size)
    monkeypatch.setattr(cache, "load_subject", load)
    return names


# ---- Identity --------------------------------------------------------------------------------------------------------

def test_copied_folder_is_the_same_data_set(tmp_path, decoded):
    folder = make_set(tmp_path / "set")
    first, _ = opened(folder)
    elsewhere = tmp_path / "other" / "machine"
    shutil.copytree(folder, elsewhere, copy_function=shutil.copyfile)
    for path in elsewhere.rglob("*.nii.gz"):
        os.utime(path, ns=(10**18, 10**18))
    copy, said = opened(elsewhere, cache=tmp_path / "cache")
    assert copy.fingerprint == first.fingerprint and sorted(decoded) == NAMES and "decoding" not in said
    fresh, _ = opened(elsewhere, cache=tmp_path / "another cache")
    assert fresh.fingerprint == first.fingerprint
    np.testing.assert_array_equal(np.array(fresh.images), np.array(first.images))


def test_one_changed_voxel_is_another_data_set(tmp_path, decoded):
    folder = make_set(tmp_path / "set")
    first, _ = opened(folder)
    array = head(seed=10)
    array[7, 9, 4] += 1
    save(folder / NAMES[1] / f"{NAMES[1]}_flair.nii.gz", array)
    decoded.clear()
    second, said = opened(folder)
    assert second.fingerprint != first.fingerprint and decoded == [NAMES[1]]
    assert "decoding 1 subjects" in said and "3 are there already" in said and "files that have changed since" in said
    changed = np.flatnonzero((np.array(first.images) != np.array(second.images)).any((2, 3)).any(1))
    assert set(second.subject[changed]) == {NAMES[1]}
    save(folder / NAMES[1] / f"{NAMES[1]}_flair.nii.gz", head(seed=10))
    again, said = opened(folder)
    assert again.fingerprint == first.fingerprint and "decoding" not in said


def test_name_and_settings_are_part_of_the_fingerprint(tmp_path):
    folder = make_set(tmp_path / "set")
    prints = [opened(folder)[0].fingerprint, opened(folder, contrasts=("t1",))[0].fingerprint,
              opened(folder, contrasts=("t1", "flair"))[0].fingerprint, opened(folder, size=24)[0].fingerprint]
    (folder / NAMES[3]).rename(folder / "someone")
    prints.append(opened(folder)[0].fingerprint)
    save(folder / "someone" / "someone_seg.nii.gz", np.zeros(head().shape, np.uint8))
    prints.append(opened(folder)[0].fingerprint)
    assert len(set(prints)) == 6


def test_window_of_ct_is_part_of_the_fingerprint(tmp_path, monkeypatch):
    for s in range(3):
        save(tmp_path / "set" / f"p{s}" / "T1.nii.gz", head(seed=s))
        save(tmp_path / "set" / f"p{s}" / "CT.nii.gz", scan(seed=s)[0])
    of = {contrasts: opened(tmp_path / "set", contrasts=contrasts)[0] for contrasts in (("t1",), ("t1", "ct"))}
    u = (scan(seed=0)[0].clip(-1000, 1500) + 1000) / 2500
    rows = of["t1", "ct"].subject == "p0"
    np.testing.assert_allclose(of["t1", "ct"].images[rows][:, 1], fit(u, 20)[of["t1", "ct"].slice_number[rows]], atol=5e-4)
    monkeypatch.setattr(identity, "CT_WINDOW", Scale(-1000.0, 2000.0))
    for contrasts, before in of.items():
        same = opened(tmp_path / "set", contrasts=contrasts)[0].fingerprint == before.fingerprint
        assert same == ("ct" not in contrasts)


def test_unchanged_files_are_read_once(tmp_path, monkeypatch):
    folder, read = make_set(tmp_path / "set"), []
    digest_of = identity._digest_of
    monkeypatch.setattr(identity, "_digest_of", lambda path: read.append(path) or digest_of(path))
    first, _ = opened(folder)
    assert len(read) == 8
    assert opened(folder)[0].fingerprint == first.fingerprint and len(read) == 8
    path = folder / NAMES[1] / f"{NAMES[1]}_t1.nii.gz"
    os.utime(path, ns=(10**18, 10**18))
    assert opened(folder)[0].fingerprint == first.fingerprint and read[8:] == [path]
    for content in ("{", "[]", '{"a": 1}', "null"):
        (tmp_path / "cache" / "known_files.json").write_text(content)
        assert opened(folder)[0].fingerprint == first.fingerprint
    assert len(read) == 9 + 4 * 8


def test_much_to_read_is_announced_and_unreadable_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "ANNOUNCED", 1)
    folder, lines = make_set(tmp_path / "set", subjects=1), []
    paths = sorted(folder.rglob("*.nii.gz"))
    digests_of(paths, Memory(tmp_path / "m.json"), 1, lines.append)
    digests_of(paths, Memory(tmp_path / "m.json"), 1, lines.append)
    assert len(lines) == 1 and "reading 2 files" in lines[0]
    with pytest.raises(DataError, match="nothing: no such file"):
        digests_of([tmp_path / "nothing"], Memory(tmp_path / "m.json"), 1, lines.append)


# ---- Decoded slices --------------------------------------------------------------------------------------------------

def test_number_of_threads_does_not_matter(tmp_path):
    folder = make_set(tmp_path / "set", subjects=5)
    first, _ = opened(folder, cache=tmp_path / "c1", workers=1)
    second, _ = opened(folder, cache=tmp_path / "c2", workers=3)
    assert first.fingerprint == second.fingerprint
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name / "subjects").iterdir()} for name in ("c1", "c2")]
    assert contents[0] == contents[1] and len(contents[0]) == 5


def test_values_and_order_are_those_of_load_subject(tmp_path):
    folder = make_set(tmp_path / "set", subjects=3)
    for name in NAMES[:3]:
        labels = np.random.default_rng(0).integers(0, 4, head().shape).astype(np.uint8)
        save(folder / name / f"{name}_seg.nii.gz", labels)
    dataset, _ = opened(folder, contrasts=("t1", "flair"))
    loaded = [load_subject(subject, ("t1", "flair"), 20) for subject in dataset.subjects]
    images = np.concatenate([one.images[one.kept] for one in loaded]).astype(np.float16)
    labels = np.concatenate([one.labels[one.kept] for one in loaded])
    assert dataset.subject.tolist() == [name for name, one in zip(NAMES, loaded) for _ in range(one.kept.sum())]
    np.testing.assert_array_equal(np.array(dataset.images), images)
    np.testing.assert_array_equal(np.asarray(dataset.labels), labels)
    assert dataset.images.shape == images.shape and dataset.images.dtype == np.float16 and dataset.labels.dtype == np.uint8


def test_other_settings_are_decoded_beside(tmp_path):  # row 22
    folder = make_set(tmp_path / "set")
    _, said = opened(folder)
    assert "decoding 4 subjects" in said and "will take about" in said and "also holds" not in said
    assert "decoding" not in opened(folder)[1]
    for settings in ({"contrasts": ("t1",)}, {"size": 24}):
        _, said = opened(folder, **settings)
        assert "decoding 4 subjects" in said and "damaged" not in said and "there already" not in said
    assert "decoding" not in opened(folder)[1]


def test_change_without_other_size_or_mtime_is_noticed(tmp_path):
    folder = make_set(tmp_path / "set")
    path = folder / NAMES[1] / f"{NAMES[1]}_t1.nii"
    os.remove(path.with_suffix(".nii.gz"))
    save(path, head(seed=11))  # not compressed: the size will not change
    first, _ = opened(folder)
    stamp = path.stat().st_mtime_ns
    time.sleep(0.02)
    save(path, head(seed=77))
    os.utime(path, ns=(stamp, stamp))  # ctime alone tells, or on other systems nothing
    changed, _ = opened(folder)
    if sys.platform == "linux":
        assert changed.fingerprint != first.fingerprint
        rows = np.flatnonzero(changed.subject == NAMES[1])
        assert (changed.images[rows, 1] != first.images[rows, 1]).any()
        np.testing.assert_array_equal(changed.images[rows, 0], first.images[rows, 0])


@pytest.mark.parametrize("damage", ["short", "long", "missing", "zeros", "empty", "one bit", "bad JSON", "other shape"])
def test_damaged_file_is_decoded_again(tmp_path, decoded, damage):  # row 23
    folder = make_set(tmp_path / "set")
    first, _ = opened(folder)
    truth = np.array(first.images)
    before = [path.read_bytes() for path in slice_files(tmp_path)]
    path, content = slice_files(tmp_path)[2], before[2]
    decoded.clear()
    path.unlink()
    if damage == "other shape":
        wrong = content.replace(b'"shape": [7, 2, 20, 20]', b'"shape": [7, 2, 10, 40]')
        crc = cache.zlib.crc32(wrong[64:])
        path.write_bytes(cache._padded(f"{cache.TITLE}{crc:08x}") + wrong[64:])
    elif damage != "missing":
        middle = len(content) - 300
        changed = {"short": content[:-100], "long": content + b"x", "zeros": bytes(len(content)), "empty": b"",
                   "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:],
                   "bad JSON": content[:64] + b"[" + content[65:]}
        path.write_bytes(changed[damage])
    second, said = opened(folder)
    assert ("is damaged" in said) == (damage != "missing") and "decoding 1 subjects" in said and len(decoded) == 1
    np.testing.assert_array_equal(np.array(second.images), truth)
    assert [path.read_bytes() for path in slice_files(tmp_path)] == before


def test_error_in_one_subject_keeps_the_others(tmp_path, decoded):
    folder = make_set(tmp_path / "set")
    bad = folder / NAMES[3] / f"{NAMES[3]}_t1.nii.gz"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-500])
    with pytest.raises(DataError, match=r"BraTS2021_00003_t1\.nii\.gz: the compressed data end early"):
        opened(folder, workers=1)
    assert len(slice_files(tmp_path)) == 3 and all(path.suffix == ".slices" for path in slice_files(tmp_path))
    decoded.clear()
    bad.write_bytes(whole)
    dataset, said = opened(folder)
    assert decoded == [NAMES[3]] and "3 are there already" in said
    again, _ = opened(folder, cache=tmp_path / "fresh")
    np.testing.assert_array_equal(np.array(dataset.images), np.array(again.images))


def test_interrupted_decoding_continues(tmp_path, monkeypatch):
    folder = make_set(tmp_path / "set")
    started = []

    def interrupted(subject, contrasts, size):
        started.append(subject.name)
        if len(started) == 3:
            raise KeyboardInterrupt
        return load_subject(subject, contrasts, size)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "load_subject", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opened(folder, workers=1)
    there = len(slice_files(tmp_path))
    assert there >= 2
    _, said = opened(folder)
    assert f"decoding {4 - there} subjects" in said and f"{there} are there already" in said


KILLED = """
import os, sys
from data import cache, load_subject
from scans import opened
from pathlib import Path
count = 0
def load(*args):
    global count
    count += 1
    if count == 3:
        (cache_folder / "subjects" / "x.slices.tmp-0123abcd").write_bytes(b"half")
        os._exit(9)
    return load_subject(*args)
cache.load_subject = load
cache_folder = Path(sys.argv[1]).parent / "cache"
opened(Path(sys.argv[1]), workers=1)
"""


def test_killed_decoding_continues_and_its_remains_are_removed(tmp_path, decoded):
    folder, tests = make_set(tmp_path / "set"), Path(__file__).parent
    paths = os.pathsep.join([str(tests.parent), str(tests)])
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], env={**os.environ, "PYTHONPATH": paths}, check=False)
    remains = tmp_path / "cache" / "subjects" / "x.slices.tmp-0123abcd"
    assert done.returncode == 9 and remains.exists() and len(slice_files(tmp_path)) == 3
    dataset, _ = opened(folder)
    assert sorted(decoded) == NAMES[2:] and not remains.exists()
    slice_files(tmp_path)[0].unlink()
    again, _ = opened(folder)
    np.testing.assert_array_equal(np.array(again.images), np.array(dataset.images))


def test_two_at_once_do_not_harm_each_other(tmp_path):
    folder = make_set(tmp_path / "set", subjects=6)
    truth = np.array(opened(folder, cache=tmp_path / "alone")[0].images)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: np.array(opened(folder)[0].images), range(3)))
    for images in found:
        np.testing.assert_array_equal(images, truth)
    assert len(slice_files(tmp_path)) == 6 and "decoding" not in opened(folder)[1]


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="the cache cannot be written"):
        opened(make_set(tmp_path / "set"))


def test_progress_is_said_every_ten_seconds(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(files_module.time, "monotonic", lambda: now[0])
    progress = Progress(1000, "subjects decoded", lines.append)
    for _ in range(6):
        now[0] += 4
        progress.step()
    assert lines == ["  subjects decoded 3/1000  ETA 1:06:28", "  subjects decoded 6/1000  ETA 1:06:16"]
    for last in (True, False):
        Progress(1, "files read", lines.append, last).step()
    assert lines[2:] == ["  files read 1/1  ETA 0:00:00"]                           # the end is said only where it is wanted


# ---- Stack -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def stack(tmp_path):
    """(Stack, the same array in memory)."""
    whole = np.random.default_rng(0).integers(0, 99, (11, 3, 4, 4)).astype(np.float16)
    parts = []
    for i, (first, last) in enumerate(((0, 4), (4, 5), (5, 11))):
        path = tmp_path / str(i)
        path.write_bytes(b"x" * 64 * i + whole[first:last].tobytes())
        parts.append((path, 64 * i, last - first))
    return Stack(parts, (3, 4, 4), "<f2"), whole


@pytest.mark.parametrize("index", [
    3, -1, np.int64(5), slice(None), slice(2, 9, 3), slice(None, None, -1), [], [10, 0, 4, 4, -2], np.array([[1, 5], [6, 0]]),
    np.arange(11) % 2 == 0, ([7, 1], 2), (slice(None), 1), (4, 1, slice(1, 3), 2), (slice(3, 6), slice(None, None, -1)),
    ([8, 2], slice(None), 1), (np.array([0, 10]), -1, slice(None), 0), np.zeros(0, int)])
def test_stack_is_indexed_like_an_array(stack, index, monkeypatch):
    stack, whole = stack
    monkeypatch.setattr("data.stack.OPEN_FILES", 2)
    index = (np.array(index, int) if isinstance(index, list) else index)
    found = stack[index]
    assert type(found) in (np.ndarray, np.float16) and found.dtype == whole.dtype
    np.testing.assert_array_equal(found, whole[index])
    assert np.shape(found) == whole[index].shape


def test_stack_as_a_whole(stack):
    stack, whole = stack
    assert len(stack) == 11 and stack.shape == (11, 3, 4, 4) and stack.ndim == 4 and stack.dtype == np.float16
    np.testing.assert_array_equal(np.array(stack), whole)
    assert np.asarray(stack, dtype=np.float32).dtype == np.float32
    np.testing.assert_array_equal(np.stack(list(stack)), whole)
    for index in (11, -12, [0, 11], (0, 3), ([0], [1]), (..., 0), None, "a", np.array([0.5])):
        with pytest.raises(IndexError):
            stack[index]
