"""A run folder, with its configuration, log, checkpoint and results.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

A run is what it contains: its configuration, its seed, and the identity of its data.  The same
command in the same folder continues it exactly.  Another configuration is refused with the names of
what differs.
"""
import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from common import pictures
from common.files import FORMAT, RunError, lock, read_checkpoint, replace, restore
from common.loop import Loop, time_stamp


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
        self.lock = None
        self.fell_back = False              # True if last_prev.pt is used, as last.pt was damaged
        self.used = set()                   # (stage, name) of the states that sampling needs
        writes = any(getattr(args, work, False) for work in ("train", "evaluate", "synthesize"))
        if self.rank == 0 and writes:
            self.lock = lock(self.out)
            for name in ("last.pt", "config.json", "results.json", "results.npz", "split.json"):
                # A save that was killed leaves such a file behind.
                (self.out / f"{name}.tmp").unlink(missing_ok=True)
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
        print("\n" + text if self.open_line else text, flush=True)
        self.open_line = False
        if self.lock:
            with open(self.out / "log.txt", "a", encoding="utf-8", errors="replace") as f:
                f.write(f"{time_stamp()}  {text}\n")

    def write_json(self, name, content):
        """Write a file of the folder, whole or not at all.  Only the first process does so.

        Raises RunError if it cannot be written.
        """
        if self.rank == 0:
            text = json.dumps(content, indent=1)
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
        mine = {**{f: self.config_dict()[f] for f in fields}, "seed": self.seed, **about}
        path = self.out / "config.json"
        self.about = {**self.about, **about}
        if path.exists() and self.stages:
            stored = json.loads(path.read_text(encoding="utf-8"))
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
                self.stages[list(self.stages)[-1]]["finished"] = False
                self.write_json("config.json", {**stored, "identity": {**theirs, **raised},
                                                "config": {**stored["config"], **raised}})
            return
        self.barrier()                                      # others may still read it
        self.write_json("config.json", {"script": self.script, "command": " ".join(sys.argv),
                                        "identity": mine, "config": self.config_dict(),
                                        "versions": versions()})

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
        self.claim(fields, about_of(ds), extensible)
        # A CT without a PET is synthesised on the pixels that the training had.
        picture = ds.picture
        self.about["picture"] = picture and [list(part) for part in picture]
        self.about["windows"] = {name: list(scale) for name, scale in ds.windows.items()}
        self.write_json("split.json", ds.split)

    def refuse_seen(self, ds):
        """Raises RunError if a test subject of this data.Dataset served the training.

        Such a subject was trained on, or it chose the weights.
        """
        seen = sorted({*self.about["train"], *self.about["val"]} & set(ds.split["test"]))
        if seen:
            raise RunError(f"{len(seen)} test subjects served the training "
                           f"({', '.join(seen[:3])}, ...); give the same --split")

    # -- checkpoint --------------------------------------------------------------------------------

    def keep(self, stage, step, total, parts):
        """Write the checkpoint, with every stage so far and this one at `step`.

        The previous file stays as last_prev.pt.  Raises RunError if the file cannot be written.
        """
        states = {name: part.state_dict() for name, part in parts.items()}
        self.stages[stage] = {"step": step,
                              "total": total,
                              "finished": step == total,
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
        paths = [self.out / name for name in ("last.pt", "last_prev.pt")]
        paths = [path for path in paths if path.exists()]
        for path in paths:
            try:
                content = read_checkpoint(path)
                break
            except RunError as error:
                if path == paths[-1]:
                    raise
                self.say(f"warning: {error}; using last_prev.pt")
                self.fell_back = True
        else:
            return False
        if content["script"] != self.script:
            raise RunError(f"{self.out / 'last.pt'} belongs to {content['script']}.py, "
                           f"not to {self.script}.py; choose another --out")
        self.about = content["about"]
        self.stages = content["stages"]
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
        config = (self.out / "config.json").read_text(encoding="utf-8")
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
            entry = json.loads(line)
            if entry["stage"] != stage:
                continue
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
                                         "rows": rows})

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
        """End the work on the folder.  After an error no process may wait for the others."""
        if error is None:
            self.close()
        else:
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
    path = folder / "config.json"
    trained = any((folder / name).exists() for name in ("last.pt", "last_prev.pt"))
    if not path.exists() or not trained:
        return config, args.seed or 0
    stored = json.loads(path.read_text(encoding="utf-8"))
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in stored["config"].items()}
    known = {f.name: values[f.name] for f in dataclasses.fields(config) if f.name in values}
    differ = [f"{k} was {known.get(k)}, now {v}"
              for k, v in args.typed.items() if k not in free and known.get(k) != v]
    if differ:
        raise RunError(f"{folder} was trained otherwise: {'; '.join(differ)}; leave that out, "
                       "or train in another --out", status=2)
    try:
        config = dataclasses.replace(config, **{**known, **args.typed})
    except ValueError as error:         # what was typed does not go with what was trained
        raise RunError(f"{error} (the other values come from {path})", status=2) from error
    return config, stored["identity"]["seed"] if args.seed is None else args.seed


def same_results(path, identity):
    """Return True if a results.json was made with this configuration, seed and facts."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return all(content[key] == value for key, value in identity.items())
    except (ValueError, KeyError, TypeError):
        # The file is somebody else's, or it was edited by hand.
        return False


@functools.cache
def versions():
    """Return the versions of Python, of the packages, and of this project.

    The project's version is its git commit, where there is one.
    """
    packages = ("torch", "numpy", "scipy", "nibabel", "pillow")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            # A copied part of the project may do without this package.
            found[name] = None
    found["project"] = project_version()
    return found


def project_version():
    """Return the git commit of the project's own folder, with "+" if files were changed.

    Returns None without git.
    """
    home = Path(__file__).resolve().parent.parent
    if not (home / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(home), "describe", "--always", "--dirty=+", "--tags"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None
