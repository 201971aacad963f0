"""The Triton kernels of attention_decode compile for all target GPUs, without spills and with wide reads of the cache.

By default each row of the table is compiled once, with forms and architectures in turn. FASTATTN_AOT=all compiles every
row in every form for sm_80, sm_90 and sm_100.
"""

import itertools
import json
import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import compilations
import ttgir

from fastattn.kernels.attention_decode import TABLE

ARCHS = (80, 90, 100)
SHARED_MEMORY = 101_376  # of 86, the smallest architecture with the products we use
FORMS = {  # calls for which a row of the table must compile
    "plain": {"num_splits": 1},
    "split": {},
    "pages": {"page_size": 64, "leftpad": True},
    "small pages": {"page_size": 16},
    "features": {"num_splits": 1, "batch_idx": True, "alibi": True, "sink": True, "left": 99, "softcap": 30.0},
}
SPILLS = {  # bytes of stack, for the whole table, which FASTATTN_AOT=all compiles; all other rows have none
    (80, 2, 32, 64, "plain"): 16,
    (90, 4, 32, 16, "small pages"): 8,
    (100, 4, 64, 16, "small pages"): 8,
    (100, 4, 128, 16, "small pages"): 8,
}


def case(arch, size, head_dim, rows, form, only=("attention_decode_split_kernel",)):
    """rows: queries of the four heads that share a key head."""
    dtype = {2: "bfloat16", 4: "float32"}[size]
    arguments = {"head_dim": head_dim, "dtype": dtype, "queries": rows // 4, **FORMS[form]}
    row = (arch, size, head_dim, rows, form)
    return {"arch": arch, "call": "attention_decode", "arguments": arguments, "row": row, "only": only}


def everything():
    for arch in ARCHS:
        for row in TABLE:
            yield from (case(arch, *row, form) for form in FORMS)


def sample():
    forms = itertools.cycle(FORMS)
    yield from (case(ARCHS[n % 3], *row, next(forms)) for n, row in enumerate(TABLE))


def others():
    for head_dim in (64, 256):
        yield case(90, 2, head_dim, 16, "small pages", ["attention_decode_combine_kernel"])
        yield case(90, 2, head_dim, 16, "small pages", ["attention_decode_append_kernel"])


def test_configurations_compile_without_spills_and_with_wide_loads():
    all_of_them = os.environ.get("FASTATTN_AOT") == "all"
    wanted = [*(everything() if all_of_them else sample()), *others()]
    results = compilations.run(json.dumps(wanted), timeout=7200 if all_of_them else 500)
    assert len(results) == len(wanted)
    failures = []
    for call in results:
        (c,) = call["compiled"]
        title = f"{c['kernel']} sm_{call['arch']} {call['arguments']}"
        counts = {
            name: c.get(name, 0)
            for name in ("registers", "stack", "shared", "LDG", "LDG.64", "LDG.128", "LDGSTS.128", "LDGSTS", "HMMA")
        }
        print(f"{title}: {counts}")
        decode = c["kernel"] == "attention_decode_split_kernel"
        # keys and values are loaded 16 bytes per thread, through shared memory if the loop is pipelined
        narrow = not (c.get("LDG.128") or c.get("LDGSTS.128"))
        products = c.get("HMMA") or c.get("HGMMA") or c.get("UTCHMMA")
        idle = decode and call["arguments"]["dtype"] == "bfloat16" and not products
        if "page_size" in call["arguments"] and decode:
            # blocks within one page look up one number of the table, others one for each key
            one = call["arguments"]["page_size"] % c["tile"][1] == 0
            assert (c["integers"] == [1]) == one, f"{title}: {c['integers']}"
        spills = c["stack"] > SPILLS.get(tuple(call["row"]), 0)
        if spills or c["shared"] > SHARED_MEMORY or narrow or idle:
            failures.append(f"{title}: {counts}")
    assert not failures, "\n".join(failures)


def test_a_look_up_of_many_numbers_is_seen():
    one = "%p = tt.load %a : !tt.ptr<i32>\n%x = tt.load %b : tensor<64x128x!tt.ptr<bf16>, #blocked>"
    assert ttgir.elements_loaded(one, "i32") == [1]
    many = "%p = ttg.async_copy_global_to_local %a, %b mask %m other %c : tensor<64x!tt.ptr<i32>, #l> -> <64xi32>"
    assert ttgir.elements_loaded(f"{one}\n{many}", "i32") == [1, 64]
