"""Shards written once more with small pictures, for the stages that train small.

    python -m data.shrink "shards/{00000..00099}.tar" small --side 128

Pictures become JPEGs whose shorter side has that many pixels, upright, their aspect kept; captions,
names and order stay. A picture that cannot be read, or is small already, is copied as it is. Shards
are written whole, so a run that was stopped goes on with those that are missing.
"""

import io
import os
import tarfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import tyro
from tqdm import tqdm

from .files import write_whole
from .images import shrunk
from .index import TABLE, count, write_tables
from .patterns import file_names
from .remote import base_name
from .shelf import Shelf
from .tars import IMAGES


class Shrunk(NamedTuple):
    """Of a shard: bytes before and after, pictures that could not be read, what else is said."""

    before: int
    after: int
    unread: int
    said: str


def shrink(name: str, folder: Path, side: int, quality: int, shelf: Shelf) -> Shrunk:
    """Write a shard's small copy, of the same name, into a folder.

    Raises:
        ValueError: the file is not an uncompressed tar, or cannot be fetched.
    """
    try:
        return _shrink(shelf.path(name), folder / base_name(name), side, quality)
    finally:
        shelf.keep()


def _shrink(path: Path, target: Path, side: int, quality: int) -> Shrunk:
    unread, said = 0, ""
    try:
        with (
            tarfile.open(path, "r:") as tar,
            write_whole(target) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as out,
        ):
            try:
                for member in tar:
                    held = tar.extractfile(member) if member.isfile() else None
                    data = held.read() if held else b""
                    if held and len(data) < member.size:
                        raise tarfile.ReadError(f"{member.name} is cut off")
                    stem, _, extension = member.name.rpartition(".")
                    if held and extension.lower() in IMAGES:
                        try:
                            small = shrunk(data, side, quality)
                        except ValueError:
                            small, unread = None, unread + 1
                        if small is not None:
                            data, member.name = small, f"{stem}.jpg"
                            member.pax_headers = {}
                    member.size = len(data)
                    out.addfile(member, io.BytesIO(data))
            except (tarfile.ReadError, EOFError) as error:
                said = f"{path} is read up to its damage ({error})"
    except tarfile.ReadError as error:
        raise ValueError(f"shrink: {path} must be an uncompressed tar, got {error}") from error
    return Shrunk(path.stat().st_size, target.stat().st_size, unread, said)


@dataclass(frozen=True)
class Flags:
    """Write shards once more with small pictures."""

    pattern: tyro.conf.Positional[str]  # shards, "pairs/{0000..0099}.tar"
    folder: tyro.conf.Positional[str]  # of the small shards
    side: int = 128  # pixels of the shorter side
    quality: int = 90  # of JPEG
    processes: int = 0  # that work; 0: one a core
    cache_gb: float = 100.0  # of remote shards that are kept here at most


def main(argv: list[str] | None = None) -> None:
    """The program. What will not do ends it with a sentence."""
    flags = tyro.cli(Flags, args=argv)
    try:
        print(_all(flags))
    except (ValueError, OSError) as error:
        raise SystemExit(f"data.shrink: {error}") from error


def _all(flags: Flags) -> str:
    for name, least, most in (("side", 1, 4096), ("quality", 1, 100), ("processes", 0, 4096)):
        if not least <= (value := getattr(flags, name)) <= most:
            raise ValueError(f"shrink: {name} must be in [{least}, {most}], got {value}")
    names, folder = file_names(flags.pattern), Path(flags.folder)
    small = [folder / base_name(name) for name in names]
    if len({*small}) < len(names):
        raise ValueError("shrink: shards must have names of their own, got two of one name")
    if any(Path(name).parent.resolve() == folder.resolve() for name in names):
        raise ValueError(f"shrink: the folder must be another than the shards', got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    todo = [name for name, path in zip(names, small, strict=True) if not path.exists()]
    how = dict(folder=folder, side=flags.side, quality=flags.quality)
    work = partial(shrink, **how, shelf=Shelf(None, flags.cache_gb))
    done = []
    workers = max(1, min(flags.processes or os.cpu_count() or 1, len(todo)))
    with ProcessPoolExecutor(workers) as pool:
        for one in tqdm(pool.map(work, todo), total=len(todo), unit="shard", disable=not todo):
            done.append(one)
            if one.said:
                warnings.warn(f"shrink: {one.said}", stacklevel=2)
    refused = write_tables((path, count(path)) for path in small)
    before, after, unread = (sum(getattr(one, n) for one in done) for n in Shrunk._fields[:3])
    left = f"; {unread:,} pictures could not be read" if unread else ""
    table = "" if refused else f", and {TABLE},"
    return f"{len(done)} shards{table} in {folder}: {before:,} to {after:,} bytes{left}"


if __name__ == "__main__":
    main()
