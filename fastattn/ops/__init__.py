"""One module per op: the public function, its checks, the schema of its raw ops, and its backward."""

from fastattn._imports import import_after
from fastattn.ops import attention as _attention
from fastattn.ops import attention_decode as _attention_decode
from fastattn.ops import dropout as _dropout
from fastattn.ops import feed_forward as _feed_forward
from fastattn.ops import linear_cross_entropy as _linear_cross_entropy
from fastattn.ops import norm as _norm
from fastattn.ops import rotary as _rotary

import_after("torch.utils.flop_counter", "fastattn.ops._flops")  # it imports Triton

_EXPLAIN = {
    "attention": _attention.explain,
    "attention_decode": _attention_decode.explain,
    "dropout": _dropout.explain,
    "feed_forward": _feed_forward.explain,
    "layer_norm": _norm.explain,
    "linear_cross_entropy": _linear_cross_entropy.explain,
    "rms_norm": _norm.explain_rms,
    "rotary_embedding": _rotary.explain,
    "scaled_dot_product_attention": _attention.explain_torch,
}

attention = _attention.attention
attention_decode = _attention_decode.attention_decode
scaled_dot_product_attention = _attention.scaled_dot_product_attention
dropout = _dropout.dropout
feed_forward = _feed_forward.feed_forward
layer_norm = _norm.layer_norm
linear_cross_entropy = _linear_cross_entropy.linear_cross_entropy
rms_norm = _norm.rms_norm
rotary_embedding = _rotary.rotary_embedding


def explain(op, *args, **kwargs):
    """Which backend would run `op` for these arguments, and why the others would not.

    Args:
        op: name of a public op, e.g. "layer_norm"; the other arguments are the op's own.
    Returns: text, a line per backend.
    Raises:
        ValueError: there is no such op, or the arguments do not fit it.
    """
    if op not in tuple(_EXPLAIN):
        raise ValueError(f"explain: op must be one of {', '.join(sorted(_EXPLAIN))}, got {op!r}")
    return _EXPLAIN[op](*args, **kwargs)
