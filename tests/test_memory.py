"""What a step keeps: counted before it runs, recomputed, computed in parts, made to fit."""

import json

import pytest
import torch
from configs import changed
from test_train import demo, flags, steps_of

import train
from data.batches import Batch
from training.build import build_model, to_device
from training.config import preset
from training.distributed import World, wrap
from training.memory import Live, Plan, bytes_in, fitted, planned, plans, step_bytes
from training.optim import adamw
from training.presets import PRESETS

CPU = torch.device("cpu")
ALONE = World(0, 0, 1, CPU)


def big(**change):
    how = {
        "stages__short__image_size": 32, "stages__short__context": 16, "run__precision": "fp32",
        "stages__short__image_mask": "random", "stages__short__image_drop": 0.5,
    }  # fmt: skip
    return demo(**how | change)


def id_of(tensor):
    return tensor.untyped_storage()._cdata


class Held:
    """The most bytes at a time, of what a graph has saved and not yet let go."""

    def __init__(self, model):
        own = (*model.parameters(), *model.buffers())
        self.own, self.live, self.now, self.most = {id_of(p) for p in own}, {}, 0, 0

    def pack(self, tensor):
        number = id_of(tensor)
        if number in self.own:
            return tensor
        held = self
        size = tensor.untyped_storage().nbytes()

        class Saved:
            def __init__(self):
                self.tensor = tensor
                count = held.live.get(number, 0)
                held.now += 0 if count else size
                held.live[number] = count + 1
                held.most = max(held.most, held.now)

            def __del__(self):
                held.live[number] -= 1
                held.now -= 0 if held.live[number] else size

        return Saved()

    def unpack(self, saved):
        return getattr(saved, "tensor", saved)


def measured(config, recompute="none") -> int:
    """Bytes that a real forward keeps, of captions that are all as long as can be."""
    sizes = config.stages["short"]
    model = build_model(config, "short").train()
    model.set_recompute(recompute)
    rows, context = sizes.batch_size // sizes.accumulate, sizes.context
    images = torch.randint(256, (rows, sizes.image_size, sizes.image_size, 3), dtype=torch.uint8)
    ends = torch.arange(0, (rows + 1) * context, context, dtype=torch.int32)
    ids = torch.randint(1, 400, (rows * context,))
    batch = Batch(images, ids, ends, context, 0, 0)
    given = to_device(batch, 0, config, "short", CPU)
    held = Held(model)
    with torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack):
        out = model(*given)
    kept = held.now
    del out
    return kept


def test_what_lives_is_counted():
    with Live() as live:
        one = torch.ones(1000)
        view, two = one.view(10, 100), one * 2
        assert live.now == 8000
        del two
        assert live.now == 4000
        del one
        assert live.now == 4000 and view.numel() == 1000
        del view
    assert (live.now, live.most) == (0, 8000)


