"""The Triton kernels of attention compile for all target GPUs, without spills and with the matrix products of each.

A case is a call, whose launchers use the rows of the table for it. By default a sample is compiled: on sm_90 the rows
of bf16 and head dim 128, on other architectures the forward. FASTATTN_AOT=all compiles the whole table for sm_80, sm_90
and sm_100, features included (about 250 kernels, ten minutes on two free cores).
"""

import itertools
import json
import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import compilations
import torch
import ttgir

from fastattn.kernels import attention_call
from fastattn.kernels import attention_config as config
from fastattn.kernels.attention_call import Plan, geometry
from fastattn.kernels.attention_config import HEAD_DIMS, KERNELS, architecture, table_key
from fastattn.kernels.attention_table import TABLE
from fastattn.kernels.common import DEVICE_MADE, HOST_MADE, Variants

PRODUCTS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
EXACT = ("attention_preprocess_kernel", "attention_key_runs_kernel")
# accepted bytes of stack per thread: the compiler rounds up, and dropout together with a mask needs many registers
STACK = {"full": 16, "causal": 16, "extra": 64, "alibi": 64}
# dk of 128 keys takes half of all registers at head dim 256; none of this is in its loops
SPILLS = {("attention_dkdv_kernel", 90, 256): 96}
FEATURES = {  # calls for which a row of the table must compile
    "full": [{}],
    "causal": [{"right": 0}, {"right": 0, "mask": True}, {"left": 100, "right": 0, "packed": True, "lengths": True}],
    "extra": [
        {"right": 0, "dropout_p": 0.1, "mask": [2, 1, 1024, 1024], "lengths": True},
        {"right": 0, "bias": [2, 8, 1024, 1024]},
        {"right": 0, "bias": [1, 1, 1024, 1024], "only": ["dbias"]},
    ],
    "alibi": [
        {"right": 0, "alibi": True, "softcap": 30.0, "sink": True}, {"alibi": True},
        {"right": 0, "alibi": True, "packed": True, "kv_heads": 2},
        {"left": 200, "right": 0, "alibi": True, "softcap": 30.0, "sink": True, "lengths": True},
    ],
}  # fmt: skip


def case(arch, head_dim, variant, number=0, dtype="bfloat16", only=()):
    arguments = {"head_dim": head_dim, "dtype": dtype, **FEATURES[variant][number]}
    only = arguments.pop("only", only)
    return {"arch": arch, "call": "attention", "variant": variant, "arguments": arguments,
            "only": [f"attention_{name}_kernel" for name in only]}  # fmt: skip


def everything():
    for arch in PRODUCTS:
        for variant, calls in FEATURES.items():
            for number in range(len(calls)):
                for head_dim in HEAD_DIMS:
                    yield case(arch, head_dim, variant, number)
                    if arch == 80:  # its rows also serve fp32 on all other architectures
                        yield case(arch, head_dim, variant, number, "float32")


def sample():
    yield case(90, 128, "causal")
    yield case(90, 128, "full", only=["dkdv"])
    yield case(90, 64, "causal", only=["fwd"])
    yield case(90, 64, "extra", 0, only=["fwd"])
    yield case(90, 64, "extra", 2)
    for (arch, kernel, _, head_dim), row in TABLE.items():
        if row.alibi:
            yield case(arch, head_dim, "alibi", only=[kernel])
    yield case(90, 64, "alibi", 3, only=["dq"])  # it has no limit of registers, because it would spill
    for arch in (80, 100):
        yield case(arch, 64, "causal", only=["fwd"])
    yield case(80, 64, "causal", 1, only=["dq"])  # with the blocks of calls without a mask, these two would spill
    yield case(80, 128, "causal", 1, only=["fwd"])


def late_loads(call):
    """The kernels of a call whose loads no product can hide: too few blocks ahead, or issued after a wait.

    On sm_80 the hardware waits for a product where its result is used. sm_100 has no such order in its code.
    """
    if call["arch"] not in (80, 90) or call["variant"] == "extra" or call["arguments"]["dtype"] == "float32":
        return
    for c in call["compiled"]:
        for loop in itertools.starmap(ttgir.Loop, c["loops"] if c["stages"] > 1 else ()):
            if call["arguments"].get("mask") and loop.blocks_ahead() in (None, 0):
                continue  # blocks with a hidden key have one stage
            if loop.blocks_ahead() != c["stages"] - 1 or not loop.loads_under_a_product():
                yield f"{c['kernel']} sm_{call['arch']} {call['arguments']}: {loop}"


