"""What a person watches beside the log: TensorBoard, wandb or trackio, and a trace of some steps.

None of these packages is needed; one that is asked for and missing is told before any work.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

WATCHERS = ("none", "tensorboard", "wandb", "trackio")

Watch = Callable[[int, Mapping[str, Any]], None]


def watcher(kind: str, folder: Path, config: Mapping[str, Any]) -> Watch:
    """A function that shows the numbers of a row of the log at a step of the run.

    Args:
        kind: one of WATCHERS. TensorBoard's files lie in `<folder>/tensorboard`, wandb's in
            `<folder>/wandb`, trackio's where it keeps all. The latter two have a project named as
            the folder's parent and a run named as the folder, which goes on where a run of that
            name was before.
        folder: the run's output.
        config: flags by name.

    Raises:
        RuntimeError: the package is not installed.
    """
    if kind == "none":
        return lambda step, row: None
    module = {"tensorboard": "torch.utils.tensorboard"}.get(kind, kind)
    try:
        package = importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(
            f"watcher: {kind} must be installed to be written to (pip install {kind}), got {error}"
        ) from error
    if kind == "tensorboard":
        writer = None

        def show(step: int, row: Mapping[str, Any]) -> None:
            nonlocal writer
            if writer is None:  # hides what a killed run wrote from here on
                writer = package.SummaryWriter(str(folder / "tensorboard"), purge_step=step)
            for name, value in numbers(row).items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return show
    place = folder.resolve()
    how = {"project": place.parent.name or "clipa", "name": place.name, "config": dict(config)}
    how |= {"id": place.name, "dir": str(folder)} if kind == "wandb" else {}
    package.init(**how, resume="allow")
    return lambda step, row: package.log(numbers(row), step=step)


def numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row, those within its dicts too.

    >>> numbers({"loss": 2.5, "stage": "short", "mfu": None, "skipped_by_kind": {"image": 3}})
    {'loss': 2.5, 'skipped_by_kind/image': 3}
    """
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = value
    return found


def window_of(text: str) -> range:
    """The steps in "20:25", from 20 to 24; none in "".

    Raises:
        ValueError: something else.

    >>> window_of("20:25")
    range(20, 25)
    """
    if not text:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise ValueError(f"config: run.profile must be two rising steps, as 20:25, got {text!r}")
    return range(int(first), int(last))


class Tracer:
    """Called before each step of a stage; writes a Chrome trace of some of them.

    Args:
        steps: of the stage, as `window_of`. path: of the trace; chrome://tracing and Perfetto open
            it.
        writes: whether this process is the one that does.
        rest: called on every process before one writes, which takes its time.
    """

    def __init__(
        self, steps: range, path: Path, writes: bool = True, rest: Callable[[], None] = lambda: None
    ) -> None:
        self.steps, self.path, self.writes, self.rest = steps, path, writes, rest
        self._profiler: torch.profiler.profile | None = None

    def __call__(self, step: int) -> None:
        if step == self.steps.stop:
            self.rest()
        if step not in self.steps:
            self.close()
        elif self._profiler is None and self.writes:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()

    def close(self) -> None:
        """Write what was traced so far; nothing where nothing was."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self.path))
            self._profiler = None


def advice(
    row: Mapping[str, Any],
    memory: float | None,
    shards: bool,
    workers: int,
    exchange: float = 0.0,
    step: float = math.inf,
    wire: str = "fp32",
) -> str:
    """What the numbers of a row suggest, in a sentence; "" where all is well.

    Args:
        row: of the log. memory: bytes of the device; None where it is not known.
        shards: whether the data is shards. workers: processes that decode them.
        exchange: seconds of the sum of gradients over processes, when nothing else runs.
        step: seconds of a whole step. wire: dtype in which gradients travel.
    """
    if row["data_wait"] > 0.2 and shards:
        more = "more --data.workers" if workers else "--data.workers (none decode now)"
        return (
            f"data waits {row['data_wait']:.0%} of the time: try {more}, or smaller pictures "
            "(python -m data.shrink); python -m data.bench says how many cores it needs"
        )
    # Of a step that hides all it can, the backward is two thirds: more than that must wait. One of
    # few buckets hides little. Half lies between.
    if exchange > 0.5 * step:
        less = "" if wire == "bf16" else "--run.wire bf16 halves its bytes, "
        return (
            f"the wire is slow: the sum of gradients alone would take {exchange:.3g} of a step's "
            f"{step:.3g} s: {less}a larger batch_size, with accumulate where memory is short, "
            "exchanges them less often"
        )
    peak = row.get("peak_memory_bytes")
    if memory and peak and peak > 0.92 * memory:
        return (
            f"memory is nearly full ({peak / 1e9:.1f} of {memory / 1e9:.1f} GB): a stage's "
            "accumulate computes a step in parts, with the same losses"
        )
    return ""
