"""APT's equations against numbers computed by hand, closed forms, and a Gaussian world in which the perfect denoiser is known."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import apt
from common.files import RunError
from common.schedules import cosine_alpha_bar, ddim_step, eps_from_x0, linear_alpha_bar, q_sample
from common.script import asked
from common.tasks import missing_patterns

COSINE, LINEAR = cosine_alpha_bar(), linear_alpha_bar()


# ---- losses -----------------------------------------------------------------------------------------------------------

def test_anatomy_loss_of_uninformative_features_is_ln_b():
    z = F.normalize(torch.ones(4, 8), dim=1)
    assert apt.anatomy_loss(z, z, torch.tensor(1.0), torch.arange(4)).item() == pytest.approx(math.log(4), abs=1e-6)


def test_anatomy_loss_of_perfect_features():
    z = torch.eye(4, dtype=torch.float64)
    loss = apt.anatomy_loss(z, z, torch.tensor(math.log(1 / 0.07), dtype=torch.float64), torch.arange(4))
    assert loss.item() == pytest.approx(1.8746e-6, rel=1e-4)             # ln(1 + 3 exp(-1/0.07))


def test_anatomy_loss_goes_both_ways():
    """Logits s [[.9, .1], [.3, .8]] with s = 1/0.07: the mean of rows and columns (one way alone would be 4.005e-4)."""
    a = torch.eye(2, dtype=torch.float64)
    b = torch.tensor([[0.9, 0.3], [0.1, 0.8]], dtype=torch.float64)       # rows z_sub: a @ b.T = [[.9, .1], [.3, .8]]
    loss = apt.anatomy_loss(a, b, torch.tensor(math.log(1 / 0.07), dtype=torch.float64), torch.arange(2))
    assert loss.item() == pytest.approx(2.58970e-4, rel=1e-4)


def test_slices_of_one_subject_are_no_negatives():
    z = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert apt.anatomy_loss(z[:2], z[1:], torch.tensor(1.0), torch.tensor([5, 5])).item() == pytest.approx(0, abs=1e-6)
    alone = apt.anatomy_loss(z[:2], z[:2], torch.tensor(1.0), torch.tensor([5, 6])).item()
    assert alone > 0.05


def test_temperature_is_learnable_and_bounded():
    z = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    s = torch.tensor(1.0, requires_grad=True)
    apt.anatomy_loss(z, z.roll(1, 0), s, torch.arange(4)).backward()
    assert s.grad.abs() > 1e-3
    far = [apt.anatomy_loss(z, z.roll(1, 0), torch.tensor(v), torch.arange(4)).item() for v in (math.log(100), 9.0)]
    assert far[0] == pytest.approx(far[1])


def test_diffusion_loss_by_hand():
    """A network that answers x_t: the loss is mean (eps - sqrt(a) x0 - sqrt(1-a) eps)^2, per sample with its own t."""
    alpha_bar = torch.tensor([0.64, 0.36])
    x0, eps = torch.tensor([[[[0.5]]], [[[-1.0]]]]), torch.tensor([[[[2.0]]], [[[1.0]]]])
    loss = apt.diffusion_loss(lambda x, t, z: x, x0, torch.tensor([0, 1]), eps, None, alpha_bar)
    assert loss.item() == pytest.approx(((2 - 0.8 * 0.5 - 0.6 * 2) ** 2 + (1 + 0.6 - 0.8) ** 2) / 2, rel=1e-6)


# ---- mutual information fusion ----------------------------------------------------------------------------------------

def mif(dim=32):
    torch.manual_seed(0)
    return apt.MutualInformationFusion(dim)


def test_mif_size():
    assert sum(p.numel() for p in mif(512).parameters()) == 3_415_041
    assert sum(p.numel() for p in mif(128).parameters()) == 214_785


def test_mif_is_a_unit_vector_whatever_the_order_and_blind_to_what_is_absent():
    m, f = mif(), torch.randn(2, 4, 32)
    here = torch.tensor([[True, True, False, True]] * 2)
    z = m(f, here)
    assert torch.allclose(z.norm(dim=1), torch.ones(2))
    order = [3, 0, 2, 1]
    assert torch.allclose(m(f[:, order], here[:, order]), z, atol=1e-6)
    f2 = f.clone()
    f2[:, 2] = 100
    assert torch.equal(m(f2, here), z)
    assert torch.allclose(m(f[:, [0, 1, 3]], torch.ones(2, 3, dtype=torch.bool)), z, atol=1e-6)
    assert not torch.allclose(m(f, torch.ones(2, 4, dtype=torch.bool)), z, atol=1e-3)


def test_mif_equals_torch_post_norm_transformer_layer():
    m = mif()
    layer = torch.nn.TransformerEncoderLayer(32, 4, 128, dropout=0, activation="gelu", batch_first=True, norm_first=False)
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(torch.cat([m.q.weight, m.k.weight, m.v.weight]))
        layer.self_attn.in_proj_bias.copy_(torch.cat([m.q.bias, m.k.bias, m.v.bias]))
        for theirs, ours in ((layer.self_attn.out_proj, m.o), (layer.linear1, m.ff[0]), (layer.linear2, m.ff[2])):
            theirs.load_state_dict(ours.state_dict())
    f = torch.randn(3, 4, 32)
    assert torch.allclose(m.tokens(f, torch.ones(3, 4, dtype=torch.bool)), layer(f), atol=1e-5)


def test_condition_switches():
    m, f = mif(), torch.randn(2, 4, 32)
    here = torch.tensor([[True, False, True, True]] * 2)
    z = {k: apt.condition(SimpleNamespace(mif=k, context="pooled"), m, f, here) for k in ("trained", "mean", "zero")}
    assert not z["zero"].any() and z["zero"].shape == (2, 1, 32)
    assert torch.allclose(z["mean"][:, 0], F.normalize(f[:, [0, 2, 3]].mean(1), dim=1), atol=1e-6)
    assert torch.equal(z["trained"][:, 0], m(f, here))
    scaled = apt.condition(SimpleNamespace(mif="trained", context="scaled"), m, f, here)
    assert torch.allclose(scaled, 32 ** 0.5 * z["trained"]) and torch.allclose(scaled.square().mean(2), torch.ones(2, 1))
    tokens = apt.condition(SimpleNamespace(mif="trained", context="tokens"), m, f, here)
    assert tokens.shape == (2, 4, 32) and torch.equal(tokens[:, 1], m(f, here)) and not torch.allclose(tokens[:, 0], tokens[:, 2])


# ---- intensity curves -------------------------------------------------------------------------------------------------

X = torch.tensor([-0.8, -0.6, -0.4, -0.2])


def bend(curve, x):
    """A curve of apt.CURVES on [-1, 1], through the real look-up."""
    return 2 * apt.warp((x + 1) / 2, curve) - 1


def test_scalar_reading_of_the_bezier_curves():
    inc1, inc2, dec1, dec2 = apt.CURVES["scalar"]
    assert bend(inc1, X).tolist() == pytest.approx([-0.944, -0.792, -0.568, -0.296], abs=1e-5)
    assert bend(inc2, X).tolist() == pytest.approx([-0.836, -0.648, -0.442, -0.224], abs=1e-5)
    x = torch.linspace(-0.9, 1, 1001)                                    # above the foreground threshold
    assert torch.allclose(bend(dec1, x), -bend(inc1, x), atol=1e-5) and torch.allclose(bend(dec2, x), -bend(inc2, x), atol=1e-5)
    assert (bend(inc1, x) - x).abs().max().item() == pytest.approx(0.19245, abs=1e-4)
    assert (bend(inc2, x) - x).abs().max().item() == pytest.approx(0.04811, abs=1e-4)


def test_point_reading_of_the_bezier_curves():
    """Equal x and y controls are the identity; (-1,-1), (-.5,.5), (.5,-.5), (1,1) is flat in the middle; reversed y mirrors."""
    inc1, inc2, dec1, dec2 = apt.CURVES["points"]
    x = torch.linspace(-0.9, 1, 1001)
    assert torch.allclose(bend(inc1, x), x, atol=1e-4) and torch.allclose(bend(dec1, x), -x, atol=1e-4)
    # at r = 0.25: x = -.421875 - .2109375 + .0703125 + .015625 = -.546875, y = -.421875 + .2109375 - .0703125 + .015625 = -.265625
    assert bend(inc2, torch.tensor([-0.546875])).item() == pytest.approx(-0.265625, abs=1e-4)
    assert bend(dec2, torch.tensor([-0.546875])).item() == pytest.approx(0.265625, abs=1e-4)


@pytest.mark.parametrize("reading", ["points", "scalar"])
def test_curves_are_monotone_and_keep_the_ends(reading):
    u = torch.linspace(0, 1, 10_001)
    for curve in apt.CURVES[reading]:
        v = apt.warp(u, curve)
        if curve[1][0] < 0:
            assert (v.diff() >= -1e-6).all() and v[0] == 0 and v[-1] == 1
        else:
            assert (v[u > apt.FOREGROUND].diff() <= 1e-6).all() and v[-1] == 0 and not v[u <= apt.FOREGROUND].any()


def test_inversion_acts_on_the_foreground_only():
    u = torch.tensor([0, 0.02, 0.05, 0.3, 0.6, 0.9])
    assert apt.warp(u, apt.CURVES["points"][2]).tolist() == pytest.approx([0, 0, 0.95, 0.7, 0.4, 0.1], abs=1e-4)


# ---- codebook ---------------------------------------------------------------------------------------------------------

class Pixels:
    """In place of an encoder: the picture in coarse squares, less its mean."""

    def encode_image(self, image):
        coarse = F.adaptive_avg_pool2d(image, 16).flatten(1)
        return SimpleNamespace(pooled=coarse - coarse.mean(1, keepdim=True))


@pytest.fixture(autouse=True)
def plain_curves(monkeypatch):
    """A reading with two curves: the identity and its inversion."""
    monkeypatch.setitem(apt.CURVES, "identity", [(apt.SPACED, apt.SPACED), (apt.SPACED, apt.SPACED[::-1])])


def codebook_of(u, curves="identity"):
    book = apt.Codebook(u.shape[1], curves)
    book.add(Pixels(), u[:3])
    book.add(Pixels(), u[3:])
    return book


def three_contrasts():
    """Contrast 1 = inversion of contrast 0 at 80 %, contrast 2 independent of both; a round foreground."""
    g = torch.Generator().manual_seed(0)
    i = torch.arange(32) - 15.5
    mask = (i[:, None] ** 2 + i ** 2 < 180).float()
    a = F.interpolate(torch.rand(6, 1, 8, 8, generator=g) * 0.7 + 0.2, size=32, mode="bilinear")[:, 0] * mask
    c = F.interpolate(torch.rand(6, 1, 8, 8, generator=g) * 0.7 + 0.2, size=32, mode="bilinear")[:, 0] * mask
    return torch.stack([a, 0.8 * (1 - a) * mask, c], dim=1)


def test_codebook_finds_the_right_contrast_curve_and_gain():
    u = three_contrasts()
    book = codebook_of(u)
    (source, curve), *_ = book.ranked(1, [0, 2])
    gain = book.gain(1, source, curve)
    assert (source, curve) == (0, 1)                                     # the inversion of contrast 0
    assert gain == pytest.approx(0.8, rel=1e-4)
    prior = gain * apt.warp(u[:, source], book.curves[curve])
    assert torch.allclose(prior, u[:, 1], atol=1e-4)
    assert book.votes.sum() == 6 * 3                                     # one vote per slice and target
    assert all(not book.votes[c, c].any() for c in range(3))             # never from itself
    (source, curve), *_ = book.ranked(1, [2])                             # the better source is missing too: fall back
    gain = book.gain(1, source, curve)
    assert source == 2
    assert gain == pytest.approx(float(u[:, 1].mean() / apt.warp(u[:, 2], book.curves[curve]).mean()), rel=1e-4)


def test_codebook_similarities_equal_explicit_loops():
    """similarity[target, source, curve] sums the cosine of the plain target and the bent source, in this order of indices."""
    u = three_contrasts()
    book = codebook_of(u, "points")

    def feature(image):
        return Pixels().encode_image(image[None, None]).pooled[0]
    for t, s, k in [(0, 1, 0), (1, 0, 1), (0, 2, 3), (2, 0, 3), (1, 2, 2), (2, 1, 2)]:
        cosines = [F.cosine_similarity(feature(x[t]), feature(apt.warp(x[s], book.curves[k])), dim=0) for x in u]
        assert float(book.similarity[t, s, k]) == pytest.approx(float(sum(cosines)), abs=1e-4)


def test_codebook_survives_its_state_dict():
    book = codebook_of(three_contrasts())
    again = apt.Codebook(3, "identity")
    again.load_state_dict(book.state_dict())
    assert again.ranked(1, [0, 2]) == book.ranked(1, [0, 2])


# ---- sampler ----------------------------------------------------------------------------------------------------------

def test_time_grid():
    assert apt.time_grid(400, 20)[:3] == [0, 20, 40] and apt.time_grid(400, 20)[20] == 400
    assert apt.time_grid(200, 20)[2] == 20 and apt.time_grid(200, 20)[20] == 200
    assert apt.time_grid(1000, 50)[50] == 999 and len(apt.time_grid(1000, 50)) == 51


def straight(alpha_bar):
    """A network for which the x0 estimate equals x_t, so that gradients are known."""
    return lambda x, t: x * (1 - alpha_bar[t[0]].sqrt()) / (1 - alpha_bar[t[0]]).sqrt()


def test_guidance_moves_x0_by_alpha_along_the_unit_residual():
    """Eq. (4) with x0_hat = x_t: the gradient of ||known (x - y)|| is known (x - y) / ||...||, one norm per sample."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 3, 4, 4, generator=g) - 0.5, torch.rand(2, 3, 4, 4, generator=g) - 0.5
    known = torch.tensor([[1.0, 0, 1], [1, 1, 0]])[:, :, None, None]
    out = apt.guided_x0(straight(COSINE), x, 200, COSINE, y, known, alpha=0.3)
    r = known * (x - y)
    expected = x - 0.3 * r / r.flatten(1).norm(dim=1)[:, None, None, None]
    assert torch.allclose(out, expected, atol=1e-5)
    alone = apt.guided_x0(straight(COSINE), x[1:], 200, COSINE, y[1:], known[1:], alpha=0.3)
    assert torch.allclose(out[1:], alone, atol=1e-6)                     # batch mates do not matter


