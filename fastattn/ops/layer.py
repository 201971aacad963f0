"""A whole transformer layer in one call, of new tokens on a cache or of an encoder: for CPUs, without gradients.

pre-norm   r = x + out_proj(attention(in_proj(norm1(x)))),  y = r + linear2(hidden(norm2(r)))
post-norm  r = norm1(x + out_proj(attention(in_proj(x)))),  y = norm2(r + linear2(hidden(r)))
hidden(h) = activation(linear1(h)), or gated activation(gate(h)) * linear1(h)

With few tokens a layer takes as long as reading its weights, so they may be kept in bfloat16 or int8; activations and
sums are fp32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn._autocast import autocast_dtype
from fastattn.ops import _gemm
from fastattn.ops._backends import choose
from fastattn.ops._register import register_fake, traced_backend
from fastattn.ops.feed_forward import ACTIVATIONS

WEIGHTS = ("bf16", "int8")
_STRIP = 2**18  # elements of a weight that are converted at a time, so that the passes of a strip stay in the cache
ABSENT = torch.empty(0)  # stands for None in a list of tensors
ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


class Linear(NamedTuple):
    """The tensors of a linear layer: weight (d_out, d_in), scale and bias (d_out,), each without elements if absent."""

    weight: Tensor
    scale: Tensor
    bias: Tensor


class Layer(NamedTuple):
    """A layer as `decode_layer` and `encode_layer` take it.

    norms: weight and bias of norm1, norm2 and, in a decoder layer, norm3. linears: weight, scale and bias of in_proj,
    out_proj, linear1, linear2 and, if gated, gate; in a decoder layer, in_proj and out_proj of the attention to the
    memory. activation: of ACTIVATION_NUMBERS. eps1, eps2, eps3: of the norms.
    """

    norms: list
    linears: list
    n_heads: int
    norm_first: bool
    activation: int
    eps1: float
    eps2: float
    eps3: float = 0.0


class Cache(NamedTuple):
    """What a layer attends to: k and v, (batch, n_kv_heads, capacity, head_dim), and lengths, int32 (batch,)."""

    k: Tensor
    v: Tensor
    lengths: Tensor


class Positions(NamedTuple):
    """How positions enter a layer: tables of a rotary embedding, (rows, rotary_dim / 2), or ALiBi's slopes, or None."""

    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool
    alibi_slopes: Tensor | None


def present(t):
    """t, or ABSENT for None."""
    return ABSENT if t is None else t


