"""EmojiPairs: 1,918 concepts with real names and drawings by three vendors, and their batches.

Nothing is downloaded and no drawing lies in the repository: the pictures are read or drawn once
from installed packages (drawings.py) and kept in a cache file of the user. It holds adaptations of
OpenMoji drawings: who passes it on does so under CC BY-SA 4.0.

A *concept* is one emoji without skin tone (code points without U+FE0F). The splits follow a
permutation, seed 42, of the concepts that keep both colour drawings (191 is a tenth of 1,918):

    191 concepts  "new concepts": neither name nor drawing trains (382 images)
    191 concepts  "held-out drawings: openmoji": the name trains with Twemoji's drawing only
    191 concepts  "held-out drawings: twemoji": the name trains with OpenMoji's drawing only
    the rest      trains with all its colour drawings: 3,005 images of 1,721 concepts in all
    "unseen vendor" shows Noto's drawings of the concepts that train (1,544 images, 1,721 names)

A training concept loses each keyword that is a new concept's name. New names are partly
compositional all the same: "woman mountain biking" may be new and "man mountain biking" not.

A batch shows one vendor's drawings only: were they mixed, telling the styles apart would lower the
loss without any meaning learnt. As a vendor has one drawing of a concept, no concept is twice in a
batch (a false negative of the contrastive loss).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipa_kernels import philox_uniform
from clipa_kernels.masking.philox import BLEND_STREAM, CAPTION_STREAM

from .augment import Augmentation, augment, resize
from .batches import Batch, ahead, local_slice, uniform_rows
from .cache import kept_drawings
from .drawings import SIZE as SIZE
from .drawings import VENDORS as VENDORS
from .drawings import Drawings
from .text import Tokenizer

TRAINING_VENDORS = (0, 1)
HELD_OUT = 191  # concepts in each held-out set
SPLIT_SEED = 42


# Caption forms. A form with keywords is the name alone where a concept has no keyword. A seventh,
# "{words}", is some of the name and the keywords in random order.
FORMS = (
    "{name}",
    "an emoji of {name}",
    "a drawing of {name}",
    "{name}, {keywords}",
    "{group}: {name}",
    "{name}, {keywords}, {group}",
)
# Prompt templates for zero-shot classification: the embeddings of a name's prompts are averaged.
PROMPTS = ("{}", "an emoji of {}", "a drawing of {}")
# What training may show: (forms, of which each sample draws one; prompts of the same kind).
CAPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "names": (("{name}",), ("{}",)),
    "words": (("{name}", "{name}", "{words}"), ("{}",)),  # a third: words about it, any order
    "all": (FORMS, PROMPTS),
}


def prompts_of(captions: str) -> tuple[str, ...]:
    """The prompts for a model that trained on a kind of captions; on any but these, the plain one.

    >>> prompts_of("words")
    ('{}',)
    """
    return CAPTIONS.get(captions, CAPTIONS["names"])[1]


class Split(NamedTuple):
    """Images to classify among names.

    images: int64 [n], indices into EmojiPairs.images; classes: names; labels: int64 [n], indices
    into classes.
    """

    images: Tensor
    classes: list[str]
    labels: Tensor


@dataclass(frozen=True)
class EmojiPairs:
    """Drawings, the concepts they show, and what may be trained on.

    images uint8 [n, 72, 72, 3] on white; vendor int64 [n], index into VENDORS; concept int64 [n],
    index into names, keywords and groups; train int64, indices of the images that train; splits by
    name.
    """

    images: Tensor
    vendor: Tensor
    concept: Tensor
    names: list[str]
    keywords: list[tuple[str, ...]]
    groups: list[str]
    train: Tensor
    splits: dict[str, Split]

    def caption(self, concept: int, form: str, draws: Sequence[float] = ()) -> str:
        """One caption of a concept: `form` with its {fields} filled in.

        Args:
            concept: index into names. form: text with {name}, {keywords}, {group} or {words}.
            draws: 16 uniform numbers for {words}: how many, then one to rank each phrase; none
                gives them all, in order.
        """
        name, keywords = self.names[concept], self.keywords[concept]
        if not keywords:
            form = form.replace(", {keywords}", "").replace("{keywords}", "{name}")
        words = [name, *keywords]
        if draws:
            ranked = sorted(zip(draws[1:], words, strict=False))
            words = [phrase for _, phrase in ranked[: 1 + int(draws[0] * len(ranked))]]
        fields = {"keywords": ", ".join(keywords), "words": " ".join(words)}
        return form.format(name=name, group=self.groups[concept], **fields)

    def captions(self, concept: int, forms: Sequence[str] = FORMS) -> list[str]:
        """The captions of a concept, one for each form.

        >>> load_emoji().captions(0)[3]
        'jack-o-lantern, celebration, halloween, jack, lantern'
        """
        return [self.caption(concept, form) for form in forms]

    def training_captions(self, forms: Sequence[str] = FORMS) -> list[str]:
        """Every caption that training can meet, each once: what a tokenizer may be trained on."""
        seen = self.concept[self.train].unique().tolist()
        return list(dict.fromkeys(text for one in seen for text in self.captions(one, forms)))


def load_emoji(cache: Path | None = None) -> EmojiPairs:
    """The embedded data set, from its cache file (0.2 s) or, first, from the packages (4 CPU-s).

    Args:
        cache: folder of the cache file; None is $CLIPA_CACHE, else clipa-kernels in
            $XDG_CACHE_HOME or ~/.cache. A damaged file is made again; a folder that cannot be
            written costs a warning and the time.

    Returns:
        EmojiPairs. The same packages give the same images, captions and splits on every machine.

    Raises:
        RuntimeError: a package that holds drawings or names is not installed.
    """
    return _assemble(kept_drawings(cache))


def _assemble(drawn: Drawings) -> EmojiPairs:
    """Choose the splits and keep new concepts out of what trains."""
    images, owner, entries = drawn
    vendor, concept = torch.from_numpy(owner[:, 0].copy()), torch.from_numpy(owner[:, 1].copy())
    names = [entry.name for entry in entries]
    colour = vendor < 2
    drawn_by = torch.bincount(concept[colour], minlength=len(names))
    both = (drawn_by == len(TRAINING_VENDORS)).nonzero()[:, 0].numpy()
    # RandomState: its stream is frozen for good, a Generator's is not.
    shuffled = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(both))
    new, no_openmoji, no_twemoji = shuffled[: 3 * HELD_OUT].split(HELD_OUT)
    held_openmoji = (vendor == 1) & torch.isin(concept, no_openmoji)
    held_twemoji = (vendor == 0) & torch.isin(concept, no_twemoji)
    is_new = torch.isin(concept, new)
    train = (colour & ~is_new & ~held_openmoji & ~held_twemoji).nonzero()[:, 0]
    seen = concept[train].unique()
    splits = {
        "held-out drawings: twemoji": _split(held_twemoji, concept, no_twemoji, names),
        "held-out drawings: openmoji": _split(held_openmoji, concept, no_openmoji, names),
        "new concepts": _split(colour & is_new, concept, new, names),
        "unseen vendor": _split((vendor == 2) & torch.isin(concept, seen), concept, seen, names),
    }
    unseen_names = {names[i].casefold() for i in new.tolist()}
    fresh = set(new.tolist())
    keywords = [
        entry.keywords
        if i in fresh
        else tuple(word for word in entry.keywords if word.casefold() not in unseen_names)
        for i, entry in enumerate(entries)
    ]
    groups = [entry.group for entry in entries]
    return EmojiPairs(
        torch.from_numpy(images), vendor, concept, names, keywords, groups, train, splits
    )


def _split(chosen: Tensor, concept: Tensor, classes: Tensor, names: list[str]) -> Split:
    images = chosen.nonzero()[:, 0]
    ordered = classes.sort().values
    labels = torch.searchsorted(ordered, concept[images])
    return Split(images, [names[i] for i in ordered.tolist()], labels)


class EmojiLoader:
    """Iterates the batches of EmojiPairs from `start_step` to `steps`.

    Args:
        pairs: the data. tokenizer: its text side.
        batch_size: samples of the global batch, over all processes.
        image_size: side of the images in pixels.
        source_size: side at which the drawings are kept for cropping; 0 is twice image_size, at
            most their own 72. A crop costs its source: at 16 px, 32 takes a third of 72's time.
        context: tokens of a caption at most, special ones included.
        start_step, steps: the steps that are yielded, start_step to steps - 1.
        strategy, pad: how captions are cut and filled, as Tokenizer.encode.
        forms: caption forms; each sample draws one, a form listed twice counts twice.
        augmentation: strengths; None is the plain crop. Its `blend` fades an image into the other
            vendor's training drawing of its concept, if there is one, by an amount uniform in
            [0, 1].
        seed: key of order, crops, colours, forms and masks.
        rank, world_size: which share of the global batch this process takes.
        prefetch: batches made ahead by a thread; 0 makes each when it is asked for.

    Raises:
        ValueError: a batch that is empty or does not divide by world_size, a rank outside it,
            a start after the end, no form, no image, no pixel.
    """

    def __init__(
        self,
        pairs: EmojiPairs,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        image_size: int,
        context: int,
        steps: int,
        start_step: int = 0,
        source_size: int = 0,
        strategy: str = "truncate",
        pad: bool = False,
        forms: Sequence[str] = FORMS,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
    ) -> None:
        self.rows = local_slice(batch_size, rank, world_size, "EmojiLoader")
        if not 0 <= start_step <= steps:
            raise ValueError(f"EmojiLoader: start_step must be in [0, {steps}], got {start_step}")
        if not forms:
            raise ValueError("EmojiLoader: forms must hold a caption form, got none")
        if not len(pairs.train):
            raise ValueError("EmojiLoader: pairs must hold training images, got none")
        if image_size < 1 or source_size < 0:
            raise ValueError(
                "EmojiLoader: image_size must be at least 1 pixel and source_size at least 0, "
                f"got {image_size} and {source_size}"
            )
        if prefetch < 0:
            raise ValueError(f"EmojiLoader: prefetch must not be negative, got {prefetch}")
        source = source_size or min(2 * image_size, pairs.images.shape[1])
        self.images = resize(pairs.images[pairs.train], source)
        self.pairs, self.tokenizer = pairs, tokenizer
        self.augmentation = augmentation or Augmentation()
        self.batch_size, self.image_size, self.seed = batch_size, image_size, seed
        self.start_step, self.steps, self.prefetch = start_step, steps, prefetch
        self.forms = tuple(forms)
        self.text = {"context": context, "strategy": strategy, "pad": pad}
        self.owners, self.vendors = pairs.concept[pairs.train], pairs.vendor[pairs.train]
        self.partner = _partners(self.owners)

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[Batch]:
        return ahead(self.batch, range(self.start_step, self.steps), self.prefetch)

    def batch(self, step: int) -> Batch:
        """The batch of any step."""
        first = self.rows.start
        key = {"seed": self.seed, "step": step, "first_sample": first}
        rows = uniform_rows(self.seed, step, self.batch_size, self.vendors)[self.rows]
        images = augment(self._blended(rows, step), self.image_size, self.augmentation, **key)
        captions = self._captions(self.owners[rows].tolist(), step)
        ids, cu_seqlens, max_seqlen = self.tokenizer.encode(captions, **self.text, **key)
        return Batch(images, ids, cu_seqlens, max_seqlen, first, 0, {})

    def _blended(self, rows: Tensor, step: int) -> Tensor:
        """The rows' images; a share of them faded by a random amount into their concept's other."""
        images, partner = self.images.index_select(0, rows), self.partner[rows]
        samples = torch.arange(self.rows.start, self.rows.stop)
        chance, amount = philox_uniform(self.seed, step, samples, 2, stream=BLEND_STREAM).unbind(1)
        faded = ((chance < self.augmentation.blend) & (partner >= 0)).nonzero()[:, 0]
        if len(faded):
            own, other = images.index_select(0, faded), self.images.index_select(0, partner[faded])
            mixed = torch.lerp(own.float(), other.float(), amount[faded].view(-1, 1, 1, 1))
            images.index_copy_(0, faded, mixed.round_().to(torch.uint8))
        return images

    def _captions(self, concepts: list[int], step: int) -> list[str]:
        samples = torch.arange(self.rows.start, self.rows.stop)
        draws = philox_uniform(self.seed, step, samples, 17, stream=CAPTION_STREAM).tolist()
        return [
            self.pairs.caption(concept, self.forms[int(draw[0] * len(self.forms))], draw[1:])
            for concept, draw in zip(concepts, draws, strict=True)
        ]


def _partners(owners: Tensor) -> Tensor:
    """For each sample another one of the same owner, int64 [n]; -1 where there is none."""
    ordered = owners.argsort(stable=True)
    same = owners[ordered[1:]] == owners[ordered[:-1]]
    partner = torch.full_like(owners, -1)
    partner[ordered[1:][same]] = ordered[:-1][same]
    partner[ordered[:-1][same]] = ordered[1:][same]
    return partner
