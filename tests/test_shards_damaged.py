"""Shards as they come: damaged, linked, repeated, badly named; captions of every encoding."""

import io
import json
import os
import re
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from test_shards import expand

import train
from data.augment import Augmentation
from data.batches import Fault
from data.files import whole
from data.shards import ShardLoader, first_captions, read_pairs, scan
from data.text import Tokenizer, train_wordpiece

BLOCK = 512


def put(tar: tarfile.TarFile, name: str, data: bytes = b"abc", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = 0 if fields else len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, None if fields else io.BytesIO(data))


def link(tar: tarfile.TarFile, name: str, target: str, kind: bytes) -> None:
    put(tar, name, type=kind, linkname=target)


def picture(level: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 12), (level, level, level)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def ten(tmp_path) -> Path:
    """Ten samples whose members take two blocks each: header and data."""
    with tarfile.open(tmp_path / "ten.tar", "w") as tar:
        for number in range(10):
            put(tar, f"{number}.jpg")
            put(tar, f"{number}.txt", b"%d" % number)
    return tmp_path / "ten.tar"


def damaged(path: Path, at: int, data: bytes) -> Path:
    whole = bytearray(path.read_bytes())
    whole[at : at + len(data)] = data
    path.write_bytes(whole)
    return path


def found(path: Path) -> tuple[list[int], list[str]]:
    """The samples' numbers by their captions, and what was said; the same from the kept scan."""
    data, both = path.read_bytes(), []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            rows = scan(path, path.parent).tolist()
        both.append(([int(data[row[2] : row[2] + row[3]]) for row in rows],
                     [str(one.message) for one in said]))  # fmt: skip
    assert both[0] == both[1]
    return both[0]


# Damage


@pytest.mark.parametrize("byte", [0, 130, 150, 156, 257], ids=lambda at: f"byte-{at}")
@pytest.mark.parametrize("member", [0, 4, 9, 18, 19])
def test_a_broken_header_costs_its_sample_alone(ten, member, byte):
    at = member * 2 * BLOCK
    old = ten.read_bytes()[at + byte]
    numbers, said = found(damaged(ten, at + byte, bytes([old ^ 255])))
    assert numbers == [number for number in range(10) if number != member // 2]
    stop = len(ten.read_bytes()) if member == 19 else at + 2 * BLOCK
    lone = f"captions without an image ({member // 2}.txt)"
    if member % 2:
        lone = f"images without a caption ({member // 2}.jpg)"
    assert said == [
        f"shards: {ten} has broken headers (bytes {at} to {stop} are left out)",
        f"shards: {ten} has {lone}",
    ]  # after the last there is no other


def test_several_broken_headers_are_counted(ten):
    for member in (4, 9, 12):
        damaged(ten, member * 2 * BLOCK + 3, b"\xff\xff")
    numbers, said = found(ten)
    assert numbers == [0, 1, 3, 5, 7, 8, 9]
    assert said == [
        f"shards: {ten} has broken headers (3, first: bytes 4096 to 5120 are left out)",
        f"shards: {ten} has captions without an image (2, first: 2.txt)",
        f"shards: {ten} has images without a caption (4.jpg)",
    ]


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_zeros_amid_a_shard_do_not_end_it(ten, blocks):
    numbers, said = found(damaged(ten, 8 * BLOCK, bytes(blocks * BLOCK)))
    lost = range(2, 2 + (blocks + 3) // 4)
    assert numbers == [number for number in range(10) if number not in lost]
    assert "has zeros amid its members (bytes 4096 to" in said[0]
    assert said[1:] in ([], [f"shards: {ten} has captions without an image (2.txt)"])


def test_bytes_that_are_missing_or_too_many_move_the_rest(ten):
    whole = ten.read_bytes()
    ten.write_bytes(whole[:6000] + whole[7001:])
    assert found(ten)[0] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    ten.write_bytes(whole[: 12 * BLOCK] + b"page" * 33 + whole[12 * BLOCK :])
    numbers, said = found(ten)
    assert numbers == list(range(10))
    assert "broken headers (bytes 6144 to 6276 are left out)" in said[0]


def test_two_shards_in_one_file_are_both_read(ten):
    whole = ten.read_bytes()
    ten.write_bytes(whole + whole)
    numbers, said = found(ten)
    assert numbers == [*range(10), *range(10)]
    assert "has zeros amid its members" in said[0]


@pytest.mark.parametrize(
    ("end", "count", "where"),
    [
        (16 * BLOCK + 100, 4, "in a header at byte 8192"),
        (16 * BLOCK, 4, "in a header at byte 8192"),
        (16 * BLOCK + BLOCK + 1, 4, "in 4.jpg"),
        (18 * BLOCK + BLOCK + 1, 5, "in 4.txt"),  # its one byte is there
        (40 * BLOCK, 10, "in a header at byte 20480"),  # whole, but without the end's zeros
    ],
)
def test_a_cut_shard_says_so_each_time(ten, end, count, where):
    ten.write_bytes(ten.read_bytes()[:end])
    numbers, said = found(ten)
    assert (numbers, said[0]) == (list(range(count)), f"shards: {ten} is cut short ({where})")
    lone = ["4.jpg"] if where == "in 4.jpg" else []
    assert said[1:] == [f"shards: {ten} has images without a caption ({name})" for name in lone]


def test_a_whole_shard_says_nothing(ten):
    assert found(ten) == (list(range(10)), [])
    ten.write_bytes(ten.read_bytes() + bytes(10**5))  # padding of any length
    assert found(ten) == (list(range(10)), [])


@pytest.mark.parametrize(
    ("data", "came"),
    [
        (b"", "got one that is cut short"),
        (b"x" * 100, "got one that is cut short"),
        (b"no tar at all" * 1000, "got one that has broken headers"),
        (b"\x1f\x8b\x08\0" * 1000, "got gzip"),
        (b"(\xb5/\xfd" * 1000, "got zstd"),
    ],
    ids=["empty", "short", "text", "gzip", "zstd"],
)
def test_what_is_no_tar_is_named(tmp_path, data, came):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match=f"a.tar must be an uncompressed tar, {came}"):
        scan(tmp_path / "a.tar", tmp_path)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ValueError, match=r"a.tar must be a file that can be read, got .* No such"):
        scan(tmp_path / "a.tar", tmp_path)


