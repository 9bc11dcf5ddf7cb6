"""The samples of shards as a set of pictures to evaluate, with what each tells of its picture."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from .batches import Pictures
from .cache import Scan
from .pairs import USUAL, Captions, Files, Unreadable, captions_of, read_pair
from .patterns import Pattern, file_names
from .shards import _first_rows, _scan, read_rows
from .shelf import Shelf

_LOOKED = 1000  # first samples whose class is checked ahead


class Told(NamedTuple):
    """What a sample tells of its picture.

    texts: its captions for retrieval. names: those of the usual keys, which may name classes.
    label: the number of its class, from its .cls; None where it has none.
    """

    texts: list[str]
    names: list[str]
    label: int | None


def _told_by(
    files: Files, held: Captions, draw: float, *, captions: Captions, named: bool, labelled: bool
) -> list[Told]:
    """A sample's Told, for `read_rows`.

    Raises:
        ValueError: a .cls that holds no number, or nothing of what is asked for.
    """
    label = _label(files) if labelled else None
    if not named and label is None:
        return [Told(captions_of(files, captions), [], None)]
    texts = _any(files, captions)
    names = texts if captions == USUAL else _any(files, USUAL)
    if not texts and not names and label is None:
        captions_of(files, captions)  # which says why
    return [Told(texts, names, label)]


def _any(files: Files, captions: Captions) -> list[str]:
    try:
        return captions_of(files, captions)
    except (ValueError, RecursionError):
        return []


def _label(files: Files) -> int | None:
    found = files.found("cls")
    if found is None:
        return None
    try:
        return int(str(found))
    except ValueError as error:
        must = "a sample's .cls must be a whole number"
        raise ValueError(f"{must}, got {str(found)[:20]!r}") from error


class ShardPictures(Dataset):
    """The pictures of shards in batches; batch i is any process's or worker's to read.

    A batch is `batch_size` samples in a row; a picture is known by its file's bytes, and `told` is
    the Told of each of its samples. `hold` must give the scans of all shards first.

    Args:
        pattern: as `file_names`.
        size: side of the pictures in pixels.
        squash, interpolation: as `decode_square`.
        captions: those for retrieval.
        named, labelled: whether `Told.names` and `Told.label` are asked for.
        cache_gb: of remote shards that the machine keeps at most.
    """

    def __init__(
        self,
        pattern: Pattern,
        size: int,
        batch_size: int,
        *,
        squash: bool = False,
        interpolation: str = "bilinear",
        captions: Captions = USUAL,
        named: bool = False,
        labelled: bool = False,
        cache_gb: float = 100.0,
    ) -> None:
        self.names, self.batch_size = file_names(pattern), batch_size
        self.size, self.shelf = size, Shelf(None, cache_gb)
        held, read = _reading(captions, named, labelled)
        self.how = dict(captions=held, read=read, squash=squash, interpolation=interpolation)
        self.rows: Sequence[np.ndarray] = []
        self.ends = np.zeros(0, np.int64)

    def scan(self, shard: int) -> Scan:
        """Where the samples of a shard lie, and what must be said of it.

        Raises:
            ValueError: it cannot be had, or is no tar.
        """
        found, _ = _scan(self.shelf.path(self.names[shard]), None, self.how["captions"].kinds)
        self.shelf.keep()
        return found

    def hold(self, rows: Sequence[np.ndarray]) -> None:
        """Take the rows of each shard's scan."""
        self.rows, self.ends = rows, np.cumsum([len(each) for each in rows])

    def __len__(self) -> int:
        return -(-int(self.ends[-1]) // self.batch_size)

    def __getitem__(self, number: int) -> Pictures:
        first = number * self.batch_size
        rows = self._opened(first, min(first + self.batch_size, int(self.ends[-1])))
        return read_rows(rows, self.size, **self.how)

    def _opened(self, first: int, end: int) -> Iterator[tuple[BinaryIO, Path, list[int]]]:
        """An open shard, its path and a row of its scan, for the samples of a range."""
        while first < end:
            shard = int(np.searchsorted(self.ends, first, "right"))
            start = int(self.ends[shard]) - len(self.rows[shard])
            stop = min(end, int(self.ends[shard]))
            path = self.shelf.path(self.names[shard])
            self.shelf.keep([self.names[shard]], self.names[shard + 1 : shard + 2])
            with open(path, "rb") as file:
                for row in self.rows[shard][first - start : stop - start].tolist():
                    yield file, path, row
            first = stop


def _reading(captions: Captions, named: bool, labelled: bool) -> tuple[Captions, Callable]:
    """The keys that a sample must have one of, and what reads them."""
    further = ("cls",) if labelled and "cls" not in captions.keys else ()
    held = Captions((*captions.keys, *further))
    return held, partial(_told_by, captions=captions, named=named, labelled=labelled)


def check_samples(
    pattern: Pattern, captions: Captions, classes: int = 0, cache_gb: float = 100.0
) -> None:
    """ValueError unless one of the first samples can be read, and each .cls is a class's number.

    Args:
        classes: how many there are; 0: classes are not asked for.
    """
    held, read = _reading(captions, False, bool(classes))
    seen = (
        read_rows([row], 8, captions=held, read=read)
        for row in _first_rows(pattern, 10_000, held.kinds, cache_gb)
    )
    if not any(len(one.images) for one in seen):
        raise ValueError(f"evaluate: shards must hold pairs that can be read, got {pattern!r}")
    if classes:
        rows = _first_rows(pattern, _LOOKED, held.kinds, cache_gb)
        looked = (_told(*row, read, held) for row in rows)
        check_labels(pattern, (told.label for told in chain.from_iterable(looked)), classes)


def _told(
    file: BinaryIO, path: Path, row: Sequence[int], read: Callable, held: Captions
) -> list[Told]:
    try:
        return read_pair(file, path, row, None, read, held)[1]
    except Unreadable:
        return []


def check_labels(pattern: Pattern, labels: Iterable[int | None], classes: int) -> None:
    """ValueError unless each number (None: none) is one of so many classes'."""
    wrong = [label for label in labels if label is not None and not 0 <= label < classes]
    if wrong:
        must = f"classes must name each .cls of {pattern}"
        raise ValueError(f"evaluate: {must}, got {classes} names and the number {wrong[0]}")
