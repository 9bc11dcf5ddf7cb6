"""The launches that real calls make, caught with their tensors, to be changed or made again.

As a program it prints the modelled roofs of the launches of cases.py's calls, as lines of JSON, for
a GPU that need not be here:

    python -m bench.first.launched --arch 90 attention gelu
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from bench.first.cases import Case, both, fast_cases
from bench.first.report import Line
from bench.measure import seconds

if TYPE_CHECKING:
    from bench.meters.launches import Launch


@dataclass(frozen=True)
class Launched:
    """One launch, as it was given to Triton."""

    kernel: Any
    grid: Any
    args: tuple
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's, without what all have: "bias_gelu_fwd"."""
        return self.kernel.fn.__name__.strip("_").removesuffix("_kernel")

    def seconds(self) -> float:
        """Its time on the device, made again by itself."""

        def again(args: tuple, kwargs: dict[str, Any]) -> None:
            self.kernel.run(*args, grid=self.grid, warmup=False, **kwargs)

        return seconds(again, (self.args, self.kwargs), graph=True)


@contextmanager
def launches(
    change: Callable[[Launched], dict[str, Any]] | None = None,
) -> Iterator[list[Launched]]:
    """The list fills with the launches of the block, which go on; change: what to put in place of
    a launch's options."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    found: list[Launched] = []

    def watching(run: Callable) -> Callable:
        def watched(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            one = Launched(kernel, grid, args, kwargs)
            if change is not None:
                one = replace(one, kwargs=kwargs | change(one))
            found.append(one)
            return run(kernel, *args, grid=grid, warmup=warmup, **one.kwargs)

        return watched

    with ExitStack() as patches:
        for kind in (JITFunction, InterpretedFunction):
            patches.enter_context(patch.object(kind, "run", watching(kind.run)))
        yield found


def calls(ops: list[str], big: bool) -> Iterator[Case]:
    """The cases of these ops, in order."""
    for op, cases in fast_cases(big).items():
        if op in ops:
            yield from cases


def modelled(launch: Launch) -> Line:
    """What roofs.py makes of a launch."""
    from bench.meters.compiled import compiled, disassembly, read
    from bench.meters.roofs import as_json, least_bytes, roofs

    line = dict(kernel=launch.name, least_bytes=least_bytes(launch))
    try:
        code = compiled(launch)
        listing = disassembly(code)
        return as_json(roofs(launch, read(launch, code, listing), listing)) | line
    except RuntimeError as error:
        return line | dict(error=str(error))


def main() -> None:
    """Print a line of JSON for each launch of the ops' calls."""
    from bench.meters.launches import recording

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("ops", nargs="+")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--part", nargs=2, type=int, default=(0, 1), help="which of how many")
    parser.add_argument("--small", action="store_true", help="the interpreter's sizes")
    asked = parser.parse_args()
    dtype = torch.float16 if asked.small else torch.bfloat16
    made: list[tuple[str, int, Launch]] = []
    with recording(asked.arch) as found:
        for case in calls(asked.ops, not asked.small):
            both(case.ours, case.leaves(torch.device("cpu"), dtype))
            made += [(case.label, place, launch) for place, launch in enumerate(found)]
            found.clear()
    part, parts = asked.part
    for case, place, launch in made[part::parts]:
        print(json.dumps(modelled(launch) | dict(case=case, place=place)), flush=True)


if __name__ == "__main__":
    main()