# Members


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_other_alphabets(tmp_path, form):
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for number, name in enumerate(("long/" * 60 + "x", "föhn/日本", "y" * 99, "z" * 101)):
            put(tar, f"{name}.jpg")
            put(tar, f"{name}.txt", b"%d" % number)
    assert found(tmp_path / "a.tar") == ([0, 1, 2, 3], [])


def test_links_are_the_files_they_name(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        put(tar, "./a/0.jpg", b"zero")
        put(tar, "a/0.txt", b"0")
        link(tar, "1.jpg", "a/0.jpg", tarfile.LNKTYPE)
        link(tar, "2.jpg", "1.jpg", tarfile.LNKTYPE)
        link(tar, "b/3.jpg", "../2.jpg", tarfile.SYMTYPE)
        link(tar, "b/4.jpg", "5.jpg", tarfile.SYMTYPE)  # of what comes later
        link(tar, "b/5.jpg", "../7.jpg", tarfile.SYMTYPE)
        link(tar, "6.jpg", "nowhere.jpg", tarfile.SYMTYPE)
        link(tar, "8.jpg", "8.jpg", tarfile.SYMTYPE)
        put(tar, "7.jpg", b"seven")
        for name in ("a/0", "1", "2", "b/3", "b/4", "b/5", "6", "7", "8"):
            if name != "a/0":
                put(tar, f"{name}.txt", name[-1:].encode())
    path = tmp_path / "a.tar"
    with pytest.warns(UserWarning, match="links to what is not in it .2, first: 6.jpg to nowhere"):
        rows = scan(path, tmp_path).tolist()
    data = path.read_bytes()
    seen = {data[r[2] : r[2] + 1]: data[r[0] : r[0] + r[1]] for r in rows}
    assert seen == {
        b"1": b"zero",
        b"2": b"zero",
        b"3": b"zero",
        b"4": b"seven",
        b"5": b"seven",
        b"7": b"seven",
    }  # fmt: skip  (./a/0.jpg and a/0.txt are two names)


def test_a_name_that_comes_twice_is_two_samples(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, text in (
            ("1.jpg", b""),
            ("1.TXT", b"0"),
            ("1.JPG", b""),
            ("1.txt", b"1"),
            ("2.jpg", b""),
            ("3.Jpeg", b""),
            ("2.txt", b"2"),
            ("3.txt", b"3"),
            ("1.jpg", b""),
            ("1.json", b"x"),
            ("1.txt", b"4"),
            ("1.jpg", b""),
        ):
            put(tar, name, text or b"abc")  # fmt: skip
    numbers, said = found(tmp_path / "a.tar")
    assert numbers == [0, 1, 2, 3, 4]
    assert said == [f"shards: {tmp_path}/a.tar has images without a caption (1.jpg)"]


def test_half_samples_are_told(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.jpg", "0.txt", "1.gif", "1.txt", "2.jpg", "2.cls", "3.tiff", "3.json"):
            put(tar, name, b"0")
        put(tar, "readme.md", b"of neither kind")
    numbers, said = found(tmp_path / "a.tar")
    assert numbers == [0]
    assert said == [
        f"shards: {tmp_path}/a.tar has captions without an image (2, first: 1.gif)",
        f"shards: {tmp_path}/a.tar has images without a caption (2.jpg)",
    ]


# Names


def test_names_with_pattern_letters_are_found(tmp_path):
    for folder in ("laion [aesthetic]", "what? *", "{old}", "odd {one", "a{b,c}"):
        here = tmp_path / folder
        here.mkdir()
        for number in range(3):
            (here / f"{number:04d}.tar").write_bytes(bytes(1024))
        names = [here / f"{number:04d}.tar" for number in range(3)]
        for pattern in (
            f"{here}/{{0000..0002}}.tar",
            f"{here}/*.tar",
            f"{here}/000[0-2].tar",
            names,
        ):
            assert expand(pattern) == names
        assert expand(names[1]) == expand(str(names[1])) == [names[1]]
    assert len(expand(f"{tmp_path}/*/000?.tar")) == 15
    (tmp_path / "[1].tar").write_bytes(b"")
    (tmp_path / "1.tar").write_bytes(b"")
    assert expand(tmp_path / "[1].tar") == [tmp_path / "[1].tar"]


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_a_name_in_other_bytes_is_a_shard_too(words, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    path = shard(folder / "0.tar", {**good([1, 2, 3]), "4.png": b"", "4.txt": b"number 4"})
    assert expand(f"{folder}/{{0..0}}.tar") == [path]
    batches = list(loader(path, words, tmp_path))
    assert all("0.tar, 4.png: " in batch.faults["image"].first for batch in batches if batch.faults)


def test_sparse_members_are_told(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        put(tar, "0.jpg")
        put(tar, "0.txt", b"0")
        put(tar, "1.jpg", type=tarfile.GNUTYPE_SPARSE)
        put(tar, "1.txt", b"1")
    numbers, said = found(tmp_path / "a.tar")
    assert numbers == [0]
    assert said[0] == f"shards: {tmp_path}/a.tar has sparse members, which are not read (1.jpg)"
    assert said[1:] == [f"shards: {tmp_path}/a.tar has captions without an image (1.txt)"]


def test_braces_are_bashs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [*"abc0123456", "x1", "x2", "008", "009", "010"]:
        Path(f"{name}.tar").write_bytes(b"")

    def names(pattern: str) -> list[str]:
        return [path.stem for path in expand(pattern)]

    assert names("{a..c}.tar") == ["a", "b", "c"]
    assert names("{0..6..2}.tar") == ["0", "2", "4", "6"]
    assert names("{3..1}.tar") == ["3", "2", "1"]
    assert names("{b,{0..1},x{1,2}}.tar") == ["b", "0", "1", "x1", "x2"]
    assert names("{008..10}.tar") == ["008", "009", "010"]
    assert names("x{1,2}.tar") == ["x1", "x2"]
    with pytest.raises(ValueError, match=r"shards: pattern must pair its braces, got 'x\{1.tar'"):
        expand("x{1.tar")


# Scans


@pytest.mark.parametrize(
    "damage",
    [
        lambda file, rows: file.write_bytes(file.read_bytes()[:-1]),
        lambda file, rows: file.write_bytes(file.read_bytes()[:200]),
        lambda file, rows: file.write_bytes(b""),
        lambda file, rows: np.save(file, rows + 1),
        lambda file, rows: np.save(file, rows.astype(np.float64)),
        lambda file, rows: np.save(file, np.full_like(rows, 2**60)),
        lambda file, rows: file.write_bytes(
            file.read_bytes().replace(rows.tobytes(), (rows + 1).tobytes())
        ),
        lambda file, rows: file.write_bytes(
            file.read_bytes().replace(b'"said": []', b'"said": 33')
        ),
        lambda file, rows: (file.unlink(), file.mkdir()),
    ],
    ids=["cut", "half", "empty", "offsets", "dtype", "outside", "bytes", "said", "folder"],
)
def test_a_scan_that_is_not_as_it_was_written_is_made_again(ten, damage):
    rows = scan(ten, ten.parent)
    (kept,) = (ten.parent / "shards").iterdir()
    damage(kept, rows)
    assert np.array_equal(scan(ten, ten.parent), rows)


def test_many_broken_shards_are_told_in_few_words(words, tmp_path):
    for number in range(30):
        files = {f"{number}.png": picture(), f"{number}.txt": b"number 1", "lone.txt": b"number 2"}
        shard(tmp_path / f"{number:02d}.tar", files)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loader(f"{tmp_path}/*.tar", words, tmp_path)
    assert len(said) == 21
    assert "10 more such sentences, the last: shards: " in str(said[-1].message)
    assert "29.tar has captions without an image (lone.txt)" in str(said[-1].message)


def test_a_scan_of_another_shard_is_not_taken(ten):
    rows = scan(ten, ten.parent)
    (mine,) = (ten.parent / "shards").iterdir()
    other = ten.with_name("other.tar")
    with tarfile.open(other, "w") as tar:
        put(tar, "long name.jpg", b"x" * 999)
        put(tar, "long name.txt", b"1")
    scan(other, ten.parent)
    (theirs,) = (file for file in (ten.parent / "shards").iterdir() if file != mine)
    mine.write_bytes(theirs.read_bytes())
    assert np.array_equal(scan(ten, ten.parent), rows)


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer(train_wordpiece([f"number {number}" for number in range(40)] * 3, 200))


def loader(pattern, words: Tokenizer, cache: Path, **change) -> ShardLoader:
    base = {"batch_size": 4, "image_size": 8, "context": 8, "steps": 3, "prefetch": 0, "seed": 1}
    return ShardLoader(pattern, words, cache=cache, **{**base, **change})


def shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            put(tar, name, data)
    return path


def good(numbers) -> dict[str, bytes]:
    return {f"{n}.{e}": d for n in numbers for e, d in
            (("png", picture(n)), ("txt", f"number {n}".encode()))}  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells its mappings there")
def test_shards_are_neither_mapped_nor_kept_open(words, tmp_path):
    paths = [shard(tmp_path / f"{i}.tar", good([i, i + 10])) for i in range(9)]
    for _ in range(2):  # scanned, then from the kept scans
        batches = loader(paths, words, tmp_path, window=2, steps=9)
        taken = list(batches)
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
        names = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                 if os.path.islink(f"/proc/self/fd/{fd}")]  # fmt: skip
        assert not any(str(tmp_path) in name for name in names)
        assert len(batches._scans) <= 4
    (tmp_path / "file").write_bytes(b"")
    uncached = loader(paths, words, tmp_path / "file", window=2, steps=9)
    for a, b in zip(taken, uncached, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.ids, b.ids)


# Samples


ODD = {
    "half": json.dumps({"caption": "number \ud83d 1"}).encode(),
    "pair": json.dumps({"caption": "number \U0001f600"}).encode(),
    "mark": b'\xef\xbb\xbf{"caption": "number 2"}',
    "wide": '{"caption": "number 3"}'.encode("utf-16"),
    "nul": json.dumps({"caption": "number \0\x01\x7f\x85\u2028 4"}).encode(),
}
WRONG = {
    "deep": b"[" * 200_000,
    "list": b'{"caption": ["number 1"]}',
    "null": b"null",
    "none": b'{"caption": null}',
    "digits": b'{"caption": ' + b"9" * 10_000 + b"}",
    "latin": b'{"caption": "caf\xe9"}',
    "nothing": b"",
}


def test_captions_of_every_encoding_are_read(words, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPA_CACHE", str(tmp_path))
    files = {}
    for name, data in ODD.items():
        files |= {f"{name}.png": picture(), f"{name}.json": data}
    texts = {"utf8": b"\xef\xbb\xbfnumber 5\r\n", "utf16": "number 6".encode("utf-16"),
             "big": b"\xfe\xff" + "number 7".encode("utf-16-be"),
             "long": b"number 8 " * 100_000}  # fmt: skip
    for name, data in texts.items():
        files |= {f"{name}.png": picture(), f"{name}.txt": data}
    path = shard(tmp_path / "a.tar", files)
    captions = first_captions(path)
    assert captions[0] == "number \ud83d 1"
    assert captions[2:4] == ["number 2", "number 3"]
    assert captions[5:8] == ["number 5", "number 6", "number 7"]
    assert len(captions[8]) == 899_999
    assert len(Tokenizer(train_wordpiece(captions, 60)).encode(captions, 8)[1]) == 10
    batches = list(loader(path, words, tmp_path, batch_size=9, steps=2))
    assert [batch.skipped for batch in batches] == [0, 0]
    assert read_pairs(path, 8)[1:] == ([[whole(one).strip() for one in captions]], 0)
    assert sum(len(one) for one in words._known) < 20_000  # what is remembered is cut


def test_what_one_sample_raises_is_counted_as_its_own(words, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPA_CACHE", str(tmp_path))
    files = {**good(range(4)), "large.png": b"", "large.txt": b"number 1"}
    for name, data in WRONG.items():
        files |= {f"{name}.png": picture(), f"{name}.json": data}
    head = picture()[:16] + (12000).to_bytes(4, "big") + (9000).to_bytes(4, "big")
    head += picture()[24:29]
    files["large.png"] = head + zlib.crc32(head[12:]).to_bytes(4, "big") + picture()[33:]
    path = shard(tmp_path / "a.tar", files)
    assert first_captions(path) == ["number 0", "number 1", "number 2", "number 3", "number 1"]
    with pytest.warns(UserWarning, match="6 by caption .first .*a.tar, deep.json: maximum recurs"):
        _, captions, skipped = read_pairs(path, 8)
    assert captions == [["number 0", "number 1"], ["number 1"], ["number 2"], ["number 3"]]
    assert skipped == 7  # a list of captions is read
    for workers in (0, 1):
        batches = list(loader(path, words, tmp_path, workers=workers, prefetch=2, steps=6))
        total = {}
        for batch in batches:
            for kind, fault in batch.faults.items():
                assert isinstance(fault, Fault)
                total[kind] = total.get(kind, 0) + fault.count
        assert set(total) == {"caption", "image size"}
        assert total["caption"] > 4 * total["image size"] > 0
        assert batches[-1].skipped == sum(total.values())
        first = batches[0].faults["caption"].first
        assert first.startswith(f"{path}, ")
        assert any(f"{name}.json: " in first for name in WRONG)


def test_a_caption_without_ids_is_its_samples_fault(tmp_path):
    model = tokenizers.models.WordLevel({"number": 0, "1": 1}, unk_token="1")
    plain = tokenizers.Tokenizer(model)
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    files = {**good([1, 2, 3]), "e.png": picture(), "e.txt": b" \n"}
    path = shard(tmp_path / "a.tar", files)
    batches = list(loader(path, Tokenizer(plain), tmp_path, steps=8))
    assert sum(batch.faults["caption"].count for batch in batches if batch.faults) >= 8
    assert "must give at least one token" in str([batch.faults for batch in batches])
    with pytest.raises(ValueError, match="context must be above its 2 special tokens"):
        loader(path, Tokenizer(train_wordpiece(["a"], 20)), tmp_path, context=2)


def test_a_shard_that_goes_away_is_counted(words, tmp_path):
    paths = [shard(tmp_path / f"{i}.tar", good([i, i + 10])) for i in range(3)]
    batches = loader(paths, words, tmp_path, steps=9)
    paths[1].unlink()
    assert sum(batch.faults["shard"].count for batch in batches if batch.faults) >= 9
    paths[2].write_bytes(paths[2].read_bytes()[:700])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        total = [batch.faults["shard"].first for batch in batches if batch.faults]
    assert any("2.tar" in first for first in total) or any("1.tar" in first for first in total)


@pytest.mark.parametrize(
    "change",
    [{"shift": 0.4}, {"rotate": 45.0}, {"warp": 0.3}, {"outline": 1.0}, {"mix": 0.5},
     {"scale": (1.5, 2.0)}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_strength_changes_shards_by_keyed_draws(words, tmp_path, change):
    random, files = np.random.default_rng(0), {}
    for number in range(4):
        file = io.BytesIO()
        pixels = random.integers(0, 255, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 30)).save(file, "PNG")
        files |= {f"{number}.png": file.getvalue(), f"{number}.txt": b"number"}
    path = shard(tmp_path / "a.tar", files)

    def batch(**how):
        plain = {"batch_size": 4, "image_size": 16}
        return loader(path, words, tmp_path, **{**plain, **how})[1].images

    how = Augmentation(**{"scale": (0.9, 1.0), **change})
    whole = batch(augmentation=how)
    assert not torch.equal(whole, batch(augmentation=Augmentation(scale=(0.9, 1.0))))
    assert torch.equal(whole, batch(augmentation=how))
    parts = [batch(augmentation=how, rank=rank, world_size=2) for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_run_says_on_the_screen_what_it_skips(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CLIPA_CACHE", str(tmp_path))
    files = {}
    for number in range(8):
        files[f"{number}.png"] = picture(number) if number % 2 else b"<html>"
        files[f"{number}.txt"] = b"number 1" if number % 4 != 1 else b"\xff"
    path = shard(tmp_path / "a.tar", files)
    flags = (
        "--stages.short.steps 4 --stages.full.steps 0 --stages.short.batch-size 4 "
        "--stages.short.warmup 1 --data.vocab-size 60 --run.log-every 2 "
        f"--run.precision fp32 --device cpu --data {path} --output {tmp_path / 'run'}"
    )
    train.main(flags.split())
    said = capfd.readouterr().err.splitlines()
    told = [line for line in said if "samples skipped" in line]
    assert [line.split(":")[0] for line in told] == ["short 2", "short 4"]
    for line in told:
        assert re.search(r" \d+ by image .first \S*a.tar, [0246].png: .*, \d by caption ", line)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert [set(row["skipped_by_kind"]) for row in rows] == [{"image", "caption"}] * 2
    assert rows[-1]["skipped"] == sum(sum(row["skipped_by_kind"].values()) for row in rows)

    shard(path, {name: data for name, data in files.items() if name[0] in "0246"})
    with pytest.raises(SystemExit) as end:
        train.main([*flags.split(), "--resume", "never", "--data.workers", "1"])
    assert re.match(r"train.py: ShardLoader: one of 100 .* got none; \S*a.tar, ", str(end.value))
    assert "Traceback" not in str(end.value)


def test_shards_refuse_a_blend(words, tmp_path):
    path = shard(tmp_path / "a.tar", good(range(3)))
    with pytest.raises(ValueError, match="augmentation must not blend.*got blend 0.5"):
        loader(path, words, tmp_path, augmentation=Augmentation(blend=0.5))
