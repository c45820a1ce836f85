"""What a run needs is said before it starts, and what does not fit is refused: memory, numbers, flags that clash."""
import ctypes
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toys
from torch import nn
from torch.nn import functional as F

import apt
import medm2g
import metadb
from common import device, outline
from common.device import memory_bytes
from common.files import RunError
from common.outline import LiveBytes, Outline, live_bytes, needs, require_memory
from data import phantom

TINY = ("--preset demo --size 32 --base 8 --mult 1,1 --attention 16 --head-dim 8 --groups 4 --encoder-steps 1 --encoder-batch 2 --mif-epochs 1 "
        "--steps 1 --batch 2 --S 2 --N 3 --test-slices 1").split()
MB = 2 ** 20


@pytest.fixture(scope="module")
def brats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits") / "brats"
    phantom.make("brats", folder, subjects=4, size=32, slices=2)
    return folder


# ---- memory --------------------------------------------------------------------------------------


def counted(function, grad=True):
    with torch.device("meta"), torch.set_grad_enabled(grad):
        return live_bytes(function)


def test_bytes_are_counted_while_they_are_alive():
    """1000 float32 numbers take 4000 bytes. Of a chain two results live at once; a view and what was there before cost nothing."""
    with torch.device("meta"):
        x = torch.zeros(1000)
        w = torch.zeros(1000, requires_grad=True)

    def chain(start):
        h = start
        for _ in range(5):
            h = h.exp()
        return h
    assert counted(lambda: chain(x)) == 2 * 4000
    assert counted(lambda: chain(w)) == 5 * 4000                # the backward pass needs every result
    assert counted(lambda: chain(w), grad=False) == 2 * 4000
    assert counted(lambda: x.view(10, 100).t()) == 0
    assert counted(lambda: [x.add_(1) for _ in range(3)]) == 0
    assert counted(lambda: (x + 1, x + 2, x + 3)) == 3 * 4000


def test_attention_is_counted_without_the_matrix_of_all_pairs():
    """64 x 64 positions: the matrix would take 64 MB, and q, k, v and the result take 2 MB together."""
    with torch.device("meta"):
        q = torch.zeros(1, 1, 4096, 32, requires_grad=True)
        mask = torch.ones(1, 1, 1, 4096, dtype=torch.bool)
    for more in ({}, {"attn_mask": mask}):
        assert 4096 * 32 * 4 <= counted(lambda more=more: F.scaled_dot_product_attention(q, q, q, **more)) < 2 * MB


OPERATIONS = {
    "add": lambda x: x + x[:, :1], "scalar": lambda x: 2 - x / 3, "power": lambda x: x ** 2, "power of a number": lambda x: 2 ** x,
    "where": lambda x: torch.where(x > 0, x, x[0]), "whole numbers": lambda x: x.long() * 2 / 3, "in place": lambda x: x.clone().mul_(2),
    "cat": lambda x: torch.cat([x, x[:, :2]], dim=1), "cat of rows": lambda x: torch.cat([x, x]), "arange": lambda x: torch.arange(3, 9, 2),
    "linspace": lambda x: torch.linspace(0, 1, 5), "mean": lambda x: x.mean(), "mean of axes": lambda x: x.mean((-1, 2)),
    "mean kept": lambda x: x.mean(1, keepdim=True), "linear": lambda x: nn.Linear(8, 5, device=x.device)(x),
    "group norm": lambda x: F.group_norm(x, 3), "layer norm": lambda x: F.layer_norm(x, x.shape[2:]), "gelu": F.gelu}


@pytest.mark.parametrize("name", OPERATIONS)
def test_results_have_the_shapes_that_torch_computes(name):
    """They are made without computing, also backwards; a number gives a number of the same type."""
    wanted = OPERATIONS[name](torch.ones(4, 6, 7, 8))
    with torch.device("meta"):
        x = torch.ones(4, 6, 7, 8, requires_grad=True)
        with LiveBytes():
            found = OPERATIONS[name](x)
            if found.requires_grad:
                found.sum().backward()
    assert found.shape == wanted.shape and found.dtype == wanted.dtype and found.device.type == "meta"
    assert x.grad is None or x.grad.shape == x.shape


