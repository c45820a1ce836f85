"""Samples of several modalities in pairs: which rows, which latents, whose turn, and what trains and what is frozen."""
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_run
import torch
from torch import nn
from toys import flat

from common import rounds
from common.codecs import Codecs
from common.files import RunError
from common.rounds import Phases, Samples
from common.vqae import VQAE
from data import TEXT, Dataset

STREAMS = ("text", "xray", "ct", "t1", "t2")
#                    text xray ct t1 t2
PRESENT = np.array([[1, 1, 0, 0, 0],
                    [1, 0, 1, 0, 0],
                    [0, 0, 1, 1, 1],
                    [1, 1, 1, 0, 0],
                    [0, 0, 1, 0, 1],
                    [0, 1, 0, 0, 0],
                    [1, 0, 1, 1, 0]], bool)


def dataset(present, streams, images=None, reports=None, split=None, folder=Path("data"), phantom=False):
    """A Dataset of one slice per subject, s0, s1, ...  By default image c of row r is grey: (10 r + c) / 128."""
    n, C = np.shape(present)
    if images is None:
        grey = (10 * np.arange(n)[:, None] + np.arange(C)) % 128 / 128
        images = np.broadcast_to(grey[:, :, None, None], (n, C, 2, 2)).astype(np.float16)
    subjects = []
    for r in range(n):
        files = {stream: "a file" for stream, there in zip(streams, present[r]) if there}
        subjects.append(SimpleNamespace(name=f"s{r}", files=files, report=reports[r] if reports else f"report {r}."))
    names = np.array([subject.name for subject in subjects])
    split = split or {"train": names.tolist(), "val": [], "test": []}
    return Dataset(folder=folder, layout="test", contrasts=tuple(streams), size=images.shape[2], phantom=phantom, fingerprint="print",
                   subjects=subjects, incomplete=[], split=split, images=images, subject=names, slice_number=np.arange(n),
                   position=np.zeros(n), brain=np.zeros(n), lesion=[None] * n, labels=None, scales={})


class Numbers(nn.Module):
    """A text VAE that writes the numbers in a report into its latent."""
    z = 3

    def to_latent(self, texts):
        found = [[float(word) for word in text.split() if word.isdigit()] for text in texts]
        return torch.tensor(found).expand(-1, 3)


def begin(folder):
    run = test_run.start(folder)
    run.args.cache = folder / "cache"
    return run


def same(a, b):
    a, b = flat(a), flat(b)
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b))


def samples_of(folder, ds=None, part="train", **changes):
    """Samples whose image latents are the images themselves, in [-1,1]."""
    ds = ds or dataset(PRESENT, STREAMS)
    run = begin(folder)
    run.close()
    return Samples(run, ds, part, Codecs(VQAE(4, (1,), 1, 0, 2, bottleneck="none"), Numbers(), 2), **changes)


# ---- Streams, modalities, rounds -----------------------------------------------------------------


def test_modality_of_streams():
    assert [rounds.modality_of(stream) for stream in ("text", "xray", "ct", "t1", "flair", "pd")] == [
        "text", "xray", "ct", "mri", "mri", "mri"]
    assert rounds.there(("t2", "xray", "t1", "text")) == ["text", "xray", "mri"]
    with pytest.raises(RunError, match="pet: this method knows text, X-ray, CT and MR; leave it out with --contrasts"):
        rounds.modality_of("pet")


def test_pairs_hold_the_rows_that_have_both():
    def pairs(name):
        return {pair: rows.tolist() for pair, rows in rounds.pairs_of(name, STREAMS, PRESENT).items()}
    assert pairs("text-xray") == {(0, 1): [0, 3]} and pairs("xray-text") == {(1, 0): [0, 3]}
    assert pairs("text-ct") == {(0, 2): [1, 3, 6]}
    assert pairs("ct-mri") == {(2, 3): [2, 6], (2, 4): [2, 4]}
    assert pairs("mri-mri") == {(3, 4): [2], (4, 3): [2]}
    assert pairs("xray-mri") == {} and pairs("ct-ct") == {}


