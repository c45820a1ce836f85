"""MedM2G: the maths against closed forms, who listens to whom, and what each round trains."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import wake
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import medm2g
from common.codecs import Codecs
from common.device import Machine
from common.kspace import as_scanned, central_kspace
from common.loop import Loop
from common.multimodal import report_of
from common.rounds import MODALITIES, Samples, fresh_of, modality_of, pairs_of, patterns
from common.schedules import q_sample
from common.tokenizer import Tokenizer
from common.towers import PromptEncoders
from data import TEXT
from medm2g import (
    Condition,
    Config,
    Context,
    CrossGuide,
    Diffuser,
    Flows,
    Guide,
    Model,
    Partner,
    alpha_bar_of,
    guided,
    info_nce,
    roughly,
    sample,
    visual_invariant,
)

STREAMS = ("text", "t2", "ct", "xray", "t1")
CHAIN = ("text-xray", "text-ct", "ct-mri")
DIM = 12                                            # width of a prompt vector
SHAPES = {"text": (6,), "xray": (4, 8, 8), "ct": (4, 8, 8), "mri": (4, 8, 8)}
SMALL = dict(size=32, encoder="demo", align_steps=3, align_batch=6, align_lr=1e-3, projector=16,
             base=8, mult=(1, 2), blocks=1, attention=(4,), heads=2, groups=4, text_base=8,
             text_mult=(1,), width=16, guides=3, prompt_tokens=4, steps_image=3, steps_text=3,
             batch=6, batch_text=6, lr=1e-3, lr_text=1e-3, flow_steps=3, flow_lr=1e-3, steps=3)


def config(**changes):
    return Config(**{**SMALL, **changes})


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_flows(cfg, streams=STREAMS, seed=0):
    """Flows without any zero, so that no sub-layer is silent."""
    torch.manual_seed(seed)
    shapes = {m: SHAPES[m] for m in MODALITIES if m in map(modality_of, streams)}
    return wake(Flows(cfg, streams, DIM, shapes)).eval()


def latent(stream, B=2, seed=0):
    return normal(B, *SHAPES[modality_of(stream)], seed=seed)


# ---- the noise process ---------------------------------------------------------------------------


def test_alpha_bar():
    scaled = alpha_bar_of("scaled")
    wanted = [0.99915, 0.9982960278, 0.2776696505, 0.2763326838, 0.005775500139, 0.004660098513]
    assert scaled.shape == (1000,)
    assert scaled[[0, 1, 499, 500, 981, 999]].tolist() == pytest.approx(wanted, rel=1e-6)
    linear = alpha_bar_of("linear")[[0, 499, 999]].tolist()
    assert linear == pytest.approx([0.99915, 0.1618121459, 0.001578962931], rel=1e-6)


def times_of(steps):
    """The times that Model.generate visits."""
    watch = []
    toy_model(config(steps=steps)).generate({}, ["ct"], [("a", 0)], watch)
    return [time for time, _, _ in watch]


def oracle(x0, alpha_bar):
    """A function (states, time) -> the noise that leads from these states to x0 {stream: z}."""
    def predict(states, time):
        a = float(alpha_bar[time])
        return {s: (z - a ** 0.5 * x0[s]) / (1 - a) ** 0.5 for s, z in states.items()}
    return predict


def fresh(shape, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=g, dtype=dtype)


def test_times_go_from_the_last_to_the_first():
    assert times_of(5) == [999, 749, 500, 250, 0]
    fifty = times_of(50)
    assert fifty[:3] == [999, 979, 958] and fifty[-3:] == [41, 20, 0] and len(fifty) == 50


@pytest.mark.parametrize("schedule", ["scaled", "linear"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [5, 50])
def test_with_the_true_noise_the_sampler_returns_x0(schedule, eta, steps):
    alpha_bar = alpha_bar_of(schedule)
    x0 = {"ct": normal(2, 4, 3, 3).double().clamp(-4, 4), "text": normal(2, 6, seed=1).double()}
    start = {s: fresh(x.shape, 7)() for s, x in x0.items()}
    noise = {s: fresh(x.shape, 8) for s, x in x0.items()}
    times = torch.linspace(999, 0, steps).round().long().tolist()
    ends = sample(oracle(x0, alpha_bar), start, times, alpha_bar, eta, noise)
    for stream, x in x0.items():
        assert (ends[stream] - x).abs().max() < 1e-5


def test_new_noise_of_each_step():
    """From a state of zeros with x0 = 0, only sigma times the new noise is left, here of 1."""
    alpha_bar = alpha_bar_of("scaled")
    times = torch.linspace(999, 0, 50).round().long().tolist()
    found = []
    for i in range(50):
        watch = []
        nothing = {"ct": torch.zeros(1, dtype=torch.float64)}
        ones = {"ct": lambda: torch.ones(1, dtype=torch.float64)}
        ends = sample(oracle(nothing, alpha_bar), nothing, times[i:i + 2], alpha_bar, 1.0, ones,
                      watch)
        found.append((watch[1][1] if i < 49 else ends)["ct"].item())
    wanted = [0.45999129, 0.46359223, 0.44735178, 0.09973960, 0.02849604, 0]
    assert found[:3] + found[-3:] == pytest.approx(wanted, abs=1e-6)


def test_gaussian_data_keep_their_mean_and_variance():
    """x0 from N(.5, .6^2): the exact noise is known in closed form.  All 1,000 steps, eta 1."""
    mean, variance, n = 0.5, 0.36, 20_000
    alpha_bar = alpha_bar_of("scaled")

    def predict(states, time):
        a = float(alpha_bar[time])
        z = states["ct"]
        gain = a ** 0.5 * variance / (a * variance + 1 - a)
        x0 = mean + gain * (z - a ** 0.5 * mean)
        return {"ct": (z - a ** 0.5 * x0) / (1 - a) ** 0.5}
    last = float(alpha_bar[999])
    start = last ** 0.5 * mean + (last * variance + 1 - last) ** 0.5 * fresh((n,), 1)()
    ends = sample(predict, {"ct": start}, list(range(999, -1, -1)), alpha_bar, 1.0,
                  {"ct": fresh((n,), 2)})["ct"]
    assert abs(ends.mean() - mean) < 3 * (variance / n) ** 0.5
    assert abs(ends.var() - variance) < 3 * variance * (2 / n) ** 0.5


def test_estimates_are_clamped_at_4():
    alpha_bar = alpha_bar_of("scaled")
    watch = []
    ends = sample(lambda states, time: {"ct": torch.zeros(3)}, {"ct": torch.tensor([9.0, -9, 1])},
                  [500, 0], alpha_bar, 0.0, {"ct": lambda: None}, watch)
    own = 1 / float(alpha_bar[500]) ** 0.5
    assert watch[0][2]["ct"].tolist() == pytest.approx([4, -4, own], rel=1e-5)
    assert ends["ct"].abs().max() <= 4


def test_the_last_step_leaves_no_noise():
    x0 = {"ct": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    alpha_bar = alpha_bar_of("scaled")
    for last in (0, 700):
        noisy = {"ct": torch.tensor([0.3, 0.4], dtype=torch.float64)}
        ends = sample(oracle(x0, alpha_bar), noisy, [999, last], alpha_bar, 1.0,
                      {"ct": fresh((2,), 0)})
        assert torch.allclose(ends["ct"], x0["ct"], atol=1e-9)


def test_all_streams_are_read_before_one_is_changed():
    """Each stream's noise is the other stream's state."""
    alpha_bar = alpha_bar_of("scaled")

    def predict(states, time):
        return {"a": 0.3 * states["b"], "b": 0.1 * states["a"]}
    a, b = normal(5, seed=1), normal(5, seed=2)
    found = []
    for order in ("ab", "ba"):
        start = {s: {"a": a, "b": b}[s] for s in order}
        noise = {"a": fresh((5,), 3, torch.float32), "b": fresh((5,), 4, torch.float32)}
        found.append(sample(predict, start, [900, 600, 300, 0], alpha_bar, 1.0, noise))
        assert torch.equal(start["a"], a) and torch.equal(start["b"], b)
    assert torch.equal(found[0]["a"], found[1]["a"]) and torch.equal(found[0]["b"], found[1]["b"])


def test_guided_by_hand():
    c, u = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    for w, wanted in ((0, [1, 2]), (1, [3, 1]), (2, [5, 0]), (0.5, [2, 1.5])):
        assert guided(c, u, w).tolist() == wanted


# ---- losses --------------------------------------------------------------------------------------


def waves():
    """The arrays of the oracles: sin(1.1 n + k) and sin(1.1 n + .9 k + .2), (6, 4)."""
    n = torch.arange(6, dtype=torch.float64)[:, None]
    k = torch.arange(4, dtype=torch.float64)
    return torch.sin(1.1 * n + k), torch.sin(1.1 * n + 0.9 * k + 0.2)


def test_info_nce():
    z1, z2 = waves()
    loss = info_nce(z1, z2, 1 / 0.07, torch.arange(6)).item()
    assert loss == pytest.approx(0.005720836340 + 0.005461248256, abs=2e-6)
    # Rows have length 1 in it.
    longer = info_nce(3 * z1, 0.1 * z2, 1 / 0.07, torch.arange(6)).item()
    assert longer == pytest.approx(loss, abs=2e-6)


def test_equal_reports_are_no_negatives():
    """Two samples, u = v = the unit vectors.  Each direction gives log(e^s + 1) - s, or - s/2."""
    s = 3.0
    rows = torch.eye(2)
    apart = info_nce(rows, rows, s, torch.tensor([0, 1])).item()
    assert apart == pytest.approx(2 * (math.log(math.exp(s) + 1) - s), rel=1e-5)
    together = info_nce(rows, rows, s, torch.tensor([5, 5])).item()
    assert together == pytest.approx(2 * (math.log(math.exp(s) + 1) - s / 2), rel=1e-5)


def test_visual_invariant():
    z1, z2 = waves()
    # 1e-5 under the root; without it, this would be .0223777082 / 4.
    assert visual_invariant(z1, z2).item() == pytest.approx(0.0223781429 / 4, rel=1e-6)
    # The diagonal part alone, up to eps.
    assert visual_invariant(z1, z2, 0).item() == pytest.approx(0.0005304342 / 4, rel=4e-3)


def test_visual_invariant_ignores_scale_and_shift_of_a_view():
    z1, z2 = waves()
    own = visual_invariant(z1, z2).item()
    assert visual_invariant(5 * z1 - 3, z2).item() == pytest.approx(own, rel=1e-4)
    assert visual_invariant(z1, 7 * z2 + 1).item() == pytest.approx(own, rel=1e-4)
    assert visual_invariant(-z1, z2).item() > 10 * own


def test_visual_invariant_of_equal_views_is_what_features_share():
    z = waves()[0].numpy()
    C = np.corrcoef(z.T)
    off = (C ** 2).sum() - (C.diagonal() ** 2).sum()
    same = visual_invariant(*[torch.from_numpy(z)] * 2).item()
    assert same == pytest.approx(0.0051 * off / 4, rel=1e-3)
    # If each feature comes twice, every one has a perfect twin: + weight * (off + 4) / 4.
    twice = torch.from_numpy(np.concatenate([z, z], axis=1))
    wanted = 0.0051 * (4 * off + 2 * 4) / 8
    assert visual_invariant(twice, twice).item() == pytest.approx(wanted, rel=1e-3) and wanted > same


# ---- the cross-attention sub-layer ---------------------------------------------------------------


def keep_all(B):
    return torch.ones(B, dtype=torch.bool)


def told_by(*partners, keep=None):
    """What a sub-layer reads of a condition."""
    return Condition(None, list(partners), keep, None)


def plain_guide(width, heads=2, falloff=1e6):
    """A CrossGuide whose queries are 0 and whose values are the tokens themselves."""
    guide = CrossGuide(width, heads, width, place_bias=falloff is not None)
    with torch.no_grad():
        guide.to_q.weight.zero_()
        guide.to_v.weight.copy_(torch.eye(width))
        guide.out.weight.copy_(torch.eye(width))
        if falloff is not None:
            guide.falloff.fill_(falloff)
    return guide


def listen(guide, side, *partners):
    """What the sub-layer adds to a map of zeros: (side * side, C)."""
    h = torch.zeros(1, guide.to_q.in_features, side, side)
    added = guide(h, told_by(*partners))
    return added[0].flatten(1).T.detach()


def test_an_untrained_sublayer_changes_no_bit():
    torch.manual_seed(0)
    guide = CrossGuide(8, 2, 16, True)
    h = normal(2, 8, 4, 4)
    partner = Partner(normal(2, 16 + 3, 16, seed=1), 4)
    assert torch.equal(guide(h, told_by(partner, keep=keep_all(2))), h)
    # The whole network, in which nothing but the last layers of the sub-layers is zero.
    flows = make_flows(config())
    for module in flows.modules():
        if isinstance(module, CrossGuide):
            nn.init.zeros_(module.out.weight)
            nn.init.zeros_(module.out.bias)
    t = torch.tensor([3, 700])
    seen = flows.show("ct", "t2", latent("t2", seed=2), t)
    z = latent("ct", seed=3)
    e = normal(2, DIM, seed=4)
    alone = flows.predict("ct", z, t, e, keep_all(2))
    assert torch.equal(flows.predict("ct", z, t, e, keep_all(2), [seen], keep_all(2)), alone)


def test_partners_change_the_map_unless_a_sample_must_not_see_them():
    torch.manual_seed(0)
    guide = wake(CrossGuide(8, 2, 16, True))
    h = normal(2, 8, 4, 4)
    one, other = (Partner(normal(2, 19, 16, seed=s), 4) for s in (1, 2))
    keep = torch.tensor([True, False])
    made = guide(h, told_by(one, keep=keep))
    changed = guide(h, told_by(other, keep=keep))
    assert (made[0] - changed[0]).abs().max() > 1e-3 and (made[0] - h[0]).abs().max() > 1e-3
    assert torch.equal(made[1], h[1]) and torch.equal(changed[1], h[1])
    # Without keep, all see them; with fewer tokens, only the first samples do.
    everyone = guide(h, told_by(one))
    assert torch.equal(everyone[0], made[0]) and (everyone[1] - h[1]).abs().max() > 1e-3
    first = guide(h, told_by(Partner(one.tokens[:1], 4)))
    assert torch.allclose(first[0], made[0], atol=1e-6) and torch.equal(first[1], h[1])


def test_a_steep_falloff_takes_the_token_of_the_nearest_place():
    tokens = torch.eye(16)[None]
    guide = plain_guide(16)
    assert torch.allclose(listen(guide, 4, Partner(tokens, 4)), torch.eye(16), atol=1e-5)
    # Of a map of 2 x 2 places, each has four equally near ones.
    wanted = torch.zeros(4, 16)
    for place, near in enumerate(([0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15])):
        wanted[place, near] = 0.25
    assert torch.allclose(listen(guide, 2, Partner(tokens, 4)), wanted, atol=1e-5)


def test_falloff_by_hand():
    """Two heads, g = softplus: the weight of a place is exp(-g d^2) / sum of all."""
    guide = plain_guide(16)
    with torch.no_grad():
        guide.falloff.copy_(torch.tensor([1.0, 20.0]))
    found = listen(guide, 4, Partner(torch.eye(16)[None], 4))               # (16, 16)
    place = [((i // 4 + 0.5) / 4, (i % 4 + 0.5) / 4) for i in range(16)]
    for head, g in enumerate((math.log(1 + math.e), 20.0)):
        own = range(8 * head, 8 * head + 8)                         # the values that a head hands on
        for i in (0, 6):
            logits = [-g * ((place[i][0] - y) ** 2 + (place[i][1] - x) ** 2) for y, x in place]
            total = sum(map(math.exp, logits))
            wanted = [math.exp(logits[j]) / total for j in own]
            assert found[i, list(own)].tolist() == pytest.approx(wanted, abs=1e-5)


def test_falloff_starts_between_1_and_401():
    assert CrossGuide(8, 4, 16, True).falloff.tolist() == pytest.approx(
        [1, 1 + 400 / 9, 1 + 1600 / 9, 401])


def test_guide_tokens_have_no_distance():
    """16 places and 4 guides: the nearest place and the guides share the attention equally."""
    guide = plain_guide(20)
    found = listen(guide, 4, Partner(torch.eye(20)[None], 4))
    wanted = torch.cat([torch.eye(16), torch.ones(16, 4)], dim=1) / 5
    assert torch.allclose(found, wanted, atol=1e-5)


def test_without_a_common_grid_or_place_bias_no_token_is_nearer():
    tokens = torch.eye(16)[None]
    equal = torch.full((16, 16), 1 / 16)
    assert torch.allclose(listen(plain_guide(16), 4, Partner(tokens, None)), equal, atol=1e-6)
    literal = plain_guide(16, falloff=None)
    assert literal.falloff is None
    assert torch.allclose(listen(literal, 4, Partner(tokens, 4)), equal, atol=1e-6)


def test_several_partners_are_averaged():
    guide = plain_guide(16)
    one, other = Partner(torch.eye(16)[None], 4), Partner(3 * torch.eye(16).flip(0)[None], 4)
    both = listen(guide, 4, one, other)
    assert torch.allclose(both, (torch.eye(16) + 3 * torch.eye(16).flip(0)) / 2, atol=1e-5)


def test_queries_and_keys_meet():
    """Without a bias, the token whose key is the query gets the attention."""
    guide = plain_guide(16, heads=1, falloff=None)
    with torch.no_grad():
        guide.to_q.weight.copy_(50 * torch.eye(16))
        guide.to_k.weight.copy_(torch.eye(16))
    h = torch.zeros(1, 16, 1, 1)
    h[0, 5] = 100.0                                     # much larger than the position code
    added = guide(h, told_by(Partner(torch.eye(16)[None], None))) - h
    assert added[0, :, 0, 0].argmax() == 5 and added[0, 5, 0, 0] > 0.99


# ---- context and guide ---------------------------------------------------------------------------


@pytest.mark.parametrize("reader, stream, on_one_grid", [
    ("ct", "t2", True), ("t2", "ct", True), ("t1", "t2", True), ("text", "ct", False),
    ("ct", "text", False), ("xray", "ct", False), ("ct", "xray", False), ("t2", "xray", False)])
def test_only_ct_and_mr_lie_on_one_grid(reader, stream, on_one_grid):
    flows = make_flows(config())
    partner = flows.show(reader, stream, latent(stream), torch.tensor([0, 5]))
    assert partner.side == (8 if on_one_grid else None)
    assert partner.tokens.shape == (2, (4 if stream == "text" else 64) + 3, 16)


def test_large_latents_are_shown_on_16_x_16_places():
    torch.manual_seed(0)
    context = Context(config(), "ct", STREAMS, (4, 64, 64))
    tokens = context(normal(1, 4, 64, 64), torch.tensor([9]), None, "ct")
    assert context.side == 16 and tokens.shape == (1, 256, 16)


def test_context_tells_latent_time_contrast_and_guides():
    flows = make_flows(config())
    context = flows.contexts["mri"]
    z = latent("t2")
    t = torch.tensor([10, 10])
    guides = flows.guides["mri"]()
    own = context(z, t, guides, "t2")
    for other in (context(z + 0.5, t, guides, "t2"), context(z, t + 300, guides, "t2"),
                  context(z, t, guides, "t1"), context(z, t, guides.flip(1), "t2")):
        assert (own[:, :64] - other[:, :64]).abs().max() > 1e-4


def test_guides_start_as_rows_of_the_prompt_vectors():
    prompts = normal(40, DIM)
    guide = Guide(5, DIM, 16)
    guide.start(prompts, torch.Generator().manual_seed(0))

    def are_rows(found):
        return all((prompts == row).all(1).any() for row in found)
    assert guide.vectors.shape == (5, DIM) and are_rows(guide.vectors) and are_rows(guide.pool)
    assert torch.equal(guide(), guide.embed(guide.vectors)) and guide().shape == (5, 16)
    assert len(guide.pool.unique(dim=0)) > 10


def test_resampled_guides_are_other_rows_at_each_draw():
    guide = Guide(5, 16, 16)
    guide.start(normal(40, 16), torch.Generator().manual_seed(0))
    with torch.no_grad():
        guide.embed.weight.copy_(torch.eye(16))
        guide.embed.bias.zero_()
    g = torch.Generator().manual_seed(1)
    first, second = guide(g), guide(g)
    assert first.shape == (5, 16) and not torch.equal(first, second)
    assert all((guide.pool == row).all(1).any() for row in torch.cat([first, second]))
    flows = make_flows(config(guide="resampled"))
    for m in flows.guides:
        flows.guides[m].start(normal(40, DIM), torch.Generator().manual_seed(2))
    t = torch.zeros(2)

    def seen(g):
        return flows.show("ct", "text", latent("text"), t, g).tokens
    assert torch.equal(seen(None), seen(None)) and not torch.equal(seen(g), seen(None))


def test_learned_guides_are_not_drawn():
    flows = make_flows(config())
    t = torch.zeros(2)
    g = torch.Generator().manual_seed(1)
    one, other = (flows.show("ct", "text", latent("text"), t, draw).tokens for draw in (None, g))
    assert torch.equal(one, other)


def test_guide_off_removes_its_tokens_and_parameters():
    flows = make_flows(config(guide="off"))
    assert flows.show("ct", "t2", latent("t2"), torch.zeros(2)).tokens.shape == (2, 64, 16)
    names = [name for name, _ in flows.named_parameters()]
    with_guides = [name for name, _ in make_flows(config()).named_parameters()]
    assert len(flows.guides) == 0 and {name.split(".")[0] for name in names} == {
        "diffusers", "crosses", "contexts"}
    assert sorted(names) == sorted(name for name in with_guides if not name.startswith("guides"))


def test_no_lcag_has_no_context_no_guide_and_no_sublayer():
    flows = make_flows(config(lcag=False))
    assert {name.split(".")[0] for name, _ in flows.named_parameters()} == {"diffusers"}
    assert not any(isinstance(module, CrossGuide) for module in flows.modules())


# ---- the diffuser --------------------------------------------------------------------------------


def prompt_gradients(count, stream="xray"):
    """The largest gradients of to_q, to_k and to_v of the attention to `count` prompt tokens."""
    flows = make_flows(config(prompt_tokens=count))
    # Some faster kernels of attention leave 1e-8 where the exact value is 0.
    with sdpa_kernel(SDPBackend.MATH):
        noise = flows.predict(stream, latent(stream), torch.tensor([10, 900]),
                              normal(2, DIM, seed=1), keep_all(2))
        (noise * normal(*noise.shape, seed=2)).sum().backward()
    found = {"to_q": 0.0, "to_k": 0.0, "to_v": 0.0}
    for name, p in flows.diffusers[modality_of(stream)].named_parameters():
        for layer in found:
            if f"prompt.cross_attention.{layer}" in name:
                found[layer] = max(found[layer], p.grad.abs().max().item())
    return found


@pytest.mark.parametrize("stream", ["xray", "text"])
def test_with_one_prompt_token_queries_and_keys_never_learn(stream):
    one, eight = prompt_gradients(1, stream), prompt_gradients(8, stream)
    assert one["to_q"] == 0 and one["to_k"] == 0 and one["to_v"] > 1e-5
    assert min(eight.values()) > 1e-7


def test_without_a_prompt_there_are_null_tokens_but_the_contrast_stays():
    flows = make_flows(config())
    keep = torch.tensor([True, False])
    prompt = normal(2, DIM)
    plain = flows.diffusers["ct"].prompt_tokens(prompt, keep, "ct")
    assert plain.shape == (2, 4, 16) and torch.equal(plain[1], flows.diffusers["ct"].null)
    mri = flows.diffusers["mri"]
    for stream, number in (("t2", 0), ("t1", 1)):
        found = mri.prompt_tokens(prompt, keep, stream)
        assert found.shape == (2, 5, 16) and torch.equal(found[1, :4], mri.null)
        assert torch.equal(found[:, 4], mri.contrast[number].expand(2, -1))
        other = mri.prompt_tokens(prompt + normal(2, DIM, seed=5), keep, stream)
        assert (other[0] - found[0]).abs().max() > 1e-2 and torch.equal(other[1], found[1])


def test_a_prompt_becomes_tokens_of_its_own():
    """Token l is rows 16 l to 16 l + 15 of one linear map of the LayerNorm of the vector."""
    diffuser = make_flows(config()).diffusers["ct"]
    prompt = normal(1, DIM)
    x = prompt - prompt.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
    x = x * diffuser.norm.weight + diffuser.norm.bias
    flat = x @ diffuser.expand.weight.T + diffuser.expand.bias
    found = diffuser.prompt_tokens(prompt, keep_all(1), "ct")
    assert torch.allclose(found[0, 2], flat[0, 32:48], atol=1e-5)


def test_where_the_sublayers_sit():
    """Behind the last block of each level, and once in the middle.  Prompts at small maps only."""
    flows = make_flows(config())
    network = flows.diffusers["ct"].network
    plugs = [block.plug for row in [*network.down, network.mid, *network.up] for block in row]
    found = [None if plug is None else (plug.prompt is not None, plug.cross is not None)
             for plug in plugs]
    # Down 8 and 4, twice the middle, up 4, 4, 8, 8.
    assert found == [(False, True), (True, True), (True, True), None,
                     (True, False), (True, True), (False, False), (False, True)]


def test_contrasts_of_mr_differ_and_nothing_else_reads_them():
    flows = make_flows(config())
    t = torch.tensor([3, 400])
    e = normal(2, DIM)
    z = latent("t2")
    made = [flows.predict(stream, z, t, e, ~keep_all(2)) for stream in ("t2", "t1")]
    assert (made[0] - made[1]).abs().max() > 1e-4
    assert flows.diffusers["ct"].contrast is None and flows.diffusers["text"].contrast is None


def test_whitening_and_its_inverse():
    torch.manual_seed(0)
    diffuser = Diffuser(config(), "ct", STREAMS, DIM, (2, 4, 4), nn.Identity())
    diffuser.set_scale(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0]))
    z = torch.tensor([2.0, 6.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    white = diffuser.whiten(z)
    assert white[0, :, 0, 0].tolist() == [2.0, 2.0] and white.shape == z.shape
    model = toy_model(config())
    for stream in ("text", "ct"):
        own = model.flows.diffusers[modality_of(stream)]
        own.set_scale(*(normal(SHAPES[modality_of(stream)][0], seed=s).abs() + 0.1
                        for s in (1, 2)))
        back = model.decode(stream, own.whiten(latent(stream, seed=3)))
        wanted = latent(stream, seed=3)
        if stream == "text":
            back = torch.tensor([list(map(float, text.split())) for text in back])
        assert torch.allclose(back, wanted, atol=1e-4)


# ---- samples -------------------------------------------------------------------------------------


class ToyCodecs(Codecs):
    """An image of n numbers is its own latent, and a report is its latent in words."""

    def __init__(self):
        super().__init__(None, None, 32)

    def encode(self, stream, x):
        if stream == TEXT:
            return torch.tensor([list(map(float, text.split())) for text in x])
        return x.expand(-1, 4, -1, -1)

    def decode(self, stream, z):
        if stream == TEXT:
            return [" ".join(str(float(v)) for v in row) for row in z]
        return z

    def shape(self, stream):
        return SHAPES[modality_of(stream)]


class ToyEncoders(nn.Module):
    """The prompt vector of every image is one vector, that of a report another."""

    dim = DIM

    def prompt(self, modality, x):
        return normal(DIM, seed=3 if modality == "text" else 4).expand(len(x), -1)


def toy_model(cfg, streams=STREAMS):
    """A Model of random networks on latents of 8 x 8."""
    return Model(cfg, Machine(0, "cpu", "fp32"), list(streams), ToyCodecs(), ToyEncoders(),
                 make_flows(cfg, streams), {})


class ToyRun(Loop):
    """A run without a folder.  It notes what is logged, and the weights around each step."""

    def __init__(self, watched=()):
        super().__init__(0, "cpu", "fp32")
        self.args = SimpleNamespace(micro_batch=None)
        self.about = {"shapes": SHAPES}
        self.watched = dict(watched)
        self.logged = []                                # for each step {name: value}
        self.states = {}                                # stage -> weights before each step, and last

    def say(self, text):
        pass

    def log(self, **numbers):
        for name, value in numbers.items():
            self.logged[-1][name] = float(torch.as_tensor(value).detach())

    def steps(self, stage, total, parts, batch=1):
        modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        watched = {**modules, **self.watched}
        self.states[stage] = [weights_of(watched)]
        for step in range(total):
            self.logged.append({"stage": stage})
            yield step
            self.states[stage].append(weights_of(watched))

    def changed(self, stage, first, last):
        """The names of all that differs before step `first` and after step `last` - 1."""
        before, after = self.states[stage][first], self.states[stage][last]
        assert before.keys() == after.keys()
        return {name for name in before if not torch.equal(before[name], after[name])}


def weights_of(networks):
    """Copies of all parameters and buffers: {"network/name": tensor}."""
    found = {}
    for name, network in networks.items():
        for own, tensor in network.state_dict().items():
            found[f"{name}/{own}"] = tensor.detach().clone()
    return found


def make_samples(run, streams=STREAMS, n=24):
    """Samples of n rows.  A third has text and X-ray, a third text and CT, a third CT and MR."""
    rng = np.random.default_rng(0)
    samples = Samples.__new__(Samples)
    samples.run = run
    samples.streams = tuple(streams)
    samples.change = lambda stream, x: x
    samples.images = rng.random((n, len(streams), 32, 32), dtype=np.float32)
    kinds = np.arange(n) % 3
    members = {"text": kinds < 2, "xray": kinds == 0, "ct": kinds > 0, "mri": kinds == 2}
    samples.present = np.stack([members[modality_of(s)] for s in streams], axis=1)
    samples.place = samples.present.cumsum(0) - 1
    samples.reports = [f"word{r} is here ." if members["text"][r] else None for r in range(n)]
    samples.vectors = {}
    samples.latents = {}
    for c, stream in enumerate(streams):
        found = rng.normal(1, 2, (samples.present[:, c].sum(), *SHAPES[modality_of(stream)]))
        samples.latents[c] = found.astype(np.float16)
        if stream == TEXT:
            samples.latents[c] = torch.from_numpy(found).float()
    return samples


def make_rounds(samples, names):
    return [pairs_of(name, samples.streams, samples.present) for name in names]


def test_moments_of_a_modality():
    """MR: both contrasts, all places, each channel; deviation without Bessel's correction."""
    samples = make_samples(ToyRun())
    mr = np.concatenate([samples.latents[c] for c in (1, 4)]).astype(np.float64)
    mean, std = samples.moments("mri")
    assert mean.numpy() == pytest.approx(mr.mean((0, 2, 3)), abs=1e-5)
    assert std.numpy() == pytest.approx(mr.std((0, 2, 3)), abs=1e-5)
    mean, std = samples.moments("text")                 # the text codec has seen to it
    assert mean.tolist() == [0] * 6 and std.tolist() == [1] * 6


