"""Attention with every feature in one op; the scores are never stored.

    s    = scale * q·k;  s = softcap * tanh(s / softcap);  s = s + bias - slope * |i + off - j|;  -inf where invisible
    lse  = log(sum_j exp(s) [+ exp(sink)]),  p = exp(s - lse),  out = (p ∘ keep * dropout_scale) · v
    dp   = keep * dropout_scale ∘ (do·vᵀ),  delta = rowsum(do ∘ out) - dlse,  ds = p ∘ (dp - delta)
    dv   = (p ∘ keep * dropout_scale)ᵀ·do,  dbias = ds summed over broadcast dims,  dsink = -sum exp(sink - lse) * delta
    dsr  = ds * (1 - (s_capped / softcap)²),  dq = scale * dsr·k,  dk = scale * dsrᵀ·q

Saved for the backward: q, k, v, out, lse, (seed, offset) and the small inputs; never anything of seqlen_q × seqlen_k.
lse is saved in two parts where they differ from one, lse and lse_low: beside a mask of -1e9 fp32 has no room for the
logarithm of a sum, without which p would not sum up to 1.
The raw ops take (batch, heads, seqlen, head_dim) views of any strides. Packed sequences come as batch 1 with
cu_seqlens; then i, j, off and the Philox slab count per sequence. Causal is window_right = 0.
"""

import functools
import math
from collections import namedtuple

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fastattn import reference
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
from fastattn.ops._backends import choose, device_name, explanation, grad_wanted, refusal, register_backend
from fastattn.ops._dtypes import refuse_dtypes
from fastattn.ops._hopper import HOPPER_HEAD_DIMS, hopper_refuses, hopper_refuses_device
from fastattn.ops._kinds import is_causal_bias, is_dtensor, is_nested
from fastattn.ops._layout import empty_in_layout
from fastattn.ops._nested import on_rows, packed_arguments, packed_attention, sequences_of
from fastattn.ops._public import Public
from fastattn.ops._random import draw_rng
from fastattn.ops._register import (
    RECORDED,
    differentiate,
    observed,
    python_kernel,
    raw_ops,
    register_autograd,
    register_fake,
    register_reference,
)  # fmt: skip

_LAST_NATIVE_BACKWARD = 128  # head dim up to which the kernels for Hopper have a backward

# what a backend may refuse by; sizes stay out, so that decisions are cached
Facts = namedtuple(
    "Facts",
    "device dtype window bias_dtype mask seqlens_k packed alibi softcap sink dropout gqa unequal_head_dims wide_heads"
    " hopper_head_dim above_128",
    defaults=(False, None, *[False] * 12),
)


def _attention_fwd_fake(q, k, v, *rest):
    need_low = rest[-1]
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return empty_in_layout(q, v.shape[-1]), lse, torch.empty_like(lse) if need_low else lse.new_empty(0)


def _attention_bwd_fake(do, dlse, q, k, v, out, lse, lse_low, bias, sink, *rest):
    need_dbias = rest[-2]
    return (
        empty_in_layout(q, q.shape[-1]),
        empty_in_layout(k, k.shape[-1]),
        empty_in_layout(v, v.shape[-1]),
        bias.new_empty(bias.shape) if need_dbias else q.new_empty(0),
        q.new_empty(0 if sink is None else sink.shape[0], dtype=torch.float32),
    )


register_fake("attention_fwd", _attention_fwd_fake)
register_fake("attention_bwd", _attention_bwd_fake)
register_fake("attention_infer", lambda q, k, v, *_: empty_in_layout(q, v.shape[-1]))
_infer = torch.ops.fastattn.attention_infer.native
_ops = {(direction, name): op for direction in ("fwd", "bwd") for name, op in raw_ops(f"attention_{direction}").items()}


def _raw(direction, backend, *tensors):
    """The raw op, or its kernel where that is in Python and may be called directly."""
    direct = python_kernel(f"attention_{direction}", backend, *tensors) if backend == "triton" else None
    return direct or _ops[direction, backend]


