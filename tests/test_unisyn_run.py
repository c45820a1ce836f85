"""unisyn.py as a user runs it, on a few tiny phantoms: train, evaluate, synthesise, figures, Python, and what is typed wrong."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import toys
from conftest import ROOT
from toys import call

import unisyn
from common import studies
from common.run import Run
from data import phantom

TINY = ("--preset demo --size 32 --width 8 --blocks 1 --features 16 --decoder 16,16,16 --slices 4 --patch 16 --encoder-steps 4 --encoder-batch 8 "
        "--epochs 2 --batch 4 --lr 0.002 --train-fraction 0.5 --test-subjects 3 --seed 1").split()


@pytest.fixture(scope="module")
def neuro(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "neuro"
    phantom.make("neuro", folder, subjects=9, size=32, slices=5)
    return folder


@pytest.fixture(scope="module")
def trained(neuro, tmp_path_factory):
    """(folder of data, folder of the run, what was said)."""
    out = tmp_path_factory.mktemp("runs") / "unisyn"
    return neuro, out, toys.run(unisyn, "--data", neuro, "--out", out, *TINY, "--train", "--evaluate")


def results(out):
    return json.loads((out / "results.json").read_text())["rows"]


def test_all_directions_are_scored_by_the_subjects_who_have_them(trained):
    neuro, out, text = trained
    test = json.loads((out / "split.json").read_text())["test"]
    has = {}
    for name in test:
        files = [path.name for path in (neuro / name).rglob("*.nii.gz")]
        has[name] = {c for c, end in (("t1", "T1w"), ("t2", "T2w"), ("ct", "_ct"), ("fdg", "FDG"), ("av45", "AV45"), ("flair", "FLAIR"), ("pd", "PDw"))
                     if any(end in file for file in files)}
    found = {(row["task"], row.get("variant", "")): row for row in results(out) if row["method"] == "UniSyn" and row["metric"] == "psnr"}
    for a in phantom.neuro.FILES:
        for b in phantom.neuro.FILES:
            names = [name for name in test if {a, b} <= has[name]]
            if a == b or not names:
                assert (f"{a}->{b}", "") not in found
                continue
            for variant in ("", "tissue", "volume"):
                assert sorted(found[f"{a}->{b}", variant]["values"]) == names
    assert "from \\ to" in text and (out / "samples.png").exists() and not (out / "steps.png").exists()
    assert "pairs of contrasts are trained on" in text and "scans: " in text


def test_the_volume_of_a_subject_has_one_error(trained):
    """PSNR of the mean squared error over all slices lies below the mean of the slices' PSNR."""
    rows = {(row["task"], row["method"], row.get("variant", "")): row["mean"] for row in results(trained[1]) if row["metric"] == "psnr"}
    pairs = [(value, rows[task, method, ""]) for (task, method, variant), value in rows.items() if variant == "volume"]
    assert len(pairs) > 20 and all(volume <= slices + 1e-6 for volume, slices in pairs)


def test_chosen_directions_are_timed(trained, monkeypatch, capsys):
    neuro, out, _ = trained
    status, text = call(unisyn, monkeypatch, capsys, "--data", neuro, "--out", out, "--evaluate", "--only", "t1:ct,t1:flair")
    assert status == 0 and "| method | t1->ct | t1->flair |" in text, text
    spent = [row for row in results(out) if row["metric"] == "seconds"]
    assert [row["task"] for row in spent] == ["t1->ct", "t1->flair"] and all(value > 0 for row in spent for value in row["values"].values())


def test_synthesis_makes_what_is_missing_and_what_target_names(trained, monkeypatch, capsys):
    neuro, out, _ = trained
    test = json.loads((out / "split.json").read_text())["test"]
    status, text = call(unisyn, monkeypatch, capsys, "--data", neuro, "--out", out, "--synthesize")
    assert status == 0, text
    made = {path.name for path in (out / "synthetic").rglob("*.nii.gz")}
    for name in test:
        for contrast, (kind, end) in phantom.neuro.FILES.items():
            there = (neuro / name / kind / f"{name}_{end}.nii.gz").exists()
            assert (f"{name}_{contrast}_synthetic.nii.gz" in made) != there
    status, text = call(unisyn, monkeypatch, capsys, "--data", neuro, "--out", out, "--synthesize", "--target", "modality=CT kvp=100")
    assert status == 0, text
    path = next((out / "synthetic").rglob("*_ct_kvp-100_synthetic.nii.gz"))
    name = path.name.split("_")[0]
    image = nib.load(path)
    source = nib.load(neuro / name / "anat" / f"{name}_T1w.nii.gz")
    array = image.get_fdata()
    assert np.allclose(image.affine, source.affine) and image.shape == source.shape and b"HU" in image.header["descrip"].tobytes()
    assert not array[source.get_fdata() == 0].any() and -20.01 <= array.min() and array.max() <= 100.01
    status, text = call(unisyn, monkeypatch, capsys, "--data", neuro, "--out", out, "--synthesize", "--target", "modality=CT kvp=100")
    assert status == 0 and "is already in" in text


