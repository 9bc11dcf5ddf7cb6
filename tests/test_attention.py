"""varlen_attention: every implementation against the reference, isolation of sequences, errors."""

import pytest
import torch
from tolerance import check_op

from bench.meters.counted import counted
from clipa_kernels import (
    cu_seqlens_of,
    varlen_attention,
    varlen_attention_qkvpacked,
    varlen_attention_reference,
)

LENGTHS = {
    "one token": [1, 1, 1],
    "equal": [4] * 5,
    "ragged": [3, 0, 9, 17, 1, 8, 16],
    "prime": [37],
    "long": [33, 130, 5],
    "all empty": [0, 0],
    "no sequence": [],
}


def inputs(lengths, heads=2, size=16):
    torch.manual_seed(0)
    return {"qkv": torch.randn(sum(lengths), 3, heads, size)}


def call(impl, lengths, **how):
    cu_seqlens, longest = cu_seqlens_of(lengths), max(lengths, default=0)
    if impl == "reference":
        return lambda qkv: varlen_attention_reference(*qkv.unbind(1), cu_seqlens, longest, **how)
    return lambda qkv: varlen_attention_qkvpacked(qkv, cu_seqlens, longest, impl=impl, **how)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("impl", ["torch", "sdpa"])
def test_matches_the_reference(impl, lengths, dtype, causal):
    check_op(
        call(impl, lengths, causal=causal),
        call("reference", lengths, causal=causal),
        inputs(lengths),
        dtype,
    )


@pytest.mark.parametrize("impl", ["torch", "sdpa"])
@pytest.mark.parametrize("lengths", [[4] * 3, [3, 0, 9]], ids=["equal", "ragged"])
def test_a_scale_that_is_given(impl, lengths):
    qkv, how = inputs(lengths)["qkv"], dict(causal=True, scale=0.7)
    expected = call("reference", lengths, **how)(qkv)
    torch.testing.assert_close(call(impl, lengths, **how)(qkv), expected)


