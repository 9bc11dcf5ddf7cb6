"""Names of classes and the templates around them, as flags give them: ImageNet's, or a file's."""

import importlib.util
import os
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .files import read_text

# A line that says whose folder's the name is: by a tab, or by a WordNet id as ImageNet's lists do.
_OF_A_FOLDER = re.compile(r"([^\t]+)\t\s*(.+)|(n\d{8})[\s,;:]+(.+)")


class Names(NamedTuple):
    """What classes are called, in the order of their numbers, and their folders, () if not told."""

    names: tuple[str, ...]
    folders: tuple[str, ...] = ()

    def of(self, folders: Sequence[str], root: str | Path) -> list[str]:
        """The name of each class folder of root, in their order.

        Raises:
            ValueError: a folder that is not named, or not as many folders as names.
        """
        if self.folders:
            named = dict(zip(self.folders, self.names, strict=True))
            if missing := [folder for folder in folders if folder not in named]:
                came = f"none for {len(missing)}, the first {missing[0]!r}"
                raise ValueError(f"evaluate: classes must name each folder of {root}, got {came}")
            return [named[folder] for folder in folders]
        if len(folders) != len(self.names):
            must = f"hold a class folder for each of the {len(self.names)} names of classes"
            raise ValueError(
                f"evaluate: {root} must {must}, got {len(folders)}; "
                "lines of a folder, a tab and its name can name some of many"
            )
        return list(self.names)


def classes_in(text: str) -> Names | None:
    """The names that a flag gives; None where it is empty.

    Args:
        text: "imagenet": open_clip's 1,000. Else a file: a name a line, of sorted folders; or a
            folder, a tab and its name a line.

    Raises:
        ValueError: neither, no name, lines of both kinds, a folder named twice; no open_clip.
    """
    if not text:
        return None
    if text == "imagenet":
        return Names(tuple(_of_open_clip("classes", "IMAGENET_CLASSNAMES")))
    if not os.path.isfile(text):
        must = "be imagenet or a file of names, one a line"
        raise ValueError(f"evaluate: classes must {must}, got {text[:80]!r}")
    lines = _lines(text)
    found = [_OF_A_FOLDER.fullmatch(line) for line in lines]
    if not lines:
        raise ValueError(f"evaluate: classes must be names, one a line, got none in {text}")
    if not any(found):
        return Names(tuple(lines))
    if not all(found):
        line = lines[found.index(None)]
        must = "give a folder, a tab and a name in each of its lines, or a name alone in each"
        raise ValueError(f"evaluate: {text} must {must}, got both, as {line[:80]!r}")
    pairs = sorted((one[1] or one[3], one[2] or one[4]) for one in found if one)
    folders, names = zip(*pairs, strict=True)
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise ValueError(f"evaluate: {text} must name a folder once, got {twice[0]!r} twice")
    return Names(names, folders)


def prompts_in(text: str) -> tuple[str, ...]:
    """The templates that a flag gives; none where it is empty.

    Args:
        text: "imagenet": open_clip's 80. Else a file with a template a line; else templates parted
            by ";". "{}" is the name's place ("{c}" too).

    Raises:
        ValueError: a template without one place for a name; no open_clip.

    >>> prompts_in("a photo of a {}.;{}")
    ('a photo of a {}.', '{}')
    """
    if text == "imagenet":
        made = _of_open_clip("prompts", "OPENAI_IMAGENET_TEMPLATES")
        prompts = [template("{}") for template in made]
    elif "{" not in text and os.path.isfile(text):
        prompts = _lines(text) or [""]
    else:
        prompts = text.split(";") if text else []
    prompts = [prompt.replace("{c}", "{}") for prompt in prompts]
    if wrong := [one for one in prompts if not re.fullmatch(r"[^{}]*\{\}[^{}]*", one)]:
        must = "be imagenet, a file of them, or each hold one {}"
        raise ValueError(f"evaluate: prompts must {must}, got {wrong[0][:80]!r}")
    return tuple(prompts)


def _lines(path: str) -> list[str]:
    lines = re.split(r"[\r\n]+", read_text(Path(path), "evaluate"))
    return [line.strip() for line in lines if line.strip()]


def _of_open_clip(flag: str, name: str) -> Any:
    """A table of open_clip's, from its own file; the rest of it takes seconds to import."""
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec and spec.submodule_search_locations) or []:
        path = Path(folder, "zero_shot_metadata.py")
        if path.is_file():
            return runpy.run_path(str(path))[name]
    must = "come with open_clip (pip install open_clip_torch), or else be a file, one a line"
    raise ValueError(f"evaluate: the {flag} imagenet must {must}, got no such package")
