"""RLBCD: the bridge in closed form, both fusions, the consistency score, and what the switches remove."""
import dataclasses
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toys
from conftest import ROOT, wake
from torch.nn import functional as F
from toys import call

import data
import rlbcd
from common.device import Machine
from common.files import RunError
from common.run import Run
from common.schedules import falling_times
from common.unet import Site
from data import phantom
from rlbcd import CMA, SAM, CoDiffusion, Config, M, T, bridge_step, q_sample

SMALL = dict(size=32, ae_base=8, ae_mult=(1, 2), ae_blocks=1, codes=32, base=8, mult=(1, 2), blocks=1, head_dim=8, groups=4)


def small(**changes):
    return Config(**{**SMALL, **changes})


def networks(cfg, z=4, size=16, seed=0):
    torch.manual_seed(seed)
    return wake(CoDiffusion(cfg, z, size))


def time_list(S):
    return falling_times(T, S)


# ---- the bridge ----------------------------------------------------------------------------------

def delta(m):
    return 2 * m * (1 - m)


def test_places_on_the_bridge():
    assert len(M) == T and float(M[0]) == pytest.approx(0.001) and float(M[-1]) == pytest.approx(0.999)
    assert float(delta(M).max()) == pytest.approx(0.5, abs=1e-6) and torch.allclose(delta(M), delta(M).flip(0))


def test_q_sample_is_equation_1():
    x0, x, eps = (torch.tensor([[[[value]]]]) for value in (2.0, 5.0, 3.0))
    t = torch.tensor([250])
    m = float(M[250])
    assert q_sample(t, x0, x, eps).item() == pytest.approx((1 - m) * 2 + m * 5 + math.sqrt(2 * (m - m * m)) * 3, rel=1e-5)


def test_loss_by_hand():
    grad = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    target = torch.zeros(2, 1, 2, 2)
    t = torch.tensor([0, 500])
    assert rlbcd.bridge_loss(target, grad, t, "l1").item() == pytest.approx(10 / 8)
    c = np.array([1 - (float(M[i - 1]) if i else 0.0) / float(M[i]) for i in range(T)])
    assert c.mean() == pytest.approx(0.0075, abs=2e-4)                       # spec 4.2-5
    assert rlbcd.bridge_loss(target, grad, t, "l2").item() == pytest.approx(c[0] / c.mean() * 30 / 8, rel=1e-5)
    assert rlbcd.bridge_loss(target, grad.flip(0), t, "l2").item() == pytest.approx(c[500] / c.mean() * 30 / 8, rel=1e-4)


def moments(i, n, x0, x, eta=1.0):
    """Mean and variance of bridge_step's result from a fixed x_t, by its dependence on x_t and noise."""
    m_t, m_n = float(M[i]), float(M[n])
    at0 = bridge_step(0.0, x0, x, m_t, m_n, 0.0, eta)
    return at0, bridge_step(1.0, x0, x, m_t, m_n, 0.0, eta) - at0, bridge_step(0.0, x0, x, m_t, m_n, 1.0, eta) - at0


