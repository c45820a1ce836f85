"""The text VAE and the U-Net for vectors: words, attention, losses and searches by hand, and exact training."""
import itertools
import math
import signal

import pytest
import test_run
import torch
from conftest import wake
from torch import nn
from torch.nn import functional as F
from toys import flat

from common import textvae
from common.files import RunError
from common.textvae import BOS, EOS, KL_WEIGHT, PAD, UNK, TextVAE, VectorUNet, Words

TEXTS = ["the heart is normal .", "the heart is enlarged .", "no effusion .", "there is no effusion .", "a nodule on the left .",
         "a nodule on the right .", "the lungs are clear .", "no nodule is seen .", "the left lung is clear .", "a mass .",
         "the heart is normal . no effusion .", "there is a mass on the left ."]


def tiny(length=12, seed=0, kind=TextVAE):
    torch.manual_seed(seed)
    return wake(kind(Words.learn(TEXTS, 1, length), width=12, depth=2, heads=3, z=5))


# ---- Words ---------------------------------------------------------------------------------------


def test_words_by_hand():
    words = Words.learn(["b a .", "a c . a", "b ."], least=2, length=4)
    assert words.words == [".", "a", "b"] and len(words) == 7
    assert (PAD, BOS, EOS, UNK) == (0, 1, 2, 3)
    ids = words.encode(["b a .", "c a", ""])
    assert ids.dtype == torch.int64 and ids.tolist() == [[1, 6, 5, 4, 2], [1, 3, 5, 2, 0], [1, 2, 0, 0, 0]]
    assert [words.decode(row) for row in ids.tolist()] == ["b a .", "<unk> a", ""]


def test_long_reports_are_cut_and_others_come_back():
    words = Words.learn(TEXTS, 1, 5)
    for text in TEXTS:
        found = words.decode(words.encode([text])[0].tolist())
        assert found == " ".join(text.split()[:5])
    assert words.encode([TEXTS[-1]]).shape == (1, 7)


def test_nothing_behind_the_end_is_read():
    words = Words(["a", "b"], 9)
    assert words.decode([BOS, 4, PAD, 5, EOS, 4, 4]) == "a b" and words.decode([4, 5]) == "a b"
    assert Words(["a", "b"], 3).decode([BOS, 4, 5, 4, 5]) == "a b a"        # no more than a report may have


# ---- Encoder and decoder -------------------------------------------------------------------------


def test_decoder_attention_by_hand():
    """Token n looks at the memory and at tokens 0 to n.  The memory is a key and a value as it is."""
    torch.manual_seed(0)
    block = textvae.DecoderBlock(12, 3, 2)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 4, 12)
    memory = torch.randn(2, 12)
    q, k, v = block.qkv(F.layer_norm(x, (12,), block.norm1.weight, block.norm1.bias)).chunk(3, dim=2)
    told = torch.zeros_like(x)
    for b, n, head in itertools.product(range(2), range(4), range(3)):
        own = slice(4 * head, 4 * head + 4)
        keys = torch.stack([memory[b, own], *k[b, :n + 1, own]])
        values = torch.stack([memory[b, own], *v[b, :n + 1, own]])
        share = torch.softmax(keys @ q[b, n, own] / 2, dim=0)               # 2 is the root of the width of a head
        told[b, n, own] = share @ values
    x2 = x + block.out(told)
    expected = x2 + block.shrink(F.gelu(block.grow(F.layer_norm(x2, (12,), block.norm2.weight, block.norm2.bias))))
    assert torch.allclose(block(x, memory), expected, atol=1e-5)


def test_a_token_does_not_see_those_behind_it():
    vae = tiny()
    ids = vae.words.encode(["the heart is normal ."])
    z = torch.randn(1, 5)
    before = vae.decode(z, ids)
    for k in range(ids.shape[1]):
        other = ids.clone()
        other[0, k] = vae.words.ids["nodule"]
        after = vae.decode(z, other)
        assert torch.allclose(after[:, :k], before[:, :k], atol=1e-6)
        changed = (after - before)[0, k:].abs().amax(1)
        assert (changed > 1e-4).all()                                       # each later token sees it


