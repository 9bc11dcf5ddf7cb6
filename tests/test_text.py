"""Text: open_clip's ids, CLIPA's dialects, reductions, and what a caption may be."""

import gzip
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch

from clipa_kernels.masking import block_text, random_text, syntax_text, truncate_text
from data.text import (
    STRATEGIES,
    Tokenizer,
    bert_wordpiece,
    clip_bpe,
    load_tokenizer,
    part_of_speech_priority,
    train_wordpiece,
)

CAPTIONS = [
    "a brown dog running on the green grass near a red ball",
    "two young women riding bicycles down a busy street",
    "red balloon",
    "",
    "smiling face with heart-eyes, love, face, eyes, smile, happy, yellow, round",
]
ODD = [
    "",
    "   ",
    "a &amp;amp; b &lt;tag&gt;",
    "Café naïve don\u2019t \u201cquoted\u201d",
    "你好 world",
    "12345 67.8%",
    "x" * 300,
    "😀😀 hi",
    "A\tB\nC  D\r\n",
    "it's we've I'LL you're he'd",
    "\uff26\uff35\uff2c\uff2c width",
    "ÃƒÂ© mojibake",
    "ﬁne ligature",
    "e\u0301 combining",
    "İstanbul ß ẞ",
    "\u0661\u0662 ٣ ½ ² ①",
    "_under_score_ --- ...!!!",
    "\x00control\x07",
    "word " * 200,
]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer(train_wordpiece(CAPTIONS, 120))


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return clip_bpe()


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "ball", "##oon", "a", "dog"]
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return bert_wordpiece(path)


def rows(tokenizer: Tokenizer, captions: list[str], context: int, **how) -> list[list[int]]:
    ids, cu_seqlens, longest = tokenizer.encode(captions, context, **how)
    assert ids.dtype == torch.int64
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens[0] == 0
    assert cu_seqlens[-1] == len(ids)
    found = [ids[a:b].tolist() for a, b in pairwise(cu_seqlens.tolist())]
    assert longest == max(map(len, found), default=0)
    return found


@pytest.mark.parametrize("context", [77, 16, 8])
def test_clip_ids_are_open_clips(clip, context):
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.SimpleTokenizer()
    captions = CAPTIONS + ODD
    expected = theirs(captions, context)
    for ours, padded in zip(rows(clip, captions, context), expected.tolist(), strict=True):
        assert ours == padded[: len(ours)]
        assert not any(padded[len(ours) :])
    assert (clip.start, clip.end, clip.vocab_size) == (49406, 49407, 49408)


def test_clip_ids_are_open_clips_on_every_emoji_caption(clip):
    open_clip = pytest.importorskip("open_clip")
    from data.drawings import _entries

    captions = [f"{entry.name}, {', '.join(entry.keywords)}" for entry in _entries()]
    expected = open_clip.SimpleTokenizer()(captions, 77)
    for ours, padded in zip(rows(clip, captions, 77), expected.tolist(), strict=True):
        assert ours == padded[: len(ours)]
    assert len(captions) > 1900


def test_bert_dialect_has_no_end_and_is_cut_after_cls(bert):
    assert rows(bert, ["red balloon dog", "", "a a a a"], 3) == [[2, 5, 6], [2], [2, 8, 8]]
    assert bert.end is None
    assert bert.vocab_size == 10


def test_bert_pads_to_the_context(bert):
    assert rows(bert, ["red dog", ""], 4, pad=True) == [[2, 5, 9, 0], [2, 0, 0, 0]]


def test_trained_wordpiece_ends_with_the_largest_id(words):
    for row in rows(words, CAPTIONS, 6):
        assert row[0] == words.start
        assert row[-1] == words.end == words.vocab_size - 1 == max(row)
        assert len(row) <= 6


def test_trained_wordpiece_without_start():
    tokenizer = Tokenizer(train_wordpiece(CAPTIONS, 120, start=False))
    assert tokenizer.start is None
    assert rows(tokenizer, [""], 4) == [[tokenizer.end]]


