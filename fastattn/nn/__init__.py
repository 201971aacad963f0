"""Drop-in modules: torch.nn's classes on fused kernels, with the same arguments, parameters and masks."""

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from fastattn.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from fastattn.nn.feed_forward import FeedForward
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.rotary import RotaryEmbedding
from fastattn.nn.transformer import Transformer

__all__ = [
    "FeedForward",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
