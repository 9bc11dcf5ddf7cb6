"""Batches, and the order of samples: pure functions of (seed, step).

Rank r of W takes rows [r G / W, (r + 1) G / W) of the global batch of G, and whatever is drawn for
a row (crop, colour, caption, masks) is keyed by its place in the global batch: W processes see what
one would. A run that starts at step k sees what a run from step 0 sees from there on.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipa_kernels import philox_bits
from clipa_kernels.masking.philox import ORDER_STREAM, TURN_STREAM


class Fault(NamedTuple):
    """Samples that could not be read, of one kind: how many, and which was first and why."""

    count: int
    first: str


def add_faults(one: dict[str, Fault], other: dict[str, Fault]) -> dict[str, Fault]:
    """Both tallies, kind by kind; the first of `one` stays the first.

    >>> add_faults({"image": Fault(2, "a")}, {"image": Fault(1, "b")})
    {'image': Fault(count=3, first='a')}
    """
    both = dict(one)
    for kind, (count, first) in other.items():
        old = both.get(kind, Fault(0, first))
        both[kind] = Fault(old.count + count, old.first)
    return both


def describe_faults(faults: dict[str, Fault]) -> str:
    """A tally in words, the most frequent kind first.

    >>> describe_faults({"image": Fault(3, "a.tar, 7.jpg: no image")})
    '3 by image (first a.tar, 7.jpg: no image)'
    """
    ranked = sorted(faults.items(), key=lambda item: -item[1].count)
    return ", ".join(f"{fault.count} by {kind} (first {fault.first})" for kind, fault in ranked)


KINDS = ("shard", "caption", "image", "image size")  # of what a sample's fault is about


class Batch(NamedTuple):
    """One process's rows of a global batch.

    images: uint8 [B, S, S, 3]. ids: int64 [T], packed token ids, special tokens included.
    cu_seqlens: int32 [B + 1], where each caption starts in ids. max_seqlen: the longest caption.
    first_sample: place of images[0] in the global batch; keys masks together with the step.
    skipped: unreadable samples so far on this process.
    faults: those met for this batch, by kind, one of KINDS.
    sources: its samples by source, where there are several.
    coloured: whether the images have their augmentation's colours; if not, `recolour` is to come.
    """

    images: Tensor
    ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    first_sample: int
    skipped: int
    faults: dict[str, Fault] = {}  # noqa: RUF012 (never changed in place)
    sources: dict[str, int] = {}  # noqa: RUF012
    coloured: bool = True


class Pictures(NamedTuple):
    """What can be read of a batch of a set of pictures that is evaluated.

    images: uint8 [n, S, S, 3], each picture once.
    names: of each what tells it from all other pictures of the set.
    told: of each what the files beside it say, one item a file or sample.
    faults: what could not be read, by kind.
    """

    images: Tensor
    names: list[Any]
    told: list[list[Any]]
    faults: dict[str, Fault]


class Tally:
    """What some batches met: their faults by kind, and their samples by source."""

    def __init__(self) -> None:
        self.faults: dict[str, Fault] = {}
        self.sources: Counter[str] = Counter()

    def add(self, batch: Batch) -> None:
        """Count a batch too."""
        self.faults = add_faults(self.faults, batch.faults)
        self.sources.update(batch.sources)

    def counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """Numbers by kind and by source, under the same names on every process."""
        kinds = {kind: self.faults[kind].count if kind in self.faults else 0 for kind in KINDS}
        return kinds, dict(self.sources)


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, count: int, *, stream: int = ORDER_STREAM) -> Tensor:
    """A permutation of range(count), int64 [count], from (seed, epoch, stream) alone.

    >>> sorted(order(0, 0, 5).tolist())
    [0, 1, 2, 3, 4]
    """
    high, low = philox_bits(seed, epoch, torch.arange(count), 2, stream=stream).unbind(1)
    return ((high << 31) | (low >> 1)).argsort(stable=True)


def global_rows(seed: int, step: int, batch_size: int, count: int) -> Tensor:
    """Samples of the global batch of a step, int64 [batch_size], when any order will do.

    The stream is one permutation after another, cut into batches; nothing is left out.
    """
    places = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // count
    rows = torch.empty_like(places)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        rows[here] = order(seed, epoch, count)[places[here] % count]
    return rows


def uniform_rows(seed: int, step: int, batch_size: int, vendors: Tensor) -> Tensor:
    """Samples of the global batch of a step, all from one vendor.

    Each vendor's samples are permuted and cut into whole batches, and an epoch shows these batches
    in a random order. The samples that are left over fill no batch; they are others in each epoch.

    Args:
        seed, step, batch_size: the run's seed, the step, samples of the global batch.
        vendors: int64 [n], the vendor of sample i.

    Returns:
        int64 [batch_size], indices into vendors; `global_rows` where no vendor fills a batch.
    """
    members = [(vendors == vendor).nonzero()[:, 0] for vendor in vendors.unique().tolist()]
    slots = [(m, at) for m in members for at in range(0, len(m) - batch_size + 1, batch_size)]
    if not slots:
        return global_rows(seed, step, batch_size, len(vendors))
    epoch, place = divmod(step, len(slots))
    turns = order(seed, epoch, len(slots), stream=TURN_STREAM)
    member, at = slots[int(turns[place])]
    shuffled = order(seed, epoch, len(vendors))
    return shuffled[torch.isin(shuffled, member)][at : at + batch_size]


def local_slice(batch_size: int, rank: int, world_size: int, function: str = "loader") -> slice:
    """The rows of a rank in the global batch.

    Raises:
        ValueError: the batch is empty or does not divide, or there is no such rank.
    """
    if batch_size < 1:
        raise ValueError(f"{function}: batch_size must be at least 1, got {batch_size}")
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"{function}: rank must be in [0, world_size), got rank {rank} of {world_size}"
        )
    if batch_size % world_size:
        raise ValueError(
            f"{function}: batch_size must be divisible by the {world_size} processes, "
            f"got {batch_size}"
        )
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


def ahead(make: Callable[[int], Batch], steps: range, prefetch: int) -> Iterator[Batch]:
    """make(step) for each step, up to `prefetch` of them made ahead by a thread."""
    if prefetch == 0:
        yield from map(make, steps)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
        pending: deque = deque()
        try:
            for step in steps:
                pending.append(pool.submit(make, step))
                if len(pending) > prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def loaded(batches: Dataset, steps: range, workers: int = 0, prefetch: int = 2) -> Iterator[Any]:
    """batches[step] for each step, in order, made ahead.

    Args:
        workers: processes that make them, each `prefetch` ahead; 0: a thread of this one does.
    """
    if workers == 0:
        yield from ahead(batches.__getitem__, steps, prefetch)
        return
    made = DataLoader(
        _ErrorsAsValues(batches),
        sampler=steps,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=max(1, prefetch),
        worker_init_fn=_one_thread,
        generator=torch.Generator(),  # the run's own numbers stay as they are
    )
    for batch in made:
        if isinstance(batch, ValueError):
            raise batch
        yield batch


def _one_thread(worker: int) -> None:
    """Workers share the machine; a pool of threads in each would only fight."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


class _ErrorsAsValues(Dataset):
    """Batches for DataLoader's workers, which would make a traceback of a sentence."""

    def __init__(self, batches: Dataset) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Any:
        try:
            return self.batches[step]
        except ValueError as error:
            return ValueError(str(error))
