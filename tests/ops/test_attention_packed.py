"""Packed sequences: rows outside all sequences, and a number of programs that grows with the number of rows only."""

import random

import pytest
import torch
from memory_guard import leave_nan

import fastattn
from fastattn.ops._backends import why_not_available

try:
    import triton
    import triton.language as tl

    from fastattn.kernels.attention_frame import find_tile
except ImportError:
    triton = None

OP = "attention"


@pytest.fixture
def unwritten_memory_is_nan():
    """Memory that an op allocates and does not write is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def packed_call(lens_q, lens_k, behind_q, behind_k, device, *, heads=2, kv_heads=1, dim=16, dim_v=24, bshd=True,
                **options):  # fmt: skip
    """q, k, v and cotangents, with NaN in the rows after the last sequence, and the options of the call."""
    generator = torch.Generator().manual_seed(len(lens_q))

    def rows(lens, behind, n_heads, last):
        t = torch.randn(sum(lens) + behind, n_heads, last, generator=generator)
        t[sum(lens) :] = float("nan")
        return (t if bshd else t.transpose(0, 1).contiguous().transpose(0, 1)).to(device)

    tensors = [
        rows(lens_q, behind_q, heads, dim), rows(lens_k, behind_k, kv_heads, dim),
        rows(lens_k, behind_k, kv_heads, dim_v), rows(lens_q, behind_q, heads, dim_v),
        rows(lens_q, behind_q, heads, 1)[..., 0].T,
    ]  # fmt: skip
    for name, lens in (("cu_seqlens_q", lens_q), ("cu_seqlens_k", lens_k)):
        options[name] = torch.tensor([0, *lens]).cumsum(0).int().to(device)
    if options.get("sink") is not None:
        options["sink"] = torch.randn(heads, generator=generator).to(device).requires_grad_()
    return tensors, options


def results(tensors, options):
    """out, lse and the gradients of q, k, v and sink."""
    q, k, v, do, dlse = tensors
    leave_nan(*(t.shape for t in (q, k, v, do)))
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    torch.manual_seed(0)
    out, lse = fastattn.attention(*leaves, return_lse=True, **options)
    leaves += [options["sink"]] if options.get("sink") is not None else []
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, (do, dlse))


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("options", [
    {"causal": True, "sink": True}, {"sink": True, "softcap": 2.0, "dropout_p": 0.3}, {"window": (5, 2), "bshd": False},
], ids=["sink", "features", "window"])  # fmt: skip
@pytest.mark.parametrize(
    ("lens_q", "lens_k", "behind_q", "behind_k"),
    [([3, 0, 70], [10, 4, 50], 130, 0), ([7], [9], 0, 140), ([5, 0], [64, 0], 59, 64), ([], [], 70, 3)],
    ids=["many_queries", "many_keys", "empty_last", "no_sequence"],
)  # fmt: skip
def test_rows_of_no_sequence_are_zeros_and_touch_nothing(backend, device, options, lens_q, lens_k, behind_q, behind_k):
    if not lens_q and backend == "reference":
        pytest.skip("autograd finds no way from the results of no sequence to the inputs")
    tensors, options = packed_call(lens_q, lens_k, behind_q, behind_k, device, **options)
    total_q, total_k = sum(lens_q), sum(lens_k)
    out, lse, *grads = results(tensors, options)
    assert (out[total_q:] == 0).all()
    assert (lse[:, total_q:] == -float("inf")).all()
    for grad, total in zip(grads, (total_q, total_k, total_k), strict=False):
        assert (grad[total:] == 0).all()

    q, k, v, do, dlse = tensors
    cut = q[:total_q], k[:total_k], v[:total_k], do[:total_q], dlse[:, :total_q]
    for got, expected in zip((out, lse.T, *grads), results(cut, options), strict=True):
        expected = expected.T if expected.dim() == 2 else expected
        torch.testing.assert_close(got[: len(expected)], expected, rtol=0, atol=1e-6, equal_nan=False)


def random_packing(seed):
    """Lengths that are often empty, equal, or a multiple of a block, so that bounds of tiles and sequences coincide."""
    draw = random.Random(seed)
    lengths = draw.choice([(0, 1), (0, 1, 2, 63, 64, 65), (64,), (128, 0), (0, 7, 200), (0,)])
    return [draw.choice(lengths) for _ in range(draw.choice([1, 2, 4]))], draw


@pytest.mark.parametrize("seed", range(8))
def test_random_packings(seed, backend, device):
    lens_q, draw = random_packing(seed)
    lens_k = [draw.choice([n, n, 0, n + 3]) for n in lens_q]
    tensors, options = packed_call(
        lens_q, lens_k, draw.choice([0, 1, 64]), draw.choice([0, 65]), device, kv_heads=2,
        causal=draw.random() < 0.5, max_seqlen_q=draw.choice([None, 300]),
    )  # fmt: skip
    wanted = results(tensors, options | {"backend": "reference"})
    for got, expected in zip(results(tensors, options), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


if triton is not None:

    @triton.jit
    def find_all(cu_seqlens, asked, found, tiles, total, BLOCK: tl.constexpr):
        pid = tl.program_id(0)
        sequence, tile, within = find_tile(cu_seqlens, tiles, total, tl.load(asked + pid), BLOCK)
        tl.store(found + 3 * pid, sequence.to(tl.int32))
        tl.store(found + 3 * pid + 1, tile)
        tl.store(found + 3 * pid + 2, within.to(tl.int32))


@pytest.mark.parametrize("count", [0, 1, 2, 128, 129, 20000])
def test_every_tile_finds_its_sequence(count):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if reason := why_not_available("triton", device):
        pytest.skip(reason)
    draw, block = random.Random(count), 16
    lengths = torch.tensor([draw.choice([0, 0, 1, block - 1, block, block + 1, 3 * block]) for _ in range(count)])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths]).cumsum(0).int()
    total = int(ends[-1]) + draw.choice([0, 1, 3 * block])
    tiles = total // block + count + 1
    asked = range(tiles) if tiles < 500 else [0, tiles - 1, *draw.sample(range(tiles), 200)]
    found = torch.empty(len(asked), 3, dtype=torch.int32, device=device)
    find_all[(len(asked),)](
        ends.to(device), torch.tensor(asked, dtype=torch.int32, device=device), found, tiles, total, BLOCK=block
    )
    sequence_of_row = torch.searchsorted(ends[1:].contiguous(), torch.arange(total, dtype=torch.int32), right=True)
    covered = torch.zeros(total, dtype=torch.int32)
    for sequence, tile, within in found.tolist():
        assert 0 <= sequence <= count
        assert within == (sequence < count)
        first, end = int(ends[sequence]) + tile * block, int(ends[sequence + 1]) if within else total
        assert (sequence_of_row[first : min(first + block, end)] == sequence).all()
        covered[first : min(first + block, end)] += 1
    assert (covered == 1).all() if len(asked) == tiles else covered.max() == 1


@pytest.fixture
def recorded(monkeypatch):
    """Records the grids of Triton's attention kernels as on a GPU with TMA; no kernel runs."""
    if reason := why_not_available("triton", "cpu"):
        pytest.skip(reason)
    from fastattn.kernels import attention_bwd, attention_call, attention_fwd

    grids = {}

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **constants: grids.setdefault(self.name, (grid[0], args, constants))

    attention_call.plan_for.cache_clear()
    for module, name in (
        (attention_fwd, "attention_fwd_kernel"), (attention_bwd, "attention_preprocess_kernel"),
        (attention_bwd, "attention_dkdv_kernel"), (attention_bwd, "attention_dq_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Recorder(name))
    yield grids
    attention_call.plan_for.cache_clear()


@pytest.mark.parametrize("max_seqlen", [None, 5000])
@pytest.mark.parametrize(("count", "length"), [(1, 4096), (256, 256), (1000, 1), (3, 0)])
def test_programs_grow_with_rows_and_sequences_and_not_with_their_product(recorded, count, length, max_seqlen):
    heads, kv_heads, total = 4, 2, count * length + 50
    q, k = torch.zeros(total, heads, 16, requires_grad=True), torch.zeros(total, kv_heads, 16)
    ends = torch.arange(0, count + 1, dtype=torch.int32) * length
    out = fastattn.attention(
        q, k, k, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, causal=True,
        backend="triton",
    )  # fmt: skip
    out.backward(out)
    assert len(recorded) == 4
    for name, (programs, args, constants) in recorded.items():
        by_keys = name == "attention_dkdv_kernel"
        form = args[-1]
        block = constants.get("BLOCK_M") or int(form.BLOCK_N if by_keys else form.BLOCK_M)
        most = (total // block + count + 1) * (kv_heads if by_keys else heads)
        assert 0 < programs <= most, name
