"""The autoencoder and its codebook: known sizes, losses by hand and in float64, exact training, and latents that fit their weights."""
import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import test_run
import torch
from conftest import ROOT, wake
from torch import nn
from torch.nn import functional as F
from toys import flat

from common import autoencoder, vqae
from common import codebook as cb
from common.autoencoder import PatchDiscriminator
from common.files import RunError
from common.vqae import VQAE


def tiny(bottleneck="vq", codes=16, seed=None, **changes):
    """An autoencoder with f = 4 and a few thousand weights."""
    if seed is not None:
        torch.manual_seed(seed)
    values = dict(base=8, mult=(1, 2, 2), blocks=1, codes=codes, size=16, middle=False, z=3, bottleneck=bottleneck)
    return VQAE(**{**values, **changes})


def shapes(numbers, size=16, kinds=3):
    """Smooth images: a bright disc on black, a dark one on grey, and a ramp, each its own kind."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    images = []
    for n in np.asarray(numbers).tolist():
        g = torch.Generator().manual_seed(n)
        a, b, r = (torch.rand(3, generator=g) - 0.5).tolist()
        disc = torch.sigmoid(((0.5 + 0.3 * r) - ((x - a) ** 2 + (y - b) ** 2).sqrt()) * 12)
        kind = n % kinds
        images.append(2 * disc - 1 if kind == 0 else -0.7 * disc * x if kind == 1 else 0.8 * disc * torch.sin(4 * x + 9 * r) - 0.1)
    return torch.stack(images)[:, None].float()


def number_of(module):
    return sum(p.numel() for p in module.parameters())


# ---- Networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, base, mult, blocks, codes, size, attention, middle, z, bottleneck, millions", [
    (3, 128, (1, 2, 4), 2, 8192, 256, (), True, 3, "vq", 55.32),
    (3, 128, (1, 2, 2, 4), 2, 16384, 256, (32,), True, 4, "vq", 67.72),
    (3, 128, (1, 2, 4, 4), 2, 0, 256, (), True, 4, "kl", 83.65),
    (1, 128, (1, 2, 2, 4), 2, 16384, 128, (32,), True, 4, "vq", 63.8),
    (1, 128, (1, 2, 2, 4), 2, 16384, 512, (), True, 4, "vq", 62.5),
    (1, 16, (1, 2, 2), 1, 256, 64, (), False, 4, "vq", 0.23),
    (1, 16, (1, 2, 4, 4), 1, 256, 64, (), True, 4, "vq", 0.98)])
def test_sizes_are_those_of_the_published_models(channels, base, mult, blocks, codes, size, attention, middle, z, bottleneck, millions):
    with torch.device("meta"):
        ae = VQAE(base, mult, blocks, codes, size, attention, middle, channels, z, bottleneck)
        x = torch.zeros(1, channels, size, size)
        assert ae.encode(x).shape == (1, z, size // ae.f, size // ae.f) and ae.f == 2 ** (len(mult) - 1)
        assert ae.decode(torch.zeros(1, z, size // ae.f, size // ae.f), quantised=True).shape == x.shape
    digits = 1 if millions in (63.8, 62.5) else 2
    assert round(number_of(ae) / 1e6, digits) == millions


def test_encoder_and_decoder_share_the_weights_as_known():
    with torch.device("meta"):
        for args, sizes in [((128, (1, 2, 4), 2, 8192, 256, (), True, 3, 3), (22.3, 33.0)),
                            ((128, (1, 2, 2, 4), 2, 16384, 256, (32,), True, 3, 4), (27.4, 40.3)),
                            ((128, (1, 2, 4, 4), 2, 0, 256, (), True, 3, 4, "kl"), (34.2, 49.5))]:
            ae = VQAE(*args)
            assert (round(number_of(ae.encoder) / 1e6, 1), round(number_of(ae.decoder) / 1e6, 1)) == sizes


@pytest.mark.parametrize("base, layers, size, out, millions", [(64, 3, 256, 30, 2.76), (64, 3, 128, 14, 2.76), (64, 2, 256, 62, 0.66),
                                                               (16, 2, 64, 14, 0.04)])
def test_patches(base, layers, size, out, millions):
    D = PatchDiscriminator(1, base, layers)
    assert round(number_of(D) / 1e6, 2) == millions and D(torch.randn(1, 1, size, size)).shape == (1, 1, out, out)


def test_a_patch_sees_as_many_pixels_as_said():
    for layers, wide in ((3, 70), (2, 34)):
        D = PatchDiscriminator(1, 8, layers)
        for layer in D.modules():                                                       # normalisation looks at the whole image
            if isinstance(layer, nn.Sequential):
                layer = nn.Sequential(*[part for part in layer if not isinstance(part, nn.GroupNorm)])
                break
        x = torch.randn(1, 1, 128, 128, requires_grad=True)
        logits = layer(x)
        logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
        assert int(x.grad[0, 0].any(0).sum()) == wide


def test_discriminator_starts_as_pix2pix_and_judges_each_image_alone():
    torch.manual_seed(0)
    D = PatchDiscriminator(1, 64, 3)
    weights = torch.cat([m.weight.flatten() for m in D.modules() if isinstance(m, nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    gains = torch.cat([m.weight for m in D.modules() if isinstance(m, nn.GroupNorm)])
    assert gains.mean().item() == pytest.approx(1, abs=0.01) and gains.std().item() == pytest.approx(0.02, rel=0.1)
    x = torch.randn(3, 1, 32, 32)
    assert torch.allclose(D(x)[1:2], D(x[1:2]), atol=1e-6)


def test_arguments_that_do_not_go_together_are_refused():
    for changes, word in [(dict(size=18), "multiple of 4"), (dict(bottleneck="vae"), "vq, kl, none"), (dict(attention=(5,)), "16, 8, 4"),
                          (dict(base=6), "base 6"), (dict(base=144), "base 144")]:
        with pytest.raises(ValueError, match=word):
            tiny(**changes)
    with pytest.raises(ValueError, match="16 x 18"):
        tiny().encode(torch.zeros(1, 1, 16, 18))
    with pytest.raises(ValueError, match="18 x 16"):
        tiny().to_latent(torch.zeros(1, 1, 18, 16))


def test_other_aspect_ratios_work():
    ae = tiny(attention=(8,), middle=True)
    x = torch.randn(2, 1, 12, 28)
    assert ae.encode(x).shape == (2, 3, 3, 7) and ae(x)[0].shape == x.shape and ae(x)[2].shape == (2, 3, 7)


def test_attention_by_hand():
    torch.manual_seed(0)
    attention = vqae.MapAttention(8)
    x = torch.randn(2, 8, 3, 5)
    h = F.group_norm(x, 2, attention.norm.weight, attention.norm.bias, eps=1e-6)
    q, k, v = F.conv2d(h, attention.to_qkv.weight, attention.to_qkv.bias).flatten(2).chunk(3, dim=1)    # (B, C, N)
    share = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(8), dim=2)
    a = torch.einsum("bnm,bcm->bcn", share, v).view(2, 8, 3, 5)
    assert torch.allclose(attention(x), x + attention.out(a), atol=1e-5)


def test_residual_block_by_hand():
    torch.manual_seed(0)
    block = vqae.PlainResBlock(8, 12)
    wake(block)
    x = torch.randn(2, 8, 5, 5)
    h = F.conv2d(F.silu(F.group_norm(x, 2, eps=1e-6)), block.conv1.weight, block.conv1.bias, padding=1)
    h = F.conv2d(F.silu(F.group_norm(h, 3, eps=1e-6)), block.conv2.weight, block.conv2.bias, padding=1)
    block.norm1.bias.data.zero_()
    block.norm2.bias.data.zero_()
    assert torch.allclose(block(x), h + block.skip(x), atol=1e-5)
    assert isinstance(vqae.PlainResBlock(8, 8).skip, nn.Identity)
    assert vqae.group_norm(64).num_groups == 16 and vqae.group_norm(256).num_groups == 32 and vqae.group_norm(64).eps == 1e-6


def test_where_attention_goes():
    ae = tiny(attention=(8,), middle=True)
    found = [name for name, module in ae.named_modules() if isinstance(module, vqae.MapAttention)]
    assert found == ["encoder.levels.1.1", "encoder.middle.1", "decoder.middle.1", "decoder.levels.1.1", "decoder.levels.1.3"]


def test_shrinking_looks_right_and_down_only():
    """The map is padded right and below: output i sees inputs 2i .. 2i+2."""
    encoder = tiny(mult=(1, 1)).encoder
    encoder.levels[0] = encoder.levels[1] = encoder.middle = encoder.head = nn.Identity()
    nn.init.zeros_(encoder.stem.weight)
    nn.init.zeros_(encoder.stem.bias)
    encoder.stem.weight.data[:, 0, 1, 1] = 1                                             # hands the image on
    x = torch.zeros(1, 1, 16, 16, requires_grad=True)
    encoder(x)[0, :, 2, 3].sum().backward()
    rows, columns = x.grad[0, 0].nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 6, 6, 8)


def test_output_is_linear_and_every_weight_learns():
    ae = tiny(attention=(4,), middle=True, seed=0)
    wake(ae)
    with torch.no_grad():
        ae.decoder.head[-1].bias.fill_(5.0)
    x = torch.randn(2, 1, 16, 16)
    x_hat, loss, _ = ae(x)
    assert x_hat.mean() > 3
    (x_hat.square().mean() + loss).backward()
    assert [n for n, p in ae.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---- Bottlenecks ---------------------------------------------------------------------------------


def test_nearest_is_brute_force_and_chunks_change_nothing():
    g = torch.Generator().manual_seed(0)
    sites, codes = torch.randn(999, 4, generator=g), torch.randn(64, 4, generator=g) + 3 * torch.randn(64, 1, generator=g)
    brute = (sites.double()[:, None] - codes.double()).square().sum(2).argmin(1)
    assert torch.equal(cb.nearest(sites, codes), brute)
    assert torch.equal(cb.nearest(sites, codes, chunk=100), brute) and torch.equal(cb.nearest(sites, codes, chunk=1), brute)


def test_bf16_does_not_touch_the_choice_of_codes():
    g = torch.Generator().manual_seed(0)
    book = cb.Codebook(512, 4)
    h = torch.randn(2, 4, 16, 16, generator=g)
    _, loss, idx = book(h)
    with torch.autocast("cpu", torch.bfloat16):
        zq, loss16, idx16 = book(h)
    assert torch.equal(idx, idx16) and loss == loss16 and zq.dtype == torch.float32


def test_a_code_is_its_own_nearest_and_costs_nothing():
    book = cb.Codebook(12, 3)
    h = book.weight.detach().T.reshape(1, 3, 3, 4).clone()                               # code 4 r + c at (r, c)
    zq, loss, idx = book(h)
    assert torch.equal(idx, torch.arange(12).view(1, 3, 4)) and torch.equal(zq, h) and loss == 0


def test_codes_go_where_their_sites_are():
    book = cb.Codebook(3, 2)
    book.weight.data = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    h = torch.zeros(2, 2, 2, 2)
    h[1, :, 0, 1] = torch.tensor([9.0, 1.0])
    h[0, :, 1, 0] = torch.tensor([1.0, 8.0])
    zq, _, idx = book(h)
    assert idx.tolist() == [[[0, 0], [2, 0]], [[0, 1], [0, 0]]]
    assert zq[1, :, 0, 1].tolist() == [10, 0] and zq[0, :, 1, 0].tolist() == [0, 10] and zq[0, :, 0, 0].tolist() == [0, 0]


def test_gradient_goes_straight_through():
    g = torch.Generator().manual_seed(0)
    book = cb.Codebook(8, 3)
    h = torch.randn(2, 3, 4, 4, generator=g, requires_grad=True)
    weights = torch.randn(2, 3, 4, 4, generator=g)
    (book(h)[0] * weights).sum().backward()
    assert torch.equal(h.grad, weights) and (book.weight.grad is None or not book.weight.grad.any())


def test_beta_is_on_the_commitment_term():
    g = torch.Generator().manual_seed(0)
    book = cb.Codebook(5, 3)
    h = torch.randn(2, 3, 4, 4, generator=g, requires_grad=True)
    _, loss, idx = book(h)
    loss.backward()
    e = book.weight.detach()[idx].permute(0, 3, 1, 2)
    error = h.detach() - e
    assert loss.item() == pytest.approx(1.25 * error.square().mean().item())
    assert torch.allclose(h.grad, 2 * 0.25 * error / h.numel(), atol=1e-7)
    pull = torch.zeros(5, 3).index_add_(0, idx.flatten(), -2 * error.permute(0, 2, 3, 1).flatten(0, 2) / h.numel())
    assert torch.allclose(book.weight.grad, pull, atol=1e-7)


def test_kl_by_hand():
    zero = torch.zeros(2, 3, 4, 5)
    assert vqae.gaussian(zero, zero)[1] == 0
    assert vqae.gaussian(zero + 1, zero)[1].item() == pytest.approx(3 * 4 * 5 / 2)
    g = torch.Generator().manual_seed(0)
    mean, logvar, eps = (torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64) for _ in range(3))
    normal = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    sample, kl = vqae.gaussian(mean, logvar, eps)
    assert torch.allclose(kl, expected) and torch.allclose(sample, mean + logvar.exp().sqrt() * eps)
    assert torch.equal(vqae.gaussian(mean, logvar)[0], mean)
    _, low = vqae.gaussian(zero, zero - 99)
    _, high = vqae.gaussian(zero, zero + 99)
    assert low.item() == pytest.approx(60 / 2 * (math.exp(-30) - 1 + 30)) and high.item() == pytest.approx(60 / 2 * (math.exp(20) - 21))


def test_kl_bottleneck():
    ae = tiny("kl", seed=0)
    x = torch.randn(2, 1, 16, 16)
    features = ae.features(x)
    assert features.shape == (2, 6, 4, 4) and torch.equal(ae.encode(x), features[:, :3]) and ae.codebook is None
    eps = torch.randn(2, 3, 4, 4)
    drawn, loss, idx = ae(x, eps)
    assert torch.equal(drawn, ae.decode(ae.encode(x) + (features[:, 3:] / 2).exp() * eps)) and idx is None
    assert torch.equal(loss, vqae.gaussian(features[:, :3], features[:, 3:])[1])
    assert torch.equal(ae(x)[0], ae.decode(ae.encode(x)))
    assert torch.equal(ae.quantise(features[:, :3])[0], features[:, :3])


def test_no_bottleneck_is_the_identity():
    ae = tiny("none", channels=2, z=7)
    x = torch.randn(2, 2, 5, 9).clamp(-1, 1)
    assert ae.f == 1 and ae.z == 2 and not list(ae.parameters()) and not ae.mu.any() and (ae.sigma == 1).all()
    x_hat, loss, idx = ae(x)
    for same in (x_hat, ae.encode(x), ae.decode(x), ae.to_latent(x), ae.from_latent(x)):
        assert torch.equal(same, x)
    assert loss == 0 and idx is None and ae.mu.shape == (1, 2, 1, 1)


def test_decoding_quantises_unless_told():
    ae = tiny(seed=0)
    h = torch.randn(2, 3, 4, 4)
    zq, _, _ = ae.quantise(h)
    assert torch.equal(ae.decode(h), ae.decode(zq, quantised=True)) and not torch.allclose(ae.decode(h), ae.decode(h, quantised=True))
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(ae(x)[0], ae.decode(ae.encode(x)))


# ---- Codes that are used -------------------------------------------------------------------------


def test_sites_are_rows_of_the_map():
    h = torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2)
    assert cb.sites_of(h)[1].tolist() == [1, 5, 9] and cb.sites_of(h)[4].tolist() == [12, 16, 20]


def test_drawn_sites_are_different_rows_or_repeat_with_little_noise():
    sites = torch.arange(20.0).view(10, 2) * 100
    g = torch.Generator().manual_seed(0)
    drawn = cb.draw_sites(sites, 10, g)
    assert sorted(drawn[:, 0].tolist()) == sites[:, 0].tolist() and not torch.equal(drawn, sites)
    assert cb.draw_sites(sites, 3, g).shape == (3, 2) and cb.draw_sites(sites, 0, g).shape == (0, 2)
    many = cb.draw_sites(sites, 4000, g)
    away = many - sites[((many[:, :1] - sites[:, 0]).abs()).argmin(1)]
    assert len(many.unique(dim=0)) == 4000
    assert away.std(0).tolist() == pytest.approx((0.01 * sites.std(0, unbiased=False)).tolist(), rel=0.1)
    assert set(((many[:, 0] / 200).round()).tolist()) == set(range(10))


def test_first_codes_are_sites_of_the_data():
    books = [cb.Codebook(6, 2), cb.Codebook(6, 2)]
    sites = torch.randn(40, 2) + 50
    cb.first_codes(books, sites, torch.Generator().manual_seed(0))
    rows = {tuple(row) for row in sites.tolist()}
    codes = [tuple(row) for row in books[0].weight.tolist()]
    assert set(codes) <= rows and len(set(codes)) == 6 and torch.equal(books[0].weight, books[1].weight)


def test_use_by_hand():
    use = cb.CodeUse(4, "cpu")
    use.add(torch.tensor([[0, 1], [2, 3]]))
    assert use.perplexity().item() == pytest.approx(4) and use.share() == 1
    use.clear()
    use.add(torch.tensor([2, 2]))
    use.add(torch.tensor([2]))
    assert use.counts.tolist() == [0, 0, 3, 0] and use.perplexity().item() == pytest.approx(1) and use.share() == 0.25
    use.add(torch.tensor([1]))
    assert use.perplexity().item() == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    again = cb.CodeUse(4, "cpu")
    again.load_state_dict(use.state_dict())
    again.add(torch.tensor([0]))
    assert again.counts.tolist() == [1, 1, 3, 0] and use.counts.tolist() == [0, 1, 3, 0]


def test_a_code_is_dead_below_three_percent_of_an_equal_share():
    use = cb.CodeUse(4, "cpu")
    use.counts += torch.tensor([2, 3, 200, 195])                                         # an equal share is 100
    assert use.dead().tolist() == [True, False, False, False]


def test_restart_moves_dead_codes_alone_and_forgets_their_moments():
    book, average = cb.Codebook(6, 2), cb.Codebook(6, 2)
    optimiser = torch.optim.Adam(book.parameters(), lr=0.1)
    book(torch.randn(2, 2, 4, 4))[1].backward()
    optimiser.step()
    before, old_average = book.weight.detach().clone(), average.weight.detach().clone()
    memory = optimiser.state[book.weight]
    memory["exp_avg"].fill_(3.0)
    memory["exp_avg_sq"].fill_(4.0)
    dead = torch.tensor([False, True, False, False, True, False])
    sites = torch.randn(30, 2) + 50
    assert cb.restart([book, average], dead, sites, optimiser, torch.Generator().manual_seed(0)) == 2
    assert torch.equal(book.weight[~dead], before[~dead]) and torch.equal(average.weight[~dead], old_average[~dead])
    rows = {tuple(row) for row in sites.tolist()}
    assert all(tuple(row) in rows for row in book.weight[dead].tolist()) and torch.equal(book.weight[dead], average.weight[dead])
    for name, value in (("exp_avg", 3), ("exp_avg_sq", 4)):
        assert (memory[name][dead] == 0).all() and (memory[name][~dead] == value).all()


def test_restart_without_dead_codes_or_moments_changes_nothing():
    book = cb.Codebook(6, 2)
    before = book.weight.detach().clone()
    dead = torch.zeros(6, dtype=torch.bool)
    assert cb.restart([book], dead, torch.randn(30, 2), torch.optim.Adam(book.parameters()), torch.Generator()) == 0
    assert torch.equal(before, book.weight)


def test_restart_revives_a_codebook_that_starts_far_away():
    """Data of 50 clusters, 64 codes at one far place: most are used after restarts, few without."""
    shares = {}
    for restarts in (False, True):
        torch.manual_seed(0)
        centres = 3 * torch.randn(50, 4)
        book = cb.Codebook(64, 4)
        book.weight.data = 20 + 0.1 * book.weight.data
        optimiser = torch.optim.Adam(book.parameters(), lr=0.02)
        use = cb.CodeUse(64, "cpu")
        for step in range(200):
            sites = centres[torch.randint(50, (512,))] + 0.1 * torch.randn(512, 4)
            _, loss, idx = book(sites.view(2, 16, 16, 4).permute(0, 3, 1, 2))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            use.add(idx)
            if (step + 1) % 25 == 0:
                shares[restarts] = use.share().item()
                if restarts and step < 160:
                    cb.restart([book], use.dead(), sites, optimiser, torch.Generator().manual_seed(step))
                use.clear()
    assert shares[True] >= 0.8 and shares[False] < 0.3


# ---- Losses --------------------------------------------------------------------------------------


def test_hinge_by_hand():
    zero = torch.zeros(2, 1, 3, 3)
    assert autoencoder.discriminator_loss(zero, zero) == 1 and autoencoder.discriminator_loss(zero + 2, zero - 2) == 0
    assert autoencoder.discriminator_loss(torch.tensor([0.5, 3.0]), torch.tensor([-0.2, 1.0])).item() == pytest.approx((0.25 + 1.4) / 2)
    assert autoencoder.adversarial_loss(torch.tensor([1.0, 4.0])) == -2.5


def test_adaptive_weight_of_a_toy():
    w = torch.tensor([2.0], requires_grad=True)
    rec, adv = 3 * w.square().sum(), -5 * w.sum()
    run = test_run.SimpleNamespace(world=1)
    weight = autoencoder.adaptive_weight_of(run, rec, adv, w)
    assert weight.item() == pytest.approx(12 / (5 + 1e-4)) and not weight.requires_grad
    assert autoencoder.adaptive_weight_of(run, 2 * rec, adv, w).item() == pytest.approx(2 * weight.item())
    assert autoencoder.adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0])) == 1e4
    assert autoencoder.adaptive_weight(torch.tensor([3e-5, 4e-5]), torch.tensor([0.0])).item() == pytest.approx(0.5)
    assert autoencoder.adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8])).item() == pytest.approx(5 / 1.0001)
    assert not autoencoder.adaptive_weight(w, w).requires_grad


def reference_pyramid(d):
    """Sum of the pyramid loss for one image of differences (H, W), with NumPy and matrices."""
    def blur_matrix(n):
        matrix = np.zeros((n, n))
        for i in range(n):
            for offset, tap in zip((-2, -1, 0, 1, 2), (1, 4, 6, 4, 1)):
                j = abs(i + offset)
                matrix[i, min(j, 2 * (n - 1) - j)] += tap / 16
        return matrix
    total, image = 0.0, d
    for s in range(3):
        rows, columns = blur_matrix(image.shape[0]), blur_matrix(image.shape[1])
        half = (rows @ image @ columns.T)[::2, ::2]
        spread = np.zeros_like(image)
        spread[::2, ::2] = half
        total += 0.5 ** s * np.abs(image - (2 * rows) @ spread @ (2 * columns).T).mean()
        image = half
    total += 0.125 * np.abs(image).mean()
    return total + 0.5 * (np.abs(np.diff(d, axis=0)).mean() + np.abs(np.diff(d, axis=1)).mean())


@pytest.mark.parametrize("height, width", [(16, 16), (24, 20), (15, 13)])
def test_pyramid_loss_is_the_sum_of_its_levels(height, width):
    g = torch.Generator().manual_seed(0)
    x, x_hat = torch.randn(2, 3, height, width, generator=g), torch.randn(2, 3, height, width, generator=g)
    d = (x - x_hat).double().numpy()
    expected = np.mean([[reference_pyramid(d[b, c]) for c in range(3)] for b in range(2)])
    assert autoencoder.pyramid_loss(x, x_hat).item() == pytest.approx(expected, rel=1e-5)


def test_pyramid_loss_is_zero_for_equal_images_only():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 16, 16, generator=g)
    assert autoencoder.pyramid_loss(x, x) == 0
    for i, j in ((0, 0), (7, 8), (15, 15), (1, 15)):
        other = x.clone()
        other[0, 0, i, j] += 0.1
        assert autoencoder.pyramid_loss(x, other) > 1e-4
    assert autoencoder.pyramid_loss(x, x + 0.8).item() == pytest.approx(0.1, rel=1e-4)          # the coarsest level, times 1/8
    levels = autoencoder.laplacian_pyramid(torch.ones(1, 1, 16, 16))
    assert max(level.abs().max() for level in levels[:-1]) < 1e-6 and torch.allclose(levels[-1], torch.ones(1, 1, 2, 2))
    with pytest.raises(ValueError, match="8 x 16"):
        autoencoder.pyramid_loss(x[:, :, :8], x[:, :, :8])


def test_pyramid_loss_weighs_a_blur_more_than_a_shade():
    x = shapes(range(6), size=32)
    blurred = autoencoder.blur(autoencoder.blur(x))
    shade = x + F.l1_loss(blurred, x)                                                    # the same L1
    assert autoencoder.pyramid_loss(x, blurred) > 3 * autoencoder.pyramid_loss(x, shade)


def test_pyramid_loss_has_the_gradient_of_its_values():
    g = torch.Generator().manual_seed(0)
    x, x_hat, way = (torch.randn(1, 1, 16, 16, generator=g) for _ in range(3))
    x_hat.requires_grad_()
    slope = (torch.autograd.grad(autoencoder.pyramid_loss(x, x_hat), x_hat)[0] * way).sum().item()
    with torch.no_grad():
        step = (autoencoder.pyramid_loss(x, x_hat + 1e-3 * way) - autoencoder.pyramid_loss(x, x_hat - 1e-3 * way)).item() / 2e-3
    assert slope == pytest.approx(step, rel=0.02)


def test_reconstruction_loss_adds_l1():
    x = torch.zeros(1, 1, 16, 16)
    assert autoencoder.reconstruction_loss(x, x + 0.8).item() == pytest.approx(0.8 + 0.1, rel=1e-4)


# ---- Training ------------------------------------------------------------------------------------

COUNT = 12


def begin(folder, seed=0):
    run = test_run.start(folder)
    run.seed = seed
    return run


def small(bottleneck="vq"):
    return tiny(bottleneck, base=4, mult=(1, 2))                                         # f = 2: 64 sites per image


def fit(run, steps=10, make=small, disc_weight=0.5, val=(shapes, 4), stop_after=None, lr=1e-3, batch=4):
    """Trains in a run; with stop_after, the run is told to end after so many steps in all, and ends as after SIGTERM."""
    seen = []
    done = run.stages.get("autoencoder", {}).get("step", 0)

    def picture(numbers):
        seen.append(numbers)
        if stop_after is not None and done + len(seen) == stop_after:
            run.stop = signal.SIGTERM
        return shapes(numbers)
    fit.seen = seen
    return autoencoder.train_autoencoder(run, picture, COUNT, val, make, steps, batch, lr, disc_weight, disc_base=4, disc_layers=2)


def state_after(folder, stop_after, **settings):
    """The parts of the stage after some steps of a fresh run."""
    run = begin(folder)
    with pytest.raises(SystemExit):
        fit(run, stop_after=stop_after, **settings)
    run.close()
    return run.stages["autoencoder"]["parts"]


def same(a, b):
    a, b = flat(a), flat(b)
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.fixture
def short_windows(monkeypatch):
    monkeypatch.setattr(autoencoder, "WINDOW", 2)


@pytest.mark.parametrize("bottleneck", ["vq", pytest.param("kl", marks=pytest.mark.slow)])
def test_killed_and_continued_equals_undisturbed_bit_for_bit(tmp_path, short_windows, bottleneck):
    def make():
        return small(bottleneck)
    whole = begin(tmp_path / "a")
    ae = fit(whole, make=make)
    again = begin(tmp_path / "b")
    for stop in (1, 2, 4, 7):                                                            # D begins at 2, counts from 3
        with pytest.raises(SystemExit):
            fit(again, make=make, stop_after=stop)
        again.close()
        again = begin(tmp_path / "b")
        assert again.load() and again.stages["autoencoder"]["step"] == stop
    continued = fit(again, make=make)
    assert same(whole.stages, again.stages) and same(ae.state_dict(), continued.state_dict())
    names = {"ae", "ema", "best", "discriminator"}
    assert set(whole.stages["autoencoder"]["parts"]) == names | ({"use"} if bottleneck == "vq" else set())


def test_training_depends_on_the_seed_alone(tmp_path):
    torch.manual_seed(1)
    a = fit(begin(tmp_path / "a"), steps=4)
    torch.manual_seed(2)
    b = fit(begin(tmp_path / "b"), steps=4)
    c = fit(begin(tmp_path / "c", seed=1), steps=4)
    assert same(a.state_dict(), b.state_dict()) and not same(a.state_dict(), c.state_dict())


def test_a_finished_stage_is_loaded_frozen(tmp_path):
    run = begin(tmp_path)
    ae = fit(run, steps=5)
    run.close()
    again = begin(tmp_path)
    again.load()
    loaded = autoencoder.load_autoencoder(again, small)
    assert same(ae.state_dict(), loaded.state_dict()) and same(fit(again, steps=5).state_dict(), ae.state_dict()) and not fit.seen
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert autoencoder.autoencoder_hash(ae) == autoencoder.autoencoder_hash(loaded) and ("autoencoder", "best") in again.used


def test_every_sample_comes_once_per_pass(tmp_path):
    fit(begin(tmp_path), steps=6, disc_weight=0, val=None)
    passes = np.concatenate(fit.seen[:6]).reshape(2, COUNT)
    assert [sorted(each) for each in passes.tolist()] == 2 * [list(range(COUNT))] and passes[0].tolist() != passes[1].tolist()


def test_the_discriminator_has_no_say_before_its_start(tmp_path):
    """30 % of 10 steps are 3."""
    def ae_of(folder, stop, weight):
        return state_after(tmp_path / folder, stop, disc_weight=weight)["ae"]
    assert same(ae_of("a", 3, 0.5), ae_of("b", 3, 0))
    assert not same(ae_of("c", 4, 0.5), ae_of("d", 4, 0))


def test_the_discriminator_trains_a_tenth_of_the_steps_ahead(tmp_path):
    def disc_of(folder, stop):
        return state_after(tmp_path / folder, stop)["discriminator"]
    fresh = disc_of("a", 1)
    assert same(fresh, disc_of("b", 2)) and not same(fresh, disc_of("c", 3))


def test_without_weight_there_is_no_discriminator(tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "PatchDiscriminator", None)
    run = begin(tmp_path)
    fit(run, disc_weight=0)
    assert not {"discriminator", "optimiser_d"} & set(run.stages["autoencoder"]["parts"])


def watched(run, monkeypatch):
    """Notes for each update: whose it is, the learning rate, whether the others' weights and gradients stayed; and all logged numbers."""
    updates, logs, update, log = [], [], run.update, run.log

    def spy(loss, optimiser):
        others = [p for other in spy.optimisers if other is not optimiser for group in other.param_groups for p in group["params"]]
        before = [(p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in others]
        if optimiser not in spy.optimisers:
            spy.optimisers.append(optimiser)
        result = update(loss, optimiser)
        stayed = all(torch.equal(p, old) and (p.grad is grad is None or torch.equal(p.grad, grad)) for p, (old, grad) in zip(others, before))
        updates.append((spy.optimisers.index(optimiser), optimiser.param_groups[0]["lr"], stayed, float(loss.detach())))
        return result
    spy.optimisers = []

    def note(**numbers):
        logs.append({name: float(value.detach() if torch.is_tensor(value) else value) for name, value in numbers.items()})
        log(**numbers)
    monkeypatch.setattr(run, "update", spy)
    monkeypatch.setattr(run, "log", note)
    return updates, logs


def test_each_network_learns_from_its_own_loss_alone(tmp_path, monkeypatch):
    run = begin(tmp_path)
    updates, _ = watched(run, monkeypatch)
    fit(run)
    assert [who for who, *_ in updates] == 2 * [0] + 8 * [0, 1] and all(stayed for _, _, stayed, _ in updates)


def test_the_discriminator_sees_the_images_and_what_became_of_them(tmp_path, monkeypatch):
    """Behind its own start: the images and their detached reconstructions; later the reconstructions with gradient come first."""
    seen = []

    class Recorder(PatchDiscriminator):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)
    monkeypatch.setattr(autoencoder, "PatchDiscriminator", Recorder)
    fit(begin(tmp_path), val=None)
    assert [x.requires_grad for x in seen] == [False, False] + 7 * [True, False, False]
    for step in range(2, 10):
        real, fake = seen[3 * step - 6:3 * step - 4]
        assert torch.equal(real, shapes(fit.seen[step])) and not torch.equal(fake, real)
        assert step == 2 or torch.equal(fake, seen[3 * step - 7])


