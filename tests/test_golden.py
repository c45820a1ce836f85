"""Golden runs: a toy training of each script, its evaluation, a table and a synthesis give the numbers stored in tests/golden.

The other tests hold the equations. These hold the wiring: which slice, which weights, which prompt, which noise goes
where. A wrong wire changes a loss or a score. The stored numbers are compared to about 1e-3; rounding is far below.

    python -m pytest tests/test_golden.py --renew-golden        # writes tests/golden again; only if numbers were meant to change
"""
import csv
import dataclasses
import json
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy import ndimage
from toys import without_estimates

import apt
import common.script
import data
import medm2g
import metadb
import rlbcd
import unisyn
from common import downstream, multimodal
from common.run import Run
from common.vqae import VQAE
from data import phantom

HOME = ROOT / "tests" / "golden"
NETWORK = "--preset demo --size 32 --base 8 --mult 1,2 --attention 16 --head-dim 8 --groups 4 --encoder-steps 6 --encoder-batch 8".split()
PEOPLE = "--train-fraction 0.5 --test-subjects 2 --test-slices 2 --sample-batch 5 --seed 3".split()        # 4 train, 2 validate, 2 test
APT = [*NETWORK, *PEOPLE, *"--mif-epochs 6 --mif-batch 8 --mif-lr 0.003 --steps 7 --batch 4 --lr 0.05 --ema 0.8 --M 400 --S 4 --N 4".split()]
RLBCD = [*PEOPLE, *("--preset demo --size 32 --base 8 --mult 1,2 --head-dim 8 --groups 4 --ae-base 8 --ae-mult 1,2 --codes 16 --ae-steps 4 "
                    "--ae-batch 6 --ae-lr 0.001 --evaluator-steps 4 --steps 4 --batch 4 --lr 0.002 --ema 0.8 --S 4").split()]
UNISYN = [*PEOPLE, *("--preset demo --size 32 --width 8 --blocks 1 --features 16 --decoder 16,16,16 --slices 4 --patch 16 --encoder-steps 6 "
                     "--encoder-batch 8 --epochs 4 --batch 4 --lr 0.003 --decay halved --test-slices 3").split()]
MEDM2G = [*PEOPLE, *("--preset demo --size 32 --test-slices 1 --ae-base 8 --ae-mult 1,2 --ae-steps 4 --ae-batch 6 --ae-lr 0.001 --text-width 16 "
                     "--text-heads 2 --text-z 8 --text-length 12 --text-steps 10 --text-batch 4 --text-lr 0.003 --align-steps 3 --align-batch 6 --projector 8 "
                     "--base 8 --mult 1,2 --attention 8 --groups 4 --text-base 8 --width 16 --guides 2 --steps-image 4 --steps-text 3 --batch 4 "
                     "--batch-text 4 --flow-steps 3 --steps 4").split()]
METADB = [*NETWORK, *PEOPLE, *"--disc-base 8 --epochs 1 --batch 4 --N 4 --lr 0.02 --lr-d 0.004 --lambda-sem 0.3".split()]


