"""`torch.nn.functional.scaled_dot_product_attention` on the kernels of `attention`."""

import functools
import math

import torch
from torch import Tensor

from fastattn.ops._attention_call import attention_call
from fastattn.ops._attention_checks import causal_flag
from fastattn.ops._kinds import is_causal_bias, is_nested
from fastattn.ops._nested import on_rows, packed_arguments, sequences_of
from fastattn.ops._public import Public
from fastattn.ops.attention import run

_NAME = "scaled_dot_product_attention"
_QKV = ("query", "key", "value")


def _torch_arguments(query, key, value, attn_mask, is_causal, enable_gqa):
    """Convert PyTorch's arguments to those of `attention`: (q, k, v, mask, bias) with four dimensions."""
    if is_causal and attn_mask is not None:
        raise ValueError(
            f"{_NAME}: Explicit attn_mask should not be set when is_causal=True, got one of shape"
            f" {tuple(attn_mask.shape)}"
        )
    for label, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < 2:
            raise ValueError(f"{_NAME}: {label} must have at least 2 dimensions, got shape {tuple(t.shape)}")
    if attn_mask is not None:
        if attn_mask.dim() < 2:  # one value per key, or one for all
            attn_mask = attn_mask[(None,) * (2 - attn_mask.dim())]
        if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype) and not torch.is_autocast_enabled(
            query.device.type
        ):
            floats = " or ".join(dict.fromkeys((str(torch.float32), str(query.dtype))))
            raise TypeError(
                f"{_NAME}: attn_mask must be torch.bool (True = attend) or {floats} (added to the scores), got"
                f" {attn_mask.dtype}"
            )
    if not (query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]):
        query, key, value, attn_mask = _four_dimensions(query, key, value, attn_mask)
    heads_q, heads_k, heads_v = query.shape[1], key.shape[1], value.shape[1]
    if heads_q != heads_k or heads_k != heads_v:
        if enable_gqa:
            if heads_k != heads_v and heads_k and heads_v:
                heads = max(heads_k, heads_v)
                if heads_q % heads_k or heads_q % heads_v or heads % heads_k or heads % heads_v:
                    raise ValueError(
                        f"{_NAME}: the heads of query must be a multiple of those of key and value, got {heads_q},"
                        f" {heads_k}, {heads_v}"
                    )
                key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
        elif any(heads not in (1, max(heads_q, heads_k, heads_v)) for heads in (heads_q, heads_k, heads_v)):
            raise ValueError(
                f"{_NAME}: query, key and value must have the same number of heads, or 1, unless enable_gqa is True,"
                f" got {heads_q}, {heads_k}, {heads_v}"
            )
        else:
            heads = max(heads_q, heads_k, heads_v)
            query = query.expand(-1, heads, -1, -1)
            if heads_k != heads_v:
                key, value = (t.expand(-1, heads, -1, -1) for t in (key, value))
    mask = attn_mask if attn_mask is not None and attn_mask.dtype == torch.bool else None
    return query, key, value, mask, None if mask is not None else attn_mask


def _four_dimensions(query, key, value, attn_mask):
    """Broadcast the leading dimensions and flatten all but the last three dimensions into the batch."""
    inputs = [query, key, value] + ([] if attn_mask is None else [attn_mask])
    inputs = [t[(None,) * (3 - t.dim())] if t.dim() < 3 else t for t in inputs]
    try:
        leading = torch.broadcast_shapes(*(t.shape[:-3] for t in inputs[:3]))
        if attn_mask is not None and torch.broadcast_shapes(leading, inputs[3].shape[:-3]) != leading:
            raise RuntimeError("attn_mask is larger")
    except RuntimeError as error:
        raise ValueError(
            f"{_NAME}: the leading dimensions must broadcast, got {', '.join(str(tuple(t.shape)) for t in inputs)}"
        ) from error
    batch = math.prod(leading)
    folded = [t.expand(*leading, *t.shape[-3:]).reshape(batch, *t.shape[-3:]) for t in inputs[:3]]
    if attn_mask is not None:
        mask = inputs[3]
        if all(size == 1 for size in mask.shape[:-3]):
            attn_mask = mask.reshape(1, *mask.shape[-3:])
        else:
            attn_mask = mask.expand(*leading, *mask.shape[-3:]).reshape(batch, *mask.shape[-3:])
    return *folded, attn_mask


