"""Measures products of few rows on this CPU and rewrites fastattn/ops/_few_rows_table.py.

    python scripts/tune_few_rows.py --machine "an AMD EPYC (Zen 3)"     on all threads that OMP_NUM_THREADS allows
    python scripts/tune_few_rows.py                                     print the measurements, and leave the table

For each number of rows it compares our kernel with the product that fastattn would use otherwise: with weights from
memory, because a large model reads each weight once per token, and with small ones from the cache. The candidates are
interleaved, and the minimum of each counts. The entry of this instruction set becomes the largest number of rows up to
which our kernel is at least as fast in the geometric mean over the shapes of either kind.
"""

import argparse
import math
import pathlib
import time

TABLE_FILE = pathlib.Path(__file__).resolve().parent.parent / "fastattn" / "ops" / "_few_rows_table.py"
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
SHAPES = {  # bytes of weights between two uses of one, and (d_out, d_in)
    "memory": (2**26, ((768, 768), (2304, 768), (3072, 768), (768, 3072), (512, 512), (2048, 512))),
    "cache": (0, ((64, 64), (128, 128), (512, 128), (128, 512))),
}


def most_rows(ratios):
    """The last number of rows before the first whose ratio is below 1; ratios: {rows: ratio}, ascending."""
    most = 0
    for rows, ratio in ratios.items():
        if ratio < 1:
            break
        most = rows
    return most


def text(old, table, capability, machine):
    """The table file with the entry of one instruction set and the line that says where it was measured.

    Args:
        old: the text of the file.
        table: {capability: rows}, for all of them.
        machine: where the entry of `capability` was measured.
    """
    line = f"{capability}: measured on {machine}."
    kept = [entry for entry in old.splitlines() if not entry.startswith(f"{capability}: ")]
    end, at = kept.index('"""'), next(i for i, entry in enumerate(kept) if entry.startswith("MOST_ROWS = "))
    entries = ", ".join(f'"{name}": {rows}' for name, rows in table.items())
    return "\n".join([*kept[:end], line, *kept[end:at], f"MOST_ROWS = {{{entries}}}", *kept[at + 1 :], ""])


def measure(ours, other, rows, shape, between, rounds):
    """(seconds of ours, seconds of other) for one product; `between`: bytes of weights between two uses of one."""
    import torch

    d_out, d_in = shape
    weights = [torch.randn(d_out, d_in) for _ in range(max(20, between // (4 * d_out * d_in)))]
    x = torch.randn(rows, d_in)
    best = {ours: math.inf, other: math.inf}
    for number in range(rounds):
        for product in (ours, other) if number % 2 else (other, ours):
            for weight in weights:
                start = time.perf_counter()
                product(x, weight)
                best[product] = min(best[product], time.perf_counter() - start)
    return best[ours], best[other]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", help="a description of this machine, with which the table is rewritten")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()

    from fastattn._native import cpu_capability
    from fastattn.ops import _few_rows_table, _gemm

    def ours(x, weight):
        return _gemm._few_rows(x, weight, None, None)

    def other(x, weight):
        return _gemm.linear(x, weight)

    _gemm._most_rows = 0
    ratios = {}
    for rows in ROWS:
        means = []
        for kind, (between, shapes) in SHAPES.items():
            found = []
            for shape in shapes:
                seconds, seconds_other = measure(ours, other, rows, shape, between, options.rounds)
                found.append(seconds_other / seconds)
                rate = 4 * shape[0] * shape[1] / seconds * 1e-9
                print(f"{kind} {rows} x {shape}: {seconds * 1e6:.1f} us, {rate:.1f} GB/s, {found[-1]:.2f} times")
            means.append(math.prod(found) ** (1 / len(found)))
            print(f"{kind} {rows}: {means[-1]:.2f} times", flush=True)
        ratios[rows] = min(means)
    capability = _gemm.key_of_fp32(cpu_capability())
    print(f"{capability}: {most_rows(ratios)}")
    if options.machine:
        table = _few_rows_table.MOST_ROWS | {capability: most_rows(ratios)}
        old = TABLE_FILE.read_text(encoding="utf-8")
        TABLE_FILE.write_text(text(old, table, capability, options.machine), encoding="utf-8")


if __name__ == "__main__":
    main()
