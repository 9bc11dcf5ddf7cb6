"""Tar shards: every sample once an epoch, resumed and split, bad samples replaced."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_batches import joined, same

from data.augment import Augmentation
from data.patterns import file_names
from data.shards import ShardLoader, first_captions, read_pairs, scan
from data.text import Tokenizer, train_wordpiece


def expand(pattern) -> list[Path]:
    return [Path(name) for name in file_names(pattern)]


def encoded(image: torch.Tensor, kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.numpy()).save(file, kind, **options)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Five shards of 7 good samples each; sample i is a flat grey of level 7 i, "number i"."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(5):
        with tarfile.open(folder / f"{shard:02d}.tar", "w") as tar:
            for row in range(7):
                number = shard * 7 + row
                image = torch.full((40, 60, 3), 7 * number, dtype=torch.uint8)
                kind = ("PNG", "JPEG", "WEBP")[number % 3]
                extension = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[kind]
                options = {"quality": 95} if kind != "PNG" else {}
                add(tar, f"a/{number:05d}.{extension}", encoded(image, kind, **options))
                if number % 2:
                    text = json.dumps({"caption": f"number {number}", "url": "x"})
                    add(tar, f"a/{number:05d}.json", text.encode())
                else:
                    add(tar, f"a/{number:05d}.txt", f"number {number}\n".encode())
            add(tar, "a/lonely.png", b"an image without a caption")
            add(tar, "a/silent.txt", b"a caption without an image")
    return folder


@pytest.fixture(scope="module")
def numbers() -> Tokenizer:
    words = [f"number {number}" for number in range(40)]
    return Tokenizer(train_wordpiece(words * 3, 200, start=False))


def shard_loader(path, numbers, tmp_path, **change) -> ShardLoader:
    base = {"batch_size": 6, "image_size": 16, "context": 8, "steps": 12, "window": 2, "seed": 9}
    base["augmentation"] = Augmentation(scale=(0.3, 1.0), flip=0.5)
    return ShardLoader(path, numbers, cache=tmp_path, **{**base, **change})


def shown(batch, tokenizer: Tokenizer) -> list[int]:
    """The numbers that a batch's captions name; its images must show the same."""
    rows = batch.ids.tensor_split(batch.cu_seqlens[1:-1].long())
    known = {tuple(tokenizer.encode([f"number {i}"], 8)[0].tolist()): i for i in range(40)}
    found = [known[tuple(row.tolist())] for row in rows]
    levels = batch.images.float().mean((1, 2, 3))
    assert (levels - 7 * torch.tensor(found)).abs().max() < 3
    return found


