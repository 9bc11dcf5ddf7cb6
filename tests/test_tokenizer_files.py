"""Tokenizer files as others write them: line ends, encodings, lengths, and what is none."""

import gzip
import json
import struct
from pathlib import Path

import pytest

from data.files import whole
from data.text import Tokenizer, clip_bpe, load_tokenizer, train_wordpiece
from data.vocabularies import _installed_merges

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]


@pytest.fixture(scope="module")
def merges() -> list[str]:
    """CLIP's own merges, the most there may be."""
    lines = gzip.decompress(_installed_merges().read_bytes()).decode().split("\n")
    return lines[1 : 1 + 48_894]


def written(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


@pytest.mark.parametrize("separator", SEPARATORS, ids=lambda one: f"U+{ord(one):04X}")
def test_a_piece_that_splits_lines_elsewhere_shifts_no_id(tmp_path, separator):
    text = "\n".join([*PIECES, separator, "red", "boat"]) + "\n"
    words = load_tokenizer(written(tmp_path, "vocab.txt", text.encode()))
    assert words.encode(["red boat"], 8)[0].tolist() == [2, 6, 7]
    assert words.vocab_size == 8


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["newline", "return"])
@pytest.mark.parametrize("last", [0, 1, 4])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
def test_line_ends_and_marks_shift_no_id(tmp_path, mark, end, last, encoding):
    if encoding != "utf-8":
        mark = "\ufeff"
    text = mark + end.join([*PIECES, "red", "\u4e2d", "red", "boat"]) + end * last
    words = load_tokenizer(written(tmp_path, "vocab.txt", text.encode(encoding)))
    assert words.encode(["red \u4e2d boat"], 8)[0].tolist() == [2, 7, 6, 8]  # the later "red"
    assert (words.pad, words.vocab_size) == (0, 9)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_tokenizer_json_of_every_encoding(tmp_path, encoding):
    words = Tokenizer(train_wordpiece(["a red boat"], 40))
    path = written(tmp_path, "tokenizer.json", words.to_json().encode(encoding))
    read = load_tokenizer(path)
    assert read.encode(["red boat"], 8)[0].tolist() == words.encode(["red boat"], 8)[0].tolist()


def test_clips_own_table_in_other_lengths(tmp_path, merges):
    ids = clip_bpe().encode(["a red boat"], 8)[0].tolist()
    tables = {
        "whole": ["#version: 0.2", *merges],
        "more": ["#version: 0.2", *merges, "zz zz", "broken"],
        "bare": merges,
        "of two words": ["# merges", *merges],
        "of two other words": ["made yesterday", *merges],
        "returns": ["#version: 0.2\r", *(f"{line}\r" for line in merges), ""],
    }
    for name, lines in tables.items():
        path = written(tmp_path, f"{name}.GZ", gzip.compress("\n".join(lines).encode(), 1))
        words = load_tokenizer(path)
        assert words.encode(["a red boat"], 8)[0].tolist() == ids, name
        assert (words.start, words.end, words.vocab_size) == (49406, 49407, 49408)


def test_a_table_that_gives_other_ids_is_refused(tmp_path, merges):
    head = "#version: 0.2"
    tables = {
        "one short": ([head, *merges[:-1]], "of 48894 different merges or more, got 48893"),
        "half": ([head, *merges[:24_000], "", ""], "different merges or more, got 24000"),
        "one lost amid": ([head, *merges[:99], *merges[100:], "q zz"], "merges of what is made"),
        "two heads": ([head, "# merges", *merges], "merges of what is made before, got '# merg"),
        "backwards": ([head, *merges[::-1]], "merges of what is made before, got"),
        "none": ([head], "different merges or more, got 0"),
        "twice": ([head, *merges[:-1], merges[0]], "different merges or more, got 48893"),
        "without word ends": ([head, *(line.replace("</w>", "") for line in merges)], "different"),
        "hole": ([head, *merges[:9], "", *merges[9:]], "must hold two pieces a line"),
    }
    for name, (lines, sentence) in tables.items():
        path = written(tmp_path, f"{name}.gz", gzip.compress("\n".join(lines).encode(), 1))
        with pytest.raises(ValueError, match=f"clip_bpe: .*{sentence}"):
            load_tokenizer(path)
    whole_file = gzip.compress("\n".join([head, *merges]).encode(), 1)
    for data in (whole_file[:-9], whole_file[:5000] + b"\xff" * 64 + whole_file[5064:]):
        with pytest.raises(ValueError, match="clip_bpe: path must be a gzipped merge table"):
            load_tokenizer(written(tmp_path, "bad.gz", data))


def sentencepiece() -> bytes:
    """The first pieces of a SentencePiece file: messages of text, score and kind."""
    parts = b""
    for piece, score, kind in (("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("\u2581the", -3.2, 1)):
        text = piece.encode()
        body = b"\n" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score)
        body += b"\x18" + bytes([kind])
        parts += b"\n" + bytes([len(body)]) + body
    return parts


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.model", "tokenizer.json", "vocab.txt"])
def test_a_sentencepiece_file_is_called_by_its_name(tmp_path, name):
    sentence = f"{name} must be .* got a SentencePiece model; .*save_pretrained"
    for data in (sentencepiece(), sentencepiece() + b"\x80\xff"):
        with pytest.raises(ValueError, match=sentence) as told:
            load_tokenizer(written(tmp_path, name, data))
        assert type(told.value) is ValueError


@pytest.mark.parametrize("name", ["words.json", "words.bin", "vocab.txt"])
@pytest.mark.parametrize(
    ("data", "came"),
    [
        (b"PK\x03\x04\xff\xfe", "a zip file"),
        (b"\x80\x04\x95\xff", "a Python pickle"),
        (gzip.compress(b"text"), "gzip data"),
        ("caf\xe9".encode("latin-1"), "bytes that are no UTF-8"),
        (b"\xff\xfe\x00", "bytes that are no UTF-8"),
    ],
    ids=["zip", "pickle", "gzip", "latin-1", "half"],
)
def test_other_files_are_called_by_their_names(tmp_path, name, data, came):
    with pytest.raises(ValueError, match=f"{name} must be text in UTF-8, got {came}") as told:
        load_tokenizer(written(tmp_path, name, data))
    assert type(told.value) is ValueError


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"the": 1}', json.dumps({"model": 1})])
def test_json_that_is_no_tokenizer_is_named(tmp_path, text):
    path = written(tmp_path, "vocab.json", text.encode())
    with pytest.raises(ValueError, match=r"load_tokenizer: .*vocab.json: .*a tokenizer's JSON"):
        load_tokenizer(path)


def test_half_a_surrogate_pair_is_a_replacement():
    assert whole("a \ud83d b \udc00") == "a \ufffd b \ufffd"
    assert whole("\ud83d\ude00 c") == "\U0001f600 c"
    plain = "caf\xe9 \U0001f600 \0"
    assert whole(plain) is plain
    for words in (Tokenizer(train_wordpiece(["a boat \ud83d"], 40)), clip_bpe()):
        halves, marks = (words.encode([f"a boat {end}"], 9)[0] for end in ("\udc00", "\ufffd"))
        assert halves.tolist() == marks.tolist()


def test_what_is_remembered_of_a_long_caption_is_cut():
    words = Tokenizer(train_wordpiece(["a red boat"], 40))
    ids = words.encode(["a red boat " * 10**5], 16)[0].tolist()
    assert ids == words.encode(["a red boat " * 10**4], 16)[0].tolist()
    assert max(map(len, words._known)) <= 4096
