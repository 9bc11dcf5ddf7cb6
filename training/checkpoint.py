"""Checkpoints that survive a kill at any moment, and that open_clip can read.

A file is a dict in open_clip's layout with a little more:

    epoch, name, state_dict, optimizer      as open_clip writes them (its model keys); the epoch is
                                            the place of the stage among all, from 0
    stage, step                             name, and steps of this stage that are done
    config, tokenizer                       JSON texts
    open_clip                               JSON text of open_clip's config, or why it has none
    rng, metrics, spikes                    generator states; numbers to carry on

It is written beside its place, flushed to the disk and renamed, so a file with the final name is
whole. Everything in it loads with `torch.load(weights_only=True)`.
"""

import hashlib
import random
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.files import write_whole
from models import plain_keys

from .config import Config, flat, from_json, to_json
from .distributed import World
from .optim import unwrap
from .shard import local, on_host, put_weights, whole

_NAME = re.compile(r"(\d+)-\w+-(\d+)\.pt")
_KEYS = {
    "state_dict": dict, "optimizer": dict, "stage": str, "step": int, "config": str, "rng": dict,
    "tokenizer": str, "metrics": dict, "epoch": int,
    "spikes": dict,
}  # fmt: skip
# Fields that change nothing of what is learnt (but roundings): a resumed run may change them.
_FREE = re.compile(
    r"preset|config|data\.(workers|cache_gb)|run\.(?!seed$|precision$)\w+|stages\.\w+\.accumulate"
)
# What must agree between a checkpoint and the run that resumes it; the rest may be changed.
_SAME_MODEL = (
    "model.size", "model.dialect", "model.patch_size", "model.pool", "data.vocab_size", "optim.loss"
)  # fmt: skip


