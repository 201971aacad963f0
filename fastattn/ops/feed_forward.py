"""Feed-forward block: two linear layers with an activation, gated or not, and dropout between them.

preact = w1·x + b1,  gate = w_gate·x + b_gate
hidden = keep * dropout_scale * act(preact)                 gated: act(gate) * preact
y = w2·hidden + b2

The matrix products come from _gemm.py. Our kernels are the passes between them, the raw ops activation_fwd and
activation_bwd. The latter computes the gradients of preact, gate and their biases, and recomputes hidden, so only x and
the pre-activations are saved.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import reference
from fastattn._autocast import as_autocast
from fastattn.ops._backends import choose, device_name, grad_wanted, register_backend
from fastattn.ops._dtypes import WeightFacts, why_not_weights
from fastattn.ops._gemm import input_grad, linear, weight_grad
from fastattn.ops._kinds import FLOAT_DTYPES, check_float, check_memory, is_dtensor, nonplain_kind
from fastattn.ops._nested import on_rows
from fastattn.ops._public import Public
from fastattn.ops._random import check_dropout_p, draw_rng
from fastattn.ops._register import (
    TRACED,
    apply,
    differentiate,
    raw_ops,
    register_autograd,
    register_fake,
    traced_backend,
)  # fmt: skip
from fastattn.ops._types import Activation, Backend

ACTIVATIONS = tuple(reference.ACTIVATIONS)


def _activation_fwd_fake(preact, gate, rng, dropout_p, activation):
    return preact.new_empty(preact.shape)


def _activation_bwd_fake(dhidden, preact, gate, rng, dropout_p, activation, need_hidden, need_dbias, need_dbias_gate):
    cols = preact.shape[-1]
    return (
        preact.new_empty(preact.shape),
        preact.new_empty(preact.shape if gate is not None else (0,)),
        preact.new_empty(preact.shape if need_hidden else (0,)),
        preact.new_empty(cols if need_dbias else 0),
        preact.new_empty(cols if need_dbias_gate and gate is not None else 0),
    )


register_fake("activation_fwd", _activation_fwd_fake)
register_fake("activation_bwd", _activation_bwd_fake)


_fwd, _bwd = raw_ops("activation_fwd"), raw_ops("activation_bwd")


for _backend in ("native", "triton"):
    register_backend("feed_forward", _backend, why_not_weights, raw="activation_fwd", facts=WeightFacts)


def _rows(x):
    if x.dim() == 2:
        return x
    if not x.is_contiguous():
        check_memory("feed_forward", x=x)
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, w_gate, b_gate, rng, options):
        """options: (dropout_p, activation, recompute, backend)"""
        dropout_p, activation, recompute, backend = options
        y, preact, gate = _forward(x, w1, b1, w2, b2, w_gate, b_gate, rng, dropout_p, activation, backend)
        ctx.save_for_backward(
            x, w1, b1, w2, b2, w_gate, b_gate, rng, None if recompute else preact, None if recompute else gate
        )
        ctx.options = (dropout_p, activation, backend)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w1, b1, w2, b2, w_gate, b_gate, rng, preact, gate = ctx.saved_tensors
        dropout_p, activation, backend = ctx.options
        inputs = (x, w1, b1, w2, b2, w_gate, b_gate)
        if torch.is_grad_enabled():  # create_graph=True
            grads = differentiate(_reference(rng, dropout_p, activation), inputs, (dy,))
            return *grads, None, None
        need_dx, need_dw1, need_db1, need_dw2, need_db2, need_dw_gate, need_db_gate = ctx.needs_input_grad[:7]
        x2, dy = _rows(x), _rows(dy)
        if preact is None:
            preact, gate = linear(x2, w1, b1), None if w_gate is None else linear(x2, w_gate, b_gate)
        dx = dw1 = dw2 = db2 = dw_gate = None
        drop_and_act = (rng, dropout_p, ACTIVATIONS.index(activation))
        dpreact, dgate, hidden, db1, db_gate = _bwd[backend](
            input_grad(dy, w2), preact, gate, *drop_and_act, need_dw2, need_db1, need_db_gate
        )
        if need_dw2:
            dw2 = weight_grad(dy, hidden)
            del hidden  # free it before the peak
        if need_db2:
            db2 = dy.sum(0)
        if need_dw1:
            dw1 = weight_grad(dpreact, x2)
        if need_dw_gate:
            dw_gate = weight_grad(dgate, x2)
        if need_dx:
            dx = input_grad(dpreact, w1)
            if gate is not None:
                dx += input_grad(dgate, w_gate)
            dx = dx.view(x.shape)
        grads = (dx, dw1, db1 if need_db1 else None, dw2, db2, dw_gate, db_gate if need_db_gate else None)
        return *grads, None, None


def _forward(x, w1, b1, w2, b2, w_gate, b_gate, rng, dropout_p, activation, backend):
    x2 = _rows(x)
    preact = linear(x2, w1, b1)
    gate = None if w_gate is None else linear(x2, w_gate, b_gate)
    hidden = _fwd[backend](preact, gate, rng, dropout_p, ACTIVATIONS.index(activation))
    y = linear(hidden, w2, b2)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], w2.shape[0]), preact, gate


class _Activation(torch.autograd.Function):
    """The pass between the products alone, for tracers, which differentiate the products themselves."""

    @staticmethod
    def forward(ctx, preact, gate, rng, dropout_p, activation, backend):
        ctx.save_for_backward(preact, gate, rng)
        ctx.options = (dropout_p, activation, backend)
        return _fwd[backend](preact, gate, rng, dropout_p, activation)

    @staticmethod
    def backward(ctx, dhidden):
        preact, gate, rng = ctx.saved_tensors
        dropout_p, activation, backend = ctx.options
        if torch.is_grad_enabled():  # create_graph=True
            grads = differentiate(
                lambda *inputs: (_activation_reference(*inputs, rng, dropout_p, activation),),
                (preact, gate),
                (dhidden,),
            )
            return *grads, None, None, None, None
        dpreact, dgate, *_ = _bwd[backend](dhidden, preact, gate, rng, dropout_p, activation, False, False, False)
        return dpreact, None if gate is None else dgate, None, None, None, None


def _activation_reference(preact, gate, rng, dropout_p, activation):
    acc = reference.accumulator(preact.dtype)
    act = reference.ACTIVATIONS[ACTIVATIONS[activation]]
    hidden = act(preact.to(acc)) if gate is None else act(gate.to(acc)) * preact.to(acc)
    return reference.dropout(hidden, dropout_p, rng=rng).to(preact.dtype)


register_autograd("activation_fwd", lambda backend, *args: apply(_Activation, *args, backend), _activation_reference)


def _reference(rng, dropout_p, activation, **product):
    def function(x, w1, b1, w2, b2, w_gate, b_gate):
        y = reference.feed_forward(
            x, w1, b1, w2, b2, activation=activation, w_gate=w_gate, b_gate=b_gate, dropout_p=dropout_p, rng=rng,
            **product,
        )  # fmt: skip
        return (y,)

    return function


def _check_tensor(label, tensor, shape, meaning, x):
    if tuple(tensor.shape) != shape:
        raise ValueError(f"feed_forward: {label} must have shape {shape}, {meaning}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"feed_forward: {label} must be on the device of x, {x.device}, got {tensor.device}")


def _check(x, w1, b1, w2, b2, activation, w_gate, b_gate, dropout_p):
    """Raise unless the arguments are valid; return dropout_p as a number."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"feed_forward: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    dropout_p = check_dropout_p("feed_forward", dropout_p) if dropout_p != 0.0 else 0.0
    shape1, shape2, device = w1.shape, w2.shape, x.device
    hidden, out = shape1[:1], shape2[:1]
    if (
        x.dtype not in FLOAT_DTYPES
        or not len(shape1) == len(shape2) == 2
        or not (x.shape[-1:] == shape1[1:] and shape2[1:] == hidden)
        or not w1.device == w2.device == device
        or (b1 is not None and not (b1.shape == hidden and b1.device == device))
        or (b2 is not None and not (b2.shape == out and b2.device == device))
        or (w_gate is not None and not (w_gate.shape == shape1 and w_gate.device == device))
        or (b_gate is not None and not (w_gate is not None and b_gate.shape == hidden and b_gate.device == device))
    ):
        _raise_for_operands(x, w1, b1, w2, b2, w_gate, b_gate)
    return dropout_p


