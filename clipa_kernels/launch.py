"""What the kernel files share: where they run, and the sum of partial sums."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
_Launcher = TypeVar("_Launcher", bound=Callable)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def runs_on(device: torch.device) -> bool:
    """Whether kernels launch on tensors of a device: CUDA's, any under Triton's interpreter, or
    those of the active Triton driver."""
    if device.type == "cuda" or triton.knobs.runtime.interpret:
        return True
    try:
        return triton.runtime.driver.active.get_active_torch_device().type == device.type
    except RuntimeError:  # no driver at all
        return False


def require_products(function: str, operand: Tensor) -> None:
    """TypeError for bfloat16 under Triton's interpreter: its tl.dot multiplies the bit patterns, up
    to Triton 3.8 at least. A mended interpreter sets its builder's `multiplies_bfloat16`."""
    if operand.dtype != torch.bfloat16 or not triton.knobs.runtime.interpret:
        return
    from triton.runtime.interpreter import interpreter_builder

    if not getattr(interpreter_builder, "multiplies_bfloat16", False):
        raise TypeError(
            f'{function}: impl "triton" takes float32 or float16 under Triton\'s interpreter, '
            f"whose products of bfloat16 are wrong, got bfloat16 on {operand.device}"
        )


def arch() -> int:
    """The compute capability that kernels are compiled for, 80 for sm_80; 90 when interpreted."""
    if triton.knobs.runtime.interpret:
        return 90
    return triton.runtime.driver.active.get_current_target().arch


def sms(device: torch.device) -> int:
    """A GPU's SMs; for launches off CUDA those of the first GPU of their architecture."""
    if device.type == "cuda":
        return _sms_of(device)
    return {80: 108, 90: 132, 100: 148}.get(arch(), 132)


@cache
def _sms_of(device: torch.device) -> int:
    driver = triton.runtime.driver.active
    return driver.utils.get_device_properties(device.index)["multiprocessor_count"]


def launcher(function: _Launcher) -> _Launcher:
    """Enters the device of the first tensor or torch.device among a launcher's arguments: Triton
    launches on the current device's stream, and compiles for its architecture, wherever the
    tensors lie. It does nothing off CUDA."""

    @wraps(function)
    def on_device(*args, **kwargs):
        for place in args:
            if isinstance(place, (Tensor, torch.device)):
                break
        device = place.device if isinstance(place, Tensor) else place
        # The interpreter, drivers that take CPU tensors; or nothing to enter, which takes its time.
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*args, **kwargs)
        with torch.cuda.device(device):
            return function(*args, **kwargs)

    return on_device


def input_precision(itemsize: int) -> str:
    """tl.dot's input_precision for elements of `itemsize` bytes: "tf32" where torch lets fp32
    products on CUDA use TF32. 16 bits have one form, and torch is not asked."""
    if itemsize < 4:
        return "ieee"
    # From torch 2.9 this is what torch's own products read, and both switches set it; to ask
    # get_float32_matmul_precision raises where the new one was used.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if setting is None:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if setting == "tf32" else "ieee"


def rows_of(x: Tensor) -> Tensor:
    """[..., D] as [T, D] with dense rows; copied where its strides allow no such view."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def dense_like(x: Tensor) -> Tensor:
    """Memory for a dense result of x's shape and dtype; new_empty takes twice as long."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rows_a_program(rows: int, programs: int, least: int, step: int = 1) -> int:
    """Rows that each of at most `programs` walks: a multiple of `step`, and `least` or more, which
    bounds the partial sums beside the rows themselves."""
    return cdiv(max(least, cdiv(rows, programs)), step) * step


@triton.jit(do_not_specialize=["parts"])
def _sum_partial_kernel(
    partial_ptr,
    first_ptr, second_ptr,
    parts, D,
    SUMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of partial [parts, SUMS, D] over the parts, in order: first [D], and of two second."""
    which = tl.program_id(1)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_p = tl.arange(0, BLOCK_P)
    # [BLOCK_P, BLOCK_D]
    offs = ((offs_p * SUMS + which) * D)[:, None] + offs_d[None, :]
    acc = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
    # One program walks all parts in order: two runs give equal bits.
    # Four stages: three tiles are on their way while one is added.
    for part in tl.range(0, parts, BLOCK_P, num_stages=4):
        mask_p = offs_p < parts - part
        partial_ptrs = partial_ptr + part * SUMS * D + offs
        acc += tl.load(partial_ptrs, mask=mask_p[:, None] & mask_d[None, :], other=0.0)
    total = tl.sum(acc, 0)
    if second_ptr is None or which == 0:
        tl.store(first_ptr + offs_d, total.to(first_ptr.dtype.element_ty), mask=mask_d)
    else:
        tl.store(second_ptr + offs_d, total.to(second_ptr.dtype.element_ty), mask=mask_d)


_SUM_BLOCK = dict(BLOCK_P=64, BLOCK_D=32)  # whole 128-byte lines, and programs for all of a GPU


def sum_partial(partial: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
    """partial [parts, sums, D], fp32, summed over its parts: [D] in each of one or two dtypes."""
    parts, sums, d = partial.shape
    out = [partial.new_empty(d, dtype=dtype) for dtype in dtypes]
    _sum_partial_kernel[(cdiv(d, _SUM_BLOCK["BLOCK_D"]), sums)](
        partial,
        out[0], out[1] if sums > 1 else None,
        parts, d,
        SUMS=sums, **_SUM_BLOCK,
        num_warps=4,
    )  # fmt: skip
    return out