@pytest.mark.parametrize("moment", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_what_is_planned_is_what_a_step_takes(recompute, accumulate, moment):
    """All of a step's bytes on the CPU, counted as they are made and let go: within a twentieth."""
    change = dict(stages__short__batch_size=64, stages__short__accumulate=accumulate)
    config = big(optim__moment=moment, **change)
    sizes = config.stages["short"]
    rows, context = sizes.batch_size, sizes.context
    model = build_model(config, "short").train()
    model.set_recompute(recompute)
    optimizer, wrapped = adamw(model, config), wrap(model, ALONE)
    live = Live()
    for tensor in (*model.parameters(), *model.buffers()):
        live.hold(tensor)
    with live:
        images = torch.zeros(2, rows, sizes.image_size, sizes.image_size, 3, dtype=torch.uint8)
        ends = torch.arange(0, (rows + 1) * context, context, dtype=torch.int32)
        batch = Batch(images[0], torch.randint(1, 400, (rows * context,)), ends, context, 0, 0)
        for step in range(2):  # the first one makes the moments
            train.train_step(wrapped, optimizer, batch, step, config, "short", ALONE)
    plan = planned(config, "short", Plan(recompute, accumulate, 0), ALONE)
    assert plan.bytes == pytest.approx(live.most, rel=0.05)


def test_recompute_and_parts_keep_a_quarter():
    """Of the big batch's bytes; and the losses are the same."""
    config = big(stages__short__batch_size=64)
    whole = measured(config)
    parts = measured(changed(config, stages__short__accumulate=8), "block")
    assert parts <= 0.25 * whole
    assert measured(config, "block") < 0.35 * whole < measured(config, "mlp") < 0.8 * whole


@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_recomputing_changes_no_loss(recompute, monkeypatch):
    config = big()
    plain, weights = steps_of(config, 2)

    def build(*words, **how):
        model = build_model(*words, **how)
        model.set_recompute(recompute)
        return model

    monkeypatch.setattr("test_train.build_model", build)
    again, same = steps_of(config, 2)
    assert again == plain
    assert all(torch.equal(value, same[name]) for name, value in weights.items())


def test_sizes_in_words():
    assert bytes_in("80GB") == bytes_in(" 80 gb ") == 80_000_000_000 and bytes_in("512MB") == 512e6
    for text in ("", "GB", "80XB", "0GB", "-3GB"):
        with pytest.raises(ValueError, match=r"run\.fit must be a size above 0, as 80GB"):
            bytes_in(text)


def test_a_stage_is_made_to_fit():
    config = big(stages__short__batch_size=64)
    every = [planned(config, "short", plan, ALONE) for plan in plans(config, "short", ALONE)]
    assert [plan[:2] for plan in every[:3]] == [("none", 1), ("mlp", 1), ("block", 1)]
    assert every[0].bytes > every[1].bytes > every[2].bytes > every[-1].bytes
    for want in (0, 1, 2, len(every) - 1):
        room = every[want].bytes
        sized = changed(config, run__fit=f"{room / 1e3 + 1:.0f}KB", stages__full__steps=0)
        found, kinds = fitted(sized, ALONE)
        assert (kinds["short"], found.stages["short"].accumulate) == every[want][:2]
    small = changed(config, run__fit="1MB", stages__full__steps=0)
    with pytest.raises(ValueError, match=r"run\.fit must hold stage short, got 1MB where"):
        fitted(small, ALONE)
    assert fitted(config, ALONE) == (config, {"short": "none", "full": "none"})


def test_states_in_parts_are_counted_in_parts():
    world = World(0, 0, 8, CPU)
    config = big(stages__short__batch_size=64)
    sizes = [
        planned(changed(config, run__shard=kind), "short", Plan("none", 1, 0), world).bytes
        for kind in ("none", "optimizer", "full")
    ]
    assert sizes[0] > sizes[1] > sizes[2] > 0


@pytest.mark.parametrize("name", PRESETS)
def test_every_recipe_is_built_without_memory(name):
    config = preset(name)
    for stage in config.running:
        with torch.device("meta"):
            model = build_model(config, stage)
        assert all(one.is_meta for one in model.parameters())


@pytest.mark.parametrize("stage", ["short", "full", "high"])
def test_the_papers_largest_model_is_counted_for_a_gpu(stage):
    """No GPU and no memory is needed to know what one takes."""
    config = changed(preset("clipa-v2-bigg14"), run__fit="80GB")
    world = World(0, 0, 512, torch.device("cuda"))
    counted = step_bytes(config, stage, 8, "none", world.device, "dropped")
    again = step_bytes(config, stage, 8, "block", world.device, "dropped")
    assert counted > 8 * again > 0


def test_a_run_that_is_made_to_fit(tmp_path, capsys):
    train.main(flags(tmp_path, run__fit="60MB", stages__short__steps=4))
    out = capsys.readouterr().out
    assert "stage short: recompute" in out and "GB" in out
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 10
