"""Softmax cross-entropy of rows of logits x. The gradient replaces the logits.

    s = softcap * tanh(x / softcap), or x;  lse = log(sum_j exp(s_j));  p = exp(s - lse)
    loss = lse - (1 - smoothing) * s_target - smoothing * mean(s) + z_loss * lse²
    ds = dloss * ((1 + 2 * z_loss * lse) * p - (1 - smoothing) * onehot(target) - smoothing / cols)
    dx = ds * (1 - (s / softcap)²)

A program owns a row and reads it twice in blocks of BLOCK_N columns. The first pass computes the maximum and the sum of
exponentials together; the sum so far is rescaled if the maximum grows. The second pass computes the gradient, from a
row that is still in the L2 cache. Differences to the maximum and to s_target are taken before anything is summed.
Ignored rows are not read.
Limits: fewer than 2^31 - BLOCK_N columns. If the row stride is not a multiple of 8 elements, loads are narrow.
Reference: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels.common import Launch, eights, in_eights, launch, launch_for, register, tanh

# By width. Wider rows are read in blocks of the last entry.
TABLE = (Launch(1, 256, 1), Launch(1, 1024, 4), Launch(1, 4096, 8))


@triton.jit
def _cap(x, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def cross_entropy_fwd_kernel(
    logits_ptr, target_ptr, dloss_ptr, loss_ptr, cols, logits_stride, ignore_index, smoothing, z_loss, softcap,
    SOFTCAP: tl.constexpr, NEED_GRAD: tl.constexpr, BLOCK_N: tl.constexpr, EIGHTS: tl.constexpr = False,
):  # fmt: skip
    cols = in_eights(cols, EIGHTS)
    logits_stride = in_eights(logits_stride, EIGHTS)
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    target = tl.load(target_ptr + row)
    offs = tl.arange(0, BLOCK_N)

    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if NEED_GRAD:
            for start in range(0, cols, BLOCK_N):
                zeros = tl.zeros((BLOCK_N,), logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + start + offs, zeros, mask=start + offs < cols)
    else:
        valid = (target >= 0) & (target < cols)
        s_target = tl.load(logits_ptr + target, mask=valid, other=float("nan")).to(tl.float32)
        s_target = _cap(s_target, softcap, SOFTCAP)

        # This is not -inf, because -inf - -inf is NaN.
        most = -3.4028234663852886e38
        total = 0.0  # sum_j exp(s_j - most)
        above_target = tl.zeros((BLOCK_N,), tl.float32)  # s - s_target, summed over blocks
        for start in range(0, cols, BLOCK_N):
            mask = start + offs < cols
            x = tl.load(logits_ptr + start + offs, mask=mask, other=float("-inf")).to(tl.float32)
            s = _cap(x, softcap, SOFTCAP)
            block_most = tl.maximum(most, tl.max(tl.where(mask, s, float("-inf")), axis=0))
            e = tl.where(mask, tl.exp(s - block_most), 0.0)
            total = total * tl.exp(most - block_most) + tl.sum(e, axis=0)
            most = block_most
            above_target += tl.where(mask, s - s_target, 0.0)

        log_sum = tl.log(total)
        lse = most + log_sum
        loss = (most - s_target) + log_sum + z_loss * lse * lse
        if smoothing > 0:
            loss -= smoothing * (tl.sum(above_target, axis=0) / cols)
        tl.store(loss_ptr + row, loss)

        if NEED_GRAD:
            dloss = 1.0
            if dloss_ptr is not None:
                dloss = tl.load(dloss_ptr + row)
            dloss = tl.where(valid, dloss, float("nan"))
            of_exp = dloss * (1 + 2 * z_loss * lse) / total
            even = dloss * smoothing / cols
            tl.debug_barrier()  # waits until every thread has read s_target
            for start in range(0, cols, BLOCK_N):
                col = start + offs
                s = _cap(tl.load(logits_ptr + col, mask=col < cols, other=0.0).to(tl.float32), softcap, SOFTCAP)
                ds = tl.exp(s - most) * of_exp - even
                ds = tl.where(col == target, ds - dloss * (1 - smoothing), ds)
                if SOFTCAP:
                    ds *= 1 - (s / softcap) * (s / softcap)
                tl.store(logits_ptr + col, ds.to(logits_ptr.dtype.element_ty), mask=col < cols)


def cross_entropy_fwd(logits, target, dloss, ignore_index, label_smoothing, z_loss, softcap, need_grad):
    rows, cols = logits.shape
    if cols > 1 and logits.stride(1) != 1:
        raise RuntimeError(f"logits must have inner stride 1, got strides {logits.stride()}")
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        tile = launch_for(TABLE, cols) or TABLE[-1]
        launch(
            cross_entropy_fwd_kernel, (rows,), logits.device, logits, target, dloss, loss, cols, logits.stride(0),
            ignore_index, label_smoothing, z_loss, softcap, SOFTCAP=softcap > 0, NEED_GRAD=need_grad,
            BLOCK_N=tile.block_n, EIGHTS=eights(cols, logits.stride(0)), **tile.options(),
        )  # fmt: skip
    return loss


register("cross_entropy_fwd", cross_entropy_fwd)
