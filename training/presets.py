"""The demo and the papers' recipes, as overrides of Config's defaults.

Source: training scripts and configs of UCSC-VLAA/CLIPA (clipa_torch for v1, clipa_jax for v2).
One thing of CLIPA-v2 is left out: Adam's momentum in bfloat16.
"""

from collections.abc import Mapping
from typing import Any


def per_256(lr: float, batch: int) -> float:
    """The papers' rule: they quote the learning rate of 256 samples; it grows with the batch."""
    return lr * batch / 256


_JITTER = dict(brightness=0.32, contrast=0.32, saturation=0.32, hue=0.08, jitter=0.8, grey=0.2)
_OPTIM = {"weight_decay": 0.2}
_RUN = {"precision": "bf16", "compile": True, "save_every": 1000, "log_every": 50}


def _v1(size: str, pool: str, augment: dict, short: dict, full: dict) -> dict[str, Any]:
    """A fixed position table while tokens are few, a learnable one after."""
    return {
        "data": {
            "source": "laion-400m/{00000..41407}.tar",
            "tokenizer": "clip",
            "vocab_size": 49_408,
            "workers": 8,
        },
        "augment": augment,
        "model": {"size": size, "dialect": "clipa-v1", "patch_size": 16, "pool": pool},
        "optim": _OPTIM,
        "run": _RUN,
        "stages": {
            "short": {"pos_embed": "sincos-mae", **short},
            "full": {"image_size": 224, **full},
        },
    }


def _v1_l16(image_size: int, text: dict, context: int) -> dict[str, Any]:
    short = dict(
        image_size=image_size,
        **text,
        steps=73_242,  # 6 epochs of 400 million
        batch_size=32_768,
        lr=per_256(8e-6, 32_768),
        warmup=1563,
    )
    full = dict(
        context=context,
        steps=18_285,  # 131 million samples
        batch_size=7168,
        lr=per_256(8e-7, 7168),
        warmup=3571,
    )
    return _v1("L", "mean-with-cls", _JITTER, short, full)


def _v2(
    size: str, image_size: int = 84, lr: float = 8e-6, full: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Few tokens, then 224 and 336 pixels with masks; `full` overrides the second stage."""
    table = {"pos_embed": "sincos-moco"}
    short = dict(
        image_size=image_size,
        context=8,
        text_mask="syntax",
        steps=195_490,  # 12.8 billion samples
        batch_size=65_536,
        lr=per_256(lr, 65_536),
        warmup=3200,
    )
    second = dict(
        image_size=224,
        image_mask="random",
        image_drop=0.3,
        context=32,
        steps=16_000,  # 524 million samples
        batch_size=32_768,
        lr=per_256(4e-7, 32_768),
        warmup=800,
    )
    high = dict(
        image_size=336,
        image_mask="random",
        image_drop=0.4,
        context=32,
        steps=8000,  # 131 million samples
        batch_size=16_384,
        lr=per_256(1e-7, 16_384),
        warmup=1600,
    )
    return {
        "data": {
            "source": "datacomp-1b/{00000..139826}.tar",
            "tokenizer": "bert-base-uncased-vocab.txt",
            "vocab_size": 32_000,
            "workers": 8,
        },
        "augment": _JITTER,
        "model": {"size": size, "dialect": "clipa-v2", "patch_size": 14, "pool": "mean"},
        "optim": _OPTIM | {"moment": "bf16"},
        "run": _RUN,
        "stages": {
            "short": table | short,
            "full": table | second | dict(full),
            "high": table | high,
        },
    }


# 3,005 drawings: some bends and shifts, weak colours, and much decay against learning by heart.
_EMOJI = {
    "data": {"captions": "words", "vocab_size": 2500},
    "augment": dict(
        scale=(0.8, 1.25),
        ratio=(0.86, 1.16),
        shift=0.04,
        rotate=5.0,
        warp=0.05,
        outline=0.3,
        brightness=0.15,
        contrast=0.15,
        jitter=1.0,
        mix=0.08,
        blend=0.25,
    ),
    "model": {"size": "demo"},
    "optim": {"weight_decay": 0.5, "beta2": 0.98, "clip_norm": 1.0},
    "stages": {
        "short": dict(
            image_size=16,  # 4 patches; trained at 16, a model is lost at 24, and slow to find back
            image_mask="random",
            image_drop=0.25,
            context=5,
            text_mask="random",
            steps=1620,
            batch_size=256,
            lr=1e-3,
            warmup=50,
        ),
        "full": dict(image_size=16, context=16, steps=60, batch_size=256, lr=2e-4, warmup=10),
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    "emoji": _EMOJI,
    "clipa-v1-b16": _v1(
        "B",
        "cls",
        {},
        dict(
            image_size=112,  # 50 tokens
            steps=36_621,  # 6 epochs of 400 million
            batch_size=65_536,
            lr=per_256(8e-6, 65_536),
            warmup=782,
        ),
        dict(
            steps=16_000,  # 131 million samples
            batch_size=8192,
            lr=per_256(8e-7, 8192),
            warmup=3072,
        ),
    ),
    "clipa-v1-l16": _v1_l16(96, dict(context=8, text_mask="syntax"), 32),  # I37, T8
    "clipa-v1-l16-i17": _v1_l16(64, {}, 16),
    "clipa-v2-l14": _v2("L"),
    "clipa-v2-h14": _v2("H"),
    "clipa-v2-h14-70": _v2("H", 70),
    "clipa-v2-bigg14": _v2(
        "bigG",
        70,
        lr=4e-6,
        full=dict(
            image_drop=0.4,
            steps=32_000,
            batch_size=16_384,
            lr=per_256(4e-7, 16_384),
            warmup=0,
        ),
    ),
}
