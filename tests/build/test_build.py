"""The compiled part: what was built, what it links to, incomplete builds, and the package without it."""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest
import torch

import fastattn
from fastattn import _native, reference
from fastattn.ops import _libraries

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = pathlib.Path(_native.__file__).parent
FIRST_NORM = "import torch, fastattn; print(fastattn.layer_norm(torch.ones(2, 4)).tolist())"
OF_NORM = str([[0.0] * 4] * 2)
# counter, key, result: from the known-answer file that belongs to the paper
PHILOX_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]

needs_cpu_library = pytest.mark.skipif(
    not (PACKAGE / "_cpu.so").exists(), reason="the CPU library was not built: fastattn info says why"
)
needs_introspection = pytest.mark.skipif(
    importlib.util.find_spec("fastattn._C") is None, reason="fastattn._C was not built for this Python"
)


def run(*command, cwd=ROOT, **environment):
    """Run a command to its end; a command that starts with an option or a .py file is run by Python."""
    command = [sys.executable, *command] if command[0].startswith("-") or command[0].endswith(".py") else command
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTATTN_")} | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def output_of(*command, **options):
    result = run(*command, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def tool(name):
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    return name


@pytest.fixture
def source_tree(tmp_path):
    """A copy of everything that a build reads, without built files."""
    pytest.importorskip("setuptools", minversion="80", reason="building needs setuptools>=80")
    pytest.importorskip("ninja", reason="building needs ninja")
    for name in ("csrc", "fastattn", "kernels"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored, symlinks=True)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_build_info_names_what_is_there():
    info = _libraries.build_info()
    if not info:
        pytest.skip("this checkout was never built")
    for part in info["built"]:
        assert (PACKAGE / part).exists(), part
    for part, reason in info["not_built"].items():
        assert not (PACKAGE / part).exists(), part
        assert reason.strip(), part


@needs_cpu_library
@pytest.mark.parametrize("library", ["_cpu.so", "_cuda.so", "libfastattn_schemas.so"])
def test_op_libraries_are_bound_to_no_python_and_to_no_torch_version(library):
    if not (PACKAGE / library).exists():
        pytest.skip(_libraries.build_info()["not_built"][library].partition("\n")[0])
    needed = re.findall(r"NEEDED.*\[(.*)\]", output_of(tool("readelf"), "-d", str(PACKAGE / library)))
    assert "libtorch_cpu.so" in needed
    assert ("libtorch_cuda.so" in needed) == (library == "_cuda.so")
    assert not [name for name in needed if re.match(r"libpython|libc10|libcudart|libtorch\.so", name)]
    undefined = output_of(tool("nm"), "-DC", "--undefined-only", str(PACKAGE / library))
    assert not re.search(r"\b_?Py[A-Z_]|\b(at|c10|torch)::", undefined), undefined


@needs_cpu_library
def test_libraries_load_on_every_system_that_pytorch_loads_on():
    """manylinux_2_28: glibc 2.28 and the libstdc++ of gcc 8."""
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11)}
    for library in PACKAGE.glob("*.so"):
        symbols = output_of(tool("readelf"), "--dyn-syms", "-W", str(library))
        wanted = re.findall(r"UND (\S+)@(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", symbols)
        assert wanted, library.name
        too_new = [name for name in wanted if tuple(map(int, name[2].split("."))) > newest[name[1]]]
        assert not too_new, library.name


def test_no_function_compiled_for_a_newer_processor_can_be_linked_into_baseline_code():
    objects = [path for isa in ("avx2", "avx512") for path in ROOT.glob(f"build/temp.*/csrc/cpu/*.{isa}*.o")]
    if not objects:
        pytest.skip("no objects of CPU kernels in build/: not built in this checkout")
    for path in objects:
        # DW.ref.* is data: it holds the address of the unwinder's function
        shared = re.findall(r" [WVu] (?!DW\.ref\.).*", output_of(tool("nm"), "-C", str(path)))
        assert not shared, (path.name, shared)


@needs_cpu_library
def test_cpu_capability_can_be_lowered(monkeypatch):
    monkeypatch.delenv("FASTATTN_CPU_CAPABILITY", raising=False)
    best = _native.CPU_CAPABILITIES.index(_native.cpu_capability())
    for index, name in enumerate(_native.CPU_CAPABILITIES):
        monkeypatch.setenv("FASTATTN_CPU_CAPABILITY", name)
        assert _native.cpu_capability() == _native.CPU_CAPABILITIES[min(index, best)]


