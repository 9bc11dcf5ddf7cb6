"""Tensors without memory: each op gives the shapes and dtypes of its results."""

import pytest
import torch

from clipa_kernels import (
    add_layer_norm,
    bias_gelu,
    contrastive_loss,
    patch_embed,
    sigmoid_loss,
    varlen_attention_qkvpacked,
)


def meta(*shape, **how):
    return torch.empty(shape, device="meta", **how)


CALLS = {
    "add_layer_norm": (lambda: add_layer_norm(meta(4, 8), None, meta(8), meta(8))[0], (4, 8)),
    "bias_gelu": (lambda: bias_gelu(meta(4, 8), meta(8)), (4, 8)),
    "attention": (
        lambda: varlen_attention_qkvpacked(meta(4, 3, 2, 16), meta(2, dtype=torch.int32), 4),
        (4, 2, 16),
    ),
    "contrastive_loss": (lambda: contrastive_loss(meta(4, 8), meta(4, 8), meta()), ()),
    "sigmoid_loss": (lambda: sigmoid_loss(meta(4, 8), meta(4, 8), meta()), ()),
    "patch_embed": (
        lambda: patch_embed(meta(2, 3, 8, 8), None, meta(8, 3, 4, 4), None, meta(4, 8)).tokens,
        (8, 8),
    ),
}


@pytest.mark.parametrize(("call", "shape"), CALLS.values(), ids=CALLS)
def test_shapes_without_memory(call, shape):
    out = call()
    assert (out.device.type, out.shape, out.dtype) == ("meta", shape, torch.float32)
