"""What is evaluated and how: names and templates, .cls, workers, whole sets, loss, what is said."""

import importlib
import io
import json
import math
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_evaluate import CAPTIONS, SHAPES, Colours, Named, encoder, thing, write_tar  # noqa: F401
from test_train import flags
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import train
from clipa_kernels.contrastive.api import contrastive_loss_reference, sigmoid_loss_reference
from data import folders, shards
from data.classes import Names, classes_in, prompts_in
from models import build
from training import figures
from training.evaluation import (
    check_sets,
    evaluate_classes,
    evaluate_folder,
    evaluate_shards,
    retrieval,
)
from training.evaluation import evaluate as evaluate_sets
from training.figures import pair_losses, table

MISSING = "come with open_clip (pip install open_clip_torch), or else be a file, one a line"


def numbered(number: int) -> bytes:
    """A picture of one pixel that holds a number."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1), (number >> 16, number >> 8 & 255, number & 255)).save(file, "PNG")
    return file.getvalue()


class Numbers:
    """A perfect encoder of `numbered` pictures, and of texts whose last word is a number."""

    batch_size = 64
    model = SimpleNamespace(visual=SimpleNamespace(config=SimpleNamespace(image_size=1)))

    def __init__(self, bits: int = 15):
        self.bits, self.asked, self.seen = bits, [], 0

    def _of(self, numbers: torch.Tensor) -> torch.Tensor:
        return (numbers[:, None] >> torch.arange(self.bits) & 1) * 2.0 - 1

    def images(self, images):
        self.seen += len(images)
        return self._of((images[:, 0, 0].long() * torch.tensor([2**16, 2**8, 1])).sum(1))

    def texts(self, texts):
        return self._of(torch.tensor([int(text.split()[-1]) for text in texts]))

    def classes(self, names, prompts):
        self.asked.append((tuple(names), tuple(prompts)))
        return self.texts(names)


@pytest.fixture
def open_clip(tmp_path, monkeypatch):
    """A package as open_clip's, whose import would fail."""
    (tmp_path / "site" / "open_clip").mkdir(parents=True)
    package = tmp_path / "site" / "open_clip"
    (package / "__init__.py").write_text("raise AssertionError('this takes seconds')")
    names = ", ".join(f"'thing {number}'" for number in range(1000))
    made = ", ".join(f"lambda c: f'{number} photos of a {{c}}.'" for number in range(80))
    text = f"IMAGENET_CLASSNAMES = ({names})\nOPENAI_IMAGENET_TEMPLATES = ({made})\n"
    (package / "zero_shot_metadata.py").write_text(text)
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()


@pytest.fixture
def imagenet(tmp_path):
    """A thousand folders called as WordNet's, with one picture each."""
    root = tmp_path / "val"
    for number in range(1000):
        folder = root / f"n{number:08}"
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(numbered(number))
    return root


def test_names_and_templates_of_open_clip(open_clip):
    assert classes_in("imagenet") == Names(tuple(f"thing {number}" for number in range(1000)))
    prompts = prompts_in("imagenet")
    assert len(prompts) == 80 and prompts[7] == "7 photos of a {}."


def test_the_real_open_clip_has_them():
    pytest.importorskip("open_clip")
    names, prompts = classes_in("imagenet").names, prompts_in("imagenet")
    assert (len(names), len(prompts)) == (1000, 80)
    assert (names[0], prompts[0]) == ("tench", "a bad photo of a {}.")


