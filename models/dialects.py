"""What a published recipe fixes beside the sizes, each in one Dialect.

Sources: open_clip 3.3.0 and OpenAI's CLIP; clipa_torch (CLIPA v1) and clipa_jax (v2) of
UCSC-VLAA/CLIPA. `clipa-v2-open_clip` are v2's weights as open_clip runs them.
"""

from dataclasses import dataclass, replace

# Channel means and deviations where white is 1: OpenAI CLIP's data, and ImageNet (CLIPA-v2).
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Dialect:
    """The choices of a recipe; the defaults are open_clip's."""

    # both encoders
    gelu: str = "none"  # none (exact), tanh, quick
    eps: float = 1e-5  # of every LayerNorm
    init: str = "torch"  # torch: PyTorch's defaults in the image encoder; jax: Xavier-uniform

    # image encoder
    ln_pre: bool = True  # LayerNorm before the first block
    pool: str = "cls"  # cls; mean over patches; mean-with-cls over all tokens
    norm_after_pool: bool = False  # order of ln_post and the mean
    positions: str = "learnable"  # or a fixed table, sincos-mae or sincos-moco
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    # text encoder
    causal: bool = True
    text_pool: str = "end"  # end: the end token; last: the last position, so captions are padded
    context: int = 77  # tokens of the longest caption
    vocab_size: int = 49_408

    # pictures from files; the embedded drawings are squares and always resized bilinearly
    interpolation: str = "bicubic"  # of crops and of evaluation, antialiased: bicubic, bilinear
    squash: bool = False  # evaluation resizes both sides; False: the shortest, then the centre

    # optimisation
    decays_embeddings: bool = True  # weight decay on token and position tables too
    adam_eps: float = 1e-6
    max_scale: float = 100.0  # bound of exp(logit_scale); 0: none

    @property
    def pads_text(self) -> bool:
        """Whether captions are filled up to one length."""
        return self.text_pool == "last"


_CLIPA_V2 = Dialect(
    gelu="tanh",
    eps=1e-6,
    init="jax",
    ln_pre=False,
    pool="mean",
    norm_after_pool=True,
    positions="sincos-moco",
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    causal=False,
    text_pool="last",
    context=32,
    vocab_size=32_000,
    interpolation="bilinear",
    squash=True,
    decays_embeddings=False,
    adam_eps=1e-8,
    max_scale=0.0,
)
DIALECTS: dict[str, Dialect] = {
    "openai": Dialect(gelu="quick"),
    "open_clip": Dialect(),
    "clipa-v1": Dialect(positions="sincos-mae", norm_after_pool=True, context=32),
    "clipa-v2": _CLIPA_V2,
    # The same weights as open_clip runs them: exact GELU, eps 1e-5, a learnable position table.
    "clipa-v2-open_clip": replace(
        _CLIPA_V2, gelu="none", eps=1e-5, init="torch", positions="learnable"
    ),
}