def test_estimates_are_clamped_before_guidance():
    """x0_hat = x_t = 1.5 becomes 1, and a clamped pixel passes no gradient, so that it does not move; 0.5 does."""
    x = torch.tensor([1.5, 0.5, -2.0, -0.5]).view(1, 1, 2, 2)
    out = apt.guided_x0(straight(COSINE), x, 200, COSINE, torch.zeros_like(x), torch.ones(1, 1, 1, 1), alpha=0.3)
    norm = (1 + 0.25 + 1 + 0.25) ** 0.5
    assert out.flatten().tolist() == pytest.approx([1, 0.5 - 0.3 * 0.5 / norm, -1, -0.5 + 0.3 * 0.5 / norm], abs=1e-5)


def test_guidance_at_zero_residual_and_at_high_noise():
    x, known = torch.rand(1, 2, 4, 4) - 0.5, torch.ones(1, 2, 1, 1)
    plain = apt.guided_x0(straight(COSINE), x, 200, COSINE, x, known, alpha=0)
    assert torch.equal(apt.guided_x0(straight(COSINE), x, 200, COSINE, plain, known, alpha=5), plain)      # zero residual: no NaN, no move
    assert COSINE[990] < 0.01
    assert torch.equal(apt.guided_x0(straight(COSINE), x, 990, COSINE, x + 1, known, 5), apt.guided_x0(straight(COSINE), x, 990, COSINE, x + 1, known, 0))


