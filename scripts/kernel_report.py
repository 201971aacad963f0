"""Registers, stack, shared memory and instructions of every Triton kernel, compiled ahead of time without a GPU.

    python scripts/kernel_report.py                         all cases, as a table
    python scripts/kernel_report.py --only attention sm_90  the cases whose title has one of these words
    python scripts/kernel_report.py --save before.json      save the numbers before a change
    python scripts/kernel_report.py --against before.json   show what the change did to them
    python scripts/kernel_report.py --tree ../old --save before.json   the numbers of another checkout

The cases are calls: the launchers run on CPU tensors in place of GPU tensors, and the kernels are compiled with the
options, constants and integer properties that the launchers pass. Fewer instructions are not always faster; more
registers, stack or shared memory always cost something.
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
ATTENTION = {
    "d64": {"head_dim": 64},
    "d128 causal": {"head_dim": 128, "right": 0},
    "d128 causal packed gqa": {"head_dim": 128, "right": 0, "packed": True, "kv_heads": 2},
    "d128 window": {"head_dim": 128, "left": 200, "right": 0},
    "d256 causal": {"head_dim": 256, "right": 0},
    "d64 key mask": {"head_dim": 64, "mask": True},
    "d128 key mask": {"head_dim": 128, "mask": True},
    "d128 causal key mask": {"head_dim": 128, "right": 0, "mask": True},
    "d64 dropout mask": {"head_dim": 64, "dropout_p": 0.1, "mask": [2, 1, 1024, 1024]},
    "d64 bias": {"head_dim": 64, "bias": [2, 8, 1024, 1024]},
    "d64 bias of all heads": {"head_dim": 64, "bias": [1, 1, 1024, 1024]},
    **{
        f"d{head_dim} alibi{name}": {"head_dim": head_dim, "alibi": True, **arguments}
        for head_dim in (64, 128)
        for name, arguments in {
            "": {},
            " causal": {"right": 0},
            " softcap sink": {"right": 0, "softcap": 30.0, "sink": True},
            " packed gqa": {"right": 0, "packed": True, "kv_heads": 2},
        }.items()
    },
    "d40 odd sizes": {"head_dim": 40, "heads": 5, "kv_heads": 5, "seqlen": 1001},
    "d64 fp32 causal": {"head_dim": 64, "right": 0, "dtype": "float32"},
}
DECODE = {
    "d128": {"head_dim": 128},
    "d128 one split": {"head_dim": 128, "num_splits": 1},
    "d128 pages": {"head_dim": 128, "page_size": 64},
    "d64 window alibi softcap sink": {"head_dim": 64, "left": 99, "alibi": True, "softcap": 30.0, "sink": True},
    "d64 32 queries": {"head_dim": 64, "queries": 32},
    "d64 fp32": {"head_dim": 64, "dtype": "float32"},
}
NORM = {
    "512": {"width": 512},
    "4096 dropout": {"width": 4096, "dropout_p": 0.1},
    "1000 dropout": {"width": 1000, "dropout_p": 0.1},
    "2048 rms": {"width": 2048, "rms": True},
    "20000": {"width": 20000},
}
PASSES = {"1024": {"width": 1024}, "1000": {"width": 1000}}
CALLS = {"attention": ATTENTION, "attention_decode": DECODE, "norm": NORM, "passes": PASSES}
ARCHS = {"attention": (80, 90, 100, 120), "attention_decode": (80, 90), "norm": (80, 90), "passes": (80, 90)}
SPARSE = {120: ("d64", "d128 causal")}  # the only cases for an architecture that shares the table rows of another
SHOWN = ("registers", "stack", "spills", "shared", "instructions", "products")


def cases(only):
    for call, forms in CALLS.items():
        for arch in ARCHS[call]:
            for name, arguments in forms.items():
                title = f"{call} sm_{arch} {name}"
                if name in SPARSE.get(arch, forms) and (not only or any(word in title for word in only)):
                    yield {"title": title, "arch": arch, "call": call, "arguments": arguments}


def measured(case):
    """Yield (title, numbers) for each kernel that the case launches."""
    seen = {}
    for kernel in case["compiled"]:
        name = kernel["kernel"].removesuffix("_kernel")
        seen[name] = seen.get(name, 0) + 1
        title = f"{case['title']}: {name}" + (f" {seen[name]}" if seen[name] > 1 else "")
        kernel["spills"] = sum(count for op, count in kernel.items() if op.split(".")[0] in ("LDL", "STL"))
        kernel["products"] = sum(kernel.get(op, 0) for op in ("HMMA", "HGMMA", "UTCHMMA"))
        yield title, {name: kernel[name] for name in SHOWN}


def changes(before, after):
    """The table rows of the kernels in both reports; a changed number is shown as before → after."""
    for title in before.keys() & after.keys():
        pairs = [(before[title][name], after[title][name]) for name in SHOWN]
        yield title, [str(new) if old == new else f"{old} → {new}" for old, new in pairs]


def table(rows):
    lines = [f"| kernel | {' | '.join(SHOWN)} |", "|---" * (len(SHOWN) + 1) + "|"]
    return "\n".join(lines + [f"| {title} | {' | '.join(map(str, cells))} |" for title, cells in sorted(rows)])


def summary(before, after):
    """One line per number: its sums before and after, and the number of kernels in which it grew or shrank."""
    common = before.keys() & after.keys()
    for name in SHOWN:
        pairs = [(before[title][name], after[title][name]) for title in common]
        grew, shrank = (sum(sign * (new - old) > 0 for old, new in pairs) for sign in (1, -1))
        total = " → ".join(str(sum(column)) for column in zip(*pairs, strict=True))
        yield f"{name}: {total}, more in {grew}, less in {shrank} of {len(common)} kernels"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=(), help="cases whose title has one of these words")
    parser.add_argument("--save", type=pathlib.Path, help="JSON file to save the numbers in")
    parser.add_argument("--against", type=pathlib.Path, help="JSON file that --save has written")
    parser.add_argument("--tree", type=pathlib.Path, default=ROOT, help="the checkout whose kernels are compiled")
    options = parser.parse_args(arguments)

    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import compilations

    results = compilations.run(json.dumps(list(cases(options.only))), timeout=None, tree=options.tree.resolve())
    after = {title: numbers for case in results for title, numbers in measured(case)}
    if options.save:
        options.save.write_text(json.dumps(after, indent=1))
    if options.against:
        before = json.loads(options.against.read_text())
        print("\n".join(summary(before, after)) + "\n")
        print(table(changes(before, after)))
    else:
        print(table((title, numbers.values()) for title, numbers in after.items()))


if __name__ == "__main__":
    main()
