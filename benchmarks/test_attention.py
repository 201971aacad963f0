"""Attention against F.scaled_dot_product_attention, forward and backward, with the features that cost PyTorch most.

A window or padding is a mask for PyTorch; for fastattn, two numbers or the lengths. flops counts visible scores only.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE

import fastattn

SHAPES = [(4, 8, 512, 64), (12, 4, 64, 32)] if DEVICE == "cpu" else [(4, 16, 2048, 64), (4, 16, 4096, 128)]
LONG = (1, 4, 4096, 64) if DEVICE == "cpu" else (2, 16, 8192, 128)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def side_by_side(compare, shape, dtype, direction, torch_kwargs, our_kwargs, visible=1.0, bias=None, dropout_p=0.0):
    """`visible` is the share of scores that are not masked. The gradient of a bias is computed too."""
    batch, n_heads, seqlen, head_dim = shape
    backward = direction == "fwd_bwd"
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(4))
    inputs = [t.requires_grad_(backward) for t in (q, k, v, bias) if t is not None]

    def call(fn, kwargs, bias_name, p):
        kwargs = kwargs if bias is None else kwargs | {bias_name: bias}

        def run():
            out = fn(q, k, v, dropout_p=p, **kwargs)
            return (out, *torch.autograd.grad(out, inputs, do)) if backward else out

        return run

    def pair(p):
        return {
            "torch": call(F.scaled_dot_product_attention, torch_kwargs, "attn_mask", p),
            "fastattn": call(fastattn.attention, our_kwargs, "bias", p),
        }

    compare(
        pair(dropout_p),
        verify=pair(0.0),
        tolerance=TOLERANCE[dtype] * (4 if backward else 1),
        flops=4 * batch * n_heads * seqlen**2 * head_dim * visible * (3.5 if backward else 1),
        dtype=dtype,
    )


forms = pytest.mark.parametrize("direction", ["fwd", "fwd_bwd"])
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


@forms
@dtypes
@shapes
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_attention(compare, mask, shape, dtype, direction):
    causal = mask == "causal"
    kwargs = {"is_causal": causal}, {"causal": "top_left" if causal else False}
    side_by_side(compare, shape, dtype, direction, *kwargs, visible=0.5 if causal else 1.0)


@forms
@dtypes
def test_dropout(compare, dtype, direction):
    side_by_side(compare, SHAPES[0], dtype, direction, {}, {}, dropout_p=0.1)


@forms
@dtypes
@pytest.mark.parametrize("shared", [True, False], ids=["bias_per_head", "bias_per_sequence"])
def test_bias_with_gradient(compare, shared, dtype, direction):
    batch, n_heads, seqlen, _ = SHAPES[0]
    bias = torch.randn(1 if shared else batch, n_heads, seqlen, seqlen, dtype=dtype, device=DEVICE)
    side_by_side(compare, SHAPES[0], dtype, direction, {}, {}, bias=bias)


@forms
@dtypes
def test_half_padded_batch(compare, dtype, direction):
    batch, _, seqlen, _ = SHAPES[0]
    lengths = torch.tensor([seqlen, seqlen // 2, seqlen // 4, seqlen // 4], dtype=torch.int32, device=DEVICE)
    mask = (torch.arange(seqlen, device=DEVICE) < lengths[:, None]).view(batch, 1, 1, seqlen)
    side_by_side(compare, SHAPES[0], dtype, direction, {"attn_mask": mask}, {"seqlens_k": lengths}, visible=0.5)


@forms
@dtypes
def test_sliding_window(compare, dtype, direction):
    seqlen = LONG[2]
    width = seqlen // 8
    i, j = torch.arange(seqlen, device=DEVICE)[:, None], torch.arange(seqlen, device=DEVICE)
    mask = (j <= i) & (i - j < width)
    kwargs = {"attn_mask": mask}, {"causal": True, "window": (width - 1, 0)}
    side_by_side(compare, LONG, dtype, direction, *kwargs, visible=mask.double().mean().item())


@pytest.mark.skipif(DEVICE != "cpu", reason="test_attention_gpu.py has FlexAttention on a GPU")
def test_window_beside_flex(compare, request):
    """A causal window, forward in fp32."""
    if request.config._benchmarksession.disabled:
        pytest.skip("compiling FlexAttention takes as long as many other tests")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, n_heads, seqlen, head_dim = LONG
    width = seqlen // 8
    flex = torch.compile(flex_attention)
    blocks = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < width), None, None, seqlen, seqlen, device=DEVICE)
    mask = blocks.mask_mod(None, None, torch.arange(seqlen)[:, None], torch.arange(seqlen))
    torch.manual_seed(0)
    q, k, v = torch.randn(3, batch, n_heads, seqlen, head_dim)
    compare(
        {
            "torch": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
            "flex, compiled": lambda: flex(q, k, v, block_mask=blocks),
            "fastattn": lambda: fastattn.attention(q, k, v, causal=True, window=(width - 1, 0)),
        },
        flops=4 * batch * n_heads * seqlen**2 * head_dim * mask.double().mean().item(),
    )