def _raise_for_operands(x, w1, b1, w2, b2, w_gate, b_gate):
    """Raise for the first invalid operand."""
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(
            f"feed_forward: x must be a floating-point tensor with at least one dimension, got {x.dtype}"
            f" {tuple(x.shape)}"
        )
    check_float("feed_forward", "x", x)
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


def _check_dtypes(x, *others):
    dtype = x.dtype
    for label, tensor in zip(("w1", "b1", "w2", "b2", "w_gate", "b_gate"), others, strict=True):
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(f"feed_forward: {label} must have the dtype of x, {dtype}, got {tensor.dtype}")


def _facts(x, nonplain=None):
    return "cpu" if x.is_cpu else device_name(x.device), x.dtype, nonplain


_FEED_FORWARD = Public(
    "feed_forward", tensors="x w1 b1? w2 b2? w_gate b_gate", weights="w1 w2 w_gate", numbers="dropout_p",
    flags="recompute", nested=on_rows("x"),
)  # fmt: skip


@_FEED_FORWARD.overridable
def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: Activation = "gelu",
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    dropout_p: float | None = 0.0,
    recompute: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """w2·dropout(act(w1·x + b1)) + b2; with w_gate: w2·dropout(act(w_gate·x + b_gate) ∘ (w1·x + b1)) + b2.

    Args:
        x: (..., d_model), float32, bfloat16 or float16 (float64 runs on the reference), any strides. Under autocast
            all tensors are cast to the autocast dtype; otherwise the dtypes must agree.
        w1, w_gate: (d_ff, d_model), as nn.Linear stores them; w_gate may be None. With quantised or sparse
            weights the block runs on the reference, with torch.nn.functional.linear for its products.
        w2: (d_model, d_ff).
        b1, b_gate: (d_ff,) or None. b2: (d_model,) or None.
        activation: "gelu" (erf), "gelu_tanh", "relu", "relu2" (squared) or "silu".
        dropout_p: probability of setting an element of the hidden layer to 0; each call draws a new mask.
        recompute: save only x for the backward, which then recomputes the pre-activations.
        backend: "native", "triton" or "reference" instead of the automatic choice.
    Returns: (..., d_model).
    Raises:
        ValueError: the activation is unknown, shapes, dtypes, devices or dropout_p are invalid, or the named backend
            cannot serve the call.
        TypeError: an argument has a wrong type.
    Source: Vaswani et al., "Attention is all you need" (2017), and Shazeer, "GLU variants improve transformer" (2020).
    Example:
        >>> x, w1, w2 = torch.randn(4, 64), torch.randn(256, 64), torch.randn(64, 256)
        >>> fastattn.feed_forward(x, w1, None, w2, None, activation="silu", w_gate=w1).shape
        torch.Size([4, 64])
    """
    dropout_p = _check(x, w1, b1, w2, b2, activation, w_gate, b_gate, dropout_p)
    nonplain = nonplain_kind(w1, w2, w_gate)
    if nonplain is not None:
        # raises if a backend other than the reference was asked for
        choose("feed_forward", _facts(x, nonplain), backend)
        rng = draw_rng(x) if dropout_p else None
        return _reference(rng, dropout_p, activation, linear=F.linear)(x, w1, b1, w2, b2, w_gate, b_gate)[0]
    x, w1, b1, w2, b2, w_gate, b_gate = as_autocast(x, w1, b1, w2, b2, w_gate, b_gate)
    _check_dtypes(x, w1, b1, w2, b2, w_gate, b_gate)
    runs = choose("feed_forward", _facts(x), backend)
    options = (dropout_p, activation, recompute, runs)
    if type(x) is not torch.Tensor and is_dtensor(x):
        return _feed_forward_sharded(x, w1, b1, w2, b2, w_gate, b_gate, *options)
    return _feed_forward(x, w1, b1, w2, b2, w_gate, b_gate, draw_rng(x) if dropout_p else None, *options)


