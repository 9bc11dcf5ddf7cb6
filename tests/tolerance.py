"""max|actual - exact| <= 2 * (max|baseline - exact| + eps * max|exact|), and all finite."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def check_close(name: str, actual: Tensor, exact: Tensor, baseline: Tensor) -> None:
    """exact: the reference in fp64; baseline: the reference in the dtype of actual."""
    assert actual.dtype == baseline.dtype, f"{name}: {actual.dtype} is not {baseline.dtype}"
    assert actual.shape == exact.shape, f"{name}: {actual.shape} is not {exact.shape}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    if not actual.numel():
        return
    error = (actual.double() - exact.double()).abs().max().item()
    own = (baseline.double() - exact.double()).abs().max().item()
    allowed = 2 * (own + torch.finfo(actual.dtype).eps * exact.double().abs().max().item())
    assert error <= allowed, f"{name}: error {error:.3e} above {allowed:.3e}"


def check_op(
    function: Callable,
    reference: Callable,
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    grads: Sequence[str] | None = None,
) -> None:
    """Outputs and every gradient of function(**inputs) against the reference in fp64.

    inputs: floating tensors are rounded to dtype first, so both sides see the same numbers.
    grads: names to differentiate; None is every floating tensor.
    """

    def run(f: Callable, to: torch.dtype) -> dict[str, Tensor]:
        leaves = {}
        for name, t in inputs.items():
            floating = isinstance(t, Tensor) and t.is_floating_point()
            leaves[name] = t.to(dtype).to(to).detach().clone() if floating else t
            if floating and (grads is None or name in grads):
                leaves[name].requires_grad_()
        out = f(**leaves)
        outs = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(7)
        weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outs]
        total = sum((o.double() * w).sum() for o, w in zip(outs, weights, strict=True))
        if total.requires_grad:
            total.backward()
        values = {f"output {i}": o.detach() for i, o in enumerate(outs)}
        for name, t in leaves.items():
            if isinstance(t, Tensor) and t.requires_grad:
                values[f"gradient of {name}"] = t.grad
        return values

    actual, exact = run(function, dtype), run(reference, torch.float64)
    baseline = run(reference, dtype)
    assert actual.keys() == exact.keys()
    for name in exact:
        check_close(name, actual[name], exact[name], baseline[name])
