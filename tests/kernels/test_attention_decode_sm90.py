"""attention_decode on Hopper through the public function: on a Hopper GPU, or with its sources in the emulation."""

import importlib
import math

import emulate_cuda
import pytest
import torch
from decode_cases import check_call, random_case
from hopper import DEVICE, use_hopper_kernels
from memory_guard import guarded

import fastattn

# the module, not the function of the same name
decode_module = importlib.import_module("fastattn.ops.attention_decode")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def native(monkeypatch):
    places = [(decode_module._fwd, "attention_decode_fwd")]
    places += [(decode_module._append, "attention_decode_append")]
    use_hopper_kernels(monkeypatch, emulate_cuda.DECODE, places)


def case(seed, head_dim, **shapes):
    return random_case(
        seed, dtypes=HALVES, head_dims=(head_dim,), page_sizes=(64, 128, 192), plain=True,
        **({"lengths": (0, 1, 7, 63, 64, 65, 130, 300)} | shapes),
    )  # fmt: skip


def run(q, k_cache, v_cache, lengths, **kwargs):
    kwargs = {n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in kwargs.items()}
    return fastattn.attention_decode(
        q.to(DEVICE), k_cache.to(DEVICE), v_cache.to(DEVICE), cache_seqlens=lengths.to(DEVICE), return_lse=True,
        backend="native", **kwargs,
    )  # fmt: skip


def call(head_dim=64, capacity=300, lengths=(300, 77), n_heads=4, kv_heads=2, seqlen_q=1):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(len(lengths), heads, seqlen, head_dim, generator=generator).bfloat16()
        for heads, seqlen in ((n_heads, seqlen_q), (kv_heads, capacity), (kv_heads, capacity))
    )
    return q, k, v, torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("part", range(2))
def test_random_calls(part, head_dim, monkeypatch):
    for seed in range(part, 8, 2):
        check_call(f"seed {seed}", case(seed, head_dim), "native", monkeypatch, DEVICE)


@pytest.mark.parametrize("score", [1e4, 1e6, -1e9])
def test_equal_scores_however_large(score):
    """Splits of unequal length are weighted by their keys, because maximum and sum are stored separately."""
    q, k_cache, v_cache, lengths = call(lengths=(300, 200))
    q, k_cache = torch.ones_like(q), torch.ones_like(k_cache)
    for splits in (1, 2, 4):
        out, lse = run(q, k_cache, v_cache, lengths, causal=False, scale=score / 64, num_splits=splits)
        for b, length in enumerate(lengths.tolist()):
            expected = v_cache[b, :, :length].double().mean(1).repeat_interleave(2, 0)[:, None]
            torch.testing.assert_close(out[b].cpu().double(), expected, atol=2e-3, rtol=2e-2)
            torch.testing.assert_close(
                lse[b].cpu().double(), torch.full_like(lse[b], score + math.log(length)).cpu().double()
            )


def test_every_query_length_packed_with_its_group(monkeypatch):
    """1 to 16 queries of 1 to 8 heads: up to two blocks of 64 rows."""
    for seqlen_q, group in ((1, 8), (4, 8), (9, 8), (16, 8), (16, 4), (16, 1), (13, 5)):
        arguments = case(3, 64, groups=(group,), seqlens_q=(seqlen_q,), lengths=(70, 200))
        check_call(f"{seqlen_q} queries, {group} heads", arguments, "native", monkeypatch, DEVICE)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_blocks_than_stages_and_lanes(head_dim):
    """The rings wrap around several times, and page numbers are loaded again after 32 blocks."""
    q, k, v, lengths = call(head_dim, 64 * 36, (64 * 36 - 3,), kv_heads=1)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(1))
    pages = []
    for t in (k, v):
        pages.append(torch.empty(36, 1, 64, head_dim, dtype=t.dtype))
        pages[-1][order] = t.view(1, 36, 64, head_dim).transpose(0, 1)
    expected = fastattn.attention_decode(
        *(t.double() for t in (q, k, v)), cache_seqlens=lengths, return_lse=True, backend="reference"
    )
    out, lse = run(q, k, v, lengths, num_splits=1)
    torch.testing.assert_close(out.cpu().double(), expected[0], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse.cpu().double(), expected[1], atol=1e-5, rtol=1e-5)
    paged = run(q, *pages, lengths, num_splits=1, block_table=order.view(1, 36).int())
    assert all(torch.equal(a, b) for a, b in zip(paged, (out, lse), strict=True))


def test_split_counts_agree():
    q, k, v, lengths = call(capacity=700, lengths=(700, 130))
    out, lse = run(q, k, v, lengths, num_splits=1)
    for splits in (0, 2, 3, 7, 1000):
        other = run(q, k, v, lengths, num_splits=splits)
        torch.testing.assert_close(other[1], lse, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other[0].float(), out.float(), atol=2**-8, rtol=2**-8)
        assert all(torch.equal(a, b) for a, b in zip(run(q, k, v, lengths, num_splits=splits), other, strict=True))


def test_strides_and_memory():
    q, k, v, lengths = call()
    expected = run(q, k, v, lengths)
    bshd = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    gaps = [torch.cat((t, t * torch.nan), -1)[..., :64] for t in (q, k, v)]
    for what, inputs in (("BSHD", bshd), ("gaps", gaps), ("unaligned q", (guarded(q, offset=3), k, v))):
        got = run(*inputs, lengths)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), what


def test_empty_sizes():
    for change in ({"capacity": 0, "lengths": (0, 0)}, {"seqlen_q": 0}, {"lengths": (0, 0)}):
        q, k, v, lengths = call(**change)
        out, lse = run(q, k, v, lengths)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()


def test_raw_ops_refuse_what_they_do_not_serve():
    q, k, v, lengths = (t.to(DEVICE) for t in call())
    rest = [None, None, None, None, None, 0, -1, 0, 0.0, 0.125, 0]
    fwd = decode_module._fwd["native"]
    ones = torch.ones(4, device=DEVICE)
    for place, value in ((2, lengths), (3, ones), (4, ones), (8, 5.0)):
        bad = [*rest]
        bad[place] = value
        with pytest.raises(RuntimeError, match="takes no cache_leftpad, ALiBi slopes, softcap or sink"):
            fwd(q, k, v, lengths, *bad)
    with pytest.raises(RuntimeError, match="half precision and head dims 64, 96, 128, 192 and 256, got 32 and 32"):
        fwd(q[..., :32], k[..., :32], v[..., :32], lengths, *rest)
    with pytest.raises(RuntimeError, match=r"strides that are multiples of 8 elements .* got strides"):
        fwd(q, torch.cat((k, k[..., :1]), -1)[..., :64], v, lengths, *rest)
    table = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(RuntimeError, match="pages of a multiple of 64 keys, got 300"):
        fwd(q, k, v, lengths, table, *rest[1:])
