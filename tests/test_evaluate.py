"""Zero-shot classification and retrieval: figures by hand, folders and shards, errors."""

import io
import json
import tarfile

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
from data.text import Tokenizer, train_wordpiece
from evaluate import Encoder, classification, evaluate_folder, evaluate_shards, retrieval, table
from models import build
from training import checkpoint
from training.config import preset
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
    classes = encoder.classes(names, evaluate.PHOTO_PROMPTS)
    best = (encoder.images(pixels) @ classes.T).argmax(1)
    assert figures["top1"] == pytest.approx((best == torch.arange(4)).double().mean().item())
    (tmp_path / "classes.txt").write_text("red crimson thing\n")
    assert evaluate_folder(encoder, tmp_path)["n"] == 8


def test_pairs_of_shards(encoder, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, (name, colour) in enumerate([*COLOURS.items(), ("red", (210, 0, 0))]):
            for suffix, data in (("png", png(colour)), ("txt", name.encode())):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    figures = evaluate_shards(encoder, str(tmp_path / "0.tar"))
    assert (figures["n"], figures["chance"], figures["skipped"]) == (5, 1 / 4, 0)
    assert "text_to_image_r5" in figures and figures["image_to_text_r5"] == 1.0
    assert "0.tar" in table({"shards: 0.tar": figures})


def test_the_program_on_a_folder(encoder, tmp_path, capsys):
    config = preset("emoji")
    model = evaluate.build_model(config)
    run = tmp_path / "run"
    state = checkpoint.pack_state(
        model, adamw(model, config), config, step=1, tokenizer=encoder.tokenizer.to_json()
    )
    checkpoint.save(run, state, 1)
    (tmp_path / "set" / "red").mkdir(parents=True)
    (tmp_path / "set" / "red" / "a.png").write_bytes(png((200, 0, 0)))
    flags = ["--images", str(tmp_path / "set"), "--json", "--device", "cpu"]
    evaluate.main([str(run), *flags])
    assert json.loads(capsys.readouterr().out)["images: set"]["top1"] == 1.0


BAD = {
    "no checkpoint": (["nowhere.pt"], "path must be a checkpoint file, got 'nowhere.pt'"),
    "empty folder": (["{}"], "must hold a checkpoint, got an empty folder"),
    "half a file": (["{}/half.pt"], "must be a whole checkpoint"),
}


@pytest.mark.parametrize(("words", "says"), BAD.values(), ids=BAD)
def test_bad_checkpoints_end_with_a_sentence(tmp_path, words, says):
    if "half" in words[0]:
        (tmp_path / "half.pt").write_bytes(b"PK\x03\x04 half of it")
    with pytest.raises(SystemExit, match=says):
        evaluate.main([words[0].format(tmp_path), "--device", "cpu"])


def test_bad_folders_are_named(encoder, tmp_path):
    with pytest.raises(ValueError, match="must be a folder of class folders"):
        evaluate_folder(encoder, tmp_path)
    (tmp_path / "red").mkdir()
    with pytest.raises(ValueError, match="must hold pictures that can be read, got none"):
        evaluate_folder(encoder, tmp_path)
    with pytest.raises(ValueError, match="must name files that are there"):
        evaluate_shards(encoder, str(tmp_path / "none.tar"))
    config = preset("emoji")
    came = f"must hold the tokenizer's 9000 entries, got {config.vocab_size}"
    with pytest.raises(ValueError, match=came):
        evaluate.build_model(config, 9000)