def test_rounds_without_a_pair_are_refused():
    found = rounds.checked_rounds(("text-xray", "text-ct", "ct-mri"), STREAMS, PRESENT)
    assert [list(pairs) for pairs in found] == [[(0, 1)], [(0, 2)], [(2, 3), (2, 4)]]
    with pytest.raises(RunError, match="xray is in none of the rounds text-ct, ct-mri and would not be trained"):
        rounds.checked_rounds(("text-ct", "ct-mri"), STREAMS, PRESENT)
    with pytest.raises(RunError, match="--rounds xray-mri: no training subject has such a pair; these data give text-xray, ") as error:
        rounds.checked_rounds(("text-ct", "xray-mri"), STREAMS, PRESENT)
    possible = str(error.value).split("these data give ")[1].split(", ")
    assert set(possible) >= {"text-xray", "text-ct", "text-mri", "xray-ct", "ct-mri", "mri-mri"}
    assert not {"xray-mri", "text-text"} & set(possible) and error.value.status == 2
    with pytest.raises(RunError, match="these data give no pair at all"):
        rounds.checked_rounds(("text-ct",), STREAMS, np.eye(5, dtype=bool))


@pytest.mark.parametrize("streams, names, expected", [
    (("text", "xray", "ct", "t2"), ("text-xray", "text-ct", "ct-mri"),
     ["text->xray", "text->ct", "ct->t2", "t2->ct", "text->t2"]),
    (("t1", "t2", "pd"), ("mri-mri",), ["t2+pd->t1", "t1+pd->t2", "t1+t2->pd"]),
    (("text", "t1", "t2"), ("text-mri",), ["text->t1", "text->t2", "text->t1+t2"]),
    (("ct", "t1", "t2"), ("ct-mri",), ["ct->t1", "ct->t2", "t1+t2->ct"]),
    (("text", "xray"), ("xray-text",), ["text->xray"]),
    (("text", "t2"), ("text-mri",), ["text->t2"])],
    ids=["four", "contrasts", "report", "ct", "turned", "once"])
def test_usual_tasks(streams, names, expected):
    found = ["+".join(known) + "->" + "+".join(made) for known, made in rounds.usual_tasks(names, streams)]
    assert sorted(found) == sorted(expected)


# ---- Samples -------------------------------------------------------------------------------------


def test_latents_are_those_of_the_row_though_others_lack_the_stream(tmp_path):
    samples = samples_of(tmp_path)
    assert samples.latent(np.array([6, 0, 3]), 0).tolist() == [[6] * 3, [0] * 3, [3] * 3]
    for c in (1, 2, 3, 4):
        rows = np.flatnonzero(PRESENT[:, c])[::-1].copy()
        z = samples.latent(rows, c)
        assert z.shape == (len(rows), 1, 2, 2)
        assert z[:, 0, 1, 1].tolist() == pytest.approx([2 * (10 * r + c) / 128 - 1 for r in rows])
    assert samples.raw(np.array([3, 1]), 0) == [samples.reports[3], samples.reports[1]]
    assert samples.raw(np.array([2, 4]), 2)[:, 0, 0, 0].tolist() == [22 / 128, 42 / 128]


def test_samples_of_a_part_count_their_own_rows(tmp_path):
    split = {"train": ["s0", "s1", "s2"], "val": ["s3", "s4", "s6"], "test": []}
    ds = dataset(PRESENT, STREAMS, split=split)
    train = samples_of(tmp_path / "a", ds)
    val = samples_of(tmp_path / "a", ds, "val")                             # shares the cache
    assert train.latent(np.array([1, 2]), 2)[:, 0, 0, 0].tolist() == [2 * 12 / 128 - 1, 2 * 22 / 128 - 1]
    assert val.latent(np.array([2, 0]), 2)[:, 0, 0, 0].tolist() == [2 * 62 / 128 - 1, 2 * 32 / 128 - 1]
    assert val.latent(np.array([2, 0]), 0)[:, 0].tolist() == [6, 3] and 1 in val.latents and 4 in val.latents
    assert 3 in val.latents and val.of_modality("mri") == [3, 4] and train.of_modality("text") == [0]


