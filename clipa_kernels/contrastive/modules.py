"""open_clip's loss modules over contrastive_loss and sigmoid_loss, for those who swap an import."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..check import as_flag, as_int
from .api import contrastive_loss, sigmoid_loss
from .distributed import default_group, gather_rows, mean_over_group, scale_gradient


class ClipLoss(nn.Module):
    """open_clip's ClipLoss with its constructor and forward arguments, over contrastive_loss.

    With world_size > 1 it works over the default process group. local_loss=False gives every
    process the mean loss; gather_with_grad=False without local_loss leaves the features' gradients
    1 / world_size as large, as open_clip does. local_loss=True with gather_with_grad=False, which
    drops gradients between processes, and a subclass with its own get_logits or get_ground_truth
    take the logits of get_logits, N columns for each row held at once.

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
        if as_flag("ClipLoss", use_horovod=use_horovod):
            raise ValueError("ClipLoss: use_horovod must be False, got True")
        self.local_loss = as_flag("ClipLoss", local_loss=local_loss)
        self.gather_with_grad = as_flag("ClipLoss", gather_with_grad=gather_with_grad)
        self.cache_labels = as_flag("ClipLoss", cache_labels=cache_labels)
        self.world_size = as_int("ClipLoss", 1, 2**31, world_size=world_size)
        self.rank = as_int("ClipLoss", 0, 2**31, rank=rank)
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
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
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
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features [M, E], or {"contrastive_loss": loss}; see contrastive_loss."""
        image, text, scale, bias = image_features, text_features, logit_scale, logit_bias
        cut = self.world_size > 1 and not self.gather_with_grad
        if _overrides(self, ClipLoss, "get_logits", "get_ground_truth") or (
            cut and self.local_loss
        ):
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
    features give one result; here they are gathered whichever is named. A subclass with its own
    get_logits, get_ground_truth or _loss takes logits in full, one process's texts at a time.

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
        if not isinstance(dist_impl, str | None) or dist_impl not in known:
            raise ValueError(f"SigLipLoss: dist_impl must be one of {known}, got {dist_impl!r}")
        self.cache_labels = as_flag("SigLipLoss", cache_labels=cache_labels)
        self.world_size = as_int("SigLipLoss", 1, 2**31, world_size=world_size)
        self.rank = as_int("SigLipLoss", 0, 2**31, rank=rank)
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = as_int("SigLipLoss", 0, 2**63, chunk_size=chunk_size)

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
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """Logits in full, for subclasses."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """The images' loss against these texts, of which none is a pair where negative_only."""
        image, text = image_features, text_features
        logits = self.get_logits(image, text, logit_scale, logit_bias)
        labels = self.get_ground_truth(image.device, image.dtype, len(image), negative_only)
        return -F.logsigmoid(labels * logits).sum() / len(image)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of features [M, E], or {"contrastive_loss": loss}; see sigmoid_loss."""
        image, text, scalars = image_features, text_features, (logit_scale, logit_bias)
        group = None
        if self.world_size > 1:
            group = default_group("SigLipLoss", self.rank, self.world_size)
        if not _overrides(self, SigLipLoss, "get_logits", "get_ground_truth", "_loss"):
            loss = sigmoid_loss(image, text, *scalars, group=group)
        else:
            loss = self._loss(image, text, *scalars)
            texts = gather_rows(text, group).split(len(text)) if group is not None else ()
            for rank, other in enumerate(texts):
                if rank != self.rank:
                    loss = loss + self._loss(image, other, *scalars, negative_only=True)
        return {"contrastive_loss": loss} if output_dict else loss


def _overrides(module: nn.Module, base: type[nn.Module], *methods: str) -> bool:
    """Whether a subclass has its own version of one of these methods of base."""
    return any(getattr(type(module), name) is not getattr(base, name) for name in methods)
