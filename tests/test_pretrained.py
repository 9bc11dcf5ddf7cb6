"""Weights of others are read by their own forms, and a run starts from them; locked towers."""

import sys

import pytest
import torch
from test_train import demo, flags, steps_of

import train
from models import build, load_weights, read_weights
from models.clip import CLIP
from training import checkpoint

SMALL = dict(vision=dict(image_size=32), text=dict(context=16, vocab_size=300))


def small(seed: int, dialect: str = "openai") -> CLIP:
    torch.manual_seed(seed)
    return build("demo", 8, dialect=dialect, **SMALL)


def same(one: CLIP, other: CLIP) -> bool:
    return all(
        torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items()
    )


def write_hugging_face(folder, many: bool = False):
    transformers = pytest.importorskip("transformers")
    both = dict(hidden_size=128, intermediate_size=512, num_attention_heads=2, projection_dim=128)
    text = dict(both, num_hidden_layers=2, max_position_embeddings=16, vocab_size=300)
    text |= dict(bos_token_id=298, eos_token_id=299, pad_token_id=299)
    vision = dict(both, num_hidden_layers=4, image_size=32, patch_size=8)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)
    torch.manual_seed(3)
    model = transformers.CLIPModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, **({"max_shard_size": "1MB"} if many else {}))
    return model


@pytest.mark.parametrize("many", [False, True], ids=["one file", "several"])
def test_hugging_faces_clip_gives_the_same_features(tmp_path, many):
    theirs = write_hugging_face(tmp_path, many)
    assert (tmp_path / "model.safetensors.index.json").exists() == many
    ours = small(0)
    load_weights(ours.eval(), read_weights(tmp_path))
    images, ids = torch.randn(3, 3, 32, 32), torch.randint(1, 297, (3, 16))
    ids[:, -1] = 299
    with torch.no_grad():
        for function, encode, given in (
            (theirs.get_image_features, ours.encode_image, images),
            (theirs.get_text_features, ours.encode_text, ids),
        ):
            expected = function(given)
            expected = getattr(expected, "pooler_output", expected)
            torch.testing.assert_close(encode(given), expected, rtol=1e-4, atol=1e-5)
    assert ours.logit_scale == theirs.logit_scale


def test_files_of_open_clip_openai_and_a_run(tmp_path):
    model = small(1)
    weights = model.state_dict()
    torch.save({f"module.{key}": value for key, value in weights.items()}, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "checkpoint.pth")
    pytest.importorskip("safetensors.torch").save_file(
        {key: value.clone() for key, value in weights.items()},
        tmp_path / "open_clip_model.safetensors",
    )

    class Held(torch.nn.Module):  # OpenAI's archives: weights in fp16, and three numbers
        def __init__(self):
            super().__init__()
            for key, value in weights.items():
                self.register_buffer(key.replace(".", "_"), value)
            self.register_buffer("input_resolution", torch.tensor(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.script(Held()).save(str(tmp_path / "openai.pt"))
    for name in ("plain.pt", "checkpoint.pth", "open_clip_model.safetensors", "."):
        other = small(2)
        load_weights(other, read_weights(tmp_path / name))
        assert same(other, model), name
    scripted = read_weights(tmp_path / "openai.pt")
    assert "input_resolution" not in scripted and len(scripted) == len(weights)


@pytest.mark.parametrize("data", [b"", b"no weights", b"PK\x03\x04"])
def test_files_that_hold_no_weights(tmp_path, data):
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=r"^read_weights: .*a\.\w+ must hold weights, got"):
            read_weights(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt must map names to tensors"):
        read_weights(tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"path must be a file or folder of weights"):
        read_weights(tmp_path / "none.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty must hold one of open_clip_model"):
        read_weights(tmp_path / "empty")


def test_safetensors_are_asked_for_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "a.safetensors").write_bytes(b"{}")
    with pytest.raises(RuntimeError, match=r"read_weights: .* needs the package safetensors, got"):
        read_weights(tmp_path / "a.safetensors")


def test_a_run_starts_from_an_earlier_ones_weights(tmp_path):
    one = dict(stages__short__steps=4, stages__full__steps=0)
    train.main(flags(tmp_path / "first", **one))
    path = checkpoint.checkpoints(tmp_path / "first")[-1]
    how = dict(one, init=path, stages__short__lr=1e-30, stages__short__warmup=0)
    train.main(flags(tmp_path / "second", **how, run__seed=5))
    first, second = (
        checkpoint.latest(tmp_path / name)["state_dict"] for name in ("first", "second")
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-7)
    bias = dict(optim__loss="sigmoid", model__init_bias=-3.0)  # which those weights lack
    train.main(flags(tmp_path / "third", **how, **bias))
    assert checkpoint.latest(tmp_path / "third")["state_dict"]["logit_bias"] == -3
    with pytest.raises(SystemExit, match=r"train\.py: load_weights: keys must be the model's"):
        torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
        train.main(flags(tmp_path / "fourth", **dict(how, init=tmp_path / "a.pt")))
    with pytest.raises(SystemExit, match=r"model\.init must be a file or folder of weights"):
        train.main(flags(tmp_path / "fifth", **dict(how, init=tmp_path / "none")))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_locked_tower_stays_and_the_other_learns(tower, accumulate):
    """And the other learns as it would beside a tower whose gradient is thrown away."""
    how = dict(optim__clip_norm=0.0, optim__adam_eps=1e-4)  # by which small gradients count less
    config = demo(model__lock=tower, stages__short__accumulate=accumulate, **how)
    losses, weights = steps_of(config, 4)
    free_losses, free = steps_of(demo(model__lock="none", **how), 1)
    assert losses[0] == pytest.approx(free_losses[0], rel=1e-5)
    start = steps_of(config, 0)[1]
    for name, value in weights.items():
        own = "image" if name.startswith("visual.") else "text"
        moved = not torch.equal(value, start[name])
        assert moved == (own != tower or name == "logit_scale"), name
    first = steps_of(config, 1)[1]
    for name, value in first.items():
        if not torch.equal(value, start[name]):
            torch.testing.assert_close(value, free[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_locked_tower_keeps_no_graph():
    model = small(1)
    model.lock("image")
    kept = []
    images, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 297, (2, 16))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = model(images, ids)
        both = len(kept)
        model.encode_text(ids)
    assert both - (len(kept) - both) < 8  # the text's own, its norm and the scale
    assert not out["image_features"].requires_grad and out["text_features"].requires_grad
    model.lock("none")
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"lock: tower must be image, text or none, got 'both'"):
        model.lock("both")
