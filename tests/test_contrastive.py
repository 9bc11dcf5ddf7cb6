"""The contrastive and sigmoid losses on one process: exactness, memory, operators, errors."""

import doctest
import importlib.util
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from tolerance import check_close, check_op

from clipa_kernels import (
    ClipLoss,
    SigLipLoss,
    contrastive_loss,
    contrastive_loss_reference,
    sigmoid_loss,
    sigmoid_loss_reference,
)
from clipa_kernels.contrastive import ops, plain

LOSSES = {
    "contrastive": (contrastive_loss, contrastive_loss_reference),
    "sigmoid": (sigmoid_loss, sigmoid_loss_reference),
}
both_losses = pytest.mark.parametrize(("loss", "reference"), LOSSES.values(), ids=LOSSES)


@pytest.fixture(autouse=True)
def low_strips(monkeypatch):
    """Strips so low that 400 rows take several: at their real height a few thousand are one."""
    monkeypatch.setattr(plain, "_CPU_STRIP", 1 << 16)


def open_clip_loss():
    """open_clip/loss.py alone: importing all of open_clip takes seconds."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip is not installed")
    path = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def features(n, e, kind="random", seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(n, e, generator=generator), dim=-1)
    text = F.normalize(torch.randn(n, e, generator=generator), dim=-1)
    if kind != "random":
        text = image.clone()
    if kind == "duplicates":
        image[n // 2 :], text[n // 2 :] = image[: n - n // 2].clone(), text[: n - n // 2].clone()
    if kind == "duplicate texts":
        text = text[torch.arange(n) // 3]
    return {"image": image, "text": text}


def leaves(n, e, scale=14.3, bias=-3.0, dtype=torch.float32, kind="random"):
    inputs = features(n, e, kind) | {"scale": torch.tensor(scale), "bias": torch.tensor(bias)}
    return [value.to(dtype).requires_grad_() for value in inputs.values()]


def gradients(function, inputs):
    loss = function(*inputs)
    return loss.detach(), *torch.autograd.grad(loss, inputs, materialize_grads=True)


@pytest.mark.parametrize("kind", ["random", "aligned", "duplicates", "duplicate texts"])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0, 500.0])
@pytest.mark.parametrize("n", [17, 385, 809], ids=["one strip", "strips", "prime"])
@both_losses
def test_exact_in_fp32(loss, reference, n, scale, kind):
    values = leaves(n, 48, scale, kind=kind)
    exact = gradients(reference, [v.detach().double().requires_grad_() for v in values])
    mine, base = gradients(loss, values), gradients(reference, values)
    # fp64's own 1 + x drops what fp32 keeps here: negatives e^-50 below their positive.
    names = ("loss", "image", "text", "scale", "bias")
    unseen = dict.fromkeys(names, torch.finfo(torch.float64).eps * scale)
    # The scalars' gradients sum N^2 terms of both signs: their rounding is that of the terms.
    cosines = (values[0].double() @ values[1].double().T).detach()
    logits = (scale * cosines - 3).requires_grad_()
    value = reference(logits, torch.eye(n, dtype=torch.float64), torch.ones(()))
    (d_logits,) = torch.autograd.grad(value, logits)
    unseen["scale"] += 2 * torch.finfo(torch.float32).eps * (d_logits * cosines).abs().sum()
    unseen["bias"] += 2 * torch.finfo(torch.float32).eps * d_logits.abs().sum()
    for (name, floor), actual, true, rounded in zip(unseen.items(), mine, exact, base, strict=True):
        if (actual.double() - true).abs().max() > floor:
            check_close(name, actual, true, rounded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("n", [1, 31, 400])
@both_losses
def test_16_bit_features(loss, reference, n, dtype):
    scale, bias = torch.tensor(14.3), torch.tensor(-3.0)
    check_op(
        lambda image, text: loss(image, text, scale, bias),
        lambda image, text: reference(image, text, scale.double(), bias.double()).to(
            torch.promote_types(image.dtype, torch.float32)
        ),
        features(n, 40),
        dtype,
    )


@pytest.mark.parametrize("kind", ["random", "aligned"])
def test_bf16_loss_at_scale_100_is_right_to_1e_4(kind):
    pair = [t.bfloat16() for t in features(600, 64, kind).values()]
    pair[0][3] = pair[0][4]
    exact = contrastive_loss_reference(*(t.double() for t in pair), torch.tensor(100.0))
    loss = contrastive_loss(*pair, torch.tensor(100.0))
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) <= 1e-4 * exact.item()


@pytest.mark.parametrize("n", [5, 19], ids=["one strip", "strips"])
@pytest.mark.parametrize("scale", [3.0, 80.0])
@both_losses
def test_gradcheck(loss, reference, n, scale, monkeypatch):
    monkeypatch.setattr(plain, "_CPU_STRIP", 16 * 16)
    values = leaves(n, 3, scale, dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("height", [1, 16, 48, 64])
@both_losses
def test_strips_of_any_height_agree(loss, reference, height, monkeypatch):
    values = leaves(83, 24, 60.0, dtype=torch.float64)
    with torch.no_grad():
        values[0][11:15] *= 40
    whole = gradients(reference, values)
    monkeypatch.setattr(plain, "_CPU_STRIP", height * 83)
    for mine, true in zip(gradients(loss, values), whole, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-11)


def test_a_nearly_sure_pair_keeps_its_digits():
    """log(1 + n/p) with n/p = 1e-17, where 1 + n/p is 1 in fp64."""
    image = torch.eye(2)
    loss = contrastive_loss(image, image, torch.tensor(39.0))
    torch.testing.assert_close(
        loss.item(), torch.exp(torch.tensor(-39.0)).item(), rtol=1e-5, atol=0
    )


@both_losses
def test_two_runs_give_equal_bits(loss, reference):
    values = leaves(500, 32, 50.0)
    first, second = gradients(loss, values), gradients(loss, values)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both_losses
def test_strides_and_shared_tensors(loss, reference):
    image, text, scale, _ = leaves(40, 12)
    spread = [torch.stack([t.detach(), t.detach() + 1], -1)[..., 0] for t in (image, text)]
    assert not spread[0].is_contiguous()
    assert torch.equal(loss(*spread, scale), loss(image, text, scale))
    both = gradients(lambda x, s: loss(x, x, s), [image, scale])
    true = gradients(lambda x, s: reference(x, x, s), [image, scale])
    for mine, other in zip(both, true, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [40, 400], ids=["one strip", "strips"])
@both_losses
def test_scalars_of_any_form(loss, reference, n):
    image, text, scale, bias = leaves(n, 12)
    plain = gradients(loss, [image, text, scale, bias])
    shaped = [image, text, *(v.detach().double()[None].requires_grad_() for v in (scale, bias))]
    for mine, other in zip(gradients(loss, shaped), plain, strict=True):
        torch.testing.assert_close(mine.reshape(other.shape).float(), other)
    without = loss(image, text, scale)
    torch.testing.assert_close(without, loss(image, text, scale, torch.tensor(0.0)))


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@both_losses
def test_scalars_as_numbers(loss, reference, impl):
    """Equal to tensors in every place, gradients too."""
    image, text, scale, bias = leaves(9, 16, scale=10.0, bias=-5.0)
    expected = loss(image, text, scale, bias, impl=impl)
    (slope,) = torch.autograd.grad(expected, image)
    module = ClipLoss() if loss is contrastive_loss else SigLipLoss()
    for scalars in ((10.0, -5.0), (10, bias), (scale, -5), (numpy.float32(10), numpy.float64(-5))):
        for call in (lambda *a: loss(*a, impl=impl), reference, module):
            came = call(image, text, *scalars)
            torch.testing.assert_close(came, expected, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(
                torch.autograd.grad(came, image)[0], slope, rtol=1e-3, atol=1e-6
            )
    half = loss(image.bfloat16(), text.bfloat16(), 10.0, impl="torch")
    assert torch.equal(half, loss(image.bfloat16(), text.bfloat16(), scale.detach(), impl="torch"))


def test_the_bias_moves_nothing_in_a_softmax():
    values = leaves(30, 8, bias=-10.0)
    loss, *_, d_bias = gradients(contrastive_loss, values)
    assert d_bias == 0
    assert torch.equal(loss, contrastive_loss(*values[:3]))


@pytest.mark.parametrize("n", [40, 400], ids=["one strip", "strips"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@both_losses
def test_any_subset_of_gradients(loss, reference, wanted, n):
    values = leaves(n, 12)
    full = gradients(loss, values)[1:]
    for index, value in enumerate(values):
        value.requires_grad_(index in wanted)
    loss(*values).backward()
    for index, value in enumerate(values):
        assert (value.grad is None) == (index not in wanted)
        if value.grad is not None:
            torch.testing.assert_close(value.grad, full[index])


@pytest.mark.parametrize(
    ("loss", "frozen", "forward", "both"),
    [
        ("contrastive", None, 1, 4),
        ("contrastive", "image", 1, 3),
        ("contrastive", "text", 1, 3),
        ("sigmoid", None, 3, 3),
        ("sigmoid", "text", 2, 2),
    ],
)
def test_products_made(loss, frozen, forward, both, monkeypatch):
    """In units of N N E multiplications: four for all gradients, three with a locked tower."""
    n, e, count = 512, 32, [0]
    product = plain._matmul

    def counting(a, b, **into):
        count[0] += a.shape[0] * a.shape[1] * b.shape[1]
        return product(a, b, **into)

    monkeypatch.setattr(plain, "_matmul", counting)
    image, text, scale, _ = leaves(n, e)
    image.requires_grad_(frozen != "image")
    text.requires_grad_(frozen != "text")
    value = LOSSES[loss][0](image, text, scale)
    assert count[0] == forward * n * n * e
    value.backward()
    assert count[0] == both * n * n * e
    count[0] = 0
    with torch.no_grad():
        LOSSES[loss][0](image, text, scale)
    assert count[0] == n * n * e


def peak_bytes(function):
    """Most bytes live at once of what torch's allocator gave during the call."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@both_losses