def test_posterior_is_the_product_of_two_gaussians():
    """Bayes: N(x_n; marginal) times N(x_t; transition).  The result does not depend on the source x."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        n, i = sorted(rng.choice(T, 2, replace=False))
        m_t, m_n = float(M[i]), float(M[n])
        x0, x = rng.normal(size=2)
        prior_mean, prior_var = (1 - m_n) * x0 + m_n * x, delta(m_n)
        slope = (1 - m_t) / (1 - m_n)
        shift = (m_t - m_n) / (1 - m_n) * x
        noise = delta(m_t) - delta(m_n) * slope ** 2
        var = 1 / (1 / prior_var + slope ** 2 / noise)
        offset, of_state, of_noise = moments(i, n, x0, x)
        assert of_noise ** 2 == pytest.approx(var, rel=1e-6)
        assert of_state == pytest.approx(var * slope / noise, rel=1e-6)
        assert offset == pytest.approx(var * (prior_mean / prior_var - slope * shift / noise), rel=1e-6, abs=1e-9)
        k = m_n / m_t
        assert offset == pytest.approx((1 - k) * x0, abs=1e-9) and of_state == pytest.approx(k, rel=1e-6)
        assert moments(i, n, x0, 1e6)[0] == pytest.approx(offset, abs=1e-6)   # x-free


@pytest.mark.parametrize("eta", (0.0, 0.5, 1.0))
def test_marginals_are_kept(eta):
    """With the true x0, a step maps N(mean_t, delta_t) to N(mean_n, delta_n), so any list of times may be used."""
    times = time_list(20)
    for i, n in zip(times, times[1:]):
        offset, of_state, of_noise = moments(i, n, 0.3, -1.2, eta)
        assert of_noise == pytest.approx(eta * math.sqrt(2 * float(M[n]) * (1 - float(M[n]) / float(M[i]))), abs=1e-9)
        mean = offset + of_state * ((1 - float(M[i])) * 0.3 - 1.2 * float(M[i]))
        assert mean == pytest.approx((1 - float(M[n])) * 0.3 - 1.2 * float(M[n]), abs=1e-9)
        assert of_state ** 2 * delta(float(M[i])) + of_noise ** 2 == pytest.approx(delta(float(M[n])), rel=1e-9)


def test_bbdm_formula_loses_variance_below_eta_1():
    """The negative control: with d in the place of eta^2 d under the root, the variance falls short."""
    variance = delta(float(M[999]))
    times = time_list(200)
    for i, n in zip(times[:101], times[1:102]):
        m_t, m_n = float(M[i]), float(M[n])
        d = 2 * m_n * (m_t - m_n) / m_t
        variance = (delta(m_n) - d) / delta(m_t) * variance + 0.25 * d
    assert variance / delta(float(M[times[101]])) < 0.5                       # eta = .5: it should be 1


def test_times_of_sampling():
    times = time_list(200)
    assert len(times) == 200 and times[:3] == [999, 993, 988] and times[-4:] == [10, 5, 1, 0]
    assert time_list(3) == [999, 1, 0] and time_list(1) == [999]
    for S in range(3, 1001):
        times = time_list(S)
        assert all(a > b for a, b in zip(times, times[1:])) and times[0] == 999 and times[-2:] == [1, 0]


@pytest.mark.parametrize("S", (1, 3, 20, 200))
def test_a_perfect_network_returns_the_target(S):
    g = torch.Generator().manual_seed(0)
    x, r, y = (torch.randn(2, 4, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    targets = {"residual": r, "enhanced": y}

    def gradients(states, t):
        return {branch: states[branch] - targets[branch] for branch in states}
    noise = {branch: lambda: torch.randn(x.shape, generator=g, dtype=torch.float64) for branch in targets}
    watched = []
    ends = rlbcd.sample(gradients, x, time_list(S), noise, watched)
    assert torch.allclose(ends["residual"], r) and torch.allclose(ends["enhanced"], y)
    assert len(watched) == len(time_list(S)) and torch.equal(watched[0][1], x) and watched[0][0] == "t = 999"


def linear_optimum(m, rho):
    """E[y | x_t] = k x_t for unit Gaussians x, y of correlation rho."""
    a, b = 1 - m, m
    return (a + b * rho) / (a * a + b * b + 2 * a * b * rho + delta(m))


def test_exact_gaussian_world():
    """The best linear network in one dimension, 200 steps: mse 1.1368, correlation .4686 (propagated exactly)."""
    rho, times = 0.9, time_list(200)
    to_x, to_y, var = 1.0, rho, 1.0                     # covariances of the state with x and y, its variance
    for i, n in zip(times, times[1:]):
        k = linear_optimum(float(M[i]), rho)
        _, keep, new = moments(i, n, 0.0, 0.0)
        pull = moments(i, n, 1.0, 0.0)[0]
        slope = keep + pull * k
        to_x, to_y, var = slope * to_x, slope * to_y, slope ** 2 * var + new ** 2
    k = linear_optimum(float(M[0]), rho)
    to_x, to_y, var = k * to_x, k * to_y, k * k * var
    assert var - 2 * to_y + 1 == pytest.approx(1.1368, abs=1e-3) and to_x / math.sqrt(var) == pytest.approx(0.4686, abs=1e-3)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, 1, 1, generator=g)
    y = rho * x + math.sqrt(1 - rho ** 2) * torch.randn(x.shape, generator=g)

    def gradients(states, t):
        return {"enhanced": (1 - linear_optimum(float(M[int(t[0])]), rho)) * states["enhanced"]}
    made = rlbcd.sample(gradients, x, times, {"enhanced": lambda: torch.randn(x.shape, generator=g)})["enhanced"]
    assert ((made - y) ** 2).mean().item() == pytest.approx(1.1368, abs=0.03)


def joint_mse(rho, shared):
    """The exact mean squared error of co-diffusion with the best linear networks for r = (y - x) / 2 and y.

    The enhanced branch sees both states.  shared: both have the same noise in training.
    """
    times = time_list(200)
    cov = np.array([[1.0, rho], [rho, 1.0]])                                # of (x, y)
    of_r = np.array([-0.5, 0.5])                                            # r in terms of (x, y)
    of_y = np.array([0.0, 1.0])
    to = np.array([[1.0, rho], [1.0, rho]])             # covariances of the states (x_r, x_e) with (x, y)
    var = np.ones((2, 2))                               # covariance of the states, which both start at x
    for index, i in enumerate(times):
        m = float(M[i])
        forms = np.array([(1 - m) * of_r + m * np.array([1.0, 0]), (1 - m) * of_y + m * np.array([1.0, 0])])
        noise = delta(m) * (np.ones((2, 2)) if shared else np.eye(2))
        seen = forms @ cov @ forms.T + noise                                # training covariance of the states
        best_r = np.array([of_r @ cov @ forms[0] / seen[0, 0], 0.0])        # the residual branch sees x_r alone
        best_y = np.linalg.solve(seen, forms @ cov @ of_y)
        best = np.stack([best_r, best_y])                                   # estimates of (r, y) from the states
        if index + 1 == len(times):
            end_var, end_to = best[1] @ var @ best[1], best[1] @ to[:, 1]
            return end_var - 2 * end_to + 1
        _, keep, new = moments(i, times[index + 1], 0.0, 0.0)
        pull = moments(i, times[index + 1], 1.0, 0.0)[0]
        step = keep * np.eye(2) + pull * best
        to, var = step @ to, step @ var @ step.T + new ** 2 * np.eye(2)


def test_branches_need_independent_noise():
    assert joint_mse(0.9, shared=False) == pytest.approx(1.0373, abs=0.02)
    assert joint_mse(0.9, shared=True) > 10


def test_training_draws_independent_noise_and_one_time():
    cfg = small()
    seen = {}

    def spy(states, t):
        seen.update(states=states, t=t)
        return {branch: torch.zeros_like(state) for branch, state in states.items()}
    x = torch.zeros(64, 4, 8, 8)
    noise = torch.randn(2, 64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    run = SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False))
    t = torch.randint(T, (64,), generator=torch.Generator().manual_seed(1))
    losses = rlbcd.bridge_losses(cfg, run, spy, lambda y, r: y, x, x, x, t, noise)
    both = torch.stack([state.flatten() for state in seen["states"].values()])
    assert abs(torch.corrcoef(both)[0, 1].item()) < 0.05
    m = M[t].float()[:, None, None, None]
    assert torch.allclose(seen["states"]["residual"], delta(m).sqrt() * noise[0], atol=1e-6)
    assert torch.allclose(seen["states"]["enhanced"], delta(m).sqrt() * noise[1], atol=1e-6)
    assert list(losses) == ["residual", "enhanced", "lcs"]
    assert losses["residual"].item() == pytest.approx((delta(m).sqrt() * noise[0]).abs().mean().item(), rel=1e-5)


def test_loss_of_known_latents():
    """The target of each branch is its own latent, and H_E gets y_hat first, then r_hat."""
    cfg = small(lcs=0.5)
    x, y, r = torch.full((1, 1, 2, 2), 1.0), torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), -2.0)
    zero = torch.zeros(2, 1, 1, 2, 2)
    run = SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False))
    t = torch.tensor([400])
    m = float(M[400])
    losses = rlbcd.bridge_losses(cfg, run, lambda states, t: {b: 0 * s for b, s in states.items()},
                                 lambda a, b: 10 * a + b, x, y, r, t, zero)
    assert losses["residual"].item() == pytest.approx(abs(m * (1 - -2)), rel=1e-5)
    assert losses["enhanced"].item() == pytest.approx(abs(m * (1 - 3)), rel=1e-5)
    y_hat, r_hat = (1 - m) * 3 + m, (1 - m) * -2 + m
    assert losses["lcs"].item() == pytest.approx(0.5 * (10 * y_hat + r_hat - 1) ** 2, rel=1e-5)


# ---- fusion --------------------------------------------------------------------------------------

def site(stage, channels=8):
    return Site("block", stage, 0, 0, True, channels, 4)


def test_sam_is_equation_7_and_8():
    """Literal: 1x1 convolutions on maps, concatenation, then the mean over positions."""
    torch.manual_seed(0)
    sam = wake(SAM(site("down")))
    F_e, F_re = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)

    def conv(layer, x):
        return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)
    cof = torch.sigmoid(conv(sam.c3, torch.cat([conv(sam.c1, F_re), conv(sam.c2, F_e)], dim=1)).mean((2, 3), keepdim=True))
    out = sam(F_e, {("down", 0): F_re})
    assert torch.allclose(out, F_e * cof + F_re * (1 - cof), atol=1e-5)
    assert 0 < cof.min() and cof.max() < 1 and cof.std() > 1e-4
    assert torch.allclose(sam(F_e, {("down", 0): F_e}), F_e, atol=1e-6)
    fresh = SAM(site("down"))
    assert torch.allclose(fresh(F_e, {("down", 0): F_re}), (F_e + F_re) / 2)


def test_cma_is_equation_9_and_10():
    torch.manual_seed(0)
    cma = wake(CMA(site("up"), 4, 2, "literal"))
    F_d, F_rd = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    taps = {("up", 0): F_rd}
    q, kv = cma.norm_q(F_d), cma.norm_kv(F_rd)
    Q, K, V = (layer(h).flatten(2) for layer, h in ((cma.to_q, q), (cma.to_k, kv), (cma.to_v, kv)))    # (B, C, N)
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        A = torch.softmax(Q[:, part].transpose(1, 2) @ K[:, part] / math.sqrt(4), dim=2)               # (B, N, N)
        heads.append(A @ V[:, part].transpose(1, 2))
    AV = torch.cat(heads, dim=2).transpose(1, 2).reshape(2, 8, 4, 4)
    assert torch.allclose(cma(F_d, taps), AV, atol=1e-5)
    ours = wake(CMA(site("up"), 4, 2, "residual"))
    ours.load_state_dict(cma.state_dict(), strict=False)
    assert torch.allclose(ours(F_d, taps), F_d + ours.out(AV), atol=1e-5)
    fresh = CMA(site("up"), 4, 2, "residual")
    assert torch.equal(fresh(F_d, taps), F_d)
    flat = torch.ones(2, 8, 4, 4) * torch.randn(2, 8, 1, 1)
    assert cma(F_d, {("up", 0): flat}).std((2, 3)).max() < 1e-5


def test_fused_maps_go_on_and_onto_the_skips():
    """With a gate of 1 and zero attention, the enhanced branch is a plain U-Net with the same weights."""
    cfg = small()
    both = networks(cfg)
    for module in both.modules():
        if isinstance(module, SAM):
            torch.nn.init.zeros_(module.c3.weight)
            torch.nn.init.constant_(module.c3.bias, 50.0)
        if isinstance(module, CMA):
            torch.nn.init.zeros_(module.out.weight)
            torch.nn.init.zeros_(module.out.bias)
    plain = CoDiffusion(small(rdb=False), 4, 16)
    missing = plain.load_state_dict(both.state_dict(), strict=False).missing_keys
    # The middle attention is the same plug; its names do not change.
    assert missing == []
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([3, 700])
    states = {"residual": torch.randn(2, 4, 16, 16), "enhanced": x}
    assert torch.allclose(both(states, t)["enhanced"], plain({"enhanced": x}, t)["enhanced"], atol=1e-5)
    for module in both.modules():
        if isinstance(module, SAM):
            torch.nn.init.constant_(module.c3.bias, -50.0)                  # F_eo = F_re from here on
    changed = {**states, "residual": states["residual"] + 1}
    assert not torch.allclose(both(states, t)["enhanced"], both(changed, t)["enhanced"], atol=1e-4)


def test_every_level_is_fused_once_each_way():
    both = networks(small())
    keys = [(type(m).__name__, m.key) for m in both.modules() if isinstance(m, (SAM, CMA))]
    assert sorted(keys) == [("CMA", ("up", 0)), ("CMA", ("up", 1)), ("SAM", ("down", 0)), ("SAM", ("down", 1))]


def test_switches_remove_what_they_name():
    count = {name: sum(p.numel() for p in networks(small(**changes)).parameters()) for name, changes in {
        "full": {}, "sam": {"sam": False}, "cma": {"cma": False}, "hgf": {"sam": False, "cma": False},
        "rdb": {"rdb": False}, "edb": {"edb": False}}.items()}
    of_sam = sum(4 * C * C + 3 * C for C in (8, 16))
    of_cma = sum(4 * C * C + 8 * C for C in (8, 16))
    assert count["full"] - count["sam"] == of_sam and count["full"] - count["cma"] == of_cma
    assert count["full"] - count["hgf"] == of_sam + of_cma
    assert count["rdb"] == count["edb"] == (count["full"] - of_sam - of_cma) // 2
    assert list(networks(small(rdb=False)).branches) == ["enhanced"] and list(networks(small(edb=False)).branches) == ["residual"]


def test_mean_replaces_what_is_left_out():
    mean = rlbcd.Mean(site("down"))
    assert torch.equal(mean(torch.full((1, 8, 2, 2), 4.0), {("down", 0): torch.full((1, 8, 2, 2), 2.0)}), torch.full((1, 8, 2, 2), 3.0))


def test_parameter_counts_of_the_paper():
    """BBDM's U-Net for latents of 4 channels, and the same with SAM and CMA."""
    with torch.device("meta"):
        both = CoDiffusion(Config(size=128), 4, 16)
    assert sum(p.numel() for p in both.branches["residual"].parameters()) == 237_093_636
    assert sum(p.numel() for p in both.branches["enhanced"].parameters()) == 247_728_772


