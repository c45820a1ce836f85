"""Another cohort: all its subjects are scored, beside the baselines of the run, in a folder of its own; and what images are worth."""
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


class Other:
    """A data set of three subjects, the last of which belongs to no part."""

    def __init__(self, names, fingerprint="other"):
        self.fingerprint, self.complete = fingerprint, [SimpleNamespace(name=name) for name in names]


def as_cohort(tmp_path, names, fingerprint="other", split_typed=None, monkeypatch=None):
    run = SimpleNamespace(out=tmp_path / "run", about={"data": "own", "train": ["a"], "val": ["b"]}, say=lambda text: None)
    (tmp_path / "run").mkdir(exist_ok=True)
    ds = Other(names, fingerprint)
    ds.folder, ds.split = tmp_path / "OTHER", {"train": ["x"], "val": [], "test": ["y"]}
    monkeypatch.setattr(cohort.dataclasses, "replace", lambda ds, split: SimpleNamespace(**{**vars(ds), "split": split}))
    found, home = cohort.other_cohort(run, ds, split_typed)
    return run, found, home


def test_every_subject_of_another_cohort_is_scored(tmp_path, monkeypatch):
    run, ds, home = as_cohort(tmp_path, ["z", "x", "y"], monkeypatch=monkeypatch)
    assert ds.split == {"train": [], "val": [], "test": ["x", "y", "z"]}
    assert home == tmp_path / "run" and run.out == home / "on-OTHER" and run.out.is_dir()


def test_the_users_split_of_another_cohort_counts(tmp_path, monkeypatch):
    run, ds, home = as_cohort(tmp_path, ["x", "y"], split_typed="split.json", monkeypatch=monkeypatch)
    assert ds.split["test"] == ["y"] and home is not None


@pytest.mark.parametrize("names, fingerprint", [(["x", "y"], "own"), (["x", "a"], "other"), (["b", "y"], "other")])
def test_own_data_are_no_other_cohort(tmp_path, monkeypatch, names, fingerprint):
    """The same data, or data with subjects of the training, keep their split and their folder."""
    run, ds, home = as_cohort(tmp_path, names, fingerprint, monkeypatch=monkeypatch)
    assert home is None and ds.split["test"] == ["y"] and run.out == tmp_path / "run"


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