def make_encoders(modalities=("text", "xray", "ct", "mri"), rounds=3, seed=0):
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train([f"word{r} is here ." for r in range(9)], 200, 10 ** 6)
    return PromptEncoders("demo", list(modalities), tokenizer, 32, rounds)


def test_prompts_have_length_1_and_lose_the_mean_of_their_modality():
    encoders = make_encoders().eval()
    x = torch.from_numpy(np.random.default_rng(1).random((5, 1, 32, 32), dtype=np.float32))
    e = encoders("ct", x).detach()
    unit = e / e.norm(dim=1, keepdim=True)
    assert torch.allclose(encoders.prompt("ct", x), unit, atol=1e-6)        # the mean is still 0
    with torch.no_grad():
        encoders.mean_ct.copy_(unit.mean(0))
        encoders.mean_mri.fill_(9)
    found = encoders.prompt("ct", x).detach()
    wanted = unit - unit.mean(0)
    assert torch.allclose(found.norm(dim=1), torch.ones(5), atol=1e-5)
    assert torch.allclose(found, wanted / wanted.norm(dim=1, keepdim=True), atol=1e-5)


def test_centre_by_hand():
    """The mean of the unit vectors of all rows of a modality, over both MR contrasts."""
    run = ToyRun()
    samples = make_samples(run)
    encoders = make_encoders()
    encoders.centre(samples)
    with torch.no_grad():
        for modality, channels in (("mri", (1, 4)), ("text", (0,))):
            rows = np.flatnonzero(samples.present[:, channels[0]])
            found = []
            for c in channels:
                x = [samples.reports[r] for r in rows] if c == 0 else torch.from_numpy(
                    samples.images[rows][:, [c]])
                e = encoders(modality, x)
                found.append(e / e.norm(dim=1, keepdim=True))
            mean = torch.cat(found).mean(0)
            assert torch.allclose(getattr(encoders, f"mean_{modality}"), mean, atol=1e-6)
            assert mean.norm() > 0.1


