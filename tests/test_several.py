"""Several folders in --data: who is who, what is there, who trains."""
from pathlib import Path

import numpy as np
import pytest

import apt
from common import cli
from data import check, find_layout, is_phantom
from data.files import DataError
from data.layouts import folders_of, name_of
from scans import head, make_set, opened, save


@pytest.fixture
def two(tmp_path):
    """Two hospitals that count their patients alike: FLAIR and T1 here, T1 and T2 there."""
    here = make_set(tmp_path / "here", 4, ("flair", "t1"))
    there = make_set(tmp_path / "there", 4, ("t1", "t2"))
    for number, path in enumerate(sorted(there.rglob("*.nii.gz"))):
        save(path, head(seed=500 + number))
    return Path(f"{here},{there}")


def test_a_patient_is_a_patient_of_one_folder(two):
    layout = find_layout(two, every=True)
    assert layout.contrasts == ("flair", "t1", "t2") and layout.name == "BraTS 2021 + BraTS 2021"
    assert [subject.name for subject in layout.subjects] == [f"{home}/BraTS2021_0000{i}" for home in ("here", "there") for i in range(4)]
    assert len({subject.person for subject in layout.subjects}) == 8
    assert [tuple(subject.files) for subject in layout.subjects] == 4 * [("flair", "t1")] + 4 * [("t1", "t2")]


def test_only_what_most_have_is_used_where_there_are_no_gaps(two):
    """T1 alone is in all; FLAIR and T2 are in half of the subjects, and nobody has everything."""
    assert find_layout(two).contrasts == ("flair", "t1", "t2")
    assert find_layout(two, ("t2", "t1")).contrasts == ("t2", "t1")
    with pytest.raises(DataError, match="0 of 8 subjects are complete"):
        opened(two)
    with pytest.raises(DataError, match="no contrast ct"):
        find_layout(two, ("ct",))


def test_they_are_decoded_split_and_checked_together(two, tmp_path):
    ds, said = opened(two, gaps=True, train_fraction=0.5, test_subjects=2, size=20)
    assert "8 subjects with at least two of flair, t1, t2" in said and "scans: flair 4, t1 8, t2 4" in said
    everyone = sum(ds.split.values(), [])
    assert sorted(everyone) == sorted(set(ds.subject)) and len(everyone) == 8 and not ds.phantom
    for row in (0, len(ds.subject) - 1):
        home = ds.subject[row].split("/")[0]
        path = next(s for s in ds.subjects if s.name == ds.subject[row]).files["t1"]
        assert f"/{home}/" in str(path) and np.any(ds.images[row, 1])
    assert check(two, gaps=True, say=lambda line: None)


def test_their_own_splits_are_joined_and_half_a_split_is_none(tmp_path):
    homes = []
    for home in ("a", "b"):
        for part, count in (("train", 2), ("test", 1)):
            make_set(tmp_path / home / part, count, ("t1", "t2"))
            for path in list((tmp_path / home / part).iterdir()):
                path.rename(path.with_name(f"{part}_{path.name}"))
        homes.append(str(tmp_path / home))
    split = find_layout(",".join(homes)).split
    assert {part: len(names) for part, names in split.items()} == {"train": 4, "val": 0, "test": 2}
    assert all(name.startswith(("a/", "b/")) for names in split.values() for name in names)
    make_set(tmp_path / "c", 2, ("t1", "t2"))
    layout = find_layout(f"{homes[0]},{tmp_path / 'c'}")
    assert layout.split is None and any("all subjects are split anew" in note for note in layout.notes)


def test_folders_of_one_name_and_missing_ones_get_a_sentence(tmp_path, two):
    make_set(tmp_path / "other" / "here", 2)
    with pytest.raises(DataError, match="two folders have one name; rename one"):
        find_layout(f"{tmp_path / 'here'},{tmp_path / 'other' / 'here'}")
    with pytest.raises(DataError, match="elsewhere: does not exist"):
        find_layout(f"{tmp_path / 'here'},{tmp_path / 'elsewhere'}")


def test_a_comma_in_the_name_of_a_folder_is_no_list(tmp_path):
    folder = make_set(tmp_path / "Smith, Jones", 2)
    assert folders_of(folder) == [folder] and name_of(folder) == "Smith, Jones"
    assert len(find_layout(folder).subjects) == 2
    assert folders_of(f"{folder}, {tmp_path}") == [tmp_path / "Smith", Path("Jones"), tmp_path]     # such names cannot be listed


def test_the_run_is_named_by_all_and_lies_in_none(two, capsys):
    def parse(*words):
        return cli.parse(apt.Config, {"paper": {}}, [], {}, lambda folder: "paper", "", ["--data", str(two), *words], "x")[1]
    assert parse().out == Path("runs") / "x-here+there"
    with pytest.raises(SystemExit):
        parse("--out", str(folders_of(two)[1] / "run"), "--train")
    assert "lies in the data folder" in capsys.readouterr().err
    assert not is_phantom(two) and is_phantom("data/cxr,data/ixi")


def test_the_order_of_folders_does_not_matter_and_wishes_reach_them(two, tmp_path):
    here, there = folders_of(two)
    names = [[subject.name for subject in find_layout(f"{a},{b}", every=True).subjects] for a, b in ((here, there), (there, here))]
    assert names[0] == names[1] == sorted(names[0])
    save(there / "BraTS2021_00002" / "BraTS2021_00002_flair.nii.gz", head(seed=9))          # the only one of its folder
    counts = [sum("flair" in subject.files for subject in find_layout(two, wish, every=True).subjects) for wish in (None, ("flair", "t1"))]
    assert counts == [4, 5]
