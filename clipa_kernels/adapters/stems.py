"""The image stems of open_clip, timm and Hugging Face: the kept patches alone are embedded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..masking.patch_dropout import PatchDropout, drawn_patches
from ..patch_embed import patch_embed
from .tried import Called, hooked, intact, near, part_at, random_weights


@dataclass(frozen=True)
class _Site:
    """Where a library keeps the parts of an image stem, and the method that is hidden.

    table: of positions, a parameter or an nn.Embedding. prefix: the tokens in front. drop: what
    drops patches. after: called on the tokens. wide: whether tokens have the dtype of the table
    where that is wider than the product's.
    """

    method: str
    conv: str
    table: str
    prefix: tuple[str, ...] = ()
    drop: str | None = None
    after: str | None = None
    wide: bool = True
    whole: str | None = None  # the module that embeds all patches, before the method is called


_SITES = (
    _Site(  # open_clip
        "_embeds",
        "conv1",
        "positional_embedding",
        ("class_embedding",),
        "patch_dropout",
        "ln_pre",
        wide=False,
    ),
    _Site(  # timm
        "_pos_embed",
        "patch_embed.proj",
        "pos_embed",
        ("cls_token", "reg_token"),
        "patch_drop",
        "pos_drop",
        whole="patch_embed",
    ),
    # transformers' CLIP and SigLIP; ViT
    _Site("forward", "patch_embedding", "position_embedding", ("class_embedding",)),
    _Site(
        "forward",
        "patch_embeddings.projection",
        "position_embeddings",
        ("cls_token",),
        after="dropout",
    ),
)


@dataclass(frozen=True, eq=False)
class Stem:
    """How the patches of one image tower are embedded."""

    site: _Site
    parts: tuple[tuple[str, type], ...]  # what is passed over, by path and class
    share: float | None = None  # dropped in training where the tower has no PatchDropout
    inference: float | None = None
    impl: str = "auto"

    told = "stem: the kept patches alone are embedded"

    @property
    def key(self) -> tuple:
        return (self.site,)

    def changes(self, tower: nn.Module) -> list[tuple[nn.Module, str, Callable]]:
        """(module, attribute, value) to set."""
        site = self.site
        new = [(tower, site.method, partial(run_stem, tower, self))]
        if site.whole:
            whole, drop = part_at(tower, site.whole), part_at(tower, site.drop)
            new.append((whole, "forward", partial(_pass_images, whole, tower, self)))
            if hasattr(drop, "prob"):
                new.append((drop, "forward", partial(_pass_kept, drop, tower, self)))
        return new

    def tried(self, tower: nn.Module) -> dict | str:
        """{} once the kept rows of all tokens are what the stem gives, else why it is left."""
        site, generator = self.site, torch.Generator().manual_seed(1)
        shape = 2, part_at(tower, site.conv).in_channels, *_image_size(tower, site)
        images = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        needed = (site.conv.split(".")[0], site.table, site.after)
        values = random_weights(tower, tuple(f"{path}." for path in needed))
        whole = functional_call(Called(tower, partial(_whole, site=site)), values, (images,))
        prefix = sum(token.numel() // token.shape[-1] for token in _prefix(tower, site))
        keep = torch.arange(whole.shape[1] - prefix - 1, -1, -2, device="cpu")
        stem = partial(_embedded, plan=replace(self, impl="torch"), keep=keep.expand(2, -1))
        rows = torch.cat((torch.arange(prefix, device="cpu"), keep + prefix))
        if near(functional_call(Called(tower, stem), values, (images,)), whole[:, rows]):
            return {}
        return "its stem computes something else than its parts tell"

    def drops(self, tower: nn.Module) -> bool:
        """Whether the tower drops patches, in training or in evaluation."""
        drop = part_at(tower, self.site.drop) if self.site.drop else None
        return hasattr(drop, "prob") or bool(self.share or self.inference)

    def dropping(self, tower: nn.Module, images: object) -> float | None:
        """The share of patches to drop; None where the tower's own forward is to be called."""
        site = self.site
        drop = part_at(tower, site.drop) if site.drop else None
        drop = drop if hasattr(drop, "prob") else None
        training = tower.training if drop is None else drop.training
        share = self.inference if not training else self.share if drop is None else drop.prob
        if not share or not isinstance(images, Tensor) or not images.is_floating_point():
            return None
        if tuple(images.shape[2:]) != _image_size(tower, site) or not intact(tower, self.parts):
            return None
        return share

    def keep(self, tower: nn.Module, images: Tensor, share: float) -> Tensor:
        """The patches to embed, [B, K]."""
        side = part_at(tower, self.site.conv).kernel_size[0]
        patches = (images.shape[2] // side) * (images.shape[3] // side)
        drop = part_at(tower, self.site.drop) if self.site.drop else None
        if isinstance(drop, PatchDropout) and drop.training:
            return drop.choose(len(images), patches, images.device)
        return drawn_patches(len(images), patches, share, images.device)


def look_at_stem(tower: nn.Module) -> Stem | str | None:
    """What there is to compute, or why the stem is left; None for another kind of module."""
    for site in _SITES:
        conv, table = part_at(tower, site.conv), getattr(tower, site.table, None)
        if isinstance(conv, nn.Conv2d) and isinstance(table, (Tensor, nn.Embedding)):
            break
    else:
        return None
    if site.method in tower.__dict__:
        return f"its {site.method} was replaced already"
    if not hasattr(type(tower), site.method):
        return f"it has no {site.method}"
    drop = part_at(tower, site.drop) if site.drop else None
    if getattr(tower, "dynamic_img_size", False):
        return "it takes images of any size"
    over = [site.conv, *([site.table] if isinstance(table, nn.Embedding) else [])]
    over += [site.conv.rpartition(".")[0]] if "." in site.conv else []
    over += [] if drop is None else [site.drop]
    for path in over:
        if hooked(part_at(tower, path)):
            return f"hooks of {path} would not run"
    side = conv.kernel_size[0]
    if type(conv) is not nn.Conv2d or conv.kernel_size != (side, side):
        return f"{site.conv} is no convolution of square patches"
    if conv.stride != conv.kernel_size or conv.padding not in ((0, 0), "valid") or conv.groups > 1:
        return f"{site.conv} is no convolution of square patches"
    prefix = sum(token.numel() // token.shape[-1] for token in _prefix(tower, site))
    if not isinstance(drop, (nn.Identity, type(None))) and not _drops_patches(drop, prefix):
        return f"{site.drop}, a {type(drop).__name__}, drops other tokens than patches"
    return Stem(site, tuple((path, type(part_at(tower, path))) for path in over))


def _drops_patches(drop: nn.Module, prefix: int) -> bool:
    """Whether max(1, int(16 * (1 - prob))) of 16 patches stay behind the prefix, each once."""
    prob = getattr(drop, "prob", None)
    if not isinstance(prob, Real) or any(True for _ in drop.parameters()):
        return False
    tokens = torch.arange(prefix + 16.0, device="cpu").view(1, -1, 1)
    mode, drop.training = drop.training, True
    try:
        with torch.random.fork_rng(devices=[]):
            kept = drop(tokens)
    except Exception:  # whatever it does, it is no PatchDropout
        return False
    finally:
        drop.training = mode
    size = prefix + (max(1, int(16 * (1 - prob))) if prob else 16)
    if not isinstance(kept, Tensor) or kept.shape != (1, size, 1):
        return False
    return torch.equal(kept[:, :prefix], tokens[:, :prefix]) and len(kept.unique()) == size


def _image_size(tower: nn.Module, site: _Site) -> tuple[int, int]:
    """Height and width of the images that a tower takes."""
    for module in (tower, part_at(tower, site.conv.rpartition(".")[0] or "none")):
        for name in ("image_size", "img_size"):
            size = getattr(module, name, None)
            if size is not None:
                return (size, size) if isinstance(size, int) else tuple(size)
    return ()


def _whole(tower: nn.Module, images: Tensor, site: _Site) -> Tensor:
    """All tokens, as the tower's class makes them."""
    if site.whole:
        module = part_at(tower, site.whole)
        images = type(module).forward(module, images)
    return getattr(type(tower), site.method)(tower, images)


def _prefix(tower: nn.Module, site: _Site) -> list[Tensor]:
    tokens = [getattr(tower, name, None) for name in site.prefix]
    return [token for token in tokens if token is not None]


def run_stem(tower: nn.Module, plan: Stem, *args, **kwargs):
    """The method of a stem: the kept patches alone, where the call and the parts are known."""
    given = [*args, *kwargs.values()]
    plain = given and not any(value is not None and value is not False for value in given[1:])
    share = plan.dropping(tower, given[0]) if plain else None
    if share is None:
        return getattr(type(tower), plan.site.method)(tower, *args, **kwargs)
    return _embedded(tower, given[0], plan, plan.keep(tower, given[0], share))


def _pass_images(whole: nn.Module, tower: nn.Module, plan: Stem, images: Tensor) -> Tensor:
    """timm's patch_embed: the images, where the tower's _pos_embed will embed what it keeps."""
    return images if plan.dropping(tower, images) else type(whole).forward(whole, images)


def _pass_kept(drop: nn.Module, tower: nn.Module, plan: Stem, x: Tensor) -> Tensor:
    """timm's patch_drop: the tokens, where _pos_embed has dropped some."""
    height, width = _image_size(tower, plan.site)
    side = part_at(tower, plan.site.conv).kernel_size[0]
    prefix = sum(token.numel() // token.shape[-1] for token in _prefix(tower, plan.site))
    whole = x.shape[1] == prefix + (height // side) * (width // side)
    return type(drop).forward(drop, x) if whole else x


def _embedded(tower: nn.Module, images: Tensor, plan: Stem, keep: Tensor) -> Tensor:
    """The tokens [B, R + K, D] of the prefix and the kept patches."""
    site = plan.site
    conv, table = part_at(tower, site.conv), getattr(tower, site.table)
    table = table.weight if isinstance(table, nn.Embedding) else table.flatten(0, -2)
    first = _prefix(tower, site)
    first = torch.cat([token.view(-1, table.shape[-1]) for token in first]) if first else None
    side = conv.kernel_size[0]
    missing = (images.shape[2] // side) * (images.shape[3] // side) - len(table)
    if first is not None:  # positions of patches alone: the prefix has none
        table = F.pad(table, (0, 0, max(0, missing + len(first)), 0))
    tokens = patch_embed(images, keep, conv.weight, conv.bias, table, first, impl=plan.impl).tokens
    if site.wide:
        tokens = tokens.to(torch.promote_types(tokens.dtype, table.dtype))
    tokens = tokens.view(len(images), -1, tokens.shape[-1])
    after = part_at(tower, site.after) if site.after else None
    return tokens if after is None else after(tokens)


RUNNERS = (run_stem, _pass_images, _pass_kept)