def needed(world=1, precision="fp32", train=True, evaluate=False, micro_batch=None, finished=False, rows=(), micro_batches=True, before=None,
           guided=False, depth=1, **changes):
    """(method, cfg, run, ds, outline) of a toy: one linear map of 1000 numbers, 4 MB of weights, and a small one."""
    cfg = SimpleNamespace(**{"batch": 8, "sample_batch": 6, "size": 16, "test_slices": 2, "base": 1000, **changes})
    with torch.device("meta"):
        large, small = nn.Linear(1000, 1000, bias=False), nn.Linear(10, 10, bias=False)
        x = torch.zeros(1, 1000)
    drawn = Outline({"large": large, "small": small}, lambda: large(large(x)), 0, [], before or {}, guided, depth)
    args = SimpleNamespace(train=train, evaluate=evaluate, micro_batch=micro_batch)
    run = SimpleNamespace(world=world, precision=precision, args=args, finished=lambda stages: finished, device=torch.device("cpu"))
    ds = SimpleNamespace(contrasts=("a", "b", "c"), spread=lambda part, most: list(rows), rows=lambda part: list(rows))
    method = SimpleNamespace(outline=lambda cfg, ds: drawn, stages={}, micro_batches=micro_batches)
    return method, cfg, run, ds, drawn


def test_what_a_training_step_needs():
    """All weights once, of the largest network also gradients and two moments; activations of two layers for each slice."""
    step, = needs(*needed())
    assert (step.field, step.count, step.each, step.fixed) == ("batch", 8, 8000, 4 * 1_000_100 + 12 * 1_000_000)
    assert step.total == step.fixed + 8 * 8000
    assert needs(*needed(world=3))[0].count == 3
    assert needs(*needed(precision="bf16"))[0].each == 4000
    part, = needs(*needed(micro_batch=2))
    assert part.count == 2 and part.fixed == step.fixed and part.slices == 8 * 8 * 3 * 16 ** 2    # 2 numbers for each pixel of the whole batch
    assert part.total == part.fixed + part.slices + 2 * 8000
    assert needs(*needed(micro_batch=99)) == [step]


def test_what_other_stages_and_sampling_need():
    with torch.device("meta"):
        x = torch.zeros(500)
    step, earlier = needs(*needed(before={"ae_batch": (False, lambda: x + 1)}, ae_batch=7))
    assert (earlier.field, earlier.count, earlier.each, earlier.fixed) == ("ae_batch", 7, 2000, 0)
    counts = [needs(*needed(before={"ae_batch": (True, lambda: x + 1)}, ae_batch=7, rows=range(n)))[1].count for n in (0, 5, 9)]
    assert counts == [0, 5, 7]                                                            # before decoding there are no slices
    _, sampling = needs(*needed(evaluate=True, rows=range(100)))
    assert (sampling.field, sampling.count, sampling.each, sampling.fixed) == ("sample_batch", 6, 8000, 4 * 1_000_100)
    assert needs(*needed(evaluate=True, rows=range(4)))[1].count == 4                     # there are no more slices
    assert needs(*needed(evaluate=True, rows=range(100), sample_batch=90, depth=5))[1].count == 20
    for changes in (dict(train=False), dict(finished=True)):
        assert [need.field for need in needs(*needed(evaluate=True, rows=range(4), **changes))] == ["sample_batch"]
    assert [need.field for need in needs(*needed(train=False))] == ["batch"]              # a dry run


def test_sampling_keeps_what_a_gradient_needs_if_it_is_guided():
    method, cfg, run, ds, _ = needed(evaluate=True, train=False, rows=range(9))
    with torch.device("meta"):
        w = torch.zeros(1000, requires_grad=True)
    for guided, results in ((False, 2), (True, 3)):
        drawn = Outline({"a": nn.Identity()}, lambda: w.exp().exp().exp(), 0, guided=guided)
        assert needs(method, cfg, run, ds, drawn)[0].each == results * 4000


@pytest.mark.parametrize("changes, message", [
    (dict(), "--batch 8: about 0.0 GB of memory are needed"),
    (dict(micro_batches=False), "at once, but the cpu has"),
    (dict(batch=1, base=77), "--base 77: about")], ids=["batch", "no micro-batch", "networks"])