def test_target_changes_the_image_and_another_value_of_the_target_alone(trained):
    """The record of --target reaches the sentence of the target, and no other."""
    images = np.random.default_rng(0).random((5, 7, 32, 32), dtype=np.float32)
    made = {}
    for words in ("", "modality=T2w TE=60", "modality=T2w TE=140"):
        model = unisyn.load(trained[1], device="cpu", target=words)
        with torch.no_grad():
            model.model.network.mapper.out.weight.copy_(0.5 * torch.randn(model.model.network.mapper.out.weight.shape, generator=torch.Generator().manual_seed(0)))
        made[words] = model.fill(images, ("t1",))
    t2 = model.contrasts.index("t2")
    others = [c for c in range(7) if c != t2]
    short, long = made["modality=T2w TE=60"], made["modality=T2w TE=140"]
    assert np.abs(short[:, t2] - long[:, t2]).max() > 1e-4 and np.array_equal(short[:, others], long[:, others])
    assert np.array_equal(made[""][:, others], long[:, others])


def test_python_door(trained):
    model = unisyn.load(trained[1], device="cpu")
    images = np.random.default_rng(0).random((6, 7, 32, 32), dtype=np.float32)
    filled = model.fill(images, ("t1", "flair"))
    t1, flair = (model.contrasts.index(name) for name in ("t1", "flair"))
    assert filled.shape == images.shape and np.array_equal(filled[:, [t1, flair]], images[:, [t1, flair]])
    changed = images.copy()
    changed[:, flair] = 0.3
    others = [c for c in range(7) if c not in (t1, flair)]
    assert np.array_equal(model.fill(changed, ("t1", "flair"))[:, others], filled[:, others])         # T1w is the source
    # Subjects do not mix, in any order.
    keys = [("a", z) for z in range(3)] + [("b", z) for z in range(3)]
    both = model.fill(images, ("t1",), keys)
    turned = model.fill(images[[3, 4, 5, 0, 1, 2]], ("t1",), keys[3:] + keys[:3])
    assert np.allclose(both[[3, 4, 5, 0, 1, 2]], turned, atol=1e-5)


def test_tissue_of_the_source_limits_the_result(trained):
    model = unisyn.load(trained[1], device="cpu")
    images = np.zeros((4, 7, 32, 32), np.float32)
    t1 = model.contrasts.index("t1")
    images[:, t1, 8:24, 8:24] = 0.5
    images[:, t1, 14, 14] = 0                                                                   # a hole is filled
    made = model.fill(images, ("t1",))[:, model.contrasts.index("ct")]
    inside = np.zeros((32, 32), bool)
    inside[8:24, 8:24] = True
    assert not made[:, ~inside].any() and made.min() >= 0 and made.max() <= 1


def test_a_sweep_encodes_once(trained, monkeypatch, capsys):
    neuro, out, _ = trained
    calls = {"encoder": 0, "decoder": 0}
    of = Run.trained

    def counted(run, part, *names):
        network = of(run, part, *names)
        for name in calls:
            def count(module, inputs, output, name=name):
                calls[name] += 1
            getattr(network, name).register_forward_hook(count)
        return network
    monkeypatch.setattr(Run, "trained", counted)
    status, text = call(unisyn, monkeypatch, capsys, "--data", neuro, "--out", out, "--reproduce", "sweep", "--sweep", "TE=60:140:5")
    assert status == 0 and "rank correlation" in text, text
    assert calls["decoder"] == 5 * calls["encoder"] > 0
    assert (out / "sweep-t2-TE.png").exists() and (out / "sweep-t2-TE.csv").read_text(encoding="utf-8").count("\n") % 5 == 1


def test_text_study(trained, monkeypatch, capsys):
    status, text = call(unisyn, monkeypatch, capsys, "--data", trained[0], "--out", trained[1], "--reproduce", "text")
    assert status == 0 and "| own | other | typical | no numbers | ceiling: typical | ceiling: own |" in text, text
    assert (trained[1] / "text.csv").exists()


def test_dry_run_benchmark_and_check(trained, monkeypatch, capsys, tmp_path):
    neuro = trained[0]
    status, text = call(unisyn, monkeypatch, capsys, "--data", neuro, "--out", tmp_path / "dry")
    assert status == 0 and "sentence: Modality: T1w; Age: " in text and "mapper: " in text and not (tmp_path / "dry").exists(), text
    monkeypatch.setattr(studies.speed, "__defaults__", ((16, 16, 12), 9))
    status, text = call(unisyn, monkeypatch, capsys, "--data", neuro, "--out", tmp_path / "dry", *TINY, "--benchmark")
    assert status == 0 and "9 values of a sweep take" in text and "GFLOP/s here" in text, text
    status, text = call(unisyn, monkeypatch, capsys, "--data", neuro, "--check")
    assert status == 0 and "prompt: Modality: FLAIR" in text and "usable" in text.splitlines()[-1]


