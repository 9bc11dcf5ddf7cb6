"""What a sample of shards costs one core, stage by stage, and how many cores a GPU needs.

    python -m data.bench "shards/{00000..00099}.tar" --image-size 64 --augment.brightness 0.3

The first samples are read, decoded, cropped, coloured and tokenised as training does it, on one
thread, and each stage is timed by itself: reading by the clock, the others by the core's time. What
the disk has in its cache is read at the speed of memory: the first of two runs says what it costs.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
import tyro

from .augment import Augmentation, recolour, sample_draws, shape_draws
from .images import _guarded, _loaded_for, decode_crop
from .pairs import USUAL, Unreadable, read_pair
from .shards import _first_rows
from .text import clip_bpe, load_tokenizer

_BATCH = 256


@dataclass(frozen=True)
class Flags:
    """Time what a sample of shards costs one core, stage by stage."""

    pattern: tyro.conf.Positional[str]  # shards, "pairs/{0000..0099}.tar"
    samples: int = 2000  # of the first, that are timed
    image_size: int = 64  # pixels a side
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # of the crop
    context: int = 16  # tokens of a caption at most
    tokenizer: str = "clip"  # or a tokenizers.json, vocab.txt
    gpu_images_per_s: float = 10_000
    """what one GPU trains on; the log's samples_per_s tells yours. The default is a ViT-L/16 with
    17 tokens an image and 8 a caption, 35 GFLOP a sample, at 35% of an H100's bf16 peak"""
    augment: Augmentation = field(default_factory=Augmentation)  # strengths, as of training


def main(argv: list[str] | None = None) -> None:
    """The program. What will not do ends it with a sentence."""
    flags = tyro.cli(Flags, args=argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds, count = times(flags)
    except (ValueError, OSError, RuntimeError) as error:  # the last: CLIP's table is not installed
        raise SystemExit(f"data.bench: {error}") from error
    finally:
        torch.set_num_threads(threads)
    total = sum(seconds.values())
    print(f"{'':12}{'us a sample':>12}{'samples/s':>12}")
    for stage, spent in [*seconds.items(), ("all", total)]:
        rate = f"{count / spent:,.0f}" if spent else "-"
        print(f"{stage:12}{1e6 * spent / count:12,.1f}{rate:>12}")
    cores = flags.gpu_images_per_s * total / count
    print(
        f"{count:,} samples to {flags.image_size} pixels on one core: a GPU that takes "
        f"{flags.gpu_images_per_s:,.0f} images/s needs {cores:.1f} such cores"
    )


def times(flags: Flags) -> tuple[dict[str, float], int]:
    """Seconds of each stage over all samples that can be read, and how many these are.

    Raises:
        ValueError: a number out of its range, shards that will not do, no sample to read.
    """
    for name in ("samples", "image_size", "gpu_images_per_s"):
        if getattr(flags, name) <= 0:
            raise ValueError(f"bench: {name} must be above 0, got {getattr(flags, name)}")
    tokenizer = clip_bpe() if flags.tokenizer == "clip" else load_tokenizer(flags.tokenizer)
    seconds = dict.fromkeys(("read", "decode", "crop", "jitter", "tokenise"), 0.0)
    count, how = 0, flags.augment

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        clock = time.perf_counter if stage == "read" else time.process_time
        began = clock()
        done = work()
        seconds[stage] += clock() - began
        return done

    rows = _first_rows(flags.pattern, flags.samples, USUAL.kinds)
    for step in range(-(-flags.samples // _BATCH)):
        key = {"seed": 0, "step": step}
        pairs = timed("read", lambda: list(_readable(islice(rows, _BATCH))))
        draws, shapes = sample_draws(len(pairs), **key), shape_draws(len(pairs), how, **key)
        images, captions = [], []
        for place, (data, caption) in enumerate(pairs):
            draw, shape = draws[place], None if shapes is None else shapes[place]
            crop = partial(decode_crop, data, flags.image_size, draw, how, flags.interpolation)
            before = seconds["decode"]
            try:
                timed("decode", partial(_decoded, data, flags.image_size, draw.tolist(), how))
                images.append(timed("crop", partial(crop, shape)))
                captions.append(caption)
            except ValueError:
                continue
            seconds["crop"] -= seconds["decode"] - before  # it decodes too
        if images:
            batch = torch.stack(images)
            timed("jitter", partial(recolour, batch, how, **key))
            timed("tokenise", partial(tokenizer.encode, captions, flags.context, **key))
        count += len(images)
    if count == 0:
        raise ValueError(f"bench: samples of {flags.pattern} must be readable, got none")
    return seconds, count


def _decoded(data: bytes, size: int, numbers: list[float], how: Augmentation) -> None:
    """All that comes before a crop; Pillow decodes no earlier than `load`."""
    _guarded("bench", data, lambda image: _loaded_for(image, size, numbers, how)[0].load())


def _readable(rows: Iterator[tuple]) -> Iterator[tuple[bytes, str]]:
    """An image file's bytes and a caption for each row that has both."""
    for file, path, row in rows:
        try:
            yield read_pair(file, path, row, bytes)
        except Unreadable:
            continue


if __name__ == "__main__":
    main()
