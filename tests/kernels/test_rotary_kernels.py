"""The CUDA C++ rotary kernels and their wrappers, emulated on the CPU, against the reference in fp64.

On a GPU, test_rotary.py tests them as the native backend.
"""

import emulate_cuda
import pytest
import torch
from memory_guard import guarded
from oracle import assert_accurate

from fastattn import reference
from fastattn.ops.rotary import _conjugate

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def ops():
    reason = emulate_cuda.why_not_available()
    if reason or torch.cuda.is_available():
        pytest.skip(reason or "there is a GPU: the native kernels run on it")
    return emulate_cuda.load()


def randn(*shape, dtype=FP32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables(rows, rotary_dim, dtype=FP32):
    angle = 3 * randn(rows, rotary_dim // 2, seed=9)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def check(ops, q, k, cos, sin, positions=None, offset=0, interleaved=False, conjugate=False, rotary_dim=None):
    """Check both results against the error rule, and that the in-place results are the same."""
    rotary_dim = rotary_dim or 2 * cos.shape[-1]
    rest = (cos, sin, positions, offset, rotary_dim, interleaved, conjugate)
    outs = ops.rotary_fwd.native(q, k, *rest)
    if conjugate:
        sin = _conjugate(sin, rotary_dim, interleaved)
    options = {"positions": positions, "offset": offset, "interleaved": interleaved, "rotary_dim": rotary_dim}
    for x, out in zip((q, k), outs, strict=True):
        if x is None:
            assert out.shape == (0,)
            continue
        exact = reference.rotary_embedding(x.double(), cos, sin, **options)
        own = reference.rotary_embedding(x, cos, sin, **options)
        assert_accurate(out, exact, own)
    copies = [None if x is None else x.clone(memory_format=torch.contiguous_format) for x in (q, k)]
    ops.rotary_fwd_.native(*copies, *rest)
    for copy, out in zip(copies, outs, strict=True):
        assert copy is None or torch.equal(copy, out)
    return outs


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("x_dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("table_dtype", [FP32, None])
def test_dtypes(ops, x_dtype, table_dtype, interleaved):
    q, k = randn(2, 5, 7, 64, dtype=x_dtype), randn(2, 2, 7, 64, dtype=x_dtype, seed=1)
    check(ops, q, k, *tables(9, 64, table_dtype or x_dtype), offset=2, interleaved=interleaved)


# pairs and copied channels on both sides of a group of 8, of 32 lanes, and of a multiple of either
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [(2, 2), (10, 6), (16, 16), (67, 20), (128, 32), (96, 96), (40, 26), (560, 528), (600, 16), (530, 530)],
)
def test_widths(ops, head_dim, rotary_dim, interleaved):
    for dtype in (FP32, FP16):
        q = randn(2, 3, 5, head_dim, dtype=dtype)
        check(ops, q, None, *tables(5, rotary_dim), interleaved=interleaved)


@pytest.mark.parametrize("heads", [(1, 0), (4, 4), (5, 3), (9, 1), (3, 8)])
def test_heads(ops, heads):
    q, k = randn(1, heads[0], 3, 32, dtype=BF16), randn(1, heads[1], 3, 32, dtype=BF16, seed=1)
    check(ops, q, k if heads[1] else None, *tables(3, 32), conjugate=True)


def test_many_tokens_leave_the_heads_to_a_loop(ops):
    check(ops, randn(2, 9, 4500, 16, dtype=FP16), randn(2, 5, 4500, 16, dtype=FP16), *tables(4500, 8))


@pytest.mark.parametrize("interleaved", [False, True])
def test_positions(ops, interleaved):
    q, k = randn(3, 4, 5, 32), randn(3, 1, 5, 32, seed=1)
    cos, sin = tables(40, 24)
    positions = torch.randint(0, 40, (3, 5), generator=torch.Generator().manual_seed(1))
    for form in (positions, positions.int(), positions[:1], positions[0].int(), positions.t().contiguous().t()):
        check(ops, q, k, cos, sin, form, interleaved=interleaved)
    packed = q.transpose(1, 2).flatten(0, 1)
    got, _ = ops.rotary_fwd.native(packed, None, cos, sin, positions.flatten(), 0, 24, interleaved, False)
    want, _ = ops.rotary_fwd.native(q, None, cos, sin, positions, 0, 24, interleaved, False)
    assert torch.equal(got, want.transpose(1, 2).flatten(0, 1))
    per_token = cos[positions], sin[positions]
    assert torch.equal(ops.rotary_fwd.native(q, None, *per_token, None, 0, 24, interleaved, False)[0], want)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (67, 20), (600, 528)])