def test_gradients_go_where_they_should():
    """L_enh reaches the residual branch through its maps; L_res does not reach the enhanced branch; H_E stays."""
    cfg = small()
    both = networks(cfg)
    H_E = wake(rlbcd.Evaluator(4)).requires_grad_(False)
    run = SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False))
    g = torch.Generator().manual_seed(0)
    x, y, r = (torch.randn(2, 4, 16, 16, generator=g) for _ in range(3))
    noise = torch.randn(2, 2, 4, 16, 16, generator=g)

    def reached(name):
        both.zero_grad(set_to_none=True)
        rlbcd.bridge_losses(cfg, run, both, H_E, x, y, r, torch.tensor([100, 800]), noise)[name].backward()
        return [any(p.grad is not None and p.grad.any() for p in both.branches[b].parameters()) for b in ("residual", "enhanced")]
    assert reached("residual") == [True, False] and reached("enhanced") == [True, True] and reached("lcs") == [True, True]
    assert all(p.grad is None for p in H_E.parameters())


def test_without_lcs_the_loss_does_not_see_h_e():
    run = SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False))
    x = torch.randn(2, 4, 16, 16)
    noise = torch.randn(2, 2, 4, 16, 16)
    for cfg in (small(lcs=0.0), small(edb=False), small(rdb=False)):
        losses = rlbcd.bridge_losses(cfg, run, networks(cfg), None, x, x, x, torch.tensor([5, 6]), noise)
        assert "lcs" not in losses


