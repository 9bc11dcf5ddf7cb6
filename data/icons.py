"""IconPairs: 346,000 icons with their names, drawn from the npm package @iconify/json, as shards.

    npm pack @iconify/json                            one .tgz of 104 MB, which is not unpacked
    python -m data.icons iconify-json-*.tgz icons     icons/train/00000.tar, ... and sizes.json

Drawn are the sets that the package lists under a licence which is neither NC nor GPL. Hidden icons
and bodies seen before are left out; what is blank on white is drawn on grey. A run that was stopped
goes on. A sample is a PNG, and a JSON with three captions (the last ends with a category where the
set has one for the icon) and the icon's own name and set:

    {"caption": "calendar", "styled": "calendar, outline", "long": "an outline icon of calendar",
     "name": "calendar-outline", "set": "ion", "style": "outline", "category": "UI 16px / 32px",
     "licence": "MIT"}

Words of style (STYLES), sizes and numbers at a name's ends are no part of its caption. Icons of a
set that share a caption are variants: any one of them is drawn, and the others of "train" go to
"variants", as they are false negatives of each other in a batch. Choice and order are by SHA-256:

    held-out-sets   authors never seen: the sets of 20 who drew 200 to 3,000 names, and of whose
                    drawings less than 1% are in another author's sets (2.2.535: 21 sets)
    held-out-names  names never seen: 2% of all names, with every other set that has them
    emoji, logos, flags    the sets of these, whose names are of another kind
    train           the rest; in "variants" are more drawings of it

A split's classes.txt is what evaluate.py classifies its pictures among: names of at least 20 sets
that train; of held-out-names, its own that are in at least 3. Names never seen consist mostly of
words that were. As the order is random, the first samples of a split stand for all.

The pictures are the authors': who passes them on does so under the licences in licences.json.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from PIL import Image
from tqdm import tqdm

from .files import write_whole
from .index import TABLE, count, read_table, write_tables
from .write import Sample, write_shard

# Words of style at either end of a name, and what a caption says for them.
STYLES = {
    "o": "outline", "outline": "outline", "outlined": "outline",
    "line": "line", "linear": "line", "stroke": "line",
    "f": "filled", "fill": "filled", "filled": "filled", "solid": "solid", "block": "block",
    "duo": "duotone", "duotone": "duotone", "twotone": "duotone", "remix": "remix",
    "thin": "thin", "light": "light", "bold": "bold", "dark": "dark", "broken": "broken",
    "sharp": "sharp", "round": "round", "rounded": "round", "flat": "flat", "color": "color",
    "pixel": "pixel", "freehand": "freehand", "monotone": "monotone",
    "regular": "", "baseline": "", "default": "", "plain": "",
}  # fmt: skip
_COUNT = re.compile(r"\d+(px|x\d+)?|alt")  # sizes, and second drawings of one thing
_STYLE_SHARE = 0.05  # of a set's names: below, "chart-line" and "traffic-light" mean what they say
_AUTHORS, _NAMES, _SHARED = 20, (200, 3000), 0.01  # of held-out sets
_NAME_SHARE = 0.02  # of all names, held out
_COMMON, _FEW = 20, 3  # sets that have a class's name
_GROUNDS = "#ffffff", "#808080"  # the second where the first leaves nothing to see

# What a broken package makes reading raise, beside OSError and ValueError.
_BROKEN = (AttributeError, EOFError, LookupError, TypeError, tarfile.TarError, zlib.error)

SPLITS = "train", "variants", "held-out-sets", "held-out-names", "emoji", "logos", "flags"


class Icon(NamedTuple):
    """An icon before it is drawn."""

    set: str
    name: str
    caption: str
    style: str
    group: str  # of the set's own categories
    category: str  # of the set
    licence: str
    body: str  # what is within <svg>
    box: tuple[float, float, float, float]

    def sample(self) -> dict[str, str]:
        """What the sample's JSON says."""
        kind = f"{self.style} icon" if self.style else "icon"
        article = "an" if kind[0] in "aeiou" else "a"
        styled, long = self.caption, f"{article} {kind} of {self.caption}"
        return {
            "caption": self.caption,
            "styled": f"{styled}, {self.style}" if self.style else styled,
            "long": f"{long}, {self.group}" if self.group else long,
            **{key: getattr(self, key) for key in ("name", "set", "style", "category", "licence")},
        }


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def read_package(path: Path) -> dict[str, dict[str, Any]]:
    """The sets of the package's .tgz whose licence allows it, by prefix, as its JSON has them.

    Raises:
        ValueError: the file is not the package @iconify/json as npm packs it.
    """
    sets: dict[str, dict[str, Any]] = {}
    listed: dict[str, Any] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                parts = member.name.split("/")
                if parts[1:] == ["collections.json"]:
                    listed = json.load(tar.extractfile(member))
                elif parts[1:2] == ["json"] and member.name.endswith(".json"):
                    one = json.load(tar.extractfile(member))
                    sets[one["prefix"]] = one
        allowed = [prefix for prefix in sorted(sets) if _free(listed.get(prefix, {}))]
    except (OSError, ValueError, *_BROKEN) as e:
        came = f"one that is not ({str(e)[:100] or type(e).__name__})"
        raise ValueError(f"icons: {path} must be a whole .tgz of @iconify/json, got {came}") from e
    if not allowed:
        came = f"{len(sets)} sets, none of a free licence"
        raise ValueError(f"icons: {path} must be a whole .tgz of @iconify/json, got {came}")
    return {prefix: sets[prefix] | {"info": listed[prefix]} for prefix in allowed}


