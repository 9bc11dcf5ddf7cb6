"""One tree of dataclasses holds every choice of a run; its fields are the flags of train.py.

A field of a part is a flag of two words, `--optim.weight-decay 0.1`; of a stage, of three:
`--stages.full.lr 3e-4`. Flags override a preset of presets.py, or a run's own config.json.
"""

import dataclasses
import json
import re
import sys
import tempfile
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data.augment import Augmentation
from data.classes import classes_in, prompts_in
from data.emoji import CAPTIONS
from data.files import read_text
from data.images import MAX_PIXELS
from data.pairs import Captions
from data.patterns import sources_of
from data.sources import weights_of
from models import DIALECTS, SIZES, Dialect

from .presets import PRESETS
from .watch import window_of

Preset = Literal[tuple(PRESETS)]


@dataclass(frozen=True)
class Stage:
    """What is seen of images and texts, for how long, and how fast it is learnt."""

    image_size: int = 16  # pixels a side
    image_mask: Literal["none", "random", "grid", "block"] = "none"  # which patches are dropped
    image_drop: float = 0.0  # share of patches dropped, for random and block
    context: int = 16  # text tokens at most, special ones included
    text_mask: Literal["truncate", "random", "block", "syntax"] = "truncate"
    """which tokens of longer captions stay"""
    pos_embed: Literal["learnable", "sincos-mae", "sincos-moco"] = "learnable"
    """image position table, resized from the stage before"""
    steps: int = 2000  # optimiser steps; 0: the stage is left out
    batch_size: int = 128  # global: all processes, all accumulated parts
    accumulate: int = 1  # parts a step is computed in, to save memory
    lr: float = 1e-3  # peak, for the whole batch: (papers' lr) * batch / 256
    warmup: int = 100  # steps of linear warm-up
    cooldown: int | None = None  # steps of a linear end, constant before; 0: none; None: cosine


@dataclass(frozen=True)
class DataPart:
    """Pairs of images and captions."""

    source: Annotated[str, tyro.conf.arg(aliases=["--data"])] = "emoji"
    """"emoji" (ships with pip) or shards, "pairs/{0000..0099}.tar", "s3://bucket/{00..99}.tar";
    "a.tar::b.tar": two sources"""
    tokenizer: str = "wordpiece"  # trained on the captions; "clip"; or a tokenizers.json, vocab.txt
    vocab_size: int = 2000  # rows of the token table; at least the tokenizer's entries
    captions: Annotated[str, tyro.conf.arg(aliases=["--captions"])] = "names"
    """embedded set: names, words or all; shards: keys "caption;synthetic" of the .json, or further
    extensions; left alone: the .txt, else the .json's "caption" """
    caption_weights: Annotated[str, tyro.conf.arg(aliases=["--caption-weights"])] = ""
    """how often each key is drawn, "1;3"; empty: the first that a sample has"""
    mix: Annotated[str, tyro.conf.arg(aliases=["--mix"])] = ""
    """weights of the sources, "3::1"; empty: as many samples of each as it holds"""
    repeat: bool = False  # with a mix: a source that ends begins again before the others end
    parts: int = 1  # of a batch and of the shards; with as many as nodes each reads its own alone
    workers: int = 0  # processes that decode images; 0: threads of this one
    cache_gb: float = 100.0  # of remote shards that a machine keeps at most, in its cache folder
    max_pixels: int = MAX_PIXELS  # of an image file; a larger one is skipped before it is decoded


@dataclass(frozen=True)
class ModelPart:
    """The two encoders."""

    size: Annotated[Literal[tuple(SIZES)], tyro.conf.arg(aliases=["--model"])] = "B"
    """widths and depths"""
    dialect: Literal[tuple(DIALECTS)] = "open_clip"
    """recipe that fixes GELU, norms, text mask, init, decay, clamp, resizing: models/dialects.py"""
    patch_size: int = 8  # pixels a side
    pool: Literal["cls", "mean", "mean-with-cls"] = "mean"  # image feature from the tokens
    init: Annotated[str, tyro.conf.arg(aliases=["--init"])] = ""
    """weights to start from, of open_clip, OpenAI, Hugging Face's CLIP or a run: file or folder"""
    lock: Literal["none", "image", "text"] = "none"  # tower that stays as it starts
    init_scale: float = 1 / 0.07  # exp(logit_scale) at the start; SigLIP takes 10
    init_bias: float = -10.0  # logit_bias at the start, sigmoid loss only