def test_logits_are_dot_products_with_the_embeddings():
    vae = tiny()
    ids = vae.words.encode(["the heart is normal ."])
    logits = vae.decode(torch.randn(1, 5), ids)
    assert logits.shape == (1, 7, len(vae.words))
    with torch.no_grad():
        vae.decoder_norm.weight.zero_()
        vae.decoder_norm.bias.copy_(torch.arange(12.0))
    expected = vae.embedding.weight @ torch.arange(12.0)
    assert torch.allclose(vae.decode(torch.randn(1, 5), ids)[0, 3], expected, atol=1e-5)


@pytest.mark.parametrize("layer", ["to_embedding", "to_memory"])
def test_both_ways_into_the_decoder_matter(layer):
    vae = tiny()
    ids = vae.words.encode(["the heart is normal ."])
    z = 3 * torch.randn(1, 5)
    before = vae.decode(z, ids)
    wide = getattr(vae, layer)
    kept = wide.weight.detach().clone()
    with torch.no_grad():
        wide.weight.zero_()
    without = vae.decode(z, ids)
    assert ((without - before)[0].abs().amax(1) > 1e-4).all()               # at every token
    other = vae.decode(-z, ids)
    assert (other - without).abs().max() > 1e-4                             # the other way still tells z
    with torch.no_grad():
        wide.weight.copy_(kept)
    assert torch.equal(vae.decode(z, ids), before)


def test_every_block_has_a_memory_of_its_own():
    vae = tiny()
    seen = []
    for block in vae.decoder:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    z = torch.randn(2, 5)
    vae.decode(z, vae.words.encode(TEXTS[:2]))
    assert torch.equal(torch.cat(seen, dim=1), vae.to_memory(z)) and seen[0].shape == (2, 12)


def test_encoder_sees_words_on_both_sides_and_their_order():
    vae = tiny()
    mean, logvar = vae.encode(vae.words.encode(["the heart is normal .", "heart the is normal .", "the heart is enlarged ."]))
    assert mean.shape == logvar.shape == (3, 5)
    assert (mean[0] - mean[1]).abs().max() > 1e-4 and (mean[0] - mean[2]).abs().max() > 1e-4
    assert not torch.allclose(mean, logvar)


def test_mean_comes_before_log_variance():
    vae = tiny()
    with torch.no_grad():
        vae.to_gaussian.weight[5:] = 0
    mean, logvar = vae.encode(vae.words.encode(TEXTS[:2]))
    assert mean.abs().min() > 0 and not logvar.any()


# ---- Loss ----------------------------------------------------------------------------------------


def test_padding_changes_nothing():
    vae = tiny()
    ids = vae.words.encode(["the heart is normal .", "no effusion ."])
    eps = torch.randn(2, 5)
    wide = F.pad(ids, (0, 5), value=PAD)
    for a, b in zip(vae.encode(ids), vae.encode(wide)):
        assert torch.allclose(a, b, atol=1e-6)
    loss, facts = vae.loss(ids, eps, 0.3)
    again, wider = vae.loss(wide, eps, 0.3)
    assert loss.item() == pytest.approx(again.item(), rel=1e-5) and facts["nll"].item() == pytest.approx(wider["nll"].item(), rel=1e-5)


def test_loss_by_hand():
    vae = tiny()
    ids = vae.words.encode(["the heart is normal .", "no effusion ."])
    eps = torch.randn(2, 5)
    mean, logvar = vae.encode(ids)
    z = mean + logvar.exp().sqrt() * eps
    logits = vae.decode(z, ids)
    each = []
    for b, n in ((0, 6), (1, 4)):                                           # words, and EOS
        for place in range(n):
            each.append(-logits[b, place].log_softmax(0)[ids[b, place + 1]])
    gaussian = torch.distributions.Normal(mean, logvar.exp().sqrt())
    kl = torch.distributions.kl_divergence(gaussian, torch.distributions.Normal(0.0, 1.0))
    loss, facts = vae.loss(ids, eps, 0.3)
    nll = torch.stack(each).mean()
    charged = sum(max(0.05, kl[:, j].mean().item()) for j in range(5))
    assert facts["nll"].item() == pytest.approx(nll.item(), rel=1e-5) and not facts["nll"].requires_grad
    assert facts["kl"].item() == pytest.approx(kl.sum(1).mean().item(), rel=1e-4)
    assert loss.item() == pytest.approx(nll.item() + 0.3 * charged, rel=1e-5)


