"""bench/meters/counted.py and torch_ops.py: counts worked out by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench.meters.counted import counted
from clipa_kernels import contrastive_loss

triton = pytest.importorskip("triton")
numpy = pytest.importorskip("numpy")
tl = triton.language
if not triton.knobs.runtime.interpret:
    pytest.skip("counts come from Triton's interpreter, which is off", allow_module_level=True)


@triton.jit
def add_one(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=mask) + 1, mask=mask)


@triton.jit
def add_one_unmasked(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs) + 1)


@triton.jit
def matmul(
    x_ptr, y_ptr, out_ptr, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        in_x = start + tl.arange(0, BLOCK_K)[None, :]
        in_y = start + tl.arange(0, BLOCK_K)[:, None]
        x = tl.load(x_ptr + rows * k + in_x, mask=(rows < m) & (in_x < k), other=0.0)
        y = tl.load(y_ptr + in_y * n + cols, mask=(in_y < k) & (cols < n), other=0.0)
        acc = tl.dot(x, y, acc)
    tl.store(out_ptr + rows * n + cols, acc, mask=(rows < m) & (cols < n))


@triton.jit
def shift(x_ptr, BLOCK: tl.constexpr, DISTANCE: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs + DISTANCE))


@triton.jit
def store_same_place(out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.program_id(0).to(tl.float32))


@triton.jit
def increment_same_place(out_ptr):
    tl.store(out_ptr, tl.load(out_ptr) + 1)


@triton.jit
def store_diagonals(out_ptr):
    tl.store(out_ptr + tl.program_id(0) + tl.program_id(1), 1.0)


@triton.jit
def add_atomically(x_ptr, out_ptr, BLOCK: tl.constexpr, ALSO_STORES: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + offs, tl.load(x_ptr + tl.program_id(0) * BLOCK + offs))
    if ALSO_STORES:
        tl.store(out_ptr + offs, 0.0, mask=offs == tl.program_id(0))


@triton.jit
def swap(out_ptr):
    tl.atomic_cas(out_ptr + tl.program_id(0), 0, 1)


@triton.jit
def copy_words(x_ptr, out_ptr, words, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < words
    word = tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + offs, mask=mask)
    tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + offs, word, mask=mask)


@triton.jit
def copy_bytes(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    byte = tl.load(x_ptr.to(tl.pointer_type(tl.int8)) + offs, mask=mask)
    tl.store(out_ptr.to(tl.pointer_type(tl.int8)) + offs, byte, mask=mask)


@triton.jit
def copy_rows(x_desc, out_desc, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK
    out_desc.store([row, 0], x_desc.load([row, 0]))


def launched(kernel, grid, *arguments, **constexprs):
    with counted() as count:
        kernel[grid](*arguments, **constexprs)
    assert not count.torch_ops, "the interpreter's own operators are not the program's"
    assert len(count.launches) == 1
    return count.launches[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_bytes_of_a_ragged_tail(dtype):
    """100 lanes on of 128."""
    x, out = torch.randn(100, dtype=dtype), torch.zeros(100, dtype=dtype)
    launch = launched(add_one, (4,), x, out, 100, BLOCK=32)
    assert torch.equal(out, x + 1)
    assert (launch.kernel, launch.grid, launch.programs) == ("add_one", (4, 1, 1), 4)
    assert launch.loaded == launch.stored == 100 * dtype.itemsize
    assert launch.unique_loaded == launch.unique_stored == 100 * dtype.itemsize
    assert launch.requested == launch.unique == 200 * dtype.itemsize
    # Tails of 4 lanes: half a sector of fp32, a quarter of one of fp16.
    assert launch.sectors == 2 * (3 * 32 * dtype.itemsize + 32)


def test_sectors_of_rows_in_mid_sector():
    """44 floats from the fifth on end five sectors after the one they begin in."""
    memory, out = torch.randn(64), torch.zeros(64)
    assert memory.data_ptr() % 32 == out.data_ptr() % 32 == 0
    launch = launched(add_one, (1,), memory[4:], out, 44, BLOCK=64)
    assert (launch.requested, launch.sectors) == (2 * 44 * 4, 6 * 32 + 6 * 32)
    assert (launch.flops, launch.hazards, launch.out_of_bounds, launch.atomics) == (0, 0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dot_with_padding(dtype):
    """70 x 48 times 48 x 40 in tiles 64 x 16 x 32: 2 x 3 programs, each 2 products."""
    m, n, k = 70, 40, 48
    x, y, out = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.zeros(m, n)
    launch = launched(matmul, (2, 3), x, y, out, m, n, k, BLOCK_M=64, BLOCK_N=16, BLOCK_K=32)
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-3, atol=1e-3)
    assert launch.flops == 6 * 2 * 2 * 64 * 16 * 32
    # Each column of programs reads all of x, each row of programs all of y.
    assert launch.loaded == (3 * m * k + 2 * k * n) * dtype.itemsize
    assert launch.unique_loaded == (m * k + k * n) * dtype.itemsize
    assert launch.stored == launch.unique_stored == m * n * 4
    assert (launch.programs, launch.hazards, launch.out_of_bounds) == (6, 0, 0)


def test_stored_by_two_programs():
    out = torch.zeros(64)
    launch = launched(store_same_place, (3,), out, BLOCK=32)
    assert (launch.hazards, launch.stored, launch.unique_stored) == (32 * 4, 3 * 32 * 4, 32 * 4)
    assert launch.where == {"out_ptr stored twice, bytes": 32 * 4}
    assert launched(store_same_place, (1,), out, BLOCK=32).hazards == 0
    assert launched(store_diagonals, (2, 2), out).hazards == 4, "programs (0, 1) and (1, 0)"


def test_stored_by_one_program_and_loaded_by_another():
    """x[i] = x[i + 8] in 4 programs of 32: each reads 8 floats that the next one stores."""
    launch = launched(shift, (4,), torch.zeros(136), BLOCK=32, DISTANCE=8)
    assert launch.hazards == 3 * 8 * 4
    assert launch.where == {"x_ptr store and load, bytes": 96}
    assert launched(shift, (4,), torch.zeros(136), BLOCK=32, DISTANCE=0).hazards == 0
    launch = launched(increment_same_place, (3,), torch.zeros(1))
    assert launch.where == {"out_ptr stored twice, bytes": 4, "out_ptr store and load, bytes": 4}


def test_outside_of_storage_is_counted_and_left_alone():
    """Tensors of 100 floats in buffers of 128: what lies behind is neither read nor written."""
    buffers = [numpy.full(128, 7, numpy.float32) for _ in "ab"]
    short = [torch.frombuffer(buffer, dtype=torch.float32, count=100) for buffer in buffers]
    whole = torch.zeros(128)
    launch = launched(add_one_unmasked, (4,), short[0], short[1], BLOCK=32)
    assert launch.out_of_bounds == 2 * 28
    assert launch.loaded == launch.stored == 512, "requested all the same"
    assert launch.unique_loaded == launch.unique_stored == 400
    assert buffers[1].tolist() == [8.0] * 100 + [7.0] * 28
    launch = launched(add_one_unmasked, (4,), short[0], whole, BLOCK=32)
    assert whole.tolist() == [8.0] * 100 + [1.0] * 28
    assert launch.where == {"load outside every tensor, lanes": 28}


def test_outside_of_the_views_but_in_storage():
    """28 lanes at the end of one allocation; the hull of two views covers what is between them."""
    whole, out = torch.zeros(128), torch.zeros(128)
    launch = launched(add_one_unmasked, (4,), whole[:100], out, BLOCK=32)
    assert launch.out_of_bounds == 28
    assert launch.where == {"x_ptr load beyond the view, lanes": 28}
    launch = launched(add_one_unmasked, (3,), whole[4:100], whole[:4], BLOCK=32)
    assert launch.out_of_bounds == 0


def test_atomics():
    x, out = torch.ones(4, 32), torch.zeros(32)
    launch = launched(add_atomically, (4,), x, out, BLOCK=32, ALSO_STORES=False)
    assert torch.equal(out, torch.full((32,), 4.0))
    assert (launch.atomics, launch.unique_atomics, launch.hazards) == (4 * 128, 128, 0)
    assert launch.requested == 4 * 128 + 2 * 4 * 128
    assert launch.unique == 4 * 128 + 2 * 128
    launch = launched(add_atomically, (4,), x, out, BLOCK=32, ALSO_STORES=True)
    assert launch.hazards == 4 * 4, "the floats that one program stores and others add to"
    out = torch.zeros(4, dtype=torch.int32)
    launch = launched(swap, (4,), out)
    assert (launch.atomics, launch.unique_atomics) == (16, 16)
    assert out.tolist() == [1] * 4
    with pytest.raises(Exception, match="atomic_cas must stay inside its tensors"):
        launched(swap, (5,), out)


def test_casts_of_pointers():
    """An access wider or narrower than the elements of the tensor."""
    x, out = torch.arange(100, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)
    for kernel, count in ((copy_words, 25), (copy_bytes, 100)):
        launch = launched(kernel, (4,), x, out, count, BLOCK=32)
        assert torch.equal(x, out)
        assert launch.loaded == launch.unique_loaded == launch.unique_stored == 100
        assert launch.hazards == 0
    x, out = torch.randn(25), torch.zeros(25)
    launch = launched(copy_bytes, (4,), x, out, 100, BLOCK=32)
    assert torch.equal(x, out)
    assert (launch.loaded, launch.unique_loaded, launch.hazards) == (100, 100, 0)


def test_descriptors():
    """40 rows in tiles of 16: the last tile's 8 rows outside are off, and no access."""
    descriptor = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor
    x, out = torch.randn(40, 16), torch.zeros(40, 16)
    pair = [descriptor.from_tensor(tensor, [16, 16]) for tensor in (x, out)]
    launch = launched(copy_rows, (3,), *pair, BLOCK=16)
    assert torch.equal(x, out)
    assert launch.loaded == launch.stored == launch.unique_stored == 40 * 16 * 4
    assert launch.out_of_bounds == 0


