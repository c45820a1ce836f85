"""The segmenter that judges synthetic images: labels, loss and Dice by hand; what training sees; a toy task; exact resume."""
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from common import downstream as D
from common.run import Run

CLASSES = (0, 4, 1)                                         # neither sorted nor without gaps


def start(folder):
    return Run("test", SimpleNamespace(), SimpleNamespace(out=folder, seed=0, device="cpu", precision="auto", train=True))


def shapes(n, seed, size=32):
    """Noisy slices with a disc (label 1) and a square (label 4) of one brightness and area: only the outline tells them
    apart.  Returns (n, size, size) images and labels."""
    g = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    labels = np.zeros((n, size, size), np.int16)
    for k in range(n):
        (a, b), (left, right) = g.integers(7, size - 7, (2,)), (g.integers(7, 10), g.integers(size - 10, size - 7))
        left, right = (left, right) if g.random() < 0.5 else (right, left)
        labels[k][(y - a) ** 2 + (x - left) ** 2 <= 5.6 ** 2] = 1
        labels[k][np.maximum(abs(y - b), abs(x - right)) <= 4.5] = 4
    return np.clip(0.2 + 0.5 * (labels > 0) + 0.05 * g.standard_normal(labels.shape), 0, 1).astype(np.float16), labels


# ---- labels, loss, Dice ----------------------------------------------------------------------------------------------


def test_places_follow_the_order_of_the_classes():
    labels = np.array([[4, 0, 1], [1, 1, 4]], np.float32)
    assert D.class_places(labels, (0, 4, 1)).tolist() == [[1, 0, 2], [2, 2, 1]]
    assert D.class_places(labels, (1, 0, 4)).tolist() == [[2, 1, 0], [0, 0, 2]]
    with pytest.raises(ValueError, match="hold 4.*none of the classes"):
        D.class_places(labels.astype(int), (0, 1, 2))


def test_loss_by_hand():
    p = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.7, 0.2, 0.1]])       # three pixels, three classes
    loss, facts = D.segmentation_loss(p.log().T[None, :, None], torch.tensor([[[0, 1, 0]]]))
    cross_entropy = -(math.log(0.6) + math.log(0.5) + math.log(0.7)) / 3
    soft_dice = (2 * 1.3 / (1.5 + 2) + 2 * 0.5 / (1.0 + 1)) / 2                 # class 2 is absent
    assert facts["cross_entropy"].item() == pytest.approx(cross_entropy) and not facts["soft_dice"].requires_grad
    assert facts["soft_dice"].item() == pytest.approx(soft_dice)
    assert loss.item() == pytest.approx(cross_entropy + 1 - soft_dice)
    spread, _ = D.segmentation_loss(p.log()[:, :, None, None], torch.tensor([0, 1, 0])[:, None, None])
    assert spread.item() == pytest.approx(loss.item())                          # over the batch, not slice by slice
    changed, _ = D.segmentation_loss(p.log().T[None, :, None], torch.tensor([[[1, 0, 0]]]))
    assert changed.item() > loss.item() + 0.3


def test_a_class_that_is_absent_and_never_predicted_does_no_harm():
    logits = torch.zeros(1, 3, 2, 2)
    logits[:, 2] = -1000                                                        # its softmax is exactly 0
    logits.requires_grad_()
    loss, facts = D.segmentation_loss(logits, torch.tensor([[[0, 0], [1, 1]]]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) + 0.5) and facts["soft_dice"].item() == pytest.approx(0.5)
    assert torch.isfinite(logits.grad).all() and logits.grad.any()


def test_dice_by_hand():
    truth = [[[1, 1], [1, 0]], [[0, 0], [0, 0]], [[1, 0], [0, 4]]]
    predicted = [[[1, 1], [0, 0]], [[4, 0], [0, 0]], [[0, 1], [1, 4]]]
    # a: its two slices hold 3 + 1 pixels of class 1, 2 + 2 are predicted, 2 + 0 agree; slice by slice it would be 0.4
    assert D.dice(truth, predicted, ["a", "b", "a"], (4, 1)) == {4: {"a": 1.0, "b": 0.0}, 1: {"a": 0.5}}
    assert D.dice(predicted, truth, ["a", "a", "b"], (1,)) == {1: {"a": 0.8, "b": 0.0}}
    assert D.dice(truth, predicted, ["a", "b", "a"], (2,)) == {2: {}}


