"""The boring parts of a run, one line each in the scripts: folder, lock, log, device, checkpoint, exact resume, EMA, torchrun.

A training loop reads
    for step in run.steps("diffusion", total, parts):      # resumes, shows progress, saves; yields nothing if finished
        rows = run.order("diffusion", n, batch, step)      # which samples, the same on every rank
        loss = ...                                         # the science
        run.update(loss, optimiser)                        # backward, average over ranks, NaN guard, clip, step
        run.log(loss=loss)

Randomness is counted, not stored: every generator is derived from (seed, purpose, counters), so that a run killed at any
moment and started again ends, on a CPU, with the same bits as one that was never disturbed.
"""
import collections
import contextlib
import copy
import dataclasses
import datetime
import errno
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import socket
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

FORMAT = 1                  # of the checkpoint; a reader refuses what it does not know
MAX_BAD_STEPS = 5           # so many non-finite losses in a row end the run


class RunError(Exception):
    """Something the user can mend; the message is one line: what, where, why, what to do.  status: of the process."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def seed_of(*parts):
    """A 63-bit seed from any mix of numbers and strings, the same on every machine (unlike hash())."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little") >> 1


class EMA:
    """Exponential moving average of a module's parameters, in .model.  Buffers are copied, not averaged.

    The decay warms up as (1 + step) / (10 + step), so that early averages are not dominated by the random start.
    """

    def __init__(self, model, decay):
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers()):
            mine.copy_(theirs)

    def state_dict(self):
        return self.model.state_dict()

    def load_state_dict(self, state):
        self.model.load_state_dict(state)


class Best:
    """A copy of the weights that had the lowest validation loss so far, in .model; the loss is part of the saved state."""

    def __init__(self, model):
        self.model, self.loss = copy.deepcopy(model).eval().requires_grad_(False), float("inf")

    def offer(self, model, loss):
        if loss < self.loss:
            self.loss = float(loss)
            self.model.load_state_dict(model.state_dict())

    def state_dict(self):
        return {"loss": self.loss, "model": self.model.state_dict()}

    def load_state_dict(self, state):
        self.loss = state["loss"]
        self.model.load_state_dict(state["model"])


