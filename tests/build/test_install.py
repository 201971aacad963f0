"""What an installation does and prints on a machine that lacks something, with stand-ins for torch and compilers."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOOKS = "import build_backend as b; print(b.get_requires_for_build_wheel(), b.get_requires_for_build_editable())"
FACTS = """
import build_environment as b
torch = b.find_torch()
print(b.cuda_or_reason(torch), b.why_no_cpu_kernels(torch), torch and (torch.version, torch.cuda), sep="\\n")
"""
EXTRAS = ("jsonargparse", "lightning_fabric", "safetensors", "tensorboard", "tokenizers", "tqdm", "yaml", "sklearn")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter that has setuptools, and no other package."""
    setuptools = pytest.importorskip("setuptools", minversion="80", reason="building needs setuptools>=80")
    place = tmp_path_factory.mktemp("python")
    venv.create(place, symlinks=True)
    (site_packages,) = place.glob("lib/python3*/site-packages")
    source = Path(setuptools.__file__).parents[1]
    for path in (source / "_distutils_hack", source / "setuptools", *source.glob("setuptools-*.dist-info")):
        (site_packages / path.name).symlink_to(path)
    return place / "bin/python"


@pytest.fixture
def torch_of(tmp_path):
    """torch_of(version, cuda) -> the environment variables under which a build finds such a torch."""

    def make(version="2.13.0", cuda=None):
        folder = tmp_path / "torch/include/torch/csrc/stable"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "library.h").touch()
        facts = f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n"
        (tmp_path / "torch/version.py").write_text(facts)
        return {"FASTATTN_TORCH_DIR": str(tmp_path / "torch")}

    return make


@pytest.fixture
def cuda_home(tmp_path):
    (tmp_path / "cuda/bin").mkdir(parents=True)
    (tmp_path / "cuda/bin/nvcc").touch()
    return {"CUDA_HOME": str(tmp_path / "cuda")}


def run(python, code, cwd=ROOT, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASTATTN_", "PYTHON", "CXX"))}
    command = [str(python), *(["setup.py", "-q", "build_ext", "--inplace"] if code is None else ["-c", code])]
    return subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=600)


