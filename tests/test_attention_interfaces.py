"""varlen_attention under others' names, and others behind varlen_attention's."""

import inspect
import sys
from importlib.util import find_spec
from types import ModuleType

import numpy
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch 2.8
    varlen_attn = None

from clipa_kernels import (
    cu_seqlens_of,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    varlen_attention,
    varlen_attention_forward,
    varlen_attention_qkvpacked,
    varlen_attention_reference,
)
from clipa_kernels.attention import rivals

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


WITHOUT_EFFECT = {
    "no causal window": (dict(causal=True, window_size=(-1, 0)), True),
    "causal by window": (dict(window_size=[-1, 0]), True),
    "what causal hides": (dict(causal=True, window_size=(8, 3)), True),
    "wide": (dict(window_size=(8, 8)), False),
    "wider": (dict(window_size=(100, -2)), False),
    "none": (dict(softcap=None, alibi_slopes=None, dropout_p=0, window_size=None), False),
    "numpy": (dict(causal=numpy.bool_(True), softmax_scale=numpy.float32(0.25)), True),
}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_has_no_effect_is_taken(qkv, name):
    """Windows that hide nothing more: the longest sequence has 9 tokens."""
    how, causal = WITHOUT_EFFECT[name]
    ends = cu_seqlens_of(LENGTHS)
    expected = varlen_attention_reference(*qkv.unbind(1), ends, 9, causal=causal)
    out = flash_attn_varlen_func(*qkv.unbind(1), ends, ends, 9, 9, **how)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(flash_attn_varlen_qkvpacked_func(qkv, ends, 9, **how), expected)
    for window in ((7, -1), (-1, 7), (7, 0)):
        with pytest.raises(ValueError, match=r"window_size must be .* max_seqlen 9, got \("):
            flash_attn_varlen_func(*qkv.unbind(1), ends, ends, 9, 9, window_size=window)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [LENGTHS, [9, 9]], ids=["ragged", "equal"])
def test_log_sum_exp(lengths, causal):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 2, 16, generator=generator, requires_grad=True)
    ends = cu_seqlens_of(lengths)
    how = dict(causal=causal, return_attn_probs=True)
    out, lse, probabilities = flash_attn_varlen_qkvpacked_func(qkv, ends, 9, **how)
    apart = flash_attn_varlen_func(*qkv.unbind(1), ends, ends, 9, 9, **how)
    assert probabilities is apart[2] is None and not lse.requires_grad
    assert torch.equal(lse, apart[1]) and out.requires_grad
    expected = varlen_attention_reference(*qkv.unbind(1), ends, 9, causal=causal)
    torch.testing.assert_close(out, expected)
    for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        scores = torch.einsum("ihd,jhd->hij", qkv[a:b, 0], qkv[a:b, 1]) / 4
        if causal:
            future = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        torch.testing.assert_close(lse[:, a:b], scores.logsumexp(-1).detach())


@pytest.mark.parametrize("longest", [numpy.int64(9), numpy.int16(9), torch.tensor(9)], ids=repr)
def test_longest_as_others_give_it(qkv, longest):
    ends = cu_seqlens_of(LENGTHS)
    expected = varlen_attention_qkvpacked(qkv, ends, 9)
    for out in (
        varlen_attention(*qkv.unbind(1), ends, longest),
        varlen_attention_qkvpacked(qkv, ends, longest),
        flash_attn_varlen_func(*qkv.unbind(1), ends, ends, longest, longest),
        flash_attn_varlen_qkvpacked_func(qkv, ends, longest),
    ):
        assert torch.equal(out, expected)


