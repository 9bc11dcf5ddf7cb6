"""Roofs of recorded launches, read from their machine code: what bounds each, modelled.

    python -m bench.meters.roofs                        every launch of calls.py, on sm_80 and sm_90
    python -m bench.meters.roofs attention --arch 90    those of kernels in one file or folder
    python -m bench.meters.roofs --only "h14 short" --json roofs.json

Six times a launch would take if one thing alone bounded it, in microseconds. None is measured.

    memory   distinct bytes of the tensors passed (of images the kept patches) / HBM bandwidth
    tensor   FLOPs of the tensor-core instructions executed / their peak
    issue    warp instructions / (4 a clock and SM)
    pipe     the busiest of fma, alu, xu and lsu, at the rates of CUDA's throughput table
    l2       bytes that global loads and stores ask for, all lanes, masked ones too / 5120 a clock
    latency  waves x a block alone: rounds x 800 ns + barriers x 45 + instructions of a warp x 2.2

Counted: instructions, from the SASS, each as often as its loops run; trip counts, bytes and grid
from the launch's arguments; blocks an SM from registers and shared memory. A round is a global load
that waits for an earlier one, in a loop one an iteration; loads straight to shared memory count as
fetched ahead. Guessed: the 800 ns, the 2.2 clocks and the 45, to +-40%; and that all programs do
the same, the code of rare branches left out. sm_100 is not read: tcgen05 hides its sizes. `whole`
adds torch's operators: a library's product is taken to reach 0.7 of the peak.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch._library.custom_ops import OPDEFS

from bench.meters.calls import recorded
from bench.meters.compiled import Row, compiled, disassembly, read
from bench.meters.launches import Launch, distinct, recording
from bench.meters.torch_ops import TorchCounter


class Gpu(NamedTuple):
    """Data sheets' numbers; clocks an instruction of a warp keeps its quarter of an SM."""

    sms: int
    clock: float
    bandwidth: float
    tensor: float  # dense FLOP/s in 16 bits
    fp32: float
    to_float: float


GPUS = {
    80: Gpu(108, 1.41e9, 2.0e12, 312e12, fp32=2, to_float=8),  # A100
    90: Gpu(132, 1.70e9, 3.35e12, 989e12, fp32=1, to_float=2),  # H100
}
ROUND, INSTRUCTION, BARRIER = 800e-9, 2.2, 45  # seconds, clocks, clocks
MMA_SYNC_ON_90 = 0.62  # of the peak, which takes wgmma
LIBRARY = 0.7  # of the peak, that products of torch's library reach
L2 = 5120  # bytes a clock

FMA = {"FFMA", "FMUL", "FADD", "FFMA2", "HFMA2", "HADD2", "HMUL2"}
ALU = {
    "IADD3", "LOP3", "SHF", "SEL", "FSEL", "FSETP", "ISETP", "FMNMX", "IMNMX", "PRMT", "LEA",
    "VIADD", "I2FP", "F2FP", "PLOP3", "VIADDMNMX", "SGXT", "IABS", "VIMNMX", "MOV", "FCHK", "BMSK",
    "IDP",
}  # fmt: skip
XU = {"MUFU", "F2I", "POPC", "FLO", "BREV", "F2F"}
SHARED = {"LDS", "STS", "LDSM", "STSM", "LDGSTS"}
GLOBAL = {"LDG", "STG", "LDGSTS"}


class Instruction(NamedTuple):
    """One line of SASS."""

    address: int
    name: str
    modifiers: list[str]
    predicate: str
    operands: str

    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if found and self.name == "BRA" else None

    def bytes(self) -> int:
        """That a lane moves."""
        return {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}.get(
            next((m for m in self.modifiers if m in ("U8", "S8", "U16", "S16", "64", "128")), ""), 4
        )


def instructions(listing: str) -> list[Instruction]:
    """Those of cuobjdump's listing, in order."""
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    return [
        Instruction(int(at, 16), *_split(name), predicate.strip(), operands)
        for at, predicate, name, operands in re.findall(pattern, listing)
    ]


def _split(name: str) -> tuple[str, list[str]]:
    first, *rest = name.split(".")
    return first, rest


