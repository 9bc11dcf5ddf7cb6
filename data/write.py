"""Pictures with captions become tar shards, and the table of their sizes.

    python -m data.write photos shards          1.jpg with 1.txt beside it, in folders too
    python -m data.write photos.csv shards      columns of file names and captions; .tsv, .parquet
    python -m data.write --embedded shards      the embedded drawings that train, with their names

Files are copied as they are. Shards are written whole, one after the other, in the order of the
names; the same input gives the same bytes.
"""

import csv
import io
import itertools
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image
from tqdm import tqdm

from .emoji import load_emoji
from .files import read_text, write_whole
from .index import TABLE, write_tables
from .tars import CAPTIONS, IMAGES

_PATHS = ("filepath", "filename", "file", "path", "image", "image_path")  # names of columns
_TEXTS = ("caption", "title", "text")

Sample = dict[str, bytes]  # a sample's files by extension


def write_shards(samples: Iterable[Sample], folder: Path, per_shard: int = 10_000) -> int:
    """Write samples as `<folder>/00000.tar`, ... and sizes.json; the number of samples.

    Args:
        samples: each {"jpg": b"...", "txt": b"..."}; named by their place, 000000000.jpg.
        folder: new or empty.
        per_shard: samples of a tar.

    Raises:
        ValueError: the folder holds something, or per_shard is below 1.
    """
    if per_shard < 1:
        raise ValueError(f"write: samples of a shard must be at least 1, got {per_shard}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"write: {folder} must be a new or empty folder, got one that is not")
    folder.mkdir(parents=True, exist_ok=True)
    sizes: list[tuple[Path, int]] = []
    stream, total = iter(samples), 0
    for held in stream:
        path = folder / f"{len(sizes):05d}.tar"
        some = itertools.islice(stream, per_shard - 1)
        sizes.append((path, write_shard(path, itertools.chain([held], some), total)))
        total += sizes[-1][1]
    write_tables(sizes)
    return total


def write_shard(path: Path, samples: Iterable[Sample], first: int = 0) -> int:
    """Write one tar whose samples are named by their place, from `first` on; their number."""
    total = 0
    with (
        write_whole(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for total, sample in enumerate(samples, 1):
            for extension, data in sample.items():
                add_member(tar, f"{first + total - 1:09d}.{extension}", data)
    return total


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A file in a tar, without owner and time: the same input gives the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def of_folder(folder: Path) -> Iterator[Sample]:
    """Images below a folder with the .txt or .json of the same name; others are left out."""
    files = sorted(path for path in folder.rglob("*") if path.suffix[1:].lower() in IMAGES)
    for path in files:
        for kind in CAPTIONS:
            caption = path.with_suffix(f".{kind}")
            if caption.is_file():
                yield {path.suffix[1:].lower(): path.read_bytes(), kind: caption.read_bytes()}
                break


def of_table(path: Path) -> Iterator[Sample]:
    """Rows of a CSV, TSV or Parquet file that name an image and say its caption.

    File names count from the table's folder. A row without a file or a caption is left out.

    Raises:
        ValueError: no column of file names or of captions; names those that there are.
    """
    rows = _parquet(path) if path.suffix == ".parquet" else _csv(path)
    held = next(rows, None)
    if held is None:
        return
    names = [_column(path, held, known) for known in (_PATHS, _TEXTS)]
    while held is not None:
        name, caption = (held[column] for column in names)
        image = path.parent / str(name)
        if name and caption and image.suffix[1:].lower() in IMAGES and image.is_file():
            yield {image.suffix[1:].lower(): image.read_bytes(), "txt": str(caption).encode()}
        held = next(rows, None)


def _column(path: Path, row: dict[str, object], known: tuple[str, ...]) -> str:
    for column in row:
        if str(column).strip().lower() in known:
            return column
    must, came = " or ".join(known), ", ".join(map(str, row))
    raise ValueError(f"write: {path} must have a column {must}, got {came}")


def _csv(path: Path) -> Iterator[dict[str, object]]:
    text = read_text(path, "write")
    delimiter = "\t" if path.suffix == ".tsv" or "\t" in text.partition("\n")[0] else ","
    yield from csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)


def _parquet(path: Path) -> Iterator[dict[str, object]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        must = "pyarrow must be installed to read it (pip install pyarrow)"
        raise ValueError(f"write: {path}: {must}, got none") from error
    for batch in parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def of_drawings() -> Iterator[Sample]:
    """The embedded drawings that train, as PNG, each with its name."""
    pairs = load_emoji()
    for place in pairs.train.tolist():
        file = io.BytesIO()
        Image.fromarray(pairs.images[place].numpy()).save(file, "PNG")
        yield {"png": file.getvalue(), "txt": pairs.names[int(pairs.concept[place])].encode()}


@dataclass(frozen=True)
class Flags:
    """Pictures with captions become tar shards, and sizes.json beside them."""

    places: tyro.conf.Positional[tuple[str, ...]]  # a folder or table, then the shards' folder
    embedded: bool = False  # the embedded drawings; then the shards' folder alone
    samples: int = 10_000  # of a shard


def main(argv: list[str] | None = None) -> None:
    """The program. What will not do ends it with a sentence."""
    flags = tyro.cli(Flags, args=argv)
    try:
        *sources, folder = flags.places or ("",)
        if not folder or len(sources) != (not flags.embedded):
            must = (
                "the shards' folder" if flags.embedded else "a folder or table and another folder"
            )
            raise ValueError(f"write: the places must be {must}, got {list(flags.places)}")
        samples = of_drawings() if flags.embedded else _samples(Path(sources[0]))
        total = write_shards(tqdm(samples, unit="pair"), Path(folder), flags.samples)
        if not total:
            raise ValueError(f"write: {sources[0]} must hold images with captions, got none")
    except (ValueError, OSError) as error:
        raise SystemExit(f"data.write: {error}") from error
    print(f"{total:,} samples, and {TABLE}, in {folder}")


def _samples(source: Path) -> Iterator[Sample]:
    if source.is_dir():
        return of_folder(source)
    if source.suffix in (".csv", ".tsv", ".parquet") and source.is_file():
        return of_table(source)
    must = "be a folder, or a table that ends in .csv, .tsv or .parquet"
    raise ValueError(f"write: the source must {must}, got {str(source)!r}")


if __name__ == "__main__":
    main()
