"""What a golden run cannot show: who may see which slice, and that neither truth nor noise goes where it should not."""
import dataclasses
import sys

import numpy as np
import pytest
from test_golden import APT, MEDM2G, METADB, RLBCD, UNISYN
from toys import without_estimates

import apt
import data
import medm2g
import metadb
import rlbcd
import unisyn
from common import metrics
from data import phantom

# script, phantoms, flags, and the contrast that is made
SCRIPTS = {"apt": (apt, "brats", [*APT, "--missing", "flair"], "flair"), "metadb": (metadb, "ixi", METADB, "t2"),
           "rlbcd": (rlbcd, "petct", RLBCD, "pet"), "unisyn": (unisyn, "neuro", [*UNISYN, "--only", "t1:t2", "--test-subjects", "3"], "t2"),
           "medm2g": (medm2g, "cxr", [*MEDM2G, "--only", "ct:t2"], "t2")}


class Watched:
    """The slices of a data set, with a record of the rows that were asked for."""

    def __init__(self, images):
        self.images, self.shape, self.asked = images, images.shape, set()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        rows = index[0] if isinstance(index, tuple) else index
        self.asked.update(np.atleast_1d(np.arange(len(self.images))[rows]).tolist())
        return self.images[index]


class World:
    """One script on its phantoms, in one run folder."""

    def __init__(self, name, root):
        self.script, kind, self.flags, self.target = SCRIPTS[name]
        self.folder, self.out = root / kind, root / "run"
        if kind == "cxr":
            phantom.make(kind, self.folder, subjects=40, size=32)
        else:
            phantom.make(kind, self.folder, subjects=8, size=32, slices=4)

    def call(self, monkeypatch, *words, change=lambda images, test: images):
        """Runs the script on the data set, whose slices `change` may alter.  Returns the data set with watched slices."""
        opened, open_dataset = [], data.open_dataset

        def watched(*args, **settings):
            ds = open_dataset(*args, **settings)
            images = change(np.array(ds.images), ds.rows("test"))
            opened.append(dataclasses.replace(ds, images=Watched(images)))
            return opened[-1]
        with monkeypatch.context() as patch:
            without_estimates(patch)
            patch.setattr(data, "open_dataset", watched)
            patch.setattr(sys, "argv", [f"{self.script.__name__}.py", "--data", str(self.folder), "--out", str(self.out), *words])
            self.script.main()
        return opened[0]

    def evaluate(self, monkeypatch, *words, change=lambda images, test: images):
        """Returns what was scored, {method: images}, its truth, what the baselines learned from, and the data set."""
        scored, learned, score_table, baselines = [], [], metrics.score_table, metrics.baselines

        def score(task, methods, truth, subjects, *mask, **rest):
            scored.append((methods, np.array(truth)))
            return score_table(task, methods, truth, subjects, *mask, **rest)

        def learn(train, sources, target):
            learned.append(train)
            return baselines(train, sources, target)
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "score_table", score)
            patch.setattr(metrics, "baselines", learn)
            ds = self.call(monkeypatch, "--evaluate", *words, change=change)
        (methods, truth), (train,) = scored[0], learned
        made = {method: np.array(images) for method, images in methods.items() if method != "autoencoder alone"}   # which needs the truth
        return made, truth, train, ds


@pytest.fixture(scope="module", params=SCRIPTS)
def world(request, tmp_path_factory):
    return World(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def trained_on(world):
    """The data set as the training saw it."""
    with pytest.MonkeyPatch.context() as patch:
        return world.call(patch, *world.flags, "--train")


@pytest.fixture(scope="module")
def scored(world, trained_on):
    """An evaluation, as World.evaluate returns it."""
    with pytest.MonkeyPatch.context() as patch:
        return world.evaluate(patch)


def test_training_reads_no_test_slice(world, trained_on):
    """All training slices are read, all of validation too, and none of the test subjects, whatever for."""
    expected = {*trained_on.rows("train").tolist(), *trained_on.rows("val").tolist()}
    asked = trained_on.images.asked
    if world.script is unisyn:                      # it draws slabs at random, so a slice may not have had its turn
        assert asked <= expected and len(asked) > len(expected) / 2 and len(trained_on.rows("test")) > 6
    else:
        assert asked == expected and len(trained_on.rows("test")) == 8


def test_baselines_learn_from_training_slices_alone(scored):
    _, _, learned, ds = scored
    rows = ds.having(ds.rows("train"), list(learned))
    for name, images in learned.items():
        own = {image.astype(np.float32).tobytes() for image in ds.images.images[rows, ds.contrasts.index(name)]}
        assert {np.asarray(image, np.float32).tobytes() for image in images} == own


def test_truth_never_enters_what_is_scored(world, trained_on, scored, monkeypatch):
    """With noise in the place of every true target, each method's images stay as they are, to the bit."""
    target = trained_on.contrasts.index(world.target)

    def spoil(images, test):
        images[test, target] = np.random.default_rng(0).random(images[test, target].shape)
        return images
    before, truth, _, _ = scored
    after, noise, _, _ = world.evaluate(monkeypatch, change=spoil)
    assert np.abs(truth - noise).mean() > 0.1 and len(before) >= 4
    for method, images in before.items():
        assert np.array_equal(images, after[method]), method


def test_noise_differs_between_slices(world, trained_on, monkeypatch):
    """Equal sources in all test slices: what the model makes of them differs, within a subject and between two."""
    if world.script is unisyn:
        pytest.skip("UniSyn draws no noise")
    def all_the_same(images, test):
        images[test] = images[test[:1]]
        return images
    methods, _, _, ds = world.evaluate(monkeypatch, change=all_the_same)
    made = next(iter(methods.values()))
    assert len(made) == 4
    for i in range(4):
        for j in range(i):
            assert np.abs(made[i] - made[j]).max() > 1e-4
