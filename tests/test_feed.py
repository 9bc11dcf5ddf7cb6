"""From a loader to the device: the order of copies, and colours that are drawn there."""

import io
import tarfile

import pytest
import torch
from configs import changed
from PIL import Image
from test_shards_damaged import put

from data.augment import Augmentation, recolour
from data.batches import Batch
from data.text import Tokenizer, train_wordpiece
from training.build import open_batches, to_device
from training.config import preset
from training.distributed import World
from training.feed import copied, fed

CPU = torch.device("cpu")
COLOURS = {
    "augment__brightness": 0.4,
    "augment__hue": 0.1,
    "augment__grey": 0.2,
    "augment__mix": 0.1,
    "augment__invert": 0.1,
}


def batches(count: int, size: int = 8) -> list[Batch]:
    return [
        Batch(
            torch.full((4, size, size, 3), number, dtype=torch.uint8),
            torch.arange(12) + number,
            torch.arange(0, 13, 3, dtype=torch.int32),
            3,
            first_sample=0,
            skipped=number,
        )
        for number in range(count)
    ]


def test_a_cpu_takes_batches_as_they_are():
    given = batches(3)
    assert all(a is b for a, b in zip(fed(given, CPU), given, strict=True))
    endless = fed(iter(lambda: given[0], None), CPU)  # none is asked for before its turn
    assert next(endless) is given[0]


class Noted:
    """A tensor or stream that writes down what is done to it."""

    def __init__(self, name: str, done: list[str]) -> None:
        self.name, self.done = name, done

    def pin_memory(self) -> "Noted":
        self.done.append(f"pin {self.name}")
        return Noted(f"pinned {self.name}", self.done)

    def to(self, device: torch.device, non_blocking: bool) -> "Noted":
        assert non_blocking
        self.done.append(f"copy {self.name}")
        return Noted(f"{self.name} on {device.type}", self.done)

    def wait_stream(self, other: "Noted") -> None:
        self.done.append(f"{self.name} waits for {other.name}")

    def record_stream(self, stream: "Noted") -> None:
        self.done.append(f"keep {self.name} for {stream.name}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch.cuda.stream takes streams alone")
def test_a_copy_is_waited_for_and_kept_for_the_step():
    done: list[str] = []
    names = ("images", "ids", "ends", "side", "main")
    images, ids, ends, side, here = (Noted(name, done) for name in names)
    batch = Batch(images, ids, ends, 3, 0, 0)
    out = copied(batch, torch.device("cuda"), side, here)
    assert done == [
        "pin images",
        "pin ids",
        "copy pinned images",
        "copy pinned ids",
        "main waits for side",
        "keep pinned images on cuda for main",
        "keep pinned ids on cuda for main",
        "pin ends",
    ]
    assert [out.images.name, out.ids.name] == ["pinned images on cuda", "pinned ids on cuda"]
    assert out.cu_seqlens.name == "pinned ends"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_whole_while_the_gpu_is_busy():
    device, seen = torch.device("cuda"), []
    work = torch.randn(2048, 2048, device=device)
    for batch in fed(batches(20, size=256), device):
        for _ in range(10):
            work = (work @ work).tanh()
        seen.append((batch.images.clone(), batch.ids.clone(), batch.cu_seqlens))
    for given, (images, ids, ends) in zip(batches(20, size=256), seen, strict=True):
        assert torch.equal(images.cpu(), given.images) and torch.equal(ids.cpu(), given.ids)
        assert torch.equal(ends, given.cu_seqlens) and ends.is_pinned()


@pytest.mark.parametrize("stage", ["short", "full"])
def test_colours_on_the_device_are_those_of_the_loader(tmp_path, monkeypatch, stage):
    monkeypatch.setenv("CLIPA_CACHE", str(tmp_path))
    noise = torch.randint(256, (20, 40, 30, 3), dtype=torch.uint8)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, pixels in enumerate(noise):
            file = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(file, "PNG")
            put(tar, f"{number}.png", file.getvalue())
            put(tar, f"{number}.txt", b"noise")
    config = changed(
        preset("emoji"),
        data__source=f"{tmp_path}/a.tar",
        stages__short__batch_size=8,
        stages__full__batch_size=8,
        stages__short__steps=5,
        **COLOURS,
    )
    tokenizer = Tokenizer(train_wordpiece(["noise"], 60))
    loader = open_batches(config, stage, None, tokenizer, World(0, 0, 1, CPU))
    step, first = 2, config.first_step(stage)
    there = loader[first + step]
    loader.colours = False
    plain = loader[first + step]
    assert there.coloured and not plain.coloured
    assert not torch.equal(there.images, plain.images)
    ours, theirs = (to_device(b, step, config, stage, CPU)[0] for b in (plain, there))
    assert torch.equal(ours, theirs)
    halves = [
        plain._replace(images=plain.images[rows], first_sample=rows.start)
        for rows in (slice(0, 4), slice(4, 8))
    ]
    parts = [to_device(half, step, config, stage, CPU)[0] for half in halves]
    assert torch.equal(torch.cat(parts), theirs)  # of two ranks


def test_colours_need_nothing_of_another_device():
    """On meta every operation between devices fails, and so does whatever reads a value."""
    images = torch.empty(4, 9, 9, 3, dtype=torch.uint8, device="meta")
    how = Augmentation(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1, grey=0.2, mix=0.1)
    out = recolour(images, how, seed=1, step=2, first_sample=3)
    assert (out.device.type, out.shape, out.dtype) == ("meta", images.shape, torch.uint8)
