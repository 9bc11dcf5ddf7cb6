"""The losses over process groups: 1 to 4 gloo processes, against one process and open_clip."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from bench.meters.wire import wire_bytes
from clipa_kernels import (
    ClipLoss,
    SigLipLoss,
    contrastive_loss,
    sigmoid_loss,
)
from clipa_kernels.contrastive import distributed, plain

FUNCTIONS = {"contrastive": contrastive_loss, "sigmoid": sigmoid_loss}


def open_clip_loss():
    """open_clip/loss.py alone, or None: importing all of open_clip takes seconds a process."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        return None
    path = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batch(rows, dtype=torch.float32, scale=20.0, width=12):
    generator = torch.Generator().manual_seed(rows)
    image, text = (F.normalize(torch.randn(rows, width, generator=generator), dim=-1) for _ in "ab")
    scalars = torch.tensor(scale), torch.tensor(-4.0)
    return [value.to(dtype).requires_grad_() for value in (image, text, *scalars)]


def own_leaves(values, rank, rows):
    cut = [value.detach()[rank * rows : (rank + 1) * rows].clone() for value in values[:2]]
    return [value.requires_grad_() for value in (*cut, *(v.detach().clone() for v in values[2:]))]


def graded(function, inputs, factor=1.0):
    loss = function(*inputs)
    return loss.detach(), *torch.autograd.grad(loss * factor, inputs, materialize_grads=True)


def mean(value, group):
    value = value.detach().clone()
    dist.all_reduce(value, group=group)
    return value / dist.get_world_size(group)


def close(mine, true, what):
    torch.testing.assert_close(
        mine, true.to(mine.dtype), rtol=1e-4, atol=2e-6, msg=lambda m: f"{what}: {m}"
    )


def check_against_one_process(group, rows, kernels=False, **how):
    """Under DDP's mean, the loss and all gradients are those of the whole batch on one process."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    impls = ("torch", "triton", "reference") if kernels else ("torch", "reference")
    for (name, function), impl in itertools.product(FUNCTIONS.items(), impls):
        whole = batch(rows * size, **how)
        what = f"{name} {impl} rank {rank} of {size}, {rows} rows {how}"
        loss, *grads = graded(function, whole)
        inputs = own_leaves(whole, rank, rows)
        mine = graded(lambda *a, f=function, i=impl: f(*a, group=group, impl=i), inputs)
        close(mean(mine[0], group), loss, what)
        own = slice(rank * rows, (rank + 1) * rows)
        close(mine[1] / size, grads[0][own], what + " image")
        close(mine[2] / size, grads[1][own], what + " text")
        close(mean(mine[3], group), grads[2], what + " scale")
        close(mean(mine[4], group), grads[3], what + " bias")
        again = graded(lambda *a, f=function, i=impl: f(*a, group=group, impl=i), inputs)
        assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True)), what


def check_options(group, rows):
    """bf16 features, a locked tower, and a gradient that differs by process."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    whole = batch(rows * size)
    for name, function in FUNCTIONS.items():

        def over_group(*inputs, f=function, impl="auto"):
            return f(*inputs, group=group, impl=impl)

        inputs = own_leaves(whole, rank, rows)
        full = graded(over_group, inputs)
        half = over_group(inputs[0], inputs[1].detach(), *inputs[2:])
        close(torch.autograd.grad(half, inputs[0])[0], full[1], name + " locked text")
        half = over_group(inputs[0].detach(), *inputs[1:])
        close(torch.autograd.grad(half, inputs[1])[0], full[2], name + " locked image")
        uneven = graded(over_group, inputs, 1.0 + rank)
        expected = graded(lambda *a: over_group(*a, impl="reference"), inputs, 1.0 + rank)
        close(uneven[1], expected[1], name + " uneven image")
        close(uneven[2], expected[2], name + " uneven text")
        low = [v.detach().bfloat16().requires_grad_() for v in inputs[:2]]
        loss, d_image, d_text, *_ = graded(over_group, [*low, *inputs[2:]])
        assert (loss.dtype, d_image.dtype, d_text.dtype) == (torch.float32, *[torch.bfloat16] * 2)
        torch.testing.assert_close(loss, full[0], rtol=1e-2, atol=1e-2)


