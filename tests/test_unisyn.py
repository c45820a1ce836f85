"""UniSyn: the arithmetic, the mapper, the losses and pairs, against closed forms and numbers by hand."""
import contextlib
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import wake
from torch.nn import functional as F

import unisyn
from common.embeddings import Features
from common.slabs import Pairs
from common.tasks import named_pairs
from unisyn import GFM, Config, Encoder, Mapper, ResBlock, WordAttention, inject, losses, make_decoder, strip

SMALL = dict(size=32, width=16, blocks=2, features=16, decoder=(24, 16, 16), slices=4, patch=16, encoder="demo")
RUN = SimpleNamespace(autocast=contextlib.nullcontext, device=torch.device("cpu"))


def config(**changes):
    return Config(**{**SMALL, **changes})


def text_of(*embeddings, words=5, seed=0):
    """Features with these pooled embeddings and random tokens."""
    g = torch.Generator().manual_seed(seed)
    B = len(embeddings)
    return Features(torch.randn(B, words, 12, generator=g), torch.ones(B, words, dtype=torch.bool), torch.stack(embeddings))


def random_text(B=2, seed=0, dim=8):
    return text_of(*torch.randn(B, dim, generator=torch.Generator().manual_seed(seed)), seed=seed)


def network(seed=0, **changes):
    torch.manual_seed(seed)
    return wake(GFM(config(**changes), dim=8, word_dim=12))