def test_rows_of_dice_average_over_the_classes_that_a_subject_has():
    truth = np.array([[[1, 1], [4, 0]], [[1, 0], [0, 0]]])
    found = np.array([[[1, 0], [4, 4]], [[1, 0], [0, 0]]])
    rows = {r["metric"]: r for r in D.dice_rows("a->b", "M", truth, found, ["s", "t"], CLASSES)}
    assert set(rows) == {"dice", "dice 1", "dice 4"} and rows["dice"]["task"] == "a->b" and rows["dice"]["method"] == "M"
    assert rows["dice 1"]["values"] == pytest.approx({"s": 2 / 3, "t": 1.0}) and rows["dice 4"]["values"] == pytest.approx({"s": 2 / 3})
    assert rows["dice"]["values"] == pytest.approx({"s": 2 / 3, "t": 1.0}) and rows["dice"]["n"] == 2


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one name per slice"):
        D.dice(np.zeros((2, 8, 8)), np.zeros((2, 8, 8)), ["a"], (1,))
    with pytest.raises(ValueError, match="one shape"):
        D.dice(np.zeros((2, 8, 8)), np.zeros((2, 8, 4)), ["a", "b"], (1,))
    run = start(tmp_path)
    for images, labels in (((2, 8, 8), (3, 8, 8)), ((2, 10, 8), (2, 10, 8)), ((2, 1, 8, 8), (2, 1, 8, 8))):
        with pytest.raises(ValueError, match="divisible by 4"):
            D.train_segmenter(run, np.zeros(images), np.zeros(labels, int), CLASSES, 1, 2)


# ---- segmenter -------------------------------------------------------------------------------------------------------


def test_segment_gives_the_numbers_of_the_classes():
    class Nearest(nn.Module):
        """Class 0 for dark, 1 for grey, 2 for bright pixels."""
        classes = (4, 0, 1)

        def __init__(self):
            super().__init__()
            self.levels = nn.Parameter(torch.tensor([0, 0.5, 1]).view(3, 1, 1))

        def forward(self, x):
            return -(x - self.levels) ** 2

    values = np.random.default_rng(0).integers(3, size=(5, 4, 6))
    found = D.segment(Nearest(), (values / 2).astype(np.float16), batch=2)
    assert np.array_equal(found, np.array([4, 0, 1])[values])


def test_training_sees_slices_with_their_own_labels_mirrored_half_the_time(tmp_path, monkeypatch):
    places = np.random.default_rng(0).integers(3, size=(16, 8, 8))
    seen, forward, loss = [], D.Segmenter.forward, D.segmentation_loss
    monkeypatch.setattr(D.Segmenter, "forward", lambda self, x: seen.append(x[:, 0]) or forward(self, x))
    monkeypatch.setattr(D, "segmentation_loss", lambda logits, y: seen.append(y) or loss(logits, y))
    D.train_segmenter(start(tmp_path), places / 2, np.array(CLASSES)[places], CLASSES, 4, batch=16)
    upright = {p.tobytes(): k for k, p in enumerate(places)}
    mirrored = {p[:, ::-1].tobytes(): k for k, p in enumerate(places)}
    times = 0
    for x, y in zip(seen[::2], seen[1::2]):
        assert torch.equal(2 * x, y.float())
        shown = [p.numpy().tobytes() for p in y]
        assert sorted(upright.get(p, mirrored.get(p)) for p in shown) == list(range(16))        # each once in a pass
        times += sum(p in mirrored for p in shown)
    assert len(seen) == 8 and 16 < times < 48               # of 64; the standard deviation is 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return D.train_segmenter(start(tmp_path_factory.mktemp("toy")), *shapes(64, 0), CLASSES, 60, batch=8, lr=3e-3)


