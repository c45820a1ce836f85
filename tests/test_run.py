"""The run machinery: order and noise by counter, exact resume, checkpoints that cannot be lost, locks, signals, bad numbers."""
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from common import device, files, loop, script
from common.files import RunError
from common.loop import EMA, Best
from common.run import Run


class Config:
    def __init__(self, **values):
        self.__dict__.update(values)


def start(folder, **values):
    args = SimpleNamespace(out=folder, seed=0, device="cpu", precision="auto", train=True, evaluate=False, synthesize=False,
                           typed={})
    return Run("test", Config(lr=0.1, **values), args)


def train(run, total, stop_after=None):
    """A small regression; returns the weights (and leaves like a killed process after `stop_after` steps)."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    ema, optimiser = EMA(model, 0.9), torch.optim.Adam(model.parameters(), lr=0.1)
    for step in run.steps("fit", total, {"model": model, "ema": ema, "optimiser": optimiser}):
        x = torch.randn(4, 3, generator=run.generator("fit", step)) + float(run.order("fit", 10, 4, step).sum())
        run.update((model(x) - x.sum(1, keepdim=True)).square().mean(), optimiser)
        ema.update(model, step)
        if stop_after is not None and step + 1 == stop_after:
            run.stop = signal.SIGTERM
    return [p.detach().clone() for p in (*model.parameters(), *ema.model.parameters())]


def test_a_finished_stage_keeps_its_optimiser_only_if_it_can_be_trained_further(tmp_path):
    """Adam keeps two numbers for each weight.  A finished run is opened without them."""
    whole = {}
    for name, extensible in (("closed", ()), ("open", ("lr",))):
        run = start(tmp_path / name)
        run.claim(["lr"], {"data": "abc"}, extensible)
        run.last_stage = "fit"
        whole[name] = train(run, 6)
        run.close()
        parts = torch.load(tmp_path / name / "last.pt", weights_only=True)["stages"]["fit"]["parts"]
        assert set(parts) == {"model", "ema", *(["optimiser"] if extensible else [])}
        again = start(tmp_path / name)
        again.load()
        assert all(torch.equal(a, b) for a, b in zip(whole[name], train(again, 6)))
        again.close()
    unfinished = start(tmp_path / "unfinished")
    with pytest.raises(SystemExit):
        train(unfinished, 6, stop_after=4)
    assert "optimiser" in torch.load(tmp_path / "unfinished" / "last.pt", weights_only=True)["stages"]["fit"]["parts"]


def test_a_run_that_ends_before_its_first_further_step_is_still_trained_further(tmp_path):
    """config.json holds the new number at once.  The checkpoint holds the old one, and counts."""
    run = start(tmp_path)
    run.last_stage = "fit"
    run.claim(["lr"], {}, ("lr",))
    train(run, 3)
    run.close()
    for _ in range(2):                                  # the first time, nothing is trained: the process ends
        again = start(tmp_path)
        again.config = Config(lr=0.2)
        again.load()
        again.last_stage = "fit"
        again.claim(["lr"], {}, ("lr",))
        assert not again.finished(["fit"]) and json.loads((tmp_path / "config.json").read_text())["identity"]["lr"] == 0.2
        again.close()
    train(again, 5)
    assert again.finished(["fit"])
    last = start(tmp_path)
    last.config = Config(lr=0.2)
    last.load()
    last.claim(["lr"], {}, ("lr",))
    assert last.finished(["fit"]) and last.stages["fit"]["step"] == 5


@pytest.mark.parametrize("total, seen", [(1000, [250, 500, 750]), (999, [499])])
def test_a_long_training_is_looked_at_three_times_and_a_short_one_once(tmp_path, total, seen):
    run = start(tmp_path)
    looked = []
    run.last_stage, run.preview = "fit", lambda: looked.append(run.stages["fit"]["step"])
    train(run, total)
    assert looked == seen


def test_a_batch_larger_than_the_training_set_is_said_once(tmp_path):
    run = start(tmp_path)
    for step in range(3):
        assert sorted(np.unique(run.order("fit", 3, 7, step))) == [0, 1, 2]
    run.order("fit", 7, 7, 0)
    text = (tmp_path / "log.txt").read_text()
    assert text.count("notice: fit: a batch of 7 is larger than the 3 training samples") == 1 and text.count("notice") == 1


def test_a_wrong_folder_is_not_made(tmp_path):
    """A typing error in --out of an evaluation leaves nothing behind."""
    args = SimpleNamespace(out=tmp_path / "rnus", seed=0, device="cpu", precision="auto", train=False, evaluate=True, synthesize=False, typed={})
    with pytest.raises(RunError, match="rnus does not exist, so it holds no trained model"):
        Run("test", Config(lr=0.1), args)
    assert not (tmp_path / "rnus").exists()


def test_order_passes_over_everything_and_is_shuffled_and_stateless(tmp_path):
    run = start(tmp_path)
    rows = np.concatenate([run.order("a", 10, 4, step) for step in range(5)])            # two passes over ten samples
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert list(rows[:10]) != list(range(10)) and list(rows[:10]) != list(rows[10:])
    assert list(run.order("a", 10, 4, 3)) == list(rows[12:16])
    assert list(run.order("b", 10, 10, 0)) != list(run.order("a", 10, 10, 0))


def test_generators_differ_by_purpose_and_counter_and_repeat(tmp_path):
    run = start(tmp_path)
    keys = [("a", 0), ("a", 1), ("b", 0), ("a1", 0)]
    draws = {key: torch.randn(3, generator=run.generator(*key)).tolist() for key in keys}
    assert len({tuple(v) for v in draws.values()}) == 4
    assert torch.randn(3, generator=run.generator("a", 1)).tolist() == draws["a", 1]
    assert device.seed_of(0, "x", 1) == 34581751953702299                               # stored: the same on every machine


def test_ema_warms_up_and_copies_buffers():
    model = nn.BatchNorm1d(1)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(7.0)
    ema.update(model, 0)                                                                 # decay (1 + 0) / (10 + 0) = 0.1
    assert ema.model.weight.item() == pytest.approx(0.1 * 1 + 0.9 * 3)
    assert ema.model.running_mean.item() == 7
    for _ in range(2):
        ema.update(model, 1000)                                                          # decay 0.5
    assert ema.model.weight.item() == pytest.approx(3 + (2.8 - 3) / 4)


def test_best_keeps_the_lowest_loss_and_remembers_it():
    model = nn.Linear(1, 1, bias=False)
    best = Best(model)
    for weight, loss in ((1.0, 5.0), (2.0, 3.0), (3.0, 4.0)):
        nn.init.constant_(model.weight, weight)
        best.offer(model, loss)
    again = Best(model)
    again.load_state_dict(best.state_dict())
    assert again.model.weight.item() == 2 and again.loss == 3


def test_interrupted_and_continued_equals_undisturbed_bit_for_bit(tmp_path):
    whole = train(start(tmp_path / "a"), 20)
    run = start(tmp_path / "b")
    with pytest.raises(SystemExit) as end:
        train(run, 20, stop_after=10)
    assert end.value.code == 143
    run.close()
    again = start(tmp_path / "b")
    assert again.load() and again.stages["fit"]["step"] == 10
    assert all(torch.equal(a, b) for a, b in zip(whole, train(again, 20)))


def test_a_finished_stage_is_loaded_not_trained(tmp_path):
    run = start(tmp_path)
    first = train(run, 5)
    run.close()
    again = start(tmp_path)
    again.load()
    assert all(torch.equal(a, b) for a, b in zip(first, train(again, 5)))
    assert "fit: finished (5 steps)" in (tmp_path / "log.txt").read_text()


LOOP = """
    import sys, torch
    sys.path[:0] = [{root!r}, {tests!r}]
    from pathlib import Path
    import common.loop, test_run
    common.loop.time.monotonic = (lambda clock=iter(range(0, 10**9, 100)): next(clock))   # save at every step
    run = test_run.start(Path({out!r}))
    run.load()
    print("ready", flush=True)
    torch.save(test_run.train(run, {total}), {out!r} + "/weights.pt")
