"""The losses over a process group: all collectives, and none inside a custom operator.

Rows of images stay where they are. Text features are gathered and their gradients reduced and
scattered back; column sums are exchanged, two floats a column, merged by the column's owner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from . import _contrastive_ops, _strips

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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


def require_same_shape(
    name: str, features: object, error: Exception | None, group: ProcessGroup
) -> None:
    """ValueError on every process unless all bring features of one shape; RuntimeError on those
    whose own arguments are right where another's are not.

    One small gather a call. It goes over the group's CPU backend where it has one ("cpu:gloo,
    cuda:nccl"); with NCCL alone the sizes travel through the device, which waits for it.
    """
    _, size = rank_and_size(name, group)
    shape = [-1, -1]
    if (
        isinstance(features, Tensor)
        and features.dim() == 2
        and (error is None or not len(features))
    ):
        shape = list(features.shape)
    device = "cpu" if "cpu:" in str(dist.get_backend_config(group)) else "cuda"
    shapes = torch.empty(size, 2, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(shapes, torch.tensor([shape], device=device), group=group)
    shapes = shapes.tolist()
    if error is None and [-1, -1] in shapes:
        culprit = shapes.index([-1, -1])
        raise RuntimeError(
            f"{name}: every process must pass valid arguments, got an error on rank {culprit}"
        )
    different = sorted({tuple(shape) for shape in shapes if shape != [-1, -1]})
    if len(different) > 1:
        came = ", ".join(
            f"{rows}x{width} on rank {shapes.index([rows, width])}" for rows, width in different
        )
        raise ValueError(f"{name}: every process must bring features of one size, got {came}")


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


def group_contrastive(image: Tensor, text: Tensor, scale: Tensor, group: ProcessGroup) -> Tensor:
    """The contrastive loss of this process's pairs against all."""
    return _GroupContrastive.apply(image, text, scale, group)


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
        return _reduce_scatter(grad, ctx.group), None


class _GroupContrastive(torch.autograd.Function):
    """Each process makes the logits of its rows once forward and once backward."""

    @staticmethod
    def forward(ctx, image: Tensor, text: Tensor, scale: Tensor, group: ProcessGroup) -> Tensor:
        first = dist.get_rank(group) * image.shape[0]
        all_text = _all_gather(text, group)
        rows, cols = _contrastive_ops.contrastive_stats(image, all_text, scale, first)
        own_cols = _merge_columns(cols, group)
        ctx.save_for_backward(image, all_text, scale, rows, own_cols)
        ctx.first, ctx.group = first, group
        return _strips.softmax_loss(rows, own_cols)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        image, all_text, scale, rows, own_cols = ctx.saved_tensors
        rows, own_cols = _strips.softmax_divisors(rows, own_cols, d_loss)
        cols = _all_gather(own_cols.t(), ctx.group).t().contiguous()
        wanted = list(ctx.needs_input_grad[:3])
        d_image, d_text, d_scale = _contrastive_ops.contrastive_grads(
            image, all_text, scale, rows, cols, ctx.first, wanted
        )
        return (
            d_image if wanted[0] else None,
            _reduce_scatter(d_text, ctx.group) if wanted[1] else None,
            d_scale if wanted[2] else None,
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


def _reduce_scatter(rows: Tensor, group: ProcessGroup) -> Tensor:
    """[N, ...] summed over the processes, the own [M, ...] of it."""
    if not rows.is_cuda:
        return _exchange(rows, group).sum(0, dtype=_strips.compute_dtype(rows)).to(rows.dtype)
    own = rows.new_empty(rows.shape[0] // dist.get_world_size(group), *rows.shape[1:])
    dist.reduce_scatter_tensor(own, rows.contiguous(), group=group)
    return own
