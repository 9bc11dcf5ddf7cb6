"""WebDataset tar shards as batches, in an order that is a pure function of (seed, step).

A shard is an uncompressed tar; members that share the name up to the first dot are a sample:
`000012.jpg` (jpeg, png, webp) with `000012.txt` or `000012.json` (its "caption"); tars.py has the
details. A run starts from the number of samples of each shard (index.py); a tar is scanned for the
offsets of its members when its window opens, the scan is kept in the user's cache folder, and from
then on any sample is one seek away: a run resumes at step k without reading what came before. No
shard is mapped or kept open, and only a window's scans are held.

An epoch permutes the shards, then the samples inside each window of `window` neighbouring shards,
so that only so many files are read at a time. A sample that cannot be read, for whatever reason,
is counted by kind and replaced by the one that stands at the same row of the next batch, and so on:
the same one on every run.
"""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipa_kernels.masking.philox import WINDOW_STREAM

from .augment import Augmentation, recolour, sample_draws, shape_draws
from .batches import Batch, Fault, add_faults, ahead, describe_faults, local_slice, order
from .cache import Scan, kept_scan
from .images import MAX_PIXELS, _check_interpolation, decode_crop, decode_square
from .index import known_sizes
from .pairs import Unreadable, captions_of, read_pair
from .patterns import expand, file_names
from .tars import samples_of as _scan_tar
from .text import Tokenizer

_SAID = 20  # warnings of what shards lack; thousands of them would hide the rest
_TRIES = 100  # unreadable samples in a row before a run gives up


def scan(path: Path, cache: Path | None = None) -> np.ndarray:
    """Where the samples of a tar lie. A warning says what is left out of it, each time.

    Returns:
        int64 [n, 5]: offset and size of the image, offset and size of the caption, and 1 where the
        caption is JSON. A tar that is cut short or broken within gives what is whole.

    Raises:
        ValueError: the file is not an uncompressed tar.
    """
    (rows, said), _ = _scan(path, cache)
    for sentence in said:
        warnings.warn(sentence, stacklevel=2)
    return rows


def _scan(path: Path, cache: Path | None) -> tuple[Scan, bool]:
    """The scan of a tar, and whether the cache holds it."""
    try:
        return kept_scan(path, _scan_tar, cache)
    except OSError as error:
        raise ValueError(f"shards: {path} must be a file that can be read, got {error}") from error


