"""Decay scope, schedule, clipping and the clamp, against open_clip's rules where it has them."""

import copy
import json
import math

import pytest
import torch
from configs import changed
from torch import nn

from models import DIALECTS
from training.config import Config, Stage
from training.optim import (
    ShortMomentAdamW,
    SpikeGuard,
    adamw,
    clamp_scale_,
    clip_gradients,
    is_decayed,
    learning_rate,
    parameter_groups,
    set_learning_rate,
    unwrap,
)

SHAPES = {
    "positional_embedding": (4, 8),
    "text_projection": (8, 8),
    "logit_scale": (),
    "logit_bias": (1, 1),
    "visual.class_embedding": (8,),
    "visual.positional_embedding": (5, 8),
    "visual.proj": (8, 8),
    "visual.conv1.weight": (8, 3, 4, 4),
    "visual.ln_pre.weight": (8,),
    "visual.transformer.resblocks.0.ln_1.weight": (8,),
    "visual.transformer.resblocks.0.attn.in_proj_weight": (24, 8),
    "visual.transformer.resblocks.0.attn.in_proj_bias": (24,),
    "visual.transformer.resblocks.0.attn.out_proj.weight": (8, 8),
    "transformer.resblocks.0.mlp.c_fc.weight": (32, 8),
    "transformer.resblocks.0.mlp.c_fc.bias": (32,),
    "token_embedding.weight": (16, 8),
    "ln_final.bias": (8,),
}
KERNELS = {
    "text_projection",
    "visual.proj",
    "visual.conv1.weight",
    "visual.transformer.resblocks.0.attn.in_proj_weight",
    "visual.transformer.resblocks.0.attn.out_proj.weight",
    "transformer.resblocks.0.mlp.c_fc.weight",
}
TABLES = {"positional_embedding", "visual.positional_embedding", "token_embedding.weight"}


def config_of(dialect: str = "open_clip", **optim: float | str) -> Config:
    optim = {f"optim__{name}": value for name, value in optim.items()}
    return changed(Config(), model__dialect=dialect, **optim)


