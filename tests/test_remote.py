"""Shards from a web server and S3, both started here: the same batches, whatever goes wrong."""

import contextlib
import errno
import http.server
import itertools
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_shards
import torch
from test_batches import joined, same
from test_evaluate_sets import Numbers
from test_shards import shard_loader
from test_train import flags

import train
from data import index, remote, shelf, shrink
from data.index import TABLE, known_sizes
from data.patterns import file_names
from data.shards import first_captions, read_pairs
from data.shelf import Shelf
from training import evaluation

ROOT = Path(__file__).parents[1]
numbers, shards = test_shards.numbers, test_shards.shards  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore:.*without:UserWarning")  # what the shards lack
BUCKETS = itertools.count()
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
REGION = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}


class Server(http.server.ThreadingHTTPServer):
    """A folder on the web. `faults` of a path are met in turn, one a GET; `always` by each."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.always, self.got = folder, {}, {}, Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        pass  # a client that is gone


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(self.server.always.get(self.path), head=True)

    def do_GET(self) -> None:
        self.server.got[self.path] += 1
        faults = self.server.faults.get(self.path)
        fault = faults.pop(0) if faults else self.server.always.get(self.path)
        self.answer(fault, head=False)

    def answer(self, fault: str | None, head: bool) -> None:
        path = self.server.folder / self.path.lstrip("/")
        refused = fault if fault in ("403", "404", "503") else None if path.is_file() else "404"
        data = b"" if refused else path.read_bytes()
        length = len(data) + {"short": -100, "long": 100}.get(fault, 0)
        self.send_response(int(refused or 200))
        self.send_header("Content-Length", str(length))
        if not refused:
            changed = self.date_time_string(int(path.stat().st_mtime))
            self.send_header("Last-Modified", changed)
        self.end_headers()
        pieces = {"slow": 8, "silent": 8, "cut": 2}.get(fault, 1)
        for start in range(0, 0 if head else length, max(1, length // pieces)):
            self.wfile.write(data[start : start + length // pieces])
            if fault in ("cut", "long"):
                self.close_connection = True
                return
            if pieces > 1:
                time.sleep({"slow": 0.15, "silent": 1.5}[fault])


@pytest.fixture
def copies(shards, tmp_path):
    """The five shards and their table, in a folder whose files may be changed."""
    folder = tmp_path / "served"
    folder.mkdir()
    for path in shards.glob("*.tar"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / TABLE).write_text(json.dumps({f"0{i}.tar": 7 for i in range(5)}))
    return folder


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """A cache of its own, short pauses, no proxy, and no credentials of the machine."""
    monkeypatch.setenv("CLIPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02, 0.05, 0.1))


@pytest.fixture
def web(copies):
    server = Server(copies)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def moto():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(moto, copies, monkeypatch):
    """An S3 bucket of the shards."""
    for name, value in {**KEYS, **REGION, "AWS_ENDPOINT_URL": moto}.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    name = f"pairs-{next(BUCKETS)}"
    store.mkdir(name)
    store.put(str(copies), f"{name}/set", recursive=True)
    yield f"s3://{name}/set"
    s3fs.S3FileSystem.clear_instance_cache()


def pattern(place):
    return f"{place}/{{00..04}}.tar"


def held(tmp_path) -> int:
    """Bytes in the cache of shards, hidden files too."""
    total = 0
    for path in (tmp_path / "cache" / "remote").glob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def tar_gets(web):
    return {path[1:]: count for path, count in web.got.items() if path.endswith(".tar")}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["web", "bucket"])
def test_batches_are_those_of_the_local_shards(kind, workers, copies, numbers, tmp_path, request):
    place = request.getfixturevalue(kind)
    local = list(shard_loader(pattern(copies), numbers, tmp_path / "local", steps=8))
    names = pattern(place if kind == "bucket" else place.url)
    far = list(shard_loader(names, numbers, tmp_path / "far", steps=8, workers=workers))
    assert len(far) == 8 and all(same(a, b) for a, b in zip(far, local, strict=True))
    later = list(shard_loader(names, numbers, tmp_path / "far", start_step=5, steps=8))
    assert all(same(a, b) for a, b in zip(later, local[5:], strict=True))
    if kind == "web":  # each once, whoever asks
        assert tar_gets(place) == {f"0{i}.tar": 1 for i in range(5)}


def test_nodes_fetch_their_own_parts(web, numbers, tmp_path):
    """Each rank has a disk of its own; the batches are those of one process."""
    how = {"steps": 6, "parts": 2}  # an epoch
    whole = list(shard_loader(pattern(web.url), numbers, tmp_path / "one", **how))
    web.got.clear()
    ranks = [
        list(shard_loader(pattern(web.url), numbers, tmp_path / str(rank), **how, **place))
        for rank in (0, 1)
        for place in [{"rank": rank, "world_size": 2}]
    ]
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(joined(shares), joined([batch]), strict=True))
    counts = tar_gets(web)
    assert len(counts) == 5 and sum(counts.values()) == 6  # the third of five is in both parts


@pytest.mark.parametrize(
    "faults",
    [["slow"], ["cut", "cut"], ["503", "503"], ["short"], ["long"], ["silent"]],
    ids=lambda faults: "-".join(faults),
)
def test_faults_that_pass_are_outlasted(faults, web, copies, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE", 1.0)
    web.faults["/01.tar"] = list(faults)
    path = Shelf().path(f"{web.url}/01.tar")
    assert path.read_bytes() == (copies / "01.tar").read_bytes()
    assert web.got["/01.tar"] == 1 + len(faults) * (faults != ["slow"])
    assert [one.name for one in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("503", "must be a file that can be read, got ClientResponseError: 503.* after 5 tries"),
        ("cut", "must be a file that can be read, got ClientPayloadError.* after 5 tries"),
        ("short", r"must be a file that can be read, got OSError: \d+ of \d+ bytes after 5 tries"),
        ("403", "must be one that these credentials may read, got .*403"),
        ("404", "must be there, got no such file"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_had_ends_the_run_by_name(
    fault, sentence, workers, web, copies, numbers, tmp_path
):
    loader = shard_loader(pattern(web.url), numbers, tmp_path / "cache", workers=workers)
    if fault == "404":
        (copies / "03.tar").unlink()
    else:
        web.always["/03.tar"] = fault
        if fault == "short":  # a store that says another length than it gives
            web.faults["/03.tar"], web.always = ["short"] * 99, {}
    with pytest.raises(ValueError, match=f"^shards: {web.url}/03.tar {sentence}") as told:
        list(loader)
    assert "\n" not in str(told.value)


def test_a_pattern_is_asked_at_the_start(web, bucket, monkeypatch, tmp_path):
    assert file_names(pattern(web.url)) == [f"{web.url}/0{i}.tar" for i in range(5)]
    assert file_names(f"{bucket}/*.tar") == [f"{bucket}/0{i}.tar" for i in range(5)]
    assert file_names(f"{bucket}/0[12].ta?") == [f"{bucket}/0{i}.tar" for i in (1, 2)]
    folder = web.folder.as_uri()
    assert file_names(pattern(folder)) == file_names(pattern(web.folder))
    assert Shelf().path(f"{folder}/00.tar") == web.folder / "00.tar"
    for name in (f"{web.url}/x{{0..9}}.tar", f"{bucket}/x.tar", "s3://no-such-bucket/0.tar"):
        with pytest.raises(ValueError, match="pattern must name files that are there, got '"):
            file_names(name)
    with pytest.raises(ValueError, match=r"must name files that are there, got 's3://.*/x\*.tar'"):
        file_names(f"{bucket}/x*.tar")
    with pytest.raises(ValueError, match="no://a.tar must be a file .* got ValueError: Protocol"):
        file_names("no://a.tar")
    web.always["/00.tar"] = "403"
    with pytest.raises(ValueError, match="00.tar must be one that these credentials may read"):
        file_names(pattern(web.url))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = "http://{}:{}/00.tar".format(*free.getsockname())
    with pytest.raises(
        ValueError, match=f"{url} must be a file that can be read, .* after 5 tries"
    ):
        file_names(url)


def test_no_credentials_and_no_package_are_sentences(bucket, monkeypatch):
    import s3fs

    for name in KEYS:
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ValueError, match=r"00\.tar must be read with credentials .*, got none"):
        file_names(pattern(bucket))
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        ValueError, match=r"must have a package that reads it \(pip install gcsfs\)"
    ):
        file_names("gs://bucket/00.tar")


def test_the_cache_stays_within_its_size(web, copies, numbers, tmp_path):
    local = list(shard_loader(pattern(copies), numbers, tmp_path / "local", steps=15))
    sizes = sorted(path.stat().st_size for path in copies.glob("*.tar"))
    limit, seen, done = sum(sizes[-4:]), [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(held(tmp_path))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    how = {"cache_gb": limit / 1e9, "steps": 15}
    far = list(shard_loader(pattern(web.url), numbers, tmp_path / "cache", **how))
    done.set()
    watcher.join()
    assert all(same(a, b) for a, b in zip(far, local, strict=True))
    assert 0.5 * limit < max(seen) <= limit
    assert sum(tar_gets(web).values()) > 5  # what was dropped is fetched again


def test_what_was_used_last_is_kept(web):
    sizes = [(web.folder / f"0{i}.tar").stat().st_size for i in range(3)]
    one = Shelf(None, (max(sizes) * 2 + 100) / 1e9)
    for name in ("00", "01", "00", "02", "00"):
        one.path(f"{web.url}/{name}.tar")
        one.keep()
    assert tar_gets(web) == {"00.tar": 1, "01.tar": 1, "02.tar": 1}
    one.path(f"{web.url}/01.tar")
    assert tar_gets(web) == {"00.tar": 1, "01.tar": 2, "02.tar": 1}


def test_a_cache_that_is_too_small(web, numbers, tmp_path):
    size = (web.folder / "00.tar").stat().st_size
    how = {"cache_gb": 1.5 * size / 1e9}
    loader = shard_loader(pattern(web.url), numbers, tmp_path / "cache", **how)
    sentence = r"^shards: --data.cache-gb must hold the 2 shards that are read at a time, \S+ bytes"
    with pytest.raises(ValueError, match=sentence):
        loader[0]
    one = Shelf(tmp_path / "other", 0.5 * size / 1e9)  # where the loader has put none
    with pytest.raises(ValueError, match="must hold the 1 shards that are read at a time"):
        one.path(f"{web.url}/00.tar")


def test_others_shards_are_never_dropped(web, monkeypatch):
    size = (web.folder / "00.tar").stat().st_size
    one, other = (Shelf(None, 1.5 * size / 1e9) for _ in range(2))
    path = one.path(f"{web.url}/00.tar")
    monkeypatch.setattr(shelf, "_PATIENCE", 0.3)
    with pytest.raises(ValueError, match="--data.cache-gb must hold"):
        other.path(f"{web.url}/01.tar")
    assert path.exists()
    monkeypatch.setattr(shelf, "_PATIENCE", 30)
    threading.Timer(0.3, one.keep).start()
    assert other.path(f"{web.url}/01.tar").exists() and not path.exists()


def test_a_disk_or_folder_that_takes_nothing(web, monkeypatch, tmp_path):
    from fsspec.implementations.http import HTTPFileSystem

    url = f"{web.url}/00.tar"

    async def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(HTTPFileSystem, "_get_file", full)
        HTTPFileSystem.clear_instance_cache()
        with pytest.raises(ValueError, match=r"remote must have room .*--data.cache-gb.* No space"):
            Shelf().path(url)
    HTTPFileSystem.clear_instance_cache()
    with monkeypatch.context() as patch:
        patch.setattr(shelf.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(ValueError, match="the disk of .*remote must hold the 1 shards"):
            Shelf().path(url)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"file/remote must be a folder that can be .*\$CLIPA_CACHE"
    ):
        Shelf(tmp_path / "file").path(url)
    assert not web.got["/00.tar"] and held(tmp_path) == 0


FETCH = """
import os, sys
from data.shelf import Shelf
if sys.argv[2] == "die":
    os.replace = lambda *_: os.kill(os.getpid(), 9)
