"""Tensors without memory: a freed storage (FSDP resizes it to 0) raises, and a zero tensor of autograd counts as 0.

The kernels read a null pointer as an operand that is not given, so a freed weight must not reach them as one.
"""

import pytest
import torch

import fastattn

_reason = fastattn.backends()["cpu"]["native"]
pytestmark = pytest.mark.skipif(_reason != "available", reason=f"the C++ kernels cannot run here: {_reason}")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotary(x, cos, sin):
    return fastattn.rotary_embedding(x, cos, sin)


X, ROW, HEADS = (4, 8, 16), (16,), (2, 4, 8, 16)
# the op, the shapes of its operands by name, and other arguments
CALLS = {
    "layer_norm": (fastattn.layer_norm, {"x": X, "weight": ROW, "bias": ROW, "x_bias": ROW, "residual": X}, {}),
    "rms_norm": (fastattn.rms_norm, {"x": X, "weight": ROW, "x_bias": ROW, "residual": X}, {}),
    "dropout": (fastattn.dropout, {"x": X, "residual": X}, {"dropout_p": 1e-6}),
    "attention": (
        fastattn.attention,
        {"q": HEADS, "k": HEADS, "v": HEADS, "bias": (8, 8), "alibi_slopes": (4,), "sink": (4,)}, {},
    ),
    "attention_decode": (
        fastattn.attention_decode,
        {"q": (2, 4, 1, 16), "k_cache": HEADS, "v_cache": HEADS, "alibi_slopes": (4,)},
        {"cache_seqlens": torch.tensor([5, 8], dtype=torch.int32)},
    ),
    "rotary": (rotary, {"x": HEADS, "cos": (8, 8), "sin": (8, 8)}, {}),
    "feed_forward": (fastattn.feed_forward, {"x": X, "w1": (8, 16), "b1": (8,), "w2": (16, 8), "b2": ROW}, {}),
    "linear_cross_entropy": (
        fastattn.linear_cross_entropy, {"x": (5, 16), "weight": (9, 16), "bias": (9,)},
        {"target": torch.tensor([0, 8, 3, 3, 1])},
    ),
}  # fmt: skip
OPERANDS = [(op, operand) for op, (_, shapes, _) in CALLS.items() for operand in shapes]


def call(op, operand, change, needs_grad=False):
    function, shapes, others = CALLS[op]
    tensors = {name: randn(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    changed = change(tensors[operand])
    tensors = {name: t.requires_grad_(needs_grad) for name, t in tensors.items()} | {operand: changed}
    return function(**tensors, **others)


def freed(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize(("op", "operand"), OPERANDS)
def test_freed_memory_raises(op, operand, needs_grad):
    with pytest.raises(RuntimeError, match=r"no memory|not allocated|setStorage"):
        call(op, operand, freed, needs_grad and op != "attention_decode")


@pytest.mark.parametrize(("op", "operand"), [case for case in OPERANDS if not case[1].endswith("_cache")])
def test_zero_tensors_are_zeros(op, operand):
    got = call(op, operand, lambda t: torch._efficientzerotensor(t.shape))
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
