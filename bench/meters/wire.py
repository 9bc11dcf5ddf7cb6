"""Bytes that this process sends to the others of its groups, by collective.

    with wire_bytes() as wire:                  # in each process, whatever the backend
        loss(image, text).backward()
    print(wire.sent, wire.by_op)

Counted from the arguments of each call, with the ring algorithms' formula, W processes and n bytes
of this process's tensors, rounded down:

    all_gather      (W - 1) n            n: the own part
    reduce_scatter  (W - 1) n / W        n: the whole input
    all_reduce      2 (W - 1) n / W
    all_to_all      n less what it keeps for itself
    broadcast       n, 0 on the last of the ring (the one before the root)
    reduce, gather  n, 0 on the root
    scatter         n (W - 1) / W on the root, n: its list; 0 elsewhere
    send            n; receive and barrier 0

Every call of torch.distributed and of torch.distributed.nn ends in an operator of the c10d library,
which is where they are seen: also those in a backward pass. Of gloo, torch.distributed.nn sends
the gradient of all_gather as W scatters, one from each process, (W - 1) n / W bytes as well.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = {"barrier", "monitored_barrier", "recv", "recv_any_source"}


class wire_bytes(TorchDispatchMode):
    """Context manager: sent, the bytes this process sends; by_op and calls, by collective.

    Args:
        group: count the calls over this group alone; None, all calls.

    Raises: NotImplementedError at a collective that it has no formula for.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.by_op: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._group = group

    @property
    def sent(self) -> int:
        """Bytes in all."""
        return sum(self.by_op.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace.startswith("_c10d_functional"):
            raise NotImplementedError(
                f"wire_bytes: collectives must be those of torch.distributed, got {func}"
            )
        if func.namespace == "c10d":
            given = zip((each.name for each in func._schema.arguments), args, strict=False)
            self._count(func._schema.name.removeprefix("c10d::").strip("_"), dict(given) | kwargs)
        return func(*args, **kwargs)

    def _count(self, name: str, given: dict[str, Any]) -> None:
        group = dist.ProcessGroup.unbox(given["process_group"])
        if self._group is not None and group.group_name != self._group.group_name:
            return
        self.calls[name] += 1
        self.by_op[name] += _sent(name, given, group.rank(), group.size())


def _bytes(tensors: Any) -> int:
    return sum(each.nbytes for each in tree_leaves(tensors) if isinstance(each, Tensor))


def _sent(name: str, given: dict[str, Any], rank: int, size: int) -> int:
    """Bytes that process rank of size sends in one call."""
    moved = next((given[key] for key in _INPUTS if key in given), None)
    n, root = _bytes(moved), given.get("root_rank")
    if name in FREE:
        return 0
    if name == "send":
        return n
    if name.startswith("allgather"):
        return (size - 1) * n
    if name.startswith("reduce_scatter"):
        return (size - 1) * n // size
    if name.startswith("allreduce"):
        return 2 * (size - 1) * n // size
    if name == "alltoall":
        return n - moved[rank].nbytes
    if name == "alltoall_base":
        rows = given["input_split_sizes"]
        own = n * rows[rank] // max(sum(rows), 1) if rows else n // size
        return n - own
    if name == "broadcast":
        return 0 if (rank + 1) % size == root else n
    if name in ("reduce", "gather", "gather_into_tensor"):
        return 0 if rank == root else n
    if name == "scatter":
        return (size - 1) * n // size
    raise NotImplementedError(f"wire_bytes: a collective must have a formula, got c10d::{name}")


# Names of what a collective takes in; the others are given one list that they change.
_INPUTS = ("input_tensors", "input_tensor", "inputs", "input_list", "input", "tensors", "tensor")