@pytest.mark.parametrize("bottleneck, factor", [("vq", 1), ("kl", 1e-6)])
def test_the_loss_is_the_sum_of_its_terms(tmp_path, monkeypatch, bottleneck, factor):
    run = begin(tmp_path)
    updates, logs = watched(run, monkeypatch)
    fit(run, make=lambda: small(bottleneck), disc_weight=0.7)
    losses = [loss for who, _, _, loss in updates if who == 0]
    terms = [entry for entry in logs if "rec" in entry]
    adversarial = 3 * [{"adv": 0, "balance": 0}] + [entry for entry in logs if "adv" in entry]
    assert len(losses) == len(terms) == len(adversarial) == 10
    for loss, entry, gan in zip(losses, terms, adversarial):
        assert loss == entry["loss"] and entry["bottleneck"] > 0
        assert loss == pytest.approx(entry["rec"] + factor * entry["bottleneck"] + 0.7 * gan["balance"] * gan["adv"], rel=1e-5)
    assert all(gan["balance"] > 0 for gan in adversarial[3:])


@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
def test_only_the_gaussian_is_drawn_in_training(tmp_path, bottleneck):
    noise = []

    class Recorder(VQAE):
        def forward(self, x, eps=None):
            noise.append(eps)
            return super().forward(x, eps)
    fit(begin(tmp_path), make=lambda: Recorder(4, (1, 2), 1, 16, 16, middle=False, bottleneck=bottleneck), val=None, disc_weight=0)
    if bottleneck == "vq":
        assert noise == 10 * [None]
    else:
        drawn = torch.stack(noise)
        assert drawn.shape == (10, 4, 4, 8, 8) and len(drawn.flatten(1).unique(dim=0)) == 10
        assert abs(drawn.mean()) < 0.05 and drawn.std().item() == pytest.approx(1, abs=0.05)


