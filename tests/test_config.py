"""Flags, presets, stages and the sentences of a bad Config; the processes of a run."""

import doctest
import importlib
import math
import os
import re
import socket
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from configs import changed

from data.pairs import Captions
from training import config as config_module
from training import distributed
from training.config import (
    Config,
    DataPart,
    ModelPart,
    OptimPart,
    RunPart,
    Stage,
    flat,
    from_json,
    parse,
    preset,
    to_json,
    validate,
)
from training.presets import PRESETS


@pytest.fixture
def good(tmp_path) -> Config:
    """A valid Config whose numbers do not follow the demo's."""
    return changed(
        Config(), run__output=str(tmp_path / "run"), model__size="demo", stages__short__steps=2000,
        stages__short__warmup=100, stages__full__steps=200, stages__full__warmup=20,
    )  # fmt: skip


def spelled(name: str) -> str:
    """A flag's name as `changed` takes it."""
    return name.replace(".", "__")


@pytest.mark.parametrize(
    "module",
    ["checkpoint", "config", "distributed", "optim", "picture", "presets", "report", "run"],
)
def test_examples_in_docstrings(module):
    failed, _ = doctest.testmod(importlib.import_module(f"training.{module}"))
    assert failed == 0


def test_flags_set_fields():
    words = (
        "--stages.short.lr 3e-4 --run.compile --augment.scale 0.5 0.9 --stages.full.image-mask=grid"
    )
    assert parse(words.split()) == changed(
        preset("emoji"), stages__short__lr=3e-4, run__compile=True, augment__scale=(0.5, 0.9),
        stages__full__image_mask="grid",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("short", "long", "value"),
    [
        ("data", "data.source", "a.tar"),
        ("model", "model.size", "Ti"),
        ("output", "run.output", "there"),
        ("resume", "run.resume", "never"),
        ("device", "run.device", "cpu"),
        ("impl", "run.impl", "torch"),
        ("seed", "run.seed", "3"),
    ],
)
def test_what_everyone_types_is_short(short, long, value):
    config = parse([f"--{short}", value])
    assert str(flat(config)[long]) == value != str(flat(preset("emoji"))[long])
    assert config == parse([f"--{long}", value])


def test_no_flags_is_the_demo():
    assert parse([]) == preset("emoji")


def test_every_field_has_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    told = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    told = re.sub(r"\{.*?\}", "", told)  # the choices
    for name in flat(Config()):
        flag = re.escape(f"--{name.replace('_', '-')}")
        entry = re.search(rf"{flag}[ ,](?P<help>.*?)\(default:", told)
        assert re.search(r"\b[a-z]{2,}", entry["help"].replace("--no-", "")), flag


def test_a_stage_and_the_rest_stay_few():
    assert len(fields(Stage)) <= 12
    parts = (DataPart, ModelPart, OptimPart, RunPart)
    # And preset, config. The engine's choices (shards of states, memory, saving) came in later.
    assert 2 + sum(len(fields(part)) for part in parts) <= 60


@pytest.mark.parametrize("flags", [["--preset", "clipa-v2-h14"], ["--preset=clipa-v2-h14"]])
def test_flags_override_the_preset_wherever_it_stands(flags):
    config = parse(["--stages.short.lr", "1e-3", *flags, "--stages.high.context", "16"])
    recipe = preset("clipa-v2-h14")
    assert config == changed(recipe, stages__short__lr=1e-3, stages__high__context=16)
    assert recipe.model.size == "H" and recipe.stages["short"].text_mask == "syntax"


def test_flags_override_a_file(tmp_path):
    own = changed(preset("clipa-v1-b16"), stages={"one": Stage(steps=7), "two_b": Stage()})
    (tmp_path / "run.json").write_text(to_json(own))
    config = parse(["--stages.two-b.lr", "0.5", "--config", str(tmp_path / "run.json")])
    assert config == changed(own, stages__two_b__lr=0.5) and config.config == ""
    with pytest.raises(ValueError, match="--preset and --config must not come together"):
        parse(["--config", str(tmp_path / "run.json"), "--preset", "emoji"])
    with pytest.raises(ValueError, match="--config must be a file of a run's config, got 'none'"):
        parse(["--config", "none"])