def _free(info: dict[str, Any]) -> bool:
    licence = info.get("license", {}).get("spdx", "")
    return bool(licence) and "GPL" not in licence and "NC" not in licence.split("-")


def parts_of_names(names: Iterable[str]) -> dict[str, tuple[str, list[str]]]:
    """The caption of each name of a set, and the name's words of style.

    >>> parts_of_names(["traffic-light", *(f"car-{n}-fill" for n in range(30))])["car-2-fill"]
    ('car', ['fill'])
    """
    words = {name: [word for word in name.split("-") if word] or [name] for name in names}
    styles: dict[str, list[str]] = {name: [] for name in words}
    for _ in ("ends", "beginnings"):
        met = Counter(_kind(word) for one in words.values() for word in one[_peeled(one) :])
        often = {kind for kind, number in met.items() if number >= _STYLE_SHARE * len(words)}
        for name, one in words.items():
            left = _peeled(one, often)
            styles[name] += [word for word in one[left:] if word in STYLES]
            words[name] = one[:left][::-1]  # turned twice, it is upright again
    return {name: (" ".join(one), styles[name]) for name, one in words.items()}


def _kind(word: str) -> str:
    return word if word in STYLES else "count" if _COUNT.fullmatch(word) else ""


def _peeled(words: list[str], among: set[str] | None = None) -> int:
    """How many words stay, one at least, without those of style and count at the end."""
    left = len(words)
    while left > 1 and (kind := _kind(words[left - 1])) and (among is None or kind in among):
        left -= 1
    return left


