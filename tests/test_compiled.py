"""bench's launches and compiled: kernels whose arguments and machine code are known by their cause.

The tests of this process run under Triton's interpreter; this file, run as a program without it,
records and compiles the launches below once and prints what came of them.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.meters import roofs
from bench.meters.calls import backward, empty, recorded
from bench.meters.compiled import (
    ARCHS,
    Row,
    _resident,
    compile_launch,
    compiled,
    disassembly,
    read,
    table,
)
from bench.meters.launches import _Driver, distinct, recording
from clipa_kernels import add_layer_norm, bias_gelu, patch_embed

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


def tile(m: int, n: int, k: int) -> dict[str, int]:
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k)


def copy(offset: int = 0) -> None:
    x, out = torch.empty(1 << 16)[offset:], torch.empty(1 << 16)
    copy_kernel[(64,)](x, out, x.numel(), BLOCK=1024)


def dot(*shape: int, **options: int) -> None:
    x, y = torch.empty(1024, 1024).half(), torch.empty(1024, 1024).half()
    dot_kernel[(8, 8)](x, y, torch.empty(1024, 1024), 1024, 1024, **tile(*shape), **options)


CALLS = {
    "copy": copy,
    "from unaligned": lambda: copy(1),
    "dot": lambda: dot(128, 64, 64),
    # One warp holds 128 x 128 sums: 512 a thread, of at most 255 registers.
    "spills": lambda: dot(128, 128, 32, num_warps=1),
    # 5 stages of two fp16 tiles of 128 x 128: 320 KB.
    "too large": lambda: dot(128, 128, 128, num_warps=8, num_stages=5),
    "wrong": lambda: wrong_kernel[(1,)](torch.empty(64), BLOCK=16),
}
SOME = {"spills": (80,), "too large": (80, 90), "wrong": (80,)}  # architectures


def launches(*names: str):
    for name in names or CALLS:
        with recording(*SOME.get(name, ARCHS)) as found:
            CALLS[name]()
        yield from (replace(launch, call=name) for launch in found)


def started(*command: str) -> subprocess.Popen:
    """A program outside the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def outside_interpreter(*command: str) -> subprocess.CompletedProcess:
    with started(*command) as run:
        stdout, stderr = run.communicate()
    return subprocess.CompletedProcess(command, run.returncode, stdout, stderr)


def compiled_rows() -> dict:
    """By launch, and for those that do not compile what is raised."""
    rows = {}
    for launch in launches():
        try:
            row = compile_launch(launch)
            rows[f"{launch.call} {launch.arch}"] = vars(row) | {"fits": row.fits}
        except RuntimeError as error:
            rows[f"{launch.call} {launch.arch}"] = str(error)
    return rows


def bound() -> dict:
    """What the recorder saw of launches whose arguments differ."""
    with recording(90) as found:
        x = torch.empty(1 << 40)  # 4 TiB
        for size in (1, 2, 16, 1 << 33):
            copy_kernel[(size,)](x, x[1:], size, BLOCK=16)
        copy_kernel[lambda meta: (meta["BLOCK"],)](x[4:].half(), x, 16, BLOCK=32, num_warps=2)
        copy_kernel[(2,)](x, x[1:], 4, BLOCK=16)  # as with 2
    seen = [
        dict(
            types=launch.signature,
            constants={
                launch.kernel.arg_names[place]: v for (place,), v in launch.constants.items()
            },
            divides=[launch.kernel.arg_names[place] for (place,), v in launch.attrs.items() if v],
            grid=launch.grid,
            warps=launch.options["num_warps"],
        )
        for launch in found
    ]
    return dict(seen=seen, distinct=len(distinct(found)))


