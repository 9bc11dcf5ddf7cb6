"""Names of files by braces and stars, where a folder's own name may hold either."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand

from .remote import is_remote, is_there, listed

Pattern = str | Path | Sequence[str | Path]


def file_names(pattern: Pattern) -> list[str]:
    """Shard files of a pattern, or of a list of such: paths, and URLs of remote ones.

    Braces are bash's: `{000..127}`, `{0..6..2}`, `{a..c}`, `{train,val}`, nested too; then stars,
    question marks and [brackets]; "::" divides patterns. A file or folder that is there by its
    literal name is meant, so that `laion [aesthetic]/{0000..0099}.tar` finds its files. Of what the
    braces of a URL name, the first in each folder is asked for, and not a hundred thousand; stars
    ask the store for its list.

    Raises:
        ValueError: a name matches no file, or braces do not pair.

    >>> file_names("shards/{00..02}.tar")
    Traceback (most recent call last):
    ValueError: shards: pattern must name files that are there, got 'shards/00.tar'
    """
    if isinstance(pattern, str | Path):
        pattern = sources_of(pattern)
    found, asked = [], set()
    for one in map(str, pattern):
        found += _remote(one, asked) if is_remote(one) else _local(one.removeprefix("file://"))
    if not found:
        raise ValueError("shards: pattern must name at least one file, got none")
    return found


def expand(pattern: Pattern) -> list[Path]:
    """`file_names` as paths, for local files.

    >>> expand([__file__]) == [Path(__file__)]
    True
    """
    return [Path(name) for name in file_names(pattern)]


def _local(pattern: str) -> list[str]:
    found, (base, rest) = [], _split(pattern)
    for tail in _braces(rest):
        matches = sorted(_matches(base, tail))
        if not matches or not all(map(os.path.isfile, matches)):
            raise _nothing(base + tail)
        found += matches
    return found


def _remote(pattern: str, asked: set[str]) -> list[str]:
    found = []
    for url in _braces(pattern):
        # A question mark and brackets are parts of web addresses.
        if "*" in url or ("?" in url and not url.startswith("http")):
            named = listed(url)
            if not named:
                raise _nothing(url)
            found += named
            continue
        folder = url.rpartition("/")[0]
        if folder not in asked and not is_there(url):
            raise _nothing(url)
        asked.add(folder)
        found.append(url)
    return found


def _nothing(name: str) -> ValueError:
    return ValueError(f"shards: pattern must name files that are there, got {name!r}")


def sources_of(
    pattern: str | Path | Sequence[str | Path],
) -> list[str | Path | Sequence[str | Path]]:
    """The sources of a pattern, which "::" divides; a list of files is one.

    >>> sources_of("a/{0..9}.tar::b.tar")
    ['a/{0..9}.tar', 'b.tar']
    """
    return list(pattern.split("::")) if isinstance(pattern, str) else [pattern]


def _split(pattern: str) -> tuple[str, str]:
    """The folders of a pattern that are there as they are written, and the rest."""
    base, rest = "", pattern
    while rest:
        part, slash, after = rest.partition("/")
        if not os.path.lexists(base + part + slash):
            break
        base, rest = base + part + slash, after
    return base, rest


def _braces(text: str) -> Iterator[str]:
    try:
        yield from braceexpand(text, escape=False)
    except UnbalancedBracesError as error:
        raise ValueError(f"shards: pattern must pair its braces, got {text!r}") from error


def _matches(base: str, tail: str) -> list[str]:
    """Paths in `base`, taken literally, that a tail without braces matches, part by part."""
    if not tail:
        return [base]
    part, slash, after = tail.partition("/")
    here = [base + part] if os.path.lexists(base + part) else glob.glob(glob.escape(base) + part)
    return [path for one in here for path in _matches(one + slash, after)]