def test_unknown_cpu_capability_raises(monkeypatch):
    monkeypatch.setenv("FASTATTN_CPU_CAPABILITY", "avx1024")
    message = f"FASTATTN_CPU_CAPABILITY must be one of {', '.join(_native.CPU_CAPABILITIES)}, got 'avx1024'"
    with pytest.raises(ValueError, match=message):
        _native.load_backends()


@needs_introspection
def test_philox_of_the_kernels_is_the_published_one_and_the_reference():
    import fastattn._C as _C

    for counter, key, words in PHILOX_ANSWERS:
        assert _C.philox(counter, key) == words
    torch.manual_seed(0)
    counters = torch.randint(2**32, (50, 4))
    keys = torch.randint(2**32, (50, 2))
    expected = torch.stack(reference.philox4x32(counters.unbind(1), keys.unbind(1)), dim=1)
    found = [_C.philox(c, k) for c, k in zip(counters.tolist(), keys.tolist(), strict=True)]
    assert found == expected.tolist()


@needs_introspection
def test_philox_refuses_what_is_no_32_bit_word():
    import fastattn._C as _C

    for counter in ([0, 0, 0], [0, 0, 0, 2**32], [0, 0, 0, -1]):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            _C.philox(counter, [0, 0])


@needs_introspection
@needs_cpu_library
def test_introspection_and_ops_agree_on_the_cpu_capability():
    import fastattn._C as _C

    assert _C.cpu_capability() == _native.cpu_capability()
    assert _C.best_cpu_capability() in _native.CPU_CAPABILITIES


@needs_introspection
def test_introspection_knows_what_the_build_recorded():
    import fastattn._C as _C

    record, compiled = _libraries.build_info(), _C.build_info()
    assert compiled["compiler"]
    assert int(compiled["cplusplus"]) >= 202002
    for name in ("cxx", "torch", "nvcc"):
        assert compiled[name] == record[name], name
    for name in ("cpu_variants", "cuda_archs"):
        assert list(compiled[name] or []) == (record[name] or []), name


def test_package_works_without_the_introspection_module():
    code = "import sys; sys.modules['fastattn._C'] = None; " + FIRST_NORM
    asks = "; from fastattn._info import report; print(report()); print(fastattn.explain('layer_norm', torch.ones(1)))"
    said = output_of("-W", "ignore", "-c", code + asks)
    assert said.startswith(OF_NORM)
    assert "not built for Python" in said
    assert "native kernels: built for" not in said


@needs_introspection
@needs_cpu_library
@pytest.mark.parametrize("limit", ["", "default"])
def test_info_and_explain_say_what_the_processor_runs(limit):
    import fastattn._C as _C

    code = "import torch, fastattn; print(fastattn.explain('layer_norm', torch.ones(1, 2)))"
    code += "; from fastattn._info import report; print(report())"
    said = output_of("-W", "ignore", "-c", code, FASTATTN_CPU_CAPABILITY=limit)
    best, variants = _C.best_cpu_capability(), ", ".join(_C.build_info()["cpu_variants"])
    assert f"  native kernels: built for {variants}; {limit or best} is in use\n" in said
    assert re.search(rf"_cpu\.so +built for {variants}\n", said)
    lowered = f", limited to {limit} by FASTATTN_CPU_CAPABILITY" if limit and limit != best else ""
    assert re.search(rf"this processor +{best}{lowered}\n", said)
    assert re.search(r"dropout +Philox4x32-10, the same numbers as the reference\n", said)


def test_python_files_alone_work_and_say_what_is_missing(source_tree):
    result = run("-W", "always", "-c", FIRST_NORM, cwd=source_tree, PYTHONPATH=str(source_tree))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == OF_NORM
    assert "fastattn runs without its C++ kernels for the CPU: not built in this checkout" in result.stderr


