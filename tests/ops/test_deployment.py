"""Models that run without Python's fastattn: the op library alone has schemas and kernels."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from fastattn import nn
from fastattn.ops import _libraries
from fastattn.ops._schemas import DEFINITIONS

PACKAGE = _libraries.PACKAGE
CPU_LIBRARY = os.path.join(PACKAGE, "_cpu.so")
CUDA_LIBRARY = os.path.join(PACKAGE, "_cuda.so")
pytestmark = [
    pytest.mark.skipif(not os.path.exists(CPU_LIBRARY), reason="the CPU library was not built"),
    pytest.mark.filterwarnings("ignore"),  # warnings of the compiler itself
]
IN_PYTHON = ("linear_cross_entropy_fwd.native", "linear_cross_entropy_fwd_native")  # a loop around cross_entropy_fwd


def run(*command, **environment):
    """What a process prints that cannot import fastattn."""
    # if CI is set, inductor treats an op with a decomposition as a bug in PyTorch
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CI")} | environment
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_python(code, *arguments, **environment):
    absent = "import sys, torch\nassert 'fastattn' not in sys.modules\n"
    return run(sys.executable, "-W", "ignore", "-c", absent + code, *arguments, **environment)


def definition(schema):
    """A schema in the form that torch prints, with all defaults and names."""
    return str(torch._C.parse_schema(schema))


def test_the_library_alone_defines_and_implements_all_ops():
    code = """if True:
        torch.ops.load_library(sys.argv[1])
        names = torch._C._dispatch_get_all_op_names()
        schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastattn::")]
        kernels = [n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, "CPU")]
        import json
        print(json.dumps([[str(s) for s in schemas], [n for n in kernels if n.startswith("fastattn::")]]))
    """
    schemas, kernels = json.loads(run_python(code, CPU_LIBRARY))
    assert sorted(schemas) == sorted(definition(f"fastattn::{d}") for d in DEFINITIONS.values())
    native = {f"fastattn::{name}" for name in DEFINITIONS if name.endswith("native") and name not in IN_PYTHON}
    assert native <= set(kernels)


def test_without_a_library_python_defines_the_same(tmp_path):
    for name in ("fastattn", "kernels"):
        source = os.path.join(os.path.dirname(PACKAGE), name)
        if not os.path.isdir(source):
            pytest.skip("fastattn is installed: there is no source tree to copy")
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "_build_info.json"))
    code = """if True:
        sys.path.insert(0, sys.argv[1])
        import fastattn
        schemas = [str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastattn::")]
        import json
        print(json.dumps(schemas))
    """
    schemas = json.loads(run_python(code, str(tmp_path)))
    assert sorted(schemas) == sorted(definition(f"fastattn::{d}") for d in DEFINITIONS.values())


def test_a_library_of_another_source_is_not_loaded(monkeypatch):
    info = _libraries.build_info()
    monkeypatch.setattr(
        _libraries, "build_info", lambda: info | {"schemas": {"norm_fwd.native": "norm_fwd.native() -> ()"}}
    )
    for library in ("libfastattn_schemas.so", "_cpu.so"):
        assert _libraries.load_library(library).startswith("built from another version of the source")
    monkeypatch.undo()
    assert _libraries.load_library("_cpu.so") is None


@pytest.fixture
def libtorch_cuda(tmp_path):
    """A folder with a libtorch_cuda.so that has only the symbol that _cuda.so needs."""
    if not os.path.exists(CUDA_LIBRARY):
        pytest.skip("_cuda.so was not built")
    if torch.version.cuda is not None:
        return ""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    code = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n'
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-Wl,-soname,libtorch_cuda.so"]
    subprocess.run([*command, "-o", str(tmp_path / "libtorch_cuda.so")], input=code, text=True, check=True)
    return str(tmp_path)


@pytest.mark.parametrize("order", [(CUDA_LIBRARY,), (CUDA_LIBRARY, CPU_LIBRARY), (CPU_LIBRARY, CUDA_LIBRARY)])
def test_the_op_libraries_load_in_any_order_and_before_the_package(libtorch_cuda, order):
    code = """if True:
        for library in sys.argv[2:]:
            torch.ops.load_library(library)
            assert torch.ops.fastattn.norm_fwd.native is not None
        sys.path.insert(0, sys.argv[1])
        import fastattn
        print(fastattn.layer_norm(torch.ones(2, 4)).sum().item(), fastattn.backends()["cpu"]["native"])
    """
    found = run_python(code, os.path.dirname(PACKAGE), *order, LD_LIBRARY_PATH=libtorch_cuda)
    assert found.split() == ["0.0", "available"]


def test_the_loss_needs_python():
    code = """if True:
        torch.ops.load_library(sys.argv[1])
        x, target = torch.ones(3, 4), torch.zeros(3, dtype=torch.long)
        rest = (target, None, -100, 0.0, 0.0, 0.0, 0, False, False, False)
        try:
            torch.ops.fastattn.linear_cross_entropy_fwd_native(x, x, None, *rest)
        except NotImplementedError as error:
            print(error)
    """
    assert "Could not run 'fastattn::linear_cross_entropy_fwd_native'" in run_python(code, CPU_LIBRARY)


def model():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 1, nn.LayerNorm(16)).eval()


MAIN = """
#include <ATen/ops/linspace.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <cstdio>

int main(int argc, char** argv) {
  if (!dlopen(argv[1], RTLD_NOW)) {
    std::puts(dlerror());
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader loader(argv[2]);
  const at::Tensor x = at::linspace(-1, 1, 4 * 9 * 16).view({4, 9, 16});
  std::printf("%.9g\\n", loader.run({x})[0].square().sum().item<double>());
}
"""


def test_a_compiled_package_runs_without_fastattn_in_python_and_in_cpp(tmp_path):
    package = str(tmp_path / "model.pt2")
    module, x = model(), torch.linspace(-1, 1, 4 * 9 * 16).view(4, 9, 16)
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("seqlen", max=512)}
    with torch.no_grad():
        expected = module(x).square().sum().item()
        exported = torch.export.export(module, (torch.randn(2, 5, 16),), dynamic_shapes=(sizes,))
        faster = {"aot_inductor.precompile_headers": False, "cpp_cache_precompile_headers": False}  # for one model
        torch._inductor.aoti_compile_and_package(exported, package_path=package, inductor_configs=faster)
    code = """if True:
        torch.ops.load_library(sys.argv[1])
        x = torch.linspace(-1, 1, 4 * 9 * 16).view(4, 9, 16)
        print(torch._inductor.aoti_load_package(sys.argv[2])(x).square().sum().item())
        assert 'fastattn' not in sys.modules
    """
    assert float(run_python(code, CPU_LIBRARY, package)) == pytest.approx(expected, rel=1e-6)
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: the package was not run from C++")
    torch_dir = os.path.dirname(torch.__file__)
    command = ["g++", "-std=c++20", "-O0", "-w", "-x", "c++", "-", "-o", str(tmp_path / "main")]
    command += [f"-I{torch_dir}/include", f"-I{torch_dir}/include/torch/csrc/api/include", f"-L{torch_dir}/lib"]
    command += [f"-Wl,-rpath,{torch_dir}/lib", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10", "-ltorch"]
    subprocess.run(command, input=MAIN, text=True, check=True)
    assert float(run(str(tmp_path / "main"), CPU_LIBRARY, package)) == pytest.approx(expected, rel=1e-6)


def test_a_saved_trace_runs_without_fastattn(tmp_path):
    module, path = model(), str(tmp_path / "model.pt")
    with torch.no_grad():
        torch.jit.trace(module, torch.randn(2, 5, 16)).save(path)
        expected = module(torch.ones(3, 7, 16)).square().sum().item()
    code = """if True:
        torch.ops.load_library(sys.argv[1])
        with torch.no_grad():
            print(torch.jit.load(sys.argv[2])(torch.ones(3, 7, 16)).square().sum().item())
    """
    assert float(run_python(code, CPU_LIBRARY, path)) == pytest.approx(expected, rel=1e-6)
