"""Vision transformer over the kept patches of an image, with open_clip's parameter names."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipa_kernels import patch_embed

from .dialects import CLIP_MEAN, CLIP_STD
from .transformer import Transformer, norm

POOLS = ("cls", "mean", "mean-with-cls")
POSITIONS = ("learnable", "sincos-mae", "sincos-moco")


@dataclass(frozen=True)
class VisionConfig:
    """Sizes and choices of the image encoder."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    patch_size: int = 16  # pixels
    image_size: int = 224  # pixels
    pool: str = "cls"  # cls; mean over patches; mean-with-cls over all tokens
    norm_after_pool: bool = False  # order of ln_post and the mean
    ln_pre: bool = True  # LayerNorm before the first block
    positions: str = "learnable"  # or a fixed table, sincos-mae or sincos-moco
    gelu: str = "none"  # none (exact), tanh, quick
    eps: float = 1e-5
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD


class VisionTransformer(nn.Module):
    """images, keep -> pooled and projected features [B, E].

    uint8 images are normalised with the config's mean and std inside the first product; floating
    images are taken as already normalised.
    """

    def __init__(self, config: VisionConfig, embed_dim: int, impl: str = "auto"):
        super().__init__()
        check_vision(config)
        self.config, self.impl = config, impl
        width, grid = config.width, config.image_size // config.patch_size
        side = config.patch_size
        self.conv1 = nn.Conv2d(3, width, side, side, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(grid**2 + 1, width))
        if config.positions != "learnable":
            table = sincos_2d(width, (grid, grid), config.positions.removeprefix("sincos-"))
            self.positional_embedding = nn.Parameter(table, requires_grad=False)
        self.ln_pre = nn.LayerNorm(width, config.eps) if config.ln_pre else nn.Identity()
        self.transformer = Transformer(
            width,
            config.depth,
            config.heads,
            config.mlp_ratio,
            gelu=config.gelu,
            eps=config.eps,
            impl=impl,
        )
        self.ln_post = nn.LayerNorm(width, config.eps)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        self.register_buffer("mean", torch.tensor(config.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.std), persistent=False)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """images: [B, 3, S, S] with any strides; keep: [B, K] patch numbers, None for all."""
        size = self.config.image_size
        if not isinstance(images, Tensor):
            came = type(images).__name__
            raise TypeError(f"VisionTransformer: images must be a tensor, got {came}")
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"VisionTransformer: images must be [B, 3, {size}, {size}], "
                f"got {list(images.shape)}"
            )
        raw = images.dtype == torch.uint8
        tokens, cu_seqlens, max_seqlen = patch_embed(
            images,
            keep,
            self.conv1.weight,
            None,
            self.positional_embedding,
            self.class_embedding,
            self.mean if raw else None,
            self.std if raw else None,
            impl=self.impl,
        )
        if self.config.ln_pre:
            tokens, _ = norm(self.ln_pre, tokens, None, self.impl)
        rows = cu_seqlens[:-1] if self.config.pool == "cls" else None
        x, residual = self.transformer(tokens, cu_seqlens, max_seqlen, rows)
        return self.pool(x, residual, max_seqlen) @ self.proj

    def pool(self, x: Tensor, residual: Tensor, size: int) -> Tensor:
        """One row an image, after ln_post: [B, D]. For "cls" there is one already."""
        if self.config.pool == "cls":
            return norm(self.ln_post, x, residual, self.impl)[0]
        first = 1 if self.config.pool == "mean" else 0
        if self.config.norm_after_pool:
            total = (x + residual).view(-1, size, x.shape[-1])
            return norm(self.ln_post, total[:, first:].mean(1), None, self.impl)[0]
        total = norm(self.ln_post, x, residual, self.impl)[0].view(-1, size, x.shape[-1])
        return total[:, first:].mean(1)


def check_vision(config: VisionConfig) -> None:
    """ValueError unless the config can be built."""
    name = "VisionTransformer"
    if config.image_size < 1 or config.image_size % config.patch_size:
        raise ValueError(
            f"{name}: image_size must be a positive multiple of patch_size {config.patch_size}, "
            f"got {config.image_size}"
        )
    if config.pool not in POOLS:
        raise ValueError(f"{name}: pool must be one of {POOLS}, got {config.pool!r}")
    if config.positions not in POSITIONS:
        raise ValueError(f"{name}: positions must be one of {POSITIONS}, got {config.positions!r}")
    if config.positions != "learnable" and config.width % 4:
        raise ValueError(f"{name}: width must be a multiple of 4 for sincos, got {config.width}")


def sincos_2d(width: int, grid: tuple[int, int], kind: str, prefix: int = 1) -> Tensor:
    """Fixed positions [prefix + h * w, width]: sin x, cos x, sin y, cos y, width / 4 columns each.

    Frequencies 10000 ** -(i / n), i = 0 .. width / 4 - 1, with n = width / 4 for "mae" (CLIPA
    torch, open_clip) and n = width / 4 - 1 for "moco" (CLIPA JAX). Prefix rows are zero.
    """
    quarter = width // 4
    steps = quarter if kind == "mae" else max(quarter - 1, 1)
    frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / steps)
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [axis.flatten().double().outer(frequency) for axis in (x, y)]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)
    return F.pad(table, (0, 0, prefix, 0)).float()


def resize_positions(table: Tensor, grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """A [prefix + n * n, D] table at another grid: bicubic, antialiased; prefix rows as they are.

    Raises: ValueError for a table of another shape.
    Source: open_clip's resize_pos_embed, which CLIPA's fine-tuning uses.
    """
    patches = table.shape[0] - prefix if table.dim() == 2 else 0
    side = math.isqrt(max(patches, 0))
    if not side or side * side != patches:
        raise ValueError(
            f"resize_positions: table must be [{prefix} + n * n, D], got {list(table.shape)}"
        )
    if (side, side) == tuple(grid):
        return table
    rows = table[prefix:].float().T.view(1, -1, side, side)
    rows = F.interpolate(rows, grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat((table[:prefix], rows.flatten(2)[0].T.to(table.dtype)))