def _feed_forward(x, w1, b1, w2, b2, w_gate, b_gate, rng, dropout_p, activation, recompute, runs):
    inputs = (x, w1, b1, w2, b2, w_gate, b_gate)
    runs = traced_backend(runs)
    if runs == "reference":
        check_memory("feed_forward", x=x, w1=w1, b1=b1, w2=w2, b2=b2, w_gate=w_gate, b_gate=b_gate)
        return _reference(rng, dropout_p, activation)(*inputs)[0]
    if runs not in TRACED and grad_wanted(*inputs):
        return apply(_FeedForward, *inputs, rng, (dropout_p, activation, recompute, runs))
    return _forward(*inputs, rng, dropout_p, activation, runs)[0]


def _feed_forward_sharded(x, w1, b1, w2, b2, w_gate, b_gate, dropout_p, activation, recompute, runs):
    from fastattn.ops._sharded import ROWS, ShardedCall

    rows = ROWS[: x.dim() - 1]
    operands = {"x": (x, rows + "d"), "w1": (w1, "fd"), "b1": (b1, "f"), "w2": (w2, "of"), "b2": (b2, "o"),
                "w_gate": (w_gate, "fd"), "b_gate": (b_gate, "f")}  # fmt: skip
    call = ShardedCall("feed_forward", operands, "f" + rows)
    rng = call.draw_rng() if dropout_p else None
    adds_bias = b2 is not None and not call.is_sharded_along("f")  # shards are partial sums: add the bias to the total

    def function(x, w1, b1, w2, b2, w_gate, b_gate):
        b2 = b2 if adds_bias else None
        y = _feed_forward(x, w1, b1, w2, b2, w_gate, b_gate, rng, dropout_p, activation, recompute, runs)
        return (y,)

    (y,) = call(function, (rows + "o",))
    return y if adds_bias or b2 is None else y + b2
