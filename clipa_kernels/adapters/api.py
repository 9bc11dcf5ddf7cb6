"""The operations of this library inside the models of open_clip, timm and Hugging Face.

    model, report = accelerate(model)       the same module; print(report) says what changed
    model = restore(model)

A pre-norm block computes what it computed, by fewer passes over memory: its first norm; one product
of q, k and v; varlen_attention of B equal sequences; the residual sum with the second norm; the
product with its bias and GELU. An image tower that drops patches embeds the kept ones alone.
Parameters, buffers, hooks and the keys of the state dict stay; no class is changed: the instance's
`forward` hides that of its class.

No library is imported here. A module is known by the names of its parts and by their types, and
then by what it computes: its own forward and the new one are compared on random weights and inputs
before anything is changed, and a module for which they differ is left.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from .. import check
from .blocks import Block, look_at_block, mask_owner, run_block
from .stems import RUNNERS, Stem, look_at_stem
from .tried import tried

_RUNNERS = (run_block, *RUNNERS)


@dataclass
class Report:
    """What accelerate did.

    replaced: the name of a module -> what computes in place of its own forward.
    left: the name of a module -> why its own forward stays.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """A line for the modules of one kind: layers.0 to layers.11 are "layers.* (12)"."""
        rows: dict[tuple[str, str, str], int] = {}
        for title, modules in (("replaced", self.replaced), ("left", self.left)):
            for name, why in modules.items():
                key = title, re.sub(r"(?<![^.])\d+(?![^.])", "*", name) or "(model)", why
                rows[key] = rows.get(key, 0) + 1
        names = [f"{name} ({n})" if n > 1 else name for (_, name, _), n in rows.items()]
        width = max(map(len, names), default=0)
        return "\n".join(
            f"{title:8}  {name:{width}}  {why}"
            for name, (title, _, why) in zip(names, rows, strict=True)
        )


def accelerate(
    model: nn.Module,
    *,
    drop: float | None = None,
    inference_drop: float | None = None,
    impl: str = "auto",
) -> tuple[nn.Module, Report]:
    """Change a model in place, so that its blocks and image stems compute with this library.

    Known are the blocks and stems of open_clip's CLIP and CustomTextCLIP, timm's VisionTransformer
    and Hugging Face's CLIP, SigLIP and ViT, wherever they are in the model. Call it before DDP,
    FSDP and torch.compile. A block runs its own forward in calls with a mask other than the
    model's causal one or with `output_attentions`, and from when a part of it gets a hook,
    another class or a dropout; so does an image tower in calls that drop nothing.

    Patches are dropped in training, as many as the tower's own PatchDropout says, by the draw of
    clipa_kernels.PatchDropout: from torch's generator of the images' device, in ascending order.
    It is another draw than open_clip's and timm's.

    Args:
        model: in any dtype, on any device, with any parameters frozen or tied.
        drop: share of patches dropped in training by towers without a PatchDropout of their own,
            in [0, 1). None drops none there.
        inference_drop: share dropped in evaluation, by all towers. None drops none.
        impl: "auto", "triton", "torch" or "reference".
    Returns:
        (model, Report), the model the same object.
    Raises:
        TypeError: the model is not an nn.Module, or is compiled, scripted, sharded or quantised.
        ValueError: nothing in it is known, it is accelerated already, or a share is not in [0, 1).

    >>> from torch import nn
    >>> accelerate(nn.Linear(8, 8))
    Traceback (most recent call last):
    ...
    ValueError: accelerate: model must hold blocks or image stems of open_clip, timm or Hugging \
Face's CLIP, SigLIP or ViT, got Linear with none
    """
    _check_model(model, impl)
    for name, share in (("drop", drop), ("inference_drop", inference_drop)):
        if share is not None and not 0 <= check.as_float("accelerate", **{name: share}) < 1:
            raise ValueError(f"accelerate: {name} must be in [0, 1), got {share}")
    report, new, known = Report(), [], {}
    for name, module in model.named_modules():
        for look in (look_at_block, look_at_stem):
            found = look(module)
            if isinstance(found, Block):
                found = replace(found, owner=mask_owner(model, name), impl=impl)
                found = tried(module, found, known)
            elif isinstance(found, Stem):
                found = replace(found, share=drop, inference=inference_drop, impl=impl)
                found = tried(module, found, known) if found.drops(module) else "it drops no patch"
            if isinstance(found, str):
                report.left[name] = found
            elif found is not None:
                report.replaced[name] = found.told
                new += found.changes(module)
    if not report.replaced and not report.left:
        raise ValueError(
            "accelerate: model must hold blocks or image stems of open_clip, timm or Hugging "
            f"Face's CLIP, SigLIP or ViT, got {type(model).__name__} with none"
        )
    for module, name, function in new:
        module.__dict__[name] = function
    return model, report


def restore(model: nn.Module) -> nn.Module:
    """Take back all that accelerate changed.

    Raises:
        TypeError: the model is not an nn.Module.
        ValueError: the model is not accelerated.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be an nn.Module, got {type(model).__name__}")
    changed = list(_changes(model))
    if not changed:
        came = type(model).__name__
        raise ValueError(f"restore: model must be accelerated, got a {came} that is not")
    for module, name in changed:
        del module.__dict__[name]
    return model


def _changes(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        for name in ("forward", "_embeds", "_pos_embed"):
            function = module.__dict__.get(name)
            if isinstance(function, partial) and function.func in _RUNNERS:
                yield module, name


def _check_model(model: nn.Module, impl: str) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("accelerate: model must be Python's, got one of TorchScript")
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be an nn.Module, got {type(model).__name__}")
    if next(_changes(model), None):
        raise ValueError("accelerate: model must not be accelerated yet, got one that is")
    for name, module in model.named_modules():
        where = name or type(model).__name__
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise TypeError(f"accelerate: model must be compiled afterwards, got compiled {where}")
        if "_fsdp_wrapped_module" in module._modules or "_flat_param" in module.__dict__:
            raise TypeError(f"accelerate: model must be sharded afterwards, got sharded {where}")
        if type(module).__module__.startswith("torch.ao.nn"):
            raise TypeError(f"accelerate: model must not be quantised, got quantised {where}")
    like = None
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            raise TypeError(f"accelerate: model must be sharded afterwards, got sharded {name}")
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            came = f"{name} in {str(parameter.dtype).removeprefix('torch.')}"
            raise TypeError(f"accelerate: model must not be quantised, got {came}")
        if type(parameter.data) is not torch.Tensor:
            came = f"{name} as {type(parameter.data).__name__}"
            raise TypeError(f"accelerate: model must hold plain tensors, got {came}")
        like = parameter if like is None else like
    like = torch.empty(0) if like is None else like
    check.choose_impl("accelerate", impl, ("triton", "torch", "reference"), like)
