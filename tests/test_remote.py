"""Shards from a web server and from S3, both started here: the same batches, whatever goes wrong."""

import contextlib
import errno
import http.server
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import test_shards
import torch
from test_batches import same
from test_shards import shard_loader

from data import index, remote, shelf
from data.index import TABLE, known_sizes
from data.patterns import file_names
from data.shards import first_captions, read_pairs
from data.shelf import Shelf

ROOT = Path(__file__).parents[1]
numbers, shards = test_shards.numbers, test_shards.shards  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore:.*without:UserWarning")  # what the shards lack
BUCKETS = itertools.count()
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
REGION = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}


class Server(http.server.ThreadingHTTPServer):
    """A folder on the web. A path's `faults` are met in turn, one a GET; `always` by any request."""

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
        refused = fault if fault in ("403", "503") else None if path.is_file() else "404"
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
                time.sleep({"slow": 0.05, "silent": 0.6}[fault])


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


@pytest.mark.parametrize(
    "faults",
    [["slow"], ["cut", "cut"], ["503", "503"], ["short"], ["long"], ["silent"]],
    ids=lambda faults: "-".join(faults),
)
def test_faults_that_pass_are_outlasted(faults, web, copies, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE", 0.3)
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
            web.faults["/03.tar"], web.always = ["cut"] * 0 + ["short"] * 99, {}
    with pytest.raises(ValueError, match=f"^shards: {web.url}/03.tar {sentence}") as told:
        list(loader)
    assert "\n" not in str(told.value)
