"""Seeded random calls of attention_decode with any combination of features, and caches that reveal stray accesses."""

import math
import random

import torch
from attention_cases import DTYPES, some
from oracle import exact

import fastattn
from fastattn import reference

HEAD_DIMS = (8, 16, 31, 33, 40, 64, 80, 100, 128, 192, 256)
PAGE_SIZES = (16, 48, 64, 256)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def small_call(dtype=torch.float32, batch=2, n_heads=4, kv_heads=2, seqlen_q=1, capacity=24, head_dim=8, seed=0):
    """q, k_cache and v_cache of random numbers."""
    q = normal(batch, n_heads, seqlen_q, head_dim, seed=seed, dtype=dtype)
    k_cache, v_cache = (normal(batch, kv_heads, capacity, head_dim, seed=seed + n, dtype=dtype) for n in (1, 2))
    return q, k_cache, v_cache


def contiguous_cache(rng, generator, lengths, kv_heads, sizes, dtype, leftpad, room, gap_size):
    """Return (k_cache, v_cache, kwargs) with NaN where no key is valid; sometimes BSHD, with gaps, with spare rows."""
    batch = len(lengths)
    rows = rng.choice((batch, batch + 2))
    index = rng.sample(range(rows), batch)
    capacity = max(lengths) + room
    caches = []
    for size in sizes:
        gap = rng.choice((0, 0, gap_size))
        shape = (rows, kv_heads, capacity, size + gap)
        if rng.random() < 0.5:
            cache = torch.full((rows, capacity, kv_heads, size + gap), float("nan"), dtype=dtype).transpose(1, 2)
        else:
            cache = torch.full(shape, float("nan"), dtype=dtype)
        cache = cache[..., :size]
        for b, row in enumerate(index):
            first = leftpad[b] if leftpad else 0
            if lengths[b] > first:
                keys = torch.randn(kv_heads, lengths[b] - first, size, generator=generator)
                cache[row, :, first : lengths[b]] = keys.to(dtype)
        caches.append(cache)
    kwargs = {"cache_batch_idx": torch.tensor(index, dtype=torch.int32)}
    if rows == batch and index == sorted(index):
        kwargs = {}
    return *caches, kwargs


