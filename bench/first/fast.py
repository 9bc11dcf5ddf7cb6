"""Stage fast: our launches beside their roofs, what a user would pick instead, blocks and steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.first.cases import SHORT, Case, both, fast_cases, gradients_of
from bench.first.launched import launches
from bench.first.machine import Machine
from bench.first.programs import programs
from bench.first.report import Check, Line, tried
from bench.first.rivals import rivals
from bench.measure import seconds, step
from clipa_kernels import Packed, contrastive_loss, cu_seqlens_of, random_patches
from models import build
from models.clip import forward_flops
from models.transformer import Block

# Name, patch side, image side, share dropped, batch, tokens of a caption.
STEPS = {"B/16": ("B", 16, 112, 0.0, 2048, 16), "H/14": ("H", 14, 84, 0.0, 512, 8)}
TINY = dict(width=32, depth=1, heads=2)


def checks(machine: Machine) -> list[Check]:
    """By op the launches, then the rivals; then whole blocks and steps."""
    ops, steps = fast_cases(machine.big), machine.pick(list(STEPS), ["H/14"])

    @cache
    def models() -> dict[tuple[str, int], Line]:
        return modelled(machine, list(ops))

    @cache
    def rate() -> float:
        x = torch.zeros(machine.pick(1 << 30, 1 << 10), dtype=torch.int8, device=machine.device)
        return 2 * x.nbytes / seconds(Tensor.copy_, [x.clone(), x])

    made = [
        Check(f"launches {op}", partial(timed, machine, cases, models, rate), 150)
        for op, cases in ops.items()
    ]
    made += [Check(f"rivals {op}", partial(beside, machine, cases)) for op, cases in ops.items()]
    made += [Check(f"block {name}", partial(block, machine, name)) for name in steps]
    made += [Check(f"step {name}", partial(whole_step, machine, name), 120) for name in steps]
    return made


def modelled(machine: Machine, ops: list[str]) -> dict[tuple[str, int], Line]:
    """Roofs of the launches by case and place; none where the machine is not among GPUS."""
    from bench.meters.roofs import GPUS

    if machine.arch not in GPUS:
        return {}
    options = ["--arch", str(machine.arch), *machine.pick([], ["--small"])]
    lines = programs(machine.pick(16, 1), "bench.first.launched", *ops, *options)
    return {(line["case"], line["place"]): line for line in lines if "case" in line}


def timed(
    machine: Machine, cases: list[Case], models: Callable[[], dict], rate: Callable[[], float]
) -> Iterator[Line]:
    """Each launch of a forward and backward, made again by itself: its time, over its modelled
    roof and over the time of its least bytes at the speed of this machine's copies."""
    worst: dict[str, tuple[float, str]] = {}
    for case in cases:
        with launches() as found:
            both(case.ours, case.leaves(machine.device, machine.short))
        for place, launch in enumerate(found):
            model = models().get((case.label, place), {})
            line = dict(case=case.label, kernel=launch.name, us=1e6 * launch.seconds())
            if model.get("kernel") == launch.name and "modelled_us" in model:
                line |= {key: model[key] for key in ("modelled_us", "bound", "registers")}
                line["over_roof"] = line["us"] / max(model["modelled_us"].values())
            if model.get("kernel") == launch.name:
                line["over_copy"] = 1e-6 * line["us"] * rate() / model["least_bytes"]
                words = f"{launch.name} {line['us']:.0f} us, {line['over_copy']:.2f} of a copy"
                worst[launch.name] = max(
                    worst.get(launch.name, (0.0, "")), (line["over_copy"], words)
                )
            yield line
    yield dict(table="; ".join(words for _, words in worst.values()))