class ShardLoader(Dataset):
    """Iterates the batches of tar shards from `start_step` to `steps`; `loader[step]` is any one.

    Args:
        pattern: shard files, as `expand`. tokenizer: the text side.
        batch_size: samples of the global batch, over all processes.
        image_size: side of the images in pixels.
        context: tokens of a caption at most, special ones included.
        start_step, steps: the steps that are yielded, start_step to steps - 1.
        strategy, pad: how captions are cut and filled, as Tokenizer.encode.
        augmentation: strengths, as `decode_crop` and `recolour`; None is the plain crop.
        interpolation: "bilinear" (CLIPA-v2) or "bicubic" (CLIPA v1).
        max_pixels: of an image file; a larger one is a sample that cannot be read.
        seed: key of order, crops, colours and masks.
        rank, world_size: which share of the global batch this process takes.
        window: shards whose samples are mixed.
        workers: processes that make batches; 0 makes them here, `prefetch` ahead by a thread.
        cache: folder for the scans, as load_emoji.

    Raises:
        ValueError: a batch that is empty or does not divide by world_size, a rank outside it, a
            start after the end, a blend, a missing file, one that is not a tar, no sample in any;
            while iterating, 100 samples in a row that cannot be read.
    """

    def __init__(
        self,
        pattern: str | Path | Sequence[str | Path],
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
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window: int = 8,
        workers: int = 0,
        prefetch: int = 2,
        cache: Path | None = None,
    ) -> None:
        self.rows = local_slice(batch_size, rank, world_size, "ShardLoader")
        if not 0 <= start_step <= steps:
            raise ValueError(f"ShardLoader: start_step must be in [0, {steps}], got {start_step}")
        if image_size < 1:
            raise ValueError(f"ShardLoader: image_size must be at least 1 pixel, got {image_size}")
        if window < 1 or workers < 0 or prefetch < 0:
            raise ValueError(
                "ShardLoader: window must be at least 1, workers and prefetch at least 0, "
                f"got {window}, {workers}, {prefetch}"
            )
        _check_interpolation("ShardLoader", interpolation)
        augmentation = augmentation or Augmentation()
        if augmentation.blend:
            raise ValueError(
                "ShardLoader: augmentation must not blend, as a sample of a shard has one picture, "
                f"got blend {augmentation.blend}"
            )
        self.names, self.cache, self.window = file_names(pattern), cache, window
        self._held: dict[int, np.ndarray] = {}  # scans that the cache would not take
        self._scans: dict[int, np.ndarray] = {}  # a few of the others
        self._told: set[int] = set()  # shards whose faults have been told
        self.sizes = self._sizes()
        self.count = int(self.sizes.sum())
        if self.count == 0:
            raise ValueError(
                f"ShardLoader: shards must hold samples (an image and its .txt or .json), got none "
                f"in {len(self.names)} files, the first {self.names[0]}"
            )
        self.tokenizer, self.augmentation = tokenizer, augmentation
        self.batch_size, self.image_size, self.seed = batch_size, image_size, seed
        self.start_step, self.steps, self.interpolation = start_step, steps, interpolation
        self.max_pixels = max_pixels
        self.text = {"context": context, "strategy": strategy, "pad": pad}
        tokenizer.encode([], **self.text)  # what it refuses now would be each sample's fault later
        self.workers, self.prefetch = workers, prefetch
        self._mixed: dict[tuple[int, int], np.ndarray] = {}
        self._ends: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[Batch]:
        steps = range(self.start_step, self.steps)
        if self.workers:
            batches = DataLoader(
                _ErrorsAsValues(self),
                sampler=steps,
                batch_size=None,
                num_workers=self.workers,
                prefetch_factor=max(1, self.prefetch),
                worker_init_fn=_one_thread,
            )
        else:
            batches = ahead(self.__getitem__, steps, self.prefetch)
        skipped = 0
        for batch in batches:
            if isinstance(batch, ValueError):
                raise batch
            skipped += batch.skipped
            yield batch._replace(skipped=skipped)

    def __getitem__(self, step: int) -> Batch:
        """The batch of any step; `skipped` counts this batch alone."""
        first, count = self.rows.start, self.rows.stop - self.rows.start
        key = {"seed": self.seed, "step": step, "first_sample": first}
        draws = sample_draws(count, **key)
        shapes = shape_draws(count, self.augmentation, **key)
        for careful in (False, True):
            faults: dict[str, Fault] = {}
            rows = [
                self._readable(
                    first + row + step * self.batch_size,
                    draws[row],
                    None if shapes is None else shapes[row],
                    faults,
                    careful,
                )
                for row in range(count)
            ]
            images, captions = zip(*rows, strict=True)
            try:
                ids, ends, longest = self.tokenizer.encode(captions, **self.text, **key)
                break
            except Exception:  # a caption that has no ids; asked one by one it is told which
                if careful:
                    raise
        pixels = recolour(torch.stack(images), self.augmentation, **key)
        skipped = sum(fault.count for fault in faults.values())
        return Batch(pixels, ids, ends, longest, first, skipped, faults)

    def locate(self, place: int) -> tuple[int, int]:
        """Shard and row in it of the sample at a place of the endless stream of epochs."""
        epoch, place = divmod(place, self.count)
        shards, ends = self._epoch(epoch)
        window = int(ends.searchsorted(place, "right")) // self.window
        first = window * self.window
        start = int(ends[first - 1]) if first else 0
        end = int(ends[min(first + self.window, len(ends)) - 1])
        at = start + int(self._permuted(epoch, window, end - start)[place - start])
        shard = int(ends.searchsorted(at, "right"))
        return int(shards[shard]), at - (int(ends[shard - 1]) if shard else 0)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of an epoch's shards, and where each ends in the epoch's row of samples."""
        if epoch not in self._ends:
            while len(self._ends) > 1:
                self._ends.pop(next(iter(self._ends)), None)
            shards = self._permuted(epoch, -1, len(self.names))
            self._ends[epoch] = shards, self.sizes[shards].cumsum()
        return self._ends[epoch]

    def _permuted(self, epoch: int, window: int, count: int) -> np.ndarray:
        """The order of an epoch's shards (window -1) or of a window's samples; a few are kept."""
        key = (epoch, window)
        if key not in self._mixed:
            while len(self._mixed) > 6:
                self._mixed.pop(next(iter(self._mixed)), None)
            stream = WINDOW_STREAM + (window + 1) % 2**15
            self._mixed[key] = order(self.seed, epoch, count, stream=stream).numpy()
        return self._mixed[key]

    def _sizes(self) -> np.ndarray:
        """Samples of each shard; those that no table knows are counted, and told what they lack."""
        sizes, said = known_sizes(self.names), []
        for shard in np.flatnonzero(sizes < 0).tolist():
            sizes[shard] = len(self._first_scan(shard, said))
        _warn(said)
        return sizes

    def _first_scan(self, shard: int, said: list[str]) -> np.ndarray:
        """A shard's scan; `said` gains what is left out of the shard."""
        (rows, sentences), kept = _scan(Path(self.names[shard]), self.cache)
        said += sentences
        self._told.add(shard)
        if not kept:
            self._held[shard] = rows
        return rows

    def _scan_of(self, shard: int) -> np.ndarray:
        if shard in self._held:
            return self._held[shard]
        if shard not in self._scans:
            while len(self._scans) >= 2 * self.window:
                self._scans.pop(next(iter(self._scans)), None)
            (rows, said), _ = _scan(Path(self.names[shard]), self.cache)
            self._scans[shard] = rows
            if len(rows) != self.sizes[shard]:
                size, held = int(self.sizes[shard]), len(rows)
                must = f"must hold the {size} samples that its index says, got {held}"
                said = [*said, f"shards: {self.names[shard]} {must}; see python -m data.index"]
            if shard not in self._told:
                _warn(said)
                self._told.add(shard)
        return self._scans[shard]

    def _readable(
        self,
        place: int,
        draws: Tensor,
        shapes: Tensor | None,
        faults: dict[str, Fault],
        careful: bool,
    ) -> tuple[Tensor, str]:
        """The first readable sample at this row of this and the next batches; counts the others."""

        def decode(data: bytes) -> Tensor:
            how = self.augmentation, self.interpolation, shapes
            return decode_crop(data, self.image_size, draws, *how, max_pixels=self.max_pixels)

        for _ in range(_TRIES):
            try:
                return self._sample(place, decode, careful)
            except Unreadable as error:
                faults.update(add_faults(faults, {error.kind: Fault(1, str(error))}))
                last, place = error, place + self.batch_size
        raise ValueError(
            f"ShardLoader: one of {_TRIES} samples in a row must be readable, got none; {last}"
        )

    def _sample(
        self, place: int, decode: Callable[[bytes], Tensor], careful: bool
    ) -> tuple[Tensor, str]:
        shard, row = self.locate(place)
        path = Path(self.names[shard])
        try:
            rows = self._scan_of(shard)
            if row >= len(rows):
                raise ValueError(f"must hold {int(self.sizes[shard])} samples, got {len(rows)}")
            places = rows[row].tolist()
            with open(path, "rb") as file:
                image, caption = read_pair(file, path, places, decode)
        except (ValueError, IndexError, OSError) as error:  # the shard is gone or another
            raise Unreadable("shard", f"{path}: {error}") from error
        if careful:
            try:
                self.tokenizer.encode([caption], **self.text)
            except Exception as error:
                raise Unreadable("caption", f"{path}, {caption[:40]!r}: {error}") from error
        return image, caption


