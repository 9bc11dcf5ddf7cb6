"""The encoders: open_clip's features from its weights, dialects, pooling, positions, errors."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

from clipa_kernels import Packed, cu_seqlens_of
from models import (
    SIZES,
    TextConfig,
    VisionConfig,
    build,
    configs,
    load_weights,
    plain_keys,
    resize_positions,
    resize_text_positions,
    sincos_2d,
)
from training.distributed import World, wrap

open_clip = pytest.importorskip("open_clip")

OPEN_CLIP = {
    "ViT-B-32": ("B", 32, "open_clip"),
    "ViT-B-32-quickgelu": ("B", 32, "openai"),
    "ViT-B-16": ("B", 16, "open_clip"),
    "ViT-L-14-CLIPA": ("L", 14, "clipa-v2-open_clip"),
    "ViT-H-14-CLIPA": ("H", 14, "clipa-v2-open_clip"),
    "ViT-bigG-14-CLIPA": ("bigG", 14, "clipa-v2-open_clip"),
}


def open_clip_config(name):
    folder = Path(open_clip.__file__).parent / "model_configs"
    config = json.loads((folder / f"{name}.json").read_text())
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 2
    return config


def tiny(**change):
    torch.manual_seed(0)
    vision = dict(width=32, depth=2, heads=2, patch_size=8, image_size=16) | change.pop(
        "vision", {}
    )
    text = dict(width=32, depth=2, heads=2, context=12, vocab_size=40) | change.pop("text", {})
    return build("demo", 8, vision=vision, text=text, **change).eval()


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clips_weights_give_open_clips_features(name):
    config = open_clip_config(name)
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(**config).eval()
    size, patch, dialect = OPEN_CLIP[name]
    image_size = config["vision_cfg"]["image_size"]
    ours = build(
        size,
        patch,
        dialect=dialect,
        vision=dict(depth=2, image_size=image_size),
        text=dict(depth=2),
    ).eval()
    load_weights(ours, theirs.state_dict())
    images = torch.randn(2, 3, image_size, image_size)
    context, vocab = config["text_cfg"]["context_length"], config["text_cfg"]["vocab_size"]
    lengths = [5, context, 9]
    ids = torch.zeros(3, context, dtype=torch.int64)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(1, vocab - 1, (length,))
        row[length - 1] = vocab - 1  # the end token has the largest id
    with torch.no_grad():
        assert relative(ours.encode_image(images), theirs.encode_image(images)) <= 1e-5
        text = theirs.encode_text(ids)
        assert relative(ours.encode_text(ids), text) <= 1e-5
        if config["text_cfg"].get("pool_type", "argmax") == "argmax":  # packed: no pad is computed
            flat = torch.cat([row[:n] for row, n in zip(ids, lengths, strict=True)])
            packed = Packed(flat, cu_seqlens_of(lengths), context)
            assert relative(ours.encode_text(packed), text) <= 1e-5
    back = open_clip.model.CLIP(**config)
    back.load_state_dict(ours.state_dict())
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in theirs.state_dict().items())


@pytest.mark.parametrize("name", ["S-16", "M-16", "ViT-g-14"])
def test_sizes_have_open_clips_shapes(name):
    folder = Path(open_clip.__file__).parent / "model_configs"
    file = folder / (f"ViT-{name}.json" if not name.startswith("ViT") else f"{name}.json")
    config = json.loads(file.read_text())
    vision, text, embed_dim = configs(name.removeprefix("ViT-").split("-")[0], 16)
    their = config["vision_cfg"]
    head = their.get("head_width", 64)
    assert (vision.width, vision.depth) == (their["width"], their["layers"])
    assert vision.heads == vision.width // head
    assert int(vision.width * vision.mlp_ratio) == int(their["width"] * their.get("mlp_ratio", 4))
    assert embed_dim == config["embed_dim"]
    their = config["text_cfg"]
    assert (text.width, text.depth, text.heads) == (their["width"], their["layers"], their["heads"])


@pytest.mark.parametrize("size", SIZES)
def test_every_size_builds_and_divides_into_heads(size):
    vision, text, embed_dim = configs(size, 16, "clipa-v1")
    assert vision.width % vision.heads == 0 and vision.width // vision.heads in (64, 80, 88, 104)
    with torch.device("meta"):
        model = build(size, 16, vision=dict(depth=1), text=dict(depth=1))
    assert model.visual.proj.shape == (vision.width, embed_dim)
    assert model.text_projection.shape == (text.width, embed_dim)


def test_kept_patches_equal_open_clips_patch_dropout():
    theirs = open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg=dict(layers=2, width=64, head_width=32, patch_size=8, image_size=32),
        text_cfg=dict(context_length=12, vocab_size=40, width=32, heads=2, layers=1),
    ).eval()
    ours = build(
        "demo",
        8,
        vision=dict(width=64, depth=2, heads=2, image_size=32, pool="cls"),
        text=dict(width=32, depth=1, heads=2, context=12, vocab_size=40),
    )
    ours.visual.proj = torch.nn.Parameter(torch.empty(64, 16))
    ours.text_projection = torch.nn.Parameter(torch.empty(32, 16))
    load_weights(ours, theirs.state_dict())
    keep = torch.tensor([[0, 7, 15], [3, 4, 5]])

    class Chosen(torch.nn.Module):
        def forward(self, x):
            rows = (keep + 1).unsqueeze(-1).expand(-1, -1, x.shape[-1])
            return torch.cat((x[:, :1], x.gather(1, rows)), 1)

    theirs.visual.patch_dropout = Chosen()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert relative(ours.encode_image(images, keep), theirs.encode_image(images)) <= 1e-5


@pytest.mark.parametrize("pool", ["cls", "mean", "mean-with-cls"])
@pytest.mark.parametrize("after", [False, True], ids=["norm-first", "norm-after"])
def test_pooling(pool, after):
    model = tiny(vision=dict(pool=pool, norm_after_pool=after)).visual
    seen = {}
    model.transformer.register_forward_hook(lambda m, i, o: seen.update(inputs=i))
    out = model(torch.randn(3, 3, 16, 16))
    x = sum(model.transformer(*seen["inputs"][:3])).view(3, 5, 32)  # every row of the last block
    pick = {"cls": lambda t: t[:, 0], "mean": lambda t: t[:, 1:].mean(1)}
    pick = pick.get(pool, lambda t: t.mean(1))
    x = model.ln_post(pick(x)) if after else pick(model.ln_post(x))
    torch.testing.assert_close(out, x @ model.proj)


def test_uint8_images_are_normalised_inside():
    model = tiny()
    raw = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = model.visual.mean.view(3, 1, 1), model.visual.std.view(3, 1, 1)
    with torch.no_grad():
        a = model.encode_image(raw)
        b = model.encode_image((raw.float() / 255 - mean) / std)
    assert relative(a, b) < 1e-5


def test_forward_gives_what_the_losses_take():
    model = tiny(logit_bias=-10.0)
    text = Packed(torch.tensor([1, 39, 2, 3, 39]), cu_seqlens_of([2, 3]), 3)
    out = model(torch.randn(2, 3, 16, 16), text)
    assert list(out) == ["image_features", "text_features", "logit_scale", "logit_bias"]
    for name in ("image_features", "text_features"):
        assert out[name].shape == (2, 128)
        torch.testing.assert_close(out[name].norm(dim=1), torch.ones(2))
    torch.testing.assert_close(out["logit_scale"], torch.tensor(1 / 0.07))


def test_every_parameter_gets_a_gradient_and_checkpointing_keeps_it():
    model = tiny().train()
    images, ids = torch.randn(4, 3, 16, 16), torch.randint(1, 39, (4, 12))
    grads = []
    for checkpointing in (False, True):
        model.set_checkpointing(checkpointing)
        model.zero_grad()
        out = model(images, ids, torch.tensor([[0, 3]] * 4))
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
        torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None and grad.abs().max() > 0, name
        torch.testing.assert_close(grad, grads[1][name], msg=name)


def test_sincos_tables_are_the_published_ones():
    from open_clip.pos_embed import get_2d_sincos_pos_embed

    theirs = torch.from_numpy(get_2d_sincos_pos_embed(64, 5, cls_token=True)).float()
    torch.testing.assert_close(sincos_2d(64, (5, 5), "mae"), theirs)
    moco = sincos_2d(64, (5, 5), "moco")
    assert (moco[0] == 0).all()
    # The slowest of the 16 frequencies is 1 / 10000 exactly; patch 1 lies at x = 1, y = 0.
    torch.testing.assert_close(moco[2, 15], torch.sin(torch.tensor(1e-4)))
    torch.testing.assert_close(moco[6, 32], torch.sin(torch.tensor(1.0)))
    model = tiny(vision=dict(positions="sincos-moco"))
    assert not model.visual.positional_embedding.requires_grad
    assert torch.equal(model.visual.positional_embedding, sincos_2d(32, (2, 2), "moco"))


def test_positions_resize_as_open_clips():
    theirs = open_clip.model.CLIP(**open_clip_config("ViT-B-32"))
    weights = theirs.state_dict()
    image, text = weights["visual.positional_embedding"], weights["positional_embedding"]
    small = open_clip_config("ViT-B-32")
    small["vision_cfg"]["image_size"], small["text_cfg"]["context_length"] = 96, 16
    model = open_clip.model.CLIP(**small)
    open_clip.model.resize_pos_embed(weights, model)
    open_clip.model.resize_text_pos_embed(weights, model)
    torch.testing.assert_close(
        resize_positions(image, (3, 3)), weights["visual.positional_embedding"]
    )
    torch.testing.assert_close(resize_text_positions(text, 16), weights["positional_embedding"])


def test_stage_switch_loads_smaller_and_fixed_tables():
    small = tiny(vision=dict(positions="sincos-mae"))
    large = tiny(vision=dict(image_size=32), text=dict(context=20))
    load_weights(large, small.state_dict())
    expected = resize_positions(small.visual.positional_embedding.detach(), (4, 4))
    assert torch.equal(large.visual.positional_embedding.detach(), expected)
    assert torch.equal(large.visual.conv1.weight, small.visual.conv1.weight)
    fixed = tiny(vision=dict(image_size=32, positions="sincos-mae"), text=dict(context=12))
    load_weights(fixed, small.state_dict())
    assert torch.equal(fixed.visual.positional_embedding, sincos_2d(32, (4, 4), "mae"))


def test_dimensions_of_one_are_taken_and_left_out():
    """Tables as [1, N, D], class tokens as [1, 1, D], products as 1 x 1 convolutions."""
    small, own = tiny(logit_bias=-10.0), tiny(logit_bias=-10.0).state_dict()
    other = {key: torch.randn_like(value) for key, value in own.items()}
    kept = dict(other)
    for key in ("positional_embedding", "visual.positional_embedding", "logit_scale"):
        kept[key] = other[key][None]
    for key in ("visual.class_embedding", "logit_bias"):
        kept[key] = other[key][None, None]
    for key in ("visual.transformer.resblocks.0.mlp.c_fc.weight", "ln_final.bias"):
        kept[key] = other[key][..., None, None]
    load_weights(small, kept)
    assert all(torch.equal(value, other[key]) for key, value in small.state_dict().items())
    large = tiny(vision=dict(image_size=32), text=dict(context=20), logit_bias=-10.0)
    load_weights(large, kept)
    expected = resize_positions(other["visual.positional_embedding"], (4, 4))
    assert torch.equal(large.visual.positional_embedding.detach(), expected)
    expected = resize_text_positions(other["positional_embedding"], 20)
    assert torch.equal(large.positional_embedding.detach(), expected)
    fixed = tiny(vision=dict(positions="sincos-mae", image_size=32), logit_bias=-10.0)
    load_weights(fixed, kept)
    assert torch.equal(fixed.visual.positional_embedding, sincos_2d(32, (4, 4), "mae"))


VISION = "visual.positional_embedding"


@pytest.mark.parametrize(
    ("key", "shape", "expected"),
    [
        (VISION, (2, 5, 32), "[5, 32]"),
        (VISION, (4, 32), "[1 + n * n, 32]"),
        (VISION, (2, 1, 32), "[5, 32]"),
        (VISION, (1, 2, 2, 32), "[5, 32]"),
        (VISION, (5, 16), "[5, 32]"),
        (VISION, (0, 32), "[5, 32]"),
        (VISION, (), "[5, 32]"),
        ("positional_embedding", (2, 12, 32), "[12, 32]"),
        ("positional_embedding", (32,), "[12, 32]"),
        ("positional_embedding", (13, 31), "[12, 32]"),
        ("visual.class_embedding", (2, 16), "[32]"),
        ("visual.conv1.weight", (32, 192), "[32, 3, 8, 8]"),
        ("logit_scale", (2,), "[]"),
    ],
    ids=str,
)
def test_other_shapes_are_named(key, shape, expected):
    model = tiny()
    words = f"load_weights: {key} must be {expected}, got {list(shape)}"
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        load_weights(model, model.state_dict() | {key: torch.zeros(shape)})


def test_prefixes_of_wrappers_are_dropped():
    weights = {
        "module._orig_mod.text.ln_final.bias": torch.ones(1),
        "module.logit_scale": torch.ones(1),
    }
    assert sorted(plain_keys(weights)) == ["ln_final.bias", "logit_scale"]
    model = tiny()
    wrapped = {f"module.{key}": value for key, value in model.state_dict().items()}
    load_weights(tiny(), wrapped | {"module.logit_scale": torch.ones(1)})


def test_dialects_differ_in_what_the_recipes_say():
    v1, v2 = configs("H", 14, "clipa-v1"), configs("H", 14, "clipa-v2")
    assert (v1[0].gelu, v2[0].gelu) == ("none", "tanh") and (v1[0].eps, v2[0].eps) == (1e-5, 1e-6)
    assert (v1[0].ln_pre, v2[0].ln_pre) == (True, False)
    assert (v1[1].causal, v2[1].causal, v2[1].pool) == (True, False, "last")
    assert configs("B", 32, "openai")[1].gelu == "quick"
    torch.manual_seed(0)
    model = build("demo", 8, dialect="clipa-v2")
    weight = model.visual.transformer.resblocks[0].mlp.c_fc.weight
    bound = (6 / sum(weight.shape)) ** 0.5
    assert weight.abs().max() <= bound and weight.std() > 0.9 * bound / 3**0.5
    assert (model.visual.class_embedding == 0).all()


@pytest.mark.parametrize("dialect", ["open_clip", "clipa-v2"])
def test_model_compiles_in_one_graph(dialect):
    model = tiny(dialect=dialect)
    text = Packed(torch.tensor([1, 39, 2, 3, 39]), cu_seqlens_of([2, 3]), 3)
    images, keep = torch.randn(2, 3, 16, 16), torch.tensor([[0, 3], [1, 2]])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name, value in compiled(images, text, keep).items():
        torch.testing.assert_close(value, model(images, text, keep)[name])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_model_compiles_once_for_any_number_of_tokens(impl):
    """Forward and backward: a graph for the first lengths, and one for all others."""
    if impl == "triton":
        pytest.importorskip("triton")
    model = tiny(impl=impl, vision=dict(depth=1), text=dict(depth=1))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    keep = torch.tensor([[0, 3], [1, 2], [2, 3]])
    for lengths in ([2, 3, 4], [5, 2, 7], [2, 11, 2]):
        text = Packed(torch.arange(sum(lengths)), cu_seqlens_of(lengths), max(lengths))
        grads = []
        for call in (compiled, model):
            model.zero_grad()
            image, caption, scale = call(images, text, keep).values()
            (scale * image * caption).sum().backward()
            grads.append([parameter.grad.clone() for parameter in model.parameters()])
        for mine, plain in zip(*grads, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)
    assert counter.frame_count <= 2


IDS = Packed(torch.tensor([1, 39]), cu_seqlens_of([2]), 2)
BAD = {
    "image size": (lambda m: m.encode_image(torch.zeros(1, 3, 24, 24)), ValueError, "3, 16, 16"),
    "id beyond": (
        lambda m: m.encode_text(IDS._replace(tokens=torch.tensor([1, 40]))),
        ValueError,
        "token ids must be from 0 to 39, got 1 to 40",
    ),
    "id below": (lambda m: m.encode_text(torch.tensor([[-1, 2]])), ValueError, "got -1 to 2"),
    "float ids": (lambda m: m.encode_text(torch.zeros(1, 2)), TypeError, "int32 or int64"),
    "one-dimensional ids": (lambda m: m.encode_text(IDS.tokens), ValueError, r"must be \[B, S\]"),
    "long text": (
        lambda m: m.encode_text(torch.zeros(1, 13, dtype=torch.int64)),
        ValueError,
        "at most context = 12 tokens, got 13",
    ),
    "empty text": (
        lambda m: m.encode_text(Packed(IDS.tokens, cu_seqlens_of([2, 0]), 2)),
        ValueError,
        "at least one token, got an empty one",
    ),
    "size": (lambda m: build("XL", 16), ValueError, "size must be one of .*, got 'XL'"),
    "dialect": (lambda m: build("B", 16, dialect="v3"), ValueError, "dialect must be one of"),
    "patches": (lambda m: tiny(vision=dict(image_size=20)), ValueError, "patch_size 8, got 20"),
    "pool": (lambda m: tiny(vision=dict(pool="max")), ValueError, "pool must be one of"),
    "positions": (lambda m: tiny(vision=dict(positions="rope")), ValueError, "positions must be"),
    "text pool": (lambda m: tiny(text=dict(pool="first")), ValueError, "pool must be one of"),
    "heads": (lambda m: tiny(vision=dict(heads=3)), ValueError, "multiple of 8, got 32 / 3"),
    "missing": (lambda m: load_weights(m, {}), ValueError, r"got \d+ missing"),
    "other shape": (
        lambda m: load_weights(tiny(vision=dict(width=64)), m.state_dict()),
        ValueError,
        r"must be \[.*\], got \[",
    ),
    "other depth": (
        lambda m: load_weights(tiny(vision=dict(depth=1)), m.state_dict()),
        ValueError,
        "unexpected .*'visual.transformer.resblocks.1",
    ),
    "image list": (lambda m: m.encode_image([1.0]), TypeError, "images must be a tensor, got list"),
    "text list": (lambda m: m.encode_text([[1, 2]]), TypeError, "Packed or a tensor, got list"),
    "keys": (lambda m: load_weights(m, {1: 2, "module": 3}), ValueError, "unexpected .*'module'"),
    "no mapping": (lambda m: load_weights(m, [1]), TypeError, "map names to tensors, got list"),
    "no tensor": (
        lambda m: load_weights(m, m.state_dict() | {"logit_scale": 2.6}),
        TypeError,
        "logit_scale must be a tensor, got float",
    ),
    "sparse": (
        lambda m: load_weights(m, m.state_dict() | {"text_projection": torch.eye(3).to_sparse()}),
        TypeError,
        "text_projection must hold dense real numbers, got torch.float32 in torch.sparse_coo",
    ),
    "meta": (
        lambda m: load_weights(m, m.state_dict() | {"logit_scale": torch.zeros((), device="meta")}),
        TypeError,
        "logit_scale must hold dense real numbers, got .* on meta",
    ),
    "complex": (
        lambda m: load_weights(m, m.state_dict() | {"logit_scale": torch.tensor(1j)}),
        TypeError,
        "logit_scale must hold dense real numbers, got torch.complex64",
    ),
    "no rows": (lambda m: resize_positions(torch.zeros(0, 4), (2, 2)), ValueError, r"n \* n"),
    "tables": (lambda m: resize_positions(torch.zeros(1, 5, 4), (2, 2)), ValueError, r"n \* n"),
    "text table": (lambda m: resize_text_positions(torch.zeros(4), 2), ValueError, r"\[S, D\]"),
    "table": (lambda m: resize_positions(torch.zeros(6, 4), (2, 2)), ValueError, r"n \* n"),
}


@pytest.mark.parametrize(("call", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(tiny())


def test_configs_are_plain_data():
    for config in (VisionConfig(), TextConfig()):
        assert type(config)(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(("pool", "most"), [("cls", 4), ("mean", 3)])
def test_blocks_compile_once_for_any_number_of_tokens(pool, most, monkeypatch):
    """The last block, where few of its rows are wanted, and one graph for all others, a tower."""
    graphs = []

    def counter(graph, _):
        graphs.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, backend=counter, **how))
    torch._dynamo.reset()
    sizes = dict(vision=dict(image_size=32, pool=pool), text=dict(context=16, vocab_size=300))
    model = build("S", 8, **sizes)  # of 12 layers a tower
    plain = build("S", 8, **sizes)
    plain.load_state_dict(model.state_dict())
    wrapped = wrap(model, World(0, 0, 1, torch.device("cpu")), compiled=True)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for lengths, kept in (([5, 7, 2], 5), ([9, 6, 4], 7), ([16, 1, 8], 11)):
        ids = torch.randint(1, 299, (sum(lengths),))
        ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        keep = torch.stack([torch.randperm(16)[:kept].sort()[0] for _ in range(3)])
        images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
        outs = [m(images, Packed(ids, ends, max(lengths)), keep) for m in (wrapped, plain)]
        for out in outs:
            (out["image_features"] * out["text_features"]).sum().backward()
        for name in ("image_features", "text_features"):
            torch.testing.assert_close(outs[0][name], outs[1][name], rtol=1e-5, atol=1e-6)
        assert len(graphs) == most
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