def pack_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    stage: str,
    *,
    step: int,
    tokenizer: str = "",
    metrics: dict | None = None,
    spikes: dict | None = None,
    open_clip: str = "",
) -> dict:
    """The state that `save` writes and `restore` puts back, the same however it lies in parts.

    Every process must call it where the model lies in parts; rank 0 then has it.

    Args:
        model: itself or wrapped by DDP or torch.compile.
        optimizer: its state is kept by reference; save before the next step, or take a `snapshot`.
        config: of the run.
        stage: name of the stage that runs.
        step: steps of this stage that are done.
        tokenizer: JSON text of the tokenizer, so that the checkpoint alone can be evaluated.
        metrics: plain numbers, texts, lists and dicts.
        spikes: of SpikeGuard.
        open_clip: of `models.export`, for those who build the model elsewhere.
    """
    return {
        "epoch": config.number(stage),
        "name": config.preset,
        "state_dict": {name: whole(value) for name, value in unwrap(model).state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "stage": stage,
        "step": step,
        "config": to_json(config),
        "tokenizer": tokenizer,
        "open_clip": open_clip,
        "metrics": metrics or {},
        "spikes": spikes or {},
        "rng": rng_state(),
    }


def snapshot(value: Any) -> Any:
    """A state of `pack_state` as it is now, whatever becomes of the model; tensors by `on_host`."""
    if isinstance(value, Tensor):
        return on_host(value)
    if isinstance(value, dict):
        return {name: snapshot(each) for name, each in value.items()}
    return [snapshot(each) for each in value] if isinstance(value, list) else value


def restore(state: dict, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Put a state back into model, optimiser and random generators; return the steps done.

    Raises:
        ValueError: the optimiser's state, or the generators', is of another kind.
    """
    put_weights(unwrap(model), weights(state))
    if optimizer is not None:
        restore_optimizer(state, optimizer)
    return state["step"]


def restore_optimizer(state: dict, optimizer: torch.optim.Optimizer) -> None:
    """The part of `restore` beside the weights."""
    try:
        optimizer.load_state_dict(state["optimizer"])
        _check_moments(optimizer)
        _own_moments(optimizer)
        set_rng_state(state["rng"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        must = "its optimizer and rng must be this run's"
        raise ValueError(f"checkpoint: {must}, got {error!r}") from error


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """ValueError unless moments have their parameters' shapes: torch's fused step reads blindly."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                must, came = tuple(parameter.shape), tuple(value.shape)
                raise ValueError(f"{name} must have shape {must}, got {came}")


def _own_moments(optimizer: torch.optim.Optimizer) -> None:
    """Copy what still lies in a checkpoint's file, which the run may delete."""
    for values in optimizer.state.values():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.device.type == "cpu":
                values[name] = value.clone()


def weights(state: dict) -> dict[str, Tensor]:
    """The model's tensors, without the prefixes that DDP and torch.compile add to their names."""
    return plain_keys(state["state_dict"])


def save(folder: str | Path, state: dict, step: int, keep: int = 2, keep_every: int = 0) -> Path:
    """Write `<folder>/<number>-<stage>-<step>.pt` whole or not at all, then delete what is too old.

    The .json of the same name is open_clip's config of the model, as in open_clip_config.json.

    The newest `keep` whole checkpoints of the stage stay, the last one of each earlier stage, and
    those at multiples of `keep_every` steps. Call it on rank 0 only.

    Args:
        folder: made where it is missing.
        state: from `pack_state`.
        step: steps of the stage that are done.
        keep: whole checkpoints of the stage that stay, at least 1.
        keep_every: steps; 0: none stays for good.

    Raises:
        ValueError: keep below 1.
        RuntimeError: the file cannot be written; older checkpoints are untouched.
    """
    if keep < 1:
        raise ValueError(f"save: keep must be at least 1, got {keep}")
    folder = Path(folder)
    path = folder / f"{state['epoch'] + 1}-{state['stage']}-{step:08d}.pt"
    try:
        if state.get("open_clip"):
            with write_whole(_beside(path)) as file:
                file.write(state["open_clip"].encode())
        with write_whole(path, sync=True) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        # The zip writer's own words hide what the disk said.
        met = error if isinstance(error, OSError) else error.__context__ or error
        raise RuntimeError(f"save: {path} must be writable, got {met}") from error
    _prune(folder, path, keep, keep_every)
    return path


def check_finite(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: str,
    stage: str,
    step: int,
    world: World | None = None,
) -> None:
    """RuntimeError unless all weights and moments are finite: nothing else may be written.

    Every process of the world must call it, and all of them raise at the same step.
    """
    tensors = dict(unwrap(model).state_dict())
    for name, parameter in unwrap(model).named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                tensors[f"{key} of {name}"] = value
    floats = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    astray = [~local(tensors[name]).isfinite().all() for name in floats]
    counts = torch.stack(astray).int() if astray else torch.zeros(0, dtype=torch.int32)
    if world is not None:  # each process may hold its part alone
        counts = world.sum(counts)
    if bool(counts.any()):
        worst = floats[int(counts.argmax())]
        sentence = f"weights and moments must be finite, got others in {worst}"
        raise not_finite(sentence, folder, stage, step)


def not_finite(sentence: str, folder: str, stage: str, step: int) -> RuntimeError:
    """The error that ends a run whose numbers went astray: where, and what is left of it."""
    good = checkpoints(folder)
    left = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint was written before"
    return RuntimeError(f"train: {sentence} at step {step} of stage {stage}; {left}")


def _prune(folder: Path, newest: Path, keep: int, keep_every: int) -> None:
    """Delete what is older than `newest` and not to stay, and leftovers of killed writes."""
    for leftover in folder.glob(".*.pt.*"):
        leftover.unlink(missing_ok=True)
    kept: dict[int, int] = {}
    for path in reversed(checkpoints(folder)):
        if _order(path) > _order(newest):
            continue  # of a run that went further; not ours to delete
        stage, step = _order(path)
        if keep_every and step % keep_every == 0 and zipfile.is_zipfile(path):
            continue
        room = keep if stage == _order(newest)[0] else 1
        if zipfile.is_zipfile(path) and kept.get(stage, 0) < room:
            kept[stage] = kept.get(stage, 0) + 1
        else:
            path.unlink(missing_ok=True)
            _beside(path).unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """What open_clip builds the model of a checkpoint from."""
    return path.with_suffix(".json")


def _order(path: Path) -> tuple[int, int]:
    number, step = _NAME.fullmatch(path.name).groups()
    return int(number), int(step)


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    folder = Path(folder)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_order)


def load(path: str | Path, *, checked: bool = False) -> dict:
    """The state of one file, on the CPU; tensors are read from the file when they are used.

    Args:
        checked: whether another process has read all of it and found it whole and finite.

    Raises:
        ValueError: no such file, or not a checkpoint of this program.
        RuntimeError: half written, damaged, or of weights that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"load: path must be a checkpoint file, got {str(path)!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load does not compare the checksums.
            damaged = None if checked else archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling raises whatever the bytes make it
        reason = re.split(r"\n|\. ", str(error))[0] or type(error).__name__
        raise RuntimeError(f"load: {path} must be a whole checkpoint, got {reason}") from error
    held = state if isinstance(state, dict) else {}
    came = ", ".join(sorted(map(str, held))[:8]) or type(state).__name__
    state = {"tokenizer": "", "metrics": {}, "spikes": {}} | held
    if missing := [key for key, kind in _KEYS.items() if not isinstance(state.get(key), kind)]:
        raise ValueError(f"load: {path} must hold {', '.join(sorted(missing))}, got only {came}")
    if not checked:
        _check_finite_state(path, state)
    return state


def _check_finite_state(path: Path, state: dict) -> None:
    for name, tensor in state["state_dict"].items():
        good = isinstance(name, str) and isinstance(tensor, Tensor)
        if not good or not bool(tensor.isfinite().all()):
            raise RuntimeError(f"load: {path} must hold finite tensors, got another as {name}")
    for number, values in state["optimizer"].get("state", {}).items():
        for name, value in values.items():
            if isinstance(value, Tensor) and not bool(value.isfinite().all()):
                came = f"another as {name} of parameter {number}"
                raise RuntimeError(f"load: {path} must hold finite tensors, got {came}")


def latest(folder: str | Path) -> dict | None:
    """The newest state that can be read; None where the folder has no checkpoint; see `newest`."""
    found = newest(folder)
    return None if found is None else found[1]


def newest(folder: str | Path) -> tuple[Path, dict] | None:
    """The newest checkpoint that can be read, and its state; None where the folder has none.

    A newer one that is broken is skipped with a warning.

    Raises:
        RuntimeError: there are checkpoints and none can be read, or files of other names alone.
            Starting over would hide that.
    """
    paths = checkpoints(folder)
    others = sorted(path.name for path in Path(folder).glob("*-*[0-9].pt"))
    if others and not paths:
        raise RuntimeError(
            f"latest: checkpoints in {folder} must be named <number>-<stage>-<step>.pt, "
            f"got {others[0]}; take another folder, or start over with --resume never"
        )
    for path in reversed(paths):
        try:
            return path, load(path)
        except (ValueError, RuntimeError) as error:
            warnings.warn(f"skipped a broken checkpoint: {error}", stacklevel=2)
    if paths:
        raise RuntimeError(
            f"latest: one of the {len(paths)} checkpoints in {folder} must be readable, got none; "
            "remove them, or start over with --resume never"
        )
    return None


def set_aside(folder: str | Path, after: str | Path | None = None) -> Path | None:
    """Move checkpoints newer than `after` (None: all) into `<folder>/previous-<n>`.

    For a run that starts over, or from an older checkpoint: else `latest` would find the abandoned
    run's. Returns the new folder, or None where there was nothing to move.
    """
    newer = checkpoints(folder)
    if after is not None:
        places = [path.resolve() for path in newer]
        place = Path(after).resolve()
        newer = newer[places.index(place) + 1 :] if place in places else []
    if not newer:
        return None
    taken = sum(1 for _ in Path(folder).glob("previous-*"))
    target = Path(folder) / f"previous-{taken + 1}"
    target.mkdir()
    for path in newer:
        path.rename(target / path.name)
        if _beside(path).is_file():
            _beside(path).rename(target / _beside(path).name)
    return target


def check_matches(
    state: dict, config: Config, model: nn.Module | None = None, stage: str | None = None
) -> None:
    """Raise ValueError unless a state belongs to this run: same model, one of its stages.

    Args:
        state: from `load` or `latest`.
        config: of the run.
        model: built for the checkpoint's stage; its keys and shapes are compared.
        stage: the stage that must have written it; None takes either.
    """
    was, now = flat(from_json(state["config"])), flat(config)
    for name in _SAME_MODEL:
        if was[name] != now[name]:
            must = f"{name} must be {now[name]!r} as in this run"
            raise ValueError(f"checkpoint: {must}, got {was[name]!r}")
    known = config.running if stage is None else [stage]
    if state["stage"] not in known:
        must = " or ".join(known)
        raise ValueError(f"checkpoint: its stage must be {must}, got {state['stage']!r}")
    place, steps = config.number(state["stage"]), config.stages[state["stage"]].steps
    if state["epoch"] != place:  # which names its files and keys its masks
        must = f"its stage {state['stage']} must be number {place + 1} as in this run"
        raise ValueError(f"checkpoint: {must}, got number {state['epoch'] + 1}")
    if not 0 <= state["step"] <= steps:
        must = f"its step must be in [0, {steps}], the steps of stage {state['stage']}"
        raise ValueError(f"checkpoint: {must}, got {state['step']}")
    if model is None:
        return
    have, want = weights(state), unwrap(model).state_dict()
    for name in sorted(want.keys() ^ have.keys()):
        came = "one without it" if name in want else "one with it"
        must = "hold" if name in want else "not hold"
        raise ValueError(f"checkpoint: the model must {must} {name}, got {came}")
    for name, tensor in want.items():
        if tensor.shape != have[name].shape:
            must, came = tuple(tensor.shape), tuple(have[name].shape)
            raise ValueError(f"checkpoint: {name} must have shape {must}, got {came}")


def find(
    config: Config, world: World, check: Callable[[dict], None] = lambda state: None
) -> dict | None:
    """The state to resume from, or None: rank 0 chooses and checks it, the others read the same.

    What an abandoned run left is moved aside, not deleted, when all is right.

    Args:
        check: raises ValueError where a state cannot be resumed, beside what is asked here.
    """
    chosen: list[dict] = []

    def choose() -> tuple[str, str] | None:
        found = None
        if config.run.resume == "auto":
            found = newest(config.run.output)
        elif config.run.resume != "never":
            found = Path(config.run.resume), load(config.run.resume)
        if found is None:
            return None
        path, state = found
        check_matches(state, config)
        if config.run.resume == "auto":
            _check_unchanged(from_json(state["config"]), config)
        check(state)
        chosen.append(state)
        return str(path), _digest(path)

    place = world.decide(choose)
    if place and not world.is_main and Path(place[0]).is_file():
        chosen.append(load(place[0], checked=True))
    seen = place and _digest(Path(place[0]))
    world.require_same({"the checkpoint": place and f"{place[0]} ({seen})"})
    if config.run.resume != "auto" and world.is_main:
        after = None if place is None else config.run.resume
        moved = set_aside(config.run.output, after=after)
        if moved:
            world.print(f"newer checkpoints of an earlier run are now in {moved}")
    if place is None:
        return None
    (saved,) = chosen
    world.print(f"resumed at step {saved['step']} of stage {saved['stage']}")
    return saved


def _digest(path: Path) -> str:
    """Names, sizes and checksums of all that a checkpoint holds, in eight letters."""
    try:
        with zipfile.ZipFile(path) as archive:
            held = [(one.filename, one.file_size, one.CRC) for one in archive.infolist()]
    except (OSError, zipfile.BadZipFile):
        return "none"
    return hashlib.sha256(repr(held).encode()).hexdigest()[:8]


def _check_unchanged(before: Config, config: Config) -> None:
    """ValueError if a run would go on with other flags than it began with."""
    then, now = ({"stages": list(each.stages), **flat(each)} for each in (before, config))
    changed = [
        f"{name} {then[name]!r} to {value!r}"
        for name, value in now.items()
        if then.get(name, value) != value and not _FREE.fullmatch(name)
    ]
    if changed:
        raise ValueError(
            f"checkpoint: {config.run.output} must hold a run with these flags, got one that would "
            f"change {', '.join(changed)}; take another --output, start over with --resume never, "
            "or name a checkpoint with --resume to change its run"
        )


def rng_state() -> dict:
    """States of Python's, NumPy's and torch's generators on this process, safe to load."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    """Put back what `rng_state` gave; GPU states only onto as many GPUs as there were."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
