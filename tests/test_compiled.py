"""bench/compiled.py: kernels whose machine code is known by its cause.

The tests of this process run under Triton's interpreter; this file, run as a program without it,
compiles the cases below once and prints their rows.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.meters.compiled import ARCHS, Row, _resident, compile_case, discovered, table
from clipa_kernels import _triton
from clipa_kernels._triton.common import Case

triton = pytest.importorskip("triton")
tl = triton.language
ROOT = Path(__file__).parents[1]


@triton.jit
def copy_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=mask), mask=mask)


@triton.jit
def dot_kernel(
    x_ptr, y_ptr, out_ptr, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        x = tl.load(x_ptr + rows * k + start + tl.arange(0, BLOCK_K)[None, :])
        y = tl.load(y_ptr + (start + tl.arange(0, BLOCK_K)[:, None]) * n + cols)
        acc = tl.dot(x, y, acc)
    tl.store(out_ptr + rows * n + cols, acc)


@triton.jit
def wrong_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, 2 * BLOCK)))


COPY = dict(x_ptr="*fp32", out_ptr="*fp32", size="i32")
DOT = dict(x_ptr="*fp16", y_ptr="*fp16", out_ptr="*fp32", n="i32", k="i32")


def tile(m: int, n: int, k: int) -> dict[str, int]:
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k)


def cases():
    yield Case("copy", copy_kernel, COPY, dict(BLOCK=1024))
    unaligned = ("x_ptr", "size")
    yield Case("from unaligned", copy_kernel, COPY, dict(BLOCK=1024), unaligned=unaligned)
    yield Case("dot", dot_kernel, DOT, tile(128, 64, 64))
    # One warp holds 128 x 128 sums: 512 a thread, of at most 255 registers.
    yield Case("spills", dot_kernel, DOT, tile(128, 128, 32), num_warps=1, archs=(80,))
    # 5 stages of two fp16 tiles of 128 x 128: 320 KB.
    yield Case("too large", dot_kernel, DOT, tile(128, 128, 128), 8, 5, archs=(80, 90))
    yield Case("wrong", wrong_kernel, dict(x_ptr="*fp32"), dict(BLOCK=16), archs=(80,))


def outside_interpreter(*command: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def print_rows():
    """The rows as JSON, and for those that do not compile what is raised."""
    rows = {}
    for case in cases():
        for arch in case.archs:
            try:
                row = compile_case(case, arch)
                rows[f"{case.label} {arch}"] = vars(row) | {"fits": row.fits}
            except RuntimeError as error:
                rows[f"{case.label} {arch}"] = str(error)
    print(json.dumps(rows))


@pytest.fixture(scope="module")
def rows():
    run = outside_interpreter(__file__)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "arch,instruction", [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")], ids=str
)
def test_tensor_cores(rows, arch, instruction):
    """Each architecture's own instruction, and none of the others."""
    counts = rows[f"dot {arch}"]["tensor_core"]
    assert counts.pop(instruction) > 0
    assert not any(counts.values())
    assert not any(rows[f"copy {arch}"]["tensor_core"].values())


@pytest.mark.parametrize("arch", ARCHS)
def test_widths(rows, arch):
    """1024 floats by 128 threads: two accesses of 16 bytes each, or eight of 4."""
    assert rows[f"copy {arch}"]["load_widths"] == {"16": 2}
    assert rows[f"copy {arch}"]["store_widths"] == {"16": 2}
    assert rows[f"from unaligned {arch}"]["load_widths"] == {"4": 8}


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_and_spills(rows, arch):
    for label in ("copy", "dot"):
        row = rows[f"{label} {arch}"]
        assert 8 <= row["registers"] <= 255
        assert (row["spill_stores"], row["spill_loads"]) == (0, 0)
        assert row["fits"]
    # 128 x 64 sums by 128 threads: 64 registers at least, or tensor memory.
    assert rows[f"dot {arch}"]["registers"] > (64 if arch < 100 else 16)
    if arch == 80:
        assert rows["spills 80"]["registers"] == 255
        assert min(rows["spills 80"][name] for name in ("spill_stores", "spill_loads")) > 1000


def test_shared_memory(rows):
    """Three stages of 128x64 and 64x64 fp16 on sm_80: two or three buffers of 24 KB."""
    assert rows["copy 80"]["shared"] == 0
    assert 2 * 24 * 1024 <= rows["dot 80"]["shared"] <= 3 * 24 * 1024
    for arch in (80, 90):
        row = rows[f"too large {arch}"]
        assert row["shared"] > row["shared_limit"] == ARCHS[arch].block_shared
        assert (row["fits"], row["blocks_per_sm"], row["limiter"]) == (False, 0, "shared")


