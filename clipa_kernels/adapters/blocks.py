"""Pre-norm transformer blocks of open_clip, timm and Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..attention import varlen_attention_qkvpacked
from ..gelu import bias_gelu, bias_gelu_reference
from ..layer_norm import add_layer_norm
from .tried import Called, hooked, intact, near, part_at, random_weights

_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)
# What callers pass to a block for its hooks, or for caches that no encoder has.
_SILENT = {"output_hidden_states", "return_dict", "use_cache", "is_causal"}


@dataclass(frozen=True)
class _Layout:
    """Where a library keeps the parts of a block. `after` are called on a branch if they are there:
    scales, drop paths, dropouts. qkv is one product or three; or none, where the attention itself
    holds nn.MultiheadAttention's in_proj_weight and in_proj_bias."""

    norms: tuple[str, str]
    attention: str
    heads: str
    qkv: tuple[str, ...]
    out: str
    mlp: tuple[str, str, str]
    after: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


_LAYOUTS = (
    _Layout(  # open_clip
        ("ln_1", "ln_2"),
        "attn",
        "num_heads",
        (),
        "attn.out_proj",
        ("mlp.c_fc", "mlp.gelu", "mlp.c_proj"),
        (("ln_attn", "ls_1"), ("ls_2",)),
    ),
    _Layout(  # timm
        ("norm1", "norm2"),
        "attn",
        "num_heads",
        ("attn.qkv",),
        "attn.proj",
        ("mlp.fc1", "mlp.act", "mlp.fc2"),
        (("ls1", "drop_path1"), ("ls2", "drop_path2")),
    ),
    _Layout(  # transformers' CLIP and SigLIP
        ("layer_norm1", "layer_norm2"),
        "self_attn",
        "num_heads",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.out_proj",
        ("mlp.fc1", "mlp.activation_fn", "mlp.fc2"),
    ),
    _Layout(  # transformers' ViT
        ("layernorm_before", "layernorm_after"),
        "attention",
        "num_attention_heads",
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attention.o_proj",
        ("mlp.fc1", "mlp.activation_fn", "mlp.fc2"),
        (("dropout",), ("dropout",)),
    ),
)


@dataclass(frozen=True, eq=False)
class Block:
    """How one block is computed."""

    layout: _Layout
    heads: int
    gelu: str
    parts: tuple[tuple[str, type], ...]  # what is passed over, by path and class
    word: bool = False  # whether is_causal=True is a causal mask to it
    owner: nn.Module | None = None  # whose buffer attn_mask is a causal mask
    impl: str = "auto"

    told = "norms, attention, GELU and residual sums"

    @property
    def key(self) -> tuple:
        return self.layout, self.heads, self.gelu, self.owner is None

    def changes(self, block: nn.Module) -> list[tuple[nn.Module, str, Callable]]:
        """(module, attribute, value) to set."""
        return [(block, "forward", partial(run_block, block, self))]

    def tried(self, block: nn.Module) -> dict | str:
        """The fields that trying tells, or why the block is left."""
        plan, width = replace(self, impl="torch"), part_at(block, self.layout.out).out_features
        own = Called(block, type(block).forward)
        values = random_weights(block)
        like = dict(dtype=torch.float32, device="cpu")
        x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(1), **like)

        def ours(causal: bool) -> Tensor:
            called = Called(block, partial(_block, plan=plan, causal=causal))
            return functional_call(called, values, (x,))

        needed: dict[str, object] = {}

        def theirs(**mask: object) -> Tensor:
            return functional_call(own, values, (x,), needed | mask)

        try:
            expected = theirs()
        except TypeError:  # transformers' take a mask always
            needed["attention_mask"] = None
            expected = theirs()
        if not near(ours(False), expected):
            return "its forward computes something else than its parts tell"
        try:
            word = near(ours(True), theirs(is_causal=True))
        except (TypeError, ValueError):  # it knows no such word
            word = False
        size = 3 if self._sequence_first(block) else 5
        masked = self.owner is not None and near(
            ours(True), theirs(attn_mask=torch.full((size, size), float("-inf"), **like).triu(1))
        )
        return dict(word=word) if masked or self.owner is None else dict(word=word, owner=None)

    def _sequence_first(self, block: nn.Module) -> bool:
        """Whether the block takes [S, B, D], as nn.MultiheadAttention does by default."""
        return not getattr(part_at(block, self.layout.attention), "batch_first", True)

    def causal(self, args: tuple, kwargs: dict) -> bool | None:
        """Whether a call asks for causal attention; None where it asks for what is not known."""
        causal = kwargs.get("is_causal") is True
        if causal and not self.word:
            return None
        given = [value for name, value in kwargs.items() if name not in _SILENT]
        for value in (*args, *given):
            if value is None or value is False:
                continue
            if self.owner is None or value is not self.owner._buffers.get("attn_mask"):
                return None
            causal = True
        return causal


