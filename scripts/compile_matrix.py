"""Compiles the Triton kernels ahead of time for every GPU, without a GPU, and prints what each needs as a table.

    python scripts/compile_matrix.py                     every GPU, every call: hours of processor time
    python scripts/compile_matrix.py --sample            every GPU, few calls
    python scripts/compile_matrix.py --gpus sm_90 gfx942 --calls d64 "d128 causal"
    python scripts/compile_matrix.py --resume out.json   keeps what was compiled in a file, and continues from it
    python scripts/compile_matrix.py --resume out.json --done    prints what the file has, and compiles nothing

The calls reach every row of every table. The first ones are compiled for all GPUs before the next ones, so that a run
that was stopped has something of everything. The file of --resume keeps the kernels of each Triton apart; PYTHONPATH
chooses the Triton. A file belongs to one commit: what it has is not compiled again when kernels change. Triton 3.6's
cuobjdump cannot read code for sm_103 and sm_121: TRITON_CUOBJDUMP_PATH names that of a newer Triton.

A kernel fits if it has at most STACK bytes of stack, its shared memory is within the GPU's, and it multiplies matrices
on the units for that. The exit code is 1 if one does not. sm_75 is listed as refused: `fastattn.explain` says why.
AMD's GPUs are compiled only: no call chooses these kernels there.
"""

import argparse
import importlib.metadata
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
FEATURES = {"dropout_p": 0.1, "mask": [2, 1, 1024, 1024]}
FORMS = {  # of attention, the most important first
    "": {}, "causal": {"right": 0}, "packed gqa": {"right": 0, "packed": True, "kv_heads": 2},
    "window": {"left": 200, "right": 0}, "key mask": {"right": 0, "mask": True}, "dropout mask": FEATURES,
    "bias": {"bias": [2, 8, 1024, 1024]}, "alibi": {"right": 0, "alibi": True, "softcap": 30.0, "sink": True},
    "one bias": {"right": 0, "bias": [1, 1, 1024, 1024]}, "fp32": {"dtype": "float32"},
    "fp32 causal": {"dtype": "float32", "right": 0},
    "fp32 features": {"dtype": "float32", **FEATURES, "bias": [1, 1, 1024, 1024]},
}  # fmt: skip
DECODE = {
    "": {}, "16 queries": {"queries": 16}, "pages": {"page_size": 64}, "fp32": {"dtype": "float32"},
    "fp32 16 queries": {"dtype": "float32", "queries": 16},
}  # fmt: skip
CALLS = {  # in the order in which they are compiled
    "norm 1000": ("norm", {"width": 1000, "dropout_p": 0.1}),
    "norm 20000": ("norm", {"width": 20000}),
    **{f"passes {width}": ("passes", {"width": width}) for width in (1024, 200, 5000)},
    **{
        f"d{head_dim} {name}".strip(): ("attention", {"head_dim": head_dim, **arguments})
        for name, arguments in FORMS.items()
        for head_dim in (64, 128, 256, 32)
    },
    **{
        f"decode d{head_dim} {name}".strip(): ("attention_decode", {"head_dim": head_dim, **arguments})
        for name, arguments in DECODE.items()
        for head_dim in (128, 64, 256, 32)
    },
    **{f"norm {width}": ("norm", {"width": width}) for width in (128, 256, 512, 2048, 4096, 8192, 16384)},
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
    for name, (call, arguments) in CALLS.items():
        for arch in (*NVIDIA, *AMD):
            wanted = name in SAMPLE if sample else name in calls or not calls
            if wanted and (not gpus or gpu_name(arch) in gpus):
                small = {"backward": False} if sample and call == "attention" else {}
                yield {"title": f"{gpu_name(arch)} {name}", "arch": arch, "call": call, "arguments": arguments | small}


def judged(case):
    """Yield (cells of the table, whether it fits) for each kernel of a compiled case."""
    limit = {**NVIDIA, **AMD}[case["arch"]]
    if "error" in case:
        yield [case["title"], *[""] * 5, f"does not compile: {case['error']}"], False
        return
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


def read(path):
    """What a file of --resume has: a case for each title, for each version of Triton."""
    return json.loads(path.read_text()) if path and path.exists() else {}


def compile_some(compilations, some, jobs):
    """Compile cases; one that Triton or its assembler refuses has its "error"."""
    try:
        return compilations.run(json.dumps(some), str(jobs), timeout=None)
    except AssertionError as error:  # with what the process wrote last
        if len(some) == 1:
            return [{**some[0], "error": str(error).strip().splitlines()[-1][:200]}]
    return [done for case in some for done in compile_some(compilations, [case], jobs)]


def compiled(wanted, path, jobs):
    """Compile the cases, some at a time; those in the file `path` are taken from it, and new ones added."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import compilations

    kept = read(path)
    have = kept.setdefault(importlib.metadata.version("triton"), {})
    for first in range(0, len(wanted), AT_ONCE):
        missing = [case for case in wanted[first : first + AT_ONCE] if case["title"] not in have]
        if missing:
            have |= {case["title"]: case for case in compile_some(compilations, missing, jobs)}
            if path:
                whole = path.with_name(f"{path.name}.new")
                whole.write_text(json.dumps(kept))
                whole.replace(path)
    return [have[case["title"]] for case in wanted]


def report(cases):
    """Print the table of compiled cases, GPU by GPU; return whether all kernels fit."""
    places = [*NVIDIA, *AMD]
    rows = [row for case in sorted(cases, key=lambda case: places.index(case["arch"])) for row in judged(case)]
    print(table([cells for cells, _ in rows]))
    print(f"\n{len(rows)} kernels of {len(cases)} calls; {sum(not fits for _, fits in rows)} do not fit.")
    return all(fits for _, fits in rows)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", default=(), help="such as sm_90 gfx942")
    parser.add_argument("--calls", nargs="+", default=(), help=", ".join(CALLS))
    parser.add_argument("--sample", action="store_true", help="few calls")
    parser.add_argument("--resume", type=pathlib.Path, help="JSON file with what was compiled")
    parser.add_argument("--done", action="store_true", help="compile nothing: print what the file of --resume has")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default: 2)")
    options = parser.parse_args(arguments)
    unknown = [*({*options.gpus} - {gpu_name(arch) for arch in (*NVIDIA, *AMD)}), *({*options.calls} - {*CALLS})]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    if options.done and not options.resume:
        parser.error("--done needs --resume")
    wanted = list(cases(options.gpus, options.calls, options.sample))
    if not options.done:
        fits = report(compiled(wanted, options.resume, options.jobs))
    else:
        fits = True
        for version, have in read(options.resume).items():
            done = [have[case["title"]] for case in wanted if case["title"] in have]
            print(f"Triton {version}: {len(wanted) - len(done)} of {len(wanted)} calls were not compiled.\n")
            fits = report(done) and fits
    print(f"{REFUSED}: refused, because the kernels need compute capability 8.0 or higher.")
    return int(not fits)


if __name__ == "__main__":
    sys.exit(main())
