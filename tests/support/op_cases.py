"""One call of every differentiable op, and a function as a module, for tests of properties that hold for all ops."""

import torch

import fastattn


class AsModule(torch.nn.Module):
    """A function as a module, for tools that take only modules."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def leaf(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).requires_grad_()


def feed_forward(rows, d_model, d_ff, **options):
    def call(x, w1, b1, w2, b2, w_gate, b_gate):
        gate = {"w_gate": w_gate, "b_gate": b_gate} if options.get("gated") else {}
        return fastattn.feed_forward(
            x, w1, b1, w2, b2, **gate, **{k: v for k, v in options.items() if k != "gated"}, activation="silu"
        )

    inputs = (
        leaf(rows, d_model), leaf(d_ff, d_model, scale=d_model**-0.5), leaf(d_ff),
        leaf(d_model, d_ff, scale=d_ff**-0.5), leaf(d_model), leaf(d_ff, d_model, scale=d_model**-0.5, seed=1),
        leaf(d_ff, seed=1),
    )  # fmt: skip
    return call, inputs, 7


def linear_cross_entropy(rows, d_model, vocab, **options):
    target = torch.arange(rows) % vocab

    def call(x, weight, bias):
        return fastattn.linear_cross_entropy(x, weight, target, bias=bias, **options)

    return call, (leaf(rows, d_model), leaf(vocab, d_model, scale=d_model**-0.5), leaf(vocab)), 3


def attention(**options):
    def call(q, k, v, bias):
        return fastattn.attention(q, k, v, bias=bias, causal=True, return_lse=True, **options)

    return call, (*(leaf(1, 2, 9, 8, scale=4.0, seed=seed) for seed in range(3)), leaf(9, 9)), 3


def packed(q, k, v):
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    return fastattn.attention(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends)


def rotary(x):
    angles = torch.arange(9)[:, None] / torch.arange(1, 5)
    return fastattn.rotary_embedding(x, angles.cos(), angles.sin())


# (function, its inputs, how many, the first, whether autocast casts); a product is large from 2^23 multiplications on
OPS = {
    "attention": attention(),
    "attention with dropout": attention(dropout_p=0.3),
    "packed attention": (packed, [leaf(9, 2, 8, scale=4.0, seed=seed) for seed in range(3)], 3),
    "scaled_dot_product_attention": (
        fastattn.scaled_dot_product_attention, [leaf(1, 2, 9, 8, scale=4.0, seed=seed) for seed in range(3)], 3
    ),
    "feed_forward": feed_forward(6, 8, 24),
    "gated feed_forward with dropout": feed_forward(6, 8, 24, gated=True, dropout_p=0.3),
    "feed_forward with recompute": feed_forward(6, 8, 24, gated=True, recompute=True),
    "large feed_forward": feed_forward(64, 256, 512),
    "linear_cross_entropy": linear_cross_entropy(6, 8, 30),
    "linear_cross_entropy, none": linear_cross_entropy(6, 8, 30, reduction="none", z_loss=0.1),
    "large linear_cross_entropy": linear_cross_entropy(64, 256, 512, reduction="sum"),
    "layer_norm": (lambda x, r: fastattn.layer_norm(x, residual=r, return_residual=True), [leaf(6, 8), leaf(6, 8)], 0),
    "rms_norm": (fastattn.rms_norm, [leaf(6, 8), leaf(8)], 0),
    "dropout": (lambda x, r: fastattn.dropout(x, 0.3, residual=r), [leaf(6, 8), leaf(6, 8, seed=1)], 0),
    "rotary_embedding": (rotary, [leaf(1, 2, 9, 8)], 0),
}  # fmt: skip
