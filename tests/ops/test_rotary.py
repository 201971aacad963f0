"""rotary_embedding on every available backend: results, positions, forms of the tables, in place, bad input."""

import pytest
import torch
from memory_guard import guarded
from oracle import BACKWARD, assert_accurate
from processes import run_code

import fastattn
from fastattn import reference
from fastattn.ops._backends import use_backend, why_not_available, why_not_implemented

OP = "rotary"
OPS = torch.ops.fastattn
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.filterwarnings("ignore:.*jit.*deprecated:DeprecationWarning")


def tables(rows, rotary_dim, dtype=FP32, device="cpu"):
    inv_freq = 10000.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angle = torch.outer(torch.arange(rows, dtype=torch.float64), inv_freq)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def randn(*shape, dtype=FP32, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def rotate_half(x, cos, sin):
    """The composition of Hugging Face, with doubled tables."""
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat((-x2, x1), -1) * sin


def doubled(t):
    return torch.cat((t, t), -1)


def check(x, cos, sin, positions=None, interleaved=False):
    """Forward and backward of one tensor within the project's error rule."""
    x = x.detach().requires_grad_()
    options = {"positions": positions, "interleaved": interleaved}
    y = fastattn.rotary_embedding(x, cos, sin, **options)
    dy = randn(*x.shape, dtype=x.dtype, device=x.device, seed=1)
    (dx,) = torch.autograd.grad(y, x, dy)
    if isinstance(positions, int):
        options |= {"positions": None, "offset": positions}
    exact = reference.rotary_embedding(x.detach().double(), cos, sin, **options)
    own = reference.rotary_embedding(x.detach(), cos, sin, **options)
    assert_accurate(y, exact, own, what="y")
    exact = reference.rotary_embedding(dy.double(), cos, -sin, **options)
    own = reference.rotary_embedding(dy, cos, -sin, **options)
    assert_accurate(dx, exact, own, factor=BACKWARD, what="dx")
    return y.detach()


def test_reference_is_a_rotation_by_complex_numbers():
    x = randn(2, 3, 5, 10).double()
    cos, sin = (t.double() for t in tables(9, 8))
    turn = torch.complex(cos, sin)[2:7]
    split = torch.complex(x[..., :4], x[..., 4:8]) * turn
    want = torch.cat((split.real, split.imag, x[..., 8:]), -1)
    torch.testing.assert_close(reference.rotary_embedding(x, cos, sin, offset=2), want)
    pairs = torch.view_as_real(torch.view_as_complex(x[..., :8].unflatten(-1, (4, 2)).contiguous()) * turn).flatten(-2)
    want = torch.cat((pairs, x[..., 8:]), -1)
    torch.testing.assert_close(reference.rotary_embedding(x, cos, sin, offset=2, interleaved=True), want)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(2, 2), (64, 64), (128, 128), (80, 32), (67, 20), (33, 6), (96, 96), (300, 280)]
)
def test_widths(backend, device, dtype, head_dim, rotary_dim, interleaved):
    check(randn(2, 3, 19, head_dim, dtype=dtype, device=device), *tables(23, rotary_dim, device=device), 4, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("seqlen", [1, 16, 33])
def test_tables_in_the_dtype_of_x(backend, device, dtype, seqlen, interleaved):
    x = randn(2, 2, seqlen, 48, dtype=dtype, device=device)
    check(x, *tables(seqlen, 32, dtype, device), interleaved=interleaved)


def test_other_table_dtypes_run_on_the_reference():
    x, (cos, sin) = randn(1, 2, 4, 8), tables(4, 8, torch.float64)
    assert "cos and sin in float32 or the dtype of x" in fastattn.explain("rotary_embedding", x, cos, sin)
    check(x, cos, sin)


VIEWS = {
    "bshd": lambda **s: randn(2, 9, 4, 32, **s).transpose(1, 2),
    "slice of qkv": lambda **s: randn(2, 9, 3, 4, 32, **s)[:, :, 1].transpose(1, 2),
    "every second token": lambda **s: randn(2, 4, 18, 32, **s)[:, :, ::2],
    "sbhd": lambda **s: randn(9, 2, 4, 32, **s).permute(1, 2, 0, 3),
    "last stride 2": lambda **s: randn(2, 4, 9, 64, **s)[..., ::2],
    "transposed last": lambda **s: randn(2, 4, 32, 9, **s).mT,
    "expanded": lambda **s: randn(2, 1, 9, 32, **s).expand(2, 4, 9, 32),
    "misaligned": lambda **s: guarded(randn(2, 4, 9, 32, **s), offset=1, gap=3),
    "columns of a wider head": lambda **s: randn(2, 4, 9, 50, **s)[..., 3:35],
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", VIEWS)
def test_strides(backend, device, name, interleaved):
    x = VIEWS[name]().to(device)
    y = check(x, *tables(9, 24, device=device), interleaved=interleaved)
    if name in ("bshd", "sbhd") and backend != "reference":
        assert y.stride() == x.stride()
    if name == "slice of qkv" and backend != "reference":
        assert y.transpose(1, 2).is_contiguous()
    dense = fastattn.rotary_embedding(x.contiguous(), *tables(9, 24, device=device), interleaved=interleaved)
    torch.testing.assert_close(y, dense, rtol=1e-6, atol=1e-6)


def test_stride_0_gradients(backend, device):
    x, (cos, sin) = randn(2, 3, 5, 16, device=device).requires_grad_(), tables(5, 16, device=device)
    fastattn.rotary_embedding(x, cos, sin).sum().backward()
    torch.testing.assert_close(x.grad, reference.rotary_embedding(torch.ones_like(x), cos, -sin))


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_pair_is_its_two_tensors(backend, device, interleaved):
    """q and k with grouped heads and another layout; gradients of both, and of one alone."""
    q = randn(2, 7, 6, 32, device=device).transpose(1, 2).requires_grad_()
    k = randn(2, 2, 7, 32, device=device, seed=1).requires_grad_()
    cos, sin = tables(40, 24, device=device)
    positions = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(2)).to(device)
    options = {"positions": positions, "interleaved": interleaved}
    pair = fastattn.rotary_embedding((q, k), cos, sin, **options)
    single = [fastattn.rotary_embedding(t, cos, sin, **options) for t in (q, k)]
    assert isinstance(pair, tuple)
    assert all(torch.equal(a, b) for a, b in zip(pair, single, strict=True))
    for outputs, expected in ((pair, single), (pair[:1], single[:1]), (pair[1:], single[1:])):
        grads, wanted = (
            torch.autograd.grad(o, (q, k), [t.detach().cos() for t in o], retain_graph=True, allow_unused=True)
            for o in (outputs, expected)
        )
        for a, b in zip(grads, wanted, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


class TestPositions:
    def rotate(self, x, positions, device, **options):
        return fastattn.rotary_embedding(x, *tables(50, 16, device=device), positions=positions, **options)

    def test_int_and_tensors_agree(self, backend, device):
        x = randn(3, 2, 5, 16, device=device)
        want = self.rotate(x, 7, device)
        row = torch.arange(7, 12, device=device)
        for positions in (row, row.int(), row[None], row.expand(3, 5), row.expand(3, 5).int(), row.repeat(3, 1)):
            assert torch.equal(self.rotate(x, positions, device), want)
        spread = torch.arange(7, 17, device=device)[::2] - torch.arange(5, device=device)
        assert torch.equal(self.rotate(x, spread, device), want)
        assert torch.equal(self.rotate(x, 0, device), self.rotate(x, None, device))

    def test_per_sequence(self, backend, device):
        x = randn(3, 2, 5, 16, device=device)
        positions = torch.tensor([0, 20, 45], device=device)[:, None] + torch.arange(5, device=device)
        got = self.rotate(x, positions, device)
        for b, offset in enumerate((0, 20, 45)):
            torch.testing.assert_close(got[b : b + 1], self.rotate(x[b : b + 1], offset, device), rtol=0, atol=1e-6)

    def test_decode_equals_the_full_sequence(self, backend, device):
        x = randn(2, 3, 12, 16, device=device)
        full = self.rotate(x, None, device)
        for step in (0, 5, 11):
            one = x[:, :, step : step + 1]
            where = torch.full((2, 1), step, device=device, dtype=torch.int32)
            for positions in (step, where):
                torch.testing.assert_close(
                    self.rotate(one, positions, device), full[:, :, step : step + 1], rtol=0, atol=1e-6
                )

    def test_packed(self, backend, device):
        lengths = (4, 1, 6)
        sequences = [randn(1, 3, n, 16, device=device, seed=n) for n in lengths]
        packed = torch.cat([s[0].transpose(0, 1) for s in sequences])
        positions = torch.cat([torch.arange(n) for n in lengths]).int().to(device)
        got = self.rotate(packed, positions, device)
        want = torch.cat([self.rotate(s, None, device)[0].transpose(0, 1) for s in sequences])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        assert torch.equal(self.rotate(packed, positions[None], device), got)
        # without positions, tokens are numbered in order: tables may have a row per token
        cos, sin = (t[positions.long()] for t in tables(50, 16, device=device))
        assert torch.equal(fastattn.rotary_embedding(packed, cos, sin), got)

    @pytest.mark.parametrize("interleaved", [False, True])
    def test_scores_depend_on_the_distance_alone(self, backend, device, interleaved):
        q, k = randn(1, 1, 1, 16, device=device), randn(1, 1, 1, 16, device=device, seed=1)

        def score(m, n):
            a, b = (self.rotate(t, p, device, interleaved=interleaved) for t, p in ((q, m), (k, n)))
            return (a * b).sum().item()

        for shift in (1, 7, 30):
            assert score(12 + shift, 5 + shift) == pytest.approx(score(12, 5), abs=1e-5)
        assert abs(score(12, 6) - score(12, 5)) > 1e-3

    def test_outside_of_the_table(self, backend, device):
        x = randn(2, 2, 3, 16, device=device)
        for bad in (-1, 50):
            positions = torch.tensor([[0, 1, 2], [3, bad, 5]], device=device)
            if device == "cpu":
                with pytest.raises(ValueError, match=f"within the 50 rows of cos, got .*{bad}"):
                    self.rotate(x, positions, device)
            else:
                nan = self.rotate(x, positions, device).isnan()
                assert nan[1, :, 1].all()
                assert nan.sum() == 32


@pytest.mark.parametrize("table_dtype", [FP32, None], ids=["fp32", "dtype of x"])
def test_hugging_face_tables(backend, device, dtype, table_dtype):
    x = randn(2, 3, 9, 32, dtype=dtype, device=device)
    cos, sin = tables(9, 32, table_dtype or dtype, device)
    want = fastattn.rotary_embedding(x, cos, sin)
    own = rotate_half(x.double(), doubled(cos).double(), doubled(sin).double())
    torch.testing.assert_close(want.double(), own, rtol=1e-2, atol=1e-5 if dtype == FP32 else 2e-2)
    both = doubled(cos), doubled(sin)
    per_token = [t.expand(2, 9, 32) for t in both]
    shifted = [torch.stack((t, t.roll(1, 0))) for t in both]
    for form in (both, [t[None] for t in both], per_token, [t.contiguous() for t in per_token]):
        assert torch.equal(fastattn.rotary_embedding(x, *form), want)
    got = fastattn.rotary_embedding(x, *shifted)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], fastattn.rotary_embedding(x, *(t[1] for t in shifted))[1])
    positions = torch.arange(9, device=device).flip(0)
    assert torch.equal(
        fastattn.rotary_embedding(x, *both, positions=positions),
        fastattn.rotary_embedding(x, cos, sin, positions=positions),
    )
    wide = torch.cat((x, x), -1)  # three dimensions state rotary_dim even if it differs from head_dim
    got = fastattn.rotary_embedding(wide, *per_token)
    assert torch.equal(got[..., :32], want)
    assert torch.equal(got[..., 32:], x)


