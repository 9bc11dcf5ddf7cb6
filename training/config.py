"""One dataclass holds every choice of a run; its fields are the flags of train.py.

A run has two stages: "short" trains with few tokens, "full" is the brief fine-tune with all of
them. `stages(config)` gives one Config a stage. Flags override a preset of presets.py.
"""

import dataclasses
import json
import sys
import tempfile
import textwrap
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .presets import PRESETS

STAGES = ("short", "full")  # in the order they run

Preset = Literal[
    "emoji", "clipa-v1-b16", "clipa-v1-l16", "clipa-v1-l16-i17",
    "clipa-v2-l14", "clipa-v2-h14", "clipa-v2-h14-70", "clipa-v2-bigg14",
]  # fmt: skip
Stage = Annotated[Literal["short", "full"], tyro.conf.Fixed, tyro.conf.Suppress]
PosEmbed = Literal["learnable", "sincos-mae", "sincos-moco"]
ImageMask = Literal["none", "random", "grid", "block"]
TextMask = Literal["truncate", "random", "block", "syntax"]


@dataclass(frozen=True)
class Config:
    """Train a CLIP with few tokens, then briefly with all of them."""

    preset: Preset = "emoji"  # recipe that the other flags start from
    stage: Stage = "short"  # set by stages(), not by a flag

    # data
    data: str = "emoji"  # "emoji" (ships with pip) or local shards, "pairs/{0000..0099}.tar"
    tokenizer: str = "wordpiece"  # trained on the captions; "clip"; or a tokenizers.json, vocab.txt
    vocab_size: int = 2000  # rows of the token table; at least the tokenizer's entries
    crop_scale: tuple[float, float] = (0.4, 1.0)  # area of a random crop; above 1: with a margin
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # least and most width / height of a crop
    shift: float = 0.0  # share of the side that a crop moves either way, beyond the edge too
    rotate: float = 0.0  # degrees, most rotation either way
    warp: float = 0.0  # deviation, in half sides, of a smooth field that bends the image
    outline: float = 0.0  # share of images whose edges are darkened
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """strengths: brightness, contrast, saturation, hue"""
    jitter_prob: float = 0.8  # share of images whose colours are jittered
    channel_mix: float = 0.0  # most of each colour channel that is added to each other one
    gray_prob: float = 0.0  # share of images turned gray
    blend: float = 0.0  # embedded set: share of images faded into their concept's other drawing
    captions: Literal["names", "words", "all"] = "names"  # embedded set: data.emoji.CAPTIONS
    workers: int = 0  # processes that decode images; 0: threads of this one

    # model
    model: str = "B"  # a size: Ti S M B L H g bigG, or demo
    dialect: Literal["openai", "open_clip", "clipa-v1", "clipa-v2", "clipa-v2-open_clip"] = (
        "open_clip"
    )
    """decides GELU, LayerNorm and Adam eps, ln_pre, text mask and pooling, decay, scale clamp"""
    patch_size: int = 8  # pixels a side
    pool: Literal["cls", "mean", "mean-with-cls"] = "mean"  # image feature from the tokens
    pos_embed: PosEmbed = "learnable"  # image position table

    # first stage: few tokens
    image_size: int = 16  # pixels a side
    image_mask: ImageMask = "none"  # which patches are dropped
    image_drop: float = 0.0  # share of patches dropped, for random and block
    context: int = 16  # text tokens at most, special ones included
    text_mask: TextMask = "truncate"  # which tokens of longer captions stay
    steps: int = 2000  # optimiser steps
    batch_size: int = 128  # global: all processes, all accumulated parts
    accumulate: int = 1  # parts a step is computed in, to save memory
    lr: float = 1e-3  # peak, for the whole batch: (papers' lr) * batch / 256
    warmup: int = 100  # steps of linear warm-up before the cosine to 0

    # second stage: all tokens, from the first stage's weights
    finetune_image_size: int = 32  # pixels a side
    finetune_image_mask: ImageMask = "none"  # CLIPA-v2 still masks 30 % here
    finetune_image_drop: float = 0.0  # share of patches dropped
    finetune_context: int = 16  # text tokens at most
    finetune_text_mask: TextMask = "truncate"  # which tokens of longer captions stay
    finetune_pos_embed: PosEmbed = "learnable"  # CLIPA-v1 goes from fixed to learnable
    finetune_steps: int = 200  # 0: no second stage
    finetune_batch_size: int = 128  # global
    finetune_accumulate: int = 1  # parts a step is computed in
    finetune_lr: float = 1e-4  # peak
    finetune_warmup: int = 20  # steps

    # optimisation, both stages
    weight_decay: float = 0.1  # decoupled; on the tensors that the dialect decays
    beta1: float = 0.9  # Adam's momentum
    beta2: float = 0.95  # Adam's second moment; 0.98 for small batches
    adam_eps: float | None = None  # None: the dialect's
    clip_norm: float = 0.0  # largest gradient norm; 0: not clipped
    loss: Literal["softmax", "sigmoid"] = "softmax"  # CLIP's or SigLIP's
    init_scale: float = 1 / 0.07  # exp(logit_scale) at the start; SigLIP takes 10
    init_bias: float = -10.0  # logit_bias at the start, sigmoid loss only
    max_scale: float | None = None  # bound of exp(logit_scale); 0: none; None: the dialect's

    # what is evaluated after each stage, beside the embedded set's splits when it trains
    eval_images: str = ""  # folder of one folder of pictures a class
    eval_shards: str = ""  # tar shards to retrieve from

    # how it runs
    device: str = "auto"  # auto: cuda where there is one, else cpu
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16: autocast; auto: where it is fast
    compile: bool = False  # torch.compile the model; pays on long runs
    impl: Literal["auto", "triton", "torch", "reference"] = "auto"  # of the fused operations
    threads: int = 0  # CPU threads of torch; 0: as torch decides
    seed: int = 0  # of weights, order, crops and masks

    # what it leaves behind
    output: str = "runs/emoji"  # folder of checkpoints, log, results and report
    resume: str = "auto"  # auto: newest checkpoint in output; never; or a checkpoint's path
    save_every: int = 500  # steps between checkpoints
    keep_checkpoints: int = 2  # newest ones kept
    log_every: int = 20  # steps between lines of the log


