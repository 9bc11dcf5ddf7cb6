"""Zero-shot classification and retrieval: from sets of pictures and texts to their figures.

Classification compares an image's feature with each class's: the mean of the normalised features of
its prompts, normalised again. Retrieval ranks captions for an image and images for a caption.
Pictures from files are resized as the model's dialect says.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.batches import Fault, add_faults, loaded
from data.classes import Names, classes_in
from data.emoji import PROMPTS, EmojiPairs
from data.files import decoded, read_text
from data.folders import FolderPictures, class_names
from data.pairs import USUAL, Captions
from data.patterns import file_names
from data.pictures import ShardPictures, check_labels, check_samples
from data.remote import is_remote, read_small
from data.shards import warn, warn_of

from .distributed import World
from .encoder import Encoder as Encoder
from .figures import (
    ALONE,
    classification,
    embedded_line,
    pair_losses,
    resizing,
    retrieval,
    set_line,
)
from .figures import table as table

# For pictures of one's own: a few of OpenAI's templates for ImageNet.
PHOTO_PROMPTS = ("a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "{}")


def evaluate_emoji(
    encoder: Encoder, pairs: EmojiPairs, prompts: Sequence[str] = PROMPTS
) -> tuple[dict[str, dict], dict]:
    """Figures of each split of the embedded set, and pictures to show with the names chosen.

    Prompts classify, plain names retrieve. "held-out drawings" is the mean over its two vendors,
    each among its own names.
    """
    results, shown = {}, {"images": [], "chosen": [], "actual": []}
    for name, split in pairs.splits.items():
        images = encoder.images(pairs.images[split.images])
        classes = encoder.classes(split.classes, prompts)
        results[name] = classification(images, classes, split.labels)
        results[name] |= retrieval(images, encoder.texts(split.classes), split.labels)
        if name.startswith("held-out"):
            pick = torch.linspace(0, len(images) - 1, 12).long()
            best = (images[pick] @ classes.T).argmax(1).tolist()
            shown["images"] += list(pairs.images[split.images[pick]])
            shown["chosen"] += [split.classes[i] for i in best]
            shown["actual"] += [split.classes[i] for i in split.labels[pick].tolist()]
    held = [figures for name, figures in results.items() if name.startswith("held-out")]
    mean = {key: sum(figures[key] for figures in held) / len(held) for key in held[0]}
    results = {"held-out drawings": mean | {"n": sum(figures["n"] for figures in held)}} | results
    return results, shown | {"images": torch.stack(shown["images"])}


def check_sets(
    images: str = "",
    shards: str = "",
    captions: Captions = USUAL,
    classes: str = "",
    cache_gb: float = 100.0,
) -> None:
    """ValueError unless each set that is given holds something to evaluate; stops at the first.

    Args:
        classes: as `classes_in`; class folders and each .cls must fit them.
        cache_gb: as ShardPictures.
    """
    names = classes_in(classes)
    if images:
        pictures = FolderPictures(images, 8, 1)
        if names:
            pictures.called(names)
        if not any(len(pictures[number].images) for number in range(len(pictures))):
            raise ValueError(f"evaluate: {images} must hold pictures that can be read, got none")
    if shards:
        check_samples(shards, captions, len(names.names) if names else 0, cache_gb)


@dataclass
class _Seen:
    """What a set's pictures are, on every process: features [n, E], and what is told of each."""

    features: Tensor
    told: list[list]
    faults: dict[str, Fault]

    @property
    def skipped(self) -> int:
        return sum(fault.count for fault in self.faults.values())


