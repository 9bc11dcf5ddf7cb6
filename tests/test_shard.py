"""States in parts: the losses of one process, files that fit every kind, the program's run."""

import itertools
import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from configs import changed
from test_train import finish, losses, start

import train
from data.batches import Batch
from training import checkpoint
from training.build import build_model
from training.config import Config, Stage
from training.distributed import World, wrap
from training.optim import adamw
from training.run import Run
from training.shard import blocks, shard, unsharded

KINDS = ("none", "optimizer", "full")
STEPS, SAVED = 20, 10
CONFIG = changed(
    Config(stages={"short": Stage(steps=STEPS, batch_size=16, context=8, warmup=2)}),
    model__size="demo", data__vocab_size=301, run__precision="fp32",
)  # fmt: skip
CASES = {
    "plain": {},
    "parts": {"stages__short__accumulate": 2, "optim__loss": "sigmoid", "optim__clip_norm": 0.5,
              "model__init_scale": 10.0, "stages__short__pos_embed": "sincos-moco"},
    "moment": {"stages__short__accumulate": 2, "optim__moment": "bf16"},
    "half": {"stages__short__accumulate": 2, "run__precision": "bf16"},
}  # fmt: skip
CONFIGS = {name: changed(CONFIG, **change) for name, change in CASES.items()}
PLAIN = list(itertools.product(["plain"], KINDS))
PARTS = [("parts", "optimizer"), ("parts", "full"), ("half", "none"), ("half", "full")]
PARTS += [("moment", "full")]
RUNS = {2: PLAIN + PARTS, 4: PLAIN}  # by number of processes


def batch_of(step, world):
    """This process's rows of a batch of noise."""
    draw = torch.Generator().manual_seed(step)
    images = torch.randint(256, (16, 16, 16, 3), dtype=torch.uint8, generator=draw)
    lengths = torch.randint(1, 9, (16,), generator=draw)
    ids = torch.randint(301, (16, 8), generator=draw)
    rows = 16 // world.size
    own = slice(world.rank * rows, (world.rank + 1) * rows)
    ends = torch.cat([torch.zeros(1), lengths[own].cumsum(0)]).int()
    packed = torch.cat([row[:n] for row, n in zip(ids[own], lengths[own], strict=True)])
    return Batch(images[own], packed, ends, 8, first_sample=step * 16 + own.start, skipped=0)


def steps_of(config, kind, world, saved=None, folder=None, steps=STEPS):
    """Losses from a checkpoint on, or from fresh weights; one is written at SAVED."""
    config = changed(config, run__shard=kind, run__output=str(folder))
    torch.manual_seed(0)
    model = build_model(config, "short")
    shard(model, world, kind)
    optimizer = adamw(model, config)
    done = checkpoint.restore(checkpoint.load(saved), model, optimizer) if saved else 0
    run = Run(config, world, None, None, Words(), None, {})
    wrapped, told = wrap(model, world), []
    for step in range(done, steps):
        batch = batch_of(step, world)
        values = train.train_step(wrapped, optimizer, batch, step, config, "short", world)
        told.append((world.mean(values["loss"]).item(), values["grad_norm"].item()))
        if step + 1 == SAVED and folder:
            run.save("short", model, optimizer, SAVED)  # read when all steps are done
    held = sum(p.to_local().numel() if kind != "none" and world.size > 1 and p.dim() else p.numel()
               for p in model.parameters())  # fmt: skip
    whole = unsharded(model, lambda: build_model(config, "short"))
    return {"told": told, "held": held, "whole": sum(p.numel() for p in whole.parameters())}


class Words:
    """A tokenizer that no test asks."""

    end, vocab_size = 1, 2

    def to_json(self):
        return "{}"


def work(rank, size, folder, saved):
    """RUNS from their start; or from each of the checkpoints, in every kind."""
    torch.set_num_threads(1)
    store = f"file://{folder / f'store{size}{bool(saved)}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    world, out = World(rank, rank, size, torch.device("cpu")), {}
    for case, kind in [] if saved else RUNS[size]:
        place = folder / f"{case}-{kind}-{size}"
        place.mkdir(exist_ok=True)
        out[place.name] = steps_of(CONFIGS[case], kind, world, folder=place)
    for path, kind in itertools.product(saved or [], KINDS):
        config = CONFIGS[path.parent.name.split("-")[0]]
        out[f"{path.parent.name} {kind}"] = steps_of(config, kind, world, path, steps=SAVED + 3)
    if rank == 0:
        (folder / f"{size}{bool(saved)}.json").write_text(json.dumps(out))
    dist.barrier()
    dist.destroy_process_group()


