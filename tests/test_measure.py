"""bench/measure.py: what is wrong is not timed."""

import pytest
import torch

from bench.measure import check_and_time, error


@pytest.mark.parametrize(
    ("function", "off"),
    [
        (lambda x, n: x.square() * n, 0.0),
        (lambda x, n: x.square() * n * 1.25, 0.25),
        (lambda x, n: (1.5 * x.square() - 0.5 * x.square().detach()) * n, 0.5),
    ],
    ids=["right", "value", "gradient"],
)
def test_error_of_values_and_gradients(function, off):
    leaves = [torch.randn(50, requires_grad=True), torch.tensor(3)]
    d_out = torch.randn(50)
    assert error(function, lambda x, n: x.square() * n, leaves, d_out) == pytest.approx(
        off, abs=1e-6
    )
    if off:
        with pytest.raises(AssertionError, match="wrong by"):
            check_and_time(None, function, lambda x, n: x.square() * n, leaves, 8, 0.2)