def test_a_number_for_each_channel(ops, head_dim, rotary_dim, interleaved):
    """Both directions, tables in rows of wider tensors, and those whose columns are two apart."""
    q, k = randn(2, 5, 7, head_dim, dtype=FP16), randn(2, 2, 7, head_dim, dtype=FP16, seed=1)
    cos, sin = randn(2, 2, 7, 2 * rotary_dim, seed=2)
    for columns in (slice(rotary_dim), slice(3, rotary_dim + 3), slice(None, None, 2)):
        for dtype in (FP32, FP16):
            given = [t.to(dtype)[..., columns] for t in (cos, sin)]
            check(ops, q, k, *given, interleaved=interleaved, rotary_dim=rotary_dim)
            check(ops, q, k, *given, interleaved=interleaved, conjugate=True, rotary_dim=rotary_dim)


def test_a_position_outside_of_the_tables_gives_nan(ops):
    q, (cos, sin) = randn(1, 2, 4, 24), tables(6, 16)
    rest = (cos, sin, torch.tensor([0, -1, 6, 5]), 0, 16, False, False)
    out, _ = ops.rotary_fwd.native(guarded(q), None, *rest)
    assert out[:, :, 1:3, :16].isnan().all()
    assert not out[:, :, ::3].isnan().any()
    assert torch.equal(out[..., 16:], q[..., 16:])


@pytest.mark.parametrize(("offset", "gap"), [(0, 8), (1, 0), (8, 3)])
@pytest.mark.parametrize("rotary_dim", [64, 40, 22])
def test_nothing_outside_the_operands_is_read(ops, rotary_dim, offset, gap):
    q, k = randn(2, 3, 5, 64, dtype=FP16), randn(2, 1, 5, 64, dtype=FP16)
    cos, sin = tables(5, rotary_dim)
    for interleaved in (False, True):
        rest = (None, 0, rotary_dim, interleaved, False)
        want = ops.rotary_fwd.native(q, k, cos, sin, *rest)
        got = ops.rotary_fwd.native(*(guarded(t, offset, gap) for t in (q, k, cos, sin)), *rest)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_layouts(ops):
    cos, sin = tables(6, 32)
    for x in (randn(2, 6, 3, 32).transpose(1, 2), randn(6, 2, 3, 32).permute(1, 2, 0, 3), randn(2, 3, 6, 32)):
        out = check(ops, x, None, cos, sin)[0]
        assert out.stride() == x.stride()
    qkv = randn(2, 6, 3, 4, 32)
    q, k = (qkv[:, :, i].transpose(1, 2) for i in range(2))
    want = check(ops, q, k, cos, sin)
    v = qkv[:, :, 2].clone()
    ops.rotary_fwd_.native(q, k, cos, sin, None, 0, 32, False, False)
    assert torch.equal(q, want[0])
    assert torch.equal(k, want[1])
    assert torch.equal(qkv[:, :, 2], v)
    for x in (randn(2, 3, 32, 6).mT, randn(2, 1, 6, 32).expand(2, 3, 6, 32)):
        check(ops, x, None, cos, sin)
    with pytest.raises(RuntimeError, match="rotated in place must have last stride 1"):
        ops.rotary_fwd_.native(randn(2, 3, 32, 6).mT, None, cos, sin, None, 0, 32, False, False)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8), (0, 2, 8)])
def test_empty(ops, shape):
    assert ops.rotary_fwd.native(torch.empty(shape), None, *tables(5, 8), None, 0, 8, False, False)[0].shape == shape


def test_what_the_kernels_do_not_take(ops):
    with pytest.raises(RuntimeError, match="cos and sin must be float32 or of the dtype of q"):
        ops.rotary_fwd.native(randn(1, 1, 2, 8), None, *tables(2, 8, FP16), None, 0, 8, False, False)