# ---- cross-guidance when sampling ----------------------------------------------------------------


def disturb(module):
    """Other random weights for a module."""
    with torch.no_grad():
        for number, p in enumerate(module.parameters()):
            p.add_(normal(*p.shape, seed=100 + number))


def test_the_noise_of_a_stream_depends_on_its_partner():
    flows = make_flows(config())
    t = torch.tensor([500, 20])
    e = normal(2, DIM)
    for stream, other in (("text", "xray"), ("xray", "text"), ("t2", "ct"), ("ct", "t2")):
        z = latent(stream, seed=5)
        found = []
        for seed in (6, 7):
            partner = flows.show(stream, other, latent(other, seed=seed), t)
            found.append(flows.predict(stream, z, t, e, keep_all(2), [partner], keep_all(2)))
        assert (found[0] - found[1]).abs().max() > 1e-4


def made_of(model, make, given=None, B=2):
    """What a model makes, as tensors {stream: (B, ...)}."""
    keys = [("someone", number) for number in range(B)]
    made = model.generate(given or {}, make, keys)
    if "text" in made:
        made["text"] = torch.tensor([list(map(float, text.split())) for text in made["text"]])
    return made


def test_guidance_crosses_and_nobody_listens_to_himself():
    """With one step, other weights of V_xray change the report and not the X-ray."""
    model = toy_model(config(steps=1))
    before = made_of(model, ["text", "xray"])
    disturb(model.flows.contexts["xray"])
    after = made_of(model, ["text", "xray"])
    assert torch.equal(before["xray"], after["xray"])
    assert (before["text"] - after["text"]).abs().max() > 1e-3
    disturb(model.flows.contexts["text"])
    last = made_of(model, ["text", "xray"])
    assert torch.equal(last["text"], after["text"])
    assert (last["xray"] - after["xray"]).abs().max() > 1e-3


