"""Stage right: what the machine can do, and whether every op is right on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from bench.first import unseen
from bench.first.cases import Case, both, gradients_of, right_cases, small_cases
from bench.first.machine import Machine
from bench.first.programs import ROOT, programs
from bench.first.report import Check, Line, tried
from bench.measure import allowed, seconds
from clipa_kernels import bias_gelu, block_patches, grid_patches, random_patches

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def checks(machine: Machine) -> list[Check]:
    """Ceilings first, what takes long last."""
    made = [Check("ceilings", partial(ceilings, machine))]
    for op, cases in right_cases(machine.big).items():
        made.append(Check(f"right {op}", partial(correct, machine, cases), 120))
    made.append(Check("right masking", partial(masks, machine)))
    made += unseen.checks(machine)
    made.append(Check("launches compiled", partial(launches, machine), 240))
    tools = machine.pick(("memcheck", "racecheck"), ("memcheck",))
    made += [Check(f"sanitizer {tool}", partial(sanitized, machine, tool), 150) for tool in tools]
    return made


def ceilings(machine: Machine) -> Iterator[Line]:
    """Bandwidth of a copy, FLOP/s of the library's products, and the host's time of a launch."""
    x = torch.zeros(machine.pick(1 << 29, 1 << 10), dtype=torch.int8, device=machine.device)
    rate = 2 * x.nbytes / seconds(torch.Tensor.copy_, [x.clone(), x]) / 1e9
    yield {"copy GB/s": rate, "table": f"copy {rate:.0f} GB/s"}
    n = machine.pick(8192, 64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a = torch.randn(n, n, device=machine.device).to(dtype)
        rate = 2 * n**3 / seconds(torch.mm, [a, a.clone()]) / 1e12
        name = NAMES[dtype]
        yield {f"product {name} TFLOP/s": rate, "table": f"product {name} {rate:.0f} TFLOP/s"}
    x = torch.randn(8, 16, device=machine.device)
    kinds = dict(
        torch=lambda: x.add(1), ours=lambda: bias_gelu(x, impl="triton"),
        both=lambda: _both_ways(x),
    )  # fmt: skip
    for name, call in kinds.items():
        call()
        machine.wait()
        calls = machine.pick(500, 2)
        began = time.perf_counter()
        for _ in range(calls):
            call()
        host = 1e6 * (time.perf_counter() - began) / calls
        machine.wait()
        yield {f"host us a call, {name}": host, "table": f"a call of {name} {host:.0f} us"}


def _both_ways(x: Tensor) -> None:
    leaf = x.detach().requires_grad_()
    torch.autograd.grad(bias_gelu(leaf, impl="triton"), leaf, x)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory of torch.empty is NaN, so that a value never written is seen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def correct(machine: Machine, cases: list[Case]) -> Iterator[Line]:
    """Outputs and every gradient against the reference in fp64, by the tests' tolerance."""
    dtypes = machine.pick([torch.float32, torch.float16, torch.bfloat16], [torch.float16])
    worst = 0.0
    with poisoned():
        for case in cases:
            for dtype in dtypes:
                label = f"{case.label} {NAMES[dtype]}"
                line = tried(label, compared, case, dtype, machine.device)
                worst = max(worst, line.get("of_allowed", 0.0))
                yield line
    yield dict(table=f"worst error {worst:.2f} of what is allowed")


def compared(case: Case, dtype: torch.dtype, device: torch.device) -> Line:
    """The largest error over what is allowed, and whose it is."""
    leaves = case.leaves(device, dtype)
    actual_outs = case.ours(**leaves)
    outs = actual_outs if isinstance(actual_outs, tuple) else (actual_outs,)
    d_out = gradients_of(list(outs))
    actual = both(case.ours, leaves, d_out)
    exact = both(case.reference, converted(leaves, torch.float64), d_out)
    base = both(case.reference, converted(leaves, None), d_out)
    ratios = {name: _ratio(actual[name], exact[name], base[name], dtype) for name in actual}
    name = max(ratios, key=ratios.__getitem__)
    return dict(ok=ratios[name] <= 1, of_allowed=ratios[name], of=name)


