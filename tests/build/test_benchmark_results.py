"""Results of benchmarks: their rows in every format, their pictures, the comparison of two runs, and the summary."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs the packages of fastattn[train]")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FACTS = {"device": "AMD EPYC", "threads": 2, "torch": "2.13.0", "commit": "abcdef123", "load": 1.2}


@pytest.fixture
def modules(monkeypatch):
    """The modules of benchmarks/, which are not a package."""
    names = ("measured", "pictures", "slower", "report")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield {name: __import__(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


def rows_of(*ratios, benchmark="test_norm[fp32-{}]", **more):
    """A row of torch and one of fastattn for each ratio."""
    rows = []
    for number, ratio in enumerate(ratios):
        for name, value in (("torch", 1.0), ("fastattn", ratio)):
            row = {"benchmark": benchmark.format(number), "implementation": name, "median_us": round(100 / value, 2)}
            rows.append(row | {"ratio": value, "ratio_of_minima": value} | FACTS | more)
    return rows


def test_the_same_rows_from_every_format(modules, tmp_path, capsys):
    measured = modules["measured"]
    stats = {"torch": 2e-6, "fastattn": 1e-6}
    benchmarks = [
        {"group": "test_norm[a]", "stats": {"median": seconds}, "extra_info": {
            "implementation": name, "ratio": 2e-6 / seconds, "ratio_of_minima": 2.5, "gb_per_s": 20.5,
            "percent_of_copy": 41.0,
        }} for name, seconds in stats.items()
    ]  # fmt: skip
    machine = {"cpu": {"brand_raw": "AMD EPYC"}, "threads": 2, "kernels": "avx2", "torch": "2.13.0", "load": 1.2}
    report = {"machine_info": machine, "commit_info": {"id": "abcdef123456"}, "benchmarks": [*benchmarks, {
        "group": "another", "stats": {"median": 1.0}, "extra_info": {},
    }]}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(report))
    rows = measured.read(tmp_path / "a.json")
    measured.write(tmp_path / "a.jsonl", rows)
    assert measured.read(tmp_path / "a.jsonl") == rows
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == len(rows) == 2
    modules["report"].main(tmp_path / "a.jsonl")
    (tmp_path / "a.md").write_text(capsys.readouterr().out)
    again = measured.read(tmp_path / "a.md")
    assert again == [{key: row[key] for key in again[0]} for row in rows]
    assert again[1]["ratio"] == 2.0
    assert (again[1]["percent"], again[1]["limit"], again[1]["commit"]) == (41.0, "copy", "abcdef123")
    assert (again[1]["kernels"], again[1]["threads"]) == ("avx2", 2)


def test_every_result_file_with_rows_can_be_read(modules):
    read = 0
    for path in (BENCHMARKS / "results").glob("*.md"):
        text = path.read_text()
        if "| benchmark | implementation |" in text and modules["measured"].HEAD.search(text):
            assert len(modules["measured"].read(path)) == len(re.findall(r"^\| test_", text, re.MULTILINE)), path
            read += 1
    assert read >= 5


@pytest.mark.parametrize(
    ("kernels", "case"), [("avx512bf16", "{}"), ("avx2", "layer_norm-dropout_add-fp32-2048-{}-fwd_bwd")]
)
def test_the_text_of_a_picture_is_not_cut(modules, kernels, case):
    rows = rows_of(2.0, 0.5, benchmark=f"test_norm[{case}]", device="Intel(R) Xeon(R) Processor", kernels=kernels)
    figure = modules["pictures"].draw("norm", [row | {"load": 18.1} for row in rows])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    for text in (axes.title, axes.xaxis.label, *axes.get_yticklabels()):
        box = text.get_window_extent()
        assert box.x0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text


def test_a_picture_for_each_function(modules, tmp_path):
    rows = rows_of(2.0, 0.5, unit="GB/s", rate=10.0, limit="copy", percent=50.0)
    rows += rows_of(1.5, benchmark="test_call")
    written = modules["pictures"].write_pictures(tmp_path, rows)
    assert [path.name for path in written] == ["norm.svg", "norm.png", "call.svg", "call.png"]
    assert (tmp_path / "norm.png").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "norm.svg").read_bytes()
    modules["pictures"].write_pictures(tmp_path, rows)
    assert (tmp_path / "norm.svg").read_bytes() == first  # a new picture in a commit means new numbers


def test_what_a_picture_shows(modules):
    """Bars begin at 1 and end at the ratio, whether faster or slower; the mark is the rate of the machine."""
    rows = rows_of(2.0, 0.5)
    rows[1] |= {"limit": "copy", "percent": 40.0}
    rows.append({**rows[1], "implementation": "torch.compile", "ratio": 1.25})
    (axes,) = modules["pictures"].draw("norm", rows).axes
    ends = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert ends == [(1, 0.5), (1, 1.25), (1, 2.0)]
    assert [text.get_text() for text in axes.texts] == ["2.00", "1.25", "0.50"]
    marks = [line.get_xdata()[0] for line in axes.lines if line.get_linewidth() == 2]
    assert marks == [2.0 * 100 / 40]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["fp32, 0", "fp32, 1"]
    low, high = axes.get_xlim()
    assert low < 0.5
    assert high > 5


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ("test_attention[causal-4x8x512x64-fp32-fwd_bwd]", "causal, 4 × 8 × 512 × 64, fp32, forward + backward"),
        ("test_norm[layer_norm-plain-fp32-2048-1024-fwd]", "layer norm, plain, fp32, 2048 × 1024, forward"),
        ("test_feed_forward[silu_gated-bf16-128-fwd-0.1]", "silu gated, bf16, d_model 128, forward, dropout 0.1"),
        ("test_training_step[fp32-0.1-128-4-16-64]", "fp32, dropout 0.1, d_model 128"),
        ("test_encoder[1-16-ONNX Runtime]", "batch 1, 16 tokens, ONNX Runtime"),
        ("test_generate[int8]", "int8"),
        ("test_read_rate", "read rate"),
    ],
)
def test_a_case_is_named_in_words(modules, row, label):
    (function,) = modules["pictures"].picture_names([{"benchmark": row}])
    assert modules["pictures"].case_name(function, row) == label


def test_a_picture_mixes_no_machines(modules, tmp_path, capsys):
    for name, load in (("a", 1.0), ("b", 2.0)):
        modules["measured"].write(tmp_path / f"{name}.jsonl", rows_of(2.0, load=load))
    with pytest.raises(SystemExit):
        modules["pictures"].main([str(tmp_path), *map(str, tmp_path.glob("*.jsonl"))])
    assert "not of one run" in capsys.readouterr().err


def test_what_got_slower(modules, tmp_path, capsys):
    old = rows_of(2.0, 2.0, 2.0, 2.0)
    new = rows_of(1.5, 1.9, 2.4, 1.5)
    new[-1]["ratio_of_minima"] = 2.0  # only the median: the machine was disturbed
    for name, rows in (("old", old), ("new", new), ("other", rows_of(1.0, benchmark="test_other"))):
        modules["measured"].write(tmp_path / f"{name}.jsonl", rows)
    slower, faster, both = modules["slower"].compare(old, new, 1.1)
    assert (slower, both) == (["test_norm[fp32-0]: 2.00 (2.00) → 1.50 (1.50)"], 4)
    assert faster == ["test_norm[fp32-2]: 2.00 (2.00) → 2.40 (2.40)"]
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("old", "new", "other")]
    assert modules["slower"].main(paths[:2]) == 1
    assert "1 of 4 rows got slower" in capsys.readouterr().out
    assert modules["slower"].main([paths[0], paths[0]]) == 0
    assert "Another machine" not in capsys.readouterr().out
    modules["measured"].write(tmp_path / "older.jsonl", rows_of(2.0, kernels="avx2"))  # virtual machines hide the model
    modules["measured"].write(tmp_path / "newer.jsonl", rows_of(2.0, kernels="avx512"))
    modules["slower"].main([str(tmp_path / f"{name}.jsonl") for name in ("older", "newer")])
    assert "Another machine" in capsys.readouterr().out
    modules["slower"].main([paths[0], str(tmp_path / "newer.jsonl")])
    said = capsys.readouterr().out
    assert "Only one file names the kernels" in said
    assert "3 of 4 rows of the old run are not in the new one" in said
    with pytest.raises(SystemExit):
        modules["slower"].main([paths[0], paths[2]])


@pytest.mark.parametrize(("name", "text"), [("a.md", "# Text\n"), ("a.json", "no JSON"), ("a.jsonl", ""), ("b", None)])
def test_a_file_without_rows_is_named(modules, tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=re.escape(f"{tmp_path / name}")):
        modules["slower"].main([str(tmp_path / name)] * 2)


BENCHMARK = """
import time

