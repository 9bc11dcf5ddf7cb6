"""What attention asks of a GPU, counted without one: operations, bytes, launches, machine code."""

import pytest
import torch
from machine_code import OWN_CORES, check_rows, cores, machine_code, spills_nothing

from bench.meters.counted import counted
from clipa_kernels import cu_seqlens_of, varlen_attention, varlen_attention_qkvpacked

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of exp


def kernels(count):
    launches = [launch for launch in count.launches if "kernel" in launch.kernel]
    for launch in launches:
        assert (launch.hazards, launch.out_of_bounds, launch.atomics) == (0, 0, 0), launch
    return launches


def passes(lengths, heads, size, causal=False):
    """(forward, backward) as counted, on the packed product."""
    qkv = torch.randn(sum(lengths), 3, heads, size).half().requires_grad_()
    cu_seqlens = cu_seqlens_of(lengths)
    with counted() as forward:
        out = varlen_attention_qkvpacked(
            qkv, cu_seqlens, max(lengths), causal=causal, impl="triton"
        )
    d_out = torch.randn(out.shape).half()
    with counted() as backward:
        torch.autograd.grad(out, qkv, d_out)
    assert backward.total().launches == 1
    return *kernels(forward), *kernels(backward)


# length, head size: operations issued over useful, and bytes requested over least, of each pass.
TABLE = {
    (8, 64): (2.0, 1.0),
    (17, 64): (4.0, 1.0),
    (37, 80): (3.0, 1.0),
    (50, 64): (2.0, 1.0),
    (65, 80): (4.0, 2.8),
    (197, 64): (2.2, 3.5),
}


@pytest.mark.parametrize(("row", "most"), TABLE.items(), ids=str)
def test_operations_and_bytes(row, most):
    """Useful: 2 products forward, 5 backward. Least bytes: q, k, v, o; q, k, v, dO, dq, dk, dv."""
    (length, size), batch = row, 2
    heads = 16 if length <= 64 else 2  # programs alike; the interpreter takes its time
    forward, backward = passes([length] * batch, heads, size)
    product = 2 * length * length * size * batch * heads
    tensor = 2 * length * batch * heads * size
    assert forward.flops <= most[0] * 2 * product
    assert backward.flops <= most[0] * 5 * product
    assert forward.unique <= 1.01 * 4 * tensor
    assert backward.unique <= 1.01 * 7 * tensor
    assert forward.requested <= 1.001 * most[1] * 4 * tensor
    assert backward.requested <= 1.001 * most[1] * 7 * tensor


@pytest.mark.parametrize("size", [64, 80, 88, 104, 120, 128])
@pytest.mark.parametrize("length", [8, 17, 66])
def test_sectors(length, size):
    """An odd head of 88, 104 or 120 starts in mid-sector, and chunks of its row still do not."""
    for launch in passes([length] * 2, 2, size):
        assert launch.sectors <= 1.1 * launch.requested


@pytest.mark.parametrize("lengths", [[5] * 7, [17, 0, 30, 1], [66, 3, 81]], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_ragged_tiles_stay_inside(lengths, causal):
    """Odd sizes: no access outside a tensor, none that depends on the order of programs."""
    forward, backward = passes(lengths, 1, 24, causal)
    tensor, looked_up = 2 * sum(lengths) * 24, 4 * (len(lengths) + 1)
    assert forward.unique <= 4 * tensor + looked_up
    assert backward.unique <= 7 * tensor + looked_up


def test_separate_tensors_are_not_copied():
    q, k, v = (torch.randn(40, 2, 16).half().requires_grad_() for _ in "qkv")
    out = varlen_attention(q, k, v, cu_seqlens_of([20, 20]), 20, impl="triton")
    d_out = torch.randn(out.shape).half()
    with counted() as backward:
        torch.autograd.grad(out, (q, k, v), d_out)
    assert backward.total().launches == len(kernels(backward)) == 1
    assert backward.new_bytes == 3 * q.nbytes


def test_new_memory_is_the_result():
    """No scratch, no padding: the output forward, the packed gradient backward."""
    qkv = torch.randn(101, 3, 2, 16).half().requires_grad_()
    op = torch.ops.clipa.varlen_attention_qkvpacked
    cu_seqlens = cu_seqlens_of([20, 0, 81])
    with counted() as forward:
        out = op(qkv, cu_seqlens, 81, False, 0.25, True)
    d_out = torch.randn(out.shape).half()
    with counted() as backward:
        torch.autograd.grad(out, qkv, d_out)
    assert forward.new_bytes == out.nbytes and forward.total().launches == 1
    assert backward.new_bytes == qkv.nbytes and backward.total().launches == 1


def enough(row):
    """Blocks on an SM that the short path needs to hide the latency of memory."""
    wide = row.types["q_ptr"] != "*fp32" and row.label.split()[1].endswith("x128")
    backward, forward = {80: 2 if wide else 3, 90: 4, 100: 3}, {80: 4, 90: 4, 100: 4}
    least = backward if "bwd" in row.kernel else forward
    return row.blocks_per_sm >= least[row.arch]


def test_machine_code_of_every_launch():
    """Every rung and variant for three architectures: nothing spills, all fits, tensor cores."""
    rows = machine_code("attention")
    check_rows(rows, spills_nothing)
    check_rows([row for row in rows if row.kernel.startswith("attention_short")], enough)
    half = [row for row in rows if row.types["q_ptr"] != "*fp32"]
    tiles = [row for row in half if row.sizes["max_seqlen"] > 32]  # of 64 rows
    check_rows(tiles, lambda row: OWN_CORES[row.arch] in cores(row))
