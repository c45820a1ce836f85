"""How large a run is, said before it starts: its networks, its memory and its time.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

Networks are built on torch's meta device.  Shapes, operations and memory are counted there, but
nothing is computed, so that a network of any size costs nothing.  What does not fit into the
machine is refused here, before the first scan is decoded.
"""
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from common.cli import flags
from common.device import memory_bytes
from common.files import RunError

GB = 2 ** 30
# Operations whose result has the shape that its arguments have together.
POINTWISE = ("add", "sub", "rsub", "mul", "div", "pow", "exp", "log", "sqrt", "sin", "cos", "clamp",
             "silu", "gelu", "relu", "sigmoid", "tanh", "softplus", "where")
OVERLOADS = ("default", "Tensor", "Scalar", "Tensor_Scalar", "self")    # not those with out=
IN_PLACE = ("add_", "mul_", "fill_", "zero_", "normal_", "uniform_", "clamp_", "erfinv_")
RANGES = ("arange", "linspace")
# Fields of a config that make its networks large.
WIDTHS = ("base", "ae_base", "width", "features", "decoder", "mult", "blocks")


@dataclass(frozen=True)
class Outline:
    """What is known of a method before it starts.

    It is built on torch's meta device, where nothing is computed.

    networks   {name: module}
    forward    runs the trained network on one slice and returns its output
    slices     how many slices the training will see, repeats included
    lines      more lines for the user: shapes, prompts, and so on
    before     {field of the config: (is it capped?, function)} of stages before the last one.  The
               field is the batch, capped by the number of training slices or not.  The function
               runs the network of that stage on one sample
    guided     True if sampling needs gradients of the network
    depth      how many slices of a scan one sample of `forward` has
    """
    networks: dict
    forward: Callable
    slices: int
    lines: list = field(default_factory=list)
    before: dict = field(default_factory=dict)
    guided: bool = False
    depth: int = 1
    counted: dict = field(default_factory=dict)     # filled by live_bytes_of

    def live_bytes_of(self, forward, grad=True):
        """Return live_bytes(forward), with gradients or without.  It is counted once."""
        if (forward, grad) not in self.counted:
            with torch.device("meta"), torch.set_grad_enabled(grad):
                self.counted[forward, grad] = live_bytes(forward)
        return self.counted[forward, grad]


@dataclass(frozen=True)
class Need:
    """The memory that a part of a run needs, in bytes.

    field     of the config, which says how many samples are worked on at once
    count     of them
    each      for the activations of one sample
    fixed     for weights, and in training for gradients and Adam's two moments
    slices    for a batch of slices and their noise, if the network works on a part of it only
    """
    field: str
    count: int
    each: int
    fixed: int
    slices: int = 0

    @property
    def total(self):
        return self.fixed + self.slices + self.count * self.each