@pytest.mark.slow
def test_discs_and_squares_are_told_apart_on_unseen_slices(trained):
    images, truth = shapes(24, 99)
    scores = D.dice(truth, D.segment(trained, images), np.repeat(list("abcdef"), 4), (1, 4))
    assert all(list(scores[name]) == list("abcdef") and min(scores[name].values()) > 0.9 for name in (1, 4)), scores


def stop_after(run, steps):
    """The run gets a signal in the step of this number from now."""
    update, left = run.update, iter(reversed(range(steps)))

    def stopping(loss, optimiser):
        update(loss, optimiser)
        run.stop = None if next(left) else signal.SIGTERM

    run.update = stopping


def test_stopped_and_resumed_equals_undisturbed(tmp_path):
    def weights_after(folder, *stops):
        for steps in stops:
            run = start(folder)
            run.load()
            stop_after(run, steps)
            torch.manual_seed(steps)                        # what happened before must not matter
            with pytest.raises(SystemExit):
                D.train_segmenter(run, images, labels, CLASSES, 5, batch=4)
            run.close()
        run = start(folder)
        run.load()
        weights = D.train_segmenter(run, images, labels, CLASSES, 5, batch=4).state_dict()
        run.close()
        return weights

    images, labels = (array[:, ::2, ::2] for array in shapes(6, 1))
    straight, disturbed = weights_after(tmp_path / "a"), weights_after(tmp_path / "b", 2, 3)
    assert all(torch.equal(straight[name], disturbed[name]) for name in straight)
    run = start(tmp_path / "b")
    run.load()
    again = D.train_segmenter(run, images, labels, CLASSES, 5, batch=4)
    assert all(torch.equal(straight[name], value) for name, value in again.state_dict().items())
    assert not any(p.requires_grad for p in again.parameters()) and not again.training


# ---- cross-validation ------------------------------------------------------------------------------------------------


FAST = {"base": 8, "mult": (1, 2), "epochs": 8, "lr": 5e-3, "batch": 8}


def squares(n, slices, seed, size=16):
    """Noisy slices of n subjects with a bright square; returns images, masks (n * slices, size, size) and names."""
    g = np.random.default_rng(seed)
    masks = np.zeros((n * slices, size, size), bool)
    for mask in masks:
        a, b = g.integers(2, size - 6, 2)
        mask[a:a + 5, b:b + 5] = True
    images = 0.3 + 0.4 * masks + 0.1 * g.standard_normal(masks.shape)
    return np.clip(images, 0, 1).astype(np.float16), masks, np.repeat([f"s{k:02}" for k in range(n)], slices)


def test_folds_hold_every_subject_once_and_their_share_of_each_label():
    run = SimpleNamespace(seed=0)
    subjects = np.repeat([f"p{k:02}" for k in range(43)], 3)
    labels = {f"p{k:02}": int(k < 13) for k in range(43)}
    folds = D.divide(run, subjects, 5, labels)
    assert sorted(name for fold in folds for name in fold) == sorted(labels)
    assert sorted(len(fold) for fold in folds) == [8, 8, 9, 9, 9]
    for seed in range(10):                                                      # one seed may be even by chance
        dealt = D.divide(SimpleNamespace(seed=seed), subjects, 5, labels)
        assert sorted(sum(labels[name] for name in fold) for fold in dealt) == [2, 2, 3, 3, 3]
        assert sorted(len(fold) for fold in dealt) == [8, 8, 9, 9, 9]
    assert folds == D.divide(run, subjects[::-1], 5, labels)                    # the order of the slices does not matter
    assert folds != D.divide(SimpleNamespace(seed=1), subjects, 5, labels)
    plain = D.divide(run, subjects, 4)
    assert sorted(name for fold in plain for name in fold) == sorted(labels) and sorted(map(len, plain)) == [10, 11, 11, 11]
    assert all(fold != sorted(fold) for fold in plain)                          # at random
    with pytest.raises(ValueError, match="4 subjects cannot fill 5 folds"):
        D.divide(run, list("abcd") * 5, 5)


