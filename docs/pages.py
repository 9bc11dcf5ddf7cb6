"""A page an operation, made of the docstrings of its folder: docs/ops.

    python docs/pages.py

A test compares them with the docstrings; after changing one, run this.
"""

import importlib
import inspect
from pathlib import Path
from types import ModuleType

import clipa_kernels

# In the order of a training step; each is a folder of the library.
OPS = (
    "masking", "patch_embed", "layer_norm", "attention", "gelu", "contrastive", "adapters",
)  # fmt: skip
HERE = Path(__file__).parent


def page(op: str) -> str:
    """The page of an operation in Markdown."""
    package = importlib.import_module(f"clipa_kernels.{op}")
    api = importlib.import_module(f"clipa_kernels.{op}.api")
    title, _, rest = inspect.getdoc(api).partition("\n")
    lines = [f"# {op}", "", title, rest.rstrip(), ""]
    for name, function in _public(package):
        call = f"{name}{_arguments(function)}"
        lines += [f"## {name}", "", "```", call, "", inspect.getdoc(function), "```", ""]
    return "\n".join(lines)


def _arguments(function: object) -> inspect.Signature:
    """Names and defaults; the docstring tells the types."""
    signature, none = inspect.signature(function), inspect.Signature.empty
    plain = [each.replace(annotation=none) for each in signature.parameters.values()]
    return signature.replace(parameters=plain, return_annotation=none)


def _public(package: ModuleType) -> list[tuple[str, object]]:
    """What the library exports of a folder, its references last."""
    found = [
        (name, getattr(package, name)) for name in clipa_kernels.__all__ if hasattr(package, name)
    ]
    own = [(name, value) for name, value in found if callable(value)]
    return sorted(own, key=lambda pair: pair[0].endswith("_reference"))


def pages() -> dict[Path, str]:
    """Each file and its text."""
    return {HERE / "ops" / f"{op}.md": page(op) for op in OPS}


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
