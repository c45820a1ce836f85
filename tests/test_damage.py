"""What disks, kills and other programs do to our files: it is noticed in one line, or it changes no number, and nothing else is lost."""
import dataclasses
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import test_run
import torch
import toys
from conftest import ROOT
from test_run import change, start, train
from torch import nn

from common import autoencoder, cli, cohort, files, loop, pictures, script, tables
from common.embeddings import load_embeddings
from common.files import RunError
from common.run import Run, named_files
from data import find_layout, phantom, to_synthesize
from data.files import DataError, json_text, read_json, remove_unfinished, write_atomically
from data.identity import Memory
from scans import head, make_set, opened, save

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals, locks and pipes of Unix")


def flip(path, position):
    """Change one bit of a file; a position below 0 counts from its end."""
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def finished(folder, steps=3):
    """A finished little run, without its lock."""
    run = start(folder)
    run.claim(["lr"], {"data": "abc"})
    run.facts = {"data": "d", "phantom": False}
    train(run, steps)
    run.results([test_row()], {"a->b|M": np.ones((4, 4))}, "words")
    run.close()
    return run


def test_row():
    return {"task": "a->b", "method": "M", "metric": "psnr", "mean": 1.5, "values": {"s1": 1.25, "s2": 1.75}}


test_row.__test__ = False


# ---- files that are written as a whole -------------------------------------------------------------------------------

@POSIX
def test_only_what_dead_processes_left_is_removed(tmp_path):
    names = {"dead": "a.tmp-01234567", "empty": "b.tmp-89abcdef", "old": "c.tmp-00000000", "user": "notes.tmp-v2", "users": "thesis.tmp"}
    for name in names.values():
        (tmp_path / name).write_text("half")
    (tmp_path / names["empty"]).write_text("")                      # its process may not have locked it yet
    (tmp_path / names["old"]).write_text("")
    os.utime(tmp_path / names["old"], (0, 0))
    with write_atomically(tmp_path / "alive") as file:
        file.write(b"x" * 10 ** 5)
        remove_unfinished(tmp_path)
        left = {path.name for path in tmp_path.iterdir()}
    assert {names["empty"], names["user"], names["users"]} < left and len(left) == 4
    assert (tmp_path / "alive").stat().st_size == 10 ** 5
    remove_unfinished(tmp_path, locked=True)
    assert {path.name for path in tmp_path.iterdir()} == {names["user"], names["users"], "alive"}


def test_a_new_run_keeps_the_files_of_the_user(tmp_path):
    (tmp_path / "run" / "previews").mkdir(parents=True)
    for place in ("last.pt.tmp-aaaaaaaa", "previews/1.png.tmp-bbbbbbbb", "mine.tmp"):
        (tmp_path / "run" / place).write_text("" if place.startswith("last.pt") else "x")
    start(tmp_path / "run").close()
    left = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert left == {"lock", "log.txt", "mine.tmp"}


def test_a_name_may_be_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("n" * 250 + ".png")
    pictures.grid(path, [[np.zeros((4, 4))]], ["a"], ["b"])
    assert path.stat().st_size > 0


def test_the_previous_file_is_kept_under_its_name(tmp_path):
    for text in ("1", "2", "3"):
        files.replace(tmp_path / "new", lambda path, text=text: path.write_text(text), keep=tmp_path / "old")
    assert [(tmp_path / name).read_text() for name in ("new", "old")] == ["3", "2"] and len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def enforced(path):
        raise RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0")
    with pytest.raises(RunError, match=r"cannot write .*last.pt: the disk may be full \(\d+ MB free\)") as error:
        files.replace(tmp_path / "last.pt", enforced)
    assert "inline_container" not in str(error.value)
    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(RunError, match="cannot write .*log.txt: No space left on device; make room"):
        files.append(tmp_path / "log.txt", "line")


# ---- JSON --------------------------------------------------------------------------------------------------------------

KINDS = {"rows": list, "seed": int}
WHOLE = {"rows": [1, 0.1], "seed": 3, "name": "é"}


@pytest.mark.parametrize("content, message", [
    (b"", "is no JSON, so it is damaged"), (b'{"rows": [1', "is no JSON"), (b"\xff\xfe\x00", "is no JSON"), (b"[" * 10 ** 5, "is no JSON"),
    (b"[1, 2]", "holds a list"), (b"null", "holds a NoneType"), (b'{"seed": 3}', "lacks rows"), (b'{"rows": [], "seed": "3"}', "not of the type int"),
    (json_text(WHOLE).replace("0.1", "0.2").encode(), "its checksum differs")],
    ids=["empty", "cut", "no text", "deep", "list", "null", "lacks", "type", "changed"])