def test_a_mixing_network_passes_guidance_to_missing_contrasts():
    def mixing(x, t):
        return straight(COSINE)(x, t) + 0.1 * x.flip(1)
    x, known = torch.rand(1, 2, 4, 4) - 0.5, torch.tensor([[1.0, 0]])[:, :, None, None]
    moved = [(apt.guided_x0(net, x, 200, COSINE, x + 0.3, known, 1) - apt.guided_x0(net, x, 200, COSINE, x + 0.3, known, 0))[0, 1].abs().max() for net in (straight(COSINE), mixing)]
    assert moved[0] == 0 and moved[1] > 1e-4


def test_alpha_zero_builds_no_graph():
    seen = []
    def net(x, t):
        seen.append(torch.is_grad_enabled() or x.requires_grad)
        return x * 0
    apt.guided_x0(net, torch.zeros(1, 1, 2, 2), 200, COSINE, torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 1, 1), 0)
    assert seen == [False]


def sample(eps_model, y, known, prior, alpha_bar, M=400, S=20, N=50, alpha=5.0, w=0.5, paste=False, second=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def noise():
        return torch.randn(y.shape, generator=g)
    grid = apt.time_grid(M, S)
    x0 = apt.stage1(eps_model, y, known, prior, noise, alpha_bar, grid, alpha)
    return apt.stage2(eps_model, x0, y, known, noise, alpha_bar, grid, alpha, N, w, paste) if second else x0


@pytest.mark.parametrize("M, S, N, alpha, w, prior", [(400, 20, 50, 5, 0.5, 0.0), (200, 10, 3, 0, 1.0, None), (1000, 50, 10, 20, 0.3, 0.7), (20, 20, 10, 5, 0.5, None)])
def test_a_perfect_denoiser_returns_x0(M, S, N, alpha, w, prior):
    g = torch.Generator().manual_seed(1)
    x0 = torch.rand(2, 3, 8, 8, generator=g) * 1.8 - 0.9
    known = torch.tensor([[1.0, 0, 1], [0, 1, 0]])[:, :, None, None]
    count = []

    def perfect(x, t):
        count.append(int(t[0]))
        return eps_from_x0(x, COSINE[t[0]], x0)
    start = None if prior is None else torch.full_like(x0, prior)
    out = sample(perfect, x0 * known, known, start, COSINE, M, S, N, alpha, w)
    assert torch.allclose(out, x0, atol=1e-4)
    grid = apt.time_grid(M, S)
    assert count == grid[::-1] + [grid[2]] * (N - 2) + [grid[1], grid[0]]                 # S + 1 + N evaluations, at these times


def test_stage1_starts_from_the_prior_at_m():
    """A network that refuses to change anything shows what stage 1 starts from: known and prior noised to M, missing pure noise without."""
    starts = []

    def spy(x, t):
        starts.append(x.clone())
        return x
    y, known = torch.full((1, 2, 64, 64), 0.5), torch.tensor([[1.0, 0]])[:, :, None, None]
    for prior in (torch.full((1, 2, 64, 64), -0.25), None):
        starts.clear()
        sample(spy, y, known, prior, COSINE, second=False, alpha=0)
        a = COSINE[400].item()
        assert starts[0][0, 0].mean().item() == pytest.approx(a ** 0.5 * 0.5, abs=0.03)
        assert starts[0][0, 0].var().item() == pytest.approx(1 - a, abs=0.03)
        assert starts[0][0, 1].mean().item() == pytest.approx(0 if prior is None else -0.25 * a ** 0.5, abs=0.05)
        assert starts[0][0, 1].var().item() == pytest.approx(1 if prior is None else 1 - a, abs=0.05)


def test_weighted_averaging_by_hand():
    """Eq. (5) with a network whose x0 estimate is the constant 0.6: after N - 2 rounds p = 0.6 + (p0 - 0.6)(1 - w)^(N-2); the two last
    rounds take the estimate as it is, so look at what the last round is given."""
    inputs = []

    def constant(x, t):
        inputs.append(x.clone())
        return eps_from_x0(x, COSINE[t[0]], torch.full_like(x, 0.6))
    zero = torch.zeros(1, 1, 64, 64)
    out = apt.stage2(constant, zero, zero, torch.zeros(1, 1, 1, 1), lambda: zero, COSINE, apt.time_grid(400, 20), 0, 5, 0.25, False)
    means = [i.mean().item() for i in inputs]
    a, b, c = (COSINE[t].item() ** 0.5 for t in (40, 20, 0))
    averaged = [0.6 * (1 - 0.75 ** n) for n in range(4)]
    assert means == pytest.approx([a * averaged[0], a * averaged[1], a * averaged[2], b * averaged[3], c * 0.6], abs=1e-5)
    assert out.mean().item() == pytest.approx(0.6, abs=1e-5)


def test_paste_in_stage_2_keeps_known_contrasts():
    def drifting(x, t):
        return eps_from_x0(x, COSINE[t[0]], torch.full_like(x, 0.9))
    y, known = torch.full((1, 2, 4, 4), -0.3), torch.tensor([[1.0, 0]])[:, :, None, None]
    kept, drifted = (sample(drifting, y, known, torch.zeros_like(y), COSINE, alpha=0, paste=p)[0, 0].mean().item() for p in (True, False))
    assert kept == pytest.approx(-0.3) and drifted == pytest.approx(0.9, abs=1e-4)


# ---- a Gaussian world: correlated random fields, for which the best denoiser is a linear filter -----------------------

class GaussianWorld:
    """x0 = channels mixed by A, spectrum ~ (k^2 + 4)^-1.25; .denoiser gives the exact posterior mean's noise."""

    def __init__(self, n=64):
        A = torch.tensor([[.25, .10, 0], [.22, -.12, .02], [.18, .02, .10], [-.22, .14, .05]], dtype=torch.float64)
        self.S = A @ A.T + torch.eye(4, dtype=torch.float64) * .03 ** 2
        k = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
        spectrum = (k[:, None] ** 2 + k ** 2 + 4) ** -1.25
        power, self.U = torch.linalg.eigh(self.S)
        self.v = power[:, None, None] * spectrum / spectrum.mean()      # variance in the eigenbasis of channels x Fourier

    def filter(self, x, gain):
        z = torch.einsum("ij,bjhw->bihw", self.U.T, x.double()).to(torch.complex128)
        z = torch.fft.ifft2(torch.fft.fft2(z) * gain).real
        return torch.einsum("ij,bjhw->bihw", self.U, z).float()

    def draw(self, seeds):
        noise = torch.stack([torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(1000 + s)) for s in range(seeds)])
        return self.filter(noise, self.v.sqrt())

    def denoiser(self, alpha_bar):
        def eps(x, t):
            a = alpha_bar[t[0]].double()
            return eps_from_x0(x, alpha_bar[t[0]], self.filter(x, a.sqrt() * self.v / (a * self.v + 1 - a)))
        return eps


