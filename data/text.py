"""Captions to packed token ids, by any file of the `tokenizers` library.

A row is [start] + kept content tokens + [end]; which content tokens are kept when there are too
many is clipa_kernels.masking's choice. By the special tokens that a vocabulary holds:

    CLIP BPE            start and end: the first ids, the end token always there (open_clip's
                        "first N ids, the last overwritten by the end token" is the same)
    BERT WordPiece      [CLS] and no end token, as CLIPA-v2: [CLS] + first N - 1 pieces, no [SEP]
    trained WordPiece   [EOT] has the largest id, so that open_clip's argmax pooling finds it

A caption counts up to its first 4,096 characters, cut back to a space where one is near: one of
10,000 words costs no more than one of 700, and a longer context than 512 tokens is not meant.
"""

import html
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import tokenizers
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from clipa_kernels.masking import block_text, random_text, syntax_text, truncate_text

from .files import read_text, whole
from .vocabularies import read_clip_merges, read_wordpiece
from .vocabularies import train_wordpiece as train_wordpiece

MAX_CHARACTERS = 4096
STRATEGIES = ("truncate", "random", "block", "syntax")
_STARTS = ("<start_of_text>", "<|startoftext|>", "[CLS]")
_ENDS = ("<end_of_text>", "<|endoftext|>", "[EOT]")
_PADS = ("[PAD]",)
_REMEMBERED = 65536  # captions whose ids are kept: all of a small data set, little of a large one


