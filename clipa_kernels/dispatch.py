"""How an operator's body is reached: directly where only autograd listens, else by the dispatcher.

A custom operator of torch.library takes about 70 us of the host, forward and backward, beside what
its body does; an autograd.Function around the same body takes 25. A transformer of 48 layers calls
some 200 of them a step, and a GPU that is done sooner waits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def unheard(tensors: tuple[Any, ...]) -> bool:
    """Whether nothing but autograd sees what is done with tensors: no compiler, tracer, mode or
    transform of torch.func, and no tensor of another class, as a fake or a distributed one."""
    for each in tensors:  # a generator takes twice as long
        if type(each) not in _PLAIN and isinstance(each, Tensor):
            return False
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
    )


def forward(
    name: str, operator: Any, body: Callable, save: Callable, gradient: Callable
) -> Callable:
    """The operator with its autograd, or its body in an autograd.Function.

    Args:
        name: of the operator.
        operator: of torch.library.custom_op(body).
        save, gradient: as `operator.register_autograd` takes them; registered here.
    """
    operator.register_autograd(gradient, setup_context=save)

    def run(ctx, *inputs):
        output = body(*inputs)
        save(ctx, inputs, output)
        return output

    # A profile shows the class's name, "clipa::bias_gelu", and "clipa::bias_geluBackward".
    members = dict(forward=staticmethod(run), backward=staticmethod(gradient))
    direct = type(name, (torch.autograd.Function,), members)

    def call(*inputs):
        return direct.apply(*inputs) if unheard(inputs) else operator(*inputs)

    return call


def backward(operator: Any, body: Callable) -> Callable:
    """An operator that makes gradients, or its body; the former where gradients get a history,
    whose use it then refuses."""

    def call(*inputs):
        direct = not torch.is_grad_enabled() and unheard(inputs)
        return body(*inputs) if direct else operator(*inputs)

    return call