def refuses(facts):
    """What every compiled backend refuses; `facts` is a plain tuple, which torch.compile takes for a constant."""
    facts = Facts(*facts)
    return refuse_dtypes(facts.dtype, facts.bias_dtype)


def refuses_triton(facts):
    """What the Triton kernels refuse."""
    if Facts(*facts).wide_heads:
        return "it takes head dims up to 256"
    return refuses(facts)


def refuses_native(facts):
    """What the C++ kernels refuse: on CUDA there are those for Hopper."""
    facts = Facts(*facts)
    if not facts.device.startswith("cuda"):
        return refuses(facts)
    return hopper_refuses(
        facts.dtype, facts.hopper_head_dim and not facts.unequal_head_dims, mask=facts.mask,
        bias=facts.bias_dtype is not None, ALiBi=facts.alibi, softcap=facts.softcap, sink=facts.sink,
        dropout=facts.dropout,
    )  # fmt: skip


def _backward_backend(runs, facts):
    """Which backend makes the gradients after a forward on `runs`: the kernels for Hopper end at head dim 128."""
    if runs == "native" and facts[-1] and facts[0].startswith("cuda"):
        return choose("attention", facts, "triton")
    return runs


register_backend("attention", "native", refuses_native, refuses_device=hopper_refuses_device)
register_backend("attention", "triton", refuses_triton)


def _reference(q, k, v, bias, sink, mask, seqlens_k, cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng, max_seqlen_q,
               max_seqlen_k, window_left, window_right, top_left, softcap, dropout_p, scale,
               need_low=False):  # fmt: skip
    """The reference under the arguments of the raw op."""
    packed = cu_seqlens_q is not None
    if packed:
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
    out, *lse = reference.attention(
        q, k, v, mask=mask, bias=bias, causal="top_left" if top_left else False, window=(window_left, window_right),
        seqlens_k=seqlens_k, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, alibi_slopes=alibi_slopes,
        softcap=softcap, sink=sink, dropout_p=dropout_p, scale=scale, rng=rng, need_low=need_low,
    )  # fmt: skip
    return (out.transpose(0, 1)[None], *(t[None] for t in lse)) if packed else (out, *lse)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, sink, backend, backward_backend, deterministic, *rest):
        # where q·k in half precision is all of a score, its own rounding is far above that of lse
        need_low = q.dtype == torch.float32 or bias is not None or rest[4] is not None
        out, lse, lse_low = _raw("fwd", backend, q, k, v)(q, k, v, bias, sink, *rest, need_low)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, bias, sink, out, lse, lse_low, *rest[:6])
        ctx.options = rest[6:]
        ctx.backend = backward_backend
        ctx.deterministic = deterministic
        if backend not in RECORDED:
            return out, lse, None
        ctx.mark_non_differentiable(lse_low)  # what a graph with a backward in it goes on with
        return out, lse, lse_low

    @staticmethod
    def backward(ctx, do, dlse, _):
        q, k, v, bias, sink, out, lse, lse_low, *rest = ctx.saved_tensors
        rest = (*rest, *ctx.options)
        nothing = (None,) * (3 + len(rest))
        if torch.is_grad_enabled():  # create_graph=True
            grads = differentiate(lambda *inputs: _reference(*inputs, *rest), (q, k, v, bias, sink), (do, dlse))
            return *grads, *nothing
        need_dq, need_dk, need_dv, need_dbias, need_dsink = ctx.needs_input_grad[:5]
        run = _raw("bwd", ctx.backend, q, k, v)
        dq, dk, dv, dbias, dsink = run(
            do, dlse, q, k, v, out, lse, lse_low, bias, sink, *rest, need_dbias, ctx.deterministic
        )
        return (
            dq if need_dq else None,
            dk if need_dk else None,
            dv if need_dv else None,
            dbias if need_dbias else None,
            dsink if need_dsink else None,
            *nothing,
        )


def _apply(backend, q, k, v, bias, sink, *rest):
    *rest, _ = rest  # need_low: the autograd.Function decides by itself
    only_forward = backend.startswith("native") and q.is_cuda and q.shape[-1] > _LAST_NATIVE_BACKWARD
    deterministic = torch.are_deterministic_algorithms_enabled()
    backward = "triton" if only_forward else backend
    return _Attention.apply(q, k, v, bias, sink, backend, backward, deterministic, *rest)


