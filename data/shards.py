"""WebDataset tar shards as batches, in an order that is a pure function of (seed, step).

A shard is an uncompressed tar; members that share the name up to the first dot are a sample:
`000012.jpg` (jpeg, png, webp) with `000012.txt` or `000012.json` (its "caption"). Each tar is
scanned once for the offsets of its members, the scan is kept in the user's cache folder, and from
then on any sample is one seek away: a run resumes at step k without reading what came before.

An epoch permutes the shards, then the samples inside each window of `window` neighbouring shards,
so that only so many files are read at a time. A sample that cannot be read is counted and replaced
by the one that stands at the same row of the next batch, and so on: the same one on every run.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augment import Augmentation, recolour, sample_draws
from .emoji import cache_folder
from .images import decode_crop, decode_square
from .loader import Batch, ahead, local_slice, order
from .text import Tokenizer

WINDOW_STREAM = 5
_IMAGES = ("jpg", "jpeg", "png", "webp")
_CAPTIONS = ("txt", "json")
_TRIES = 100  # unreadable samples in a row before a run gives up
_FORMAT = 1  # part of the scan's name: raise it when what is stored changes


def expand(pattern: str | Path | Sequence[str | Path]) -> list[Path]:
    """Shard files of a pattern: braces `{000..127}` and `{a,b}`, stars, or a list of such.

    Raises:
        ValueError: a name matches no file.

    >>> expand("shards/{00..02}.tar")
    Traceback (most recent call last):
    ValueError: shards: pattern must name files that are there, got 'shards/00.tar'
    """
    if isinstance(pattern, str | Path):
        pattern = [pattern]
    found = []
    for one in pattern:
        for name in _braces(str(one)):
            matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
            if not matches or not all(os.path.isfile(match) for match in matches):
                raise ValueError(f"shards: pattern must name files that are there, got {name!r}")
            found += matches
    if not found:
        raise ValueError("shards: pattern must name at least one file, got none")
    return [Path(name) for name in found]


def _braces(text: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", text)
    if not match:
        return [text]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        first, last = int(span[1]), int(span[2])
        parts = [str(number).zfill(len(span[1])) for number in range(first, last + 1)]
    else:
        parts = match[1].split(",")
    head, tail = text[: match.start()], text[match.end() :]
    return [head + part + rest for part in parts for rest in _braces(tail)]


def scan(path: Path, cache: Path | None = None) -> np.ndarray:
    """Where the samples of a tar lie.

    Returns:
        int64 [n, 5]: offset and size of the image, offset and size of the caption, and 1 where the
        caption is JSON. A tar that is cut short gives its whole samples and a warning.

    Raises:
        ValueError: the file is no uncompressed tar.
    """
    stat = path.stat()
    key = f"{_FORMAT} {path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    kept = cache_folder(cache) / "shards" / f"{name}.npy"
    try:
        rows = np.load(kept, mmap_mode="r", allow_pickle=False)  # shared by the processes
        if rows.ndim == 2 and rows.shape[1] == 5 and rows.dtype == np.int64:
            return rows
    except (OSError, ValueError, EOFError):
        pass
    rows = _scan_tar(path)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}.part")
        with open(part, "wb") as file:
            np.save(file, rows)
        os.replace(part, kept)
    except OSError:
        pass  # no cache: the next run scans again
    return rows


def _scan_tar(path: Path) -> np.ndarray:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, base = os.path.split(member.name)
                stem, _, extension = base.partition(".")
                if member.isfile() and stem:
                    parts = samples.setdefault(f"{folder}/{stem}", {})
                    parts[extension.lower()] = (member.offset_data, member.size)
    except tarfile.ReadError as error:
        if not samples:
            raise ValueError(f"shards: {path} must be an uncompressed tar, got {error}") from error
        warnings.warn(f"shards: {path} is cut short ({error})", stacklevel=4)
    end, rows = path.stat().st_size, []
    for parts in samples.values():
        image = next((parts[name] for name in _IMAGES if name in parts), None)
        kind = next((name for name in _CAPTIONS if name in parts), None)
        if image and kind and sum(image) <= end and sum(parts[kind]) <= end:
            rows.append((*image, *parts[kind], int(kind == "json")))
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


class ShardLoader(Dataset):
    """Iterates the batches of tar shards from `start_step` to `steps`; `loader[step]` is any one.

    Args:
        pattern: shard files, as `expand`. tokenizer: the text side.
        batch_size: samples of the global batch, over all processes.
        image_size: side of the images in pixels.
        context: tokens of a caption at most, special ones included.
        steps, start_step: first step that is not, and first that is, yielded.
        strategy, pad: how captions are cut and filled, as Tokenizer.encode.
        augmentation: its crop, flip and colours; None is the plain crop. interpolation: "bilinear"
            (CLIPA-v2) or "bicubic" (CLIPA v1).
        seed: key of order, crops, colours and masks.
        rank, world_size: which share of the global batch this process takes.
        window: shards whose samples are mixed.
        workers: processes that make batches; 0 makes them here, `prefetch` ahead by a thread.
        cache: folder for the scans, as load_emoji.

    Raises:
        ValueError: a batch that is empty or does not divide by world_size, a rank that is none, a
            start after the end, a missing file, one that is no tar, no sample in any.
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
        self.paths = expand(pattern)
        self.scans = [scan(path, cache) for path in self.paths]
        self.sizes = torch.tensor([len(rows) for rows in self.scans])
        self.count = int(self.sizes.sum())
        if self.count == 0:
            raise ValueError(
                f"ShardLoader: shards must hold samples (an image and its .txt or .json), got none "
                f"in {len(self.paths)} files"
            )
        self.tokenizer, self.augmentation = tokenizer, augmentation or Augmentation()
        self.batch_size, self.image_size, self.seed = batch_size, image_size, seed
        self.start_step, self.steps, self.interpolation = start_step, steps, interpolation
        self.text = {"context": context, "strategy": strategy, "pad": pad}
        self.window, self.workers, self.prefetch = window, workers, prefetch
        self._mixed: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[Batch]:
        steps = range(self.start_step, self.steps)
        if self.workers:
            batches = DataLoader(
                self,
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
            skipped += batch.skipped
            yield batch._replace(skipped=skipped)

    def __getitem__(self, step: int) -> Batch:
        """The batch of any step; `skipped` counts this batch alone."""
        first = self.rows.start
        key = {"seed": self.seed, "step": step, "first_sample": first}
        draws = sample_draws(self.rows.stop - first, **key)
        places = torch.arange(first, self.rows.stop) + step * self.batch_size
        images, captions, skipped = [], [], 0
        for place, draw in zip(places.tolist(), draws, strict=True):
            for again in range(_TRIES):
                try:
                    image, caption = self._sample(place + again * self.batch_size, draw)
                    break
                except (ValueError, OSError) as error:
                    skipped, last = skipped + 1, error
            else:
                raise RuntimeError(
                    f"ShardLoader: one of {_TRIES} samples in a row must be readable, got {last}"
                )
            images.append(image)
            captions.append(caption)
        pixels = recolour(torch.stack(images), self.augmentation, **key)
        ids, cu_seqlens, max_seqlen = self.tokenizer.encode(captions, **self.text, **key)
        return Batch(pixels, ids, cu_seqlens, max_seqlen, first, skipped)

    def locate(self, place: int) -> tuple[int, int]:
        """Shard and row in it of the sample at a place of the endless stream of epochs."""
        epoch, place = divmod(place, self.count)
        shards = self._permuted(epoch, -1, len(self.paths))
        ends = self.sizes[shards].cumsum(0)
        last_of_window = torch.arange(self.window, len(shards) + self.window, self.window) - 1
        window_ends = ends[last_of_window.clamp(max=len(shards) - 1)]
        window = int(torch.searchsorted(window_ends, place, right=True))
        start = int(window_ends[window - 1]) if window else 0
        mixed = self._permuted(epoch, window, int(window_ends[window]) - start)
        at = start + int(mixed[place - start])
        shard = int(torch.searchsorted(ends, at, right=True))
        row = at - int(ends[shard - 1]) if shard else at
        return int(shards[shard]), row

    def _permuted(self, epoch: int, window: int, count: int) -> Tensor:
        """The order of an epoch's shards (window -1) or of a window's samples; a few are kept."""
        key = (epoch, window)
        if key not in self._mixed:
            while len(self._mixed) > 6:
                self._mixed.pop(next(iter(self._mixed)), None)
            stream = WINDOW_STREAM + (window + 1) % 2**15
            self._mixed[key] = order(self.seed, epoch, count, stream=stream)
        return self._mixed[key]

    def _sample(self, place: int, draws: Tensor) -> tuple[Tensor, str]:
        shard, row = self.locate(place)
        with open(self.paths[shard], "rb") as file:
            data, caption = _read_pair(file, self.scans[shard][row].tolist())
        how = self.augmentation
        return decode_crop(data, self.image_size, draws, how, self.interpolation), caption


def _read_pair(file: BinaryIO, row: Sequence[int], with_image: bool = True) -> tuple[bytes, str]:
    """The image file's bytes (none, if not asked for) and the caption of a row of `scan`."""
    caption = _read_caption(file, row)
    if not isinstance(caption, str):
        came = "none" if caption is None else f"a {type(caption).__name__}"
        raise ValueError(f"shards: a sample's JSON must hold a caption, got {came}")
    return _read_image(file, row) if with_image else b"", caption


def _read_caption(file: BinaryIO, row: Sequence[int]) -> object:
    """What a row's .txt holds, or what its .json holds as "caption"; None if that is missing."""
    file.seek(row[2])
    caption = file.read(row[3]).decode("utf-8").strip()  # UnicodeDecodeError is a ValueError
    if not row[4]:
        return caption
    found = json.loads(caption)  # so is JSONDecodeError
    return found.get("caption") if isinstance(found, dict) else None


def _read_captions(file: BinaryIO, row: Sequence[int]) -> list[str]:
    """A row's captions for retrieval: the lines of its .txt, or the text or texts of its JSON."""
    found = _read_caption(file, row)
    if isinstance(found, str):
        found = [found] if row[4] else found.split("\n")
    texts = found if isinstance(found, list) else []
    captions = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not captions:
        raise ValueError("shards: a sample must hold a caption, got none")
    "".join(captions).encode()  # half a surrogate pair is a ValueError
    return captions


def _read_image(file: BinaryIO, row: Sequence[int]) -> bytes:
    file.seek(row[0])
    return file.read(row[1])


def _one_thread(worker: int) -> None:
    """Workers share the machine; a pool of threads in each would only fight."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def first_captions(pattern: str | Path | Sequence[str | Path], count: int = 100_000) -> list[str]:
    """Captions of the first samples, those that can be read: what a tokenizer may be trained on."""
    captions = []
    for file, row in _first_rows(pattern, count):
        with contextlib.suppress(ValueError):
            captions.append(_read_pair(file, row, with_image=False)[1])
    return captions


def read_pairs(
    pattern: str | Path | Sequence[str | Path], size: int, count: int = 10_000
) -> tuple[Tensor, list[list[str]], int]:
    """The first samples of shards for retrieval: images squashed to a side of `size` pixels.

    A picture has all the captions that its .txt has lines, that its JSON lists, or that samples
    with the same image file have.

    Returns:
        uint8 [n, size, size, 3], each picture once; the captions of each; and how many samples
        could not be read.
    """
    images: list[Tensor] = []
    captions: list[list[str]] = []
    places: dict[bytes, int] = {}
    skipped = 0
    for file, row in _first_rows(pattern, count):
        try:
            texts, data = _read_captions(file, row), _read_image(file, row)
            name = hashlib.sha256(data).digest()
            if name not in places:
                images.append(decode_square(data, size, squash=True))
                places[name] = len(captions)
                captions.append([])
            captions[places[name]] += texts
        except Exception:  # whatever one sample raises is that sample's fault
            skipped += 1
    empty = torch.zeros(0, size, size, 3, dtype=torch.uint8)
    return torch.stack(images) if images else empty, captions, skipped


def _first_rows(
    pattern: str | Path | Sequence[str | Path], count: int
) -> Iterator[tuple[BinaryIO, list[int]]]:
    """An open shard and a row of its scan, for the first `count` samples in the shards' order."""
    for path in expand(pattern):
        rows = scan(path)[:count].tolist()
        count -= len(rows)
        with open(path, "rb") as file:
            yield from ((file, row) for row in rows)
        if count == 0:
            return
