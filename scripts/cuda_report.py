"""Registers, stack, spills, shared memory and instructions of every CUDA kernel, compiled by nvcc without a GPU.

    python scripts/cuda_report.py                               all files for sm_80 and sm_90a, as a table
    python scripts/cuda_report.py --only rotary --archs 90a     one file, one architecture
    python scripts/cuda_report.py --tree ../old --save before.json   the numbers of another checkout
    python scripts/cuda_report.py --against before.json         show what changed since these numbers

It needs nvcc, c++filt and cuobjdump, which Triton's wheel has. A kernel is known by its name and template arguments, so
it may move to another file. The memory that a launch asks for is not in the numbers, and those of kernels with
setmaxnreg are the registers at the launch. All files take 3 to 15 minutes on one core, depending on its load.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import kernel_report

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
import sass  # noqa: E402

from build_environment import find_cuda  # noqa: E402

ONLY_HOPPER = re.compile(r"_sm90$")  # files that are compiled for sm_90a alone, as in setup.py


def output_of(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cuobjdump():
    import triton.backends.nvidia

    return os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "cuobjdump")


def compiled(source, arch, folder):
    """Compile one .cu file to a cubin and return its path."""
    nvcc = find_cuda() / "bin" / "nvcc"
    cubin = os.path.join(folder, f"{source.stem}.{arch}.cubin")
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    output_of(str(nvcc), "-O3", "-std=c++17", "-cubin", target, f"-I{source.parents[1]}", str(source), "-o", cubin)
    return cubin


def title(mangled):
    """The name of a kernel with its template arguments, without namespaces and the types of its parameters."""
    name = output_of("c++filt", mangled).strip().replace("(anonymous namespace)::", "")
    name = re.sub(r"_GLOBAL__N__\w+::|\bfastattn::|\bsm90::|\((?:int|bool)\)", "", name)
    return re.search(r"(\w+_kernel(?:<.*>)?)\(", name)[1]


def resources(cubin):
    """{name: numbers} of the kernels in a cubin, with the names of kernel_report.SHOWN."""
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", output_of(cuobjdump(), "-res-usage", cubin)
    )
    code = sass.kernels(output_of(cuobjdump(), "-sass", cubin))
    found = {}
    for name, registers, stack, shared in usage:
        if "_kernel" not in name:  # the probe of device.cu
            continue
        ops = [re.sub(r"^@!?U?P\w+ ", "", instruction.text).split(".")[0].split()[0] for instruction in code[name]]
        found[title(name)] = {
            "registers": int(registers), "stack": int(stack), "spills": sum(op in ("LDL", "STL") for op in ops),
            "shared": int(shared), "instructions": sum(op != "NOP" for op in ops),
            "products": sum(op in ("HMMA", "HGMMA") for op in ops),
        }  # fmt: skip
    return found


def measured(tree, archs, only):
    """{title: numbers} of the kernels of a checkout."""
    numbers = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((tree / "csrc" / "cuda").glob("*.cu")):
            for arch in archs:
                wanted = not only or any(word in source.stem for word in only)
                if wanted and (arch == "90a" or not ONLY_HOPPER.search(source.stem)):
                    cubin = compiled(source, arch, folder)
                    numbers |= {f"sm_{arch} {name}": values for name, values in resources(cubin).items()}
                    print(f"{source.name} sm_{arch}", file=sys.stderr)
    return numbers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["80", "90a"], help="architectures, such as 80 90a 100a")
    parser.add_argument("--only", nargs="+", default=(), help="files whose name has one of these words")
    parser.add_argument("--save", type=pathlib.Path, help="JSON file to save the numbers in")
    parser.add_argument("--against", type=pathlib.Path, help="JSON file that --save has written")
    parser.add_argument("--tree", type=pathlib.Path, default=ROOT, help="the checkout whose kernels are compiled")
    options = parser.parse_args()
    after = measured(options.tree.resolve(), options.archs, options.only)
    if options.save:
        options.save.write_text(json.dumps(after, indent=1))
    if options.against:
        before = json.loads(options.against.read_text())
        print("\n".join(kernel_report.summary(before, after)) + "\n")
        print(kernel_report.table(kernel_report.changes(before, after)))
    else:
        print(kernel_report.table((name, numbers.values()) for name, numbers in after.items()))


if __name__ == "__main__":
    main()
