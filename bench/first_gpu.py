"""The first hour on a GPU: torch, triton and this project, and nothing else.

    python -m bench.first_gpu                            right, fast and tune, 8 minutes each
    python -m bench.first_gpu right --output right.jsonl --seconds 300

    right  ceilings of copies, products and launches; every op against fp64, forward and all
           gradients; what no emulator shows: operands beyond 2^31 elements, other streams, CUDA
           graphs, waiting, autocast, TF32, other devices; every recorded launch compiled, with its
           registers and spills; compute-sanitizer where it is installed
    fast   our launches beside their modelled roofs and beside this machine's copies; what a user
           would pick instead; a block and a step of B/16 and H/14, with the profiler's largest
    tune   each kernel's num_warps, num_stages and tile sizes beside their neighbours; what is
           better, to be pasted

Each measurement is one line of JSON, printed as it comes and appended to --output; a table of about
40 rows comes last. A check that fails is a line with its error, and one that hangs or loses the
device is ended; the stage goes on with the next, in a process of its own. Without a GPU all runs
at small sizes under Triton's interpreter, which shows that this program works and no more.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[1]
STAGES = ("right", "fast", "tune")
GRACE = 15  # seconds that a process has beyond a check's limit


def checks_of(stage: str) -> list:
    """The checks of a stage on this machine."""
    from bench.first.machine import Machine

    machine = Machine()  # before what imports triton
    from bench.first import right

    if stage == "smallest":
        return right.smallest(machine)
    if stage == "right":
        return right.checks(machine)
    from bench.first import fast, tune

    return (fast if stage == "fast" else tune).checks(machine)


def supervise(
    stage: str,
    seconds: float,
    say: Callable[[dict[str, Any]], None],
    program: Sequence[str] = (sys.executable, "-m", "bench.first_gpu"),
) -> None:
    """Run a stage in processes: where one dies or hangs, the next begins behind that check."""
    ends, skip = time.perf_counter() + seconds, 0
    while True:
        left = ends - time.perf_counter()
        options = ["--child", "--skip", str(skip), "--seconds", f"{max(left, 0):.0f}"]
        child = subprocess.Popen(
            [*program, stage, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        begun, last = skip - 1, ""
        try:
            for line in lines_of(child, ends + GRACE):
                if "begins" in line:
                    begun, last = line["begins"], line["check"]
                say(line)
            code = child.wait(timeout=5)
        except TimeoutError:
            code = "a hang"
        finally:
            child.kill()
            child.wait()
        if code == 0:
            return
        words = f"the process ended with {code}"
        say(dict(stage=stage, check=last or "start", ok=False, error=words))
        if begun < skip or time.perf_counter() > ends:  # it did not even begin, or no time is left
            return
        skip = begun + 1


def lines_of(child: subprocess.Popen, ends: float) -> Iterator[dict[str, Any]]:
    """The lines of a child as they come. Raises: TimeoutError where a check passes its limit."""
    came: queue.Queue[str | None] = queue.Queue()

    def read(stream: TextIO) -> None:
        for text in stream:
            came.put(text)
        came.put(None)

    threading.Thread(target=read, args=(child.stdout,), daemon=True).start()
    until = min(ends, time.perf_counter() + 120)  # to import torch and make a context
    while True:
        try:
            text = came.get(timeout=max(0.0, until - time.perf_counter()))
        except queue.Empty:
            raise TimeoutError from None
        if text is None:
            return
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # what a library printed
            continue
        if "begins" in line:
            until = min(ends, time.perf_counter() + line["limit"] + GRACE)
        yield line


def main(arguments: list[str] | None = None) -> int:
    """Run the stages asked for; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", default=list(STAGES), help="right, fast, tune")
    parser.add_argument("--output", type=Path, help="file that lines are appended to")
    parser.add_argument("--seconds", type=float, default=480, help="of each stage")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if unknown := set(asked.stages) - {*STAGES, *(["smallest"] if asked.child else [])}:
        parser.error(f"stages must be among {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
    from bench.first.report import run, table

    if asked.child:
        (stage,) = asked.stages
        return int(not run(checks_of(stage), stage, sys.stdout, asked.skip, asked.seconds))
    found: list[dict[str, Any]] = []

    def say(line: dict[str, Any]) -> None:
        found.append(line)
        text = json.dumps(line)
        print(text, flush=True)
        if asked.output is not None:
            with asked.output.open("a") as file:
                file.write(text + "\n")

    for stage in asked.stages:
        supervise(stage, asked.seconds, say)
    print("\n".join(table(found)))
    return int(any(not line.get("ok", True) for line in found))


if __name__ == "__main__":
    raise SystemExit(main())
