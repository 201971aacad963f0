"""`pytest tests/gpu`: one call of each family of kernels on this machine's GPU, with a page of results at the end."""

import importlib.util
import pathlib
import types

import first
import pytest
import torch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", first.BACKENDS)
@pytest.mark.parametrize("family", first.FAMILIES, ids=lambda family: family.name)
def test_a_call_is_as_exact_as_pytorch(family, backend, report_rows):
    if backend not in first.available("cuda"):
        pytest.skip(f"{backend} is not available")
    if reason := first.refused(family, backend, "cuda"):
        pytest.skip(reason)
    row = first.compare(family, backend, "cuda")
    if not first.computes("cuda"):  # the call still gets a line on the page, with its error if it raised one
        row = row._replace(failure=row.failure or first.COMPUTES_NOTHING)
    report_rows.append(row)
    assert not row.failure


# The report itself, on the CPU. linear_cross_entropy adds its bf16 products in another order than PyTorch there.
@pytest.mark.parametrize("family", first.FAMILIES, ids=lambda family: family.name)
def test_the_calls_of_the_report_are_valid(family):
    if "native" not in first.available("cpu") or (reason := first.refused(family, "native", "cpu")):
        pytest.skip(reason)
    row = first.compare(family, "native", "cpu")
    assert not row.failure, row


def test_a_wrong_result_and_an_error_are_reported(monkeypatch, capsys):
    def call(x, backend):
        if backend == "native":
            return x * 1.01
        if backend == "triton":
            raise RuntimeError("no kernel image")
        return x.clone()

    monkeypatch.setattr(first, "FAMILIES", (first.Family("copy", {"x": (3, 4)}, call),))
    monkeypatch.setattr(first, "available", lambda device: list(first.BACKENDS))
    monkeypatch.setattr(first, "refused", lambda *_: "")
    assert first.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "no kernel image" in printed
    assert "result 0: error" in printed
    assert "0 right, 2 wrong" in printed


def test_a_device_that_computes_nothing_is_reported(monkeypatch, capsys):
    """Its results and PyTorch's results on the same device are equal, and both are wrong."""
    assert first.computes("cpu")
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: torch.zeros(8, 8))
    assert not first.computes("cpu")
    assert first.main(["--device", "cpu"]) == 1
    assert "PyTorch's own product of two matrices is wrong here" in capsys.readouterr().out


def test_rows_begin_with_head_dim_32():
    names = [family.name for family in first.rows_of_the_table()]
    assert len(names) == len(set(names)) == 4 * 3 * 4
    assert all("head dim 32" in name for name in names[:12])


def test_pytest_prints_the_page():
    spec = importlib.util.spec_from_file_location("report", pathlib.Path(__file__).with_name("conftest.py"))
    spec.loader.exec_module(report := importlib.util.module_from_spec(spec))
    printed = []
    reporter = types.SimpleNamespace(section=printed.append, write_line=printed.append)
    report.pytest_terminal_summary(reporter)
    assert printed == []  # without a GPU
    report._rows.extend(
        first.Row(family.name, backend, 1.0, 1e-3, 2e-3, "")
        for family in first.FAMILIES for backend in first.BACKENDS
    )  # fmt: skip
    report.pytest_terminal_summary(reporter)
    assert printed[0] == "fastattn on this GPU"
    assert f"{len(report._rows)} right, 0 wrong" in printed[1]
    assert len(printed[1].splitlines()) <= 60