def test_no_n_by_n_exists(loss, reference, monkeypatch):
    monkeypatch.setattr(plain, "_CPU_STRIP", 384**2)
    n, e = 3072, 32
    image, text, scale, bias = leaves(n, e)
    logits = n * n * 4
    assert peak_bytes(lambda: reference(image, text, scale, bias).backward()) > 2 * logits
    image.grad = text.grad = None
    peak = peak_bytes(lambda: loss(image, text, scale, bias).backward())
    # Both gradients and copies of both features (8 n e floats at most), and a few strips.
    assert peak <= 32 * n * e + 5 * 4 * 384**2 < logits / 4


@both_losses
def test_under_autocast_as_a_product(loss, reference):
    """Features are rounded to bf16 and no further."""
    values = leaves(60, 24, 100.0)
    rounded = [v.detach().bfloat16().float().requires_grad_() for v in values[:2]]
    expected = gradients(loss, [*rounded, *values[2:]])
    with torch.autocast("cpu", torch.bfloat16):
        mine = gradients(loss, values)
        wide = loss(*(v.double() for v in values))
    assert wide.dtype == torch.float64
    torch.testing.assert_close(mine[0], expected[0], rtol=1e-6, atol=0)
    for got, want in zip(mine[1:], expected[1:], strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-4)