def _warn(said: list[str]) -> None:
    """What shards lack, as warnings of the line that makes a loader."""
    for sentence in said[:_SAID]:
        warnings.warn(sentence, stacklevel=3)
    if len(said) > _SAID:
        more = f"and {len(said) - _SAID} more such sentences, the last: {said[-1]}"
        warnings.warn(f"shards: {more}", stacklevel=3)


def _one_thread(worker: int) -> None:
    """Workers share the machine; a pool of threads in each would only fight."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def first_captions(pattern: str | Path | Sequence[str | Path], count: int = 100_000) -> list[str]:
    """Captions of the first samples, those that can be read: what a tokenizer may be trained on."""
    captions = []
    for file, path, row in _first_rows(pattern, count):
        with contextlib.suppress(Unreadable):
            captions.append(read_pair(file, path, row)[1])
    return captions


def read_pairs(
    pattern: str | Path | Sequence[str | Path],
    size: int,
    count: int = 10_000,
    *,
    squash: bool = False,
    interpolation: str = "bilinear",
) -> tuple[Tensor, list[list[str]], int]:
    """The first samples of shards for retrieval, images as `decode_square` makes them.

    A picture has all the captions that its .txt has lines, that its JSON lists, or that samples
    with the same image file have.

    Returns:
        uint8 [n, size, size, 3], each picture once; the captions of each; and how many samples
        could not be read: a warning says why, by kind.
    """
    images: list[Tensor] = []
    captions: list[list[str]] = []
    places: dict[bytes, int] = {}
    faults: dict[str, Fault] = {}

    def place_of(data: bytes) -> int:
        name = hashlib.sha256(data).digest()
        if name not in places:
            images.append(decode_square(data, size, squash=squash, interpolation=interpolation))
            captions.append([])
            places[name] = len(places)
        return places[name]

    for file, path, row in _first_rows(pattern, count):
        try:
            place, texts = read_pair(file, path, row, place_of, captions_of)
            captions[place] += texts
        except Unreadable as error:
            faults = add_faults(faults, {error.kind: Fault(1, str(error))})
    if faults:
        warnings.warn(f"shards: samples are left out: {describe_faults(faults)}", stacklevel=2)
    empty = torch.zeros(0, size, size, 3, dtype=torch.uint8)
    skipped = sum(fault.count for fault in faults.values())
    return torch.stack(images) if images else empty, captions, skipped


def _first_rows(
    pattern: str | Path | Sequence[str | Path], count: int
) -> Iterator[tuple[BinaryIO, Path, list[int]]]:
    """An open shard, its path and a row of its scan, for the first `count` samples in order."""
    for path in expand(pattern):
        rows = scan(path)[:count].tolist()
        count -= len(rows)
        with open(path, "rb") as file:
            yield from ((file, path, row) for row in rows)
        if count == 0:
            return


class _ErrorsAsValues(Dataset):
    """Batches for DataLoader's workers, which would make a traceback of a sentence."""

    def __init__(self, batches: Dataset) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Batch | ValueError:
        try:
            return self.batches[step]
        except ValueError as error:
            return ValueError(str(error))
