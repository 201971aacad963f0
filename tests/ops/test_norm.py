"""layer_norm and rms_norm with dropout and residual: numerical results on every available backend."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from memory_guard import guarded
from norm_cases import Case, random_case
from oracle import assert_accurate, exact
from processes import run_code
from threads import same_bits

import fastattn
from fastattn import reference
from fastattn._native import CPU_CAPABILITIES
from fastattn.ops._backends import why_not_available
from fastattn.ops._random import draw_rng
from fastattn.ops._register import apply
from fastattn.ops.norm import _Norm

OP = "norm"
OPS = torch.ops.fastattn


def case(
    shape, dtype=torch.float32, device="cpu", residual=None, weight=True, bias=True, x_bias=False, shift=0.0, **options
):
    """A case in which all operands require gradients; residual is a dtype or None."""
    generator = torch.Generator().manual_seed(1)

    def tensor(*size, dtype=dtype, shift=0.0, grad=True):
        return (torch.randn(*size, generator=generator) + shift).to(device, dtype).requires_grad_(grad)

    cols = shape[-1]
    return Case(
        x=tensor(*shape, shift=shift),
        residual=None if residual is None else tensor(*shape, dtype=residual),
        weight=tensor(cols) if weight else None,
        bias=tensor(cols) if bias and not options.get("rms") else None,
        x_bias=tensor(cols) if x_bias else None,
        dy=tensor(*shape, grad=False),
        dr_out=tensor(*shape, dtype=residual or dtype, grad=False),
        **options,
    )


def forward_backward(c):
    leaves = [t for t in c.inputs if t is not None]
    outputs = c.ours(c.inputs)
    grads = torch.autograd.grad(outputs, leaves, [c.dy, c.dr_out][: len(outputs)])
    return (*outputs, *grads)


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("block", range(10))
def test_random_cases(backend, device, interpreted, block):
    """200 cases on a compiled backend, 50 on the reference, 30 in Triton's interpreter."""
    dtypes = (torch.float32, torch.float16) if interpreted else (torch.float32, torch.bfloat16, torch.float16)
    for seed in range(20 * block, 20 * block + (3 if interpreted else 5 if backend == "reference" else 20)):
        c = random_case(seed, dtypes, device)
        try:
            c.check()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, x {c.x.dtype} {tuple(c.x.shape)}: {error}") from error


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_dtypes(backend, device, dtype, rms, fused):
    options = {"residual": dtype, "dropout_p": 0.1, "return_residual": True} if fused else {}
    case((50, 300), dtype, device, rms=rms, **options).check()


@pytest.mark.parametrize(
    ("rows", "cols"),
    [(1, 65536), (2, 65535), (1, 65537), (3, 40000), (9, 3000), (4099, 1), (2000, 7), (150, 513)],
)  # fmt: skip
def test_extreme_shapes(backend, device, interpreted, rows, cols):
    if interpreted and (rows > 100 or cols in (40000, 65536)):
        pytest.skip("slow in the interpreter, and the kernels take the other widths the same way")
    fused = {"residual": torch.float32, "x_bias": True, "dropout_p": 0.1, "return_residual": True}
    case((rows, cols), device=device, **fused).check()
    if not interpreted or cols == 65535:
        case((rows, cols), device=device, rms=True, x_bias=True).check()


X_BIAS_FORMS = {
    "alone": {},
    "dropout": {"dropout_p": 0.2},
    "post-norm": {"residual": True, "dropout_p": 0.2},
    "pre-norm": {"residual": True, "dropout_p": 0.2, "return_residual": True},
    "no dropout": {"residual": True, "return_residual": True},
}


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("form", X_BIAS_FORMS)
def test_x_bias(backend, device, dtype, form, rms):
    options = dict(X_BIAS_FORMS[form])
    residual = dtype if options.pop("residual", False) else None
    case((70, 200), dtype, device, residual=residual, x_bias=True, rms=rms, **options).check()


