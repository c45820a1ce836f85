"""MetaDB's equations against numbers computed by hand, closed forms and Monte-Carlo estimates."""
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toys
from conftest import ROOT
from torch import nn
from toys import weights

import data
import metadb
from common import clip, embeddings, encoder, script
from common.files import RunError
from common.loop import cosine_rate
from common.run import Run
from data import phantom
from metadb import Bridge

TABLE = {
    "m": [0, .07950, .16903, .26884, .37912, .5, .62088, .73116, .83097, .92050, 1],
    "soft": [0, .29109, .42190, .52872, .62369, .71126, .79815, .87193, .93546, .99048, 1.07603],
    "hard": [0, .30340, .42285, .50341, .55457, .57554, .55457, .50341, .42285, .30340, 0],
    "ddbm a": [1, .9801, .9405, .8819, .8049, .7105, .5995, .4727, .3306, .1733, 0],
    "ddbm": [0, .1400, .2376, .3254, .4016, .4625, .5036, .5179, .4932, .4016, 0],
}
NAMES = ("hard", "soft", "ddbm", "ddpm")


def images(n=4, size=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, size, size, generator=g) * 2 - 1


# ---- bridge -----------------------------------------------------------------------------------------------------------

def test_bridge_tables():
    for name in ("hard", "soft"):
        b = Bridge(name, 10)
        assert b.m.tolist() == pytest.approx(TABLE["m"], abs=1e-5) and torch.allclose(b.a + b.m, torch.ones(11, dtype=torch.float64))
        assert b.delta.tolist() == pytest.approx(TABLE[name], abs=1e-5)
    b = Bridge("ddbm", 10)
    assert b.a.tolist() == pytest.approx(TABLE["ddbm a"], abs=1e-4) and b.delta.tolist() == pytest.approx(TABLE["ddbm"], abs=1e-4)
    b = Bridge("ddpm", 4)
    assert not b.m.any() and torch.allclose(b.a ** 2 + b.delta ** 2, torch.ones(5, dtype=torch.float64))
    assert float(b.a[2] ** 2) == pytest.approx(math.exp(-0.5 * 0.25 * 19.9 - 0.05))


@pytest.mark.parametrize("N", [1, 2, 5, 20, 100])
def test_noise_does_not_depend_on_the_number_of_steps(N):
    """The end-point noise of the soft bridge is sqrt(sum of betas) = 1.076 for every N; the middle of the hard one .5755 for even N."""
    soft, hard = Bridge("soft", N), Bridge("hard", N)
    assert float(soft.delta[N]) == pytest.approx(1.07603, abs=1e-4)
    assert float(hard.delta[0]) == float(hard.delta[N]) == 0 and float(hard.m[0]) == 0 and float(hard.m[N]) == 1
    assert torch.allclose(hard.m + hard.m.flip(0), torch.ones(N + 1, dtype=torch.float64)) and (hard.m.diff() > 0).all()
    assert all(torch.isfinite(getattr(b, k)).all() for b in (soft, hard) for k in ("a", "m", "delta", "c", "v"))


