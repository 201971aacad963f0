"""Fused attention, normalisation and feed-forward kernels for PyTorch behind drop-in torch.nn layers."""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastattn import _needs_torch, nn  # noqa: F401  _needs_torch first: what to do without PyTorch
from fastattn._native import cpu_capability, load_backends
from fastattn.drop_in import replace
from fastattn.integrations.sdpa import patch_sdpa
from fastattn.nn import (
    FeedForward,
    LayerNorm,
    MultiheadAttention,
    RMSNorm,
    RotaryEmbedding,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from fastattn.ops import (
    attention,
    attention_decode,
    dropout,
    explain,
    feed_forward,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    rotary_embedding,
    scaled_dot_product_attention,
)
from fastattn.ops._backends import backends, use_backend
from fastattn.ops._gemm import use_kernel

__version__ = "0.1.0"
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
    "attention",
    "attention_decode",
    "backends",
    "dropout",
    "explain",
    "feed_forward",
    "layer_norm",
    "linear_cross_entropy",
    "nn",
    "patch_sdpa",
    "register",
    "replace",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "use_backend",
]

nn.replace = replace  # type: ignore[attr-defined]  # its older name


def register() -> None:
    """Make `attn_implementation="fastattn"` known to Hugging Face transformers, which this imports.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> fastattn.register()
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=100))
        >>> model.set_attn_implementation("fastattn")  # or from_pretrained(name, attn_implementation="fastattn")
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 100])
    """
    import fastattn.integrations.transformers  # noqa: F401  it registers what it has


_TRAINING = {"load_run": "fastattn.training.runs.loaded"}  # what needs the packages of the extra train


if TYPE_CHECKING:  # with a module __getattr__, a type checker accepts every name
    load_run: Callable[..., Any]
else:

    def __getattr__(name):
        if name not in _TRAINING:
            raise AttributeError(f"module 'fastattn' has no attribute {name!r}")
        return getattr(importlib.import_module(_TRAINING[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_TRAINING, *(name for name in globals() if name.startswith("__"))})


load_backends()
use_kernel(cpu_capability())