def _reference_of_op(*arguments):
    if arguments[7] is not None and get_proxy_mode() is not None:  # cu_seqlens_q, in a graph
        raise NotImplementedError(
            "attention: packed sequences cannot be written in PyTorch's operators: the shapes of their parts are the"
            " values of cu_seqlens; export a padded batch"
        )
    out, lse, *low = _reference(*arguments)
    return out, lse, low[0] if low else lse.new_empty(0)


register_autograd("attention_fwd", _apply, _reference_of_op)
register_reference(
    "attention_infer",
    lambda q, k, v, right, top_left, scale: _reference(
        q, k, v, *(None,) * 8, q.shape[2], k.shape[2], -1, right, top_left, 0.0, 0.0, scale
    )[0],
)


def _prepare(name, q, k, v, mask, bias, causal, window, seqlens_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
             max_seqlen_k, alibi_slopes, softcap, sink, dropout_p, scale, deterministic):  # fmt: skip
    """Check, cast and bring into the form of the raw op: (facts, q, k, v, bias, sink, the rest with rng None)."""
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
            raise ValueError(f"{name}: packed sequences take no mask and no bias: they share no grid of positions")
        check_cu_seqlens(name, q, cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, max_seqlen_q, max_seqlen_k)
        if cu_seqlens_q is cu_seqlens_k and torch.compiler.is_compiling():
            cu_seqlens_k = cu_seqlens_q.clone()  # Dynamo traces no autograd.Function that gets one tensor twice
        batch = cu_seqlens_q.shape[0] - 1
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    elif max_seqlen_q is not None or max_seqlen_k is not None:
        raise ValueError(f"{name}: max_seqlen_q and max_seqlen_k belong to packed sequences, which need cu_seqlens")
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
    # conditions as expressions: bool() would leave symbolic what torch.compile made symbolic
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
        True if head_dim > _LAST_NATIVE_BACKWARD else False,  # noqa: SIM210
    )  # fmt: skip
    rest = (
        mask, seqlens_k, cu_seqlens_q, cu_seqlens_k, alibi_slopes, None,
        seqlen_q if max_seqlen_q is None else int(max_seqlen_q),
        seqlen_k if max_seqlen_k is None else int(max_seqlen_k),
        left, right, top_left, float(softcap), float(dropout_p), float(scale),
    )  # fmt: skip
    return facts, q, k, v, bias, sink, rest


_ATTENTION = Public(
    "attention",
    tensors="q k v mask bias seqlens_k cu_seqlens_q cu_seqlens_k alibi_slopes sink",
    numbers="softcap dropout_p scale",
    integers="max_seqlen_q max_seqlen_k",
    flags="return_lse deterministic",
    nested=packed_attention,
)


