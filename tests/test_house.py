"""The house: who imports whom, what the library needs, and what importing it loads."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = {"clipa_kernels", "models", "data", "training", "bench", "train", "evaluate"}
# What each floor may import of the house; arrows go down only.
FLOORS = {
    "clipa_kernels": set(),
    "models": {"clipa_kernels"},
    "data": {"clipa_kernels"},
    "training": {"clipa_kernels", "models", "data"},
}
LIBRARY = ROOT / "clipa_kernels"
LIBRARY_NEEDS = {"torch"}
# Imported where asked for by name, never needed.
OPTIONAL = {"attention/rivals.py": {"flash_attn", "xformers"}}
# What operations share, and what each of these may import of the library.
SHARED = {"check": {"launch"}, "packing": {"check"}, "launch": set(), "dispatch": set()}
OPS = {file.parent.name for file in LIBRARY.glob("*/kernels.py")}
# What is made of operations, and may import any of them.
USERS = {"adapters"}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[tuple[int, str]]:
    """(level, module) of every import of a file, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.level, node.module or ""))
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_arrows_go_down(floor):
    assert files(floor)
    for path in files(floor):
        for level, module in imports(path):
            top = module.split(".")[0]
            if level == 0 and top in OWN:
                assert top in FLOORS[floor], f"{path.relative_to(ROOT)} imports {module}"


def inside(path: Path) -> set[str]:
    """The modules of the library that a file of it imports, from its top: "gelu.kernels"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.relative_to(LIBRARY).parts[: -node.level]
            inner = (node.module or "").split(".") if node.module else []
            # `from . import kernels` names modules, `from .kernels import forward` what is in one.
            names = [[]] if inner else [[alias.name] for alias in node.names]
            found |= {".".join([*base, *inner, *name]) for name in names}
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def test_the_library_needs_torch_alone():
    for path in files("clipa_kernels"):
        name = path.relative_to(LIBRARY).as_posix()
        kernels = path.stem.startswith("kernels") or name == "launch.py"
        allowed = sys.stdlib_module_names | LIBRARY_NEEDS | OPTIONAL.get(name, set())
        allowed |= {"triton"} if kernels else set()
        for level, module in imports(path):
            assert level or room(module) in allowed, f"{name} imports {module}"


def test_rooms_and_arrows_of_the_library():
    """A room is a module or a folder; an arrow a pair of rooms, of which one imports the other. The
    package's __init__.py, which imports all, is left out."""
    rooms = {path.parent.name for path in LIBRARY.glob("*/__init__.py")}
    rooms |= {path.stem for path in LIBRARY.glob("*.py")} - {"__init__"}
    assert rooms == OPS | set(SHARED) | USERS and len(rooms) <= 12
    arrows = set()
    for path in set(files("clipa_kernels")) - {LIBRARY / "__init__.py"}:
        own = path.relative_to(LIBRARY).with_suffix("").parts[0]
        for module in inside(path):
            may = SHARED.get(own, {own, *SHARED, *(OPS if own in USERS else ())})
            if path.stem.startswith("kernels"):
                may = {"launch"}
                may |= {own} if module.startswith(f"{own}.kernels") else set()
            assert room(module) in may, f"{path.relative_to(LIBRARY)} imports {module}"
            arrows |= {(own, room(module))} - {(own, own)}
    assert len(arrows) <= 25, sorted(arrows)


def ways(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, ...]]:
    """All ways from a file along imports, within its folder, to files that launch a kernel."""
    seen = (*seen, path)
    found = [seen] if "_kernel[" in path.read_text() else []
    for module in inside(path):
        file = LIBRARY.joinpath(*module.split(".")).with_suffix(".py")
        if file.is_file() and file not in seen and file.parent == path.parent:
            found += ways(file, seen)
    return found


@pytest.mark.parametrize("op", sorted(OPS))
def test_a_tensor_passes_few_files_on_its_way_to_a_kernel(op):
    found = ways(LIBRARY / op / "api.py")
    assert found and max(map(len, found)) <= 4