def slabs(B=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(2, B, 4, 16, 16, generator=g)


# ---- arithmetic ----------------------------------------------------------------------------------


def test_strip_and_inject_by_hand():
    f = torch.tensor([7.0, -1.0])
    assert strip(f, torch.tensor([2.0, 0.5]), torch.tensor([1.0, 1.0])).tolist() == [3.0, -4.0]
    assert inject(torch.tensor([3.0, -4.0]), torch.tensor([2.0, 0.5]), torch.tensor([1.0, 1.0])).tolist() == [7.0, -1.0]


@pytest.mark.parametrize("kind", ["exp", "literal"])
def test_same_sentence_twice_changes_nothing_and_ways_compose(kind):
    """s -> s is the identity; s -> t -> s too; s -> u -> t is s -> t, in feature space."""
    torch.manual_seed(1)
    mapper = wake(Mapper(8, 16, kind)).double()
    s, t, u = (mapper(torch.randn(1, 8, dtype=torch.float64)) for _ in range(3))
    f = torch.randn(1, 16, 5, 5, dtype=torch.float64)
    c = strip(f, *s)
    assert torch.allclose(inject(c, *s), f, atol=1e-10)
    there = inject(c, *t)
    assert (there - f).abs().max() > 1e-3
    assert torch.allclose(inject(strip(there, *t), *s), f, atol=1e-8)
    over = inject(strip(inject(c, *u), *u), *t)
    assert torch.allclose(over, there, atol=1e-8)


# ---- mapper --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exp", "literal"])
def test_at_the_start_alpha_is_one_and_beta_zero(kind):
    alpha, beta = Mapper(8, 16, kind)(torch.randn(3, 8))
    assert (alpha == 1).all() and (beta == 0).all() and alpha.shape == (3, 16, 1, 1)


def test_sentences_matter_after_one_step_only():
    torch.manual_seed(0)
    net = GFM(config(), dim=8, word_dim=12)
    x, y = slabs()
    a, b = random_text(seed=1), random_text(seed=2)
    assert torch.equal(net(x, a, b), net(x, b, a))
    loss, _ = losses(config(), RUN, net, x, y, a, b)
    loss.backward()
    assert net.mapper.out.weight.grad.abs().max() > 0
    torch.optim.Adam(net.parameters(), lr=0.01).step()
    assert (net(x, a, b) - net(x, b, a)).abs().max() > 1e-4


def test_alpha_is_bounded_and_its_logarithm_has_mean_zero():
    mapper = wake(Mapper(8, 16, "exp"))
    for size in (1.0, 1e3, 1e6):
        with torch.no_grad():
            mapper.out.weight.copy_(size * torch.randn(mapper.out.weight.shape, generator=torch.Generator().manual_seed(3)))
        alpha, beta = mapper(torch.randn(4, 8, generator=torch.Generator().manual_seed(4)))
        assert alpha.min() >= 1 / 16 - 1e-6 and alpha.max() <= 16 + 1e-4
        assert alpha.log().mean(1).abs().max() < 1e-5 and torch.isfinite(beta).all()


def test_exp_alpha_by_hand():
    """a = (ln 4, -ln 4): t = ln 4 tanh(+-1), mean 0, so alpha = 4^(+-tanh 1)."""
    mapper = Mapper(8, 2, "exp")
    with torch.no_grad():
        mapper.out.bias.copy_(torch.tensor([math.log(4), -math.log(4), 0.3, -0.7]))
    alpha, beta = mapper(torch.randn(1, 8))
    assert torch.allclose(alpha.flatten(), torch.tensor([2.8742, 0.34792]), atol=1e-4)
    assert torch.allclose(beta.flatten(), torch.tensor([0.3, -0.7]))


def test_a_common_factor_of_all_gains_is_taken_away():
    mapper = Mapper(8, 4, "exp")
    found = []
    for more in (0.0, 1e-3):
        with torch.no_grad():
            mapper.out.bias[:4] = torch.tensor([0.001, -0.002, 0.003, 0.0]) + more
        found.append(mapper(torch.zeros(1, 8))[0])
    assert torch.allclose(*found, atol=1e-7)


def test_literal_alpha_keeps_its_sign_and_its_distance_from_zero():
    mapper = Mapper(8, 4, "literal")
    with torch.no_grad():
        mapper.out.bias[:4] = torch.tensor([-1.001, -0.999, -3.0, 1.0])
    alpha = mapper(torch.randn(1, 8))[0].flatten()
    assert torch.allclose(alpha, torch.tensor([-0.01, 0.01, -2.0, 2.0]))


# ---- networks ------------------------------------------------------------------------------------


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_the_paper():
    with torch.device("meta"):
        assert count(Encoder(8, 1024, 24, 768)) == 469_625_600
        assert count(make_decoder(768, (2048, 1024, 1024), 8)) == 4_730_888
        assert count(Mapper(768, 768, "exp")) == 1_773_312


def test_receptive_field_of_the_demo():
    """Head, body's end, tail and two per block: 11 convolutions of 3 x 3 see 23 pixels."""
    torch.manual_seed(0)
    encoder = Encoder(1, 4, 4, 4).double()
    x = torch.zeros(1, 1, 41, 41, dtype=torch.float64, requires_grad=True)
    encoder(x + 0.1)[0, :, 20, 20].sum().backward()
    seen = x.grad[0, 0].abs() > 0
    assert seen.any(0).sum() == 23 and seen.any(1).sum() == 23


def test_block_by_hand():
    """1 x 1 image: only the middle of the kernels counts; x + 0.1 w2 relu(w1 x + b1) + 0.1 b2."""
    block = ResBlock(1)
    with torch.no_grad():
        for conv, weight, bias in ((block.conv1, 2.0, 1.0), (block.conv2, -3.0, 0.5)):
            conv.weight.zero_()
            conv.weight[0, 0, 1, 1] = weight
            conv.bias.fill_(bias)
    for x, wanted in ((2.0, 2 + 0.1 * (-15 + 0.5)), (-2.0, -2 + 0.1 * 0.5)):
        assert abs(block(torch.full((1, 1, 1, 1), x)).item() - wanted) < 1e-6


def test_decoder_sees_single_pixels():
    torch.manual_seed(0)
    decoder = make_decoder(6, (8, 7, 5), 3)
    f = torch.randn(1, 6, 4, 4)
    turned = decoder(f.transpose(2, 3)).transpose(2, 3)
    assert torch.allclose(decoder(f), turned, atol=1e-6) and decoder(f).shape == (1, 3, 4, 4)


def test_attention_permutes_with_the_pixels_and_reads_the_words():
    torch.manual_seed(0)
    attention = wake(WordAttention(16, 12))
    f = torch.randn(1, 16, 4, 4)
    text = random_text(1)
    made = attention(f, text.tokens, text.mask)
    order = torch.randperm(16)
    shuffled = f.flatten(2)[..., order].unflatten(2, (4, 4))
    again = attention(shuffled, text.tokens, text.mask)
    assert torch.allclose(again.flatten(2), made.flatten(2)[..., order], atol=1e-5)
    assert (attention(f, text.tokens + 1, text.mask) - made).abs().max() < 1e-4      # LayerNorm: a shift of all words
    assert (attention(f, text.tokens.flip(2), text.mask) - made).abs().max() > 1e-3
    padded = torch.cat([text.tokens, 9 * torch.ones(1, 3, 12)], 1)
    mask = torch.cat([text.mask, torch.zeros(1, 3, dtype=torch.bool)], 1)
    assert torch.allclose(attention(f, padded, mask), made, atol=1e-5)


def test_with_one_word_attention_ignores_the_image():
    """A softmax over one key is 1: what the attention adds is one vector for every pixel, whatever the image."""
    torch.manual_seed(0)
    attention = wake(WordAttention(16, 12))
    word = torch.randn(1, 1, 12)
    added = [attention.attention(attention.norm_f(torch.randn(1, 9, 16)), attention.norm_words(word)) for _ in range(2)]
    assert torch.allclose(added[0], added[1], atol=1e-6) and added[0].std(1).max() < 1e-6
    words = torch.randn(1, 4, 12)
    added = [attention.attention(attention.norm_f(torch.randn(1, 9, 16)), attention.norm_words(words)) for _ in range(2)]
    assert added[0].std(1).max() > 1e-4


# ---- switches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts, reads_source, reads_target",
                         [("both", True, True), ("target", False, True), ("source", True, False), ("none", False, False)])
