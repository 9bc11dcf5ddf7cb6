"""A model whose weights, gradients and moments lie in parts on the processes, by FSDP2.

Files hold whole tensors, whatever the parts were: `whole` gathers one at a time, and `placed` has
each process read its own part, so a checkpoint fits any number of processes and any kind of parts.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from models import CLIP

from .distributed import World


def shard(model: CLIP, world: World, kind: str, wire: torch.dtype = torch.float32) -> None:
    """Cut a model in place, each tensor by its rows; the optimiser is made after it.

    Args:
        model: the same on all processes.
        world: one process alone keeps all.
        kind: "none" leaves the model as it is; "optimizer" gathers the weights in the forward and
            lets them go in the backward; "full" lets a block's go after its forward, and gathers
            them again. In both a gradient is summed as it is made, and only its part is kept.
        wire: dtype in which gradients travel and are summed.
    """
    if kind == "none" or world.size == 1:
        return
    how = dict(mesh=init_device_mesh(world.device.type, (world.size,)))
    how |= dict(mp_policy=MixedPrecisionPolicy(reduce_dtype=wire))

    def average(scalar: Tensor) -> None:
        scalar.grad.copy_(world.mean(scalar.grad))

    scalars = {parameter for parameter in model.parameters() if not parameter.dim()}
    for scalar in scalars:  # which FSDP2 does not cut
        scalar.register_post_accumulate_grad_hook(average)
    for block in blocks(model):
        fully_shard(block, **how, reshard_after_forward=kind == "full")
    fully_shard(model, **how, reshard_after_forward=False, ignored_params=scalars)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gloo takes a mean for a sum in torch 2.8
            module.set_force_sum_reduction_for_comms(True)


def blocks(model: CLIP) -> list[nn.Module]:
    """The blocks of both towers."""
    return [*model.visual.transformer.resblocks, *model.transformer.resblocks]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor in parts as one, on the CPU of rank 0 alone, as `on_host`; others as they are.

    Every process must call it; those that are not rank 0 get an empty one.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.detach().full_tensor()
    return on_host(full) if tensor.device_mesh.get_rank() == 0 else full.new_empty(0)


def on_host(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory that later steps do not change; a pinned one is its own copy.

    From a GPU it is pinned, and whole only when what the stream was given so far is done: the
    process does not wait for it.
    """
    if tensor.device.type == "cuda":
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return copy.copy_(tensor.detach(), non_blocking=True)
    if tensor.device.type == "cpu" and tensor.is_pinned():
        return tensor
    return tensor.detach().to("cpu", copy=True)


def placed(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, if `like` lies in parts; reads no other rows."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    mesh = like.device_mesh
    parts = value.chunk(mesh.size())
    own = parts[mesh.get_rank()] if mesh.get_rank() < len(parts) else value[:0]
    how = dict(run_check=False, shape=like.shape, stride=like.stride())
    return DTensor.from_local(own.to(like.device), mesh, like.placements, **how)


def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """load_state_dict of whole tensors, into a model whose own may lie in parts."""
    own = model.state_dict()
    model.load_state_dict({n: placed(v, own[n]) if n in own else v for n, v in weights.items()})


@torch.no_grad()
def unsharded(model: CLIP, make: Callable[[], CLIP]) -> CLIP:
    """The model in full on every process: itself, or a new one. Every process must call it.

    Args:
        make: gives a model of the same sizes.
    """
    if not isinstance(model, FSDPModule):
        return model
    full = make()
    own = full.state_dict()
    for name, tensor in model.state_dict().items():  # one at a time
        own[name].copy_(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
    return full