def test_trained_wordpiece_is_the_same_in_every_process():
    program = (
        "from data.text import train_wordpiece\nfrom data.drawings import _entries\n"
        "import hashlib\ncaptions = [e.name for e in _entries()]\n"
        "print(hashlib.sha256(train_wordpiece(captions, 900).to_str().encode()).hexdigest())"
    )
    root = Path(__file__).parent.parent
    found = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(3)
    }
    assert len(found) == 1


def test_trained_wordpiece_reads_what_it_learned(words):
    unknown = words.tokenizer.token_to_id("[UNK]")
    assert not any(unknown in row for row in rows(words, CAPTIONS, 77))


def test_trained_wordpiece_of_a_large_alphabet_keeps_to_its_size():
    captions = ["".join(map(chr, range(0x4E00 + i, 0x4E00 + i + 40))) for i in range(0, 400, 40)]
    tokenizer = train_wordpiece(captions, 100)
    assert tokenizer.get_vocab_size() <= 100
    assert tokenizer.token_to_id("[EOT]") == tokenizer.get_vocab_size() - 1


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dialect", ["words", "clip"])
def test_reduction_keeps_what_masking_chooses(strategy, dialect, request):
    tokenizer = request.getfixturevalue(dialect)
    key = {"seed": 3, "step": 7, "first_sample": 100}
    content = [row[1:-1] for row in rows(tokenizer, CAPTIONS, 77)]
    lengths = torch.tensor([len(row) for row in content])
    flat = torch.tensor([token for row in content for token in row])
    if strategy == "truncate":
        keep, kept = truncate_text(lengths, 4)
    elif strategy == "syntax":
        keep, kept = syntax_text(flat, lengths, 4, part_of_speech_priority(tokenizer))
    else:
        keep, kept = {"random": random_text, "block": block_text}[strategy](lengths, 4, **key)
    expected = [part.tolist() for part in flat[keep].split(kept.tolist())]
    found = rows(tokenizer, CAPTIONS, 6, strategy=strategy, **key)
    assert [row[1:-1] for row in found] == expected
    assert all((row[0], row[-1]) == (tokenizer.start, tokenizer.end) for row in found)


def test_rows_do_not_depend_on_how_a_batch_is_split(words):
    key = {"strategy": "random", "seed": 1, "step": 2}
    whole = rows(words, CAPTIONS, 6, first_sample=10, **key)
    parts = rows(words, CAPTIONS[:2], 6, first_sample=10, **key)
    parts += rows(words, CAPTIONS[2:], 6, first_sample=12, **key)
    assert whole == parts
    assert whole != rows(words, CAPTIONS, 6, first_sample=11, **key)


def test_empty_batch(words):
    assert rows(words, [], 8) == []


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dialect", ["words", "clip"])
def test_of_ten_thousand_words_few_are_tokenized(strategy, dialect, request, monkeypatch):
    tokenizer, asked = request.getfixturevalue(dialect), []
    rows(tokenizer, ["warm up"], 16, strategy=strategy)
    encode = tokenizer.tokenizer.encode_batch_fast

    def counted(texts, **options):
        asked.extend(texts)
        return encode(texts, **options)

    monkeypatch.setattr(tokenizer, "tokenizer", SimpleNamespace(encode_batch_fast=counted))
    found = rows(tokenizer, [f"lighthouse {strategy} " * 5000, "a"], 16, strategy=strategy)
    assert 4000 < max(map(len, asked)) <= 4096
    assert len(found[0]) == 16 > len(found[1])


def test_only_the_first_4096_characters_count(words):
    text = "dog " * 1023 + "a b"
    assert len(text) == 4095
    assert rows(words, [text + " ball" * 500], 5000) == rows(words, [text], 5000)


def test_priorities_are_parts_of_speech(words, clip):
    for tokenizer, suffix in ((words, ""), (clip, "</w>")):
        priority = part_of_speech_priority(tokenizer)
        assert priority.dtype == torch.uint8
        assert len(priority) == tokenizer.vocab_size
        vocabulary = tokenizer.tokenizer.get_vocab()
        expected = {"dog": 1, "red": 2, "the": 4, "two": 4, "riding": 3}
        known = {w: vocabulary[w + suffix] for w in expected if w + suffix in vocabulary}
        assert len(known) >= 2
        assert {w: int(priority[i]) for w, i in known.items()} == {w: expected[w] for w in known}
        assert int(priority[tokenizer.end]) == 4