def converted(leaves: dict, dtype: torch.dtype | None) -> dict:
    """The same numbers in a dtype; None: as they are."""
    return {
        name: value.detach().to(dtype or value.dtype).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in leaves.items()
    }


def _ratio(actual: Tensor | None, exact: Tensor, base: Tensor, dtype: torch.dtype) -> float:
    if actual is None or not torch.isfinite(actual).all():
        return float("inf")
    limit = allowed(exact, base.to(actual.dtype))
    if actual.numel() == 1:
        # A loss, or a scalar's gradient: a sum of many terms of both signs, each as rounded.
        floor = 1e-4 if dtype.itemsize == 2 else 2e-6
        limit = max(limit, floor * max(1.0, exact.abs().item()))
    return ((actual.double() - exact).abs().max() / limit).item()


def masks(machine: Machine) -> Iterator[Line]:
    """The bits of the choice on this machine against those of plain torch on the host."""
    count = machine.pick(4096, 3)
    key = dict(seed=2**63 + 5, step=7, first_sample=2**32 - 2)
    for name, choose in (
        ("random", partial(random_patches, drop=0.75)),
        ("grid", grid_patches),
        ("block", partial(block_patches, drop=0.5)),
    ):
        for grid in ((6, 6), (8, 8), *machine.pick([(16, 16), (32, 32)], [])):
            mine = choose(count, grid, **key, device=machine.device, impl="triton")
            other = choose(count, grid, **key, impl="torch")
            yield dict(case=f"{name} {grid}", ok=torch.equal(mine.cpu(), other))


def launches(machine: Machine) -> Iterator[Line]:
    """Every launch that bench/meters/calls.py records, compiled for this machine: registers and
    spills. A process of its own, which is not under the interpreter."""
    command = ["bench.compiled", "--json", "--arch", str(machine.arch), "--calls"]
    count = spilling = wrong = 0
    # The presets' steps by themselves: their Config needs packages that may not be here.
    every = ("presets",), ("attention", "stem", "glue", "loss", "masking")
    for kinds in machine.pick(every, (("masking",),)):
        for line in programs(machine.pick(16, 1), *command, *kinds):
            if "ended" in line:
                absent = "ModuleNotFoundError" in line["ended"]
                yield dict(line, case=" ".join(kinds)) | ({} if absent else dict(ok=False))
                continue
            spills = line.get("spill_stores", 0)
            good = "error" not in line and line.get("blocks_per_sm", 0) > 0
            count, spilling, wrong = count + 1, spilling + (spills > 0), wrong + (not good)
            line = {key: line[key] for key in line if key not in ("types", "sizes")}
            yield dict(ok=good and not spills) | line
    yield dict(table=f"{count} launches, {spilling} spill, {wrong} do not compile or fit")


def sanitized(machine: Machine, tool: str) -> Iterator[Line]:
    """compute-sanitizer over one small call of each op, each allocation by itself."""
    path = shutil.which("compute-sanitizer")
    if path is None:
        yield dict(skipped="compute-sanitizer is not installed")
        return
    child = [sys.executable, "-m", "bench.first_gpu", "smallest", "--child"]
    run = subprocess.run(
        [path, "--tool", tool, *child], cwd=ROOT, text=True, check=False, timeout=140,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
    )  # fmt: skip
    found = re.search(r"(ERROR|RACECHECK) SUMMARY: (\d+)", run.stdout)
    first = next((line for line in run.stdout.splitlines() if "=========" in line[:9]), "")
    good = run.returncode == 0 and found is not None and found[2] == "0"
    words = run.stdout[-600:] if not found else found[0]
    yield dict(ok=good, table=found[0] if found else "no summary", said=words, first=first)


def smallest(machine: Machine) -> list[Check]:
    """What compute-sanitizer watches: the smallest call that launches each kernel."""

    def run() -> Iterator[Line]:
        for case in small_cases(machine.big):
            both(case.ours, case.leaves(machine.device, machine.short))
        for choose in (random_patches, block_patches):
            choose(2, (4, 4), 0.5, seed=0, step=0, device=machine.device, impl="triton")
        machine.wait()
        yield dict(ok=True)

    return [Check("smallest", run)]