@pytest.fixture(scope="module")
def world():
    w = GaussianWorld()
    x0 = w.draw(12)
    known = torch.tensor([0.0, 1, 1, 1])[None, :, None, None].expand(12, -1, 1, 1)

    def rmse(schedule, alpha=5.0, copy=True, **how):
        alpha_bar = {"cosine": COSINE, "linear": LINEAR}[schedule]
        prior = x0[:, [1]].expand(-1, 4, -1, -1) if copy else None
        out = sample(w.denoiser(alpha_bar), x0 * known, known, prior, alpha_bar, alpha=alpha, **how)
        return (out - x0)[:, 0].square().mean((1, 2)).sqrt().mean().item()
    return SimpleNamespace(rmse=rmse, x0=x0, known=known, gauss=w)


# alpha = 20 * 64 / 256 = 5; reference values from an independent NumPy implementation, +- 0.012 for another draw of the noise
@pytest.mark.parametrize("how, cosine, linear", [
    (dict(second=False), .1746, .1850), (dict(second=False, alpha=0.0), .1859, .1967), (dict(second=False, copy=False), .1764, .1847),
    pytest.param(dict(paste=True), .1564, .1632, marks=pytest.mark.slow), pytest.param(dict(paste=False), .1607, .1787, marks=pytest.mark.slow),
    pytest.param(dict(paste=True, w=1.0), .1628, .1729, marks=pytest.mark.slow)])
