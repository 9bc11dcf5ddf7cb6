"""Zero-shot classification and retrieval: figures by hand, folders and shards, errors."""

import io
import json
import os
import re
import sys
import tarfile
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from configs import changed
from PIL import Image

import evaluate
from data.pairs import Captions
from data.text import Tokenizer, train_wordpiece
from models import build
from training import checkpoint
from training.build import build_model
from training.config import preset
from training.evaluation import (
    PHOTO_PROMPTS,
    Encoder,
    classification,
    evaluate_classes,
    evaluate_folder,
    evaluate_shards,
    retrieval,
    table,
)
from training.evaluation import evaluate as evaluate_sets
from training.optim import adamw

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200), "dark_grey": (40, 40, 40)}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    words = [name.replace("_", " ") for name in COLOURS]
    tokenizer = Tokenizer(train_wordpiece([*words, "a photo of the picture."], 80))
    model = build("demo", 8, vision=dict(image_size=16), text=dict(context=12, vocab_size=80))
    return Encoder(model.eval(), tokenizer, torch.device("cpu"), batch_size=3)


def features(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 8, generator=generator), dim=-1)


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (20, 24), colour).save(file, "PNG")
    return file.getvalue()


def test_classification_counts_by_hand():
    images, classes, labels = features(40), features(9, 1), torch.arange(40) % 9
    ranks = [
        sorted(range(9), key=lambda c: -(images[i] @ classes[c]).item()).index(labels[i].item())
        for i in range(40)
    ]
    figures = classification(images, classes, labels)
    assert figures["top1"] == pytest.approx(sum(rank < 1 for rank in ranks) / 40)
    assert figures["top5"] == pytest.approx(sum(rank < 5 for rank in ranks) / 40)
    assert (figures["n"], figures["chance"]) == (40, 1 / 9)


def test_retrieval_counts_by_hand():
    """Text 7 has no image; the others have several: any of them counts."""
    images, texts, labels = features(20), features(8, 1), torch.arange(20) % 7
    figures = retrieval(images, texts, labels)
    hits = {1: 0, 5: 0}
    for t in range(7):
        order = sorted(range(20), key=lambda i: -(images[i] @ texts[t]).item())
        for at in hits:
            hits[at] += any(labels[i] == t for i in order[:at])
    assert figures["text_to_image_r1"] == pytest.approx(hits[1] / 7)
    assert figures["text_to_image_r5"] == pytest.approx(hits[5] / 7)
    assert figures["image_to_text_r1"] == classification(images, texts, labels)["top1"]


def test_perfect_features_are_perfect():
    eye = torch.eye(6)
    assert set(retrieval(eye, eye, torch.arange(6)).values()) == {1.0}
    assert classification(eye, eye, torch.arange(6))["top1"] == 1.0


def test_class_features_are_means_of_normalised_prompts(encoder):
    prompts = ("a photo of {}", "{}")
    both = encoder.classes(["red", "blue"], prompts)
    for row, name in zip(both, ["red", "blue"], strict=True):
        parts = [encoder.texts([prompt.format(name)])[0] for prompt in prompts]
        torch.testing.assert_close(row, F.normalize(sum(parts) / 2, dim=0))


def test_batches_do_not_change_features(encoder):
    images = torch.randint(256, (7, 20, 20, 3), dtype=torch.uint8)
    alone = torch.cat([encoder.images(image.unsqueeze(0)) for image in images])
    torch.testing.assert_close(encoder.images(images), alone)
    texts = ["red", "dark grey red blue", "blue", "green green"]
    torch.testing.assert_close(encoder.texts(texts), torch.cat([encoder.texts([t]) for t in texts]))
    assert encoder.images(images[:0]).shape == encoder.texts([]).shape == (0, 128)