@pytest.mark.parametrize("form", X_BIAS_FORMS)
def test_x_bias_is_as_if_added_before(backend, device, form):
    """The bits in fp32 are those of an outer addition, and the gradient is the column sum of dx."""
    options = dict(X_BIAS_FORMS[form])
    residual = torch.float32 if options.pop("residual", False) else None
    c = case((37, 130), device=device, residual=residual, x_bias=True, **options)
    *inside, dx_bias = forward_backward(c)
    outside = forward_backward(replace(c, x=(c.x + c.x_bias).detach().requires_grad_(), x_bias=None))
    assert equal(inside, outside)
    dx = inside[1 + c.return_residual]
    torch.testing.assert_close(dx_bias.double(), dx.double().sum(0), rtol=1e-5, atol=1e-5)


def test_x_plus_x_bias_is_not_rounded(backend, device):
    x, x_bias = torch.full((3, 16), 2048.0, device=device).half(), torch.full((16,), 0.5, device=device).half()
    residual = torch.zeros(3, 16, device=device)
    _, r = fastattn.layer_norm(x, x_bias=x_bias, residual=residual, return_residual=True)
    assert torch.equal(r, residual + 2048.5)
    _, r = fastattn.rms_norm(x, x_bias=x_bias, dropout_p=0.5, return_residual=True)
    assert torch.equal(r[r != 0], torch.full_like(r, 4097).half()[r != 0])  # rounded once, after the scale of 2


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 4)])
@pytest.mark.parametrize("fused", [False, True])
def test_empty(backend, device, shape, fused):
    options = {"residual": torch.float32, "dropout_p": 0.1, "return_residual": True} if fused else {}
    c = case(shape, device=device, x_bias=fused, **options)
    results = forward_backward(c)
    inputs = [t for t in c.inputs if t is not None]
    assert [r.shape for r in results] == [c.x.shape] * (1 + fused) + [t.shape for t in inputs]
    assert all(not r.any() for r in results)  # the gradients of weight and bias have elements, which are 0


