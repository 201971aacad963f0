"""fp32 products as three products of tf32 parts: a model of what the tensor cores then multiply keeps the error rule.

The model rounds like the compiler's code (cvt.rna.tf32) and sums in fp32. How a tensor core rounds its sums is left to
a GPU. Triton's interpreter multiplies in fp32, whatever the precision.
"""

import pytest
import torch
from oracle import BACKWARD, assert_accurate

pytest.importorskip("triton", reason="Triton is not installed")
from fastattn.kernels import attention_call


def tf32(x):
    """x with 10 bits after the point, rounded to nearest, halves away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def one_product(a, b):
    return tf32(a) @ tf32(b)


def three_products(a, b):
    a_high, b_high = tf32(a), tf32(b)
    return (tf32(a - a_high) @ b_high + a_high @ tf32(b - b_high)) + a_high @ b_high


def attention_and_gradients(q, k, v, do, matmul=torch.matmul):
    """(out, dq, dk, dv) by the formulas of the kernels."""
    scale = q.shape[-1] ** -0.5
    s = matmul(q, k.transpose(-2, -1)) * scale
    p = torch.exp(s - torch.logsumexp(s, -1, keepdim=True))
    out = matmul(p, v)
    ds = p * (matmul(do, v.transpose(-2, -1)) - (do * out).sum(-1, keepdim=True))
    return out, matmul(ds, k) * scale, matmul(ds.transpose(-2, -1), q) * scale, matmul(p.transpose(-2, -1), do)


def judge(matmul, head_dim, factor):
    generator = torch.Generator().manual_seed(head_dim)
    tensors = [torch.randn(2, 2, 150, head_dim, generator=generator) * factor for _ in range(4)]
    exact = attention_and_gradients(*(t.double() for t in tensors))
    plain = attention_and_gradients(*tensors)
    for name, ours, right, theirs in zip(["out", "dq", "dk", "dv"], attention_and_gradients(*tensors, matmul), exact,
                                         plain, strict=True):  # fmt: skip
        assert_accurate(ours, right, theirs, factor=2.0 if name == "out" else BACKWARD, what=name)


@pytest.mark.parametrize("factor", [1.0, 4.0])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_three_products_keep_the_error_rule(head_dim, factor):
    judge(three_products, head_dim, factor)


def test_one_product_does_not():
    with pytest.raises(AssertionError, match="allowed"):
        judge(one_product, 64, 1.0)


@pytest.fixture
def switch():
    """Sets PyTorch's own switch and restores it afterwards."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = before


def test_the_option(monkeypatch, switch):
    assert attention_call.exact_products(None) == attention_call.exact_products("ieee") == "ieee"
    with pytest.raises(ValueError, match="must be ieee or tf32x3, got 'bf16'"):
        attention_call.exact_products("bf16")
    monkeypatch.setattr(attention_call, "_exact_products", attention_call.exact_products("tf32x3"))
    switch.fp32_precision = "ieee"
    assert attention_call.precision(torch.float32) == "tf32x3"
    assert attention_call.precision(torch.bfloat16) == "ieee"
    switch.fp32_precision = "tf32"  # PyTorch allows more
    assert attention_call.precision(torch.float32) == "tf32"
