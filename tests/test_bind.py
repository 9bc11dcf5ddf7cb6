"""Every op as a GPU's first call meets it, on a driver whose launches do nothing.

Triton makes a constant of an integer argument that is 1, and code of its own for multiples of 16;
neither the interpreter nor bench.compiled does. This file, run as a program without the
interpreter, calls all ops at small and odd sizes, so that Triton itself binds and specialises, and
compiles each kernel down to LLVM; what becomes of that is in the tests of the machine code.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipa_kernels import (
    add_layer_norm,
    bias_gelu,
    block_patches,
    contrastive_loss,
    cu_seqlens_of,
    grid_patches,
    patch_embed,
    random_patches,
    sigmoid_loss,
    varlen_attention,
    varlen_attention_qkvpacked,
)
from clipa_kernels.contrastive import ops

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
SIZES = (1, 2, 15, 16, 17, 127, 128, 129)
# Older ones ask CUDA for its device when they index a fake tensor (2.8 does, 2.11 does not).
FAKE_GPUS = torch.__version__ >= torch.torch_version.TorchVersion("2.11")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Calls = Iterator[tuple[str, Callable[[], object]]]


def leaf(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def both(function: Callable[..., Tensor], *leaves: Tensor, **how) -> None:
    """Forward and backward; a tuple's first output has the gradient."""
    out = function(*leaves, impl="triton", **how)
    out = out[0] if isinstance(out, tuple) else out
    wanted = [each for each in leaves if isinstance(each, Tensor) and each.requires_grad]
    torch.autograd.grad(out, wanted, torch.zeros_like(out), allow_unused=True)


def layer_norm_calls() -> Calls:
    for rows, width in product(SIZES, SIZES):
        parameters = leaf(width, dtype=FP32), leaf(width, dtype=FP32)
        for x, stream in ((BF16, BF16), (BF16, FP32), (BF16, None)):
            residual = None if stream is None else leaf(rows, width, dtype=stream)
            tensors = (leaf(rows, width, dtype=x), residual, *parameters)
            yield f"{rows}x{width} {x} {stream}", lambda t=tensors: both(add_layer_norm, *t)


def gelu_calls() -> Calls:
    for rows, width in product(SIZES, SIZES):
        for form in ("none", "tanh", "quick") if rows == width else ("none",):
            tensors = leaf(rows, width), leaf(width, dtype=FP32)
            how = dict(approximate=form)
            yield f"{rows}x{width} {form}", lambda t=tensors, h=how: both(bias_gelu, *t, **h)


def attention_calls() -> Calls:
    lengths = [*([n] for n in SIZES), [1, 1], [2, 2, 2], [1, 0], [17, 2], [64, 65], [1, 129]]
    for each, heads, width, dtype in (
        *product(lengths, (1, 2), (64,), (BF16,)),
        *product(([1], [17], [1, 0], [65]), (1,), (8, 104), (BF16,)),
        *product(([1], [17], [1, 17]), (1,), (64,), (FP16, FP32)),
    ):
        how = dict(causal=len(each) > 1 and width == 64)
        qkv = leaf(sum(each), 3, heads, width, dtype=dtype)
        rest = cu_seqlens_of(each), max(each)
        label = f"{each} {heads}x{width} {dtype}"
        yield label, lambda t=(qkv, *rest), h=how: both(varlen_attention_qkvpacked, *t, **h)
        if sum(each) < 3:
            apart = *(leaf(sum(each), heads, width, dtype=dtype) for _ in "qkv"), *rest
            yield f"{label} apart", lambda t=apart, h=how: both(varlen_attention, *t, **h)


def loss_calls() -> Calls:
    for n, width, dtype in (
        *((n, 64, BF16) for n in SIZES),
        *((2, width, BF16) for width in SIZES),
        (1, 1, BF16),
        (1, 1, FP32),
        (129, 16, FP16),
    ):
        scale, bias = leaf(dtype=FP32), leaf(dtype=FP32)
        tensors = leaf(n, width, dtype=dtype), leaf(n, width, dtype=dtype), scale
        label = f"{n}x{width} {dtype}"
        yield f"contrastive {label}", lambda t=tensors: both(contrastive_loss, *t)
        yield f"sigmoid {label}", lambda t=(*tensors, bias): both(sigmoid_loss, *t)
    strips = leaf(4097, 16), leaf(4097, 16), leaf(dtype=FP32)
    yield "contrastive in two strips", lambda: both(contrastive_loss, *strips)


def group_calls() -> Calls:
    """A rank's rows against the texts of all ranks, or of one more."""
    for m, ranks, dtype in (
        *((m, ranks, BF16) for m, ranks in ((1, 1), (1, 2), (16, 8), (129, 2))),
        (1, 16, FP32),
    ):
        for first in {0, m, (ranks - 1) * m}:
            args = m, m * ranks, dtype, first
            yield f"{m} of {ranks} ranks, {dtype}, from {first}", lambda a=args: group_pass(*a)


