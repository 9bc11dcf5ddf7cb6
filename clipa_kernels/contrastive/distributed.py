"""The losses over a process group: all collectives, and none inside a custom operator.

Rows of images stay where they are. Text features are gathered in chunks, each of which travels
while the tiles of the one before are made, and their gradients go back to their owners likewise;
column sums are exchanged, two floats a column, merged by the column's owner.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..check import once
from . import ops, plain

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Chunks that texts travel in: at most _CHUNKS, each of at least _CHUNK_ROWS rows a process, since
# the tiles of a chunk must fill the device.
_CHUNKS, _CHUNK_ROWS = 4, 512

IMPLS = ("triton", "torch", "reference")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def rank_and_size(name: str, group: ProcessGroup | None) -> tuple[int, int]:
    """This process's place in the group; (0, 1) without one. RuntimeError where it is unusable."""
    if group is None:
        return 0, 1
    try:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
    except (ValueError, RuntimeError, KeyError) as error:
        raise RuntimeError(f"{name}: the process group must be alive, got {error}") from error
    if rank < 0:
        raise RuntimeError(f"{name}: this process must be in the group, got a group without it")
    return rank, size


def default_group(name: str, rank: int, size: int) -> ProcessGroup:
    """The default process group, if it is the one that a loss was built for."""
    if not dist.is_initialized():
        raise RuntimeError(f"{name}: world_size {size} needs a process group, got none initialised")
    came = (dist.get_rank(), dist.get_world_size())
    if came != (rank, size):
        raise RuntimeError(
            f"{name}: rank and world_size must be the default group's {came}, got {(rank, size)}"
        )
    return dist.group.WORLD


