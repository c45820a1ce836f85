"""The machine of a run: its device, precision, processes, random numbers and versions.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

Random numbers are counted, not stored.  Every generator is derived from (seed, purpose, counters).
A run may be killed at any moment and started again.  On a CPU it then ends with the same bits as an
undisturbed run.
"""
import contextlib
import datetime
import functools
import hashlib
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common.files import RunError


def seed_of(*parts):
    """Return a 63-bit seed made of any mix of numbers and strings.

    Unlike hash(), it is the same on every machine.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Machine:
    """One process of a run and the device that it computes on.

    device         torch.device
    precision      "fp32" or "bf16"
    rank, world    number of this process, and of all processes; without torchrun they are 0 and 1
    seed           of the run
    waited         seconds that this process has waited for images
    """

    def __init__(self, seed, device, precision):
        self.seed = seed
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device, device_why = pick_device(device)
        self.precision, precision_why = pick_precision(precision, self.device)
        self.waited = 0.0
        self.facts_line = (f"device: {self.device} ({device_why}); "
                           f"precision: {self.precision} ({precision_why})"
                           + (f"; {self.world} processes" if self.world > 1 else ""))

    def generator(self, *purpose):
        """Return a generator on the device.

        It is derived from the seed and from `purpose`, which holds words and counters.
        """
        return torch.Generator(self.device).manual_seed(seed_of(self.seed, *purpose))

    def noise(self, keys, like):
        """Return the noise for sampling: a list of generators, one per slice, and a function.

        keys: (subject, slice number) of each slice.  They fix its noise, whatever else is in the
        batch.  like: a tensor (B, C, H, W).  The function () -> (B, C, H, W) draws fresh N(0,1).
        """
        generators = [self.generator("sample", *key) for key in keys]

        def fresh():
            each = [torch.randn(like.shape[1:], generator=g, device=like.device)
                    for g in generators]
            return torch.stack(each)                                    # (B, C, H, W)
        return generators, fresh

    def fetch(self, images, rows):
        """Return images[rows] as a float32 batch on the device, in the layout channels-last.

        images: array in float16, memory-mapped.  The time that this takes is counted as waiting.
        """
        start = time.perf_counter()
        batch = torch.from_numpy(np.asarray(images[np.asarray(rows)], dtype=np.float32))
        batch = batch.to(self.device, memory_format=torch.channels_last)
        self.waited += time.perf_counter() - start
        return batch

    def autocast(self):
        """Return a context in which a network computes its matrix products in bf16, if so chosen.

        Losses and samplers stay outside of it.
        """
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def shard(self, batch):
        """Return the slice of a global batch that this process works on.

        Raises RunError if the batch cannot be shared equally.
        """
        if batch % self.world:
            raise RunError(f"a batch of {batch} cannot be shared equally by {self.world} "
                           "processes; change --batch", status=2)
        each = batch // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def join(self):
        """Let the processes of torchrun find each other.  Raises RunError on Apple's GPU."""
        if self.world > 1:
            join_processes(self.device)
            dist.barrier()

    def barrier(self):
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def first(self, work):
        """Call work() in process 0, then in the others.  Returns its result, in each process.

        The others find what process 0 made.
        """
        if self.rank > 0:
            self.barrier()
        result = work()
        if self.rank == 0:
            self.barrier()
        return result

    def gather(self, items):
        """Join the lists of all processes.  Every process gets the whole list."""
        if self.world == 1:
            return items
        lists = [None] * self.world
        dist.all_gather_object(lists, items)
        joined = []
        for part in lists:
            joined += part
        return joined

    def agree(self, number):
        """Return the largest of the numbers (or None) that the processes give.

        All processes then know the same number and leave after the same step.
        """
        if self.world == 1:
            return number
        flag = torch.tensor(number or 0, device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag) or None


def pick_device(wanted):
    """Returns (torch.device, why).  "auto" is CUDA, else Apple's MPS, else the CPU.

    Raises RunError if what was asked for is absent.  There is no silent fallback.
    """
    found = {"cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if wanted != "auto" and not found[wanted]:
        raise RunError(f"--device {wanted}: this machine or this build of torch "
                       f"({torch.__version__}) has none; use --device auto or cpu")
    kind = wanted if wanted != "auto" else next(k for k in ("cuda", "mps", "cpu") if found[k])
    why = "asked for" if wanted != "auto" else "the best found"
    if kind != "cuda":
        threads = torch.get_num_threads()
        return torch.device(kind), f"{why}; torch {torch.__version__}, {threads} threads"
    local = int(os.environ.get("LOCAL_RANK", 0))
    cards = torch.cuda.device_count()
    if local >= cards:
        raise RunError(f"process {local + 1} on this machine has no GPU of its own, there are "
                       f"{cards}; use --nproc_per_node={cards} or --device cpu")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    # All images of a run have one size, so the search for the fastest kernel pays off.
    torch.backends.cudnn.benchmark = True
    return device, f"{why}: {torch.cuda.get_device_name(device)}, torch {torch.__version__}"


def pick_precision(wanted, device):
    """Returns ("fp32" or "bf16", why).  "auto" is bf16 on CUDA cards that compute it, else fp32.

    fp16 is not offered, because it overflows and needs loss scaling.
    """
    if wanted != "auto":
        return wanted, "asked for"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "this card computes it natively"
    return "fp32", f"the safe choice on {device.type}"


def join_processes(device):
    """Let torchrun's processes find each other.

    Raises RunError on Apple's GPU, which cannot be shared.
    """
    if device.type == "mps":
        raise RunError("several processes cannot share Apple's GPU; use --device cpu, "
                       "or start one process")
    if os.name == "nt":
        os.environ.setdefault("USE_LIBUV", "0")             # torch for Windows is built without it
    # One program may work in several folders in turn; then the processes know each other already.
    if not dist.is_initialized():
        # The others wait while the first one reads a large data set for the first time.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))


def full_precision(device):
    """Return a context without autocast, for what must not be computed in bf16."""
    if device.type == "meta":                               # this device has no autocast
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def memory_bytes(device):
    """Return how much memory a device has, in bytes, or None if the system does not say it.

    For a CPU it is that of the machine, or less if a container or `ulimit -v` allows less.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = []
    with contextlib.suppress(AttributeError, OSError, ValueError):      # Windows has no sysconf
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):         # of a container
        with contextlib.suppress(OSError, ValueError):                  # "max" is no number
            found.append(int(Path("/sys/fs/cgroup", name).read_text(encoding="utf-8")))
    with contextlib.suppress(ImportError):                              # Windows does not have it
        import resource
        allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
        if allowed != resource.RLIM_INFINITY:
            found.append(allowed)
    return min(found, default=None)


def peak_gigabytes(device):
    """Return the most memory that was used so far, in GB.

    It is memory of the GPU, or of the process if the device is a CPU.  On Windows it is then NaN.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        import resource
    except ImportError:                                     # Windows does not have it
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


@functools.cache
def versions():
    """Return the versions of Python, of the packages, and of this project.

    The project's version is its git commit, where there is one.
    """
    packages = ("torch", "numpy", "scipy", "nibabel", "pillow")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            # A copied part of the project may do without this package.
            found[name] = None
    found["project"] = project_version()
    return found


def project_version():
    """Return the git commit of the project's own folder, with "+" if files were changed.

    Returns None without git.
    """
    home = Path(__file__).resolve().parent.parent
    if not (home / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(home), "describe", "--always", "--dirty=+", "--tags"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None
