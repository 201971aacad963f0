"""What Triton compiles when the launchers are called, with no GPU and no driver, up to the launch itself.

Triton keys a binary by dtypes, constants, options and what it sees in an integer: whether it is 1, or a multiple of 16.
A process that used the interpreter cannot compile, so tests run this file in a separate one:

    python tests/support/compilations.py
                            prints {scenario: {kernel: number of different binaries}} as JSON, without compiling
    python tests/support/compilations.py '[{"arch": 90, "call": "norm_bwd", "arguments": {...}}, ...]'
                            compiles what these calls launch and prints the resources of each kernel, with two
                            processes, or as many as a second argument says
"""

import collections
import concurrent.futures
import functools
import importlib
import json
import os
import pkgutil
import subprocess
import sys

import aot
import torch
import ttgir

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class NoDriver:
    """The functions of a driver that the launch code calls before it compiles. The "device" is its architecture: 90 for
    sm_90, or the name of an AMD GPU such as gfx942."""

    arch = 90

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        if isinstance(self.arch, str):
            return GPUTarget("hip", self.arch, 64 if self.arch.startswith("gfx9") else 32)
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0


def pretend(arch):
    """Make the launchers treat CPU tensors as those of a GPU of this architecture."""
    import triton

    import fastattn  # noqa: F401

    for module in pkgutil.iter_modules(importlib.import_module("fastattn.kernels").__path__):
        kernels(module.name)  # registers its ops
    NoDriver.arch = arch
    triton.runtime.driver.set_active(NoDriver())
    torch.version.hip = "6.4" if isinstance(arch, str) else None
    torch.cuda.get_device_capability = lambda device: (9, 4) if isinstance(arch, str) else divmod(arch, 10)
    config = kernels("attention_config")
    if not hasattr(config, "real_architecture"):
        config.real_architecture = config.architecture
    config.architecture = lambda device: config.real_architecture(torch.device("cuda"))
    for name, module in list(sys.modules.items()):
        if name.startswith("fastattn.kernels"):  # decisions that were made for another architecture
            for value in vars(module).values():
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()


def kernels(name):
    return importlib.import_module(f"fastattn.kernels.{name}")


LENGTHS = (1, 2, 16, 17, 32, 100, 128)


def rotary(positions=False):
    """Prompts of all lengths, followed by single tokens."""
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
            _, r, stats = kernels("norm").norm_fwd(x, x, x[0], x[0], rng, p, 1e-5, False)
            kernels("norm_bwd").norm_bwd(x, None, r, x[0], stats, rng, p, False, dropout, True, True)


def wide_norm():
    for rows in LENGTHS:
        x = torch.ones(rows, 20000)
        _, r, stats = kernels("norm").norm_fwd(x, x, x[0], x[0], None, 0.0, 1e-5, False)
        kernels("norm_bwd").norm_bwd(x, None, r, x[0], stats, None, 0.0, False, False, True, True)


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


def cross_entropy():
    for rows in LENGTHS:
        logits, target = torch.ones(rows, 1024), torch.zeros(rows, dtype=torch.int64)
        kernels("cross_entropy").cross_entropy_fwd(logits, target, None, -100, 0.0, 0.0, 0.0, True)


def run_attention(q, k, cu_q=None, cu_k=None, left=-1, right=-1, seqlens=None):
    options = (q.shape[2], k.shape[2], left, right, False, 0.0, 0.0, 0.125)
    rest = (None, seqlens, cu_q, cu_k, None, None, *options)
    out, lse, low = kernels("attention_fwd").attention_fwd(q, k, k, None, None, *rest, False)
    kernels("attention_bwd").attention_bwd(out, None, q, k, k, out, lse, low, None, None, *rest, False, False)


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
                append = kernels("attention_decode_cache").attention_decode_append
                append(cache, cache, new, new, lengths, None, None)
                kernels("attention_decode").attention_decode_fwd(
                    q, cache, cache, lengths, None, None, None, None, None, seqlen, -1, 0, 0.0, 0.1, 2
                )


SCENARIOS = {
    "rotary": rotary,
    "rotary with positions": functools.partial(rotary, positions=True),
    "norm": norm,
    "norm with dropout": functools.partial(norm, dropout=True),
    "wide norm": wide_norm,
    "dropout": dropout,
    "feed_forward": feed_forward,
    "cross_entropy": cross_entropy,
    "attention": attention,
    "attention window": attention_window,
    "attention packed": attention_packed,
    "attention_decode": attention_decode,
}


