"""rotary_embedding within PyTorch: derivatives, transforms, compiled, raw ops, empty and refused calls."""

import pytest
import torch
from rotary_cases import BF16, doubled, randn, rotate_half, tables

import fastattn
from fastattn import reference
from fastattn.ops._backends import use_backend, why_not_available, why_not_implemented

OP = "rotary"
OPS = torch.ops.fastattn
pytestmark = pytest.mark.filterwarnings("ignore:.*jit.*deprecated:DeprecationWarning")


def test_gradcheck_in_fp64():
    x = randn(2, 1, 3, 6).double().requires_grad_()
    cos, sin = (t.double().requires_grad_() for t in tables(6, 4))
    for interleaved, positions in ((False, 2), (True, torch.tensor([[0, 3, 1], [5, 5, 2]]))):

        def rotate(x, cos, sin, positions=positions, interleaved=interleaved):
            return fastattn.rotary_embedding(x, cos, sin, positions=positions, interleaved=interleaved)

        assert torch.autograd.gradcheck(rotate, (x, cos, sin))
        assert torch.autograd.gradgradcheck(rotate, (x, cos, sin))


def test_double_backward(backend, device):
    x, (cos, sin) = randn(2, 2, 5, 16, device=device).requires_grad_(), tables(5, 12, device=device)

    def second(function, x):
        y = function(x)
        (dx,) = torch.autograd.grad(y, x, x.sin(), create_graph=True)
        return dx, *torch.autograd.grad(dx.pow(3).sum() + y.cos().sum(), x)

    found = second(lambda x: fastattn.rotary_embedding(x, cos, sin), x)
    wanted = second(lambda x: reference.rotary_embedding(x, cos, sin), x.detach().double().requires_grad_())
    for ours, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_tables_that_want_gradients_run_on_the_reference(device):
    x, (cos, sin) = randn(1, 2, 4, 8, device=device), tables(4, 8, device=device)
    angle = torch.zeros(4, 4, device=device, requires_grad=True)
    y = fastattn.rotary_embedding(x, (angle + 1).cos(), (angle + 1).sin())
    (dangle,) = torch.autograd.grad(y.square().sum() + y[..., 0].sum(), angle)
    assert dangle.any()
    cos.requires_grad_()
    if why_not_available("native", device) is None:
        assert "native: no: it computes no gradients of cos and sin" in fastattn.explain(
            "rotary_embedding", x, cos, sin
        )
        with torch.no_grad():
            assert "native: runs" in fastattn.explain("rotary_embedding", x, cos, sin)


