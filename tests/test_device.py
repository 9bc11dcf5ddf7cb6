"""The way of a GPU without one, on fake CUDA tensors: kernels are chosen, and no value is read.
Where there is one, the tests of kernels run on it."""

import os
import subprocess
import sys
from pathlib import Path

import device
import pytest
import torch
from configs import changed
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from clipa_kernels import (
    add_layer_norm,
    block_patches,
    contrastive_loss,
    grid_patches,
    patch_embed,
    random_patches,
    sigmoid_loss,
)
from clipa_kernels.attention import api as attention
from clipa_kernels.packing import Packed
from data.batches import Batch
from models import build
from train import train_step
from training.build import build_model
from training.config import preset
from training.distributed import World
from training.optim import SpikeGuard, adamw

grads = pytest.importorskip("clipa_kernels.contrastive.kernels_grads")
MASKS = {
    "random": lambda **key: random_patches(4, (4, 4), 0.5, **key),
    "grid": lambda **key: grid_patches(4, (4, 4), **key),
    "block": lambda **key: block_patches(4, (4, 4), 0.5, **key),
}


class Operators(TorchDispatchMode):
    """Names of the operators called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("loss", [contrastive_loss, sigmoid_loss])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dialect", ["open_clip", "openai", "clipa-v1", "clipa-v2"])
def test_a_step_waits_for_no_value(dialect, mask, loss, dtype, fake_cuda):
    """Token choice, both towers and the loss: a fake tensor has no value that could be read."""
    sizes = dict(vision=dict(image_size=32), text=dict(context=16, vocab_size=100))
    model = build("demo", 8, dialect=dialect, logit_bias=-10.0, **sizes).to(dtype)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    longest = 5 if dialect == "clipa-v2" else 8  # its text has one length
    with FakeTensorMode(), torch.device("cuda"), Operators() as called:
        weights = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in state.items()}
        images = torch.empty(4, 32, 32, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        ends = torch.empty(5, dtype=torch.int32)
        text = Packed(torch.empty(20, dtype=torch.int64), ends, longest)
        keep = MASKS[mask](seed=0, step=0, device="cuda")
        out = torch.func.functional_call(model, weights, (images, text, keep))
        value = loss(*out.values())
    assert (value.device.type, value.dtype) == ("cuda", torch.float32)
    own = {name for name in called.names if name.startswith("clipa::")}
    assert own == {
        "clipa::choose_patches",
        "clipa::patch_embed_tokens",
        "clipa::varlen_attention_qkvpacked",
        "clipa::add_layer_norm",
        "clipa::bias_gelu",
        f"clipa::{loss.__name__}",
    }


@pytest.mark.parametrize(
    ("length", "head_dim", "dtype", "chosen"),
    [
        (64, 80, torch.bfloat16, "triton"),
        (65, 80, torch.bfloat16, "varlen_attn"),
        (128, 64, torch.float16, "triton"),
        (129, 64, torch.float16, "varlen_attn"),
        (577, 80, torch.float32, "triton"),
        (1025, 64, torch.bfloat16, "varlen_attn"),
        (64, 192, torch.bfloat16, "varlen_attn"),
        (1025, 64, torch.float32, "sdpa"),
    ],
)
def test_long_attention_is_torchs_where_it_is_faster(length, head_dim, dtype, chosen, monkeypatch):
    monkeypatch.setattr(attention, "_VARLEN_ATTN", True)
    torch.use_deterministic_algorithms(False)  # as the tests' fixture does after each
    with FakeTensorMode():
        x = torch.empty(2 * length, 3, 2, head_dim, dtype=dtype, device="cuda")
        assert attention._choose("f", "auto", x, 2, length) == chosen
        exact = "triton" if length <= 1024 and head_dim <= 128 else "sdpa"
        torch.use_deterministic_algorithms(True)
        assert attention._choose("f", "auto", x, 2, length) == exact
        torch.use_deterministic_algorithms(False)
        monkeypatch.setattr(attention, "_VARLEN_ATTN", False)  # before torch 2.11
        assert attention._choose("f", "auto", x, 2, length) == exact


@pytest.mark.parametrize("name", ["emoji", "clipa-v1-b16", "clipa-v2-h14"])
def test_the_programs_step_waits_for_no_value(name):
    """train.py's: input, towers, loss, backward, clipping, spikes, AdamW, clamp, and once more.
    Fakes of the CPU: the backward of CUDA's asks for the driver."""
    config = changed(preset(name), model__size="demo", optim__skip_above=8.0, run__impl="triton")
    stage = next(iter(config.stages))
    side = config.stages[stage].image_size
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    with FakeTensorMode():
        images = torch.empty(4, side, side, 3, dtype=torch.uint8)
        ends, longest = torch.empty(5, dtype=torch.int32), config.stages[stage].context
        ids = torch.empty(4 * longest, dtype=torch.int64)
        batch = Batch(images, ids, ends, longest, first_sample=0, skipped=0)
        model = build_model(config, stage)
        optimizer = adamw(model, config)
        guard = SpikeGuard(optimizer, config.optim.skip_above)
        for step in range(2):
            values = train_step(model, optimizer, batch, step, config, stage, world, guard)
    assert optimizer.defaults["fused"] and isinstance(values["loss"], FakeTensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_librarys_products_take_these_arguments(dtype, fake_products):
    """G Y and G' X of a strip: the branches that only a GPU takes."""
    with FakeTensorMode(), torch.device("cuda"):
        g, x, y = (torch.empty(n, m, dtype=dtype) for n, m in ((256, 512), (256, 64), (512, 64)))
        d_text, g_t = torch.empty(512, 64, dtype=torch.float32), g.t()
        for out_dtype in (dtype, torch.float32):
            strip = torch.empty(300, 64, dtype=out_dtype)[:256]
            with Operators() as called:
                grads._product(g, y, strip)
                grads._add_product(g_t, x, d_text)
            launches = [name for name in called.names if name.startswith("aten::")]
            assert launches == ["aten::mm", "aten::addmm"]


def test_sizes_without_values():
    """Tensors on the meta device, of which torch knows no autocast."""
    x, rows = torch.empty(4, 16, device="meta"), torch.empty(16, device="meta")
    images, weight = torch.empty(2, 3, 8, 8, device="meta"), torch.empty(16, 3, 4, 4, device="meta")
    assert contrastive_loss(x, x, 1.0).shape == sigmoid_loss(x, x, 1.0).shape == ()
    assert all(y.shape == x.shape for y in add_layer_norm(x, x, rows, rows))
    assert patch_embed(images, None, weight, rows, x).tokens.shape == (8, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_kernels_are_right_on_this_gpu():
    """The tests of kernels once more, compiled, in a process that is not under the interpreter."""
    here = Path(__file__).parent
    unwanted = {"TRITON_INTERPRET", "PYTEST_XDIST_WORKER"}
    env = {key: value for key, value in os.environ.items() if key not in unwanted}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "--tb", "short"]
    run = subprocess.run(
        [*command, *(here / name for name in device.FILES)],
        cwd=here.parent, env=env | {"CLIPA_TEST_DEVICE": "cuda"}, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:]


def test_what_tests_draw_goes_to_the_device(monkeypatch):
    """All but what names a device itself; leaves stay leaves."""
    monkeypatch.setattr(device, "DEVICE", "meta")
    assert all((Path(__file__).parent / name).is_file() for name in device.FILES)
    generator = torch.Generator().manual_seed(0)
    with device.on_device():
        x = torch.randn(3, 2, generator=generator, requires_grad=True)
        made = [x, torch.tensor([1]), torch.empty(2, device=None), torch.nn.Linear(2, 3).weight]
        host = torch.zeros(2, device="cpu")
    assert {tensor.device.type for tensor in made} == {"meta"} and host.device.type == "cpu"
    assert x.is_leaf and x.requires_grad and not made[1].requires_grad