def test_rates_warm_up_fall_and_are_the_same_for_both(tmp_path, monkeypatch):
    run = begin(tmp_path)
    updates, _ = watched(run, monkeypatch)
    fit(run, steps=20, lr=1e-3)
    rates = [rate for who, rate, *_ in updates if who == 0]
    def cosine(step, peak):
        return 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * step / 20)) / 2
    assert rates[:2] == pytest.approx([cosine(0, 0.5e-3), cosine(1, 1e-3)])
    assert rates[2:] == pytest.approx([cosine(step, 1e-3) for step in range(2, 20)])
    assert [rate for who, rate, *_ in updates if who == 1] == rates[4:]


def test_balance_is_measured_at_the_last_layer(tmp_path, monkeypatch):
    asked, rule = [], autoencoder.adaptive_weight_of

    def spy(run, rec, adv, weight):
        asked.append((rec.item(), adv.item(), weight))
        return rule(run, rec, adv, weight)
    monkeypatch.setattr(autoencoder, "adaptive_weight_of", spy)
    run = begin(tmp_path)
    _, logs = watched(run, monkeypatch)
    made = []

    def make():
        made.append(small())
        return made[-1]
    fit(run, make=make)
    recs = [entry["rec"] for entry in logs if "rec" in entry][3:]
    assert [rec for rec, _, _ in asked] == recs and all(weight is made[0].decoder.head[2].weight for _, _, weight in asked)


