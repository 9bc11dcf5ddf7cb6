"""What a transformer block asks of the host: Python, checks and launchers, and no GPU's work.

    python -m bench.bench_host            microseconds of a block, forward and backward

Kernels are launched as on a GPU, but Triton's run does nothing; tensors are so small that the
products, which a CPU does here, are told apart by a block of them alone. Triton's own time for a
launch is left out. As in training, gradients are dropped after each step. Best of many rounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F

from bench.meters.launches import idle
from clipa_kernels import check, launch
from models.transformer import Block

WIDTH, TOKENS = 64, 8


@contextmanager
def unlaunched() -> Iterator[None]:
    """CPU tensors take a GPU's way, whose values no check reads; kernels do not run."""
    # A tensor of CUDA runs kernels, and its values are read by no check: neither asks for more.
    with (
        idle(90),
        patch.object(check, "readable", lambda tensor: False),
        patch.object(launch, "runs_on", lambda device: True),
    ):
        yield


def step(function: Callable, weights: list, inputs: tuple[torch.Tensor, ...]) -> None:
    """Forward and backward of all outputs; the gradients are dropped."""
    outs = function(*(each.detach().requires_grad_() for each in inputs))
    torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    for weight in weights:
        weight.grad = None


def block() -> tuple[Callable, list]:
    """A block of the library, with its kernels, and its weights."""
    made = Block(WIDTH, 1, 4.0, causal=False, gelu="none", eps=1e-5, impl="triton").train()
    ends = torch.tensor([0, 4, TOKENS], dtype=torch.int32)
    return lambda x, residual: made(x, residual, ends, 4), [*made.parameters()]


def products() -> tuple[Callable, list]:
    """The four products of a block alone."""
    sizes = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))
    qkv, out, up, down = (torch.nn.Linear(*size) for size in sizes)

    def run(x, residual):
        hidden = F.linear(out(qkv(x)[:, :WIDTH]), up.weight)
        return down(hidden), residual

    return run, [weight for each in (qkv, out, up, down) for weight in each.parameters()]


def best(function: Callable, weights: list, rounds: int, calls: int = 20) -> float:
    """Microseconds of a step, in the best of some rounds."""
    inputs, times = (torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)), []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            step(function, weights, inputs)
        times.append((time.perf_counter() - began) / calls)
    return 1e6 * min(times)


def main(rounds: int = 100) -> None:
    """A block and its products alone, in turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with unlaunched():
            whole, alone = best(*block(), rounds), best(*products(), rounds)
    finally:
        torch.set_num_threads(threads)
    print(f"a block {whole:.0f} us, of which products {alone:.0f} us, {whole - alone:.0f} us ours")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
