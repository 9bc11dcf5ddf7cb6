"""open_clip's ViT-B-16 with half of its patches dropped, before and after `accelerate`.

    pytest bench/bench_accelerate.py                 samples/s of training, both precisions

Both sides start from the same weights and get the same pairs; the one is open_clip's model,
PatchDropout(0.5) and ClipLoss, the other the same model accelerated with this library's ClipLoss.
Steps are forward and backward, in turn. On a CPU seconds are those of one thread of this process,
so that the machine's other work does not count.
"""

import copy
import statistics
import time

import pytest
import torch
from torch import Tensor, nn

from bench.measure import DEVICE, DTYPES
from clipa_kernels import ClipLoss, accelerate

open_clip = pytest.importorskip("open_clip")


def sides(depth: int) -> dict[str, tuple[nn.Module, nn.Module]]:
    """(model, loss) of open_clip and of this library."""
    torch.manual_seed(0)
    vision = dict(layers=depth, width=768, head_width=64, patch_size=16, patch_dropout=0.5)
    text = dict(layers=depth, width=512, heads=8)
    theirs = open_clip.model.CLIP(512, vision, text, output_dict=True).to(DEVICE)
    ours, _ = accelerate(copy.deepcopy(theirs))
    return {"open_clip": (theirs, open_clip.loss.ClipLoss()), "ours": (ours, ClipLoss())}


def pairs(batch: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(1, 49406, (batch, 77), device=DEVICE)
    return torch.randn(batch, 3, 224, 224, device=DEVICE), text


def test_both_sides_are_equal():
    """All patches kept, the same pairs give the same loss."""
    given = pairs(4)
    with torch.no_grad():
        losses = [loss(**model.eval()(*given)) for model, loss in sides(1).values()]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [16], ids=["batch16"])
@pytest.mark.parametrize("name", DTYPES)
def test_samples_per_second(benchmark, name, batch):
    given, both, dtype = pairs(batch), sides(12), DTYPES[name]
    clock = time.process_time if DEVICE == "cpu" else time.perf_counter
    threads = torch.get_num_threads()
    seconds: dict[str, list[float]] = {side: [] for side in both}

    def in_turn() -> None:
        for side, (model, loss) in both.items():
            start = clock()
            with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
                total = loss(**model.train()(*given))
            total.backward()
            model.zero_grad()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            seconds[side].append(clock() - start)

    try:
        torch.set_num_threads(1)
        benchmark.pedantic(in_turn, rounds=3, warmup_rounds=1)
    finally:
        torch.set_num_threads(threads)
    rates = {side: batch / statistics.median(times[1:] or times) for side, times in seconds.items()}
    ratio = rates["ours"] / rates["open_clip"]
    benchmark.extra_info |= {"samples/s": rates, "ratio": ratio, "device": DEVICE}
    said = ", ".join(f"{side} {rate:.2f}" for side, rate in rates.items())
    print(f"\n{name}: samples/s {said}, {ratio:.2f}x")