def test_a_folder_of_class_folders(encoder, tmp_path):
    for name, colour in COLOURS.items():
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.png").write_bytes(png(colour))
    (tmp_path / "red" / "broken.png").write_bytes(b"no picture")
    figures = evaluate_folder(encoder, tmp_path)
    assert (figures["n"], figures["chance"], figures["skipped"]) == (8, 1 / 4, 1)
    names = ["blue", "dark grey", "green", "red"]  # folders in order, underscores as spaces
    pixels = torch.stack(
        [torch.tensor(COLOURS[n.replace(" ", "_")]).expand(4, 4, 3) for n in names]
    ).to(torch.uint8)
    classes = encoder.classes(names, PHOTO_PROMPTS)
    best = (encoder.images(pixels) @ classes.T).argmax(1)
    assert figures["top1"] == pytest.approx((best == torch.arange(4)).double().mean().item())
    (tmp_path / "classes.txt").write_text("red crimson thing\n")
    assert evaluate_folder(encoder, tmp_path)["n"] == 8


class Colours:
    """A perfect encoder: a picture's red level says which of `count` things it shows, a caption's
    last word too; the other words of a caption turn it a little, each its own way."""

    batch_size = 3
    model = SimpleNamespace(visual=SimpleNamespace(config=SimpleNamespace(image_size=8)))

    def __init__(self):
        self.asked = []

    def images(self, images):
        return torch.eye(32)[images[:, 0, 0, 0].long() // 10]

    def texts(self, texts):
        self.asked += texts
        turned = torch.tensor([16 + len(text.split()[0]) for text in texts])
        shown = torch.tensor([int(text.split()[-1]) for text in texts])
        return F.normalize(torch.eye(32)[shown] + 0.3 * torch.eye(32)[turned], dim=-1)

    def classes(self, names, prompts):
        self.asked += names
        return torch.ones(len(names), 32)


class Whole(Colours):
    """One that says nothing of batches."""

    batch_size = property()  # raises AttributeError


def thing(number):
    return png((10 * number, 0, 0))


CAPTIONS = [[f"{'x' * (1 + length)} {number}" for length in range(5)] for number in range(6)]
SHAPES = {  # members of each way to give a picture five captions
    "pairs": lambda i, texts: [
        (f"{i}{c}.{end}", data)
        for c, text in enumerate(texts)
        for end, data in (("png", thing(i)), ("txt", text.encode()))
    ],
    "lines": lambda i, texts: [
        (f"{i}.png", thing(i)),
        (f"{i}.txt", "\r\n".join(["", *texts, ""]).encode()),
    ],
    "list": lambda i, texts: [
        (f"{i}.png", thing(i)),
        (f"{i}.json", json.dumps({"caption": texts}).encode()),
    ],
}


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


@pytest.mark.parametrize("kind", [Colours, Whole])
@pytest.mark.parametrize("shape", SHAPES)
def test_several_captions_a_picture(tmp_path, shape, kind):
    members = [m for i, texts in enumerate(CAPTIONS) for m in SHAPES[shape](i, texts)]
    encoder = kind()
    figures = evaluate_shards(encoder, write_tar(tmp_path / "0.tar", members))
    assert [figures[key] for key in figures if "_to_" in key] == [1.0] * 4
    assert (figures["n"], figures["chance"], figures["skipped"]) == (6, 1 / 6, 0)
    assert encoder.asked == [text for texts in CAPTIONS for text in texts]


def test_a_sample_without_a_caption_is_counted(tmp_path):
    bad = ["[]", '{"caption": []}', '{"caption": [1, ""]}', '{"caption": " "}', "[" * 10**5]
    members = [m for i in (1, 2) for m in SHAPES["list"](i, CAPTIONS[i])]
    for i, text in enumerate(bad, 3):
        members += [(f"{i}.png", thing(i)), (f"{i}.json", text.encode())]
    figures = evaluate_shards(Colours(), write_tar(tmp_path / "0.tar", members))
    assert (figures["n"], figures["skipped"]) == (2, len(bad))


def test_half_a_surrogate_pair_in_one_caption_of_several(tmp_path):
    members = SHAPES["list"](1, ["a boat 1", "half \ud83d 1"])
    encoder = Colours()
    figures = evaluate_shards(encoder, write_tar(tmp_path / "0.tar", members))
    assert (figures["n"], figures["skipped"]) == (1, 0)
    assert encoder.asked == ["a boat 1", "half \ufffd 1"]  # as training reads it


def test_retrieval_of_many_to_many_by_hand():
    """Texts 4 and 6 have two images, image 2 has three texts; image 3 has none."""
    images, texts = features(6), features(8, 1)
    pairs = torch.tensor([[0, 0], [1, 4], [2, 4], [2, 5], [2, 6], [4, 6], [5, 7]])
    scores = images @ texts.T
    for flipped, name in ((False, "image_to_text"), (True, "text_to_image")):
        table = scores.T if flipped else scores
        partners = {}
        for pair in pairs.tolist():
            partners.setdefault(pair[flipped], set()).add(pair[not flipped])
        for at in (1, 5):
            hits = [
                bool(partners[row] & set(table[row].argsort(descending=True)[:at].tolist()))
                for row in partners
            ]
            figure = retrieval(images, texts, pairs)[f"{name}_r{at}"]
            assert figure == pytest.approx(sum(hits) / len(hits))


def test_pairs_of_shards(encoder, tmp_path):
    colours = [*COLOURS.items(), ("red", (210, 0, 0))]
    members = [
        (f"{i}.{end}", data)
        for i, (name, colour) in enumerate(colours)
        for end, data in (("png", png(colour)), ("txt", name.encode()))
    ]
    figures = evaluate_shards(encoder, write_tar(tmp_path / "0.tar", members))
    assert (figures["n"], figures["chance"], figures["skipped"]) == (5, 1 / 4, 0)
    assert "text_to_image_r5" in figures and figures["image_to_text_r5"] == 1.0
    assert "0.tar" in table({"shards: 0.tar": figures})


class Named(Colours):
    """Classes of things by the number at the end of their names."""

    def classes(self, names, prompts):
        self.prompts = prompts
        return torch.eye(32)[[int(name.split()[-1]) for name in names]]


def test_shards_are_classified_among_the_names_beside_them(tmp_path):
    """Things 1 and 2 by either caption, 3 has no name that is listed, and 5 is called 1."""
    captions = {1: ["a boat", "ship 1"], 2: ["ship 2", "ship 7"], 3: ["ship 3"], 5: ["ship 1"]}
    members = [m for number, texts in captions.items() for m in SHAPES["list"](number, texts)]
    pattern = write_tar(tmp_path / "0.tar", members)
    encoder, names = Named(), tmp_path / "classes.txt"
    encoder.texts = lambda texts: torch.ones(len(texts), 32)
    assert evaluate_classes(encoder, pattern) is None
    names.write_bytes(b"\xef\xbb\xbfship 1\r\n\r\n ship 2 \r\nship 7\nship 1\nhat 9\n")
    figures = evaluate_classes(encoder, pattern)
    assert figures == {"top1": 2 / 3, "top5": 1.0, "n": 3, "chance": 1 / 4, "skipped": 0}
    assert encoder.prompts == ("{}",)
    results, _ = evaluate_sets(encoder, None, shards=pattern, own_prompts=("a {}", "{}"))
    assert encoder.prompts == ("a {}", "{}")
    assert results == {
        "shards: 0.tar": evaluate_shards(encoder, pattern),
        "classes: 0.tar": figures,
    }
    assert "66.7  100.0" in table(results).splitlines()[-1]
    names.write_text("horse 1\n")
    with pytest.warns(UserWarning, match="must hold captions of .*'horse 1'"):
        assert evaluate_classes(encoder, pattern) is None


def test_the_names_of_shards_are_their_usual_captions(tmp_path):
    """Whatever key of the .json training draws, and retrieval reads."""
    sample = {"caption": "ship 1", "styled": "ship, red 1"}
    members = [("1.png", thing(1)), ("1.json", json.dumps(sample).encode())]
    pattern = write_tar(tmp_path / "0.tar", members)
    (tmp_path / "classes.txt").write_text("ship 1\n")
    encoder = Named()
    results, _ = evaluate_sets(encoder, None, shards=pattern, captions=Captions(("styled",)))
    assert encoder.asked == ["ship, red 1"] and results["classes: 0.tar"]["top1"] == 1


def class_folders(root, *names, bad=()):
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "1.png").write_bytes(png((200, 0, 0)))
    for name in bad:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no picture")