def test_first_codes_come_from_the_first_batch(tmp_path):
    run = begin(tmp_path)
    torch.manual_seed(autoencoder.seed_of(0, "autoencoder"))
    fresh = small()
    parts = state_after(tmp_path / "run", 1, lr=1e-12)
    x = shapes(run.order("autoencoder", COUNT, 4, 0))
    sites = cb.sites_of(fresh.encode(x)).detach()
    for name in ("ae", "ema"):
        codes = parts[name]["codebook.weight"]
        assert (codes[:, None] - sites).abs().sum(2).min(1).values.max() < 1e-6 and len(codes.unique(dim=0)) == 16


def test_codes_restart_in_the_first_four_fifths_only(tmp_path, monkeypatch, short_windows):
    calls, rule = [], autoencoder.restart
    run = begin(tmp_path)
    _, logs = watched(run, monkeypatch)

    def spy(codebooks, dead, sites, optimiser, generator):
        calls.append((len([entry for entry in logs if "rec" in entry]), len(sites), generator.initial_seed()))
        assert codebooks[0].weight is optimiser.param_groups[0]["params"][-1] and len(codebooks) == 2
        assert dead.shape == (16,)
        count = rule(codebooks, dead, sites, optimiser, generator)
        assert torch.equal(codebooks[0].weight[dead], codebooks[1].weight[dead])
        return count
    monkeypatch.setattr(autoencoder, "restart", spy)
    fit(run, steps=11)
    assert [(done, n) for done, n, _ in calls] == [(2, 256), (4, 256), (6, 256), (8, 256)] and len({seed for *_, seed in calls}) == 4
    used = [entry for entry in logs if "codes_used" in entry]
    assert len(used) == 6 and all(0 < e["codes_used"] <= 1 and 1 <= e["perplexity"] <= 16 * e["codes_used"] + 1e-4 for e in used)
    assert not run.stages["autoencoder"]["parts"]["use"]["counts"].any()


