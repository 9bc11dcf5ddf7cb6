"""Which sample stands at each place of a run: sources mixed by weight, epochs of shards, windows.

    place p = step * batch_size + row;   part = row * parts // batch_size

Each part of the batch's rows reads a part of every source, the same for the whole run: a machine
that makes some parts needs no other shards. Within a part sources take turns in a fixed pattern as
even as their weights allow, so that any stretch of rows holds them in proportion to within one row.
A source is shown in epochs, each sample once: its shards permuted, then the samples inside each
window of neighbouring shards, so that only so many files are read at a time.

All of it is arithmetic on the table of samples a shard; any place is found by itself.
"""

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from clipa_kernels.masking.philox import PART_STREAM, WINDOW_STREAM

from .batches import order

_ROUND = 4096  # rows of the pattern at most; finer weights are rounded to it


class Window(NamedTuple):
    """Shards that are read together: the `number`th of an epoch of a source in a part."""

    part: int
    source: int
    epoch: int
    number: int


class Place(NamedTuple):
    """A sample: its shard, its row there, and the window in which it is read."""

    shard: int
    row: int
    window: Window


def weights_of(mix: str, sources: int) -> list[Fraction] | None:
    """The weights in "3::1"; None where none are given.

    Raises:
        ValueError: not one positive number a source.

    >>> weights_of("3::0.5", 2)
    [Fraction(3, 1), Fraction(1, 2)]
    """
    if not mix:
        return None
    try:
        weights = [Fraction(one.strip()) for one in mix.split("::")]
        good = len(weights) == sources and all(0 < weight < 10**9 for weight in weights)
    except (ValueError, ZeroDivisionError):
        good = False
    if not good:
        must = f"hold a weight above 0 for each of the {sources} sources, as 3::1"
        raise ValueError(f"sources: mix must {must}, got {mix!r}")
    return weights


class _Phase(NamedTuple):
    """A stretch of places with one pattern."""

    start: int
    used: list[int]  # samples of each source before it
    pattern: list[int]  # the source of each row of a round
    ranks: list[int]  # how many of its source stand before it in the round
    counts: list[int]  # rows of each source in a round


