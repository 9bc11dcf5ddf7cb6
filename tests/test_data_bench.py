"""data.bench: a row a stage, cores from their sum, and sentences for what will not do."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from test_shards_damaged import put

from data import bench
from data.text import Tokenizer, train_wordpiece

STAGES = ("read", "decode", "crop", "jitter", "tokenise")


@pytest.fixture
def shard(tmp_path, monkeypatch) -> Path:
    """300 samples, of which two cannot be read."""
    monkeypatch.setenv("CLIPA_CACHE", str(tmp_path))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(300):
            file = io.BytesIO()
            Image.new("RGB", (24, 18), (number % 256, 0, 0)).save(file, "JPEG")
            put(tar, f"{number}.jpg", b"<html>" if number == 7 else file.getvalue())
            put(tar, f"{number}.txt", b"\xff" if number == 270 else b"a picture")
    tokenizer = Tokenizer(train_wordpiece(["a picture"], 60))
    (tmp_path / "words.json").write_text(tokenizer.to_json())
    return tmp_path / "a.tar"


def run(shard: Path, *flags: str) -> None:
    words = () if "--tokenizer" in flags else ("--tokenizer", str(shard.with_name("words.json")))
    bench.main([str(shard), *words, *flags])


@pytest.mark.parametrize("change", [[], ["--augment.brightness", "0.3", "--augment.warp", "0.1"]])
def test_every_stage_is_timed_and_makes_the_sum(shard, capsys, change):
    run(shard, "--image-size", "16", "--gpu-images-per-s", "3000", *change)
    head, *rows, end = capsys.readouterr().out.splitlines()
    assert head.split() == ["us", "a", "sample", "samples/s"]
    spent = {row.split()[0]: float(row.split()[1].replace(",", "")) for row in rows}
    assert tuple(spent) == (*STAGES, "all")
    assert sum(spent[stage] for stage in STAGES) == pytest.approx(spent["all"], abs=0.5)
    assert min(spent[stage] for stage in ("read", "decode", "crop", "tokenise")) > 0
    cores = 3000 * spent["all"] / 1e6
    assert end.startswith("298 samples to 16 pixels on one core: a GPU that takes 3,000 images/s ")
    assert float(end.split()[-3]) == pytest.approx(cores, abs=0.06)


def test_only_as_many_samples_as_asked(shard, capsys):
    run(shard, "--samples", "5", "--image-size", "8")
    assert "\n5 samples to 8 pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--samples", "0"], "bench: samples must be above 0, got 0"),
        (["--gpu-images-per-s", "-1"], "gpu_images_per_s must be above 0, got -1.0"),
        (["--context", "2"], "context must be above its 2 special tokens"),
        (["--tokenizer", "nowhere.json"], "nowhere.json"),
        (None, "bench: samples of .*broken.tar must be readable, got none"),
    ],
)
def test_what_will_not_do_is_a_sentence(shard, flags, sentence):
    if flags is None:
        with tarfile.open(shard.with_name("broken.tar"), "w") as tar:
            put(tar, "1.jpg", b"")
            put(tar, "1.txt", b"x")
        shard, flags = shard.with_name("broken.tar"), []
    with pytest.raises(SystemExit, match=f"^data.bench: .*{sentence}"):
        run(shard, *flags)
