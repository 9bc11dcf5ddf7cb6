"""Known by what it computes: a module's own forward and a new one on random weights and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn


def part_at(module: nn.Module | None, path: str) -> nn.Module | None:
    """The submodule at a path such as "attn.out_proj", or None."""
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def hooked(module: nn.Module) -> bool:
    """Whether a module that is passed over would do more than its class's forward.

    transformers leaves hooks that do nothing but where a call asks for attention's weights, and
    such a call is not taken.
    """
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    for hook in module._forward_hooks.values():
        if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
            return True
    forward = module.__dict__.get("forward")
    own = isinstance(forward, partial) and forward.func.__module__.startswith(f"{__package__}.")
    return forward is not None and not own


def intact(module: nn.Module, parts: tuple[tuple[str, type], ...]) -> bool:
    """Whether the parts that are passed over are those that were looked at, without hooks."""
    for path, kind in parts:
        part = part_at(module, path)
        if type(part) is not kind or hooked(part):
            return False
    return True


class Called(nn.Module):
    """A module whose forward is that of another, given as a function: no hook of it runs."""

    def __init__(self, module: nn.Module, function: Callable):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *args, **kwargs):
        return self.function(self.module, *args, **kwargs)


def random_weights(module: nn.Module, paths: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """fp32 values on the CPU for the parameters and buffers of `Called.module`, whatever the
    device: a model on "meta" is tried as well, and one whose scales are all but zero.

    paths: submodules whose values are needed, besides the module's own; None needs all.
    """
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if paths is not None and "." in name and not name.startswith(paths):
            continue
        wide = tensor.shape[1:].numel() ** -0.5 if tensor.dim() > 1 else 0.5
        draw = torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu")
        values[f"module.{name}"] = draw * wide if tensor.is_floating_point() else tensor.cpu()
    return values


def near(actual: Tensor, expected: Tensor) -> bool:
    """Equal to the rounding of fp32."""
    if not isinstance(expected, Tensor) or actual.shape != expected.shape:
        return False
    return bool((actual - expected).abs().max() <= 1e-4 * expected.abs().max())


def tried(module: nn.Module, plan, known: dict):
    """The plan, a Block or a Stem, once it has computed what the module computes, else a sentence
    why the module is left. known: what was found for modules of the same parts and shapes."""
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    kinds = tuple((name, type(part), _settings(part)) for name, part in module.named_modules())
    key = (type(module), shapes, kinds, plan.key)
    if key not in known:
        modes = [(part, part.training) for part in module.modules()]
        for part, _ in modes:
            part.training = False
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                known[key] = plan.tried(module)
        except Exception as error:  # whatever another library raises: it cannot be compared
            known[key] = f"it could not be tried: {type(error).__name__}: {error}"[:200]
        finally:
            for part, mode in modes:
                part.training = mode
    found = known[key]
    return found if isinstance(found, str) else replace(plan, **found)


def _settings(module: nn.Module) -> tuple:
    """The plain values that a module holds, as factors and flags; numbers of layers are no such."""
    plain = (float, bool, str)
    return tuple(
        (name, value)
        for name, value in sorted(module.__dict__.items())
        if isinstance(value, plain) and name != "training"
    )
