"""What the launchers request compiles for GPUs and calls that the other ahead-of-time tests do not cover.

The others list configurations. Here the launchers run, with the options, constants and properties of integers that
they pass: GPUs with 100 KB of shared memory (sm_86, and sm_120 with TMA), calls without a mask, grouped heads, sizes
that are not multiples of 16. Rows whose width is a multiple of 8 are read 16 bytes at a time. By default a sample is
compiled; FASTATTN_AOT=all compiles the whole grid.
"""

import itertools
import json
import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import compilations

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376, 121: 101_376}
ALL = os.environ.get("FASTATTN_AOT") == "all"
# accepted bytes of stack per thread, as in test_attention_aot.py: (kernel, arch, head_dim, grouped heads)
STACK = 16
SPILLS = {}


def attention(arch, head_dim, **arguments):
    return {"arch": arch, "call": "attention", "arguments": {"head_dim": head_dim} | arguments}


def norm(arch, width, needed, **arguments):
    return {"arch": arch, "call": "norm_bwd", "arguments": {"width": width, "needed": needed} | arguments}


def sample():
    # Triton 3.8 and 3.9 crashed on this one for sm_90, where only biases are trained
    yield norm(90, 40, (False, True, True), dropout=True, residual=True)
    yield {"arch": 90, "call": "norm", "arguments": {"width": 1000, "dropout_p": 0.1}}
    yield attention(86, 64, right=0)
    yield attention(120, 64, backward=False)
    yield attention(90, 64, kv_heads=2)
    yield attention(90, 40, heads=5, kv_heads=5, seqlen=1001, backward=False)
    yield attention(120, 128, packed=True, right=0, backward=False)


def everything():
    for arch in (80, 86, 90, 100, 120):
        for width, needed in itertools.product((40, 100, 64, 1000), itertools.product((False, True), repeat=3)):
            yield norm(arch, width, needed)
        for head_dim, kv_heads in itertools.product((32, 64, 128, 256), (8, 2)):
            yield attention(arch, head_dim, kv_heads=kv_heads)
    for arch, head_dim in itertools.product((86, 120), (32, 64, 128, 256)):
        yield attention(arch, head_dim, right=0)
        yield attention(arch, head_dim, left=100, right=0)
        yield attention(arch, head_dim, packed=True, kv_heads=2)
        yield attention(arch, head_dim, mask=True)
        yield attention(arch, head_dim - 8, heads=5, kv_heads=5, seqlen=1001)
        yield attention(arch, head_dim, dtype="float32")


def test_what_the_launchers_pass_compiles():
    """Each case has a process of its own, because a crash of the compiler ends its process."""
    wanted = [*sample(), *(everything() if ALL else ())]
    results = compilations.run(json.dumps(wanted), timeout=14400 if ALL else 300)
    assert len(results) == len(wanted)
    failures = []
    for case in results:
        title = f"sm_{case['arch']} {case['call']} {case['arguments']}"
        assert case["compiled"], title
        for c in case["compiled"]:
            used = {name: c[name] for name in ("registers", "stack", "shared", "tma")}
            print(f"{title} {c['kernel']}: {used}")
            if c["stack"] > STACK or c["shared"] > SHARED_MEMORY[case["arch"]]:
                failures.append(f"{title} {c['kernel']}: {used}")
        if case["call"] == "norm":  # 1000 columns are a multiple of 8, but not of 16
            rows = [c for c in case["compiled"] if c["kernel"].startswith("norm_")]  # not the sums of columns
            assert not any(name.endswith("U16") for c in rows for name in c), title
        if case["call"] == "attention" and case["arguments"].get("dtype") != "float32":
            tma = {c["kernel"] for c in case["compiled"] if c["tma"]}
            # from sm_110 on only the host makes descriptors, which it does for calls that are not packed
            made_by_host = case["arch"] > 100 and not case["arguments"].get("packed")
            assert ("attention_fwd_kernel" in tma) == (case["arch"] in (90, 100) or made_by_host), title
    assert not failures, "\n".join(failures)
