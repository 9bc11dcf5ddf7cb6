"""Every example runs: docstrings, the README's Python and its commands."""

import doctest
import functools
import http.server
import importlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from PIL import Image
from test_icons import pack, sets
from test_train import flags

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for folder in ("clipa_kernels", "models", "data", "training", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


def test_every_example_is_in_a_tested_module():
    assert len(MODULES) > 5


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[1][:40])
def test_readme_python(code):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("page", ["method", "order"])
def test_pages_python(page):
    path = ROOT / "docs" / f"{page}.md"
    for code in blocks("python", path.read_text()):
        exec(compile(code, path.name, "exec"), {})


def test_pages_of_operations_are_their_docstrings():
    """python docs/pages.py makes them anew."""
    made = runpy.run_path(str(ROOT / "docs" / "pages.py"))["pages"]()
    assert {path.name for path in made} == {p.name for p in (ROOT / "docs" / "ops").iterdir()}
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, path.name


def commands():
    """Every command of the README, in its blocks and within its sentences."""
    lines = [part for block in blocks("bash") for part in re.split(r"&&|\n", block)]
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    lines += re.findall(r"`((?:python|pytest|torchrun) [^`]+)`", " ".join(prose.split()))
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


# What is run for a command, in this Python: shorter, smaller, and within {folder}, which holds two
# shards and `trained`, the output of `python train.py`, and lies on the web as {web}.
SHORT = {
    "python train.py": None,  # by the fixture `trained`
    "python train.py --help": "train.py --help",
    "python evaluate.py runs/emoji": "evaluate.py {folder}/trained",
    "python evaluate.py runs/b16 --images imagenet/val --classes imagenet --prompts imagenet "
    "--workers 4": "evaluate.py {folder}/trained --images {folder}/val --classes "
    "{folder}/names.txt --prompts {folder}/templates.txt --workers 2",
    'torchrun --nproc_per_node 8 train.py --preset clipa-v1-b16 --data "shards/{0000..0999}.tar" '
    "--output runs/b16": "-m torch.distributed.run --standalone --nproc_per_node 2 train.py "
    '--preset clipa-v1-b16 --data "{folder}/{{0000..0001}}.tar" {flags}',
    'python train.py --data "laion/{0000..0099}.tar::cc12m/{0000..0031}.tar" --mix 3::1 '
    '--captions "caption;synthetic" --caption-weights "1;3" --output runs/mixed': "train.py "
    '--data "{folder}/0000.tar::{folder}/0001.tar" --mix 3::1 --captions "caption;synthetic" '
    '--caption-weights "1;3" {flags}',
    'python train.py --data "s3://bucket/pairs/{00000..41407}.tar" --data.cache-gb 200 '
    "--output runs/far": 'train.py --data "{web}/{{0000..0001}}.tar" --data.cache-gb 0.001 {flags}',
    "python -m models.export runs/b16 exported --to open_clip": "-m models.export {folder}/trained "
    "{folder}/exported --to open_clip",
    "python -m models.export runs/b16 exported-hf --to transformers": "-m models.export "
    "{folder}/trained {folder}/exported-hf --to transformers",
    "python -m data.write photos shards": "-m data.write {folder}/photos {folder}/written",
    'python -m data.index "shards/{00000..41407}.tar"': "-m data.index "
    '"{folder}/{{0000..0001}}.tar"',
    'python -m data.shrink "shards/{00000..41407}.tar" small --side 128': "-m data.shrink "
    '"{folder}/{{0000..0001}}.tar" {folder}/small --side 16',
    "python -m data.icons iconify-json-2.2.535.tgz icons": "-m data.icons {folder}/icons.tgz "
    "{folder}/icons",
    'python train.py --data "icons/train/*.tar" --data.vocab-size 8000 --stages.short.steps 1200 '
    "--output runs/icons": 'train.py --data "{folder}/*.tar" {flags}',
    'python evaluate.py runs/icons --shards "icons/held-out-sets/*.tar"': "evaluate.py "
    '{folder}/trained --shards "{folder}/*.tar"',
    'python -m data.bench "shards/{00000..41407}.tar" --image-size 64': "-m data.bench "
    '"{folder}/{{0000..0001}}.tar" --image-size 64',
    "python examples/killed.py docs/killed.svg": "examples/killed.py {folder}/killed.svg 32",
    "pytest bench/bench_accelerate.py": "-m pytest -p no:cacheprovider bench/bench_accelerate.py "
    "--benchmark-disable -k equal",
    "pytest bench/bench_data.py": "-m pytest -p no:cacheprovider bench/bench_data.py "
    "--benchmark-disable -k 64",
    "pytest bench/bench_train_step.py": "-m pytest -p no:cacheprovider bench/bench_train_step.py "
    '--benchmark-disable -k "fp32 or equal"',
    "python -m bench.bench_train_step": "-m bench.bench_train_step --samples 256 --seeds 1",
    "python -m bench.bench_contrastive 8192": "-m bench.bench_contrastive 256",
    "python -m bench.compiled": "-m bench.compiled masking",
    "python -m bench.compiled contrastive": "-m bench.compiled masking",
    "python -m bench.first_gpu": "-m bench.first_gpu --help",  # test_first_gpu.py runs all of it
    "pytest bench --benchmark-json bench.json": "-m pytest -p no:cacheprovider bench/bench_gelu.py "
    "-k ours-none-B-bf16 --benchmark-json {folder}/gelu.json",
    "python -m bench.report bench.json --to report": "-m bench.report {folder}/bench.json "
    "--to {folder}/page",
    "python -m bench.meters.roofs": "-m bench.meters.roofs gelu --arch 80 --only 'h14 short'",
}
# What each prints when it is done.
SHOWS = {
    "python train.py --help": "--preset",
    "python evaluate.py runs/emoji": "held-out drawings",
    "python evaluate.py runs/b16 --images imagenet/val --classes imagenet --prompts imagenet "
    "--workers 4": "2 templates x 2 classes; n 2, skipped 0; decoded by 1 process x 2 workers",
    "python -m models.export runs/b16 exported --to open_clip": "exported is for open_clip",
    "python -m models.export runs/b16 exported-hf --to transformers": "exported-hf is for transf",
    "python -m data.write photos shards": "40 samples, and sizes.json, in ",
    'python -m data.index "shards/{00000..41407}.tar"': "40 samples",
    'python -m data.shrink "shards/{00000..41407}.tar" small --side 128': "2 shards, and ",
    "python -m data.icons iconify-json-2.2.535.tgz icons": "drawn now: 244 (",
    'python evaluate.py runs/icons --shards "icons/held-out-sets/*.tar"': "classes: *.tar",
    'python -m data.bench "shards/{00000..41407}.tar" --image-size 64': "40 samples to 64 pixels",
    "python examples/killed.py docs/killed.svg": "32 steps, largest difference of losses ",
    "pytest bench/bench_accelerate.py": "1 passed",
    "pytest bench/bench_data.py": "3 passed",
    "pytest bench/bench_train_step.py": "2 passed",
    "python -m bench.bench_train_step": "open_clip  new concepts",
    "python -m bench.bench_contrastive 8192": "bf16 open_clip ",
    "python -m bench.compiled": "spill st/ld",
    "python -m bench.compiled contrastive": "spill st/ld",
    "python -m bench.first_gpu": "stage",
    "pytest bench --benchmark-json bench.json": "1 passed",
    "python -m bench.report bench.json --to report": "page.md",
    "python -m bench.meters.roofs": "clipa-v2-h14 short",
}
INSTALLS = ('pip install -e ".[train]"', 'pip install -e ".[test]"')  # .ci/run makes both
TESTS = "pytest -n auto --dist loadfile"


