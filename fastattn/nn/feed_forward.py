"""The feed-forward block: as a module of its own, and as the encoder and decoder layers use it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import reference
from fastattn.nn.plain import dropout_p, is_plain, must_call_children
from fastattn.ops import feed_forward
from fastattn.ops._public import Public
from fastattn.ops._random import check_dropout_p
from fastattn.ops._types import Activation
from fastattn.ops.linear import linear


def activation_name(activation):
    """The op's name of an activation, or None: then the block is composed of its children.

    Args:
        activation: a function or a module.
    """
    if isinstance(activation, torch.nn.Module):
        if is_plain(activation, torch.nn.GELU):
            return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
        if is_plain(activation, torch.nn.ReLU):
            return "relu"
        return "silu" if is_plain(activation, torch.nn.SiLU) else None
    if activation is F.relu or activation is torch.relu:
        return "relu"
    if activation is F.gelu:
        return "gelu"
    return "silu" if activation is F.silu else None


def block(x, linear1, activation, dropout, linear2, last_bias=True):
    """linear2(dropout(activation(linear1(x)))), by the fused op if it knows the activation; the children are plain.

    Args:
        last_bias: False leaves the bias of linear2 to the norm that follows.
    """
    name, bias = activation_name(activation), linear2.bias if last_bias else None
    if name is None:
        return linear(dropout(activation(linear1(x))), linear2.weight, bias)
    return feed_forward(
        x, linear1.weight, linear1.bias, linear2.weight, bias, activation=name, dropout_p=dropout_p(dropout)
    )


class FeedForward(torch.nn.Module):
    """linear2(dropout(act(linear1(x)))), or gated linear2(dropout(act(gate(x)) ∘ linear1(x))), in fused passes.

    Args:
        d_model, d_ff: width of the input and of the hidden layer.
        activation: "gelu" (erf), "gelu_tanh", "relu", "relu2" or "silu"; with gated=True and "silu" it is SwiGLU.
        dropout: probability with which hidden elements become 0 in training.
        gated: whether there is a second first layer, `gate`.
        bias: whether the linear layers have one.
        recompute: keep only x for the backward and compute the hidden layer again there.
    Raises:
        ValueError: the activation is unknown.
    Source: Vaswani et al., "Attention is all you need" (2017), and Shazeer, "GLU variants improve transformer" (2020).
    """

    @Public("nn.FeedForward", numbers="dropout", integers="d_model d_ff", flags="gated bias recompute").answering
    def __init__(
        self,
        d_model: int,
        d_ff: int = 2048,
        *,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        gated: bool = False,
        bias: bool = True,
        recompute: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in tuple(reference.ACTIVATIONS):
            known = ", ".join(reference.ACTIVATIONS)
            raise ValueError(f"nn.FeedForward: activation must be one of {known}, got {activation!r}")
        for label, size in (("d_model", d_model), ("d_ff", d_ff)):
            if size < 0:
                raise ValueError(f"nn.FeedForward: {label} must be at least 0, got {size}")
        check_dropout_p("nn.FeedForward", dropout, "dropout")
        self.activation = activation
        self.recompute = recompute
        self.linear1 = torch.nn.Linear(d_model, d_ff, bias=bias, device=device, dtype=dtype)
        self.gate = torch.nn.Linear(d_model, d_ff, bias=bias, device=device, dtype=dtype) if gated else None
        self.dropout = torch.nn.Dropout(dropout)
        self.linear2 = torch.nn.Linear(d_ff, d_model, bias=bias, device=device, dtype=dtype)

    @Public("nn.FeedForward", tensors="x", nested=None).answering
    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_model) → (..., d_model)."""
        linear1, linear2, gate, linear = self.linear1, self.linear2, self.gate, torch.nn.Linear
        plain = (
            is_plain(linear1, linear)
            and is_plain(linear2, linear)
            and (gate is None or is_plain(gate, linear))
            and is_plain(self.dropout, torch.nn.Dropout)
            and not must_call_children()
        )
        if not plain:
            act = reference.ACTIVATIONS[self.activation]
            up = linear1(x)
            return linear2(self.dropout(act(up) if gate is None else act(gate(x)) * up))
        w_gate, b_gate = (None, None) if gate is None else (gate.weight, gate.bias)
        return feed_forward(
            x, linear1.weight, linear1.bias, linear2.weight, linear2.bias, activation=self.activation, w_gate=w_gate,
            b_gate=b_gate, dropout_p=dropout_p(self.dropout), recompute=self.recompute,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, gated={self.gate is not None}"
