"""What the kernels share: which device takes them, and how their table is listed."""

from typing import NamedTuple

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


class Case(NamedTuple):
    """A row of a config table as it is compiled: types of the run-time arguments by name, values
    of the others."""

    label: str
    kernel: triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int


def pointer(dtype: torch.dtype) -> str:
    """Triton's name for a pointer to a dtype: "*bf16"."""
    names = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    return names[dtype]
