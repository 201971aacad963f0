"""Compiles the Triton kernels ahead of time for every GPU, without a GPU, and prints what each needs as a table.

    python scripts/compile_matrix.py                     every GPU, every call: hours of processor time
    python scripts/compile_matrix.py --sample            every GPU, few calls
    python scripts/compile_matrix.py --gpus sm_90 gfx942 --calls d64 "d128 causal"
    python scripts/compile_matrix.py --resume out.json   keeps what was compiled in a file, and continues from it
    python scripts/compile_matrix.py --resume out.json --done    prints what the file has, and compiles nothing

A kernel fits if it has at most STACK bytes of stack, its shared memory is within the GPU's, and it multiplies matrices
on the units for that. The exit code is 1 if one does not. sm_75 is listed as refused: `fastattn.explain` says why.
AMD's GPUs are compiled only: no call chooses these kernels there.
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
# shared memory of a block in bytes
NVIDIA = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376, 121: 101_376}
AMD = dict.fromkeys(("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"), 65_536)
REFUSED = "sm_75"
STACK = 64
AT_ONCE = 10  # calls per process, which takes some seconds to start
ATTENTION = {
    f"d{head_dim} {name}".strip(): {"head_dim": head_dim, **arguments}
    for head_dim in (32, 64, 128, 256)
    for name, arguments in {
        "": {}, "causal": {"right": 0}, "window": {"left": 200, "right": 0},
        "key mask": {"right": 0, "mask": True}, "dropout mask": {"dropout_p": 0.1, "mask": [2, 1, 1024, 1024]},
        "bias": {"bias": [2, 8, 1024, 1024]}, "packed gqa": {"right": 0, "packed": True, "kv_heads": 2},
        "fp32": {"dtype": "float32"},
    }.items()
}  # fmt: skip
CALLS = {
    **{name: ("attention", arguments) for name, arguments in ATTENTION.items()},
    "decode d128": ("attention_decode", {"head_dim": 128}),
    "decode d64 pages": ("attention_decode", {"head_dim": 64, "page_size": 64}),
    "norm 1000": ("norm", {"width": 1000, "dropout_p": 0.1}),
    "norm 20000": ("norm", {"width": 20000}),
    "passes 1024": ("passes", {"width": 1024}),
}
SAMPLE = ("d64 causal", "norm 1000")  # of the attention only the forward
EXACT = (
    "attention_preprocess",
    "combine",
    "append",
    "key_runs",
    "norm",
    "add_up",
    "activation",
    "dropout",
    "rotary",
    "cross_entropy",
)


def gpu_name(arch):
    return arch if isinstance(arch, str) else f"sm_{arch}"


def cases(gpus, calls, sample):
    """The cases of tests/support/compilations.py, each with its title."""
    for arch in (*NVIDIA, *AMD):
        for name, (call, arguments) in CALLS.items():
            wanted = name in SAMPLE if sample else name in calls or not calls
            if wanted and (not gpus or gpu_name(arch) in gpus):
                small = {"backward": False} if sample and call == "attention" else {}
                yield {"title": f"{gpu_name(arch)} {name}", "arch": arch, "call": call, "arguments": arguments | small}


def judged(case):
    """Yield (cells of the table, whether it fits) for each kernel of a compiled case."""
    limit = {**NVIDIA, **AMD}[case["arch"]]
    for kernel in case["compiled"]:
        name = kernel["kernel"].removesuffix("_kernel")
        products = kernel.get("products", 0) + sum(kernel.get(op, 0) for op in ("HMMA", "HGMMA", "UTCHMMA"))
        exact = name.startswith(EXACT) or name.endswith(EXACT) or case["arguments"].get("dtype") == "float32"
        faults = [fault for fault, is_there in (
            ("stack", kernel["stack"] > STACK), ("shared memory", kernel["shared"] > limit),
            ("no matrix products", not exact and not products),
        ) if is_there]  # fmt: skip
        numbers = [kernel["registers"], kernel["stack"], kernel["shared"], products]
        yield [case["title"], name, *map(str, numbers), ", ".join(faults) or "fits"], not faults


def table(rows):
    head = ["GPU and call", "kernel", "registers", "stack", "shared", "products", ""]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def compiled(wanted, path):
    """Compile the cases, some at a time; those in the file `path` are taken from it, and new ones added."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import compilations

    have = json.loads(path.read_text()) if path and path.exists() else {}
    for first in range(0, len(wanted), AT_ONCE):
        missing = [case for case in wanted[first : first + AT_ONCE] if case["title"] not in have]
        if missing:
            done = compilations.run(json.dumps(missing), timeout=None)
            have |= {case["title"]: case for case in done}
            if path:
                path.write_text(json.dumps(have))
    return [have[case["title"]] for case in wanted]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", default=(), help="such as sm_90 gfx942")
    parser.add_argument("--calls", nargs="+", default=(), help=", ".join(CALLS))
    parser.add_argument("--sample", action="store_true", help="few calls")
    parser.add_argument("--resume", type=pathlib.Path, help="JSON file with what was compiled")
    parser.add_argument("--done", action="store_true", help="compile nothing: print what the file of --resume has")
    options = parser.parse_args(arguments)
    unknown = [*({*options.gpus} - {gpu_name(arch) for arch in (*NVIDIA, *AMD)}), *({*options.calls} - {*CALLS})]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    if options.done and not options.resume:
        parser.error("--done needs --resume")
    wanted = list(cases(options.gpus, options.calls, options.sample))
    if options.done:
        have = json.loads(options.resume.read_text())
        done = [case for case in wanted if case["title"] in have]
        print(f"{len(wanted) - len(done)} of {len(wanted)} calls were not compiled.\n")
        wanted = done
    rows = [row for case in compiled(wanted, options.resume) for row in judged(case)]
    print(table([cells for cells, _ in rows]))
    print(f"\n{REFUSED}: refused, because the kernels need compute capability 8.0 or higher.")
    print(f"{len(rows)} kernels of {len(wanted)} calls; {sum(not fits for _, fits in rows)} do not fit.")
    return int(not all(fits for _, fits in rows))


if __name__ == "__main__":
    sys.exit(main())
