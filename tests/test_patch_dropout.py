"""PatchDropout is open_clip's and timm's module: arguments, attributes, models, random state."""

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from device import DEVICE
from torch.utils.checkpoint import checkpoint

import clipa_kernels
from clipa_kernels import PatchDropout, PatchDropoutWithIndices, keep_count, random_patches

X = torch.randn(8, 30, 2).to(DEVICE)


@pytest.mark.parametrize(
    ("module", "prefix"),
    [
        (PatchDropout(0.6), 1),
        (PatchDropout(0.6, False), 0),
        (PatchDropout(0.6, exclude_first_token=True), 1),
        (PatchDropout(0.6, 3), 3),
        (PatchDropout(0.6, 3, True), 3),
        (PatchDropout(0.6, True, 2), 2),
        (PatchDropout(prob=0.6, num_prefix_tokens=2, ordered=True), 2),
        (PatchDropout(np.float32(0.6), np.int16(2), seed=np.uint64(2**64 - 1)), 2),
        (PatchDropout(np.float64(0.6), np.bool_(True)), 1),
    ],
    ids=[
        "default",
        "open_clip",
        "named",
        "timm",
        "timm-whole",
        "third",
        "timm-named",
        "numpy",
        "np-bool",
    ],
)
def test_prefix_stays_and_the_rest_is_a_subset(module, prefix):
    x = torch.arange(20.0).view(1, 20, 1).repeat(4, 1, 3).requires_grad_()
    y = module(x)
    kept = keep_count(20 - prefix, 0.6)
    assert y.shape == (4, prefix + kept, 3)
    assert torch.equal(y[:, :prefix], x[:, :prefix])
    rows = y[:, prefix:, 0]
    assert (rows.diff(dim=1) > 0).all() and (rows >= prefix).all()
    y.sum().backward()
    assert x.grad.sum() == y.numel() and x.grad.max() == 1


@pytest.mark.parametrize("shape", [(4, 9), (4, 9, 2, 3), (0, 9, 2)], ids=str)
def test_tokens_of_any_shape(shape):
    x = torch.arange(float(np.prod(shape))).view(shape)
    y, keep = PatchDropoutWithIndices(0.5)(x)
    rows = torch.cat((torch.zeros_like(keep[:, :1]), keep + 1), 1)
    assert torch.equal(y, x[torch.arange(shape[0])[:, None], rows])


def test_every_patch_and_pair_stays_equally_often():
    torch.manual_seed(0)
    _, keep = PatchDropoutWithIndices(0.75, num_prefix_tokens=0)(torch.zeros(20_000, 16, 1))
    chosen = torch.zeros(20_000, 16).scatter_(1, keep, 1)
    assert (chosen.mean(0) - 0.25).abs().max() < 4 * (0.25 * 0.75 / 20_000) ** 0.5
    pairs = (chosen.T @ chosen / 20_000)[~torch.eye(16, dtype=torch.bool)]
    assert (pairs - 4 * 3 / (16 * 15)).abs().max() < 5 * (0.05 * 0.95 / 20_000) ** 0.5


def test_indices_come_with_the_tokens():
    drop = PatchDropoutWithIndices(0.5, num_prefix_tokens=2)
    y, keep = drop(X)
    assert torch.equal(y[:, 2:], X[:, 2:].gather(1, keep[..., None].expand(-1, -1, 2)))
    assert torch.equal(y[:, :2], X[:, :2]) and keep.dtype == torch.int64
    assert drop.eval()(X) == (X, None) and PatchDropoutWithIndices(0.0)(X) == (X, None)


# The random state


