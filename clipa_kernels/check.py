"""What operations refuse in the same words: "<function>: <what must hold>, got <what came>".

Arguments, and at the end the derivatives that fast implementations lack.
"""

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from numbers import Integral, Real

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

# A tuple: Dynamo of torch 2.8 does not know A | B where isinstance asks for it.
INTEGERS = (Integral, torch.SymInt)
_TRITON = find_spec("triton") is not None
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def describe(tensor: Tensor) -> str:
    """Shape, dtype and device of a tensor, for the end of an error sentence."""
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def readable(tensor: Tensor) -> bool:
    """Whether a check may read values: on the host and outside a trace, so nothing waits."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not isinstance(tensor, FakeTensor)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of products on a device where autocast is on, else None."""
    try:
        enabled = torch.is_autocast_enabled(device.type)
    except RuntimeError:  # a device without autocast, as meta; torch 2.8 does not compile asking
        return None
    return torch.get_autocast_dtype(device.type) if enabled else None


def require_tensor(function: str, **tensors: object) -> None:
    """TypeError unless every named argument is a tensor, neither sparse nor nested."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")
        if value.layout is not torch.strided:
            raise TypeError(f"{function}: {name} must be dense, got {value.layout}")


def require_float(function: str, **tensors: Tensor) -> None:
    """TypeError unless all are tensors of floating point, of 16 bits or more."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            require_tensor(function, **{name: tensor})
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise TypeError(f"{function}: {name} must be floating point, got {describe(tensor)}")


def require_integer(function: str, **tensors: Tensor) -> None:
    """TypeError unless every named tensor holds integers."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype.itemsize < 2:
            raise TypeError(f"{function}: {name} must hold int32 or int64, got {describe(tensor)}")


def require_int(function: str, low: int, high: int, **values: object) -> tuple[int, ...]:
    """The named values as Python's integers, as those of NumPy wrap where they are added.

    TypeError unless every one is an integer, ValueError unless in [low, high).
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, INTEGERS):
            raise TypeError(f"{function}: {name} must be an integer, got {value!r}")
        if not low <= value < high:
            raise ValueError(f"{function}: {name} must be in [{low}, {high}), got {value}")
    return tuple(v if isinstance(v, torch.SymInt) else int(v) for v in values.values())


def require_device(function: str, device: object) -> torch.device | None:
    """The device, None for torch's default; TypeError or ValueError for one torch does not know."""
    if device is None or isinstance(device, torch.device):
        return device
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        error = ValueError if isinstance(device, (str, int)) else TypeError
        raise error(f"{function}: device must be one of torch's, got {device!r}") from None


def as_int(function: str, low: int, high: int, **named: object) -> int:
    """The one named value as an int: an integer, NumPy's too, or a tensor with one integer, whose
    reading waits for its device. TypeError for others, ValueError unless in [low, high)."""
    ((name, value),) = named.items()
    if type(value) is int and low <= value < high:
        return value
    if isinstance(value, Tensor) and value.numel() == 1 and _whole(value.dtype):
        named = {name: int(value)}
    elif isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be an integer, got {describe(value)}")
    return require_int(function, low, high, **named)[0]


