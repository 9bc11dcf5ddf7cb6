"""Bytes a token that one whole block moves, forward and backward: ours, open_clip's and timm's.

    TRITON_INTERPRET=1 python -m bench.meters.whole_block

ViT-H/14 at 37 tokens: the norms, products, attention, GELU and sums of one block, all counted by
counted.py. Ours runs under Triton's interpreter, at a small batch. The others run on fake tensors:
open_clip's under CUDA's rules of autocast with fp32 weights, timm's in pure bf16. Their attention
is PyTorch's fused one, at its least: q, k, v and the result, and in the backward those and their
gradients.

A figure is the growth from one batch to a larger one, by token. What a step moves once whatever
its batch drops out for all three alike: weights, their gradients, and autocast's casts of both
(2 D bytes a token at 4096 sequences).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from bench.meters.counted import Count, counted
from models.transformer import Block

LENGTH, WIDTH, HEADS = 37, 1280, 16  # ViT-H/14 with three quarters of 144 patches dropped
IN_FP32 = {F.layer_norm}  # of what a block calls: what autocast keeps in fp32 on CUDA, not on a CPU


class _CudaAutocast(TorchFunctionMode):
    """Autocast of a CPU with the rules of CUDA's, for what a block calls."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in IN_FP32:
            wide = lambda t: t.float() if isinstance(t, Tensor) else t  # noqa: E731
            args, kwargs = tree_map(wide, args), tree_map(wide, kwargs or {})
        return func(*args, **(kwargs or {}))


def ours(sequences: int, stream: torch.dtype = torch.bfloat16) -> Count:
    """models' block in bf16 with a residual stream of the given dtype, by the Triton kernels."""
    block = Block(WIDTH, HEADS, 4.0, causal=False, gelu="none", eps=1e-5, impl="triton")
    block.bfloat16()
    tokens = sequences * LENGTH
    x, residual = (torch.randn(tokens, WIDTH).to(dtype) for dtype in (torch.bfloat16, stream))
    gradients = x.clone(), residual.clone()
    leaves = [x.requires_grad_(), residual.requires_grad_(), *block.parameters()]
    cu_seqlens = torch.arange(0, tokens + 1, LENGTH, dtype=torch.int32)
    with counted() as count:
        torch.autograd.grad(block(x, residual, cu_seqlens, LENGTH), leaves, gradients)
    return count


def open_clip_amp(sequences: int) -> Count:
    """open_clip's block; bf16 is what its vision tower hands the first one under autocast."""
    from open_clip.transformer import ResidualAttentionBlock

    return _eager(lambda: ResidualAttentionBlock(WIDTH, HEADS), sequences, amp=True)


def timm_bf16(sequences: int) -> Count:
    """timm's block, in bf16 throughout."""
    from timm.models.vision_transformer import Block

    options = dict(qkv_bias=True, dtype=torch.bfloat16)
    return _eager(lambda: Block(WIDTH, HEADS, **options), sequences, amp=False)


def _eager(make: Callable[[], nn.Module], sequences: int, amp: bool) -> Count:
    """Made inside, so that weights are fake as well."""
    with FakeTensorMode():
        block = make()
        x = torch.empty(sequences, LENGTH, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        leaves = [x, *block.parameters()]
        with counted() as count:
            with ExitStack() as rules:
                if amp:
                    rules.enter_context(torch.autocast("cpu", torch.bfloat16))
                    rules.enter_context(_CudaAutocast())
                out = block(x)
            torch.autograd.grad(out, leaves, torch.empty_like(out))
    assert out.dtype == torch.bfloat16
    return count


def bytes_a_token(block: Callable[[int], Count], few: int, many: int) -> float:
    """Bytes that a token adds, in units of the width."""
    more = block(many).total().unique - block(few).total().unique
    return more / ((many - few) * LENGTH * WIDTH)


def main() -> None:
    """Print the three figures and ours over the others'."""
    own = bytes_a_token(ours, 1, 2)
    print(f"D bytes a token, {LENGTH} tokens a sequence, D = {WIDTH}: ours {own:.1f}")
    for rival in (open_clip_amp, timm_bf16):
        other = bytes_a_token(rival, 2048, 4096)
        print(f"{rival.__name__}: {other:.1f}, of which ours is {own / other:.3f}")


if __name__ == "__main__":
    main()