def test_a_stream_without_samples_has_no_latents(tmp_path):
    present = PRESENT.copy()
    present[:, 3] = False
    samples = samples_of(tmp_path, dataset(present, STREAMS))
    assert sorted(samples.latents) == [0, 1, 2, 4] and samples.of_modality("mri") == [4] and samples.of_modality("ct") == [2]


def test_changed_images_are_encoded_and_kept_apart(tmp_path):
    plain = samples_of(tmp_path)
    changed = samples_of(tmp_path, change=lambda stream, x: x / 2, tag="half")
    rows = np.array([2, 4])
    assert changed.pictures(rows, 2)[:, 0, 0, 0].tolist() == [11 / 128, 21 / 128]
    assert changed.latent(rows, 2)[:, 0, 0, 0].tolist() == pytest.approx([22 / 128 - 1, 42 / 128 - 1], abs=1e-3)
    assert plain.latent(rows, 2)[:, 0, 0, 0].tolist() == pytest.approx([44 / 128 - 1, 84 / 128 - 1], abs=1e-3)


def test_prompts_are_computed_once_for_all_rows_with_the_stream(tmp_path):
    present = np.ones((130, 2), bool)
    present[::3, 1] = False
    samples = samples_of(tmp_path, dataset(present, ("text", "ct")))
    asked = []

    class Encoders:
        def prompt(self, modality, x):
            asked.append((modality, len(x)))
            value = x[:, 0, 0, 0] if modality == "ct" else torch.tensor([float(text.split()[1]) for text in x])
            return torch.stack([value, -value], dim=1)
    rows = np.array([128, 1, 70])
    found = samples.prompt(Encoders(), rows, 1)
    assert found[:, 0].tolist() == [(10 * r + 1) % 128 / 128 for r in rows] and torch.equal(found[:, 1], -found[:, 0])
    assert samples.prompt(Encoders(), rows, 0)[:, 0].tolist() == [128, 1, 70]
    samples.prompt(Encoders(), np.array([2]), 1)
    assert asked[:2] == [("ct", 43), ("ct", 43)] and [name for name, _ in asked[2:]] == ["text"] * 3      # at most 64 at once


def test_moments_by_hand(tmp_path):
    samples = samples_of(tmp_path)
    z = [2 * v / 128 - 1 for v in (23, 63, 24, 44)]                         # t1 of rows 2 and 6, t2 of rows 2 and 4
    mean, deviation = samples.moments("mri")
    assert mean.shape == deviation.shape == (1,)
    assert mean.item() == pytest.approx(np.mean(z)) and deviation.item() == pytest.approx(np.std(z))
    mean, deviation = samples.moments("text")
    assert mean.tolist() == [0] * 3 and deviation.tolist() == [1] * 3       # the text codec has standardised them


def test_moments_are_per_channel_and_of_samples_from_all_subjects(tmp_path):
    samples = samples_of(tmp_path)
    samples.present = np.ones((4096, 5), bool)
    samples.place = samples.present.cumsum(0) - 1
    z = np.zeros((4096, 2, 1, 2), np.float16)
    z[:2048, 0] = 1                                                         # slices of one subject, and then of another
    z[2048:, 0] = 3
    z[:, 1] = 7
    samples.latents = {2: z}
    asked = []
    latent = samples.latent
    samples.latent = lambda rows, c: asked.append(len(rows)) or latent(rows, c)
    mean, deviation = samples.moments("ct")
    assert mean.tolist() == [2, 7] and deviation.tolist() == pytest.approx([1, 1e-6]) and asked == [1024]


