"""Argument checks that ops share: "<function>: <what must hold>, got <what came>"."""

import torch
from torch import Tensor


def describe(tensor: Tensor) -> str:
    """Shape, dtype and device of a tensor, for the end of an error sentence."""
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def readable(tensor: Tensor) -> bool:
    """Whether a check may read values: on the host and outside a trace, so nothing waits."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def require_tensor(function: str, **tensors: object) -> None:
    """TypeError unless every named argument is a tensor."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")


def require_float(function: str, **tensors: Tensor) -> None:
    """TypeError unless every named tensor is floating point."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{function}: {name} must be floating point, got {describe(tensor)}")


def require_integer(function: str, **tensors: Tensor) -> None:
    """TypeError unless every named tensor holds integers."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype.itemsize < 2:
            raise TypeError(f"{function}: {name} must hold int32 or int64, got {describe(tensor)}")


def require_same_device(function: str, **tensors: Tensor | None) -> None:
    """ValueError unless all named tensors lie on one device."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({tensor.device for tensor in present.values()}) > 1:
        came = ", ".join(f"{name} on {tensor.device}" for name, tensor in present.items())
        raise ValueError(f"{function}: all tensors must be on one device, got {came}")


def require_same_dtype(function: str, **tensors: Tensor | None) -> None:
    """TypeError unless all named tensors have one dtype."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({tensor.dtype for tensor in present.values()}) > 1:
        came = ", ".join(f"{name} {tensor.dtype}" for name, tensor in present.items())
        raise TypeError(f"{function}: all of these must have one dtype, got {came}")


def choose_impl(function: str, impl: str, implementations: tuple[str, ...]) -> str:
    """The implementation to run: "auto" is "torch" until a kernel for this device is listed."""
    if impl == "auto":
        return "torch"
    if impl not in implementations:
        known = ", ".join(("auto", *implementations))
        raise ValueError(f"{function}: impl must be one of {known}, got {impl!r}")
    return impl
