"""varlen_attention's Triton kernels under the interpreter, on before triton is imported."""

import pytest
import torch
import torch._dynamo.testing
from device import DEVICE, DTYPES
from tolerance import check_close, check_op

from clipa_kernels import (
    cu_seqlens_of,
    varlen_attention,
    varlen_attention_qkvpacked,
    varlen_attention_reference,
)
from models.transformer import Attention

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of exp

# lengths, head size, causal
SHAPES = {
    "8 in pairs": ([8] * 3, 64, False),
    "5 by three, causal": ([5] * 4, 16, True),
    "one token": ([1] * 17, 24, False),
    "16": ([16] * 2, 80, False),
    "17": ([17] * 2, 88, False),
    "20": ([20, 3], 120, True),
    "32 causal": ([32] * 2, 16, True),
    "37": ([37] * 2, 104, False),
    "50": ([50], 128, False),
    "64 causal": ([64], 40, True),
    "65": ([65], 80, False),
    "65 causal": ([65], 112, True),
    "66": ([66], 104, False),
    "130": ([130], 16, False),
    "197": ([197], 64, False),
    "ragged": ([3, 0, 9, 16, 1, 8], 16, True),
    "ragged, prime": ([37, 0, 1, 23], 80, False),
    "ragged and long": ([130, 3, 0, 70, 1], 16, True),
    "ragged and long, full": ([66, 17, 128], 88, False),
    "all empty": ([0, 0], 16, False),
    "no sequence": ([], 16, True),
}


def inputs(lengths, size=16):
    # The interpreter takes its time; odd heads differ where they start in mid-sector.
    heads = 1 if max(lengths, default=0) > 64 and size % 16 == 0 else 2
    generator = torch.Generator().manual_seed(0)
    return {"qkv": torch.randn(sum(lengths), 3, heads, size, generator=generator)}


def call(lengths, impl="triton", **how):
    cu_seqlens, longest = cu_seqlens_of(lengths), max(lengths, default=0)
    if impl == "reference":
        return lambda qkv: varlen_attention_reference(*qkv.unbind(1), cu_seqlens, longest, **how)
    return lambda qkv: varlen_attention_qkvpacked(qkv, cu_seqlens, longest, impl=impl, **how)


def gradient(function, qkv):
    qkv = qkv.detach().clone().requires_grad_()
    out = function(qkv)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator).to(out.dtype)
    (grad,) = torch.autograd.grad(out, qkv, weight)
    return out.detach(), grad


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("lengths", "size", "causal"), SHAPES.values(), ids=SHAPES)
def test_matches_the_reference(lengths, size, causal, dtype):
    mine, reference = call(lengths, causal=causal), call(lengths, "reference", causal=causal)
    check_op(mine, reference, inputs(lengths, size), dtype)


@pytest.mark.parametrize("lengths", [[8] * 3, [20, 3, 0], [70, 66, 5]], ids=str)
def test_separate_tensors_of_any_stride(lengths):
    """Slices of wider tensors, heads first in memory, and odd strides: as the packed product."""
    qkv = inputs(lengths)["qkv"]
    out, grad = gradient(call(lengths, causal=True, scale=0.3), qkv)
    q, k, v = qkv.unbind(1)
    odd = torch.zeros(*q.shape[:2], 19)
    odd[..., 3:] = v
    spread = [
        q.contiguous(),
        k.transpose(0, 1).contiguous().transpose(0, 1),
        odd[..., 3:],
    ]
    spread = [t.requires_grad_() for t in spread]
    cu_seqlens = cu_seqlens_of(lengths)
    mine = varlen_attention(
        *spread, cu_seqlens, max(lengths), causal=True, scale=0.3, impl="triton"
    )
    assert torch.equal(mine, out)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator)
    grads = torch.autograd.grad(mine, spread, weight)
    assert torch.equal(torch.stack(grads, 1), grad)


