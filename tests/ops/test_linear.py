"""The linear layer with our product: values and gradients of any order against fp64, and which calls use PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from oracle import BACKWARD, assert_accurate, exact

import fastattn
from fastattn.ops import _gemm
from fastattn.ops import linear as module
from fastattn.ops._backends import why_not_available
from fastattn.ops.linear import linear


@pytest.fixture(params=["blocks", "few rows", "PyTorch's"], autouse=True)
def product(request, monkeypatch):
    if request.param == "blocks" and not _gemm._has_kernel:
        pytest.skip("the CPU kernels make no product in blocks on this processor")
    if request.param == "few rows" and why_not_available("native", "cpu") is not None:
        pytest.skip(f"no C++ kernels: {why_not_available('native', 'cpu')}")
    monkeypatch.setattr(_gemm, "_has_kernel", request.param == "blocks")
    monkeypatch.setattr(_gemm, "_most_rows", 1000 if request.param == "few rows" else 0)
    monkeypatch.setattr(module, "_LEAST", 0)
    torch.manual_seed(0)


def transposed_linear(x, weight, bias=None):
    return F.linear(x, weight.t(), bias)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (0, 5), (2, 0, 5), (3, 0)], ids=str)
def test_against_fp64(shape, bias, transposed):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn((shape[-1], 4) if transposed else (4, shape[-1]), requires_grad=True)
    inputs = [x, weight] + ([torch.randn(4, requires_grad=True)] if bias else [])
    torch_linear = transposed_linear if transposed else F.linear
    y, baseline = linear(*inputs, transposed=transposed), torch_linear(*inputs)
    y64 = torch_linear(*(twins := exact(*inputs)))
    assert_accurate(y, y64, baseline)
    dy = torch.randn(y.shape)
    grads = [torch.autograd.grad(out, args, dy.to(out.dtype)) for out, args in ((y, inputs), (y64, twins))]
    for ours, right, torch_grad in zip(*grads, torch.autograd.grad(baseline, inputs, dy), strict=True):
        assert_accurate(ours, right, torch_grad, factor=BACKWARD)


def test_gradients_of_a_subset():
    for wanted in range(1, 8):
        inputs = [torch.randn(s).requires_grad_(bool(wanted >> i & 1)) for i, s in enumerate(((6, 5), (4, 5), (4,)))]
        linear(*inputs).sum().backward()
        assert [t.grad is not None for t in inputs] == [t.requires_grad for t in inputs]


@pytest.mark.parametrize("transposed", [False, True])
def test_double_backward(transposed):
    sizes = (6, 5), (5, 4) if transposed else (4, 5), (4,)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes]
    assert torch.autograd.gradgradcheck(lambda *args: linear(*args, transposed=transposed), inputs)
    single = [t.detach().float().requires_grad_() for t in inputs]
    found = []
    for args in (single, inputs):
        y = linear(*args, transposed=transposed)
        (dx,) = torch.autograd.grad(y.square().sum(), args[0], create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), args))
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-4)


def test_transforms_and_batched_gradients():
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    jacobian = torch.func.jacrev(linear)(x, weight)
    torch.testing.assert_close(jacobian, torch.func.jacrev(F.linear)(x, weight))
    torch.testing.assert_close(torch.func.vmap(linear, (0, None))(x[None], weight)[0], F.linear(x, weight))
    x.requires_grad_()
    batched = torch.autograd.functional.jacobian(lambda x: linear(x, weight), x, vectorize=True)
    torch.testing.assert_close(batched, jacobian)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_pytorch(dtype):
    x, weight = torch.randn(8, 5), torch.randn(4, 5, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y, expected = linear(x, weight), F.linear(x, weight)
    assert y.dtype == dtype
    assert torch.equal(y, expected)


@pytest.mark.parametrize("bad", [torch.randn(3, 6), torch.randn(3, 5, dtype=torch.float64), torch.tensor(1.0)])
def test_errors_are_those_of_pytorch(bad):
    with pytest.raises(RuntimeError):
        linear(bad, torch.randn(4, 5))
    with pytest.raises(RuntimeError):
        F.linear(bad, torch.randn(4, 5))


def test_compiled_in_one_graph():
    x, weight, bias = torch.randn(2, 6, 5), torch.randn(4, 5, requires_grad=True), torch.randn(4)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 9):
        x = torch.randn(2, rows, 5)
        y = compiled(x, weight, bias)
        torch.testing.assert_close(y, F.linear(x, weight, bias))
        (found,) = torch.autograd.grad(y.square().sum(), weight)
        (expected,) = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), weight)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight"])
@pytest.mark.parametrize("train", [True, False])
def test_a_weight_on_meta_is_refused(name, train):
    """torch.nn.functional.linear computes nothing with it, and returns what the memory holds."""
    layer = fastattn.nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True).train(train)
    owner, _, label = name.rpartition(".")
    meta = torch.nn.Parameter(torch.empty_like(layer.get_parameter(name), device="meta"))
    setattr(layer.get_submodule(owner), label, meta)
    x = torch.randn(2, 3, 16)
    with torch.set_grad_enabled(train), pytest.raises(RuntimeError, match="meta"):
        layer(x)
    with torch.set_grad_enabled(train), pytest.raises(RuntimeError, match="meta"):
        layer.self_attn(x, x, x)
