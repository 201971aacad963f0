"""A user's program for a type checker, not for Python. A line with a mistake names the error it must give."""

import torch
from torch import Tensor

import fastattn
from fastattn import nn
from fastattn.integrations.flash_attn import flash_attn_func, flash_attn_with_kvcache

q = k = v = torch.zeros(1, 2, 8, 16)
x, weight = torch.zeros(4, 16), torch.ones(16)

out: Tensor = fastattn.attention(q, k, v, causal="top_left", window=(3, -1), softcap=30.0, backend="native")
out, lse = fastattn.attention(q, k, v, return_lse=True)
y: Tensor = fastattn.layer_norm(x, weight, residual=x, dropout_p=0.1)
y, residual = fastattn.layer_norm(x, weight, residual=x, return_residual=True)
y = fastattn.rms_norm(x, weight)
rotated: Tensor = fastattn.rotary_embedding(q, torch.ones(8, 8), torch.ones(8, 8))
pair: tuple[Tensor, Tensor] = fastattn.rotary_embedding((q, k), torch.ones(8, 8), torch.ones(8, 8), positions=0)
loss: Tensor = fastattn.linear_cross_entropy(x, torch.zeros(5, 16), torch.zeros(4, dtype=torch.int64), reduction="sum")
text: str = fastattn.explain("attention", q, k, v, backend="triton")
report = fastattn.replace(torch.nn.LayerNorm(16), only="LayerNorm")
layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
packed: Tensor | tuple[Tensor, Tensor, None] = flash_attn_func(q, k, v, causal=True, window_size=(64, 0))
run = fastattn.load_run
with fastattn.use_backend("reference"):
    hidden: Tensor = layer.forward(x[None], is_causal=False)

fastattn.attention(q, k, v, casual=True)  # type: ignore[call-overload]
fastattn.attention(q, k, v, causal="left")  # type: ignore[call-overload]
fastattn.attention_decode(q, k, v)  # type: ignore[call-overload]
fastattn.layer_norm(x, weight, epsilon=1e-5)  # type: ignore[call-overload]
fastattn.dropout(x, p=0.1)  # type: ignore[call-arg]
fastattn.feed_forward(x, weight, None, weight, None, activation="swish")  # type: ignore[arg-type]
fastattn.linear_cross_entropy(x, weight, x, reduction="average")  # type: ignore[arg-type]
fastattn.scaled_dot_product_attention(q, k, v, causal=True)  # type: ignore[call-arg]
fastattn.rotary_embedding(q, x, x, interleave=True)  # type: ignore[call-overload]
fastattn.use_backend("cuda")  # type: ignore[arg-type]
nn.MultiheadAttention(16, 2, batchfirst=True)  # type: ignore[call-arg]
nn.RMSNorm(16).forward(16)  # type: ignore[arg-type]
flash_attn_func(q, k, v, casual=True)  # type: ignore[call-arg]
flash_attn_with_kvcache(q, k, v, cache_seqlen=3)  # type: ignore[call-arg]
fastattn.atention(q, k, v)  # type: ignore[attr-defined]