def test_folders_without_pictures_are_no_classes(tmp_path):
    class_folders(tmp_path, "cat", "dog", ".ipynb_checkpoints", "__MACOSX", "cat/deeper")
    class_folders(tmp_path, bad=["notes/read.txt", "dog/.DS_Store", "dog/._1.png", "a.txt"])
    (tmp_path / "empty").mkdir()
    encoder = Colours()
    with pytest.warns(UserWarning, match="are no classes: 'empty', 'notes'"):
        figures = evaluate_folder(encoder, tmp_path)
    assert encoder.asked == ["cat", "dog"]
    assert (figures["n"], figures["chance"], figures["skipped"]) == (2, 1 / 2, 1)


LISTS = {
    "spaces": (b"n01 cat\nn02 red dog\n", ""),
    "byte order mark": (b"\xef\xbb\xbfn01 cat\nn02 red dog\n", ""),
    "utf-16": ("n01 cat\nn02 red dog\n".encode("utf-16"), ""),
    "commas": (b"n01,cat\nn02, red dog\n", ""),
    "tabs, CRLF and blank lines": (b"\r\nn01\tcat\r\n\r\nn02\t red dog\r\n", ""),
    "quotes": (b'"n01","cat"\n"n02";"red dog"\n', ""),
    "utf-32": ("n01 cat\nn02 red dog\n".encode("utf-32"), ""),
    "old Mac lines": (b"n01 cat\rn02 red dog\r", ""),
    "colons": (b"n01: cat\nn02: red dog", ""),
    "a header and a stranger": (b"id,name\nn01,cat\nn02,red dog\nn3,x", "'id,name', 'n3,x'"),
    "twice": (b"n01 lynx\nn01 cat\nn02 red dog\n", "named twice in .*: 'n01'"),
    "no name": (b"n01 cat\nn02 red dog\nn02,\nn02\n", "name no folder .*: 'n02,', 'n02'"),
}


