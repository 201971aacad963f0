"""What torch.utils.flop_counter.FlopCounterMode counts for the raw ops: the products in them, as for those of torch.

As for torch's own attention, invisible keys count too, and a backward computes the scores again. Norms, dropout, rotary
and activations are no products and count 0.
"""

import itertools

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

_ops = torch.ops.fastattn


def _values(t):
    """The values of an integer tensor, or None where it has none."""
    return None if t.is_meta or isinstance(t, FakeTensor) else t.tolist()


def _pairs(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """How many pairs of a query and a key there are, times heads."""
    batch, n_heads, seqlen_q, _ = q.shape
    if cu_seqlens_q is None:
        return batch * n_heads * seqlen_q * k.shape[2]
    ends_q, ends_k = _values(cu_seqlens_q), _values(cu_seqlens_k)
    if ends_q is None or ends_k is None:
        return n_heads * (cu_seqlens_q.shape[0] - 1) * max_seqlen_q * max_seqlen_k
    lengths = ([end - begin for begin, end in itertools.pairwise(ends)] for ends in (ends_q, ends_k))
    return n_heads * sum(i * j for i, j in zip(*lengths, strict=True))


@register_flop_formula(_ops.attention_fwd, get_raw=True)
def _attention_fwd(q, k, v, bias, sink, mask, seqlens_k, cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng, max_seqlen_q,
                   max_seqlen_k, *_, out_val=None):  # fmt: skip
    pairs = _pairs(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return 2 * pairs * (q.shape[-1] + v.shape[-1])


@register_flop_formula(_ops.attention_bwd, get_raw=True)
def _attention_bwd(do, dlse, q, k, v, out, lse, lse_low, bias, sink, mask, seqlens_k, cu_seqlens_q, cu_seqlens_k,
                   alibi_slopes, rng, max_seqlen_q, max_seqlen_k, *_, out_val=None):  # fmt: skip
    pairs = _pairs(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return 2 * pairs * (3 * q.shape[-1] + 2 * v.shape[-1])


@register_flop_formula(_ops.attention_infer, get_raw=True)
def _attention_infer(q, k, v, *_, out_val=None):
    return 2 * _pairs(q, k, None, None, None, None) * (q.shape[-1] + v.shape[-1])


@register_flop_formula(_ops.attention_decode_fwd, get_raw=True)
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


_PRODUCTS = [_ops.linear_activation_fwd, _ops.linear_activation_bwd]
# _gemm.py: torch counts the products of aten only
if hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    _PRODUCTS.append(torch.ops.mkldnn._linear_pointwise)


@register_flop_formula(_PRODUCTS)
def _product(x, w, *_, out_shape=None):
    return _product_flop(x, w)


@register_flop_formula(_ops.linear_cross_entropy_fwd)
def _linear_cross_entropy(x, weight, bias, target, dloss, ignore_index, label_smoothing, z_loss, softcap, chunk_size,
                          need_dx, need_dweight, need_dbias, out_shape=None):  # fmt: skip
    return _product_flop(x, weight) * (1 + need_dx + need_dweight)
