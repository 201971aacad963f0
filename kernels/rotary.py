"""Rotary position embedding: y1 = x1 * cos - x2 * sin, y2 = x2 * cos + x1 * sin, over the pairs of the first rotary_dim
channels. The other channels are copied. The backward is the same with -sin. The tables may have a number for each
channel: then cos and sin are cos1 and sin1 in y1, cos2 and sin2 in y2, and the backward has -sin2 and -sin1.

A program owns BLOCK_M tokens of BLOCK_H heads, of q or of k, and loads the table rows of its tokens once for all heads.
Half-split pairs are two tiles. Interleaved pairs are one tile of twice the width, separated in registers. The op can
work in place, because a program loads a row before it stores it, and no other program touches the row. A position
outside the table gives NaN. Limits: fewer than 2^31 tokens.
Reference: fastattn.reference.rotary_embedding.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastattn.kernels.common import launch, register
from fastattn.ops._layout import empty_in_layout

MAX_PAIRS, MAX_HEADS = 2048, 8  # the limits of a program


class RotaryLaunch(NamedTuple):
    """Like Launch, for a tile of tokens, heads and pairs. Channels that are only copied have tiles of block_rest."""

    block_m: int
    block_h: int
    block_half: int
    block_rest: int  # 0 if no channels are copied
    warps: int = 4


@triton.jit
def _rotate(
    x_ptr, out_ptr, x_batch, x_head, x_row, out_batch, out_head, out_row, n_heads, head, batch, token, mask,
    cos, sin, cos2, sin2, half, head_dim,
    INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    head += tl.arange(0, BLOCK_H)
    mask = mask[:, None] & (head < n_heads)[None, :]  # (BLOCK_M, BLOCK_H)
    head = head.to(tl.int64)[None, :]
    x_ptrs = (x_ptr + (batch * x_batch + token * x_row)[:, None] + head * x_head)[:, :, None]
    out_ptrs = (out_ptr + (batch * out_batch + token * out_row)[:, None] + head * out_head)[:, :, None]
    if INTERLEAVED:
        col = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        inside = mask[:, :, None] & (col < 2 * half)
        x = tl.load(x_ptrs + col, mask=inside, other=0.0).to(tl.float32)
        x1, x2 = tl.split(x.reshape(x.shape[0], BLOCK_H, BLOCK_HALF, 2))
        y = tl.join(x1 * cos - x2 * sin, x2 * cos2 + x1 * sin2).reshape(x.shape)
        tl.store(out_ptrs + col, y.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        col = tl.arange(0, BLOCK_HALF)[None, None, :]
        inside = mask[:, :, None] & (col < half)
        x1 = tl.load(x_ptrs + col, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptrs + half + col, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptrs + col, (x1 * cos - x2 * sin).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out_ptrs + half + col, (x2 * cos2 + x1 * sin2).to(out_ptr.dtype.element_ty), mask=inside)
    if BLOCK_REST:
        for start in range(2 * half, head_dim, BLOCK_REST):
            rest = (start + tl.arange(0, BLOCK_REST))[None, None, :]
            there = mask[:, :, None] & (rest < head_dim)
            tl.store(out_ptrs + rest, tl.load(x_ptrs + rest, mask=there), mask=there)


@triton.jit(do_not_specialize=["offset", "tokens", "seqlen", "table_rows", "positions_batch"])
def rotary_fwd_kernel(
    q_ptr, k_ptr, out_q_ptr, out_k_ptr, cos_ptr, sin_ptr, positions_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    out_q_batch, out_q_head, out_q_row, out_k_batch, out_k_head, out_k_row,
    table_batch, table_row, table_rows, positions_batch, offset,
    tokens, seqlen, q_heads, k_heads, half, head_dim,
    INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr, FULL: tl.constexpr, COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = index < tokens
    batch, token = (index // seqlen).to(tl.int64), (index % seqlen).to(tl.int64)
    if positions_ptr is not None:
        position = tl.load(positions_ptr + batch * positions_batch + token, mask=mask, other=0).to(tl.int64)
    else:
        position = token + offset

    pair = tl.arange(0, BLOCK_HALF)[None, :]
    step: tl.constexpr = 2 * COLUMN if FULL and INTERLEAVED else COLUMN
    offs = (batch * table_batch + position * table_row)[:, None] + pair * step
    inside = (mask & (position >= 0) & (position < table_rows))[:, None] & (pair < half)
    cos = tl.load(cos_ptr + offs, mask=inside, other=float("nan")).to(tl.float32)[:, None, :]
    sin = tl.load(sin_ptr + offs, mask=inside, other=float("nan")).to(tl.float32)[:, None, :]
    cos2, sin2 = cos, sin
    if FULL:
        offs += COLUMN if INTERLEAVED else half * COLUMN
        cos2 = tl.load(cos_ptr + offs, mask=inside, other=float("nan")).to(tl.float32)[:, None, :]
        sin2 = tl.load(sin_ptr + offs, mask=inside, other=float("nan")).to(tl.float32)[:, None, :]
    if CONJUGATE:
        sin, sin2 = -sin2, -sin

    block = tl.program_id(1)
    q_blocks = tl.cdiv(q_heads, BLOCK_H)
    if block < q_blocks:
        _rotate(
            q_ptr, out_q_ptr, q_batch, q_head, q_row, out_q_batch, out_q_head, out_q_row, q_heads, block * BLOCK_H,
            batch, token, mask, cos, sin, cos2, sin2, half, head_dim, INTERLEAVED, BLOCK_H, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    elif k_ptr is not None:
        _rotate(
            k_ptr, out_k_ptr, k_batch, k_head, k_row, out_k_batch, out_k_head, out_k_row, k_heads,
            (block - q_blocks) * BLOCK_H, batch, token, mask, cos, sin, cos2, sin2, half, head_dim,
            INTERLEAVED, BLOCK_H, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


def _strides(t):
    """Return the strides (batch, head, row) of a tensor. A packed one has batch stride 0."""
    return (0, t.stride(1), t.stride(0)) if t.dim() == 3 else t.stride()[:3]


def pick(heads, half, rest, full=False):
    """Return the RotaryLaunch for the numbers of heads, pairs and copied channels, and a full table or not."""
    block_half = triton.next_power_of_2(half)
    block_h = max(1, min(triton.next_power_of_2(heads), MAX_HEADS, MAX_PAIRS // block_half))
    block_m = max(1, MAX_PAIRS // (block_half * block_h))
    block_h = max(1, block_h // 2) if full else block_h  # the tables have twice the numbers
    return RotaryLaunch(block_m, block_h, block_half, rest and 2 * block_half)


def _rotate_into(q, k, out_q, out_k, cos, sin, positions, offset, rotary_dim, interleaved, conjugate):
    packed = q.dim() == 3
    seqlen, head_dim, half = q.shape[0 if packed else 2], q.shape[-1], rotary_dim // 2
    tokens = seqlen if packed else q.shape[0] * seqlen
    q_heads, k_heads = q.shape[1], 0 if k is None else k.shape[1]
    if not tokens * (q_heads + k_heads):
        return
    if cos.stride(-1) not in (1, 2) or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    positions_batch = 0
    if positions is not None:
        positions = positions.contiguous()
        positions_batch = seqlen if positions.dim() == 2 and positions.shape[0] > 1 else 0
    full = cos.shape[-1] == rotary_dim
    tile = pick(max(q_heads, k_heads), half, 0 if out_q is q else head_dim - rotary_dim, full)
    no_k = (0, 0, 0)
    grid = triton.cdiv(tokens, tile.block_m), triton.cdiv(q_heads, tile.block_h) + triton.cdiv(k_heads, tile.block_h)
    launch(
        rotary_fwd_kernel, grid, q.device, q, k, out_q, out_k, cos, sin, positions,
        *_strides(q), *(no_k if k is None else _strides(k)),
        *_strides(out_q), *(no_k if k is None else _strides(out_k)),
        cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0, cos.stride(-2), cos.shape[-2],
        positions_batch, offset, tokens, seqlen, q_heads, k_heads, half, head_dim,
        INTERLEAVED=interleaved, CONJUGATE=conjugate, FULL=full, COLUMN=cos.stride(-1),
        BLOCK_M=tile.block_m, BLOCK_H=tile.block_h, BLOCK_HALF=tile.block_half, BLOCK_REST=tile.block_rest,
        num_warps=tile.warps,
    )  # fmt: skip


def _empty_like(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if x.dim() == 3 else empty_in_layout(x, x.shape[-1])


def _inner_contiguous(t):
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def rotary_fwd(q, k, *rest):
    out_q = _empty_like(q)
    out_k = q.new_empty(0) if k is None else _empty_like(k)
    _rotate_into(_inner_contiguous(q), _inner_contiguous(k), out_q, None if k is None else out_k, *rest)
    return out_q, out_k


def rotary_fwd_(q, k, *rest):
    _rotate_into(q, k, q, k, *rest)


register("rotary_fwd", rotary_fwd)
register("rotary_fwd_", rotary_fwd_)
