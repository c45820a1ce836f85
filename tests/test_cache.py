"""Fingerprint and decoded slices on disk."""

import os

import numpy as np
import pytest

from data import cache, load_subject
from data.files import DataError
from data.intensities import Scale
from data.volumes import fit
from scans import head, make_set, opened, save, scan


def test_window_of_ct_is_part_of_the_fingerprint(tmp_path, monkeypatch):
    for s in range(3):
        save(tmp_path / "set" / f"p{s}" / "T1.nii.gz", head(seed=s))
        save(tmp_path / "set" / f"p{s}" / "CT.nii.gz", scan(seed=s)[0])
    of = {contrasts: opened(tmp_path / "set", contrasts=contrasts)[0] for contrasts in (("t1",), ("t1", "ct"))}
    u = (scan(seed=0)[0].clip(-1000, 1500) + 1000) / 2500
    rows = of["t1", "ct"].subject == "p0"
    np.testing.assert_allclose(of["t1", "ct"].images[rows][:, 1], fit(u, 20)[of["t1", "ct"].slice_number[rows]], atol=5e-4)
    monkeypatch.setattr(cache, "CT_WINDOW", Scale(-1000.0, 2000.0))
    for contrasts, before in of.items():
        same = opened(tmp_path / "set", contrasts=contrasts)[0].fingerprint == before.fingerprint
        assert same == ("ct" not in contrasts)


def test_number_of_threads_does_not_matter(tmp_path):
    folder = make_set(tmp_path / "set", subjects=5)
    first, _ = opened(folder, cache=tmp_path / "c1", workers=1)
    second, _ = opened(folder, cache=tmp_path / "c2", workers=3)
    assert first.fingerprint == second.fingerprint
    for name in ("slices.npy", "index.json"):
        assert (tmp_path / "c1" / first.fingerprint / name).read_bytes() == \
            (tmp_path / "c2" / first.fingerprint / name).read_bytes()
    loaded = load_subject(first.subjects[2], first.contrasts, 20)
    rows = first.subject == first.subjects[2].name
    np.testing.assert_array_equal(first.images[rows], loaded.images[loaded.kept].astype(np.float16))


def test_cache_is_used_and_rebuilt_when_files_change(tmp_path):  # row 22
    folder = make_set(tmp_path / "set")
    first, said = opened(folder)
    assert "decoding 4 subjects" in said
    again, said = opened(folder)
    assert "decoding" not in said and again.fingerprint == first.fingerprint
    _, said = opened(folder, contrasts=("t1",))
    assert "decoding" in said and "have changed" not in said  # other settings, not stale
    _, said = opened(folder, size=24)
    assert "decoding" in said and "damaged" not in said
    path = folder / "BraTS2021_00001" / "BraTS2021_00001_t1.nii"
    os.remove(path.with_suffix(".nii.gz"))
    save(path, head(seed=11))  # not compressed: the size will not change
    first, _ = opened(folder)
    stamp = path.stat().st_mtime_ns
    save(path, head(seed=77))
    os.utime(path, ns=(stamp, stamp))  # the bytes alone must tell
    changed, said = opened(folder)
    assert changed.fingerprint != first.fingerprint and "the data have changed since" in said
    rows = np.flatnonzero(changed.subject == "BraTS2021_00001")
    assert (changed.images[rows, 1] != first.images[rows, 1]).any()
    np.testing.assert_array_equal(changed.images[rows, 0], first.images[rows, 0])
    os.utime(path, ns=(stamp, stamp + 10**9))
    assert "decoding" in opened(folder)[1]


@pytest.mark.parametrize("damage", ["short", "no slices", "no index", "bad index", "other shape"])
def test_damaged_cache_is_rebuilt(tmp_path, damage):  # row 23
    folder = make_set(tmp_path / "set", subjects=2)
    first, _ = opened(folder)
    truth = np.array(first.images)
    home = tmp_path / "cache" / first.fingerprint
    del first
    if damage == "short":
        (home / "slices.npy").write_bytes((home / "slices.npy").read_bytes()[:-100])
    if damage == "no slices":
        (home / "slices.npy").unlink()
    if damage == "no index":
        (home / "index.json").unlink()
    if damage == "bad index":
        (home / "index.json").write_text("{")
    if damage == "other shape":
        np.save(home / "slices.npy", truth[1:])
    second, said = opened(folder)
    assert "is damaged" in said and "decoding" in said
    np.testing.assert_array_equal(second.images, truth)
    assert sorted(p.name for p in home.iterdir()) == ["index.json", "slices.npy"]


def test_interrupted_cache_leaves_nothing_that_looks_finished(tmp_path):
    folder = make_set(tmp_path / "set")
    bad = folder / "BraTS2021_00003" / "BraTS2021_00003_t1.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"BraTS2021_00003_t1\.nii\.gz: the compressed data end early"):
        opened(folder)
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []
