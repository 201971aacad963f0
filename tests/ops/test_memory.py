"""Tensors without memory: a freed storage (FSDP resizes it to 0) raises, and a zero tensor of autograd counts as 0.

The kernels read a null pointer as an operand that is not given, so a freed weight must not reach them as one.
"""

import re

import pytest
import torch

import fastattn

_reason = fastattn.backends()["cpu"]["native"]
pytestmark = pytest.mark.skipif(_reason != "available", reason=f"the C++ kernels cannot run here: {_reason}")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotary(x, cos, sin, positions):
    return fastattn.rotary_embedding(x, cos, sin, positions=positions)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def packed(x, **ends):
    return fastattn.attention(x, x, x, **ends)


X, ROW, HEADS, ENDS = (4, 8, 16), (16,), (2, 4, 8, 16), ints(0, 3, 8)
# the op, its operands by name as shapes or values, and other arguments
CALLS = {
    "layer_norm": (fastattn.layer_norm, {"x": X, "weight": ROW, "bias": ROW, "x_bias": ROW, "residual": X}, {}),
    "rms_norm": (fastattn.rms_norm, {"x": X, "weight": ROW, "x_bias": ROW, "residual": X}, {}),
    "dropout": (fastattn.dropout, {"x": X, "residual": X}, {"dropout_p": 1e-6}),
    "attention": (
        fastattn.attention,
        {"q": HEADS, "k": HEADS, "v": HEADS, "bias": (8, 8), "alibi_slopes": (4,), "sink": (4,),
         "mask": torch.ones(8, 8, dtype=torch.bool), "seqlens_k": ints(5, 8)}, {},
    ),
    "packed attention": (packed, {"x": (8, 4, 16), "cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS}, {}),
    "attention_decode": (
        fastattn.attention_decode,
        {"q": (2, 4, 1, 16), "k_cache": HEADS, "v_cache": HEADS, "alibi_slopes": (4,), "sink": (4,),
         "cache_seqlens": ints(5, 7), "cache_batch_idx": ints(0, 1), "cache_leftpad": ints(0, 1),
         "k": (2, 4, 1, 16), "v": (2, 4, 1, 16)}, {},
    ),
    "paged attention_decode": (
        fastattn.attention_decode,
        {"q": (2, 4, 1, 16), "k_cache": (4, 4, 16, 16), "v_cache": (4, 4, 16, 16), "cache_seqlens": ints(5, 20),
         "block_table": ints(0, 1, 2, 3).view(2, 2)}, {},
    ),
    "rotary": (rotary, {"x": HEADS, "cos": (8, 8), "sin": (8, 8), "positions": torch.arange(8)}, {}),
    "feed_forward": (
        fastattn.feed_forward,
        {"x": X, "w1": (8, 16), "b1": (8,), "w2": (16, 8), "b2": ROW, "w_gate": (8, 16), "b_gate": (8,)},
        {"activation": "silu"},
    ),
    "linear_cross_entropy": (
        fastattn.linear_cross_entropy,
        {"x": (5, 4, 16), "weight": (9, 16), "bias": (9,), "target": torch.arange(20).view(5, 4) % 9}, {},
    ),
    "loss of int32 targets": (
        fastattn.linear_cross_entropy, {"x": (5, 16), "weight": (9, 16), "target": ints(0, 8, 3, 3, 1)},
        {"reduction": "none"},
    ),
}  # fmt: skip
OPERANDS = [(op, operand) for op, (_, operands, _) in CALLS.items() for operand in operands]


def call(op, operand, change, needs_grad=False, dtype=torch.float32):
    function, operands, others = CALLS[op]
    fp32 = ("alibi_slopes", "sink")
    tensors = {
        name: value.clone()
        if isinstance(value, torch.Tensor)
        else randn(*value, seed=seed).to(torch.float32 if name in fp32 else dtype)
        for seed, (name, value) in enumerate(operands.items())
    }
    changed = change(tensors[operand])
    needs_grad = needs_grad and "decode" not in op
    tensors = {name: t.requires_grad_(needs_grad and t.is_floating_point()) for name, t in tensors.items()}
    return function(**tensors | {operand: changed}, **others)


def free(t):
    t.untyped_storage().resize_(0)
    return t


def free_view(t):
    """A view that does not begin where its storage did."""
    return free(torch.stack([t, t]))[1]


def free_transposed(t):
    """A tensor that many functions copy before they read it."""
    return free(t.mT.contiguous()).mT if t.dim() > 1 else free(torch.stack([t, t], -1))[:, 0]


FREED = {"as it is": lambda t: free(t.clone()), "a view": free_view, "transposed": free_transposed}


@pytest.mark.parametrize("layout", FREED)
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize(("op", "operand"), OPERANDS)
def test_freed_memory_raises(op, operand, needs_grad, layout):
    with pytest.raises(RuntimeError, match=r"no memory|not allocated|unallocated|setStorage"):
        call(op, operand, FREED[layout], needs_grad)


@pytest.mark.parametrize(("op", "operand"), OPERANDS)
def test_freed_memory_raises_on_the_reference(op, operand):
    """PyTorch's own functions crash for many of them."""
    with pytest.raises(RuntimeError, match=r"no memory|not allocated|unallocated|setStorage"):
        call(op, operand, FREED["as it is"], dtype=torch.float64)


def test_freed_memory_of_an_addition_raises():
    with pytest.raises(RuntimeError, match="no memory"):
        fastattn.dropout(randn(4), 0.0, residual=free(randn(4)))


NOT_BY_AUTOGRAD = re.compile("_cache|seqlens|table|batch_idx")  # it never makes zero tensors of these


@pytest.mark.parametrize(("op", "operand"), [case for case in OPERANDS if not NOT_BY_AUTOGRAD.search(case[1])])
def test_zero_tensors_are_zeros(op, operand):
    got = call(op, operand, lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype))
    torch.testing.assert_close(got, call(op, operand, torch.zeros_like))


def test_what_the_backward_saved_may_be_freed_too():
    weight = randn(16).requires_grad_()
    y = fastattn.layer_norm(randn(4, 16).requires_grad_(), weight)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no memory"):
        y.sum().backward()


def test_a_target_that_is_a_zero_tensor():
    x, weight = randn(5, 16), randn(9, 16, seed=1)
    got = fastattn.linear_cross_entropy(x, weight, torch._efficientzerotensor(5, dtype=torch.long))
    torch.testing.assert_close(got, fastattn.linear_cross_entropy(x, weight, torch.zeros(5, dtype=torch.long)))


@pytest.mark.parametrize(
    "make", [torch._efficientzerotensor, lambda n: torch.zeros(1).expand(n), lambda n: randn(n, 3)[:, 1]]
)
def test_the_bias_of_our_own_product_may_have_any_stride(make):
    a, b, bias = randn(20, 16), randn(24, 16, seed=1), make(24)
    product = torch.ops.fastattn.gemm.native(a, b, bias, False, True)
    torch.testing.assert_close(product, a @ b.T + bias)
