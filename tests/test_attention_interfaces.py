"""varlen_attention under others' names, and others behind varlen_attention's."""

import inspect
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch 2.8
    varlen_attn = None

from clipa_kernels import (
    _attention_rivals,
    cu_seqlens_of,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    varlen_attention_forward,
    varlen_attention_qkvpacked,
    varlen_attention_reference,
)

LENGTHS = [3, 0, 9, 5]


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sum(LENGTHS), 3, 2, 16, generator=generator)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_flash_attention_functions(qkv, causal):
    ends = cu_seqlens_of(LENGTHS)
    expected = varlen_attention_reference(*qkv.unbind(1), ends, 9, causal=causal, scale=0.3)
    positional = (0.0, 0.3, causal, (-1, -1), 0.0, None, True, False)
    out = flash_attn_varlen_func(*qkv.unbind(1), ends, ends.clone(), 9, 9, *positional, None)
    torch.testing.assert_close(out, expected)
    out = flash_attn_varlen_qkvpacked_func(qkv, ends, 9, *positional)
    torch.testing.assert_close(out, expected)
    out = flash_attn_varlen_qkvpacked_func(qkv, ends, 9)
    torch.testing.assert_close(out, varlen_attention_qkvpacked(qkv, ends, 9))


NOT_IMPLEMENTED = {
    "dropout_p": 0.1,
    "window_size": (4, 0),
    "softcap": 30.0,
    "alibi_slopes": torch.zeros(2),
    "return_attn_probs": True,
    "block_table": torch.zeros(1, 1),
}


@pytest.mark.parametrize("name", NOT_IMPLEMENTED)
def test_what_is_not_implemented_is_named(qkv, name):
    ends, change = cu_seqlens_of(LENGTHS), {name: NOT_IMPLEMENTED[name]}
    with pytest.raises(ValueError, match=f"flash_attn_varlen_func: {name} must be .*, got"):
        flash_attn_varlen_func(*qkv.unbind(1), ends, ends, 9, 9, **change)
    if name in inspect.signature(flash_attn_varlen_qkvpacked_func).parameters:
        with pytest.raises(ValueError, match=f"qkvpacked_func: {name} must be .*, got"):
            flash_attn_varlen_qkvpacked_func(qkv, ends, 9, **change)


@pytest.mark.parametrize(("lengths", "longest"), [(LENGTHS, 8), (LENGTHS[::-1], 9), ([17], 9)])
def test_keys_of_other_sequences(qkv, lengths, longest):
    ends = cu_seqlens_of(LENGTHS)
    with pytest.raises(ValueError, match="keys must be of the same sequences as queries, got"):
        flash_attn_varlen_func(*qkv.unbind(1), ends, cu_seqlens_of(lengths), 9, longest)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_attention_interface(side, causal):
    """Against torch's own, on the tokens that are not padding; gradients as well."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, 2, 7, 16, generator=generator, requires_grad=True) for _ in "qkv"
    )
    place = torch.arange(7) if side == "right" else torch.arange(6, -1, -1)
    mask = None if side == "none" else (place < torch.tensor([7, 2, 4])[:, None]).long()
    module = torch.nn.Identity()
    module.is_causal = causal
    out, weights = varlen_attention_forward(module, query, key, value, mask, scaling=0.3, more=1)
    assert weights is None and out.shape == (3, 7, 2, 16)
    kept = torch.ones(3, 7, dtype=torch.bool) if mask is None else mask.bool()
    seen = kept[:, None, None, :] | torch.eye(7, dtype=torch.bool)
    if causal:
        seen = seen & torch.ones(7, 7, dtype=torch.bool).tril()
    plain = scaled_dot_product_attention(query, key, value, seen, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(out[kept], plain[kept])
    assert not out[~kept].any()
    again, _ = varlen_attention_forward(
        torch.nn.Identity(), query, key, value, mask, scaling=0.3, is_causal=causal
    )
    assert torch.equal(out, again)
    mine, other = (torch.autograd.grad(x[kept].sin().sum(), query)[0] for x in (out, plain))
    torch.testing.assert_close(mine, other)


def test_attention_interface_names_what_it_cannot_do():
    x = torch.zeros(2, 2, 5, 16)
    module = torch.nn.Identity()
    with pytest.raises(ValueError, match="varlen_attention_forward: dropout must be 0.0, got 0.1"):
        varlen_attention_forward(module, x, x, x, None, dropout=0.1)
    with pytest.raises(
        ValueError, match="varlen_attention_forward: softcap must be None, got 30.0"
    ):
        varlen_attention_forward(module, x, x, x, None, softcap=30.0)
    with pytest.raises(ValueError, match=r"None or \[B, S\] = 2x5, got 2x1x5x5 float32"):
        varlen_attention_forward(module, x, x, x, torch.zeros(2, 1, 5, 5))
    with pytest.raises(ValueError, match=r"all alike, got 2x2x5x16 .* 2x1x5x16"):
        varlen_attention_forward(module, x, x[:, :1], x, None)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("tower", ["CLIP", "Siglip"])
def test_models_of_transformers(tower, side):
    """Registered as the docstring says: padding reaches the function, causal or not."""
    transformers = pytest.importorskip("transformers")
    lines = inspect.getdoc(varlen_attention_forward).splitlines()
    example = [line[4:] for line in lines if line.startswith("    ")][:5]
    *register, example_use = [line for line in example if line]
    assert example_use == 'model.set_attn_implementation("clipa")'
    exec("\n".join(register), dict(varlen_attention_forward=varlen_attention_forward))
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(vocab_size=100, eos_token_id=99, bos_token_id=98, pad_token_id=0)
    config = getattr(transformers, f"{tower}TextConfig")(**sizes, **ids, max_position_embeddings=16)
    torch.manual_seed(0)
    model = getattr(transformers, f"{tower}TextModel")(config).eval()
    tokens = torch.randint(1, 98, (3, 9))
    tokens[:, -1] = 99
    mask = (torch.arange(9) < torch.tensor([9, 5, 7])[:, None]).long()
    mask = mask.flip(1) if side == "left" else mask
    states = {}
    for how in ("eager", "clipa"):
        model.set_attn_implementation(how)
        states[how] = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(states["clipa"][mask.bool()], states["eager"][mask.bool()])


@pytest.mark.parametrize("impl", ["varlen_attn", "flash_attn", "xformers"])
def test_rivals_that_cannot_run_say_why(qkv, impl):
    with pytest.raises(RuntimeError, match=f'impl "{impl}" needs .*, got'):
        varlen_attention_qkvpacked(qkv, cu_seqlens_of(LENGTHS), 9, impl=impl)


def like_flash_attn(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """The signature of flash_attn 2.8's flash_attn_varlen_func, on any device."""
    assert dropout_p == softcap == 0.0 and tuple(window_size) == (-1, -1)
    assert alibi_slopes is block_table is None and not return_attn_probs
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
    how = dict(causal=causal, scale=softmax_scale)
    return varlen_attention_reference(q, k, v, cu_seqlens_q, max_seqlen_q, **how)