@pytest.mark.parametrize(("before", "body", "late"), [
    ("LLLL", "PWPLL", False), ("WLLLL", "PWPLL", False), ("LL", "PWPLL", True), ("LLLL", "PWPWLL", True),
    ("LLLL", "LLPWP", True), ("", "PWP", True),
])  # fmt: skip
def test_late_loads_are_seen(before, body, late):
    kernel = {"kernel": "k", "loops": [[before, body]], "stages": 3}
    call = {"arch": 90, "variant": "causal", "arguments": {"dtype": "bfloat16"}, "compiled": [kernel]}
    assert bool(list(late_loads(call))) == late


def test_loops_are_found_in_intermediate_code():
    text = """
  %0 = ttng.async_tma_copy_global_to_local %k[%a] %b : x
  %1 = scf.for %i = %c0 to %n {
    %2 = ttng.warp_group_dot %q, %k {isAsync = true}
    %3:4 = ttng.warp_group_dot_wait %2 {pendings = 0 : i32}
    ttng.async_tma_copy_global_to_local %k[%a] %b : x
  }
  %4 = scf.for %i = %c0 to %n {
  }
"""
    assert ttgir.loops(text) == [ttgir.Loop("L", "PWL")]


def test_table_is_complete():
    for arch in (80, 86, 90, 100):
        for kernel in KERNELS:
            for size in (2, 4):
                for head_dim in (8, 32, 59, 64, 96, 128, 192, 256):
                    assert isinstance(TABLE[table_key(arch, kernel, size, head_dim)], Variants)