# ---- Batches and random numbers ------------------------------------------------------------------


def test_pairs_take_turns_and_every_row_comes_once_a_pass(tmp_path):
    run = begin(tmp_path)
    pairs = {(2, 3): np.array([5, 7, 9, 11]), (2, 4): np.array([1, 2, 3, 4, 6, 8])}
    found = {(2, 3): [], (2, 4): []}
    for step in range(12):
        pair, rows = rounds.batch_of(run, "flow", pairs, 2, step)
        assert pair == [(2, 3), (2, 4)][step % 2]
        found[pair] += rows.tolist()
    for pair, rows in pairs.items():
        n = len(rows)
        for start in range(0, 12, n):
            assert sorted(found[pair][start:start + n]) == rows.tolist()
    assert found[2, 3][:4] != found[2, 3][4:8]
    other = [rounds.batch_of(run, "ldm", pairs, 2, step)[1].tolist() for step in range(1, 12, 2)]
    assert sum(other, []) != found[2, 4]


def test_draws_of_two_processes_are_those_of_one():
    def numbers(mine):
        draw = rounds.draws(torch.Generator().manual_seed(0), 8, "cpu", mine)
        like = torch.zeros(len(range(*mine.indices(8))), 3, 2)
        return [draw("time"), draw("normal", like), draw("uniform"), draw("normal", like)]
    whole = numbers(slice(0, 8))
    halves = zip(numbers(slice(0, 4)), numbers(slice(4, 8)))
    for one, both in zip(whole, halves):
        assert torch.equal(one, torch.cat(both))
    assert whole[1].shape == (8, 3, 2) and not torch.equal(whole[1], whole[3])


def test_draws_have_their_ranges():
    draw = rounds.draws(torch.Generator().manual_seed(0), 20_000, "cpu", slice(0, 20_000))
    time, uniform, normal = draw("time"), draw("uniform"), draw("normal", torch.zeros(20_000, 2))
    assert time.dtype == torch.int64 and (time.min(), time.max()) == (0, 999) and time.float().mean().item() == pytest.approx(499.5, abs=8)
    assert uniform.shape == (20_000,) and 0 <= uniform.min() and uniform.max() < 1 and uniform.std().item() == pytest.approx(12 ** -0.5, rel=0.02)
    assert abs(normal.mean()) < 0.02 and normal.std().item() == pytest.approx(1, rel=0.02)


def test_entries_get_as_many_axes_as_the_tensor():
    table = torch.tensor([10.0, 20.0, 30.0])
    t = torch.tensor([2, 0])
    assert rounds.at(table, t, torch.zeros(2, 5)).tolist() == [[30], [10]]
    assert rounds.at(table, t, torch.zeros(2, 5, 4, 4)).shape == (2, 1, 1, 1)


# ---- Retrieval -----------------------------------------------------------------------------------


def test_found_again_by_hand():
    """Blocks of three.  In the first, row 0 finds row 1, which is of its group; row 2 finds row 0, which is not."""
    e = torch.eye(3)
    a = torch.stack([e[0], e[1], e[2], e[0], e[1], e[2], e[0]])
    b = torch.stack([e[2] + 0.1 * e[1], e[0] + e[1], e[2] * 0.01 - e[1], 5 * e[0], 4 * e[2], 3 * e[1], -e[0]])
    groups = torch.tensor([4, 4, 2, 0, 1, 1, 9])
    # block 1: a0 -> b1 (group 4, hit), a1 -> b1 (hit), a2 -> b0 (group 4, miss)
    # block 2: a3 -> b3 (hit), a4 -> b5 (group 1, hit), a5 -> b4 (group 1, hit).  Row 6 is in no whole block
    assert rounds.found_again(a, b, groups, block=3) == pytest.approx((2 / 3 + 1) / 2)
    groups[1] = 3                                                           # a0 -> b1 is a miss now
    assert rounds.found_again(a, b, groups, block=3) == pytest.approx((1 / 3 + 1) / 2)
    assert math.isnan(rounds.found_again(a, b, groups))                     # 32 rows are a block


