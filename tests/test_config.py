"""Flags, presets, stages and the sentences of a bad Config; the processes of a run."""

import doctest
import importlib
import math
import os
import re
import socket
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from training import config as config_module
from training import distributed
from training.config import Config, from_json, parse, preset, stages, to_json, validate
from training.presets import PRESETS, per_256


@pytest.fixture
def good(tmp_path) -> Config:
    """A valid Config whose numbers do not follow the demo's."""
    return Config(
        output=str(tmp_path / "run"), model="demo", patch_size=8, steps=2000, warmup=100,
        image_size=16, image_mask="none", batch_size=128, accumulate=1, finetune_steps=200,
        finetune_image_size=32, finetune_batch_size=128, finetune_warmup=20,
    )  # fmt: skip


@pytest.mark.parametrize(
    "module",
    ["checkpoint", "config", "distributed", "optim", "picture", "presets", "report", "stop"],
)
def test_examples_in_docstrings(module):
    failed, _ = doctest.testmod(importlib.import_module(f"training.{module}"))
    assert failed == 0


def test_flags_set_fields():
    config = parse(["--lr", "3e-4", "--compile", "--crop-scale", "0.5", "0.9", "--image-mask=grid"])
    assert config == replace(
        preset("emoji"), lr=3e-4, compile=True, crop_scale=(0.5, 0.9), image_mask="grid"
    )


def test_no_flags_is_the_demo():
    assert parse([]) == preset("emoji")


def test_every_field_has_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    told = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    told = re.sub(r"\{.*?\}", "", told)  # the choices
    for field in fields(Config):
        flag = f"--{field.name.replace('_', '-')}"
        entry = re.search(rf"{flag}[ ,](?P<help>.*?)\(default:", told)
        if field.name == "stage":
            assert entry is None
        else:
            assert re.search(r"\b[a-z]{2,}", entry["help"].replace("--no-", "")), flag


@pytest.mark.parametrize("flags", [["--preset", "clipa-v2-h14"], ["--preset=clipa-v2-h14"]])
def test_flags_override_the_preset_wherever_it_stands(flags):
    config = parse(["--lr", "1e-3", *flags, "--finetune-context", "16"])
    recipe = preset("clipa-v2-h14")
    assert config == replace(recipe, lr=1e-3, finetune_context=16)
    assert recipe.model == "H" and recipe.text_mask == "syntax"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--finetun-lr", "1"], "--finetune-lr"),
        (["--warmups", "1"], "--warmup"),
        (["--lr", "fast"], "could not convert"),
        (["--preset", "clip"], "clipa-v1-b16"),
        (["--image-mask", "stripes"], "'grid'"),
        (["--stage", "full"], "Unrecognized"),
        (["--steps"], "Missing value"),
    ],
    ids=[
        "slip-of-a-letter",
        "letter-too-many",
        "not-a-number",
        "preset",
        "choice",
        "stage",
        "no-value",
    ],
)
def test_bad_flags_end_with_a_sentence(flags, told, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flags)
    assert stop.value.code != 0
    assert told in "".join(capsys.readouterr())


