"""`fastattn info` lists every backend and part with its state or the reason why it is missing."""

import sys

import torch

import fastattn
from fastattn import _info
from fastattn.cli import main
from fastattn.ops import _libraries
from fastattn.ops._backends import set_unavailable, why_not_available, why_not_implemented


def section(report, title):
    """The lines of one section as {name: text}."""
    lines = report.split("\n" + title)[1].partition("\n\n")[0].splitlines()[1:]
    return {name.strip(): text for name, _, text in (line.strip().partition("  ") for line in lines)}


def test_versions_and_devices():
    report = "\n" + _info.report()
    versions = section(report, "Versions")
    assert versions["fastattn"].strip().startswith(fastattn.__version__)
    assert torch.__version__ in versions["torch"]
    devices = section(report, "Devices")
    assert f", {torch.get_num_threads()} thread" in devices["cpu"]
    assert ("cuda:0" if torch.cuda.is_available() else "cuda") in devices


def test_every_backend_is_available_or_has_its_reason():
    found = section("\n" + _info.report(), "Backends")
    for device, state in fastattn.backends().items():
        for name, reason in state.items():
            text = found[f"{device} {name}"].strip()
            assert text.startswith(reason if reason == "available" else f"no: {reason}")


def test_an_op_lists_the_backends_that_serve_it():
    before = why_not_available("native", "cpu")
    try:
        set_unavailable("native", "cpu", "switched off by a test")
        without = section("\n" + _info.report(), "Ops")["norm"]
    finally:
        set_unavailable("native", "cpu", before)
    assert "native" not in without.partition("cuda:")[0]
    assert "reference" in without
    if why_not_implemented("norm", "native", "cpu") is None:
        assert section("\n" + _info.report(), "Ops")["norm"].strip().startswith("cpu: native > ")


def test_what_was_not_built_has_its_whole_reason(monkeypatch):
    info = {"built": ["_cpu.so"], "not_built": {"_cuda.so": "FAILED: norm.o\nnorm.cu(1): error: expected a ;\n"}}
    rest = {"cxx": "g++ 1.2", "nvcc": None, "cuda_archs": None, "torch": "2.11.0", "cpu_variants": ["default"]}
    monkeypatch.setattr(_libraries, "introspection", lambda: None)
    monkeypatch.setattr(_libraries, "build_info", lambda: info | rest)
    report = _info.report()
    assert "not built: FAILED: norm.o\n    norm.cu(1): error: expected a ;" in report
    assert section("\n" + report, "Compiled part")["_cpu.so"].strip() == "built for default"
    monkeypatch.setattr(_libraries, "build_info", dict)
    assert "this checkout was never built" in _info.report()


def test_environment_variables_that_matter_are_shown(monkeypatch):
    monkeypatch.setenv("FASTATTN_ANYTHING", "17")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shown = section("\n" + _info.report(), "Environment variables")
    assert shown["FASTATTN_ANYTHING"].strip() == "17"
    assert shown["OMP_NUM_THREADS"].strip() == "1"


def test_the_command_needs_none_of_the_training_packages(monkeypatch, capsys):
    for name in ("jsonargparse", "lightning_fabric", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["info"]) == 0
    assert capsys.readouterr().out.startswith("Versions\n")
