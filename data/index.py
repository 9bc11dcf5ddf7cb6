"""How many samples each shard holds: all that a run must know of its shards before it starts.

    python -m data.index "shards/{00000..41407}.tar"

writes sizes.json beside the shards, {"00000.tar": 9984, ...}, as open_clip reads it. A table that
is there already is read, and img2dataset's 00000_stats.json too; only what none of them tells, or
what is newer than its table, is counted, by several processes. A run that was stopped goes on. The
table of a folder or store that takes none is kept in the user's cache folder, and read from there.
"""

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

from .cache import cache_folder, kept_scan
from .files import write_whole
from .patterns import file_names
from .remote import is_remote, read_small, write_small
from .shelf import Shelf
from .tars import samples_of

TABLE = "sizes.json"
_EVERY = 60.0  # seconds between writes


class _Table(NamedTuple):
    """Counts by name, where they are written, and when they were."""

    path: str
    counts: dict[str, int]
    written: float


def known_sizes(names: Sequence[str | Path]) -> np.ndarray:
    """Samples of each shard by the tables beside it, int64 [n]; -1 where none tells.

    A shard that is newer than its table is not known by it, and a warning says so. (A remote one's
    time is not asked for: a run tells a wrong count when it opens the shard.)

    Raises:
        ValueError: a table that is not JSON of file names and counts; names it.
    """
    tables: dict[str, list[_Table]] = {}
    newer: dict[str, list[str]] = defaultdict(list)
    sizes = np.full(len(names), -1, dtype=np.int64)
    for place, name in enumerate(map(str, names)):
        folder, base = os.path.split(name)
        if folder not in tables:
            tables[folder] = [_beside(folder), _kept(folder)]
        stale = []
        for table in tables[folder]:
            if base in table.counts:
                if is_remote(name) or _time(name) <= table.written:
                    sizes[place] = table.counts[base]
                    break
                stale.append(table.path)
        else:
            if stale:
                newer[stale[0]].append(base)
            elif not is_remote(name):
                sizes[place] = _successes(_read(_stats(name)))
    asked = [place for place in np.flatnonzero(sizes < 0).tolist() if is_remote(str(names[place]))]
    told = map(_successes, read_small([_stats(str(names[place])) for place in asked]))
    if found := {place: size for place, size in zip(asked, told, strict=True) if size >= 0}:
        sizes[list(found)] = list(found.values())
        write_tables([(names[place], size) for place, size in found.items()], beside=False)
    for path, shards in newer.items():
        came = f"one older than {len(shards)} of them, the first {shards[0]}"
        warnings.warn(
            f"index: {path} must be newer than its shards, got {came}; these are counted again "
            "(touch the table if it is right)",
            stacklevel=3,
        )
    return sizes


