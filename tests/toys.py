"""What several tests of the scripts use: call a script as if typed, open what it trained, and compare weights."""
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import ROOT

import common.script
from common.run import Run
from common.script import guarded, open_data


def call(script, monkeypatch, capsys, *words):
    """Runs a script as if typed; returns (exit status, output)."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    status = 0
    try:
        guarded(script.main)
    except SystemExit as end:
        status = end.code or 0
    seen = capsys.readouterr()
    return status, seen.out + seen.err


def without_estimates(monkeypatch):
    """Leaves out the estimate of memory, which takes as long as a toy training.  test_limits.py holds it."""
    monkeypatch.setattr(common.script, "draw", lambda *about: None)
    monkeypatch.setattr(common.script, "require_memory", lambda *about: None)


def run(script, *words):
    """Runs a script in this process.  Returns what its log holds, which is what it said."""
    words = list(map(str, words))
    script.main(words)
    return (Path(words[words.index("--out") + 1]) / "log.txt").read_text(encoding="utf-8")


def open_run(script, data, out):
    """(config, run, data set) of a finished run, without its lock."""
    args = SimpleNamespace(data=data, out=out, cache=out.parent / "cache", seed=0, device="cpu", precision="fp32", train=False,
                           typed={}, workers=1, split=None, compile=False)
    run = Run(script.__name__, script.Config(), args)
    cfg = run.settle(script.SAMPLING)
    run.load()
    ds = open_data(script.METHOD, cfg, args, run)
    run.close()
    return cfg, run, ds


def flat(tree):
    """All tensors in nested dicts and lists, in order."""
    if torch.is_tensor(tree):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return [tensor for branch in branches for tensor in flat(branch)]


def weights(out):
    """All tensors of a run's checkpoint."""
    stages = torch.load(out / "last.pt", weights_only=True)["stages"]
    return [tensor for stage in stages.values() for tensor in flat(stage["parts"])]


# A program that runs script.py with its arguments and saves after every step.
EAGER = """
import sys, common.loop
clock = iter(range(0, 10 ** 9, 100))
common.loop.time.monotonic = lambda: next(clock)
import {script}, common.script
common.script.guarded({script}.main)
"""


def assert_kill_changes_nothing(script, data, out, undisturbed, stage, step, flags):
    """A training that is killed after `step` steps of a stage, and started again, ends with the bits of `undisturbed`."""
    words = [sys.executable, "-c", EAGER.format(script=script), "--data", str(data), "--out", str(out), *flags, "--train"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.time() + 120
    while time.time() < end and process.poll() is None:
        if (out / "last.pt").exists():
            stages = torch.load(out / "last.pt", weights_only=True)["stages"]
            if stages.get(stage, {}).get("step", 0) >= step:
                break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = weights(out), weights(undisturbed)
    assert len(ours) == len(theirs) > 100 and all(torch.equal(a, b) for a, b in zip(ours, theirs))
