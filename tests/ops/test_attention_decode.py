"""attention_decode: the meaning of a cache, refused calls, and every backend against the reference in fp64."""

import functools
import math

import pytest
import torch
from attention_cases import DTYPES
from decode_cases import check_call, int32, normal, random_case, small_call, to
from memory_guard import guarded
from processes import LOWER_CAPABILITIES, run_on_instruction_set
from threads import same_bits

import fastattn
from fastattn.ops._backends import why_not_available

OP = "attention_decode"
NATIVE = why_not_available("native", "cpu")
needs_native = pytest.mark.skipif(NATIVE is not None, reason=f"no C++ kernels for the CPU: {NATIVE}")
SEEDS, PARTS = 240, 8  # so that pytest shows the progress
FEW_SEEDS = 24  # in the interpreter
# small shapes for the interpreter, whose bfloat16 truncates
SMALL = {
    "dtypes": (torch.float32, torch.float16), "lengths": (0, 1, 7, 40, 65), "head_dims": (8, 16, 31, 64),
    "groups": (1, 2, 3, 8), "seqlens_q": (1, 1, 3, 17),
}  # fmt: skip


def check(seed, backend, monkeypatch, device="cpu", **shapes):
    """One random call: out, lse and both caches."""
    check_call(f"seed {seed}", random_case(seed, **shapes), backend, monkeypatch, device)


@needs_native
@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls_native(part, monkeypatch):
    for seed in range(part, SEEDS, PARTS):
        check(seed, "native", monkeypatch)


@pytest.mark.parametrize("part", range(4))
def test_random_calls_triton(part, monkeypatch, device):
    if why_not_available("triton", device):
        pytest.skip(why_not_available("triton", device))
    for seed in range(1000 + part, 1000 + (FEW_SEEDS if device == "cpu" else SEEDS), 4):
        check(seed, "triton", monkeypatch, device, **(SMALL if device == "cpu" else {}))


@pytest.mark.parametrize("score", [1e4, 1e6, -1e9, 1e30, -3e38])
def test_equal_scores_however_large(score, backend, device):
    """Splits of unequal length are weighted by their keys, because maximum and sum are stored separately."""
    q, k_cache, v_cache = to(device, *small_call(capacity=300, seqlen_q=2))
    q, k_cache = torch.ones_like(q), torch.ones_like(k_cache)
    lengths = int32(300, 131)
    for splits in (1, 2, 7):
        out, lse = fastattn.attention_decode(
            q, k_cache, v_cache, cache_seqlens=lengths.to(device), causal=False, scale=score / 8, num_splits=splits,
            return_lse=True,
        )  # fmt: skip
        for b, length in enumerate(lengths.tolist()):
            expected = v_cache[b, :, :length].double().mean(1).repeat_interleave(2, 0)[:, None].expand_as(out[b])
            torch.testing.assert_close(out[b].double(), expected, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(lse[b].double(), torch.full_like(lse[b], score + math.log(length)).double())


@pytest.mark.parametrize("value", [1e4, 1e9, 1e38, torch.finfo(torch.float32).max])
def test_sinks_however_large(value, backend, device, monkeypatch):
    q, k_cache, v_cache = small_call(capacity=300)
    sink = torch.tensor([value, -value, 0.0, -value])
    for splits in (1, 3):
        kwargs = {"cache_seqlens": int32(300, 0), "sink": sink, "num_splits": splits}
        check_call(f"{splits} splits", (q, k_cache, v_cache, kwargs), backend, monkeypatch, device)


@pytest.mark.parametrize("slope", [10.0, 1e5, 1e30])
def test_steep_alibi(slope, backend, device, monkeypatch):
    q, k_cache, v_cache = small_call(capacity=300, seqlen_q=3)
    slopes = torch.tensor([slope, slope / 3, 0.01, -slope])
    for kwargs in ({}, {"cache_leftpad": int32(0, 40)}, {"causal": False, "window": (280, 0)}):
        kwargs |= {"cache_seqlens": int32(300, 41), "alibi_slopes": slopes, "num_splits": 3}
        check_call(list(kwargs), (q, k_cache, v_cache, kwargs), backend, monkeypatch, device)


def test_is_attention_on_the_valid_keys(backend, device):
    """Every feature against `attention` on the valid keys of the cache, sequence by sequence."""
    q, k_cache, v_cache = to(device, *small_call(seqlen_q=3))
    lengths, leftpad = int32(20, 9), int32(2, 0)
    features = [
        {}, {"causal": False}, {"window": (4, 0)}, {"causal": False, "window": (3, 2)}, {"softcap": 2.0},
        {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4], device=device)}, {"sink": normal(4).to(device)},
        {"scale": 0.7},
    ]  # fmt: skip
    for kwargs in features:
        out, lse = fastattn.attention_decode(
            q, k_cache, v_cache, cache_seqlens=lengths.to(device), cache_leftpad=leftpad.to(device), return_lse=True,
            **kwargs,
        )  # fmt: skip
        for b in range(2):
            keys = slice(leftpad[b].item(), lengths[b].item())
            expected = fastattn.attention(
                q[b : b + 1], k_cache[b : b + 1, :, keys], v_cache[b : b + 1, :, keys], return_lse=True,
                backend="reference", **({"causal": True} | kwargs),
            )  # fmt: skip
            torch.testing.assert_close((out[b : b + 1], lse[b : b + 1]), expected, atol=1e-5, rtol=1e-5)