def test_use_of_codes_is_counted_from_window_to_window(tmp_path, short_windows):
    assert state_after(tmp_path / "a", 1)["use"]["counts"].sum() == 256
    assert state_after(tmp_path / "b", 3)["use"]["counts"].sum() == 256


@pytest.mark.parametrize("disc_weight, best_step", [(0.5, 7), (0, 3)])
def test_weights_with_the_lowest_validation_are_kept(tmp_path, monkeypatch, disc_weight, best_step):
    """With a discriminator those from before its start do not take part.  Measured on averaged weights."""
    values = {3: 0.1, 7: 0.2}
    seen, scored = [], []

    def rule(run, val):
        def validate(ae):
            seen.append({name: value.clone() for name, value in ae.state_dict().items()})
            scored.append(ae)
            return values.get(len(seen), 1.0)
        return validate
    monkeypatch.setattr(autoencoder, "validation", rule)
    run = begin(tmp_path)
    ae = fit(run, disc_weight=disc_weight)
    assert len(seen) == 10
    chosen = {name: value for name, value in ae.state_dict().items() if name not in ("mu", "sigma")}
    assert same(chosen, {name: seen[best_step - 1][name] for name in chosen})
    parts = run.stages["autoencoder"]["parts"]
    assert same(seen[-1], parts["ema"]) and not same(seen[-1], parts["ae"])