@dataclass(frozen=True)
class OptimPart:
    """The loss and AdamW, in all stages."""

    loss: Literal["softmax", "sigmoid"] = "softmax"  # CLIP's or SigLIP's
    weight_decay: float = 0.1  # decoupled; on the tensors that the dialect decays
    beta1: float = 0.9  # Adam's momentum
    moment: Literal["fp32", "bf16"] = "fp32"  # in which Adam's momentum rests between steps
    beta2: float = 0.95  # Adam's second moment; 0.98 for small batches
    adam_eps: float | None = None  # None: the dialect's
    clip_norm: float = 0.0  # largest gradient norm; 0: not clipped
    skip_above: float = 0.0  # times the running median of norms: such a step is skipped; 0: none
    max_scale: float | None = None  # bound of exp(logit_scale); 0: none; None: the dialect's


@dataclass(frozen=True)
class RunPart:
    """How it runs, and what it leaves behind."""

    output: Annotated[str, tyro.conf.arg(aliases=["--output"])] = "runs/emoji"
    """folder of checkpoints, log, results and report"""
    resume: Annotated[str, tyro.conf.arg(aliases=["--resume"])] = "auto"
    """auto: newest checkpoint in output; never; or a checkpoint's path"""
    device: Annotated[str, tyro.conf.arg(aliases=["--device"])] = "auto"
    """auto: cuda where there is one, else cpu"""
    impl: Annotated[
        Literal["auto", "triton", "torch", "reference"], tyro.conf.arg(aliases=["--impl"])
    ] = "auto"
    """of the fused operations"""
    seed: Annotated[int, tyro.conf.arg(aliases=["--seed"])] = 0
    """of weights, order, crops and masks"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16: autocast; auto: where it is fast
    wire: Literal["fp32", "bf16"] = "fp32"  # in which gradients travel between processes
    compile: bool = False  # torch.compile the blocks; pays on long runs
    shard: Literal["none", "optimizer", "full"] = "none"
    """of several processes each keeps its part of moments and gradients; full: of weights too"""
    recompute: Literal["none", "mlp", "block"] = "none"  # what backward computes again, for memory
    fit: str = ""  # memory of a process, "80GB": chooses recompute, and each stage's accumulate
    threads: int = 0  # CPU threads of torch; 0: as torch decides
    timeout: float = 600.0  # seconds that a process waits for the others before it ends
    step_timeout: float = 180.0  # the same within a step, but the first after a start or a pause
    save_every: int = 500  # steps between checkpoints
    save_minutes: float = 0.0  # minutes between checkpoints too; 0: steps alone
    keep_every: int = 0  # steps between checkpoints that stay for good; 0: none does
    keep_checkpoints: int = 2  # newest ones kept
    log_every: int = 20  # steps between lines of the log
    watch: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """where the numbers of the log are shown too"""
    profile: str = ""  # steps of each stage to trace, "20:25": trace-<stage>.json in output
    eval_every: int = 0  # steps between evaluations; 0: after each stage alone
    eval_images: str = ""  # evaluated after each stage: folder of one folder of pictures a class
    eval_shards: str = ""  # evaluated after each stage: tar shards to retrieve from, and their loss
    eval_classes: str = ""
    """names of eval_images' folders, sorted, and of each .cls in eval_shards: "imagenet"
    (open_clip's), or a file of lines "name", or "folder<TAB>name"; empty: their classes.txt"""
    eval_prompts: str = ""  # to classify with: "imagenet" (open_clip's), "a {}.;{}" or such a file


@dataclass(frozen=True)
class Config:
    """Train a CLIP with few tokens, then briefly with all of them."""

    preset: Preset = "emoji"  # recipe that the other flags start from
    config: str = ""  # config.json of a run that the other flags start from instead
    data: DataPart = DataPart()
    augment: Augmentation = field(default_factory=Augmentation)
    model: ModelPart = ModelPart()
    optim: OptimPart = OptimPart()
    run: RunPart = RunPart()
    stages: dict[str, Stage] = field(
        default_factory=lambda: {
            "short": Stage(),
            "full": Stage(image_size=32, steps=200, lr=1e-4, warmup=20),
        }
    )

    @property
    def dialect(self) -> Dialect:
        """All that the recipe fixes."""
        return DIALECTS[self.model.dialect]

    @property
    def caption_keys(self) -> Captions:
        """Which caption of a shard's sample is read; the embedded set's words choose none."""
        own = (DataPart.captions, preset(self.preset).data.captions)
        keys = "" if self.data.captions in own else self.data.captions
        return Captions.parse(keys, self.data.caption_weights)

    @property
    def running(self) -> list[str]:
        """Names of the stages that have steps, in the order they run."""
        return [name for name, stage in self.stages.items() if stage.steps]

    def number(self, stage: str) -> int:
        """Place of a stage among all, from 0."""
        return list(self.stages).index(stage)

    def first_step(self, stage: str) -> int:
        """Step of the run's data at which a stage starts: the stages count on in one order."""
        return sum(each.steps for each in list(self.stages.values())[: self.number(stage)])


def preset(name: str) -> Config:
    """The Config of a preset.

    >>> preset("clipa-v2-h14").stages["short"].lr
    0.002048
    """
    if name not in PRESETS:
        raise ValueError(f"preset: name must be one of {', '.join(PRESETS)}, got {name!r}")
    config = _built(Config, PRESETS[name] | {"preset": name}, "preset")
    output = RunPart.output if name == "emoji" else f"runs/{name}"
    return replace(config, run=replace(config.run, output=output))


@dataclass(frozen=True)
class _Start:
    preset: str = ""
    config: str = ""


def parse(argv: Sequence[str] | None = None) -> Config:
    """The Config that flags ask for: the preset or file first, then every other flag over it.

    Args:
        argv: flags without the program's name; None: those of this process.

    Raises:
        SystemExit: an unknown flag (the near ones are named) or a value of the wrong kind.
        ValueError: a --config that is no file of a Config, or one beside --preset.

    >>> parse(["--preset", "clipa-v1-b16", "--stages.full.lr", "3e-4"]).stages["full"].lr
    0.0003
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    start, _ = tyro.cli(_Start, args=argv, return_unknown_args=True, add_help=False)
    if start.config and start.preset:
        raise ValueError("config: --preset and --config must not come together, got both")
    recipe = start.preset if start.preset in PRESETS else "emoji"  # another one: refused below
    default = read(start.config) if start.config else preset(recipe)
    return replace(tyro.cli(Config, args=argv, default=default), config="")


def read(path: str | Path) -> Config:
    """The Config in a file of `to_json`.

    Raises:
        ValueError: it is no file, or holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"config: --config must be a file of a run's config, got {str(path)!r}")
    return from_json(read_text(Path(path), "config"))


