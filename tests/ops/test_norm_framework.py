"""layer_norm and rms_norm inside PyTorch: raw ops, autograd, torch.func, torch.compile, autocast, and bad input."""

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import reference
from fastattn.ops._backends import use_backend, why_not_available, why_not_implemented
from fastattn.ops._random import draw_rng

OP = "norm"
OPS = torch.ops.fastattn
pytestmark = pytest.mark.filterwarnings("ignore:.*jit.*deprecated:DeprecationWarning")


def operands(*shape, dtype=torch.float32, device="cpu", grad=True, count=4):
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, shape, shape[-1:], shape[-1:], shape[-1:])[:count]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_(grad) for s in shapes]


def fused(x, residual, weight, bias, dropout_p=0.0, x_bias=None):
    return fastattn.layer_norm(
        x, weight, bias, x_bias=x_bias, residual=residual, dropout_p=dropout_p, return_residual=True
    )


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_raw_ops_keep_their_schema(raw_backend, device, rms, biased, plain):
    infer, fwd, bwd = (getattr(getattr(OPS, name), raw_backend) for name in ("norm_infer", "norm_fwd", "norm_bwd"))
    x, residual, weight, bias, x_bias = operands(3, 2, 20, device=device, grad=False, count=5)
    bias, x_bias = None if rms else bias, x_bias if biased else None
    residual, rng, dropout_p = (None, None, 0.0) if plain else (residual.half(), draw_rng(x.device), 0.3)
    arguments = (x, residual, weight, bias, rng, dropout_p, 1e-5, rms, x_bias)
    torch.library.opcheck(infer, arguments)
    torch.library.opcheck(fwd, arguments)
    y, r, stats = fwd(*arguments)
    assert torch.equal(y, infer(*arguments))
    dr_out = torch.randn_like(r) if r.numel() else None
    saved = (r if r.numel() else x, weight, stats, rng, dropout_p, rms)
    torch.library.opcheck(bwd, (torch.randn_like(y), dr_out, *saved, not plain, True, not rms, biased))
    torch.library.opcheck(bwd, (torch.randn_like(y), None, *saved, False, False, False))


