"""Packing keeps every token once, in order, and says what is wrong with bad lengths."""

import pytest
import torch

from clipa_kernels import Packed, cu_seqlens_of, pack, unpack


@pytest.mark.parametrize(
    "lengths", [[3, 1, 4], [0, 2, 0], [4, 4], [0, 0], []], ids=lambda x: "-".join(map(str, x))
)
def test_pack_then_unpack_gives_the_padded_batch(lengths):
    x = torch.randn(len(lengths), 4, 2)
    packed = pack(x, lengths)
    expected = [x[b, :length] for b, length in enumerate(lengths)]
    assert torch.equal(packed.tokens, torch.cat([*expected, x.new_empty(0, 2)]))
    assert packed.cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == max(lengths, default=0)
    back = unpack(packed, fill=-1.0)
    for b, length in enumerate(lengths):
        assert torch.equal(back[b, :length], x[b, :length])
        assert (back[b, length:] == -1).all()


def test_unpack_passes_gradients():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: unpack(pack(t, [3, 1])), x)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: pack(torch.zeros(2, 3), [1]), ValueError, "B = 1 lengths, got 2x3 float32"),
        (lambda: pack(torch.zeros(2, 3), [1, 4]), ValueError, "from 0 to 3, got 4"),
        (lambda: pack([1.0], [1]), TypeError, "x must be a tensor, got list"),
        (lambda: cu_seqlens_of([2, -1]), ValueError, "at least 0, got -1"),
        (lambda: cu_seqlens_of([2**31]), ValueError, "less than 2\\*\\*31"),
        (
            lambda: unpack(Packed(torch.zeros(3, 1), torch.tensor([0, 3]), 3)),
            TypeError,
            "int32 \\[B \\+ 1\\], got 2 int64",
        ),
        (
            lambda: unpack(Packed(torch.zeros(3, 1), cu_seqlens_of([1, 1]), 3)),
            ValueError,
            "from 0 to T = 3, got 0 to 2",
        ),
        (
            lambda: unpack(Packed(torch.zeros(3, 1), cu_seqlens_of([2, 1]), 1)),
            ValueError,
            "at least the longest sequence, 2, got 1",
        ),
        (
            lambda: unpack(Packed(torch.zeros(1, 1), torch.tensor([0, 2, 1]).int(), 2)),
            ValueError,
            "must not fall, got a step of -1",
        ),
    ],
    ids=["batch", "length", "list", "negative", "huge", "dtype", "total", "longest", "falling"],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
