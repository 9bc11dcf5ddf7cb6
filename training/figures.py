"""Figures of a set from its features, the same for any number of processes, and how they are told.

No matrix of all scores exists: queries are compared in parts, which the processes share.
"""

import torch
from torch import Tensor, nn

from clipa_kernels import contrastive_loss, sigmoid_loss
from models import CLIP, DIALECTS

from .distributed import World

_SCORES = 2**24  # at a time, at most
ALONE = World(0, 0, 1, torch.device("cpu"))  # the only process


def classification(
    images: Tensor, classes: Tensor, labels: Tensor, *, world: World = ALONE
) -> dict[str, float]:
    """Share of images [n, E] whose class [n] is the nearest, or among the nearest five, of [C, E].

    Args:
        world: whose processes share the work, and must all call it.

    >>> eye = torch.eye(6)
    >>> classification(eye[:2], eye, torch.tensor([0, 2]))["top1"]
    0.5
    """
    ranked = _nearest(images, classes, world)
    hits = ranked == labels.unsqueeze(1)
    return {
        "top1": hits[:, 0].double().mean().item(),
        "top5": hits.any(1).double().mean().item(),
        "n": len(labels),
        "chance": 1 / len(classes),
    }


def _nearest(queries: Tensor, targets: Tensor, world: World) -> Tensor:
    """Numbers of the five nearest targets, or all if fewer, of each query."""
    step = max(1, _SCORES // len(targets))

    def make(number: int) -> Tensor:
        scores = queries[number * step : (number + 1) * step] @ targets.T
        return scores.topk(min(5, len(targets)), 1).indices

    return torch.cat(world.share(max(1, -(-len(queries) // step)), make))


def retrieval(
    images: Tensor, texts: Tensor, pairs: Tensor, *, world: World = ALONE
) -> dict[str, float]:
    """Recall at 1 and 5, both ways, of images [n, E] and texts [C, E].

    pairs [P, 2] says which image has which text; [n] gives each image its one text. An image is
    right if any of its texts is among the nearest, a text if any of its images is; what has no
    partner is left out. The processes of `world` share the work, and must all call it.
    """
    if pairs.ndim == 1:
        pairs = torch.stack([torch.arange(len(pairs)), pairs], 1)
    image_r1, image_r5 = _recall(images, texts, pairs, world)
    text_r1, text_r5 = _recall(texts, images, pairs.flip(1), world)
    return {
        "image_to_text_r1": image_r1,
        "image_to_text_r5": image_r5,
        "text_to_image_r1": text_r1,
        "text_to_image_r5": text_r5,
    }


def _recall(queries: Tensor, targets: Tensor, pairs: Tensor, world: World) -> tuple[float, float]:
    """Share of paired queries with a partner that is the nearest target, or of the nearest five."""
    partners = pairs[:, 0] * len(targets) + pairs[:, 1]
    asked = pairs[:, 0].unique()
    nearest = _nearest(queries[asked], targets, world)
    found = torch.isin(asked.unsqueeze(1) * len(targets) + nearest, partners)
    return found[:, 0].double().mean().item(), found.any(1).double().mean().item()


def pair_losses(
    model: nn.Module, images: Tensor, texts: Tensor, batch: int, *, world: World = ALONE
) -> dict[str, float]:
    """The model's loss (sigmoid where it has a logit bias) on pairs of features [n, E], in fp32.

    Batches are of `batch` pairs, or of all where these are fewer, each taken at even distances from
    the whole set; up to batch - 1 pairs are left out. {} of a model without a scale.

    Returns:
        "loss", the mean over the batches, and "loss_batch", their size.
    """
    scale, bias = getattr(model, "logit_scale", None), getattr(model, "logit_bias", None)
    if not isinstance(scale, Tensor) or not len(images):
        return {}
    scale = scale.detach()
    size = min(batch, len(images))
    count = len(images) // size

    def make(number: int) -> float:
        each = [part[number::count][:size].to(scale.device) for part in (images, texts)]
        if bias is None:
            return contrastive_loss(*each, scale.exp()).item()
        return sigmoid_loss(*each, scale.exp(), bias.detach()).item()

    losses = world.share(count, make)
    return {"loss": sum(losses) / count, "loss_batch": size}


def table(results: dict[str, dict]) -> str:
    """The figures of each split as lines of text, in percent but for the loss."""
    heads = ("top-1", 7), ("top-5", 7), ("i>t R1", 8), ("R5", 7), ("t>i R1", 8), ("R5", 7), ("n", 7)
    lines = [" " * 30 + "".join(f"{head:>{width}}" for head, width in heads) + "  chance"]
    if any("loss" in figures for figures in results.values()):
        lines[0] += "  loss"
    for name, figures in results.items():
        cells = [f"{name:30}"]
        for key, width in (("top1", 7), ("top5", 7), ("image_to_text_r1", 8),
                           ("image_to_text_r5", 7), ("text_to_image_r1", 8),
                           ("text_to_image_r5", 7)):  # fmt: skip
            cells.append(f"{100 * figures[key]:{width}.1f}" if key in figures else " " * width)
        loss = f"{figures['loss']:.4f}" if "loss" in figures else ""
        line = f"{figures['n']:7d}  {100 * figures['chance']:<6.2f}  {loss}"
        lines.append(("".join(cells) + line).rstrip())
    return "\n".join(lines)


def resizing(model: CLIP) -> dict[str, int | bool | str]:
    """How pictures from files become the model's size; arguments of decode_square."""
    dialect = getattr(model, "dialect", DIALECTS["open_clip"])  # another's model: as open_clip
    squash, interpolation = dialect.squash, dialect.interpolation
    size = model.visual.config.image_size
    return dict(size=size, squash=squash, interpolation=interpolation)


def set_line(
    name: str, model: CLIP, figures: dict, templates: int, processes: int, workers: int
) -> str:
    """How a set was evaluated, in a line."""
    how = resizing(model)
    resized = "both sides resized" if how["squash"] else "shortest side resized, centre cropped"
    asked = [f"{_many(templates, 'template')} x {_many(round(1 / figures['chance']), 'class')}"]
    if "top1" not in figures:
        asked = ["retrieval"]
    if "loss" in figures:
        count = _many(figures["n"] // figures["loss_batch"], "batch")
        asked.append(f"loss of {count} of {_many(figures['loss_batch'], 'pair')}")
    by = f"{_many(processes, 'process')} x {_many(workers or 1, 'worker' if workers else 'thread')}"
    counts = f"n {figures['n']:,}, skipped {figures['skipped']:,}"
    seen = f"{_inputs(model)}, {resized}, {how['interpolation']}"
    return f"{name}: " + "; ".join([seen, *asked, counts, f"decoded by {by}"])


def embedded_line(model: CLIP, results: dict[str, dict], templates: int) -> str:
    """How the embedded set was evaluated, in a line."""
    parts = [figures for name, figures in results.items() if name != "held-out drawings"]
    classes = sorted(round(1 / figures["chance"]) for figures in parts)
    asked = f"{_many(templates, 'template')} x {classes[0]:,} to {classes[-1]:,} classes, retrieval"
    count = f"n {sum(figures['n'] for figures in parts):,}, skipped 0"
    resized = "both sides resized, bilinear"
    return f"embedded drawings: {_inputs(model)}, {resized}; {asked}; {count}; kept decoded"


def _many(count: int, word: str) -> str:
    """A number with its noun."""
    ending = "" if count == 1 else "es" if word.endswith(("s", "ch")) else "s"
    return f"{count:,} {word}{ending}"


def _inputs(model: CLIP) -> str:
    """Sizes of what the model takes; another's may not tell all."""
    visual, text = model.visual.config, getattr(model, "config", None)
    told = [f"{visual.image_size} x {visual.image_size} pixels"]
    if patch := getattr(visual, "patch_size", None):
        told.append(f"{1 + (visual.image_size // patch) ** 2} image tokens")
    if text is not None:
        told.append(f"at most {text.context} text tokens")
    return ", ".join(told)
