"""What the glue of a block asks of a GPU, counted without one: bytes, launches, machine code."""

import functools

import pytest
import torch
from machine_code import check_rows, machine_code, spills_nothing

from bench.meters import whole_block
from bench.meters.counted import counted
from bench.meters.whole_block import LENGTH, WIDTH
from clipa_kernels import add_layer_norm, bias_gelu

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of empty lanes


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


@functools.cache
def block_count(stream, sequences):
    """A ViT-H/14 block in bf16, forward and backward."""
    torch.use_deterministic_algorithms(False)  # or filling memory with NaN would count
    count = whole_block.ours(sequences, stream)
    clean(count.launches)
    return count


PRODUCTS = ("mm", "addmm")
CHECKS = {"ne", "lt", "gt", "sub", "min", "max"}  # of cu_seqlens, on a CPU alone


@pytest.mark.parametrize(("stream", "most"), [("bfloat16", 90), ("float32", 115)])
def test_glue_of_a_whole_block(stream, most):
    """Bytes a token beyond products and attention, in units of the width, and every launch."""
    sequences = 2
    count = block_count(getattr(torch, stream), sequences)
    launches = [launch for launch in count.launches if "attention" not in launch.kernel]
    others = [op for op in count.torch_ops if op.name not in (*PRODUCTS, *CHECKS)]
    glue = sum(launch.unique for launch in launches) + sum(op.read + op.written for op in others)
    assert glue <= most * sequences * LENGTH * WIDTH, count.table()
    assert [launch.kernel for launch in launches] == [
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


@pytest.mark.parametrize(
    ("rival", "most"),
    [(whole_block.open_clip_amp, 0.50), (whole_block.timm_bf16, 0.86)],
    ids=["open_clip", "timm"],
)
def test_bytes_of_a_whole_block_beside_a_rival(rival, most):
    """Products and attention included; see whole_block.py for what is left out of all alike."""
    own = whole_block.bytes_a_token(functools.partial(block_count, torch.bfloat16), 1, 2)
    attention = [op for op in rival(1).torch_ops if "attention" in op.name]
    assert len(attention) == 2 and all("flash" in op.name for op in attention)  # fused, each way
    other = whole_block.bytes_a_token(rival, 2048, 4096)
    assert own <= most * other, f"ours {own:.1f} D, {rival.__name__} {other:.1f} D bytes a token"


def test_machine_code_of_every_launch():
    """Each rung and variant for three architectures: nothing spills, loads are whole vectors."""
    rows = machine_code("layer_norm", "gelu", "launch")
    check_rows(rows, spills_nothing)
    rows = [row for row in rows if row.kernel != "sum_partial"]
    whole = [row for row in rows if "*bf16" in row.types.values() and row.sizes["D"] >= 384]
    for name in ("load_widths", "store_widths"):
        check_rows(whole, lambda row, name=name: set(getattr(row, name)) <= {8, 16})
        check_rows(whole, lambda row, name=name: 16 in getattr(row, name))
