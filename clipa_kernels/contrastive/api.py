"""The two losses of image-text pairs, without the N x N logits.

    S = logit_scale * image @ text.T + logit_bias
    contrastive: mean_i (lse_j S_ij + lse_j S_ji - 2 S_ii) / 2          (CLIP, arXiv:2103.00020)
    sigmoid:     mean_i sum_j softplus(-label_ij S_ij), label = 1 on the diagonal, else -1
                                                                        (SigLIP, arXiv:2303.15343)

Plain torch keeps the logits of both directions, their log-softmax and gradients: about 89 bytes a
logit. Here a strip of logits lives at a time, and 2 N sums are saved for the backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import check
from ..check import describe
from . import ops, plain
from .distributed import (
    IMPLS,
    GroupContrastive,
    GroupSigmoid,
    gather_rows,
    rank_and_size,
    require_alike,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def contrastive_loss_reference(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The specification in plain torch, in the features' dtype; see contrastive_loss."""
    rank, _ = rank_and_size("contrastive_loss", group)
    all_image, all_text = gather_rows(image, group), gather_rows(text, group)
    per_image = _factor(logit_scale) * image @ all_text.T
    per_text = _factor(logit_scale) * text @ all_image.T
    if logit_bias is not None:
        per_image, per_text = per_image + logit_bias, per_text + logit_bias
    labels = torch.arange(image.shape[0], device=image.device) + rank * image.shape[0]
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def sigmoid_loss_reference(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The specification in plain torch, in the features' dtype; see sigmoid_loss."""
    rank, _ = rank_and_size("sigmoid_loss", group)
    logits = _factor(logit_scale) * image @ gather_rows(text, group).T
    if logit_bias is not None:
        logits = logits + logit_bias
    labels = torch.full_like(logits, -1)
    labels.diagonal(rank * image.shape[0]).fill_(1)
    return -F.logsigmoid(labels * logits).sum() / image.shape[0]


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    group: ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """Equals `(cross_entropy(S, labels) + cross_entropy(S.T, labels)) / 2`, row i paired with i.

    Exact at any scale: fp32 features are multiplied in fp32 (in whatever
    torch.set_float32_matmul_precision allows), 16-bit features give fp32 logits, sums are fp32.
    Under autocast features are cast as a matrix product would cast them. Two runs give equal bits.

    Over a group of W processes each passes its M rows: M pairs, whose negatives are all N = W M.
    Only text features and four floats a row travel. The loss is that of the own pairs; its
    gradients sum over the processes' losses (the scale's: the own images' share), so that under
    DDP's mean all equal the loss of the whole batch on one process.

    Args:
        image, text: [M, E], floating point, one dtype; normalised by the caller where wanted.
        logit_scale: a number, or [] or [1], floating point: the factor itself, not its logarithm.
        logit_bias: the same, or None. It moves all logits alike, so its gradient is exactly zero.
        group: the processes that share the batch; None is this process alone.
        impl: "triton" (CUDA, or the interpreter), "torch" or "reference"; "auto" is "triton" on
            CUDA, else "torch".
    Returns:
        [] float32 (float64 for float64 features). A single pair has no negative: the loss is 0.
        NaN or infinite logits give NaN.
    Raises:
        ValueError: sizes that differ or are zero, devices that differ, an unknown impl.
        TypeError: a tensor that is not floating point, features of two dtypes.
        RuntimeError: a group that is destroyed or without this process, a second derivative or one
            in forward mode of any impl but "reference".
    Source: open_clip's ClipLoss(local_loss=True, gather_with_grad=True).

    >>> features = torch.nn.functional.normalize(torch.eye(4, 8) + 0.1, dim=-1)
    >>> loss = contrastive_loss(features, features, torch.tensor(100.0))
    >>> bool(loss < 1e-3)
    True
    """
    name = "contrastive_loss"
    checked, impl = _checked(name, image, text, logit_scale, logit_bias, group, impl)
    image, text, logit_scale, logit_bias = checked
    if impl == "reference":
        loss = contrastive_loss_reference(image, text, logit_scale, logit_bias, group=group)
        return loss.to(plain.compute_dtype(image))
    check.refuse_tangents(name, image, text, logit_scale)
    scale, kernels = _scalar(logit_scale, image), impl == "triton"
    if group is not None:
        loss = GroupContrastive.apply(image, text, scale, group, kernels)[0]
    else:
        loss = ops.contrastive_loss(image, text, scale, kernels)[0]
    return loss if logit_bias is None else loss + 0 * _scalar(logit_bias, image)


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    group: ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """Equals `-logsigmoid(labels * S).sum() / M`, labels 1 for pairs and -1 elsewhere.

    The forward makes the gradients as well, where any is wanted: no logit is computed twice.
    Precision, autocast, group, Args, Returns and Raises as contrastive_loss; the bias has a
    gradient here, and a single pair is a loss like any other.

    Source: open_clip's SigLipLoss; over a group, any of its four ways to exchange text features.

    >>> features = torch.nn.functional.normalize(torch.eye(4, 8), dim=-1)
    >>> loss = sigmoid_loss(features, features, torch.tensor(10.0), torch.tensor(-5.0))
    >>> round(loss.item(), 4)
    0.0269
    """
    name = "sigmoid_loss"
    checked, impl = _checked(name, image, text, logit_scale, logit_bias, group, impl)
    image, text, logit_scale, logit_bias = checked
    if impl == "reference":
        loss = sigmoid_loss_reference(image, text, logit_scale, logit_bias, group=group)
        return loss.to(plain.compute_dtype(image))
    check.refuse_tangents(name, image, text, logit_scale, logit_bias)
    scale = _scalar(logit_scale, image)
    bias = torch.zeros_like(scale) if logit_bias is None else _scalar(logit_bias, image)
    kernels = impl == "triton"
    if group is not None:
        return GroupSigmoid.apply(image, text, scale, bias, group, kernels)[0]
    grad, pairs = torch.is_grad_enabled(), (0, 0, image.shape[0])
    wanted = [value.requires_grad and grad for value in (image, text, scale, bias)]
    return ops.sigmoid_loss(image, text, scale, bias, wanted, *pairs, kernels)[0]


def _checked(
    name, image, text, logit_scale, logit_bias, group, impl
) -> tuple[tuple[Tensor | None, ...], str]:
    """The features, cast where autocast is on, and the scalars as tensors; and the impl. Over a
    group, an error of one process is raised on all, so that none waits for the others."""
    error, checked = None, (image,)
    try:
        checked = _check(name, image, text, logit_scale, logit_bias)
        impl = check.choose_impl(name, impl, IMPLS, checked[0])
    except (TypeError, ValueError, RuntimeError) as caught:
        error, impl = caught, IMPLS[0]
    if group is not None:
        require_alike(name, checked[0], impl, error, group)
    if error is not None:
        raise error
    return checked, impl


def _check(name, image, text, logit_scale, logit_bias) -> tuple[Tensor | None, ...]:
    check.require_float(name, image=image, text=text)
    scalars = {"logit_scale": _as_tensor(name, image, logit_scale=logit_scale), "logit_bias": None}
    if logit_bias is not None:
        scalars["logit_bias"] = _as_tensor(name, image, logit_bias=logit_bias)
    check.require_same_device(name, image=image, text=text, **scalars)
    if image.dim() != 2 or image.shape != text.shape:
        raise ValueError(
            f"{name}: image and text must both be [M, E], "
            f"got {describe(image)} and {describe(text)}"
        )
    if image.numel() == 0:
        raise ValueError(f"{name}: at least one pair of features is needed, got {describe(image)}")
    dtype = check.autocast_dtype(image.device)
    if dtype is not None and torch.float64 not in (image.dtype, text.dtype):
        return image.to(dtype), text.to(dtype), *scalars.values()
    check.require_same_dtype(name, image=image, text=text)
    return image, text, *scalars.values()


def _as_tensor(function: str, features: Tensor, **named: object) -> Tensor:
    """The one named scalar as a tensor [] or [1]; a number becomes one beside the features."""
    ((name, value),) = named.items()
    if not isinstance(value, Tensor):
        value = check.as_float(function, **named)
        return features.new_full((), value, dtype=plain.compute_dtype(features))
    check.require_float(function, **named)
    if value.shape not in ((), (1,)):
        raise ValueError(f"{function}: {name} must be [] or [1], got {describe(value)}")
    return value


def _factor(value: Tensor | float) -> Tensor | float:
    """[] of [1], which would widen 16-bit features."""
    return value.reshape(()) if isinstance(value, Tensor) else value


def _scalar(value: Tensor, features: Tensor) -> Tensor:
    return value.reshape(()).to(plain.compute_dtype(features))
