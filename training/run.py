"""A run from outside its loop: what the stages share, signals, the log, checkpoints, the report."""

import contextlib
import errno
import hashlib
import math
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from data.batches import Batch, Tally, describe_faults
from data.classes import classes_in, prompts_in
from data.emoji import EmojiPairs, prompts_of
from data.files import write_whole
from data.text import Tokenizer
from models import CLIP, forward_flops
from models.export import described

from . import checkpoint, report
from .build import build_model
from .config import Config, flat, to_json
from .distributed import WIRES, Alarm, World, autocast_dtype, exchange_seconds
from .evaluation import Encoder, evaluate, table
from .optim import SpikeGuard, learning_rate, unwrap
from .shard import unsharded
from .watch import Watch, advice

_STOPS = [  # Windows has no SIGUSR1
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
]


class StopSignal:
    """A flag that SIGTERM or SIGINT sets, so that the loop can save and leave.

    SIGUSR1, which SLURM can send ahead of a time limit, counts too. A second SIGINT within the
    block interrupts at once. Used as a context manager, in the main thread; the handlers from
    before come back at its end.

    >>> with StopSignal() as stop:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     print(stop.name)
    SIGTERM
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, object] = {}

    def __bool__(self) -> bool:
        return bool(self.name)

    def _handle(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self) -> "StopSignal":
        for number in _STOPS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def identity(config: Config) -> dict[str, object]:
    """What must be the same on every process before any work: flags, code and what it stands on."""
    root, code = Path(__file__).parents[1], hashlib.sha256()
    folders = ("clipa_kernels", "models", "data", "training")
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        code.update(path.read_bytes())
    versions = {"Python": platform.python_version(), "CUDA": torch.version.cuda}
    for name in ("torch", "triton", "numpy", "pillow", "tokenizers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {**flat(config), "the code": code.hexdigest()[:8], **versions}


@contextlib.contextmanager
def owned(folder: str, world: World) -> Iterator[None]:
    """Hold the output folder for one run; the lock goes with the process, however that ends.

    Raises:
        ValueError: another run holds it.
    """
    if not world.is_main or fcntl is None:
        world.decide(lambda: None)
        yield
        return
    with open(Path(folder) / ".lock", "ab+") as file:

        def hold() -> None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return  # a file system without locks
                file.seek(0)
                by = file.read(100).decode(errors="replace") or "another"
                must = "must be of one run at a time"
                raise ValueError(f"train: {folder} {must}, got one that runs ({by})") from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}".encode())
            file.flush()

        world.decide(hold)
        yield


@dataclass
class Run:
    """What the stages share."""

    config: Config
    world: World
    stop: StopSignal
    pairs: EmojiPairs | None  # None: shards
    tokenizer: Tokenizer
    log: report.JsonLines | None  # of rank 0
    metrics: dict  # seconds and figures of each stage so far
    shown: dict | None = None  # pictures of the last evaluation, with the names chosen
    guard: SpikeGuard | None = None  # of the stage that runs
    watch: Watch = lambda step, row: None
    looks: report.JsonLines | None = None  # evaluations in mid-stage, of rank 0
    recompute: dict[str, str] = field(default_factory=dict)  # of each stage
    advised: set[str] = field(default_factory=set)  # stages whose advice was given
    exchange: dict[str, float] = field(default_factory=dict)  # seconds of a stage's gradients
    saved: float = field(default_factory=lambda: time.monotonic())  # last checkpoint's time
    writer: Executor = field(default_factory=lambda: ThreadPoolExecutor(1))  # of rank 0
    writing: Future | None = None  # the checkpoint that the writer was given last

    def __post_init__(self) -> None:
        self.alarm = Alarm(self.world, self.config.run.step_timeout)

    def save(self, stage: str, model: CLIP, optimizer: torch.optim.Optimizer, done: int) -> None:
        """Have a checkpoint written, by rank 0, if there is nothing but finite numbers to write.

        Training goes on while it is; the one before must be on the disk first.
        """
        self.written()
        run = self.config.run

        def check() -> None:
            if not Path(run.output).is_dir():
                must = f"train: {run.output} must stay while it runs"
                raise RuntimeError(f"{must}, got no such folder")

        self.world.decide(check)
        checkpoint.check_finite(model, optimizer, run.output, stage, done, self.world)
        state = checkpoint.pack_state(
            model,
            optimizer,
            self.config,
            stage,
            step=done,
            tokenizer=self.tokenizer.to_json(),
            metrics=self.metrics,
            spikes=self.guard.state() if self.guard else {},
            open_clip=described(unwrap(model), self.tokenizer.end, self.tokenizer.vocab_size),
        )
        if self.world.is_main:
            cuda = self.world.device.type == "cuda"
            state = checkpoint.snapshot(state)
            copied = torch.cuda.current_stream(self.world.device).record_event() if cuda else None

            def write() -> None:
                if copied is not None:
                    copied.synchronize()
                checkpoint.save(run.output, state, done, run.keep_checkpoints, run.keep_every)

            self.writing = self.writer.submit(write)
        self.saved = time.monotonic()

    def written(self) -> None:
        """Wait until the last checkpoint is on the disk; all processes end if it cannot be.

        Every process must call it.
        """
        self.alarm.rest()
        writing, self.writing = self.writing, None
        self.world.together(lambda: writing and writing.result())

    def stopped(self, where: str) -> None:
        """Say that a signal ended the run; every process must call it."""
        self.written()
        self.world.print(f"{self.stop.name or 'stopped'}: {where}")

    def due(self, done: int, agreeing: bool) -> bool:
        """Whether a checkpoint is to be written after step `done`, on every process alike.

        Args:
            agreeing: whether processes exchange words at this step: clocks differ.
        """
        run = self.config.run
        late = time.monotonic() - self.saved > 60 * run.save_minutes > 0
        writing = self.writing  # one that failed is told by the next
        late |= writing is not None and writing.done() and writing.exception() is not None
        by_steps = any(every and done % every == 0 for every in (run.save_every, run.keep_every))
        return (agreeing and self.world.any(late)) or by_steps


def open_logs(
    config: Config, world: World, saved: dict | None
) -> tuple[report.JsonLines | None, report.JsonLines | None]:
    """log.jsonl and evaluations.jsonl on rank 0, cut to where the run goes on; and config.json."""
    if not world.is_main:
        return None, None
    folder, stages = Path(config.run.output), list(config.stages)
    at = (saved["stage"], saved["step"]) if saved else None
    with write_whole(folder / "config.json") as file:
        file.write(to_json(config).encode())
    names = ("log.jsonl", "evaluations.jsonl")
    log, looks = (report.JsonLines(folder / name, stages, resume=at) for name in names)
    return log, looks


def log_step(
    run: Run,
    stage: str,
    done: int,
    values: dict,
    meter: report.Meter,
    batch: Batch,
    model: CLIP,
    tally: Tally,
) -> dict[str, float | dict | None]:
    """Read a step's values from the device, refuse a loss that is not finite, write the line.

    Args:
        tally: of this process's batches since the last line; the line has all processes' counts.
    """
    loss = run.world.mean(values["loss"]).item()
    guard = run.guard
    if not math.isfinite(loss) and not (guard and bool(guard.spike)):  # which harmed nothing
        run.written()
        raise checkpoint.not_finite(
            f"the loss must be finite, got {loss}", run.config.run.output, stage, done
        )
    pairs = len(batch.images)
    image_tokens = (values["tokens"] - len(batch.ids)) // pairs
    flops = 3 * forward_flops(model, image_tokens, len(batch.ids) / pairs)
    dtype = autocast_dtype(run.config.run.precision, run.world.device)
    peak = report.peak_flops(run.world.device, dtype)
    rates = meter.read()
    rates["mfu"] = rates["samples_per_s"] * flops / (peak * run.world.size) if peak else None
    row = {
        "loss": loss,
        "lr": learning_rate(done - 1, run.config.stages[stage]),
        "scale": values["scale"].item(),
        "grad_norm": values["grad_norm"].item(),
        **rates,
        **counted(run.world, batch.skipped, tally),
        **({"skipped_steps": int(guard.skipped)} if guard and guard.limit else {}),
        "peak_memory_bytes": report.peak_memory(run.world.device),
    }
    if run.log is not None:
        run.log.write(stage=stage, step=done, **row)
        run.watch(run.config.first_step(stage) + done, row)
    return row


def remarks(run: Run, stage: str, done: int, row: dict, tally: Tally, model: CLIP) -> list[str]:
    """What a line of the log makes worth saying: samples left out; once a stage, what to change.

    Every process must call it.
    """
    said = []
    if tally.faults:  # of this process's share
        said.append(f"{stage} {done}: samples skipped: {describe_faults(tally.faults)}")
    data, device = run.config.data, run.world.device
    memory = None
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    if done < 10:  # the first steps wait for all
        return said
    if run.world.size > 1 and stage not in run.exchange:
        run.exchange[stage] = exchange_seconds(model, run.world, WIRES[run.config.run.wire])
    wire = run.exchange.get(stage, 0.0), run.config.stages[stage].batch_size / row["samples_per_s"]
    told = advice(row, memory, data.source != "emoji", data.workers, *wire, run.config.run.wire)
    if told and stage not in run.advised:
        run.advised.add(stage)
        said.append(f"{stage} {done}: {told}")
    return said


def counted(world: World, skipped: int, tally: Tally) -> dict[str, int | dict[str, int]]:
    """Samples skipped so far, by kind since the last line, and samples by source if several."""
    kinds, sources = tally.counts()
    values = [skipped, *kinds.values(), *sources.values()]
    total, *values = world.sum(torch.tensor(values)).tolist()
    by_kind = {kind: n for kind, n in zip(kinds, values, strict=False) if n}
    by_source = dict(zip(sources, values[len(kinds) :], strict=True))
    row = {"skipped": total, "skipped_by_kind": by_kind}
    return row | ({"samples_by_source": by_source} if by_source else {})


def evaluation(
    run: Run, stage: str, model: CLIP, say: Callable[[str], object] | None = None
) -> dict[str, dict]:
    """Figures of each split, by all processes; keeps the pictures for the report.

    Args:
        say: takes a line that tells how each set was evaluated; None prints it.
    """
    run.alarm.rest()
    config, world = run.config, run.world
    dtype = autocast_dtype(config.run.precision, world.device)
    training = model.training
    encoder = Encoder(model.eval(), run.tokenizer, world.device, dtype, world=world)
    began = time.perf_counter()

    def figures_of() -> tuple[dict[str, dict], dict]:
        return evaluate(
            encoder,
            run.pairs,
            prompts_of(config.data.captions),
            config.run.eval_images,
            config.run.eval_shards,
            config.caption_keys.for_retrieval(),
            prompts_in(config.run.eval_prompts),
            classes=classes_in(config.run.eval_classes),
            cache_gb=config.data.cache_gb,
            workers=config.data.workers,
            loss_batch=config.stages[stage].batch_size,
            say=say or world.print,
        )

    figures, run.shown = world.together(figures_of)
    model.train(training)
    seconds = run.metrics["seconds"]
    name = f"{stage} evaluation"
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
    return figures


def look(run: Run, stage: str, done: int, model: CLIP) -> str:
    """Evaluate in mid-stage: a line in evaluations.jsonl, and figures in words."""
    vocabulary, device = run.tokenizer.vocab_size, run.world.device
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and thrown away
        whole = unsharded(model, lambda: build_model(run.config, stage, vocabulary).to(device))
    said: list[str] = []
    figures = evaluation(run, stage, whole, said.append)
    if run.looks is not None:
        run.looks.write(stage=stage, step=done, figures=figures)
    name, first = next(iter(figures.items()))
    key = "top1" if "top1" in first else "image_to_text_r1"
    said.append(f"{stage} {done}: {name}: {key} {100 * first[key]:.1f}")
    for name, each in figures.items():
        if "loss" in each:
            said.append(f"{stage} {done}: {name}: loss {each['loss']:.4f}")
    return "\n".join(said)


def finish(run: Run, stage: str, model: CLIP) -> None:
    """results.json, the picture, and where all of it lies; every process must call it."""
    if run.shown is None:  # a finished run that is asked again, of other sets perhaps
        run.metrics["stages"][stage] = evaluation(run, stage, model)
    if not run.world.is_main:
        return
    folder = Path(run.config.run.output)
    results = {**run.metrics, "config": asdict(run.config), "torch": torch.__version__}
    report.write_results(folder / "results.json", results)
    rows = report.read_rows(folder / "log.jsonl")
    report.picture(folder / "report.png", rows=rows, results=results, **run.shown)
    print(table(results["stages"][stage]))
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in run.metrics["seconds"].items())
    print(f"{spent}. report.png, results.json, log.jsonl and checkpoints lie in {folder}")
