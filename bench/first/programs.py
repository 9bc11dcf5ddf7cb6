"""Other programs of bench beside this one: not under the interpreter, and in parallel."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def programs(parts: int, module: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """The lines of JSON of a module run as `parts` programs that share the work by --part, as they
    come; and how one "ended" if not well.

    Programs, not forks: a process that has run torch cannot be forked safely.
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= dict(OMP_NUM_THREADS="1")
    came: queue.Queue[dict[str, Any] | None] = queue.Queue()
    running = []

    def read(child: subprocess.Popen, errors: Any) -> None:
        for text in child.stdout:
            came.put(json.loads(text))
        code = child.wait()
        with errors:
            errors.seek(0)
            words = errors.read().strip()[-500:]
        if code and words:
            came.put(dict(ended=words))
        came.put(None)

    try:
        for part in range(parts):
            errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by its reader
            child = subprocess.Popen(
                [sys.executable, "-m", module, *arguments, "--part", str(part), str(parts)],
                cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
            running.append(child)
            threading.Thread(target=read, args=(child, errors), daemon=True).start()
        left = parts
        while left:
            line = came.get()
            left -= line is None
            if line is not None:
                yield line
    finally:
        for child in running:
            child.kill()
            child.wait()
