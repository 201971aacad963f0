"""Device code that the attention kernels share. It finds the sequence, head, rows and blocks of keys that a program
works on.

attention_call.py describes the values that these functions take.
"""

import triton
import triton.language as tl

from fastattn.kernels.attention_call import Blocks, Head, Side, Span
from fastattn.kernels.common import DEVICE_MADE, HOST_MADE

SEARCHED = tl.constexpr(128)  # the number of sequences that find_tile reads at a time


@triton.jit
def find_tile(cu_seqlens_ptr, tiles, total, tile, BLOCK: tl.constexpr):
    """Return (sequence, tile within it, whether it is a sequence) for one of the `tiles` of packed rows.

    Sequence b begins with tile cu_seqlens[b] // BLOCK + b. Each sequence gets at least as many tiles as it needs. All
    sequences together get total // BLOCK + sequences tiles: the grid grows with the number of rows, not with the
    longest sequence. The rows after the last sequence are treated as one more sequence.
    """
    sequences = tiles - 1 - total // BLOCK
    low = sequences * 0
    size = sequences + 1
    while size > 1:  # the answer is one of the sequences low to low + size - 1
        step = (size + SEARCHED - 1) // SEARCHED
        local = tl.arange(0, SEARCHED) * step
        begins = tl.load(cu_seqlens_ptr + low + local, mask=local < size, other=0) // BLOCK + low + local
        passed = tl.sum(((begins <= tile) & (local < size)).to(tl.int32))
        low += tl.maximum(passed - 1, 0) * step
        size = tl.minimum(step, sequences + 1 - low)
    tile -= tl.load(cu_seqlens_ptr + low) // BLOCK + low
    return low.to(tl.int64), tile, low < sequences


@triton.jit
def locate(batch, within, features, total_q, total_k, left, right, form: tl.constexpr, OF_KEYS: tl.constexpr):
    """Return the Span of a batch entry or packed sequence.

    If `batch` is not `within` the packed sequences, the rows are those after the last one, and the other side is empty.
    OF_KEYS: the rows are keys.
    """
    index = batch
    first_q = batch * 0
    first_k = batch * 0
    seqlen_q = total_q
    seqlen_k = total_k
    if features.cu_seqlens_q_ptr is not None:
        index = batch * 0
        begin_q = tl.load(features.cu_seqlens_q_ptr + batch)
        begin_k = tl.load(features.cu_seqlens_k_ptr + batch)
        end_q = tl.load(features.cu_seqlens_q_ptr + batch + 1, mask=within, other=begin_q if OF_KEYS else total_q)
        end_k = tl.load(features.cu_seqlens_k_ptr + batch + 1, mask=within, other=total_k if OF_KEYS else begin_k)
        seqlen_q = end_q - begin_q
        seqlen_k = end_k - begin_k
        first_q = begin_q.to(tl.int64)
        first_k = begin_k.to(tl.int64)
    length_k = seqlen_k
    if features.seqlens_k_ptr is not None:
        length = load_of_sequence(features.seqlens_k_ptr + batch, within, 0, features)
        length_k = tl.maximum(tl.minimum(length, seqlen_k), 0)
    off = length_k - seqlen_q
    if form.TOP_LEFT:
        off *= 0
    first_seen = length_k * 0
    end_run = first_seen
    end_seen = first_seen
    if form.KEY_MASK:
        runs = features.runs.ptr + batch * features.runs.strides[0]
        first_seen = tl.load(runs)
        end_run = tl.minimum(tl.load(runs + 1), length_k)
        end_seen = tl.minimum(tl.load(runs + 2), length_k)
    return Span(batch, within, index, first_q, first_k, seqlen_q, seqlen_k, length_k, off, left, right, first_seen,
                end_run, end_seen)  # fmt: skip


@triton.jit
def load_of_sequence(ptr, within, other, features):
    """Load a number for a sequence, or return `other` for the rows after the last packed one."""
    if features.cu_seqlens_q_ptr is not None:
        number = tl.load(ptr, mask=within, other=other)
    else:
        number = tl.load(ptr)
    return number