one = Shelf()
for url in sys.argv[3:]:
    path = one.path(url)
print(path.stat().st_size)
"""


def fetching(how, *urls):
    words = [sys.executable, "-c", FETCH, "-", how, *urls]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_kill_leaves_no_half_file(web, copies):
    url = f"{web.url}/00.tar"
    assert fetching("die", url).wait() == -9
    folder = Shelf().folder
    (half,) = folder.iterdir()
    assert half.name.startswith(".") and half.name.endswith(".part")
    path = Shelf().path(url)
    assert path.read_bytes() == (copies / "00.tar").read_bytes()
    assert [*folder.iterdir()] == [path] and tar_gets(web) == {"00.tar": 2}
    web.faults["/01.tar"] = ["silent"]
    killed = fetching("", f"{web.url}/01.tar")
    while not web.got["/01.tar"]:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    small = Shelf(None, path.stat().st_size * 1.1 / 1e9)  # room is made of what a kill left
    assert small.path(f"{web.url}/02.tar").read_bytes() == (copies / "02.tar").read_bytes()
    assert len([*folder.iterdir()]) == 1


def test_processes_fetch_each_shard_once(web):
    urls = [f"{web.url}/0{i}.tar" for i in range(5)]
    web.faults = {f"/0{i}.tar": ["slow"] for i in range(5)}
    processes = [fetching("", *urls), fetching("", *reversed(urls))]
    assert [process.wait() for process in processes] == [0, 0]
    assert tar_gets(web) == {f"0{i}.tar": 1 for i in range(5)}


def test_what_changed_in_the_store_is_fetched_again(web, copies):
    url, path = f"{web.url}/00.tar", copies / "00.tar"
    first = Shelf().path(url)
    same_again = Shelf().path(url)
    assert first == same_again and web.got["/00.tar"] == 1
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    os.utime(path, (1e9, 1e9))
    assert Shelf().path(url).read_bytes() == path.read_bytes() != data
    assert web.got["/00.tar"] == 2


def test_a_fork_and_a_copy_hold_nothing(web):
    """And the parent's connection lives on, whatever its child does."""
    one = Shelf()
    one.path(f"{web.url}/00.tar")
    child = os.fork()
    if not child:
        try:
            code = len(one.path(f"{web.url}/01.tar").read_bytes()) < 1000 or len(one._held) != 1
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    began = time.monotonic()
    one.path(f"{web.url}/01.tar")
    assert time.monotonic() - began < 10 and web.got["/01.tar"] == 1
    copy = pickle.loads(pickle.dumps(one))
    assert not copy._held and copy.path(f"{web.url}/00.tar") == one.path(f"{web.url}/00.tar")


