"""A run's weights as a folder that open_clip or Hugging Face's transformers loads.

    python -m models.export runs/emoji --to open_clip exported       # its newest checkpoint
    open_clip.create_model_and_transforms("local-dir:exported")      # and open_clip.get_tokenizer
    python -m models.export runs/emoji --to transformers exported    # CLIPModel and CLIPProcessor

A checkpoint holds what open_clip needs to build the model beside the weights: `open_clip_config`.
"""

import argparse
import json
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .clip import CLIP, plain_keys
from .pretrained import to_hugging_face

_GELUS = {"none": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}  # of transformers
_OWN = "tokenizer.json"  # beside the config; open_clip takes any name that is not empty
_CLIP_ENTRIES, _CLIP_END = 49_408, 49_407


def open_clip_config(model: CLIP, end: int | None, entries: int) -> dict[str, Any]:
    """What open_clip builds the same model and pictures from: open_clip_config.json.

    Args:
        model: its towers, dialect and scale.
        end: id of the token that ends a caption; None: the last position is pooled.
        entries: of the tokenizer, the largest id + 1.

    Returns:
        {"model_cfg": arguments of open_clip.CLIP, "preprocess_cfg": of its pictures}.

    Raises:
        ValueError: open_clip has no such model: mean over patches and class token, or the end of
            captions of different lengths without an end token.
    """
    vision, text, dialect = model.visual.config, model.config, model.dialect
    name = "open_clip_config"
    if vision.pool == "mean-with-cls":
        raise ValueError(f"{name}: pool must be cls or mean for open_clip, got {vision.pool}")
    if text.pool == "end" and end is None:
        raise ValueError(f"{name}: captions must have an end token for open_clip, got none")
    both: dict[str, Any] = {} if vision.eps == 1e-5 else dict(norm_kwargs=dict(eps=vision.eps))
    if vision.gelu == "tanh":
        both["act_kwargs"] = dict(approximate="tanh")
    pool: dict[str, Any] = dict(pool_type="last")
    if text.pool == "end":  # of the largest id, else of this one
        pool = dict(pool_type="argmax") if end == entries - 1 else dict(pool_type="eos", eos_id=end)
    vision_cfg = dict(
        image_size=vision.image_size,
        layers=vision.depth,
        width=vision.width,
        head_width=vision.width // vision.heads,
        mlp_ratio=vision.mlp_ratio,
        patch_size=vision.patch_size,
        no_ln_pre=not vision.ln_pre,
        pool_type="tok" if vision.pool == "cls" else "avg",
        final_ln_after_pool=vision.norm_after_pool,
        **both,
    )
    text_cfg = dict(
        context_length=text.context,
        vocab_size=text.vocab_size,
        width=text.width,
        heads=text.heads,
        layers=text.depth,
        mlp_ratio=text.mlp_ratio,
        no_causal_mask=not text.causal,
        **pool,
        **both,
    )
    if (end, entries) != (_CLIP_END, _CLIP_ENTRIES):  # open_clip has CLIP's own tokenizer
        text_cfg["hf_tokenizer_name"] = _OWN
    model_cfg = dict(embed_dim=model.embed_dim, vision_cfg=vision_cfg, text_cfg=text_cfg)
    if vision.gelu == "quick":
        model_cfg["quick_gelu"] = True
    if model.logit_bias is not None:
        model_cfg["init_logit_bias"] = -10.0  # that there is one; the weights hold its value
    pictures = dict(
        size=vision.image_size,
        mean=list(vision.mean),
        std=list(vision.std),
        interpolation=dialect.interpolation,
        resize_mode="squash" if dialect.squash else "shortest",
    )
    return dict(model_cfg=model_cfg, preprocess_cfg=pictures)


def described(model: CLIP, end: int | None, entries: int) -> str:
    """open_clip_config as a JSON text, for a checkpoint; {"refused": why} where it has none."""
    try:
        return json.dumps(open_clip_config(model, end, entries), indent=2)
    except ValueError as error:
        return json.dumps(dict(refused=str(error)))


