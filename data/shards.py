"""WebDataset tar shards as batches, in an order that is a pure function of (seed, step).

A shard is an uncompressed tar; members that share the name up to the first dot are a sample:
`000012.jpg` (jpeg, png, webp) with `000012.txt` or `000012.json` (its "caption"); tars.py has the
details, and pairs.py says which caption is read. A run starts from the number of samples of each
shard (index.py); a tar is scanned for the offsets of its members when its window opens, the scan is
kept in the user's cache folder, and from then on any sample is one seek away: a run resumes at step
k without reading what came before. No shard is mapped or kept open, and only a window's scans are
held.

sources.py says which sample stands at each place. One that cannot be read, for whatever reason, is
counted by kind and replaced by the one that stands at the same row of the next batch, and so on:
the same one on every run.
"""

import contextlib
import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipa_kernels import philox_uniform
from clipa_kernels.masking.philox import CAPTION_STREAM

from .augment import Augmentation, recolour, sample_draws, shape_draws
from .batches import Batch, Fault, Pictures, add_faults, describe_faults, loaded, local_slice
from .cache import Scan, kept_scan
from .images import MAX_PIXELS, _check_interpolation, decode_crop, decode_square
from .index import known_sizes
from .pairs import USUAL, Captions, Files, Unreadable, captions_of, drawn_of, read_pair
from .patterns import Pattern, file_names, sources_of
from .patterns import expand as expand
from .shelf import Shelf
from .sources import Order, Place, weights_of
from .tars import CAPTIONS
from .tars import samples_of as _scan_tar
from .text import Tokenizer

_SAID = 20  # warnings of what shards lack; thousands of them would hide the rest
_TRIES = 100  # unreadable samples in a row before a run gives up


def scan(path: Path, cache: Path | None = None) -> np.ndarray:
    """Where the samples of a tar lie. A warning says what is left out of it, each time.

    Returns:
        int64 [n, 6]: offset and size of the image, of its .txt and of its .json, size -1 where
        there is none. A tar that is cut short or broken within gives what is whole.

    Raises:
        ValueError: the file is not an uncompressed tar.
    """
    (rows, said), _ = _scan(path, cache)
    for sentence in said:
        warnings.warn(sentence, stacklevel=2)
    return rows


def _scan(path: Path, cache: Path | None, kinds: Sequence[str] = CAPTIONS) -> tuple[Scan, bool]:
    """The scan of a tar, with captions of some extensions, and whether the cache holds it."""
    further = () if tuple(kinds) == CAPTIONS else tuple(kinds)
    find = partial(_scan_tar, kinds=kinds) if further else _scan_tar
    try:
        return kept_scan(path, find, cache, further)
    except OSError as error:
        raise ValueError(f"shards: {path} must be a file that can be read, got {error}") from error