def test_below_the_free_bits_the_divergence_has_no_gradient():
    vae = tiny()
    ids = vae.words.encode(["the heart is normal .", "no effusion ."])
    # Column 0: little.  Column 1: much.  Column 2: .08 and 0, whose mean is below .05.  Column 3: only the variance.
    mean = torch.tensor([[0.1, 2.0, 0.4, 0.0, 0.0], [-0.1, -1.0, 0.0, 0.0, 0.0]], requires_grad=True)
    logvar = torch.tensor([[0.0, 0.0, 0.0, -2.0, 0.0], [0.0, 0.5, 0.0, 1.0, 0.0]], requires_grad=True)
    vae.encode = lambda ids: (mean, logvar)
    slopes = []
    for weight in (0.0, 7.0):
        loss, facts = vae.loss(ids, torch.zeros(2, 5), weight)
        slopes.append(torch.autograd.grad(loss, (mean, logvar)))
    by_mean, by_logvar = ((b - a) / 7 for a, b in zip(*slopes))
    assert torch.allclose(by_mean, torch.tensor([[0, 1.0, 0, 0, 0], [0, -0.5, 0, 0, 0]]), atol=1e-5)     # mean / B
    expected = torch.zeros(2, 5)
    expected[1, 1] = (math.exp(0.5) - 1) / 4
    expected[0, 3] = (math.exp(-2) - 1) / 4
    expected[1, 3] = (math.exp(1) - 1) / 4
    assert torch.allclose(by_logvar, expected, atol=1e-5)
    half = (4 + 1 + math.exp(0.5) - 1.5) / 4
    varied = (math.exp(-2) - 1 + 2 + math.exp(1) - 2) / 4
    assert (loss - facts["nll"]).item() / 7 == pytest.approx(3 * 0.05 + half + varied, rel=1e-4)


def test_weight_of_the_divergence_rises_in_the_second_quarter():
    found = [textvae.kl_weight(step, 200) for step in (0, 50, 75, 100, 199)]
    assert found == pytest.approx([0, 0, KL_WEIGHT / 2, KL_WEIGHT, KL_WEIGHT]) and KL_WEIGHT == 1e-3


def test_every_weight_learns():
    vae = tiny()
    loss, _ = vae.loss(vae.words.encode(TEXTS), torch.randn(12, 5), 1.0)
    loss.backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---- Latents and searches ------------------------------------------------------------------------


def test_latents_are_whitened_and_back():
    vae = tiny()
    vae.mu.copy_(torch.arange(5.0))
    vae.sigma.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, 0.5]))
    plain, _ = vae.encode(vae.words.encode(TEXTS))
    z = vae.to_latent(TEXTS, batch=5)
    assert torch.allclose(z[:, 1], (plain[:, 1] - 1) / 2, atol=1e-5) and torch.allclose(z[:, 4], 2 * (plain[:, 4] - 4), atol=1e-5)
    assert not z.requires_grad
    seen = []
    decode = vae.decode

    def spy(z, ids):
        seen.append(z)
        return decode(z, ids)
    vae.decode = spy
    greedy = vae.from_latent(z)
    assert torch.allclose(seen[0], plain, atol=1e-4)
    seen.clear()
    wide = vae.from_latent(z[3:4], beam=2)
    assert torch.allclose(seen[0], plain[3:4], atol=1e-4)
    vae.mu.zero_()
    vae.sigma.fill_(1)
    assert vae.from_latent(vae.to_latent(TEXTS)) == greedy and vae.from_latent(plain[3:4], beam=2) == wide


