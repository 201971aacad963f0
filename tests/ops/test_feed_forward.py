import itertools
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from feed_forward_cases import FLOATS, keep_factor, needs_kernels
from oracle import BACKWARD, assert_accurate, exact
from torch.testing import assert_close

import fastattn
from fastattn import reference
from fastattn.ops import _gemm
from fastattn.ops.feed_forward import ACTIVATIONS

# the tests of the kernels run again in separate processes, on another backend or instruction set
NAMES = ("x", "w1", "b1", "w2", "b2", "w_gate", "b_gate")


def arguments(shape, d_ff, dtype=torch.float32, gated=False, biased=True, d_out=None, seed=0):
    """x, w1, b1, w2, b2, w_gate, b_gate: leaves that require grad, or None."""
    generator = torch.Generator().manual_seed(seed)
    d_model = shape[-1]
    d_out = d_model if d_out is None else d_out

    def leaf(*size, scale=1.0):
        return (torch.randn(size, generator=generator) * scale).to(dtype).requires_grad_()

    x, w1, w2 = leaf(*shape), leaf(d_ff, d_model, scale=d_model**-0.5), leaf(d_out, d_ff, scale=d_ff**-0.5)
    b1, b2, b_gate = (leaf(d_ff), leaf(d_out), leaf(d_ff) if gated else None) if biased else (None, None, None)
    return x, w1, b1, w2, b2, leaf(d_ff, d_model, scale=2 * d_model**-0.5) if gated else None, b_gate


def call(args, **options):
    x, w1, b1, w2, b2, w_gate, b_gate = args
    return fastattn.feed_forward(x, w1, b1, w2, b2, w_gate=w_gate, b_gate=b_gate, **options)


def plain(args, activation, factor=None):
    """The block as a user would write it, with every step in the dtype of x. factor: the dropout factors."""
    x, w1, b1, w2, b2, w_gate, b_gate = args
    hidden = F.linear(x, w1, b1)
    act = reference.ACTIVATIONS[activation]
    hidden = act(hidden) if w_gate is None else act(F.linear(x, w_gate, b_gate)) * hidden
    return F.linear(hidden if factor is None else hidden * factor.to(x.dtype), w2, b2)


def drawn(seed):
    """The (seed, offset) that the next op draws after torch.manual_seed(seed), which this calls."""
    torch.manual_seed(seed)
    rng = torch.randint(torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max, (2,))
    torch.manual_seed(seed)
    return rng


def gradients(y, args, dy):
    wanted = [t for t in args if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, dy))
    return [next(found) if t is not None and t.requires_grad else None for t in args]


def check(ours, wanted, baseline, factor, what):
    if ours.numel() >= 32:
        return assert_accurate(ours, wanted, baseline, factor, what)
    # with few elements PyTorch may be exact by chance
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[ours.dtype]
    return assert_close(
        ours.double(), wanted.double(), rtol=tolerance, atol=tolerance * (1 + wanted.abs().sum().item())
    )


def check_against_fp64(args, activation="gelu", dropout_p=0.0, dy=None, **options):
    rng = drawn(17)
    y = call(args, activation=activation, dropout_p=dropout_p, **options)
    dy = torch.randn(y.shape).to(y.dtype) if dy is None else dy.expand(y.shape)
    factor = keep_factor(rng, dropout_p, torch.Size((*y.shape[:-1], args[1].shape[0]))) if dropout_p else None
    baseline = plain(args, activation, factor)
    args64 = exact(*args)
    y64 = plain(args64, activation, factor)
    check(y, y64, baseline, 2.0, "y")
    triples = zip(
        NAMES, gradients(y, args, dy), gradients(y64, args64, dy.double()), gradients(baseline, args, dy), strict=True
    )
    for name, grad, grad64, grad_baseline in triples:
        assert (grad is None) == (grad64 is None)
        if grad is not None:
            check(grad, grad64, grad_baseline, BACKWARD, f"d{name}")


def random_case(pick):
    leading = pick.choice(((), (1,), (3,), (33,), (2, 5), (70,), (2, 3, 4), (0,), (3, 0)))
    dropout_p = pick.choice((0.0, 0.0, 0.1, 0.5, 1.0, 1e-6))
    args = arguments(
        (*leading, pick.choice((1, 2, 7, 16, 33, 64))),
        pick.choice((1, 3, 8, 17, 31, 64, 100, 129, 520, 1030)),
        dtype=pick.choice(FLOATS),
        gated=pick.random() < 0.5,
        biased=pick.random() < 0.7,
        d_out=pick.choice((None, None, 5)),
        seed=pick.randrange(10**6),
    )
    options = {"activation": pick.choice(ACTIVATIONS), "dropout_p": dropout_p, "recompute": pick.random() < 0.3}
    return args, options