def test_channels_and_steps_by_hand():
    a, b = np.zeros((3, 2, 4)), np.ones((3, 2, 4))
    both, alone = D.two_channels(a, b), D.two_channels(b)
    assert both.shape == alone.shape == (3, 2, 2, 4) and alone.all() and both[:, 1].all() and not both[:, 0].any()
    assert D.steps_of(3, 10, 8) == 4 and D.steps_of(0.1, 4, 16) == 1 and D.steps_of(2, 8, 8) == 2


def test_scores_of_folds_and_subjects_by_hand():
    masks, found = np.zeros((2, 5, 2, 4), np.uint8)
    masks[0, 0, :3] = 1                 # subject a: 3 true, 2 found, 2 of them right
    found[0, 0, :2] = 1
    masks[1, 1] = 1                     # subject b: 4 + 1 true, 2 + 2 found, 2 + 0 right
    found[1, 1, :2] = 1
    masks[2, 0, 0] = 1
    found[2, 0, 1:3] = 1
    found[3, 1, 1] = 1                  # subject c: nothing true, 1 found; subject d: nothing at all
    result = D.overlaps(masks, found, np.array(list("abbcd")), [["b", "a"], ["c"], ["d"]])
    assert result["by_subject"]["dice"] == pytest.approx({"a": 4 / 5, "b": 4 / 9, "c": 0})
    assert result["by_subject"]["jaccard"] == pytest.approx({"a": 2 / 3, "b": 2 / 7, "c": 0})
    assert [fold["subjects"] for fold in result["folds"]] == [["b", "a"], ["c"], ["d"]]
    pooled, wrong, empty = result["folds"]
    assert pooled["dice"] == pytest.approx(8 / 14) and pooled["jaccard"] == pytest.approx(4 / 10)       # 8 true, 6 found, 4 right
    assert (wrong["dice"], wrong["jaccard"]) == (0, 0) and math.isnan(empty["dice"]) and math.isnan(empty["jaccard"])
    assert result["dice"] == pytest.approx(4 / 14) and result["jaccard"] == pytest.approx(2 / 10)
    assert result["masks"].dtype == bool and np.array_equal(result["masks"], found > 0)
    rows = D.segmentation_rows("pre->post", "M", result)
    assert [(r["metric"], r.get("variant")) for r in rows] == [("dice", None), ("dice", "mean of folds"), ("jaccard", None), ("jaccard", "mean of folds")]
    assert rows[0]["values"] == result["by_subject"]["dice"] and rows[2]["values"] == result["by_subject"]["jaccard"]
    assert rows[1]["values"] == {"fold 1": pooled["dice"], "fold 2": 0} and rows[1]["mean"] == result["dice"] and rows[1]["unit"] == "fold"
    assert rows[3]["mean"] == result["jaccard"] and {(r["task"], r["method"]) for r in rows} == {("pre->post", "M")}


def test_jaccard_follows_from_dice_for_voxels_that_count_together():
    truth, found = np.random.default_rng(0).random((2, 7, 8, 8)) < 0.3
    fold = D.overlaps(truth, found, np.array(list("aabbccc")), [list("abc")])["folds"][0]
    assert fold["jaccard"] == pytest.approx((truth & found).sum() / (truth | found).sum())
    assert fold["jaccard"] == pytest.approx(fold["dice"] / (2 - fold["dice"]))
    assert fold["dice"] == pytest.approx(2 * (truth & found).sum() / (truth.sum() + found.sum()))