def test_without_validation_the_last_averaged_weights_are_kept(tmp_path):
    for folder, val in (("a", None), ("b", (shapes, 0))):
        run = begin(tmp_path / folder)
        ae = fit(run, steps=4, val=val)
        parts = run.stages["autoencoder"]["parts"]
        assert same(ae.state_dict(), parts["ema"]) and ae.sigma.ne(1).all() and not same(parts["ema"], parts["ae"])
        assert "no validation samples" in (tmp_path / folder / "log.txt").read_text()


def test_validation_is_the_mean_over_fixed_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "ENCODE_BATCH", 3)
    asked = []

    def picture(numbers):
        asked.append(numbers)
        return shapes(numbers)
    run, ae = begin(tmp_path), small()
    validate = autoencoder.validation(run, (picture, 7))
    value = validate(ae)
    x = shapes(range(7))
    with torch.no_grad():
        each = [autoencoder.reconstruction_loss(x[i:i + 1], ae(x[i:i + 1])[0]).item() for i in range(7)]
    assert value == pytest.approx(np.mean(each), rel=1e-5) and sorted(np.concatenate(asked)) == list(range(7)) and validate(ae) == value
    asked.clear()
    autoencoder.validation(run, (picture, 1000))(ae)
    chosen = np.concatenate(asked)
    assert len(set(chosen)) == 64 and {n % 3 for n in chosen.tolist()} == {0, 1, 2} and chosen.max() > 500


