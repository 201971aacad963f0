"""What the compiler made of the attention kernels for Hopper: registers, overlapped products, copies by the engine.

The numbers are read from the logs of ptxas and the objects that `python setup.py build_ext --inplace` leaves in build/.
"""

import collections
import glob
import os
import re
import subprocess

import pytest
import sass
from test_cuda_build import ROOT, cuobjdump

# At least the products of 64 x N x 16 for head dim 64: in the forward's first block, its three loops and its last
# product, and in a block of the other kernels. The widest forward has fewer keys, so fewer of the second kind.
PRODUCTS = {"attention_fwd": 4 * 4 + 4 * 4, "attention_dkdv": 4 * 4, "attention_dq": 4 + 4 + 8, "attention_decode": 8}
# tensors loaded per panel of columns
LOADS = {"attention_fwd": 3, "attention_dkdv": 4, "attention_dq": 4, "attention_decode": 2}
# Kernels of two dtypes and head dims 64, 96, 128, for the forward and decode also 192 and 256. The forward of head dim
# 128 has two block sizes; dk and dv are computed with or without dq.
SEEN = {"attention_fwd": 12, "attention_dkdv": 12, "attention_dq": 6, "attention_decode": 10}
DQ_PRODUCTS = 8  # more products if dk and dv are computed with dq: those over the 128 keys of a tile
INSTRUCTIONS = "HGMMA|HMMA|UTMALDG|UTMASTG|UBLKRED|USETMAXREG|STL|LDL"
# kernels without products
PLAIN = {"attention_stats": 6, "attention_round": 6, "attention_combine": 2, "attention_append": 1}


def built(pattern):
    paths = glob.glob(os.path.join(ROOT, f"build/temp*/csrc/cuda/attention_*_sm90.{pattern}"))
    if not paths:
        pytest.skip("the CUDA kernels were not built in this checkout (python setup.py build_ext --inplace, with nvcc)")
    return paths


def test_nothing_is_spilled_and_no_product_waits_for_another_without_need():
    kernels = 0
    for path in built("o.log"):
        with open(path, encoding="utf-8") as file:
            log = file.read()
        # C7510 to C7519: products are serialised, or a wait was added; C7508: setmaxnreg was ignored
        assert not re.findall(r"C75\d\d", log), log
        for stack, stores, loads in re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", log):
            assert (stack, stores, loads) == ("0", "0", "0"), path
            kernels += 1
    assert kernels == sum(SEEN.values()) + sum(PLAIN.values())


