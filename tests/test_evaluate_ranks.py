"""Evaluation by several processes: the figures of one, to the last digit; and in mid-stage."""

import io
import json

import pytest
from PIL import Image
from test_elastic import finished, logged
from test_evaluate import write_tar
from test_ranks import ROOT, end, member, port
from test_train import flags

SMALL = {"stages__short__steps": 4, "stages__full__steps": 2, "run__timeout": 60}
PICTURES = 300  # of each class
BATCH = {"stages__short__batch_size": 12, "stages__full__batch_size": 12}


def picture(place: int, i: int) -> Image.Image:
    red, blue = 255 - i * 255 // PICTURES, i * 255 // PICTURES
    colour = (red, blue, i % 3) if place == 0 else (i % 3, blue, red)
    return Image.new("RGB", (20, 24), colour)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of 300 pictures each, one of which cannot be read: three batches."""
    folder = tmp_path_factory.mktemp("photos")
    for place, name in enumerate(("red thing", "blue thing")):
        (folder / name).mkdir()
        for i in range(PICTURES):
            picture(place, i).save(folder / name / f"{i}.png")
    (folder / "red thing" / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A shard of the same with numbers of classes, one that cannot be read; and names, templates.

    Every third has two captions, and the last picture is the first once more.
    """
    folder, members = tmp_path_factory.mktemp("pairs"), []
    for place, i in [*((p, i) for i in range(PICTURES) for p in (0, 1)), (0, 0)]:
        file, key = io.BytesIO(), f"{place}-{len(members):05}"
        picture(place, i).save(file, "PNG")
        text = f"{('red', 'blue')[place]} {i % 97}" + "\na thing" * (i % 3 == 0)
        members += [(f"{key}.png", file.getvalue()), (f"{key}.txt", text.encode())]
        members += [(f"{key}.cls", b"%d" % (1 - place))]
    members += [("broken.png", b"no picture"), ("broken.txt", b"red"), ("broken.cls", b"1")]
    write_tar(folder / "0.tar", members)
    (folder / "names.txt").write_text("blue thing\nred thing\n")
    (folder / "templates.txt").write_text("a photo of a {}.\nthe {}\n{}\n")
    return folder


def asked(photos, pairs) -> dict:
    return {
        "run__eval_images": photos,
        "run__eval_shards": pairs / "0.tar",
        "run__eval_classes": pairs / "names.txt",
        "run__eval_prompts": pairs / "templates.txt",
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos, pairs):
    """A folder whose `out` is a run that one process made; and what it said."""
    folder = tmp_path_factory.mktemp("trained")
    words = flags("out", **SMALL, **BATCH, **asked(photos, pairs))
    (said,) = finished([member(0, 1, port(), words, folder)])
    return folder, said


def test_three_processes_give_the_figures_of_one(trained, photos, pairs):
    """With workers too: images, their classes, retrieval, the loss, and what is skipped."""
    (first, told), words = trained, flags("out", **SMALL, **BATCH, **asked(photos, pairs))
    true = json.loads((first / "out" / "results.json").read_text())["stages"]
    assert true["full"]["images: photos0"]["n"] == 2 * PICTURES
    assert true["full"]["images: photos0"]["skipped"] == 1
    expected = {"n": 2 * PICTURES, "skipped": 1, "loss_batch": 12}
    assert true["full"]["shards: 0.tar"].items() >= expected.items()
    assert 0 < true["full"]["shards: 0.tar"]["loss"] < 20
    expected = {"n": 2 * PICTURES, "skipped": 1, "chance": 1 / 2}
    assert true["full"]["classes: 0.tar"].items() >= expected.items()
    assert told.count("embedded drawings: 32 x 32 pixels, 17 image tokens") == 2  # a stage each
    assert told.count("3 templates x 2 classes; n 600, skipped 1; decoded by 1 process") == 4
    size, at = 3, port()  # which go on from the finished run, and evaluate it anew
    (first / "out" / "results.json").unlink()
    words += ["--data.workers", "1"]
    said = finished([member(rank, size, at, words, first) for rank in range(size)])
    assert "resumed at step 2 of stage full" in said[0] and said[1] == ""
    assert "loss of 50 batches of 12 pairs; n 600, skipped 1; decoded by 3 pr" in said[0]
    assert "3 processes x 1 worker" in said[0]
    assert json.loads((first / "out" / "results.json").read_text())["stages"] == true