@pytest.mark.parametrize("cols", [1, 100, 1000, 65537])
def test_constant_rows(backend, device, interpreted, cols):
    """They are centred to 0, whatever their mean; a rounded mean would leave a constant that rstd multiplies."""
    if interpreted and cols > 1000:
        cols = 16385  # also read in pieces
    x = torch.tensor([[5.0], [-3e4], [0.0], [4428.5715], [1e7 / 3]], device=device).expand(5, cols)
    bias = torch.randn(cols, device=device)
    torch.testing.assert_close(
        fastattn.layer_norm(x, torch.ones_like(bias), bias), bias.expand(5, cols), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(fastattn.layer_norm(x, eps=1e-12), torch.zeros(5, cols, device=device))
    torch.testing.assert_close(fastattn.rms_norm(x[:2]), torch.sign(x[:2]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("shift", [1e3, 3e4, 1e5])
def test_rows_far_from_zero(backend, device, dtype, rms, shift):
    if shift > 6e4 and dtype == torch.float16:
        pytest.skip("float16 ends at 65504")
    case((20, 777), dtype, device, rms=rms, shift=shift).check()
    if dtype == torch.float32:  # the mean is saved in fp32, and its rounding error is corrected
        x = (torch.randn(5, 777, generator=torch.Generator().manual_seed(2)) + shift).to(device)
        y = fastattn.layer_norm(x)
        torch.testing.assert_close(y.double(), F.layer_norm(x.double(), (777,)), rtol=0, atol=shift * 2**-23)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # numpy's
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("cols", [8, 9000])
def test_rows_whose_squares_exceed_fp32(backend, device, interpreted, rms, cols):
    """Such a row is divided by infinity, whatever the kernel, and other rows do not notice. So is PyTorch's RMSNorm."""
    generator = torch.Generator().manual_seed(2)
    for dtype in (torch.float32,) if interpreted else (torch.float32, torch.bfloat16):
        x, bias = torch.randn(4, cols, generator=generator), torch.randn(cols, generator=generator)
        x[1], x[2] = x[1] * 1e25, x[2] * 1e30
        x, bias = (t.to(device, dtype).requires_grad_() for t in (x, bias))
        weight = torch.ones_like(bias).requires_grad_()
        y = fastattn.rms_norm(x, weight) if rms else fastattn.layer_norm(x, weight, bias)
        assert torch.equal(y[1:3], torch.zeros_like(y[1:3]) if rms else bias.expand(2, cols))
        dx, dweight = torch.autograd.grad(y.square().sum(), (x, weight))
        assert (dx[1:3] == 0).all()
        others = x.detach()[::3].requires_grad_()
        expected = fastattn.rms_norm(others, weight) if rms else fastattn.layer_norm(others, weight, bias)
        assert torch.equal(y[::3], expected)
        assert torch.equal(dx[::3], torch.autograd.grad(expected.square().sum(), others)[0])
        assert dweight.isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # numpy's
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_what_is_not_finite_stays_visible(backend, device, rms, value):
    """A row with an infinity or NaN contains NaN, as in PyTorch; it is not hidden like too large a square."""
    x = torch.randn(3, 40)
    x[1, 7] = value
    weight = torch.ones(40)
    theirs = F.rms_norm(x, (40,), weight) if rms else F.layer_norm(x, (40,), weight)
    x, weight = x.to(device), weight.to(device)
    ours = fastattn.rms_norm(x, weight) if rms else fastattn.layer_norm(x, weight)
    assert torch.equal(ours.isnan().cpu(), theirs.isnan())


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 10.0, 1e8])
def test_eps(backend, device, eps):
    case((5, 64), device=device, eps=eps).check()
    case((5, 64), device=device, eps=eps, rms=True).check()


def test_default_eps_of_rms_norm(backend, device, dtype):
    x = (torch.randn(4, 32, device=device) * 1e-4).to(dtype)
    ours = fastattn.rms_norm(x)
    assert_accurate(
        ours, reference.norm(exact(x), eps=torch.finfo(torch.float32).eps, rms=True)[0], F.rms_norm(x, (32,))
    )


@pytest.mark.parametrize("mask", [m for m in itertools.product([False, True], repeat=5) if any(m)])
@pytest.mark.parametrize("residual", [torch.float16, torch.float32], ids=str)
def test_gradients_of_a_subset(backend, device, interpreted, residual, mask):
    if interpreted and residual == torch.float32 and sum(mask) not in (1, 4):
        pytest.skip("one and four gradients are enough in the interpreter")
    c = case((6, 40), device=device, residual=residual, x_bias=True, dropout_p=0.3, return_residual=True)
    everything = forward_backward(c)[2:]
    for tensor, wanted in zip(c.inputs, mask, strict=True):
        tensor.requires_grad_(wanted)
    wanted = [t for t in c.inputs if t.requires_grad]
    flowing = [(o, g) for o, g in zip(c.ours(c.inputs), (c.dy, c.dr_out), strict=True) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in flowing], wanted, [g for _, g in flowing])
    assert equal(grads, [g for g, m in zip(everything, mask, strict=True) if m])


def test_only_one_output_used(backend, device):
    c = case((6, 40), device=device, residual=torch.float32, return_residual=True)
    y, r = c.ours(c.inputs)
    (dx,) = torch.autograd.grad(r, c.x, c.dr_out, retain_graph=True)
    assert torch.equal(dx, c.dr_out)
    y0, _ = c.eager(c.inputs)
    torch.testing.assert_close(torch.autograd.grad(y, c.x, c.dy), torch.autograd.grad(y0, c.x, c.dy))


@pytest.mark.parametrize("create_graph", [False, True])
def test_parameters_of_an_unused_output_get_no_gradient(backend, device, create_graph):
    """None as in torch, not zeros: an optimizer with weight decay would change the parameter."""
    c = case((6, 40), device=device, residual=torch.float32, return_residual=True, x_bias=True)
    _, r = c.ours(c.inputs)
    of = (c.x, c.weight, c.bias)
    dx, dweight, dbias = torch.autograd.grad(r, of, c.dr_out, allow_unused=True, create_graph=create_graph)
    assert torch.equal(dx, c.dr_out)
    assert dweight is dbias is None


