"""The raw norm and dropout ops of the GPU kernels against the reference in fp64.

triton: on a GPU, or on CPU tensors in a process with TRITON_INTERPRET=1. native: on a GPU. emulated: the sources of the
native kernels and their wrappers, compiled for the CPU; used if there is no GPU.
"""

import random

import emulate_cuda
import pytest
import torch
from memory_guard import guarded
from norm_cases import rows_case
from oracle import assert_accurate

import fastattn
from fastattn import reference

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5


class Kernels:
    def __init__(self, name, namespace, overload):
        self.name = name
        for op in ("norm_infer", "norm_fwd", "norm_bwd", "dropout_fwd"):
            setattr(self, op, getattr(getattr(namespace, op), overload))

    def counted(self, monkeypatch):
        """A function that returns the number of kernels launched since its last call."""
        if self.name == "emulated":
            emulate_cuda.load.launches()
            return emulate_cuda.load.launches
        from triton.runtime import interpreter

        launched, launch = [], interpreter.GridExecutor.__call__

        def noted(*args, **kwargs):
            launched.append(True)
            return launch(*args, **kwargs)

        def launches():
            count = len(launched)
            launched.clear()
            return count

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted)
        return launches


@pytest.fixture(scope="module", params=["triton", "native", "emulated"])
def kernels(request):
    if request.param == "emulated":
        reason = emulate_cuda.why_not_available()
        if reason or DEVICE == "cuda":
            pytest.skip(reason or "there is a GPU: the native kernels run on it")
        return Kernels("emulated", emulate_cuda.load(), "native")
    reason = fastattn.backends()[DEVICE][request.param]
    if request.param == "native" and DEVICE == "cpu":
        pytest.skip("no GPU")
    if reason != "available":
        pytest.skip(f"{request.param} cannot run here: {reason}")
    return Kernels(request.param, torch.ops.fastattn, request.param)


def skip_interpreted(kernels, reason):
    if kernels.name == "triton" and DEVICE == "cpu":
        pytest.skip(reason)


def make_case(*args, **kwargs):
    return rows_case(*args, **kwargs, device=DEVICE)


# Widths on both sides of every boundary in the kernels' tables. Rows of more than 8192 and 16384 columns are read in
# pieces; so is 2051, which is not aligned, in the native backward.
@pytest.mark.parametrize(
    ("rows", "cols"),
    [(1, 1), (3, 8), (17, 64), (5, 100), (9, 128), (7, 264), (6, 768), (5, 1000), (3, 1023), (3, 2048), (2, 2056),
     (3, 2051), (2, 4096), (2, 8200), (1, 16400), (1, 65537)],
)  # fmt: skip
def test_widths(kernels, rows, cols):
    if cols > 10000 or cols == 2051:
        skip_interpreted(kernels, "slow in the interpreter, where test_norm.py has such widths")
    for x_bias in (FP32,) if cols > 10000 else (None, FP32):
        make_case(rows, cols, FP32, FP32, dropout_p=0.1, seed=cols, x_bias=x_bias).check_raw(kernels)


def test_more_wide_rows_than_are_in_flight(kernels, monkeypatch):
    """Sums over more rows than a strip of columns processes at once; the last iteration is not full."""
    rows, cols = 140, 8200
    if kernels.name == "triton" and DEVICE == "cpu":
        from fastattn.kernels.common import Launch

        strip = Launch(8, 64, 16)
        monkeypatch.setattr("fastattn.kernels.norm_bwd.STRIP", strip)  # 128 rows at a time are slow in the interpreter
        rows, cols = 21, 4104
    make_case(rows, cols, FP32, x_bias=FP32).check_raw(kernels)


def test_x_bias_changes_nothing_else(kernels):
    """dx_bias does not change the bits of other gradients, for rows held in registers and for wide rows."""
    for cols in (96, 2056, 8200):
        case = make_case(40 if cols < 100 else 3, cols, FP32, FP32, dropout_p=0.1, x_bias=FP32)
        _, r, stats = kernels.norm_fwd(*case.arguments())
        rest = (case.dy, case.dr_out, r, case.weight, stats, case.rng, case.dropout_p, False, True, True, True)
        *plain, none = kernels.norm_bwd(*rest)
        *beside, dx_bias = kernels.norm_bwd(*rest, True)
        assert none.shape == (0,)
        assert all(torch.equal(a, b) for a, b in zip(plain, beside, strict=True))
        torch.testing.assert_close(dx_bias.double(), plain[0].double().sum(0), rtol=1e-5, atol=1e-5)
        (alone,) = (t for t in kernels.norm_bwd(*rest[:8], False, False, False, True)[1:] if t.numel())
        assert torch.equal(alone, dx_bias)


