"""Stage tune: each launch's num_warps and num_stages, and each table's tiles, beside neighbours.

A table is what a kernel file chooses tiles from: a function that returns a Config or a dict of
BLOCK sizes, or such a dict itself. They are found by that form, so a new one needs no word here.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial, wraps
from types import FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

from torch import Tensor

import clipa_kernels
from bench.first.cases import Case, both, fast_cases
from bench.first.launched import Launched, launches
from bench.first.machine import Machine, kept
from bench.first.report import Check, Line, tried

BETTER = 0.97  # of the time as it is: less is noise
OPTIONS = ("num_warps", "num_stages")


def checks(machine: Machine) -> list[Check]:
    """By op; the first and the last of its shapes."""
    made = []
    every = fast_cases(machine.big)
    for op in machine.pick(list(every), ["attention", "layer_norm", "gelu"]):
        cases = every[op]
        few = cases[:1] if len(cases) == 1 else [cases[2 % len(cases)], cases[-1]]
        made.append(Check(f"tune {op}", partial(tuned, machine, few), 95))
    return made


def tuned(machine: Machine, cases: list[Case]) -> Iterator[Line]:
    """A line for each neighbour: its time over the time as it is; then those that are better."""
    better: list[str] = []
    for case in cases:
        leaves = case.leaves(machine.device, machine.short)
        with launches() as found, asked() as rows:
            expected = kept(both(case.ours, leaves))  # launches made again write over the results
        times = [launch.seconds() for launch in found]
        whole = sum(times)
        yield dict(case=case.label, us=1e6 * whole, launches=len(found))
        lines = [
            (str(row), partial(of_table, case, leaves, row, other, expected, whole))
            for row in rows
            if row.arguments is not None or any(_used(row.value, one.kwargs) for one in found)
            for other in neighbours(row.value)
        ]
        lines += [
            (launch.name, partial(of_launch, launch, option, value, taken))
            for launch, taken in zip(found, times, strict=True)
            for option, value in options(launch)
        ]
        for label, measure in lines:
            line = tried(f"{case.label}: {label}", measure)
            line.pop("ok", None)  # a neighbour that does not compile is no failure of ours
            yield line
            if line.get("over_now", 1.0) < BETTER:
                better.append(f"{line['to']}: {line['over_now']:.2f} of {case.label}")
    yield dict(table="; ".join(better) or "nothing is better by 3%", paste=better)


def _used(table: dict[str, int], options: dict[str, Any]) -> bool:
    """Whether a launch was given these sizes."""
    return all(options.get(name) == value for name, value in table.items())


def options(launch: Launched) -> Iterator[tuple[str, int]]:
    """Neighbours of what the compiler is told, where the launch tells it."""
    warps, stages = (launch.kwargs.get(option) for option in OPTIONS)
    if warps is not None:
        yield from (("num_warps", value) for value in (warps // 2, warps * 2) if 1 <= value <= 16)
    if stages is not None:
        yield from (("num_stages", value) for value in (stages - 1, stages + 1) if value >= 1)


def of_launch(launch: Launched, option: str, value: int, now: float) -> Line:
    """The same launch compiled otherwise."""
    taken = replace(launch, kwargs=launch.kwargs | {option: value}).seconds()
    words = f"{launch.name} {option} {launch.kwargs[option]} -> {value}"
    return dict(to=words, us=1e6 * taken, over_now=taken / now)


@dataclass(frozen=True)
class Row:
    """A table's answer: value is a Config or a dict; arguments None for a table that is a dict."""

    table: Any
    name: str
    arguments: tuple | None
    value: Any

    def __str__(self) -> str:
        return self.name + ("" if self.arguments is None else str(self.arguments))


def tables() -> Iterator[tuple[ModuleType, str, Any]]:
    """(module, name, table) of all kernel files, wherever a table is imported to."""
    for info in pkgutil.walk_packages(clipa_kernels.__path__, "clipa_kernels."):
        if "kernels" in info.name.rsplit(".", 1)[1] or info.name.endswith(".launch"):
            module = importlib.import_module(info.name)
            for name, value in list(vars(module).items()):
                if _is_table(value):
                    yield module, name, value


def _is_table(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(str(key).startswith("BLOCK_") for key in value)
    if not isinstance(inspect.unwrap(value) if callable(value) else value, FunctionType):
        return False  # a cached function is none itself
    returns = value.__annotations__.get("return")
    return getattr(returns, "__name__", returns) == "Config" or (
        returns in (dict[str, int], "dict[str, int]") and "block" in value.__name__
    )


@contextmanager
def asked(answer: Callable[[Row], Any] = lambda row: row.value) -> Iterator[list[Row]]:
    """The list fills with the rows that the block's launchers ask tables for; answer: what they
    get."""
    found: list[Row] = []

    def watched(table: FunctionType, name: str) -> Callable:
        @wraps(table)
        def asking(*arguments: Any, **named: Any) -> Any:
            row = Row(table, name, (*arguments, *named.values()), table(*arguments, **named))
            if row not in found:
                found.append(row)
            return answer(row)

        return asking

    with ExitStack() as patches:
        known: dict[int, Any] = {}
        for module, name, table in tables():
            label = f"{module.__name__.removeprefix('clipa_kernels.')}.{name}"
            if isinstance(table, dict):
                row = Row(table, label, None, dict(table))
                found.append(row)
                patches.enter_context(patch.dict(table, answer(row)))
                continue
            new = known.setdefault(id(table), watched(table, label))
            patches.enter_context(patch.object(module, name, new))
        yield found


def neighbours(value: Any) -> Iterator[Any]:
    """Half and twice each tile size; what the compiler is told is the launches' own."""
    names = [field.name for field in fields(value)] if is_dataclass(value) else list(value)
    for name in names:
        now = getattr(value, name) if is_dataclass(value) else value[name]
        if name in (*OPTIONS, "maxnreg") or type(now) is not int:
            continue
        for other in (now // 2, now * 2):
            if other >= 1:
                change = {name: other}
                yield replace(value, **change) if is_dataclass(value) else value | change


def of_table(
    case: Case,
    leaves: dict[str, Any],
    row: Row,
    other: Any,
    expected: dict[str, Tensor],
    now: float,
) -> Line:
    """The op with another row in a table: right, and how fast."""

    def answer(one: Row) -> Any:
        same = one.table is row.table and one.arguments == row.arguments
        return other if same else one.value

    with launches() as found, asked(answer):
        made = both(case.ours, leaves)
    for name, value in made.items():
        off = (value.double() - expected[name].double()).abs().max()
        if not off <= 0.05 * expected[name].double().abs().max():
            raise AssertionError(f"{name} is wrong by {off.item():.1e} with {other}")
    del made
    taken = sum(launch.seconds() for launch in found)
    return dict(to=f"{row} -> {other}", us=1e6 * taken, over_now=taken / now)
