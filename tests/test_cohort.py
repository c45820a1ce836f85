"""Another cohort: all its subjects are scored, beside the baselines of the run, in a folder of its own; and what images are worth."""
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import cohort, features, metrics, value
from common.evaluation import Task
from common.files import RunError


def training_set():
    rng = np.random.default_rng(0)
    images = rng.random((6, 2, 12, 12), dtype=np.float32)
    images[:, 1] = images[:, 0] ** 2
    return SimpleNamespace(contrasts=("ct", "pet"), images=images, present=np.ones((6, 2), bool), rows=lambda part, most=None: np.arange(4))


def test_kept_baselines_are_those_of_the_training_subjects(tmp_path):
    run = SimpleNamespace(rank=0, out=tmp_path)
    ds = training_set()
    cohort.keep_baselines(run, ds, [(("ct",), ("pet",))])
    sources = {"ct": np.random.default_rng(1).random((3, 12, 12), dtype=np.float32)}
    found = cohort.stored_baselines(tmp_path, "ct->pet", sources)
    train = {"ct": ds.images[:4, 0], "pet": ds.images[:4, 1]}
    wanted = metrics.baselines(train, sources, "pet")
    assert list(found) == list(wanted) == ["copy-source", "mean-of-train", "intensity-lookup"]
    for name, images in wanted.items():
        assert np.allclose(found[name], images, atol=1e-6)
    assert cohort.stored_baselines(tmp_path, "ct->cta", sources) == {} and cohort.stored_baselines(tmp_path / "x", "ct->pet", sources) == {}
    before = (tmp_path / cohort.FILE).read_bytes()
    ds.images[:] = 0
    cohort.keep_baselines(run, ds, [(("ct",), ("pet",))])                   # what is there stays
    assert (tmp_path / cohort.FILE).read_bytes() == before


def scan(name, *digests, person=None):
    """A subject with the digests of its files."""
    return SimpleNamespace(name=name, person=person or name, digests=list(digests))


def run_of(tmp_path, said=None):
    """A run that was trained on subjects a (files 1, 2) and b (3, 4), with v (5, 6) as validation."""
    about = {"data": "own", "train": ["a", "b"], "val": ["v"], "files of train": [["1", "2"], ["3", "4"]], "files of val": [["5", "6"]]}
    (tmp_path / "run").mkdir(exist_ok=True)
    return SimpleNamespace(out=tmp_path / "run", about=about, say=(said if said is not None else []).append)


def test_who_was_trained_on_is_told_by_files_not_by_names(tmp_path):
    said = []
    subjects = [scan("a", "7", "8"), scan("renamed", "9", "4"), scan("new", "10"), scan("v", "6"), scan("b", "3", "4")]
    files = {subject.name: subject.digests for subject in subjects}
    assert cohort.served(run_of(tmp_path, said), subjects, files) == {"renamed", "v", "b"}
    assert len(said) == 1 and said[0].startswith("1 subjects have the name of a training subject, but other images (a)")
    assert cohort.served(run_of(tmp_path), subjects, files, ("train",)) == {"renamed", "b"}      # v only chose weights


def test_names_count_in_a_run_that_holds_no_digests(tmp_path):
    run = run_of(tmp_path)
    del run.about["files of train"], run.about["files of val"]
    subjects = [scan("a", "7"), scan("v", "8"), scan("new", "1")]
    files = {subject.name: subject.digests for subject in subjects}
    assert cohort.served(run, subjects, files) == {"a", "v"}


def test_a_later_visit_of_a_training_person_counts_as_trained_on(tmp_path):
    subjects = [scan("p1/first", "1", person="p1"), scan("p1/second", "20", person="p1"), scan("p2/first", "21", person="p2")]
    files = {subject.name: subject.digests for subject in subjects}
    assert cohort.served(run_of(tmp_path), subjects, files) == {"p1/first", "p1/second"}


@dataclasses.dataclass
class Other:
    complete: list
    split: dict
    folder: Path
    fingerprint: str = "other"

    @property
    def files(self):
        return {subject.name: subject.digests for subject in self.complete}


def as_cohort(tmp_path, subjects, fingerprint="other", split_typed=None, test=("y",), train=("x",), said=None):
    run = run_of(tmp_path, said)
    ds = Other(subjects, {"train": list(train), "val": [], "test": list(test)}, tmp_path / "OTHER", fingerprint)
    found, home = cohort.other_cohort(run, ds, split_typed)
    return run, found, home