def _see(encoder: Encoder, pictures: FolderPictures | ShardPictures, workers: int) -> _Seen:
    """Read and encode a set; each process decodes the batches that it encodes, and no others.

    A picture that several batches have is the first one's, with what is told of all.
    """
    world = _world(encoder)
    alone = encoder if world is ALONE else encoder.alone()
    own = range(world.rank, len(pictures), world.size)
    with closing(loaded(pictures, own, min(workers, len(own)))) as batches:

        def make(number: int) -> tuple:
            images, *rest = next(batches)
            return alone.images(images) if len(images) else None, *rest

        shares = world.share(len(pictures), make)
    features, told, places, faults = [], [], {}, {}
    for part, names, said, missed in shares:
        faults = add_faults(faults, missed)
        fresh = [row for row, name in enumerate(names) if name not in places]
        places |= {names[row]: len(told) + place for place, row in enumerate(fresh)}
        told += [[] for _ in fresh]
        features += [part[fresh]] if fresh else []
        for name, each in zip(names, said, strict=True):
            told[places[name]] += each
    return _Seen(torch.cat(features) if features else torch.empty(0, 0), told, faults)


def _world(encoder: Encoder) -> World:
    return getattr(encoder, "world", None) or ALONE  # another's encoder works by itself


def _batch_size(encoder: Encoder) -> int:
    return getattr(encoder, "batch_size", Encoder.batch_size)


def evaluate_folder(
    encoder: Encoder,
    folder: str | Path,
    prompts: Sequence[str] = PHOTO_PROMPTS,
    *,
    classes: Names | None = None,
    workers: int = 0,
    features_of: Callable[[Sequence[str], Sequence[str]], Tensor] | None = None,
) -> dict[str, float]:
    """Zero-shot figures on pictures in one folder a class; data/folders.py says how they are named.

    A file that cannot be read is counted in "skipped" and left out; a folder without a picture that
    can be read is no class, unless `classes` names it.

    Args:
        classes: names of the folders; None: classes.txt's, or their own.
        workers: processes that decode, beside each that encodes; 0: a thread.
        features_of: class features of names and prompts; None: the encoder's classes.
    """
    world = _world(encoder)

    def listed() -> FolderPictures:
        return FolderPictures(folder, batch_size=_batch_size(encoder), **resizing(encoder.model))

    pictures = world.decide(listed)
    names = world.decide(lambda: pictures.called(classes) if classes else [])
    seen = _see(encoder, pictures, workers)
    if not seen.told:
        raise ValueError(f"evaluate: {folder} must hold pictures that can be read, got none")
    labels = torch.tensor([number for (number,) in seen.told])
    if not classes:
        there, labels = labels.unique(return_inverse=True)
        found = [pictures.folders[number] for number in there.tolist()]
        names = world.decide(lambda: class_names(folder, found))
    features = (features_of or encoder.classes)(names, prompts)
    figures = classification(seen.features, features, labels, world=world)
    return figures | {"skipped": seen.skipped}


def _see_shards(encoder: Encoder, pattern: str, workers: int, **how) -> _Seen:
    """The pictures of shards; `how` as ShardPictures. Rank 0 warns of what is left out."""
    world = _world(encoder)
    sizes = dict(batch_size=_batch_size(encoder), **resizing(encoder.model))
    pictures = world.decide(lambda: ShardPictures(pattern, **sizes, **how))
    scans = world.share(len(pictures.names), pictures.scan)
    pictures.hold([rows for rows, _ in scans])
    seen = _see(encoder, pictures, workers)
    if world.is_main:
        warn([sentence for _, said in scans for sentence in said])
        warn_of(seen.faults)
    return seen


def evaluate_shards(
    encoder: Encoder,
    pattern: str,
    captions: Captions = USUAL,
    *,
    workers: int = 0,
    loss_batch: int = 256,
) -> dict[str, float]:
    """Retrieval figures on the pictures of tar shards, each with all of its captions.

    A caption that several pictures have is one text, found if any of them is. n counts pictures.
    "loss" is the model's on the pictures with their first captions, as `pair_losses`.

    Args:
        workers: as evaluate_folder.
        loss_batch: pairs of a batch of the loss.
    """
    seen = _see_shards(encoder, pattern, workers, captions=captions)
    figures = _retrieved(encoder, seen, loss_batch)
    if figures is None:
        raise ValueError(f"evaluate: shards must hold pairs that can be read, got {pattern!r}")
    return figures