class Run:
    """A run folder and the process (or processes) working in it.

    out       folder; holds config.json, log.txt, log.jsonl, last.pt, last_prev.pt and what the script writes; it is made
              and locked if args ask for training, evaluation or synthesis: nothing else writes into it
    device    torch.device;  precision "fp32" or "bf16";  rank, world  of torchrun (0, 1 without it)
    about     plain facts that go into every checkpoint (contrasts, data fingerprint, training subjects, ...)
    facts     plain facts that belong to results: on which data, on whom
    stages    {name: {"step", "total", "finished", "parts": {name: state_dict}}}: what the checkpoint knows
    """

    def __init__(self, script, config, args):
        self.script, self.config, self.args, self.out, self.seed = script, config, args, Path(args.out), args.seed or 0
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device, device_why = pick_device(args.device)
        self.precision, precision_why = pick_precision(args.precision, self.device)
        self.about, self.facts, self.stages = {}, {}, {}
        self.stop, self.waited, self._sums, self._lock = None, 0.0, {}, None
        self.bad_steps = collections.Counter()              # of each optimiser, in a row
        self._fell_back = self._open_line = False
        if self.rank == 0 and any(getattr(args, work, False) for work in ("train", "evaluate", "synthesize")):
            self._lock = lock(self.out)
            for stale in self.out.glob("*.tmp"):            # left behind by a save that was killed
                stale.unlink()
        if self.world > 1:
            join_processes(self.device)
            dist.barrier()                                  # what process 0 prepared in the folder is there for all
        self.say(f"device: {self.device} ({device_why}); precision: {self.precision} ({precision_why})"
                 + (f"; {self.world} processes" if self.world > 1 else ""))

    # -- talking --------------------------------------------------------------------------------------------------

    def say(self, text=""):
        """Print a line and keep it in log.txt (first process only)."""
        if self.rank == 0:
            print("\n" + text if self._open_line else text, flush=True)     # below a progress bar, not behind it
            self._open_line = False
            if self._lock:
                with open(self.out / "log.txt", "a", encoding="utf-8", errors="replace") as f:
                    f.write(text + "\n")

    def write_json(self, name, content):
        if self.rank == 0:
            replace(self.out / name, lambda tmp: tmp.write_text(json.dumps(content, indent=1), encoding="utf-8"))

    # -- randomness and order -------------------------------------------------------------------------------------

    def generator(self, *purpose):
        """A generator on the run's device, derived from the seed and `purpose` (words and counters)."""
        return torch.Generator(self.device).manual_seed(seed_of(self.seed, *purpose))

    def order(self, purpose, n, batch, step):
        """Rows (batch,) of step `step`: shuffled passes over n samples, every sample once per pass."""
        position = np.arange(step * batch, (step + 1) * batch)
        rows = np.empty(batch, dtype=np.int64)
        for turn in np.unique(position // n):
            shuffled = np.random.default_rng(seed_of(self.seed, purpose, "order", int(turn))).permutation(n)
            here = position // n == turn
            rows[here] = shuffled[position[here] % n]
        return rows

    def shard(self, batch):
        """The slice of a global batch that this process works on."""
        if batch % self.world:
            raise RunError(f"a batch of {batch} cannot be shared equally by {self.world} processes; change --batch", status=2)
        each = batch // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def fetch(self, images, rows):
        """images[rows] (float16, memory-mapped) as a float32 batch on the device, channels last; the wait is counted."""
        start = time.perf_counter()
        batch = torch.from_numpy(np.asarray(images[np.asarray(rows)], dtype=np.float32))
        batch = batch.to(self.device, memory_format=torch.channels_last)
        self.waited += time.perf_counter() - start
        return batch

    def autocast(self):
        """bf16 for the network's matrix products if so chosen; losses and samplers stay outside."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    # -- the loop -------------------------------------------------------------------------------------------------

    def steps(self, stage, total, parts, batch=1):
        """Yields the steps of a stage that are still to do.  parts: {name: object with state_dict and load_state_dict}."""
        saved = self.stages.get(stage)
        start = 0
        if saved:
            start = saved["step"]
            for name, part in parts.items():
                restore(part, saved["parts"].get(name, {}), f"{stage}/{name} in {self.out / 'last.pt'}")
            if saved["finished"]:
                self.say(f"{stage}: finished ({start} steps), loaded from {self.out / 'last.pt'}")
                return
            self.say(f"{stage}: continues at step {start} of {total}")
        meter = Meter(self, stage, start, total, batch)
        last_save, save_cost = time.monotonic(), 0.0
        if start == total:                                  # nothing to train is asked for: the parts as they are
            self.keep(stage, start, total, parts)
        with signals(self):
            for step in range(start, total):
                yield step
                meter.tick(step)
                done, stop = step + 1, self.agree_to_stop()
                # a save may take 5 % of the time, and comes every minute at most
                if stop or done == total or time.monotonic() - last_save > max(60, 20 * save_cost):
                    before = time.monotonic()
                    self.keep(stage, done, total, parts)
                    last_save, save_cost = time.monotonic(), time.monotonic() - before
                if stop:
                    self.barrier()                          # torchrun ends all when one leaves: not before the save
                    self.leave(stop, f"{stage}: stopped after step {done} of {total}, saved; the same command continues")

    def agree_to_stop(self):
        """The signal that any process got, or None.  All must leave after the same step, else one waits for the others."""
        if self.world == 1:
            return self.stop
        flag = torch.tensor(self.stop or 0, device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag) or None

    def leave(self, number, text):
        """End the program after a signal, as the shell expects it: 130 for Ctrl-C, 143 for SIGTERM."""
        self.say(text)
        raise SystemExit(128 + number)

    def update(self, loss, optimiser, max_norm=1.0):
        """Backward pass, gradients averaged over processes, clipped, one optimiser step.

        A loss or gradient that is not finite skips the step; MAX_BAD_STEPS of them in a row raise RunError.
        """
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        params, loss = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None], loss.detach()
        if self.world > 1:      # one all-reduce; the loss goes along, so that all processes judge the step alike
            flat = torch.cat([*(p.grad.reshape(-1) for p in params), loss.reshape(1)])
            dist.all_reduce(flat)
            *gradients, loss = flat.div_(self.world).split([*(p.numel() for p in params), 1])
            for p, gradient in zip(params, gradients):
                p.grad.copy_(gradient.view_as(p.grad))
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
        if torch.isfinite(norm + loss):                     # the one point of a step where the GPU is waited for
            self.bad_steps[id(optimiser)] = 0
            optimiser.step()
            return
        self.bad_steps[id(optimiser)] += 1
        self.say(f"warning: loss or gradient is not finite, step skipped ({self.bad_steps[id(optimiser)]} in a row)")
        if self.bad_steps[id(optimiser)] >= MAX_BAD_STEPS:
            last = self.out / "last.pt"
            raise RunError(f"training diverged: {MAX_BAD_STEPS} steps in a row had no finite loss; "
                           + (f"{last} holds the last good state; " if last.exists() else "")
                           + "try a lower learning rate or --precision fp32, in a new --out folder")

    def log(self, **numbers):
        """Numbers of this step; they are averaged and shown (and only then fetched from the device) now and then."""
        for name, value in numbers.items():
            value = value.detach().float() if torch.is_tensor(value) else float(value)
            total, n = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, n + 1)

    # -- checkpoint -----------------------------------------------------------------------------------------------

    def keep(self, stage, step, total, parts):
        """Write the checkpoint: every stage so far, this one at `step`.  The previous file stays as last_prev.pt."""
        self.stages[stage] = {"step": step, "total": total, "finished": step == total,
                              "parts": {name: part.state_dict() for name, part in parts.items()}}
        if self.rank == 0:
            content = {"format": FORMAT, "script": self.script, "config": self.config_dict(), "seed": self.seed,
                       "about": self.about, "stages": self.stages}
            # a damaged last.pt must not take the place of the good last_prev.pt
            replace(self.out / "last.pt", lambda tmp: torch.save(content, tmp),
                    keep=None if self._fell_back else self.out / "last_prev.pt")
            self._fell_back = False

    def config_dict(self):
        return json.loads(json.dumps(self.config.__dict__))                 # tuples become lists, as in the file

    def finished(self, stages):
        """True if all these stages are finished in the checkpoint."""
        return all(self.stages.get(stage, {}).get("finished") for stage in stages)

    def load(self):
        """Read last.pt (or, if that is damaged, last_prev.pt) into .about and .stages.  False if there is none."""
        paths = [path for path in (self.out / "last.pt", self.out / "last_prev.pt") if path.exists()]
        for path in paths:
            try:
                content = read_checkpoint(path)
                break
            except RunError as error:
                if path == paths[-1]:
                    raise
                self.say(f"warning: {error}; using last_prev.pt")
                self._fell_back = True
        else:
            return False
        if content["script"] != self.script:
            raise RunError(f"{self.out / 'last.pt'} belongs to {content['script']}.py, not to {self.script}.py; "
                           "choose another --out")
        self.about, self.stages = content["about"], content["stages"]
        return True

    def settle(self, free):
        """Without --train, what the folder's run was trained and sampled with stands in for flags that were not typed.

        free: fields that may differ from the training's; RunError if another one does.
        """
        if not self.args.train:
            self.config, self.seed = stored_config(self.out, self.config, self.args, free)
        return self.config

    def claim(self, fields, about):
        """Check that this folder's run is the same one (`fields` of the config and `about`), else stop and name what differs.

        A run that has saved nothing yet may change: it may have failed for its flags.  Afterwards config.json stays.
        """
        mine = {**{f: self.config_dict()[f] for f in fields}, "seed": self.seed, **about}
        path = self.out / "config.json"
        self.about = {**self.about, **about}
        if path.exists() and self.stages:
            theirs = json.loads(path.read_text(encoding="utf-8"))["identity"]
            differ = [f"{k} was {json.dumps(theirs.get(k))[:60]}, now {json.dumps(v)[:60]}"
                      for k, v in mine.items() if theirs.get(k) != v]
            if differ:
                raise RunError(f"{self.out} holds a run with another configuration: {'; '.join(differ)}; "
                               "use the old values or another --out")
            return
        self.barrier()                                      # others may still read it
        self.write_json("config.json", {"script": self.script, "command": " ".join(sys.argv), "identity": mine,
                                        "config": self.config_dict(), "versions": versions()})

    def works_on(self, ds):
        """Results will say that they belong to this data.Dataset and its test subjects."""
        self.facts = {"data": str(ds.folder), "phantom": ds.phantom, "fingerprint": ds.fingerprint, "test": ds.split["test"]}

    def claim_for(self, ds, free):
        """Claim the folder for training on a data.Dataset; only the fields in `free` may differ from what is there."""
        about = {"contrasts": list(ds.contrasts), "data": ds.fingerprint, "train": sorted(ds.split["train"]),
                 "val": sorted(ds.split["val"])}
        self.claim([field for field in vars(self.config) if field not in free], about)
        self.write_json("split.json", ds.split)

    def refuse_seen(self, ds):
        """RunError if a test subject of this data.Dataset was trained on, or chose the weights."""
        seen = sorted({*self.about["train"], *self.about["val"]} & set(ds.split["test"]))
        if seen:
            raise RunError(f"{len(seen)} test subjects served the training ({', '.join(seen[:3])}, ...); give the same --split")

    # -- results and long work outside of training ----------------------------------------------------------------

    def batches(self, what, items, size):
        """Yields lists of up to `size` items, shows progress, and ends the program between two if a signal came."""
        begin = shown = time.monotonic()
        with signals(self):
            for start in range(0, len(items), size):
                yield items[start:start + size]
                now, done = time.monotonic(), min(start + size, len(items))
                if self.stop:
                    self.leave(self.stop, f"{what}: stopped at {done} of {len(items)}; the same command starts it again")
                if now - shown > 10 or done == len(items):
                    self.say(f"{what} {done}/{len(items)}  ETA {clock((now - begin) * (len(items) - done) / done)}")
                    shown = now

    def results(self, rows, images, protocol):
        """results.json: rows of numbers with all that is needed to know where they come from; results.npz: images.

        Files with other settings, another seed or other facts are kept under a number.
        """
        if self.rank > 0:
            return
        path, identity = self.out / "results.json", {"config": self.config_dict(), "seed": self.seed, **self.facts}
        if path.exists() and not same_results(path, identity):
            names = (self.out / f"results_{number}.json" for number in itertools.count(1))
            kept = next(name for name in names if not name.exists())
            for suffix in (".npz", ".json"):                # the numbers last: they count only together with the images
                if path.with_suffix(suffix).exists():
                    os.replace(path.with_suffix(suffix), kept.with_suffix(suffix))
            self.say(f"the results of another configuration are kept as {kept.name}")

        def save(temporary):
            with open(temporary, "wb") as f:                # given a name, numpy would add .npz to it
                np.savez_compressed(f, **images)
        replace(path.with_suffix(".npz"), save)
        self.write_json("results.json", {"script": self.script, "command": " ".join(sys.argv), **identity,
                                         "versions": versions(), "protocol": protocol, "rows": rows})

    def find_results(self):
        """The newest results.json in this folder that has this configuration, seed and facts, and its images; or None."""
        identity = {"config": self.config_dict(), "seed": self.seed, **self.facts}
        paths = sorted(self.out.glob("results*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        return next((path for path in paths if same_results(path, identity) and path.with_suffix(".npz").exists()), None)

    def flops(self, work):
        """Floating-point operations of work(), counted by torch (a multiply-add is two)."""
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    def outline(self, networks, forward, images):
        """For a dry run: the resolved config, sizes, and what training costs.

        networks: {name: module}; forward(): one image through the trained network; images: how many it will see in training.
        """
        self.say("\n".join(f"  {name} = {value}" for name, value in self.config_dict().items()))
        for name, network in networks.items():
            self.say(f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters")
        flops = 3 * self.flops(forward) * images            # the backward pass costs twice the forward pass
        self.say(f"training: {flops:.2g} FLOP, about {flops / 1e11 / 3600:.2g} h at 100 GFLOP/s (a laptop), "
                 f"{flops / 1e14 / 3600:.2g} h at 100 TFLOP/s (a large GPU, bf16)")
        self.say("this was a dry run: add --train, --evaluate, --synthesize, --check or --benchmark")

    def time(self, what, work, images, flops, floor=3.0):
        """Seconds per call of work(), over `floor` seconds after a warm-up; flops: per image, for the achieved rate."""
        finish = torch.cuda.synchronize if self.device.type == "cuda" else (lambda: None)
        work()
        work()
        finish()
        self.waited, calls, begin = 0.0, 0, time.perf_counter()
        while time.perf_counter() - begin < floor or calls < 3:
            work()
            calls += 1
            finish()
        seconds = (time.perf_counter() - begin) / calls
        self.say(f"{what}: {1000 * seconds:.1f} ms for {images} slices, {images / seconds:.1f} slices/s, "
                 f"data-wait {self.waited / calls / seconds:.1%}, {flops * images / seconds / 1e9:.1f} GFLOP/s, "
                 f"peak {peak_gigabytes(self.device):.2f} GB")
        return seconds

    # -- several processes ----------------------------------------------------------------------------------------

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def first(self, work):
        """work() in process 0 before the others (who then find what it made); its result, in each process."""
        if self.rank > 0:
            self.barrier()
        result = work()
        if self.rank == 0:
            self.barrier()
        return result

    def gather(self, items):
        """The lists of all processes joined, in every process."""
        if self.world == 1:
            return items
        lists = [None] * self.world
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def close(self):
        """Give the folder free, when all processes are done with it."""
        self.barrier()
        if self._lock:
            self._lock.close()


class Meter:
    """Progress of a stage: a bar on a terminal, else a line every ten seconds; also into log.jsonl."""

    def __init__(self, run, stage, start, total, batch):
        self.run, self.stage, self.total, self.batch = run, stage, total, batch
        self.live = sys.stdout.isatty()
        self.every = 0.5 if self.live else 10.0
        self.shown, self.shown_step = time.perf_counter(), start
        self.start, self.origin = start, (self.shown, start)                # origin: where the pace is measured from
        run.waited, run._sums = 0.0, {}

    def tick(self, step):
        now, done, run = time.perf_counter(), step + 1, self.run
        pace = (now - self.origin[0]) / (done - self.origin[1])             # seconds per step
        if done == self.start + 1:                          # the first step compiles and warms up; it would spoil the ETA
            self.origin = now, done
        if (now - self.shown < self.every and done < self.total) or run.rank > 0:
            return
        facts = {name: float(total) / n for name, (total, n) in run._sums.items()}
        facts["images/s"] = self.batch * (done - self.shown_step) / (now - self.shown)
        facts["wait"] = run.waited / (now - self.shown)
        facts["peak GB"] = peak_gigabytes(run.device)
        text = "  ".join([f"{self.stage} {done}/{self.total}", *(f"{name} {value:.4g}" for name, value in facts.items()),
                          f"ETA {clock(pace * (self.total - done))}"])
        numbers = {name: value if math.isfinite(value) else None for name, value in facts.items()}      # JSON has no NaN
        with open(run.out / "log.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps({"stage": self.stage, "step": done, **numbers}) + "\n")
        if self.live:
            cells, width = int(20 * done / self.total), shutil.get_terminal_size().columns - 1
            print("\r" + f"[{'#' * cells}{'.' * (20 - cells)}] {text}"[:width].ljust(width), end="", flush=True)
            run._open_line = done < self.total
            if done == self.total:
                print(flush=True)
        else:
            run.say(text)
        self.shown, self.shown_step, run.waited, run._sums = now, done, 0.0, {}


# -- small helpers ------------------------------------------------------------------------------------------------

def pick_device(wanted):
    """"auto": CUDA, else Apple's MPS, else CPU.  Asking for what is absent raises RunError, never a silent fallback."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted != "auto" and not found[wanted]:
        raise RunError(f"--device {wanted}: this machine or this build of torch ({torch.__version__}) has none; "
                       "use --device auto or cpu")
    kind = wanted if wanted != "auto" else next(k for k in ("cuda", "mps", "cpu") if found[k])
    why = "asked for" if wanted != "auto" else "the best found"
    if kind == "cuda":
        local, cards = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= cards:
            raise RunError(f"process {local + 1} on this machine has no GPU of its own, there are {cards}; "
                           f"use --nproc_per_node={cards} or --device cpu")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True               # one image size per run: worth the search
        return device, f"{why}: {torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return torch.device(kind), f"{why}; torch {torch.__version__}, {torch.get_num_threads()} threads"


def pick_precision(wanted, device):
    """"auto": bf16 on CUDA cards that have it, else fp32.  fp16 is not offered: it overflows and needs loss scaling."""
    if wanted == "auto":
        good = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this card computes it natively") if good else ("fp32", f"the safe choice on {device.type}")
    return wanted, "asked for"


def join_processes(device):
    """torchrun's processes find each other."""
    if device.type == "mps":
        raise RunError("several processes cannot share Apple's GPU; use --device cpu, or start one process")
    if os.name == "nt":
        os.environ.setdefault("USE_LIBUV", "0")             # torch for Windows is built without it
    if not dist.is_initialized():                           # one program may work in several folders in turn
        # the others wait while the first one reads a large data set for the first time
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))