def test_looks_in_mid_stage_change_no_loss(tmp_path):
    every = {"stages__short__steps": 5, "stages__full__steps": 0, "run__log_every": 1}
    for name, more in (("plain", {}), ("looked", {"run__eval_every": 2})):
        words = flags("out", **SMALL | BATCH | every | more)
        finished([member(0, 1, port(), words, tmp_path / name)])
    assert logged(tmp_path / "plain") == logged(tmp_path / "looked")
    lines = (tmp_path / "looked" / "out" / "evaluations.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["stage"], row["step"]) for row in rows] == [("short", 2), ("short", 4)]
    assert all(0 <= row["figures"]["new concepts"]["top1"] <= 1 for row in rows)


def test_the_program_shares_the_work(trained, photos):
    """evaluate.py by two processes prints, once, what it prints by one."""
    words = ["out", "--images", str(photos), "--json", "--batch-size", "50"]
    (one,) = finished([member(0, 1, port(), words, trained[0], "evaluate.py")])
    at = port()
    two = finished([member(rank, 2, at, words, trained[0], "evaluate.py") for rank in (0, 1)])
    assert json.loads(two[0]) == json.loads(one) and two[1] == ""


def test_the_program_tells_each_set(trained, photos, pairs):
    words = ["out", "--images", str(photos), "--shards", str(pairs / "0.tar"), "--workers", "1"]
    words += ["--classes", str(pairs / "names.txt"), "--prompts", str(pairs / "templates.txt")]
    at = port()
    said = finished([member(rank, 2, at, words, trained[0], "evaluate.py") for rank in (0, 1)])
    told = "3 templates x 2 classes; n 600, skipped 1; decoded by 2 processes x 1 worker"
    assert said[0].count(told) == 2 and said[1] == ""
    assert "samples are left out: 1 by image (first " in said[0]
    assert "  chance  loss" in said[0]


SHARE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from data import folders, shards
from data.classes import Names
from data.text import Tokenizer, train_wordpiece
from models import build
from training.distributed import setup
from training.evaluation import Encoder, evaluate
from training.report import sentences

decoded, true = [], folders.decode_square

def spy(data, *args, **how):
    decoded.append(data)
    return true(data, *args, **how)

folders.decode_square = shards.decode_square = spy
with sentences("share"):
    world = setup("cpu", threads=1, timeout=60)
    if sys.argv[2] == "fail":
        def make(number):
            if number == 1:
                raise ValueError("make: number must not be 1, got 1")
            return number
        world.together(lambda: world.share(6, make))
    torch.manual_seed(0)
    sizes = dict(vision=dict(image_size=16), text=dict(context=12, vocab_size=80))
    model = build("demo", 8, **sizes, logit_bias=-10.0).eval()
    tokenizer = Tokenizer(train_wordpiece(["red thing", "blue thing"], 80))
    encoder = Encoder(model, tokenizer, world.device, batch_size=16, world=world)
    figures = {}
    for kind, path in (("images", sys.argv[3]), ("shards", sys.argv[4])):
        decoded.clear()
        how = dict(classes=Names(("blue thing", "red thing")), loss_batch=50)
        found, _ = evaluate(encoder, None, **{kind: path}, **how)
        figures |= found
        shares = world.share(world.size, lambda _: len(decoded))
        figures[kind] = shares
    world.print(json.dumps(figures))
    world.close()
"""


@pytest.fixture(scope="module")
def share(tmp_path_factory):
    path = tmp_path_factory.mktemp("share") / "share.py"
    path.write_text(SHARE)

    def started(size: int, *words: str):
        at, given = port(), [str(ROOT), *words]
        return [member(rank, size, at, given, path.parent, str(path)) for rank in range(size)]

    return started


def test_each_process_decodes_its_own_share_alone(share, photos, pairs):
    """In batches of 16, of which 3 processes take 13, 13 and 12; a broken picture is met once."""
    words = ("look", str(photos), str(pairs / "0.tar"))
    one, three = (json.loads(finished(share(size, *words))[0].splitlines()[-1]) for size in (1, 3))
    for kind, count in (("images", 601), ("shards", 602)):
        assert one.pop(kind) == [count]
        shares = three.pop(kind)
        assert sum(shares) == count and max(shares) <= 13 * 16
    assert one == three and one["shards: 0.tar"]["loss_batch"] == 50
    assert one["images: photos0"]["skipped"] == one["shards: 0.tar"]["skipped"] == 1


def test_what_fails_on_one_process_ends_all(share):
    said = end(share(3, "fail"))
    assert said.pop(1) == "share: make: number must not be 1, got 1\n"  # once
    ends = "ends: another process met an error, and tells it\n"
    assert said == [f"rank {rank} {ends}" for rank in (0, 2)]


def test_without_names_all_processes_end_at_once(tmp_path):
    """Each with the sentence, before it waits for the others."""
    words = flags("out", **SMALL, **BATCH, run__eval_classes="nowhere.txt")
    at = port()
    for said in end([member(rank, 2, at, words, tmp_path) for rank in (0, 1)]):
        assert said == (
            "train.py: evaluate: classes must be imagenet or a file of names, one a line, "
            "got 'nowhere.txt'\n"
        )