@_ATTENTION.overridable
def attention(
    q, k, v, *, mask=None, bias=None, causal=False, window=None, seqlens_k=None, cu_seqlens_q=None, cu_seqlens_k=None,
    max_seqlen_q=None, max_seqlen_k=None, alibi_slopes=None, softcap=0.0, sink=None, dropout_p=0.0, scale=None,
    return_lse=False, deterministic=None, backend=None,
):  # fmt: skip
    """Scaled dot-product attention: softmax(scale * q·kᵀ + bias) · v, with memory linear in the sequence length.

    With off = 0 for causal="top_left" and seqlen_k - seqlen_q otherwise (bottom-right), query i stands at key i + off.
    A row that sees no key gives 0, lse -inf and no gradient.

    Args:
        q: (batch, n_heads, seqlen_q, head_dim), float32, bfloat16 or float16 (float64 runs on the reference); any
            strides, so a transposed (batch, seqlen, heads, head_dim) costs no copy.
        k: (batch, n_kv_heads, seqlen_k, head_dim), v: (batch, n_kv_heads, seqlen_k, head_dim_v); n_heads must be a
            multiple of n_kv_heads, query head h uses head h // (n_heads // n_kv_heads). All three may be nested,
            ragged in seqlen: they run as packed sequences, and the results are nested like q.
        mask: bool, True = attend, 2 to 4 dimensions that broadcast to (batch, n_heads, seqlen_q, seqlen_k).
        bias: float, shapes as mask, added to the scaled and capped scores; gets a gradient. A CausalBias of
            torch.nn.attention.bias, as mask or as bias, takes the place of causal.
        causal: False, True or "bottom_right", or "top_left": key j is visible iff j <= i + off.
        window: (left, right): keys i + off - left to i + off + right are visible, -1 = unlimited; causal sets right 0.
        seqlens_k: int32 (batch,), keys at or past it are invisible; it takes the place of seqlen_k in off.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,): q is (total_q, n_heads, head_dim), k and v (total_k, n_kv_heads,
            ...), sequence b reaches from cu_seqlens[b] to cu_seqlens[b + 1]. No mask or bias then. Rows behind the last
            sequence give 0 and lse -inf, and get no gradient.
        max_seqlen_q, max_seqlen_k: upper bounds of the packed lengths. No backend needs them: without them the result
            is the same, and neither time nor memory grows with the longest sequence. The native kernel on CUDA chooses
            the size of its blocks by max_seqlen_k. A bound that is too small is an error on a CPU; on a GPU nothing
            reads the lengths.
        alibi_slopes: float32 (n_heads,) or (batch, n_heads): slope * |i + off - j| is subtracted; gets no gradient.
        softcap: scores become softcap * tanh(score / softcap) before the bias; 0 = off.
        sink: float32 (n_heads,), one more logit in the denominator; gets a gradient.
        dropout_p: probability with which an attention weight becomes 0 after the softmax; drawn anew in every call.
        scale: default 1/sqrt(head_dim).
        return_lse: also return the log-sum-exp of each row, differentiable.
        deterministic: whether gradients must have the same bits in every run; None follows
            torch.use_deterministic_algorithms. Only native on CUDA differs: it sums dq as its parts come, unless told.
        backend: "native", "triton" or "reference" instead of the automatic choice. On CUDA native has no backward above
            head dim 128: Triton makes the gradients there.
    Returns: out (batch, n_heads, seqlen_q, head_dim_v) in the layout of q, packed (total_q, n_heads, head_dim_v); with
        return_lse (out, lse), lse float32 (batch, n_heads, seqlen_q), packed (n_heads, total_q).
    Raises:
        ValueError: shapes, devices, lengths or numbers do not fit, or the named backend cannot serve the call.
        TypeError: a dtype does not fit.
    Source: Dao, "FlashAttention-2", 2023; alignment and window as in flash-attn 2.1 and later.
    """
    facts, q, k, v, bias, sink, rest = _prepare(
        "attention", q, k, v, mask, bias, causal, window, seqlens_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, alibi_slopes, softcap, sink, dropout_p, scale, deterministic,
    )  # fmt: skip
    out, lse = _run(facts, q, k, v, bias, sink, rest, backend, return_lse, deterministic)
    if cu_seqlens_q is not None:
        out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


@_ATTENTION.answering
def attention_with_rng(q, k, v, *, mask=None, bias=None, causal=False, dropout_p=0.0, rng=None, backend=None):
    """`attention` with return_lse and with the random state named: for who needs its dropout mask again."""
    facts, q, k, v, bias, sink, rest = _prepare(
        "attention", q, k, v, mask, bias, causal, None, None, None, None, None, None, None, 0.0, None, dropout_p, None,
        None,
    )  # fmt: skip
    return _run(facts, q, k, v, bias, sink, (*rest[:5], rng, *rest[6:]), backend, True)


