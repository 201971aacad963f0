"""FLOP formulas of the raw ops for torch.utils.flop_counter.FlopCounterMode: matrix products only, as for torch's ops.

As for torch's attention, invisible keys count too, and a backward recomputes the scores. Norms, dropout, rotary and
activations contain no matrix products and count 0.
"""

import itertools

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from fastattn.ops._attention_call import AttentionCall
from fastattn.ops._schemas import NAMES
from fastattn.ops.layer_step import Options

_ops = torch.ops.fastattn


def _names(name):
    """All operators of an op, including those that tracers record."""
    return [getattr(_ops, full) for full in sorted({full.partition(".")[0] for full in NAMES[name]})]


def _values(t):
    """The values of an integer tensor, or None if it is meta or fake."""
    return None if t.is_meta or isinstance(t, FakeTensor) else t.tolist()


def _pairs(call):
    """The number of query-key pairs of an AttentionCall, times the number of heads."""
    batch, n_heads, seqlen_q, _ = call.q.shape
    if call.cu_seqlens_q is None:
        return batch * n_heads * seqlen_q * call.k.shape[2]
    ends_q, ends_k = _values(call.cu_seqlens_q), _values(call.cu_seqlens_k)
    if ends_q is None or ends_k is None:
        return n_heads * (call.cu_seqlens_q.shape[0] - 1) * call.max_seqlen_q * call.max_seqlen_k
    lengths = ([end - begin for begin, end in itertools.pairwise(ends)] for ends in (ends_q, ends_k))
    return n_heads * sum(i * j for i, j in zip(*lengths, strict=True))


@register_flop_formula(_names("attention_fwd"), get_raw=True)
def _attention_fwd(*arguments, out_val=None):
    *call, _need_low = arguments
    call = AttentionCall(*call)
    return 2 * _pairs(call) * (call.q.shape[-1] + call.v.shape[-1])


@register_flop_formula(_ops.attention_bwd, get_raw=True)
def _attention_bwd(do, dlse, q, k, v, out, lse, lse_low, *others, out_val=None):
    *others, _need_dbias, _deterministic = others
    call = AttentionCall(q, k, v, *others)
    return 2 * _pairs(call) * (3 * q.shape[-1] + 2 * v.shape[-1])


@register_flop_formula(_ops.attention_infer, get_raw=True)
def _attention_infer(q, k, v, *_, out_val=None):
    batch, n_heads, seqlen_q, _ = q.shape
    return 2 * batch * n_heads * seqlen_q * k.shape[2] * (q.shape[-1] + v.shape[-1])


@register_flop_formula(_names("attention_decode_fwd"), get_raw=True)
def _attention_decode_fwd(q, k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx, cache_leftpad,
                          alibi_slopes, sink, seqlen_new, *_, out_val=None):  # fmt: skip
    batch, n_heads, seqlen_q, head_dim = q.shape
    lengths = _values(cache_seqlens)
    if lengths is None:
        keys = batch * k_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    else:
        keys = sum(lengths) + batch * seqlen_new
    return 2 * n_heads * seqlen_q * keys * (head_dim + v_cache.shape[-1])


def _product_flop(x, w):
    return 2 * x[0] * w[0] * w[1]


def _gemm_flop(a, b, transpose_b):
    return 2 * a[0] * a[1] * b[0 if transpose_b else 1]


@register_flop_formula(_ops.gemm)
def _gemm(a, b, bias, transpose_a, transpose_b, out_shape=None):
    return _gemm_flop(a, b, transpose_b)


@register_flop_formula(_ops.gemm_add_)
def _gemm_add(out, a, b, transpose_a, transpose_b, out_shape=None):
    return _gemm_flop(a, b, transpose_b)


@register_flop_formula(_ops.gemv)
def _gemv(x, weight, scale, bias, out_shape=None):
    return _product_flop(x, weight)


@register_flop_formula(_ops.layer_decode, get_raw=True)
def _layer_decode(x, norms, linears, k_cache, v_cache, cache_seqlens, *others, out_val=None):
    _cos, _sin, _interleaved, _alibi_slopes, _most_few_rows, _most_own_rows, n_heads, *_ = others
    batch, seqlen, _ = x.shape
    lengths = _values(cache_seqlens)
    keys = batch * k_cache.shape[2] if lengths is None else sum(lengths) + batch * seqlen
    attention = 2 * n_heads * seqlen * keys * 2 * k_cache.shape[-1]
    return attention + sum(_product_flop((batch * seqlen,), weight.shape) for weight in linears[::3])


@register_flop_formula(_ops.layer_encode_bwd, get_raw=True)
def _layer_encode_bwd(dy, kept, need_dx, need_dmemory, x, norms, linears, mask, bias, memory, *rest, out_val=None):
    """Used if only the backward runs under the counter: a forward under it calls the parts of the layer instead."""
    *_, options = rest
    o, (first, second, _), weights = Options(*options), x.shape, [weight.shape for weight in linears[::3]]
    batch, seqlen = (first, second) if o.batch_first else (second, first)
    rows, inner = (batch * seqlen,), weights[1][1]
    products = 2 * sum(_product_flop(rows, weight) for weight in weights[:4])
    if not need_dx and not o.norm_first:
        products -= _product_flop(rows, weights[0])
    attended = seqlen
    if memory:
        keys = memory[0].shape[1 if o.batch_first else 0]
        attended += keys
        products += 2 * sum(_product_flop(rows, weight) for weight in ((inner, x.shape[2]), weights[5]))
        products += (2 if need_dmemory else 1) * _product_flop((batch * keys,), (2 * inner, x.shape[2]))
    return products + 2 * batch * seqlen * attended * 5 * inner


@register_flop_formula(_names("linear_cross_entropy_fwd"))
def _linear_cross_entropy(x, weight, *others, out_shape=None):
    need_dx, need_dweight, _need_dbias = others[-3:]
    return _product_flop(x, weight) * (1 + need_dx + need_dweight)
