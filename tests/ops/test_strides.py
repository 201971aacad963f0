"""Strides change neither the results of an op nor its code path to a slow one."""

import pytest
import torch
from op_cases import OPS
from torch.testing import assert_close

from fastattn.ops import _gemm

STYLES = ("interleaved", "column shard", "transposed", "chunk of the transposed", "step", "expanded", "all expanded")


def strided(dense, style):
    """A tensor with the shape of `dense`, random values and other strides, as far as its dimensions allow."""
    shape, generator = list(dense.shape), torch.Generator().manual_seed(dense.numel())

    def memory(*sizes):
        return dense.std() * torch.randn(*sizes, generator=generator)

    if style == "interleaved":
        return memory(2 * shape[0], *shape[1:])[::2]
    if style == "column shard":
        return memory(*shape[:-1], shape[-1] + 3)[..., 1:-2]
    if style == "transposed":
        return memory(*reversed(shape)).permute(*reversed(range(dense.dim())))
    if style == "chunk of the transposed":
        return memory(*reversed(shape[1:]), 2 * shape[0]).permute(*reversed(range(dense.dim())))[: shape[0]]
    if style == "step":
        return memory(*shape[:-1], 2 * shape[-1])[..., ::2]
    return memory(*([1] * dense.dim() if style == "all expanded" else [1, *shape[1:]])).expand(shape)


def results(function, inputs, grads=None):
    inputs = [t.detach().requires_grad_() for t in inputs]  # of the same strides
    torch.manual_seed(0)
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [o.detach() / o.numel() ** 0.5 for o in outputs] if grads is None else grads
    found = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
    return [t for t in (*outputs, *found) if t is not None]


def assert_same(found, expected, what):
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        atol = 5e-4 * b.abs().max().clamp(min=1).item()  # with expanded weights the gradient of logits cancels to 0
        assert_close(a, b, rtol=1e-4, atol=atol, msg=lambda text, n=number: f"{what}, tensor {n}: {text}")


@pytest.mark.parametrize("name", OPS)
def test_operands_may_have_any_strides(name, backend, interpreted):
    function, inputs, _ = OPS[name]
    if interpreted and "large" in name:
        pytest.skip("the products are not Triton's, and the interpreter is slow")
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for style in STYLES[::3] if interpreted else STYLES:
        odd = [strided(t, style) for t in inputs]
        assert_same(results(function, odd), results(function, [t.contiguous() for t in odd]), f"operands, {style}")
        if all(o.dim() for o in outputs):
            grads = [strided(o.detach(), style) for o in outputs]
            expected = results(function, inputs, [g.contiguous() for g in grads])
            assert_same(results(function, inputs, grads), expected, f"incoming gradient, {style}")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_any_strides(dtype, style, monkeypatch):
    """Each product with each operand strided, and the fp32 path of half precision, against fp64."""
    monkeypatch.setattr(_gemm, "_SLOW_HALVES", frozenset({torch.bfloat16, torch.float16}))
    rows, k, n = 64, 256, 512
    for product, exact, *shapes in (
        (_gemm.linear, lambda x, w, b: x @ w.t() + b, (rows, k), (n, k), (n,)),
        (_gemm.input_grad, lambda dy, w: dy @ w, (rows, n), (n, k)),
        (_gemm.weight_grad, lambda dy, x: dy.t() @ x, (rows, k), (rows, n)),
        (added_weight_grad, lambda dy, x: dy.t() @ x, (rows, k), (rows, n)),
    ):
        for changed in range(len(shapes)):
            operands = [torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)]
            operands[changed] = strided(operands[changed], style)
            operands = [t.to(dtype) for t in operands]
            expected = exact(*(t.double() for t in operands))
            error = (product(*operands).double() - expected).abs().max()
            assert error <= max(torch.finfo(dtype).eps, 2e-6) * expected.abs().max(), f"{product}, operand {changed}"


def added_weight_grad(dy, x):
    total = torch.zeros(dy.shape[1], x.shape[1])
    _gemm.add_weight_grad(total, dy, x)
    return total
