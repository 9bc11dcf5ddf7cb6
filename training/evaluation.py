"""Zero-shot classification and retrieval: features of a model, and figures of a set.

Classification compares an image's feature with each class's: the mean of the normalised features of
its prompts, normalised again. Retrieval ranks captions for an image and images for a caption.
Pictures from files are resized as the model's dialect says.
"""

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clipa_kernels import Packed
from data.augment import resize
from data.emoji import PROMPTS, EmojiPairs
from data.files import decoded, read_text
from data.folders import class_names, read_folder
from data.pairs import USUAL, Captions
from data.patterns import file_names
from data.remote import is_remote, read_small
from data.shards import read_pairs
from data.text import Tokenizer
from models import CLIP, DIALECTS

# For pictures of one's own: a few of OpenAI's templates for ImageNet.
PHOTO_PROMPTS = ("a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "{}")


@dataclass
class Encoder:
    """A model with what its inputs need: features of pictures and of texts, normalised, fp32."""

    model: CLIP
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype = torch.float32
    batch_size: int = 256

    def _run(self, function, *inputs) -> Tensor:
        fast = self.dtype != torch.float32
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype, enabled=fast):
            return F.normalize(function(*inputs).float(), dim=-1).cpu()

    def images(self, images: Tensor) -> Tensor:
        """uint8 [n, H, W, 3] of any size, squashed to the model's -> [n, E]."""
        size = self.model.visual.config.image_size
        parts = [
            self._run(
                self.model.encode_image, resize(part, size).permute(0, 3, 1, 2).to(self.device)
            )
            for part in images.split(self.batch_size)
        ]
        return torch.cat(parts) if parts else torch.empty(0, self.model.embed_dim)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Captions -> [n, E]."""
        config, parts = self.model.config, []
        for first in range(0, len(texts), self.batch_size):
            part = texts[first : first + self.batch_size]
            pad = config.pool == "last"
            ids, ends, longest = self.tokenizer.encode(part, config.context, pad=pad)
            packed = Packed(ids.to(self.device), ends.to(self.device), longest)
            parts.append(self._run(self.model.encode_text, packed))
        return torch.cat(parts) if parts else torch.empty(0, self.model.embed_dim)

    def classes(self, names: Sequence[str], prompts: Sequence[str]) -> Tensor:
        """Class features [C, E]: mean over the prompts of each name, normalised again."""
        features = self.texts([prompt.format(name) for name in names for prompt in prompts])
        return F.normalize(features.view(len(names), len(prompts), -1).mean(1), dim=-1)


def classification(images: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of images [n, E] whose class [n] is the nearest, or among the nearest five, of [C, E].

    >>> eye = torch.eye(6)
    >>> classification(eye[:2], eye, torch.tensor([0, 2]))["top1"]
    0.5
    """
    ranked = (images @ classes.T).topk(min(5, len(classes)), 1).indices
    hits = ranked == labels.unsqueeze(1)
    return {
        "top1": hits[:, 0].double().mean().item(),
        "top5": hits.any(1).double().mean().item(),
        "n": len(labels),
        "chance": 1 / len(classes),
    }


def retrieval(images: Tensor, texts: Tensor, pairs: Tensor) -> dict[str, float]:
    """Recall at 1 and 5, both ways, of images [n, E] and texts [C, E].

    pairs [P, 2] says which image has which text; [n] gives each image its one text. An image is
    right if any of its texts is among the nearest, a text if any of its images is; what has no
    partner is left out.
    """
    if pairs.ndim == 1:
        pairs = torch.stack([torch.arange(len(pairs)), pairs], 1)
    image_r1, image_r5 = _recall(images, texts, pairs)
    text_r1, text_r5 = _recall(texts, images, pairs.flip(1))
    return {
        "image_to_text_r1": image_r1,
        "image_to_text_r5": image_r5,
        "text_to_image_r1": text_r1,
        "text_to_image_r5": text_r5,
    }


def _recall(queries: Tensor, targets: Tensor, pairs: Tensor) -> tuple[float, float]:
    """Share of paired queries with a partner that is the nearest target, or of the nearest five."""
    partners = pairs[:, 0] * len(targets) + pairs[:, 1]
    hits = []
    for asked in pairs[:, 0].unique().split(1024):  # never all scores at once
        nearest = (queries[asked] @ targets.T).topk(min(5, len(targets)), 1).indices
        hits.append(torch.isin(asked.unsqueeze(1) * len(targets) + nearest, partners))
    found = torch.cat(hits)
    return found[:, 0].double().mean().item(), found.any(1).double().mean().item()


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


def _resizing(model: CLIP) -> dict[str, int | bool | str]:
    """How pictures from files become the model's size; arguments of decode_square."""
    dialect = getattr(model, "dialect", DIALECTS["open_clip"])  # another's model: as open_clip
    squash, interpolation = dialect.squash, dialect.interpolation
    size = model.visual.config.image_size
    return dict(size=size, squash=squash, interpolation=interpolation)


def prompts_in(text: str) -> tuple[str, ...]:
    """Templates of the flag's form, parted by ";"; none of an empty one.

    >>> prompts_in("a photo of a {}.;{}")
    ('a photo of a {}.', '{}')
    """
    prompts = tuple(text.split(";")) if text else ()
    if wrong := [one for one in prompts if not re.fullmatch(r"[^{}]*\{\}[^{}]*", one)]:
        raise ValueError(f"evaluate: prompts must each hold one {{}}, got {wrong[0][:80]!r}")
    return prompts


