"""The types of the public ops' arguments, for editors and type checkers."""

from typing import Literal, TypedDict

from torch import Tensor

Backend = Literal["native", "triton", "reference", "auto"] | None
Causal = bool | Literal["bottom_right", "top_left"]
Window = tuple[int | None, int | None] | list[int | None] | Tensor | None
Activation = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"]
Reduction = Literal["mean", "sum", "none"]


class NormOptions(TypedDict, total=False):
    """The options of `layer_norm` and `rms_norm`, except return_residual, which changes the return type."""

    x_bias: Tensor | None
    residual: Tensor | None
    dropout_p: float | None
    backend: Backend


class AttentionOptions(TypedDict, total=False):
    """The options of `attention`, except return_lse, which changes the return type."""

    mask: Tensor | None
    bias: Tensor | None
    causal: Causal
    window: Window
    seqlens_k: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    alibi_slopes: Tensor | None
    softcap: float | None
    sink: Tensor | None
    dropout_p: float | None
    scale: float | None
    deterministic: bool | None
    backend: Backend


class DecodeOptions(TypedDict, total=False):
    """The optional arguments of `attention_decode`, except return_lse, which changes the return type."""

    k: Tensor | None
    v: Tensor | None
    block_table: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    causal: Causal
    window: Window
    softcap: float | None
    alibi_slopes: Tensor | None
    sink: Tensor | None
    scale: float | None
    num_splits: int | None
    backend: Backend


class RotaryOptions(TypedDict, total=False):
    """The options of `rotary_embedding`."""

    positions: Tensor | int | None
    interleaved: bool
    inplace: bool
    backend: Backend
