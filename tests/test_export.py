"""models/export.py: open_clip and transformers load what a run wrote, with the same features."""

import json
import re
from collections.abc import Callable

import pytest
import tokenizers
import torch
from configs import changed
from torch import nn

from clipa_kernels.packing import Packed
from data.text import Tokenizer, bert_wordpiece, clip_bpe, train_wordpiece
from models import build, from_hugging_face, load_weights
from models.export import described, main, open_clip_config, read_state
from models.pretrained import to_hugging_face
from training.checkpoint import checkpoints, pack_state, save, set_aside
from training.config import preset
from training.optim import adamw

CAPTIONS = ["a red balloon", "two blue balloons & a dog that has more words than fit", "blue"]
TEXT = dict(context=8, vocab_size=200)
MODELS = {
    "open_clip": dict(dialect="open_clip"),
    "mean": dict(dialect="open_clip", vision=dict(pool="mean")),
    "openai": dict(dialect="openai"),
    "clipa-v1": dict(dialect="clipa-v1"),
    "clipa-v2": dict(dialect="clipa-v2"),
    "sigmoid": dict(dialect="open_clip", logit_bias=-7.0),
}


def tokenizer_of(kind: str, folder) -> Tokenizer:
    if kind == "clip":
        return clip_bpe()
    if kind == "unigram":
        pieces = ["[PAD]", "[UNK]", *sorted(set(" ".join(CAPTIONS))), "[EOT]"]
        scored = [(piece, -1.0) for piece in pieces]
        return Tokenizer(tokenizers.Tokenizer(tokenizers.models.Unigram(scored, unk_id=1)))
    if kind == "trained":
        return Tokenizer(train_wordpiece(CAPTIONS, 200))
    words = dict.fromkeys(" ".join(CAPTIONS).split())
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    return bert_wordpiece(folder / "vocab.txt")


def written(folder, name: str, tokenizer: Tokenizer) -> nn.Module:
    """A model, whose checkpoint lies in the folder."""
    torch.manual_seed(0)
    made = MODELS[name] | dict(text=TEXT | dict(vocab_size=tokenizer.vocab_size))
    model = build("demo", 8, **made | dict(vision=dict(image_size=32) | made.get("vision", {})))
    with torch.no_grad():
        for parameter in model.parameters():  # none is left at a value that hides an error
            parameter.add_(0.02 * torch.randn_like(parameter))
    config = changed(preset("emoji"), model__size="demo")
    more = dict(
        tokenizer=tokenizer.to_json(),
        open_clip=described(model, tokenizer.end, tokenizer.vocab_size),
    )
    save(folder, pack_state(model, adamw(model, config), config, "short", step=3, **more), 3)
    return model.eval()


@torch.no_grad()
def same(model: nn.Module, tokenizer: Tokenizer, image: Callable, text: Callable) -> None:
    images = torch.rand(2, 3, 32, 32)
    packed = tokenizer.encode(CAPTIONS, 8, pad=model.config.pool == "last")
    for ours, theirs in (
        (model.encode_image(images), image(images)),
        (model.encode_text(Packed(*packed)), text(CAPTIONS)),
    ):
        assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("open_clip", "trained"),
        ("mean", "trained"),
        ("openai", "clip"),
        ("clipa-v1", "trained"),
        ("clipa-v2", "bert"),
        ("sigmoid", "trained"),
        ("open_clip", "unigram"),
    ],
)
def test_open_clip_loads_it(name, kind, tmp_path, capsys):
    open_clip = pytest.importorskip("open_clip")
    tokenizer = tokenizer_of(kind, tmp_path)
    model = written(tmp_path, name, tokenizer)
    out = tmp_path / "out"
    main([str(tmp_path), str(out)])
    assert capsys.readouterr().out == f"short, step 3: {out} is for open_clip\n"
    theirs, _, pictures = open_clip.create_model_and_transforms(f"local-dir:{out}")
    words = open_clip.get_tokenizer(f"local-dir:{out}")
    assert type(words).__name__ == ("SimpleTokenizer" if kind == "clip" else "HFTokenizer")
    theirs.eval()
    same(model, tokenizer, theirs.encode_image, lambda texts: theirs.encode_text(words(texts)))
    assert torch.equal(theirs.logit_scale, model.logit_scale)
    if model.logit_bias is not None:
        assert torch.equal(theirs.logit_bias, model.logit_bias)
    assert tuple(pictures.transforms[-1].mean) == model.visual.config.mean


