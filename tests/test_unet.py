"""The U-Net: parameter counts of published configurations, the plug's contract, the transformer against torch's own attention."""
import pytest
import torch
from conftest import wake
from torch import nn
from torch.nn import functional as F

from common.unet import Attention, SpatialTransformer, UNet, attention_at, sinusoid


def small(plug=lambda site: None, c_in=2):
    torch.manual_seed(0)
    return wake(UNet(c_in, 2, 8, (1, 2), 1, 16, groups=4, plug=plug))


@pytest.mark.parametrize("channels, base, mult, blocks, size, sizes, head, context, groups, parameters", [
    (4, 128, (1, 1, 2, 2, 4, 4), 2, 256, (32, 16, 8), 64, 512, 32, 196_850_564),
    (3, 128, (1, 1, 2, 2, 4, 4), 2, 256, (32, 16, 8), 64, 512, 32, 196_848_259),
    (4, 24, (1, 1, 2, 4), 1, 64, (16, 8), 24, 128, 8, 2_742_748)])
def test_parameter_counts(channels, base, mult, blocks, size, sizes, head, context, groups, parameters):
    with torch.device("meta"):
        plug = attention_at(sizes, lambda site: SpatialTransformer(site.channels, head, context, groups))
        unet = UNet(channels, channels, base, mult, blocks, size, groups, plug)
    assert sum(p.numel() for p in unet.parameters()) == parameters


def test_starts_at_zero():
    assert not UNet(2, 2, 8, (1, 2), 1, 16, groups=4)(torch.randn(1, 2, 16, 16), torch.tensor([3])).any()


def test_time_embedding_by_hand():
    e = sinusoid(torch.tensor([7.0]), 4)[0]
    w = torch.tensor([7.0, 7.0 / 100])
    assert torch.allclose(e, torch.cat([w.cos(), w.sin()]))


def test_time_and_condition_reach_the_output():
    unet = small(attention_at((8,), lambda site: SpatialTransformer(site.channels, 8, 5, 4)))
    x, t, z = torch.randn(2, 2, 16, 16), torch.tensor([1, 1]), torch.randn(2, 3, 5)
    out = unet(x, t, z)
    assert not torch.allclose(out, unet(x, t + 300, z), atol=1e-5)
    assert not torch.allclose(out, unet(x, t, z + 1), atol=1e-5)


def test_every_parameter_gets_a_gradient():
    unet = small(attention_at((8,), lambda site: SpatialTransformer(site.channels, 8, 5, 4)))
    unet(torch.randn(2, 2, 16, 16), torch.tensor([1, 500]), torch.randn(2, 3, 5)).square().sum().backward()
    assert [n for n, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_plugs_are_asked_once_per_block_and_called_with_the_condition():
    asked, called = [], []

    class Spy(nn.Module):
        def __init__(self, site):
            super().__init__()
            self.site = site

        def forward(self, h, condition):
            assert h.shape[1] == self.site.channels and h.shape[2] == self.site.size and condition == "anything"
            called.append(self.site)
            return h

    def plug(site):
        asked.append(site)
        return Spy(site)

    unet = UNet(1, 1, 8, (1, 2, 2), 2, 16, groups=4, plug=plug)
    unet(torch.randn(1, 1, 16, 16), torch.tensor([5]), "anything")
    expected = 2 * (3 * 2 + 2 + 3 * 3)                              # norm and block; down, mid, up
    assert len(asked) == len(set(asked)) == expected
    assert sorted(map(str, called)) == sorted(map(str, asked))
    down = [s for s in asked if s.stage == "down" and s.where == "block"]
    assert [(s.level, s.index, s.last, s.size, s.channels) for s in down] == [
        (0, 0, False, 16, 8), (0, 1, True, 16, 8), (1, 0, False, 8, 16), (1, 1, True, 8, 16), (2, 0, False, 4, 16), (2, 1, True, 4, 16)]


def test_norm_plug_acts_between_second_norm_and_activation():
    """A plug that zeroes its input leaves only silu(0) = 0, so conv2 sees zeros and the block adds just its bias."""
    from common.unet import ResBlock
    torch.manual_seed(0)

    class Zero(nn.Module):
        def forward(self, h, condition):
            return 0 * h
    block = wake(ResBlock(4, 4, 8, 2, norm_plug=Zero()))
    x = torch.randn(1, 4, 6, 6)
    assert torch.allclose(block(x, torch.randn(1, 8)), x + block.conv2.bias[:, None, None])


def test_film_scales_and_shifts_the_second_norm():
    from common.unet import ResBlock
    torch.manual_seed(0)
    block = wake(ResBlock(4, 4, 8, 2))
    x, emb = torch.randn(1, 4, 6, 6), torch.randn(1, 8)
    scale, shift = F.linear(F.silu(emb), block.film.weight, block.film.bias)[0].split(4)
    h = block.norm2(block.conv1(F.silu(block.norm1(x)))) * (1 + scale[:, None, None]) + shift[:, None, None]
    assert torch.allclose(block(x, emb), x + block.conv2(F.silu(h)), atol=1e-6)


def test_taps_hold_the_last_map_of_each_level():
    taps = {}
    unet = small()
    out = unet(torch.randn(1, 2, 16, 16), torch.tensor([5]), taps=taps)
    assert {k: tuple(v.shape[1:]) for k, v in taps.items()} == {
        ("down", 0): (8, 16, 16), ("down", 1): (16, 8, 8), ("up", 1): (16, 8, 8), ("up", 0): (8, 16, 16)}
    assert torch.equal(unet.head(taps["up", 0]), out)


def test_skip_connections_carry_the_image_past_the_deep_levels():
    """With the way down cut behind level 0, what is left of the image reaches the output through the skips alone."""
    unet = small()
    unet.shrinks[0].register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    x, t = torch.randn(1, 2, 16, 16), torch.tensor([5])
    assert (unet(x, t) - unet(x.flip(3), t)).abs().max() > 0.05


def test_attention_equals_torch_multihead_attention():
    torch.manual_seed(0)
    ours, theirs = Attention(16, 8, context_dim=6), nn.MultiheadAttention(16, 2, kdim=6, vdim=6, bias=True, batch_first=True)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(ours.to_q.weight)
        theirs.k_proj_weight.copy_(ours.to_k.weight)
        theirs.v_proj_weight.copy_(ours.to_v.weight)
        theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 3, 6)
    assert torch.allclose(ours(x, context), theirs(x, context, context)[0], atol=1e-6)


