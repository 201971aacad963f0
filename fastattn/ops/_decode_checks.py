"""The checks of attention_decode: dtypes, devices, shapes and the values of lengths and indices."""

import torch

from fastattn.ops._attention_checks import check_int32, transposed_hint
from fastattn.ops._kinds import FLOAT_DTYPES, check_float, dtype_or_type, numbers
from fastattn.ops._layout import is_expanded

NAME = "attention_decode"
MIN_PAGE_SIZE = 16


def _check_table(q, k_cache, block_table, cache_batch_idx):
    """Raise unless a block table fits the queries and a cache of pages."""
    if cache_batch_idx is not None:
        raise ValueError(f"{NAME}: block_table and cache_batch_idx exclude each other: both select rows of the cache")
    if block_table.dtype != torch.int32:
        raise TypeError(f"{NAME}: block_table must be int32, got {dtype_or_type(block_table)}")
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        raise ValueError(
            f"{NAME}: block_table must be (batch, pages_per_sequence) with batch {q.shape[0]}, got"
            f" {tuple(block_table.shape)}"
        )
    if block_table.device != q.device:
        raise ValueError(f"{NAME}: block_table must be on the device of q, {q.device}, got {block_table.device}")
    if k_cache.shape[2] < MIN_PAGE_SIZE or k_cache.shape[0] == 0:
        raise ValueError(
            f"{NAME}: with block_table the caches must be (num_pages, n_kv_heads, page_size, head_dim) with at"
            f" least 1 page of at least {MIN_PAGE_SIZE} keys, got {tuple(k_cache.shape)}"
        )


def _check_new(q, k, v, n_kv_heads, head_dim_v):
    """Raise unless the new keys and values fit the queries and the caches."""
    wanted = q.shape[0], n_kv_heads, k.shape[2] if k.dim() == 4 else "seqlen_new"
    for label, t, last in (("k", k, q.shape[3]), ("v", v, head_dim_v)):
        if tuple(t.shape) != (*wanted, last):
            shape = ", ".join(map(str, (*wanted, last)))
            raise ValueError(f"{NAME}: {label} must have shape ({shape}), got {tuple(t.shape)}")
        if t.dtype != q.dtype:
            raise TypeError(f"{NAME}: {label} must have the dtype of q, {q.dtype}, got {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"{NAME}: {label} must be on the device of q, {q.device}, got {t.device}")


def check_tensors(q, k_cache, v_cache, k, v, block_table, cache_batch_idx):
    """Raise unless the tensors match each other; return how many keys the cache can hold per sequence."""
    shape_q, shape_k, shape_v, dtype, device = q.shape, k_cache.shape, v_cache.shape, q.dtype, q.device
    if not q.dim() == k_cache.dim() == v_cache.dim() == 4:  # an array has a shape and a dtype, but no dim()
        shapes = {"q": shape_q, "k_cache": shape_k, "v_cache": shape_v}
        label = next(label for label, shape in shapes.items() if len(shape) != 4)
        raise ValueError(f"{NAME}: {label} must have 4 dimensions, got shape {tuple(shapes[label])}")
    if dtype not in FLOAT_DTYPES:
        check_float(NAME, "q", q)
    if not dtype == k_cache.dtype == v_cache.dtype:
        raise TypeError(
            f"{NAME}: q and the caches must have the same dtype, got {dtype}, {k_cache.dtype}, {v_cache.dtype}"
        )
    if not device == k_cache.device == v_cache.device:
        raise ValueError(
            f"{NAME}: q and the caches must be on the same device, got {device}, {k_cache.device}, {v_cache.device}"
        )
    batch, n_heads, _, head_dim = shape_q
    cache_batch, n_kv_heads, capacity, head_dim_k = shape_k
    batch_v, heads_v, capacity_v, head_dim_v = shape_v
    if batch_v != cache_batch or heads_v != n_kv_heads or capacity_v != capacity:
        raise ValueError(
            f"{NAME}: the caches must agree in all but the last dimension, got {tuple(shape_k)} and {tuple(shape_v)}"
        )
    if head_dim != head_dim_k:
        raise ValueError(f"{NAME}: q and k_cache must have the same head_dim, got {head_dim} and {head_dim_k}")
    if n_heads != n_kv_heads and (n_kv_heads == 0 or n_heads % n_kv_heads):
        hint = transposed_hint(NAME, shape_q, shape_k, what="q and the caches")
        raise ValueError(
            f"{NAME}: the heads of q must be a multiple of those of the caches, got {n_heads} and {n_kv_heads}{hint}"
        )
    for label, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if t.stride(3) != 1 and t.shape[3] > 1:
            raise ValueError(f"{NAME}: {label} must have last stride 1, got {t.stride(3)}")
    if k is not None:
        for label, t in (("k_cache", k_cache), ("v_cache", v_cache)):
            if is_expanded(t) and t.numel():
                raise ValueError(
                    f"{NAME}: {label} must not be expanded if k and v are appended, got strides {t.stride()}"
                )
        if k_cache is v_cache:
            raise ValueError(f"{NAME}: k_cache and v_cache must not be one tensor if k and v are appended")
    if block_table is not None:
        _check_table(q, k_cache, block_table, cache_batch_idx)
        capacity *= block_table.shape[1]
    elif cache_batch_idx is not None:
        check_int32(NAME, "cache_batch_idx", cache_batch_idx, q, batch)
    elif cache_batch != batch:
        raise ValueError(
            f"{NAME}: q and the caches must have the same batch size without block_table and cache_batch_idx, got"
            f" {batch} and {cache_batch}"
        )
    if (k is None) != (v is None):
        raise ValueError(f"{NAME}: k and v must be given together, got only {'v' if k is None else 'k'}")
    if k is not None:
        _check_new(q, k, v, n_kv_heads, head_dim_v)
    return capacity


def check_values(k_cache, cache_seqlens, block_table, cache_batch_idx, seqlen_new, capacity):
    """Raise if a length or index is outside the cache. For CPU tensors only, where reading needs no synchronisation."""
    lengths = numbers(cache_seqlens)
    if lengths and (min(lengths) < 0 or max(lengths) + seqlen_new > capacity):
        new = f" with {seqlen_new} new keys" if seqlen_new else ""
        raise ValueError(f"{NAME}: cache_seqlens must be from 0 to {capacity - seqlen_new}{new}, got {lengths}")
    rows = k_cache.shape[0]
    if cache_batch_idx is not None:
        found = numbers(cache_batch_idx)
        if found and (min(found) < 0 or max(found) >= rows):
            raise ValueError(f"{NAME}: cache_batch_idx must be from 0 to {rows - 1}, got {found}")
        if seqlen_new and len(set(found)) != len(found):
            raise ValueError(f"{NAME}: cache_batch_idx must be distinct if k and v are appended, got {found}")
    if block_table is not None:
        page_size = k_cache.shape[2]
        for pages, length in zip(numbers(block_table), lengths, strict=True):
            used = pages[: -(-(length + seqlen_new) // page_size)]
            if used and (min(used) < 0 or max(used) >= rows):
                raise ValueError(f"{NAME}: block_table must name pages from 0 to {rows - 1}, got {used}")