def test_a_file_may_come_from_any_editor(tmp_path):
    own, path = changed(preset("emoji"), run__seed=3), tmp_path / "run.json"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(to_json(own), encoding=encoding)
        assert parse(["--config", str(path)]) == own
    path.write_bytes(b'{"run": {"output": "\xff"}}')
    with pytest.raises(ValueError, match=r"run\.json must be text in UTF-8, got bytes that are no"):
        parse(["--config", str(path)])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--stages.ful.lr", "1"], "--stages.full.lr"),
        (["--stages.full.warmups", "1"], "--stages.full.warmup"),
        (["--stages.short.lr", "fast"], "could not convert"),
        (["--lr", "1"], "--stages.short.lr"),
        (["--augment.rotate", "400"], "rotate must be in [0, 360], got 400"),
        (["--preset", "clip"], "clipa-v1-b16"),
        (["--stages.full.image-mask", "stripes"], "'grid'"),
        (["--stages.full.steps"], "Missing value"),
    ],
    ids=[
        "slip-of-a-letter",
        "letter-too-many",
        "not-a-number",
        "no-part",
        "augmentation",
        "preset",
        "choice",
        "no-value",
    ],
)
def test_bad_flags_end_with_a_sentence(flags, told, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flags)
    assert stop.value.code != 0
    assert told in "".join(capsys.readouterr())


def test_stages():
    a, b, c = Stage(steps=10), Stage(steps=0), Stage(steps=3)
    config = Config(stages={"a": a, "b": b, "c": c})
    assert config.running == ["a", "c"]
    assert [config.number(name) for name in "abc"] == [0, 1, 2]  # masks stay as they were
    assert [config.first_step(name) for name in "abc"] == [0, 10, 10]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name, tmp_path):
    config = preset(name)
    assert config.preset == name
    assert from_json(to_json(config)) == config
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n")
    if config.data.tokenizer.endswith(".txt"):
        config = changed(config, data__tokenizer=str(vocabulary))
    validate(changed(config, run__output=str(tmp_path)), world_size=8)


