"""Processes of a run that differ, die or stop: a sentence on every one of them, and no hang."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_shards import numbers, shards  # noqa: F401 (fixtures)
from test_train import flags

from training.distributed import Alarm, World

ROOT = Path(__file__).parents[1]
SHORT = {"run__timeout": 20, "stages__short__steps": 4, "stages__full__steps": 1}


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def member(
    rank: int, size: int, at: int, words: list[str], folder: Path, program: str = "train.py"
) -> subprocess.Popen:
    """One process of a run, in a folder of its own, as on another machine."""
    folder.mkdir(exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(at)}
    return subprocess.Popen(
        [sys.executable, ROOT / program, *words],
        cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def end(processes: list[subprocess.Popen]) -> list[str]:
    """What each said when it ended; all must end, none well, none with a traceback."""
    said = []
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode != 0 and "Traceback" not in out, out
        assert re.search(r"^(\w+(\.py)?: .+ got .+|rank \d ends: )", out, re.M), out
        said.append(out)
    return said


def words(**change) -> list[str]:
    return flags("out", **{**SHORT, **change})


def pair(tmp_path, first: list[str], second: list[str]) -> list[str]:
    at = port()
    return end([member(r, 2, at, w, tmp_path / f"n{r}") for r, w in enumerate((first, second))])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stages__short__lr": 0.5}, "stages.short.lr must be rank 0's 0.001 on every process"),
        ({"stages__short__steps": 5}, "stages.short.steps must be rank 0's 4"),
        ({"run__log_every": 2}, "run.log_every must be rank 0's 1"),
        ({"impl": "reference"}, "run.impl must be rank 0's auto on every process, got reference"),
    ],
)
def test_other_flags_on_a_rank(tmp_path, change, says):
    for out in pair(tmp_path, words(), words(**change)):
        assert "train.py: ranks: " in out and says in out and "on rank 1" in out


def test_other_shards_on_a_rank(tmp_path, shards):  # noqa: F811
    for rank in (0, 1):
        (tmp_path / f"n{rank}").mkdir()
        for place in range(2 - rank):
            os.link(shards / f"0{place}.tar", tmp_path / f"n{rank}" / f"{place}.tar")
        (tmp_path / f"n{rank}" / "sizes.json").write_text(f'{{"0.tar": {7 - rank}}}')
    how = dict(stages__short__batch_size=4, stages__full__batch_size=4)
    for pattern, says in (
        ("*.tar", "the number of shards must be rank 0's 2 on every process, got 1 on rank 1"),
        ("0.tar", "the table of samples a shard must be rank 0's"),
    ):
        said = pair(tmp_path, words(data=pattern, **how), words(data=pattern, **how))
        assert all(says in out for out in said)


def test_a_folder_that_one_rank_sees_alone(tmp_path):
    """A checkpoint that was written into a folder of rank 0's machine."""
    alone = [sys.executable, ROOT / "train.py", *words(run__save_every=2)]
    (tmp_path / "n0").mkdir()
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run(alone, cwd=tmp_path / "n0", env=env, check=True, capture_output=True)
    for path in (tmp_path / "n0" / "out").glob("2-*.pt"):
        path.unlink()
    for out in pair(tmp_path, words(run__save_every=2), words(run__save_every=2)):
        assert "ranks: the checkpoint must be rank 0's out/1-short-00000004.pt" in out
        assert "(none) on rank 1" in out


def test_a_rank_that_never_comes(tmp_path):
    started = time.monotonic()
    (out,) = end([member(0, 2, port(), words(run__timeout=5), tmp_path / "n0")])
    assert "train.py: " in out and "2 processes must meet, got" in out
    assert time.monotonic() - started < 60


def test_a_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        at = taken.getsockname()[1]
        (out,) = end([member(0, 2, at, words(run__timeout=5), tmp_path / "n0")])
    assert "2 processes must meet, got" in out and "in use" in out


def test_a_stranger_at_the_port_who_never_answers(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        at, how = taken.getsockname()[1], words(run__timeout=5)
        said = end([member(rank, 2, at, how, tmp_path / f"n{rank}") for rank in (0, 1)])
    assert all("2 processes must meet, got" in out for out in said)


def left_alone(rank: subprocess.Popen, lost: subprocess.Popen) -> str:
    """What a process says as it ends, without one that is lost or stopped."""
    try:
        (out,) = end([rank])
    finally:
        lost.kill()
        lost.communicate()
    assert "train.py: processes must answer each other, got" in out
    return out


@pytest.mark.parametrize("name", ["SIGSTOP", "SIGKILL"])
def test_a_rank_that_stops_in_mid_run(tmp_path, name):
    """Missed in the time of a step; a rank that comes later than that is waited for."""
    short = 4
    waits = dict(run__timeout=100, run__step_timeout=short, run__save_every=10**6)
    at, how = port(), words(stages__short__steps=100_000, **waits)
    ranks = [member(0, 2, at, how, tmp_path / "n0")]
    time.sleep(short + 2)
    ranks.append(member(1, 2, at, how, tmp_path / "n1"))
    log = tmp_path / "n0" / "out" / "log.jsonl"
    deadline = time.monotonic() + 90
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert time.monotonic() < deadline and ranks[0].poll() is None
        time.sleep(0.2)
    ranks[1].send_signal(getattr(signal, name))
    stopped = time.monotonic()
    out = left_alone(*ranks)
    assert name == "SIGKILL" or "in 4 s (--run.step-timeout)" in out
    assert time.monotonic() - stopped < short + 15


def test_a_rank_that_stops_in_an_evaluation(tmp_path):
    """Which has the time-out of a start; the exchange after it fails otherwise."""
    at, how = port(), words(run__timeout=5, run__save_every=10**6)
    ranks = [member(rank, 2, at, how, tmp_path / f"n{rank}") for rank in (0, 1)]
    saved, deadline = tmp_path / "n0" / "out" / "1-short-00000004.pt", time.monotonic() + 90
    while not saved.exists():
        assert time.monotonic() < deadline and ranks[0].poll() is None
        time.sleep(0.005)
    ranks[1].send_signal(signal.SIGSTOP)
    left_alone(*ranks)


def test_an_alarm_is_set_between_steps_alone(monkeypatch, capsys):
    """Not before the first, nor at a rest, nor as processes meet after one."""
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    world = World(0, 0, 2, torch.device("cpu"))
    monkeypatch.setattr(World, "any", lambda self, flag: time.sleep(1.2))
    alarm = Alarm(world, 0.8)
    time.sleep(1.2)
    alarm.set(1)
    for done in range(2, 6):
        time.sleep(0.3)
        alarm.set(done)
    alarm.rest()
    time.sleep(1.2)
    alarm.set(6)
    alarm.set(7)
    assert not ended.is_set()
    assert ended.wait(20)
    said = ": processes must answer each other, got no end of the step after 7 in 0.8 s"
    assert said in capsys.readouterr().err
