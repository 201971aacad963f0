"""The encoder layer and its stack, with the arguments, parameters and masks of torch.nn.

    post-norm: x = norm1(x + dropout1(SA(x)));  x = norm2(x + dropout2(FF(x)))
    pre-norm:  x = x + dropout1(SA(norm1(x)));  x = x + dropout2(FF(norm2(x)))

The fused layer runs dropout, residual add and norm as one op, and FF as another. It does so while every child is the
plain module that torch.nn creates. Otherwise, or if a subclass overrides a block, it calls the children. In fp32 and
bf16 on a CPU the whole layer is one call, and its backward another (whole.py).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.kept import find_kept
from fastattn.nn.masks import as_float_mask, check_mask_dtype, is_causal_mask
from fastattn.nn.norm import LayerNorm
from fastattn.nn.plain import affine, dropout_p, is_plain, is_traced, leaf_call, must_call_children
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
from fastattn.nn.whole import encode
from fastattn.ops import dropout, layer_norm
from fastattn.ops._nested import Rows
from fastattn.ops._public import Public

# the torch code that ours replaces, unless it has been patched
_TorchLayer, _TorchStack = torch.nn.TransformerEncoderLayer, torch.nn.TransformerEncoder
_FORWARD, _SA_BLOCK, _FF_BLOCK = _TorchLayer.forward, _TorchLayer._sa_block, _TorchLayer._ff_block
_STACK_FORWARD = _TorchStack.forward


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on fused kernels: the same arguments, parameters, masks and override points.

    docs/torch-nn.md lists where it differs from torch, each difference with its reason.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype: as in torch.nn.
        strict_torch: as in `MultiheadAttention`.
    Source: torch.nn.TransformerEncoderLayer.
    Example:
        >>> layer = fastattn.nn.TransformerEncoderLayer(64, 8, batch_first=True)
        >>> layer(torch.randn(4, 128, 64), is_causal=True).shape
        torch.Size([4, 128, 64])
    """

    @Public("nn.TransformerEncoderLayer", flags="strict_torch").answering
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
        # change the class of the children instead of building them again: the random draws stay torch's
        self.self_attn.__class__ = MultiheadAttention
        self.norm1.__class__ = self.norm2.__class__ = LayerNorm
        if strict_torch:
            self.self_attn.strict_torch = True  # type: ignore[assignment]

    @Public(
        "nn.TransformerEncoderLayer", tensors="src src_mask src_key_padding_mask", flags="is_causal", nested=None
    ).answering
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Encode src.

        Args:
            src: (batch, seqlen, d_model) if batch_first, else (seqlen, batch, d_model); unbatched (seqlen, d_model).
            src_mask: (seqlen, seqlen) or (batch * nhead, seqlen, seqlen), bool (True = ignore) or float (added).
            src_key_padding_mask: (batch, seqlen), unbatched (seqlen,), bool or float.
            is_causal: position i sees positions 0 to i, and src_mask is ignored.
        Returns: like src.
        Raises:
            AssertionError, RuntimeError: dimensions, shapes or dtypes do not fit, as in torch.nn.
        """
        nested = src.is_nested is not False
        if nested and (recorded := leaf_call(self, src, src_mask, src_key_padding_mask, is_causal)) is not None:
            return recorded
        if _TorchLayer.forward is not _FORWARD:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        check_mask_dtype(src_key_padding_mask, "src_key_padding_mask")
        check_mask_dtype(src_mask, "src_mask")
        m, cls, own = self._modules, type(self), self.__dict__
        overridden = cls._sa_block is not _SA_BLOCK or "_sa_block" in own
        if overridden or type(m["self_attn"]) is not MultiheadAttention:
            # user code gets float masks, as it does from torch
            src_mask = as_float_mask(src_mask, src.dtype)
            src_key_padding_mask = as_float_mask(src_key_padding_mask, src.dtype)
        masks = src_mask, src_key_padding_mask, is_causal
        reading = find_kept(self) if not nested and not overridden and cls._ff_block is _FF_BLOCK else None
        if reading and (whole := encode(self, src, *masks, reading)) is not None:
            return whole
        if overridden or not self._ff_is_plain(src):
            return self._composed(src, *masks)
        if nested:
            return self._nested(src, *masks)
        if (whole := encode(self, src, *masks)) is not None:
            return whole
        return self._fused(src, lambda x: attend(m["self_attn"], x, x, *masks))

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, is_causal: bool = False) -> Tensor:
        """Encode packed sequences, without padding; an overridden _sa_block is not called.

        Args:
            x: (total, d_model).
            cu_seqlens, max_seqlen, is_causal: as in `MultiheadAttention.forward_packed`.
        Returns: (total, d_model).
        """

        def self_attend(x):
            return self.self_attn.forward_packed(x, cu_seqlens, max_seqlen, is_causal)

        if self._ff_is_plain(x):
            return self._fused(x, lambda x: (self_attend(x), None))
        return self._add_sublayers(x, lambda x: self.dropout1(self_attend(x)))

    def _ff_is_plain(self, x):
        """Whether everything except self-attention is as torch.nn creates it, and fits x."""
        m, linears, norms = self._modules, ("linear1", "linear2"), ("norm1", "norm2")
        plain = are_plain(m, linears, ("dropout", "dropout1", "dropout2"), norms)
        return (
            plain
            and fit_fused_ops(m, linears, norms, x)
            and type(self)._ff_block is _FF_BLOCK
            and "_ff_block" not in self.__dict__
        )

    def _fused(self, x, self_attend):
        m = self._modules
        if self.norm_first:
            h = layer_norm(x, *affine(m["norm1"]), m["norm1"].eps)
            h, x = add_norm_keep_sum(*self_attend(h), x, m["dropout1"], m["norm2"])
            h = feed_forward_block(h, m["linear1"], self.activation, m["dropout"], m["linear2"])
            return dropout(h, dropout_p(m["dropout2"]), residual=x)
        x = add_norm(*self_attend(x), x, m["dropout1"], m["norm1"])
        h = feed_forward_and_bias(x, m["linear1"], self.activation, m["dropout"], m["linear2"])
        return add_norm(*h, x, m["dropout2"], m["norm2"])

    def _composed(self, x, src_mask, src_key_padding_mask, is_causal):
        return self._add_sublayers(
            x, lambda x: self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal)
        )  # fmt: skip

    def _add_sublayers(self, x, sa_block):
        if self.norm_first:
            x = x + sa_block(self.norm1(x))
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + sa_block(x))
        return self.norm2(x + self._ff_block(x))

    def _nested(self, src, src_mask, src_key_padding_mask, is_causal):
        """Nested tensors, computed without padding; torch's container turns padded batches into strided ones."""
        attn = self.self_attn
        packable = src.layout is torch.jagged or not self.training
        has_mask = src_mask is not None or src_key_padding_mask is not None
        if not packable or has_mask or src.dim() != 3 or not is_plain(attn, MultiheadAttention):
            return self._composed(src, src_mask, src_key_padding_mask, is_causal)
        rows = Rows("TransformerEncoderLayer", "src", src)
        return rows.restore(self.forward_packed(rows.tensor, rows.offsets.to(torch.int32), rows.max_seqlen, is_causal))