def test_wait(compare):
    compare({"torch": lambda: time.sleep(0.002) or 1, "fastattn": lambda: time.sleep(0.001) or 1}, seconds=0.01)
"""


def test_the_summary_comes_last_and_alone(tmp_path):
    for name in ("conftest.py", "measured.py", "pictures.py"):
        shutil.copy(BENCHMARKS / name, tmp_path)
    with (tmp_path / "conftest.py").open("a") as conftest:
        conftest.write("\ncopy_rate = gemm_rate = lambda _: 1e9  # what it measures takes seconds\n")
    (tmp_path / "test_wait.py").write_text(BENCHMARK)
    (tmp_path / "test_skipped.py").write_text("import pytest\npytest.skip('a reason', allow_module_level=True)\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -rs\n")
    command = [sys.executable, "-m", "pytest", ".", "--pictures", "out", "-p", "no:cacheprovider"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    after_reasons = done.stdout.split("a reason")[-1].splitlines()
    titles = [line for line in done.stdout.splitlines() if re.match(r"[=-]+ .* [=-]+$", line)]
    assert "side by side" in titles[-2]  # the last one counts the tests
    assert [line.split()[0] for line in after_reasons if line.endswith("x)")] == ["torch", "fastattn"]
    assert "Rounds" not in done.stdout  # a column of pytest-benchmark's own table
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.jsonl", "wait.png", "wait.svg"]
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [row["implementation"] for row in rows] == ["torch", "fastattn"]
    assert {"device", "torch", "fastattn", "python", "commit", "threads", "kernels", "timer", "load"} <= rows[0].keys()
