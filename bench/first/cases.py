"""What first_gpu.py calls: each op at the shapes that the papers' towers give it.

A case makes its inputs on any device, fake ones too, and has the op and its reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clipa_kernels import (
    add_layer_norm,
    add_layer_norm_reference,
    bias_gelu,
    bias_gelu_reference,
    contrastive_loss,
    contrastive_loss_reference,
    cu_seqlens_of,
    patch_embed,
    patch_embed_reference,
    random_patches,
    sigmoid_loss,
    sigmoid_loss_reference,
    varlen_attention_qkvpacked,
    varlen_attention_reference,
)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# CLIPA's lengths, from 8 captions' tokens to fine-tuning's 577, at the head sizes of B to bigG.
ATTENTION = (
    (8, 64), (16, 64), (17, 64), (37, 80), (37, 88), (50, 64), (50, 104), (65, 80), (77, 64),
    (197, 64), (257, 80), (577, 104),
)  # fmt: skip
# Image side, patch side, share dropped, width.
STEM = ((224, 16, 0.5, 768), (224, 16, 0.75, 768), (112, 16, 0.0, 768), (84, 14, 0.0, 1280))
WIDTHS = (768, 1280, 1664, 4096)
FORMS = ("none", "tanh", "quick")
LOSS = ((1024, 512), (512, 1024), (1000, 768))
SHORT = 37  # tokens of an image of H/14 in the short stage


@dataclass(frozen=True)
class Case:
    """inputs(device) gives tensors by name; those that are floating are differentiated, except
    those of `fixed`. ours and reference take them by name."""

    op: str
    label: str
    inputs: Callable[[torch.device], dict[str, Any]]
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    fixed: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()  # these stay in fp32, as parameters under autocast do

    def leaves(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """The inputs in a dtype, ready to be differentiated."""
        made = {}
        for name, value in self.inputs(device).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                value = value if name in self.wide else value.to(dtype)
                value = value.detach().requires_grad_(name not in self.fixed)
            made[name] = value
        return made


def both(function: Callable[..., Any], leaves: dict[str, Any], d_out: list[Tensor] | None = None):
    """Outputs and gradients by name; d_out: the outputs' gradients, drawn where none are given."""
    outs = tree_leaves(function(**leaves))
    if d_out is None:
        d_out = gradients_of(outs)
    wanted = {n: t for n, t in leaves.items() if isinstance(t, Tensor) and t.requires_grad}
    given = [d.to(out.dtype) for d, out in zip(d_out, outs, strict=True)]
    grads = torch.autograd.grad(outs, list(wanted.values()), given, allow_unused=True)
    found = {f"output {i}": out.detach() for i, out in enumerate(outs)}
    return found | {f"gradient of {name}": g for name, g in zip(wanted, grads, strict=True)}


def gradients_of(outs: list[Tensor]) -> list[Tensor]:
    """One for a loss, else drawn."""
    torch.manual_seed(1)
    return [
        torch.randn_like(o) if o.dim() else torch.ones_like(o) for o in map(Tensor.detach, outs)
    ]


def attention_case(
    length: int, size: int, sequences: int, heads: int, ragged: bool = False
) -> Case:
    """Packed attention; ragged: causal, lengths from 3 to `length`, as captions."""
    lengths = [max(3, length - 7 * i % length) for i in range(sequences)]
    lengths = lengths if ragged else [length] * sequences

    def inputs(device: torch.device) -> dict[str, Any]:
        torch.manual_seed(0)
        qkv = torch.randn(sum(lengths), 3, heads, size, device=device)
        return dict(qkv=qkv, ends=cu_seqlens_of(lengths, device))

    def ours(qkv: Tensor, ends: Tensor, impl: str = "triton") -> Tensor:
        return varlen_attention_qkvpacked(qkv, ends, length, causal=ragged, impl=impl)

    def reference(qkv: Tensor, ends: Tensor) -> Tensor:
        return varlen_attention_reference(*qkv.unbind(1), ends, length, causal=ragged)

    label = f"{length} x {size}, {heads} heads{', ragged, causal' if ragged else ''}"
    return Case("attention", label, inputs, ours, reference)