def build(shapes: dict[str, tuple] = SHAPES) -> nn.Module:
    """A module whose parameters have open_clip's names."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        at = root
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.register_parameter(leaf, nn.Parameter(torch.ones(shape)))
    return root


@pytest.mark.parametrize(
    ("dialect", "decayed"),
    [("openai", KERNELS | TABLES), ("clipa-v1", KERNELS | TABLES), ("clipa-v2", KERNELS)],
)
def test_decay_scope(dialect, decayed):
    model = build()
    names = {name for name, p in model.named_parameters() if is_decayed(name, p, DIALECTS[dialect])}
    assert names == decayed
    with_decay, without = parameter_groups(model, config_of(dialect, weight_decay=0.3))
    assert len(with_decay["params"]) == len(decayed) and with_decay["weight_decay"] == 0.3
    assert len(without["params"]) == len(SHAPES) - len(decayed) and without["weight_decay"] == 0


def test_decay_scope_is_the_same_under_wrappers():
    outer = nn.Module()
    outer.add_module("module", build())
    names = {
        name for name, p in outer.named_parameters() if is_decayed(name, p, DIALECTS["openai"])
    }
    assert names == {f"module.{name}" for name in KERNELS | TABLES}


@pytest.mark.parametrize(
    ("config", "eps"),
    [
        (config_of("openai"), 1e-6),
        (config_of("clipa-v1"), 1e-6),
        (config_of("clipa-v2"), 1e-8),
        (config_of("clipa-v2", adam_eps=1e-4), 1e-4),
    ],
    ids=["openai", "v1", "v2", "given"],
)
def test_adamw_follows_the_dialect(config, eps):
    optimizer = adamw(build(), config)
    assert optimizer.defaults["eps"] == eps
    assert optimizer.defaults["betas"] == (config.optim.beta1, config.optim.beta2)
    assert optimizer.defaults["fused"]


def test_adamw_decays_only_its_scope():
    model = build()
    optimizer = adamw(model, config_of("clipa-v2", weight_decay=0.5))
    set_learning_rate(optimizer, 0, Stage(lr=0.1, warmup=0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        want = 1 - 0.1 * 0.5 if name in KERNELS else 1.0
        torch.testing.assert_close(parameter, torch.full_like(parameter, want))


def test_adamw_leaves_frozen_parameters_out_and_needs_one():
    model = build()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="must have a parameter that requires a gradient"):
        adamw(model, Config())
    model.logit_scale.requires_grad_(True)
    assert sum(len(group["params"]) for group in adamw(model, Config()).param_groups) == 1


@pytest.mark.parametrize("warmup", [0, 7, 40])
def test_learning_rate_is_open_clips(warmup):
    cosine_lr = pytest.importorskip("open_clip_train.scheduler").cosine_lr
    stage = Stage(lr=0.3, warmup=warmup, steps=40)
    theirs = cosine_lr(torch.optim.SGD([torch.ones(1)]), 0.3, warmup, 40)
    for step in range(40):
        assert learning_rate(step, stage) == pytest.approx(theirs(step), abs=1e-12)


@pytest.mark.parametrize(("warmup", "cooldown"), [(0, 0), (7, 0), (7, 10), (0, 40), (10, 30)])
def test_constant_learning_rate_is_open_clips(warmup, cooldown):
    scheduler = pytest.importorskip("open_clip_train.scheduler")
    stage = Stage(lr=0.3, warmup=warmup, steps=40, cooldown=cooldown)
    optimizer = torch.optim.SGD([torch.ones(1)])
    if cooldown:
        theirs = scheduler.const_lr_cooldown(optimizer, 0.3, warmup, 40, cooldown)
    else:
        theirs = scheduler.const_lr(optimizer, 0.3, warmup, 40)
    for step in range(40):
        assert learning_rate(step, stage) == pytest.approx(theirs(step), abs=1e-12)
    assert learning_rate(40, stage) == (0.0 if cooldown else 0.3)


def test_one_constant_run_serves_every_budget():
    """A run that is cut and cooled down shares its steps with the longer one."""
    long, short = (Stage(lr=1.0, warmup=5, steps=n, cooldown=10) for n in (100, 50))
    same = [learning_rate(s, long) == learning_rate(s, short) for s in range(50)]
    assert all(same[:41]) and not any(same[41:])


def test_learning_rate_ends_at_zero_and_stays():
    stage = Stage(lr=1.0, warmup=2, steps=10)
    assert learning_rate(10, stage) == learning_rate(11, stage) == 0
    assert learning_rate(9, stage) > 0
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        learning_rate(-1, stage)


def test_set_learning_rate_reaches_every_group():
    stage = Stage(lr=1.0, warmup=2, steps=10)
    optimizer = adamw(build(), Config())
    assert set_learning_rate(optimizer, 0, stage) == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 100.0])
def test_clip_gradients(max_norm):
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4, 2))]
    parameters.append(nn.Parameter(torch.zeros(1)))  # has no gradient
    for parameter in parameters[:2]:
        parameter.grad = torch.full_like(parameter, 2.0)
    before = math.sqrt(11 * 4)
    norm = clip_gradients(parameters, max_norm)
    assert norm.item() == pytest.approx(before)
    after = torch.cat([p.grad.flatten() for p in parameters[:2]]).norm().item()
    assert after == pytest.approx(1.0 if max_norm == 1.0 else before, rel=1e-5)


def test_clip_gradients_of_nothing_and_below_zero():
    assert clip_gradients([nn.Parameter(torch.zeros(3))], 1.0) == 0
    with pytest.raises(ValueError, match="max_norm must be at least 0, got -1"):
        clip_gradients([], -1.0)


@pytest.mark.parametrize(
    ("config", "bound"),
    [
        (config_of("openai"), 100),
        (config_of("clipa-v1"), 100),
        (config_of("clipa-v2"), None),
        (config_of("clipa-v2", max_scale=50.0), 50),
        (config_of("openai", max_scale=0.0), None),
    ],
    ids=["openai", "v1", "v2", "v2-given", "off"],
)
@pytest.mark.parametrize("start", [-1.0, 2.0, 6.0])
def test_clamp_scale(config, bound, start):
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.tensor(start))
    clamp_scale_(model, config)
    want = start if bound is None else min(max(start, 0.0), math.log(bound))
    assert model.logit_scale.item() == pytest.approx(want)


def test_unwrap_compiled_model():
    model = nn.Linear(2, 2)
    assert unwrap(torch.compile(model)) is model
    assert unwrap(model) is model


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, ShortMomentAdamW])
def test_a_step_beyond_the_median_changes_nothing(kind, fused):
    weight = nn.Parameter(torch.ones(4))
    optimizer = kind([weight], lr=0.1, fused=fused)
    guard = SpikeGuard(optimizer, 3.0)
    harmful = {5: 100.0, 40: 100.0, 50: math.nan, 60: math.inf, 70: 2.9}
    for step in range(80):
        weight.grad = torch.full((4,), harmful.get(step, 1.0))
        before = [weight.clone(), *(v.clone() for v in optimizer.state[weight].values())]
        guard.step(weight.grad.norm())
        after = [weight, *optimizer.state[weight].values()]
        skipped = step in (40, 50, 60)  # the first 32 only tell what is usual
        assert bool(guard.spike) == skipped
        assert all(map(torch.equal, before, after)) == skipped
    assert guard.state()["skipped"] == 3 and optimizer.state[weight]["step"] == 77
    again = SpikeGuard(optimizer, 3.0, guard.state())
    weight.grad = torch.full((4,), 50.0)
    again.step(weight.grad.norm())
    assert bool(again.spike) and again.state()["skipped"] == 4


def in_bf16(weight, gradients, lr, decay, beta1=0.9, beta2=0.95, eps=1e-6):
    """Loshchilov & Hutter's step in fp64; the first moment is rounded to bf16 between steps."""
    weight, second = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    rested = torch.zeros_like(weight, dtype=torch.bfloat16)
    for step, gradient in enumerate(gradients, 1):
        gradient = gradient.double()
        first = beta1 * rested.double() + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        root = (second / (1 - beta2**step)).sqrt() + eps
        weight = weight * (1 - lr * decay) - lr * first / (1 - beta1**step) / root
        rested = first.bfloat16()
    return weight, rested


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("at_once", [1, 50, 2**25])
def test_a_short_moment_is_rounded_between_steps_alone(fused, at_once, monkeypatch):
    monkeypatch.setattr(ShortMomentAdamW, "AT_ONCE", at_once)
    draw = torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((5, 7), (40,), ())]
    firsts = [weight.detach().clone() for weight in weights]
    idle = nn.Parameter(torch.ones(3))
    how = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, fused=fused)
    optimizer = ShortMomentAdamW([*weights, idle], **how)
    gradients = [[torch.randn(w.shape, generator=draw) for w in weights] for _ in range(20)]
    for each in gradients:
        for weight, gradient in zip(weights, each, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    for place, (weight, first) in enumerate(zip(weights, firsts, strict=True)):
        want, rested = in_bf16(first, [each[place] for each in gradients], 0.01, 0.1)
        torch.testing.assert_close(weight.double(), want, rtol=1e-4, atol=1e-5)
        state = optimizer.state[weight]
        assert state["exp_avg"].dtype == torch.bfloat16 and state["step"] == 20
        torch.testing.assert_close(state["exp_avg"], rested, rtol=1e-2, atol=1e-4)
    assert idle not in optimizer.state and idle.tolist() == [1, 1, 1]


def test_a_short_moment_is_saved_and_read():
    """The states of AdamW are read too, and rounded."""
    model, config = build(), config_of(moment="bf16")
    gradients = {name: torch.randn(p.shape) for name, p in model.named_parameters()}

    def step(model, optimizer):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        optimizer.step()

    optimizer = adamw(model, config)
    assert isinstance(optimizer, ShortMomentAdamW) and optimizer.defaults["fused"]
    step(model, optimizer)
    again = build()
    again.load_state_dict(model.state_dict())
    other = adamw(again, config)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (model, optimizer), (again, other):
        step(*each)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    theirs = build()
    plain = adamw(theirs, config_of())
    step(theirs, plain)
    other.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert {state["exp_avg"].dtype for state in other.state.values()} == {torch.bfloat16}
    assert {state["exp_avg_sq"].dtype for state in other.state.values()} == {torch.float32}


def test_a_guard_goes_on_from_its_state():
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    norms = torch.rand(300, generator=torch.manual_seed(0)) ** -1.5
    for cut in (0, 20, 128, 200):
        whole, part = SpikeGuard(optimizer, 2.0), SpikeGuard(optimizer, 2.0)
        found = []
        for step, norm in enumerate(norms):
            if step == cut:
                part = SpikeGuard(optimizer, 2.0, json.loads(json.dumps(part.state())))
            weight.grad = torch.ones(4)
            whole.step(norm)
            part.step(norm)
            found.append(bool(whole.spike))
            assert bool(part.spike) == found[-1]
        assert 10 < sum(found) == whole.state()["skipped"] == part.state()["skipped"]
