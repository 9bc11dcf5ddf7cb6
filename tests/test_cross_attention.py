"""varlen_cross_attention, and flash-attention's names for it: keys of other sequences."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import check_op

from clipa_kernels import (
    cu_seqlens_of,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    varlen_attention,
    varlen_cross_attention,
    varlen_cross_attention_reference,
)
from clipa_kernels.attention import rivals

CASES = {
    "pooling": ([1, 1, 1], [5, 17, 1]),
    "decoder": ([4, 7, 2], [9, 3, 6]),
    "empty ones": ([3, 0, 2, 4], [0, 5, 6, 2]),
    "no query": ([0, 0], [3, 2]),
    "no key": ([3, 2], [0, 0]),
    "nothing": ([], []),
}
cases = pytest.mark.parametrize("lengths", CASES.values(), ids=CASES)
causals = pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])


def drawn(lengths, dtype=torch.float32, heads=2, size=16):
    """q, k, v and where their sequences end."""
    torch.manual_seed(0)
    counts = [sum(lengths[0]), sum(lengths[1]), sum(lengths[1])]
    tensors = [torch.randn(n, heads, size, dtype=dtype, requires_grad=True) for n in counts]
    ends = [cu_seqlens_of(each) for each in lengths]
    return tensors, [*ends, *(max(each, default=0) for each in lengths)]


def one_by_one(tensors, ends, causal):
    """The definition, by torch's attention of one pair of sequences."""
    q, k, v = tensors
    a, b, *_ = (e.tolist() if torch.is_tensor(e) else e for e in ends)
    out = []
    for i, j, m, n in zip(a[:-1], a[1:], b[:-1], b[1:], strict=True):
        seen = torch.ones(j - i, n - m, dtype=torch.bool).tril((n - m) - (j - i) if causal else n)
        for row, mask in zip(range(i, j), seen, strict=True):
            part = [t[m:n][mask].transpose(0, 1) for t in (k, v)]
            one = F.scaled_dot_product_attention(q[row, :, None], *part)
            out.append(one[:, 0] if mask.any() else torch.zeros_like(q[row]))
    return torch.stack(out) if out else torch.zeros_like(q)


@cases
@causals
def test_the_reference_is_torchs_attention_one_by_one(lengths, causal):
    tensors, ends = drawn(lengths, torch.float64)
    out = varlen_cross_attention_reference(*tensors, *ends, causal=causal)
    torch.testing.assert_close(out, one_by_one(tensors, ends, causal))


@cases
@causals
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_padded_equals_the_reference(lengths, causal, dtype):
    tensors, ends = drawn(lengths)
    functions = varlen_cross_attention, varlen_cross_attention_reference
    mine, specified = (lambda q, k, v, f=f: f(q, k, v, *ends, causal=causal) for f in functions)
    check_op(mine, specified, dict(zip("qkv", tensors, strict=True)), dtype)


def test_nothing_leaks_from_other_sequences():
    tensors, ends = drawn(([2, 2], [3, 3]))
    with torch.no_grad():
        clean = varlen_cross_attention(*tensors, *ends)
        for tensor in tensors:
            tensor[len(tensor) // 2 :] = float("nan")
        dirty = varlen_cross_attention(*tensors, *ends)
    assert torch.equal(clean[:2], dirty[:2]) and dirty[2:].isnan().all()


@cases
@causals
def test_flash_attentions_names(lengths, causal):
    (q, k, v), ends = drawn(lengths)
    expected = varlen_cross_attention(q, k, v, *ends, causal=causal)
    how = dict(causal=causal, return_attn_probs=True)
    out, lse, none = flash_attn_varlen_func(q, k, v, *ends, **how)
    assert torch.equal(out, expected) and none is None
    packed = flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), *ends, **how)
    assert torch.equal(packed[0], expected) and torch.equal(packed[1], lse)
    assert lse.shape == (2, len(q)) and not lse.requires_grad
    a, b, *_ = (e.tolist() if torch.is_tensor(e) else e for e in ends)
    for i, j, m, n in zip(a[:-1], a[1:], b[:-1], b[1:], strict=True):
        for row in range(i, j):
            seen = max(0, n - m - (j - 1 - row)) if causal else n - m
            scores = torch.einsum("hd,jhd->hj", q[row], k[m : m + seen]) / math.sqrt(16)
            true = scores.logsumexp(-1) if seen else torch.full((2,), float("inf"))
            torch.testing.assert_close(lse[:, row], true)


def test_queries_and_keys_of_the_same_sequences_are_self_attention():
    (q, k, v), ends = drawn(([5, 3], [5, 3]))
    expected = varlen_attention(q, k, v, ends[0], 5)
    for other in (ends[0], ends[0].clone()):
        assert torch.equal(flash_attn_varlen_func(q, k, v, ends[0], other, 5, 5), expected)
    torch.testing.assert_close(varlen_cross_attention(q, k, v, *ends), expected)


def test_torchs_varlen_attn_gets_these_arguments(monkeypatch):
    attention = pytest.importorskip("torch.nn.attention.varlen")
    (q, k, v), ends = drawn(CASES["decoder"])
    given = []
    monkeypatch.setattr(attention, "varlen_attn", lambda *a, **b: given.append((a, b)) or a[0])
    monkeypatch.setattr(rivals, "require_rival", lambda *_: None)
    varlen_cross_attention(q, k, v, *ends, causal=True, scale=0.5, impl="varlen_attn")
    ((args, how),) = given
    assert args[3:] == tuple(ends) and how == dict(scale=0.5, window_size=(-1, 0))


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            dict(k=torch.zeros(18, 2, 8)),
            ValueError,
            r"q must be \[Tq, H, D\] and k, v .*, got 13x2x16",
        ),
        (dict(v=torch.zeros(17, 2, 16)), ValueError, "q must be"),
        (dict(q=torch.zeros(13, 2, 16).long()), TypeError, "q must be floating point, got 13x2x16"),
        (
            dict(k=torch.zeros(18, 2, 16).half()),
            TypeError,
            "must have one dtype, got q torch.float32",
        ),
        (
            dict(b=cu_seqlens_of([9, 9])),
            ValueError,
            "as many key sequences as queries', got 3 and 2",
        ),
        (dict(m=5), ValueError, "max_seqlen must be at least the longest sequence, 7, got 5"),
        (dict(impl="flash"), ValueError, "impl must be one of auto, varlen_attn, sdpa, reference"),
        (dict(impl="varlen_attn"), RuntimeError, "varlen_attn"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses(change, error, sentence):
    (q, k, v), (a, b, m, n) = drawn(CASES["decoder"])
    given = dict(q=q, k=k, v=v, a=a, b=b, m=m, n=n) | change
    how = {"impl": given.pop("impl")} if "impl" in given else {}
    with pytest.raises(error, match=f"^varlen_cross_attention: .*{sentence}"):
        varlen_cross_attention(*given.values(), **how)


def test_kvpacked_refuses():
    (q, k, _), ends = drawn(CASES["decoder"])
    with pytest.raises(ValueError, match=r"kv must be \[Tk, 2, H, D\], got 18x2x16"):
        flash_attn_varlen_kvpacked_func(q, k, *ends)
