"""bench/meters/wire.py: bytes sent by gloo processes, by hand; open_clip's loss and ours."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from bench.meters.wire import wire_bytes
from clipa_kernels import ClipLoss

ROWS, WIDTH = 6, 8
N = 4 * ROWS * WIDTH  # bytes of a process's features


def open_clip_loss():
    """open_clip/loss.py alone, or None: importing all of open_clip takes seconds a process."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        return None
    path = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClipLoss


def sent(function, *arguments, **keywords):
    with wire_bytes() as wire:
        function(*arguments, **keywords)
    assert all(wire.calls.values())
    return wire.sent


def check_each_collective(rank, size):
    own = torch.ones(ROWS, WIDTH)
    parts = [torch.ones(ROWS, WIDTH) for _ in range(size)]
    whole = torch.ones(size * ROWS, WIDTH)
    last = size - 1
    assert sent(dist.all_gather_into_tensor, whole, own) == (size - 1) * N
    assert sent(dist.all_gather, parts, own) == (size - 1) * N
    assert sent(dist.all_reduce, whole) == 2 * (size - 1) * N
    assert sent(dist.reduce_scatter_tensor, own, whole) == (size - 1) * N
    assert sent(dist.all_to_all_single, torch.empty_like(whole), whole) == (size - 1) * N
    # Rank r keeps r + 1 of its rows and of everybody's: rank r gets r + 1 rows from each.
    splits = [to + 1 for to in range(size)]
    rows, received = torch.ones(sum(splits), WIDTH), torch.ones(size * (rank + 1), WIDTH)
    uneven = sent(dist.all_to_all_single, received, rows, [rank + 1] * size, splits)
    assert uneven == 4 * WIDTH * (sum(splits) - rank - 1)
    assert sent(dist.broadcast, own, 0) == (0 if rank == last else N)
    assert sent(dist.reduce, own, last) == (0 if rank == last else N)
    assert sent(dist.gather, own, parts if rank == 0 else None, 0) == (0 if rank == 0 else N)
    assert sent(dist.scatter, own, parts if rank == 0 else None, 0) == (
        (size - 1) * N if rank == 0 else 0
    )
    assert sent(dist.barrier) == 0


def check_point_to_point(rank, size):
    """A ring by batch_isend_irecv, and one message by isend and irecv."""
    own, received = torch.ones(ROWS, WIDTH), torch.empty(ROWS, WIDTH)
    after, before = (rank + 1) % size, (rank - 1) % size

    def ring():
        ops = [dist.P2POp(dist.isend, own, after), dist.P2POp(dist.irecv, received, before)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    def one():
        if rank < 2:
            (dist.irecv(received, 1) if rank == 0 else dist.isend(own, 0)).wait()

    assert sent(ring) == N
    assert sent(one) == (N if rank == 1 else 0)


def check_groups(rank, size):
    """A subgroup has its own size and ranks; the filter leaves out the other groups."""
    members = [0, size - 1]
    group = dist.new_group(members)
    own = torch.ones(ROWS, WIDTH)
    if rank in members:
        with wire_bytes(group) as wire:
            dist.all_reduce(own, group=group)
            dist.broadcast(own, members[1], group=group)
        assert wire.by_op == {"allreduce": N, "broadcast": 0 if rank == 0 else N}
    with wire_bytes(group if rank in members else None) as wire:
        dist.all_reduce(own)
    assert wire.calls == ({} if rank in members else {"allreduce": 1})


def check_unknown(rank, size):
    from torch.distributed._functional_collectives import all_reduce

    with wire_bytes(), pytest.raises(NotImplementedError, match="must be those of torch.dist"):
        all_reduce(torch.ones(1), "sum", dist.group.WORLD)


def check_losses(rank, size):
    """open_clip gathers two towers and scatters their gradients; ours one, and column sums."""
    features = [
        F.normalize(torch.randn(ROWS, WIDTH), dim=-1).requires_grad_() for _ in ("image", "text")
    ]
    scale = torch.tensor(10.0, requires_grad=True)
    theirs = open_clip_loss()
    if theirs is not None:
        loss = theirs(local_loss=True, gather_with_grad=True, rank=rank, world_size=size)
        with wire_bytes() as wire:
            loss(*features, scale).backward()
        each = 2 * (size - 1) * N  # of two towers
        assert wire.by_op == {"allgather": each, "scatter": each}
        assert wire.calls == {"allgather": 2, "scatter": 2 * size}
    with wire_bytes() as wire:
        ClipLoss(rank=rank, world_size=size)(*features, scale).backward()
    assert wire.by_op == {
        # the text's features, (shift, sum) of the own columns, and what must be alike: four int64
        "allgather_base": (size - 1) * (N + 8 * ROWS + 32),
        # (shift, sum) of each column, and the gradients of the text
        "alltoall_base": (size - 1) * (8 * ROWS + N),
        # the loss
        "allreduce": 2 * (size - 1) * 4 // size,
    }


def work(rank, size, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    check_each_collective(rank, size)
    check_point_to_point(rank, size)
    check_groups(rank, size)
    check_unknown(rank, size)
    check_losses(rank, size)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_processes(size, tmp_path):
    mp.get_context("forkserver").set_forkserver_preload(["torch", "clipa_kernels"])
    mp.start_processes(work, (size, tmp_path / "store"), nprocs=size, start_method="forkserver")
