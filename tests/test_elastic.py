"""Processes that are lost and started again; examples/killed.py goes on with other numbers of them,
which tests/test_docs.py runs."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from test_ranks import member, port
from test_train import finish, flags, start

STEPS = {"stages__short__steps": 24, "stages__full__steps": 12}
BATCH = {"stages__short__batch_size": 24, "stages__full__batch_size": 24}
SAVES = {"run__save_every": 2, "run__log_every": 1, "run__timeout": 60}


def logged(folder: Path) -> dict[tuple[str, int], float]:
    path = folder / "out" / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # half a line, of a process that was killed
            continue
        if "loss" in row:
            found[row["stage"], row["step"]] = row["loss"]
    return found


def launched(folder: Path, size: int, **change):
    words = flags("out", **{**STEPS, **BATCH, **SAVES, **change})
    at = port()
    return [member(rank, size, at, words, folder) for rank in range(size)]


def finished(processes) -> list[str]:
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), said
    return said


def test_torchrun_starts_a_run_again_that_lost_a_process(tmp_path):
    """Both at the first try, though torchrun's store still has addresses of the dead."""
    finished(launched(tmp_path / "whole", 1))
    out = tmp_path / "cut" / "out"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "2"]
    process = start(out, *launcher, "--master-port", str(port()), **STEPS, **BATCH, **SAVES)
    for rows in (7, 28):
        deadline = time.monotonic() + 150
        while len(logged(out.parent)) < rows:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        holder = (out / ".lock").read_text().split()[1]  # rank 0
        os.kill(int(holder), signal.SIGKILL)
    said = finish(process)
    assert said.count("resumed at step") == 2 and "must answer each other, got" in said
    whole, cut = logged(tmp_path / "whole"), logged(out.parent)
    assert cut.keys() == whole.keys()
    for place, loss in whole.items():
        assert cut[place] == pytest.approx(loss, rel=2e-5), place


@pytest.mark.parametrize("kind", ["none", "full"])
def test_gradients_may_travel_in_16_bits(tmp_path, kind):
    """Half the bytes, and losses that differ by their rounding alone."""
    found = {}
    for wire in ("fp32", "bf16"):
        steps = {"stages__short__steps": 5, "stages__full__steps": 0}
        finished(launched(tmp_path / wire, 2, **steps, run__wire=wire, run__shard=kind))
        found[wire] = logged(tmp_path / wire)
    assert found["fp32"] != found["bf16"]
    for place, loss in found["fp32"].items():
        assert found["bf16"][place] == pytest.approx(loss, rel=2e-2)