def test_what_is_given_guides_beyond_its_prompt():
    """All images have one prompt vector here, so the CT can only tell through its context."""
    model = toy_model(config())
    one, other = (0.3 * normal(2, 1, 8, 8, seed=s) for s in (1, 2))
    made = [made_of(model, ["t2", "text"], {"ct": x}) for x in (one, other)]
    for stream in ("t2", "text"):
        assert (made[0][stream] - made[1][stream]).abs().max() > 1e-3
    plain = [made_of(toy_model(config(lcag=False)), ["t2"], {"ct": x})["t2"] for x in (one, other)]
    assert torch.equal(*plain)


def test_the_order_of_the_streams_does_not_matter():
    model = toy_model(config())
    one = made_of(model, ["text", "xray", "ct", "t2"])
    other = made_of(model, ["t2", "ct", "text", "xray"])
    for stream in one:
        assert torch.equal(one[stream], other[stream])


def test_only_pairs_that_were_a_round_guide():
    model = toy_model(config())
    assert model.partners_of("text", STREAMS) == ["ct", "xray"]
    assert model.partners_of("xray", STREAMS) == ["text"]
    assert model.partners_of("ct", STREAMS) == ["text", "t2", "t1"]
    assert model.partners_of("t2", STREAMS) == ["ct"]
    alone = toy_model(config(rounds=("mri-mri",)))
    assert alone.partners_of("t2", STREAMS) == ["t1"]
    # Behaviour: neither text and MR nor X-ray and CT hear each other.
    for deaf, silent in (("t2", "text"), ("ct", "xray")):
        before = made_of(model, [deaf, silent])[deaf]
        disturb(model.flows.contexts[modality_of(silent)])
        assert torch.equal(made_of(model, [deaf, silent])[deaf], before)


