"""The custom operators behind patch_embed: one pair in plain torch, one of the Triton kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..check import once_operator


def _patches(images: Tensor, keep: Tensor | None, side: int) -> Tensor:
    """Pixels of the kept patches, [B, K, P * P * C] in the order (y, x, channel), a copy."""
    batch, channels, height, width = images.shape
    rows, columns = height // side, width // side
    grid = images.view(batch, channels, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
    if keep is None:
        return grid.reshape(batch, rows * columns, side * side * channels)
    image = torch.arange(batch, device=images.device).unsqueeze(1)
    kept = grid[image, keep.div(columns, rounding_mode="floor"), keep.remainder(columns)]
    return kept.flatten(2)


@torch.library.custom_op("clipa::patch_embed", mutates_args=())
def embed_patches(
    images: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    side: int,
) -> Tensor:
    """[B, K, D] in plain torch: weight [D, P * P * C] in _patches' order, positions [L, D]."""
    x = F.linear(_patches(images, keep, side).to(weight.dtype), weight, bias)
    return x.add_(positions if keep is None else positions[keep])


@torch.library.custom_op("clipa::patch_embed_backward", mutates_args=())
def _backward(
    dx: Tensor, images: Tensor, keep: Tensor | None, weight: Tensor, side: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, bias and positions; the patches are gathered again."""
    flat = dx.flatten(0, 1)
    patches = _patches(images, keep, side).flatten(0, 1).to(weight.dtype)
    wide = torch.promote_types(dx.dtype, torch.float32)
    if keep is None:
        dpositions = dx.sum(0, dtype=wide)
    else:  # sorted sums: no atomics on a GPU
        dpositions = torch.ops.aten.embedding_dense_backward(dx.to(wide), keep, rows, -1, False)
    dbias = flat.sum(0, dtype=wide).to(dx.dtype)
    return flat.t() @ patches, dbias, dpositions.to(dx.dtype)


@torch.library.custom_op("clipa::patch_embed_backward_images", mutates_args=())
def _backward_images(
    dx: Tensor, images: Tensor, keep: Tensor | None, weight: Tensor, side: int
) -> Tensor:
    """Gradient of floating images; zero where no patch was kept, a sum where one was kept twice."""
    batch, channels, height, width = images.shape
    rows, columns = height // side, width // side
    dpatches = (dx @ weight).to(images.dtype)
    if keep is not None:
        full = dpatches.new_zeros(batch, rows * columns, dpatches.shape[-1])
        image = torch.arange(batch, device=images.device).unsqueeze(1)
        # Sorted, so a repeated index gives the same bits on every run on a GPU as well.
        dpatches = full.index_put_((image, keep.long()), dpatches, accumulate=True)
    grid = dpatches.view(batch, rows, columns, side, side, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(images.shape)


@embed_patches.register_fake
def _(images, keep, weight, bias, positions, side):
    kept = positions.shape[0] if keep is None else keep.shape[1]
    return weight.new_empty(images.shape[0], kept, weight.shape[0])


@_backward.register_fake
def _(dx, images, keep, weight, side, rows):
    width = weight.shape[0]
    return weight.new_empty(weight.shape), dx.new_empty(width), dx.new_empty(rows, width)


@_backward_images.register_fake
def _(dx, images, keep, weight, side):
    return torch.empty(images.shape, dtype=images.dtype, device=images.device)


def _save(ctx, inputs, output) -> None:
    images, keep, weight, bias, positions, ctx.side = inputs
    ctx.has_bias, ctx.rows = bias is not None, positions.shape[0]
    ctx.save_for_backward(images, keep, weight)


def _gradient(ctx, dx: Tensor):
    images, keep, weight = ctx.saved_tensors
    dx = dx.contiguous()
    dimages = None
    if ctx.needs_input_grad[0]:
        dimages = torch.ops.clipa.patch_embed_backward_images(dx, images, keep, weight, ctx.side)
    dweight, dbias, dpositions = torch.ops.clipa.patch_embed_backward(
        dx, images, keep, weight, ctx.side, ctx.rows
    )
    return dimages, None, dweight, dbias if ctx.has_bias else None, dpositions, None


embed_patches.register_autograd(_gradient, setup_context=_save)


@torch.library.custom_op("clipa::patch_embed_tokens", mutates_args=())
def embed_tokens(
    images: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor,
    side: int,
    prefix: int,
) -> Tensor:
    """[B, R + K, D] by the kernels: weight as _in_runs, table the prefix rows and positions.

    uint8 images enter the product less 128.
    """
    from ..launch import require_products
    from . import kernels

    require_products("patch_embed", weight)
    return kernels.forward(images, keep, weight, bias, table, side, prefix)


@torch.library.custom_op("clipa::patch_embed_tokens_backward", mutates_args=())
def _tokens_backward(
    dx: Tensor,
    images: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    table: Tensor,
    side: int,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, bias (in fp32) and table."""
    from . import kernels

    dx = dx.contiguous()
    rows = table.shape[0]
    dweight, dtable = kernels.backward(dx, images, keep, weight, side, prefix, rows)
    dbias = dtable[prefix:].sum(0)
    return dweight, dbias, dtable.to(table.dtype)


@embed_tokens.register_fake
def _(images, keep, weight, bias, table, side, prefix):
    kept = table.shape[0] - prefix if keep is None else keep.shape[1]
    return weight.new_empty(images.shape[0], prefix + kept, weight.shape[0])


@_tokens_backward.register_fake
def _(dx, images, keep, weight, table, side, prefix):
    width = weight.shape[0]
    dbias = weight.new_empty(width, dtype=torch.float32)
    return weight.new_empty(weight.shape), dbias, table.new_empty(table.shape)


def _save_tokens(ctx, inputs, output) -> None:
    images, keep, weight, bias, table, ctx.side, ctx.prefix = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(images, keep, weight, table)


def _tokens_gradient(ctx, dx: Tensor):
    images, keep, weight, table = ctx.saved_tensors
    dimages = None
    if ctx.needs_input_grad[0]:
        if not (images.stride(1) == 1 and images.stride(3) == images.shape[1]):
            pixels = weight.view(weight.shape[0], images.shape[1], -1)
            weight_yxc = pixels.transpose(1, 2).flatten(1)
        else:
            weight_yxc = weight
        dimages = torch.ops.clipa.patch_embed_backward_images(
            dx[:, ctx.prefix :].contiguous(), images, keep, weight_yxc, ctx.side
        )
    dweight, dbias, dtable = torch.ops.clipa.patch_embed_tokens_backward(
        dx, images, keep, weight, table, ctx.side, ctx.prefix
    )
    dbias = None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype)
    return dimages, None, dweight, dbias, dtable, None, None


embed_tokens.register_autograd(_tokens_gradient, setup_context=_save_tokens)
for _operator in (_backward, _backward_images, _tokens_backward):
    once_operator(_operator, "patch_embed")
