"""Batches of the embedded set: the batch of a step is a pure function of (seed, step).

A batch shows one hand only: were twemoji and openmoji mixed, telling their styles apart would lower
the loss without any meaning learnt. As a hand has one drawing of a concept, no concept is twice in
a batch (a false negative of the contrastive loss).

Rank r of W takes rows [r G / W, (r + 1) G / W) of the global batch of G, and whatever is drawn for
a row (crop, colour, caption, masks) is keyed by its place in the global batch: W processes see what
one would. A run that starts at step k sees what a run from step 0 sees from there on.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipa_kernels import philox_bits, philox_uniform

from .augment import Augmentation, augment, resize
from .emoji import FORMS, EmojiPairs
from .text import Tokenizer

ORDER_STREAM, CAPTION_STREAM = 3, 4  # from 5 on: shards.py
TURN_STREAM, BLEND_STREAM = 0xFF00, 0xFF01


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


class Batch(NamedTuple):
    """One process's rows of a global batch.

    images: uint8 [B, S, S, 3]. ids: int64 [T], packed token ids, special tokens included.
    cu_seqlens: int32 [B + 1], where each caption starts in ids. max_seqlen: the longest caption.
    first_sample: place of images[0] in the global batch; keys masks together with the step.
    skipped: unreadable samples so far on this process.
    faults: those met for this batch, by kind: "shard", "caption", "image" or "image size".
    """

    images: Tensor
    ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    first_sample: int
    skipped: int
    faults: dict[str, Fault] = {}  # noqa: RUF012 (never changed in place)


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


def uniform_rows(seed: int, step: int, batch_size: int, hands: Tensor) -> Tensor:
    """Samples of the global batch of a step, all by one hand.

    Each hand's samples are permuted and cut into whole batches, and an epoch shows these batches in
    a random order. What is left of a hand fills no batch, and is another rest in the next epoch.

    Args:
        seed, step, batch_size: the run's seed, the step, samples of the global batch.
        hands: int64 [n], who drew sample i.

    Returns:
        int64 [batch_size], indices into hands; `global_rows` where no hand fills a batch.
    """
    members = [(hands == hand).nonzero()[:, 0] for hand in hands.unique().tolist()]
    slots = [(m, at) for m in members for at in range(0, len(m) - batch_size + 1, batch_size)]
    if not slots:
        return global_rows(seed, step, batch_size, len(hands))
    epoch, place = divmod(step, len(slots))
    turns = order(seed, epoch, len(slots), stream=TURN_STREAM)
    member, at = slots[int(turns[place])]
    shuffled = order(seed, epoch, len(hands))
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


class EmojiLoader:
    """Iterates the batches of EmojiPairs from `start_step` to `steps`.

    Args:
        pairs: the data. tokenizer: its text side.
        batch_size: samples of the global batch, over all processes.
        image_size: side of the images in pixels.
        source_size: side at which the drawings are kept for cropping; 0 is twice image_size, at
            most their own 72. A crop costs its source: at 16 px, 32 takes a third of 72's time.
        context: tokens of a caption at most, special ones included.
        steps, start_step: first step that is not, and first that is, yielded.
        strategy, pad: how captions are cut and filled, as Tokenizer.encode.
        forms: caption forms; each sample draws one, a form listed twice counts twice.
        augmentation: strengths; None is the plain crop.
        blend: share of images that are faded into the other vendor's training drawing of their
            concept, if there is one, by an amount uniform in [0, 1].
        seed: key of order, crops, colours, forms and masks.
        rank, world_size: which share of the global batch this process takes.
        prefetch: batches made ahead by a thread; 0 makes each when it is asked for.

    Raises:
        ValueError: a batch that is empty or does not divide by world_size, a rank that is none,
            a start after the end, no form, no image, no pixel.
    """

    def __init__(
        self,
        pairs: EmojiPairs,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        image_size: int,
        context: int,
        steps: int,
        start_step: int = 0,
        source_size: int = 0,
        strategy: str = "truncate",
        pad: bool = False,
        forms: Sequence[str] = FORMS,
        augmentation: Augmentation | None = None,
        blend: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
    ) -> None:
        self.rows = local_slice(batch_size, rank, world_size, "EmojiLoader")
        if not 0 <= start_step <= steps:
            raise ValueError(f"EmojiLoader: start_step must be in [0, {steps}], got {start_step}")
        if not forms:
            raise ValueError("EmojiLoader: forms must hold a caption form, got none")
        if not len(pairs.train):
            raise ValueError("EmojiLoader: pairs must hold training images, got none")
        if image_size < 1 or source_size < 0:
            raise ValueError(
                "EmojiLoader: image_size must be at least 1 pixel and source_size at least 0, "
                f"got {image_size} and {source_size}"
            )
        if not 0 <= blend <= 1:
            raise ValueError(f"EmojiLoader: blend must be in [0, 1], got {blend}")
        if prefetch < 0:
            raise ValueError(f"EmojiLoader: prefetch must not be negative, got {prefetch}")
        source = source_size or min(2 * image_size, pairs.images.shape[1])
        self.images = resize(pairs.images[pairs.train], source)
        self.pairs, self.tokenizer, self.augmentation = pairs, tokenizer, augmentation
        self.batch_size, self.image_size, self.seed = batch_size, image_size, seed
        self.start_step, self.steps, self.prefetch = start_step, steps, prefetch
        self.forms = tuple(forms)
        self.text = {"context": context, "strategy": strategy, "pad": pad}
        self.owners, self.hands = pairs.concept[pairs.train], pairs.vendor[pairs.train]
        self.blend, self.partner = blend, _partners(self.owners)

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[Batch]:
        return ahead(self.batch, range(self.start_step, self.steps), self.prefetch)

    def batch(self, step: int) -> Batch:
        """The batch of any step."""
        first = self.rows.start
        key = {"seed": self.seed, "step": step, "first_sample": first}
        rows = uniform_rows(self.seed, step, self.batch_size, self.hands)[self.rows]
        images = augment(self._blended(rows, step), self.image_size, self.augmentation, **key)
        captions = self._captions(self.owners[rows].tolist(), step)
        ids, cu_seqlens, max_seqlen = self.tokenizer.encode(captions, **self.text, **key)
        return Batch(images, ids, cu_seqlens, max_seqlen, first, 0, {})

    def _blended(self, rows: Tensor, step: int) -> Tensor:
        """The rows' images; a share of them faded by a random amount into their concept's other."""
        images, partner = self.images.index_select(0, rows), self.partner[rows]
        samples = torch.arange(self.rows.start, self.rows.stop)
        chance, amount = philox_uniform(self.seed, step, samples, 2, stream=BLEND_STREAM).unbind(1)
        faded = ((chance < self.blend) & (partner >= 0)).nonzero()[:, 0]
        if len(faded):
            own, other = images.index_select(0, faded), self.images.index_select(0, partner[faded])
            mixed = torch.lerp(own.float(), other.float(), amount[faded].view(-1, 1, 1, 1))
            images.index_copy_(0, faded, mixed.round_().to(torch.uint8))
        return images

    def _captions(self, concepts: list[int], step: int) -> list[str]:
        samples = torch.arange(self.rows.start, self.rows.stop)
        draws = philox_uniform(self.seed, step, samples, 17, stream=CAPTION_STREAM).tolist()
        return [
            self.pairs.caption(concept, self.forms[int(draw[0] * len(self.forms))], draw[1:])
            for concept, draw in zip(concepts, draws, strict=True)
        ]


def _partners(owners: Tensor) -> Tensor:
    """For each sample another one of the same owner, int64 [n]; -1 where there is none."""
    ordered = owners.argsort(stable=True)
    same = owners[ordered[1:]] == owners[ordered[:-1]]
    partner = torch.full_like(owners, -1)
    partner[ordered[1:][same]] = ordered[:-1][same]
    partner[ordered[:-1][same]] = ordered[1:][same]
    return partner


def ahead(make, steps: range, prefetch: int) -> Iterator[Batch]:
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


class ErrorsAsValues(Dataset):
    """Batches for DataLoader's workers, which would make a traceback of a sentence."""

    def __init__(self, batches: Dataset) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Batch | ValueError:
        try:
            return self.batches[step]
        except ValueError as error:
            return ValueError(str(error))