def check_sets(images: str = "", shards: str = "", captions: Captions = USUAL) -> None:
    """ValueError unless each set that is given holds something to evaluate; stops at the first."""
    if images and not any(pixels is not None for _, pixels in read_folder(images, 8)):
        raise ValueError(f"evaluate: {images} must hold pictures that can be read, got none")
    if shards and not any(
        read_pairs(shards, 8, count, captions=captions)[1] for count in (1, 10_000)
    ):
        raise ValueError(f"evaluate: shards must hold pairs that can be read, got {shards!r}")


def evaluate_folder(
    encoder: Encoder, folder: str | Path, prompts: Sequence[str] = PHOTO_PROMPTS
) -> dict[str, float]:
    """Zero-shot figures on pictures in one folder a class; data/folders.py says how they are named.

    A file that cannot be read is counted in "skipped" and left out; a folder without a picture that
    can be read is no class.
    """
    features, found, pixels, skipped = [], [], [], 0
    for path, picture in read_folder(folder, **_resizing(encoder.model)):
        if picture is None:
            skipped += 1
            continue
        found.append(path)
        pixels.append(picture)
        if len(pixels) == encoder.batch_size:
            features.append(encoder.images(torch.stack(pixels)))
            pixels = []
    if not found:
        raise ValueError(f"evaluate: {folder} must hold pictures that can be read, got none")
    if pixels:
        features.append(encoder.images(torch.stack(pixels)))
    classes = list(dict.fromkeys(found))
    names = class_names(folder, classes)
    labels = torch.tensor([classes.index(path) for path in found])
    figures = classification(torch.cat(features), encoder.classes(names, prompts), labels)
    return figures | {"skipped": skipped}


def evaluate_shards(encoder: Encoder, pattern: str, captions: Captions = USUAL) -> dict[str, float]:
    """Retrieval figures on the pictures of tar shards, each with all of its captions.

    A caption that several pictures have is one text, found if any of them is. n counts pictures.
    """
    how = _resizing(encoder.model)
    images, found, skipped = read_pairs(pattern, **how, captions=captions)
    if not found:
        raise ValueError(f"evaluate: shards must hold pairs that can be read, got {pattern!r}")
    texts = list(dict.fromkeys(text for one in found for text in one))
    places = {text: place for place, text in enumerate(texts)}
    pairs = {(image, places[text]) for image, one in enumerate(found) for text in one}
    figures = retrieval(encoder.images(images), encoder.texts(texts), torch.tensor(sorted(pairs)))
    chance = len(pairs) / (len(images) * len(texts))
    return figures | {"n": len(images), "chance": chance, "skipped": skipped}


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
    encoder: Encoder, pattern: str, prompts: Sequence[str] = ("{}",)
) -> dict[str, float] | None:
    """Zero-shot figures on the pictures of shards whose caption is a line of their classes.txt.

    The caption is the .txt, or the .json's "caption", whatever training draws; of several captions,
    the first that is listed. Pictures without one are left out. None where there is no classes.txt,
    and, with a warning, where none of its names is a caption.
    """
    names = listed_classes(pattern)
    if not names:
        return None
    images, captions, skipped = read_pairs(pattern, **_resizing(encoder.model))
    places = {name: place for place, name in enumerate(names)}
    labels = [next((places[text] for text in one if text in places), -1) for one in captions]
    labels = torch.tensor(labels, dtype=torch.int64)
    named = labels >= 0
    if not named.any():
        came = f"none, the first {names[0]!r}; nothing is classified"
        must = f"classes.txt must hold captions of {pattern}"
        warnings.warn(f"evaluate: {must}, got {came}", stacklevel=2)
        return None
    features, classes = encoder.images(images[named]), encoder.classes(names, prompts)
    return classification(features, classes, labels[named]) | {"skipped": skipped}


def evaluate(
    encoder: Encoder,
    pairs: EmojiPairs | None,
    prompts: Sequence[str] = PROMPTS,
    images: str = "",
    shards: str = "",
    captions: Captions = USUAL,
    own_prompts: Sequence[str] = (),
) -> tuple[dict[str, dict], dict]:
    """(figures of each set, pictures to show with the names chosen) of all that is asked for.

    own_prompts classify what images and shards name; none: as evaluate_folder, evaluate_classes.
    """
    shown = {"images": torch.zeros(0, 72, 72, 3, dtype=torch.uint8), "chosen": [], "actual": []}
    results: dict[str, dict] = {}
    if pairs is not None:
        results, shown = evaluate_emoji(encoder, pairs, prompts)
    given = {"prompts": own_prompts} if own_prompts else {}
    for kind, path, figures in (
        ("images", images, partial(evaluate_folder, **given)),
        ("shards", shards, partial(evaluate_shards, captions=captions)),
        ("classes", shards, partial(evaluate_classes, **given)),
    ):
        if path and (found := figures(encoder, path)):
            # A name may hold bytes that are no text.
            name = Path(path).name.encode(errors="backslashreplace").decode()
            results[f"{kind}: {name}"] = found
    return results, shown


def table(results: dict[str, dict]) -> str:
    """The figures of each split as lines of text, in percent."""
    heads = ("top-1", 7), ("top-5", 7), ("i>t R1", 8), ("R5", 7), ("t>i R1", 8), ("R5", 7), ("n", 7)
    lines = [" " * 30 + "".join(f"{head:>{width}}" for head, width in heads) + "  chance"]
    for name, figures in results.items():
        cells = [f"{name:30}"]
        for key, width in (("top1", 7), ("top5", 7), ("image_to_text_r1", 8),
                           ("image_to_text_r5", 7), ("text_to_image_r1", 8),
                           ("text_to_image_r5", 7)):  # fmt: skip
            cells.append(f"{100 * figures[key]:{width}.1f}" if key in figures else " " * width)
        lines.append("".join(cells) + f"{figures['n']:7d}  {100 * figures['chance']:.2f}")
    return "\n".join(lines)
