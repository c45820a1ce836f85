"""The scripts as a user runs them, on a tiny phantom: train, kill, continue, evaluate, synthesise, and everything typed wrong."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import toys
from conftest import ROOT
from toys import flat, weights

import apt
import medm2g
import metadb
import rlbcd
import unisyn
from common import script
from common.files import RunError
from data import phantom

TINY = ("--preset demo --size 32 --base 8 --mult 1,2 --attention 16 --head-dim 8 --groups 4 --encoder-steps 3 --encoder-batch 8 --mif-epochs 2 "
        "--mif-batch 8 --steps 6 --batch 4 --M 100 --S 4 --N 4 --train-fraction 0.5 --test-subjects 3 --test-slices 2 --sample-batch 5").split()


@pytest.fixture(scope="session")
def brats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "brats"
    phantom.make("brats", folder, subjects=7, size=32, slices=4)
    return folder


def call(monkeypatch, capsys, *words):
    return toys.call(apt, monkeypatch, capsys, *words)


@pytest.fixture(scope="session")
def trained(brats, tmp_path_factory):
    """A finished tiny run: (data folder, run folder, output)."""
    out = tmp_path_factory.mktemp("runs") / "apt"
    done = subprocess.run([sys.executable, "apt.py", "--data", brats, "--out", out, *TINY, "--train", "--evaluate"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return brats, out, done.stdout


def test_train_and_evaluate_leave_what_they_promise(trained):
    _, out, text = trained
    for name in ("config.json", "log.txt", "log.jsonl", "last.pt", "codebook.png", "results.json", "samples.png", "steps.png"):
        assert (out / name).exists(), name
    results = json.loads((out / "results.json").read_text())
    assert results["phantom"] is True and results["config"]["steps"] == 6 and "subject" in results["protocol"]
    rows = {(r["task"], r["method"], r["metric"]): r for r in results["rows"]}
    for method in ("APT", "prior alone", "copy-source", "mean-of-train", "intensity-lookup"):
        row = rows["t1+t1ce+t2->flair", method, "psnr"]
        assert row["n"] == 3 and len(row["values"]) == 3 and np.isfinite(row["mean"]) and row["ci95"][0] <= row["mean"] <= row["ci95"][1]
    assert len({task for task, _, _ in rows}) == 4 and "| APT |" in text


def test_the_same_command_again_says_that_it_is_finished(trained, monkeypatch, capsys):
    data, out, _ = trained
    before = (out / "last.pt").read_bytes()
    status, text = call(monkeypatch, capsys, "--data", data, "--out", out, *TINY, "--train")
    assert status == 0 and "training: finished" in text
    assert (out / "last.pt").read_bytes() == before


def test_another_configuration_is_refused_and_a_sampling_switch_is_not(trained, monkeypatch, capsys):
    data, out, _ = trained
    status, text = call(monkeypatch, capsys, "--data", data, "--out", out, *TINY, "--train", "--lr", "0.5")
    assert status == 1 and "lr was 0.001, now 0.5" in text and "Traceback" not in text
    first = json.loads((out / "results.json").read_text())["rows"]
    status, text = call(monkeypatch, capsys, "--data", data, "--out", out, "--evaluate", "--prior", "noise")
    second = json.loads((out / "results.json").read_text())
    assert status == 0 and second["config"]["prior"] == "noise" and second["config"]["N"] == 4          # the rest as trained
    assert json.loads((out / "results_1.json").read_text())["rows"] == first and second["rows"] != first
    assert not any(r["method"] == "prior alone" for r in second["rows"])


@pytest.fixture(scope="session")
def loaded(trained):
    """(config, run, model, four test slices (4, C, H, W)) of the tiny run; its network made lively, six steps leave it near zero."""
    data, out, _ = trained
    cfg, run, ds = toys.open_run(apt, data, out)
    model = apt.load_model(cfg, run, [])
    g = torch.Generator().manual_seed(0)
    for p in model.unet.parameters():
        p += 0.05 * torch.randn(p.shape, generator=g)
    return cfg, run, model, torch.from_numpy(ds.images[[0, 5, 9, 13]].astype(np.float32))


def impute(loaded, u=None, known=(False, True, True, True), keys=(0, 1, 2, 3), **switches):
    cfg, run, model, images = loaded
    u = images if u is None else u
    model = dataclasses.replace(model, cfg=dataclasses.replace(cfg, **switches))
    return model.fill(u, torch.tensor([known] * len(u)), [("s", k) for k in keys])[0]


@pytest.mark.parametrize("words", [["--schedule", "linear"], ["--mif", "zero"], ["--size", "64"]])
def test_what_was_trained_in_cannot_be_changed_in_sampling(trained, words, monkeypatch, capsys):
    data, out, _ = trained
    status, text = call(monkeypatch, capsys, "--data", data, "--out", out, "--evaluate", *words)
    assert status == 2 and "was trained otherwise" in text and words[0][2:] in text


@pytest.mark.parametrize("switch", [{"prior": "random"}, {"prior": "zero"}, {"prior": "noise"}, {"curves": "scalar"}, {"stage2": False}, {"M": 50}, {"S": 3}, {"N": 5},
                                    {"alpha": 0.0}, {"w": 1.0}, {"paste": "both"}])
def test_every_sampling_switch_changes_the_result(loaded, switch):
    assert not torch.allclose(impute(loaded, **switch), impute(loaded), atol=1e-4)


def test_alpha_is_scaled_with_the_image_size(loaded, monkeypatch):
    seen = []
    monkeypatch.setattr(apt, "guided_x0", lambda eps_model, x_t, t, alpha_bar, y, A, alpha: seen.append(alpha) or x_t)
    impute(loaded)
    assert set(seen) == {20 * 32 / 256}


def test_a_missing_contrast_cannot_influence_the_output(loaded):
    spoiled = loaded[3].clone()
    spoiled[:, 0] = float("nan")
    assert torch.equal(impute(loaded), impute(loaded, spoiled))


def test_gradient_with_respect_to_a_missing_contrast_is_exactly_zero(loaded):
    u = loaded[3][:1].clone().requires_grad_()
    impute(loaded, u, keys=[0], alpha=0.0).sum().backward()
    assert not u.grad[:, 0].any() and u.grad[:, 1:].any()


def test_samples_do_not_depend_on_batch_mates_or_order(loaded):
    together = impute(loaded)
    assert torch.allclose(impute(loaded, loaded[3].flip(0), keys=(3, 2, 1, 0)), together.flip(0), atol=2e-4)
    assert torch.allclose(impute(loaded, loaded[3][2:3], keys=[2]), together[2:3], atol=2e-4)
    assert not torch.allclose(impute(loaded, keys=(4, 5, 6, 7)), together, atol=1e-2)


@pytest.mark.parametrize("known", [(True, False, False, False), (False, True, False, True), (True, True, True, False)])
def test_known_contrasts_come_back_untouched_in_any_pattern(loaded, known):
    result = impute(loaded, known=known)
    assert torch.equal(result[:, list(known)], loaded[3][:, list(known)]) and torch.isfinite(result).all()
    assert 0 <= result.min() and result.max() <= 1


def test_sampling_without_a_prior_needs_no_codebook(loaded):
    cfg, run, model, u = loaded
    without = dataclasses.replace(model, codebooks=None)
    impute((cfg, run, without, u), prior="noise")
    with pytest.raises(TypeError):
        impute((cfg, run, without, u))


def test_the_sampler_can_be_watched(loaded):
    """One entry per evaluation, at the steps of the grid, down to 0 twice; the last estimate is what comes out where nothing guides."""
    cfg, run, model, u = loaded
    watched, known = [], torch.tensor([[False, True, True, True]])
    free = dataclasses.replace(cfg, alpha=0.0, stage2=False)
    out, _ = dataclasses.replace(model, cfg=free).fill(u[:1], known, [("s", 0)], watched)
    assert [t for t, _, _ in watched] == ["t = 100", "t = 75", "t = 50", "t = 25", "t = 0"]
    assert torch.allclose((watched[-1][2][:, 0] + 1) / 2, out[:, 0], atol=1e-5)
    del watched[:]
    model.fill(u[:1], known, [("s", 0)], watched)
    assert [t for t, _, _ in watched[cfg.S + 1:]] == ["t = 50", "t = 50", "t = 25", "t = 0"]


def test_figure_6_differs_between_slices_by_z_alone(loaded, monkeypatch):
    cfg, run, model, _ = loaded
    ds, drawn = toys.open_run(apt, run.args.data, run.args.out)[2], {}
    monkeypatch.setattr(apt.pictures, "grid", lambda path, rows, columns, labels, note: drawn.update(rows=rows, path=path))
    apt.figure6(cfg, run, ds, model)
    made = np.stack([np.stack(row[4:]) for row in drawn["rows"]])                           # (subjects, C, H, W)
    assert drawn["path"].name == "fig6.png" and len(made) == 3 and np.abs(made[0] - made[1]).max() > 1e-3
    assert all(np.array_equal(row[c], ds.images[r][c]) for row, r in zip(drawn["rows"], ds.spread("test", 1)) for c in range(4))
    apt.figure6(dataclasses.replace(cfg, mif="zero"), run, ds, model)
    same = np.stack([np.stack(row[4:]) for row in drawn["rows"]])
    assert np.abs(same - same[0]).max() < 1e-4                                              # the same z, the same picture


def test_the_codebook_picture_shows_the_prior_that_sampling_takes(loaded, monkeypatch, tmp_path):
    cfg, _, model, u = loaded
    book, drawn = model.codebooks["points"], {}
    monkeypatch.setattr(apt.pictures, "grid", lambda path, rows, columns, labels, note: drawn.update(rows=rows, labels=labels))
    apt.draw_codebook(tmp_path / "x.png", book, model.contrasts, u[0])
    for c in range(4):
        known = torch.tensor([[k != c for k in range(4)]])
        expected = apt.prior_images(dataclasses.replace(cfg, prior="adaptive"), book, u[:1], known, [None])[0, c]
        source, curve = book.ranked(c, [k for k in range(4) if k != c])[0]
        image, plot, prior, truth = drawn["rows"][2 * c]
        assert torch.allclose(prior, expected, atol=1e-3) and torch.equal(truth, u[0, c]) and torch.equal(image, u[0, source])
        assert f"from {model.contrasts[source]}: {int(book.votes[c, source, curve])} of" in drawn["labels"][2 * c]
        x = (torch.arange(32) / 31)[20]
        assert abs(float((plot[:, 20] < 1).sum()) / 32 - float(apt.warp(x, book.curves[curve]))) < 0.05   # dark up to the curve


@pytest.mark.slow
def test_a_table_is_made_from_one_trained_model(trained, tmp_path, monkeypatch, capsys):
    """Table 3 trains nothing; its rows equal what the flags beside them give; the second call samples nothing."""
    data, source, _ = trained
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.json", "last.pt"):
        (out / name).write_bytes((source / name).read_bytes())
    status, text = call(monkeypatch, capsys, "--data", data, "--out", out, "--reproduce", "table3")
    assert status == 0 and "training: finished" in text and "continues at step" not in text and not (out / "rows").exists()
    assert "(24.20 / 0.916)" in text and "| adaptive | `--prior adaptive --no-stage2`" in text                  # the paper's, and ours
    table = (out / "tables" / "table3.csv").read_text(encoding="utf-8").splitlines()
    status, again = call(monkeypatch, capsys, "--data", data, "--out", out, "--reproduce", "table3")
    assert status == 0 and "ETA" not in again and (out / "tables" / "table3.csv").read_text(encoding="utf-8").splitlines() == table
    status, _ = call(monkeypatch, capsys, "--data", data, "--out", out, "--evaluate", "--prior", "zero", "--no-stage2")
    alone = next(r for r in json.loads((out / "results.json").read_text())["rows"]
                 if (r["task"], r["method"], r["metric"]) == ("flair+t1+t1ce->t2", "APT", "psnr"))
    row = next(line for line in table if line.startswith("zero,ours,") and ",flair+t1+t1ce->t2,psnr," in line)
    assert f",{alone['mean']}," in row and alone["n"] == 3
    assert {p.name for p in (out / "tables").iterdir()} == {"table3.md", "table3.csv", "table3.png"}


@pytest.mark.slow
def test_rows_that_train_otherwise_take_over_what_does_not_differ(trained, tmp_path, monkeypatch, capsys):
    """The ablation of the fusion module and the encoder: each row removes what its name says."""
    data, source, _ = trained
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.json", "last.pt"):
        (out / name).write_bytes((source / name).read_bytes())
    status, text = call(monkeypatch, capsys, "--data", data, "--out", out, "--reproduce", "anatomy", "--test-slices", "1", "--no-stage2")
    assert status == 0, text
    parts = {path.name: {name: stage["parts"] for name, stage in torch.load(path / "last.pt", weights_only=True)["stages"].items()}
             for path in (out, *(out / "rows").iterdir())}
    full, no_z = parts.pop("run"), parts["mif=zero"]
    assert sorted(parts) == ["context=scaled", "encoder_steps=0", "mif=mean", "mif=zero", "mif_epochs=0"]

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))
    assert same(no_z["encoder"], full["encoder"]) and same(no_z["mif"], full["mif"]) and not same(no_z["diffusion"], full["diffusion"])
    untrained = parts["mif_epochs=0"]
    assert same(untrained["encoder"], full["encoder"]) and same(untrained["codebook"], full["codebook"])
    torch.manual_seed(apt.seed_of(0, "mif"))
    fresh = apt.MutualInformationFusion(apt.clip.SIZES["demo"]["embed"]).state_dict()
    assert all(torch.equal(value, untrained["mif"]["mif"][name]) for name, value in fresh.items())
    assert not same(full["mif"], untrained["mif"])
    blank = parts["encoder_steps=0"]["encoder"]["clip"]
    config = json.loads((out / "rows" / "encoder_steps=0" / "config.json").read_text())["config"]
    assert config["encoder_steps"] == 0 and not same(blank, full["encoder"]["clip"])
    about = torch.load(out / "rows" / "encoder_steps=0" / "last.pt", weights_only=True)["about"]["encoder"]
    start = apt.clip.CLIP.from_state({**about, "weights": blank})
    born = apt.clip.build("demo", ["t1"], 32, seed=0).logit_scale
    assert start.logit_scale.item() == pytest.approx(born.item()) and torch.equal(start.logit_scale, born)
    assert "fusion untrained" in text and len({line.split("|")[3] for line in text.splitlines() if line.startswith("| ") and "psnr" not in line}) > 1


def test_synthesis_writes_volumes_on_the_sources_grid(trained, tmp_path, monkeypatch, capsys):
    """A new folder in which one subject has no FLAIR: all slices, same affine, opens on top of its source."""
    data, out, _ = trained
    new = tmp_path / "new"
    source = sorted(data.glob("BraTS*"))[0]
    (new / "patient7").mkdir(parents=True)
    for contrast in ("t1", "t1ce", "t2"):
        (new / "patient7" / f"{contrast}.nii.gz").write_bytes(next(source.glob(f"*_{contrast}.nii.gz")).read_bytes())
    status, text = call(monkeypatch, capsys, "--data", new, "--out", out, "--synthesize")
    assert status == 0, text
    written = nib.load(out / "synthetic" / "patient7" / "patient7_flair_synthetic.nii.gz")
    t1 = nib.load(new / "patient7" / "t1.nii.gz")
    assert written.shape == t1.shape and np.allclose(written.affine, t1.affine)
    values, mask = written.get_fdata(), t1.get_fdata() > 0
    assert values.min() >= 0 and values.max() <= 1 and all(values[:, :, z].any() for z in range(4))
    assert values[mask].mean() > values[~mask].mean()
    status, text = call(monkeypatch, capsys, "--data", new, "--out", out, "--synthesize")
    assert "already in" in text                                                            # nothing is overwritten


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_kill_9_and_the_same_command_end_with_the_same_bits(trained, tmp_path):
    """Killed in two stages, by watching the checkpoint; the weights of every stage equal those of the undisturbed run."""
    data, undisturbed, _ = trained
    out = tmp_path / "killed"
    command = [sys.executable, "-c", toys.EAGER.format(script="apt"), "--data", data, "--out", out, *TINY, "--train"]
    for stage, step in (("mif", 1), ("diffusion", 3)):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        end = time.time() + 60
        while time.time() < end and process.poll() is None:
            if (out / "last.pt").exists():
                saved = torch.load(out / "last.pt", weights_only=True)["stages"].get(stage, {})
                if saved.get("step", 0) >= step:
                    break
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continues at step" in done.stdout or "finished" in done.stdout
    ours, theirs = weights(out), weights(undisturbed)
    assert len(ours) == len(theirs) > 100 and all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.slow
def test_hash_seed_locale_and_optimised_python_change_nothing(trained, tmp_path):
    data, plain, _ = trained
    out = tmp_path / "odd"
    done = subprocess.run([sys.executable, "-O", "apt.py", "--data", data, "--out", out, *TINY, "--train"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "de_DE.UTF-8", "LC_NUMERIC": "de_DE.UTF-8"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(torch.equal(a, b) for a, b in zip(weights(out), weights(plain)))


@pytest.mark.slow
def test_a_run_is_trained_further_when_steps_are_raised(trained, tmp_path, monkeypatch, capsys):
    """6 steps, then 9 on a copy of the data: the bits of 9 at once; fewer are refused; pictures of what is made so far."""
    import shutil
    data, source, _ = trained
    out = tmp_path / "more"
    out.mkdir()
    for name in ("config.json", "last.pt"):
        (out / name).write_bytes((source / name).read_bytes())
    copied = shutil.copytree(data, tmp_path / "elsewhere" / "scans", copy_function=shutil.copyfile)         # new time stamps
    status, text = call(monkeypatch, capsys, "--data", copied, "--out", out, *TINY, "--steps", "9", "--train")
    assert status == 0 and "trained further: steps 6 -> 9" in text and "continues at step 6 of 9" in text, text
    status, text = call(monkeypatch, capsys, "--data", data, "--out", out, *TINY, "--steps", "6", "--train")
    assert status == 1 and "steps was 9, now 6" in text
    whole = tmp_path / "whole"
    status, text = call(monkeypatch, capsys, "--data", data, "--out", whole, *TINY, "--steps", "9", "--train")
    ours, theirs = (torch.load(p / "last.pt", weights_only=True)["stages"]["diffusion"]["parts"]["ema"] for p in (out, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert sorted(p.name for p in (whole / "previews").iterdir()) == ["0000004.png"]


def test_an_unfinished_run_is_used_as_far_as_it_is_and_says_so(trained, tmp_path, monkeypatch, capsys):
    data, source, _ = trained
    out = tmp_path / "half"
    out.mkdir()
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    content = torch.load(source / "last.pt", weights_only=True)
    content["stages"]["diffusion"].update(step=4, finished=False)
    torch.save(content, out / "last.pt")
    status, text = call(monkeypatch, capsys, "--data", data, "--out", out, "--evaluate", "--test-slices", "1")
    assert status == 0 and "not finished (diffusion 4 of 6 steps)" in text
    assert json.loads((out / "results.json").read_text())["unfinished"] == "diffusion 4 of 6 steps"
    del content["stages"]["diffusion"]
    torch.save(content, out / "last.pt")
    status, text = call(monkeypatch, capsys, "--data", data, "--out", out, "--evaluate")
    assert status == 1 and "has not reached its last stage, diffusion" in text and "Traceback" not in text


def test_an_exported_model_is_smaller_and_gives_the_same(trained, tmp_path, monkeypatch, capsys):
    data, out, _ = trained
    status, text = call(monkeypatch, capsys, "--data", data, "--out", out, "--export", tmp_path / "small")
    assert status == 0 and "exported" in text and (tmp_path / "small" / "last.pt").stat().st_size < 0.7 * (out / "last.pt").stat().st_size
    u = torch.rand(2, 4, 32, 32, generator=torch.Generator().manual_seed(0)).numpy()
    whole, small = (apt.load(folder, device="cpu").fill(u, ("t1", "t2")) for folder in (out, tmp_path / "small"))
    assert np.array_equal(whole, small) and np.abs(whole[:, 0] - u[:, 0]).max() > 0.01
    status, text = call(monkeypatch, capsys, "--data", data, "--out", out, "--export", tmp_path / "small")
    assert status == 1 and "exists; name a new folder" in text


def test_a_model_is_loaded_from_python_without_side_effects(trained, capsys):
    data, out, _ = trained
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    model = apt.load(out, device="cpu", M=50)
    assert model.contrasts == ("flair", "t1", "t1ce", "t2") and model.size == 32 and model.config.M == 50 and capsys.readouterr().out == ""
    filled = model.fill(np.full((1, 4, 32, 32), 0.5), known=[True, False, True, True])
    assert filled.shape == (1, 4, 32, 32) and filled.dtype == np.float32 and (filled[:, [0, 2, 3]] == 0.5).all()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(RunError, match="lr cannot be changed"):
        apt.load(out, lr=3)
    with pytest.raises(RunError, match="does not exist"):
        apt.load(out / "nowhere")
    with pytest.raises(RunError, match="holds no trained model"):
        apt.load(out / "previews")
    assert "sampling: fields of the config" in apt.load.__doc__


@pytest.mark.slow
def test_torchrun_equals_one_process(trained, tmp_path):
    """Two processes, three test subjects: the weights agree to rounding, each subject is scored once, the scores agree."""
    data, alone, _ = trained
    out = tmp_path / "two"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "apt.py", "--data", data, "--out", out, *TINY,
                           "--train", "--evaluate"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    for a, b in zip(weights(out), weights(alone)):
        assert torch.allclose(a.float(), b.float(), atol=2e-4, rtol=1e-3)
    two, one = ({(r["task"], r["method"]): r for r in json.loads(p.read_text())["rows"] if r["metric"] == "psnr"}
                for p in (out / "results.json", alone / "results_1.json" if (alone / "results_1.json").exists() else alone / "results.json"))
    for key, row in two.items():
        assert row["n"] == 3 and row["values"].keys() == one[key]["values"].keys()
        assert row["slices"] == one[key]["slices"] == 3 * 2                               # nothing twice, nothing left out
        assert row["mean"] == pytest.approx(one[key]["mean"], abs=0.1)


@pytest.mark.parametrize("words, status, message", [
    (["--batch", "0"], 2, "--batch 0: allowed are 1 to"), (["--batch", "-3"], 2, "--batch -3"), (["--steps", "0"], 2, "--steps 0"),
    (["--lr", "nan"], 2, "--lr nan"), (["--lr", "-1"], 2, "--lr -1"), (["--workers", "-1"], 2, "--workers -1"), (["--size", "7"], 2, "--size 7"),
    (["--size", "36", "--mult", "1,1,1,1"], 2, "multiple of 8"), (["--prior", "best"], 2, "invalid choice"), (["--M", "5", "--S", "10"], 2, "--S 10"),
    (["--stepz", "3"], 2, "unrecognized"), (["--missing", "t3", "--train", "--evaluate"], 2, "--missing t3: name some"), (["--contrasts", "t1,t9"], 2, "t9"),
    (["--contrasts", "t1"], 2, "two or more are needed"), (["--device", "cuda"], 1, "--device cuda"), (["--evaluate"], 1, "holds no trained model"),
    (["--split", "nowhere.json"], 1, "nowhere.json")])
def test_wrong_words_get_one_line(brats, tmp_path, monkeypatch, capsys, words, status, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, text = call(monkeypatch, capsys, "--data", brats, "--out", tmp_path / "run", *TINY, *words)
    assert code == status and message in text and "Traceback" not in text


@pytest.mark.parametrize("make, message", [
    (lambda p: p.mkdir(), "no"), (lambda p: None, "does not exist"), (lambda p: p.write_text("x"), "is a file")])
def test_wrong_data_folders_get_one_line(tmp_path, monkeypatch, capsys, make, message):
    make(tmp_path / "data")
    code, text = call(monkeypatch, capsys, "--data", tmp_path / "data", "--out", tmp_path / "run", "--train")
    error = [line for line in text.splitlines() if line.startswith("error")]
    assert code == 1 and len(error) == 1 and message in error[0] and "Traceback" not in text


def test_a_batch_larger_than_the_training_set_still_works(brats, tmp_path, monkeypatch, capsys):
    code, text = call(monkeypatch, capsys, "--data", brats, "--out", tmp_path / "run", *TINY, "--batch", "64", "--steps", "1", "--mif-batch", "999", "--train")
    assert code == 0, text


def test_dry_run_writes_no_run_and_check_reports(brats, tmp_path, monkeypatch, capsys):
    code, text = call(monkeypatch, capsys, "--data", brats, "--out", tmp_path / "run", *TINY)
    assert code == 0 and "parameters" in text and "dry run" in text and not (tmp_path / "run" / "config.json").exists()
    code, text = call(monkeypatch, capsys, "--data", brats, "--out", tmp_path / "run", "--check")
    assert code == 0 and "BraTS2021_00000" in text


def test_benchmark_prints_rates(brats, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.benchmark, "__defaults__", (0.1,))
    code, text = call(monkeypatch, capsys, "--data", brats, "--out", tmp_path / "run", *TINY, "--benchmark")
    assert code == 0 and "slices/s" in text and "GFLOP/s" in text and "data-wait" in text


def test_evaluating_on_training_subjects_is_refused(trained, tmp_path, monkeypatch, capsys):
    data, out, _ = trained
    train = torch.load(out / "last.pt", weights_only=True)["about"]["train"]
    names = sorted(p.name for p in data.glob("BraTS*"))
    split = {"train": [n for n in names if n not in train], "val": [], "test": train}
    (tmp_path / "split.json").write_text(json.dumps(split))
    code, text = call(monkeypatch, capsys, "--data", data, "--out", out, "--evaluate", "--split", tmp_path / "split.json")
    assert code == 1 and "4 test subjects served the training" in text


def test_readme_commands_exist_and_ci_runs_the_test_command():
    """Each command line of the README parses; .ci/run holds its test command literally."""
    import re
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", readme, re.S)
    assert "python apt.py --data data/brats --train" in blocks[0] and blocks[1].strip() in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    from common.cli import parse
    from common.tables import load_tables
    for line in (line for block in blocks for line in block.splitlines()):
        for name, words in re.findall(r"(apt|medm2g|metadb|rlbcd|unisyn)\.py ([^#&|]*)", line):
            module = {"apt": apt, "medm2g": medm2g, "metadb": metadb, "rlbcd": rlbcd, "unisyn": unisyn}[name]
            tables = [*load_tables(name), *module.METHOD.figures]
            parse(module.Config, module.PRESETS, tables, module.LIMITS, lambda folder: "paper", module.__doc__, words.split(), name)
    for path in re.findall(r"\]\(((?:data|common|tests|apt)[^)#]*)\)", readme):
        assert Path(ROOT / path).exists(), path


def test_the_python_section_of_the_readme_runs(trained, tmp_path, monkeypatch):
    """Its code, word for word, with a trained toy model, an array and two scans in the folder where it runs."""
    import re
    data_folder, out, _ = trained
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## From Python")[1]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    assert len(code.splitlines()) <= 14
    code = code.replace('"runs/apt-brats"', repr(str(out))).replace('"/path/to/this/repository"', repr(str(ROOT)))
    subject = next(data_folder.glob("BraTS*"))
    for contrast in ("t1", "t2"):
        (tmp_path / f"{contrast}.nii.gz").write_bytes((subject / f"{subject.name}_{contrast}.nii.gz").read_bytes())
    monkeypatch.chdir(tmp_path)
    names = {"images": np.random.default_rng(0).random((2, 4, 32, 32), np.float32)}
    exec(code, names)
    made, source = nib.load(tmp_path / "flair.nii.gz"), nib.load(tmp_path / "t1.nii.gz")
    assert made.shape == source.shape and np.allclose(made.affine, source.affine) and made.get_fdata().std() > 0
    assert np.array_equal(names["filled"][:, names["model"].contrasts.index("t1")], names["scan"].images[:, names["model"].contrasts.index("t1")])


def test_the_files_that_a_script_lists_are_all_that_it_needs(tmp_path):
    """Those of each script are copied into an empty folder, and the script shows its tables there. One process does so for all five."""
    import re
    import shutil
    folders = []
    for name in ("apt", "medm2g", "metadb", "rlbcd", "unisyn"):
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        listed = re.search(r"NEEDS  data/ and these files of common/:(.*?)\"\"\"", text, re.S)[1].split()
        assert len(listed) > 10
        folder = tmp_path / name
        (folder / "common").mkdir(parents=True)
        for file in (f"{name}.py", *(f"common/{file}" for file in ("__init__.py", *listed))):
            shutil.copy(ROOT / file, folder / file)
        shutil.copytree(ROOT / "data", folder / "data", ignore=lambda folder, names: {n for n in names if n in (*phantom.SETS, "pictures")})
        folders.append(folder)
    run_all = """