def as_float(function: str, **named: object) -> float:
    """The one named value as a float: a finite number, NumPy's too, or a tensor with one, whose
    reading waits for its device, that needs no gradient. TypeError, ValueError for others."""
    ((name, value),) = named.items()
    if type(value) is float and abs(value) < float("inf"):
        return value
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        if value.requires_grad:
            came = f"{describe(value)} that requires grad, which would get none"
            raise TypeError(f"{function}: {name} must be a number, got {came}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (float, Real, torch.SymFloat)):
        came = describe(value) if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{function}: {name} must be a number, got {came}")
    if not abs(value) < float("inf"):
        raise ValueError(f"{function}: {name} must be finite, got {value}")
    return value if isinstance(value, torch.SymFloat) else float(value)


def as_flag(function: str, **named: object) -> bool:
    """The one named value as a bool: True or False, NumPy's, or 1 or 0; TypeError for others."""
    ((name, value),) = named.items()
    if value is True or value is False:
        return value
    known = isinstance(value, Integral) or type(value).__name__ in ("bool", "bool_")
    if not isinstance(value, torch.SymBool) and not (known and value in (False, True)):
        came = describe(value) if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{function}: {name} must be True or False, got {came}")
    return bool(value)


def _whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def require_vectors(function: str, **tensors: Tensor) -> None:
    """TypeError unless all are tensors of integers, ValueError unless one-dimensional."""
    require_tensor(function, **tensors)
    require_integer(function, **tensors)
    for name, tensor in tensors.items():
        if tensor.dim() != 1:
            raise ValueError(f"{function}: {name} must be one-dimensional, got {describe(tensor)}")


def require_same_device(function: str, **tensors: Tensor | None) -> None:
    """ValueError unless all named tensors lie on one device."""
    if len({tensor.device for tensor in tensors.values() if tensor is not None}) > 1:
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        came = ", ".join(f"{name} on {tensor.device}" for name, tensor in present.items())
        raise ValueError(f"{function}: all tensors must be on one device, got {came}")


def require_same_dtype(function: str, **tensors: Tensor | None) -> None:
    """TypeError unless all named tensors have one dtype."""
    if len({tensor.dtype for tensor in tensors.values() if tensor is not None}) > 1:
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        came = ", ".join(f"{name} {tensor.dtype}" for name, tensor in present.items())
        raise TypeError(f"{function}: all of these must have one dtype, got {came}")


def choose_impl(
    function: str, impl: str, implementations: tuple[str, ...], like: Tensor | None = None
) -> str:
    """The implementation to run on tensors such as `like`.

    "auto" is "triton" on a CUDA device, where the function has kernels and they take the dtype,
    else "torch". An explicit "triton" that cannot run here raises RuntimeError.
    """
    if isinstance(impl, str) and impl == "auto":
        kernels = "triton" in implementations and like is not None and like.is_cuda
        kernels = kernels and _TRITON and torch.version.hip is None
        return "triton" if kernels and like.dtype in _KERNEL_DTYPES else "torch"
    if not isinstance(impl, str) or impl not in implementations:
        known = ", ".join(("auto", *implementations))
        raise ValueError(f"{function}: impl must be one of {known}, got {impl!r}")
    if impl == "triton" and not torch.compiler.is_compiling():
        _require_triton(function, like)
    return impl


def _require_triton(function: str, like: Tensor) -> None:
    if like.dtype not in _KERNEL_DTYPES:
        raise TypeError(
            f'{function}: impl "triton" takes float32, float16 or bfloat16, got {describe(like)}'
        )
    if not _TRITON:
        raise RuntimeError(
            f'{function}: impl "triton" needs the package triton, got none installed'
        )
    if like.is_cuda:
        return
    from .launch import runs_on

    if not runs_on(like.device):
        raise RuntimeError(
            f'{function}: impl "triton" needs a CUDA tensor, or TRITON_INTERPRET=1 before triton '
            f"is imported, got {describe(like)}"
        )


# The derivatives that fast operations lack: of second order, and in forward mode. Torch drops them
# without a word where a saved gradient has no history or an operator no rule; here they raise.
# A compiled function with ahead-of-time autograd has no second derivative, whatever it holds; torch
# says so itself (its backward keeps the history of its inputs alone, and misses some in 2.14).


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether a tensor carries a derivative in forward mode."""
    return forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


def refuse_tangents(function: str, *tensors: Tensor | None) -> None:
    """RuntimeError where a tensor carries a derivative in forward mode, which operators drop."""
    if has_tangent(*tensors):
        raise _refusal(function, "a derivative in forward mode")


def refuse_second(function: str, *again: Tensor | None) -> None:
    """RuntimeError where gradients reach what a backward saved, or made, without a history.

    In a node's backward: what comes back to those of its outputs that its gradients are made of.
    """
    if any(gradient is not None for gradient in again):
        raise _refusal(function, "a second derivative")


def once_operator(operator: torch.library.CustomOpDef, function: str) -> None:
    """A second derivative raises in the words of `function`: for operators that make gradients."""
    operator.register_autograd(lambda ctx, *again: refuse_second(function, *again))


def once(function: str) -> Callable[[Callable], Callable]:
    """Decorates the backward of an autograd.Function whose last output is a zero [] that it saves
    last: a second derivative raises, whatever it is asked for. The Function sets
    set_materialize_grads(False); its backward gets None where an output was not used.

    The zero has this node as its history, so that gradients to which it is added lead through
    refuse_second to every input. torch's once_differentiable drops them in silence where the
    incoming gradient is a constant or autograd.grad is asked for some leaves alone.
    """

    def decorate(backward: Callable) -> Callable:
        @wraps(backward)
        def wrapped(ctx, *gradients: Tensor | None):
            refuse_second(function, gradients[-1])
            with torch.no_grad():
                grads = backward(ctx, *gradients[:-1])
            if not torch.is_grad_enabled():
                return grads
            zero = ctx.saved_tensors[-1]
            return tuple(None if grad is None else grad + zero.to(grad.dtype) for grad in grads)

        return wrapped

    return decorate


def _refusal(function: str, derivative: str) -> RuntimeError:
    return RuntimeError(f'{function}: {derivative} needs impl="reference", got a faster one')