def test_prompts_of_several_streams_are_averaged_and_null_without_any():
    model = toy_model(config(lcag=False, w=1.0))
    told = []
    of = model.flows.predict
    model.flows.predict = lambda stream, z, t, e, keep, *rest: told.append((e, keep)) or of(
        stream, z, t, e, keep, *rest)
    model.generate({"text": ["1 2 3 4 5 6"], "ct": torch.zeros(1, 1, 8, 8)}, ["xray"], [("a", 0)])
    both = normal(DIM, seed=3) + normal(DIM, seed=4)
    assert torch.allclose(told[0][0][0], both / both.norm(), atol=1e-6) and told[0][1].all()
    model.generate({}, ["xray"], [("a", 0)])
    assert not told[-1][1].any()


def test_guidance_of_a_stream_is_that_of_two_single_calls():
    """w = 2 in one batch equals 2 conditional - unconditional; the second sees no partner."""
    model = toy_model(config(w=2.0))
    flows = model.flows
    z, t, e = latent("ct"), torch.tensor([30, 30]), normal(2, DIM)
    partner = flows.show("ct", "t2", latent("t2", seed=1), t)
    yes = keep_all(2)
    conditional = flows.predict("ct", z, t, e, yes, [partner], yes)
    unconditional = flows.predict("ct", z, t, e, ~yes)
    found = model.noise_of("ct", z, t, e, yes, [partner])
    assert torch.allclose(found, 2 * conditional - unconditional, atol=1e-5)
    model.cfg = config(w=1.0)
    assert torch.allclose(model.noise_of("ct", z, t, e, yes, [partner]), conditional, atol=1e-5)
    assert (conditional - unconditional).abs().max() > 1e-3


