"""PyTorch's tools on the ops themselves: recorded, transformed or batched calls give the results of the call."""

import io

import pytest
import torch
from op_cases import AsModule
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn

pytestmark = pytest.mark.filterwarnings("ignore")  # deprecation warnings of the tools themselves


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


ENDS = torch.tensor([0, 3, 7], dtype=torch.int32)
COS, SIN = torch.linspace(-1, 1, 32).view(8, 4).cos(), torch.linspace(-1, 1, 32).view(8, 4).sin()
TARGET = torch.arange(14).view(2, 7) % 11
BAND = torch.ones(7, 7, dtype=torch.bool).tril(1)
ATTENTION = {"softcap": 3.0, "causal": True, "window": (3, -1), "mask": BAND, "return_lse": True}
PACKED = {"cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS, "max_seqlen_q": 4, "max_seqlen_k": 4}
LOSS = fastattn.linear_cross_entropy
QKV = ((2, 4, 7, 8), (2, 2, 7, 8), (2, 2, 7, 8))
OPS = {
    "layer_norm": (lambda x, w, b: fastattn.layer_norm(x, w, b), [(2, 7, 8), 8, 8]),
    "layer_norm with residual": (
        lambda x, w, b, r, c: fastattn.layer_norm(x, w, b, residual=r, x_bias=c, return_residual=True),
        [(2, 7, 8), 8, 8, (2, 7, 8), 8],
    ),
    "rms_norm": (lambda x, w: fastattn.rms_norm(x, w), [(2, 7, 8), 8]),
    "attention": (lambda q, k, v: fastattn.attention(q, k, v), QKV),
    "attention with features": (
        lambda q, k, v, bias, sink: fastattn.attention(q, k, v, bias=bias, sink=sink, **ATTENTION),
        [*QKV, (1, 4, 7, 7), 4],
    ),
    "packed attention": (
        lambda q, k, v: fastattn.attention(q, k, v, causal=True, **PACKED), [(7, 4, 8), (7, 2, 8), (7, 2, 8)],
    ),
    "scaled_dot_product_attention": (
        lambda q, k, v: fastattn.scaled_dot_product_attention(q, k, v, is_causal=True), [(2, 4, 7, 8)] * 3,
    ),
    "feed_forward": (
        lambda x, a, b, c, d: fastattn.feed_forward(x, a, b, c, d), [(2, 7, 8), (12, 8), 12, (8, 12), 8],
    ),
    "gated feed_forward": (
        lambda x, a, c, g: fastattn.feed_forward(x, a, None, c, None, activation="silu", w_gate=g),
        [(2, 7, 8), (12, 8), (8, 12), (12, 8)],
    ),
    "rotary_embedding": (lambda q, k: fastattn.rotary_embedding((q, k), COS, SIN), QKV[:2]),
    "rotary_embedding in place": (
        lambda q: fastattn.rotary_embedding(q * 1, COS, SIN, positions=torch.arange(1, 8), inplace=True), QKV[:1],
    ),
    "mean loss": (lambda x, w, b: LOSS(x, w, TARGET, bias=b), [(2, 7, 8), (11, 8), 11]),
    "summed loss": (
        lambda x, w: LOSS(x, w, TARGET, reduction="sum", z_loss=0.1, label_smoothing=0.1), [(2, 7, 8), (11, 8)],
    ),
    "losses": (lambda x, w: LOSS(x, w, TARGET, reduction="none", softcap=2.0), [(2, 7, 8), (11, 8)]),
}  # fmt: skip


def several(out):
    return list(out) if isinstance(out, (tuple, list)) else [out]


def weighted(out):
    return sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in several(out))