def test_retrieval_pairs_streams_that_32_rows_have(tmp_path):
    present = np.zeros((70, 4), bool)
    present[:, 0] = True
    present[:40, 1] = True
    present[8:, 2] = True
    present[60:, 3] = True
    ds = dataset(present, ("text", "xray", "ct", "t2"), reports=["1" if r % 2 else "0" for r in range(70)])
    samples = samples_of(tmp_path, ds)
    kinds = torch.eye(6)[torch.arange(70) % 2]                              # equal reports, equal vectors
    own = torch.randn(70, 6, generator=torch.Generator().manual_seed(0))

    def shares(text, xray, ct):
        samples.vectors = {0: text, 1: xray[:40], 2: ct[8:]}
        return rounds.retrieval(samples, None)
    found = shares(kinds, kinds, kinds)
    assert set(found) == {("text", "xray"), ("text", "ct"), ("xray", "ct")}
    assert found["text", "xray"] == found["text", "ct"] == 1                # an equal report counts as its own
    assert found["xray", "ct"] == pytest.approx(2 / 32)                     # images have no equals; the first of each kind is found
    assert shares(kinds, own, own)["xray", "ct"] == 1                       # rows 8 to 39 have both
    assert shares(kinds, own, own.roll(1, 0))["xray", "ct"] < 0.1
    assert shares(kinds, 1 - kinds, kinds)["text", "xray"] == 0


def test_retrieval_is_the_mean_of_both_ways(tmp_path):
    samples = samples_of(tmp_path, dataset(np.ones((32, 2), bool), ("xray", "ct")))
    e = torch.eye(32)
    samples.vectors = {0: e, 1: e.clone()}
    samples.vectors[1][:16] += 2 * e[16:]       # CT 0 to 15 look most like X-ray 16 to 31; each X-ray finds its own CT
    by_hand = (rounds.found_again(*samples.vectors.values(), torch.arange(32)) +
               rounds.found_again(*list(samples.vectors.values())[::-1], torch.arange(32))) / 2
    assert rounds.retrieval(samples, None)["xray", "ct"] == by_hand
    assert rounds.found_again(samples.vectors[0], samples.vectors[1], torch.arange(32)) == 1
    assert rounds.found_again(samples.vectors[1], samples.vectors[0], torch.arange(32)) == 0.5


# ---- Phases --------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.second = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.factor = nn.Parameter(torch.ones(()))
        self.other = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.factor * self.first(x) + self.other * self.second(x)


LENGTHS = (3, 20, 4)


def phases_of(run, net, lengths=LENGTHS):
    opened = [[net.first, net.factor], [net.second], [net.first[2], net.other]]
    return Phases(run, "fit", lengths, {"net": net}, opened, [0.1, 0.2, 0.4], 8, decay=0.03)


def train(run, stop_after=None, look=lambda *about: None, lengths=LENGTHS):
    """Trains a Net in three phases, and ends as after SIGTERM when so many steps are done in all."""
    torch.manual_seed(0)
    net = Net()
    for phase, local, step, optimiser in phases_of(run, net, lengths):
        x = torch.randn(8, 3, generator=run.generator("x", step))
        run.update((net(x) - x.sum(1, keepdim=True)).square().mean(), optimiser)
        look(phase, local, step, optimiser, net)
        if step + 1 == stop_after:
            run.stop = signal.SIGTERM
    return net