def test_which_sentences_are_read(prompts, reads_source, reads_target):
    net = network(prompts=prompts)
    x = slabs()[0]
    a, b, other = random_text(seed=1), random_text(seed=2), random_text(seed=3)
    made = net(x, a, b)
    assert torch.equal(net(x, other, b), made) != reads_source
    assert torch.equal(net(x, a, other), made) != reads_target


def test_attention_has_no_mapper_and_ignores_the_source_sentence():
    net = network(fusion="attention", prompts="target")
    x = slabs()[0]
    a, b, other = random_text(seed=1), random_text(seed=2), random_text(seed=3)
    assert net.mapper is None
    assert torch.equal(net(x, a, b), net(x, other, b)) and not torch.equal(net(x, a, b), net(x, a, other))


# ---- losses --------------------------------------------------------------------------------------


class Literal(torch.nn.Module):
    """The encoder and the decoder are the identity; a sentence (gain, shift) is applied as it is."""

    def encode(self, x):
        return x

    def decoder(self, f):
        return f

    def without_contrast(self, f, text):
        return strip(f, text.pooled[:, 0, None, None, None], text.pooled[:, 1, None, None, None])

    def with_contrast(self, c, text):
        return inject(c, text.pooled[:, 0, None, None, None], text.pooled[:, 1, None, None, None])


def test_losses_by_hand():
    """x = (1, 2) and y = (2, 4), alpha and beta 1 and 0 for x, 2 and 1 for y.

    c_x = (1, 2), c_y = (.5, 1.5): L_f = .5.  y_hat = (3, 5): error 1.  x_hat = (.5, 1.5): error .5.  L_s = .75.
    """
    x = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)
    y = torch.tensor([2.0, 4.0]).view(1, 1, 1, 2)
    a, b = text_of(torch.tensor([1.0, 0.0])), text_of(torch.tensor([2.0, 1.0]))
    loss, facts = losses(config(), RUN, Literal(), x, y, a, b)
    assert abs(loss.item() - (0.75 + 0.1 * 0.5)) < 1e-6
    assert abs(facts["L_s"].item() - 0.75) < 1e-6 and abs(facts["L_f"].item() - 0.5) < 1e-6
    assert abs(facts["rms"].item() - math.sqrt(2.5)) < 1e-6
    loss, facts = losses(config(feat_loss="encoded", lambda_f=2.0, lambda_s=3.0), RUN, Literal(), x, y, a, b)
    assert abs(facts["L_f"].item() - 1.5) < 1e-6 and abs(loss.item() - (3 * 0.75 + 2 * 1.5)) < 1e-6
    # One sentence for both: c_x - c_y = x - y.
    assert abs(losses(config(), RUN, Literal(), x, y, a, a)[1]["L_f"].item() - 1.5) < 1e-6