def test_step_by_step_equals_one_causal_call(backend, device):
    seqlen, page_size = 40, 16
    q, k, v = (normal(2, heads, seqlen, 16, seed=n).to(device) for n, heads in enumerate((4, 2, 2)))
    expected = fastattn.attention(q, k, v, causal=True, backend="reference")
    table = int32(5, 1, 3, 0, 2, 4).view(2, 3).to(device)
    for paged in (False, True):
        shape = (6, 2, page_size, 16) if paged else (2, 2, seqlen + 3, 16)
        caches = [torch.full(shape, math.nan, device=device) for _ in range(2)]
        lengths = int32(0, 0).to(device)
        for first, last in ((0, 17), *((n, n + 1) for n in range(17, 23)), (23, 40)):
            new = (k[:, :, first:last], v[:, :, first:last])
            out = fastattn.attention_decode(
                q[:, :, first:last], *caches, k=new[0], v=new[1], cache_seqlens=lengths,
                block_table=table if paged else None,
            )  # fmt: skip
            torch.testing.assert_close(out, expected[:, :, first:last], atol=1e-5, rtol=1e-5)
            lengths += last - first


def test_split_counts_agree(backend, device):
    """The number of splits only changes the order of sums: 1e-5."""
    q, k_cache, v_cache = to(device, *small_call(capacity=700, head_dim=16, n_heads=6, kv_heads=2))
    lengths, sink = int32(700, 130).to(device), normal(6).to(device)
    results = [
        fastattn.attention_decode(
            q, k_cache, v_cache, cache_seqlens=lengths, sink=sink, num_splits=splits, return_lse=True
        )
        for splits in (1, 0, 2, 3, 7, 1000)
    ]
    for out, lse in results[1:]:
        torch.testing.assert_close((out, lse), results[0], atol=1e-5, rtol=1e-5)


def test_very_negative_scores(backend, device):
    """If lse is far below -89, a key past the end must not contribute exp(0 - lse)."""
    q, k_cache, v_cache = to(device, *small_call(capacity=70, head_dim=16))
    q, k_cache = q.abs() * 10, -k_cache.abs() * 10
    lengths = int32(65, 3).to(device)
    for splits in (1, 3):
        out, lse = fastattn.attention_decode(
            q, k_cache, v_cache, cache_seqlens=lengths, num_splits=splits, return_lse=True
        )
        expected, expected_lse = fastattn.attention_decode(
            q.double(), k_cache.double(), v_cache.double(), cache_seqlens=lengths, return_lse=True, backend="reference"
        )
        assert (expected_lse < -100).all()
        torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-6)