def test_backward_of_another_backend(device):
    """A backend's backward can use what another backend's forward saved."""
    names = [name for name in ("native", "triton") if why_not_implemented(OP, name, device) is None]
    x, residual, weight, bias, x_bias = operands(6, 40, device=device, grad=False, count=5)
    dy, rng = torch.randn_like(x), draw_rng(x.device)
    results = []
    for forward in names:
        for backward in names:
            _, r, stats = getattr(OPS.norm_fwd, forward)(x, residual, weight, bias, rng, 0.2, 1e-5, False, x_bias)
            bwd = getattr(OPS.norm_bwd, backward)
            results.append(bwd(dy, dy, r, weight, stats, rng, 0.2, False, True, True, True, True))
    if len(results) < 2:
        pytest.skip(f"one raw backend on {device}: {names}")
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_gradcheck_in_fp64():
    torch.manual_seed(0)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (3, 5), (5,), (5,), (5,))]

    def seeded(x, residual, weight, bias, x_bias):
        torch.manual_seed(1)
        return fused(x, residual, weight, bias, 0.4, x_bias)

    assert torch.autograd.gradcheck(seeded, inputs)
    assert torch.autograd.gradgradcheck(seeded, inputs)
    assert torch.autograd.gradgradcheck(lambda x, r, w, b, xb: fastattn.rms_norm(x, w, x_bias=xb) * b.sum(), inputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_x_bias", [False, True])
def test_double_backward(backend, device, dropout_p, with_residual, with_x_bias):
    """create_graph=True on the kernels: second derivatives equal those of the reference in fp64."""
    inputs = operands(4, 12, device=device, count=5)

    def second(function, inputs):
        x, residual, weight, bias, x_bias = inputs
        residual, x_bias = residual if with_residual else None, x_bias if with_x_bias else None
        leaves = [t for t in (x, residual, weight, bias, x_bias) if t is not None]
        y, r = function(x, residual, weight, bias, x_bias)
        outputs = (y, r) if r is not x else (y,)
        first = torch.autograd.grad(outputs, leaves, [o.detach().cos() for o in outputs], create_graph=True)
        penalty = sum(g.square().sum() for g in first) + y.sin().sum()
        return *first, *torch.autograd.grad(penalty, leaves)

    def ours(x, residual, weight, bias, x_bias):
        torch.manual_seed(3)
        return fused(x, residual, weight, bias, dropout_p, x_bias)

    def exact(x, residual, weight, bias, x_bias):
        torch.manual_seed(3)
        rng = draw_rng(x.device) if dropout_p else None
        return reference.norm(x, residual, weight, bias, x_bias, eps=1e-5, rms=False, dropout_p=dropout_p, rng=rng)

    twins = [t.detach().double().requires_grad_() for t in inputs]
    for found, wanted in zip(second(ours, inputs), second(exact, twins), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_double_backward_of_inputs_that_depend_on_each_other(backend, device):
    x, *_ = operands(4, 12, device=device)

    def second(function, x):
        y = function(x, x.sin(), x[0] * x[1])
        (dx,) = torch.autograd.grad(y, x, y.detach().cos(), create_graph=True)
        return dx, *torch.autograd.grad(dx.square().sum(), x)

    found = second(lambda x, r, w: fastattn.layer_norm(x, w, residual=r), x)
    wanted = second(
        lambda x, r, w: reference.norm(x, r, w, eps=1e-5, rms=False)[0], x.detach().double().requires_grad_()
    )
    for ours, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_functorch(backend, device):
    x, _, weight, bias = operands(6, 10, device=device, grad=False)

    def loss(x, weight):
        return fastattn.layer_norm(x, weight, bias).square().sum()

    def torch_loss(x, weight):
        return F.layer_norm(x, (10,), weight, bias).square().sum()

    with use_backend("auto"):
        for transform in (
            lambda f: torch.func.grad(f, argnums=(0, 1))(x, weight),
            lambda f: torch.func.vmap(f, in_dims=(0, None))(x, weight),
            lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(0, None))(x, weight),
            lambda f: torch.func.jvp(f, (x, weight), (x.cos(), weight.cos())),
            lambda f: torch.func.hessian(f, argnums=1)(x, weight),
        ):
            torch.testing.assert_close(transform(loss), transform(torch_loss), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(backend, device, interpreted, dynamic):
    if interpreted:
        pytest.skip("the interpreter cannot run inside a compiled graph's kernels")
    torch._dynamo.reset()

    def block(x, residual, weight, bias):
        y, r = fused(x * 2, residual, weight, bias, x_bias=bias.cos())
        return fastattn.rms_norm(y, weight) + r

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (3, 5):
        inputs = operands(rows, 16, device=device)
        results = []
        for function in (block, compiled):
            y = function(*inputs)
            results.append((y, *torch.autograd.grad(y, inputs, y.detach().cos())))
        torch.testing.assert_close(results[0], results[1])


def test_compile_uses_the_kernels_also_backward():
    if why_not_available("native", "cpu"):
        pytest.skip(why_not_available("native", "cpu"))
    torch._dynamo.reset()
    called = []

    def note(graph, example_inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    compiler = aot_autograd(fw_compiler=lambda g, e: make_boxed_func(note(g, e)))
    inputs = operands(4, 8)
    compiled = torch.compile(lambda *t: fused(*t, 0.25)[0], backend=compiler, fullgraph=True)
    compiled(*inputs).sum().backward()
    assert any("norm_fwd" in name for name in called)
    assert any("norm_bwd" in name for name in called)


def test_inductor():
    """The only test here that runs the compiler."""
    torch._dynamo.reset()
    inputs = operands(8, 32)

    def block(x, residual, weight, bias):
        return F.gelu(fused(x, residual, weight, bias)[0]).square().sum()

    expected = torch.autograd.grad(block(*inputs), inputs)
    found = torch.autograd.grad(torch.compile(block, fullgraph=True)(*inputs), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_autocast_as_torch(backend, device):
    x, residual, weight, bias = operands(3, 24, device=device)
    half = x.bfloat16() if not (backend == "triton" and device == "cpu") else x.half()
    with torch.autocast(device, dtype=half.dtype):
        y = fastattn.layer_norm(half, weight, bias)
        expected = F.layer_norm(half, (24,), weight, bias)
        _, r = fastattn.layer_norm(half, weight, bias, residual=residual, return_residual=True)
    assert (y.dtype, r.dtype) == (expected.dtype, torch.float32)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_inference_mode_and_no_grad(backend, device):
    x, residual, weight, bias = operands(3, 24, device=device)
    expected = fused(x, residual, weight, bias)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            found = fused(x, residual, weight, bias)
            y = fastattn.layer_norm(x, weight, bias)
        assert not any(t.requires_grad for t in (*found, y))
        torch.testing.assert_close(found, tuple(t.detach() for t in expected))
    x = x.detach()
    assert not fastattn.layer_norm(x).requires_grad
    assert fastattn.layer_norm(x, weight).requires_grad


def test_deterministic_algorithms(backend, device):
    """The mode is allowed, and no result depends on uninitialised memory: fresh tensors are filled with NaN."""
    inputs = operands(40, 100, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        y, r = fused(*inputs)
        grads = torch.autograd.grad((y, r), inputs, (y.detach(), r.detach()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(t.isnan().any() for t in (y, r, *grads))


def test_inputs_are_not_changed(backend, device):
    inputs = operands(5, 30, device=device)
    copies = [t.detach().clone() for t in inputs]
    y, r = fused(*inputs, 0.1)
    torch.autograd.backward((y, r), (y.detach(), r.detach()))
    assert all(torch.equal(t, copy) for t, copy in zip(inputs, copies, strict=True))


X, W = torch.randn(2, 6), torch.randn(6)
BAD_CALLS = {
    "weight of another width": (
        lambda: fastattn.layer_norm(X, torch.ones(5)),
        r"layer_norm: weight must have shape \(6,\), the last dimension of x, got \(5,\)",
    ),
    "weight with two dimensions": (
        lambda: fastattn.rms_norm(X, torch.ones(2, 6)),
        r"rms_norm: weight must have shape \(6,\), .* got \(2, 6\)",
    ),
    "bias of another width": (
        lambda: fastattn.layer_norm(X, W, torch.ones(1)),
        r"bias must have shape \(6,\), .* got \(1,\)",
    ),
    "x_bias of the shape of x": (
        lambda: fastattn.rms_norm(X, x_bias=X),
        r"x_bias must have shape \(6,\), the last dimension of x, got \(2, 6\)",
    ),
    "x_bias elsewhere": (
        lambda: fastattn.layer_norm(X, x_bias=W.to("meta")),
        "x_bias must be on the device of x, cpu, got meta",
    ),
    "fp64 x_bias on a kernel": (
        lambda: fastattn.layer_norm(X, x_bias=W.double(), backend="native"),
        "cannot serve this call: it supports float32, bfloat16 and float16, got torch.float64",
    ),
    "residual of another shape": (
        lambda: fastattn.layer_norm(X, residual=torch.ones(6)),
        r"residual must have shape \(2, 6\), the shape of x, got \(6,\)",
    ),
    "integers": (
        lambda: fastattn.layer_norm(torch.ones(2, 6, dtype=torch.int64)),
        r"floating-point tensor .* got torch.int64 \(2, 6\)",
    ),
    "no dimension": (lambda: fastattn.rms_norm(torch.tensor(1.0)), r"at least one dimension, got torch.float32 \(\)"),
    "weight elsewhere": (
        lambda: fastattn.layer_norm(X, torch.ones(6, device="meta")),
        "weight must be on the device of x, cpu, got meta",
    ),
    "residual elsewhere": (
        lambda: fastattn.layer_norm(X, residual=X.to("meta")),
        "residual must be on the device of x, cpu, got meta",
    ),
    "dropout above 1": (lambda: fastattn.layer_norm(X, dropout_p=1.5), "dropout_p must be between 0 and 1, got 1.5"),
    "dropout below 0": (lambda: fastattn.rms_norm(X, dropout_p=-0.1), "dropout_p must be between 0 and 1, got -0.1"),
    "dropout NaN": (lambda: fastattn.rms_norm(X, dropout_p=float("nan")), "dropout_p must be between 0 and 1, got nan"),
    "unknown backend": (
        lambda: fastattn.layer_norm(X, backend="cuda"),
        "backend must be one of native, triton, reference or auto, got 'cuda'",
    ),
    "fp64 on a kernel": (
        lambda: fastattn.layer_norm(X.double(), backend="native"),
        "'native' was asked for but cannot serve this call: ",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_raw_ops_check_again(device):
    """Below the public function, the wrappers refuse what would read outside an operand."""
    if why_not_available("native", device):
        pytest.skip(why_not_available("native", device))
    x, weight = torch.randn(4, 8, device=device), torch.randn(8, device=device)
    for arguments, message in (
        ((x, None, weight[:5], None, None, 0.0, 1e-5, False), "weight"),
        ((x, x[:2], weight, None, None, 0.0, 1e-5, False), "residual"),
        ((x, None, weight, None, None, 0.0, 1e-5, False, weight[:5]), "x_bias"),
        ((x.double(), None, None, None, None, 0.0, 1e-5, False), "x must be float32, bfloat16 or float16"),
        ((x, None, weight, None, torch.zeros(1, dtype=torch.int64, device=device), 0.5, 1e-5, False), "rng"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.norm_infer.native(*arguments)
