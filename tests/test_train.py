"""The program: a whole run, a kill and a resume, several processes, parts of a batch, bad input."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from configs import changed
from PIL import Image

import evaluate
import train
from data.augment import sample_draws
from data.emoji import load_emoji
from data.images import decode_crop, decode_square
from data.text import Tokenizer, train_wordpiece
from models import DIALECTS
from training import checkpoint
from training.build import build_model, open_batches, open_data
from training.config import from_json, parse, preset
from training.distributed import World
from training.evaluation import Encoder, evaluate_folder, evaluate_shards
from training.optim import adamw

ROOT = Path(__file__).parents[1]
# A run of seconds: 12 steps of few tokens with masks, 6 of all tokens.
SMALL = {
    "model": "demo",
    "stages__short__image_size": 32,
    "stages__short__image_mask": "random",
    "stages__short__image_drop": 0.75,
    "stages__short__steps": 12,
    "stages__short__warmup": 2,
    "stages__short__batch_size": 32,
    "stages__short__lr": 1e-3,
    "stages__full__steps": 6,
    "stages__full__batch_size": 32,
    "stages__full__warmup": 1,
    "stages__full__image_size": 32,
    "run__save_every": 4,
    "run__log_every": 1,
    "run__precision": "fp32",
    "run__threads": 1,
    "device": "cpu",
}


def flags(folder, **change):
    values = SMALL | {"output": str(folder)} | change
    return [
        word
        for name, value in values.items()
        for word in (f"--{name.replace('__', '.').replace('_', '-')}", str(value))
    ]


def start(folder, *launcher, **change):
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, "train.py", *flags(folder, **change)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def rows(folder):
    path = Path(folder) / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(folder):
    return {(row["stage"], row["step"]): row["loss"] for row in rows(folder)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, finish(start(folder))


def test_a_run_leaves_log_results_picture_and_checkpoints(whole):
    folder, out = whole
    log = rows(folder)
    assert [(r["stage"], r["step"]) for r in log] == [
        *(("short", i) for i in range(1, 13)),
        *(("full", i) for i in range(1, 7)),
    ]
    for key in ("loss", "lr", "scale", "samples_per_s", "tokens_per_s", "data_wait"):
        assert all(isinstance(row[key], float) for row in log), key
    results = json.loads((folder / "results.json").read_text())
    assert {"short", "full"} <= results["seconds"].keys()
    for stage in ("short", "full"):
        splits = results["stages"][stage]
        assert splits["held-out drawings"]["n"] == 382
        for name in ("held-out drawings: twemoji", "held-out drawings: openmoji"):
            assert splits[name]["chance"] == 1 / 191
        for figures in splits.values():
            keys = ("top1", "top5", "text_to_image_r1", "image_to_text_r5")
            assert all(0 <= figures[key] <= 1 for key in keys)
            assert figures["top1"] <= figures["top5"]
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in checkpoint.checkpoints(folder)] == [
        "1-short-00000012.pt",
        "2-full-00000004.pt",
        "2-full-00000006.pt",
    ]
    assert "held-out drawings" in out and str(folder) in out.splitlines()[-1]


def test_a_finished_run_is_not_trained_again(whole):
    folder, _ = whole
    before = losses(folder)
    out = finish(start(folder))
    assert "resumed at step 6 of stage full" in out and losses(folder) == before


@pytest.mark.parametrize("at", [("short", 6), ("full", 5)], ids=["short", "full"])
def test_killed_and_resumed_gives_the_same_losses(whole, tmp_path, at):
    process = start(tmp_path)
    deadline = time.monotonic() + 200
    while at not in losses(tmp_path) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()  # SIGKILL
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stdout.read()
    finish(start(tmp_path))
    assert losses(tmp_path) == losses(whole[0])


def test_sigterm_saves_and_the_next_run_goes_on(whole, tmp_path):
    process = start(tmp_path, run__save_every=1000)
    deadline = time.monotonic() + 200
    while not losses(tmp_path) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    out = finish(process)
    assert "SIGTERM: saved at step" in out
    finish(start(tmp_path, run__save_every=1000))
    assert losses(tmp_path) == losses(whole[0])


def test_two_processes_give_the_losses_of_one(whole, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finish(
        start(tmp_path, *torchrun, stages__short__accumulate=2)
    )  # parts of a batch as well, in one stage
    ours, one = losses(tmp_path), losses(whole[0])
    assert ours.keys() == one.keys()
    for key, loss in one.items():
        assert ours[key] == pytest.approx(loss, rel=2e-4), key


def steps_of(config, count):
    """Losses and final weights of a few steps of the first stage in this process."""
    world = World(0, 0, 1, torch.device("cpu"))
    pairs = load_emoji()
    tokenizer = Tokenizer(train_wordpiece(pairs.training_captions(), 500))
    torch.manual_seed(0)
    model = build_model(config, "short", tokenizer.vocab_size)
    optimizer = adamw(model, config)
    batches = open_batches(config, "short", pairs, tokenizer, world)
    out = [
        train.train_step(model, optimizer, batches.batch(step), step, config, "short", world)
        for step in range(count)
    ]
    return [values["loss"].item() for values in out], model.state_dict()


def demo(**change):
    """The demo, a batch of 16 in its first stage."""
    first = {"stages__short__batch_size": 16, "stages__short__warmup": 1}
    return changed(preset("emoji"), **first | {"run__precision": "fp32"} | change)


@pytest.mark.parametrize("mask", ["random", "grid", "block", "none"])
def test_parts_of_a_batch_equal_the_whole(mask):
    drop = 0.5 if mask in ("random", "block") else 0.0
    values = dict(batch_size=24, image_size=32, image_mask=mask, image_drop=drop, warmup=1)
    config = demo(**{f"stages__short__{name}": value for name, value in values.items()})
    losses, weights = steps_of(config, 3)
    in_parts, same = steps_of(changed(config, stages__short__accumulate=3), 3)
    assert in_parts == pytest.approx(losses, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(same[name], value, rtol=1e-3, atol=2e-4, msg=name)


def test_sigmoid_loss_and_bf16_train():
    sigmoid = dict(optim__loss="sigmoid", model__init_scale=10.0, run__precision="bf16")
    out, weights = steps_of(demo(**sigmoid), 12)
    assert out[-1] < out[0] and torch.isfinite(weights["logit_bias"])
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_v2_dialect_trains_on_padded_text():
    config = demo(model__dialect="clipa-v2", stages__short__pos_embed="sincos-moco")
    world = World(0, 0, 1, torch.device("cpu"))
    pairs, tokenizer = open_data(config, None, world)
    batch = next(iter(open_batches(config, "short", pairs, tokenizer, world)))
    assert len(batch.ids) == 16 * config.stages["short"].context
    model = build_model(config, "short", tokenizer.vocab_size)
    values = train.train_step(model, adamw(model, config), batch, 0, config, "short", world)
    assert torch.isfinite(values["loss"])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dialect_says_how_pictures_are_resized(dialect, tmp_path):
    """CLIPA v1 and open_clip: bicubic crops, evaluated in the centre; v2: bilinear and squashed."""
    noise = torch.randint(256, (48, 96, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    picture = io.BytesIO()
    Image.fromarray(noise.numpy()).save(picture, "PNG")
    picture = picture.getvalue()
    path = pack(tmp_path / "0.tar", {"0.png": picture, "0.txt": b"noise"})
    (tmp_path / "set" / "noise").mkdir(parents=True)
    (tmp_path / "set" / "noise" / "0.png").write_bytes(picture)
    config = demo(
        data__source=path, model__dialect=dialect, stages__short__batch_size=1, augment__blend=0.0,
        augment__scale=(0.4, 1.0), augment__rotate=0.0, augment__warp=0.0, augment__outline=0.0,
        augment__shift=0.0, augment__jitter=0.0, augment__mix=0.0,
    )  # fmt: skip
    v2 = dialect.startswith("clipa-v2")
    how = dict(interpolation="bilinear" if v2 else "bicubic")
    world = World(0, 0, 1, torch.device("cpu"))
    _, tokenizer = open_data(config, None, world)
    batch = open_batches(config, "short", None, tokenizer, world)[0]
    draws = sample_draws(1, seed=0, step=0)[0]
    crop = decode_crop(picture, 16, draws, config.augment, **how)
    assert torch.equal(batch.images[0], crop)

    model = build_model(config, "short", tokenizer.vocab_size).eval()
    encoder, seen = Encoder(model, tokenizer, torch.device("cpu")), []
    encoder.images = lambda images: seen.append(images) or torch.zeros(len(images), model.embed_dim)
    evaluate_folder(encoder, tmp_path / "set")
    evaluate_shards(encoder, path)
    square = decode_square(picture, 16, squash=v2, **how)
    assert all(torch.equal(images[0], square) for images in seen) and len(seen) == 2


def main_says(tmp_path, **change):
    with pytest.raises(SystemExit) as stop:
        train.main(flags(tmp_path / "run", **change))
    return str(stop.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"stages__short__image_size": 20},
            "stages.short.image_size must be a multiple of patch_size 8, got 20",
        ),
        (
            {"stages__short__batch_size": 0},
            "stages.short.batch_size must be in [1, 1048576], got 0",
        ),
        ({"stages__short__steps": -1}, "stages.short.steps must be in [0, 1e9], got -1"),
        ({"stages__short__steps": 0, "stages__full__steps": 0}, "must have steps, got none"),
        ({"device": "cuda:7"}, "cuda"),
        (
            {"data__vocab_size": 300, "data__tokenizer": "clip"},
            "tokenizer's 49408 entries, got 300",
        ),
        ({"data": "nothing/{0..1}.tar"}, "must name files that are there"),
        ({"resume": "no-such.pt"}, "resume must be"),
    ],
    ids=["patches", "batch", "steps", "no-stage", "device", "vocabulary", "shards", "resume"],
)
def test_bad_flags_end_with_a_sentence(tmp_path, change, words):
    assert words in main_says(tmp_path, **change)


def pack(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """Eight pairs in a tar."""
    files = {}
    for i in range(8):
        picture = io.BytesIO()
        Image.new("RGB", (16, 16), (30 * i, 90, 10)).save(picture, "PNG")
        files |= {f"{i}.png": picture.getvalue(), f"{i}.txt": f"boat {i}".encode()}
    return pack(tmp_path_factory.mktemp("pairs") / "0.tar", files)


def on_shards(shard, folder, **change):
    """Flags of a run of two seconds in this process."""
    few = dict(image_size=16, image_mask="none", image_drop=0.0, batch_size=8, steps=4, warmup=1)
    few = {f"stages__short__{name}": value for name, value in few.items()}
    few |= dict(data=shard, data__vocab_size=200, stages__full__steps=0)
    return flags(folder, **few | change)


LATE = {
    "no folder": dict(run__eval_images="{}/none"),
    "no picture": dict(run__eval_images="{}"),
    "no shard": dict(run__eval_shards="{}/none.tar"),
    "no tar": dict(run__eval_shards="{}/folder/broken.png"),
    "no room for text": dict(
        stages__full__steps=1, stages__full__warmup=0, stages__full__context=2, start=True
    ),
    "no triton": dict(impl="triton"),
}


@pytest.mark.parametrize("change", LATE.values(), ids=LATE)
def test_what_comes_after_training_is_asked_before(shard, tmp_path, change, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "broken.png").write_bytes(b"no picture")
    change = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in change.items()}
    if change.pop("start", False):  # a tokenizer whose two special tokens leave no room
        words = Tokenizer(train_wordpiece(["a boat"], 100, start=True))
        words.save(tmp_path / "words.json")
        change["data__tokenizer"] = str(tmp_path / "words.json")
    with pytest.raises(SystemExit, match=r"^train\.py: \w+: "):
        train.main(on_shards(shard, tmp_path / "run", **change))
    assert not rows(tmp_path / "run") and not checkpoint.checkpoints(tmp_path / "run")


def test_an_evaluation_that_fails_costs_no_step(shard, tmp_path, monkeypatch):
    """The set vanishes while the run trains; the next one, with the path put right, evaluates."""
    for name in ("gone", "there"):
        (tmp_path / name / "boat").mkdir(parents=True)
        Image.new("RGB", (16, 16), "red").save(tmp_path / name / "boat" / "1.png")
    real = train.run_stage

    def then_delete(*arguments):
        done = real(*arguments)
        shutil.rmtree(tmp_path / "gone")
        return done

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="class folders, got"):
        patch.setattr(train, "run_stage", then_delete)
        train.main(on_shards(shard, tmp_path / "run", run__eval_images=str(tmp_path / "gone")))
    before = losses(tmp_path / "run")
    train.main(on_shards(shard, tmp_path / "run", run__eval_images=str(tmp_path / "there")))
    assert losses(tmp_path / "run") == before and len(before) == 4
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["stages"]["short"]["images: there"]["top1"] == 1.0
    # A finished run that is asked again evaluates what is asked for now; retrieval alone too.
    train.main(on_shards(shard, tmp_path / "run", run__eval_shards=shard))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["stages"]["short"].keys() == {"shards: 0.tar"}
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_stage_may_get_more_steps(shard, tmp_path):
    train.main(on_shards(shard, tmp_path, run__eval_shards=shard))
    (newest,) = checkpoint.checkpoints(tmp_path)
    more = dict(resume=str(newest), stages__short__steps=6, run__eval_shards=shard)
    results = tmp_path / "results.json"
    results.unlink()
    train.main(on_shards(shard, tmp_path, **more))
    assert len(losses(tmp_path)) == 6 and "short" in json.loads(results.read_text())["stages"]
    newest = checkpoint.load(checkpoint.checkpoints(tmp_path)[-1])
    assert newest["step"] == 6
    assert newest["metrics"]["stages"] == {}  # of stages before it alone: none is stale


def test_a_stage_that_a_checkpoints_config_lacks(shard, tmp_path):
    train.main(on_shards(shard, tmp_path, run__eval_shards=shard))
    state = checkpoint.load(checkpoint.checkpoints(tmp_path)[-1])
    torch.save(state | {"stage": "other"}, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match=r"^evaluate\.py: .* one of short, full, got 'other'"):
        evaluate.main([str(tmp_path / "other.pt")])


def test_weights_that_went_astray_leave_the_good_checkpoint(shard, tmp_path):
    change = dict(run__log_every=20, run__save_every=1, run__keep_checkpoints=1)
    change |= dict(stages__short__steps=20, stages__short__lr=100.0, optim__weight_decay=100.0)
    with pytest.raises(SystemExit, match="must be finite, got .* the last good checkpoint is"):
        train.main(on_shards(shard, tmp_path, **change))
    (kept,) = checkpoint.checkpoints(tmp_path)
    assert checkpoint.load(kept)["step"] > 0  # which refuses what is not finite


def test_broken_files_end_with_a_sentence(shard, tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    torch.save({"epoch": 1, "name": "b", "state_dict": {}, "optimizer": {}}, tmp_path / "theirs.pt")
    for name, says in (("broken", "must be a whole checkpoint"), ("theirs", "must hold config")):
        with pytest.raises(SystemExit, match=rf"^train\.py: load: .*{says}"):
            train.main(on_shards(shard, tmp_path / "run", resume=str(tmp_path / f"{name}.pt")))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "run").write_text("a file, not a folder")
    assert "output must be a folder that can be written" in main_says(tmp_path)


def test_another_runs_checkpoint_is_refused(whole, tmp_path):
    folder, _ = whole
    newest = str(checkpoint.checkpoints(folder)[-1])
    out = main_says(tmp_path, resume=newest, model="Ti")
    assert "model.size must be 'Ti' as in this run, got 'demo'" in out
    with pytest.raises(SystemExit, match="would change stages.short.lr 0.001 to 0.5"):
        train.main(flags(folder, stages__short__lr=0.5))


def test_a_half_written_checkpoint_is_skipped(whole, tmp_path):
    folder, _ = whole
    for path in checkpoint.checkpoints(folder):
        data = path.read_bytes()
        cut = path.name.startswith("2-full-00000006")
        (tmp_path / path.name).write_bytes(data[: len(data) // 2] if cut else data)
    (tmp_path / "log.jsonl").write_text((folder / "log.jsonl").read_text())
    out = finish(start(tmp_path))
    assert "skipped a broken checkpoint" in out and "resumed at step 4 of stage full" in out
    assert losses(tmp_path) == losses(folder)


def test_evaluate_gives_the_runs_figures(whole):
    folder, _ = whole
    out = subprocess.run(
        [sys.executable, "evaluate.py", str(folder), "--json", "--device", "cpu"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    ours = json.loads(out)["held-out drawings"]
    then = json.loads((folder / "results.json").read_text())["stages"]["full"]["held-out drawings"]
    assert ours == pytest.approx(then)


def test_config_of_a_checkpoint_is_the_runs(whole):
    folder, _ = whole
    state = checkpoint.latest(folder)
    assert state["stage"] == "full" and state["name"] == "emoji"
    assert (folder / "config.json").read_text() == state["config"]
    assert from_json(state["config"]) == parse(flags(folder))


def test_a_run_starts_from_the_config_that_another_saved(whole, tmp_path):
    """With a third stage written into it, at another size of images and of text."""
    values = json.loads((whole[0] / "config.json").read_text())
    short, full = values["stages"].values()
    third = full | dict(image_size=48, image_mask="random", image_drop=0.4, context=20, steps=2)
    values["stages"] = {"short": short | {"steps": 3}, "full": full | {"steps": 2}, "high": third}
    (tmp_path / "run.json").write_text(json.dumps(values))
    words = ["--config", str(tmp_path / "run.json"), "--output", str(tmp_path / "run")]
    train.main([*words, "--stages.high.lr", "2e-5"])
    log = rows(tmp_path / "run")
    assert [(r["stage"], r["step"]) for r in log] == [
        ("short", 1), ("short", 2), ("short", 3), ("full", 1), ("full", 2), ("high", 1), ("high", 2)
    ]  # fmt: skip
    assert log[-2]["lr"] == 2e-5
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == [
        "1-short-00000003.pt", "2-full-00000002.pt", "3-high-00000002.pt",
    ]  # fmt: skip
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["stages"]) == ["short", "full", "high"]
    table = checkpoint.latest(tmp_path / "run")["state_dict"]["visual.positional_embedding"]
    assert len(table) == 1 + 6 * 6

    # A finished run goes on where a stage is added after its last one, once that is asked for.
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    values["stages"]["last"] = values["stages"]["high"]
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(SystemExit, match=r"would change stages \[.*\] to \[.*'high', 'last'\];"):
        train.main(words)
    newest = str(checkpoint.checkpoints(tmp_path / "run")[-1])
    train.main([*words, "--resume", newest])
    assert losses(tmp_path / "run").keys() >= {("high", 2), ("last", 1), ("last", 2)}
    assert rows(tmp_path / "run")[: len(log)] == log