def test_what_does_not_fit_is_refused_with_the_numbers(monkeypatch, changes, message):
    case = needed(**changes)
    total = needs(*case)[0].total
    for there, fits in ((total, True), (None, True), (total - 1, False)):
        there = 4 * MB if "base" in changes and not fits else there                       # less than the weights alone
        monkeypatch.setattr(outline, "memory_bytes", lambda device, there=there: there)
        if fits:
            require_memory(*case)
            continue
        with pytest.raises(RunError, match=re.escape(message)) as refused:
            require_memory(*case)
        assert refused.value.status == 2 and "\n" not in str(refused.value)
        assert ("--micro-batch" in str(refused.value)) == changes.get("micro_batches", True)


def test_networks_that_cannot_be_built_are_refused():
    def fails(cfg, ds):
        return Outline({}, lambda: torch.zeros(2, 3) @ torch.zeros(2, 3), 0)
    for made in (fails, lambda cfg, ds: nn.GroupNorm(3, 7), lambda cfg, ds: torch.zeros(2 ** 40, 2 ** 40)):
        with pytest.raises(RunError, match="networks of these sizes cannot be built") as refused:
            outline.draw(SimpleNamespace(outline=made), None, None)
        assert refused.value.status == 2 and "\n" not in str(refused.value)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say it")
def test_memory_is_that_of_the_machine_or_what_is_allowed(tmp_path, monkeypatch):
    import resource
    cpu = torch.device("cpu")
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda what: unlimited)
    monkeypatch.setattr(device, "Path", lambda folder, name: tmp_path / name)             # no such folder of a container
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2_000_000}
    monkeypatch.setattr(device.os, "sysconf", pages.get)
    assert memory_bytes(cpu) == 8_192_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_bytes(cpu) == 8_192_000_000
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("6000000000\n")
    assert memory_bytes(cpu) == 6_000_000_000
    (tmp_path / "memory.max").write_text("5000000000\n")
    assert memory_bytes(cpu) == 5_000_000_000
    monkeypatch.setattr(resource, "getrlimit", lambda what: (4_000_000_000, unlimited[1]) if what == resource.RLIMIT_AS else unlimited)
    assert memory_bytes(cpu) == 4_000_000_000


def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("changes", [dict(base=64, batch=4), dict(base=16, batch=24)], ids=["large network", "large batch"])
def test_the_estimate_is_near_the_memory_of_real_steps(changes):
    """It is rather too low, so that nothing is refused that fits, and not more than a factor of 2."""
    cfg = apt.Config(size=32, mult=(1, 2), blocks=1, attention=(16,), head_dim=8, groups=8, encoder="demo", **changes)
    ds = SimpleNamespace(contrasts=("t1", "t2"), rows=lambda part: [])
    run = SimpleNamespace(precision="fp32", world=1, args=SimpleNamespace(train=True, evaluate=False, micro_batch=None))
    run.finished = lambda stages: False
    need = needs(apt.METHOD, cfg, run, ds, outline.draw(apt.METHOD, cfg, ds))[0]
    ctypes.CDLL(None).malloc_trim(0)                            # what is free goes back to the system
    Path("/proc/self/clear_refs").write_text("5")               # the peak begins anew
    before = kilobytes("VmRSS")
    unet = apt.make_unet(cfg, 2, 128)
    ema, best, optimiser = apt.EMA(unet, 0.99), apt.Best(unet), torch.optim.Adam(unet.parameters())
    for step in range(2):
        optimiser.zero_grad(set_to_none=True)
        x0 = torch.zeros(cfg.batch, 2, cfg.size, cfg.size)
        t, z = torch.ones(cfg.batch, dtype=torch.long), torch.zeros(cfg.batch, 1, 128)
        apt.diffusion_loss(unet, x0, t, torch.randn_like(x0), z, apt.linear_alpha_bar(1000)).backward()
        optimiser.step()
        ema.update(unet, step)
    best.offer(unet, 1.0)
    real = 1024 * (kilobytes("VmHWM") - before)
    assert need.total <= real <= 2 * need.total, (need, real)


# ---- told before anything is decoded or trained --------------------------------------------------