def test_no_subject_is_in_training_and_test_of_one_segmenter(tmp_path, monkeypatch):
    images, masks, subjects = squares(7, 3, 0)
    shuffled = np.random.default_rng(1).permutation(len(subjects))                      # slices need not stand together
    images, masks, subjects = images[shuffled], masks[shuffled], subjects[shuffled]
    trained, tested, loss, segment = [set()], [], D.step_loss, D.segment
    places = {image.tobytes(): k for k, image in enumerate(images)}

    def spy(run, model, pairs, labels, rows, stage, step):
        if stage != getattr(spy, "stage", stage):
            trained.append(set())
        spy.stage = stage
        trained[-1] |= set(rows.tolist())
        assert np.array_equal(labels, masks)
        return loss(run, model, pairs, labels, rows, stage, step)
    monkeypatch.setattr(D, "step_loss", spy)
    monkeypatch.setattr(D, "segment", lambda model, part: tested.append([places[pair[0].tobytes()] for pair in part]) or segment(model, part))
    D.cross_validate_segmenter(start(tmp_path), D.two_channels(images), masks, subjects, **{**FAST, "epochs": 1})
    assert len(trained) == len(tested) == 5 and sorted(sum(tested, [])) == list(range(21))
    for before, after in zip(trained, tested):
        assert not set(subjects[list(before)]) & set(subjects[after]) and sorted([*before, *after]) == list(range(21))


@pytest.mark.slow
def test_bright_squares_are_found_in_subjects_that_were_not_seen(tmp_path):
    images, masks, subjects = squares(10, 4, 0)
    result = D.cross_validate_segmenter(start(tmp_path), D.two_channels(images), masks, subjects, **FAST)
    assert result["dice"] > 0.9 and len(result["folds"]) == 5 and min(result["by_subject"]["dice"].values()) > 0.8, result["folds"]
    assert list(result["by_subject"]["dice"]) == [f"s{k:02}" for k in range(10)]
    assert (result["masks"] == masks).mean() > 0.97


@pytest.mark.slow
def test_the_second_channel_is_what_helps(tmp_path):
    images, masks, subjects = squares(10, 3, 2)
    blind = np.random.default_rng(0).random(images.shape).astype(np.float16)
    with_b = D.cross_validate_segmenter(start(tmp_path / "b"), D.two_channels(blind, images), masks, subjects, **FAST)
    alone = D.cross_validate_segmenter(start(tmp_path / "a"), D.two_channels(blind), masks, subjects, **FAST)
    assert with_b["dice"] > 0.8 and alone["dice"] < 0.6, (with_b["dice"], alone["dice"])
    assert [fold["subjects"] for fold in with_b["folds"]] == [fold["subjects"] for fold in alone["folds"]]


def test_cross_validation_gives_the_same_bits_again_and_saves_nothing(tmp_path):
    def once(folder, before):
        run = start(folder)
        torch.manual_seed(before)                           # what happened before must not matter
        result = D.cross_validate_segmenter(run, D.two_channels(images), masks, subjects, **{**FAST, "epochs": 1})
        run.close()
        return result, run.stages, {path.name for path in folder.iterdir()}
    images, masks, subjects = squares(6, 2, 3)
    one, stages, files = once(tmp_path / "one", 1)
    other, *_ = once(tmp_path / "other", 2)
    assert np.array_equal(one.pop("masks"), other.pop("masks")) and one == other and one["dice"] > 0
    assert stages == {} and "last.pt" not in files


def test_stacks_that_do_not_fit_are_refused(tmp_path):
    run, images, masks, names = start(tmp_path), np.zeros((10, 2, 8, 8)), np.ones((10, 8, 8)), list("abcdefghij")

    def refused(match, images=images, masks=masks, subjects=names):
        with pytest.raises(ValueError, match=match):
            D.cross_validate_segmenter(run, images, masks, subjects)
    refused("one name per slice", subjects=names[1:])
    refused("one name per slice", images=images[:, 0])
    refused("from 0 to 255; they must lie in", images=images + 255 * np.eye(8))
    refused("from nan to nan", images=np.where(np.eye(8) > 0, np.nan, images))
    refused("divisible by 8", images=images[..., :4], masks=masks[..., :4])
    refused("divisible by 8", masks=masks[:, :4])
    refused("0 and 1, and not 0 alone", masks=2 * masks)
    refused("0 and 1, and not 0 alone", masks=0 * masks)
    refused("2 subjects cannot fill 5 folds", subjects=list("ababababab"))
