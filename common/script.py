"""The frame of every script: check, dry run, train, evaluate, synthesize, reproduce, benchmark.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

A script describes its paper's method by a Method and ends in one call:  script.guarded(main).
Nothing here knows which paper calls it.
"""
import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
from common import pictures
from common.benchmark import benchmark
from common.cli import parse
from common.cohort import keep_baselines, other_cohort, served
from common.evaluation import evaluate, synthesize
from common.files import RunError, lock, tell
from common.loop import ENDINGS, handled
from common.outline import draw, dry_run, require_memory
from common.run import Run, stored_config
from common.tables import list_tables, load_tables, reproduce
from common.trained import Trained, fill
from data.files import read_json
from data.layouts.words import few


@dataclass(frozen=True)
class Method:
    """What the frame needs to know of a method.

    name        as tables and pictures call it; in lower case, the name of the script
    config, presets, limits    see common.cli.parse
    sampling    fields of the config that may change without training again
    stages      {stage of training, in order: fields that matter to it and to later stages only}
    contrasts   (cfg) -> contrasts that the data must have, or None for all that there are
    patterns    (cfg, contrasts) -> [(known contrasts, contrasts to make from them)], the tasks
    train       (cfg, run, ds) trains all stages
    load        (cfg, run, subjects) -> the trained model, with .contrasts, .run and .fill
                (common/trained.py)
    outline     (cfg, ds) -> Outline
    disturb     (cfg, run, u, keys) -> u, changed as the model shall see test slices; or None
    beside      (cfg, run, model, truth, notes) -> {name: images}, scored beside the results of
                fill although they need the truth (evaluation.evaluate); or None
    judge       (cfg, run, ds, task) -> more rows of results.json about an evaluation.Task; or None
    regions     names of regions that are also scored by themselves, see evaluation.Task.regions
    gaps        True if subjects may lack contrasts; two are enough then
    texts       True if reports count as the contrast "text"
    overall     (cfg, run, ds, model, tasks) -> more rows of results.json, about all tasks together
                and about what is no image; or None
    segmenters  (cfg, run, ds, contrasts) -> {contrast: segmenter} that judge the results; or None
    extensible  fields that may be raised to train a run further; nothing else may depend on them
    micro_batches    True if the training steps can be divided by --micro-batch
    asked       (cfg, contrasts) -> contrasts that --synthesize makes although a subject has them;
                None: those of the task, if there is only one
    choice      the flag that chooses one of several tasks, if --synthesize needs one; else ""
    speed       (cfg, run, model) says more of the speed for --benchmark; or None
    figures     {name: (title, function (cfg, run, ds, model))}, for --reproduce

    cfg is the script's Config, run a common.run.Run, and ds a data.Dataset.  subjects are those
    that the model will meet, as layouts.Subject.
    """
    name: str
    config: type
    presets: dict
    limits: dict
    sampling: tuple
    stages: dict
    contrasts: Callable
    patterns: Callable
    train: Callable
    load: Callable
    outline: Callable
    disturb: Callable | None = None
    beside: Callable | None = None
    judge: Callable | None = None
    regions: tuple = ()
    gaps: bool = False
    texts: bool = False
    overall: Callable | None = None
    segmenters: Callable | None = None
    extensible: tuple = ()
    micro_batches: bool = False
    asked: Callable | None = None
    choice: str = ""
    speed: Callable | None = None
    figures: dict = field(default_factory=dict)

    @property
    def script(self):
        return self.name.lower()


# ---- entrances -----------------------------------------------------------------------------------


def entrances(method, doc):
    """Return (load, main), the functions that a script offers.  doc: the script's docstring."""
    def load_run(folder, device="auto", precision="auto", **sampling):
        return load(method, folder, device, precision, **sampling)

    def main_of(argv=None):
        return main(method, doc, argv)
    load_run.__doc__ = load.__doc__
    main_of.__doc__ = main.__doc__
    return load_run, main_of


