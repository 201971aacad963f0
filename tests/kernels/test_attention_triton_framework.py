"""The Triton kernels of attention within PyTorch: raw ops, compiled, refused calls, and the dispatcher."""

import pytest
import torch
from attention_cases import DEVICE, DIMS, Case
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.ops._register import python_kernel

_reason = fastattn.backends()[DEVICE]["triton"]
pytestmark = pytest.mark.skipif(_reason != "available", reason=f"the Triton backend cannot run here: {_reason}")


def test_raw_ops_pass_opcheck():
    checks = ("test_schema", "test_faketensor")  # the other checks are about autograd, which raw ops do not have
    for options in (
        {"bias": ("queries",), "sink": True, "bshd": True, "heads": 2, "kv_heads": 1, "dv": 8},
        {"packed": ([0, 3, 9], [0, 4, 18]), "slopes": "heads", "dropout_p": 0.3},
    ):
        case = Case(d=16, **({"heads": 1, "sq": 7, "sk": 9} | options))
        need_low = case.call.bias is not None
        torch.library.opcheck(torch.ops.fastattn.attention_fwd.triton, (*case.call, need_low), test_utils=checks)
        arguments = case.backward_arguments(case.forward(need_low=need_low), case.do, case.dlse)
        torch.library.opcheck(torch.ops.fastattn.attention_bwd.triton, arguments, test_utils=checks)


def test_compiles_without_a_graph_break():
    def call(q, k, v, bias, sink, seqlens_k):
        return fastattn.attention(
            q * 2, k, v, bias=bias, sink=sink, seqlens_k=seqlens_k, causal=True, return_lse=True,
            backend="triton",
        )  # fmt: skip

    case = Case(batch=2, heads=4, kv_heads=2, sq=7, sk=9, d=16, bias=DIMS[1:], sink=True, lengths=[9, 5])
    leaves = [t.requires_grad_() for t in case.call[:5]]
    torch._dynamo.reset()
    outcomes = []
    for function in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        torch.manual_seed(0)
        out, lse = function(*leaves, case.call.seqlens_k)
        loss = out.square().sum() + torch.where(lse.isfinite(), lse, 0.0).sum()
        outcomes.append((out, lse, torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*outcomes)


def test_head_dims_above_256_are_refused():
    q = torch.zeros(1, 1, 4, 264, device=DEVICE)
    with pytest.raises(ValueError, match="256"):
        fastattn.attention(q, q, q, backend="triton")
    assert "256" in fastattn.explain("attention", q, q, q)


def test_the_dispatcher_is_bypassed_only_if_nothing_must_see_the_call():
    class Watched(torch.Tensor):
        pass

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen = []
    q, k, v = torch.randn(3, 1, 1, 4, 16, device=DEVICE)
    assert python_kernel("attention_fwd", "triton", q, k, v) is not None
    assert python_kernel("attention_fwd", "triton", q.as_subclass(Watched), k, v) is None
    assert python_kernel("attention_fwd", "native", q, k, v) is None
    expected = fastattn.attention(q, k, v, backend="triton")
    with Watch():
        got = fastattn.attention(q, k, v, backend="triton")
    assert torch.ops.fastattn.attention_fwd.triton in seen
    assert got.equal(expected)