def to_open_clip(state: Mapping[str, Any], folder: str | Path) -> None:
    """Write open_clip_config.json, open_clip_model.safetensors and the tokenizer of a checkpoint.

    Args:
        state: as train.py writes checkpoints: state_dict, tokenizer and open_clip.
        folder: made where it is missing; files of these names are written over.

    Raises:
        ValueError: the state lacks one of them, or open_clip has no such model.
    """
    config = _config_of(state)
    folder = _made(folder)
    _save(plain_keys(state["state_dict"]), folder / "open_clip_model.safetensors")
    if "hf_tokenizer_name" in config["model_cfg"]["text_cfg"]:
        _write_tokenizer(json.loads(state["tokenizer"]), config, folder)
    _write_json(folder / "open_clip_config.json", config)


def to_transformers(state: Mapping[str, Any], folder: str | Path) -> None:
    """Write what CLIPModel and CLIPProcessor of Hugging Face's transformers load.

    Args, Raises: as to_open_clip; a ValueError where CLIPModel has no such model: it has a norm
        before the first block, pools the class token and the end token, and its text is causal.
    """
    config = _config_of(state)
    model, pictures = config["model_cfg"], config["preprocess_cfg"]
    vision, text = model["vision_cfg"], model["text_cfg"]
    for must, holds, came in (
        ("a norm before the first block", not vision["no_ln_pre"], "a model without"),
        ("the class token pooled", vision["pool_type"] == "tok", "the mean of patches"),
        ("causal text", not text["no_causal_mask"], "text that sees all tokens"),
        ("captions' end token pooled", text["pool_type"] != "last", "the last position"),
        ("no logit bias", "init_logit_bias" not in model, "a model of the sigmoid loss"),
    ):
        if not holds:
            raise ValueError(f"to_transformers: CLIPModel must have {must}, got {came}")
    tokenizer = json.loads(state["tokenizer"])
    folder = _made(folder)
    weights = plain_keys(state["state_dict"])
    _save(to_hugging_face(weights), folder / "model.safetensors")
    _write_json(folder / "config.json", _clip_config(model, _special(tokenizer)))
    _write_json(folder / "preprocessor_config.json", _image_processor(pictures))
    _write_tokenizer(tokenizer, config, folder)


def _config_of(state: Mapping[str, Any]) -> dict[str, Any]:
    lacks = {"state_dict", "tokenizer", "open_clip"} - state.keys()
    if lacks or not state["tokenizer"]:
        came = f"one with {', '.join(sorted(map(str, state)))}"
        raise ValueError(f"export: a checkpoint must hold train.py's open_clip config, got {came}")
    config = json.loads(state["open_clip"])
    if "refused" in config:
        raise ValueError(f"export: {config['refused']}")
    return config


