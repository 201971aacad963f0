"""The number of compilations by Triton while sizes vary, and what a launch leaves unchanged."""

import ast
import pathlib

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import compilations
import triton

from fastattn.ops._backends import why_not_available

KERNELS = pathlib.Path(compilations.ROOT, "kernels")


@pytest.fixture(scope="module")
def counted():
    return compilations.run()


@pytest.mark.parametrize("scenario", compilations.SCENARIOS)
def test_one_binary_serves_all_sizes(scenario, counted):
    """Each additional binary is a stall of seconds during a run."""
    # there are two block sizes for rows of the cache, 16 and 64, depending on the number of queries
    allowed = {"attention_decode_split_kernel": 2}
    assert counted[scenario]
    for kernel, binaries in counted[scenario].items():
        assert binaries == allowed.get(kernel, 1), f"{kernel}: {binaries} binaries"


def test_every_launch_goes_through_the_function_with_the_common_options():
    """kernel[grid](...) is used in kernels/common.py only."""
    for path in sorted(KERNELS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            direct = isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
            assert not direct or path.name == "common.py", f"{path.name}:{node.lineno}"


def test_the_callers_allocator_stays_set(monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if reason := why_not_available("triton", device):
        pytest.skip(reason)
    from triton.runtime import _allocation

    from fastattn.kernels import attention_call

    used = []
    set_allocator = triton.set_allocator
    monkeypatch.setattr(triton, "set_allocator", lambda allocator: used.append(allocator) or set_allocator(allocator))
    pick = attention_call.pick
    monkeypatch.setattr(attention_call, "pick", lambda *kind: (pick(*kind)[0], True))
    attention_call.plan_for.cache_clear()

    def mine(size, alignment, stream):
        return torch.empty(size, dtype=torch.int8, device=device)

    set_allocator(mine)
    q = torch.randn(1, 2, 20, 32, device=device, dtype=torch.float16, requires_grad=True)
    lengths = torch.tensor([20], dtype=torch.int32, device=device)  # without it, the host makes the descriptors
    fastattn_out = torch.ops.fastattn.attention_fwd.triton(
        q.detach(), q.detach(), q.detach(), None, None, None, lengths, *[None] * 4, 20, 20, -1, -1, False, 0.0, 0.0,
        0.1, False,
    )  # fmt: skip
    attention_call.plan_for.cache_clear()
    assert fastattn_out[0].shape == q.shape
    assert len(used) == 1
    assert used[0](3, 1, None).numel() == 3
    assert _allocation._allocator.get() is mine