def test_identity_is_not_trained(tmp_path):
    run = begin(tmp_path)
    ae = fit(run, make=lambda: tiny("none"))
    assert run.finished(["autoencoder"]) and not fit.seen and (ae.sigma == 1).all() and not ae.training
    assert torch.equal(autoencoder.load_autoencoder(run, lambda: tiny("none")).to_latent(shapes([1])), shapes([1]))


def test_it_learns_to_draw_its_images(tmp_path):
    """Four images in 80 steps: the error falls by more than 5, to more than 28 dB, with more sites than codes."""
    def make():
        return tiny(codes=64, mult=(1, 2))
    x = shapes(range(4))
    torch.manual_seed(autoencoder.seed_of(0, "autoencoder"))
    before = F.l1_loss(make()(x)[0], x).item()
    ae = autoencoder.train_autoencoder(begin(tmp_path), lambda numbers: x[torch.from_numpy(numbers)], 4, None, make, 80, 4, 3e-3, 0)
    made = ae.from_latent(ae.to_latent(x))
    assert F.l1_loss(made, x).item() < before / 5 and -10 * math.log10(F.mse_loss(made, x).item() / 4) > 28


# ---- Latents -------------------------------------------------------------------------------------


def test_latents_have_mean_0_and_deviation_1_over_the_training_set(tmp_path):
    run = begin(tmp_path)
    ae = fit(run, steps=8)
    x = shapes(range(COUNT))
    L = ae.to_latent(x)
    h = cb.sites_of(ae.encode(x)).double()
    assert L.mean((0, 2, 3)).abs().max() < 1e-3 and (L.std((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-3
    assert torch.allclose(ae.mu.flatten().double(), h.mean(0), rtol=1e-6)
    assert torch.allclose(ae.sigma.flatten().double(), h.std(0, unbiased=False), rtol=1e-5) and ae.mu.abs().min() > 0
    assert torch.allclose(ae.from_latent(L), ae(x)[0].clamp(-1, 1), atol=1e-4)
    assert torch.allclose(L * ae.sigma + ae.mu, ae.encode(x), atol=1e-5)


def test_from_latent_scales_shifts_and_clamps():
    ae = tiny("none")
    ae.mu.fill_(0.25)
    ae.sigma.fill_(0.5)
    L = torch.tensor([-4.0, -1.0, 0.0, 1.0, 4.0]).view(1, 1, 1, 5)
    assert ae.from_latent(L).flatten().tolist() == [-1, -0.25, 0.25, 0.75, 1]
    assert ae.to_latent(torch.full((1, 1, 1, 1), 0.75)).item() == 1 and ae.from_latent(L.half()).dtype == torch.float32


def test_scale_is_measured_in_float64_over_all_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "ENCODE_BATCH", 5)
    g = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, 64, 64, generator=g)
    images[:, 1] = 1000 + 0.1 * images[:, 1]
    images[:, 2] = 7
    run, ae = begin(tmp_path), tiny("none", channels=3)
    autoencoder.measure_scale(run, ae, lambda numbers: images[torch.from_numpy(numbers)], 32)
    assert ae.sigma.flatten().tolist() == pytest.approx([*images[:, :2].double().transpose(0, 1).flatten(1).std(1).tolist(), 1], rel=1e-3)
    assert ae.mu.flatten().tolist() == pytest.approx(images.double().mean((0, 2, 3)).tolist(), rel=1e-6)


def test_hash_belongs_to_every_weight():
    ae = tiny(seed=0)
    first = autoencoder.autoencoder_hash(ae)
    assert first == autoencoder.autoencoder_hash(tiny(seed=0)) == autoencoder.autoencoder_hash(ae.to(memory_format=torch.channels_last)) and len(first) == 16
    found = {first, autoencoder.autoencoder_hash(tiny(seed=1))}
    tensors = [*ae.parameters(), *ae.buffers()]
    for tensor in tensors:
        old = tensor.detach().clone()
        tensor.data[..., -1] += 1e-3
        found.add(autoencoder.autoencoder_hash(ae))
        tensor.data.copy_(old)
    assert len(found) == 2 + len(tensors) and autoencoder.autoencoder_hash(ae) == first


def pictures_of(asked):
    def picture(numbers):
        asked.append(list(numbers))
        return shapes(numbers)
    return picture


def test_cached_latents_are_encoded_once(tmp_path):
    run, ae, asked = begin(tmp_path / "run"), tiny(seed=0), []
    ae.mu += 0.5
    L = autoencoder.cached_latents(run, ae, pictures_of(asked), 19, "train-ab12", tmp_path / "cache")
    assert isinstance(L, np.memmap) and L.dtype == np.float16 and L.shape == (19, 3, 4, 4)
    with torch.no_grad():
        expected = ae.to_latent(shapes(range(19))).half()
    assert np.abs(np.asarray(L) - expected.numpy()).max() < 1e-2 and sum(asked[1:], []) == list(range(19))
    assert max(map(len, asked)) <= autoencoder.ENCODE_BATCH
    path, = (tmp_path / "cache" / "latents").iterdir()
    assert path.name == f"{autoencoder.autoencoder_hash(ae)}-train-ab12.npy"
    asked.clear()
    again = autoencoder.cached_latents(run, ae, pictures_of(asked), 19, "train-ab12", tmp_path / "cache")
    assert np.array_equal(L, again) and asked == [[0]]


def test_latents_of_another_autoencoder_are_never_read(tmp_path):
    run = begin(tmp_path / "run")
    old, new = tiny(seed=0), tiny(seed=0)
    with torch.no_grad():
        new.sigma[0, 0] = 2
    a, b = (autoencoder.cached_latents(run, ae, shapes, 3, "all", tmp_path / "cache") for ae in (old, new))
    assert np.allclose(a[:, 0], 2 * b[:, 0], atol=1e-2) and not np.array_equal(a, b)
    c = autoencoder.cached_latents(run, old, lambda n: -shapes(n), 3, "negative", tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "latents").iterdir())) == 3 and not np.array_equal(a, c)