@pytest.mark.parametrize("words, sentence", [
    (["--evaluate", "--only", "t1:pet"], "name two different ones of"),
    (["--synthesize", "--target", "modality=SWI"], "this model makes"),
    (["--evaluate", "--target", "TE=90"], "say which modality="),
    (["--synthesize", "--target", "modality=T2w te=90"], "does not tell te; it tells age"),
    (["--reproduce", "sweep", "--sweep", "dose=1:2:3"], "does not tell dose"),
    (["--evaluate", "--fusion", "attention"], "reads the target's sentence only"),
    (["--train", "--alpha", "literal"], 'alpha was "exp", now "literal"'),
])
def test_wrong_words_get_one_line(trained, monkeypatch, capsys, words, sentence):
    status, text = call(unisyn, monkeypatch, capsys, "--data", trained[0], "--out", trained[1], *words)
    assert status in (1, 2) and sentence in text and "Traceback" not in text, text


def test_rate_is_halved_after_each_third():
    """1e-4, 5e-5, 2.5e-5 at 0, 100 and 200 of 300 epochs."""
    cfg = unisyn.Config()
    for epoch, wanted in ((0, 1e-4), (99, 1e-4), (100, 5e-5), (199, 5e-5), (200, 2.5e-5), (299, 2.5e-5)):
        assert abs(unisyn.rate(cfg, epoch * 7, 300 * 7) - wanted) < 1e-12


def test_classes_of_a_batch_are_balanced_and_sentences_are_those_of_the_scans(neuro, monkeypatch, tmp_path):
    """Of 30 samples, each class (contrast and vendor) gets an equal share; at most one field of a sentence is hidden."""
    drawn = {}

    def spy(run, ds, captions, *args, draw, **rest):
        drawn.update(draw=draw, captions=captions(ds.rows("train")), ds=ds)
        raise KeyboardInterrupt
    monkeypatch.setattr(unisyn, "train_encoder", spy)
    monkeypatch.setattr(sys, "argv", ["unisyn.py", "--data", str(neuro), "--out", str(tmp_path / "run"), *TINY, "--train"])
    with pytest.raises(KeyboardInterrupt):
        unisyn.main()
    ds = drawn["ds"]
    found = []
    hidden = 0
    for step in range(20):
        rows, channels, texts = drawn["draw"](step, 30)
        for row, c, text in zip(rows, channels.tolist(), texts):
            own = drawn["captions"][row][c]
            differ = sum(a != b for a, b in zip(own.split("; "), text.split("; ")))
            assert differ <= 1 and len(own.split("; ")) == len(text.split("; "))
            assert text.split("; ")[0] == own.split("; ")[0]
            hidden += differ
            vendor = own.split("Scanner: ")[1].split(";")[0].replace("3 T ", "").replace("1.5 T ", "").split()[0]
            found.append((ds.contrasts[c], vendor))
    counts = [found.count(kind) for kind in set(found)]
    assert max(counts) - min(counts) <= 1 + 20 * 30 / len(counts) * 0.05
    assert 0.04 < hidden / 600 < 0.16


# ---- slow ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage, step", [("encoder", 2), ("synthesis", 3)])
def test_kill_9_and_the_same_command_end_with_the_same_bits(trained, tmp_path, stage, step):
    neuro, undisturbed, _ = trained
    toys.assert_kill_changes_nothing("unisyn", neuro, tmp_path / "killed", undisturbed, stage, step, TINY)


@pytest.mark.slow
def test_torchrun_equals_one_process(trained, tmp_path):
    neuro, alone, _ = trained
    out = tmp_path / "two"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "unisyn.py", "--data", neuro, "--out", out, *TINY,
                           "--train", "--evaluate"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    a, b = (torch.load(p / "last.pt", weights_only=True)["stages"]["synthesis"]["parts"]["network"] for p in (out, alone))
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=5e-3, rtol=2e-2) for k in a)
    assert {row["task"] for row in results(out)} and "pairs of contrasts" in done.stdout


@pytest.mark.slow
def test_one_pair_is_learned_by_heart():
    """400 steps of the demo network on one slab: mean error below 0.02."""
    torch.manual_seed(0)
    cfg = unisyn.Config(size=32, patch=32, encoder="demo", width=48, blocks=4, features=128, decoder=(256, 128, 128))
    network = unisyn.GFM(cfg, 128, 96)
    x = torch.nn.functional.avg_pool2d(torch.rand(1, 8, 40, 40, generator=torch.Generator().manual_seed(1)), 9, 1)
    x = (x - x.min()) / (x.max() - x.min())
    y = 1 - x ** 2
    g = torch.Generator().manual_seed(2)
    texts = [unisyn.Features(None, None, torch.randn(1, 128, generator=g)) for _ in range(2)]
    run = SimpleNamespace(autocast=torch.enable_grad, device=torch.device("cpu"))
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(400):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (1 - step / 400) + 1e-5
        loss, facts = unisyn.losses(cfg, run, network, x, y, *texts)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
    assert facts["L_s"] < 0.02
