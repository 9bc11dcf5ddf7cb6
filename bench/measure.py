"""What the benches of one operation share: a result is checked, then timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Function = Callable[..., Tensor]


def step(function: Function, leaves: list[Tensor], d_out: Tensor) -> list[Tensor]:
    """Forward and backward, finished when it returns: the output and the leaves' gradients."""
    out = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(out, wanted, d_out.to(out.dtype))
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return [out.detach(), *grads]


def error(function: Function, exact: Function, leaves: list[Tensor], d_out: Tensor) -> float:
    """The largest error of output and gradients over the largest exact value, in fp64."""
    wide = [
        leaf.detach().double().requires_grad_() if leaf.requires_grad else leaf for leaf in leaves
    ]
    pairs = zip(step(function, leaves, d_out), step(exact, wide, d_out), strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def check_and_time(
    benchmark, function: Function, exact: Function, leaves: list[Tensor], least: int, limit: float
) -> None:
    """Refuse a result that is wrong by more than limit, then time it; least: bytes that must move.

    extra_info: GB/s of the least bytes, error, peak MB on a GPU, versions.
    """
    with torch.no_grad():
        d_out = torch.randn_like(exact(*leaves))
    off = error(function, exact, leaves, d_out)
    assert off < limit, f"wrong by {off:.1e}"
    benchmark.pedantic(step, (function, leaves, d_out), warmup_rounds=2, rounds=5)
    if not benchmark.enabled:  # --benchmark-disable: checked, not timed
        return
    benchmark.extra_info |= {
        "GB/s": least / benchmark.stats.stats.min / 1e9,
        "error": off,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
    }
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(function, leaves, d_out)
        benchmark.extra_info["peak MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
