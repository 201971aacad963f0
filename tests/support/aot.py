"""Ahead-of-time compilation of Triton kernels, with no GPU, no driver and no torch.

A process that used Triton's interpreter cannot compile, so tests run this file in one of its own:

    python tests/support/aot.py '[{"kernel": "norm_fwd_kernel", ...}, ...]'

The argument is a JSON list of configurations; the answer is one.

A configuration: module, kernel, arch, num_warps, num_stages (may be left out), types (name -> "*fp16", "i32", "fp32", a
list for a tuple), constants (name -> value, None for an absent pointer). Pointers and integers count as divisible by
16, as for usual sizes, where the kernel specialises on them; without that loads are not vectorised.
"""

import collections
import concurrent.futures
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# global and shared accesses, spills, asynchronous copies, matrix products by generation
_COUNTED = ("LDG", "STG", "LDS", "STS", "LDL", "STL", "LDGSTS", "UTMALDG", "HMMA", "HGMMA", "UTCHMMA")


def resources(cubin):
    """Registers, stack bytes and counts of memory instructions by width, read from the machine code."""
    from triton import knobs

    cuobjdump = knobs.nvidia.cuobjdump.path  # TRITON_CUOBJDUMP_PATH names a newer one, if Triton's own is too old
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    code = [match.group(1) for match in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][\w.]*)", text)]
    counts = collections.Counter(
        ".".join([op.split(".")[0], *(part for part in op.split(".") if part in ("64", "128", "U8", "U16"))])
        for op in code
        if op.split(".")[0] in _COUNTED
    )
    return {"registers": int(registers), "stack": int(stack), "instructions": len(code), **counts}


def amd_resources(text):
    """The same of AMD's assembly: vector registers, scratch bytes and matrix products."""

    def number(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    code = re.findall(r"^\s+([sv]_\w+|ds_\w+|global_\w+|buffer_\w+)", text, re.M)
    products = sum(op.startswith(("v_mfma", "v_wmma")) for op in code)
    return {"registers": number("vgpr_count"), "stack": number("private_segment_fixed_size"),
            "instructions": len(code), "products": products}  # fmt: skip


def compile_one(config):
    """Compile a configuration and return it with its resources."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(config["module"]), config["kernel"])
    names, defaults = kernel.arg_names, kernel.signature.parameters
    constants = {n: defaults[n].default for n in names if defaults[n].default is not defaults[n].empty}
    constants |= config["constants"]
    types = {name: tuple(t) if isinstance(t, list) else t for name, t in config["types"].items()}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    places = [
        ((i, j), t)
        for i, n in enumerate(names)
        if n in types and n not in constants and isinstance(types[n], tuple)
        for j, t in enumerate(types[n])
    ]
    places += [((i,), signature[n]) for i, n in enumerate(names) if isinstance(signature[n], str)]
    divisible = {
        place: [["tt.divisibility", 16]]
        for place, t in places
        if t[0] in "*i" and not kernel.params[place[0]].do_not_specialize
    }
    constants = {tuple(map(int, name.split("."))) if name[0].isdigit() else name: v for name, v in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    options = {name: config[name] for name in ("num_warps", "num_stages") if name in config}
    compiled = triton.compile(source, target=GPUTarget("cuda", config["arch"], 32), options=options)
    return {**config, "shared": compiled.metadata.shared, **resources(compiled.asm["cubin"])}


def compile_all(configs, timeout=300):
    """Compile in a process that never used the interpreter and return the results of the configurations."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, os.path.abspath(__file__)]
    done = subprocess.run(
        command, input=json.dumps(configs), env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        print(json.dumps(list(pool.map(compile_one, json.load(sys.stdin)))))