def _retrieved(encoder: Encoder, seen: _Seen, loss_batch: int) -> dict[str, float] | None:
    """Retrieval figures of pictures with captions; None where none has any."""
    world = _world(encoder)
    found = [[text for told in one for text in told.texts] for one in seen.told]
    kept = [number for number, one in enumerate(found) if one]
    if not kept:
        return None
    texts = list(dict.fromkeys(text for one in found for text in one))
    places = {text: place for place, text in enumerate(texts)}
    pairs = {(row, places[text]) for row, number in enumerate(kept) for text in found[number]}
    images, features = seen.features[kept], encoder.texts(texts)
    first = features[[places[found[number][0]] for number in kept]]
    silent = sum(not told.texts for one in seen.told for told in one)
    return {
        **retrieval(images, features, torch.tensor(sorted(pairs)), world=world),
        "n": len(kept),
        "chance": len(pairs) / (len(kept) * len(texts)),
        "skipped": seen.skipped + silent,
        **pair_losses(encoder.model, images, first, loss_batch, world=world),
    }


def listed_classes(pattern: str) -> list[str]:
    """The lines of classes.txt beside the shards of a pattern, each once; none where there is none.

    >>> listed_classes("")
    Traceback (most recent call last):
    ValueError: shards: pattern must name files that are there, got ''
    """
    folders = dict.fromkeys(map(os.path.dirname, file_names(pattern)))
    lines = [line.strip() for folder in folders for line in _classes_in(folder).splitlines()]
    return [name for name in dict.fromkeys(lines) if name]


def _classes_in(folder: str) -> str:
    """The text of classes.txt in a folder, local or remote; empty where there is none."""
    if is_remote(folder):
        return decoded(read_small([f"{folder}/classes.txt"])[0] or b"")
    path = Path(folder, "classes.txt")
    return read_text(path, "evaluate") if path.is_file() else ""


def evaluate_classes(
    encoder: Encoder, pattern: str, prompts: Sequence[str] = ("{}",), *, workers: int = 0
) -> dict[str, float] | None:
    """Zero-shot figures on the pictures of shards whose caption is a line of their classes.txt.

    The caption is the .txt, or the .json's "caption", whatever training draws; of several captions,
    the first that is listed. Pictures without one are left out. None where there is no classes.txt,
    and, with a warning, where none of its names is a caption.
    """
    names = _world(encoder).decide(lambda: listed_classes(pattern))
    if not names:
        return None
    seen = _see_shards(encoder, pattern, workers, named=True)
    return _named(encoder, seen, names, pattern, encoder.classes, prompts)


def _named(
    encoder: Encoder, seen: _Seen, names: list[str], pattern: str, features_of, prompts
) -> dict[str, float] | None:
    """Figures of the pictures one of whose usual captions is a class's name."""
    places = {name: place for place, name in enumerate(names)}
    usual = [[text for told in one for text in told.names] for one in seen.told]
    labels = [next((places[text] for text in one if text in places), -1) for one in usual]
    if max(labels, default=-1) < 0:
        came = f"none, the first {names[0]!r}; nothing is classified"
        if _world(encoder).is_main:
            must = f"classes.txt must hold captions of {pattern}"
            warnings.warn(f"evaluate: {must}, got {came}", stacklevel=3)
        return None
    silent = sum(not told.names for one in seen.told for told in one)
    return _classified(encoder, seen, labels, features_of(names, prompts), silent)


def _labelled(
    encoder: Encoder, seen: _Seen, names: Sequence[str], pattern: str, features_of, prompts
) -> dict[str, float] | None:
    """Figures of the pictures that have a class's number beside them; None where none has."""
    numbers = [[told.label for told in one if told.label is not None] for one in seen.told]
    check_labels(pattern, (label for one in numbers for label in one), len(names))
    if not any(numbers):
        return None
    labels = [one[0] if one else -1 for one in numbers]
    silent = sum(told.label is None for one in seen.told for told in one)
    return _classified(encoder, seen, labels, features_of(names, prompts), silent)


