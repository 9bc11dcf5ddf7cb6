"""CLIP in the sizes and dialects of CLIPA, with open_clip's state-dict layout.

A size names widths and depths, a dialect (dialects.py) all else that the recipes differ in.
`build("H", 14, dialect="clipa-v2")` is ViT-H-14-CLIPA as trained.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from clipa_kernels import Packed

from .dialects import DIALECTS, Dialect
from .text import TextConfig, TextTransformer, resize_text_positions
from .vit import VisionConfig, VisionTransformer, resize_positions

# width, depth, heads, MLP ratio of the image encoder; width, depth, heads of the text encoder; E.
SIZES: dict[str, tuple[tuple[int, int, int, float], tuple[int, int, int], int]] = {
    "demo": ((128, 4, 2, 4.0), (128, 2, 2), 128),
    "Ti": ((192, 12, 3, 4.0), (192, 12, 3), 192),
    "S": ((384, 12, 6, 4.0), (384, 12, 6), 384),
    "M": ((512, 12, 8, 4.0), (512, 12, 8), 512),
    "B": ((768, 12, 12, 4.0), (512, 12, 8), 512),
    "L": ((1024, 24, 16, 4.0), (768, 12, 12), 768),
    "H": ((1280, 32, 16, 4.0), (1024, 24, 16), 1024),
    "g": ((1408, 40, 16, 4.3637), (1024, 24, 16), 1024),
    "bigG": ((1664, 48, 16, 4.9231), (1280, 32, 20), 1280),
}


class CLIP(TextTransformer):
    """An image encoder beside a text encoder, whose parameters open_clip keeps at the top level.

    forward gives open_clip's dict, ready for ClipLoss: image_features and text_features, both
    [B, E] of length 1, logit_scale (already exp'd) and, if there is one, logit_bias.
    """

    def __init__(
        self,
        vision: VisionConfig,
        text: TextConfig,
        embed_dim: int,
        *,
        dialect: Dialect = DIALECTS["open_clip"],
        logit_scale: float = 1 / 0.07,
        logit_bias: float | None = None,
        impl: str = "auto",
    ):
        super().__init__(text, embed_dim, impl)
        self.embed_dim, self.dialect, self.locked = embed_dim, dialect, "none"
        self.visual = VisionTransformer(vision, embed_dim, impl)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))
        self.logit_bias = None
        if logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(logit_bias)))
        initialise(self, dialect.init)

    def encode_image(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """images [B, 3, S, S], keep [B, K] or None -> features [B, E], not normalised."""
        return self.visual(images, keep)

    def encode_text(self, text: Packed | Tensor) -> Tensor:
        """Packed ids, or padded ids [B, S] as open_clip's -> features [B, E], not normalised."""
        return super().forward(text)

    def forward(
        self, images: Tensor, text: Packed | Tensor, keep: Tensor | None = None
    ) -> dict[str, Tensor]:
        graph = torch.is_grad_enabled()
        with torch.set_grad_enabled(graph and self.locked != "image"):
            image_features = F.normalize(self.encode_image(images, keep), dim=-1)
        with torch.set_grad_enabled(graph and self.locked != "text"):
            text_features = F.normalize(self.encode_text(text), dim=-1)
        out = {
            "image_features": image_features,
            "text_features": text_features,
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias
        return out

    def lock(self, tower: str) -> None:
        """Leave a tower as it is: no gradient reaches it, and its pass keeps no graph.

        Args:
            tower: "image" or "text"; "none" trains both.
        """
        if tower not in ("none", "image", "text"):
            raise ValueError(f"lock: tower must be image, text or none, got {tower!r}")
        fixed = self.visual.config.positions != "learnable"
        for name, parameter in self.named_parameters():
            own = "image" if name.startswith("visual.") else "text"
            table = fixed and name == "visual.positional_embedding"  # which never trains
            free = name in ("logit_scale", "logit_bias") or own != tower
            parameter.requires_grad_(free and not table)
        self.locked = tower

    def set_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward, and compute the block again."""
        self.set_recompute("block" if enable else "none")

    def set_recompute(self, kind: str) -> None:
        """What the backward computes again rather than finds kept, to save memory in training.

        Args:
            kind: "none"; "mlp", each block's second half, where the widest layer is; "block".
        """
        if kind not in ("none", "mlp", "block"):
            raise ValueError(f"set_recompute: kind must be none, mlp or block, got {kind!r}")
        for tower in (self.transformer, self.visual.transformer):
            tower.checkpointing = kind == "block"
            for block in tower.resblocks:
                block.recompute_mlp = kind == "mlp"


def configs(
    size: str, patch_size: int, dialect: str = "open_clip"
) -> tuple[VisionConfig, TextConfig, int]:
    """(VisionConfig, TextConfig, embed_dim) of a size in a dialect; replace() changes the rest."""
    if size not in SIZES:
        raise ValueError(f"configs: size must be one of {', '.join(SIZES)}, got {size!r}")
    if dialect not in DIALECTS:
        raise ValueError(f"configs: dialect must be one of {', '.join(DIALECTS)}, got {dialect!r}")
    (width, depth, heads, ratio), (text_width, text_depth, text_heads), embed_dim = SIZES[size]
    chosen = DIALECTS[dialect]
    both = dict(gelu=chosen.gelu, eps=chosen.eps)
    vision = VisionConfig(
        width,
        depth,
        heads,
        ratio,
        patch_size,
        image_size=patch_size * 16,
        pool=chosen.pool,
        norm_after_pool=chosen.norm_after_pool,
        ln_pre=chosen.ln_pre,
        positions=chosen.positions,
        mean=chosen.mean,
        std=chosen.std,
        **both,
    )
    text = TextConfig(
        text_width,
        text_depth,
        text_heads,
        context=chosen.context,
        vocab_size=chosen.vocab_size,
        causal=chosen.causal,
        pool=chosen.text_pool,
        **both,
    )
    return vision, text, embed_dim


def build(
    size: str,
    patch_size: int,
    *,
    dialect: str = "open_clip",
    vision: Mapping | None = None,
    text: Mapping | None = None,
    logit_scale: float = 1 / 0.07,
    logit_bias: float | None = None,
    impl: str = "auto",
) -> CLIP:
    """A CLIP with fresh weights; vision and text override fields of the two configs.

    >>> model = build("demo", 8, vision=dict(image_size=32), text=dict(context=16))
    >>> sorted(model.state_dict())[:3]
    ['ln_final.bias', 'ln_final.weight', 'logit_scale']
    """
    vision_config, text_config, embed_dim = configs(size, patch_size, dialect)
    return CLIP(
        replace(vision_config, **(vision or {})),
        replace(text_config, **(text or {})),
        embed_dim,
        dialect=DIALECTS[dialect],
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        impl=impl,
    )


@torch.no_grad()
def initialise(model: CLIP, kind: str) -> None:
    """Fresh weights as a dialect trains from.

    torch: PyTorch's defaults in the image encoder (CLIPA torch, open_clip); jax: Xavier-uniform
    there, zero class token, zero biases (CLIPA JAX). Text: OpenAI's rule in both. A model without
    memory has no weights.
    """
    weight = model.token_embedding.weight
    if weight.is_meta or isinstance(weight, FakeTensor):
        return
    text, visual = model.transformer, model.visual
    nn.init.normal_(model.token_embedding.weight, std=0.02)
    nn.init.normal_(model.positional_embedding, std=0.01)
    nn.init.normal_(model.text_projection, std=text.width**-0.5)
    for block in text.resblocks:
        out_std = text.width**-0.5 * (2 * text.depth) ** -0.5
        nn.init.normal_(block.attn.in_proj_weight, std=text.width**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=out_std)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * text.width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=out_std)
    if kind != "jax":
        return
    nn.init.zeros_(visual.class_embedding)
    nn.init.trunc_normal_(visual.conv1.weight, std=(3 * visual.config.patch_size**2) ** -0.5)
    for block in visual.transformer.resblocks:
        for third in block.attn.in_proj_weight.chunk(3):
            nn.init.xavier_uniform_(third)
        for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
            nn.init.xavier_uniform_(layer.weight)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter.dim() == 1:
            parameter.zero_()


def forward_flops(model: CLIP, image_tokens: int, text_tokens: float) -> float:
    """FLOPs of the matrix products of one pair's forward pass; a training step takes three times.

    image_tokens counts the class token, text_tokens what a caption has on average.
    """
    vision, text = model.visual.config, model.config

    def tower(width: int, depth: int, ratio: float, tokens: float) -> float:
        return depth * tokens * 2 * width * (width * (4 + 2 * ratio) + 2 * tokens)

    patch = 2 * 3 * vision.patch_size**2 * vision.width * image_tokens
    towers = tower(vision.width, vision.depth, vision.mlp_ratio, image_tokens)
    towers += tower(text.width, text.depth, text.mlp_ratio, text_tokens)
    return patch + towers + 2 * model.embed_dim * (vision.width + text.width)


def plain_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the prefixes of DDP, torch.compile and open_clip's CustomTextCLIP."""
    plain = {}
    for key, value in state_dict.items():
        parts = str(key).split(".")
        while len(parts) > 1 and parts[0] in ("module", "_orig_mod", "text"):
            parts = parts[1:]
        plain[".".join(parts)] = value
    return plain


def load_weights(model: CLIP, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights of open_clip's CLIP layout, position tables resized where sizes differ.

    Dimensions of size 1 may differ from the model's: tables as [1, N, D] and class tokens as
    [1, 1, D] (timm, JAX), products as 1 x 1 convolutions, a scale as [1]. A fixed sin-cos table
    that the model computes for its own grid is kept when sizes differ.

    Raises:
        ValueError: keys are missing or left over, or a tensor is of another shape; names them.
        TypeError: state_dict is no mapping, or a value no tensor, or one that is sparse, complex or
            on the meta device.
    """
    if not isinstance(state_dict, Mapping):
        came = type(state_dict).__name__
        raise TypeError(f"load_weights: state_dict must map names to tensors, got {came}")
    if isinstance(state_dict.get("state_dict"), Mapping):
        must = 'state_dict must be the weights: of a checkpoint pass its "state_dict"'
        raise ValueError(f"load_weights: {must}, got {sorted(map(str, state_dict))[:6]}")
    if any(str(key).startswith("vision_model.") for key in state_dict):
        must = "names must be open_clip's: pass models.from_hugging_face(state_dict)"
        raise ValueError(f"load_weights: {must}, got those of Hugging Face's CLIPModel")
    weights = plain_keys(state_dict)
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"load_weights: keys must be the model's, got {len(missing)} missing "
            f"{missing[:3]} and {len(unexpected)} unexpected {unexpected[:3]}"
        )
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"load_weights: {key} must be a tensor, got {type(value).__name__}")
        if value.is_meta or value.layout != torch.strided or value.is_complex():
            came = f"{value.dtype} in {value.layout} on {value.device}"
            raise TypeError(f"load_weights: {key} must hold dense real numbers, got {came}")
        weights[key] = _fitted(model, key, value, own[key])
    model.load_state_dict(weights)


def _fitted(model: CLIP, key: str, value: Tensor, own: Tensor) -> Tensor:
    """A weight in the shape of the model's own: ones dropped, a table of positions resized."""
    if [n for n in value.shape if n != 1] == [n for n in own.shape if n != 1]:
        return value.reshape(own.shape)
    expected: object = list(own.shape)
    if key in ("positional_embedding", "visual.positional_embedding"):
        table = value[0] if value.dim() == 3 and len(value) == 1 else value
        if table.dim() == 2 and len(table) and table.shape[1] == own.shape[1]:
            if key == "positional_embedding":
                return resize_text_positions(table, len(own))
            if model.visual.config.positions != "learnable":
                return own
            if len(table) > 1 and math.isqrt(len(table) - 1) ** 2 == len(table) - 1:
                return resize_positions(table, (math.isqrt(len(own) - 1),) * 2)
            expected = f"[1 + n * n, {own.shape[1]}]"
    raise ValueError(f"load_weights: {key} must be {expected}, got {list(value.shape)}")
