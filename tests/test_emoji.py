"""The embedded set: splits without leaks, captions, and batches that depend on (seed, step)."""

import threading

import pytest
import torch
from test_augment import FULL
from test_batches import joined, same

from data import drawings, emoji
from data.augment import Augmentation
from data.batches import uniform_rows
from data.emoji import FORMS, EmojiLoader, EmojiPairs, load_emoji
from data.text import Tokenizer, train_wordpiece


@pytest.fixture(scope="module")
def pairs() -> EmojiPairs:
    return load_emoji()


@pytest.fixture(scope="module")
def tokenizer(pairs) -> Tokenizer:
    return Tokenizer(train_wordpiece(pairs.training_captions(), 1000))


def test_set_is_large_enough_and_shaped(pairs):
    count = len(pairs.images)
    assert pairs.images.dtype == torch.uint8
    assert pairs.images.shape == (count, 72, 72, 3)
    assert len(pairs.vendor) == len(pairs.concept) == count
    assert len(pairs.names) == len(pairs.keywords) == len(pairs.groups) == 1918
    assert len(set(pairs.names)) == 1918
    assert len(pairs.train) == 3005
    assert not any("&amp;" in name for name in pairs.names)


def test_drawings_are_real_and_fill_the_frame(pairs):
    for vendor in range(3):
        images = pairs.images[pairs.vendor == vendor]
        ink = (images < 250).any(-1).float().mean((1, 2))
        assert ink.min() > 0.01
        assert 0.2 < ink.mean() < 0.9
    noto = pairs.images[pairs.vendor == 2]
    assert torch.equal(noto[..., 0], noto[..., 2])  # outlines only: no colour


def test_no_vendor_has_one_drawing_for_two_concepts(pairs):
    for vendor in range(3):
        images = pairs.images[pairs.vendor == vendor]
        assert len({image.numpy().tobytes() for image in images}) == len(images)


@pytest.mark.parametrize(
    ("name", "count", "classes"),
    [
        ("held-out drawings: twemoji", 191, 191),
        ("held-out drawings: openmoji", 191, 191),
        ("new concepts", 382, 191),
        ("unseen vendor", 1544, 1721),
    ],
)
def test_split_sizes_and_labels(pairs, name, count, classes):
    split = pairs.splits[name]
    assert (len(split.images), len(split.classes)) == (count, classes)
    truth = [pairs.names[concept] for concept in pairs.concept[split.images].tolist()]
    assert [split.classes[label] for label in split.labels.tolist()] == truth
    vendors = {emoji.VENDORS[v] for v in pairs.vendor[split.images].tolist()}
    expected = {"unseen vendor": {"noto"}, "new concepts": {"twemoji", "openmoji"}}
    assert vendors == expected.get(name, {name.rpartition(" ")[2]})


def test_nothing_held_out_trains(pairs):
    train = set(pairs.train.tolist())
    trained = set(pairs.concept[pairs.train].tolist())
    assert len(train) == len(pairs.train)
    assert set(pairs.vendor[pairs.train].tolist()) == {0, 1}
    for split in pairs.splits.values():
        assert not train & set(split.images.tolist())
    new = set(pairs.concept[pairs.splits["new concepts"].images].tolist())
    assert not new & trained
    for name in ("held-out drawings: twemoji", "held-out drawings: openmoji"):
        held = pairs.concept[pairs.splits[name].images].tolist()
        assert set(held) <= trained  # by the other vendor's drawing
    held_out = torch.cat([split.images for split in pairs.splits.values()])
    pixels = {pairs.images[i].numpy().tobytes() for i in train}
    assert not pixels & {pairs.images[i].numpy().tobytes() for i in held_out.tolist()}


def test_no_name_of_a_new_concept_is_in_training_captions(pairs):
    new = {name.casefold() for name in pairs.splits["new concepts"].classes}
    captions = pairs.training_captions()
    assert len(captions) > 9000
    for caption in captions:
        plain = caption.removeprefix("an emoji of ").removeprefix("a drawing of ")
        parts = {part.casefold() for part in plain.split(", ")} | {plain.casefold()}
        assert not parts & new


def test_caption_forms(pairs):
    melon = pairs.names.index("melon")
    assert pairs.captions(melon) == [
        "melon",
        "an emoji of melon",
        "a drawing of melon",
        "melon, fruit",
        "food drink: melon",
        "melon, fruit, food drink",
    ]
    plain = next(i for i, words in enumerate(pairs.keywords) if not words)
    name, group = pairs.names[plain], pairs.groups[plain]
    assert pairs.caption(plain, "{name}, {keywords}, {group}") == f"{name}, {group}"
    assert pairs.caption(plain, "{keywords}") == name
    assert pairs.caption(melon, "{words}") == "melon fruit"
    assert pairs.caption(melon, "{words}", [0.9, 0.8, 0.1]) == "fruit melon"
    assert pairs.caption(melon, "{words}", [0.4, 0.8, 0.1]) == "fruit"


def test_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(drawings.PACKAGES, "no-such-drawings", "nothing")
    with pytest.raises(RuntimeError, match="no-such-drawings must be installed"):
        load_emoji(tmp_path)


