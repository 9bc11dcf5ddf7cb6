"""PatchDropout for models that embed all patches first: the modules of open_clip and of timm.

patch_embed with kept indices does the same and never embeds what is dropped; this is for those who
change one line of a model. Liu et al. (arXiv:2208.07220), FLIP (arXiv:2212.00794).

The choice is drawn from torch's generator of the input's device, as nn.Dropout's is: it repeats
under torch.manual_seed, is made again where activation checkpointing or a restored state put the
generator back, is another in each call, and on each process whose generator is another. The module
keeps no state, so weights of open_clip and timm load strictly, and torch.compile takes it whole.
"""

from numbers import Integral, Real

import torch
from torch import Tensor, nn

from ..check import describe, readable, require_int, require_tensor
from .api import lowest_columns, random_patches
from .philox import IMAGE_STREAM, draw_bits


def drawn_patches(batch: int, patches: int, prob: float, device: torch.device) -> Tensor:
    """int64 [batch, K] ascending, K = max(1, int(patches * (1 - prob))), of torch's generator."""
    bits = torch.randint(1 << 32, [batch, patches], device=device)
    return lowest_columns(bits, max(1, int(patches * (1 - prob))))


class PatchDropout(nn.Module):
    """Keeps max(1, int(L * (1 - prob))) random tokens of each sample in training, prefix apart.

    Args:
        prob: share dropped, in [0, 1).
        exclude_first_token: open_clip's second argument, and timm's where it comes by position:
            the tokens in front that always stay, True for one.
        ordered: timm's; kept tokens are in order in any case. A number here is num_prefix_tokens.
        num_prefix_tokens: timm's name for the second; wins where it is given.
        seed: with the step that a call gives, names its masks, see forward: processes whose masks
            must differ take different seeds. In [-2**63, 2**64), where negative ones count from
            2**64 as torch's do.
    Attributes: prob, num_prefix_tokens, exclude_first_token, ordered and seed; what is assigned to
        them holds from the next call on.
    Raises:
        ValueError: prob, a number of tokens or the seed is out of its range.
        TypeError: an argument is of another type.

    >>> PatchDropout(0.75)(torch.zeros(2, 1 + 16, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        prob: float = 0.5,
        exclude_first_token: bool | int = True,
        ordered: bool | int | None = False,
        num_prefix_tokens: int | None = None,
        *,
        seed: int | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        if isinstance(prob, bool) or not isinstance(prob, Real):
            raise TypeError(f"{name}: prob must be a number, got {prob!r}")
        if not 0 <= prob < 1:
            raise ValueError(f"{name}: prob must be in [0, 1), got {prob}")
        number = isinstance(ordered, Integral) and not isinstance(ordered, bool)
        if ordered is None or number:
            num_prefix_tokens = ordered if num_prefix_tokens is None else num_prefix_tokens
            ordered = False
        if not isinstance(ordered, bool):
            raise TypeError(f"{name}: ordered must be True or False, got {ordered!r}")
        prefix = dict(exclude_first_token=exclude_first_token)
        if type(exclude_first_token).__name__ in ("bool", "bool_"):  # NumPy's too
            prefix = dict(exclude_first_token=int(exclude_first_token))
        if num_prefix_tokens is not None:
            prefix = dict(num_prefix_tokens=num_prefix_tokens)
        self.prob, self.ordered, self.seed = float(prob), ordered, seed
        (self.num_prefix_tokens,) = require_int(name, 0, 2**31, **prefix)
        if seed is not None:
            (seed,) = require_int(name, -(2**63), 2**64, seed=seed)
            self.seed = (seed + 2**63) % 2**64 - 2**63  # TorchScript's integers have 64 bits

    @property
    def exclude_first_token(self) -> bool:
        """open_clip's attribute: whether tokens in front stay."""
        return self.num_prefix_tokens > 0

    @exclude_first_token.setter
    def exclude_first_token(self, exclude: bool) -> None:
        self.num_prefix_tokens = int(exclude)

    def forward(self, x: Tensor, step: int | Tensor | None = None) -> Tensor:
        """x without the patches dropped; x itself in evaluation and at prob 0.

        Args:
            x: [B, R + L, ...], R the prefix tokens; any dtype and device.
            step: with a seed: patch i of sample b stays where random_patches(B, (1, L), prob,
                seed=seed, step=step) keeps it, whatever the state of torch's generator. A number
                in [0, 2**32), or an int32 or int64 scalar tensor on x's device, which
                torch.compile and CUDA graphs take without compiling or recording again. None draws
                from torch's generator: without a seed the masks, with one the step.
        Returns: [B, R + K, ...].
        Raises:
            TypeError: x is not a tensor, or step is not an integer.
            ValueError: x holds no patch, step is out of its range, or there is no seed for it.
        """
        return self._drop(x, step)[0]

    def _drop(self, x: Tensor, step: int | Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tokens that stay, and the patches [B, K] among them where some were dropped."""
        if not self.training or self.prob == 0:
            return x, None
        prefix = self.num_prefix_tokens
        if not torch.jit.is_scripting():
            self._check(x, step)
        keep = self.choose(x.shape[0], x.shape[1] - prefix, x.device, step)
        rows = keep + prefix
        if prefix > 0:
            first = torch.arange(prefix, device=x.device).expand(x.shape[0], prefix)
            rows = torch.cat((first, rows), 1)
        size = [rows.shape[0], rows.shape[1]]
        index = rows.view(size + [1] * (x.dim() - 2)).expand(size + list(x.shape[2:]))
        return x.gather(1, index), keep

    def choose(
        self, batch: int, patches: int, device: torch.device, step: int | Tensor | None = None
    ) -> Tensor:
        """The patches that forward keeps of a batch in training: int64 [batch, K], ascending."""
        if self.seed is not None:
            return self._keyed(batch, patches, device, step)
        return drawn_patches(batch, patches, self.prob, device)

    @torch.jit.ignore
    def _keyed(
        self, batch: int, patches: int, device: torch.device, step: int | Tensor | None
    ) -> Tensor:
        """keep of (seed, step), the step drawn where there is none."""
        seed = int(self.seed) % 2**64  # NumPy's integers, if assigned, hold no 2**64
        if step is None:
            step = torch.randint(1 << 32, (), device=device)
        elif not isinstance(step, Tensor):
            key = dict(seed=seed, step=step, device=device)
            return random_patches(batch, (1, patches), self.prob, **key)
        samples = torch.arange(batch, device=device)
        bits = draw_bits(seed, step.long(), samples, patches, IMAGE_STREAM)
        return lowest_columns(bits, max(1, int(patches * (1 - self.prob))))

    def _check(self, x: Tensor, step: int | Tensor | None) -> None:
        name, prefix = type(self).__name__, self.num_prefix_tokens
        require_tensor(name, x=x)
        if x.dim() < 2 or x.shape[1] <= prefix:
            raise ValueError(
                f"{name}: x must be [B, {prefix} prefix + L, ...] with L at least 1, "
                f"got {describe(x)}"
            )
        if step is None:
            return
        if self.seed is None:
            raise ValueError(f"{name}: step must come with a seed, got seed None")
        if not isinstance(step, Tensor):
            require_int(name, 0, 2**32, step=step)
        elif step.dim() or step.dtype not in (torch.int32, torch.int64) or step.device != x.device:
            raise TypeError(
                f"{name}: step must be an int32 or int64 scalar on {x.device}, got {describe(step)}"
            )
        elif readable(step):
            require_int(name, 0, 2**32, step=int(step))


class PatchDropoutWithIndices(PatchDropout):
    """timm's module of this name: PatchDropout that also gives the patches that stay.

    Args, Attributes, Raises: as PatchDropout.

    >>> x, keep = PatchDropoutWithIndices(0.75)(torch.zeros(2, 1 + 16, 8))
    >>> x.shape, keep.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 4]))
    """

    def forward(self, x: Tensor, step: int | Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(x without the patches dropped, keep): arguments as PatchDropout.forward.

        keep: int64 [B, K], ascending, patches from 0 to L - 1, so that the prefix is not counted;
            None in evaluation and at prob 0.
        """
        return self._drop(x, step)