def _classified(
    encoder: Encoder, seen: _Seen, labels: list[int], classes: Tensor, silent: int
) -> dict[str, float]:
    """Figures of the pictures whose label is at least 0; `silent` samples told none."""
    known = torch.tensor(labels)
    features, known = seen.features[known >= 0], known[known >= 0]
    figures = classification(features, classes, known, world=_world(encoder))
    return figures | {"skipped": seen.skipped + silent}


def _both(
    encoder: Encoder,
    pattern: str,
    captions: Captions,
    classes: Names | None,
    features_of: Callable,
    prompts: Sequence[str],
    workers: int,
    loss_batch: int,
    cache_gb: float,
) -> dict[str, tuple[dict, int]]:
    """Retrieval and classification figures of shards whose pictures are read once.

    Pictures with a .cls are classified where `classes` are given, else by the captions that
    classes.txt lists.

    Returns:
        by "shards" and "classes", where there are such figures, these and the number of templates.
    """
    names = _world(encoder).decide(lambda: listed_classes(pattern))
    how = dict(captions=captions, named=bool(names), labelled=bool(classes), cache_gb=cache_gb)
    seen = _see_shards(encoder, pattern, workers, **how)
    retrieved, named, templates = _retrieved(encoder, seen, loss_batch), None, prompts
    if classes:
        templates = prompts or PHOTO_PROMPTS
        named = _labelled(encoder, seen, classes.names, pattern, features_of, templates)
    if names and not named:
        templates = prompts or ("{}",)
        named = _named(encoder, seen, names, pattern, features_of, templates)
    if not retrieved and not named:
        raise ValueError(f"evaluate: shards must hold pairs that can be read, got {pattern!r}")
    found = {"shards": (retrieved, 0), "classes": (named, len(templates))}
    return {kind: (figures, count) for kind, (figures, count) in found.items() if figures}


def evaluate(
    encoder: Encoder,
    pairs: EmojiPairs | None,
    prompts: Sequence[str] = PROMPTS,
    images: str = "",
    shards: str = "",
    captions: Captions = USUAL,
    own_prompts: Sequence[str] = (),
    *,
    classes: Names | None = None,
    workers: int = 0,
    loss_batch: int = 256,
    cache_gb: float = 100.0,
    say: Callable[[str], object] = lambda line: None,
) -> tuple[dict[str, dict], dict]:
    """(figures of each set, pictures to show with the names chosen) of all that is asked for.

    Args:
        own_prompts: classify what images and shards name; none: as evaluate_folder,
            evaluate_classes.
        classes: what the folders of images, and each .cls in shards, are called.
        workers, loss_batch: as evaluate_shards.
        cache_gb: as ShardPictures.
        say: takes a line that tells how each set was evaluated.
    """
    shown = {"images": torch.zeros(0, 72, 72, 3, dtype=torch.uint8), "chosen": [], "actual": []}
    results: dict[str, dict] = {}
    features_of = _once(encoder.classes)
    if pairs is not None:
        results, shown = evaluate_emoji(encoder, pairs, prompts)
        say(embedded_line(encoder.model, results, len(prompts)))
    found: dict[str, tuple[dict, int]] = {}
    if images:
        given = own_prompts or PHOTO_PROMPTS
        more = dict(classes=classes, workers=workers, features_of=features_of)
        found["images"] = evaluate_folder(encoder, images, given, **more), len(given)
    if shards:
        more = (features_of, own_prompts, workers, loss_batch, cache_gb)
        found |= _both(encoder, shards, captions, classes, *more)
    for kind, (figures, templates) in found.items():
        path = images if kind == "images" else shards
        # A name may hold bytes that are no text.
        name = f"{kind}: {Path(path).name.encode(errors='backslashreplace').decode()}"
        results[name] = figures
        by = (_world(encoder).size, workers)
        say(set_line(name, encoder.model, figures, templates, *by))
    return results, shown


def _once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, called once for equal lists of words."""
    kept: dict[tuple, Tensor] = {}

    def found(*lists: Sequence[str]) -> Tensor:
        key = tuple(map(tuple, lists))
        if key not in kept:
            kept[key] = function(*lists)
        return kept[key]

    return found
