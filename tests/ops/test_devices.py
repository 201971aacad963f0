"""The backend for a call on each GPU: where kernels cannot run, another backend runs and the reason is given."""

import contextlib
import importlib
import os
import pathlib
import shutil
import subprocess
import sys
import types
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
from fastattn import _info, _native
from fastattn.ops import _backends, _libraries
from fastattn.ops._backends import choose, explanation, why_not_available

FASTATTN = pathlib.Path(fastattn.__file__).parent
TOO_OLD = "it needs a GPU of compute capability 8.0 or newer; this one has 7.5"
OPS = ("attention", "attention_decode", "dropout", "feed_forward", "linear_cross_entropy", "norm", "rotary")


@pytest.fixture
def gpus(monkeypatch):
    """gpus((9, 0), (7, 5)): as on a machine with these GPUs and a kernel for every op.

    native: index of a device -> why the library of CUDA kernels cannot run there, or None; error: why Triton cannot.
    """
    triton = pytest.importorskip("triton")

    def pretend(*capabilities, native=lambda index: None, triton_version="3.9.0", error=None):
        def get_current_target():
            if error:
                raise RuntimeError(error)

        def capability(device="cuda"):
            return capabilities[device if isinstance(device, int) else torch.device(device).index or 0]

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        properties = types.SimpleNamespace(name="GPU", major=9, minor=0, multi_processor_count=132, total_memory=2**36)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        driver = types.SimpleNamespace(get_current_target=get_current_target)
        monkeypatch.setattr(triton, "__version__", triton_version)
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        monkeypatch.setattr(
            torch._C, "_dispatch_has_kernel_for_dispatch_key",
            lambda name, key: name.startswith("fastattn::") or has_kernel(name, key),
        )  # fmt: skip
        monkeypatch.setattr(_backends, "_unavailable", dict(_backends._unavailable))
        monkeypatch.setattr(_backends, "_decisions", {})
        monkeypatch.setattr(_backends, "_override", None)
        _backends.set_unavailable("triton", "cuda", _native._triton_refuses)
        _backends.set_unavailable("native", "cuda", native)

    yield pretend
    monkeypatch.undo()
    _backends._decisions.clear()


def facts(device):
    return device, torch.float16


def no_code(index):
    return "no code for it"


@pytest.mark.parametrize("op", OPS)
def test_a_gpu_below_8_0_runs_the_reference(op, gpus):
    gpus((7, 5), native=no_code)
    assert choose(op, facts("cuda:0")) == "reference"
    text = explanation(op, facts("cuda:0"))
    assert f"triton: no: {TOO_OLD}" in text
    assert "native: no: no code for it" in text
    assert text.endswith("reference: runs")
    for name in ("triton", "native"):
        with pytest.raises(ValueError, match=f"{op}: backend {name!r} was asked for but cannot serve this call"):
            choose(op, facts("cuda:0"), name)


@pytest.mark.parametrize("op", OPS)
def test_two_gpus_get_each_what_serves_them(op, gpus):
    gpus((7, 5), (9, 0), (8, 6), native=lambda index: None if index == 1 else "no code for it")
    on_request = ("attention", "attention_decode")
    for _ in range(2):  # the second time the decision is cached
        assert choose(op, facts("cuda:0")) == "reference"
        assert choose(op, facts("cuda:1")) == ("triton" if op in on_request else "native")
        assert choose(op, facts("cuda:2")) == "triton"
    assert why_not_available("triton", "cuda") is None
    assert why_not_available("triton", "cuda:0") == TOO_OLD
    assert fastattn.backends()["cuda"] == {
        "native": "cuda:0: no code for it; cuda:1: available; cuda:2: no code for it",
        "triton": f"cuda:0: {TOO_OLD}; cuda:1: available; cuda:2: available",
        "reference": "available",
    }


@pytest.mark.parametrize("op", ["attention", "attention_decode"])
def test_kernels_for_hopper_ask_for_the_device_of_the_call(op, gpus):
    """And not for the current device."""
    gpus((8, 0), (9, 0))
    fields = importlib.import_module(f"fastattn.ops.{op}").Facts
    assert choose(op, tuple(fields("cuda:1", torch.bfloat16, hopper_head_dim=True)), "native") == "native"
    with pytest.raises(ValueError, match=r"it needs a GPU of compute capability 9\.0; this one has 8\.0"):
        choose(op, tuple(fields("cuda:0", torch.bfloat16, hopper_head_dim=True)), "native")


def test_facts_name_the_device_with_its_index(gpus):
    """The whole path from tensors to the text, on either GPU."""
    gpus((7, 5), (9, 0), native=no_code)
    with FakeTensorMode():
        for device, served in (("cuda:0", False), ("cuda:1", True)):

            def empty(*shape, dtype=torch.float16, device=device):
                return torch.empty(*shape, device=device, dtype=dtype)

            x, square, table = empty(2, 4, 16, 64), empty(64, 64), empty(32, 32, dtype=torch.float32)
            lengths, target = empty(2, dtype=torch.int32), empty(2, 4, 16, dtype=torch.int64)
            for op, arguments, options in (
                ("attention", (x, x, x), {}),
                ("scaled_dot_product_attention", (x, x, x), {}),
                ("attention_decode", (x, x, x), {"cache_seqlens": lengths}),
                ("dropout", (x, 0.1), {}),
                ("feed_forward", (x, square, None, square, None), {}),
                ("layer_norm", (x,), {}),
                ("rms_norm", (x,), {}),
                ("linear_cross_entropy", (x, square, target), {}),
                ("rotary_embedding", (x, table, table), {}),
            ):
                text = fastattn.explain(op, *arguments, **options)
                assert f"on {device}, float16" in text
                assert f"triton: {'runs' if served else 'no: ' + TOO_OLD}" in text, text