def _run(facts, q, k, v, bias, sink, rest, backend, need_lse, deterministic=None):
    """(out, lse) on the backend that serves the call; lse may be None unless it is needed."""
    if type(q) is not torch.Tensor and is_dtensor(q):
        return _run_sharded(facts, q, k, v, bias, sink, rest, backend, need_lse, deterministic)
    runs = observed(choose("attention", facts, backend))
    if q.is_meta and rest[2] is not None:
        runs = "native"  # for the shapes: the reference would read cu_seqlens
    if rest[-2] and rest[5] is None:  # dropout_p without its rng
        rest = (*rest[:5], draw_rng(q), *rest[6:])
    if runs == "reference":
        return _reference(q, k, v, bias, sink, *rest)
    if runs in RECORDED:
        return _ops["fwd", runs](q, k, v, bias, sink, *rest, False)[:2]
    if grad_wanted(q, k, v, bias, sink):
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        backward = _backward_backend(runs, facts)
        out, lse, _ = _Attention.apply(q, k, v, bias, sink, runs, backward, deterministic, *rest)
        return out, lse
    if runs == "native" and not need_lse and facts[0] == "cpu" and not any(facts[3:11]):  # bias_dtype to dropout
        *_, left, right, top_left, _, _, scale = rest
        if left == -1:
            return _infer(q, k, v, right, top_left, scale), None
    out, lse, _ = _raw("fwd", runs, q, k, v)(q, k, v, bias, sink, *rest, False)
    return out, lse


def sharded_call(name, q, k, v, bias, sink, mask, seqlens_k, cu_seqlens_q, cu_seqlens_k, alibi_slopes, positions):
    """The call of attention on DTensors, in the form of the raw op.

    Args:
        positions: whether the result depends on where the queries stand.
    """
    from fastattn.ops._sharded import ShardedCall

    # with equal numbers of heads any part of them fits; one head of k and v serves every part
    divisible = {} if k.shape[1] in (1, q.shape[1]) else {"h": k.shape[1]}
    row = "b" if cu_seqlens_q is None else "r"  # packed sequences lie in a batch of 1
    operands = {
        "q": (q, "bhsd"), "k": (k, "bhtd"), "v": (v, "bhte"), "bias": (bias, "bhst"), "sink": (sink, "h"),
        "mask": (mask, "bhst"), "seqlens_k": (seqlens_k, row), "cu_seqlens_q": (cu_seqlens_q, "c"),
        "cu_seqlens_k": (cu_seqlens_k, "c"),
        "alibi_slopes": (alibi_slopes, "h" if alibi_slopes is not None and alibi_slopes.dim() == 1 else row + "h"),
    }  # fmt: skip
    letters = "h" if cu_seqlens_q is not None else "bh" if positions else "bhs"
    plain = ("bias", "mask", "seqlens_k", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes")
    return ShardedCall(name, operands, letters, divisible=divisible, plain=plain)


def _run_sharded(facts, q, k, v, bias, sink, rest, backend, need_lse, deterministic):
    *tensors, rng, max_seqlen_q, max_seqlen_k, left, right = rest[:10]
    positions = left >= 0 or right >= 0 or tensors[-1] is not None
    call = sharded_call("attention", q, k, v, bias, sink, *tensors, positions)
    if rest[-2] and rng is None:
        rng = call.draw_rng()

    def function(q, k, v, bias, sink, *tensors):
        longest = q.shape[2] if tensors[2] is None else max_seqlen_q  # of the part
        options = (rng, longest, max_seqlen_k, left, right, *rest[10:])
        return _run(facts, q, k, v, bias, sink, (*tensors, *options), backend, need_lse, deterministic)

    return call(function, ("bhse", "bhs"))


@_ATTENTION.answering
def explain(q, k, v, *, mask=None, bias=None, causal=False, window=None, seqlens_k=None, cu_seqlens_q=None,
            cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, alibi_slopes=None, softcap=0.0, sink=None,
            dropout_p=0.0, scale=None, return_lse=False, deterministic=None, backend=None):  # fmt: skip
    """What `attention` would run for these arguments, and why not the others."""
    facts, *_ = _prepare(
        "attention", q, k, v, mask, bias, causal, window, seqlens_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, alibi_slopes, softcap, sink, dropout_p, scale, deterministic,
    )  # fmt: skip
    return _explanation(facts, backend)


def _explanation(facts, backend=None):
    text = explanation("attention", facts, backend)
    if facts[-1] and facts[0].startswith("cuda") and refusal("attention", "native", facts) is None:
        text += "\n  native has no backward above head dim 128: triton makes the gradients"
    return text


def _torch_arguments(query, key, value, attn_mask, is_causal, enable_gqa):
    """PyTorch's conventions in ours: (q, k, v, mask, bias) with four dimensions."""
    name = "scaled_dot_product_attention"
    if is_causal and attn_mask is not None:
        raise ValueError(
            f"{name}: Explicit attn_mask should not be set when is_causal=True, got one of shape"
            f" {tuple(attn_mask.shape)}"
        )
    for label, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < 2:
            raise ValueError(f"{name}: {label} must have at least 2 dimensions, got shape {tuple(t.shape)}")
    if attn_mask is not None:
        if attn_mask.dim() < 2:
            raise ValueError(f"{name}: attn_mask must have at least 2 dimensions, got shape {tuple(attn_mask.shape)}")
        if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype) and not torch.is_autocast_enabled(
            query.device.type
        ):
            raise TypeError(f"{name}: attn_mask must be bool, float32 or {query.dtype} as query, got {attn_mask.dtype}")
    if not (query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]):
        query, key, value, attn_mask = _four_dimensions(name, query, key, value, attn_mask)
    heads_q, heads_k, heads_v = query.shape[1], key.shape[1], value.shape[1]
    if heads_q != heads_k or heads_k != heads_v:
        if enable_gqa:
            if heads_k != heads_v and heads_k and heads_v:
                heads = max(heads_k, heads_v)
                if heads_q % heads_k or heads_q % heads_v or heads % heads_k or heads % heads_v:
                    raise ValueError(
                        f"{name}: the heads of query must be a multiple of those of key and value, got {heads_q},"
                        f" {heads_k}, {heads_v}"
                    )
                key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
        elif any(heads not in (1, max(heads_q, heads_k, heads_v)) for heads in (heads_q, heads_k, heads_v)):
            raise ValueError(
                f"{name}: query, key and value must have the same number of heads, or 1, unless enable_gqa is True,"
                f" got {heads_q}, {heads_k}, {heads_v}"
            )
        else:
            heads = max(heads_q, heads_k, heads_v)
            query = query.expand(-1, heads, -1, -1)
            if heads_k != heads_v:
                key, value = (t.expand(-1, heads, -1, -1) for t in (key, value))
    mask = attn_mask if attn_mask is not None and attn_mask.dtype == torch.bool else None
    return query, key, value, mask, None if mask is not None else attn_mask


