"""What the glue of a block asks of a GPU, counted without one: bytes, launches, machine code."""

import pytest
import torch
from machine_code import check_rows, machine_code, spills_nothing

from bench.counted import counted
from clipa_kernels import add_layer_norm, bias_gelu
from models import transformer
from models.transformer import Block

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of empty lanes
LENGTH, WIDTH, HEADS = 37, 1280, 16  # ViT-H/14 with three quarters of 144 patches dropped


def clean(launches):
    for launch in launches:
        assert (launch.hazards, launch.out_of_bounds, launch.atomics) == (0, 0, 0), launch


def passes(function, leaves):
    """(forward, backward) as counted, every output with a gradient."""
    with counted() as forward:
        outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [torch.ones_like(output) for output in outputs]
    with counted() as backward:
        torch.autograd.grad(outputs, leaves, gradients)
    for count in (forward, backward):
        clean(count.launches)
        assert count.torch_ops == []
    return forward, backward


@pytest.mark.parametrize(("stream", "rows_of_bytes"), [(2, 8), (4, 12)], ids=["fp16", "fp32"])
def test_layer_norm_moves_each_row_once(stream, rows_of_bytes):
    """Forward x, residual, sum and norm; backward the same four, or five where dtypes differ."""
    tokens, dtype = 8 * LENGTH, {2: torch.float16, 4: torch.float32}[stream]
    x, residual = torch.randn(tokens, WIDTH).half(), torch.randn(tokens, WIDTH).to(dtype)
    leaves = [t.requires_grad_() for t in (x, residual, torch.ones(WIDTH), torch.zeros(WIDTH))]
    forward, backward = passes(lambda *v: add_layer_norm(*v, impl="triton"), leaves)
    assert forward.total().launches == 1 and backward.total().launches == 2
    unit = tokens * WIDTH
    assert forward.total().unique <= (rows_of_bytes + 0.1) * unit
    # Partial sums, written and read: 16 bytes a column for every 16 rows.
    assert backward.total().unique <= ((8 if stream == 2 else 16) + 1.1) * unit
    assert backward.total().requested <= ((8 if stream == 2 else 16) + 1.4) * unit


@pytest.mark.parametrize("form", ["none", "tanh", "quick"])
def test_gelu_moves_each_number_once(form):
    tokens, width = 4 * LENGTH, 4 * WIDTH
    x, bias = torch.randn(tokens, width).half(), torch.randn(width)
    leaves = [t.requires_grad_() for t in (x, bias)]
    forward, backward = passes(lambda *v: bias_gelu(*v, form, impl="triton"), leaves)
    assert forward.total().launches == 1 and backward.total().launches == 2
    unit = tokens * width
    assert forward.total().unique <= 4.1 * unit and forward.total().requested <= 4.6 * unit
    assert backward.total().unique <= 6.3 * unit and backward.total().requested <= 6.3 * unit


class _NoAttention(torch.autograd.Function):
    """In place of attention, whose bytes are its own tests' business: it touches nothing."""

    @staticmethod
    def forward(ctx, qkv):
        ctx.shape = qkv.shape
        return qkv.new_empty(qkv.shape[0], *qkv.shape[2:])

    @staticmethod
    def backward(ctx, d_out):
        return d_out.new_empty(ctx.shape)


def block_count(monkeypatch, stream, tokens=4 * LENGTH):
    """A ViT-H/14 block in bf16, forward and backward; attention left out."""
    torch.use_deterministic_algorithms(False)  # or filling memory with NaN would count
    monkeypatch.setattr(
        transformer, "varlen_attention_qkvpacked", lambda qkv, *_, **__: _NoAttention.apply(qkv)
    )
    block = Block(WIDTH, HEADS, 4.0, causal=False, gelu="none", eps=1e-5, impl="triton")
    block.bfloat16()
    x = torch.randn(tokens, WIDTH).bfloat16().requires_grad_()
    residual = torch.randn(tokens, WIDTH).to(stream).requires_grad_()
    cu_seqlens = torch.arange(0, tokens + 1, LENGTH, dtype=torch.int32)
    gradients = torch.randn(tokens, WIDTH).bfloat16(), torch.randn(tokens, WIDTH).to(stream)
    leaves = [x, residual, *block.parameters()]
    with counted() as count:
        torch.autograd.grad(block(x, residual, cu_seqlens, LENGTH), leaves, gradients)
    return count, tokens


PRODUCTS = ("mm", "addmm")


@pytest.mark.parametrize(("stream", "most"), [("bfloat16", 90), ("float32", 115)])
def test_glue_of_a_whole_block(monkeypatch, stream, most):
    """Bytes a token beyond products and attention, in units of the width, and every launch."""
    count, tokens = block_count(monkeypatch, getattr(torch, stream))
    clean(count.launches)
    glue = sum(launch.unique for launch in count.launches)
    others = [op for op in count.torch_ops if op.name not in PRODUCTS]
    glue += sum(op.read + op.written for op in others)
    print(f"{glue / tokens / WIDTH:.1f} D bytes a token", count.table(), sep="\n")
    assert glue <= most * tokens * WIDTH
    assert [launch.kernel for launch in count.launches] == [
        "_add_layer_norm_fwd_kernel",
        "_add_layer_norm_fwd_kernel",
        "_bias_gelu_fwd_kernel",
        "_bias_gelu_bwd_kernel",
        "_sum_partial_kernel",
        "_add_layer_norm_bwd_kernel",
        "_sum_partial_kernel",
        "_add_layer_norm_bwd_kernel",
        "_sum_partial_kernel",
    ]
    # Of eager torch the sums for the three biases that products add, and nothing else.
    assert {op.name: op.calls for op in others} == {"sum": 3}


def test_machine_code_of_every_row():
    """Each rung and variant for three architectures: nothing spills, loads are whole vectors."""
    rows = machine_code("layer_norm", "gelu")
    check_rows(rows, spills_nothing)
    whole = [row for row in rows if "bf16" in row.label and "D=100" not in row.label]
    for name in ("load_widths", "store_widths"):
        check_rows(whole, lambda row, name=name: set(getattr(row, name)) <= {8, 16})
        check_rows(whole, lambda row, name=name: 16 in getattr(row, name))
