"""A run folder, with its configuration, log, checkpoint and results.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

A run is what it contains: its configuration, its seed, and the identity of its data.  The same
command in the same folder continues it exactly.  Another configuration is refused with the names of
what differs.
"""
import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
import traceback
from pathlib import Path

import numpy as np
import torch

from common import pictures
from common.device import versions
from common.files import (
    FORMAT,
    RunError,
    all_finite,
    append,
    checkpoints,
    crc_of,
    lock,
    read_newest,
    replace,
    restore,
    sentence_of,
)
from common.loop import Loop, show, time_stamp
from data.files import DataError, json_text, read_json, remove_unfinished


class Run(Loop):
    """A run folder and the process (or processes) working in it.

    out       folder that holds config.json, log.txt, log.jsonl, last.pt, last_prev.pt and what the
              script writes
    about     plain facts that go into every checkpoint, such as contrasts, identity of the data and
              training subjects
    facts     plain facts that belong to results, such as the data and the test subjects
    stages    what the checkpoint knows:
              {name: {"step", "total", "finished", "parts": {name: state_dict}}}

    The folder is made and locked if args ask for training, evaluation or synthesis.  Nothing else
    writes into it.

    Raises RunError if the folder is in use or cannot be written, or if the device is absent.
    """

    def __init__(self, script, config, args):
        super().__init__(args.seed or 0, args.device, args.precision)
        self.script = script
        self.config = config
        self.args = args
        self.out = Path(args.out)
        self.about = {}
        self.facts = {}
        self.stages = {}
        self.trained_fields = {}            # of the config that the checkpoint was made with
        self.lock = None
        self.extensible = ()                # fields that may be raised to train further
        self.fell_back = False              # True if last_prev.pt is used, as last.pt was damaged
        self.used = set()                   # (stage, name) of the states that sampling needs
        writes = any(getattr(args, work, False) for work in ("train", "evaluate", "synthesize"))
        if writes and not getattr(args, "train", False) and not self.out.exists():
            raise RunError(f"{self.out} does not exist, so it holds no trained model; add --train, "
                           "or name the folder of a run with --out")
        if self.rank == 0 and writes:
            self.lock = lock(self.out)
            remove_unfinished(self.out, locked=True)
            for folder in (*self.out.glob("*/"), *self.out.glob("synthetic/**/")):
                remove_unfinished(folder)
        # From here on, what process 0 prepared in the folder is there for all.
        self.join()
        if not getattr(args, "quiet", False):
            self.say(self.facts_line)

    # -- talking -----------------------------------------------------------------------------------

    def say(self, text=""):
        """Print a line, and keep it with the time in log.txt.  Only the first process does so."""
        if self.rank > 0:
            return
        # The text goes below a progress bar, not behind it.
        show("\n" + text if self.open_line else text)
        self.open_line = False
        if self.lock:
            append(self.out / "log.txt", f"{time_stamp()}  {text}\n")

    def write_json(self, name, content, checked=False):
        """Write a file of the folder, whole or not at all.  Only the first process does so.

        checked: True adds a checksum, for files that are read again; see data.files.read_json.

        Raises RunError if it cannot be written.
        """
        if self.rank == 0:
            text = json_text(content) if checked else json.dumps(content, indent=1)
            replace(self.out / name, lambda tmp: tmp.write_text(text, encoding="utf-8"))

    # -- configuration -----------------------------------------------------------------------------

    def config_dict(self):
        """Return the configuration as JSON has it, with lists in place of tuples."""
        return json.loads(json.dumps(self.config.__dict__))

    def settle(self, free):
        """Take the flags that were not typed from the folder's run, unless --train is given.

        free: fields that may differ from those of the training.

        Returns the configuration.  Raises RunError if another field differs, or if a typed flag
        does not go with the others.
        """
        if not self.args.train:
            self.config, self.seed = stored_config(self.out, self.config, self.args, free)
        return self.config

    def claim(self, fields, about, extensible=()):
        """Check that this folder's run is the same one, by `fields` of the config and by `about`.

        A run that has saved nothing yet may change, as its flags may have been the reason.
        Afterwards config.json stays.  Only `extensible` fields may be raised.  The last stage then
        goes on.

        Raises RunError, which names what differs.
        """
        self.extensible = extensible
        mine = {**{f: self.config_dict()[f] for f in fields}, "seed": self.seed, **about}
        stored = trained_with(self.out) if self.stages else None
        self.about = {**self.about, **about}
        if stored:
            theirs = stored["identity"]
            raised = {f: mine[f] for f in extensible
                      if theirs.get(f) is not None and mine[f] > theirs[f]}
            differ = [f"{k} was {json.dumps(theirs.get(k))[:60]}, now {json.dumps(v)[:60]}"
                      for k, v in mine.items() if theirs.get(k) != v and k not in raised]
            if differ:
                raise RunError(f"{self.out} holds a run with another configuration: "
                               f"{'; '.join(differ)}; use the old values or another --out")
            if raised:
                changes = [f"{k} {theirs[k]} -> {v}" for k, v in raised.items()]
                self.say("this run is trained further: " + ", ".join(changes))
            # config.json is written now, and the checkpoint later.  It tells how far we are.
            if any(mine[f] > self.trained_fields.get(f, mine[f]) for f in extensible):
                self.stages.get(self.last_stage or list(self.stages)[-1], {})["finished"] = False
            if raised or "command" not in stored:           # config.json was lost
                self.write_json("config.json", {"command": None, **stored,
                                                "identity": {**theirs, **raised},
                                                "config": {**stored["config"], **raised}},
                                checked=True)
            return
        self.barrier()                                      # others may still read it
        self.write_json("config.json", {"script": self.script, "command": " ".join(sys.argv),
                                        "identity": mine, "config": self.config_dict(),
                                        "versions": versions()}, checked=True)

    def works_on(self, ds):
        """Note that the results belong to this data.Dataset and its test subjects."""
        self.facts = {"data": str(ds.folder),
                      "phantom": ds.phantom,
                      "fingerprint": ds.fingerprint,
                      "test": ds.split["test"]}

    def claim_for(self, ds, free, extensible=()):
        """Claim the folder for training on a data.Dataset, see claim.

        The fields in `free` may differ from what is there, and those in `extensible` may be raised.

        Raises RunError if another field differs.
        """
        fields = [field for field in vars(self.config) if field not in free]
        self.claim(fields, {**about_of(ds), **named_files(self.config)}, extensible)
        # A CT without a PET is synthesised on the pixels that the training had.
        picture = ds.picture
        self.about["picture"] = picture and [list(part) for part in picture]
        self.about["windows"] = {name: list(scale) for name, scale in ds.windows.items()}
        # Whoever was trained on is recognised by these; see common/cohort.py.
        for part in ("train", "val"):
            self.about[f"files of {part}"] = [ds.files[name] for name in sorted(ds.split[part])]
        # It has no checksum, because users edit copies of it for --split.
        self.write_json("split.json", ds.split)

    # -- checkpoint --------------------------------------------------------------------------------

    def keep(self, stage, step, total, parts):
        """Write the checkpoint, with every stage so far and this one at `step`.

        The previous file stays as last_prev.pt.  A finished stage needs its optimisers no more, and
        the file is much smaller without them.  The last stage keeps them if it can be trained
        further.

        Raises RunError if the file cannot be written, or if a part holds values that are not
        finite.
        """
        finished = step == total
        if finished and not (self.extensible and stage == self.last_stage):
            parts = {name: part for name, part in parts.items()
                     if not isinstance(part, torch.optim.Optimizer)}
        states = {name: part.state_dict() for name, part in parts.items()}
        wrong = [name for name, state in states.items() if not all_finite(state)]
        if wrong:
            self.diverged(f"{stage}: {', '.join(wrong)} holds values that are not finite")
        self.stages[stage] = {"step": step,
                              "total": total,
                              "finished": finished,
                              "parts": states}
        if self.rank > 0 or self.seconds is not None:       # a benchmark leaves nothing behind
            return
        content = self.content(self.stages)
        # A damaged last.pt must not take the place of the good last_prev.pt.
        previous = None if self.fell_back else self.out / "last_prev.pt"
        replace(self.out / "last.pt", lambda tmp: torch.save(content, tmp), keep=previous)
        self.fell_back = False

    def content(self, stages):
        """Return what a checkpoint with these stages holds, plain types and tensors."""
        return {"format": FORMAT,
                "script": self.script,
                "config": self.config_dict(),
                "seed": self.seed,
                "about": self.about,
                "versions": versions(),
                "stages": stages}

    def finished(self, stages):
        """Return True if all these stages are finished in the checkpoint."""
        return all(self.stages.get(stage, {}).get("finished") for stage in stages)

    def load(self):
        """Read last.pt into .about and .stages.  Returns False if there is no such file.

        If last.pt is damaged, last_prev.pt is read.  Raises RunError if that is damaged too, or if
        the file belongs to another script.
        """
        if not checkpoints(self.out):
            return False
        content, fault = read_newest(self.out)
        if fault:
            self.say(f"warning: {fault}; using last_prev.pt")
            self.fell_back = True
        if content["script"] != self.script:
            raise RunError(f"{self.out / 'last.pt'} belongs to {content['script']}.py, "
                           f"not to {self.script}.py; choose another --out")
        self.about = content["about"]
        self.stages = content["stages"]
        self.trained_fields = content["config"]
        return True

    def trained(self, part, stage, *names):
        """Return `part` with its state from the checkpoint, frozen, on the device.

        names: the names of its states, the best choice first.  A loop.Best that was never offered
        weights is passed over.  Raises RunError if nothing fits.
        """
        states = self.stages[stage]["parts"]
        state = {}
        for name in names:
            found = states.get(name, {})
            if set(found) == {"loss", "model"}:
                found = found["model"] if math.isfinite(found["loss"]) else {}
            if found:
                self.used.add((stage, name))
                state = found
                break
        restore(part, state, f"{stage}/{names[0]} in {self.out}")
        if isinstance(part, torch.nn.Module):
            part.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        return part

    def export(self, folder):
        """Make a new folder with what sampling needs, and no more.

        This is the configuration and the states that were `used`.

        Raises RunError if the folder exists or cannot be written.
        """
        if self.rank > 0:
            return
        if folder.exists():
            raise RunError(f"--export {folder}: exists; name a new folder")
        stages = {}
        for stage, saved in self.stages.items():
            parts = {name: state for name, state in saved["parts"].items()
                     if (stage, name) in self.used}
            stages[stage] = {**saved, "parts": parts}
        content = self.content(stages)
        folder.mkdir(parents=True)
        replace(folder / "last.pt", lambda tmp: torch.save(content, tmp))
        config = json_text(trained_with(self.out))
        replace(folder / "config.json", lambda tmp: tmp.write_text(config, encoding="utf-8"))
        size = (folder / "last.pt").stat().st_size / 2 ** 20
        self.say(f"exported: {folder}, {size:.1f} MB; it can be loaded, evaluated and "
                 "synthesised from, not trained")

    def draw_training(self, stage):
        """Draw the losses of a stage, from log.jsonl, into training.png."""
        if self.rank > 0 or not (self.out / "log.jsonl").exists():
            return
        series = {}
        for line in (self.out / "log.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                if entry["stage"] != stage:
                    continue
            except (ValueError, TypeError, KeyError):
                continue                                    # a process was killed in this line
            for name in ("loss", "validation", "rec", "adv", "disc", "sem"):
                if entry.get(name) is not None:
                    steps, values = series.setdefault(name, ([], []))
                    steps.append(entry["step"])
                    values.append(entry[name])
        series = {name: points for name, points in series.items() if len(points[0]) > 1}
        if series:
            pictures.curves(self.out / "training.png", series, "step",
                            "mean of the steps since the point before", f"{self.script}: {stage}")

    def skip(self, stage):
        """Finish a stage that has nothing to train."""
        for _ in self.steps(stage, 0, {}):
            pass

    # -- results -----------------------------------------------------------------------------------

    def results(self, rows, images, protocol):
        """Write results.json and results.npz.

        results.json holds rows of numbers, with all that is needed to know where they come from.
        results.npz holds images.  Files with other settings, another seed or other facts are kept
        under a number.

        Raises RunError if a file cannot be written.
        """
        if self.rank > 0:
            return
        path = self.out / "results.json"
        identity = {"config": self.config_dict(), "seed": self.seed, **self.facts}
        if path.exists() and not same_results(path, identity):
            names = (self.out / f"results_{number}.json" for number in itertools.count(1))
            kept = next(name for name in names if not name.exists())
            # The numbers go last, because they count only together with the images.
            for suffix in (".npz", ".json"):
                if path.with_suffix(suffix).exists():
                    os.replace(path.with_suffix(suffix), kept.with_suffix(suffix))
            self.say(f"the results of another configuration are kept as {kept.name}")

        def save(temporary):
            # The file is opened here, because numpy would add .npz to a name.
            with open(temporary, "wb") as f:
                np.savez_compressed(f, **images)
        replace(path.with_suffix(".npz"), save)
        self.write_json("results.json", {"script": self.script,
                                         "command": " ".join(sys.argv),
                                         **identity,
                                         "versions": versions(),
                                         "protocol": protocol,
                                         "rows": rows}, checked=True)

    def find_results(self):
        """Return the newest results.json here that has this configuration, seed and facts.

        Returns None if there is none.  Numbers without their images (results.npz) do not count.
        """
        identity = {"config": self.config_dict(), "seed": self.seed, **self.facts}
        paths = sorted(self.out.glob("results*.json"), key=lambda path: path.stat().st_mtime,
                       reverse=True)
        for path in paths:
            if same_results(path, identity) and path.with_suffix(".npz").exists():
                return path
        return None

    def say_found(self, path):
        """Tell the user that results are used again, and if another version made them."""
        by = read_json(path, {}).get("versions", {}).get("project")
        other = by != versions()["project"]
        self.say(f"found: {path}" + (f" (notice: version {by} of this project made it; delete it "
                                     "to evaluate again)" if other else ""))

    def close(self):
        """Unlock the folder when all processes are done with it."""
        self.barrier()
        self.unlock()

    def unlock(self):
        """Unlock the folder."""
        if self.lock:
            self.lock.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """End the work on the folder.  After an error no process may wait for the others.

        The traceback of an error that is nobody's fault but ours goes into error.txt.
        """
        if error is None:
            self.close()
            return
        if self.lock and isinstance(error, Exception) and sentence_of(error) is None:
            text = "".join(traceback.format_exception(error))
            with contextlib.suppress(RunError):             # the disk may be full
                append(self.out / "error.txt", f"{time_stamp()}  {' '.join(sys.argv)}\n{text}\n")
                error.written = self.out / "error.txt"
        self.unlock()


def about_of(ds):
    """Return the facts of a data.Dataset that belong to every checkpoint trained on it."""
    return {"contrasts": list(ds.contrasts), "data": ds.fingerprint,
            "train": sorted(ds.split["train"]), "val": sorted(ds.split["val"])}


def stored_config(folder, config, args, free):
    """Read a run folder's config.json and change it by the flags that were typed.

    free: fields that may differ from those of the training, see Run.settle.

    Returns (config, seed).  Raises RunError if another field differs, or if the values do not go
    together.
    """
    stored = trained_with(folder) if checkpoints(folder) else None
    if not stored:
        return config, args.seed or 0
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in stored["config"].items()}
    known = {f.name: values[f.name] for f in dataclasses.fields(config) if f.name in values}
    differ = [f"{k} was {known.get(k)}, now {v}"
              for k, v in args.typed.items() if k not in free and known.get(k) != v]
    if differ:
        raise RunError(f"{folder} was trained otherwise: {'; '.join(differ)}; leave that out, "
                       "or train in another --out", status=2)
    try:
        config = dataclasses.replace(config, **{**known, **args.typed})
    except (ValueError, TypeError) as error:    # what was typed does not go with what was trained
        raise RunError(f"{error} (the other values come from {folder / 'config.json'})",
                       status=2) from error
    for what, digest in named_files(config).items():
        if stored["identity"].get(what, digest) != digest:
            raise RunError(f"the {what} has changed since {folder} was trained; "
                           "give the file back its old content, or train in another --out")
    return config, stored["identity"]["seed"] if args.seed is None else args.seed