def test_damaged_json_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_json(path, KINDS)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and "restore or delete" in str(error.value)


def test_json_may_be_formatted_anew_or_lack_a_checksum(tmp_path):
    path = tmp_path / "x.json"
    for text in (json_text(WHOLE), json.dumps(json.loads(json_text(WHOLE)), sort_keys=True), json.dumps(WHOLE)):
        path.write_text(text)
        assert read_json(path, KINDS) == WHOLE
    path.write_text(json_text({1: (2, 3)}))
    assert read_json(path, {}) == {"1": [2, 3]}
    with pytest.raises(DataError, match="cannot be read .No such file"):
        read_json(tmp_path / "none.json", {})


@pytest.mark.parametrize("content", [b"", b"[" * 10 ** 5, b"[]", b'{"a": 1}', b'{"a": [[1], "x"], "b": null}'], ids=["empty", "deep", "list", "number", "null"])
def test_a_damaged_memory_is_empty_and_a_changed_one_too(tmp_path, content):
    path = tmp_path / "known_files.json"
    path.write_bytes(content)
    assert Memory(path).known in ({}, {"a": ([1], "x")}) or content.startswith(b'{"a": [[')
    path.unlink()
    memory = Memory(path)
    memory.remember(tmp_path, [1, 2, 3], "digest")
    memory.save()
    assert len(Memory(path).known) == 1
    (tmp_path / "known_files.json.tmp-01234567").write_text("half")                      # a kill while it was saved
    memory.remember(tmp_path, [1, 2, 3], "digest")
    memory.save()
    assert list(tmp_path.iterdir()) == [path]
    path.write_text(path.read_text().replace("digest", "other!"))
    assert Memory(path).known == {}


# ---- checkpoints ---------------------------------------------------------------------------------------------------------

def test_one_changed_bit_in_the_weights_is_noticed_and_the_previous_file_serves(tmp_path):
    with pytest.raises(SystemExit):
        train(start(tmp_path), 8, stop_after=3)
    (tmp_path / "lock").unlink()
    whole = train(start_again(tmp_path), 8)
    raw = (tmp_path / "last.pt").read_bytes()
    weight = torch.load(tmp_path / "last.pt", weights_only=True)["stages"]["fit"]["parts"]["model"]["weight"]
    flip(tmp_path / "last.pt", raw.index(weight.numpy().tobytes()))
    assert not torch.equal(torch.load(tmp_path / "last.pt", weights_only=True)["stages"]["fit"]["parts"]["model"]["weight"], weight)
    with pytest.raises(RunError, match="is damaged or not a checkpoint of this project .ValueError"):
        files.read_checkpoint(tmp_path / "last.pt")
    (tmp_path / "lock").unlink()
    run = start_again(tmp_path)
    assert run.stages["fit"]["step"] == 3 and "using last_prev.pt" in (tmp_path / "log.txt").read_text()
    assert all(torch.equal(a, b) for a, b in zip(whole, train(run, 8)))


def start_again(folder):
    run = start(folder)
    run.load()
    return run


def spoil_optimiser(content):
    content["stages"]["fit"]["parts"]["optimiser"]["state"][0]["exp_avg"][0, 1] = float("inf")


@pytest.mark.parametrize("edit, message", [
    (spoil_optimiser, "fit/optimiser in .*last.pt holds values that are not finite"),
    (lambda c: c["stages"]["fit"]["parts"]["ema"]["bias"].fill_(float("nan")), "fit/ema in .* not finite"),
    (lambda c: c.pop("about"), "entries are missing"), (lambda c: c.update(seed="0"), "entries are missing or of another type"),
    (lambda c: c["stages"]["fit"].pop("parts"), "entries are missing"), (lambda c: c.update(stages=[1]), "entries are missing"),
    (lambda c: c["stages"].update(fit=None), "entries are missing"),
    (lambda c: c["stages"]["fit"]["parts"].update(optimiser=5), "fit/optimiser.*does not fit this configuration")],
    ids=["optimiser", "ema", "about", "seed", "parts", "stages", "stage", "number"])
def test_checkpoints_that_lack_something_or_hold_nan_get_a_sentence(tmp_path, edit, message):
    with pytest.raises(RunError, match=message) as error:
        test_run.damaged(tmp_path, change(edit))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("loss", ["config.json lost", "config.json empty", "config.json changed"])
