"""Every op with one size that may change, the others fixed: recorded once, the record runs and trains on other sizes.

A size that is fixed finds what two symbolic sizes hide: a comparison of the two becomes a guard that binds the record.
`tests/nn/test_nn_records.py` does so for layers.
"""

import pytest
import torch
from op_cases import AsModule
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn
from fastattn.integrations.flash_attn import flash_attn_func

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of the exporter


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def joined(out):
    return torch.cat([t.flatten() for t in out])


LENGTH = 64  # rows of the rotary tables
ROW, BIAS, W1, GATE, W2, VOCAB = randn(8), randn(12), randn(12, 8), randn(12, 8, seed=1), randn(8, 12), randn(11, 8)
COS, SIN = randn(LENGTH, 4).cos(), randn(LENGTH, 4).sin()
ROTATE, LOSS, NO_DROPOUT = fastattn.rotary_embedding, fastattn.linear_cross_entropy, 1e-9  # it drops nothing: p < 2^-17
X, HEADS, KEYS = ("batch", "length", 8), ("batch", 4, "length", 8), ("batch", 2, "length", 8)


class Ints:
    """An integer or bool input: its dimensions, and its values for a batch size and a length."""

    def __init__(self, dims, values):
        self.dims, self.values = dims, values


POSITIONS = Ints(("batch", "length"), lambda batch, length: torch.arange(length) + torch.arange(batch)[:, None])
TARGET = Ints(("batch", "length"), lambda batch, length: torch.arange(batch * length).view(batch, length) % 11)
LENGTHS = Ints(("batch",), lambda batch, length: (2 + torch.arange(batch) % 2).int())
VISIBLE = Ints(("batch", 1, 1, "length"), lambda *sizes: torch.ones(sizes, dtype=torch.bool).tril(1)[:, None, None])
# op: the function, and its inputs by dimensions
OPS = {
    "layer_norm": (
        lambda x, r: joined(
            fastattn.layer_norm(x, ROW, ROW, x_bias=ROW, residual=r, dropout_p=NO_DROPOUT, return_residual=True)
        ), [X, X],
    ),
    "rms_norm": (lambda x: fastattn.rms_norm(x, ROW), [X]),
    "dropout": (lambda x, r: fastattn.dropout(x, NO_DROPOUT, residual=r), [X, X]),
    "attention": (
        lambda q, k, v: joined(
            fastattn.attention(q, k, v, causal=True, window=(3, 0), softcap=2.0, sink=ROW[:4], return_lse=True)
        ), [HEADS, KEYS, KEYS],
    ),
    "attention with masks": (
        lambda q, k, v, bias, mask: fastattn.attention(q, k, v, bias=bias, mask=mask, dropout_p=NO_DROPOUT),
        [HEADS, KEYS, KEYS, ("length", "length"), VISIBLE],
    ),
    "attention with lengths": (
        lambda q, k, v, n: fastattn.attention(q, k, v, seqlens_k=n), [HEADS, KEYS, KEYS, LENGTHS],
    ),
    "scaled_dot_product_attention": (
        fastattn.scaled_dot_product_attention, [X, X, X, ("batch", "length", "length")],
    ),
    "flash_attn_func": (
        lambda q, k, v: flash_attn_func(q, k, v, causal=True),
        [("batch", "length", 4, 8), ("batch", "length", 2, 8), ("batch", "length", 2, 8)],
    ),
    "feed_forward": (lambda x: fastattn.feed_forward(x, W1, BIAS, W2, ROW), [X]),
    "gated feed_forward": (
        lambda x: fastattn.feed_forward(
            x, W1, None, W2, None, activation="silu", w_gate=GATE, dropout_p=NO_DROPOUT, recompute=True
        ), [X],
    ),
    "rotary_embedding": (lambda q, k: joined(ROTATE((q, k), COS, SIN, positions=2)), [HEADS, KEYS]),
    "rotary with positions": (lambda q, p: ROTATE(q, COS, SIN, positions=p), [HEADS, POSITIONS]),
    "rotary with a row per token": (ROTATE, [HEADS, ("batch", "length", 8), ("batch", "length", 8)]),
    "rotary in place": (lambda q: ROTATE(q * 1, COS, SIN, inplace=True), [HEADS]),
    "mean loss": (lambda x, t: LOSS(x, VOCAB, t, softcap=2.0), [X, TARGET]),
    "losses": (lambda x, t: LOSS(x, VOCAB, t, reduction="none", label_smoothing=0.1, z_loss=0.1), [X, TARGET]),
}  # fmt: skip


def inputs_for(shapes, batch, length):
    sizes = {"batch": batch, "length": length}
    return tuple(
        shape.values(batch, length) if isinstance(shape, Ints) else randn(*(sizes.get(n, n) for n in shape), seed=seed)
        for seed, shape in enumerate(shapes)
    )


def trained(function, inputs):
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x for x in leaves if x.requires_grad])]


def check(record, op, *sizes):
    function, shapes = OPS[op]
    inputs = inputs_for(shapes, *sizes)
    torch.testing.assert_close(trained(record, inputs), trained(function, inputs), rtol=1e-4, atol=1e-5)


OTHER = {"batch": ((2, 6), (6, 6)), "length": ((3, 3), (3, 9))}  # the sizes, first of all that of the other dimension


def exported(op, name):
    """A program in which only the dimension `name` may change."""
    function, shapes = OPS[op]
    size = Dim(name, max=LENGTH - 2) if name == "length" else Dim(name)
    dims = [getattr(shape, "dims", shape) for shape in shapes]
    dynamic = tuple({i: size for i, n in enumerate(of_one) if n == name} or None for of_one in dims)
    return torch.export.export(AsModule(function), inputs_for(shapes, 3, 6), dynamic_shapes=(dynamic,)).module()


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("op", OPS)
def test_exported(op, name):
    program = exported(op, name)
    for sizes in OTHER[name]:
        check(program, op, *sizes)


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("op", ["attention with masks", "dropout", "gated feed_forward"])
def test_exported_on_the_reference(op, name):
    """With dropout, whose mask is made of blocks of 8 columns."""
    with fastattn.use_backend("reference"):
        program = exported(op, name)
    for sizes in OTHER[name]:
        check(program, op, *sizes)


@pytest.mark.parametrize("mode", ["symbolic", "fake"])
@pytest.mark.parametrize("op", OPS)
def test_make_fx(op, mode):
    function, shapes = OPS[op]
    graph = make_fx(AsModule(function), tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs_for(shapes, 3, 6))
    for sizes in ((3, 6), (6, 3), (2, 9))[: 1 if mode == "fake" else None]:
        check(graph, op, *sizes)


@pytest.mark.parametrize("op", ["gated feed_forward", "rotary with positions"])
def test_compiled(op):
    torch._dynamo.reset()
    compiled = torch.compile(OPS[op][0], backend="aot_eager", fullgraph=True, dynamic=True)
    for sizes in ((3, 6), (6, 3), (2, 9)):
        check(compiled, op, *sizes)