class ShardLoader(Dataset):
    """Iterates the batches of tar shards from `start_step` to `steps`; `loader[step]` is any one.

    Args:
        pattern: shard files, as `file_names`; "::" divides sources. tokenizer: the text side.
        batch_size: samples of the global batch, over all processes.
        image_size: side of the images in pixels.
        context: tokens of a caption at most, special ones included.
        start_step, steps: the steps that are yielded, start_step to steps - 1.
        strategy, pad: how captions are cut and filled, as Tokenizer.encode.
        augmentation: strengths, as `decode_crop` and `recolour`; None is the plain crop.
        interpolation: "bilinear" (CLIPA-v2) or "bicubic" (CLIPA v1).
        max_pixels: of an image file; a larger one is a sample that cannot be read.
        colours: whether `augmentation`'s colours are drawn here; if not, `recolour` is left to the
            caller, who may do it on another device, keyed by the same seed and step.
        seed: key of order, crops, colours and masks.
        rank, world_size: which share of the global batch this process takes.
        window: shards whose samples are mixed.
        mix: weights of the sources, "3::1"; "": as many samples of each as it holds.
        repeat: whether a source that has a weight and ends begins again before the others end.
        parts: into how many parts rows and shards are cut; each part of the rows reads its own.
        captions: which caption of a sample is read.
        workers: processes that make batches; 0 makes them here, `prefetch` ahead by a thread.
        cache: folder for the scans and for remote shards, as load_emoji.
        cache_gb: most gigabytes of remote shards in it.

    Raises:
        ValueError: a batch that is empty or does not divide by world_size or parts, a rank outside
            it, a start after the end, a blend, a missing file, one that is not a tar, no sample in
            any, not one weight above 0 a source; while iterating, 100 samples in a row that cannot
            be read.
    """

    def __init__(
        self,
        pattern: Pattern,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        image_size: int,
        context: int,
        steps: int,
        start_step: int = 0,
        strategy: str = "truncate",
        pad: bool = False,
        augmentation: Augmentation | None = None,
        interpolation: str = "bilinear",
        max_pixels: int = MAX_PIXELS,
        colours: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window: int = 8,
        mix: str = "",
        repeat: bool = False,
        parts: int = 1,
        captions: Captions = USUAL,
        workers: int = 0,
        prefetch: int = 2,
        cache: Path | None = None,
        cache_gb: float = 100.0,
    ) -> None:
        self.rows = local_slice(batch_size, rank, world_size, "ShardLoader")
        augmentation = augmentation or Augmentation()
        _check(start_step, steps, image_size, window, workers, prefetch, augmentation)
        _check_interpolation("ShardLoader", interpolation)
        self.sources = sources_of(pattern)
        self.names, self.ends = [], []
        for source in self.sources:
            self.names += file_names(source)
            self.ends.append(len(self.names))
        self.cache, self.shelf, self.captions = cache, Shelf(cache, cache_gb), captions
        self._held: dict[int, np.ndarray] = {}  # scans that the cache would not take
        self._scans: dict[int, np.ndarray] = {}  # a few of the others
        self._told: set[int] = set()  # shards whose faults have been told
        self.sizes = self._sizes()
        self.count = int(self.sizes.sum())
        if self.count < batch_size:
            raise ValueError(
                f"ShardLoader: shards must hold samples (an image and its .txt or .json), "
                f"{batch_size} for a batch, got {self.count or 'none'} in {len(self.names)} files, "
                f"the first {self.names[0]}"
            )
        how = {"batch_size": batch_size, "seed": seed, "window": window}
        how |= {"weights": weights_of(mix, len(self.ends)), "repeat": repeat, "parts": parts}
        self.order = Order(self.sizes, self.ends, **how)
        self.tokenizer, self.augmentation = tokenizer, augmentation
        self.batch_size, self.image_size, self.seed = batch_size, image_size, seed
        self.start_step, self.steps, self.interpolation = start_step, steps, interpolation
        self.max_pixels, self.colours = max_pixels, colours
        self.text = {"context": context, "strategy": strategy, "pad": pad}
        tokenizer.encode([], **self.text)  # what it refuses now would be each sample's fault later
        self.workers, self.prefetch, self.window = workers, prefetch, window

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[Batch]:
        steps = range(self.start_step, self.steps)
        skipped = 0
        for batch in loaded(self, steps, self.workers, self.prefetch):
            skipped += batch.skipped
            yield batch._replace(skipped=skipped)

    def __getitem__(self, step: int) -> Batch:
        """The batch of any step; `skipped` counts this batch alone."""
        first, count = self.rows.start, self.rows.stop - self.rows.start
        key = {"seed": self.seed, "step": step, "first_sample": first}
        draws = sample_draws(count, **key)
        shapes = shape_draws(count, self.augmentation, **key)
        keys = self._caption_draws(step)
        places = [self.order.at(first + row + step * self.batch_size) for row in range(count)]
        self._open_windows(places)
        for careful in (False, True):
            faults: dict[str, Fault] = {}
            rows = [
                self._readable(
                    first + row + step * self.batch_size,
                    places[row],
                    draws[row],
                    None if shapes is None else shapes[row],
                    keys[row],
                    faults,
                    careful,
                )
                for row in range(count)
            ]
            images, captions, shards = zip(*rows, strict=True)
            try:
                ids, ends, longest = self.tokenizer.encode(captions, **self.text, **key)
                break
            except Exception:  # a caption that has no ids; asked one by one it is told which
                if careful:
                    raise
        pixels = torch.stack(images)
        if self.colours:
            pixels = recolour(pixels, self.augmentation, **key)
        skipped = sum(fault.count for fault in faults.values())
        counts = skipped, faults, self._by_source(shards)
        return Batch(pixels, ids, ends, longest, first, *counts, coloured=self.colours)

    def _open_windows(self, places: Sequence[Place]) -> None:
        """Hold the shards of some places' windows, and fetch those that come after."""
        now, then = ([self.names[shard] for shard in part] for part in self.order.near(places))
        self.shelf.keep(now, then)

    def _caption_draws(self, step: int) -> list[float]:
        """A number in [0, 1) for each row, which chooses its caption's key."""
        if not self.captions.weights:
            return [0.0] * len(range(self.batch_size)[self.rows])
        samples = torch.arange(self.rows.start, self.rows.stop)
        return philox_uniform(self.seed, step, samples, 1, stream=CAPTION_STREAM)[:, 0].tolist()

    def _by_source(self, shards: Sequence[int]) -> dict[str, int]:
        """How many of some shards are of each source; nothing where there is one source."""
        if len(self.ends) == 1:
            return {}
        found = np.searchsorted(self.ends, shards, "right").tolist()
        names = [str(source) for source in self.sources]
        return dict.fromkeys(names, 0) | Counter(names[place] for place in found)

    def locate(self, place: int) -> tuple[int, int]:
        """Shard and row in it of the sample at a place of the endless stream of batches."""
        return self.order.at(place)[:2]

    def source_that_ends(self) -> tuple[str, int] | None:
        """The source that ends before the others and before `steps`, and the step of its end."""
        if self.order.weights is None or self.order.repeat:
            return None
        source, place = self.order.mix(0).first_end()
        step = place // (self.batch_size // self.order.parts)
        return (str(self.sources[source]), step) if step < self.steps else None

    def _sizes(self) -> np.ndarray:
        """Samples of each shard; those that no table knows are counted, and told what they lack."""
        sizes, said = known_sizes(self.names), []
        for shard in np.flatnonzero(sizes < 0).tolist():
            sizes[shard] = len(self._first_scan(shard, said))
            self.shelf.keep()
        warn(said)
        return sizes

    def _first_scan(self, shard: int, said: list[str]) -> np.ndarray:
        """A shard's scan; `said` gains what is left out of the shard."""
        (rows, sentences), kept = self._scanned(shard)
        said += sentences
        self._told.add(shard)
        if not kept:
            self._held[shard] = rows
        return rows

    def _scanned(self, shard: int) -> tuple[Scan, bool]:
        return _scan(self.shelf.path(self.names[shard]), self.cache, self.captions.kinds)

    def _scan_of(self, shard: int) -> np.ndarray:
        if shard in self._held:
            return self._held[shard]
        if shard not in self._scans:
            while len(self._scans) >= 2 * self.window * self.order.streams:
                self._scans.pop(next(iter(self._scans)), None)
            (rows, said), _ = self._scanned(shard)
            self._scans[shard] = rows
            if len(rows) != self.sizes[shard]:
                size, held = int(self.sizes[shard]), len(rows)
                must = f"must hold the {size} samples that its index says, got {held}"
                said = [*said, f"shards: {self.names[shard]} {must}; see python -m data.index"]
            if shard not in self._told:
                warn(said)
                self._told.add(shard)
        return self._scans[shard]

    def _readable(
        self,
        place: int,
        at: Place,
        draws: Tensor,
        shapes: Tensor | None,
        key: float,
        faults: dict[str, Fault],
        careful: bool,
    ) -> tuple[Tensor, str, int]:
        """The first readable sample at this row of this and the next batches; counts the others.

        Returns its image, its caption, and its shard.
        """

        def decode(data: bytes) -> Tensor:
            how = self.augmentation, self.interpolation, shapes
            return decode_crop(data, self.image_size, draws, *how, max_pixels=self.max_pixels)

        for _ in range(_TRIES):
            try:
                return *self._sample(at, decode, key, careful), at.shard
            except Unreadable as error:
                faults.update(add_faults(faults, {error.kind: Fault(1, str(error))}))
                last, place = error, place + self.batch_size
                at = self.order.at(place)
        raise ValueError(
            f"ShardLoader: one of {_TRIES} samples in a row must be readable, got none; {last}"
        )

    def _sample(
        self, at: Place, decode: Callable[[bytes], Tensor], key: float, careful: bool
    ) -> tuple[Tensor, str]:
        path, row = self.shelf.path(self.names[at.shard]), at.row
        try:
            rows = self._scan_of(at.shard)
            if row >= len(rows):
                raise ValueError(f"must hold {int(self.sizes[at.shard])} samples, got {len(rows)}")
            places = rows[row].tolist()
            with open(path, "rb") as file:
                pair = read_pair(file, path, places, decode, captions=self.captions, draw=key)
        except (ValueError, IndexError, OSError) as error:  # the shard is gone or another
            raise Unreadable("shard", f"{path}: {error}") from error
        if careful:
            try:
                self.tokenizer.encode([pair[1]], **self.text)
            except Exception as error:
                raise Unreadable("caption", f"{path}, {pair[1][:40]!r}: {error}") from error
        return pair