def test_losses_are_the_same_from_both_ends():
    net = network()
    x, y = slabs()
    a, b = random_text(seed=1), random_text(seed=2)
    one, facts = losses(config(), RUN, net, x, y, a, b)
    other, _ = losses(config(), RUN, net, y, x, b, a)
    assert abs(one - other) < 1e-6
    wanted = F.l1_loss(net(x, a, b), y) / 2 + F.l1_loss(net(y, b, a), x) / 2
    assert abs(facts["L_s"] - wanted) < 1e-6


def test_features_that_only_differ_by_the_sentence_have_no_loss():
    """f = alpha c + beta with one c: Eq. (1) is 0 on f_0 and above 0 on f."""
    c = torch.rand(1, 3, 4, 4)
    a, b = text_of(torch.tensor([2.0, 0.5])), text_of(torch.tensor([0.5, -0.25]))
    x, y = 2 * c + 0.5, 0.5 * c - 0.25
    assert losses(config(), RUN, Literal(), x, y, a, b)[1]["L_f"] < 1e-6
    assert losses(config(feat_loss="encoded"), RUN, Literal(), x, y, a, b)[1]["L_f"] > 0.1


def test_gauges():
    """Two changes leave every output as it is and change L_f: why alpha is centred, and why L_f / rms is logged."""
    net = network(alpha="literal")
    x, y = slabs()
    a, b = random_text(seed=1), random_text(seed=2)
    _, before = losses(config(), RUN, net, x, y, a, b)

    class Tripled(torch.nn.Module):
        def __init__(self, mapper):
            super().__init__()
            self.mapper = mapper

        def forward(self, e):
            alpha, beta = self.mapper(e)
            return 3 * alpha, beta
    mapper = net.mapper
    net.mapper = Tripled(mapper)
    _, tripled = losses(config(), RUN, net, x, y, a, b)
    net.mapper = mapper
    assert abs(tripled["L_s"] - before["L_s"]) < 1e-6 and abs(tripled["L_f"] * 3 - before["L_f"]) < 1e-6

    with torch.no_grad():
        for part in (net.encoder.tail.weight, net.encoder.tail.bias, mapper.out.weight[16:], mapper.out.bias[16:]):
            part.mul_(0.1)
        net.decoder[0].weight.mul_(10)
    _, scaled = losses(config(), RUN, net, x, y, a, b)
    assert abs(scaled["L_s"] - before["L_s"]) < 1e-5 and abs(scaled["L_f"] * 10 - before["L_f"]) < 1e-5
    assert abs(scaled["L_f/rms"] - before["L_f/rms"]) < 1e-5


def test_lambda_f_zero_leaves_the_gradients_of_the_synthesis():
    x, y = slabs()
    a, b = random_text(seed=1), random_text(seed=2)
    gradients = []
    for changes in (dict(lambda_f=0.0), dict(lambda_f=0.0, feat_loss="encoded"), dict(lambda_f=0.5)):
        net = network()
        losses(config(**changes), RUN, net, x, y, a, b)[0].backward()
        gradients.append(net.encoder.head.weight.grad.clone())
    assert torch.equal(gradients[0], gradients[1]) and not torch.allclose(gradients[0], gradients[2])


# ---- pairs ---------------------------------------------------------------------------------------