class Table(TextVAE):
    """The next word depends on the last one alone: table (V, V) of probabilities, {row of the latent: table}."""

    def decode(self, z, ids):
        self.asked.append(tuple(ids.shape))
        logits = torch.stack([self.tables[int(which)][row] for which, row in zip(z[:, 0], ids)])
        return logits.log()


def scripted(*chains, length=6):
    """A Table of words a to f.  chains: for each latent {word: {next word: probability}}; the others share the rest."""
    names = ["pad", "bos", "eos", "unk", *"abcdef"]
    vae = Table(Words(list("abcdef"), length), 4, 1, 1, 2)
    vae.asked = []
    vae.tables = []
    for chain in chains:
        table = torch.zeros(10, 10)
        for i, word in enumerate(names):
            own = {names.index(other): p for other, p in chain.get(word, {}).items()}
            table[i] = (1 - sum(own.values())) / (10 - len(own))
            for j, p in own.items():
                table[i, j] = p
        vae.tables.append(table)
    return vae, torch.stack([torch.arange(float(len(chains))), torch.zeros(len(chains))], dim=1)


def mean_of(vae, text):
    """The mean log-probability of the words of a report and of its end, by the first table."""
    ids = [BOS, *(vae.words.ids[word] for word in text.split()), EOS]
    return sum(vae.tables[0][a, b].log().item() for a, b in itertools.pairwise(ids)) / (len(ids) - 1)


CERTAIN = {"bos": {"a": 0.9}, "a": {"b": 0.9}, "b": {"eos": 0.9}}
FOREVER = {"bos": {"c": 0.9}, "c": {"c": 0.9}}
LONG = {"bos": {"d": 0.9}, "d": {"e": 0.9}, "e": {"f": 0.9}, "f": {"eos": 0.9}}


def test_greedy_takes_the_best_word_and_stops_at_the_end():
    vae, z = scripted(CERTAIN, LONG)
    assert vae.from_latent(z) == ["a b", "d e f"] and vae.asked == [(2, 1), (2, 2), (2, 3), (2, 4)]
    vae.asked.clear()
    assert vae.from_latent(z[:1]) == ["a b"] and len(vae.asked) == 3
    vae, z = scripted(CERTAIN, FOREVER)
    assert vae.from_latent(z) == ["a b", "c c c c c c"] and len(vae.asked) == 7       # as many words as a report may have


def test_a_beam_of_one_is_greedy():
    for seed in range(20):
        vae, z = scripted({})
        g = torch.Generator().manual_seed(seed)
        vae.tables[0] = torch.randn(10, 10, generator=g).mul(2).softmax(1)
        assert vae.words.decode(vae._search(z[0], 1)) == vae.from_latent(z)[0] == vae.from_latent(z, beam=1)[0]


def test_a_beam_finds_what_greedy_misses():
    """Greedy takes a, after which nothing is likely.  Behind b all is sure."""
    vae, z = scripted({"bos": {"a": 0.5, "b": 0.45}, "a": {"eos": 0.2, "c": 0.15}, "b": {"c": 0.98}, "c": {"eos": 0.97}})
    assert vae.from_latent(z) == ["a"] and vae.from_latent(z, beam=2) == ["b c"]
    assert mean_of(vae, "b c") > mean_of(vae, "a")


def test_a_beam_of_several_latents_keeps_them_apart():
    vae, z = scripted(CERTAIN, LONG, FOREVER)
    assert vae.from_latent(z, beam=3) == ["a b", "d e f", "c c c c c c"]


def test_a_report_is_judged_by_the_mean_of_its_words():
    """a: two words of mean -.65.  b c d: four words of mean -.60, but a lower sum.  BOS is not counted."""
    rest = math.exp(-0.5338)
    vae, z = scripted({"bos": {"a": 0.5, "b": 0.45}, "a": {"eos": 0.5451}, "b": {"c": rest}, "c": {"d": rest}, "d": {"eos": rest}})
    assert mean_of(vae, "a") == pytest.approx(-0.65, abs=1e-3) and mean_of(vae, "b c d") == pytest.approx(-0.60, abs=1e-3)
    assert vae.from_latent(z, beam=2) == ["b c d"]


