"""Train a CLIP with few tokens, then briefly with all of them.

    python train.py                                 the embedded drawings, on any machine
    torchrun --nproc_per_node 8 train.py --preset clipa-v1-b16 --data "shards/{0000..0999}.tar"

Every flag is a field of training/config.py's Config. A step, the loop of a stage, the stages.
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipa_kernels import Packed, contrastive_loss, sigmoid_loss
from clipa_kernels.masking import block_patches, grid_patches, random_patches
from data.augment import Augmentation
from data.batches import Batch, Fault, add_faults, describe_faults
from data.emoji import CAPTIONS, EmojiLoader, EmojiPairs, load_emoji
from data.shards import ShardLoader, first_captions
from data.text import Tokenizer, clip_bpe, load_tokenizer, train_wordpiece
from evaluate import Encoder, build_model, check_sets, evaluate, table
from models import CLIP, SIZES, forward_flops, load_weights
from training import checkpoint, report
from training.config import STAGES, Config, describe, parse, stages, validate
from training.distributed import World, autocast_dtype, check_impl, setup, world_size, wrap
from training.optim import (
    adamw,
    clamp_scale_,
    clip_gradients,
    learning_rate,
    set_learning_rate,
    unwrap,
)

_SHOWN = ("loss", "samples_per_s", "tokens_per_s", "data_wait")  # on the bar


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    step: int,
    stage: Config,
    world: World,
) -> dict[str, Tensor | int]:
    """One optimiser step, in time order; what it returns stays on the device but the tokens."""
    set_learning_rate(optimizer, step, stage)
    images, text, keep = to_device(batch, step, stage, world.device)
    dtype = autocast_dtype(stage.precision, world.device)
    with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
        if stage.accumulate == 1:
            out = model(images, text, keep)
            loss = pair_loss(stage, world, **out)
            loss.backward()
        else:
            ends = batch.cu_seqlens.tolist()  # on the host: nothing waits for the device
            out, loss = accumulated(model, images, text, keep, ends, stage, world)
    norm = clip_gradients(model.parameters(), stage.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    clamp_scale_(model, stage)
    patches = (stage.image_size // stage.patch_size) ** 2 if keep is None else keep.shape[1]
    return {
        "loss": loss.detach(),
        "grad_norm": norm,
        "scale": out["logit_scale"].detach(),
        "tokens": len(images) * (1 + patches) + len(text.tokens),
    }


def to_device(
    batch: Batch, step: int, stage: Config, device: torch.device
) -> tuple[Tensor, Packed, Tensor | None]:
    """Images [B, 3, S, S] as a view, packed ids, and the kept patches [B, K] (None: all)."""
    images = batch.images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    ids = batch.ids.to(device, non_blocking=True)
    text = Packed(ids, batch.cu_seqlens.to(device, non_blocking=True), batch.max_seqlen)
    grid = (stage.image_size // stage.patch_size,) * 2
    seed = stage.seed + STAGES.index(stage.stage)  # the second stage's masks are new ones
    key = dict(seed=seed, step=step, first_sample=batch.first_sample, device=device)
    if stage.image_mask == "random":
        return images, text, random_patches(len(images), grid, stage.image_drop, **key)
    if stage.image_mask == "grid":
        return images, text, grid_patches(len(images), grid, **key)
    if stage.image_mask == "block":
        return images, text, block_patches(len(images), grid, stage.image_drop, **key)
    return images, text, None


def pair_loss(stage: Config, world: World, **out: Tensor) -> Tensor:
    """The stage's loss over all processes; DDP's mean makes its gradients the whole batch's."""
    function = sigmoid_loss if stage.loss == "sigmoid" else contrastive_loss
    features = (out["image_features"], out["text_features"])
    group = dist.group.WORLD if world.size > 1 else None
    return function(*features, out["logit_scale"], out.get("logit_bias"), group=group)