@pytest.mark.parametrize("flag", ["classes", "prompts"])
def test_without_open_clip_a_sentence_comes_before_any_work(flag, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(SystemExit) as end:
        evaluate.main(["nowhere.pt", f"--{flag}", "imagenet"])
    must = f"the {flag} imagenet must {MISSING}, got no such package"
    assert str(end.value) == f"evaluate.py: evaluate: {must}"
    with pytest.raises(SystemExit) as end:
        train.main(flags(tmp_path / "run", **{f"run__eval_{flag}": "imagenet"}))
    assert str(end.value) == f"train.py: evaluate: {must}"
    assert not (tmp_path / "run").exists()


FILES = {
    "names": ("tench\n\ngreat white shark\r\n", Names(("tench", "great white shark"))),
    "tabs": ("n02\tcat\nn01\t red  fox \n", Names(("red  fox", "cat"), ("n01", "n02"))),
    "WordNet's": (
        "n01443537 goldfish, Carassius\nn01440764: tench\n",
        Names(("tench", "goldfish, Carassius"), ("n01440764", "n01443537")),
    ),
}


@pytest.mark.parametrize(("text", "names"), FILES.values(), ids=FILES)
def test_names_in_a_file(tmp_path, text, names):
    (tmp_path / "names.txt").write_bytes(text.encode())
    assert classes_in(str(tmp_path / "names.txt")) == names


def test_templates_in_a_file(tmp_path):
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n\nart; of the {c}\n")
    assert prompts_in(str(tmp_path / "templates.txt")) == ("a photo of a {}.", "art; of the {}")


BAD = {
    "no file": (classes_in, None, "classes must be imagenet or a file of names, one a line, got"),
    "nothing": (classes_in, "\n", "classes must be names, one a line, got none in"),
    "both": (classes_in, "n01\tcat\ndog\n", "a name alone in each, got both, as 'dog'"),
    "twice": (classes_in, "n01\tcat\nn01\tdog\n", "must name a folder once, got 'n01' twice"),
    "no place": (prompts_in, "a {}\na photo\n", "each hold one {}, got 'a photo'"),
    "no template": (prompts_in, "\n", "each hold one {}, got ''"),
    "no templates": (prompts_in, None, "a file of them, or each hold one {}, got"),
}


@pytest.mark.parametrize(("read", "text", "says"), BAD.values(), ids=BAD)
def test_other_files_are_refused(tmp_path, read, text, says):
    path = tmp_path / "list.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError) as error:
        read(str(path))
    assert str(error.value).startswith("evaluate: ") and says in str(error.value)


def test_a_thousand_folders_and_names_and_eighty_templates(open_clip, imagenet):
    names, prompts = classes_in("imagenet"), prompts_in("imagenet")
    perfect = Numbers()
    check_sets(str(imagenet), classes="imagenet")
    told = []
    how = dict(images=str(imagenet), own_prompts=prompts, classes=names, say=told.append)
    results, _ = evaluate_sets(perfect, None, **how)
    assert results["images: val"]["top1"] == 1.0
    assert (results["images: val"]["n"], results["images: val"]["chance"]) == (1000, 1 / 1000)
    assert perfect.asked == [(names.names, prompts)]
    assert "80 templates x 1,000 classes; n 1,000, skipped 0" in told[0]


def test_folders_that_names_do_not_fit(tmp_path, imagenet):
    (imagenet / "n00000999" / "1.png").unlink()
    names = Names(tuple(f"thing {number}" for number in range(1000)))
    figures = evaluate_folder(Numbers(), imagenet, classes=names)  # a class without a picture
    assert (figures["n"], figures["chance"], figures["top1"]) == (999, 1 / 1000, 1.0)
    (imagenet / "n00000999").rmdir()
    with pytest.raises(ValueError, match=r"for each of the 1000 names of classes, got 999; lines"):
        evaluate_folder(Numbers(), imagenet, classes=names)
    (tmp_path / "names.txt").write_text("".join(f"thing {number}\n" for number in range(1000)))
    with pytest.raises(ValueError, match=r"for each of the 1000 names of classes, got 999; lines"):
        check_sets(str(imagenet), classes=str(tmp_path / "names.txt"))


def test_some_folders_of_a_list(tmp_path, imagenet):
    """Of a thousand lines, in any order, those of the folders that are there."""
    path = tmp_path / "names.txt"
    lines = [f"n{number:08}\tthing {number}\n" for number in reversed(range(1000))]
    path.write_text("".join(lines))
    for number in range(1000):
        if number % 100:
            (imagenet / f"n{number:08}" / "1.png").unlink()
            (imagenet / f"n{number:08}").rmdir()
    perfect = Numbers()
    figures = evaluate_folder(perfect, imagenet, ("{}",), classes=classes_in(str(path)))
    assert (figures["n"], figures["chance"], figures["top1"]) == (10, 1 / 10, 1.0)
    assert perfect.asked[0][0] == tuple(f"thing {number}" for number in range(0, 1000, 100))
    (imagenet / "n7").mkdir()
    with pytest.raises(ValueError, match="must name each folder of .*, got none for 1, .*'n7'"):
        check_sets(str(imagenet), classes=str(path))


def labelled(numbers, *, captions: bool = True, classes=int) -> list[tuple[str, bytes]]:
    members = []
    for i in numbers:
        members += [(f"{i}.png", numbered(i)), (f"{i}.cls", str(classes(i)).encode())]
        members += [(f"{i}.txt", b"picture %d" % i)] if captions else []
    return members


NAMES = Names(tuple(f"thing {number}" for number in range(10)))


@pytest.mark.parametrize("captions", [True, False])
def test_shards_whose_samples_have_a_number_beside_them(tmp_path, captions):
    """As ImageNet's: with captions these retrieve too, in the same pass over the pictures."""
    members = labelled(range(10), captions=captions, classes=lambda i: min(i, 8))
    members += [
        ("x.png", numbered(3)),
        ("x.cls", b"three\n"),
        ("y.png", b"broken"),
        ("y.cls", b"1"),
    ]
    pattern = write_tar(tmp_path / "0.tar", members)
    perfect = Numbers()
    with pytest.warns(UserWarning, match="1 by caption .*whole number, got 'three'.*1 by image"):
        results, _ = evaluate_sets(perfect, None, shards=pattern, classes=NAMES)
    expected = {"top1": 0.9, "n": 10, "chance": 1 / 10, "skipped": 2}
    assert results["classes: 0.tar"].items() >= expected.items()
    assert perfect.asked[0][0] == NAMES.names and len(perfect.asked[0][1]) == 4
    assert perfect.seen == 10
    assert ("shards: 0.tar" in results) == captions
    if captions:
        figures = results["shards: 0.tar"]
        assert (figures["image_to_text_r1"], figures["n"], figures["skipped"]) == (1.0, 10, 2)


def test_a_number_in_the_json_and_names_without_any(tmp_path):
    told = json.dumps({"caption": "picture 4", "cls": 4}).encode()
    members = [("4.png", numbered(4)), ("4.json", told), ("5.png", numbered(5)), ("5.txt", b"x 5")]
    pattern = write_tar(tmp_path / "0.tar", members)
    results, _ = evaluate_sets(Numbers(), None, shards=pattern, classes=NAMES)
    expected = {"top1": 1.0, "n": 1, "skipped": 1}  # the other one retrieves alone
    assert results["classes: 0.tar"].items() >= expected.items()
    assert results["shards: 0.tar"]["n"] == 2
    pattern = write_tar(tmp_path / "1.tar", members[2:])
    results, _ = evaluate_sets(Numbers(), None, shards=pattern, classes=NAMES)
    assert list(results) == ["shards: 1.tar"]


def test_numbers_come_before_the_list_beside_the_shards(tmp_path):
    (tmp_path / "classes.txt").write_text("picture 1\npicture 2\n")
    pattern, perfect = write_tar(tmp_path / "0.tar", labelled([1, 2, 3])), Numbers()
    results, _ = evaluate_sets(perfect, None, shards=pattern, classes=NAMES)
    assert results["classes: 0.tar"]["chance"] == 1 / 10
    results, _ = evaluate_sets(perfect, None, shards=pattern)
    assert results["classes: 0.tar"] == evaluate_classes(Numbers(), pattern)
    assert (results["classes: 0.tar"]["n"], results["classes: 0.tar"]["chance"]) == (2, 1 / 2)


def test_a_number_that_no_name_has(tmp_path):
    pattern = write_tar(tmp_path / "0.tar", labelled([1, 12]))
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in NAMES.names))
    must = r"classes must name each \.cls of .*0\.tar, got 10 names and the number 12"
    with pytest.raises(ValueError, match=must):
        check_sets(shards=pattern, classes=str(tmp_path / "names.txt"))
    with pytest.raises(ValueError, match=must):
        evaluate_sets(Numbers(), None, shards=pattern, classes=NAMES)


