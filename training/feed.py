"""Batches on their way to a GPU: pinned, and copied while the step before runs."""

from collections.abc import Iterable, Iterator

import torch

from data.batches import Batch


def fed(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, in order; on CUDA their images and ids lie on the device.

    A batch is copied on a stream of its own when it is asked for. The host has by then only
    launched the step before, so that the copy and that step run at the same time.

    Args:
        batches: as a loader gives them.
        device: where they are to go; any but a CUDA device takes them as they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    for batch in batches:
        yield copied(batch, device, side, torch.cuda.current_stream(device))


def copied(
    batch: Batch, device: torch.device, side: torch.cuda.Stream, here: torch.cuda.Stream
) -> Batch:
    """The batch with images and ids on the device, copied on `side`, for use on `here`."""
    host = [batch.images.pin_memory(), batch.ids.pin_memory()]
    with torch.cuda.stream(side):
        images, ids = (tensor.to(device, non_blocking=True) for tensor in host)
    here.wait_stream(side)
    for tensor in (images, ids):  # `side` must not reuse its memory before `here` is done with it
        tensor.record_stream(here)
    # The ends stay on the host, where parts of a batch are cut; they are copied without waiting.
    return batch._replace(images=images, ids=ids, cu_seqlens=batch.cu_seqlens.pin_memory())
