"""accelerate and restore: real models of open_clip, timm and Hugging Face, before and after."""

import copy
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tolerance import check_close
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import clipa_kernels
from bench.meters.counted import counted
from bench.meters.whole_block import _CudaAutocast
from clipa_kernels import PatchDropout, accumulated, contrastive_loss, restore
from clipa_kernels.adapters import blocks

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

ROOT = Path(__file__).parents[1]
WIDTH, DEPTH, HEADS, SIDE, SIZE, CONTEXT, WORDS = 64, 2, 2, 8, 32, 12, 50
TORCH = dict(width=WIDTH, layers=DEPTH)


def open_clip_model(kind=open_clip.model.CLIP, drop=0.5, text=None, **vision):
    vision = dict(head_width=32, patch_size=SIDE, image_size=SIZE, patch_dropout=drop) | vision
    words = dict(context_length=CONTEXT, vocab_size=WORDS, heads=HEADS) | (text or {})
    return kind(32, TORCH | vision, TORCH | words, output_dict=True)


def timm_model(drop=0.5, **options):
    sizes = dict(img_size=SIZE, patch_size=SIDE, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS)
    return VisionTransformer(**sizes, num_classes=7, patch_drop_rate=drop, **options)


def hugging_face(kind, **options):
    both = dict(hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=DEPTH)
    both |= dict(num_attention_heads=HEADS)
    image = both | dict(image_size=SIZE, patch_size=SIDE)
    text = both | dict(vocab_size=WORDS, max_position_embeddings=CONTEXT, projection_size=WIDTH)
    text |= dict(bos_token_id=1, eos_token_id=WORDS - 1, pad_token_id=0)
    if kind.__name__.startswith("ViT"):
        return kind(transformers.ViTConfig(**image, **options))
    return kind(kind.config_class(text_config=text, vision_config=image, **options))


CLIP, CUSTOM = open_clip.model.CLIP, open_clip.CustomTextCLIP
MODELS = {
    "open_clip CLIP": open_clip_model,
    "open_clip CustomTextCLIP": lambda: open_clip_model(
        CUSTOM, pool_type="avg", ls_init_value=0.5, text=dict(no_causal_mask=True)
    ),
    "open_clip quick": lambda: CLIP(
        32,
        dict(TORCH, head_width=32, patch_size=SIDE, image_size=SIZE, no_ln_pre=True),
        dict(TORCH, context_length=CONTEXT, vocab_size=WORDS, heads=HEADS),
        quick_gelu=True,
        output_dict=True,
    ),
    "timm class": timm_model,
    "timm avg": lambda: timm_model(class_token=False, global_pool="avg", init_values=0.5),
    "timm registers": lambda: timm_model(reg_tokens=3, no_embed_class=True, drop_path_rate=0.2),
    "timm map": lambda: timm_model(class_token=False, global_pool="map", pre_norm=True),
    "CLIPModel": lambda: hugging_face(transformers.CLIPModel),
    "SiglipModel": lambda: hugging_face(transformers.SiglipModel),
    "ViTModel": lambda: hugging_face(transformers.ViTModel),
    "ViTForImageClassification": lambda: hugging_face(transformers.ViTForImageClassification),
}


def made(name):
    torch.manual_seed(0)
    return MODELS[name]()


def pairs(seed=1, batch=3):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, SIZE, SIZE, generator=generator)
    ids = torch.randint(1, WORDS - 1, (batch, CONTEXT), generator=generator)
    ids[:, -1] = WORDS - 1
    return images, ids


def outputs(model, images, ids):
    """The outputs of any of MODELS by name; their patches are drawn from one state."""
    torch.manual_seed(5)
    dtype = next(model.parameters()).dtype
    if not isinstance(model, transformers.PreTrainedModel):
        out = model(images.to(dtype), ids) if hasattr(model, "visual") else model(images.to(dtype))
        return out if isinstance(out, dict) else {"logits": out}
    inner = getattr(model, "vit", model)
    image = dict(pixel_values=images.to(dtype))
    if hasattr(inner, "text_model"):
        image |= dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    out = model(**image)
    names = ("image_embeds", "text_embeds", "logits", "last_hidden_state", "pooler_output")
    return {name: out[name] for name in names if name in out}