# ---- residual image and score --------------------------------------------------------------------

def test_residual_image_leads_back_to_b():
    g = torch.Generator().manual_seed(0)
    A, B = (2 * torch.rand(3, 1, 4, 4, generator=g) - 1 for _ in range(2))
    residual = rlbcd.residual_image(A, B)
    assert residual.abs().max() <= 1 and torch.allclose(rlbcd.add_residual(A, residual), B, atol=1e-6)
    one = torch.ones(1)
    assert rlbcd.residual_image(-one, one) == 1 and rlbcd.residual_image(one, -one) == -1


def test_three_pictures_of_a_slice():
    run = SimpleNamespace(fetch=lambda images, rows: torch.from_numpy(images[np.asarray(rows)]))
    slices = np.random.default_rng(0).random((4, 2, 8, 8), dtype=np.float32)
    picture = rlbcd.make_picture(small(source="pre", target="post"), run, slices, ["post", "pre"])
    found = picture(np.array([3, 7, 11]))
    assert torch.allclose(found[0, 0], torch.from_numpy(2 * slices[1, 1] - 1))
    assert torch.allclose(found[1, 0], torch.from_numpy(2 * slices[2, 0] - 1))
    assert torch.allclose(found[2, 0], torch.from_numpy(slices[3, 0] - slices[3, 1]))


