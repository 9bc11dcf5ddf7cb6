"""What a stage trains: its model, pairs and tokenizer, its batches, and a batch on the device."""

import hashlib
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from clipa_kernels import Packed, block_patches, grid_patches, random_patches
from data.augment import recolour
from data.batches import Batch
from data.emoji import CAPTIONS, EmojiLoader, EmojiPairs, load_emoji
from data.index import count, known_sizes, write_tables
from data.patterns import file_names
from data.remote import is_remote
from data.shards import ShardLoader, first_captions
from data.shelf import Shelf
from data.text import Tokenizer, clip_bpe, load_tokenizer, train_wordpiece
from models import CLIP, build, load_weights, read_weights

from . import checkpoint
from .config import Config
from .distributed import World
from .optim import SpikeGuard, adamw


def build_model(config: Config, stage: str, vocab_size: int = 0) -> CLIP:
    """The CLIP of a stage, with fresh weights; vocab_size entries must fit in its token table."""
    if stage not in config.stages:
        known = ", ".join(config.stages)
        raise ValueError(f"build_model: stage must be one of {known}, got {stage!r}")
    data, model, sizes = config.data, config.model, config.stages[stage]
    if vocab_size > data.vocab_size:
        raise ValueError(
            f"build_model: vocab_size must hold the tokenizer's {vocab_size} entries, "
            f"got {data.vocab_size}"
        )
    built = build(
        model.size,
        model.patch_size,
        dialect=model.dialect,
        vision=dict(image_size=sizes.image_size, pool=model.pool, positions=sizes.pos_embed),
        text=dict(context=sizes.context, vocab_size=data.vocab_size),
        logit_scale=model.init_scale,
        logit_bias=model.init_bias if config.optim.loss == "sigmoid" else None,
        impl=config.run.impl,
    )
    built.lock(model.lock)
    return built


def check_resumes(state: dict, config: Config) -> None:
    """ValueError unless the run can go on from a state; tried on a model without memory."""
    with torch.device("meta"):
        model = build_model(config, state["stage"])
        optimizer = adamw(model, config)
    checkpoint.check_matches(state, config, model, state["stage"])
    before = checkpoint.rng_state()
    try:
        checkpoint.restore_optimizer(state, optimizer)
        SpikeGuard(optimizer, config.optim.skip_above, state["spikes"])
    finally:
        checkpoint.set_rng_state(before)


def load_initial(model: CLIP, path: str) -> None:
    """Start from weights of open_clip, OpenAI, Hugging Face or an earlier run.

    A logit bias that they lack stays as it is; one that the model lacks is left out.
    """
    weights = read_weights(path)
    if model.logit_bias is None:
        weights.pop("logit_bias", None)
    else:
        weights.setdefault("logit_bias", model.logit_bias.detach())
    load_weights(model, weights)


def open_data(
    config: Config, saved: dict | None, world: World
) -> tuple[EmojiPairs | None, Tokenizer]:
    """The embedded pairs (None: shards), and the tokenizer: a checkpoint's own if there is one.

    Rank 0 reads or trains the tokenizer, and the others have its own.
    """
    pairs = load_emoji() if config.data.source == "emoji" else None

    def choose() -> str:
        if saved:
            return saved["tokenizer"]
        if config.data.tokenizer == "clip":
            return clip_bpe().to_json()
        if config.data.tokenizer != "wordpiece":
            return load_tokenizer(config.data.tokenizer).to_json()
        if pairs:
            captions = pairs.training_captions()
        else:
            how = dict(captions=config.caption_keys, cache_gb=config.data.cache_gb)
            captions = first_captions(config.data.source, **how)
        trained = train_wordpiece(captions, config.data.vocab_size, start=False)
        return Tokenizer(trained).to_json()

    return pairs, Tokenizer.from_json(world.decide(choose))


def count_samples(pattern: str, world: World, cache_gb: float = 100.0) -> None:
    """Where no table beside shards tells their samples: all processes count, rank 0 writes it."""
    names, shelf = world.together(lambda: file_names(pattern)), Shelf(None, cache_gb)
    world.require_same({"the number of shards": len(names)})
    known = world.together(lambda: known_sizes(names))
    missing = world.sum(torch.from_numpy((known < 0).astype(np.int64)))
    unknown = missing.nonzero()[:, 0].tolist()  # of any process: each node may have its own disk
    counted: list[tuple[str, int]] = []
    bar = tqdm(total=len(unknown), unit="shard", disable=not (unknown and world.is_main))
    for start in range(0, len(unknown), 16 * world.size):  # in step, so that none waits for long
        part = [names[place] for place in unknown[start : start + 16 * world.size]]
        sizes, wrong = torch.zeros(len(part), dtype=torch.int64), None
        for place in range(world.rank, len(part), world.size):
            try:
                sizes[place] = count(part[place], shelf)
            except (ValueError, OSError) as error:
                wrong = error
                break
        if world.any(wrong is not None):
            raise wrong or world.left()
        counted += zip(part, world.sum(sizes).tolist(), strict=True)
        bar.update(len(part))
    bar.close()
    if not world.is_main:  # a store that takes no table leaves it to each node's cache
        counted = [(name, size) for name, size in counted if is_remote(name)]
    if refused := write_tables(counted, beside=world.is_main):
        world.print(f"{refused[0]} cannot be written; shards are counted again by the next run")
    world.barrier()


