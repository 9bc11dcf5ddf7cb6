"""Operators' bodies are called directly, unless something but autograd would see the operator."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from clipa_kernels import varlen_attention_qkvpacked
from clipa_kernels.dispatch import unheard

ENDS = torch.tensor([0, 3, 5], dtype=torch.int32)
NAME = "clipa::varlen_attention_qkvpacked"


def attend(qkv):
    return varlen_attention_qkvpacked(qkv, ENDS, 3, impl="torch")


def drawn():
    return torch.randn(5, 3, 2, 8, generator=torch.manual_seed(0)).requires_grad_()


def gradient(qkv, **how):
    out = attend(qkv)
    return out, *torch.autograd.grad(out, qkv, torch.ones_like(out), **how)


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


class Own(torch.Tensor):
    """A class of tensors that does as the others do."""


def operators(events):
    return [event.key for event in events.key_averages() if event.key.startswith("clipa::")]


def test_nobody_listens():
    qkv = drawn()
    with profile(activities=[ProfilerActivity.CPU]) as events:
        gradient(qkv)
    assert operators(events) == [] and unheard((qkv, torch.nn.Parameter(qkv), None, 3))


def test_a_mode_sees_the_operators_and_gets_the_same():
    with Names() as names:
        seen = gradient(drawn())
    assert [name for name in names.seen if name.startswith("clipa::")] == [NAME, f"{NAME}_backward"]
    for one, other in zip(seen, gradient(drawn()), strict=True):
        assert torch.equal(one, other)


def test_a_gradient_with_a_history_is_the_operators():
    """Which refuses to be differentiated."""
    with profile(activities=[ProfilerActivity.CPU]) as events:
        _, dqkv = gradient(drawn(), create_graph=True)
    assert operators(events) == [f"{NAME}_backward"]
    with pytest.raises(RuntimeError, match="a second derivative needs impl"):
        dqkv.sum().backward()


def test_transforms_and_classes_of_tensors_see_the_operator():
    heard = []
    torch.func.vmap(lambda x: heard.append(unheard((x,))) or x)(torch.ones(2))
    torch.jit.trace(lambda x: heard.append(unheard((x,))) or x, torch.ones(2), check_trace=False)
    heard.append(unheard((torch.ones(2), torch.ones(2).as_subclass(Own))))
    with torch._subclasses.FakeTensorMode():
        heard.append(unheard((torch.ones(2),)))
    assert heard == [False] * 4
