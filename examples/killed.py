"""Draw docs/killed.svg: the losses of a run that is killed again and again, and of one that is not.

    python examples/killed.py docs/killed.svg

The embedded drawings, small: first one process to the end; then the same run by 4 processes, by 2,
by 3 that compute a batch in 2 parts, and by 1, each but the last ended by kill -9. In fp32.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

FLAGS = (
    "--stages.short.batch-size 48 --stages.full.batch-size 48 --stages.short.steps {short} "
    "--stages.full.steps {full} --stages.short.warmup 20 --stages.full.warmup 0 "
    "--run.precision fp32 --run.threads 1 --run.save-every {save} --run.log-every 1 --device cpu"
)
# (processes, parts of a batch, share of all steps after which they are killed)
PHASES = ((4, 1, 0.25), (2, 1, 0.5), (3, 2, 0.8), (1, 1, 1.0))


def launch(output: Path, processes: int, parts: int, steps: int) -> list[subprocess.Popen]:
    """All processes of a run, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = {"short": steps * 3 // 4, "full": steps // 4, "save": max(2, steps // 24)}
    words = [sys.executable, str(ROOT / "train.py"), "--output", str(output)]
    words += FLAGS.format(**sizes).split()
    words += [f"--stages.{stage}.accumulate={parts}" for stage in ("short", "full")]
    env = os.environ | {"WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return [subprocess.Popen(words, env=each, **quiet) for each in ranks]


def losses(output: Path) -> list[float]:
    """Of the whole lines of a run's log."""
    log = output / "log.jsonl"
    text = log.read_text() if log.is_file() else ""
    return [json.loads(line)["loss"] for line in text.splitlines(keepends=True) if line[-1] == "\n"]


def run(output: Path, phases: tuple, steps: int) -> list[float]:
    """The losses of a run, whose processes are killed after a share of its steps."""
    for processes, parts, share in phases:
        members = launch(output, processes, parts, steps)
        while share < 1 and len(losses(output)) < share * steps:
            if any(member.poll() is not None for member in members):
                raise RuntimeError(f"killed: {processes} processes must train, got one that ended")
            time.sleep(0.05)
        for member in members:
            if share < 1:
                member.kill()
            member.wait()
    return losses(output)


def draw(path: Path, whole: list[float], killed: list[float]) -> None:
    """Both curves, as SVG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3))
    FigureCanvasSVG(figure)
    axis = figure.subplots()
    steps = range(1, len(whole) + 1)
    axis.plot(steps, whole, color="#8fb3dd", linewidth=4, label="one process, never killed")
    axis.plot(steps, killed, color="#0b2e59", linewidth=1, label="killed three times")
    begun = 0.0
    for processes, parts, share in PHASES:
        words = f"{processes} process{'es' * (processes > 1)}" + f" x {parts} parts" * (parts > 1)
        at = dict(ha="center", va="top", fontsize=9, transform=axis.get_xaxis_transform())
        axis.text((begun + share) / 2 * len(whole), 0.97, words, **at)
        if share < 1:
            axis.axvline(share * len(whole), color="#c8402f", linewidth=0.8, linestyle="--")
        begun = share
    axis.set(xlabel="step", ylabel="training loss", xlim=(0, len(whole)))
    axis.set_ylim(top=axis.get_ylim()[1] + 0.1)
    axis.legend(edgecolor="none", fontsize=9, loc="lower left")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    with rc_context({"svg.hashsalt": "clipa", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def main(path: Path, steps: int = 240) -> None:
    """Both runs, the picture, and the largest difference of their losses."""
    with tempfile.TemporaryDirectory() as folder:
        whole = run(Path(folder) / "whole", PHASES[-1:], steps)
        killed = run(Path(folder) / "killed", PHASES, steps)
    draw(path, whole, killed)
    most = max(abs(one - other) for one, other in zip(whole, killed, strict=True))
    if most > 5e-5:
        sys.exit(f"killed: losses must be equal to fp32's rounding, got {most:.1e} between them")
    print(f"{path}: {len(whole)} steps, largest difference of losses {most:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