def flat(config: Config) -> dict[str, Any]:
    """Each field by its flag's name.

    >>> flat(Config())["stages.full.lr"]
    0.0001
    """

    def walk(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            return {name: value}
        return {k: v for key in value for k, v in walk(value[key], f"{name}.{key}").items()}

    return {name[1:]: value for name, value in walk(dataclasses.asdict(config), "").items()}


def describe(config: Config) -> str:
    """The fields as a paragraph, for the start of a run."""
    values = (f"{key}={value}" for key, value in flat(config).items())
    return textwrap.fill("  ".join(values), 100, break_long_words=False, break_on_hyphens=False)


def to_json(config: Config) -> str:
    """The Config as JSON, for `from_json`; `resume` is "auto", as what was asked holds once."""
    config = replace(config, run=replace(config.run, resume="auto"))
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> Config:
    """The Config of `to_json`. Fields that the text lacks take their default.

    Raises:
        ValueError: not a JSON object, a field that Config does not have, a value of another type
            or outside its range.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"from_json: text must be a JSON object, got {text[:40]!r}") from error
    if not isinstance(values, dict):
        raise ValueError(f"from_json: text must be a JSON object, got {text[:40]!r}")
    config = _built(Config, values, "from_json")
    _check_fields(config)
    return config


def _built(kind: Any, value: Any, function: str, name: str = "") -> Any:
    """A value of JSON as the type that a field asks for."""
    if isinstance(value, dict) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if unknown := [f"{name}{key}" for key in value if key not in hints]:
            came = ", ".join(unknown[:3]) + f" and {len(unknown) - 3} more" * (len(unknown) > 3)
            raise ValueError(f"{function}: every key must be a field of Config, got {came}")
        built = {k: _built(hints[k], v, function, f"{name}{k}.") for k, v in value.items()}
        return kind(**built)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, dict) and origin is dict:
        return {k: _built(inner[1], v, function, f"{name}{k}.") for k, v in value.items()}
    if isinstance(value, list | tuple) and origin is tuple and len(value) == len(inner):
        return tuple(_built(i, v, function, name) for i, v in zip(inner, value, strict=True))
    if origin in (typing.Union, types.UnionType) and value is None and type(None) in inner:
        return None
    plain = inner[0] if origin in (typing.Union, types.UnionType) else kind
    plain = str if origin is Literal else plain
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if (plain is float and number) or (type(value) is plain):
        return value
    words = getattr(plain, "__name__", str(plain))
    came = f"{value!r} as {name.removesuffix('.') or 'it'}"
    raise ValueError(f"{function}: a field of type {words} must hold one, got {came}")


# What each number may be: wide enough for every use that is known, narrow enough that a slip ends
# in a sentence and not in an abort of the machine. Augmentation checks its own.
_RANGES = {
    "data.vocab_size": "[1, 1048576]",
    "data.workers": "[0, 512]",
    "data.cache_gb": "(0, 1e9]",
    "data.max_pixels": "[1, 178956970]",  # above it Pillow refuses by itself
    "data.parts": "[1, 65536]",
    "model.patch_size": "[1, 1024]",
    "model.init_scale": "(0, 1e6]",
    "model.init_bias": "[-1e6, 1e6]",
    "optim.weight_decay": "[0, 100]",
    "optim.beta1": "[0, 1)",
    "optim.beta2": "[0, 1)",
    "optim.adam_eps": "[1e-30, 1]",
    "optim.clip_norm": "[0, 1e9]",
    "optim.skip_above": "[0, 1e9]",
    "optim.max_scale": "[0, 1e6]",
    "run.threads": "[0, 512]",
    "run.seed": "[0, 9223372036854775807]",
    "run.timeout": "[1, 1e6]",
    "run.step_timeout": "[1, 1e6]",
    "run.save_every": "[1, 1e18]",
    "run.save_minutes": "[0, 1e6]",
    "run.keep_every": "[0, 1e18]",
    "run.keep_checkpoints": "[1, 1e18]",
    "run.log_every": "[1, 1e18]",
    "run.eval_every": "[0, 1e18]",
    "image_size": "[1, 4096]",  # from here on: of each stage
    "image_drop": "[0, 1)",
    "context": "[2, 4096]",
    "steps": "[0, 1e9]",
    "batch_size": "[1, 1048576]",
    "accumulate": "[1, 1048576]",
    "lr": "(0, 100]",
    "warmup": "[0, 1e9]",
    "cooldown": "[0, 1e9]",
}


def validate(config: Config, world_size: int = 1) -> None:
    """Raise ValueError with a sentence unless this Config can train on `world_size` processes.

    All stages are checked before any work, and the output folder is made and written to.

    Args:
        config: of the whole run, as `parse` gives it.
        world_size: processes that share a batch.

    Raises:
        ValueError: names the flag, what must hold and what came.
    """
    _check_fields(config)
    _require(bool(config.running), "one of the stages", "have steps", "none")
    for name in config.running:
        _check_stage(config, name, world_size)
    _check_data(config)
    window_of(config.run.profile)
    _check_files(config)


def _check_fields(config: Config) -> None:
    """ValueError unless each field by itself is one that can be trained with."""
    for name in config.stages:
        good = re.fullmatch(r"[A-Za-z]\w{,39}", name, re.ASCII)  # a part of file names and flags
        must = "be a word of at most 40 letters and digits"
        _require(bool(good), "the name of a stage", must, repr(name))
    parts = {f"{name}.": getattr(config, name) for name in ("data", "model", "optim", "run")}
    parts |= {f"stages.{name}.": stage for name, stage in config.stages.items()} | {"": config}
    for prefix, part in parts.items():
        for name, hint in typing.get_type_hints(type(part)).items():
            if typing.get_origin(hint) is Literal:
                value, known = getattr(part, name), typing.get_args(hint)
                must = f"be one of {', '.join(known)}"
                _require(value in known, prefix + name, must, repr(value))
    for name, value in flat(config).items():
        stage, _, short = name.rpartition(".")
        check_range(short if stage.startswith("stages.") else name, value, name)


def _require(good: bool, name: str, must: str, came: object) -> None:
    if not good:
        raise ValueError(f"config: {name} must {must}, got {came}")


def check_range(name: str, value: Any, flag: str = "") -> None:
    """ValueError unless a number lies in the range of the field; None does, and so does no number.

    Args:
        name: of the field, as "optim.beta1"; of a stage's, its last word.
        flag: what the sentence calls it; as `name` if empty.
    """
    if (interval := _RANGES.get(name)) is None or value is None:
        return
    low, high = json.loads(f"[{interval[1:-1]}]")
    above = low < value if interval[0] == "(" else low <= value
    below = value < high if interval[-1] == ")" else value <= high
    _require(above and below, flag or name, f"be in {interval}", value)


def _check_stage(config: Config, name: str, world_size: int) -> None:
    stage, patch = config.stages[name], config.model.patch_size

    def require(good: bool, what: str, must: str) -> None:
        _require(good, f"stages.{name}.{what}", must, getattr(stage, what))

    require(stage.image_size % patch == 0, "image_size", f"be a multiple of patch_size {patch}")
    require(stage.image_size <= 256 * patch, "image_size", "be at most 256 patches a side")
    cut = config.data.parts
    require(stage.batch_size % cut == 0, "batch_size", f"be a multiple of data.parts {cut}")
    parts = world_size * stage.accumulate
    must = f"be a multiple of {world_size} processes x {stage.accumulate} parts"
    require(stage.batch_size % parts == 0, "batch_size", must)
    require(stage.warmup <= stage.steps, "warmup", f"be at most steps {stage.steps}")
    after, cooldown = stage.steps - stage.warmup, stage.cooldown or 0
    require(cooldown <= after, "cooldown", f"be at most the {after} steps after the warm-up")
    unused = stage.image_mask in ("none", "grid") and stage.image_drop > 0
    require(not unused, "image_drop", f"be 0 with image_mask {stage.image_mask}")


def _check_data(config: Config) -> None:
    """ValueError unless the flags of data fit its kind."""
    data = config.data
    if data.source == "emoji":
        must = f"be one of {', '.join(CAPTIONS)} unless data is shards"
        _require(data.captions in CAPTIONS, "data.captions", must, repr(data.captions))
        for name in ("caption_weights", "mix", "repeat", "parts"):
            value, known = getattr(data, name), getattr(DataPart, name)
            _require(value == known, f"data.{name}", "be left alone unless data is shards", value)
        return
    # A sample of a shard has one picture; what a preset brings is no wish of a user's.
    blend, known = config.augment.blend, (0.0, preset(config.preset).augment.blend)
    _require(blend in known, "augment.blend", 'be left alone unless data is "emoji"', blend)
    _ = config.caption_keys
    weights_of(data.mix, len(sources_of(data.source)))


def _check_files(config: Config) -> None:
    run, tokenizer = config.run, config.data.tokenizer
    if run.resume not in ("auto", "never"):
        must = 'be "auto", "never" or a checkpoint file'
        _require(Path(run.resume).is_file(), "run.resume", must, repr(run.resume))
    if tokenizer not in ("wordpiece", "clip"):
        must = 'be "wordpiece", "clip" or a file (tokenizers JSON or BERT vocab.txt)'
        _require(Path(tokenizer).is_file(), "data.tokenizer", must, repr(tokenizer))
    if init := config.model.init:
        _require(Path(init).exists(), "model.init", "be a file or folder of weights", repr(init))
    _require(bool(run.output.strip()), "run.output", "be the name of a folder", repr(run.output))
    _ = prompts_in(run.eval_prompts), classes_in(run.eval_classes)
    try:
        Path(run.output).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=run.output).close()
    except (OSError, ValueError) as error:  # ValueError: letters that no path can hold
        came = f"{run.output!r} ({getattr(error, 'strerror', None) or error})"
        must = "be a folder that can be written"
        raise ValueError(f"config: run.output must {must}, got {came}") from error
