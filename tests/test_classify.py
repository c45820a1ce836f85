"""The classifier in cross-validation: scores by hand; folds without leakage; what training sees; toy tasks; the same bits again."""
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import classify as C
from common.downstream import two_channels
from common.run import Run

FAST = {"width": 4, "epochs": 8, "lr": 3e-3, "batch": 8}


def start(folder, seed=0):
    return Run("test", SimpleNamespace(), SimpleNamespace(out=folder, seed=seed, device="cpu", precision="fp32", quiet=True))


def patients(n, slices, seed, size=16):
    """Noisy slices of n patients; those of even number are sick and show a bright disc.  Every patient has a pattern of
    their own in all slices, so that a network can recognise them.  Returns images (n * slices, size, size), subjects, labels."""
    g = np.random.default_rng(seed)
    pattern = np.repeat(g.random((n, size // 4, size // 4)).repeat(4, 1).repeat(4, 2), slices, axis=0)
    images = 0.3 * pattern + 0.05 * g.random((n * slices, size, size))
    y, x = np.mgrid[:size, :size]
    for k in range(0, n * slices):
        if (k // slices) % 2 == 0:
            a, b = g.integers(4, size - 4, 2)
            images[k][(y - a) ** 2 + (x - b) ** 2 <= 9] += 0.6
    names = [f"p{k:02}" for k in range(n)]
    return images.astype(np.float16), np.repeat(names, slices), {name: 1 - k % 2 for k, name in enumerate(names)}


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_auc_by_hand_and_by_counting_pairs():
    assert C.auc([1, 0, 1, 0], [0.5, 0.5, 0.9, 0.1]) == pytest.approx(3.5 / 4)                   # one tie in four pairs
    labels = [0, 0, 1, 1, 0, 1, 0, 1, 1, 0]
    assert C.auc(labels, [0.1, 0.4, 0.35, 0.8, 0.4, 0.4, 0.2, 0.9, 0.65, 0.7]) == pytest.approx(0.76)     # scikit-learn
    assert C.auc([1, 1, 0], [0.1, 0.2, 0.9]) == 0 and C.auc([1, 1, 0], [3, 2, 1]) == 1
    assert np.isnan(C.auc([1, 1], [0.1, 0.2])) and np.isnan(C.auc([0, 0], [0.1, 0.2]))
    g = np.random.default_rng(0)
    labels, scores = g.integers(2, size=60), g.integers(8, size=60)                              # many ties
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(scores[labels == 1], scores[labels == 0])]
    assert C.auc(labels, scores) == pytest.approx(np.mean(pairs))


def test_standard_error_by_hand():
    # q1 = .8 / 1.2 = .666667, q2 = 1.28 / 1.8 = .711111; (.16 + .026667 + 2 * .071111) / 6 = .0548148
    assert C.standard_error(0.8, 2, 3) == pytest.approx(0.0548148 ** 0.5, rel=1e-5)
    assert C.standard_error(0.8, 3, 2) == pytest.approx(((0.16 + 2 * 0.0266667 + 0.0711111) / 6) ** 0.5, rel=1e-5)
    assert C.standard_error(0.893, 51, 58) == pytest.approx(0.0325, abs=5e-5)                    # the example of the paper
    assert C.standard_error(0.6945, 13, 30) == pytest.approx(0.0924, abs=5e-5)                   # Table 5 of RLBCD
    assert C.standard_error(1, 13, 30) == 0


def test_the_result_by_hand(tmp_path, monkeypatch):
    """Probabilities stand in for the network: slice r of a subject gets its own number."""
    subjects = np.array(list("abcdefabcdefg") + ["g"])
    labels = dict(zip("abcdefg", [1, 1, 1, 0, 0, 0, 0]))
    given = np.array([0.9, 0.5, 0.2, 0.6, 0.2, 0.1, 0.7, 0.5, 0.4, 0.6, 0.2, 0.1, 0.1, 0.3])
    monkeypatch.setattr(C, "train_classifier", lambda *args: None)
    monkeypatch.setattr(C, "classify", lambda run, model, images, rows: given[rows])
    monkeypatch.setattr(C, "divide", lambda run, names, count, labels: [list("agcf"), list("bed")])
    found = C.cross_validate_classifier(start(tmp_path), np.zeros((14, 2, 8, 8)), subjects, labels, count=2)
    by_hand = {"a": 0.8, "b": 0.5, "c": 0.3, "d": 0.6, "e": 0.2, "f": 0.1, "g": 0.2}             # means of both slices
    assert found["probability"] == pytest.approx(by_hand) and list(found["probability"]) == list("abcdefg")
    assert found["right"] == {"a": 1, "b": 1, "c": 0, "d": 0, "e": 1, "f": 1, "g": 1}            # .5 counts as positive
    assert [fold["subjects"] for fold in found["folds"]] == [list("agcf"), list("bed")]
    assert [fold["auc"] for fold in found["folds"]] == [1, 0.5]                                  # b over e, not over d
    assert [fold["acc"] for fold in found["folds"]] == pytest.approx([3 / 4, 2 / 3])
    assert found["auc"] == 0.75 and found["acc"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert found["auc_pooled"] == pytest.approx(10 / 12)                                         # a: 4, b: 3, c: 3 of 4
    assert (found["positives"], found["negatives"], found["majority"]) == (3, 4, pytest.approx(4 / 7))
    assert found["auc_error"] == C.standard_error(0.75, 3, 4)
    areas, right, folds = C.classification_rows("ct->pet", "M", found)
    assert (areas["metric"], areas["values"], areas["mean"], areas["unit"]) == ("auc", {"fold 1": 1, "fold 2": 0.5}, 0.75, "fold")
    assert (areas["standard_error"], areas["pooled"]) == (found["auc_error"], found["auc_pooled"])
    assert (right["metric"], right["values"], right["majority"]) == ("acc", found["right"], found["majority"]) and "variant" not in right
    assert (folds["metric"], folds["mean"], folds["variant"]) == ("acc", found["acc"], "mean of folds")
    assert {r["task"] for r in (areas, right, folds)} == {"ct->pet"} and {r["method"] for r in (areas, right, folds)} == {"M"}


def test_what_does_not_fit_is_refused(tmp_path):
    run, images, names = start(tmp_path), np.zeros((10, 1, 8, 8)), [f"s{k}" for k in range(10)]
    labels = {name: k % 2 for k, name in enumerate(names)}

    def refused(match, images=images, subjects=names, labels=labels):
        with pytest.raises(ValueError, match=match):
            C.cross_validate_classifier(run, images, subjects, labels)
    refused("one name per slice", subjects=names[1:])
    refused("one name per slice", images=images[:, 0])
    refused("from -1 to 0; they must lie in", images=images - np.eye(8))
    refused("from nan to nan", images=np.where(np.eye(8) > 0, np.nan, images))
    refused("label of s9 is None", labels={name: labels[name] for name in names[:9]})
    refused("label of s3 is 2", labels={**labels, "s3": 2})
    refused("4 of 10 subjects have label 1; 5 folds need 5", labels={**labels, "s3": 0})
    refused("6 of 10 subjects have label 1; 5 folds need 5", labels={**labels, "s2": 1})


# ---- network and training --------------------------------------------------------------------------------------------


def test_the_network_is_a_resnet_18():
    with torch.device("meta"):
        network = C.ResNet18(3, 64)
        assert network.layers(torch.zeros(2, 3, 64, 48)).shape == (2, 512, 4, 3) and network(torch.zeros(2, 3, 64, 48)).shape == (2,)
    # ResNet-18 of torchvision has 11,689,512: 513,000 of its 1,000 classes and 9,408 of its 7x7 stem are not here
    assert sum(p.numel() for p in network.parameters()) == 11_689_512 - 513_000 - 9_408 + 513 + 64 * 3 * 9
    block = C.ResidualBlock(4, 4, 1).eval()
    torch.nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x.relu())                                                       # the short cut


def test_training_sees_its_own_rows_with_their_labels_mirrored_half_the_time(tmp_path, monkeypatch):
    g = np.random.default_rng(0)
    images = g.integers(0, 256, (20, 2, 8, 8)).astype(np.float32) / 256
    targets = np.array([1, 0, 0, 1, 0] * 4, np.float32)
    rows = np.array([1, 3, 4, 5, 8, 10, 13, 18])
    seen, forward, loss = [], C.ResNet18.forward, C.F.binary_cross_entropy_with_logits
    monkeypatch.setattr(C.ResNet18, "forward", lambda self, x: seen.append(x) or forward(self, x))
    monkeypatch.setattr(C.F, "binary_cross_entropy_with_logits",
                        lambda z, y, pos_weight: seen.append((y, pos_weight)) or loss(z, y, pos_weight=pos_weight))
    C.train_classifier(start(tmp_path), images, targets, rows, "stage", 8, 4, 1e-3, 4)
    upright = {image.tobytes(): k for k, image in enumerate(images)}
    mirrored = {image[..., ::-1].tobytes(): k for k, image in enumerate(images)}
    assert len(seen) == 2 * 16                                                                   # 8 times 8 rows in batches of 4
    shown, times = [], 0
    for x, (y, weight) in zip(seen[::2], seen[1::2]):
        keys = [image.contiguous().numpy().tobytes() for image in x]
        chosen = [upright.get(key, mirrored.get(key)) for key in keys]
        assert y.tolist() == targets[chosen].tolist()
        assert weight.item() == pytest.approx(2 / 6)                                             # six of the eight rows are positive
        shown += chosen
        times += sum(key in mirrored for key in keys)
    assert sorted(shown) == sorted(rows.tolist() * 8) and sorted(shown[:8]) == rows.tolist()     # each once in a pass
    assert 16 < times < 48                                                                       # of 64; the standard deviation is 4


def test_a_slice_has_one_probability_whatever_else_is_in_the_batch(tmp_path):
    images, subjects, labels = patients(6, 2, 0)
    images, run = two_channels(images), start(tmp_path)
    targets = np.array([labels[name] for name in subjects], np.float32)
    model = C.train_classifier(run, images, targets, np.arange(8), "stage", 2, 4, 1e-3, 4)
    together, alone = C.classify(run, model, images, np.arange(12)), C.classify(run, model, images, np.arange(12), batch=1)
    assert together == pytest.approx(alone, abs=1e-6) and together.shape == (12,) and len(set(together.round(5))) > 6
    assert C.classify(run, model, images, np.array([7, 2])) == pytest.approx(together[[7, 2]], abs=1e-6)
    assert 0 < together.min() and together.max() < 1


# ---- cross-validation ------------------------------------------------------------------------------------------------


def test_no_subject_is_in_training_and_test_of_one_fold(tmp_path, monkeypatch):
    images, subjects, labels = patients(11, 3, 0)
    shuffled = np.random.default_rng(1).permutation(len(subjects))                               # slices need not stand together
    images, subjects = two_channels(images)[shuffled], subjects[shuffled]
    trained, tested = [], []
    train, classify = C.train_classifier, C.classify

    def spy(run, images, targets, rows, stage, epochs, *rest):
        trained.append(rows)
        return train(run, images, targets, rows, stage, 0, *rest)                                # one step
    monkeypatch.setattr(C, "train_classifier", spy)
    monkeypatch.setattr(C, "classify", lambda run, model, images, rows: tested.append(rows) or classify(run, model, images, rows))
    found = C.cross_validate_classifier(start(tmp_path), images, subjects, labels, **FAST)
    assert len(trained) == len(tested) == 5
    assert sorted(np.concatenate(tested)) == list(range(33))
    for before, after in zip(trained, tested):
        assert not set(subjects[before]) & set(subjects[after]) and sorted([*before, *after]) == list(range(33))
    for fold in found["folds"]:
        assert sum(labels[name] for name in fold["subjects"]) in (1, 2) and len(fold["subjects"]) in (2, 3)


def test_an_obvious_label_is_learned(tmp_path):
    images, subjects, labels = patients(14, 4, 0)
    found = C.cross_validate_classifier(start(tmp_path), two_channels(images), subjects, labels, **FAST)
    assert found["auc"] > 0.9 and found["auc_pooled"] > 0.9 and found["acc"] > 0.8, found


@pytest.mark.slow
def test_labels_without_a_trace_in_the_images_stay_at_chance(tmp_path):
    """A patient's own pattern would give the label away if slices of one patient were on both sides."""
    images, subjects, _ = patients(24, 4, 1)
    drawn = dict(zip(dict.fromkeys(subjects), np.random.default_rng(0).permutation([0, 1] * 12).tolist()))
    found = C.cross_validate_classifier(start(tmp_path), two_channels(images), subjects, drawn, **FAST)
    assert abs(found["auc_pooled"] - 0.5) < 2.5 * C.standard_error(0.5, 12, 12), found


@pytest.mark.slow
def test_the_second_channel_is_what_helps(tmp_path):
    images, subjects, labels = patients(24, 3, 2)
    blind = (0.1 * np.random.default_rng(0).random(images.shape)).astype(np.float16)
    settings = {**FAST, "epochs": 10, "batch": 4, "count": 2}
    with_b = C.cross_validate_classifier(start(tmp_path), two_channels(blind, images), subjects, labels, **settings)
    alone = C.cross_validate_classifier(start(tmp_path), two_channels(blind), subjects, labels, **settings)
    assert with_b["auc"] > 0.9 and alone["auc"] < 0.8, (with_b["auc"], alone["auc"])
    assert [fold["subjects"] for fold in with_b["folds"]] == [fold["subjects"] for fold in alone["folds"]]


def test_the_same_seed_gives_the_same_bits(tmp_path):
    images, subjects, labels = patients(10, 2, 3)
    images = two_channels(images)

    def run(seed, before):
        torch.manual_seed(before)                                                                # what happened before must not matter
        np.random.seed(before)
        return C.cross_validate_classifier(start(tmp_path, seed), images, subjects, labels, **{**FAST, "epochs": 1})
    one, same, other = run(0, 1), run(0, 2), run(1, 1)
    assert one == same and one["folds"] != other["folds"] and one["probability"] != other["probability"]
    turned = C.cross_validate_classifier(start(tmp_path), images, subjects, dict(reversed(labels.items())), **{**FAST, "epochs": 1})
    assert turned == one