def test_class_features_are_computed_once_an_evaluation(tmp_path):
    for number in range(10):
        (tmp_path / "val" / f"{number}").mkdir(parents=True)
        (tmp_path / "val" / f"{number}" / "1.png").write_bytes(numbered(number))
    pattern, perfect = write_tar(tmp_path / "0.tar", labelled(range(10))), Numbers()
    how = dict(images=str(tmp_path / "val"), shards=pattern, classes=NAMES)
    results, _ = evaluate_sets(perfect, None, **how)
    assert [results[name]["top1"] for name in ("images: val", "classes: 0.tar")] == [1.0, 1.0]
    assert len(perfect.asked) == 1
    evaluate_sets(perfect, None, **how)  # of weights that may be others
    assert len(perfect.asked) == 2


def test_the_10_001st_pair_counts(tmp_path):
    members = [
        (f"{i}.{end}", data)
        for i in range(10_001)
        for end, data in (("png", numbered(i)), ("txt", b"picture %d" % i))
    ]
    figures = evaluate_shards(Numbers(), write_tar(tmp_path / "0.tar", members))
    assert (figures["n"], figures["image_to_text_r1"], figures["skipped"]) == (10_001, 1.0, 0)


def test_a_picture_in_several_batches_is_one(tmp_path):
    """Nine samples of three pictures, in batches of two."""
    perfect, members = Numbers(), []
    perfect.batch_size = 2
    for i in range(9):
        members += [(f"{i}.png", numbered(i % 3)), (f"{i}.txt", b"%s %d" % (b"x" * i, i % 3))]
    figures = evaluate_shards(perfect, write_tar(tmp_path / "0.tar", members))
    assert (figures["n"], figures["chance"]) == (3, 1 / 3)
    assert figures["image_to_text_r1"] == figures["text_to_image_r1"] == 1.0