@triton.jit
def head_frame(features, heads, total_q, total_k, blocks, left, right, form: tl.constexpr, OF_KEYS: tl.constexpr):
    """Return (first row of this program within its sequence, head of q, or of k if OF_KEYS, Span) from the grid.

    The grid has `blocks` programs per head and batch entry, each for BLOCK_M queries or BLOCK_N keys.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    if form.HAS_RIGHT and not OF_KEYS:
        # With a causal mask, the longest rows come first. Keys need no reversal, because most queries see the first
        # ones.
        block = blocks - 1 - block
    batch = (pid // blocks // heads).to(tl.int64)
    head = (pid // blocks % heads).to(tl.int64)
    within = batch >= 0
    if OF_KEYS:
        if features.cu_seqlens_k_ptr is not None:
            batch, block, within = find_tile(features.cu_seqlens_k_ptr, blocks, total_k, block, form.BLOCK_N)
        start = block * form.BLOCK_N
    else:
        if features.cu_seqlens_q_ptr is not None:
            batch, block, within = find_tile(features.cu_seqlens_q_ptr, blocks, total_q, block, form.BLOCK_M)
        start = block * form.BLOCK_M
    return start, head, locate(batch, within, features, total_q, total_k, left, right, form, OF_KEYS)


@triton.jit
def find_head(head, span, features, n_heads, threshold):
    """Return the Head of a query head."""
    slope = 0.0
    if features.slopes is not None:
        slopes = features.slopes.ptr + span.batch * features.slopes.strides[0] + head
        slope = load_of_sequence(slopes, span.within, 0.0, features)
    slab = (span.batch * n_heads + head).to(tl.int32)
    return Head(span.batch, head, slope, slab, threshold)


@triton.jit
def head_ptr(rows, batch, head):
    """Return the start of a head."""
    return rows.ptr + batch * rows.strides[0] + head * rows.strides[1]


@triton.jit
def side_of(rows, index, head, first, begin, end, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
            TMA: tl.constexpr, descriptor=None):  # fmt: skip
    """Return the Side for rows [begin, end) of a head, counted from its row `first`.

    A descriptor that is made here begins with row `begin`. Rows before it have negative coordinates, which load as
    zeros. A descriptor that the host has made (`descriptor`) holds all heads, and [begin, end) are all rows of a head.
    """
    stride = rows.strides[2]
    source = head_ptr(rows, index, head) + first * stride
    if TMA == DEVICE_MADE:
        source += tl.cast(begin, tl.int64) * stride
        source = tl.make_tensor_descriptor(source, [tl.maximum(end - begin, 1), DIM], [stride, 1], [BLOCK, BLOCK_D])
    if TMA == HOST_MADE:
        source = descriptor
    return Side(source, index, head, stride, begin, end)


@triton.jit
def query_side(rows, head, span, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
               descriptor=None):  # fmt: skip
    """Return the Side for the rows of q, or of a tensor like q, in a head."""
    return side_of(rows, span.index, head, span.first_q, 0, span.seqlen_q, DIM, BLOCK_D, BLOCK, TMA, descriptor)


@triton.jit
def key_side(rows, descriptor, head, span, DIM: tl.constexpr, BLOCK_D: tl.constexpr, form: tl.constexpr):
    """Return the Side for the rows of k or v in a head, without the keys that no query can see. Those are not read."""
    begin = 0
    end = span.length_k
    if form.HAS_LEFT:
        begin = tl.maximum(span.off - span.left, 0)
    if form.HAS_RIGHT:
        end = tl.minimum(span.length_k, span.seqlen_q + span.off + span.right)
    if form.KEY_MASK:
        begin = tl.maximum(begin, span.first_seen)
        end = tl.minimum(end, span.end_seen)
    return side_of(rows, span.index, head, span.first_k, begin, end, DIM, BLOCK_D, form.BLOCK_N, form.TMA, descriptor)


@triton.jit
def key_blocks(start_m, rows, span, form: tl.constexpr):
    """Return the blocks of keys that rows start_m to start_m + rows - 1 see. Each row sees all of the "full" blocks."""
    end_m = tl.minimum(start_m + rows, span.seqlen_q)
    low = 0
    high = span.length_k
    full_low = 0
    full_high = span.length_k
    if form.HAS_LEFT:
        low = tl.minimum(tl.maximum(start_m + span.off - span.left, 0), span.length_k)
        full_low = tl.maximum(end_m - 1 + span.off - span.left, 0)
    if form.HAS_RIGHT:
        high = tl.maximum(tl.minimum(span.length_k, end_m + span.off + span.right), 0)
        full_high = tl.maximum(tl.minimum(span.length_k, start_m + span.off + span.right + 1), 0)
    if form.KEY_MASK:
        low = tl.maximum(low, span.first_seen)
        high = tl.minimum(high, span.end_seen)
        full_low = tl.maximum(full_low, span.first_seen)
        full_high = tl.minimum(full_high, span.end_run)
    return blocks_of(low, high, full_low, full_high, form.BLOCK_N)


@triton.jit
def query_blocks(start_n, span, form: tl.constexpr):
    """Return the blocks of queries that see keys of the block at start_n. The "full" blocks see all of these keys."""
    end_n = tl.minimum(start_n + form.BLOCK_N, span.length_k)
    low = 0
    high = tl.where(end_n > start_n, span.seqlen_q, 0)
    full_low = 0
    full_high = span.seqlen_q
    if form.HAS_RIGHT:
        low = tl.minimum(tl.maximum(start_n - span.off - span.right, 0), span.seqlen_q)
        full_low = tl.maximum(end_n - 1 - span.off - span.right, 0)
    if form.HAS_LEFT:
        high = tl.minimum(high, tl.maximum(end_n - span.off + span.left, 0))
        full_high = tl.maximum(tl.minimum(span.seqlen_q, start_n - span.off + span.left + 1), 0)
    if form.KEY_MASK:
        high = tl.where((end_n > span.first_seen) & (start_n < span.end_seen), high, 0)
        full_high = tl.where((start_n >= span.first_seen) & (end_n <= span.end_run), full_high, 0)
    return blocks_of(low, high, full_low, full_high, form.BLOCK_M)


@triton.jit
def blocks_of(low, high, full_low, full_high, BLOCK: tl.constexpr):
    """Return the Blocks that hold rows low to high - 1. The full blocks lie within full_low to full_high - 1."""
    first = low // BLOCK
    end = tl.maximum((high + BLOCK - 1) // BLOCK, first)
    full = tl.minimum(tl.maximum((full_low + BLOCK - 1) // BLOCK, first), end)
    end_full = tl.minimum(tl.maximum(full_high // BLOCK, full), end)
    return Blocks(first, full, end_full, end)


@triton.jit
def walk(blocks, EDGE: tl.constexpr, BOTH_SIDES: tl.constexpr):
    """Return (begin, end) of a loop over the full blocks or over the EDGEs, which are on BOTH_SIDES of these or after
    them."""
    if not EDGE:
        begin = blocks.full
        end = blocks.end_full
    elif BOTH_SIDES:
        begin = blocks.first
        end = blocks.end - (blocks.end_full - blocks.full)
    else:
        begin = blocks.end_full
        end = blocks.end
    return begin, end


@triton.jit
def block_start(block, blocks, BLOCK: tl.constexpr, EDGE: tl.constexpr, BOTH_SIDES: tl.constexpr):
    """Return the first row of a step of `walk`. A walk over the edges skips the full blocks."""
    start = block * BLOCK
    if EDGE and BOTH_SIDES:
        start = tl.where(block < blocks.full, block, block + (blocks.end_full - blocks.full)) * BLOCK
    return tl.multiple_of(start, BLOCK)