def accumulated(
    model: nn.Module,
    images: Tensor,
    text: Packed,
    keep: Tensor | None,
    ends: list[int],
    stage: Config,
    world: World,
) -> tuple[dict[str, Tensor], Tensor]:
    """Forward and backward in parts, with the negatives of the whole batch (Gao et al. 2101.06983).

    Features are computed without a graph, the loss gives their gradients, and each part is computed
    again to pass them on. Masks are given, so both passes see the same tokens. ends: cu_seqlens.
    """
    size = len(images) // stage.accumulate
    parts = []
    for a in range(0, len(images), size):
        cu_seqlens = text.cu_seqlens[a : a + size + 1] - ends[a]
        part = Packed(text.tokens[ends[a] : ends[a + size]], cu_seqlens, text.max_seqlen)
        parts.append((images[a : a + size], part, None if keep is None else keep[a : a + size]))
    with torch.no_grad():
        outs = [unwrap(model)(*part) for part in parts]
    whole = dict(outs[0])
    for name in ("image_features", "text_features"):
        whole[name] = torch.cat([out[name] for out in outs])
    whole = {name: value.requires_grad_() for name, value in whole.items()}
    loss = pair_loss(stage, world, **whole)
    loss.backward()
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = last
        out = model(*part)
        rows = slice(index * size, (index + 1) * size)
        grads = {n: whole[n].grad[rows] for n in ("image_features", "text_features")}
        for name in out.keys() - grads.keys():  # scale and bias: once
            grads[name] = whole[name].grad if last else torch.zeros_like(whole[name])
        torch.autograd.backward([out[n] for n in grads], list(grads.values()))
    return whole, loss


@dataclass
class Run:
    """What the stages share."""

    config: Config
    world: World
    stop: checkpoint.StopSignal
    pairs: EmojiPairs | None  # None: shards
    tokenizer: Tokenizer
    log: report.JsonLines | None  # of rank 0
    metrics: dict  # seconds and figures of each stage so far
    shown: dict | None = None  # pictures of the last evaluation, with the names chosen

    def save(self, stage: Config, model: CLIP, optimizer: torch.optim.Optimizer, done: int) -> None:
        """Write a checkpoint, on rank 0, if there is nothing but finite numbers to write."""
        checkpoint.check_finite(model, optimizer, stage, done)
        if self.world.is_main:
            state = checkpoint.pack_state(
                model,
                optimizer,
                stage,
                step=done,
                tokenizer=self.tokenizer.to_json(),
                metrics=self.metrics,
            )
            checkpoint.save(self.config.output, state, done, keep=self.config.keep_checkpoints)


def run_stage(
    run: Run, stage: Config, model: CLIP, optimizer: torch.optim.Optimizer, done: int, first: int
) -> int:
    """Train from step `done` of a stage whose own step 0 is step `first` of the run's data.

    Returns the steps done: all of them, or fewer if a signal said to stop.
    """
    world, seconds, began = run.world, run.metrics["seconds"], time.perf_counter()
    before = seconds.get(stage.stage, 0.0)
    wrapped = wrap(model, stage, world)
    stream = iter(open_batches(run, stage, first + done, first + stage.steps))
    bar = report.ProgressBar(stage.steps, start=done, name=stage.stage, enabled=world.is_main)
    meter, faults = report.Meter(), {}
    model.train()
    while done < stage.steps:
        with meter.waiting():
            batch = next(stream)
        values = train_step(wrapped, optimizer, batch, done, stage, world)
        done += 1
        meter.add(stage.batch_size, round(values["tokens"] * world.size))
        faults, shown = add_faults(faults, batch.faults), {}
        if done % stage.log_every == 0 or done == stage.steps:
            row = log_step(run, stage, done, values, meter, batch, model, faults)
            if faults:  # of this process's share since the last line
                bar.message(f"{stage.stage} {done}: samples skipped: {describe_faults(faults)}")
            faults = {}
            shown = {name: row[name] for name in _SHOWN}
        bar.update(done, **shown)
        seconds[stage.stage] = before + time.perf_counter() - began
        # Processes agree to stop at every tenth step; agreeing makes each wait for the others.
        stopping = (world.size == 1 or done % 10 == 0) and world.any(bool(run.stop))
        if (stopping or done % stage.save_every == 0) and done < stage.steps:
            run.save(stage, model, optimizer, done)
        if stopping:
            break
    bar.close()
    return done