def check_second_derivative(rank, size, rows):
    """The reference's is that of the whole batch on one process; the others raise on all."""
    whole = batch(rows * size, dtype=torch.float64)
    own = slice(rank * rows, (rank + 1) * rows)

    def penalty(function, inputs, factor):
        first = torch.autograd.grad(function(*inputs), inputs[:2], create_graph=True)
        return sum((factor * gradient).square().sum() for gradient in first)

    for name, function in FUNCTIONS.items():
        for impl in ("reference", "torch"):
            inputs = own_leaves(whole, rank, rows)

            def over_group(*values, f=function, i=impl):
                return f(*values, group=dist.group.WORLD, impl=i)

            mine = penalty(over_group, inputs, 1 / size)
            if impl == "torch":
                says = f"{name}_loss: a second derivative needs"
                for leaf in inputs[:3]:  # one at a time: each is led to
                    total = over_group(*inputs) + mine
                    expect(RuntimeError, says, torch.autograd.grad, total, leaf, retain_graph=True)
                continue
            true = torch.autograd.grad(
                penalty(lambda *v, f=function: f(*v, impl="reference"), whole, 1.0), whole[:2]
            )
            for got, wanted in zip(torch.autograd.grad(mine, inputs[:2]), true, strict=True):
                close(got, wanted[own], f"{name} second derivative rank {rank} of {size}")


def check_wire(rank, size, rows):
    """Half the bytes of open_clip's loss, which gathers both towers with their gradients."""
    theirs = open_clip_loss()
    if theirs is None or size == 1:
        return
    options = dict(local_loss=True, gather_with_grad=True, rank=rank, world_size=size)
    for dtype in (torch.float32, torch.bfloat16):
        sent = []
        for module in (ClipLoss, theirs.ClipLoss):
            inputs = own_leaves(batch(rows * size, width=512), rank, rows)[:3]
            inputs[:2] = [t.detach().to(dtype).requires_grad_() for t in inputs[:2]]
            with wire_bytes() as wire:
                module(**options)(*inputs[:2], inputs[2].to(dtype)).backward()
            sent.append(wire.sent)
        assert sent[0] <= 0.52 * sent[1], (dtype, sent)


def check_modules(rank, size, rows):
    """Loss and gradients on each process are those of open_clip's modules."""
    theirs = open_clip_loss()
    if theirs is None or size == 1:
        return
    whole = batch(rows * size)
    cases = [
        (ClipLoss, dict(local_loss=local, gather_with_grad=grad))
        for local, grad in itertools.product((True, False), repeat=2)
    ] + [(SigLipLoss, dict(dist_impl=impl)) for impl in (None, "shift", "reduce", "gather")]
    for module, options in cases:
        what = f"{module.__name__} {options} rank {rank} of {size}"
        inputs = own_leaves(whole, rank, rows)
        mine = graded(module(rank=rank, world_size=size, **options), inputs)
        their_module = getattr(theirs, module.__name__)(rank=rank, world_size=size, **options)
        true = graded(their_module, inputs)
        for index, name in enumerate(("loss", "image", "text")):
            close(mine[index], true[index], f"{what} {name}")
        for index, name in ((3, "scale"), (4, "bias")):
            mean_of = [mean(values[index], dist.group.WORLD) for values in (mine, true)]
            close(*mean_of, f"{what} {name}")


