"""Sweeps and other people's sentences, with a model that renders the truth, and one that does not read."""
import csv
import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest

import data
from common import studies
from common.sentences import Records, typical_records
from data import phantom


@pytest.fixture(scope="module", autouse=True)
def remembered():
    """An anatomy takes long to make, and these tests ask for it often."""
    make = functools.cache(phantom.neuro_truth)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "neuro_truth", make)
        yield


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    phantom.make("neuro", folder / "neuro", subjects=5, size=32, slices=3)
    found = data.open_dataset(folder / "neuro", None, 32, cache=folder / "cache", say=lambda text: None, gaps=True)
    everyone = sorted(subject.name for subject in found.complete)
    return dataclasses.replace(found, split={"train": [], "val": [], "test": everyone})


def run_in(folder):
    said = []
    return SimpleNamespace(out=folder, say=said.append, said=said)


class Knows:
    """Renders the truth for what it is told, or always for the typical record."""

    def __init__(self, ds, reads):
        subjects = ds.complete
        self.ds = ds
        self.reads = reads
        self.records = Records(subjects, typical_records(subjects, ds.contrasts))
        self.truth = {}

    def make(self, name, source, volume, wanted):
        if name not in self.truth:
            self.truth[name] = studies.Truth(self.ds, name, np.flatnonzero(self.ds.subject == name))
        truth = self.truth[name]
        return np.stack([truth.image(c, {**self.records.typical[c], **(record if self.reads else {})}) for c, record in wanted])


def test_sweep_follows_the_truth_if_the_model_does(ds, tmp_path):
    run = run_in(tmp_path)
    studies.sweep(run, ds, Knows(ds, True), "t2", {}, "TE", np.linspace(60, 140, 5))
    said = "\n".join(run.said)
    assert "rank correlation 1.000, slope 1.00" in said
    with open(tmp_path / "sweep-t2-TE.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 5 * 5 and [float(line["TE"]) for line in lines[:5]] == [60, 80, 100, 120, 140]
    for line in lines:
        assert abs(float(line["gm"]) - float(line["gm (truth)"])) < 1e-6
    # The cortex darkens against CSF as TE grows.
    ratios = [float(line["gm"]) / float(line["csf"]) for line in lines[:5]]
    assert all(a > b for a, b in zip(ratios, ratios[1:]))
    assert (tmp_path / "sweep-t2-TE.png").exists()


def test_sweep_of_a_model_that_does_not_read_is_flat(ds, tmp_path):
    run = run_in(tmp_path)
    studies.sweep(run, ds, Knows(ds, False), "t2", {}, "TE", np.linspace(60, 140, 3))
    assert "slope 0.00" in "\n".join(run.said)


def test_without_truth_the_parts_are_thirds_of_the_source(ds, tmp_path):
    run = run_in(tmp_path)
    studies.sweep(run, dataclasses.replace(ds, phantom=False), Knows(ds, True), "flair", {"TE": 100.0}, "TI", np.array([2300.0, 2600.0]))
    header = (tmp_path / "sweep-flair-TI.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "subject,TI,darkest third,middle third,brightest third"
    volume = np.arange(1.0, 10.0).reshape(1, 3, 3)
    assert [int(mask.sum()) for mask in studies.thirds(np.concatenate([volume, 0 * volume])).values()] == [3, 3, 3]


def test_other_sentences(ds, tmp_path):
    """A model that reads is best with the own record, and at the ceiling; one that does not is the same with all."""
    tables = []
    for reads in (True, False):
        run = run_in(tmp_path)
        studies.other_sentences(run, ds, Knows(ds, reads), [("t1", "t2")])
        with open(tmp_path / "text.csv", encoding="utf-8", newline="") as file:
            tables.append(next(csv.DictReader(file)))
    good, deaf = [{k: float(v) for k, v in table.items() if k not in ("task", "n")} for table in tables]
    assert good["own"] > good["other"] + 2 and good["own"] > good["no numbers"] + 2
    assert abs(good["own"] - good["ceiling: own"]) < 0.6
    assert deaf["own"] == deaf["other"] == deaf["no numbers"] and deaf["own"] < good["ceiling: own"] - 2


def test_studies_say_what_is_missing(ds, tmp_path):
    empty = dataclasses.replace(ds, split={"train": [], "val": [], "test": []})
    with pytest.raises(studies.RunError, match="no test subject has T1w"):
        studies.sweep(run_in(tmp_path), empty, Knows(ds, True), "t2", {}, "TE", np.array([60.0]))
    with pytest.raises(studies.RunError, match="no two test subjects"):
        studies.other_sentences(run_in(tmp_path), empty, Knows(ds, True), [("t1", "t2")])
