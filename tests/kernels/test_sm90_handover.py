"""Faults planted into the Hopper backward, where a warpgroup hands its dq to the warp that adds it to the sums.

The source of the kernel is compiled for the emulation once, with a switch at each place of the hand-over. Every fault
must end the process with the message of the rule that finds it, and without one dq must be right.
"""

import ctypes
import math

import emulate_cuda
import pytest
import torch
from processes import assert_fails

_reason = emulate_cuda.why_not_available()
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))

EDITS = {  # places in the source, and what stands there instead
    "with_half_and_head_dim(args,": "[](auto, auto launch) { return launch(__nv_bfloat16{}, HeadDim64{}); }(args,",
    "while (true) {\n    arrive(": "while (true) {\n    if (planted != 6) arrive(",
    "    meet(kDqFull": "    if (planted != 4) meet(kDqFull",
    "    const int64_t to = ": "    if (planted == 2 && threadIdx.x % 32 == 0) tma_stores_read();\n"
                               "    const int64_t to = ",
    "      tma_stores_read();": "      if (planted != 1 && planted != 2) tma_stores_read();",
    "float* sums = shared.dq[slab];\n": "float* sums = shared.dq[slab];\n          if (planted != 3)\n",
    "          fence_async();\n          if (thread": "          if (planted != 5) fence_async();\n"
                                                   "          if (thread",
    "          arrive(kDqFull": "          if (planted != 7) arrive(kDqFull",
    "= kNoMore;\n    }": "= planted == 8 ? 0 : kNoMore;\n    }",
}  # fmt: skip
FAULTS = {  # the number of the fault, and the message
    "the copy is not awaited": (1, "a block ended while copies were running"),
    "the warpgroup may go on before the copy has read": (2, "shared memory changed while a copy read it"),
    "the warpgroup does not wait for the copy": (3, "a thread arrives twice at a named barrier"),
    "the warp does not wait for dq": (4, "nothing is left that could end a wait"),
    "dq is handed over without a fence": (5, "a barrier reached without fence_async"),
    "the warpgroup may never go on": (6, "nothing is left that could end a wait"),
    "dq is not handed over": (7, "nothing is left that could end a wait"),
    "the end is not handed over": (8, "nothing is left that could end a wait"),
}
DECLARED = """
extern "C" int planted;
struct HeadDim64 { constexpr operator int() const { return 64; } };
"""
SCRIPT = """
import ctypes, sys

rows = 192, 128, 128, 192, 128, 128  # q, k, v, dout, dk, dv: bf16 numbers from 1 on, others in each block of 64 rows
tensors = [(ctypes.c_uint16 * (64 * n))(*[0x3F80 + i // 64**2 for i in range(64 * n)]) for n in rows]
lse2, delta, sums = ((ctypes.c_float * n)() for n in (192, 192, 192 * 64))
pointers = (ctypes.c_void_p * 6)(*map(ctypes.addressof, tensors))
print(ctypes.CDLL(sys.argv[1]).unit_dkdv(pointers, lse2, delta, sums, 192, 128, int(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def library():
    source = DECLARED + emulate_cuda.rewritten("csrc/cuda/attention_dkdv_sm90.cu")
    for place, planted in EDITS.items():
        assert source.count(place) == 1, place
        source = source.replace(place, planted)
    source += emulate_cuda.rewritten("tests/support/sm90_handover.cu")
    return emulate_cuda.compile_library(source, with_torch=False)


def test_without_a_fault_dq_is_right(library):
    generator = torch.Generator().manual_seed(0)
    q, k, v, do, *_ = tensors = [
        torch.randn(rows, 64, generator=generator).bfloat16() for rows in (192, 128, 128, 192, 128, 128)
    ]
    s, dp = q.double() @ k.double().T / 8, do.double() @ v.double().T
    p = s.softmax(1)
    lse2, delta = (s.logsumexp(1) / math.log(2)).float(), (p * dp).sum(1).float()
    sums = torch.zeros(192 * 64)
    pointers = (ctypes.c_void_p * 6)(*(t.data_ptr() for t in tensors))
    arguments = [pointers, *(ctypes.c_void_p(t.data_ptr()) for t in (lse2, delta, sums)), 192, 128, 0]
    assert ctypes.CDLL(library).unit_dkdv(*arguments) == 0
    expected = (p * (dp - delta[:, None])) @ k.double()
    # the sums have the order of accumulators
    torch.testing.assert_close(sums.sort()[0], expected.float().flatten().sort()[0], atol=0.05, rtol=0.02)


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found(name, library):
    number, message = FAULTS[name]
    assert_fails(SCRIPT, library, str(number), message=message)
