"""The C++ attention kernels within PyTorch: gradients of any order, raw ops, compiled and exported."""

import pytest
import torch
from attention_cases import DTYPES, normal, qkv, raw_arguments

import fastattn
from fastattn.ops._backends import why_not_available
from fastattn.ops.attention import _ops

REASON = why_not_available("native", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no C++ kernels for the CPU: {REASON}")


def test_backward_of_one_backend_after_forward_of_another():
    q, k, v = qkv(2, 4, 70, 90, 16, kv_heads=2)
    kwargs = {"causal": True, "dropout_p": 0.2}
    torch.manual_seed(0)
    ours, lse = fastattn.attention(q, k, v, **kwargs, return_lse=True, backend="native")
    torch.manual_seed(0)
    theirs, their_lse = fastattn.attention(q, k, v, **kwargs, return_lse=True, backend="reference")
    expected = torch.autograd.grad(theirs.square().sum(), (q, k, v))
    torch.manual_seed(0)
    rng = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)
    got = torch.ops.fastattn.attention_bwd.native(
        2 * theirs.detach(), None, q, k, v, theirs.detach(), their_lse.detach(), torch.empty(0), None, None, None,
        None, None, None, None, rng, 70, 90, -1, 0, False, 0.0, 0.2, 0.25, False, False,
    )  # fmt: skip
    torch.testing.assert_close(got[:3], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, their_lse, atol=1e-5, rtol=1e-5)


def test_double_backward_goes_through_the_reference():
    q, k, v = qkv(1, 2, 5, 6, 8)
    bias, sink = normal(5, 6), normal(2)

    def second(backend):
        torch.manual_seed(0)
        out = fastattn.attention(q, k, v, bias=bias, sink=sink, causal=True, dropout_p=0.2, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v, bias, sink), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v, bias, sink))

    torch.testing.assert_close(second("native"), second("reference"), atol=1e-4, rtol=1e-4)


def opcheck_cases():
    q, k, v = (t.detach() for t in qkv(2, 4, 7, 9, 16, kv_heads=2, head_dim_v=8))
    swapped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    packed = [t.transpose(0, 1).reshape(1, t.shape[1], -1, t.shape[3]) for t in (q, k, v)]
    bias, sink, mask = normal(4, 7, 9).detach()[None], normal(4).detach(), torch.rand(2, 1, 7, 9) > 0.9
    ends = [torch.tensor(ends, dtype=torch.int32) for ends in ([0, 3, 3, 14], [0, 4, 9, 18])]
    drop = {"rng": torch.tensor([3, 4]), "dropout_p": 0.3}
    yield raw_arguments(q, k, v, bias, sink, mask, softcap=2.0)
    yield raw_arguments(*swapped, window=(-1, 0), top_left=True, **drop)
    yield raw_arguments(q, k, v, seqlens_k=torch.tensor([9, 0]).int(), alibi_slopes=torch.rand(2, 4), window=(3, 1))
    yield raw_arguments(*packed, sink=sink, ends=ends, window=(-1, 0), alibi_slopes=torch.rand(4), **drop)
    yield raw_arguments(q.bfloat16(), k[:, :, :0].bfloat16(), v[:, :, :0].bfloat16(), torch.zeros(1, 1, 7, 1))


def test_raw_ops_pass_opcheck():
    for n, arguments in enumerate(opcheck_cases()):
        torch.library.opcheck(torch.ops.fastattn.attention_fwd.native, (*arguments, n % 2 == 0))
        out, lse, low = torch.ops.fastattn.attention_fwd.native(*arguments, n % 2 == 0)
        need_dbias = arguments[3] is not None
        arguments = (torch.ones_like(out), lse, *arguments[:3], out, lse, low, *arguments[3:], need_dbias, False)
        torch.library.opcheck(torch.ops.fastattn.attention_bwd.native, arguments)


