"""The user's cache folder, which keeps what can be made again: scans of tars and drawn pictures.

Each file is named by what it was made from, and checked when it is read: a damaged one is made
again. Where the folder cannot be written, a run works without it.
"""

import contextlib
import hashlib
import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from . import drawings
from .drawings import Drawings, Entry
from .files import write_whole

# Parts of the files' names: raise one when what is stored changes.
_SCAN_FORMAT = 4
_DRAWINGS_FORMAT = 1

Scan = tuple[np.ndarray, list[str]]  # rows, and what must be said of the tar each time


def cache_folder(cache: Path | None = None) -> Path:
    """Where files that can be made again lie: `cache`, $CLIPA_CACHE, or the user's cache folder."""
    if cache is not None:
        return Path(cache)
    if os.environ.get("CLIPA_CACHE"):
        return Path(os.environ["CLIPA_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "clipa-kernels"


def kept_scan(
    tar: Path, scan: Callable[[Path], Scan], cache: Path | None, kinds: Sequence[str] = ()
) -> tuple[Scan, bool]:
    """What `scan` finds in a tar of this name, size and time; and whether the cache holds it.

    Args:
        kinds: what else the scan depends on.

    Raises:
        OSError: the tar cannot be read; and whatever `scan` raises.
    """
    stat = tar.stat()
    key = f"{_SCAN_FORMAT} {tar.resolve()} {stat.st_size} {stat.st_mtime_ns} {';'.join(kinds)}"
    key = key.encode("utf-8", "surrogateescape")
    kept = cache_folder(cache) / "shards" / f"{hashlib.sha256(key).hexdigest()[:24]}.npy"
    with contextlib.suppress(Exception):  # it is missing, half written or another's
        return _read_scan(kept, key), True
    found = scan(tar)
    try:
        _write_scan(kept, key, found)
    except OSError:
        return found, False  # the next run scans again
    return found, True


def _checksum(key: bytes, rows: np.ndarray, said: list[str]) -> int:
    start = zlib.crc32(f"{rows.dtype} {rows.shape} {json.dumps(said)}".encode(), zlib.crc32(key))
    return zlib.crc32(rows.tobytes(), start)


def _write_scan(path: Path, key: bytes, found: Scan) -> None:
    """An .npy file with a line of JSON after it."""
    rows, said = found
    with write_whole(path) as file:
        np.save(file, rows)
        file.write(json.dumps({"checksum": _checksum(key, *found), "said": said}).encode())


def _read_scan(path: Path, key: bytes) -> Scan:
    with open(path, "rb") as file:
        rows = np.load(file, allow_pickle=False)
        rest = json.loads(file.read())
    if rest["checksum"] != _checksum(key, rows, rest["said"]):
        raise ValueError("scan: a kept scan must be what was written, got another")
    return rows, rest["said"]


def kept_drawings(cache: Path | None) -> Drawings:
    """The drawings of the installed packages, drawn where the cache does not hold them.

    Raises:
        RuntimeError: a package that holds drawings or names is not installed.
    """
    path = cache_folder(cache) / f"emoji-{_DRAWINGS_FORMAT}-{drawings.fingerprint()}.npz"
    try:
        return _read_drawings(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        warnings.warn(f"load_emoji: {path} is damaged and made again ({error})", stacklevel=3)
    found = drawings.draw_all()
    try:
        _write_drawings(path, found)
    except OSError as error:
        warnings.warn(f"load_emoji: {path.parent} must be writable, got {error}", stacklevel=3)
    return found


def _write_drawings(path: Path, found: Drawings) -> None:
    text = np.frombuffer(json.dumps(found.entries).encode(), dtype=np.uint8)
    with write_whole(path) as file:
        np.savez(file, images=found.images, owner=found.owner, entries=text)


def _read_drawings(path: Path) -> Drawings:
    with np.load(path, allow_pickle=False) as file:  # the zip's checksums find any damage
        images, owner = file["images"], file["owner"]
        entries = [
            Entry(emoji, name, tuple(keywords), group)
            for emoji, name, keywords, group in json.loads(file["entries"].tobytes())
        ]
    size = (drawings.SIZE, drawings.SIZE, 3)
    if images.shape != (len(owner), *size) or owner[:, 1].max() >= len(entries):
        raise ValueError(f"images {images.shape} for {len(entries)} entries")
    return Drawings(images, owner, entries)
