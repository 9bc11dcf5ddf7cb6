"""Minimal encoders: transformer.py, vit.py, text.py, and clip.py with sizes and dialects."""

from .clip import CLIP, DIALECTS, SIZES, build, configs, forward_flops, load_weights, plain_keys
from .text import TextConfig, TextTransformer, resize_text_positions
from .vit import VisionConfig, VisionTransformer, resize_positions, sincos_2d

__all__ = [
    "CLIP",
    "DIALECTS",
    "SIZES",
    "TextConfig",
    "TextTransformer",
    "VisionConfig",
    "VisionTransformer",
    "build",
    "configs",
    "forward_flops",
    "load_weights",
    "plain_keys",
    "resize_positions",
    "resize_text_positions",
    "sincos_2d",
]