def test_a_call_without_features_makes_no_lse(monkeypatch):
    """Such a call has a raw op of its own with the same bits. Calls with a feature do not use it."""
    seen, infer = [], torch.ops.fastattn.attention_infer.native
    monkeypatch.setitem(_ops["infer"].direct, "native", lambda *args: seen.append(args) or infer(*args))

    def counted(inputs, **kwargs):
        before = len(seen)
        out = fastattn.attention(*inputs, **kwargs, backend="native")
        expected = fastattn.attention(*inputs, **kwargs, return_lse=True, backend="native")[0]
        assert out.equal(expected)
        assert out.stride() == expected.stride()
        return len(seen) - before

    for dtype in DTYPES:
        inputs = [t.detach() for t in qkv(2, 4, 70, 90, 24, dtype, kv_heads=2, head_dim_v=16)]
        swapped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
        empty = [t[:, :, :0] for t in inputs]
        for kwargs in ({}, {"causal": True}, {"causal": "top_left", "scale": -0.3}, {"window": (-1, 5)}):
            assert [counted(case, **kwargs) for case in (inputs, swapped, empty)] == [1, 1, 1]
            arguments = seen[-3]
            torch.library.opcheck(infer, arguments)
    for kwargs in (
        {"window": (5, 0)}, {"softcap": 2.0}, {"sink": torch.ones(4)}, {"bias": torch.ones(70, 90)},
        {"mask": torch.ones(70, 90, dtype=torch.bool)}, {"alibi_slopes": torch.ones(4)},
        {"seqlens_k": torch.tensor([3, 90]).int()},
    ):  # fmt: skip
        assert counted(inputs, **kwargs) == 0, kwargs
    with pytest.raises(RuntimeError):
        infer(inputs[0], inputs[1][:1], inputs[2], -1, False, 1.0)


def test_raw_ops_check_their_arguments():
    q, k, v = (t.detach() for t in qkv(2, 4, 7, 9, 16))
    for bad in (
        raw_arguments(q, k[:1], v),
        raw_arguments(q[0], k, v),
        raw_arguments(q, k.half(), v),
        raw_arguments(q.double(), k.double(), v.double()),
        raw_arguments(q, k, v, bias=torch.ones(1, 1, 7, 8)),
        raw_arguments(q, k, v, mask=torch.ones(2, 1, 7, 9)),
        raw_arguments(q, k, v, sink=torch.ones(3)),
    ):
        with pytest.raises(RuntimeError):
            torch.ops.fastattn.attention_fwd.native(*bad, False)


def everything(q, k, v, bias, sink, mask):
    return fastattn.attention(
        q * 2, k, v, bias=bias, sink=sink, mask=mask, causal=True, window=(6, 0), softcap=3.0,
        alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.4]), return_lse=True,
    )  # fmt: skip


def everything_packed(q, k, v, ends_q, ends_k, seqlens_k):
    return fastattn.attention(
        q * 2, k, v, cu_seqlens_q=ends_q, cu_seqlens_k=ends_k, seqlens_k=seqlens_k, causal=True, dropout_p=0.3,
        return_lse=True,
    )  # fmt: skip


def compiled_arguments(call, seqlen):
    if call is everything_packed:
        ends = [torch.tensor([0, 3, n], dtype=torch.int32) for n in (seqlen, seqlen + 2)]
        tensors = [normal(n, heads, 16, seed=n) for n, heads in ((seqlen, 4), (seqlen + 2, 2), (seqlen + 2, 2))]
        return *tensors, *ends, torch.tensor([2, 3], dtype=torch.int32)
    mask = torch.rand(seqlen, 9, generator=torch.Generator().manual_seed(0)) > 0.2
    return *qkv(2, 4, seqlen, 9, 16, kv_heads=2), normal(seqlen, 9), normal(4), mask


@pytest.mark.parametrize("call", [everything, everything_packed])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic, call):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with fastattn.use_backend("native"):
        for seqlen in (7, 12):
            arguments = compiled_arguments(call, seqlen)
            leaves = [t for t in arguments if t.requires_grad]
            outcomes = []
            for function in (compiled, call):
                torch.manual_seed(0)
                out, lse = function(*arguments)
                loss = out.square().sum() + torch.where(lse.isfinite(), lse, 0.0).sum()
                outcomes.append((out, lse, torch.autograd.grad(loss, leaves)))
            torch.testing.assert_close(*outcomes)


@pytest.mark.parametrize("call", [everything, everything_packed])
def test_exports_with_dynamic_lengths(call):
    class Module(torch.nn.Module):
        def forward(self, *arguments):
            return call(*arguments)

    with fastattn.use_backend("native"), torch.no_grad():
        example, other = (compiled_arguments(call, seqlen) for seqlen in (7, 12))
        dynamic = {"arguments": tuple(
            {d: torch.export.Dim.AUTO for d in range(a.dim()) if a.shape[d] != b.shape[d]}
            for a, b in zip(example, other, strict=True)
        )}  # fmt: skip
        program = torch.export.export(Module(), example, dynamic_shapes=dynamic)
        assert any("attention_fwd.native" in str(node.target) for node in program.graph.nodes)
        for arguments in (example, other):
            torch.manual_seed(0)
            expected = call(*arguments)
            torch.manual_seed(0)
            torch.testing.assert_close(program.module()(*arguments), expected)