def test_noise_belongs_to_the_key_and_the_stream():
    model = toy_model(config())
    both = model.generate({}, ["ct", "xray"], [("a", 0), ("b", 3)])
    turned = model.generate({}, ["ct", "xray"], [("b", 3), ("a", 0)])
    for stream in both:
        assert torch.allclose(both[stream], turned[stream].flip(0), atol=1e-5)
    watch = []
    model.generate({}, ["ct", "xray", "t2"], [("a", 0)], watch)
    first = watch[0][1]
    assert not torch.equal(first["ct"], first["xray"]) and not torch.equal(first["ct"], first["t2"])


def test_tasks():
    streams = ("text", "ct", "t2", "xray")
    usual = {(("text",), ("xray",)), (("text",), ("ct",)), (("ct",), ("t2",)), (("t2",), ("ct",)),
             (("text",), ("t2",))}
    assert set(patterns(config(), streams)) == usual
    chosen = patterns(config(only=("text+CT:xray", "t2:ct")), streams)
    assert chosen == [(("text", "ct"), ("xray",)), (("t2",), ("ct",))]
    assert patterns(config(only=("ct:text",)), streams) == []       # reports are scored elsewhere
    # A degraded MR is no target.
    assert set(patterns(config(accelerate=4), streams)) == {task for task in usual
                                                            if task[1] != ("t2",)}


def test_an_accelerated_scan_degrades_mr_and_nothing_else():
    x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    model = toy_model(config(accelerate=4))
    assert torch.equal(as_scanned(model.cfg, "ct", x), x)
    degraded = as_scanned(model.cfg, "t2", x)
    assert torch.equal(degraded, central_kspace(x, 4)) and (degraded - x).abs().max() > 0.1
    assert torch.equal(as_scanned(config(), "t2", x), x)


def test_a_report_must_be_known():
    model = toy_model(config(given="The HEART is large."))
    model.reports = {"a": "no effusion ."}
    assert report_of(model, "a") == "no effusion ."
    assert report_of(model, "b") == "the heart is large ."
    with pytest.raises(ValueError, match="there is no report of b; give one with --given"):
        report_of(toy_model(config()), "b")


# ---- order and freezing --------------------------------------------------------------------------


def test_what_each_round_is_the_first_to_train():
    assert fresh_of(CHAIN) == [["text", "xray"], ["ct"], ["mri"]]
    star = ("text-xray", "text-ct", "text-mri", "ct-mri")
    assert fresh_of(star) == [["text", "xray"], ["ct"], ["mri"], ["mri"]]
    assert fresh_of(("mri-mri",)) == [["mri"]]
    assert fresh_of(("ct-mri", "text-ct")) == [["ct", "mri"], ["text"]]


def groups_in(names, depth):
    """The first `depth` words of dotted names; a lone parameter counts as itself."""
    return {".".join(name.split(".")[:depth]) for name in names}


def aligned(**changes):
    cfg = config(**changes)
    run = ToyRun()
    samples = make_samples(run)
    encoders = medm2g.align(cfg, run, samples, make_rounds(samples, cfg.rounds))
    return cfg, run, samples, encoders


def test_alignment_trains_what_is_new_to_a_round():
    _, run, _, encoders = aligned()
    new = (("text", "xray"), ("ct",), ("mri",))
    for r, modalities in enumerate(new):
        wanted = {f"encoders/towers.{m}" for m in modalities} | {f"encoders/log_scale.{r}"}
        wanted |= {f"heads/{m}" for m in modalities if m != "text"}
        changed = run.changed("alignment", 3 * r, 3 * r + (2 if r == 2 else 3))
        heads = {name.split(".")[0] for name in changed if name.startswith("heads")}
        assert groups_in(changed - {n for n in changed if n.startswith("heads")}, 2) | heads == wanted
        # Of the head, the statistics of BatchNorm move with the weights.
        assert any("running_mean" in name for name in changed)
    # The means come after the last step.
    assert all(getattr(encoders, f"mean_{m}").norm() > 0 for m in MODALITIES)
    assert not any(p.requires_grad for p in encoders.parameters()) and not encoders.training
    assert [("nce" in step, "vi" in step) for step in run.logged] == [(True, True)] * 9


def test_two_views_of_the_images_of_each_pair(monkeypatch):
    """Eq. (3) reads the first of them, also of an encoder that is frozen."""
    seen = []
    of = medm2g.augment

    def noted(x, modality, g):
        seen.append(modality)
        return of(x, modality, g)
    monkeypatch.setattr(medm2g, "augment", noted)
    aligned(align_steps=1)
    assert seen == ["xray"] * 2 + ["ct"] * 2 + ["ct"] * 2 + ["mri"] * 2


def test_the_contrastive_loss_reads_first_views_and_shuffled_reports(monkeypatch):
    """If every first view and every shuffled report is the same, so are the vectors that the loss gets."""
    views = []

    def first_is_flat(x, modality, g):
        views.append(modality)
        return torch.zeros_like(x) if len(views) % 2 else x
    got = []
    of = medm2g.info_nce

    def noted(u, v, scale, groups):
        got.append((u.detach(), v.detach()))
        return of(u, v, scale, groups)
    monkeypatch.setattr(medm2g, "augment", first_is_flat)
    monkeypatch.setattr(medm2g, "shuffled", lambda report, g: "word3 is here .")
    monkeypatch.setattr(medm2g, "info_nce", noted)
    aligned(align_steps=1)
    assert len(got) == 3 and len(views) == 8
    for vectors in (part for pair in got for part in pair):
        assert len(vectors) > 1 and torch.allclose(vectors, vectors[:1].expand_as(vectors), atol=1e-5)


def test_the_visual_invariant_is_asked_of_new_encoders_alone(monkeypatch):
    """Three rounds bring three image encoders; CT is frozen when it meets MR."""
    asked = []
    of = medm2g.visual_invariant
    monkeypatch.setattr(medm2g, "visual_invariant", lambda a, b: asked.append(a.requires_grad) or of(a, b))
    aligned(align_steps=1)
    assert asked == [True] * 3


def test_long_reports_are_cut_by_the_encoder():
    encoders = make_encoders().eval()
    long = " ".join(["word1 is here ."] * 60)
    assert torch.equal(encoders("text", [long]), encoders("text", [long + " word2 is here ."]))
    short = "word1 is here ."
    assert not torch.equal(encoders("text", [short]), encoders("text", [short + " word2 is here ."]))


def test_ablations_of_the_alignment():
    _, run, _, _ = aligned(vi=False)
    assert len(run.logged) == 9 and not any("vi" in step for step in run.logged)
    assert all("nce" in step for step in run.logged)
    _, run, _, encoders = aligned(ca=False)
    assert len(run.logged) == 9 and not any("nce" in step for step in run.logged)
    assert all("vi" in step for step in run.logged)
    # Eq. (4) alone trains no text tower, and no mean is measured.
    assert not any("towers.text" in name for name in run.changed("alignment", 0, 9))
    assert all(getattr(encoders, f"mean_{m}").norm() == 0 for m in MODALITIES)
    _, run, _, _ = aligned(ca=False, vi=False)
    assert run.logged == [] and run.changed("alignment", 0, 0) == set()


