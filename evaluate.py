"""Zero-shot classification and image-text retrieval of a checkpoint.

    python evaluate.py runs/emoji                         the embedded drawings, split by split
    python evaluate.py runs/emoji --images photos         a folder of one folder a class
    python evaluate.py runs/emoji --shards "val/{0..3}.tar"   retrieval on image-text shards

Classification compares an image's feature with each class's: the mean of the normalised features of
its prompts, normalised again. Retrieval ranks captions for an image and images for a caption.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from clipa_kernels import Packed
from data.augment import resize
from data.emoji import CAPTIONS, PROMPTS, EmojiPairs, load_emoji
from data.images import decode_square
from data.shards import read_pairs
from data.text import Tokenizer
from models import CLIP, build, load_weights
from training.checkpoint import latest, load, weights
from training.config import Config, from_json
from training.distributed import autocast_dtype, setup

# For pictures of one's own: a few of OpenAI's templates for ImageNet.
PHOTO_PROMPTS = ("a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "{}")


def build_model(config: Config, vocab_size: int = 0) -> CLIP:
    """The CLIP that a stage's config describes, with fresh weights."""
    if vocab_size > config.vocab_size:
        raise ValueError(
            f"build_model: vocab_size must hold the tokenizer's {vocab_size} entries, "
            f"got {config.vocab_size}"
        )
    return build(
        config.model,
        config.patch_size,
        dialect=config.dialect,
        vision=dict(image_size=config.image_size, pool=config.pool, positions=config.pos_embed),
        text=dict(context=config.context, vocab_size=config.vocab_size),
        logit_scale=config.init_scale,
        logit_bias=config.init_bias if config.loss == "sigmoid" else None,
        impl=config.impl,
    )


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


def retrieval(images: Tensor, texts: Tensor, labels: Tensor) -> dict[str, float]:
    """Recall at 1 and 5, both ways, of images [n, E] whose text is labels [n] among texts [C, E].

    A text is found if any of its images is among the nearest; a text without an image is left out.
    """
    scores = images @ texts.T
    at = min(5, len(texts))
    text_hits = scores.topk(at, 1).indices == labels.unsqueeze(1)
    asked = labels.unique()
    nearest = scores.T[asked].topk(min(5, len(images)), 1).indices
    image_hits = labels[nearest] == asked.unsqueeze(1)
    return {
        "image_to_text_r1": text_hits[:, 0].double().mean().item(),
        "image_to_text_r5": text_hits.any(1).double().mean().item(),
        "text_to_image_r1": image_hits[:, 0].double().mean().item(),
        "text_to_image_r5": image_hits.any(1).double().mean().item(),
    }


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


def evaluate_folder(encoder: Encoder, folder: str | Path) -> dict[str, float]:
    """Zero-shot figures on pictures in one folder a class; the folder's name is the class's.

    Underscores read as spaces. Names that say nothing (n01440764) can be given in
    <folder>/classes.txt, one a line: `n01440764 tench`. A picture that cannot be read is counted in
    "skipped" and left out.
    """
    root = Path(folder)
    classes = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not classes:
        raise ValueError(f"evaluate: images must be a folder of class folders, got {str(root)!r}")
    listed = root / "classes.txt"
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    names = dict(line.split(None, 1) for line in lines if len(line.split(None, 1)) == 2)
    files = [(file, label) for label, path in enumerate(classes) for file in sorted(path.iterdir())]
    size, features, labels = encoder.model.visual.config.image_size, [], []
    for first in range(0, len(files), encoder.batch_size):
        pixels = []
        for file, label in files[first : first + encoder.batch_size]:
            try:
                pixels.append(decode_square(file.read_bytes(), size, squash=True))
                labels.append(label)
            except (ValueError, OSError):
                continue
        if pixels:
            features.append(encoder.images(torch.stack(pixels)))
    if not features:
        raise ValueError(f"evaluate: {root} must hold pictures that can be read, got none")
    words = [names.get(path.name, path.name).replace("_", " ") for path in classes]
    figures = classification(
        torch.cat(features), encoder.classes(words, PHOTO_PROMPTS), torch.tensor(labels)
    )
    return figures | {"skipped": len(files) - len(labels)}


def evaluate_shards(encoder: Encoder, pattern: str) -> dict[str, float]:
    """Retrieval figures on the pairs of tar shards; two pairs with one caption are one text."""
    images, captions, skipped = read_pairs(pattern, encoder.model.visual.config.image_size)
    if not captions:
        raise ValueError(f"evaluate: shards must hold pairs that can be read, got {pattern!r}")
    texts = list(dict.fromkeys(captions))
    labels = torch.tensor([texts.index(caption) for caption in captions])
    figures = retrieval(encoder.images(images), encoder.texts(texts), labels)
    return figures | {"n": len(captions), "chance": 1 / len(texts), "skipped": skipped}


def evaluate(
    encoder: Encoder,
    pairs: EmojiPairs | None,
    prompts: Sequence[str] = PROMPTS,
    images: str = "",
    shards: str = "",
) -> tuple[dict[str, dict], dict]:
    """(figures of each set, pictures to show with the names chosen) of all that is asked for."""
    shown = {"images": torch.zeros(0, 72, 72, 3, dtype=torch.uint8), "chosen": [], "actual": []}
    results: dict[str, dict] = {}
    if pairs is not None:
        results, shown = evaluate_emoji(encoder, pairs, prompts)
    if images:
        results[f"images: {Path(images).name}"] = evaluate_folder(encoder, images)
    if shards:
        results[f"shards: {Path(shards).name}"] = evaluate_shards(encoder, shards)
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


@dataclass(frozen=True)
class Flags:
    """Zero-shot classification and retrieval of a checkpoint."""

    checkpoint: tyro.conf.Positional[str]  # a file, or a run's folder: its newest one
    images: str = ""  # folder of class folders to classify
    shards: str = ""  # tar shards to retrieve from
    device: str = "auto"  # auto: cuda where there is one, else cpu
    batch_size: int = 256  # images or captions at a time
    json: bool = False  # print JSON instead of a table


def main(argv: list[str] | None = None) -> None:
    """The program. A checkpoint or folder that will not do ends it with a sentence."""
    flags = tyro.cli(Flags, args=argv)
    try:
        world = setup(flags.device)
        path = Path(flags.checkpoint)
        state = latest(path) if path.is_dir() else load(path)
        if state is None:
            raise ValueError(f"{path} must hold a checkpoint, got an empty folder")
        config, tokenizer = from_json(state["config"]), Tokenizer.from_json(state["tokenizer"])
        model = build_model(config, tokenizer.vocab_size)
        load_weights(model, weights(state))
        dtype = autocast_dtype(config.precision, world.device)
        model = model.to(world.device).eval()
        encoder = Encoder(model, tokenizer, world.device, dtype, flags.batch_size)
        asked = flags.images or flags.shards
        pairs = None if asked else load_emoji()
        prompts = CAPTIONS[config.captions][1]
        results, _ = evaluate(encoder, pairs, prompts, flags.images, flags.shards)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"evaluate.py: {error}")
    print(json.dumps(results, indent=2) if flags.json else table(results))


if __name__ == "__main__":
    main()
