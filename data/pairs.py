"""One sample of a shard: its image decoded, its caption as text, and whose fault it is if not."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from .files import decoded, whole
from .images import TooManyPixels
from .tars import CAPTIONS, member_name

_CAPTION_BYTES = 2**24  # of a caption's file, which is read whole


class Unreadable(Exception):
    """A sample that cannot be read: the kind of reason, and where and why."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True)
class Captions:
    """Which caption of a sample is read.

    Args:
        keys: each an extension (the sample's .txt, .syn.txt ...), or where the sample has no such
            file a key of its .json.
        weights: how often a sample draws each key; () takes the first. Where a sample lacks what it
            draws, it takes the next key in turn.

    Raises:
        ValueError: no key, or not one weight of at least 0 a key, one of them above it.
    """

    keys: tuple[str, ...] = ("txt", "caption")
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.keys or not all(self.keys) or len({*self.keys}) < len(self.keys):
            raise ValueError(f"captions: keys must be words, each once, got {self.keys}")
        if self.weights and (
            len(self.weights) != len(self.keys)
            or not all(0 <= weight < float("inf") for weight in self.weights)
            or not sum(self.weights)
        ):
            must = f"be {len(self.keys)} numbers of at least 0, one for each key, not all 0"
            raise ValueError(f"captions: weights must {must}, got {self.weights}")

    @classmethod
    def parse(cls, keys: str = "", weights: str = "") -> "Captions":
        """Of the flags' form.

        >>> Captions.parse("caption;synthetic", "1;3")
        Captions(keys=('caption', 'synthetic'), weights=(1.0, 3.0))
        """
        try:
            numbers = tuple(float(one) for one in weights.split(";")) if weights else ()
        except ValueError as error:
            must = "be numbers, as 1;3"
            raise ValueError(f"captions: weights must {must}, got {weights!r}") from error
        names = tuple(one.strip() for one in keys.split(";")) if keys else cls.keys
        return cls(names, numbers)

    def for_retrieval(self) -> "Captions":
        """These keys, then the usual ones: a set to evaluate may have neither of training's."""
        return Captions((*self.keys, *(key for key in Captions.keys if key not in self.keys)))

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The extensions that may hold one; "caption" is a .json's own word."""
        further = (key.lower() for key in self.keys)
        return (*CAPTIONS, *(key for key in further if key not in (*CAPTIONS, "caption")))

    def start(self, draw: float) -> int:
        """The key that a uniform number in [0, 1) draws."""
        left = draw * sum(self.weights)
        for number, weight in enumerate(self.weights):
            left -= weight
            if left < 0:
                return number
        return max((n for n, weight in enumerate(self.weights) if weight), default=0)


USUAL = Captions()  # the .txt, else the .json's "caption"


class Files:
    """The caption files of one sample, each read when it is asked for."""

    def __init__(self, file: BinaryIO, row: Sequence[int], kinds: Sequence[str]) -> None:
        self._file, self.at = file, row[2]
        places = zip(row[2::2], row[3::2], strict=True)
        self._places = {k: p for k, p in zip(kinds, places, strict=True) if p[1] >= 0}

    def read(self, kind: str) -> bytes:
        """The bytes of the file with an extension."""
        self.at, size = self._places[kind]
        if size > _CAPTION_BYTES:
            raise ValueError(f"a caption's file must have at most 16 MiB, got {size} bytes")
        return _bytes(self._file, self.at, size)

    @property
    def keys(self) -> set[str]:
        """All that `found` would find."""
        texts = {key for key, value in self.json.items() if isinstance(value, str)}
        return texts | self._places.keys() - {"json"}

    @cached_property
    def json(self) -> dict[str, object]:
        """What the .json holds: of UTF-8, -16 or -32, with or without a byte order mark."""
        found = json.loads(self.read("json")) if "json" in self._places else {}
        return found if isinstance(found, dict) else {}

    def is_text(self, key: str) -> bool:
        """Whether a key is the extension of a file that the sample has."""
        return key.lower() in self._places and key.lower() != "json"

    def found(self, key: str) -> object:
        """What a key gives, None if it is missing."""
        return decoded(self.read(key.lower())).strip() if self.is_text(key) else self.json.get(key)


def caption_of(files: Files, captions: Captions, draw: float = 0.0) -> str:
    """The caption for training."""
    start, count = captions.start(draw), len(captions.keys)
    came: object = None
    for turn in range(count):
        found = files.found(captions.keys[(start + turn) % count])
        if isinstance(found, str) and (found or turn == count - 1):
            return found
        came = came if found is None else found
    if came == "":
        return ""
    word = "none" if came is None else f"a {type(came).__name__}"
    raise ValueError(f"a sample must hold a caption as {' or '.join(captions.keys)}, got {word}")


def drawn_of(files: Files, captions: Captions, draw: float = 0.0) -> list[str]:
    """All captions that training may draw."""
    texts = map(files.found, captions.keys)
    return [text for text in texts if isinstance(text, str) and text]


def captions_of(files: Files, captions: Captions, draw: float = 0.0) -> list[str]:
    """All captions for retrieval: of the first key that has any, a text file's lines, or the text
    or texts of a .json."""
    for key in captions.keys:
        found = files.found(key)
        if isinstance(found, str):
            found = found.split("\n") if files.is_text(key) else [found]
        texts = found if isinstance(found, list) else []
        good = [whole(text.strip()) for text in texts if isinstance(text, str) and text.strip()]
        if good:
            return good
    raise ValueError(f"a sample must hold a caption as {' or '.join(captions.keys)}, got none")


def read_pair(
    file: BinaryIO,
    path: Path,
    row: Sequence[int],
    decode: Callable[[bytes], Any] | None = None,
    read: Callable[..., Any] = caption_of,
    captions: Captions = USUAL,
    draw: float = 0.0,
) -> tuple[Any, Any]:
    """What `decode` makes of the image file (None: it is not read), and `read` of the captions'.

    Whatever reading them raises is the sample's fault, and is Unreadable.
    """
    files, kind = Files(file, row, captions.kinds), "caption"
    try:
        found = read(files, captions, draw)
        kind, files.at = "image", row[0]
        return None if decode is None else decode(_bytes(file, row[0], row[1])), found
    except Exception as error:
        if isinstance(error, TooManyPixels | OSError):
            kind = "image size" if isinstance(error, TooManyPixels) else "shard"
        text = f"{path}, {member_name(file, files.at)}: {str(error)[:200] or type(error).__name__}"
        raise Unreadable(kind, text) from error


def _bytes(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    data = file.read(size)
    if len(data) < size:
        raise OSError(f"the file must have {at + size} bytes, got {at + len(data)}")
    return data
