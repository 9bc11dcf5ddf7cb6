"""Launches compiled without Triton's interpreter, which the tests' process runs under.

As a program it compiles what bench's calls launch of the kernels in the files named, and prints the
rows as JSON.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from bench.meters.calls import recorded
from bench.meters.compiled import Row, rows, table
from bench.meters.launches import distinct


def machine_code(*ops: str) -> list[Row]:
    """A row for every launch of these kernels on each architecture."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, __file__, *ops]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    made = [Row(**values) for values in json.loads(run.stdout)]
    for row in made:
        row.tensor_core = Counter(row.tensor_core)
        for name in ("load_widths", "store_widths"):  # JSON's keys are texts
            counts = {int(width): count for width, count in getattr(row, name).items()}
            setattr(row, name, Counter(counts))
    assert made
    return made


def cores(row: Row) -> set[str]:
    """The kinds of tensor-core instruction in a row."""
    return {name for name, count in row.tensor_core.items() if count}


OWN_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def check_rows(rows: list[Row], good) -> None:
    """Every row must be good, and there must be some; a table of those that are not."""
    assert rows
    bad = [row for row in rows if not good(row)]
    assert not bad, "\n" + table(bad)


def spills_nothing(row: Row) -> bool:
    """It can be launched, and keeps everything in registers."""
    return row.fits and not row.spill_stores and not row.spill_loads


def main(ops: list[str]) -> None:
    made = list(rows(distinct(recorded(*ops)), jobs=2))
    for row in made:
        if not isinstance(row, Row):
            raise row
    print(json.dumps([vars(row) for row in made]))


if __name__ == "__main__":
    main(sys.argv[1:])