def main(method, doc, argv=None):
    """Do what the command line asks for.

    doc: the script's docstring.  argv: words without the program's name, by default those typed.

    Raises RunError or data.DataError for what the user can mend, and SystemExit for wrong usage.
    """
    tables = load_tables(method.script)
    names = [*tables, *method.figures]
    cfg, args = parse(method.config, method.presets, names, method.limits, choose_preset, doc, argv,
                      method.script)
    if args.reproduce == "list":
        print(list_tables(tables, method.figures))
    elif args.check:
        if not data.check(args.data, method.contrasts(cfg), gaps=method.gaps, texts=method.texts,
                          size=cfg.size, split_file=args.split, train_fraction=cfg.train_fraction,
                          test_subjects=cfg.test_subjects,
                          agree=lambda ds: agree(method, cfg, args, ds)):
            raise SystemExit(1)
    elif args.reproduce:
        # The flags of a run that is there already count, as for --evaluate.
        cfg, args.seed = stored_config(args.out, cfg, args, method.sampling)
        args.train = True
        args.evaluate = True
        args.synthesize = False
        args.benchmark = False
        if args.reproduce in method.figures:
            work(method, cfg, args, figure=method.figures[args.reproduce][1])
        else:
            # The folder is free between two rows.  A second --reproduce must not take it then.
            first = int(os.environ.get("RANK", 0)) == 0
            with lock(args.out, "lock-tables") if first else contextlib.nullcontext():
                reproduce(method, args.reproduce, tables[args.reproduce], cfg, args,
                          lambda wanted, here: work(method, wanted, here))
    else:
        work(method, cfg, args)


def load(method, folder, device="auto", precision="auto", **sampling):
    """Return the model that a run folder holds, for use from Python.

    device, precision: as the flags of these names.  sampling: fields of the config that need no
    training, such as M=200.  A run that is still in training is loaded as far as it is, with a
    notice.

    Returns a common.trained.Trained.

    Raises RunError if the folder holds no model or `sampling` names another field.
    """
    wrong = [name for name in sampling if name not in method.sampling]
    if wrong:
        raise RunError(f"load: {', '.join(wrong)} cannot be changed after training; "
                       f"you can change {', '.join(method.sampling)}")
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise RunError(f"{folder} {problem}; name the folder of a run, such as runs/apt-brats")
    if not any((folder / name).exists() for name in ("last.pt", "last_prev.pt")):
        raise RunError(f"{folder} holds no trained model; train one with --train --out {folder}")
    args = argparse.Namespace(out=folder, seed=None, device=device, precision=precision,
                              compile=False, train=False, typed=dict(sampling), quiet=True)
    run = Run(method.script, method.config(), args)
    cfg = run.settle(method.sampling)
    run.load()
    say_how_far(method, run)
    return Trained(method.load(cfg, run, []), cfg)


def choose_preset(folder):
    """Return the preset for a data folder.

    Phantoms take the demo's sizes.  Everything else takes the paper's.
    """
    return "demo" if data.is_phantom(folder) else "paper"


# ---- one run folder ------------------------------------------------------------------------------


def work(method, cfg, args, figure=None):
    """Do all that was asked for, in one run folder.

    figure: a function that is called in place of the evaluation.

    Returns the path of the results that belong to the run, or None.

    Raises RunError or data.DataError for what the user can mend.
    """
    with Run(method.script, cfg, args) as run:
        return work_in(run, method, cfg, args, figure)


def work_in(run, method, cfg, args, figure):
    """Do all that was asked for, in the folder of this run; see work."""
    cfg = run.settle(method.sampling)
    if args.export and args.export.exists():
        raise RunError(f"--export {args.export}: exists; name a new folder")
    if run.load():
        run.say(f"found a run in {run.out}")
    elif (args.evaluate or args.synthesize or args.export) and not args.train:
        raise RunError(f"{run.out} holds no trained model; add --train, "
                       "or name the folder of a run with --out")
    ds = None
    if args.train or args.evaluate or args.benchmark or not (args.synthesize or args.export):
        plans = args.train or args.evaluate or args.benchmark
        drawn = []

        def agreed(ds):
            agree(method, cfg, args, ds)
            if plans:
                run.shard(cfg.batch)
                drawn.append(draw(method, cfg, ds))
                require_memory(method, cfg, run, ds, drawn[0])
        ds = open_data(method, cfg, args, run, agreed)
        if plans:
            # The number of slices is known now.
            require_memory(method, cfg, run, ds, drawn[0])
        run.works_on(ds)
    elif args.synthesize:
        asked(method, cfg, run.about["contrasts"])
    if args.train:
        run.last_stage = list(method.stages)[-1]
        run.claim_for(ds, method.sampling, method.extensible)
        run.preview = lambda: preview(method, cfg, run, ds)
        if run.finished(method.stages):
            run.say("training: finished")
        else:
            method.train(cfg, run, ds)
        keep_baselines(run, ds, method.patterns(cfg, list(ds.contrasts)))
    results = None
    if args.evaluate:
        results = score(method, cfg, run, ds, figure)
    if args.export:
        say_how_far(method, run)
        method.load(cfg, run, [])                           # this shows what sampling needs
        run.export(args.export)
    if args.synthesize:
        say_how_far(method, run)
        contrasts = run.about["contrasts"]
        subjects = data.find_layout(args.data, contrasts, texts=method.texts).subjects
        files = run.first(lambda: data.subject_files(subjects, args.cache, args.workers, run.say))
        unseen = left_to_synthesize(run, subjects, files)
        model = method.load(cfg, run, unseen)
        notice_settings(run)
        wanted = asked(method, cfg, contrasts)
        synthesize(method, cfg, run, model, unseen, wanted, files)
    if args.benchmark:
        benchmark(method, cfg, run, ds)
    elif not (args.train or args.evaluate or args.synthesize or args.export):
        dry_run(method, cfg, run, ds)
    return results


