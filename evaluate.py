"""Zero-shot classification and image-text retrieval of a checkpoint.

python evaluate.py runs/emoji                             the embedded drawings, split by split
python evaluate.py runs/emoji --images photos             a folder of one folder a class
python evaluate.py runs/emoji --shards "val/{0..3}.tar"   retrieval on image-text shards, and
                                                          classification, by val/classes.txt
python evaluate.py runs/b16 --images imagenet/val --classes imagenet --prompts imagenet --workers 4

A line tells how each set was evaluated, a table its figures; --json prints the figures alone.
torchrun shares the work among processes: torchrun --nproc_per_node 8 evaluate.py runs/b16
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from data.classes import classes_in, prompts_in
from data.emoji import load_emoji, prompts_of
from data.patterns import file_names
from data.text import Tokenizer
from models import load_weights
from training.build import build_model
from training.checkpoint import latest, load, weights
from training.config import check_range, from_json
from training.distributed import autocast_dtype, setup
from training.evaluation import Encoder, check_sets, evaluate, table
from training.evaluation import evaluate_folder as evaluate_folder
from training.evaluation import evaluate_shards as evaluate_shards
from training.report import sentences


@dataclass(frozen=True)
class Flags:
    """Zero-shot classification and retrieval of a checkpoint."""

    checkpoint: tyro.conf.Positional[str]  # a file, or a run's folder: its newest one
    images: str = ""  # folder of class folders to classify
    shards: str = ""
    """tar shards to retrieve from; where a classes.txt lies beside them, one name a line, pictures
    that have one of the names for a caption are classified among them"""
    classes: str = ""
    """names of the sorted folders of images, and of each .cls in shards: "imagenet" (open_clip's
    1,000), or a file of lines "name", or "folder<TAB>name"; empty: their classes.txt"""
    prompts: str = ""
    """templates to classify with: "a photo of a {}.;{}", "imagenet" (open_clip's 80), or a file"""
    workers: int = 0  # processes that decode, beside each that encodes; 0: a thread
    device: str = "auto"  # auto: cuda where there is one, else cpu
    batch_size: int = 256  # images or captions at a time
    cache_gb: float = 100.0  # of remote shards that the machine keeps at most, in its cache folder
    json: bool = False  # print JSON instead of a table


def main(argv: list[str] | None = None) -> None:
    """The program. A checkpoint or folder that will not do ends it with a sentence."""
    flags = tyro.cli(Flags, args=argv)
    with sentences("evaluate.py"):
        check_range("batch_size", flags.batch_size, "batch_size")
        check_range("data.workers", flags.workers, "workers")
        check_range("data.cache_gb", flags.cache_gb, "cache_gb")
        own_prompts, classes = prompts_in(flags.prompts), classes_in(flags.classes)
        check_sets(flags.images, classes=flags.classes)
        _ = file_names(flags.shards) if flags.shards else None
        world = setup(flags.device)
        path = Path(flags.checkpoint)
        state = latest(path) if path.is_dir() else load(path)
        if state is None:
            raise ValueError(f"{path} must hold a checkpoint, got a folder without one")
        # How the run computed, its machine decided; this one may be another.
        config = from_json(state["config"])
        config = replace(config, run=replace(config.run, impl="auto"))
        captions = config.caption_keys.for_retrieval()
        shards = (flags.shards, captions, flags.classes, flags.cache_gb)
        world.together(lambda: check_sets("", *shards))
        tokenizer = Tokenizer.from_json(state["tokenizer"])
        model = build_model(config, state["stage"], tokenizer.vocab_size)
        load_weights(model, weights(state))
        dtype = autocast_dtype(config.run.precision, world.device)
        model = model.to(world.device).eval()
        encoder = Encoder(model, tokenizer, world.device, dtype, flags.batch_size, world)
        asked = flags.images or flags.shards
        pairs = None if asked else load_emoji()
        prompts = prompts_of(config.data.captions)
        sets = (flags.images, flags.shards, captions, own_prompts)
        how = dict(classes=classes, workers=flags.workers, cache_gb=flags.cache_gb)
        how["loss_batch"] = config.stages[state["stage"]].batch_size
        if not flags.json:
            how["say"] = world.print
        results, _ = evaluate(encoder, pairs, prompts, *sets, **how)
        world.print(json.dumps(results, indent=2) if flags.json else table(results))
        world.close()


if __name__ == "__main__":
    main()
