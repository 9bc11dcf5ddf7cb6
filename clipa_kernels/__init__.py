"""clipa_kernels: fused operations for training CLIP with few tokens and large encoders (CLIPA).

Dimension letters, used in every docstring of the package:

    B images (or captions) in a batch    K kept patches an image    H heads
    L patches an image                   T packed tokens            D head size or model width
    P side of a patch in pixels          M rows on this process     E feature width
    N rows of the global batch
"""

from .adapters import accelerate, accumulated, restore
from .attention import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    varlen_attention,
    varlen_attention_forward,
    varlen_attention_qkvpacked,
    varlen_attention_reference,
    varlen_cross_attention,
    varlen_cross_attention_reference,
)
from .contrastive import (
    ClipLoss,
    SigLipLoss,
    contrastive_loss,
    contrastive_loss_reference,
    sigmoid_loss,
    sigmoid_loss_reference,
)
from .gelu import bias_gelu, bias_gelu_reference
from .layer_norm import add_layer_norm, add_layer_norm_reference
from .masking import (
    PatchDropout,
    PatchDropoutWithIndices,
    all_patches,
    block_patches,
    block_text,
    grid_patches,
    keep_count,
    philox_bits,
    philox_uniform,
    random_patches,
    random_text,
    syntax_text,
    truncate_text,
)
from .packing import Packed, cu_seqlens_of, pack, unpack
from .patch_embed import patch_embed, patch_embed_reference

__version__ = "0.1.0"

__all__ = [
    "ClipLoss",
    "Packed",
    "PatchDropout",
    "PatchDropoutWithIndices",
    "SigLipLoss",
    "accelerate",
    "accumulated",
    "add_layer_norm",
    "add_layer_norm_reference",
    "all_patches",
    "bias_gelu",
    "bias_gelu_reference",
    "block_patches",
    "block_text",
    "contrastive_loss",
    "contrastive_loss_reference",
    "cu_seqlens_of",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "grid_patches",
    "keep_count",
    "pack",
    "patch_embed",
    "patch_embed_reference",
    "philox_bits",
    "philox_uniform",
    "random_patches",
    "random_text",
    "restore",
    "sigmoid_loss",
    "sigmoid_loss_reference",
    "syntax_text",
    "truncate_text",
    "unpack",
    "varlen_attention",
    "varlen_attention_forward",
    "varlen_attention_qkvpacked",
    "varlen_attention_reference",
    "varlen_cross_attention",
    "varlen_cross_attention_reference",
]
