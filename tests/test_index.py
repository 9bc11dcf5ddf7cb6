"""The table of samples a shard: read, counted, wrong, and a start that reads no tar."""

import json
import os
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
import test_shards
import torch
import torch.multiprocessing as mp
from test_batches import same
from test_shards import expand, shard_loader

from clipa_kernels.masking.philox import WINDOW_STREAM
from data import index
from data import shards as shards_module
from data.batches import order
from data.index import TABLE, known_sizes, main, read_table
from data.shards import ShardLoader
from training import build, distributed

numbers, shards = test_shards.numbers, test_shards.shards  # fixtures


@pytest.fixture
def copies(shards, tmp_path):
    """The five shards in a folder that may be written."""
    folder = tmp_path / "copies"
    folder.mkdir()
    for path in shards.glob("*.tar"):
        os.link(path, folder / path.name)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPA_CACHE", str(tmp_path / "cache"))


def pattern(folder):
    return f"{folder}/{{00..04}}.tar"


def test_the_program_writes_what_open_clip_reads(copies, cache, capsys):
    main([pattern(copies), "--processes", "2"])
    assert capsys.readouterr().out == "35 samples\n"
    assert json.loads((copies / TABLE).read_text()) == {f"0{i}.tar": 7 for i in range(5)}
    assert known_sizes(expand(pattern(copies))).tolist() == [7] * 5


def test_what_is_known_is_not_counted_again(copies, cache, monkeypatch):
    (copies / TABLE).write_text(json.dumps({"00.tar": 5, "elsewhere.tar": 3}))
    (copies / "01_stats.json").write_text(json.dumps({"count": 9, "successes": 6}))
    counted = []
    real = index.count
    monkeypatch.setattr(
        index, "count", lambda name, shelf: counted.append(Path(name).name) or real(name, shelf)
    )
    assert index.index(pattern(copies), processes=1) == 5 + 6 + 3 * 7
    assert counted == ["02.tar", "03.tar", "04.tar"]
    assert read_table(copies)["elsewhere.tar"] == 3  # of another pattern
    assert index.index(pattern(copies), processes=1, again=True) == 35


def test_a_stop_keeps_what_is_counted(copies, cache, monkeypatch):
    real = index.count

    def stops(name, shelf):
        if Path(name).name == "03.tar":
            raise KeyboardInterrupt
        return real(name, shelf)

    monkeypatch.setattr(index, "count", stops)
    with pytest.raises(KeyboardInterrupt):
        index.index(pattern(copies), processes=1)
    assert read_table(copies) == {"00.tar": 7, "01.tar": 7, "02.tar": 7}


def test_a_known_start_reads_no_tar_and_gives_the_same_batches(
    copies, numbers, tmp_path, monkeypatch
):
    plain = shard_loader(pattern(copies), numbers, tmp_path / "a")
    (copies / TABLE).write_text(json.dumps({f"0{i}.tar": 7 for i in range(5)}))
    read = []
    real = shards_module._scan_tar
    monkeypatch.setattr(shards_module, "_scan_tar", lambda path: read.append(path) or real(path))
    loader = shard_loader(pattern(copies), numbers, tmp_path / "b")
    assert loader.count == 35 and not read
    first = loader[0]
    assert len(read) <= 2 * loader.window and len(set(read)) == len(read)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each shard holds halves of samples
        for step in range(12):
            same(loader[step], plain[step])
    same(loader[0], first)


def test_an_index_that_says_too_much_is_told_and_the_run_goes_on(copies, numbers, tmp_path):
    (copies / TABLE).write_text(json.dumps({f"0{i}.tar": 7 + 2 * (i == 1) for i in range(5)}))
    loader = shard_loader(pattern(copies), numbers, tmp_path, steps=6)
    with pytest.warns(
        UserWarning, match=r"01\.tar must hold the 9 samples that its index says, got 7"
    ):
        batches = list(loader)
    assert batches[-1].skipped > 0
    faults = {kind: fault for batch in batches for kind, fault in batch.faults.items()}
    assert faults.keys() == {"shard"} and "01.tar: must hold 9 samples, got 7" in str(faults)


