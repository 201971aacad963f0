"""An encoder layer in a training step as one node of autograd: one call of C++ forward and one backward.

pre-norm   r = x + drop(out_proj(attention(in_proj(norm1(x))))),  y = r + drop(linear2(hidden(norm2(r))))
post-norm  r = norm1(x + drop(out_proj(attention(in_proj(x))))),  y = norm2(r + drop(linear2(hidden(r))))
hidden(h) = drop(activation(linear1(h)))

Python and the dispatcher take longer than the arithmetic of a small layer, and the temporaries of a large one cost page
faults. Here they stay with the thread. For CPUs: fp32, bf16, and fp32 under an autocast to bf16, where only what lies
between the norms is bf16, as in the parts of the layer.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import reference
from fastattn._autocast import linear
from fastattn.ops._random import draw_rng
from fastattn.ops._register import differentiate, register_fake
from fastattn.ops.feed_forward import ACTIVATIONS
from fastattn.ops.layer import ABSENT


class Options(NamedTuple):
    """The arguments that are not tensors. The raw op takes them as a list of numbers.

    attention_p, first_p, hidden_p, second_p: dropout of the attention weights, of the result of out_proj, of the hidden
    layer and of the result of linear2. causal: position i sees positions 0 to i. autocast: from fp32 to bf16. most_*:
    up to how many tokens which products are ours. activation: of ACTIVATION_NUMBERS.
    """

    attention_p: float
    first_p: float
    hidden_p: float
    second_p: float
    causal: bool
    batch_first: bool
    autocast: bool
    most_few_rows: int
    most_own_rows: int
    most_own_dx: int
    most_own_dw: int
    n_heads: int
    norm_first: bool
    activation: int
    eps1: float
    eps2: float


def _lists(parameters):
    """(norms, linears) as the raw op takes them."""
    in_w, in_b, out_w, out_b, w1, b1, w2, b2, *norms = (ABSENT if t is None else t for t in parameters)
    return norms, [in_w, ABSENT, in_b, out_w, ABSENT, out_b, w1, ABSENT, b1, w2, ABSENT, b2]


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, mask, bias, rng, x, *parameters):
        y, *kept = _fwd(x, *_lists(parameters), mask, bias, rng, options)
        ctx.save_for_backward(*kept, mask, bias, rng, x, *parameters)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, dy):
        qkv, preact, others, weights, mask, bias, rng, x, *parameters = ctx.saved_tensors
        # create_graph=True, or is_grads_batched=True, for which an op that returns a list has no batching rule
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dy):
            grads = differentiate(_reference(ctx.options, mask, bias, rng), (x, *parameters), (dy,))
            return None, None, None, None, *grads
        need_dx = ctx.needs_input_grad[4]
        kept = qkv, preact, others, weights
        dx, *grads = _bwd(dy, *kept, need_dx, x, *_lists(parameters), mask, bias, rng, ctx.options)
        grads = [None if p is None else grad for p, grad in zip(parameters, grads, strict=True)]
        return None, None, None, None, dx if need_dx else None, *grads


def train_layer(x: Tensor, parameters: list, mask: Tensor | None, bias: Tensor | None, options: Options) -> Tensor:
    """An encoder layer of x, with gradients for x and all parameters.

    The random states of its dropouts are those that the parts of a layer would draw, in the same order.

    Args:
        x: (batch, seqlen, d_model), fp32 or bf16, or (seqlen, batch, d_model) without batch_first.
        parameters: weight and bias of in_proj, out_proj, linear1, linear2, norm1 and norm2, contiguous, of the dtype of
            x, or None.
        mask, bias: what the op `attention` takes, or None; both broadcast to (batch, n_heads, seqlen, seqlen).
    Returns: like x.
    Raises:
        RuntimeError: shapes or dtypes do not fit.
    """
    states = sum(p != 0 for p in options[:4])
    rng = draw_rng(x, states) if states else None
    return _Step.apply(options, mask, bias, rng, x, *parameters)


def _reference(options, mask, bias, rng):
    """The layer in plain PyTorch, as a function of x and the parameters."""
    o, states = options, iter(() if rng is None else rng)
    attention, first, hidden, second = ({"dropout_p": p, "rng": next(states) if p else None} for p in o[:4])
    operand = (lambda t: None if t is None else t.bfloat16()) if o.autocast else (lambda t: t)
    order, back = ((0, 2, 1, 3), (0, 2, 1, 3)) if o.batch_first else ((1, 2, 0, 3), (2, 0, 1, 3))

    def attend(x, weight, b, out_weight, out_bias):
        weights = [operand(t) for t in (weight, b, out_weight, out_bias)]
        qkv = linear(operand(x), *weights[:2]).unflatten(-1, (3, o.n_heads, x.shape[-1] // o.n_heads)).unbind(-3)
        qkv = (t.permute(order) for t in qkv)
        causal = "top_left" if o.causal else False
        out, _ = reference.attention(*qkv, mask=mask, bias=bias, causal=causal, **attention)
        return linear(out.permute(back).flatten(2), *weights[2:])

    def feed_forward(x, *weights):
        x, *weights = (operand(t) for t in (x, *weights))
        return reference.feed_forward(x, *weights, activation=ACTIVATIONS[o.activation], **hidden)

    def layer(x, *parameters):
        attn, ff, norm1, norm2 = parameters[:4], parameters[4:8], parameters[8:10], parameters[10:]
        if o.norm_first:
            h, _ = reference.norm(x, None, *norm1, eps=o.eps1, rms=False)
            h, r = reference.norm(attend(h, *attn), x, *norm2, eps=o.eps2, rms=False, **first)
            return (reference.dropout(feed_forward(h, *ff), residual=r, **second),)
        r, _ = reference.norm(attend(x, *attn).to(x.dtype), x, *norm1, eps=o.eps1, rms=False, **first)
        return (reference.norm(feed_forward(r, *ff).to(x.dtype), r, *norm2, eps=o.eps2, rms=False, **second)[0],)

    return layer


def _fwd_fake(x, norms, linears, mask, bias, rng, options):
    o, width, inner, d_ff = Options(*options), x.shape[-1], linears[3].shape[1], linears[6].shape[0]
    tokens, dtype = x.shape[0] * x.shape[1], torch.bfloat16 if o.autocast else x.dtype
    stream = x.element_size() * width * (1 if o.norm_first else 2)
    operands = dtype.itemsize * (inner + width * (2 if o.norm_first or o.autocast else 1))
    others = int(2 * o.n_heads) + 4 + (stream + operands + 3) // 4
    weights = sum((t.numel() + 31) // 32 * 32 for t in linears) if o.autocast else 0
    return (
        x.new_empty(x.shape), *(x.new_empty(tokens, n, dtype=dtype) for n in (3 * inner, d_ff)),
        x.new_empty(tokens, others, dtype=torch.float32), x.new_empty(weights, dtype=torch.bfloat16),
    )  # fmt: skip


def _bwd_fake(dy, qkv, preact, others, weights, need_dx, x, norms, linears, *_):
    shaped = [x if need_dx else ABSENT, *(t for i, t in enumerate(linears) if i % 3 != 1), *norms]
    return [x.new_empty(t.shape) for t in shaped]


register_fake("layer_encode_fwd", _fwd_fake)
register_fake("layer_encode_bwd", _bwd_fake)
_fwd = torch.ops.fastattn.layer_encode_fwd.native._op
_bwd = torch.ops.fastattn.layer_encode_bwd.native._op
