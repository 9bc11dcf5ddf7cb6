"""PatchDropout for models that embed all patches first: the module of open_clip and of timm.

patch_embed with kept indices does the same and never embeds what is dropped; this is for those who
change one line of a model. Liu et al. (arXiv:2208.07220), FLIP (arXiv:2212.00794).
"""

import torch
from torch import Tensor, nn

from .masking import random_patches


class PatchDropout(nn.Module):
    """Keeps max(1, int(L * (1 - prob))) random tokens of each sample in training, prefix apart.

    Args:
        prob: share dropped, in [0, 1).
        exclude_first_token: open_clip's second argument, and timm's where it comes by position:
            the tokens in front that always stay, True for one.
        num_prefix_tokens: timm's name for it; wins where it is given.
        ordered: timm's; kept tokens are in order in any case.
        seed: of the choice; None takes torch.initial_seed(). Calls are numbered, so each draws
            anew, on the device of its input and without its random state.
    Raises: ValueError for a prob outside [0, 1).
    """

    def __init__(
        self,
        prob: float = 0.5,
        exclude_first_token: bool | int = True,
        num_prefix_tokens: int | None = None,
        ordered: bool = False,
        *,
        seed: int | None = None,
    ):
        super().__init__()
        if not 0 <= prob < 1:
            raise ValueError(f"PatchDropout: prob must be in [0, 1), got {prob}")
        self.prob, self.seed, self.calls = prob, seed, 0
        self.prefix = int(exclude_first_token if num_prefix_tokens is None else num_prefix_tokens)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, R + L, D] to [B, R + K, D]; x itself in evaluation and at prob 0."""
        if not self.training or self.prob == 0:
            return x
        seed = torch.initial_seed() if self.seed is None else self.seed
        grid = (1, x.shape[1] - self.prefix)
        key = dict(seed=seed % 2**64, step=self.calls, device=x.device)
        keep = random_patches(x.shape[0], grid, self.prob, **key) + self.prefix
        self.calls += 1
        kept = x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return torch.cat((x[:, : self.prefix], kept), 1) if self.prefix else kept