def test_no_table_is_read_past_its_end():
    """The tables end where readable memory ends: a lane of a block past the last token must not read there."""
    reason = why_not_available("triton", "cpu")
    if reason:
        pytest.skip(reason)
    run_code("""
import ctypes, mmap
import torch, fastattn
libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
def at_the_end(tensor):
    memory = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0) == 0
    count = tensor.numel()
    there = torch.frombuffer(memory, dtype=torch.float32, count=count, offset=page - count * 4)
    return there.view_as(tensor).copy_(tensor)
cos, sin = (at_the_end(torch.rand(2, 5, 16)) for _ in range(2))
x = torch.rand(2, 2, 5, 32)
got = fastattn.rotary_embedding(x, cos, sin, backend="triton")
torch.testing.assert_close(got, fastattn.rotary_embedding(x, cos, sin, backend="reference"))
""", TRITON_INTERPRET="1")  # fmt: skip


def test_tables_of_any_strides(backend, device):
    x, (cos, sin) = randn(1, 2, 6, 16, device=device), tables(6, 16, device=device)
    want = fastattn.rotary_embedding(x, cos, sin)
    wide = randn(6, 40, device=device)
    wide[:, 3:11], wide[:, 20:28] = cos, sin
    for form in ((wide[:, 3:11], wide[:, 20:28]), (cos.t().contiguous().t(), sin), (wide[:, 3:11], sin)):
        assert torch.equal(fastattn.rotary_embedding(x, *form), want)