# Trip counts of a kernel's loops in the order of its code, from its arguments by name; nested loops
# outer first. A kernel that is not here has no loop.
def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _backward_of_long(a: dict[str, Any]) -> tuple[float, ...]:
    steps, tail = _cdiv(a["max_seqlen"], a["STEP"]), a["TAIL"] > 0
    full = a["max_seqlen"] // a["BLOCK"] if tail else _cdiv(a["max_seqlen"], a["BLOCK"])
    once = (full, steps, *([steps] if tail else []))
    return once + once


TRIPS: dict[str, Callable[[dict[str, Any]], tuple[float, ...]]] = {
    "attention_long_fwd": lambda a: (_cdiv(a["max_seqlen"], a["BLOCK_N"]),),
    "attention_long_bwd": _backward_of_long,
    "add_layer_norm_fwd": lambda a: (a["rows_a_program"] / a["BLOCK_M"],),
    "add_layer_norm_bwd": lambda a: (a["rows_a_program"] / a["BLOCK_M"],),
    "bias_gelu_bwd": lambda a: (a["rows_a_program"] / a["BLOCK_M"],),
    "sum_partial": lambda a: (_cdiv(a["parts"], a["BLOCK_P"]),),
    "sum_sorted": lambda a: (
        a["order_ptr"].numel() / (a["ends_ptr"].numel() - 1) / a["BLOCK_R"],
    ),
    "contrastive_fwd": lambda a: (a["down"], a["across"], a["D"] / a["BLOCK_K"]),
    "contrastive_bwd": lambda a: (a["D"] / a["BLOCK_K"],),
    "last_product": lambda a: (a["height"] / a["BLOCK_K"],),
    "contrastive_merge": lambda a: tuple(
        _cdiv(a[parts], a["PARTS"]) for parts in ("row_parts", "col_parts")
    ),
    "contrastive_sum": lambda a: (_cdiv(a["parts"], a["BLOCK"]),),
    "choose_patches": lambda a: (42,) if a["MASK"] == "random" else (),
}  # fmt: skip
# Instructions of the branch that only tiles on the diagonal take.
DIAGONAL = {"contrastive_fwd": range(60, 700)}
# What an iteration has one of, where ptxas unrolls the loop.
UNROLLED = {"choose_patches": "REDUX"}


@dataclass
class Roofs:
    """A launch's six modelled times in seconds, and what they come from."""

    kernel: str
    shape: str
    call: str
    arch: int
    registers: int
    blocks_per_sm: int
    grid: int
    instructions: float  # of a warp
    rounds: float
    loops: tuple[int, int]  # found in the code, and known here; a difference makes times unsure
    pipe: str
    times: dict[str, float] = field(default_factory=dict)

    @property
    def bound(self) -> str:
        """The largest of the six."""
        return max(self.times, key=self.times.__getitem__)


def roofs(launch: Launch, row: Row, listing: str) -> Roofs:
    """The roofs of a launch whose row and disassembly are given."""
    code, gpu = instructions(listing), GPUS[launch.arch]
    trips = TRIPS.get(launch.name, lambda a: ())(launch.arguments)
    loops = _loops(code)
    runs = _runs(code, loops, trips, launch.name)
    busy, flops, asked = _work(code, runs, gpu)
    grid = math.prod(launch.grid)
    warps, sms = row.num_warps * grid, min(gpu.sms, grid)
    executed = sum(runs)
    rounds = _rounds(code, loops, runs)
    peak = gpu.tensor
    if launch.arch == 90 and any(one.name == "HMMA" for one in code):
        peak *= MMA_SYNC_ON_90
    pipes = {pipe: busy[pipe] * warps / (4 * sms * gpu.clock) for pipe in ("fma", "alu", "xu")}
    pipes["lsu"] = busy["lsu"] * warps / (sms * gpu.clock)
    pipe = max(pipes, key=pipes.__getitem__)
    clocks = busy["barriers"] * BARRIER + executed * max(INSTRUCTION, row.num_warps / 4)
    waves = math.ceil(grid / (gpu.sms * max(row.blocks_per_sm, 1)))
    made = Roofs(
        launch.name, launch.shape, launch.call, launch.arch, row.registers, row.blocks_per_sm,
        grid, executed, rounds, (len(loops), len(trips)), pipe,
    )  # fmt: skip
    made.times = dict(
        memory=least_bytes(launch) / gpu.bandwidth,
        tensor=flops * warps / peak,
        issue=executed * warps / (4 * sms * gpu.clock),
        pipe=pipes[pipe],
        l2=asked * warps / (L2 * gpu.clock),
        latency=waves * (rounds * ROUND + clocks / gpu.clock),
    )
    return made