class World:
    """Subjects whose slices say who, what and where they are; the first pair of contrasts is common, others are rare."""

    contrasts = ("t1", "t2", "ct")

    def __init__(self, size=32, slices=6):
        has = {"a": "t1 t2", "b": "t1 t2", "c": "t1 t2", "d": "t1 t2 ct", "e": "t2 ct"}
        self.complete = [SimpleNamespace(name=name, files=dict.fromkeys(words.split())) for name, words in has.items()]
        self.split = {"train": ["a", "b", "c", "d"], "val": ["e"], "test": []}
        self.subject = np.repeat(list(has), slices)
        self.slice_number = np.tile(np.arange(slices), len(has))
        column = np.linspace(0, 1, size)
        self.images = np.zeros((len(self.subject), 3, size, size), np.float32)
        for r, (name, number) in enumerate(zip(self.subject, self.slice_number)):
            for c, contrast in enumerate(self.contrasts):
                if contrast in has[name].split():
                    self.images[r, c] = 1 + c + 10 * number + column

    def rows(self, part):
        return np.flatnonzero(np.isin(self.subject, self.split[part]))


def pairs_of(world, part="train", tasks=(), slices=4):
    return Pairs(world, part, named_pairs(tasks, world.contrasts), slices, patch=16)


def draws(pairs, n):
    return [pairs.draw(np.random.default_rng(i)) for i in range(n)]


def test_pairs_are_equally_likely_although_few_people_have_some():
    pairs = pairs_of(World())
    found = [pair for _, pair, _ in draws(pairs, 3000)]
    shares = [found.count(pair) / 3000 for pair in itertools.combinations(World.contrasts, 2)]
    assert np.allclose(shares, 1 / 3, atol=0.05)            # standard deviation .009
    assert {name for name, pair, _ in draws(pairs, 300) if "ct" in pair} == {"d"}


def test_slabs_show_the_same_place_of_one_person_in_order():
    pairs = pairs_of(World())
    mirrored = set()
    firsts = set()
    for _, pair, crop in draws(pairs, 200):
        assert crop.shape == (2, 4, 16, 16)
        steps = np.diff(crop[0, :, 0, 0])
        assert np.allclose(steps, 10)                                           # consecutive slices, from low to high
        difference = World.contrasts.index(pair[1]) - World.contrasts.index(pair[0])
        assert np.allclose(crop[1] - crop[0], difference)                       # same slices, rows and columns
        mirrored.add(bool(crop[0, 0, 0, 0] > crop[0, 0, 0, -1]))
        firsts.add(round(float(crop[0, 0].min() // 10)))
    assert mirrored == {True, False} and firsts == {0, 1, 2}


def test_short_volumes_are_padded_and_tasks_limit_the_pairs():
    pairs = pairs_of(World(), slices=8)
    _, _, crop = draws(pairs, 1)[0]
    assert crop.shape == (2, 8, 16, 16) and not crop[:, 6:].any() and crop[:, :6].all()
    only = pairs_of(World(), tasks=("ct:t1",))
    assert only.pairs == [("t1", "ct")] and pairs_of(World(), part="val").pairs == [("t2", "ct")]


def test_slabs_prefer_places_with_tissue():
    world = World()
    world.images[:, :, :, 8:] = 0                    # tissue on the left quarter: a fifth of all places show a tenth of it
    pairs = pairs_of(world)
    shares = [max((crop[0] > 0).mean(), (crop[1] > 0).mean()) for _, _, crop in draws(pairs, 200)]
    assert np.mean(np.array(shares) >= 0.1) > 0.9


# ---- words of the user ---------------------------------------------------------------------------


def test_named_pairs():
    assert named_pairs((), ("t1", "t2")) == [("t1", "t2"), ("t2", "t1")]
    assert named_pairs(("T1w:CT",), ("t1", "ct")) == [("t1", "ct")]
    for wrong in ("t1:t1", "t1:pet", "t1", "t1:t2:t1"):
        with pytest.raises(unisyn.RunError, match="name two different ones"):
            named_pairs((wrong,), ("t1", "t2"))


@pytest.mark.parametrize("field, value", [("target", "T2w"), ("target", "TE=90"), ("sweep", "TE"), ("sweep", "TE=1:2"), ("patch", 64),
                                          ("fusion", "attention")])
def test_clashing_values_are_refused(field, value):
    with pytest.raises(ValueError):
        config(**{field: value})