def log_step(
    run: Run,
    stage: Config,
    done: int,
    values: dict,
    meter: report.Meter,
    batch: Batch,
    model: CLIP,
    faults: dict[str, Fault],
) -> dict[str, float | dict | None]:
    """Read a step's values from the device, refuse a loss that is not finite, write the line."""
    loss = run.world.mean(values["loss"]).item()
    if not math.isfinite(loss):
        raise checkpoint.not_finite(f"the loss must be finite, got {loss}", stage, done)
    pairs = len(batch.images)
    image_tokens = (values["tokens"] - len(batch.ids)) // pairs
    flops = 3 * forward_flops(model, image_tokens, len(batch.ids) / pairs)
    peak = report.peak_flops(run.world.device, autocast_dtype(stage.precision, run.world.device))
    rates = meter.read()
    rates["mfu"] = rates["samples_per_s"] * flops / (peak * run.world.size) if peak else None
    row = {
        "loss": loss,
        "lr": learning_rate(done - 1, stage),
        "scale": values["scale"].item(),
        "grad_norm": values["grad_norm"].item(),
        **rates,
        "skipped": batch.skipped,
        # Of this process since the last line.
        "skipped_by_kind": {kind: fault.count for kind, fault in faults.items()},
        "peak_memory_bytes": report.peak_memory(run.world.device),
    }
    if run.log is not None:
        run.log.write(stage=stage.stage, step=done, **row)
    return row


def open_data(config: Config, saved: dict | None) -> tuple[EmojiPairs | None, Tokenizer]:
    """The embedded pairs (None: shards), and the tokenizer: a checkpoint's own if there is one."""
    pairs = load_emoji() if config.data == "emoji" else None
    if saved:
        return pairs, Tokenizer.from_json(saved["tokenizer"])
    if config.tokenizer == "clip":
        return pairs, clip_bpe()
    if config.tokenizer != "wordpiece":
        return pairs, load_tokenizer(config.tokenizer)
    captions = pairs.training_captions() if pairs else first_captions(config.data)
    return pairs, Tokenizer(train_wordpiece(captions, config.vocab_size, start=False))


def open_batches(run: Run, stage: Config, first: int, end: int) -> EmojiLoader | ShardLoader:
    """Batches of the data's steps from first to end; the stages count on in one order."""
    brightness, contrast, saturation, hue = stage.jitter
    augmentation = Augmentation(
        scale=stage.crop_scale,
        ratio=stage.crop_ratio,
        shift=stage.shift,
        rotate=stage.rotate,
        warp=stage.warp,
        outline=stage.outline,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        jitter=stage.jitter_prob,
        mix=stage.channel_mix,
        grey=stage.gray_prob,
        blend=stage.blend if run.pairs is not None else 0.0,
    )
    how = dict(
        batch_size=stage.batch_size,
        image_size=stage.image_size,
        context=stage.context,
        strategy=stage.text_mask,
        pad=stage.dialect.startswith("clipa-v2"),  # its text pools the last of a fixed length
        augmentation=augmentation,
        seed=stage.seed,
        start_step=first,
        steps=end,
        rank=run.world.rank,
        world_size=run.world.size,
    )
    if run.pairs is not None:
        # On a CPU a thread that makes batches ahead takes its time from the model's.
        ahead = 0 if run.world.device.type == "cpu" else 2
        emoji = dict(forms=CAPTIONS[stage.captions][0], prefetch=ahead)
        return EmojiLoader(run.pairs, run.tokenizer, **emoji, **how)
    return ShardLoader(stage.data, run.tokenizer, workers=stage.workers, **how)


def rehearse(stage: Config, tokenizer: Tokenizer, world: World) -> None:
    """Make one small batch: what the second stage cannot do is told before the first one trains."""
    text = tokenizer.encode(["a word"], stage.context, strategy=stage.text_mask)
    image = torch.zeros(1, stage.image_size, stage.image_size, 3, dtype=torch.uint8)
    to_device(Batch(image, *text, first_sample=0, skipped=0), 0, stage, world.device)


