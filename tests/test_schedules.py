"""Noise schedules against stored values, and the algebra of q_sample, eps, x0 and DDIM."""
import pytest
import torch

from common.schedules import cosine_alpha_bar, ddim_step, eps_from_x0, linear_alpha_bar, q_sample, x0_from_eps


def test_tables_equal_values_computed_by_hand():
    steps = [40, 200, 400, 999]
    assert cosine_alpha_bar()[steps].tolist() == pytest.approx([0.99433528, 0.89776291, 0.64598817, 2.4287669e-9], rel=1e-6)
    assert linear_alpha_bar()[steps].tolist() == pytest.approx([0.97976692, 0.65634701, 0.19357201, 4.0358298e-5], rel=1e-6)


def test_q_sample_by_hand_and_its_inverses():
    x0, eps, a = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.25]), torch.tensor(0.64)
    x_t = q_sample(x0, a, eps)
    assert x_t.tolist() == pytest.approx([0.8 * 0.5 + 0.6 * 2, -0.8 + 0.6 * 0.25])
    assert x0_from_eps(x_t, a, eps).tolist() == pytest.approx(x0.tolist())
    assert eps_from_x0(x_t, a, x0).tolist() == pytest.approx(eps.tolist())


def test_q_sample_keeps_unit_variance():
    g = torch.Generator().manual_seed(0)
    x = q_sample(torch.randn(200_000, generator=g), 0.3, torch.randn(200_000, generator=g))
    assert x.var().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_lands_on_the_right_marginal(eta):
    """From x_t ~ q(x_t | x0), a step with the true x0 must give q(x_next | x0): mean sqrt(a) x0, variance 1 - a, for any eta."""
    g = torch.Generator().manual_seed(1)
    x0, a, a_next = torch.full((400_000,), 0.7), 0.3, 0.6
    x_t = q_sample(x0, a, torch.randn(x0.shape, generator=g))
    x = ddim_step(x_t, x0, a, a_next, eta, torch.randn(x0.shape, generator=g))
    assert x.mean().item() == pytest.approx(a_next ** 0.5 * 0.7, abs=4e-3)
    assert x.var().item() == pytest.approx(1 - a_next, abs=4e-3)
    correlation = torch.corrcoef(torch.stack([x, x_t]))[0, 1].item()
    # eta = 1 is the Markov chain: corr = sqrt(a / a_next * (1 - a_next) / (1 - a)) = 0.5345; eta = 0 keeps the noise direction;
    # eta = 0.5 has sigma^2 = 0.25 * 0.4 / 0.7 * 0.5 = 0.0714, so corr = sqrt((0.4 - 0.0714) / 0.4) = 0.9063
    assert correlation == pytest.approx({0.0: 1.0, 0.5: 0.9063, 1.0: 0.5345}[eta], abs=5e-3)