def with_our_draw(model):
    """The model with clipa_kernels.PatchDropout in place of its own."""
    for module in model.modules():
        for name, part in module.named_children():
            if hasattr(part, "prob") and not isinstance(part, PatchDropout):
                prefix = getattr(part, "num_prefix_tokens", 1)
                setattr(module, name, PatchDropout(part.prob, num_prefix_tokens=prefix))
    return model


def results(model, images, ids):
    """Outputs and gradients by name."""
    out = outputs(model, images, ids)
    generator = torch.Generator().manual_seed(7)
    draws = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in out.values()]
    total = sum((o.double() * w).sum() for o, w in zip(out.values(), draws, strict=True))
    model.zero_grad()
    total.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: o.detach() for name, o in out.items()} | grads


SEEN = []  # the blocks that this library computed, since the model was accelerated


def accelerate(model, **options):
    out = clipa_kernels.accelerate(model, **options)
    SEEN.clear()  # of what was tried
    return out


@pytest.fixture
def fast(monkeypatch):
    block = blocks._block

    def counting(module, x, plan, causal):
        SEEN.append(module)
        return block(module, x, plan, causal)

    monkeypatch.setattr(blocks, "_block", counting)
    SEEN.clear()
    return SEEN


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_stay(name, dtype, training, fast):
    model = with_our_draw(made(name)).train(training).to(dtype)
    exact = results(copy.deepcopy(model).double(), *pairs())
    baseline = results(model, *pairs())
    same, report = accelerate(model)
    assert same is model and len(report.replaced) >= DEPTH
    actual = results(model, *pairs())
    towers = 2 if "text" in " ".join(actual) else 1
    assert len(fast) == towers * DEPTH
    assert actual.keys() == exact.keys()
    for key in exact:
        if re.search(r"k_proj\.bias", key):  # no gradient but of rounding reaches the keys' bias
            continue
        check_close(key, actual[key], exact[key], baseline[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["open_clip CLIP", "timm registers", "CLIPModel"])
def test_a_curve_of_20_steps_stays(name, dtype):
    def curve(model, to):
        model = model.to(to).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        losses = []
        for step in range(20):
            first, *rest = outputs(model, *pairs(seed=step % 4, batch=4)).values()
            if name.startswith("timm"):
                loss = F.cross_entropy(first, torch.arange(4))
            else:
                loss = contrastive_loss(first, rest[0], torch.tensor(5.0, dtype=to))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses, dtype=to)

    model = with_our_draw(made(name)).to(dtype)
    exact, baseline = (curve(copy.deepcopy(model), to) for to in (torch.float64, dtype))
    actual = curve(accelerate(model)[0], dtype)
    assert exact[-1] < exact[0]
    check_close("loss", actual, exact, baseline)