def paged_cache(rng, generator, lengths, kv_heads, sizes, dtype, leftpad, room, page_size):
    """The same in shuffled pages. Unused pages are NaN; table entries without a page are out of range."""
    needed = [-(-(length + room) // page_size) for length in lengths]
    width = max(needed) + rng.choice((0, 2))
    pages = sum(needed) + 3
    free = rng.sample(range(pages), pages)
    table = torch.full((len(lengths), max(width, 1)), -7, dtype=torch.int32)
    for b, count in enumerate(needed):
        table[b, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
    caches = []
    for size in sizes:
        cache = torch.full((pages, kv_heads, page_size, size), float("nan"), dtype=dtype)
        if rng.random() < 0.5:
            cache = torch.full((pages, page_size, kv_heads, size), float("nan"), dtype=dtype).transpose(1, 2)
        for b, length in enumerate(lengths):
            for j in range(leftpad[b] if leftpad else 0, length):
                keys = torch.randn(kv_heads, size, generator=generator)
                cache[table[b, j // page_size], :, j % page_size] = keys.to(dtype)
        caches.append(cache)
    return *caches, {"block_table": table}


def random_case(seed, dtypes=DTYPES, lengths=(0, 1, 7, 63, 64, 65, 100, 130, 300), head_dims=HEAD_DIMS,
                groups=(1, 1, 2, 3, 4, 5, 8), seqlens_q=(1, 1, 1, 2, 3, 5, 16, 17), page_sizes=PAGE_SIZES,
                plain=False):  # fmt: skip
    """Return (q, k_cache, v_cache, keyword arguments) of a call.

    Args:
        plain: without features that change scores, without leftpad, and cache strides are multiples of 16 bytes.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype, batch, kv_heads = rng.choice(dtypes), rng.choice((1, 2, 3)), rng.choice((1, 2, 3))
    n_heads, seqlen_q = kv_heads * rng.choice(groups), rng.choice(seqlens_q)
    head_dim = rng.choice(head_dims)
    sizes = head_dim, rng.choice((head_dim, head_dim, *head_dims))
    lens = [rng.choice(lengths) for _ in range(batch)]
    leftpad = [rng.randint(0, length + 2) for length in lens] if not plain and rng.random() < 0.25 else None
    appends = rng.random() < 0.4
    seqlen_new = rng.choice((seqlen_q, 1, 3)) if appends else 0
    room = seqlen_new + rng.choice((0, 1, 20))
    arguments = rng, generator, lens, kv_heads, sizes, dtype, leftpad, room
    page_size = some(rng, *page_sizes, p=0.5)
    k_cache, v_cache, kwargs = (
        paged_cache(*arguments, page_size) if page_size else contiguous_cache(*arguments, 8 if plain else 3)
    )  # fmt: skip

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    kwargs |= {
        "cache_seqlens": torch.tensor(lens, dtype=torch.int32),
        "causal": rng.random() < 0.7,
        "window": some(rng, *((a, b) for a in (-1, 0, 3, 70) for b in (-1, 0, 3, 20)), p=0.3),
        "softcap": 0.0 if plain else some(rng, 1.5, 5.0, p=0.25) or 0.0,
        "scale": some(rng, 0.5, 0.05, -0.2, p=0.3),
        "num_splits": rng.choice((0, 0, 1, 3, 1000)),
    }
    if leftpad:
        kwargs["cache_leftpad"] = torch.tensor(leftpad, dtype=torch.int32)
    if appends:
        kwargs["k"], kwargs["v"] = (normal(batch, kv_heads, seqlen_new, size) for size in sizes)
        if rng.random() < 0.5:
            kwargs["k"] = kwargs["k"].transpose(1, 2).contiguous().transpose(1, 2)
    if not plain and rng.random() < 0.3:
        kwargs["alibi_slopes"] = torch.rand(rng.choice(((n_heads,), (batch, n_heads))), generator=generator) * 0.3
    if not plain and rng.random() < 0.3:
        kwargs["sink"] = normal(n_heads).float()
    q = normal(batch, n_heads, seqlen_q, head_dim)
    if rng.random() < 0.5:
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    return q, k_cache, v_cache, kwargs


def to(device, *values):
    return [v.to(device) if isinstance(v, torch.Tensor) else v for v in values]


def check_call(what, call, backend, monkeypatch, device="cpu"):
    """Check out, lse and both caches against the reference in fp64."""
    q, k_cache, v_cache, kwargs = call
    names = list(kwargs)
    truth_caches, low_caches = exact(k_cache, v_cache), [k_cache.clone(), v_cache.clone()]
    truth_kwargs = dict(zip(names, exact(*kwargs.values()), strict=True))
    truth, truth_lse = fastattn.attention_decode(
        exact(q), *truth_caches, **truth_kwargs, return_lse=True, backend="reference"
    )
    with monkeypatch.context() as patch:
        patch.setattr(reference, "accumulator", lambda dtype: dtype)
        low = fastattn.attention_decode(q, *low_caches, **kwargs, backend="reference")
    caches = to(device, k_cache, v_cache)
    kwargs = dict(zip(names, to(device, *kwargs.values()), strict=True))
    out, lse = fastattn.attention_decode(q.to(device), *caches, **kwargs, return_lse=True, backend=backend)
    assert out.dtype == q.dtype, what
    assert lse.dtype == torch.float32, what
    empty = truth_lse == -math.inf
    assert torch.equal(lse.cpu() == -math.inf, empty), f"{what}: -inf elsewhere than expected"
    assert (out.cpu()[empty] == 0).all(), what
    lse_error = (lse.cpu().double() - truth_lse)[~empty].abs().max().item() if not empty.all() else 0.0
    assert lse_error <= 1e-5 * (1 + truth_lse[~empty].abs().max().item() if not empty.all() else 1), f"{what}: lse"
    units = (32 if q.dtype == torch.float32 else 8) * torch.finfo(q.dtype).eps
    allowed = 2 * (low.double() - truth).abs().max() + units * truth.abs().max().clamp(min=1.0)
    error = (out.cpu().double() - truth).abs().max()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g} in {q.dtype}"
    # the appended keys and everything else, including NaN, bit for bit
    for ours, expected in zip(caches, low_caches, strict=True):
        assert torch.equal(ours.cpu().nan_to_num(nan=77.0), expected.nan_to_num(nan=77.0)), f"{what}: cache"
