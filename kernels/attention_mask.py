"""The visible keys of a mask of one row: a key padding mask, (batch or 1, 1, 1, seqlen_k).

Blocks of keys that are all visible need no mask. Blocks before the first and after the last visible key need not be
read. The host must not look at the mask, because it would wait for the GPU. Layers do not know its values either,
because a mask may have holes. So a small kernel finds three numbers per batch entry, and the programs of attention read
those as they read lengths. A mask that pads at the right or at the left therefore costs what lengths cost. A mask with
holes is read from its first hole on.
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels.common import Launch, Rows, launch

LAUNCH = Launch(0, 4096, 4)


@triton.jit(do_not_specialize=["total_k"])
def attention_key_runs_kernel(mask, runs_ptr, total_k, BLOCK_N: tl.constexpr):
    """Write (first visible key, first hidden key after it, key after the last visible one) of a batch entry. Without a
    visible key, all are 0."""
    batch = tl.program_id(0).to(tl.int64)
    first, end_run, end = total_k, total_k, total_k * 0
    for start in range(0, total_k, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inside = j < total_k
        pointers = mask.ptr + batch * mask.strides[0] + j.to(tl.int64) * mask.strides[3]
        seen = tl.load(pointers, mask=inside, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(seen, j, total_k)))
        end = tl.maximum(end, tl.max(tl.where(seen, j + 1, 0)))
        hidden = inside & (j >= first) & (seen == 0)
        end_run = tl.minimum(end_run, tl.min(tl.where(hidden, j, total_k)))
    tl.store(runs_ptr + batch * 3, tl.minimum(first, end))
    tl.store(runs_ptr + batch * 3 + 1, tl.minimum(end_run, end))
    tl.store(runs_ptr + batch * 3 + 2, end)


def key_runs(mask, rows, strides, total_k):
    """Return what the kernel finds in the rows of a mask, as Rows with strides (between batch entries,)."""
    runs = torch.empty((rows, 3), dtype=torch.int32, device=mask.device)
    if rows:
        launch(attention_key_runs_kernel, (rows,), mask.device, Rows(mask, strides), runs, total_k,
               BLOCK_N=LAUNCH.block_n, **LAUNCH.options())  # fmt: skip
    return Rows(runs, (3 if rows > 1 else 0,))
