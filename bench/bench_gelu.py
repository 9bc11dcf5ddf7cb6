"""Bias and GELU, forward and backward: ours, torch eager and compiled.

    pytest bench/bench_gelu.py                   37 tokens an image, hidden widths of B, L, H, bigG

GB/s is of 5 numbers an element, the least that forward and backward move: x and y; dy, x and dx.
"""

import pytest
import torch
import torch.nn.functional as F

from bench.measure import DEVICE, DTYPES, check_and_time, clock
from clipa_kernels import bias_gelu

WIDTHS = {"B": 3072, "L": 4096, "H": 5120, "bigG": 8192}
TOKENS = 37 * (4096 if DEVICE == "cuda" else 64)
RIVALS = ("ours", "torch", "eager", "compiled")
pytestmark = pytest.mark.benchmark(timer=clock)


def eager(form):
    def function(x, bias):
        z = x + bias
        return z * torch.sigmoid(1.702 * z) if form == "quick" else F.gelu(z, approximate=form)

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("form", ["none", "tanh", "quick"])
@pytest.mark.parametrize("name", RIVALS)
def test_bias_gelu(benchmark, name, form, size, dtype):
    width, function = WIDTHS[size], eager(form)
    if name == "compiled":
        function = torch.compile(function)
    if name in ("ours", "torch"):
        impl = "auto" if name == "ours" else name
        function = lambda x, bias: bias_gelu(x, bias, form, impl=impl)  # noqa: E731
    torch.manual_seed(0)
    leaves = [torch.randn(TOKENS, width), torch.randn(width)]
    leaves = [t.to(DEVICE, DTYPES[dtype]).requires_grad_() for t in leaves]
    benchmark.group = f"{form} D={width} {TOKENS} tokens {dtype} {DEVICE}"
    least = 5 * TOKENS * width * DTYPES[dtype].itemsize
    check_and_time(
        benchmark, function, eager(form), leaves, least, 1e-4 if dtype == "fp32" else 0.05
    )
