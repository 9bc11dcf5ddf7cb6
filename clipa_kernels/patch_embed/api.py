"""Patches to tokens: only the kept patches are read, and no image is converted whole.

    token(b, k) = sum_{c, y, x} w[:, c, y, x] * (pixel[b, c, y, x of patch keep[b, k]] - mean_c)
                  / std_c + bias + pos_embed[R + keep[b, k]]

with R prefix rows (class token, registers) before each image's patches: cls_token + pos_embed[:R].
This is the stride-P convolution of Dosovitskiy et al. (arXiv:2010.11929) followed by patch
dropping as in FLIP (arXiv:2212.00794) and CLIPA. Next to plain torch: no patch that is dropped
later is read, converted or embedded, no float copy of the images exists, only one of the kept
patches in the product's dtype, and the normalisation costs nothing, as it is folded into weight and
bias. uint8 pixels are exact in bf16, so they enter the product unrounded.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import check
from ..check import describe
from ..packing import Packed
from .ops import embed_patches, embed_tokens, is_hwc

Channels = Tensor | Sequence[float] | None
# Up to here positions are columns of the product on a GPU, 4 D FLOPs a token each for both ways.
# More are added before it and their gradients summed after it, 4 D bytes a token, in time about as
# much as 200 columns on an H100; 64 keep the product's FLOPs within a tenth.
MOST_BY_PRODUCT = 64


def patch_embed_reference(
    images: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    cls_token: Tensor | None = None,
    mean: Channels = None,
    std: Channels = None,
) -> Packed:
    """The specification: normalise, convolve, add positions, pick; see patch_embed."""
    args = (images, keep, weight, bias, pos_embed, cls_token, mean, std)
    pos_embed, cls_token, mean, std = _checked("patch_embed_reference", *args)
    wide = torch.promote_types(weight.dtype, torch.float32)
    x = images.to(wide) / 255 if images.dtype == torch.uint8 else images.to(wide)
    if mean is not None:
        x = (x - mean.to(wide).view(-1, 1, 1)) / std.to(wide).view(-1, 1, 1)
    x = F.conv2d(x, weight.to(wide), None if bias is None else bias.to(wide), weight.shape[2:])
    x = x.flatten(2).transpose(1, 2)
    prefix = pos_embed.shape[0] - x.shape[1]
    x = x + pos_embed[prefix:]
    if keep is not None:
        x = x.gather(1, keep.long().unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    if prefix:
        first = cls_token.view(prefix, -1) + pos_embed[:prefix]
        x = torch.cat((first.expand(x.shape[0], -1, -1), x), 1)
    return _packed(x.to(weight.dtype))


def patch_embed(
    images: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    cls_token: Tensor | None = None,
    mean: Channels = None,
    std: Channels = None,
    *,
    impl: str = "auto",
) -> Packed:
    """Embed the kept patches of a batch of images into packed tokens; see the formula above.

    Args:
        images: [B, C, height, width] with any strides (an HWC batch comes as
            images.permute(0, 3, 1, 2)); uint8, where v stands for v / 255, or floating point.
        keep: int32 or int64 [B, K], patches numbered row by row from 0 to L - 1, in the order in
            which their tokens are wanted; an index may repeat. None keeps all L in order.
        weight: [D, C, P, P], as of nn.Conv2d(C, D, P, stride=P).
        bias: [D] or None.
        pos_embed: [R + L, D]: prefix rows, then one for each patch; or [1, R + L, D], timm's.
        cls_token: [D] or [R, D], rows in front of each image's patches; or [1, R, D], timm's; None
            means R = 0.
        mean, std: [C], NumPy's too, or C numbers, in units where white is 1, std above 0; both or
            neither. Not differentiated.
        impl: "auto", "triton", "torch" or "reference".
    Returns:
        Packed with tokens [B * (R + K), D] in weight's dtype, or autocast's where it is on.
        Gradients flow to weight, bias, pos_embed, cls_token, and to images if they are floating.
    Raises:
        ValueError: an image that does not divide into patches, channels or sizes or devices that
            disagree, keep empty or out of range, a mean that is not finite, a std that is not
            positive and finite (tensors are checked on a CPU only), an unknown impl.
        TypeError: dtypes other than those above.
    Source: open_clip's VisionTransformer stem and PatchDropout.

    >>> import torch
    >>> image = torch.randint(256, (1, 3, 4, 4), dtype=torch.uint8)
    >>> keep = torch.tensor([[0, 3]])
    >>> patch_embed(image, keep, torch.ones(8, 3, 2, 2), None, torch.zeros(4, 8)).tokens.shape
    torch.Size([2, 8])
    """
    args = (images, keep, weight, bias, pos_embed, cls_token, mean, std)
    pos_embed, cls_token, mean, std = _checked("patch_embed", *args)
    autocast = check.autocast_dtype(images.device)
    dtype = autocast or weight.dtype
    like = images if images.dtype == torch.float64 else weight
    impl = check.choose_impl("patch_embed", impl, ("triton", "torch", "reference"), like)
    if impl == "reference":
        packed = patch_embed_reference(*args)
        return packed._replace(tokens=packed.tokens.to(dtype))
    check.refuse_tangents("patch_embed", images, weight, bias, pos_embed, cls_token)
    with torch.autocast(images.device.type, enabled=False) if autocast else nullcontext():
        prefix = 0 if cls_token is None else cls_token.numel() // weight.shape[0]
        if impl == "triton":
            side = weight.shape[-1]
            centre = 128.0 if images.dtype == torch.uint8 else 0.0  # what the kernel subtracts
            folded, shift = fold_normalisation(images, weight, bias, mean, std, dtype, centre)
            table = pos_embed[prefix:] if shift is None else pos_embed[prefix:] + shift
            if prefix:
                table = torch.cat((cls_token.view(prefix, -1) + pos_embed[:prefix], table))
            columns = _in_runs(folded.view(-1, side, side, weight.shape[1]), images)
            pixels = columns.shape[1]
            if table.shape[0] - prefix <= MOST_BY_PRODUCT:
                columns, table = torch.cat((columns, table.to(dtype).t()), 1), None
            columns = F.pad(columns, (0, -columns.shape[1] % 16))  # rows end on 16 bytes
            return _packed(embed_tokens(images, keep, columns, table, side, prefix, pixels)[0])
        folded, shift = fold_normalisation(images, weight, bias, mean, std, dtype)
        shift = None if shift is None else shift.to(dtype)
        positions = pos_embed[prefix:].to(dtype)
        x = embed_patches(images, keep, folded, shift, positions, weight.shape[-1])
        if prefix:
            first = (cls_token.view(prefix, -1) + pos_embed[:prefix]).to(dtype)
            x = torch.cat((first.expand(x.shape[0], -1, -1), x), 1)
    return _packed(x)


def fold_normalisation(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
    centre: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Weight [D, P * P * C] and bias [D] that take raw pixels less centre: w / std and
    b - sum(w (mean - centre) / std), the bias at least in fp32.

    The shift is summed from the weight as rounded to dtype: rounding then acts on centred pixels.
    """
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    folded = weight.permute(0, 2, 3, 1)
    wide = torch.promote_types(weight.dtype, torch.float32)
    if mean is None:
        folded = (folded / unit).to(dtype)
        middle = -centre
    else:
        folded = (folded.to(wide) / (std.to(wide) * unit)).to(dtype)
        middle = mean.to(wide) * unit - centre
    shift = None if bias is None else bias.to(wide)
    if mean is not None or centre:
        moved = (folded.to(wide) * middle).sum((1, 2, 3))
        shift = -moved if shift is None else shift - moved
    return folded.flatten(1), shift