def test_the_state_stays_and_restore_takes_all_back():
    model = made("open_clip CLIP")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    parameters = list(model.parameters())
    accelerate(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert state.keys() == model.state_dict().keys()
    assert not model.load_state_dict(state).missing_keys
    assert restore(model) is model
    assert before == {name: set(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"restore: model must be accelerated, got a CLIP"):
        restore(model)
    accelerate(model)  # again


def test_the_report_is_a_table():
    model = made("timm class")
    model.blocks[1].attn.attn_drop.p = 0.1
    lines = str(accelerate(model)[1]).splitlines()
    assert [line.split()[0] for line in lines] == ["replaced", "replaced", "left"]
    assert lines[0].split()[1] == "(model)"
    assert (
        lines[2].endswith("blocks.1  attn.attn_drop is a dropout of 0.1") or "blocks.*" in lines[2]
    )


# ---- Calls that a block does not know, and parts that change ----


def test_hooks_of_blocks_run_and_those_within_leave_the_block(fast):
    model, seen = made("open_clip CLIP").eval(), []
    within = model.visual.transformer.resblocks[1].mlp.c_fc
    within.register_forward_hook(lambda *_: seen.append("within"))
    _, report = accelerate(model)
    assert report.left["visual.transformer.resblocks.1"] == "hooks of mlp.c_fc would not run"
    model.visual.transformer.resblocks[0].register_forward_hook(lambda *_: seen.append("block"))
    late = model.transformer.resblocks[0].attn
    late.register_forward_pre_hook(lambda *_: seen.append("late"))
    outputs(model, *pairs())
    assert seen == ["block", "within", "late"] and len(fast) == 2


class Lora(nn.Linear):
    pass


class Doubled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


OTHERS = {
    "linear": (lambda b: setattr(b.mlp, "c_fc", Lora(WIDTH, 4 * WIDTH)), "mlp.c_fc is a Lora"),
    "activation": (lambda b: setattr(b.mlp, "gelu", nn.ReLU()), "mlp.gelu is a ReLU, no GELU"),
    "dropout": (lambda b: setattr(b.attn, "dropout", 0.1), "attn has a dropout of 0.1"),
    "part": (lambda b: b.add_module("ln_3", nn.LayerNorm(WIDTH)), "it holds ln_3, a LayerNorm"),
    "parameter": (lambda b: b.register_parameter("g", nn.Parameter(torch.ones(1))), "it holds g"),
    "arithmetic": (
        lambda b: setattr(b, "ln_2", Doubled(WIDTH)),
        "its forward computes something else than its parts tell",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_block_with_other_parts_is_left(kind):
    model, (change, why) = made("open_clip CLIP"), OTHERS[kind]
    change(model.visual.transformer.resblocks[1])
    _, report = accelerate(model)
    assert report.left == {"visual.transformer.resblocks.1": why}


@pytest.mark.parametrize("kind", ["linear", "activation", "dropout", "arithmetic"])
def test_a_part_that_changes_afterwards_leaves_its_block(kind, fast):
    model = accelerate(made("open_clip CLIP").eval())[0]
    OTHERS[kind][0](model.visual.transformer.resblocks[1].train())
    outputs(model, *pairs())
    assert len(fast) == 2 * DEPTH - 1


def test_masks_that_are_not_known_are_the_blocks_own(fast):
    model = made("open_clip CLIP").eval()
    expected = copy.deepcopy(model)
    accelerate(model)
    mask = torch.full((CONTEXT, CONTEXT), float("-inf")).triu(2)
    x = torch.randn(2, CONTEXT, WIDTH)
    block = model.transformer.resblocks[0]
    own = expected.transformer.resblocks[0]
    assert torch.equal(block(x, attn_mask=mask), own(x, attn_mask=mask)) and not fast
    block(x, attn_mask=model.attn_mask)
    assert len(fast) == 1
    padded = hugging_face(transformers.CLIPModel).eval()
    plain = copy.deepcopy(padded)
    accelerate(padded)
    images, ids = pairs()
    attention_mask = torch.ones_like(ids)
    attention_mask[0, 4:] = 0
    given = dict(pixel_values=images, input_ids=ids, attention_mask=attention_mask)
    fast.clear()
    torch.testing.assert_close(padded(**given).text_embeds, plain(**given).text_embeds)
    assert len(fast) == DEPTH  # the images'
    states = padded(**given, output_hidden_states=True).vision_model_output.hidden_states
    assert len(states) == DEPTH + 1 and len(fast) == 2 * DEPTH
    padded(**given, output_attentions=True)
    assert len(fast) == 2 * DEPTH


# ---- Where a model goes ----


def test_copies_casts_and_checkpoints(fast):
    model = with_our_draw(made("open_clip CLIP")).train()
    baseline = results(model, *pairs())
    accelerate(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        fast.clear()
        actual = results(twin, *pairs())
        assert {*fast} <= {*twin.modules()} and len(fast) == 2 * DEPTH
        for key, value in baseline.items():
            torch.testing.assert_close(actual[key], value, msg=key)
    model.set_grad_checkpointing()
    fast.clear()
    for key, value in results(model, *pairs()).items():
        torch.testing.assert_close(value, baseline[key], msg=key)
    assert len(fast) == 4 * DEPTH
    model.set_grad_checkpointing(False)
    plain = restore(copy.deepcopy(model))
    for to in (torch.float16, torch.bfloat16):
        ours, theirs = outputs(model.to(to), *pairs()), outputs(plain.to(to), *pairs())
        for key in theirs:
            assert ours[key].dtype == theirs[key].dtype
            torch.testing.assert_close(ours[key], theirs[key], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["open_clip CLIP", "open_clip CustomTextCLIP", "timm registers"])
def test_autocast(name, fast):
    model = with_our_draw(made(name)).train()
    exact = results(copy.deepcopy(model).double(), *pairs())
    with torch.autocast("cpu", torch.bfloat16):
        baseline = results(model, *pairs())
        accelerate(model)
        actual = results(model, *pairs())
    assert fast
    for key in exact:
        check_close(key, actual[key], exact[key], baseline[key])


def test_gradient_checkpointing_of_hugging_face(fast):
    model = made("ViTForImageClassification").train()
    baseline = results(model, *pairs())
    accelerate(model)
    model.gradient_checkpointing_enable()
    actual = results(model, *pairs())
    assert len(fast) == 2 * DEPTH
    for key, value in baseline.items():
        torch.testing.assert_close(actual[key], value, msg=key)


@pytest.mark.parametrize("name", ["open_clip CLIP", "timm class", "CLIPModel"])
def test_compiles_in_one_graph(name):
    model = made(name).eval()
    expected = outputs(model, *pairs())
    accelerate(model, inference_drop=None)
    ops = []

    def backend(graph, _):
        ops.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    actual = outputs(compiled, *pairs()) if name != "CLIPModel" else {}
    if name == "CLIPModel":  # of which transformers itself reads values of the mask
        images = pairs()[0]
        compiled = torch.compile(model.vision_model.encoder, backend=backend, fullgraph=True)
        compiled(model.vision_model.embeddings(images))
    assert not any("multi_head" in op for op in ops) and any("scaled_dot" in op for op in ops)
    for key in actual:
        torch.testing.assert_close(actual[key], expected[key], msg=key)


def test_under_ddp_and_in_parts(tmp_path):
    """Parts with patches drawn from torch's generator: the same in both passes; also in DDP."""
    model = accelerate(made("open_clip CLIP").train())[0]
    images, ids = pairs(batch=6)

    def loss(out):
        features = out["image_features"], out["text_features"]
        return contrastive_loss(*features, out["logit_scale"])

    parts = list(zip(images.split(2), ids.split(2), strict=True))
    torch.manual_seed(3)
    whole = [model(*part) for part in parts]
    out = {n: torch.cat([w[n] for w in whole]) for n in ("image_features", "text_features")}
    expected = loss(out | {"logit_scale": whole[0]["logit_scale"]})
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for encode in (model, DistributedDataParallel(model)):
            model.zero_grad()
            torch.manual_seed(3)
            got, total = accumulated(encode, parts, loss)
            torch.testing.assert_close(total, expected)
            assert got["image_features"].shape == out["image_features"].shape
            for name, p in model.named_parameters():
                torch.testing.assert_close(p.grad, grads[name], msg=name)
    finally:
        torch.distributed.destroy_process_group()


def test_parts_of_two_encoders_of_which_one_is_frozen():
    left, right = nn.Linear(5, 4), nn.Linear(3, 4).requires_grad_(False)

    def encode(x, y):
        return {"x": left(x), "y": right(y)}

    parts = [(torch.randn(n, 5), torch.randn(n, 3)) for n in (2, 3)]
    _, total = accumulated(encode, parts, lambda out: (out["x"] @ out["y"].T).square().sum())
    got, left.weight.grad = left.weight.grad, None
    x, y = (torch.cat(sides) for sides in zip(*parts, strict=True))
    (left(x) @ right(y).T).square().sum().backward()
    torch.testing.assert_close(got, left.weight.grad)
    assert right.weight.grad is None and total > 0
    with pytest.raises(ValueError, match="parts must hold at least one, got none"):
        accumulated(encode, [], None)
    with pytest.raises(ValueError, match="frozen must name outputs of encode, got z of x, y"):
        accumulated(encode, parts, None, frozen=["z"])
    with pytest.raises(TypeError, match="encode must give a dict of tensors, got Tensor"):
        accumulated(lambda x, y: x, parts, None)


# ---- Dropping ----


def test_patches_are_dropped_in_training_alone_or_where_asked():
    lengths = []
    for options, expected in (
        (dict(), [16, 16]),
        (dict(drop=0.75), [4, 16]),
        (dict(drop=0.5, inference_drop=0.25), [8, 12]),
    ):
        model = hugging_face(transformers.ViTModel)
        _, report = accelerate(model, **options)
        assert ("embeddings" in report.replaced) == bool(options)
        sizes = [model.train(mode)(pairs()[0]).last_hidden_state.shape[1] for mode in (True, False)]
        lengths.append([size - 1 for size in sizes] == expected)
    assert all(lengths)
    model = accelerate(made("open_clip CLIP"), inference_drop=0.75)[0].eval()
    sizes = []
    model.visual.ln_post.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    outputs(model, *pairs())
    outputs(model.train(), *pairs())
    assert sizes == [1 + 4, 1 + 8]


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel", "ViTModel"])
def test_kept_rows_are_those_of_all_tokens(kind):
    model = made(kind).train()
    stem = next(
        m
        for m in model.modules()
        if type(m).__name__.endswith(("VisionEmbeddings", "ViTEmbeddings"))
    )
    images = pairs()[0]
    whole = stem(images)
    accelerate(model, drop=0.5)
    torch.manual_seed(2)
    kept = stem(images)
    prefix = whole.shape[1] - 16
    torch.manual_seed(2)
    expected = PatchDropout(0.5, num_prefix_tokens=prefix)(whole)
    torch.testing.assert_close(kept, expected)
    other = dict(interpolate_pos_encoding=True)
    assert stem(torch.randn(1, 3, 48, 48), **other).shape[1] == prefix + 36  # its own


# ---- Bad input, and unusual but right ----


class Int8(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (lambda: nn.Linear(4, 4), ValueError, "must hold blocks or image stems.*got Linear with"),
        (lambda: "ViT-B-16", TypeError, "must be an nn.Module, got str"),
        (lambda: accelerate(made("timm class"))[0], ValueError, "must not be accelerated yet"),
        (lambda: torch.compile(made("timm class")), TypeError, "compiled afterwards, got compiled"),
        (lambda: torch.jit.script(nn.Linear(4, 4)), TypeError, "must be Python's, got"),
        (lambda: nn.Sequential(timm_model(), Int8()), TypeError, "quantised, got 1.weight in int8"),
    ],
    ids=["unknown", "no module", "twice", "compiled", "scripted", "int8"],
)
def test_bad_models(model, error, words):
    with pytest.raises(error, match=f"^accelerate: model .*{words}"):
        accelerate(model())


def test_bad_sharded(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = fully_shard(made("timm class"), mesh=mesh)
        with pytest.raises(TypeError, match="accelerate: model must be sharded afterwards, got"):
            accelerate(model)
        model = accelerate(made("timm class").eval())[0]
        expected = outputs(model, *pairs())["logits"]
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        torch.testing.assert_close(outputs(model, *pairs())["logits"], expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(drop=1.0), "drop must be in [0, 1), got 1.0"),
        (dict(inference_drop=-0.1), "inference_drop must be in [0, 1), got -0.1"),
        (dict(impl="fast"), "impl must be one of auto, triton, torch, reference, got 'fast'"),
    ],
    ids=["drop", "inference_drop", "impl"],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        accelerate(made("timm class"), **options)


def test_frozen_and_tied_parameters():
    model = with_our_draw(made("open_clip CLIP")).train()
    model.lock_image_tower(unlocked_groups=2)
    first, second = model.transformer.resblocks
    second.mlp.c_fc.weight = first.mlp.c_fc.weight
    second.attn = first.attn
    baseline = results(model, *pairs())
    actual = results(accelerate(model)[0], *pairs())
    assert actual.keys() == baseline.keys() and "visual.conv1.weight" not in actual
    for key, value in baseline.items():
        torch.testing.assert_close(actual[key], value, msg=key)


def test_a_model_without_memory_and_one_of_other_order():
    with torch.device("meta"):
        model = timm_model()
    assert len(accelerate(model)[1].replaced) == 1 + DEPTH
    block = open_clip.transformer.ResidualAttentionBlock(WIDTH, HEADS, batch_first=False)
    x = torch.randn(5, 3, WIDTH)
    expected = block(x)
    assert accelerate(block)[1].replaced.keys() == {""}
    torch.testing.assert_close(block(x), expected)


def test_triton_kernels_compute_the_same(interpreted):
    torch.manual_seed(0)
    model = with_our_draw(open_clip_model(layers=1, text=dict(layers=1))).train()
    baseline = results(model, *pairs(batch=2))
    actual = results(accelerate(model, impl="triton")[0], *pairs(batch=2))
    for key, value in baseline.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-4, msg=key)


# ---- Examples and bytes ----


@pytest.mark.parametrize(
    ("example", "options", "shown"),
    [
        ("timm_fine_tune", "--size 32 --batch 8 --steps 5", "blocks.* (12)"),
        ("hugging_face_clip", "--batch 8 --parts 2 --steps 2", "step 1: loss "),
    ],
    ids=["timm", "hugging face"],
)
def test_examples(example, options, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [example, *options.split()])
    runpy.run_path(str(ROOT / "examples" / f"{example}.py"), run_name="__main__")
    assert shown in capsys.readouterr().out


def test_open_clips_own_training_program(tmp_path):
    pytest.importorskip("pandas")
    pytest.importorskip("webdataset")
    vision = dict(TORCH, head_width=32, patch_size=SIDE, image_size=SIZE)
    sizes = dict(embed_dim=32, vision_cfg=vision, text_cfg=dict(TORCH, heads=HEADS))
    (tmp_path / "small.json").write_text(json.dumps(sizes))
    words = "--model small --force-patch-dropout 0.5 --dataset-type synthetic --epochs 1 "
    words += "--train-num-samples 16 --batch-size 8 --workers 0 --device cpu --warmup 1 "
    program = (
        "import open_clip, runpy, sys; open_clip.add_model_config(sys.argv.pop(1)); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    example = str(ROOT / "examples" / "open_clip_main.py")
    given = ["-c", f"import sys; sys.argv[0] = sys.argv.pop(1); {program}", example]
    done = subprocess.run(
        [sys.executable, *given, str(tmp_path), *words.split(), "--logs", str(tmp_path)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "visual.transformer.resblocks.* (2)" in done.stdout
    assert "Train Epoch: 0 [16/16 (100%)]" in done.stderr + done.stdout


def test_half_of_open_clips_bytes_in_training(interpreted):
    """ViT-B-16's block at 98 of 196 patches, under CUDA's autocast: what a sequence adds."""
    length, width = 99, 256

    def moved(impl, batch):
        torch.manual_seed(0)
        block = open_clip.transformer.ResidualAttentionBlock(width, 4)
        if impl:
            accelerate(block, impl=impl)
        x = torch.randn(batch, length, width).bfloat16().requires_grad_()
        with counted() as count:
            with torch.autocast("cpu", torch.bfloat16), _CudaAutocast():
                out = block(x)
            torch.autograd.grad(out, [x, *block.parameters()], torch.ones_like(out))
        return count.total().unique

    ours, theirs = (moved(impl, 2) - moved(impl, 1) for impl in ("triton", None))
    assert 0.4 < ours / theirs <= 0.5