def test_a_wide_beam_is_at_least_as_good_as_greedy():
    """Words end with probability .4 or more, so that reports of up to four words count.  A beam may miss the best one."""
    best = 0
    for seed in range(10):
        vae, z = scripted({})
        table = torch.randn(10, 10, generator=torch.Generator().manual_seed(seed)).mul(1.5).softmax(1)
        table[:, [PAD, BOS, UNK]] = 1e-9
        table[:, EOS] = 0.4 * table[:, 4:].sum(1)
        vae.tables[0] = table / table.sum(1, keepdim=True)
        reports = [" ".join(words) for n in range(5) for words in itertools.product("abcdef", repeat=n)]
        found = mean_of(vae, vae.from_latent(z, beam=10)[0])
        greedy = vae.from_latent(z)[0]
        if len(greedy.split()) < 6:                                         # else it was cut, and has no end
            assert found >= mean_of(vae, greedy) - 1e-6
        best += found > max(mean_of(vae, report) for report in reports) - 1e-6
    assert best >= 5


# ---- Training ------------------------------------------------------------------------------------


def fit(run, steps=10, stop_after=None, val=TEXTS[:4], make=tiny, batch=4):
    """Trains in a run; with stop_after, the run ends as after SIGTERM when so many steps are done in all."""
    update = type(run).update.__get__(run)
    done = run.stages.get("text", {}).get("step", 0)
    fit.rates = []

    def counted(loss, optimiser):
        fit.rates.append(optimiser.param_groups[0]["lr"])
        if stop_after is not None and done + len(fit.rates) == stop_after:
            run.stop = signal.SIGTERM
        return update(loss, optimiser)
    run.update = counted
    return textvae.train_textvae(run, TEXTS, val, make, steps, batch, 1e-2)


def same(a, b):
    a, b = flat(a), flat(b)
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("val", [TEXTS[:4], []], ids=["best", "last"])
def test_killed_and_continued_equals_undisturbed_bit_for_bit(tmp_path, val):
    whole = test_run.start(tmp_path / "a")
    vae = fit(whole, val=val)
    again = test_run.start(tmp_path / "b")
    for stop in (1, 5, 7):
        with pytest.raises(SystemExit):
            fit(again, stop_after=stop, val=val)
        again.close()
        again = test_run.start(tmp_path / "b")
        assert again.load() and again.stages["text"]["step"] == stop
    continued = fit(again, val=val)
    assert same(whole.stages, again.stages) and same(vae.state_dict(), continued.state_dict())
    assert set(whole.stages["text"]["parts"]) == {"vae", "best"}


def test_a_finished_stage_is_loaded_frozen(tmp_path):
    run = test_run.start(tmp_path)
    vae = fit(run, steps=4)
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    assert same(fit(run, steps=4).state_dict(), vae.state_dict()) and fit.rates == []
    assert same(textvae.load_textvae(run, tiny).state_dict(), vae.state_dict())
    with pytest.raises(RunError, match="does not fit this configuration"):
        textvae.load_textvae(run, lambda: TextVAE(Words(["a"], 12), 12, 2, 3, 5))


def test_latents_of_the_training_have_mean_0_and_deviation_1(tmp_path):
    for folder, val in (("a", TEXTS[:4]), ("b", [])):
        vae = fit(test_run.start(tmp_path / folder), val=val)
        z = vae.to_latent(TEXTS)
        assert z.mean(0).abs().max() < 1e-4 and (z.std(0, correction=0) - 1).abs().max() < 1e-4
        raw, _ = vae.encode(vae.words.encode(TEXTS))
        assert torch.allclose(vae.mu, raw.mean(0), atol=1e-6) and vae.mu.abs().min() > 0


def test_rates_warm_up_and_fall(tmp_path):
    fit(test_run.start(tmp_path), steps=30)
    falling = [1e-2 * (1 + math.cos(math.pi * (step - 3) / 27)) / 2 for step in range(3, 30)]
    assert fit.rates == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, *falling])