def test_tables_in_a_store(bucket, web, copies, tmp_path, capsys):
    names = file_names(pattern(bucket))
    assert known_sizes(names).tolist() == [7] * 5
    index.main([pattern(bucket), "--again", "--processes", "2"])
    assert capsys.readouterr().out == "35 samples\n"
    assert index.read_table(bucket) == {f"0{i}.tar": 7 for i in range(5)}
    # A web server takes no table: it is kept here.
    (copies / TABLE).unlink()
    (copies / "01_stats.json").write_text(json.dumps({"successes": 6}))
    web.always["/02_stats.json"] = "403"
    names = file_names(pattern(web.url))
    assert known_sizes(names).tolist() == [-1, 6, -1, -1, -1]
    with pytest.warns(UserWarning, match=f"index: {web.url} takes no table; it is kept as"):
        assert index.index(pattern(web.url), processes=1) == 6 + 4 * 7
    gets = dict(tar_gets(web))
    assert known_sizes(names).tolist() == [7, 6, 7, 7, 7] and tar_gets(web) == gets
    web.always[f"/{TABLE}"] = "503"
    with pytest.raises(ValueError, match=f"{TABLE} must be a file that can be read, got .*503"):
        known_sizes(names)


def test_a_local_folder_that_takes_no_table(copies):
    (copies / TABLE).unlink()
    (copies / TABLE).mkdir()
    with pytest.warns(UserWarning, match="takes no table; it is kept as"):
        assert index.index(pattern(copies), processes=1) == 35
    assert known_sizes(file_names(pattern(copies))).tolist() == [7] * 5
    os.utime(copies / "03.tar", (9e9, 9e9))
    with pytest.warns(UserWarning, match=r"must be newer than its shards, .*first 03\.tar"):
        assert known_sizes(file_names(pattern(copies))).tolist() == [7, 7, 7, -1, 7]


