"""Checkpoints are written beside the training: of one moment, one at a time, awaited at the end."""

import json
import threading
import time

import pytest
import torch
from test_train import flags

import train
from training import checkpoint


@pytest.fixture
def slow(monkeypatch):
    """Writing that waits until it is let go; what it was asked to write, and what it wrote."""
    let, asked, wrote, real = threading.Event(), [], [], checkpoint.save

    def save(folder, state, step, *keep):
        asked.append(step)
        assert let.wait(60)
        wrote.append(step)
        return real(folder, state, step, *keep)

    monkeypatch.setattr(checkpoint, "save", save)
    return let, asked, wrote


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch, slow):
    """The file holds the weights of its step, not of the steps that were done meanwhile."""
    let, asked, wrote = slow
    real, seen = train.train_step, {}

    def step(model, optimizer, batch, number, config, stage, *rest):
        if stage == "short":
            seen[number] = {n: value.clone() for n, value in model.state_dict().items()}
            if number == 5:  # two steps after it was asked for
                assert asked == [3] and wrote == []
                let.set()
        return real(model, optimizer, batch, number, config, stage, *rest)

    monkeypatch.setattr(train, "train_step", step)
    train.main(flags(tmp_path, run__save_every=3, run__keep_checkpoints=9))
    for path in checkpoint.checkpoints(tmp_path):
        state = checkpoint.load(path)
        if state["stage"] == "short" and state["step"] in seen:
            saved = checkpoint.weights(state)
            assert all(torch.equal(saved[n], value) for n, value in seen[state["step"]].items())
    assert wrote == asked and len(set(asked)) > 3


def test_each_stage_is_written_once_at_its_end(tmp_path, slow):
    let, asked, _ = slow
    let.set()
    train.main(flags(tmp_path, run__save_every=10**6))
    assert len(asked) == 2 == len(checkpoint.checkpoints(tmp_path))
    before, last = (checkpoint.load(path) for path in checkpoint.checkpoints(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert before["metrics"]["stages"] == {}
    assert last["metrics"]["stages"] == {"short": results["short"]} and "full" in results


def test_a_write_that_fails_ends_the_run_soon(tmp_path, monkeypatch):
    """At the next step at which processes speak, and not at the next checkpoint."""
    failed, real, steps = threading.Event(), train.train_step, []

    def save(folder, *rest):
        failed.set()
        raise RuntimeError(f"save: {folder} must be writable, got no space left")

    def step(*words):
        steps.append(words[3])
        if len(steps) == 3:
            assert failed.wait(60)
            time.sleep(0.1)
        return real(*words)

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(SystemExit, match=r"^train\.py: save: .* must be writable, got no space"):
        train.main(flags(tmp_path, run__save_every=2, stages__short__steps=500))
    assert len(steps) <= 4


def test_a_write_that_fails_at_the_end_is_told(tmp_path, monkeypatch):
    def save(folder, *rest):
        raise RuntimeError(f"save: {folder} must be writable, got no space left")

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(SystemExit, match=r"^train\.py: save: .* must be writable, got no space"):
        train.main(flags(tmp_path, run__save_every=10**6, stages__full__steps=0))
    assert not (tmp_path / "results.json").exists()


def test_a_snapshot_stays_as_it_was():
    weight, counts = torch.ones(3), {"seconds": {"short": 1.0}}
    state = checkpoint.snapshot({"state_dict": {"a": weight}, "metrics": counts, "norms": [1, 2]})
    weight.add_(1)
    counts["seconds"]["full"] = 2.0
    assert state["state_dict"]["a"].tolist() == [1, 1, 1]
    assert state["metrics"] == {"seconds": {"short": 1.0}} and state["norms"] == [1, 2]