def test_the_cpu_asks_no_gpu(gpus):
    def refuse(index):
        raise AssertionError("asked")

    gpus((9, 0), native=refuse)
    _backends.set_unavailable("triton", "cuda", refuse)
    assert "runs" in fastattn.explain("layer_norm", torch.ones(2, 3))


def test_a_machine_without_a_compiler_does_not_get_triton(gpus):
    gpus((9, 0), error="Failed to find C compiler", native=no_code)
    assert choose("norm", facts("cuda:0")) == "reference"
    assert "it cannot launch kernels on this machine: Failed to find C compiler" in explanation("norm", facts("cuda:0"))


def test_rocm_is_refused(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _native._load_triton()[1] == "its kernels are for NVIDIA GPUs, but this torch is built for ROCm"
    assert _native._load_cuda() == "this torch is built without CUDA"


@pytest.mark.parametrize("device", ["xpu:0", "mps:0", "meta"])
def test_other_devices_run_the_reference_and_say_why(device):
    kind = device.partition(":")[0]
    assert choose("norm", facts(device), "auto") == "reference"
    assert explanation("norm", facts(device), "auto").splitlines()[1:] == [
        f"  native: no: there is no native backend for {kind} tensors",
        f"  triton: no: there is no triton backend for {kind} tensors",
        "  reference: runs",
    ]


@pytest.mark.parametrize(
    ("version", "capability", "path", "warned"),
    [
        ("3.6.0", (9, 0), None, True), ("3.7.1", (9, 0), None, True), ("3.8.0+git1", (9, 0), None, True),
        ("3.9.0", (9, 0), None, False), ("3.10.0", (9, 0), None, False), ("3.7.1", (8, 0), None, False),
        ("3.7.1", (10, 0), None, False), ("3.7.1", (9, 0), "/usr/local/cuda-13.3/bin/ptxas", False),
    ],
)  # fmt: skip
def test_hopper_with_an_older_triton_warns_once(version, capability, path, warned, gpus, monkeypatch):
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    if path:
        monkeypatch.setenv("TRITON_PTXAS_PATH", path)
    gpus(capability, triton_version=version, native=no_code)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for op in OPS:
            choose(op, facts("cuda:0"))
            explanation(op, facts("cuda:0"))
    messages = [str(warning.message) for warning in caught if "Triton" in str(warning.message)]
    assert len(messages) == warned
    if warned:
        assert f"Triton {version}" in messages[0]
        assert "TRITON_PTXAS_PATH to the ptxas of CUDA 13.3" in messages[0]


def test_info_agrees_with_explain(gpus):
    """Backends that run only when named are marked so, and those that cannot serve any call are not listed."""
    gpus((8, 0), (9, 0))
    lines = {line.split()[0]: line for line in _info.report().partition("\nOps")[2].splitlines() if line.strip()}
    named = "(native only if named: not yet run on hardware)"
    for op in ("attention", "attention_decode"):
        a100, h100 = lines[op].partition("cuda:0: ")[2].split("   cuda:1: ")
        assert a100.strip() == "triton > reference"
        assert h100.strip() == f"triton > reference {named}"
    assert "cuda:0: native > triton > reference" in lines["norm"]


OLD_DRIVER = """
#include <dlfcn.h>
typedef int E;
E cuInit(unsigned flags) { return 0; }
E cuDriverGetVersion(int* version) { *version = 12080; return 0; }
E cuGetProcAddress_v2(const char* name, void** f, int version, unsigned long flags, int* found) {
  *f = dlsym(0, name);
  return *f ? 0 : 500;
}
E cuGetProcAddress(const char* name, void** f, int v, unsigned long l) { return cuGetProcAddress_v2(name, f, v, l, 0); }
E cuGetExportTable(const void** table, const void* id) { return 801; }
E aoti_torch_get_current_cuda_stream(int device, void** stream) { return 0; }
"""


def test_a_driver_older_than_the_runtime_is_told_by_the_library_itself(tmp_path):
    """The built library with a driver for CUDA 12.8, which the runtime of CUDA 13 refuses."""
    nvcc = _libraries.build_info().get("nvcc") or "0"
    if not (FASTATTN / "_cuda.so").exists() or int(nvcc.split(".")[0]) < 13:
        pytest.skip("needs _cuda.so, built with CUDA 13 or newer")
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    for name in ("libcuda.so.1", "libtorch_cuda.so"):
        if name == "libcuda.so.1" or torch.version.cuda is None:
            command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c", "-", "-o", str(tmp_path / name)]
            subprocess.run(command, input=OLD_DRIVER, text=True, check=True)
    code = """
import contextlib, json, torch
from fastattn import _native
torch.cuda.device = lambda index: contextlib.nullcontext()
torch.cuda.get_device_capability = lambda index: (9, 0)
print(json.dumps(_native._native_refuses(0)))
"""
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(FASTATTN.parent)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "this GPU of compute capability 9.0: CUDA driver version is insufficient" in done.stdout
    assert "the driver serves up to 12.8" in done.stdout
