"""Pictures in one folder a class, and what the classes are called.

photos/n01440764/1.jpg: a folder's name is its class's, underscores read as spaces. Other names
stand in photos/classes.txt, one a line: `n01440764 tench, Tinca tinca`.
"""

import os
import re
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from .batches import Fault, Pictures, add_faults
from .classes import Names
from .files import decoded
from .images import decode_square


class FolderPictures(Dataset):
    """The pictures of class folders in batches; batch i is any process's or worker's to read.

    A batch is `batch_size` files in a row; `told` is the number of each one's folder. Hidden files,
    folders within a class folder, and __MACOSX are skipped.

    Args:
        root: the folder of class folders.
        size: side of the pictures in pixels.
        squash, interpolation: as `decode_square`.

    Raises:
        ValueError: root is not a folder, or holds none.
    """

    def __init__(
        self,
        root: str | Path,
        size: int,
        batch_size: int,
        *,
        squash: bool = False,
        interpolation: str = "bilinear",
    ) -> None:
        self.size, self.batch_size = size, batch_size
        self.how = dict(squash=squash, interpolation=interpolation)
        self.folders = _folders(Path(root))
        if not self.folders:
            must = "must be a folder of class folders"
            raise ValueError(f"evaluate: images {must}, got {str(root)!r}")
        self.files = [
            (number, file.name)
            for number, folder in enumerate(self.folders)
            for file in sorted(folder.iterdir())
            if file.is_file() and _shown(file)
        ]

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    def __getitem__(self, number: int) -> Pictures:
        first, faults = number * self.batch_size, {}
        images, names, told = [torch.zeros(0, self.size, self.size, 3, dtype=torch.uint8)], [], []
        for place, (folder, name) in enumerate(self.files[first : first + self.batch_size], first):
            path = self.folders[folder] / name
            try:
                images.append(decode_square(path.read_bytes(), self.size, **self.how)[None])
            except (ValueError, OSError) as error:
                faults = add_faults(faults, {"image": Fault(1, f"{path}: {error}")})
                continue
            names.append(place)
            told.append([folder])
        return Pictures(torch.cat(images), names, told, faults)

    def called(self, names: Names) -> list[str]:
        """The names of all folders, as `Names.of`."""
        own = [_text(os.fsencode(path.name), str(path)) for path in self.folders]
        return names.of(own, self.folders[0].parent)


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
