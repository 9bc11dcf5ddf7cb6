"""Folders, tables and the drawings as shards: read back by the loader's own scan."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from data.emoji import load_emoji
from data.index import read_table
from data.shards import read_pairs, scan
from data.write import main, write_shards


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 8), (level,) * 3).save(file, "PNG")
    return file.getvalue()


def held(folder) -> dict[str, bytes]:
    """All files of all shards."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                found[member.name] = tar.extractfile(member).read()
    return found


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "b").mkdir(parents=True)
    for name, level in (("1.png", 10), ("2.PNG", 20), ("b/3.jpeg", 30), ("4.png", 40)):
        (folder / name).write_bytes(png(level))
    (folder / "1.txt").write_text("one")
    (folder / "2.json").write_text('{"caption": "two"}')
    (folder / "b" / "3.txt").write_bytes("drei, \u00fc".encode())
    (folder / "4.md").write_text("no caption")
    return folder


def test_a_folder_becomes_shards(photos, tmp_path, capsys):
    out = tmp_path / "shards"
    main([str(photos), str(out), "--samples", "2"])
    assert capsys.readouterr().out == f"3 samples, and sizes.json, in {out}\n"
    assert read_table(out) == {"00000.tar": 2, "00001.tar": 1}
    assert held(out) == {
        "000000000.png": png(10), "000000000.txt": b"one",
        "000000001.png": png(20), "000000001.json": b'{"caption": "two"}',
        "000000002.jpeg": png(30), "000000002.txt": "drei, \u00fc".encode(),
    }  # fmt: skip
    images, captions, skipped = read_pairs(f"{out}/{{00000..00001}}.tar", 8)
    assert captions == [["one"], ["two"], ["drei, \u00fc"]] and not skipped
    assert images[:, 0, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_a_table_becomes_shards(photos, tmp_path, ending):
    rows = [
        ("1.png", 'a "boat", red'),
        ("b/3.jpeg", "two\nlines"),
        ("none.png", "x"),
        ("4.png", ""),
    ]
    table = tmp_path / "photos" / f"list.{ending}"
    if ending == "parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        columns = dict(zip(("filepath", "title"), map(list, zip(*rows, strict=True)), strict=True))
        parquet.write_table(arrow.table(columns | {"size": [1, 2, 3, 4]}), table)
    else:
        import csv

        with table.open("w", newline="") as file:
            lines = csv.writer(file, delimiter="," if ending == "csv" else "\t")
            lines.writerows([("Title", "filepath"), *(row[::-1] for row in rows)])
    main([str(table), str(tmp_path / "shards")])
    found = held(tmp_path / "shards")
    assert [data for name, data in found.items() if name.endswith("txt")] == [
        b'a "boat", red', b"two\nlines"
    ]  # fmt: skip
    assert read_table(tmp_path / "shards") == {"00000.tar": 2}


def test_the_drawings_become_shards(tmp_path):
    main(["--embedded", str(tmp_path / "a"), "--samples", "2000"])
    pairs, found = load_emoji(), held(tmp_path / "a")
    assert sum(read_table(tmp_path / "a").values()) == len(pairs.train) == len(found) // 2
    place = pairs.train[2500]
    with Image.open(io.BytesIO(found["000002500.png"])) as image:
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    assert torch.equal(pixels.view(72, 72, 3), pairs.images[place])
    assert found["000002500.txt"].decode() == pairs.names[int(pairs.concept[place])]
    assert len(scan(tmp_path / "a" / "00001.tar", tmp_path)) == len(pairs.train) - 2000
    main(["--embedded", str(tmp_path / "b"), "--samples", "2000"])
    for name in ("00000.tar", "00001.tar", "sizes.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_stop_leaves_whole_shards(tmp_path):
    def samples():
        yield from ({"png": png(i), "txt": b"a"} for i in range(3))
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write_shards(samples(), tmp_path / "out", per_shard=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00000.tar"]


def test_what_will_not_do_is_told(photos, tmp_path):
    out = str(tmp_path / "out")
    (tmp_path / "names.csv").write_text("url,caption\nx,y\n")
    (tmp_path / "empty").mkdir()
    for words, says in (
        ([str(photos)], "must be a folder or table and another folder, got"),
        (["--embedded", "a", "b"], "must be the shards' folder, got"),
        ([str(tmp_path / "none"), out], "the source must be a folder, or a table that ends in"),
        ([str(tmp_path / "names.csv"), out], "must have a column filepath or .* got url, caption"),
        ([str(tmp_path / "empty"), out], "must hold images with captions, got none"),
        ([str(photos), str(photos)], "must be a new or empty folder, got"),
        (
            [str(photos), out + "2", "--samples", "0"],
            "samples of a shard must be at least 1",
        ),
    ):
        with pytest.raises(SystemExit, match=rf"^data\.write: write: .*{says}"):
            main(words)


def test_a_name_of_a_sample_is_its_place(tmp_path):
    assert (
        write_shards([{"png": b"x", "json": json.dumps({"caption": "a"}).encode()}], tmp_path) == 1
    )
    assert list(held(tmp_path)) == ["000000000.png", "000000000.json"]
