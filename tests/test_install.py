"""What README's install brings is enough for every preset."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.drawings import PACKAGES
from data.text import clip_bpe

ROOT = Path(__file__).parents[1]
NAME = "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """packages -> as if only those were installed; the value says whether with a merge table."""
    merges = Path(next(iter(find_spec("open_clip").submodule_search_locations))) / NAME

    def only(**packages):
        specs = {}
        for name, whole in packages.items():
            (tmp_path / name).mkdir()
            if whole:
                (tmp_path / name / NAME).write_bytes(merges.read_bytes())
            specs[name] = SimpleNamespace(submodule_search_locations=[str(tmp_path / name)])
        monkeypatch.setattr("data.vocabularies.find_spec", specs.get)

    return only


@pytest.mark.parametrize(
    "packages", [{"clip": True}, {"open_clip": True}, {"clip": False, "open_clip": True}], ids=str
)
def test_clips_merges_come_from_any_package_that_has_them(installed, packages):
    installed(**packages)
    assert clip_bpe().vocab_size == 49_408


def test_clips_merges_of_no_package(installed):
    installed(clip=False)  # another package of that name
    with pytest.raises(RuntimeError, match="pip install openai-clip.*, got neither"):
        clip_bpe()


@pytest.fixture
def declared(monkeypatch):
    """The names of the packages that each extra of setup.py installs, beside the library's own."""
    import setuptools

    said = {}
    monkeypatch.setattr(setuptools, "setup", said.update)
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    exec(compile(text, str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py")})

    def names(requirements):
        return {normal(re.match(r"[\w.-]+", one)[0]) for one in requirements}

    always = names(said["install_requires"]) | {"triton"}  # torch brings triton where there is one
    return {extra: always | names(found) for extra, found in said["extras_require"].items()}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(*places):
    """The top-level modules of others that the files import, wherever in them."""
    files = [file for place in places for file in sorted(ROOT.glob(place))]
    own = {path.stem for path in ROOT.iterdir()} | {path.stem for path in files}
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
    return {name.split(".")[0] for name in found} - own - sys.stdlib_module_names


PROGRAM = ("train.py", "evaluate.py", "data/*.py", "models/*.py", "training/*.py")


@pytest.mark.parametrize(
    ("extra", "places"),
    [("train", PROGRAM), ("test", (*PROGRAM, "tests/*.py", "bench/**/*.py"))],
    ids=["train", "test"],
)
def test_the_extras_bring_what_is_imported(declared, extra, places):
    brought = packages_distributions()
    # Rivals that only their benches import, and skip where they are not installed.
    rivals = (declared["bench"] | declared["gpu"]) - declared["test"]
    asked = declared["parquet"]  # by a sentence, of who needs it
    for module in imported(*places):
        names = {normal(name) for name in brought.get(module, [module])}
        allowed = declared[extra] | asked | (rivals if extra == "test" else set())
        assert names & allowed, f"{module} of {sorted(names)} is not declared by {extra}"


def test_the_extras_bring_drawings_and_vocabularies(declared):
    """Packages whose files are read and whose code is not imported."""
    for extra in ("train", "test", "bench"):
        assert {*map(normal, PACKAGES), "openai-clip", "textblob"} <= declared[extra]