def open_batches(
    config: Config,
    stage: str,
    pairs: EmojiPairs | None,
    tokenizer: Tokenizer,
    world: World,
    done: int = 0,
) -> EmojiLoader | ShardLoader:
    """Batches of a stage from its step `done` on; pairs None: shards."""
    sizes, first = config.stages[stage], config.first_step(stage)
    common = dict(
        batch_size=sizes.batch_size,
        image_size=sizes.image_size,
        context=sizes.context,
        strategy=sizes.text_mask,
        pad=config.dialect.pads_text,
        seed=config.run.seed,
        start_step=first + done,
        steps=first + sizes.steps,
        rank=world.rank,
        world_size=world.size,
    )
    if pairs is not None:
        # On a CPU a thread that makes batches ahead takes its time from the model's.
        common |= dict(prefetch=0 if world.device.type == "cpu" else 2)
        forms = CAPTIONS[config.data.captions][0]
        return EmojiLoader(pairs, tokenizer, forms=forms, augmentation=config.augment, **common)
    make = partial(
        ShardLoader,
        config.data.source,
        tokenizer,
        augmentation=replace(config.augment, blend=0.0),  # which an embedded set's preset brings
        interpolation=config.dialect.interpolation,
        max_pixels=config.data.max_pixels,
        colours=world.device.type != "cuda",  # a GPU draws them in passing
        captions=config.caption_keys,
        mix=config.data.mix,
        repeat=config.data.repeat,
        parts=config.data.parts,
        workers=config.data.workers,
        cache_gb=config.data.cache_gb,
        **common,
    )
    loader = world.together(make)
    table = hashlib.sha256(loader.sizes.tobytes()).hexdigest()[:8]
    world.require_same({"the table of samples a shard": f"{table} of {loader.count} samples"})
    if ends := loader.source_that_ends():
        rest = "begins again when all have ended, or at once with --data.repeat"
        world.print(f"{ends[0]} ends at step {ends[1]}; it {rest}")
    return loader


def to_device(
    batch: Batch, step: int, config: Config, stage: str, device: torch.device
) -> tuple[Tensor, Packed, Tensor | None]:
    """Images [B, 3, S, S] as a view, packed ids, and the kept patches [B, K] (None: all)."""
    images = batch.images.to(device, non_blocking=True)
    if not batch.coloured:
        key = {"seed": config.run.seed, "step": config.first_step(stage) + step}
        images = recolour(images, config.augment, **key, first_sample=batch.first_sample)
    images = images.permute(0, 3, 1, 2)
    ids = batch.ids.to(device, non_blocking=True)
    text = Packed(ids, batch.cu_seqlens.to(device, non_blocking=True), batch.max_seqlen)
    sizes = config.stages[stage]
    grid = (sizes.image_size // config.model.patch_size,) * 2
    seed = config.run.seed + config.number(stage)  # each stage's masks are new ones
    key = dict(seed=seed, step=step, first_sample=batch.first_sample, device=device)
    if sizes.image_mask == "random":
        return images, text, random_patches(len(images), grid, sizes.image_drop, **key)
    if sizes.image_mask == "grid":
        return images, text, grid_patches(len(images), grid, **key)
    if sizes.image_mask == "block":
        return images, text, block_patches(len(images), grid, sizes.image_drop, **key)
    return images, text, None


def rehearse(config: Config, stage: str, tokenizer: Tokenizer, world: World) -> None:
    """Make one small batch: what a later stage cannot do is told before the first one trains."""
    sizes = config.stages[stage]
    text = tokenizer.encode(["a word"], sizes.context, strategy=sizes.text_mask)
    image = torch.zeros(1, sizes.image_size, sizes.image_size, 3, dtype=torch.uint8)
    to_device(Batch(image, *text, first_sample=0, skipped=0), 0, config, stage, world.device)