def test_empty_sizes(backend, device):
    for change in ({"batch": 0}, {"n_heads": 0, "kv_heads": 0}, {"seqlen_q": 0}, {"capacity": 0}):
        q, k_cache, v_cache = to(device, *small_call(**change))
        lengths = torch.zeros(q.shape[0], dtype=torch.int32, device=device)
        out, lse = fastattn.attention_decode(q, k_cache, v_cache, cache_seqlens=lengths, return_lse=True)
        assert out.shape == q.shape
        assert (out == 0).all()
        assert (lse == -math.inf).all()
    q, k_cache, v_cache = to(device, *small_call())
    new = k_cache[:, :, :0]
    out = fastattn.attention_decode(q, k_cache, v_cache, k=new, v=new, cache_seqlens=int32(3, 4).to(device))
    assert out.equal(fastattn.attention_decode(q, k_cache, v_cache, cache_seqlens=int32(3, 4).to(device)))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_memory(dtype):
    """Misaligned caches with gaps, surrounded by NaN. The results are the same for all layouts."""
    q, k_cache, v_cache = small_call(dtype, capacity=130, head_dim=40, seqlen_q=2)
    kwargs = {"cache_seqlens": int32(130, 77), "backend": "native"}
    expected = fastattn.attention_decode(q, k_cache, v_cache, **kwargs)
    for change in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: guarded(t, offset=3),
        lambda t: guarded(t, offset=1, gap=5),
    ):
        assert fastattn.attention_decode(change(q), change(k_cache), change(v_cache), **kwargs).equal(expected)
    inner = torch.stack((q, q), -1)[..., 0]
    assert fastattn.attention_decode(inner, k_cache, v_cache, **kwargs).equal(expected)
    bshd = q.transpose(1, 2).contiguous().transpose(1, 2)
    out = fastattn.attention_decode(bshd, k_cache, v_cache, **kwargs)
    assert out.transpose(1, 2).is_contiguous()


@needs_native
def test_reruns_and_thread_counts_agree_bit_for_bit():
    q, k_cache, v_cache = small_call(capacity=3000, head_dim=64, n_heads=8)
    kwargs = {"cache_seqlens": int32(3000, 1700), "return_lse": True, "backend": "native"}
    call_once = functools.partial(fastattn.attention_decode, q, k_cache, v_cache, **kwargs)
    same_bits(call_once, (1, *[2] * 20, *[3] * 20))


@needs_native
def test_many_queries_and_wide_heads(monkeypatch):
    """More rows than one block, and a head dim that only the CPU supports."""
    q, k_cache, v_cache = small_call(seqlen_q=150, capacity=400, head_dim=320, n_heads=6, kv_heads=2)
    for window in (None, (100, 0)):
        kwargs = {"cache_seqlens": int32(400, 160), "window": window}
        out = fastattn.attention_decode(q, k_cache, v_cache, **kwargs, backend="native")
        expected = fastattn.attention_decode(q, k_cache, v_cache, **kwargs, backend="reference")
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@needs_native
def test_offsets_beyond_two_gigabytes():
    """The rows of the cache are 2^31 elements apart, and only memory at both ends is touched."""
    q, k_cache, v_cache = small_call(torch.float16, batch=1, n_heads=1, kv_heads=1, capacity=2, head_dim=16)
    far = torch.empty(2**31 + 16, dtype=torch.float16).as_strided((1, 1, 2, 16), (1, 1, 2**31, 1))
    far[:, :, :1] = k_cache[:, :, :1]
    out = fastattn.attention_decode(
        q, far, v_cache, k=k_cache[:, :, 1:], v=v_cache[:, :, 1:].clone(), cache_seqlens=int32(1), backend="native"
    )
    assert far[:, :, 1:].equal(k_cache[:, :, 1:])
    assert out.equal(fastattn.attention_decode(q, k_cache, v_cache, cache_seqlens=int32(2), backend="native"))


