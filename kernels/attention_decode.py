"""Attention of a few queries on a cache, contiguous or paged: split over the keys, then combined.

    s   = scale * q·k;  s = softcap * tanh(s / softcap);  s = s - slope * |i + off - j|;  -inf where hidden
    lse = log(sum_j exp(s) [+ exp(sink)]);  out = exp(s - lse) · v
    a split n: m_n = max(s), l_n = sum_j exp(s - m_n), o_n = exp(s - m_n) · v
    all splits: m = max(m_n), l = sum_n l_n * exp(m_n - m), out = sum_n o_n * exp(m_n - m) / l, lse = m + log(l)

One program owns a split of the keys of one sequence and key head, and up to 64 rows: the queries of the heads that
share the key head, so the cache is read only once. Only the device knows the lengths. The number of splits therefore
depends on the size of the cache, and each program takes its share of the keys that its sequence has. With one split,
the program writes out and lse; otherwise it writes fp32 parts, which a second kernel adds in a fixed order. Maximum and
sum are stored separately, because one fp32 lse of a split would lose the logarithm of its sum next to large scores. The
kernel that appends new keys is in attention_decode_cache.py.

Limits: head dims up to 256. Blocks of keys that lie in one page are read as blocks, others row by row.
Reference: Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.kernels.attention_call import (
    Features,
    Head,
    Rows,
    Span,
    geometry,
    padded,
    precision,
    rows_of,
)
from fastattn.kernels.attention_decode_cache import Cache, cache_ptr, find_places, load_rows
from fastattn.kernels.attention_frame import (
    head_ptr,
    key_blocks,
)
from fastattn.kernels.attention_tile import (
    add_sink,
    empty_softmax,
    exponential,
    tile_scores,
    visible_tile,
)
from fastattn.kernels.common import LN_2, Launch, contiguous, launch, multiprocessors, register, unit_stride
from fastattn.ops._layout import empty_in_layout

MAX_SPLITS, COMBINE_SPLITS = 128, 16
# A key is (bytes per element, head dim, maximum of rows); the table serves all architectures. A stage holds about 32 KB
# of keys and values for few rows. The kernels compile without spills; nothing has been measured on hardware yet.
TABLE = {
    (2, 32, 16): Launch(16, 128, 4, 3), (2, 64, 16): Launch(16, 128, 4, 3), (2, 128, 16): Launch(16, 64, 4, 3),
    (2, 256, 16): Launch(16, 32, 4, 3), (2, 32, 64): Launch(64, 64, 4, 3), (2, 64, 64): Launch(64, 64, 4, 3),
    (2, 128, 64): Launch(64, 32, 8, 3), (2, 256, 64): Launch(64, 16, 8, 2), (4, 32, 16): Launch(16, 64, 4, 2),
    (4, 64, 16): Launch(16, 64, 4, 2), (4, 128, 16): Launch(16, 32, 8, 2), (4, 256, 16): Launch(16, 16, 8, 2),
}  # fmt: skip


def pick(element_size, head_dim, rows, paged):
    """Return the Launch for a key head with `rows` rows."""
    few = rows <= 16 or element_size == 4
    head_dim = next(d for d in (32, 64, 128, 256) if head_dim <= d)
    config = TABLE[element_size, head_dim, 16 if few else 64]
    if not few and rows <= 32:
        config = config._replace(block_m=32)
    # The page number is needed before its keys are requested, so fewer blocks would be in flight.
    if paged:
        config = config._replace(stages=2 * config.stages - 1)
    return config


class DecodeForm(NamedTuple):
    """The constants of attention_decode_split_kernel. Fields that Form also has have the same names."""

    HEAD_DIM: Any
    HEAD_DIM_V: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    BLOCK_M: Any
    BLOCK_N: Any
    HAS_LEFT: Any
    HAS_RIGHT: Any
    SOFTCAP: Any
    MASKED: Any
    KEY_MASK: Any
    NATURAL: Any
    SPLIT: Any  # there is more than one split
    WHOLE_PAGES: Any  # each block of keys lies in one page
    PRECISION: Any


@triton.jit
def keys_of_split(split, splits, start_m, group, begin, span, form: tl.constexpr):
    """Return (first block, end of the blocks, first key, end of the keys) that a split reads.

    The splits share the blocks of keys that some row sees. Keys that no query sees are not loaded.
    """
    first_query = start_m // group
    queries = (start_m + form.BLOCK_M - 1) // group + 1 - first_query
    seen = key_blocks(first_query, queries, span, form)
    first = tl.minimum(tl.maximum(seen.first, begin // form.BLOCK_N), seen.end)
    share = (seen.end - first + splits - 1) // splits
    first += split * share
    end = tl.minimum(first + share, seen.end)
    begin_k = begin
    end_k = span.length_k
    if form.HAS_LEFT:
        begin_k = tl.maximum(begin_k, span.off - span.left)
    if form.HAS_RIGHT:
        end_k = tl.minimum(end_k, span.seqlen_q + span.off + span.right)
    return first, end, begin_k, end_k


@triton.jit
def _split_blocks(q_tile, k, v, k_ptr, v_ptr, query, begin, keys, span, head, features, cache, pages, page_size,
                  form: tl.constexpr):  # fmt: skip
    """Return (weighted sum of values, sum of weights, maximum) of the rows over the keys of a split.

    k_ptr, v_ptr: the start of the key head. keys: the result of keys_of_split. All blocks are treated as edges, because
    comparisons cost little next to the reads.
    """
    first, end, begin_k, end_k = keys
    acc, l_i, m_i = empty_softmax(form.BLOCK_M, form.BLOCK_DV)
    BLOCK_N: tl.constexpr = form.BLOCK_N
    i = query[:, None]
    for block in range(first, end):
        start = tl.multiple_of(block * BLOCK_N, BLOCK_N)
        rows = start + tl.arange(0, BLOCK_N)
        inside = (rows >= begin_k) & (rows < end_k)
        j = rows[None, :]
        page, row = find_places(start, rows, inside, span.batch, cache, pages, page_size, form.WHOLE_PAGES)
        k_tile = load_rows(k_ptr, page * k.strides[0] + row * k.strides[2], inside, form.HEAD_DIM, form.BLOCK_D)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=form.PRECISION)
        s, _ = tile_scores(qk, i, j, span, head, features, form)
        visible = visible_tile(i, j, span, head, features, form, True)
        s = tl.where(visible & (j >= begin), s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = exponential(s - m_safe[:, None], True)
        alpha = exponential(m_i - m_safe, True)
        l_i = l_i * alpha + tl.sum(p, 1)
        v_tile = load_rows(v_ptr, page * v.strides[0] + row * v.strides[2], inside, form.HEAD_DIM_V, form.BLOCK_DV)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=form.PRECISION)
        m_i = m_new
    return acc, l_i, m_i


UNSPECIALIZED = ["seqlen_q", "capacity", "seqlen_new", "group", "splits", "window_left", "window_right", "page_size",
                 "pages", "blocks"]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_decode_split_kernel(q, k, v, out, lse_ptr, features, cache, n_kv_heads, group, seqlen_q, seqlen_new,
                                  capacity, page_size, pages, splits, blocks, window_left, window_right,
                                  form: tl.constexpr):  # fmt: skip
    """Compute a split for up to 64 rows.

    SPLIT: out receives fp32 sums (splits, batch, heads, seqlen_q, head_dim_v). lse (2, splits, batch, heads, seqlen_q)
    receives the maxima and the sums of weights. All are without the sink."""
    pid = tl.program_id(0)
    split = tl.program_id(1)
    start_m = pid % blocks * form.BLOCK_M
    kv_head = (pid // blocks % n_kv_heads).to(tl.int64)
    batch = (pid // blocks // n_kv_heads).to(tl.int64)
    length = tl.maximum(tl.minimum(tl.load(cache.seqlens_ptr + batch) + seqlen_new, capacity), 0)
    begin = 0
    if cache.leftpad_ptr is not None:
        begin = tl.maximum(tl.load(cache.leftpad_ptr + batch), 0)
    k_ptr = cache_ptr(k, batch, kv_head, cache)
    v_ptr = cache_ptr(v, batch, kv_head, cache)

    # Row r of the tile is query r // group of head r % group of the heads that share the key head.
    offs_m = start_m + tl.arange(0, form.BLOCK_M)
    query = offs_m // group
    q_head = kv_head * group + offs_m % group
    inside_m = query < seqlen_q
    q_offsets = batch * q.strides[0] + q_head * q.strides[1] + query.to(tl.int64) * q.strides[2]
    q_tile = load_rows(q.ptr, q_offsets, inside_m, form.HEAD_DIM, form.BLOCK_D)
    slope = 0.0
    if features.slopes is not None:
        slopes = features.slopes.ptr + batch * features.slopes.strides[0] + q_head
        slope = tl.load(slopes, mask=inside_m, other=0.0)[:, None]
    span = Span(batch, batch >= 0, batch, 0, 0, seqlen_q, capacity, length, length - seqlen_q, window_left,
                window_right, 0, 0, 0)  # fmt: skip
    head = Head(batch, q_head, slope, 0, 0)

    keys = keys_of_split(split, splits, start_m, group, begin, span, form)
    acc, l_i, m_i = _split_blocks(
        q_tile, k, v, k_ptr, v_ptr, query, begin, keys, span, head, features, cache, pages, page_size, form
    )
    if features.sink_ptr is not None and not form.SPLIT:
        sink_score = tl.load(features.sink_ptr + q_head, mask=inside_m, other=float("-inf"))
        acc, l_i, m_i = add_sink(acc, l_i, m_i, sink_score)
    number = (batch * n_kv_heads * group + q_head) * seqlen_q + query
    offs_d = tl.arange(0, form.BLOCK_DV)
    if form.SPLIT:
        rows = (tl.num_programs(0) // blocks).to(tl.int64) * group * seqlen_q
        number += split * rows
        offsets = number * form.HEAD_DIM_V
        tl.store(lse_ptr + number, m_i, mask=inside_m)
        tl.store(lse_ptr + splits * rows + number, l_i, mask=inside_m)
    else:
        # A row that saw nothing gives output 0 and lse -inf.
        l_safe = tl.where(l_i == 0.0, 1.0, l_i)
        acc = acc / l_safe[:, None]
        offsets = batch * out.strides[0] + q_head * out.strides[1] + query.to(tl.int64) * out.strides[2]
        row_lse = tl.where(l_i == 0.0, float("-inf"), m_i + tl.log2(l_safe) * LN_2)
        tl.store(lse_ptr + number, row_lse, mask=inside_m)
    mask = inside_m[:, None] & (offs_d < form.HEAD_DIM_V)[None, :]
    tl.store(out.ptr + offsets[:, None] + offs_d[None, :], acc.to(out.ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_decode_combine_kernel(parts_ptr, stats_ptr, sink_ptr, out, lse_ptr, n_heads, seqlen_q, splits,
                                    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
                                    BLOCK_S: tl.constexpr):  # fmt: skip
    """Combine the splits of one row, whose parts attention_decode_split_kernel wrote."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    head = row // seqlen_q % n_heads
    offs_d = tl.arange(0, BLOCK_DV)
    m_i = float("-inf")
    if sink_ptr is not None:
        m_i = tl.load(sink_ptr + head)
    l_i = 0.0
    if sink_ptr is not None:
        l_i = tl.where(m_i == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for start in range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        part_m = tl.load(stats_ptr + offs_s * rows + row, mask=offs_s < splits, other=float("-inf"))
        part_l = tl.load(stats_ptr + (splits + offs_s) * rows + row, mask=offs_s < splits, other=0.0)
        m_new = tl.maximum(m_i, tl.max(part_m, 0))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = exponential(part_m - m_safe, True)
        alpha = exponential(m_i - m_safe, True)
        pointers = parts_ptr + (offs_s * rows + row)[:, None] * HEAD_DIM_V + offs_d[None, :]
        mask = (offs_s < splits)[:, None] & (offs_d < HEAD_DIM_V)[None, :]
        values = tl.load(pointers, mask=mask, other=0.0)
        acc = acc * alpha + tl.sum(weight[:, None] * values, 0)
        l_i = l_i * alpha + tl.sum(weight * part_l, 0)
        m_i = m_new
    l_safe = tl.where(l_i == 0.0, 1.0, l_i)
    out_ptr = head_ptr(out, row // seqlen_q // n_heads, head) + row % seqlen_q * out.strides[2]
    tl.store(out_ptr + offs_d, (acc / l_safe).to(out.ptr.dtype.element_ty), mask=offs_d < HEAD_DIM_V)
    tl.store(lse_ptr + row, tl.where(l_i == 0.0, float("-inf"), m_i + tl.log2(l_safe) * LN_2))


def choose_splits(programs, blocks, slots):
    """Return the smallest number of splits whose last wave of programs leaves little of the device idle.

    Args:
        programs: the number of programs without splits.
        blocks: the number of blocks of keys in a full cache.
        slots: the number of programs that run concurrently.
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
    """Everything that depends on shapes, strides and options only. It is cached per signature."""

    def __init__(self, q, k_cache, v_cache, dtype, device, pages, slopes_dims, window, softcap, num_splits,
                 fp32_precision):  # fmt: skip
        (batch, n_heads, seqlen_q, head_dim), q_strides = q
        (_, n_kv_heads, page_size, _), k_strides = k_cache
        head_dim_v, v_strides = v_cache[0][3], v_cache[1]
        group = n_heads // max(n_kv_heads, 1)
        capacity = page_size * (pages or 1)
        config = pick(dtype.itemsize, max(head_dim, head_dim_v), group * seqlen_q, pages is not None)
        block_n = config.block_n
        whole_pages = False
        if pages is not None:  # smaller blocks are used if each of them then lies in one page
            fitting = next((n for n in (block_n, block_n // 2, block_n // 4) if n >= 16 and page_size % n == 0), 0)
            whole_pages = fitting >= min(32, block_n)
            block_n = fitting if whole_pages else block_n
        blocks_m = triton.cdiv(group * seqlen_q, config.block_m)
        programs, blocks = batch * n_kv_heads * blocks_m, max(1, triton.cdiv(capacity, block_n))
        # Two programs of four warps share a multiprocessor.
        splits = min(num_splits, MAX_SPLITS, blocks) or choose_splits(programs, blocks, 2 * multiprocessors(device))
        out = empty_in_layout(torch.empty_strided(*q, device="meta"), head_dim_v)
        self.out_layout = out.shape, out.stride()
        self.rows = batch * n_heads * seqlen_q
        self.parts = (splits, self.rows) if splits > 1 else None
        self.grid = programs, splits
        self.strides = q_strides[:3], k_strides[:3], v_strides[:3], out.stride()[:3]
        self.sizes = (n_kv_heads, group, seqlen_q)
        self.slopes_strides = (n_heads if slopes_dims == 2 else 0,)
        self.cache = (capacity, page_size, pages or 1, splits, blocks_m)
        reach = capacity + seqlen_q  # a side of the window that is this long has no effect
        has_left, has_right = (0 <= side < reach for side in window)
        self.head_dim_v, self.block_dv = head_dim_v, padded(head_dim_v)
        self.form = DecodeForm(
            head_dim, head_dim_v, padded(head_dim), self.block_dv, config.block_m, block_n, has_left, has_right,
            softcap > 0.0, False, False, True, splits > 1, whole_pages, fp32_precision,
        )  # fmt: skip
        self.options = config.options()


plan_for = functools.lru_cache(4096)(Plan)


def attention_decode_fwd(q, k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, slopes, sink,
                         seqlen_new, window_left, window_right, softcap, scale, num_splits):  # fmt: skip
    """The raw op attention_decode_fwd: returns (out, lse)."""
    q, sink = unit_stride(q), contiguous(sink)
    plan = plan_for(
        geometry(q), geometry(k_cache), geometry(v_cache), q.dtype, q.device,
        None if block_table is None else block_table.shape[1], 0 if slopes is None else slopes.dim(),
        (window_left, window_right), softcap, num_splits, precision(q.dtype),
    )  # fmt: skip
    out = q.new_empty_strided(*plan.out_layout)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not plan.rows:
        return out, lse
    to, to_lse = out, lse
    if plan.parts:
        to = torch.empty((*plan.parts, plan.head_dim_v), dtype=torch.float32, device=q.device)
        to_lse = torch.empty((2, *plan.parts), dtype=torch.float32, device=q.device)
    slopes = None if slopes is None else Rows(slopes.contiguous(), plan.slopes_strides)
    features = Features(scale, softcap, 1.0, None, None, None, None, slopes, sink, None, None, None)
    cache = Cache(*map(contiguous, (cache_seqlens, block_table, cache_batch_idx, cache_leftpad)))
    launch(
        attention_decode_split_kernel, plan.grid, q.device, *map(Rows, (q, k_cache, v_cache, to), plan.strides), to_lse,
        features, cache, *plan.sizes, seqlen_new, *plan.cache, window_left, window_right, plan.form, **plan.options,
    )  # fmt: skip
    if plan.parts:
        launch(
            attention_decode_combine_kernel, (plan.rows,), q.device, to, to_lse, sink, rows_of(out), lse, q.shape[1],
            q.shape[2], plan.parts[0], HEAD_DIM_V=plan.head_dim_v, BLOCK_DV=plan.block_dv, BLOCK_S=COMBINE_SPLITS,
            num_warps=4,
        )  # fmt: skip
    return out, lse


register("attention_decode_fwd", attention_decode_fwd)
