"""What no emulator shows: far operands, streams, graphs, waiting, autocast, switches, devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.first.cases import (
    SHORT,
    Case,
    attention_case,
    both,
    gelu_case,
    loss_case,
    norm_case,
    small_cases,
    stem_case,
)
from bench.first.machine import Machine, kept
from bench.first.report import Check, Line, tried
from clipa_kernels import block_patches, contrastive_loss, cu_seqlens_of, random_patches
from models.transformer import Block


def checks(machine: Machine) -> list[Check]:
    """Each over one small case of every op; the switches are global, and come last."""
    made = [
        Check(name, partial(over_ops, machine, function))
        for name, function in (
            ("another stream", on_a_stream),
            ("graph replay", replayed),
            ("waits for nothing", without_waiting),
            ("two runs, equal bits", twice),
            ("other devices", elsewhere),
        )
    ]
    made.append(Check("masks of a graph", partial(masks_replayed, machine)))
    made.append(Check("autocast", partial(autocast, machine)))
    made += [
        Check(f"beyond 2^31 {name}", partial(far, machine, name, tail))
        for name, tail in TAILS.items()
    ]
    made.append(Check("beyond 2^31 contrastive", partial(far_loss, machine)))
    made.append(Check("TF32 switches", partial(switches, machine)))
    return made


def over_ops(machine: Machine, function: Callable[[Machine, Case], Line]) -> Iterator[Line]:
    """A line for each op."""
    for case in small_cases(machine.big):
        yield tried(f"{case.op} {case.label}", function, machine, case)


def _same(found: dict[str, Tensor], others: dict[str, Tensor]) -> Line:
    apart = [name for name in found if not torch.equal(found[name].cpu(), others[name].cpu())]
    return dict(ok=not apart, apart=apart)


def twice(machine: Machine, case: Case) -> Line:
    """Two runs: no atomics, so equal bits."""
    leaves = case.leaves(machine.device, machine.short)
    return _same(both(case.ours, leaves), both(case.ours, leaves))


def on_a_stream(machine: Machine, case: Case) -> Line:
    """Work queued on a busy side stream: launched elsewhere it would read inputs too early."""
    expected = both(case.ours, case.leaves(machine.device, machine.short))
    machine.wait()
    with machine.other_stream():
        found = both(case.ours, case.leaves(machine.device, machine.short))
    machine.wait()
    return _same(found, expected)


def replayed(machine: Machine, case: Case) -> Line:
    """Forward and backward as a CUDA graph, replayed with other numbers in the same tensors."""
    leaves = case.leaves(machine.device, machine.short)
    d_out = _d_out(case, leaves)
    replay = machine.recorded(partial(both, case.ours, leaves, d_out))
    with torch.no_grad():
        for name, value in leaves.items():
            if isinstance(value, Tensor) and value.is_floating_point() and name not in case.fixed:
                value.mul_(0.75)
    found = kept(replay())
    machine.wait()
    return _same(found, both(case.ours, leaves, d_out))


def masks_replayed(machine: Machine) -> Iterator[Line]:
    """Token choice in a CUDA graph: the step changes in place, and the masks with it."""
    step = torch.zeros((), dtype=torch.int64, device=machine.device)
    for choose in (random_patches, block_patches):
        key = dict(seed=3, first_sample=7, device=machine.device, impl="triton")
        draw = partial(choose, 8, (8, 8), 0.5, **key)
        replay = machine.recorded(partial(draw, step=step))
        drawn = {}
        for number in (1, 2):
            step.fill_(number)
            drawn[number] = torch.equal(replay(), draw(step=number))
        yield dict(case=choose.__name__, ok=all(drawn.values()))


def without_waiting(machine: Machine, case: Case) -> Line:
    """After a first call, which compiles, no op asks the device for a value."""
    leaves = case.leaves(machine.device, machine.short)
    d_out = _d_out(case, leaves)
    both(case.ours, leaves, d_out)
    with machine.no_waiting():
        both(case.ours, leaves, d_out)
    return dict(ok=True)


def elsewhere(machine: Machine, case: Case) -> Line:
    """Tensors on a device that is not the current one."""
    if not machine.others():
        return dict(skipped="one device")
    other = machine.others()[0]
    leaves = case.leaves(machine.device, machine.short)
    d_out = _d_out(case, leaves)
    moved = {
        name: value.detach().to(other).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for name, value in leaves.items()
    }
    found = both(case.ours, moved, [value.to(other) for value in d_out])
    return _same(found, both(case.ours, leaves, d_out))


def _d_out(case: Case, leaves: dict[str, Any]) -> list[Tensor]:
    outs = case.ours(**leaves)
    return [torch.ones_like(out) for out in (outs if isinstance(outs, tuple) else (outs,))]


def autocast(machine: Machine) -> Iterator[Line]:
    """A block with parameters in fp32 under autocast, against itself in fp64 by the references."""
    width, heads, count = machine.pick((768, 12, 64), (32, 2, 2))
    torch.manual_seed(0)
    make = partial(Block, width, heads, 4.0, causal=False, gelu="none", eps=1e-5)
    block = make(impl="triton").to(machine.device)
    exact = make(impl="reference").to(machine.device)
    exact.load_state_dict(block.state_dict())
    exact.double()
    length = machine.pick(SHORT, 4)
    x = torch.randn(count * length, width, device=machine.device)
    ends = cu_seqlens_of([length] * count, machine.device)

    def run(module: Block, x: Tensor) -> list[Tensor]:
        module.zero_grad()
        out, total = module(x, torch.zeros_like(x), ends, length)
        (out.double() + total.double()).square().mean().backward()
        return [out.detach(), *(p.grad for p in module.parameters())]

    with torch.autocast(machine.device.type, machine.short):
        mine = run(block, x)
    names = ["output", *(name for name, _ in block.named_parameters())]
    for name, found, true in zip(names, mine, run(exact, x.double()), strict=True):
        off = ((found.double() - true).abs().max() / true.abs().max().clamp_min(1e-12)).item()
        fine = off < 0.05 or name.endswith(
            "in_proj_bias"
        )  # whose keys' third is zero but for noise
        yield dict(case=name, ok=fine, error_of_largest=off, dtype=str(found.dtype))


def switches(machine: Machine) -> Iterator[Line]:
    """Both switches for fp32 products: what they do to our errors, which must follow them."""
    cases = [case for case in small_cases(machine.big) if case.op not in ("layer_norm", "gelu")]
    plain = [_error(case, machine) for case in cases]
    matmul = torch.backends.cuda.matmul

    def old(on: bool) -> None:
        torch.set_float32_matmul_precision("high" if on else "highest")

    def new(on: bool) -> None:
        matmul.fp32_precision = "tf32" if on else "ieee"

    known = dict(old=old) | (dict(new=new) if hasattr(matmul, "fp32_precision") else {})
    for name, switch in known.items():
        switch(True)
        try:
            on = [_error(case, machine) for case in cases]
        finally:
            switch(False)
        off = [_error(case, machine) for case in cases]
        for case, before, with_it, after in zip(cases, plain, on, off, strict=True):
            follows = before < 2e-5 and after < 2e-5 and with_it < 2e-2
            line = dict(case=f"{name} {case.op} {case.label}", ok=follows)
            yield line | dict(errors=[before, with_it, after])


def _error(case: Case, machine: Machine) -> float:
    """The largest error of the first output in fp32, over the largest value."""
    leaves = case.leaves(machine.device, torch.float32)
    exact = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in leaves.items()
    }
    mine, true = case.ours(**leaves).detach(), case.reference(**exact).detach()
    return ((mine.double() - true).abs().max() / true.abs().max()).item()


def _far_case(name: str, machine: Machine) -> tuple[Case, int]:
    """Operands of more than 2^31 elements, and how many units they are cut in."""
    big = machine.big
    if name == "attention":
        count = 15_200 if big else 3
        return attention_case(
            SHORT if big else 8, 80 if big else 16, count, 16 if big else 1
        ), count
    if name == "patch_embed":
        count = 14_400 if big else 3
        return stem_case(*((224, 16, 0.5, 1664) if big else (8, 4, 0.5, 16)), count), count
    if name == "layer_norm":
        count = 1_300_000 if big else 6
        return norm_case(count, 1664 if big else 16), count
    count = 270_000 if big else 6
    return gelu_case("none", count, 8192 if big else 16), count


# Which inputs have a row a unit.
TAILS = {
    "attention": ("qkv",),
    "patch_embed": ("images", "keep"),
    "layer_norm": ("x", "residual"),
    "gelu": ("x",),
}


def far(machine: Machine, name: str, rows: tuple[str, ...]) -> Iterator[Line]:
    """The last units of operands beyond 2^31 elements against the same units by themselves."""
    case, count = _far_case(name, machine)
    few = 2
    leaves = case.leaves(machine.device, machine.short)
    result = both(case.ours, leaves, _d_out(case, leaves))
    alone = dict(leaves)
    for key in rows:
        share = leaves[key].shape[0] // count * few
        tail = leaves[key].detach()[-share:]
        alone[key] = tail.clone(memory_format=torch.preserve_format)
        alone[key].requires_grad_(leaves[key].requires_grad)
    if name == "attention":
        longest = alone["qkv"].shape[0] // few
        alone["ends"] = cu_seqlens_of([longest] * few, machine.device)
    expected = both(case.ours, alone, _d_out(case, alone))
    largest = max(value.numel() for value in leaves.values() if isinstance(value, Tensor))
    for key, value in expected.items():
        if key.startswith("output") or key.removeprefix("gradient of ") in rows:
            off = (result[key][-len(value) :].double() - value.double()).abs().max().item()
            limit = 2 * torch.finfo(value.dtype).eps * value.abs().max().item()
            yield dict(case=f"{case.label}: {key}", ok=off <= limit, error=off, elements=largest)
        else:
            yield dict(case=f"{case.label}: {key}", ok=bool(result[key].isfinite().all()))


def far_loss(machine: Machine) -> Iterator[Line]:
    """Strips of logits beyond 2^31 elements, against plain torch's."""
    n = machine.pick(560_000, 24)
    case = loss_case(n, machine.pick(64, 16), 14.3)
    leaves = case.leaves(machine.device, machine.short)
    mine = both(case.ours, leaves)
    other = both(partial(contrastive_loss, impl="torch"), leaves)
    for name, value in mine.items():
        off = (value.double() - other[name].double()).abs().max().item()
        largest = other[name].abs().max().item()
        yield dict(case=f"{case.label}: {name}", ok=off <= 0.03 * largest, error=off, of=largest)