def like_varlen_attn(*args, **kwargs):
    """The signature of torch's own varlen_attn, and the meaning that it documents."""
    bound = inspect.signature(varlen_attn).bind(*args, **kwargs)
    bound.apply_defaults()
    query, key, value, ends, ends_k, longest, longest_k = bound.args[:7]
    window = bound.arguments["window_size"]
    assert torch.equal(ends, ends_k) and longest == longest_k and window in ((-1, -1), (-1, 0))
    how = dict(causal=window == (-1, 0), scale=bound.arguments["scale"])
    return varlen_attention_reference(query, key, value, ends, longest, **how)


class BlockDiagonalMask:
    """What xformers 0.0.35 documents of its own."""

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert kv_seqlen is None and all(isinstance(length, int) for length in q_seqlen)
        mask = cls()
        mask.lengths, mask.device, mask.causal = q_seqlen, device, False
        return mask

    def make_causal(self):
        mask = self.from_seqlens(self.lengths, device=self.device)
        mask.causal = True
        return mask


def like_xformers(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    """The signature of xformers 0.0.35's memory_efficient_attention: [1, T, H, D]."""
    assert isinstance(attn_bias, BlockDiagonalMask) and attn_bias.device == query.device
    assert p == 0.0 and op is output_dtype is None and len(query) == 1
    ends = cu_seqlens_of(attn_bias.lengths)
    how = dict(causal=attn_bias.causal, scale=scale)
    return varlen_attention_reference(query[0], key[0], value[0], ends, 0, **how)[None]


STAND_INS = {
    "varlen_attn": {"torch.nn.attention.varlen": dict(varlen_attn=like_varlen_attn)},
    "flash_attn": {"flash_attn": dict(flash_attn_varlen_func=like_flash_attn)},
    "xformers": {
        "xformers": {},
        "xformers.ops": dict(memory_efficient_attention=like_xformers),
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": dict(BlockDiagonalMask=BlockDiagonalMask),
    },
}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("impl", STAND_INS)
def test_what_rivals_are_called_with(qkv, impl, causal, monkeypatch):
    """Their kernels are for GPUs: here functions of their signatures take the call."""
    if impl == "varlen_attn" and varlen_attn is None:
        pytest.skip(f"torch {torch.__version__} has no varlen_attn")
    for name, contents in STAND_INS[impl].items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    q, k, v = qkv.unbind(1)
    call = getattr(_attention_rivals, impl)
    out = call(q, k, v, cu_seqlens_of(LENGTHS), max(LENGTHS), causal, 0.3)
    how = dict(causal=causal, scale=0.3)
    expected = varlen_attention_reference(q, k, v, cu_seqlens_of(LENGTHS), 9, **how)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("impl", ["varlen_attn", "flash_attn", "xformers"])
def test_rivals_match_the_reference(qkv, impl, causal):
    if find_spec(_attention_rivals.PACKAGES[impl]) is None:
        pytest.skip(f"{impl} is not installed")
    if not torch.cuda.is_available():
        pytest.skip(f"{impl} has no CPU implementation")
    qkv, ends = qkv.half().cuda(), cu_seqlens_of(LENGTHS, "cuda")
    how = dict(causal=causal, scale=0.3)
    out = varlen_attention_qkvpacked(qkv, ends, 9, impl=impl, **how)
    expected = varlen_attention_reference(*qkv.unbind(1), ends, 9, **how)
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
