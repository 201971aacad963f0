"""Builds fastattn: op libraries on the LibTorch stable ABI, a pybind11 module, Triton kernels in Python.

The build does not import torch: its headers are found in the environment of the installation (build_environment.py),
and the libraries link against empty stubs with torch's sonames. fastattn/_build_info.json lists the parts that were
built, and why the others were not.

Environment:
  FASTATTN_NATIVE      not set: kernels for the CPU that cannot be built are an error, on Linux; 0: no native part;
                       auto: what can be built; 1: every native part that cannot be built is an error (CI)
  FASTATTN_CUDA        not set: built when nvcc is found and torch has CUDA; then a failure is an error, as above;
                       0: no; auto: like not set; 1: a missing nvcc is an error too, and any torch will do
  FASTATTN_CUDA_ARCHS  default "80;90a;100a"
  FASTATTN_TORCH_DIR   directory of the torch package whose headers are used
  FASTATTN_PYTHONS     further interpreters for which _C is compiled, with spaces between them
  CXX (default g++, c++ or clang++), CUDA_HOME, MAX_JOBS
"""

import json
import os
import pathlib
import platform
import re
import runpy
import shlex
import shutil
import sys

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # only without build isolation: pip brings what pyproject.toml asks for
    raise SystemExit("fastattn: error: setuptools is too old, run pip install 'setuptools>=80'") from None

from build_environment import (
    CXX,
    OLDEST_TORCH,
    PACKAGE,
    WITHOUT,
    cuda_or_reason,
    find_pybind11,
    find_pythons,
    find_torch,
    first_match,
    long_description,
    ninja_command,
    output_of,
    refuse_without_kernels,
    tri_state,
    why_no_cpu_kernels,
)
from build_ninja import NinjaFile, include, job_count, run_ninja, stubs_of_glibc, write_if_changed

ROOT = pathlib.Path(__file__).parent.resolve()
TORCH_TARGET_VERSION = "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
DEFINITIONS = runpy.run_path(str(ROOT / PACKAGE / "ops/_schemas.py"))["DEFINITIONS"]
SCHEMAS = "libfastattn_schemas.so"  # the other libraries find it by this name in their own folder

# Every csrc/cpu/*.cpp except *ops.cpp is compiled once per instruction set, with CPU_CAPABILITY naming the variant.
CPU_VARIANTS = {"default": ""}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_VARIANTS["avx2"] = "-mavx2 -mfma -mf16c"
    CPU_VARIANTS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