@pytest.mark.parametrize("x_bias", [None, FP32])
@pytest.mark.parametrize("cols", [100, 1024, 4096, 20000])
def test_number_of_launches(kernels, monkeypatch, x_bias, cols):
    """One launch forward; backward one, and one more for the sums over rows, whatever the width."""
    if DEVICE == "cuda":
        pytest.skip("launches are counted in the emulation and in the interpreter")
    case = make_case(3, cols, FP16, FP32, dropout_p=0.1, x_bias=x_bias)
    launches = kernels.counted(monkeypatch)
    _, r, stats = kernels.norm_fwd(*case.arguments())
    assert launches() == 1
    kernels.norm_infer(*case.arguments())
    assert launches() == 1
    rest = (case.dy, case.dr_out, r, case.weight, stats, case.rng, case.dropout_p, False, True)
    kernels.norm_bwd(*rest, True, True, x_bias is not None)
    assert launches() == 2
    kernels.norm_bwd(*rest, False, False, False)
    assert launches() == 1


@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("p", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(
    ("x", "residual"),
    [(FP32, None), (FP16, None), (BF16, None), (FP32, FP32), (FP16, FP16), (BF16, BF16), (FP16, FP32), (BF16, FP32),
     (FP32, FP16), (FP16, BF16), (BF16, FP16)],
)  # fmt: skip
def test_dtypes(kernels, x, residual, p, rms):
    skip_interpreted(kernels, "test_norm.py has these in the interpreter")
    make_case(11, 136, x, residual, weight=residual or x, bias=FP32, rms=rms, dropout_p=p, seed=7).check_raw(kernels)
    make_case(11, 136, x, residual, weight=residual or x, bias=x, rms=rms, dropout_p=p, seed=8, x_bias=x).check_raw(
        kernels
    )


def test_random_cases(kernels):
    skip_interpreted(kernels, "test_norm.py has these in the interpreter")
    for seed in range(20):
        r = random.Random(seed)
        x = r.choice([FP32, FP16])
        residual, weight, bias, x_bias = (r.choice([None, FP32, FP16]) for _ in range(4))
        rows, cols, rms = r.randint(8, 70), r.randint(1, 600), r.random() < 0.5
        p, dr_out = r.choice([0.0, 0.1, 0.9]), r.random() < 0.5
        case = make_case(
            rows,
            cols,
            x,
            residual,
            weight=weight,
            bias=bias,
            x_bias=x_bias,
            rms=rms,
            dropout_p=p,
            dr_out=dr_out,
            seed=seed,
        )
        try:
            case.check_raw(kernels)
        except AssertionError as error:
            raise AssertionError(
                f"seed {seed}: {rows}x{cols} {x} {residual} {weight} {bias} {x_bias} rms={rms}"
            ) from error


@pytest.mark.parametrize("cols", [96, 100])
@pytest.mark.parametrize(("offset", "gap"), [(0, 8), (1, 3), (0, 0)])
def test_nothing_outside_the_operands_is_read(kernels, cols, offset, gap):
    case = make_case(13, cols, FP32, FP32, dropout_p=0.1, x_bias=FP32)
    want = case.check_raw(kernels)
    for name in ("x", "residual", "dy", "dr_out"):
        setattr(case, name, guarded(getattr(case, name), offset, gap))
    case.weight, case.bias, case.x_bias = (guarded(t[None], offset)[0] for t in (case.weight, case.bias, case.x_bias))
    for got, expected in zip(case.check_raw(kernels), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # another code path may round differently


def test_expanded_operands(kernels):
    case = make_case(6, 64, FP32, FP32, dropout_p=0.1)
    case.x, case.dy = case.x[:1].expand(6, 64), case.dy[:, :1].expand(6, 64)
    case.residual = case.residual[:, ::2].repeat(1, 2).t().contiguous().t()
    case.weight = case.weight[:1].expand(64)
    y, r, stats = kernels.norm_fwd(*case.arguments())
    dense = [t.contiguous() if isinstance(t, torch.Tensor) else t for t in case.arguments()]
    for got, want in zip((y, r, stats), kernels.norm_fwd(*dense), strict=True):
        assert torch.equal(got, want)
    rest = (stats, case.rng, case.dropout_p, case.rms, True, True, True, True)
    got = kernels.norm_bwd(case.dy, case.dr_out.t().contiguous().t(), r, case.weight, *rest)
    want = kernels.norm_bwd(case.dy.contiguous(), case.dr_out, r, case.weight.contiguous(), *rest)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (4, 0)])