@pytest.mark.parametrize(
    ("name", "kind"), [("open_clip", "trained"), ("openai", "clip"), ("clipa-v1", "trained")]
)
def test_transformers_loads_it(name, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_of(kind, tmp_path)
    model = written(tmp_path, name, tokenizer)
    out = str(tmp_path / "out")
    main([str(tmp_path / "1-short-00000003.pt"), out, "--to", "transformers"])
    theirs = transformers.CLIPModel.from_pretrained(out).eval()
    processor = transformers.CLIPProcessor.from_pretrained(out)

    def text(captions):
        how = dict(return_tensors="pt", padding=True, truncation=True)
        return theirs.get_text_features(**processor(text=captions, **how)).pooler_output

    image = lambda pixels: theirs.get_image_features(pixel_values=pixels).pooler_output  # noqa: E731
    same(model, tokenizer, image, text)
    state = read_state(tmp_path)["state_dict"]
    back = from_hugging_face(to_hugging_face(state))
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("mean", "trained", "have the class token pooled, got the mean of patches"),
        ("clipa-v2", "bert", "have a norm before the first block, got a model without"),
        ("sigmoid", "trained", "have no logit bias, got a model of the sigmoid loss"),
    ],
)
def test_what_clip_model_is_not(name, kind, sentence, tmp_path):
    written(tmp_path, name, tokenizer_of(kind, tmp_path))
    with pytest.raises(
        SystemExit, match=f"^models.export: to_transformers: CLIPModel .*{sentence}"
    ):
        main([str(tmp_path), str(tmp_path / "out"), "--to", "transformers"])
    assert not (tmp_path / "out").exists()


def test_what_open_clip_is_not(tmp_path):
    model = build("demo", 8, vision=dict(image_size=32, pool="mean-with-cls"), text=TEXT)
    with pytest.raises(ValueError, match="pool must be cls or mean for open_clip, got mean-with"):
        open_clip_config(model, 199, 200)
    assert "pool must be" in json.loads(described(model, 199, 200))["refused"]
    model = build("demo", 8, vision=dict(image_size=32), text=TEXT)
    with pytest.raises(ValueError, match="captions must have an end token for open_clip, got none"):
        open_clip_config(model, None, 200)
    text = open_clip_config(model, 150, 200)["model_cfg"]["text_cfg"]
    assert (text["pool_type"], text["eos_id"]) == ("eos", 150)


def test_the_config_lies_beside_each_checkpoint(tmp_path):
    words = tokenizer_of("trained", tmp_path)
    for _ in range(2):
        model = written(tmp_path, "sigmoid", words)
    config = json.loads((tmp_path / "1-short-00000003.json").read_text())
    assert config == open_clip_config(model, words.end, words.vocab_size)
    state = read_state(tmp_path)
    for step in (4, 5, 6):
        save(tmp_path, state, step, keep=2)
    names = sorted(path.stem for path in checkpoints(tmp_path))
    assert names == sorted(path.stem for path in tmp_path.glob("*-*-*.json"))
    moved = set_aside(tmp_path)
    assert sorted(path.stem for path in moved.glob("*.json")) == names


def test_a_broken_newest_checkpoint_is_skipped(tmp_path):
    written(tmp_path, "mean", tokenizer_of("trained", tmp_path))
    (tmp_path / "1-short-00000009.pt").write_bytes(b"PK\x03\x04 half")
    with pytest.warns(UserWarning, match=r"skipped .*1-short-00000009\.pt, which cannot be read"):
        main([str(tmp_path), str(tmp_path / "out")])


@pytest.mark.parametrize("what", ["absent", "empty", "other"])
def test_no_checkpoint(what, tmp_path):
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    if what == "other":
        torch.save(dict(state_dict={}), path)
    must = "must hold train.py's" if what == "other" else "must be a checkpoint or a run's folder"
    with pytest.raises(SystemExit, match=f"^models.export: export: .*{must}.*got"):
        main([str(path), str(tmp_path / "out")])


def test_refusals_name_the_remedy():
    model = build("demo", 8, vision=dict(image_size=32), text=TEXT)
    state = model.state_dict()
    with pytest.raises(ValueError, match=re.escape('of a checkpoint pass its "state_dict", got')):
        load_weights(model, dict(epoch=1, name="run", state_dict=state))
    theirs = to_hugging_face(state)
    with pytest.raises(ValueError, match=r"pass models.from_hugging_face\(state_dict\), got those"):
        load_weights(model, theirs)
    load_weights(model, from_hugging_face(theirs))