def test_stages():
    config = Config(steps=10, warmup=1, finetune_steps=3, finetune_lr=0.5, finetune_image_size=64)
    short, full = stages(config)
    assert short == config
    assert (full.stage, full.steps, full.lr, full.image_size) == ("full", 3, 0.5, 64)
    assert full.seed == config.seed and full.model == config.model
    assert stages(replace(config, finetune_steps=0)) == (replace(config, finetune_steps=0),)
    for field in fields(Config):  # each finetune_ field has the field that it replaces
        if field.name.startswith("finetune_"):
            assert hasattr(config, field.name.removeprefix("finetune_"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name, tmp_path):
    config = preset(name)
    assert config.preset == name
    assert from_json(to_json(config)) == config
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n")
    own = config.tokenizer.endswith(".txt")
    config = replace(config, tokenizer=str(vocabulary) if own else config.tokenizer)
    validate(replace(config, output=str(tmp_path)), world_size=8)


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
    short, full = stages(preset(name))
    assert (short.image_size // short.patch_size) ** 2 == tokens
    assert short.steps * short.batch_size == pytest.approx(samples, rel=1e-3)
    assert short.lr == pytest.approx(per_256(lr_256, short.batch_size))
    patches = (full.image_size // full.patch_size) ** 2
    assert max(1, int(patches * (1 - full.image_drop))) == tuned_tokens
    assert full.steps * full.batch_size == pytest.approx(524e6 if "v2" in name else 131e6, rel=2e-3)


BAD = {
    "accumulate": (3, "batch_size must be a multiple of 1 processes x 3 parts, got 128"),
    "image_size": (20, "image_size must be a multiple of patch_size 8, got 20"),
    "finetune_image_size": (36, "finetune_image_size must be a multiple of patch_size 8, got 36"),
    "image_drop": (0.5, "image_drop must be 0 with image_mask none"),
    "warmup": (2001, "warmup must be at most steps 2000, got 2001"),
    "crop_scale": ((0.9, 0.4), "crop_scale must rise, got"),
    "crop_ratio": ((1.5, 1.0), "crop_ratio must rise, got"),
    "jitter": ((0.1, 0.1, 0.1, 0.9), "jitter must have a hue of at most 0.5, got"),
    "dialect": ("clip", "dialect must be one of openai, .* got 'clip'"),
    "text_mask": ("words", "text_mask must be one of truncate"),
    "resume": ("nowhere.pt", "resume must be .* got 'nowhere.pt'"),
    "tokenizer": ("bpe", "tokenizer must be .* got 'bpe'"),
    "model": ("XXL", "model must be one of demo, B, got 'XXL'"),
}


@pytest.mark.parametrize("field", BAD)
def test_validate_names_what_must_hold(good, field):
    value, sentence = BAD[field]
    with pytest.raises(ValueError, match=sentence):
        validate(replace(good, **{field: value}), models=("demo", "B"))


NUMBERS = [
    field.name
    for field in fields(Config)
    if isinstance(field.default, int | float | tuple) and not isinstance(field.default, bool)
] + ["adam_eps", "max_scale"]


@pytest.mark.parametrize("field", NUMBERS)
def test_every_number_has_a_range(good, field):
    """What is not a number, has no end, is negative or beyond all use, is refused by name."""
    default = getattr(Config(), field)
    absurd = [10**20, -(10**20)] if isinstance(default, int) else [1e30, -1e30, math.nan, math.inf]
    for number in absurd:
        value = (*default[:-1], number) if isinstance(default, tuple) else number
        with pytest.raises(ValueError, match=rf"config: {field} must be in [\[(].*[\])], got"):
            validate(replace(good, **{field: value}))
        if field.startswith("finetune_") and field != "finetune_steps":
            with pytest.raises(ValueError, match=rf"config: {field} must be in "):
                validate(replace(good, finetune_steps=0, **{field: value}))


@pytest.mark.parametrize(
    ("field", "inside", "outside"),
    [
        ("beta2", 0.0, 1.0),
        ("image_drop", 0.999, 1.0),
        ("gray_prob", 1.0, 1.01),
        ("lr", 1e-9, 0.0),
        ("finetune_lr", 100.0, 0.0),
        ("finetune_steps", 0, -1),
        ("batch_size", 2**20, 0),
        ("seed", 2**63 - 1, 2**63),
        ("adam_eps", None, 0.0),
        ("max_scale", 0.0, -1.0),
        ("crop_ratio", (0.01, 100.0), (0.0, 1.0)),
        ("context", 2, 1),
        ("image_size", 2048, 4104),
    ],
)
def test_ends_of_the_ranges(good, field, inside, outside):
    more = {"image_mask": "random"} if field == "image_drop" else {}
    validate(replace(good, **{field: inside}, **more))
    with pytest.raises(ValueError, match=f"config: {field} must be in "):
        validate(replace(good, **{field: outside}, **more))


def test_images_of_too_many_patches(good):
    with pytest.raises(ValueError, match="image_size must be at most 256 patches a side, got 514"):
        validate(replace(good, patch_size=2, image_size=514))


def test_validate_accepts_the_demo_and_makes_the_folder(good, tmp_path):
    validate(good, models=("demo",))
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
        validate(Config(output=str(output)))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        ('{"learning": 1}', "field of Config, got learning"),
    ],
    ids=["cut", "list", "unknown"],
)
def test_from_json_refuses(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        from_json(text)


def test_from_json_fills_what_an_older_version_lacks():
    assert from_json('{"lr": 0.5}') == Config(lr=0.5)


def test_describe_shows_every_field():
    told = config_module.describe(Config())
    assert all(f"{field.name}=" in told for field in fields(Config))
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
        world.agree(lambda: (_ for _ in ()).throw(ValueError("no picture")))
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
    world.agree(lambda: asked.append(rank))
    assert asked == [0] * (rank == 0)  # rank 0 alone looks
    try:
        world.agree(lambda: Path("no such file").read_text())
    except (ValueError, SystemExit) as error:  # told once, and all end
        told = "No such file" in str(error)
        assert told == (rank == 0) and isinstance(error, ValueError) == told
    else:
        raise AssertionError("all must end")
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
    shards = {"data": "pairs/{0..9}.tar", "output": str(tmp_path)}
    validate(replace(preset("emoji"), **shards))  # what a preset brings is no wish of a user's
    validate(replace(preset("emoji"), **shards, rotate=45.0, warp=0.3, blend=0.0))
    for change in ({"blend": 0.5}, {"captions": "all"}):
        with pytest.raises(ValueError, match=f"config: {next(iter(change))} must be left alone"):
            validate(replace(preset("emoji"), **shards, **change))
        validate(replace(preset("emoji"), output=str(tmp_path), **change))