WRONG = {
    "max_seqlen": ([9], None, "9", True, 9.0, 9j, torch.tensor(9.0), torch.tensor([9, 9])),
    "scale": ("0.5", True, 1j, [0.5], torch.tensor([1.0, 2.0]), float("nan"), float("inf")),
    "causal": ("yes", None, 2, 0.5, [True], torch.tensor(True), numpy.array([True])),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(qkv, name):
    ends, theirs = cu_seqlens_of(LENGTHS), {"scale": "softmax_scale"}.get(name, name)
    right = dict(cu_seqlens=ends, max_seqlen=9)
    calls = {
        ("varlen_attention_qkvpacked", name): varlen_attention_qkvpacked,
        ("flash_attn_varlen_qkvpacked_func", theirs): flash_attn_varlen_qkvpacked_func,
    }
    for value in WRONG[name]:
        for (function, argument), call in calls.items():
            with pytest.raises(
                (TypeError, ValueError), match=f"^{function}: {argument} must .*got"
            ):
                call(qkv, **(right | {argument: value}))


@pytest.mark.parametrize("impl", ["reference", "torch", "sdpa"])
def test_a_learnable_scale_is_refused(qkv, impl):
    """Its gradient would be lost in silence."""
    ends, scale = cu_seqlens_of(LENGTHS), torch.tensor(0.5, requires_grad=True)
    q, k, v = qkv.unbind(1)
    says = "scale must be a number, got scalar float32 on cpu that requires grad"
    for call in (
        lambda: varlen_attention(q, k, v, ends, 9, scale=scale, impl=impl),
        lambda: varlen_attention_qkvpacked(qkv, ends, 9, scale=scale, impl=impl),
        lambda: flash_attn_varlen_func(q, k, v, ends, ends, 9, 9, softmax_scale=scale),
    ):
        with pytest.raises(TypeError, match=says):
            call()
    out = varlen_attention(q, k, v, ends, 9, scale=scale.detach(), impl=impl)
    torch.testing.assert_close(out, varlen_attention_reference(q, k, v, ends, 9, scale=0.5))


@pytest.mark.parametrize(
    ("lengths", "longest", "says"),
    [
        (LENGTHS, 8, "max_seqlen must be at least the longest sequence, 9, got 8"),
        ([17], 17, "there must be as many key sequences as queries', got .* and 1"),
        ([17], 9, "max_seqlen must be at least the longest sequence, 17, got 9"),
    ],
)
def test_keys_of_other_sequences(qkv, lengths, longest, says):
    """They are cross-attention, which has its own checks."""
    ends = cu_seqlens_of(LENGTHS)
    with pytest.raises(ValueError, match=says):
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
    with pytest.raises(ValueError, match=r"\[B, S\] = 2x5 or boolean 2x1x5x5, got 2x1x5x5 float32"):
        varlen_attention_forward(module, x, x, x, torch.zeros(2, 1, 5, 5))
    with pytest.raises(ValueError, match="sliding_window must be None or at least 5, got 4"):
        varlen_attention_forward(module, x, x, x, None, sliding_window=4)
    varlen_attention_forward(module, x, x, x, None, sliding_window=5)
    hidden = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    hidden[1, 0, 1, 3] = False
    with pytest.raises(ValueError, match="hide padding, and what is later, alone, got 2x1x5x5"):
        varlen_attention_forward(module, x, x, x, hidden)
    module.is_decoder = True
    with pytest.raises(ValueError, match="must be None in cross-attention, got 2x5 .* Identity"):
        varlen_attention_forward(module, x, x, x, torch.ones(2, 5))
    varlen_attention_forward(module, x, x, x, torch.ones(2, 5), is_causal=True)
    with pytest.raises(ValueError, match=r"all alike, got 2x2x5x16 .* 2x1x5x16"):
        varlen_attention_forward(module, x, x[:, :1], x, None)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("tower", ["CLIP", "Siglip"])
def test_models_of_transformers(tower, side):
    """Registered as the docstring says, causal or not: features of padding too, as the last token
    is what SigLIP pools."""
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
    made = {}
    for how in ("sdpa", "clipa"):
        model.set_attn_implementation(how)
        model.zero_grad()
        came = model(input_ids=tokens, attention_mask=mask)
        (came.last_hidden_state.square().sum() + came.pooler_output.sum()).backward()
        grads = [value.grad for value in model.parameters() if value.grad is not None]
        made[how] = came.last_hidden_state, came.pooler_output, *grads
    torch.testing.assert_close(made["clipa"], made["sdpa"], atol=1e-3, rtol=1e-3)


def test_pooling_of_siglip_2():
    """Its head is torch's own attention, and takes the mask in sdpa_mask's form."""
    transformers = pytest.importorskip("transformers")
    lines = inspect.getdoc(varlen_attention_forward).splitlines()
    register = [line[4:] for line in lines if line.startswith("    ")][:4]
    exec("\n".join(register), dict(varlen_attention_forward=varlen_attention_forward))
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.Siglip2VisionConfig(**sizes, num_patches=16, patch_size=8)
    torch.manual_seed(0)
    model = transformers.Siglip2VisionModel(config).eval()
    given = dict(
        pixel_values=torch.randn(2, 16, 192),
        pixel_attention_mask=torch.tensor([[1] * 16, [1] * 12 + [0] * 4]),
        spatial_shapes=torch.tensor([[4, 4], [3, 4]]),
    )
    pooled = {}
    for how in ("sdpa", "clipa"):
        model.set_attn_implementation(how)
        pooled[how] = model(**given).pooler_output
    torch.testing.assert_close(pooled["clipa"], pooled["sdpa"])


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
    call = getattr(rivals, impl)
    out = call(q, k, v, cu_seqlens_of(LENGTHS), max(LENGTHS), causal, 0.3)
    how = dict(causal=causal, scale=0.3)
    expected = varlen_attention_reference(q, k, v, cu_seqlens_of(LENGTHS), 9, **how)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("impl", ["varlen_attn", "flash_attn", "xformers"])
def test_rivals_match_the_reference(qkv, impl, causal):
    if find_spec(rivals.PACKAGES[impl]) is None:
        pytest.skip(f"{impl} is not installed")
    if not torch.cuda.is_available():
        pytest.skip(f"{impl} has no CPU implementation")
    qkv, ends = qkv.half().cuda(), cu_seqlens_of(LENGTHS, "cuda")
    how = dict(causal=causal, scale=0.3)
    out = varlen_attention_qkvpacked(qkv, ends, 9, impl=impl, **how)
    expected = varlen_attention_reference(*qkv.unbind(1), ends, 9, **how)
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
