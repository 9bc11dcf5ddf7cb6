"""How many samples each shard holds: all that a run must know of its shards before it starts.

    python -m data.index "shards/{00000..41407}.tar"

writes sizes.json beside the shards, {"00000.tar": 9984, ...}, as open_clip reads it. A table that
is there already is read, and img2dataset's 00000_stats.json too; only what none of them tells, or
what is newer than its table, is counted, by several processes. A run that was stopped goes on.
"""

import contextlib
import json
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from .cache import kept_scan
from .files import write_whole
from .patterns import expand
from .tars import samples_of

TABLE = "sizes.json"
_EVERY = 60.0  # seconds between writes


def known_sizes(paths: Sequence[str | Path]) -> np.ndarray:
    """Samples of each shard by the tables beside it, int64 [n]; -1 where none tells.

    A shard that is newer than its table is not known by it, and a warning says so.

    Raises:
        ValueError: a table that is not JSON of file names and counts; names it.
    """
    tables: dict[str, dict[str, int]] = {}
    written: dict[str, float] = {}
    newer: dict[str, list[str]] = defaultdict(list)
    sizes = np.full(len(paths), -1, dtype=np.int64)
    for place, path in enumerate(paths):
        folder, name = os.path.split(path)
        if folder not in tables:
            tables[folder] = read_table(Path(folder))
            written[folder] = _time(os.path.join(folder, TABLE))
        sizes[place] = tables[folder].get(name, -1)
        if sizes[place] < 0:
            sizes[place] = _img2dataset(path)
        elif _time(path) > written[folder]:
            newer[folder].append(name)
            sizes[place] = -1
    for folder, names in newer.items():
        came = f"one older than {len(names)} of them, the first {names[0]}"
        warnings.warn(
            f"index: {os.path.join(folder, TABLE)} must be newer than its shards, got {came}; "
            "these are counted again (touch the table if it is right)",
            stacklevel=3,
        )
    return sizes


def _time(path: str | Path) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def read_table(folder: Path) -> dict[str, int]:
    """The folder's sizes.json; empty where there is none."""
    path = folder / TABLE
    if not path.is_file():
        return {}
    try:
        table = {str(name): int(size) for name, size in json.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        must = 'must be JSON as {"00000.tar": 9984}'
        raise ValueError(f"index: {path} {must}, got {str(error)[:100]}") from error
    if wrong := [name for name, size in table.items() if size < 0]:
        raise ValueError(f"index: {path} must hold no negative counts, got one of {wrong[0]}")
    return table


def _img2dataset(path: str | Path) -> int:
    """The samples that img2dataset says it put into a shard; -1 where it says nothing."""
    try:
        told = json.loads(Path(f"{os.path.splitext(path)[0]}_stats.json").read_bytes())
        return int(told["successes"])
    except (OSError, ValueError, TypeError, KeyError):
        return -1


def count(path: Path, cache: Path | None = None) -> int:
    """Samples that a shard holds, by its headers; the cache keeps where they lie."""
    return len(kept_scan(path, samples_of, cache)[0][0])


def write_tables(counted: Iterable[tuple[Path, int]]) -> list[Path]:
    """Put counts into the sizes.json of each shard's folder; those that could not be written."""
    tables: dict[Path, dict[str, int]] = defaultdict(dict)
    for path, size in counted:
        tables[path.parent][path.name] = int(size)
    refused = []
    for folder, table in tables.items():
        whole = dict(sorted((read_table(folder) | table).items()))
        try:
            with write_whole(folder / TABLE) as file:
                file.write(json.dumps(whole, indent=0).encode())
        except OSError:
            refused.append(folder / TABLE)
    return refused


@dataclass(frozen=True)
class Flags:
    """Count the samples of shards, and write sizes.json beside them."""

    pattern: tyro.conf.Positional[str]  # shards, "pairs/{0000..0099}.tar"
    processes: int = 0  # that count; 0: one a core
    again: bool = False  # count all, whatever is known


def main(argv: list[str] | None = None) -> None:
    """The program. A pattern or tar that will not do ends it with a sentence."""
    flags = tyro.cli(Flags, args=argv)
    try:
        total = index(flags.pattern, processes=flags.processes, again=flags.again)
    except (ValueError, OSError) as error:
        raise SystemExit(f"data.index: {error}") from error
    print(f"{total:,} samples")


def index(pattern: str, *, processes: int = 0, again: bool = False) -> int:
    """Count what is not known, write the tables, return the samples of all shards.

    What is counted is written every minute, so that a stop loses no more.
    """
    if processes < 0:
        raise ValueError(f"index: processes must be at least 0, got {processes}")
    paths = expand(pattern)
    sizes = np.full(len(paths), -1) if again else known_sizes(paths)
    unknown = np.flatnonzero(sizes < 0).tolist()
    todo = [paths[place] for place in unknown]
    fresh: list[tuple[Path, int]] = []
    due = time.monotonic() + _EVERY
    with contextlib.ExitStack() as stack:
        results: Iterable[int] = map(count, todo)
        workers = min(processes or os.cpu_count() or 1, len(todo))
        if workers > 1:
            results = stack.enter_context(ProcessPoolExecutor(workers)).map(count, todo)
        stack.callback(lambda: write_tables(fresh))  # whatever stops it
        bar = stack.enter_context(tqdm(results, total=len(todo), unit="shard", disable=not todo))
        for place, size in zip(unknown, bar, strict=True):
            sizes[place] = size
            fresh.append((paths[place], size))
            if time.monotonic() > due:
                _written(fresh)
                fresh, due = [], time.monotonic() + _EVERY
    _written(list(zip(paths, sizes.tolist(), strict=True)))
    return int(sizes.sum())


def _written(counted: list[tuple[Path, int]]) -> None:
    if refused := write_tables(counted):
        raise ValueError(f"index: {refused[0]} must be writable, got a folder that is not")


if __name__ == "__main__":
    main()
