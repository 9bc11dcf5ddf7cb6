"""PatchDropout takes the arguments of open_clip's and timm's, and keeps as many tokens."""

import pytest
import torch

from clipa_kernels import PatchDropout, keep_count


@pytest.mark.parametrize(
    ("module", "prefix"),
    [
        (PatchDropout(0.6), 1),
        (PatchDropout(0.6, False), 0),
        (PatchDropout(0.6, exclude_first_token=True), 1),
        (PatchDropout(0.6, 3), 3),
        (PatchDropout(prob=0.6, num_prefix_tokens=2, ordered=True), 2),
    ],
    ids=["default", "open_clip", "open_clip-named", "timm", "timm-named"],
)
def test_prefix_stays_and_the_rest_is_a_subset(module, prefix):
    x = torch.arange(20.0).view(1, 20, 1).repeat(4, 1, 3).requires_grad_()
    y = module(x)
    kept = keep_count(20 - prefix, 0.6)
    assert y.shape == (4, prefix + kept, 3)
    assert torch.equal(y[:, :prefix], x[:, :prefix])
    rows = y[:, prefix:, 0]
    assert (rows.diff(dim=1) > 0).all() and (rows >= prefix).all()
    y.sum().backward()
    assert x.grad.sum() == y.numel() and x.grad.max() == 1


def test_calls_draw_anew_and_a_seed_repeats_them():
    x = torch.randn(8, 30, 2)
    first, second = PatchDropout(0.5, seed=1), PatchDropout(0.5, seed=1)
    a, b = first(x), first(x)
    assert not torch.equal(a, b)
    assert torch.equal(second(x), a) and torch.equal(second(x), b)


def test_evaluation_and_zero_keep_all():
    x = torch.randn(2, 5, 4)
    assert PatchDropout(0.5).eval()(x) is x and PatchDropout(0.0)(x) is x


def test_bad_prob_is_named():
    with pytest.raises(ValueError, match=r"PatchDropout: prob must be in \[0, 1\), got 1.0"):
        PatchDropout(1.0)
