"""The report picture: loss, accuracy of each stage by split, held-out pictures with names."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.files import write_whole

_RIGHT, _WRONG, _INK, _PALE = "#1a7f4b", "#c8402f", "#22262b", "#8a9099"
_BLUES = ("#8fb3dd", "#1f5fa8", "#0b2e59")  # of the stages, in turn
_COLUMNS = 8


def picture(
    path: str | Path,
    *,
    rows: Sequence[dict],
    results: dict,
    images: Tensor,
    chosen: Sequence[str],
    actual: Sequence[str],
    title: str = "",
) -> None:
    """Draw the report: loss of all stages, accuracy by split and stage, pictures with their names.

    Args:
        path: of the PNG.
        rows: of the log, from `read_rows`.
        results: as `write_results` takes them.
        images: [n, S, S, 3] uint8, held out from training; the first 24 are drawn.
        chosen: n names that the model chose.
        actual: n names that are right.
        title: one line above all.

    Raises:
        ValueError: images that are not [n, S, S, 3], or not as many names.
        TypeError: images that are not uint8.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"picture: images must be uint8, got {images.dtype}")
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"picture: images must be [n, S, S, 3], got {tuple(images.shape)}")
    if not len(images) == len(chosen) == len(actual):
        counts = f"{len(images)} images, {len(chosen)} chosen, {len(actual)} actual"
        raise ValueError(f"picture: there must be one name of each kind an image, got {counts}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    count = min(len(images), 3 * _COLUMNS)
    lines = math.ceil(count / _COLUMNS)
    heights = (4.4, 0.5 + 1.95 * lines)  # inches: curves above, pictures below
    figure = Figure(figsize=(13, sum(heights)), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    if title:
        top.suptitle(title, x=0.02, y=0.97, ha="left", fontsize=14, weight="bold", color=_INK)
    left, right = top.subplots(1, 2, width_ratios=(1, 1.05))
    top.subplots_adjust(left=0.06, right=0.97, top=0.8, bottom=0.14, wspace=0.5)
    _draw_loss(left, rows)
    _draw_accuracy(right, results.get("stages", {}))
    if count:
        _draw_images(bottom, heights[1], images[:count], chosen, actual)
    with write_whole(path) as file:
        figure.savefig(file, format="png")


def _bare(axis) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(_PALE)
    axis.tick_params(colors=_INK, labelsize=9)


def _smooth(values: list[float]) -> list[float]:
    """An exponential mean over about a fortieth of the curve, without the lag of its start."""
    keep = 1 - 1 / max(1.0, len(values) / 40)
    total, weight, smooth = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smooth.append(total / weight)
    return smooth


def _draw_loss(axis, rows: Sequence[dict]) -> None:
    _bare(axis)
    offset = 0
    for number, stage in enumerate(dict.fromkeys(row["stage"] for row in rows)):
        points = [row for row in rows if row["stage"] == stage and row.get("loss") is not None]
        if not points:
            continue
        steps = [offset + row["step"] for row in points]
        losses = [row["loss"] for row in points]
        colour = _BLUES[number % len(_BLUES)]
        axis.plot(steps, losses, color=colour, linewidth=0.8, alpha=0.45)
        axis.plot(steps, _smooth(losses), color=colour, linewidth=2.2, label=stage)
        if offset:
            axis.axvline(offset, color=_PALE, linewidth=0.8, linestyle=(0, (2, 3)))
        offset = steps[-1]
    axis.set_title("Training loss", loc="left", fontsize=11, color=_INK)
    axis.set_xlabel("step", fontsize=9, color=_INK)
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", color="#e8eaed", linewidth=0.8)
    axis.set_axisbelow(True)
    if offset:
        axis.legend(frameon=False, fontsize=9, loc="upper right")


def _draw_accuracy(axis, results: dict[str, dict[str, dict]]) -> None:
    _bare(axis)
    stages = list(results)
    splits = list(dict.fromkeys(split for stage in stages for split in results[stage]))
    height, most = 0.8 / max(1, len(stages)), 0.0
    for row, split in enumerate(splits):
        for number, stage in enumerate(stages):
            figures = results[stage].get(split)
            if figures is None:
                continue
            share = figures.get("top1", figures.get("image_to_text_r1", 0.0))  # or retrieval's
            most = max(most, share)
            at = row + (number - (len(stages) - 1) / 2) * height
            colour, label = _BLUES[number % len(_BLUES)], stage if row == 0 else None
            axis.barh(at, share, height * 0.9, color=colour, label=label)
            words = f" {share:.1%}" + (f", loss {figures['loss']:.3f}" if "loss" in figures else "")
            axis.text(share, at, words, va="center", fontsize=8.5, color=_INK)
            chance = figures["chance"]
            label = "chance" if row == 0 and number == len(stages) - 1 else None
            axis.plot([chance] * 2, [at - height / 2, at + height / 2], color=_WRONG, label=label)
    last = results[stages[-1]] if stages else {}
    names = [f"{textwrap.fill(s, 26)}\nn={last[s]['n']}" if s in last else s for s in splits]
    axis.set_yticks(range(len(splits)), names, fontsize=8.5, parse_math=False)
    axis.invert_yaxis()
    axis.set_xlim(0, max(most * 1.15, 0.01))
    axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.set_title("Zero-shot accuracy, first choice", loc="left", fontsize=11, color=_INK)
    if splits:
        axis.legend(frameon=False, fontsize=9, ncols=3, loc="lower right", bbox_to_anchor=(1, 1.06))


def _draw_images(figure, height: float, images: Tensor, chosen, actual) -> None:
    lines, count = math.ceil(len(images) / _COLUMNS), len(images)
    axes = figure.subplots(lines, _COLUMNS, squeeze=False).flat
    edge = {"left": 0.03, "right": 0.97, "top": 1 - 0.5 / height, "bottom": 0.7 / height}
    figure.subplots_adjust(**edge, hspace=0.62, wspace=0.1)
    for index, axis in enumerate(axes):
        axis.set_axis_off()
        if index < count:
            _draw_image(axis, images[index].cpu().numpy(), chosen[index], actual[index])
    hits = sum(chosen[index] == actual[index] for index in range(count))
    words = f"Held-out drawings and the name chosen: {hits} of these {count} right"
    figure.suptitle(words, x=0.02, y=0.99, ha="left", fontsize=11, color=_INK)


def _draw_image(axis, image, chosen: str, actual: str) -> None:
    right = chosen == actual
    colour = _RIGHT if right else _WRONG
    size = image.shape[0]
    axis.imshow(image, interpolation="lanczos", extent=(0, size, size, 0))
    pad = 0.05 * size
    axis.set_xlim(-pad, size + pad)
    axis.set_ylim(size + pad, -pad)
    frame = {"fill": False, "edgecolor": colour, "linewidth": 2.2, "clip_on": False}
    from matplotlib.patches import FancyBboxPatch

    axis.add_patch(
        FancyBboxPatch((0, 0), size, size, boxstyle=f"round,pad={pad}", mutation_scale=1, **frame)
    )
    words = textwrap.shorten(chosen, 40, placeholder="...")
    mark = "\u2713" if right else "\u2717"
    below = textwrap.fill(f"{mark} {words}", 21)
    lines = below.count("\n") + 1
    place = {"ha": "center", "va": "top", "fontsize": 8, "linespacing": 1.1, "parse_math": False}
    axis.text(size / 2, size + 2.4 * pad, below, color=colour, weight="bold", **place)
    if not right:
        truth = textwrap.fill(f"is {textwrap.shorten(actual, 40, placeholder='...')}", 24)
        axis.text(size / 2, size + (2.6 + 2.6 * lines) * pad, truth, color=_PALE, **place)