def restore(part, state, where):
    """part.load_state_dict(state), strictly, with one line instead of a page when it does not fit."""
    for value in state.values():
        if torch.is_tensor(value) and value.is_floating_point() and not torch.isfinite(value).all():
            raise RunError(f"{where} holds values that are not finite; use last_prev.pt or train again")
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        first = " ".join(str(error).split())[:160]
        raise RunError(f"{where} does not fit this configuration ({first}); use the flags it was trained with") from error


def peak_gigabytes(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        import resource
    except ImportError:                                     # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def versions():
    packages = ("torch", "numpy", "scipy", "nibabel", "pillow")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def clock(seconds):
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def lock(folder):
    """Make the folder and hold an operating-system lock on folder/lock, which vanishes with the process, however that ends.

    On a file system without locks (some of those of clusters) there is none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / "lock", "a+", encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write into the run folder {folder}: {error.strerror}; choose another --out") from error
    try:
        if os.name == "nt":
            import msvcrt
            os.lseek(handle.fileno(), 2 ** 30, os.SEEK_SET) # Windows forbids reading what is locked: not the holder's name
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            handle.close()
            raise RunError(f"{folder} is in use by {holder}; wait for it to end, or choose another --out") from None
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}")
    handle.flush()
    return handle


@contextlib.contextmanager
def signals(run):
    """Ctrl-C and SIGTERM set run.stop, so that the loop ends after the step; a second Ctrl-C ends at once."""
    def note(number, frame):
        if run.stop and number == signal.SIGINT:            # not SIGTERM: launchers send it again while the run saves
            raise KeyboardInterrupt
        run.stop = run.stop or number
    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:                                      # not in the main thread: signals are somebody else's business
        yield
        return
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def replace(path, write, keep=None):
    """Write a file so that it is never half there: temporary name, fsync, rename.  `keep`: name for the old one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2 ** 20
        raise RunError(f"cannot write {path}: {str(error).splitlines()[0]} ({free:.0f} MB free); "
                       "the previous file is untouched; make room and run the same command again") from error


def stored_config(folder, config, args, free):
    """What a run folder's config.json says, changed by the flags that were typed -> (config, seed); see Run.settle."""
    path = folder / "config.json"
    if not path.exists() or not any((folder / name).exists() for name in ("last.pt", "last_prev.pt")):
        return config, args.seed or 0                       # nothing was trained under it
    stored = json.loads(path.read_text(encoding="utf-8"))
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in stored["config"].items()}
    known = {f.name: values[f.name] for f in dataclasses.fields(config) if f.name in values}
    differ = [f"{k} was {known.get(k)}, now {v}" for k, v in args.typed.items() if k not in free and known.get(k) != v]
    if differ:
        raise RunError(f"{folder} was trained otherwise: {'; '.join(differ)}; leave that out, or train in another --out",
                       status=2)
    try:
        config = dataclasses.replace(config, **{**known, **args.typed})
    except ValueError as error:                             # what was typed does not go with what was trained
        raise RunError(f"{error} (the other values come from {path})", status=2) from error
    return config, stored["identity"]["seed"] if args.seed is None else args.seed


