"""The Triton rotary kernel compiles for all target GPUs: no spills, wide loads and stores, x in registers only.

Half-split and interleaved, head dims 32 to 256 with all or a quarter of the channels rotated: every pair of the three,
with dtypes and architectures in turn. FASTATTN_AOT=all compiles every combination.
"""

import itertools
import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import aot

from fastattn.kernels import rotary

ARCHS = (80, 90, 100)
DTYPES = (("*bf16", "*fp32"), ("*fp16", "*fp16"), ("*fp32", "*fp32"))  # of x and of the tables
SIZES = [
    *(f"{t}_{stride}" for t in ("q", "k", "out_q", "out_k") for stride in ("batch", "head", "row")),
    *("table_batch", "table_row", "table_rows", "positions_batch", "offset"),
    *("tokens", "seqlen", "q_heads", "k_heads", "half", "head_dim"),
]


def config(arch, dtypes, head_dim, rotary_dim, interleaved, full=False, column=1):
    x, table = dtypes
    types = dict.fromkeys(SIZES, "i32") | {"positions_ptr": "*i64", "cos_ptr": table, "sin_ptr": table}
    types |= dict.fromkeys(("q_ptr", "k_ptr", "out_q_ptr", "out_k_ptr"), x)
    tile = rotary.pick(32, rotary_dim // 2, head_dim - rotary_dim, full)
    constants = {"BLOCK_M": tile.block_m, "BLOCK_H": tile.block_h, "BLOCK_HALF": tile.block_half,
                 "BLOCK_REST": tile.block_rest, "INTERLEAVED": interleaved, "CONJUGATE": full,
                 "FULL": full, "COLUMN": column}  # fmt: skip
    return {"module": rotary.__name__, "kernel": "rotary_fwd_kernel", "arch": arch, "num_warps": tile.warps,
            "types": types, "constants": constants}  # fmt: skip


def configs(everything):
    forms = [(d, r, i) for d in (32, 64, 128, 256) for r in (d, d // 4) for i in (False, True)]
    if everything:
        kinds = ((False, 1), (True, 1), (False, 2))
        return [config(a, d, *form, *kind) for form in forms for kind in kinds for a in ARCHS for d in DTYPES]
    # every pair of head dim, share of rotated channels and interleaving
    forms = [form for n, form in enumerate(forms) if n % 4 in ((0, 3), (1, 2))[n // 4 % 2]]
    archs, dtypes = itertools.cycle(ARCHS), itertools.cycle(DTYPES[:1] * 3 + DTYPES)
    kinds = {2: (True, 1), 3: (True, 1), 6: (False, 2)}  # a number for each channel; complex numbers
    return [config(next(archs), next(dtypes), *form, *kinds.get(n, ())) for n, form in enumerate(forms)]


def test_every_configuration_compiles_without_spills_and_with_wide_accesses():
    compiled = aot.compile_all(configs(os.environ.get("FASTATTN_AOT") == "all"), timeout=3000)
    failures = []
    for c in compiled:
        shape = " ".join(f"{name}={value}" for name, value in c["constants"].items())
        title = f"sm_{c['arch']} {c['types']['q_ptr']}/{c['types']['cos_ptr']} {shape}"
        used = {n: v for n, v in c.items() if n in ("registers", "stack", "shared") or n[:3] in ("LDG", "STG")}
        print(f"{title}: {used}")
        spills = c["stack"] or c.get("STL") or c.get("LDL") or c["registers"] > 128
        narrow = not c.get("LDG.128") or not c.get("STG.128") or c.get("LDG.U16") or c.get("STG.U16")
        tables = (
            2 * 4 * c["constants"]["BLOCK_M"] * c["constants"]["BLOCK_HALF"]
        )  # these may change their layout in shared memory, but x must not
        if spills or narrow or c["shared"] > tables:
            failures.append(f"{title}: {used}")
    assert not failures, "\n".join(failures)