def require_alike(
    name: str, features: object, impl: str, error: Exception | None, group: ProcessGroup
) -> None:
    """ValueError on every process unless all bring features of one shape and dtype and compute in
    one way; RuntimeError on those whose own arguments are right where another's are not.

    One small gather a call. It goes over the group's CPU backend where it has one ("cpu:gloo,
    cuda:nccl"); with NCCL alone the numbers travel through the device, which waits for it.
    """
    _, size = rank_and_size(name, group)
    mine = [-1, -1, -1, -1]
    if (
        isinstance(features, Tensor)
        and features.dim() == 2
        and features.dtype in _DTYPES
        and (error is None or not len(features))
    ):
        mine = [*features.shape, _DTYPES.index(features.dtype), IMPLS.index(impl)]
    device = "cpu" if "cpu:" in str(dist.get_backend_config(group)) else "cuda"
    gathered = torch.empty(size, len(mine), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(gathered, torch.tensor([mine], device=device), group=group)
    rows = gathered.tolist()
    if error is None and [-1] * len(mine) in rows:
        culprit = rows.index([-1] * len(mine))
        raise RuntimeError(
            f"{name}: every process must pass valid arguments, got an error on rank {culprit}"
        )
    told = [
        (f"{height}x{width}", str(_DTYPES[dtype]), IMPLS[way])
        for height, width, dtype, way in rows
        if height >= 0
    ]
    for what, values in zip(
        ("bring features of one size", "bring features of one dtype", "compute by one impl"),
        zip(*told, strict=True),
        strict=True,
    ):
        if len(set(values)) > 1:
            ranks = (f"{value} on rank {values.index(value)}" for value in sorted(set(values)))
            raise ValueError(f"{name}: every process must {what}, got {', '.join(ranks)}")


def mean_over_group(value: Tensor, group: ProcessGroup) -> Tensor:
    """The mean of a scalar over the processes, with the gradient of the own one."""
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return value + (total / dist.get_world_size(group) - value.detach())


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """value, whose gradient is multiplied by factor."""
    return _ScaleGradient.apply(value, factor)


def gather_rows(features: Tensor, group: ProcessGroup | None) -> Tensor:
    """[M, E] of each process to [N, E] on all; the gradients are summed over the processes."""
    return features if group is None else _GatherRows.apply(features, group)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(features, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _SumRows.apply(grad, ctx.group), None


class _SumRows(torch.autograd.Function):
    """_GatherRows' transpose, and the other way round: both differentiate any number of times."""

    @staticmethod
    def forward(ctx, grad: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _ReduceScatter(grad, group).wait()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _GatherRows.apply(grad, ctx.group), None


class _Chunk(NamedTuple):
    """Texts from begin to end of every process, [W (end - begin), E], valid after wait()."""

    begin: int
    end: int
    text: Tensor
    work: dist.Work
    first: int  # the own rows' positives, as plain.Pairs

    def wait(self) -> Tensor:
        self.work.wait()
        return self.text

    @property
    def pairs(self) -> plain.Pairs:
        return plain.Pairs(self.first, self.begin, self.end)


def _gather_chunks(text: Tensor, group: ProcessGroup) -> list[_Chunk]:
    """Starts to gather the texts of all processes, so that tiles of one chunk cover the next."""
    text, size, rank = text.contiguous(), dist.get_world_size(group), dist.get_rank(group)
    m = text.shape[0]
    count = max(1, min(_CHUNKS, m // _CHUNK_ROWS))
    edges = [m * i // count for i in range(count + 1)]
    chunks = []
    for begin, end in itertools.pairwise(edges):
        gathered = text.new_empty(size * (end - begin), text.shape[1])
        work = dist.all_gather_into_tensor(gathered, text[begin:end], group=group, async_op=True)
        chunks.append(_Chunk(begin, end, gathered, work, rank * (end - begin) - begin))
    return chunks


class GroupContrastive(torch.autograd.Function):
    """(loss, zero): the contrastive loss of this process's pairs against all. Each process makes
    the logits of its rows once forward and once backward."""

    @staticmethod
    def forward(
        ctx, image: Tensor, text: Tensor, scale: Tensor, group: ProcessGroup, kernels: bool
    ) -> tuple[Tensor, Tensor]:
        size, m = dist.get_world_size(group), image.shape[0]
        chunks = _gather_chunks(text, group)
        rows = scale.new_empty(3, m)
        cols = scale.new_empty(2, size, m)
        for chunk in chunks:
            mine, theirs = ops.contrastive_stats(image, chunk.wait(), scale, *chunk.pairs, kernels)
            own = slice(chunk.begin, chunk.end)
            plain.merge(rows[:2], mine[0], mine[1], is_first=chunk.begin == 0)
            rows[2, own] = mine[2, own]
            cols[:, :, own] = theirs.view(2, size, -1)
        own_cols = _merge_columns(cols.flatten(1), group)
        texts, zero = [chunk.text for chunk in chunks], scale.new_zeros(())
        ctx.save_for_backward(image, scale, rows, own_cols, *texts, zero)
        ctx.pairs, ctx.group, ctx.kernels = [chunk.pairs for chunk in chunks], group, kernels
        ctx.set_materialize_grads(False)
        return plain.softmax_loss(rows, own_cols), zero

    @staticmethod
    @once("contrastive_loss")
    def backward(ctx, d_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        image, scale, rows, own_cols, *texts, zero = ctx.saved_tensors
        d_loss = zero if d_loss is None else d_loss  # unused here, but others wait
        size, wanted = dist.get_world_size(ctx.group), list(ctx.needs_input_grad[:3])
        rows, own_cols = plain.softmax_divisors(rows, own_cols, d_loss)
        cols = _all_gather(own_cols.t(), ctx.group).t().view(2, size, -1)
        d_image, d_scale, sums = None, 0, []
        one = torch.ones_like(scale)
        for text, pairs in zip(texts, ctx.pairs, strict=True):
            own = cols[:, :, pairs.begin : pairs.end].flatten(1)
            part, d_text, d_own_scale = ops.contrastive_grads(
                image, text, scale, rows, own, None, one, *pairs, wanted, True, ctx.kernels
            )
            if wanted[0]:
                d_image = part if d_image is None else d_image.add_(part)
            if wanted[1]:
                sums.append(_ReduceScatter(d_text.to(image.dtype), ctx.group))
            d_scale = d_scale + d_own_scale
        return (
            d_image.to(image.dtype) if wanted[0] else None,
            torch.cat([reduced.wait() for reduced in sums]) if wanted[1] else None,
            d_scale if wanted[2] else None,
            None,
            None,
        )


class GroupSigmoid(torch.autograd.Function):
    """(loss, zero): the sigmoid loss of this process's images against all texts. One pass over the
    chunks makes loss and gradients; those of texts travel in the backward."""

    @staticmethod
    def forward(
        ctx, image, text, scale, bias, group: ProcessGroup, kernels: bool
    ) -> tuple[Tensor, Tensor]:
        wanted = list(ctx.needs_input_grad[:4])
        totals, texts = None, []
        for chunk in _gather_chunks(text, group):
            loss, d_image, d_text, d_scale, d_bias = ops.sigmoid_loss(
                image, chunk.wait(), scale, bias, wanted, *chunk.pairs, kernels
            )
            parts = (loss, d_image, d_scale, d_bias)
            totals = (
                parts if totals is None else [a + b for a, b in zip(totals, parts, strict=True)]
            )
            texts.append(d_text)
        loss, *grads = totals
        zero = scale.new_zeros(())
        ctx.save_for_backward(*grads, *texts, zero)
        ctx.group, ctx.dtype = group, image.dtype
        ctx.set_materialize_grads(False)
        return loss, zero

    @staticmethod
    @once("sigmoid_loss")
    def backward(ctx, d_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        d_image, d_scale, d_bias, *texts, zero = ctx.saved_tensors
        d_loss = zero if d_loss is None else d_loss  # unused here, but others wait
        wanted, d_text = ctx.needs_input_grad, None
        if wanted[1]:
            sums = [_ReduceScatter((part * d_loss).to(ctx.dtype), ctx.group) for part in texts]
            d_text = torch.cat([reduced.wait() for reduced in sums])
        return (
            (d_image * d_loss).to(ctx.dtype) if wanted[0] else None,
            d_text,
            d_scale * d_loss if wanted[2] else None,
            d_bias * d_loss if wanted[3] else None,
            None,
            None,
        )


def _merge_columns(cols: Tensor, group: ProcessGroup) -> Tensor:
    """Partial (shift, sum) [2, N] of each process to the whole ones [2, M] of the own columns."""
    shift, total = _exchange(cols.t(), group).unbind(-1)
    high = shift.amax(0)
    return torch.stack([high, (total * (shift - high).exp2_()).sum(0)])


def _all_gather(rows: Tensor, group: ProcessGroup) -> Tensor:
    rows = rows.contiguous()
    gathered = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows, group=group)
    return gathered


def _exchange(rows: Tensor, group: ProcessGroup) -> Tensor:
    """[N, ...] to [W, M, ...]: the own rows as each process has them, in the order of ranks."""
    rows = rows.contiguous()
    received = torch.empty_like(rows)
    dist.all_to_all_single(received, rows, group=group)
    return received.unflatten(0, (dist.get_world_size(group), -1))


class _ReduceScatter:
    """[N, ...] summed over the processes, the own [M, ...] of it, from wait().

    Each process gets its rows from all and adds them in fp32: what travels is no more than a ring's
    reduce-scatter sends, and 16-bit gradients are rounded once, not at each hop.
    """

    def __init__(self, rows: Tensor, group: ProcessGroup):
        self.rows = rows.contiguous()
        self.received = torch.empty_like(self.rows)
        self.size = dist.get_world_size(group)
        self.work = dist.all_to_all_single(self.received, self.rows, group=group, async_op=True)

    def wait(self) -> Tensor:
        self.work.wait()
        parts = self.received.unflatten(0, (self.size, -1))
        return parts.sum(0, dtype=plain.compute_dtype(parts)).to(parts.dtype)
