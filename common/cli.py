"""A dataclass becomes the command line.

Every field of a script's Config is a flag, and the comment behind the field is its help text. The
run flags are the same for all scripts. A flag that the user typed beats the preset, and the preset
beats the default of the field.
"""
import argparse
import dataclasses
import inspect
import json
import os
import re
import sys
import typing
from pathlib import Path

from common.files import tell
from data.layouts import folders_of, name_of

# Fields that several scripts have: (lowest, highest).
LIMITS = dict(size=(16, 1024), train_fraction=(0.01, 0.99), mult=(1, 16), groups=(1, 64),
              encoder_steps=(0, 10 ** 9), encoder_batch=(2, 65536), blocks=(1, 100),
              ae_blocks=(1, 100), text_depth=(1, 100))
# Run flags with a number. torch takes seeds of 63 bits.
RUN_LIMITS = dict(workers=(0, 256), seed=(0, 2 ** 63 - 1), seeds=(1, 1000),
                  micro_batch=(1, 10 ** 9))
MOST_NUMBERS = 20           # in one flag. Each of --mult makes a level of the network
# Run flags that stop after their work -> others that would then be ignored.
ALONE = {"check": ("train", "evaluate", "synthesize", "export", "reproduce", "benchmark"),
         "reproduce": ("synthesize", "export", "benchmark")}
# Run flags that mean nothing without one of the others.
NEEDS = {"external": ("evaluate", "reproduce"), "seeds": ("reproduce",)}


def load_presets(script):
    """{preset: {field: value}} of a script, from data/presets.json.

    "paper" changes nothing; "demo" holds sizes for phantoms.
    """
    path = Path(__file__).parent.parent / "data" / "presets.json"
    presets = {}
    for name, values in json.loads(path.read_text(encoding="utf-8"))[script].items():
        presets[name] = {}
        for field, value in values.items():
            presets[name][field] = tuple(value) if isinstance(value, list) else value
    return presets


def parse(config_class, presets, tables, limits, choose_preset, doc, argv=None, script=None):
    """Read the command line of a script -> (config, args).

    args holds the run flags, and args.typed the science flags that the user typed.

    presets        {"demo": {...}, "paper": {...}}: values of fields
    tables         names that --reproduce knows
    limits         {field: (lowest, highest)}. Numbers that are not listed must be positive, and a
                   tuple that is listed must not be empty
    choose_preset  data folder -> name of the preset to use when --preset is not typed
    doc            the text of --help
    argv           words without the program's name, by default those of sys.argv
    script         name of the script, for messages and the default of --out; by default the
                   program that runs

    SystemExit with status 2 and a sentence if a word or a value is not allowed.
    """
    script = script or Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(
        prog=f"python {script}.py", description=doc, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"python {script}.py --data FOLDER [--train] [--evaluate] [--synthesize] [flags]; "
              "--help explains all flags")
    add_run_flags(parser, script, presets, tables)
    add_fields(parser, config_class)
    args = parser.parse_args(argv)
    if args.data is None:
        if args.reproduce != "list":
            parser.error("--data is missing: the folder with the scans, or data/<phantom name>")
        args.data = Path("data")
    fields = dataclasses.fields(config_class)
    values = {field.name: vars(args).pop(field.name) for field in fields}
    args.typed = {name: value for name, value in values.items() if value is not None}
    preset_typed = args.preset is not None
    args.preset = args.preset or choose_preset(args.data)
    args.out = args.out or Path("runs") / f"{script}-{name_of(args.data)}"
    # The cache holds decoded slices. All runs beside this one share it.
    args.cache = args.cache or args.out.parent / "cache"
    check_run_flags(parser, args)
    defaults = {field.name: field.default for field in fields}
    chosen = {**defaults, **presets[args.preset], **args.typed}
    # Limits are checked before the Config is made, because it computes with the values.
    limits = {**LIMITS, **limits}
    for name, value in chosen.items():
        low, high = limits.get(name, default_limits(value))
        empty = name in limits and value == ()
        if len(numbers_in(value)) > MOST_NUMBERS:
            parser.error(f"--{name.replace('_', '-')} has {len(value)} numbers; "
                         f"allowed are {MOST_NUMBERS} at most")
        if empty or not within(value, low, high):
            parser.error(f"--{name.replace('_', '-')} {show(value)}: allowed are {low} to {high}")
    if preset_typed:
        args.typed = chosen                     # whoever types a preset asks for all of its fields
    try:
        return config_class(**chosen), args
    except ValueError as error:                 # from Config.__post_init__: values that clash
        parser.error(str(error))


def numbers_in(value):
    """The numbers in a value or in a tuple of values, as a list; bool is no number."""
    many = value if isinstance(value, tuple) else (value,)
    return [n for n in many if isinstance(n, (int, float)) and not isinstance(n, bool)]


def default_limits(value):
    """(lowest, highest) for numbers that are not listed in the limits: they must be positive."""
    has_float = any(isinstance(n, float) for n in numbers_in(value))
    return (1e-12 if has_float else 1), 10 ** 9


def within(value, low, high):
    """True if all numbers in a value are finite and lie from low to high."""
    return all(low <= n <= high for n in numbers_in(value))


