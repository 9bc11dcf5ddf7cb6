"""Record what the library's launchers pass to Triton, without a GPU and without memory.

    with recording(80, 90) as launches:                         # as on sm_80 and on sm_90
        x = torch.empty(1 << 20, 5120, dtype=torch.bfloat16)    # fake: no memory behind it
        clipa_kernels.bias_gelu(x, None, impl="triton")
    launches[0].signature

In the block tensors are torch's fake ones, at any size, on "cpu"; operators of torch.library run
their own bodies on them, once for each architecture, forward and backward; a Triton driver of that
architecture takes CPU tensors; and JITFunction.run notes its arguments instead of launching.
Types, constants, divisibility and alignment are those of Triton's own binder, so a launch is
compiled to what a GPU would compile. Storage is taken to begin at a multiple of 16 bytes, as
allocators give it. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Launch:
    """One launch: what the compiler is given, and what the kernel would be.

    kernel: the @triton.jit function
    arch: compute capability, 80 for sm_80
    signature: Triton's type of each argument by name, "constexpr" of those that are constants
    constants, attrs: values of the constants and attributes of the others, by place
    options: of the compiler, num_warps among them
    grid: programs along each dimension
    arguments: by name; tensors are fake, with shape, strides, dtype and offset
    call: what was called, in words
    """

    kernel: Any
    arch: int
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    call: str = ""

    @property
    def name(self) -> str:
        """The kernel's, without what all have: "bias_gelu_fwd"."""
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    @property
    def shape(self) -> str:
        """Shape and dtype of the first tensor: "9472x1280 bfloat16"."""
        first = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        return f"{'x'.join(map(str, first.shape))} {str(first.dtype).removeprefix('torch.')}"

    @property
    def label(self) -> str:
        """The kernel, its shape and the call."""
        return f"{self.name} {self.shape}, {self.call}"

    @property
    def room(self) -> str:
        """The kernel's folder or module in the library, "gelu"; the module of another's kernel."""
        return self.kernel.fn.__module__.removeprefix("clipa_kernels.").split(".")[0]

    def key(self) -> str:
        """Equal for launches that the compiler cannot tell apart."""
        parts = (self.arch, self.signature, self.constants, self.attrs, self.options)
        return f"{self.kernel.fn.__module__}.{self.kernel.__name__} {parts}"


class _Driver:
    """As much of a Triton driver as launchers and the binder ask for."""

    def __init__(self, archs: tuple[int, ...]) -> None:
        self.archs = archs  # to launch for: all, or in an operator's body the one it runs for

    @property
    def arch(self) -> int:
        return self.archs[0]

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0


@contextmanager
def idle(arch: int, run: Callable = lambda *_, **__: None) -> Iterator[None]:
    """A Triton driver of an architecture that takes CPU tensors; `run` in place of a launch."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    before = vars(driver).copy()
    driver.set_active(_Driver((arch,)))
    try:
        with patch.object(JITFunction, "run", run):
            yield
    finally:
        vars(driver).update(before)


class _Bodies(TorchDispatchMode):
    """Runs the Python body of a custom operator, where fake tensors would ask its fake: once for
    each architecture; the last one's results go on."""

    def __init__(self, driver: _Driver) -> None:
        super().__init__()
        self.driver = driver

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        definition = OPDEFS.get(func._schema.name)
        if definition is None:
            return func(*args, **(kwargs or {}))
        archs = self.driver.archs
        try:
            with self:
                for arch in archs:
                    self.driver.archs = (arch,)
                    out = definition._backend_fns[None](*args, **(kwargs or {}))
        finally:
            self.driver.archs = archs
        return out


@contextmanager
def recording(*archs: int) -> Iterator[list[Launch]]:
    """Nothing is launched in this block; the list fills with what would be, on each of archs.

    Raises: RuntimeError under Triton's interpreter, whose launches are others.
    """
    import triton
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise RuntimeError("recording: TRITON_INTERPRET must be unset, got 1")
    launches: list[Launch] = []
    binders: dict[tuple, tuple] = {}
    ours = _Driver(archs)

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        every = ours.archs
        for arch in every:
            ours.archs = (arch,)
            if (kernel, arch) not in binders:
                binders[kernel, arch] = kernel.create_binder()[-2:]
            launches.append(_bound(kernel, arch, *binders[kernel, arch], grid, args, kwargs))
        ours.archs = every

    def address(tensor: Tensor) -> int:
        return tensor.storage_offset() * tensor.element_size()

    before = vars(driver).copy()
    driver.set_active(ours)
    try:
        with (
            patch.object(JITFunction, "run", run),
            patch.object(FakeTensor, "data_ptr", address),
            FakeTensorMode(),
            _Bodies(ours),
        ):
            yield launches
    finally:
        vars(driver).update(before)


def _bound(
    kernel: Any, arch: int, backend: Any, binder: Callable, grid: Any, args: tuple, kwargs: dict
) -> Launch:
    """As the rest of JITFunction.run."""
    from triton._utils import find_paths_if, get_iterable_path

    bound, special, _ = binder(*args, **kwargs)
    types = [each[0] for each in special]
    places = find_paths_if(types, lambda _, kind: kind == "constexpr")
    values = list(bound.values())
    marks = ["" if each[0] == "constexpr" else each[1] for each in special]
    marked = find_paths_if(marks, lambda _, mark: isinstance(mark, str))
    return Launch(
        kernel,
        arch,
        dict(zip(bound, types, strict=True)),
        {place: get_iterable_path(values, place) for place in places},
        {place: backend.parse_attr(get_iterable_path(marks, place)) for place in marked},
        backend.parse_options(kwargs).__dict__,
        tuple(grid(bound) if callable(grid) else grid),
        dict(bound),
    )


def distinct(launches: Iterable[Launch], sizes: bool = False) -> list[Launch]:
    """The first of each kind that the compiler can tell apart; sizes: of each shape and grid."""
    first: dict[tuple, Launch] = {}
    for launch in launches:
        size = (launch.shape, launch.grid) if sizes else ()
        first.setdefault((launch.key(), *size), launch)
    return list(first.values())
