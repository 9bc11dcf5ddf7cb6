"""Where the samples of a tar lie, read from its headers alone and past what is broken in it.

Members that share the name up to the first dot are a sample, adjacent or not. A member whose
extension its sample has already starts another sample of that name, as webdataset does. Extensions
are read in lower case. A hard or symbolic link is the file of this tar that it names.

Where a header is broken, or zeros stand that do not end the file, reading goes on at the next
header whose checksum is right, wherever it begins. Whatever is left out is reported.
"""

import io
import os
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

# Extensions that are read, the first of them where a sample has several.
IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")
_BLOCK = tarfile.BLOCKSIZE
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}

_Lost = dict[str, list[str]]  # what is left out: of each kind, where
_Parts = dict[str, tuple[int, int] | None]  # a sample's files by extension: offset and size


def samples_of(path: Path, kinds: Sequence[str] = CAPTIONS) -> tuple[np.ndarray, list[str]]:
    """The rows of `scan` for one tar, and a sentence for each kind of thing that is left out.

    Args:
        kinds: extensions of captions.

    Raises:
        ValueError: the file is not an uncompressed tar. OSError: it cannot be read.
    """
    end, lost = path.stat().st_size, {}
    places: dict[str, tuple[int, int]] = {}
    samples: list[tuple[str, _Parts]] = []
    newest: dict[str, _Parts] = {}
    links: list[tuple[_Parts, str, str, str]] = []
    with open(path, "rb") as file:
        _refuse_packed(path, file.read(8))
        for member in _members(file, end, lost):
            name = member.name.removeprefix("./")
            linked = member.islnk() or member.issym()
            if member.issparse():
                lost.setdefault("has sparse members, which are not read", []).append(name)
            if member.issparse() or not (member.isfile() or linked):
                continue
            target = _target(name, member) if linked else ""
            # A hard link is to what came before; a symbolic one may be to what comes after.
            place = None if member.issym() else (member.offset_data, member.size)
            place = places.get(target) if member.islnk() else place
            if place:
                places[name] = place
            folder, base = os.path.split(member.name)
            stem, _, extension = base.partition(".")
            if stem:
                key, extension = f"{folder}/{stem}", extension.lower()
                parts = newest.get(key)
                if parts is None or extension in parts:
                    parts = newest[key] = {}
                    samples.append((name, parts))
                parts[extension] = place
                if place is None:
                    links.append((parts, extension, name, target))
    if not newest and lost:
        raise ValueError(f"shards: {path} must be an uncompressed tar, got one that {_told(lost)}")
    _follow(links, places, lost)
    for name, parts in samples:
        image, caption = (any(map(parts.__contains__, each)) for each in (IMAGES, kinds))
        if image != caption:
            kind = "images without a caption" if image else "captions without an image"
            lost.setdefault(f"has {kind}", []).append(name)
    rows = [row for _, parts in samples if (row := _row(parts, end, kinds))]
    said = [f"shards: {path} {_told({kind: where})}" for kind, where in lost.items()]
    return np.array(rows, dtype=np.int64).reshape(-1, 2 + 2 * len(kinds)), said


def member_name(file: BinaryIO, at: int) -> str:
    """The name in the header before the data at byte `at`; long ones as tar cuts them."""
    try:
        file.seek(at - _BLOCK)
        return tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "replace").name
    except (tarfile.TarError, ValueError, OSError):
        return f"the file at byte {at}"


def _refuse_packed(path: Path, start: bytes) -> None:
    for magic, name in _PACKED.items():
        if start.startswith(magic):
            raise ValueError(f"shards: {path} must be an uncompressed tar, got {name}")


def _members(file: BinaryIO, end: int, lost: _Lost) -> Iterator[tarfile.TarInfo]:
    """The members in order, past broken headers; `lost` gains what cannot be read."""
    # TarFile refuses a file whose first header is broken; made of an empty archive, it reads on.
    tar = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * _BLOCK)))
    tar.fileobj, tar.offset = file, 0
    while True:
        start, member, kind = tar.offset, None, "has broken headers"
        file.seek(start)
        try:
            member = tarfile.TarInfo.fromtarfile(tar)
        except tarfile.EOFHeaderError:
            kind = "has zeros amid its members"
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):
            lost["is cut short"] = [f"in a header at byte {start}"]
            return
        except Exception:  # whatever a broken header makes tarfile raise
            pass
        if member is not None and tar.offset > start:
            yield member
            if tar.offset > end:
                lost["is cut short"] = [f"in {member.name}"]
                return
            continue
        after = _next_header(file, start + 1, end)
        if after is not None or kind == "has broken headers":
            stop = end if after is None else after
            lost.setdefault(kind, []).append(f"bytes {start} to {stop} are left out")
        if after is None:
            return
        tar.offset = after


def _next_header(file: BinaryIO, start: int, end: int) -> int | None:
    """Where the next header with a right checksum begins, from a byte on; None: nowhere."""
    magic, step = 257, 1 << 20  # "ustar" stands at byte 257 of a header
    for base in range(start, end, step):
        file.seek(base)
        data = file.read(step + _BLOCK)
        found = data.find(b"ustar", magic)
        while 0 <= found < step + magic:
            at = found - magic
            try:
                tarfile.TarInfo.frombuf(data[at : at + _BLOCK], "utf-8", "surrogateescape")
                return base + at
            except (tarfile.TarError, ValueError):
                found = data.find(b"ustar", found + 1)
    return None


def _target(name: str, member: tarfile.TarInfo) -> str:
    """The name of what a link is to; a symbolic one counts from its own folder."""
    folder = posixpath.dirname(name) if member.issym() else ""
    return posixpath.normpath(posixpath.join(folder, member.linkname))


def _follow(
    links: list[tuple[_Parts, str, str, str]], places: dict[str, tuple[int, int]], lost: _Lost
) -> None:
    """Give links the place of what they name, through other links too."""
    while links:
        for parts, extension, name, target in links:
            if target in places:
                parts[extension] = places[name] = places[target]
        left = [link for link in links if link[0][link[1]] is None]
        if len(left) == len(links):
            lost["has links to what is not in it"] = [f"{link[2]} to {link[3]}" for link in left]
            return
        links = left


def _row(parts: _Parts, end: int, kinds: Sequence[str]) -> tuple[int, ...] | None:
    """The row of a sample with an image and at least one caption that are not cut off."""
    image = next((parts[name] for name in IMAGES if parts.get(name)), None)
    whole = [place if (place := parts.get(kind)) and sum(place) <= end else None for kind in kinds]
    if image is None or sum(image) > end or not any(whole):
        return None
    return sum((place or (0, -1) for place in whole), image)


def _told(lost: _Lost) -> str:
    """What is lost in words: of each kind the number and the first."""
    return "; ".join(
        f"{kind} ({f'{len(where)}, first: ' if len(where) > 1 else ''}{where[0]})"
        for kind, where in lost.items()
    )
