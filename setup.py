"""Builds fastattn: two op libraries on the LibTorch stable ABI, a pybind11 module, Triton kernels in Python.

torch is never imported and never required to build: its headers are found in the environment that is installed into,
and the libraries link against empty stubs that carry torch's sonames. Every native part is optional; what was built,
and why something was not, is written to fastattn/_build_info.json.

Environment:
  FASTATTN_NATIVE      auto | 0 | 1   0: no native part; 1: a native part that cannot be built is an error (CI)
  FASTATTN_CUDA        auto | 0 | 1   auto: built when nvcc is found; 1: a missing nvcc or a failed build is an error
  FASTATTN_CUDA_ARCHS  default "80;90a;100a"
  FASTATTN_TORCH_DIR   directory of the torch package whose headers are used
  CXX, CUDA_HOME, MAX_JOBS
"""

import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
PACKAGE = "fastattn"
CXX = os.environ.get("CXX", "g++")
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11, the oldest torch the libraries load on

# Every csrc/cpu/*.cpp but the *ops.cpp is compiled once per instruction set, with CPU_CAPABILITY naming the variant.
CPU_VARIANTS = {"default": ""}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_VARIANTS["avx2"] = "-mavx2 -mfma -mf16c"
    CPU_VARIANTS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"

# A file named *_sm90.cu is compiled for that architecture only: its instructions exist nowhere else. The wrappers learn
# by FASTATTN_HAS_SM90 whether it was.
ARCH_OF_SUFFIX = {"_sm90": "90a", "_sm100": "100a"}

RULES = """\
ninja_required_version = 1.5
rule cxx
  command = {cxx} -MMD -MF $out.d -O3 -g0 -fPIC -std=c++20 -fvisibility=hidden -Wall $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = CXX $out
rule nvcc
  command = {nvcc} -MMD -MF $out.d -O3 -std=c++17 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v $
      $flags -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)
  depfile = $out.d
  deps = gcc
  description = NVCC $out
rule stub
  command = echo | {cxx} -shared -fPIC -Wl,-soname,$soname -x c++ - -o $out
  description = STUB $soname
rule link
  command = {cxx} -shared -o $out $in $flags
  description = LINK $out
"""


def find_torch():
    """The directory of the torch package, from FASTATTN_TORCH_DIR, this environment, or the one pip installs into.

    pip runs an isolated build with the target's interpreter, so sysconfig still names the target's site-packages.
    """
    candidates = [os.environ.get("FASTATTN_TORCH_DIR")]
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        candidates.append(spec.submodule_search_locations[0])
    candidates += [os.path.join(sysconfig.get_path(name), "torch") for name in ("purelib", "platlib")]
    for candidate in candidates:
        if candidate and os.path.exists(os.path.join(candidate, "include/torch/csrc/stable/library.h")):
            return pathlib.Path(candidate)
    return None


