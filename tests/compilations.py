"""Which kernels Triton compiles in a sequence of calls, with no GPU and no driver: its own launch code up to there.

Triton keys a binary by dtypes, constants, options and what it sees in an integer: whether it is 1, or a multiple of 16.
A process that used the interpreter cannot do this, so tests run this file in one of its own:

    python tests/compilations.py        prints {scenario: {kernel: number of different binaries}} as JSON
"""

import collections
import functools
import importlib
import json
import os
import subprocess
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class NoDriver:
    """What the launch code asks of a driver before it compiles."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def kernels(name):
    return importlib.import_module(f"fastattn.kernels.{name}")


LENGTHS = (1, 2, 16, 17, 32, 100, 128)


def rotary(positions=False):
    """Prompts of all lengths, and tokens after them one by one."""
    cos = torch.ones(4096, 32)
    calls = [(seqlen, 0) for seqlen in LENGTHS] + [(1, offset) for offset in range(40)]
    for seqlen, offset in calls:
        q, k = torch.ones(2, 8, seqlen, 64), torch.ones(2, 2, seqlen, 64)
        places = torch.arange(seqlen).expand(2, seqlen).contiguous() if positions else None
        kernels("rotary").rotary_fwd(q, k, cos[: 2048 + offset], cos[: 2048 + offset], places, offset, 64, False, False)


def norm(dropout=False):
    for rows in LENGTHS:
        for p in (0.1, 0.5) if dropout else (0.0,):
            x, rng = torch.ones(rows, 256), torch.ones(2, dtype=torch.int64) if dropout else None
            module = kernels("norm")
            _, r, stats = module.norm_fwd(x, x, x[0], x[0], rng, p, 1e-5, False)
            module.norm_bwd(x, None, r, x[0], stats, rng, p, False, dropout, True, True)


def wide_norm():
    for rows in LENGTHS:
        x = torch.ones(rows, 20000)
        _, r, stats = kernels("norm").norm_fwd(x, x, x[0], x[0], None, 0.0, 1e-5, False)
        kernels("norm").norm_bwd(x, None, r, x[0], stats, None, 0.0, False, False, True, True)


def dropout():
    for rows in LENGTHS:
        for p in (0.1, 0.5, 0.25):
            x = torch.ones(rows, 256)
            kernels("dropout").dropout_fwd(x, x, torch.ones(2, dtype=torch.int64), p)


def feed_forward():
    for rows in LENGTHS:
        for p in (0.1, 0.5):
            x, rng = torch.ones(rows, 512), torch.ones(2, dtype=torch.int64)
            kernels("feed_forward").activation_fwd(x, None, rng, p, 0)
            kernels("feed_forward").activation_bwd(x, x, None, rng, p, 0, True, True, False)


def feed_forward_gemm():
    for rows in LENGTHS:
        x, w, rng = torch.ones(rows, 64).half(), torch.ones(256, 64).half(), torch.ones(2, dtype=torch.int64)
        module = kernels("feed_forward_gemm")
        preact, _ = module.linear_activation_fwd(x, w, None, rng, 0.1, 0, True)
        module.linear_activation_bwd(x, w.T.contiguous(), preact, rng, 0.1, 0, True, True)


def cross_entropy():
    for rows in LENGTHS:
        logits, target = torch.ones(rows, 1024), torch.zeros(rows, dtype=torch.int64)
        kernels("cross_entropy").cross_entropy_fwd(logits, target, None, -100, 0.0, 0.0, 0.0, True)


def run_attention(q, k, cu_q=None, cu_k=None, left=-1, right=-1, seqlens=None):
    options = (q.shape[2], k.shape[2], left, right, False, 0.0, 0.0, 0.125)
    rest = (None, seqlens, cu_q, cu_k, None, None, *options)
    out, lse, low = kernels("attention").launch_fwd(q, k, k, None, None, *rest, False)
    kernels("attention_bwd").launch_bwd(out, None, q, k, k, out, lse, low, None, None, *rest, False, False)


def attention():
    for batch in (1, 3, 16):
        for seqlen in LENGTHS:
            q, k = (torch.ones(batch, seqlen, heads, 64).half().transpose(1, 2) for heads in (8, 2))
            run_attention(q, k)


def attention_window():
    for seqlen in LENGTHS[2:]:
        for left, right in ((1, 0), (5, 0), (7, 2)):
            run_attention(*[torch.ones(2, seqlen, 8, 64).half().transpose(1, 2)] * 2, left=left, right=right)


def attention_packed():
    for count in (1, 2, 16, 17):
        for length in LENGTHS:
            ends = torch.arange(count + 1).int() * length
            q = torch.ones(1, count * length + 3, 8, 64).half().transpose(1, 2)
            run_attention(q, q, ends, ends, right=0)


def attention_decode():
    for batch in (1, 2, 16):
        for capacity in (512, 1000):
            for seqlen in (1, 2, 5):
                q, new = torch.ones(batch, 8, seqlen, 64).half(), torch.ones(batch, 2, seqlen, 64).half()
                cache = torch.ones(batch, capacity, 2, 64).half().transpose(1, 2)
                lengths = torch.ones(batch).int()
                module = kernels("attention_decode")
                module.launch_append(cache, cache, new, new, lengths, None, None)
                module.launch_fwd(q, cache, cache, lengths, None, None, None, None, None, seqlen, -1, 0, 0.0, 0.1, 2)


SCENARIOS = {
    "rotary": rotary,
    "rotary with positions": functools.partial(rotary, positions=True),
    "norm": norm,
    "norm with dropout": functools.partial(norm, dropout=True),
    "wide norm": wide_norm,
    "dropout": dropout,
    "feed_forward": feed_forward,
    "feed_forward_gemm": feed_forward_gemm,
    "cross_entropy": cross_entropy,
    "attention": attention,
    "attention window": attention_window,
    "attention packed": attention_packed,
    "attention_decode": attention_decode,
}


def main():
    import triton

    import fastattn  # noqa: F401
    from fastattn.kernels import attention_config, feed_forward_gemm

    triton.runtime.driver.set_active(NoDriver())
    for module in (attention_config, feed_forward_gemm):
        module.architecture = lambda device: (90, True)
    binaries = collections.defaultdict(set)

    def compile_nothing(*, key, fn, compile, **_):
        assert compile["enable_fp_fusion"], fn.name
        binaries[fn.name].add(str(key))
        return True

    triton.knobs.runtime.jit_cache_hook = compile_nothing
    found = {}
    for name, scenario in SCENARIOS.items():
        binaries.clear()
        scenario()
        found[name] = {kernel: len(keys) for kernel, keys in binaries.items()}
    print(json.dumps(found))


def count():
    """The numbers of all scenarios, from a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:triton", os.path.abspath(__file__)], env=environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