def snapshot(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_exactly_the_opened_parts_are_trained(tmp_path):
    """Each phase changes all weights, and the statistics of BatchNorm, of what is opened; and nothing else."""
    opened = [("first.", "factor"), ("second.",), ("first.2.", "other")]
    torch.manual_seed(0)
    states = [snapshot(Net())]
    trainable = []

    def look(phase, local, step, optimiser, net):
        names = {name for name, p in net.named_parameters() if p.requires_grad}
        inside = {id(p) for group in optimiser.param_groups for p in group["params"]}
        assert {id(p) for p in net.parameters() if p.requires_grad} == inside and len(optimiser.param_groups) == 1
        modes = {name for name, module in net.named_modules() if module.training}
        trainable.append((phase, names, modes))
        if local + 1 == LENGTHS[phase]:
            states.append(snapshot(net))
    net = train(begin(tmp_path), look=look)
    assert len(states) == 4
    for phase, own in enumerate(opened):
        changed = {name for name in states[0] if not torch.equal(states[phase][name], states[phase + 1][name])}
        assert changed == {name for name in states[0] if name.startswith(own)}, phase
    for phase, names, modes in trainable:
        assert names == {name for name, _ in net.named_parameters() if name.startswith(opened[phase])}
        assert modes == [{"first", "first.0", "first.1", "first.2"}, {"second", "second.0", "second.1", "second.2"}, {"first.2"}][phase]
    assert not any(p.requires_grad for p in net.parameters()) and not any(module.training for module in net.modules())


def test_phases_count_their_steps_and_start_their_rates_again(tmp_path):
    seen = []

    def look(phase, local, step, optimiser, net):
        seen.append((phase, local, step, optimiser.param_groups[0]["lr"], optimiser.param_groups[0]["weight_decay"]))
    train(begin(tmp_path), look=look)
    assert [entry[:3] for entry in seen] == [
        *((0, i, i) for i in range(3)), *((1, i, 3 + i) for i in range(20)), *((2, i, 23 + i) for i in range(4))]

    def falling(i, n, warm):
        return (1 + math.cos(math.pi * (i - warm) / (n - warm))) / 2
    rates = [rate for *_, rate, _ in seen]
    assert rates[:3] == pytest.approx([0.1, 0.1, 0.1 * falling(2, 3, 1)])
    assert rates[3:5] == pytest.approx([0.1, 0.2]) and rates[5:23] == pytest.approx([0.2 * falling(i, 20, 2) for i in range(2, 20)])
    assert rates[23:] == pytest.approx([0.4, *(0.4 * falling(i, 4, 1) for i in range(1, 4))])
    assert {decay for *_, decay in seen} == {0.03}


def test_stopped_in_a_phase_or_at_its_end_and_continued_equals_undisturbed(tmp_path):
    whole = begin(tmp_path / "a")
    net = train(whole)
    again = begin(tmp_path / "b")
    for stop in (2, 3, 9, 23, 25):
        with pytest.raises(SystemExit):
            train(again, stop_after=stop)
        again.close()
        again = begin(tmp_path / "b")
        assert again.load() and again.stages["fit"]["step"] == stop
    continued = train(again)
    assert same(whole.stages, again.stages) and same(net.state_dict(), continued.state_dict())
    assert set(whole.stages["fit"]["parts"]) == {"net"}


def test_finished_phases_are_loaded_frozen_and_an_empty_phase_is_passed_over(tmp_path):
    run = begin(tmp_path / "a")
    net = train(run)
    asked = []
    again = train(run, look=lambda *about: asked.append(about))
    assert asked == [] and same(net.state_dict(), again.state_dict())
    assert not any(p.requires_grad for p in again.parameters()) and not any(module.training for module in again.modules())
    steps = []
    train(begin(tmp_path / "b"), look=lambda phase, local, *rest: steps.append((phase, local)), lengths=(2, 0, 1))
    assert steps == [(0, 0), (0, 1), (2, 0)]
    nothing = train(begin(tmp_path / "c"), look=lambda *about: asked.append(about), lengths=(0, 0, 0))
    assert asked == [] and not nothing.training


def test_text_is_the_name_of_reports():
    assert TEXT == "text" and rounds.MODALITIES == ("text", "xray", "ct", "mri")