class Tokenizer:
    """A tokenizers.Tokenizer with the start, end and pad ids of a CLIP text tower.

    Args:
        tokenizer: any tokenizers.Tokenizer. Start, end and pad are found by their usual names; a
            vocabulary without one of them does without (pad is then id 0).

    Attributes: start and end int or None, pad int, vocab_size int (largest id + 1).

    Raises:
        TypeError: tokenizer is not one.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        if not isinstance(tokenizer, tokenizers.Tokenizer):
            came = type(tokenizer).__name__
            raise TypeError(f"Tokenizer: tokenizer must be a tokenizers.Tokenizer, got {came}")
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.start = _first_id(_STARTS, vocabulary)
        self.end = _first_id(_ENDS, vocabulary)
        self.pad = _first_id(_PADS, vocabulary) or 0
        self._clean = _clean_clip if _STARTS[0] in vocabulary else str
        self._priority: Tensor | None = None
        self._known: dict[str, list[int]] = {}
        tokenizer.no_truncation()
        tokenizer.no_padding()

    def encode(
        self,
        captions: Sequence[str],
        context: int,
        *,
        strategy: str = "truncate",
        seed: int = 0,
        step: int = 0,
        first_sample: int = 0,
        pad: bool = False,
    ) -> tuple[Tensor, Tensor, int]:
        """Packed ids of a batch of captions.

        Args:
            captions: B strings; an empty one becomes its special tokens alone.
            context: tokens a row at most, start and end included.
            strategy: which content tokens of a longer caption stay: "truncate", "random", "block"
                or "syntax" (nouns, then adjectives, then verbs: `part_of_speech_priority`).
            seed, step, first_sample: what "random" and "block" depend on, with the row.
            pad: every row filled to `context` with the pad id (CLIPA-v2 attends its pads).

        Returns:
            ids: int64 [T], rows end to end.
            cu_seqlens: int32 [B + 1], where each row starts; the last is T.
            max_seqlen: length of the longest row.

        Raises:
            ValueError: the context leaves no content token, the strategy has no such name, a word
                is not in the vocabulary, which has no token for such, or a caption has no token at
                all and the vocabulary no special ones.
            TypeError: a caption is not a string.

        >>> words = Tokenizer(train_wordpiece(["red balloon", "blue balloon"], 40))
        >>> ids, cu_seqlens, max_seqlen = words.encode(["red balloon", ""], 8)
        >>> cu_seqlens, max_seqlen
        (tensor([0, 4, 6], dtype=torch.int32), 4)
        """
        edges = (self.start is not None) + (self.end is not None)
        if context <= edges:
            raise ValueError(
                f"encode: context must be above its {edges} special tokens, got {context}"
            )
        lists = self._content(captions)
        lengths = torch.tensor([len(one) for one in lists], dtype=torch.int64)
        flat = torch.tensor([token for one in lists for token in one], dtype=torch.int64)
        key = {"seed": seed, "step": step, "first_sample": first_sample}
        keep, kept = self._choose(flat, lengths, context - edges, strategy, key)
        row = torch.full_like(kept, context) if pad else kept + edges
        if bool((row == 0).any()):
            raise ValueError("encode: a caption must give at least one token, got an empty one")
        cu_seqlens = torch.nn.functional.pad(row.cumsum(0), (1, 0))
        ids = self._lay_out(flat[keep], kept, cu_seqlens)
        return ids, cu_seqlens.to(torch.int32), int(row.max()) if len(row) else 0

    def to_json(self) -> str:
        """The tokenizer as `tokenizers` writes it; `from_json` reads it back.

        Its post-processor sets the start and end tokens, so that whoever else reads it gives the
        same rows.
        """
        around = [i for i in (self.start, "$A", self.end) if i is not None]
        names = {i: self.tokenizer.id_to_token(i) for i in around if i != "$A"}
        copy = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        copy.post_processor = TemplateProcessing(
            single=[names.get(i, i) for i in around],
            special_tokens=[(name, i) for i, name in names.items()],
        )
        return copy.to_str()

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """A tokenizer from the contents of a tokenizer.json."""
        try:
            return cls(tokenizers.Tokenizer.from_str(text))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"Tokenizer: text must be a tokenizer's JSON, got {error}") from error

    def save(self, path: Path | str) -> None:
        """Write tokenizer.json."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def _content(self, captions: Sequence[str]) -> list[list[int]]:
        """Content ids of each caption, remembered for captions that come again."""
        if isinstance(captions, str):
            raise TypeError("encode: captions must be a list of strings, got one string")
        for one in captions:
            if not isinstance(one, str):
                raise TypeError(f"encode: captions must be strings, got {type(one).__name__}")
        captions = [_cut(one) for one in captions]  # what is remembered has a bound, too
        known = self._known
        fresh = [one for one in dict.fromkeys(captions) if one not in known]
        if len(known) + len(fresh) > _REMEMBERED:
            known = {one: known[one] for one in captions if one in known}
            self._known = known if len(fresh) < _REMEMBERED else {}
        texts = [self._clean(whole(one)) for one in fresh]
        try:
            found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception: a word without an id
            raise ValueError(f"encode: every word must have an id, got {error}") from error
        known.update(zip(fresh, (one.ids for one in found), strict=True))
        return [known[one] for one in captions]

    def _lay_out(self, content: Tensor, kept: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Rows of start, content (kept[b] of the flat tokens), end, and pads up to the next row."""
        ids = torch.full((int(cu_seqlens[-1]),), self.pad, dtype=torch.int64)
        first = cu_seqlens[:-1] + (self.start is not None)
        # Content token t of row b goes to first[b] + t.
        shift = (first - (kept.cumsum(0) - kept)).repeat_interleave(kept)
        ids[shift + torch.arange(len(content))] = content
        if self.start is not None:
            ids[cu_seqlens[:-1]] = self.start
        if self.end is not None:
            ids[first + kept] = self.end
        return ids

    def _choose(
        self, flat: Tensor, lengths: Tensor, content: int, strategy: str, key: dict[str, int]
    ) -> tuple[Tensor, Tensor]:
        if strategy == "truncate":
            return truncate_text(lengths, content)
        if strategy == "random":
            return random_text(lengths, content, **key)
        if strategy == "block":
            return block_text(lengths, content, **key)
        if strategy == "syntax":
            if self._priority is None:
                self._priority = part_of_speech_priority(self)
            return syntax_text(flat, lengths, content, self._priority)
        known = ", ".join(STRATEGIES)
        raise ValueError(f"encode: strategy must be one of {known}, got {strategy!r}")


def load_tokenizer(path: Path | str) -> Tokenizer:
    """A tokenizer by its file: tokenizer.json, BERT's vocab.txt, or CLIP's bpe_*.txt.gz.

    Raises:
        ValueError: the file is missing or none of these. A SentencePiece model is none; the message
            says how to convert it.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".gz" and path.is_file():
        return clip_bpe(path)
    if suffix == ".txt":
        return bert_wordpiece(path)
    text = read_text(path, "load_tokenizer")
    try:
        return Tokenizer.from_json(text)
    except ValueError as error:
        raise ValueError(f"load_tokenizer: {path}: {error}") from error


def bert_wordpiece(path: Path | str) -> Tokenizer:
    """BERT's uncased WordPiece from its vocab.txt: one piece a line, the line number is the id.

    A line ends by a newline, with or without a carriage return, and by nothing else. Of a piece
    that comes twice the later line counts; empty lines at the end do not.

    Raises:
        ValueError: the file is missing, is not text, or lacks [UNK] or [CLS].
    """
    return Tokenizer(read_wordpiece(Path(path)))


def clip_bpe(path: Path | str | None = None) -> Tokenizer:
    """CLIP's byte-pair vocabulary of 49,408 ids; gives open_clip.SimpleTokenizer's ids.

    Args:
        path: bpe_simple_vocab_16e6.txt.gz; None takes the copy in an installed openai-clip or
            open_clip_torch.

    Raises:
        ValueError: the file is missing or is not a merge table, has fewer merges than CLIP's, or
            one of pieces that none before it made.
        RuntimeError: path is None and neither is installed.
    """
    return Tokenizer(read_clip_merges(None if path is None else Path(path)))


def part_of_speech_priority(tokenizer: Tokenizer) -> Tensor:
    """What syntax masking keeps first: each vocabulary entry tagged alone, once.

    A tag is the entry's first one in Brill's lexicon (the file in the textblob package; no code of
    it runs). A word that is not there is a noun if it has a letter, unless its ending says -ly
    (adverb), -ing or -ed (verb).

    Returns:
        uint8 [vocab_size]: 1 nouns (NN*), 2 adjectives (JJ*), 3 verbs (VB*), 4 all else.

    Raises:
        RuntimeError: textblob is not installed.

    Source: CLIPA's JAX code, `noun_tokenize`, with another tagger.
    """
    lexicon = _lexicon()
    priority = torch.full((tokenizer.vocab_size,), 4, dtype=torch.uint8)
    specials = {*_STARTS, *_ENDS, *_PADS, "[UNK]", "[SEP]", "[MASK]"}
    for piece, number in tokenizer.tokenizer.get_vocab(with_added_tokens=True).items():
        if piece not in specials:
            word = piece.removeprefix("##").removesuffix("</w>")
            priority[number] = _RANKS.get(_tag(word, lexicon)[:2], 4)
    return priority


_RANKS = {"NN": 1, "JJ": 2, "VB": 3}


def _tag(word: str, lexicon: dict[str, str]) -> str:
    found = lexicon.get(word) or lexicon.get(word.lower())
    if found:
        return found
    if not any(letter.isalpha() for letter in word):
        return "SYM"
    for ending, tag in (("ly", "RB"), ("ing", "VBG"), ("ed", "VBD")):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            return tag
    return "NN"


def _lexicon() -> dict[str, str]:
    spec = find_spec("textblob")
    if spec is None:
        raise RuntimeError(
            "part_of_speech_priority: textblob must be installed, got no such package"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / "en" / "en-lexicon.txt"
    tags: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        parts = line.split()
        if len(parts) >= 2 and not line.startswith(";;;"):
            tags.setdefault(parts[0], parts[1])
    for word in list(tags):  # "English JJ" serves the lower-case piece "english"
        tags.setdefault(word.lower(), tags[word])
    return tags


def _first_id(names: tuple[str, ...], vocabulary: dict[str, int]) -> int | None:
    return next((vocabulary[name] for name in names if name in vocabulary), None)


def _cut(text: str) -> str:
    """The first 4,096 characters, less a last word of up to 64 that the cut may have halved."""
    if len(text) <= MAX_CHARACTERS:
        return text
    head, _, tail = text[:MAX_CHARACTERS].rpartition(" ")
    return head if head and len(tail) < 64 else text[:MAX_CHARACTERS]


def _clean_clip(text: str) -> str:
    """open_clip's cleaning: mended encodings, HTML entities resolved, one space, lower case."""
    try:
        import ftfy
    except ImportError:
        raise RuntimeError(
            "encode: CLIP's vocabulary needs ftfy (pip install ftfy), got no such package"
        ) from None
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip().lower()