def test_empty(kernels, shape):
    x, cols = torch.empty(shape, device=DEVICE), shape[-1]
    rows = 0
    weight = torch.ones(cols, device=DEVICE)
    y, r, stats = kernels.norm_fwd(x, x, weight, None, None, 0.0, EPS, False)
    assert (y.shape, r.shape, stats.shape) == (shape, shape, (2, rows))
    grads = kernels.norm_bwd(x, None, r, weight, stats, None, 0.0, False, True, True, True, True)
    assert [tuple(g.shape) for g in grads] == [shape, shape, (cols,), (cols,), (cols,)]
    assert not any(g.any() for g in grads[2:])


def test_more_dimensions_and_no_optional_gradient(kernels):
    case = make_case(12, 40, FP32, FP32)
    flat = kernels.norm_fwd(*case.arguments())
    shaped = kernels.norm_fwd(case.x.view(2, 3, 2, 40), case.residual.view(2, 3, 2, 40), *case.arguments()[2:])
    assert shaped[0].shape == (2, 3, 2, 40)
    assert torch.equal(shaped[0].view(12, 40), flat[0])
    dx, *others = kernels.norm_bwd(case.dy, None, flat[1], case.weight, flat[2], None, 0.0, False, False, False, False)
    assert [tuple(t.shape) for t in others] == [(0,)] * 4
    full = kernels.norm_bwd(case.dy, None, flat[1], case.weight, flat[2], None, 0.0, False, True, True, True)
    assert torch.equal(dx, full[0])


@pytest.mark.parametrize(("rows", "cols"), [(3, 8), (5, 100), (300, 7), (2, 4100)])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_keeps_what_the_reference_keeps(kernels, rows, cols, p):
    rng = torch.tensor([-(2**40) + cols, 2**35 + 3], device=DEVICE)
    out = kernels.dropout_fwd(torch.ones(rows, cols, device=DEVICE), None, rng, p)
    row = torch.arange(rows, device=DEVICE)
    keep = reference.philox_keep(rng, p, row, row >> 32, cols)
    assert torch.equal(out, keep * torch.tensor(reference.dropout_scale(p), device=DEVICE))


@pytest.mark.parametrize(("x", "residual"), [(FP32, FP32), (FP16, FP32), (FP32, FP16), (BF16, BF16)])
def test_dropout_with_residual(kernels, x, residual):
    if BF16 in (x, residual):
        skip_interpreted(kernels, "the interpreter truncates when it stores bf16")
    case = make_case(9, 72, x, residual, dropout_p=0.3)
    args = case.x, case.dropout_p, case.residual, case.rng
    exact = reference.dropout(case.x.double(), case.dropout_p, case.residual.double(), case.rng)
    assert_accurate(
        kernels.dropout_fwd(case.x, case.residual, case.rng, case.dropout_p), exact, reference.dropout(*args)
    )


def test_rounding_of_r_comes_before_the_statistics(kernels):
    case = make_case(4, 64, FP32, FP16, dropout_p=0.1)
    y, r, _ = kernels.norm_fwd(*case.arguments())
    again = kernels.norm_infer(r.float(), None, case.weight, case.bias, None, 0.0, EPS, False)
    torch.testing.assert_close(y, again, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # numpy's
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("cols", [8, 100, 8200])  # in registers, and read again
def test_rows_that_have_no_variance_in_fp32(kernels, rms, cols):
    """Too large squares give zeros; NaN and infinities stay visible. A maximum would drop NaN."""
    x = torch.randn(6, cols, device=DEVICE)
    x[1], x[2] = x[1] * 1e25, x[2] * 1e30
    x[3, 5], x[4, 5] = torch.nan, torch.inf
    weight = torch.ones(cols, device=DEVICE)
    y, _, stats = kernels.norm_fwd(x, None, weight, None, None, 0.0, EPS, rms)
    torch.testing.assert_close(y, reference.norm(x, None, weight, eps=EPS, rms=rms)[0], equal_nan=True)
    assert (y[1:3] == 0).all()
    assert (stats[-1, 1:3] == 0).all()
    dx = kernels.norm_bwd(torch.ones_like(y), None, x, weight, stats, None, 0.0, rms, False, True, False)[0]
    assert (dx[1:3] == 0).all()
    assert dx[[0, 5]].isfinite().all()
