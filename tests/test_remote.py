"""Shards from a web server and from S3, both started here: the same batches, whatever goes wrong."""

import functools
import http.server
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
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
REGION = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}


class Server(http.server.ThreadingHTTPServer):
    """A folder on the web; `faults` of a path are met in turn, each by one GET."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.got = folder, {}, Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        pass  # a client that is gone


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.server.got[self.path] += 1
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        path = self.server.folder / self.path.lstrip("/")
        faults = self.server.faults.get(self.path, [])
        fault = faults[0] if faults and faults[0] == "403" else None
        if faults and not head:
            fault = faults.pop(0) if len(faults) < 100 else faults[0]
        if fault in ("403", "503") or not path.is_file():
            self.send_response(int(fault or 404))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        length = len(data) + {"short": -100, "long": 100}.get(fault, 0)
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        self.end_headers()
        if head:
            return
        if fault == "slow":
            for start in range(0, len(data), len(data) // 8):
                self.wfile.write(data[start : start + len(data) // 8])
                time.sleep(0.1)
        elif fault == "silent":
            self.wfile.write(data[:1000])
            self.wfile.flush()
            time.sleep(2)
            self.close_connection = True
        elif fault in ("cut", "long"):
            self.wfile.write(data[: len(data) // 2 if fault == "cut" else None])
            self.close_connection = True
        else:
            self.wfile.write(data[:length])


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
    name = f"pairs-{abs(hash(str(copies)))}"
    store.mkdir(name)
    store.put(str(copies), f"{name}/set", recursive=True)
    yield f"s3://{name}/set"
    s3fs.S3FileSystem.clear_instance_cache()


def pattern(place):
    return f"{place}/{{00..04}}.tar"


def cached(tmp_path):
    return {path.name.split("-")[0]: path for path in (tmp_path / "cache" / "remote").glob("*")}


def tar_gets(web):
    return {path[1:]: count for path, count in web.got.items() if path.endswith(".tar")}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["web", "bucket"])
def test_batches_are_those_of_the_local_shards(
    kind, workers, copies, numbers, tmp_path, request
):
    place = request.getfixturevalue(kind)
    local = list(shard_loader(pattern(copies), numbers, tmp_path / "local", steps=8))
    names = pattern(place if kind == "bucket" else place.url)
    far = list(shard_loader(names, numbers, tmp_path / "far", steps=8, workers=workers))
    assert len(far) == 8 and all(same(a, b) for a, b in zip(far, local, strict=True))
    later = list(shard_loader(names, numbers, tmp_path / "far", start_step=5, steps=8))
    assert all(same(a, b) for a, b in zip(later, local[5:], strict=True))
    if kind == "web":  # each once, whoever asks
        assert tar_gets(place) == {f"0{i}.tar": 1 for i in range(5)}
