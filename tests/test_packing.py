"""Packing keeps every token once, in order, and says what is wrong with bad lengths."""

import numpy as np
import pytest
import torch

from clipa_kernels import Packed, cu_seqlens_of, pack, unpack

ONE = Packed(torch.tensor([7]), torch.tensor([0, 1]).int(), 1)


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


@pytest.mark.parametrize(
    "kind",
    [np.array, torch.tensor, tuple, iter, map],
    ids=["array", "tensor", "tuple", "iter", "map"],
)
def test_lengths_of_any_whole_kind(kind):
    lengths = map(torch.tensor, [2, 0, 3]) if kind is map else kind([2, 0, 3])
    assert cu_seqlens_of(lengths).tolist() == [0, 2, 2, 5]
    lengths = map(np.int8, [2, 0, 3]) if kind is map else kind([2, 0, 3])
    packed = pack(torch.zeros(3, 3, 0), lengths)
    assert packed.tokens.shape == (5, 0) and type(packed.max_seqlen) is int


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16], ids=str)
def test_unpack_fills_with_what_the_dtype_holds(dtype):
    tokens = torch.zeros(3, dtype=dtype)
    for total, fill in ((3, 1), (3, 1.0), (0, 1)):
        packed = Packed(tokens[:total], torch.tensor([0, 0, total]).int(), 4)
        expected = torch.ones(2, 4, dtype=dtype)
        expected[1, :total] = 0
        assert torch.equal(unpack(packed, fill), expected)


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
        (
            lambda: cu_seqlens_of([1.5, 1]),
            TypeError,
            "^cu_seqlens_of: lengths .* integers, got 1.5",
        ),
        (lambda: cu_seqlens_of(torch.tensor([1.0])), TypeError, "integers, got 1.0"),
        (lambda: cu_seqlens_of(3), TypeError, "a sequence of integers, got 3"),
        (lambda: cu_seqlens_of("12"), TypeError, "a sequence of integers, got '12'"),
        (lambda: cu_seqlens_of([1], "nope"), ValueError, "^cu_seqlens_of: device .*, got 'nope'"),
        (lambda: cu_seqlens_of([1], 1.5), TypeError, "^cu_seqlens_of: device .*, got 1.5"),
        (lambda: pack(torch.zeros(2, 3), [1.0, 2]), TypeError, "^pack: lengths .* got 1.0"),
        (lambda: pack(torch.zeros(2, 3), [True, 2]), TypeError, "^pack: lengths .* got True"),
        (lambda: pack(torch.zeros(2, 3), np.array(3)), TypeError, "^pack: lengths .* got 3"),
        (lambda: cu_seqlens_of(torch.tensor(3)), TypeError, "^cu_seqlens_of: lengths .* got 3"),
        (lambda: pack(torch.zeros(1, 1).to_sparse(), [1]), TypeError, "x must be dense, got"),
        (lambda: unpack(torch.zeros(3)), TypeError, "^unpack: packed must be Packed, got Tensor"),
        (lambda: unpack(ONE._replace(max_seqlen=2**40)), ValueError, "max_seqlen must be in"),
        (lambda: unpack(ONE._replace(max_seqlen=True)), TypeError, "max_seqlen .*, got True"),
        (
            lambda: unpack(ONE._replace(tokens=torch.tensor(1))),
            ValueError,
            r"be \[T, ...\], got sc",
        ),
        (lambda: unpack(ONE, None), TypeError, "^unpack: fill must be a number, got None"),
        (lambda: unpack(ONE, 0.5), ValueError, "^unpack: fill .* of torch.int64, got 0.5"),
        (lambda: unpack(ONE, 1j), ValueError, "^unpack: fill .* of torch.int64, got 1j"),
        (lambda: unpack(ONE._replace(tokens=torch.zeros(1)), 1e39), ValueError, "float32, got 1e"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
