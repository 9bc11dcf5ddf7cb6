"""Shared by all tests: NaN in uninitialised memory, and Triton's interpreter or a device."""

import os
import re
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from device import COMPILED, DEVICE, FILES, on_device

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads it when it is imported, so all tests of one process run interpreted; what compiles
# kernels does so in processes without it (tests/test_compiled.py).
if not COMPILED:
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(1)


def _release(package: str) -> tuple[int, ...]:
    """(3, 8) of an installed package's version; () where it is not installed."""
    try:
        return tuple(int(part) for part in re.findall(r"\d+", version(package))[:2])
    except PackageNotFoundError:
        return ()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a device, skip what stays on the CPU; else what runs interpreted kernels, by file or by
    parameter, where the interpreter cannot."""
    if COMPILED:
        for item in items:
            if item.path.name not in FILES:
                item.add_marker(pytest.mark.skip(reason=f"it does not run on {DEVICE}"))
        return
    # Up to Triton 3.6 it makes a loop's bound of an array of one element, as NumPy 2.4 refuses.
    if () < _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        reason = "the interpreter of Triton before 3.7 needs NumPy below 2.4"
        for item in items:
            if re.search("triton|counted", item.nodeid):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what torch.empty returns with NaN, so that a value never written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def kernels_device(request):
    """Where the test is one of kernels and a device is named, what it draws lies there. Refusals
    stay on the CPU, where values are read."""
    refusal = request.node.originalname.startswith("test_bad")
    if COMPILED and request.path.name in FILES and not refusal:
        with on_device():
            yield
    else:
        yield


@pytest.fixture
def interpreted():
    """Skip on a device what asks the interpreter."""
    if COMPILED:
        pytest.skip(f"what the interpreter counts is not to be had on {DEVICE}")


@pytest.fixture
def fake_cuda():
    """Skip where indexing a fake CUDA tensor asks for the driver: torch 2.8."""
    if torch.__version__ < (2, 9) and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} has fake CUDA tensors only beside a driver")


@pytest.fixture
def fake_products():
    """Skip where fake tensors have no addmm with out_dtype: torch 2.8 to 2.11, though CUDA may."""
    x = torch.empty(2, 2, dtype=torch.float16, device="meta")
    try:
        torch.addmm(x.float(), x, x, out_dtype=torch.float32)
    except TypeError:
        pytest.skip(f"torch {torch.__version__} has no fake addmm with out_dtype")
