"""The derivatives that fast operations lack: of second order, and in forward mode. Torch drops them
without a word where a saved gradient has no history or an operator no rule; here they raise.

A compiled function with ahead-of-time autograd has no second derivative, whatever it holds: to say
so is torch's part (its backward keeps the history of its inputs alone, and misses some in 2.14).
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether a tensor carries a derivative in forward mode."""
    return any(
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
