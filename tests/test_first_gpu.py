"""bench/first_gpu.py where there is no GPU: every check of every stage runs, at small sizes."""

import io
import json
import os
import stat
import sys
import textwrap

import pytest

pytest.importorskip("triton")
from bench import first_gpu
from bench.first import report
from bench.first.report import Check

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of empty lanes
SANITIZER = """#!/bin/sh
shift 2
echo "========= COMPUTE-SANITIZER"
"$@"
echo "========= ERROR SUMMARY: 0 errors"
"""


def lines_of(stage):
    """What the checks of a stage say, in this process."""
    out = io.StringIO()
    assert report.run(first_gpu.checks_of(stage), stage, out, 0, 600)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def names(lines):
    return {line["check"] for line in lines}


def test_right(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    lines = lines_of("right")
    assert not [line for line in lines if not line.get("ok", True)]
    ops = ("attention", "patch_embed", "layer_norm", "gelu", "contrastive")
    assert {f"right {op}" for op in (*ops, "masking")} <= names(lines)
    assert {f"beyond 2^31 {op}" for op in ops} <= names(lines)
    assert all(line["ok"] is True for line in lines if "case" in line)
    compiled = [line for line in lines if line["check"] == "launches compiled"]
    assert all(line["registers"] > 0 for line in compiled if "kernel" in line)
    assert any("kernel" in line for line in compiled)
    assert [line["table"] for line in lines if "sanitizer" in line["check"] and "ok" in line] == (
        ["ERROR SUMMARY: 0"]
    )


def test_fast():
    lines = lines_of("fast")
    assert not [line for line in lines if not line.get("ok", True)]
    launches = [line for line in lines if line["check"].startswith("launches") and "us" in line]
    assert all(line["us"] > 0 and line["over_roof"] > 0 for line in launches)
    ours = [line["case"] for line in lines if line.get("from_ours") == 0]
    assert len(ours) >= 5 and all(line.get("from_ours", 0) < 0.05 for line in lines)
    assert {"block H/14", "step H/14"} <= names(lines)
    kernels = [line for line in lines if line["check"] == "step H/14" and "kernel" in line]
    assert any(line["kernel"].startswith("clipa::") for line in kernels)


def test_tune():
    lines = lines_of("tune")
    assert not [line for line in lines if not line.get("ok", True)]
    tried = [line["to"] for line in lines if "to" in line]
    for words in ("attention_short_fwd num_warps", "attention.kernels.config_for(", "-> Config("):
        assert any(words in to for to in tried), words
    wrong = [line["error"] for line in lines if "error" in line]
    assert any("is wrong by" in words for words in wrong)  # half a row's columns


CHILD = """
import json, os, sys, time
skip = int(sys.argv[sys.argv.index("--skip") + 1])
for place, name in list(enumerate(["dies", "hangs", "is fine"]))[skip:]:
    print("a library's words")
    print(json.dumps(dict(stage="right", check=name, begins=place, limit=0.1)), flush=True)
    if name == "dies":
        os._exit(9)
    if name == "hangs":
        time.sleep(60)
    print(json.dumps(dict(stage="right", check=name, ok=True)), flush=True)
"""


def test_a_check_that_dies_or_hangs_does_not_end_the_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(first_gpu, "GRACE", 1.5)
    path, said = tmp_path / "child.py", []
    path.write_text(textwrap.dedent(CHILD))
    first_gpu.supervise("right", 60, said.append, (sys.executable, str(path)))
    ends = {line["check"]: line for line in said if "begins" not in line}
    assert ends["dies"]["error"] == "the process ended with 9"
    assert ends["hangs"]["error"] == "the process ended with a hang"
    assert ends["is fine"]["ok"]


def test_an_error_is_a_line_and_time_is_kept():
    def wrong():
        yield dict(case="one", ok=True)
        raise ValueError("no such tile")

    out = io.StringIO()
    checks = [Check("wrong", wrong), Check("endless", lambda: iter(dict, 1), 0.05)]
    checks.append(Check("late", lambda: [dict(ok=True)]))
    assert report.run(checks, "right", out, 0, 0.06)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    table = "\n".join(report.table(lines))
    assert "1 of 2 FAIL" in table and "ValueError: no such tile" in table
    assert "cut after 0 s" in table and "late                         " in table
    many = [dict(stage="right", check=str(n), ok=True) for n in range(60)]
    assert len(report.table(many)) == report.MOST_ROWS


def test_the_program(tmp_path, capsys):
    output = tmp_path / "lines.jsonl"
    assert first_gpu.main(["right", "--output", str(output), "--seconds", "0"]) == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert {line.get("skipped") for line in written} == {"no time was left"}
    assert "right ceilings" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        first_gpu.main(["quick"])