def group_pass(m: int, n: int, dtype: torch.dtype, first: int) -> None:
    x, y, scale = torch.zeros(m, 32, dtype=dtype), torch.zeros(n, 32, dtype=dtype), torch.ones(())
    pairs = first, 0, m
    rows, cols = ops.contrastive_stats(x, y, scale, *pairs, True)
    stats, every = (rows, cols, None, scale), [True, True, True]
    ops.contrastive_grads(x, y, scale, *stats, *pairs, every, True, True)
    ops.sigmoid_loss(x, y, scale, scale, [*every, True], *pairs, True)


def mask_calls() -> Calls:
    for grid in ((1, 1), (1, 2), (2, 1), (1, 16), (17, 1), (1, 129), (2, 2), (15, 17), (32, 32)):
        for seed, step, first in ((0, 0, 0), (1, 1, 1), (1 << 32, 16, 1 << 40)):
            key = dict(seed=seed, step=step, first_sample=first, impl="triton")
            label = f"{grid} {seed} {step} {first}"
            yield f"grid {label}", lambda g=grid, k=key: grid_patches(1, g, **k)
            for drop in (0.0, 0.5, 0.9):
                args = 1, grid, drop
                yield f"random {drop} {label}", lambda a=args, k=key: random_patches(*a, **k)
                yield f"block {drop} {label}", lambda a=args, k=key: block_patches(*a, **k)


def stem_calls() -> Calls:
    """Pictures as bytes and as numbers, by rows and by channels, of one patch and of many."""
    for side, grid, batch, kept, prefix, width, dtype in (
        *((16, 1, 1, None, p, d, torch.uint8) for p, d in ((0, 1), (1, 2), (1, 128))),
        *((16, 2, b, k, 1, 16, torch.uint8) for b, k in ((1, 1), (2, 2))),
        *((14, 2, 1, k, 1, d, torch.uint8) for k, d in ((None, 1), (1, 129))),
        *((s, 2, 1, 1, 1, 16, BF16) for s in (1, 2, 16)),
        (8, 9, 2, 15, 1, 16, torch.uint8),  # more positions than come as columns
        (8, 12, 1, 127, 0, 1, torch.uint8),
        (16, 1, 1, None, 1, 16, FP32),
    ):
        args = side, grid, batch, kept, prefix, width, dtype
        for channels_last in (True, False) if batch * prefix > 1 or side < 16 else (True,):
            label = f"{args} {'rows' if channels_last else 'channels'}"
            yield label, lambda a=args, last=channels_last: stem(*a, last)


def stem(side, grid, batch, kept, prefix, width, dtype, channels_last) -> None:
    images = torch.zeros(batch, 3, side * grid, side * grid, dtype=dtype)
    if channels_last:
        images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    wide = FP32 if dtype == FP32 else BF16
    keep = None if kept is None else torch.arange(kept).repeat(batch, 1)
    weight, bias = leaf(width, 3, side, side, dtype=wide), leaf(width, dtype=wide)
    positions = leaf(prefix + grid * grid, width, dtype=FP32)
    first = leaf(width, dtype=FP32) if prefix else None
    both(patch_embed, images, keep, weight, bias, positions, first)


CALLS = {
    "layer_norm": layer_norm_calls,
    "gelu": gelu_calls,
    "attention": attention_calls,
    "loss": loss_calls,
    "loss over a group": group_calls,
    "masks": mask_calls,
    "stem": stem_calls,
}


def launchers() -> dict[str, Callable[[], object]]:
    """Each launcher, on tensors of cuda:1."""
    from clipa_kernels.attention import kernels as attention
    from clipa_kernels.contrastive import kernels as contrastive
    from clipa_kernels.contrastive import kernels_grads as contrastive_grads
    from clipa_kernels.gelu import kernels as gelu
    from clipa_kernels.layer_norm import kernels as layer_norm
    from clipa_kernels.masking import kernels as masking
    from clipa_kernels.patch_embed import kernels as patch_embed
    from clipa_kernels.patch_embed import kernels_table as patch_table

    with torch.device("cuda:1") as device:
        x, row, one = torch.empty(16, 16), torch.empty(16), torch.empty(())
        q, ends = torch.empty(16, 1, 64), torch.empty(2, dtype=torch.int32)
        images, token = torch.empty(1, 3, 8, 8), torch.empty(1, 1, 16)
        keep = torch.empty(1, 1, dtype=torch.int64)
        stats = torch.empty(3, 16), torch.empty(2, 16), one
    pairs, wanted, how = (0, 0, 16), (True, True, True, True), (16, False, 1.0)
    return {
        "gelu": lambda: gelu.forward(x, row, "none"),
        "gelu backward": lambda: gelu.backward(x, x, row, "none", True),
        "layer_norm": lambda: layer_norm.forward(x, x, row, row, 1e-5),
        "layer_norm backward": lambda: layer_norm.backward(x, None, x, row, 1e-5, x.dtype),
        "attention": lambda: attention.forward(q, q, q, ends, *how),
        "attention backward": lambda: attention.backward(q, q, q, q, ends, (q, q, q), *how),
        "loss": lambda: contrastive.softmax_forward(x, x, one),
        "loss backward": lambda: contrastive_grads.softmax_grads(
            x, x, one, *stats, pairs, wanted[:3], slope=one
        ),
        "loss over a group": lambda: contrastive.softmax_stats(x, x, one, pairs),
        "sigmoid": lambda: contrastive_grads.sigmoid_pass(x, x, one, one, pairs, wanted),
        "masks": lambda: masking.choose_patches("grid", 1, [2, 2, 1, 0, 0], [0] * 4, None, device),
        "stem": lambda: patch_embed.patch_copy(images, None, 8, 0, False, 192, 192, x.dtype),
        "positions": lambda: patch_table.table_grad(token, keep, 1, 0),
    }