def check_subclass(rank, size, rows):
    """The loss in full, one process's texts after the other's, is that of the tiles."""

    class Same(SigLipLoss):
        def get_logits(self, *args, **kwargs):
            return super().get_logits(*args, **kwargs)

    inputs = own_leaves(batch(rows * size), rank, rows)
    how = dict(rank=rank, world_size=size)
    for mine, true in zip(
        graded(Same(**how), inputs), graded(SigLipLoss(**how), inputs), strict=True
    ):
        close(mine, true, f"subclass rank {rank} of {size}")


def expect(error, says, function, *inputs, **how):
    with pytest.raises(error, match=says):
        function(*inputs, **how)


def check_errors(rank, size, rows):
    """Every process raises, in words, and none waits."""
    if size == 1:
        return
    image, text, scale, _ = own_leaves(batch(rows * size), rank, rows)
    last = rank == size - 1
    for name, function in FUNCTIONS.items():
        how = dict(group=dist.group.WORLD)
        shorter = [t[1:] if last else t for t in (image, text)]
        says = (
            f"{name}_loss: .* one size, got {rows - 1}x12 on rank {size - 1}, {rows}x12 on rank 0"
        )
        expect(ValueError, says, function, *shorter, scale, **how)
        narrow = [t[:, 1:] if last else t for t in (image, text)]
        expect(ValueError, f"got {rows}x11 on rank {size - 1}, ", function, *narrow, scale, **how)
        half = [t.half() if last else t for t in (image, text)]
        says = f"of one dtype, got torch.float16 on rank {size - 1}, torch.float32 on rank 0"
        expect(ValueError, says, function, *half, scale, **how)
        impls = dict(how, impl="reference" if last else "torch")
        says = f"compute by one impl, got reference on rank {size - 1}, torch on rank 0"
        expect(ValueError, says, function, image, text, scale, **impls)
        impls = dict(how, impl="unknown" if last else "torch")
        error, says = (ValueError, "impl must be") if last else (RuntimeError, f"rank {size - 1}")
        expect(error, says, function, image, text, scale, **impls)
        none = [t[:0] if last else t for t in (image, text)]
        says = f"got 0x12 on rank {size - 1}, {rows}x12 on rank 0"
        expect(ValueError, says, function, *none, scale, **how)
        error, says = (
            (TypeError, "must have one dtype") if last else (RuntimeError, f"rank {size - 1}")
        )
        expect(error, says, function, image, text.double() if last else text, scale, **how)
        part = dist.new_group([0])
        if rank == 0:
            function(image, text, scale, group=part)
            dist.destroy_process_group(part)
            expect(RuntimeError, "must be alive", function, image, text, scale, group=part)
        else:
            expect(RuntimeError, "must be in the group", function, image, text, scale, group=part)
    for module in (ClipLoss, SigLipLoss):
        wrong = module(rank=rank, world_size=size + 1)
        expect(RuntimeError, "rank and world_size must be the default", wrong, image, text, scale)


def work(rank, size, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    check_against_one_process(dist.group.WORLD, 5)
    check_against_one_process(dist.group.WORLD, 1)
    check_against_one_process(dist.group.WORLD, 6, dtype=torch.float64, scale=300.0)
    check_options(dist.group.WORLD, 4)
    check_modules(rank, size, 6)
    check_errors(rank, size, 3)
    check_subclass(rank, size, 4)
    check_second_derivative(rank, size, 4)
    check_wire(rank, size, 20)
    if size == 4:
        for members in ([1, 3], [0, 2, 3]):
            group = dist.new_group(members)
            if rank in members:
                check_against_one_process(group, 3)
    plain._CPU_STRIP = 16 * 16
    distributed._CHUNK_ROWS = 10  # three chunks
    check_against_one_process(dist.group.WORLD, 37, kernels=True)
    check_options(dist.group.WORLD, 31)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_processes_with_torch_and_triton(size, tmp_path):
    mp.get_context("forkserver").set_forkserver_preload(["torch", "clipa_kernels"])
    arguments = (size, tmp_path / "store")
    mp.start_processes(work, arguments, nprocs=size, start_method="forkserver")
