"""What the kernel files share: where they run, and how their config tables are listed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

LOG2_E = 1.4426950408889634


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def runs_on(device: torch.device) -> bool:
    """Whether kernels launch on tensors of a device: CUDA's, any under Triton's interpreter, or
    those of the active Triton driver."""
    if triton.knobs.runtime.interpret:
        return True
    try:
        return triton.runtime.driver.active.get_active_torch_device().type == device.type
    except RuntimeError:  # no driver at all
        return False


def pointer(dtype: torch.dtype) -> str:
    """Triton's name for a pointer to a dtype: "*bf16"."""
    names = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    return names[dtype]


class Case(NamedTuple):
    """One row of a config table, as plain data: all that compiling it without a GPU needs.

    A kernel file offers `cases() -> Iterator[Case]`, one for each row that a launcher can choose;
    `python -m bench.compiled` finds them.

    label: how reports call it, "attention forward 37x80 bf16"
    kernel: the @triton.jit function
    signature: Triton type of each run-time argument by name: "*bf16", "i32", "fp32"
    constexprs: value of each tl.constexpr, and of integers that are 1 (Triton makes them constant)
    num_warps, num_stages: as at the launch
    archs: compute capabilities that may get this row, 80 for sm_80
    unaligned: pointers and integers that are no multiple of 16 (bytes, or the value); all others
        are, which decides how wide loads and stores are
    """

    label: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    archs: tuple[int, ...] = (80, 90, 100)
    unaligned: tuple[str, ...] = ()
