"""What the Triton launchers do on the host can be captured into a CUDA graph: no wait, no memory outside the pool."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

pytest.importorskip("triton", reason="Triton is not installed")
import captured

CASES = [
    {"call": call, "arguments": arguments}
    for call, arguments in (
        ("norm", {"width": 1000, "dropout_p": 0.1}),
        ("norm", {"width": 20000}),
        ("passes", {"width": 1000}),
        ("attention", {"head_dim": 64, "right": 0, "mask": True}),
        ("attention", {"head_dim": 64, "dropout_p": 0.1, "mask": [2, 1, 1024, 1024], "alibi": True}),
        ("attention", {"head_dim": 64, "bias": [1, 1, 1024, 1024], "sink": True, "lengths": True}),
        ("attention", {"head_dim": 64, "packed": True, "sink": True, "kv_heads": 2}),
        ("attention_decode", {"head_dim": 64, "page_size": 64, "alibi": True}),
        ("attention_decode", {"head_dim": 128, "num_splits": 1, "sink": True}),
    )
]


def test_no_call_waits_or_allocates_outside_the_pool():
    for case in captured.run(CASES):
        title = f"{case['call']} {case['arguments']}"
        assert case["fault"] is None, f"{title}: {case['fault']}"
        assert case["forbidden"] == [], f"{title}: {case['forbidden']}"
        assert case["launched"], title
        assert case["made"], title


@pytest.mark.parametrize(("name", "function"), [
    ("nonzero", torch.ops.aten.nonzero.default), ("zeros", lambda _: torch.zeros(2, device="cpu")),
    ("_to_copy", lambda x: torch.ops.aten._to_copy.default(x, device=torch.device("cpu"))),
])  # fmt: skip
def test_a_wait_and_memory_elsewhere_are_seen(name, function):
    with FakeTensorMode(shape_env=ShapeEnv()):
        x = torch.ones(3, device="cuda")
        with captured.Recorded() as mode:
            function(x)
    (found,) = mode.forbidden
    assert found.startswith(f"{name} on")


def test_a_value_that_is_read_is_an_error():
    with FakeTensorMode(), pytest.raises(RuntimeError), captured.Recorded():
        torch.ones(3, device="cuda").sum().item()
