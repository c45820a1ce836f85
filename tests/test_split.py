"""The split by person, a user's own, and leaks."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import data
from data.files import DataError
from data.layouts import Subject
from data.split import read_split, use_split
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
    ({"train": [], "val": ["BraTS2021_00000"], "test": ["BraTS2021_00001"]}, "train is empty"),
    ({"train": ["BraTS2021_00000"], "val": ["BraTS2021_00001"]}, "test is empty"),
    ([1, 2], r"is not a split \(it is a list, but not of names\)"),
    ({"fold1": ["a"], "fold2": ["b"]}, r"is not a split \(it has fold1, fold2\)"), ({}, "it has nothing"),
], ids=["unknown", "twice", "no-train", "no-test", "numbers", "other-words", "nothing"])
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


# ---- Files of splits ------------------------------------------------------------------------------------------------

VISITS = [Subject(f"oslo/{n}/{v}", f"oslo/{n}", {"t1": Path(f"set/oslo/{n}/{v}/scan_{n}{v}_t1.nii.gz"), "t2": Path("T2.nii")})
          for n in ("Åse", "Bo", "Eva") for v in ("v1", "v2")]
CASES = [Subject(f"C{n}", f"C{n}", {"t1": Path(f"imagesTr/C{n}_0000.nii.gz")}) for n in range(6)]
A, B, E = (["oslo/" + name + visit for visit in ("/v1", "/v2")] for name in ("Åse", "Bo", "Eva"))
PLAIN = ({"train": ["C0", "C1", "C2"], "val": ["C3"], "test": ["C4", "C5"]}, CASES)


def split_of(folder, content, subjects=CASES, name="given", encoding="utf-8"):
    """read_split of a file with this text, or of what JSON makes of it -> (split, lines said)."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    (folder / name).write_bytes(text.encode(encoding))
    lines = []
    return read_split(folder / name, subjects, lines.append), lines