def trained(function, inputs):
    """Outputs, and gradients of the inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [t.detach() for t in several(out)] + list(torch.autograd.grad(weighted(out), leaves))


def saved_trace(function, inputs):
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(function, [x.requires_grad_() for x in inputs]), file)
    file.seek(0)
    return torch.jit.load(file)


def exported(function, inputs):
    return torch.export.export(AsModule(function), tuple(inputs), strict=False).module()


RECORDS = {
    "jit.trace": saved_trace,
    "make_fx": lambda function, inputs: make_fx(function)(*inputs),
    "make_fx before autograd": lambda function, inputs: make_fx(function, pre_dispatch=True)(*inputs),
    "export": exported,
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("record", RECORDS)
def test_record_is_trained_as_the_op(record, op):
    function, shapes = OPS[op]
    recorded = RECORDS[record](function, tensors(*shapes))
    torch.testing.assert_close(trained(recorded, tensors(*shapes)), trained(function, tensors(*shapes)))


@pytest.mark.parametrize("op", OPS)
def test_record_under_functional_transforms(op):
    function, shapes = OPS[op]
    inputs, program = tensors(*shapes), exported(function, tensors(*shapes))
    grads = torch.func.grad(lambda *inputs: weighted(program(*inputs)), argnums=tuple(range(len(inputs))))(*inputs)
    expected = trained(function, inputs)[-len(inputs) :]
    torch.testing.assert_close(list(grads), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dim", [0, -1], ids=["dense", "strided"])
def test_batched_gradients(op, dim):
    function, shapes = OPS[op]
    leaves = [x.requires_grad_() for x in tensors(*shapes)]
    out = several(function(*leaves))[0]
    batch = torch.stack([torch.ones_like(out), out.detach()], dim).movedim(dim, 0)
    got = torch.autograd.grad(out, leaves, batch, is_grads_batched=True, retain_graph=True, allow_unused=True)
    used = [x for x, grad in zip(leaves, got, strict=True) if grad is not None]
    mapped = torch.func.vmap(lambda dy: torch.autograd.grad(out, used, dy, retain_graph=True))(batch)
    mapped = iter(mapped)
    mapped = [None if grad is None else next(mapped) for grad in got]
    last = torch.autograd.grad(out, leaves, batch, is_grads_batched=True, allow_unused=True)  # frees the saved tensors
    for index in range(2):
        out = several(function(*leaves))[0]
        expected = torch.autograd.grad(out, leaves, batch[index], allow_unused=True)
        for of_batch in (got, last, mapped):
            found = [None if grad is None else grad[index] for grad in of_batch]
            torch.testing.assert_close(found, list(expected))


@pytest.mark.parametrize("op", OPS)
def test_program_of_torch_operators_alone(op):
    """What an exporter produces for a program that has no kernels of ours."""
    function, shapes = OPS[op]
    program = torch.export.export(AsModule(function), tuple(tensors(*shapes)), strict=False)
    ours = {node.target for node in program.graph.nodes if "fastattn" in str(node.target)}
    assert ours
    table = torch.export.default_decompositions() | torch._decomp.get_decompositions(list(ours))
    if op == "packed attention":
        with pytest.raises(NotImplementedError, match="packed sequences cannot be exported as PyTorch operators"):
            program.run_decompositions(table)
        return
    portable = program.run_decompositions(table)
    assert not [node for node in portable.graph.nodes if "fastattn" in str(node.target)]
    got = several(portable.module()(*tensors(*shapes)))
    torch.testing.assert_close(got, several(function(*tensors(*shapes))))


TWICE = {
    "all of attention": (lambda q, c: fastattn.attention(q, q, q, alibi_slopes=c, sink=c), [(2, 4, 7, 8), 4]),
    "keys that are values": (lambda q, k: fastattn.scaled_dot_product_attention(q, k, k), [(2, 4, 7, 8)] * 2),
    "packed attention": (lambda x: fastattn.attention(x, x, x, **PACKED), [(7, 4, 8)]),
    "a norm with its input as residual": (
        lambda x, w: fastattn.layer_norm(x, w, w, x_bias=w, residual=x, return_residual=True), [(2, 7, 8), 8],
    ),
    "rms_norm": (lambda x, w: fastattn.rms_norm(x, w, x_bias=w, residual=x), [(2, 7, 8), 8]),
    "dropout": (lambda x: fastattn.dropout(x, 0.0, residual=x), [(2, 7, 8)]),
    "weights": (lambda w, b: fastattn.feed_forward(w, w, b, w, b, w_gate=w, b_gate=b), [(8, 8), 8]),
    "the loss": (lambda x: LOSS(x, x, TARGET[0]), [(7, 8)]),
    "a pair": (lambda q: fastattn.rotary_embedding((q, q), COS, COS), [(2, 4, 7, 8)]),
}  # fmt: skip


@pytest.mark.parametrize("op", TWICE)
def test_compiled_with_one_tensor_in_several_places(op):
    """Within the function, and as several of its arguments."""
    function, shapes = TWICE[op]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(trained(compiled, tensors(*shapes)), trained(function, tensors(*shapes)))


@pytest.mark.parametrize("op", ["attention", "scaled_dot_product_attention", "layer_norm", "gated feed_forward"])
def test_compiled_with_one_argument_in_several_places(op):
    function, shapes = OPS[op]
    if op == "attention":
        shapes = [QKV[1]] * 3
    elif op == "gated feed_forward":
        shapes = [(8, 8)] * 4

    def step(function):
        leaves = {size: x.requires_grad_() for size, x in zip(shapes, tensors(*shapes), strict=True)}
        out = several(function(*(leaves[size] for size in shapes)))
        return *out, *torch.autograd.grad(weighted(out), list(leaves.values()))

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(compiled), step(function), rtol=1e-4, atol=1e-5)
