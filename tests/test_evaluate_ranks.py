"""Evaluation by several processes: the figures of one, to the last digit; and in mid-stage."""

import json

import pytest
from PIL import Image
from test_elastic import finished, logged
from test_ranks import member, port
from test_train import flags

SMALL = {"stages__short__steps": 4, "stages__full__steps": 2, "run__timeout": 60}
BATCH = {"stages__short__batch_size": 12, "stages__full__batch_size": 12}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of 40 pictures each, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    for place, name in enumerate(("red thing", "blue thing")):
        (folder / name).mkdir()
        for i in range(40):
            colour = (255 - 3 * i, 2 * i, 3) if place == 0 else (3, 2 * i, 255 - 3 * i)
            Image.new("RGB", (20, 24), colour).save(folder / name / f"{i}.png")
    (folder / "red thing" / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos):
    """A folder whose `out` is a run that one process made."""
    folder = tmp_path_factory.mktemp("trained")
    words = flags("out", **SMALL, **BATCH, run__eval_images=photos)
    finished([member(0, 1, port(), words, folder)])
    return folder


def test_three_processes_give_the_figures_of_one(trained, photos):
    first, words = trained, flags("out", **SMALL, **BATCH, run__eval_images=photos)
    true = json.loads((first / "out" / "results.json").read_text())["stages"]
    assert true["full"]["images: photos0"]["n"] == 80
    assert true["full"]["images: photos0"]["skipped"] == 1
    size, at = 3, port()  # which go on from the finished run, and evaluate it anew
    (first / "out" / "results.json").unlink()
    said = finished([member(rank, size, at, words, first) for rank in range(size)])
    assert "resumed at step 2 of stage full" in said[0] and said[1] == ""
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
    words = ["out", "--images", str(photos), "--json"]
    (one,) = finished([member(0, 1, port(), words, trained, "evaluate.py")])
    at = port()
    two = finished([member(rank, 2, at, words, trained, "evaluate.py") for rank in (0, 1)])
    assert json.loads(two[0]) == json.loads(one) and two[1] == ""