@pytest.mark.parametrize(("content", "name"), [
    (PLAIN[0], "a.json"),
    ({"Training": ["C0", "C1", "C2"], "VALIDATION": ["C3"], "testing": ["C4", "C5"], "seed": 3}, "a.json"),
    ({"C0": "train", "C1": "train", "C2": "train", "C3": "dev", "C4": "test", "C5": "test"}, "a.json"),
    ({"training": [{"image": f"./imagesTr/C{n}.nii.gz", "label": "x"} for n in range(3)], "valid": ["C3"],
      "test": ["./imagesTs/C4.nii.gz", "C5_0000.nii.gz"]}, "dataset.json"),
    ("name,part\nC0,train\nC1,train\nC2,train\nC3,val\nC4,test\nC5,test\n", "a.csv"),
    ("0;'C0';train\n1;'C1';train\n1;'C2';train\n0;'C3';valid\n1;'C4';test\n0;'C5';Test", "a.csv"),
    ("set\tage\tid\ntrain\t5\tC0\ntrain\t5\tC1\ntrain\t5\tC2\nval\t5\tC3\ntest\t5\tC4\n\ntest\t5\tC5\n", "a.tsv"),
], ids=["json", "words", "by-name", "decathlon", "commas", "no-title", "tabs"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_forms_of_a_split(tmp_path, content, name, encoding):
    split, lines = split_of(tmp_path, content, name=name, encoding=encoding)
    assert (split, lines) == (PLAIN[0], [])


@pytest.mark.parametrize("given", ["train.txt", "test.txt", ""], ids=["train", "test", "folder"])
def test_a_file_for_each_part(tmp_path, given):
    for name, text in (("train", "case_id\nC0\nC1\nC2\n"), ("valid", "C3,61\n"), ("test", "C4\nC5\n"), ("notes", "C9\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "test.xyz").write_text("of the test")
    lines = []
    if given == "":
        (tmp_path / "test.xyz").unlink()
    assert read_split(tmp_path / given, CASES, lines.append) == PLAIN[0]
    assert "the split is that of the files test, train, val in" in lines[-1]


@pytest.mark.parametrize(("given", "ending"), [("fold1_train.csv", ".csv"), ("fold1-Test.txt", ".txt")])
def test_words_in_the_names_of_lists(tmp_path, given, ending):
    """A list of those for training is never taken for the test, and lists of another fold are left alone."""
    joint = "-" if ending == ".txt" else "_"
    for part, names in PLAIN[0].items():
        (tmp_path / f"fold1{joint}{part.capitalize() if joint == '-' else part}{ending}").write_text("\n".join(["# a fold", *names]))
    (tmp_path / f"fold2{joint}train{ending}").write_text("C5")
    assert read_split(tmp_path / given, CASES, print) == PLAIN[0]


def test_a_list_for_training_alone(tmp_path):
    (tmp_path / "train_cases.txt").write_text("C0\nC1\n")
    with pytest.raises(DataError, match="test is empty"):
        read_split(tmp_path / "train_cases.txt", CASES, print)
    (tmp_path / "train_or_test.txt").write_text("C0\nC1\n")
    assert read_split(tmp_path / "train_or_test.txt", CASES, print)["test"] == ["C0", "C1"]
    (tmp_path / "test_list.txt").write_text("C4\n")
    (tmp_path / "train_val_list.txt").write_text("C0\nC1\n")
    assert read_split(tmp_path / "train_val_list.txt", CASES, print) == {"train": ["C0", "C1"], "val": [], "test": ["C4"]}
    (tmp_path / "train_more.txt").write_text("C2\n")
    with pytest.raises(DataError, match="several files in it name the part train, train_more.txt is one"):
        read_split(tmp_path, CASES, print)


def test_a_folder_without_lists(tmp_path):
    with pytest.raises(DataError, match="is a folder without files such as train.txt"):
        read_split(tmp_path, CASES, print)


def test_folds(tmp_path):
    folds = [{"train": ["C0", "C1"], "val": ["C2"]}, {"train": ["C2"], "val": ["C0"]}]
    split, lines = split_of(tmp_path, folds)
    assert split == {"train": ["C0", "C1"], "val": [], "test": ["C2"]}
    assert "the first of 2 folds is used; without a test, its val is the test" in lines[0]
    split, _ = split_of(tmp_path, [{"train": ["C0"], "val": ["C1"], "test": ["C2"]}])
    assert split == {"train": ["C0"], "val": ["C1"], "test": ["C2"]}


@pytest.mark.parametrize("content", ["C4\nC5\n", ["C4", "C5"], {"test": ["C4", "C5"]}], ids=["lines", "list", "test"])
def test_the_test_alone(tmp_path, content):
    split, lines = split_of(tmp_path, content)
    assert split == {"train": ["C0", "C1", "C2", "C3"], "val": [], "test": ["C4", "C5"]}
    assert "names the test only; the other 4 subjects are for training" in lines[0] and len(lines) == 1


def test_visits_of_those_tested_do_not_train(tmp_path):
    split, lines = split_of(tmp_path, {"test": ["oslo/Bo/v1"]}, VISITS)
    assert split == {"train": [*A, *E], "val": [], "test": ["oslo/Bo/v1"]} and "1 subjects are not in" in lines[1]


def test_the_name_of_a_subject_comes_before_that_of_a_person(tmp_path):
    subjects = [Subject("k", "k", {}), Subject("k/late", "k", {}), Subject("m", "m", {})]
    assert split_of(tmp_path, {"train": ["m"], "test": ["k"]}, subjects)[0]["test"] == ["k"]


def test_a_split_to_score_only(tmp_path):
    split, lines = split_of(tmp_path, {"train": [], "val": [], "test": ["C4"]})
    assert split == {"train": [], "val": [], "test": ["C4"]} and "nobody for training, so it only serves to score" in lines[0]
    assert split_of(tmp_path, {"test": [f"C{n}" for n in range(6)]})[0]["train"] == []


@pytest.mark.parametrize(("texts", "names"), [
    (["oslo/Eva"], E), (["eva"], E), (["oslo/eva/V2"], E[1:]), (["oslo_Eva_v1"], E[:1]), (["scan_Evav1_t1"], E[:1]),
    (["C:\\mri\\oslo\\Eva\\v1"], E[:1]), (["/mri/oslo/Eva/v1/new.nii.gz"], E[:1]), (["./oslo/Eva/"], E),
    (["Eva_T1w.nii"], E), (["Eva_0003.nii.gz"], E), ([" Eva"], E), (["Eva", "oslo/Eva/v1"], E), (["EVA.nii.gz", "eva.nii"], E),
], ids=["person", "short", "case", "underscores", "file", "windows", "other-file", "slashes", "contrast", "number", "spaces",
        "person-and-visit", "same"])
def test_names_of_any_kind(tmp_path, texts, names):
    split, _ = split_of(tmp_path, {"train": ["Åse"], "test": texts}, VISITS)
    assert split == {"train": A, "val": [], "test": names}


def test_names_in_another_form_of_unicode(tmp_path):
    split, _ = split_of(tmp_path, {"train": [unicodedata.normalize("NFD", "Åse")], "test": ["Bo"]}, VISITS)
    assert split["train"] == A


@pytest.mark.parametrize("text", ["T2", "v1", "oslo", "Eva_v3", "C9_0000"])
def test_names_that_mean_no_one_or_several(tmp_path, text):
    with pytest.raises(DataError, match=f"1 names are no complete subjects, e.g. {text}; subjects are called like oslo"):
        split_of(tmp_path, {"train": ["Åse"], "test": [text]}, VISITS)


@pytest.mark.parametrize(("content", "sentence"), [
    ("", "is not a split .it is empty"), ("{'train': [", "is not a split .Expecting"),
    ("C0,C1\nC2,C3\n", "no column of it says train, val or test"),
    ({"train": ["C0"], "test": [{}]}, "is not a split"), ("PK\x03\x04\0C0", "is neither JSON nor a list or a table as text"),
], ids=["empty", "no-json", "no-parts", "no-name", "excel"])
def test_files_that_are_no_split(tmp_path, content, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        split_of(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_torn_persons_take_one_line():
    lines = []
    given = {"train": [*A, B[0]], "val": [], "test": [*E, B[1]]}
    assert use_split(given, VISITS, 0, lines.append) == given
    assert lines == ["  warning: images of oslo/Bo are in train and test of the data set's own split"]
    use_split({"train": [A[0], B[0]], "val": [], "test": [A[1], B[1]]}, VISITS, 0, lines.append)
    assert lines[1:] == ["  warning: images of oslo/Åse, oslo/Bo are in train and test of the data set's own split"]
