"""What the benches of one operation share: a result is checked, then timed.

On CUDA times are those of its events around bursts of calls, so that the host's way to a launch is
hidden where the device has work, and calls take turns among copies of their inputs whose bytes are
twice the L2 cache's: none finds its inputs there. On a CPU they are the clock's, call by call.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BURST = 10 if DEVICE == "cuda" else 1  # calls between two looks at the clock
MOST_COPIES = 64
Function = Callable[..., Any]


def clock() -> float:
    """Seconds, as pytest-benchmark's timer: on CUDA those at which the work queued so far is done,
    by an event, from the first call on."""
    if DEVICE != "cuda":
        return time.perf_counter()
    global _first
    now = torch.cuda.Event(enable_timing=True)
    now.record()
    now.synchronize()
    _first = _first or now
    return _first.elapsed_time(now) / 1e3


_first: torch.cuda.Event | None = None


def turns(inputs: Any, device: str | torch.device = DEVICE) -> list[Any]:
    """The inputs, tensors in any nest, and as many copies as it takes to fill the L2 twice."""
    if torch.device(device).type != "cuda":
        return [inputs]
    storages = [leaf.untyped_storage() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    size = sum({storage._cdata: storage.nbytes() for storage in storages}.values())
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(MOST_COPIES, -(-2 * cache // max(size, 1)))
    return [inputs, *(copied(inputs) for _ in range(count - 1))]


def copied(inputs: Any) -> Any:
    """The same with storages of their own; views of one storage stay views of one."""
    storages: dict[int, torch.UntypedStorage] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        storage = leaf.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = storage.clone()
        new = storages[storage._cdata]
        view = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
        view.set_(new, leaf.storage_offset(), leaf.shape, leaf.stride())
        return view.requires_grad_(leaf.requires_grad)

    return tree_map(copy, inputs)


def seconds(
    function: Function,
    inputs: Sequence[Any],
    *,
    rounds: int = 5 if DEVICE == "cuda" else 1,
    least: float = 0.01,
    graph: bool = False,
) -> float:
    """The median time of function(*inputs), in bursts that last about `least` seconds on CUDA.

    graph: a burst is a CUDA graph, so that the host has no part in it.
    """
    device = next((leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
    copies = turns(tuple(inputs), device or DEVICE)
    each = itertools.cycle(copies)

    def burst(calls: int) -> None:
        for _ in range(calls):
            function(*next(each))

    def timed(calls: int, run: Callable[[], None]) -> float:
        start = clock()
        run()
        return (clock() - start) / calls

    burst(1)  # which compiles
    once = timed(1, lambda: burst(1))
    calls = min(100, max(1, int(least / max(once, 1e-6)))) if DEVICE == "cuda" else 1
    run = lambda: burst(calls)  # noqa: E731
    if graph and DEVICE == "cuda":
        calls = max(calls, len(copies))
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            burst(calls)
        run = recorded.replay
        run()
    return statistics.median(timed(calls, run) for _ in range(rounds))


def allowed(exact: Tensor, baseline: Tensor) -> float:
    """The largest error of a result in baseline's dtype: 2 (baseline's own + eps max|exact|)."""
    own = (baseline.double() - exact.double()).abs().max().item()
    return 2 * (own + torch.finfo(baseline.dtype).eps * exact.double().abs().max().item())


def step(function: Function, leaves: list[Tensor], d_out: Any) -> list[Tensor]:
    """Forward and backward: the outputs and the leaves' gradients. d_out: as function's result."""
    out = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(tree_leaves(out), wanted, tree_leaves(d_out))
    return [*(each.detach() for each in tree_leaves(out)), *grads]


def error(function: Function, exact: Function, leaves: list[Tensor], d_out: Any) -> float:
    """The largest error of output and gradients over the largest exact value, in fp64."""
    wide = [
        leaf.detach().double().requires_grad_() if leaf.requires_grad else leaf for leaf in leaves
    ]
    d_wide = tree_map(Tensor.double, d_out)
    pairs = zip(step(function, leaves, d_out), step(exact, wide, d_wide), strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def check_and_time(
    benchmark, function: Function, exact: Function, leaves: list[Tensor], least: int, limit: float
) -> None:
    """Refuse a result that is wrong by more than limit, then time it; least: bytes that must move.

    extra_info: GB/s of the least bytes, error, peak MB on a GPU, versions.
    """
    with torch.no_grad():
        d_out = tree_map(torch.randn_like, exact(*leaves))
    off = error(function, exact, leaves, d_out)
    assert off < limit, f"wrong by {off:.1e}"
    each = itertools.cycle(turns((leaves, d_out)))
    benchmark.pedantic(
        lambda: step(function, *next(each)), warmup_rounds=2, rounds=5, iterations=BURST
    )
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