class Recorder:
    """Runs a script as if typed, with everything that it logs in training kept in .numbers."""

    def __init__(self, script, monkeypatch, folder):
        self.script, self.monkeypatch, self.numbers = script, monkeypatch, {}
        self.folder = folder
        log = Run.log

        def record(run, **values):
            for name, value in values.items():
                self.numbers.setdefault(f"log {name}", []).append(float(value.detach()) if torch.is_tensor(value) else float(value))
            log(run, **values)

        def small(tensor):
            """Layers that start at zero would hide every mistake below them, so here they start at small random values."""
            g = torch.Generator().manual_seed(tensor.numel())
            with torch.no_grad():
                return tensor.copy_(0.1 * torch.randn(tensor.shape, generator=g))
        without_estimates(monkeypatch)
        if script is not apt:               # APT's pictures during training show that they do not change it
            monkeypatch.setattr(common.script, "preview", lambda *about: None)
        monkeypatch.setattr(Run, "log", record)
        monkeypatch.setattr(torch.nn.init, "zeros_", small)

    def call(self, *words):
        words = [f"{self.script.__name__}.py", "--out", self.folder / "run", "--device", "cpu", *words]
        self.monkeypatch.setattr(sys, "argv", list(map(str, words)))
        self.script.main()

    def keep_scores(self, title):
        """Every score of every subject in results.json."""
        content = json.loads((self.folder / "run" / "results.json").read_text())
        for row in content["rows"]:
            if row["metric"] in ("psnr", "ssim", "rouge", "fd") or row["metric"].startswith("dice"):
                for subject, value in row["values"].items():
                    self.numbers[f"{title}: {row['task']}, {row['method']}, {row['metric']}, {subject}"] = value

    def keep_table(self, name):
        """What a table compares: the mean over the tasks, and the difference to the row of reference."""
        with open(self.folder / "run" / "tables" / f"{name}.csv", encoding="utf-8", newline="") as f:
            for line in csv.DictReader(f):
                if line["kind"] != "paper only" and line["task"] == "mean" and line["metric"] in ("psnr", "ssim"):
                    for key in ("mean", "difference"):
                        self.numbers[f"{name}: {line['row']}, {line['metric']}, {key}"] = float(line[key]) if line[key] else None

    def keep_volumes(self):
        """Of every synthetic volume: mean, spread, and where its centre is."""
        for path in sorted((self.folder / "run" / "synthetic").rglob("*.nii.gz")):
            volume = np.asarray(nib.load(path).dataobj, dtype=np.float64)
            self.numbers[f"volume {path.name}"] = [volume.mean(), volume.std(), *ndimage.center_of_mass(volume)]

    def compare(self, renew, psnr=0.0, ssim=0.0):
        """With the stored numbers, to 1e-3 of the value and at most 1e-4 near zero (a difference in dB: .02).

        psnr, ssim: further differences that are allowed in scores.
        """
        path = HOME / f"{self.folder.name}.json"
        if renew:
            rounded = json.loads(json.dumps(self.numbers), parse_float=lambda text: float(f"{float(text):.7g}"))
            path.write_text(json.dumps(rounded, indent=0) + "\n", encoding="utf-8")
        stored = json.loads(path.read_text(encoding="utf-8"))
        assert list(self.numbers) == list(stored)
        wrong = []
        for name, wanted in stored.items():
            found = self.numbers[name]
            absolute = 0.02 if name.endswith("psnr, difference") or "dice" in name else 1e-4
            absolute += psnr if "psnr" in name or name.startswith("external") else 0
            absolute += ssim if "ssim" in name or name.startswith("volume") else 0
            if wanted is None or found is None:
                same = wanted is found
            else:
                same = np.shape(found) == np.shape(wanted) and np.allclose(found, wanted, rtol=1e-3, atol=absolute)
            if not same:
                wrong.append(f"{name}: {found}, stored {wanted}")
        assert not wrong, "\n".join(wrong[:20])


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Eight subjects of each kind, four slices each."""
    folder = tmp_path_factory.mktemp("golden-data")
    for name in ("brats", "ixi", "petct", "petct-external", "neuro"):
        phantom.make(name, folder / name, subjects=8, size=32, slices=6 if name == "neuro" else 4)
    phantom.make("cxr", folder / "cxr", subjects=6, size=32)
    return folder


def assert_best_is_not_last(numbers):
    """Only then does a score show which weights were kept."""
    validation = numbers["log validation"]
    assert min(validation) < validation[-1]


def codebook_of(run):
    """Votes plus gain of every entry, in its order."""
    states = torch.load(run / "last.pt", weights_only=True)["stages"]["codebook"]["parts"]
    numbers = []
    for reading, state in states.items():
        book = apt.Codebook(4, reading)
        book.load_state_dict(state)
        for tgt in range(4):
            for src, curve in book.ranked(tgt, [c for c in range(4) if c != tgt]):
                numbers.append(float(book.votes[tgt, src, curve]) + round(book.gain(tgt, src, curve), 4))
    return numbers


def test_apt(scans, tmp_path, monkeypatch, renew_golden):
    gold = Recorder(apt, monkeypatch, tmp_path / "apt")
    where = ["--data", scans / "brats"]
    gold.call(*where, *APT, "--train", "--evaluate")
    gold.keep_scores("each")
    gold.numbers["codebook"] = codebook_of(gold.folder / "run")
    assert_best_is_not_last(gold.numbers)
    gold.call(*where, "--evaluate", "--missing", "t1,flair", "--paste", "both", "--curves", "scalar", "--w", "0.8", "--alpha", "10")
    gold.keep_scores("two")
    gold.call(*where, "--reproduce", "table3", "--test-slices", "1")
    gold.keep_table("table3")
    for scan in scans.glob("brats/*/*t1ce.nii.gz"):
        if any(name in scan.name for name in json.loads((gold.folder / "run" / "split.json").read_text())["test"]):
            scan.rename(scan.with_suffix(".kept"))
    gold.call(*where, "--synthesize")
    gold.keep_volumes()
    for scan in scans.glob("brats/*/*.kept"):
        scan.rename(scan.with_suffix(".gz"))
    gold.compare(renew_golden)


def test_metadb(scans, tmp_path, monkeypatch, renew_golden):
    """Three directions in one model, so that a prompt or an image of another direction shows."""
    gold = Recorder(metadb, monkeypatch, tmp_path / "metadb")
    where = ["--data", scans / "ixi"]
    gold.call(*where, *METADB, "--source", "t1,pd", "--target", "t2,pd", "--train", "--evaluate")
    gold.keep_scores("all")
    assert_best_is_not_last(gold.numbers)
    gold.call(*where, "--evaluate", "--only", "t1,pd", "--eta", "0.3", "--noise", "20")
    gold.keep_scores("one")
    gold.call(*where, "--reproduce", "table6", "--test-slices", "1")
    gold.keep_table("table6")
    gold.call(*where, "--synthesize", "--only", "pd,t2")
    gold.keep_volumes()
    gold.compare(renew_golden)


@pytest.mark.slow
def test_metadb_segmenter(scans, tmp_path, monkeypatch, renew_golden):
    """Figure 6: the segmenter learns from real target slices of training subjects.

    After so few steps it finds nothing; so a threshold stands in for it, and the scores show what is compared with what.
    """
    gold = Recorder(metadb, monkeypatch, tmp_path / "metadb_segmenter")
    open_dataset = data.open_dataset            # the segmenter's seed holds the fingerprint, which depends on how gzip compresses

    def with_fixed_name(*args, **settings):
        return dataclasses.replace(open_dataset(*args, **settings), fingerprint="golden")
    monkeypatch.setattr(data, "open_dataset", with_fixed_name)
    monkeypatch.setattr(downstream, "segment", lambda model, images: 2 * (np.asarray(images) > 0.5))
    gold.call("--data", scans / "brats", *METADB, "--target", "flair", "--segment", "--segment-steps", "6", "--train", "--evaluate")
    gold.keep_scores("flair")
    gold.compare(renew_golden)


def test_rlbcd(scans, tmp_path, monkeypatch, renew_golden):
    """The autoencoder, both bridges, selection by score, another cohort.

    A rounding error may choose another code, which changes the image. So nothing is quantised when it is decoded.
    """
    def plain(ae, L):
        return ae.decode(L * ae.sigma + ae.mu, quantised=True).clamp(-1, 1)
    monkeypatch.setattr(VQAE, "from_latent", plain)
    gold = Recorder(rlbcd, monkeypatch, tmp_path / "rlbcd")
    where = ["--data", scans / "petct"]
    gold.call(*where, *RLBCD, "--train", "--evaluate")
    gold.keep_scores("one")
    gold.call(*where, "--evaluate", "--samples", "3", "--select", "lcs", "--S", "3")
    gold.keep_scores("three")
    gold.call(*where, "--reproduce", "table1", "--test-slices", "1")
    gold.keep_table("table1")
    gold.call("--data", scans / "petct-external", "--evaluate", "--test-slices", "1")
    content = json.loads((gold.folder / "run" / "on-petct-external" / "results.json").read_text())
    for row in content["rows"]:
        if row["metric"] == "psnr" and not row.get("variant"):
            gold.numbers[f"external: {row['method']}"] = row["mean"]
    gold.call(*where, "--synthesize")
    gold.keep_volumes()
    # In training, too, rounding may choose another code. The losses agree to 1e-3 nevertheless, and scores to these.
    gold.compare(renew_golden, psnr=0.1, ssim=0.005)


def test_unisyn(scans, tmp_path, monkeypatch, renew_golden):
    """Subjects who lack modalities, sentences of their own scans, tiles; a table whose rows train otherwise; T2w at another TE.

    At a rate that is not chaotic, the last weights are the best. So the validation counts backwards here.
    """
    of = unisyn.validation

    def backwards(*args):
        validate = of(*args)
        return lambda network: 1 / validate(network)
    monkeypatch.setattr(unisyn, "validation", backwards)
    gold = Recorder(unisyn, monkeypatch, tmp_path / "unisyn")
    where = ["--data", scans / "neuro"]
    gold.call(*where, *UNISYN, "--train", "--evaluate", "--only", "t1:t2,pd:flair,flair:t1")
    gold.keep_scores("three")
    assert_best_is_not_last(gold.numbers)
    gold.call(*where, "--reproduce", "fusion", "--only", "t1:t2", "--test-slices", "2")
    gold.keep_table("fusion")
    gold.call(*where, "--synthesize", "--target", "modality=T2w TE=200", "--full-slice")
    gold.keep_volumes()
    gold.compare(renew_golden)


def test_medm2g(scans, tmp_path, monkeypatch, renew_golden):
    """All stages in three rounds; images from reports and from each other, reports from images, an ablation, and what a subject lacks.

    A report is made of whole words, so a rounding error may change one. Its score is compared to the true report's own latent.
    """
    monkeypatch.setattr(multimodal, "TOGETHER", 4)
    gold = Recorder(medm2g, monkeypatch, tmp_path / "medm2g")
    where = ["--data", scans / "cxr"]
    gold.call(*where, *MEDM2G, "--train", "--evaluate")
    gold.keep_scores("all")
    gold.call(*where, "--evaluate", "--only", "ct:t2,text+t2:ct", "--w", "1", "--eta", "0.5", "--steps", "3")
    gold.keep_scores("two")
    gold.call(*where, "--reproduce", "place", "--only", "ct:t2")
    gold.keep_table("place")
    gold.call(*where, "--synthesize")
    gold.keep_volumes()
    gold.compare(renew_golden)
