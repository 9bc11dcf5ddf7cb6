"""What a run says of itself: the progress bar, the log, the rates and the numbers at the end."""

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data.files import write_whole

from .picture import picture as picture

# Dense TFLOP/s with fp32 accumulation, (bfloat16, float32 without tensor cores), by a word of the
# device's name; the first hit counts. Source: the makers' data sheets.
_PEAK_TFLOPS = (
    (r"GB200|B200", 2250, 75),
    (r"H200", 989, 67),
    (r"H100 PCIe", 756, 51),
    (r"H100 NVL", 835, 60),
    (r"GH200|H100|H800", 989, 67),
    (r"A100|A800", 312, 19.5),
    (r"L40S", 362, 91.6),
    (r"L40", 181, 90.5),
    (r"L4", 121, 30.3),
    (r"A10G", 70, 31.2),
    (r"A10", 125, 31.2),
    (r"A40", 150, 37.4),
    (r"RTX A6000", 155, 38.7),
    (r"RTX 6000 Ada Generation", 364, 91.1),
    (r"RTX 5090", 210, 105),
    (r"RTX 4090", 165, 82.6),
    (r"RTX 3090", 71, 35.6),
    (r"MI325X|MI300X", 1307, 163),
    (r"MI250X?", 191, 23.9),  # one of its two dies, which is what torch calls a device
)


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """The FLOP/s that a device could do in a dtype; None where the table does not have it."""
    if torch.device(device).type != "cuda" or dtype not in (torch.bfloat16, torch.float32):
        return None
    return peak_flops_of(torch.cuda.get_device_name(device), dtype)


def peak_flops_of(name: str, dtype: torch.dtype) -> float | None:
    """`peak_flops` by the device's name.

    >>> peak_flops_of("NVIDIA A100-SXM4-80GB", torch.bfloat16)
    312000000000000.0
    """
    for pattern, bfloat16, float32 in _PEAK_TFLOPS:
        if re.search(rf"\b({pattern})\b", name):
            return (bfloat16 if dtype == torch.bfloat16 else float32) * 1e12
    return None


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by torch on a GPU, by the whole process (resident) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


# What gloo says when another process is gone or does not answer.
_LOST = r"[Tt]imed out|[Cc]onnection (closed|reset|refused)|EADDRINUSE|pair closure"


@contextmanager
def sentences(program: str) -> Iterator[None]:
    """End the program with "<program>: <sentence>" and status 1 where its user can mend the error.

    That is any ValueError, OSError or lack of memory, and a RuntimeError in this project's form,
    "<function>: <what must hold>, got <what came>". Other errors are faults of the program: they
    keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # a path may hold bytes that are no text
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        words = str(error).strip() or type(error).__name__
        if "Original Traceback" in words:  # of a loader's process: torch adds where it was raised
            words = words.splitlines()[-1].partition(": ")[2]
        if isinstance(error, dist.DistError) or re.search(_LOST, words):
            words = f"processes must answer each other, got {words.splitlines()[0]}"
        elif re.search(r"out of memory|allocate|MemoryError", words):
            words = f"the run must fit in memory, got {words.splitlines()[0]}"
        elif isinstance(error, RuntimeError) and not re.match(r"\w+: .+\bgot\b", words, re.DOTALL):
            raise
        sys.exit(f"{program}: {words}")


class Meter:
    """Rates between two readings: samples/s, kept tokens/s and the share of time spent on data.

    Args:
        clock: seconds; another one serves tests.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._restart()

    def _restart(self) -> None:
        self._start, self._waited, self._samples, self._tokens = self._clock(), 0.0, 0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    def add(self, samples: int, tokens: int) -> None:
        """Count what one step trained on, over all processes."""
        self._samples += samples
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """samples_per_s, tokens_per_s and data_wait (0 to 1) since the last reading."""
        seconds = max(self._clock() - self._start, 1e-9)
        values = {
            "samples_per_s": self._samples / seconds,
            "tokens_per_s": self._tokens / seconds,
            "data_wait": self._waited / seconds,
        }
        self._restart()
        return values


