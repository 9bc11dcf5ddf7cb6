"""Compile what the library launches for GPUs that are not here: what the machine code costs.

    python -m bench.compiled                 every launch of the calls in calls.py
    python -m bench.compiled attention       those of kernels in one file or folder
    python -m bench.compiled --jobs 8        by eight processes; rows in the same order
    python -m bench.compiled --arch 90 --json    for sm_90 alone; a line of JSON a row

    regs        registers a thread, of 255
    spill st/ld bytes a thread stores to and loads from local memory for want of registers
    shared KB   a block's, against what one block may have; a launch beyond it fails
    blocks/SM   resident at once, with what limits it: registers, shared memory, warps, blocks
                or tensor memory; warps %: the share of an SM's warps that these are
    mma.sync, wgmma, tcgen05   tensor-core instructions of sm_80, sm_90 and sm_100
    load, store width          instructions to global memory by bytes a thread, "16:8 4:2" (eight of
                               16 bytes and two of 4); those of the tensor memory accelerator are
                               not among them

Counts are of the machine code, each instruction once, however often a loop runs it. Compiled is
what Triton's own binder makes of a launch; see launches.py. cuobjdump is that of Triton.
TRITON_INTERPRET must not be set. A row is printed as soon as it and those before it are there. The
command ends with 1 where a launch does not compile, whose error stands in its row's place, or does
not fit its GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.meters.launches import Launch, distinct


@dataclass(frozen=True)
class Arch:
    """Limits of one SM (CUDA C++ Programming Guide, "Technical Specifications per CC")."""

    block_shared: int  # bytes one block may have, opted in
    shared: int  # bytes, 1 KB a block of it reserved
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    tensor_columns: int = 0  # of tensor memory


ARCHS = {
    80: Arch(163 << 10, 164 << 10),
    90: Arch(227 << 10, 228 << 10),
    100: Arch(227 << 10, 228 << 10, tensor_columns=512),
}
TENSOR_CORE = {
    "mma.sync": re.compile(r"[HIQODB]MMA"),
    "wgmma": re.compile(r"[HIQB]GMMA"),
    "tcgen05": re.compile(r"UTC\w*MMA"),
}
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}  # bytes; else 4


@dataclass
class Row:
    """A launch compiled; fields as in the module's docstring, in bytes.

    types: of the kernel's arguments by name, as Triton writes them; sizes: its integers.
    """

    label: str
    arch: int
    num_warps: int
    num_stages: int
    kernel: str = ""
    types: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    shared_limit: int = 0
    blocks_per_sm: int = 0
    limiter: str = ""
    occupancy: float = 0.0  # resident warps of those an SM can hold
    tensor_core: Counter[str] = field(default_factory=Counter)
    load_widths: Counter[int] = field(default_factory=Counter)
    store_widths: Counter[int] = field(default_factory=Counter)

    @property
    def fits(self) -> bool:
        """Whether the GPU can launch it."""
        return self.blocks_per_sm > 0


def compile_launch(launch: Launch) -> Row:
    """Compile a launch for its architecture and read the machine code.

    Raises: RuntimeError where Triton or ptxas refuses the kernel; ValueError for an architecture
    that is not among ARCHS.
    """
    code = compiled(launch)
    return read(launch, code, disassembly(code))


def compiled(launch: Launch) -> Any:
    """Triton's compiled kernel of a launch. Raises as compile_launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if launch.arch not in ARCHS:
        raise ValueError(f"compile_launch: arch must be among {sorted(ARCHS)}, got {launch.arch}")
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attrs)
    target = GPUTarget("cuda", launch.arch, 32)
    try:
        return triton.compile(source, target=target, options=launch.options)
    except Exception as error:
        raise RuntimeError(
            f"compile_launch: {launch.label} must compile for sm_{launch.arch}, got {error}"
        ) from error


def read(launch: Launch, code: Any, listing: str) -> Row:
    """The row of a launch, from its compiled kernel and that one's disassembly."""
    row = Row(launch.label, launch.arch, code.metadata.num_warps, code.metadata.num_stages)
    row.kernel, row.types = launch.name, launch.signature
    row.sizes = {
        name: value for name, value in launch.arguments.items() if type(value) in (int, bool)
    }
    row.registers = int(re.search(r"\bREG:(\d+)", listing)[1])
    row.shared, row.shared_limit = code.metadata.shared, ARCHS[launch.arch].block_shared
    columns = getattr(code.metadata, "tmem_size", None) or 0
    row.blocks_per_sm, row.limiter = _resident(row, columns)
    row.occupancy = row.blocks_per_sm * row.num_warps / ARCHS[launch.arch].warps
    _count(row, listing)
    return row