def _time(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def _read(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except OSError:
        return None


def _beside(folder: str) -> _Table:
    path = f"{folder}/{TABLE}" if is_remote(folder) else os.path.join(folder, TABLE)
    return _Table(path, read_table(folder), _time(path))


def _kept(folder: str) -> _Table:
    """The table in the user's cache, of a folder that takes none."""
    name = folder if is_remote(folder) else os.path.abspath(folder)
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    path = cache_folder() / "sizes" / f"{digest}.json"
    try:
        return _Table(str(path), _parsed(path, _read(str(path))), _time(str(path)))
    except ValueError:  # it is broken, and made again
        return _Table(str(path), {}, 0.0)


def read_table(folder: str | Path) -> dict[str, int]:
    """The folder's sizes.json; empty where there is none."""
    if is_remote(str(folder)):
        url = f"{folder}/{TABLE}"
        return _parsed(url, read_small([url])[0])
    path = Path(folder, TABLE)
    try:
        return _parsed(path, path.read_bytes() if path.is_file() else None)
    except OSError as error:
        raise ValueError(f"index: {path} must be a file that can be read, got {error}") from error


def _parsed(path: str | Path, data: bytes | None) -> dict[str, int]:
    if data is None:
        return {}
    try:
        table = {str(name): int(size) for name, size in json.loads(data).items()}
    except (ValueError, TypeError, AttributeError) as error:
        must = 'must be JSON as {"00000.tar": 9984}'
        raise ValueError(f"index: {path} {must}, got {str(error)[:100]}") from error
    if wrong := [name for name, size in table.items() if size < 0]:
        raise ValueError(f"index: {path} must hold no negative counts, got one of {wrong[0]}")
    return table


def _stats(name: str) -> str:
    return f"{os.path.splitext(name)[0]}_stats.json"


def _successes(data: bytes | None) -> int:
    """The samples that img2dataset says it put into a shard; -1 where it says nothing."""
    try:
        return int(json.loads(data or b"")["successes"])
    except (ValueError, TypeError, KeyError):
        return -1


def count(name: str | Path, shelf: Shelf | None = None, cache: Path | None = None) -> int:
    """Samples that a shard holds, by its headers; the cache keeps where they lie."""
    shelf = shelf or Shelf(cache)
    try:
        return len(kept_scan(shelf.path(str(name)), samples_of, cache)[0][0])
    finally:
        shelf.keep()


def write_tables(counted: Iterable[tuple[str | Path, int]], *, beside: bool = True) -> list[str]:
    """Put counts into the sizes.json of each shard's folder; those that could not be written.

    Where a folder or store takes none, a warning says where in the user's cache its table is; all
    are kept there unless `beside`.
    """
    tables: dict[str, dict[str, int]] = defaultdict(dict)
    for name, size in counted:
        folder, base = os.path.split(str(name))
        tables[folder][base] = int(size)
    refused = []
    for folder, table in tables.items():
        if beside and _put(_beside(folder), table):
            continue
        own = _kept(folder)
        if not _put(own, table):
            refused.append(own.path)
        elif beside:
            warnings.warn(f"index: {folder} takes no table; it is kept as {own.path}", stacklevel=3)
    return refused


def _put(old: _Table, table: dict[str, int]) -> bool:
    """Write a table with more counts; whether it could be."""
    data = json.dumps(dict(sorted((old.counts | table).items())), indent=0).encode()
    try:
        if is_remote(old.path):
            write_small(old.path, data)
        else:
            with write_whole(old.path) as file:
                file.write(data)
        return True
    except OSError:
        return False


@dataclass(frozen=True)
class Flags:
    """Count the samples of shards, and write sizes.json beside them."""

    pattern: tyro.conf.Positional[str]  # shards, "pairs/{0000..0099}.tar"
    processes: int = 0  # that count; 0: one a core
    cache_gb: float = 100.0  # of remote shards that are kept here at most
    again: bool = False  # count all, whatever is known


def main(argv: list[str] | None = None) -> None:
    """The program. A pattern or tar that will not do ends it with a sentence."""
    flags = tyro.cli(Flags, args=argv)
    try:
        total = index(
            flags.pattern, processes=flags.processes, again=flags.again, cache_gb=flags.cache_gb
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"data.index: {error}") from error
    print(f"{total:,} samples")


def index(pattern: str, *, processes: int = 0, again: bool = False, cache_gb: float = 100.0) -> int:
    """Count what is not known, write the tables, return the samples of all shards.

    What is counted is written every minute, so that a stop loses no more.
    """
    if processes < 0:
        raise ValueError(f"index: processes must be at least 0, got {processes}")
    names = file_names(pattern)
    sizes = np.full(len(names), -1) if again else known_sizes(names)
    unknown = np.flatnonzero(sizes < 0).tolist()
    todo = [names[place] for place in unknown]
    fresh: list[tuple[str, int]] = []
    due = time.monotonic() + _EVERY
    counting = partial(count, shelf=Shelf(None, cache_gb))
    with contextlib.ExitStack() as stack:
        results: Iterable[int] = map(counting, todo)
        workers = min(processes or os.cpu_count() or 1, len(todo))
        if workers > 1:
            results = stack.enter_context(ProcessPoolExecutor(workers)).map(counting, todo)
        stack.callback(lambda: write_tables(fresh))  # whatever stops it
        bar = stack.enter_context(tqdm(results, total=len(todo), unit="shard", disable=not todo))
        for place, size in zip(unknown, bar, strict=True):
            sizes[place] = size
            fresh.append((names[place], size))
            if time.monotonic() > due:
                _written(fresh)
                fresh, due = [], time.monotonic() + _EVERY
    _written(list(zip(names, sizes.tolist(), strict=True)))
    return int(sizes.sum())


def _written(counted: list[tuple[str, int]]) -> None:
    if refused := write_tables(counted):
        raise ValueError(f"index: {refused[0]} must be writable, got a folder that is not")


if __name__ == "__main__":
    main()