class Mix:
    """Sources of some sizes by weights: the source and its sample number at any place.

    Args:
        sizes: samples of each source. weights: as `weights_of`.
        repeat: whether a source that ends begins again at once. Else the others go on without it in
            their proportion, and all begin again when all have ended.

    >>> mix = Mix([6, 1], [Fraction(2), Fraction(1)], repeat=False)
    >>> [mix.at(place) for place in range(8)]
    [(0, 0, 0), (1, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 0, 4), (0, 0, 5), (0, 1, 0)]
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[Fraction], *, repeat: bool = False
    ) -> None:
        self.sizes, self.repeat, self.total = list(sizes), repeat, sum(sizes)
        self.phases: list[_Phase] = []
        start, used, left = 0, [0] * len(sizes), list(range(len(sizes)))
        while left and not (repeat and self.phases):
            phase = _phase(start, used, left, [weights[source] for source in left])
            self.phases.append(phase)
            # Until the first of them has shown its last sample.
            length = min(_after(phase, source, sizes[source] - used[source]) for source in left)
            start += length
            used = [used[source] + _before(phase, source, length) for source in range(len(sizes))]
            left = [source for source in left if used[source] < sizes[source]]
        self._starts = [phase.start for phase in self.phases]

    def at(self, place: int) -> tuple[int, int, int]:
        """(source, epoch, number of the sample in the epoch's order) at a place."""
        cycle, place = (0, place) if self.repeat else divmod(place, self.total)
        phase = self.phases[bisect_right(self._starts, place) - 1]
        turn, row = divmod(place - phase.start, len(phase.pattern))
        source = phase.pattern[row]
        number = phase.used[source] + turn * phase.counts[source] + phase.ranks[row]
        epochs, number = divmod(number, self.sizes[source])
        return source, cycle + epochs, number

    def first_end(self) -> tuple[int, int]:
        """(source, place): the source that ends first, and the first place after its last."""
        ends = [
            _after(self.phases[0], source, size) for source, size in enumerate(self.sizes) if size
        ]
        return ends.index(min(ends)), min(ends)


def _phase(start: int, used: list[int], left: list[int], weights: list[Fraction]) -> _Phase:
    counts = [0] * len(used)
    for source, count in zip(left, _rows(weights), strict=True):
        counts[source] = count
    # The i-th of n rows of a source stands at (i + 1/2) / n of the round.
    turns = [((2 * i + 1) / (2 * n), s) for s, n in enumerate(counts) for i in range(n)]
    pattern = [source for _, source in sorted(turns)]
    seen, ranks = [0] * len(used), []
    for source in pattern:
        ranks.append(seen[source])
        seen[source] += 1
    return _Phase(start, used, pattern, ranks, counts)


def _rows(weights: list[Fraction]) -> list[int]:
    """Whole numbers in proportion to weights, the least that are, or rounded to _ROUND in all."""
    total = sum(weights)
    shares = [weight / total for weight in weights]
    common = 1
    for share in shares:
        common = common * share.denominator // np.gcd(common, share.denominator).item()
        if common > _ROUND:
            return [max(1, round(share * _ROUND)) for share in shares]
    return [int(share * common) for share in shares]


def _before(phase: _Phase, source: int, length: int) -> int:
    """Samples of a source in the first `length` places of a phase."""
    turns, rows = divmod(length, len(phase.pattern))
    return turns * phase.counts[source] + phase.pattern[:rows].count(source)


def _after(phase: _Phase, source: int, count: int) -> int:
    """Places of a phase up to and with the `count`-th sample of a source."""
    turns, rank = divmod(count - 1, phase.counts[source])
    rows = zip(phase.pattern, phase.ranks, strict=True)
    row = next(row for row, pair in enumerate(rows) if pair == (source, rank))
    return turns * len(phase.pattern) + row + 1


class _Share(NamedTuple):
    """The part of a source that a part of the batch reads: pieces of shards."""

    shards: np.ndarray  # int64 [n]
    firsts: np.ndarray  # int64 [n], first row of each piece
    sizes: np.ndarray  # int64 [n], rows of each piece
    count: int


class Order:
    """The sample at each place of the endless stream of batches.

    Args:
        sizes: samples of each shard, int64 [n]. ends: where each source's shards end in it.
        batch_size: rows of the global batch. seed: key of the order. window: shards read together.
        weights: of the sources, as `weights_of`; None: as many of each as it holds, which is one
            source of all shards.
        repeat: as `Mix`. parts: into how many parts the rows and each source are cut.

    Raises:
        ValueError: a source without as many samples as parts, a batch that parts do not divide.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        ends: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        window: int,
        weights: Sequence[Fraction] | None = None,
        repeat: bool = False,
        parts: int = 1,
    ) -> None:
        if parts < 1 or batch_size % parts:
            raise ValueError(
                f"sources: parts must be at least 1 and divide a batch of {batch_size}, got {parts}"
            )
        self.sizes, self.seed, self.window, self.parts = sizes, seed, window, parts
        self.batch_size, self.weights, self.repeat = batch_size, weights, repeat
        self.ends = [len(sizes)] if weights is None else list(ends)
        totals = [int(sizes[a:b].sum()) for a, b in zip([0, *self.ends], self.ends, strict=False)]
        if min(totals) < parts:
            few = totals.index(min(totals))
            which = f"source {few + 1}" if weights is not None else "the shards"
            raise ValueError(
                f"sources: {which} must hold a sample for each of {parts} parts, got {totals[few]}"
            )
        self._totals = totals
        self._shares: dict[tuple[int, int], _Share] = {}
        self._mixes: dict[int, Mix] = {}
        self._epochs: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._mixed: dict[Window, np.ndarray] = {}

    def at(self, place: int) -> Place:
        """The sample at a place: step * batch_size + row."""
        step, row = divmod(place, self.batch_size)
        part, row = divmod(row, self.batch_size // self.parts)
        place = step * (self.batch_size // self.parts) + row
        source, epoch, at = self.mix(part).at(place)
        share, (pieces, ends) = self._share(part, source), self._epoch(part, source, epoch)
        number = int(ends.searchsorted(at, "right")) // self.window
        window = Window(part, source, epoch, number)
        first = number * self.window
        start = int(ends[first - 1]) if first else 0
        end = int(ends[min(first + self.window, len(ends)) - 1])
        at = start + int(self._samples(window, end - start)[at - start])
        slot = int(ends.searchsorted(at, "right"))
        piece = int(pieces[slot])
        row = at - (int(ends[slot - 1]) if slot else 0) + int(share.firsts[piece])
        return Place(int(share.shards[piece]), row, window)

    def near(self, places: Sequence[Place]) -> tuple[list[int], list[int]]:
        """The shards of the windows of some places, and those of the windows that follow."""
        windows = dict.fromkeys(place.window for place in places)
        now = dict.fromkeys(shard for window in windows for shard in self._shards(window))
        after = [self._after(window) for window in windows]
        later = dict.fromkeys(shard for window in after for shard in self._shards(window))
        return list(now), [shard for shard in later if shard not in now]

    def _shards(self, window: Window) -> list[int]:
        pieces, _ = self._epoch(*window[:3])
        first = window.number * self.window
        share = self._share(window.part, window.source)
        return share.shards[pieces[first : first + self.window]].tolist()

    def _after(self, window: Window) -> Window:
        pieces, _ = self._epoch(*window[:3])
        if (window.number + 1) * self.window < len(pieces):
            return window._replace(number=window.number + 1)
        return window._replace(number=0, epoch=window.epoch + 1)

    def mix(self, part: int) -> Mix:
        """How the sources take turns in a part."""
        if part not in self._mixes:
            sizes = [self._bounds(part, total) for total in self._totals]
            weights = self.weights or [Fraction(1)]
            self._mixes[part] = Mix([b - a for a, b in sizes], weights, repeat=self.repeat)
        return self._mixes[part]

    @property
    def streams(self) -> int:
        """Rows of windows that have been read from: parts times sources of this process."""
        return max(1, len(self._shares))

    def _bounds(self, part: int, total: int) -> tuple[int, int]:
        """The samples of a source that a part reads, in the row of all."""
        return part * total // self.parts, (part + 1) * total // self.parts

    def _share(self, part: int, source: int) -> _Share:
        """A part's pieces of a source's shards, which are dealt in an order of their own."""
        if (part, source) not in self._shares:
            first = self.ends[source - 1] if source else 0
            count = self.ends[source] - first
            dealt = np.arange(count)
            if self.parts > 1:
                dealt = order(self.seed, source, count, stream=PART_STREAM).numpy()
            ends = self.sizes[first + dealt].cumsum()
            starts = ends - self.sizes[first + dealt]
            low, high = self._bounds(part, self._totals[source])
            # With one part empty shards stay, so that an order does not depend on them.
            held = slice(None) if self.parts == 1 else (ends > low) & (starts < high)
            starts, ends = starts[held], ends[held]
            firsts = np.maximum(low - starts, 0)
            sizes = np.minimum(ends, high) - starts - firsts
            shards = first + dealt[held]
            self._shares[part, source] = _Share(shards, firsts, sizes, high - low)
        return self._shares[part, source]

    def _key(self, part: int, source: int, epoch: int) -> int:
        """The number that keys an epoch; that of one source in one part is the epoch itself."""
        return (epoch * self.parts + part) * len(self.ends) + source

    def _epoch(self, part: int, source: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of an epoch's pieces, and where each ends in the epoch's row of samples."""
        key = (part, source, epoch)
        if key not in self._epochs:
            _drop(self._epochs, 2 * len(self._shares))
            share = self._share(part, source)
            number = self._key(part, source, epoch)
            pieces = order(self.seed, number, len(share.shards), stream=WINDOW_STREAM).numpy()
            self._epochs[key] = pieces, share.sizes[pieces].cumsum()
        return self._epochs[key]

    def _samples(self, window: Window, count: int) -> np.ndarray:
        """The order of a window's samples."""
        if window not in self._mixed:
            _drop(self._mixed, 4 * len(self._shares))
            stream = WINDOW_STREAM + (window.number + 1) % 2**15
            key = self._key(window.part, window.source, window.epoch)
            self._mixed[window] = order(self.seed, key, count, stream=stream).numpy()
        return self._mixed[window]


def _drop(kept: dict, most: int) -> None:
    """Make room for one more, the oldest first; another thread may do the same."""
    while len(kept) >= max(most, 2):
        kept.pop(next(iter(kept)), None)
