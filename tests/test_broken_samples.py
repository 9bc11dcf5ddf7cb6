"""A run on shards of which one sample in a hundred is broken, in every way that is known."""

import gzip
import json
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_images import encoded, png
from test_shards_damaged import put

import train
from data.shards import ShardLoader
from data.text import Tokenizer, train_wordpiece

WHOLE = 1_200  # samples with nothing wrong
BATCH = 60
STEPS = 21
LIMIT = 50_000  # pixels that the run allows


RED, BLUE = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
PHOTO = encoded(Image.effect_noise((64, 48), 90).convert("RGB"), "JPEG", quality=90)
BOMB = png(20_000, 20_000, 1, 0, bytes(2501) * 20_000)  # 50 kB
FRAMES = {"save_all": True, "append_images": [BLUE]}
# What looks odd and is read: the files of a sample by extension.
ODD = {
    "cmyk": {"jpg": encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")},
    "deep": {"png": encoded(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG")},
    "moving gif": {"png": encoded(RED, "GIF", **FRAMES)},
    "moving webp": {"webp": encoded(RED, "WEBP", **FRAMES)},
    "moving png": {"png": encoded(RED, "PNG", **FRAMES)},
    "one pixel": {"png": encoded(Image.new("RGB", (1, 1)), "PNG")},
    "wide": {"png": encoded(Image.new("L", (20_000, 2), 9), "PNG")},
    "tall": {"jpg": encoded(Image.new("RGB", (2, 20_000), "red"), "JPEG")},
    "upper case": {"JPEG": PHOTO},
    "a/folder/deep": {"jpg": PHOTO},
    "long" * 70: {"jpg": PHOTO},
}
# What cannot be read: the kind that the log counts, and the files.
BROKEN = {
    "truncated": ("image", {"jpg": PHOTO[: len(PHOTO) // 2], "txt": b"x"}),
    "cut at its end": ("image", {"jpg": PHOTO[:-40], "txt": b"x"}),
    "empty": ("image", {"png": b"", "txt": b"x"}),
    "page": ("image", {"jpg": b"<html>404</html>", "txt": b"x"}),
    "bomb": ("image size", {"png": BOMB, "txt": b"x"}),
    "large": ("image size", {"png": encoded(Image.new("L", (250, 201)), "PNG"), "txt": b"x"}),
    "no caption": ("caption", {"jpg": PHOTO, "json": b'{"url": "x"}'}),
    "null": ("caption", {"jpg": PHOTO, "json": b'{"caption": null}'}),
    "no json": ("caption", {"jpg": PHOTO, "json": b'{"caption": '}),
    "latin": ("caption", {"jpg": PHOTO, "txt": b"caf\xe9"}),
}
HALF = {"lone": {"jpg": PHOTO}, "silent": {"txt": b"x"}}  # no samples: told, not counted


def flags(pattern: str, output: Path) -> list[str]:
    return (
        f"--stages.short.steps {STEPS} --stages.full.steps 0 --stages.short.batch-size {BATCH} "
        f"--stages.short.warmup 1 --run.log-every 7 --run.precision fp32 --device cpu "
        f"--data {pattern} --data.max-pixels {LIMIT} --output {output}"
    ).split()


def files_of(number: int) -> dict[str, bytes]:
    level = number % 256
    picture = encoded(Image.new("RGB", (12, 12), (level, level, level)), "PNG")
    return {"png": picture, "txt": f"number {number}".encode()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Four shards of 300 whole samples each, among which the others lie, and one of none.

    The second is in GNU's format and the others in PAX; the last sample of the fourth is cut off.
    """
    folder = tmp_path_factory.mktemp("broken")
    special = [
        *((name, parts | {"txt": name.encode()}) for name, parts in ODD.items()),
        *((name, parts) for name, (_, parts) in BROKEN.items()),
        *HALF.items(),
    ]
    for shard in range(4):
        samples = [(f"{number}", files_of(number)) for number in range(shard, WHOLE, 4)]
        for place, sample in enumerate(special[shard::4]):
            samples.insert(37 * place + 11, sample)
        form = tarfile.GNU_FORMAT if shard == 1 else tarfile.PAX_FORMAT
        with tarfile.open(folder / f"{shard}.tar", "w", format=form) as tar:
            for name, parts in samples:
                for extension, data in parts.items():
                    put(tar, f"{name}.{extension}", data)
    data = (folder / "3.tar").read_bytes()
    (folder / "3.tar").write_bytes(data[: data.rindex(b"number 1199") - 3 * 512])
    with tarfile.open(folder / "4.tar", "w"):
        pass
    return folder


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> tuple[list[dict], list[str]]:
    """The log and the warnings of a run of an epoch and more."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        patch.setenv("CLIPA_CACHE", str(folder))
        warnings.simplefilter("always")
        train.main(flags(f"{shards}/{{0..4}}.tar", folder))
    rows = [json.loads(line) for line in (folder / "log.jsonl").open()]
    return rows, [str(one.message) for one in said]


@pytest.fixture(scope="module")
def loader(shards, tmp_path_factory) -> ShardLoader:
    """The run's batches."""
    captions = [f"number {number}" for number in range(WHOLE)] + list(ODD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ShardLoader(
            f"{shards}/{{0..4}}.tar",
            Tokenizer(train_wordpiece(captions, 2000, start=False)),
            batch_size=BATCH,
            image_size=16,
            context=16,
            steps=STEPS,
            max_pixels=LIMIT,
            cache=tmp_path_factory.mktemp("cache"),
        )


def test_every_kind_is_counted_in_the_log(run, loader, shards):
    rows, _ = run
    assert rows[-1]["step"] == STEPS
    logged = Counter()
    for row in rows:
        logged.update(row["skipped_by_kind"])
        assert row["skipped"] == logged.total()
    kinds = Counter(kind for kind, _ in BROKEN.values())
    assert logged.keys() == kinds.keys()
    assert all(logged[kind] >= count for kind, count in kinds.items())  # an epoch and more
    assert all(np.isfinite(row["loss"]) for row in rows)
    counted = Counter()
    for batch in loader:
        counted.update({kind: fault.count for kind, fault in batch.faults.items()})
    assert counted == logged


def test_the_rest_is_trained_on(loader):
    known = {
        tuple(loader.tokenizer.encode([text], 16)[0].tolist()): text
        for text in [*(f"number {number}" for number in range(WHOLE)), *ODD]
    }
    seen, pictures = Counter(), {}
    for batch in loader:
        rows = batch.ids.tensor_split(batch.cu_seqlens[1:-1].long())
        for row, image in zip(rows, batch.images, strict=True):
            text = known[tuple(row.tolist())]
            seen[text] += 1
            pictures[text] = image
    assert seen.keys() == {*ODD, *(f"number {number}" for number in range(WHOLE - 1))}
    for name in ("cmyk", "moving gif", "moving webp", "moving png", "tall"):
        assert (pictures[name].int() - torch.tensor([255, 0, 0])).abs().max() < 4
    for name, level in (("deep", 40_000 // 257), ("one pixel", 0), ("wide", 9), ("number 77", 77)):
        assert (pictures[name] == level).all()


def test_what_is_no_sample_is_told(run, shards):
    _, said = run
    everything = "\n".join(said)
    for sentence in (
        "has images without a caption (lone.jpg)",
        "has captions without an image (silent.txt)",
        f"shards: {shards}/3.tar is cut short (in ",
    ):
        assert sentence in everything


@pytest.mark.parametrize(
    ("name", "came"),
    [("empty.tar", "one that is cut short (in a header at byte 0)"), ("packed.tar.gz", "gzip")],
)
def test_what_is_no_tar_ends_a_run_with_its_name(shards, tmp_path, monkeypatch, name, came):
    monkeypatch.setenv("CLIPA_CACHE", str(tmp_path))
    data = b"" if name == "empty.tar" else gzip.compress((shards / "0.tar").read_bytes())
    (tmp_path / name).write_bytes(data)
    (tmp_path / "0.tar").write_bytes((shards / "0.tar").read_bytes())
    with pytest.raises(SystemExit) as end:
        train.main(flags(f"{tmp_path}/*.tar*", tmp_path / "run"))
    must = f"shards: {tmp_path}/{name} must be an uncompressed tar, got {came}"
    assert str(end.value) == f"train.py: {must}"