def named_files(config):
    """Return {"content of FIELD": CRC-32} of the files that a config names, by fields *_file.

    Their content belongs to a run as the flags do.  Raises RunError if a file cannot be read.
    """
    found = {}
    for name, value in vars(config).items():
        if name.endswith("_file") and value:
            found[f"content of {name}"] = crc_of(value)
    return found


def trained_with(folder):
    """Return what config.json says of the training in a folder, or None if nobody knows.

    If config.json is missing or damaged, the checkpoint knows it, too.

    Raises RunError if both are damaged.
    """
    try:
        return read_json(folder / "config.json", {"config": dict, "identity": dict})
    except DataError:
        if not checkpoints(folder):
            return None
    content, _ = read_newest(folder)
    # A checkpoint that only holds stages of another run has no config; see common/tables.py.
    if not content["config"]:
        return None
    identity = {**content["config"], "seed": content["seed"], **content["about"]}
    return {"script": content["script"], "identity": identity, "config": content["config"],
            "versions": content.get("versions")}


def same_results(path, identity):
    """Return True if a results.json was made with this configuration, seed and facts."""
    try:
        content = read_json(path, {})
    except DataError:
        # The file is somebody else's, or it was edited by hand.
        return False
    return all(content.get(key) == value for key, value in identity.items())