def test_gaussian_world_errors(world, how, cosine, linear):
    assert world.rmse("cosine", **how) == pytest.approx(cosine, abs=0.012)
    assert world.rmse("linear", **how) == pytest.approx(linear, abs=0.012)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_gaussian_world_orderings(world, schedule):
    stage_1 = world.rmse(schedule, second=False)
    assert stage_1 < world.rmse(schedule, second=False, alpha=0.0)                       # guidance helps
    both, first = world.rmse(schedule, paste=True), world.rmse(schedule, paste=False)
    assert both < first < stage_1                                                        # stage 2 helps, pasting helps it
    ddim = {eta: ddim_error(world, schedule, eta) for eta in (0.0, 1.0)}
    assert stage_1 < ddim[1.0] < ddim[0.0]                                               # fresh noise beats DDIM [D5]


def ddim_error(world, schedule, eta):
    """Stage 1 with DDIM steps in place of fresh noise; everything else is the script's."""
    alpha_bar = {"cosine": COSINE, "linear": LINEAR}[schedule]
    g, grid, known, y = torch.Generator().manual_seed(0), apt.time_grid(400, 20), world.known, world.x0 * world.known
    x = q_sample(torch.where(known > 0, world.x0, world.x0[:, [1]]), alpha_bar[400], torch.randn(y.shape, generator=g))
    for j in range(20, -1, -1):
        x0 = apt.guided_x0(world.gauss.denoiser(alpha_bar), x, grid[j], alpha_bar, y, known, 5.0)
        x0 = known * y + (1 - known) * x0
        if j > 0:
            x = ddim_step(x, x0, alpha_bar[grid[j]], alpha_bar[grid[j - 1]], eta, torch.randn(y.shape, generator=g))
    return (x0 - world.x0)[:, 0].square().mean((1, 2)).sqrt().mean().item()


