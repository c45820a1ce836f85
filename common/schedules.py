"""Noise schedules and the few formulas of Gaussian diffusion that papers cite.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

alpha_bar_t is the share of signal variance that is left at step t:
    x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps.
A table has one entry per step, t = 0 .. T-1, and step 0 is the least noisy.  Tables are computed in
float64 on the CPU and returned as float32.  The functions take alpha_bar as a number, or as a
tensor that broadcasts against x, for instance (B, 1, 1, 1).
"""
import math

import torch


def cosine_alpha_bar(T=1000):
    """Nichol & Dhariwal (2021), Eq. 17.  Returns (T,).

    f(t) = cos^2((t/T + .008) / 1.008 * pi/2) and alpha_bar(t) = f(t) / f(0).  A step adds at most
    beta = 0.999.
    """
    f = [math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T + 1)]
    alpha = [1 - min(1 - f[i + 1] / f[i], 0.999) for i in range(T)]
    return torch.tensor(alpha, dtype=torch.float64).cumprod(0).float()  # (T,)


def linear_alpha_bar(T=1000, first=1e-4, last=0.02):
    """Ho et al. (2020), Sec. 4: beta rises linearly from first to last in T steps.  Returns (T,)."""
    beta = torch.linspace(first, last, T, dtype=torch.float64)          # (T,)
    return (1 - beta).cumprod(0).float()                                # (T,)


def scaled_linear_alpha_bar(T=1000, first=0.00085, last=0.0120):
    """Rombach et al. (2022): the square root of beta rises linearly in T steps.  Returns (T,)."""
    root = torch.linspace(first ** 0.5, last ** 0.5, T, dtype=torch.float64)    # (T,)
    return (1 - root ** 2).cumprod(0).float()                           # (T,)


def q_sample(x0, alpha_bar, eps):
    """Draw x_t given x0, as in Ho et al. (2020), Eq. 4.  eps: normal noise like x0."""
    return alpha_bar ** 0.5 * x0 + (1 - alpha_bar) ** 0.5 * eps


def x0_from_eps(x_t, alpha_bar, eps):
    """Return the clean image that a noise estimate implies: q_sample, solved for x0."""
    return (x_t - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar ** 0.5


def eps_from_x0(x_t, alpha_bar, x0):
    """Return the noise that a clean-image estimate implies: q_sample, solved for eps."""
    return (x_t - alpha_bar ** 0.5 * x0) / (1 - alpha_bar) ** 0.5


def ddim_step(x_t, x0, alpha_bar, alpha_bar_next, eta=0.0, noise=None):
    """Go from x_t to the next, less noisy step, as in Song et al. (2021), Eq. 12.

    x0: the current estimate of the clean image.  alpha_bar_next: that of the next step.
    eta: 0 is deterministic, 1 is as noisy as DDPM.  noise: normal noise, needed if eta is above 0.
    """
    beta = 1 - alpha_bar / alpha_bar_next
    sigma = eta * ((1 - alpha_bar_next) / (1 - alpha_bar)) ** 0.5 * beta ** 0.5
    eps = eps_from_x0(x_t, alpha_bar, x0)
    mean = alpha_bar_next ** 0.5 * x0 + (1 - alpha_bar_next - sigma ** 2) ** 0.5 * eps
    return mean if eta == 0 else mean + sigma * noise


def ddbm_bridge(N):
    """Returns (a, m, delta) over t = 0..N, each (N+1,) in float64: x_t = a x0 + m y + delta eps.

    It is the variance-preserving bridge of Zhou et al., Denoising Diffusion Bridge Models (2024).
    """
    t = torch.linspace(0, 1, N + 1, dtype=torch.float64)                # (N+1,)
    alpha = torch.exp(-0.05 * t - 0.5 * t ** 2)                         # (N+1,)
    rho2 = torch.exp(0.1 * t + t ** 2) - 1                              # (N+1,)
    rest = rho2[-1] - rho2  # (N+1,)  the variance that is still to come
    a = alpha * rest / rho2[-1]                                         # (N+1,)
    m = alpha / alpha[-1] * rho2 / rho2[-1]                             # (N+1,)
    return a, m, alpha * (rest * rho2 / rho2[-1]).sqrt()


def syndiff_schedule(N):
    """Returns the same for SynDiff (Ozbey et al., 2023).

    SynDiff is no bridge: m is 0, and x_N is almost pure noise.
    """
    t = torch.linspace(0, 1, N + 1, dtype=torch.float64)                # (N+1,)
    alpha_bar = torch.exp(-0.5 * t ** 2 * (20 - 0.1) - 0.1 * t)         # (N+1,)
    return alpha_bar.sqrt(), torch.zeros_like(t), (1 - alpha_bar).sqrt()


def falling_times(T, S):
    """The times of S evaluations on a bridge of T times, as in BBDM (Li et al., 2023).

    They are T - 1, T - 1 - h, ..., 1, 0 with h = (T - 1) / (S - 2), rounded down.  For large S,
    1 would come twice and is kept once.  S = 1 gives [T - 1], and S = 2 gives [T - 1, 0].
    """
    if S <= 2:
        return [T - 1, 0][:S]
    times = []
    h = (T - 1) / (S - 2)
    while T - 1 - len(times) * h > 1 + 1e-9:
        times.append(int(T - 1 - len(times) * h))
    return [*dict.fromkeys([*times, 1, 0])]