def _check(
    start_step: int,
    steps: int,
    image_size: int,
    window: int,
    workers: int,
    prefetch: int,
    augmentation: Augmentation,
) -> None:
    """ValueError unless a loader can be made of these."""
    if not 0 <= start_step <= steps:
        raise ValueError(f"ShardLoader: start_step must be in [0, {steps}], got {start_step}")
    if image_size < 1:
        raise ValueError(f"ShardLoader: image_size must be at least 1 pixel, got {image_size}")
    if window < 1 or workers < 0 or prefetch < 0:
        raise ValueError(
            "ShardLoader: window must be at least 1, workers and prefetch at least 0, "
            f"got {window}, {workers}, {prefetch}"
        )
    if augmentation.blend:
        raise ValueError(
            "ShardLoader: augmentation must not blend, as a sample of a shard has one picture, "
            f"got blend {augmentation.blend}"
        )


def warn(said: list[str]) -> None:
    """What shards lack, as warnings of the line that makes a loader."""
    for sentence in said[:_SAID]:
        warnings.warn(sentence, stacklevel=3)
    if len(said) > _SAID:
        more = f"and {len(said) - _SAID} more such sentences, the last: {said[-1]}"
        warnings.warn(f"shards: {more}", stacklevel=3)


def first_captions(
    pattern: Pattern,
    count: int = 100_000,
    captions: Captions = USUAL,
    cache_gb: float = 100.0,
) -> list[str]:
    """Captions of the first samples, those that can be read: what a tokenizer may be trained on.

    Where captions are drawn by weight, those of all keys.
    """
    found: list[str] = []
    for file, path, row in _first_rows(pattern, count, captions.kinds, cache_gb):
        with contextlib.suppress(Unreadable):
            if captions.weights:
                found += read_pair(file, path, row, read=drawn_of, captions=captions)[1]
            else:
                found.append(read_pair(file, path, row, captions=captions)[1])
    return found