"""


def start_loop(out, total):
    code = textwrap.dedent(LOOP.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(out), total=total))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_kill_9_at_any_moment_loses_nothing(tmp_path):
    """Killed three times at different moments, mostly while saving, then left alone: the same bits as an undisturbed run."""
    out = tmp_path / "killed"
    for wait in (0.02, 0.11, 0.3):
        process = start_loop(out, 400)
        assert process.stdout.readline().startswith("device")
        while "ready" not in process.stdout.readline():
            pass
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()
        process.wait()
    process = start_loop(out, 400)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    undisturbed = train(start(tmp_path / "undisturbed"), 400)
    assert all(torch.equal(a, b) for a, b in zip(undisturbed, torch.load(out / "weights.pt", weights_only=True)))
    assert not list(out.glob("*.tmp"))


def test_a_save_that_fails_keeps_the_previous_file(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def full_disk(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(RunError, match="No space left.*previous file is untouched"):
        files.replace(target, full_disk)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def damaged(tmp_path, content):
    run = start(tmp_path)
    with pytest.raises(SystemExit):
        train(run, 4, stop_after=3)
    run.close()
    (tmp_path / "last_prev.pt").unlink(missing_ok=True)
    if callable(content):
        content(tmp_path / "last.pt")
    else:
        (tmp_path / "last.pt").write_bytes(content)
    again = start(tmp_path)
    try:
        again.load()
        train(again, 4)
    finally:
        again.close()


def change(edit):
    def work(path):
        content = torch.load(path, weights_only=True)
        edit(content)
        torch.save(content, path)
    return work


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo hacked > {self.marker}",)


@pytest.mark.parametrize("content, message", [
    (b"", "damaged or not a checkpoint"), (b"PK\x03\x04 truncated", "damaged or not a checkpoint"),
    (b"<html>", "damaged or not a checkpoint"), (change(lambda c: c.update(format=0)), "checkpoint format 0"),
    (change(lambda c: c.update(script="metadb")), "belongs to metadb.py"),
    (lambda path: torch.save([1, 2], path), "not a checkpoint of this project"),
    (change(lambda c: c["stages"]["fit"]["parts"]["model"]["weight"].fill_(float("nan"))), "not finite"),
    (change(lambda c: c["stages"]["fit"]["parts"]["model"].update(weight=torch.zeros(1, 7))), "does not fit this config"),
    (change(lambda c: c["stages"]["fit"]["parts"]["model"].update(more=torch.zeros(1))), "does not fit this config"),
    (change(lambda c: c["stages"]["fit"]["parts"].pop("optimiser")), "fit/optimiser.*does not fit this configuration")])
def test_bad_checkpoints_get_a_sentence(tmp_path, content, message):
    with pytest.raises(RunError, match=message) as error:
        damaged(tmp_path, content)
    assert "\n" not in str(error.value)


def test_a_checkpoint_cannot_run_code(tmp_path):
    marker = tmp_path / "marker"
    with pytest.raises(RunError, match="damaged or not a checkpoint"):
        damaged(tmp_path / "run", lambda path: torch.save(Evil(marker), path))
    assert not marker.exists()


def test_a_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path):
    run = start(tmp_path)
    with pytest.raises(SystemExit):
        train(run, 10, stop_after=4)
    run.close()
    run = start(tmp_path)
    run.load()
    whole = train(run, 10)                                                               # last.pt: 10 steps, last_prev.pt: 4
    run.close()
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:100])
    run = start(tmp_path)
    assert run.load() and run.stages["fit"]["step"] == 4
    assert all(torch.equal(a, b) for a, b in zip(whole, train(run, 10)))
    assert files.read_checkpoint(tmp_path / "last_prev.pt")["stages"]["fit"]["step"] == 4    # not the damaged one
    run.keep("fit", 10, 10, {})
    assert files.read_checkpoint(tmp_path / "last_prev.pt")["stages"]["fit"]["step"] == 10   # from then on as always


def test_another_configuration_in_the_same_folder_is_refused_by_name(tmp_path):
    run = start(tmp_path)
    run.config.lr = 0.3
    run.claim(["lr"], {"data": "abc"})
    run.config.lr = 0.1
    run.claim(["lr"], {"data": "abc"})              # nothing was saved yet, as after "out of memory": may change
    run.stages = {"fit": {}}
    run.claim(["lr"], {"data": "abc"})                                                   # the same again: fine
    run.config.lr = 0.2
    with pytest.raises(RunError, match="lr was 0.1, now 0.2.*--out"):
        run.claim(["lr"], {"data": "abc"})
    run.config.lr = 0.1
    with pytest.raises(RunError, match='data was "abc", now "xyz"'):
        run.claim(["lr"], {"data": "xyz"})


def test_two_runs_in_one_folder_are_refused_and_a_dead_one_is_not(tmp_path):
    run = start(tmp_path)
    with pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        start(tmp_path)
    run.close()
    (tmp_path / "lock").write_text("process 1 on nowhere")                               # left behind by a killed process
    start(tmp_path).close()


def test_a_failed_run_unlocks_its_folder(tmp_path):
    with pytest.raises(ValueError, match="of the user") as kept, start(tmp_path):
        raise ValueError("of the user")
    assert kept.value.__traceback__ is not None                                          # as in a notebook, it holds the run alive
    with start(tmp_path) as again:
        assert again.lock and not again.lock.closed
    assert again.lock.closed


def test_unwritable_folders(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write into the run folder"):
        start(tmp_path / "file" / "run")
    (tmp_path / "run" / "lock").mkdir(parents=True)                                      # stands for "permission denied"
    with pytest.raises(RunError, match="cannot write into the run folder"):
        start(tmp_path / "run")


def test_only_work_that_writes_makes_andlocks_the_folder(tmp_path):
    trains = start(tmp_path / "busy")
    for out in (tmp_path / "busy", tmp_path / "new"):
        args = SimpleNamespace(out=out, seed=0, device="cpu", precision="auto", train=False, evaluate=False, synthesize=False)
        dry = Run("test", Config(), args)
        dry.say("a dry run")
        assert not dry.load()
        dry.close()
    assert not (tmp_path / "new").exists() and "a dry run" not in (tmp_path / "busy" / "log.txt").read_text()
    trains.close()


@pytest.mark.skipif(os.name == "nt", reason="flock")
def test_a_file_system_withoutlocks_is_no_other_process(tmp_path, monkeypatch):
    import fcntl

    def nolocks(handle, how):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", nolocks)
    run = start(tmp_path)
    run.say("works")
    run.close()
    assert "works" in (tmp_path / "log.txt").read_text()


def test_a_missing_device_is_an_error_not_a_fallback(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunError, match="--device cuda: this machine"):
        device.pick_device("cuda")
    assert device.pick_device("auto")[0].type in ("cpu", "mps")


def test_non_finite_losses_are_skipped_and_then_end_the_run(tmp_path):
    run = start(tmp_path)
    model = nn.Linear(1, 1)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.item()
    run.update(model(torch.tensor([[float("inf")]])).sum(), optimiser)
    assert model.weight.item() == before and run.bad_steps[id(optimiser)] == 1
    other = torch.optim.SGD(model.parameters(), lr=0.0)                                   # a GAN's: its good steps do not count
    run.update(model(torch.tensor([[0.5]])).sum(), other)
    assert run.bad_steps[id(optimiser)] == 1 and run.bad_steps[id(other)] == 0
    run.update(model(torch.tensor([[0.5]])).sum(), optimiser)
    assert model.weight.item() != before and run.bad_steps[id(optimiser)] == 0
    with pytest.raises(RunError, match="diverged") as error:
        for _ in range(loop.MAX_BAD_STEPS):
            run.update(model(torch.tensor([[float("nan")]])).sum(), optimiser)
    assert run.bad_steps[id(optimiser)] == loop.MAX_BAD_STEPS and "last.pt" not in str(error.value)    # nothing was saved yet
    train(run, 2)
    run.bad_steps[id(optimiser)] = loop.MAX_BAD_STEPS - 1
    with pytest.raises(RunError, match="diverged.*last.pt holds the last good state"):
        run.update(model(torch.tensor([[float("nan")]])).sum(), optimiser)
    before = model.weight.item()
    run.bad_steps[id(optimiser)] = 0
    run.update(model(torch.ones(1, 1)).sum() + float("inf"), optimiser)                  # gradient finite, loss not
    assert model.weight.item() == before and run.bad_steps[id(optimiser)] == 1


@pytest.mark.parametrize("micro", [1, 3, 4, 10, None])
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(tmp_path, micro):
    """The mean of squares over 10 samples: the same step, whatever --micro-batch is, and the parts are no larger."""
    run, x, sizes = start(tmp_path), torch.arange(10.0), []
    run.args.micro_batch = micro
    w = nn.Parameter(torch.tensor(0.3))

    def loss_of(part):
        sizes.append(len(x[part]))
        return ((w * x[part] - 1) ** 2).mean()
    loss = run.update(loss_of, torch.optim.SGD([w], lr=0.001), max_norm=float("inf"), samples=10)
    gradient = (2 * (0.3 * x - 1) * x).mean().item()                                     # by hand
    assert w.item() == pytest.approx(0.3 - 0.001 * gradient, rel=1e-6) and sum(sizes) == 10 and max(sizes) == min(micro or 10, 10)
    assert loss.item() == pytest.approx(((0.3 * x - 1) ** 2).mean().item(), rel=1e-6)


def test_update_clips_the_gradient_norm(tmp_path):
    run = start(tmp_path)
    w = nn.Parameter(torch.zeros(2))
    run.update((w * torch.tensor([30.0, 40.0])).sum(), torch.optim.SGD([w], lr=1.0))
    assert w.tolist() == pytest.approx([-0.6, -0.8], abs=1e-4)


@pytest.mark.skipif(os.name == "nt", reason="signals differ")
@pytest.mark.parametrize("number, code", [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)])
def test_signals_save_and_exit(tmp_path, number, code):
    process = start_loop(tmp_path, 10 ** 6)
    while "ready" not in process.stdout.readline():
        pass
    while not (tmp_path / "last.pt").exists():
        pass
    process.send_signal(number)
    text = process.communicate(timeout=30)[0]
    assert process.returncode == code and "saved; the same command continues" in text
    assert torch.load(tmp_path / "last.pt", weights_only=True)["stages"]["fit"]["step"] > 0


def test_log_and_results(tmp_path):
    run = start(tmp_path)
    train(run, 3)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3 and lines[-1]["stage"] == "fit"
    run.results([{"mean": 1}], {"x": np.full(2, 1)}, "words")
    run.config.lr = 5
    run.results([{"mean": 2}], {"x": np.full(2, 2)}, "words")
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == [{"mean": 2}]
    assert json.loads((tmp_path / "results_1.json").read_text())["rows"] == [{"mean": 1}]  # nothing is overwritten silently
    (tmp_path / "results_1.json").rename(tmp_path / "results_2.json")
    run.facts = {"data": "elsewhere"}
    run.results([{"mean": 3}], {"x": np.full(2, 3)}, "words")                                # other data, same configuration
    run.seed = 7
    run.results([{"mean": 4}], {"x": np.full(2, 4)}, "words")
    run.results([{"mean": 5}], {"x": np.full(2, 5)}, "words")                                # the same again replaces
    kept = [json.loads((tmp_path / f"results{n}.json").read_text())["rows"][0]["mean"] for n in ("", "_1", "_2", "_3")]
    assert kept == [5, 2, 1, 3]
    assert [np.load(tmp_path / f"results{n}.npz")["x"][0] for n in ("", "_1", "_3")] == [5, 2, 3]          # images go along


def test_results_are_found_again_only_for_the_same_configuration_seed_and_facts(tmp_path):
    run = start(tmp_path)
    assert run.find_results() is None
    run.facts = {"data": "here", "test": ["a", "b"]}
    run.results([], {}, "words")
    assert run.find_results() == tmp_path / "results.json"
    for change in ({"facts": {"data": "here", "test": ["a"]}}, {"seed": 9}, {"config": Config(lr=7)}):
        other = start(tmp_path / "elsewhere")
        other.out, other.facts = tmp_path, run.facts
        other.close()
        for name, value in change.items():
            setattr(other, name, value)
        assert other.find_results() is None
    (tmp_path / "results_7.json").write_text("{}")                                        # somebody else's
    (tmp_path / "results_8.json").write_text("not JSON")
    assert run.find_results() == tmp_path / "results.json"
    (tmp_path / "results.npz").unlink()                                                    # killed in between
    assert run.find_results() is None


def test_config_json_keeps_what_the_run_was_trained_with(tmp_path):
    run = start(tmp_path)
    run.claim([], {})
    train(run, 3)
    run.config.lr = 99
    run.claim([], {})
    assert json.loads((tmp_path / "config.json").read_text())["config"]["lr"] == 0.1


def test_a_stage_of_no_steps_leaves_its_parts_as_they_are(tmp_path):
    run, part = start(tmp_path), torch.nn.Linear(1, 1)
    assert not run.finished(["fit"])
    assert list(run.steps("fit", 0, {"part": part})) == [] and run.finished(["fit"])
    run.close()
    again, other = start(tmp_path), torch.nn.Linear(1, 1)
    assert again.load() and list(again.steps("fit", 0, {"part": other})) == []
    assert torch.equal(other.weight, part.weight) and not again.finished(["fit", "more"])


def test_batches_cover_all_items_and_end_between_two_at_a_signal(tmp_path):
    run, said = start(tmp_path), []
    run.say = said.append
    assert list(run.batches("work", [1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]] and said[-1].startswith("work 5/5")
    assert list(run.batches("work", [], 2)) == []
    done = []
    with pytest.raises(SystemExit) as end:
        for part in run.batches("work", list(range(9)), 3):
            done.append(part)
            signal.raise_signal(signal.SIGINT)
    assert end.value.code == 130 and done == [[0, 1, 2]] and "work: stopped at 3 of 9; the same command" in said[-1]


def test_claim_keeps_what_the_checkpoint_knows(tmp_path):
    run = start(tmp_path)
    run.about = {"encoder": {"words": 3}, "data": "old"}
    run.claim([], {"data": "new"})
    assert run.about == {"encoder": {"words": 3}, "data": "new"}


def test_log_lines_are_json_even_without_finite_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "peak_gigabytes", lambda device: float("nan"))            # as on Windows
    run = start(tmp_path)
    for _ in run.steps("fit", 1, {}):
        run.log(loss=float("inf"))
        run.log(loss=1.0)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")
    line = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] is None and line["peak GB"] is None and line["step"] == 1


def test_eta_leaves_the_first_step_out(tmp_path, monkeypatch):
    clock = iter([0.0, 60.0, 62.0, 64.0, 66.0])                                         # start, then the end of each step
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    run, said = start(tmp_path), []
    run.say = said.append
    meter = loop.Meter(run, "fit", 5, 100, 1)
    meter.every = 0
    for step in (5, 6, 7):
        meter.tick(step)
    assert [re.search(r"ETA (\S+)", line)[1] for line in said] == ["1:34:00", "0:03:06", "0:03:04"]      # 94 of 60 s; then 93, 92 of 2 s


def test_settle_reports_values_that_do_not_go_together(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Strict:
        M: int = 10
        S: int = 5
        size: int = 64

        def __post_init__(self):
            if self.S > self.M:
                raise ValueError("--S must not exceed --M")
    args = SimpleNamespace(out=tmp_path, seed=None, device="cpu", precision="auto", train=False, typed={"S": 9})
    (tmp_path / "config.json").write_text(json.dumps({"config": {"M": 9, "S": 2, "gone": 1}, "identity": {"seed": 3}}))
    assert Run("test", Strict(10, 9), args).settle(["S"]) == Strict(10, 9)               # nothing was trained under it
    (tmp_path / "last.pt").write_bytes(b"")
    run = Run("test", Strict(10, 9), args)
    assert run.settle(["S"]) == Strict(9, 9) and run.seed == 3
    (tmp_path / "config.json").write_text(json.dumps({"config": {"M": 8, "S": 2}, "identity": {"seed": 3}}))
    with pytest.raises(RunError, match="--S must not exceed --M.*config.json") as error:
        Run("test", Strict(10, 9), args).settle(["S"])
    assert error.value.status == 2
    (tmp_path / "config.json").write_text(json.dumps({"config": {"M": 9, "S": 2, "size": 32}, "identity": {"seed": 3}}))
    args.typed = {"S": 9, "size": 64}
    with pytest.raises(RunError, match="trained otherwise: size was 32, now 64; leave"):  # S may differ
        Run("test", Strict(10, 9), args).settle(["S"])
    args.typed = {"S": 9, "size": 32}
    assert Run("test", Strict(10, 9), args).settle(["S"]) == Strict(9, 9, 32)


@pytest.mark.skipif(os.name == "nt", reason="signals differ")
def test_only_a_second_ctrl_c_ends_at_once(tmp_path):
    run = start(tmp_path)
    with loop.signals(run):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)                                             # a launcher while the run saves
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_the_disk_refuses_is_one_line(capsys):
    def work():
        raise OSError(28, "No space left on device", "runs/log.txt")
    with pytest.raises(SystemExit) as end:
        script.guarded(work)
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: [Errno 28] No space left on device: 'runs/log.txt';")


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path):
    run = start(tmp_path)
    run.world, run.rank = 2, 1
    assert run.shard(4) == slice(2, 4)
    with pytest.raises(RunError, match="batch of 5 cannot be shared equally by 2 processes"):
        run.shard(5)


TWO = """
    import os, sys, torch
    sys.path[:0] = [{root!r}, {tests!r}]
    from pathlib import Path
    import test_run
    from torch import nn
    run = test_run.start(Path({out!r}))
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    mine = run.shard(4)
    for step in run.steps("fit", 30, dict(model=model)):
        x = torch.randn(4, 3, generator=run.generator("fit", step))[mine]
        run.update((model(x) - x.sum(1, keepdim=True)).square().mean(), optimiser)
    joined = run.gather([run.rank])
    if run.rank == 0:
        torch.save([model.weight.data, torch.tensor(joined)], {out!r} + "/weights.pt")
    run.close()