@pytest.mark.parametrize(("capability", "arch", "makers"), [
    ((8, 0), 80, 0), ((8, 9), 86, 0), ((9, 0), 90, DEVICE_MADE.value), ((10, 3), 100, DEVICE_MADE.value),
    ((12, 1), 86, HOST_MADE.value),
])  # fmt: skip
def test_rows_and_descriptors_of_an_architecture(capability, arch, makers, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert architecture(torch.device("cuda")) == (arch, makers)


@pytest.mark.parametrize(("kind", "more"), [
    ("full", {}), ("causal", {"window_right": 0}), ("full", {"mask": (1, 1, 1, 64)}), ("extra", {"softcap": 5.0}),
    ("extra", {"mask": (1, 1, 64, 64)}), ("alibi", {"alibi_dims": 1}), ("alibi", {"alibi_dims": 2, "softcap": 5.0}),
    ("extra", {"alibi_dims": 1, "dropout_p": 0.1, "drops": True}), ("extra", {"alibi_dims": 1, "bias": (1, 1, 64, 64)}),
    ("extra", {"alibi_dims": 1, "mask": (1, 1, 1, 64)}), ("extra", {"alibi_dims": 1, "mask": (1, 1, 64, 64)}),
    ("extra", {"alibi_dims": 1, "head_dim": 40}),
])  # fmt: skip
def test_the_kind_of_a_call(kind, more):
    """A limit of registers holds only for calls with few features: those with more would spill."""
    assert plan_of(**more).kind[-1] == kind


@pytest.mark.parametrize(("arch", "more", "first"), [
    (90, {"alibi_dims": 1}, True), (100, {"alibi_dims": 1}, False), (90, {}, False),
    (90, {"alibi_dims": 1, "softcap": 5.0}, False), (90, {"alibi_dims": 1, "dropout_p": 0.1, "drops": True}, False),
])  # fmt: skip
def test_which_calls_begin_the_sum_of_dp_with_delta(arch, more, first, monkeypatch):
    monkeypatch.setattr("fastattn.kernels.attention_config.architecture", lambda device: (arch, 0))
    assert plan_of(**more)._adds_delta_first() == first


@pytest.mark.parametrize(("arch", "more", "first"), [
    (90, {}, True), (90, {"head_dim": 80, "window_right": 0}, True), (90, {"mask": (2, 1, 1, 64)}, True),
    (90, {"head_dim": 64}, False), (90, {"head_dim": 192}, False), (80, {}, False), (100, {}, False),
    (0, {"head_dim": 64}, True), (90, {"scale": 0.0}, False), (90, {"scale": 1e-38}, False),
    (90, {"scale": -1.0}, False), (90, {"mask": (2, 1, 64, 64)}, False), (90, {"softcap": 5.0}, False),
    (90, {"alibi_dims": 1}, False), (90, {"dropout_p": 0.1, "drops": True}, False),
    (90, {"bias": (1, 1, 64, 64)}, False), (90, {"dtype": torch.float32}, False),
])  # fmt: skip
def test_which_calls_begin_the_sum_of_the_scores_with_lse(arch, more, first, monkeypatch):
    monkeypatch.setattr("fastattn.kernels.attention_config.architecture", lambda device: (arch, 0))
    plan = plan_of(**{"head_dim": 128, **more})
    assert plan._adds_lse_first() == first
    if arch:
        form = plan.start("dkdv").form
        assert first == form.LSE_FIRST
        assert (first or "alibi_dims" in more) == form.DELTA_FIRST


@pytest.mark.parametrize(("arch", "more", "launches"), [
    (90, {"head_dim": 256}, ("dv", "dk")), (90, {"head_dim": 160, "window_right": 0}, ("dv", "dk")),
    (90, {"head_dim": 128}, ("dkdv",)), (90, {"head_dim": 256, "softcap": 5.0}, ("dkdv",)),
    (90, {"head_dim": 256, "alibi_dims": 1}, ("dkdv",)), (90, {"head_dim": 256, "dtype": torch.float32}, ("dkdv",)),
    (80, {"head_dim": 256}, ("dkdv",)), (100, {"head_dim": 256}, ("dkdv",)), (0, {"head_dim": 256}, ("dv", "dk")),
])  # fmt: skip
def test_which_calls_have_a_launch_for_each_of_dk_and_dv(arch, more, launches, monkeypatch):
    monkeypatch.setattr("fastattn.kernels.attention_config.architecture", lambda device: (arch, 0))
    for cache in (config.splits, config.pick):
        monkeypatch.setattr(attention_call, cache.__name__, cache.__wrapped__)  # without what they remember
    plan = plan_of(**more)
    assert plan.launches_of_keys() == launches
    if arch:
        forms = [plan.start(name).form for name in launches]
        assert [(form.WITH_DK, form.WITH_DV) for form in forms] == (
            [(False, True), (True, False)] if len(launches) == 2 else [(True, True)]
        )


def programs(kernel):
    """How many programs of a kernel fit on a multiprocessor of sm_90, by registers and shared memory."""
    registers = 32 * kernel["warps"] * -(-kernel["registers"] // 8) * 8
    return min(65_536 // registers, 233_472 // (kernel["shared"] + 1024))


def plan_of(**more):
    q = geometry(torch.empty(2, 4, 64, more.pop("head_dim", 64), device="meta"))
    tensors = {
        name: geometry(torch.empty(more[name], device="meta")) if name in more else None for name in ("bias", "mask")
    }
    values = {"drops": False, "sequences": None, "window_left": -1, "window_right": -1, "top_left": False,
              "softcap": 0.0, "dropout_p": 0.0, "scale": 0.125, "alibi_dims": 0, "dtype": torch.bfloat16, **more,
              **tensors}  # fmt: skip
    return Plan(q, q, q, device=torch.device("cuda"), fp32_precision="ieee", **values)


def test_configurations_compile_without_spills():
    all_of_them = os.environ.get("FASTATTN_AOT") == "all"
    wanted = list(everything() if all_of_them else sample())
    results = compilations.run(json.dumps(wanted), timeout=7200 if all_of_them else 500)
    assert len(results) == len(wanted)
    failures = []
    for call in results:
        arch, head_dim, product = call["arch"], call["arguments"]["head_dim"], PRODUCTS[call["arch"]]
        assert call["compiled"], call
        failures += late_loads(call)
        for c in call["compiled"]:
            title = f"{c['kernel']} sm_{arch} {call['arguments']}"
            print(f"{title}: " + str({name: c.get(name, 0) for name in ("registers", "stack", "shared", product)}))
            # tiles of 32 rows, which head dim 256 with features needs, are too small for wgmma and its successor
            small = c["tile"] == [32, 32]
            exact = call["arguments"]["dtype"] == "float32" or c["kernel"] in EXACT
            idle = product not in c and not exact and not small
            allowed = 0 if c["limit"] else SPILLS.get((c["kernel"], arch, head_dim), STACK[call["variant"]])
            crowded = c["stack"] > allowed or c["registers"] > (c["limit"] or 255) or c["shared"] > SHARED_MEMORY[arch]
            # exponentials of head dim 64 take as long as its products: a second program hides them
            alone = arch == 90 and head_dim == 64 and c["kernel"] == "attention_fwd_kernel" and programs(c) < 2
            if crowded or idle or alone:
                failures.append(title)
    assert not failures, "\n".join(failures)