def eager(function, *inputs):
    with counted() as count:
        function(*inputs)
    return count


def bytes_of(count):
    return {op.name: (op.launches, op.read, op.written) for op in count.torch_ops}


def test_eager_add():
    count = eager(torch.add, torch.ones(1000), torch.ones(1000))
    assert bytes_of(count) == {"add": (1, 8000, 4000)}
    total = count.total()
    assert (total.launches, total.requested, total.unique, total.flops) == (1, 12000, 12000, 0)


M, N, K = 5, 6, 7
X, Y, Z = torch.ones(M, K), torch.ones(K, N), torch.ones(M, N)
READ = 4 * (M * K + K * N)
OUT = 4 * M * N


@pytest.mark.parametrize(
    "name,function,read",
    [
        ("mm", lambda: torch.mm(X, Y), READ),
        ("mm", lambda: torch.mm(X, Y, out=Z.clone()), READ),
        ("mm", lambda: X.half() @ Y.half(), READ // 2),
        ("addmm", lambda: torch.addmm(Z, X, Y), READ + OUT),
        ("addmm", lambda: torch.addmm(Z, X, Y, beta=0), READ),
        ("addmm_", lambda: Z.clone().addmm_(X, Y), READ + OUT),
        ("bmm", lambda: torch.bmm(X[None], Y[None]), READ),
        ("baddbmm", lambda: torch.baddbmm(Z[None], X[None], Y[None]), READ + OUT),
        ("addmm", lambda: F.linear(X, Y.t(), torch.ones(N)), READ + 4 * N),
        ("mm", lambda: F.linear(X, Y.t()), READ),
    ],
)
def test_eager_products(name, function, read):
    op = {op.name: op for op in eager(function).torch_ops}[name]
    written = OUT if function().dtype == torch.float32 else OUT // 2
    assert (op.calls, op.read, op.written, op.flops) == (1, read, written, 2 * M * N * K)


def test_eager_products_with_out_dtype(fake_products):
    """Fake CUDA tensors: the CPU has no product of fp16 into fp32."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), counted() as count:
        x, y = (torch.empty(size, dtype=torch.float16, device="cuda") for size in ((M, K), (K, N)))
        torch.mm(x, y, out_dtype=torch.float32)
        torch.addmm(x.new_empty(M, N).float(), x, y, out_dtype=torch.float32)
    for op in count.torch_ops:
        if op.name in ("mm", "addmm"):
            assert (op.flops, op.written) == (2 * M * N * K, OUT)
    assert {"mm", "addmm"} <= {op.name for op in count.torch_ops}


TRAFFIC = {
    "views": (lambda x: x.t()[1:].unsqueeze(0).detach().unbind(), {}),
    "empty": (lambda x: (torch.empty(9), torch.empty_like(x), x.is_contiguous()), {}),
    "item": (lambda x: x[0, 0].item(), {}),
    "zero_": (lambda x: x.zero_(), {"zero_": (1, 0, 128)}),
    "zeros_like": (lambda x: torch.zeros_like(x), {"zeros_like": (1, 0, 128)}),
    "copy_": (lambda x: x.copy_(x.sin()), {"sin": (1, 128, 128), "copy_": (1, 128, 128)}),
    "mul_": (lambda x: x.mul_(2), {"mul_": (1, 128, 128)}),
    "twice": (lambda x: x * x, {"mul": (1, 128, 128)}),
    "out": (lambda x: torch.exp(x, out=torch.empty(8, 4)), {"exp": (1, 128, 128)}),
    "broadcast": (
        lambda x: x + x[:, :1].clone().expand(8, 4),
        {"clone": (1, 32, 32), "add": (1, 160, 128)},
    ),
    "cast": (lambda x: x.to(torch.float64), {"_to_copy": (1, 128, 256)}),
    "no cast": (lambda x: x.to(torch.float32).contiguous(), {}),
    "pick": (lambda x: x[LAST], {"index": (1, 16 + 32, 32)}),
    "scatter": (
        lambda x: x.index_put_((LAST,), ROWS),
        {"index_put_": (1, 16 + 32, 32)},
    ),
    "copy of rows": (
        lambda x: x.index_copy_(0, LAST, ROWS),
        {"index_copy_": (1, 16 + 32, 32)},
    ),
    "scatter add": (
        lambda x: x.index_put_((LAST,), ROWS, accumulate=True),
        {"index_put_": (1, 16 + 32 + 32, 32)},
    ),
    "list": (
        lambda x: torch._foreach_mul_([x, x[:4].clone()], 2),
        {"clone": (1, 64, 64), "_foreach_mul_": (1, 192, 192)},
    ),
}
LAST, ROWS = torch.tensor([6, 7]), torch.ones(2, 4)


@pytest.mark.parametrize("case", TRAFFIC)
def test_eager_traffic(case):
    """x [8, 4] fp32, 128 bytes: (launches, read, written) of each operator."""
    function, expected = TRAFFIC[case]
    assert bytes_of(eager(function, torch.ones(8, 4))) == expected


def test_eager_backward_is_seen():
    """y = x w: forward one product, backward two."""
    x, w = torch.ones(M, K, requires_grad=True), torch.ones(K, N, requires_grad=True)
    count = eager(lambda: (x @ w).backward(torch.ones(M, N)))
    assert count.total().flops == 3 * 2 * M * N * K
    x.grad = None
    assert eager(lambda: None).total().launches == 0, "nothing is seen without a call"


def test_memory():
    """Storages made inside: 4 kB each, two alive at once, three in all; views are none."""

    def work(x):
        y = x + 1
        y = y.view(10, 100).t() + 1
        y.mul_(2)
        del y
        return x + 1

    count = eager(work, torch.ones(1000))
    assert (count.new_bytes, count.peak_bytes) == (12000, 8000)


def test_custom_operators_are_looked_into():
    """A clipa:: operator is the operators that its body runs, and no operator itself."""
    image, text = (torch.randn(12, 8, requires_grad=True) for _ in "ab")
    scale = torch.tensor(3.0)
    count = eager(lambda: contrastive_loss(image, text, scale).backward())
    names = {op.name for op in count.torch_ops}
    assert "mm" in names and not any("contrastive" in name for name in names)
    assert count.total().flops == 4 * 2 * 12 * 12 * 8  # logits twice, and two gradients


@torch.library.custom_op("clipa_test::add_one", mutates_args=())
def add_one_op(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    add_one[(1,)](x, out, x.numel(), BLOCK=32)
    return out


@torch.library.custom_op("clipa_test::linear", mutates_args=())
def linear_op(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x.to(weight.dtype), weight)


def test_composite_operators_inside_are_their_parts():
    """Below autograd, F.linear and to() reach the counter whole."""
    count = eager(linear_op, X.half(), Y.t())
    assert set(bytes_of(count)) == {"_to_copy", "mm"}
    assert count.total().flops == 2 * M * N * K


def test_launch_and_eager_together():
    """A kernel inside a custom operator is a launch; the operator adds nothing of its own."""
    x = torch.zeros(20)
    with counted() as count:
        y = add_one_op(x) * 2
    assert torch.equal(y, torch.full((20,), 2.0))
    assert bytes_of(count) == {"mul": (1, 80, 80)}
    total = count.total()
    assert (total.launches, total.requested, total.unique) == (2, 320, 320)
    lines = count.table().splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["add_one", "1"],
        ["aten::mul", "1"],
        ["total", "2"],
    ]


def test_blocks_do_not_nest_and_leave_nothing():
    with counted(), pytest.raises(RuntimeError, match="counted: one block at a time"), counted():
        pass
    with counted() as count:
        pass
    x = torch.zeros(32)
    add_one[(1,)](x, x, 32, BLOCK=32)
    assert not count.launches and x.eq(1).all()


def test_needs_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-c", "from bench.meters.counted import counted\nwith counted(): pass"],
        cwd=Path(__file__).parents[1],
        env={name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "counted: TRITON_INTERPRET must be 1" in run.stderr
