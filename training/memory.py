"""Bytes of a training step, counted before it runs, and the cheapest way to make them fit.

    peak = weights + moments + the most of forward and backward + the loss + the pictures

Forward and backward run on the model itself, on tensors without memory: what lives at a time is
counted, gradients among it; the rest is arithmetic. Recomputing a block, or computing a step in
parts, costs one more forward; both together two.
"""

import contextlib
import re
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipa_kernels import Packed
from models import CLIP, SIZES

from .build import build_model
from .config import Config
from .distributed import World, autocast_dtype
from .optim import ShortMomentAdamW

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_STRIP = 4096  # rows of logits that a loss holds at a time


class Plan(NamedTuple):
    """How a stage computes a step, and the bytes of it."""

    recompute: str
    accumulate: int
    bytes: int


def bytes_in(text: str) -> int:
    """The bytes in "80GB", in powers of ten.

    Raises:
        ValueError: no number above 0 with a unit.

    >>> bytes_in("1.5GB")
    1500000000
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    size = float(found[1]) * _UNITS[found[2].upper()] if found else 0
    if size < 1:
        raise ValueError(f"config: run.fit must be a size above 0, as 80GB, got {text!r}")
    return int(size)


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are made within it and not yet let go.

    Attributes:
        now: those of this moment.
        most: the most at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._held: set[int] = set()

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Never count these tensors' storages."""
        self._held |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now to its end."""
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        if number in self._held:
            return
        self._held.add(number)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._let_go, number, size)

    def _let_go(self, number: int, size: int) -> None:
        self._held.discard(number)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.hold(tensor)
        return out


def step_bytes(
    config: Config,
    stage: str,
    rows: int,
    recompute: str,
    device: torch.device,
    gradients: str = "made",
) -> int:
    """The most bytes at a time of forward and backward of `rows` rows, weights left out.

    Captions are taken at their longest; the loss is left out.

    Args:
        gradients: "made" by this backward, and counted; "held" by earlier parts, or by DDP, from
            the start; "dropped" as they are made, as FSDP2 lets them go.
    """
    sizes, model = config.stages[stage], config.model
    side, context = sizes.image_size, sizes.context
    patches = (side // model.patch_size) ** 2
    seen = patches if sizes.image_mask == "none" else max(1, int(patches * (1 - sizes.image_drop)))
    seen = patches // 4 if sizes.image_mask == "grid" else seen
    dtype = autocast_dtype(config.run.precision, device)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device.type):
        built = build_model(config, stage).train()
        built.set_recompute(recompute)
        images = torch.empty(rows, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        keep = None if seen == patches else torch.empty(rows, seen, dtype=torch.int64)
        ends = torch.arange(0, (rows + 1) * context, context, dtype=torch.int32)
        text = Packed(torch.empty(rows * context, dtype=torch.int64), ends, context)
        trained = [one for one in built.parameters() if one.requires_grad]
        live = Live()
        for one in trained:
            if gradients == "held":
                one.grad = torch.empty_like(one)
                live.hold(one.grad)
            elif gradients == "dropped":
                one.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
        live.leave_out((*built.parameters(), *built.buffers()))
        with live, _autocast(device.type, dtype):
            out = built(images, text, keep)
            kept = live.now
            if device.type == "cuda" and not torch.cuda.is_available():  # no backward without one
                made = sum(4 * one.numel() for one in trained) if gradients == "made" else 0
                return max(kept, made) + _block_bytes(built, rows, seen + 1, dtype)
            (out["image_features"] * out["text_features"] * out["logit_scale"]).sum().backward()
    return live.most


def _block_bytes(model: CLIP, rows: int, tokens: int, dtype: torch.dtype) -> int:
    """What a block of the wider tower keeps, which its backward computes again or needs beside."""
    tower, live = model.visual.transformer, Live()
    x, ends = torch.empty(rows * tokens, tower.width, dtype=dtype), torch.empty(rows + 1).int()
    live.leave_out((*tower.parameters(), x))
    with live:
        held = tower.resblocks[0](x, x.float(), ends, tokens)
    del held
    return live.most


@contextlib.contextmanager
def _autocast(device: str, dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast as a step has it, for CUDA too where there is none."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_enabled(device, dtype != torch.float32)
    torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.set_autocast_cache_enabled(cached)


def planned(config: Config, stage: str, plan: Plan, world: World) -> Plan:
    """The plan with the bytes of its peak on one process."""
    sizes, kind, processes = config.stages[stage], config.run.shard, world.size
    rows = sizes.batch_size // processes
    alone = processes == 1
    held = plan.accumulate > 1 or not alone
    gradients = "held" if held else "made"
    gradients = "dropped" if kind != "none" and not alone else gradients
    how = (rows // plan.accumulate, plan.recompute, world.device, gradients)
    work = step_bytes(config, stage, *how)
    with torch.device("meta"):
        parameters = list(build_model(config, stage).parameters())
    trained = sum(one.numel() for one in parameters if one.requires_grad)
    weights, parts = 4 * sum(one.numel() for one in parameters), 1 if kind == "none" else processes
    static = weights if kind != "full" else weights / parts + 4 * _widest(config)
    short = config.optim.moment == "bf16"
    static += (6 if short else 8) * trained / parts  # both moments
    static += 4 * trained / parts if gradients == "dropped" else 0
    wide = 4 * min(trained / parts, ShortMomentAdamW.AT_ONCE) if short else 0
    after = 4 * trained / parts + wide  # while the weights move
    features = 4 * 4 * sizes.batch_size * SIZES[config.model.size][2]  # of both, and gradients
    loss = features + 4 * min(_STRIP, rows) * sizes.batch_size
    pictures = 2 * rows * 3 * sizes.image_size**2  # of this batch and of the next
    return plan._replace(bytes=int(static + max(work + loss, after) + pictures))


def _widest(config: Config) -> int:
    """Parameters of two blocks of the wider tower, which lie whole while one follows the other."""
    width, _, _, ratio = SIZES[config.model.size][0]
    return int(2 * width**2 * (4 + 2 * ratio))


def plans(config: Config, stage: str, world: World) -> Iterator[Plan]:
    """Every way to compute a step, the fastest first."""
    rows = config.stages[stage].batch_size // world.size
    parts = [n for n in range(2, rows + 1) if rows % n == 0]
    yield from (Plan(kind, 1, 0) for kind in ("none", "mlp", "block"))
    yield from (Plan("none", n, 0) for n in parts[:2])
    yield from (Plan("block", n, 0) for n in parts)


def fitted(config: Config, world: World) -> tuple[Config, dict[str, str]]:
    """The config with each stage's parts, and what each recomputes, so that it fits into run.fit.

    Raises:
        ValueError: a stage that does not fit in any way; says what it takes at least.
    """
    kinds = dict.fromkeys(config.running, config.run.recompute)
    if not config.run.fit:
        return config, kinds
    room, stages = bytes_in(config.run.fit), dict(config.stages)
    for name in config.running:
        tried = []
        for plan in plans(config, name, world):
            tried.append(planned(config, name, plan, world))
            if tried[-1].bytes <= room:
                break
        plan = min(tried, key=lambda one: one.bytes) if tried[-1].bytes > room else tried[-1]
        told = f"recompute {plan.recompute}, accumulate {plan.accumulate}"
        if plan.bytes > room:
            came = f"{config.run.fit} where {told} takes {plan.bytes / 1e9:.3g} GB"
            raise ValueError(f"config: run.fit must hold stage {name}, got {came}")
        kinds[name] = plan.recompute
        stages[name] = replace(stages[name], accumulate=plan.accumulate)
        size = f"{plan.bytes / 1e9:.3g} of {room / 1e9:.3g} GB"
        world.print(f"stage {name}: {told}, for {size}")
    return replace(config, stages=stages), kinds