def look_at_block(block: nn.Module) -> Block | str | None:
    """What there is to compute, or why the block is left; None for another kind of module."""
    for layout in _LAYOUTS:
        roles = (*layout.norms, layout.attention, layout.out, *layout.qkv, *layout.mlp)
        if all(part_at(block, path) is not None for path in roles):
            break
    else:
        return None
    if "forward" in block.__dict__:
        return "its forward was replaced already"
    called = tuple(path for paths in layout.after for path in paths)
    over = {  # all that is passed over
        path: part
        for path, part in block.named_modules(remove_duplicate=False)
        if path and not f"{path}.".startswith(tuple(f"{name}." for name in called))
    }
    reason = _strange(block, layout, over) or _dropping(over, layout)
    if reason:
        return reason
    act, heads = over[layout.mlp[1]], getattr(over[layout.attention], layout.heads, None)
    gelu = _gelu_of(act)
    if gelu is None:
        return f"{layout.mlp[1]} is a {type(act).__name__}, no GELU"
    size = over[layout.out].in_features / heads if isinstance(heads, int) and heads else 0
    if size not in range(8, 257, 8):
        return f"its heads are of {size:g}, not of 8 to 256 in steps of 8"
    return Block(layout, heads, gelu, tuple((path, type(part)) for path, part in over.items()))


def _gelu_of(act: nn.Module) -> str | None:
    """bias_gelu's name of what a module without parameters computes, or None."""
    if any(True for _ in act.parameters()):
        return None
    x = torch.linspace(-30, 30, 241, dtype=torch.float32, device="cpu")
    try:
        with torch.no_grad():
            y = act(x.clone())
    except Exception:  # whatever it is, it is no GELU
        return None
    for form in ("none", "tanh", "quick"):
        if isinstance(y, Tensor) and y.shape == x.shape:
            error = (y - bias_gelu_reference(x, None, form)).abs().max()
            if error < 1e-5:  # the forms differ by 5e-4 and more
                return form
    return None


def _strange(block: nn.Module, layout: _Layout, over: dict[str, nn.Module]) -> str | None:
    """A part that is not what the layout says, has hooks, or has no place in it."""
    linears = (*layout.qkv, layout.out, layout.mlp[0], layout.mlp[2])
    roles = (*layout.norms, *linears, layout.mlp[1])
    for path, part in over.items():
        kind = type(part).__name__
        if hooked(part):
            return f"hooks of {path} would not run"
        if path in linears and type(part) not in _LINEAR:
            return f"{path} is a {kind}"
        if path in layout.norms and not (
            isinstance(part, nn.LayerNorm) and part.bias is not None and part.bias.dim() == 1
        ):
            return f"{path} is a {kind} without weight and bias of one dimension"
        holds = path == layout.attention or any(role.startswith(f"{path}.") for role in roles)
        if not (path in roles or holds or isinstance(part, (nn.Identity, nn.Dropout))):
            return f"it holds {path}, a {kind}"
    for path, part in {"": block, **over}.items():
        own = {name for name, value in part._parameters.items() if value is not None}
        if path == layout.attention and not layout.qkv:
            if "in_proj_weight" not in own:
                return f"{path} holds no in_proj_weight"
            own -= {"in_proj_weight", "in_proj_bias"}
        if own and path not in roles:
            return f"it holds {f'{path}.' if path else ''}{min(own)}"
    return None


def _dropping(over: dict[str, nn.Module], layout: _Layout) -> str | None:
    """A dropout that would be passed over."""
    for path, part in over.items():
        if isinstance(part, nn.Dropout) and part.p > 0:
            return f"{path} is a dropout of {part.p:g}"
    for name in ("dropout", "attention_dropout"):
        rate = over[layout.attention].__dict__.get(name)
        if isinstance(rate, Real) and rate > 0:
            return f"{layout.attention} has a dropout of {rate:g}"
    return None


