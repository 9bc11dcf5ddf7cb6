"""A training step against open_clip's: its model, ClipLoss and PatchDropout, at 16 of 64 tokens.

    pytest bench/bench_train_step.py                 samples/s, both precisions, one run
    python -m bench.bench_train_step                 accuracy after equal samples, 3 seeds each

Both sides get the same uint8 images and captions, sizes, batch, AdamW and threads, and start from
the same weights. open_clip's side is what its user runs: images to float and normalised, captions
padded to the context, PatchDropout(0.75), ClipLoss. All figures are of this machine's CPU.
"""

import argparse
import json
import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipa_kernels import ClipLoss, random_patches, unpack
from clipa_kernels.packing import Packed
from data.batches import Batch
from data.emoji import FORMS, PROMPTS, EmojiLoader, EmojiPairs, load_emoji
from data.text import Tokenizer, train_wordpiece
from models import CLIP, build, load_weights
from training.evaluation import Encoder, evaluate_emoji

open_clip = pytest.importorskip("open_clip")

SIZE, PATCH, CONTEXT, DROP, VOCABULARY = 64, 8, 16, 0.75, 2000
WIDTH, DEPTH, TEXT_DEPTH, HEADS = 128, 4, 2, 2


def models() -> tuple[CLIP, nn.Module]:
    """Ours and open_clip's with the same weights."""
    theirs = open_clip.model.CLIP(
        embed_dim=WIDTH,
        vision_cfg=dict(
            layers=DEPTH, width=WIDTH, head_width=WIDTH // HEADS, patch_size=PATCH,
            image_size=SIZE, patch_dropout=DROP,
        ),
        text_cfg=dict(
            context_length=CONTEXT, vocab_size=VOCABULARY, width=WIDTH, heads=HEADS,
            layers=TEXT_DEPTH,
        ),
    )  # fmt: skip
    ours = build(
        "demo",
        PATCH,
        vision=dict(image_size=SIZE),
        text=dict(context=CONTEXT, vocab_size=VOCABULARY),
    )
    load_weights(ours, theirs.state_dict())
    return ours, theirs


class Ours:
    """A step of this project."""

    def __init__(self, model: CLIP):
        self.model, self.clip_loss, self.step = model, ClipLoss(), 0

    def loss(self, batch: Batch) -> Tensor:
        keep = random_patches(len(batch.images), (SIZE // PATCH,) * 2, DROP, seed=0, step=self.step)
        self.step += 1
        text = Packed(batch.ids, batch.cu_seqlens, batch.max_seqlen)
        return self.clip_loss(**self.model(batch.images.permute(0, 3, 1, 2), text, keep))


class OpenClip:
    """A step of open_clip."""

    def __init__(self, model: nn.Module):
        self.model, self.clip_loss = model, open_clip.loss.ClipLoss()
        self.mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
        self.std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)

    def loss(self, batch: Batch) -> Tensor:
        images = batch.images.permute(0, 3, 1, 2).float().div_(255).sub_(self.mean).div_(self.std)
        text = F.pad(
            unpack(Packed(batch.ids, batch.cu_seqlens, batch.max_seqlen)),
            (0, CONTEXT - batch.max_seqlen),
        )
        return self.clip_loss(*self.model(images, text))


def optimizer_of(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    groups = [[], []]
    for parameter in model.parameters():
        groups[parameter.ndim < 2].append(parameter)
    decay = [dict(params=groups[0], weight_decay=0.1), dict(params=groups[1], weight_decay=0.0)]
    return torch.optim.AdamW(decay, lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def train_one(side: Ours | OpenClip, optimizer: torch.optim.Optimizer, batch: Batch, dtype) -> None:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = side.loss(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        side.model.logit_scale.clamp_(0, 4.6052)


def data(seed: int, steps: int, batch_size: int) -> tuple[EmojiPairs, Tokenizer, EmojiLoader]:
    pairs = load_emoji()
    tokenizer = Tokenizer(train_wordpiece(pairs.training_captions(), VOCABULARY))
    loader = EmojiLoader(
        pairs,
        tokenizer,
        batch_size=batch_size,
        image_size=SIZE,
        context=CONTEXT,
        steps=steps,
        seed=seed,
        forms=FORMS[:1],
    )
    return pairs, tokenizer, loader


def test_both_sides_start_equal():
    """Without dropping, the same batch gives the same loss."""
    ours, theirs = models()
    theirs.eval()  # PatchDropout keeps all in eval mode
    batch = data(0, 1, 32)[2].batch(0)
    text = Packed(batch.ids, batch.cu_seqlens, batch.max_seqlen)
    with torch.no_grad():
        mine = ClipLoss()(**ours(batch.images.permute(0, 3, 1, 2), text))
        torch.testing.assert_close(mine, OpenClip(theirs).loss(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch_size", [256], ids=["batch256"])
def test_samples_per_second(benchmark, dtype, batch_size):
    """Steps of both sides in turn, so that the machine's other work meets both alike."""
    loader = data(0, 4, batch_size)[2]
    batches = [loader.batch(step) for step in range(4)]
    sides = [Ours(models()[0]), OpenClip(models()[1])]
    optimizers = [optimizer_of(side.model) for side in sides]
    seconds: dict[str, list[float]] = {"ours": [], "open_clip": []}
    for side in sides:
        side.model.train()

    def in_turn() -> None:
        for batch in batches:
            for name, side, optimizer in zip(seconds, sides, optimizers, strict=True):
                start = time.perf_counter()
                train_one(side, optimizer, batch, dtype)
                seconds[name].append(time.perf_counter() - start)

    in_turn()
    for values in seconds.values():
        values.clear()
    benchmark.pedantic(in_turn, rounds=5)
    rate = {name: batch_size / statistics.median(values) for name, values in seconds.items()}
    benchmark.extra_info |= {
        **{f"{name} samples/s": round(value) for name, value in rate.items()},
        "ratio": round(rate["ours"] / rate["open_clip"], 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }
    print(json.dumps(benchmark.extra_info))


def accuracy(side_name: str, seed: int, samples: int, batch_size: int) -> dict[str, float]:
    """Top-1 of a side after this many samples, all 64 tokens at evaluation; cosine to 0."""
    steps = samples // batch_size
    pairs, tokenizer, loader = data(seed, steps, batch_size)
    torch.manual_seed(seed)
    ours, theirs = models()
    side = Ours(ours) if side_name == "ours" else OpenClip(theirs)
    optimizer = optimizer_of(side.model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(
            (s + 1) / 50, 0.5 * (1 + torch.cos(torch.tensor(torch.pi * s / steps)).item())
        ),
    )
    side.model.train()
    for batch in loader:
        train_one(side, optimizer, batch, torch.float32)
        schedule.step()
    load_weights(ours, side.model.state_dict())  # one evaluation for both
    encoder = Encoder(ours.eval(), tokenizer, torch.device("cpu"))
    results, _ = evaluate_emoji(encoder, pairs, PROMPTS[:1])
    return {name: results[name]["top1"] for name in ("held-out drawings", "new concepts")}


def main() -> None:
    """Print top-1 after equal samples for each side and seed, and mean and spread over seeds."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--samples", type=int, default=49_152)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    flags = parser.parse_args()
    for name in ("ours", "open_clip"):
        runs = [accuracy(name, s, flags.samples, flags.batch_size) for s in range(flags.seeds)]
        for split in runs[0]:
            values = [100 * run[split] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            listed = ", ".join(f"{value:.1f}" for value in values)
            print(f"{name:10} {split:18} {statistics.mean(values):.1f} +- {spread:.1f} ({listed})")


if __name__ == "__main__":
    main()
