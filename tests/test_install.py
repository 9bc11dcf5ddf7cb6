"""What README's install brings is enough for every preset."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

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


def test_the_train_extra_brings_the_merges(monkeypatch):
    import setuptools

    said = {}
    monkeypatch.setattr(setuptools, "setup", said.update)
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    exec(compile(text, str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py")})
    for extra in ("train", "test", "bench"):
        assert any(name.startswith("openai-clip") for name in said["extras_require"][extra])
