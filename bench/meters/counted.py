"""Count what GPU code asks of the machine, without a GPU: Triton's interpreter and eager torch.

    with counted() as count:                    # TRITON_INTERPRET=1, tensors on the CPU
        clipa_kernels.bias_gelu(x, bias, impl="triton").sum().backward()
    print(count.table())
    assert count.total().hazards == 0

Of a Triton launch, from the lanes that its masks leave on:

    requested  bytes that loads and stores ask for, an atomic's twice: the traffic without a cache
    unique     the union of their addresses over the launch, loads and stores apart: the traffic
               with an endless cache. DRAM moves between the two.
    sectors    bytes of the 32-byte sectors that each access of a program touches: what requested
               becomes where a row starts in mid-sector or is cut there
    flops      2 M N K of each tl.dot as issued: the padding of a tile counts
    hazards    bytes that one program stores and another stores or loads in the same launch, and
               bytes that one program changes atomically and another stores or loads plainly;
               a byte counts once for each of these four
    out of bounds  lanes outside the tensors passed: outside their storage, where the access is
               left out, or inside it but beyond the first and last element of the views passed

Loads and stores by a tensor descriptor count like the others; tl.dot_scaled is not counted.
Triton's interpreter (3.4 to 3.8) multiplies the bit patterns of bfloat16 in tl.dot; here the
product is that of the values, summed in the accumulator's type. Its other arithmetic on bfloat16
stays wrong, so a kernel must cast to fp32 before it adds, as ours do. Of eager torch see
torch_ops.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from importlib.util import find_spec
from math import gcd, prod
from typing import Any

import numpy as np
import torch

from bench.meters.torch_ops import TorchCounter, TorchOp

_NOBODY, _SEVERAL = -1, -2  # instead of a program's number


@dataclass
class Launch:
    """One launch of a kernel. Bytes, except programs, flops and out_of_bounds (lanes)."""

    kernel: str
    grid: tuple[int, ...] = ()
    programs: int = 0
    loaded: int = 0
    stored: int = 0
    atomics: int = 0
    sectors: int = 0
    unique_loaded: int = 0
    unique_stored: int = 0
    unique_atomics: int = 0
    flops: int = 0
    hazards: int = 0
    out_of_bounds: int = 0
    where: Counter[str] = field(default_factory=Counter)  # hazards and lanes by argument

    @property
    def requested(self) -> int:
        """Bytes asked for; an atomic reads and writes."""
        return self.loaded + self.stored + 2 * self.atomics

    @property
    def unique(self) -> int:
        """Distinct bytes loaded, stored, and twice those changed atomically."""
        return self.unique_loaded + self.unique_stored + 2 * self.unique_atomics


@dataclass
class Total:
    """Launches and eager operators together; an operator requests what it must move."""

    launches: int = 0
    requested: int = 0
    unique: int = 0
    flops: int = 0
    hazards: int = 0
    out_of_bounds: int = 0
    atomics: int = 0

    def add(self, other: Launch | Total) -> None:
        """Add one launch, or another total."""
        self.launches += getattr(other, "launches", 1)
        for each in fields(self)[1:]:
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


def _total_of(op: TorchOp) -> Total:
    moved = op.read + op.written
    return Total(launches=op.launches, requested=moved, unique=moved, flops=op.flops)


class Count:
    """What a `counted()` block did: launches in order, operators by name, and memory."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self._torch = TorchCounter()

    @property
    def torch_ops(self) -> list[TorchOp]:
        """Eager operators, the one with the most bytes first."""
        return sorted(self._torch.ops.values(), key=lambda op: -(op.read + op.written))

    @property
    def new_bytes(self) -> int:
        """Bytes of all storages that eager torch made."""
        return self._torch.new_bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes of those storages alive at once."""
        return self._torch.peak_bytes

    def total(self) -> Total:
        """The sum over launches and eager operators."""
        total = Total()
        for part in (*self.launches, *map(_total_of, self.torch_ops)):
            total.add(part)
        return total

    def table(self) -> str:
        """Kernels summed by name, operators by bytes, the total, and where hazards are."""
        rows: dict[str, Total] = {}
        for launch in self.launches:
            rows.setdefault(launch.kernel, Total()).add(launch)
        rows |= {f"aten::{op.name}": _total_of(op) for op in self.torch_ops}
        rows["total"] = self.total()
        heads = (
            "launches",
            "MB requested",
            "MB unique",
            "GFLOP",
            "hazard B",
            "outside",
            "atomic B",
        )
        lines = [f"{'':36}" + "".join(f"{head:>13}" for head in heads)]
        for name, row in rows.items():
            cells = (
                f"{row.launches:13d}{row.requested / 1e6:13.3f}{row.unique / 1e6:13.3f}"
                f"{row.flops / 1e9:13.4f}{row.hazards:13d}{row.out_of_bounds:13d}{row.atomics:13d}"
            )
            lines.append(f"{name[:36]:36}" + cells)
        for launch in self.launches:
            lines += [f"{launch.kernel}: {what}: {n}" for what, n in launch.where.items()]
        return "\n".join(lines)


@contextmanager
def counted() -> Iterator[Count]:
    """Count all Triton launches and eager torch operators of this thread in the block.

    Returns: the `Count`, filled as the block runs.
    Raises: RuntimeError where Triton is installed and its interpreter is off, and in another
    `counted()`. Without Triton, eager operators alone are counted.
    """
    count = Count()
    with ExitStack() as stack:
        if find_spec("triton") is not None:
            stack.enter_context(_Interpreter(count).hooked())
        stack.enter_context(count._torch)
        yield count


class _Storage:
    """Which program touched which cell of a storage; a cell is its narrowest element."""

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.base = self.high = storage.data_ptr()
        self.low = self.end = self.base + storage.nbytes()
        self.cell = tensor.element_size()
        self.names: list[str] = []
        self.owners: dict[str, np.ndarray] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.numel():
            pairs = zip(tensor.shape, tensor.stride(), strict=True)
            length = 1 + sum((size - 1) * stride for size, stride in pairs)
            self.low = min(self.low, tensor.data_ptr())
            self.high = max(self.high, tensor.data_ptr() + length * tensor.element_size())
        self.cell = gcd(self.cell, tensor.element_size())
        self.names.append(name)

    def touch(self, kind: str, addresses: np.ndarray, size: int, program: int) -> None:
        if size % self.cell:  # a pointer cast to a narrower type
            finer = gcd(size, self.cell)
            repeat = self.cell // finer
            self.owners = {kind: np.repeat(old, repeat) for kind, old in self.owners.items()}
            self.cell = finer
        if kind not in self.owners:
            cells = -(-(self.end - self.base) // self.cell)
            self.owners[kind] = np.full(cells, _NOBODY, np.int32)
        owner = self.owners[kind]
        first = (addresses - self.base) // self.cell
        for step in range(size // self.cell):
            now = owner[first + step]
            alone = (now == _NOBODY) | (now == program)
            owner[first + step] = np.where(alone, program, _SEVERAL)

    def unique(self, kind: str) -> int:
        return self.cell * int((self.owners.get(kind, np.empty(0)) != _NOBODY).sum())

    def hazards(self) -> Iterator[tuple[str, int]]:
        """(what, bytes) of cells that two programs use, one of them to change it."""
        stored = self.owners.get("store", np.empty(0))
        yield "stored twice", self.cell * int((stored == _SEVERAL).sum())
        for one, other in (("store", "load"), ("atomic", "store"), ("atomic", "load")):
            if one in self.owners and other in self.owners:
                a, b = self.owners[one], self.owners[other]
                clash = (a != _NOBODY) & (b != _NOBODY) & ((a != b) | (a == _SEVERAL))
                yield f"{one} and {other}", self.cell * int(clash.sum())


class _Interpreter:
    """Hooks in Triton's interpreter that fill the launches of a `Count`."""

    def __init__(self, count: Count) -> None:
        from triton.runtime import interpreter

        if not isinstance(interpreter.tl.sum, interpreter.InterpretedFunction):
            raise RuntimeError(
                "counted: TRITON_INTERPRET must be 1 before triton is imported, got it unset"
            )
        self.triton = interpreter
        self.builder = interpreter.interpreter_builder
        if "create_dot" in vars(self.builder):
            raise RuntimeError("counted: one block at a time is counted, got one inside another")
        self.count = count
        self.launch = Launch("")
        self.storages: list[_Storage] = []
        self.program = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        hooks = {
            "set_grid_idx": self.start_program,
            "create_masked_load": partial(self.access, "load"),
            "create_masked_store": partial(self.access, "store"),
            "create_atomic_rmw": self.atomic,
            "create_atomic_cas": self.compare_and_swap,
            "create_dot": self.dot,
        }
        executor = self.triton.GridExecutor
        call = executor.__call__
        for name, hook in hooks.items():  # on the one builder, so that deleting them restores it
            setattr(self.builder, name, partial(hook, getattr(self.builder, name)))
        executor.__call__ = lambda *args, **kwargs: self.run(call, *args, **kwargs)
        self.builder.multiplies_bfloat16 = True  # the ops refuse bfloat16 without it
        try:
            yield
        finally:
            executor.__call__ = call
            for name in (*hooks, "multiplies_bfloat16"):
                delattr(self.builder, name)

    def run(self, call: Callable, executor: Any, *args: Any, **kwargs: Any) -> None:
        copy_in = executor._init_args_hst

        def copy_in_seen(args: Any, kwargs: Any) -> Any:  # the addresses are those of the copies
            copies, named = copy_in(args, kwargs)
            self.open([*zip(executor.arg_names, copies, strict=False), *named.items()])
            return copies, named

        executor._init_args_hst = copy_in_seen
        self.launch = Launch(executor.fn.__name__)
        self.count.launches.append(self.launch)
        self.count._torch.seen_inside += 1
        try:
            with self.count._torch.paused():
                call(executor, *args, **kwargs)
        finally:
            self.close()

    def open(self, arguments: list[tuple[str, Any]]) -> None:
        found: dict[int, _Storage] = {}
        for name, value in arguments:
            for tensor in _tensors(value):
                storage = tensor.untyped_storage()
                if storage.nbytes():
                    found.setdefault(storage.data_ptr(), _Storage(tensor)).add(name, tensor)
        self.storages = list(found.values())

    def close(self) -> None:
        launch, self.launch = self.launch, Launch("")
        for storage in self.storages:
            launch.unique_loaded += storage.unique("load")
            launch.unique_stored += storage.unique("store")
            launch.unique_atomics += storage.unique("atomic")
            for what, size in storage.hazards():
                launch.hazards += size
                if size:
                    launch.where[f"{'/'.join(storage.names)} {what}, bytes"] += size
        self.storages = []

    def start_program(self, original: Callable, x: int, y: int, z: int) -> None:
        grid = self.launch.grid = self.builder.grid_dim
        self.program = (x * grid[1] + y) * grid[2] + z
        self.launch.programs += 1
        original(x, y, z)

    def mark(self, kind: str, pointers: Any, mask: Any) -> tuple[int, Any]:
        """Bytes of the lanes that are on, and the mask of those that may touch memory."""
        addresses = pointers.data.astype(np.int64)
        on = np.broadcast_to(np.asarray(mask.data, dtype=bool), addresses.shape)
        size = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
        active = addresses[on]
        if not active.size:
            return 0, mask
        self.launch.sectors += 32 * np.unique(active // 32).size
        inside = np.zeros(active.shape, bool)
        for storage in self.storages:
            if active.max() < storage.base or storage.end <= active.min():
                continue
            here = (storage.base <= active) & (active + size <= storage.end)
            lanes = active[here]
            storage.touch(kind, lanes, size, self.program)
            beyond = int(((lanes < storage.low) | (lanes + size > storage.high)).sum())
            self.outside(beyond, f"{'/'.join(storage.names)} {kind} beyond the view, lanes")
            inside |= here
        if inside.all():
            return active.size * size, mask
        self.outside(int((~inside).sum()), f"{kind} outside every tensor, lanes")
        safe = on.copy()
        safe[on] = inside
        return active.size * size, self.triton.TensorHandle(safe, self.triton.tl.int1)

    def outside(self, lanes: int, what: str) -> None:
        if lanes:
            self.launch.out_of_bounds += lanes
            self.launch.where[what] += lanes

    def access(self, kind: str, original: Callable, pointers: Any, *rest: Any, **named: Any) -> Any:
        """A load (mask, other, ...) or a store (value, mask, ...)."""
        position = 0 if kind == "load" else 1
        size, mask = self.mark(kind, pointers, rest[position])
        if kind == "load":
            self.launch.loaded += size
        else:
            self.launch.stored += size
        return original(pointers, *rest[:position], mask, *rest[position + 1 :], **named)

    def atomic(
        self, original: Callable, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        size, mask = self.mark("atomic", pointers, mask)
        self.launch.atomics += size
        return original(op, pointers, value, mask, *rest)

    def compare_and_swap(self, original: Callable, pointers: Any, *rest: Any) -> Any:
        every = self.triton.TensorHandle(np.ones(pointers.data.shape, bool), self.triton.tl.int1)
        size, mask = self.mark("atomic", pointers, every)
        self.launch.atomics += size
        if mask is not every:  # it has no mask to leave a lane out by
            raise IndexError(f"{self.launch.kernel}: an atomic_cas must stay inside its tensors")
        return original(pointers, *rest)

    def dot(self, original: Callable, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        self.launch.flops += 2 * prod(a.data.shape) * b.data.shape[-1]
        tl = self.triton.tl
        if a.dtype.scalar == tl.bfloat16:  # kept as uint16: the upper half of an fp32
            a, b = (
                self.triton.TensorHandle(
                    (each.data.astype(np.uint32) << 16).view(np.float32), tl.float32
                )
                for each in (a, b)
            )
        return original(a, b, acc, *rest)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an argument: itself, of a tuple, or behind a descriptor."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif hasattr(value, "base"):
        yield from _tensors(value.base)
