"""Features of a model, by all processes: a batch does not depend on how many there are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clipa_kernels import Packed
from data.augment import resize
from data.text import Tokenizer
from models import CLIP

from .distributed import World
from .figures import ALONE


@dataclass
class Encoder:
    """A model with what its inputs need: features of pictures and of texts, normalised, fp32."""

    model: CLIP
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype = torch.float32
    batch_size: int = 256
    world: World | None = None  # whose processes share the work, and must all call it

    def _run(self, function, *inputs) -> Tensor:
        fast = self.dtype != torch.float32
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype, enabled=fast):
            return F.normalize(function(*inputs).float(), dim=-1).cpu()

    def _features(self, count: int, make: Callable[[int], Tensor]) -> Tensor:
        """Of batches 0 to count - 1, which the processes share; on all of them, in order.

        What a batch is does not depend on the number of processes, so nor do the features.
        """
        parts = (self.world or ALONE).share(count, make)
        return torch.cat(parts) if parts else torch.empty(0, self.model.embed_dim)

    def alone(self) -> "Encoder":
        """Of this process, which shares nothing."""
        return replace(self, world=None)

    def images(self, images: Tensor) -> Tensor:
        """uint8 [n, H, W, 3] of any size, squashed to the model's -> [n, E]."""
        size, parts = self.model.visual.config.image_size, images.split(self.batch_size)

        def make(number: int) -> Tensor:
            pixels = resize(parts[number], size).permute(0, 3, 1, 2)
            return self._run(self.model.encode_image, pixels.to(self.device))

        return self._features(len(parts) if len(images) else 0, make)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Captions -> [n, E]."""
        config, step = self.model.config, self.batch_size

        def make(number: int) -> Tensor:
            part = texts[number * step : (number + 1) * step]
            pad = config.pool == "last"
            ids, ends, longest = self.tokenizer.encode(part, config.context, pad=pad)
            packed = Packed(ids.to(self.device), ends.to(self.device), longest)
            return self._run(self.model.encode_text, packed)

        return self._features(-(-len(texts) // step), make)

    def classes(self, names: Sequence[str], prompts: Sequence[str]) -> Tensor:
        """Class features [C, E]: mean over the prompts of each name, normalised again."""
        step, alone = max(1, self.batch_size // len(prompts)), self.alone()

        def make(number: int) -> Tensor:
            part = names[number * step : (number + 1) * step]
            features = alone.texts([prompt.format(name) for name in part for prompt in prompts])
            return F.normalize(features.view(len(part), len(prompts), -1).mean(1), dim=-1)

        return self._features(-(-len(names) // step), make)
