"""Feed-forward block: two linear layers around an activation, or around a gated one, with dropout between them.

preact = w1·x + b1,  gate = w_gate·x + b_gate
hidden = keep * dropout_scale * act(preact)                 gated: act(gate) * preact
y = w2·hidden + b2
"""

import torch

from fastattn import reference
from fastattn.ops._backends import choose, explanation
from fastattn.ops._random import check_dropout_p, draw_rng

ACTIVATIONS = tuple(reference.ACTIVATIONS)


def _check_tensor(label, tensor, shape, meaning, x):
    if tuple(tensor.shape) != shape:
        raise ValueError(f"feed_forward: {label} must have shape {shape}, {meaning}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"feed_forward: {label} must be on the device of x, {x.device}, got {tensor.device}")


def _check(x, w1, b1, w2, b2, activation, w_gate, b_gate, dropout_p):
    if activation not in ACTIVATIONS:
        raise ValueError(f"feed_forward: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    check_dropout_p(dropout_p)
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(
            f"feed_forward: x must be a floating-point tensor with at least one dimension, got {x.dtype}"
            f" {tuple(x.shape)}"
        )
    if w1.dim() != 2 or w2.dim() != 2:
        raise ValueError(
            f"feed_forward: w1 and w2 must have two dimensions, got {tuple(w1.shape)} and {tuple(w2.shape)}"
        )
    d_ff, d_out = w1.shape[0], w2.shape[0]
    _check_tensor("w1", w1, (d_ff, x.shape[-1]), "(d_ff, last dimension of x)", x)
    _check_tensor("w2", w2, (d_out, d_ff), "(d_model, first dimension of w1)", x)
    if w_gate is not None:
        _check_tensor("w_gate", w_gate, tuple(w1.shape), "that of w1", x)
    elif b_gate is not None:
        raise ValueError("feed_forward: b_gate was given without w_gate")
    for label, bias, size in (("b1", b1, d_ff), ("b_gate", b_gate, d_ff), ("b2", b2, d_out)):
        if bias is not None:
            _check_tensor(label, bias, (size,), "the first dimension of its weight", x)


def _check_dtypes(x, **others):
    for label, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"feed_forward: {label} must have the dtype of x, {x.dtype}, got {tensor.dtype}")


def _facts(x):
    return x.device.type, x.dtype


def feed_forward(
    x, w1, b1, w2, b2, *, activation="gelu", w_gate=None, b_gate=None, dropout_p=0.0, recompute=False, backend=None
):
    """w2·dropout(act(w1·x + b1)) + b2; with w_gate: w2·dropout(act(w_gate·x + b_gate) ∘ (w1·x + b1)) + b2.

    Args:
        x: (..., d_model), float32, bfloat16 or float16 (float64 runs on the reference), any strides. Under autocast
            everything is cast to the autocast dtype; otherwise the dtypes must agree.
        w1, w_gate: (d_ff, d_model), as nn.Linear stores them; w_gate or None.
        w2: (d_model, d_ff).
        b1, b_gate: (d_ff,) or None. b2: (d_model,) or None.
        activation: "gelu" (erf), "gelu_tanh", "relu", "relu2" (squared) or "silu".
        dropout_p: probability with which elements of the hidden layer become 0; drawn anew in every call.
        recompute: keep only x for the backward and compute w1·x + b1 again there.
        backend: "native", "triton" or "reference" instead of the automatic choice.
    Returns: (..., d_model).
    Raises:
        ValueError: the activation is unknown, shapes, dtypes, devices or dropout_p do not fit, or the named backend
            cannot serve the call.
    Source: Vaswani et al., "Attention is all you need" (2017), and Shazeer, "GLU variants improve transformer" (2020).
    """
    _check(x, w1, b1, w2, b2, activation, w_gate, b_gate, dropout_p)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w1, b1, w2, b2, w_gate, b_gate = (
            t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, w1, b1, w2, b2, w_gate, b_gate)
        )
    _check_dtypes(x, w1=w1, b1=b1, w2=w2, b2=b2, w_gate=w_gate, b_gate=b_gate)
    rng = draw_rng(x.device) if dropout_p else None
    choose("feed_forward", _facts(x), backend)
    return reference.feed_forward(
        x, w1, b1, w2, b2, activation=activation, w_gate=w_gate, b_gate=b_gate, dropout_p=dropout_p, rng=rng
    )


def explain(
    x, w1, b1, w2, b2, *, activation="gelu", w_gate=None, b_gate=None, dropout_p=0.0, recompute=False, backend=None
):
    """What `feed_forward` would run for these arguments, and why not the others."""
    _check(x, w1, b1, w2, b2, activation, w_gate, b_gate, dropout_p)
    return explanation("feed_forward", _facts(x), backend)
