"""One page of what the benches measured, what was modelled and what was compiled, and its plots.

    pytest bench --benchmark-json bench.json
    python -m bench.meters.roofs --json roofs.json
    python -m bench.compiled --json > compiled.jsonl
    python -m bench.report bench.json --roofs roofs.json --compiled compiled.jsonl --to report

writes report.md and, beside it, a .png a bench: times of each over what was varied, ratios to ours.
Each table says what its figures are: measured, modelled from machine code, or counted by the
compiler. What was not run is not there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

Case = dict[str, Any]  # of pytest-benchmark: group, params, stats, extra_info


def cases_of(path: Path) -> dict[str, list[Case]]:
    """The cases of a file of pytest-benchmark by bench, those alone that name who was measured.

    Raises: ValueError for a file of something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"report: {path} must be of --benchmark-json, got {error!r}") from error
    benches = defaultdict(list)
    for case in found:
        if "name" in (case["params"] or {}):
            benches[Path(case["fullname"].split("::")[0]).stem].append(case)
    return dict(benches)


def groups_of(cases: list[Case]) -> dict[str, dict[str, Case]]:
    """By group, who was measured in it: ours first, and no group without us."""
    groups: dict[str, dict[str, Case]] = defaultdict(dict)
    for case in cases:
        groups[case["group"] or case["name"]][case["params"]["name"]] = case
    return {group: who for group, who in groups.items() if "ours" in who}


def measured(bench: str, cases: list[Case]) -> list[str]:
    """A table: a row a group, a column for each that was measured."""
    groups = groups_of(cases)
    names = sorted({name for who in groups.values() for name in who} - {"ours"})
    info = cases[0]["extra_info"]
    device = info.get("device", "cpu" if "cpu" in str(cases[0]["group"]) else "a GPU")
    lines = [
        f"## {bench}",
        "",
        f"Measured on {device}, torch {info.get('torch', 'of this machine')}: the shortest of the "
        "rounds, and its ratio to ours in the same run.",
        "",
        f"| | ours | {' | '.join(names)} |",
        "|---" * (len(names) + 2) + "|",
    ]
    for group, who in groups.items():
        own = who["ours"]["stats"]["min"]
        row = [group, duration(own)]
        for name in names:
            taken = who[name]["stats"]["min"] if name in who else None
            row.append("" if taken is None else f"{duration(taken)} ({taken / own:.2f}x)")
        lines.append(f"| {' | '.join(row)} |")
    return lines


def duration(seconds: float) -> str:
    """In the unit that gives one to three digits before the point."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def modelled(rows: list[dict]) -> list[str]:
    """The longest launch of each kernel: its modelled time beside that of its bytes."""
    longest: dict[tuple, dict] = {}
    for row in rows:
        key = row["kernel"], row["arch"]
        longest[key] = max(longest.get(key, row), row, key=lambda r: max(r["modelled_us"].values()))
    lines = ["## Kernels, modelled", ""]
    lines += ["Modelled from machine code, not measured: the largest of six roofs, and memory's."]
    lines += ["", "| kernel | sm | longest launch | us | memory, us | bound by |"]
    lines += ["|---" * 6 + "|"]
    for (kernel, arch), row in sorted(longest.items()):
        times = row["modelled_us"]
        figures = f"{max(times.values()):.3g} | {times['memory']:.3g}"
        launch = f"{row['shape']}, {row['call']}"
        lines.append(f"| {kernel} | {arch} | {launch} | {figures} | {row['bound']} |")
    return lines


def compiled(rows: list[dict]) -> list[str]:
    """Registers, spills and blocks an SM of each kernel, the worst of its launches."""
    by: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        by[row["kernel"], row["arch"]].append(row)
    lines = ["## Kernels, compiled", "", "Counted by the compiler over all recorded launches.", ""]
    lines += ["| kernel | sm | launches | most registers | spilled bytes | fewest blocks an SM |"]
    lines += ["|---" * 6 + "|"]
    for (kernel, arch), found in sorted(by.items()):
        most = max(row["registers"] for row in found)
        spilled = max(row["spill_stores"] for row in found)
        fewest = min(row["blocks_per_sm"] for row in found)
        lines.append(f"| {kernel} | {arch} | {len(found)} | {most} | {spilled} | {fewest} |")
    return lines


def plot(bench: str, cases: list[Case], path: Path) -> None:
    """Times over what was varied, in a panel for each setting of the rest: log both ways."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    along = _varied(cases)
    panels: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        params = dict(case["params"])
        name, x = params.pop("name"), params.pop(along, None) if along else None
        if along and not isinstance(x, (int, float)):
            continue
        title = ", ".join(f"{value}" for value in params.values())
        place = x if along else len(panels[title][name])
        panels[title][name].append((place, 1e3 * case["stats"]["min"]))
    columns = min(4, max(1, len(panels)))
    rows = -(-max(1, len(panels)) // columns)
    size = (3.2 * columns, 2.6 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    names = sorted({name for lines in panels.values() for name in lines}, key=lambda n: n != "ours")
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for number, name in enumerate(names):
            points = sorted(lines.get(name, []))
            style = dict(color=f"C{number}", linewidth=2.2 if name == "ours" else 1)
            axis.plot(*zip(*points, strict=True) if points else ([], []), "o-", label=name, **style)
        axis.set(title=title, xlabel=along or "", yscale="log", ylabel="ms")
        if along:
            axis.set_xscale("log")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=7)
    figure.suptitle(f"{bench}: measured, forward and backward", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _varied(cases: list[Case]) -> str | None:
    """The numeric parameter with most values, for the x axis."""
    values: dict[str, set] = defaultdict(set)
    for case in cases:
        for name, value in case["params"].items():
            if isinstance(value, (int, float)):
                values[name].add(value)
    best = max(values, key=lambda name: len(values[name]), default=None)
    return best if best and len(values[best]) > 1 else None


def main(argv: list[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("benches", nargs="+", type=Path, help="files of --benchmark-json")
    parser.add_argument("--roofs", type=Path, help="of bench.meters.roofs --json")
    parser.add_argument("--compiled", type=Path, help="what bench.compiled --json printed")
    parser.add_argument("--to", type=Path, default=Path("report"), help="path without its suffix")
    flags = parser.parse_args(argv)
    lines = ["# Benches", ""]
    try:
        flags.to.parent.mkdir(parents=True, exist_ok=True)
        for path in flags.benches:
            for bench, cases in cases_of(path).items():
                picture = flags.to.with_name(f"{flags.to.name}-{bench.removeprefix('bench_')}.png")
                plot(bench, cases, picture)
                lines += [*measured(bench, cases), "", f"![{bench}]({picture.name})", ""]
        if flags.roofs:
            lines += [*modelled(json.loads(flags.roofs.read_text())), ""]
        if flags.compiled:
            rows = [json.loads(line) for line in flags.compiled.read_text().splitlines() if line]
            lines += [*compiled(rows), ""]
    except (ValueError, OSError) as error:
        sys.exit(f"bench.report: {error}")
    flags.to.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    print(flags.to.with_suffix(".md"))


if __name__ == "__main__":
    main()