def test_a_last_bias_gets_no_gradient_of_second_order(backend, device):
    c = case((6, 40), device=device, residual=torch.float32)
    y = c.ours(c.inputs)
    (dx,) = torch.autograd.grad(y[0] if isinstance(y, tuple) else y, c.x, c.dy, create_graph=True)
    assert torch.autograd.grad(dx.square().sum(), c.bias, allow_unused=True) == (None,)


@pytest.mark.parametrize("fused", [False, True])
def test_expanded_gradients(backend, device, fused):
    options = {"residual": torch.float32, "dropout_p": 0.2, "return_residual": True} if fused else {}
    c = case((9, 70), device=device, **options)
    for row in (torch.randn(70, device=device), torch.randn(1, device=device)):
        c.dy = c.dr_out = row.expand(9, 70)
        strided = forward_backward(c)
        c.dy = c.dr_out = row.expand(9, 70).contiguous()
        if backend == "reference":  # PyTorch adds an expanded tensor in another order
            torch.testing.assert_close(strided, forward_backward(c))
        else:
            assert equal(strided, forward_backward(c))


@pytest.mark.parametrize("offset", [0, 1, 3, 5])
@pytest.mark.parametrize("cols", [1, 7, 63, 100, 520])
def test_reads_stay_inside(raw_backend, device, interpreted, offset, cols):
    """Operands inside arenas of NaN give the results of plain ones."""
    if interpreted and cols not in (7, 100):
        pytest.skip("two widths are enough in the interpreter")
    infer, fwd, bwd = (getattr(getattr(OPS, name), raw_backend) for name in ("norm_infer", "norm_fwd", "norm_bwd"))
    for dtype in (torch.float32, torch.float16):
        x, residual, dy, dr_out = torch.randn(4, 5, cols, device=device).to(dtype)
        weight, bias, x_bias = torch.randn(3, cols, device=device).to(dtype)
        rng = draw_rng(device)

        def run(x, residual, dy, dr_out, weight, bias, x_bias, rng=rng):
            y, r, stats = fwd(x, residual, weight, bias, rng, 0.1, 1e-5, False, x_bias)
            grads = bwd(dy, dr_out, r, weight, stats, rng, 0.1, False, True, True, True, True)
            plain = bwd(dy, None, x, weight, stats, None, 0.0, False, False, True, False)
            return y, r, stats, *grads, *plain, infer(x, None, weight, bias, None, 0.0, 1e-5, False)

        inside = [guarded(t, offset, gap=16) for t in (x, residual, dy, dr_out)]
        inside += [guarded(t, offset) for t in (weight, bias, x_bias)]
        results = run(*inside)
        assert not any(t.isnan().any() for t in results)
        assert equal(results, run(x, residual, dy, dr_out, weight, bias, x_bias))


@pytest.mark.parametrize(("rows", "cols"), [(3000, 129), (40, 20000)])
def test_same_bits_again_and_with_any_number_of_threads(device, rows, cols):
    fused = {"residual": torch.float32, "x_bias": True, "dropout_p": 0.1, "return_residual": True}
    c, alone = case((rows, cols), device=device, **fused), case((rows, cols), device=device)
    same_bits(lambda: forward_backward(c) + forward_backward(alone), (1, 2, 2, 3))