def test_blended_images_lie_between_the_two_drawings(pairs, tokenizer):
    plain, faded = (
        EmojiLoader(pairs, tokenizer, **settings(tokenizer, batch_size=256, augmentation=change))
        for change in (None, Augmentation(blend=0.5))
    )
    rows = uniform_rows(4, 0, 256, plain.vendors)
    a, c = plain._blended(rows, 0).int(), faded._blended(rows, 0).int()
    other = plain.images[plain.partner[rows]].int()
    assert torch.equal(a, plain.images[rows].int())
    assert (plain.owners[plain.partner[rows]] == plain.owners[rows])[plain.partner[rows] >= 0].all()
    changed = (a != c).flatten(1).any(1)
    assert not changed[plain.partner[rows] < 0].any() and 0.35 < changed.float().mean() < 0.55
    low, high = torch.minimum(a, other), torch.maximum(a, other)
    assert ((c >= low) & (c <= high))[changed].all()
    with pytest.raises(ValueError, match="blend must be in"):
        Augmentation(blend=1.5)


def settings(tokenizer: Tokenizer, **change):
    base = {"batch_size": 24, "image_size": 16, "context": 8, "steps": 6, "augmentation": FULL}
    return {**base, "strategy": "random", "seed": 4, **change}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_resumed_loader_gives_the_same_batches(pairs, tokenizer, prefetch):
    whole = list(EmojiLoader(pairs, tokenizer, **settings(tokenizer, prefetch=prefetch)))
    resumed = list(EmojiLoader(pairs, tokenizer, **settings(tokenizer, start_step=4)))
    assert len(whole) == 6
    assert len(resumed) == 2
    assert all(same(a, b) for a, b in zip(whole[4:], resumed, strict=True))
    assert not torch.equal(whole[0].images, whole[1].images)
    other = next(iter(EmojiLoader(pairs, tokenizer, **settings(tokenizer, seed=5))))
    assert not torch.equal(other.images, whole[0].images)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_together_see_the_batch_of_one(pairs, tokenizer, world_size):
    alone = EmojiLoader(pairs, tokenizer, **settings(tokenizer))
    ranks = [
        EmojiLoader(pairs, tokenizer, **settings(tokenizer, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(alone):
        shares = [loader.batch(step) for loader in ranks]
        assert [share.first_sample for share in shares] == list(range(0, 24, 24 // world_size))
        assert all(torch.equal(a, b) for a, b in zip(joined(shares), joined([batch]), strict=True))


def test_a_batch_shows_its_captions(pairs, tokenizer):
    loader = EmojiLoader(
        pairs, tokenizer, **settings(tokenizer, strategy="truncate", context=32, forms=("{name}",))
    )
    batch = next(iter(loader))
    rows = uniform_rows(4, 0, 24, loader.vendors)
    names = [pairs.names[concept] for concept in loader.owners[rows].tolist()]
    ids, cu_seqlens, longest = tokenizer.encode(names, 32)
    assert torch.equal(batch.ids, ids)
    assert torch.equal(batch.cu_seqlens, cu_seqlens)
    assert batch.max_seqlen == longest
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (24, 16, 16, 3)


def test_every_caption_form_is_drawn(pairs, tokenizer):
    loader = EmojiLoader(pairs, tokenizer, **settings(tokenizer, batch_size=512))
    concepts = loader.owners[uniform_rows(4, 0, 512, loader.vendors)].tolist()
    drawn = loader._captions(concepts, 0)
    forms = [0] * len(FORMS)
    for concept, caption in zip(concepts, drawn, strict=True):
        forms[pairs.captions(concept).index(caption)] += 1
    assert min(forms) > 30
    loader.forms = ("{words}",)
    some = loader._captions(concepts, 0)
    whole = [pairs.caption(concept, "{words}") for concept in concepts]
    assert all(set(a.split()) <= set(b.split()) for a, b in zip(some, whole, strict=True))
    several = [len(pairs.keywords[concept]) > 1 for concept in concepts]
    differ = sum(a != b for a, b, many in zip(some, whole, several, strict=True) if many)
    assert differ > 0.7 * sum(several)


def test_padded_rows(pairs, tokenizer):
    batch = next(iter(EmojiLoader(pairs, tokenizer, **settings(tokenizer, pad=True))))
    assert torch.equal(batch.cu_seqlens, torch.arange(0, 25 * 8, 8, dtype=torch.int32))
    assert batch.max_seqlen == 8


def test_a_loader_may_be_left_early(pairs, tokenizer):
    """Its thread ends with the iterator, though a million batches are left."""
    batches = iter(EmojiLoader(pairs, tokenizer, **settings(tokenizer, steps=10**6)))
    next(batches)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"world_size": 5}, "batch_size must be divisible by the 5 processes, got 24"),
        ({"rank": 2, "world_size": 2}, "rank must be in .0, world_size., got rank 2 of 2"),
        ({"start_step": 7}, "start_step must be in .0, 6., got 7"),
        ({"forms": ()}, "forms must hold a caption form"),
        ({"prefetch": -1}, "prefetch must not be negative"),
        ({"image_size": 0}, "image_size must be at least 1 pixel .*, got 0 and 0"),
        ({"source_size": -8}, "image_size .* source_size at least 0, got 16 and -8"),
    ],
)
def test_bad_loader(pairs, tokenizer, change, sentence):
    with pytest.raises(ValueError, match=f"EmojiLoader: {sentence}"):
        EmojiLoader(pairs, tokenizer, **settings(tokenizer, **change))


def test_errors_of_making_a_batch_reach_the_caller(pairs, tokenizer):
    loader = EmojiLoader(pairs, tokenizer, **settings(tokenizer, context=1))
    with pytest.raises(ValueError, match="context must be above its 2 special tokens"):
        next(iter(loader))
