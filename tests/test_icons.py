"""Icons of a small package become shards: which are drawn, how, and into which split."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from data import icons
from data.icons import Icon, draw, main, parts_of_names, plan, read_package
from data.index import read_table
from data.shards import scan

NAMES = [f"{a}-{b}" for a in ("red", "blue", "old") for b in ("boat", "car", "hat", "cup", "tree")]
AUTHORS = [f"author{number}" for number in range(8)]


def square(x, y, fill="currentColor"):
    return f'<path fill="{fill}" d="M{x} {y}h{4}v{4}h-{4}z"/>'


def body(author, name, style=0):
    """A drawing of its own for each."""
    return square(AUTHORS.index(author) + 1, NAMES.index(name) + 1) + f'<g id="{style}"/>'


def one_set(prefix, bodies, licence="MIT", author="", **more):
    info = {"name": prefix, "author": {"name": author or prefix}, "category": "UI 24px"}
    info |= {"license": {"spdx": licence, "url": "https://x"}, **more.pop("info", {})}
    held = {n: {"body": b} if isinstance(b, str) else b for n, b in bodies.items()}
    return {"prefix": prefix, "info": info, "icons": held, "width": 24, "height": 24, **more}


def sets():
    """Eight authors with fifteen names each in two styles, and sets of every other kind."""
    found = [
        one_set(
            author,
            {
                f"{name}{style}": body(author, name, style)
                for name in NAMES
                for style in ("", "-outline")
            },
            suffixes={"": "Filled", "outline": "Outline"},
            categories={"Things": [NAMES[0]]},
        )
        for author in AUTHORS
    ]
    for prefix, licence in (("nc", "CC-BY-NC-4.0"), ("gpl", "GPL-3.0-or-later"), ("none", "")):
        found.append(one_set(prefix, {"cup": square(0, 0)}, licence))
    odd = {
        "hidden": {"body": square(1, 0), "hidden": True},
        "again": body(AUTHORS[0], NAMES[0], ""),  # drawn before
        "broken": "<path d='",
        "blank": "<g/>",
        "white": square(0, 0, "#fff"),
    }
    found.append(one_set("odd", odd))
    found.append(one_set("some-emoji", {"sun-light": square(3, 0, "#f00")}))
    found.append(one_set("marks", {"acme": square(4, 0)}, info={"category": "Logos"}))
    flags = {"category": "Flags / Maps", "palette": True}
    found.append(one_set("banners", {"fr-4x3": square(5, 0, "#00f")}, info=flags))
    return found


def pack(path, found, listed=None):
    """A .tgz as npm's."""
    listed = {one["prefix"]: one["info"] for one in found} if listed is None else listed
    files = {f"json/{one['prefix']}.json": one for one in found} | {"collections.json": listed}
    with tarfile.open(path, "w:gz") as tar:
        for name, value in files.items():
            member, data = tarfile.TarInfo(f"package/{name}"), json.dumps(value).encode()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The small package, and rules of its size."""
    for name, value in {
        "_AUTHORS": 2, "_NAMES": (10, 20), "_NAME_SHARE": 0.2, "_COMMON": 6, "_FEW": 3
    }.items():  # fmt: skip
        monkeypatch.setattr(icons, name, value)
    return pack(tmp_path / "iconify-json-1.tgz", [*sets(), one_set("unlisted", {"cup": "<g/>"})])


def held(folder):
    """(picture, what its JSON says) of each sample of each split."""
    found = {}
    for split in icons.SPLITS:
        found[split] = []
        for path in sorted((folder / split).glob("*.tar")):
            with tarfile.open(path) as tar:
                files = {member.name: tar.extractfile(member).read() for member in tar}
            for name in files:
                if name.endswith("json"):
                    picture = Image.open(io.BytesIO(files[name.replace("json", "png")]))
                    found[split].append((picture, json.loads(files[name])))
    return found


def test_what_is_drawn_and_where(package, tmp_path, capsys):
    out = tmp_path / "icons"
    main([str(package), str(out), "--samples", "50", "--size", "12", "--processes", "2"])
    samples = held(out)
    said = capsys.readouterr().out
    keys = {split: [(s["set"], s["name"]) for _, s in some] for split, some in samples.items()}
    everything = [key for some in keys.values() for key in some]
    assert len(everything) == len(set(everything))  # each once
    assert not {"nc", "gpl", "none", "unlisted"} & {prefix for prefix, _ in everything}
    assert {name for prefix, name in everything if prefix == "odd"} == {"white"}
    assert keys["emoji"] == [("some-emoji", "sun-light")]
    assert keys["logos"] == [("marks", "acme")] and keys["flags"] == [("banners", "fr-4x3")]
    for split, some in samples.items():
        assert f"{split:14}{len(some):10,} samples" in said
        assert sum(read_table(out / split).values()) == len(some)
        paths = sorted((out / split).glob("*.tar"))
        assert [len(scan(path, tmp_path)) for path in paths] == [*read_table(out / split).values()]
    assert "(1 on grey, 1 blank, 1 broken)" in said
    notices = json.loads((out / "licences.json").read_text())
    assert notices["odd"] == {"title": "odd", "author": "odd", "licence": "MIT", "url": "https://x"}


def test_nothing_is_on_two_sides(package):
    planned = plan(read_package(package))
    sides = {split: planned.icons[split] for split in icons.SPLITS}
    authors = {split: {i.set for i in some} & set(AUTHORS) for split, some in sides.items()}
    names = {split: {i.caption for i in some if i.set in AUTHORS} for split, some in sides.items()}
    assert len(authors["held-out-sets"]) == 2 and len(authors["train"]) == 6
    assert not authors["held-out-sets"] & (authors["train"] | authors["variants"])
    assert 0 < len(names["held-out-names"]) < 15
    assert not names["held-out-names"] & (names["train"] | names["variants"])
    assert authors["held-out-names"] <= authors["train"]
    # One variant of a name of a set, whichever; the others only where it trains.
    for split in ("train", "held-out-sets", "held-out-names"):
        pairs = [(i.set, i.caption) for i in sides[split] if i.set in AUTHORS]
        assert len(pairs) == len(set(pairs))
    trained = len([i for i in sides["train"] if i.set in AUTHORS])
    assert trained == 6 * (15 - len(names["held-out-names"])) and len(sides["variants"]) == trained
    assert len(sides["held-out-sets"]) == 30
    assert {i.style for i in sides["train"] if i.set in AUTHORS} == {"filled", "outline"}
    common = sorted(names["variants"])
    assert planned.classes["held-out-sets"] == planned.classes["emoji"] == common
    assert planned.classes["held-out-names"] == sorted(names["held-out-names"])


def test_authors_who_share_drawings_are_not_held_out(package, tmp_path):
    shared = {f"{name}-x": body(AUTHORS[3], name, "") for name in NAMES}
    package = pack(tmp_path / "b.tgz", [*sets(), one_set("fork", shared, author="Fork")])
    unseen = {i.set for i in plan(read_package(package)).icons["held-out-sets"]}
    assert len(unseen) == 2 and not unseen & {AUTHORS[3], "fork"}


def test_the_same_bytes_whoever_draws_and_after_a_stop(package, tmp_path, capsys):
    flags = ["--samples", "20", "--size", "8", "--splits", "train", "held-out-sets"]
    for name, processes in (("a", "1"), ("b", "3")):
        main([str(package), str(tmp_path / name), *flags, "--processes", processes])
    tars = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(tars) == 11 and not (tmp_path / "a" / "logos").exists()
    for path in tars:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    (tmp_path / "b" / "train" / "00001.tar").unlink()
    (tmp_path / "b" / "train" / "sizes.json").unlink()  # a stop comes before it
    kept = (tmp_path / "b" / "train" / "00000.tar").stat().st_mtime_ns
    capsys.readouterr()
    main([str(package), str(tmp_path / "b"), *flags])
    assert "drawn now: 20 (" in capsys.readouterr().out
    for path in tars:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    assert (tmp_path / "b" / "train" / "00000.tar").stat().st_mtime_ns == kept


def test_captions(package):
    planned = plan(read_package(package))
    some = {(i.set, i.name): i.sample() for split in planned.icons.values() for i in split}
    first = next(some[key] for key in some if key[1] == "red-boat")
    assert first == {
        "caption": "red boat",
        "styled": "red boat, filled",
        "long": "a filled icon of red boat, things",
        "name": "red-boat",
        "set": first["set"],
        "style": "filled",
        "category": "UI 24px",
        "licence": "MIT",
    }
    outline = next(some[key] for key in some if key[1] == "red-boat-outline")
    assert outline["long"] == "an outline icon of red boat"
    assert some["some-emoji", "sun-light"]["styled"] == "sun light"  # a skin tone's word
    assert some["banners", "fr-4x3"]["styled"] == "fr, color"
    assert some["odd", "white"]["styled"] == "white" and some["odd", "white"]["style"] == ""


def test_a_category_called_as_a_name_that_is_held_out(package, tmp_path):
    names = sorted({i.caption for i in plan(read_package(package)).icons["held-out-names"]})
    found = sets()
    for one in found[:8]:
        one["categories"] = {names[0].title(): [*one["icons"]]}
    planned = plan(read_package(pack(tmp_path / "b.tgz", found)))
    assert {i.group for i in planned.icons["train"]} == {""}


def test_words_of_style_are_those_that_a_set_uses_often():
    names = [f"car-{n}-{style}" for n in range(20) for style in ("fill", "bold-duotone")]
    parts = parts_of_names([*names, "chart-line-1-fill", "traffic-light", "alt", "fill"])
    assert parts["car-3-fill"] == ("car", ["fill"])
    assert parts["car-3-bold-duotone"] == ("car", ["bold", "duotone"])
    assert parts["chart-line-1-fill"] == ("chart line", ["fill"])
    assert parts["traffic-light"] == ("traffic light", []) and parts["fill"] == ("fill", [])
    parts = parts_of_names([f"outline-{kind}-{n}" for kind in "abc" for n in (10, 20)])
    assert parts["outline-b-20"] == ("b", ["outline"])
    assert parts_of_names(["--x--y"])["--x--y"] == ("x y", [])


def icon(inside, box=(0, 0, 24, 24)):
    return Icon("s", "n", "n", "", "", "", "MIT", inside, box)


def pixels(inside, box=(0, 0, 24, 24), size=24):
    png, ground = draw(icon(inside, box), size)
    image = Image.open(io.BytesIO(png))
    assert image.size == (size, size)
    return np.asarray(image.convert("RGB")), ground, image.mode


def test_a_drawing_is_black_where_it_has_no_colour_and_lies_where_its_box_says():
    expected = np.full((24, 24, 3), 255, np.uint8)
    expected[8:12, 4:8] = 0
    drawn, ground, mode = pixels(square(4, 8))
    assert (drawn == expected).all() and (ground, mode) == (0, "L")
    drawn, _, _ = pixels(square(-6, 3), (-10, -5, 24, 24))
    assert (drawn == expected).all()
    drawn, _, _ = pixels(square(4, 2), (0, 0, 24, 12))  # wide: in the middle
    assert (drawn == expected).all()
    drawn, _, mode = pixels(square(4, 8, "#f00"))
    assert mode == "RGB" and (drawn[9, 5] == (255, 0, 0)).all()


def test_white_is_drawn_on_grey_and_what_is_blank_is_not():
    drawn, ground, _ = pixels(square(4, 8, "#fff"))
    assert ground == 1 and drawn[9, 5].tolist() == [255] * 3 and drawn[0, 0].tolist() == [128] * 3
    assert draw(icon("<g/>"), 16)[0] is None
    with pytest.raises(ValueError):
        draw(icon("<path d='"), 16)


def test_what_will_not_do_is_told(package, tmp_path):
    out, whole = str(tmp_path / "out"), package.read_bytes()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for name, data in (("text", b"no tar"), ("cut", whole[: len(whole) // 2]), ("nothing", b"")):
        (tmp_path / name).write_bytes(data)
    pack(tmp_path / "unfree", [one_set("nc", {"cup": "<g/>"}, "CC-BY-NC-4.0")])
    with tarfile.open(tmp_path / "other", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("package/json/x.json"))
    pack(tmp_path / "list", sets(), listed=[])
    for name in ("text", "cut", "nothing", "missing", "other", "unfree", "list"):
        with pytest.raises(SystemExit, match=r"^data\.icons: icons: .* must be a whole \.tgz of"):
            main([str(tmp_path / name), out])
    assert not (tmp_path / "out").exists()
    for words, says in (
        ([str(tmp_path / "full")], "must be new, empty, or of this package"),
        ([str(package)], "must be new, empty, or of this package"),
        ([out, "--size", "0"], r"size must be in \[1, 1024\], got 0"),
        ([out, "--samples", "0"], "samples must be in"),
        ([out, "--processes", "-1"], "processes must be in"),
        ([out, "--splits", "test"], "splits must be of train, .*, got 'test'"),
    ):
        with pytest.raises(SystemExit, match=rf"^data\.icons: icons: .*{says}"):
            main([str(package), *words])
    pack(tmp_path / "odd", [{"prefix": "a", "info": {"license": {"spdx": "MIT"}}}])
    with pytest.raises(SystemExit, match="must hold sets as Iconify's JSON describes them, got"):
        main([str(tmp_path / "odd"), out])
    flags = ["--splits", "flags", "--size", "8"]
    main([str(package), out, *flags])
    with pytest.raises(SystemExit, match="of this package and these choices"):
        main([str(package), out, "--splits", "flags", "--size", "9"])
    main([str(package), out, "--splits", "logos", "--size", "8"])  # another split joins