def test_consistency_score_is_blind_in_one_direction():
    """With H_E(y, r) = y - 2 r, errors (2 e, e) cancel; any other error costs."""
    y, r, e = (torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    x = y - 2 * r

    def lcs(y_hat, r_hat):
        return -rlbcd.inconsistency(x, y_hat - 2 * r_hat).mean((1, 2))
    assert (lcs(y, r) == 0).all() and (lcs(y + e, r) < -0.1).all()
    assert torch.allclose(lcs(y + 2 * e, r + e), torch.zeros(2), atol=1e-10)
    only_first = torch.zeros(2, 4, 3, 3)
    only_first[0] = 1
    assert rlbcd.inconsistency(only_first, 0 * only_first).mean((1, 2)).tolist() == [1, 0]


# ---- the trained model ---------------------------------------------------------------------------

class Identity:
    """An autoencoder that does nothing, with one latent channel."""
    f, z = 1, 1

    def to_latent(self, x):
        return x

    def from_latent(self, L):
        return L.clamp(-1, 1)


def toy_model(**changes):
    cfg = small(**{"bottleneck": "none", "S": 4, "source": "ct", "target": "pet", **changes})
    args = SimpleNamespace(out=None, seed=0, device="cpu", precision="fp32", train=False, typed={}, quiet=True, compile=False)
    run = Machine(0, "cpu", "fp32")
    run.args = args
    torch.manual_seed(1)
    H_E = wake(rlbcd.Evaluator(8))
    H_E.layers[0] = torch.nn.Conv2d(2, 64, 3, padding=1)
    H_E.layers[-1] = torch.nn.Conv2d(64, 1, 3, padding=1)
    return rlbcd.Model(cfg, run, ["pet", "ct"], Identity(), H_E, networks(cfg, 1, 32).eval())


def scene(B=3):
    u = torch.rand(B, 2, 32, 32, generator=torch.Generator().manual_seed(5))
    known = torch.tensor([[False, True]]).expand(B, 2)
    return torch.where(known[:, :, None, None], u, 0), known, [("s", i) for i in range(B)]


@torch.no_grad()
def test_a_slice_comes_out_the_same_in_any_batch():
    model = toy_model(samples=2)
    u, known, keys = scene()
    together, extras = model.fill(u, known, keys)
    notes = extras["notes"]
    alone, own = model.fill(u[1:2], known[1:2], keys[1:2])
    turned, _ = model.fill(u.flip(0), known, keys[::-1])
    assert torch.allclose(together[1:2], alone, atol=1e-5) and torch.allclose(together.flip(0), turned, atol=1e-5)
    assert torch.equal(together[:, 1], u[:, 1]) and together.min() >= 0 and together.max() <= 1
    samples = notes["samples"]
    assert samples.shape == (3, 2, 32, 32) and (samples[:, 0] - samples[:, 1]).abs().max() > 1e-3
    assert torch.allclose(notes["lcs"], -notes["inconsistency"].mean((2, 3))) and torch.allclose(own["notes"]["lcs"], notes["lcs"][1:2], atol=1e-5)


@torch.no_grad()
def test_selection_by_score():
    u, known, keys = scene()
    first, extras = toy_model(samples=3).fill(u, known, keys)
    notes = extras["notes"]
    best, again = toy_model(samples=3, select="lcs").fill(u, known, keys)
    assert torch.equal(first[:, 0], notes["samples"][:, 0])
    for b in range(3):
        k = int(notes["lcs"][b].argmax())
        assert torch.equal(best[b, 0], again["notes"]["samples"][b, k])
    one, _ = toy_model().fill(u, known, keys)
    assert torch.allclose(one[:, 0], notes["samples"][:, 0], atol=1e-5)      # the first sample does not depend on their number


def test_what_the_ends_of_the_bridges_become(monkeypatch):
    """The enhanced end is the target; the residual end is added twice to A; H_E gets the target's latent first."""
    model = toy_model()
    u, known, keys = scene(2)
    y, r = torch.full((2, 1, 32, 32), 0.5), torch.full((2, 1, 32, 32), 0.1)
    seen = {}

    def ends(gradients, x, times, noise, watch):
        seen.update(times=times, branches=list(noise), x=x)
        return {"residual": r, "enhanced": y}
    monkeypatch.setattr(rlbcd, "sample", ends)
    model.evaluator = lambda first, second: 10 * first + second
    filled, extras = model.fill(u, known, keys)
    A = 2 * u[:, 1] - 1
    assert torch.allclose(filled[:, 0], torch.full((2, 32, 32), 0.75)) and torch.allclose(seen["x"][:, 0], A)
    assert torch.allclose(extras["A + residual"][:, 0], ((A + 0.2).clamp(-1, 1) + 1) / 2, atol=1e-6)
    assert torch.allclose(extras["notes"]["inconsistency"][:, 0], (A - 5.1) ** 2, atol=1e-4)
    assert seen["times"] == falling_times(T, 4) and seen["branches"] == ["residual", "enhanced"]


@torch.no_grad()
def test_branches_alone():
    u, known, keys = scene()
    result, extras = toy_model(edb=False).fill(u, known, keys)
    assert list(extras) == ["notes"] and list(extras["notes"]) == ["samples"] and result[:, 0].std() > 0
    _, extras = toy_model(rdb=False).fill(u, known, keys)
    assert list(extras) == ["notes"] and list(extras["notes"]) == ["samples"]
    full, extras = toy_model().fill(u, known, keys)
    assert set(extras) == {"A + residual", "notes"} and set(extras["notes"]) == {"samples", "inconsistency", "lcs"} and not torch.equal(extras["A + residual"][:, 0], full[:, 0])


def test_fill_refuses_what_it_was_not_trained_for():
    u, known, keys = scene()
    with pytest.raises(ValueError, match="makes pet from ct"):
        toy_model().fill(u, ~known, keys)


@pytest.mark.parametrize("changes, words", [
    ({"rdb": False, "edb": False}, "leave no branch"), ({"source": "ct"}, "belong together"),
    ({"source": "ct", "target": "CT"}, "same contrast"), ({"select": "lcs"}, "--samples 2"),
    ({"select": "lcs", "samples": 2, "rdb": False}, "both branches"), ({"size": 33}, "multiple of 2")])
def test_configurations_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        small(**changes)


def test_the_pair_is_read_off_the_folder():
    assert rlbcd.pair_of(small(), ("ct", "pet")) == ("ct", "pet") and rlbcd.pair_of(small(), ("post", "pre")) == ("pre", "post")
    assert rlbcd.pair_of(small(source="T1w", target="ct"), ("ct", "t1")) == ("t1", "ct")
    with pytest.raises(RunError, match="--source ct --target pet"):
        rlbcd.pair_of(small(), ("t1", "t2"))


def test_fields_are_data_of_the_paper_or_ours():
    paper = Config()
    assert (paper.S, T, 2 ** (len(paper.ae_mult) - 1), paper.train_fraction, paper.test_subjects) == (200, 1000, 8, 0.7, 0.2)
    assert dataclasses.replace(paper, size=128).lcs == 1.0


def test_one_folder_with_another_pair(monkeypatch, capsys, tmp_path):
    phantom.make("ixi", tmp_path / "ixi", subjects=3, size=32, slices=3)
    status, output = call(rlbcd, monkeypatch, capsys, "--data", tmp_path / "ixi", "--preset", "demo", "--size", "32", "--out", tmp_path / "out")
    assert status == 2 and "--source" in output


# ---- runs ----------------------------------------------------------------------------------------

TINY = ("--preset demo --size 32 --base 8 --mult 1,2 --head-dim 8 --groups 4 --ae-base 8 --ae-mult 1,2 --codes 16 --ae-steps 10 --ae-batch 6 "
        "--disc-weight 0.5 --evaluator-steps 3 --steps 4 --batch 4 --S 3 --train-fraction 0.5 --test-subjects 2 --test-slices 2").split()


def test_slices_in_npy_files(tmp_path):
    """They have no grid, so there are no pixels of a PET to remember."""
    for contrast in ("CT", "PET"):
        for part in ("train", "test"):
            home = tmp_path / "slices" / contrast / part
            home.mkdir(parents=True)
            for k in range(2):
                np.save(home / f"slice_{k}.npy", np.random.default_rng([k, len(part)]).random((32, 32), dtype=np.float32))
    ds = data.open_dataset(tmp_path / "slices", None, 32, cache=tmp_path / "cache", say=lambda text: None)
    assert ds.contrasts == ("ct", "pet") and ds.picture is None and rlbcd.pair_of(small(), ds.contrasts) == ("ct", "pet")


@pytest.fixture(scope="module")
def petct(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "petct"
    phantom.make("petct", folder, subjects=6, size=32, slices=4)
    return folder


@pytest.fixture(scope="module")
def trained(petct, tmp_path_factory):
    """(data, finished run, output)."""
    out = tmp_path_factory.mktemp("runs") / "rlbcd"
    return petct, out, toys.run(rlbcd, "--data", petct, "--out", out, *TINY, "--train", "--evaluate")


def test_rows_of_an_evaluation(trained):
    """The result, what the residual branch makes, the ceiling, the simple methods; whole slices, bodies and lesions."""
    _, out, text = trained
    rows = json.loads((out / "results.json").read_text())["rows"]
    methods = ["RLBCD", "A + residual", "autoencoder alone", "copy-source", "mean-of-train", "intensity-lookup"]
    assert list(dict.fromkeys(row["method"] for row in rows)) == methods
    assert {row.get("variant") for row in rows} == {None, "body", "lesion"} and "lesion only" in text
    lines = (out / "scores.csv").read_text().splitlines()
    assert any(",RLBCD (lesion)," in line for line in lines) and lines[0].startswith("subject,task,method,psnr")


def test_samples_and_their_rules(trained, monkeypatch, capsys):
    """As many samples as there are contrasts, which must not be taken for images of contrasts."""
    data_folder, out, _ = trained
    status, text = call(rlbcd, monkeypatch, capsys, "--data", data_folder, "--out", out, "--evaluate", "--samples", "2", "--select", "lcs")
    assert status == 0, text
    rows = json.loads((out / "results.json").read_text())["rows"]
    by_name = {row["method"]: row["values"] for row in rows if row["metric"] == "psnr" and not row.get("variant")}
    rules = {"first sample", "random sample", "sample of best LCS", "mean of samples", "nearest sample"}
    assert rules <= set(by_name) and "samples" not in by_name
    assert by_name["RLBCD"] == by_name["sample of best LCS"]
    for subject, value in by_name["nearest sample"].items():
        assert value >= max(by_name["first sample"][subject], by_name["random sample"][subject]) - 0.2     # the best slice by slice


def test_figure_4(trained, monkeypatch, capsys):
    data_folder, out, _ = trained
    status, text = call(rlbcd, monkeypatch, capsys, "--data", data_folder, "--out", out, "--reproduce", "fig4", "--test-slices", "1")
    assert status == 0 and "Rank correlation of LCS with minus the error" in text and "The score: " in text
    found = json.loads((out / "fig4.json").read_text())
    assert found["samples"] == 10 and found["slices"] == 2 and sum(found["count_per_slice"]) == 20
    assert all((out / name).exists() for name in ("fig4.png", "fig4-sparsification.png", "fig4-places.png"))


def test_figure_2(trained, monkeypatch, capsys):
    data_folder, out, _ = trained
    status, text = call(rlbcd, monkeypatch, capsys, "--data", data_folder, "--out", out, "--reproduce", "fig2")
    assert status == 0 and "maps down 1" in text and "maps up 2" in text and (out / "fig2.png").exists(), text


def test_the_latent_cache_is_used_again(trained, monkeypatch, capsys):
    """Other bridges of the same autoencoder read the latents that are there; another autoencoder cannot."""
    data_folder, out, text = trained
    home = out.parent / "cache" / "latents"
    files = {path.name: path.stat().st_mtime_ns for path in home.glob("*.npy")}
    assert len(files) >= 2 and "latents" in text
    stage = torch.load(out / "last.pt", weights_only=True)["stages"]["autoencoder"]
    assert stage["finished"] and {path.split("-")[0] for path in files} >= {next(iter(files)).split("-")[0]}


def test_dry_run_says_what_would_be_trained(petct, monkeypatch, capsys, tmp_path):
    status, text = call(rlbcd, monkeypatch, capsys, "--data", petct, "--out", tmp_path / "dry")
    assert status == 0 and "ct -> pet" in text and "both U-Nets" in text and "H_E: " in text and not (tmp_path / "dry").exists()


def test_python_door(trained):
    model = rlbcd.load(trained[1], device="cpu", samples=2)
    images = np.random.default_rng(0).random((2, 2, 32, 32), dtype=np.float32)
    filled, extras = model.fill(images, known=("ct",), extras=True)
    assert filled.shape == images.shape and np.array_equal(filled[:, 0], images[:, 0])
    assert extras["lcs"].shape == (2, 2) and extras["samples"].shape == (2, 2, 32, 32) and extras["A + residual"].shape == images.shape


def test_best_weights_are_sampled_with(trained, monkeypatch):
    """The averaged weights of lowest validation loss; without validation subjects the last averaged ones."""
    asked = []
    of = Run.trained

    def spy(run, part, stage, *names):
        asked.append((stage, names))
        return of(run, part, stage, *names)
    monkeypatch.setattr(Run, "trained", spy)
    rlbcd.load(trained[1], device="cpu")
    assert ("bridges", ("best", "ema")) in asked and ("autoencoder", ("best", "ema")) in asked and ("evaluator", ("H_E",)) in asked


@pytest.mark.slow
@pytest.mark.parametrize("stage, step", [("autoencoder", 2), ("autoencoder", 6), ("evaluator", 1), ("bridges", 2)])
def test_kill_9_and_the_same_command_end_with_the_same_bits(trained, tmp_path, stage, step):
    petct, undisturbed, _ = trained
    toys.assert_kill_changes_nothing("rlbcd", petct, tmp_path / "killed", undisturbed, stage, step, TINY)


@pytest.mark.slow
def test_torchrun_equals_one_process(trained, tmp_path):
    petct, alone, _ = trained
    out = tmp_path / "two"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "rlbcd.py", "--data", petct, "--out", out, *TINY,
                           "--train", "--evaluate"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    a, b = (torch.load(p / "last.pt", weights_only=True)["stages"]["bridges"]["parts"]["networks"] for p in (out, alone))
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=5e-3, rtol=2e-2) for k in a)
    rows = [r for r in json.loads((out / "results.json").read_text())["rows"] if r["method"] == "RLBCD" and r["metric"] == "psnr" and not r.get("variant")]
    assert [(r["n"], r["slices"]) for r in rows] == [(2, 4)]