def test_heads_whose_stride_alone_is_not_a_multiple_of_8():
    """Rows 40 apart, heads 20: addresses in steps of 8 would miss them."""
    lengths = [9, 4]
    q, k, v = torch.randn(3, 13, 2, 20, generator=torch.Generator().manual_seed(0))[..., :16]
    assert q.stride() == (40, 20, 1)
    mine, plain = (
        varlen_attention(q, k, v, cu_seqlens_of(lengths), 9, impl=impl)
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("lengths", [[3, 9, 5], [3, 70, 5]], ids=str)
def test_cu_seqlens_of_any_stride(lengths):
    qkv, longest = inputs(lengths)["qkv"], max(lengths)
    expected = gradient(call(lengths), qkv)
    apart = torch.stack([cu_seqlens_of(lengths)] * 2, 1)[:, 0]
    apart._base[:, 1] = 1 << 20  # what lies between must not be read
    for function in (
        lambda x: varlen_attention_qkvpacked(x, apart, longest, impl="triton"),
        lambda x: varlen_attention(*x.unbind(1), apart, longest, impl="triton"),
    ):
        for mine, same in zip(gradient(function, qkv), expected, strict=True):
            assert torch.equal(mine, same)


@pytest.mark.parametrize(("lengths", "longest"), [([20, 9, 3], 16), ([90, 70, 5], 66)], ids=str)
def test_tokens_past_max_seqlen_are_left_out(lengths, longest):
    """Where cu_seqlens lies on a GPU nothing checks it: no row of a neighbour is read."""
    from clipa_kernels.attention import kernels as attention

    q, k, v = inputs(lengths)["qkv"].unbind(1)
    out = attention.forward(q, k, v, cu_seqlens_of(lengths), longest, False, 0.25)
    start = 0
    for length in lengths:
        rows = slice(start, start + min(length, longest))
        n = rows.stop - rows.start
        alone = varlen_attention_reference(q[rows], k[rows], v[rows], cu_seqlens_of([n]), n)
        torch.testing.assert_close(out[rows], alone)
        start += length


def test_a_backward_cut_otherwise_beyond_512_tokens():
    lengths, qkv = [513], inputs([513], 104)["qkv"][:, :, :1]
    how = dict(causal=True)
    check_op(call(lengths, **how), call(lengths, "reference", **how), {"qkv": qkv}, torch.float16)


def test_values_far_from_zero():
    """All dP alike but for little: the long backward rounds what is left of them."""
    lengths = [80, 70]
    qkv = inputs(lengths)["qkv"]
    qkv[:, 2] += 30
    check_op(call(lengths), call(lengths, "reference"), {"qkv": qkv}, torch.float16)


def test_a_gradient_of_any_stride():
    """Expanded from one number, and columns apart: copied or read in place, the same values."""
    lengths = [6, 20]
    qkv = inputs(lengths)["qkv"].requires_grad_()
    for weight in (torch.ones(()).expand(26, 2, 16), torch.randn(16, 2, 26).permute(2, 1, 0)):
        out = call(lengths)(qkv)
        (mine,) = torch.autograd.grad(out, qkv, weight, retain_graph=True)
        (plain,) = torch.autograd.grad(out, qkv, weight.contiguous())
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("lengths", [[8] * 4, [31, 4, 9], [65] * 2, [80, 5]], ids=str)
def test_two_runs_give_equal_bits(lengths):
    qkv = inputs(lengths)["qkv"].half()
    first, second = (gradient(call(lengths), qkv) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [[8] * 2, [40, 3], [65], [100, 1]], ids=str)
def test_large_logits_stay_finite(lengths, causal):
    """Scores up to +-1e4, whole numbers: their sums are exact on any machine."""
    qkv = inputs(lengths)["qkv"]
    qkv[:, 1] = (2 * qkv[:, 1]).round()
    peak = torch.einsum("ihd,jhd->hij", *qkv.unbind(1)[:2]).abs().max()
    qkv[:, 0] = (qkv[:, 0] * (1e4 / peak)).round()
    how = dict(causal=causal, scale=1.0)
    for dtype in DTYPES.values():
        x = qkv.to(dtype)
        actual, base = (gradient(call(lengths, i, **how), x) for i in ("triton", "reference"))
        exact = gradient(call(lengths, "reference", **how), x.double())
        check_close("output", actual[0], exact[0], base[0])
        if dtype == torch.float32 and max(lengths) > 16:
            # The long backward makes P from a log-sum-exp, which fp32 holds at 1e4 to 5e-4.
            error = (actual[1].double() - exact[1]).abs().max()
            assert error <= 1e4 * torch.finfo(dtype).eps * exact[1].abs().max()  # and is not NaN
        else:
            check_close("gradient", actual[1], exact[1], base[1])


@pytest.mark.parametrize("lengths", [[3, 6, 2], [66, 70, 2]], ids=str)
def test_a_sequence_does_not_see_its_neighbours(lengths):
    qkv = inputs(lengths)["qkv"]
    out, grad = gradient(call(lengths), qkv)
    a, b = lengths[0], lengths[0] + lengths[1]
    qkv[a:b] = float("nan")
    for mine, clean in zip(gradient(call(lengths), qkv), (out, grad), strict=True):
        assert torch.equal(mine[:a], clean[:a]) and torch.equal(mine[b:], clean[b:])
        assert mine[a:b].isnan().all()


def test_lengths_below_max_seqlen_and_uniform_calls_agree():
    """The same tokens as one length, and as lengths that are looked up."""
    lengths = [12] * 3
    qkv, cu_seqlens = inputs(lengths)["qkv"], cu_seqlens_of(lengths)
    expected = gradient(call(lengths), qkv)
    for longest in (16, 64, 77, 1024):
        looked_up = gradient(
            lambda x, n=longest: varlen_attention_qkvpacked(x, cu_seqlens, n, impl="triton"), qkv
        )
        for mine, other in zip(looked_up, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_one_length_does_not_read_cu_seqlens():
    qkv = inputs([20, 20])["qkv"]
    expected = gradient(call([20, 20]), qkv)
    op = torch.ops.clipa.varlen_attention_qkvpacked
    wrong = torch.tensor([0, 7, 1000], dtype=torch.int32)
    mine = gradient(lambda x: op(x, wrong, 20, False, 0.25, True), qkv)
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


@pytest.mark.parametrize("lengths", [[8] * 2, [20, 7], [70, 65]], ids=str)
def test_saves_its_inputs_and_nothing_else(lengths):
    qkv = inputs(lengths)["qkv"].requires_grad_()
    cu_seqlens, saved = cu_seqlens_of(lengths), []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        varlen_attention_qkvpacked(qkv, cu_seqlens, max(lengths), impl="triton")
    assert sum(s.untyped_storage().nbytes() for s in saved) == qkv.nbytes + cu_seqlens.nbytes
    assert {s.data_ptr() for s in saved} == {qkv.data_ptr(), cu_seqlens.data_ptr()}
    q, k, v = (t.detach().clone().requires_grad_() for t in qkv.unbind(1))
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        varlen_attention(q, k, v, cu_seqlens, max(lengths), impl="triton")
    assert {s.data_ptr() for s in saved} == {t.data_ptr() for t in (q, k, v, cu_seqlens)}


def test_operators_pass_opcheck():
    qkv, cu_seqlens = inputs([5, 8, 7])["qkv"].requires_grad_(), cu_seqlens_of([5, 8, 7])
    packed = (qkv, cu_seqlens, 8, True, 0.2, True)
    torch.library.opcheck(torch.ops.clipa.varlen_attention_qkvpacked, packed)
    apart = (*(t.detach().requires_grad_() for t in qkv.unbind(1)), cu_seqlens, 8, True, 0.2)
    torch.library.opcheck(torch.ops.clipa.varlen_attention, apart)


def test_compiles_in_one_graph_for_any_number_of_tokens():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def compiled(qkv, cu_seqlens):
        return varlen_attention_qkvpacked(qkv, cu_seqlens, 9, impl="triton")

    for lengths in ([5, 8, 1, 0, 7, 2], [9, 3, 7, 4, 4], [9] * 6, [1] * 8):
        qkv, cu_seqlens = inputs(lengths)["qkv"], cu_seqlens_of(lengths)
        mine = gradient(lambda x, c=cu_seqlens: compiled(x, c), qkv)
        plain = gradient(
            lambda x, c=cu_seqlens: varlen_attention_qkvpacked(x, c, 9, impl="triton"), qkv
        )
        for a, b in zip(mine, plain, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


def test_rows_far_apart_are_copied():
    """Where a sequence's last row is 2^31 elements from its first; 32 bits reach no further."""
    tiles = pytest.importorskip("clipa_kernels.attention.kernels_tiles")
    for stride, copied in ((2**25, False), (2**26, True)):
        apart = torch.empty(40, 1, 16, device="meta").as_strided((40, 1, 16), (stride, 16, 1))
        assert (tiles.within_reach(apart, 40) is not apart) == copied
    dense = torch.zeros(40, 1, 16)
    assert tiles.within_reach(dense.transpose(0, 2), 16).stride(-1) == 1


def test_attention_of_the_models_compiles_for_any_number_of_tokens():
    """Forward and backward of the transformer's block, one graph for all."""
    block = Attention(32, 2, causal=True, impl="triton")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter, dynamic=True)
    for lengths in ([5, 8, 1, 0, 7, 2], [9, 3, 7, 4, 4], [9] * 6):
        x, cu_seqlens = torch.randn(sum(lengths), 32), cu_seqlens_of(lengths)
        results = []
        for module in (compiled, block):
            block.zero_grad()
            module(x, cu_seqlens, 9).sin().sum().backward()
            results.append(block.in_proj_weight.grad.clone())
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


def test_autocast_and_checkpointing():
    linear = torch.nn.Linear(32, 96)
    x = torch.randn(11, 32)

    def forward(x):
        qkv = linear(x).view(-1, 3, 2, 16)
        return varlen_attention_qkvpacked(qkv, cu_seqlens_of([4, 7]), 7, impl="triton")

    with torch.autocast(torch.device(DEVICE).type, torch.float16):
        out = forward(x)
        again = torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False)
    assert out.dtype == torch.float16 and torch.equal(out, again)
    (plain,) = torch.autograd.grad(out.float().square().sum(), linear.weight)
    (kept,) = torch.autograd.grad(again.float().square().sum(), linear.weight)
    assert torch.equal(plain, kept)


BAD = {
    "dtype": (dict(dtype=torch.float64), TypeError, 'impl "triton" takes float32, .* float64'),
    "wide": (dict(size=136), ValueError, "heads of at most 128 .* 1024, got 136 and 8"),
    "long": (dict(longest=1025), ValueError, "at most 1024, got 16 and 1025"),
}


@pytest.mark.parametrize(("change", "error", "words"), BAD.values(), ids=BAD)
def test_limits_are_named(change, error, words):
    how = dict(dtype=torch.float32, size=16, longest=8) | change
    qkv = torch.zeros(8, 3, 1, how["size"], dtype=how["dtype"])
    with pytest.raises(error, match=words):
        varlen_attention_qkvpacked(qkv, cu_seqlens_of([8]), how["longest"], impl="triton")