def _in_runs(weight: Tensor, images: Tensor) -> Tensor:
    """[D, P, P, C] as [D, columns]: pixels in the order of memory, runs of bytes in whole words."""
    runs = weight.flatten(2) if is_hwc(images) else weight.permute(0, 3, 1, 2).flatten(1, 2)
    pad = -runs.shape[-1] % 4 if images.dtype == torch.uint8 else 0
    return (F.pad(runs, (0, pad)) if pad else runs).flatten(1)


def _packed(x: Tensor) -> Packed:
    """[B, S, D] as Packed; all sequences are S long."""
    batch, size, _ = x.shape
    ends = torch.arange(0, (batch + 1) * size, size, dtype=torch.int32, device=x.device)
    return Packed(x.flatten(0, 1), ends, size)


def _checked(
    name, images, keep, weight, bias, pos_embed, cls_token, mean, std
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Check all arguments of function name; pos_embed and cls_token without timm's dimension of
    one image, mean and std as tensors."""
    _check_images(name, images, weight, bias)
    side = weight.shape[-1]
    patches = (images.shape[2] // side) * (images.shape[3] // side)
    pos_embed, cls_token = _check_tokens(name, patches, weight, pos_embed, cls_token)
    if keep is not None:
        _check_keep(name, keep, images.shape[0], patches)
    if (mean is None) != (std is None):
        raise ValueError(f"{name}: mean and std must come together, got only one of them")
    mean = _channels(name, "mean", mean, images, weight)
    std = _channels(name, "std", std, images, weight)
    tensors = dict(images=images, keep=keep, weight=weight, bias=bias, pos_embed=pos_embed)
    check.require_same_device(name, **tensors, cls_token=cls_token, mean=mean, std=std)
    return pos_embed, cls_token, mean, std


def _check_images(name: str, images: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check.require_tensor(name, images=images, weight=weight)
    check.require_float(name, weight=weight)
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"{name}: images must be uint8 or floating point, got {describe(images)}")
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or not weight.numel():
        raise ValueError(f"{name}: weight must be [D, C, P, P], got {describe(weight)}")
    if images.dim() != 4 or images.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}: images must be [B, {weight.shape[1]}, height, width] for weight "
            f"{describe(weight)}, got {describe(images)}"
        )
    side, (height, width) = weight.shape[-1], images.shape[2:]
    if not height or not width or height % side or width % side:
        raise ValueError(
            f"{name}: height and width must be multiples of the patch side {side}, "
            f"got {height}x{width}"
        )
    if bias is not None:
        check.require_float(name, bias=bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}: bias must be [{weight.shape[0]}], got {describe(bias)}")


def _channels(
    name: str, label: str, values: Channels, images: Tensor, weight: Tensor
) -> Tensor | None:
    """mean or std as a tensor, checked: finite in the dtype of the fold, std positive too."""
    if values is None:
        return None
    size = weight.shape[1]
    if not isinstance(values, Tensor) and hasattr(values, "tolist"):  # an array of NumPy
        values = values.tolist()
    if isinstance(values, Tensor):
        check.require_float(name, **{label: values})
        numbers = values.flatten().tolist() if check.readable(values) else []
        shape, came = tuple(values.shape), describe(values)
    elif isinstance(values, Sequence) and all(
        isinstance(value, Real) and not isinstance(value, bool) for value in values
    ):
        numbers, shape, came = list(values), (len(values),), f"{len(values)} numbers"
    else:
        raise TypeError(f"{name}: {label} must be a tensor or {size} numbers, got {values!r}")
    if shape != (size,):
        raise ValueError(f"{name}: {label} must be [{size}], got {came}")
    wide = torch.promote_types(weight.dtype, torch.float32)
    largest = torch.finfo(wide).max
    positive = label == "std"
    if not all(-largest <= n <= largest and (n > 0 or not positive) for n in numbers):
        rule = "positive and finite" if positive else "finite"
        raise ValueError(f"{name}: {label} must be {rule}, got {numbers}")
    if isinstance(values, Tensor):
        return values
    # Filled on the device: torch.tensor of the numbers is a copy that the host waits for.
    kind = dict(dtype=wide, device=images.device)
    return torch.cat([torch.full((1,), float(number), **kind) for number in numbers])


def _check_tokens(
    name: str, patches: int, weight: Tensor, pos_embed: Tensor, cls_token: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    check.require_float(name, pos_embed=pos_embed)
    pos_embed = _of_one_image(pos_embed)
    width, prefix = weight.shape[0], 0
    if cls_token is not None:
        check.require_float(name, cls_token=cls_token)
        cls_token = _of_one_image(cls_token)
        prefix = cls_token.numel() // width
        if cls_token.shape not in ((width,), (prefix, width)) or not prefix:
            raise ValueError(
                f"{name}: cls_token must be [{width}] or [R, {width}], got {describe(cls_token)}"
            )
    if pos_embed.shape != (prefix + patches, width):
        raise ValueError(
            f"{name}: pos_embed must be [{prefix} prefix + {patches} patches, {width}], "
            f"got {describe(pos_embed)}"
        )
    return pos_embed, cls_token


def _of_one_image(table: Tensor) -> Tensor:
    return table[0] if table.dim() == 3 and table.shape[0] == 1 else table


def _check_keep(name: str, keep: Tensor, batch: int, patches: int) -> None:
    check.require_tensor(name, keep=keep)
    if keep.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: keep must hold int32 or int64, got {describe(keep)}")
    if keep.dim() != 2 or keep.shape[0] != batch or not keep.shape[1]:
        raise ValueError(
            f"{name}: keep must be [{batch}, K] with K at least 1, got {describe(keep)}"
        )
    if check.readable(keep) and keep.numel():
        low, high = keep.aminmax()
        if low < 0 or high >= patches:
            raise ValueError(
                f"{name}: keep must hold patch numbers from 0 to {patches - 1}, "
                f"got {int(low)} to {int(high)}"
            )
