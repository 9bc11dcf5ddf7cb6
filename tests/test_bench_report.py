"""bench/report.py: one page of measured, modelled and compiled figures, each by its kind."""

import json

import pytest

from bench.report import duration, main


def case(bench, group, seconds, **params):
    fullname = f"bench/{bench}.py::test[{params.get('name')}]"
    info = dict(device="cpu", torch="2.14.1")
    stats = dict(min=seconds)
    return dict(fullname=fullname, name="test", group=group, params=params, stats=stats) | dict(
        extra_info=info
    )


@pytest.fixture
def benches(tmp_path):
    """Two benches, one of them over lengths; a bench that names nobody is left out."""
    found = [
        case("bench_other", None, 1.0),
        case("bench_gelu", "tanh", 2e-3, name="ours", size="B"),
    ]
    found.append(case("bench_gelu", "tanh", 5e-3, name="eager", size="B"))
    for length in (8, 50, 197):
        for name, share in (("ours", 1), ("sdpa", 2)):
            seconds = 1e-6 * length * share
            named = dict(name=name, length=length, dtype="fp32")
            found.append(case("bench_attention", f"L={length}", seconds, **named))
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(dict(benchmarks=found)))
    return path


def test_a_page(benches, tmp_path, capsys):
    row = dict(kernel="gelu", shape="9x9", call="h14", arch=90, bound="issue")
    rows = [row | dict(modelled_us=dict(memory=m, issue=i)) for m, i in ((1.0, 1.5), (10.0, 12.0))]
    (tmp_path / "roofs.json").write_text(json.dumps(rows))
    of = dict(kernel="gelu", arch=80, registers=40, spill_stores=0, blocks_per_sm=9)
    lines = [json.dumps(of | dict(registers=n)) for n in (40, 64)]
    (tmp_path / "compiled.jsonl").write_text("\n".join(lines) + "\n")
    more = ["--roofs", str(tmp_path / "roofs.json"), "--compiled", str(tmp_path / "compiled.jsonl")]
    main([str(benches), *more, "--to", str(tmp_path / "out" / "page")])
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'page.md'}\n"
    page = (tmp_path / "out" / "page.md").read_text()
    assert "| tanh | 2 ms | 5 ms (2.50x) |" in page
    assert "| L=197 | 197 us | 394 us (2.00x) |" in page
    assert page.count("Measured on cpu, torch 2.14.1: ") == 2
    assert "Modelled from machine code, not measured" in page
    assert "| gelu | 90 | 9x9, h14 | 12 | 10 | issue |" in page
    assert "Counted by the compiler" in page and "| gelu | 80 | 2 | 64 | 0 | 9 |" in page
    assert "bench_other" not in page
    for name in ("attention", "gelu"):
        picture = tmp_path / "out" / f"page-{name}.png"
        assert picture.read_bytes()[:4] == b"\x89PNG" and f"]({picture.name})" in page


@pytest.mark.parametrize(
    ("seconds", "words"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.2e-6, "4.2 us"), (0, "0 us")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize("text", ["", "[]", '{"other": 1}'])
def test_refuses_other_files(text, tmp_path):
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(SystemExit, match=r"^bench.report: report: .*bench.json must be of --bench"):
        main([str(tmp_path / "bench.json"), "--to", str(tmp_path / "page")])
