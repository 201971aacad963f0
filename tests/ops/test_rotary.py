"""rotary_embedding on every available backend: results, positions, forms of the tables, in place, bad input."""

import pytest
import torch
from memory_guard import guarded
from oracle import BACKWARD, assert_accurate
from processes import run_code
from rotary_cases import FP32, doubled, randn, rotate_half, tables

import fastattn
from fastattn import reference
from fastattn.ops._backends import why_not_available
from fastattn.ops.rotary import rotate_tokens

OP = "rotary"
OPS = torch.ops.fastattn
pytestmark = pytest.mark.filterwarnings("ignore:.*jit.*deprecated:DeprecationWarning")


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


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_number_for_each_channel(backend, device, packed, interleaved):
    """Halves of the tables that differ, with gradients: y = x * cos + turned(x) * sin, as Hugging Face computes it."""
    cos, sin = randn(2, 5, 24, device=device), randn(2, 5, 24, device=device, seed=1)
    q, k = randn(2, 3, 5, 32, device=device), randn(2, 1, 5, 32, device=device, seed=2)
    if packed:
        (q, k), (cos, sin) = (t[0].transpose(0, 1) for t in (q, k)), (cos[0], sin[0])

    def composition(x):
        part, c, s = x[..., :24], *(t.unsqueeze(1) for t in (cos, sin))
        if interleaved:
            turned = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
        else:
            turned = torch.cat((-part[..., 12:], part[..., :12]), -1)
        return torch.cat((part * c + turned * s, x[..., 24:]), -1)

    xs = tuple(x.detach().requires_grad_() for x in (q, k))
    ours = rotate_tokens(xs, cos, sin, 24, interleaved=interleaved)
    theirs = tuple(map(composition, xs))
    dys = [randn(*x.shape, device=device, seed=3) for x in xs]
    grads = zip(*(torch.autograd.grad(out, xs, dys, create_graph=True) for out in (ours, theirs)), strict=True)
    for a, b in (*zip(ours, theirs, strict=True), *grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_every_second_column(backend, device, interleaved):
    """The real and imaginary parts of complex numbers."""
    turn = randn(2, 5, 12, 2, device=device)
    x = randn(2, 3, 5, 32, device=device)
    (got,) = rotate_tokens((x,), *turn.unbind(-1), 24, interleaved=interleaved)
    (want,) = rotate_tokens((x,), *turn.movedim(-1, 0).contiguous(), 24, interleaved=interleaved)
    assert torch.equal(got, want)


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