def least_bytes(launch: Launch) -> float:
    """Distinct bytes of the tensors passed, each view once; of images, the kept patches."""
    sizes: dict[tuple, float] = {}
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor):
            share = 1.0
            if name == "images_ptr":
                _, _, height, width = value.shape
                columns, kept = launch.arguments["columns"], launch.arguments["kept"]
                share = kept / (columns * (height * columns // width))
            place = (value.untyped_storage()._cdata, value.storage_offset())
            sizes[place] = max(sizes.get(place, 0), share * value.numel() * value.element_size())
    return sum(sizes.values())


def whole(call: Callable[[], None], arch: int) -> dict[str, float]:
    """Modelled seconds of all that a call does, by kernel and by torch's operator: of a launch the
    largest of six, of an operator the larger of its bytes and its FLOPs (16 bits) at LIBRARY."""
    gpu, times = GPUS[arch], Counter[str]()
    with recording(arch) as launches, TorchCounter() as counter:
        call()
    for launch in launches:
        code = compiled(launch)
        listing = disassembly(code)
        made = roofs(launch, read(launch, code, listing), listing)
        times[launch.name] += max(made.times.values())
    for op in counter.ops.values():
        if f"clipa::{op.name}" not in OPDEFS:  # ours consist of what is listed
            moved = (op.read + op.written) / gpu.bandwidth
            times[op.name] += max(moved, op.flops / (LIBRARY * gpu.tensor))
    return dict(times)


def _loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """(first, last) instruction of each loop: backward branches, but for the one that ends all, and
    for returns from code that lies behind a loop: they begin in it and end outside."""
    places = {one.address: place for place, one in enumerate(code)}
    loops = sorted(
        (places[one.target()], place)
        for place, one in enumerate(code)
        if one.target() in places and places[one.target()] < place
    )
    return [
        (first, last)
        for first, last in loops
        if not any(other < first <= to < last for other, to in loops)
    ]


def _runs(
    code: list[Instruction], loops: list[tuple[int, int]], trips: tuple[float, ...], name: str
) -> list[float]:
    """How often a warp executes each instruction."""
    runs = [1.0 if one.name != "NOP" else 0.0 for one in code]
    places = {one.address: place for place, one in enumerate(code)}
    for place, one in enumerate(code):  # branches that few take
        to = places.get(one.target(), 0)
        inside = any(place < first < to for first, _ in loops)
        if one.predicate and to - place in DIAGONAL.get(name, ()) and not inside:
            runs[place + 1 : to] = [0.0] * (to - place - 1)
    for (first, last), trip in zip(loops, trips, strict=False):
        body = slice(first, last + 1)
        if name in UNROLLED:
            trip /= max(1, sum(one.name == UNROLLED[name] for one in code[body]))
        runs[body] = [run * trip for run in runs[body]]
    return runs


def _work(
    code: list[Instruction], runs: list[float], gpu: Gpu
) -> tuple[Counter[str], float, float]:
    """Of a warp: clocks of each pipe and barriers; tensor-core FLOPs; bytes asked for."""
    busy: Counter[str] = Counter()
    flops = asked = 0.0
    for one, run in zip(code, runs, strict=True):
        text = ".".join([one.name, *one.modifiers])
        if one.name in FMA:
            busy["fma"] += run * gpu.fp32
        elif one.name == "IMAD":
            busy["fma"] += run * 2
        elif one.name in ALU:
            busy["alu"] += run * 2
        elif one.name in XU:
            busy["xu"] += run * 8
        elif one.name == "I2F":
            busy["xu"] += run * gpu.to_float
        elif one.name in ("SHFL", "REDUX"):
            busy["lsu"] += run
        elif one.name in SHARED:
            wide = {"4": 16, "2": 8}.get(one.modifiers[-1] if one.modifiers else "", one.bytes())
            busy["lsu"] += run * wide / 4
        elif one.name == "BAR":
            busy["barriers"] += run
        elif one.name == "HMMA":
            flops += run * (4096 if "16816" in text else 2048)
        elif found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", text):
            flops += run * 2 * math.prod(map(int, found.groups())) / 4  # four warps share it
        if one.name in GLOBAL:
            asked += run * 32 * one.bytes()
    return busy, flops, asked


def _registers(text: str) -> set[int]:
    found = re.findall(r"(?<![U\w])R(\d+)(\.64)?", text)
    return {int(n) + more for n, wide in found for more in range(2 if wide else 1)}


def _rounds(code: list[Instruction], loops: list[tuple[int, int]], runs: list[float]) -> float:
    """Dependent global loads on a warp's way: of the code outside loops and of each loop's body,
    as often as it runs."""
    inner = [
        max((loop for loop in loops if loop[0] <= place <= loop[1]), default=None)
        for place in range(len(code))
    ]
    total = 0.0
    for part in dict.fromkeys(inner):
        places = [p for p, loop in enumerate(inner) if loop == part and runs[p]]
        if places:
            often = runs[places[-1]]
            total += often * _rounds_of([code[place] for place in places])
    return total


def _rounds_of(code: list[Instruction]) -> int:
    """A load issued after a wait on an earlier one is a new round."""
    born: dict[int, int] = {}
    now = 0
    for one in code:
        first, _, rest = one.operands.partition(",")
        reads = _registers(one.operands if one.name.startswith("ST") else rest)
        waits = [born.pop(register) for register in reads if register in born]
        now = max([now, *(age + 1 for age in waits)])
        if one.name == "LDG":
            for register in _registers(first):
                born.update(dict.fromkeys(range(register, register + one.bytes() // 4 or 1), now))
    return max([now, *(age + 1 for age in born.values())])


TIMES = ("memory", "tensor", "issue", "pipe", "l2", "latency")


def heading() -> str:
    """The line above the rows."""
    return (
        f"modelled microseconds{'':59} sm regs blocks   grid insts rounds"
        f"{''.join(f'{name:>9}' for name in TIMES)}  bound"
    )


def line(one: Roofs) -> str:
    """A row below it; a ? where the code has other loops than are known here."""
    label = f"{one.kernel} {one.shape}, {one.call}"
    times = "".join(f"{1e6 * one.times[name]:9.1f}" for name in TIMES)
    bound = one.pipe if one.bound == "pipe" else one.bound
    return (
        f"{label[:79]:80} {one.arch:2}{one.registers:5}{one.blocks_per_sm:7}{one.grid:7}"
        f"{one.instructions:6.0f}{one.rounds:7.0f}{times}  {bound}"
        f"{'' if one.loops[0] == one.loops[1] else ' ?'}"
    )


def as_json(one: Roofs) -> dict[str, Any]:
    """Its fields; the six times as modelled_us."""
    values = dict(vars(one))
    times = {name: 1e6 * seconds for name, seconds in values.pop("times").items()}
    return values | dict(modelled_us=times, bound=one.bound)


def main() -> None:
    """Print the roofs of all launches, or of those of the ops named."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("ops", nargs="*", help="folders of clipa_kernels; none: all")
    parser.add_argument("--arch", nargs="*", type=int, default=[80, 90], choices=list(GPUS))
    parser.add_argument("--only", default="", help="regular expression that labels must match")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    asked = parser.parse_args()
    launches = [
        launch
        for launch in recorded(*asked.ops, archs=tuple(asked.arch))
        if re.search(asked.only, launch.label)
    ]
    made, codes = [], {}
    print(heading(), flush=True)
    for launch in distinct(launches, sizes=True):
        if launch.key() not in codes:
            code = compiled(launch)
            codes[launch.key()] = code, disassembly(code)
        code, listing = codes[launch.key()]
        made.append(roofs(launch, read(launch, code, listing), listing))
        print(line(made[-1]), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps([as_json(one) for one in made], indent=1))


if __name__ == "__main__":
    main()