def test_the_checkpoint_knows_what_trained_it(tmp_path, loss):
    finished(tmp_path).close()
    path = tmp_path / "config.json"
    if loss == "config.json lost":
        path.unlink()
    else:
        path.write_text("" if loss == "config.json empty" else path.read_text().replace("0.1", "0.2"))
    run = start_again(tmp_path)
    run.config.lr = 0.5
    with pytest.raises(RunError, match="lr was 0.1, now 0.5"):
        run.claim(["lr"], {"data": "abc"})
    run.config.lr = 0.1
    with pytest.raises(RunError, match='data was "abc", now "xyz"'):
        run.claim(["lr"], {"data": "xyz"})
    run.about["data"] = "abc"
    run.claim(["lr"], {"data": "abc"})
    assert read_json(path, {})["config"] == {"lr": 0.1} and read_json(path, {})["identity"] == {"lr": 0.1, "seed": 0, "data": "abc"}
    (tmp_path / "last.pt").write_bytes(b"")
    (tmp_path / "last_prev.pt").unlink(missing_ok=True)
    path.unlink()
    with pytest.raises(RunError, match="last.pt is damaged"):
        run.claim(["lr"], {"data": "abc"})


def test_a_row_that_takes_stages_over_is_not_what_they_were_trained_with(tmp_path):
    finished(tmp_path / "one")
    os.replace(tmp_path / "one" / "last.pt", tmp_path / "one" / "last_prev.pt")         # a kill while saving, say
    tables.take_over(tmp_path / "one", tmp_path / "row", ["fit"])
    run = start_again(tmp_path / "row")
    run.config.lr = 0.7
    run.claim(["lr"], {"data": "abc"})
    assert run.finished(["fit"]) and read_json(tmp_path / "row" / "config.json", {})["config"] == {"lr": 0.7}
    os.replace(tmp_path / "row" / "last.pt", tmp_path / "row" / "last_prev.pt")
    tables.take_over(tmp_path / "one", tmp_path / "row", ["fit"])
    assert not (tmp_path / "row" / "last.pt").exists()                                   # its own previous one serves


# ---- numbers that are not finite ---------------------------------------------------------------------------------------

def test_a_stage_whose_last_steps_were_skipped_is_not_finished(tmp_path):
    run = start(tmp_path)
    model = nn.Linear(1, 1)
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    for bad, optimiser in zip(([3], [1]), optimisers):                                   # the last of four, and one before it
        steps = run.steps("fit", 4, {"model": model})
        try:
            for step in steps:
                run.update(model(torch.tensor([[float("nan") if step in bad else 1.0]])).sum(), optimiser)
        except RunError as error:
            assert bad == [3] and "fit: the last steps had no finite loss" in str(error) and not (tmp_path / "last.pt").exists()
        else:
            assert bad == [1] and run.finished(["fit"])


def test_weights_that_are_not_finite_do_not_replace_good_ones(tmp_path):
    run = start(tmp_path)
    model = nn.Linear(1, 1)
    run.keep("fit", 1, 3, {"model": model})
    before = (tmp_path / "last.pt").read_bytes()
    model.weight.data.fill_(float("inf"))
    with pytest.raises(RunError, match="fit: model holds values that are not finite; .*last.pt holds the last good state"):
        run.keep("fit", 2, 3, {"model": model})
    assert (tmp_path / "last.pt").read_bytes() == before


# ---- results, baselines, embeddings, latents -----------------------------------------------------------------------------

def test_changed_bits_in_arrays_are_noticed(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, prompts=np.array(["p", "q"]), pooled=np.arange(8.0).reshape(2, 4))
    assert files.read_arrays(path)["pooled"][1, 3] == 7
    raw = path.read_bytes()
    flip(path, raw.index(np.float64(5).tobytes()) + 3)
    with pytest.raises(RunError, match="a.npz is damaged or no .npz file .*checksum of pooled.npy differs"):
        files.read_arrays(path)
    with pytest.raises(ValueError, match="embeddings .*a.npz.*checksum"):
        load_embeddings(path)
    for content in (b"", raw[:-30], b"<html>", None):
        path.write_bytes(content) if content is not None else path.unlink()
        with pytest.raises(RunError, match="is damaged or no .npz"):
            files.read_arrays(path)
    (tmp_path / cohort.FILE).write_bytes(raw[:50])
    with pytest.raises(RunError, match="baselines.npz is damaged"):
        cohort.stored_baselines(tmp_path, "a->b", {"a": np.zeros((1, 4, 4))})