def test_functorch(backend, device):
    x, (cos, sin) = randn(3, 2, 4, 8, device=device), tables(4, 8, device=device)

    def ours(x):
        return fastattn.rotary_embedding(x, cos, sin).sin().sum()

    def theirs(x):
        return rotate_half(x, doubled(cos), doubled(sin)).sin().sum()

    with use_backend("auto"):
        for transform in (
            lambda f: torch.func.grad(f)(x),
            lambda f: torch.func.vmap(f)(x[:, None]),
            lambda f: torch.func.jvp(f, (x,), (x.cos(),)),
            lambda f: torch.func.hessian(f)(x[:1]),
        ):
            torch.testing.assert_close(transform(ours), transform(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["alone", "pair", "positions", "inplace"])
def test_raw_ops_keep_their_schema(raw_backend, device, form):
    fwd, fwd_ = (getattr(op, raw_backend) for op in (OPS.rotary_fwd, OPS.rotary_fwd_))
    q, k = randn(2, 5, 3, 16, device=device).transpose(1, 2), randn(2, 1, 5, 16, device=device)
    cos, sin = tables(9, 12, device=device)
    positions = torch.arange(10, device=device).view(2, 5) % 7 if form == "positions" else None
    rest = (cos, sin, positions, 0 if form == "positions" else 3, 12, form == "pair", form == "inplace")
    if form == "inplace":
        torch.library.opcheck(fwd_, (q.clone(), k.clone(), *rest))
        torch.library.opcheck(fwd_, (q.clone(), None, *rest))
    else:
        torch.library.opcheck(fwd, (q, None if form == "alone" else k, *rest))
        torch.library.opcheck(fwd, (q.transpose(1, 2)[0], None, *rest[:2], None, *rest[3:]))


def test_backends_agree(device):
    """In full precision only fused products distinguish the backends; a gradient may come from any."""
    names = [
        name
        for name in ("native", "triton", "reference")
        if name == "reference" or why_not_implemented(OP, name, device) is None
    ]
    x, (cos, sin) = randn(2, 3, 9, 40, device=device), tables(9, 32, device=device)
    for interleaved in (False, True):
        results = [fastattn.rotary_embedding(x, cos, sin, interleaved=interleaved, backend=name) for name in names]
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(backend, device, interpreted, dynamic):
    if interpreted:
        pytest.skip("the interpreter cannot run inside a compiled graph's kernels")
    torch._dynamo.reset()
    cos, sin = tables(16, 8, device=device)

    def block(q, k, offset):
        q, k = fastattn.rotary_embedding((q * 2, k), cos, sin, positions=offset)
        k = fastattn.rotary_embedding(k * 1, cos, sin, interleaved=True, inplace=True)
        return q.sum(1, keepdim=True) * k

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for seqlen, offset in ((3, 0), (5, 0), (7, 9)):
        q, k = (randn(2, heads, seqlen, 8, device=device).requires_grad_() for heads in (4, 1))
        results = []
        for function in (block, compiled):
            y = function(q, k, offset)
            results.append((y, *torch.autograd.grad(y, (q, k), y.detach().cos())))
        torch.testing.assert_close(results[0], results[1])


def test_compile_in_place_without_gradients(backend, device, interpreted):
    if interpreted:
        pytest.skip("the interpreter cannot run inside a compiled graph's kernels")
    torch._dynamo.reset()
    cos, sin = tables(16, 8, device=device)
    x = randn(2, 3, 5, 8, device=device)
    want = fastattn.rotary_embedding(x, cos, sin, positions=torch.arange(5, device=device))
    compiled = torch.compile(fastattn.rotary_embedding, backend="aot_eager", fullgraph=True)
    compiled(x, cos, sin, positions=torch.arange(5, device=device), inplace=True)
    assert torch.equal(x, want)


def test_autocast_changes_nothing(backend, device, dtype):
    x, (cos, sin) = randn(1, 2, 4, 8, dtype=dtype, device=device), tables(4, 8, device=device)
    want = fastattn.rotary_embedding(x, cos, sin)
    with torch.autocast(device, dtype=BF16):
        got = fastattn.rotary_embedding(x, cos, sin)
    assert got.dtype == dtype
    assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8), (0, 2, 8)])
def test_empty(backend, device, shape):
    x, (cos, sin) = torch.empty(shape, device=device, requires_grad=True), tables(5, 8, device=device)
    y = fastattn.rotary_embedding(x, cos, sin)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    full = randn(*(max(n, 1) for n in shape), device=device)[:, :, : shape[2]]
    if full.shape[2] == (x.shape[2] if x.dim() == 4 else 8) and full.shape[0] == shape[0]:
        pair = fastattn.rotary_embedding((full, x.detach()), cos, sin)
        assert torch.equal(pair[0], fastattn.rotary_embedding(full, cos, sin))