@pytest.mark.parametrize("seed", [None, 3], ids=["no seed", "seed"])
def test_the_random_state_decides(seed):
    drop = PatchDropout(0.5, seed=seed)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = drop(X), drop(X)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(drop(X), first) and torch.equal(PatchDropout(0.5, seed=seed)(X), second)
    torch.manual_seed(2)
    assert not torch.equal(drop(X), first)


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1, -1, -(2**63)])
def test_seed_and_step_name_the_masks_of_random_patches(seed):
    drop, before = PatchDropoutWithIndices(0.5, seed=seed), torch.get_rng_state()
    for step in (0, 7, 2**32 - 1):
        expected = random_patches(8, (1, 29), 0.5, seed=seed % 2**64, step=step)
        for given in (step, np.int64(step), torch.tensor(step)):
            assert torch.equal(drop(X, given)[1], expected)
    assert torch.equal(drop(X, torch.tensor(7, dtype=torch.int32))[1], drop(X, 7)[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("how", ["seed", "step", "default"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved"])
def test_activation_checkpointing_gives_the_plain_gradients(how, reentrant):
    step = (5,) if how == "step" else ()
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        layer, drop = torch.nn.Linear(8, 8), PatchDropout(0.5, seed=None if how == "default" else 1)
        x = torch.randn(2, 17, 8, requires_grad=True)
        loss = 0
        for _ in range(2):  # both masks are drawn before the first is made again

            def run(t, layer=layer, drop=drop):
                return layer(drop(t, *step)).pow(2).sum()

            loss += checkpoint(run, x, use_reentrant=reentrant) if recompute else run(x)
        loss.backward()
        grads.append((layer.weight.grad, x.grad))
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain)


CALLS = {
    "default": (None, lambda i: ()),
    "seed": (3, lambda i: ()),
    "number": (3, lambda i: (i,)),
    "tensor": (2**64 - 1, lambda i: (torch.tensor(i),)),
}


@pytest.mark.parametrize(("seed", "step"), CALLS.values(), ids=CALLS)
def test_compiles_once_in_one_graph_for_all_steps(seed, step):
    drop = PatchDropoutWithIndices(0.5, seed=seed)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(drop, backend=counter, fullgraph=True)
    seen = set()
    for i in range(10):
        results = []
        for call in (compiled, drop):
            torch.manual_seed(i)
            results.append(call(X, *step(i)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        seen.add(str(results[0][1].tolist()))
    assert len(seen) == 10 and counter.frame_count <= 2


def test_compiled_checkpointing_gives_the_plain_gradients():
    layer, drop = torch.nn.Linear(2, 2), PatchDropout(0.5)
    grads = []

    def run(x):
        return checkpoint(lambda t: layer(drop(t)).sin(), x, use_reentrant=False).sum()

    for call in (torch.compile(run, backend="aot_eager", fullgraph=True), run):
        x = X.clone().requires_grad_()
        torch.manual_seed(0)
        call(x).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


# In place of the others' modules


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("open_clip.transformer", "PatchDropout"),
        ("timm.layers", "PatchDropout"),
        ("timm.layers", "PatchDropoutWithIndices"),
    ],
)
@pytest.mark.parametrize("args", [(), (0.3, False), (0.3, True), (0.3, 1, True)], ids=str)
def test_attributes_and_state_are_theirs(module, name, args):
    if module.startswith("open_clip"):
        args = args[:2]
    theirs = getattr(pytest.importorskip(module), name)(*args)
    ours = getattr(clipa_kernels, name)(*args)
    for name in ("prob", "exclude_first_token", "num_prefix_tokens", "ordered"):
        if hasattr(theirs, name):
            assert getattr(ours, name) == getattr(theirs, name)
    assert ours.load_state_dict(theirs.state_dict(), strict=True)
    assert not ours.state_dict() and not list(ours.parameters())


def test_attributes_hold_from_the_next_call_on():
    drop = PatchDropout(0.5)
    drop.exclude_first_token, drop.prob = False, 0.9
    assert drop.num_prefix_tokens == 0 and drop(X).shape[1] == keep_count(30, 0.9)
    drop.num_prefix_tokens = 4
    assert drop.exclude_first_token and torch.equal(drop(X)[:, :4], X[:, :4])
    drop.seed = np.int64(-3)
    assert torch.equal(drop(X, 1), PatchDropout(0.9, 4, seed=-3)(X, 1))


@pytest.mark.parametrize("module", [PatchDropout, PatchDropoutWithIndices])
@pytest.mark.parametrize("seed", [None, 2**64 - 1], ids=["no seed", "seed"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_torchscript(module, seed):
    plain = module(0.5, 2, seed=seed)
    scripted = torch.jit.script(plain)
    outs = []
    for call in (plain, scripted):
        torch.manual_seed(0)
        outs.append(call(X))
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in outs), strict=True):
        assert torch.equal(a, b)
    out = scripted.eval()(X)
    assert torch.equal(out[0] if isinstance(out, tuple) else out, X)


def swapped(name, **arguments):
    """A small model of timm's that drops patches, and the same weights with our module in it."""
    torch.manual_seed(0)
    create = pytest.importorskip("timm").create_model
    models = [create(name, num_classes=3, **arguments) for _ in range(2)]
    kind = getattr(clipa_kernels, type(models[0].patch_drop).__name__)
    theirs = models[1].patch_drop
    models[1].patch_drop = kind(theirs.prob, theirs.num_prefix_tokens, ordered=theirs.ordered)
    models[1].load_state_dict(models[0].state_dict(), strict=True)
    return models


SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, patch_drop_rate=0.5)
NAFLEX = {key: value for key, value in SMALL.items() if key != "img_size"}
MODELS = {
    "vit": ("vit_tiny_patch16_224", SMALL),
    "registers": ("vit_tiny_patch16_224", SMALL | dict(reg_tokens=2)),
    "eva": ("eva02_tiny_patch14_224", SMALL | dict(use_rot_pos_emb=True)),
    "naflex": ("naflexvit_base_patch16_gap", NAFLEX),
    "naflex-rope": (
        "naflexvit_base_patch16_gap",
        NAFLEX | dict(rope_type="axial", pos_embed="none"),
    ),
}


@pytest.mark.parametrize(("name", "arguments"), MODELS.values(), ids=MODELS)
def test_timms_models_take_it(name, arguments):
    """Training sees as many tokens, gradients flow; evaluation is the same to the bit."""
    theirs, ours = swapped(name, **arguments)
    images, seen = torch.randn(2, 3, 32, 32), []
    for model in (theirs, ours):
        model.blocks[0].register_forward_hook(lambda m, i, o: seen.append(o.shape))
        model.train()(images).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert seen[0] == seen[1]
    assert torch.equal(theirs.eval()(images), ours.eval()(images))


def test_open_clips_model_takes_it():
    sizes = dict(image_size=32, patch_size=8, width=32, layers=1, heads=2, mlp_ratio=2.0)
    torch.manual_seed(0)
    transformer = pytest.importorskip("open_clip.transformer")
    theirs = transformer.VisionTransformer(**sizes, output_dim=8, patch_dropout=0.5)
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    images = torch.randn(2, 3, 32, 32)
    expected = theirs.eval()(images)
    theirs.patch_dropout = PatchDropout(
        theirs.patch_dropout.prob, theirs.patch_dropout.exclude_first_token
    )
    theirs.load_state_dict(state, strict=True)
    assert torch.equal(theirs.eval()(images), expected)
    seen = []
    theirs.transformer.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    theirs.train()(images).sum().backward()
    assert seen == [(2, 1 + 8, 32)] and torch.isfinite(theirs.conv1.weight.grad).all()


BAD = {
    "one": (lambda: PatchDropout(1.0), ValueError, r"prob must be in \[0, 1\), got 1.0"),
    "nan": (lambda: PatchDropout(float("nan")), ValueError, r"prob must be in \[0, 1\), got nan"),
    "bool": (lambda: PatchDropout(False), TypeError, "prob must be a number, got False"),
    "text": (lambda: PatchDropout("half"), TypeError, "prob must be a number, got 'half'"),
    "prefix": (lambda: PatchDropout(0.5, 1.5), TypeError, "exclude_first_token must be an integer"),
    "below": (
        lambda: PatchDropout(0.5, -1),
        ValueError,
        "exclude_first_token must be in .*, got -1",
    ),
    "named": (
        lambda: PatchDropout(0.5, num_prefix_tokens=True),
        TypeError,
        "num_prefix_tokens must be an integer, got True",
    ),
    "ordered": (
        lambda: PatchDropout(0.5, ordered="no"),
        TypeError,
        "ordered must be True or False",
    ),
    "seed": (lambda: PatchDropout(0.5, seed=1.0), TypeError, "seed must be an integer, got 1.0"),
    "seed bool": (lambda: PatchDropout(0.5, seed=True), TypeError, "seed must be an integer"),
    "large seed": (lambda: PatchDropout(0.5, seed=2**64), ValueError, "seed must be in"),
    "list": (lambda: PatchDropout()([1.0]), TypeError, "x must be a tensor, got list"),
    "one dimension": (lambda: PatchDropout()(torch.zeros(3)), ValueError, r"1 prefix \+ L"),
    "no patch": (lambda: PatchDropout()(torch.zeros(2, 1, 4)), ValueError, "got 2x1x4 float32"),
    "no seed": (
        lambda: PatchDropout()(X, 3),
        ValueError,
        "step must come with a seed, got seed None",
    ),
    "step": (lambda: PatchDropout(seed=1)(X, 0.5), TypeError, "step must be an integer, got 0.5"),
    "large step": (lambda: PatchDropout(seed=1)(X, 2**32), ValueError, "step must be in"),
    "steps": (lambda: PatchDropout(seed=1)(X, torch.arange(2)), TypeError, "scalar on cpu, got 2 "),
    "float step": (
        lambda: PatchDropout(seed=1)(X, torch.tensor(1.0)),
        TypeError,
        "got scalar float",
    ),
    "low step": (lambda: PatchDropout(seed=1)(X.cpu(), torch.tensor(-1)), ValueError, "got -1"),
}


@pytest.mark.parametrize(("call", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=f"^PatchDropout: .*{words}"):
        call()
