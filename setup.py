"""Builds fastattn: op libraries on the LibTorch stable ABI, a pybind11 module, Triton kernels in Python.

The build neither imports nor requires torch: its headers are found in the environment of the installation, and the
libraries link against empty stubs with torch's sonames. Every native part is optional; fastattn/_build_info.json lists
the parts that were built, and why the others were not.

Environment:
  FASTATTN_NATIVE      auto | 0 | 1   0: no native part; 1: a native part that cannot be built is an error (CI)
  FASTATTN_CUDA        auto | 0 | 1   auto: built when nvcc is found; 1: a missing nvcc or a failed build is an error
  FASTATTN_CUDA_ARCHS  default "80;90a;100a"
  FASTATTN_TORCH_DIR   directory of the torch package whose headers are used
  CXX (default g++, c++ or clang++), CUDA_HOME, MAX_JOBS
"""

import importlib.util
import json
import os
import pathlib
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
PACKAGE = "fastattn"
CXX = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), "g++")
OLDEST_TORCH = (2, 11)  # the libraries load on this version and every later one
TORCH_TARGET_VERSION = "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
DEFINITIONS = runpy.run_path(str(ROOT / PACKAGE / "ops/_schemas.py"))["DEFINITIONS"]
SCHEMAS = "libfastattn_schemas.so"  # the other libraries find it by this name in their own folder

# Every csrc/cpu/*.cpp except *ops.cpp is compiled once per instruction set, with CPU_CAPABILITY naming the variant.
CPU_VARIANTS = {"default": ""}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_VARIANTS["avx2"] = "-mavx2 -mfma -mf16c"
    CPU_VARIANTS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
# A file named *_avx512bf16.cpp is compiled for that instruction set only.
CPU_VARIANT_OF_SUFFIX = {"_avx512bf16": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mfma -mf16c"}


# gcc 12 gives false warnings in its own AVX-512 headers; clang does not know the first flag
KERNEL_FLAGS = "-fno-exceptions -Wno-maybe-uninitialized -Wno-uninitialized -Wno-unknown-warning-option"

# A file named *_sm90.cu is compiled for that architecture only, as no other has its instructions. FASTATTN_HAS_SM90
# tells the wrappers whether it was compiled.
ARCH_OF_SUFFIX = {"_sm90": "90a", "_sm100": "100a"}

RULES = """\
ninja_required_version = 1.5
rule cxx
  command = {cxx} -MMD -MF $out.d -O3 -g0 -fPIC -std=c++20 -fvisibility=hidden -Wall $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = CXX $out
rule nvcc
  command = {nvcc} {ccbin} -MMD -MF $out.d -O3 -std=c++17 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v $
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


def tri_state(name):
    """The value of an environment variable that is auto (or unset), 0 or 1."""
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{PACKAGE}: {name} must be auto, 0 or 1, got {value!r}")
    return value


def wanted_archs():
    archs = re.split(r"[;, ]+", (os.environ.get("FASTATTN_CUDA_ARCHS") or "80;90a;100a").strip(" ;,"))
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise SystemExit(f"{PACKAGE}: FASTATTN_CUDA_ARCHS must look like 80;90a;100a, got {arch!r} in it")
    return archs


def find_torch():
    """(directory of the torch package, None), or (None, why there is no usable one).

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
        if not os.path.exists(os.path.join(candidate, "include/torch/csrc/stable/library.h")):
            continue
        version = torch_version(candidate)
        if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) >= OLDEST_TORCH:
            return pathlib.Path(candidate), None
        return None, f"torch {version} in {candidate} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    return None, "no torch headers: install torch first, then reinstall (or set FASTATTN_TORCH_DIR)"


def torch_version(directory):
    return first_match(r"__version__ = '(.+)'", (pathlib.Path(directory) / "version.py").read_text()) or "0"


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


def find_pybind11(torch):
    """The include directory of pybind11: its own package, or the copy that torch ships."""
    try:
        import pybind11

        return pybind11.get_include()
    except ImportError:
        bundled = torch and torch / "include"
        return bundled if bundled and (bundled / "pybind11").is_dir() else None


def cpp_object(value):
    """The C++ expression of a Python object: None, a str, or a list of str."""
    if value is None:
        return "py::none()"
    return json.dumps(value) if isinstance(value, str) else f"py::make_tuple({', '.join(map(json.dumps, value))})"


def output_of(*command, cwd=None):
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd).stdout
    except OSError:
        return ""