@pytest.fixture
def counted(monkeypatch):
    """The threads that decoded a picture, one entry each time."""
    seen, true = [], folders.decode_square

    def spy(*args, **how):
        seen.append(threading.current_thread())
        return true(*args, **how)

    for module in (folders, shards):
        monkeypatch.setattr(module, "decode_square", spy)
    return seen


def photos(root, count: int):
    for name in ("red", "blue"):
        (root / name).mkdir(parents=True)
        for i in range(count):
            colour = (255 - i, i, 3) if name == "red" else (3, i, 255 - i)
            Image.new("RGB", (20, 24), colour).save(root / name / f"{i:03}.png")
    (root / "red" / "broken.png").write_bytes(b"no picture")
    return root


def test_workers_decode_and_change_nothing(encoder, tmp_path, counted):  # noqa: F811
    folder = photos(tmp_path / "photos", 10)
    members = [m for i, texts in enumerate(CAPTIONS) for m in SHAPES["pairs"](i, texts)]
    pattern = write_tar(tmp_path / "0.tar", [*members, ("x.png", b""), ("x.txt", b"x")])
    for function, given in ((evaluate_folder, folder), (evaluate_shards, pattern)):
        counted.clear()
        alone = function(encoder, given)
        assert len(counted) and threading.main_thread() not in counted  # while the other encodes
        counted.clear()
        before = torch.random.get_rng_state()
        assert function(encoder, given, workers=2) == alone and alone["skipped"] == 1
        assert not counted  # here
        assert torch.equal(before, torch.random.get_rng_state())


def test_no_more_than_a_few_batches_are_held(encoder, tmp_path, counted):  # noqa: F811
    folder, most = photos(tmp_path / "photos", 20), []
    seen = SimpleNamespace(**vars(encoder), texts=encoder.texts, classes=encoder.classes)
    del seen.world
    seen.done = 0

    def images(pixels):
        most.append((len(pixels), len(counted) - seen.done))
        seen.done += len(pixels)
        return encoder.images(pixels)

    seen.images = images
    assert evaluate_folder(seen, folder) == evaluate_folder(encoder, folder)
    assert max(count for count, _ in most) == encoder.batch_size == 3
    assert max(held for _, held in most) <= 5 * encoder.batch_size + 1  # one was broken


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that any operation gave."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor):
                self.most = max(self.most, each.numel())
        return out