def check_run_flags(parser, args):
    """SystemExit with status 2 if run flags are out of range or do not go together."""
    for name, (low, high) in RUN_LIMITS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value}: allowed are {low} to {high}")
    typed = {name for name, value in vars(args).items()
             if value and value != parser.get_default(name)}
    for name, others in ALONE.items():
        for other in others:
            if name in typed and other in typed:
                parser.error(f"--{name} does not go with --{other}; give one of them")
    for name, others in NEEDS.items():
        if name in typed and not typed.intersection(others):
            parser.error(f"--{name} needs {' or '.join('--' + other for other in others)}")
    # Volumes that are written into the data folder would be taken for scans the next time.
    homes = [one.resolve() for one in folders_of(args.data)]
    writes = typed.intersection(("train", "evaluate", "synthesize", "export", "reproduce"))
    for name in ("out", "cache", "export") if writes else ():
        path = getattr(args, name)
        if path and any(home.is_dir() and path.resolve().is_relative_to(home) for home in homes):
            parser.error(f"--{name} {path} lies in the data folder {args.data}; "
                         "choose a folder outside of it")


def folder(text):
    """A path for argparse. An empty text would be the folder where the program was started."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty; name a folder or file")
    return Path(text)


def add_run_flags(parser, script, presets, tables):
    """Add the flags that are the same for every script. The arguments are those of parse."""
    run = parser.add_argument_group(
        "run (the same for every script; --train, --evaluate, --synthesize run in that order, "
        "none of them is a dry run)")
    run.add_argument("--data", type=folder,
                     help="data folder, or several, separated by commas; data/<phantom name> is "
                          "made on first use")
    run.add_argument("--out", type=folder, help=f"run folder [runs/{script}-<data>]")
    run.add_argument("--cache", type=folder,
                     help="folder for decoded slices [cache beside the run folder]")
    run.add_argument("--check", action="store_true",
                     help="open every file of the data folder, say what is there and what is "
                          "wrong, stop")
    run.add_argument("--train", action="store_true",
                     help="train; the same command again continues an unfinished run")
    run.add_argument("--evaluate", action="store_true",
                     help="score the test subjects once: results.json, a table, pictures")
    run.add_argument("--synthesize", action="store_true",
                     help="write missing contrasts as NIfTI volumes on the source's own grid")
    run.add_argument("--export", type=folder, metavar="FOLDER",
                     help="write what sampling needs of a trained model, and no more, to a new "
                          "folder")
    run.add_argument("--micro-batch", type=int, metavar="INT",
                     help="slices at once in a training step: less memory, the same result [all]")
    run.add_argument("--reproduce", choices=[*tables, "list"], metavar="TABLE",
                     help="train and score every row of a table of the paper, beside its numbers: "
                          f"{', '.join(tables)}; list")
    run.add_argument("--seeds", type=int, default=1,
                     help="for --reproduce: trainings, with --seed, --seed + 1, ... [1]")
    run.add_argument("--external", type=folder, metavar="FOLDER",
                     help="another cohort: score all its subjects in place of the test subjects")
    run.add_argument("--benchmark", action="store_true",
                     help="time a training step and the sampler, stop")
    run.add_argument("--preset", choices=list(presets), help="[demo for phantoms, else paper]")
    run.add_argument("--split", type=folder,
                     help='your own split, a JSON file {"train": [names], "val": [], "test": []}')
    run.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
                     help="[auto: the best there is]")
    run.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                     help="of the networks; losses and samplers stay fp32 [auto]")
    run.add_argument("--compile", action="store_true",
                     help="torch.compile the network: slower to start, faster on long CUDA runs")
    run.add_argument("--seed", type=int, help="[0]")
    run.add_argument("--workers", type=int, default=0,
                     help="threads that read volumes [0 = as many as there are cores, 4 at most]")
    run.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_fields(parser, config_class):
    """Add one flag for each field of a config.

    A flag that is not typed becomes None. A default that the user typed can therefore still beat
    the preset.
    """
    group = parser.add_argument_group("config (fields of Config)")
    classes = [c for c in config_class.__mro__ if dataclasses.is_dataclass(c)]
    source = "\n".join(inspect.getsource(c) for c in classes)
    help_of = dict(re.findall(r"^\s+(\w+)\s*:[^#\n]*#\s*(.+)$", source, re.M))
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = types[field.name]
        text = f"{help_of[field.name]} [{show(field.default)}]"
        how = dict(dest=field.name, help=text.replace("%", "%%"))
        if kind is bool:
            how.update(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is tuple:
            how.update(type=list_of(typing.get_args(kind)[0]), metavar="A,B,...")
        elif typing.get_origin(kind) is typing.Literal:
            how.update(choices=typing.get_args(kind))
        else:
            how.update(type=kind, metavar=kind.__name__.upper())
        group.add_argument("--" + field.name.replace("_", "-"), **how)


def flags(values):
    """Fields as one would type them: {"M": 1000, "stage2": False} -> "--M 1000 --no-stage2"."""
    words = []
    for name, value in values.items():
        name = name.replace("_", "-")
        shown = str(show(value)) or '""'
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words.append(f"--{name} {shown}")
    return " ".join(words)


def list_of(item):
    """A converter for argparse: "1,2" -> (1, 2). item: the type of the entries."""
    def convert(text):
        return tuple(item(part.strip()) for part in text.split(",") if part.strip())
    # argparse then says "invalid comma-separated int value: '1,x'".
    convert.__name__ = f"comma-separated {item.__name__}"
    return convert


def show(value):
    """A value as one would type it, without quotation marks."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else value


def as_command(main):
    """Run main() of a small command. An error becomes one line and its exit status.

    The status is that of the error, and 130 after Ctrl-C. --debug shows the traceback.
    The scripts of the papers use common.script.guarded, which also knows several processes.
    """
    if hasattr(sys.stdout, "reconfigure"):
        # An odd letter in a name must not end the command on an old console.
        sys.stdout.reconfigure(errors="replace")
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                     # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if debug:
            raise
        raise SystemExit(tell(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
