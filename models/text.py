"""Text transformer over packed captions, with open_clip's parameter names."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipa_kernels import Packed
from clipa_kernels.check import autocast_dtype, readable

from .transformer import Transformer, norm

TEXT_POOLS = ("end", "last")


@dataclass(frozen=True)
class TextConfig:
    """Sizes and choices of the text encoder."""

    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    context: int = 77  # tokens of the longest caption
    vocab_size: int = 49408
    causal: bool = True
    pool: str = "end"  # end: the end token, which has the largest id; last: the last position
    gelu: str = "none"
    eps: float = 1e-5


class TextTransformer(nn.Module):
    """Token ids -> pooled and projected features [B, E]."""

    def __init__(self, config: TextConfig, embed_dim: int, impl: str = "auto"):
        super().__init__()
        if config.pool not in TEXT_POOLS:
            raise ValueError(
                f"TextTransformer: pool must be one of {TEXT_POOLS}, got {config.pool!r}"
            )
        self.config, self.impl = config, impl
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context, config.width))
        self.transformer = Transformer(
            config.width,
            config.depth,
            config.heads,
            config.mlp_ratio,
            causal=config.causal,
            gelu=config.gelu,
            eps=config.eps,
            impl=impl,
        )
        self.ln_final = nn.LayerNorm(config.width, config.eps)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))

    def forward(self, text: Packed | Tensor) -> Tensor:
        """text: Packed ids [T], each caption ended by its pooled token; or padded ids [B, S].

        Padded ids are read as open_clip reads them: pads are tokens like others, and the pooled
        one is where the id is largest ("end") or the last column ("last").
        """
        if isinstance(text, Tensor):
            text, rows = _uniform(text, self.config.pool)
        elif isinstance(text, Packed):
            rows = text.cu_seqlens[1:] - 1
        else:
            came = type(text).__name__
            raise TypeError(f"TextTransformer: text must be Packed or a tensor, got {came}")
        ids, cu_seqlens, max_seqlen = text
        self._check(ids, cu_seqlens, max_seqlen)
        x = self.token_embedding(ids)
        # An index's backward takes one row after the other where positions repeat, and all do.
        x = x + F.embedding(_positions(cu_seqlens, ids.shape[0]), self.positional_embedding)
        x = x.to(autocast_dtype(x.device) or x.dtype)
        x, residual = self.transformer(x, cu_seqlens, max_seqlen, rows)
        return norm(self.ln_final, x, residual, self.impl)[0] @ self.text_projection

    def _check(self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
        name, config = "TextTransformer", self.config
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: token ids must be int32 or int64, got {ids.dtype}")
        if max_seqlen > config.context:
            raise ValueError(
                f"{name}: captions must have at most context = {config.context} tokens, "
                f"got {max_seqlen}"
            )
        if not readable(ids) or not ids.numel():
            return
        if (cu_seqlens.diff() < 1).any():
            raise ValueError(
                f"{name}: every caption must have at least one token, got an empty one"
            )
        low, high = ids.aminmax()
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"{name}: token ids must be from 0 to {config.vocab_size - 1}, "
                f"got {int(low)} to {int(high)}"
            )


def _positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Position of each packed token in its caption, int64 [T]; no host copy."""
    lengths = cu_seqlens.diff()
    start = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=total)
    return torch.arange(total, device=cu_seqlens.device) - start


def _uniform(ids: Tensor, pool: str) -> tuple[Packed, Tensor]:
    """Padded ids [B, S] as Packed, and the row of each caption's pooled token."""
    if ids.dim() != 2:
        raise ValueError(f"TextTransformer: padded ids must be [B, S], got {list(ids.shape)}")
    batch, size = ids.shape
    ends = torch.arange(0, (batch + 1) * size, size, dtype=torch.int32, device=ids.device)
    column = ids.argmax(1) if pool == "end" else size - 1
    return Packed(ids.reshape(-1), ends, size), ends[:-1] + column


def resize_text_positions(table: Tensor, context: int) -> Tensor:
    """A [S, D] table at another context: linear, open_clip's resize_text_pos_embed.

    Raises: ValueError for a table of another shape.
    """
    if table.dim() != 2 or not len(table):
        raise ValueError(f"resize_text_positions: table must be [S, D], got {list(table.shape)}")
    if table.shape[0] == context:
        return table
    rows = F.interpolate(table.float().T[None], context, mode="linear", align_corners=False)
    return rows[0].T.to(table.dtype)