def ranks(size, folder, saved=None):
    mp.get_context("forkserver").set_forkserver_preload(["torch", "train"])
    mp.start_processes(work, (size, folder, saved), nprocs=size, start_method="forkserver")
    return json.loads((folder / f"{size}{bool(saved)}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shard")


@pytest.fixture(scope="module")
def one():
    """(loss, norm of the gradient) of each step on one process."""
    world = World(0, 0, 1, torch.device("cpu"))
    return {
        case: steps_of(CONFIGS[case], "none", world)["told"]
        for case in ("plain", "parts", "moment")
    }


@pytest.fixture(scope="module")
def many(folder):
    return ranks(2, folder) | ranks(4, folder)


def same(told, expected, case="plain"):
    """Equal to fp32's rounding, which a moment's own rounding to bf16 makes larger."""
    near = 1e-3 if case == "moment" else 1e-4
    for values in zip(told, expected, strict=True):
        assert values[0] == pytest.approx(values[1], rel=near), values


@pytest.mark.parametrize(
    ("case", "kind", "size"),
    [(*run, size) for size, runs in RUNS.items() for run in runs if run[0] != "half"],
)
def test_losses_are_those_of_one_process(case, kind, size, one, many):
    out = many[f"{case}-{kind}-{size}"]
    same(out["told"], one[case], case)
    most = 1.0 if kind == "none" else 1.1 / size
    assert out["held"] <= most * out["whole"]


def test_parts_of_a_batch_in_bf16(many):
    """The first gradient is DDP's: a cast that parts shared would lose some of it."""
    same(many["half-full-2"]["told"][:1], many["half-none-2"]["told"][:1])


def test_a_checkpoint_of_one_loads_into_every_other(one, many, folder):
    """Into each kind on two processes, and into one; each file is what one process writes."""
    written = ("plain-none-2", "plain-optimizer-2", "plain-full-4", "parts-full-2", "moment-full-2")
    paths = [folder / name / f"1-short-{SAVED:08}.pt" for name in written]
    for name, out in ranks(2, folder, paths).items():
        case = name.split("-")[0]
        same(out["told"], one[case][SAVED : SAVED + 3], case)
    world = World(0, 0, 1, torch.device("cpu"))
    first = checkpoint.load(paths[0])
    for path in paths:
        case = path.parent.name.split("-")[0]
        told = steps_of(CONFIGS[case], "none", world, path, steps=SAVED + 3)["told"]
        same(told, one[case][SAVED : SAVED + 3], case)
        if case == "plain":
            state = checkpoint.load(path)
            for part in ("state_dict", "optimizer"):
                torch.testing.assert_close(state[part], first[part], rtol=1e-2, atol=1e-4)


def test_open_clip_reads_a_model_that_lay_in_parts(many, folder):
    open_clip = pytest.importorskip("open_clip")
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=4, width=128, head_width=64, patch_size=8, image_size=16)
    text = CLIPTextCfg(context_length=8, vocab_size=301, width=128, heads=2, layers=2)
    theirs = CLIP(128, vision, text)
    (path,) = (folder / "plain-full-4").glob("*.pt")
    open_clip.load_checkpoint(theirs, str(path))
    for name, tensor in checkpoint.load(path)["state_dict"].items():
        assert torch.equal(theirs.state_dict()[name], tensor), name


def test_one_process_keeps_all():
    model = build_model(CONFIG, "short")
    before = list(model.parameters())
    shard(model, World(0, 0, 1, torch.device("cpu")), "full")
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert len(blocks(model)) == 6


def test_a_run_in_parts_goes_on_in_one_process(tmp_path):
    """Two stages, each evaluated; then the last one again, from a file of the parts."""
    few = dict(stages__short__steps=4, stages__full__steps=4, run__save_every=2)
    finish(start(tmp_path / "one", **few))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finish(start(tmp_path / "parts", *torchrun, run__shard="full", **few))
    for once in range(2):
        ours, theirs = losses(tmp_path / "parts"), losses(tmp_path / "one")
        assert ours.keys() == theirs.keys()
        for key, loss in theirs.items():
            assert ours[key] == pytest.approx(loss, rel=1e-5), key
        figures = [json.loads((tmp_path / name / "results.json").read_text())["stages"]
                   for name in ("parts", "one")]  # fmt: skip
        for stage in ("short", "full"):
            ours, theirs = (each[stage]["held-out drawings"] for each in figures)
            assert ours == pytest.approx(theirs, abs=0.01)
        if not once:
            (tmp_path / "parts" / "2-full-00000004.pt").unlink()
            assert "resumed at step 2 of stage full" in finish(start(tmp_path / "parts", **few))
