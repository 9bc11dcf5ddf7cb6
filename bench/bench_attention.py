"""Attention of packed sequences, forward and backward: ours, torch's two, and two libraries.

    pytest bench/bench_attention.py              8 to 577 tokens, and captions; heads of S to bigG
    python -m bench.bench_attention 37 80        one length and head size, or: ragged 64, as a table

Each rival first gives the result and gradient of the fp64 reference (error: the largest relative
one of them), then it is timed on the packed product [T, 3, H, D]. GB/s counts 11 T H D numbers, the
least that forward and backward move, and TFLOP/s 7 products of 2 L^2 D a head, for every rival.
"ragged" is captions of 10 tokens on average, 77 at most, causal. Absent rivals are skipped by name.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.measure import BURST, DEVICE, DTYPES, clock, turns
from clipa_kernels import (
    cu_seqlens_of,
    varlen_attention_qkvpacked,
    varlen_attention_reference,
)

pytestmark = pytest.mark.benchmark(timer=clock)
RIVALS = ("ours", "torch", "sdpa", "varlen_attn", "flash_attn", "xformers")
LENGTHS = (8, 16, 17, 32, 37, 50, 64, 65, 197, 257, 577, "ragged")
HEADS = {"S": (6, 64), "B": (12, 64), "L": (16, 64), "H": (16, 80), "g": (16, 88), "G": (16, 104)}
TOKENS = 1 << 18 if DEVICE == "cuda" else 1 << 12
Attention = Callable[[Tensor], Tensor]


def lengths_of(length: int | str) -> list[int]:
    """Sequences of one length, or captions, of about TOKENS tokens together."""
    if length != "ragged":
        return [length] * max(1, TOKENS // length)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.empty(TOKENS // 10).log_normal_(2.2, 0.45, generator=generator)
    return drawn.round().clamp(3, 77).int().tolist()


def rival(name: str, lengths: list[int], dtype: torch.dtype) -> Attention | str:
    """The attention by name over these lengths, or why it cannot run here."""
    if name in ("flash_attn", "xformers") and dtype == torch.float32:
        return f"{name} takes 16 bits only"
    cu_seqlens = cu_seqlens_of(lengths, DEVICE)
    causal = len(set(lengths)) > 1
    longest = 77 if causal else lengths[0]
    impl = "auto" if name == "ours" else name

    def attention(qkv: Tensor) -> Tensor:
        return varlen_attention_qkvpacked(qkv, cu_seqlens, longest, causal=causal, impl=impl)

    try:
        attention(torch.zeros(sum(lengths), 3, 1, 64, dtype=dtype, device=DEVICE))
    except RuntimeError as reason:
        return str(reason)
    return attention


def leaf(lengths: list[int], heads: int, size: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, heads, size, device=DEVICE)
    return qkv.to(dtype).requires_grad_()


def step(attention: Attention, qkv: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward: (result, gradient)."""
    out = attention(qkv)
    (grad,) = torch.autograd.grad(out, qkv, d_out)
    return out.detach(), grad


def error(name: str, length: int | str, size: int, dtype: torch.dtype) -> float:
    """The largest error of result and gradient over the largest exact value, on few sequences."""
    lengths = lengths_of(length)[:16]
    qkv, attention = leaf(lengths, 2, size, dtype), rival(name, lengths, dtype)
    packing = cu_seqlens_of(lengths, DEVICE), max(lengths)
    causal = len(set(lengths)) > 1
    d_out = torch.ones_like(qkv[:, 0])
    exact = step(
        lambda x: varlen_attention_reference(*x.unbind(1), *packing, causal=causal),
        qkv.detach().double().requires_grad_(),
        d_out.double(),
    )
    pairs = zip(step(attention, qkv, d_out), exact, strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def work(lengths: list[int], heads: int, size: int, dtype: torch.dtype) -> tuple[float, float]:
    """(least GB, TFLOP) of forward and backward."""
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    return 11 * tokens * heads * size * dtype.itemsize / 1e9, 14 * squares * heads * size / 1e12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tower", HEADS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", RIVALS)
def test_attention(benchmark, name, length, tower, dtype):
    lengths, (heads, size) = lengths_of(length), HEADS[tower]
    attention = rival(name, lengths, DTYPES[dtype])
    if isinstance(attention, str):
        pytest.skip(attention)
    off = error(name, length, size, DTYPES[dtype])
    assert off < (1e-4 if dtype == "fp32" else 0.05), f"{name} is wrong by {off:.1e}"
    qkv = leaf(lengths, heads, size, DTYPES[dtype])
    benchmark.group = f"L={length} {heads}x{size} {dtype} {DEVICE}"
    inputs = qkv, torch.ones_like(qkv[:, 0])
    each = itertools.cycle(turns(inputs))
    call = lambda: step(attention, *next(each))  # noqa: E731
    benchmark.pedantic(call, warmup_rounds=2, rounds=5, iterations=BURST)
    if not benchmark.enabled:  # --benchmark-disable: checked, not timed
        return
    best, (least, operations) = benchmark.stats.stats.min, work(lengths, heads, size, qkv.dtype)
    benchmark.extra_info |= {
        "GB/s": least / best,
        "TFLOP/s": operations / best,
        "error": off,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(attention, *inputs)
        benchmark.extra_info["peak MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6


def table(length: int | str, size: int, heads: int) -> None:
    """All rivals in turns at one shape: the median of five."""
    lengths = lengths_of(length)
    print(
        f"L={length} {heads}x{size}, {len(lengths)} sequences, {sum(lengths)} tokens on {DEVICE}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    for dtype, torch_dtype in DTYPES.items():
        found = {name: rival(name, lengths, torch_dtype) for name in RIVALS}
        for name in [name for name, attention in found.items() if isinstance(attention, str)]:
            print(f"{dtype} {name:12} skipped: {found.pop(name)}")
        qkv, times = leaf(lengths, heads, size, torch_dtype), {name: [] for name in found}
        each = itertools.cycle(turns((qkv, torch.ones_like(qkv[:, 0]))))
        for _ in range(6):
            for name, attention in found.items():
                start = clock()
                step(attention, *next(each))
                times[name].append(clock() - start)
        least, operations = work(lengths, heads, size, torch_dtype)
        for name in found:
            seconds = statistics.median(times[name][1:])
            row = {
                "ms": round(1e3 * seconds, 3),
                "GB/s": round(least / seconds, 1),
                "TFLOP/s": round(operations / seconds, 3),
                "error": float(f"{error(name, length, size, torch_dtype):.1e}"),
            }
            print(f"{dtype} {name:12} {json.dumps(row)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("length", nargs="?", default="ragged", help='tokens, or "ragged"')
    parser.add_argument("size", type=int, nargs="?", default=64, help="of a head")
    parser.add_argument("--heads", type=int, default=8)
    arguments = parser.parse_args()
    length = arguments.length if arguments.length == "ragged" else int(arguments.length)
    table(length, arguments.size, arguments.heads)


if __name__ == "__main__":
    main()