@pytest.mark.parametrize("spoil", ["cut", "more", "type", "text"])
def test_a_file_that_is_not_whole_is_written_again(tmp_path, spoil):
    run, ae = begin(tmp_path / "run"), tiny(seed=0)
    good = np.array(autoencoder.cached_latents(run, ae, shapes, 3, "all", tmp_path))
    path, = (tmp_path / "latents").iterdir()
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif spoil == "text":
        path.write_text("nothing")
    else:
        np.save(path, good.astype(np.float32) if spoil == "type" else np.concatenate([good, good]))
    again = autoencoder.cached_latents(run, ae, shapes, 3, "all", tmp_path)
    assert np.array_equal(again, good) and again.dtype == np.float16


def test_an_interrupted_cache_leaves_nothing(tmp_path):
    run, ae, asked = begin(tmp_path / "run"), tiny(seed=0), []

    def picture(numbers):
        asked.append(numbers)
        if len(asked) == 3:
            run.stop = signal.SIGTERM
        return shapes(numbers)
    with pytest.raises(SystemExit):
        autoencoder.cached_latents(run, ae, picture, 40, "all", tmp_path)
    assert list((tmp_path / "latents").iterdir()) == []


def test_cache_errors_are_sentences(tmp_path):
    run, ae = begin(tmp_path / "run"), tiny(seed=0)
    with pytest.raises(ValueError, match="no samples"):
        autoencoder.cached_latents(run, ae, shapes, 0, "val", tmp_path)
    (tmp_path / "latents").write_text("a file in the way")
    with pytest.raises(RunError, match="cannot write"):
        autoencoder.cached_latents(run, ae, shapes, 3, "val", tmp_path)


PAIR = """
    import os, sys, torch
    sys.path[:0] = [{root!r}, {tests!r}]
    from pathlib import Path
    import test_vqae
    from common import autoencoder, vqae
    autoencoder.WINDOW = 2
    out = Path({out!r})
    run = test_vqae.begin(out)
    ae = test_vqae.fit(run, steps=6)
    asked = []
    L = autoencoder.cached_latents(run, ae, test_vqae.pictures_of(asked), 9, "all", out)
    everyone = run.gather([(len(asked), float(abs(L).sum()))])
    if run.rank == 0:
        torch.save((ae.state_dict(), everyone), out / "result.pt")
    run.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="gloo without torchrun")
def test_two_processes_equal_one(tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "WINDOW", 2)
    alone = fit(begin(tmp_path / "one"), steps=6)
    code = textwrap.dedent(PAIR.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(tmp_path / "two")))
    with test_run.socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pair = [subprocess.Popen([sys.executable, "-c", code], env={**env, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
            for rank in (0, 1)]
    try:
        errors = [process.communicate(timeout=120)[1] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], errors
    weights, everyone = torch.load(tmp_path / "two" / "result.pt", weights_only=True)
    for name, value in alone.state_dict().items():
        assert torch.allclose(value, weights[name], atol=2e-4), name
    assert [calls for calls, _ in everyone] == [3, 1] and everyone[0][1] == everyone[1][1] > 0
