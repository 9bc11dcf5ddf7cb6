"""Bias and GELU in one."""

from .api import bias_gelu, bias_gelu_reference
