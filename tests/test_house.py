"""The house: who imports whom, what the library needs, and how long it takes to import."""

import ast
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
OPS = list((ROOT / "clipa_kernels").glob("[a-z]*.py"))
LIBRARY_NEEDS = {"torch", "einops"}
# Imported where asked for by name, never needed.
OPTIONAL = {"_attention_rivals.py": {"flash_attn", "xformers"}}


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


def test_the_library_needs_torch_alone():
    standard = sys.stdlib_module_names
    for path in files("clipa_kernels"):
        kernels = "_triton" in path.parts
        for level, module in imports(path):
            top = module.split(".")[0]
            allowed = standard | LIBRARY_NEEDS | OPTIONAL.get(path.name, set())
            allowed |= {"triton"} if kernels else set()
            assert level or top in allowed, f"{path.name} imports {module}"
            if kernels and level:  # what all share, or the file of the same operation
                own = [op.stem for op in OPS if path.stem.startswith(op.stem)]
                assert module.startswith(("common", *own)), f"{path.name} imports {module}"


@pytest.mark.parametrize("folder", ["models", "data", "training"])
def test_triton_stays_in_the_library(folder):
    for path in [*files(folder), ROOT / "train.py", ROOT / "evaluate.py"]:
        assert not any(module.split(".")[0] == "triton" for _, module in imports(path)), path


def test_files_and_functions_stay_readable():
    """Modules under 400 lines, functions under 60, kernels 120; ../tests may be longer."""
    for path in [p for f in FLOORS for p in files(f)] + [ROOT / "train.py", ROOT / "evaluate.py"]:
        text = path.read_text()
        assert text.count("\n") < 400, f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                jit = any("jit" in ast.unparse(d) for d in node.decorator_list)
                docs = ast.get_docstring(node, clean=False) or ""
                size = node.end_lineno - node.lineno + 1 - docs.count("\n")
                assert size <= (120 if jit else 60), f"{path.name}: {node.name} has {size} lines"


def test_import_needs_no_triton_and_little_time():
    """Without triton at all; processor time beside torch's own import."""
    program = (
        "import sys, time; sys.modules['triton'] = None\n"
        "import torch\nstart = time.process_time()\nimport clipa_kernels\n"
        "print(time.process_time() - start)\n"
        "clipa_kernels.bias_gelu(torch.zeros(2, 8), torch.zeros(8))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 0.3
