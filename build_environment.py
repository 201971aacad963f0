"""What a build of fastattn finds on this machine, and which command brings what is missing.

setup.py and build_backend.py share this file. It imports nothing beyond the standard library.
"""

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

PACKAGE = "fastattn"
CXX = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), "g++")
OLDEST_TORCH = (2, 11)  # the libraries load on this version and every later one
WITHOUT = f"FASTATTN_NATIVE=0 installs {PACKAGE} without kernels; it then runs on plain PyTorch."


def tri_state(name):
    """The value of an environment variable that is 0, 1 or auto, or None if it is not set."""
    value = os.environ.get(name) or None
    if value not in (None, "auto", "0", "1"):
        raise SystemExit(f"{PACKAGE}: {name} must be auto, 0 or 1, got {value!r}")
    return value


def output_of(*command, cwd=None):
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd).stdout
    except OSError:
        return ""


def first_match(pattern, text):
    match = re.search(pattern, text, re.MULTILINE)
    return match and match.group(1)


class Torch:
    """The torch package whose headers a build uses: its directory, its version, and its CUDA version or None."""

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        facts = (self.directory / "version.py").read_text()
        self.version = first_match(r"__version__ = '(.+)'", facts) or "0"
        self.cuda = first_match(r"^cuda\b.*= *['\"](.+)['\"]", facts)
        self.new_enough = tuple(int(number) for number in re.findall(r"\d+", self.version)[:2]) >= OLDEST_TORCH


def find_torch():
    """The first torch package with headers, or None.

    Searches FASTATTN_TORCH_DIR, then this environment. An isolated build hides the target environment, but pip runs the
    build with that environment's interpreter, which sees it if started again without the variables of the isolation.
    """
    candidates = [os.environ.get("FASTATTN_TORCH_DIR")]
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        candidates.append(spec.submodule_search_locations[0])
    locate = "from importlib.util import find_spec as f; print(*f('torch').submodule_search_locations)"
    candidates.append(output_of(sys.executable, "-E", "-c", locate, cwd="/").strip())
    for candidate in filter(None, candidates):
        if os.path.exists(os.path.join(candidate, "include/torch/csrc/stable/library.h")):
            return Torch(candidate)
    return None


def find_cuda():
    """The root of a CUDA toolkit: from pip in the build environment, CUDA_HOME, or the system's."""
    candidates = [os.path.join(path, "nvidia/cu13") for path in sys.path]
    candidates += [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(os.path.dirname(os.path.dirname(os.path.realpath(on_path))))
    for candidate in candidates:
        if candidate and os.path.exists(os.path.join(candidate, "bin/nvcc")):
            return pathlib.Path(candidate)
    return None


def cuda_or_reason(torch):
    """(root of the CUDA toolkit, None), or (None, why the CUDA kernels are left out)."""
    wanted = tri_state("FASTATTN_CUDA")
    if wanted == "0":
        return None, "FASTATTN_CUDA=0"
    if wanted != "1" and torch and torch.cuda is None:
        return None, f"torch {torch.version} is built without CUDA (FASTATTN_CUDA=1 compiles them all the same)"
    root = find_cuda()
    return root, None if root else "no nvcc found (set CUDA_HOME)"


def find_pybind11(torch):
    """The include directory of pybind11: its own package, or the copy that torch ships."""
    try:
        import pybind11

        return pybind11.get_include()
    except ImportError:
        bundled = torch and torch.directory / "include"
        return bundled if bundled and (bundled / "pybind11").is_dir() else None


def find_pythons():
    """{file name of _C: folder of the headers}, of this Python and of those in FASTATTN_PYTHONS."""
    facts = "import sysconfig as s; print(s.get_config_var('EXT_SUFFIX') or '.so', s.get_path('include'))"
    others = shlex.split(os.environ.get("FASTATTN_PYTHONS") or "")
    found = (output_of(python, "-c", facts).strip().split(" ", 1) for python in (sys.executable, *others))
    return {f"_C{pair[0]}": pair[1] for pair in found if len(pair) == 2}


def ninja_command():
    """The command that starts ninja, or None.

    That of pip comes first, as pip brings it into the environment of each build. Another version, such as an older one
    of the system, does not trust the log of the last build and compiles everything again.
    """
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    on_path = shutil.which("ninja")
    return [on_path] if on_path else None


def how_to_install(apt, dnf):
    """The command that installs a package of the system."""
    for tool, package in (("apt-get", apt), ("dnf", dnf)):
        if shutil.which(tool):
            return f"run {'' if os.geteuid() == 0 else 'sudo '}{tool} install {package}"
    return f"install {apt}"


def why_no_cpu_kernels(torch):
    """Why the kernels for the CPU cannot be built here, with the command that helps, or None. It does not name ninja,
    which pip brings into the environment of a build."""
    if not sys.platform.startswith("linux"):
        return f"the native part builds on Linux only, this is {sys.platform}"
    if torch is None:
        return (
            "no torch headers: the kernels are compiled against PyTorch, run pip install torch"
            " (if it is installed: build without isolation, or set FASTATTN_TORCH_DIR)"
        )
    if not torch.new_enough:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return (
            f"torch {torch.version} in {torch.directory} is older than {oldest}:"
            f" run pip install --upgrade 'torch>={oldest}'"
        )
    if not shutil.which(shlex.split(CXX)[0]):
        helps = "unset CXX" if os.environ.get("CXX") else how_to_install("g++", "gcc-c++")
        return f"no C++ compiler: {CXX} not found, {helps}"
    return None


def refuse_without_kernels(reason):
    """End an installation that would have no kernels, unless its user allows that."""
    if reason and sys.platform.startswith("linux") and tri_state("FASTATTN_NATIVE") in (None, "1"):
        raise SystemExit(f"{PACKAGE}: error: {reason}\n{PACKAGE}: then install again. {WITHOUT}")


def long_description(readme):
    """The README for the page of a package index, which has none of our files: a picture becomes its description, and
    a link to a file its text with the path in the source distribution."""
    readme = re.sub(r"!\[([^]]*)\]\((?!\w+:)[^)]*\)", r"\1.", readme)
    return re.sub(r"\[([^]]*)\]\((?!\w+:)([^)]*)\)", r"\1 (`\2`)", readme)