class Recorder(TextVAE):
    """Notes what the loss is asked; validation losses are 1 but for two looks."""

    def loss(self, ids, eps, weight):
        if torch.is_grad_enabled():
            self.trained.append((ids, eps, weight))
            return super().loss(ids, eps, weight)
        self.looked.append((ids, eps, weight, {name: value.clone() for name, value in self.state_dict().items()}))
        return torch.tensor({2: 0.1, 7: 0.2}.get(len(self.looked), 1.0)), {}


def recorded(folder, **settings):
    made = []

    def make():
        made.append(tiny(kind=Recorder))
        made[-1].trained = []
        made[-1].looked = []
        return made[-1]
    run = test_run.start(folder)
    return run, fit(run, make=make, **settings), made[0]


def test_weights_from_before_the_divergence_counts_are_not_chosen(tmp_path):
    """The second look has the lowest loss, and of those behind half of the steps the seventh."""
    _, vae, recorder = recorded(tmp_path)
    assert len(recorder.looked) == 10
    ids, eps, weight, _ = recorder.looked[0]
    assert torch.equal(ids, recorder.words.encode(TEXTS[:4])) and not eps.any() and weight == 0
    seventh = recorder.looked[6][3]
    assert all(torch.equal(value, seventh[name]) for name, value in vae.state_dict().items() if name not in ("mu", "sigma"))


def test_steps_have_their_own_texts_noise_and_weight(tmp_path):
    run, _, recorder = recorded(tmp_path, steps=6, val=[])
    drawn = torch.cat([eps for _, eps, _ in recorder.trained])
    assert drawn.shape == (24, 5) and len(drawn.unique(dim=0)) == 24
    assert drawn.std().item() == pytest.approx(1, abs=0.15)
    assert [weight for *_, weight in recorder.trained] == [textvae.kl_weight(step, 6) for step in range(6)]
    seen = [text for ids, _, _ in recorder.trained for text in map(recorder.words.decode, ids.tolist())]
    assert sorted(seen[:12]) == sorted(seen[12:]) == sorted(TEXTS) and seen[:12] != seen[12:]


def test_training_depends_on_the_seed_alone(tmp_path):
    def make():
        return TextVAE(Words.learn(TEXTS, 1, 12), 12, 1, 3, 5)
    found = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(found))
        run = test_run.start(tmp_path / folder)
        run.seed = seed
        found.append(fit(run, steps=2, make=make).state_dict())
    assert same(found[0], found[1]) and not same(found[0], found[2])


# ---- The U-Net for vectors -----------------------------------------------------------------------


def count_of(c_in, c_out, emb):
    """The weights of a VectorBlock: two norms, two layers over all positions, FiLM, and a skip where channels change."""
    wide_in, wide = 4 * c_in, 4 * c_out
    count = 2 * wide_in + (wide_in + 1) * wide + (emb + 1) * 2 * wide + 2 * wide + (wide + 1) * wide
    return count + (0 if c_in == c_out else (wide_in + 1) * wide)


def test_number_of_weights():
    b, z = 6, 10
    blocks = [(b, b), (b, b), (b, 2 * b), (2 * b, 2 * b),                   # down
              (2 * b, 2 * b), (2 * b, 2 * b),                               # middle
              (4 * b, 2 * b), (4 * b, 2 * b), (3 * b, b), (2 * b, b), (2 * b, b)]       # up
    emb = 4 * b
    rest = (b + 1) * emb + (emb + 1) * emb + (z + 1) * 4 * b + 2 * 4 * b + (4 * b + 1) * z
    unet = VectorUNet(z, b, (1, 2), 2)
    assert sum(p.numel() for p in unet.parameters()) == rest + sum(count_of(*pair, emb) for pair in blocks)


def test_vector_unet_starts_at_zero():
    assert not VectorUNet(10, 6, (1, 2), 1)(torch.randn(2, 10), torch.tensor([3, 900])).any()


