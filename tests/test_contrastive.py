"""common/contrastive.py against closed forms, torch's cross-entropy, and numbers worked by hand."""
import math

import pytest
import torch
from torch.nn import functional as F

from common import contrastive as C


@pytest.mark.parametrize("B, s", [(2, 1.0), (2, 14.0), (9, 3.0)])
def test_infonce_of_perfect_features(B, s):
    expected = math.log(1 + (B - 1) * math.exp(-s))
    assert C.contrastive_loss(s * torch.eye(B), torch.arange(B)).item() == pytest.approx(expected, abs=1e-6)
    instance = C.instance_loss(3 * torch.eye(B), torch.eye(B), s, torch.arange(B))
    assert instance.item() == pytest.approx(expected, abs=1e-6)


def test_different_groups_give_cross_entropy_both_ways():
    torch.manual_seed(0)
    logits = 4 * torch.randn(6, 6)
    expected = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    assert C.contrastive_loss(logits, torch.randperm(6)).item() == pytest.approx(expected.item(), rel=1e-6)
    assert C.loss_floor(torch.arange(6)).item() == 0


def test_equal_captions_are_positives_of_each_other():
    flat = torch.zeros(5, 5, requires_grad=True)
    loss = C.contrastive_loss(flat, torch.zeros(5, dtype=torch.int64))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(5)) and flat.grad.abs().max() < 1e-7
    groups = torch.tensor([0, 1, 0, 2, 1, 0])
    perfect = 50.0 * (groups[:, None] == groups[None])
    assert C.loss_floor(groups).item() == pytest.approx((3 * math.log(3) + 2 * math.log(2)) / 6)
    assert C.contrastive_loss(perfect, groups).item() == pytest.approx(C.loss_floor(groups).item(), abs=1e-5)
    # by hand: rows [2, 0, 1], groups (a, a, b): -log p of row 0 = ln(e^2+1+e) - (2+0)/2, ...
    logits = torch.tensor([[2.0, 0, 1], [0, 2, 0], [1, 0, 3]])
    e = math.e
    rows = math.log(e ** 2 + 1 + e) - 1 + math.log(2 + e ** 2) - 1 + math.log(e + 1 + e ** 3) - 3
    columns = math.log(e ** 2 + 1 + e) - 1 + math.log(1 + e ** 2 + 1) - 1 + math.log(e + 1 + e ** 3) - 3
    assert C.contrastive_loss(logits, torch.tensor([7, 7, 1])).item() == pytest.approx((rows + columns) / 6, rel=1e-6)


def test_instance_loss_finds_the_same_slice_and_spares_its_repeats():
    a = torch.eye(4)
    assert C.instance_loss(a, a, 10.0, torch.arange(4)) < 0.01
    assert C.instance_loss(a, a.roll(1, 0), 10.0, torch.arange(4)) > 5
    twice = a[[0, 1, 2, 2]]
    loss = C.instance_loss(twice, twice, 40.0, torch.tensor([0, 1, 2, 2]))
    assert loss.item() == pytest.approx(math.log(2) / 2, abs=1e-5)


def test_logits_keep_float32_under_autocast():
    torch.manual_seed(0)
    a, b = torch.randn(5, 64), torch.randn(7, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = C.cosines(a.bfloat16(), b)
    assert inside.dtype == torch.float32 and torch.equal(inside, C.cosines(a.bfloat16(), b))
    expected = F.cosine_similarity(a[1].bfloat16().float(), b[2], dim=0).item()
    assert inside[1, 2].item() == pytest.approx(expected, abs=1e-5)


def test_retrieval_by_hand():
    a = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    b = torch.tensor([[0.1, 0.0], [3, 0.1], [2, 2]])            # row 0 and 2 find themselves; row 1 does not
    assert C.retrieval(a, b) == pytest.approx(2 / 3)
    torch.manual_seed(0)
    many = torch.randn(2500, 16)
    assert C.retrieval(many, 5 * many) == 1 and C.retrieval(many, many.roll(1, 0)) == 0
