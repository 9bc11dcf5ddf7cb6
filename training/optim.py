"""AdamW with the dialect's decay scope, the learning rate of a step, and what happens around one.

learning_rate(s) = lr * (s + 1) / warmup                                      s < warmup
                 = lr * (1 + cos(pi * (s - warmup) / (steps - warmup))) / 2   after; or, if the
                 = lr * min(1, (steps - s) / cooldown)                        stage has a cooldown
"""

import math
from collections.abc import Iterable
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw as torch_adamw

from clipa_kernels.adapters.accumulate import unwrap
from models import Dialect

from .config import Config, Stage
from .shard import local, placed, whole


def is_decayed(name: str, parameter: Tensor, dialect: Dialect) -> bool:
    """Whether the dialect decays this parameter.

    Every tensor of two or more dimensions that is not a norm, bias or logit scale; the token and
    position tables only where the dialect decays embeddings ("openai", "open_clip", "clipa-v1").

    Source: open_clip and clipa_torch training/main.py; clipa_jax decays `*/kernel`.
    """
    if parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale")):
        return False
    return dialect.decays_embeddings or "embedding" not in name


def parameter_groups(model: nn.Module, config: Config) -> list[dict]:
    """Two groups for an optimiser, decayed and not; frozen parameters are in neither."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if is_decayed(name, parameter, config.dialect) else plain).append(parameter)
    return [
        {"params": decayed, "weight_decay": config.optim.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW over a model's parameters, fused into one kernel a group where the device has one.

    Args:
        model: on its device already.
        config: its optim and dialect are read.

    Returns:
        The optimiser; its learning rate is set each step from `learning_rate`.

    Raises:
        ValueError: no parameter of the model requires a gradient.
    """
    groups = parameter_groups(model, config)
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not parameters:
        raise ValueError(
            "adamw: the model must have a parameter that requires a gradient, got none"
        )
    optim = config.optim
    eps = config.dialect.adam_eps if optim.adam_eps is None else optim.adam_eps
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    split = [_alike(group) for group in groups]
    kind = ShortMomentAdamW if optim.moment == "bf16" else torch.optim.AdamW
    made = kind(list(chain(*split)), betas=(optim.beta1, optim.beta2), eps=eps, fused=fused)
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        made.register_state_dict_post_hook(partial(_whole_state, groups, split))
        made.register_load_state_dict_pre_hook(partial(_placed_state, groups, split))
    return made


class ShortMomentAdamW(torch.optim.AdamW):
    """AdamW whose first moment rests in bf16: 10 bytes of states and gradients a weight, not 12.

    A step is torch's own, of fp32: it takes beta1 times the rounded moment plus (1 - beta1) times
    the gradient, and the sum is rounded when the weights have moved.

    Source: `mu_dtype` of optax's `scale_by_adam`, which CLIPA-v2 sets to bfloat16.
    """

    AT_ONCE = 2**25  # weights whose moments lie in fp32 meanwhile

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            some, size = [], 0
            for parameter in (one for one in group["params"] if one.grad is not None):
                if some and size + local(parameter).numel() > self.AT_ONCE:
                    self._update(some, group)
                    some, size = [], 0
                some.append(parameter)
                size += local(parameter).numel()
            if some:
                self._update(some, group)

    def _update(self, parameters: list[Tensor], group: dict) -> None:
        states = [self._state_of(parameter, group["fused"]) for parameter in parameters]
        moments = [state["exp_avg"] for state in states]
        wide = [moment.float() for moment in moments]
        torch_adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            wide,
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        torch._foreach_copy_([local(one) for one in moments], [local(one) for one in wide])

    def _state_of(self, parameter: Tensor, fused: bool) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device if fused else "cpu")
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """As AdamW's, of one's own states or of AdamW's."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["exp_avg"] = state["exp_avg"].bfloat16()


def _alike(group: dict) -> list[dict]:
    """A group as those that a kernel takes: tensors in parts do not mix with others."""
    kinds: dict[bool, list[Tensor]] = {}
    for parameter in group["params"]:
        kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    return [group | {"params": kind} for kind in kinds.values()] or [group]


def _whole_state(groups: list[dict], split: list[list[dict]], _: object, state: dict) -> dict:
    """A state_dict as one process has it: whole tensors, and no group split. All must call it."""
    own = chain(*(group["params"] for group in chain(*split)))
    moments = {parameter: state["state"].get(place) for place, parameter in enumerate(own)}
    options, packed, count = iter(state["param_groups"]), [], 0
    for group, parts in zip(groups, split, strict=True):
        first, *_ = [next(options) for _ in parts]
        packed.append(first | {"params": list(range(count, count + len(group["params"])))})
        count += len(group["params"])
    held = enumerate(moments[parameter] for group in groups for parameter in group["params"])
    held = {n: {k: whole(v) for k, v in values.items()} for n, values in held if values}
    return {**state, "state": held, "param_groups": packed}


def _placed_state(groups: list[dict], split: list[list[dict]], _: object, state: dict) -> dict:
    """The inverse of `_whole_state`, which reads this process's parts alone."""
    packed, placed_moments = [], {}
    for group, parts, saved in zip(groups, split, state["param_groups"], strict=True):
        numbers = dict(zip(group["params"], saved["params"], strict=True))
        packed += [saved | {"params": [numbers[p] for p in part["params"]]} for part in parts]
        for parameter, n in numbers.items():
            if n in state["state"]:
                values = state["state"][n].items()
                placed_moments[n] = {k: placed(v, parameter) for k, v in values}
    return {**state, "state": placed_moments, "param_groups": packed}


