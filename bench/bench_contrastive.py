"""The contrastive loss, forward and backward: ours, open_clip and two kernel libraries.

    pytest bench/bench_contrastive.py            N = 1024 to 65536, D = 512, as memory allows
    python -m bench.bench_contrastive 32768      one size, fp32 and bf16, as a table
    python -m bench.bench_contrastive 8192 --load 2    the same beside two busy processes

Each rival first gives the loss and gradients of the fp64 formula (error: largest relative one of
them), then it is timed. extra MB is what a fresh process grows by during one call beyond its
features and their gradients: the kernel's own high-water mark. TFLOP/s counts 4 * 2 N N D, the
least that keeps no N x N, for every rival. What cannot run here is skipped by name: kernels without
a GPU, sizes beyond 8192 on a CPU, and where memory does not suffice.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import BURST, DEVICE, DTYPES, clock, turns
from clipa_kernels import contrastive_loss

ROOT = Path(__file__).parents[1]
WIDTH, SCALE = 512, 14.3
RIVALS = ("triton", "torch", "open_clip", "open_clip compiled", "memeff", "inf_cl")
SIZES = (1024, 4096, 8192, 16384, 32768, 65536)
pytestmark = pytest.mark.benchmark(timer=clock)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def rival(name: str) -> Loss | str:
    """The loss by name, or why it cannot run here."""
    if name == "torch" or (name == "triton" and DEVICE == "cuda"):
        return functools.partial(contrastive_loss, impl=name)
    if name.startswith("open_clip"):
        package = importlib.util.find_spec("open_clip")
        if package is None:
            return "open_clip_torch is not installed"
        # The file alone: the whole package would count as memory of the loss.
        path = Path(package.submodule_search_locations[0]) / "loss.py"
        spec = importlib.util.spec_from_file_location("open_clip_loss", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loss = module.ClipLoss()
        return torch.compile(loss) if name.endswith("compiled") else loss
    if DEVICE == "cpu":
        return f"{name} needs a GPU"
    if importlib.util.find_spec(name) is None:
        return f"{name} is not installed"
    if name == "memeff":
        from memeff import infonce

        return lambda image, text, scale: infonce(image, text, scale.item())
    import inf_cl

    return lambda image, text, scale: (
        (
            inf_cl.cal_inf_loss(image, text, scale=scale)
            + inf_cl.cal_inf_loss(text, image, scale=scale)
        )
        / 2
    )


def leaves(n: int, dtype: torch.dtype, width: int = WIDTH) -> list[Tensor]:
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(n, width, device=DEVICE), dim=-1) for _ in "ab")
    scale = torch.tensor(SCALE, device=DEVICE)
    return [*(t.to(dtype).requires_grad_() for t in (image, text)), scale.requires_grad_()]


def step(loss: Loss, inputs: list[Tensor]) -> Tensor:
    """Forward and backward."""
    for leaf in inputs:
        leaf.grad = None
    value = loss(*inputs)
    value.backward()
    return value.detach()


def error(loss: Loss, dtype: torch.dtype, n: int = 768) -> float:
    """The largest error of the loss and of each gradient over the largest exact value, in fp64."""
    inputs = leaves(n, dtype, 128)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    logits = exact[2] * exact[0] @ exact[1].T
    labels = torch.arange(n, device=DEVICE)
    true = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    true.backward()
    pairs = [(step(loss, inputs), true.detach())]
    pairs += [(a.grad, b.grad) for a, b in zip(inputs, exact, strict=True) if a.grad is not None]
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def extra_bytes(name: str, n: int, dtype: str) -> int:
    """Growth of a fresh process's high-water mark by one step, less the gradients it returns."""
    options = "--memory", name, "--dtype", dtype
    run = subprocess.run(
        [sys.executable, "-m", "bench.bench_contrastive", str(n), *options],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(run.stdout.split()[-1])


def _own_extra_bytes(name: str, n: int, dtype: str) -> int:
    loss, inputs = rival(name), leaves(n, DTYPES[dtype])
    step(loss, leaves(512, DTYPES[dtype]))
    gradients = sum(t.numel() * t.element_size() for t in inputs)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, inputs)
        return torch.cuda.max_memory_allocated() - before - gradients
    before = _high_water(reset=True)
    step(loss, inputs)
    return _high_water() - before - gradients


def _high_water(reset: bool = False) -> int:
    """Most bytes of memory this process ever held, or since the last reset on Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", RIVALS)
def test_contrastive(benchmark, name, n, dtype):
    loss = rival(name)
    if isinstance(loss, str):
        pytest.skip(loss)
    if DEVICE == "cpu" and n > 8192:
        pytest.skip(f"N={n} takes minutes on a CPU")
    # An error of open_clip in bf16 is that of its bf16 logits.
    off = error(loss, DTYPES[dtype])
    assert off < (1e-4 if dtype == "fp32" else 0.2), f"{name} is wrong by {off:.1e}"
    inputs = leaves(n, DTYPES[dtype])
    benchmark.group = f"N={n} D={WIDTH} {dtype} {DEVICE}"
    each = itertools.cycle(turns(inputs))
    call = lambda: step(loss, next(each))  # noqa: E731
    try:
        benchmark.pedantic(call, warmup_rounds=1, rounds=3, iterations=BURST)
    except torch.OutOfMemoryError:
        pytest.skip(f"{name} at N={n} does not fit this GPU")
    if not benchmark.enabled:  # --benchmark-disable: checked, not timed
        return
    benchmark.extra_info |= {
        "TFLOP/s": 8 * n * n * WIDTH / benchmark.stats.stats.min / 1e12,
        "extra MB": extra_bytes(name, n, dtype) / 1e6,
        "error": off,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """This many processes beside, each of which keeps one core busy."""
    spin = sys.executable, "-c", "while True: pass"
    running = [subprocess.Popen(spin) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def table(n: int, load: int) -> None:
    """All rivals in turns at one size: the median of five, seconds of processor time beside it."""
    print(
        f"N={n} D={WIDTH} on {DEVICE}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads beside {load} busy processes"
    )
    for dtype, torch_dtype in DTYPES.items():
        losses = {name: rival(name) for name in RIVALS}
        for name in [name for name, loss in losses.items() if isinstance(loss, str)]:
            print(f"{dtype} {name:20} skipped: {losses.pop(name)}")
        each = itertools.cycle(turns(leaves(n, torch_dtype)))
        times = {name: [] for name in losses}
        with busy(load):
            for _ in range(6):
                for name, loss in losses.items():
                    start = clock(), time.process_time()
                    step(loss, next(each))
                    end = clock(), time.process_time()
                    times[name].append((end[0] - start[0], end[1] - start[1]))
        for name, loss in losses.items():
            wall, cpu = (statistics.median(t[i] for t in times[name][1:]) for i in (0, 1))
            row = {
                "s": round(wall, 3),
                "cpu_s": round(cpu, 3),
                "extra_mb": round(extra_bytes(name, n, dtype) / 1e6),
                "error": float(f"{error(loss, torch_dtype):.1e}"),
            }
            print(f"{dtype} {name:20} {json.dumps(row)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("n", type=int, nargs="?", default=8192, help="pairs")
    parser.add_argument("--load", type=int, default=0, help="busy processes beside the timing")
    parser.add_argument("--memory", choices=RIVALS, help="print one rival's extra bytes and stop")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="with --memory")
    arguments = parser.parse_args()
    if arguments.memory:
        print(_own_extra_bytes(arguments.memory, arguments.n, arguments.dtype))
    else:
        table(arguments.n, arguments.load)


if __name__ == "__main__":
    main()
