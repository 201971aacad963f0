"""Measures configurations of the Triton attention kernels on this GPU and rewrites kernels/attention_table.py.

    python scripts/tune_attention.py                                      bfloat16, all kernels and head dims
    python scripts/tune_attention.py --kernels fwd dq --head-dims 64 128 --dtypes bfloat16 float32
    python scripts/tune_attention.py --resume times.json                  keeps times in a file, and continues from it
    python scripts/tune_attention.py --dry-run                            print the table instead of writing it

A row is replaced if a candidate is at least 2 % faster. A backward kernel is timed within the whole backward, whose
other kernels keep their configurations. Lock the clocks, and keep the GPU otherwise idle.

An interrupted run with --resume can be repeated. If the GPU computes nothing any more after a candidate, the run ends.
The candidate is noted, and the next run skips it. It also skips a candidate during which two runs ended.
"""

import argparse
import itertools
import json
import pathlib

TABLE_FILE = pathlib.Path(__file__).resolve().parent.parent / "kernels" / "attention_table.py"
TEXT = '''"""Launch parameters of the attention kernels. scripts/tune_attention.py rewrites this file.

{origin}
"""

from fastattn.kernels.common import Launch, Variants

# (architecture, kernel, bytes per element, head_dim): Variants(full, causal, extra, alibi)
TABLE = {{
{rows}}}
'''
TOKENS, SEQLEN, WIDTH = 16384, 4096, 2048  # the workload: batch * seqlen, seqlen, heads * head_dim
MARGIN = 0.98


def candidates(kernel, size, head_dim):
    """The launches to try: tiles whose scores and accumulators may fit in registers."""
    from fastattn.kernels.common import Launch

    for block_m, block_n, warps, stages in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)):
        threads = 32 * warps
        owned = block_n if kernel in ("dkdv", "dk", "dv") else block_m
        accumulators = owned * head_dim * (2 if kernel == "dkdv" else 1) if kernel != "dbias" else block_m * block_n
        held = (accumulators + block_m * block_n * (1 if kernel == "fwd" else 2)) / threads
        moving = size * (block_m + block_n - owned) * head_dim * 2 * stages + size * owned * head_dim
        if 16 <= held <= 224 and moving <= 227 * 1024:
            yield Launch(block_m, block_n, warps, stages)


def tune(table, keys, variants, measure, report=print):
    """The table with the fastest Launch for each key and variant.

    Args:
        table: (arch, kernel, element size, head_dim) -> Variants; not changed.
        keys: the keys to measure; variants: the names of the variants to measure.
        measure: (table, key, variant) -> milliseconds of that Launch, or None if it cannot run.
    """
    best = dict(table)
    for key in keys:
        _, kernel, size, head_dim = key
        for variant in variants:
            current = getattr(best[key], variant) or best[key].extra
            if current is None or is_split(table, key, variant):
                continue

            def with_row(row, table=best, key=key, variant=variant):
                return table | {key: table[key]._replace(**{variant: row})}

            limit = measure(best, key, variant)
            chosen, time = current, limit
            for row in candidates(kernel, size, head_dim):
                if row == current:
                    continue
                found = measure(with_row(row), key, variant)
                if found is not None and (time is None or found < time):
                    chosen, time = row, found
            if limit is None or (time is not None and time < MARGIN * limit):
                best = with_row(chosen)
            new = getattr(best[key], variant) or current
            report(f"{key} {variant}: {written(current)} {limit} ms -> {written(new)} {time} ms")
    return best


def is_split(table, key, variant):
    """Whether a key is that of dk and dv in one launch, and these calls have a launch for each."""
    arch, kernel, size, head_dim = key
    row = table.get((arch, "dk", size, head_dim))
    return kernel == "dkdv" and row is not None and getattr(row, variant) is not None


class Kept:
    """The times of a `measure` of `tune`, in a JSON file from which the next run takes them."""

    STARTED, TWICE = "started", "started twice"

    def __init__(self, measure, path, gpu):
        self.measure, self.path, self.gpu = measure, path, gpu
        self.times = json.loads(path.read_text()) if path and path.exists() else {}

    def note(self, name, time):
        self.times[name] = time
        if self.path:
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(self.times, indent=0))
            new.replace(self.path)

    def __call__(self, table, key, variant):
        arch, kernel, size, head_dim = key
        kernels = ("fwd",) if kernel == "fwd" else ("dkdv", "dk", "dv", "dq", "dbias")  # timed together
        rows = ((name, table.get((arch, name, size, head_dim))) for name in kernels)
        found = ((name, getattr(row, variant) or row.extra) for name, row in rows if row)
        launches = (f"{name} {written(launch)}" for name, launch in found if launch)
        name = f"{self.gpu}, {size} bytes, head dim {head_dim}, {variant}: {', '.join(launches)}"
        known = self.times.get(name, "")
        if known == self.TWICE:
            return None
        if known in ("", self.STARTED):
            self.note(name, self.TWICE if known else self.STARTED)
            try:
                time = self.measure(table, key, variant)
            except KeyboardInterrupt:
                self.note(name, known)
                raise
            except SystemExit:
                self.note(name, None)
                raise
            self.note(name, time)
        return self.times[name]