def test_syntax_keeps_the_nouns(clip):
    sentence = ["the very quickly running green dog of the old street"]
    kept = rows(clip, sentence, 5, strategy="syntax")[0]
    pieces = [clip.tokenizer.id_to_token(token) for token in kept[1:-1]]
    assert pieces == ["green</w>", "dog</w>", "street</w>"]


@pytest.mark.parametrize("dialect", ["words", "clip", "bert"])
def test_round_trip_by_json_and_file(dialect, request, tmp_path):
    tokenizer = request.getfixturevalue(dialect)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    for copy in (Tokenizer.from_json(tokenizer.to_json()), load_tokenizer(path)):
        assert (copy.start, copy.end, copy.pad) == (tokenizer.start, tokenizer.end, tokenizer.pad)
        assert copy.vocab_size == tokenizer.vocab_size
        assert rows(copy, CAPTIONS + ODD, 20) == rows(tokenizer, CAPTIONS + ODD, 20)


def test_remembered_captions_do_not_pile_up(words, monkeypatch):
    monkeypatch.setattr("data.text._REMEMBERED", 10)
    fresh = Tokenizer(words.tokenizer)
    for start in range(0, 60, 6):
        captions = [f"dog {'ball ' * (i % 4)}" + "a" * i for i in range(start, start + 6)]
        assert rows(fresh, captions, 9) == rows(words, captions, 9)
        assert len(fresh._known) <= 10
    captions = [f"dog {i}" for i in range(30)]
    assert rows(fresh, captions, 9) == rows(words, captions, 9)
    assert rows(fresh, captions[:3], 9) == rows(words, captions[:3], 9)
    assert len(fresh._known) <= 10


def wordless(kind: str) -> Tokenizer:
    """A vocabulary of one letter, without a token for other words."""
    return Tokenizer(tokenizers.Tokenizer(getattr(tokenizers.models, kind)({"a": 0})))


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda t: t.encode(["a"], 2), ValueError, "encode: context must be above its 2 special"),
        (lambda t: t.encode(["a"], 8, strategy="words"), ValueError, "strategy must be one of"),
        (lambda t: t.encode("a b", 8), TypeError, "captions must be a list of strings"),
        (lambda t: t.encode(["a", None], 8), TypeError, "captions must be strings, got NoneType"),
        (lambda t: t.encode(["a"], 8, strategy="random", seed=-1), ValueError, "seed must be"),
        (lambda t: Tokenizer("bert"), TypeError, "must be a tokenizers.Tokenizer, got str"),
        (lambda t: Tokenizer.from_json("{"), ValueError, "text must be a tokenizer's JSON"),
        (lambda t: train_wordpiece(["a"], 3), ValueError, "vocab_size must be at least 8, got 3"),
        (lambda t: load_tokenizer("/no/such.json"), ValueError, "path must be a file, got"),
        (lambda t: bert_wordpiece("/no/vocab.txt"), ValueError, "path must be a file, got"),
        (lambda t: wordless("WordPiece").encode(["b"], 8), ValueError, "must have an id, got Word"),
        (lambda t: wordless("WordLevel").encode(["b"], 8), ValueError, "must have an id, got Word"),
        (lambda t: clip_bpe("/no/such.txt.gz"), ValueError, "must be a gzipped merge table"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(words, call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(words)


def test_bad_files(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("red\nball\n")
    with pytest.raises(ValueError, match=r"must list \[UNK\] and \[CLS\], got 2 lines"):
        load_tokenizer(vocabulary)
    merges = tmp_path / "merges.txt.gz"
    merges.write_bytes(gzip.compress(b"#version\na b c\n"))
    with pytest.raises(ValueError, match="must hold two pieces a line"):
        load_tokenizer(merges)
    merges.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="must be a gzipped merge table"):
        load_tokenizer(merges)


def test_a_vocabulary_without_special_tokens_refuses_an_empty_caption():
    plain = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "u": 1}, "u")))
    assert rows(plain, ["a"], 4) == [[0]]
    with pytest.raises(ValueError, match="must give at least one token"):
        plain.encode([""], 4)
