"""medm2g.py as a user runs it, on a few tiny phantoms: train, evaluate, Python, what is typed wrong."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import toys
from conftest import ROOT
from toys import call

import medm2g
from common import multimodal
from common.trained import Trained
from data import phantom

TINY = ("--preset demo --size 32 --ae-steps 3 --ae-batch 4 --ae-base 8 --text-steps 4 "
        "--text-batch 4 --text-width 16 --text-depth 1 --text-heads 2 --text-z 8 --align-steps 2 "
        "--align-batch 4 --projector 16 --base 8 --mult 1 --attention 8 --heads 2 --groups 4 "
        "--text-base 8 --text-mult 1 --width 16 --guides 2 --steps-image 2 --steps-text 2 "
        "--batch 4 --batch-text 4 --flow-steps 1 --steps 2").split()
REPORT = "the heart is enlarged . there is a left pleural effusion ."
OTHER = "heart size is normal . no pleural effusion is seen ."


@pytest.fixture(scope="module")
def cxr(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "cxr"
    phantom.make("cxr", folder, subjects=8, size=32)
    return folder


@pytest.fixture(scope="module")
def trained(cxr, tmp_path_factory):
    """(folder of data, folder of the run, what was said)."""
    out = tmp_path_factory.mktemp("runs") / "medm2g"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multimodal, "TOGETHER", 4)
        done = toys.run(medm2g, "--data", cxr, "--out", out, *TINY, "--train", "--evaluate")
    return cxr, out, done


def rows_of(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]


def steps_of(out):
    """The last step of each stage that has steps, in order."""
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["stage"]: line["step"] for line in map(json.loads, lines) if "step" in line}


def split_of(out):
    return json.loads((out / "split.json").read_text(encoding="utf-8"))


def reports_of(cxr):
    """{name: report} of all who have one."""
    parts = json.loads((cxr / "annotation.json").read_text(encoding="utf-8"))
    return {row["id"]: row["report"] for part in parts.values() for row in part if row["report"]}


def streams_of(cxr):
    """{stream: names of those who have it}, by the files."""
    found = {"text": set(reports_of(cxr))}
    for view in ("xray", "ct", "t2"):
        found[view] = {path.name.split(".")[0] for path in (cxr / "images" / view).iterdir()}
    return found


# ---- train and evaluate --------------------------------------------------------------------------


def test_every_direction_is_scored_by_the_subjects_who_have_it(trained):
    cxr, out, text = trained
    test = set(split_of(out)["test"])
    has = streams_of(cxr)
    found = {row["task"]: row for row in rows_of(out)
             if row["method"] == "MedM2G" and row["metric"] == "psnr" and not row.get("variant")}
    assert set(found) == {"text->xray", "text->ct", "ct->t2", "t2->ct", "text->t2"}
    for task, row in found.items():
        source, target = task.split("->")
        assert set(row["values"]) == test & has[source] & has[target]
    methods = {row["method"] for row in rows_of(out) if row["task"] == "ct->t2"}
    assert {"MedM2G", "autoencoder alone", "mean-of-train", "copy-source"} <= methods


def test_files_of_a_run(trained):
    _, out, text = trained
    for name in ("config.json", "split.json", "last.pt", "log.jsonl", "results.json",
                 "samples.png", "steps.png", "invented.png", "reports_from_ct.json",
                 "reports_from_xray.json"):
        assert (out / name).exists(), name
    # Three rounds of alignment and of flow; four diffusers.
    assert steps_of(out) == {"autoencoder": 3, "text": 4, "alignment": 6, "diffusers": 8, "flow": 3}


def test_reports_are_scored_and_written(trained):
    cxr, out, text = trained
    truth = reports_of(cxr)
    has = streams_of(cxr)
    for stream in ("ct", "xray"):
        written = json.loads((out / f"reports_from_{stream}.json").read_text(encoding="utf-8"))
        names = {row["subject"] for row in written}
        assert names == set(split_of(out)["test"]) & has[stream] & has["text"]
        assert all(row["truth"] == truth[row["subject"]] for row in written)
        own = [row for row in rows_of(out) if row["task"] == f"{stream}->text"]
        assert {row["metric"] for row in own} >= {"bleu1", "bleu4", "rouge", "lesion"}
        assert {row["method"] for row in own} == {"MedM2G", "most frequent report",
                                                  "random report", "text VAE alone",
                                                  "of another patient"}
    assert "Reports, ct->text" in text


def test_evaluation_in_other_batches_is_the_same(trained, monkeypatch, tmp_path):
    cxr, out, _ = trained
    monkeypatch.setattr(multimodal, "TOGETHER", 4)
    again = tmp_path / "again"
    shutil.copytree(out, again)
    toys.run(medm2g, "--data", cxr, "--out", again, "--cache", out.parent / "cache", "--evaluate",
              "--sample-batch", 1)
    before, after = rows_of(out), rows_of(again)
    assert [(row["task"], row["method"], row["metric"]) for row in before] == [
        (row["task"], row["method"], row["metric"]) for row in after]
    for old, new in zip(before, after):
        assert new["values"] == pytest.approx(old["values"], abs=1e-4, nan_ok=True)
    for stream in ("ct", "xray"):
        name = f"reports_from_{stream}.json"
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_figure_of_images_from_a_report(trained, monkeypatch, capsys):
    cxr, out, _ = trained
    status, text = call(medm2g, monkeypatch, capsys, "--data", cxr, "--out", out,
                        "--reproduce", "joint")
    assert status == 0 and (out / "joint.png").exists(), text


def test_synthesis_makes_what_a_subject_lacks(trained, monkeypatch, capsys):
    cxr, out, _ = trained
    status, text = call(medm2g, monkeypatch, capsys, "--data", cxr, "--out", out, "--synthesize")
    assert status == 0, text
    has = streams_of(cxr)
    made = {}
    for path in (out / "synthetic").rglob("*_synthetic.*"):
        name, stream, _ = path.name.split("_")
        made.setdefault(name, set()).add(stream)
    used = split_of(out)["train"]
    for name in set().union(*has.values()) - set(used):
        assert made.pop(name, set()) == {stream for stream in has if name not in has[stream]}
    assert not made
    report = next((out / "synthetic").rglob("*_text_synthetic.txt")).read_text(encoding="utf-8")
    words = torch.load(out / "last.pt", weights_only=True)["about"]["words"]
    assert report.strip() and set(report.split()) <= {*words, "<unk>"}


# ---- from Python ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(trained):
    """The model of the run with larger weights, because hardly trained ones are near zero."""
    model = medm2g.load(trained[1], device="cpu", given=OTHER)
    g = torch.Generator().manual_seed(0)
    for p in model.model.flows.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model


def changed(model, **sampling):
    """The same model with other values of fields."""
    cfg = dataclasses.replace(model.config, **sampling)
    return Trained(dataclasses.replace(model.model, cfg=cfg), cfg)


def random_images(model, n=3):
    C, S = len(model.contrasts), model.size
    return np.random.default_rng(0).random((n, C, S, S), dtype=np.float32)


def test_another_report_gives_other_images(model):
    images = random_images(model)
    one = model.fill(images, ("text",))
    assert np.array_equal(one, model.fill(images, ("text",)))
    other = changed(model, given=REPORT).fill(images, ("text",))
    for stream in ("xray", "ct", "t2"):
        c = model.contrasts.index(stream)
        assert np.abs(one[:, c] - other[:, c]).max() > 1e-2
        assert one[:, c].min() >= 0 and one[:, c].max() <= 1
        assert np.abs(one[0, c] - one[1, c]).max() > 1e-3                   # noise of its own


def test_images_from_a_ct(model):
    images = random_images(model)
    ct, t2, xray = (model.contrasts.index(stream) for stream in ("ct", "t2", "xray"))
    made = model.fill(images, ("ct",))
    assert made.shape == images.shape and np.array_equal(made[:, ct], images[:, ct])
    darker = images.copy()
    darker[0, ct] = 0.1
    other = model.fill(darker, ("ct",))
    for c in (t2, xray):
        assert np.abs(other[0, c] - made[0, c]).max() > 1e-3
        assert np.allclose(other[1:, c], made[1:, c], atol=1e-5)
    one = changed(model, sample_batch=1).fill(images, ("ct",))
    assert np.allclose(one, made, atol=1e-5)


def test_the_report_of_a_subject_counts_more_than_the_given_one(model):
    u = torch.zeros(2, 4, 32, 32)
    known = torch.tensor([c == "text" for c in model.contrasts]).expand(2, -1)
    made = []
    for reports in ({"a": REPORT}, {}, {"a": OTHER, "b": OTHER}):
        own = dataclasses.replace(model.model, reports=reports)
        made.append(own.fill(u, known, [("a", 0), ("b", 0)])[0])
    assert torch.equal(made[1], made[2])                # OTHER is what is given
    assert torch.allclose(made[0][1], made[1][1], atol=1e-5)
    assert (made[0][0] - made[1][0]).abs().max() > 1e-2


def test_text_needs_a_report(model):
    with pytest.raises(ValueError, match="give one with --given"):
        changed(model, given="").fill(random_images(model), ("text",))


def test_only_what_is_wanted_is_made(model):
    u = torch.rand(2, 4, 32, 32)
    known = torch.tensor([c == "ct" for c in model.contrasts]).expand(2, -1)
    wanted = torch.tensor([[c == "t2" for c in model.contrasts],
                           [c == "xray" for c in model.contrasts]])
    made, _ = model.model.fill(u, known, [("a", 0), ("b", 0)], wanted=wanted)
    assert torch.equal((made != u).flatten(2).any(2), wanted)


# ---- what else can be typed ----------------------------------------------------------------------


def test_dry_run_and_check(cxr, trained, monkeypatch, capsys, tmp_path):
    cache = trained[1].parent / "cache"
    status, text = call(medm2g, monkeypatch, capsys, "--data", cxr, "--out", tmp_path / "dry",
                        "--cache", cache, *TINY)
    assert status == 0 and "diffuser of mri: " in text and "cross-guidance of text: " in text, text
    assert "latent (1, 4, 8, 8)" in text and not (tmp_path / "dry").exists()
    status, text = call(medm2g, monkeypatch, capsys, "--data", cxr, "--check")
    assert status == 0 and "usable" in text.splitlines()[-1], text


@pytest.mark.parametrize("words, sentence", [
    (["--rounds", "text-mri"], "--rounds text-mri: no training subject has such a pair"),
    (["--rounds", "text-ct"], "is in none of the rounds text-ct and would not be trained"),
    (["--rounds", "foo"], "--rounds foo: a round is two of text, xray, ct, mri"),
    (["--rounds", "text-text"], "--rounds text-text: a round is two of"),
    (["--rounds", "text-pet"], "--rounds text-pet: a round is two of"),
    (["--only", "t2:pet"], "t2:pet: name different ones of"),
    (["--only", "t2:t2"], "t2:t2: name different ones of"),
    (["--contrasts", "pet,ct"], "pet"),
    (["--eta", "2"], "--eta 2.0: allowed are 0 to 1"),
    (["--steps", "0"], "--steps 0: allowed are 1 to 1000")])
def test_wrong_words_get_one_line(cxr, trained, monkeypatch, capsys, tmp_path, words, sentence):
    status, text = call(medm2g, monkeypatch, capsys, "--data", cxr, "--out", tmp_path / "new",
                        "--cache", trained[1].parent / "cache", *TINY, *words, "--train")
    assert status in (1, 2) and sentence in text and "Traceback" not in text, text
    assert "autoencoder" not in text


# ---- MR contrasts only ---------------------------------------------------------------------------


def test_mr_contrasts_from_one_another(monkeypatch, capsys, tmp_path):
    """Two contrasts are a round with themselves; there is no text at all."""
    data = tmp_path / "ixi"
    out = tmp_path / "run"
    phantom.make("ixi", data, subjects=8, size=32, slices=3)
    status, text = call(medm2g, monkeypatch, capsys, "--data", data, "--out", out, *TINY,
                        "--rounds", "mri-mri", "--train", "--evaluate")
    assert status == 0, text
    tasks = {row["task"] for row in rows_of(out) if row["metric"] == "psnr"}
    assert tasks == {"t2+pd->t1", "t1+pd->t2", "t1+t2->pd"}
    assert steps_of(out) == {"autoencoder": 3, "alignment": 2, "diffusers": 2, "flow": 1}


# ---- slow ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage, step", [("autoencoder", 2), ("text", 2), ("alignment", 3),
                                         ("diffusers", 3), ("flow", 2)])
def test_kill_9_and_the_same_command_end_with_the_same_bits(trained, tmp_path, stage, step):
    cxr, undisturbed, _ = trained
    toys.assert_kill_changes_nothing("medm2g", cxr, tmp_path / "killed", undisturbed, stage, step,
                                     TINY)


@pytest.mark.slow
def test_torchrun_equals_one_process(trained, tmp_path):
    """Each process has one thread in both runs, because more threads round otherwise.

    The optimisers of finished stages stay in the checkpoint here, to be compared.
    """
    cxr = trained[0]
    program = tmp_path / "keeping.py"
    program.write_text("import sys, torch\n"
                       f"sys.path.insert(0, {str(ROOT)!r})\n"
                       "import common.run, common.script, medm2g\n"
                       "class Torch:\n"
                       "    optim = type('', (), {'Optimizer': ()})\n"
                       "    def __getattr__(self, name):\n"
                       "        return getattr(torch, name)\n"
                       "common.run.torch = Torch()\n"
                       "common.script.guarded(medm2g.main)\n")
    out = tmp_path / "two"
    alone = tmp_path / "one"
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for folder, start in ((out, together), (alone, [])):
        done = subprocess.run(
            [sys.executable, *start, program, "--data", cxr, "--out", folder, *TINY, "--train",
             "--evaluate"], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = (torch.load(folder / "last.pt", weights_only=True)["stages"]
                    for folder in (out, alone))
    # Adam divides by the size of the gradients, and turns rounding into steps.  Their means tell.
    for stage, part in (("autoencoder", "optimiser"), ("text", "optimiser"),
                        ("alignment", "encoders"), ("alignment", "optimiser 0"),
                        ("diffusers", "optimiser 0"), ("diffusers", "optimiser 1"),
                        ("diffusers", "optimiser 2"), ("flow", "optimiser 2")):
        pairs = list(zip(*(toys.flat(stages[stage]["parts"][part]) for stages in (ours, theirs))))
        assert len(pairs) > 20
        worst = max((a - b).abs().max().item() for a, b in pairs)
        assert all(torch.allclose(a, b, atol=2e-6) for a, b in pairs), (stage, part, worst)
    assert {row["task"] for row in rows_of(out)} == {row["task"] for row in rows_of(alone)}
