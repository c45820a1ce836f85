"""A run folder: its configuration, log, checkpoint, and results.

A run is what it contains: config, seed, and the identity of its data.  The same command in the same folder
continues it exactly; another configuration is refused with the names of what differs.
"""
import dataclasses
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

    out       folder; holds config.json, log.txt, log.jsonl, last.pt, last_prev.pt and what the script writes.
              It is made and locked if args ask for training, evaluation or synthesis: nothing else writes
    about     plain facts that go into every checkpoint (contrasts, identity of the data, training subjects, ...)
    facts     plain facts that belong to results: on which data, on whom
    stages    {name: {"step", "total", "finished", "parts": {name: state_dict}}}: what the checkpoint knows
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
        self.fell_back = False                              # last.pt was damaged, last_prev.pt is used
        self.used = set()                                   # (stage, name) of the states that sampling needs
        writes = any(getattr(args, work, False) for work in ("train", "evaluate", "synthesize"))
        if self.rank == 0 and writes:
            self.lock = lock(self.out)
            for name in ("last.pt", "config.json", "results.json", "results.npz", "split.json"):
                (self.out / f"{name}.tmp").unlink(missing_ok=True)          # left behind by a save that was killed
        self.join()                                         # what process 0 prepared in the folder is there for all
        if not getattr(args, "quiet", False):
            self.say(self.facts_line)

    # -- talking --------------------------------------------------------------------------------------------------

    def say(self, text=""):
        """Print a line, and keep it with the time in log.txt (first process only)."""
        if self.rank > 0:
            return
        print("\n" + text if self.open_line else text, flush=True)          # below a progress bar, not behind it
        self.open_line = False
        if self.lock:
            with open(self.out / "log.txt", "a", encoding="utf-8", errors="replace") as f:
                f.write(f"{time_stamp()}  {text}\n")

    def write_json(self, name, content):
        """Write a file of the folder, whole or not at all (first process only)."""
        if self.rank == 0:
            text = json.dumps(content, indent=1)
            replace(self.out / name, lambda tmp: tmp.write_text(text, encoding="utf-8"))

    # -- configuration --------------------------------------------------------------------------------------------

    def config_dict(self):
        """The configuration as JSON has it: tuples are lists."""
        return json.loads(json.dumps(self.config.__dict__))

    def settle(self, free):
        """Without --train, what the folder's run was trained with stands in for flags that were not typed.

        free: fields that may differ from the training's; RunError if another one does.
        """
        if not self.args.train:
            self.config, self.seed = stored_config(self.out, self.config, self.args, free)
        return self.config

    def claim(self, fields, about, extensible=()):
        """Check that this folder's run is the same one (`fields` of the config and `about`).

        RunError names what differs.  A run that has saved nothing yet may change: it may have failed for
        its flags.  Afterwards config.json stays, but for `extensible` fields, which may be raised: then the
        last stage goes on.
        """
        mine = {**{f: self.config_dict()[f] for f in fields}, "seed": self.seed, **about}
        path = self.out / "config.json"
        self.about = {**self.about, **about}
        if path.exists() and self.stages:
            stored = json.loads(path.read_text(encoding="utf-8"))
            theirs = stored["identity"]
            raised = {f: mine[f] for f in extensible if theirs.get(f) is not None and mine[f] > theirs[f]}
            differ = [f"{k} was {json.dumps(theirs.get(k))[:60]}, now {json.dumps(v)[:60]}"
                      for k, v in mine.items() if theirs.get(k) != v and k not in raised]
            if differ:
                raise RunError(f"{self.out} holds a run with another configuration: {'; '.join(differ)}; "
                               "use the old values or another --out")
            if raised:
                self.say("this run is trained further: " + ", ".join(f"{k} {theirs[k]} -> {v}" for k, v in raised.items()))
                self.stages[list(self.stages)[-1]]["finished"] = False
                self.write_json("config.json", {**stored, "identity": {**theirs, **raised},
                                                "config": {**stored["config"], **raised}})
            return
        self.barrier()                                      # others may still read it
        self.write_json("config.json", {"script": self.script, "command": " ".join(sys.argv),
                                        "identity": mine, "config": self.config_dict(),
                                        "versions": versions()})

    def works_on(self, ds):
        """Results will say that they belong to this data.Dataset and its test subjects."""
        self.facts = {"data": str(ds.folder), "phantom": ds.phantom, "fingerprint": ds.fingerprint,
                      "test": ds.split["test"]}

    def claim_for(self, ds, free, extensible=()):
        """Claim the folder for training on a data.Dataset; only the fields in `free` may differ from what is there,
        and those in `extensible` may be raised."""
        self.claim([field for field in vars(self.config) if field not in free], about_of(ds), extensible)
        self.write_json("split.json", ds.split)

    def refuse_seen(self, ds):
        """RunError if a test subject of this data.Dataset was trained on, or chose the weights."""
        seen = sorted({*self.about["train"], *self.about["val"]} & set(ds.split["test"]))
        if seen:
            raise RunError(f"{len(seen)} test subjects served the training ({', '.join(seen[:3])}, ...); "
                           "give the same --split")

    # -- checkpoint -----------------------------------------------------------------------------------------------

    def keep(self, stage, step, total, parts):
        """Write the checkpoint: every stage so far, this one at `step`.  The previous file stays as last_prev.pt."""
        states = {name: part.state_dict() for name, part in parts.items()}
        self.stages[stage] = {"step": step, "total": total, "finished": step == total, "parts": states}
        if self.rank > 0 or self.seconds is not None:       # a benchmark leaves nothing behind
            return
        content = {"format": FORMAT, "script": self.script, "config": self.config_dict(), "seed": self.seed,
                   "about": self.about, "stages": self.stages}
        # A damaged last.pt must not take the place of the good last_prev.pt.
        previous = None if self.fell_back else self.out / "last_prev.pt"
        replace(self.out / "last.pt", lambda tmp: torch.save(content, tmp), keep=previous)
        self.fell_back = False

    def finished(self, stages):
        """True if all these stages are finished in the checkpoint."""
        return all(self.stages.get(stage, {}).get("finished") for stage in stages)

    def load(self):
        """Read last.pt (or, if that is damaged, last_prev.pt) into .about and .stages.  False if there is none."""
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
        """`part` with its state from the checkpoint, frozen, on the device.  names: of the states, best choice first.

        A loop.Best that was never offered weights is passed over.  RunError if nothing fits.
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
        """A new folder with what sampling needs, and no more: the states that were `used`, and the configuration.

        RunError if the folder exists.
        """
        if self.rank > 0:
            return
        if folder.exists():
            raise RunError(f"--export {folder}: exists; name a new folder")
        stages = {}
        for stage, saved in self.stages.items():
            parts = {name: state for name, state in saved["parts"].items() if (stage, name) in self.used}
            stages[stage] = {**saved, "parts": parts}
        content = {"format": FORMAT, "script": self.script, "config": self.config_dict(), "seed": self.seed,
                   "about": self.about, "stages": stages}
        folder.mkdir(parents=True)
        replace(folder / "last.pt", lambda tmp: torch.save(content, tmp))
        config = (self.out / "config.json").read_text(encoding="utf-8")
        replace(folder / "config.json", lambda tmp: tmp.write_text(config, encoding="utf-8"))
        size = (folder / "last.pt").stat().st_size / 2 ** 20
        self.say(f"exported: {folder}, {size:.1f} MB; it can be loaded, evaluated and synthesised from, not trained")

    def draw_training(self, stage):
        """training.png: the losses of a stage, from log.jsonl."""
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
            pictures.curves(self.out / "training.png", series, "step", "mean of the steps since the point before",
                            f"{self.script}: {stage}")

    def skip(self, stage):
        """Finish a stage that has nothing to train."""
        for _ in self.steps(stage, 0, {}):
            pass

    # -- results --------------------------------------------------------------------------------------------------

    def results(self, rows, images, protocol):
        """results.json: rows of numbers with all that is needed to know where they come from; results.npz: images.

        Files with other settings, another seed or other facts are kept under a number.
        """
        if self.rank > 0:
            return
        path = self.out / "results.json"
        identity = {"config": self.config_dict(), "seed": self.seed, **self.facts}
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
        """The newest results.json in this folder that has this configuration, seed and facts; None without one.

        Numbers without their images (results.npz) do not count.
        """
        identity = {"config": self.config_dict(), "seed": self.seed, **self.facts}
        paths = sorted(self.out.glob("results*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in paths:
            if same_results(path, identity) and path.with_suffix(".npz").exists():
                return path
        return None

    def close(self):
        """Give the folder free, when all processes are done with it."""
        self.barrier()
        if self.lock:
            self.lock.close()


def about_of(ds):
    """The facts of a data.Dataset that belong to every checkpoint trained on it."""
    return {"contrasts": list(ds.contrasts), "data": ds.fingerprint,
            "train": sorted(ds.split["train"]), "val": sorted(ds.split["val"])}


def stored_config(folder, config, args, free):
    """What a run folder's config.json says, changed by the flags that were typed -> (config, seed); see Run.settle."""
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


def versions():
    """Versions of Python, of the packages, and of this project (its git commit, where there is one)."""
    packages = ("torch", "numpy", "scipy", "nibabel", "pillow")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:               # a copied part of the project may do without it
            found[name] = None
    found["project"] = project_version()
    return found


def project_version():
    """The git commit of the project's own folder, with "+" if files were changed; None without git."""
    home = Path(__file__).resolve().parent.parent
    if not (home / ".git").exists():
        return None
    try:
        asked = subprocess.run(["git", "-C", str(home), "describe", "--always", "--dirty=+", "--tags"],
                               capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None
