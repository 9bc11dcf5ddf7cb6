"""Vocabularies: learnt from captions, or read from the files that others keep them in."""

import gzip
import zlib
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from .files import decoded, read_text, whole

_CLIP_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
_CLIP_MERGES = 49152 - 256 - 2  # of the table's 262,144 lines


def train_wordpiece(
    captions: Iterable[str], vocab_size: int, *, start: bool = True
) -> tokenizers.Tokenizer:
    """A lower-case WordPiece vocabulary from captions, the same on every run and machine.

    Args:
        captions: text to learn from. vocab_size: ids at most, special tokens included.
        start: whether rows begin with [CLS]. [PAD] is 0, [UNK] 1, [EOT] the largest id.

    Raises:
        ValueError: vocab_size leaves no room for the letters.
    """
    if vocab_size < 8:
        raise ValueError(f"train_wordpiece: vocab_size must be at least 8, got {vocab_size}")
    tokenizer = _wordpiece({})
    normal = [tokenizer.normalizer.normalize_str(whole(one)) for one in captions]
    counts = Counter(letter for one in normal for letter in one if not letter.isspace())
    ranked = sorted(counts, key=lambda letter: (-counts[letter], letter))
    specials = ["[PAD]", "[UNK]"] + ["[CLS]"] * start
    kept = set(ranked[: (vocab_size - 1 - len(specials)) // 2])
    if len(kept) < len(ranked):  # rare letters of a large alphabet become [UNK]
        normal = ["".join(c if c in kept else " " for c in one) for one in normal]
    # The trainer numbers "##x" pieces in the order of a hash table and breaks ties by number, so
    # every run gives other pieces. Numbered here first, as special tokens, there is one order.
    specials += [f"##{letter}" for letter in sorted(kept)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size - 1, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(normal, trainer)
    found = tokenizer.get_vocab()
    found["[EOT]"] = len(found)
    return _wordpiece(found)


def read_wordpiece(path: Path) -> tokenizers.Tokenizer:
    """`text.bert_wordpiece` as the library's own tokenizer."""
    # A line ends by a newline alone: U+2028, U+0085 and others are pieces of some vocabularies.
    text = read_text(path, "bert_wordpiece").rstrip("\r\n")
    pieces = [line.removesuffix("\r") for line in text.split("\n")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    if not {"[UNK]", "[CLS]"} <= vocabulary.keys():
        raise ValueError(
            f"bert_wordpiece: {path} must list [UNK] and [CLS], got {len(pieces)} lines"
        )
    return _wordpiece(vocabulary)


def read_clip_merges(path: Path | None) -> tokenizers.Tokenizer:
    """`text.clip_bpe` as the library's own tokenizer."""
    path = _installed_merges() if path is None else path
    try:
        lines = decoded(gzip.decompress(path.read_bytes())).split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"clip_bpe: path must be a gzipped merge table, got {error}") from error
    letters = _byte_letters()
    letters += [f"{letter}</w>" for letter in letters]
    # The first merge is of two letters, as there is nothing else yet; another line is a heading.
    first = int(len(lines[0].split()) != 2 or not {*lines[0].split()} <= {*letters})
    merges = [tuple(line.split()) for line in lines[first : first + _CLIP_MERGES]]
    while merges and not merges[-1]:
        merges.pop()
    if any(len(merge) != 2 for merge in merges):
        raise ValueError(f"clip_bpe: {path} must hold two pieces a line, got others")
    pieces = letters + ["".join(pair) for pair in merges]
    specials = ["<start_of_text>", "<end_of_text>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces + specials)}
    # Ids are places in the table: those of one that is cut or another model's mean other pieces.
    ours = len(merges) == _CLIP_MERGES and any(end.endswith("</w>") for _, end in merges)
    if not ours or len(vocabulary) < len(pieces) + len(specials):
        raise ValueError(
            f"clip_bpe: {path} must be CLIP's table of {_CLIP_MERGES} different merges or more, "
            f"got {len(set(merges))}"
        )
    for place, merge in enumerate(merges, len(letters)):
        if max(map(vocabulary.get, merge, (place, place))) >= place:
            raise ValueError(
                f"clip_bpe: {path} must hold merges of what is made before, got {' '.join(merge)!r}"
            )
    model = models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>")
    tokenizer = tokenizers.Tokenizer(model)
    split = pre_tokenizers.Split(tokenizers.Regex(_CLIP_PATTERN), "removed", invert=True)
    bytes_to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_to_letters])
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _wordpiece(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """BERT's uncased normaliser, word splitter and greedy longest match."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _installed_merges() -> Path:
    """CLIP's merge table as a package brings it; no code of the package runs."""
    for package in ("clip", "open_clip"):  # of openai-clip and open_clip_torch
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            path = Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
            if path.is_file():
                return path
    raise RuntimeError(
        "clip_bpe: openai-clip or open_clip_torch must be installed where no path is given "
        "(pip install openai-clip), got neither"
    )


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte, in CLIP's order of ids: printable bytes first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
