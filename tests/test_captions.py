"""Which caption of a sample is read: keys of the .json, further extensions, weights."""

import io
import json
import tarfile
from collections import Counter

import pytest
import torch
from PIL import Image
from test_batches import joined, same
from test_train import flags

from data.pairs import Captions
from data.shards import ShardLoader, check_captions, first_captions, read_pairs
from data.text import Tokenizer, train_wordpiece
from train import main

KINDS = ("short", "synthetic", "told")


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (number % 256, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(path, samples: list[dict[str, bytes]]):
    with tarfile.open(path, "w") as tar:
        for number, files in enumerate(samples):
            for extension, data in ({"png": picture(number)} | files).items():
                member = tarfile.TarInfo(f"{number:04d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def described(number: int, *, without: str = "") -> dict[str, bytes]:
    """A .json with two captions and a number, a .txt, a .told.txt; one of them may be missing."""
    held = {"short": f"short {number}", "synthetic": f"synthetic {number}", "width": 16}
    held = {key: value for key, value in held.items() if key != without}
    files = {"json": json.dumps(held).encode(), "told.txt": f"told {number}\n".encode()}
    files["txt"] = f"plain {number}".encode()
    return {key: value for key, value in files.items() if key != without}


@pytest.fixture
def shard(tmp_path):
    return write(tmp_path / "a.tar", [described(number) for number in range(64)])


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    captions = [f"{kind} {n}" for kind in ("plain", *KINDS) for n in range(64)]
    return Tokenizer(train_wordpiece(captions, 400, start=False))


def loader(path, words, tmp_path, **change) -> ShardLoader:
    how = {"batch_size": 32, "image_size": 8, "context": 8, "steps": 8, "cache": tmp_path} | change
    return ShardLoader(path, words, **how)


def read(batch, words) -> list[str]:
    known = {
        tuple(words.encode([text], 8)[0].tolist()): text
        for text in (f"{kind} {n}" for kind in ("plain", *KINDS) for n in range(64))
    }
    rows = batch.ids.tensor_split(batch.cu_seqlens[1:-1].long())
    return [known[tuple(row.tolist())] for row in rows]


def first_words(batches, words) -> Counter:
    return Counter(text.split()[0] for batch in batches for text in read(batch, words))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [("", "plain"), ("short", "short"), ("told.txt;short", "told"), ("synthetic;txt", "synthetic")],
)
def test_the_first_key_that_a_sample_has(shard, words, tmp_path, keys, expected):
    captions = Captions.parse(keys)
    batch = loader(shard, words, tmp_path, captions=captions)[0]
    assert first_words([batch], words) == {expected: 32}
    assert first_captions(shard, captions=captions) == [f"{expected} {n}" for n in range(64)]
    assert read_pairs(shard, 8, captions=captions)[1] == [[f"{expected} {n}"] for n in range(64)]


def test_keys_are_drawn_by_weight_for_each_sample_anew(shard, words, tmp_path):
    captions = Captions.parse("short;synthetic;told.txt", "1;3;0")
    batches = list(loader(shard, words, tmp_path, captions=captions, steps=32))
    counts = first_words(batches, words)
    assert counts.keys() == {"short", "synthetic"}
    assert counts["synthetic"] / counts.total() == pytest.approx(0.75, abs=0.05)  # 4 deviations
    epochs = [set().union(*(read(batch, words) for batch in batches[i : i + 2])) for i in (0, 2)]
    assert epochs[0] != epochs[1]
    told = first_captions(shard, captions=captions)
    assert sorted(told) == sorted(f"{kind} {n}" for kind in KINDS for n in range(64))


@pytest.mark.parametrize("parts", [1, 4])
def test_draws_are_those_of_any_split(shard, words, tmp_path, parts):
    how = {"captions": Captions.parse("short;synthetic", "1;1"), "mix": "3::1", "parts": parts}
    pattern = f"{shard}::{write(tmp_path / 'b.tar', [described(n) for n in range(40)])}"
    whole = list(loader(pattern, words, tmp_path, **how))
    for change in ({"workers": 2}, {"start_step": 5}):
        found = list(loader(pattern, words, tmp_path, **how, **change))
        assert all(same(a, b) for a, b in zip(whole[-len(found) :], found, strict=True))
    for size in (2, 4):
        ranks = [
            list(loader(pattern, words, tmp_path, **how, rank=rank, world_size=size))
            for rank in range(size)
        ]
        for batch, *shares in zip(whole, *ranks, strict=True):
            pairs = zip(joined(shares), joined([batch]), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    assert whole[0].sources == {str(shard): 24, str(tmp_path / "b.tar"): 8}


def test_a_missing_key_falls_to_the_next(tmp_path, words):
    samples = [described(n, without=("short", "synthetic", "json")[n % 3]) for n in range(48)]
    path = write(tmp_path / "a.tar", samples)
    batches = list(loader(path, words, tmp_path, captions=Captions.parse("short;synthetic;txt")))
    for text in (text for batch in batches for text in read(batch, words)):
        kind, number = text.split()
        assert kind == ("synthetic", "short", "plain")[int(number) % 3]
    drawn = Captions.parse("short;synthetic", "1;0")  # weight 0: never drawn, but fallen to
    counts = first_words(loader(path, words, tmp_path, captions=drawn), words)
    assert counts.keys() == {"short", "synthetic"}


def test_a_sample_with_none_of_the_keys_is_a_fault(tmp_path, words):
    samples = [described(n, without="synthetic" if n % 8 == 0 else "") for n in range(48)]
    path = write(tmp_path / "a.tar", samples)
    batches = list(loader(path, words, tmp_path, captions=Captions.parse("synthetic")))
    assert batches[-1].skipped > 0 and {*batches[0].faults} <= {"caption"}
    told = next(batch.faults["caption"].first for batch in batches if batch.faults)
    assert "must hold a caption as synthetic, got none" in told


def test_an_unknown_key_ends_with_a_sentence(shard, tmp_path):
    check_captions(str(shard), Captions.parse("short;told.txt"))
    both = f"{shard}::{write(tmp_path / 'b.tar', [described(0, without='short')])}"
    check_captions(both, Captions.parse("short"))
    with pytest.raises(
        ValueError,
        match=r"captions must be keys of one of the first 1000 samples, got long, longer; "
        r"these have short, synthetic, txt",
    ):
        check_captions(str(shard), Captions.parse("long;short;longer"))


def test_a_run_counts_its_sources_and_refuses_keys(shard, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CLIPA_CACHE", str(tmp_path / "cache"))
    other = write(tmp_path / "b.tar", [described(n) for n in range(64)])
    words = [
        *flags(tmp_path / "run", run__log_every=1),
        *("--data", f"{shard}::{other}", "--captions", "short;synthetic"),
    ]
    main([*words, "--caption-weights", "1;3", "--mix", "3::1"])
    assert "a.tar ends at step" in capfd.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    batch = sum(rows[0]["samples_by_source"].values())
    assert rows[0]["samples_by_source"] == {str(shard): batch * 3 // 4, str(other): batch // 4}
    with pytest.raises(SystemExit, match=r"^train\.py: shards: captions must be keys .* got long;"):
        main([*words, "--captions", "long", "--resume", "never"])
