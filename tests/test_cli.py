"""The command line: who wins, what is refused and in which words, and the help of every field."""
import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import apt
import metadb
from common.cli import flags, parse


@dataclass(frozen=True)
class Config:
    steps: int = 100                            # how long; 50 % of it is warm-up (%s, %(prog)s stay as they are)
    rate: float = 0.5                           # how fast
    mult: tuple[int, ...] = (1, 2)              # widths
    contrasts: tuple[str, ...] = ()             # names
    refine: bool = True                         # whether to refine
    plain: bool = False                         # whether to be plain
    kind: Literal["sum", "mean"] = "sum"        # which reduction
    parts: int = 4                              # pieces
    sizes: tuple[int, ...] = (8,)               # a tuple without limits, which may be empty
    count: int = 1                              # a number without limits
    share: float = 1.0                          # a fraction without limits

    def __post_init__(self):
        if self.steps % self.parts:             # fails with --parts 0 unless the limits come first
            raise ValueError(f"--steps {self.steps}: must be a multiple of --parts {self.parts}")


PRESETS = {"demo": dict(steps=8, rate=0.25, refine=False, mult=(3,)), "paper": {}}
TABLES = {"table1": {"title": "one"}, "fig2": {"title": "two"}}
LIMITS = dict(steps=(1, 1000), rate=(0.125, 2), mult=(1, 16), parts=(1, 64))


def read(*words, preset="demo"):
    return parse(Config, PRESETS, TABLES, LIMITS, lambda folder: preset, "A script.", ["--data", "data/brats", *words])


def refused(capsys, *words):
    """What is said about words that end the program with status 2: the line after the usage."""
    with pytest.raises(SystemExit) as end:
        read(*words)
    assert end.value.code == 2
    usage, error = capsys.readouterr().err.strip().splitlines()
    assert usage.startswith("usage: python ")
    return error.split(": error: ", 1)[1]


def test_defaults_then_preset_then_typed():
    assert read(preset="paper")[0] == Config()
    assert read()[0] == Config(steps=8, rate=0.25, refine=False, mult=(3,))
    assert read("--steps", "12")[0] == Config(steps=12, rate=0.25, refine=False, mult=(3,))
    assert read("--preset", "paper", "--steps", "12")[0] == Config(steps=12)             # typed preset beats the chosen one


def test_a_typed_default_beats_the_preset():
    config, args = read("--steps", "100", "--refine", "--mult", "1,2")
    assert config == Config(rate=0.25)
    assert args.typed == {"steps": 100, "refine": True, "mult": (1, 2)}


def test_falsy_values_count_as_typed():
    assert read("--no-refine", "--contrasts", "", preset="paper")[1].typed == {"refine": False, "contrasts": ()}


def test_values_get_the_type_of_their_field():
    config, args = read("--rate", "1", "--contrasts", "t1, flair,", "--mult", "4", "--kind", "mean", "--plain", "--no-refine")
    assert config == Config(8, 1.0, (4,), ("t1", "flair"), False, True, "mean") and isinstance(config.rate, float)
    assert not hasattr(args, "rate") and args.train is args.evaluate is args.check is False


