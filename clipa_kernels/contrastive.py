"""The two losses of image-text pairs, without the N x N logits.

    S = logit_scale * image @ text.T + logit_bias
    contrastive: mean_i (lse_j S_ij + lse_j S_ji - 2 S_ii) / 2          (CLIP, arXiv:2103.00020)
    sigmoid:     mean_i sum_j softplus(-label_ij S_ij), label = 1 on the diagonal, else -1
                                                                        (SigLIP, arXiv:2303.15343)

Plain torch keeps the logits of both directions, their log-softmax and gradients: about 89 bytes a
logit. Here a tile of logits lives at a time, and 2 N sums are saved for the backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _contrastive_ops, _strips
from ._check import (
    autocast_dtype,
    choose_impl,
    describe,
    require_float,
    require_same_device,
    require_same_dtype,
    require_tensor,
)
from ._distributed import (
    default_group,
    gather_rows,
    group_contrastive,
    group_sigmoid,
    mean_over_group,
    rank_and_size,
    require_same_shape,
    scale_gradient,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_IMPLS = ("triton", "torch", "reference")


def contrastive_loss_reference(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The specification in plain torch, in the features' dtype; see contrastive_loss."""
    rank, _ = rank_and_size("contrastive_loss", group)
    all_image, all_text = gather_rows(image, group), gather_rows(text, group)
    per_image = logit_scale.reshape(()) * image @ all_text.T
    per_text = logit_scale.reshape(()) * text @ all_image.T
    if logit_bias is not None:
        per_image, per_text = per_image + logit_bias, per_text + logit_bias
    labels = torch.arange(image.shape[0], device=image.device) + rank * image.shape[0]
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def sigmoid_loss_reference(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The specification in plain torch, in the features' dtype; see sigmoid_loss."""
    rank, _ = rank_and_size("sigmoid_loss", group)
    logits = logit_scale.reshape(()) * image @ gather_rows(text, group).T
    if logit_bias is not None:
        logits = logits + logit_bias
    labels = torch.full_like(logits, -1)
    labels.diagonal(rank * image.shape[0]).fill_(1)
    return -F.logsigmoid(labels * logits).sum() / image.shape[0]


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
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
        logit_scale: [] or [1], floating point, the factor itself, not its logarithm.
        logit_bias: [] or [1], or None. It moves all logits alike, so its gradient is exactly zero.
        group: the processes that share the batch; None is this process alone.
        impl: "triton" (CUDA, or the interpreter), "torch" or "reference"; "auto" is "triton" on
            CUDA, else "torch".
    Returns:
        [] float32 (float64 for float64 features). A single pair has no negative: the loss is 0.
        NaN or infinite logits give NaN.
    Raises:
        ValueError: sizes that differ or are zero, devices that differ, an unknown impl.
        TypeError: a tensor that is not floating point, features of two dtypes.
        RuntimeError: a group that is destroyed or without this process.
    Source: open_clip's ClipLoss(local_loss=True, gather_with_grad=True).

    >>> features = torch.nn.functional.normalize(torch.eye(4, 8) + 0.1, dim=-1)
    >>> loss = contrastive_loss(features, features, torch.tensor(100.0))
    >>> bool(loss < 1e-3)
    True
    """
    name = "contrastive_loss"
    image, text = _checked(name, image, text, logit_scale, logit_bias, group)
    impl = choose_impl(name, impl, _IMPLS, image)
    if impl == "reference":
        loss = contrastive_loss_reference(image, text, logit_scale, logit_bias, group=group)
        return loss.to(_strips.compute_dtype(image))
    scale, kernels = _scalar(logit_scale, image), impl == "triton"
    if group is not None:
        loss = group_contrastive(image, text, scale, group, kernels)
    elif not kernels and _strips.fits_one_tile(image):
        wanted = _wanted(image, text, scale)
        loss = _contrastive_ops.contrastive_loss_one_tile(image, text, scale, wanted)[0]
    else:
        loss = _contrastive_ops.contrastive_loss(image, text, scale, kernels)[0]
    return loss if logit_bias is None else loss + 0 * _scalar(logit_bias, image)


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
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
    image, text = _checked(name, image, text, logit_scale, logit_bias, group)
    impl = choose_impl(name, impl, _IMPLS, image)
    if impl == "reference":
        loss = sigmoid_loss_reference(image, text, logit_scale, logit_bias, group=group)
        return loss.to(_strips.compute_dtype(image))
    scale = _scalar(logit_scale, image)
    bias = torch.zeros_like(scale) if logit_bias is None else _scalar(logit_bias, image)
    kernels = impl == "triton"
    if group is not None:
        return group_sigmoid(image, text, scale, bias, group, kernels)
    wanted, pairs = _wanted(image, text, scale, bias), (0, 0, image.shape[0])
    return _contrastive_ops.sigmoid_loss(image, text, scale, bias, wanted, *pairs, kernels)[0]


def _checked(name, image, text, logit_scale, logit_bias, group) -> tuple[Tensor, Tensor]:
    """The features, cast where autocast is on. Over a group, an error of one process is raised on
    all, so that none waits for the others."""
    error = None
    try:
        image, text = _check(name, image, text, logit_scale, logit_bias)
    except (TypeError, ValueError) as caught:
        error = caught
    if group is not None:
        require_same_shape(name, image, error, group)
    if error is not None:
        raise error
    return image, text


def _check(name, image, text, logit_scale, logit_bias) -> tuple[Tensor, Tensor]:
    scalars = {"logit_scale": logit_scale}
    if logit_bias is not None:
        scalars["logit_bias"] = logit_bias
    require_tensor(name, image=image, text=text, **scalars)
    require_float(name, image=image, text=text, **scalars)
    require_same_device(name, image=image, text=text, **scalars)
    if image.dim() != 2 or image.shape != text.shape:
        raise ValueError(
            f"{name}: image and text must both be [M, E], "
            f"got {describe(image)} and {describe(text)}"
        )
    if image.numel() == 0:
        raise ValueError(f"{name}: at least one pair of features is needed, got {describe(image)}")
    for scalar, value in scalars.items():
        if value.shape not in ((), (1,)):
            raise ValueError(f"{name}: {scalar} must be [] or [1], got {describe(value)}")
    dtype = autocast_dtype(image.device)
    if dtype is not None and torch.float64 not in (image.dtype, text.dtype):
        return image.to(dtype), text.to(dtype)
    require_same_dtype(name, image=image, text=text)
    return image, text


def _wanted(*inputs: Tensor) -> list[bool]:
    return [value.requires_grad and torch.is_grad_enabled() for value in inputs]


def _scalar(value: Tensor, features: Tensor) -> Tensor:
    return value.reshape(()).to(_strips.compute_dtype(features))


class ClipLoss(nn.Module):
    """open_clip's ClipLoss with its constructor and forward arguments, over contrastive_loss.

    With world_size > 1 it works over the default process group. local_loss=False gives every
    process the mean loss; gather_with_grad=False without local_loss leaves the features' gradients
    1 / world_size as large, as open_clip does. local_loss=True with gather_with_grad=False, which
    drops gradients between processes, and a subclass with its own get_logits take the logits of
    get_logits, N columns for each row held at once.

    Args:
        local_loss: the loss of the own rows alone, not of the whole batch.
        gather_with_grad: gradients flow back to the processes that features came from.
        cache_labels: keep the labels that get_ground_truth makes.
        rank, world_size: this process in the default group.
        use_horovod: must be False.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        if use_horovod:
            raise ValueError("ClipLoss: use_horovod must be False, got True")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.labels: dict[tuple, Tensor] = {}

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The column of each row's pair, int64 [num_logits]."""
        if (device, num_logits) in self.labels:
            return self.labels[device, num_logits]
        labels = torch.arange(num_logits, device=device)
        if self.world_size > 1 and self.local_loss:
            labels = labels + num_logits * self.rank
        if self.cache_labels:
            self.labels = {(device, num_logits): labels}
        return labels

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits of the images and of the texts in full, for subclasses that need them."""
        image, text = image_features, text_features
        all_image, all_text = image, text
        if self.world_size > 1:
            all_image, all_text = (self._gathered(features) for features in (image, text))
        if self.world_size > 1 and not self.local_loss:
            image, text = all_image, all_text
        per_image = logit_scale * image @ all_text.T
        per_text = logit_scale * text @ all_image.T
        if logit_bias is not None:
            per_image, per_text = per_image + logit_bias, per_text + logit_bias
        return per_image, per_text

    def _gathered(self, features: Tensor) -> Tensor:
        group = default_group("ClipLoss", self.rank, self.world_size)
        if self.gather_with_grad:
            return gather_rows(features, group)
        gathered = gather_rows(features.detach(), group)
        if self.local_loss:
            return gathered
        own = self.rank * features.shape[0]
        return torch.cat([gathered[:own], features, gathered[own + features.shape[0] :]])

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features [M, E], or {"contrastive_loss": loss}; see contrastive_loss."""
        image, text, scale, bias = image_features, text_features, logit_scale, logit_bias
        cut = self.world_size > 1 and not self.gather_with_grad
        if type(self).get_logits is not ClipLoss.get_logits or (cut and self.local_loss):
            per_image, per_text = self.get_logits(image, text, scale, logit_bias=bias)
            labels = self.get_ground_truth(image.device, per_image.shape[0])
            loss = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        elif self.world_size == 1:
            loss = contrastive_loss(image, text, scale, bias)
        else:
            group = default_group("ClipLoss", self.rank, self.world_size)
            if cut:
                image, text = (scale_gradient(t, 1 / self.world_size) for t in (image, text))
            loss = contrastive_loss(image, text, scale, bias, group=group)
            loss = loss if self.local_loss else mean_over_group(loss, group)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """open_clip's SigLipLoss with its constructor and forward arguments, over sigmoid_loss.

    With world_size > 1 it works over the default process group. The four ways to exchange text
    features give one result; here they are gathered whichever is named.

    Args:
        cache_labels: accepted and unused, as in open_clip.
        rank, world_size: this process in the default group.
        dist_impl: None, "bidir", "shift", "reduce" or "gather".
        chunk_size: accepted and unused: logits are always made in tiles.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ):
        super().__init__()
        known = (None, "bidir", "shift", "reduce", "gather")
        if dist_impl not in known:
            raise ValueError(f"SigLipLoss: dist_impl must be one of {known}, got {dist_impl!r}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """Labels [num_logits, num_logits], -1 and on the diagonal 1; for subclasses."""
        labels = -torch.ones((num_logits, num_logits), device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> Tensor:
        """Logits in full, for subclasses."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features [M, E], or {"contrastive_loss": loss}; see sigmoid_loss."""
        group = None
        if self.world_size > 1:
            group = default_group("SigLipLoss", self.rank, self.world_size)
        loss = sigmoid_loss(image_features, text_features, logit_scale, logit_bias, group=group)
        return {"contrastive_loss": loss} if output_dict else loss
