"""The CPU kernels for the tiles of AMX as ops of their own, with the tiles in software where the processor has none.

csrc/cpu/*_amx.cpp and the wrappers that choose them are compiled against emulate_tiles.h, which also ends the process
when a kernel uses a tile that is not configured.
"""

import functools
import hashlib
import os
import pathlib
import shutil
import subprocess

import torch

from fastattn._native import cpu_capability

ROOT = pathlib.Path(__file__).parents[2]
KERNELS = ("gemm_amx", "attention_amx")
OPS = {"gemm_ops": ("gemm",), "attention_ops": ("attention_fwd", "attention_bwd", "attention_infer")}
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-w", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
ISA = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mf16c", "-DCPU_CAPABILITY=amx"]
# only the variant for tiles exists in this library
WRAPPERS = """
#include "capability.h"
namespace fastattn { constexpr bool yes() { return true; } }
#define has_tiles yes
#include "dispatch.h"
#undef FASTATTN_SELECT_CPU
#undef FASTATTN_SELECT_CPU_TILES
#define FASTATTN_SELECT_CPU(name) (static_cast<decltype(&fastattn::name##_default)>(nullptr))
#define FASTATTN_SELECT_CPU_TILES(name, dtype) (fastattn::name##_amx)
"""


def why_not_available():
    """Why the kernels cannot be emulated here, or None."""
    if cpu_capability() not in ("avx512bf16", "amx"):
        return "this processor has no AVX512-BF16"
    return None if shutil.which("g++") else "no g++"


def _compile(folder):
    torch_dir = pathlib.Path(torch.__file__).parent
    includes = [f"-I{ROOT / path}" for path in ("csrc", "csrc/cpu", "tests/support")]
    includes += ["-isystem", f"{torch_dir}/include"]
    commands, objects = [], []
    for name in (*KERNELS, *OPS):
        text = (ROOT / f"csrc/cpu/{name}.cpp").read_text(encoding="utf-8")
        if name in KERNELS:
            text, flags = '#include "emulate_tiles.h"\n' + text, ISA
        else:
            text, flags = WRAPPERS + text.replace("IMPL(fastattn,", "IMPL(fastattn_tiles,"), []
        source, target = folder / f"{name}.cpp", folder / f"{name}.o"
        source.write_text(text, encoding="utf-8")
        commands.append(["g++", *FLAGS, *flags, *includes, "-c", source, "-o", target])
        objects.append(target)
    for running in [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]:
        _, errors = running.communicate()
        assert running.returncode == 0, errors[-6000:]
    library = folder / "tiles.so"
    link = ["g++", "-shared", "-o", library, *objects, f"-L{torch_dir}/lib", "-Wl,--no-as-needed", "-ltorch_cpu"]
    subprocess.run(link, check=True)
    return library


@functools.cache
def load():
    """Compile once per content, load and return the ops: the namespace torch.ops.fastattn_tiles."""
    files = sorted((*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cpu/*"), *ROOT.glob("tests/support/emulate_tiles.*")))
    digest = hashlib.sha256(torch.__version__.encode() + b"".join(map(pathlib.Path.read_bytes, files))).hexdigest()
    library = ROOT / f"build/tiles_{digest[:16]}.so"
    if not library.exists():
        folder = library.with_suffix(f".{os.getpid()}")
        folder.mkdir(parents=True)
        os.replace(_compile(folder), library)
        shutil.rmtree(folder)
    definitions = torch.library.Library("fastattn_tiles", "FRAGMENT")
    for op in (op for ops in OPS.values() for op in ops):
        definitions.define(str(getattr(torch.ops.fastattn, op).native._schema).removeprefix("fastattn::"))
    load.definitions = definitions  # they live as long as the library object
    torch.ops.load_library(library)
    return torch.ops.fastattn_tiles