def test_deterministic_algorithms(backend, device):
    """No result depends on uninitialised memory: fresh tensors are filled with NaN."""
    x, (cos, sin) = randn(2, 3, 17, 37, device=device).requires_grad_(), tables(17, 22, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        y = fastattn.rotary_embedding(x, cos, sin)
        (dx,) = torch.autograd.grad(y, x, y.detach())
    finally:
        torch.use_deterministic_algorithms(False)
    assert not y.isnan().any()
    torch.testing.assert_close(dx, x.detach())  # rotated forward and back


X, (COS, SIN) = randn(2, 3, 5, 8), tables(9, 8)
BAD_CALLS = {
    "two dimensions": (lambda f: f(X[0, 0], COS, SIN), ValueError, r"x must be \(batch.* got \(5, 8\)"),
    "integers": (lambda f: f(X.long(), COS, SIN), TypeError, "floating-point dtype, got torch.int64"),
    "three tensors": (lambda f: f((X, X, X), COS, SIN), ValueError, "a pair of tensors, got 3 tensors"),
    "pair of two lengths": (
        lambda f: f((X, X[:, :, :4]), COS, SIN),
        ValueError,
        r"agree in all but the number of heads, got \(2, 3, 5, 8\) and \(2, 3, 4, 8\)",
    ),
    "pair of two layouts": (lambda f: f((X, X[0]), COS, SIN), ValueError, "agree in all but"),
    "pair of two dtypes": (
        lambda f: f((X, X.half()), COS, SIN),
        ValueError,
        "the same dtype and device, got torch.float32",
    ),
    "cos and sin differ": (
        lambda f: f(X, COS, SIN[:5]),
        ValueError,
        r"the same shape and dtype, got \(9, 4\) .*\(5, 4\)",
    ),
    "tables elsewhere": (
        lambda f: f(X, COS.to("meta"), SIN.to("meta")),
        ValueError,
        "must be on the device of x, cpu, got meta",
    ),
    "integer tables": (lambda f: f(X, COS.long(), SIN.long()), TypeError, "cos and sin must have a floating-point"),
    "too wide": (
        lambda f: f(X, *tables(9, 12)),
        ValueError,
        r"\(max_seqlen, rotary_dim / 2\), \(seqlen, 8\) or .* got \(9, 6\)",
    ),
    "one dimension": (lambda f: f(X, COS[0], SIN[0]), ValueError, r"got \(4,\)"),
    "odd doubled table": (lambda f: f(X, COS[None, :5, :3], SIN[None, :5, :3]), ValueError, "an even rotary_dim"),
    "empty table": (lambda f: f(X, COS[:, :0], SIN[:, :0]), ValueError, r"got \(9, 0\)"),
    "doubled and interleaved": (
        lambda f: f(X, doubled(COS), doubled(SIN), interleaved=True),
        ValueError,
        "doubled ones are ambiguous",
    ),
    "tables of other tokens": (
        lambda f: f(X, COS[None], SIN[None]),
        ValueError,
        r"2 or 1 rows of 5 tokens.*\(1, 9, 4\)",
    ),
    "tables of another batch": (
        lambda f: f(X, *(t[:5].expand(3, 5, 4) for t in (COS, SIN))),
        ValueError,
        r"2 or 1 rows of 5 tokens.*\(3, 5, 4\)",
    ),
    "positions beside a row per token": (
        lambda f: f(X, COS[None, :5], SIN[None, :5], positions=1),
        ValueError,
        "positions must be None",
    ),
    "more tokens than rows": (lambda f: f(X, COS[:4], SIN[:4]), ValueError, "within the 4 rows of cos, got 0 to 4"),
    "offset too large": (lambda f: f(X, COS, SIN, positions=5), ValueError, "within the 9 rows of cos, got 5 to 9"),
    "negative offset": (lambda f: f(X, COS, SIN, positions=-1), ValueError, "within the 9 rows of cos, got -1 to 3"),
    "float offset": (
        lambda f: f(X, COS, SIN, positions=1.0),
        TypeError,
        "positions must be a tensor or an integer or None, got float",
    ),
    "float positions": (
        lambda f: f(X, COS, SIN, positions=torch.zeros(5)),
        TypeError,
        "positions must be int32 or int64, got torch.float32",
    ),
    "positions of other tokens": (
        lambda f: f(X, COS, SIN, positions=torch.zeros(2, dtype=torch.int64)),
        ValueError,
        r"shape \(5,\) or \(2, 5\), like the tokens of x, got \(2,\)",
    ),
    "positions elsewhere": (
        lambda f: f(X, COS, SIN, positions=torch.zeros(5, dtype=torch.int64, device="meta")),
        ValueError,
        "positions must be on the device of x, cpu, got meta",
    ),
    "expanded in place": (
        lambda f: f(X[:, :1].expand(2, 3, 5, 8), COS, SIN, inplace=True),
        ValueError,
        "an expanded x cannot be rotated in place",
    ),
    **{
        f"{name} in place": (
            lambda f, make=make: f(make(X.clone()), COS, SIN, inplace=True),
            ValueError,
            "the two tensors must not share memory if they are rotated in place",
        )
        for name, make in {
            "one tensor twice": lambda x: (x, x),
            "a view": lambda x: (x, x.view_as(x)),
            "some heads": lambda x: (x, x[:, :1]),
            "overlapping channels": lambda x: (lambda wide: (wide[..., :8], wide[..., 7:15]))(torch.cat((x, x), -1)),
        }.items()
    },
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name):
    call, error, message = BAD_CALLS[name]
    for function in (fastattn.rotary_embedding, lambda *a, **o: fastattn.explain("rotary_embedding", *a, **o)):
        with pytest.raises(error, match=message):
            call(function)


def test_a_named_backend_that_cannot_serve_raises():
    for x in (X.double(), X.half()):
        with pytest.raises(ValueError, match="'native' was asked for but cannot serve this call: "):
            fastattn.rotary_embedding(x, COS.double(), SIN.double(), backend="native")


def test_raw_ops_check_again(device):
    """Below the public function, the wrappers refuse what would read outside an operand."""
    if why_not_available("native", device):
        pytest.skip(why_not_available("native", device))
    q, (cos, sin) = randn(2, 3, 5, 8, device=device), tables(9, 8, device=device)
    here = torch.zeros(5, dtype=torch.int64, device=device)
    rest = (False, False)
    bad = [
        ((q[0, 0], None, cos, sin, None, 0, 8, *rest), "q must have 3 or 4 dimensions, got 2"),
        ((q, q[:, :, :4], cos, sin, None, 0, 8, *rest), "k must have the shape of q except for the number of heads"),
        ((q, q.half(), cos, sin, None, 0, 8, *rest), "k must have the dtype and device of q"),
        ((q, None, cos, sin, None, 0, 10, *rest), "rotary_dim must be even, above 0 and at most 8, got 10"),
        ((q, None, cos[:, :3], sin[:, :3], None, 0, 8, *rest), "cos must have at least 4 columns, got 3"),
        ((q, None, cos, sin[:3], None, 0, 8, *rest), "sin must have the shape and dtype of cos"),
        ((q, None, cos, sin, None, 5, 8, *rest), "positions 5 to 9 must lie within the 9 rows of cos"),
        ((q, None, cos[None], sin[None], None, 0, 8, *rest), "cos must have 2 or 1 rows of 5 tokens"),
        ((q, None, cos, sin, here[:4], 0, 8, *rest), "positions must have 2 or 1 rows of 5, got 4 elements"),
        ((q, None, cos, sin, here.short(), 0, 8, *rest), "positions must be int32 or int64, got Short"),
        ((q.double(), None, cos, sin, None, 0, 8, *rest), "q must be float32, bfloat16 or float16"),
    ]
    if device == "cpu":
        bad.append(((q, None, cos, sin, here + 9, 0, 8, *rest), "position 9 must lie within the 9 rows of cos"))
    for arguments, message in bad:
        with pytest.raises(RuntimeError, match=message):
            OPS.rotary_fwd.native(*arguments)
    with pytest.raises(RuntimeError, match="rotated in place must have last stride 1"):
        OPS.rotary_fwd_.native(q.mT.contiguous().mT, None, cos, sin, None, 0, 8, *rest)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_in_place_on_tensors_that_a_backward_needs(pair, grad):
    """PyTorch can be told to clone them first, and notices writes."""
    x, factor = torch.randn(2, 2, 9, 8), torch.tensor(2.0, requires_grad=True)
    angle = torch.arange(9)[:, None] / torch.arange(1, 5)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        q, k = ((part * factor if grad else part.clone()) for part in x)
        loss = (q * factor).square().sum() + (k * factor).square().sum()
        q, k = (t[None] for t in (q, k))
        out = fastattn.rotary_embedding((q, k) if pair else q, angle.cos(), angle.sin(), inplace=True)
        rotated = sum(t.square().sum() for t in out) if pair else out.square().sum()
        (got,) = torch.autograd.grad(loss + rotated, factor)
    seen = x if pair else x[0]  # a rotation keeps its length
    expected = 2 * 2.0 * x.square().sum() if not grad else 4 * 2.0**3 * x.square().sum() + 2 * 2.0 * seen.square().sum()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        q[0], fastattn.rotary_embedding(x[:1] * (2.0 if grad else 1.0), angle.cos(), angle.sin())[0]
    )