def disassembly(code: Any) -> str:
    """What cuobjdump tells of a compiled kernel: its use of registers, and its instructions."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code.asm["cubin"])
        return _run(knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", path)


def _resident(row: Row, tensor_columns: int) -> tuple[int, str]:
    """Blocks on an SM at once, and what allows no more; 0 where not even one fits."""
    arch = ARCHS[row.arch]
    # A warp gets registers in units of 256, from its quarter of the SM.
    warp = -(-max(row.registers, 1) * 32 // 256) * 256
    limits = {
        "registers": arch.registers // 4 // warp * 4 // row.num_warps,
        "shared": arch.shared // (row.shared + 1024),
        "warps": arch.warps // row.num_warps,
        "blocks": arch.blocks,
    }
    if tensor_columns:
        limits["tensor memory"] = arch.tensor_columns // tensor_columns
    limiter = min(limits, key=limits.__getitem__)
    return limits[limiter], limiter


def _count(row: Row, listing: str) -> None:
    """Count tensor-core instructions, and the widths of those to global and local memory."""
    for found in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing):
        operation, *modifiers = found[1].split(".")
        for name, pattern in TENSOR_CORE.items():
            row.tensor_core[name] += bool(pattern.fullmatch(operation))
        width = next((WIDTHS[each] for each in modifiers if each in WIDTHS), 4)
        if operation in ("LDG", "LDGSTS"):  # LDGSTS: straight to shared memory
            row.load_widths[width] += 1
        elif operation == "STG":
            row.store_widths[width] += 1
        elif operation == "STL":  # the same bytes that ptxas tells of
            row.spill_stores += width
        elif operation == "LDL":
            row.spill_loads += width


def _run(*command: str | Path) -> str:
    """What a tool prints, on either stream."""
    run = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if run.returncode:
        name = os.path.basename(command[0])
        raise RuntimeError(f"compile_launch: {name} must succeed, got {run.stdout.strip()}")
    return run.stdout


def rows(launches: list[Launch], jobs: int = 1) -> Iterator[Row | RuntimeError]:
    """A row for each launch, or why it does not compile, in their order, as they come."""
    if jobs == 1:
        yield from map(_row, launches)
        return
    global _launches
    _launches = launches  # processes forked from here have it: kernels cannot be pickled
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(_row_of, range(len(launches)))


_launches: list[Launch] = []


def _row_of(place: int) -> Row | RuntimeError:
    return _row(_launches[place])


def _row(launch: Launch) -> Row | RuntimeError:
    try:
        return compile_launch(launch)
    except RuntimeError as error:
        return error


def heading(width: int) -> str:
    """The line above the rows, whose labels take `width` columns."""
    return (
        f"{'launch':{width}} sm warps stages regs  spill st/ld     shared KB  blocks/SM          "
        f"  warps %  {'  '.join(TENSOR_CORE)}  load width, store width"
    )


def line(row: Row, width: int) -> str:
    """A row below it."""
    tensor_core = "".join(f"{row.tensor_core[name]:{len(name) + 2}}" for name in TENSOR_CORE)
    widths = (
        " ".join(f"{size}:{count}" for size, count in sorted(counts.items(), reverse=True))
        for counts in (row.load_widths, row.store_widths)
    )
    shared = f"{row.shared / 1024:.1f}/{row.shared_limit // 1024}"
    resident = f"{row.blocks_per_sm} ({row.limiter})" if row.fits else "DOES NOT FIT"
    return (
        f"{row.label:{width}} {row.arch:3}{row.num_warps:5}{row.num_stages:7}"
        f"{row.registers:5}{row.spill_stores:7}/{row.spill_loads:<5}{shared:>12}  "
        f"{resident:20}{100 * row.occupancy:7.0f}{tensor_core}  {', '.join(widths)}"
    )


def table(rows: Iterable[Row]) -> str:
    """One line a row."""
    rows = list(rows)
    width = max([6, *(len(row.label) for row in rows)])
    return "\n".join([heading(width), *(line(row, width) for row in rows)])


def main() -> int:
    """Print the table of all launches, or of those of the ops named."""
    from bench.meters.calls import CALLS, recorded

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("ops", nargs="*", help="folders of clipa_kernels; none: all")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--arch", nargs="*", type=int, default=list(ARCHS), choices=list(ARCHS))
    parser.add_argument("--json", action="store_true", help="a line of JSON a row")
    parser.add_argument("--calls", nargs="*", choices=list(CALLS), help="whose launches; none: all")
    parser.add_argument("--part", nargs=2, type=int, default=(0, 1), help="which of how many")
    asked = parser.parse_args()
    if asked.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {asked.jobs}")
    launches = distinct(recorded(*asked.ops, archs=tuple(asked.arch), kinds=asked.calls))
    launches = launches[asked.part[0] :: asked.part[1]]
    width = max((len(launch.label) for launch in launches), default=6)
    if not asked.json:
        print(heading(width), flush=True)
    good = True
    for row in rows(launches, asked.jobs):
        fine = isinstance(row, Row)
        if asked.json:
            print(json.dumps(vars(row) if fine else dict(error=str(row))), flush=True)
        else:
            print(line(row, width) if fine else row, flush=True)
        good = good and fine and row.fits
    return int(not good)


if __name__ == "__main__":
    raise SystemExit(main())
