"""One module per op: the public function, its checks, the schema of its raw ops, and its backward."""

from typing import Any

from fastattn._imports import import_after
from fastattn.ops import attention as _attention
from fastattn.ops import attention_decode as _attention_decode
from fastattn.ops import dropout as _dropout
from fastattn.ops import feed_forward as _feed_forward
from fastattn.ops import linear_cross_entropy as _linear_cross_entropy
from fastattn.ops import norm as _norm
from fastattn.ops import rotary as _rotary
from fastattn.ops import scaled_dot_product_attention as _scaled_dot_product_attention
from fastattn.ops._backends import Answer, Question
from fastattn.ops._types import Backend

import_after("torch.utils.flop_counter", "fastattn.ops._flops")  # it imports Triton

attention = _attention.attention
attention_decode = _attention_decode.attention_decode
scaled_dot_product_attention = _scaled_dot_product_attention.scaled_dot_product_attention
dropout = _dropout.dropout
feed_forward = _feed_forward.feed_forward
layer_norm = _norm.layer_norm
linear_cross_entropy = _linear_cross_entropy.linear_cross_entropy
rms_norm = _norm.rms_norm
rotary_embedding = _rotary.rotary_embedding


_OPS: dict[str, Any] = {
    function.__name__: function
    for function in (
        attention, attention_decode, dropout, feed_forward, layer_norm, linear_cross_entropy, rms_norm,
        rotary_embedding, scaled_dot_product_attention,
    )
}  # fmt: skip


def explain(op: str, *args: Any, backend: Backend = None, **kwargs: Any) -> str:
    """Say which backend would run `op` for these arguments, and why the others would not. Nothing is computed.

    Args:
        op: name of a public op, e.g. "layer_norm". All other arguments are those of the op.
    Returns: a text with a line per backend.
    Raises:
        ValueError: there is no such op, or the arguments do not fit it.
    Example:
        >>> print(fastattn.explain("rms_norm", torch.randn(4, 64), backend="reference").splitlines()[0])
        norm on cpu, float32, reference asked for
    """
    if op not in tuple(_OPS):
        raise ValueError(f"explain: op must be one of {', '.join(sorted(_OPS))}, got {op!r}")
    try:
        _OPS[op].explained(*args, backend=Question("" if backend is None else backend), **kwargs)
    except Answer as answer:
        return str(answer)
    return f"{op}: no backend is chosen, because no kernel is needed for this call"
