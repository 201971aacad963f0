"""The encoder-decoder model of torch.nn, built from the layers of fastattn.nn."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from fastattn.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from fastattn.nn.norm import LayerNorm
from fastattn.nn.plain import leaf_call
from fastattn.ops._public import Public


class Transformer(torch.nn.Transformer):
    """`torch.nn.Transformer` on fused kernels: the same arguments, parameters and masks.

    Args:
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation, custom_encoder,
            custom_decoder, layer_norm_eps, batch_first, norm_first, bias, device, dtype: as in torch.nn.
        strict_torch: as in `MultiheadAttention`, for the stacks built here.
    Source: torch.nn.Transformer.
    Example:
        >>> model = fastattn.nn.Transformer(64, 8, 2, 2, dim_feedforward=128, batch_first=True)
        >>> model(torch.randn(4, 32, 64), torch.randn(4, 16, 64), tgt_is_causal=True).shape
        torch.Size([4, 16, 64])
    """

    @Public("nn.Transformer", flags="strict_torch").answering
    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: nn.Module | None = None,
        custom_decoder: nn.Module | None = None,
        layer_norm_eps: float = 1e-05,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        strict_torch: bool = False,
    ) -> None:
        layer = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def norm():
            return LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)

        # passed to torch as custom stacks; built in torch's order, so they get the same random draws
        if custom_encoder is None:
            encoder_layer = TransformerEncoderLayer(*layer, **factory, strict_torch=strict_torch)
            custom_encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norm(), strict_torch=strict_torch)
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(*layer, **factory, strict_torch=strict_torch)
            custom_decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norm(), strict_torch=strict_torch)
        super().__init__(
            d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation,
            custom_encoder, custom_decoder, layer_norm_eps, batch_first, norm_first, bias, device, dtype,
        )  # fmt: skip

    @Public(
        "nn.Transformer",
        tensors="src tgt src_mask tgt_mask memory_mask src_key_padding_mask tgt_key_padding_mask"
        " memory_key_padding_mask",
        flags="src_is_causal tgt_is_causal memory_is_causal",
        nested=None,
    ).answering
    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Encode src, and decode tgt attending to it; arguments and result as in torch.nn.Transformer."""
        arguments = (
            src, tgt, src_mask, tgt_mask, memory_mask, src_key_padding_mask, tgt_key_padding_mask,
            memory_key_padding_mask, src_is_causal, tgt_is_causal, memory_is_causal,
        )  # fmt: skip
        if not (src.is_nested is tgt.is_nested is False) and (recorded := leaf_call(self, *arguments)) is not None:
            return recorded
        return super().forward(*arguments)