def draw(method, cfg, ds):
    """Return the Outline of a method.  Raises RunError if its networks cannot be built."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]), LiveBytes():
            outline = method.outline(cfg, ds)
            outline.live_bytes_of(outline.forward)
            return outline
    except (ValueError, RuntimeError, OverflowError, ZeroDivisionError) as error:
        raise RunError(f"networks of these sizes cannot be built ({str(error).splitlines()[0]}); "
                       "change the flags of the networks", status=2) from error


def needs(method, cfg, run, ds, outline):
    """Return what a run needs, as a list of Need, the last stage of the training first.

    The numbers are rather too low: copies of the weights, temporary results and libraries come on
    top.  What is refused for them would not have fitted.
    """
    sizes = []
    for network in outline.networks.values():
        sizes.append(sum(p.numel() for p in network.parameters()))
    weights = 4 * sum(sizes)
    halved = 2 if run.precision == "bf16" else 1
    args = run.args
    found = []
    if not args.evaluate or args.train and not run.finished(method.stages):
        count = -(-cfg.batch // run.world)
        each = outline.live_bytes_of(outline.forward) // halved
        # The largest network has gradients and Adam's two moments, of 4 bytes each.
        fixed = weights + 12 * max(sizes)
        slices = 0
        if args.micro_batch and args.micro_batch < count:
            slices = count * 8 * len(ds.contrasts) * cfg.size ** 2
            count = args.micro_batch
        found.append(Need("batch", count, each, fixed, slices))
        for name, (capped, forward) in outline.before.items():
            count = getattr(cfg, name)
            if capped:
                count = min(count, len(ds.rows("train")))
            found.append(Need(name, count, outline.live_bytes_of(forward) // halved, 0))
    if args.evaluate:
        slices = len(ds.spread("test", cfg.test_slices)) // outline.depth
        each = outline.live_bytes_of(outline.forward, outline.guided) // halved
        found.append(Need("sample_batch", min(cfg.sample_batch, slices), each, weights))
    return found


def require_memory(method, cfg, run, ds, outline):
    """Refuse what this machine cannot hold.

    outline: from draw.  ds: a data.Dataset.  Before it is decoded it has no slices.  What depends
    on their number is then refused in a second call.

    Raises RunError, which says what would be needed, if the memory of the device is smaller.
    """
    there = memory_bytes(run.device)
    for need in needs(method, cfg, run, ds, outline):
        if there is None or need.total <= there:
            continue
        fields = [need.field]
        if need.fixed > there:
            fields = [name for name in WIDTHS if hasattr(cfg, name)]
        what = flags({name: getattr(cfg, name) for name in fields})
        also = "--micro-batch, " if need.field == "batch" and method.micro_batches else ""
        raise RunError(
            f"{what}: about {need.total / GB:,.1f} GB of memory are needed, {need.fixed / GB:.2g} "
            f"GB for weights and optimiser, and {need.each / GB:.2g} GB of activations for each of "
            f"{need.count:,} at once, but the {run.device.type} has {there / GB:,.1f} GB; "
            f"use {also}smaller values of these flags, or a smaller --size", status=2)


def dry_run(method, cfg, run, ds):
    """Say what would be trained, how large it is, and about how long it takes.

    Raises RunError if it does not fit into this machine because of a flag that was typed.  Values
    of a preset may be meant for another machine.
    """
    run.say("\n".join(f"  {name} = {value}" for name, value in run.config_dict().items()))
    outline = draw(method, cfg, ds)
    for line in outline.lines:
        run.say(line)
    for name, network in outline.networks.items():
        run.say(f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters")
    for need in needs(method, cfg, run, ds, outline):
        weights = f"{need.fixed / GB:.2g} GB for weights and optimiser, and " if need.fixed else ""
        run.say(f"memory of training, --{need.field.replace('_', '-')}: about {weights}"
                f"{need.each / GB:.2g} GB of activations for each of {need.count}, in "
                f"{run.precision}: together {need.total / GB:.2g} GB")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        outline.forward()
    # The backward pass costs twice the forward pass.
    flops = 3 * counter.get_total_flops() * outline.slices
    run.say(f"last stage of training: {flops:.2g} FLOP, about {flops / 1e11 / 3600:.2g} h at 100 "
            f"GFLOP/s (a laptop), {flops / 1e14 / 3600:.2g} h at 100 TFLOP/s (a large GPU, bf16)")
    try:
        require_memory(method, cfg, run, ds, outline)
    except RunError as error:
        if run.args.typed.keys() & {"size", "batch", *WIDTHS, *outline.before}:
            raise
        run.say(f"warning: this machine cannot train it; {error}")
    run.say("this was a dry run: add --train, --evaluate, --synthesize, --check or --benchmark")


# ---- counting ------------------------------------------------------------------------------------


def live_bytes(forward):
    """Return the most bytes that are alive at once while forward() runs, beside what was there.

    With gradients this includes all that the backward pass needs.  forward works on the meta
    device.
    """
    with FusedAttention(), LiveBytes() as counter:
        forward()
    return counter.most


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, until they are freed.

    now, most    bytes at this moment, and the most so far
    """

    @classmethod
    def _should_skip_dynamo(cls):
        return False                    # torch would import its compiler, which takes two seconds

    def __init__(self):
        super().__init__()
        self.now = 0
        self.most = 0
        self.known = set()              # memory that is counted, or that was there before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.known.update(map(address, storages((args, kwargs))))
        made = empty_result(func, args, kwargs)
        if made is None:
            made = func(*args, **kwargs)
        for storage in storages(made):
            if address(storage) not in self.known:
                self.known.add(address(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, address(storage), storage.nbytes())
        self.most = max(self.most, self.now)
        return made

    def free(self, place, size):
        self.known.discard(place)
        self.now -= size


def empty_result(func, args, kwargs):
    """What some frequent operations return, as empty tensors; None for all others.

    torch finds out the shapes of results by computing with Python, which would take a second.
    """
    name, _, overload = func.__name__.partition(".")
    if name in IN_PLACE:
        return args[0]
    if name in RANGES:
        return func(*args, **{**kwargs, "device": "cpu"}).to("meta")
    tensors = [arg for arg in args if torch.is_tensor(arg)]
    if name in POINTWISE and overload in OVERLOADS and tensors[-1].is_floating_point():
        return tensors[-1].new_empty(torch.broadcast_shapes(*(t.shape for t in tensors)))
    if name == "mean":
        x = args[0]
        axes = args[1] if len(args) > 1 else range(x.dim())
        kept = len(args) > 2 and args[2]
        gone = {axis % x.dim() for axis in axes}
        return x.new_empty([1 if axis in gone else n for axis, n in enumerate(x.shape)
                            if kept or axis not in gone])
    if name == "cat":
        parts = args[0]
        axis = args[1] if len(args) > 1 else 0
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return parts[0].new_empty(shape)
    if name == "addmm":
        return args[1].new_empty(len(args[1]), args[2].shape[1])
    if name == "native_group_norm":
        x, _, _, samples, _, _, groups = args[:7]
        return torch.empty_like(x), x.new_empty(samples, groups), x.new_empty(samples, groups)
    if name == "native_layer_norm":
        x, normalised = args[:2]
        places = [*x.shape[:-len(normalised)], *[1] * len(normalised)]
        return torch.empty_like(x), x.new_empty(places), x.new_empty(places)
    return None


def storages(tree):
    """Return the memory behind all tensors in nested lists, tuples and dicts."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if torch.is_tensor(leaf)]


def address(storage):
    """Return a number for a piece of memory.  All tensors that share it have the same one."""
    return storage._cdata


class FusedAttention(TorchFunctionMode):
    """Counts attention as CPUs and GPUs compute it, without the large matrix of all pairs.

    The meta device would make this matrix.  With a mask that is trained, the others make it, too.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        mask = kwargs.get("attn_mask")
        trained = mask is not None and mask.requires_grad
        if func is F.scaled_dot_product_attention and not trained:
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return fused(*args, **kwargs)[0]
        return func(*args, **kwargs)
