"""Where the kernels' tests run: interpreted on the CPU, or compiled on CLIPA_TEST_DEVICE=cuda.

Tests make their tensors as on a CPU. On a device a mode moves what they draw, so that both see the
same numbers, and bfloat16, which the interpreter multiplies wrongly, is a dtype more.
"""

import os

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

DEVICE = os.environ.get("CLIPA_TEST_DEVICE", "cpu")
COMPILED = DEVICE != "cpu"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
if COMPILED:
    DTYPES["bf16"] = torch.bfloat16
# The files of tests that go to the device; all others stay on the CPU.
FILES = (
    "test_attention_triton.py",
    "test_contrastive_triton.py",
    "test_gelu_triton.py",
    "test_layer_norm_triton.py",
    "test_masking.py",
    "test_masking_triton.py",
    "test_patch_dropout.py",
    "test_patch_embed_triton.py",
)


class on_device(TorchFunctionMode):
    """Tensors that are made without a device are made on the CPU and moved to DEVICE."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func not in _device_constructors() or kwargs.get("device") is not None:
            return out
        if not isinstance(out, Tensor) or func is torch.asarray:
            return out
        return out.detach().to(DEVICE).requires_grad_(out.requires_grad)