# A file named *_avx512bf16.cpp or *_amx.cpp is compiled for that instruction set only.
CPU_VARIANT_OF_SUFFIX = {"_avx512bf16": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mfma -mf16c"}
CPU_VARIANT_OF_SUFFIX["_amx"] = CPU_VARIANT_OF_SUFFIX["_avx512bf16"] + " -mamx-tile -mamx-bf16"


# gcc 12 gives false warnings in its own AVX-512 headers; clang does not know the first flag
KERNEL_FLAGS = "-fno-exceptions -Wno-maybe-uninitialized -Wno-uninitialized -Wno-unknown-warning-option"

# A file named *_sm90.cu is compiled for that architecture only, as no other has its instructions. FASTATTN_HAS_SM90
# tells the wrappers whether it was compiled.
ARCH_OF_SUFFIX = {"_sm90": "90a", "_sm100": "100a"}


def wanted_archs():
    archs = re.split(r"[;, ]+", (os.environ.get("FASTATTN_CUDA_ARCHS") or "80;90a;100a").strip(" ;,"))
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise SystemExit(f"{PACKAGE}: FASTATTN_CUDA_ARCHS must look like 80;90a;100a, got {arch!r} in it")
    return archs


def cpp_object(value):
    """The C++ expression of a Python object: None, a str, or a list of str."""
    if value is None:
        return "py::none()"
    return json.dumps(value) if isinstance(value, str) else f"py::make_tuple({', '.join(map(json.dumps, value))})"


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


def write_introspection_modules(ninja, pythons, pybind11, build_dir, info):
    """_C: answers `info` at run time. It needs Python and pybind11 but no torch, and is tied to a Python version."""
    text = "".join(f'info["{key}"] = {cpp_object(value)};\n' for key, value in info.items())
    write_if_changed(build_dir / "build_info.inc", text)
    for name, folder in pythons.items():
        flags = include(ROOT / "csrc", build_dir, system=False) + " " + include(pybind11, folder)
        compiled = ninja.compile("cxx", ROOT / "csrc/introspection.cpp", flags, name.split(".")[1])
        ninja.add(name, "link", [compiled, ninja.older_systems], [ninja.map], flags=f"-s {ninja.hidden}")


def say_what_is_built(info, wanted, skipped):
    """Lines for `pip install -v`: what is compiled for which processors, and which variables change that."""
    if "_cpu.so" in wanted:
        print(f"{PACKAGE}: with {info['cxx']} and the headers of torch {info['torch']}, {job_count()} files at a time")
        print(f"{PACKAGE}: kernels for the CPU: {', '.join(info['cpu_variants'])}")
    if "_cuda.so" in wanted:
        print(f"{PACKAGE}: kernels for GPUs: {', '.join(info['cuda_archs'])}, with nvcc {info['nvcc']}")
        print(f"{PACKAGE}: (FASTATTN_CUDA_ARCHS='90a' builds fewer of them, FASTATTN_CUDA=0 none)")
    elif wanted:
        print(f"{PACKAGE}: no kernels in CUDA C++: {skipped['_cuda.so']}", flush=True)


def replace_file(path, content):
    """Write a file atomically: processes keep an old library that they have mapped, a killed build leaves no part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.chmod(0o755 if path.suffix == ".so" else 0o644)
    os.replace(temporary, path)


class BuildNative(build_ext):
    def run(self):
        pythons = find_pythons()
        self.parts = (SCHEMAS, "_cpu.so", "_cuda.so", *pythons)
        out_dir = ROOT / PACKAGE if self.inplace else pathlib.Path(self.build_lib).resolve() / PACKAGE
        build_dir = pathlib.Path(self.build_temp).resolve()
        if self.editable_mode:  # not its temporary directory, so that the next build is incremental
            build_dir = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        for directory in (out_dir, build_dir):
            directory.mkdir(parents=True, exist_ok=True)

        info = self.build(build_dir, pythons)
        skipped = info["not_built"]
        for part in self.parts:
            if part in skipped:
                (out_dir / part).unlink(missing_ok=True)  # never keep a library of older sources
                print(f"{PACKAGE}: {part} not built: {skipped[part]}", file=sys.stderr)
            else:
                replace_file(out_dir / part, (build_dir / part).read_bytes())
        replace_file(out_dir / "_build_info.json", (json.dumps(info, indent=1) + "\n").encode())
        self.refuse_missing(info)

    def refuse_missing(self, info):
        """End the build if a part failed that was not left out by a choice."""
        native, skipped = tri_state("FASTATTN_NATIVE"), info["not_built"]
        cuda = {"_cuda.so"} if info["nvcc"] else set()
        required = {"_cuda.so"} if tri_state("FASTATTN_CUDA") == "1" else set()
        if native == "1":
            required |= (set(self.parts) - {"_cuda.so"}) | cuda
        if native is None and sys.platform.startswith("linux"):
            required |= {SCHEMAS, "_cpu.so"} | cuda
        if missing := sorted(required & skipped.keys()):
            reasons = "\n".join(f"{part}: {skipped[part]}" for part in missing)
            advice = f"FASTATTN_CUDA=0 leaves out the CUDA kernels. {WITHOUT}" if native is None else ""
            raise SystemExit(f"{PACKAGE}: error: a part was not built\n{reasons}\n{advice}".rstrip())

    def build(self, build_dir, pythons):
        """Build every possible part in `build_dir`; returns the parts built and the reasons for the rest."""
        archs, torch = wanted_archs(), find_torch()
        cuda, no_cuda = cuda_or_reason(torch)
        pybind11 = find_pybind11(torch)
        why_not = why_no_cpu_kernels(torch) or (None if ninja_command() else "ninja is missing: run pip install ninja")
        refuse_without_kernels(why_not)
        if torch and not torch.new_enough:
            torch = None
        ninja = NinjaFile(ROOT, cuda and cuda / "bin/nvcc")
        ninja.glibc = stubs_of_glibc(ninja, build_dir)
        info = {
            "cpu_variants": [*CPU_VARIANTS, *(s[1:] for s in CPU_VARIANT_OF_SUFFIX if len(CPU_VARIANTS) > 1)],
            "torch": torch and torch.version,
            "nvcc": cuda and first_match(r"V(\d[\d.]+)", output_of(str(cuda / "bin/nvcc"), "--version")),
            "cuda_archs": archs if cuda else None,
            "cxx": output_of(*shlex.split(CXX), "--version").partition("\n")[0] or None,
        }

        skipped = {}

        def skip(reason, *parts):
            for part in parts:
                skipped.setdefault(part, reason)

        if tri_state("FASTATTN_NATIVE") == "0":
            skip("FASTATTN_NATIVE=0", *self.parts)
        if why_not:
            skip(why_not, *(self.parts if torch else (SCHEMAS, "_cpu.so", "_cuda.so")))
        if cuda is None:
            skip(no_cuda, "_cuda.so")
        if pybind11 is None:
            skip("no pybind11 headers", *pythons)
        for module, folder in pythons.items():
            if not os.path.exists(f"{folder}/Python.h"):
                skip("no headers of this Python", module)

        torch_flags = f"{include(ROOT / 'csrc', system=False)} -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
        if torch:
            torch_flags += " " + include(torch.directory / "include")
            write_schema_library(ninja, torch_flags, build_dir)
        if torch and cuda:  # ninja starts what is written first, and these files take longest
            write_cuda_library(ninja, torch_flags, cuda, archs)
        if torch:
            write_cpu_library(ninja, torch_flags)
        if pybind11:
            write_introspection_modules(ninja, pythons, pybind11, build_dir, info)
        (build_dir / "build.ninja").write_text(ninja.text)

        # all parts in one run, so that no processor waits for the last file of a part; if it fails, each part is asked
        wanted = [part for part in self.parts if part not in skipped]
        say_what_is_built(info, wanted, skipped)
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
    long_description=long_description((ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["fastattn*"]), "fastattn.kernels"],
    package_dir=source_folders(),
    ext_modules=[Extension(f"{PACKAGE}._native", [])],
    distclass=BinaryDistribution,
    cmdclass={"build": CleanBuild, "build_ext": BuildNative, "bdist_wheel": Wheel},
)
