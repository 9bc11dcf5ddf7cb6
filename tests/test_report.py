"""The bar, the log, the rates, the results and the picture."""

import io
import json
import math

import pytest
import torch

from training.report import (
    JsonLines,
    Meter,
    ProgressBar,
    peak_flops,
    peak_flops_of,
    peak_memory,
    picture,
    read_rows,
    sentences,
    summary,
    write_results,
)


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_meter_counts_rates_and_waiting():
    clock = Clock()
    meter = Meter(clock)
    for _ in range(4):
        with meter.waiting():
            clock.now += 0.5
        clock.now += 1.5
        meter.add(samples=100, tokens=600)
    assert meter.read() == {"samples_per_s": 50.0, "tokens_per_s": 300.0, "data_wait": 0.25}
    clock.now += 1.0  # a new window starts at the reading
    meter.add(samples=10, tokens=10)
    assert meter.read()["samples_per_s"] == 10.0


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("AMD Instinct MI300X", 1307),
        ("GeForce GT 710", None),
    ],
)
def test_peak_flops_of(name, tflops):
    peak = peak_flops_of(name, torch.bfloat16)
    assert peak == (tflops and tflops * 1e12)
    if tflops:
        assert peak_flops_of(name, torch.float32) < peak


def test_peak_of_a_cpu_is_not_known_but_its_memory_is():
    assert peak_flops("cpu", torch.float32) is None
    assert 10**7 < peak_memory(torch.device("cpu")) < 10**12


def test_bar_on_a_terminal():
    stream = Terminal()
    bar = ProgressBar(10, start=4, name="short", stream=stream)
    bar.update(5, loss=1.25, samples_per_s=1234.0, tokens_per_s=5e6, data_wait=0.02)
    bar.message("saved")
    bar.update(10, loss=1.0)
    bar.close()
    shown = stream.getvalue()
    assert "short" in shown and "10/10" in shown and "saved\n" in shown
    assert "loss 1.250  1.2k samples/s  5.0M tokens/s  data wait 2%" in shown


def test_plain_lines_come_now_and_then_and_at_the_end():
    stream = io.StringIO()
    bar = ProgressBar(100, name="full", stream=stream, every=1e6)
    for step in range(1, 101):
        bar.update(step, loss=step / 100)
    bar.update(100)
    bar.close()
    assert stream.getvalue() == "full 1/100  loss 0.010\nfull 100/100  loss 1.000\n"


def test_other_ranks_show_nothing():
    for stream in (Terminal(), io.StringIO()):
        bar = ProgressBar(10, enabled=False, stream=stream)
        bar.update(10, loss=1.0)
        bar.message("hello")
        bar.close()
        assert stream.getvalue() == ""


def test_summary_leaves_out_what_is_not_known():
    assert summary({"loss": None, "samples_per_s": 12.0}) == "12 samples/s"
    assert summary({}) == ""


