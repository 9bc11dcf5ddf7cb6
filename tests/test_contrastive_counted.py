"""What the losses ask of a GPU, counted without one: operations, bytes, launches, machine code."""

import pytest
import torch
import torch.nn.functional as F
from machine_code import OWN_CORES, check_rows, cores, machine_code, spills_nothing

from bench.meters.counted import counted
from clipa_kernels import contrastive_loss, sigmoid_loss

grads = pytest.importorskip("clipa_kernels.contrastive.kernels_grads")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of exp2 and log2
LOSSES = {"contrastive": contrastive_loss, "sigmoid": sigmoid_loss}


def leaves(n, width, dtype=torch.float16):
    features = [F.normalize(torch.randn(n, width), dim=-1).to(dtype) for _ in "ab"]
    scalars = torch.tensor(14.3), torch.tensor(-3.0)
    return [value.requires_grad_() for value in (*features, *scalars)]


def passes(loss, inputs):
    """(forward, backward) as counted."""
    with counted() as forward:
        value = loss(*inputs, impl="triton")
    one, wanted = torch.ones(()), [leaf for leaf in inputs if leaf.requires_grad]
    with counted() as backward:
        torch.autograd.grad(value, wanted, one)
    return forward, backward


def kernels(count):
    return [launch for launch in count.launches if "kernel" in launch.kernel]


@pytest.mark.parametrize(
    ("n", "width", "most"), [(1024, 512, 7.8), (512, 1024, 3.7)], ids=["1024x512", "512x1024"]
)
def test_operations_and_bytes(n, width, most):
    forward, backward = passes(contrastive_loss, leaves(n, width)[:3])
    unit, least = 2 * n * n * width, 4 * n * width * 2
    assert forward.total().flops <= 1.01 * unit
    assert forward.total().flops + backward.total().flops <= 4.01 * unit
    launches = kernels(forward) + kernels(backward)
    assert sum(launch.requested for launch in launches) <= most * least
    assert sum(launch.unique for launch in launches) <= 1.8 * least
    for launch in launches:
        assert (launch.hazards, launch.out_of_bounds, launch.atomics) == (0, 0, 0), launch


@pytest.mark.parametrize(("locked", "units"), [(0, 3), (1, 3)], ids=["image", "text"])
def test_a_locked_tower_skips_its_product(locked, units):
    inputs = leaves(256, 64)[:3]
    inputs[locked].requires_grad_(False)
    forward, backward = passes(contrastive_loss, inputs)
    flops = forward.total().flops + backward.total().flops
    assert flops <= (units + 0.01) * 2 * 256 * 256 * 64


@pytest.mark.parametrize("strips", [1, 3])
def test_launches(strips, monkeypatch):
    """Forward three: tiles, merge, its sum. Backward three a strip, and none for the scale."""
    monkeypatch.setitem(grads.STRIP_ROWS, 4, 192 // strips)
    inputs = leaves(192, 32, torch.float32)[:3]
    forward, backward = passes(contrastive_loss, inputs)
    assert forward.total().launches == 3
    assert backward.total().launches == 3 * strips
    with torch.no_grad(), counted() as count:
        contrastive_loss(*inputs, impl="triton")
    assert count.total().launches == 3


def test_launches_in_16_bits(monkeypatch):
    """As many, though the texts' gradient is summed in fp32: the last strip's product rounds it."""
    monkeypatch.setitem(grads.STRIP_ROWS, 2, 128)
    products = []  # of the library: on a GPU a launch each, see test_device.py
    for name in ("_product", "_add_product"):
        monkeypatch.setattr(grads, name, lambda a, b, out: products.append(out.dtype))
    _, backward = passes(contrastive_loss, leaves(384, 32)[:3])
    image, text = torch.float16, torch.float32
    assert products == [image, text, image, text, image]
    assert len(kernels(backward)) + len(products) == 3 * 3
    assert backward.total().launches == len(kernels(backward))


@pytest.mark.parametrize("n", [65, 200])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_ragged_tiles_stay_inside(loss, n, monkeypatch):
    """Odd sizes: no access outside a tensor, none that depends on the order of programs."""
    monkeypatch.setitem(grads.STRIP_ROWS, 2, 128)  # two strips of 200 rows: also the last product
    for dtype in (torch.float32, torch.float16):
        inputs = leaves(n, 41, dtype)
        with counted() as count:
            loss(*inputs, impl="triton").backward()
        for launch in kernels(count):
            assert (launch.hazards, launch.out_of_bounds, launch.atomics) == (0, 0, 0), launch


def test_the_sigmoid_makes_no_logit_twice():
    forward, backward = passes(sigmoid_loss, leaves(256, 64))
    assert forward.total().flops + backward.total().flops <= 3.01 * 2 * 256 * 256 * 64
    assert kernels(backward) == []


def test_memory_of_the_torch_path():
    """Beside features and gradients at N = 8192, at most the bound; a fifth of plain torch's."""
    n, width, rows = 8192, 512, 2048
    torch.use_deterministic_algorithms(False)  # filling memory with NaN takes as long as the loss
    inputs = leaves(n, width, torch.float32)[:3]
    with counted() as count:
        contrastive_loss(*inputs, impl="torch").backward()
    gradients = 2 * 4 * n * width
    assert count.peak_bytes - gradients <= 2 * rows * n + 8 * n * width + n * n // 16
    assert count.peak_bytes <= 1_461_000_000 / 5


def test_machine_code_of_every_launch():
    """Every rung and variant for three architectures: nothing spills, all fits, tensor cores."""
    rows = machine_code("contrastive")
    check_rows(rows, spills_nothing)
    products = [row for row in rows if row.types.get("x_ptr", "*fp32") != "*fp32"]
    assert {row.kernel for row in products} == {
        "contrastive_fwd", "contrastive_bwd", "last_product",
    }  # fmt: skip
    check_rows(products, lambda row: cores(row) == {OWN_CORES[row.arch]})
