"""Train a CLIP with few tokens, then briefly with all of them.

    python train.py                                 the embedded drawings, on any machine
    torchrun --nproc_per_node 8 train.py --preset clipa-v1-b16 --data "shards/{0000..0999}.tar"

Every flag is a field of training/config.py's Config. A step, the loop of a stage, the stages.
"""

import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipa_kernels import Packed, accumulated, contrastive_loss, sigmoid_loss
from data.batches import Batch, Tally
from data.pairs import USUAL
from data.shards import check_captions
from models import CLIP, load_weights
from training import checkpoint, report
from training.build import (
    build_model,
    check_resumes,
    count_samples,
    load_initial,
    open_batches,
    open_data,
    rehearse,
    to_device,
)
from training.config import Config, describe, flat, parse, validate
from training.distributed import WIRES, World, autocast_dtype, check_impl, setup, world_size, wrap
from training.evaluation import check_sets
from training.feed import fed
from training.memory import fitted
from training.optim import (
    SpikeGuard,
    adamw,
    clamp_scale_,
    clip_gradients,
    set_learning_rate,
    unwrap,
)
from training.run import (
    Run,
    StopSignal,
    evaluation,
    finish,
    identity,
    log_step,
    look,
    open_logs,
    owned,
    remarks,
)
from training.shard import shard, unsharded
from training.watch import Tracer, watcher, window_of