def score(method, cfg, run, ds, figure):
    """Evaluate on the test subjects, or on another cohort; or call the function of a figure.

    Returns the path of the results, None for a figure and in all processes but the first.

    Raises RunError if a test subject served the training, or if the training is not far enough.
    """
    args = run.args
    if args.external:
        ds = open_data(method, cfg, argparse.Namespace(**{**vars(args), "data": args.external,
                                                          "split": None}), run)
    own = run.out
    ds, home = other_cohort(run, ds, args.split)
    run.works_on(ds)
    say_how_far(method, run)
    if figure:
        if run.rank == 0:
            # One process makes a figure alone, also a figure that trains.  The others wait.
            world = run.world
            run.world = 1
            figure(cfg, run, ds, method.load(cfg, run, ds.subjects))
            run.world = world
    elif args.reproduce and run.find_results():
        run.say_found(run.find_results())
    else:
        evaluate(method, cfg, run, ds, method.load(cfg, run, ds.subjects), home)
    results = run.find_results() if run.rank == 0 and not figure else None
    run.out = own
    return results


def left_to_synthesize(run, subjects, files):
    """Return the subjects that the model was not trained on.  The others are named to the user.

    files: {subject: digests of its files}, see data.Dataset.files.
    """
    seen = served(run, subjects, files, ("train",))
    if seen:
        run.say(f"{len(seen)} subjects were trained on and are left out: {few(sorted(seen))}")
    return [subject for subject in subjects if subject.name not in seen]


def notice_settings(run):
    """Tell the user if the volumes that are there were made with other settings.

    The settings are noted beside the first volumes.
    """
    home = run.out / "synthetic"
    settings = {**run.config_dict(), "seed": run.seed}
    for stage, saved in run.stages.items():
        settings[f"steps of {stage}"] = saved["step"]
    if not (home / "settings.json").exists():
        run.write_json("synthetic/settings.json", settings, checked=True)
        return
    before = read_json(home / "settings.json", {})
    differ = [f"{name} was {before.get(name)}, now {value}" for name, value in settings.items()
              if before.get(name) != value]
    if differ:
        run.say(f"notice: what {home} holds already was made with other settings "
                f"({'; '.join(differ)}) and stays; delete the folder to make it again")


def asked(method, cfg, contrasts):
    """Return the contrasts that --synthesize makes although a subject has them.

    They are those of the task, if there is only one.  With several tasks there are none, and
    --synthesize makes whatever a subject lacks.

    Raises RunError if there are several tasks and the method needs the user's choice.
    """
    if method.asked:
        return method.asked(cfg, contrasts)
    tasks = method.patterns(cfg, contrasts)
    if len(tasks) == 1:
        return tasks[0][1]
    if method.choice:
        raise RunError("--synthesize: this model knows several directions; "
                       f"choose one, {method.choice}", status=2)
    return ()


def agree(method, cfg, args, ds):
    """Tell a wrong flag before anything is decoded or trained.

    ds: a data.Dataset, which need not be decoded.

    Raises RunError, or data.DataError if --external holds no such data.
    """
    contrasts = list(ds.contrasts)
    method.patterns(cfg, contrasts)
    if args.synthesize:
        asked(method, cfg, contrasts)
    if args.micro_batch and not method.micro_batches:
        raise RunError("--micro-batch: a step of this method trains several networks and cannot "
                       "be divided; use a smaller --batch", status=2)
    if args.train and not ds.split["train"]:
        raise RunError("--split names no training subjects; it can only be used with --evaluate",
                       status=2)
    if getattr(cfg, "segment", False) and not all(s.segmentation for s in ds.complete):
        raise RunError(f"--segment: not every subject in {ds.folder} has label maps "
                       "(as BraTS's ..._seg.nii.gz); leave it out")
    if args.external:
        data.find_layout(args.external, contrasts, method.gaps, method.texts)
    if args.check:
        draw(method, cfg, ds)


