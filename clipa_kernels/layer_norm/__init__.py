"""Residual sum and LayerNorm in one."""

from .api import add_layer_norm, add_layer_norm_reference