def preset(name: str) -> Config:
    """The Config of a preset.

    >>> preset("clipa-v2-h14").lr
    0.002048
    """
    if name not in PRESETS:
        raise ValueError(f"preset: name must be one of {', '.join(PRESETS)}, got {name!r}")
    output = Config.output if name == "emoji" else f"runs/{name}"
    return replace(Config(preset=name, output=output), **PRESETS[name])


@dataclass(frozen=True)
class _PresetFlag:
    preset: Preset = "emoji"


def parse(argv: Sequence[str] | None = None) -> Config:
    """The Config that flags ask for: the preset first, then every other flag over it.

    Args:
        argv: flags without the program's name; None: those of this process.

    Raises:
        SystemExit: an unknown flag (the near ones are named) or a value of the wrong kind.

    >>> parse(["--preset", "clipa-v1-b16", "--lr", "3e-4"]).lr
    0.0003
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    first, _ = tyro.cli(_PresetFlag, args=argv, return_unknown_args=True, add_help=False)
    return tyro.cli(Config, args=argv, default=preset(first.preset))


def stages(config: Config) -> tuple[Config, ...]:
    """One Config a stage, in the order they run: short tokens, then all tokens.

    The second takes its values from the `finetune_*` fields; with finetune_steps 0 there is none.

    >>> config = Config(image_size=16, finetune_image_size=32)
    >>> [(stage.stage, stage.image_size) for stage in stages(config)]
    [('short', 16), ('full', 32)]
    """
    short = replace(config, stage="short")
    if config.finetune_steps == 0:
        return (short,)
    prefix = "finetune_"
    tuned = {
        field.name.removeprefix(prefix): getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name.startswith(prefix)
    }
    return short, replace(config, stage="full", **tuned)


def describe(config: Config) -> str:
    """The fields as a paragraph, for the start of a run."""
    values = (f"{key}={value}" for key, value in dataclasses.asdict(config).items())
    return textwrap.fill("  ".join(values), 100, break_long_words=False, break_on_hyphens=False)


def to_json(config: Config) -> str:
    """The Config as a JSON object; `from_json` reads it back."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
    """The Config of `to_json`. Fields that the text lacks take their default.

    Raises:
        ValueError: not a JSON object, or a field that Config does not have.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"from_json: text must be a JSON object, got {text[:40]!r}") from error
    if not isinstance(values, dict):
        raise ValueError(f"from_json: text must be a JSON object, got {text[:40]!r}")
    if unknown := sorted(values.keys() - _FIELDS):
        raise ValueError(
            f"from_json: every key must be a field of Config, got {', '.join(unknown)}"
        )
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# What each number may be: wide enough for every use that is known, narrow enough that a slip ends
# in a sentence and not in an abort of the machine. A stage's field stands for its finetune_ one.
_RANGES = {
    "vocab_size": "[1, 1048576]",
    "shift": "[0, 4]",
    "rotate": "[0, 360]",
    "warp": "[0, 4]",
    "outline": "[0, 1]",
    "jitter_prob": "[0, 1]",
    "channel_mix": "[0, 10]",
    "gray_prob": "[0, 1]",
    "blend": "[0, 1]",
    "workers": "[0, 512]",
    "patch_size": "[1, 1024]",
    "finetune_steps": "[0, 1e9]",
    "image_size": "[1, 4096]",
    "image_drop": "[0, 1)",
    "context": "[2, 4096]",
    "steps": "[1, 1e9]",
    "batch_size": "[1, 1048576]",
    "accumulate": "[1, 1048576]",
    "lr": "(0, 100]",
    "warmup": "[0, 1e9]",
    "weight_decay": "[0, 100]",
    "beta1": "[0, 1)",
    "beta2": "[0, 1)",
    "adam_eps": "[1e-30, 1]",
    "clip_norm": "[0, 1e9]",
    "init_scale": "(0, 1e6]",
    "init_bias": "[-1e6, 1e6]",
    "max_scale": "[0, 1e6]",
    "threads": "[0, 512]",
    "seed": "[0, 9223372036854775807]",
    "save_every": "[1, 1e18]",
    "keep_checkpoints": "[1, 1e18]",
    "log_every": "[1, 1e18]",
    "crop_scale": "(0, 4]",
    "crop_ratio": "[0.01, 100]",
    "jitter": "[0, 10]",
}
_FIELDS = {field.name for field in dataclasses.fields(Config)}


def validate(config: Config, world_size: int = 1, models: Collection[str] = ()) -> None:
    """Raise ValueError with a sentence unless this Config can train on `world_size` processes.

    Both stages are checked before any work, and the output folder is made and written to.

    Args:
        config: of the whole run, as `parse` gives it.
        world_size: processes that share a batch.
        models: names that `config.model` may have; empty: not checked.

    Raises:
        ValueError: names the flag, what must hold and what came.
    """
    _require(
        not models or config.model in models,
        "model",
        f"be one of {', '.join(models)}",
        repr(config.model),
    )
    _check_names(config)
    for stage in stages(replace(config, finetune_steps=config.finetune_steps or 1)):
        for name in _RANGES:  # of a second stage too that does not come
            check_range(name, getattr(stage, name), stage.stage)
    for stage in stages(config):
        _check_stage(stage, world_size)
    for name in ("crop_scale", "crop_ratio"):
        low, high = getattr(config, name)
        _require(low <= high, name, "rise", getattr(config, name))
    _require(config.jitter[3] <= 0.5, "jitter", "have a hue of at most 0.5", config.jitter)
    for name in ("blend", "captions") if config.data != "emoji" else ():  # shards have one of each
        value = getattr(config, name)
        kept = value in (getattr(Config, name), getattr(preset(config.preset), name))
        _require(kept, name, "be left alone unless data is emoji", repr(value))
    _check_files(config)


def _require(good: bool, field: str, must: str, came: object, stage: str = "short") -> None:
    if not good:
        flag = f"finetune_{field}" if stage == "full" and f"finetune_{field}" in _FIELDS else field
        raise ValueError(f"config: {flag} must {must}, got {came}")


def _check_names(config: Config) -> None:
    for name, hint in typing.get_type_hints(Config).items():
        if typing.get_origin(hint) is Literal:
            value, known = getattr(config, name), typing.get_args(hint)
            _require(value in known, name, f"be one of {', '.join(known)}", repr(value))


def check_range(name: str, value: float | tuple[float, ...] | None, stage: str = "short") -> None:
    """ValueError unless a number, or each of several, lies in the range of the field; None does."""
    interval = _RANGES[name]
    low, high = json.loads(f"[{interval[1:-1]}]")
    for number in value if isinstance(value, tuple) else [low if value is None else value]:
        above = low < number if interval[0] == "(" else low <= number
        below = number < high if interval[-1] == ")" else number <= high
        _require(value is None or (above and below), name, f"be in {interval}", value, stage)


def _check_stage(stage: Config, world_size: int) -> None:
    name, size, patch = stage.stage, stage.image_size, stage.patch_size
    must = f"be a multiple of patch_size {patch}"
    _require(size % patch == 0, "image_size", must, size, name)
    _require(size <= 256 * patch, "image_size", "be at most 256 patches a side", size, name)
    parts = world_size * stage.accumulate
    must = f"be a multiple of {world_size} processes x {stage.accumulate} parts"
    _require(stage.batch_size % parts == 0, "batch_size", must, stage.batch_size, name)
    must = f"be at most steps {stage.steps}"
    _require(stage.warmup <= stage.steps, "warmup", must, stage.warmup, name)
    unused = stage.image_mask in ("none", "grid") and stage.image_drop > 0
    must = f"be 0 with image_mask {stage.image_mask}"
    _require(not unused, "image_drop", must, stage.image_drop, name)


def _check_files(config: Config) -> None:
    if config.resume not in ("auto", "never"):
        found = Path(config.resume).is_file()
        _require(found, "resume", 'be "auto", "never" or a checkpoint file', repr(config.resume))
    if config.tokenizer not in ("wordpiece", "clip"):
        found = Path(config.tokenizer).is_file()
        must = 'be "wordpiece", "clip" or a file (tokenizers JSON or BERT vocab.txt)'
        _require(found, "tokenizer", must, repr(config.tokenizer))
    try:
        Path(config.output).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=config.output):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"config: output must be a folder that can be written, got {config.output!r} ({reason})"
        ) from error