def icons_of(one: dict[str, Any]) -> Iterator[Icon]:
    """The icons of a set that are not hidden."""
    prefix, info = one["prefix"], one["info"]
    icons = {name: icon for name, icon in one["icons"].items() if not icon.get("hidden")}
    groups = {name: group for group, names in one.get("categories", {}).items() for name in names}
    usual = re.findall(r"\w+", one.get("suffixes", {}).get("", "").lower())  # without a suffix
    whole = [word for word in prefix.split("-") if word in STYLES]
    whole += ["color"] if info.get("palette") else []
    parts = parts_of_names(icons)
    if _domain(prefix, info) == "emoji":  # whose "light" is a skin tone
        parts = {name: (" ".join(name.split("-")), []) for name in icons}
    for name, (caption, own) in parts.items():
        said = [STYLES.get(word, "") for word in (own or usual) + whole]
        icon = icons[name]
        left, top, width, height = (
            icon.get(key, one.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        yield Icon(
            prefix,
            name,
            caption,
            " ".join(dict.fromkeys(filter(None, said))),
            groups.get(name, "").lower(),
            info.get("category", ""),
            info["license"]["spdx"],
            icon["body"],
            (left, top, width, height),
        )


def _domain(prefix: str, info: dict[str, Any]) -> str:
    category = info.get("category", "")
    if category == "Emoji" or "emoji" in prefix:
        return "emoji"
    if category == "Logos" or prefix.endswith("brands"):
        return "logos"
    return "flags" if category == "Flags / Maps" and info.get("palette") else "train"


class Plan(NamedTuple):
    """The icons of each split in their order, and the names that it is classified among."""

    icons: dict[str, list[Icon]]
    classes: dict[str, list[str]]


def plan(sets: dict[str, dict[str, Any]]) -> Plan:
    """Which icon is in which split; see the module."""
    authors = {prefix: one["info"]["author"]["name"] for prefix, one in sets.items()}
    drawn_by: dict[bytes, set[str]] = defaultdict(set)
    first: dict[tuple[str, str], list[Icon]] = defaultdict(list)  # variants of a name of a set
    for prefix, one in sets.items():
        for icon in icons_of(one):
            body = _digest(icon.body)
            if body not in drawn_by:
                first[prefix, icon.caption].append(icon)
            drawn_by[body].add(authors[prefix])
    domains = {prefix: _domain(prefix, one["info"]) for prefix, one in sets.items()}
    unseen = _unseen_authors(
        Counter(authors[prefix] for prefix, _ in first if domains[prefix] == "train"), drawn_by
    )
    icons: dict[str, list[Icon]] = {split: [] for split in SPLITS}
    held: set[str] = set()
    for (prefix, caption), variants in first.items():
        split = domains[prefix]
        if split == "train" and authors[prefix] in unseen:
            split = "held-out-sets"
        elif split == "train" and int.from_bytes(_digest(caption)[:4], "big") < _NAME_SHARE * 2**32:
            split = "held-out-names"
            held.add(caption)
        variants.sort(key=_order)
        icons[split].append(variants[0])
        if split == "train":
            icons["variants"] += variants[1:]
    for split, some in icons.items():
        # A category may be called as a name that is held out.
        some = [icon._replace(group="") if icon.group in held else icon for icon in some]
        icons[split] = sorted(some, key=_order)
    return Plan(icons, _classes(icons))


def _order(icon: Icon) -> bytes:
    """Random, and the same on every machine."""
    return _digest(f"{icon.set}:{icon.name}")


def _unseen_authors(names: Counter[str], drawn_by: dict[bytes, set[str]]) -> set[str]:
    """The authors of the held-out sets, by the numbers of their names and who drew each body."""
    bodies, shared = Counter(), Counter()
    for drawers in drawn_by.values():
        bodies.update(drawers)
        if len(drawers) > 1:
            shared.update(drawers)
    fit = [
        author
        for author, number in names.items()
        if _NAMES[0] <= number <= _NAMES[1] and shared[author] < _SHARED * bodies[author]
    ]
    return set(sorted(fit, key=_digest)[:_AUTHORS])


def _classes(icons: dict[str, list[Icon]]) -> dict[str, list[str]]:
    def often(split: str, least: int) -> list[str]:
        number = Counter(icon.caption for icon in icons[split])  # a set has a name once
        return sorted(name for name, sets in number.items() if sets >= least)

    common = often("train", _COMMON)
    names = {"held-out-sets": common, "emoji": common}
    return names | {"held-out-names": often("held-out-names", _FEW)}


def draw(icon: Icon, size: int) -> tuple[bytes | None, int]:
    """The icon as PNG, and the ground of _GROUNDS it is on; None where it is blank on each.

    Raises:
        ValueError: the body is no SVG.
    """
    import resvg_py  # here: planning needs no rasteriser

    box = " ".join(map(str, icon.box))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{box}" color="#000">{icon.body}</svg>'
    )
    for number, ground in enumerate(_GROUNDS):
        data = resvg_py.svg_to_bytes(svg_string=svg, background=ground, skip_system_fonts=True)
        image = Image.open(io.BytesIO(bytes(data))).convert("RGB")
        if any(low < high for low, high in image.getextrema()):
            red, *others = image.split()
            grey = all(red.tobytes() == band.tobytes() for band in others)
            file = io.BytesIO()
            (red if grey else image).save(file, "PNG")  # grey takes two thirds of the bytes
            return file.getvalue(), number
    return None, number


class Part(NamedTuple):
    """A shard to be drawn, and the place of its first icon in the split."""

    path: Path
    first: int
    icons: list[Icon]


def draw_part(part: Part, size: int) -> Counter[str]:
    """Write a shard; what became of its icons."""
    counts: Counter[str] = Counter()

    def samples() -> Iterator[Sample]:
        for icon in part.icons:
            try:
                png, ground = draw(icon, size)
            except ValueError:
                counts["broken"] += 1
                continue
            counts["on grey"] += ground if png else 0
            counts["blank"] += not png
            if png:
                yield {"png": png, "json": json.dumps(icon.sample()).encode()}

    counts["samples"] = write_shard(part.path, samples(), part.first)
    return counts


def draw_all(
    package: Path, folder: Path, splits: tuple[str, ...], size: int, samples: int, processes: int
) -> Counter[str]:
    """Plan, draw what is not there yet, write the tables; what became of the icons of this run.

    Raises:
        ValueError: a number or split that will not do, another file than the package, a folder
            that holds something else.
    """
    for name, value, least, most in (
        ("size", size, 1, 1024), ("samples", samples, 1, 10**9), ("processes", processes, 0, 4096)
    ):  # fmt: skip
        if not least <= value <= most:
            raise ValueError(f"icons: {name} must be in [{least}, {most}], got {value}")
    if unknown := [split for split in splits if split not in SPLITS]:
        raise ValueError(f"icons: splits must be of {', '.join(SPLITS)}, got {unknown[0]!r}")
    sets = read_package(package)
    try:
        planned = plan(sets)
    except _BROKEN as error:
        must = "must hold sets as Iconify's JSON describes them"
        raise ValueError(f"icons: {package} {must}, got {type(error).__name__} {error}") from error
    _open_folder(folder, package, {"size": size, "samples": samples})
    _write_json(folder / "licences.json", {prefix: _notice(one) for prefix, one in sets.items()})
    del sets  # a gigabyte
    parts = []
    for split in splits:
        icons = planned.icons[split]
        if names := planned.classes.get(split):
            with write_whole(folder / split / "classes.txt") as file:
                file.write("".join(f"{name}\n" for name in names).encode())
        parts += [
            Part(
                folder / split / f"{first // samples:05d}.tar",
                first,
                icons[first : first + samples],
            )
            for first in range(0, len(icons), samples)
        ]
    todo = [part for part in parts if not part.path.exists()]
    work, counts = partial(draw_part, size=size), Counter()
    sizes: dict[Path, int] = {}
    with ProcessPoolExecutor(max(1, min(processes or os.cpu_count() or 1, len(todo)))) as pool:
        bar = tqdm(pool.map(work, todo), total=len(todo), unit="shard", disable=not todo)
        for part, done in zip(todo, bar, strict=True):
            sizes[part.path] = done["samples"]
            counts += done
    for part in parts:  # drawn before a stop
        if part.path not in sizes and part.path.name not in read_table(part.path.parent):
            sizes[part.path] = count(part.path)
    write_tables(sizes.items())
    return counts


def _open_folder(folder: Path, package: Path, choices: dict[str, Any]) -> None:
    """A new or empty folder, or one of the same package and choices, to go on with."""
    told = {"package": hashlib.sha256(package.read_bytes()).hexdigest(), **choices}
    source = folder / "source.json"
    try:
        same = json.loads(source.read_bytes()) == told
    except (OSError, ValueError):
        same = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not same:
        must = "be new, empty, or of this package and these choices"
        raise ValueError(f"icons: {folder} must {must}, got one that is not")
    _write_json(source, told)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with write_whole(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def _notice(one: dict[str, Any]) -> dict[str, str]:
    info = one["info"]
    return {
        "title": info["name"],
        "author": info["author"]["name"],
        "licence": info["license"]["spdx"],
        "url": info["license"].get("url", ""),
    }


@dataclass(frozen=True)
class Flags:
    """Draw the icons of the npm package @iconify/json into shards, split by split."""

    package: tyro.conf.Positional[Path]  # iconify-json-2.2.535.tgz, of npm pack @iconify/json
    folder: tyro.conf.Positional[Path]  # of the splits' folders; new, or of a run that was stopped
    splits: tuple[str, ...] = SPLITS  # that are drawn
    size: int = 32  # pixels a side
    samples: int = 10_000  # of a shard
    processes: int = 0  # that draw; 0: one a core


def main(argv: list[str] | None = None) -> None:
    """The program. What will not do ends it with a sentence."""
    flags = tyro.cli(Flags, args=argv)
    try:
        counts = draw_all(**vars(flags))
        tables = {split: read_table(flags.folder / split) for split in flags.splits}
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"data.icons: {error}") from error
    for split, table in tables.items():
        print(f"{split:14}{sum(table.values()):10,} samples")
    kinds = ", ".join(f"{counts[kind]:,} {kind}" for kind in ("on grey", "blank", "broken"))
    print(f"drawn now: {counts['samples']:,} ({kinds}), and {TABLE}, in {flags.folder}")


if __name__ == "__main__":
    main()
