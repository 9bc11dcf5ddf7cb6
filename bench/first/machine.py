"""The machine that first_gpu.py runs on: a CUDA device, or a CPU that stands in for it.

On a CPU streams, graphs and the rest are the plain calls, so that the checks' own code runs.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_Kind = TypeVar("_Kind")


class Machine:
    """device; big: whether sizes are a GPU's; words: what it is, for the first line."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")
        if not self.cuda:  # before Triton is imported
            os.environ.setdefault("TRITON_INTERPRET", "1")
        self.big = self.cuda

    def pick(self, gpu: _Kind, cpu: _Kind) -> _Kind:
        """The size for a GPU, or the small one for the interpreter."""
        return gpu if self.big else cpu

    @property
    def short(self) -> torch.dtype:
        """The 16-bit dtype: the interpreter's products of bf16 are wrong."""
        return self.pick(torch.bfloat16, torch.float16)

    @property
    def words(self) -> dict[str, Any]:
        """Names and versions."""
        import triton

        found = dict(torch=torch.__version__, triton=triton.__version__)
        found |= dict(python=platform.python_version(), cores=os.cpu_count())
        if not self.cuda:
            return found | dict(device="cpu, interpreted")
        about = torch.cuda.get_device_properties(self.device)
        return found | dict(
            device=about.name, arch=f"sm_{about.major}{about.minor}",
            sms=about.multi_processor_count, memory=about.total_memory, l2=about.L2_cache_size,
            devices=torch.cuda.device_count(), cuda=torch.version.cuda,
        )  # fmt: skip

    @property
    def arch(self) -> int:
        """90 for sm_90; a CPU stands in for that."""
        major, minor = torch.cuda.get_device_capability(self.device) if self.cuda else (9, 0)
        return 10 * major + minor

    def others(self) -> list[torch.device]:
        """Devices beside the first; a CPU is its own."""
        if not self.cuda:
            return [self.device]
        return [torch.device("cuda", index) for index in range(1, torch.cuda.device_count())]

    def wait(self) -> None:
        """Until all queued work is done."""
        if self.cuda:
            torch.cuda.synchronize()

    @contextmanager
    def other_stream(self) -> Iterator[None]:
        """A stream that is not the default one, kept busy for a while before the block's work."""
        if not self.cuda:
            yield
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            yield
        torch.cuda.current_stream().wait_stream(stream)

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Whatever waits for the device raises."""
        if not self.cuda:
            yield
            return
        self.wait()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def recorded(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """The function as a CUDA graph, after three calls on a side stream: a replay gives the
        results, in the same tensors each time."""
        if not self.cuda:
            return function
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function()

        def replay() -> Any:
            graph.replay()
            return out

        return replay


def kept(values: Any) -> Any:
    """Copies of the tensors, which later work does not change."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, values)
