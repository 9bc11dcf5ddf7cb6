"""The output folder: one run at a time, removed, full, and a resume that is refused."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from configs import changed
from test_checkpoint import names
from test_train import flags, start

import train
from training import checkpoint
from training.config import parse
from training.distributed import World
from training.run import owned

ALONE = World(0, 0, 1, torch.device("cpu"))
HOLD = """
import sys, time, torch
from training.distributed import World
from training.run import owned
with owned(sys.argv[1], World(0, 0, 1, torch.device("cpu"))):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def held(folder: Path):
    """Another process that holds the folder."""
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=root, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_folder_is_of_one_run_at_a_time(tmp_path):
    with held(tmp_path) as process:
        words = rf"one run at a time, got one that runs \(process {process.pid} on .+\)"
        with pytest.raises(SystemExit, match=rf"^train\.py: train: {tmp_path} must be of {words}"):
            train.main(flags(tmp_path))
        assert not (tmp_path / "log.jsonl").exists()
        process.send_signal(signal.SIGKILL)  # a dead process holds nothing
        process.wait()
        with owned(str(tmp_path), ALONE):
            pass


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("training.run.fcntl.lockf", refused)
    with owned(str(tmp_path), ALONE):
        pass


def test_a_folder_that_goes_in_mid_run_ends_it_with_a_sentence(tmp_path):
    process = start(tmp_path / "out", stages__short__steps=100_000, run__save_every=20)
    deadline = time.monotonic() + 100
    while not (tmp_path / "out" / "log.jsonl").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and "Traceback" not in out
    assert "out must stay while it runs, got no such folder" in out


class Full:
    """A file on a disk with room for few bytes."""

    def __init__(self, file):
        self.file, self.left = file, 1000

    def write(self, data):
        if len(data) > self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left -= len(data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_is_named_and_harms_no_checkpoint(tmp_path, monkeypatch):
    state = {"epoch": 0, "stage": "short", "weights": torch.zeros(100_000)}
    checkpoint.save(tmp_path, state, 1)
    real = checkpoint.write_whole

    @contextlib.contextmanager
    def full(path, **how):
        with real(path, **how) as file:
            yield Full(file)

    monkeypatch.setattr(checkpoint, "write_whole", full)
    with pytest.raises(RuntimeError, match=r"00000002\.pt must be writable, got .*No space left"):
        checkpoint.save(tmp_path, state, 2)
    assert names(tmp_path) == ["1-short-00000001.pt"] == os.listdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train.main(flags(folder, run__keep_checkpoints=9))
    return folder


@pytest.mark.parametrize("harm", ["optimizer", "weights", "spikes"])
def test_a_refused_resume_has_moved_nothing(trained, tmp_path, harm):
    state = checkpoint.load(checkpoint.checkpoints(trained)[0])
    if harm == "optimizer":
        state["optimizer"]["state"][0]["exp_avg"] = torch.ones(1, 2)
    elif harm == "weights":
        state["state_dict"]["visual.proj"] = torch.ones(3, 3)
    else:
        state["spikes"] = {"norms": 3}
    torch.save(state, tmp_path / "old.pt")
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir()}
    with pytest.raises(SystemExit, match=r"^train\.py: (checkpoint|SpikeGuard): .* got"):
        train.main(flags(trained, resume=tmp_path / "old.pt"))
    after = {path: path.stat().st_mtime_ns for path in trained.iterdir()}
    assert {path.name for path in before} == {path.name for path in after}
    assert all(after[path] == time for path, time in before.items() if path.suffix == ".pt")
    assert after[trained / "log.jsonl"] == before[trained / "log.jsonl"]


class Stop:
    name = "SIGTERM"

    def __init__(self):
        self.asked = 0

    def __bool__(self):
        self.asked += 1
        return True


def test_a_signal_between_stages_is_obeyed(trained, tmp_path, capsys):
    config = parse(flags(tmp_path))
    train.train(changed(config, run__resume="never"), ALONE, Stop())
    assert "SIGTERM: before stage short" in capsys.readouterr().out
    assert names(tmp_path) == []
