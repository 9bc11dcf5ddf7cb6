"""Pictures in one folder a class, and what the classes are called.

photos/n01440764/1.jpg: a folder's name is its class's, underscores read as spaces. Other names
stand in photos/classes.txt, one a line: `n01440764 tench, Tinca tinca`.
"""

import os
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from .files import decoded
from .images import decode_square


def read_folder(
    root: str | Path, size: int, *, squash: bool = False, interpolation: str = "bilinear"
) -> Iterator[tuple[Path, Tensor | None]]:
    """(class folder, uint8 [size, size, 3] or None where it cannot be read) of each file, in order.

    squash and interpolation as `decode_square`.

    Hidden files, folders within a class folder, and __MACOSX are skipped.

    Raises:
        ValueError: root is not a folder, or holds none.
    """
    how = dict(squash=squash, interpolation=interpolation)
    folders = _folders(Path(root))
    if not folders:
        raise ValueError(f"evaluate: images must be a folder of class folders, got {str(root)!r}")
    for folder in folders:
        for file in sorted(folder.iterdir()):
            if file.is_file() and _shown(file):
                try:
                    yield folder, decode_square(file.read_bytes(), size, **how)
                except (ValueError, OSError):
                    yield folder, None


def _shown(path: Path) -> bool:
    return not path.name.startswith((".", "__MACOSX"))


def _folders(root: Path) -> list[Path]:
    inside = sorted(root.iterdir()) if root.is_dir() else []
    return [path for path in inside if path.is_dir() and _shown(path)]


def class_names(root: str | Path, classes: Sequence[Path]) -> list[str]:
    """The name of each class folder: from root's classes.txt, else the folder's own.

    A line of classes.txt is a folder's name, a space, tab, comma, colon or semicolon, and the
    class's name; either may stand in quotes. A warning tells what has no effect: folders of root
    that are none of the classes, lines that name no folder, names given twice; and which classes
    the file does not name.
    """
    own = {path: _text(os.fsencode(path.name), str(path)) for path in _folders(Path(root))}
    if lost := [name for path, name in own.items() if path not in classes]:
        _warn(f"folders without a picture that can be read are no classes: {_few(lost)}")
    listed = Path(root) / "classes.txt"
    given: dict[str, str] = {}
    if listed.is_file():
        given = _listed(_text(listed.read_bytes(), str(listed)), {*own.values()}, listed)
        if unnamed := [own[path] for path in classes if own[path] not in given]:
            _warn(f"{listed} does not name these classes, whose folders do: {_few(unnamed)}")
    names = [given.get(own[path], own[path]).replace("_", " ") for path in classes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        _warn(f"several classes have one name: {_few(twice)}")
    return names


def _listed(text: str, folders: set[str], path: Path) -> dict[str, str]:
    """The name that each folder has in classes.txt."""
    given: dict[str, str] = {}
    unknown, twice = [], []
    for line in filter(None, map(str.strip, re.split(r"[\r\n]+", text))):
        for gap in reversed(list(re.finditer(r"[\s,;:]+", line))):  # folders may hold spaces
            folder, name = _unquoted(line[: gap.start()]), _unquoted(line[gap.end() :])
            if folder in folders and name:
                twice += [folder] if given.get(folder, name) != name else []
                given[folder] = name
                break
        else:
            unknown.append(line)
    if unknown:
        _warn(f"lines of {path} name no folder of a class and its name: {_few(unknown)}")
    if twice:
        _warn(f"folders are named twice in {path}, the last name counts: {_few(twice)}")
    return given


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        return text[1:-1].replace('""', '"').strip()
    return text


def _warn(sentence: str) -> None:
    warnings.warn(f"evaluate: {sentence}", stacklevel=3)


def _text(data: bytes, what: str) -> str:
    """Text in the encodings that are met: those of `decoded`, else Windows's."""
    try:
        text = decoded(data)
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
        _warn(f"{what!r} is not in UTF-8, read as {text[:40]!r}")
    return unicodedata.normalize("NFC", text)  # macOS writes accents as letters of their own


def _few(values: Sequence[str]) -> str:
    more = f" and {len(values) - 3} more" if len(values) > 3 else ""
    return ", ".join(repr(value) for value in values[:3]) + more
