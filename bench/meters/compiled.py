"""Compile kernels for GPUs that are not here, and report what the machine code costs.

    python -m bench.meters.compiled                 every case of clipa_kernels/_triton
    python -m bench.meters.compiled attention       those of one file

    regs        registers a thread, of 255
    spill st/ld bytes a thread stores to and loads from local memory for want of registers
    shared KB   a block's, against what one block may have; a launch beyond it fails
    blocks/SM   resident at once, with what limits it: registers, shared memory, warps, blocks
                or tensor memory; warps %: the share of an SM's warps that these are
    mma.sync, wgmma, tcgen05   tensor-core instructions of sm_80, sm_90 and sm_100
    load, store width          instructions to global memory by bytes a thread, "16:8 4:2" (eight of
                               16 bytes and two of 4); those of the tensor memory accelerator are
                               not among them

Counts are of the machine code, each instruction once, however often a loop runs it. ptxas and
nvdisasm are those that Triton ships. TRITON_INTERPRET must not be set. The command ends with 1
where a case does not compile or does not fit its GPU.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipa_kernels import _triton
from clipa_kernels._triton.common import Case


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
    """A case compiled for one architecture; fields as in the module's docstring, in bytes."""

    label: str
    arch: int
    num_warps: int
    num_stages: int
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


def compile_case(case: Case, arch: int) -> Row:
    """Compile one case for one architecture and read the machine code.

    Raises: RuntimeError under Triton's interpreter, and where Triton or ptxas refuses the kernel;
    ValueError where an argument of the kernel is in neither of the case's dictionaries.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("compile_case: TRITON_INTERPRET must be unset, got 1")
    if arch not in ARCHS:
        raise ValueError(f"compile_case: arch must be one of {sorted(ARCHS)}, got {arch}")
    signature = _signature(case)
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if name not in case.unaligned and re.match(r"\*|[iu](32|64)$", kind)
    }
    source = ASTSource(case.kernel, signature, dict(case.constexprs), aligned)
    options = dict(num_warps=case.num_warps, num_stages=case.num_stages)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        raise RuntimeError(
            f"compile_case: {case.label} must compile for sm_{arch}, got {error}"
        ) from error
    row = Row(case.label, arch, compiled.metadata.num_warps, case.num_stages)
    row.registers, row.spill_stores, row.spill_loads = _ptxas(compiled, arch)
    row.shared, row.shared_limit = compiled.metadata.shared, ARCHS[arch].block_shared
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    row.blocks_per_sm, row.limiter = _resident(row, columns)
    row.occupancy = row.blocks_per_sm * row.num_warps / ARCHS[arch].warps
    _read_code(row, compiled.asm["cubin"])
    return row


def _signature(case: Case) -> dict[str, str]:
    """Types in the kernel's own order."""
    signature = {}
    for name in case.kernel.arg_names:
        if name not in case.signature and name not in case.constexprs:
            raise ValueError(
                f"compile_case: {case.label} must give every argument of the kernel, got no {name}"
            )
        signature[name] = "constexpr" if name in case.constexprs else case.signature[name]
    unknown = (set(case.signature) | set(case.constexprs)) - set(signature)
    if unknown:
        raise ValueError(
            f"compile_case: {case.label} must name arguments of the kernel, got {sorted(unknown)}"
        )
    return signature


def _ptxas(compiled: Any, arch: int) -> tuple[int, int, int]:
    """(registers, spill stores, spill loads) that ptxas tells, called as Triton calls it."""
    from triton import knobs

    tool = knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas
    ptx = compiled.asm["ptx"]
    extra = (compiled.metadata.ptx_options or "").split()
    if not compiled.metadata.enable_fp_fusion:
        extra.append("--fmad=false")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        name = re.search(r"\.target\s+(sm_\w+)", ptx)[1]
        flags = ["-v", "-lineinfo", "--regAllocOptLevel=2", *extra, f"--gpu-name={name}"]
        log = _run(tool.path, *flags, path, "-o", path.with_suffix(".cubin"))
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    return int(registers[1]), int(spills[1]), int(spills[2])


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


def _read_code(row: Row, cubin: bytes) -> None:
    """Count tensor-core instructions and the widths of those to global memory."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        listing = _run(knobs.nvidia.nvdisasm.path, "-c", path)
    for found in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing):
        operation, *modifiers = found[1].split(".")
        for name, pattern in TENSOR_CORE.items():
            row.tensor_core[name] += bool(pattern.fullmatch(operation))
        width = next((WIDTHS[each] for each in modifiers if each in WIDTHS), 4)
        if operation in ("LDG", "LDGSTS"):  # LDGSTS: straight to shared memory
            row.load_widths[width] += 1
        elif operation == "STG":
            row.store_widths[width] += 1


def _run(*command: str | Path) -> str:
    """What a tool prints, on either stream."""
    run = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if run.returncode:
        name = os.path.basename(command[0])
        raise RuntimeError(f"compile_case: {name} must succeed, got {run.stdout.strip()}")
    return run.stdout


def table(rows: Iterable[Row]) -> str:
    """One line a row."""
    rows = list(rows)
    width = max([4, *(len(row.label) for row in rows)])
    lines = [
        f"{'case':{width}} sm warps stages regs  spill st/ld     shared KB  blocks/SM          "
        f"  warps %  {'  '.join(TENSOR_CORE)}  load width, store width"
    ]
    for row in rows:
        tensor_core = "".join(f"{row.tensor_core[name]:{len(name) + 2}}" for name in TENSOR_CORE)
        widths = (
            " ".join(f"{size}:{count}" for size, count in sorted(counts.items(), reverse=True))
            for counts in (row.load_widths, row.store_widths)
        )
        shared = f"{row.shared / 1024:.1f}/{row.shared_limit // 1024}"
        resident = f"{row.blocks_per_sm} ({row.limiter})" if row.fits else "DOES NOT FIT"
        lines.append(
            f"{row.label:{width}} {row.arch:3}{row.num_warps:5}{row.num_stages:7}"
            f"{row.registers:5}{row.spill_stores:7}/{row.spill_loads:<5}{shared:>12}  "
            f"{resident:20}{100 * row.occupancy:7.0f}{tensor_core}  {', '.join(widths)}"
        )
    return "\n".join(lines)


def discovered(ops: Iterable[str] = ()) -> Iterator[Case]:
    """The cases of the files in clipa_kernels/_triton that offer some; of these files alone.

    Raises: ValueError where a file that is asked for is missing or offers none.
    """
    offering = {}
    for module in pkgutil.iter_modules(_triton.__path__):
        imported = importlib.import_module(f"{_triton.__name__}.{module.name}")
        if hasattr(imported, "cases"):
            offering[module.name] = imported.cases
    for op in ops:
        if op not in offering:
            known = ", ".join(offering) or "none"
            raise ValueError(f"discovered: ops must be among {known}, got {op!r}")
    for name, cases in offering.items():
        if not ops or name in ops:
            yield from cases()


def main() -> int:
    """Print the table of all cases, or of those of the ops named."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("ops", nargs="*", help="files of clipa_kernels/_triton; none: all")
    rows, errors = [], []
    for case in discovered(parser.parse_args().ops):
        for arch in case.archs:
            try:
                rows.append(compile_case(case, arch))
            except RuntimeError as error:
                errors.append(str(error))
    print(table(rows), *errors, sep="\n")
    return int(bool(errors) or not all(row.fits for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
