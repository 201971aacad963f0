"""Attention of a few queries on a cache, contiguous or paged: split over the keys, then combined.

    s   = scale * q·k;  s = softcap * tanh(s / softcap);  s = s - slope * |i + off - j|;  -inf where invisible
    lse = log(sum_j exp(s) [+ exp(sink)]);  out = exp(s - lse) · v
    a split n: m_n = max(s), l_n = sum_j exp(s - m_n), o_n = exp(s - m_n) · v
    all splits: m = max(m_n), l = sum_n l_n * exp(m_n - m), out = sum_n o_n * exp(m_n - m) / l, lse = m + log(l)

One program owns a split of the keys of one sequence and key head, and up to 64 rows: queries of the heads that share
that key head, so that the cache is read once. Lengths are known to the device alone: the number of splits follows from
the size of the cache, and each program takes its share of the keys that its sequence really has. With one split it
writes out and lse itself, else fp32 parts, which a second kernel adds up in a fixed order. A third appends new keys.
Maximum and sum are kept apart: one fp32 lse of a split has no room for the logarithm of its sum beside large scores.

Limits: head dims up to 256. Pages are read block by block where a block of keys lies in one page, else row by row.
Reference: Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

import functools

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention import (
    exponential,
    key_blocks,
    precision,
    tile_scores,
    visible_tile,
)
from fastattn.kernels.common import LN_2, contiguous, launch, multiprocessors, register, unit_stride
from fastattn.ops._layout import empty_in_layout

MAX_SPLITS, COMBINE_SPLITS, APPEND_ROWS = 128, 16, 16
# (bytes of an element, head dim, most rows) -> (keys of a block, warps, stages), the same for every architecture: about
# 32 KB of keys and values a stage for few rows. They compile without spills; not yet measured on hardware.
CONFIGS = {
    (2, 32, 16): (128, 4, 3), (2, 64, 16): (128, 4, 3), (2, 128, 16): (64, 4, 3), (2, 256, 16): (32, 4, 3),
    (2, 32, 64): (64, 4, 3), (2, 64, 64): (64, 4, 3), (2, 128, 64): (32, 8, 3), (2, 256, 64): (16, 8, 2),
    (4, 32, 16): (64, 4, 2), (4, 64, 16): (64, 4, 2), (4, 128, 16): (32, 8, 2), (4, 256, 16): (16, 8, 2),
}  # fmt: skip


def configuration(element_size, head_dim, rows, paged):
    """(rows of a tile, keys of a block, warps, stages) for a key head with so many rows."""
    block_m = 16 if rows <= 16 or element_size == 4 else 32 if rows <= 32 else 64
    head_dim = next(d for d in (32, 64, 128, 256) if head_dim <= d)
    block_n, num_warps, num_stages = CONFIGS[element_size, head_dim, 16 if block_m == 16 else 64]
    if paged:  # the number of a page must be there before its keys are asked for: else fewer blocks are on their way
        num_stages = 2 * num_stages - 1
    return block_m, block_n, num_warps, num_stages


@triton.jit
def cache_rows(rows, inside, batch, row_stride, page_stride, block_table, pages, page_size, BLOCK_N: tl.constexpr,
               WHOLE_PAGES: tl.constexpr):  # fmt: skip
    """Where the rows of a block of keys begin, in elements from the first row of the key head."""
    if block_table is None:
        offsets = rows.to(tl.int64) * row_stride
    elif WHOLE_PAGES:  # all of the block lies in one page
        first = tl.min(rows, 0)
        page = tl.load(block_table + batch * pages + first // page_size).to(tl.int64)
        offsets = page * page_stride + (first % page_size + tl.arange(0, BLOCK_N)).to(tl.int64) * row_stride
    else:
        page = tl.load(block_table + batch * pages + rows // page_size, mask=inside, other=0).to(tl.int64)
        offsets = page * page_stride + (rows % page_size).to(tl.int64) * row_stride
    return offsets


@triton.jit
def load_rows(base, offsets, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if DIM != BLOCK_D:
        mask = mask & (offs_d < DIM)[None, :]
    return tl.load(base + offsets[:, None] + offs_d[None, :], mask=mask, other=0.0)


UNSPECIALIZED = ["seqlen_q", "capacity", "seqlen_new", "group", "splits", "window_left", "window_right",
                 "slopes_stride", "page_size", "pages", "blocks_m"]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_decode_split(q, k, v, out, lse, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, slopes, sink,
                           q_strides, k_strides, v_strides, out_strides, slopes_stride, n_kv_heads, group, seqlen_q,
                           seqlen_new, capacity, page_size, pages, splits, blocks_m, window_left, window_right,
                           softcap, scale, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
                           BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                           HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
                           SPLIT: tl.constexpr, WHOLE_PAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """SPLIT: out is fp32 sums (splits, batch, heads, seqlen_q, head_dim_v), lse (2, splits, batch, heads, seqlen_q) the
    maxima and the sums of their weights, all without the sink."""
    ALIBI: tl.constexpr = slopes is not None
    pid = tl.program_id(0)
    split = tl.program_id(1)
    start_m = pid % blocks_m * BLOCK_M
    kv_head = (pid // blocks_m % n_kv_heads).to(tl.int64)
    batch = (pid // blocks_m // n_kv_heads).to(tl.int64)
    length = tl.maximum(tl.minimum(tl.load(cache_seqlens + batch) + seqlen_new, capacity), 0)
    off = length - seqlen_q
    begin = 0
    if cache_leftpad is not None:
        begin = tl.maximum(tl.load(cache_leftpad + batch), 0)
    row = batch
    if cache_batch_idx is not None:
        row = tl.load(cache_batch_idx + batch).to(tl.int64)
    k += kv_head * k_strides[1]
    v += kv_head * v_strides[1]
    if block_table is None:
        k += row * k_strides[0]
        v += row * v_strides[0]

    # row r of the tile is query r // group of head r % group of those that share the key head
    offs_m = start_m + tl.arange(0, BLOCK_M)
    query = offs_m // group
    head = kv_head * group + offs_m % group
    inside_m = query < seqlen_q
    q_offsets = batch * q_strides[0] + head * q_strides[1] + query.to(tl.int64) * q_strides[2]
    q_tile = load_rows(q, q_offsets, inside_m, HEAD_DIM, BLOCK_D)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + batch * slopes_stride + head, mask=inside_m, other=0.0)[:, None]

    # the share of this split in the blocks of keys that some row sees
    first_query = start_m // group
    queries = (start_m + BLOCK_M - 1) // group + 1 - first_query
    first, first_full, end_full, end = key_blocks(  # noqa: RUF059  the loop below would carry a `_`
        first_query, queries, BLOCK_N, seqlen_q, length, off, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )  # all blocks are treated as edges: comparisons are free beside the reads
    first = tl.minimum(tl.maximum(first, begin // BLOCK_N), end)
    share = (end - first + splits - 1) // splits
    first += split * share
    end = tl.minimum(first + share, end)
    begin_k = begin
    end_k = length
    if HAS_LEFT:  # keys that no query sees are not even read
        begin_k = tl.maximum(begin_k, off - window_left)
    if HAS_RIGHT:
        end_k = tl.minimum(end_k, seqlen_q + off + window_right)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    i = query[:, None]
    for block in range(first, end):
        rows = tl.multiple_of(block * BLOCK_N, BLOCK_N) + tl.arange(0, BLOCK_N)
        inside = (rows >= begin_k) & (rows < end_k)
        j = rows[None, :]
        k_rows = cache_rows(rows, inside, batch, k_strides[2], k_strides[0], block_table, pages, page_size, BLOCK_N,
                            WHOLE_PAGES)  # fmt: skip
        qk = tl.dot(q_tile, tl.trans(load_rows(k, k_rows, inside, HEAD_DIM, BLOCK_D)), input_precision=PRECISION)
        s, _ = tile_scores(
            qk, i, j, off, seqlen_q, length, scale, softcap, None, q_strides, slope, SOFTCAP, ALIBI, True
        )
        visible = visible_tile(i, j, off, seqlen_q, length, window_left, window_right, None, q_strides, HAS_LEFT,
                               HAS_RIGHT, True)  # fmt: skip
        s = tl.where(visible & (j >= begin), s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = exponential(s - m_safe[:, None], True)
        alpha = exponential(m_i - m_safe, True)
        l_i = l_i * alpha + tl.sum(p, 1)
        v_rows = cache_rows(rows, inside, batch, v_strides[2], v_strides[0], block_table, pages, page_size, BLOCK_N,
                            WHOLE_PAGES)  # fmt: skip
        v_tile = load_rows(v, v_rows, inside, HEAD_DIM_V, BLOCK_DV)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_new

    if sink is not None and not SPLIT:
        sink_score = tl.load(sink + head, mask=inside_m, other=float("-inf"))
        m_new = tl.maximum(m_i, sink_score)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = exponential(m_i - m_safe, True)
        l_i = l_i * alpha + exponential(sink_score - m_safe, True)
        acc *= alpha[:, None]
        m_i = m_new
    number = (batch * n_kv_heads * group + head) * seqlen_q + query
    offs_d = tl.arange(0, BLOCK_DV)
    if SPLIT:
        rows = (tl.num_programs(0) // blocks_m).to(tl.int64) * group * seqlen_q
        number += split * rows
        offsets = number * HEAD_DIM_V
        tl.store(lse + number, m_i, mask=inside_m)
        tl.store(lse + splits * rows + number, l_i, mask=inside_m)
    else:
        # a row that saw nothing gives output 0 and lse -inf
        l_safe = tl.where(l_i == 0.0, 1.0, l_i)
        acc = acc / l_safe[:, None]
        offsets = batch * out_strides[0] + head * out_strides[1] + query.to(tl.int64) * out_strides[2]
        row_lse = tl.where(l_i == 0.0, float("-inf"), m_i + tl.log2(l_safe) * LN_2)
        tl.store(lse + number, row_lse, mask=inside_m)
    mask = inside_m[:, None] & (offs_d < HEAD_DIM_V)[None, :]
    tl.store(out + offsets[:, None] + offs_d[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_decode_combine(parts, part_stats, sink, out, lse, out_strides, n_heads, seqlen_q, splits,
                             HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """One program adds up the splits of one row. part_stats: maxima and sums, as attention_decode_split leaves them."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    head = row // seqlen_q % n_heads
    offs_d = tl.arange(0, BLOCK_DV)
    m_i = float("-inf")
    if sink is not None:
        m_i = tl.load(sink + head)
    l_i = 0.0
    if sink is not None:
        l_i = tl.where(m_i == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for start in range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        part_m = tl.load(part_stats + offs_s * rows + row, mask=offs_s < splits, other=float("-inf"))
        part_l = tl.load(part_stats + (splits + offs_s) * rows + row, mask=offs_s < splits, other=0.0)
        m_new = tl.maximum(m_i, tl.max(part_m, 0))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = exponential(part_m - m_safe, True)
        alpha = exponential(m_i - m_safe, True)
        pointers = parts + (offs_s * rows + row)[:, None] * HEAD_DIM_V + offs_d[None, :]
        mask = (offs_s < splits)[:, None] & (offs_d < HEAD_DIM_V)[None, :]
        values = tl.load(pointers, mask=mask, other=0.0)
        acc = acc * alpha + tl.sum(weight[:, None] * values, 0)
        l_i = l_i * alpha + tl.sum(weight * part_l, 0)
        m_i = m_new
    l_safe = tl.where(l_i == 0.0, 1.0, l_i)
    batch = row // seqlen_q // n_heads
    out += batch * out_strides[0] + head * out_strides[1] + row % seqlen_q * out_strides[2]
    tl.store(out + offs_d, (acc / l_safe).to(out.dtype.element_ty), mask=offs_d < HEAD_DIM_V)
    tl.store(lse + row, tl.where(l_i == 0.0, float("-inf"), m_i + tl.log2(l_safe) * LN_2))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_decode_append(k, v, k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx, k_strides, v_strides,
                            k_cache_strides, v_cache_strides, n_kv_heads, seqlen_new, capacity, page_size, pages,
                            HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
                            BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """One program copies BLOCK_N new keys and values of one head; those that the cache has no room for are dropped."""
    pid = tl.program_id(0)
    kv_head = (pid % n_kv_heads).to(tl.int64)
    batch = (pid // n_kv_heads).to(tl.int64)
    new = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    position = tl.load(cache_seqlens + batch) + new
    inside = (new < seqlen_new) & (position >= 0) & (position < capacity)
    row = batch
    if cache_batch_idx is not None:
        row = tl.load(cache_batch_idx + batch).to(tl.int64)
    k_rows = cache_rows(position, inside, batch, k_cache_strides[2], k_cache_strides[0], block_table, pages, page_size,
                        BLOCK_N, False)  # fmt: skip
    v_rows = cache_rows(position, inside, batch, v_cache_strides[2], v_cache_strides[0], block_table, pages, page_size,
                        BLOCK_N, False)  # fmt: skip
    if block_table is None:
        k_rows += row * k_cache_strides[0]
        v_rows += row * v_cache_strides[0]
    offs_d = tl.arange(0, BLOCK_D)
    tile = load_rows(k + batch * k_strides[0] + kv_head * k_strides[1], new.to(tl.int64) * k_strides[2], inside,
                     HEAD_DIM, BLOCK_D)  # fmt: skip
    pointers = k_cache + kv_head * k_cache_strides[1] + k_rows[:, None] + offs_d[None, :]
    tl.store(pointers, tile, mask=inside[:, None] & (offs_d < HEAD_DIM)[None, :])
    offs_d = tl.arange(0, BLOCK_DV)
    tile = load_rows(v + batch * v_strides[0] + kv_head * v_strides[1], new.to(tl.int64) * v_strides[2], inside,
                     HEAD_DIM_V, BLOCK_DV)  # fmt: skip
    pointers = v_cache + kv_head * v_cache_strides[1] + v_rows[:, None] + offs_d[None, :]
    tl.store(pointers, tile, mask=inside[:, None] & (offs_d < HEAD_DIM_V)[None, :])


def choose_splits(programs, blocks, slots):
    """The smallest number of splits whose last wave of programs leaves little of the device idle.

    Args:
        programs: without splits; blocks: of keys in a full cache; slots: programs that run at the same time.
    """
    if programs >= 0.8 * slots or blocks <= 4:
        return 1
    most = min(MAX_SPLITS, slots, blocks)
    filled = []
    for splits in range(1, most + 1):
        waves = programs * splits / slots
        filled.append(waves / -(-waves // 1))
    return next(n for n, share in enumerate(filled, 1) if share >= 0.85 * max(filled))


class Plan:
    """What follows from shapes, strides and options alone, made once for each kind of call; lengths are not in it."""

    def __init__(self, q, k_cache, v_cache, dtype, device, pages, slopes_dims, window_left, window_right, softcap,
                 num_splits, fp32_precision):  # fmt: skip
        (batch, n_heads, seqlen_q, head_dim), q_strides = q
        (_, n_kv_heads, page_size, _), k_strides = k_cache
        head_dim_v, v_strides = v_cache[0][3], v_cache[1]
        group = n_heads // max(n_kv_heads, 1)
        capacity = page_size * (pages or 1)
        block_m, block_n, num_warps, num_stages = configuration(
            dtype.itemsize, max(head_dim, head_dim_v), group * seqlen_q, pages is not None
        )
        whole_pages = False
        if pages is not None:  # smaller blocks, if that keeps each in one page
            fitting = next((n for n in (block_n, block_n // 2, block_n // 4) if n >= 16 and page_size % n == 0), 0)
            whole_pages = fitting >= min(32, block_n)
            block_n = fitting if whole_pages else block_n
        blocks_m = triton.cdiv(group * seqlen_q, block_m)
        programs, blocks = batch * n_kv_heads * blocks_m, max(1, triton.cdiv(capacity, block_n))
        # two programs of four warps share a multiprocessor
        splits = min(num_splits, MAX_SPLITS, blocks) or choose_splits(programs, blocks, 2 * multiprocessors(device))
        out = empty_in_layout(torch.empty_strided(*q, device="meta"), head_dim_v)
        self.out_layout = out.shape, out.stride()
        self.rows = batch * n_heads * seqlen_q
        self.parts = (splits, self.rows) if splits > 1 else None
        self.head_dim_v, self.block_dv = head_dim_v, max(16, triton.next_power_of_2(head_dim_v))
        self.grid = programs, splits
        self.strides = q_strides[:3], k_strides[:3], v_strides[:3], out.stride()[:3]
        self.sizes = (n_kv_heads, group, seqlen_q)
        self.slopes_stride = n_heads if slopes_dims == 2 else 0
        self.cache = (capacity, page_size, pages or 1, splits, blocks_m)
        reach = capacity + seqlen_q  # a side as long as this is no limit
        self.constants = {
            "HEAD_DIM": head_dim, "HEAD_DIM_V": head_dim_v, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK_DV": self.block_dv, "BLOCK_M": block_m, "BLOCK_N": block_n, "HAS_LEFT": 0 <= window_left < reach,
            "HAS_RIGHT": 0 <= window_right < reach, "SOFTCAP": softcap > 0.0, "SPLIT": splits > 1,
            "WHOLE_PAGES": whole_pages, "PRECISION": fp32_precision, "num_warps": num_warps, "num_stages": num_stages,
        }  # fmt: skip


plan_for = functools.lru_cache(4096)(Plan)


def geometry(t):
    return t.shape, t.stride()


def launch_fwd(q, k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, slopes, sink,
               seqlen_new, window_left, window_right, softcap, scale, num_splits):  # fmt: skip
    """The raw op attention_decode_fwd: (out, lse)."""
    q = unit_stride(q)
    cache_seqlens, block_table, cache_batch_idx, cache_leftpad, slopes, sink = (
        contiguous(t) for t in (cache_seqlens, block_table, cache_batch_idx, cache_leftpad, slopes, sink)
    )
    plan = plan_for(
        geometry(q), geometry(k_cache), geometry(v_cache), q.dtype, q.device,
        None if block_table is None else block_table.shape[1], 0 if slopes is None else slopes.dim(), window_left,
        window_right, softcap, num_splits, precision(q.dtype),
    )  # fmt: skip
    out = q.new_empty_strided(*plan.out_layout)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not plan.rows:
        return out, lse
    to, to_lse = out, lse
    if plan.parts:
        to = torch.empty((*plan.parts, plan.head_dim_v), dtype=torch.float32, device=q.device)
        to_lse = torch.empty((2, *plan.parts), dtype=torch.float32, device=q.device)
    launch(
        attention_decode_split, plan.grid, q.device, q, k_cache, v_cache, to, to_lse, cache_seqlens, block_table,
        cache_batch_idx, cache_leftpad, slopes, sink, *plan.strides, plan.slopes_stride, *plan.sizes, seqlen_new,
        *plan.cache, window_left, window_right, softcap, scale, **plan.constants,
    )  # fmt: skip
    if plan.parts:
        launch(
            attention_decode_combine, (plan.rows,), q.device, to, to_lse, sink, out, lse, plan.strides[3], q.shape[1],
            q.shape[2], plan.parts[0], HEAD_DIM_V=plan.head_dim_v, BLOCK_DV=plan.block_dv, BLOCK_S=COMBINE_SPLITS,
            num_warps=4,
        )  # fmt: skip
    return out, lse


def launch_append(k_cache, v_cache, k, v, cache_seqlens, block_table, cache_batch_idx):
    """The raw op attention_decode_append: k_cache and v_cache are changed in place."""
    k, v = unit_stride(k), unit_stride(v)
    batch, n_kv_heads, seqlen_new, head_dim = k.shape
    if not batch * n_kv_heads * seqlen_new:
        return
    page_size, pages = k_cache.shape[2], 1 if block_table is None else block_table.shape[1]
    grid = batch * n_kv_heads, triton.cdiv(seqlen_new, APPEND_ROWS)
    launch(
        attention_decode_append, grid, k.device, k, v, k_cache, v_cache, contiguous(cache_seqlens),
        contiguous(block_table), contiguous(cache_batch_idx), k.stride()[:3], v.stride()[:3], k_cache.stride()[:3],
        v_cache.stride()[:3], n_kv_heads, seqlen_new, page_size * pages, page_size, pages, HEAD_DIM=head_dim,
        HEAD_DIM_V=v.shape[3], BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_DV=max(16, triton.next_power_of_2(v.shape[3])), BLOCK_N=APPEND_ROWS, num_warps=4,
    )  # fmt: skip


register("attention_decode_fwd", launch_fwd)
register("attention_decode_append", launch_append)