def test_alignment_takes_equal_reports_for_one_group():
    cfg = config(vi=False, align_steps=1, rounds=("text-xray",))
    found = []
    for same in (False, True):
        run = ToyRun()
        samples = make_samples(run)
        if same:
            samples.reports = [text and "word1 is here ." for text in samples.reports]
        medm2g.align(cfg, run, samples, make_rounds(samples, cfg.rounds))
        found.append(run.logged[0]["nce"])
    # With equal reports the rows of text are flat, and 2 log 6 is the least.
    assert found[1] > 2 * math.log(6) - 0.1 and found[1] != found[0]


def trained_diffusers(**changes):
    cfg = config(**changes)
    run = ToyRun()
    samples = make_samples(run)
    encoders = make_encoders(rounds=len(cfg.rounds))
    encoders.dim = 128
    flows = medm2g.train_diffusers(cfg, run, samples, encoders, make_rounds(samples, cfg.rounds))
    return cfg, run, samples, encoders, flows


def test_each_diffuser_is_trained_alone_without_its_sublayers():
    _, run, samples, _, flows = trained_diffusers()
    for phase, modality in enumerate(("xray", "ct", "mri", "text")):
        changed = run.changed("diffusers", 3 * phase, 3 * phase + 3)
        assert groups_in(changed, 1) == {f"diffusers/{modality}"}
        parts = {name.split(".")[1] for name in changed}
        assert {"network", "expand", "null", "norm"} <= parts and not {"mean", "std"} & parts
        assert ("contrast" in parts) == (modality == "mri")
        assert set(run.logged[3 * phase]) == {"stage", "loss", f"loss_{modality}"}
        mean, std = samples.moments(modality)
        assert torch.equal(flows.diffusers[modality].mean.flatten(), mean)
        assert torch.equal(flows.diffusers[modality].std.flatten(), std)
    # The sub-layers are elsewhere.
    assert not any(isinstance(module, CrossGuide) for module in flows.diffusers.modules())
    assert all(not module.out.weight.any() for module in flows.crosses.modules()
               if isinstance(module, CrossGuide))


def test_without_alignment_a_diffuser_trains_each_prompt_encoder_once():
    """X-ray reads text; CT reads text and MR; MR reads CT; text reads X-ray and CT."""
    _, run, _, _, _ = trained_diffusers(ca=False)
    for phase, (modality, encoder) in enumerate((("xray", "text"), ("ct", "mri"), ("mri", "ct"),
                                                 ("text", "xray"))):
        changed = run.changed("diffusers", 3 * phase, 3 * phase + 3)
        assert groups_in({n for n in changed if n.startswith("encoders")}, 2) == {
            f"encoders/towers.{encoder}"}
        assert groups_in({n for n in changed if n.startswith("diffusers")}, 1) == {
            f"diffusers/{modality}"}


def test_the_loss_of_a_diffuser_by_hand(monkeypatch):
    """A network that says nothing has the loss of N(0,1); one that knows the noise has none."""
    cfg = config(batch=600, batch_text=600, steps_image=1, steps_text=1)
    for factor, wanted, within in ((0.0, 1.0, 0.02), (1.0, 0.0, 1e-6)):
        run = ToyRun()
        samples = make_samples(run)
        seen = []

        def noted(z, a, eps, seen=seen):
            seen.append((z, a, eps))
            return q_sample(z, a, eps)
        monkeypatch.setattr(medm2g.schedules, "q_sample", noted)
        monkeypatch.setattr(Flows, "predict", lambda self, stream, z_t, t, e, keep, f=factor,
                            seen=seen: f * seen[-1][2] + 0 * next(
                                self.diffusers[modality_of(stream)].parameters()).sum())
        medm2g.train_diffusers(cfg, run, samples, make_encoders(), make_rounds(samples, CHAIN))
        assert [step["loss"] for step in run.logged] == pytest.approx([wanted] * 4, abs=within)
        # Latents are white: over all samples mean 0 and deviation 1.
        for z, a, _ in seen[:2]:
            assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1
            assert a.min() < 0.02 and a.max() > 0.98 and a.shape == (600, 1, 1, 1)


def flowing(**changes):
    """(cfg, run, samples, encoders, flows, rounds) before the stage "flow"."""
    cfg = config(**changes)
    run = ToyRun()
    samples = make_samples(run)
    encoders = make_encoders(rounds=len(cfg.rounds))
    encoders.eval().requires_grad_(False)
    torch.manual_seed(0)
    flows = wake(Flows(cfg, STREAMS, 128, SHAPES)).requires_grad_(False).eval()
    for m, diffuser in flows.diffusers.items():
        diffuser.set_scale(*samples.moments(m))
    run.watched = {"flows": flows, "prompt": encoders}
    return cfg, run, samples, encoders, flows, make_rounds(samples, cfg.rounds)


@pytest.fixture(scope="module")
def flowed():
    """(run, samples) after the stage "flow"."""
    cfg, run, samples, encoders, flows, rounds = flowing()
    medm2g.train_flow(cfg, run, samples, encoders, flows, rounds)
    return run, samples


def test_a_round_of_cross_guidance_trains_what_is_new_to_it(flowed):
    run, _ = flowed
    for r, modalities in enumerate((("text", "xray"), ("ct",), ("mri",))):
        changed = {n for n in run.changed("flow", 3 * r, 3 * r + 3) if not n.startswith("crossing")}
        assert groups_in(changed, 2) == {f"flows/{part}.{m}" for m in modalities
                                         for part in ("crosses", "contexts", "guides")}
        assert not any("pool" in name for name in changed)
        names = {name.split(".", 3)[3] for name in changed if name.startswith("flows/crosses")}
        assert {"to_q.weight", "to_k.weight", "to_v.weight", "out.weight", "out.bias"} <= names
    # Only the two on one grid use distances, and only the last one of them is trained then.
    moved = {name.split(".")[1] for name in run.changed("flow", 0, 9) if "falloff" in name
             and name.startswith("flows")}
    assert moved == {"mri"}


def test_the_checkpoint_of_the_flow_holds_all_that_it_trains(flowed):
    changed = flowed[0].changed("flow", 0, 9)
    ours = {n for n in changed if n.startswith("crossing")}
    theirs = {n for n in changed if n.startswith("flows")}
    assert len(ours) == len(theirs) > 100


def test_guides_start_from_prompts_of_their_own_modality(flowed):
    run, samples = flowed
    first = run.states["flow"][0]
    for m in MODALITIES:
        prompts = torch.cat([samples.vectors[c] for c in samples.of_modality(m)])
        for row in first[f"flows/guides.{m}.vectors"]:
            assert (prompts == row).all(1).any()


def test_no_lcag_skips_the_flow():
    cfg, run, samples, encoders, flows, rounds = flowing(lcag=False)
    skipped = []
    run.skip = skipped.append
    medm2g.train_flow(cfg, run, samples, encoders, flows, rounds)
    assert skipped == ["flow"] and run.logged == []


# ---- the loss of cross-guidance ------------------------------------------------------------------


class Spy:
    """Notes what Flows.show and Flows.predict are asked, and the losses of some steps.

    silent: they answer zeros, where only the questions are looked at.
    """

    def __init__(self, silent=False, **changes):
        self.parts = flowing(**changes)
        flows = self.parts[4]
        self.shown = []                                 # (reader, stream, z, t)
        self.predicted = []                             # (stream, z_t, t, e, keep_prompt, keep)
        show, predict = flows.show, flows.predict

        def showing(reader, stream, z, t, g=None):
            self.shown.append((reader, stream, z, t))
            return None if silent else show(reader, stream, z, t, g)

        def predicting(stream, z_t, t, e, keep_prompt, partners, keep):
            self.predicted.append((stream, z_t, t, e, keep_prompt, keep))
            if silent:
                return torch.zeros_like(z_t)
            return predict(stream, z_t, t, e, keep_prompt, partners, keep)
        flows.show = showing
        flows.predict = predicting

    def __call__(self, step, rows, pair=(2, 1)):
        """The loss and the facts of a batch of CT (A) and T2 (B)."""
        cfg, run, samples, encoders, flows, _ = self.parts
        self.shown.clear()
        self.predicted.clear()
        return medm2g.cross_loss(cfg, run, samples, encoders, flows, pair, rows, step,
                                 alpha_bar_of("scaled"))


