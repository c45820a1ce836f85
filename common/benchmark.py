"""How fast is a method on this machine?  Every stage of its training, and its sampler, are timed.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.
"""
import dataclasses
import tempfile
import time
from pathlib import Path

import torch

import data
from common.device import peak_gigabytes
from common.run import about_of
from common.trained import fill


def benchmark(method, cfg, run, ds, seconds=3.0):
    """Time every stage of the training and the sampler, as a user would run them.

    The sizes are those of the config.  Each stage runs for some seconds, on a few subjects, in a
    folder that is thrown away.
    """
    few = {part: names[:8] for part, names in ds.split.items()}
    ds = dataclasses.replace(ds, split=few)
    out = run.out
    with tempfile.TemporaryDirectory() as folder:
        run.out = Path(folder)
        run.stages = {}
        run.about = about_of(ds)
        run.seconds = seconds
        method.train(cfg, run, ds)
        for stage, found in run.measured.items():
            rate = found["batch"] / found["seconds"]
            speed = found["flops"] / found["seconds"] / 1e9
            run.say(f"{stage}: {1000 * found['seconds']:.1f} ms for a step of {found['batch']} "
                    f"slices, {rate:.1f} slices/s, "
                    f"data-wait {found['wait']:.1%}, {speed:.1f} GFLOP/s, "
                    f"peak {peak_gigabytes(run.device):.2f} GB")
        model = method.load(cfg, run, ds.subjects)
        contrasts = list(ds.contrasts)
        sources, missing = method.patterns(cfg, contrasts)[0]
        rows = ds.having(ds.rows("train"), [*sources, *missing])
        if getattr(model, "volumes", False):                            # one subject
            rows = rows[ds.subject[rows] == ds.subject[rows[0]]]
        else:
            rows = data.evenly(rows, cfg.sample_batch)                  # (B,)
        known = torch.tensor([c in sources for c in contrasts], device=run.device)  # (C,)
        u = run.fetch(ds.images, rows)                                  # (B, C, H, W)
        keys = ds.keys(rows)

        def sample():
            fill(model, u, known.expand(len(u), -1), keys)
        spent = seconds_per_call(run, sample, seconds)
        run.say(f"sampling: {spent:.2f} s for {len(u)} slices, {len(u) / spent:.3g} slices/s")
        if method.speed:
            method.speed(cfg, run, model)
    run.seconds = None
    run.out = out


def seconds_per_call(run, work, floor):
    """Return the seconds per call of work(), after one call to warm up.

    floor: work() is called again until so many seconds have passed.
    """
    finish = torch.cuda.synchronize if run.device.type == "cuda" else (lambda: None)
    work()
    finish()
    calls = 0
    begin = time.perf_counter()
    while calls == 0 or time.perf_counter() - begin < floor:
        work()
        finish()
        calls += 1
    return (time.perf_counter() - begin) / calls