def test_time_and_input_reach_the_output():
    torch.manual_seed(0)
    unet = wake(VectorUNet(10, 6, (1, 2), 1))
    x, t = torch.randn(3, 10), torch.tensor([5, 5, 700])
    out = unet(x, t)
    assert out.shape == (3, 10)
    assert not torch.allclose(out[:1], unet(x[:1], t[2:]), atol=1e-5) and not torch.allclose(out[:1], unet(x[:1] + 1, t[:1]), atol=1e-5)
    assert torch.allclose(out[1:2], unet(x[1:2], t[1:2]), atol=1e-5)        # samples do not see each other
    out.square().sum().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_vector_block_by_hand():
    torch.manual_seed(0)
    block = textvae.VectorBlock(3, 2, 5)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    x, emb = torch.randn(2, 3, 4, 1), torch.randn(2, 5)
    row = x.reshape(2, 12)
    h = block.grow(F.silu(F.layer_norm(row, (12,), block.norm1.weight, block.norm1.bias)))
    film = block.film(F.silu(emb))
    h = F.layer_norm(h, (8,), block.norm2.weight, block.norm2.bias) * (1 + film[:, :8]) + film[:, 8:]
    expected = block.skip(row) + block.shrink(F.silu(h))
    assert torch.allclose(block(x, emb), expected.reshape(2, 2, 4, 1), atol=1e-5)
    assert isinstance(textvae.VectorBlock(2, 2, 5).skip, nn.Identity)


def test_plugs_are_asked_after_each_block_and_called_with_the_condition():
    asked, called = [], []

    class Spy(nn.Module):
        def __init__(self, site):
            super().__init__()
            self.site = site

        def forward(self, h, condition):
            assert h.shape == (2, self.site.channels, 4, 1) and condition == "anything"
            called.append(self.site)
            return h

    def plug(site):
        asked.append(site)
        return None if site.stage == "mid" else Spy(site)
    unet = VectorUNet(10, 6, (1, 2), 2, plug)
    unet(torch.randn(2, 10), torch.tensor([5, 5]), "anything")
    assert [(s.stage, s.level, s.index, s.last, s.channels) for s in asked] == [
        ("down", 0, 0, False, 6), ("down", 0, 1, True, 6), ("down", 1, 0, False, 12), ("down", 1, 1, True, 12),
        ("mid", 1, 0, False, 12), ("mid", 1, 1, True, 12),
        ("up", 1, 0, False, 12), ("up", 1, 1, True, 12), ("up", 0, 0, False, 6), ("up", 0, 1, False, 6), ("up", 0, 2, True, 6)]
    assert {(s.where, s.size) for s in asked} == {("block", 4)}
    assert called == [site for site in asked if site.stage != "mid"]        # in this order


def test_a_plug_changes_what_follows():
    class Add(nn.Module):
        def forward(self, h, condition):
            return h + condition[:, :, None, None]
    torch.manual_seed(0)
    unet = wake(VectorUNet(10, 6, (1,), 1, lambda site: Add() if site.stage == "up" and site.last else None))
    x, t = torch.randn(2, 10), torch.tensor([5, 5])
    hints = torch.randn(2, 6)
    inputs = []
    unet.head.register_forward_pre_hook(lambda module, inside: inputs.append(inside[0].view(2, 6, 4)))
    unet(x, t, torch.zeros(2, 6))
    unet(x, t, hints)
    assert torch.allclose(inputs[1] - inputs[0], hints[:, :, None].expand(2, 6, 4), atol=1e-5)


def test_skips_come_back_last_first():
    """All levels are equally wide, so that the order shows in the values alone.  The last skip is the stem."""
    torch.manual_seed(0)
    unet = wake(VectorUNet(10, 6, (1, 1), 2))
    maps, joined = [], []
    unet.stem.register_forward_hook(lambda module, inputs, output: maps.append(output.view(1, 6, 4, 1)))
    for _, module in unet.down:
        module.register_forward_hook(lambda module, inputs, output: maps.append(output))
    for block, _ in unet.up:
        block.register_forward_pre_hook(lambda module, inputs: joined.append(inputs[0]))
    unet(torch.randn(1, 10), torch.tensor([5]))
    assert len(maps) == len(joined) == 5
    for skip, wide in zip(reversed(maps), joined):
        assert wide.shape == (1, 12, 4, 1) and torch.equal(wide[:, 6:], skip)