def find_cuda():
    """The root of a CUDA toolkit: one that pip put in the build environment, CUDA_HOME, or the system's."""
    candidates = [os.path.join(path, "nvidia/cu13") for path in sys.path]
    candidates += [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(os.path.dirname(os.path.dirname(os.path.realpath(on_path))))
    for candidate in candidates:
        if candidate and os.path.exists(os.path.join(candidate, "bin/nvcc")):
            return pathlib.Path(candidate)
    return None


def find_pybind11(torch):
    """The include directory of pybind11: its own package, or the copy that torch ships."""
    try:
        import pybind11

        return pybind11.get_include()
    except ImportError:
        bundled = torch and torch / "include"
        return bundled if bundled and (bundled / "pybind11").is_dir() else None


def output_of(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return ""


def first_match(pattern, text):
    match = re.search(pattern, text)
    return match and match.group(1)


def job_count():
    """MAX_JOBS, or one compiler per core we may use and per 2 GiB of free memory."""
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    free_gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(free_gib // 2)))


def arch_flags(stem, archs):
    """The -gencode flags of one .cu file; a generic file also carries PTX, so that it runs on architectures to come."""
    for suffix, only in ARCH_OF_SUFFIX.items():
        if stem.endswith(suffix):
            return f"-gencode=arch=compute_{only},code=sm_{only}" if only in archs else None
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    plain = sorted((arch for arch in archs if arch.isdigit()), key=int)
    if plain:
        flags.append(f"-gencode=arch=compute_{plain[0]},code=compute_{plain[0]}")
    return " ".join(flags)


class NinjaFile:
    """A build.ninja under construction. Objects mirror the source tree below `build_dir`."""

    def __init__(self, build_dir, nvcc):
        self.build_dir = build_dir
        self.text = RULES.format(cxx=CXX, nvcc=nvcc)

    def add(self, output, rule, inputs, implicit=(), **variables):
        inputs = " ".join(map(str, inputs))
        implicit = " | " + " ".join(map(str, implicit)) if implicit else ""
        self.text += f"build {output}: {rule} {inputs}{implicit}\n"
        for name, value in variables.items():
            self.text += f"  {name} = {value}\n"
        return output

    def compile(self, rule, source, flags, variant=""):
        suffix = f".{variant}.o" if variant else ".o"
        output = self.build_dir / source.relative_to(ROOT).with_suffix(suffix)
        return self.add(output, rule, [source], flags=flags)

    def stub(self, soname):
        """An empty library: gives DT_NEEDED on torch's library without needing that very torch to link."""
        return self.add(self.build_dir / soname, "stub", [], soname=soname)


def write_cpu_library(ninja, output, torch_flags, stub):
    """_cpu.so: kernels once per instruction set, and the *ops.cpp, which register them with torch."""
    objects = []
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        if source.stem.endswith("ops"):
            objects.append(ninja.compile("cxx", source, torch_flags))
            continue
        for variant, isa_flags in CPU_VARIANTS.items():
            # gcc 12 warns falsely inside its own AVX-512 headers
            flags = f"-I{ROOT}/csrc -DCPU_CAPABILITY={variant} {isa_flags} -Wno-maybe-uninitialized -Wno-uninitialized"
            objects.append(ninja.compile("cxx", source, flags, variant))
    # --no-as-needed: some distributions drop a library of which no symbol is taken, and the stub has none.
    ninja.add(output, "link", objects, [stub], flags=f"-Wl,--no-as-needed {stub}")


def write_cuda_library(ninja, output, torch_flags, stubs, cuda, archs):
    """_cuda.so: torch-free .cu files, host wrapper by the C++ compiler, the CUDA runtime linked statically."""
    has = " ".join(f"-DFASTATTN_HAS{suffix.upper()}" for suffix, arch in ARCH_OF_SUFFIX.items() if arch in archs)
    objects = [
        ninja.compile("cxx", source, f"{torch_flags} {has}") for source in sorted((ROOT / "csrc/cuda").glob("*.cpp"))
    ]
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        flags = arch_flags(source.stem, archs)
        if flags:
            objects.append(ninja.compile("nvcc", source, f"-I{ROOT}/csrc {flags}"))
    flags = "-Wl,--no-as-needed " + " ".join(map(str, stubs))
    flags += f" -Wl,--as-needed -L{cuda}/lib64 -L{cuda}/lib -lcudart_static -lrt -lpthread -ldl"
    ninja.add(output, "link", objects, stubs, flags=flags)


def write_introspection_module(ninja, output, pybind11):
    """_C: needs Python and pybind11 but no torch. The one part that is tied to a Python version."""
    flags = f"-I{ROOT}/csrc -isystem {pybind11} -isystem {sysconfig.get_path('include')}"
    output_object = ninja.compile("cxx", ROOT / "csrc/introspection.cpp", flags)
    ninja.add(output, "link", [output_object], flags="-s")


class BuildNative(build_ext):
    def run(self):
        out_dir = ROOT / PACKAGE if self.inplace else pathlib.Path(self.build_lib).resolve() / PACKAGE
        build_dir = pathlib.Path(self.build_temp).resolve()
        for directory in (out_dir, build_dir):
            directory.mkdir(parents=True, exist_ok=True)

        native = os.environ.get("FASTATTN_NATIVE", "auto")
        want_cuda = os.environ.get("FASTATTN_CUDA", "auto")
        archs = os.environ.get("FASTATTN_CUDA_ARCHS", "80;90a;100a").split(";")
        torch = find_torch()
        cuda = find_cuda() if want_cuda != "0" else None
        pybind11 = find_pybind11(torch)
        ninja = NinjaFile(build_dir, f"{cuda}/bin/nvcc")
        module = "_C" + sysconfig.get_config_var("EXT_SUFFIX")

        skipped = {}
        if native == "0":
            skipped = dict.fromkeys(("_cpu.so", "_cuda.so", module), "FASTATTN_NATIVE=0")
        if torch is None:
            reason = "no torch headers: install torch first, then reinstall (or set FASTATTN_TORCH_DIR)"
            skipped = {"_cpu.so": reason, "_cuda.so": reason} | skipped
        if cuda is None:
            skipped.setdefault("_cuda.so", "FASTATTN_CUDA=0" if want_cuda == "0" else "no nvcc: set CUDA_HOME")
        if pybind11 is None:
            skipped.setdefault(module, "no pybind11 headers")

        targets = [name for name in ("_cpu.so", "_cuda.so", module) if name not in skipped]
        torch_flags = f"-I{ROOT}/csrc -isystem {torch}/include -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
        stubs = [ninja.stub("libtorch_cpu.so"), ninja.stub("libtorch_cuda.so")]
        if "_cpu.so" in targets:
            write_cpu_library(ninja, out_dir / "_cpu.so", torch_flags, stubs[0])
        if "_cuda.so" in targets:
            write_cuda_library(ninja, out_dir / "_cuda.so", torch_flags, stubs, cuda, archs)
        if module in targets:
            write_introspection_module(ninja, out_dir / module, pybind11)
        (build_dir / "build.ninja").write_text(ninja.text)

        for target in targets:
            error = self.run_ninja(build_dir, out_dir / target)
            if error:
                (out_dir / target).unlink(missing_ok=True)  # never leave a stale library of an older source
                skipped[target] = error
        info = {
            "built": [target for target in targets if target not in skipped],
            "not_built": skipped,
            "torch": first_match(r"__version__ = '(.+)'", (torch / "version.py").read_text()) if torch else None,
            "nvcc": first_match(r"V(\d[\d.]+)", output_of(f"{cuda}/bin/nvcc", "--version")) if cuda else None,
            "cuda_archs": archs if cuda else None,
            "cxx": output_of(CXX, "--version").partition("\n")[0],
        }
        (out_dir / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")

        for target, reason in skipped.items():
            print(f"{PACKAGE}: {target} not built: {reason}", file=sys.stderr)
        required = targets if native == "1" else []
        required = required + (["_cpu.so"] if native == "1" else []) + (["_cuda.so"] if want_cuda == "1" else [])
        missing = sorted(set(required) & set(skipped))
        if missing:
            raise SystemExit(f"{PACKAGE}: required but not built: {', '.join(missing)}")

    def run_ninja(self, build_dir, target):
        """Build one target; None, or the last lines of the output when it failed."""
        executable = shutil.which("ninja") or os.path.join(sysconfig.get_path("scripts"), "ninja")
        command = [executable, "-C", str(build_dir), f"-j{job_count()}", str(target)]
        lines = []
        try:
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    lines.append(line)
        except OSError as error:
            return f"{executable}: {error}"
        return None if process.returncode == 0 else "".join(lines[-15:])

    def get_outputs(self):
        return []


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return True


class Wheel(bdist_wheel):
    def get_tag(self):
        """One wheel for every CPython: the op libraries hold no Python symbol, and _C is optional."""
        return ("py3", "none", super().get_tag()[2])


setup(
    packages=[*find_packages(include=["fastattn*"]), "fastattn.kernels"],
    package_dir={f"{PACKAGE}.kernels": "kernels"},
    ext_modules=[Extension(f"{PACKAGE}._native", [])],
    distclass=BinaryDistribution,
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