def test_end_points():
    x0, y, eps = images(seed=1), images(seed=2), torch.randn(4, 1, 16, 16)
    zero, last = torch.zeros(4, dtype=torch.long), torch.full((4,), 10)
    for name in NAMES:
        assert torch.allclose(Bridge(name, 10).q_sample(zero, x0, y, eps), x0, atol=1e-6)
    assert torch.allclose(Bridge("hard", 10).q_sample(last, x0, y, eps), y, atol=1e-6)
    assert torch.allclose(Bridge("soft", 10).q_sample(last, x0, y, eps), y + 1.07603 * eps, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_posterior_steps_compose_to_the_marginals(name, eta):
    """Variance of the residual noise, pushed down from step N, stays delta_t^2 at every step."""
    b = Bridge(name, 10, eta)
    variance = b.delta[10] ** 2
    for t in range(10, 0, -1):
        variance = b.c[t] ** 2 * variance + b.v[t]
        assert float(variance) == pytest.approx(float(b.delta[t - 1] ** 2), abs=1e-9)
        if b.delta[t] > 0:                                  # the share of new noise: DBIM's rho = eta rho(Markov)
            assert float(b.v[t].sqrt()) == pytest.approx(eta * float(Bridge(name, 10).v[t].sqrt()), abs=1e-12)


def test_markov_coefficients_of_the_soft_bridge():
    b = Bridge("soft", 10)
    assert b.c[1:].tolist() == pytest.approx([0, .4297, .5603, .6102, .6192, .6021, .5942, .5463, .4195, 0], abs=1e-4)
    assert b.v[1:].sqrt().tolist() == pytest.approx([0, .2277, .3004, .3670, .4416, .5243, .6071, .7065, .8381, .9905], abs=1e-4)


def test_ddbm_variance_is_the_bridge_formula():
    """v_t = alpha^2 rho^2 (1 - rho^2 / rho_s^2), alpha and rho at t - 1, rho_s at t."""
    b = Bridge("ddbm", 10)
    for step in range(2, 10):
        t, s = (step - 1) / 10, step / 10
        alpha2 = math.exp(-0.1 * t - t ** 2)
        rho2, rho2_s = math.exp(0.1 * t + t ** 2) - 1, math.exp(0.1 * s + s ** 2) - 1
        assert float(b.v[step]) == pytest.approx(alpha2 * rho2 * (1 - rho2 / rho2_s), abs=1e-12)


@pytest.mark.parametrize("name", ["hard", "soft"])
def test_neighbouring_states_have_the_right_joint_distribution(name):
    """Monte Carlo: x_t by Eq. (1), then x_{t-1} by the posterior with the true x0: mean, spread and correlation."""
    b, n, t = Bridge(name, 10), 200_000, 5
    g = torch.Generator().manual_seed(0)
    x0, y = torch.full((n, 1, 1, 1), 0.3), torch.full((n, 1, 1, 1), -0.6)
    at = torch.full((n,), t)
    x_t = b.q_sample(at, x0, y, torch.randn(n, 1, 1, 1, generator=g))
    x_prev = b.posterior(at, x_t, x0, y, torch.randn(n, 1, 1, 1, generator=g))
    delta, before = float(b.delta[t]), float(b.delta[t - 1])
    assert float(x_prev.mean()) == pytest.approx(float(b.a[t - 1]) * 0.3 - float(b.m[t - 1]) * 0.6, abs=0.01 * before)
    assert float(x_prev.std()) == pytest.approx(before, rel=0.01)
    both = torch.corrcoef(torch.stack([x_t.flatten(), x_prev.flatten()]))[0, 1]
    kappa = float(b.a[t] / b.a[t - 1]) * before ** 2 / delta ** 2
    assert float(both) == pytest.approx(kappa * delta / before, abs=0.01)
    if name == "soft":
        assert float(both) == pytest.approx(0.7062, abs=0.01)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_perfect_generator_is_followed_exactly(name, eta):
    """The last step returns the prediction whatever the posterior, so the states on the way are compared with Eq. (1) too."""
    x0, y, g, states = images(64, seed=1), images(64, seed=2), torch.Generator().manual_seed(0), []
    b = Bridge(name, 10, eta)

    def perfect(x_t, t, y, text):
        states.append((int(t[0]), x_t))
        return x0
    out = metadb.sample(perfect, b, y, None, lambda: torch.randn(y.shape, generator=g))
    assert torch.allclose(out, x0, atol=1e-6) and [t for t, _ in states] == list(range(10, 0, -1))
    for t, x_t in states:
        rest = x_t - float(b.a[t]) * x0 - float(b.m[t]) * y
        assert float(rest.std()) == pytest.approx(float(b.delta[t]), rel=0.03, abs=1e-6) and abs(float(rest.mean())) < 0.03
    assert torch.allclose(metadb.sample(lambda x_t, t, y, text: y, b, y, None, lambda: torch.randn(y.shape, generator=g)), y, atol=1e-6)


# ---- TA-Norm ----------------------------------------------------------------------------------------------------------

def text(dim=8, seed=0, B=3):
    g = torch.Generator().manual_seed(seed)
    e = torch.randn(3, B, dim, generator=g)
    return metadb.Text(e[0], e[1], e[2], torch.randn(B, 5, 12, generator=g), torch.ones(B, 5, dtype=torch.bool))


def shaken(module, seed=0, scale=0.3):
    """Every parameter redrawn: at initialisation zeros would hide what a test is after."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=g) * scale
    return module


def test_ta_norm_starts_as_the_identity_and_follows_equation_3():
    f, e = images(3, 4)[:, :, :, :].expand(3, 6, 4, 4).clone(), text()
    layer = metadb.TANorm(6, 8, "both", share=False)
    assert torch.allclose(layer(f, e), f, atol=1e-6)
    alpha, beta = 0.1 + 0.9 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))             # .893 and .119 at the start
    assert torch.allclose(metadb.TANorm(6, 8, "target", False)(f, e), f * alpha + beta, atol=1e-6)
    shaken(layer)
    w_s, b_s, w_t, b_t = (layer.source.linear.weight, layer.source.linear.bias, layer.target.linear.weight, layer.target.linear.bias)
    raw_s, raw_t = e.e_src @ w_s.T + b_s, e.e_tgt @ w_t.T + b_t
    alpha_s, beta_s = 0.1 + 0.9 * raw_s[:, :6].sigmoid(), raw_s[:, 6:].sigmoid()
    alpha_t, beta_t = 0.1 + 0.9 * raw_t[:, :6].sigmoid(), raw_t[:, 6:].sigmoid()
    by_hand = (f - beta_s[:, :, None, None]) / alpha_s[:, :, None, None] * alpha_t[:, :, None, None] + beta_t[:, :, None, None]
    assert torch.allclose(layer(f, e), by_hand, atol=1e-5)
    for alpha in (alpha_s, alpha_t):
        assert 0.1 < alpha.min() and alpha.max() < 1


def test_a_shared_map_is_undone_by_the_opposite_direction():
    f, e = torch.randn(3, 6, 4, 4), text()
    layer = shaken(metadb.TANorm(6, 8, "both", share=True))
    there = layer(f, e)
    assert torch.allclose(layer(there, e._replace(e_src=e.e_tgt, e_tgt=e.e_src)), f, atol=1e-4)
    assert torch.allclose(layer(f, e._replace(e_tgt=e.e_src)), f, atol=1e-5) and not torch.allclose(there, f, atol=0.1)


def test_one_prompt_alone_does_half_of_it():
    f, e, other = torch.randn(3, 6, 4, 4), text(), text(seed=1)
    source, target = shaken(metadb.TANorm(6, 8, "source", False)), shaken(metadb.TANorm(6, 8, "target", False))
    assert source.target is None and target.source is None
    assert torch.equal(source(f, e), source(f, e._replace(e_tgt=other.e_tgt))) and not torch.equal(source(f, e), source(f, e._replace(e_src=other.e_src)))
    assert torch.equal(target(f, e), target(f, e._replace(e_src=other.e_src))) and not torch.equal(target(f, e), target(f, e._replace(e_tgt=other.e_tgt)))
    alpha, beta = source.source(e.e_src)
    assert torch.allclose(source(f, e), (f - beta) / alpha, atol=1e-6)
    alpha, beta = target.target(e.e_tgt)
    assert torch.allclose(target(f, e), f * alpha + beta, atol=1e-6)


SMALL = dict(size=16, base=8, mult=(1, 2), blocks=1, attention=(8,), head_dim=8, groups=4, disc_base=8)


def generator(**changes):
    torch.manual_seed(0)
    net = metadb.Generator(metadb.Config(**{**SMALL, **changes}), 8, 12)
    return shaken(net, scale=0.1)


def run(net, e, x=None):
    x = images(3) if x is None else x
    return net(x, torch.tensor([1, 5, 10]), images(3, seed=5), e)


def test_prompts_reach_the_generator_only_where_they_should():
    e, other = text(), text(seed=1)
    for conditioning, changes in (("none", False), ("ta", True), ("xattn", True)):
        net = generator(conditioning=conditioning)
        assert torch.allclose(run(net, e), run(net, other), atol=1e-6) != changes, conditioning
    net = generator(conditioning="xattn")
    hidden = e._replace(is_word=torch.tensor([[True] * 4 + [False]] * 3))
    spoiled = hidden._replace(words=torch.cat([hidden.words[:, :4], hidden.words[:, 4:] + 9], dim=1))
    assert torch.allclose(run(net, hidden), run(net, spoiled), atol=1e-6) and not torch.allclose(run(net, hidden), run(net, e), atol=1e-6)


def test_cross_attention_tells_the_words_of_the_source_from_those_of_the_target():
    e, net = text(), generator(conditioning="xattn")
    words, more = torch.randn(2, 3, 4, 12, generator=torch.Generator().manual_seed(3))
    there, back = (e._replace(words=torch.cat(pair, dim=1), is_word=torch.ones(3, 8, dtype=torch.bool)) for pair in ((words, more), (more, words)))
    assert not torch.allclose(run(net, there), run(net, back), atol=1e-5)


def test_ta_norm_sits_in_every_block_on_the_way_down_and_up():
    for name, count in (("ta", 2 * (1 + 2)), ("none", 0), ("xattn", 0)):
        net = generator(conditioning=name)
        assert sum(isinstance(m, metadb.TANorm) for m in net.modules()) == count
    base = sum(p.numel() for p in generator(conditioning="none").parameters())
    ta = sum(p.numel() for p in generator().parameters())
    widths = [8, 16, 16, 16, 8, 8]                                          # down 0, 1; up 1, 1, 0, 0
    assert ta - base == sum(2 * (8 * 2 * c + 2 * c) for c in widths)
    assert sum(p.numel() for p in generator(share=True).parameters()) - base == (ta - base) // 2


def test_recursion_feeds_the_previous_estimate_back():
    net, e = generator(R=2), text()
    seen, unet = [], net.unet.forward
    net.unet.forward = lambda x, t, condition: seen.append(x.clone()) or unet(x, t, condition)
    out = run(net, e)
    assert torch.equal(seen[0][:, :1], images(3)) and torch.equal(seen[0][:, 1:2], images(3, seed=5))      # x_t, y
    assert len(seen) == 2 and not seen[0][:, 2].any() and torch.allclose(seen[1][:, 2:], torch.tanh(unet(seen[0], 1000 * torch.tensor([1, 5, 10]) / 10, e)), atol=1e-6)
    assert torch.equal(seen[0][:, :2], seen[1][:, :2]) and out.abs().max() < 1
    x = images(3).requires_grad_()
    net.R = 1
    assert not torch.allclose(run(net, e, x), out, atol=1e-4)


# ---- SR-Net and losses ------------------------------------------------------------------------------------------------

def test_pooling_is_mean_and_maximum_of_squares():
    net, x = metadb.SRNet(8, (1, 2)), images(2, 8)
    p = net.pooled(x)
    u = (x + 1) / 2
    assert p.shape == (2, 2 * 5)
    assert float(p[1, 0]) == pytest.approx(float(u[1].mean())) and float(p[1, 1]) == float(u[1].max())
    assert float(p[0, 2 + 1]) == pytest.approx(float(u[0, 0, :4, 4:].mean())) and float(p[0, 6 + 2]) == float(u[0, 0, 4:, :4].max())
    assert metadb.SRNet(8, (1,)).pooled(x).shape == (2, 2)


def test_loss_arithmetic():
    """L1 .5, adversarial ln 2, semantic .4: the total of Eq. (9) is .5733147."""
    x0, made = torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.5, -0.5]]]])
    e_t, e_rec = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    rec, adv, sem = nn.functional.l1_loss(made, x0), metadb.adversarial_loss(torch.zeros(1, 1, 2, 2)), metadb.semantic_loss(e_t, e_rec)
    assert float(rec + 0.1 * adv + 0.01 * sem) == pytest.approx(0.5733147, abs=1e-6)
    assert metadb.semantic_loss(e_t, torch.tensor([[0.9, 0.1]])) < sem                       # closer is better
    assert metadb.adversarial_loss(torch.ones(1)) < adv                                     # D convinced: good for G
    real, fake = torch.tensor([2.0]), torch.tensor([-1.0])
    assert float(metadb.discriminator_loss(real, fake)) == pytest.approx(math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)))


def test_r1_looks_at_the_sample_not_at_its_condition():
    w, u = torch.tensor([[[[3.0, 4.0]]]], requires_grad=True), torch.tensor([[[[7.0, 7.0]]]], requires_grad=True)

    def disc(x_prev, x_t, t):
        return (w * x_prev + u * x_t).sum((1, 2, 3))[:, None]
    x = torch.zeros(5, 1, 1, 2)
    penalty = metadb.r1_penalty(disc, x, x, None)
    penalty.backward()
    assert penalty.item() == pytest.approx(25 / 2) and torch.allclose(w.grad, w) and u.grad is None        # and it can be lowered
    assert metadb.r1_penalty(lambda *pair: disc(*pair).expand(5, 4) / 4, x, x, None).item() == pytest.approx(25 / 8)    # per patch


def test_gradients_go_where_they_belong():
    e, net = text(), metadb.SRNet(8, (1, 2))
    made = images(3).requires_grad_()
    metadb.semantic_loss(e.e_tgt, net(e.e_mask, net.pooled(made))).backward()
    assert made.grad.abs().sum() > 0 and all(p.grad is not None for p in net.parameters()) and e.e_tgt.grad is None


def test_the_discriminator_judges_patches_and_sees_the_time():
    D, x = shaken(metadb.PairDiscriminator(8, 10), scale=0.1), images(2, 32)
    one = D(x, images(2, 32, seed=3), torch.tensor([2, 2]))
    assert one.shape == (2, 1, 4, 4) and not torch.allclose(one, D(x, images(2, 32, seed=3), torch.tensor([9, 9])), atol=1e-5)
    assert not torch.allclose(one, D(images(2, 32, seed=3), x, torch.tensor([2, 2])), atol=1e-5)     # the order of the pair matters


def rate(step, steps, peak):
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=7.0)
    value = cosine_rate(optimiser, step, steps, peak)
    assert optimiser.param_groups[0]["lr"] == value
    return value


def test_learning_rate_falls_along_a_cosine():
    assert rate(0, 100, 1e-3) == pytest.approx(1e-3) and rate(100, 100, 1e-3) == pytest.approx(1e-5)
    assert rate(50, 100, 1e-3) == pytest.approx((1e-3 + 1e-5) / 2)
    assert rate(0, 100, 1e-6) == rate(70, 100, 1e-6) == 1e-6                    # never above what was typed


# ---- the script as a user runs it, on a tiny phantom ------------------------------------------------------------------

TINY = ("--preset demo --size 32 --base 8 --mult 1,2 --attention 16 --head-dim 8 --groups 4 --disc-base 8 --encoder-steps 3 --encoder-batch 8 "
        "--epochs 2 --batch 4 --N 3 --train-fraction 0.5 --test-subjects 3 --test-slices 2").split()


@pytest.fixture(scope="module")
def ixi(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "ixi"
    phantom.make("ixi", folder, subjects=9, size=32, slices=4)
    return folder


def call(monkeypatch, capsys, *words):
    return toys.call(metadb, monkeypatch, capsys, *words)


@pytest.fixture(scope="module")
def trained(ixi, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "metadb"
    return ixi, out, toys.run(metadb, "--data", ixi, "--out", out, *TINY, "--train", "--evaluate")


def test_train_and_evaluate_leave_what_they_promise(trained):
    _, out, text = trained
    rows = {(r["task"], r["method"], r["metric"]): r for r in json.loads((out / "results.json").read_text())["rows"]}
    assert {m for t, m, _ in rows} == {"MetaDB", "copy-source", "mean-of-train", "intensity-lookup"} and {t for t, _, _ in rows} == {"t1->t2"}
    assert rows["t1->t2", "MetaDB", "psnr"]["n"] == 3 and "sem_gain" in text and (out / "samples.png").exists()
    parts = torch.load(out / "last.pt", weights_only=True)["stages"]["bridge"]["parts"]
    assert set(parts) == {"generator", "sr", "best", "discriminator"}
    tried = [entry["validation"] for line in (out / "log.jsonl").read_text().splitlines() if "validation" in (entry := json.loads(line))]
    assert tried and 0 < parts["best"]["loss"] <= min(tried) * (1 + 1e-6)      # the log shows means of several where there was no time


def test_a_step_compares_the_prediction_with_the_target_and_draws_real_pairs_jointly(ixi, tmp_path, monkeypatch, capsys):
    """x0 of every step is the target contrast; it is what the L1 looks at, and x_{t-1} is drawn from (x_t, x0) and from (x_t, x0_hat)."""
    seen, q_sample, posterior, l1 = [], metadb.Bridge.q_sample, metadb.Bridge.posterior, metadb.F.l1_loss

    def watch_q(self, t, x0, y, eps):
        seen.append(["q", x0, y, q_sample(self, t, x0, y, eps), eps, t])
        return seen[-1][3]
    monkeypatch.setattr(metadb.Bridge, "q_sample", watch_q)
    monkeypatch.setattr(metadb.Bridge, "posterior", lambda self, t, x_t, x0, y, eps: (seen.append(["p", x_t, x0, y, eps]), posterior(self, t, x_t, x0, y, eps))[1])
    monkeypatch.setattr(metadb.F, "l1_loss", lambda made, x0: (seen.append(["l1", made, x0]), l1(made, x0))[1])
    status, text = call(monkeypatch, capsys, "--data", ixi, "--out", tmp_path / "run", *TINY, "--epochs", "1", "--train")
    assert status == 0, text
    at = [i for i, entry in enumerate(seen) if entry[0] == "l1"]
    assert len(at) == 4 and {t for i in at for t in seen[i - 1][5].tolist()} == {1, 2, 3}       # of --N 3
    images = data.open_dataset(ixi, ("t1", "t2"), 32, train_fraction=0.5, test_subjects=3, cache=tmp_path / "cache", say=str).images
    for i in at:
        (_, x0, y, x_t, eps, _), (_, made, goal), first, second = seen[i - 1], seen[i], seen[i + 1], seen[i + 2]
        assert torch.corrcoef(torch.stack([e.flatten() for e in (eps, first[4], second[4])])).triu(1).abs().max() < 0.1     # three noises
        assert goal is x0 and first[1] is x_t and first[2] is made and second[1] is x_t and second[2] is x0 and first[3] is second[3] is y
        for c, batch in ((1, x0), (0, y)):
            stored = torch.from_numpy(2 * images[:, c].astype("float32") - 1)
            assert all((stored - b).abs().amax((1, 2)).min() == 0 for b in batch)


@pytest.mark.parametrize("sem_real", [False, True])
def test_what_a_step_minimises(ixi, tmp_path, monkeypatch, capsys, sem_real):
    """Eq. (9) with both weights, R_M on real images where asked for, R1 every tenth step, and which network learns from what."""
    seen = []

    def watch(name):
        real = getattr(metadb, name)
        monkeypatch.setattr(metadb, name, lambda *args: (seen.append((name, real(*args), args[0])), seen[-1][1])[1])
    for name in ("semantic_loss", "adversarial_loss", "discriminator_loss", "r1_penalty"):
        watch(name)
    l1, update, recover, judge = metadb.F.l1_loss, Run.update, metadb.SRNet.forward, metadb.PairDiscriminator.forward
    monkeypatch.setattr(metadb.F, "l1_loss", lambda made, x0: (seen.append(("l1", l1(made, x0), made)), seen[-1][1])[1])
    monkeypatch.setattr(metadb.SRNet, "forward", lambda self, e_mask, f_p: (seen.append(("recover", torch.zeros(()), e_mask, f_p)), recover(self, e_mask, f_p))[1])
    monkeypatch.setattr(metadb.PairDiscriminator, "forward", lambda self, x_prev, x_t, t: (seen.append(("judge", torch.zeros(()), x_prev)), judge(self, x_prev, x_t, t))[1])
    monkeypatch.setattr(Run, "update", lambda self, loss, optimiser, **how: (
        seen.append(("update", loss, sum(len(g["params"]) for g in optimiser.param_groups), optimiser.defaults["betas"], optimiser.param_groups[0]["lr"])),
        update(self, loss, optimiser, **how)))
    monkeypatch.setattr(clip, "train_clip", lambda *args, **how: list(args[0].steps("encoder", 1, {"clip": args[1]})))     # its updates are not looked at
    words = ["--epochs", "3", "--lambda-adv", "0.3", "--lambda-sem", "0.7", *(["--sem-real"] if sem_real else [])]
    status, text = call(monkeypatch, capsys, "--data", ixi, "--out", tmp_path / "run", *TINY, *words, "--train")
    assert status == 0, text
    parts = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["stages"]["bridge"]["parts"]
    starts = [i for i, entry in enumerate(seen) if entry[0] == "l1"]
    assert len(starts) == 12
    for step, (start, end) in enumerate(zip(starts, [*starts[1:], len(seen)])):
        entries = seen[start:end]
        values = {name: [float(e[1].detach()) for e in entries if e[0] == name] for name in {e[0] for e in entries}}
        r1 = values.get("r1_penalty", [])
        assert len(r1) == (step % 10 == 0) and values["update"][0] == pytest.approx(values["discriminator_loss"][0] + sum(r1), rel=1e-5)
        sem, *real, _ = values["semantic_loss"]
        assert len(real) == (2 if sem_real else 0)
        total = values["l1"][0] + 0.3 * values["adversarial_loss"][0] + 0.7 * (sem + sum(real) / 2)
        assert values["update"][1] == pytest.approx(total, rel=1e-5)
        first, second = (e for e in entries if e[0] == "update")
        assert first[2] == len(parts["discriminator"]) and second[2] == len(parts["generator"]) + len(parts["sr"])
        assert first[3] == second[3] == (0.5, 0.9)
        assert first[4] == rate(step, 12, 3e-4) and second[4] == rate(step, 12, 5e-4)
        judged, (e_mask, f_p) = [e[2].requires_grad for e in entries if e[0] == "judge"], next(e[2:] for e in entries if e[0] == "recover")
        assert judged == [False, False, *([True] if r1 else []), True]     # real, made for D; R1's own; made for G, which learns from it
        assert f_p.requires_grad and torch.equal(f_p, metadb.SRNet(8, (1, 2, 4, 8)).pooled(entries[0][2]))      # ... and from the prediction
        e_t = next(e[2] for e in entries if e[0] == "semantic_loss")
        assert not torch.allclose(e_mask, e_t, atol=0.1) and not e_t.requires_grad and not e_mask.requires_grad


@pytest.mark.slow
def test_a_weight_of_zero_builds_nothing(ixi, tmp_path, monkeypatch, capsys):
    status, text = call(monkeypatch, capsys, "--data", ixi, "--out", tmp_path / "run", *TINY, "--lambda-adv", "0", "--lambda-sem", "0", "--train")
    assert status == 0, text
    assert set(torch.load(tmp_path / "run" / "last.pt", weights_only=True)["stages"]["bridge"]["parts"]) == {"generator", "best"}
    assert "sem_gain" not in text and "disc" not in text


@pytest.fixture(scope="module")
def loaded(trained):
    """(config, run, model, data set) of the tiny run, its generator made lively."""
    ixi, out, _ = trained
    cfg, run, ds = toys.open_run(metadb, ixi, out)
    model = metadb.load_model(cfg, run, ds.complete)
    shaken(model.generator, scale=0.1)
    return cfg, run, model, ds


def translated(loaded, keys=("a", "b", "c"), rows=(0, 5, 9)):
    cfg, run, model, ds = loaded
    rows = list(rows)
    y = torch.from_numpy(ds.images[rows].astype("float32"))[:, :1]
    text = model.prompts(ds.subject[rows], [0] * len(rows), [1] * len(rows))
    return metadb.translate(run, model.generator, model.bridge, y, text, [(k, 0) for k in keys])


def test_samples_do_not_depend_on_batch_mates_or_order(loaded):
    together = translated(loaded)
    assert torch.allclose(translated(loaded, ("c", "b", "a"), (9, 5, 0)), together.flip(0), atol=1e-4)
    assert torch.allclose(translated(loaded, ("b",), (5,)), together[1:2], atol=1e-4)
    assert not torch.allclose(translated(loaded, ("x", "y", "z")), together, atol=1e-2)


def test_each_slice_has_its_own_prompts_and_noise_where_another_one_is_not_made(loaded):
    """The first of two slices knows its target, so only the second is made: with its own key."""
    cfg, run, model, ds = loaded
    u = run.fetch(ds.images, np.array([0, 5]))
    keys = [(ds.complete[0].name, 0), (ds.complete[1].name, 5)]
    known = torch.tensor([[True, True], [True, False]])
    both, _ = model.fill(u, known, keys)
    alone, _ = model.fill(u[1:], known[1:], keys[1:])
    assert torch.equal(both[0], u[0]) and torch.allclose(both[1], alone[0], atol=1e-5)
    other, _ = model.fill(u[1:], known[1:], keys[:1])
    assert not torch.allclose(other, alone, atol=1e-3)


def test_source_and_target_get_their_own_prompts_and_the_target_the_masked_one(loaded):
    cfg, run, model, ds = loaded
    name, meta = ds.complete[2].name, ds.complete[2].meta
    texts = [metadb.prompt(c, meta, cfg.fields, masked) for masked in ((), ("modality",)) for c in ds.contrasts]
    own = embeddings.embed(model.prompts.encoder.remember(texts), texts).pooled
    there, back = (model.prompts([name], *pair) for pair in (([0], [1]), ([1], [0])))
    assert torch.equal(there.e_src, own[:1]) and torch.equal(there.e_tgt, own[1:2]) and torch.equal(back.e_src, own[1:2]) and torch.equal(back.e_tgt, own[:1])
    seen = []
    watched = encoder.Prompts(None, [], ds.contrasts)
    watched.sentences, watched.features = lambda *how: seen.append(how) or how, lambda how: SimpleNamespace(pooled=how)
    told = watched("names", "src", "tgt")
    assert told.e_src == ("names", "src") and told.e_tgt == ("names", "tgt") and told.e_mask == ("names", "tgt", ("modality",))


def test_the_masked_prompt_differs_from_the_whole_one_by_the_contrast_alone(loaded):
    cfg, _, model, ds = loaded
    whole, hidden = (model.prompts.sentences([ds.complete[0].name] * 2, [0, 1], masked) for masked in ((), ("modality",)))
    a, b = whole[0], hidden[0]
    assert "T1-weighted" in a and "[MASK]" in b and "T1" not in b and a.split("Description")[0] == b.split("Description")[0]
    assert hidden[0] == hidden[1] and set(model.prompts.every()) >= {a, b}
    scanner = encoder.Prompts(None, ds.complete, ds.contrasts, ("scanner",))
    assert scanner.sentences([ds.complete[0].name], [0])[0].startswith("Scanner: ")


def test_noise_on_the_source_has_the_stated_size_and_is_repeatable(loaded):
    cfg, run, _, _ = loaded
    noisy = dataclasses.replace(cfg, noise=10.0)
    u = torch.full((8, 1, 128, 128), 0.5)
    spoiled = metadb.spoil(noisy, run, u, [("s", i) for i in range(8)])
    assert float((spoiled - u).std()) == pytest.approx(10 / 255, rel=0.01) and metadb.spoil(cfg, run, u, []) is u
    assert torch.equal(metadb.spoil(noisy, run, u[:1], [("s", 3)]), spoiled[3:4])


def test_the_noise_of_figure_5_reaches_the_model_and_the_copied_source(trained, tmp_path, monkeypatch, capsys):
    ixi, out, _ = trained
    (tmp_path / "run").mkdir()
    for name in ("last.pt", "config.json"):
        (tmp_path / "run" / name).write_bytes((out / name).read_bytes())
    given, translate = [], metadb.translate
    monkeypatch.setattr(metadb, "translate", lambda run, G, bridge, y, *rest: (given.append(y.clone()), translate(run, G, bridge, y, *rest))[1])
    copied = []
    for noise in ("0", "60"):
        status, text = call(monkeypatch, capsys, "--data", ixi, "--out", tmp_path / "run", "--evaluate", "--noise", noise)
        assert status == 0, text
        copied.append({r["metric"]: r["mean"] for r in json.loads((tmp_path / "run" / "results.json").read_text())["rows"] if r["method"] == "copy-source"})
    clean, noisy = (y for y in given if len(y) > 1)             # the picture of the steps has one slice
    inside = (clean > 0.3) & (clean < 0.7)                      # nothing is clipped there
    assert float((noisy - clean)[inside].std()) == pytest.approx(60 / 255, rel=0.15) and abs(copied[1]["psnr"] - copied[0]["psnr"]) > 0.1


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_kill_9_and_the_same_command_end_with_the_same_bits(trained, tmp_path):
    """Generator, SR-Net, discriminator and both optimisers equal those of the undisturbed run."""
    ixi, undisturbed, _ = trained
    out = tmp_path / "killed"
    words = [sys.executable, "-c", toys.EAGER.format(script="metadb"), "--data", str(ixi), "--out", str(out), *TINY, "--train"]
    for step in (2,):
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        end = time.time() + 60
        while time.time() < end and process.poll() is None:
            if (out / "last.pt").exists() and torch.load(out / "last.pt", weights_only=True)["stages"].get("bridge", {}).get("step", 0) >= step:
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = weights(out), weights(undisturbed)
    assert len(ours) == len(theirs) > 100 and all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.slow
def test_torchrun_equals_one_process(trained, tmp_path):
    ixi, alone, _ = trained
    out = tmp_path / "two"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "metadb.py", "--data", ixi, "--out", out, *TINY,
                           "--train", "--evaluate"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("generator", "sr", "discriminator"):
        a, b = (torch.load(p / "last.pt", weights_only=True)["stages"]["bridge"]["parts"][name] for p in (out, alone))
        assert all(torch.allclose(a[k].float(), b[k].float(), atol=2e-3, rtol=1e-2) for k in a), name
    rows = [r for r in json.loads((out / "results.json").read_text())["rows"] if r["method"] == "MetaDB" and r["metric"] == "psnr"]
    assert [(r["n"], r["slices"]) for r in rows] == [(3, 6)]


@pytest.mark.slow
def test_several_directions_and_names_as_people_write_them(ixi, tmp_path, monkeypatch, capsys):
    base = ["--data", ixi, "--out", tmp_path / "run"]
    status, text = call(monkeypatch, capsys, *base, *TINY, "--source", "T1,pd", "--target", "T2w,PD", "--train", "--evaluate")
    assert status == 0 and "| method | t1->t2 | t1->pd | pd->t2 |" in text, text
    status, text = call(monkeypatch, capsys, *base, "--synthesize")
    assert status == 2 and "choose one, --only source,target" in text
    status, text = call(monkeypatch, capsys, *base, "--synthesize", "--only", "pd,t2")
    assert status == 0 and "wrote t2 from t1, pd" in text


def test_weights_are_chosen_on_all_directions_whatever_will_be_sampled(loaded, monkeypatch):
    """--only belongs to sampling: the validation of a model of several directions must not look at it."""
    cfg, run, model, ds = loaded
    two, asked = dataclasses.replace(cfg, source=("t1", "t2"), target=("t1", "t2"), only=("t1", "t2")), []
    assert len(ds.rows("val")) > 0 and metadb.directions(two, ["t1", "t2"]) == [(0, 1)]
    monkeypatch.setattr(metadb, "translate", lambda run, G, bridge, u, *rest: u)
    validate = metadb.validation(two, run, ds, lambda names, src, tgt: asked.append((src.tolist(), tgt.tolist())), model.bridge)
    assert set(zip(*asked[0])) == {(0, 1), (1, 0)}
    rows = ds.rows("val", 16)                    # the source as the answer: its mean squared error, by hand
    images = np.asarray(ds.images[rows], np.float64)
    assert validate(None) == pytest.approx(((images[:, 0] - images[:, 1]) ** 2).mean(), rel=1e-4)


def test_validation_subjects_are_not_tested_on(trained, tmp_path, monkeypatch, capsys):
    """They chose the weights."""
    ixi, out, _ = trained
    parts = json.loads((out / "split.json").read_text())
    assert parts["val"]
    (tmp_path / "split.json").write_text(json.dumps({**parts, "val": [], "test": parts["val"]}))
    status, text = call(monkeypatch, capsys, "--data", ixi, "--out", out, "--evaluate", "--split", tmp_path / "split.json")
    assert status == 1 and f"{len(parts['val'])} test subjects served the training" in text


def test_a_trained_model_is_tried_on_other_data(trained, tmp_path, monkeypatch, capsys):
    """Fig. 5, top: --evaluate with another folder scores that folder's test subjects and learns nothing from it."""
    _, out, _ = trained
    phantom.make("ixi", tmp_path / "other", subjects=8, size=32, slices=4, seed=5)
    (tmp_path / "other" / "IXI.csv").unlink()
    before = (out / "last.pt").read_bytes()
    numbers = json.loads((out / "results.json").read_text())
    (tmp_path / "run").mkdir()
    for name in ("last.pt", "config.json"):
        (tmp_path / "run" / name).write_bytes((out / name).read_bytes())
    for name in ("IXI-T1", "IXI-T2", "IXI-PD"):                 # hospitals number their patients from 2 on, too
        for path in (tmp_path / "other" / name).iterdir():
            path.rename(path.with_name(path.name.replace("IXI0", "IXI3")))
    status, text = call(monkeypatch, capsys, "--data", tmp_path / "other", "--out", tmp_path / "run", "--evaluate")
    assert status == 0 and "| MetaDB |" in text, text
    other = json.loads((tmp_path / "run" / "on-other" / "results.json").read_text())
    assert all(name.startswith("IXI3") for name in other["test"]) and other["fingerprint"] != numbers["fingerprint"]
    assert len(other["test"]) == 8 and not (tmp_path / "run" / "results.json").exists()         # every subject; the run's own results are apart
    methods = {row["method"] for row in other["rows"]}
    assert methods == {"MetaDB"}                            # the run has kept no baselines, as its file was not copied
    (tmp_path / "run" / "baselines.npz").write_bytes((out / "baselines.npz").read_bytes())
    call(monkeypatch, capsys, "--data", tmp_path / "other", "--out", tmp_path / "run", "--evaluate")
    again = json.loads((tmp_path / "run" / "on-other" / "results.json").read_text())
    assert {row["method"] for row in again["rows"]} == {"MetaDB", "copy-source", "mean-of-train", "intensity-lookup"}
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_a_dry_run_and_a_benchmark_say_sizes_and_rates(ixi, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.benchmark, "__defaults__", (0.1,))
    base = ["--data", ixi, "--out", tmp_path / "run", *TINY]
    status, text = call(monkeypatch, capsys, *base)
    assert status == 0 and "prompt: Age: " in text and "x0_hat (1, 1, 32, 32)" in text and "this was a dry run" in text
    assert all(f"{name}: " in text for name in ("generator", "discriminator", "SR-Net")) and not (tmp_path / "run").exists()
    status, text = call(monkeypatch, capsys, *base, "--benchmark")
    assert status == 0 and "bridge: " in text and "sampling: " in text and "GFLOP/s" in text


def test_own_embeddings_are_opened_without_subjects(tmp_path):
    """So load and --export open them.  What the file lacks is told when a prompt is asked for."""
    np.savez(tmp_path / "own.npz", prompts=np.array(["a prompt"]), pooled=np.ones((1, 20), np.float32))
    prompts = encoder.Prompts(None, [], ["t1", "t2"], file=tmp_path / "own.npz", words=True)
    with pytest.raises(RunError, match="have no embedding"):
        prompts(["somebody"], [0], [1])


@pytest.mark.slow
def test_your_own_embeddings(ixi, tmp_path, monkeypatch, capsys):
    base = ["--data", ixi, "--out", tmp_path / "run", *TINY]
    encoder.main(["--data", str(ixi), "--contrasts", "T1,t2", "--to", str(tmp_path / "prompts.txt")])
    prompts = (tmp_path / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert any("[MASK]" in p for p in prompts) and len(set(prompts)) == len(prompts)
    np.savez(tmp_path / "own.npz", prompts=np.array(prompts), pooled=np.random.default_rng(0).normal(size=(len(prompts), 20)).astype(np.float32))
    status, text = call(monkeypatch, capsys, *base, "--text-file", tmp_path / "own.npz", "--train", "--evaluate")
    assert status == 0 and "| MetaDB |" in text, text
    status, text = call(monkeypatch, capsys, *base[:2], "--out", tmp_path / "x", *TINY, "--text-file", tmp_path / "own.npz", "--conditioning", "xattn", "--train")
    assert status == 1 and "holds no tokens" in text
    np.savez(tmp_path / "less.npz", prompts=np.array(prompts[1:]), pooled=np.zeros((len(prompts) - 1, 20), np.float32))
    status, text = call(monkeypatch, capsys, *base[:2], "--out", tmp_path / "y", *TINY, "--text-file", tmp_path / "less.npz", "--train")
    assert status == 1 and "have no embedding" in text and "Traceback" not in text


@pytest.mark.slow
def test_a_segmenter_judges_the_results(ixi, tmp_path, monkeypatch, capsys):
    phantom.make("brats", tmp_path / "brats", subjects=9, size=32, slices=6)
    base = ["--data", tmp_path / "brats", "--out", tmp_path / "run", *TINY, "--source", "flair"]
    status, text = call(monkeypatch, capsys, *base, "--train", "--evaluate", "--segment", "--segment-steps", "30")
    assert status == 0 and "/ Dice, mean of the classes" in text, text
    rows = {(r["method"], r["metric"]): r for r in json.loads((tmp_path / "run" / "results.json").read_text())["rows"]}
    assert {"MetaDB", "real slices", "copy-source", "intensity-lookup"} == {m for m, metric in rows if metric == "dice"}
    assert ("real slices", "psnr") not in rows and (tmp_path / "run" / "segmentation.png").exists()
    with np.load(tmp_path / "run" / "results.npz") as kept:
        assert kept["flair->t2|truth|drawn"].shape == (32, 32, 3)
    status, text = call(monkeypatch, capsys, *base, "--train", "--evaluate", "--segment", "--segment-steps", "30")
    assert status == 0 and "segmenter t2 30" in text and "finished" in text              # not trained twice
    status, text = call(monkeypatch, capsys, "--data", ixi, "--out", tmp_path / "no", *TINY, "--train", "--evaluate", "--segment")
    assert status == 1 and "--segment: not every subject in" in text and "Traceback" not in text


@pytest.mark.parametrize("words, status, message", [
    (["--source", "t2"], 2, "name two different contrasts"), (["--fields", "age,mood"], 2, "--fields age,mood: there are"),
    (["--target", "ct"], 1, "ct"), (["--share", "--prompts", "target"], 2, "needs --prompts both"), (["--conditioning", "none", "--prompts", "target"], 2, "need --conditioning ta"),
    (["--only", "t2,t1"], 2, "this model knows t1,t2"), (["--eta", "2"], 2, "--eta 2"),
    (["--micro-batch", "2", "--train"], 2, "cannot be divided"), (["--pool", "1,32"], 2, "fewer than 2 x 2 pixels"), (["--evaluate"], 1, "holds no trained model"), (["--text-file", "nowhere.npz", "--train"], 1, "nowhere.npz")])
def test_wrong_words_get_one_line(ixi, tmp_path, monkeypatch, capsys, words, status, message):
    code, text = call(monkeypatch, capsys, "--data", ixi, "--out", tmp_path / "run", *TINY, *words)
    assert code == status and message in text and "Traceback" not in text, text


# ---- text must be used, provably (slow) -------------------------------------------------------------------------------

SITES = ("Guys", "HH", "IOP")


def three_sites(folder, seed, heads):
    """Heads nobody has seen, each imaged at three sites under three names: the same source, three targets."""
    folder.mkdir()
    (folder / "phantom.json").write_text("{}")
    grid = phantom.head_grid(64, 12, phantom.SCALP_FIELD)
    for head in range(heads):
        anatomy = phantom.ixi_anatomy(seed, head, grid)
        for s, site in enumerate(SITES):
            name = f"IXI{10 * head + s + 100:03d}-{site}-{1000 + head}"
            phantom.write_ixi_scans(folder, name, phantom.ixi_images(seed, head, anatomy, site, hidden=True), grid)


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", ["ta", "none"])
def test_hidden_contrast(conditioning, tmp_path, monkeypatch, capsys):
    """PD is the same at all sites, T2 is not: without text nobody can beat the average of the three T2 (an exact bound on the pooled
    error, computed from the images as scored).  With text the bound must fall by 1 dB; the wrong site in the prompt costs 2 dB."""
    phantom.make("ixi-hidden", tmp_path / "train", subjects=24)
    three_sites(tmp_path / "three", seed=77, heads=4)
    status, text = call(monkeypatch, capsys, "--data", tmp_path / "train", "--out", tmp_path / "run", "--source", "pd", "--target", "t2",
                        "--conditioning", conditioning, "--train")
    assert status == 0, text
    cfg, run, _ = toys.open_run(metadb, tmp_path / "train", tmp_path / "run")
    subjects = data.find_layout(tmp_path / "three", ("pd", "t2")).subjects
    model = metadb.load_model(cfg, run, subjects)
    images = {s.name: data.load_subject(s, ("pd", "t2"), 64).images[2:10:2] for s in subjects}     # (4, 2, 64, 64) each
    right, wrong, blind = [], [], []
    for head in range(4):
        names = [s.name for s in subjects[3 * head:3 * head + 3]]
        source, targets = torch.from_numpy(images[names[0]][:, :1]), np.stack([images[name][:, 1] for name in names])    # (3, 4, 64, 64)
        assert all(np.array_equal(images[name][:, 0], images[names[0]][:, 0]) for name in names)
        made = np.stack([metadb.translate(run, model.generator, model.bridge, source, model.prompts([name] * 4, [0] * 4, [1] * 4),
                                              [(head, z) for z in range(4)])[:, 0].numpy()
                         for name in names])
        right.append((made - targets) ** 2)
        wrong.append((made[[1, 2, 0]] - targets) ** 2)
        blind.append((targets.mean(0, keepdims=True) - targets) ** 2)
    right, wrong, bound = (-10 * math.log10(np.mean(errors)) for errors in (right, wrong, blind))
    print(f"{conditioning}: {right:.2f} dB, with the wrong site {wrong:.2f} dB, bound without text {bound:.2f} dB")
    if conditioning == "none":
        assert right <= bound + 1e-3 and wrong == pytest.approx(right, abs=1e-3)
    else:
        assert right >= bound + 1 and wrong <= right - 2
