"""Weights of others: files of open_clip, OpenAI, this project and Hugging Face's CLIP.

`read_weights(path)` gives open_clip's keys, which `load_weights` takes.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .clip import plain_keys

# What a folder of weights holds, the best form first.
_NAMES = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
_OPENAI = ("input_resolution", "context_length", "vocab_size")  # numbers beside its weights

# Hugging Face's CLIPModel to open_clip's names, in this order.
_TOWERS = {"vision_model.": "visual.", "text_model.": ""}
_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_SINGLE = {
    "visual.embeddings.class_embedding": "visual.class_embedding",
    "visual.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "visual.embeddings.position_embedding.weight": "visual.positional_embedding",
    "visual.pre_layrnorm.": "visual.ln_pre.",  # sic
    "visual.post_layernorm.": "visual.ln_post.",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
}
_PROJECTIONS = {
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file or folder, on the CPU, by open_clip's names.

    Args:
        path: .safetensors; .pt, .pth or .bin that torch.save wrote, of weights alone or with them
            as "state_dict"; OpenAI's TorchScript archives; or a folder of Hugging Face's.

    Raises:
        ValueError: nothing there, or something else.
        RuntimeError: the file is .safetensors and that package is not installed.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in _NAMES if (path / name).is_file()]
        if not found:
            known = ", ".join(_NAMES)
            raise ValueError(f"read_weights: {path} must hold one of {known}, got none")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"read_weights: path must be a file or folder of weights, got '{path}'")
    if path.name.endswith(".index.json"):
        parts = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        held = {k: v for part in parts for k, v in _read(path.parent / part).items()}
    else:
        held = _read(path)
    weights = {key: value for key, value in plain_keys(held).items() if key not in _OPENAI}
    if any(key.startswith("vision_model.") for key in weights):
        weights = from_hugging_face(weights)
    if not all(isinstance(value, Tensor) for value in weights.values()) or not weights:
        raise ValueError(f"read_weights: {path} must map names to tensors, got something else")
    return weights


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except ImportError as error:
        raise RuntimeError(
            f"read_weights: {path} needs the package safetensors, got none installed "
            "(pip install safetensors)"
        ) from error
    except Exception as error:  # whatever the bytes make a reader raise
        held = _scripted(path)
        if held is None:
            reason = re.split(r"\n|\. ", str(error))[0] or type(error).__name__
            raise ValueError(f"read_weights: {path} must hold weights, got {reason}") from error
    held = held.get("state_dict", held) if isinstance(held, dict) else {}
    return held if isinstance(held, dict) else {}


def _scripted(path: Path) -> dict[str, Tensor] | None:
    """The weights of a TorchScript archive, which runs no code until it is called."""
    try:
        return torch.jit.load(path, map_location="cpu").state_dict()
    except Exception:
        return None


def from_hugging_face(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIPModel's names and shapes to open_clip's; q, k and v are one product."""
    found: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        for theirs, ours in _TOWERS.items():
            key = key.replace(theirs, ours, 1) if key.startswith(theirs) else key
        key = re.sub(r"\bencoder\.layers\.", "transformer.resblocks.", key)
        if key.endswith("position_ids"):
            continue
        if key in _PROJECTIONS:
            found[_PROJECTIONS[key]] = value.T.contiguous()
            continue
        if third := re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", key):
            name = f"{third[1]}.attn.in_proj_{third[3]}"
            thirds.setdefault(name, {})[third[2]] = value
            continue
        for theirs, ours in _BLOCK.items():
            key = key.replace(f".{theirs}.", f".{ours}.")
        for theirs, ours in _SINGLE.items():
            if key == theirs or (theirs.endswith(".") and key.startswith(theirs)):
                key = ours + key[len(theirs) :]
        found[key] = value
    return found | {name: torch.cat([one[x] for x in "qkv"]) for name, one in thirds.items()}


def to_hugging_face(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names and shapes to CLIPModel's; the inverse of from_hugging_face."""
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        tower = "vision_model." if key.startswith("visual.") else "text_model."
        projected = {ours: theirs for theirs, ours in _PROJECTIONS.items()}
        if key in projected:
            found[projected[key]] = value.T
            continue
        if key in ("logit_scale", "logit_bias"):
            found[key] = value
            continue
        for theirs, ours in _SINGLE.items():
            if key == ours or (ours.endswith(".") and key.startswith(ours)):
                key = theirs + key[len(ours) :]
                break
        key = tower + key.removeprefix("visual.").replace(
            "transformer.resblocks.", "encoder.layers."
        )
        for theirs, ours in _BLOCK.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
        if third := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", key):
            for name, part in zip("qkv", value.chunk(3), strict=True):
                found[f"{third[1]}.self_attn.{name}_proj.{third[2]}"] = part
        else:
            found[key] = value
    return found
