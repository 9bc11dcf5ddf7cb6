"""The processes of a run: who am I, where are my tensors, and the few words they exchange."""

import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from clipa_kernels.check import choose_impl
from models import CLIP

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those that train together; one process needs no group.

    Attributes:
        rank: of this process, 0 to size - 1.
        local_rank: of this process on its machine; picks the GPU.
        size: processes in all.
        device: where this process computes.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes: rank 0 alone."""
        return self.rank == 0

    def print(self, *words: object) -> None:
        """Print on rank 0 only, at once."""
        if self.is_main:
            print(*words, flush=True)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; every process must ask.

        The exchange runs over gloo on the CPU, so it does not wait for the GPU's work.
        """
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on every process; the argument stays as it is."""
        value = value.clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes, on every process."""
        return self.sum(value) / self.size

    def decide(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every process; where it raises, all processes end.

        Args:
            make: gives what pickles; its ValueError, OSError or RuntimeError is told once.
        """
        made, error = None, None
        if self.is_main:
            try:
                made = make()
            except (ValueError, OSError, RuntimeError) as caught:
                error = caught
        if self.size > 1:
            box = [(made, error is None)]
            dist.broadcast_object_list(box, device=torch.device("cpu"))  # by gloo
            made, good = box[0]
            if not good and not self.is_main:
                raise self.left()
        if error is not None:
            raise error
        return made

    def left(self) -> SystemExit:
        """What a process raises as another met an error, which that one tells."""
        return SystemExit(f"rank {self.rank} ends: another process met an error, and tells it")

    def together(self, make: Callable[[], T]) -> T:
        """What this process makes; where any raises ValueError, OSError, RuntimeError, all end."""
        made, error = None, None
        try:
            made = make()
        except (ValueError, OSError, RuntimeError, SystemExit) as caught:
            error = caught  # SystemExit: another process's error, already told
        if self.any(error is not None):
            raise error or self.left()
        return made

    def share(self, count: int, make: Callable[[int], T]) -> list[T]:
        """make(0), ... make(count - 1), in order, on every process; each makes every size-th.

        Args:
            make: gives what pickles; what it raises on one process ends all.

        Raises:
            ValueError: processes came with different counts.
        """
        own, error = [], None
        try:
            own = [make(number) for number in range(self.rank, count, self.size)]
        except (ValueError, OSError, RuntimeError) as caught:
            error = caught
        if self.size > 1:
            shares: list = [None] * self.size
            dist.all_gather_object(shares, (count, own, error is None))
            if error is None and not all(good for _, _, good in shares):
                raise self.left()
        if error is not None:
            raise error
        if self.size == 1:
            return own
        counts = [other for other, _, _ in shares]
        if len(set(counts)) > 1:
            raise ValueError(f"ranks: every process must come with the same number, got {counts}")
        return [shares[number % self.size][1][number // self.size] for number in range(count)]

    def require_same(self, values: Mapping[str, object]) -> None:
        """ValueError on every process unless each came with rank 0's values; says what differs.

        Args:
            values: by what a sentence calls them.
        """
        if self.size == 1:
            return
        told = {name: str(value) for name, value in values.items()}
        everyone: list[dict[str, str]] = [{} for _ in range(self.size)]
        dist.all_gather_object(everyone, told)
        for rank, theirs in enumerate(everyone):
            for name in dict.fromkeys([*everyone[0], *theirs]):
                first, other = everyone[0].get(name, "none"), theirs.get(name, "none")
                if first != other:
                    raise ValueError(
                        f"ranks: {name} must be rank 0's {first} on every process, "
                        f"got {other} on rank {rank}"
                    )

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


class Alarm:
    """Ends a process whose steps no longer end, while several train: another is lost or stopped.

    A call of a process group cannot be interrupted from Python, torch 2.8 changes no time-out of
    gloo, and NCCL's ends without a sentence; so a thread says one and ends the process. It counts
    its own wakings, not the clock: a job that was suspended as a whole goes on.

    Args:
        world: one process alone has no alarm.
        seconds: that a step may take, once set.
    """

    def __init__(self, world: World, seconds: float) -> None:
        self._world, self._seconds = world, seconds
        self._done: int | None = None  # steps; None: at rest
        if world.size > 1:
            threading.Thread(target=self._watch, daemon=True).start()

    def set(self, done: int) -> None:
        """After a step: the next one must end in time. After a rest all processes meet first."""
        if self._done is None:
            self._world.any(False)
        self._done = done

    def rest(self) -> None:
        """Processes may wait long for each other again: at a save, an evaluation, a start."""
        self._done = None

    def _watch(self) -> None:
        tick, seen, waited = min(1.0, self._seconds / 10), None, 0.0
        while waited < self._seconds:
            time.sleep(tick)
            done = self._done
            waited = 0.0 if done is None or done != seen else waited + tick
            seen = done
        came = f"no end of the step after {seen} in {self._seconds:g} s (--run.step-timeout)"
        _die(f"processes must answer each other, got {came}")


def _die(words: str) -> None:
    """End this process from a thread, whatever the others wait for."""
    sys.stdout.flush()
    print(f"{Path(sys.argv[0]).name}: {words}", file=sys.stderr, flush=True)
    os._exit(1)


def setup(device: str = "auto", *, threads: int = 0, timeout: float = 1800.0) -> World:
    """Join the processes that torchrun or srun started, or be the only one.

    Reads RANK, LOCAL_RANK and WORLD_SIZE (torchrun), or SLURM_PROCID, SLURM_LOCALID and
    SLURM_NTASKS (srun; the job's first host is the meeting point unless MASTER_ADDR is set).

    Args:
        device: "auto" (cuda where there is one, else cpu) or a torch device; each process takes the
            GPU of its local rank.
        threads: CPU threads of torch; 0 leaves them as they are.
        timeout: seconds a process waits for the others.

    Returns:
        The World; call its `close` at the end.

    Raises:
        ValueError: a device that torch does not know; a rank outside the world; threads below 0.
        RuntimeError: a device that this machine lacks; processes that do not meet.
    """
    if threads < 0:
        raise ValueError(f"setup: threads must be at least 0, got {threads}")
    if threads:
        torch.set_num_threads(threads)
    rank, local_rank, size = _ranks(os.environ)
    where = _device(device, local_rank, size)
    if size > 1:
        cuda = where.type == "cuda"
        # A stranger at the port may take a connection and never answer.
        late = f"setup: {size} processes must meet, got no answer in {timeout:g} s"
        timer = threading.Timer(timeout + 2, _die, [late])
        timer.daemon = True
        timer.start()
        try:
            dist.init_process_group(
                backend="cuda:nccl,cpu:gloo" if cuda else "gloo",
                store=_meet(rank, size, timeout),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout),
                device_id=where if cuda else None,
            )
        except RuntimeError as error:
            raise RuntimeError(f"setup: {size} processes must meet, got {error}") from error
        finally:
            timer.cancel()
    return World(rank, local_rank, size, where)


def _meet(rank: int, size: int, timeout: float) -> dist.Store:
    """A store that holds words of these processes alone.

    torchrun keeps one store over its restarts, which has the addresses of processes that died. So
    each process brings a name that nobody had, and rank 0 answers to each with its own.
    """
    store, _, _ = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout)))
    own, began = uuid.uuid4().hex, time.monotonic()
    if rank:
        store.set(f"name of {rank}", own)
        start = store.get(f"answer to {own}").decode()  # waits for it
        store.set(f"{start}: {rank} is here", "")
        return dist.PrefixStore(start, store)
    away = list(range(1, size))
    while away := [other for other in away if not store.check([f"{own}: {other} is here"])]:
        for other in away:
            if store.check([f"name of {other}"]):  # perhaps of one that died
                store.set("answer to " + store.get(f"name of {other}").decode(), own)
        if time.monotonic() - began > timeout:
            raise RuntimeError(f"none of rank {away[0]} in {timeout:g} s")
        time.sleep(0.02)
    return dist.PrefixStore(own, store)


def world_size() -> int:
    """How many processes `setup` will join; known before it does."""
    return _ranks(os.environ)[2]


WIRES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # in which gradients travel

# Graphs of a block that torch keeps: of two towers, each the last block and the others, in training
# and in evaluation.
_GRAPHS = 32


def wrap(
    model: CLIP, world: World, compiled: bool = False, wire: torch.dtype = torch.float32
) -> nn.Module:
    """The model as the loop calls it: its blocks compiled if asked, under DDP where there are
    processes and it does not lie in parts. DDP's gradients travel in the dtype `wire`.

    A tower's blocks share a graph, for any number of tokens; the last has its own where pooling
    reads few rows of it. What lies between them, DDP's exchange of gradients among it, stays as it
    is.
    """
    if compiled:
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, _GRAPHS)
        for tower in (model.visual.transformer, model.transformer):
            for block in tower.resblocks:
                block.branches = torch.compile(block.branches, dynamic=True)
    if world.size == 1 or isinstance(model, FSDPModule):
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    if wire == torch.bfloat16:
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def _ranks(env: os._Environ | dict[str, str]) -> tuple[int, int, int]:
    """(rank, local rank, size) from the environment; SLURM's meeting point is filled in."""
    if "WORLD_SIZE" in env and "RANK" in env:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    elif "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
        hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
        env.setdefault("MASTER_ADDR", first_host(hosts))
        env.setdefault("MASTER_PORT", str(20_000 + int(env.get("SLURM_JOB_ID", "0")) % 20_000))
    else:
        return 0, 0, 1
    rank, local_rank, size = (int(env.get(name, "0")) for name in names)
    if not 0 <= rank < size:
        raise ValueError(f"setup: {names[0]} must be below {names[2]}, got {rank} of {size}")
    return rank, local_rank, size


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list.

    >>> first_host("gpu[007-012,020],cpu1")
    'gpu007'
    """
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodelist)
    if not match:
        raise ValueError(f"first_host: nodelist must name a host, got {nodelist!r}")
    return "".join(part or "" for part in match.groups())


def _device(name: str, local_rank: int, size: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        known = 'be "auto", "cpu", "cuda" or another device of torch'
        raise ValueError(f"setup: device must {known}, got {name!r}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"setup: device {name} needs a GPU that torch can use, got none")
        count = torch.cuda.device_count()
        index = local_rank if size > 1 or device.index is None else device.index
        if size > 1 and count == 1:  # SLURM can show each process its own GPU alone
            index = 0
        if index >= count:
            raise RuntimeError(f"setup: GPU {index} must be among those here, got {count} GPUs")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    try:
        torch.zeros(1, device=device).cpu()  # not on "meta", nor on hardware that is not here
    except Exception as error:  # each backend has its own
        reason = str(error).partition(". ")[0]
        raise RuntimeError(f"setup: device {name} must be one that works, got {reason}") from error
    return device


def exchange_seconds(model: nn.Module, world: World, wire: torch.dtype) -> float:
    """What the sum of all gradients over the processes takes when nothing else runs.

    Every process must call it. Measured on a part of at most 32 MB, after one to warm up.
    """
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    part = torch.zeros(min(count, 2**25 // wire.itemsize), dtype=wire, device=world.device)
    for _ in range(2):
        world.any(False)  # all begin together
        began = time.perf_counter()
        dist.all_reduce(part)
        part[:1].cpu()  # waits for the device
        seconds = time.perf_counter() - began
    return seconds * count / max(1, len(part))


def check_impl(impl: str, device: torch.device) -> None:
    """RuntimeError unless the fused operations can run so on a device."""
    choose_impl("train", impl, ("triton", "torch", "reference"), torch.empty(0, device=device))


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the model's products: bfloat16 under autocast, or float32 without it.

    Args:
        precision: "fp32", "bf16", or "auto": bf16 where the processor multiplies it in hardware.
        device: where the model computes.

    Raises:
        ValueError: another precision.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"autocast_dtype: precision must be auto, fp32 or bf16, got {precision!r}")
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            asked = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # torch's own question
            fast = device.type == "cpu" and asked()
        precision = "bf16" if fast else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32