def learning_rate(step: int, stage: Stage) -> float:
    """The learning rate of a step: linear warm-up, then a cosine that would reach 0 at `steps`, or
    a constant with a linear end.

    Args:
        step: from 0, within the stage.
        stage: lr, warmup, steps and cooldown are read.

    Source: `cosine_lr`, `const_lr` and `const_lr_cooldown` of open_clip.

    >>> [round(learning_rate(step, Stage(lr=1.0, warmup=2, steps=4)), 3) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < 0:
        raise ValueError(f"learning_rate: step must be at least 0, got {step}")
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    if stage.cooldown is not None:
        left = max(stage.steps - step, 0)
        return stage.lr * (left / stage.cooldown if left < stage.cooldown else 1.0)
    done = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return stage.lr * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, stage: Stage) -> float:
    """Set and return the learning rate of a step."""
    rate = learning_rate(step, stage)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients in place to a global norm of at most max_norm; return the norm before.

    Args:
        parameters: those without a gradient are left out.
        max_norm: 0 only measures.

    Returns:
        0-d float tensor on the gradients' device; reading it is the caller's sync.
    """
    if max_norm < 0:
        raise ValueError(f"clip_gradients: max_norm must be at least 0, got {max_norm}")
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    norm = torch.nn.utils.get_total_norm([g for g in gradients if not isinstance(g, DTensor)])
    if parts:  # of all processes
        norm = torch.hypot(norm, torch.nn.utils.get_total_norm(parts).full_tensor())
    if max_norm > 0 and gradients:
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # torch's own epsilon
        torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
    return norm


class SpikeGuard:
    """Has AdamW skip a step whose gradient norm is beyond a multiple of the running median.

    A skipped step changes no weight and no moment. All of it stays on the device, and the norm is
    that of all processes, so all skip the same steps.

    Args:
        optimizer: of `adamw`.
        limit: times the median of the last 128 norms, of at least 32; 0 skips none. A norm that is
            no number is beyond any.
        state: of `state` at an earlier step.
    """

    _KEPT, _LEAST = 128, 32

    def __init__(
        self, optimizer: torch.optim.Optimizer, limit: float, state: dict | None = None
    ) -> None:
        state = state or {"norms": [], "seen": 0, "skipped": 0}
        if not isinstance(state.get("norms"), list) or not {"seen", "skipped"} <= state.keys():
            raise ValueError(f"SpikeGuard: state must be of another one, got {sorted(state)}")
        device = optimizer.param_groups[0]["params"][0].device
        self.optimizer, self.limit, self.seen = optimizer, limit, state["seen"]
        norms = state["norms"] + [math.nan] * (self._KEPT - len(state["norms"]))
        self.norms = torch.tensor(norms, device=device)
        self.skipped = torch.tensor(state["skipped"], device=device)
        self.spike = torch.tensor(False, device=device)  # whether the last step was skipped

    @torch.no_grad()
    def step(self, norm: Tensor) -> None:
        """optimizer.step(), or nothing."""
        if not self.limit:
            self.optimizer.step()
            return
        self.spike = spike = ~(norm <= self.limit * self.norms.nanmedian())
        if self.seen < self._LEAST:
            spike.zero_()
        self.norms[self.seen % self._KEPT] = norm
        self.seen += 1
        self.skipped += spike
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = spike.float()  # as a loss scaler says it, on the device
            self.optimizer.step()
        elif not spike:
            self.optimizer.step()

    def state(self) -> dict[str, int | list[float]]:
        """Plain numbers, from which another guard goes on."""
        norms = self.norms[: min(self.seen, self._KEPT)].tolist()
        return {"norms": norms, "seen": self.seen, "skipped": int(self.skipped)}


@torch.no_grad()
def clamp_scale_(model: nn.Module, config: Config) -> None:
    """Keep exp(logit_scale) between 1 and max_scale, in place, after each optimiser step.

    The dialect decides where config.optim.max_scale is None; 0 never clamps.

    Args:
        model: has `logit_scale`, itself or under DDP's or torch.compile's wrapper.
        config: its optim and dialect are read.
    """
    own = config.optim.max_scale
    bound = config.dialect.max_scale if own is None else own
    if bound > 0:
        unwrap(model).logit_scale.clamp_(0, math.log(bound))
