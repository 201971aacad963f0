"""The Triton kernels of norm and dropout compile for all target GPUs, without spills and with wide loads and stores.

Every row of the kernels' tables is compiled once, with dtypes and architectures in turn, and the largest for every
architecture. FASTATTN_AOT=all compiles every row for every dtype and architecture (some minutes).
"""

import itertools
import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import aot

from fastattn.kernels import dropout, norm, norm_bwd
from fastattn.kernels.common import launch_for

ARCHS = (80, 90, 100)
DTYPES = (("*bf16", "*bf16"), ("*fp16", "*fp32"), ("*fp32", "*fp32"))  # of x and of the residual
SIZES = dict.fromkeys(
    ("rows", "cols", "x_stride", "residual_stride", "dy_stride", "dr_out_stride", "r_stride", "threshold", "programs"),
    "i32",
)
FP32 = dict.fromkeys(("scale", "eps"), "fp32") | {"stats_ptr": "*fp32", "rng_ptr": "*i64"}
PARTIALS = dict.fromkeys(
    (f"{name}{kind}_ptr" for name in ("dweight", "dbias", "dx_bias") for kind in ("", "_partials")), "*fp32"
)


SUMS = ("norm_bwd_strip_kernel", "add_up_kernel")


def config(kernel, arch, dtypes, num_warps, **constants):
    module = next(module for module in (norm, norm_bwd, dropout) if hasattr(module, kernel))
    x, r = dtypes
    types = SIZES | FP32 | PARTIALS | dict.fromkeys(("x_ptr", "y_ptr", "dy_ptr", "dx_ptr"), x)
    types |= dict.fromkeys(("residual_ptr", "r_ptr", "dr_out_ptr", "dresidual_ptr", "out_ptr"), r)
    types |= dict.fromkeys(("weight_ptr", "bias_ptr", "x_bias_ptr"), "*fp32" if x == "*fp32" else x)
    if kernel.startswith("norm_"):
        constants["RMS"] = False
    if kernel == "norm_bwd_kernel" and constants["BLOCK_N"] > norm_bwd.BIASED_COLS:
        constants["dx_bias_ptr"] = None
    return {"module": module.__name__, "kernel": kernel, "arch": arch, "num_warps": num_warps, "types": types,
            "constants": constants}  # fmt: skip


def tiled(kernel, arch, dtypes, row):
    return config(kernel, arch, dtypes, row.warps, BLOCK_M=row.block_m, BLOCK_N=row.block_n)


def configs(everything):
    """The configurations to compile. A table has a function of (arch, dtypes) per row; the last one is its largest."""
    tables = [
        [lambda a, d, row=row: tiled("norm_fwd_kernel", a, d, row) for row in norm.FORWARD],
        [lambda a, d, row=row: tiled("norm_bwd_kernel", a, d, row) for row in norm_bwd.BACKWARD],
        [lambda a, d: config("norm_fwd_wide_kernel", a, d, norm.WIDE.warps, BLOCK_N=norm.WIDE.block_n)],
        [lambda a, d: config("norm_bwd_wide_kernel", a, d, norm.WIDE.warps, BLOCK_N=norm.WIDE.block_n)],
        [lambda a, d: tiled("norm_bwd_strip_kernel", a, d, norm_bwd.STRIP)],
        [lambda a, d: tiled("add_up_kernel", a, d, norm_bwd.SUM)],
        [lambda a, d, row=row: tiled("dropout_fwd_kernel", a, d, row)
         for row in (dropout.TABLE[0], dropout.TABLE[-1])],
    ]  # fmt: skip
    if everything:
        return [make(a, d) for table in tables for make in table for a in ARCHS for d in DTYPES]
    archs, dtypes = itertools.cycle(ARCHS), itertools.cycle(DTYPES)
    rows = [make(next(archs), next(dtypes)) for table in tables for make in table]
    rows += [table[-1](a, DTYPES[0]) for table in tables[:2] for a in ARCHS]
    return rows


def test_every_configuration_compiles_without_spills_and_with_wide_accesses():
    wanted = configs(os.environ.get("FASTATTN_AOT") == "all")
    compiled = aot.compile_all(wanted, timeout=3000 if len(wanted) > 50 else 500)
    assert len(compiled) == len(wanted)
    failures = []
    for c in compiled:
        block = " ".join(f"{name}={value}" for name, value in c["constants"].items() if name.startswith("BLOCK"))
        title = f"{c['kernel']} sm_{c['arch']} {c['types']['x_ptr']}/{c['types']['r_ptr']} {block}"
        used = {name: c.get(name, 0) for name in ("registers", "stack", "LDG.128", "STG.128", "LDL", "STL")}
        print(f"{title}: {used}")
        spills = c["stack"] or c.get("STL") or c.get("LDL") or c["registers"] > 255
        # sums over rows end with about one fp32 number per thread
        narrow = not c.get("LDG.128") or not (c.get("STG.128") or c["kernel"] in SUMS)
        if spills or narrow:
            failures.append(f"{title}: {used}")
    assert not failures, "\n".join(failures)


def test_one_row_compiles():
    """An argument of 1 is a constant for the compiler and lacks the methods of a tensor; the interpreter hides this."""
    tables = {
        "norm_fwd_kernel": launch_for(norm.FORWARD, 512), "norm_bwd_kernel": launch_for(norm_bwd.BACKWARD, 512),
        "norm_bwd_strip_kernel": norm_bwd.STRIP,
    }  # fmt: skip
    wanted = [tiled(kernel, 90, DTYPES[0], row) for kernel, row in tables.items()]
    wanted += [
        config(f"norm_{d}_wide_kernel", 90, DTYPES[0], norm.WIDE.warps, BLOCK_N=norm.WIDE.block_n)
        for d in ("fwd", "bwd")
    ]
    for one in wanted:
        one["constants"]["rows"] = 1
    assert [c["kernel"] for c in aot.compile_all(wanted)] == [c["kernel"] for c in wanted]
