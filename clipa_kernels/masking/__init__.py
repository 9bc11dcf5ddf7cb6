"""Which patches and which text tokens stay, and the random numbers that choose them."""

from .api import (
    all_patches,
    block_patches,
    block_text,
    grid_patches,
    keep_count,
    random_patches,
    random_text,
    syntax_text,
    truncate_text,
)
from .patch_dropout import PatchDropout, PatchDropoutWithIndices
from .philox import philox_bits, philox_uniform