def _made(folder: str | Path) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _save(weights: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    # Each by itself: tensors of a checkpoint may share a file, those of a model a storage.
    save_file({k: v.clone().contiguous() for k, v in weights.items()}, path, {"format": "pt"})


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _clip_config(model: dict, special: dict[str, tuple[str, int]]) -> dict[str, Any]:
    """CLIPConfig of open_clip's model_cfg."""
    vision, text = model["vision_cfg"], model["text_cfg"]
    gelu = "quick" if model.get("quick_gelu") else "tanh" if "act_kwargs" in vision else "none"

    def tower(part: dict, heads: int) -> dict[str, Any]:
        return dict(
            hidden_size=part["width"],
            intermediate_size=int(part["width"] * part["mlp_ratio"]),
            num_hidden_layers=part["layers"],
            num_attention_heads=heads,
            hidden_act=_GELUS[gelu],
            layer_norm_eps=part.get("norm_kwargs", dict(eps=1e-5))["eps"],
            projection_dim=model["embed_dim"],
        )

    return dict(
        architectures=["CLIPModel"],
        model_type="clip",
        projection_dim=model["embed_dim"],
        vision_config=tower(vision, vision["width"] // vision["head_width"])
        | dict(image_size=vision["image_size"], patch_size=vision["patch_size"]),
        text_config=tower(text, text["heads"])
        | dict(
            vocab_size=text["vocab_size"],
            max_position_embeddings=text["context_length"],
            bos_token_id=special.get("bos_token", (None, None))[1],
            eos_token_id=special["eos_token"][1],
            pad_token_id=special["pad_token"][1],
        ),
    )


def _image_processor(pictures: dict) -> dict[str, Any]:
    """CLIPImageProcessor of open_clip's preprocess_cfg."""
    side, squash = pictures["size"], pictures["resize_mode"] == "squash"
    square = dict(height=side, width=side)
    return dict(
        image_processor_type="CLIPImageProcessor",
        processor_class="CLIPProcessor",
        do_resize=True,
        size=square if squash else dict(shortest_edge=side),
        resample={"bilinear": 2, "bicubic": 3}[pictures["interpolation"]],  # as Pillow numbers them
        do_center_crop=not squash,
        crop_size=square,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=pictures["mean"],
        image_std=pictures["std"],
        do_convert_rgb=True,
    )


def _special(tokenizer: dict) -> dict[str, tuple[str, int]]:
    """(name, id) of the tokens that begin and end a caption and fill up a batch: "bos_token",
    "eos_token" where there are any, and "pad_token"."""
    steps = tokenizer["post_processor"]["single"]
    content = next(place for place, step in enumerate(steps) if "Sequence" in step)
    vocab = tokenizer["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram's: (piece, score)
        vocab = {piece: number for number, (piece, _) in enumerate(vocab)}
    known = vocab | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    names = {number: name for name, number in known.items()}
    found = {"pad_token": ("[PAD]", known["[PAD]"]) if "[PAD]" in known else (names[0], 0)}
    for place, step in enumerate(steps):
        if "SpecialToken" in step:
            name = step["SpecialToken"]["id"]
            found["bos_token" if place < content else "eos_token"] = name, known[name]
    return found


def _write_tokenizer(tokenizer: dict, config: dict, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads."""
    special = _special(tokenizer)
    if tokenizer["normalizer"] is None and tokenizer["model"]["type"] == "BPE":  # CLIP's
        kinds = dict(type="NFC"), dict(type="Lowercase")
        spaces = dict(type="Replace", pattern=dict(Regex=r"\s+"), content=" ")
        tokenizer["normalizer"] = dict(type="Sequence", normalizers=[kinds[0], spaces, kinds[1]])
    (folder / _OWN).write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {name: value for name, (value, _) in special.items()}
        | dict(
            tokenizer_class="PreTrainedTokenizerFast",
            unk_token=tokenizer["model"].get("unk_token"),
            model_max_length=config["model_cfg"]["text_cfg"]["context_length"],
            clean_up_tokenization_spaces=False,
            model_input_names=["input_ids", "attention_mask"],
        ),
    )


def read_state(path: str | Path) -> dict[str, Any]:
    """A checkpoint's state: of the file, or the newest of a run's folder that can be read.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    found = [path] if path.is_file() else []
    if path.is_dir():
        numbers = {p: re.fullmatch(r"(\d+)-\w+-(\d+)\.pt", p.name) for p in path.iterdir()}
        order = {p: tuple(map(int, match.groups())) for p, match in numbers.items() if match}
        found = sorted(order, key=order.__getitem__, reverse=True)
    for each in found:
        try:
            state = torch.load(each, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever the bytes make it raise
            reason = re.split(r"\n|\. ", str(error))[0] or type(error).__name__
            warnings.warn(f"skipped {each}, which cannot be read: {reason}", stacklevel=2)
            continue
        if isinstance(state, dict):
            return state
    raise ValueError(f"export: {path} must be a checkpoint or a run's folder, got none to read")


_KINDS = {"open_clip": to_open_clip, "transformers": to_transformers}


def main(argv: list[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="models.export", description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run's folder: its newest checkpoint; or a checkpoint")
    parser.add_argument("folder", help="where the files are written")
    parser.add_argument("--to", choices=tuple(_KINDS), default="open_clip", help="who loads them")
    flags = parser.parse_args(argv)
    try:
        state = read_state(flags.run)
        _KINDS[flags.to](state, flags.folder)
    except (ValueError, OSError) as error:
        sys.exit(f"models.export: {error}")
    print(f"{state['stage']}, step {state['step']}: {flags.folder} is for {flags.to}")


if __name__ == "__main__":
    main()