class ProgressBar:
    """A bar on a terminal; a plain line now and then elsewhere; nothing where not enabled.

    Args:
        total: steps of the stage.
        start: steps done before, on resume.
        name: of the stage.
        enabled: rank 0 alone shows one.
        stream: where to; stderr if None.
        every: seconds between plain lines.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        name: str = "",
        enabled: bool = True,
        stream: TextIO | None = None,
        every: float = 10.0,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total, self._step, self._name = total, start, name
        self._enabled, self._every, self._last = enabled, every, -math.inf
        self._bar = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=start, desc=name, file=self._stream, dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
                "[{elapsed}<{remaining}]{postfix}",
            )  # fmt: skip

    def update(self, step: int, **values: float | None) -> None:
        """Show that `step` steps are done.

        Args:
            step: of the stage, from 1.
            values: any of loss, samples_per_s, tokens_per_s, data_wait, to show from now on.
        """
        advance, self._step = step - self._step, step
        if self._bar is not None:
            if values:
                self._bar.set_postfix_str(summary(values), refresh=False)
            self._bar.update(advance)
        elif self._enabled and values:
            now = time.monotonic()
            if now - self._last >= self._every or step >= self._total:
                self._last = now
                self.message(f"{self._name} {step}/{self._total}  {summary(values)}")

    def message(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._enabled:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """End the bar; it stays on the screen."""
        if self._bar is not None:
            self._bar.close()


def summary(values: dict[str, float | None]) -> str:
    """The figures of a log line in words.

    >>> summary({"loss": 2.345, "samples_per_s": 4321, "tokens_per_s": 25926, "data_wait": 0.01})
    'loss 2.345  4.3k samples/s  25.9k tokens/s  data wait 1%'
    """
    words = {
        "loss": "loss {:.3f}".format,
        "samples_per_s": lambda value: f"{_short(value)} samples/s",
        "tokens_per_s": lambda value: f"{_short(value)} tokens/s",
        "data_wait": "data wait {:.0%}".format,
    }
    return "  ".join(
        say(values[name]) for name, say in words.items() if values.get(name) is not None
    )


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


class JsonLines:
    """A log of one JSON object a line, safe to append to after a kill.

    Args:
        path: made with its folder where missing.
        stages: names of the run's stages, in order.
        resume: (stage, step) from which the run goes on: later lines, and one that a kill cut, are
            dropped. None starts an empty log.
    """

    def __init__(
        self, path: str | Path, stages: Sequence[str], *, resume: tuple[str, int] | None = None
    ) -> None:
        self.path = Path(path)
        place = {stage: number for number, stage in enumerate(stages)}
        done = (place[resume[0]], resume[1]) if resume else (-1, 0)
        kept = [
            row
            for row in read_rows(path)
            if (place.get(row["stage"], len(place)), row["step"]) <= done
        ]
        _write_whole(self.path, "".join(_line(row) for row in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, *, stage: str, step: int, **values: float | dict | None) -> None:
        """Append one line at once: stage, step, the values given, and the time (Unix seconds)."""
        row = {"stage": stage, "step": step, **values, "time": round(time.time(), 3)}
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(row: dict) -> str:
    plain = {
        key: value.item() if isinstance(value, Tensor) else value for key, value in row.items()
    }
    finite = {  # JSON has no NaN
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in plain.items()
    }
    return json.dumps(finite) + "\n"


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a log; none if it is missing. A line that a kill cut is left out."""
    rows = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and {"stage", "step"} <= row.keys():
                rows.append(row)
    return rows


def write_results(path: str | Path, results: dict) -> None:
    """Write results.json whole or not at all.

    Args:
        path: of the file.
        results: {"seconds": {stage: s, ...}, "stages": {stage: {split: figures}}, ...}; the figures
            of a split are shares from 0 to 1: top1, top5, image_to_text_r1, image_to_text_r5,
            text_to_image_r1, text_to_image_r5 and chance, beside the count n.

    Raises:
        ValueError: a split without its n or chance, which no figure can be read without.
    """
    for stage, splits in results.get("stages", {}).items():
        for split, figures in splits.items():
            if not {"n", "chance"} <= figures.keys():
                held = ", ".join(figures)
                raise ValueError(
                    f"write_results: {stage}, {split} must hold n and chance, got {held}"
                )
    _write_whole(Path(path), json.dumps(results, indent=2) + "\n")


def _write_whole(path: Path, text: str) -> None:
    with write_whole(path) as file:
        file.write(text.encode())
