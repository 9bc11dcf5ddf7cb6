"""Bytes of a training step, counted before it runs, and the cheapest way to make them fit.

    peak = weights + gradients + moments + what the forward keeps + the block at work + the loss

What the forward keeps is counted on the model itself, on tensors without memory, one number for
each storage that the backward will read; the rest is arithmetic. Recomputing a block, or computing
a step in parts, costs one more forward; both together two.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from clipa_kernels import Packed
from models import SIZES

from .build import build_model
from .config import Config
from .distributed import World, autocast_dtype

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


def kept_bytes(
    config: Config, stage: str, rows: int, recompute: str, device: torch.device
) -> tuple[int, int]:
    """Bytes that the forward of `rows` rows keeps for the backward, weights left out.

    Captions are taken at their longest.

    Returns:
        Those of the whole model, and those of one block of the wider tower alone.
    """
    sizes, model = config.stages[stage], config.model
    side, context = sizes.image_size, sizes.context
    patches = (side // model.patch_size) ** 2
    kept = patches if sizes.image_mask == "none" else max(1, int(patches * (1 - sizes.image_drop)))
    kept = patches // 4 if sizes.image_mask == "grid" else kept
    dtype = autocast_dtype(config.run.precision, device)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device.type):
        built = build_model(config, stage).train()
        built.set_recompute(recompute)
        own = {id_of(p) for p in (*built.parameters(), *built.buffers())}
        images = torch.empty(rows, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        keep = None if kept == patches else torch.empty(rows, kept, dtype=torch.int64)
        ends = torch.arange(0, (rows + 1) * context, context, dtype=torch.int32)
        text = Packed(torch.empty(rows * context, dtype=torch.int64), ends, context)
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with autocast:
            whole = _counted(lambda: built(images, text, keep), own)
            tower = built.visual.transformer
            x = torch.empty(rows * (kept + 1), tower.width, dtype=dtype)
            ends = torch.arange(0, (rows + 1) * (kept + 1), kept + 1, dtype=torch.int32)
            block = _counted(lambda: tower.resblocks[0](x, x.float(), ends, kept + 1), own)
    return whole, block


def id_of(tensor: Tensor) -> int:
    """The number of a tensor's storage."""
    return tensor.untyped_storage()._cdata


def _counted(forward, own: set[int]) -> int:
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if id_of(tensor) not in own:
            seen[id_of(tensor)] = tensor  # held, so that no other storage gets its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def planned(config: Config, stage: str, plan: Plan, world: World) -> Plan:
    """The plan with the bytes of its peak on one process."""
    batch = config.stages[stage].batch_size
    rows = batch // world.size
    kept, block = kept_bytes(config, stage, rows // plan.accumulate, plan.recompute, world.device)
    with torch.device("meta"):
        parameters = list(build_model(config, stage).parameters())
    trained = sum(one.numel() for one in parameters if one.requires_grad)
    weights, parts = 4 * sum(one.numel() for one in parameters), world.size
    kind = config.run.shard
    static = weights if kind != "full" else weights / parts + 4 * _widest(config)
    static += 12 * trained / (1 if kind == "none" else parts)  # gradients, two moments
    features = 4 * 4 * batch * SIZES[config.model.size][2]  # of both towers, and their gradients
    loss = features + 4 * min(_STRIP, rows) * batch
    # A block's gradients, or what is computed again of it, live beside what is kept.
    return plan._replace(bytes=int(static) + kept + block + loss)


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
