"""bench/bench_host.py: a block takes a GPU's way, and no kernel runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_it_tells_the_hosts_share_of_a_block():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.bench_host", "2"]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"a block \d+ us, of which products \d+ us, -?\d+ us ours\n", run.stdout)