def test_changed_results_are_neither_compared_nor_used_again(tmp_path):
    run = finished(tmp_path)
    assert run.find_results() and tables.read_results(tmp_path / "results.json")[0]["rows"][0]["mean"] == 1.5
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace("1.75", "9.75"))
    assert run.find_results() is None
    with pytest.raises(RunError, match="its checksum differs.*delete .*results.json and its .npz, and evaluate"):
        tables.read_results(path)
    path.write_text(json.dumps({"rows": [{"task": "a"}], "data": "d", "phantom": True, "protocol": "p", "config": {}, "seed": 0}))
    with pytest.raises(RunError, match="parts of rows"):
        tables.read_results(path)


def test_results_of_another_version_are_used_with_a_notice(tmp_path, capsys, monkeypatch):
    run = finished(tmp_path)
    run.say_found(run.find_results())
    assert "version" not in capsys.readouterr().out
    monkeypatch.setattr("common.run.versions", lambda: {"project": "later"})
    run.say_found(run.find_results())
    assert "of this project made it; delete it to evaluate again" in capsys.readouterr().out


def test_a_file_that_the_config_names_belongs_to_the_run_by_its_content(tmp_path):
    @dataclasses.dataclass
    class Named:
        text_file: str = str(tmp_path / "text.npz")
        lr: float = 0.1
    (tmp_path / "text.npz").write_bytes(b"one")
    args = SimpleNamespace(out=tmp_path / "run", seed=None, device="cpu", precision="auto", train=False, typed={})
    run = Run("test", Named(), args)
    run.claim(["lr"], named_files(run.config))
    run.keep("fit", 1, 1, {})
    assert Run("test", Named(), args).settle(["lr"]) == Named()
    (tmp_path / "text.npz").write_bytes(b"two")
    with pytest.raises(RunError, match="the content of text_file has changed since .*run was trained"):
        Run("test", Named(), args).settle(["lr"])
    with pytest.raises(RunError, match="content of text_file was"):
        run.claim(["lr"], named_files(run.config))
    os.unlink(tmp_path / "text.npz")
    with pytest.raises(RunError, match="text.npz cannot be read"):
        Run("test", Named(), args).settle(["lr"])


def test_damaged_latents_are_encoded_again(tmp_path):
    path = tmp_path / "x.npy"
    array = np.arange(12, dtype=np.float16).reshape(3, 2, 2)
    np.save(path, array)
    assert autoencoder.open_latents(path, (3, 2, 2)) is None                             # as an older version wrote it
    with open(path, "ab") as file:
        file.write(autoencoder.crc_text(zlib.crc32(array)))
    np.testing.assert_array_equal(autoencoder.open_latents(path, (3, 2, 2)), array)
    flip(path, -12)
    assert autoencoder.open_latents(path, (3, 2, 2)) is None


def test_the_log_of_a_killed_process_can_be_drawn(tmp_path):
    run = start(tmp_path)
    lines = [json.dumps({"stage": "fit", "step": step, "loss": 0.5}) for step in range(4)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines[:2], lines[2][:20] + lines[3], "[]", "{}", *lines]))
    run.draw_training("fit")
    assert (tmp_path / "training.png").exists()


# ---- output and signals ----------------------------------------------------------------------------------------------------

