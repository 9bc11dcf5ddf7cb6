"""Pre-norm transformer over packed tokens, with the parameter names of open_clip's."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipa_kernels import add_layer_norm, bias_gelu, varlen_attention_qkvpacked


class Attention(nn.Module):
    """Self-attention within each packed sequence; parameters as nn.MultiheadAttention's."""

    def __init__(self, width: int, heads: int, causal: bool, impl: str):
        super().__init__()
        self.heads, self.causal, self.impl = heads, causal, impl
        reference = nn.MultiheadAttention(width, heads)  # its names and its initial values
        self.in_proj_weight = reference.in_proj_weight
        self.in_proj_bias = reference.in_proj_bias
        self.out_proj = nn.Linear(width, width)
        self.out_proj.load_state_dict(reference.out_proj.state_dict())

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, rows: Tensor | None = None
    ) -> Tensor:
        """x: [T, D] to [T, D], or to the wanted rows of it."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.view(x.shape[0], 3, self.heads, x.shape[1] // self.heads)
        out = varlen_attention_qkvpacked(
            qkv, cu_seqlens, max_seqlen, causal=self.causal, impl=self.impl
        )
        out = out.flatten(1)
        return self.out_proj(out if rows is None else out.index_select(0, rows))


class MLP(nn.Module):
    """c_proj(gelu(c_fc(x))), the bias of c_fc added together with the product or the GELU."""

    def __init__(self, width: int, hidden: int, gelu: str, impl: str):
        super().__init__()
        self.gelu, self.impl = gelu, impl
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, D] to [T, D]."""
        weight, bias = self.c_fc.weight, self.c_fc.bias
        if x.device.type == "cpu" and self.impl != "triton":  # the product adds it for nothing
            hidden = bias_gelu(F.linear(x, weight, bias), None, self.gelu, impl=self.impl)
        else:
            hidden = bias_gelu(F.linear(x, weight), bias, self.gelu, impl=self.impl)
        return self.c_proj(hidden)


class Block(nn.Module):
    """r += attn(ln_1(r)); r += mlp(ln_2(r)), each sum fused with the norm that follows it."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        *,
        causal: bool,
        gelu: str,
        eps: float,
        impl: str,
    ):
        super().__init__()
        self.impl = impl
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads, causal, impl)
        self.recompute_mlp = False
        self.ln_2 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, int(width * mlp_ratio), gelu, impl)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x: [T, D], the branch not yet added to residual [T, D] (None: x begins the stream).

        rows: the rows wanted of the result; attention reads all, the rest is done for these.
        """
        x, residual = norm(self.ln_1, x, residual, self.impl)
        return self.branches(x, residual, cu_seqlens, max_seqlen, rows)

    def branches(
        self,
        x: Tensor,
        residual: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """What follows ln_1: the same for the first block, so that one graph serves all."""
        x = self.attn(x, cu_seqlens, max_seqlen, rows)
        if rows is not None:
            residual = residual.index_select(0, rows)
        x, residual = norm(self.ln_2, x, residual, self.impl)
        if self.recompute_mlp and self.training:
            return checkpoint(self.mlp, x, use_reentrant=False), residual
        return self.mlp(x), residual


class Transformer(nn.Module):
    """depth blocks. The last sum is left to the caller, which may need few of its rows."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        causal: bool = False,
        gelu: str = "none",
        eps: float = 1e-5,
        impl: str = "auto",
    ):
        super().__init__()
        if width % heads or (width // heads) % 8:
            raise ValueError(
                f"Transformer: width / heads must be a multiple of 8, got {width} / {heads}"
            )
        self.width, self.depth = width, depth
        self.checkpointing = False
        block = dict(causal=causal, gelu=gelu, eps=eps, impl=impl)
        self.resblocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, **block) for _ in range(depth)
        )

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x: [T, D] -> (last branch, residual), whose sum is the output.

        rows: int [R], the rows that pooling reads; the last block's MLP sees no others, and the
        outputs are [R, D]. None keeps all.
        """
        residual = None
        for index, block in enumerate(self.resblocks):
            wanted = rows if index == self.depth - 1 else None
            args = (x, residual, cu_seqlens, max_seqlen, wanted)
            if self.checkpointing and self.training:
                x, residual = checkpoint(block, *args, use_reentrant=False)
            else:
                x, residual = block(*args)
        return x, residual


def norm(
    layer: nn.LayerNorm, x: Tensor, residual: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    """(layer(x + residual), x + residual)."""
    return add_layer_norm(x, residual, layer.weight, layer.bias, layer.eps, impl=impl)
