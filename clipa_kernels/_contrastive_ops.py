"""The custom operators behind contrastive_loss and sigmoid_loss: opaque to torch.compile, without
collectives, and with autocast off inside, since the features arrive in the dtype to multiply in."""

import torch
from torch import Tensor

from . import _strips


@torch.library.custom_op("clipa::contrastive_stats", mutates_args=())
def contrastive_stats(
    image: Tensor, text: Tensor, scale: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    with torch.autocast(image.device.type, enabled=False):
        return _strips.softmax_stats(image, text, scale, first)


@contrastive_stats.register_fake
def _(image, text, scale, first):
    return scale.new_empty(3, image.shape[0]), scale.new_empty(2, text.shape[0])


@torch.library.custom_op("clipa::contrastive_grads", mutates_args=())
def contrastive_grads(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    rows: Tensor,
    cols: Tensor,
    first: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(image.device.type, enabled=False):
        grads = _strips.softmax_grads(image, text, scale, rows, cols, first, tuple(wanted))
    return tuple(scale.new_empty(0) if grad is None else grad for grad in grads)


@contrastive_grads.register_fake
def _(image, text, scale, rows, cols, first, wanted):
    return _like((image, text, scale), wanted)


@torch.library.custom_op("clipa::contrastive_loss", mutates_args=())
def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(image.device.type, enabled=False):
        rows, cols = _strips.softmax_stats(image, text, scale, 0)
        return _strips.softmax_loss(rows, cols), rows, cols


@contrastive_loss.register_fake
def _(image, text, scale):
    m = image.shape[0]
    return torch.empty_like(scale), scale.new_empty(3, m), scale.new_empty(2, m)


def _save_contrastive(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[1:])


def _contrastive_backward(ctx, d_loss, _rows, _cols):
    image, text, scale, rows, cols = ctx.saved_tensors
    if d_loss is None:
        return None, None, None
    rows, cols = _strips.softmax_divisors(rows, cols, d_loss)
    wanted = list(ctx.needs_input_grad)
    grads = contrastive_grads(image, text, scale, rows, cols, 0, wanted)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


contrastive_loss.register_autograd(_contrastive_backward, setup_context=_save_contrastive)


@torch.library.custom_op("clipa::contrastive_loss_one_tile", mutates_args=())
def contrastive_loss_one_tile(
    image: Tensor, text: Tensor, scale: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(image.device.type, enabled=False):
        results = _strips.softmax_pass(image, text, scale, tuple(wanted))
    return tuple(scale.new_empty(0) if result is None else result for result in results)


@contrastive_loss_one_tile.register_fake
def _(image, text, scale, wanted):
    return torch.empty_like(scale), *_like((image, text, scale), wanted)


@torch.library.custom_op("clipa::sigmoid_loss", mutates_args=())
def sigmoid_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, wanted: list[bool], first: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(image.device.type, enabled=False):
        results = _strips.sigmoid_pass(image, text, scale, bias, first, tuple(wanted))
    return tuple(scale.new_empty(0) if result is None else result for result in results)


@sigmoid_loss.register_fake
def _(image, text, scale, bias, wanted, first):
    return torch.empty_like(scale), *_like((image, text, scale, bias), wanted)


def _like(inputs: tuple[Tensor, ...], wanted: list[bool]) -> tuple[Tensor, ...]:
    """Fake gradients: like the input where wanted, else empty."""
    return tuple(
        torch.empty_like(value, memory_format=torch.contiguous_format)
        if want
        else inputs[-1].new_empty(0)
        for value, want in zip(inputs, wanted, strict=True)
    )


def _save_grads(ctx, inputs, output):
    """For operators that make the gradients in the forward."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.wanted, ctx.inputs = inputs[len(output) - 1], len(inputs)


def _times_d_loss(ctx, d_loss, *_grads):
    if d_loss is None:
        return (None,) * ctx.inputs
    grads = [
        grad * d_loss if want else None
        for grad, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]
    return *grads, *(None,) * (ctx.inputs - len(grads))


contrastive_loss_one_tile.register_autograd(_times_d_loss, setup_context=_save_grads)
sigmoid_loss.register_autograd(_times_d_loss, setup_context=_save_grads)