@pytest.mark.parametrize(("data", "says"), LISTS.values(), ids=LISTS)
def test_class_names_in_any_form(tmp_path, data, says):
    class_folders(tmp_path, "n01", "n02")
    (tmp_path / "classes.txt").write_bytes(data)
    encoder = Colours()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        evaluate_folder(encoder, tmp_path)
    assert encoder.asked == ["cat", "red dog"]
    assert len(said) == bool(says) and (not says or re.search(says, str(said[0].message)))


def test_class_names_with_spaces_commas_and_accents(tmp_path):
    class_folders(tmp_path, "polar", "polar bear", "cafe\u0301", "n01")
    text = "polar cold\npolar bear,white bear\ncaf\u00e9 coffee house\nn01 tench, Tinca tinca\n"
    (tmp_path / "classes.txt").write_text(text, encoding="utf-8")
    encoder = Colours()
    evaluate_folder(encoder, tmp_path)
    assert encoder.asked == ["coffee house", "tench, Tinca tinca", "cold", "white bear"]


@pytest.mark.parametrize("gap", "\x0b\x0c\x1c\x85\u2028\u2029")
def test_a_class_name_ends_at_the_end_of_its_line_alone(tmp_path, gap):
    class_folders(tmp_path, "n01", "n02")
    (tmp_path / "classes.txt").write_bytes(f"n01 wild{gap}cat\nn02 dog\n".encode())
    encoder = Colours()
    evaluate_folder(encoder, tmp_path)
    assert encoder.asked == [f"wild{gap}cat", "dog"]


