"""scripts/gpu_check.sh: the files and tests it would run exist. Stand-ins for Python and the tools record calls."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["info", "first", "rows", "hopper", "tests", "forward", "backward", "decode", "bench", "sanitizer"]
SCRIPTS = {"first": "", "rows": "--rows"}  # options of tests/gpu/first.py
HOPPER_FILES = {f"tests/kernels/test_{name}_sm90.py" for name in ("attention", "attention_decode")} | {
    "tests/kernels/test_sm90_units.py"
}

PYTHON = """#!/bin/bash
echo " $*" | tr '\n' ' ' >> "$NOTES"; echo >> "$NOTES"
case "$*" in
  *get_device_capability*) echo 9 0 ;;
  "-P - "*) printf '{"part": "%s", "exit_code": %s, "commit": "%s"}' "$4" "$5" "$7" > "$3" ;;
esac
"""
SANITIZER = """#!/bin/bash
"${@:5}"
[ "$2" != "$FAILS" ] || exit 9
"""


@pytest.fixture
def check(tmp_path):
    """check(part, ...) -> (exit code, what was printed, the pytest calls: [(paths, text of -k), ...])."""

    def run(*parts, fails=""):
        tools, notes = tmp_path / "tools", tmp_path / "notes"
        tools.mkdir(exist_ok=True)
        notes.write_text("")
        for name, text in (
            ("python", PYTHON), ("compute-sanitizer", SANITIZER), ("nvidia-smi", "#!/bin/bash\n"),
        ):  # fmt: skip
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"), "NOTES": str(notes),
            "OUT": str(tmp_path / "out"), "FAILS": fails,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", ROOT / "scripts" / "gpu_check.sh", *parts], env=environment, capture_output=True, text=True
        )
        calls = []
        for line in notes.read_text().splitlines():
            if " -m pytest " in line:
                arguments, _, keywords = re.sub(r" --benchmark-json \S+", "", line).partition(" -k ")
                calls.append((re.findall(r"(?:tests|benchmarks)/\S+", arguments), keywords.strip()))
        return done.returncode, done.stdout + done.stderr, calls

    return run


@pytest.fixture(scope="module")
def collected(request):
    """The ids of all tests in the files that the script names."""
    script = (ROOT / "scripts" / "gpu_check.sh").read_text()
    ids = []
    for folder in ("tests", "benchmarks"):
        files = {path for name in re.findall(rf"{folder}/[\w*/]+\.py", script) for path in ROOT.glob(name)}
        here = [item.nodeid for item in request.session.items if item.path in files]
        if {name.partition("::")[0] for name in here} != {str(path.relative_to(ROOT)) for path in files}:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", *sorted(files)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            here = [line for line in done.stdout.splitlines() if "::" in line]
        ids += here
    return ids


def selected(ids, paths, keywords):
    """The tests that pytest selects from these paths with this -k."""
    expression = re.sub(
        r"[^\s()]+", lambda word: word[0] if word[0] in ("and", "or", "not") else f"({word[0]!r} in name)", keywords
    )
    there = [name for name in ids if any(name == path or name.startswith((f"{path}::", f"{path}[")) for path in paths)]
    return [name for name in there if not keywords or eval(expression, {"name": name})]


@pytest.mark.parametrize("part", [part for part in PARTS if part not in {"info", *SCRIPTS}])
def test_a_part_names_tests_that_exist(part, check, collected):
    if part in ("forward", "backward", "decode", "bench"):
        pytest.importorskip("pytest_benchmark")
    code, printed, calls = check(part)
    assert code == 0, printed
    assert calls
    for paths, keywords in calls:
        for path in paths:
            assert selected(collected, [path], ""), f"no test in {path}"
        assert selected(collected, paths, keywords), f"-k {keywords!r} selects nothing in {paths}"


def test_the_part_for_hopper_runs_every_test_of_its_files(check, collected):
    _, _, calls = check("hopper")
    run = {name for paths, keywords in calls for name in selected(collected, paths, keywords)}
    assert [name for name in collected if name.partition("::")[0] in HOPPER_FILES and name not in run] == []


@pytest.mark.parametrize(("part", "tool", "code"), [
    ("hopper", "memcheck", 1), ("hopper", "racecheck", 0), ("sanitizer", "racecheck", 1), ("rows", "memcheck", 1),
])  # fmt: skip
def test_what_a_sanitizer_reports_fails_its_part(part, tool, code, check):
    """Except racecheck's reports on kernels that order their copies by mbarriers."""
    found, printed, _ = check(part, fails=tool)
    assert found == code
    assert f"gpu_check: {part} ended with {code}" in printed
    assert ("racecheck did not pass" in printed) == (code == 0)


