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