def test_transformer_by_explicit_steps():
    """Self-attention, cross-attention, then GEGLU: the first half of the wide layer times the GELU (by its erf) of the second."""
    torch.manual_seed(0)
    block, x, z = wake(SpatialTransformer(16, 8, 6, 4)), torch.randn(1, 16, 2, 3), torch.randn(1, 2, 6)
    h = block.proj_in(block.norm(x)).permute(0, 2, 3, 1).reshape(1, 6, 16)
    h = h + block.self_attention(block.norm1(h))
    h = h + block.cross_attention(block.norm2(h), z)
    wide = block.gate(block.norm3(h))
    value, gate = wide[..., :64], wide[..., 64:]
    h = h + block.ff(value * gate * 0.5 * (1 + torch.erf(gate / 2 ** 0.5)))
    expected = x + block.proj_out(h.reshape(1, 2, 3, 16).permute(0, 3, 1, 2))
    assert torch.allclose(block(x, z), expected, atol=1e-6)


def test_one_context_token_is_a_spatially_constant_bias():
    torch.manual_seed(0)
    block = wake(SpatialTransformer(16, 8, 6, 4))
    out = block.cross_attention(torch.randn(1, 9, 16), torch.randn(1, 1, 6))
    assert out.std(dim=1).max() < 1e-6
    block(torch.randn(1, 16, 3, 3), torch.randn(1, 1, 6)).square().sum().backward()
    q, v = block.cross_attention.to_q.weight.grad, block.cross_attention.to_v.weight.grad
    assert v.abs().max() > 0 and q.abs().max() < 1e-5 * v.abs().max()
    block.zero_grad()
    block(torch.randn(1, 16, 3, 3), torch.randn(1, 2, 6)).square().sum().backward()
    assert block.cross_attention.to_q.weight.grad.abs().max() > 1e-4 * v.abs().max()


def test_works_at_other_sizes_and_is_independent_of_batch_mates():
    unet = small()
    x, t = torch.randn(3, 2, 24, 32), torch.tensor([1, 2, 3])
    assert torch.allclose(unet(x, t)[1], unet(x[1:2], t[1:2])[0], atol=1e-5)


@pytest.mark.parametrize("channels, head_dim", [(24, 16), (8, 16), (16, 3)])
def test_heads_that_do_not_divide_the_channels_are_refused(channels, head_dim):
    for make in (lambda: Attention(channels, head_dim), lambda: SpatialTransformer(channels, head_dim, 5, 4)):
        with pytest.raises(ValueError, match=f"{channels} channels .* heads of {head_dim}; choose"):
            make()


def test_attention_at_sizes_that_do_not_occur():
    def sites(sizes):
        made = []
        UNet(1, 1, 8, (1, 2), 1, 16, groups=4, plug=attention_at(sizes, lambda site: made.append((site.stage, site.size))))
        return made
    assert sites((8,)) == sites((8, 32)) == [("down", 8), ("mid", 8), ("up", 8), ("up", 8)]
    assert sites(()) == [("mid", 8)]
    with pytest.raises(ValueError, match="no map is 32 or 12 pixels wide; choose among 16, 8"):
        sites((32, 12))
