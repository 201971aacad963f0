"""The Triton kernels of attention_decode compile for the GPUs we name, without spills and with wide reads of the cache.

By default bf16 of head dim 128 in every form and each row of the table once; FASTATTN_AOT=all compiles every row in
every form for sm_80, sm_90 and sm_100.
"""

import importlib
import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import aot

from fastattn.kernels.attention_decode import APPEND_ROWS, COMBINE_SPLITS, CONFIGS, configuration

MODULE = "fastattn.kernels.attention_decode"
ARCHS = (80, 90, 100)
SHARED_MEMORY = 101_376  # of the smallest architecture with the products we use, 86
INT32 = ("cache_seqlens", "block_table", "cache_batch_idx", "cache_leftpad")
FP32 = ("slopes", "sink", "lse", "part_stats", "parts")
ELEMENTS = ("q", "k", "v", "out", "k_cache", "v_cache")
FORMS = {  # features of a call
    "plain": (),
    "split": ("SPLIT",),
    "pages": ("SPLIT", "block_table", "WHOLE_PAGES", "cache_leftpad"),
    "small pages": ("SPLIT", "block_table"),
    "features": ("cache_batch_idx", "slopes", "sink", "HAS_LEFT", "SOFTCAP"),
}


def config(kernel, arch, head_dim, dtype, launch, features, **constants):
    """The configuration for aot.compile_one of a kernel with some features."""
    names = getattr(importlib.import_module(MODULE), kernel).arg_names
    types = dict.fromkeys(names, "i32") | dict.fromkeys(INT32, "*i32") | dict.fromkeys(FP32, "*fp32")
    types |= dict.fromkeys(ELEMENTS, f"*{dtype}") | dict.fromkeys(("softcap", "scale"), "fp32")
    types |= {name: ["i32"] * 3 for name in names if name.endswith("_strides")}
    if "SPLIT" in features:
        types["out"] = "*fp32"
    constants |= {"HEAD_DIM": head_dim, "HEAD_DIM_V": head_dim, "BLOCK_D": head_dim, "BLOCK_DV": head_dim}
    constants |= {name: name in features for name in ("SPLIT", "WHOLE_PAGES", "HAS_LEFT", "SOFTCAP")}
    constants |= {"HAS_RIGHT": True, "PRECISION": "ieee"}
    constants |= {name: None for name in (*INT32[1:], "slopes", "sink") if name not in features}
    return {
        "module": MODULE, "kernel": kernel, "arch": arch, **launch, "types": {n: types[n] for n in names},
        "constants": {name: value for name, value in constants.items() if name in names},
        "title": f"{kernel} sm_{arch} {dtype} head_dim {head_dim} {' '.join(features)} {tuple(launch.values())} "
        + " ".join(f"{name}={value}" for name, value in constants.items() if name in ("BLOCK_M", "BLOCK_N")),
    }  # fmt: skip


def split(arch, size, head_dim, form, rows):
    paged = "block_table" in FORMS[form]
    block_m, block_n, num_warps, num_stages = configuration(size, head_dim, rows, paged)
    launch = {"num_warps": num_warps, "num_stages": num_stages}
    return config(
        "attention_decode_split", arch, head_dim, {2: "bf16", 4: "fp32"}[size], launch, FORMS[form], BLOCK_M=block_m,
        BLOCK_N=block_n,
    )  # fmt: skip


def everything():
    for arch in ARCHS:
        for size, head_dim, rows in CONFIGS:
            yield from (split(arch, size, head_dim, form, rows) for form in FORMS)


def sample():
    yield from (split(ARCHS[n % 3], 2, 128, form, 16) for n, form in enumerate(FORMS))
    yield from (split(ARCHS[n % 3], *row[:2], "split", row[2]) for n, row in enumerate(CONFIGS))


SPILLS = {  # title: bytes of stack, of the whole table, which FASTATTN_AOT=all compiles; all others have none
    "attention_decode_split sm_80 bf16 head_dim 32  (4, 3) BLOCK_M=64 BLOCK_N=64": 16,
    "attention_decode_split sm_90 fp32 head_dim 32 SPLIT block_table (4, 3) BLOCK_M=16 BLOCK_N=64": 8,
    "attention_decode_split sm_100 fp32 head_dim 64 SPLIT block_table (4, 3) BLOCK_M=16 BLOCK_N=64": 8,
    "attention_decode_split sm_100 fp32 head_dim 128 SPLIT block_table (8, 3) BLOCK_M=16 BLOCK_N=32": 8,
}


def others():
    features = ("sink", "block_table")
    for head_dim in (64, 256):
        launch = {"num_warps": 4, "num_stages": 3}
        yield config("attention_decode_combine", 90, head_dim, "bf16", launch, features, BLOCK_S=COMBINE_SPLITS)
        yield config("attention_decode_append", 90, head_dim, "bf16", launch, features, BLOCK_N=APPEND_ROWS)


def test_configurations_compile_without_spills_and_with_wide_loads():
    all_of_them = os.environ.get("FASTATTN_AOT") == "all"
    wanted = list({c["title"]: c for c in [*(everything() if all_of_them else sample()), *others()]}.values())
    compiled = aot.compile_all(wanted, timeout=7200 if all_of_them else 500)
    assert len(compiled) == len(wanted)
    failures = []
    for c in compiled:
        counts = {
            name: c.get(name, 0)
            for name in ("registers", "stack", "shared", "LDG", "LDG.64", "LDG.128", "LDGSTS.128", "LDGSTS", "HMMA")
        }
        print(f"{c['title']}: {counts}")
        decode = c["kernel"] == "attention_decode_split"
        # keys and values come in 16 bytes a thread, through shared memory where a loop is pipelined
        narrow = not (c.get("LDG.128") or c.get("LDGSTS.128"))
        idle = decode and "bf16" in c["title"] and not c.get("HMMA") and not c.get("HGMMA") and not c.get("UTCHMMA")
        if c["stack"] > SPILLS.get(c["title"], 0) or c["shared"] > SHARED_MEMORY or narrow or idle:
            failures.append(f"{c['title']}: {counts}")
    assert not failures, "\n".join(failures)
