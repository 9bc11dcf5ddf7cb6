"""Files: written whole or not at all, and read as text in whatever encoding they are."""

import codecs
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_MARKS = {  # the longer ones first: a mark of UTF-32 begins as one of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_BINARY = {b"\x1f\x8b": "gzip data", b"PK\x03\x04": "a zip file", b"\x80": "a Python pickle"}


@contextlib.contextmanager
def write_whole(path: Path | str, *, sync: bool = False) -> Iterator[BinaryIO]:
    """A binary file to write, which becomes `path` when the block ends without an error.

    Until then it lies beside `path` under a hidden name, so that nobody reads half a file; after an
    error it is deleted and `path` is as it was. Missing folders are made.

    Args:
        path: of the file; one that exists is replaced.
        sync: whether file and name are on the disk when the block is left, to outlast a power cut.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    if sync and os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def decoded(data: bytes) -> str:
    """Text in UTF-8, with or without a byte order mark, or in UTF-16 or UTF-32 with one.

    Raises:
        UnicodeDecodeError (a ValueError): it is none of these.
    """
    for mark, encoding in _MARKS.items():
        if data.startswith(mark) and len(data) > len(mark):
            return data.decode(encoding)
    return data.decode("utf-8-sig")


def whole(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which no encoding can hold.

    >>> whole("a boat \\ud83d")
    'a boat \ufffd'
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_text(path: Path, function: str) -> str:
    """A file's text as `decoded`; of a file that holds none, a ValueError says what it is."""
    if not path.is_file():
        raise ValueError(f"{function}: path must be a file, got {str(path)!r}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{function}: path must be a file that can be read, got {error}"
        ) from error
    if _is_sentencepiece(data):
        raise ValueError(
            f"{function}: {path} must be a tokenizer's JSON or vocab.txt, got a SentencePiece "
            "model; transformers writes its tokenizer.json: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        return decoded(data)
    except UnicodeDecodeError as error:
        kinds = (kind for start, kind in _BINARY.items() if data.startswith(start))
        came = next(kinds, f"bytes that are no UTF-8 ({error.reason} at byte {error.start})")
        raise ValueError(f"{function}: {path} must be text in UTF-8, got {came}") from error


def _is_sentencepiece(data: bytes) -> bool:
    """Whether a file begins as its protobuf does: a piece's message, its text, its score."""
    start = data[:4]
    return len(start) == 4 and start[::2] == b"\n\n" and data[4 + start[3] :][:1] == b"\x15"