def test_all_that_takes_shards_takes_urls(web, copies, tmp_path):
    far, near = pattern(web.url), pattern(copies)
    assert first_captions(far) == first_captions(near)
    for a, b in zip(read_pairs(far, 16), read_pairs(near, 16), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    evaluation.check_sets(shards=far)
    figures = [
        evaluation.evaluate_shards(Numbers(), place, workers=workers)
        for place, workers in ((near, 0), (far, 0), (far, 2))
    ]
    assert figures[0] == figures[1] == figures[2]
    assert evaluation.listed_classes(far) == []
    (copies / "classes.txt").write_text("number 1\nnumber 2\n")
    assert evaluation.listed_classes(far) == ["number 1", "number 2"]
    for place, name in ((far, "far"), (near, "near")):
        shrink.main([place, str(tmp_path / name), "--side", "16", "--processes", "1"])
    for i in range(5):
        a, b = (tmp_path / name / f"0{i}.tar" for name in ("far", "near"))
        assert a.read_bytes() == b.read_bytes()


def test_a_run_on_urls(web, tmp_path, capsys):
    sizes = {"data__source": pattern(web.url), "data__vocab_size": 200, "data__cache_gb": 0.001}
    sizes |= {"stages__full__steps": 0, "stages__short__steps": 2, "stages__short__batch_size": 8}
    words = flags(tmp_path / "run", **sizes, stages__short__warmup=0)
    train.main(words)
    assert (tmp_path / "run" / "report.png").is_file()
    web.always["/00.tar"] = "404"
    with pytest.raises(SystemExit, match=r"^train\.py: shards: pattern must name files that are"):
        train.main(flags(tmp_path / "other", **sizes))


def test_local_shards_need_no_fsspec(shards):
    program = (
        "import sys; import torch; before = set(sys.modules)\n"
        "from data.patterns import file_names; from data.shelf import Shelf\n"
        f"print(Shelf().path(file_names({pattern(shards)!r})[0]))\n"
        "assert not {'fsspec', 'aiohttp'} & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