COPIED = """
import sys
sys.modules["clipa_kernels"] = None
import torch
from my_attention.attention import varlen_attention_qkvpacked
from my_contrastive.contrastive import ClipLoss, sigmoid_loss
from my_gelu.gelu import bias_gelu
from my_layer_norm.layer_norm import add_layer_norm
from my_masking.masking import PatchDropout, random_patches
from my_patch_embed.patch_embed import patch_embed

def ones(*shape):
    return torch.ones(*shape).requires_grad_()

x, scale, tokens, qkv = ones(2, 8), ones(1), ones(2, 5, 4), ones(5, 3, 1, 8)
bias, weight, table = ones(8), ones(8, 3, 2, 2), ones(4, 8)
lengths = torch.tensor([0, 2, 5], dtype=torch.int32)
keep = random_patches(2, (2, 2), 0.5, seed=0, step=0)
for given, out in (
    (qkv, varlen_attention_qkvpacked(qkv, lengths, 3, impl="torch")),
    (x, ClipLoss()(x, x.flip(1), scale)),
    (x, sigmoid_loss(x, x, scale)),
    (bias, bias_gelu(x, bias)),
    (bias, add_layer_norm(x, x * 2, bias, bias)[0]),
    (weight, patch_embed(torch.ones(2, 3, 4, 4), keep, weight, bias, table).tokens),
    (tokens, PatchDropout(0.5)(tokens)),
):
    (gradient,) = torch.autograd.grad(out.sum(), given)
    assert out.isfinite().all() and gradient.shape == given.shape and gradient.isfinite().all()
    print(type(out.grad_fn).__name__)
"""


def test_an_operation_can_be_copied(tmp_path):
    """Each folder into a package of its own, with what operations share and nothing else."""
    for op in OPS:
        package = tmp_path / f"my_{op}"
        shutil.copytree(LIBRARY / op, package / op)
        (package / "__init__.py").touch()
        for name in SHARED:
            shutil.copy(LIBRARY / f"{name}.py", package)
    run = subprocess.run(
        [sys.executable, "-c", COPIED], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 7


@pytest.mark.parametrize("folder", ["models", "data", "training"])
def test_triton_stays_in_the_library(folder):
    for path in [*files(folder), ROOT / "train.py", ROOT / "evaluate.py"]:
        assert not any(module.split(".")[0] == "triton" for _, module in imports(path)), path


def test_functions_and_the_loop_stay_readable():
    """Functions of 60 lines at most, kernels of 120; the program of training on a few screens."""
    assert (ROOT / "train.py").read_text().count("\n") <= 300
    for path in [p for f in FLOORS for p in files(f)] + [ROOT / "train.py", ROOT / "evaluate.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                jit = any("jit" in ast.unparse(d) for d in node.decorator_list)
                docs = ast.get_docstring(node, clean=False) or ""
                size = node.end_lineno - node.lineno + 1 - docs.count("\n")
                assert size <= (120 if jit else 60), f"{path.name}: {node.name} has {size} lines"


def test_a_dialect_is_known_by_what_it_holds():
    """No code but the table of dialects and the presets names one of CLIPA's."""
    for path in [p for f in FLOORS for p in files(f)] + [ROOT / "train.py", ROOT / "evaluate.py"]:
        if path.name in ("dialects.py", "presets.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Constant) and node.value in ("clipa-v1", "clipa-v2")
            assert not named, f"{path.relative_to(ROOT)} compares with {node.value}"


def test_import_needs_no_triton_and_loads_nothing_but_itself():
    """Beside torch's own import, and without triton at all; the time is that of its own files."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\nbefore = set(sys.modules)\nimport clipa_kernels\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})\n"
        "clipa_kernels.bias_gelu(torch.zeros(2, 8), torch.zeros(8))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["clipa_kernels"]
