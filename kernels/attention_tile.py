"""Device code that the attention kernels share: loads and stores of a tile, and the arithmetic on a tile of scores.

attention_call.py describes the values that these functions take.
"""

import triton
import triton.language as tl

from fastattn.kernels.attention_frame import head_ptr
from fastattn.kernels.common import HOST_MADE, LOG2_E, dropout_halfwords, tanh


@triton.jit
def load_tile(side, start, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr,
              TMA: tl.constexpr):  # fmt: skip
    """Load rows start to start + BLOCK - 1. With EDGE, rows outside [begin, end) are zeros; columns past DIM always
    are."""
    if TMA == HOST_MADE:
        tile = side.source.load([side.index.to(tl.int32), side.head.to(tl.int32), start, 0]).reshape(BLOCK, BLOCK_D)
    elif TMA:
        tile = side.source.load([start - side.begin, 0])
    else:
        rows = start + tl.arange(0, BLOCK)
        offs_d = tl.arange(0, BLOCK_D)
        pointers = side.source + rows.to(tl.int64)[:, None] * side.stride + offs_d[None, :]
        inside = ((rows >= side.begin) & (rows < side.end))[:, None]
        if EDGE and DIM != BLOCK_D:
            tile = tl.load(pointers, mask=inside & (offs_d < DIM)[None, :], other=0.0)
        elif EDGE:
            tile = tl.load(pointers, mask=inside, other=0.0)
        elif DIM != BLOCK_D:
            tile = tl.load(pointers, mask=(offs_d < DIM)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(rows, index, head, first, start, end, tile, DIM: tl.constexpr):
    """Store a tile at row first + start of a head. Only rows before first + end and columns before DIM are stored."""
    offs = start + tl.arange(0, tile.shape[0])
    offs_d = tl.arange(0, tile.shape[1])
    base = head_ptr(rows, index, head) + first * rows.strides[2]
    pointers = base + offs.to(tl.int64)[:, None] * rows.strides[2] + offs_d[None, :]
    tl.store(pointers, tile.to(rows.ptr.dtype.element_ty), mask=(offs < end)[:, None] & (offs_d < DIM)[None, :])


@triton.jit
def score_ptrs(rows, head, i, j):
    """Return pointers to the elements of a tile in a bias, its gradient or a mask."""
    return head_ptr(rows, head.batch, head.head) + i.to(tl.int64) * rows.strides[2] + j.to(tl.int64) * rows.strides[3]


@triton.jit
def seen_keys(j, span, head, features):
    """Return which of the keys j a mask of one row shows."""
    pointers = head_ptr(features.mask, head.batch, head.head) + j.to(tl.int64) * features.mask.strides[3]
    return tl.load(pointers, mask=j < span.length_k, other=0) != 0


@triton.jit
def clear_hidden(rows, visible, start_n, span, head, features, form: tl.constexpr, EDGE: tl.constexpr):
    """Return rows of k or v with zeros for keys that the mask hides, because these may be NaN, and 0 * NaN is NaN."""
    if form.KEY_MASK and EDGE:
        j = (start_n + tl.arange(0, form.BLOCK_N))[:, None]
        rows = tl.where(seen_keys(j, span, head, features), rows, 0.0)
    if form.MASKED:
        seen = tl.max(visible.to(tl.int32), 0) > 0
        rows = tl.where(seen[:, None], rows, 0.0)
    return rows


@triton.jit
def visible_tile(i, j, span, head, features, form: tl.constexpr, EDGE: tl.constexpr):
    """Return which key each query sees. i and j are positions that broadcast; a transposed tile works too."""
    inside = (j < span.length_k) & (i < span.seqlen_q)
    visible = inside
    if EDGE and form.HAS_LEFT:
        visible = visible & (j >= i + (span.off - span.left))
    if EDGE and form.HAS_RIGHT:
        visible = visible & (j <= i + (span.off + span.right))
    if EDGE and form.KEY_MASK:
        visible = visible & seen_keys(j, span, head, features)
    if form.MASKED:
        visible = visible & (tl.load(score_ptrs(features.mask, head, i, j), mask=inside, other=0) != 0)
    return visible


@triton.jit
def tile_scores(qk, i, j, span, head, features, form: tl.constexpr):
    """Return (scores, capped / softcap). Scores are times log2(e) unless NATURAL. The second is undefined without a
    cap."""
    capped = qk
    factor = features.scale
    if form.SOFTCAP:
        capped = tanh(qk * (features.scale / features.softcap))
        factor = features.softcap
    if not form.NATURAL:
        factor *= LOG2_E
    if features.bias is not None:
        inside = (i < span.seqlen_q) & (j < span.length_k)
        add = tl.load(score_ptrs(features.bias, head, i, j), mask=inside, other=0.0).to(tl.float32)
        # An explicit FMA, because forward and backward must round the same way.
        s = tl.fma(capped, factor, add)
    else:
        s = capped * factor
    if features.slopes is not None:
        s = tl.fma(tl.abs(i + span.off - j).to(tl.float32), -head.slope, s)
    return s, capped


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def empty_softmax(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return (weighted sum of values, sum of weights, maximum) for rows that have seen nothing yet."""
    greatest = tl.full([ROWS], float("-inf"), tl.float32)
    return zeros(ROWS, COLUMNS), tl.zeros([ROWS], tl.float32), greatest


@triton.jit
def exponential(difference, NATURAL: tl.constexpr):
    """Return e to the power of a difference of scores."""
    if NATURAL:
        difference *= LOG2_E
    return tl.exp2(difference)


@triton.jit
def add_sink(acc, l_i, m_i, score):
    """Return (weighted sum of values, sum of weights, maximum) with one more score, which has no value.

    `m_i` and `score` are in natural units.
    """
    m_new = tl.maximum(m_i, score)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = exponential(m_i - m_safe, True)
    l_i = l_i * alpha + exponential(score - m_safe, True)
    acc *= alpha[:, None]
    return acc, l_i, m_new


@triton.jit
def probability(s, lse_high, lse_low, NATURAL: tl.constexpr):
    """Return exp(s - lse) for both parts of lse, in the form that the preprocess kernel of the backward writes."""
    difference = s - lse_high
    if NATURAL:
        # The difference is above 0 only if lse comes from another backend, which rounded the scores differently. It can
        # be 64 for a bias of 1e9.
        difference = tl.minimum(difference, 0.0, propagate_nan=tl.PropagateNan.ALL) * LOG2_E - lse_low
    return tl.exp2(difference)


@triton.jit
def keep_tile(start_m, start_n, head, features, form: tl.constexpr):
    """Return dropout's decisions for a tile. Row and column are positions; the slab is batch * n_heads + head."""
    row = start_m + tl.arange(0, form.BLOCK_M)
    group = start_n // 8 + tl.arange(0, form.BLOCK_N // 8)
    return dropout_halfwords(features.rng_ptr, row, row * 0 + head.slab, group) >= head.threshold


@triton.jit
def load_softmax(softmax, first, rows, end, form: tl.constexpr):
    """Load (both parts of lse, delta) of rows first + rows. From row `end` on, lse is +inf, so p = 0."""
    inside = rows < end
    high = tl.load(softmax.high_ptr + first + rows, mask=inside, other=float("inf"))
    low = high
    if form.NATURAL:
        low = tl.load(softmax.low_ptr + first + rows, mask=inside, other=0.0)
    return high, low, tl.load(softmax.delta_ptr + first + rows, mask=inside, other=0.0)


@triton.jit
def score_gradient(
    q, k, v, do, softmax, start_m, start_n, span, head, features, form: tl.constexpr, EDGE: tl.constexpr
):
    """Return (ds, capped score, visible) for a tile with queries as rows. softmax: the result of load_softmax."""
    row_high, row_low, row_delta = softmax
    i = (start_m + tl.arange(0, form.BLOCK_M))[:, None]
    j = (start_n + tl.arange(0, form.BLOCK_N))[None, :]
    qk = tl.dot(q, tl.trans(k), input_precision=form.PRECISION)
    s, capped = tile_scores(qk, i, j, span, head, features, form)
    visible = visible_tile(i, j, span, head, features, form, EDGE)
    MASKED: tl.constexpr = EDGE or form.MASKED
    if MASKED:  # before the exponential, because lse may be far below 0, the score of a missing key
        s = tl.where(visible, s, float("-inf"))
    p = probability(s, row_high[:, None], row_low[:, None], form.NATURAL)
    dp = tl.dot(do, tl.trans(v), input_precision=form.PRECISION)
    if features.rng_ptr is not None:
        dp = tl.where(keep_tile(start_m, start_n, head, features, form), dp * features.rescale, 0.0)
    ds = p * (dp - row_delta[:, None])
    if MASKED:
        ds = tl.where(visible, ds, 0.0)
    return ds, capped, visible