def test_what_does_not_compile(rows):
    assert rows["wrong 80"].startswith("compile_case: wrong must compile for sm_80, got ")


@pytest.mark.parametrize(
    "arch,registers,warps,shared,columns,expected",
    [
        (80, 128, 4, 0, 0, (4, "registers")),  # 65536 of 128 * 32 * 4
        (80, 129, 4, 0, 0, (3, "registers")),  # 136 after rounding: 3 warps a quarter
        (80, 32, 4, 60 << 10, 0, (2, "shared")),  # 164 of 60 + 1
        (90, 32, 4, 60 << 10, 0, (3, "shared")),
        (90, 32, 4, 227 << 10, 0, (1, "shared")),
        (90, 32, 4, (227 << 10) + 16, 0, (0, "shared")),
        (80, 32, 16, 0, 0, (4, "registers")),
        (80, 16, 16, 0, 0, (4, "warps")),
        (80, 32, 1, 0, 0, (32, "blocks")),
        (100, 32, 4, 0, 256, (2, "tensor memory")),
    ],
)
def test_resident_blocks(arch, registers, warps, shared, columns, expected):
    row = Row("", arch, warps, 1, registers=registers, shared=shared)
    assert _resident(row, columns)[0] == expected[0]
    if (registers, warps) != (32, 16):  # registers and warps allow the same there
        assert _resident(row, columns)[1] == expected[1]


def test_table():
    row = Row("a case", 90, 4, 3, registers=72, spill_stores=8, shared_limit=1024, blocks_per_sm=7)
    row.limiter, row.occupancy = "registers", 0.4375
    row.tensor_core["wgmma"] = 12
    row.load_widths.update({16: 8, 4: 2})
    line = table([row, Row("large", 80, 4, 3)]).splitlines()
    assert line[1].split()[:7] == ["a", "case", "90", "4", "3", "72", "8/0"]
    assert "7 (registers)" in line[1] and " 44 " in line[1] and "16:8 4:2" in line[1]
    assert line[1].split().index("12") == line[1].split().index("44") + 2
    assert "DOES NOT FIT" in line[2]


PROGRAM = """
import sys
from bench import compiled
compiled._triton.__path__ = [sys.argv.pop(1)]
raise SystemExit(compiled.main())
"""
OP = """
from test_compiled import cases as all_cases
def cases():
    return (case for case in all_cases() if case.label in {labels})
"""


def test_command(tmp_path):
    """It finds the files that offer cases, and fails for what does not compile or fit."""
    (tmp_path / "common.py").write_text("")
    none = outside_interpreter("-c", PROGRAM, str(tmp_path))
    assert (none.returncode, len(none.stdout.splitlines())) == (0, 1), none.stderr
    (tmp_path / "fine.py").write_text(OP.format(labels=["copy"]))
    (tmp_path / "bad.py").write_text(OP.format(labels=["wrong", "too large"]))
    fine = outside_interpreter("-c", PROGRAM, str(tmp_path), "fine")
    assert fine.returncode == 0, fine.stderr
    assert [line.split()[:2] for line in fine.stdout.splitlines()[1:]] == [
        ["copy", "80"],
        ["copy", "90"],
        ["copy", "100"],
    ]
    every = outside_interpreter("-c", PROGRAM, str(tmp_path))
    assert every.returncode == 1
    for says in ("DOES NOT FIT", "compile_case: wrong must compile for sm_80, got", "\ncopy"):
        assert says in every.stdout
    other = outside_interpreter("-c", PROGRAM, str(tmp_path), "other")
    assert "ops must be among bad, fine, got 'other'" in other.stderr


def test_errors(monkeypatch):
    case = Case("copy", copy_kernel, COPY, dict(BLOCK=1024))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="compile_case: TRITON_INTERPRET must be unset, got 1"):
        compile_case(case, 80)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=r"arch must be one of \[80, 90, 100\], got 70"):
        compile_case(case, 70)
    with pytest.raises(ValueError, match="copy must give every argument of the kernel, got no siz"):
        compile_case(case._replace(signature=dict(x_ptr="*fp32", out_ptr="*fp32")), 80)
    with pytest.raises(ValueError, match=r"must name arguments of the kernel, got \['sizes'\]"):
        compile_case(case._replace(signature=COPY | dict(sizes="i32")), 80)


def test_every_kernel_of_the_project_is_found():
    """What `python -m bench.compiled` walks: the cases hold every kernel in _triton."""
    sources = [path.read_text() for path in Path(_triton.__path__[0]).glob("*.py")]
    names = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)}
    assert names and names == {case.kernel.__name__ for case in discovered()}


if __name__ == "__main__":
    print_rows()
