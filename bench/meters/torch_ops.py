"""What eager torch asks of the machine: calls, launches, bytes, matmul FLOPs and live memory.

It sees every aten operator below autograd, so forward and backward alike, on any device and on
fake tensors. Operators that Python defines (`torch.library.custom_op`) are entered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Operators whose first tensor is written without being read, by the name without "_like" and "_".
WRITES_ONLY = {
    "bernoulli", "copy", "exponential", "fill", "full", "geometric", "log_normal", "normal", "ones",
    "rand", "randint", "randn", "random", "uniform", "zero", "zeros", "new_full", "new_ones",
    "new_zeros",
}  # fmt: skip
# Reads what it picks out of the first tensor, at most all of it.
PICKS = {"embedding", "gather", "index", "index_select", "take"}
# Writes what it picks out of the first tensor, not all of it.
SCATTERS = {
    "_index_put_impl_", "index_add_", "index_copy_", "index_put_", "scatter_", "scatter_add_",
}  # fmt: skip
# Position of the left factor [.., M, K] among the arguments.
MATMULS = {"_scaled_mm": 0, "addmm": 1, "addmv": 1, "baddbmm": 1, "bmm": 0, "dot": 0, "mm": 0}
MATMULS |= {"_addmm_activation": 1, "mv": 0}
# CUDA kernels a call, at least, where one is not enough: the gradient of the input and those of
# the parameters (ATen/native/cuda/layer_norm_kernel.cu), a sort and a sum (Embedding.cu).
LAUNCHES = {"native_layer_norm_backward": 2, "embedding_dense_backward": 2}
# Namespaces of what moves no memory here: wire.py counts collectives; fake tensors ask for `prim`,
# which the dispatcher does not know.
UNCOUNTED = {"c10d", "_c10d_functional", "prim"}


@dataclass
class TorchOp:
    """All calls of one operator. Bytes and FLOPs are the least that its definition asks for."""

    name: str
    calls: int = 0
    launches: int = 0
    read: int = 0
    written: int = 0
    flops: int = 0


class TorchCounter(TorchDispatchMode):
    """Counts the operators of its block, by name.

    Read and written: the distinct elements of each tensor (a broadcast dimension once), an operand
    passed twice once. Views, empty allocations and metadata cost nothing.
    new_bytes: all storages made in the block; peak_bytes: the most of them alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[str, TorchOp] = {}
        self.new_bytes = self.live_bytes = self.peak_bytes = 0
        self.seen_inside = 0  # operators and launches so far: did a custom op consist of any?
        self._paused = False
        self._storages: set[int] = set()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is counted in this block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused or func.namespace in UNCOUNTED:
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        body = _python_body(func, tensors)
        before = self.seen_inside
        if body is None:
            out = func(*args, **kwargs)
        else:
            with self:
                out = body(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self._track(results, tensors)
        if self.seen_inside == before:
            self._count(func, args, kwargs, tensors, results)
        return out

    def _track(self, results: list[Tensor], tensors: list[Tensor]) -> None:
        old = {tensor.untyped_storage()._cdata for tensor in tensors}
        for result in results:
            storage = result.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in old or key in self._storages:
                continue
            self._storages.add(key)
            self.new_bytes += size
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live_bytes -= size

    def _count(
        self, func: Any, args: tuple, kwargs: dict, tensors: list[Tensor], results: list[Tensor]
    ) -> None:
        name = func._schema.name.split("::")[-1]
        changed = _changed(func, args, kwargs)
        inputs = {tensor.untyped_storage()._cdata for tensor in tensors}
        views = all(result.untyped_storage()._cdata in inputs for result in results)
        if (views and not changed) or name.startswith(("empty", "new_empty", "resize_", "set_")):
            return
        read, written = _traffic(func, name, args, kwargs, tensors, [*results, *changed])
        op = self.ops.setdefault(name, TorchOp(name))
        op.calls += 1
        op.launches += LAUNCHES.get(name, 1)
        op.read += read
        op.written += written
        op.flops += _flops(func, name, args, kwargs, results)
        self.seen_inside += 1


def _python_body(func: Any, tensors: list[Tensor]) -> Any:
    """The Python function behind a custom operator, or None.

    Called directly: dispatching to it would run it with this mode off, and its parts unseen.
    """
    definition = OPDEFS.get(func._schema.name)
    if definition is None:
        return None
    device = tensors[0].device.type if tensors else "cpu"
    bodies = definition._backend_fns
    return bodies.get(device, bodies.get(None))


def _changed(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that the operator writes in place or into out=."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    written = [
        given.get(argument.name)
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor)]


def _bytes(tensors: list[Tensor]) -> int:
    """Bytes of the distinct elements, each view once."""
    sizes: dict[tuple[int, int], int] = {}
    for tensor in tensors:
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        count = prod(size if stride or not size else 1 for size, stride in pairs)
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset())
        sizes[key] = max(sizes.get(key, 0), count * tensor.element_size())
    return sum(sizes.values())


def _traffic(
    func: Any, name: str, args: tuple, kwargs: dict, tensors: list[Tensor], written: list[Tensor]
) -> tuple[int, int]:
    """Bytes (read, written)."""
    out = [kwargs[a.name] for a in func._schema.arguments if a.is_out and a.name in kwargs]
    read = [tensor for tensor in tensors if not any(tensor is o for o in out)]
    first, rest = read[:1], read[1:]
    if name.removesuffix("_").removesuffix("_like") in WRITES_ONLY or kwargs.get("beta") == 0:
        return _bytes(rest), _bytes(written)  # beta 0: what addmm and baddbmm add is not read
    if name in PICKS:
        return _bytes(rest) + min(_bytes(first), _bytes(written)), _bytes(written)
    if name in SCATTERS:
        moved = max((tensor.numel() for tensor in rest), default=0) * first[0].element_size()
        adds = "add" in name or kwargs.get("accumulate") or any(arg is True for arg in args[3:4])
        return _bytes(rest) + (moved if adds else 0), moved
    if name in ("nll_loss_forward", "nll_loss_backward"):  # one column of each row
        target = next(tensor for tensor in tensors if tensor.dtype == torch.int64)
        return _bytes([target]) + target.numel() * tensors[0].element_size(), _bytes(written)
    return _bytes(read), _bytes(written)


def _flops(func: Any, name: str, args: tuple, kwargs: dict, results: list[Tensor]) -> int:
    """2 M N K of a matrix product, with any out_dtype; convolutions and attention as torch says."""
    left = MATMULS.get(name.removesuffix("_"))
    if left is not None:
        return 2 * results[0].numel() * args[left].shape[-1]
    formula = flop_registry.get(func._overloadpacket)
    out = results if len(results) > 1 else results[0] if results else None
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0
