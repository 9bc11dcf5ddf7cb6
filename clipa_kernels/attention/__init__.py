"""Attention over packed sequences, and the names that others have for it."""

from .api import varlen_attention, varlen_attention_qkvpacked, varlen_attention_reference
from .cross import varlen_cross_attention, varlen_cross_attention_reference
from .interfaces import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    varlen_attention_forward,
)