def check_captions(
    pattern: str, captions: Captions, count: int = 1000, cache_gb: float = 100.0
) -> None:
    """ValueError unless each caption key is in one of a source's first samples."""
    missing, there = dict.fromkeys(captions.keys), set()
    for source in sources_of(pattern):
        for file, _, row in _first_rows(source, count, captions.kinds, cache_gb):
            files = Files(file, row, captions.kinds)
            with contextlib.suppress(ValueError, OSError):  # a broken sample's own fault
                there |= files.keys
                for key in [key for key in missing if files.found(key) is not None]:
                    del missing[key]
            if not missing:
                return
    if there:
        raise ValueError(
            f"shards: captions must be keys of one of the first {count} samples, got "
            f"{', '.join(missing)}; these have {', '.join(sorted(there))}"
        )


def read_pairs(
    pattern: Pattern,
    size: int,
    count: int = 10_000,
    *,
    squash: bool = False,
    interpolation: str = "bilinear",
    captions: Captions = USUAL,
) -> tuple[Tensor, list[list[str]], int]:
    """The first `count` samples of shards for retrieval, images as `decode_square` makes them.

    A picture has all the captions that its .txt has lines, that its JSON lists, or that samples
    with the same image file have.

    Returns:
        uint8 [n, size, size, 3], each picture once; the captions of each; and how many samples
        could not be read: a warning says why, by kind.
    """
    rows = _first_rows(pattern, count, captions.kinds)
    how = dict(squash=squash, interpolation=interpolation)
    images, _, found, faults = read_rows(rows, size, **how, captions=captions)
    warn_of(faults, stacklevel=3)
    return images, found, sum(fault.count for fault in faults.values())


def warn_of(faults: dict[str, Fault], stacklevel: int = 2) -> None:
    """A warning that says why samples are left out, if any are."""
    if faults:
        said = f"shards: samples are left out: {describe_faults(faults)}"
        warnings.warn(said, stacklevel=stacklevel)


def read_rows(
    rows: Iterable[tuple[BinaryIO, Path, Sequence[int]]],
    size: int,
    *,
    squash: bool = False,
    interpolation: str = "bilinear",
    captions: Captions = USUAL,
    read: Callable[..., list] = captions_of,
) -> Pictures:
    """The pictures of some samples, as `read_pairs`; `told` is what `read` makes of captions."""
    images: list[Tensor] = []
    found: list[list] = []
    places: dict[bytes, int] = {}
    faults: dict[str, Fault] = {}

    def place_of(data: bytes) -> int:
        name = hashlib.sha256(data).digest()
        if name not in places:
            images.append(decode_square(data, size, squash=squash, interpolation=interpolation))
            found.append([])
            places[name] = len(places)
        return places[name]

    for file, path, row in rows:
        try:
            place, told = read_pair(file, path, row, place_of, read, captions)
            found[place] += told
        except Unreadable as error:
            faults = add_faults(faults, {error.kind: Fault(1, str(error))})
    empty = torch.zeros(0, size, size, 3, dtype=torch.uint8)
    return Pictures(torch.stack(images) if images else empty, list(places), found, faults)


def _first_rows(
    pattern: Pattern, count: int, kinds: Sequence[str], cache_gb: float = 100.0
) -> Iterator[tuple[BinaryIO, Path, list[int]]]:
    """An open shard, its path and a row of its scan, for the first `count` samples in order."""
    shelf = Shelf(None, cache_gb)
    for name in file_names(pattern):
        path = shelf.path(name)
        (found, said), _ = _scan(path, None, kinds)
        warn(said)
        rows = found[:count].tolist()
        count -= len(rows)
        with open(path, "rb") as file:
            yield from ((file, path, row) for row in rows)
        shelf.keep()
        if count == 0:
            return
