"""A contrastive batch in parts: the memory of one part, the negatives of all.

    features of every part without a graph -> the loss, once -> each part again, with its gradients

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Peak Memory Setup"
(arXiv:2101.06983). Plain accumulation of the parts' losses would see the negatives of one part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP's (`module`) and torch.compile's (`_orig_mod`) wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def accumulated(
    encode: Callable[..., Mapping[str, Tensor]],
    parts: Sequence[tuple],
    loss: Callable[[dict[str, Tensor]], Tensor],
    *,
    frozen: Collection[str] = (),
    modules: Sequence[nn.Module] = (),
) -> tuple[dict[str, Tensor], Tensor]:
    """Forward and backward of a batch in parts; equals `loss(encode(*whole)).backward()`.

    Gradients are added to the parameters' `.grad`, as by backward. What encode draws from torch's
    generators, as dropout does, is drawn again alike in the second pass.

    Args:
        encode: gives, of one part, a dict of tensors. Those of two dimensions and more hold a row
            a sample and are joined over the parts; others, as logit_scale and logit_bias, are the
            same in each. An open_clip CLIP with output_dict=True, or any function of two encoders.
        parts: arguments of encode, one tuple a part; masks of tokens belong to them.
        loss: gives, of the dict of the whole batch, a scalar. Called once.
        frozen: names of outputs to which no gradient flows, as of a locked tower.
        modules: DistributedDataParallel modules that encode calls, if it is not one itself: their
            gradients are exchanged in the last part alone.
    Returns:
        (the outputs of the whole batch, the loss).
    Raises:
        ValueError: there is no part, or an output of frozen does not exist.
        TypeError: encode gives something else than a dict of tensors.

    >>> import torch
    >>> from clipa_kernels import ClipLoss
    >>> left, right = torch.nn.Linear(4, 8), torch.nn.Linear(6, 8)
    >>> def encode(x, y):
    ...     return {"image_features": left(x), "text_features": right(y)}
    >>> halves = [(torch.randn(3, 4), torch.randn(3, 6)) for _ in range(2)]
    >>> out, loss = accumulated(encode, halves, lambda out: ClipLoss()(**out, logit_scale=1.0))
    >>> out["image_features"].shape, left.weight.grad.shape
    (torch.Size([6, 8]), torch.Size([8, 4]))
    """
    if not parts:
        raise ValueError("accumulated: parts must hold at least one, got none")
    bare = unwrap(encode) if isinstance(encode, nn.Module) else encode
    outs, states = [], []
    with torch.no_grad():
        for part in parts:
            states.append((torch.get_rng_state(), *get_device_states(*part)))
            outs.append(_checked(bare(*part)))
    whole, sizes = {}, {}
    for name, value in outs[-1].items():
        if value.dim() > 1:
            sizes[name] = [len(out[name]) for out in outs]
            value = torch.cat([out[name] for out in outs])
        whole[name] = value.detach().requires_grad_(name not in frozen)
    if unknown := set(frozen) - whole.keys():
        came = f"{', '.join(sorted(unknown))} of {', '.join(whole)}"
        raise ValueError(f"accumulated: frozen must name outputs of encode, got {came}")
    total = loss(whole)
    total.backward()
    shares = {n: whole[n].grad.split(s) for n, s in sizes.items() if whole[n].grad is not None}
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        for module in (encode, *modules):
            if isinstance(module, DistributedDataParallel):
                module.require_backward_grad_sync = last
        with _drawing_from(*states[index]):
            out = encode(*part)
        grads = {name: share[index] for name, share in shares.items()}
        for name in out.keys() - sizes.keys():  # shared by the parts: once
            if whole[name].grad is not None:
                grads[name] = whole[name].grad if last else torch.zeros_like(whole[name])
        grads = {name: grad for name, grad in grads.items() if out[name].requires_grad}
        torch.autograd.backward([out[name] for name in grads], list(grads.values()))
    return whole, total


def _checked(out: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not isinstance(out, Mapping) or not all(isinstance(v, Tensor) for v in out.values()):
        came = type(out).__name__
        raise TypeError(f"accumulated: encode must give a dict of tensors, got {came}")
    return out


@contextmanager
def _drawing_from(state: Tensor, devices: list[int], states: list[Tensor]):
    """torch's generators as they were; after the block as before it."""
    with torch.random.fork_rng(devices):
        torch.set_rng_state(state)
        set_device_states(devices, states)
        yield
