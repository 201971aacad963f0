"""Measures the fp32 products of linear layers on this CPU and rewrites fastattn/ops/_products_table.py.

    python scripts/tune_products.py --machine "an Intel Xeon"     on all threads that OMP_NUM_THREADS allows
    python scripts/tune_products.py                               print the measurements, and leave the table

For each product and number of rows it compares our kernel with torch's product (MKL) and with oneDNN, interleaved, by
the minimum of each. The entry of a product becomes the largest number of rows up to which ours is at least as fast as
torch's in the geometric mean over the shapes. y of few rows is left out, because `_few_rows_table.py` decides on it.
oneDNN is only printed: it has been the fastest nowhere where MKL uses AVX-512, and a new shape costs it 0.7 ms.
"""

import argparse
import math
import pathlib
import pprint
import time

TABLE_FILE = pathlib.Path(__file__).resolve().parent.parent / "fastattn" / "ops" / "_products_table.py"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 768)
SHAPES = ((128, 128), (512, 128), (128, 512), (256, 256), (512, 512), (1536, 512), (2048, 512), (512, 2048))
ANY = 2**40  # more rows than a tensor can have


def most_rows(ratios):
    """The last number of rows before the first whose ratio is below 1, or ANY; ratios: {rows: ratio}, ascending."""
    most = 0
    for rows, ratio in ratios.items():
        if ratio < 1:
            return most
        most = rows
    return ANY


def text(old, table, key, machine):
    """The table file with the entry of one key and the line that says where it was measured."""
    line = f"{key}: measured on {machine}."
    start = old.index("OURS_UP_TO")
    kept = [entry for entry in old[:start].splitlines() if not entry.startswith(f"{key}: ")]
    end = kept.index('"""')
    body = pprint.pformat(table, width=110, sort_dicts=True).replace("'", '"')
    return "\n".join([*kept[:end], line, '"""', "", f"OURS_UP_TO: dict[str, dict[str, int]] = {body}", ""])


def minima(products, rounds):
    """The seconds of each product: the minimum of interleaved rounds."""
    best = [math.inf] * len(products)
    for product in products:
        product()
    for _ in range(rounds):
        for i, product in enumerate(products):
            start = time.perf_counter()
            product()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def candidates(rows, d_out, d_in):
    """{product: (ours, torch's, oneDNN's)} as functions without arguments."""
    import torch
    import torch.nn.functional as F

    from fastattn.ops._gemm import _product

    x, w, dy = torch.randn(rows, d_in), torch.randn(d_out, d_in), torch.randn(rows, d_out)

    def onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    return {
        "y": (lambda: _product(x, w, None, False, True), lambda: F.linear(x, w), lambda: onednn(x, w)),
        "dx": (lambda: _product(dy, w, None, False, False), lambda: dy @ w, lambda: onednn(dy, w.t())),
        "dw": (lambda: _product(dy, x, None, True, False), lambda: dy.t() @ x, lambda: onednn(dy.t(), x.t())),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", help="a description of this machine, with which the table is rewritten")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    options = parser.parse_args()

    from fastattn._native import cpu_capability
    from fastattn.commands._memory import keep_freed_memory
    from fastattn.ops import _products_table
    from fastattn.ops._gemm import few_rows, products_key

    keep_freed_memory()  # into kept memory, so that page faults of the output are not measured
    ratios = {"y": {}, "dx": {}, "dw": {}}
    for rows in options.rows:
        logs = {name: [] for name in ratios}
        for d_out, d_in in SHAPES:
            for name, products in candidates(rows, d_out, d_in).items():
                if name == "y" and rows <= few_rows():
                    continue
                ours, library, onednn = minima(products, options.rounds)
                logs[name].append(math.log(library / ours))
                rates = " ".join(f"{2e-9 * rows * d_out * d_in / s:.0f}" for s in (ours, library, onednn))
                print(f"{name} {rows} x {d_out} x {d_in}: GFLOP/s of ours, torch, oneDNN: {rates}", flush=True)
        for name, values in logs.items():
            if not values:
                continue
            ratios[name][rows] = math.exp(sum(values) / len(values))
            print(f"{name} {rows}: ours is {ratios[name][rows]:.2f} times as fast as torch", flush=True)
    key = products_key(cpu_capability())
    entry = {name: most_rows(found) for name, found in ratios.items()}
    print(f"{key}: {entry}")
    if options.machine:
        old = TABLE_FILE.read_text(encoding="utf-8")
        TABLE_FILE.write_text(text(old, _products_table.OURS_UP_TO | {key: entry}, key, options.machine), "utf-8")


if __name__ == "__main__":
    main()