"""


@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_global_batch(tmp_path):
    results = []
    for world in (1, 2):
        out = tmp_path / str(world)
        (tmp_path / "two.py").write_text(textwrap.dedent(TWO.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(out))))
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
        done = subprocess.run([sys.executable, *launch, str(tmp_path / "two.py")], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        results.append(torch.load(out / "weights.pt", weights_only=True))
    assert results[0][1].tolist() == [0] and results[1][1].tolist() == [0, 1]
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)


PAIR = """
    import os, signal, sys, torch
    sys.path[:0] = [{root!r}, {tests!r}]
    from pathlib import Path
    import test_run
    from torch import nn
    run = test_run.start(Path({out!r}))
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in run.steps("fit", 9, dict(model=model)):
        loss = model(torch.ones(1, 1)).sum()
        if run.rank == 1 and step == 1:
            loss = loss + float("inf")                      # only one process sees it; its gradient is finite
        run.update(loss, optimiser, max_norm=9)
        if run.rank == 1 and step == 4:
            os.kill(os.getpid(), signal.SIGINT)             # only one process is told to stop
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals differ")
def test_two_processes_skip_and_stop_at_the_same_step(tmp_path):
    """Without torchrun, whose clean-up would hide a process that hangs or dies."""
    code = textwrap.dedent(PAIR.format(root=str(ROOT), tests=str(ROOT / "tests"), out=str(tmp_path)))
    with socket.socket() as free:
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
    assert [process.returncode for process in pair] == [130, 130], errors
    fit = files.read_checkpoint(tmp_path / "last.pt")["stages"]["fit"]
    assert fit["step"] == 5 and fit["parts"]["model"]["weight"].item() == -4             # five steps, of which one skipped


def test_a_clock_that_goes_backwards_does_no_harm(tmp_path, monkeypatch):
    whole = train(start(tmp_path / "a"), 6)
    ticks = iter(range(10 ** 6, 0, -50))
    for clock in ("monotonic", "perf_counter", "time"):
        monkeypatch.setattr(loop.time, clock, lambda: float(next(ticks)))
    assert all(torch.equal(a, b) for a, b in zip(whole, train(start(tmp_path / "b"), 6)))