def test_shards_give_every_sample_once_an_epoch(shards, numbers, tmp_path):
    loader = shard_loader(f"{shards}/{{00..04}}.tar", numbers, tmp_path, steps=35)
    assert loader.count == 35
    stream = [number for batch in loader for number in shown(batch, numbers)]
    epochs = [stream[start : start + 35] for start in range(0, len(stream), 35)]
    assert all(sorted(epoch) == list(range(35)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    first = {number // 7 for number in epochs[0][:14]}
    assert len(first) == 2  # a window is two shards, mixed
    assert epochs[0][:14] != sorted(epochs[0][:14])


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_resume_and_split_over_ranks(shards, numbers, tmp_path, workers):
    pattern = f"{shards}/*.tar"
    whole = list(shard_loader(pattern, numbers, tmp_path, workers=workers))
    resumed = list(shard_loader(pattern, numbers, tmp_path, start_step=9))
    assert all(same(a, b) for a, b in zip(whole[9:], resumed, strict=True))
    ranks = [
        list(shard_loader(pattern, numbers, tmp_path, rank=rank, world_size=2)) for rank in (0, 1)
    ]
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert [share.first_sample for share in shares] == [0, 3]
        assert all(torch.equal(a, b) for a, b in zip(joined(shares), joined([batch]), strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_parts_give_the_same_batches_and_each_rank_reads_its_own(shards, numbers, tmp_path, ranks):
    how = {"parts": 4, "batch_size": 8, "window": 1}
    whole = shard_loader(f"{shards}/*.tar", numbers, tmp_path, **how)
    members = [
        shard_loader(f"{shards}/*.tar", numbers, tmp_path, rank=rank, world_size=ranks, **how)
        for rank in range(ranks)
    ]
    read = [set() for _ in members]
    for step in range(9):
        parts = [member[step] for member in members]
        assert all(
            torch.equal(a, b) for a, b in zip(joined(parts), joined([whole[step]]), strict=True)
        )
        for rank, part in enumerate(parts):
            read[rank] |= set(shown(part, numbers))
    assert sum(map(len, read)) == len(set().union(*read)) == 35


@pytest.fixture
def bad_shard(tmp_path) -> Path:
    """Seven samples that cannot be read: three by their image, four by their caption."""
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for number, data in enumerate(
            [b"", b"no image", encoded(torch.zeros(9, 9, 3).byte(), "PNG")[:40]]
        ):
            add(tar, f"{number}.png", data)
            add(tar, f"{number}.txt", b"number 39")
        good = encoded(torch.zeros(9, 9, 3).byte(), "PNG")
        for number, text in enumerate([b"\xff\xfe", b"{}", b"[1]", b"{"]):
            add(tar, f"x{number}.png", good)
            add(tar, f"x{number}.{'txt' if number == 0 else 'json'}", text)
    return tmp_path / "bad.tar"


def test_bad_samples_are_counted_and_replaced(shards, bad_shard, numbers, tmp_path):
    paths = [shards / "00.tar", bad_shard, shards / "01.tar"]
    batches = list(shard_loader(paths, numbers, tmp_path, steps=21))
    clean = list(shard_loader(paths, numbers, tmp_path, steps=21, workers=1))
    assert all(same(a, b) for a, b in zip(batches, clean, strict=True))
    loader = shard_loader(paths, numbers, tmp_path)
    for step, batch in enumerate(batches):
        for row, number in enumerate(shown(batch, numbers)):
            places = range(6 * step + row, 6 * (step + 100), 6)  # this row of this and later steps
            shard, at = next(p for p in map(loader.locate, places) if p[0] != 1)
            assert number == (at if shard == 0 else 7 + at)
    counts = [batch.skipped for batch in batches]
    assert counts == sorted(counts)
    assert counts[-1] >= 7 * 6  # 126 samples of 21: each bad one is met six times


def test_first_samples_in_order(shards, bad_shard, monkeypatch, tmp_path):
    monkeypatch.setenv("CLIPA_CACHE", str(tmp_path))
    paths = [shards / "00.tar", bad_shard, shards / "01.tar"]
    captions = [f"number {number}" for number in range(14)]
    assert first_captions(paths) == [*captions[:7], *["number 39"] * 3, *captions[7:]]
    assert first_captions(paths, 5) == captions[:5]
    images, found, skipped = read_pairs(paths, 16, 16)
    assert found == [[caption] for caption in captions[:9]]
    assert skipped == 7
    assert images.shape == (9, 16, 16, 3)
    levels = images.float().mean((1, 2, 3))
    assert (levels - 7 * torch.arange(9)).abs().max() < 3
    assert read_pairs(bad_shard, 16)[0].shape == (0, 16, 16, 3)


def test_a_shard_of_bad_samples_alone_ends_the_run(numbers, tmp_path):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        add(tar, "0.png", b"no image")
        add(tar, "0.txt", b"number 1")
    loader = shard_loader(tmp_path / "bad.tar", numbers, tmp_path, batch_size=1)
    sentence = (
        r"one of 100 samples in a row must be readable, got none; \S*bad.tar, 0.png: .* whole"
    )
    with pytest.raises(ValueError, match=sentence):
        next(iter(loader))
    loader.workers = 1
    with pytest.raises(ValueError, match=f"^ShardLoader: {sentence}") as told:
        next(iter(loader))
    assert "\n" not in str(told.value)


def test_a_shard_cut_short_gives_its_whole_samples(shards, numbers, tmp_path):
    data = (shards / "00.tar").read_bytes()
    path = tmp_path / "cut.tar"
    rows = scan(shards / "00.tar", tmp_path)
    assert rows.shape == (7, 6)
    path.write_bytes(data[: rows[3, 0] + 20])  # within the fourth image
    with pytest.warns(UserWarning, match="is cut short"):
        cut = scan(path, tmp_path)
    assert np.array_equal(cut, rows[:3])


def test_patterns(shards):
    names = [f"0{i}.tar" for i in range(5)]
    for pattern in (f"{shards}/{{00..04}}.tar", f"{shards}/0{{0,1,2,3,4}}.tar", f"{shards}/*.tar"):
        assert [path.name for path in expand(pattern)] == names
    assert [p.name for p in expand([shards / "03.tar", f"{shards}/{{01..02}}.tar"])] == [
        "03.tar",
        "01.tar",
        "02.tar",
    ]


def test_bad_shards(shards, numbers, tmp_path):
    with pytest.raises(ValueError, match=r"must name files that are there, got .*/05\.tar"):
        expand(f"{shards}/{{03..05}}.tar")
    with pytest.raises(ValueError, match="must name at least one file, got none"):
        expand([])
    (tmp_path / "text.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match="must be an uncompressed tar, got"):
        scan(tmp_path / "text.tar", tmp_path)
    with tarfile.open(tmp_path / "zip.tar", "w:gz") as tar:
        add(tar, "0.txt", b"x")
    with pytest.raises(ValueError, match="must be an uncompressed tar, got"):
        scan(tmp_path / "zip.tar", tmp_path)
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    with pytest.raises(ValueError, match="must hold samples .* got none in 1 files, the first "):
        shard_loader(tmp_path / "none.tar", numbers, tmp_path)
    for change, sentence in (
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"world_size": 4}, "batch_size must be divisible by the 4 processes, got 6"),
        ({"start_step": 13}, "start_step must be in .0, 12., got 13"),
        ({"window": 0}, "window must be at least 1"),
        ({"image_size": 0}, "image_size must be at least 1 pixel, got 0"),
    ):
        with pytest.raises(ValueError, match=f"ShardLoader: {sentence}"):
            shard_loader(f"{shards}/*.tar", numbers, tmp_path, **change)