import os, runpy, sys
folders = sys.argv[1:]
for folder in folders:
    os.chdir(folder)
    sys.path[0] = folder
    for module in [name for name in sys.modules if name.split(".")[0] in ("common", "data")]:
        del sys.modules[module]
    script = os.path.basename(folder) + ".py"
    sys.argv = [script, "--reproduce", "list"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{script} ended with {end.code}")
    print("listed by", script)
"""
    done = subprocess.run([sys.executable, "-c", run_all, *map(str, folders)], cwd=tmp_path, capture_output=True, text=True)
    parts = re.split(r"listed by \w+\.py", done.stdout)
    assert done.returncode == 0 and len(parts) == 6, done.stderr
    assert all("table2" in part for part in parts[:5]), done.stdout


@pytest.mark.parametrize("rank, made", [(0, [1]), (1, [])], ids=["first", "other"])
def test_a_figure_is_made_by_one_process_alone(monkeypatch, rank, made):
    """A figure that trains would otherwise wait for processes that do not take part."""
    monkeypatch.setattr(script, "other_cohort", lambda run, ds, split: (ds, None))
    monkeypatch.setattr(script, "say_how_far", lambda method, run: None)
    run = SimpleNamespace(args=SimpleNamespace(external=None, split=None, reproduce="fig"), out="out", rank=rank, world=3, works_on=lambda ds: None)
    worlds = []
    script.score(SimpleNamespace(load=lambda *what: "model"), None, run, SimpleNamespace(subjects=[]), lambda cfg, run, ds, model: worlds.append(run.world))
    assert worlds == made and run.world == 3