def bad(message, error=ValueError, **change):
    return pytest.param(change, error, message, id=message[:40])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        bad(r"q must have 4 dimensions, got shape \(2, 4, 8\)", q=torch.ones(2, 4, 8)),
        bad("q must have a floating-point dtype", TypeError, q=torch.ones(2, 4, 1, 8, dtype=torch.int32)),
        bad("the same dtype, got torch.float16", TypeError, q=torch.ones(2, 4, 1, 8, dtype=torch.float16)),
        bad("caches must agree in all but the last", v_cache=torch.ones(2, 2, 23, 8)),
        bad("the same head_dim, got 9 and 8", q=torch.ones(2, 4, 1, 9)),
        bad("multiple of those of the caches, got 3 and 2", q=torch.ones(2, 3, 1, 8)),
        bad("the same batch size .* got 3 and 2", q=torch.ones(3, 4, 1, 8)),
        bad("k_cache must have last stride 1, got 24", k_cache=torch.ones(2, 2, 8, 24).transpose(2, 3)),
        bad("cache_seqlens must be int32, got torch.int64", TypeError, cache_seqlens=torch.tensor([1, 2])),
        bad(r"cache_seqlens must have shape \(2,\), got \(1,\)", cache_seqlens=int32(1)),
        bad(r"cache_seqlens must be from 0 to 24, got \[25, 1\]", cache_seqlens=int32(25, 1)),
        bad(r"from 0 to 24, got \[-1, 1\]", cache_seqlens=int32(-1, 1)),
        bad(
            r"from 0 to 21 with 3 new keys, got \[22, 1\]", cache_seqlens=int32(22, 1), k=torch.ones(2, 2, 3, 8),
            v=torch.ones(2, 2, 3, 8),
        ),
        bad("given together, got only k", k=torch.ones(2, 2, 1, 8)),
        bad(
            r"v must have shape \(2, 2, 1, 8\), got \(2, 2, 1, 7\)", k=torch.ones(2, 2, 1, 8),
            v=torch.ones(2, 2, 1, 7),
        ),
        bad("k must have the dtype of q", TypeError, k=torch.ones(2, 2, 1, 8).half(), v=torch.ones(2, 2, 1, 8)),
        bad("exclude each other", block_table=int32(0, 1).view(2, 1), cache_batch_idx=int32(0, 1)),
        bad("block_table must be int32", TypeError, block_table=torch.zeros(2, 1, dtype=torch.int64)),
        bad(r"\(batch, pages_per_sequence\) with batch 2, got \(3, 1\)", block_table=int32(0, 1, 1).view(3, 1)),
        bad(
            "at least 1 page of at least 16 keys", block_table=int32(0, 1).view(2, 1),
            k_cache=torch.ones(2, 2, 8, 8), v_cache=torch.ones(2, 2, 8, 8),
        ),
        bad(r"pages from 0 to 1, got \[2\]", block_table=int32(0, 2).view(2, 1)),
        bad(r"cache_batch_idx must be from 0 to 1, got \[0, 2\]", cache_batch_idx=int32(0, 2)),
        bad(
            r"must be distinct .* got \[1, 1\]", cache_batch_idx=int32(1, 1), k=torch.ones(2, 2, 1, 8),
            v=torch.ones(2, 2, 1, 8),
        ),
        *(
            bad(
                f"{label} must not be expanded if k and v are appended", k=torch.ones(2, 2, 1, 8),
                v=torch.ones(2, 2, 1, 8), **{label: torch.ones(1, 2, 24, 8).expand(2, -1, -1, -1)},
            )
            for label in ("k_cache", "v_cache")
        ),
        bad("cache_leftpad must be int32", TypeError, cache_leftpad=torch.zeros(2)),
        bad('causal must be False, True or "bottom_right", got "top_left"', causal="top_left"),
        bad(r"pair \(left, right\), got 3", window=3),
        bad("softcap must be .* got -1.0", softcap=-1.0),
        bad("num_splits must be an integer of at least 0 .* got -1", num_splits=-1),
        bad(r"alibi_slopes must have shape \(4,\) or \(2, 4\)", alibi_slopes=torch.ones(3)),
        bad("got 'cudnn'", backend="cudnn"),
    ],
)  # fmt: skip
def test_mistakes_are_named(change, error, message):
    arguments = (
        dict(zip(("q", "k_cache", "v_cache"), small_call(), strict=True)) | {"cache_seqlens": int32(3, 4)} | change
    )
    with pytest.raises(error, match=message):
        fastattn.attention_decode(
            arguments.pop("q"), arguments.pop("k_cache"), arguments.pop("v_cache"), **arguments
        )  # fmt: skip


def test_one_tensor_as_both_caches():
    """It may be read, but the appended values would overwrite the keys."""
    q, cache, _ = small_call()
    new, lengths = cache[:, :, :1].clone(), int32(3, 4)
    fastattn.attention_decode(q, cache, cache, cache_seqlens=lengths)
    with pytest.raises(ValueError, match="k_cache and v_cache must not be one tensor if k and v are appended"):
        fastattn.attention_decode(q, cache, cache, k=new, v=new, cache_seqlens=lengths)


def test_a_wanted_gradient_is_refused():
    q, k_cache, v_cache = small_call()
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="no backward"):
        fastattn.attention_decode(q, k_cache, v_cache, cache_seqlens=int32(3, 4))
    with torch.no_grad():
        assert not fastattn.attention_decode(q, k_cache, v_cache, cache_seqlens=int32(3, 4)).requires_grad


CAPABILITY_TEST = """
import fastattn, pytest
from test_attention_decode import check
for seed in range(2000, 2040):
    check(seed, "native", pytest.MonkeyPatch())
"""


@needs_native
@pytest.mark.parametrize("capability", LOWER_CAPABILITIES)
def test_lower_instruction_sets(capability):
    run_on_instruction_set(capability, CAPABILITY_TEST)
