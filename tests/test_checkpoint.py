"""Checkpoints: exact resume, kills and damage, what is kept and refused, open_clip's reading."""

import math
import os
import random
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from configs import changed
from torch import nn

from training import checkpoint
from training.checkpoint import (
    check_matches,
    checkpoints,
    latest,
    load,
    pack_state,
    restore,
    rng_state,
    save,
    set_aside,
    set_rng_state,
    weights,
)
from training.config import Config, Stage, flat
from training.distributed import World
from training.optim import adamw, set_learning_rate
from training.run import Run, StopSignal

ROOT = Path(__file__).parent.parent
CONFIG = changed(
    Config(stages={"short": Stage(lr=0.1, steps=10), "full": Stage(steps=2)}),
    model__size="demo",
    model__dialect="openai",
)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = adamw(model, CONFIG)
    set_learning_rate(optimizer, 0, CONFIG.stages["short"])
    return optimizer


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def state_at(step: int, stage: str = "short", **more: object) -> dict:
    """A small state that says which step it is of."""
    model = build(seed=step)
    return pack_state(model, adam(model), CONFIG, stage, step=step, **more)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(16, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    at = whole.index(load(path)["state_dict"]["0.weight"].numpy().tobytes())
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]  # in a weight
    broken = {"half": whole[: len(whole) // 2], "empty": b"", "text": b"not found"}
    path.write_bytes((broken | {"flipped": flipped})[how])


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def test_resume_repeats_the_losses(tmp_path):
    model = build()
    optimizer = adam(model)
    train(model, optimizer, 3)
    packed = pack_state(
        model, optimizer, CONFIG, "short", step=3, tokenizer="{}", metrics={"top1": [0.5]}
    )
    save(tmp_path, packed, 3)
    expected = train(model, optimizer, 4)

    state = latest(tmp_path)
    assert (state["step"], state["stage"], state["tokenizer"]) == (3, "short", "{}")
    assert state["metrics"] == {"top1": [0.5]}
    other = build(seed=9)
    optimizer = adam(other)
    assert restore(state, other, optimizer) == 3
    assert train(other, optimizer, 4) == expected


def test_no_checkpoint_is_none(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "missing") is None


@pytest.mark.parametrize("how", ["half", "empty", "text", "flipped"])
def test_broken_newest_is_skipped_with_a_warning(how, tmp_path):
    save(tmp_path, state_at(1), 1)
    damage(save(tmp_path, state_at(2), 2), how)
    with pytest.warns(UserWarning, match=r"1-short-00000002\.pt must be a whole checkpoint, got"):
        assert latest(tmp_path)["step"] == 1


def test_some_checkpoints_stay_for_good(tmp_path):
    for step in range(1, 12):
        save(tmp_path, state_at(step), step, keep=2, keep_every=4)
    assert names(tmp_path) == [f"1-short-{step:08d}.pt" for step in (4, 8, 10, 11)]
    save(tmp_path, state_at(1, "full"), 1, keep=2, keep_every=4)
    kept = [f"1-short-{step:08d}.pt" for step in (4, 8, 11)]
    assert names(tmp_path) == [*kept, "2-full-00000001.pt"]


def test_a_checkpoint_is_due_by_steps_and_by_minutes(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("training.run.time.monotonic", lambda: now[0])
    config = changed(CONFIG, run__save_every=10, run__save_minutes=2.0, run__keep_every=7)
    run = Run(config, World(0, 0, 1, torch.device("cpu")), StopSignal(), None, None, None, {})
    assert [done for done in range(1, 22) if run.due(done, True)] == [7, 10, 14, 20, 21]
    now[0] += 121
    assert run.due(3, True) and not run.due(3, False)
    run.saved = now[0]
    assert not run.due(3, True)
    run.config = changed(config, run__save_minutes=0.0)
    now[0] += 1e6
    assert not run.due(3, True)


def test_all_broken_does_not_start_over(tmp_path):
    for path in [save(tmp_path, state_at(step), step) for step in (1, 2)]:
        damage(path, "half")
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(RuntimeError, match="one of the 2 checkpoints .* must be readable"),
    ):
        latest(tmp_path)


def test_keeps_the_last_of_each_stage(tmp_path):
    for step in range(1, 5):
        save(tmp_path, state_at(step), step, keep=2)
    assert names(tmp_path) == ["1-short-00000003.pt", "1-short-00000004.pt"]
    save(tmp_path, state_at(1, "full"), 1, keep=2)
    assert names(tmp_path) == ["1-short-00000004.pt", "2-full-00000001.pt"]
    assert latest(tmp_path)["stage"] == "full"


def test_broken_ones_do_not_push_out_good_ones(tmp_path):
    save(tmp_path, state_at(1), 1, keep=1)
    good = (tmp_path / "1-short-00000001.pt").read_bytes()
    damage(save(tmp_path, state_at(2), 2, keep=2), "half")
    save(tmp_path, state_at(3), 3, keep=2)
    assert names(tmp_path) == ["1-short-00000001.pt", "1-short-00000003.pt"]
    assert (tmp_path / "1-short-00000001.pt").read_bytes() == good


def test_failed_write_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    save(tmp_path, state_at(1), 1, keep=1)

    def disk_full(state, file):
        file.write(b"PK half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(
        RuntimeError, match=r"1-short-00000002\.pt must be writable, got .* No space"
    ):
        save(tmp_path, state_at(2), 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["1-short-00000001.pt"]


def test_save_refuses(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        save(tmp_path, state_at(1), 1, keep=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="must be writable"):
        save(tmp_path / "file", state_at(1), 1)


def test_what_is_not_finite_is_not_written(tmp_path):
    where = (str(tmp_path), "short")
    model = build()
    optimizer = adam(model)
    train(model, optimizer, 2)
    checkpoint.check_finite(model, optimizer, *where, 2)
    model[0].weight.data[1, 2] = math.nan
    with pytest.raises(RuntimeError, match=r"in 0\.weight at step 3 of .* no checkpoint was"):
        checkpoint.check_finite(model, optimizer, *where, 3)
    good = save(tmp_path, state_at(2), 2)
    with pytest.raises(RuntimeError, match=rf"the last good checkpoint is {good}"):
        checkpoint.check_finite(model, optimizer, *where, 3)
    model[0].weight.data[1, 2] = 0.0
    optimizer.state[model[2].bias]["exp_avg_sq"][0] = math.inf
    with pytest.raises(RuntimeError, match=r"in exp_avg_sq of 2\.bias at step 3"):
        checkpoint.check_finite(torch.compile(model), optimizer, *where, 3)


def test_newest_with_nan_is_skipped_with_a_warning(tmp_path):
    save(tmp_path, state_at(1), 1)
    state = state_at(2)
    state["state_dict"]["2.bias"][0] = math.nan
    path = save(tmp_path, state, 2)
    with pytest.raises(RuntimeError, match=r"must hold finite tensors, got another as 2\.bias"):
        load(path)
    with pytest.warns(UserWarning, match="skipped a broken checkpoint"):
        assert latest(tmp_path)["step"] == 1


def test_newest_with_nan_in_a_moment_is_skipped_too(tmp_path):
    model = build()
    optimizer = adam(model)
    train(model, optimizer, 2)
    save(tmp_path, pack_state(model, optimizer, CONFIG, "short", step=2), 2)
    optimizer.state[model[2].bias]["exp_avg"][0] = math.nan
    path = save(tmp_path, pack_state(model, optimizer, CONFIG, "short", step=3), 3)
    with pytest.raises(RuntimeError, match=r"must hold finite tensors, got another as exp_avg of"):
        load(path)
    with pytest.warns(UserWarning, match="skipped a broken checkpoint"):
        assert latest(tmp_path)["step"] == 2


def run_that_wrote(folder: Path, **change: object) -> Config:
    """The Config of a run, whose folder holds its checkpoint."""
    config = changed(CONFIG, run__output=str(folder), **change)
    model = build()
    save(folder, pack_state(model, adam(model), config, "short", step=5), 5)
    return config


CHANGES_NOTHING = {
    "preset": "clipa-v1-b16", "data__workers": 3, "stages__short__accumulate": 2,
    "stages__full__accumulate": 4, "run__eval_images": "right", "run__eval_shards": "right.tar",
    "run__device": "cpu", "run__compile": True, "run__impl": "torch", "run__threads": 2,
    "run__save_every": 7, "run__timeout": 9.0, "run__step_timeout": 8.0,
    "run__save_minutes": 1.0, "data__cache_gb": 7.0,
    "run__keep_every": 4, "run__watch": "wandb", "run__recompute": "mlp", "run__fit": "8GB",
    "run__shard": "full", "run__wire": "bf16", "run__profile": "1:2",
    "run__keep_checkpoints": 3, "run__eval_every": 3, "run__log_every": 9,
    "run__eval_classes": "names.txt", "run__eval_prompts": "a {}",
}  # fmt: skip
CHANGES_TRAINING = {
    "stages__short__lr": 0.2, "stages__short__steps": 11, "stages__short__batch_size": 64,
    "run__seed": 1, "run__precision": "bf16", "data__source": "b.tar", "augment__rotate": 3.0,
    "stages__full__context": 8, "optim__weight_decay": 0.3,
}  # fmt: skip


def test_flags_that_change_no_training_do_not_stop_a_resume(tmp_path):
    config = run_that_wrote(tmp_path, run__eval_images="wrong")
    world = World(0, 0, 1, torch.device("cpu"))
    assert checkpoint.find(changed(config, **CHANGES_NOTHING), world)["step"] == 5
    for field, value in CHANGES_TRAINING.items():
        with pytest.raises(ValueError, match=f"would change {field.replace('__', '.')}"):
            checkpoint.find(changed(config, **{field: value}), world)
    short = {"short": config.stages["short"]}
    for stages in ({**config.stages, "high": Stage()}, short):
        words = re.escape(f"would change stages ['short', 'full'] to {list(stages)!r};")
        with pytest.raises(ValueError, match=words):
            checkpoint.find(changed(config, stages=stages), world)
    free = {name for name in flat(config) if checkpoint._FREE.fullmatch(name)}
    asked = {name.replace("__", ".") for name in CHANGES_NOTHING}
    assert free == {*asked, "config", "run.output", "run.resume"}


def test_a_changed_run_keeps_what_its_checkpoints_are_counted_by(tmp_path):
    """Named by --resume, a run may change; not the place of its stage, nor to fewer steps."""
    config = run_that_wrote(tmp_path)
    save(tmp_path, state_at(6), 6)
    world, path = World(0, 0, 1, torch.device("cpu")), str(tmp_path / "1-short-00000005.pt")
    config = changed(config, run__resume=path)
    turned = dict(reversed(config.stages.items()))
    for change, words in (
        ({"stages": turned}, "its stage short must be number 2 as in this run, got number 1"),
        ({"stages__short__steps": 4}, r"step must be in \[0, 4\], the steps of stage short, got 5"),
    ):
        with pytest.raises(ValueError, match=words):
            checkpoint.find(changed(config, **change), world)
    assert len(names(tmp_path)) == 2  # nothing is moved before all is right
    more = changed(config, stages={**config.stages, "high": Stage()})
    assert checkpoint.find(more, world)["step"] == 5
    assert names(tmp_path) == ["1-short-00000005.pt"]


def test_checkpoints_of_other_names_are_not_passed_over(tmp_path):
    save(tmp_path, state_at(1), 1).rename(tmp_path / "short-00000001.pt")
    with pytest.raises(
        RuntimeError, match=r"must be named .*, got short-00000001\.pt; take another"
    ):
        latest(tmp_path)
    save(tmp_path, state_at(2), 2)
    assert latest(tmp_path)["step"] == 2


@pytest.mark.parametrize("key", ["optimizer", "rng"])
def test_restore_refuses_what_others_wrote(key):
    model = build()
    with pytest.raises(ValueError, match="its optimizer and rng must be this run's, got KeyError"):
        restore(state_at(1) | {key: {}}, model, adam(model))


def test_restore_refuses_moments_of_another_shape():
    model = build()
    optimizer = adam(model)
    train(model, optimizer, 2)
    state = pack_state(model, optimizer, CONFIG, "short", step=2)
    state["optimizer"]["state"][0]["exp_avg"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"exp_avg must have shape \(.*\), got \(3,\)"):
        restore(state, build(), adam(model))


KILLED = """
import io, sys, time, torch
from training.checkpoint import save
state = {"state_dict": {"weight": torch.ones(1000)}, "optimizer": {}, "stage": "short", "step": 1}
state |= {"config": "{}", "rng": {}, "epoch": 0}
save(sys.argv[1], state, 1, keep=1)
write = torch.save
def half(state, file):
    whole = io.BytesIO()
    write(state, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    print("half written", flush=True)
    time.sleep(60)
torch.save = half
save(sys.argv[1], state | {"step": 2}, int(sys.argv[2]), keep=1)
"""


@pytest.mark.parametrize("step", [1, 2], ids=["over-the-old", "beside-the-old"])
def test_kill_9_while_writing_leaves_the_old_one(step, tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(step)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "half written\n"
        child.kill()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = latest(tmp_path)
    assert state["step"] == 1
    save(tmp_path, state_at(3), 3)
    assert not list(tmp_path.glob(".*"))  # the killed write's leftover is gone


def test_load_refuses(tmp_path):
    with pytest.raises(ValueError, match="path must be a checkpoint file, got .*none.pt"):
        load(tmp_path / "none.pt")
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"must hold config, .* got only epoch, state_dict"):
        load(tmp_path / "other.pt")
    weights = {f"layer{i}": torch.zeros(1) for i in range(20)}
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"must hold config, .* got only layer0, .*") as error:
        load(tmp_path / "weights.pt")
    assert len(str(error.value)) < 300 + len(str(tmp_path))
    torch.save(state_at(1) | {"step": "5"}, tmp_path / "step.pt")
    with pytest.raises(ValueError, match="must hold step, got"):
        load(tmp_path / "step.pt")
    torch.save(state_at(1) | {"state_dict": {"a": 1}}, tmp_path / "numbers.pt")
    with pytest.raises(RuntimeError, match="must hold finite tensors, got another as a"):
        load(tmp_path / "numbers.pt")
    torch.save(state_at(1) | {"state_dict": {3: torch.zeros(1)}}, tmp_path / "numbered.pt")
    with pytest.raises(RuntimeError, match="must hold finite tensors, got another as 3"):
        load(tmp_path / "numbered.pt")
    torch.save(state_at(1) | {"metrics": 3}, tmp_path / "metrics.pt")
    with pytest.raises(ValueError, match="must hold metrics, got"):
        load(tmp_path / "metrics.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(RuntimeError, match=r"must be a whole checkpoint, got [^.\n]*$"):
        load(tmp_path / "module.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"must hold config, .* got only list"):
        load(tmp_path / "list.pt")


def test_load_runs_no_code_of_the_file(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harmed",)

    torch.save({"state_dict": Harm()}, tmp_path / "harm.pt")
    with pytest.raises(RuntimeError, match="must be a whole checkpoint"):
        load(tmp_path / "harm.pt")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped(prefix):
    state = state_at(1)
    want = dict(state["state_dict"])
    state["state_dict"] = {prefix + name: tensor for name, tensor in want.items()}
    assert weights(state).keys() == want.keys()
    restore(state, build(seed=5))


def test_compiled_model_is_saved_without_prefix():
    model = build()
    packed = pack_state(torch.compile(model), adam(model), CONFIG, "short", step=0)
    assert packed["state_dict"].keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model__size": "B"}, "model.size must be 'B' as in this run, got 'demo'"),
        ({"model__dialect": "clipa-v2"}, "dialect must be 'clipa-v2' .* got 'openai'"),
        ({"model__patch_size": 4}, "patch_size must be 4 .* got 8"),
        ({"data__vocab_size": 9}, "vocab_size must be 9 .* got 2000"),
    ],
    ids=["size", "dialect", "patch", "vocabulary"],
)
def test_checkpoint_of_another_model_by_config(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_matches(state_at(1), changed(CONFIG, **change))


def test_checkpoint_of_another_model_by_its_tensors():
    state = state_at(1)
    check_matches(state, CONFIG, build())
    wider = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"2\.weight must have shape \(3, 8\), got \(2, 8\)"):
        check_matches(state, CONFIG, wider)
    with pytest.raises(ValueError, match=r"must hold 3\.weight, got one without it"):
        check_matches(state, CONFIG, build().append(nn.LayerNorm(2, bias=False)))
    with pytest.raises(ValueError, match=r"must not hold 1\.bias, got one with it"):
        check_matches(state, CONFIG, nn.Sequential(nn.Linear(4, 8), nn.Identity(), wider[2]))


def test_checkpoint_of_another_stage():
    state = state_at(1, "full")
    check_matches(state, CONFIG)
    with pytest.raises(ValueError, match="stage must be short, got 'full'"):
        check_matches(state, CONFIG, stage="short")
    with pytest.raises(ValueError, match="stage must be short, got 'full'"):
        check_matches(state, changed(CONFIG, stages__full__steps=0))


def test_rng_state_covers_python_numpy_and_torch(tmp_path):
    torch.save(rng_state(), tmp_path / "rng.pt")
    first = (random.random(), np.random.rand(), torch.rand(1).item())
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first


def test_set_aside_moves_the_abandoned_run(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, state_at(step), step, keep=3)
    assert set_aside(tmp_path, after=tmp_path / "1-short-00000003.pt") is None
    monkeypatch.chdir(tmp_path)
    moved = set_aside(tmp_path, after="1-short-00000001.pt")  # the same file by another path
    assert names(tmp_path) == ["1-short-00000001.pt"]
    assert names(moved) == ["1-short-00000002.pt", "1-short-00000003.pt"]
    again = set_aside(tmp_path)
    assert again != moved and names(again) == ["1-short-00000001.pt"] and latest(tmp_path) is None
    assert set_aside(tmp_path) is None


def test_open_clip_reads_the_weights(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    def tiny(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        vision = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
        text = CLIPTextCfg(context_length=4, vocab_size=20, width=32, heads=2, layers=1)
        return CLIP(16, vision, text)

    ours, theirs = tiny(0), tiny(1)
    path = save(tmp_path, pack_state(ours, adam(ours), CONFIG, "short", step=1), 1)
    open_clip.load_checkpoint(theirs, str(path))
    for name, tensor in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_stop_signal_sets_a_flag(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop and stop.name == name
    assert signal.getsignal(number) == before


def test_second_interrupt_interrupts():
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop
        signal.raise_signal(signal.SIGINT)


def test_file_names_sort_by_stage_then_step(tmp_path):
    for name in ("2-full-00000001.pt", "1-short-00000020.pt", "10-a_b-00000001.pt",
                 "1-short-00000003.pt", "x.pt", "short-00000001.pt"):  # fmt: skip
        (tmp_path / name).write_text("")
    assert [re.sub("0{2,}", "", name) for name in names(tmp_path)] == [
        "1-short-3.pt", "1-short-20.pt", "2-full-1.pt", "10-a_b-1.pt",
    ]  # fmt: skip
