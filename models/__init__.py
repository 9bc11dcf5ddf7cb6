"""Minimal encoders: transformer.py, vit.py, text.py, clip.py with the sizes, dialects.py,
pretrained.py and export.py: weights of others, and for others."""

from .clip import CLIP, SIZES, build, configs, forward_flops, load_weights, plain_keys
from .dialects import DIALECTS, Dialect
from .pretrained import from_hugging_face, read_weights
from .text import TextConfig, TextTransformer, resize_text_positions
from .vit import VisionConfig, VisionTransformer, resize_positions, sincos_2d

__all__ = [
    "CLIP",
    "DIALECTS",
    "SIZES",
    "Dialect",
    "TextConfig",
    "TextTransformer",
    "VisionConfig",
    "VisionTransformer",
    "build",
    "configs",
    "forward_flops",
    "from_hugging_face",
    "load_weights",
    "plain_keys",
    "read_weights",
    "resize_positions",
    "resize_text_positions",
    "sincos_2d",
]
