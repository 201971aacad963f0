"""Self-attention with its projections in a training step, as one node of autograd: for CPUs, in fp32 and bf16.

q, k, v = parts of x · in_weightᵀ + in_bias,  y = attention(q, k, v) · out_weightᵀ + out_bias

The views, linear layers and attention of a small module are a dozen nodes of autograd, which take longer than its
arithmetic. It is the first sub-layer of layer_step.py, computed by the same ops without the tensors of the rest.
"""

import torch
from torch import Tensor

from fastattn import reference
from fastattn._autocast import linear
from fastattn.ops import _gemm
from fastattn.ops._random import draw_rng
from fastattn.ops._register import apply, differentiate, is_differentiated
from fastattn.ops.layer import ABSENT, present
from fastattn.ops.layer_step import Options

_fwd = torch.ops.fastattn.layer_encode_fwd.native._op
_bwd = torch.ops.fastattn.layer_encode_bwd.native._op


def _linears(parameters):
    in_weight, in_bias, out_weight, out_bias = parameters
    return [in_weight, ABSENT, present(in_bias), out_weight, ABSENT, present(out_bias)]


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, mask, bias, rng, x, *parameters):
        y, *kept = _fwd(x, [], _linears(parameters), mask, bias, [], rng, options)
        ctx.save_for_backward(*kept, mask, bias, rng, x, *parameters)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, dy):
        qkv, others, mask, bias, rng, x, *parameters = ctx.saved_tensors
        if is_differentiated(dy):
            grads = differentiate(_reference(ctx.options, mask, bias, rng), (x, *parameters), (dy,))
            return None, None, None, None, *grads
        need_dx = ctx.needs_input_grad[4]
        inputs = x, [], _linears(parameters), mask, bias, [], rng, ctx.options
        dx, *grads = _bwd(dy, [qkv, others], need_dx, False, *inputs)
        grads = [None if p is None else grad for p, grad in zip(parameters, grads, strict=True)]
        return None, None, None, None, dx if need_dx else None, *grads


def train_attention(
    x: Tensor,
    parameters: list,
    mask: Tensor | None,
    bias: Tensor | None,
    n_heads: int,
    is_causal: bool,
    dropout_p: float,
    batch_first: bool,
) -> Tensor:
    """Self-attention of x, with gradients for x and all parameters.

    Args:
        x: (batch, seqlen, width), fp32 or bf16, or (seqlen, batch, width) without batch_first.
        parameters: weight and bias of in_proj and out_proj, contiguous, of the dtype of x; a bias may be None.
        mask, bias: what the op `attention` takes, or None. They get no gradient.
    Returns: like x.
    Raises:
        RuntimeError: shapes or dtypes do not fit.
    """
    rng = draw_rng(x, 1) if dropout_p else None
    tokens = x.shape[0] * x.shape[1]
    products = *_gemm.most_rows(x.dtype, tokens), *_gemm.most_rows_of_gradients(x.dtype, tokens)
    others = 0.0, 0.0, 0.0, 0.0, 0.0  # dropouts of the layer
    numbers = *others, is_causal, False, batch_first, False, *products, n_heads, False, 0, 0.0, 0.0, 0.0
    options = Options(dropout_p, *numbers)
    return apply(_SelfAttention, options, mask, bias, rng, x, *parameters)


def _reference(options, mask, bias, rng):
    """Self-attention in plain PyTorch, as a function of x and the parameters."""
    o = options
    order, back = ((0, 2, 1, 3), (0, 2, 1, 3)) if o.batch_first else ((1, 2, 0, 3), (2, 0, 1, 3))
    dropout = {"dropout_p": o.attention_p, "rng": None if rng is None else rng[0]}

    def attend(x, in_weight, in_bias, out_weight, out_bias):
        heads = (o.n_heads, x.shape[-1] // o.n_heads)
        qkv = (t.unflatten(-1, heads).permute(order) for t in linear(x, in_weight, in_bias).chunk(3, -1))
        causal = "top_left" if o.causal else False
        out, _ = reference.attention(*qkv, mask=mask, bias=bias, causal=causal, **dropout)
        return (linear(out.permute(back).flatten(2), out_weight, out_bias),)

    return attend