def test_squared_norm_with_the_printed_step_diverges(world):
    """The reason for [D3]: with the squared norm of the text, alpha = 20 is no descent any more."""
    def squared(eps_model, x_t, t, alpha_bar, y, known, alpha):
        x_t = x_t.detach().requires_grad_()
        x0 = apt.x0_from_eps(x_t, alpha_bar[t], eps_model(x_t, torch.full((len(x_t),), t))).clamp(-1, 1)
        g, = torch.autograd.grad((known * (x0 - y)).square().sum(), x_t)
        return (x0 - alpha * g).detach()
    before = apt.guided_x0
    try:
        apt.guided_x0 = squared
        assert world.rmse("cosine", second=False, alpha=20.0) > 0.5
    finally:
        apt.guided_x0 = before


# ---- tasks ------------------------------------------------------------------------------------------------------------

def test_patterns():
    names = ("flair", "t1", "t1ce", "t2")
    assert [missing for _, missing in missing_patterns(("each",), names)] == [("flair",), ("t1",), ("t1ce",), ("t2",)]
    assert len(missing_patterns(("all",), names)) == 4 + 6 + 4
    assert missing_patterns(("t2", "flair"), names) == [(("t1", "t1ce"), ("flair", "t2"))]         # contrast 0 is not forgotten
    assert asked(apt.METHOD, apt.Config(missing=("t2", "flair")), names) == ("flair", "t2") and asked(apt.METHOD, apt.Config(), names) == ()
    for bad in (("t3",), names):
        with pytest.raises(RunError, match="--missing"):
            missing_patterns(bad, names)