def mask_owner(model: nn.Module, path: str) -> nn.Module | None:
    """The nearest module around a path whose buffer attn_mask is the causal mask, if there is."""
    names = path.split(".")[:-1]
    for depth in range(len(names), -1, -1):
        module = part_at(model, ".".join(names[:depth])) if depth else model
        mask = None if module is None else module._buffers.get("attn_mask")
        if mask is None or mask.is_meta or mask.dim() != 2 or not mask.is_floating_point():
            continue
        causal = torch.full(mask.shape, float("-inf"), device=mask.device).triu(1)
        return module if torch.equal(mask.float(), causal) else None
    return None


def run_block(block: nn.Module, plan: Block, *args, **kwargs):
    """A block's forward: the fast one where the call and the parts are known."""
    x, causal = args[0] if args else None, None
    if isinstance(x, Tensor) and x.dim() == 3 and x.numel() and intact(block, plan.parts):
        over = {path: part_at(block, path) for path, _ in plan.parts}
        config = getattr(over[plan.layout.attention], "config", None)
        recording = getattr(config, "output_attentions", False)
        if not recording and not (block.training and _dropping(over, plan.layout)):
            causal = plan.causal(args[1:], kwargs)
    if causal is None:
        return type(block).forward(block, *args, **kwargs)
    compute = partial(_block, block, plan=plan, causal=causal)
    # transformers wraps the forward of the class, which is passed over, to compute it again in the
    # backward; its older releases wrap the call.
    again = getattr(block, "gradient_checkpointing", False) and block.training
    if again and torch.is_grad_enabled() and hasattr(type(block).forward, "__wrapped__"):
        return block._gradient_checkpointing_func(compute, x)
    return compute(x)


def _block(block: nn.Module, x: Tensor, plan: Block, causal: bool) -> Tensor:
    """x + mlp(norm(x + attention(norm(x)))): [B, S, D], or [S, B, D] where the block takes it."""
    layout, impl = plan.layout, plan.impl
    first, second = (part_at(block, path) for path in layout.norms)
    out = part_at(block, layout.out)
    y, _ = add_layer_norm(x, None, first.weight, first.bias, first.eps, impl=impl)
    qkv = _qkv(block, layout, y)
    flip = plan._sequence_first(block)
    if flip:
        qkv = qkv.transpose(0, 1)
    batch, size = qkv.shape[:2]
    qkv = qkv.reshape(batch * size, 3, plan.heads, -1)
    ends = torch.arange(0, (batch + 1) * size, size, dtype=torch.int32, device=x.device)
    y = varlen_attention_qkvpacked(qkv, ends, size, causal=causal, impl=impl)
    y = y.view(batch, size, -1)
    y = F.linear(y.transpose(0, 1) if flip else y, out.weight, out.bias)
    y = _through(block, layout.after[0], y)
    # As x + y is rounded: a scale in fp32 widens the stream under autocast.
    stream = x.to(torch.promote_types(x.dtype, y.dtype))
    y, stream = add_layer_norm(y, stream, second.weight, second.bias, second.eps, impl=impl)
    fc, _, proj = (part_at(block, path) for path in layout.mlp)
    if y.device.type == "cpu" and impl != "triton":  # the product adds the bias for nothing
        y = bias_gelu(F.linear(y, fc.weight, fc.bias), None, plan.gelu, impl=impl)
    else:
        y = bias_gelu(F.linear(y, fc.weight), fc.bias, plan.gelu, impl=impl)
    y = _through(block, layout.after[1], F.linear(y, proj.weight, proj.bias))
    return stream + y


def _qkv(block: nn.Module, layout: _Layout, y: Tensor) -> Tensor:
    """[B, S, 3 * D] by one product."""
    if not layout.qkv:
        attention = part_at(block, layout.attention)
        return F.linear(y, attention.in_proj_weight, attention.in_proj_bias)
    parts = [part_at(block, path) for path in layout.qkv]
    if len(parts) == 1:
        return F.linear(y, parts[0].weight, parts[0].bias)
    # Copying three weights costs less than reading y three times and adding three gradients of it.
    weight = torch.cat([part.weight for part in parts])
    biases = [part.bias for part in parts]
    return F.linear(y, weight, None if biases[0] is None else torch.cat(biases))


def _through(block: nn.Module, paths: tuple[str, ...], y: Tensor) -> Tensor:
    for path in paths:
        part = part_at(block, path)
        y = y if part is None else part(y)
    return y