def test_a_class_without_a_line_is_told(tmp_path):
    class_folders(tmp_path, "n01", "n02")
    (tmp_path / "classes.txt").write_bytes(b"n01 cat\n")
    encoder = Colours()
    with pytest.warns(UserWarning, match="does not name these classes, whose folders do: 'n02'"):
        evaluate_folder(encoder, tmp_path)
    assert encoder.asked == ["cat", "n02"]


def test_one_name_for_two_classes_is_told(tmp_path):
    class_folders(tmp_path, "red_fox", "red fox")
    with pytest.warns(UserWarning, match="several classes have one name: 'red fox'"):
        evaluate_folder(Colours(), tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS and Windows keep names in Unicode")
def test_folder_names_in_other_bytes(encoder, tmp_path):
    class_folders(tmp_path, "dog", os.fsdecode(b"caf\xe9"))
    seen = Colours()
    with pytest.warns(UserWarning, match="is not in UTF-8, read as 'caf\u00e9'"):
        evaluate_folder(seen, tmp_path)
    assert seen.asked == ["caf\u00e9", "dog"]
    with pytest.warns(UserWarning):
        assert evaluate_folder(encoder, tmp_path)["n"] == 2


def test_the_program_on_a_folder(encoder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = changed(preset("emoji"), run__impl="triton")  # of a machine with a GPU; here is none
    model = build_model(config, "full")
    run = tmp_path / "run"
    state = checkpoint.pack_state(
        model, adamw(model, config), config, "full", step=1, tokenizer=encoder.tokenizer.to_json()
    )
    checkpoint.save(run, state, 1)
    (tmp_path / "set" / "red").mkdir(parents=True)
    (tmp_path / "set" / "red" / "a.png").write_bytes(png((200, 0, 0)))
    flags = ["--images", str(tmp_path / "set"), "--json", "--device", "cpu"]
    evaluate.main([str(run), *flags])
    assert json.loads(capsys.readouterr().out)["images: set"]["top1"] == 1.0


BAD = {
    "no batch": (["x.pt", "--batch-size", "0"], r"batch_size must be in \[1, 1048576\], got 0"),
    "no folder": (["x.pt", "--images", "nowhere"], "must be a folder of class folders, got"),
    "no shard": (["x.pt", "--shards", "nowhere.tar"], "must name files that are there, got"),
    "no place for a name": (["x.pt", "--prompts", "a {};a photo"], "one {}, got 'a photo'"),
    "no device": (["x.pt", "--device", "toaster"], "device must be"),
    "no checkpoint": (["nowhere.pt"], "path must be a checkpoint file, got 'nowhere.pt'"),
    "empty folder": (["{}"], "must hold a checkpoint, got a folder without one"),
    "half a file": (["{}/half.pt"], "must be a whole checkpoint"),
}


@pytest.mark.parametrize(("words", "says"), BAD.values(), ids=BAD)
def test_bad_flags_and_files_end_with_a_sentence(tmp_path, words, says):
    if "half" in words[0]:
        (tmp_path / "half.pt").write_bytes(b"PK\x03\x04 half of it")
    with pytest.raises(SystemExit, match=rf"^evaluate\.py: .*{says}"):
        evaluate.main(["--device", "cpu", words[0].format(tmp_path), *words[1:]])


def test_bad_folders_are_named(encoder, tmp_path):
    with pytest.raises(ValueError, match="must be a folder of class folders"):
        evaluate_folder(encoder, tmp_path)
    (tmp_path / "red").mkdir()
    with pytest.raises(ValueError, match="must hold pictures that can be read, got none"):
        evaluate_folder(encoder, tmp_path)
    with pytest.raises(ValueError, match="must name files that are there"):
        evaluate_shards(encoder, str(tmp_path / "none.tar"))
    config = preset("emoji")
    came = f"must hold the tokenizer's 9000 entries, got {config.data.vocab_size}"
    with pytest.raises(ValueError, match=came):
        build_model(config, "full", 9000)