def said(script, monkeypatch, capsys, folder, out, *words):
    """(exit status, the error) of a command that must end before the first scan is decoded."""
    status, text = toys.call(script, monkeypatch, capsys, "--data", folder, "--out", out, *words)
    assert "decoding" not in text and "Traceback" not in text and not (out / "last.pt").exists(), text
    return status, text.strip().splitlines()[-1]


@pytest.mark.parametrize("words, status, message", [
    (["--batch", "2000000", "--train"], 2, "--batch 2000000: about "),
    (["--base", "1000000", "--train"], 2, "--base 1000000 --mult 1,1 --blocks 1: about "),
    (["--base", "4000000000000", "--groups", "4", "--train"], 2, "allowed are 1 to 1000000000"),
    (["--micro-batch", "1", "--batch", "900000000", "--train"], 2, "--batch 900000000: about "),
    (["--external", "nowhere", "--train", "--evaluate"], 1, "nowhere: does not exist"),
    (["--train", "--synthesize", "--missing", "t9"], 2, "--missing t9: name some"),
    (["--contrasts", "t1,xyz"], 2, "no contrast xyz")],
    ids=["batch", "base", "no int of 64 bits", "micro-batch", "external", "missing", "contrasts"])
def test_apt_tells_it_before_the_work(brats, tmp_path, monkeypatch, capsys, words, status, message):
    found, error = said(apt, monkeypatch, capsys, brats, tmp_path / "run", *TINY, *words)
    assert found == status and message in error


def test_a_dry_run_says_all_and_then_refuses(brats, tmp_path, monkeypatch, capsys):
    words = ["--data", brats, "--out", tmp_path / "run", *TINY]
    status, text = toys.call(apt, monkeypatch, capsys, *words, "--batch", "2000000")
    assert status == 2 and "U-Net: " in text and "memory of training, --batch: about" in text
    assert text.strip().splitlines()[-1].startswith("error: --batch 2000000: about ")
    status, text = toys.call(apt, monkeypatch, capsys, *words)
    assert status == 0 and "memory of training, --encoder-batch: about" in text and "this was a dry run" in text


def test_a_dry_run_only_warns_of_what_a_preset_says(brats, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outline, "memory_bytes", lambda device: 1000)
    words = ["--data", brats, "--out", tmp_path / "run"]
    status, text = toys.call(apt, monkeypatch, capsys, *words)
    assert status == 0 and "warning: this machine cannot train it; --base 24" in text
    assert toys.call(apt, monkeypatch, capsys, *words, "--blocks", "1")[0] == 2
    assert said(apt, monkeypatch, capsys, brats, tmp_path / "run", "--train")[0] == 2


def test_a_folder_to_export_into_is_looked_at_before_the_training(brats, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    status, error = said(apt, monkeypatch, capsys, brats, tmp_path / "run", *TINY, "--train", "--export", tmp_path / "there")
    assert status == 1 and "exists; name a new folder" in error


@pytest.mark.parametrize("words, message", [
    (["--segment"], "--segment: not every subject in"), (["--text-file", "NONE.npz"], "NONE.npz")], ids=["segment", "text file"])
def test_metadb_tells_it_before_the_work(tmp_path, monkeypatch, capsys, words, message):
    phantom.make("ixi", tmp_path / "ixi", subjects=3, size=32, slices=2)
    tiny = "--size 32 --base 8 --mult 1,1 --attention 16 --head-dim 8 --groups 4".split()
    status, error = said(metadb, monkeypatch, capsys, tmp_path / "ixi", tmp_path / "run", *tiny, "--train", *words)
    assert status in (1, 2) and message in error


def test_sizes_of_medm2g_that_do_not_go_together():
    """Its images are halved by the autoencoder, and then by the diffuser."""
    assert medm2g.Config(size=64, ae_mult=(1, 2, 4), mult=(1, 2, 2)).size == 64
    for changes, message in ((dict(size=72, ae_mult=(1, 2, 4), mult=(1, 2, 2)), "--size 72: must be a multiple of 16, for 3"),
                             (dict(text_width=100, text_heads=7), "--text-width 100 must be divisible by --text-heads 7")):
        with pytest.raises(ValueError, match=message):
            medm2g.Config(**changes)
