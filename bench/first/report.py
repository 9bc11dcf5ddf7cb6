"""Checks of a stage, each in words, and the lines that come of them, as they come.

A line is one JSON object: stage, check, seconds since the stage began, and what was found; "ok"
where something is right or wrong, "error" where a check ended by one, "table" the words for the
table at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TextIO

Line = dict[str, Any]
MOST_ROWS = 40


@dataclass(frozen=True)
class Check:
    """What run() yields are lines; limit: seconds after which it counts as hung."""

    name: str
    run: Callable[[], Iterable[Line]]
    limit: float = 90


def run(checks: list[Check], stage: str, out: TextIO, skip: int, seconds: float) -> bool:
    """Run the checks from number `skip` on; False where one left the device unusable.

    A line with "begins" stands before each check's, so that who reads them knows which one hung.
    """
    began = time.perf_counter()

    def say(**line: Any) -> None:
        spent = round(time.perf_counter() - began, 2)
        out.write(json.dumps(dict(stage=stage, at=spent) | line, default=str) + "\n")
        out.flush()

    for place, check in enumerate(checks[skip:], skip):
        left = seconds - (time.perf_counter() - began)
        if left <= 0:
            say(check=check.name, skipped="no time was left")
            continue
        limit = min(check.limit, left)
        say(check=check.name, begins=place, limit=limit)
        until = time.perf_counter() + limit
        try:
            for line in check.run():
                say(check=check.name, **line)
                if time.perf_counter() > until:
                    say(check=check.name, cut=f"after {limit:.0f} s")
                    break
        except Exception as error:
            say(check=check.name, ok=False, error=f"{type(error).__name__}: {error}")
            if _unusable():
                return False
    return True


def _unusable() -> bool:
    """Whether CUDA's context is lost, as after an access out of bounds."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.zeros(1, device="cuda").add_(1).item()
            torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def tried(label: str, function: Callable[..., Line], *arguments: Any) -> Line:
    """The line of one case, or its error: the check goes on with the next."""
    try:
        return dict(case=label) | function(*arguments)
    except Exception as error:
        if _unusable():
            raise
        words = str(error).strip().split("\n\n")[0]
        return dict(case=label, ok=False, error=f"{type(error).__name__}: {words}")


def table(lines: list[Line]) -> list[str]:
    """About 40 rows: one a check, and the words that checks have for it."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if "check" in line and "begins" not in line:
            found.setdefault((line["stage"], line["check"]), []).append(line)
    rows = [_row(*key, own) for key, own in found.items()]
    if len(rows) > MOST_ROWS:
        rows = [*rows[: MOST_ROWS - 1], f"... and {len(rows) - MOST_ROWS + 1} more"]
    return rows


def _row(stage: str, check: str, lines: list[Line]) -> str:
    judged = [line for line in lines if "ok" in line]
    good = sum(bool(line["ok"]) for line in judged)
    words = [line["table"] for line in lines if "table" in line]
    words += [line["skipped"] for line in lines if "skipped" in line][:1]
    words += [f"cut {line['cut']}" for line in lines if "cut" in line]
    wrong = next((line for line in judged if not line["ok"]), None)
    if wrong is not None:
        reason = wrong.get("error", {k: v for k, v in wrong.items() if k not in ("stage", "check")})
        words.insert(0, f"{wrong.get('case', '')} {reason}".strip()[:160].replace("\n", " "))
    mark = "" if not judged else f"{good} of {len(judged)}" + (" FAIL" if wrong else "")
    return f"{stage:5} {check:28} {mark:12} {'; '.join(words)}".rstrip()
