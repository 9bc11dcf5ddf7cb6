"""The demo and the papers' recipes, as overrides of Config's defaults.

Source: training scripts and configs of UCSC-VLAA/CLIPA (clipa_torch for v1, clipa_jax for v2).
Two things of CLIPA-v2 are left out: momentum in bfloat16 and the third stage at 336 pixels.
"""


def per_256(lr: float, batch: int) -> float:
    """The papers' rule: they quote the learning rate of 256 samples; it grows with the batch."""
    return lr * batch / 256


_JITTER = {"jitter": (0.32, 0.32, 0.32, 0.08), "jitter_prob": 0.8, "gray_prob": 0.2}
_PAPER = {
    "weight_decay": 0.2,
    "workers": 8,
    "precision": "bf16",
    "compile": True,
    "save_every": 1000,
    "log_every": 50,
}
_V1 = _PAPER | {
    "dialect": "clipa-v1",
    "data": "laion-400m/{00000..41407}.tar",
    "tokenizer": "clip",
    "vocab_size": 49_408,
    "patch_size": 16,
    "pos_embed": "sincos-mae",
    "finetune_pos_embed": "learnable",
    "finetune_image_size": 224,
}
_V1_L16 = (
    _V1
    | _JITTER
    | {
        "model": "L",
        "pool": "mean-with-cls",
        "steps": 73_242,  # 6 epochs of 400 million
        "batch_size": 32_768,
        "lr": per_256(8e-6, 32_768),
        "warmup": 1563,
        "finetune_steps": 18_285,  # 131 million samples
        "finetune_batch_size": 7168,
        "finetune_lr": per_256(8e-7, 7168),
        "finetune_warmup": 3571,
    }
)
_V2 = (
    _PAPER
    | _JITTER
    | {
        "dialect": "clipa-v2",
        "data": "datacomp-1b/{00000..139826}.tar",
        "tokenizer": "bert-base-uncased-vocab.txt",
        "vocab_size": 32_000,
        "patch_size": 14,
        "pool": "mean",
        "pos_embed": "sincos-moco",
        "finetune_pos_embed": "sincos-moco",
        "image_size": 84,
        "context": 8,
        "text_mask": "syntax",
        "steps": 195_490,  # 12.8 billion samples
        "batch_size": 65_536,
        "lr": per_256(8e-6, 65_536),
        "warmup": 3200,
        "finetune_image_size": 224,
        "finetune_image_mask": "random",
        "finetune_image_drop": 0.3,
        "finetune_context": 32,
        "finetune_steps": 16_000,  # 524 million samples
        "finetune_batch_size": 32_768,
        "finetune_lr": per_256(4e-7, 32_768),
        "finetune_warmup": 800,
    }
)

# 3,005 drawings: some bends and shifts, weak colours, and much decay against learning by heart.
_EMOJI = {
    "model": "demo",
    "captions": "words",
    "vocab_size": 2500,
    "crop_scale": (0.8, 1.25),
    "crop_ratio": (0.86, 1.16),
    "shift": 0.04,
    "rotate": 5.0,
    "warp": 0.05,
    "outline": 0.3,
    "jitter": (0.15, 0.15, 0.0, 0.0),
    "jitter_prob": 1.0,
    "channel_mix": 0.08,
    "blend": 0.25,
    "image_size": 16,  # 4 patches; trained at 16, a model is lost at 24, and slow to find back
    "image_mask": "random",
    "image_drop": 0.25,
    "context": 5,
    "text_mask": "random",
    "steps": 1620,
    "batch_size": 256,
    "lr": 1e-3,
    "warmup": 50,
    "finetune_image_size": 16,
    "finetune_context": 16,
    "finetune_steps": 60,
    "finetune_batch_size": 256,
    "finetune_lr": 2e-4,
    "finetune_warmup": 10,
    "weight_decay": 0.5,
    "beta2": 0.98,
    "clip_norm": 1.0,
}

PRESETS: dict[str, dict[str, object]] = {
    "emoji": _EMOJI,
    "clipa-v1-b16": _V1
    | {
        "model": "B",
        "pool": "cls",
        "image_size": 112,  # 50 tokens
        "steps": 36_621,  # 6 epochs of 400 million
        "batch_size": 65_536,
        "lr": per_256(8e-6, 65_536),
        "warmup": 782,
        "finetune_steps": 16_000,  # 131 million samples
        "finetune_batch_size": 8192,
        "finetune_lr": per_256(8e-7, 8192),
        "finetune_warmup": 3072,
    },
    "clipa-v1-l16": _V1_L16
    | {"image_size": 96, "context": 8, "text_mask": "syntax", "finetune_context": 32},  # I37, T8
    "clipa-v1-l16-i17": _V1_L16 | {"image_size": 64},
    "clipa-v2-l14": _V2 | {"model": "L"},
    "clipa-v2-h14": _V2 | {"model": "H"},
    "clipa-v2-h14-70": _V2 | {"model": "H", "image_size": 70},
    "clipa-v2-bigg14": _V2
    | {
        "model": "bigG",
        "image_size": 70,
        "lr": per_256(4e-6, 65_536),
        "finetune_image_drop": 0.4,
        "finetune_steps": 32_000,
        "finetune_batch_size": 16_384,
        "finetune_lr": per_256(4e-7, 16_384),
        "finetune_warmup": 0,
    },
}