@functools.lru_cache  # two commands may be shortened to one
def run(*words):
    # torch.compile compares a rival of the losses, and takes most of a minute.
    changed = {
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_COMPILE_DISABLE": "1",
    }
    env = {**os.environ, **changed, "PYTHONPATH": str(ROOT)}
    for name in [name for name in env if name == "TRITON_INTERPRET" or "PYTEST" in name]:
        del env[name]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    pool = ("--model.pool", "cls")  # as Hugging Face's CLIPModel
    assert "report.png" in run("train.py", *flags(folder / "trained"), *pool)
    (folder / "photos").mkdir()
    (folder / "classes.txt").write_text("colour 3\ncolour 30\n")
    (folder / "names.txt").write_text("red\nblue\n")
    (folder / "templates.txt").write_text("a photo of a {}.\nthe {}\n")
    (folder / "bench.json").write_text('{"benchmarks": []}')
    for wnid, colour in (("n01440764", "red"), ("n01443537", "blue")):
        (folder / "val" / wnid).mkdir(parents=True)
        Image.new("RGB", (40, 40), colour).save(folder / "val" / wnid / "1.jpeg")
    pack(folder / "icons.tgz", sets())
    for shard in range(2):
        with tarfile.open(folder / f"{shard:04}.tar", "w") as tar:
            for number in range(20 * shard, 20 * shard + 20):
                picture = io.BytesIO()
                Image.new("RGB", (40, 40), (6 * number, 255 - 6 * number, 90)).save(picture, "PNG")
                told = b'{"caption": "colour %d", "synthetic": "shade %d"}' % (number, number)
                files = {"png": picture.getvalue(), "txt": b"colour %d" % number, "json": told}
                for name, data in files.items():
                    (folder / "photos" / f"{number}.{name}").write_bytes(data)
                    member = tarfile.TarInfo(f"{number}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


@pytest.fixture(scope="module")
def web(trained):
    """The folder `trained` on a web server."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    files = functools.partial(Quiet, directory=trained)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    "command", [c for c in commands() if c not in (*INSTALLS, TESTS)], ids=lambda c: c[:48]
)
def test_readme_commands(command, trained, web):
    """Each runs to its end, shortened."""
    assert command in SHORT, f"no test runs the README's command: {command}"
    if SHORT[command] is None:
        assert (trained / "trained" / "report.png").is_file()
        return
    output = trained / f"run{list(SHORT).index(command)}"  # a folder holds one run
    how = {"folder": trained, "web": web, "flags": shlex.join(flags(output))}
    words = SHORT[command].format(**how)
    out = run(*shlex.split(words))
    assert SHOWS.get(command, str(trained)) in out


def test_every_short_command_is_in_the_readme():
    assert SHORT.keys() <= {*commands()} and SHOWS.keys() <= SHORT.keys()


def test_ci_installs_and_tests_as_the_readme_says():
    assert {*INSTALLS, TESTS} <= {*commands()}
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("pytest ")] and all(
        line.startswith(f"{TESTS} ") for line in lines if line.startswith("pytest ")
    )
    installs = [line for line in lines if line.startswith("pip install")]
    for extra in INSTALLS:
        assert any(extra.removeprefix("pip install ") in line for line in installs)
