"""A valid call of each op, for tests that change one argument to a wrong one."""

import torch

import fastattn

Q = torch.randn(2, 4, 6, 8)
X = torch.randn(3, 8)
W = torch.randn(8, 8)
B = torch.randn(8)
TARGET = torch.tensor([1, 2, 3])
COS, SIN = torch.ones(6, 4), torch.zeros(6, 4)
LENGTHS = torch.tensor([2, 3], dtype=torch.int32)
MASK = torch.ones(6, 6, dtype=torch.bool)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)
PACKED = torch.randn(6, 4, 8)

# op: valid (positional arguments, keywords)
RIGHT = {
    "attention": ((Q, Q, Q), {}),
    "attention_decode": ((Q, Q, Q), {"cache_seqlens": LENGTHS}),
    "dropout": ((X,), {}),
    "feed_forward": ((X, W, B, W, B), {}),
    "layer_norm": ((X, B, B), {}),
    "linear_cross_entropy": ((X, W, TARGET), {}),
    "rms_norm": ((X, B), {}),
    "rotary_embedding": ((Q, COS, SIN), {}),
    "scaled_dot_product_attention": ((Q, Q, Q), {}),
}


def functions(op):
    """The op, and explain for it, which must respond in the same way."""
    return getattr(fastattn, op), lambda *args, **kwargs: fastattn.explain(op, *args, **kwargs)