def written(launch):
    """A Launch as the table has it: without the limit of registers if there is none."""
    return f"Launch{tuple(value for value in launch if value is not None)!r}"


def table_source(table, origin):
    """The text of attention_table.py."""
    rows = ""
    for key in sorted(table):
        launches = [written(launch) for launch in table[key] if launch is not None]
        arch, kernel, size, head_dim = key
        row = f'    ({arch}, "{kernel}", {size}, {head_dim}): Variants({", ".join(launches)}),\n'
        if len(row) > 121:
            row = f'    ({arch}, "{kernel}", {size}, {head_dim}): Variants(\n        {", ".join(launches)}\n    ),\n'
        rows += row
    return TEXT.format(origin=origin, rows=rows)


class Workload:
    """Times forward or backward of one kind of call under a given table."""

    def __init__(self, device):
        import torch
        import triton.testing

        from fastattn.kernels import attention_call, attention_config

        self.torch, self.bench, self.device = torch, triton.testing.do_bench, device
        self.table = attention_config.TABLE
        self.caches = attention_call.plan_for, attention_config.pick
        self.inputs = None, None

    def prepare(self, key, variant):
        _, _, size, head_dim = key
        torch, dtype = self.torch, {2: self.torch.bfloat16, 4: self.torch.float32}[size]
        batch, heads = TOKENS // SEQLEN, WIDTH // head_dim
        q, k, v, do = (
            torch.randn(batch, SEQLEN, heads, head_dim, device=self.device, dtype=dtype).transpose(1, 2)
            for _ in range(4)
        )
        right = -1 if variant == "full" else 0
        bias = rng = slopes = None
        p = 0.0
        if variant == "extra":
            rng, p = torch.tensor([1, 2], device=self.device), 0.1
            bias = torch.randn(1, heads, SEQLEN, SEQLEN, device=self.device, dtype=dtype) if key[1] == "dbias" else None
        if variant == "alibi":
            slopes = torch.ones(heads, device=self.device)
        scale = head_dim**-0.5
        rest = (bias, None, None, None, None, None, slopes, rng, SEQLEN, SEQLEN, -1, right, False, 0.0, p, scale)
        need_low = dtype == torch.float32 or bias is not None or slopes is not None
        saved = torch.ops.fastattn.attention_fwd.triton(q, k, v, *rest, need_low)
        return (q, k, v, *rest, need_low), (do, None, q, k, v, *saved, *rest, bias is not None, False)

    def measure(self, table, key, variant):
        import triton.compiler
        import triton.runtime.errors

        if self.inputs[0] != (key, variant):
            self.inputs = (key, variant), self.prepare(key, variant)
        self.table.update(table)
        for cache in self.caches:
            cache.cache_clear()
        forward, backward = self.inputs[1]
        ops = self.torch.ops.fastattn
        if key[1] == "fwd":
            call = lambda: ops.attention_fwd.triton(*forward)  # noqa: E731
        else:
            call = lambda: ops.attention_bwd.triton(*backward)  # noqa: E731
        try:
            return self.bench(call, warmup=25, rep=100, return_mode="median")
        except (triton.runtime.errors.OutOfResources, triton.compiler.CompilationError, RuntimeError) as error:
            self.refuse_if_lost(error)
            return None  # does not fit this GPU, or does not compile for it

    def refuse_if_lost(self, error):
        """End the process if the GPU computes nothing any more, as after an illegal access."""
        try:
            self.torch.ones(1, device=self.device).item()
        except RuntimeError:
            raise SystemExit(f"tune_attention: the GPU is lost after an error: {error}; run this again") from error


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=("fwd", "dkdv", "dq", "dbias"), default=("fwd", "dkdv", "dq"))
    parser.add_argument("--head-dims", nargs="+", type=int, choices=(32, 64, 128, 256), default=(64, 128))
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=("bfloat16",))
    kinds = ("full", "causal", "extra", "alibi")
    parser.add_argument("--variants", nargs="+", choices=kinds, default=kinds[:2])
    parser.add_argument("--resume", type=pathlib.Path, help="JSON file with the times that were measured")
    parser.add_argument("--dry-run", action="store_true", help="print the table instead of writing it")
    options = parser.parse_args(arguments)

    import torch

    from fastattn.kernels import attention_config as config

    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device to measure on")
    device = torch.device("cuda")
    arch, _ = config.architecture(device)
    sizes = [{"bfloat16": 2, "float32": 4}[name] for name in options.dtypes]
    keys = [
        config.table_key(arch, kernel, size, head_dim)
        for kernel, size, head_dim in itertools.product(options.kernels, sizes, options.head_dims)
    ]
    keys += [(at, name, *rest) for at, kernel, *rest in keys if kernel == "dkdv" for name in ("dk", "dv")]
    keys = [key for key in keys if key in config.TABLE]
    measure = Kept(Workload(device).measure, options.resume, torch.cuda.get_device_name(device))
    table = tune(dict(config.TABLE), keys, options.variants, measure)
    origin = (
        f"Last measured: {torch.cuda.get_device_name(device)}, {len(keys)} rows; the others compile without spills."
    )
    text = table_source(table, origin)
    if options.dry_run:
        print(text)
    else:
        TABLE_FILE.write_text(text)


if __name__ == "__main__":
    main()