@pytest.mark.parametrize("seed", range(20))
def test_random_cases(seed):
    pick = random.Random(seed)
    for _ in range(10):
        args, options = random_case(pick)
        print(seed, [None if t is None else tuple(t.shape) for t in args], args[0].dtype, options)
        check_against_fp64(args, **options)


@pytest.mark.parametrize("strided", ["transposed", "rows apart", "expanded"])
def test_strided_input_and_expanded_gradient(strided):
    args = arguments((6, 10, 16), 40)
    x = args[0].detach()
    if strided == "transposed":
        x = x.transpose(0, 1)
    elif strided == "rows apart":
        x = torch.cat((x, x), -1)[..., :16]
    else:
        x = x[:1].expand(6, 10, 16)
    dy = torch.randn(()) if strided == "expanded" else torch.randn(16, x.shape[1], x.shape[0]).permute(2, 1, 0)
    check_against_fp64((x.requires_grad_(), *args[1:]), dropout_p=0.25, dy=dy)


@pytest.mark.parametrize("gated", [False, True])
def test_subset_of_requires_grad(gated):
    names = [n for n in NAMES if gated or "gate" not in n]
    for wanted in (*itertools.combinations(names, 1), ("x", "b2"), ("w1", "w2"), ("x", "w1", "w2")):
        args = arguments((5, 8), 24, gated=gated)
        for name, t in zip(NAMES, args, strict=True):
            if t is not None:
                t.requires_grad_(name in wanted)
        check_against_fp64(args, "silu", dropout_p=0.1)