def convert_linear(weight: Tensor, bias: Tensor | None, kind: str) -> Linear:
    """A copy of an fp32 linear layer with its weight in bfloat16 or int8.

    int8 is symmetric, with one scale for each row of the weight: weight ≈ scale * integer, from -127 to 127. An element
    is off by at most half a scale, which is 1/254 of the largest element of its row; in bfloat16 by at most 1/256 of
    itself.

    Args:
        weight: (d_out, d_in) fp32; bias: (d_out,) or None.
        kind: "bf16" or "int8".
    """
    kept = ABSENT if bias is None else bias.detach().clone()
    weight = weight.detach()
    if kind == "bf16":
        return Linear(weight.to(torch.bfloat16, copy=True).contiguous(), ABSENT, kept)
    integers, scale = torch.empty(weight.shape, dtype=torch.int8), torch.ones(len(weight))
    rows = max(1, _STRIP // max(1, weight.shape[1]))
    for part, out, scales in zip(weight.split(rows), integers.split(rows), scale.split(rows), strict=True):
        if not part.numel():
            continue
        largest = part.abs().amax(1)
        torch.div(largest, 127, out=scales)
        scales.masked_fill_(scales == 0, 1.0)
        out.copy_((part / scales[:, None]).round_())
    return Linear(integers, scale, kept)


def few_rows_linear(x: Tensor, linear: Linear) -> Tensor:
    """x (..., d_in), fp32, through a `Linear`: (..., d_out)."""
    weight, scale, bias = linear
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    y = _gemv(rows, weight, scale if weight.dtype == torch.int8 else None, bias if bias.numel() else None)
    return y.view(*x.shape[:-1], len(weight))


_gemv = torch.ops.fastattn.gemv.native._op


def serves(x: Tensor, head_dim: int) -> bool:
    """Whether `decode_layer` computes a layer of tokens x: fp32 on the CPU, with no gradient, cast or trace."""
    return (
        not torch.is_grad_enabled()
        and x.dtype == torch.float32
        and autocast_dtype(x) is None
        and _is_plain(x)
        and choose("attention_decode", ("cpu", x.dtype, head_dim > 256)) == "native"
    )


def encoder_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the products if one call may compute an encoder layer of tokens x, or None.

    None: a trace or mode watches the ops, or the processor has no products of this dtype. Autocast may cast fp32 to
    bf16, in a training step only.
    """
    cast = autocast_dtype(x)
    dtype = x.dtype if cast is None else cast
    if (
        (x.dtype == torch.float32 or x.dtype == torch.bfloat16)
        and (dtype == x.dtype or (dtype == torch.bfloat16 and torch.is_grad_enabled()))
        and (dtype == torch.float32 or _gemm.has_products(dtype))
        and _is_plain(x)
        and x.layout is torch.strided
        and not torch._C._len_torch_dispatch_stack()
        and not _is_watched()
        and choose("feed_forward", ("cpu", dtype, None)) == "native"
    ):
        return dtype
    return None


def _is_watched():
    """Whether a mode sees the calls of torch. Those of `replace` do not count: they only redirect single functions."""
    n_modes = torch._C._len_torch_function_stack()
    if not n_modes:  # as nearly always; the generator takes 0.3 us
        return False
    modes = map(torch._C._get_function_stack_at, range(n_modes))
    return any(not getattr(mode, "only_serves", False) for mode in modes)


def _is_plain(x):
    return (
        x.is_cpu
        and type(x) is torch.Tensor
        and not torch.compiler.is_compiling()
        and traced_backend("native") == "native"
    )


def decode_layer(x: Tensor, layer: Layer, cache: Cache, positions: Positions) -> Tensor:
    """A layer of new tokens, whose keys and values are added to the cache.

    Args:
        x: (batch, seqlen, d_model) fp32, for which `serves` is true.
        layer: its weights and options.
        cache: updated in place; its lengths are those before the call.
        positions: with rotary tables, all lengths must be equal.
    Returns: (batch, seqlen, d_model).
    Raises:
        RuntimeError: shapes or dtypes do not fit, or the cache is full.
    """
    norms, linears, *options, _eps3 = layer
    return _layer(x, norms, linears, *cache, *positions, *_gemm.most_rows(), *options)


class Memory(NamedTuple):
    """What a decoder layer attends to: tokens, laid out like x, with their own length.

    mask, bias: what the op `attention` takes, or None. causal: position i sees positions 0 to i.
    """

    tokens: Tensor
    mask: Tensor | None
    bias: Tensor | None
    causal: bool


def memory_list(tokens, mask, bias):
    """The tensors of a `Memory`, or three None, as the raw ops take them."""
    return [] if tokens is None else [tokens, present(mask), present(bias)]


def encode_layer(
    x: Tensor,
    layer: Layer,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    batch_first: bool,
    memory: Memory | None = None,
) -> Tensor:
    """An encoder layer of x, or a decoder layer of x and a memory.

    Args:
        x: (batch, seqlen, d_model), or (seqlen, batch, d_model) without batch_first; `encoder_dtype` is its dtype.
        layer: its weights, of the dtype of x, and options.
        mask, bias: what the op `attention` takes, or None; both broadcast to (batch, n_heads, seqlen, seqlen).
        causal: position i sees positions 0 to i.
        memory: what a decoder layer attends to.
    Returns: like x.
    Raises:
        RuntimeError: shapes or dtypes do not fit.
    """
    norms, linears, *options = layer
    products = _gemm.most_rows(x.dtype, x.shape[0] * x.shape[1])
    *tensors, memory_causal = (None, None, None, False) if memory is None else memory
    return _encode(
        x, norms, linears, mask, bias, causal, memory_list(*tensors), memory_causal, batch_first, *products, *options
    )


register_fake("layer_encode", lambda x, *_: x.new_empty(x.shape))
register_fake("layer_decode", lambda x, *_: x.new_empty(x.shape))
_encode = torch.ops.fastattn.layer_encode.native._op
_layer = torch.ops.fastattn.layer_decode.native._op
