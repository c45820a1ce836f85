"""The training loop of a stage: samples, updates, averaged weights, progress and signals.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

A script's loop reads
    for step in run.steps("diffusion", total, parts, batch):    # resumes, shows progress, saves
        rows = run.order("diffusion", n, batch, step)           # the same in every process
        loss = ...                                              # the science
        run.update(loss, optimiser)                             # backward pass and optimiser step
        run.log(loss=loss)
`run.steps` yields nothing if the stage is finished.
"""
import collections
import contextlib
import copy
import datetime
import json
import math
import os
import shutil
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from common.device import Machine, peak_gigabytes, seed_of
from common.files import RunError, append, restore

MAX_BAD_STEPS = 5           # a run ends after so many non-finite losses in a row
# SIGTERM is sent by schedulers and by `kill`, SIGHUP by a terminal that is closed.  Windows lacks
# the latter.
ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class EMA:
    """The exponential moving average of a module's parameters, in .model.

    Buffers are copied, not averaged.
    The decay warms up as (1 + step) / (10 + step), so that early averages are not dominated by the
    random start.
    """

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

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
    """A copy of the weights that had the lowest validation loss so far, in .model.

    The loss is part of the saved state.  It is infinite until weights were offered.
    """

    def __init__(self, model):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.loss = float("inf")

    def offer(self, model, loss):
        if loss < self.loss:
            self.loss = float(loss)
            self.model.load_state_dict(model.state_dict())

    def state_dict(self):
        return {"loss": self.loss, "model": self.model.state_dict()}

    def load_state_dict(self, state):
        self.loss = state["loss"]
        self.model.load_state_dict(state["model"])


def cosine_rate(optimiser, step, steps, peak, low=1e-5):
    """Set the learning rate of a step and return it.

    The rate follows half a cosine, from `peak` at step 0 to `low` at step `steps`.
    """
    low = min(low, peak)
    rate = low + (peak - low) * (1 + math.cos(math.pi * step / steps)) / 2
    for group in optimiser.param_groups:
        group["lr"] = rate
    return rate