def test_a_shard_newer_than_its_table_is_counted_again(copies, cache):
    (copies / TABLE).write_text(json.dumps({f"0{i}.tar": 9 for i in range(5)}))
    os.utime(copies / TABLE, (100, 100))
    for i in range(5):
        os.utime(copies / f"0{i}.tar", (50 + 100 * (i > 2),) * 2)
    with pytest.warns(UserWarning, match=r"sizes\.json must be newer .* 2 of .* first 03\.tar"):
        assert known_sizes(expand(pattern(copies))).tolist() == [9, 9, 9, -1, -1]
    with pytest.warns(UserWarning, match="counted again"):
        assert index.index(pattern(copies), processes=1) == 3 * 9 + 2 * 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert known_sizes(expand(pattern(copies))).tolist() == [9, 9, 9, 7, 7]


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"00.tar": "many"}', '{"00.tar": -1}', '{"00.tar": null}']
)
def test_a_table_that_is_none(copies, numbers, tmp_path, text):
    (copies / TABLE).write_text(text)
    with pytest.raises(ValueError, match=r"index: .*sizes\.json must"):
        shard_loader(pattern(copies), numbers, tmp_path)
    with pytest.raises(SystemExit, match=r"^data\.index: index: .*sizes\.json must"):
        main([pattern(copies)])


def test_bad_flags_end_with_a_sentence(copies, tmp_path, cache):
    with pytest.raises(SystemExit, match=r"^data\.index: .*must name files that are there"):
        main([str(tmp_path / "none.tar")])
    (copies / "00.tar").unlink()
    (copies / "00.tar").write_text("no tar")
    with pytest.raises(
        SystemExit, match=r"^data\.index: shards: .*00\.tar must be an uncompressed"
    ):
        main([pattern(copies), "--processes", "2"])


def test_places_are_those_of_a_search_without_tables(numbers, copies, tmp_path):
    """Sizes of 0 to 6, windows of three: every sample once an epoch, window after window."""
    sizes = torch.randint(7, (20,), generator=torch.manual_seed(3))
    paths = [copies / f"{i:02d}.tar" for i in range(20)]
    for path in paths[5:]:
        os.link(paths[0], path)
    table = {path.name: size for path, size in zip(paths, sizes.tolist(), strict=True)}
    (copies / TABLE).write_text(json.dumps(table))
    loader = ShardLoader(
        paths, numbers, batch_size=1, image_size=8, context=8, steps=1, window=3, cache=tmp_path
    )
    for epoch in range(3):
        dealt = order(loader.seed, epoch, 20, stream=WINDOW_STREAM).numpy()
        ends = sizes[dealt].cumsum(0)
        found = [loader.locate(epoch * loader.count + place) for place in range(loader.count)]
        assert sorted(found) == [(s, r) for s in range(20) for r in range(sizes[s])]
        slots = {int(shard): slot // 3 for slot, shard in enumerate(dealt)}
        windows = [slots[shard] for shard, _ in found]
        assert windows == sorted(windows) and int(ends[-1]) == len(found)
    assert np.all(known_sizes(paths) == sizes.numpy())


def _member(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = distributed.setup("cpu", threads=1, timeout=60)
    real, counted = index.count, []
    build.count = lambda name, shelf: counted.append(Path(name).name) or real(name, shelf)
    build.count_samples(pattern(folder), world)
    assert counted == [["00.tar", "02.tar", "04.tar"], ["01.tar", "03.tar"]][rank]
    assert read_table(Path(folder)) == {f"0{i}.tar": 7 for i in range(5)}
    build.count_samples(pattern(folder), world)
    assert len(counted) == [3, 2][rank]  # all is known
    known, build.known_sizes = build.known_sizes, lambda names: np.full(5, 7 - 8 * rank)
    build.count_samples(pattern(folder), world)  # by one of them: each node may have its disk
    assert len(counted) == [6, 4][rank]
    build.known_sizes = known

    if rank == 0:
        (Path(folder) / "01.tar").unlink()
        (Path(folder) / "01.tar").write_text("no tar")
        (Path(folder) / TABLE).unlink()
    world.barrier()
    try:
        build.count_samples(pattern(folder), world)
    except (ValueError, SystemExit) as error:  # told by the process that met it, and all end
        assert ("01.tar must be an uncompressed tar" in str(error)) == (rank == 1)
    else:
        raise AssertionError("all must end")
    world.close()


def test_processes_share_the_count_and_its_end(copies, cache):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_member, args=(port, str(copies)), nprocs=2)