def train(config: Config, world: World, stop: checkpoint.StopSignal) -> None:
    """The stages in time order: build, load, loop, evaluate; then the report."""
    world.agree(lambda: check_sets(config.eval_images, config.eval_shards))
    check_impl(config.impl, world.device)
    saved = checkpoint.find(config, world)
    pairs, tokenizer = open_data(config, saved)
    for stage in stages(config):
        rehearse(stage, tokenizer, world)
    world.print(describe(config))
    log = None
    if world.is_main:
        at = (saved["stage"], saved["step"]) if saved else None
        log = report.JsonLines(Path(config.output) / "log.jsonl", resume=at)
    metrics = {"seconds": {}, "stages": {}} | (saved["metrics"] if saved else {})
    metrics["config"] = dataclasses.asdict(config)
    run = Run(config, world, stop, pairs, tokenizer, log, metrics)
    model, first = None, 0
    for stage in stages(config):
        if saved and STAGES.index(stage.stage) < STAGES.index(saved["stage"]):
            first += stage.steps
            continue
        torch.manual_seed(config.seed)
        weights = None if model is None else model.state_dict()
        model = build_model(stage, tokenizer.vocab_size).to(world.device)
        if weights is not None:
            load_weights(model, weights)  # position tables are resized between the stages
        optimizer, done = adamw(model, stage), 0
        if saved and saved["stage"] == stage.stage:
            checkpoint.check_matches(saved, stage, model, stage.stage)
            done = checkpoint.restore(saved, model, optimizer)
        done = run_stage(run, stage, model, optimizer, done, first)
        if done < stage.steps:
            world.print(f"{stop.name or 'stopped'}: saved at step {done} of stage {stage.stage}")
            return
        if stage.stage not in metrics["stages"]:
            run.save(stage, model, optimizer, done)  # whatever becomes of the evaluation
            if world.is_main:
                metrics["stages"][stage.stage] = evaluation(run, stage, model)
            run.save(stage, model, optimizer, done)
            world.barrier()
        first += stage.steps
    if world.is_main:
        finish(run, stages(config)[-1], model)


def evaluation(run: Run, stage: Config, model: CLIP) -> dict[str, dict]:
    """Figures of each split after a stage; keeps the pictures for the report."""
    dtype = autocast_dtype(stage.precision, run.world.device)
    encoder = Encoder(model.eval(), run.tokenizer, run.world.device, dtype)
    began = time.perf_counter()
    extra = (stage.eval_images, stage.eval_shards)
    prompts = CAPTIONS[stage.captions][1]
    figures, run.shown = evaluate(encoder, run.pairs, prompts, *extra)
    run.metrics["seconds"][f"{stage.stage} evaluation"] = time.perf_counter() - began
    return figures


def finish(run: Run, stage: Config, model: CLIP) -> None:
    """results.json, the picture, and where all of it lies."""
    folder = Path(run.config.output)
    results = {**run.metrics, "torch": torch.__version__}
    if run.shown is None:  # a finished run that is asked again, of other sets perhaps
        results["stages"][stage.stage] = evaluation(run, stage, model)
    report.write_results(folder / "results.json", results)
    rows = report.read_rows(folder / "log.jsonl")
    report.picture(folder / "report.png", rows=rows, results=results, **run.shown)
    print(table(results["stages"][stage.stage]))
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in run.metrics["seconds"].items())
    print(f"{spent}. report.png, results.json, log.jsonl and checkpoints lie in {folder}")


def main(argv: list[str] | None = None) -> None:
    """The program. A flag or file that will not do ends it with a sentence."""
    config = parse(argv)
    with report.sentences("train.py"):
        validate(config, world_size(), SIZES)
        world = setup(config.device, threads=config.threads)
        try:
            with checkpoint.StopSignal() as stop:
                train(config, world, stop)
        finally:
            world.close()


if __name__ == "__main__":
    main()
