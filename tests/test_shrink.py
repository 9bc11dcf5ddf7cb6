"""Shards with small pictures: what stays, what shrinks, what is damaged."""

import io
import tarfile

import pytest
import torch
from PIL import Image
from test_write import held

from data.images import decode_square
from data.index import read_table
from data.shards import scan
from data.shrink import main
from data.write import add_member


def picture(size, kind="JPEG", **more) -> bytes:
    rows = torch.arange(size[1])[:, None, None] * 255 // size[1]
    pixels = rows.expand(size[1], size[0], 3).to(torch.uint8)  # dark at the top
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, kind, **more)
    return file.getvalue()


@pytest.fixture
def files():
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    return {
        "a/1.jpg": picture((300, 200)), "a/1.txt": b"wide", "a/1.json": b'{"url": "x"}',
        "a/2.PNG": picture((50, 400), "PNG"), "a/2.txt": "gro\u00df".encode(),
        "b/3.jpeg": picture((40, 60)), "b/3.txt": b"small already",
        "b/4.webp": b"<html>", "b/4.txt": b"not a picture",
        f"b/{'5' * 120}.jpg": picture((200, 200), exif=turned), f"b/{'5' * 120}.txt": b"long",
    }  # fmt: skip


def pack(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            add_member(tar, name, data)
    return path


def test_pictures_shrink_and_the_rest_stays(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CLIPA_CACHE", str(tmp_path / "cache"))
    path = pack(tmp_path / "0.tar", files)
    main([str(path), str(tmp_path / "small"), "--side", "64"])
    assert "1 shards, and sizes.json, in" in capsys.readouterr().out
    found = held(tmp_path / "small")
    assert [name.replace("5" * 120, "5") for name in found] == [
        "a/1.jpg", "a/1.txt", "a/1.json", "a/2.jpg", "a/2.txt", "b/3.jpeg", "b/3.txt",
        "b/4.webp", "b/4.txt", "b/5.jpg", "b/5.txt",
    ]  # fmt: skip
    for name, data in found.items():
        if name.startswith(("b/3", "b/4")) or not name.endswith("jpg"):
            assert data == files[name]
    sizes = [Image.open(io.BytesIO(data)).size for name, data in found.items() if "jpg" in name]
    assert sizes == [(96, 64), (50, 400), (64, 64)]  # 50 pixels are small already
    upright = Image.open(io.BytesIO(found[f"b/{'5' * 120}.jpg"]))
    assert upright.getexif().get(0x0112, 1) == 1 and upright.getpixel((32, 2))[0] > 240
    for name in ("a/1.jpg", f"b/{'5' * 120}.jpg"):
        now, then = (decode_square(data[name], 32, squash=True).int() for data in (found, files))
        assert (now - then).abs().max() <= 8
    assert read_table(tmp_path / "small") == {"0.tar": len(scan(path, tmp_path))} == {"0.tar": 5}


def test_a_run_that_was_stopped_goes_on(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CLIPA_CACHE", str(tmp_path / "cache"))
    for number in range(3):
        pack(tmp_path / f"{number}.tar", files)
    (tmp_path / "small").mkdir()
    done = pack(tmp_path / "small" / "1.tar", {"1.jpg": b"kept", "1.txt": b"kept"})
    main([f"{tmp_path}/{{0..2}}.tar", str(tmp_path / "small"), "--processes", "2"])
    out = capsys.readouterr().out
    assert out.startswith("2 shards") and "2 pictures could not be read" in out
    with tarfile.open(done) as tar:
        assert tar.getnames() == ["1.jpg", "1.txt"]
    assert read_table(tmp_path / "small") == {"0.tar": 5, "1.tar": 1, "2.tar": 5}


def test_a_damaged_tar_keeps_what_is_whole(files, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPA_CACHE", str(tmp_path / "cache"))
    path = pack(tmp_path / "0.tar", files)
    path.write_bytes(path.read_bytes().partition(b"IEND")[0])
    with pytest.warns(UserWarning, match="0.tar is read up to its damage"):
        main([str(path), str(tmp_path / "small")])
    assert 0 < read_table(tmp_path / "small")["0.tar"] < 5


def test_what_will_not_do_is_told(files, tmp_path):
    path = pack(tmp_path / "0.tar", files)
    (tmp_path / "1.tar").write_text("no tar")
    for words, says in (
        (["none.tar", "x"], "must name files that are there"),
        ([str(tmp_path / "1.tar"), str(tmp_path / "x")], "1.tar must be an uncompressed tar, got"),
        ([str(path), str(tmp_path)], "the folder must be another than the shards', got"),
        ([str(path), "x", "--side", "0"], r"side must be in \[1, 4096\], got 0"),
        ([str(path), "x", "--quality", "101"], r"quality must be in \[1, 100\], got 101"),
    ):
        with pytest.raises(SystemExit, match=rf"^data\.shrink: \w+: .*{says}"):
            main(words)
    assert not (tmp_path / "x").exists() or not any((tmp_path / "x").iterdir())