@pytest.mark.parametrize(
    ("name", "tokens", "samples", "lr_256", "tuned_tokens"),
    [
        ("clipa-v1-b16", 49, 2.4e9, 8e-6, 196),
        ("clipa-v1-l16", 36, 2.4e9, 8e-6, 196),
        ("clipa-v1-l16-i17", 16, 2.4e9, 8e-6, 196),
        ("clipa-v2-l14", 36, 12.81e9, 8e-6, 179),
        ("clipa-v2-h14", 36, 12.81e9, 8e-6, 179),
        ("clipa-v2-h14-70", 25, 12.81e9, 8e-6, 179),
        ("clipa-v2-bigg14", 25, 12.81e9, 4e-6, 153),
    ],
)
def test_papers_recipes(name, tokens, samples, lr_256, tuned_tokens):
    config = preset(name)
    short, full, *more = config.stages.values()

    def seen(stage):
        patches = (stage.image_size // config.model.patch_size) ** 2
        kept = max(1, int(patches * (1 - stage.image_drop)))
        return kept, stage.steps * stage.batch_size, stage.lr * 256 / stage.batch_size

    assert seen(short) == (tokens, pytest.approx(samples, rel=1e-3), pytest.approx(lr_256))
    count = 524e6 if "v2" in name else 131e6
    rate = 4e-7 if "v2" in name else 8e-7
    assert seen(full) == (tuned_tokens, pytest.approx(count, rel=2e-3), pytest.approx(rate))
    if "v2" in name:  # 336 pixels, 345 of 576 patches
        (high,) = more
        assert seen(high) == (345, pytest.approx(131.07e6, rel=2e-3), pytest.approx(1e-7))
        assert (high.image_size, high.batch_size, high.warmup) == (336, 16_384, 1600)
    else:
        assert not more


BAD = {
    "stages.short.accumulate": (
        3,
        "batch_size must be a multiple of 1 processes x 3 parts, got 128",
    ),
    "stages.short.image_size": (20, "image_size must be a multiple of patch_size 8, got 20"),
    "stages.full.image_size": (
        36,
        "stages.full.image_size must be a multiple of patch_size 8, got 36",
    ),
    "stages.short.image_drop": (0.5, "image_drop must be 0 with image_mask none"),
    "stages.short.warmup": (2001, "warmup must be at most steps 2000, got 2001"),
    "model.dialect": ("clip", "dialect must be one of openai, .* got 'clip'"),
    "stages.full.text_mask": ("words", "stages.full.text_mask must be one of truncate"),
    "run.resume": ("nowhere.pt", "resume must be .* got 'nowhere.pt'"),
    "data.tokenizer": ("bpe", "tokenizer must be .* got 'bpe'"),
    "model.size": ("XXL", "model.size must be one of demo, .* got 'XXL'"),
    "preset": ("none", "preset must be one of emoji, .* got 'none'"),
    "stages": ({"a-b": Stage()}, "name of a stage must be a word .* got 'a-b'"),
    "run.output": ("a\0b", "output must be a folder that can be written, got .*null"),
}


@pytest.mark.parametrize("name", ["", "1a", "_a", "a b", "a/b", "é", "a" * 41])
def test_a_stage_has_a_name_that_files_and_flags_can_hold(good, name):
    with pytest.raises(ValueError, match="name of a stage must be a word of at most 40 letters"):
        validate(changed(good, stages={name: Stage()}))


@pytest.mark.parametrize("field", BAD)
def test_validate_names_what_must_hold(good, field):
    value, sentence = BAD[field]
    with pytest.raises(ValueError, match=sentence):
        validate(changed(good, **{spelled(field): value}))


@pytest.mark.parametrize("name", ["", " "])
def test_an_output_has_a_name(good, name):
    with pytest.raises(ValueError, match=f"run.output must be the name of a folder, got '{name}'"):
        validate(changed(good, run__output=name))


NUMBERS = [
    name
    for name, value in flat(Config()).items()
    if isinstance(value, int | float) and not isinstance(value, bool)
    if not name.startswith("augment.")  # test_augment asks these
] + ["optim.adam_eps", "optim.max_scale"]


@pytest.mark.parametrize("field", NUMBERS)
def test_every_number_has_a_range(good, field):
    """What is not a number, has no end, is negative or beyond all use, is refused by name."""
    default = flat(Config())[field]
    absurd = [10**20, -(10**20)] if isinstance(default, int) else [1e30, -1e30, math.nan, math.inf]
    for value in absurd:
        wrong = changed(good, **{spelled(field): value})
        with pytest.raises(ValueError, match=rf"config: {field} must be in [\[(].*[\])], got"):
            validate(wrong)
        if field.startswith("stages.full.") and field != "stages.full.steps":
            with pytest.raises(ValueError, match=rf"config: {field} must be in "):
                validate(changed(wrong, stages__full__steps=0))  # of a stage that does not come


@pytest.mark.parametrize(
    ("field", "inside", "outside"),
    [
        ("optim.beta2", 0.0, 1.0),
        ("stages.short.image_drop", 0.999, 1.0),
        ("stages.short.lr", 1e-9, 0.0),
        ("stages.full.lr", 100.0, 0.0),
        ("stages.full.steps", 0, -1),
        ("stages.short.batch_size", 2**20, 0),
        ("run.seed", 2**63 - 1, 2**63),
        ("optim.adam_eps", None, 0.0),
        ("optim.max_scale", 0.0, -1.0),
        ("stages.short.context", 2, 1),
        ("stages.short.image_size", 2048, 4104),
    ],
)
def test_ends_of_the_ranges(good, field, inside, outside):
    good = changed(good, stages__short__image_mask="random", stages__full__warmup=0)
    validate(changed(good, **{spelled(field): inside}))
    with pytest.raises(ValueError, match=f"config: {field} must be in "):
        validate(changed(good, **{spelled(field): outside}))


def test_images_of_too_many_patches(good):
    with pytest.raises(ValueError, match="image_size must be at most 256 patches a side, got 514"):
        validate(changed(good, model__patch_size=2, stages__short__image_size=514))


def test_validate_accepts_the_demo_and_makes_the_folder(good, tmp_path):
    validate(good)
    assert (tmp_path / "run").is_dir() and not any((tmp_path / "run").iterdir())


def test_batch_must_divide_by_the_processes(good):
    validate(good, world_size=2)
    with pytest.raises(ValueError, match="batch_size must be a multiple of 3 processes x 1 parts"):
        validate(good, world_size=3)


@pytest.mark.parametrize("where", ["under-a-file", "kernel-folder"])
def test_output_that_cannot_be_written(where, tmp_path):
    (tmp_path / "file").write_text("")
    output = {"under-a-file": tmp_path / "file" / "run", "kernel-folder": "/proc/run"}[where]
    with pytest.raises(ValueError, match="output must be a folder that can be written"):
        validate(changed(Config(), run__output=str(output)))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        ('{"learning": 1}', "field of Config, got learning"),
        ('{"stages": {"a": {"lr": 1, "rate": 1}}}', "field of Config, got stages.a.rate"),
        ('{"optim": {"beta1": "0.9"}}', "type float must hold one, got '0.9' as optim.beta1"),
        ('{"run": {"threads": 1.5}}', "type int must hold one, got 1.5 as run.threads"),
        ('{"run": {"compile": 1}}', "type bool must hold one, got 1 as run.compile"),
        ('{"optim": 3}', "type OptimPart must hold one, got 3 as optim"),
        ('{"augment": {"scale": [1]}}', r"must hold one, got \[1\] as augment.scale"),
        ('{"augment": {"rotate": -1}}', r"augment: rotate must be in \[0, 360\], got -1"),
        ('{"optim": {"beta1": NaN}}', r"optim.beta1 must be in \[0, 1\), got nan"),
        ('{"model": {"size": "XXL"}}', "model.size must be one of demo, .* got 'XXL'"),
        ('{"stages": {"a.b": {}}}', "name of a stage must be a word .* got 'a.b'"),
        ('{"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}', "field of Config, got a, b, c and 2 more"),
        ("[" * 100_000, "must be a JSON object"),
        ('{"run": {"seed": %s}}' % ("9" * 5000), "must be a JSON object"),
    ],
    ids=[
        "cut", "list", "unknown", "in-a-stage", "text", "share", "switch", "part", "one", "range",
        "nan", "choice", "name", "many", "deep", "digits",
    ],
)  # fmt: skip
def test_from_json_refuses(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        from_json(text)


def test_what_a_run_resumed_from_is_not_saved():
    config = changed(Config(), run__resume="never", run__seed=3)
    assert from_json(to_json(config)) == changed(Config(), run__seed=3)


def test_from_json_fills_what_an_older_version_lacks():
    assert from_json('{"optim": {"beta1": 0.5}}') == changed(Config(), optim__beta1=0.5)


def test_describe_shows_every_field():
    told = config_module.describe(Config())
    assert all(f"{name}=" in told for name in flat(Config()))
    assert max(map(len, told.splitlines())) <= 100


def test_one_process_is_a_world(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    world = distributed.setup("cpu")
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.any(True) and not world.any(False)
    assert world.mean(torch.tensor(3.0)) == 3
    world.barrier()
    with pytest.raises(ValueError, match="no picture"):
        world.decide(lambda: (_ for _ in ()).throw(ValueError("no picture")))
    world.close()
    assert distributed.world_size() == 1
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert distributed.world_size() == 4


def test_ranks_from_torchrun_and_slurm():
    torchrun = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
    assert distributed._ranks(torchrun) == (5, 1, 8)
    slurm = {
        "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4",
        "SLURM_JOB_NODELIST": "gpu[08-09],big1", "SLURM_JOB_ID": "123456",
    }  # fmt: skip
    assert distributed._ranks(slurm) == (3, 1, 4)
    assert slurm["MASTER_ADDR"] == "gpu08" and 1024 < int(slurm["MASTER_PORT"]) < 65536
    assert distributed._ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == (0, 0, 1)
    with pytest.raises(ValueError, match="RANK must be below WORLD_SIZE, got 8 of 8"):
        distributed._ranks({"RANK": "8", "WORLD_SIZE": "8"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a1", "a1"), ("a1,a2", "a1"), ("a[3-5]", "a3"), ("a[3-5,9]-ib,b1", "a3-ib")],
)
def test_first_host(nodes, first):
    assert distributed.first_host(nodes) == first


def test_first_host_of_nothing():
    with pytest.raises(ValueError, match="must name a host, got ''"):
        distributed.first_host("")


def test_setup_refuses(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device must be .* got 'toaster'"):
        distributed.setup("toaster")
    with pytest.raises(RuntimeError, match="device cuda needs a GPU"):
        distributed.setup("cuda")
    with pytest.raises(RuntimeError, match="device meta must be one that works, got"):
        distributed.setup("meta")
    with pytest.raises(ValueError, match="threads must be at least 0, got -1"):
        distributed.setup("cpu", threads=-1)


def test_autocast_dtype():
    cpu = torch.device("cpu")
    assert distributed.autocast_dtype("bf16", cpu) == torch.bfloat16
    assert distributed.autocast_dtype("fp32", cpu) == torch.float32
    assert distributed.autocast_dtype("auto", cpu) in (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="precision must be auto, fp32 or bf16, got 'fp16'"):
        distributed.autocast_dtype("fp16", cpu)


def _member(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = distributed.setup("cpu", threads=1, timeout=60)
    assert (world.rank, world.size, world.is_main) == (rank, 2, rank == 0)
    assert world.any(rank == 1) and not world.any(False)
    asked = []
    assert world.decide(lambda: asked.append(rank) or f"by {rank}") == "by 0"
    assert asked == [0] * (rank == 0)  # rank 0 alone looks
    try:
        world.decide(lambda: Path("no such file").read_text())
    except (OSError, SystemExit) as error:  # told once, and all end
        told = "No such file" in str(error)
        assert told == (rank == 0) and isinstance(error, OSError) == told
        assert told or str(error) == "rank 1 ends: another process met an error, and tells it"
    else:
        raise AssertionError("all must end")
    world.require_same({"lr": 0.1, "code": "abc"})
    words = r"ranks: lr must be rank 0's 0.0 on every process, got 1.0 on rank 1"
    with pytest.raises(ValueError, match=words):  # on both
        world.require_same({"code": "abc", "lr": float(rank)})
    with pytest.raises(ValueError, match=r"seed must be rank 0's none .* got 3 on rank 1"):
        world.require_same({"seed": 3} if rank else {})
    own = torch.tensor([1.0 + rank])
    assert world.sum(own) == 3 and world.mean(own) == 1.5 and own == 1 + rank
    world.barrier()
    world.close()


def test_two_processes_agree():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_member, args=(port,), nprocs=2)


def test_flags_of_the_embedded_set_are_refused_with_shards(tmp_path):
    demo = changed(preset("emoji"), run__output=str(tmp_path))
    shards = changed(demo, data__source="pairs/{0..9}.tar")
    validate(shards)  # what a preset brings is no wish of a user's
    validate(changed(shards, augment__rotate=45.0, augment__warp=0.3, augment__blend=0.0))
    with pytest.raises(ValueError, match="config: augment.blend must be left alone"):
        validate(changed(shards, augment__blend=0.5))
    validate(changed(demo, augment__blend=0.5, data__captions="all"))
    assert shards.caption_keys == Captions()
    assert changed(shards, data__captions="all").caption_keys.keys == ("all",)


def test_flags_of_shards_are_refused_with_the_embedded_set(tmp_path):
    demo = changed(preset("emoji"), run__output=str(tmp_path))
    with pytest.raises(ValueError, match=r"data.captions must be one of names, words, all"):
        validate(changed(demo, data__captions="caption;synthetic"))
    wrong = {"caption_weights": "1;3", "mix": "1::1", "repeat": True, "parts": 2}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"data.{name} must be left alone unless data is sh"):
            validate(changed(demo, **{f"data__{name}": value}))


def test_flags_of_shards_are_checked_before_any_work(tmp_path):
    demo = changed(preset("emoji"), run__output=str(tmp_path))
    shards = changed(demo, data__source="a/{0..9}.tar::b.tar")
    validate(changed(shards, data__mix="3::0.5", data__captions="a;b", data__caption_weights="1;3"))
    for mix in ("3", "3::1::1", "3::0", "3::-1", "3::x", "3::nan", "::", "1::1/0"):
        with pytest.raises(ValueError, match=r"mix must hold a weight above 0 for each of the 2"):
            validate(changed(shards, data__mix=mix))
    for weights in ("1", "1;2;3", "0;0", "1;-1", "1;x", "nan;1", ";"):
        with pytest.raises(ValueError, match=r"captions: weights must be"):
            validate(changed(shards, data__captions="a;b", data__caption_weights=weights))
    for keys in ("a;a", "a;", ";"):
        with pytest.raises(ValueError, match=r"captions: keys must be words, each once"):
            validate(changed(shards, data__captions=keys))
    with pytest.raises(ValueError, match=r"short.batch_size must be a multiple of data.parts 3"):
        validate(changed(shards, data__parts=3))