def first_match(pattern, text):
    match = re.search(pattern, text)
    return match and match.group(1)


def job_count():
    """MAX_JOBS, or one compiler per usable core and per 2 GiB of available memory."""
    wanted = os.environ.get("MAX_JOBS") or "auto"
    if wanted.isdigit():
        return max(1, int(wanted))
    if wanted != "auto":
        raise SystemExit(f"{PACKAGE}: MAX_JOBS must be a number, got {wanted!r}")
    available_kib = int(first_match(r"MemAvailable: *(\d+)", pathlib.Path("/proc/meminfo").read_text()) or 2**21)
    return max(1, min(len(os.sched_getaffinity(0)), available_kib // 2**21))


def arch_flags(stem, archs):
    """The -gencode flags of one .cu file; a generic file also has PTX, so that it runs on future architectures."""
    for suffix, only in ARCH_OF_SUFFIX.items():
        if stem.endswith(suffix):
            return f"-gencode=arch=compute_{only},code=sm_{only}" if only in archs else None
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    plain = sorted((arch for arch in archs if arch.isdigit()), key=int)
    if plain:
        flags.append(f"-gencode=arch=compute_{plain[0]},code=compute_{plain[0]}")
    return " ".join(flags)


class NinjaFile:
    """A build.ninja under construction; it runs in its own directory, where objects mirror the source tree."""

    def __init__(self, nvcc):
        # nvcc uses the C++ compiler on PATH, unless CXX names another
        ccbin = f"-ccbin {CXX}" if os.environ.get("CXX") and " " not in CXX else ""
        self.text = RULES.format(cxx=CXX, nvcc=shlex.quote(str(nvcc)), ccbin=ccbin)

    def add(self, output, rule, inputs, implicit=(), **variables):
        inputs, implicit = (
            " ".join(re.sub(r"[$ :]", r"$\g<0>", str(path)) for path in paths) for paths in (inputs, implicit)
        )
        self.text += f"build {output}: {rule} {inputs} | {implicit}\n"
        for name, value in variables.items():
            self.text += f"  {name} = {value}\n"
        return output

    def compile(self, rule, source, flags, variant=""):
        suffix = f".{variant}.o" if variant else ".o"
        return self.add(source.relative_to(ROOT).with_suffix(suffix), rule, [source], flags=flags)

    def stub(self, soname):
        """An empty library, which gives DT_NEEDED on torch's library without that torch at link time."""
        return self.add(soname, "stub", [], soname=soname)

    def library(self, name, objects, libraries, flags=""):
        """A shared library that depends on `libraries`, even if it uses no symbol of them, as the stubs have none."""
        needed = f"-Wl,--no-as-needed {' '.join(libraries)} -Wl,--as-needed -Wl,-rpath,'$$ORIGIN'"
        self.add(name, "link", objects, libraries, flags=f"-Wl,-soname,{name} {needed} {flags}")


def include(*directories, system=True):
    return " ".join(f"{'-isystem' if system else '-I'} {shlex.quote(str(directory))}" for directory in directories)


def write_if_changed(path, text):
    """Write a generated source; its timestamp decides what is compiled again."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def write_schema_library(ninja, torch_flags, build_dir):
    """libfastattn_schemas.so: the definitions of all ops; the op libraries depend on it."""
    text = "".join(f'"{definition}",\n' for definition in DEFINITIONS.values())
    write_if_changed(build_dir / "schemas.inc", text)
    flags = f"{torch_flags} {include(build_dir, system=False)}"
    ninja.library(SCHEMAS, [ninja.compile("cxx", ROOT / "csrc/schemas.cpp", flags)], [ninja.stub("libtorch_cpu.so")])


def write_cpu_library(ninja, torch_flags):
    """_cpu.so: the kernels, once per instruction set, and the *ops.cpp, which register them with torch."""
    objects = []
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        if source.stem.endswith("ops"):
            objects.append(ninja.compile("cxx", source, torch_flags))
            continue
        only = {suffix[1:]: flags for suffix, flags in CPU_VARIANT_OF_SUFFIX.items() if source.stem.endswith(suffix)}
        if only and len(CPU_VARIANTS) == 1:
            continue  # another processor family
        for variant, isa_flags in (only or CPU_VARIANTS).items():
            flags = f"{include(ROOT / 'csrc', system=False)} -DCPU_CAPABILITY={variant} {isa_flags} {KERNEL_FLAGS}"
            objects.append(ninja.compile("cxx", source, flags, variant))
    ninja.library("_cpu.so", objects, ["libtorch_cpu.so", SCHEMAS])


def write_cuda_library(ninja, torch_flags, cuda, archs):
    """_cuda.so: torch-free .cu files and C++ host wrappers, with the CUDA runtime linked statically."""
    has = " ".join(f"-DFASTATTN_HAS{suffix.upper()}" for suffix, arch in ARCH_OF_SUFFIX.items() if arch in archs)
    objects = []
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        flags = arch_flags(source.stem, archs)
        if flags:
            objects.append(ninja.compile("nvcc", source, f"{include(ROOT / 'csrc', system=False)} {flags}"))
    wrappers = sorted((ROOT / "csrc/cuda").glob("*.cpp"))
    objects += [ninja.compile("cxx", source, f"{torch_flags} {has}") for source in wrappers]
    folders = " ".join(f"-L{shlex.quote(str(cuda / name))}" for name in ("lib64", "lib"))
    libraries = ["libtorch_cpu.so", ninja.stub("libtorch_cuda.so"), SCHEMAS]
    ninja.library("_cuda.so", objects, libraries, f"{folders} -lcudart_static -lrt -lpthread -ldl")


def write_introspection_module(ninja, name, pybind11, build_dir, info):
    """_C: answers `info` at run time. It needs Python and pybind11 but no torch, and is tied to a Python version."""
    text = "".join(f'info["{key}"] = {cpp_object(value)};\n' for key, value in info.items())
    write_if_changed(build_dir / "build_info.inc", text)
    flags = include(ROOT / "csrc", build_dir, system=False) + " " + include(pybind11, sysconfig.get_path("include"))
    ninja.add(name, "link", [ninja.compile("cxx", ROOT / "csrc/introspection.cpp", flags)], flags="-s")


def run_ninja(build_dir, *targets):
    """Build targets, each as far as possible; returns None, or the part of the output that explains the failure."""
    on_path = shutil.which("ninja")
    command = [on_path] if on_path else [sys.executable, "-m", "ninja"]
    command += ["-C", str(build_dir), f"-j{job_count()}", "-k0", *targets]
    lines = []
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
    except OSError as error:
        return f"ninja does not start: {error}"
    if process.returncode == 0:
        return None
    first = next((i for i, line in enumerate(lines) if line.startswith("FAILED")), 0)
    return "".join(lines[first : first + 40])


def replace_file(path, content):
    """Write a file atomically: processes keep an old library that they have mapped, a killed build leaves no part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.chmod(0o755 if path.suffix == ".so" else 0o644)
    os.replace(temporary, path)


class BuildNative(build_ext):
    def run(self):
        self.native, self.want_cuda = tri_state("FASTATTN_NATIVE"), tri_state("FASTATTN_CUDA")
        self.module = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
        self.parts = (SCHEMAS, "_cpu.so", "_cuda.so", self.module)
        out_dir = ROOT / PACKAGE if self.inplace else pathlib.Path(self.build_lib).resolve() / PACKAGE
        build_dir = pathlib.Path(self.build_temp).resolve()
        if self.editable_mode:  # not its temporary directory, so that the next build is incremental
            build_dir = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        for directory in (out_dir, build_dir):
            directory.mkdir(parents=True, exist_ok=True)

        info = self.build(build_dir)
        skipped = info["not_built"]
        for part in self.parts:
            if part in skipped:
                (out_dir / part).unlink(missing_ok=True)  # never keep a library of older sources
                print(f"{PACKAGE}: {part} not built: {skipped[part]}", file=sys.stderr)
            else:
                replace_file(out_dir / part, (build_dir / part).read_bytes())
        replace_file(out_dir / "_build_info.json", (json.dumps(info, indent=1) + "\n").encode())

        required = {"_cuda.so"} if self.want_cuda == "1" else set()
        if self.native == "1":
            required |= set(self.parts) - ({"_cuda.so"} if info["nvcc"] is None else set())
        missing = sorted(required & skipped.keys())
        if missing:
            reasons = "\n".join(f"{part}: {skipped[part]}" for part in missing)
            raise SystemExit(f"{PACKAGE}: FASTATTN_NATIVE or FASTATTN_CUDA is 1, but a part was not built\n{reasons}")

    def build(self, build_dir):
        """Build every possible part in `build_dir`; returns the parts built and the reasons for the rest."""
        archs = wanted_archs()
        torch, no_torch = find_torch()
        cuda = find_cuda() if self.want_cuda != "0" else None
        pybind11 = find_pybind11(torch)
        ninja = NinjaFile(cuda and cuda / "bin/nvcc")
        info = {
            "cpu_variants": [*CPU_VARIANTS, *(s[1:] for s in CPU_VARIANT_OF_SUFFIX if len(CPU_VARIANTS) > 1)],
            "torch": torch and torch_version(torch),
            "nvcc": cuda and first_match(r"V(\d[\d.]+)", output_of(str(cuda / "bin/nvcc"), "--version")),
            "cuda_archs": archs if cuda else None,
            "cxx": output_of(*shlex.split(CXX), "--version").partition("\n")[0] or None,
        }

        skipped = {}

        def skip(reason, *parts):
            for part in parts:
                skipped.setdefault(part, reason)

        if self.native == "0":
            skip("FASTATTN_NATIVE=0", *self.parts)
        if not sys.platform.startswith("linux"):
            skip(f"the native part builds on Linux only, this is {sys.platform}", *self.parts)
        if not shutil.which(shlex.split(CXX)[0]):
            skip(f"no C++ compiler: {CXX} not found (install g++, or set CXX)", *self.parts)
        if torch is None:
            skip(no_torch, SCHEMAS, "_cpu.so", "_cuda.so")
        if cuda is None:
            skip("FASTATTN_CUDA=0" if self.want_cuda == "0" else "no nvcc found (set CUDA_HOME)", "_cuda.so")
        if pybind11 is None:
            skip("no pybind11 headers", self.module)

        torch_flags = f"{include(ROOT / 'csrc', system=False)} -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
        if torch:
            torch_flags += " " + include(torch / "include")
            write_schema_library(ninja, torch_flags, build_dir)
        if torch and cuda:  # ninja starts what is written first, and these files take longest
            write_cuda_library(ninja, torch_flags, cuda, archs)
        if torch:
            write_cpu_library(ninja, torch_flags)
        if pybind11:
            write_introspection_module(ninja, self.module, pybind11, build_dir, info)
        (build_dir / "build.ninja").write_text(ninja.text)

        # all parts in one run, so that no processor waits for the last file of a part; if it fails, each part is asked
        wanted = [part for part in self.parts if part not in skipped]
        if wanted and run_ninja(build_dir, *wanted):
            skipped |= {part: error for part in wanted if (error := run_ninja(build_dir, part))}
        built = [part for part in self.parts if part not in skipped]
        return {"built": built, "not_built": skipped, "schemas": DEFINITIONS} | info

    def get_output_mapping(self):
        """For editable installs that link file by file: path in the installed package -> file in this tree."""
        if not self.inplace:
            return {}
        names = [name for name in (*self.parts, "_build_info.json") if (ROOT / PACKAGE / name).exists()]
        return {str(pathlib.Path(self.build_lib, PACKAGE, name)): str(ROOT / PACKAGE / name) for name in names}

    def get_outputs(self):
        return list(self.get_output_mapping())


class CleanBuild(build):
    """Starts from an empty build_lib, so that files deleted from the source do not stay in the package."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return True


class Wheel(bdist_wheel):
    def get_tag(self):
        """One wheel for every CPython: the op libraries hold no Python symbol, and _C is optional."""
        return ("py3", "none", super().get_tag()[2])


def source_folders():
    """The folders of the packages.

    fastattn/kernels is a symbolic link to kernels/, which some archives and file systems lose, so the wheel does not
    depend on it. An editable install puts a folder on sys.path with a link to the package only: type checkers follow
    it, unlike an import hook of setuptools, and no other folder of this repository becomes importable.
    """
    if "editable_wheel" in sys.argv and (ROOT / PACKAGE / "kernels").is_dir():
        link = ROOT / ".editable" / PACKAGE
        link.parent.mkdir(exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.join("..", PACKAGE), target_is_directory=True)
        return {"": link.parent.name}
    return {f"{PACKAGE}.kernels": "kernels"}


setup(
    packages=[*find_packages(include=["fastattn*"]), "fastattn.kernels"],
    package_dir=source_folders(),
    ext_modules=[Extension(f"{PACKAGE}._native", [])],
    distclass=BinaryDistribution,
    cmdclass={"build": CleanBuild, "build_ext": BuildNative, "bdist_wheel": Wheel},
)