def _four_dimensions(name, query, key, value, attn_mask):
    """Broadcast the leading dimensions and fold all but the last of them into the batch."""
    inputs = [query, key, value] + ([] if attn_mask is None else [attn_mask])
    inputs = [t[(None,) * (3 - t.dim())] if t.dim() < 3 else t for t in inputs]
    try:
        leading = torch.broadcast_shapes(*(t.shape[:-3] for t in inputs[:3]))
        if attn_mask is not None and torch.broadcast_shapes(leading, inputs[3].shape[:-3]) != leading:
            raise RuntimeError("attn_mask is larger")
    except RuntimeError as error:
        raise ValueError(
            f"{name}: the leading dimensions must broadcast, got {', '.join(str(tuple(t.shape)) for t in inputs)}"
        ) from error
    batch = math.prod(leading)
    folded = [t.expand(*leading, *t.shape[-3:]).reshape(batch, *t.shape[-3:]) for t in inputs[:3]]
    if attn_mask is not None:
        mask = inputs[3]
        if all(size == 1 for size in mask.shape[:-3]):
            attn_mask = mask.reshape(1, *mask.shape[-3:])
        else:
            attn_mask = mask.expand(*leading, *mask.shape[-3:]).reshape(batch, *mask.shape[-3:])
    return *folded, attn_mask


def _prepare_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    name, causal = "scaled_dot_product_attention", "top_left" if is_causal else False
    if attn_mask is not None and is_causal_bias(attn_mask):
        causal = causal_flag(name, "attn_mask", attn_mask, is_causal, query.shape[-2], key.shape[-2])
        attn_mask = None
    q, k, v, mask, bias = _torch_arguments(query, key, value, attn_mask, is_causal, enable_gqa)
    return _prepare(
        name, q, k, v, mask, bias, causal, None, None, None, None, None, None, None, 0.0, None, dropout_p, scale, None
    )


