"""The cache of remote shards on this machine: whole files, fetched ahead, within a size.

All processes of a machine share a folder without talking to one another: the kernel's locks on its
files say who fetches what and what is in use, and end with the process that holds them. A shard is
fetched under a hidden name and renamed. Its name holds its URL and the version that the store tells
(size, ETag, time), so that what has changed in the store is fetched again.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .cache import cache_folder
from .remote import Unfetched, base_name, info, is_remote, store_of, tried

_PATIENCE = 300.0  # seconds to wait until other processes leave room
_POLL = 0.05  # seconds between looks at what others do
_THREADS = 4  # that fetch ahead, a process
_MTIME = 10**18  # of all files: a kept scan is known by name, size and time
_VERSION = ("size", "ETag", "etag", "md5Hash", "Content-MD5", "Digest", "generation")
_VERSION += ("Last-Modified", "LastModified", "last_modified", "updated", "mtime")


class _Full(Exception):
    """A file has no room beside those in use, within so many bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit


class Shelf:
    """Local files of shards. It outlives a fork and pickling: the copy holds no file at first.

    Args:
        folder: as `cache_folder`; the shards lie in its folder "remote".
        limit_gb: most gigabytes (10^9 bytes) there, by all processes together; the least recently
            used files go first, never one that a process holds.
    """

    def __init__(self, folder: Path | None = None, limit_gb: float = 100.0) -> None:
        self.folder, self.limit = cache_folder(folder) / "remote", int(limit_gb * 1e9)
        self._start()

    def path(self, name: str) -> Path:
        """The local file of a shard, fetched if it is not there; held until `keep` drops it.

        Raises:
            ValueError: it cannot be had; says what was tried, and the last error.
        """
        if not is_remote(name):
            return Path(name.removeprefix("file://"))
        self._here()
        held = self._held.get(name)
        if held and os.path.exists(held.name):  # unless someone emptied the folder
            return Path(held.name)
        return tried(name, lambda: self._take(name, wait=True))

    def keep(self, now: Iterable[str] = (), then: Iterable[str] = ()) -> None:
        """Hold no shards but those `now` in use; fetch these in the background, and those `then`
        due as far as there is room."""
        self._here()
        now, then = (list(filter(is_remote, names)) for names in (now, then))
        if (now, then) == self._asked and self._held.keys() <= {*now}:
            return
        with self._lock:
            self._asked = now, then
            for name in self._held.keys() - {*now}:
                self._held.pop(name).close()
            self._now, self._due = {*map(_key, now)}, {*map(_key, [*now, *then])}
            self._wanted = deque(name for name in [*now, *then] if name not in self._held)
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            for _ in range(min(_THREADS, len(self._wanted)) - len(self._threads)):
                # Daemons: a process does not wait for them at its end.
                self._threads.append(threading.Thread(target=self._fetch_ahead, daemon=True))
                self._threads[-1].start()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __del__(self) -> None:
        for file in getattr(self, "_held", {}).values():
            file.close()

    def _start(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._held: dict[str, BinaryIO] = {}  # open files, each with a shared lock
        self._asked: tuple[list[str], list[str]] = [], []  # by keep
        self._now: set[str] = set()  # keys of the shards in use
        self._due: set[str] = set()  # and of those to come
        self._wanted: deque[str] = deque()
        self._threads: list[threading.Thread] = []

    def _here(self) -> None:
        """After a fork, start again: no thread has come along, and the files are the parent's."""
        if self._pid != os.getpid():
            held = self._held
            self._start()
            for file in held.values():
                file.close()

    def _fetch_ahead(self) -> None:
        while True:
            try:
                name = self._wanted.popleft()
            except IndexError:
                return
            with contextlib.suppress(Exception):  # path tells it, if the shard is needed
                self._take(name, wait=False)

    def _take(self, name: str, *, wait: bool) -> Path | None:
        """The local file of a shard; None where others fetch it, or no room is, and none waits."""
        store, path = store_of(name)
        told = info(store, path)
        digest = hashlib.sha256(_version(told).encode()).hexdigest()
        target, size = self.folder / f"{_key(name)}-{digest[:12]}", told.get("size") or 0
        until = time.monotonic() + _PATIENCE
        while True:
            if file := _open_shared(target):
                with contextlib.suppress(OSError):  # another user's
                    os.utime(target, ns=(time.time_ns(), _MTIME))
                self._hold(name, file, wait)
                return target
            part = None
            try:
                part = self._reserve(target, size, self._now if wait else self._due)
            except _Full as full:
                if wait:
                    self._check_need(size, full.limit, time.monotonic() > until)
            if part is not None:
                with part:
                    self._fetch(store, path, told, Path(part.name), target)
            elif wait:
                time.sleep(_POLL)
            else:
                return None

    def _hold(self, name: str, file: BinaryIO, wait: bool) -> None:
        with self._lock:
            if wait or _key(name) in self._now:
                file, self._held[name] = self._held.get(name), file
        if file:
            file.close()

    def _fetch(self, store: Any, path: str, told: dict, part: Path, target: Path) -> None:
        """A whole file under its temporary name, then under its own."""
        try:
            store.get_file(path, str(part))
            came, size = part.stat().st_size, told.get("size")
            if size not in (None, came):
                raise OSError(f"{came} of {size} bytes")
            if _version(info(store, path)) != _version(told):
                raise OSError("a file that changed while it was read")
            os.utime(part, ns=(time.time_ns(), _MTIME))
            with self._locked():
                os.replace(part, target)
        except BaseException as error:
            with contextlib.suppress(OSError):
                part.unlink()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                must = "have room for the shards in use (see --data.cache-gb and $CLIPA_CACHE)"
                raise Unfetched(f"shards: {self.folder} must {must}, got {error}") from error
            raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time makes room and names."""
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            _lock(folder)
            yield
        finally:
            os.close(folder)

    def _reserve(self, target: Path, size: int, kept: set[str]) -> BinaryIO | None:
        """The temporary file, locked, with room for `size` bytes; None where another fetches it."""
        try:
            with self._locked(), contextlib.ExitStack() as undo:
                part = undo.enter_context(open(self.folder / f".{target.name}.{size}.part", "ab"))
                if not _lock(part.fileno(), wait=False):
                    return None
                undo.callback(os.unlink, part.name)
                if target.exists():
                    return None
                self._make_room(size, part.name, kept)
                undo.pop_all()
                return part
        except OSError as error:
            raise _unusable(self.folder, error) from error

    def _make_room(self, size: int, own: str, kept: set[str]) -> None:
        """Drop what was used least recently until `size` bytes more are within limit and disk."""
        files, used, coming = [], 0, 0
        for entry in os.scandir(self.folder):
            if entry.path != own:
                stat, planned = entry.stat(), re.search(r"\.(\d+)\.part$", entry.name)
                length = max(stat.st_size, int(planned[1]) if planned else 0)
                files.append((stat.st_atime_ns, length, entry.path))
                used, coming = used + length, coming + max(0, length - 512 * stat.st_blocks)
        limit = min(self.limit, used + shutil.disk_usage(self.folder).free - coming)
        for _, length, path in sorted(files):
            if used + size <= limit:
                return
            if os.path.basename(path).rpartition("-")[0] not in kept and _drop(path):
                used -= length
        if used + size > limit:
            raise _Full(limit)

    def _check_need(self, size: int, limit: int, late: bool) -> None:
        """Raise a sentence where what this process needs at once can have no room."""
        with self._lock:
            sizes = [os.fstat(file.fileno()).st_size for file in self._held.values()] + [size]
        if late or sum(sizes) > limit:
            count = max(len(sizes), len(self._now))
            need = f"{count} shards that are read at a time, {sum(sizes) / len(sizes) * count:.3g}"
            what = "--data.cache-gb" if limit == self.limit else f"the disk of {self.folder}"
            raise Unfetched(f"shards: {what} must hold the {need} bytes, got {limit:.3g}")


def _key(name: str) -> str:
    """The part of a cached file's name that its URL gives."""
    base = re.sub(r"[^\w.]+", "_", base_name(name))[-60:].lstrip(".")
    return f"{base}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _version(told: dict[str, Any]) -> str:
    return repr([told.get(field) for field in _VERSION])


def _unusable(folder: Path, error: OSError) -> Unfetched:
    must = "be a folder that can be read and written ($CLIPA_CACHE names another)"
    return Unfetched(f"shards: {folder} must {must}, got {error.strerror or error}")


def _lock(descriptor: int, *, wait: bool = True, shared: bool = False) -> bool:
    import fcntl  # here, as Windows has none

    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return False


def _open_shared(path: Path) -> BinaryIO | None:
    """The file, with a lock that keeps it from being dropped; None where there is none."""
    while True:
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115 (held until keep)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _unusable(path.parent, error) from error
        _lock(file.fileno(), shared=True)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # dropped in between


def _drop(path: str) -> bool:
    """Delete a file unless a process holds it."""
    try:
        with open(path, "rb") as file:
            if not _lock(file.fileno(), wait=False):
                return False
            os.unlink(path)
            return True
    except OSError:
        return False