@needs_kernels
def test_one_node_that_saves_the_preactivation_only():
    for gated, recompute in itertools.product((False, True), repeat=2):
        args = arguments((6, 8), 50, gated=gated)
        saved = []

        def keep(t, saved=saved):
            saved.append(tuple(t.shape))
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = call(args, dropout_p=0.1, recompute=recompute)
        assert type(y.grad_fn).__name__ == "_FeedForwardBackward"
        assert {type(f).__name__ for f, _ in y.grad_fn.next_functions if f is not None} == {"AccumulateGrad"}
        assert saved.count((6, 50)) == (0 if recompute else 1 + gated)


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
def test_recompute_is_equal_bit_for_bit(dtype):
    args = arguments((40, 24), 96, dtype=dtype, gated=True)
    results = []
    for recompute in (False, True):
        torch.manual_seed(3)
        y = call(args, dropout_p=0.3, recompute=recompute)
        results.append((y, *gradients(y, args, torch.ones_like(y))))
    assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    torch._dynamo.reset()

    def step(*args):
        return call(args, activation="gelu_tanh", dropout_p=0.1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    args = arguments((3, 7, 16), 48, gated=dynamic)
    for run in range(2):
        results = []
        for f in (step, compiled):
            torch.manual_seed(run)
            y = f(*args)
            results.append((y, *gradients(y, args, torch.ones_like(y))))
        assert_close(results[1], results[0])


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor_compiles_products_of_any_size():
    """Inductor calls our product unchanged."""
    args = arguments((256, 256), 512, biased=False)
    compiled = torch.compile(lambda *args: call(args), fullgraph=True)
    y = compiled(*args)
    assert_close(y, call(args), rtol=1e-4, atol=1e-4)
    expected = gradients(call(args), args, torch.ones_like(y))
    assert_close(gradients(y, args, torch.ones_like(y)), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_half_products_where_the_processor_has_none(dtype, monkeypatch):
    """They are computed in fp32 and rounded once; small products stay with torch."""
    monkeypatch.setattr(_gemm, "_SLOW_HALVES", frozenset({dtype}))
    x, w, dy = (torch.randn(size).to(dtype) for size in ((64, 256), (512, 256), (64, 512)))
    bias = torch.randn(512).to(dtype)
    for product, operands, exact64 in (
        (_gemm.linear, (x, w, bias), x.double() @ w.double().t() + bias.double()),
        (_gemm.input_grad, (dy, w), dy.double() @ w.double()),
        (_gemm.weight_grad, (dy, x), dy.double().t() @ x.double()),
    ):
        result = product(*operands)
        assert result.dtype == dtype
        assert_close(result.double(), exact64, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-4)
    assert not _gemm._use_fp32(x[:1], w, 256)
    assert not _gemm._use_fp32(x, w.float(), 256)


@pytest.mark.parametrize("gated", [False, True])
def test_double_backward_of_the_fp32_op(gated):
    """Against fp64 autograd with the mask that the forward drew."""
    args = arguments((4, 6), 16, gated=gated)
    rng = drawn(5)
    y = call(args, activation="gelu_tanh", dropout_p=0.4)
    args64 = exact(*args)
    y64 = plain(args64, "gelu_tanh", keep_factor(rng, 0.4, torch.Size((4, 16))))
    dy = torch.randn(4, 6)
    second = []
    for output, inputs, grad in ((y, args, dy), (y64, args64, dy.double())):
        leaves = [t for t in inputs if t is not None]
        first = torch.autograd.grad(output, leaves, grad, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        second.append(torch.autograd.grad(penalty, [t for t in leaves if t.dim() > 1]))
    for ours, wanted in zip(*second, strict=True):
        assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_gradgradcheck(activation):
    args = tuple(None if t is None else t.detach().double().requires_grad_() for t in arguments((3, 4), 5, gated=True))

    def function(*args):
        torch.manual_seed(1)
        return call(args, activation=activation, dropout_p=0.2)

    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


def test_function_transforms_and_forward_mode_go_to_the_reference():
    args = arguments((4, 6), 16)
    y = call(args, activation="silu")
    (dx,) = torch.autograd.grad(y.sum(), args[0])
    detached = [None if t is None else t.detach() for t in args]
    dx_func = torch.func.grad(lambda x: call((x, *detached[1:]), activation="silu").sum())(detached[0])
    assert_close(dx_func, dx)
    tangent = torch.randn(4, 6)
    _, dual = torch.func.jvp(lambda x: call((x, *detached[1:]), activation="silu").sum(), (detached[0],), (tangent,))
    assert_close(dual, (dx * tangent).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_equals_explicit_casts(dtype):
    args = arguments((5, 8), 24, gated=True)
    with torch.autocast("cpu", dtype=dtype):
        y = call(args)
    assert y.dtype == dtype
    cast = [t.detach().to(dtype) for t in args]
    assert torch.equal(y, call(cast))
    grads = gradients(y, args, torch.ones_like(y))
    assert all(g.dtype == torch.float32 for g in grads)
    with torch.autocast("cpu", dtype=dtype):
        assert call([t.detach().double() for t in args]).dtype == torch.float64


def test_no_grad_and_inference_mode():
    args = arguments((5, 8), 24)
    expected = call(args)
    with torch.no_grad():
        assert_close(call(args), expected)
    with torch.inference_mode():
        assert_close(call(args), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "swish"}, r"activation must be one of gelu, gelu_tanh, relu, relu2, silu, got 'swish'"),
        ({"dropout_p": 1.5}, r"between 0 and 1, got 1.5"),
        ({"x": torch.tensor(1.0)}, r"at least one dimension, got torch.float32 \(\)"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, r"floating-point tensor .* got torch.int64"),
        ({"x": torch.ones(2, 7)}, r"w1 must have shape \(24, 7\), .* got \(24, 8\)"),
        ({"w1": torch.ones(24)}, r"two dimensions, got \(24,\) and \(8, 24\)"),
        ({"w2": torch.ones(8, 23)}, r"w2 must have shape \(8, 24\), .* got \(8, 23\)"),
        ({"b1": torch.ones(8)}, r"b1 must have shape \(24,\), .* got \(8,\)"),
        ({"b2": torch.ones(24)}, r"b2 must have shape \(8,\), .* got \(24,\)"),
        ({"w_gate": torch.ones(8, 24)}, r"w_gate must have shape \(24, 8\), .* got \(8, 24\)"),
        ({"b_gate": torch.ones(24)}, r"b_gate was given without w_gate"),
        ({"w1": torch.ones(24, 8).half()}, r"w1 must have the dtype of x, torch.float32, got torch.float16"),
        ({"w2": torch.ones(8, 24, device="meta")}, r"w2 must be on the device of x, cpu, got meta"),
        ({"backend": "cuda"}, r"backend must be one of native, triton, reference or auto, got 'cuda'"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(changes, message):
    x, w1, b1, w2, b2, *_ = arguments((2, 8), 24)
    arguments_ = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2} | changes
    with pytest.raises(ValueError, match=message):
        fastattn.feed_forward(**arguments_)


def test_named_backend_that_cannot_serve_raises_and_explain_says_why():
    args = [None if t is None else t.detach().double() for t in arguments((2, 8), 24)][:5]
    with pytest.raises(ValueError, match="cannot serve"):
        fastattn.feed_forward(*args, backend="native")
    text = fastattn.explain("feed_forward", *args)
    assert "reference: runs" in text
    assert "native: no: " in text


def test_relu_of_nan_has_the_gradient_of_pytorch():
    args = arguments((3, 8), 24)
    with torch.no_grad():
        args[0][1, 2] = float("nan")
    dy = torch.ones(3, 8)
    expected = gradients(plain(args, "relu"), args, dy)[0]
    assert expected.isfinite().all()
    assert_close(gradients(call(args, activation="relu"), args, dy)[0], expected)