def open_data(method, cfg, args, run, agreed=lambda ds: None):
    """Open the data set as slices.

    A trained model's own contrasts, in its order, count more than those of the config.

    agreed: a function that gets the data set before it is decoded, and may refuse it.

    Raises data.DataError if the data cannot be used.
    """
    contrasts = tuple(run.about.get("contrasts", method.contrasts(cfg) or ())) or None
    return run.first(lambda: data.open_dataset(
        args.data, contrasts, cfg.size, args.split, train_fraction=cfg.train_fraction,
        test_subjects=cfg.test_subjects, cache=args.cache, workers=args.workers, say=run.say,
        gaps=method.gaps, texts=method.texts, agree=agreed,
        alone=bool(run.about) and not args.train))


def say_how_far(method, run):
    """Tell the user if the training is not finished.

    Raises RunError if it is not far enough to be used.
    """
    if run.finished(method.stages):
        return
    *before, last = method.stages
    saved = run.stages.get(last)
    if not run.finished(before) or not saved or saved["step"] == 0:
        raise RunError(f"{run.out}: the training has not reached its last stage, {last}, yet; "
                       "run the training command again (--train), it continues")
    how_far = f"{last} {saved['step']} of {saved['total']} steps"
    run.facts["unfinished"] = how_far
    run.say(f"notice: the training in {run.out} is not finished ({how_far}); "
            "its weights so far are used")


def preview(method, cfg, run, ds):
    """Draw what the weights so far make of two slices, into the folder previews.

    The slices are those of validation subjects, if there are any.
    """
    part = "val" if ds.split["val"] else "train"
    compiled = run.args.compile
    run.args.compile = False
    # Building a network draws random numbers.  The training must not notice.
    with torch.random.fork_rng(devices=[]):
        model = method.load(cfg, run, ds.complete)
    run.args.compile = compiled
    contrasts = list(ds.contrasts)
    # One task is enough to see how far the training is.  Sampling all of them takes long.
    tasks = method.patterns(cfg, contrasts)
    if not tasks:
        return
    sources, missing = tasks[0]
    rows = ds.having(ds.rows(part), [*sources, *missing])
    if len(rows) == 0:
        return
    shown = data.evenly(rows, 2)
    volumes = getattr(model, "volumes", False)      # such a model needs all neighbours of a slice
    rows = rows[np.isin(ds.subject[rows], ds.subject[shown])] if volumes else shown
    u = run.fetch(ds.images, rows)                                      # (B, C, H, W)
    images = []
    labels = []
    known = torch.tensor([c in sources for c in contrasts], device=run.device)      # (C,)
    wanted = torch.tensor([c in missing for c in contrasts], device=run.device)     # (C,)
    made, _ = fill(model, u, known.expand(len(u), -1), ds.keys(rows),
                   wanted=wanted.expand(len(u), -1))                    # (B, C, H, W)
    c = contrasts.index(missing[0])
    for b in np.flatnonzero(np.isin(rows, shown)):
        source = u[b, contrasts.index(sources[0])]                      # (H, W)
        images.append([source.cpu(), made[b, c].cpu(), u[b, c].cpu()])
        labels.append(f"{missing[0]} of {ds.subject[rows[b]]}")
    last = list(method.stages)[-1]
    step = run.stages[last]["step"]
    (run.out / "previews").mkdir(exist_ok=True)
    pictures.grid(run.out / "previews" / f"{step:07d}.png", images,
                  ["a source", f"after {step} steps", "truth"], labels,
                  note=f"two slices of {'validation' if part == 'val' else 'training'} subjects")


# ---- errors --------------------------------------------------------------------------------------


def guarded(main):
    """Run main().  An error becomes one line and an exit status, 1 or 2.

    Raises SystemExit then.  With --debug the error itself is raised, with its traceback.  SIGTERM
    and SIGHUP end the program as Ctrl-C does, with 143 and 129; while it trains, see loop.signals.
    """
    def end(number, frame):
        raise SystemExit(128 + number)
    if hasattr(sys.stdout, "reconfigure"):
        # A subject's name must not end a run on an old console.
        sys.stdout.reconfigure(errors="replace")
    try:
        with handled(end, ENDINGS):
            main()
        if dist.is_available() and dist.is_initialized():
            # Nobody leaves while another process still talks.
            dist.barrier()
            sys.stdout.flush()
            sys.stderr.flush()
            # We skip the usual way out.  Now and then it aborts a process while it takes torch's
            # communication threads down.
            os._exit(0)
    except BrokenPipeError:
        # The reader of our output has left, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        raise SystemExit(tell(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