_SHOWN = ("loss", "samples_per_s", "tokens_per_s", "data_wait")  # on the bar


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    step: int,
    config: Config,
    stage: str,
    world: World,
    guard: SpikeGuard | None = None,
) -> dict[str, Tensor | int]:
    """One optimiser step, in time order; all returned values are device tensors except `tokens`."""
    sizes = config.stages[stage]
    set_learning_rate(optimizer, step, sizes)
    images, text, keep = to_device(batch, step, config, stage, world.device)
    dtype = autocast_dtype(config.run.precision, world.device)

    def loss_of(features: dict[str, Tensor]) -> Tensor:
        return pair_loss(config.optim.loss, world, **features)

    # Nothing cast for one part may serve the next: FSDP2 would miss gradients of its weights.
    fast = dict(enabled=dtype != torch.float32, cache_enabled=False)
    with torch.autocast(world.device.type, dtype, **fast):
        if sizes.accumulate == 1:
            out = model(images, text, keep)
            loss = loss_of(out)
            loss.backward()
        else:
            ends = batch.cu_seqlens.tolist()  # on the host: nothing waits for the device
            parts = split(images, text, keep, ends, sizes.accumulate)
            frozen = [f"{unwrap(model).locked}_features"] if unwrap(model).locked != "none" else []
            out, loss = accumulated(model, parts, loss_of, frozen=frozen)
    norm = clip_gradients(model.parameters(), config.optim.clip_norm)
    optimizer.step() if guard is None else guard.step(norm)
    optimizer.zero_grad(set_to_none=True)
    clamp_scale_(model, config)
    patches = (sizes.image_size // config.model.patch_size) ** 2 if keep is None else keep.shape[1]
    return {
        "loss": loss.detach(),
        "grad_norm": norm,
        "scale": out["logit_scale"].detach(),
        "tokens": len(images) * (1 + patches) + len(text.tokens),
    }


def pair_loss(kind: str, world: World, **out: Tensor) -> Tensor:
    """The loss over all processes; DDP's mean makes its gradients those of the whole batch."""
    function = sigmoid_loss if kind == "sigmoid" else contrastive_loss
    features = (out["image_features"], out["text_features"])
    group = dist.group.WORLD if world.size > 1 else None
    return function(*features, out["logit_scale"], out.get("logit_bias"), group=group)


def split(
    images: Tensor, text: Packed, keep: Tensor | None, ends: list[int], count: int
) -> list[tuple[Tensor, Packed, Tensor | None]]:
    """A batch in `count` equal parts; ends are text.cu_seqlens as Python ints."""
    size = len(images) // count
    parts = []
    for a in range(0, len(images), size):
        cu_seqlens = text.cu_seqlens[a : a + size + 1] - ends[a]
        part = Packed(text.tokens[ends[a] : ends[a + size]], cu_seqlens, text.max_seqlen)
        parts.append((images[a : a + size], part, None if keep is None else keep[a : a + size]))
    return parts


def run_stage(
    run: Run, stage: str, model: CLIP, optimizer: torch.optim.Optimizer, done: int
) -> int:
    """Train from step `done` of a stage.

    Returns the steps done: all of them, or fewer if a signal said to stop.
    """
    config, world, sizes = run.config, run.world, run.config.stages[stage]
    seconds, began = run.metrics["seconds"], time.perf_counter()
    before = seconds.get(stage, 0.0)
    if done < sizes.steps:  # a finished stage that gets more of them
        run.metrics["stages"].pop(stage, None)
    wrapped = wrap(model, world, config.run.compile, WIRES[config.run.wire])
    batches = open_batches(config, stage, run.pairs, run.tokenizer, world, done)
    stream = fed(batches, world.device)
    bar = report.ProgressBar(sizes.steps, start=done, name=stage, enabled=world.is_main)
    meter, tally = report.Meter(), Tally()
    window, path = window_of(config.run.profile), Path(config.run.output) / f"trace-{stage}.json"
    tracer = Tracer(window, path, writes=world.is_main, rest=run.alarm.rest)
    model.train()
    while done < sizes.steps:
        tracer(done)
        with meter.waiting():
            batch = next(stream)
        values = train_step(wrapped, optimizer, batch, done, config, stage, world, run.guard)
        done += 1
        run.alarm.set(done)
        meter.add(sizes.batch_size, round(values["tokens"] * world.size))
        tally.add(batch)
        shown = {}
        if done % config.run.log_every == 0 or done == sizes.steps:
            row = log_step(run, stage, done, values, meter, batch, model, tally)
            for words in remarks(run, stage, done, row, tally, model):
                bar.message(words)
            tally, shown = Tally(), {name: row[name] for name in _SHOWN}
        bar.update(done, **shown)
        seconds[stage] = before + time.perf_counter() - began
        # Processes agree to stop at every tenth step; agreeing makes each wait for the others.
        agreeing = world.size == 1 or done % 10 == 0
        stopping = agreeing and world.any(bool(run.stop))
        if (run.due(done, agreeing) or stopping) and done < sizes.steps:
            run.save(stage, model, optimizer, done)
        if stopping:
            break
        every = config.run.eval_every
        if every and done % every == 0 and done < sizes.steps:
            paused = time.perf_counter()
            bar.message(look(run, stage, done, model))
            meter.read()  # which must not count the pause
            began += time.perf_counter() - paused
    tracer.close()
    bar.close()
    return done


def start(config: Config, world: World, stop: StopSignal) -> tuple[Run, dict | None]:
    """Check and open all that the run needs before its first step; the state to resume from."""
    world.require_same(identity(config))
    sets = (config.run.eval_images, config.run.eval_shards, config.caption_keys.for_retrieval())
    world.together(lambda: check_sets(*sets, config.run.eval_classes, config.data.cache_gb))
    check_impl(config.run.impl, world.device)
    if config.data.source != "emoji":
        count_samples(config.data.source, world, config.data.cache_gb)
        if config.caption_keys != USUAL:
            captions = dict(captions=config.caption_keys, cache_gb=config.data.cache_gb)
            world.decide(lambda: check_captions(config.data.source, **captions))
    config, recompute = fitted(config, world)
    saved = checkpoint.find(config, world, partial(check_resumes, config=config))
    pairs, tokenizer = open_data(config, saved, world)
    for stage in config.running:
        rehearse(config, stage, tokenizer, world)
    kind = config.run.watch if world.is_main else "none"
    watch = world.together(lambda: watcher(kind, Path(config.run.output), flat(config)))
    world.print(describe(config))
    log, looks = open_logs(config, world, saved)
    metrics = {"seconds": {}, "stages": {}} | (saved["metrics"] if saved else {})
    run = Run(config, world, stop, pairs, tokenizer, log, metrics, looks=looks, watch=watch)
    run.recompute = recompute
    return run, saved


def train(config: Config, world: World, stop: StopSignal) -> None:
    """The stages in time order: build, load, loop, evaluate; then the report."""
    run, saved = start(config, world, stop)
    config = run.config
    whole, stages = None, config.running
    with run.writer:  # whose last checkpoint is waited for, however this ends
        for stage in stages[stages.index(saved["stage"]) if saved else 0 :]:
            if world.any(bool(stop)):
                return run.stopped(f"before stage {stage}")
            torch.manual_seed(config.run.seed)
            weights = None if whole is None else whole.state_dict()

            def build(stage: str = stage) -> CLIP:
                return build_model(config, stage, run.tokenizer.vocab_size).to(world.device)

            model = build()
            model.set_recompute(run.recompute[stage])
            if weights is not None:
                load_weights(model, weights)  # position tables are resized between the stages
            elif config.model.init and not saved:
                world.together(lambda model=model: load_initial(model, config.model.init))
            shard(model, world, config.run.shard, WIRES[config.run.wire])
            optimizer, done, spikes = adamw(model, config), 0, None
            if saved and saved["stage"] == stage:
                done, spikes = checkpoint.restore(saved, model, optimizer), saved["spikes"]
            run.guard = SpikeGuard(optimizer, config.optim.skip_above, spikes)
            began, done = done, run_stage(run, stage, model, optimizer, done)
            if done < config.stages[stage].steps:
                return run.stopped(f"saved at step {done} of stage {stage}")
            whole = unsharded(model, build)
            if done > began:
                run.save(stage, model, optimizer, done)  # whatever becomes of the evaluation
            if stage not in run.metrics["stages"]:
                run.metrics["stages"][stage] = evaluation(run, stage, whole)
        run.written()
        finish(run, stages[-1], whole)


def main(argv: list[str] | None = None) -> None:
    """The program. A flag or file that will not do ends it with a sentence."""
    with report.sentences("train.py"):
        config = parse(argv)
        validate(config, world_size())
        run = config.run
        world = setup(run.device, threads=run.threads, timeout=run.timeout)
        try:
            with owned(run.output, world), StopSignal() as stop:
                train(config, world, stop)
        finally:
            world.close()


if __name__ == "__main__":
    main()