def count_binaries():
    import triton

    pretend(90)
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
    return found


def call(op, **values):
    """Call the launcher of a raw op with the values that its schema names; another checkout may have fewer."""
    from fastattn.ops._register import _python_kernels

    names = [argument.name for argument in getattr(torch.ops.fastattn, op).triton._schema.arguments]
    return _python_kernels[op, "triton", "cuda"](*(values[name] for name in names))


def norm_bwd(width, needed, dropout=False, residual=False):
    """needed: which of dweight, dbias and dx_bias."""
    x, rng = torch.ones(7, width), torch.ones(2, dtype=torch.int64) if dropout else None
    weight, bias, x_bias = needed
    call("norm_bwd", dy=x, dr_out=x if residual else None, r=x, weight=x[0], stats=torch.ones(2, 7), rng=rng,
         dropout_p=0.1, rms=False, separate_dresidual=residual, need_dweight=weight, need_dbias=bias,
         need_dx_bias=x_bias)  # fmt: skip


def attention_call(head_dim, dtype="bfloat16", heads=8, kv_heads=8, seqlen=1024, left=-1, right=-1, mask=False,
                   packed=False, backward=True, lengths=False, bias=None, alibi=False, sink=False, softcap=0.0,
                   dropout_p=0.0):  # fmt: skip
    """lengths: with seqlens_k; mask: its shape, or True for one of keys; bias: None, or its shape, with a gradient."""
    dtype = getattr(torch, dtype)
    q, k = (torch.ones(2, seqlen, n, head_dim, dtype=dtype).transpose(1, 2) for n in (heads, kv_heads))
    ends = None
    if packed:
        q, k = q.narrow(0, 0, 1), k.narrow(0, 0, 1)
        ends = torch.arange(3, dtype=torch.int32)
    sink, slopes = (torch.ones(heads) if wanted else None for wanted in (sink, alibi))
    inputs = {
        "q": q, "k": k, "v": k, "sink": sink, "alibi_slopes": slopes, "softcap": softcap, "dropout_p": dropout_p,
        "bias": None if bias is None else torch.ones(bias, dtype=dtype), "scale": 0.125,
        "mask": torch.ones((2, 1, 1, seqlen) if mask is True else mask, dtype=torch.bool) if mask else None,
        "cu_seqlens_q": ends, "cu_seqlens_k": ends, "seqlens_k": torch.ones(2).int() if lengths else None,
        "window_left": left, "window_right": right, "top_left": False, "max_seqlen_q": seqlen, "max_seqlen_k": seqlen,
        "rng": torch.ones(2, dtype=torch.int64) if dropout_p else None,
    }  # fmt: skip
    out, *saved = call("attention_fwd", **inputs, need_low=False)
    saved = dict(zip(("lse", "lse_low"), saved, strict=False))
    if backward:
        call("attention_bwd", do=out, dlse=None, out=out, **saved, **inputs, need_dbias=bias is not None,
             deterministic=False)  # fmt: skip


def attention_decode_call(head_dim, dtype="bfloat16", queries=1, page_size=0, num_splits=4, left=-1, softcap=0.0,
                          alibi=False, sink=False, batch_idx=False, leftpad=False):  # fmt: skip
    dtype, batch, capacity = getattr(torch, dtype), 2, 4096
    q, new = (torch.ones(batch, heads, queries, head_dim, dtype=dtype) for heads in (8, 2))
    cache, table = torch.ones(batch, capacity, 2, head_dim, dtype=dtype).transpose(1, 2), None
    if page_size:
        pages = capacity // page_size
        cache = torch.ones(batch * pages, page_size, 2, head_dim, dtype=dtype).transpose(1, 2)
        table = torch.arange(batch * pages).int().view(batch, pages)
    sink, slopes = (torch.ones(8) if wanted else None for wanted in (sink, alibi))
    batch_idx, leftpad = (torch.ones(batch).int() if wanted else None for wanted in (batch_idx, leftpad))
    cached = {"k_cache": cache, "v_cache": cache, "cache_seqlens": torch.ones(batch).int(), "block_table": table,
              "cache_batch_idx": batch_idx}  # fmt: skip
    call("attention_decode_append", **cached, k=new, v=new)
    call("attention_decode_fwd", **cached, q=q, cache_leftpad=leftpad, alibi_slopes=slopes, sink=sink,
         seqlen_new=queries, window_left=left, window_right=0, softcap=softcap, scale=0.1,
         num_splits=num_splits)  # fmt: skip