def test_two_blocks_of_the_decode_kernel_share_a_multiprocessor():
    """160 threads each, registers allocated in eights per thread, 65536 in all; one block from head dim 192 on."""
    found = {}
    for path in built("o.log"):
        with open(path, encoding="utf-8") as file:
            log = file.read()
        for head_dim, used in re.findall(r"decode_sm90_kernel\w*Li(\d+)E.*?Used (\d+) registers", log, re.S):
            found[int(head_dim)] = max(int(used), found.get(int(head_dim), 0))
    assert set(found) == {64, 96, 128, 192, 256}
    for head_dim, used in found.items():
        blocks = 2 if head_dim <= 128 else 1
        assert blocks * 160 * -(-used // 8) * 8 <= 65536, f"head dim {head_dim}: {used} registers"


def disassembled(path):
    done = subprocess.run([cuobjdump(), "-sass", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_exponentials_of_the_forward_run_under_the_product_for_values():
    seen = 0
    for path in built("o"):
        if "attention_fwd" not in path:
            continue
        for name, code in sass.kernels(disassembled(path)).items():
            # over blocks of keys: they wait for the scores while a product for values runs
            found = sass.loops_with(code, sass.WAIT_FOR_SCORES)
            assert len(found) == 3, f"{name}: masked blocks, blocks without a mask, masked blocks"
            for loop in found:
                under, all_of_them = sass.under_values(loop)
                assert all_of_them >= 40, name
                assert under >= 0.9 * all_of_them, f"{name}: {under} of {all_of_them} exponentials between the waits"
            seen += 1
    assert seen == SEEN["attention_fwd"]


def test_exponentials_of_the_deterministic_dq_run_under_its_second_product():
    seen = 0
    for path in built("o"):
        if "attention_dq" not in path:
            continue
        for name, code in sass.kernels(disassembled(path)).items():
            (loop,) = sass.loops_with(code, "HGMMA")
            under, all_of_them = sass.under_do_v(loop)
            assert all_of_them == 64, name
            assert under >= 0.8 * all_of_them, f"{name}: {under} of {all_of_them} exponentials under do·v"
            seen += 1
    assert seen == SEEN["attention_dq"]


def test_no_warpgroup_waits_until_the_copy_engine_has_read_its_dq():
    """The copies of dq are started, and awaited, by a warp of their own: outside the loops with products."""
    seen = 0
    for path in built("o"):
        if "attention_dkdv" not in path:
            continue
        for name, code in sass.kernels(disassembled(path)).items():
            loops = sass.loops_with(code, "HGMMA")
            assert loops, name
            for loop in loops:
                copies = [line.text for line in loop if "UBLKRED" in line.text or "UTMACMDFLUSH" in line.text]
                assert not copies, f"{name}: {copies}"
            seen += 1
    assert seen == SEEN["attention_dkdv"]


def listing(*lines):
    code = "".join(f"        /*{16 * i:04x}*/        {line} ;   /* 0x0 */\n" for i, line in enumerate(lines))
    return f"Function : kernel\n{code}"


def test_exponentials_after_the_second_wait_are_seen():
    before = [f"{sass.WAIT_FOR_SCORES}", "MUFU.EX2 R1, R1", sass.WAIT_FOR_ALL, "MUFU.EX2 R2, R2", "@P0 BRA 0x10"]
    (code,) = sass.kernels(listing("NOP", *before, "EXIT")).values()
    (loop,) = sass.loops_with(code, sass.WAIT_FOR_SCORES)
    assert sass.under_values(loop) == (1, 2)
    outer = listing("NOP", *before, "MUFU.EX2 R3, R3", "@P1 BRA 0x0", "EXIT")
    (code,) = sass.kernels(outer).values()
    (loop,) = sass.loops_with(code, sass.WAIT_FOR_SCORES)
    assert [line.text for line in loop] == before  # not the loop around it


def test_exponentials_after_the_second_product_are_seen():
    wait = sass.WAIT_FOR_ALL
    lines = ["HGMMA S", wait, "MUFU.EX2 R1", "HGMMA DP", "MUFU.EX2 R2", wait, "MUFU.EX2 R3", "HGMMA DQ", wait]
    (code,) = sass.kernels(listing("NOP", *lines, "@P0 BRA 0x10", "EXIT")).values()
    (loop,) = sass.loops_with(code, "HGMMA S")
    assert sass.under_do_v(loop) == (1, 3)


def test_kernels_use_the_tensor_cores_and_the_copy_engine():
    seen = collections.Counter()
    for path in built("o"):
        for function in disassembled(path).split("Function : ")[1:]:
            mangled = function.split(maxsplit=1)[0]
            name = re.search(r"(attention_[a-z]+)_sm90_kernel", mangled).group(1)
            if name in PLAIN:
                continue
            seen[name] += 1
            code = collections.Counter(re.findall(rf"\b({INSTRUCTIONS})\b", function))
            head_dim = int(re.search(r"Li(\d+)E", mangled).group(1))
            panels = head_dim // (64 if head_dim % 64 == 0 else 32)
            with_dq = name == "attention_dkdv" and "ELb1E" in mangled
            assert code["HGMMA"] >= PRODUCTS[name] + DQ_PRODUCTS * with_dq, f"{mangled}: {code}"
            assert code["UBLKRED"] == with_dq, f"{mangled}: {code}"
            assert code["UTMALDG"] >= LOADS[name] * panels, f"{mangled}: {code}"
            # decode stores only a few rows itself and does not redistribute registers
            roles = name != "attention_decode"
            assert code["UTMASTG"] >= roles * panels, f"{mangled}: {code}"
            assert code["USETMAXREG"] == 2 * roles, f"{mangled}: {code}"
            assert not code["HMMA"] + code["STL"] + code["LDL"], f"{mangled}: {code}"
    assert seen == SEEN