def by_operators() -> list:
    """Forward and backward of an operator on two architectures: (kernel, architecture)."""
    with recording(80, 100) as found:
        x = torch.empty(1 << 30, 64, requires_grad=True)
        weight, bias = torch.empty(2, 64, requires_grad=True).unbind()
        y, _ = add_layer_norm(x, None, weight, bias, impl="triton")
        y.sum().backward()
        assert x.grad.shape == x.shape
    return [(launch.name, launch.arch) for launch in found]


def as_triton_compiles() -> list:
    """Pairs of hashes: of a recorded launch, and of what JITFunction.run makes of the same one."""
    hashes, driver = [], triton.runtime.driver
    for launch in launches("copy", "from unaligned"):
        driver.set_active(_Driver((launch.arch,)))
        driver.active.get_current_device = lambda arch=launch.arch: arch  # a cache for each
        driver.active.get_current_stream = lambda device: 0
        size = 1 << 16
        x = torch.empty(size)[launch.call != "copy" :]
        made = copy_kernel.run(x, torch.empty(size), len(x), BLOCK=1024, grid=(64,), warmup=True)
        hashes.append((compiled(launch).metadata.hash, made.metadata.hash))
    return hashes


def modelled(launches) -> dict:
    """What roofs reads of the launches: those of unknown trips or no bytes, and a norm whole."""
    unknown = []
    for launch in launches:
        try:
            trips = roofs.TRIPS.get(launch.name, lambda arguments: ())(launch.arguments)
            good = all(trip > 0 for trip in trips) and roofs.least_bytes(launch) > 0
        except KeyError as error:
            good = str(error)
        if good is not True:
            unknown.append(f"{launch.label}: {good}")
    norm = next(launch for launch in launches if launch.name == "add_layer_norm_fwd")
    code = compiled(norm)
    listing = disassembly(code)
    row = roofs.as_json(roofs.roofs(norm, read(norm, code, listing), listing))
    sums = dict(loss=modelled_loss(launches), glue=modelled_glue(), stem=modelled_stem())
    return dict(unknown=unknown, row=row, **sums)