def norm_call(width, dtype="bfloat16", rms=False, dropout_p=0.0, rows=4096):
    x, w, rng = torch.ones(rows, width, dtype=getattr(torch, dtype)), torch.ones(width), None
    w = w.to(x.dtype)
    if dropout_p:
        rng = torch.ones(2, dtype=torch.int64)
    shared = {"rng": rng, "dropout_p": dropout_p, "rms": rms, "weight": w}
    residual = x if dropout_p else None
    _, _, stats = call("norm_fwd", x=x, residual=residual, bias=w, eps=1e-5, x_bias=None, **shared)
    call("norm_bwd", dy=x, dr_out=residual, r=x, stats=stats, separate_dresidual=bool(dropout_p), need_dweight=True,
         need_dbias=not rms, need_dx_bias=False, **shared)  # fmt: skip


def passes_call(width, dtype="bfloat16", rows=4096):
    """The kernels of dropout, of the feed-forward block, of rotary embedding and of cross-entropy."""
    x, rng = torch.ones(rows, width, dtype=getattr(torch, dtype)), torch.ones(2, dtype=torch.int64)
    drop = {"rng": rng, "dropout_p": 0.1}
    call("dropout_fwd", x=x, residual=x, **drop)
    for gate in (None, x):
        call("activation_fwd", preact=x, gate=gate, activation=0, **drop)
        call("activation_bwd", dhidden=x, preact=x, gate=gate, activation=0, need_hidden=True, need_dbias=True,
             need_dbias_gate=gate is not None, **drop)  # fmt: skip
    q, table = torch.ones(2, 8, 512, 64, dtype=x.dtype), torch.ones(512, 32)
    for interleaved in (False, True):
        call("rotary_fwd", q=q, k=q, cos=table, sin=table, positions=None, offset=0, rotary_dim=64,
             interleaved=interleaved, conjugate=False)  # fmt: skip
    target = torch.zeros(rows, dtype=torch.int64)
    for softcap in (0.0, 30.0):
        call("cross_entropy_fwd", logits=x, target=target, dloss=None, ignore_index=-100, label_smoothing=0.1,
             z_loss=0.0, softcap=softcap, need_grad=True)  # fmt: skip


CALLS = {
    "norm_bwd": norm_bwd,
    "norm": norm_call,
    "attention": attention_call,
    "attention_decode": attention_decode_call,
    "passes": passes_call,
}


def compile_one(case):
    """Return the case with name, tile and resources of each kernel that it launches, or of those in "only"."""
    from triton.runtime.jit import JITFunction

    pretend(case["arch"])
    compiled, launch = [], JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **constants):
        if case.get("only") and kernel.__name__ not in case["only"]:
            return
        made = launch(kernel, *args, grid=grid, warmup=True, **constants)
        constant = {**constants, **getattr(args[-1], "_asdict", dict)()}
        tile = [int(constant.get(name) or 0) for name in ("BLOCK_M", "BLOCK_N")]
        facts = {"kernel": kernel.__name__, "tile": tile, "tma": bool(constant.get("TMA")),
                 "loops": ttgir.loops(made.asm["ttgir"]), "integers": ttgir.elements_loaded(made.asm["ttgir"], "i32"),
                 "stages": made.metadata.num_stages, "warps": made.metadata.num_warps,
                 "limit": getattr(made.metadata, "maxnreg", None)}  # fmt: skip
        read = aot.resources(made.asm["cubin"]) if "cubin" in made.asm else aot.amd_resources(made.asm["amdgcn"])
        compiled.append(facts | {"shared": made.metadata.shared} | read)

    JITFunction.run = compile_only
    try:
        CALLS[case["call"]](**case["arguments"])
    finally:
        JITFunction.run = launch
    return {**case, "compiled": compiled}


def run(*arguments, timeout=300, tree=ROOT, script=__file__):
    """Return what a script prints for the arguments, from a separate process, for the kernels of a checkout."""
    path = [str(tree), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:triton", os.path.abspath(script), *arguments], env=environment,
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(json.dumps(count_binaries()))
    else:
        import fastattn  # noqa: F401  (with Triton, once for both processes of the pool)

        with concurrent.futures.ProcessPoolExecutor(int(sys.argv[2]) if len(sys.argv) > 2 else 2) as pool:
            print(json.dumps(list(pool.map(compile_one, json.loads(sys.argv[1])))))