def facts(python, **environment):
    result = run(python, FACTS, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere there is nothing to compile")
@pytest.mark.parametrize(
    ("version", "compiler", "helps"),
    [
        (None, "g++", "run pip install torch"),
        ("2.10.1", "g++", "run pip install --upgrade 'torch>=2.11'"),
        ("2.13.0", "no-such-compiler", "no-such-compiler not found, unset CXX"),
    ],
)
def test_an_installation_without_kernels_ends_before_it_downloads(python, torch_of, version, compiler, helps):
    missing = {"CXX": compiler, **(torch_of(version) if version else {})}
    result = run(python, HOOKS, **missing)
    assert result.returncode == 1
    assert helps in result.stderr
    assert "FASTATTN_NATIVE=0 installs fastattn without kernels" in result.stderr
    assert "Traceback" not in result.stderr
    assert run(python, HOOKS, FASTATTN_NATIVE="0", **missing).returncode == 0


def test_the_system_package_of_a_compiler_is_named(python, torch_of, tmp_path):
    (tmp_path / "dnf").touch(0o755)
    said = facts(python, PATH=str(tmp_path), **torch_of())[1]
    assert re.search(r"no C\+\+ compiler: g\+\+ not found, run (sudo )?dnf install gcc-c\+\+$", said)
    shutil.copy(tmp_path / "dnf", tmp_path / "apt-get")
    assert facts(python, PATH=str(tmp_path), **torch_of())[1].endswith("apt-get install g++")


def test_cuda_is_compiled_for_a_torch_that_has_it(python, torch_of, cuda_home):
    found = str(Path(cuda_home["CUDA_HOME"]))
    without = "torch 2.13.0 is built without CUDA (FASTATTN_CUDA=1 compiles them all the same)"
    for version, cuda, wanted, expected in (
        ("2.13.0", "13.0", "", found), ("2.13.0", "13.0", "0", "FASTATTN_CUDA=0"), ("2.13.0", None, "", without),
        ("2.13.0", None, "auto", without), ("2.13.0", None, "1", found),
    ):  # fmt: skip
        said = facts(python, FASTATTN_CUDA=wanted, **torch_of(version, cuda), **cuda_home)
        assert expected in said[0]
        assert (said[0].startswith("(None, ")) == (expected != found)
        assert said[2] == repr((version, cuda))


def test_the_torch_of_this_environment_is_the_one_that_is_found():
    import torch

    expected = repr((str(torch.__version__), torch.version.cuda))
    assert facts(sys.executable)[2] == expected


@pytest.fixture
def tree(tmp_path):
    """What setup.py reads, as links, so that the results of a build are in a folder of their own."""
    place = tmp_path / "tree"
    (place / "fastattn").mkdir(parents=True)
    for path in ("csrc", "setup.py", "build_backend.py", "build_environment.py", "build_ninja.py", "pyproject.toml",
                 "README.md", "LICENSE"):  # fmt: skip
        (place / path).symlink_to(ROOT / path)
    for path in ("__init__.py", "ops"):
        (place / "fastattn" / path).symlink_to(ROOT / "fastattn" / path)
    for name in ("setup.py", "build_backend.py"):  # Python looks next to the file that a link names
        (place / name).unlink()
        shutil.copy(ROOT / name, place)
    return place


def test_a_missing_ninja_is_named(python, torch_of, tree, tmp_path):
    (tmp_path / "g++").touch(0o755)
    result = run(python, None, tree, PATH=str(tmp_path), **torch_of())
    assert result.returncode == 1
    assert "fastattn: error: ninja is missing: run pip install ninja" in result.stderr
    assert run(python, None, tree, PATH=str(tmp_path), FASTATTN_NATIVE="auto", **torch_of()).returncode == 0
    reasons = json.loads((tree / "fastattn/_build_info.json").read_text())["not_built"]
    assert reasons["_cpu.so"] == "ninja is missing: run pip install ninja"


def test_an_old_setuptools_is_named(tree, tmp_path):
    for name in ("command/build.py", "command/build_ext.py", "__init__.py", "command/__init__.py"):
        path = tmp_path / "old/setuptools" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("Distribution = Extension = find_packages = setup = build = build_ext = None")
    result = run(sys.executable, None, tree, PYTHONPATH=str(tmp_path / "old"))
    assert result.returncode == 1
    assert result.stderr == "fastattn: error: setuptools is too old, run pip install 'setuptools>=80'\n"


def test_a_build_says_what_it_compiles_and_how_to_choose(torch_of, cuda_home, tree):
    pytest.importorskip("ninja", reason="building needs ninja")
    (tree.parent / "cuda/bin/nvcc").write_text("#!/bin/sh\necho 'release 13.0, V13.0.48'\nexit 1\n")
    (tree.parent / "cuda/bin/nvcc").chmod(0o755)
    choice = {"FASTATTN_NATIVE": "auto", "FASTATTN_CUDA_ARCHS": "90a;100a", "MAX_JOBS": "2", "CXX": "false"}
    result = run(sys.executable, None, tree, **choice, **torch_of(cuda="13.0"), **cuda_home)
    assert result.returncode == 0, result.stderr
    for line in (
        r"fastattn: with .* and the headers of torch 2.13.0, 2 files at a time",
        "fastattn: kernels for the CPU: default",
        "fastattn: kernels for GPUs: 90a, 100a, with nvcc 13.0.48", r"\(FASTATTN_CUDA_ARCHS='90a' builds fewer",
        r"\[\d+/\d+\] NVCC csrc/cuda/norm.o",
    ):  # fmt: skip
        assert re.search(line, result.stdout), line
    result = run(sys.executable, None, tree, **choice | {"FASTATTN_NATIVE": ""}, **torch_of(cuda="13.0"), **cuda_home)
    assert result.returncode == 1, "a compiler that fails is an error"
    assert "_cuda.so: FAILED" in result.stderr
    assert "FASTATTN_CUDA=0 leaves out the CUDA kernels. FASTATTN_NATIVE=0 installs" in result.stderr
    result = run(sys.executable, None, tree, **choice, **torch_of(), **cuda_home)
    assert "fastattn: no kernels in CUDA C++: torch 2.13.0 is built without CUDA" in result.stdout
    assert "NVCC" not in result.stdout


def test_a_base_installation_answers_and_names_the_packages_that_a_command_needs(tmp_path):
    """The command never names fastattn itself, which no index has."""
    record = tmp_path / "fastattn-0.1.0.dist-info/METADATA"
    record.parent.mkdir()
    text = "Name: fastattn\nVersion: 0.1.0\nRequires-Dist: torch>=2.11\n"
    text += 'Requires-Dist: jsonargparse[signatures]<5,>=4.40; extra == "train"\n'
    text += 'Requires-Dist: tqdm; extra == "train"\n'
    record.write_text(text + 'Requires-Dist: scikit-learn; extra == "eval"\n')
    code = f"import sys; sys.modules |= dict.fromkeys({EXTRAS})\nfrom fastattn.cli import main\n"
    code += "print([main([command]) for command in ('--help', '--version', 'info', 'train')])"
    paths = f"{tmp_path}{os.pathsep}{ROOT}"
    result = run(sys.executable, code, "/", PYTHONPATH=paths, PYTHONWARNINGS="ignore")
    assert result.stdout.startswith("usage: fastattn COMMAND")
    assert re.search(r"^fastattn \d+\.\d+\.\d+$", result.stdout, re.MULTILINE)
    assert result.stdout.endswith("[0, 0, 0, 2]\n")
    assert shlex.split(result.stderr.partition("run ")[2]) == [
        "pip", "install", "jsonargparse[signatures]<5,>=4.40", "tqdm",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        (None, "PyTorch is missing: run pip install torch"),
        ("raise ImportError('libcudart.so.13')", "PyTorch cannot be imported: libcudart.so.13"),
    ],
)
@pytest.mark.parametrize("command", [["-m", "fastattn"], ["fastattn"]])
def test_without_a_working_torch_the_command_answers_in_one_line(python, tmp_path, command, torch, said):
    (tmp_path / "fastattn").write_text("from fastattn.cli import main\n")  # as pip writes it
    if torch:
        (tmp_path / "torch.py").write_text(torch)
    found = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for option in ("--help", "--version", "info"):
        done = subprocess.run(
            [python, *command, option], cwd=tmp_path, env=os.environ | found, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"fastattn: error: {said}\n")
    result = run(python, "import fastattn", tmp_path, **found)
    assert f"ImportError: fastattn: {said}" in result.stderr


def test_the_workflows_call_scripts_that_are_there():
    called = []
    for path in sorted((ROOT / ".github/workflows").glob("*.yml")):
        called += re.findall(r"^ +- run: (\S+)$", path.read_text(), re.MULTILINE)
    assert called == [".ci/run", "scripts/build_wheel.sh"]
    assert all(os.access(ROOT / path, os.X_OK) for path in called)


def test_the_long_description_needs_no_file(python):
    """A package index shows no picture and follows no link into the repository."""
    program = "import build_environment as b; print(b.long_description(open('README.md', encoding='utf-8').read()))"
    text = run(python, program).stdout
    picture = re.search(r"!\[([^]]*)\]", (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    assert not re.search(r"\]\((?!https?:)", text)
    assert f"{picture}.\n" in text
    paths = re.findall(r"\(`([\w./-]+\.md)`\)", text)
    assert "docs/install.md" in paths
    assert all((ROOT / path).is_file() for path in paths)
