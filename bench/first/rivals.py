"""What a user would pick instead of an op: torch's own, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.first.cases import Case
from bench.first.machine import Machine

Rivals = dict[str, Callable[..., Any]]


def rivals(case: Case, machine: Machine) -> Rivals:
    """By name, functions of the case's inputs."""
    compiled = partial(torch.compile, backend=machine.pick("inductor", "aot_eager"))
    if case.op == "attention":
        return attention(case)
    if case.op == "layer_norm":
        return dict(eager=norm, compiled=compiled(norm))
    if case.op == "gelu":
        function = partial(gelu, case.label.split()[0])
        return dict(eager=function, compiled=compiled(function))
    if case.op == "patch_embed":
        ways: Rivals = {"convolution, gather": convolution, "patchify, linear": patchify}
        return ways | {f"{name}, compiled": compiled(way) for name, way in ways.items()}
    function = sigmoid if case.label.startswith("sigmoid") else contrastive
    return dict(eager=function, compiled=compiled(function))


def attention(case: Case) -> Rivals:
    """torch's varlen_attn and padded sdpa, and each back end of sdpa where no length differs."""
    found: Rivals = {name: partial(case.ours, impl=name) for name in ("varlen_attn", "sdpa")}
    if "ragged" in case.label:
        return found
    length = int(case.label.split()[0])

    def padded(backend: SDPBackend, qkv: Tensor, ends: Tensor) -> Tensor:
        q, k, v = qkv.view(-1, length, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

    for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        found[f"sdpa {backend.lower()}"] = partial(padded, getattr(SDPBackend, backend))
    return found


def norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A sum and torch's LayerNorm."""
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias), total


def gelu(form: str, x: Tensor, bias: Tensor) -> Tensor:
    """A sum and torch's GELU."""
    z = x + bias
    return z * torch.sigmoid(1.702 * z) if form == "quick" else F.gelu(z, approximate=form)


def _pixels(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (images.to(mean.dtype) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def convolution(
    images: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor, pos_embed: Tensor,
    cls_token: Tensor, mean: Tensor, std: Tensor,
) -> Tensor:  # fmt: skip
    """As open_clip: all patches by a convolution, those kept picked from them."""
    x = F.conv2d(_pixels(images, mean, std), weight, bias, stride=weight.shape[-1])
    x = x.flatten(2).transpose(1, 2) + pos_embed[1:]
    if keep is not None:
        x = x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    first = (cls_token + pos_embed[:1]).expand(len(x), 1, -1)
    return torch.cat((first, x), 1).flatten(0, 1)


def patchify(
    images: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor, pos_embed: Tensor,
    cls_token: Tensor, mean: Tensor, std: Tensor,
) -> Tensor:  # fmt: skip
    """Bytes of the kept patches first, then the library's product."""
    batch, side = len(images), weight.shape[-1]
    x = images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5)
    x, table = x.flatten(1, 2), pos_embed[1:].expand(batch, -1, -1)
    if keep is not None:
        x = x[torch.arange(batch, device=keep.device)[:, None], keep]
        table = pos_embed[1:][keep]
    x = _pixels(x, mean, std).flatten(2)
    x = F.linear(x, weight.flatten(1), bias) + table
    first = (cls_token + pos_embed[:1]).expand(batch, 1, -1)
    return torch.cat((first, x), 1).flatten(0, 1)


def contrastive(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """As open_clip's ClipLoss: all logits, both ways."""
    labels = torch.arange(len(image), device=image.device)
    per_image, per_text = logit_scale * image @ text.T, logit_scale * text @ image.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def sigmoid(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """As open_clip's SigLipLoss."""
    logits = logit_scale * image @ text.T + logit_bias
    labels = 2 * torch.eye(len(image), device=image.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(image)
