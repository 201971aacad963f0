"""An encoder or decoder layer in a training step as one node of autograd: one call of C++ forward and one backward.

pre-norm   r = x + drop(out_proj(attention(in_proj(norm1(x))))),  y = r + drop(linear2(hidden(norm2(r))))
post-norm  r = norm1(x + drop(out_proj(attention(in_proj(x))))),  y = norm2(r + drop(linear2(hidden(r))))
hidden(h) = drop(activation(linear1(h)))

A decoder layer has attention to a memory between the two, with a norm of its own: norm1, norm2 and norm3 in this order.

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
from fastattn.ops._register import apply, differentiate, is_differentiated, register_fake
from fastattn.ops.feed_forward import ACTIVATIONS
from fastattn.ops.layer import ABSENT, Memory, memory_list


class Options(NamedTuple):
    """The arguments that are not tensors. The raw op takes them as a list of numbers.

    attention_p, first_p, memory_p, second_p, hidden_p, last_p: dropout of the attention weights, of the result of
    out_proj, of both in attention to the memory, of the hidden layer and of the result of linear2; in an encoder layer
    memory_p and second_p are 0. causal, memory_causal: position i sees positions 0 to i. autocast: from fp32 to bf16.
    most_*: the largest numbers of tokens for which our own products are used. activation: of ACTIVATION_NUMBERS.
    """

    attention_p: float
    first_p: float
    memory_p: float
    second_p: float
    hidden_p: float
    last_p: float
    causal: bool
    memory_causal: bool
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
    eps3: float


_DROPOUTS = 6  # the dropouts, which come first in Options
_OF_ENCODER = 12  # parameters: a weight and a bias of four linear layers and two norms


def _lists(parameters):
    """(norms, linears) as the raw op takes them; parameters: those of `train_layer`."""
    t, none = [ABSENT if p is None else p for p in parameters], ABSENT
    linears = [t[0], none, t[1], t[2], none, t[3], t[4], none, t[5], t[6], none, t[7]]
    if len(t) == _OF_ENCODER:
        return t[8:], linears
    return t[12:], [*linears, t[8], none, t[9], t[10], none, t[11]]


class _Step(torch.autograd.Function):
    """masks: mask and bias, in a decoder layer those of the memory too; memory: its tokens, or None."""

    @staticmethod
    def forward(ctx, options, masks, rng, x, memory, *parameters):
        norms, linears = _lists(parameters)
        tensors = [] if memory is None else memory_list(memory, *masks[2:])
        y, *kept = _fwd(x, norms, linears, masks[0], masks[1], tensors, rng, options)
        ctx.save_for_backward(*kept, *masks, rng, x, memory, *parameters)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, dy):
        if len(ctx.needs_input_grad) > 5 + _OF_ENCODER:
            return _Step._of_decoder(ctx, dy)
        qkv, preact, others, weights, mask, bias, rng, x, _, *parameters = ctx.saved_tensors
        if is_differentiated(dy):
            grads = differentiate(_reference(ctx.options, (mask, bias), None, rng), (x, *parameters), (dy,))
            return None, None, None, grads[0], None, *grads[1:]
        kept, need_dx = [qkv, preact, others, weights], ctx.needs_input_grad[3]
        norms, linears = _lists(parameters)
        dx, *grads = _bwd(dy, kept, need_dx, False, x, norms, linears, mask, bias, [], rng, ctx.options)
        grads = [None if p is None else grad for p, grad in zip(parameters, grads, strict=True)]
        return None, None, None, dx if need_dx else None, None, *grads

    @staticmethod
    def _of_decoder(ctx, dy):
        saved = ctx.saved_tensors
        kept, (mask, bias, *others), (rng, x, memory, *parameters) = saved[:6], saved[6:10], saved[10:]
        if is_differentiated(dy):
            function = _reference(ctx.options, (mask, bias), others, rng)
            return None, None, None, *differentiate(function, (x, memory, *parameters), (dy,))
        _, _, _, need_dx, need_dmemory, *_ = ctx.needs_input_grad
        norms, linears = _lists(parameters)
        inputs = x, norms, linears, mask, bias, memory_list(memory, *others), rng, ctx.options
        dx, *grads, dmemory = _bwd(dy, kept, need_dx, need_dmemory, *inputs)
        grads = [None if p is None else grad for p, grad in zip(parameters, grads, strict=True)]
        return None, None, None, dx if need_dx else None, dmemory if need_dmemory else None, *grads


def train_layer(
    x: Tensor,
    parameters: list,
    mask: Tensor | None,
    bias: Tensor | None,
    options: Options,
    memory: Memory | None = None,
) -> Tensor:
    """An encoder or decoder layer of x, with gradients for x, the memory and all parameters.

    The random states of its dropouts are those that the parts of a layer would draw, in the same order.

    Args:
        x: (batch, seqlen, d_model), fp32 or bf16, or (seqlen, batch, d_model) without batch_first.
        parameters: weight and bias of in_proj, out_proj, linear1, linear2, norm1 and norm2, contiguous, of the dtype of
            x, or None. In a decoder layer in_proj and out_proj of the attention to the memory come before norm1, and
            norm3 is the last.
        mask, bias: what the op `attention` takes, or None; both broadcast to (batch, n_heads, seqlen, seqlen).
        memory: what a decoder layer attends to.
    Returns: like x.
    Raises:
        RuntimeError: shapes or dtypes do not fit.
    """
    states = sum(p != 0 for p in options[:_DROPOUTS])
    rng = draw_rng(x, states) if states else None
    if memory is None:
        return apply(_Step, options, (mask, bias), rng, x, None, *parameters)
    return apply(_Step, options, (mask, bias, memory.mask, memory.bias), rng, x, memory.tokens, *parameters)


def _reference(options, masks, memory_masks, rng):
    """The layer in plain PyTorch, as a function of x, of the memory in a decoder layer, and of the parameters."""
    o, states = options, iter(() if rng is None else rng)
    drop = [{"dropout_p": p, "rng": next(states) if p else None} for p in o[:_DROPOUTS]]
    operand = (lambda t: None if t is None else t.bfloat16()) if o.autocast else (lambda t: t)
    order, back = ((0, 2, 1, 3), (0, 2, 1, 3)) if o.batch_first else ((1, 2, 0, 3), (2, 0, 1, 3))

    def attend(x, memory, parameters, masks, causal, dropout):
        weight, b, out_weight, out_bias = (operand(t) for t in parameters)
        sizes = (weight.shape[0] // 3, weight.shape[0] // 3 * 2)
        if memory is None:
            q, kv = linear(operand(x), weight, b).split(sizes, -1)
        else:
            (w_q, w_kv), (b_q, b_kv) = weight.split(sizes), (None, None) if b is None else b.split(sizes)
            q, kv = linear(operand(x), w_q, b_q), linear(operand(memory), w_kv, b_kv)
        qkv = (t.unflatten(-1, (o.n_heads, sizes[0] // o.n_heads)).permute(order) for t in (q, *kv.chunk(2, -1)))
        mask, bias = masks
        causal = "top_left" if causal else False
        out, _ = reference.attention(*qkv, mask=mask, bias=bias, causal=causal, **dropout)
        return linear(out.permute(back).flatten(2), out_weight, out_bias)

    def feed_forward(x, *weights):
        x, *weights = (operand(t) for t in (x, *weights))
        return reference.feed_forward(x, *weights, activation=ACTIVATIONS[o.activation], **drop[4])

    def norm(x, residual, parameters, which, dropout):
        eps = (o.eps1, o.eps2, o.eps3)[which]
        return reference.norm(x, residual, *parameters[2 * which : 2 * which + 2], eps=eps, rms=False, **dropout)

    def layer(x, *tensors):
        pre, crosses = int(o.norm_first), memory_masks is not None
        memory, parameters = (tensors[0], tensors[1:]) if crosses else (None, tensors)
        norms = parameters[12 if crosses else 8 :]

        def add(out, h, r, which, dropout):
            """(norm of the sum, the sum) after a sub-layer of h."""
            return norm(out if pre else out.to(x.dtype), r if pre else h, norms, which + pre, dropout)

        h, r = (norm(x, None, norms, 0, {})[0], x) if pre else (x, None)
        h, r = add(attend(h, None, parameters[:4], masks, o.causal, drop[0]), h, r, 0, drop[1])
        if crosses:
            attended = attend(h, memory, parameters[8:12], memory_masks, o.memory_causal, drop[2])
            h, r = add(attended, h, r, 1, drop[3])
        out = feed_forward(h, *parameters[4:8])
        if pre:
            return (reference.dropout(out, residual=r, **drop[5]),)
        return (add(out, h, r, 1 + crosses, drop[5])[0],)

    return layer


def _fwd_fake(x, norms, linears, mask, bias, memory, rng, options):
    if len(linears) == 6:  # self-attention alone
        return _attention_fake(x, linears[3].shape[1], Options(*options).n_heads)
    o, width, inner, d_ff = Options(*options), x.shape[-1], linears[3].shape[1], linears[6].shape[0]
    tokens, dtype = x.shape[0] * x.shape[1], torch.bfloat16 if o.autocast else x.dtype
    size, stream_size = dtype.itemsize, x.element_size()
    stream = stream_size * width * (1 if o.norm_first else 2)
    operands = size * (inner + width * (2 if o.norm_first or o.autocast else 1))
    others = int(2 * o.n_heads) + 4 + (stream + operands + 3) // 4
    weights = sum((t.numel() + 31) // 32 * 32 for t in linears) if o.autocast else 0
    found = [
        x.new_empty(x.shape), *(x.new_empty(tokens, n, dtype=dtype) for n in (3 * inner, d_ff)),
        x.new_empty(tokens, others, dtype=torch.float32), x.new_empty(weights, dtype=torch.bfloat16),
    ]  # fmt: skip
    if memory:
        crossed = int(2 * o.n_heads) + 2 + (stream_size * width + size * (2 * inner + width) + 3) // 4
        rows, columns = memory[0].shape[0] * memory[0].shape[1], 2 * inner + (width if o.autocast else 0)
        found.append(x.new_empty(tokens, crossed, dtype=torch.float32))
        found.append(x.new_empty(rows, columns, dtype=dtype))
    return found


def _attention_fake(x, inner, n_heads):
    tokens, others = x.shape[0] * x.shape[1], 2 * int(n_heads) + (x.element_size() * inner + 3) // 4
    kept = x.new_empty(tokens, 3 * inner), x.new_empty(tokens, others, dtype=torch.float32)
    return [x.new_empty(x.shape), *kept]


def _bwd_fake(dy, kept, need_dx, need_dmemory, x, norms, linears, mask, bias, memory, *_):
    shaped = [x if need_dx else ABSENT, *(t for i, t in enumerate(linears) if i % 3 != 1), *norms]
    if memory:
        shaped.append(memory[0] if need_dmemory else ABSENT)
    return [x.new_empty(t.shape) for t in shaped]


register_fake("layer_encode_fwd", _fwd_fake)
register_fake("layer_encode_bwd", _bwd_fake)
_fwd = torch.ops.fastattn.layer_encode_fwd.native._op
_bwd = torch.ops.fastattn.layer_encode_bwd.native._op
