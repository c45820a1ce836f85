"""The split by person, a user's own, and leaks."""

import json

import numpy as np
import pytest

import data
from data.files import DataError
from data.layouts import Subject
from scans import head, make_set, opened, save


def test_same_voxels_under_two_names(tmp_path):  # row 17
    folder = make_set(tmp_path / "set")
    save(folder / "copy" / "copy_flair.nii.gz", 3 * head(seed=0) + 0)  # subject 0's, rescaled
    save(folder / "copy" / "copy_t1.nii.gz", head(seed=99))
    names = [f"BraTS2021_{s:05d}" for s in range(4)]
    together, apart = tmp_path / "together.json", tmp_path / "apart.json"
    together.write_text(json.dumps({"train": ["copy", *names[:2]], "test": names[2:]}))
    apart.write_text(json.dumps({"train": ["copy", *names[1:]], "test": names[:1]}))
    assert "warning: BraTS2021_00000 and copy have identical flair images" in opened(folder, split_file=together)[1]
    with pytest.raises(DataError, match=r"BraTS2021_00000 \(test\) and copy \(train\) have identical flair"):
        opened(folder, split_file=apart)


def people(n):
    return [Subject(f"s{i:02d}", f"s{i:02d}", {}) for i in range(n)]


@pytest.mark.parametrize(("n", "fraction", "test", "sizes"), [
    (24, 2 / 3, 6, (16, 2, 6)), (24, 0.8, 50, (17, 2, 5)), (2, 0.8, 50, (1, 0, 1)), (5, 0.01, 2, (1, 2, 2)),
    (1251, 0.8, 50, (1001, 200, 50)), (20, 0.8, 50, (14, 2, 4)), (8, 0.8, 50, (5, 1, 2)), (7, 0.8, 50, (6, 0, 1)),
    (8, 0.01, 50, (1, 1, 6)), (8, 0.99, 50, (6, 1, 1)), (8, 2 / 3, 6, (4, 1, 3)), (250, 0.8, 50, (175, 25, 50)),
    (251, 0.8, 50, (176, 25, 50)), (255, 0.8, 50, (204, 1, 50)), (40, 0.625, 10, (25, 5, 10))])
def test_split_sizes(n, fraction, test, sizes):
    split = data.make_split(people(n), 0, fraction, test)
    assert tuple(len(split[part]) for part in ("train", "val", "test")) == sizes
    assert len(set().union(*split.values())) == n


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.625, 0.8, 0.99])
def test_eight_persons_always_have_all_parts(fraction):
    for n in range(8, 60):
        split = data.make_split(people(n), 0, fraction, 50)
        sizes = [len(names) for names in split.values()]
        assert min(sizes) >= 1 and sum(sizes) == n and len(set().union(*split.values())) == n


def test_validation_is_taken_from_training_and_the_test_stays(monkeypatch):
    now = data.make_split(people(20), 0, 0.8, 50)
    monkeypatch.setattr("data.split.ENOUGH", 99)
    before = data.make_split(people(20), 0, 0.8, 50)
    assert now["test"] == before["test"] and sorted(now["train"] + now["val"]) == before["train"] and not before["val"]


def test_split_depends_on_names_and_seed_only():
    split = data.make_split(people(24), 0, 2 / 3, 6)
    assert data.make_split(people(24)[::-1], 0, 2 / 3, 6) == split
    assert data.make_split(people(24), 1, 2 / 3, 6) != split
    assert split["val"] == ["s00", "s17"]  # stored once, for ever
    visits = [Subject(f"{s.name}-{v}", s.person, {}) for s in people(12) for v in range(2)]
    parts = data.make_split(visits, 0, 0.5, 3)
    owners = [{name[:3] for name in names} for names in parts.values()]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
    assert [len(names) for names in parts.values()] == [12, 6, 6]


@pytest.mark.parametrize(("split", "sentence"), [
    ({"train": ["BraTS2021_00000", "nobody"], "test": ["BraTS2021_00001"]}, "no complete subjects, e.g. nobody"),
    ({"train": ["BraTS2021_00000"], "test": ["BraTS2021_00000"]}, "BraTS2021_00000 is listed twice"),
    ({"train": [], "test": ["BraTS2021_00001"]}, "train is empty"),
    ({"train": ["BraTS2021_00000"], "val": ["BraTS2021_00001"]}, "test is empty"),
    ([1, 2], "is not a split"),
])
def test_bad_split_files(tmp_path, split, sentence):
    folder = make_set(tmp_path / "set", subjects=2)
    (tmp_path / "split.json").write_text(json.dumps(split))
    with pytest.raises(DataError, match=sentence):
        opened(folder, split_file=tmp_path / "split.json")


def test_users_split_and_rows(tmp_path):
    folder = make_set(tmp_path / "set", subjects=5)
    names = [f"BraTS2021_{s:05d}" for s in range(5)]
    (tmp_path / "split.json").write_text(json.dumps({"train": names[3:], "test": [names[1]], "val": [names[0]]}))
    dataset, said = opened(folder, split_file=tmp_path / "split.json")
    assert "1 subjects are not in" in said
    per_subject = [np.flatnonzero(dataset.subject == name) for name in names]
    assert dataset.rows("train").tolist() == [*per_subject[3], *per_subject[4]]
    assert dataset.rows("val").tolist() == per_subject[0].tolist()
    part = dataset.part("train")
    assert len(part) == len(dataset.rows("train"))
    np.testing.assert_array_equal(part[[0, len(part) - 1]], dataset.images[[per_subject[3][0], per_subject[4][-1]]])
    k = len(per_subject[1])
    assert dataset.spread("test", 2).tolist() == [per_subject[1][int(0.25 * k)], per_subject[1][int(0.75 * k)]]
    assert dataset.spread("test", 99).tolist() == per_subject[1].tolist()
