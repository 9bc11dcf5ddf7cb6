"""What is asked of object stores and web servers: names, small files, and what a fault means.

A name with a scheme (`s3://`, `gs://`, `https://`, whatever fsspec reads) is remote; `file://` and
plain names are local, and need no fsspec. What may come back is asked again, with growing pauses;
the rest is a sentence with the name and the last error. shelf.py fetches whole shards.
"""

import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

PAUSES = (1.0, 2.0, 5.0, 10.0)  # seconds between tries
SILENCE = 60.0  # seconds without a byte that end a try; a long transfer has no limit
_CONNECT = 10.0  # seconds for a connection
_AT_A_TIME = 32  # small files
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}

_STORES: dict[int, Any] = {}  # all that were opened

T = TypeVar("T")


class Unfetched(ValueError):
    """A sentence for the user, which no further try changes."""


def is_remote(name: str) -> bool:
    """Whether a name is a URL of what is no local file.

    >>> is_remote("s3://bucket/00.tar"), is_remote("file:///data/00.tar"), is_remote("00.tar")
    (True, False, False)
    """
    return bool(re.match(r"[a-zA-Z][\w+.-]*://", name)) and not name.startswith("file://")


def base_name(name: str) -> str:
    """The file's own name in a path or URL.

    >>> base_name("https://host/pairs/00.tar?key=1")
    '00.tar'
    """
    path = name.partition("?")[0] if is_remote(name) else name
    return path.rpartition("/")[2]


def is_there(url: str) -> bool:
    """Whether there is such a file.

    Raises:
        ValueError: it may not be read, or the store cannot be asked; says why.
    """
    try:
        tried(url, lambda: info(*store_of(url)))
        return True
    except Unfetched as error:
        if is_missing(error.__cause__):
            return False
        raise


def listed(pattern: str) -> list[str]:
    """The URLs that a pattern with stars names, sorted."""

    def found() -> list[str]:
        store, path = store_of(pattern)
        return sorted(map(store.unstrip_protocol, store.glob(path)))

    return tried(pattern, found)


def read_small(urls: Sequence[str]) -> list[bytes | None]:
    """What small files hold, many asked at a time; None where none can be read."""

    def read(url: str) -> bytes | None:
        def once() -> bytes:
            store, path = store_of(url)
            return store.cat_file(path)

        try:
            return tried(url, once)
        except Unfetched as error:
            if _is_final(error.__cause__):  # a missing file may be forbidden, where none may list
                return None
            raise

    with ThreadPoolExecutor(max(1, min(_AT_A_TIME, len(urls)))) as pool:
        return list(pool.map(read, urls))


def write_small(url: str, data: bytes) -> None:
    """Write a small file into a store.

    Raises:
        OSError: the store takes none, as no web server is asked to.
    """
    try:
        if url.startswith("http"):
            raise OSError("a web server is only read")
        store, path = store_of(url)
        store.pipe_file(path, data)
    except Exception as error:
        raise OSError(f"{url} cannot be written: {error}") from error


def store_of(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the URL's path in it."""
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    kind, options = url.partition("://")[0].lower(), {}
    if kind in ("http", "https"):
        from aiohttp import ClientTimeout

        limit = ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=SILENCE)
        asked = conf.get("http", {}).get("client_kwargs", {})
        options = {"client_kwargs": {"trust_env": True, **asked, "timeout": limit}}  # its proxies
    elif kind in ("s3", "s3a"):  # whose own tries, times these, would be silent for many minutes
        asked = conf.get("s3", {}).get("config_kwargs", {})
        options = {"config_kwargs": {"retries": {"max_attempts": 1}, **asked}}
    store, path = url_to_fs(url, **options)
    # In a forked child fsspec forgets the parent's stores; ended, they would take the parent's
    # sockets out of the epoll that both have, and its next request would not be answered.
    _STORES[id(store)] = store
    return store, path


def info(store: Any, path: str) -> dict[str, Any]:
    """What the store says of a file now: size, ETag, times."""
    store.invalidate_cache()
    return store.info(path)


def tried(url: str, act: Callable[[], T]) -> T:
    """What `act` returns, asked again with growing pauses where the store may come back.

    Raises:
        Unfetched (a ValueError): names the URL and the last error, which is its cause.
    """
    for pause in (*PAUSES, None):
        try:
            return act()
        except Unfetched:
            raise
        except Exception as error:
            if pause is None or _is_final(error):
                raise Unfetched(_sentence(url, error)) from error
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _cause(error: Exception) -> Exception:
    """Of a missing file, what fsspec's file system of the web met, which may be anything."""
    cause = error.__cause__
    of_web = type(cause).__module__.partition(".")[0] in ("aiohttp", "asyncio")
    return cause if isinstance(error, FileNotFoundError) and of_web else error


def _status(error: Exception) -> int:
    """HTTP's, 0 where there is none."""
    code = getattr(error, "status", None) or getattr(error, "code", None)
    return code if isinstance(code, int) else 0


def is_missing(error: Exception) -> bool:
    """Whether an error says that there is no such file."""
    error = _cause(error)
    return isinstance(error, FileNotFoundError) or _status(error) == 404


def _is_final(error: Exception) -> bool:
    """Whether another try would meet the same."""
    error = _cause(error)
    kinds = (FileNotFoundError, PermissionError, ValueError, ImportError, NotImplementedError)
    refused = 400 <= _status(error) < 500 and _status(error) not in (408, 425, 429)
    return refused or isinstance(error, kinds) or "Credential" in type(error).__name__


def _sentence(url: str, error: Exception) -> str:
    final, missing, error = _is_final(error), is_missing(error), _cause(error)
    came = f"{type(error).__name__}: {str(error)[:200]}".removesuffix(": ")
    if isinstance(error, ImportError):
        package = _PACKAGES.get(url.partition("://")[0])
        must = "have a package that reads it" + f" (pip install {package})" * bool(package)
    elif missing:
        must, came = "be there", "no such file"
    elif "Credential" in type(error).__name__:
        public = " (of a public bucket without: FSSPEC_S3_ANON=true)" * url.startswith("s3")
        must, came = f"be read with credentials{public}", f"none ({came})"
    elif isinstance(error, PermissionError) or _status(error) in (401, 403):
        must = "be one that these credentials may read"
    else:
        must, tries = "be a file that can be read", f" after {len(PAUSES) + 1} tries"
        came += "" if final else tries
    return f"shards: {url} must {must}, got {came}"