class TransformerEncoder(torch.nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder`: a stack of copies of one layer and an optional final norm.

    Args:
        encoder_layer: the layer, ours or any other that takes src_mask, src_key_padding_mask and is_causal.
        num_layers: number of copies.
        norm: module applied at the end, or None.
        enable_nested_tensor, mask_check: kept as attributes; padded batches are never converted.
        strict_torch: run torch's own container code, nested tensors and warnings included.
        padding_free: leave out what src_key_padding_mask ignores: the other tokens of all rows go packed through the
            layers, and a batch costs what they cost. The output is 0 at the padding. A float mask, a mask other than
            causal, changed or hooked layers and graphs that are traced keep the padding.
    Source: torch.nn.TransformerEncoder.
    Example:
        >>> layer = fastattn.nn.TransformerEncoderLayer(64, 8, batch_first=True)
        >>> encoder = fastattn.nn.TransformerEncoder(layer, num_layers=2, padding_free=True)
        >>> ignore = torch.arange(16) >= torch.tensor([[16], [5]])  # the second row has 5 tokens, then padding
        >>> encoder(torch.randn(2, 16, 64), src_key_padding_mask=ignore).shape
        torch.Size([2, 16, 64])
    """

    strict_torch = False
    padding_free = False

    @Public("nn.TransformerEncoder", flags="strict_torch padding_free").answering
    def __init__(
        self,
        encoder_layer: Any,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
        *,
        strict_torch: bool = False,
        padding_free: bool = False,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor and strict_torch, mask_check)
        self.enable_nested_tensor = enable_nested_tensor
        if strict_torch:
            self.strict_torch = True
        if padding_free:
            self.padding_free = True

    @Public("nn.TransformerEncoder", tensors="src mask src_key_padding_mask", flags="is_causal", nested=None).answering
    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Pass src through the layers.

        Args:
            src, mask, src_key_padding_mask: as in `TransformerEncoderLayer`.
            is_causal: position i sees positions 0 to i, and mask is ignored. None compares the mask with the causal
                one, except while a graph is captured; on a GPU the comparison synchronizes, True and False do not.
        Returns: like src.
        """
        nested = src.is_nested is not False
        if nested and (recorded := leaf_call(self, src, mask, src_key_padding_mask, is_causal)) is not None:
            return recorded
        if self.strict_torch or _TorchStack.forward is not _STACK_FORWARD:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        check_mask_dtype(src_key_padding_mask, "src_key_padding_mask")
        check_mask_dtype(mask, "mask")
        if mask is not None and is_causal is None and not nested:
            is_causal = is_causal_mask(mask, None, sequence_length(src, self.layers[0].self_attn.batch_first))
        is_causal = is_causal is True
        if self.padding_free and self._can_pack(src, mask, src_key_padding_mask, is_causal):
            return self._packed(src, src_key_padding_mask, is_causal)
        for layer in self.layers:
            if getattr(type(layer), "forward", None) is TransformerEncoderLayer.forward:
                masks = mask, src_key_padding_mask
            else:
                masks = as_float_mask(mask, src.dtype), as_float_mask(src_key_padding_mask, src.dtype)
            src = layer(src, src_mask=masks[0], is_causal=is_causal, src_key_padding_mask=masks[1])
        return src if self.norm is None else self.norm(src)

    def _can_pack(self, src, mask, padding, is_causal):
        """Whether the layers may get the real tokens alone: a bool padding mask, and layers as they were made."""
        if padding is None or padding.dtype != torch.bool or not (mask is None or is_causal) or is_traced():
            return False
        if src.is_nested or src.dim() != 3 or must_call_children():
            return False
        batch_first = self.layers[0].self_attn.batch_first
        if padding.shape != (src.shape[:2] if batch_first else src.shape[1::-1]):
            return False
        return all(
            is_plain(layer, TransformerEncoderLayer)
            and is_plain(layer.self_attn, MultiheadAttention)
            and not layer.self_attn.strict_torch
            and "_sa_block" not in layer.__dict__
            for layer in self.layers
        )

    def _packed(self, src, padding, is_causal):
        """The layers and the norm on the tokens that are not padding; 0 at the padding."""
        batch_first = self.layers[0].self_attn.batch_first
        rows = src if batch_first else src.transpose(0, 1)
        kept = (~padding).flatten().nonzero().flatten()
        lengths = (~padding).sum(1)
        ends = lengths[lengths > 0].cumsum(0).int()
        cu_seqlens, longest = torch.cat([ends.new_zeros(1), ends]), int(lengths.max())
        x = rows.flatten(0, 1).index_select(0, kept)
        for layer in self.layers if len(kept) else ():
            x = layer.forward_packed(x, cu_seqlens, longest, is_causal)
        x = x if self.norm is None else self.norm(x)
        x = x.new_zeros(padding.numel(), x.shape[1]).index_copy(0, kept, x).unflatten(0, padding.shape)
        return x if batch_first else x.transpose(0, 1)