@pytest.mark.parametrize("part", SCRIPTS)
def test_the_first_parts_run_the_script_of_first_calls(part, check, tmp_path):
    code, printed, calls = check(part)
    assert (code, calls) == (0, []), printed
    assert (ROOT / "tests" / "gpu" / "first.py").exists()
    lines = [line for line in (tmp_path / "notes").read_text().splitlines() if "first.py" in line]
    assert [line.partition("first.py")[2].strip() for line in lines] == [SCRIPTS[part]]


def test_the_results_are_one_file(check, tmp_path):
    check("info", "first")
    with tarfile.open(tmp_path / "out" / "gpu_check.tar.gz") as file:
        assert sorted(file.getnames()) == ["first.json", "first.log", "info.json", "info.log"]
    check("--force", "info")  # the file does not contain itself
    with tarfile.open(tmp_path / "out" / "gpu_check.tar.gz") as file:
        assert "gpu_check.tar.gz" not in file.getnames()


def test_a_part_that_passed_is_not_run_again(check):
    assert check()[0] == 0
    code, printed, calls = check()
    assert (code, calls) == (0, [])
    assert re.findall(r"gpu_check: (\w+) has already passed", printed) == PARTS


def test_an_unknown_part_is_refused(check):
    code, printed, _ = check("everything")
    assert code == 2
    parts = " ".join(PARTS)
    assert f"there is no part 'everything'; the parts are {parts} tune, and the only option is --force" in printed


def test_tuning_is_asked_for_and_keeps_its_times_with_the_results(check, tmp_path):
    check()
    assert "tune_attention" not in (tmp_path / "notes").read_text()
    code, printed, calls = check("tune")
    assert (code, calls) == (0, []), printed
    (line,) = (line for line in (tmp_path / "notes").read_text().splitlines() if "tune_attention.py" in line)
    assert line.strip() == f"-P scripts/tune_attention.py --resume {tmp_path / 'out' / 'tune_attention.json'}"


def load_benchmark(name):
    spec = importlib.util.spec_from_file_location(f"loaded_{name}", ROOT / "benchmarks" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_the_benchmarks_of_raw_ops_take_a_backend_that_has_the_op(monkeypatch):
    """On a GPU, the C++ library is available but has no pass over the logits."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    conftest = load_benchmark("conftest")
    monkeypatch.setattr(conftest, "why_not_on_device", lambda op, name, device: None if name == "triton" else "none")
    monkeypatch.setitem(sys.modules, "conftest", conftest)
    bench = load_benchmark("test_linear_cross_entropy")
    raw = types.SimpleNamespace(cross_entropy_fwd=types.SimpleNamespace(triton=lambda *_: "the loss of Triton"))
    monkeypatch.setattr(torch.ops, "fastattn", raw)
    found = []
    bench.test_cross_entropy_pass(lambda candidates, **_: found.append(candidates["fastattn"]()[0]), torch.float32)
    assert found == ["the loss of Triton"]


def test_the_benchmarks_of_a_cache_serve_several_sequences(monkeypatch):
    """A GPU gets other shapes than the CPU: with two sequences and grouped heads, every candidate gives the same."""
    monkeypatch.setitem(sys.modules, "conftest", types.SimpleNamespace(DEVICE="cpu"))
    bench = load_benchmark("test_attention_decode")
    shape = (2, 4, 2, 128, 16)
    monkeypatch.setattr(bench, "SHAPES", [shape] * 4)
    compared = []

    def compare(candidates, *, tolerance, nbytes, verify=None):
        first, *others = (call() for call in (verify or candidates).values())
        for other in others:
            torch.testing.assert_close(other, first, atol=tolerance, rtol=tolerance)
        compared.append(len(others))

    bench.test_contiguous(compare, shape, torch.float32)
    bench.test_several_queries(compare, 4, torch.float32)
    bench.test_paged(compare, 4, torch.float32)
    bench.test_append(compare, torch.float32)
    assert compared == [1] * 4


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout of git")
def test_an_unpacked_archive_knows_its_commit(tmp_path):
    """The results of a rented machine, which has no repository, name the commit."""
    made = subprocess.run(["git", "archive", "HEAD", "scripts"], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", tmp_path], input=made.stdout, check=True)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "NOTES": "/dev/null", "OUT": str(tmp_path)}
    subprocess.run(["bash", "scripts/gpu_check.sh", "first"], cwd=tmp_path, env=environment, check=True)
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads((tmp_path / "first.json").read_text())["commit"] == head.stdout.strip()