@pytest.mark.parametrize("impl", ["auto", "torch", "sdpa", "reference"])
@pytest.mark.parametrize("lengths", [[4] * 3, [3, 0, 9]], ids=["equal", "ragged"])
def test_the_dtype_under_autocast_is_that_of_the_input(impl, lengths):
    args = inputs(lengths)["qkv"], cu_seqlens_of(lengths), max(lengths)
    plain = varlen_attention_qkvpacked(*args, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        out = varlen_attention_qkvpacked(*args, impl=impl)
    assert out.dtype == torch.float32 and torch.equal(out, plain)


def test_reference_is_softmax_attention():
    lengths = [2, 5]
    q, k, v = inputs(lengths)["qkv"].double().unbind(1)
    out = varlen_attention_reference(q, k, v, cu_seqlens_of(lengths), 5, causal=True, scale=0.3)
    for a, b in ((0, 2), (2, 7)):
        for i in range(a, b):
            p = torch.einsum("hd,jhd->jh", 0.3 * q[i], k[a : i + 1]).softmax(0)
            torch.testing.assert_close(out[i], torch.einsum("jh,jhd->hd", p, v[a : i + 1]))
    assert b == len(out)


@pytest.mark.parametrize("impl", ["torch", "sdpa"])
def test_separate_tensors_equal_the_packed_product(impl):
    lengths = [3, 11, 6]
    qkv = inputs(lengths)["qkv"].requires_grad_()
    q, k, v = (t.detach().contiguous().requires_grad_() for t in qkv.unbind(1))
    how = dict(causal=True, scale=0.5, impl=impl)
    a = varlen_attention_qkvpacked(qkv, cu_seqlens_of(lengths), 11, **how)
    b = varlen_attention(q, k, v, cu_seqlens_of(lengths), 11, **how)
    assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    torch.testing.assert_close(qkv.grad, torch.stack((q.grad, k.grad, v.grad), 1))


@pytest.mark.parametrize("impl", ["torch", "sdpa", "reference"])
def test_a_sequence_does_not_see_its_neighbours(impl):
    lengths = [3, 6, 2]
    qkv = inputs(lengths)["qkv"]
    clean = call(impl, lengths)(qkv)
    qkv[3:9] = float("nan")
    out = call(impl, lengths)(qkv)
    assert torch.equal(out[:3], clean[:3]) and torch.equal(out[9:], clean[9:])
    assert out[3:9].isnan().all()


@pytest.mark.parametrize("impl", ["torch", "sdpa"])
def test_large_logits_stay_finite(impl):
    qkv = (100 * inputs([5, 9], size=64)["qkv"]).requires_grad_()
    out = call(impl, [5, 9])(qkv)
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(qkv.grad).all()


def test_max_seqlen_may_be_above_the_longest():
    qkv, cu_seqlens = inputs([3, 5])["qkv"], cu_seqlens_of([3, 5])
    expected = varlen_attention_qkvpacked(qkv, cu_seqlens, 5, impl="reference")
    for impl in ("torch", "sdpa"):
        out = varlen_attention_qkvpacked(qkv, cu_seqlens, 77, impl=impl)
        torch.testing.assert_close(out, expected)


def test_saves_only_its_inputs():
    qkv = inputs([4, 7])["qkv"].requires_grad_()
    cu_seqlens = cu_seqlens_of([4, 7])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        varlen_attention_qkvpacked(qkv, cu_seqlens, 7, impl="torch")
    assert {s.data_ptr() for s in saved} == {qkv.data_ptr(), cu_seqlens.data_ptr()}


def test_no_padded_batch_in_memory():
    lengths = [300] + [2] * 200  # padded: 60,300 rows; packed: 700
    qkv = inputs(lengths, heads=1, size=8)["qkv"]
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

    with Largest() as largest:
        varlen_attention_qkvpacked(qkv, cu_seqlens_of(lengths), 300, impl="torch")
    assert largest.numel <= max(300 * 300, 3 * 700 * 8)


def test_moves_less_on_a_cpu_than_padding():
    """Captions of 10 tokens in a context of 77: a third of the bytes, a quarter of the memory."""
    torch.use_deterministic_algorithms(False)  # filling memory with NaN is not what is counted
    generator = torch.Generator().manual_seed(0)
    drawn = torch.empty(200).log_normal_(2.2, 0.45, generator=generator)
    lengths = drawn.round().clamp(3, 77).int().tolist()
    qkv, cu_seqlens = inputs(lengths, 4, 64)["qkv"].requires_grad_(), cu_seqlens_of(lengths)
    counts, results = {}, {}
    for impl in ("torch", "sdpa"):
        with counted() as counts[impl]:
            out = varlen_attention_qkvpacked(qkv, cu_seqlens, 77, causal=True, impl=impl)
            (grad,) = torch.autograd.grad(out.sin().sum(), qkv)
        results[impl] = out.detach(), grad
    for mine, padded in zip(results["torch"], results["sdpa"], strict=True):
        torch.testing.assert_close(mine, padded, rtol=1e-4, atol=1e-5)
    assert 0 < 3 * counts["torch"].total().unique <= counts["sdpa"].total().unique
    assert 0 < 4 * counts["torch"].peak_bytes <= counts["sdpa"].peak_bytes


def test_opcheck():
    qkv = inputs([5, 8, 7])["qkv"].requires_grad_()
    args = (qkv, cu_seqlens_of([5, 8, 7]), 8, True, 0.2)
    torch.library.opcheck(torch.ops.clipa.varlen_attention_qkvpacked, args)


@pytest.mark.parametrize("impl", ["torch", "sdpa"])
def test_compiles_in_one_graph(impl):
    f = call(impl, [5, 8, 7])
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    qkv = inputs([5, 8, 7])["qkv"]
    a, b = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    f(a).square().sum().backward()
    compiled(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


BAD = {
    "heads first": (
        dict(qkv=torch.zeros(3, 4, 2, 16)),
        ValueError,
        r"\[T, 3, H, D\], got 3x4x2x16",
    ),
    "integer": (dict(qkv=torch.zeros(4, 3, 2, 16).long()), TypeError, "qkv must be floating"),
    "head size": (dict(qkv=torch.zeros(4, 3, 2, 12)), ValueError, "steps of 8, got 2 of 12"),
    "cu dtype": (dict(cu_seqlens=torch.tensor([0, 4])), TypeError, "must be int32"),
    "cu end": (dict(cu_seqlens=cu_seqlens_of([3])), ValueError, "from 0 to T = 4, got 0 to 3"),
    "cu falls": (dict(cu_seqlens=torch.tensor([0, 5, 4]).int()), ValueError, "must not fall"),
    "cu device": (dict(cu_seqlens=cu_seqlens_of([4], "meta")), ValueError, "must be on cpu"),
    "last stride": (
        dict(qkv=torch.zeros(4, 3, 2, 32)[..., ::2]),
        ValueError,
        "the last stride must be 1, got 2",
    ),
    "max's type": (dict(max_seqlen=4.0), TypeError, "max_seqlen must be an integer, got 4.0"),
    "max": (dict(max_seqlen=3), ValueError, "at least the longest sequence, 4, got 3"),
    "impl": (
        dict(impl="flash"),
        ValueError,
        "impl must be one of auto, triton, torch, sdpa, reference",
    ),
}


@pytest.mark.parametrize(("change", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, words):
    good = dict(qkv=torch.zeros(4, 3, 2, 16), cu_seqlens=cu_seqlens_of([4]), max_seqlen=4)
    with pytest.raises(error, match=words):
        varlen_attention_qkvpacked(**(good | change))


def test_bad_separate_tensors_are_named():
    q, cu_seqlens = torch.zeros(4, 2, 16), cu_seqlens_of([4])
    with pytest.raises(
        TypeError, match="must have one dtype, got q torch.float32, k torch.float16"
    ):
        varlen_attention(q, q.half(), q, cu_seqlens, 4)
    with pytest.raises(ValueError, match="all alike, got 4x2x16 .* 3x2x16"):
        varlen_attention(q, q[:3], q, cu_seqlens, 4)
    with pytest.raises(ValueError, match="on one device, got q on meta, k on cpu, v on cpu"):
        varlen_attention(q.to("meta"), q, q, cu_seqlens, 4)