def same_results(path, identity):
    """True if a results.json was made with this configuration, seed and facts."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return all(content[key] == value for key, value in identity.items())
    except (ValueError, KeyError, TypeError):               # somebody else's file, or one edited by hand
        return False


def read_checkpoint(path):
    """The content of a checkpoint, on the CPU.  Loading cannot run code (weights_only).  Raises RunError with a sentence."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:          # torch raises many kinds; each means that the file is not ours or damaged
        raise RunError(f"{path} is damaged or not a checkpoint of this project ({type(error).__name__}); "
                       "restore or delete it") from error
    if not isinstance(content, dict) or "stages" not in content:
        raise RunError(f"{path} is not a checkpoint of this project (it holds {type(content).__name__}); choose another --out")
    if content.get("format") != FORMAT:
        raise RunError(f"{path} has checkpoint format {content.get('format')}, this version reads {FORMAT}; "
                       "train again or use the version that wrote it")
    return content


def guarded(main, *errors):
    """Run main(); what the user can mend becomes one line and exit status 1 (traceback only with --debug)."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")            # a subject's name must not end a run on an old console
    try:
        main()
        if dist.is_available() and dist.is_initialized():
            dist.barrier()                                  # nobody leaves while another still talks
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)         # taking torch's communication threads down in the usual way now and then aborts a process
    except (RunError, torch.OutOfMemoryError, OSError, *errors) as error:
        if "--debug" in sys.argv:
            raise
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            text = "out of GPU memory; in this order: a smaller --batch or --sample-batch, --precision bf16, a smaller --size"
        elif isinstance(error, OSError):                    # a log line on a full disk, a picture in a read-only folder
            text = f"{text}; mend it and run the same command again (--debug shows where it happened)"
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(getattr(error, "status", 1)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
