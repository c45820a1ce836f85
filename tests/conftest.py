"""Tests run from the project's root; those marked slow only with --slow."""
import gc
import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST = ("test_golden", "test_scripts", "test_metadb", "test_run", "test_wiring", "test_rlbcd", "test_unisyn_run",
           "test_medm2g_run", "test_clip", "test_phantom", "test_limits", "test_unisyn", "test_vqae", "test_classify",
           "test_medm2g")
sys.path.insert(0, str(ROOT))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--renew-golden", action="store_true", help="store the numbers of the golden runs anew")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs in two processes, if pytest-xdist is installed; the tests of a file stay together.

    Nearly all tests work on tensors so small that a second thread does not help them. A second process does.
    """
    if "TESTS_IN_TWO" in os.environ:                # this is one of the two, or a test that runs tests
        return
    whole = [Path(word).resolve() for word in config.args] in ([ROOT / "tests"], [ROOT])
    if whole and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None and (os.cpu_count() or 1) > 1:
        os.environ["TESTS_IN_TWO"] = "1"
        os.environ["OMP_NUM_THREADS"] = "1"         # for both, and for the programs that tests start
        config.option.numprocesses = 2
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False      # files in the order of pytest_collection_modifyitems


def pytest_configure(config):
    # A shell starts `pytest tests &` with Ctrl-C ignored, and nohup ignores SIGHUP.  Some tests send these signals.
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow only")


def pytest_collection_finish(session):
    gc.freeze()                 # the imported libraries stay; looking through them again and again takes time


def pytest_collection_modifyitems(config, items):
    # The files that take longest come first, so that both processes end at about the same time.
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: give --slow to run it"))


@pytest.fixture
def renew_golden(request):
    return request.config.getoption("--renew-golden")


def wake(module, seed=0):
    """Zero-initialised layers hide mistakes below them: give every all-zero parameter small random values."""
    import torch
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if not p.any():
                p.copy_(0.05 * torch.randn(p.shape, generator=g))
    return module