def test_run_flags(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/apt.py"])
    seen = []
    args = parse(Config, PRESETS, TABLES, LIMITS, lambda folder: seen.append(folder) or "paper", "", ["--data", "x/My Scans/"])[1]
    assert args.out == Path("runs") / "apt-My Scans" and seen == [Path("x/My Scans")] and args.preset == "paper"
    assert parse(Config, PRESETS, TABLES, LIMITS, lambda folder: "demo", "", ["--data", "x/.."])[1].out.name == f"apt-{Path.cwd().name}"
    assert read("--out", "here")[1].out == Path("here")
    assert read()[1].seed is None and read("--seed", "0")[1].seed == 0                    # not typed is not 0: see Run.settle


@pytest.mark.parametrize("words, message", [
    (["--steps", "0"], "--steps 0: allowed are 1 to 1000"),
    (["--steps", "-4"], "--steps -4: allowed are 1 to 1000"),
    (["--steps", "1001"], "--steps 1001: allowed are 1 to 1000"),
    (["--parts", "0"], "--parts 0: allowed are 1 to 64"),
    (["--rate", "nan"], "--rate nan: allowed are 0.125 to 2"),
    (["--rate", "inf"], "--rate inf: allowed are 0.125 to 2"),
    (["--rate=-inf"], "--rate -inf: allowed are 0.125 to 2"),
    (["--mult", "1,2,17"], "--mult 1,2,17: allowed are 1 to 16"),
    (["--mult", ","], "--mult : allowed are 1 to 16"),
    (["--count", "0"], "--count 0: allowed are 1 to 1000000000"),
    (["--share", "0"], "--share 0.0: allowed are 1e-12 to 1000000000"),
    (["--share", "nan"], "--share nan: allowed are 1e-12 to 1000000000"),
    (["--sizes", "4,0"], "--sizes 4,0: allowed are 1 to 1000000000"),
    (["--workers", "-1"], "--workers -1: allowed are 0 to 256"),
    (["--seed", "-1"], "--seed -1: allowed are 0 to 9223372036854775807"),
    (["--steps", "10"], "--steps 10: must be a multiple of --parts 4"),
    (["--steps", "1" + 400 * "0"], f"--steps 1{400 * '0'}: allowed are 1 to 1000"),       # no float is so large
    (["--rate", "1e400"], "--rate inf: allowed are 0.125 to 2"),
    (["--mult", ",".join(21 * "1")], "--mult has 21 numbers; allowed are 20 at most"),
    (["--workers", "257"], "--workers 257: allowed are 0 to 256"),
    (["--seed", str(2 ** 63)], "--seed 9223372036854775808: allowed are 0 to 9223372036854775807"),
    (["--seeds", "1001", "--reproduce", "table1"], "--seeds 1001: allowed are 1 to 1000"),
    (["--micro-batch", "0"], "--micro-batch 0: allowed are 1 to 1000000000"),
    (["--check", "--train"], "--check does not go with --train; give one of them"),
    (["--check", "--export", "x"], "--check does not go with --export; give one of them"),
    (["--check", "--reproduce", "fig2"], "--check does not go with --reproduce; give one of them"),
    (["--reproduce", "table1", "--synthesize"], "--reproduce does not go with --synthesize; give one of them"),
    (["--external", "x", "--train"], "--external needs --evaluate or --reproduce"),
    (["--seeds", "2", "--evaluate"], "--seeds needs --reproduce"),
    (["--data", ""], "argument --data: the name is empty; name a folder or file"),
    (["--split", " "], "argument --split: the name is empty; name a folder or file"),
], ids=str)
def test_values_outside_the_limits_are_refused_with_the_range(capsys, words, message):
    assert refused(capsys, *words) == message


def test_the_limits_themselves_are_allowed():
    assert read("--steps", "1000", "--rate", "2", "--mult", "1,16")[0].steps == 1000
    assert read("--rate", "0.125", "--parts", "1", "--steps", "1")[0].rate == 0.125
    assert read("--sizes", "", "--share", "1e-9")[0].sizes == ()
    assert read("--mult", ",".join(20 * "1"))[0].mult == 20 * (1,)
    args = read("--workers", "256", "--seed", str(2 ** 63 - 1), "--external", "x", "--evaluate")[1]
    assert args.workers == 256 and args.seed == 2 ** 63 - 1 and args.external == Path("x")


@pytest.mark.parametrize("flag", ["out", "cache", "export"])
def test_nothing_is_written_into_the_data_folder(capsys, tmp_path, monkeypatch, flag):
    """It would be taken for scans the next time. Beside it is fine, also if its name begins alike; so is a look at the folder."""
    (tmp_path / "scans").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["--data", str(tmp_path / "scans"), "--train"]
    inside = "scans/p1/../new"
    assert refused(capsys, *words, f"--{flag}", inside).startswith(f"--{flag} {inside} lies in the data folder")
    assert "lies in the data folder" in refused(capsys, *words, f"--{flag}", words[1])
    assert read(*words, f"--{flag}", str(tmp_path / "scans-runs"))[1].train
    if flag != "export":
        assert not read(*words[:2], f"--{flag}", inside)[1].train


@pytest.mark.parametrize("words, message", [
    (["--kind", "max"], "argument --kind: invalid choice: 'max' (choose from"),
    (["--steps", "many"], "invalid int value: 'many'"), (["--steps", "1.5"], "invalid int value: '1.5'"),
    (["--mult", "1,x"], "argument --mult: invalid comma-separated int value: '1,x'"),
    (["--device", "tpu"], "argument --device: invalid choice"), (["--preset", "big"], "argument --preset: invalid choice"),
    (["--stesp", "3"], "unrecognized arguments: --stesp 3"), (["--step", "3"], "unrecognized arguments: --step 3"),
    (["--eval"], "unrecognized arguments: --eval"), (["--no-steps"], "unrecognized arguments: --no-steps"),
    (["--steps"], "argument --steps: expected one argument"),
])
def test_words_that_are_not_understood_are_refused(capsys, words, message):
    assert message in refused(capsys, *words)


def test_the_data_folder_is_required(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Config, PRESETS, TABLES, LIMITS, lambda folder: "demo", "", [])
    assert end.value.code == 2 and "--data is missing: the folder" in capsys.readouterr().err


def test_tables_are_asked_for_by_name_and_listed_without_data(capsys):
    assert read("--reproduce", "fig2", "--seeds", "3")[1].reproduce == "fig2" and read()[1].reproduce is None and read()[1].seeds == 1
    assert "invalid choice: 'table7'" in refused(capsys, "--reproduce", "table7")
    assert refused(capsys, "--seeds", "0") == "--seeds 0: allowed are 1 to 1000"
    assert parse(Config, PRESETS, TABLES, LIMITS, lambda folder: "demo", "", ["--reproduce", "list"])[1].reproduce == "list"


def test_flags_are_written_as_they_are_typed():
    values = {"steps": 8, "rate": 0.25, "mult": (1, 3), "refine": False, "plain": True, "kind": "mean"}
    assert flags(values) == "--steps 8 --rate 0.25 --mult 1,3 --no-refine --plain --kind mean"
    config, _ = read(*flags(values).split())
    assert {name: getattr(config, name) for name in values} == values
    assert flags({"test_slices": 2, "missing": ["t1", "t2"]}) == "--test-slices 2 --missing t1,t2" and flags({}) == "" and flags({"fields": ()}) == '--fields ""'


def help_of(capsys, *what):
    with pytest.raises(SystemExit) as end:
        parse(*what, ["--help"])
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_the_comment_and_the_default_and_percent_signs(capsys):
    text = help_of(capsys, Config, PRESETS, TABLES, LIMITS, None, "A script, 99 % sure.")
    assert "A script, 99 % sure." in text
    assert "--steps INT how long; 50 % of it is warm-up (%s, %(prog)s stay as they are) [100]" in text
    assert "--mult A,B,... widths [1,2]" in text and "--kind {sum,mean} which reduction [sum]" in text
    assert "--refine, --no-refine whether to refine [True]" in text and "SUPPRESS" not in text


def test_every_field_of_the_scripts_has_help_and_fits_its_limits_and_presets(capsys):
    for script in (apt, metadb):
        text = help_of(capsys, script.Config, script.PRESETS, [], script.LIMITS, None, script.__doc__)
        fields = {f.name: f for f in dataclasses.fields(script.Config)}
        for name in fields:
            flag = name.replace("_", "-")
            assert re.search(rf" --{flag}(, --no-{flag})? ([A-Z]+ |A,B,... |{{[^}}]+}} )?[^\[{{ -][^\[]+", text), name
        assert set(script.LIMITS) <= set(fields) and set(script.SAMPLING) <= set(fields)
        for preset in script.PRESETS:
            words = ["--data", "x", "--preset", preset]
            config, _ = parse(script.Config, script.PRESETS, [], script.LIMITS, None, "", words)
            assert config == script.Config(**script.PRESETS[preset])
