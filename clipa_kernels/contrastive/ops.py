"""The custom operators behind contrastive_loss and sigmoid_loss: opaque to torch.compile, without
collectives, and with autocast off inside, since the features arrive in the dtype to multiply in.

first, begin, end: the positives, as plain.Pairs. kernels: Triton's tiles instead of torch's.
"""

from types import ModuleType

import torch
from torch import Tensor

from ..check import once_operator, refuse_second
from . import plain


def _forward(kernels: bool, image: Tensor) -> ModuleType:
    if not kernels:
        return plain
    from ..launch import require_products
    from . import kernels as tiles

    require_products("contrastive_loss", image)
    return tiles


def _backward(kernels: bool, image: Tensor, function: str = "contrastive_loss") -> ModuleType:
    if not kernels:
        return plain
    from ..launch import require_products
    from . import kernels_grads

    require_products(function, image)
    return kernels_grads


def _or_empty(results: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors: an empty one stands for None."""
    return tuple(like.new_empty(0) if result is None else result for result in results)


@torch.library.custom_op("clipa::contrastive_stats", mutates_args=())
def contrastive_stats(
    image: Tensor, text: Tensor, scale: Tensor, first: int, begin: int, end: int, kernels: bool
) -> tuple[Tensor, Tensor]:
    """As plain.softmax_stats: rows [3, M], cols [2, N]."""
    pairs = plain.Pairs(first, begin, end)
    with torch.autocast(image.device.type, enabled=False):
        return _forward(kernels, image).softmax_stats(image, text, scale, pairs)


@contrastive_stats.register_fake
def _(image, text, scale, first, begin, end, kernels):
    return scale.new_empty(3, image.shape[0]), scale.new_empty(2, text.shape[0])


@torch.library.custom_op("clipa::contrastive_grads", mutates_args=())
def contrastive_grads(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    rows: Tensor,
    cols: Tensor,
    slope: Tensor | None,
    d_loss: Tensor,
    first: int,
    begin: int,
    end: int,
    wanted: list[bool],
    wide: bool,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, text and scale, empty where not wanted; see plain.softmax_grads.

    slope: [], the scale's gradient where the kernels' forward found it; else None.
    """
    pairs, known = plain.Pairs(first, begin, end), {} if slope is None else {"slope": slope}
    with torch.autocast(image.device.type, enabled=False):
        grads = _backward(kernels, image).softmax_grads(
            image, text, scale, rows, cols, d_loss, pairs, tuple(wanted), wide, **known
        )
    return _or_empty(grads, scale)


@contrastive_grads.register_fake
def _(image, text, scale, rows, cols, slope, d_loss, first, begin, end, wanted, wide, kernels):
    return _like((image, text, scale), wanted, wide)


once_operator(contrastive_grads, "contrastive_loss")


@torch.library.custom_op("clipa::contrastive_loss", mutates_args=())
def contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor, kernels: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and rows [3, M], cols [2, M] and slope ([], or without kernels [0]) for
    contrastive_grads."""
    with torch.autocast(image.device.type, enabled=False):
        made = _forward(kernels, image).softmax_forward(image, text, scale)
    return made if kernels else (*made, scale.new_empty(0))


@contrastive_loss.register_fake
def _(image, text, scale, kernels):
    m = image.shape[0]
    slope = torch.empty_like(scale) if kernels else scale.new_empty(0)
    return torch.empty_like(scale), scale.new_empty(3, m), scale.new_empty(2, m), slope


def _save_contrastive(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.kernels = inputs[3]


def _contrastive_backward(ctx, d_loss, _rows, _cols, _slope):
    if d_loss is None:
        return None, None, None, None
    wanted = list(ctx.needs_input_grad[:3])
    image, *rest, slope = ctx.saved_tensors
    slope, pairs = slope if ctx.kernels else None, plain.Pairs(0, 0, image.shape[0])
    grads = contrastive_grads(image, *rest, slope, d_loss, *pairs, wanted, False, ctx.kernels)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None


contrastive_loss.register_autograd(_contrastive_backward, setup_context=_save_contrastive)


@torch.library.custom_op("clipa::sigmoid_loss", mutates_args=())
def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    wanted: list[bool],
    first: int,
    begin: int,
    end: int,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients in fp32 (fp64), empty where not wanted."""
    pairs = plain.Pairs(first, begin, end)
    with torch.autocast(image.device.type, enabled=False):
        strips = _backward(kernels, image, "sigmoid_loss")
        results = strips.sigmoid_pass(image, text, scale, bias, pairs, tuple(wanted))
    return _or_empty(results, scale)


@sigmoid_loss.register_fake
def _(image, text, scale, bias, wanted, first, begin, end, kernels):
    return torch.empty_like(scale), *_like((image, text, scale, bias), wanted, True)


def _like(inputs: tuple[Tensor, ...], wanted: list[bool], wide: bool) -> tuple[Tensor, ...]:
    """Fake gradients: like the input where wanted, else empty."""
    scale = inputs[2]
    return tuple(
        scale.new_empty(value.shape, dtype=scale.dtype if wide else value.dtype)
        if want
        else scale.new_empty(0)
        for value, want in zip(inputs, wanted, strict=True)
    )


def _save_grads(ctx, inputs, output):
    """The gradients are made in the forward: they stay in fp32, for d_loss may be large."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.wanted, ctx.inputs = inputs[4], len(inputs)
    ctx.dtypes = [value.dtype for value in inputs[:4]]


def _sigmoid_backward(ctx, d_loss, *again):
    refuse_second("sigmoid_loss", *again)
    if d_loss is None:
        return (None,) * ctx.inputs
    grads = [
        (grad * d_loss).to(dtype) if want else None
        for grad, want, dtype in zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True)
    ]
    return *grads, *(None,) * (ctx.inputs - len(grads))


sigmoid_loss.register_autograd(_sigmoid_backward, setup_context=_save_grads)