def test_log_goes_on_where_the_checkpoint_was(tmp_path):
    path = tmp_path / "run" / "log.jsonl"
    log = JsonLines(path, STAGES)
    for step in (10, 20, 30):
        log.write(stage="short", step=step, loss=torch.tensor(1.5), mfu=None)
    log.write(stage="full", step=10, loss=1.0)
    log.close()
    with open(path, "a") as file:
        file.write('{"stage": "full", "st')  # a kill in the middle of a line

    log = JsonLines(path, STAGES, resume=("short", 20))
    log.write(stage="short", step=30, loss=0.5)
    log.close()
    rows = read_rows(path)
    assert [(row["stage"], row["step"], row["loss"]) for row in rows] == [
        ("short", 10, 1.5),
        ("short", 20, 1.5),
        ("short", 30, 0.5),
    ]
    assert rows[0]["mfu"] is None and rows[0]["time"] > 1e9
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_log_keeps_the_first_stage_when_the_second_resumes(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl", STAGES)
    log.write(stage="short", step=500, loss=2.0)
    log.write(stage="full", step=10, loss=1.0)
    log.write(stage="full", step=20, loss=1.0)
    log.close()
    JsonLines(tmp_path / "log.jsonl", STAGES, resume=("full", 10)).close()
    kept = [(row["stage"], row["step"]) for row in read_rows(tmp_path / "log.jsonl")]
    assert kept == [("short", 500), ("full", 10)]


def test_new_run_empties_the_log(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl", STAGES)
    log.write(stage="short", step=1, loss=1.0)
    log.close()
    JsonLines(tmp_path / "log.jsonl", STAGES).close()
    assert read_rows(tmp_path / "log.jsonl") == []
    assert read_rows(tmp_path / "missing.jsonl") == []


def test_log_stays_json_when_the_loss_is_not_finite(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl", STAGES)
    log.write(stage="short", step=1, loss=math.nan, scale=torch.tensor(math.inf))
    log.close()
    (row,) = read_rows(tmp_path / "log.jsonl")
    assert row["loss"] is None and row["scale"] is None
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


STAGES = ("short", "full")
FIGURES = {"top1": 0.5, "top5": 0.7, "n": 191, "chance": 1 / 191}
RESULTS = {
    "seconds": {"short": 80.0, "full": 20.0},
    "stages": {"short": {"held-out": FIGURES}, "full": {"held-out": FIGURES | {"top1": 0.55}}},
}


def test_results_are_written_whole(tmp_path):
    write_results(tmp_path / "run" / "results.json", RESULTS)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == RESULTS
    assert len(list((tmp_path / "run").iterdir())) == 1


@pytest.mark.parametrize("lacks", ["n", "chance"])
def test_results_need_their_chance(lacks, tmp_path):
    figures = {name: value for name, value in FIGURES.items() if name != lacks}
    with pytest.raises(ValueError, match="short, new must hold n and chance, got top1, top5"):
        write_results(tmp_path / "results.json", {"stages": {"short": {"new": figures}}})
    assert not list(tmp_path.iterdir())


def read_png(path) -> torch.Tensor:
    """Pixels as int64 [height, width, 3]."""
    from matplotlib.image import imread

    return (torch.from_numpy(imread(path)[..., :3]) * 255).round().long()


def share_of(pixels: torch.Tensor, colour: str) -> float:
    rgb = torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return (pixels == rgb).all(-1).float().mean().item()


RIGHT, WRONG = "#1a7f4b", "#c8402f"


def draw(path, chosen: list[str], actual: list[str], results: dict = RESULTS) -> torch.Tensor:
    rows = [{"stage": "short", "step": step, "loss": 5 - step / 10} for step in range(1, 40)]
    rows += [{"stage": "full", "step": step, "loss": 1.0} for step in range(1, 9)]
    rows.append({"stage": "full", "step": 9, "loss": None})
    images = torch.full((len(chosen), 16, 16, 3), 255, dtype=torch.uint8)
    picture(path, rows=rows, results=results, images=images, chosen=chosen, actual=actual)
    return read_png(path)


def test_picture_marks_right_and_wrong(tmp_path):
    right = draw(tmp_path / "right.png", ["dog"] * 9, ["dog"] * 9)
    wrong = draw(tmp_path / "wrong.png", ["a $cat_ of $5"] * 9, ["dog"] * 9)
    assert right.shape == wrong.shape and right.shape[1] == 1560
    assert share_of(right, RIGHT) > 10 * share_of(wrong, RIGHT)
    assert share_of(wrong, WRONG) > 2 * share_of(right, WRONG)  # chance lines are red too
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("case", ["no-pictures", "no-results", "one-stage", "long-name"])
def test_picture_of_little(case, tmp_path):
    results = {"no-results": {}, "one-stage": {"stages": {"full": RESULTS["stages"]["full"]}}}
    names = {"no-pictures": [], "long-name": ["word " * 400]}.get(case, ["dog"] * 30)
    pixels = draw(tmp_path / "report.png", names, names, results.get(case, RESULTS))
    assert pixels.min() < 60  # there is ink


def test_picture_refuses(tmp_path):
    image = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    common = {"rows": [], "results": {}, "chosen": ["a"], "actual": ["a"]}
    with pytest.raises(TypeError, match="images must be uint8, got torch.float32"):
        picture(tmp_path / "r.png", images=image.float(), **common)
    with pytest.raises(ValueError, match=r"images must be \[n, S, S, 3\], got \(1, 3, 8, 8\)"):
        picture(tmp_path / "r.png", images=image.permute(0, 3, 1, 2), **common)
    with pytest.raises(ValueError, match="one name of each kind an image, got 2 images, 1 chosen"):
        picture(tmp_path / "r.png", images=image.repeat(2, 1, 1, 1), **common)
    assert not list(tmp_path.iterdir())


ENDS = {
    "value": (ValueError("lr must be"), "lr must be"),
    "file": (FileNotFoundError(2, "No such file", "a.tar"), "No such file.*a.tar"),
    "house": (RuntimeError("save: the disk must have room,\ngot 0 bytes"), "save: the disk"),
    "memory": (torch.OutOfMemoryError("CUDA out of memory. Tried"), "must fit in memory, got CUDA"),
    "no words": (MemoryError(), "must fit in memory, got MemoryError"),
    "loader's process": (
        RuntimeError(
            "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent "
            "call last):\n  File x\nRuntimeError: scan: a tar must be whole, got half"
        ),
        "scan: a tar must be whole, got half$",
    ),
}


@pytest.mark.parametrize(("error", "says"), ENDS.values(), ids=ENDS)
def test_errors_that_a_user_can_mend_are_sentences(error, says):
    with pytest.raises(SystemExit, match=rf"^program: .*{says}"), sentences("program"):
        raise error


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 cannot be multiplied"), KeyError("a"), NotImplementedError("b")],
    ids=["torch's", "key", "not there"],
)
def test_faults_of_the_program_keep_their_traceback(error):
    with pytest.raises(type(error)), sentences("program"):
        raise error
