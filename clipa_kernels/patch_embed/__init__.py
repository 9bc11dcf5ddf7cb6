"""Kept patches to packed tokens."""

from .api import patch_embed, patch_embed_reference