def idle_driver(launched: Counter):
    """Triton's driver of an H100 that takes CPU tensors; a launch is counted, and does nothing.
    Compilers stop at LLVM."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import GPUDriver
    from triton.backends.nvidia.compiler import CUDABackend

    def no_code(_self, _source, metadata, *_):
        metadata["name"] = ""
        return ""

    CUDABackend.make_ptx, CUDABackend.make_cubin = no_code, lambda *_: b""

    class Utils:
        unload_module = set_printf_fifo_size = staticmethod(lambda *_: None)
        load_binary = staticmethod(lambda *_: (1, 1, 0, 0, 1024))
        get_device_properties = staticmethod(
            lambda _: dict(max_shared_mem=227 << 10, multiprocessor_count=132, warpSize=32)
        )

    class Launch:
        def __init__(self, source, _metadata):
            self.name = source.fn.__name__

        def __call__(self, *_):
            launched[self.name] += 1

    class Driver(GPUDriver):
        def __init__(self):
            self.utils, self.launcher_cls = Utils(), Launch
            self.get_device_capability = lambda *_: (9, 0)
            self.get_current_stream = self.get_current_device = lambda *_: 0
            self.set_current_device = lambda _: None

        is_active = classmethod(lambda _: True)
        map_python_to_cpp_type = staticmethod(lambda kind: kind)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_device_interface = get_benchmarker = staticmethod(lambda: None)
        get_empty_cache_for_benchmark = clear_cache = staticmethod(lambda *_: None)
        allocate_default_profile_scratch = staticmethod(lambda *_: None)

    return Driver()


def run_calls(op: str) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Calls by what they raise, and launches by kernel."""
    launched = Counter()
    triton.runtime.driver.set_active(idle_driver(launched))
    failed = {}
    for label, call in CALLS[op]():
        try:
            call()
        except Exception as error:
            while error.__cause__ is not None:
                error = error.__cause__
            failed.setdefault(f"{type(error).__name__}: {error}", []).append(label)
    return failed, launched


def current_devices() -> dict[str, list[int]]:
    """Devices that are current at the launches of each launcher, 0 being current outside."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    current, seen = [0], []

    def exchange(index: int) -> int:
        before, current[0] = current[0], index
        return before

    # Two GPUs: one of them is current, and memory has addresses.
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = exchange
    torch.cuda.current_device = lambda: current[0]
    FakeTensor.data_ptr = lambda _: 0
    driver = idle_driver(Counter())
    driver.get_current_device = lambda: seen.append(current[0]) or current[0]
    triton.runtime.driver.set_active(driver)
    devices = {}
    with FakeTensorMode():
        for name, launch in launchers().items():
            seen.clear()
            launch()
            assert seen and current == [0], name
            devices[name] = sorted(set(seen))
    return devices


def main() -> None:
    with ProcessPoolExecutor(2) as pool:
        devices = pool.submit(current_devices) if FAKE_GPUS else None
        outcomes = dict(zip(CALLS, pool.map(run_calls, CALLS), strict=True))
        print(json.dumps([outcomes, devices and devices.result()]))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= dict(PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
    run = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("op", CALLS)
def test_it_binds_and_compiles(outcomes, op):
    failed, launched = outcomes[0][op]
    assert launched
    assert not failed, "\n".join(f"{calls[:5]}: {error}" for error, calls in failed.items())


def test_every_kernel_is_launched(outcomes):
    sources = [path.read_text() for path in (ROOT / "clipa_kernels").rglob("*.py")]
    names = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)}
    assert names == {name for _, kernels in outcomes[0].values() for name in kernels}


@pytest.mark.skipif(not FAKE_GPUS, reason="torch before 2.11 has no fake GPUs without a real one")
def test_kernels_run_where_their_tensors_lie(outcomes):
    """On the second of two GPUs, while the first is current."""
    assert outcomes[1] and all(devices == [1] for devices in outcomes[1].values()), outcomes[1]


if __name__ == "__main__":
    main()
