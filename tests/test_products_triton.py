"""What differs between versions of torch and Triton, and torch's switches for fp32 products.

As a program it prints the precision of the products that each op launches; the switches are
global, so this takes a process of its own.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from clipa_kernels import (
    add_layer_norm,
    add_layer_norm_reference,
    bias_gelu,
    bias_gelu_reference,
    contrastive_loss,
    sigmoid_loss,
    varlen_attention,
    varlen_attention_qkvpacked,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of empty lanes
ROOT = Path(__file__).parents[1]
# What allows TF32 in fp32 products on CUDA, and what does not; each follows the one before.
SWITCHES = {
    "pass": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.set_float32_matmul_precision('highest')": "ieee",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
    "torch.backends.fp32_precision = 'tf32'": "ieee",
    "torch.backends.cuda.matmul.fp32_precision = 'none'": "tf32",  # then the general one holds
}


def attention(dtype, impl, lengths=(5, 3)):
    q, k, v = (torch.randn(sum(lengths), 1, 16, dtype=dtype, requires_grad=True) for _ in "qkv")
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return varlen_attention(q, k, v, ends, max(lengths), impl=impl)


def long_attention(dtype, impl):
    return attention(dtype, impl, (130,))


def packed_attention(dtype, impl):
    qkv = torch.randn(8, 3, 1, 16, dtype=dtype, requires_grad=True)
    return varlen_attention_qkvpacked(qkv, torch.tensor([0, 8], dtype=torch.int32), 8, impl=impl)


def loss(dtype, impl, function=contrastive_loss):
    image, text = (torch.randn(6, 32, dtype=dtype, requires_grad=True) for _ in "ab")
    return function(image, text, torch.tensor(2.0), impl=impl)


def pairwise_loss(dtype, impl):
    return loss(dtype, impl, sigmoid_loss)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRODUCTS = (attention, long_attention, packed_attention, loss, pairwise_loss)


@pytest.mark.parametrize("op", PRODUCTS, ids=lambda op: op.__name__)
def test_wrong_products_of_bfloat16_are_refused(op, triton):
    """Triton's interpreter multiplies bit patterns; compiled or not, none of it comes back."""
    says = r'impl "triton" takes float32 or float16 under Triton\'s interpreter, .* got bfloat16'
    with pytest.raises(TypeError, match=says):
        op(torch.bfloat16, "triton")
    op(torch.bfloat16, "torch"), op(torch.float16, "triton")


def test_under_autocast_the_dtype_of_the_product_counts(triton):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="^contrastive"):
        loss(torch.float32, "triton")


def test_compiled_products_are_refused_too(triton):
    compiled = torch.compile(packed_attention, backend="eager")
    with pytest.raises(TypeError, match="^varlen_attention_qkvpacked: "):
        compiled(torch.bfloat16, "triton")


def test_ops_without_a_product_take_bfloat16(triton):
    from tolerance import check_op

    torch.manual_seed(0)
    x, residual, bias = torch.randn(9, 40), torch.randn(9, 40), torch.randn(40)
    norm = dict(x=x, residual=residual, weight=torch.rand(40) + 0.5, bias=bias)

    def our_norm(**tensors):
        return add_layer_norm(**tensors, impl="triton")

    check_op(our_norm, add_layer_norm_reference, norm, torch.bfloat16)
    for form in ("none", "tanh", "quick"):
        check_op(
            lambda form=form, **tensors: bias_gelu(**tensors, approximate=form, impl="triton"),
            lambda form=form, **tensors: bias_gelu_reference(**tensors, approximate=form),
            dict(x=x, bias=bias),
            torch.bfloat16,
        )


@pytest.fixture
def triton():
    return pytest.importorskip("triton")


@pytest.fixture(scope="module")
def switched():
    """What main() found, in a process whose switches are its own."""
    pytest.importorskip("triton")
    env = dict(os.environ, TRITON_INTERPRET="1", PYTHONPATH=f"{ROOT}", OMP_NUM_THREADS="1")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("switch", SWITCHES)
def test_precision_of_products_follows_torchs_switches(switched, switch):
    if switch not in switched["precisions"]:
        pytest.skip(f"torch {torch.__version__} has no such switch")
    assert switched["precisions"][switch] == {"4": SWITCHES[switch], "2": "ieee"}


@pytest.mark.parametrize("op", PRODUCTS, ids=lambda op: op.__name__)
def test_ops_follow_the_newest_switch_in_every_dtype(switched, op):
    """Forward and backward, though torch.get_float32_matmul_precision may raise by then."""
    for dtype in DTYPES:
        expected = ["tf32"] if dtype == torch.float32 else ["ieee"]
        assert switched["launched"][f"{op.__name__} {dtype}"] == expected, dtype


@contextmanager
def recorded():
    """The precision of each product in the block, which goes on as it would have."""
    from triton.runtime.interpreter import interpreter_builder as builder

    from bench.meters.counted import counted

    with counted():  # bfloat16 as well
        made, seen = builder.create_dot, []

        def dot(a, b, acc, precision, *rest):
            seen.append(precision.name.lower())
            return made(a, b, acc, precision, *rest)

        builder.create_dot = dot
        yield seen


def main() -> None:
    from clipa_kernels.launch import input_precision

    has_new = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    precisions, launched = {}, {}
    for switch in SWITCHES:
        if has_new or "fp32_precision" not in switch:
            exec(switch)
            precisions[switch] = {size: input_precision(size) for size in (4, 2)}
    if not has_new:
        torch.set_float32_matmul_precision("high")
    for op in PRODUCTS:
        for dtype in DTYPES:
            with recorded() as seen:
                op(dtype, "triton").float().sum().backward()
            op(dtype, "torch").float().sum().backward()
            launched[f"{op.__name__} {dtype}"] = sorted(set(seen))
    print(json.dumps(dict(precisions=precisions, launched=launched)))


if __name__ == "__main__":
    main()