class TestInPlace:
    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize("name", ["bshd", "slice of qkv", "every second token", "last stride 2", "misaligned"])
    def test_writes_into_x_and_nothing_else(self, backend, device, name, interleaved):
        x = VIEWS[name]().to(device)
        x = x if x.stride() == VIEWS[name]().stride() else pytest.skip("the copy to the device lost the strides")
        base = x if x._base is None else x._base
        before, want = (
            base.clone(),
            fastattn.rotary_embedding(x, *tables(9, 24, device=device), interleaved=interleaved),
        )
        pointer, version = x.data_ptr(), x._version
        y = fastattn.rotary_embedding(x, *tables(9, 24, device=device), interleaved=interleaved, inplace=True)
        assert y is x
        assert x.data_ptr() == pointer
        assert x._version > version
        assert torch.equal(x, want)
        before.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(want)
        assert torch.equal(base.nan_to_num(), before.nan_to_num())

    def test_pair_in_a_projection(self, backend, device):
        cos, sin = tables(9, 16, device=device)

        def step(weight, inplace):
            qkv = (randn(2, 9, 8, device=device) @ weight).view(2, 9, 3, 2, 16)
            q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
            q, k = fastattn.rotary_embedding((q, k), cos, sin, inplace=inplace)
            if inplace:
                assert q._base is not None
                assert q._base.data_ptr() == qkv.data_ptr()
            (dweight,) = torch.autograd.grad((q.sin() + k.cos() * v).sum(), weight)
            return q.detach(), dweight

        weight = randn(8, 96, device=device).requires_grad_()
        torch.testing.assert_close(step(weight, True), step(weight, False))

    def test_pair_without_gradients_is_rotated_in_both(self, backend, device):
        q, k, (cos, sin) = (
            randn(2, 4, 5, 16, device=device),
            randn(2, 1, 5, 16, device=device),
            tables(5, 16, device=device),
        )
        want = fastattn.rotary_embedding((q, k), cos, sin)
        got = fastattn.rotary_embedding([q, k], cos, sin, inplace=True)
        assert got[0] is q
        assert got[1] is k
        assert torch.equal(q, want[0])
        assert torch.equal(k, want[1])
        with torch.inference_mode():
            x = q.clone()
            assert torch.equal(
                fastattn.rotary_embedding(x, cos, sin, inplace=True), fastattn.rotary_embedding(q, cos, sin)
            )

    def test_autograd_notices(self, backend, device):
        x, (cos, sin) = randn(1, 2, 5, 16, device=device).requires_grad_(), tables(5, 16, device=device)
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            fastattn.rotary_embedding(x, cos, sin, inplace=True)
        y = x.exp()  # saves its result
        fastattn.rotary_embedding(y, cos, sin, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        y = x.exp()
        with torch.no_grad():
            fastattn.rotary_embedding(y, cos, sin, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


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
    "pair of two dtypes": (lambda f: f((X, X.half()), COS, SIN), ValueError, "one dtype and device, got torch.float32"),
    "cos and sin differ": (lambda f: f(X, COS, SIN[:5]), ValueError, r"one shape and dtype, got \(9, 4\) .*\(5, 4\)"),
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
