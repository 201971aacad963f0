"""The decoder layer and its stack, with the arguments, parameters and masks of torch.nn.

    post-norm: x = norm1(x + dropout1(SA(x)));  x = norm2(x + dropout2(CA(x, memory)));  x = norm3(x + dropout3(FF(x)))
    pre-norm:  the norms come before SA, CA and FF instead

The layer is fused, composed of its children, or one call on a CPU under the same conditions as the encoder layer
(whole.py).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.kept import find_kept
from fastattn.nn.masks import is_causal_mask
from fastattn.nn.norm import LayerNorm
from fastattn.nn.plain import affine, dropout_p, leaf_call
from fastattn.nn.sublayers import (
    add_norm,
    add_norm_keep_sum,
    are_plain,
    attend,
    feed_forward_and_bias,
    feed_forward_block,
    fit_fused_ops,
    sequence_length,
)
from fastattn.nn.whole import decode
from fastattn.ops import dropout, layer_norm
from fastattn.ops._public import Public

_TENSORS = "tgt memory tgt_mask memory_mask tgt_key_padding_mask memory_key_padding_mask"
_LINEARS, _NORMS = ("linear1", "linear2"), ("norm1", "norm2", "norm3")
_DROPOUTS = ("dropout", "dropout1", "dropout2", "dropout3")
# the torch code that ours replaces, unless it has been patched
_TorchLayer = torch.nn.TransformerDecoderLayer
_FORWARD, _SA_BLOCK, _MHA_BLOCK, _FF_BLOCK = (
    getattr(_TorchLayer, name) for name in ("forward", "_sa_block", "_mha_block", "_ff_block")
)


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` on fused kernels: the same arguments, parameters, masks and override points.

    docs/torch-nn.md lists where it differs from torch, each difference with its reason.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype: as in torch.nn.
        strict_torch: as in `MultiheadAttention`.
    Source: torch.nn.TransformerDecoderLayer.
    Example:
        >>> layer = fastattn.nn.TransformerDecoderLayer(64, 8, batch_first=True)
        >>> layer(torch.randn(4, 16, 64), torch.randn(4, 32, 64), tgt_is_causal=True).shape
        torch.Size([4, 16, 64])
    """

    @Public("nn.TransformerDecoderLayer", flags="strict_torch").answering
    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-05,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        strict_torch: bool = False,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype,
        )  # fmt: skip
        # as in the encoder layer: the random draws stay torch's
        self.self_attn.__class__ = self.multihead_attn.__class__ = MultiheadAttention
        self.norm1.__class__ = self.norm2.__class__ = self.norm3.__class__ = LayerNorm
        if strict_torch:
            for attn in (self.self_attn, self.multihead_attn):
                attn.strict_torch = True  # type: ignore[assignment]

    @Public(
        "nn.TransformerDecoderLayer", tensors=_TENSORS, flags="tgt_is_causal memory_is_causal", nested=None
    ).answering
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Decode tgt, attending to memory.

        Args:
            tgt: (batch, seqlen, d_model) if batch_first, else (seqlen, batch, d_model); unbatched (seqlen, d_model).
            memory: the same with its own length.
            tgt_mask, memory_mask: (seqlen, length of tgt or memory) or (batch * nhead, ...), bool (True = ignore) or
                float (added).
            tgt_key_padding_mask, memory_key_padding_mask: (batch, length), unbatched (length,), bool or float.
            tgt_is_causal, memory_is_causal: position i sees positions 0 to i, and the mask is ignored.
        Returns: like tgt.
        Raises:
            AssertionError, RuntimeError: dimensions, shapes or dtypes do not fit, as in torch.nn.
        """
        nested = not (tgt.is_nested is memory.is_nested is False)
        masks = tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal, memory_is_causal
        if nested and (recorded := leaf_call(self, tgt, memory, *masks)) is not None:
            return recorded
        m: dict[str, Any] = self._modules
        cls, own, x = type(self), self.__dict__, tgt
        for_tgt = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        for_memory = memory_mask, memory_key_padding_mask, memory_is_causal
        if (
            _TorchLayer.forward is not _FORWARD
            or cls._sa_block is not _SA_BLOCK
            or cls._mha_block is not _MHA_BLOCK
            or cls._ff_block is not _FF_BLOCK
            or nested
            or "_sa_block" in own
            or "_mha_block" in own
            or "_ff_block" in own
        ):
            return super().forward(tgt, memory, *masks)  # torch's decoder has no fast path: it calls the children
        reading = find_kept(self)
        if reading and (whole := decode(self, x, memory, for_tgt, for_memory, reading)) is not None:
            return whole
        if not are_plain(m, _LINEARS, _DROPOUTS, _NORMS) or not fit_fused_ops(m, _LINEARS, _NORMS, tgt):
            return super().forward(tgt, memory, *masks)
        if (whole := decode(self, x, memory, for_tgt, for_memory)) is not None:
            return whole

        def self_attend(x) -> tuple[Tensor, Tensor | None]:
            return attend(m["self_attn"], x, x, *for_tgt)

        def cross_attend(x) -> tuple[Tensor, Tensor | None]:
            return attend(m["multihead_attn"], x, memory, *for_memory)

        if self.norm_first:
            h = layer_norm(x, *affine(m["norm1"]), m["norm1"].eps)
            h, x = add_norm_keep_sum(*self_attend(h), x, m["dropout1"], m["norm2"])
            h, x = add_norm_keep_sum(*cross_attend(h), x, m["dropout2"], m["norm3"])
            h = feed_forward_block(h, m["linear1"], self.activation, m["dropout"], m["linear2"])
            return dropout(h, dropout_p(m["dropout3"]), residual=x)
        x = add_norm(*self_attend(x), x, m["dropout1"], m["norm1"])
        x = add_norm(*cross_attend(x), x, m["dropout2"], m["norm2"])
        h, h_bias = feed_forward_and_bias(x, m["linear1"], self.activation, m["dropout"], m["linear2"])
        return add_norm(h, h_bias, x, m["dropout3"], m["norm3"])


class TransformerDecoder(torch.nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder`: a stack of copies of one layer and an optional final norm.

    Args:
        decoder_layer: the layer, ours or any other with the arguments of `TransformerDecoderLayer`.
        num_layers: number of copies.
        norm: module applied at the end, or None.
        strict_torch: run torch's own container code, which compares the mask with the causal one in every call.
    Source: torch.nn.TransformerDecoder.
    Example:
        >>> layer = fastattn.nn.TransformerDecoderLayer(64, 8, batch_first=True)
        >>> decoder = fastattn.nn.TransformerDecoder(layer, num_layers=2)
        >>> decoder(torch.randn(4, 16, 64), torch.randn(4, 32, 64), tgt_is_causal=True).shape
        torch.Size([4, 16, 64])
    """

    strict_torch = False

    @Public("nn.TransformerDecoder", flags="strict_torch").answering
    def __init__(
        self,
        decoder_layer: Any,
        num_layers: int,
        norm: nn.Module | None = None,
        *,
        strict_torch: bool = False,
    ) -> None:
        super().__init__(decoder_layer, num_layers, norm)
        if strict_torch:
            self.strict_torch = True

    @Public("nn.TransformerDecoder", tensors=_TENSORS, flags="tgt_is_causal memory_is_causal", nested=None).answering
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Pass tgt through the layers; arguments as in `TransformerDecoderLayer`.

        Args:
            tgt_is_causal: None compares tgt_mask with the causal one, except while a graph is captured. On a GPU the
                comparison synchronizes; True and False do not.
        Returns: like tgt.
        """
        masks = tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
        if not (tgt.is_nested is memory.is_nested is False):
            recorded = leaf_call(self, tgt, memory, *masks, tgt_is_causal, memory_is_causal)
            if recorded is not None:
                return recorded
        if not self.strict_torch and tgt_is_causal is None:
            is_one_size = tgt_mask is not None and not tgt.is_nested
            size = sequence_length(tgt, self.layers[0].self_attn.batch_first) if is_one_size else 0
            tgt_is_causal = is_causal_mask(tgt_mask, None, size)
        return super().forward(tgt, memory, *masks, tgt_is_causal, memory_is_causal)