def modelled_stem() -> dict:
    """The stem's forward and backward on sm_90, batch 4096, over the time that its kept pixels and
    tokens take to pass once each way; and which kernels and products it is made of."""
    over, names = {}, set()
    for label, side, size, kept, width in (
        ("B/16 half", 16, 224, 98, 768), ("L/16", 16, 96, 36, 1024), ("H/14", 14, 84, 36, 1280),
        ("bigG/14", 14, 70, 25, 1664),
    ):  # fmt: skip
        rows = 1 + (size // side) ** 2

        def call(side=side, size=size, kept=kept, width=width, rows=rows):
            images = torch.empty(4096, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
            keep = torch.empty(4096, kept, dtype=torch.int64)
            shapes = (width, 3, side, side), (rows, width), (width,)
            weight, table, token = (
                torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes
            )
            out = patch_embed(images, keep, weight, None, table, token, impl="triton").tokens
            out.backward(torch.empty_like(out))

        times = roofs.whole(call, 90)
        least = 2 * 4096 * (kept * 3 * side**2 + (1 + kept) * width * 2)
        over[label] = sum(times.values()) / (least / roofs.GPUS[90].bandwidth)
        names |= times.keys()
    return dict(over=over, names=sorted(names))


def modelled_loss(launches) -> dict:
    """Microseconds of the loss's forward at N = 32768, D = 512 by kernel: the largest of six."""
    times = {}
    for launch in launches:
        if launch.call == "alone 32768x512 bf16" and launch.name not in (
            "contrastive_bwd", "last_product",
        ):  # fmt: skip
            code = compiled(launch)
            listing = disassembly(code)
            made = roofs.roofs(launch, read(launch, code, listing), listing)
            times[launch.name] = 1e6 * max(made.times.values())
    return times


def modelled_glue() -> dict:
    """The six times, over memory's, of the block glue that has the most to do for its bytes."""
    bf16, rows = torch.bfloat16, 256 * 37
    with recording(80, 90) as launches:
        for width in (1280, 1664):
            x, residual = empty(rows, width, dtype=bf16), empty(rows, width, dtype=bf16)
            backward(*add_layer_norm(x, residual, empty(width), empty(width), impl="triton"))
        bias_gelu(empty(rows, 5120, dtype=bf16), empty(5120), impl="triton")
    codes, shares = {}, {}
    for launch in launches:
        if launch.name in ("add_layer_norm_bwd", "bias_gelu_fwd"):
            code = codes.get(launch.key()) or compiled(launch)  # two widths are one code
            codes[launch.key()] = code
            listing = disassembly(code)
            times = roofs.roofs(launch, read(launch, code, listing), listing).times
            label = f"{launch.name} {launch.arguments['D']} {launch.arch}"
            shares[label] = {name: time / times["memory"] for name, time in times.items()}
    return shares


def print_all() -> None:
    launches = list(recorded(archs=(90,)))
    kernels = sorted({launch.kernel.__name__ for launch in launches})
    results = dict(bound=bound(), by_operators=by_operators(), hashes=as_triton_compiles())
    results |= dict(rows=compiled_rows(), kernels=kernels, modelled=modelled(launches))
    print(json.dumps(results))


@pytest.fixture(scope="module")
def results():
    run = outside_interpreter(__file__)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture
def rows(results):
    return results["rows"]


def test_arguments_as_triton_binds_them(results):
    """A 1 is a constant, multiples of 16 are marked, addresses likewise; large integers are i64."""
    one, two, sixteen, large, other, _ = results["bound"]["seen"]
    assert one["constants"] == dict(size=1, BLOCK=16) and one["types"]["size"] == "constexpr"
    assert two["types"] == dict(x_ptr="*fp32", out_ptr="*fp32", size="i32", BLOCK="constexpr")
    assert two["divides"] == ["x_ptr"] and sixteen["divides"] == ["x_ptr", "size"]
    assert large["types"]["size"] == "i64" and large["grid"] == [1 << 33]
    assert other["types"]["x_ptr"] == "*fp16" and other["divides"] == ["x_ptr", "out_ptr", "size"]
    assert (other["grid"], other["warps"], two["warps"]) == ([32], 2, 4)
    assert results["bound"]["distinct"] == 5


def test_operators_run_once_for_each_architecture(results):
    forward = [["add_layer_norm_fwd", 80], ["add_layer_norm_fwd", 100]]
    backward = ["add_layer_norm_bwd", "sum_partial"]
    # The gradients of the parameters are sums of partial ones.
    assert results["by_operators"][:2] == forward
    assert results["by_operators"][2:] == [[name, arch] for arch in (80, 100) for name in backward]


def test_a_recorded_launch_is_compiled_to_what_triton_compiles(results):
    assert len(results["hashes"]) == 2 * len(ARCHS)
    assert all(recorded == made for recorded, made in results["hashes"])
    assert len({made for _, made in results["hashes"]}) == len(results["hashes"])


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
    assert re.match(
        r"compile_launch: wrong 64 float32, wrong must compile for sm_80, got ",
        rows["wrong 80"],
    )


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
import test_compiled
from bench.meters import calls, compiled
names = sys.argv.pop(1).split(",")
calls.calls = lambda kinds: ((name, test_compiled.CALLS[name]) for name in names)
raise SystemExit(compiled.main())
"""


def test_command():
    """It compiles what the calls launch, row by row, and fails for what does not compile or fit."""
    with started("-c", PROGRAM, "copy", "test_compiled") as fine:
        assert fine.stdout.readline().startswith("launch ") and fine.poll() is None
        first, running = fine.stdout.readline(), fine.poll() is None
        stdout, stderr = fine.communicate()
    assert running, "the first row must come before the last is made"
    assert fine.returncode == 0, stderr
    assert [line.split()[:5] for line in (first, *stdout.splitlines())] == [
        ["copy", "65536", "float32,", "copy", str(arch)] for arch in ARCHS
    ]
    every = outside_interpreter("-c", PROGRAM, "too large,wrong,copy", "--jobs", "2")
    assert every.returncode == 1
    heads = [line.split()[0] for line in every.stdout.splitlines() if not line.startswith(" ")]
    assert heads.index("dot") < heads.index("compile_launch:") < heads.index("copy")  # in order
    for says in ("DOES NOT FIT", "wrong must compile for sm_80, got", "\ncopy"):
        assert says in every.stdout
    none = outside_interpreter("-c", PROGRAM, "copy", "--jobs", "0")
    assert "--jobs must be at least 1, got 0" in none.stderr
    other = outside_interpreter("-c", PROGRAM, "copy", "other")
    assert "ops must be among test_compiled, got 'other'" in other.stderr


def test_errors():
    with pytest.raises(RuntimeError, match="recording: TRITON_INTERPRET must be unset, got 1"):
        recording(80).__enter__()
    none = outside_interpreter("-c", WRONG_ARCH)
    assert "compile_launch: arch must be among [80, 90, 100], got 70" in none.stderr


WRONG_ARCH = """
import test_compiled
from dataclasses import replace
from bench.meters.compiled import compile_launch
compile_launch(replace(next(test_compiled.launches("copy")), arch=70))
"""


def test_every_kernel_of_the_library_is_launched(results):
    """By the calls that `python -m bench.compiled` walks."""
    sources = [path.read_text() for path in (ROOT / "clipa_kernels").rglob("*.py")]
    names = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)}
    assert names and sorted(names) == results["kernels"]


def test_roofs_of_every_launch_are_read(results):
    """Trips and bytes from the arguments of each kernel; a norm's six times, bound by memory."""
    assert results["modelled"]["unknown"] == []
    row = results["modelled"]["row"]
    assert row["loops"][0] == row["loops"][1] and row["arch"] == 90
    times = row["modelled_us"]
    assert set(times) == {"memory", "tensor", "issue", "pipe", "l2", "latency"}
    assert times["tensor"] == 0 and all(0 < times[name] < 1e4 for name in times if name != "tensor")
    assert row["bound"] == max(times, key=times.get)


def test_the_loss_forward_is_modelled_near_its_roofs(results):
    """On sm_90: products that ask 3/4 of what tiles of 128 rows would of L2, which binds, and a
    merge that a whole device runs. With one block for the merge it takes 1200 us, and with a
    barrier for each part of a tile the products 3600."""
    times = results["modelled"]["loss"]
    assert set(times) == {"contrastive_fwd", "contrastive_merge", "contrastive_sum"}
    assert times["contrastive_fwd"] <= 2200
    assert times["contrastive_merge"] + times["contrastive_sum"] <= 20


def test_the_stem_is_modelled_within_four_times_its_memory_roof(results):
    """At least twice it: the products' FLOPs alone take as long."""
    stem = results["modelled"]["stem"]
    assert {"patch_copy", "sum_sorted", "mm", "addmm_"} <= set(stem["names"])
    assert all(2 < times <= 4 for times in stem["over"].values()), stem["over"]


@pytest.mark.parametrize("arch", [80, 90])
def test_glue_is_modelled_near_its_bytes(results, arch):
    """LayerNorm's backward, of which a row's loads that wait for each other made two to three
    times its bytes' time, and the exact GELU, which can have more to compute than to move."""
    glue = results["modelled"]["glue"]
    assert len(glue) == 6
    for width in (1280, 1664):
        assert max(glue[f"add_layer_norm_bwd {width} {arch}"].values()) <= 1.3
    gelu = glue[f"bias_gelu_fwd 5120 {arch}"]
    assert max(gelu["issue"], gelu["pipe"]) <= (0.8 if arch == 90 else 1.0)


if __name__ == "__main__":
    print_all()
