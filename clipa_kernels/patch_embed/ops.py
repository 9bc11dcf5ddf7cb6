"""The custom operators behind patch_embed: one pair in plain torch, one of the Triton kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..check import once_operator


def is_hwc(images: Tensor) -> bool:
    """Whether a pixel's channels lie next to each other, and pixels of a row end to end."""
    return images.stride(1) == 1 and images.stride(3) == images.shape[1]


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


def _tokens(images: Tensor, keep: Tensor | None, side: int, prefix: int) -> int:
    """Of an image, prefix rows among them."""
    height, width = images.shape[2:]
    return prefix + (height // side * (width // side) if keep is None else keep.shape[1])


@torch.library.custom_op("clipa::patch_embed_tokens", mutates_args=())
def embed_tokens(
    images: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    table: Tensor | None,
    side: int,
    prefix: int,
    pixels: int,
) -> tuple[Tensor, Tensor]:
    """[B, R + K, D] on a GPU, and the copy of the patches that its backward takes.

    weight [D, width] is for `pixels` columns of pixels, runs next to each other as in memory, uint8
    less 128; then for positions, or table [R + L, D] has them, which is added to the tokens.
    """
    from .kernels import patch_copy
    from .kernels_table import table_rows

    batch, size, (d, width) = images.shape[0], _tokens(images, keep, side, prefix), weight.shape
    hwc = is_hwc(images)
    patches = patch_copy(images, keep, side, prefix, hwc, pixels, width, weight.dtype)
    if table is None:
        return (patches @ weight.t()).view(batch, size, d), patches
    table = table.to(weight.dtype)
    if keep is None:
        out = table.expand(batch, -1, -1).clone(memory_format=torch.contiguous_format)
    else:
        out = F.embedding(table_rows(keep, prefix), table)
    out.view(-1, d).addmm_(patches, weight.t())
    return out, patches


@torch.library.custom_op("clipa::patch_embed_tokens_backward", mutates_args=())
def _tokens_backward(
    dx: Tensor, patches: Tensor, keep: Tensor | None, rows: int, prefix: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight, and in fp32 of the `rows` of the table."""
    from .kernels_table import table_grad

    dx = dx.contiguous()
    with torch.autocast(dx.device.type, enabled=False):
        dweight = dx.flatten(0, 1).t() @ patches
    if not rows:
        return dweight, dx.new_empty(0, dtype=torch.float32)
    return dweight, table_grad(dx, keep, rows, prefix)


@embed_tokens.register_fake
def _(images, keep, weight, table, side, prefix, pixels):
    batch, size = images.shape[0], _tokens(images, keep, side, prefix)
    tokens = weight.new_empty(batch, size, weight.shape[0])
    return tokens, weight.new_empty(batch * size, weight.shape[1])


@_tokens_backward.register_fake
def _(dx, patches, keep, rows, prefix):
    dtable = dx.new_empty((rows, dx.shape[2]) if rows else 0, dtype=torch.float32)
    return dx.new_empty(dx.shape[2], patches.shape[1]), dtable


def _save_tokens(ctx, inputs, output) -> None:
    images, keep, weight, table, ctx.side, ctx.prefix, ctx.pixels = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.rows, ctx.table_dtype = (0, None) if table is None else (table.shape[0], table.dtype)
    of_pixels = (images, weight) if images.is_floating_point() else (None, None)
    ctx.save_for_backward(output[1], keep, *of_pixels)


def _tokens_gradient(ctx, dx: Tensor, _: None):
    patches, keep, images, weight = ctx.saved_tensors
    dimages = None
    if ctx.needs_input_grad[0]:
        weight = weight[:, : ctx.pixels]
        if not is_hwc(images):
            runs = weight.reshape(weight.shape[0], images.shape[1], -1)
            weight = runs.transpose(1, 2).flatten(1)
        dimages = torch.ops.clipa.patch_embed_backward_images(
            dx[:, ctx.prefix :].contiguous(), images, keep, weight, ctx.side
        )
    dweight, dtable = torch.ops.clipa.patch_embed_tokens_backward(
        dx, patches, keep, ctx.rows, ctx.prefix
    )
    dtable = dtable.to(ctx.table_dtype) if ctx.rows else None
    return dimages, None, dweight, dtable, None, None, None


embed_tokens.register_autograd(_tokens_gradient, setup_context=_save_tokens)
for _operator in (_backward, _backward_images, _tokens_backward):
    once_operator(_operator, "patch_embed")