ROWS = np.arange(2, 24, 3)                              # these have CT and MR


def step_with(spy, names):
    """The first step in which just these losses are facts, with what was asked in it."""
    for step in range(40):
        loss, facts = spy(step, ROWS)
        if {name for name in facts if name.startswith("loss")} == names:
            return step, loss, facts
    raise AssertionError(f"no step has the losses {names}")


BOTH = {"loss_ct", "loss_t2"}


def is_about(spy, e, c, rows=ROWS):
    """True if e (B, D) are the prompts of stream c, with the little noise of training."""
    _, _, samples, encoders, _, _ = spy.parts
    distance = (e - samples.prompt(encoders, rows, c)).norm(dim=1)
    return bool(0.1 < distance.min() and distance.max() < 0.3)


def test_prompts_are_moved_a_little_in_training():
    """By .2 sideways: the distance of (1, 0) and (1, .2) / length is .1971."""
    assert roughly(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2 ** 0.5]])).tolist() == [
        pytest.approx([1 / 1.04 ** 0.5, 0.2 / 1.04 ** 0.5])]
    for width in (128, 768):
        e = F.normalize(normal(500, width), dim=1)
        moved = roughly(e, normal(500, width, seed=1))
        assert torch.allclose(moved.norm(dim=1), torch.ones(500), atol=1e-5)
        assert abs((moved - e).norm(dim=1).mean() - 0.1971) < 0.01


def test_a_third_of_the_steps_is_joint_and_a_third_has_each_partner_clean():
    spy = Spy(silent=True)
    kinds = [frozenset(spy(step, ROWS[:1])[1]) for step in range(150)]
    shares = {kind: kinds.count(kind) / 150 for kind in set(kinds)}
    assert set(shares) == {frozenset(BOTH), frozenset({"loss_ct"}), frozenset({"loss_t2"})}
    assert all(abs(share - 1 / 3) < 0.12 for share in shares.values())      # 3 deviations


@pytest.mark.parametrize("made, clean", [("ct", "t2"), ("t2", "ct")])
def test_a_clean_partner_has_time_0_and_no_noise_and_gives_the_prompt(made, clean):
    spy = Spy()
    step, loss, facts = step_with(spy, {f"loss_{made}"})
    _, _, samples, encoders, flows, _ = spy.parts
    c = STREAMS.index(clean)
    (reader, stream, z, t), = spy.shown
    assert (reader, stream) == (made, clean) and (t == 0).all()
    white = flows.diffusers[modality_of(clean)].whiten(samples.latent(ROWS, c))
    assert torch.equal(z, white)
    (stream, z_t, t, e, keep_prompt, keep), = spy.predicted
    assert stream == made and t.max() > 0
    assert is_about(spy, e, c) and not is_about(spy, e, STREAMS.index(made))
    assert torch.equal(keep_prompt, keep)
    assert loss.item() == pytest.approx(float(facts[f"loss_{made}"]))
    # What is made is noisy, as Eq. (1) says: (z_t - sqrt(a) z) / sqrt(1 - a) is N(0, 1).
    own = STREAMS.index(made)
    z0 = flows.diffusers[modality_of(made)].whiten(samples.latent(ROWS, own))
    a = alpha_bar_of("scaled")[t].view(-1, 1, 1, 1)
    eps = (z_t - a.sqrt() * z0) / (1 - a).sqrt()
    assert abs(eps.mean()) < 0.1 and abs(eps.std() - 1) < 0.1


def test_in_a_joint_step_both_are_noisy_at_one_time():
    spy = Spy()
    step, loss, facts = step_with(spy, BOTH)
    assert [asked[:2] for asked in spy.shown] == [("ct", "t2"), ("t2", "ct")]
    times = [asked[3] for asked in spy.shown] + [asked[2] for asked in spy.predicted]
    assert all(torch.equal(t, times[0]) for t in times) and times[0].max() > 0
    assert loss.item() == pytest.approx(float(facts["loss_ct"] + facts["loss_t2"]), rel=1e-6)
    # A partner sees just the state that the other's own loss is about.
    states = {asked[0]: asked[1] for asked in spy.predicted}
    for _, stream, z, _ in spy.shown:
        assert torch.equal(states[stream], z)


def test_prompts_and_partners_are_dropped_as_often_as_they_should():
    """Partners in a tenth of the samples; prompts with them, and in half of all joint samples."""
    spy = Spy(silent=True)
    dropped = {"joint": [], "clean": []}
    rows = np.repeat(ROWS, 8)
    for step in range(60):
        _, facts = spy(step, rows)
        joint = set(facts) == BOTH
        for _, _, _, _, keep_prompt, keep in spy.predicted:
            assert not (keep_prompt & ~keep).any()
            dropped["joint" if joint else "clean"].append((keep_prompt.float().mean().item(),
                                                           keep.float().mean().item()))
        if joint:                                       # each is told of the other one
            assert is_about(spy, spy.predicted[0][3], 1, rows)
            assert is_about(spy, spy.predicted[1][3], 2, rows)
    prompts, partners = np.mean(dropped["joint"], axis=0)
    assert abs(prompts - 0.45) < 0.05 and abs(partners - 0.9) < 0.03
    prompts, partners = np.mean(dropped["clean"], axis=0)
    assert prompts == partners and abs(partners - 0.9) < 0.03


def test_couple_t_makes_every_step_joint():
    spy = Spy(silent=True, couple_t=True)
    for step in range(8):
        _, facts = spy(step, ROWS[:2])
        assert set(facts) == BOTH and all((asked[3] > 0).all() for asked in spy.shown)


def test_contrastive_term_of_contexts():
    plain, more = Spy(), Spy(ctx_contrast=0.3)
    step, loss, _ = step_with(plain, BOTH)
    total, facts = more(step, ROWS)
    assert "ctx" in facts and total.item() - loss.item() == pytest.approx(
        0.3 * float(facts["ctx"]), rel=1e-3)
    flows = more.parts[4]
    pooled = [F.normalize(flows.contexts[modality_of(s)](
        z, t, flows.guides[modality_of(s)](), s).mean(1), dim=1)
        for _, s, z, t in (more.shown[-2], more.shown[-1])]
    logits = pooled[0] @ pooled[1].T / 0.07
    own = torch.arange(len(ROWS))
    wanted = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
    assert float(facts["ctx"]) == pytest.approx(wanted.item(), rel=1e-4)


def test_with_a_frozen_text_its_loss_still_teaches_the_context_of_ct():
    """Round text-CT: the loss of the text reaches V_CT and f_CT, and the sub-layers of CT not."""
    spy = Spy()
    _, _, _, _, flows, _ = spy.parts
    rows = np.arange(1, 24, 3)                                              # text and CT
    flows.crossing("ct").requires_grad_(True)
    for step in range(40):
        loss, facts = spy(step, rows, pair=(0, 2))
        if set(facts) == {"loss_text"}:
            break
    loss.backward()
    assert set(facts) == {"loss_text"}
    reached = {name for name, p in flows.named_parameters() if p.grad is not None and p.grad.any()}
    assert groups_in(reached, 2) == {"contexts.ct", "guides.ct"}