def stem_case(pixels: int, side: int, drop: float, width: int, batch: int) -> Case:
    """uint8 images as loaders make them, a class token, normalisation folded into the weight."""
    grid = (pixels // side,) * 2
    keep = partial(random_patches, batch, grid, drop, seed=0, step=0, impl="torch")

    def inputs(device: torch.device) -> dict[str, Any]:
        torch.manual_seed(0)
        images = torch.randint(256, (batch, pixels, pixels, 3), device=device, dtype=torch.uint8)
        draw = partial(torch.randn, device=device)
        return dict(
            images=images.permute(0, 3, 1, 2),
            keep=keep(device=device) if drop else None,
            weight=draw(width, 3, side, side) / side,
            bias=draw(width),
            pos_embed=draw(1 + grid[0] * grid[1], width),
            cls_token=draw(1, width),
            mean=torch.tensor(MEAN, device=device),
            std=torch.tensor(STD, device=device),
        )

    def ours(**tensors: Any) -> Tensor:
        return patch_embed(**tensors, impl="triton").tokens

    def reference(**tensors: Any) -> Tensor:
        return patch_embed_reference(**tensors).tokens

    label = f"{batch} images of {pixels}/{side}, {drop:.0%} dropped, D={width}"
    return Case("patch_embed", label, inputs, ours, reference, ("mean", "std"))


def norm_case(rows: int, width: int, first: bool = False) -> Case:
    """Residual sum and LayerNorm, both outputs used; first: there is no residual yet."""

    def inputs(device: torch.device) -> dict[str, Any]:
        torch.manual_seed(0)
        x, weight, bias = (
            torch.randn(*s, device=device) for s in ((rows, width), (width,), (width,))
        )
        residual = None if first else 3 * torch.randn(rows, width, device=device) + 1
        return dict(x=x, residual=residual, weight=1 + 0.3 * weight, bias=bias)

    ours = partial(add_layer_norm, impl="triton")
    label = f"{rows} x {width}{', first' if first else ''}"
    return Case("layer_norm", label, inputs, ours, add_layer_norm_reference)


def gelu_case(form: str, rows: int, width: int) -> Case:
    """Bias and GELU."""

    def inputs(device: torch.device) -> dict[str, Any]:
        torch.manual_seed(0)
        x, bias = 3 * torch.randn(rows, width, device=device), torch.randn(width, device=device)
        return dict(x=x, bias=bias)

    ours = partial(bias_gelu, approximate=form, impl="triton")
    label = f"{form} {rows} x {width}"
    return Case("gelu", label, inputs, ours, partial(bias_gelu_reference, approximate=form))


def loss_case(n: int, width: int, scale: float, sigmoid: bool = False) -> Case:
    """A loss of n pairs; its scale and bias stay in fp32."""

    def inputs(device: torch.device) -> dict[str, Any]:
        torch.manual_seed(0)
        draw = partial(torch.randn, n, width, device=device)
        made = dict(image=F.normalize(draw(), dim=-1), text=F.normalize(draw(), dim=-1))
        made["logit_scale"] = torch.full((), scale, device=device)
        return made | (dict(logit_bias=torch.full((), -10.0, device=device)) if sigmoid else {})

    ours, reference = contrastive_loss, contrastive_loss_reference
    if sigmoid:
        ours, reference = sigmoid_loss, sigmoid_loss_reference
    label = f"{'sigmoid' if sigmoid else 'contrastive'} {n} x {width}, scale {scale:g}"
    wide = "logit_scale", "logit_bias"
    return Case("contrastive", label, inputs, partial(ours, impl="triton"), reference, wide=wide)


def right_cases(big: bool) -> dict[str, list[Case]]:
    """By op, few sequences of many shapes: what is compared with fp64."""
    count, heads, rows = (64, 16, 64 * SHORT) if big else (2, 1, 5)
    lengths = ATTENTION if big else ((8, 16), (17, 24))
    stems = STEM if big else ((12, 4, 0.5, 16),)
    losses = LOSS if big else ((12, 16),)
    widths, hidden = (WIDTHS, 5120) if big else ((40,), 24)
    cases = [attention_case(*shape, count, heads) for shape in lengths]
    cases += [attention_case(*shape, count, heads, True) for shape in lengths[-6 if big else -1 :]]
    cases += [stem_case(*shape, count) for shape in stems]
    cases += [norm_case(rows, width, first) for width in widths for first in (False, True)]
    cases += [gelu_case(form, rows, hidden) for form in (FORMS if big else FORMS[:1])]
    cases += [
        loss_case(*size, scale) for size in losses for scale in ((14.3, 100.0) if big else (100.0,))
    ]
    cases += [loss_case(*size, 10.0, sigmoid=True) for size in losses]
    return by_op(cases)


def small_cases(big: bool) -> list[Case]:
    """One of each op and pass: the least that launches every kernel."""
    count, heads, width = (5, 2, 256) if big else (2, 1, 16)
    return [
        attention_case(37 if big else 8, 80 if big else 16, count, heads),
        attention_case(77 if big else 20, 64 if big else 16, count, heads, True),
        stem_case(56 if big else 8, 14 if big else 4, 0.5, width, count),
        norm_case(count * (SHORT if big else 2), width),
        gelu_case("none", count * (SHORT if big else 2), width),
        loss_case(150 if big else 12, width, 14.3),
        loss_case(150 if big else 12, width, 14.3, sigmoid=True),
    ]


def fast_cases(big: bool) -> dict[str, list[Case]]:
    """By op, at the sizes of a step: what is timed."""
    if not big:
        small = [attention_case(8, 16, 2, 1), stem_case(8, 4, 0.5, 16, 2), norm_case(4, 32)]
        return by_op([*small, gelu_case("none", 4, 32), loss_case(20, 16, 14.3)])
    batch = 2048
    shapes = ((8, 64, 16), (17, 64, 12), (37, 80, 16), (50, 64, 12), (50, 104, 16), (65, 80, 16))
    cases = [attention_case(n, size, batch, heads) for n, size, heads in shapes]
    cases += [attention_case(197, 64, 512, 12), attention_case(77, 64, 1024, 12, True)]
    cases += [stem_case(*shape, batch) for shape in STEM]
    cases += [norm_case(batch * SHORT, width) for width in WIDTHS[:3]]
    cases += [gelu_case(form, batch * SHORT, 5120) for form in FORMS]
    cases += [loss_case(n, 1024, 14.3) for n in (4096, 32768)]
    cases += [loss_case(32768, 512, 14.3), loss_case(32768, 1024, 10.0, sigmoid=True)]
    return by_op(cases)


def by_op(cases: list[Case]) -> dict[str, list[Case]]:
    """Lists of one op each."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case.op, []).append(case)
    return found
