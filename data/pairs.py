"""One sample of a shard: its image decoded, its caption as text, and whose fault it is if not."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from .images import TooManyPixels
from .tars import member_name
from .vocabularies import decoded

_CAPTION_BYTES = 2**24  # of a caption's file, which is read whole


class Unreadable(Exception):
    """A sample that cannot be read: the kind of reason, and where and why."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def read_pair(
    file: BinaryIO,
    path: Path,
    row: Sequence[int],
    decode: Callable[[bytes], Tensor] | None = None,
) -> tuple[Tensor | None, str]:
    """The decoded image (None, if not asked for) and the caption of a row of `scan`.

    Whatever reading them raises is the sample's fault, and is Unreadable.
    """
    at, size, text_at, text_size, is_json = row
    kind, place = "caption", text_at
    try:
        if text_size > _CAPTION_BYTES:
            raise ValueError(f"a caption's file must have at most 16 MiB, got {text_size} bytes")
        caption = _caption(_bytes(file, text_at, text_size), is_json)
        kind, place = "image", at
        return None if decode is None else decode(_bytes(file, at, size)), caption
    except Exception as error:
        if isinstance(error, TooManyPixels | OSError):
            kind = "image size" if isinstance(error, TooManyPixels) else "shard"
        text = f"{path}, {member_name(file, place)}: {str(error)[:200] or type(error).__name__}"
        raise Unreadable(kind, text) from error


def _bytes(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    data = file.read(size)
    if len(data) < size:
        raise OSError(f"the file must have {at + size} bytes, got {at + len(data)}")
    return data


def _caption(data: bytes, is_json: int) -> str:
    if not is_json:
        return decoded(data).strip()
    found = json.loads(data)  # of UTF-8, -16 or -32, with or without a byte order mark
    caption = found.get("caption") if isinstance(found, dict) else None
    if not isinstance(caption, str):
        raise ValueError("a sample's JSON must hold a caption, got none")
    return caption