def test_one_pair():
    values = leaves(1, 8, bias=-2.0)
    assert all(value.eq(0).all() for value in gradients(contrastive_loss, values))
    for mine, true in zip(
        gradients(sigmoid_loss, values), gradients(sigmoid_loss_reference, values), strict=True
    ):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize(
    ("image_is", "text_is"),
    [(torch.nan, 1.0), (torch.inf, 1.0), (3e38, 1.0), (1e20, 1e20)],
    ids=["nan", "inf", "a row overflows", "a positive overflows"],
)
@pytest.mark.parametrize("n", [9, 400], ids=["one strip", "strips"])
def test_bad_features_are_not_hidden(image_is, text_is, n):
    image, text, scale, _ = leaves(n, 8)
    with torch.no_grad():
        image[3], text[3] = image_is, text_is
    assert contrastive_loss(image, text, scale).isnan()
    if text_is == 1:
        assert not sigmoid_loss(image, text, scale).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_dtypes_on_a_device_without_one(dtype, fake_cuda):
    """Fake CUDA tensors: what the passes give there, and that no value is read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        image, text = (torch.empty(n, 64, device="cuda", dtype=dtype) for n in (2100, 4200))
        scale = torch.empty((), device="cuda")
        pairs = plain.Pairs(2100, 0, 2100)
        rows, cols = plain.softmax_stats(image, text, scale, pairs)
        grads = plain.softmax_grads(image, text, scale, rows, cols, scale, pairs, (True,) * 3)
        sigmoid = plain.sigmoid_pass(image, text, scale, scale, pairs, (True,) * 4)
    assert [t.dtype for t in (rows, cols, *sigmoid)] == [torch.float32] * 7
    assert [g.dtype for g in grads] == [dtype, dtype, torch.float32]


ALL_BUT_AOT = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_operators_pass_opcheck():
    image, text, scale, bias = leaves(20, 8)
    wide = [torch.randn(20, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)]
    pairs = (20, 0, 20)
    rows, cols = ops.contrastive_stats(*wide, scale, *pairs, False)
    checked = {
        ops.contrastive_loss: (image, text, scale, False),
        ops.sigmoid_loss: (*wide, scale, bias, [True, True, False, True], *pairs, False),
        ops.contrastive_stats: (*(t.detach() for t in (*wide, scale)), *pairs, False),
        ops.contrastive_grads: (
            *(t.detach() for t in (*wide, scale, rows, cols)), None, scale.detach(), *pairs,
            [True, True, True], True, False,
        ),
    }  # fmt: skip
    for op, arguments in checked.items():
        torch.library.opcheck(op, arguments, test_utils=ALL_BUT_AOT)
        # It differentiates all outputs, of which gradients made in the forward raise.
        arguments = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
        torch.library.opcheck(op, tuple(arguments), test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("n", [40, 400], ids=["one strip", "strips"])
@both_losses
def test_compiles_in_one_graph(loss, reference, n):
    values = leaves(n, 12)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for mine, other in zip(gradients(compiled, values), gradients(loss, values), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("output_dict", [False, True], ids=["scalar", "dict"])
@pytest.mark.parametrize("bias", [None, -10.0], ids=["no bias", "bias"])
@pytest.mark.parametrize("module", [ClipLoss, SigLipLoss])
def test_modules_equal_open_clips(module, bias, output_dict):
    theirs = getattr(open_clip_loss(), module.__name__)()
    image, text, scale, _ = leaves(48, 16)
    arguments = dict(
        image_features=image,
        text_features=text,
        logit_scale=scale,
        logit_bias=None if bias is None else torch.tensor(bias),
        output_dict=output_dict,
    )
    losses = module()(**arguments), theirs(**arguments)
    if output_dict:
        assert losses[0].keys() == losses[1].keys()
        losses = [loss["contrastive_loss"] for loss in losses]
    grads = [torch.autograd.grad(loss, [image, text, scale]) for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("module", [ClipLoss, SigLipLoss])
def test_methods_for_subclasses_equal_open_clips(module):
    theirs = getattr(open_clip_loss(), module.__name__)(cache_labels=True)
    ours = module(cache_labels=True)
    image, text, scale, bias = leaves(6, 4)
    torch.testing.assert_close(
        ours.get_logits(image, text, scale, bias), theirs.get_logits(image, text, scale, bias)
    )
    shape = (6,) if module is ClipLoss else (torch.float32, 6)
    for _ in range(2):
        torch.testing.assert_close(
            ours.get_ground_truth(image.device, *shape),
            theirs.get_ground_truth(image.device, *shape),
        )


def test_a_subclass_with_its_own_logits_is_heard():
    class Doubled(ClipLoss):
        def get_logits(self, *args, **kwargs):
            return tuple(2 * logits for logits in super().get_logits(*args, **kwargs))

    class DoubledSigmoid(SigLipLoss):
        def get_logits(self, *args, **kwargs):
            return 2 * super().get_logits(*args, **kwargs)

    class Mirrored(ClipLoss):
        def get_ground_truth(self, device, num_logits):
            return super().get_ground_truth(device, num_logits).flip(0)

    image, text, scale, bias = leaves(12, 8)
    torch.testing.assert_close(
        Doubled()(image, text, scale), contrastive_loss(image, text, 2 * scale)
    )
    torch.testing.assert_close(
        DoubledSigmoid()(image, text, scale, bias), sigmoid_loss(image, text, 2 * scale, 2 * bias)
    )
    torch.testing.assert_close(
        Mirrored()(image, text, scale), contrastive_loss(image, text.flip(0), scale)
    )


@pytest.mark.parametrize("negative_only", [False, True])
def test_the_loss_of_some_texts(negative_only):
    theirs = open_clip_loss().SigLipLoss()
    values = leaves(12, 8)
    came = SigLipLoss()._loss(*values, negative_only=negative_only)
    torch.testing.assert_close(came, theirs._loss(*values, negative_only=negative_only))
    if not negative_only:
        torch.testing.assert_close(came, SigLipLoss()(*values))


def bad(image=(4, 8), text=(4, 8), scale=(), bias=None, dtype=torch.float32, scale_dtype=None):
    made = [torch.ones(image), torch.ones(text, dtype=dtype), torch.ones(scale, dtype=scale_dtype)]
    return [*made, None if bias is None else torch.ones(bias)]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (bad(image=(4,), text=(4,)), ValueError, r"must both be \[M, E\], got 4 float32"),
        (bad(text=(5, 8)), ValueError, "must both be .* got 4x8 float32 on cpu and 5x8"),
        (bad(text=(4, 9)), ValueError, "got 4x8 float32 on cpu and 4x9"),
        (bad((0, 8), (0, 8)), ValueError, "at least one pair .* got 0x8"),
        (bad((4, 0), (4, 0)), ValueError, "at least one pair .* got 4x0"),
        (
            bad(dtype=torch.bfloat16),
            TypeError,
            "must have one dtype, got image torch.float32, text",
        ),
        (bad(dtype=torch.int64), TypeError, "text must be floating point, got 4x8 int64"),
        (bad(scale_dtype=torch.int64), TypeError, "logit_scale must be floating point"),
        (bad(scale=(2,)), ValueError, r"logit_scale must be \[\] or \[1\], got 2 float32"),
        (bad(bias=(4,)), ValueError, r"logit_bias must be \[\] or \[1\], got 4 float32"),
        ([*bad()[:2], "14.3"], TypeError, "logit_scale must be a number, got '14.3'"),
        ([*bad()[:2], True], TypeError, "logit_scale must be a number, got True"),
        ([*bad()[:2], 1j], TypeError, "logit_scale must be a number, got 1j"),
        ([*bad()[:2], [1.0]], TypeError, r"logit_scale must be a number, got \[1.0\]"),
        ([*bad()[:2], None], TypeError, "logit_scale must be a number, got None"),
        ([*bad()[:2], float("nan")], ValueError, "logit_scale must be finite, got nan"),
        ([*bad()[:3], float("-inf")], ValueError, "logit_bias must be finite, got -inf"),
        (bad(scale_dtype=torch.complex64), TypeError, "logit_scale must be floating point"),
        ([None, *bad()[1:]], TypeError, "image must be a tensor, got NoneType"),
        ([bad()[0].to("meta"), *bad()[1:]], ValueError, "on one device, got image on meta"),
        ([*bad()[:2], torch.ones((), device="meta")], ValueError, "logit_scale on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@both_losses
def test_bad_arguments(loss, reference, arguments, error, says):
    with pytest.raises(error, match=f"{loss.__name__}: .*{says}"):
        loss(*arguments)


@both_losses
def test_unknown_names(loss, reference):
    with pytest.raises(ValueError, match=f"{loss.__name__}: impl must be one of auto, triton"):
        loss(*bad(), impl="cuda")
    assert loss(*bad(), impl="reference").dtype == torch.float32
    with pytest.raises(ValueError, match="use_horovod must be False"):
        ClipLoss(use_horovod=True)
    for module in (ClipLoss, SigLipLoss):
        for options in (
            dict(rank="0"),
            dict(world_size=None),
            dict(cache_labels=[]),
            dict(rank=-1),
        ):
            with pytest.raises((TypeError, ValueError), match=f"{module.__name__}: .* must .* got"):
                module(**options)
    with pytest.raises(ValueError, match="dist_impl must be one of .*, got 'ring'"):
        SigLipLoss(dist_impl="ring")


@pytest.mark.parametrize("module", [ClipLoss, SigLipLoss])
def test_a_world_without_a_group(module):
    with pytest.raises(
        RuntimeError, match=f"{module.__name__}: world_size 2 needs a process group"
    ):
        module(world_size=2)(*bad()[:3])


def test_examples():
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    module = importlib.import_module("clipa_kernels.contrastive.api")
    for test in finder.find(module, extraglobs={"torch": torch}):
        runner.run(test)
    assert runner.summarize() == (0, 6)
