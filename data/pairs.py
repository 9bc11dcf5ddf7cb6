"""One sample of a shard: its image decoded, its caption as text, and whose fault it is if not."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .files import decoded, whole
from .images import TooManyPixels
from .tars import member_name

_CAPTION_BYTES = 2**24  # of a caption's file, which is read whole


class Unreadable(Exception):
    """A sample that cannot be read: the kind of reason, and where and why."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def caption_of(data: bytes, is_json: int) -> str:
    """The caption in a .txt or .json file's bytes, for training."""
    found = _found(data, is_json)
    if not isinstance(found, str):
        came = "none" if found is None else f"a {type(found).__name__}"
        raise ValueError(f"a sample's JSON must hold a caption, got {came}")
    return found


def captions_of(data: bytes, is_json: int) -> list[str]:
    """All captions for retrieval: the lines of a .txt, or the text or texts of a .json."""
    found = _found(data, is_json)
    if isinstance(found, str):
        found = [found] if is_json else found.split("\n")
    texts = found if isinstance(found, list) else []
    captions = [whole(text.strip()) for text in texts if isinstance(text, str) and text.strip()]
    if not captions:
        raise ValueError("a sample must hold a caption, got none")
    return captions


def _found(data: bytes, is_json: int) -> object:
    """What a .txt holds, or what a .json holds as "caption"; None if that is missing."""
    if not is_json:
        return decoded(data).strip()
    found = json.loads(data)  # of UTF-8, -16 or -32, with or without a byte order mark
    return found.get("caption") if isinstance(found, dict) else None


def read_pair(
    file: BinaryIO,
    path: Path,
    row: Sequence[int],
    decode: Callable[[bytes], Any] | None = None,
    captions: Callable[[bytes, int], Any] = caption_of,
) -> tuple[Any, Any]:
    """What `decode` makes of the image file (None: it is not read), and `captions` of the text's.

    Whatever reading them raises is the sample's fault, and is Unreadable.
    """
    at, size, text_at, text_size, is_json = row
    kind, place = "caption", text_at
    try:
        if text_size > _CAPTION_BYTES:
            raise ValueError(f"a caption's file must have at most 16 MiB, got {text_size} bytes")
        found = captions(_bytes(file, text_at, text_size), is_json)
        kind, place = "image", at
        return None if decode is None else decode(_bytes(file, at, size)), found
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