def test_every_subject_of_another_cohort_is_scored(tmp_path):
    run, ds, home = as_cohort(tmp_path, [scan("z", "7"), scan("a", "8"), scan("y", "9")])
    assert ds.split == {"train": [], "val": [], "test": ["a", "y", "z"]}
    assert home == tmp_path / "run" and run.out == home / "on-OTHER" and run.out.is_dir()


def test_subjects_that_served_the_training_are_left_out_and_named(tmp_path):
    said = []
    run, ds, home = as_cohort(tmp_path, [scan("x", "1"), scan("y", "9"), scan("w", "5")], said=said)
    assert ds.split["test"] == ["y"] and home is not None
    assert said[0].endswith("OTHER served the training and are left out: w, x")
    with pytest.raises(RunError, match="every subject served the training"):
        as_cohort(tmp_path, [scan("x", "1"), scan("w", "5")])


def test_the_users_split_of_another_cohort_counts(tmp_path):
    subjects = [scan("x", "7"), scan("y", "9"), scan("w", "5")]
    run, ds, home = as_cohort(tmp_path, subjects, split_typed="split.json")
    assert ds.split["test"] == ["y"] and home is not None
    with pytest.raises(RunError, match=r"1 test subjects served the training \(w\)"):
        as_cohort(tmp_path, subjects, split_typed="split.json", test=("w", "y"))


def test_own_data_keep_their_split_and_their_folder(tmp_path):
    subjects = [scan("a", "1", "2"), scan("y", "9")]
    run, ds, home = as_cohort(tmp_path, subjects, "own", train=("a",))
    assert home is None and ds.split["test"] == ["y"] and run.out == tmp_path / "run"
    with pytest.raises(RunError, match="served the training"):
        as_cohort(tmp_path, subjects, "own", test=("a", "y"))
    run, ds, home = as_cohort(tmp_path, subjects, "own", train=())             # no training part: the stored baselines count
    assert home == run.out == tmp_path / "run"


def test_cka_does_not_see_rotation_and_scale():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(3, 4, 5, 5, generator=g)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=g))
    turned = 7 * torch.einsum("ij,bjhw->bihw", rotation, a) + 2
    assert features.linear_cka(a, turned) == pytest.approx(1, abs=1e-6)
    assert features.linear_cka(a, torch.randn(3, 4, 5, 5, generator=g)) < 0.2
    x = torch.tensor([[[[1.0, -1.0, 1.0, -1.0]], [[1.0, 1.0, -1.0, -1.0]]]])               # two orthogonal features
    assert features.linear_cka(x, x[:, :1]) == pytest.approx(1 / 2 ** 0.5)                  # 16 / (sqrt(32) * 4)


def fold_task(labels=None):
    ct = np.random.default_rng(0).random((10, 16, 16), dtype=np.float32)
    return Task({"ct": ct}, "pet", ct ** 2, {"Model": ct ** 3, "extra": ct}, np.array([f"s{i // 2}" for i in range(10)]), labels=labels)


def test_value_of_images_compares_alone_made_and_true(monkeypatch):
    seen = {}

    def classify(run, images, subjects, labels, **size):
        seen[len(seen)] = images
        return {"folds": [{"auc": 0.5, "acc": 1.0}], "auc_error": 0.1, "auc_pooled": 0.6, "right": {"s0": 1.0}, "majority": 0.6, "labels": labels}
    monkeypatch.setattr(value, "cross_validate_classifier", classify)
    people = [SimpleNamespace(name=f"s{i}", meta={"label": i % 2}) for i in range(5)]
    ds = SimpleNamespace(subjects=people, phantom=True, folder=Path("F"))
    said = []
    task = fold_task()
    rows = value.value_rows(SimpleNamespace(say=said.append), ds, task, "label")
    assert [row["method"] for row in rows if row["metric"] == "auc"] == ["A alone", "Model", "A and the true B"]
    ct = task.sources["ct"]
    assert np.array_equal(seen[0][:, 0], ct) and np.array_equal(seen[0][:, 1], ct)
    assert np.array_equal(seen[1][:, 0], ct) and np.array_equal(seen[1][:, 1], ct ** 3)
    assert np.array_equal(seen[2][:, 1], ct ** 2)
    people[3].meta = {}
    with pytest.raises(RunError, match="s3 has no label"):
        value.value_rows(SimpleNamespace(say=said.append), ds, task, "label")
    with pytest.raises(RunError, match="has a mask"):
        value.value_rows(SimpleNamespace(say=said.append), ds, task, "lesion")