def _scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, backend=None
):
    facts, q, k, v, bias, sink, rest = _prepare_torch(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    out, _ = _run(facts, q, k, v, bias, sink, rest, backend, False)
    if query.dim() == 4:
        return out
    leading = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    out = out.reshape(*leading, *out.shape[1:])
    return out[0] if query.dim() == key.dim() == value.dim() == 2 else out


_QKV = ("query", "key", "value")


def _torch_nested(explains, name, function, given):
    """For Public(nested=): packed sequences, or, if the ragged dimension is one more of the batch, the values."""
    query = given["query"]
    if is_nested(query) and query.layout is torch.jagged and query._ragged_idx == 1 and query.dim() > 3:
        labels = ("query", "key", "value", "attn_mask") if is_nested(given.get("attn_mask")) else _QKV
        return on_rows(*labels)(name, function, given)
    tensors = {label: given[label] for label in _QKV}
    if all(is_nested(t) and t.layout is torch.strided and t.dim() == 3 for t in tensors.values()):  # without heads
        with_heads = {label: t.unsqueeze(1) for label, t in tensors.items()}
        out = _torch_nested(explains, name, function, given | with_heads)
        return out if explains else out.squeeze(1)
    if given.get("attn_mask") is not None:
        raise ValueError(f"{name}: attn_mask must be None for nested tensors, whose sequences share no grid")
    q, k, v = sequences_of(name, given, *_QKV)
    if q.tensor.shape[1] != k.tensor.shape[1] and not given.get("enable_gqa"):
        raise ValueError(
            f"{name}: query and key must have the same number of heads unless enable_gqa is True, got"
            f" {q.tensor.shape[1]} and {k.tensor.shape[1]}"
        )
    where = packed_arguments(q, k)
    facts, *tensors, rest = _prepare(
        name, q.tensor, k.tensor, v.tensor, None, None, "top_left" if given.get("is_causal") else False, None, None,
        *where.values(), None, 0.0, None, given.get("dropout_p", 0.0), given.get("scale"), None,
    )  # fmt: skip
    if explains:
        return _explanation(facts)
    out, _ = _run(facts, *tensors, rest, None, False)
    return q.restore(out[0].transpose(0, 1))


def _torch_public(explains):
    return Public(
        "scaled_dot_product_attention", tensors="query key value attn_mask", numbers="dropout_p scale",
        flags="is_causal enable_gqa", nested=functools.partial(_torch_nested, explains),
        on_reference=functools.partial(_scaled_dot_product_attention, backend="reference"),
    )  # fmt: skip


@_torch_public(explains=True).answering
def explain_torch(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What `scaled_dot_product_attention` would run for these arguments, and why not the others."""
    facts, *_ = _prepare_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _explanation(facts)


@_torch_public(explains=False).overridable
def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """`torch.nn.functional.scaled_dot_product_attention` on the kernels of `attention`.

    Args:
        query: (..., n_heads, seqlen_q, head_dim); key, value: (..., n_kv_heads, seqlen_k, head_dim or head_dim_v). All
            three may be nested tensors (batch, n_heads, seqlen, head_dim), then without attn_mask.
        attn_mask: bool (True = attend), float32 or the dtype of query (added to the scores), at least 2 dimensions; or
            a CausalBias of torch.nn.attention.bias for these lengths.
        dropout_p: applied always, as in PyTorch: pass 0.0 in evaluation.
        is_causal: query i sees keys 0 to i (top-left); not together with attn_mask.
        scale: default 1/sqrt(head_dim).
        enable_gqa: allow fewer heads in key and value than in query.
    Returns: (..., n_heads, seqlen_q, head_dim_v) in the layout of query.
    Raises:
        ValueError, TypeError: as `attention`; each is a RuntimeError too, which PyTorch raises.
    Source: torch.nn.functional.scaled_dot_product_attention.
    """
    return _scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