def test_failing_compiler_leaves_a_package_that_works_and_says_why(source_tree):
    stale = source_tree / "fastattn/_cpu.so"
    stale.write_bytes(b"a library of an older source")
    settings = {"CXX": "false", "FASTATTN_NATIVE": "auto", "FASTATTN_CUDA": "0"}
    output_of("setup.py", "-q", "build_ext", "--inplace", cwd=source_tree, **settings)
    assert not stale.exists()
    info = json.loads((source_tree / "fastattn/_build_info.json").read_text())
    assert info["built"] == []
    assert info["not_built"]["_cuda.so"] == "FASTATTN_CUDA=0"
    torch_there = info["torch"] is not None
    assert ("FAILED" if torch_there else "no torch headers") in info["not_built"]["_cpu.so"]
    result = run("-W", "always", "-c", FIRST_NORM, cwd=source_tree, PYTHONPATH=str(source_tree))
    assert result.stdout.strip() == OF_NORM
    assert "fastattn runs without its C++ kernels for the CPU" in result.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTATTN_NATIVE": "1", "CXX": "false"}, "_cpu.so: FAILED"),
        ({"FASTATTN_NATIVE": "1", "CXX": "no-such-compiler"}, "no C++ compiler: no-such-compiler not found"),
        ({"FASTATTN_NATIVE": "yes"}, "FASTATTN_NATIVE must be auto, 0 or 1, got 'yes'"),
        ({"FASTATTN_CUDA": "1", "FASTATTN_NATIVE": "0"}, "_cuda.so: FASTATTN_NATIVE=0"),
        ({"FASTATTN_CUDA_ARCHS": "80;sm_90"}, "FASTATTN_CUDA_ARCHS must look like 80;90a;100a, got 'sm_90'"),
    ],
)
def test_build_stops_where_it_was_told_to(source_tree, environment, message):
    result = run("setup.py", "-q", "build_ext", "--inplace", cwd=source_tree, **{"FASTATTN_CUDA": "0"} | environment)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_source_distribution_has_everything_a_build_reads(source_tree):
    output_of("setup.py", "-q", "sdist", "-d", str(source_tree / "dist"), cwd=source_tree)
    (archive,) = (source_tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {
            pathlib.PurePosixPath(name).relative_to(archive.name.removesuffix(".tar.gz")) for name in tar.getnames()
        }
    assert not [name for name in names if name.suffix in (".so", ".pyc")]
    patterns = ("csrc/**/*.*", "fastattn/**/*.py", "fastattn/py.typed", "kernels/*.py", "*.py", "pyproject.toml")
    wanted = itertools.chain.from_iterable(source_tree.glob(pattern) for pattern in patterns)
    missing = {path.relative_to(source_tree) for path in wanted} - {pathlib.Path(name) for name in names}
    assert not missing


def built(source_tree, kind, **environment):
    """The wheel that a PEP 517 hook of this tree builds, "wheel" or "editable", without compiling."""
    code = f"import build_backend; print(build_backend.build_{kind}('dist'))"
    output_of("-c", code, cwd=source_tree, FASTATTN_NATIVE="0", **environment)
    (wheel,) = (source_tree / "dist").glob("*.whl")
    return zipfile.ZipFile(wheel)


USE_KERNELS = """
import importlib.util, fastattn, fastattn.kernels.attention_table
assert fastattn.kernels.attention_table.__name__ == "fastattn.kernels.attention_table"
for name in ("kernels", "tests", "benchmarks", "scripts", "csrc", "setup", "build_backend"):
    assert importlib.util.find_spec("fastattn." + name) is None or name == "kernels", name
    assert importlib.util.find_spec(name) is None, name
print(fastattn.__path__[0])
"""


@pytest.mark.parametrize("link", ["kept", "lost"])
def test_a_wheel_holds_the_kernels_in_the_package_and_nothing_beside_it(source_tree, tmp_path_factory, link):
    if link == "lost":  # as on a system, or from an archive, without symbolic links
        (source_tree / "fastattn/kernels").unlink()
        (source_tree / "fastattn/kernels").write_text("../kernels")
    place = tmp_path_factory.mktemp("place")
    with built(source_tree, "wheel") as wheel:
        wheel.extractall(place)
    assert {path.name for path in place.iterdir() if path.suffix != ".dist-info"} == {"fastattn"}
    for folder, pattern in (("kernels", "*.py"), ("fastattn", "**/*.py")):
        wanted = {str(path.relative_to(ROOT / folder)) for path in (ROOT / folder).glob(pattern)}
        there = place / "fastattn" / ("kernels" if folder == "kernels" else "")
        assert wanted <= {str(path.relative_to(there)) for path in there.glob("**/*.py")}
    found = output_of("-W", "ignore", "-c", USE_KERNELS, cwd=place, PYTHONPATH=str(place))
    assert pathlib.Path(found.strip()).parent.samefile(place)


CONSUMER = """
import torch
import fastattn

q = torch.zeros(1, 2, 8, 16)
reveal_type(fastattn.attention(q, q, q, causal=True, return_lse=True))
fastattn.attention(q, q, q, casual=True)
fastattn.layer_norm(q, epsilon=1e-6)
fastattn.nn.MultiheadAttention(16, 2, batchfirst=True)
"""


def test_a_type_checker_reads_the_installed_package(source_tree, tmp_path_factory):
    """mypy on the program of another project that has the wheel installed and no setting about fastattn."""
    pytest.importorskip("mypy", reason="needs the extra lint")
    project = tmp_path_factory.mktemp("project")
    venv.create(project / "venv")
    (site_packages,) = project.glob("venv/lib/python3*/site-packages")
    with built(source_tree, "wheel") as wheel:
        wheel.extractall(site_packages)
    (project / "program.py").write_text(CONSUMER)
    (project / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nignore_missing_imports = true\n")
    command = [sys.executable, "-m", "mypy", "--python-executable", "venv/bin/python", "--config-file", "mypy.ini"]
    said = subprocess.run([*command, "program.py"], cwd=project, capture_output=True, text=True, timeout=600).stdout
    errors = [int(line.split(":")[1]) for line in said.splitlines() if ": error: " in line]
    assert sorted(set(errors)) == [7, 8, 9], said
    assert 'Revealed type is "tuple[' in said


def test_an_editable_install_sees_this_tree_and_no_other_folder_of_it(source_tree, tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    with built(source_tree, "editable") as wheel:
        (path_file,) = (name for name in wheel.namelist() if "dist-info" not in name)
        assert path_file.endswith(".pth"), "an import hook, which type checkers do not follow"
        path = wheel.read(path_file).decode().strip()
    found = output_of("-W", "ignore", "-c", USE_KERNELS, cwd=place, PYTHONPATH=path)
    assert pathlib.Path(found.strip()).samefile(source_tree / "fastattn")
    if importlib.util.find_spec("mypy"):
        from mypy import modulefinder, options

        paths = modulefinder.SearchPaths((), (path,), (), ())
        finder = modulefinder.FindModuleCache(paths, None, options.Options())
        seen = finder.find_module("fastattn.kernels.attention_table")
        assert pathlib.Path(seen).samefile(source_tree / "kernels/attention_table.py")


def test_a_lost_link_to_the_kernels_is_told(source_tree):
    (source_tree / "fastattn/kernels").unlink()
    (source_tree / "fastattn/kernels").write_text("../kernels")
    code = "import fastattn; print(fastattn.backends()['cpu']['triton'])"
    output = output_of("-W", "ignore", "-c", code, cwd=source_tree, TRITON_INTERPRET="1")
    assert "fastattn/kernels is missing" in output or "triton is not installed" in output


def test_the_folder_of_the_kernels_is_no_package_and_hides_none(tmp_path):
    """In a checkout, `import kernels` must find Hugging Face's package if it is installed."""
    locate = "import importlib.util; print(getattr(importlib.util.find_spec('kernels'), 'origin', None))"
    assert str(ROOT) not in output_of("-c", locate)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").touch()
    assert output_of("-c", locate, PYTHONPATH=str(tmp_path)).strip() == str(tmp_path / "kernels/__init__.py")


def test_no_folder_of_a_checkout_is_a_part_of_the_package():
    names = [path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"]
    names = [name for name in names if name.isidentifier() and name not in ("kernels", "fastattn", "__pycache__")]
    assert {"tests", "setup"} <= set(names)
    code = f"import fastattn, importlib.util as u; print([n for n in {names} if u.find_spec('fastattn.' + n)])"
    assert output_of("-W", "ignore", "-c", code).strip() == "[]"


def test_version_is_the_installed_one():
    try:
        installed = importlib.metadata.version("fastattn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastattn is not installed, it runs from a checkout")
    assert installed == fastattn.__version__


def test_every_build_uses_the_ninja_of_pip(tmp_path, monkeypatch):
    """The isolated builds of pip find it first on PATH. Other builds find the system's, and do not share its log."""
    pytest.importorskip("ninja", reason="building needs ninja")
    monkeypatch.syspath_prepend(ROOT)
    build_environment = importlib.import_module("build_environment")
    (tmp_path / "ninja").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build_environment.ninja_command() == [sys.executable, "-m", "ninja"]
    monkeypatch.setattr(build_environment.importlib.util, "find_spec", lambda name: None)
    assert build_environment.ninja_command() == [str(tmp_path / "ninja")]


def test_no_library_of_the_system_lies_where_the_compilers_run(tmp_path, monkeypatch):
    """nvcc makes its programs search their directory, so they would load a stub in place of the C library."""
    monkeypatch.syspath_prepend(ROOT)
    build_ninja = importlib.import_module("build_ninja")
    stubs = build_ninja.stubs_of_glibc(build_ninja.NinjaFile(ROOT, None), tmp_path)
    assert not [stub for stub in stubs if pathlib.Path(stub).parent == pathlib.Path()]
