"""Rotary embedding of a layer's q and k, slices of one projection, against the usual composition of PyTorch ops.

nbytes counts what a fused implementation must move: q and k read once and written once, but not the tables.
"""

import pytest
import torch
from conftest import DEVICE

import fastattn

# batch, seqlen, n_heads, n_kv_heads, head_dim
SIZES = (
    [(4, 512, 8, 8, 64), (2, 1024, 16, 4, 64)] if DEVICE == "cpu" else [(4, 4096, 32, 32, 128), (4, 4096, 32, 8, 128)]
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2}


def in_torch(x, cos, sin, interleaved):
    """x·cos + rotate(x)·sin, with tables of full width in the dtype of x, as in most models."""
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos.repeat_interleave(2, -1) + turned * sin.repeat_interleave(2, -1)
    low, high = x.chunk(2, -1)
    return x * cos.repeat(1, 2) + torch.cat((-high, low), -1) * sin.repeat(1, 2)


@pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(("batch", "seqlen", "n_heads", "n_kv_heads", "head_dim"), SIZES)
def test_rotary(compare, batch, seqlen, n_heads, n_kv_heads, head_dim, dtype, interleaved, direction):
    torch.manual_seed(0)
    backward = direction == "fwd_bwd"
    projected = torch.randn(batch, seqlen, n_heads + 2 * n_kv_heads, head_dim, dtype=dtype, device=DEVICE)
    q, k, _ = projected.transpose(1, 2).split((n_heads, n_kv_heads, n_kv_heads), 1)
    if backward:
        q, k = q.requires_grad_(), k.requires_grad_()
    angles = torch.outer(torch.arange(seqlen), 1e4 ** (-torch.arange(0, head_dim, 2) / head_dim)).to(DEVICE)
    cos, sin = (table.to(dtype) for table in (angles.cos(), angles.sin()))
    dq, dk = torch.randn_like(q), torch.randn_like(k)

    def call(rotate):
        def run():
            rotated = rotate()
            return (*rotated, *torch.autograd.grad(rotated, (q, k), (dq, dk))) if backward else rotated

        return run

    compare(
        {
            "torch": call(lambda: tuple(in_torch(x, cos, sin, interleaved) for x in (q, k))),
            "fastattn": call(lambda: fastattn.rotary_embedding((q, k), cos, sin, interleaved=interleaved)),
        },
        tolerance=TOLERANCE[dtype],
        nbytes=(2 + 2 * backward) * (q.nbytes + k.nbytes),
    )
