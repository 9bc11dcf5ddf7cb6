"""Cases of kernel files compiled without Triton's interpreter, which the tests' process runs under.

As a program it compiles the files named and prints their rows as JSON.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench.meters.compiled import Row, compile_case, discovered, table


def machine_code(*ops: str) -> list[Row]:
    """A row for every case of these files and each of its architectures."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, __file__, *ops]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = [Row(**values) for values in json.loads(run.stdout)]
    for row in rows:
        row.tensor_core = Counter(row.tensor_core)
        for name in ("load_widths", "store_widths"):  # JSON's keys are texts
            counts = {int(width): count for width, count in getattr(row, name).items()}
            setattr(row, name, Counter(counts))
    assert rows
    return rows


def cores(row: Row) -> set[str]:
    """The kinds of tensor-core instruction in a row."""
    return {name for name, count in row.tensor_core.items() if count}


OWN_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def check_rows(rows: list[Row], good) -> None:
    """Every row must be good; a table of those that are not."""
    bad = [row for row in rows if not good(row)]
    assert not bad, "\n" + table(bad)


def spills_nothing(row: Row) -> bool:
    """It can be launched, and keeps everything in registers."""
    return row.fits and not row.spill_stores and not row.spill_loads


def _compiled(ops: list[str], index: int, arch: int) -> dict:
    return vars(compile_case(list(discovered(ops))[index], arch))


def main(ops: list[str]) -> None:
    wanted = [(i, arch) for i, case in enumerate(discovered(ops)) for arch in case.archs]
    with ProcessPoolExecutor(2) as pool:
        futures = [pool.submit(_compiled, ops, *one) for one in wanted]
        print(json.dumps([future.result() for future in futures]))


if __name__ == "__main__":
    main(sys.argv[1:])
