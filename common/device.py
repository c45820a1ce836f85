"""Where a run computes: the device, its precision, the processes of torchrun, and random numbers by counter.

Randomness is counted, not stored.  Every generator is derived from (seed, purpose, counters).  A run that is
killed at any moment and started again therefore ends, on a CPU, with the same bits as an undisturbed one.
"""
import contextlib
import datetime
import hashlib
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

from common.files import RunError


def seed_of(*parts):
    """A 63-bit seed from any mix of numbers and strings, the same on every machine (unlike hash())."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Machine:
    """One process of a run and the device that it computes on.

    device         torch.device
    precision      "fp32" or "bf16"
    rank, world    number of this process, and how many there are (0 and 1 without torchrun)
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
        """A generator on the device, derived from the seed and `purpose` (words and counters)."""
        return torch.Generator(self.device).manual_seed(seed_of(self.seed, *purpose))

    def noise(self, keys, like):
        """Noise for sampling: one generator per slice, and a function () -> fresh N(0,1) like `like` (B, C, H, W).

        keys: (subject, slice number) of each; they fix the noise, whatever else is in the batch.
        """
        generators = [self.generator("sample", *key) for key in keys]

        def fresh():
            return torch.stack([torch.randn(like.shape[1:], generator=g, device=like.device) for g in generators])
        return generators, fresh

    def fetch(self, images, rows):
        """images[rows] (float16, memory-mapped) as a float32 batch on the device, channels last.

        The time that this takes is counted as waiting.
        """
        start = time.perf_counter()
        batch = torch.from_numpy(np.asarray(images[np.asarray(rows)], dtype=np.float32))
        batch = batch.to(self.device, memory_format=torch.channels_last)
        self.waited += time.perf_counter() - start
        return batch

    def autocast(self):
        """bf16 for the network's matrix products if so chosen; losses and samplers stay outside."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def shard(self, batch):
        """The slice of a global batch that this process works on.  RunError if it cannot be shared equally."""
        if batch % self.world:
            raise RunError(f"a batch of {batch} cannot be shared equally by {self.world} processes; "
                           "change --batch", status=2)
        each = batch // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def join(self):
        """The processes of torchrun find each other."""
        if self.world > 1:
            join_processes(self.device)
            dist.barrier()

    def barrier(self):
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def first(self, work):
        """work() in process 0 before the others, who then find what it made; its result, in each process."""
        if self.rank > 0:
            self.barrier()
        result = work()
        if self.rank == 0:
            self.barrier()
        return result

    def gather(self, items):
        """The lists of all processes joined, in every process."""
        if self.world == 1:
            return items
        lists = [None] * self.world
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def agree(self, number):
        """The largest of the numbers (or None) that the processes give: all must leave after the same step."""
        if self.world == 1:
            return number
        flag = torch.tensor(number or 0, device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag) or None


def pick_device(wanted):
    """Returns (torch.device, why).  "auto" is CUDA, else Apple's MPS, else the CPU.

    Raises RunError if what was asked for is absent; there is no silent fallback.
    """
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted != "auto" and not found[wanted]:
        raise RunError(f"--device {wanted}: this machine or this build of torch "
                       f"({torch.__version__}) has none; use --device auto or cpu")
    kind = wanted if wanted != "auto" else next(k for k in ("cuda", "mps", "cpu") if found[k])
    why = "asked for" if wanted != "auto" else "the best found"
    if kind != "cuda":
        return torch.device(kind), f"{why}; torch {torch.__version__}, {torch.get_num_threads()} threads"
    local = int(os.environ.get("LOCAL_RANK", 0))
    cards = torch.cuda.device_count()
    if local >= cards:
        raise RunError(f"process {local + 1} on this machine has no GPU of its own, there are {cards}; "
                       f"use --nproc_per_node={cards} or --device cpu")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True                   # one image size per run: worth the search
    return device, f"{why}: {torch.cuda.get_device_name(device)}, torch {torch.__version__}"


def pick_precision(wanted, device):
    """Returns ("fp32" or "bf16", why).  "auto" is bf16 on CUDA cards that compute it, else fp32.

    fp16 is not offered: it overflows and needs loss scaling.
    """
    if wanted != "auto":
        return wanted, "asked for"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "this card computes it natively"
    return "fp32", f"the safe choice on {device.type}"


def join_processes(device):
    """torchrun's processes find each other.  RunError on Apple's GPU, which cannot be shared."""
    if device.type == "mps":
        raise RunError("several processes cannot share Apple's GPU; use --device cpu, "
                       "or start one process")
    if os.name == "nt":
        os.environ.setdefault("USE_LIBUV", "0")             # torch for Windows is built without it
    if not dist.is_initialized():                           # one program may work in several folders in turn
        # The others wait while the first one reads a large data set for the first time.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))


def full_precision(device):
    """A context without autocast, for what must not be computed in bf16 (torch's meta device has no autocast)."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def peak_gigabytes(device):
    """The most memory that was used so far: of the GPU, or of the process on a CPU (NaN on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        import resource
    except ImportError:                                     # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)
