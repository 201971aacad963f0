"""Measures the fused products of the feed-forward block on this GPU and rewrites kernels/feed_forward_table.py.

    python scripts/tune_feed_forward.py                                   d_ff = 4 d_model, d_model 512 to 8192
    python scripts/tune_feed_forward.py --sizes 768x3072 --passes fwd
    python scripts/tune_feed_forward.py --dry-run                         print the table instead of writing it

A row is written where the fastest candidate takes at most 98 % of the time of the vendor's product and a pass of ours,
with bias, GELU and dropout 0.1, in bfloat16, which stands for float16 too; otherwise the row of that key is removed.
Clocks should be locked and the GPU be idle.
"""

import argparse
import itertools
import pathlib

TABLE_FILE = pathlib.Path(__file__).resolve().parent.parent / "kernels" / "feed_forward_table.py"
TEXT = '''\
"""Where the feed-forward block runs product and activation in one kernel, rewritten by scripts/tune_feed_forward.py.

{origin}
"""

# (architecture, pass, d_model, d_ff, bytes of an element) -> (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages)
# fmt: off
TABLE = {{
{rows}}}
'''
TOKENS = 16384
MARGIN = 0.98


def candidates(size):
    """Rows worth trying: the sum of a tile fits in registers, the tiles under way in shared memory."""
    for m, n, k, warps, stages in itertools.product((64, 128), (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5)):
        if m * n <= 128 * 32 * warps and (m + n) * k * size * stages <= 200 * 1024:
            yield m, n, k, warps, stages


def tune(table, keys, unfused, fused, report=print):
    """The table with the fastest row of each key where it wins, and without one where it does not.

    Args:
        table: key -> row; not changed.
        unfused: key -> milliseconds of the vendor's product and our pass.
        fused: (key, row) -> milliseconds, or None if the row cannot run.
    """
    best = dict(table)
    for key in keys:
        limit = unfused(key)
        times = {row: fused(key, row) for row in candidates(key[-1])}
        row, time = min(((r, t) for r, t in times.items() if t is not None), key=lambda p: p[1], default=(None, None))
        best.pop(key, None)
        if row is not None and time <= MARGIN * limit:
            best[key] = row
        report(f"{key}: product and pass {limit} ms, fused {row} {time} ms")
    return best


def table_source(table, origin):
    """The text of feed_forward_table.py."""
    return TEXT.format(origin=origin, rows="".join(f"    {key!r}: {table[key]!r},\n" for key in sorted(table)))


class Workload:
    """Times forward or backward of the first product and its pass."""

    def __init__(self, device):
        import torch
        import triton.testing

        import fastattn
        from fastattn.kernels import feed_forward_gemm

        self.torch, self.device, self.table = torch, device, feed_forward_gemm.TABLE
        self.bench = lambda call: triton.testing.do_bench(call, warmup=25, rep=100, return_mode="median")
        self.backend = "native" if fastattn.backends()["cuda"]["native"] == "available" else "triton"
        self.prepared = None, None

    def operands(self, key):
        if self.prepared[0] != key:
            torch, (_, _, d_model, d_ff, _) = self.torch, key
            shapes = ((TOKENS, d_model), (d_ff, d_model), (d_ff,), (TOKENS, d_ff), (d_model, d_ff))
            tensors = [torch.randn(*shape, device=self.device, dtype=torch.bfloat16) for shape in shapes]
            self.prepared = key, (*tensors, (torch.tensor([1, 2], device=self.device), 0.1, 0))
        return self.prepared[1]

    def unfused(self, key):
        x, w1, b1, preact, w2, rest = self.operands(key)
        ops, linear = self.torch.ops.fastattn, self.torch.nn.functional.linear
        if key[1] == "fwd":
            op = getattr(ops.activation_fwd, self.backend)
            return self.bench(lambda: op(linear(x, w1, b1), None, *rest))
        op = getattr(ops.activation_bwd, self.backend)
        return self.bench(lambda: op(x @ w2, preact, None, *rest, True, True, False))

    def fused(self, key, row):
        import triton.compiler
        import triton.runtime.errors

        x, w1, b1, preact, w2, rest = self.operands(key)
        ops = self.torch.ops.fastattn
        self.table[key] = row
        try:
            if key[1] == "fwd":
                return self.bench(lambda: ops.linear_activation_fwd.triton(x, w1, b1, *rest, True))
            return self.bench(lambda: ops.linear_activation_bwd.triton(x, w2, preact, *rest, True, True))
        except (triton.runtime.errors.OutOfResources, triton.compiler.CompilationError, RuntimeError):
            return None  # does not fit this GPU, or does not compile for it


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=[f"{d}x{4 * d}" for d in (512, 1024, 2048, 4096, 8192)])
    parser.add_argument("--passes", nargs="+", choices=("fwd", "bwd"), default=("fwd", "bwd"))
    parser.add_argument("--dry-run", action="store_true", help="print the table, write nothing")
    options = parser.parse_args(arguments)

    import torch

    from fastattn.kernels.attention_config import architecture
    from fastattn.kernels.feed_forward_table import TABLE

    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: there is nothing to measure")
    device = torch.device("cuda")
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes]
    keys = [(architecture(device)[0], way, *size, 2) for way, size in itertools.product(options.passes, sizes)]
    workload = Workload(device)
    table = tune(dict(TABLE), keys, workload.unfused, workload.fused)
    origin = f"Last measured: {torch.cuda.get_device_name(device)}, {len(keys)} keys; without a row: not fused."
    text = table_source(table, origin)
    if options.dry_run:
        print(text)
    else:
        TABLE_FILE.write_text(text)


if __name__ == "__main__":
    main()
