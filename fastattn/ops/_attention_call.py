"""One call of attention as a value: its arguments, checked, cast and in the form that the raw op takes."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn._autocast import as_autocast
from fastattn.ops._attention_checks import (
    causal_flag,
    check_cu_seqlens,
    check_numbers,
    check_per_head,
    check_qkv,
    check_scores,
    check_seqlens_k,
    resolve_window,
)
from fastattn.ops._backends import device_name
from fastattn.ops._hopper import HOPPER_HEAD_DIMS
from fastattn.ops._kinds import is_causal_bias


class AttentionCall(NamedTuple):
    """The arguments of the raw op attention_fwd, in order, without need_low.

    The tensors come first. Packed sequences form a batch of 1.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    sink: Tensor | None
    mask: Tensor | None
    seqlens_k: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    alibi_slopes: Tensor | None
    rng: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    window_left: int
    window_right: int
    top_left: bool
    softcap: float
    dropout_p: float
    scale: float


N_TENSORS = AttentionCall._fields.index("max_seqlen_q")


class Facts(NamedTuple):
    """The properties of a call that decide which backends can serve it. No sizes, so that decisions can be cached."""

    device: str
    dtype: torch.dtype
    window: bool = False
    bias_dtype: torch.dtype | None = None
    mask: bool = False
    seqlens_k: bool = False
    packed: bool = False
    alibi: bool = False
    softcap: bool = False
    sink: bool = False
    dropout: bool = False
    gqa: bool = False
    unequal_head_dims: bool = False
    wide_heads: bool = False
    hopper_head_dim: bool = False
    above_128: bool = False


_MORE_THAN_A_WINDOW = slice(Facts._fields.index("bias_dtype"), Facts._fields.index("dropout") + 1)


def is_plain(facts):
    """Whether the scores are scale * q·k with at most a causal or local window."""
    return not any(facts[_MORE_THAN_A_WINDOW])


def attention_call(
    name, q, k, v, mask=None, bias=None, causal=False, window=None, seqlens_k=None, cu_seqlens_q=None,
    cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, alibi_slopes=None, softcap=0.0, sink=None, dropout_p=0.0,
    scale=None,
):  # fmt: skip
    """Check the arguments of the public op `attention` and return (facts, AttentionCall). Messages name the op `name`.

    The facts are a plain tuple in the order of Facts: making a Facts takes 0.3 us, and only a new decision needs one.
    The random state of a call with dropout is still None: it is drawn after the backend is chosen.
    """
    device = "cpu" if q.is_cpu else device_name(q.device)
    q, k, v = as_autocast(q, k, v)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    batch, n_heads, n_kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v = check_qkv(name, q, k, v, packed)
    softcap, dropout_p, scale = check_numbers(name, softcap, dropout_p, scale)
    if mask is not None and is_causal_bias(mask) and not packed:
        mask, causal = None, causal_flag(name, "mask", mask, causal, seqlen_q, seqlen_k)
    if bias is not None and is_causal_bias(bias) and not packed:
        bias, causal = None, causal_flag(name, "bias", bias, causal, seqlen_q, seqlen_k)
    left, right, top_left = resolve_window(name, causal, window)
    if packed:
        if mask is not None or bias is not None:
            raise ValueError(f"{name}: packed sequences take neither mask nor bias: they share no grid of positions")
        check_cu_seqlens(name, q, cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, max_seqlen_q, max_seqlen_k)
        batch = cu_seqlens_q.shape[0] - 1
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    elif max_seqlen_q is not None or max_seqlen_k is not None:
        raise ValueError(f"{name}: max_seqlen_q and max_seqlen_k are for packed sequences, which need cu_seqlens")
    full = (batch, n_heads, seqlen_q, seqlen_k)
    if mask is not None:
        mask = check_scores(name, "mask", mask, q, full)
    if bias is not None:
        bias = check_scores(name, "bias", bias, q, full)
    if seqlens_k is not None:
        check_seqlens_k(name, seqlens_k, q, batch, seqlen_k, cu_seqlens_k)
    if alibi_slopes is not None:
        alibi_slopes = check_per_head(name, "alibi_slopes", alibi_slopes, q, ((n_heads,), (batch, n_heads)))
    if sink is not None:
        sink = check_per_head(name, "sink", sink, q, ((n_heads,),))
    if scale is None:
        scale = head_dim**-0.5 if head_dim else 1.0
    # conditional expressions, because bool() of a symbolic condition stays symbolic under torch.compile
    facts = (
        device, q.dtype, left >= 0 or right >= 0, None if bias is None else bias.dtype, mask is not None,
        seqlens_k is not None, packed, alibi_slopes is not None,
        True if softcap > 0 else False,  # noqa: SIM210
        sink is not None,
        True if dropout_p > 0 else False,  # noqa: SIM210
        True if n_heads != n_kv_heads else False,  # noqa: SIM210
        True if head_dim != head_dim_v else False,  # noqa: SIM210
        True if head_dim > 256 or head_dim_v > 256 else False,  # noqa: SIM210
        True if head_dim in HOPPER_HEAD_DIMS else False,  # noqa: SIM210
        True if head_dim > 128 else False,  # noqa: SIM210
    )  # fmt: skip
    call = tuple.__new__(AttentionCall, (  # the constructor of a NamedTuple is a Python function and 0.2 us slower
        q, k, v, bias, sink, mask, seqlens_k, cu_seqlens_q, cu_seqlens_k, alibi_slopes, None,
        seqlen_q if max_seqlen_q is None else int(max_seqlen_q),
        seqlen_k if max_seqlen_k is None else int(max_seqlen_k),
        left, right, top_left, float(softcap), float(dropout_p), float(scale),
    ))  # fmt: skip
    return facts, call


def sharded_call(name, call, positions):
    """A `ShardedCall` for an AttentionCall on DTensors.

    Args:
        name: name of the op, for messages.
        positions: whether the result depends on the positions of the queries.
    """
    from fastattn.ops._sharded import ShardedCall

    # any sharding of the heads works if k and v have as many heads as q, or one
    n_heads, n_kv_heads = call.q.shape[1], call.k.shape[1]
    divisible = {} if n_kv_heads in (1, n_heads) else {"h": n_kv_heads}
    row = "b" if call.cu_seqlens_q is None else "r"  # packed sequences are a batch of 1
    slopes = call.alibi_slopes
    dims = {
        "q": "bhsd", "k": "bhtd", "v": "bhte", "bias": "bhst", "sink": "h", "mask": "bhst", "seqlens_k": row,
        "cu_seqlens_q": "c", "cu_seqlens_k": "c",
        "alibi_slopes": "h" if slopes is not None and slopes.dim() == 1 else row + "h",
    }  # fmt: skip
    letters = "h" if call.cu_seqlens_q is not None else "bh" if positions else "bhs"
    plain = ("bias", "mask", "seqlens_k", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes")
    operands = {label: (getattr(call, label), dims[label]) for label in dims}
    return ShardedCall(name, operands, letters, divisible=divisible, plain=plain)
