"""Calls of the library whose launches bench compiles and weighs: steps of every preset, and rungs.

A step is a forward and backward of models' CLIP, two blocks deep, and its loss, as a process with
BATCH pairs takes it in each stage of each preset; then the evaluation's forward, with all patches.
A rung calls one operation, for what presets do not reach: other dtypes, widths, lengths, layouts.
Tensors are fake, so sizes are those of a real run; see launches.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench.meters.launches import Launch, recording
from clipa_kernels import (
    Packed,
    add_layer_norm,
    bias_gelu,
    block_patches,
    contrastive_loss,
    grid_patches,
    patch_embed,
    random_patches,
    sigmoid_loss,
    varlen_attention_qkvpacked,
)
from clipa_kernels.contrastive.ops import contrastive_grads, contrastive_stats
from models.clip import CLIP, configs

if TYPE_CHECKING:
    from training.config import Config, Stage

ARCHS = (80, 90, 100)
BATCH = 256  # pairs of a process: a GPU's share of the papers' batches
GROUP = 8  # processes whose texts a loss over a group sees
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
Call = tuple[str, Callable[[], None]]


def recorded(
    *ops: str, archs: tuple[int, ...] = ARCHS, kinds: Iterable[str] | None = None
) -> list[Launch]:
    """The launches of all calls, or of those kinds of them that are keys of CALLS; where ops are
    named, of their kernels alone: "attention", and "launch" for the kernel that several share.

    Raises: ValueError for an op without a launch.
    """
    found: list[Launch] = []
    with recording(*archs) as launches:
        for label, call in calls(kinds):
            call()
            found += [replace(launch, call=label) for launch in launches]
            launches.clear()
    known = sorted({launch.room for launch in found})
    for op in ops:
        if op not in known:
            raise ValueError(f"recorded: ops must be among {', '.join(known)}, got {op!r}")
    return [launch for launch in found if launch.room in ops] if ops else found


def calls(kinds: Iterable[str] | None = None) -> Iterator[Call]:
    """(what is called, in words; the call)."""
    for kind in CALLS if kinds is None else kinds:
        yield from CALLS[kind]()


def preset_calls() -> Iterator[Call]:
    """Steps of every preset, those alike once, and three in other dtypes. Their Config needs more
    packages than torch."""
    from training.config import preset
    from training.presets import PRESETS

    seen = set()
    for name in PRESETS:
        config = preset(name)
        for stage, sizes in config.stages.items():
            alike = (config.model, config.data.vocab_size, config.optim.loss, launched(sizes))
            if alike not in seen:
                yield f"{name} {stage}", partial(step, config, stage, BF16)
            seen.add(alike)
    for name, stage, dtype in (
        ("clipa-v2-h14", "short", FP16), ("clipa-v1-l16", "short", FP32),
        ("clipa-v2-h14", "full", FP32),
    ):  # fmt: skip
        yield f"{name} {stage} {NAMES[dtype]}", partial(step, preset(name), stage, dtype)


def launched(stage: Stage) -> tuple:
    """The fields of a stage that decide its launches."""
    table = stage.pos_embed == "learnable"
    return stage.image_size, stage.image_mask, stage.image_drop, stage.context, table


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """A fake tensor that takes a gradient where its dtype allows one."""
    return torch.empty(shape, dtype=dtype, requires_grad=dtype.is_floating_point)


def backward(*outputs: Tensor) -> None:
    """The gradients of all that was made with empty."""
    torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


def step(config: Config, name: str, dtype: torch.dtype) -> None:
    """A training step of a stage and an evaluation's forward, under autocast."""
    stage, side = config.stages[name], config.model.patch_size
    vision, text, width = configs(config.model.size, side, config.model.dialect)
    tables = dict(image_size=stage.image_size, pool=config.model.pool, positions=stage.pos_embed)
    vision = replace(vision, depth=2, **tables)
    text = replace(text, depth=2, context=stage.context, vocab_size=config.data.vocab_size)
    model = CLIP(vision, text, width, impl="triton")
    shape = (BATCH, stage.image_size, stage.image_size, 3)
    images = torch.empty(shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    grid = (stage.image_size // side,) * 2
    key = dict(seed=0, step=0, impl="triton")
    masks = {
        "none": lambda: None,
        "random": lambda: random_patches(BATCH, grid, stage.image_drop, **key),
        "grid": lambda: grid_patches(BATCH, grid, **key),
        "block": lambda: block_patches(BATCH, grid, stage.image_drop, **key),
    }
    whole = BATCH * stage.context
    tokens = whole if config.dialect.pads_text else whole * 3 // 4 + 1
    ends = torch.empty(BATCH + 1, dtype=torch.int32)
    packed = Packed(torch.empty(tokens, dtype=torch.int64), ends, stage.context)
    loss = sigmoid_loss if config.optim.loss == "sigmoid" else contrastive_loss
    with torch.autocast("cpu", dtype, enabled=dtype != FP32):
        out = model(images, packed, masks[stage.image_mask]())
        out = [out[n] for n in ("image_features", "text_features", "logit_scale")]
        loss(*out, impl="triton").backward()
        with torch.no_grad():
            model.encode_image(images)
            model.encode_text(packed)


def attention_calls(tokens: int = 1 << 18, heads: int = 16) -> Iterator[Call]:
    """Every rung of the tables at head sizes that are cut in one, two and three chunks."""

    def call(dtype: torch.dtype, longest: int, size: int, causal: bool, uniform: bool) -> None:
        batch = tokens // longest
        total = batch * longest if uniform else batch * longest * 3 // 4
        qkv = empty(total, 3, heads, size, dtype=dtype)
        ends = torch.empty(batch + 1, dtype=torch.int32)
        backward(varlen_attention_qkvpacked(qkv, ends, longest, causal=causal, impl="triton"))

    shapes = [(BF16, 16, 64, False, True), (FP16, 37, 80, True, False)]
    for size in (64, 80, 88, 104, 128):
        shapes += [(BF16, longest, size, False, True) for longest in (8, 17, 50, 197, 577)]
        shapes += [(BF16, longest, size, True, False) for longest in (17, 50, 77, 577)]
        shapes += [(BF16, 50, size, False, False)]
        shapes += [(FP32, longest, size, False, True) for longest in (16, 50)]
        shapes += [(FP32, 50, size, True, False)]
    for dtype, longest, size, causal, uniform in shapes:
        label = f"{longest}x{size} {NAMES[dtype]}{' causal' if causal else ''}"
        label += "" if uniform else " ragged"
        yield label, partial(call, dtype, longest, size, causal, uniform)


def stem_calls(batch: int = 4096) -> Iterator[Call]:
    """Images of uint8 in three layouts, and floating ones, with a bias and a class token."""

    def call(pixels: torch.dtype, dtype: torch.dtype, side: int, layout: str) -> None:
        size, width = 8 * side, 1280
        if layout == "chw":
            images = torch.empty(batch, 3, size, size, dtype=pixels)
        elif layout == "cut":  # rows begin at any byte; from first to last a whole number of words
            images = torch.empty(batch, size + 3, size + 1, 3, dtype=pixels)[:, :size, :size]
        else:  # unaligned: the first pixel lies at an odd byte
            images = torch.empty(batch * size * size * 3 + 1, dtype=pixels)
            images = images[1:] if layout == "unaligned" else images[:-1]
            images = images.view(batch, size, size, 3)
        images = images if layout == "chw" else images.permute(0, 3, 1, 2)
        keep = torch.empty(batch, 16, dtype=torch.int64)
        weight, bias = empty(width, 3, side, side, dtype=dtype), empty(width)
        table, token = empty(1 + 64, width), empty(width)
        out = patch_embed(images, keep, weight, bias, table, token, impl="triton")
        backward(out.tokens)

    u8 = torch.uint8
    for pixels, dtype, side, layout in (
        (u8, BF16, 16, "hwc"), (u8, BF16, 14, "hwc"), (u8, BF16, 14, "chw"), (u8, BF16, 16, "cut"),
        (BF16, BF16, 16, "chw"), (u8, FP16, 16, "hwc"), (u8, FP32, 16, "hwc"),
        (u8, FP32, 14, "hwc"), *((u8, dtype, 16, "unaligned") for dtype in (BF16, FP16, FP32)),
    ):  # fmt: skip
        kind = "u8" if pixels == u8 else NAMES[pixels]
        label = f"{kind} {NAMES[dtype]} {side} px {layout}"
        yield label, partial(call, pixels, dtype, side, layout)


def glue_calls(rows: int = 4096 * 37) -> Iterator[Call]:
    """Every rung of the tables, dtypes that differ, and a ragged width."""

    def gelu(form: str, dtype: torch.dtype, width: int) -> None:
        backward(bias_gelu(empty(rows, width, dtype=dtype), empty(width), form, impl="triton"))

    def norm(dtype: torch.dtype, stream: torch.dtype, width: int) -> None:
        x, residual = empty(rows, width, dtype=dtype), empty(rows, width, dtype=stream)
        backward(*add_layer_norm(x, residual, empty(width), empty(width), impl="triton"))

    for form, dtype, width in (
        ("none", BF16, 5120), ("tanh", BF16, 5120), ("quick", BF16, 5120),
        ("none", FP16, 5120), ("none", FP32, 5120), ("none", BF16, 100),
    ):  # fmt: skip
        yield f"{form} {NAMES[dtype]} D={width}", partial(gelu, form, dtype, width)
    for dtype, stream, width in (
        *((BF16, BF16, width) for width in (1280, 4096, 768, 384, 100)),
        (BF16, FP32, 1280), (FP16, FP16, 1280), (FP32, FP32, 4096),
    ):  # fmt: skip
        label = f"{NAMES[dtype]} on {NAMES[stream]} D={width}"
        yield label, partial(norm, dtype, stream, width)


def loss_calls() -> Iterator[Call]:
    """Every rung of the table: alone, over a group, and the sigmoid's, with and without features'
    gradients. A width enters the code through its rung and whether it divides into slices."""

    def features(n: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return empty(n, width, dtype=dtype), empty(n, width, dtype=dtype)

    def alone(n: int, width: int, dtype: torch.dtype) -> None:
        backward(contrastive_loss(*features(n, width, dtype), empty(), impl="triton"))

    def group(n: int, width: int, dtype: torch.dtype) -> None:
        image, text = empty(n // GROUP, width, dtype=dtype), empty(n, width, dtype=dtype)
        scale, pairs = torch.empty(()), (0, 0, n // GROUP)
        rows, cols = contrastive_stats(image, text, scale, *pairs, True)
        d_loss, wanted = torch.empty(()), [True] * 3
        contrastive_grads(image, text, scale, rows, cols, None, d_loss, *pairs, wanted, True, True)

    def sigmoid(n: int, width: int, dtype: torch.dtype, learnt: bool = True) -> None:
        image, text = (x.requires_grad_(learnt) for x in features(n, width, dtype))
        backward(sigmoid_loss(image, text, empty(), empty(), impl="triton"))

    for n, width, dtype in (
        *((32768, width, BF16) for width in (512, 96, 1000)),
        (32768, 512, FP16), (32768, 512, FP32), (32768, 1000, FP32),
    ):  # fmt: skip
        size = f"{n}x{width} {NAMES[dtype]}"
        for name, loss in (("alone", alone), ("group", group), ("sigmoid", sigmoid)):
            yield f"{name} {size}", partial(loss, n, width, dtype)
        yield f"sigmoid, scale and bias alone {size}", partial(sigmoid, n, width, dtype, False)


def masking_calls(batch: int = 4096) -> Iterator[Call]:
    """The three masks for the largest images, and the smallest block."""
    key = dict(seed=0, step=0, impl="triton")
    yield "random of 1024", partial(random_patches, batch, (32, 32), 0.75, **key)
    yield "grid of 1024", partial(grid_patches, batch, (32, 32), **key)
    yield "block of 1024", partial(block_patches, batch, (32, 32), 0.75, **key)
    yield "random of 16", partial(random_patches, batch, (4, 4), 0.5, **key)


CALLS = {
    "presets": preset_calls,
    "attention": attention_calls,
    "stem": stem_calls,
    "glue": glue_calls,
    "loss": loss_calls,
    "masking": masking_calls,
}