@POSIX
@pytest.mark.parametrize("output", ["closed", "full"])
def test_a_lost_output_does_not_end_a_training(tmp_path, monkeypatch, output):
    run = start(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    lost = os.fdopen(writer, "w") if output == "closed" else open("/dev/full", "w")
    monkeypatch.setattr(sys, "stdout", lost)
    for live in (True, False):
        monkeypatch.setattr(lost, "isatty", lambda live=live: live)
        train(run, 5)
        run.stages.clear()
    run.say("end")
    lost.close()
    assert files.read_checkpoint(tmp_path / "last.pt")["stages"]["fit"]["finished"] and "end" in (tmp_path / "log.txt").read_text()


@POSIX
def test_a_closed_terminal_saves_and_nohup_is_respected(tmp_path):
    run = start(tmp_path)
    with pytest.raises(SystemExit) as end:
        for _ in run.steps("fit", 9, {}):
            signal.raise_signal(signal.SIGHUP)
    assert end.value.code == 129 and files.read_checkpoint(tmp_path / "last.pt")["stages"]["fit"]["step"] == 1
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = SimpleNamespace(stop=None)
        with loop.signals(run):
            os.kill(os.getpid(), signal.SIGHUP)
            assert run.stop is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


@POSIX
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)], ids=["term", "hup", "int"])
def test_signals_outside_of_a_training_end_with_their_status(number, status):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    with pytest.raises(SystemExit) as end:
        script.guarded(lambda: os.kill(os.getpid(), number))
    assert end.value.code == status and [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == handlers


# ---- errors that nobody thought of ---------------------------------------------------------------------------------------

def fault(run=None):
    if run is None:
        raise KeyError("patient\nname")
    with run:
        fault()


@pytest.mark.parametrize("guard", [script.guarded, cli.as_command], ids=["script", "command"])
def test_a_fault_of_the_program_is_one_line_and_its_traceback_is_kept(tmp_path, capsys, monkeypatch, guard):
    monkeypatch.setattr(sys, "argv", ["apt.py"])
    for run, seen in ((None, "--debug shows the traceback"), (start(tmp_path), f"{tmp_path / 'error.txt'} holds the traceback")):
        with pytest.raises(SystemExit) as end:
            guard(lambda run=run: fault(run))
        err = capsys.readouterr().err
        assert end.value.code == 1 and err.count("\n") == 1 and "a fault of the program (KeyError: 'patient" in err and seen in err
    assert "in fault" in (tmp_path / "error.txt").read_text() and "apt.py" in (tmp_path / "error.txt").read_text()
    monkeypatch.setattr(sys, "argv", ["apt.py", "--debug"])
    with pytest.raises(KeyError):
        guard(fault)


@pytest.mark.parametrize("error, text", [
    (MemoryError(), "out of memory"), (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    (PermissionError(13, "Permission denied", "x.png"), "x.png.*mend it"), (RunError("own words", status=2), "^error: own words\n$"),
    (DataError("data words"), "^error: data words\n$")], ids=["memory", "torch", "system", "run", "data"])
def test_errors_that_the_user_can_mend_leave_no_traceback(tmp_path, capsys, monkeypatch, error, text):
    monkeypatch.setattr(sys, "argv", ["apt.py"])

    def work():
        with start(tmp_path):
            raise error
    with pytest.raises(SystemExit) as end:
        script.guarded(work)
    err = capsys.readouterr().err
    assert end.value.code == getattr(error, "status", 1) and re.search(text, err) and not (tmp_path / "error.txt").exists()


def test_a_second_table_waits_for_the_first(tmp_path, monkeypatch):
    import apt
    monkeypatch.setattr(script, "reproduce", lambda *_: pytest.fail("it has started"))
    with files.lock(tmp_path, "lock-tables"), pytest.raises(RunError, match="is in use by process"):
        apt.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path), "--reproduce", "table3"])


# ---- data ------------------------------------------------------------------------------------------------------------------

