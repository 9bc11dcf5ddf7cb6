"""TensorBoard, wandb and trackio beside the log; traces; advice; the launcher for SLURM."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from test_train import flags

import train
from training.watch import advice, watcher, window_of

ROOT = Path(__file__).parents[1]
TWO = {"stages__short__steps": 4, "stages__full__steps": 3, "run__log_every": 2}


class Writer:
    """TensorBoard's, as far as it is used."""

    def __init__(self, folder, purge_step):
        self.folder, self.first, self.rows = folder, purge_step, []
        Writer.last = self

    def add_scalar(self, name, value, step):
        self.rows.append((name, value, step))

    def flush(self):
        pass


def test_a_run_shows_its_numbers_on_tensorboard(tmp_path, monkeypatch):
    fake = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    train.main(flags(tmp_path, **TWO, run__watch="tensorboard"))
    assert Writer.last.folder == str(tmp_path / "tensorboard")
    losses = [(step, value) for name, value, step in Writer.last.rows if name == "loss"]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # Steps count on over the stages.
    steps = [row["step"] + (4 if row["stage"] == "full" else 0) for row in rows]
    assert losses == list(zip(steps, [row["loss"] for row in rows], strict=True))
    assert steps == [2, 4, 6, 7] and Writer.last.first == 2


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_trackers_get_the_numbers_and_the_flags(tmp_path, monkeypatch, kind):
    made, shown = {}, []
    fake = types.SimpleNamespace(
        init=lambda **how: made.update(how),
        log=lambda values, step: shown.append((step, values)),
    )
    monkeypatch.setitem(sys.modules, kind, fake)
    show = watcher(kind, tmp_path / "one", {"optim.lr": 0.1})
    show(7, {"loss": 2.0, "skipped_by_kind": {"image": 1}, "mfu": None})
    assert shown == [(7, {"loss": 2.0, "skipped_by_kind/image": 1})]
    assert (made["project"], made["name"]) == (tmp_path.name, "one")
    assert made["config"] == {"optim.lr": 0.1} and made["resume"] == "allow"


def test_a_package_that_is_missing_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(SystemExit, match=r"^train\.py: watcher: trackio must be installed .* got"):
        train.main(flags(tmp_path, **TWO, run__watch="trackio"))
    assert not (tmp_path / "log.jsonl").exists()


def test_a_window_of_steps_is_traced(tmp_path):
    train.main(flags(tmp_path, **TWO, run__profile="1:3"))
    for stage in ("short", "full"):
        events = json.loads((tmp_path / f"trace-{stage}.json").read_text())["traceEvents"]
        steps = [e for e in events if e.get("name", "").startswith("Optimizer.step")]
        assert len(steps) == 2
    for text in ("3", "3:", "5:3", "a:b", "-1:3"):
        with pytest.raises(ValueError, match=r"run\.profile must be two rising steps"):
            window_of(text)


def test_advice():
    fine = {"data_wait": 0.05, "peak_memory_bytes": 10}
    assert advice(fine, 100, True, 2) == advice(fine, None, True, 2) == ""
    waits = advice(fine | {"data_wait": 0.5}, None, True, 0)
    assert "data waits 50%" in waits and "data.shrink" in waits and "none decode now" in waits
    assert advice(fine | {"data_wait": 0.5}, None, False, 0) == ""  # the embedded set has none
    assert "accumulate" in advice(fine | {"peak_memory_bytes": 95}, 100, True, 2)
    assert advice(fine, None, True, 2, exchange=0.4, step=1.0) == ""
    slow = advice(fine, None, True, 2, exchange=0.6, step=1.0)
    assert "would take 0.6 of a step's 1 s" in slow and "--run.wire bf16" in slow
    assert "--run.wire" not in advice(fine, None, True, 2, exchange=0.6, step=1.0, wire="bf16")


def test_the_launcher_for_slurm(tmp_path):
    """Its srun line, run with a stand-in for srun, starts torchrun with what SLURM tells, and USR1
    does not end it."""
    for name, text in {
        "srun": '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n',
        "torchrun": '#!/bin/sh\nkill -USR1 $$\necho "torchrun $@"\n',
        "scontrol": '#!/bin/sh\ncase $1 in requeue) echo "again $2";; *) echo gpu07;; esac\n',
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "123456",
    }  # fmt: skip
    script = ROOT / "examples" / "train.slurm"

    def launch() -> str:
        command = ["bash", str(script), "--preset", "clipa-v1-b16"]
        how = dict(env=env, cwd=tmp_path, capture_output=True, text=True)
        return subprocess.run(command, **how, check=True).stdout

    out = launch()
    launched = next(line for line in out.splitlines() if line.startswith("torchrun"))
    for words in (
        "--nnodes 2", "--nproc_per_node 8", "--rdzv_id 123456", "--rdzv_endpoint gpu07:",
        "train.py", "--preset clipa-v1-b16",
    ):  # fmt: skip
        assert words in launched
    assert "again 123456" in out  # as there are no results yet
    results = tmp_path / "runs" / "clipa-v1-b16" / "results.json"
    results.parent.mkdir(parents=True)
    results.touch()
    assert "again" not in launch()
    text = script.read_text()
    assert "#SBATCH --signal=USR1@" in text and "#SBATCH --requeue" in text
