"""What the kernel files share."""

from __future__ import annotations

from typing import Any, NamedTuple


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
