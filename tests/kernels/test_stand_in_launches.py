"""Triton's own launcher on a driver that records launches: what a GPU would receive, without a GPU.

By default a sample: rows, passes, attention with descriptors and on a cache. FASTATTN_AOT=all launches more.
"""

import os
import shutil

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
import launches

ALL = os.environ.get("FASTATTN_AOT") == "all"
SAMPLE = [
    {"arch": 90, "call": "norm", "arguments": {"width": 1000, "dropout_p": 0.1, "rows": 33}},
    {"arch": 90, "call": "attention", "arguments": {"head_dim": 64, "left": 99, "right": 0, "packed": True,
                                                    "backward": False}},
    {"arch": 90, "call": "attention", "arguments": {"head_dim": 64, "right": 0, "backward": False}},
    {"arch": 90, "call": "attention_decode", "arguments": {"head_dim": 64, "page_size": 64, "alibi": True}},
]  # fmt: skip
MORE = [
    {"arch": arch, "call": call, "arguments": arguments}
    for arch in (80, 90, 100, 120)
    for call, arguments in (
        ("norm", {"width": 512}), ("norm", {"width": 20000}), ("passes", {"width": 1000}),
        ("attention", {"head_dim": 128, "right": 0}), ("attention", {"head_dim": 64, "dropout_p": 0.1, "mask": True}),
        ("attention", {"head_dim": 64, "bias": [1, 1, 1024, 1024], "sink": True}),
        ("attention_decode", {"head_dim": 128, "num_splits": 1, "sink": True}),
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def recorded():
    if shutil.which(launches.compiler()) is None:
        pytest.skip("no C compiler for the driver that stands in")
    found = launches.run([*SAMPLE, *(MORE if ALL else ())], timeout=7200 if ALL else 600)
    return [(case, launch) for case in found for launch in case["launches"]]


def test_parameters_grid_threads_and_shared_memory_arrive(recorded):
    for case, launch in recorded:
        title = f"sm_{case['arch']} {case['call']} {case['arguments']} {launch}"
        assert launch["name"] == launch["kernel"], title
        assert launch["parameters"] > 3, title
        assert launch["wrong"] == [], title
        assert launch["grid"] == launch["wanted"], title
        assert (launch["threads"], launch["shared"]) == (32 * launch["warps"], launch["needed"]), title


def test_a_second_launch_allocates_and_synchronises_nowhere(recorded):
    """So a call can be captured into a CUDA graph: what it allocates comes from torch, in the graph's pool."""
    assert {launch["kernel"] for _, launch in recorded} >= {
        "norm_fwd_kernel", "norm_bwd_kernel", "add_up_kernel", "attention_fwd_kernel", "attention_decode_split_kernel",
        "attention_decode_combine_kernel", "attention_decode_append_kernel",
    }  # fmt: skip
    for case, launch in recorded:
        assert launch["forbidden"] == [], f"{case} {launch}"


def test_descriptors_of_a_packed_call_are_made_in_scratch_memory(recorded):
    (packed,) = (launch for case, launch in recorded if case["arguments"].get("packed"))
    assert packed["scratch"] > 0
    assert not packed["maps"]
    others = [launch for case, launch in recorded if case["call"] == "norm"]
    assert others
    assert not any(launch["scratch"] for launch in others)


def test_descriptors_of_other_calls_are_made_by_the_host(recorded):
    """They need no memory, and no time in each program: the launch passes them by value."""
    launch = next(launch for case, launch in recorded if case["arguments"].get("right") == 0
                  and not case["arguments"].get("packed") and launch["kernel"] == "attention_fwd_kernel")  # fmt: skip
    assert launch["maps"]
    assert launch["scratch"] == 0
