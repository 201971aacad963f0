"""A cache of keys and values, contiguous or paged: the positions of its rows, and the kernel that appends new rows."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastattn.kernels.attention_call import padded, rows_of
from fastattn.kernels.attention_frame import head_ptr
from fastattn.kernels.common import contiguous, launch, register, unit_stride

APPEND_ROWS = 16


class Cache(NamedTuple):
    """Which keys of the cache belong to each batch entry. Absent tensors are None."""

    seqlens_ptr: Any
    block_table_ptr: Any
    batch_idx_ptr: Any
    leftpad_ptr: Any


@triton.jit
def find_places(first, rows, inside, batch, cache, pages, page_size, WHOLE_PAGES: tl.constexpr):
    """Return (page, row within it) for rows of the cache; without pages, (0, row). WHOLE_PAGES: the rows are `first`
    and the following ones, and all are in one page."""
    if cache.block_table_ptr is None:
        page = 0
        row = rows.to(tl.int64)
    elif WHOLE_PAGES:
        page = tl.load(cache.block_table_ptr + batch * pages + first // page_size).to(tl.int64)
        row = (first % page_size + tl.arange(0, rows.shape[0])).to(tl.int64)
    else:
        table_ptr = cache.block_table_ptr + batch * pages
        page = tl.load(table_ptr + rows // page_size, mask=inside, other=0).to(tl.int64)
        row = (rows % page_size).to(tl.int64)
    return page, row


@triton.jit
def cache_ptr(side, batch, kv_head, cache):
    """Return the start of a key head, in the rows of its batch entry or in the first page."""
    if cache.block_table_ptr is None:
        row = batch
        if cache.batch_idx_ptr is not None:
            row = tl.load(cache.batch_idx_ptr + batch).to(tl.int64)
        ptr = head_ptr(side, row, kv_head)
    else:
        ptr = side.ptr + kv_head * side.strides[1]
    return ptr


@triton.jit
def load_rows(base, offsets, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if DIM != BLOCK_D:
        mask = mask & (offs_d < DIM)[None, :]
    return tl.load(base + offsets[:, None] + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def _append(rows, cached, new, page, row, inside, batch, kv_head, cache, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copy the rows `new` of k or v of a head to the positions (page, row) of the cache."""
    offs_d = tl.arange(0, BLOCK_D)
    tile = load_rows(head_ptr(rows, batch, kv_head), new.to(tl.int64) * rows.strides[2], inside, DIM, BLOCK_D)
    offsets = page * cached.strides[0] + row * cached.strides[2]
    pointers = cache_ptr(cached, batch, kv_head, cache) + offsets[:, None] + offs_d[None, :]
    tl.store(pointers, tile, mask=inside[:, None] & (offs_d < DIM)[None, :])


@triton.jit(do_not_specialize=["seqlen_new", "capacity", "page_size", "pages"])
def attention_decode_append_kernel(k, v, k_cache, v_cache, cache, n_kv_heads, seqlen_new, capacity, page_size, pages,
                                   HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
                                   BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Copy BLOCK_M new keys and values of one head. Those that do not fit into the cache are dropped."""
    pid = tl.program_id(0)
    kv_head = (pid % n_kv_heads).to(tl.int64)
    batch = (pid // n_kv_heads).to(tl.int64)
    new = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    position = tl.load(cache.seqlens_ptr + batch) + new
    inside = (new < seqlen_new) & (position >= 0) & (position < capacity)
    page, row = find_places(0, position, inside, batch, cache, pages, page_size, False)
    _append(k, k_cache, new, page, row, inside, batch, kv_head, cache, HEAD_DIM, BLOCK_D)
    _append(v, v_cache, new, page, row, inside, batch, kv_head, cache, HEAD_DIM_V, BLOCK_DV)


def attention_decode_append(k_cache, v_cache, k, v, cache_seqlens, block_table, cache_batch_idx):
    """The raw op attention_decode_append: changes k_cache and v_cache in place."""
    k, v = unit_stride(k), unit_stride(v)
    batch, n_kv_heads, seqlen_new, head_dim = k.shape
    if not batch * n_kv_heads * seqlen_new:
        return
    page_size, pages = k_cache.shape[2], 1 if block_table is None else block_table.shape[1]
    grid = batch * n_kv_heads, triton.cdiv(seqlen_new, APPEND_ROWS)
    cache = Cache(contiguous(cache_seqlens), contiguous(block_table), contiguous(cache_batch_idx), None)
    launch(
        attention_decode_append_kernel, grid, k.device, *map(rows_of, (k, v, k_cache, v_cache)), cache, n_kv_heads,
        seqlen_new, page_size * pages, page_size, pages, HEAD_DIM=head_dim, HEAD_DIM_V=v.shape[3],
        BLOCK_D=padded(head_dim), BLOCK_DV=padded(v.shape[3]), BLOCK_M=APPEND_ROWS, num_warps=4,
    )  # fmt: skip


register("attention_decode_append", attention_decode_append)
