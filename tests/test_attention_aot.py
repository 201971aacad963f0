"""The Triton kernels of attention compile for the GPUs we name, without spills and with the matrix products of each.

By default a sample: on sm_90 the rows of bf16 and head dim 128, elsewhere the forward. FASTATTN_AOT=all compiles the
whole table for sm_80, sm_90 and sm_100, features included (some 200 kernels, ten minutes on two free cores).
"""

import importlib
import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import aot

from fastattn.kernels.attention_config import KERNELS, PREPROCESS, VARIANTS, as_config, table_key
from fastattn.kernels.attention_table import TABLE

PRODUCTS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
MODULES = {"fwd": "attention", "dbias": "attention_dbias"}
FP32 = ("lse", "lse_low", "high", "low", "delta", "dlse", "sink", "slopes", "dsink")
LOW = ("lse_low", "low")  # of lse what fp32 leaves: with a bias, with ALiBi and in fp32
POINTERS = dict.fromkeys(FP32, "*fp32") | {"mask": "*i1", "rng": "*i64"}
POINTERS |= dict.fromkeys(("seqlens_k", "cu_seqlens_q", "cu_seqlens_k"), "*i32")
ELEMENTS = ("q", "k", "v", "out", "do", "dq", "dk", "dv", "bias", "dbias")
OPTIONAL = ("bias", "sink", "mask", "seqlens_k", "cu_seqlens_q", "cu_seqlens_k", "slopes", "rng", "dbias", "dlse")
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
# bytes of stack a thread that we accept: the compiler rounds, and dropout with a mask at once lives on few registers
STACK = {"full": 16, "causal": 16, "extra": 64}
# dk and dv of 64 keys fill half of all registers at head dim 256; fewer keys would leave wgmma for the slower products
SPILLS = {("dkdv", 90, 256): 320}
FEATURES = {  # what a row of the table must compile with, besides causal and unlimited lengths
    "full": [()],
    "causal": [(), ("seqlens_k", "cu_seqlens_q", "cu_seqlens_k", "left")],
    "extra": [("rng", "mask", "seqlens_k"), ("bias", "dbias")],
}


def config(kernel, arch, head_dim, launch, dtype="bf16", features=()):
    """The configuration for aot.compile_one of a kernel with some features; all others are absent."""
    module = "fastattn.kernels." + MODULES.get(kernel, "attention_bwd")
    name = f"attention_{kernel}"
    names = getattr(importlib.import_module(module), name).arg_names
    types = dict.fromkeys(names, "i32") | dict.fromkeys(("softcap", "scale", "rescale"), "fp32")
    types |= POINTERS | dict.fromkeys(ELEMENTS, f"*{dtype}")
    natural = dtype == "fp32" or bool({"bias", "slopes"} & set(features))
    constants = {
        "HEAD_DIM": head_dim, "HEAD_DIM_V": head_dim, "BLOCK_D": head_dim, "BLOCK_DV": head_dim,
        "HAS_LEFT": "left" in features, "HAS_RIGHT": True, "TOP_LEFT": False, "SOFTCAP": "softcap" in features,
        "NATURAL": natural, "FUSED_SCALE": not natural and "softcap" not in features,
        "TMA": arch >= 90 and dtype != "fp32" and "left" not in features, "PRECISION": "ieee", "GROUP": 1,
        "ROW": False, "COLUMN": False,
    }  # fmt: skip
    constants |= {name: None for name in OPTIONAL if name not in features}
    constants |= {} if natural else dict.fromkeys(LOW)
    constants |= {name: value for name, value in launch.items() if name.startswith("BLOCK")}
    constants = {name: value for name, value in constants.items() if name in names}
    for i, strides in enumerate(names):
        if strides.endswith("_strides"):
            types[strides] = ["i32"] * 3
            if strides in ("bias_strides", "mask_strides", "dbias_strides"):  # of contiguous ones the last is 1
                types[strides].append("constexpr")
                constants[f"{i}.3"] = 1
    title = f"{name} sm_{arch} {dtype} head_dim {head_dim} {tuple(launch.values())} {' '.join(features)}"
    return {
        "module": module, "kernel": name, "arch": arch, "num_warps": launch["num_warps"],
        "num_stages": launch.get("num_stages", 1), "types": {n: t for n, t in types.items() if n in names},
        "constants": constants, "title": title, "stack_allowed": 0,
    }  # fmt: skip


def row(kernel, arch, head_dim, variant, dtype="bf16"):
    """The configurations that the row of the table for one kind of call must compile with."""
    key = table_key(arch, kernel, 4 if dtype == "fp32" else 2, head_dim)
    launch = as_config(TABLE[key][VARIANTS.index(variant)])
    for features in FEATURES[variant]:
        if kernel == "dbias" and "bias" not in features:
            continue
        allowed = SPILLS.get((kernel, arch, head_dim), STACK[variant])
        yield config(kernel, arch, head_dim, launch, dtype, features) | {"stack_allowed": allowed}


def everything():
    for arch, kernel, size, head_dim in TABLE:
        if arch in PRODUCTS:
            for variant in VARIANTS:
                yield from row(kernel, arch, head_dim, variant, "fp32" if size == 4 else "bf16")


def sample():
    for kernel in ("fwd", "dkdv", "dq"):
        yield from list(row(kernel, 90, 128, "causal"))[:1]
    yield from list(row("fwd", 90, 64, "extra"))[:1]
    yield from row("dbias", 90, 64, "extra")
    for arch in (80, 100):
        yield from list(row("fwd", arch, 64, "causal"))[:1]
    yield config("preprocess", 90, 64, PREPROCESS)


def test_table_is_complete():
    for arch in (80, 86, 90, 100):
        for kernel in KERNELS:
            for size in (2, 4):
                for head_dim in (8, 32, 59, 64, 96, 128, 192, 256):
                    assert len(TABLE[table_key(arch, kernel, size, head_dim)]) == len(VARIANTS)


def test_configurations_compile_without_spills():
    all_of_them = os.environ.get("FASTATTN_AOT") == "all"
    wanted = list({c["title"]: c for c in (everything() if all_of_them else sample())}.values())
    compiled = aot.compile_all(wanted, timeout=7200 if all_of_them else 500)
    assert len(compiled) == len(wanted)
    failures = []
    for c in compiled:
        product = PRODUCTS[c["arch"]]
        print(f"{c['title']}: " + str({name: c.get(name, 0) for name in ("registers", "stack", "shared", product)}))
        # tiles of 32 rows, which head dim 256 with features needs, are too small for wgmma and its successor
        small = c["constants"].get("BLOCK_N", 0) == c["constants"]["BLOCK_M"] == 32
        idle = product not in c and "bf16" in c["title"] and "preprocess" not in c["title"] and not small
        if c["stack"] > c["stack_allowed"] or idle or c["shared"] > SHARED_MEMORY[c["arch"]]:
            failures.append(c["title"])
    assert not failures, "\n".join(failures)
