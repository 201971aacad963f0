"""The feed-forward block as a module."""

from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.nn.plain import affine, dropout_p, is_plain, must_call_children
from fastattn.ops import feed_forward
from fastattn.ops._public import Public
from fastattn.ops._random import check_dropout_p
from fastattn.ops._types import Activation


class FeedForward(torch.nn.Module):
    """linear2(dropout(act(linear1(x)))), or gated linear2(dropout(act(gate(x)) ∘ linear1(x))), in fused passes.

    Args:
        d_model, d_ff: width of the input and of the hidden layer.
        activation: "gelu" (erf), "gelu_tanh", "relu", "relu2" or "silu"; with gated=True and "silu" it is SwiGLU.
        dropout: probability of zeroing a hidden element in training.
        gated: whether a second input layer, `gate`, multiplies the hidden layer.
        bias: whether the linear layers have biases.
        recompute: save only x for the backward, which computes the hidden layer again.
    Raises:
        ValueError: the activation is unknown, or a number is out of range.
    Source: Vaswani et al., "Attention is all you need" (2017), and Shazeer, "GLU variants improve transformer" (2020).
    Example:
        >>> block = fastattn.nn.FeedForward(64, 172, activation="silu", gated=True)  # SwiGLU
        >>> block(torch.randn(4, 128, 64)).shape
        torch.Size([4, 128, 64])
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
        linear = torch.nn.Linear
        m: dict[str, Any] = self._modules
        linear1, linear2, dropout, gate = m["linear1"], m["linear2"], m["dropout"], m.get("gate")
        plain = (
            is_plain(linear1, linear)
            and is_plain(linear2, linear)
            and (gate is None or is_plain(gate, linear))
            and is_plain(dropout, torch.nn.Dropout)
            and not must_call_children()
        )
        if not plain:
            act = reference.ACTIVATIONS[self.activation]
            up = linear1(x)
            return linear2(dropout(act(up) if gate is None else act(gate(x)) * up))
        w_gate, b_gate = (None, None) if gate is None else affine(gate)
        return feed_forward(
            x, *affine(linear1), *affine(linear2), activation=self.activation, w_gate=w_gate, b_gate=b_gate,
            dropout_p=dropout_p(dropout), recompute=self.recompute,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, gated={self.gate is not None}"