def test_recall_holds_no_matrix_of_all_scores(monkeypatch):
    images, texts = (F.normalize(torch.randn(n, 4), dim=-1) for n in (300, 1500))
    pairs = torch.stack([torch.arange(1500) // 5, torch.arange(1500)], 1)
    whole = retrieval(images, texts, pairs)
    monkeypatch.setattr(figures, "_SCORES", 9_000)
    with Largest() as largest:
        assert retrieval(images, texts, pairs) == whole
    assert largest.most <= 9_000 < images.shape[0] * texts.shape[0]


@pytest.mark.parametrize("bias", [None, -2.0])
@pytest.mark.parametrize(("count", "batch"), [(10, 4), (3, 4), (8, 4), (1, 1)])
def test_the_loss_by_hand(bias, count, batch):
    model = build("demo", 8, vision=dict(image_size=16), text=dict(context=8), logit_bias=bias)
    images, texts = (F.normalize(torch.randn(count, 8), dim=-1) for _ in range(2))
    found = pair_losses(model, images, texts, batch)
    size = min(batch, count)
    assert found["loss_batch"] == size
    each = [range(first, count, count // size)[:size] for first in range(count // size)]
    assert len({place for one in each for place in one}) == count // size * size
    scale = model.logit_scale.detach().exp()
    true = [
        contrastive_loss_reference(images[list(one)], texts[list(one)], scale)
        if bias is None
        else sigmoid_loss_reference(images[list(one)], texts[list(one)], scale, bias)
        for one in each
    ]
    assert found["loss"] == pytest.approx(sum(map(float, true)) / len(true), rel=1e-5, abs=1e-6)
    assert pair_losses(Numbers.model, images, texts, batch) == {}


def test_the_loss_of_shards(encoder, tmp_path):  # noqa: F811
    """Each picture with the first of its captions."""
    members = [m for i, texts in enumerate(CAPTIONS) for m in SHAPES["lines"](i, texts)]
    figures = evaluate_shards(encoder, write_tar(tmp_path / "0.tar", members), loss_batch=3)
    assert figures["loss_batch"] == 3
    assert abs(figures["loss"] - math.log(3)) < 2  # of random weights
    shown = table({"shards: 0.tar": figures}).splitlines()
    assert shown[0].endswith("loss") and shown[1].endswith(f"{figures['loss']:.4f}")


def test_each_set_is_told_in_a_line(encoder, tmp_path):  # noqa: F811
    folder = photos(tmp_path / "photos", 4)
    members = [m for i in range(4) for m in SHAPES["lines"](i, [f"red {i}", f"blue {i}"])]
    (tmp_path / "classes.txt").write_text("red 1\nblue 2\nred 3\n")
    pattern, told = write_tar(tmp_path / "0.tar", members), []
    how = dict(workers=2, loss_batch=2, say=told.append)
    evaluate_sets(encoder, None, images=str(folder), shards=pattern, **how)
    size = "16 x 16 pixels, 5 image tokens, at most 12 text tokens"
    resized = "shortest side resized, centre cropped, bicubic"
    by = "decoded by 1 process x 2 workers"
    assert told == [
        f"images: photos: {size}, {resized}; 4 templates x 2 classes; n 8, skipped 1; {by}",
        f"shards: 0.tar: {size}, {resized}; retrieval; loss of 2 batches of 2 pairs; "
        f"n 4, skipped 0; {by}",
        f"classes: 0.tar: {size}, {resized}; 1 template x 3 classes; n 3, skipped 0; {by}",
    ]


def test_colours_still_work_as_an_encoder(tmp_path):
    """Of another's making: it knows nothing of processes."""
    members = [m for i, texts in enumerate(CAPTIONS) for m in SHAPES["lines"](i, texts)]
    figures = evaluate_shards(Colours(), write_tar(tmp_path / "0.tar", members), workers=1)
    assert figures["n"] == len(CAPTIONS) and "loss" not in figures
    (tmp_path / "set" / "ship 3").mkdir(parents=True)
    (tmp_path / "set" / "ship 3" / "1.png").write_bytes(thing(3))
    assert evaluate_folder(Named(), tmp_path / "set")["top1"] == 1.0
