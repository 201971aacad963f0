"""dropout with the residual add: the mask, its rate, gradients, and bad input."""

import pytest
import torch
from memory_guard import guarded
from norm_cases import strided
from oracle import assert_accurate, exact

import fastattn
from fastattn import reference
from fastattn.ops._random import draw_rng

OP = "dropout"
SHAPES = [(1,), (3, 7), (4, 64), (2, 3, 500), (5, 1023), (2, 70000)]


def seeded(function, *arguments, **options):
    torch.manual_seed(11)
    return function(*arguments, **options)


def keep_of(x, dropout_p):
    row = torch.arange(x[..., 0].numel(), device=x.device)
    rng = seeded(draw_rng, x.device)
    return reference.philox_keep(rng, dropout_p, row, row >> 32, x.shape[-1]).view(x.shape)


@pytest.mark.parametrize("dropout_p", [1e-5, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask(backend, device, interpreted, shape, dropout_p):
    if interpreted and shape[-1] > 1000:
        pytest.skip("wide rows take long in the interpreter")
    x = torch.ones(shape, device=device, requires_grad=True)
    out = seeded(fastattn.dropout, x, dropout_p)
    expected = keep_of(x, dropout_p) * reference.dropout_scale(dropout_p)
    assert torch.equal(out, expected)
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(x))
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("dropout_p", [0.001, 0.1, 0.9])
def test_rate(backend, device, interpreted, dropout_p):
    """Binomial: within 4 standard deviations of the given rate, over all elements and in each of the 8 halfwords."""
    rows = 50 if interpreted else 500
    dropped = seeded(fastattn.dropout, torch.ones(rows, 800, device=device), dropout_p).eq(0).view(-1, 8).float()
    for n, rate in ((dropped.numel(), dropped.mean()), *((len(dropped), column.mean()) for column in dropped.T)):
        assert abs(rate - dropout_p) < 4 * (dropout_p * (1 - dropout_p) / n) ** 0.5 + 2**-17
    kept = reference.dropout_scale(dropout_p) * (65536 - reference.dropout_threshold(dropout_p)) / 65536
    assert abs(kept - 1) < 1e-12  # the mean is kept


@pytest.mark.parametrize("residual_dtype", [None, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("style", ["contiguous", "columns", "step", "swapped", "expanded"])
def test_values_and_gradients(backend, device, dtype, residual_dtype, style):
    generator = torch.Generator().manual_seed(0)
    shape = (3, 4, 37) if style == "swapped" else (6, 37)
    x, dout = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    x = strided(x, style).requires_grad_()
    residual = None
    if residual_dtype is not None:
        residual = strided(torch.randn(shape, generator=generator).to(device, residual_dtype), style).requires_grad_()
    leaves = [t for t in (x, residual) if t is not None]
    out = seeded(fastattn.dropout, x, 0.25, residual=residual)
    grads = torch.autograd.grad(out, leaves, strided(dout.to(out.dtype), style))

    rng = seeded(draw_rng, x.device)
    twins = exact(*leaves) if residual is not None else [exact(x)]
    wanted = reference.dropout(twins[0], 0.25, None if residual is None else twins[1], rng)
    wanted_grads = torch.autograd.grad(wanted, twins, strided(dout.to(out.dtype), style).double())
    eager = torch.where(keep_of(x, 0.25), x * reference.dropout_scale(0.25), 0.0)
    eager = eager if residual is None else (eager + residual).to(residual.dtype)
    eager_grads = torch.autograd.grad(eager, leaves, strided(dout.to(out.dtype), style))
    assert_accurate(out, wanted, eager)
    for ours, right, base in zip(grads, wanted_grads, eager_grads, strict=True):
        assert_accurate(ours, right, base, 3.0)


def test_nothing_to_do(backend, device):
    x, residual = torch.randn(2, 3, 5, device=device)
    assert fastattn.dropout(x, 0.0) is x
    assert torch.equal(fastattn.dropout(x, 0.0, residual=residual), x + residual)
    for shape in ((0,), (0, 4), (3, 0)):
        empty = torch.ones(shape, device=device, requires_grad=True)
        out = fastattn.dropout(empty, 0.5, residual=empty)
        out.sum().backward()
        assert out.shape == empty.grad.shape == shape


def test_a_dropped_nan_is_gone(backend, device):
    x = torch.full((3, 40), float("nan"), device=device)
    assert not fastattn.dropout(x, 1.0).any()
    assert torch.equal(fastattn.dropout(x, 1.0, residual=torch.ones_like(x)), torch.ones_like(x))


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_a_subset(backend, device, create_graph):
    x, residual = (torch.randn(3, 9, device=device, requires_grad=True) for _ in range(2))
    for leaf in (x, residual):
        inputs = [t if t is leaf else t.detach() for t in (x, residual)]
        out = seeded(fastattn.dropout, inputs[0], 0.5, residual=inputs[1])
        (grad,) = torch.autograd.grad(out, leaf, out.detach(), create_graph=create_graph)
        scale = keep_of(x, 0.5) * 2.0 if leaf is x else torch.ones_like(x)
        assert torch.equal(grad, out.detach() * scale)


def test_reads_stay_inside(raw_backend, device):
    op = getattr(torch.ops.fastattn.dropout_fwd, raw_backend)
    rng = draw_rng(device)
    for offset, cols in ((0, 1), (1, 7), (3, 64), (5, 531)):
        x, residual = torch.randn(2, 3, cols, device=device)
        found = op(guarded(x, offset, gap=16), guarded(residual, offset, gap=16), rng, 0.3)
        assert torch.equal(found, op(x, residual, rng, 0.3))
        assert not found.isnan().any()


def test_raw_op_keeps_its_schema(raw_backend, device):
    op = getattr(torch.ops.fastattn.dropout_fwd, raw_backend)
    x, rng = torch.randn(2, 3, 10, device=device), draw_rng(device)
    torch.library.opcheck(op, (x, None, rng, 0.3))
    torch.library.opcheck(op, (x, x.half().transpose(0, 1).contiguous().transpose(0, 1), rng, 0.3))


def test_compile(device):
    torch._dynamo.reset()
    x = torch.randn(4, 16, device=device, requires_grad=True)
    compiled = torch.compile(lambda t: fastattn.dropout(t * 2, 0.5), backend="aot_eager", fullgraph=True)
    out = compiled(x)
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(out != 0, dx == 4)  # the backward draws the mask of the forward


def test_another_call_draws_another_mask(backend, device):
    x = torch.ones(4, 100, device=device)
    torch.manual_seed(0)
    first, second = fastattn.dropout(x, 0.5), fastattn.dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(fastattn.dropout(x, 0.5), first)
    assert not torch.equal(first, second)


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, 1.1), {}, "dropout_p must be between 0 and 1, got 1.1"),
        ((X, -1.0), {}, "dropout_p must be between 0 and 1, got -1.0"),
        ((X, 0.5), {"residual": torch.ones(3)}, r"shape and device of x, \(2, 3\) on cpu, got \(3,\) on cpu"),
        ((X, 0.5), {"residual": X.to("meta")}, "got .* on meta"),
        ((torch.tensor(1.0), 0.5), {}, r"at least one dimension, got torch.float32 \(\)"),
        ((X.int(), 0.5), {}, r"floating-point tensor .* got torch.int32 \(2, 3\)"),
        ((X, 0.5), {"backend": "gpu"}, "got 'gpu'"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        fastattn.dropout(*arguments, **options)
