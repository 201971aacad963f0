"""What the compiler made of the attention kernels for Hopper: registers, products that overlap, copies by the engine.

Read from the logs of ptxas and from the objects that `python setup.py build_ext --inplace` leaves in build/.
"""

import collections
import glob
import os
import re
import subprocess

import pytest
from test_cuda_build import ROOT, cuobjdump

# at least: products of 64 x N x 16 in the forward's first block, its three loops and its last product, and in a block
# of the backward kernels, for head dim 64
PRODUCTS = {"attention_fwd": 4 * 4 + 4 * 8, "attention_dkdv": 4 + 4 + 4 + 4, "attention_dq": 4 + 4 + 8}


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
    assert kernels == 16  # forward, dk and dv, dq, stats; two dtypes, two head dims


def test_kernels_use_the_tensor_cores_and_the_copy_engine():
    seen = collections.Counter()
    for path in built("o"):
        done = subprocess.run([cuobjdump(), "-sass", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for function in done.stdout.split("Function : ")[1:]:
            mangled = function.split(maxsplit=1)[0]
            name = re.search(r"(attention_[a-z]+)_sm90_kernel", mangled).group(1)
            if name == "attention_stats":
                continue
            seen[name] += 1
            code = collections.Counter(re.findall(r"\b(HGMMA|HMMA|UTMALDG|UTMASTG|USETMAXREG|STL|LDL)\b", function))
            panels = 2 if "Li128E" in mangled else 1
            assert code["HGMMA"] >= PRODUCTS[name], f"{mangled}: {code}"
            assert code["UTMALDG"] >= 3 * panels, f"{mangled}: {code}"
            assert code["UTMASTG"] >= panels, f"{mangled}: {code}"
            assert code["USETMAXREG"] == 2, f"{mangled}: {code}"
            assert not code["HMMA"] + code["STL"] + code["LDL"], f"{mangled}: {code}"
    assert seen == {"attention_fwd": 4, "attention_dkdv": 4, "attention_dq": 4}