def _scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, backend=None
):
    causal = "top_left" if is_causal else False
    if attn_mask is not None and is_causal_bias(attn_mask):
        causal = causal_flag(_NAME, "attn_mask", attn_mask, is_causal, query.shape[-2], key.shape[-2])
        attn_mask = None
    q, k, v, mask, bias = _torch_arguments(query, key, value, attn_mask, is_causal, enable_gqa)
    facts, call = attention_call(_NAME, q, k, v, mask, bias, causal, dropout_p=dropout_p, scale=scale)
    out, _ = run(facts, call, backend)
    if query.dim() == 4:
        return out
    leading = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    out = out.reshape(*leading, *out.shape[1:])
    return out[0] if query.dim() == key.dim() == value.dim() == 2 else out


def _nested(name, function, given):
    """For Public(nested=): run as packed sequences, or, if the ragged dimension is a batch dimension, on the values."""
    query = given["query"]
    if is_nested(query) and query.layout is torch.jagged and query._ragged_idx == 1 and query.dim() > 3:
        labels = (*_QKV, "attn_mask") if is_nested(given.get("attn_mask")) else _QKV
        return on_rows(*labels)(name, function, given)
    tensors = {label: given[label] for label in _QKV}
    if all(is_nested(t) and t.layout is torch.strided and t.dim() == 3 for t in tensors.values()):  # without heads
        return _nested(name, function, given | {label: t.unsqueeze(1) for label, t in tensors.items()}).squeeze(1)
    if given.get("attn_mask") is not None:
        raise ValueError(
            f"{name}: attn_mask must be None for nested tensors, whose sequences share no grid of positions"
        )
    q, k, v = sequences_of(name, given, *_QKV)
    if q.tensor.shape[1] != k.tensor.shape[1] and not given.get("enable_gqa"):
        raise ValueError(
            f"{name}: query and key must have the same number of heads unless enable_gqa is True, got"
            f" {q.tensor.shape[1]} and {k.tensor.shape[1]}"
        )
    facts, call = attention_call(
        name, q.tensor, k.tensor, v.tensor, causal="top_left" if given.get("is_causal") else False,
        dropout_p=given.get("dropout_p", 0.0), scale=given.get("scale"), **packed_arguments(q, k),
    )  # fmt: skip
    out, _ = run(facts, call, given.get("backend"))
    return q.restore(out[0].transpose(0, 1))


_PUBLIC = Public(
    _NAME, tensors="query key value attn_mask", numbers="dropout_p scale", flags="is_causal enable_gqa", nested=_nested,
    on_reference=functools.partial(_scaled_dot_product_attention, backend="reference"),
)  # fmt: skip


@_PUBLIC.overridable
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float | None = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` on the kernels of `attention`.

    Args:
        query: (..., n_heads, seqlen_q, head_dim); key, value: (..., n_kv_heads, seqlen_k, head_dim or head_dim_v). All
            three may be nested tensors (batch, n_heads, seqlen, head_dim); this excludes attn_mask.
        attn_mask: bool (True = attend), float32 or the dtype of query (added to the scores), of a shape that
            broadcasts to the scores; or a CausalBias of torch.nn.attention.bias for these lengths.
        dropout_p: always applied, as in PyTorch: pass 0.0 in evaluation.
        is_causal: query i sees keys 0 to i (top-left); excludes attn_mask.
        scale: default 1/sqrt(head_dim).
        enable_gqa: allow fewer heads in key and value than in query.
    Returns: (..., n_heads, seqlen_q, head_dim_v) in the layout of query.
    Raises:
        ValueError, TypeError: as `attention`; each is also a RuntimeError, which PyTorch raises.
    Source: torch.nn.functional.scaled_dot_product_attention.
    Example:
        >>> q = torch.randn(2, 8, 100, 64)
        >>> fastattn.scaled_dot_product_attention(q, q, q, is_causal=True).shape
        torch.Size([2, 8, 100, 64])
    """
    return _scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


setattr(scaled_dot_product_attention, "explained", _PUBLIC.answering(_scaled_dot_product_attention))  # noqa: B010
