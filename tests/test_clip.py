"""common/clip.py against closed forms, torch's own layers, and retrieval on unseen subjects."""
import contextlib
import hashlib
import io
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common import clip as C
from common import encoder as E
from common.contrastive import contrastive_loss, groups_of, nearest
from common.embeddings import embed
from common.tokenizer import MASK, NONE, NUM, UNK, Tokens

CONTRASTS = ("flair", "t1", "t1ce", "t2")
ECHO_TIMES = (120, 10, 12.5, 90)
LEVELS = np.array([[0.5, 0.9, 0.1, 0.95], [0.7, 0.5, 0.15, 0.3], [0.8, 0.55, 0.2, 0.95], [0.3, 0.5, 0.95, 0.7]])
TEXTS = [f"Modality: {c}; Plane: axial; TE: 90 ms; Slice: 0.42; Lesion: left, 412 mm2" for c in CONTRASTS]


class StandInRun:
    """The part of common.run.Run that training needs.  `kill_at`: the process dies before that step, after a save."""

    device = torch.device("cpu")

    def __init__(self, kill_at=None, saved=None):
        self.kill_at, self.saved, self.said, self.logged, self.rates = kill_at, saved, [], [], []

    def steps(self, stage, total, parts, batch):
        start = 0
        if self.saved:
            start, states = torch.load(io.BytesIO(self.saved), weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(states[name])
        for step in range(start, total):
            if step == self.kill_at:
                return
            yield step
            file = io.BytesIO()
            if step + 1 == self.kill_at:
                torch.save([step + 1, {name: part.state_dict() for name, part in parts.items()}], file)
                self.saved = file.getvalue()

    def order(self, stage, n, batch, step):
        passes = [np.random.default_rng(seed_of(stage, step, i)).permutation(n) for i in range(batch // n + 1)]
        return np.concatenate(passes)[:batch]

    def generator(self, stage, step):
        return torch.Generator().manual_seed(seed_of(stage, step))

    def fetch(self, images, rows):
        return torch.from_numpy(np.asarray(images[rows], dtype=np.float32))

    def autocast(self):
        return contextlib.nullcontext()

    def update(self, loss, optimiser):
        self.optimiser = optimiser
        optimiser.zero_grad()
        loss.backward()
        used = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
        nn.utils.clip_grad_norm_(used, 1.0)
        self.rates.append({group["lr"] for group in optimiser.param_groups})
        optimiser.step()

    def log(self, **numbers):
        self.logged.append({name: float(torch.as_tensor(value).detach()) for name, value in numbers.items()})

    def say(self, text):
        self.said.append(text)


def seed_of(*parts):
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


def slices(n, seed, size=32):
    """(n, 4, size, size): an elliptic head with three blobs, the same anatomy in four contrasts."""
    g = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5
    labels = np.zeros((n, size, size), dtype=np.int64)
    for k in range(n):
        labels[k][(x / g.uniform(.36, .46)) ** 2 + (y / g.uniform(.4, .48)) ** 2 < 1] = 1
        for tissue in (2, 3, 4):
            cx, cy, r = g.uniform(-.22, .22, 2).tolist() + [g.uniform(.06, .14)]
            labels[k][(x - cx) ** 2 + (y - cy) ** 2 < r * r] = tissue
    table = np.concatenate([np.zeros((4, 1)), LEVELS], axis=1)
    images = table[:, labels].transpose(1, 0, 2, 3) * g.uniform(.95, 1.05, (n, 4, 1, 1))
    return np.clip(images + 0.02 * g.standard_normal(images.shape), 0, 1).astype(np.float16)


def captions(n, masked=False):
    """n lists of 4 captions.  masked: every fourth slice hides the contrast's name, every fourth its TE."""
    full = [f"Modality: {c}; Plane: axial; TE: {te} ms" for c, te in zip(CONTRASTS, ECHO_TIMES)]
    nameless = [f"Modality: [MASK]; Plane: axial; TE: {te} ms" for te in ECHO_TIMES]
    timeless = [f"Modality: {c}; Plane: axial; TE: None" for c in CONTRASTS]
    return [{0: nameless, 1: timeless}.get(k % 4, full) if masked else full for k in range(n)]


def subjects(n):
    return [f"s{k // 4:02d}" for k in range(n)]


def train(instance):
    texts = captions(4, masked=True)
    clip = C.build("demo", [t for row in texts for t in row], 32)
    run = StandInRun()
    C.train_clip(run, clip, slices(256, 0), captions(256, masked=True), np.array(subjects(256)), 100, 32, instance=instance)
    return clip, run


@pytest.fixture(scope="module")
def trained():
    return train(instance=0.5)


@pytest.fixture(scope="module")
def fresh():
    return C.build("demo", TEXTS, 32)


# ---- Towers ---------------------------------------------------------------------------------------------------------

def test_block_is_torchs_pre_norm_transformer_layer():
    torch.manual_seed(0)
    block = C.Block(24, 3, 2)
    theirs = nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", batch_first=True, norm_first=True)
    pairs = [(theirs.norm1, block.norm1), (theirs.norm2, block.norm2), (theirs.self_attn.out_proj, block.out),
             (theirs.linear1, block.grow), (theirs.linear2, block.shrink)]
    for module in block.parameters():
        nn.init.normal_(module, std=0.3)                        # biases and norms too, or their places would not matter
    for copy, original in pairs:
        copy.load_state_dict(original.state_dict())
    theirs.self_attn.in_proj_weight.data = block.qkv.weight.data
    theirs.self_attn.in_proj_bias.data = block.qkv.bias.data
    x, mask = torch.randn(2, 7, 24), torch.arange(7)[None] < torch.tensor([[7], [4]])
    ours, expected = block(x, mask[:, None, None]), theirs(x, src_key_padding_mask=~mask)
    assert torch.allclose(ours[mask], expected[mask], atol=1e-5)


def test_initial_weights_have_clips_spread():
    torch.manual_seed(0)
    block = C.Block(256, 8, 6)
    end = (256 * 12) ** -.5
    for layer, std in ((block.qkv, 256 ** -.5), (block.grow, 512 ** -.5), (block.out, end), (block.shrink, end)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02) and not layer.bias.any()


def test_number_features_by_hand():
    features = C.number_features(torch.tensor([[-99.999, 0.0]]))[0]
    sines = [math.sin(2 * math.pi * 2 / p) for p in (8, 4, 2, 1, .5)]
    cosines = [math.cos(2 * math.pi * 2 / p) for p in (8, 4, 2, 1, .5)]
    assert features[0].tolist() == pytest.approx([*sines, *cosines, 0.5, -1, 0], abs=1e-5)
    assert features[1, 10:].tolist() == pytest.approx([-0.75, 0, 1])


@pytest.mark.parametrize("which", ["fresh", pytest.param("trained", marks=pytest.mark.slow)])
def test_near_numbers_have_near_features(request, which):
    clip = request.getfixturevalue(which)
    clip = clip if which == "fresh" else clip[0]
    with torch.no_grad():
        e = clip.encode_text([f"TE: {te} ms" for te in ("90", "91", "100", "90.0")]).pooled
    assert 0 < (e[0] - e[1]).norm() < 0.5 * (e[0] - e[2]).norm()
    assert torch.equal(e[0], e[3])


def test_padding_and_what_it_holds_change_nothing(fresh):
    short, long = "TE: 90 ms", TEXTS[0]
    with torch.no_grad():
        alone, together = fresh.encode_text([short]), fresh.encode_text([short, long])
        tokens = fresh.tokenizer([short, long])
        ids, vals, mask = tokens
        junk = Tokens(np.where(mask, ids, NUM), np.where(mask, vals, np.float32(7)), mask)
        junked = fresh.encode_tokens(junk)
    n = alone.tokens.shape[1]
    assert together.mask[0].sum() == n < together.mask.shape[1]
    assert torch.allclose(alone.pooled[0], together.pooled[0], atol=1e-5)
    assert torch.allclose(alone.tokens[0], together.tokens[0, :n], atol=1e-5)
    assert torch.equal(junked.pooled, together.pooled) and torch.equal(junked.tokens[0, :n], together.tokens[0, :n])


def test_text_tower_sees_order_numbers_and_both_sides(fresh):
    with torch.no_grad():
        e = fresh.encode_text(["t1 t2", "t2 t1", "[mask] t1", "[mask] t2", "[mask] 5", "[mask] 6"])
    assert (e.pooled[0] - e.pooled[1]).norm() > 1e-2
    assert (e.tokens[2, 1] - e.tokens[3, 1]).norm() > 1e-2      # the mask's own feature depends on what follows it
    assert (e.tokens[4, 1] - e.tokens[5, 1]).norm() > 1e-3
    with torch.no_grad():
        repeated = fresh.encode_text(["t2 t1", "t1 t2", "t2 t1"]).pooled
    assert torch.allclose(repeated, e.pooled[[1, 0, 1]], atol=1e-5)


def test_values_count_only_at_number_tokens():
    clip = C.build("demo", TEXTS, 32)
    with torch.no_grad():
        before = clip.encode_text(["t1; t2", "t1; 5"]).pooled
        nn.init.normal_(clip.text.number.weight)
        after = clip.encode_text(["t1; t2", "t1; 5"]).pooled
    assert torch.equal(before[0], after[0]) and (before[1] - after[1]).norm() > 1e-2


def test_image_is_pooled_from_its_cls_token():
    tower = C.ImageEncoder(2, 1, 32, 32, 0, 2, 16)             # without blocks CLS knows nothing of the image
    features = tower(torch.rand(3, 1, 32, 32))
    expected = tower.project(F.layer_norm(tower.cls, (32,)))
    assert torch.allclose(features.pooled, expected.expand(3, 16), atol=1e-6)
    assert (features.tokens[0, 1:] - features.tokens[1, 1:]).norm() > 1


@pytest.mark.parametrize("dims, in_ch, tokens", [(2, 1, 17), (2, 8, 17), (3, 1, 65)])
def test_images_do_not_see_each_other_even_in_train_mode(dims, in_ch, tokens):
    torch.manual_seed(0)
    tower = C.ImageEncoder(dims, in_ch, 32, 32, 1, 2, 16).train()
    x = torch.rand(5, in_ch, *[32] * dims)
    features, order = tower(x), torch.tensor([3, 0, 4, 1, 2])
    assert features.tokens.shape == (5, tokens, 32) and features.pooled.shape == (5, 16)
    assert torch.allclose(tower(x[order]).pooled, features.pooled[order], atol=1e-5)
    assert torch.allclose(tower(x[:1]).pooled, features.pooled[:1], atol=1e-5)
    assert (features.pooled[0] - features.pooled[1]).norm() > 1e-3


def test_image_tower_centres_its_input_and_interpolates_positions():
    torch.manual_seed(0)
    small, wide = C.ImageEncoder(2, 1, 32, 32, 1, 2, 16), C.ImageEncoder(2, 1, 64, 32, 1, 2, 16)
    nn.init.normal_(small.positions)
    state = small.state_dict()
    state["positions"] = F.interpolate(small.positions.detach(), size=(8, 8), mode="bilinear")
    wide.load_state_dict(state)
    x, seen = torch.rand(2, 1, 64, 64), []
    assert torch.equal(small(x).pooled, wide(x).pooled)
    assert (small(x).pooled - small(x.flip(3)).pooled).norm() > 1e-2
    assert small(torch.rand(2, 1, 33, 48)).tokens.shape == (2, 1 + 5 * 6, 32)
    small.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    small(torch.tensor([0.0, 0.25, 1.0]).view(3, 1, 1, 1).expand(3, 1, 32, 32))
    assert seen[0][:, 0, 0, 0].tolist() == [-1, -0.5, 1]


@pytest.mark.parametrize("size, image, text_millions, image_millions",
                         [("demo", 64, 0.35, 0.30), ("base", 224, 6.0, 12.0)])
def test_sizes_are_those_of_the_table(size, image, text_millions, image_millions):
    sizes = C.SIZES[size]
    text = C.TextEncoder(**sizes["text"], embed=sizes["embed"])
    tower = C.ImageEncoder(2, 1, image, **sizes["image"], embed=sizes["embed"])
    W, D, depth = sizes["text"]["width"], sizes["embed"], sizes["text"]["depth"]
    by_hand = (sizes["text"]["vocab"] + sizes["text"]["context"] + 13 + D + 2) * W + depth * (12 * W * W + 13 * W)
    assert sum(p.numel() for p in text.parameters()) == by_hand == pytest.approx(text_millions * 1e6, rel=0.03)
    assert sum(p.numel() for p in tower.parameters()) == pytest.approx(image_millions * 1e6, rel=0.03)


# ---- Objective ------------------------------------------------------------------------------------------------------

def test_loss_of_known_features_by_hand():
    clip = C.build("demo", TEXTS, 32).freeze()
    texts, v = ["a", "b", "c"], torch.tensor([[3.0, 0], [0, 0.5], [2, 2]])
    for text, pooled in zip(texts, v):
        clip.memo[text] = [torch.zeros(1, 1), torch.ones(1, dtype=torch.bool), pooled]
    u = torch.tensor([[2.0, 0.2], [1, 1], [1, 1.1]])            # image 1 is nearest to text 2, text 1 and 2 miss theirs
    logits = F.normalize(u, dim=1) @ F.normalize(v, dim=1).T / 0.07
    expected = (F.cross_entropy(logits, torch.arange(3)) + F.cross_entropy(logits.T, torch.arange(3))) / 2
    loss, facts = clip.loss(u, texts)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert facts["excess"].item() == pytest.approx(loss.item())
    assert facts["scale"].item() == pytest.approx(14.286, abs=1e-3)
    assert facts["r1_i2t"].item() == pytest.approx(2 / 3) and facts["r1_t2i"].item() == pytest.approx(1 / 3)
    same = torch.tensor([0, 1, 1])
    assert clip.loss(u, texts, same)[0].item() == pytest.approx(contrastive_loss(logits, same).item(), rel=1e-5)
    repeated, facts = clip.loss(u, ["a", "c", "c"])             # equal texts are one group by default
    assert repeated.item() == pytest.approx(contrastive_loss(logits[:, [0, 2, 2]], same).item(), rel=1e-5)
    assert facts["r1_i2t"].item() == 1


def test_scale_stays_below_100_and_comes_back():
    clip = C.build("demo", TEXTS, 32)
    optimiser = torch.optim.SGD([clip.logit_scale], lr=0.05)
    assert clip.scale().item() == pytest.approx(14.286, abs=1e-3)
    for direction, steps in ((-1, 1000), (1, 20)):
        for _ in range(steps):
            optimiser.zero_grad()
            (direction * clip.scale().log()).backward()
            assert clip.logit_scale.grad.abs() == pytest.approx(1, rel=1e-5)
            optimiser.step()
            assert clip.scale().item() <= 100.001
            clip.clamp_scale()
        if direction < 0:
            assert clip.scale().item() == pytest.approx(100, rel=1e-5)
    assert clip.scale().item() == pytest.approx(100 * math.exp(-1), rel=1e-3)


def test_loss_starts_near_chance_and_reaches_every_parameter(fresh):
    clip = C.build("demo", TEXTS, 32)
    texts = [f"Modality: {c}; TE: {te} ms" for c in CONTRASTS for te in (5, 20, 80, 300)]
    x = torch.from_numpy(slices(4, 5).astype(np.float32)).flatten(0, 1)[:, None]
    loss, _ = clip.loss(clip.encode_image(x).pooled, texts)
    assert math.log(16) - 0.1 < loss.item() < math.log(16) + 1.5
    loss.backward()
    idle = [name for name, p in clip.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


# ---- Freezing, remembering, saving ----------------------------------------------------------------------------------

def test_frozen_means_frozen():
    clip = C.build("demo", TEXTS, 32)
    parent = nn.ModuleDict({"clip": clip, "head": nn.Linear(128, 1)})
    x = torch.rand(2, 1, 32, 32)
    assert clip.freeze() is clip and not any(p.requires_grad for p in clip.parameters())
    parent.train()
    assert parent["head"].training and not any(module.training for module in clip.modules())
    before = clip.encode_image(x).pooled, clip.encode_tokens(clip.tokenizer(TEXTS)).pooled
    optimiser = torch.optim.AdamW(parent.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(10):
        features = clip.encode_image(x.requires_grad_(True)).pooled
        assert not features.requires_grad
        parent["head"](features + clip.encode_text(TEXTS[:2]).pooled).sum().backward()
        optimiser.step()
    after = clip.encode_image(x).pooled, clip.encode_tokens(clip.tokenizer(TEXTS)).pooled
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_memo_equals_recomputation_and_ends_with_the_weights():
    clip = C.build("demo", TEXTS, 32)
    texts = [TEXTS[0], "TE: 90 ms", TEXTS[0], TEXTS[1]]
    with torch.no_grad():
        expected = clip.encode_text(texts)
    first, again = clip.freeze().encode_text(texts), clip.encode_text(texts)
    assert set(clip.memo) == set(texts) and torch.equal(first.pooled, again.pooled)
    assert torch.equal(first.mask, expected.mask)
    assert torch.allclose(first.pooled, expected.pooled, atol=1e-5)
    assert torch.allclose(first.tokens[first.mask], expected.tokens[first.mask], atol=1e-5)
    # the bits of a text do not depend on the batch in which it came first
    other = C.build("demo", TEXTS, 32).freeze()
    assert torch.equal(other.encode_text(["TE: 90 ms"]).pooled[0], first.pooled[1])
    third = C.build("demo", TEXTS, 32).freeze()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(third.encode_text(texts).pooled, first.pooled)
    state = {name: value + 0.1 for name, value in clip.state_dict().items()}
    clip.load_state_dict(state)
    assert not torch.allclose(clip.encode_text(texts).pooled, first.pooled, atol=1e-2)


@pytest.mark.slow
def test_saved_and_loaded_in_another_process(trained, tmp_path):
    clip, _ = trained
    x, texts = torch.rand(2, 1, 32, 32), ["Modality: t1; TE: 17 ms", "unseen words: None"]
    with torch.no_grad():
        torch.save({"clip": clip.state(), "x": x, "image": clip.encode_image(x).pooled,
                    "text": clip.encode_text(texts).pooled}, tmp_path / "clip.pt")
    program = f"""
import torch
from common.clip import CLIP
saved = torch.load({str(tmp_path / "clip.pt")!r}, weights_only=True)
clip = CLIP.from_state(saved["clip"])
with torch.no_grad():
    assert torch.equal(clip.encode_image(saved["x"]).pooled, saved["image"])
    assert torch.equal(clip.encode_text({texts!r}).pooled, saved["text"])
print(*clip.subjects)
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(set(subjects(256)))


def test_a_tampered_vocabulary_is_refused(trained):
    clip, _ = trained
    state = clip.state()
    weight = state["weights"]["logit_scale"]
    weight += 1                                                 # a copy, not the weights themselves
    assert clip.logit_scale.item() < weight.item()
    merges = state["tokenizer"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]
    with pytest.raises(ValueError, match="vocabulary"):
        C.CLIP.from_state(state)


def test_fresh_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    a, drawn = C.build("demo", TEXTS, 32), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)                    # the caller's own random numbers are not touched
    b, other = C.build("demo", TEXTS, 32), C.build("demo", TEXTS, 32, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.image.cls, other.image.cls)
    assert a.text.embedding.num_embeddings == len(a.tokenizer) < 1024


def test_table_of_a_frozen_tower_encodes_each_prompt_once():
    clip, calls = C.build("demo", TEXTS, 32), []
    with pytest.raises(ValueError, match="freeze"):
        clip.remember(TEXTS)
    clip.freeze().text.register_forward_hook(lambda module, args, out: calls.append(len(out.pooled)))
    prompts = ["t1", TEXTS[0], "t1", "Modality: [MASK]"]
    table = clip.remember(prompts)
    assert calls == [1, 1, 1] and set(table) == set(prompts)
    clip.encode_text(prompts)
    expected = clip.encode_tokens(clip.tokenizer(prompts))
    clip.freeze()                                               # forgets its own, not the caller's
    e = embed(table, prompts)
    assert calls == [1, 1, 1, 4] and torch.equal(e.mask, expected.mask)
    assert torch.allclose(e.tokens[e.mask], expected.tokens[e.mask], atol=1e-5) and not e.tokens[~e.mask].any()
    p = expected.pooled.numpy()
    by_hand = (p - p.mean(1, keepdims=True)) / np.sqrt(p.var(1, keepdims=True) + 1e-5)
    assert np.allclose(e.pooled, by_hand, atol=1e-4) and not e.pooled.requires_grad


# ---- Training -------------------------------------------------------------------------------------------------------

def test_rate_warms_up_for_a_tenth_then_falls_to_zero():
    rates = [C.warmup_cosine(step, 110, 2.0) for step in range(110)]
    assert rates[0] == pytest.approx(2 / 11) and rates[10] == rates[11] == 2
    assert rates[11 + 33] == pytest.approx(1 + math.cos(math.pi / 3)) and 0 < rates[-1] < 0.002
    assert C.warmup_cosine(0, 1, 2.0) == 2


def test_decay_spares_all_but_matrices(fresh):
    decayed, free = ({id(p) for p in group["params"]} for group in C.parameter_groups(fresh))
    names = {name for name, p in fresh.named_parameters() if id(p) in decayed}
    assert len(decayed) + len(free) == len(list(fresh.parameters())) and not decayed & free
    assert [group["weight_decay"] for group in C.parameter_groups(fresh)] == [0.1, 0.0]
    blocks = {f"{tower}.blocks.{i}.{layer}.weight" for tower in ("text", "image") for i in (0, 1)
              for layer in ("qkv", "out", "grow", "shrink")}
    stem = {f"image.stem.{i}.weight" for i in (0, 3, 6)}
    assert names == blocks | stem | {"text.number.weight", "text.project.weight", "image.project.weight"}


def test_two_contrasts_are_different_and_uniform():
    a, b = C.two_contrasts(4, 12000, torch.Generator().manual_seed(0))
    counts = torch.bincount(4 * a + b, minlength=16).view(4, 4)
    assert not counts.diagonal().any()
    assert (counts + 1000 * torch.eye(4) - 1000).abs().max() < 130       # standard deviation 30


def test_training_pairs_images_with_their_own_captions(monkeypatch):
    n = 8
    values = np.arange(n * 4, dtype=np.float32).reshape(n, 4) / 100
    images = np.broadcast_to(values[:, :, None, None], (n, 4, 16, 16))
    texts = [[f"row {k} contrast {c}" for c in range(4)] for k in range(n)]
    indices = {text: i for i, text in enumerate(text for row in texts for text in row)}
    clip, seen = C.build("demo", [t for row in texts for t in row], 16), []
    encode, loss = clip.encode_image, clip.loss
    clip.encode_image = lambda x: seen.append((100 * x[:, 0, 0, 0]).round().int().tolist()) or encode(x)
    clip.loss = lambda pooled, texts, groups: seen.append([indices[text] for text in texts]) or loss(pooled, texts, groups)
    instance = C.instance_loss
    monkeypatch.setattr(C, "instance_loss", lambda a, b, s, rows: seen.append(rows.tolist()) or instance(a, b, s, rows))
    run = StandInRun()
    C.train_clip(run, clip, images, texts, subjects(n), 6, batch=n, lr=2e-3)
    for step in range(6):
        first, named, second, rows = seen[4 * step:4 * step + 4]
        assert first == named and sorted(i // 4 for i in first) == list(range(n))
        assert rows == [i // 4 for i in second] == [i // 4 for i in first] and all(i != j for i, j in zip(first, second))
        facts = run.logged[step]
        assert facts["loss"] == pytest.approx(facts["excess"] + 0.5 * facts["instance"], rel=1e-5)
    assert [rate for rates in run.rates for rate in rates] == [C.warmup_cosine(step, 6, 2e-3) for step in range(6)]
    assert (run.optimiser.defaults["betas"], run.optimiser.defaults["eps"]) == ((0.9, 0.98), 1e-6)
    assert clip.subjects == ["s00", "s01"]


def test_hidden_values_are_known_ones_drawn_evenly():
    texts = ["Age: 35; Sex: None; Note: a: b, c; TE: 90 ms", "no field", "Age: None; TE: [MASK]"] * 8000
    hidden = C.hide_values(texts, 0.6, torch.Generator().manual_seed(0))
    assert hidden == C.hide_values(texts, 0.6, torch.Generator().manual_seed(0))
    assert hidden[1::3] == texts[1::3] and hidden[2::3] == texts[2::3]
    expected = {new: 8000 * 0.6 / 6 for word in ("[MASK]", "None") for new in (
        f"Age: {word}; Sex: None; Note: a: b, c; TE: 90 ms", f"Age: 35; Sex: None; Note: {word}; TE: 90 ms",
        f"Age: 35; Sex: None; Note: a: b, c; TE: {word}")} | {texts[0]: 8000 * 0.4}
    counts = Counter(hidden[::3])
    assert set(counts) == set(expected)
    assert all(abs(counts[text] - n) < 4.5 * math.sqrt(n * (1 - n / 8000)) for text, n in expected.items())
    assert C.hide_values(texts[:1], 1.0, torch.Generator()) != texts[:1] and C.hide_values(texts, 0, torch.Generator()) == texts


def test_hiding_changes_texts_but_neither_images_nor_positives():
    texts, seen = [[f"Age: 35; Modality: {c}" for c in CONTRASTS]] * 12, {}
    for share in (0.0, 0.2):
        clip, log = C.build("demo", texts[0], 16), seen.setdefault(share, [])
        encode, loss = clip.encode_image, clip.loss
        clip.encode_image = lambda x, encode=encode, log=log: log.append(x) or encode(x)
        clip.loss = lambda z, t, g, loss=loss, log=log: log.append((t, g)) or loss(z, t, g)
        C.train_clip(StandInRun(), clip, slices(12, 1, size=16), texts, subjects(12), 3, 12, instance=0, field_dropout=share)
    changed = []
    for full, some in zip(seen[0.0][1::2], seen[0.2][1::2]):
        assert torch.equal(full[1], some[1]) and full[1].tolist() == groups_of(full[0]).tolist()
        changed.append([a != b for a, b in zip(full[0], some[0])])
        assert all(("None" in b or "[MASK]" in b) == c for b, c in zip(some[0], changed[-1]))
    assert all(torch.equal(a, b) for a, b in zip(seen[0.0][::2], seen[0.2][::2]))
    assert changed[0] != changed[1] and 0 < np.sum(changed) < 18           # drawn anew at each step; 7 of 36 expected


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_killed_and_resumed_equals_undisturbed(share):
    def clip_after(*kills):
        saved = None
        for kill in (*kills, None):
            clip, run = C.build("demo", TEXTS, 32), StandInRun(kill, saved)
            C.train_clip(run, clip, slices(12, 1), captions(12), subjects(12), 6, batch=8, field_dropout=share)
            saved = run.saved
        return clip.state_dict()
    straight, disturbed = clip_after(), clip_after(2, 5)
    assert all(torch.equal(straight[name], disturbed[name]) for name in straight)


def test_training_keeps_the_scale_in_range():
    clip = C.build("demo", TEXTS, 32)
    clip.logit_scale.data.fill_(10.0)
    C.train_clip(StandInRun(), clip, slices(4, 1), captions(4), subjects(4), 1, batch=4)
    assert clip.logit_scale.item() == pytest.approx(math.log(100), rel=1e-6)


def test_captions_that_teach_nothing_are_noticed(trained):
    clip, images = C.build("demo", TEXTS, 16), slices(8, 1, size=16)
    for steps, warnings in ((20, 0), (52, 1)):                  # a short run is never said to be stuck
        run = StandInRun()
        C.train_clip(run, clip, images, [["same"] * 4] * 8, subjects(8), steps, batch=8, instance=0)
        assert len(run.said) == warnings
    assert "no better than chance" in run.said[0]
    assert len(trained[1].logged) == 100 and trained[1].said == []


def test_training_input_that_does_not_fit_is_refused():
    clip, run = C.build("demo", TEXTS, 32), StandInRun()
    three = [row[:3] for row in captions(4)]
    for bad in ((captions(3), subjects(4)), (captions(4), subjects(5)), (three, subjects(4))):
        with pytest.raises(ValueError, match="4 lists of 4 captions"):
            C.train_clip(run, clip, slices(4, 1), *bad, 1, batch=4)
    one = slices(4, 1)[:, :1], [["t1"]] * 4, subjects(4)
    with pytest.raises(ValueError, match="instance=0"):
        C.train_clip(run, clip, *one, 1, batch=4)
    C.train_clip(run, clip, *one, 1, batch=4, instance=0)
    assert "slice_to_slice" not in E.measure(clip, *one[:2])


# ---- What it learns -------------------------------------------------------------------------------------------------

def test_contrast_is_recognised_on_unseen_subjects(trained):
    found = E.measure(trained[0], slices(16, 99), captions(16))
    assert found["image_to_text"] >= 0.9 and found["image_to_text_chance"] == 0.25


@pytest.mark.slow
def test_anatomy_is_kept_only_because_of_the_instance_term(trained):
    towers = trained[0], train(instance=0.0)[0], C.build("demo", TEXTS, 32)
    with_term, without, untrained = (E.measure(clip, slices(16, 99), captions(16))["slice_to_slice"] for clip in towers)
    assert with_term >= 0.9                                     # chance is 1/16
    assert without < untrained - 0.2 < with_term - 0.4          # training without it discards what chance gave


def test_mask_and_none_are_learned_words(trained):
    clip, _ = trained
    start = C.build("demo", [t for row in captions(4, masked=True) for t in row], 32)
    moved = (clip.text.embedding.weight - start.text.embedding.weight).norm(dim=1)
    assert moved[MASK] > 0.01 and moved[NONE] > 0.01 and moved[UNK] == 0
    with torch.no_grad():
        texts = captions(1)[0][1], captions(1, masked=True)[0][1], captions(2, masked=True)[1][1]
        e = F.normalize(clip.encode_text(texts).pooled, dim=1)
    assert e[0] @ e[1] < 0.999 and e[0] @ e[2] < 0.999


def test_encoding_in_batches_equals_encoding_at_once(fresh):
    images = slices(5, 2)
    at_once = fresh.encode_image(torch.from_numpy(images.astype(np.float32)).view(20, 1, 32, 32)).pooled.view(5, 4, 128)
    assert torch.allclose(E.encode_all(fresh, images, batch=2), at_once, atol=1e-5)


def test_report_counts_hits_of_known_features():
    directions = {"t1": torch.tensor([1.0, 0, 0]), "t2": torch.tensor([0, 1.0, 0]), "odd": torch.tensor([-1.0, -1, 0])}

    class Known:
        logit_scale, tokenizer = torch.zeros(()), staticmethod(lambda texts: texts)

        def encode_image(self, x):
            """Pixel 0 says along which axis the feature points, pixel 1 how far it leans to the third."""
            contrast, lean = x[:, 0, 0, 0], x[:, 0, 0, 1]
            return C.Features(None, None, torch.stack([1 - contrast, contrast, lean], dim=1))

        def encode_tokens(self, texts):
            return C.Features(None, None, torch.stack([directions[text] for text in texts]))

    images = np.zeros((4, 2, 1, 2), dtype=np.float16)
    images[:, 1, :, 0] = 1
    images[:, :, 0, 1] = np.array([[-5, -1], [3, 4], [1, 2], [2, -3]])
    texts = [["t1", "t2"], ["t1", "t2"], ["t1", "odd"], ["t2", "t2"]]
    found = E.measure(Known(), images, texts)
    assert found["image_to_text"] == pytest.approx(6 / 8) and found["image_to_text_chance"] == pytest.approx(1 / 3)
    # by the lean, contrast 0 takes 3 1 1 1 for 0 1 2 3 (one right), contrast 1 takes 0 1 1 0 (two right)
    assert found["slice_to_slice"] == pytest.approx((1 / 4 + 2 / 4) / 2) and found["slice_to_slice_chance"] == 0.25
    assert E.encode_all(Known(), images)[3].tolist() == [[1, 0, 2], [0, 1, -3]]


def test_hidden_values_are_read_from_the_rest():
    """The name is hidden, TE still tells the contrast.  Without field_dropout 0.5 to 0.9 of the images are found."""
    full = [f"Age: 35; Modality: {c}; TE: {te} ms" for c, te in zip(CONTRASTS, ECHO_TIMES)]
    clip, run = C.build("demo", full, 16), StandInRun()
    C.train_clip(run, clip, slices(128, 0, size=16), [full] * 128, subjects(128), 60, 32, instance=0, field_dropout=0.3)
    z, own = E.encode_all(clip.freeze(), slices(16, 99, size=16)).flatten(0, 1), torch.arange(4).repeat(16)
    for word in ("[MASK]", "None"):
        texts = [text.replace(f"Modality: {c}", f"Modality: {word}") for text, c in zip(full, CONTRASTS)]
        assert (nearest(z, clip.encode_text(texts).pooled) == own).float().mean() > 0.9
    assert np.mean([facts["excess"] for facts in run.logged[-20:]]) < 0.3      # no false negatives: hidden or not, one caption