@pytest.mark.skipif(why_not_available("native", "cpu") is not None, reason="no C++ kernels")
@pytest.mark.parametrize("rms", [False, True])
def test_a_norm_alone_has_the_bits_of_the_general_node(rms):
    """In eager mode on a CPU it has a node of its own."""
    x, weight, bias, dy = torch.randn(7, 33), torch.randn(33), None if rms else torch.randn(33), torch.randn(7, 33)
    for flags in itertools.product([False, True], repeat=3):
        pairs = zip((x, weight, bias), flags, strict=True)
        leaves = [t if t is None else t.clone().requires_grad_(flag) for t, flag in pairs]
        of = [t for t in leaves if t is not None and t.requires_grad]
        if not of:
            continue
        y = fastattn.rms_norm(*leaves[:2], 1e-5) if rms else fastattn.layer_norm(*leaves, 1e-5)
        assert type(y.grad_fn).__name__ == "_PlainNormBackward"
        general, _, _ = apply(_Norm, leaves[0], None, *leaves[1:], None, None, 0.0, 1e-5, rms, "native")
        assert equal((y, *torch.autograd.grad(y, of, dy)), (general, *torch.autograd.grad(general, of, dy)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_results(device, dtype):
    """Results of 4 MiB and more are written past the caches, with the same bits for each row as in a small call."""
    rows, cols = (1100 if dtype == torch.float32 else 2100), 1024
    c = case((rows, cols), dtype, device, residual=dtype, return_residual=True)
    y, r, dx, dresidual, _, _ = forward_backward(c)
    for first in (0, 500, rows - 40):
        part = slice(first, first + 40)
        x, residual = (t[part].detach().requires_grad_() for t in (c.x, c.residual))
        small = replace(c, x=x, residual=residual, dy=c.dy[part], dr_out=c.dr_out[part])
        assert equal(forward_backward(small)[:4], [t[part] for t in (y, r, dx, dresidual)])


@pytest.mark.parametrize("dropout_p", [1e-6, 1e-5, 0.1, 0.5, 0.9, 0.99999, 1.0])
@pytest.mark.parametrize("cols", [1, 9, 64, 1500])
def test_dropout_mask(backend, device, cols, dropout_p):
    x, residual = torch.ones(2, 3, cols, device=device), torch.zeros(2, 3, cols, device=device)
    torch.manual_seed(5)
    rng = draw_rng(x.device)
    torch.manual_seed(5)
    x.requires_grad_()
    _, r = fastattn.layer_norm(x, residual=residual, dropout_p=dropout_p, return_residual=True)
    (dx,) = torch.autograd.grad(r, x, torch.ones_like(r))
    row = torch.arange(6, device=device)
    keep = reference.philox_keep(rng, dropout_p, row, row >> 32, cols).view(x.shape)
    assert torch.equal(r, keep * reference.dropout_scale(dropout_p))
    assert torch.equal(dx, r)


@pytest.mark.parametrize("dropout_p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(backend, device, dropout_p):
    x, residual = torch.randn(2, 5, 33, device=device)
    x[0, 0] = float("nan") if dropout_p else 0.0  # a dropped NaN is removed
    y, r = fastattn.layer_norm(x, residual=residual, dropout_p=dropout_p, return_residual=True)
    assert torch.equal(r, residual if dropout_p else x + residual)
    torch.testing.assert_close(y, F.layer_norm(r, (33,)))


def test_lower_instruction_sets():
    """Every lower variant of the kernels keeps to the error rule; all draw the same mask, also the one in use here."""
    if fastattn.backends()["cpu"]["native"] != "available":
        pytest.skip(fastattn.backends()["cpu"]["native"])
    mask = "fastattn.dropout(torch.ones(3, 1000), 0.3, backend='native').ne(0).nonzero().sum(0).tolist()"
    script = f"""
import torch, fastattn
from norm_cases import random_case
with fastattn.use_backend("native"):
    for seed in range(1000, 1005):
        random_case(seed, (torch.float32, torch.bfloat16, torch.float16)).check()
torch.manual_seed(0)
print({mask})
"""
    torch.manual_seed(0)
    printed = {f"{eval(mask)}\n"}
    for name in ("default", "avx2"):
        if CPU_CAPABILITIES.index(name) < CPU_CAPABILITIES.index(fastattn.cpu_capability()):
            printed.add(run_code(script, FASTATTN_CPU_CAPABILITY=name))
    assert len(printed) == 1