class Loop(Machine):
    """The loop of a run.

    A subclass has say(text), keep(stage, step, total, parts), draw_training(stage), .args, .out
    and .stages.

    seconds     None, or the time after which every stage ends (for --benchmark)
    measured    {stage: facts of its pace}, filled where `seconds` is given
    preview     None, or a function that draws what the last stage makes so far; a long training
                calls it three times, a short one once
    last_stage  None, or the name of the last stage
    """

    def __init__(self, seed, device, precision):
        super().__init__(seed, device, precision)
        self.stop = None                                    # the signal that arrived
        self.sums = {}                                      # {name: (sum, count)} of logged numbers
        self.bad_steps = collections.Counter()              # bad steps in a row, of each optimiser
        self.told = set()                                   # (purpose, batch) of notices
        self.open_line = False                              # True if the last line is a bar
        self.seconds = None
        self.measured = {}
        self.preview = None
        self.last_stage = None

    def order(self, purpose, n, batch, step):
        """Return the rows (batch,) of step `step`.

        The steps walk through the n samples in shuffled passes.  Every sample comes once per pass.
        """
        if batch > n and (purpose, batch) not in self.told:
            self.told.add((purpose, batch))
            self.say(f"notice: {purpose}: a batch of {batch} is larger than the {n} training "
                     "samples, so one step sees some of them more than once")
        position = np.arange(step * batch, (step + 1) * batch)
        rows = np.empty(batch, dtype=np.int64)
        for turn in np.unique(position // n):
            g = np.random.default_rng(seed_of(self.seed, purpose, "order", int(turn)))
            shuffled = g.permutation(n)
            here = position // n == turn
            rows[here] = shuffled[position[here] % n]
        return rows

    def steps(self, stage, total, parts, batch=1):
        """Yields the steps of a stage that are still to do.

        parts: {name: object with state_dict and load_state_dict}, all that the stage trains.

        Raises RunError if the saved state does not fit the parts, and SystemExit after a signal.
        """
        start = 0
        saved = self.stages.get(stage)
        if saved:
            start = saved["step"]
            kept = saved["parts"]
            for name, part in parts.items():
                if saved["finished"] and name not in kept and isinstance(part, Optimizer):
                    continue                            # run.keep does without it
                where = f"{stage}/{name} in {self.out / 'last.pt'}"
                restore(part, kept.get(name, {}), where)
            if saved["finished"]:
                self.say(f"{stage}: finished ({start} steps), loaded from {self.out / 'last.pt'}")
                return
            self.say(f"{stage}: continues at step {start} of {total}")
        self.bad_steps.clear()
        meter = Meter(self, stage, start, total, batch)
        last_save = time.monotonic()
        save_cost = 0.0
        if start == total:
            # There is nothing to train, so the parts are kept as they are.
            self.keep(stage, start, total, parts)
        if self.seconds is not None:
            yield from self.trial(stage, total, parts, batch)
            return
        with signals(self):
            for step in range(start, total):
                yield step
                meter.tick(step)
                done = step + 1
                stop = self.agree(self.stop)
                if done == total and any(self.bad_steps.values()):
                    self.diverged(f"{stage}: the last steps had no finite loss")
                # A save may take 5 % of the time, and comes every minute at most.
                due = time.monotonic() - last_save > max(60, 20 * save_cost)
                # A preview takes seconds, so a short training has one only.
                looks = (total // 4, total // 2, 3 * total // 4) if total >= 1000 else (total // 2,)
                look = self.shows_previews(stage) and done in looks
                if stop or done == total or due or look:
                    before = time.monotonic()
                    self.draw_training(stage)               # first: a kill in between loses nothing
                    self.keep(stage, done, total, parts)
                    if look:
                        self.preview()
                    last_save = time.monotonic()
                    save_cost = last_save - before
                if stop:
                    # torchrun ends all processes when one leaves, so all wait for the save.
                    self.barrier()
                    self.leave(stop, f"{stage}: stopped after step {done} of {total}, saved; "
                                     "the same command continues")

    def shows_previews(self, stage):
        """Return True in the first process, in the last stage, and only if there is a preview.

        The last stage trains what the script is about.
        """
        return self.rank == 0 and self.preview is not None and stage == self.last_stage

    def trial(self, stage, total, parts, batch):
        """Yield some steps of a stage, to measure its pace.

        Two steps warm up and one counts operations.  Then steps run for .seconds.
        """
        counter = FlopCounterMode(display=False)
        done = 0
        for step in range(min(total, 2)):
            yield step
            done = step + 1
        if done < total:
            with counter:
                yield done
            done += 1
        self.waited = 0.0
        first = done
        begin = time.perf_counter()
        while done < total and (done < first + 3
                                or time.perf_counter() - begin < self.seconds):
            yield done
            done += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if done > first:
            seconds = (time.perf_counter() - begin) / (done - first)
            self.measured[stage] = {"seconds": seconds,
                                    "batch": batch,
                                    "flops": counter.get_total_flops(),
                                    "wait": self.waited / (done - first) / seconds}
        self.sums = {}
        self.keep(stage, total, total, parts)

    def leave(self, number, text):
        """End the program after a signal.  Raises SystemExit with the status that a shell expects.

        This is 130 for Ctrl-C, 143 for SIGTERM and 129 for SIGHUP.
        """
        self.say(text)
        raise SystemExit(128 + number)

    def update(self, loss, optimiser, max_norm=1.0, samples=None):
        """Go backward from the loss and do one step of the optimiser.  Returns the loss, detached.

        Gradients are averaged over processes and clipped to max_norm.  A loss or gradient that is
        not finite skips the step.  Raises RunError after MAX_BAD_STEPS such steps in a row.

        With `samples`, their number, the loss is a function: slice of the samples -> their mean
        loss.  It is called for parts of --micro-batch samples.  Gradients add up to those of the
        whole batch, so that only memory and time change.
        """
        optimiser.zero_grad(set_to_none=True)
        if samples is None:
            loss.backward()
        else:
            loss = self.backward_in_parts(loss, samples)
        params = []
        for group in optimiser.param_groups:
            params += [p for p in group["params"] if p.grad is not None]
        loss = loss.detach()
        if self.world > 1:
            # The processes talk once.  The loss goes along, so that all judge the step alike.
            flat = torch.cat([*(p.grad.reshape(-1) for p in params), loss.reshape(1)])
            dist.all_reduce(flat)
            *gradients, loss = flat.div_(self.world).split([*(p.numel() for p in params), 1])
            for p, gradient in zip(params, gradients):
                p.grad.copy_(gradient.view_as(p.grad))
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
        # This is the one point of a step where the program waits for the GPU.
        if torch.isfinite(norm + loss):
            self.bad_steps[id(optimiser)] = 0
            optimiser.step()
            return loss
        self.bad_steps[id(optimiser)] += 1
        bad = self.bad_steps[id(optimiser)]
        self.say(f"warning: loss or gradient is not finite, step skipped ({bad} in a row)")
        if bad >= MAX_BAD_STEPS:
            self.diverged(f"{MAX_BAD_STEPS} steps in a row had no finite loss")
        return loss

    def diverged(self, why):
        """Raises RunError, which says why and what to do.  Nothing is saved."""
        last = self.out / "last.pt"
        good = f"{last} holds the last good state; " if last.exists() else ""
        raise RunError(f"training diverged: {why}; {good}try a lower learning rate or "
                       "--precision fp32, in a new --out folder")

    def backward_in_parts(self, loss_of, samples):
        """Add up the gradients of all parts of a batch.  Returns the mean loss; see update."""
        size = getattr(self.args, "micro_batch", None) or samples
        total = 0.0
        for start in range(0, samples, size):
            part = slice(start, min(start + size, samples))
            loss = loss_of(part) * ((part.stop - part.start) / samples)
            loss.backward()
            total = total + loss.detach()
        return total

    def log(self, **numbers):
        """Note numbers of this step.

        Their mean is shown now and then.  Only then they are fetched from the device.
        """
        for name, value in numbers.items():
            value = value.detach().float() if torch.is_tensor(value) else float(value)
            total, n = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, n + 1)

    def batches(self, what, items, size):
        """Yields lists of up to `size` items and shows progress.

        A signal ends the program between two lists: SystemExit is raised.
        """
        begin = time.monotonic()
        shown = begin
        with signals(self):
            for start in range(0, len(items), size):
                yield items[start:start + size]
                now = time.monotonic()
                done = min(start + size, len(items))
                if self.stop:
                    self.leave(self.stop, f"{what}: stopped at {done} of {len(items)}; "
                                          "the same command starts it again")
                if now - shown > 10 or done == len(items):
                    left = (now - begin) * (len(items) - done) / done
                    self.say(f"{what} {done}/{len(items)}  ETA {clock(left)}")
                    shown = now


class Meter:
    """Shows the progress of a stage and writes it into log.jsonl.

    A terminal shows a bar.  Elsewhere there is a line every ten seconds.
    """

    def __init__(self, run, stage, start, total, batch):
        self.run = run
        self.stage = stage
        self.start = start
        self.total = total
        self.batch = batch
        self.live = sys.stdout.isatty()
        self.every = 0.5 if self.live else 10.0
        self.shown = time.perf_counter()
        self.shown_step = start
        self.origin = (self.shown, start)                   # the pace is measured from here
        run.waited = 0.0
        run.sums = {}

    def tick(self, step):
        """Note that step `step` is done."""
        now = time.perf_counter()
        done = step + 1
        run = self.run
        pace = (now - self.origin[0]) / (done - self.origin[1])             # seconds per step
        # The first step warms up.  It would spoil the ETA.
        if done == self.start + 1:
            self.origin = (now, done)
        if (now - self.shown < self.every and done < self.total) or run.rank > 0:
            return
        facts = {name: float(total) / n for name, (total, n) in run.sums.items()}
        facts["images/s"] = self.batch * (done - self.shown_step) / (now - self.shown)
        facts["wait"] = run.waited / (now - self.shown)
        facts["peak GB"] = peak_gigabytes(run.device)
        head = f"{self.stage} {done}/{self.total}  ETA {clock(pace * (self.total - done))}"
        text = "  ".join([head, *(f"{name} {value:.4g}" for name, value in facts.items())])
        # JSON has no NaN.
        numbers = {name: value if math.isfinite(value) else None for name, value in facts.items()}
        line = {"stage": self.stage, "step": done, "time": time_stamp(), **numbers}
        append(run.out / "log.jsonl", json.dumps(line) + "\n")
        if self.live:
            cells = int(20 * done / self.total)
            width = shutil.get_terminal_size().columns - 1
            bar = f"[{'#' * cells}{'.' * (20 - cells)}] {text}"
            show("\r" + bar[:width].ljust(width), end="")
            run.open_line = done < self.total
            if done == self.total:
                show("")
        else:
            run.say(text)
        self.shown = now
        self.shown_step = done
        run.waited = 0.0
        run.sums = {}


def clock(seconds):
    """Write seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))


def time_stamp():
    """Return the local time, to the second."""
    return datetime.datetime.now().isoformat(sep=" ", timespec="seconds")


def show(text, end="\n"):
    """Print.  If the output is closed or full, nothing is shown from then on, and the run goes on.

    This happens if a terminal is closed, or after `| head`.
    """
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def handled(note, numbers):
    """Let note(number, frame) receive these signals.  A signal that is ignored stays so (nohup)."""
    old = {}
    try:
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:
                old[number] = signal.signal(number, note)
    except ValueError:
        pass            # this is not the main thread, so signals are somebody else's business
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals(run):
    """Let Ctrl-C, SIGTERM and SIGHUP set run.stop, so that the loop ends after its step.

    A second Ctrl-C ends the program at once: KeyboardInterrupt is raised.
    """
    def note(number, frame):
        # A second SIGTERM does not count.  Launchers send it again while the run saves.
        if run.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stop = run.stop or number
    with handled(note, (signal.SIGINT, *ENDINGS)):
        yield