def beside(machine: Machine, cases: list[Case]) -> Iterator[Line]:
    """Forward and backward of ours and of its rivals: each gives our result, then is timed."""
    for case in cases[:: max(1, len(cases) // 4)]:
        leaves = case.leaves(machine.device, machine.short)
        out = case.ours(**leaves)
        out = [each.detach() for each in (out if isinstance(out, tuple) else (out,))]
        d_out = gradients_of(out)
        times: dict[str, float] = {}
        for name, function in (("ours", case.ours), *rivals(case, machine).items()):
            line = tried(f"{case.label}: {name}", _one, function, leaves, out, d_out)
            if "us" in line:
                times[name] = line["us"]
            else:
                line.pop("ok", None)  # a rival that cannot run here is no failure of ours
            yield line
        others = {name: us for name, us in times.items() if name != "ours"}
        if "ours" in times and others:
            best = min(others, key=others.__getitem__)
            ratio = others[best] / times["ours"]
            words = f"{case.label}: {times['ours']:.0f} us, {ratio:.2f}x to {best}"
            yield dict(case=case.label, faster=ratio, than=best, table=words)


def _one(
    function: Callable, leaves: dict[str, Any], out: list[Tensor], d_out: list[Tensor]
) -> Line:
    """Its distance from ours, and its time."""
    found = function(**leaves)
    found = found if isinstance(found, tuple) else (found,)
    pairs = list(zip(found, out, strict=True))
    off = max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in pairs
    )
    d_own = [d.to(each.dtype) for d, each in zip(d_out, found, strict=True)]
    del found, pairs
    names = list(leaves)

    def call(*values: Any) -> Any:
        return function(**dict(zip(names, values, strict=True)))

    def run(values: list[Any], d_own: list[Tensor]) -> None:
        wanted = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
        result = call(*values)
        result = result if isinstance(result, tuple) else (result,)
        torch.autograd.grad(result, wanted, d_own)

    return dict(us=1e6 * seconds(run, [list(leaves.values()), d_own]), from_ours=off)


def eager_block(block: Block, x: Tensor, length: int) -> Tensor:
    """A block in torch's own operations, with the same parameters."""
    tokens, width = x.shape
    heads, attn = block.attn.heads, block.attn
    h = F.layer_norm(x, (width,), block.ln_1.weight, block.ln_1.bias)
    qkv = F.linear(h, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = qkv.view(-1, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(tokens, width)
    x = x + attn.out_proj(h)
    h = F.layer_norm(x, (width,), block.ln_2.weight, block.ln_2.bias)
    return x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(h)))


def block(machine: Machine, name: str) -> Iterator[Line]:
    """One block in 16 bits, forward and backward: ours, torch eager and compiled."""
    width, heads = machine.pick({"B/16": (768, 12), "H/14": (1280, 16)}[name], (32, 2))
    count, length = machine.pick((2048, SHORT), (2, 4))
    module = Block(width, heads, 4.0, causal=False, gelu="none", eps=1e-5, impl="triton")
    module.to(machine.device, machine.short)
    ends = cu_seqlens_of([length] * count, machine.device)
    draw = partial(torch.randn, count * length, width, device=machine.device, dtype=machine.short)
    x, residual, d_out = draw().requires_grad_(), draw().requires_grad_(), draw()
    parameters = list(module.parameters())

    def ours(x: Tensor, residual: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return module(x, residual, ends, length)

    def eager(x: Tensor, *_: Tensor) -> Tensor:
        return eager_block(module, x, length)

    compiled = torch.compile(eager, backend=machine.pick("inductor", "aot_eager"))
    times: dict[str, float] = {}
    for kind, function, leaves, d_outs in (
        ("ours", ours, [x, residual, *parameters], [d_out, d_out]),
        ("eager", eager, [x, *parameters], [d_out]),
        ("compiled", compiled, [x, *parameters], [d_out]),
    ):
        line = tried(kind, _block_time, function, leaves, d_outs)
        times[kind] = line.get("us", float("nan"))
        yield line
    words = ", ".join(f"{kind} {us:.0f} us" for kind, us in times.items())
    yield dict(table=f"{count} x {length} tokens: {words}")


def _block_time(function: Callable, leaves: list[Tensor], d_outs: list[Tensor]) -> Line:
    return dict(us=1e6 * seconds(partial(step, function), [leaves, d_outs]))


def whole_step(machine: Machine, name: str) -> Iterator[Line]:
    """A training step: token choice, both towers, loss, backward, AdamW; then the profiler's
    largest, by name."""
    size, patch, side, drop, batch, context = STEPS[name]
    sizes = dict(vision=dict(image_size=side), text=dict(context=context))
    if not machine.big:
        size, patch, side, drop, batch, context = "demo", 4, 8, 0.5, 2, 4
        sizes = dict(
            vision=TINY | dict(image_size=side),
            text=TINY | dict(context=context, vocab_size=50),
        )
    with machine.device:
        model = build(size, patch, impl="triton", **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = (batch, side, side, 3)
    images = torch.randint(256, shape, dtype=torch.uint8, device=machine.device).permute(0, 3, 1, 2)
    ids = torch.randint(50, (batch * context,), device=machine.device)
    text = Packed(ids, cu_seqlens_of([context] * batch, machine.device), context)
    grid = (side // patch,) * 2
    done = 0

    def train() -> None:
        nonlocal done
        done += 1
        key = dict(seed=0, step=done, device=machine.device, impl="triton")
        keep = random_patches(batch, grid, drop, **key) if drop else None
        with torch.autocast(machine.device.type, machine.short):
            out = model(images, text, keep)
            values = [out[n] for n in ("image_features", "text_features", "logit_scale")]
            loss = contrastive_loss(*values, impl="triton")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    taken = seconds(train, [])
    machine.wait()
    began = time.perf_counter()
    train()
    host = time.perf_counter() - began
    machine.wait()
    patches = int(grid[0] * grid[1] * (1 - drop))
    flops = 3 * batch * forward_flops(model, 1 + patches, context)
    line = dict(ms=1e3 * taken, host_ms=1e3 * host, samples_per_s=batch / taken)
    line["TFLOP/s"] = flops / taken / 1e12
    words = f"{line['ms']:.1f} ms a step of {batch}, {line['TFLOP/s']:.0f} TFLOP/s, "
    yield line | dict(ok=True, table=words + f"host {line['host_ms']:.1f} ms")
    yield tried("a step waits for nothing", _without_waiting, machine, train)
    yield from profiled(machine, train)


def _without_waiting(machine: Machine, train: Callable[[], None]) -> Line:
    with machine.no_waiting():
        train()
    return dict(ok=True)


def profiled(machine: Machine, function: Callable[[], None], most: int = 25) -> Iterator[Line]:
    """The kernels that take longest in one call."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if machine.cuda else [])]
    with profile(activities=kinds, acc_events=True) as seen:
        function()
        machine.wait()
    on = DeviceType.CUDA if machine.cuda else DeviceType.CPU
    events = [event for event in seen.key_averages() if event.device_type == on]
    own = "self_device_time_total" if machine.cuda else "self_cpu_time_total"
    events.sort(key=lambda event: -getattr(event, own))
    total = sum(getattr(event, own) for event in events)
    for event in events[:most]:
        us = getattr(event, own)
        yield dict(kernel=event.key[:100], us=us, calls=event.count, share=us / max(total, 1e-9))