def test_the_size_is_said_before_the_others_are_decoded(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("data.cache.shutil.disk_usage", lambda home: SimpleNamespace(free=3 * 10 ** 9))
    opened(make_set(tmp_path / "set"), say=lines.append)
    at = next(i for i, line in enumerate(lines) if "decoding 4 subjects" in line)
    assert "kB, and 3.0 GB are free" in lines[at] and "subjects decoded 4/4  ETA 0:00:00" in lines[at + 1]
    monkeypatch.setattr("data.cache.shutil.disk_usage", lambda home: SimpleNamespace(free=10))
    _, said = opened(tmp_path / "set", size=24)
    assert "more than is free; choose another folder with --cache" in said


def test_one_damaged_subject_does_not_end_a_synthesis_of_many(tmp_path):
    names = ("first", "n" * 240, "third", "torn")                                        # files get a shorter name
    for s, name in enumerate(names):
        save(tmp_path / "set" / name / "t1.nii.gz", head(seed=s))
    whole = tmp_path / "set" / "torn" / "t1.nii.gz"
    whole.write_bytes(whole.read_bytes()[:-300])
    subjects, said = find_layout(tmp_path / "set", ("t1", "t2")).subjects, []
    made = []
    with pytest.raises(DataError, match="1 of 4 subjects could not be synthesised .*torn.*the others are done"):
        for subject, _, _, slices, paths in to_synthesize(subjects, ["t1", "t2"], (), 20, tmp_path / "out", said.append):
            slices.write(paths["t2"], np.zeros((len(slices.images), 20, 20)), "x")
            made.append(subject.name[:5])
    assert sorted(made) == ["first", "nnnnn", "third"] and [line[:20] for line in said] == ["torn is left out: " + str(whole)[:2]]


def test_other_settings_than_those_of_the_volumes_are_said(tmp_path, capsys):
    run = start(tmp_path, M=100)
    run.stages = {"fit": {"step": 4}}
    for _ in range(2):
        script.notice_settings(run)
    assert "notice" not in capsys.readouterr().out
    run.config.M = 50
    run.stages["fit"]["step"] = 9
    script.notice_settings(run)
    assert "M was 100, now 50; steps of fit was 4, now 9) and stays; delete the folder" in capsys.readouterr().out


@POSIX
def test_pipes_and_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    folder = make_set(tmp_path / "set")
    os.mkfifo(folder / "BraTS2021_00000" / "BraTS2021_00000_seg.nii.gz")
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("00003"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refused)
    layout = find_layout(folder, None)
    notes = "\n".join(map(str, layout.notes))
    assert "seg.nii.gz: is a pipe or a device" in notes and "00003: cannot be read (Permission denied)" in notes
    assert len(layout.subjects) == 3


def test_a_phantom_is_made_although_a_killed_process_left_a_part(tmp_path):
    (tmp_path / f".brats.unfinished-{os.getpid()}").mkdir()                              # another container's, with our number
    phantom.make("brats", tmp_path / "brats", subjects=1, size=16, slices=1)
    assert (tmp_path / "brats" / "phantom.json").exists()


# ---- many damages and kills at random --------------------------------------------------------------------------------------

def spoil(path, g):
    """Change a byte or a block, or cut a file somewhere."""
    content = bytearray(path.read_bytes())
    place = g.randrange(len(content))
    how = g.choice(("byte", "byte", "block", "cut"))
    if how == "byte":
        content[place] ^= g.randrange(1, 256)
    elif how == "block":
        content[place:place + 4000] = g.randbytes(len(content[place:place + 4000]))
    else:
        del content[place:]
    path.write_bytes(content)
    return f"{path.name}: {how} at {place}"


@pytest.mark.parametrize("seed", range(6), ids=lambda seed: f"seed {seed}")
def test_random_damage_is_noticed_or_changes_nothing(tmp_path, seed):
    """A little run: checkpoint, config and results, ten damages each seed."""
    run, g = finished(tmp_path), random.Random(seed)
    stages, results = files.read_checkpoint(tmp_path / "last.pt")["stages"], tables.read_results(tmp_path / "results.json")
    whole = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "lock"}
    again = start(tmp_path)
    for _ in range(10):
        path = tmp_path / g.choice(("last.pt", "config.json", "results.json", "results.npz"))
        what = spoil(path, g)
        try:
            again.stages = {}
            again.load()
            again.claim(["lr"], {"data": "abc"})
            found = tables.read_results(tmp_path / "results.json")
        except (RunError, DataError) as error:
            assert "\n" not in str(error), what
        else:
            assert str(again.stages) == str(stages) and str(found) == str(results) and again.config_dict() == run.config_dict(), what
            assert read_json(tmp_path / "config.json", {})["identity"]["lr"] == 0.1, what
        for other, content in whole.items():
            assert other.exists(), what
            other.write_bytes(content)


TINY = ("--preset demo --size 32 --attention 16 --base 8 --groups 4 --head-dim 8 --mult 1,2 --encoder-steps 2 --encoder-batch 2 "
        "--mif-epochs 1 --steps 4 --batch 2 --N 3 --S 2 --test-slices 1").split()


@pytest.mark.slow
@POSIX
def test_kills_at_random_moments_change_nothing(tmp_path):
    """Decoding, training and evaluation in one command, killed six times; the last start ends as an undisturbed run does."""
    phantom.make("brats", tmp_path / "data", subjects=5, size=32, slices=3)
    g, scores = random.Random(1), []
    for name, kills in (("undisturbed", 0), ("killed", 6)):
        out = tmp_path / name / "run"
        words = [sys.executable, "-c", textwrap.dedent(toys.EAGER.format(script="apt")), "--data", tmp_path / "data", "--out", out, *TINY,
                 "--train", "--evaluate"]
        for _ in range(kills):
            process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            process.stdout.readline()
            try:
                process.communicate(timeout=g.random() * 4)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        scores.append((read_json(out / "results.json", {})["rows"], {path.name for path in (tmp_path / name).rglob("*")} - {"last_prev.pt"}))
    assert scores[0] == scores[1]
    ours, theirs = (toys.weights(tmp_path / name / "run") for name in ("undisturbed", "killed"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
